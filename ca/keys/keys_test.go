package keys_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/ca/keys"
	"github.com/signet-mesh/signet/integration/leaktest"

	"go.step.sm/crypto/kms/apiv1"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

func open(t *testing.T, c keys.Config) *keys.Ring {
	t.Helper()
	r, err := keys.Open(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func signs(t *testing.T, key crypto.Signer) error {
	t.Helper()
	digest := sha256.Sum256([]byte("message"))
	signature, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err == nil && !ecdsa.VerifyASN1(key.Public().(*ecdsa.PublicKey), digest[:], signature) {
		t.Error("the signature does not verify")
	}
	return err
}

func secret(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestKeysInFiles makes a key under one passphrase, or none, and opens it under
// another.
func TestKeysInFiles(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, made, opened string
		says               string // empty: it opens
	}{
		{"in the clear", "", "", ""},
		{"encrypted", "correct horse\nignored", "correct horse\r\n", ""},
		{"encrypted, without the passphrase", "correct horse", "", "set authority.keys.passphraseFile"},
		{"encrypted, with another one", "correct horse", "battery staple", "decrypting it"},
		{"in the clear, when there is a passphrase now", "", "correct horse", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			config := func(pass string) keys.Config {
				cfg := keys.Config{Folder: dir}
				if pass != "" {
					cfg.PassphraseFile = secret(t, pass)
				}
				return cfg
			}
			uri, made, err := open(t, config(c.made)).Create(keys.Root)
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(dir, strings.TrimPrefix(uri, "softkms:"))
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if fi, err := os.Stat(path); err != nil || fi.Mode() != 0o600 {
				t.Errorf("mode %v, %v", fi.Mode(), err)
			}
			if got, want := strings.HasPrefix(string(text), "-----BEGIN ENCRYPTED PRIVATE KEY-----"), c.made != ""; got != want {
				t.Errorf("encrypted: %v", got)
			}
			r := open(t, config(c.opened))
			key, err := r.Open(keys.Root, uri, made.Public())
			if c.says != "" {
				if err == nil || !strings.Contains(err.Error(), c.says) {
					t.Errorf("got %v, want %q", err, c.says)
				}
				if err != nil && strings.Contains(err.Error(), "correct horse") {
					t.Errorf("the error tells the passphrase: %v", err)
				}
				return
			}
			if err != nil || signs(t, key) != nil {
				t.Fatal(err)
			}
			other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := r.Open(keys.Root, uri, other.Public()); err == nil || !strings.Contains(err.Error(), "restore the right one") {
				t.Errorf("the key of something else: %v", err)
			}
			if err := r.Remove(keys.Root, uri); err != nil {
				t.Error(err)
			}
			if _, err := r.Open(keys.Root, uri, made.Public()); err == nil || !strings.Contains(err.Error(), "never makes a new key") {
				t.Errorf("a key that is gone: %v", err)
			}
		})
	}
}

func TestAKeyThatIsMissing(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	r := open(t, keys.Config{Folder: dir})
	uri, _, err := r.Create(keys.Intermediate)
	if err != nil {
		t.Fatal(err)
	}
	is := func(uri string, want bool) {
		t.Helper()
		if missing, err := r.Missing(uri); err != nil || missing != want {
			t.Errorf("%s is missing: %v, %v", uri, missing, err)
		}
	}
	is(uri, false)
	is("pkcs11:token=a;object=b", false) // only its device knows
	if err := r.Remove(keys.Intermediate, uri); err != nil {
		t.Fatal(err)
	}
	is(uri, true)
	if _, err := r.Missing("softkms:../" + filepath.Base(dir)); err == nil {
		t.Error("a path is looked for")
	}
	r = open(t, keys.Config{Folder: filepath.Join(secret(t, ""), "x")}) // below a file
	if missing, err := r.Missing(uri); err == nil || missing {
		t.Errorf("in what is no folder: %v, %v", missing, err)
	}
}

func TestBadConfigurationsAreRefused(t *testing.T) {
	t.Parallel()
	readable := secret(t, "x")
	if err := os.Chmod(readable, 0o644); err != nil {
		t.Fatal(err)
	}
	managers := map[string]keys.Opener{"pkcs11": nil, "awskms": nil}
	for name, c := range map[string]struct {
		cfg  keys.Config
		says string
	}{
		"a static program":               {keys.Config{Made: map[string]string{keys.Root: "pkcs11:token=a"}}, "make build-pkcs11"},
		"a program without that cloud":   {keys.Config{Made: map[string]string{keys.Root: "awskms:key-id=a"}}, "make build-cloudkms"},
		"a secret in the URI":            {keys.Config{Made: map[string]string{keys.Root: "azurekms:name=a;client-secret=b"}, Managers: map[string]keys.Opener{"azurekms": nil}}, "a secret does not belong"},
		"an unknown scheme":              {keys.Config{Made: map[string]string{keys.Root: "x:y"}}, `scheme "x"`},
		"no URI":                         {keys.Config{Made: map[string]string{keys.Root: "pkcs11"}}, "not a KMS URI"},
		"a PIN in the URI":               {keys.Config{Managers: managers, Made: map[string]string{keys.Root: "pkcs11:token=a?pin-value=1234"}}, "pin-source"},
		"a prompt":                       {keys.Config{Managers: managers, Made: map[string]string{keys.Root: "pkcs11:token=a;pin-prompt=x"}}, "pin-source"},
		"one key for every intermediate": {keys.Config{Managers: managers, Made: map[string]string{keys.Intermediate: "pkcs11:token=a;object=b"}}, "leave out id and object"},
		"intermediates in a cloud":       {keys.Config{Managers: managers, Made: map[string]string{keys.Intermediate: "awskms:key-id=a"}}, "authority.keys.root"},
		"a file elsewhere":               {keys.Config{Made: map[string]string{keys.Root: "softkms:/tmp/key"}}, "write softkms:"},
		"the log's key in a token":       {keys.Config{Managers: managers, Made: map[string]string{keys.Log: "pkcs11:token=a"}}, "is a file"},
		"an open passphrase file":        {keys.Config{PassphraseFile: readable}, "chmod o-rwx"},
		"an empty passphrase":            {keys.Config{PassphraseFile: secret(t, "\nx")}, "first line is empty"},
		"a passphrase that is missing":   {keys.Config{PassphraseFile: "/nonexistent/x"}, "no such file"},
	} {
		c.cfg.Folder = t.TempDir()
		if _, err := keys.Open(c.cfg); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: got %v, want %q", name, err, c.says)
		} else if strings.Contains(err.Error(), "1234") {
			t.Errorf("%s: the error tells the PIN: %v", name, err)
		}
	}
}

// hsm is a key device that can be out, slow or lying. Handles do not survive that it
// was out, as with a real token.
type hsm struct {
	mu     sync.Mutex
	out    bool
	slow   time.Duration
	epoch  int
	opened int
	keys   map[string]*ecdsa.PrivateKey
}

func (h *hsm) open(context.Context, apiv1.Options) (apiv1.KeyManager, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.out {
		return nil, errors.New("token not found")
	}
	h.opened++
	return &hsmManager{h: h, epoch: h.epoch}, nil
}

func (h *hsm) set(f func()) { h.mu.Lock(); defer h.mu.Unlock(); f() }

type hsmManager struct {
	h      *hsm
	epoch  int
	closed bool
}

func (m *hsmManager) ok() error {
	if m.closed {
		panic("use of a module after C_Finalize")
	}
	if m.h.out || m.epoch != m.h.epoch {
		return errors.New("CKR_DEVICE_REMOVED")
	}
	return nil
}

func (m *hsmManager) CreateKey(r *apiv1.CreateKeyRequest) (*apiv1.CreateKeyResponse, error) {
	m.h.mu.Lock()
	defer m.h.mu.Unlock()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err == nil {
		err = m.ok()
	}
	if err != nil {
		return nil, err
	}
	m.h.keys[r.Name] = key
	return &apiv1.CreateKeyResponse{Name: r.Name, PublicKey: key.Public()}, nil
}

func (m *hsmManager) CreateSigner(r *apiv1.CreateSignerRequest) (crypto.Signer, error) {
	m.h.mu.Lock()
	defer m.h.mu.Unlock()
	key, ok := m.h.keys[r.SigningKey]
	if !ok {
		return nil, errors.New("not found")
	}
	return hsmKey{m, key}, m.ok()
}

func (m *hsmManager) GetPublicKey(*apiv1.GetPublicKeyRequest) (crypto.PublicKey, error) {
	return nil, errors.New("not implemented")
}

func (m *hsmManager) DeleteKey(name string) error {
	m.h.mu.Lock()
	defer m.h.mu.Unlock()
	delete(m.h.keys, name)
	return m.ok()
}

func (m *hsmManager) Close() error {
	m.h.mu.Lock()
	defer m.h.mu.Unlock()
	m.closed = true
	return nil
}

type hsmKey struct {
	m *hsmManager
	*ecdsa.PrivateKey
}

func (k hsmKey) Sign(r io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	k.m.h.mu.Lock()
	slow, err := k.m.h.slow, k.m.ok()
	k.m.h.mu.Unlock()
	if err != nil {
		return nil, err
	}
	time.Sleep(slow)
	return k.PrivateKey.Sign(r, digest, opts)
}

func device(t *testing.T) (*hsm, *keys.Ring, string, crypto.Signer) {
	t.Helper()
	h := &hsm{keys: map[string]*ecdsa.PrivateKey{}}
	r := open(t, keys.Config{Folder: t.TempDir(), Managers: map[string]keys.Opener{"pkcs11": h.open},
		Made: map[string]string{keys.Root: "pkcs11:token=my token", keys.Intermediate: "pkcs11:token=my token"}})
	uri, key, err := r.Create(keys.Intermediate)
	if err != nil {
		t.Fatal(err)
	}
	return h, r, uri, key
}

func TestADeviceThatIsTakenOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, r, uri, key := device(t)
		if !strings.HasPrefix(uri, "pkcs11:token=my%20token;id=") || !strings.Contains(uri, ";object=signet-intermediate-") {
			t.Errorf("URI %s", uri)
		}
		if err := errors.Join(signs(t, key), r.Err()); err != nil {
			t.Error(err)
		}
		h.set(func() { h.out = true; h.epoch++ })
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				if err := signs(t, key); !errors.Is(err, keys.ErrDevice) {
					t.Errorf("without the device: %v", err)
				}
			})
		}
		wg.Wait()
		if err := r.Err(); err == nil || !strings.Contains(err.Error(), uri) {
			t.Errorf("Err says %v", err)
		}
		opened := h.opened
		for range 100 {
			_ = signs(t, key)
		}
		if h.opened != opened {
			t.Error("a device that is away is tried at each call")
		}
		h.set(func() { h.out = false })
		time.Sleep(time.Second)
		r.Probe()
		if err := errors.Join(r.Err(), signs(t, key)); err != nil {
			t.Errorf("with the device again: %v", err)
		}
		// Out and in between two calls.
		h.set(func() { h.epoch++ })
		if err := signs(t, key); err != nil {
			t.Errorf("after it was out unnoticed: %v", err)
		}
		if _, err := r.Open(keys.Intermediate, uri, key.Public()); err != nil {
			t.Error(err)
		}
		// Another token comes back under the same name.
		other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		h.set(func() { h.keys[uri] = other; h.epoch++ })
		if err := signs(t, key); !errors.Is(err, keys.ErrDevice) || !strings.Contains(err.Error(), "another key") {
			t.Errorf("another token: %v", err)
		}
	})
}

func TestADeviceThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, r, _, key := device(t)
		h.set(func() { h.slow = time.Hour })
		start := time.Now()
		if err := signs(t, key); !errors.Is(err, keys.ErrDevice) || !strings.Contains(err.Error(), "15s") {
			t.Errorf("got %v", err)
		}
		if d := time.Since(start); d > 16*time.Second {
			t.Errorf("it took %v", d)
		}
		if r.Err() == nil {
			t.Error("Err says nothing")
		}
		h.set(func() { h.slow = 0 })
		time.Sleep(2 * time.Hour)
		if err := signs(t, key); err != nil {
			t.Error(err)
		}
	})
}

func TestAKeyThatIsThereIsUsedAndStays(t *testing.T) {
	t.Parallel()
	h := &hsm{keys: map[string]*ecdsa.PrivateKey{}}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	const uri = "pkcs11:token=a;object=root"
	r := open(t, keys.Config{Folder: t.TempDir(), Managers: map[string]keys.Opener{"pkcs11": h.open}, Made: map[string]string{keys.Root: uri}})
	if _, _, err := r.Create(keys.Root); err == nil || len(h.keys) != 0 {
		t.Errorf("a key that is not there: %v, %d keys", err, len(h.keys))
	}
	h.set(func() { h.keys[uri] = key })
	got, made, err := r.Create(keys.Root)
	if err != nil || got != uri || !key.PublicKey.Equal(made.Public()) {
		t.Fatalf("%s, %v", got, err)
	}
	if err := r.Remove(keys.Root, got); err != nil || len(h.keys) != 1 {
		t.Errorf("it was removed, or %v", err)
	}
	if _, err := open(t, keys.Config{Folder: t.TempDir()}).Open(keys.Root, uri, key.Public()); err == nil || !strings.Contains(err.Error(), "make build-pkcs11") {
		t.Errorf("a static program: %v", err)
	}
}

func FuzzParseKey(f *testing.F) {
	dir := f.TempDir()
	pass := filepath.Join(dir, "pass")
	if err := os.WriteFile(pass, []byte("p"), 0o600); err != nil {
		f.Fatal(err)
	}
	r, err := keys.Open(keys.Config{Folder: dir})
	if err != nil {
		f.Fatal(err)
	}
	uri, _, err := r.Create(keys.Root)
	if err != nil {
		f.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(dir, strings.TrimPrefix(uri, "softkms:")))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		// A passphrase is not given: an attacker's file would choose the work to do.
		key, err := keys.ParseKey(text, nil)
		if err == nil && key.Public() == nil {
			t.Error("a key without a public half")
		}
	})
}
