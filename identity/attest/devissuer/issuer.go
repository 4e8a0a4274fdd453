// Package devissuer is an issuer of service-account tokens for machines without
// Kubernetes: for development, demonstrations and tests. Its tokens have the claims
// that the API server gives to a token that kubelet projects into a pod, and its
// folder holds what a verifier needs.
//
//	key.pem      the private key, PKCS#8 (0600)
//	jwks.json    the public key as a JSON Web Key Set (RFC 7517)
//	issuer.json  issuer, kid and alg; written last, so a folder that has it is complete
//
// # Trust
//
// An attacker who can read key.pem can be any pod to those who trust the issuer, for
// as long as they do. The folder is 0700 and the key 0600, and a key that others can
// read is refused; there is no other protection, so the issuer of a cluster never
// belongs here.
package devissuer

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// Names of the files in an issuer's folder.
const (
	KeyFile    = "key.pem"
	JWKSFile   = "jwks.json"
	IssuerFile = "issuer.json"
)

// Defaults of [Options] and [Claims].
const (
	// DefaultURL is the issuer; .invalid never resolves (RFC 2606).
	DefaultURL = "https://dev.signet.invalid"
	// DefaultAlgorithm is quick to make keys for.
	DefaultAlgorithm = "ES256"
	// DefaultTTL is the shortest that the API server grants.
	DefaultTTL = 10 * time.Minute
)

// Options say what issuer to make.
type Options struct {
	// URL becomes iss. Empty means DefaultURL.
	URL string
	// Algorithm is ES256 (P-256) or RS256 (RSA, 2048 bits). Empty means
	// DefaultAlgorithm.
	Algorithm string
}

// Issuer signs tokens. It is safe for concurrent use.
type Issuer struct {
	url   string
	alg   jose.SignatureAlgorithm
	keyID string
	key   crypto.Signer
}

// Claims are what a token says. All but the UIDs of service account and node, and
// TTL, are required.
type Claims struct {
	Audience       []string
	Namespace      string
	ServiceAccount string
	// ServiceAccountUID, if empty, is derived from namespace and name.
	ServiceAccountUID string
	Pod, PodUID       string
	Node              string
	// NodeUID, if empty, is left out, as the API server does if the node does
	// not exist.
	NodeUID string
	// TTL is exp − iat, in whole seconds. Zero means DefaultTTL.
	TTL time.Duration
}

// New makes an issuer with a new key, in memory only.
func New(opt Options) (*Issuer, error) {
	opt = opt.withDefaults()
	var key crypto.Signer
	var err error
	switch opt.Algorithm {
	case string(jose.ES256):
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case string(jose.RS256):
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	default:
		return nil, fmt.Errorf("making an issuer: algorithm %q is not RS256 or ES256", opt.Algorithm)
	}
	if err != nil {
		return nil, fmt.Errorf("making an issuer's key: %w", err)
	}
	return newIssuer(opt, key)
}

// Create makes an issuer in dir, which is made (0700) if it does not exist. If dir
// holds a complete issuer already, that one is opened and kept, and created is false;
// it is an error if opt asks for another URL or algorithm than it has. Nothing is ever
// overwritten.
func Create(dir string, opt Options) (i *Issuer, created bool, err error) {
	switch _, err := os.Stat(filepath.Join(dir, IssuerFile)); {
	case err == nil:
		i, err := Open(dir)
		if err != nil {
			return nil, false, err
		}
		if (opt.URL != "" && opt.URL != i.url) || (opt.Algorithm != "" && opt.Algorithm != string(i.alg)) {
			return nil, false, fmt.Errorf("creating an issuer in %s: there is one already, %s with %s; choose another folder, or remove this one", dir, i.url, i.alg)
		}
		return i, false, nil
	case !errors.Is(err, fs.ErrNotExist):
		return nil, false, fmt.Errorf("creating an issuer: %w", err)
	}
	if i, err = New(opt); err != nil {
		return nil, false, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, false, fmt.Errorf("creating an issuer: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(i.key)
	if err != nil {
		return nil, false, fmt.Errorf("creating an issuer: encoding its key: %w", err)
	}
	about, err := json.MarshalIndent(about{i.url, i.keyID, string(i.alg)}, "", "  ")
	if err != nil {
		return nil, false, fmt.Errorf("creating an issuer: %w", err)
	}
	for _, f := range []struct {
		name string
		data []byte
		mode fs.FileMode
	}{
		{KeyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600},
		{JWKSFile, i.JWKS(), 0o644},
		{IssuerFile, append(about, '\n'), 0o644},
	} {
		if err := writeNew(filepath.Join(dir, f.name), f.data, f.mode); err != nil {
			if errors.Is(err, fs.ErrExist) {
				return nil, false, fmt.Errorf("creating an issuer: %w, but no %s: what is left of an interrupted attempt; remove %s and try again", err, IssuerFile, dir)
			}
			return nil, false, fmt.Errorf("creating an issuer: %w", err)
		}
	}
	return i, true, nil
}

// Open reads the issuer in dir and checks that its files belong together.
func Open(dir string) (*Issuer, error) {
	i, err := open(dir)
	if err != nil {
		return nil, fmt.Errorf("opening the issuer in %s: %w", dir, err)
	}
	return i, nil
}

// about is the content of issuer.json.
type about struct {
	Issuer    string `json:"issuer"`
	KeyID     string `json:"kid"`
	Algorithm string `json:"alg"`
}

func open(dir string) (*Issuer, error) {
	data, err := os.ReadFile(filepath.Join(dir, IssuerFile))
	if err != nil {
		return nil, fmt.Errorf("%w; make one with: signet dev issuer --dir %s", err, dir)
	}
	var a about
	if err := json.Unmarshal(data, &a); err != nil {
		return nil, fmt.Errorf("%s: %w", IssuerFile, err)
	}
	name := filepath.Join(dir, KeyFile)
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s can be read by others (mode %04o): chmod 600", name, info.Mode().Perm())
	}
	if data, err = os.ReadFile(name); err != nil {
		return nil, err
	}
	block, rest := pem.Decode(data)
	if block == nil || block.Type != "PRIVATE KEY" || len(strings.TrimSpace(string(rest))) != 0 {
		return nil, fmt.Errorf("%s is not one PKCS#8 private key in PEM", KeyFile)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", KeyFile, err)
	}
	var key crypto.Signer
	switch k := parsed.(type) {
	case *ecdsa.PrivateKey:
		if k.Curve == elliptic.P256() && a.Algorithm == string(jose.ES256) {
			key = k
		}
	case *rsa.PrivateKey:
		if a.Algorithm == string(jose.RS256) {
			key = k
		}
	}
	if key == nil {
		return nil, fmt.Errorf("%s holds no key for the algorithm %q of %s", KeyFile, a.Algorithm, IssuerFile)
	}
	i, err := newIssuer(Options{URL: a.Issuer, Algorithm: a.Algorithm}, key)
	if err != nil {
		return nil, err
	}
	if i.keyID != a.KeyID {
		return nil, fmt.Errorf("%s is about key %q, %s holds %q", IssuerFile, a.KeyID, KeyFile, i.keyID)
	}
	return i, nil
}

func newIssuer(opt Options, key crypto.Signer) (*Issuer, error) {
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, fmt.Errorf("making an issuer: %w", err)
	}
	// The key ID that the API server gives to the same key.
	sum := sha256.Sum256(der)
	return &Issuer{
		url:   opt.URL,
		alg:   jose.SignatureAlgorithm(opt.Algorithm),
		keyID: base64.RawURLEncoding.EncodeToString(sum[:]),
		key:   key,
	}, nil
}

func (o Options) withDefaults() Options {
	if o.URL == "" {
		o.URL = DefaultURL
	}
	if o.Algorithm == "" {
		o.Algorithm = DefaultAlgorithm
	}
	return o
}

// URL is what tokens say as iss.
func (i *Issuer) URL() string { return i.url }

// Algorithm is RS256 or ES256.
func (i *Issuer) Algorithm() string { return string(i.alg) }

// KeyID is what tokens say as kid.
func (i *Issuer) KeyID() string { return i.keyID }

// Key signs as the issuer does. It is there for tests that need tokens that no
// issuer would make.
func (i *Issuer) Key() crypto.Signer { return i.key }

// JWKS is the issuer's public key as a JSON Web Key Set.
func (i *Issuer) JWKS() []byte {
	b, err := json.MarshalIndent(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{
		{Key: i.key.Public(), KeyID: i.keyID, Algorithm: string(i.alg), Use: "sig"},
	}}, "", "  ")
	if err != nil {
		// The only keys that there are were made or checked by this package.
		panic("devissuer: encoding a public key: " + err.Error())
	}
	return append(b, '\n')
}

// Token issues a token at the given moment, in compact form.
func (i *Issuer) Token(c Claims, now time.Time) (string, error) {
	m, err := i.Claims(c, now)
	if err != nil {
		return "", err
	}
	signer, err := jose.NewSigner(jose.SigningKey{
		Algorithm: i.alg,
		Key:       jose.JSONWebKey{Key: i.key, KeyID: i.keyID},
	}, nil)
	if err != nil {
		return "", fmt.Errorf("issuing a token: %w", err)
	}
	token, err := jwt.Signed(signer).Claims(m).Serialize()
	if err != nil {
		return "", fmt.Errorf("issuing a token: %w", err)
	}
	return token, nil
}

// Claims are the claims of a token that Token would issue.
func (i *Issuer) Claims(c Claims, now time.Time) (map[string]any, error) {
	if len(c.Audience) == 0 {
		return nil, errors.New("issuing a token: no audience")
	}
	for _, f := range [...]struct{ name, value string }{
		{"namespace", c.Namespace}, {"service account", c.ServiceAccount},
		{"pod", c.Pod}, {"pod UID", c.PodUID}, {"node", c.Node},
	} {
		if f.value == "" {
			return nil, fmt.Errorf("issuing a token: no %s", f.name)
		}
	}
	if strings.Contains(c.Namespace+c.ServiceAccount, ":") {
		return nil, fmt.Errorf("issuing a token: %q/%q: names of namespaces and service accounts have no colon", c.Namespace, c.ServiceAccount)
	}
	if c.TTL == 0 {
		c.TTL = DefaultTTL
	}
	if c.TTL < time.Second {
		return nil, fmt.Errorf("issuing a token: a lifetime of %s; the shortest is a second", c.TTL)
	}
	if c.ServiceAccountUID == "" {
		c.ServiceAccountUID = uuid(sha256.Sum256([]byte(c.Namespace + "/" + c.ServiceAccount)))
	}
	var random [sha256.Size]byte
	rand.Read(random[:]) // never fails: crypto/rand ends the process instead
	node := map[string]any{"name": c.Node}
	if c.NodeUID != "" {
		node["uid"] = c.NodeUID
	}
	iat := now.Unix()
	return map[string]any{
		"iss": i.url,
		"sub": "system:serviceaccount:" + c.Namespace + ":" + c.ServiceAccount,
		"aud": c.Audience,
		"exp": iat + int64(c.TTL/time.Second),
		"iat": iat,
		"nbf": iat,
		"jti": uuid(random),
		"kubernetes.io": map[string]any{
			"namespace":      c.Namespace,
			"serviceaccount": map[string]any{"name": c.ServiceAccount, "uid": c.ServiceAccountUID},
			"pod":            map[string]any{"name": c.Pod, "uid": c.PodUID},
			"node":           node,
		},
	}, nil
}

// uuid formats 16 of the bytes as a version 4 UUID (RFC 9562 section 5.4).
func uuid(b [sha256.Size]byte) string {
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:16])
}

// writeNew writes a file that must not exist. What could not be written whole is
// removed again.
func writeNew(name string, data []byte, mode fs.FileMode) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		// The first error says what is wrong; a rest that stays is reported by
		// the next attempt.
		_ = os.Remove(name)
	}
	return err
}
