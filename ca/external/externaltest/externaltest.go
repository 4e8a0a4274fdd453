// Package externaltest plays whoever signs an authority's intermediates, for tests.
package externaltest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Signer is an authority with its key.
type Signer struct {
	Cert *x509.Certificate
	Key  crypto.Signer
	up   *Signer
}

// Edit changes a certificate before it is signed.
type Edit func(*x509.Certificate)

// Kinds of keys.
const (
	P256    = "P-256"
	P384    = "P-384"
	RSA2048 = "RSA 2048"
)

// Key makes a private key.
func Key(tb testing.TB, kind string) crypto.Signer {
	tb.Helper()
	var key crypto.Signer
	var err error
	switch kind {
	case RSA2048:
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	case P384:
		key, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	default:
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

// Root makes a root that is good for ten years.
func Root(tb testing.TB, name, kind string, edits ...Edit) *Signer {
	tb.Helper()
	s := &Signer{Key: Key(tb, kind)}
	t := template(name, 10*365*24*time.Hour)
	s.Cert = s.sign(tb, t, s.Key.Public(), edits)
	return s
}

// Intermediate is signed by s.
func (s *Signer) Intermediate(tb testing.TB, name, kind string, edits ...Edit) *Signer {
	tb.Helper()
	key := Key(tb, kind)
	return &Signer{Cert: s.sign(tb, template(name, 365*24*time.Hour), key.Public(), edits), Key: key, up: s}
}

// Sign answers a request, PKCS#10 in DER, with a certificate of 30 days that has what
// the request asks for.
func (s *Signer) Sign(tb testing.TB, csr []byte, edits ...Edit) *x509.Certificate {
	tb.Helper()
	r, err := x509.ParseCertificateRequest(csr)
	if err == nil {
		err = r.CheckSignature()
	}
	if err != nil {
		tb.Fatal(err)
	}
	t := template("", 30*24*time.Hour)
	t.Subject, t.URIs, t.MaxPathLen, t.MaxPathLenZero = r.Subject, r.URIs, 0, true
	return s.sign(tb, t, r.PublicKey, edits)
}

// Chain is what signed a certificate of s, up to the root.
func (s *Signer) Chain() (chain []*x509.Certificate) {
	for ; s != nil; s = s.up {
		chain = append(chain, s.Cert)
	}
	return chain
}

func template(name string, life time.Duration) *x509.Certificate {
	serial, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	now := time.Now().Round(0).Truncate(time.Second)
	return &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-time.Minute), NotAfter: now.Add(life),
		BasicConstraintsValid: true, IsCA: true, MaxPathLen: -1, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign}
}

func (s *Signer) sign(tb testing.TB, t *x509.Certificate, pub crypto.PublicKey, edits []Edit) *x509.Certificate {
	tb.Helper()
	for _, e := range edits {
		e(t)
	}
	parent := s.Cert
	if parent == nil {
		parent = t
	}
	der, err := x509.CreateCertificate(rand.Reader, t, parent, pub, s.Key)
	if err != nil {
		tb.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

// PEM encodes certificates.
func PEM(certs ...*x509.Certificate) (text []byte) {
	for _, c := range certs {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return text
}

// KeyPEM encodes a private key as PKCS#8.
func KeyPEM(tb testing.TB, key crypto.Signer) []byte {
	tb.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		tb.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// Istio are the files of s as an issuer, as Istio names them. roots, if there are any,
// take the place of its own root.
func (s *Signer) Istio(tb testing.TB, roots ...*x509.Certificate) map[string][]byte {
	tb.Helper()
	chain := s.Chain()
	if roots == nil {
		roots = chain[len(chain)-1:]
	}
	return map[string][]byte{"ca-cert.pem": PEM(s.Cert), "ca-key.pem": KeyPEM(tb, s.Key), "cert-chain.pem": PEM(chain...), "root-cert.pem": PEM(roots...)}
}

// CertManager are the files of s as cert-manager names them.
func (s *Signer) CertManager(tb testing.TB) map[string][]byte {
	tb.Helper()
	chain := s.Chain()
	return map[string][]byte{"tls.crt": PEM(chain[:max(len(chain)-1, 1)]...), "tls.key": KeyPEM(tb, s.Key), "ca.crt": PEM(chain[len(chain)-1])}
}

// Mount writes files to dir as kubelet mounts a Secret: the names are links through
// ..data, which is replaced by a rename.
func Mount(tb testing.TB, dir string, files map[string][]byte) {
	tb.Helper()
	check := func(err error) {
		if err != nil {
			tb.Fatal(err)
		}
	}
	now, err := os.MkdirTemp(dir, "..version-")
	check(err)
	for name, text := range files {
		check(os.WriteFile(filepath.Join(now, name), text, 0o600))
		if err := os.Symlink(filepath.Join("..data", name), filepath.Join(dir, name)); !os.IsExist(err) {
			check(err)
		}
	}
	old, _ := os.Readlink(filepath.Join(dir, "..data"))
	check(os.Symlink(filepath.Base(now), filepath.Join(dir, "..data_tmp")))
	check(os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
	if old != "" {
		check(os.RemoveAll(filepath.Join(dir, old)))
	}
}

// SPIFFE sets the URI SAN.
func SPIFFE(id string) Edit {
	return func(c *x509.Certificate) {
		u, _ := url.Parse(id)
		c.URIs = []*url.URL{u}
	}
}

// Valid sets the validity, relative to now.
func Valid(from, to time.Duration) Edit {
	return func(c *x509.Certificate) {
		now := time.Now().Round(0).Truncate(time.Second)
		c.NotBefore, c.NotAfter = now.Add(from), now.Add(to)
	}
}
