package token

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/go-jose/go-jose/v4"
)

const (
	// minRSA is the least size of an RSA key in bits (RFC 7518 section 3.3).
	minRSA = 2048
	// maxRSA bounds the work of one signature.
	maxRSA = 8192
	// maxKeys bounds a set.
	maxKeys = 1000
)

// Keys are the public keys of a JSON Web Key Set. They are immutable.
type Keys struct {
	list []key
}

// key is a public key. An empty id or algorithm is any.
type key struct {
	id, alg string
	public  any
}

// ParseKeys reads a JSON Web Key Set, or an object of PEM certificates by key ID, as
// some issuers have it. Keys of no use here (of an unknown type, damaged, symmetric,
// RSA keys of less than 2048 bits) are left out, private parts are not read; a set
// without any key that is of use is an error.
func ParseKeys(text []byte) (*Keys, error) {
	var set map[string]json.RawMessage
	if err := json.Unmarshal(text, &set); err != nil || set == nil {
		return nil, errors.New("reading a key set: it is no JSON object")
	}
	out := &Keys{}
	var why error
	add := func(k key, err error) {
		if err != nil {
			why = err
			return
		}
		out.list = append(out.list, k)
	}
	if raw, ok := set["keys"]; ok {
		var list []json.RawMessage
		if json.Unmarshal(raw, &list) != nil || list == nil {
			return nil, errors.New(`reading a key set: "keys" is no list`)
		}
		if len(list) > maxKeys {
			return nil, fmt.Errorf("reading a key set: it has %d keys, more than %d", len(list), maxKeys)
		}
		for _, raw := range list {
			add(parseKey(raw))
		}
	} else if len(set) <= maxKeys {
		for _, id := range slices.Sorted(maps.Keys(set)) {
			add(parseCertificate(id, set[id]))
		}
	}
	if len(out.list) == 0 {
		return nil, fmt.Errorf("reading a key set: none of its keys can be used: %w", why)
	}
	return out, nil
}

func parseKey(raw json.RawMessage) (key, error) {
	var fields map[string]json.RawMessage
	if json.Unmarshal(raw, &fields) != nil {
		return key{}, errors.New("a key is no JSON object")
	}
	text := func(field string) string {
		var s string
		_ = json.Unmarshal(fields[field], &s) // another type counts as missing
		return s
	}
	k := key{id: text("kid"), alg: text("alg")}
	// Of the key nothing but its public part is read: what else is there (certificates,
	// thumbprints, private parts) says nothing about tokens.
	public := map[string]string{"kty": text("kty")}
	var algs []jose.SignatureAlgorithm
	switch public["kty"] {
	case "RSA":
		public["n"], public["e"] = text("n"), text("e")
		algs = []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512}
	case "EC":
		// The curve follows from the algorithm, or is P-256, where it is not named.
		curve := map[string]string{"ES384": "P-384", "ES512": "P-521"}[k.alg]
		if curve == "" {
			curve = "P-256"
		}
		if crv := text("crv"); crv != "" {
			curve = crv
		}
		public["crv"], public["x"], public["y"] = curve, text("x"), text("y")
		algs = map[string][]jose.SignatureAlgorithm{"P-256": {jose.ES256}, "P-384": {jose.ES384}, "P-521": {jose.ES512}}[curve]
	case "OKP":
		public["crv"], public["x"] = text("crv"), text("x")
		algs = []jose.SignatureAlgorithm{jose.EdDSA}
	default:
		return key{}, fmt.Errorf("a key of type %.20q is none of RSA, EC and OKP", public["kty"])
	}
	if k.alg != "" && !slices.Contains(algs, jose.SignatureAlgorithm(k.alg)) {
		return key{}, fmt.Errorf("the algorithm %.20q is not one of an %s key", k.alg, public["kty"])
	}
	for _, f := range []string{"n", "e", "x", "y"} {
		if v, ok := public[f]; ok {
			public[f] = strings.TrimRight(v, "=")
		}
	}
	minimal, err := json.Marshal(public)
	if err != nil {
		return key{}, err
	}
	var j jose.JSONWebKey
	if err := j.UnmarshalJSON(minimal); err != nil {
		return key{}, err
	}
	k.public = j.Key
	return k, usable(k.public)
}

// parseCertificate reads a PEM certificate in a JSON string.
func parseCertificate(id string, raw json.RawMessage) (key, error) {
	var text string
	if json.Unmarshal(raw, &text) != nil {
		return key{}, errors.New(`there is no "keys"`)
	}
	block, _ := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE" {
		return key{}, errors.New(`there is no "keys", and something else than certificates`)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return key{}, err
	}
	if _, ok := c.PublicKey.(*rsa.PublicKey); !ok {
		return key{}, errors.New("the key of a certificate is no RSA key")
	}
	return key{id: id, public: c.PublicKey}, usable(c.PublicKey)
}

func usable(public any) error {
	switch p := public.(type) {
	case *rsa.PublicKey:
		if n := p.N.BitLen(); n < minRSA || n > maxRSA {
			return fmt.Errorf("an RSA key has %d bits, and not from %d to %d", n, minRSA, maxRSA)
		}
		if p.E != 3 && p.E != 65537 {
			return fmt.Errorf("an RSA key has the exponent %d, and not 3 or 65537", p.E)
		}
		return nil
	case *ecdsa.PublicKey, ed25519.PublicKey:
		return nil
	}
	return errors.New("a key is of no type that is used")
}

// verify says whether a key verifies the signature, while left, which counts down, is
// positive and ctx goes on. It is one of Good, UnknownKey, Forged, TooManyKeys and
// Interrupted.
func (k *Keys) verify(ctx context.Context, jws *jose.JSONWebSignature, id, alg string, left *int) Status {
	status := UnknownKey
	for i := range k.list {
		c := &k.list[i]
		if id != "" && c.id != "" && c.id != id || c.alg != "" && c.alg != alg {
			continue
		}
		status = Forged
		switch {
		case !c.fits(alg):
			continue
		case *left == 0:
			return TooManyKeys
		case ctx.Err() != nil:
			return Interrupted
		}
		*left--
		if _, err := jws.Verify(c.public); err == nil {
			return Good
		}
	}
	return status
}

// fits reports whether the key is of the type that the algorithm has.
func (k *key) fits(alg string) bool {
	switch k.public.(type) {
	case *rsa.PublicKey:
		return strings.HasPrefix(alg, "RS") || strings.HasPrefix(alg, "PS")
	case *ecdsa.PublicKey:
		return strings.HasPrefix(alg, "ES")
	}
	return alg == string(jose.EdDSA)
}
