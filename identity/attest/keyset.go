package attest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"errors"
	"fmt"
	"slices"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json"
)

const (
	maxKeys    = 256
	minRSABits = 2048
	// maxRSABits bounds what verifying one signature can cost.
	maxRSABits = 8192
)

// keySet is a parsed JSON Web Key Set. It is never changed.
type keySet struct {
	byID    map[string]Key
	skipped []skippedKey
}

type skippedKey struct {
	kid string
	why error
}

// ParseKeys parses a JSON Web Key Set (RFC 7517 §5), for a [KeySource] that gets
// it from elsewhere than a file. It refuses the whole set if a key is private,
// symmetric, weak, malformed, without an ID or with that of another; keys that are
// fine but for another use are left out, and skipped says which.
func ParseKeys(data []byte) (keys map[string]Key, skipped []error, err error) {
	set, err := parseKeySet(data)
	if err != nil {
		return nil, nil, err
	}
	for _, s := range set.skipped {
		skipped = append(skipped, fmt.Errorf("key %s: %w", quoted(s.kid), s.why))
	}
	return set.byID, skipped, nil
}

// jwkMembers are the members of a JWK that are looked at before go-jose parses it.
type jwkMembers struct {
	KeyID      string   `json:"kid"`
	Type       string   `json:"kty"`
	Use        string   `json:"use"`
	Algorithm  string   `json:"alg"`
	Operations []string `json:"key_ops"`
}

// privateMembers are the members of RFC 7518 section 6 and RFC 8037 that hold
// something private, and those of the AKP keys of ML-DSA.
var privateMembers = []string{"d", "p", "q", "dp", "dq", "qi", "oth", "k", "priv"}

// errUnused means that a key is fine, but for something else.
var errUnused = errors.New("not a key for RS256 or ES256 signatures")

// parseKeySet parses a JSON Web Key Set. It refuses the whole set if a key is
// private, symmetric, weak, malformed, without an ID or with that of another: then
// something is wrong with whoever wrote it. Keys that are fine but for another use
// are skipped (RFC 7517 section 5).
func parseKeySet(data []byte) (*keySet, error) {
	var doc struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, fmt.Errorf("not a JSON Web Key Set: %w", err)
	}
	if len(doc.Keys) > maxKeys {
		return nil, fmt.Errorf("%d keys; at most %d are allowed", len(doc.Keys), maxKeys)
	}
	set := &keySet{byID: make(map[string]Key, len(doc.Keys))}
	seen := make(map[string]bool, len(doc.Keys))
	for i, raw := range doc.Keys {
		kid, key, err := parseKey(raw)
		if err != nil && !errors.Is(err, errUnused) {
			return nil, fmt.Errorf("key %d (kid %s): %w", i+1, quoted(kid), err)
		}
		if kid == "" || len(kid) > maxKeyID {
			return nil, fmt.Errorf("key %d has a kid of %d bytes; it must have 1 to %d, or no token can name it", i+1, len(kid), maxKeyID)
		}
		if seen[kid] {
			return nil, fmt.Errorf("key %d: kid %s occurs twice; which one is meant cannot be known", i+1, quoted(kid))
		}
		seen[kid] = true
		if err != nil {
			set.skipped = append(set.skipped, skippedKey{kid, err})
			continue
		}
		set.byID[kid] = key
	}
	if len(set.byID) == 0 {
		return nil, fmt.Errorf("none of %d keys is for RS256 or ES256 signatures", len(doc.Keys))
	}
	return set, nil
}

func parseKey(raw json.RawMessage) (kid string, k Key, err error) {
	var all map[string]any
	if err := json.Unmarshal(raw, &all); err != nil || all == nil {
		return "", k, errors.New("not a JSON object without duplicate names")
	}
	var m jwkMembers
	if err := json.Unmarshal(raw, &m); err != nil {
		return "", k, errors.New("a member has the wrong type")
	}
	for _, name := range privateMembers {
		if _, ok := all[name]; ok {
			return m.KeyID, k, fmt.Errorf("IT HOLDS A PRIVATE OR SYMMETRIC KEY (member %q): whoever could read this file can be any pod; replace the issuer's key, and publish only its public half", name)
		}
	}
	switch {
	case m.Type == "oct":
		return m.KeyID, k, errors.New("a symmetric key verifies nothing: whoever verifies could also sign")
	case m.Type == "":
		return m.KeyID, k, errors.New("no key type (kty)")
	case m.Type != "RSA" && m.Type != "EC":
		return m.KeyID, k, fmt.Errorf("%w: key type %s", errUnused, quoted(m.Type))
	case m.Use != "" && m.Use != "sig":
		return m.KeyID, k, fmt.Errorf("%w: its use is %s", errUnused, quoted(m.Use))
	case m.Operations != nil && !slices.Contains(m.Operations, "verify"):
		return m.KeyID, k, fmt.Errorf("%w: its key_ops lack verify", errUnused)
	}
	var jwk jose.JSONWebKey
	if err := jwk.UnmarshalJSON(raw); err != nil {
		return m.KeyID, k, fmt.Errorf("malformed: %s", quoted(err.Error()))
	}
	alg, err := algorithmFor(jwk.Key)
	if err != nil {
		return m.KeyID, k, err
	}
	if m.Algorithm != "" && m.Algorithm != alg {
		return m.KeyID, k, fmt.Errorf("%w: its alg is %s", errUnused, quoted(m.Algorithm))
	}
	return m.KeyID, Key{Public: jwk.Key, Algorithm: alg}, nil
}

// algorithmFor is the only algorithm that a key is used with; err wraps errUnused
// if the key is fine but not for us.
func algorithmFor(public crypto.PublicKey) (alg string, err error) {
	switch k := public.(type) {
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < minRSABits || n > maxRSABits {
			return "", fmt.Errorf("RSA key of %d bits; %d to %d are accepted", n, minRSABits, maxRSABits)
		}
		// FIPS 186-5 section A.1.1: odd and more than 2^16.
		if k.E < 1<<16 || k.E%2 == 0 {
			return "", fmt.Errorf("RSA exponent %d; it must be odd and more than 65536", k.E)
		}
		return string(jose.RS256), nil
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P256() {
			return "", fmt.Errorf("%w: curve %s", errUnused, k.Curve.Params().Name)
		}
		// ECDH fails for what is not a point of the curve.
		if _, err := k.ECDH(); err != nil {
			return "", errors.New("not a point of P-256")
		}
		return string(jose.ES256), nil
	default:
		return "", fmt.Errorf("%w: %T", errUnused, public)
	}
}

// equal reports whether k is the key o, which algorithmFor has accepted: so o is a
// pointer, and comparing the two as interfaces, which costs nothing, cannot panic.
func (k Key) equal(o Key) bool {
	if k == o {
		return true
	}
	p, ok := k.Public.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Algorithm == o.Algorithm && p.Equal(o.Public)
}
