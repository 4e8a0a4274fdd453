package keys

import (
	"crypto"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/softkms"
	"go.step.sm/crypto/pemutil"
)

// createFile makes a P-256 key in a new file.
func (r *Ring) createFile(name string) (keyURI string, key crypto.Signer, err error) {
	made, err := r.files.CreateKey(&apiv1.CreateKeyRequest{Name: name, SignatureAlgorithm: apiv1.ECDSAWithSHA256})
	if err != nil {
		return "", nil, err
	}
	block, err := r.encode(made.PrivateKey)
	if err != nil {
		return "", nil, err
	}
	if err := WriteDurably(filepath.Join(r.cfg.Folder, name), pem.EncodeToMemory(block)); err != nil {
		return "", nil, err
	}
	signer, err := r.files.CreateSigner(&made.CreateSignerRequest)
	if err != nil {
		return "", nil, err
	}
	return softkms.Scheme + ":" + name, signer, nil
}

// encode is PKCS#8, encrypted (PBES2: PBKDF2 with SHA-256, AES-256) where there is a
// passphrase.
func (r *Ring) encode(key any) (*pem.Block, error) {
	if r.pass != nil {
		return pemutil.Serialize(key, pemutil.WithPKCS8(true), pemutil.WithPassword(r.pass))
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return &pem.Block{Type: "PRIVATE KEY", Bytes: der}, nil
}

// openFile loads a key that createFile made and checks that it is the private half
// of pub.
func (r *Ring) openFile(keyURI string, pub crypto.PublicKey) (crypto.Signer, error) {
	path, err := r.path(keyURI)
	if err != nil {
		return nil, err
	}
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("key file %s is missing: restore it from where the keys are kept; the authority never makes a new key for a certificate that exists", path)
	}
	if err != nil {
		return nil, fmt.Errorf("loading key: %w", err)
	}
	if !ours(fi) {
		return nil, fmt.Errorf("key file %s belongs to another user than the one that runs signet-ca (%d): run: chown %d %s", path, os.Geteuid(), os.Geteuid(), path)
	}
	if !fi.Mode().IsRegular() || fi.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("key file %s has mode %v: it must be a regular file that only its owner can read; run: chmod 600 %s", path, fi.Mode(), path)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("loading key: %w", err)
	}
	key, err := ParseKey(text, r.pass)
	if err != nil {
		return nil, fmt.Errorf("loading key file %s: %w", path, err)
	}
	if r.pass != nil && !encrypted(text) {
		r.cfg.Logger.Warn("a key file is not encrypted, although there is a passphrase: it was made before; keys made from now on are encrypted", "file", path)
	}
	have, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !have.Equal(pub) {
		return nil, fmt.Errorf("key file %s is not the key of its certificate: restore the right one", path)
	}
	return key, nil
}

// ParseKey reads one private key in PEM: PKCS#8, also encrypted, PKCS#1 or SEC 1.
// passphrase may be nil.
func ParseKey(text, passphrase []byte) (crypto.Signer, error) {
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, errors.New("it holds no PEM")
	}
	if encrypted(text) && passphrase == nil {
		return nil, errors.New("it is encrypted: set authority.keys.passphraseFile to the file that holds its passphrase")
	}
	opts := []pemutil.Options{pemutil.WithPasswordPrompt("", noPrompt)}
	if encrypted(text) {
		opts = []pemutil.Options{pemutil.WithPassword(passphrase)}
	}
	// The library derives a key from the passphrase in as many rounds as the file says.
	v, err := pemutil.ParseKey(text, opts...)
	if err != nil {
		if encrypted(text) {
			return nil, fmt.Errorf("decrypting it: %w: is authority.keys.passphraseFile the right one?", err)
		}
		return nil, err
	}
	key, ok := v.(crypto.Signer)
	if !ok {
		return nil, errors.New("it is not a private key that signs")
	}
	return key, nil
}

// noPrompt keeps a daemon from asking on a terminal.
func noPrompt(string) ([]byte, error) { return nil, errors.New("it is encrypted") }

// encrypted reports whether a PEM file is an encrypted key (RFC 5958, RFC 1421).
func encrypted(text []byte) bool {
	block, _ := pem.Decode(text)
	return block != nil && (block.Type == "ENCRYPTED PRIVATE KEY" || strings.Contains(block.Headers["Proc-Type"], "ENCRYPTED"))
}

// Missing reports whether a key is one in a file of the folder, and the file is not there.
func (r *Ring) Missing(keyURI string) (bool, error) {
	if scheme, _, _ := strings.Cut(keyURI, ":"); scheme != softkms.Scheme {
		return false, nil
	}
	path, err := r.path(keyURI)
	if err != nil {
		return false, err
	}
	switch _, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
		return true, nil
	case err != nil:
		return false, fmt.Errorf("looking for a key: %w", err)
	}
	return false, nil
}

func (r *Ring) removeFile(keyURI string) error {
	path, err := r.path(keyURI)
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing a key that is not needed: %w", err)
	}
	return nil
}

// File is a key in a file of the folder.
type File struct {
	URI string
	// Modified is when it was made, or put back.
	Modified time.Time
}

// Files are the keys of a purpose that are files with names as Create gives them.
func (r *Ring) Files(purpose string) (files []File, err error) {
	entries, err := os.ReadDir(r.cfg.Folder)
	if err != nil {
		return nil, fmt.Errorf("looking for keys: %w", err)
	}
	for _, e := range entries {
		suffix, named := strings.CutPrefix(e.Name(), purpose+"-")
		suffix, key := strings.CutSuffix(suffix, ".key")
		if _, err := hex.DecodeString(suffix); !named || !key || err != nil || len(suffix) != 8 || !e.Type().IsRegular() {
			continue
		}
		fi, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue // it was removed meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("looking for keys: %w", err)
		}
		files = append(files, File{softkms.Scheme + ":" + e.Name(), fi.ModTime()})
	}
	return files, nil
}

func (r *Ring) path(keyURI string) (string, error) {
	name, ok := strings.CutPrefix(keyURI, softkms.Scheme+":")
	if !ok || name != filepath.Base(name) || strings.HasPrefix(name, ".") {
		return "", fmt.Errorf("key URI %q: softkms keys are opened by their file name only", keyURI)
	}
	return filepath.Join(r.cfg.Folder, name), nil
}

// ours reports whether a file belongs to the user that this process runs as.
func ours(fi fs.FileInfo) bool {
	st, ok := fi.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Geteuid()
}

// Copy takes a key file of another ring, as it is, if it is the private half of pub.
func (r *Ring) Copy(from *Ring, keyURI string, pub crypto.PublicKey) error {
	if _, err := from.openFile(keyURI, pub); err != nil {
		return err
	}
	path, err := from.path(keyURI)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(path)
	if err == nil {
		err = WriteDurably(filepath.Join(r.cfg.Folder, filepath.Base(path)), text)
	}
	clear(text)
	return err
}

// WriteDurably makes a file that did not exist, with content and name on disk
// when it returns nil.
func WriteDurably(path string, content []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		_ = os.Remove(path)
		return err
	}
	return SyncFolder(filepath.Dir(path))
}

// SyncFolder makes the names in a folder durable.
func SyncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
