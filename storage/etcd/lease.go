package etcd

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/signet-mesh/signet/storage"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// lease is a place in the queue for a name, held with a lease of etcd.
type lease struct{ *session }

// Lease waits for the lease of that name. See storage.Store. Those who wait get it in
// the order in which they came.
func (s *Store) Lease(ctx context.Context, name string, ttl time.Duration) (storage.Lease, error) {
	if err := storage.CheckLease(name, ttl); err != nil {
		return nil, fmt.Errorf("taking a lease in etcd: %w", err)
	}
	for {
		l, err := s.lease(ctx, name, ttl)
		if err == nil {
			return l, nil
		}
		if done := s.ended(ctx); done != nil {
			err = done
		} else if retry := !refused(err) || errors.Is(err, rpctypes.ErrCompacted); retry && s.sleep(ctx, 100*time.Millisecond) == nil {
			// etcd is away, the lease ended while it waited, or the end of the lease before
			// was forgotten.
			continue
		} else if done := s.ended(ctx); done != nil {
			err = done
		}
		return nil, fmt.Errorf("waiting for lease %q in etcd: %w", name, explained(err))
	}
}

func (s *Store) lease(ctx context.Context, name string, ttl time.Duration) (*lease, error) {
	se, err := s.newSession(ctx, ttl)
	if err != nil {
		return nil, err
	}
	l := &lease{se}
	s.mu.Lock()
	s.leases[l] = true
	s.mu.Unlock()
	waiting, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.life, cancel)()
	// The name as one part of a path: the queue is everything below it.
	err = concurrency.NewMutex(se.Session, s.leaseKey(url.PathEscape(name))).Lock(waiting)
	if err == nil && se.over() {
		err = errors.New("the lease ended")
	}
	if err != nil {
		// Others must not wait for one that nobody holds. If etcd is away it expires.
		s.tasks.Go(func() { _ = l.Release(context.WithoutCancel(ctx)) })
		return nil, err
	}
	return l, nil
}

// Release gives the lease up. See storage.Lease.
func (l *lease) Release(ctx context.Context) error {
	gone := l.over()
	l.s.mu.Lock()
	delete(l.s.leases, l)
	l.s.mu.Unlock()
	err := l.end(ctx)
	if gone || l.s.life.Err() != nil {
		return nil
	}
	return err
}
