package profile

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/big"
	"time"

	"github.com/signet-mesh/signet/ca/capb"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// ErrLint is why what would have been signed was not: it differs from the profile.
// Nothing was recorded and nothing signed.
var ErrLint = errors.New("the certificate does not have its profile")

// Profile is what a certificate must be, byte by byte where DER leaves no choice.
// It is made from the facts of the ceremony and not from the template, and is
// compared with the DER that the key is about to sign: a mistake in one of the
// two, or in the library between them, does not get a signature.
type Profile struct {
	Kind      capb.IssuanceRecord_Kind
	Serial    []byte
	Subject   []byte           // Name, DER
	Issuer    []byte           // Name, DER
	IssuerKey []byte           // subject key identifier of the issuer; nil for a root
	Signer    crypto.PublicKey // of the issuer
	NotBefore time.Time
	NotAfter  time.Time
	SPKI      []byte
	URI       string
	DNSNames  []string
}

// authority reports whether the certificate may sign others.
func (p Profile) authority() bool {
	return p.Kind == capb.IssuanceRecord_KIND_ROOT || p.Kind == capb.IssuanceRecord_KIND_INTERMEDIATE
}

// Extensions of the profile (RFC 5280 §4.2), the last byte of 2.5.29.x.
const (
	extSubjectKeyID     = 14
	extKeyUsage         = 15
	extSubjectAltName   = 17
	extBasicConstraints = 19
	extAuthorityKeyID   = 35
	extExtKeyUsage      = 37
)

// Values of extensions, in DER.
var (
	derLeaf             = []byte{0x30, 0x00}                                           // cA FALSE is the default
	derRoot             = []byte{0x30, 0x06, 0x01, 0x01, 0xff, 0x02, 0x01, 0x01}       // cA, pathLen 1
	derIntermediate     = []byte{0x30, 0x06, 0x01, 0x01, 0xff, 0x02, 0x01, 0x00}       // cA, pathLen 0
	derDigitalSignature = []byte{0x03, 0x02, 0x07, 0x80}                               // bit 0
	derCertAndCRLSign   = []byte{0x03, 0x02, 0x01, 0x06}                               // bits 5 and 6
	derServerAndClient  = []byte{0x30, 0x14, 0x06, 0x08, 0x2b, 6, 1, 5, 5, 7, 3, 0x01, // serverAuth
		0x06, 0x08, 0x2b, 6, 1, 5, 5, 7, 3, 0x02} // clientAuth
)

// extension is what one extension must be.
type extension struct {
	critical bool
	value    []byte
}

// extensions are all that the certificate has, by the last byte of their OID.
func (p Profile) extensions() (map[byte]extension, error) {
	san, err := encodeSAN(p.URI, p.DNSNames)
	if err != nil {
		return nil, err
	}
	ski, err := KeyIdentifier(p.SPKI)
	if err != nil {
		return nil, err
	}
	var b cryptobyte.Builder
	b.AddASN1OctetString(ski)
	want := map[byte]extension{
		extSubjectKeyID: {value: b.BytesOrPanic()},
		// X509-SVID §4.3: key usage is critical.
		extKeyUsage: {critical: true, value: derDigitalSignature},
		// RFC 5280 §4.2.1.6: critical where the subject is empty, as a leaf's is.
		extSubjectAltName:   {critical: !p.authority(), value: san},
		extBasicConstraints: {critical: true, value: derLeaf},
	}
	switch p.Kind {
	case capb.IssuanceRecord_KIND_ROOT:
		want[extBasicConstraints] = extension{critical: true, value: derRoot}
	case capb.IssuanceRecord_KIND_INTERMEDIATE:
		want[extBasicConstraints] = extension{critical: true, value: derIntermediate}
	}
	if p.authority() {
		want[extKeyUsage] = extension{critical: true, value: derCertAndCRLSign}
	} else {
		// X509-SVID §4.4: both, where there is one.
		want[extExtKeyUsage] = extension{value: derServerAndClient}
	}
	if p.Kind != capb.IssuanceRecord_KIND_ROOT {
		var b cryptobyte.Builder
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1(cbasn1.Tag(0).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes(p.IssuerKey) })
		})
		want[extAuthorityKeyID] = extension{value: b.BytesOrPanic()}
	}
	return want, nil
}

// encodeSAN is GeneralNames (RFC 5280 §4.2.1.6) with the DNS names first. X509-SVID
// §2: exactly one URI.
func encodeSAN(uri string, dnsNames []string) ([]byte, error) {
	if uri == "" {
		return nil, errors.New("there is no SPIFFE ID")
	}
	var b cryptobyte.Builder
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		for _, n := range dnsNames {
			b.AddASN1(cbasn1.Tag(2).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes([]byte(n)) })
		}
		b.AddASN1(cbasn1.Tag(6).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes([]byte(uri)) })
	})
	return b.Bytes()
}

// KeyIdentifier is the truncated SHA-256 of the key's bit string (RFC 7093 §2,
// method 1).
func KeyIdentifier(spki []byte) ([]byte, error) {
	in := cryptobyte.String(spki)
	var info, algorithm cryptobyte.String
	var bits []byte
	if !in.ReadASN1(&info, cbasn1.SEQUENCE) || !in.Empty() ||
		!info.ReadASN1(&algorithm, cbasn1.SEQUENCE) || !info.ReadASN1BitStringAsBytes(&bits) || !info.Empty() {
		return nil, errors.New("the public key is not a SubjectPublicKeyInfo")
	}
	sum := sha256.Sum256(bits)
	return sum[:20], nil
}

// Lint compares what is to be signed, a TBSCertificate in DER (RFC 5280 §4.1), with
// the profile. Everything is checked, in the order of the encoding, and nothing may
// follow. It returns the AlgorithmIdentifier of the signature to come.
func (p Profile) Lint(tbs []byte) (algorithm []byte, err error) {
	if algorithm, err = p.compare(tbs); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrLint, err)
	}
	return algorithm, nil
}

func (p Profile) compare(tbs []byte) (algorithm []byte, err error) {
	in := cryptobyte.String(tbs)
	var body cryptobyte.String
	if !in.ReadASN1(&body, cbasn1.SEQUENCE) || !in.Empty() {
		return nil, errors.New("it is not one DER sequence")
	}
	var version int
	var explicit cryptobyte.String
	if !body.ReadASN1(&explicit, cbasn1.Tag(0).Constructed().ContextSpecific()) || !explicit.ReadASN1Integer(&version) || !explicit.Empty() || version != 2 {
		return nil, errors.New("its version is not 3")
	}
	serial := new(big.Int)
	if !body.ReadASN1Integer(serial) || serial.Sign() <= 0 {
		return nil, errors.New("its serial is not a positive integer")
	}
	if len(p.Serial) != SerialLength || serial.Cmp(new(big.Int).SetBytes(p.Serial)) != 0 {
		return nil, fmt.Errorf("its serial is %x instead of %x", serial, p.Serial)
	}
	var signature, issuer, validity, subject, spki cryptobyte.String
	if !body.ReadASN1Element(&signature, cbasn1.SEQUENCE) || !body.ReadASN1Element(&issuer, cbasn1.SEQUENCE) ||
		!body.ReadASN1(&validity, cbasn1.SEQUENCE) || !body.ReadASN1Element(&subject, cbasn1.SEQUENCE) ||
		!body.ReadASN1Element(&spki, cbasn1.SEQUENCE) {
		return nil, errors.New("its fields are not those of a certificate")
	}
	if want, err := signatureAlgorithm(p.Signer); err != nil || !bytes.Equal(signature, want) {
		return nil, errors.Join(err, fmt.Errorf("its signature algorithm is %x, not that of the issuer's key", []byte(signature)))
	}
	if !bytes.Equal(issuer, p.Issuer) {
		return nil, errors.New("it names another issuer")
	}
	if !bytes.Equal(subject, p.Subject) {
		return nil, errors.New("it has another subject")
	}
	for _, t := range []struct {
		name string
		want time.Time
	}{{"notBefore", p.NotBefore}, {"notAfter", p.NotAfter}} {
		if got, ok := readTime(&validity, t.want); !ok || !got.Equal(t.want) {
			return nil, fmt.Errorf("%s is not %s", t.name, t.want.Format(time.RFC3339))
		}
	}
	if !validity.Empty() || !p.NotAfter.After(p.NotBefore) {
		return nil, errors.New("its validity is not a period")
	}
	if !bytes.Equal(spki, p.SPKI) {
		return nil, errors.New("its public key is not the one that was to be certified")
	}
	if err := p.compareExtensions(&body); err != nil {
		return nil, err
	}
	return signature, nil
}

// signatureAlgorithm is the AlgorithmIdentifier, in DER, of what a key signs
// certificates with (RFC 5758, RFC 4055, RFC 8410).
func signatureAlgorithm(key crypto.PublicKey) ([]byte, error) {
	ecdsaWith := func(sha byte) []byte {
		return []byte{0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, sha}
	}
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256():
			return ecdsaWith(2), nil
		case elliptic.P384():
			return ecdsaWith(3), nil
		case elliptic.P521():
			return ecdsaWith(4), nil
		}
	case *rsa.PublicKey: // sha256WithRSAEncryption
		return []byte{0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 0x0b, 0x05, 0x00}, nil
	case ed25519.PublicKey:
		return []byte{0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70}, nil
	}
	return nil, fmt.Errorf("an authority with a key of type %T has no profile", key)
}

// readTime reads a Time, which is UTCTime up to 2049 (RFC 5280 §4.1.2.5).
func readTime(in *cryptobyte.String, want time.Time) (got time.Time, ok bool) {
	if want.Year() < 2050 {
		ok = in.ReadASN1UTCTime(&got)
	} else {
		ok = in.ReadASN1GeneralizedTime(&got)
	}
	return got, ok
}

func (p Profile) compareExtensions(body *cryptobyte.String) error {
	want, err := p.extensions()
	if err != nil {
		return err
	}
	var explicit, list cryptobyte.String
	// No unique identifiers come before, and nothing comes after.
	if !body.ReadASN1(&explicit, cbasn1.Tag(3).Constructed().ContextSpecific()) || !body.Empty() ||
		!explicit.ReadASN1(&list, cbasn1.SEQUENCE) || !explicit.Empty() {
		return errors.New("what follows the public key is not a list of extensions alone")
	}
	for !list.Empty() {
		var ext, oid, value cryptobyte.String
		var critical bool
		if !list.ReadASN1(&ext, cbasn1.SEQUENCE) || !ext.ReadASN1(&oid, cbasn1.OBJECT_IDENTIFIER) ||
			ext.PeekASN1Tag(cbasn1.BOOLEAN) && !(ext.ReadASN1Boolean(&critical) && critical) || // FALSE is the default, left out in DER
			!ext.ReadASN1(&value, cbasn1.OCTET_STRING) || !ext.Empty() {
			return errors.New("an extension is malformed")
		}
		if len(oid) != 3 || oid[0] != 0x55 || oid[1] != 0x1d { // 2.5.29
			return fmt.Errorf("it has an extension %x, which no profile has", []byte(oid))
		}
		w, ok := want[oid[2]]
		switch {
		case !ok:
			return fmt.Errorf("extension 2.5.29.%d is there twice or not in the profile", oid[2])
		case w.critical != critical:
			return fmt.Errorf("extension 2.5.29.%d: critical is %v", oid[2], critical)
		case !bytes.Equal(value, w.value):
			return fmt.Errorf("extension 2.5.29.%d is %x instead of %x", oid[2], []byte(value), w.value)
		}
		delete(want, oid[2])
	}
	for id := range want {
		return fmt.Errorf("extension 2.5.29.%d is missing", id)
	}
	return nil
}
