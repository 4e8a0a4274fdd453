package storage

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"iter"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// BoltOptions says how to open a Bolt. The zero value is useful.
type BoltOptions struct {
	// LockTimeout is how long to wait for another process that is about to leave.
	// Default 2 s.
	LockTimeout time.Duration
	// MustExist makes a missing file an error that wraps fs.ErrNotExist, where
	// the default is to create an empty store.
	MustExist bool
	// MaxSize is the largest size of the file in bytes; a commit that would exceed
	// it fails and changes nothing. Default 256 MiB.
	MaxSize int64
	// History is how many changes are kept in memory for Watch. Default 16384.
	History int
	// Hook, for tests of those who use a store, is called twice in each commit
	// that changes something: with landed false before it is written, where an
	// error makes the commit fail and change nothing, and with landed true when it
	// is durable, where an error has the effect of a failed fsync: the change is
	// there, the caller gets ErrNotDurable and so does everybody after. It must
	// not call the store.
	Hook func(landed bool) error
	// Metrics registers signet_storage_*; nil registers none.
	Metrics prometheus.Registerer
}

// Bolt is the Store in one bbolt file, for one process at a time. It is made by
// OpenBolt.
type Bolt struct {
	path    string
	db      *bbolt.DB
	file    *os.File // the one of db, which closes it; for Check
	hook    func(landed bool) error
	history *history
	metrics *boltMetrics

	// writer has room for one: who put something in may commit. bbolt has a lock
	// of its own, which cannot be waited for with a context.
	writer chan struct{}

	mu      sync.Mutex
	closing chan struct{}         // closed by Close; guarded by mu
	failed  error                 // first commit with unknown outcome; guarded by mu
	stuck   bool                  // bbolt panicked and may hold its locks; guarded by mu
	leases  map[string]*boltLease // held ones; guarded by mu
}

var _ Store = (*Bolt)(nil)

var (
	metaBucket  = []byte("meta")
	stateBucket = []byte("state")
	formatKey   = []byte("format")
	revisionKey = []byte("revision")
)

// valueHeader is revision (8 bytes) and a CRC (4) over the key, a zero byte, the
// revision and the value. bbolt has no checksum over data pages.
const valueHeader = 12

func entryCRC(key []byte, revision, value []byte) uint32 {
	crc := crc32.Update(0, castagnoli, key)
	crc = crc32.Update(crc, castagnoli, []byte{0})
	crc = crc32.Update(crc, castagnoli, revision)
	return crc32.Update(crc, castagnoli, value)
}

func encodeValue(key []byte, revision uint64, value []byte) []byte {
	b := make([]byte, 0, valueHeader+len(value))
	b = binary.BigEndian.AppendUint64(b, revision)
	b = binary.BigEndian.AppendUint32(b, entryCRC(key, b, value))
	return append(b, value...)
}

// parseEntry copies what it returns; bbolt's slices die with the transaction.
func parseEntry(key, stored []byte) (Entry, error) {
	if len(stored) < valueHeader ||
		entryCRC(key, stored[:8], stored[valueHeader:]) != binary.BigEndian.Uint32(stored[8:]) {
		return Entry{}, fmt.Errorf("entry %q: wrong checksum: %w", key, ErrCorrupt)
	}
	return Entry{
		Key:      string(key),
		Value:    append([]byte{}, stored[valueHeader:]...),
		Revision: binary.BigEndian.Uint64(stored),
	}, nil
}

func storeRevision(tx *bbolt.Tx) (uint64, error) {
	v := tx.Bucket(metaBucket).Get(revisionKey)
	if len(v) != 8 {
		return 0, fmt.Errorf("revision has %d bytes: %w", len(v), ErrCorrupt)
	}
	return binary.BigEndian.Uint64(v), nil
}

// usable is why the store answers nothing, nil if it does.
func (b *Bolt) usable() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.usableLocked()
}

func (b *Bolt) usableLocked() error {
	select {
	case <-b.closing:
		return ErrClosed
	default:
	}
	if b.failed != nil {
		return fmt.Errorf("%w (first failure: %w)", ErrNotDurable, b.failed)
	}
	return nil
}

// view runs a read-only transaction.
func (b *Bolt) view(ctx context.Context, f func(tx *bbolt.Tx) error) (err error) {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := b.usable(); err != nil {
		return err
	}
	defer func() {
		if errors.Is(err, bolterrors.ErrDatabaseNotOpen) {
			err = ErrClosed
		}
	}()
	defer recoverDamage(&err)
	return b.db.View(f)
}

// recoverDamage turns a panic of bbolt, which is how it reports pages that make
// no sense, into an error.
func recoverDamage(err *error) {
	if r := recover(); r != nil {
		*err = fmt.Errorf("%v: %w", r, ErrCorrupt)
	}
}

// Get returns the entry of a key. See Store.
func (b *Bolt) Get(ctx context.Context, key string) (e Entry, err error) {
	if err := CheckKey(key); err != nil {
		return Entry{}, fmt.Errorf("reading store %s: %w", b.path, err)
	}
	err = b.view(ctx, func(tx *bbolt.Tx) error {
		v := tx.Bucket(stateBucket).Get([]byte(key))
		if v == nil {
			return ErrNotFound
		}
		var err error
		e, err = parseEntry([]byte(key), v)
		return err
	})
	if err != nil {
		return Entry{}, fmt.Errorf("reading %q from store %s: %w", key, b.path, err)
	}
	return e, nil
}

// List returns the entries whose keys start with one of the prefixes. See Store.
func (b *Bolt) List(ctx context.Context, prefixes ...string) (entries []Entry, revision uint64, err error) {
	disjoint, err := Prefixes(prefixes)
	if err != nil {
		return nil, 0, fmt.Errorf("listing store %s: %w", b.path, err)
	}
	err = b.view(ctx, func(tx *bbolt.Tx) error {
		var err error
		if revision, err = storeRevision(tx); err != nil {
			return err
		}
		c := tx.Bucket(stateBucket).Cursor()
		for _, prefix := range disjoint {
			for k, v := c.Seek([]byte(prefix)); k != nil && strings.HasPrefix(string(k), prefix); k, v = c.Next() {
				e, err := parseEntry(k, v)
				if err != nil {
					return err
				}
				entries = append(entries, e)
			}
		}
		return nil
	})
	if err != nil {
		return nil, 0, fmt.Errorf("listing %q in store %s: %w", prefixes, b.path, err)
	}
	return entries, revision, nil
}

// Commit applies ops if all conds hold. See Store. A commit that fails because the
// disk is full or the file would exceed MaxSize changes nothing and leaves the
// store usable.
func (b *Bolt) Commit(ctx context.Context, conds []Cond, ops []Op) (revision uint64, err error) {
	if err := CheckCommit(conds, ops); err != nil {
		return 0, fmt.Errorf("committing to store %s: %w", b.path, err)
	}
	err = b.exclusively(ctx, func() error {
		start := time.Now()
		var err error
		revision, err = b.commit(conds, ops)
		switch {
		case errors.Is(err, ErrConflict):
			b.metrics.conflicts.Inc()
		case err == nil:
			b.metrics.commit.Observe(time.Since(start).Seconds())
		}
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("committing to store %s: %w", b.path, err)
	}
	return revision, nil
}

// exclusively runs f while nobody commits, or returns why the store is not usable.
func (b *Bolt) exclusively(ctx context.Context, f func() error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	select {
	case b.writer <- struct{}{}:
		defer func() { <-b.writer }()
	case <-ctx.Done():
		return fmt.Errorf("waiting for another commit: %w", context.Cause(ctx))
	}
	if err := b.usable(); err != nil {
		return err
	}
	return f()
}

// commit runs one transaction. The caller is the only one.
func (b *Bolt) commit(conds []Cond, ops []Op) (revision uint64, err error) {
	defer func() {
		if r := recover(); r != nil {
			b.mu.Lock()
			b.stuck = true
			b.mu.Unlock()
			revision, err = 0, b.fail(fmt.Errorf("%v: %w", r, ErrCorrupt))
		}
	}()
	tx, err := b.db.Begin(true)
	if err != nil {
		return 0, err
	}
	defer tx.Rollback() // after Commit it does nothing
	if revision, err = storeRevision(tx); err != nil {
		return 0, err
	}
	if err := checkConds(tx, conds); err != nil {
		return 0, err
	}
	events, err := applyOps(tx, revision+1, ops)
	if err != nil || len(events) == 0 {
		return revision, err
	}
	if b.hook != nil {
		if err := b.hook(false); err != nil {
			return 0, err
		}
	}
	committed := tx.ID() - 1
	if err := tx.Commit(); err != nil {
		return 0, b.commitFailed(err, committed)
	}
	if b.hook != nil {
		if err := b.hook(true); err != nil {
			return 0, b.fail(err)
		}
	}
	b.history.add(events)
	return revision + 1, nil
}

func checkConds(tx *bbolt.Tx, conds []Cond) error {
	state := tx.Bucket(stateBucket)
	for _, c := range conds {
		found := uint64(0)
		if v := state.Get([]byte(c.Key)); v != nil {
			e, err := parseEntry([]byte(c.Key), v)
			if err != nil {
				return err
			}
			found = e.Revision
		}
		if found != c.Revision {
			return fmt.Errorf("%q has revision %d, not %d: %w", c.Key, found, c.Revision, ErrConflict)
		}
	}
	return nil
}

// applyOps returns the changes, none if every op deletes a missing key.
func applyOps(tx *bbolt.Tx, revision uint64, ops []Op) ([]Event, error) {
	state := tx.Bucket(stateBucket)
	var events []Event
	for _, op := range ops {
		key := []byte(op.Key)
		e := Event{Entry: Entry{Key: op.Key, Revision: revision}, Deleted: op.Delete}
		if op.Delete {
			if state.Get(key) == nil {
				continue
			}
			if err := state.Delete(key); err != nil {
				return nil, err
			}
		} else {
			e.Value = append([]byte{}, op.Value...)
			if err := state.Put(key, encodeValue(key, revision, op.Value)); err != nil {
				return nil, err
			}
		}
		events = append(events, e)
	}
	if len(events) == 0 {
		return nil, nil
	}
	return events, tx.Bucket(metaBucket).Put(revisionKey, binary.BigEndian.AppendUint64(nil, revision))
}

// commitFailed decides what a failed commit means. Where a page could not be
// written or the file not be grown (disk full, MaxSize), and the file still shows
// the transaction before, nothing happened. Everything else, a failed fsync
// above all, leaves the outcome open. committed is the transaction before.
func (b *Bolt) commitFailed(err error, committed int) error {
	var path *os.PathError
	refused := errors.Is(err, bolterrors.ErrMaxSizeReached) ||
		errors.As(err, &path) && path.Op == "write" ||
		strings.HasPrefix(err.Error(), "file resize error") // bbolt wraps no cause here
	if !refused {
		return b.fail(err)
	}
	tx, viewErr := b.db.Begin(false)
	if viewErr != nil {
		return b.fail(errors.Join(err, viewErr))
	}
	defer tx.Rollback()
	if tx.ID() != committed {
		return b.fail(err)
	}
	return fmt.Errorf("nothing was changed: %w", err)
}

// fail makes the store refuse everything until it is opened again.
func (b *Bolt) fail(err error) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.failed == nil {
		b.failed = err
		b.metrics.failed.Set(1)
		b.history.end(ErrNotDurable)
		b.dropLeases()
	}
	return fmt.Errorf("%w: %w", ErrNotDurable, err)
}

// Watch yields the changes after a revision. See Store. Changes from before the
// file was opened are not known.
func (b *Bolt) Watch(ctx context.Context, prefix string, after uint64) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		err := CheckPrefix(prefix)
		if err == nil {
			err = b.history.watch(ctx, prefix, after, yield)
		}
		if err != nil {
			yield(Event{}, fmt.Errorf("watching %q in store %s: %w", prefix, b.path, err))
		}
	}
}

// Close waits for the transactions that are going on, ends watches and leases, and
// releases the file. Only the first call does something.
func (b *Bolt) Close() error {
	b.mu.Lock()
	select {
	case <-b.closing:
		b.mu.Unlock()
		return nil
	default:
	}
	close(b.closing)
	b.history.end(ErrClosed)
	b.dropLeases()
	stuck := b.stuck
	b.mu.Unlock()
	b.metrics.unregister()
	if stuck {
		return fmt.Errorf("closing store %s: left to the end of the process: %w", b.path, ErrCorrupt)
	}
	if err := b.db.Close(); err != nil {
		return fmt.Errorf("closing store %s: %w", b.path, err)
	}
	return nil
}
