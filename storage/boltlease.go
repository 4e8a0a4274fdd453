package storage

import (
	"context"
	"fmt"
	"time"
)

// boltLease is a lease in the one process that has the file. It needs no time to
// live: who dies takes the lock on the file along.
type boltLease struct {
	b    *Bolt
	name string
	done chan struct{} // closed under Bolt.mu, when the lease leaves Bolt.leases
}

// Lease waits for the lease of that name. See Store. Within a process it excludes
// others by name; other processes cannot have the file open at all.
func (b *Bolt) Lease(ctx context.Context, name string, ttl time.Duration) (Lease, error) {
	if err := CheckLease(name, ttl); err != nil {
		return nil, fmt.Errorf("taking a lease in store %s: %w", b.path, err)
	}
	for ctx.Err() == nil {
		l, held, err := b.tryLease(name)
		if err != nil {
			return nil, fmt.Errorf("taking lease %q in store %s: %w", name, b.path, err)
		}
		if l != nil {
			return l, nil
		}
		select {
		case <-ctx.Done():
		case <-held:
		}
	}
	return nil, fmt.Errorf("waiting for lease %q in store %s: %w", name, b.path, context.Cause(ctx))
}

// tryLease returns the lease, or else the end of the one that is held.
func (b *Bolt) tryLease(name string) (l *boltLease, held <-chan struct{}, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.usableLocked(); err != nil {
		return nil, nil, err
	}
	if other := b.leases[name]; other != nil {
		return nil, other.done, nil
	}
	l = &boltLease{b: b, name: name, done: make(chan struct{})}
	b.leases[name] = l
	return l, nil, nil
}

func (l *boltLease) Done() <-chan struct{} { return l.done }

func (l *boltLease) Release(context.Context) error {
	l.drop()
	return nil
}

func (l *boltLease) drop() {
	l.b.mu.Lock()
	defer l.b.mu.Unlock()
	if l.b.leases[l.name] == l {
		delete(l.b.leases, l.name)
		close(l.done)
	}
}

// dropLeases ends all leases. mu is held.
func (b *Bolt) dropLeases() {
	for name, l := range b.leases {
		delete(b.leases, name)
		close(l.done)
	}
}
