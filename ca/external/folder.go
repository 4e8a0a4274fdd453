package external

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// Folder is an issuer with its key in files, as Istio's Secret cacerts has them.
type Folder struct {
	Issuer
	// Key is the issuer's private key, in PEM.
	Key []byte
	// Roots are all that the folder's root file holds; Root is one of them.
	Roots []*x509.Certificate
	// Hash changes with the content of the files.
	Hash [sha256.Size]byte
}

// ReadFolder reads ca-cert.pem, ca-key.pem, cert-chain.pem and root-cert.pem, or
// tls.crt, tls.key and ca.crt, and checks that they belong together. parse makes a
// signer of the key's PEM. A mounted Secret is read as it was at one moment.
func ReadFolder(dir string, p Profile, parse func(text []byte) (crypto.Signer, error), now time.Time) (Folder, crypto.Signer, error) {
	fail := func(err error) (Folder, crypto.Signer, error) {
		return Folder{}, nil, fmt.Errorf("reading the issuer in %s: %w", dir, err)
	}
	names, text, hash, err := readFiles(dir)
	if err != nil {
		return fail(err)
	}
	f := Folder{Key: text[1], Hash: hash}
	certs, err := Certificates(text[0])
	if err != nil {
		return fail(fmt.Errorf("%s: %w", names[0], err))
	}
	if f.Roots, err = Certificates(text[2]); err != nil {
		return fail(fmt.Errorf("%s: %w", names[2], err))
	}
	if text[3] != nil {
		more, err := Certificates(text[3])
		if err != nil {
			return fail(fmt.Errorf("%s: %w", names[3], err))
		}
		certs = append(certs, more...)
	}
	key, err := parse(text[1])
	if err != nil {
		return fail(fmt.Errorf("%s: %w", names[1], err))
	}
	p.Key, p.Roots, p.Loose = key.Public(), f.Roots, true
	if f.Issuer, err = Check(order(certs, f.Roots), p, now); err != nil {
		return fail(err)
	}
	return f, key, nil
}

// FolderHash is the Hash that ReadFolder would return, if what is there can be read: to
// tell whether it is worth to be checked again.
func FolderHash(dir string) (hash [sha256.Size]byte, err error) {
	_, text, hash, err := readFiles(dir)
	for _, t := range text {
		clear(t)
	}
	return hash, err
}

// readFiles reads the files of a folder: those of the issuer, its key, the roots and the
// rest of the chain, in this order. The last may be nil.
func readFiles(dir string) (names []string, text [][]byte, hash [sha256.Size]byte, err error) {
	// kubelet swaps the link ..data; following it once keeps old and new files apart.
	if now, err := filepath.EvalSymlinks(filepath.Join(dir, "..data")); err == nil {
		dir = now
	}
	names = []string{"ca-cert.pem", "ca-key.pem", "root-cert.pem", "cert-chain.pem"}
	if _, err := os.Stat(filepath.Join(dir, names[0])); errors.Is(err, fs.ErrNotExist) {
		names = []string{"tls.crt", "tls.key", "ca.crt", ""}
	}
	text = make([][]byte, len(names))
	sum := sha256.New()
	for i, name := range names {
		if name == "" {
			continue
		}
		var err error
		text[i], err = readFile(filepath.Join(dir, name), i == 1)
		if i == 3 && (errors.Is(err, fs.ErrNotExist) || err == nil && len(bytes.TrimSpace(text[i])) == 0) {
			text[i] = nil // Istio does without
			continue
		}
		if errors.Is(err, fs.ErrNotExist) {
			return names, text, hash, fmt.Errorf("%w: Istio's four files belong there (ca-cert.pem, ca-key.pem, cert-chain.pem, root-cert.pem), or tls.crt, tls.key and ca.crt", err)
		}
		if err != nil {
			return names, text, hash, err
		}
		fmt.Fprintf(sum, "%s %d\n", name, len(text[i]))
		sum.Write(text[i])
	}
	sum.Sum(hash[:0])
	return names, text, hash, nil
}

// order is the path from the first certificate to a root, out of a heap: cert-chain.pem
// begins, by its author, with the issuer itself or with what signed it.
func order(certs, roots []*x509.Certificate) []*x509.Certificate {
	path := certs[:1:1]
	for len(path) <= maxChain {
		last := path[len(path)-1]
		if contains(roots, last) || selfSigned(last) {
			break
		}
		next := signer(last, roots)
		if next == nil {
			next = signer(last, certs[1:])
		}
		if next == nil || contains(path, next) {
			break
		}
		path = append(path, next)
	}
	return path
}

func signer(c *x509.Certificate, among []*x509.Certificate) *x509.Certificate {
	for _, s := range among {
		if c.CheckSignatureFrom(s) == nil {
			return s
		}
	}
	return nil
}

// readFile reads a file of bounded size. A secret must not be open to others.
func readFile(path string, secret bool) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if secret && fi.Mode().Perm()&0o007 != 0 {
		return nil, fmt.Errorf("%s has mode %v and is open to others: run: chmod o-rwx %s (of a mounted Secret: defaultMode: 0440)", path, fi.Mode().Perm(), path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxText+1))
	if err == nil && len(b) > maxText {
		err = fmt.Errorf("%s has more than %d bytes", path, maxText)
	}
	return b, err
}

// ReadRoots reads a file of roots.
func ReadRoots(path string) ([]*x509.Certificate, error) {
	text, err := readFile(path, false)
	if err != nil {
		return nil, err
	}
	roots, err := Certificates(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	for _, c := range roots {
		if !selfSigned(c) {
			return nil, fmt.Errorf("%s: %s is not a root: it is signed by %s", path, c.Subject, c.Issuer)
		}
	}
	return roots, nil
}

// PEM is certificates as PEM.
func PEM(certs []*x509.Certificate) []byte {
	var b []byte
	for _, c := range certs {
		b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return b
}
