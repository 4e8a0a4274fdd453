package profile

import (
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"fmt"
	"math/big"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// SerialLength is 1 byte instance, 6 bytes Unix milliseconds, 10 bytes random:
// unique per replica, sortable by time, and with 80 random bits beyond what
// CA/Browser Forum BR §7.1 asks for. It fits the 20 bytes of RFC 5280 §4.1.2.2,
// and is positive because the instance is at most 0x7f.
const SerialLength = 17

// NewSerial makes a serial; instance is 1 to 127.
func NewSerial(instance uint8, now time.Time) []byte {
	b := make([]byte, SerialLength)
	var ms [8]byte
	binary.BigEndian.PutUint64(ms[:], uint64(now.UnixMilli()))
	b[0] = instance
	copy(b[1:7], ms[2:])
	_, _ = rand.Read(b[7:]) // never fails (crypto/rand)
	return b
}

// Serial is the fixed-length form of a certificate's serial, as the log and
// the store have it.
func Serial(c *x509.Certificate) []byte {
	if c.SerialNumber.BitLen() > 8*SerialLength || c.SerialNumber.Sign() < 0 {
		return c.SerialNumber.Bytes()
	}
	return c.SerialNumber.FillBytes(make([]byte, SerialLength))
}

// SerialTime is the moment in a serial of NewSerial; it must have SerialLength bytes.
func SerialTime(serial []byte) time.Time {
	var ms [8]byte
	copy(ms[2:], serial[1:7])
	return time.UnixMilli(int64(binary.BigEndian.Uint64(ms[:]))).UTC()
}

// Validity is the period of a certificate. It starts backdate before now and
// ends ttl after it, but never after the issuer's own end.
func Validity(now time.Time, ttl, backdate time.Duration, issuer *x509.Certificate) (notBefore, notAfter time.Time) {
	notBefore = now.Add(-backdate).UTC().Truncate(time.Second)
	notAfter = now.Add(ttl).UTC().Truncate(time.Second)
	if issuer != nil {
		if notAfter.After(issuer.NotAfter) {
			notAfter = issuer.NotAfter
		}
		if notBefore.Before(issuer.NotBefore) {
			notBefore = issuer.NotBefore
		}
	}
	return notBefore, notAfter
}

// RenewAt is when the holder of a certificate should ask for the next one: at
// half of what is left now, give or take a tenth of that, so that a fleet whose
// certificates were made together spreads. random is in [0, 1).
func RenewAt(now, notAfter time.Time, random float64) time.Time {
	left := notAfter.Sub(now)
	if left <= 0 {
		return now
	}
	return now.Add(time.Duration(float64(left) * (0.45 + 0.1*random)))
}

// Root is a root. It and Intermediate follow X509-SVID §3 and §4 for signing
// certificates: a SPIFFE ID without a path, cA, keyCertSign. The subject's serial
// number makes the distinguished name unique, so that path building never
// confuses two authorities during a rotation.
func Root(td spiffeid.TrustDomain, serial []byte, notBefore, notAfter time.Time) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber:          new(big.Int).SetBytes(serial),
		Subject:               pkix.Name{Organization: []string{"Signet"}, CommonName: "root " + td.Name(), SerialNumber: fmt.Sprintf("%x", serial)},
		NotBefore:             notBefore,
		NotAfter:              notAfter,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLen:            1,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs:                  []*url.URL{td.ID().URL()},
	}
}

// Intermediate is an issuer of leaves: path length 0, with the instance in its name.
func Intermediate(td spiffeid.TrustDomain, instance uint8, serial []byte, notBefore, notAfter time.Time) *x509.Certificate {
	t := Root(td, serial, notBefore, notAfter)
	t.Subject.CommonName = fmt.Sprintf("intermediate %d %s", instance, td.Name())
	t.MaxPathLen, t.MaxPathLenZero = 0, true
	return t
}

// Leaf is an X.509-SVID (X509-SVID §4, and the profile in DESIGN.md): one
// URI SAN, an empty subject and hence a critical SAN (which crypto/x509 sees to),
// digitalSignature, server and client authentication.
func Leaf(id spiffeid.ID, dnsNames []string, serial []byte, notBefore, notAfter time.Time) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber:          new(big.Int).SetBytes(serial),
		NotBefore:             notBefore,
		NotAfter:              notAfter,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:                  []*url.URL{id.URL()},
		DNSNames:              dnsNames,
	}
}
