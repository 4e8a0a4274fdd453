package extauthz

import (
	"crypto/x509"
	"encoding/pem"
	"net/url"
	"strings"
	"sync"
)

const (
	// maxCertificate is the longest certificate that is read, as it is encoded
	// in a CheckRequest. An X.509-SVID of Signet has about 900 bytes.
	maxCertificate = 16 << 10
	// maxPeers is how many certificates each of two generations remembers.
	maxPeers = 512
)

// peer is the names of a certificate. It is immutable.
type peer struct {
	principal []byte   // as Envoy has it: first URI SAN, else first DNS SAN, else subject
	others    [][]byte // the names besides, each of which a principal in a policy may match
}

// peers remembers certificates by their encoded form: reading one costs more than
// the rest of a check. A nil *peers remembers nothing.
//
// Nothing here says that a certificate is valid; the proxy verified it.
type peers struct {
	mu sync.RWMutex
	// Two generations, guarded by mu: when the young one is full it becomes the
	// old one, and what was not used since then is forgotten.
	young, old map[string]*peer
}

func (p *peers) certificate(encoded string) (*peer, error) {
	if len(encoded) > maxCertificate {
		return nil, &RequestError{ReasonCertificate, "the certificate is too large"}
	}
	if p == nil {
		return readCertificate(encoded)
	}
	p.mu.RLock()
	known, young := p.young[encoded]
	if !young {
		known = p.old[encoded]
	}
	p.mu.RUnlock()
	if young {
		return known, nil
	}
	if known == nil {
		var err error
		if known, err = readCertificate(encoded); err != nil {
			return nil, err
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.young) >= maxPeers || p.young == nil {
		p.old, p.young = p.young, make(map[string]*peer)
	}
	p.young[strings.Clone(encoded)] = known
	return known, nil
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
	p := &peer{principal: names[0]}
	if len(names) > 1 {
		p.others = names[1:]
	}
	return p, nil
}
