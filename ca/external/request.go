package external

import (
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"net/url"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Extensions that a request asks for, in the form that the certificate will have.
var (
	// basicConstraints: cA, pathLen 0.
	wantCA = pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 0x06, 0x01, 0x01, 0xff, 0x02, 0x01, 0x00}}
	// keyUsage: keyCertSign, cRLSign.
	wantUsage = pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Critical: true, Value: []byte{0x03, 0x02, 0x01, 0x06}}
)

// Request makes a PKCS#10 request for an intermediate of an instance, in DER. It asks
// for the profile that [Check] wants, so a signer may copy its extensions. The subject
// is unique to the key, so that path building never confuses two authorities.
func Request(key crypto.Signer, td spiffeid.TrustDomain, instance uint8) ([]byte, error) {
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, fmt.Errorf("making a certificate request: %w", err)
	}
	sum := sha256.Sum256(spki)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{Organization: []string{"Signet"}, CommonName: fmt.Sprintf("intermediate %d %s", instance, td.Name()), SerialNumber: fmt.Sprintf("%x", sum[:10])},
		URIs:    []*url.URL{td.ID().URL()}, ExtraExtensions: []pkix.Extension{wantCA, wantUsage},
	}, key)
	if err != nil {
		return nil, fmt.Errorf("making a certificate request: %w", err)
	}
	return der, nil
}

// RequestPEM is a request as PEM.
func RequestPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}
