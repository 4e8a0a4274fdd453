package etcd

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// session is a lease of etcd that is kept alive until end, or until it is known to have
// expired: when etcd says so, or when its time has passed without an answer.
type session struct {
	*concurrency.Session
	s *Store
}

// newSession takes a lease of etcd. It lives on when ctx ends.
func (s *Store) newSession(ctx context.Context, ttl time.Duration) (*session, error) {
	var id clientv3.LeaseID
	err := s.try(ctx, func(ctx context.Context) error {
		// One whose answer was lost expires by itself.
		resp, err := s.client.Grant(ctx, int64((ttl+time.Second-1)/time.Second))
		if err == nil {
			id = resp.ID
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	se, err := concurrency.NewSession(s.client, concurrency.WithLease(id), concurrency.WithContext(s.life))
	if err != nil {
		return nil, err
	}
	return &session{Session: se, s: s}, nil
}

// over reports whether the lease is known to have ended.
func (se *session) over() bool {
	select {
	case <-se.Done():
		return true
	default:
		return false
	}
}

// end gives the lease up, with all keys that live with it. Where etcd does not answer it
// expires.
func (se *session) end(ctx context.Context) error {
	se.Orphan()
	ctx, cancel := context.WithTimeout(ctx, se.s.timeout)
	defer cancel()
	_, err := se.s.client.Revoke(ctx, se.Lease())
	if err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return fmt.Errorf("giving up a lease, which will expire: %w", err)
	}
	return nil
}
