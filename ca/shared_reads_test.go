package ca_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/storage"
)

// readCounts counts what is read of a state.
type readCounts struct {
	storage.Store
	mu    sync.Mutex
	lists int            // guarded by mu
	read  map[string]int // entries by the folder of their keys; guarded by mu
}

func (s *readCounts) List(ctx context.Context, prefixes ...string) ([]storage.Entry, uint64, error) {
	entries, revision, err := s.Store.List(ctx, prefixes...)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lists++
	for _, e := range entries {
		folder, _, _ := strings.Cut(e.Key, "/")
		s.read[folder]++
	}
	return entries, revision, err
}

// during is what is read by f.
func (s *readCounts) during(t *testing.T, f func() error) (lists int, read map[string]int) {
	t.Helper()
	s.mu.Lock()
	s.lists, s.read = 0, map[string]int{}
	s.mu.Unlock()
	if err := f(); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lists, s.read
}

// TestWhatAChangeMakesReplicasRead: of each change of the journal the journal and the
// lists, once, and not what thousands of agents have; after a lost watch everything, once.
func TestWhatAChangeMakesReplicasRead(t *testing.T) {
	t.Parallel()
	const agents = 250
	shared := newShared(t)
	var ops []storage.Op
	for i := range agents {
		ops = append(ops, storage.Op{Key: fmt.Sprintf("agents/%034x", i), Value: must(json.Marshal(map[string]any{"version": 1, "node": fmt.Sprint("node-", i), "notAfter": time.Now().Add(time.Hour)}))})
	}
	for len(ops) > 0 {
		n := min(len(ops), storage.MaxOps)
		must(shared.Store.Commit(t.Context(), nil, ops[:n]))
		ops = ops[n:]
	}
	store := &readCounts{Store: shared.Store, read: map[string]int{}}
	counted := shared
	counted.Store = store
	a := newWorld(t, brisk, withCRL, func(c *ca.Config) { c.Shared, c.RootReplica, c.Instance = shared, 1, 1 })
	stop := a.run()
	b := newWorld(t, brisk, withCRL, func(c *ca.Config) { c.Shared, c.RootReplica = counted, 1 })
	stop()
	revision := func() uint64 {
		_, r, err := shared.Store.List(t.Context(), "journal")
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	lists, read := store.during(t, func() error { return b.CatchUp(t.Context()) })
	if want := map[string]int{"journal": 1, "replicas": 2, "crl": 2, "agents": agents}; lists != 1 || !maps.Equal(read, want) {
		t.Errorf("to catch up it reads %d times: %v, want once %v", lists, read, want)
	}
	if b.Records() != agents {
		t.Errorf("it knows %d agents", b.Records())
	}
	lists, read = store.during(t, func() error { return b.FollowChange(t.Context(), revision()) })
	if lists != 0 {
		t.Errorf("of a change that it has seen it reads %v", read)
	}
	for range 3 {
		if err := a.Relist(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	last := revision()
	lists, read = store.during(t, func() error {
		for r := last - 2; r <= last; r++ { // three changes that came together
			if err := b.FollowChange(t.Context(), r); err != nil {
				return err
			}
		}
		return nil
	})
	if want := map[string]int{"journal": 1, "replicas": 2, "crl": 2}; lists != 1 || !maps.Equal(read, want) {
		t.Errorf("of three changes of the journal it reads %d times: %v, want once %v", lists, read, want)
	}
	if trustOf(b).Sequence() != trustOf(a).Sequence() {
		t.Errorf("trust is of sequence %d, want %d", trustOf(b).Sequence(), trustOf(a).Sequence())
	}
}
