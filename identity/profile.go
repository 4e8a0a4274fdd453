package identity

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}
var oidKeyUsage = asn1.ObjectIdentifier{2, 5, 29, 15}
var oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}

// CheckSVID checks that c has the form of an X.509-SVID as Signet issues it, and
// returns its SPIFFE ID. It says nothing about who signed it or when it is
// valid; x509svid.Verify does that.
func CheckSVID(c *x509.Certificate) (spiffeid.ID, error) {
	id, err := checkSVID(c)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("certificate is not a valid X.509-SVID: %w", err)
	}
	return id, nil
}

func checkSVID(c *x509.Certificate) (spiffeid.ID, error) {
	// X509-SVID §2: exactly one URI SAN, the SPIFFE ID; more must be rejected.
	if len(c.URIs) != 1 {
		return spiffeid.ID{}, fmt.Errorf("it has %d URI SANs; exactly one is required", len(c.URIs))
	}
	id, err := ParseID(c.URIs[0].String())
	if err != nil {
		return spiffeid.ID{}, err
	}
	// X509-SVID §5.2: a leaf has a path.
	if id.Path() == "" {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID %s has no path", id)
	}
	// RFC 5280 §4.2.1.6: the SAN is critical when the subject is empty.
	if len(c.Subject.Names) == 0 && !critical(c, oidSubjectAltName) {
		return spiffeid.ID{}, errors.New("the subject is empty and the SAN not critical")
	}
	// X509-SVID §4.1: a leaf is no authority.
	if !c.BasicConstraintsValid || c.IsCA {
		return spiffeid.ID{}, errors.New("basic constraints must say cA=false")
	}
	// X509-SVID §4.3: key usage is critical, has digitalSignature, and neither
	// keyCertSign nor cRLSign.
	if !critical(c, oidKeyUsage) {
		return spiffeid.ID{}, errors.New("key usage must be present and critical")
	}
	if c.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return spiffeid.ID{}, errors.New("key usage must have digitalSignature")
	}
	if c.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 {
		return spiffeid.ID{}, errors.New("key usage must have neither keyCertSign nor cRLSign")
	}
	// X509-SVID §4.4: if extended key usage is there, both must be.
	for _, want := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if !slices.Contains(c.ExtKeyUsage, want) {
			return spiffeid.ID{}, errors.New("extended key usage must have serverAuth and clientAuth")
		}
	}
	if len(c.AuthorityKeyId) == 0 {
		return spiffeid.ID{}, errors.New("authority key identifier is missing")
	}
	return id, nil
}

// CheckAuthority checks that c may sign certificates (X509-SVID §4.1, §4.3):
// cA=true in critical basic constraints and keyCertSign in critical key usage.
func CheckAuthority(c *x509.Certificate) error {
	switch {
	case !c.BasicConstraintsValid || !c.IsCA || !critical(c, oidBasicConstraints):
		return fmt.Errorf("certificate %x is not an authority: basic constraints must be critical and say cA=true", c.SerialNumber)
	case c.KeyUsage&x509.KeyUsageCertSign == 0 || !critical(c, oidKeyUsage):
		return fmt.Errorf("certificate %x is not an authority: key usage must be critical and have keyCertSign", c.SerialNumber)
	case len(c.SubjectKeyId) == 0:
		return fmt.Errorf("certificate %x is not an authority: subject key identifier is missing", c.SerialNumber)
	}
	return nil
}

func critical(c *x509.Certificate, oid asn1.ObjectIdentifier) bool {
	return slices.ContainsFunc(c.Extensions, func(e pkix.Extension) bool {
		return e.Critical && e.Id.Equal(oid)
	})
}
