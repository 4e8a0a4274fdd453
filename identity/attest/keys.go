package attest

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/signet-mesh/signet/identity"
)

const (
	// maxKeyFile is the most bytes of a JWKS file that are read; maxKeys keys of
	// 4096 bits fit in.
	maxKeyFile = 256 << 10

	// DefaultKeysInterval is how soon a changed file of keys is noticed.
	DefaultKeysInterval = time.Second
	// unknownKeyInterval is how soon the file is read again for the sake of an
	// unknown key ID: soon enough for a token that is quicker than the file,
	// seldom enough for somebody who invents key IDs.
	unknownKeyInterval = 100 * time.Millisecond
)

// KeysConfig says where the keys of the issuer are.
type KeysConfig struct {
	// File holds a JSON Web Key Set (RFC 7517 §5), at most 256 KiB. Required.
	File string
	// Issuer is whose keys they are; only [Keys.Published] says it.
	Issuer string
	// Interval is how often the file is read at most, unless an unknown key ID
	// is asked for. Zero means DefaultKeysInterval.
	Interval time.Duration
	// Log is told when the file cannot be used, and when it can again.
	Log *slog.Logger
}

// Keys are the public keys of an issuer in a file. The file is read again while
// the keys are in use: at most once an interval, and at most ten times a second if
// an unknown key ID is asked for. A file that cannot be read or holds anything
// that must not be in it changes nothing: the keys that were read last stay, and
// [Keys.Err] says what is wrong. A key that a readable file no longer lists is gone
// within an interval, and with it what was remembered of its tokens.
//
// Reading on use instead of watching needs no goroutine and cannot miss a change,
// whatever way the file is replaced. Keys is safe for concurrent use.
type Keys struct {
	cfg   KeysConfig
	log   *slog.Logger
	start time.Time // of the monotonic clock that the next two are read on

	set  atomic.Pointer[keySet] // never nil, never empty
	read atomic.Int64           // when the file was read last, nanoseconds after start
	mu   sync.Mutex             // held while the file is read; guards data
	data []byte                 // what set was parsed from
	err  atomic.Pointer[error]  // what is wrong with the file now; nil: nothing

	published identity.Watched[identity.TokenKeys]
}

// OpenKeys reads the keys. The file must be usable now.
func OpenKeys(cfg KeysConfig) (*Keys, error) {
	if cfg.File == "" {
		return nil, errors.New("opening the keys of the issuer: no file is configured")
	}
	if cfg.Interval < 0 {
		return nil, fmt.Errorf("opening the keys of the issuer: interval is %s; it must be positive", cfg.Interval)
	}
	if cfg.Interval == 0 {
		cfg.Interval = DefaultKeysInterval
	}
	k := &Keys{cfg: cfg, log: cfg.Log, start: time.Now()}
	if k.log == nil {
		k.log = slog.New(slog.DiscardHandler)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.reload(); err != nil {
		return nil, err
	}
	return k, nil
}

// Key implements [KeySource]. The error is always nil: what was read last stays.
func (k *Keys) Key(_ context.Context, kid string) (key Key, ok bool, err error) {
	if k.age() >= k.cfg.Interval && k.mu.TryLock() {
		k.refresh()
		k.mu.Unlock()
	}
	if key, ok = k.set.Load().byID[kid]; ok {
		return key, true, nil
	}
	if k.age() < unknownKeyInterval {
		return Key{}, false, nil
	}
	// Unlike above, wait for whoever is reading: its result is the answer.
	k.mu.Lock()
	if k.age() >= unknownKeyInterval {
		k.refresh()
	}
	k.mu.Unlock()
	key, ok = k.set.Load().byID[kid]
	return key, ok, nil
}

// Published is the keys that were read last, to be handed to agents, and a channel
// that is closed when others were read.
func (k *Keys) Published() (keys identity.TokenKeys, changed <-chan struct{}) {
	return k.published.Load()
}

// Err is what is wrong with the file, for readiness and health: nil if the keys
// are what it says.
func (k *Keys) Err() error {
	if err := k.err.Load(); err != nil {
		return *err
	}
	return nil
}

func (k *Keys) age() time.Duration { return time.Since(k.start) - time.Duration(k.read.Load()) }

// refresh reads the file again and logs what changed. mu is held.
func (k *Keys) refresh() {
	before := k.Err()
	err := k.reload()
	switch {
	case err == nil && before != nil:
		k.log.Info("issuer keys can be read again", "file", k.cfg.File)
		k.err.Store(nil)
	case err != nil:
		if before == nil || before.Error() != err.Error() {
			k.log.Error("issuer keys cannot be read, the last good ones stay", "file", k.cfg.File, "err", err)
		}
		k.err.Store(&err)
	}
}

// reload replaces the keys by those in the file. mu is held.
func (k *Keys) reload() error {
	k.read.Store(int64(time.Since(k.start)))
	data, err := readKeyFile(k.cfg.File)
	if err != nil {
		return fmt.Errorf("reading the keys of the issuer: %w", err)
	}
	if k.data != nil && bytes.Equal(data, k.data) {
		return nil
	}
	set, err := parseKeySet(data)
	if err != nil {
		return fmt.Errorf("reading the keys of the issuer from %s: %w", k.cfg.File, err)
	}
	for _, s := range set.skipped {
		k.log.Warn("issuer key is not used", "file", k.cfg.File, "kid", s.kid, "err", s.why)
	}
	k.log.Info("issuer keys read", "file", k.cfg.File, "keys", len(set.byID))
	k.set.Store(set)
	k.data = data
	public := make(map[string]crypto.PublicKey, len(set.byID))
	for id, key := range set.byID {
		public[id] = key.Public
	}
	k.published.Store(identity.TokenKeys{Issuer: k.cfg.Issuer, Keys: public})
	return nil
}

// readKeyFile reads a regular file that not everybody can write: whoever can write
// it can be every pod.
func readKeyFile(name string) ([]byte, error) {
	// Before it is opened, because opening a named pipe would wait.
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", name)
	}
	if info.Mode().Perm()&0o002 != 0 {
		return nil, fmt.Errorf("%s can be written by everybody (mode %04o); whoever writes it can be any pod: chmod o-w", name, info.Mode().Perm())
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close() // only read: nothing can be lost
	data, err := io.ReadAll(io.LimitReader(f, maxKeyFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxKeyFile {
		return nil, fmt.Errorf("%s has more than %d bytes", name, maxKeyFile)
	}
	return data, nil
}
