package storage

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"
)

// Limits of every Store. They are what etcd accepts with its default settings, less
// what that engine adds itself, so that what one engine takes the other takes too.
const (
	// MaxKey is the longest key in bytes.
	MaxKey = 512
	// MaxValue is the longest value in bytes.
	MaxValue = 512 << 10
	// MaxOps is the largest number of conditions, and of operations, in a commit.
	MaxOps = 120
	// MaxCommit is the largest sum of the keys and values of a commit, in bytes.
	MaxCommit = 1 << 20
)

// Entry is a key and its value at some revision.
type Entry struct {
	// Key is 1 to MaxKey bytes of visible ASCII.
	Key string
	// Value belongs to the receiver. It may be empty.
	Value []byte
	// Revision is that of the commit that last wrote the key.
	Revision uint64
}

// Cond is a condition of a commit: the key has exactly this revision.
type Cond struct {
	Key string
	// Revision 0 means that the key must not exist.
	Revision uint64
}

// Op is one change of a commit: set a key, or delete it.
type Op struct {
	Key string
	// Value is copied; it must be empty where Delete is set.
	Value []byte
	// Delete removes the key. That it does not exist is no error.
	Delete bool
}

// Event is one change that a Watch reports.
type Event struct {
	// Entry is what the key became; where Deleted is set it has no value, and
	// its revision is that of the deletion.
	Entry
	Deleted bool
}

// Store is durable state, changed by compare-and-swap. All methods are safe for
// concurrent use and return what was committed and durable at some moment during
// the call. They take no decision on a failed write: see ErrNotDurable.
type Store interface {
	// Get returns the entry of a key, or ErrNotFound.
	Get(ctx context.Context, key string) (Entry, error)

	// List returns every entry whose key starts with one of the prefixes, of which there
	// is at least one, each once and in the order of the keys' bytes, all of one moment,
	// and that moment's revision: a Watch after it sees every later change. An empty
	// prefix means all.
	List(ctx context.Context, prefixes ...string) (entries []Entry, revision uint64, err error)

	// Commit applies all ops, if all conds hold, else nothing and ErrConflict.
	// It returns the store's revision, which a commit that changes something
	// raises; without ops, or where every op deletes a missing key, it only checks
	// the conditions. What it returned without error is durable. No key may occur
	// twice among the ops. After any other error than ErrConflict and the ones
	// that say what is wrong with the arguments, the change may or may not have
	// happened. Where it wraps ErrUnknown, or once the store was opened again, reading
	// tells, and a change that is not there then does not come later.
	Commit(ctx context.Context, conds []Cond, ops []Op) (revision uint64, err error)

	// Watch yields every change after a revision to keys that start with prefix,
	// in the order of the commits and, within one, of its ops. It ends without an
	// error when ctx does. It yields an error, once and last, when it cannot be
	// complete: ErrCompacted if changes after that revision are no longer known,
	// be it at the start or because the receiver was too slow, ErrClosed or
	// ErrNotDurable if there will be no more. The events of one commit have the
	// same revision, so only a receiver that saw the last of them may resume there.
	Watch(ctx context.Context, prefix string, after uint64) iter.Seq2[Event, error]

	// Lease waits until no one else holds the lease of that name, and takes it.
	// Leases are for jobs that one replica at a time may do; what the job writes
	// is protected by conditions all the same, since a process may be stopped for
	// longer than ttl without knowing. The name follows the rules of keys but is
	// not one. The engine keeps the lease alive; ttl, at least one second, is how
	// long others wait after the holder died.
	Lease(ctx context.Context, name string, ttl time.Duration) (Lease, error)
}

// Lease is held from when Store.Lease returned until Done is closed.
type Lease interface {
	// Done is closed when the lease was released or lost, and when the store was
	// closed. The job must stop then.
	Done() <-chan struct{}
	// Release gives the lease up; the next waiter gets it. It returns nil if the
	// lease is gone already.
	Release(ctx context.Context) error
}

// CheckKey says what is wrong with a key, for engines.
func CheckKey(key string) error {
	if key == "" {
		return errors.New("key is empty")
	}
	return CheckPrefix(key)
}

// Prefixes are those of a List without what another one has already, in the order of
// the keys below them, for engines.
func Prefixes(prefixes []string) ([]string, error) {
	if len(prefixes) == 0 || len(prefixes) > MaxOps {
		return nil, fmt.Errorf("%d prefixes; 1 to %d are allowed", len(prefixes), MaxOps)
	}
	var out []string
	for _, p := range slices.Sorted(slices.Values(prefixes)) {
		if err := CheckPrefix(p); err != nil {
			return nil, err
		}
		if len(out) == 0 || !strings.HasPrefix(p, out[len(out)-1]) {
			out = append(out, p)
		}
	}
	return out, nil
}

// CheckPrefix says what is wrong with the prefix of a List or a Watch, for engines.
func CheckPrefix(prefix string) error {
	if len(prefix) > MaxKey {
		return fmt.Errorf("key %.20q… has %d bytes; at most %d are allowed", prefix, len(prefix), MaxKey)
	}
	for i := range len(prefix) {
		if c := prefix[i]; c <= ' ' || c > '~' {
			return fmt.Errorf("key %.64q has a byte 0x%02x; only visible ASCII is allowed", prefix, c)
		}
	}
	return nil
}

// CheckCommit says what is wrong with the arguments of a Commit, for engines.
func CheckCommit(conds []Cond, ops []Op) error {
	if len(conds) > MaxOps {
		return fmt.Errorf("%d conditions; at most %d are allowed", len(conds), MaxOps)
	}
	if len(ops) > MaxOps {
		return fmt.Errorf("%d operations; at most %d are allowed", len(ops), MaxOps)
	}
	for _, c := range conds {
		if err := CheckKey(c.Key); err != nil {
			return err
		}
	}
	size := 0
	seen := make(map[string]struct{}, len(ops))
	for _, op := range ops {
		if err := CheckKey(op.Key); err != nil {
			return err
		}
		if _, twice := seen[op.Key]; twice {
			return fmt.Errorf("key %q occurs twice", op.Key)
		}
		seen[op.Key] = struct{}{}
		if op.Delete && len(op.Value) > 0 {
			return fmt.Errorf("deletion of key %q has a value", op.Key)
		}
		if len(op.Value) > MaxValue {
			return fmt.Errorf("value of key %q has %d bytes; at most %d are allowed", op.Key, len(op.Value), MaxValue)
		}
		size += len(op.Key) + len(op.Value)
	}
	if size > MaxCommit {
		return fmt.Errorf("keys and values have %d bytes; at most %d are allowed in one commit", size, MaxCommit)
	}
	return nil
}

// Parts are the ops in their order, cut so that one Commit takes each: not more than MaxOps,
// and not more than MaxCommit bytes. A single op that is too long is a part of its own,
// which Commit refuses.
func Parts(ops []Op) iter.Seq[[]Op] {
	return func(yield func([]Op) bool) {
		from, size := 0, 0
		for i, op := range ops {
			n := len(op.Key) + len(op.Value)
			if i > from && (i-from == MaxOps || size+n > MaxCommit) {
				if !yield(ops[from:i:i]) {
					return
				}
				from, size = i, 0
			}
			size += n
		}
		if from < len(ops) {
			yield(ops[from:])
		}
	}
}

// CheckLease says what is wrong with the arguments of a Lease, for engines.
func CheckLease(name string, ttl time.Duration) error {
	if err := CheckKey(name); err != nil {
		return fmt.Errorf("name of the lease: %w", err)
	}
	if ttl < time.Second {
		return fmt.Errorf("lease %q for %v; at least 1s is needed", name, ttl)
	}
	return nil
}
