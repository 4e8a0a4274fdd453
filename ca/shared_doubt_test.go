package ca_test

import (
	"context"
	"encoding/hex"
	"iter"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/storage"
)

// blindStore tells nothing of changes while it is blind.
type blindStore struct {
	storage.Store
	blind atomic.Bool
}

func (s *blindStore) Watch(ctx context.Context, prefix string, after uint64) iter.Seq2[storage.Event, error] {
	return func(yield func(storage.Event, error) bool) {
		for e, err := range s.Store.Watch(ctx, prefix, after) {
			if err == nil && s.blind.Load() {
				continue
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

// TestARootWaitsForWhomNoWatchHasNamed: a replica that hears of no change still waits for
// an agent that enrolled with another one.
func TestARootWaitsForWhomNoWatchHasNamed(t *testing.T) {
	t.Parallel()
	shared := newShared(t)
	deaf := shared
	store := &blindStore{Store: shared.Store}
	deaf.Store = store
	last := func(c *ca.Config) { c.SVID.AgentTTL = 40 * time.Second } // nobody is missing because an SVID has ended
	a := newWorld(t, brisk, last, func(c *ca.Config) { c.Shared, c.RootReplica, c.Instance = deaf, 1, 1 })
	defer a.run()()
	b := newWorld(t, brisk, last, func(c *ca.Config) { c.Shared, c.RootReplica = shared, 1 })
	defer b.run()()
	clientA, _ := a.attest(agentA)
	onA := watchTrust(t, clientA)
	store.blind.Store(true)
	clientB, _ := b.attest(agentB)
	onB := watchTrust(t, clientB)
	root := a.Root()
	if err := a.Rotate(t.Context(), capb.RotateRequest_STEP_PREPARE, "", false); err != nil {
		t.Fatal(err)
	}
	seq := trustOf(a).Sequence()
	eventually(t, "the agents to be told", func() bool { return onA.sequence() >= seq && onB.sequence() >= seq })
	onA.acknowledge(seq)
	eventually(t, "node-b alone to be waited for", func() bool {
		err := a.Rotate(t.Context(), capb.RotateRequest_STEP_ACTIVATE, "", false)
		if err == nil {
			t.Fatal("the root was activated, and node-b has not got it")
		}
		return strings.Contains(err.Error(), "node-b") && !strings.Contains(err.Error(), "node-a")
	})
	if !a.Root().Equal(root) {
		t.Error("the root is used")
	}
	onB.acknowledge(seq)
	eventually(t, "the root to be used", func() bool {
		_ = a.Rotate(t.Context(), capb.RotateRequest_STEP_ACTIVATE, "", false) // unless it was activated by itself
		return !a.Root().Equal(root)
	})
}

// TestARecordThatCannotBeReadCounts as an agent that has acknowledged nothing, until it
// is gone or an operator forces; and all else goes on.
func TestARecordThatCannotBeReadCounts(t *testing.T) {
	t.Parallel()
	shared := newShared(t)
	a := newWorld(t, brisk, func(c *ca.Config) { c.Shared, c.RootReplica, c.Instance = shared, 1, 1 })
	defer a.run()()
	key := "agents/" + hex.EncodeToString(make([]byte, 17))
	put := func(op storage.Op) {
		t.Helper()
		if _, err := shared.Store.Commit(t.Context(), nil, []storage.Op{op}); err != nil {
			t.Fatal(err)
		}
	}
	put(storage.Op{Key: key, Value: []byte(`{"version":99}`)})
	root := a.Root()
	if err := a.Rotate(t.Context(), capb.RotateRequest_STEP_PREPARE, "", false); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the record to be waited for", func() bool {
		err := a.Rotate(t.Context(), capb.RotateRequest_STEP_ACTIVATE, "", false)
		if err == nil {
			t.Fatal("the root was activated")
		}
		return strings.Contains(err.Error(), "(unreadable record "+key+")")
	})
	client, _ := a.attest(agentA)
	watchTrust(t, client, true)
	if err := a.Ready(); err != nil {
		t.Errorf("not ready: %v", err)
	}
	put(storage.Op{Key: key, Delete: true})
	eventually(t, "the root to be used", func() bool {
		_ = a.Rotate(t.Context(), capb.RotateRequest_STEP_ACTIVATE, "", false) // unless it was activated by itself
		return !a.Root().Equal(root)
	})
}

// TestTheSharedStateDoesNotGoBack: where etcd was restored from an older copy, a replica
// that runs goes on with what it had, and says so.
func TestTheSharedStateDoesNotGoBack(t *testing.T) {
	t.Parallel()
	_, upstream := upstreamFolder(t)
	shared := newShared(t)
	a := newWorld(t, func(c *ca.Config) { c.Upstream, c.Shared = upstream, shared })
	defer a.run()()
	old, err := shared.Store.Get(t.Context(), "journal")
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Relist(t.Context()); err != nil {
		t.Fatal(err)
	}
	before := trustOf(a)
	if _, err := shared.Store.Commit(t.Context(), nil, []storage.Op{{Key: "journal", Value: old.Value}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it to say so", func() bool {
		err := a.Ready()
		return err != nil && strings.Contains(err.Error(), "the shared state went back")
	})
	if trustOf(a).Sequence() != before.Sequence() {
		t.Errorf("trust is of sequence %d, it was %d", trustOf(a).Sequence(), before.Sequence())
	}
	if err := a.Relist(t.Context()); err == nil {
		t.Error("a sequence was used twice")
	}
}
