package authz

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"slices"
	"strings"
)

// jwkFields are, for each type of key, the fields that must be there; all hold
// bytes but the curve. With "d" the key is private, and has those of private.
var jwkFields = map[string]struct{ public, private []string }{
	"RSA": {[]string{"e", "n"}, []string{"d", "e", "n"}},
	"EC":  {[]string{"crv", "x", "y"}, []string{"crv", "d", "x", "y"}},
	"OKP": {[]string{"crv", "x"}, []string{"crv", "d", "x"}},
	"oct": {[]string{"k"}, []string{"k"}},
}

// badJWKS says why Istio's admission does not take a text for a JSON Web Key Set,
// or for a single key, or nothing. Admission looks at the form only: a key that it
// takes can still be useless.
func badJWKS(text string) string {
	// Istio reads the first value and does not look at what follows it.
	var first json.RawMessage
	var set map[string]json.RawMessage
	if json.NewDecoder(strings.NewReader(text)).Decode(&first) != nil || json.Unmarshal(first, &set) != nil || set == nil {
		return "is no JSON object"
	}
	keys, given := set["keys"]
	if !given {
		return badJWK(first)
	}
	var list []json.RawMessage
	if err := json.Unmarshal(keys, &list); err != nil {
		return `"keys" is not a list`
	}
	for i, key := range list {
		if bad := badJWK(key); bad != "" {
			return fmt.Sprintf("key %d: %s", i, bad)
		}
	}
	return ""
}

func badJWK(data []byte) string {
	var key map[string]json.RawMessage
	if err := json.Unmarshal(data, &key); err != nil || key == nil {
		return "is no JSON object"
	}
	text := func(field string) (string, bool) {
		var s string
		err := json.Unmarshal(key[field], &s) // null counts as ""
		return s, err == nil
	}
	kty, _ := text("kty")
	fields, known := jwkFields[kty]
	if !known {
		return fmt.Sprintf("kty %s is none of RSA, EC, OKP and oct", clip(kty))
	}
	need := fields.public
	if key["d"] != nil {
		need = fields.private
	}
	for _, f := range need {
		if key[f] == nil {
			return f + " is missing"
		}
		if v, ok := text(f); !ok || f != "crv" && !anyBase64(v) {
			return f + " is not text in base64"
		}
	}
	for _, f := range []string{"alg", "kid", "use", "x5t", "x5t#S256", "x5u"} {
		if _, ok := text(f); key[f] != nil && !ok {
			return f + " is not a string"
		}
	}
	for _, f := range []string{"key_ops", "x5c"} {
		var list []string
		if key[f] == nil {
			continue
		}
		if json.Unmarshal(key[f], &list) != nil {
			return f + " is not a list of strings"
		}
		for _, v := range list {
			if f == "x5c" && !certificate(v) {
				return "x5c is not a list of certificates"
			}
		}
	}
	return ""
}

// encoding is the form of base64 that a text is in: either alphabet, with padding
// or without.
func encoding(s string) *base64.Encoding {
	e := base64.RawURLEncoding
	if strings.ContainsAny(s, "+/") {
		e = base64.RawStdEncoding
	}
	if strings.HasSuffix(s, "=") {
		e = e.WithPadding('=')
	}
	return e
}

func anyBase64(s string) bool {
	_, err := encoding(s).DecodeString(s)
	return err == nil
}

func certificate(s string) bool {
	der, err := encoding(s).DecodeString(s)
	if err != nil {
		return false
	}
	_, err = x509.ParseCertificate(der)
	return err == nil
}

// privateJWKS reports whether a key set that admission takes, or a single key, has
// a key that can sign.
func privateJWKS(text string) bool {
	type key struct {
		Kty string          `json:"kty"`
		D   json.RawMessage `json:"d"`
	}
	var set struct {
		key
		Keys []key `json:"keys"`
	}
	if json.NewDecoder(strings.NewReader(text)).Decode(&set) != nil {
		return false
	}
	return slices.ContainsFunc(append(set.Keys, set.key), func(k key) bool { return k.Kty == "oct" || k.D != nil })
}

// usableJWKS reports whether Envoy can use at least one key of a key set. Without
// one it refuses the whole filter, whatever Istio's admission said.
func usableJWKS(text string) bool {
	var set struct {
		Keys []map[string]any `json:"keys"`
	}
	if json.Unmarshal([]byte(text), &set) != nil {
		return false
	}
	return slices.ContainsFunc(set.Keys, usableJWK)
}

func usableJWK(key map[string]any) bool {
	text := func(field string) string { s, _ := key[field].(string); return s }
	// Padding may be there.
	octets := func(field string) []byte {
		b, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(text(field), "="))
		if err != nil {
			return nil
		}
		return b
	}
	number := func(field string) *big.Int { return new(big.Int).SetBytes(octets(field)) }
	// An algorithm, where one is given, must be of the key's type.
	alg, given := key["alg"]
	of := func(prefixes ...string) bool {
		s, _ := alg.(string)
		return !given || slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(s, p) })
	}
	switch text("kty") {
	case "RSA":
		n, e := number("n"), number("e")
		return of("RS", "PS") && n.BitLen() > 33 && n.Bit(0) == 1 && e.BitLen() > 1 && e.BitLen() <= 33 && e.Bit(0) == 1
	case "EC":
		curve, known := map[string]elliptic.Curve{"P-256": elliptic.P256(), "P-384": elliptic.P384(), "P-521": elliptic.P521()}[text("crv")]
		if !known || !of("ES") {
			return false
		}
		size := (curve.Params().BitSize + 7) / 8
		x, y := number("x"), number("y")
		if x.BitLen() > 8*size || y.BitLen() > 8*size {
			return false
		}
		point := make([]byte, 1+2*size)
		point[0] = 4 // uncompressed, SEC 1 section 2.3.3
		x.FillBytes(point[1 : 1+size])
		y.FillBytes(point[1+size:])
		_, err := ecdsa.ParseUncompressedPublicKey(curve, point)
		return err == nil
	case "OKP":
		return text("crv") == "Ed25519" && of("EdDSA") && len(octets("x")) == ed25519.PublicKeySize
	case "oct":
		return len(octets("k")) > 0 && of("HS")
	}
	return false
}
