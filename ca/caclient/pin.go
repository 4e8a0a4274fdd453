package caclient

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/signet-mesh/signet/identity"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxRootFile bounds a file of pinned roots.
const maxRootFile = 1 << 20

// pin is how an authority is recognised at first contact.
type pin struct {
	file string // PEM certificates, read again at each contact
	hash []byte // SHA-256 of the root's DER; empty if file is set
}

func newPin(file, hash string) (pin, error) {
	switch {
	case file != "" && hash != "":
		return pin{}, errors.New("ca.rootFile and ca.rootHash are both set; give one")
	case file != "":
		return pin{file: file}, nil
	case hash == "":
		return pin{}, errors.New("ca.rootFile or ca.rootHash is required: without it any server could pose as the authority")
	}
	h, err := hex.DecodeString(hash)
	if err != nil || len(h) != sha256.Size {
		return pin{}, fmt.Errorf("ca.rootHash %q: must be the SHA-256 of the root's DER, 64 hexadecimal digits", hash)
	}
	return pin{hash: h}, nil
}

// roots are the pinned certificates. presented is what the server sent: a hash
// picks the root from it.
func (p pin) roots(presented []*x509.Certificate) ([]*x509.Certificate, error) {
	if p.file == "" {
		for _, c := range presented {
			if sum := sha256.Sum256(c.Raw); bytes.Equal(sum[:], p.hash) {
				return []*x509.Certificate{c}, nil
			}
		}
		return nil, fmt.Errorf("the server sent no certificate with the pinned hash %x", p.hash)
	}
	f, err := os.Open(p.file)
	if err != nil {
		return nil, fmt.Errorf("reading pinned roots: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxRootFile+1))
	if err != nil {
		return nil, fmt.Errorf("reading pinned roots from %s: %w", p.file, err)
	}
	if len(data) > maxRootFile {
		return nil, fmt.Errorf("reading pinned roots from %s: the file is larger than %d bytes", p.file, maxRootFile)
	}
	var roots []*x509.Certificate
	for {
		var b *pem.Block
		if b, data = pem.Decode(data); b == nil {
			break
		}
		if b.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("reading pinned roots from %s: it holds a %q; only certificates belong there", p.file, b.Type)
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("reading pinned roots from %s: %w", p.file, err)
		}
		roots = append(roots, c)
	}
	if len(roots) == 0 {
		return nil, fmt.Errorf("reading pinned roots from %s: it holds no PEM certificate", p.file)
	}
	return roots, nil
}

// tlsConfig recognises an authority of td. trust may return nil. client may be
// nil for a first contact.
func tlsConfig(td spiffeid.TrustDomain, p pin, trust func() *identity.Trust, client *tls.Certificate) *tls.Config {
	c := &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2"},
		// The standard check wants a host name. VerifyConnection below does the
		// whole check instead: chain, usage, and the authority's SPIFFE ID.
		InsecureSkipVerify: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			if err := verifyAuthority(td, p, trust(), s.PeerCertificates); err != nil {
				return fmt.Errorf("the server is not an authority of %s: %w", td.Name(), err)
			}
			return nil
		},
	}
	if client != nil {
		// The server names no acceptable authorities; the SVID is always the one
		// to present.
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return client, nil }
	}
	return c
}

func verifyAuthority(td spiffeid.TrustDomain, p pin, trust *identity.Trust, chain []*x509.Certificate) error {
	if len(chain) == 0 {
		return errors.New("it sent no certificate")
	}
	id, err := identity.CheckSVID(chain[0])
	if err != nil {
		return err
	}
	if !identity.IsAuthority(td, id) {
		return fmt.Errorf("its certificate names %s", id)
	}
	opt := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		CurrentTime: identity.VerifiedAt(chain, time.Now())}
	if trust != nil {
		for _, c := range trust.Roots() {
			opt.Roots.AddCert(c)
		}
	}
	pinned, pinErr := p.roots(chain)
	if pinErr != nil && trust == nil {
		return pinErr
	}
	for _, c := range pinned {
		opt.Roots.AddCert(c)
	}
	for _, c := range chain[1:] {
		opt.Intermediates.AddCert(c)
	}
	_, err = chain[0].Verify(opt)
	return err
}
