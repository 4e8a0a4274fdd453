package external

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"time"

	"github.com/signet-mesh/signet/identity"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Bounds of what is parsed.
const (
	maxText  = 1 << 20
	maxCerts = 64
	maxChain = 8
)

// Certificates reads a PEM file that holds certificates and nothing else; text
// between them is skipped, as openssl writes it. It returns at least one.
func Certificates(text []byte) ([]*x509.Certificate, error) {
	if len(text) > maxText {
		return nil, fmt.Errorf("it has %d bytes; at most %d are read", len(text), maxText)
	}
	var certs []*x509.Certificate
	for rest := text; ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			if bytes.Contains(rest, []byte("-----BEGIN")) {
				return nil, errors.New("it holds a PEM block that is damaged")
			}
			break
		}
		if b.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("it holds a %q; only certificates belong there", b.Type)
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(certs)+1, err)
		}
		if certs = append(certs, c); len(certs) > maxCerts {
			return nil, fmt.Errorf("it holds more than %d certificates", maxCerts)
		}
	}
	if len(certs) == 0 {
		return nil, errors.New("it holds no PEM certificate")
	}
	return certs, nil
}

// Profile is what an issuer's certificate must be.
type Profile struct {
	// TrustDomain of the SVIDs that will be issued under it. Required.
	TrustDomain spiffeid.TrustDomain
	// DNSNames are those that SVIDs of the authority itself will carry.
	DNSNames []string
	// Key is what the certificate must certify. Required.
	Key crypto.PublicKey
	// Roots are those that it may lead to. Empty: the chain must end with its root.
	Roots []*x509.Certificate
	// Loose accepts what was not made at our request: a path length that is not 0,
	// and an issuer that is itself a root.
	Loose bool
	// Later accepts a certificate that is not valid yet.
	Later bool
}

// Issuer is a certificate that may sign SVIDs.
type Issuer struct {
	// Cert is the issuer itself.
	Cert *x509.Certificate
	// Chain is what goes out behind an SVID: Cert and what signed it, without the root.
	// It is empty if Cert is the root.
	Chain []*x509.Certificate
	// Root is where it leads.
	Root *x509.Certificate
}

// Check checks a chain: the issuer's certificate first, each signed by the next, the
// root last or left out. It ends with a trial: a copy of the chain with keys made for
// the purpose and the same constraints, usages and validity signs SVIDs of every kind,
// and they must verify as server and as client.
func Check(certs []*x509.Certificate, p Profile, now time.Time) (Issuer, error) {
	if len(certs) == 0 {
		return Issuer{}, errors.New("there is no certificate")
	}
	if len(certs) > maxChain {
		return Issuer{}, fmt.Errorf("a chain of %d certificates; at most %d are allowed", len(certs), maxChain)
	}
	if err := p.checkKey(certs[0]); err != nil {
		return Issuer{}, err
	}
	for i, c := range certs[:len(certs)-1] {
		if err := c.CheckSignatureFrom(certs[i+1]); err != nil {
			return Issuer{}, fmt.Errorf("order: certificate %d (%s) is not signed by the one that follows it (%s): the issuer comes first, the root last: %w", i+1, c.Subject, certs[i+1].Subject, err)
		}
	}
	iss := Issuer{Cert: certs[0], Chain: certs}
	last := certs[len(certs)-1]
	switch {
	case selfSigned(last):
		if len(p.Roots) > 0 && !contains(p.Roots, last) {
			return Issuer{}, fmt.Errorf("the chain leads to the root %s (SHA-256 %x), which is not one that is expected", last.Subject, sha256.Sum256(last.Raw))
		}
		iss.Root, iss.Chain = last, certs[:len(certs)-1]
	default:
		for _, r := range p.Roots {
			if last.CheckSignatureFrom(r) == nil {
				iss.Root = r
			}
		}
		if iss.Root == nil {
			return Issuer{}, fmt.Errorf("certificate %d (%s) is signed by %s, which is neither in the chain nor a root that is expected: add what is missing, up to the root", len(certs), last.Subject, last.Issuer)
		}
	}
	if err := p.checkProfile(iss); err != nil {
		return Issuer{}, err
	}
	if err := p.checkValidity(iss, now); err != nil {
		return Issuer{}, err
	}
	if err := p.try(iss, now); err != nil {
		return Issuer{}, fmt.Errorf("constraints: an SVID under it would not verify: %w", err)
	}
	return iss, nil
}

// path is iss.Chain with the root.
func (iss Issuer) path() []*x509.Certificate {
	return append(append([]*x509.Certificate(nil), iss.Chain...), iss.Root)
}

func (p Profile) checkKey(c *x509.Certificate) error {
	pub, ok := c.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !pub.Equal(p.Key) {
		return fmt.Errorf("key: the certificate %s is of another key than that of the request", c.Subject)
	}
	switch k := c.PublicKey.(type) {
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P224() {
			return nil
		}
	case *rsa.PublicKey:
		if k.N.BitLen() >= 2048 {
			return nil
		}
	}
	return fmt.Errorf("key: an authority's key is ECDSA on P-256, P-384 or P-521, or RSA from 2048 bits, because proxies verify no other; this is %T", c.PublicKey)
}

func (p Profile) checkProfile(iss Issuer) error {
	for i, c := range iss.path() {
		if err := identity.CheckAuthority(c); err != nil {
			return fmt.Errorf("profile: %s: %w", c.Subject, err)
		}
		if len(c.UnhandledCriticalExtensions) > 0 {
			return fmt.Errorf("profile: %s has the critical extension %s, which relying parties do not know", c.Subject, c.UnhandledCriticalExtensions[0])
		}
		switch c.SignatureAlgorithm {
		case x509.MD2WithRSA, x509.MD5WithRSA, x509.SHA1WithRSA, x509.DSAWithSHA1, x509.ECDSAWithSHA1:
			return fmt.Errorf("profile: %s is signed with %s", c.Subject, c.SignatureAlgorithm)
		}
		// X509-SVID §3: a signing certificate's SPIFFE ID, if it has one, is that of its
		// trust domain.
		for _, u := range c.URIs {
			if u.Scheme == "spiffe" && u.String() != p.TrustDomain.IDString() {
				return fmt.Errorf("profile: %s names %s; a signing certificate of this trust domain names %s or nothing", c.Subject, u, p.TrustDomain.IDString())
			}
		}
		// RFC 5280 §4.2.1.9: how many intermediates may follow before the leaf.
		if c.MaxPathLen >= 0 && c.MaxPathLen < i {
			return fmt.Errorf("path length: %s allows %d intermediates below it, the chain has %d", c.Subject, c.MaxPathLen, i)
		}
	}
	if p.Loose {
		return nil
	}
	if len(iss.Chain) == 0 {
		return errors.New("profile: the certificate signs itself: a request is signed by a root, and does not become one")
	}
	if iss.Cert.MaxPathLen != 0 {
		return fmt.Errorf("path length: %s must say pathlen:0, so that it signs no further authorities", iss.Cert.Subject)
	}
	return nil
}

func (p Profile) checkValidity(iss Issuer, now time.Time) error {
	path := iss.path()
	for i, c := range path {
		if !now.Before(c.NotAfter) {
			return fmt.Errorf("validity: %s expired at %s", c.Subject, c.NotAfter.Format(time.RFC3339))
		}
		if now.Before(c.NotBefore) && !p.Later {
			return fmt.Errorf("validity: %s is not valid before %s", c.Subject, c.NotBefore.Format(time.RFC3339))
		}
		if i+1 < len(path) && c.NotAfter.After(path[i+1].NotAfter) {
			return fmt.Errorf("validity: %s ends at %s, after what signed it (%s, %s)", c.Subject, c.NotAfter.Format(time.RFC3339), path[i+1].Subject, path[i+1].NotAfter.Format(time.RFC3339))
		}
	}
	return nil
}

// try signs SVIDs under a copy of the chain, whose private keys nobody has.
func (p Profile) try(iss Issuer, now time.Time) error {
	path := iss.path()
	if len(iss.Chain) == 0 {
		path = []*x509.Certificate{iss.Root}
	}
	for _, c := range path {
		if now.Before(c.NotBefore) {
			now = c.NotBefore // it will be used when it is valid
		}
	}
	var parent *x509.Certificate
	var parentKey *ecdsa.PrivateKey
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	sign := func(t *x509.Certificate) error {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		by, byKey := parent, parentKey
		if by == nil {
			by, byKey = t, key
		}
		der, err := x509.CreateCertificate(rand.Reader, t, by, key.Public(), byKey)
		if err != nil {
			return err
		}
		if parent, err = x509.ParseCertificate(der); err != nil {
			return err
		}
		parentKey = key
		return nil
	}
	for i := len(path) - 1; i >= 0; i-- {
		c := path[i]
		t := &x509.Certificate{
			SerialNumber: big.NewInt(int64(i + 1)), Subject: pkix.Name{CommonName: fmt.Sprint("copy ", i)}, NotBefore: c.NotBefore, NotAfter: c.NotAfter,
			BasicConstraintsValid: true, IsCA: true, MaxPathLen: c.MaxPathLen, MaxPathLenZero: c.MaxPathLenZero,
			KeyUsage: c.KeyUsage, ExtKeyUsage: c.ExtKeyUsage, UnknownExtKeyUsage: c.UnknownExtKeyUsage, URIs: c.URIs, DNSNames: c.DNSNames,
			PermittedDNSDomainsCritical: c.PermittedDNSDomainsCritical, PermittedDNSDomains: c.PermittedDNSDomains, ExcludedDNSDomains: c.ExcludedDNSDomains,
			PermittedURIDomains: c.PermittedURIDomains, ExcludedURIDomains: c.ExcludedURIDomains,
		}
		root := parent == nil
		if err := sign(t); err != nil {
			return err
		}
		if root {
			roots.AddCert(parent)
		} else {
			intermediates.AddCert(parent)
		}
	}
	issuer, issuerKey := parent, parentKey
	for _, leaf := range []struct {
		path string
		dns  []string
	}{{"/ns/default/sa/default", nil}, {"/signet/agent/node", nil}, {"/signet/ca/1", p.DNSNames}} {
		parent, parentKey = issuer, issuerKey
		id := &url.URL{Scheme: "spiffe", Host: p.TrustDomain.Name(), Path: leaf.path}
		t := &x509.Certificate{SerialNumber: big.NewInt(100), NotBefore: now, NotAfter: issuer.NotAfter, BasicConstraintsValid: true,
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
			URIs: []*url.URL{id}, DNSNames: leaf.dns}
		if err := sign(t); err != nil {
			return err
		}
		for _, usage := range t.ExtKeyUsage {
			if _, err := parent.Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
				return fmt.Errorf("%s %v: %w", id, leaf.dns, err)
			}
		}
	}
	return nil
}

func selfSigned(c *x509.Certificate) bool {
	return bytes.Equal(c.RawSubject, c.RawIssuer) && c.CheckSignatureFrom(c) == nil
}

func contains(list []*x509.Certificate, c *x509.Certificate) bool {
	for _, l := range list {
		if l.Equal(c) {
			return true
		}
	}
	return false
}
