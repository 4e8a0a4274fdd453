package extauthz

import (
	"crypto/x509"
	"encoding/pem"
	"net/url"
	"strings"
)

const (
	// maxCertificate is the longest certificate that is read, as it is encoded
	// in a CheckRequest. An X.509-SVID of Signet has about 900 bytes.
	maxCertificate = 16 << 10
	// maxPeers is how many certificates each of two generations remembers.
	maxPeers = 512
	// maxMetadata is how much metadata of filters each of two generations
	// remembers, of at most that many bytes, as long as it is no more than
	// maxRememberedWeight.
	maxMetadata, maxMetadataSize = 512, 8 << 10
)

// peer is the names of a certificate. It is immutable.
type peer struct {
	principal []byte   // as Envoy has it: first URI SAN, else first DNS SAN, else subject
	others    [][]byte // the names besides, each of which a principal in a policy may match
	serial    []byte
}

// certificate is what a certificate says, by its encoded form: reading one costs
// more than the rest of a check.
//
// Nothing here says that a certificate is valid; the proxy verified it.
func (rd *reader) certificate(encoded string) (*peer, error) {
	if len(encoded) > maxCertificate {
		return nil, &RequestError{ReasonCertificate, "the certificate is too large"}
	}
	if p, ok := rd.peers.get(encoded); ok {
		return p, nil
	}
	p, err := readCertificate(encoded)
	if err != nil {
		return nil, err
	}
	rd.peers.put(encoded, p, 2*len(encoded))
	return p, nil
}

// readCertificate reads URL-encoded PEM of one certificate.
func readCertificate(encoded string) (*peer, error) {
	bad := func(detail string) (*peer, error) {
		return nil, &RequestError{ReasonCertificate, detail}
	}
	// Envoy encodes "+" too, so one that is there means itself.
	text, err := url.PathUnescape(encoded)
	if err != nil {
		return bad("the certificate is not URL-encoded")
	}
	block, rest := pem.Decode([]byte(text))
	if block == nil || !strings.HasPrefix(text, "-----BEGIN") || block.Type != "CERTIFICATE" || strings.TrimSpace(string(rest)) != "" {
		return bad("the certificate is not PEM of one certificate")
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return bad("the certificate cannot be parsed")
	}
	// X509-SVID section 2: more than one URI SAN must be refused. Envoy's own
	// policies would take a peer for any of them, and shows us the first only.
	if len(c.URIs) > 1 {
		return bad("the certificate has several URI SANs")
	}
	var names [][]byte
	for _, u := range c.URIs {
		names = append(names, []byte(u.String()))
	}
	for _, d := range c.DNSNames {
		names = append(names, []byte(d))
	}
	if s := c.Subject.String(); s != "" {
		names = append(names, []byte(s))
	}
	if len(names) == 0 {
		return bad("the certificate has no name")
	}
	p := &peer{principal: names[0], serial: c.SerialNumber.Bytes()}
	if len(names) > 1 {
		p.others = names[1:]
	}
	return p, nil
}
