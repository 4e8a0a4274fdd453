package keys

import (
	"context"
	"crypto"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/softkms"
	"go.step.sm/crypto/kms/uri"
)

// Opener opens the manager of a scheme. Those of go.step.sm/crypto/kms are such
// functions.
type Opener func(ctx context.Context, opts apiv1.Options) (apiv1.KeyManager, error)

// pkcs11Scheme is what go.step.sm/crypto/kms/pkcs11 calls its own; importing that
// here would bring its C code into every program.
const pkcs11Scheme = "pkcs11"

// Purposes of keys.
const (
	Root         = "root"
	Intermediate = "intermediate"
	Log          = "log"
)

// Config says where keys are.
type Config struct {
	// Folder holds the keys that are files. Required.
	Folder string
	// PassphraseFile holds the passphrase that keys in files are encrypted with, in
	// its first line. Empty: they are not encrypted.
	PassphraseFile string
	// Made says for each purpose where its keys are made, as a KMS URI without the
	// key. What is not there is made in a file. A URI that names a key uses that key
	// and makes none; it can serve for Root only.
	Made map[string]string
	// Managers open the devices, by scheme. softkms is always there.
	Managers map[string]Opener
	// SignTimeout is how long a device may take for a signature; 0 means 15 seconds.
	SignTimeout time.Duration
	// Logger receives what operators should read; nil discards it.
	Logger *slog.Logger
}

// Ring makes, opens and removes keys. Safe for concurrent use.
type Ring struct {
	cfg   Config
	files *softkms.SoftKMS
	pass  []byte // of files; nil: none
	made  map[string]place
	*devices
}

// place is where keys of a purpose are.
type place struct {
	scheme string
	uri    string // of the manager, with the key if there is one
	key    string // the key's own URI, if there is one
	token  string // of a PKCS#11 URI
}

// Open checks the configuration and reads the passphrase. No device is touched
// before it is needed.
func Open(cfg Config) (*Ring, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.SignTimeout == 0 {
		cfg.SignTimeout = 15 * time.Second
	}
	files, err := softkms.New(context.Background(), apiv1.Options{Type: apiv1.SoftKMS})
	if err != nil {
		return nil, fmt.Errorf("opening key folder %s: %w", cfg.Folder, err)
	}
	r := &Ring{cfg: cfg, files: files, made: map[string]place{}}
	for purpose, where := range cfg.Made {
		p, err := cfg.place(purpose, where)
		if err != nil {
			return nil, fmt.Errorf("authority.keys.%s: %w", purpose, err)
		}
		r.made[purpose] = p
	}
	if cfg.PassphraseFile != "" {
		if r.pass, err = ReadSecret(cfg.PassphraseFile); err != nil {
			return nil, fmt.Errorf("authority.keys.passphraseFile: %w", err)
		}
	}
	r.devices = &devices{cfg: cfg, open: map[string]apiv1.KeyManager{}, failed: map[string]failure{}, slots: make(chan struct{}, maxSigning)}
	return r, nil
}

// Check is nil for a configuration that Open would take; it reads no secret and
// opens no device.
func (c Config) Check() error {
	for purpose, where := range c.Made {
		if _, err := c.place(purpose, where); err != nil {
			return fmt.Errorf("authority.keys.%s: %w", purpose, err)
		}
	}
	return nil
}

// place parses where keys of a purpose are made.
func (c Config) place(purpose, where string) (place, error) {
	scheme, rest, _ := strings.Cut(where, ":")
	p := place{scheme: scheme, uri: where}
	switch {
	case where == "" || scheme == softkms.Scheme && rest == "":
		p.scheme, p.uri = softkms.Scheme, softkms.Scheme+":"
		return p, nil
	case scheme == softkms.Scheme:
		return place{}, fmt.Errorf("%q: keys in files have no other place than the authority's folder; write softkms: and no path", where)
	case purpose == Log:
		return place{}, errors.New("the log's key is a file")
	case rest == "":
		return place{}, fmt.Errorf("%q is not a KMS URI", where)
	}
	if err := c.linked(scheme); err != nil {
		return place{}, err
	}
	u, err := uri.ParseWithScheme(scheme, where)
	if err != nil {
		return place{}, fmt.Errorf("%q is not a KMS URI: %w", where, err)
	}
	if u.Has("pin-value") || u.Has("pin-prompt") {
		return place{}, errors.New("a PIN does not belong in a configuration that is printed and copied: use pin-source=FILE")
	}
	if u.Has("client-secret") {
		return place{}, errors.New("a secret does not belong in a configuration that is printed and copied: leave out client-secret and set AZURE_CLIENT_SECRET, or use a workload identity")
	}
	if scheme != pkcs11Scheme {
		// Making a key there costs money and rights that an authority should not have.
		if purpose != Root {
			return place{}, fmt.Errorf("%s: keys are not made there: use it for authority.keys.root, with a key that exists", scheme)
		}
		p.key = where
		return p, nil
	}
	p.token = u.Get("token")
	if u.Has("id") || u.Has("object") {
		if purpose != Root {
			return place{}, errors.New("every intermediate has a new key, so the URI must not name one: leave out id and object")
		}
		p.key = where
	}
	return p, nil
}

// linked is nil if this program opens keys of a scheme.
func (c Config) linked(scheme string) error {
	switch _, ok := c.Managers[scheme]; {
	case ok:
		return nil
	case scheme == pkcs11Scheme:
		return errors.New("this build of signet-ca opens no pkcs11: keys, because it is static: build the one that does with `make build-pkcs11` (it needs a C compiler) and run bin/signet-ca-pkcs11")
	}
	switch scheme {
	case "awskms", "cloudkms", "azurekms":
		return fmt.Errorf("this build of signet-ca opens no %s: keys, so that it links no cloud's libraries: build the one that does with `make build-cloudkms` and run bin/signet-ca-cloudkms", scheme)
	}
	return fmt.Errorf("this build of signet-ca opens no keys of scheme %q", scheme)
}

// Create makes a P-256 key of a purpose and returns its KMS URI. A key in a file is
// durable when it returns, and its URI is relative to the folder, so that the folder
// can move.
func (r *Ring) Create(purpose string) (uri string, key crypto.Signer, err error) {
	var suffix [4]byte
	_, _ = rand.Read(suffix[:]) // never fails (crypto/rand)
	name := purpose + "-" + hex.EncodeToString(suffix[:])
	p, ok := r.made[purpose]
	switch {
	case !ok || p.scheme == softkms.Scheme:
		uri, key, err = r.createFile(name + ".key")
	case p.key != "":
		uri = p.key
		key, err = r.device(p, p.key, nil)
	default:
		uri = pkcs11Scheme + ":"
		if p.token != "" {
			uri += "token=" + escape(p.token) + ";"
		}
		uri += "id=" + hex.EncodeToString(suffix[:]) + ";object=signet-" + name
		if err = r.create(p, uri); err == nil {
			key, err = r.device(p, uri, nil)
		}
	}
	if err != nil {
		return "", nil, fmt.Errorf("making %s key %s: %w", purpose, uri, err)
	}
	return uri, key, nil
}

// Open is the key of a URI that Create returned for a purpose, checked to be the
// private half of pub.
func (r *Ring) Open(purpose, keyURI string, pub crypto.PublicKey) (crypto.Signer, error) {
	scheme, _, _ := strings.Cut(keyURI, ":")
	if scheme == softkms.Scheme {
		return r.openFile(keyURI, pub)
	}
	p, ok := r.made[purpose]
	if err := r.cfg.linked(scheme); err != nil {
		return nil, fmt.Errorf("key %s: %w", keyURI, err)
	}
	if !ok || p.scheme != scheme {
		return nil, fmt.Errorf("key %s: authority.keys.%s does not say how to reach it: set it to the %s: URI that the key was made under", keyURI, purpose, scheme)
	}
	return r.device(p, keyURI, pub)
}

// Parse reads a private key in PEM that is kept elsewhere; if it is encrypted, with the
// ring's passphrase.
func (r *Ring) Parse(text []byte) (crypto.Signer, error) { return ParseKey(text, r.pass) }

// Remove deletes a key that certifies nothing any more, or never did. One that was
// there before Create stays.
func (r *Ring) Remove(purpose, keyURI string) error {
	scheme, _, _ := strings.Cut(keyURI, ":")
	p := r.made[purpose]
	switch {
	case scheme == softkms.Scheme:
		return r.removeFile(keyURI)
	case p.key != "" || p.scheme != scheme:
		return nil
	}
	return r.delete(p, keyURI)
}

// ReadSecret reads a passphrase, a PIN or a password: the first line of a file that
// others cannot read.
func ReadSecret(path string) ([]byte, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if fi.Mode().Perm()&0o007 != 0 {
		return nil, fmt.Errorf("%s has mode %v and is open to others: run: chmod o-rwx %s (of a mounted Secret: defaultMode: 0440)", path, fi.Mode().Perm(), path)
	}
	if fi.Size() > 4096 {
		return nil, fmt.Errorf("%s has %d bytes: it holds no passphrase or password", path, fi.Size())
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	line, _, _ := strings.Cut(string(b), "\n")
	if line = strings.TrimSuffix(line, "\r"); line == "" {
		return nil, fmt.Errorf("%s: its first line is empty", path)
	}
	return []byte(line), nil
}

// escape makes an attribute's value safe in a PKCS#11 URI (RFC 7512 §2.3).
func escape(s string) string {
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.' {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}
