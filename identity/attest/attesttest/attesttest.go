// Package attesttest makes service-account tokens for tests: good ones, and every
// kind of bad one.
//
//	issuer := attesttest.NewIssuer(t)
//	good := issuer.Token(pod, "signet")
//	old := issuer.Token(pod, "signet", attesttest.Issued(time.Now().Add(-time.Hour)))
//	forged := issuer.Token(pod, "signet", attesttest.Header("alg", "none"), attesttest.Unsigned())
//
// # Trust
//
// It is for tests only: nothing that ships imports it.
package attesttest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest/devissuer"
)

// Issuer is a devissuer.Issuer that fails the test instead of returning errors.
type Issuer struct {
	*devissuer.Issuer
	t testing.TB
}

// NewIssuer makes an issuer with an ES256 key, in memory.
func NewIssuer(t testing.TB) *Issuer { return NewIssuerFor(t, "ES256") }

// NewIssuerFor makes an issuer for RS256 or ES256, in memory.
func NewIssuerFor(t testing.TB, alg string) *Issuer {
	t.Helper()
	i, err := devissuer.New(devissuer.Options{Algorithm: alg})
	if err != nil {
		t.Fatal(err)
	}
	return &Issuer{i, t}
}

// JWKSFile writes the issuer's public key into a file of the test.
func (i *Issuer) JWKSFile() string {
	i.t.Helper()
	name := filepath.Join(i.t.TempDir(), "jwks.json")
	if err := os.WriteFile(name, i.JWKS(), 0o644); err != nil {
		i.t.Fatal(err)
	}
	return name
}

// Parts are what a token is made of; an [Edit] changes them before it is put
// together.
type Parts struct {
	Header map[string]any
	Claims map[string]any
	// Payload, if not nil, is the payload instead of Claims.
	Payload []byte
	// HeaderJSON, if not nil, is the header instead of Header.
	HeaderJSON []byte
	// Sign makes the signature over header.payload.
	Sign func(input []byte) []byte
}

// Edit makes a token different from a good one.
type Edit func(*Parts)

// Token is a token for w with one audience, issued now for ten minutes, unless
// edited.
func (i *Issuer) Token(w identity.Workload, audience string, edits ...Edit) string {
	// No t.Helper: it may not be called from within a fuzz target.
	claims, err := i.Issuer.Claims(devissuer.Claims{
		Audience:  []string{audience},
		Namespace: w.Namespace, ServiceAccount: w.ServiceAccount, ServiceAccountUID: w.ServiceAccountUID,
		Pod: w.Pod, PodUID: w.PodUID, Node: w.Node, NodeUID: w.NodeUID,
	}, time.Now())
	if err != nil {
		i.t.Fatal(err)
	}
	p := &Parts{
		Header: map[string]any{"alg": i.Algorithm(), "kid": i.KeyID()},
		Claims: claims,
		Sign:   i.sign,
	}
	for _, edit := range edits {
		edit(p)
	}
	header, payload := p.HeaderJSON, p.Payload
	if header == nil {
		header = i.marshal(p.Header)
	}
	if payload == nil {
		payload = i.marshal(p.Claims)
	}
	input := base64.RawURLEncoding.EncodeToString(header) + "." + base64.RawURLEncoding.EncodeToString(payload)
	return input + "." + base64.RawURLEncoding.EncodeToString(p.Sign([]byte(input)))
}

func (i *Issuer) marshal(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		i.t.Fatal(err)
	}
	return b
}

func (i *Issuer) sign(input []byte) []byte {
	sum := sha256.Sum256(input)
	switch key := i.Key().(type) {
	case *ecdsa.PrivateKey:
		r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
		if err != nil {
			i.t.Fatal(err)
		}
		// RFC 7518 section 3.4: r and s, 32 bytes each.
		out := make([]byte, 64)
		r.FillBytes(out[:32])
		s.FillBytes(out[32:])
		return out
	case *rsa.PrivateKey:
		out, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, sum[:])
		if err != nil {
			i.t.Fatal(err)
		}
		return out
	default:
		i.t.Fatalf("key of type %T", key)
		return nil
	}
}

// Issued moves iat and nbf to the given moment, and exp with them.
func Issued(at time.Time) Edit {
	return func(p *Parts) {
		exp, iat := p.Claims["exp"].(int64), p.Claims["iat"].(int64)
		p.Claims["exp"] = at.Unix() + exp - iat
		p.Claims["iat"], p.Claims["nbf"] = at.Unix(), at.Unix()
	}
}

// TTL sets exp to that long after iat.
func TTL(d time.Duration) Edit {
	return func(p *Parts) { p.Claims["exp"] = p.Claims["iat"].(int64) + int64(d/time.Second) }
}

// Claim sets a claim. A path with a slash leads into objects, such as
// kubernetes.io/pod/uid.
func Claim(path string, value any) Edit {
	return func(p *Parts) {
		m, last := descend(p.Claims, path)
		m[last] = value
	}
}

// Without removes a claim; path is as for [Claim].
func Without(path string) Edit {
	return func(p *Parts) {
		m, last := descend(p.Claims, path)
		delete(m, last)
	}
}

func descend(m map[string]any, path string) (map[string]any, string) {
	parts := strings.Split(path, "/")
	for _, name := range parts[:len(parts)-1] {
		m = m[name].(map[string]any)
	}
	return m, parts[len(parts)-1]
}

// Header sets a header parameter.
func Header(name string, value any) Edit {
	return func(p *Parts) { p.Header[name] = value }
}

// WithoutHeader removes a header parameter.
func WithoutHeader(name string) Edit {
	return func(p *Parts) { delete(p.Header, name) }
}

// RawHeader replaces the header by these bytes.
func RawHeader(b string) Edit { return func(p *Parts) { p.HeaderJSON = []byte(b) } }

// RawClaims replaces the claims by what f makes of their JSON.
func RawClaims(f func(string) string) Edit {
	return func(p *Parts) {
		b, err := json.Marshal(p.Claims)
		if err != nil {
			panic("attesttest: encoding claims: " + err.Error())
		}
		p.Payload = []byte(f(string(b)))
	}
}

// Unsigned leaves the signature empty, as alg none has it.
func Unsigned() Edit {
	return func(p *Parts) { p.Sign = func([]byte) []byte { return nil } }
}

// HMAC signs with HMAC-SHA256 and the given key, such as the bytes of a public key
// that a careless verifier would take for a shared secret.
func HMAC(key []byte) Edit {
	return func(p *Parts) {
		p.Sign = func(input []byte) []byte {
			m := hmac.New(sha256.New, key)
			m.Write(input)
			return m.Sum(nil)
		}
	}
}

// SignedBy signs with another issuer's key; the header stays.
func SignedBy(o *Issuer) Edit { return func(p *Parts) { p.Sign = o.sign } }

// Sign signs with f.
func Sign(f func(input []byte) []byte) Edit { return func(p *Parts) { p.Sign = f } }
