package keys

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/uri"
)

// ErrDevice is why a device did not sign. Nothing was signed, or nobody has the
// signature; it may succeed later.
var ErrDevice = errors.New("the key device does not sign")

// maxSigning bounds the signatures that devices work on at once.
const maxSigning = 32

// devices are the managers that are open, by the URI of their place. A module of
// PKCS#11 has one state for the whole process, so all are closed together.
type devices struct {
	cfg   Config
	slots chan struct{} // a place for each call into a device

	// use is held for reading while a device works, and for writing to close it: a
	// module that is closed under a call crashes the process.
	use        sync.RWMutex
	open       map[string]apiv1.KeyManager // guarded by use
	generation int                         // counts how often they were closed; guarded by use

	mu     sync.Mutex
	failed map[string]failure // by key URI, why it does not sign; guarded by mu
	keys   []*deviceKey       // guarded by mu
}

// Err is why a device does not sign now, nil if all do as far as is known.
func (d *devices) Err() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for key, f := range d.failed {
		return fmt.Errorf("key %s: %w", key, f.err)
	}
	return nil
}

// failure is why a key does not sign, and since when that was tried last.
type failure struct {
	err error
	at  time.Time
}

// pause is how long after a failure a key is not tried again: opening a device that
// is away can take long, and all wait for it.
const pause = 500 * time.Millisecond

// Probe lets each key that failed sign something that is no certificate, so that a
// device that is back is noticed without a request.
func (d *devices) Probe() {
	d.mu.Lock()
	var again []*deviceKey
	for _, k := range d.keys {
		if d.failed[k.uri].err != nil {
			again = append(again, k)
		}
	}
	d.mu.Unlock()
	for _, k := range again {
		_ = k.probe() // what it says is in failed
	}
}

// Close closes every device. Keys must not be used any more.
func (d *devices) Close() error {
	d.use.Lock()
	defer d.use.Unlock()
	return d.closeAll()
}

func (d *devices) closeAll() error {
	var errs []error
	for where, m := range d.open {
		errs = append(errs, m.Close())
		delete(d.open, where)
	}
	d.generation++
	return errors.Join(errs...)
}

// closeFailed closes all devices unless somebody has since generation.
func (d *devices) closeFailed(generation int) {
	d.use.Lock()
	defer d.use.Unlock()
	if d.generation == generation {
		_ = d.closeAll() // it failed already
	}
}

// with calls f with the manager of a place, open. A call that does not return in
// time is left to itself: nothing can interrupt a device.
func (d *devices) with(p place, f func(m apiv1.KeyManager, generation int) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), d.cfg.SignTimeout)
	defer cancel()
	late := func() error {
		return fmt.Errorf("%w: no answer within %v", ErrDevice, d.cfg.SignTimeout)
	}
	select {
	case d.slots <- struct{}{}:
	case <-ctx.Done():
		return late()
	}
	done := make(chan error, 1)
	go func() {
		defer func() { <-d.slots }()
		d.use.RLock()
		defer d.use.RUnlock()
		m, ok := d.open[p.uri]
		if !ok {
			done <- errClosed
			return
		}
		done <- f(m, d.generation)
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return late()
	}
}

var errClosed = errors.New("the device is closed")

// reach opens the manager of a place if it is not.
func (d *devices) reach(p place) error {
	done := make(chan error, 1)
	go func() {
		d.use.Lock()
		defer d.use.Unlock()
		if d.open[p.uri] != nil {
			done <- nil
			return
		}
		// The PIN is read each time: it may have been changed with the token.
		u, err := uri.ParseWithScheme(p.scheme, p.uri)
		if err == nil && u.Get("pin-source") != "" {
			_, err = ReadSecret(u.Get("pin-source"))
		}
		if err != nil {
			done <- fmt.Errorf("the PIN: %w", err)
			return
		}
		m, err := d.cfg.Managers[p.scheme](context.Background(), apiv1.Options{Type: apiv1.Type(p.scheme), URI: p.uri})
		if err == nil {
			d.open[p.uri] = m
		}
		done <- err
	}()
	ctx, cancel := context.WithTimeout(context.Background(), d.cfg.SignTimeout)
	defer cancel()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("%w: it did not open within %v", ErrDevice, d.cfg.SignTimeout)
	}
}

// create makes a key in a device.
func (d *devices) create(p place, keyURI string) error {
	if err := d.reach(p); err != nil {
		return err
	}
	return d.with(p, func(m apiv1.KeyManager, _ int) error {
		_, err := m.CreateKey(&apiv1.CreateKeyRequest{Name: keyURI, SignatureAlgorithm: apiv1.ECDSAWithSHA256})
		return err
	})
}

// delete removes a key from a device that can.
func (d *devices) delete(p place, keyURI string) error {
	if err := d.reach(p); err != nil {
		return fmt.Errorf("removing a key that is not needed: %w", err)
	}
	err := d.with(p, func(m apiv1.KeyManager, _ int) error {
		if m, ok := m.(interface{ DeleteKey(string) error }); ok {
			return m.DeleteKey(keyURI)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("removing a key that is not needed: %w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.failed, keyURI)
	for i, k := range d.keys {
		if k.uri == keyURI {
			d.keys = append(d.keys[:i:i], d.keys[i+1:]...)
			break
		}
	}
	return nil
}

// device is a key in a device. It signs once, on trial, before it is returned. pub
// is what its public half must be; nil takes what the device has.
func (d *devices) device(p place, keyURI string, pub crypto.PublicKey) (crypto.Signer, error) {
	if err := d.reach(p); err != nil {
		return nil, fmt.Errorf("opening the key device of %s: %w; put it back, or correct the URI or its PIN", keyURI, err)
	}
	k := &deviceKey{d: d, place: p, uri: keyURI, pub: pub}
	if err := d.with(p, func(m apiv1.KeyManager, generation int) error {
		s, err := m.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: keyURI})
		if err != nil {
			return err
		}
		have, ok := s.Public().(interface{ Equal(crypto.PublicKey) bool })
		if !ok || pub != nil && !have.Equal(pub) {
			return errors.New("the device holds another key under this URI than that of the certificate: put the right one back")
		}
		k.pub, k.signer, k.generation = s.Public(), s, generation
		return nil
	}); err != nil {
		return nil, fmt.Errorf("opening key %s: %w; the authority never makes a new key for a certificate that exists", keyURI, err)
	}
	if err := k.probe(); err != nil {
		return nil, fmt.Errorf("trying key %s: %w", keyURI, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.keys = append(d.keys, k)
	return k, nil
}

// deviceKey is a key in a device. It signs again after its device was away.
type deviceKey struct {
	d     *devices
	place place
	uri   string
	pub   crypto.PublicKey

	mu         sync.Mutex
	signer     crypto.Signer // guarded by mu
	generation int           // that signer is of; guarded by mu
}

// Public implements crypto.Signer.
func (k *deviceKey) Public() crypto.PublicKey { return k.pub }

// Sign implements crypto.Signer. Errors wrap ErrDevice.
func (k *deviceKey) Sign(r io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if err := k.d.pausing(k.uri); err != nil {
		return nil, err
	}
	signature, generation, err := k.try(r, digest, opts)
	if err != nil && !errors.Is(err, ErrDevice) {
		// Sessions and handles do not survive that a token was out; once more, with
		// new ones.
		k.d.closeFailed(generation)
		if err = k.d.reach(k.place); err == nil {
			signature, _, err = k.try(r, digest, opts)
		}
	}
	if err != nil && !errors.Is(err, ErrDevice) {
		err = fmt.Errorf("%w: %w", ErrDevice, err)
	}
	k.d.note(k.uri, err)
	return signature, err
}

// try signs with the device as it is. generation is the one that was tried.
func (k *deviceKey) try(r io.Reader, digest []byte, opts crypto.SignerOpts) (signature []byte, generation int, err error) {
	type result struct {
		signature  []byte
		generation int
	}
	var out result
	got := make(chan result, 1)
	err = k.d.with(k.place, func(m apiv1.KeyManager, generation int) error {
		s, err := k.at(m, generation)
		var signature []byte
		if err == nil {
			signature, err = s.Sign(r, digest, opts)
		}
		got <- result{signature, generation}
		return err
	})
	select {
	case out = <-got:
	default: // it was closed, or is late
	}
	return out.signature, out.generation, err
}

// at is the signer of an open device.
func (k *deviceKey) at(m apiv1.KeyManager, generation int) (crypto.Signer, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.signer != nil && k.generation == generation {
		return k.signer, nil
	}
	s, err := m.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: k.uri})
	if err != nil {
		return nil, err
	}
	if have, ok := s.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !have.Equal(k.pub) {
		return nil, errors.New("the device holds another key under this URI")
	}
	k.signer, k.generation = s, generation
	return s, nil
}

// probe signs a digest that is not of a certificate.
func (k *deviceKey) probe() error {
	digest := sha256.Sum256([]byte("signet: is the key device there?"))
	_, err := k.Sign(rand.Reader, digest[:], crypto.SHA256)
	return err
}

// pausing is what a key failed at just now, nil if it can be tried.
func (d *devices) pausing(keyURI string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if f := d.failed[keyURI]; f.err != nil && time.Since(f.at) < pause {
		return f.err
	}
	return nil
}

func (d *devices) note(keyURI string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	before := d.failed[keyURI].err
	if err == nil {
		delete(d.failed, keyURI)
	} else {
		d.failed[keyURI] = failure{err, time.Now()}
	}
	switch {
	case before == nil && err != nil:
		d.cfg.Logger.Error("the key device does not sign; it is tried again until it does", "key", keyURI, "err", err)
	case before != nil && err == nil:
		d.cfg.Logger.Info("the key device signs again", "key", keyURI)
	}
}
