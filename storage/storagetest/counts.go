package storagetest

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync/atomic"
	"time"

	"github.com/signet-mesh/signet/storage"
)

// counts are what a suite has asked of an engine, for who reads its output.
type counts struct {
	tests, commits, conflicts, unknown, reads, events, gaps, leases atomic.Int64
	appends, records, scanned                                       atomic.Int64
}

func (c *counts) String() string {
	if c.appends.Load() > 0 {
		return fmt.Sprintf("conformance of a Log: %d tests, %d appends of %d records acknowledged, %d without an answer, %d records read back",
			c.tests.Load(), c.appends.Load(), c.records.Load(), c.unknown.Load(), c.scanned.Load())
	}
	return fmt.Sprintf("conformance of a Store: %d tests, %d commits, %d conflicts, %d outcomes unknown, %d reads, %d events watched, %d gaps told, %d leases taken",
		c.tests.Load(), c.commits.Load(), c.conflicts.Load(), c.unknown.Load(), c.reads.Load(), c.events.Load(), c.gaps.Load(), c.leases.Load())
}

// countedStore counts what goes through a store.
type countedStore struct {
	ClosableStore
	c *counts
}

func (s *countedStore) Get(ctx context.Context, key string) (storage.Entry, error) {
	s.c.reads.Add(1)
	return s.ClosableStore.Get(ctx, key)
}

func (s *countedStore) List(ctx context.Context, prefixes ...string) ([]storage.Entry, uint64, error) {
	s.c.reads.Add(1)
	return s.ClosableStore.List(ctx, prefixes...)
}

func (s *countedStore) Commit(ctx context.Context, conds []storage.Cond, ops []storage.Op) (uint64, error) {
	r, err := s.ClosableStore.Commit(ctx, conds, ops)
	switch {
	case err == nil:
		s.c.commits.Add(1)
	case errors.Is(err, storage.ErrConflict):
		s.c.conflicts.Add(1)
	case errors.Is(err, storage.ErrUnknown) || errors.Is(err, storage.ErrNotDurable):
		s.c.unknown.Add(1)
	}
	return r, err
}

func (s *countedStore) Watch(ctx context.Context, prefix string, after uint64) iter.Seq2[storage.Event, error] {
	return func(yield func(storage.Event, error) bool) {
		for e, err := range s.ClosableStore.Watch(ctx, prefix, after) {
			if err == nil {
				s.c.events.Add(1)
			} else if errors.Is(err, storage.ErrCompacted) {
				s.c.gaps.Add(1)
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

func (s *countedStore) Lease(ctx context.Context, name string, ttl time.Duration) (storage.Lease, error) {
	l, err := s.ClosableStore.Lease(ctx, name, ttl)
	if err == nil {
		s.c.leases.Add(1)
	}
	return l, err
}
