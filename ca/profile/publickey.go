package profile

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Kinds of public keys that the authority can be told to certify.
const (
	KeyP256    = "P-256"
	KeyP384    = "P-384"
	KeyP521    = "P-521"
	KeyEd25519 = "Ed25519"
	KeyRSA     = "RSA"
)

// AllKeys are the kinds that are certified unless the configuration says less. It is not
// to be changed.
var AllKeys = []string{KeyP256, KeyP384, KeyP521, KeyEd25519, KeyRSA}

const (
	// minRSA is what NIST SP 800-57 part 1 still allows; maxRSA bounds what a
	// verifier has to compute.
	minRSA, maxRSA = 2048, 8192
	// minExponent is F4 (FIPS 186-5 §A.1.1).
	minExponent = 1<<16 + 1
	// maxPublicKey holds an RSA key of maxRSA bits and bounds what is parsed.
	maxPublicKey = 1200
)

// CheckKeyKinds refuses a list that would certify nothing, or something unknown.
func CheckKeyKinds(kinds []string) error {
	if len(kinds) == 0 {
		return errors.New("svid.acceptedKeys: is empty: no key could be certified")
	}
	for _, k := range kinds {
		if !slices.Contains(AllKeys, k) {
			return fmt.Errorf("svid.acceptedKeys: %q is not one of %s", k, strings.Join(AllKeys, ", "))
		}
	}
	// Agents make these, and the authority itself does.
	if !slices.Contains(kinds, KeyP256) {
		return errors.New("svid.acceptedKeys: P-256 is missing, and it is what agents use")
	}
	return nil
}

// ParsePublicKey takes a SubjectPublicKeyInfo that somebody sent: one of the
// accepted kinds, in its one DER encoding, so that a hash of the bytes names the
// key.
func ParsePublicKey(spki []byte, accepted []string) (crypto.PublicKey, error) {
	if len(spki) > maxPublicKey {
		return nil, fmt.Errorf("public key has %d bytes; at most %d are allowed", len(spki), maxPublicKey)
	}
	pub, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		return nil, errors.New("public key is not a SubjectPublicKeyInfo in DER")
	}
	if err := CheckPublicKey(pub, accepted); err != nil {
		return nil, err
	}
	if again, err := x509.MarshalPKIXPublicKey(pub); err != nil || !bytes.Equal(again, spki) {
		return nil, errors.New("public key is not in its DER encoding")
	}
	return pub, nil
}

// CheckPublicKey refuses keys of a kind that is not accepted, and weak ones.
func CheckPublicKey(pub crypto.PublicKey, accepted []string) error {
	kind := ""
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256():
			kind = KeyP256
		case elliptic.P384():
			kind = KeyP384
		case elliptic.P521():
			kind = KeyP521
		}
	case ed25519.PublicKey:
		kind = KeyEd25519
	case *rsa.PublicKey:
		kind = KeyRSA
		if bits := k.N.BitLen(); bits < minRSA || bits > maxRSA {
			return fmt.Errorf("public key is RSA of %d bits; %d to %d are accepted", bits, minRSA, maxRSA)
		}
		if k.E < minExponent || k.E%2 == 0 || k.N.Bit(0) == 0 {
			return errors.New("public key is RSA with an even modulus, or with an exponent that is even or below 65537")
		}
	}
	if kind == "" || !slices.Contains(accepted, kind) {
		return fmt.Errorf("public key is of a kind that is not accepted; accepted are: %s", strings.Join(accepted, ", "))
	}
	return nil
}
