package oracle_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// names are what a client's certificate says.
type names struct {
	uris    []string
	dns     []string
	subject string // common name
}

// pki is a root, a server's certificate under it, and clients.
type pki struct {
	root       *x509.Certificate
	rootPEM    string
	key        crypto.Signer
	cert, priv string
	token      *ecdsa.PrivateKey
	clients    map[string]tls.Certificate
}

func newPKI(tb testing.TB, clients map[string]names) *pki {
	tb.Helper()
	p := &pki{clients: map[string]tls.Certificate{}}
	p.key = newKey(tb)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, p.key.Public(), p.key)
	if err != nil {
		tb.Fatal(err)
	}
	if p.root, err = x509.ParseCertificate(der); err != nil {
		tb.Fatal(err)
	}
	p.rootPEM = encodePEM("CERTIFICATE", der)
	server := p.issue(tb, names{uris: []string{"spiffe://own.td/ns/a/sa/server"}})
	p.cert = encodePEM("CERTIFICATE", server.Certificate[0])
	key, err := x509.MarshalPKCS8PrivateKey(server.PrivateKey)
	if err != nil {
		tb.Fatal(err)
	}
	p.priv = encodePEM("PRIVATE KEY", key)
	for name, n := range clients {
		p.clients[name] = p.issue(tb, n)
	}
	p.token = newKey(tb)
	return p
}

func newKey(tb testing.TB) *ecdsa.PrivateKey {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return k
}

func encodePEM(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

// issue makes a certificate with any names, also such as no authority should sign:
// the list of SANs is encoded by hand, because crypto/x509 takes parsed URIs only.
func (p *pki) issue(tb testing.TB, n names) tls.Certificate {
	tb.Helper()
	var sans []asn1.RawValue
	for _, u := range n.uris {
		sans = append(sans, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(u)})
	}
	for _, d := range n.dns {
		sans = append(sans, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 2, Bytes: []byte(d)})
	}
	key := newKey(tb)
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		tb.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: serial, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(12 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	if n.subject != "" {
		template.Subject.CommonName = n.subject
	}
	if len(sans) > 0 {
		value, err := asn1.Marshal(sans)
		if err != nil {
			tb.Fatal(err)
		}
		template.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: n.subject == "", Value: value}}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, p.root, key.Public(), p.key)
	if err != nil {
		tb.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// downstream is the TLS side of a filter chain, without Istio's check of the
// peer's trust domain: policies shall see all kinds of names.
func (p *pki) downstream() object {
	return typed("envoy.transport_sockets.tls", "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext", object{
		"require_client_certificate": true,
		"common_tls_context": object{
			"alpn_protocols": []string{"h2", "http/1.1"},
			"tls_certificates": []object{{
				"certificate_chain": object{"inline_string": p.cert}, "private_key": object{"inline_string": p.priv},
			}},
			"validation_context": object{"trusted_ca": object{"inline_string": p.rootPEM}},
		},
	})
}

// keySet is the JWKS of the one key that signs tokens.
func (p *pki) keySet(tb testing.TB) string {
	b, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: p.token.Public(), KeyID: "k", Algorithm: "ES256"}}})
	if err != nil {
		tb.Fatal(err)
	}
	return string(b)
}

// sign makes a token of claims, with an expiry in an hour unless they have one.
func (p *pki) sign(tb testing.TB, claims object) string {
	tb.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: p.token, KeyID: "k"}}, nil)
	if err != nil {
		tb.Fatal(err)
	}
	all := object{"exp": time.Now().Add(time.Hour).Unix()}
	for k, v := range claims {
		all[k] = v
	}
	b, err := json.Marshal(all)
	if err != nil {
		tb.Fatal(err)
	}
	s, err := signer.Sign(b)
	if err != nil {
		tb.Fatal(err)
	}
	token, err := s.CompactSerialize()
	if err != nil {
		tb.Fatal(err)
	}
	return token
}
