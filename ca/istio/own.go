package istio

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/signet-mesh/signet/identity"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Istiod says that a serving certificate is made for istiod, which then needs no
// CA of its own: what istio-csr does with its dynamic istiod certificate.
type Istiod struct {
	// Namespace and ServiceAccount are istiod's; they make the SPIFFE ID.
	Namespace, ServiceAccount string
	// DNSNames go into the certificate; istiod's clients verify one of them.
	// Required.
	DNSNames []string
	// Deliver is called with the files of each new certificate: tls.crt, tls.key and
	// ca.crt, as in a Secret of type kubernetes.io/tls. [Folder] makes one. Required.
	Deliver func(ctx context.Context, files map[string][]byte) error
}

// kept is a serving certificate that Run renews.
type kept struct {
	what    string
	id      spiffeid.ID // zero: the authority's own
	dns     []string
	deliver func(ctx context.Context, c *tls.Certificate, roots []byte) error

	next  time.Time // when it is due
	trust uint64    // state of trust that was delivered with it
	err   error     // why the last attempt failed
}

// keepOwn makes the certificates that the door keeps fresh: its own and, if asked
// for, istiod's.
func (d *Door) keepOwn(ctx context.Context) error {
	d.own = []*kept{{what: "serving certificate", dns: d.cfg.DNSNames, deliver: func(_ context.Context, c *tls.Certificate, _ []byte) error {
		d.serving.Store(c)
		return nil
	}}}
	if i := d.cfg.Istiod; i != nil {
		if i.Deliver == nil || len(i.DNSNames) == 0 {
			return errors.New("istiod's serving certificate needs DNS names and a place where it is put")
		}
		id, err := identity.WorkloadID(d.td, i.Namespace, i.ServiceAccount)
		if err != nil {
			return fmt.Errorf("istiod's serving certificate: %w", err)
		}
		d.own = append(d.own, &kept{what: "istiod's serving certificate", id: id, dns: i.DNSNames, deliver: func(ctx context.Context, c *tls.Certificate, roots []byte) error {
			files, err := tlsFiles(c, roots)
			if err != nil {
				return err
			}
			return i.Deliver(ctx, files)
		}})
	}
	// The door cannot open without its own certificate. Where istiod's is put may be
	// away for a while: Run tries again.
	if err := d.renewOwn(ctx, d.own[0]); err != nil {
		return err
	}
	for _, k := range d.own[1:] {
		d.attempt(ctx, k, time.Now().Round(0))
	}
	return nil
}

// attempt renews one of the door's certificates and says so when that begins or
// ceases to fail.
func (d *Door) attempt(ctx context.Context, k *kept, now time.Time) {
	err := d.renewOwn(ctx, k)
	if ctx.Err() != nil {
		return
	}
	if err != nil && k.err == nil {
		d.cfg.Log.Error("background work failed; it is tried again until it succeeds", "job", k.what, "err", err)
	} else if err == nil && k.err != nil {
		d.cfg.Log.Info("background work succeeds again", "job", k.what)
	}
	if k.err = err; err != nil {
		k.next = now.Add(time.Second)
	}
}

func (d *Door) renewOwn(ctx context.Context, k *kept) error {
	trust, _ := d.cfg.Authority.Trust()
	c, renewAt, err := d.cfg.Authority.IssueServing(ctx, doorName, k.id, k.dns)
	if err == nil {
		err = k.deliver(ctx, c, trust.PEM())
	}
	if err != nil {
		return fmt.Errorf("renewing %s: %w", k.what, err)
	}
	k.next, k.trust = renewAt, trust.Sequence()
	return nil
}

// Run keeps the door's certificates fresh until ctx ends, and forgets what has
// expired. A failure is retried, and is the reason in Ready meanwhile.
func (d *Door) Run(ctx context.Context) error {
	const longest, shortest = 10 * time.Second, 50 * time.Millisecond
	forgotten := time.Now()
	for {
		trust, changed := d.cfg.Authority.Trust()
		now := time.Now().Round(0) // the wall clock decides what has expired
		wait := longest
		var errs []error
		for _, k := range d.own {
			if !now.Before(k.next) || k.trust != trust.Sequence() {
				d.attempt(ctx, k, now)
			}
			if ctx.Err() != nil {
				return nil
			}
			errs = append(errs, k.err)
			wait = min(wait, max(shortest, time.Until(k.next)))
		}
		if err := errors.Join(errs...); err != nil {
			d.failing.Store(&err)
			wait = max(wait, time.Second) // also where the state of trust is new
			changed = nil
		} else {
			d.failing.Store(nil)
		}
		if d.renewals != nil && time.Since(forgotten) >= forgetEvery {
			forgotten = time.Now()
			d.renewals.forget(now)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-time.After(wait):
		}
	}
}

// tlsFiles are a certificate's files under the names of a Secret for TLS.
func tlsFiles(c *tls.Certificate, roots []byte) (map[string][]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		return nil, fmt.Errorf("encoding the key: %w", err)
	}
	var chain bytes.Buffer
	for _, b := range c.Certificate {
		// Encoding to a bytes.Buffer does not fail.
		_ = pem.Encode(&chain, &pem.Block{Type: "CERTIFICATE", Bytes: b})
	}
	return map[string][]byte{
		"tls.crt": chain.Bytes(),
		"tls.key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
		"ca.crt":  roots,
	}, nil
}

// Folder puts files into a folder (0700, made if it does not exist) as kubelet puts
// a Secret there: each file is a link into a folder that is exchanged at once, so
// that a reader never sees the key of one certificate beside another.
func Folder(dir string) func(context.Context, map[string][]byte) error {
	return func(_ context.Context, files map[string][]byte) error {
		if err := exchange(dir, files); err != nil {
			return fmt.Errorf("writing into %s: %w", dir, err)
		}
		return nil
	}
}

// current is the link that is exchanged, under kubelet's name.
const current = "..data"

func exchange(dir string, files map[string][]byte) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	old, _ := os.Readlink(filepath.Join(dir, current))
	fresh, err := os.MkdirTemp(dir, "..")
	if err != nil {
		return err
	}
	exchanged := false
	defer func() {
		if !exchanged {
			_ = os.RemoveAll(fresh)
		}
	}()
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(fresh, name), content, 0o600); err != nil {
			return err
		}
	}
	link := filepath.Join(dir, "..data_tmp")
	if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(filepath.Base(fresh), link); err != nil {
		return err
	}
	if err := os.Rename(link, filepath.Join(dir, current)); err != nil {
		return err
	}
	exchanged = true
	for name := range files {
		path := filepath.Join(dir, name)
		if to, _ := os.Readlink(path); to == filepath.Join(current, name) {
			continue
		}
		if err := os.Symlink(filepath.Join(current, name), path); err != nil {
			return err
		}
	}
	if strings.HasPrefix(old, "..") && old == filepath.Base(old) && old != ".." {
		// Only what an earlier call made; a reader that is in it keeps its open files.
		_ = os.RemoveAll(filepath.Join(dir, old))
	}
	return nil
}
