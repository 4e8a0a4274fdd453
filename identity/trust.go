package identity

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Trust is what an agent has to believe at one moment: the trust bundle of its
// own trust domain, and the sequence number under which the authority published
// it. A Trust is immutable; a change is a new Trust with a higher sequence.
//
// Trust implements x509bundle.Source, so go-spiffe verifies with it.
type Trust struct {
	sequence uint64
	td       spiffeid.TrustDomain
	roots    []*x509.Certificate
	crls     []*x509.RevocationList
	revoked  map[string]struct{} // of crls, by revokedName
	tainted  []string            // subject key identifiers, sorted
	spread   time.Duration
}

// NewTrust checks and makes a Trust. roots must not be empty; each must be an
// authority as [CheckAuthority] has it.
func NewTrust(sequence uint64, td spiffeid.TrustDomain, roots []*x509.Certificate) (*Trust, error) {
	if td.IsZero() {
		return nil, errors.New("trust without a trust domain")
	}
	if len(roots) == 0 {
		return nil, fmt.Errorf("trust bundle of %s is empty", td.Name())
	}
	for _, c := range roots {
		if err := CheckAuthority(c); err != nil {
			return nil, fmt.Errorf("trust bundle of %s: %w", td.Name(), err)
		}
	}
	return &Trust{sequence: sequence, td: td, roots: append([]*x509.Certificate(nil), roots...)}, nil
}

// WithCRLs is the same trust with certificate revocation lists, one of each authority
// that issues, as relying parties of the trust domain may check them. They come from
// whom the roots come from; that a list is one of theirs is not checked here.
func (t *Trust) WithCRLs(lists []*x509.RevocationList) (*Trust, error) {
	for _, c := range lists {
		if len(c.Raw) == 0 || c.NextUpdate.IsZero() {
			return nil, fmt.Errorf("a CRL of %s does not say until when it is good", t.td.Name())
		}
	}
	out := *t
	out.crls = append([]*x509.RevocationList(nil), lists...)
	out.revoked = map[string]struct{}{}
	for _, c := range lists {
		for _, r := range c.RevokedCertificateEntries {
			out.revoked[revokedName(c.AuthorityKeyId, r.SerialNumber)] = struct{}{}
		}
	}
	return &out, nil
}

// revokedName is how a certificate is called by its issuer's key identifier and its
// serial.
func revokedName(issuer []byte, serial *big.Int) string {
	return string(issuer) + "\x00" + string(serial.Bytes())
}

// Revokes reports whether the list of a certificate's issuer has it.
func (t *Trust) Revokes(c *x509.Certificate) bool {
	if len(t.revoked) == 0 {
		return false
	}
	_, found := t.revoked[revokedName(c.AuthorityKeyId, c.SerialNumber)]
	return found
}

// CRLs are the certificate revocation lists of the own trust domain; none where its
// authority publishes none.
func (t *Trust) CRLs() []*x509.RevocationList {
	return append([]*x509.RevocationList(nil), t.crls...)
}

// CRLPEM is the certificate revocation lists, as Envoy's crl takes them; nil if there
// are none.
func (t *Trust) CRLPEM() []byte {
	var b bytes.Buffer
	for _, c := range t.crls {
		// Encoding to a bytes.Buffer does not fail.
		_ = pem.Encode(&b, &pem.Block{Type: "X509 CRL", Bytes: c.Raw})
	}
	return b.Bytes()
}

// WithTainted is the same trust with authorities, by subject key identifier, whose SVIDs
// are to be replaced now, each at a random moment of spread. What they issued still
// verifies.
func (t *Trust) WithTainted(keyIDs [][]byte, spread time.Duration) *Trust {
	out := *t
	out.tainted, out.spread = nil, max(spread, 0)
	for _, id := range keyIDs {
		if len(id) > 0 && !slices.Contains(out.tainted, string(id)) {
			out.tainted = append(out.tainted, string(id))
		}
	}
	slices.Sort(out.tainted)
	return &out
}

// Taints reports whether a certificate is one to be replaced now: a tainted authority
// issued it.
func (t *Trust) Taints(c *x509.Certificate) bool {
	_, found := slices.BinarySearch(t.tainted, string(c.AuthorityKeyId))
	return found
}

// Tainted are the subject key identifiers of the tainted authorities, and how long their
// SVIDs' replacement is to be spread over.
func (t *Trust) Tainted() (keyIDs [][]byte, spread time.Duration) {
	for _, id := range t.tainted {
		keyIDs = append(keyIDs, []byte(id))
	}
	return keyIDs, t.spread
}

// Sequence is the number under which the authority published this state.
func (t *Trust) Sequence() uint64 { return t.sequence }

// TrustDomain is the agent's own trust domain.
func (t *Trust) TrustDomain() spiffeid.TrustDomain { return t.td }

// Roots are the X.509 authorities of the own trust domain, at least one.
func (t *Trust) Roots() []*x509.Certificate { return append([]*x509.Certificate(nil), t.roots...) }

// PEM is the X.509 authorities of the own trust domain, as Envoy's trusted_ca
// takes them.
func (t *Trust) PEM() []byte {
	var b bytes.Buffer
	for _, c := range t.roots {
		// Encoding to a bytes.Buffer does not fail.
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	return b.Bytes()
}

// GetX509BundleForTrustDomain implements x509bundle.Source. Bundles of different
// trust domains are never merged (SPIFFE Federation §4.2): any domain but the
// own one is an error.
func (t *Trust) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if td != t.td {
		return nil, fmt.Errorf("no trust bundle for trust domain %q", td.Name())
	}
	return x509bundle.FromX509Authorities(td, t.roots), nil
}
