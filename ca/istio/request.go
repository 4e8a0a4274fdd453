package istio

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/signet-mesh/signet/ca"

	pb "istio.io/api/security/v1alpha1"
)

// maxCSR bounds a CSR in PEM. One with an RSA key of 8192 bits and a few names has
// some 4 KiB.
const maxCSR = 16 << 10

// impersonatedIdentity is the field of a request's metadata by which ztunnel says
// whose certificate it asks for.
const impersonatedIdentity = "ImpersonatedIdentity"

// request is what counts of an IstioCertificateRequest.
type request struct {
	key crypto.PublicKey
	ttl time.Duration
}

// parseRequest takes a request apart; its error is for the client.
func parseRequest(m *pb.IstioCertificateRequest, maxTTL time.Duration) (request, error) {
	key, err := parseCSR(m.GetCsr())
	if err != nil {
		return request{}, err
	}
	return request{key: key, ttl: lifetime(m.GetValidityDuration(), maxTTL)}, nil
}

// lifetime is what is granted of the seconds that were asked for: not more than
// maxTTL, and maxTTL where nothing was asked.
func lifetime(seconds int64, maxTTL time.Duration) time.Duration {
	if seconds <= 0 || seconds > math.MaxInt64/int64(time.Second) {
		return maxTTL
	}
	return min(time.Duration(seconds)*time.Second, maxTTL)
}

// parseCSR returns the public key of a PKCS#10 request in PEM whose signature
// verifies. Names and extensions in it are not looked at.
func parseCSR(text string) (crypto.PublicKey, error) {
	if len(text) > maxCSR {
		return nil, fmt.Errorf("certificate signing request has %d bytes; at most %d are accepted", len(text), maxCSR)
	}
	block, _ := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE REQUEST" && block.Type != "NEW CERTIFICATE REQUEST" {
		return nil, errors.New("certificate signing request is not properly encoded")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		// The parser's text may quote what was sent.
		return nil, errors.New("failed to parse X.509 certificate signing request")
	}
	// Before the signature: a huge key makes verifying it expensive.
	if err := ca.CheckPublicKey(csr.PublicKey); err != nil {
		return nil, err
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, err
	}
	return csr.PublicKey, nil
}
