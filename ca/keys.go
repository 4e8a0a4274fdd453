package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/softkms"
)

// keyFolder holds private keys as softkms files, each written once.
type keyFolder struct {
	dir string
	km  *softkms.SoftKMS
}

func openKeyFolder(dir string) (*keyFolder, error) {
	km, err := softkms.New(context.Background(), apiv1.Options{Type: apiv1.SoftKMS})
	if err != nil {
		return nil, fmt.Errorf("opening key folder %s: %w", dir, err)
	}
	return &keyFolder{dir: dir, km: km}, nil
}

// create makes a P-256 key, writes it durably and returns its KMS URI, relative
// to the folder so that the folder can move.
func (f *keyFolder) create(purpose string) (uri string, key crypto.Signer, err error) {
	var suffix [4]byte
	_, _ = rand.Read(suffix[:]) // never fails (crypto/rand)
	name := purpose + "-" + hex.EncodeToString(suffix[:]) + ".key"
	made, err := f.km.CreateKey(&apiv1.CreateKeyRequest{Name: name, SignatureAlgorithm: apiv1.ECDSAWithSHA256})
	if err != nil {
		return "", nil, fmt.Errorf("making key %s: %w", name, err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(made.PrivateKey)
	if err != nil {
		return "", nil, fmt.Errorf("making key %s: %w", name, err)
	}
	block := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	if err := writeDurably(filepath.Join(f.dir, name), block); err != nil {
		return "", nil, fmt.Errorf("writing key %s: %w", name, err)
	}
	signer, err := f.km.CreateSigner(&made.CreateSignerRequest)
	if err != nil {
		return "", nil, fmt.Errorf("making key %s: %w", name, err)
	}
	return softkms.Scheme + ":" + name, signer, nil
}

// open loads the key of a URI that create returned and checks that it is the
// private half of pub.
func (f *keyFolder) open(uri string, pub crypto.PublicKey) (crypto.Signer, error) {
	path, err := f.path(uri)
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
	key, err := f.km.CreateSigner(&apiv1.CreateSignerRequest{
		SigningKey: path,
		// A key with a passphrase must not make the daemon ask on a terminal.
		PasswordPrompter: apiv1.NonInteractivePasswordPrompter,
	})
	if err != nil {
		return nil, fmt.Errorf("loading key file %s: %w", path, err)
	}
	have, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !have.Equal(pub) {
		return nil, fmt.Errorf("key file %s is not the key of its certificate: restore the right one", path)
	}
	return key, nil
}

// remove deletes a key that certifies nothing any more, or never did.
func (f *keyFolder) remove(uri string) error {
	path, err := f.path(uri)
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing a key that is not needed: %w", err)
	}
	return nil
}

func (f *keyFolder) path(uri string) (string, error) {
	name, ok := strings.CutPrefix(uri, softkms.Scheme+":")
	if !ok || name != filepath.Base(name) || strings.HasPrefix(name, ".") {
		return "", fmt.Errorf("key URI %q: this build opens softkms keys by their file name only", uri)
	}
	return filepath.Join(f.dir, name), nil
}

// writeDurably makes a file that did not exist, with content and name on disk
// when it returns nil.
func writeDurably(path string, content []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		_ = os.Remove(path)
		return err
	}
	return syncFolder(filepath.Dir(path))
}

func syncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
