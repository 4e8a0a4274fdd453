package ca_test

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/rotation"
	"github.com/signet-mesh/signet/storage"
)

// secondRead has something happen before the second time that the journal is read after
// it was armed.
type secondRead struct {
	storage.Store
	happens func()

	mu   sync.Mutex
	left int // guarded by mu
}

func (s *secondRead) List(ctx context.Context, prefixes ...string) ([]storage.Entry, uint64, error) {
	s.mu.Lock()
	read := slices.Contains(prefixes, "journal")
	now := s.left == 1 && read
	if read {
		s.left--
	}
	s.mu.Unlock()
	if now {
		s.happens()
	}
	return s.Store.List(ctx, prefixes...)
}

// lapsed is a store on which the lease of another's rotation has run out.
type lapsed struct{ storage.Store }

func (s lapsed) Lease(ctx context.Context, name string, ttl time.Duration) (storage.Lease, error) {
	return s.Store.Lease(ctx, "after/"+name, ttl)
}

// TestOnlyTheRootThatWasLookedAtIsActivated: another one that took its place meanwhile is
// not, whoever forces it.
func TestOnlyTheRootThatWasLookedAtIsActivated(t *testing.T) {
	t.Parallel()
	shared := newShared(t)
	device := newDevice().configure
	on := func(s storage.Store) func(*ca.Config) {
		return func(c *ca.Config) {
			c.Shared = ca.Shared{Store: s, Files: shared.Files, LogWait: shared.LogWait}
		}
	}
	store := &secondRead{Store: shared.Store}
	a := newWorld(t, brisk, device, on(store))
	b := newWorld(t, brisk, device, on(lapsed{shared.Store}))
	rotate := func(w *world, step capb.RotateRequest_Step, id string) {
		t.Helper()
		if err := w.Rotate(t.Context(), step, id, false); err != nil {
			t.Errorf("%v: %v", step, err)
		}
	}
	// published is the root on the way, as a replica knows it.
	published := func(w *world) (id string) {
		for root, stage := range must(w.Stages()) {
			if stage == "published" {
				id = root
			}
		}
		return id
	}
	first := a.Root()
	rotate(a, capb.RotateRequest_STEP_PREPARE, "")
	looked, other := published(a), ""
	store.happens = func() {
		rotate(b, capb.RotateRequest_STEP_DISCARD, looked)
		rotate(b, capb.RotateRequest_STEP_PREPARE, "")
		other = published(b)
	}
	store.mu.Lock()
	store.left = 2 // before the step, and when it changes the journal
	store.mu.Unlock()
	err := a.Rotate(t.Context(), capb.RotateRequest_STEP_ACTIVATE, "", true)
	if other == "" || other == looked {
		t.Fatalf("the root on the way is %q after %q", other, looked)
	}
	if !errors.Is(err, rotation.ErrStage) || !a.Root().Equal(first) || must(a.Stages())[other] != "published" || must(a.Stages())[idOf(first)] != "active" {
		t.Errorf("%v; %v", err, must(a.Stages()))
	}
	// It is, when it was looked at.
	if err := a.Rotate(t.Context(), capb.RotateRequest_STEP_ACTIVATE, "", true); err != nil || idOf(a.Root()) != other {
		t.Errorf("%v; active is %s, want %s", err, idOf(a.Root()), other)
	}
	intact(t, a)
}

// TestAnIntermediateIsBelowTheRootThatIsActiveByThen: another replica activates another root
// between the making of an intermediate and its use.
func TestAnIntermediateIsBelowTheRootThatIsActiveByThen(t *testing.T) {
	t.Parallel()
	shared := newShared(t)
	device := newDevice().configure
	a := newWorld(t, brisk, device, func(c *ca.Config) { c.Shared = shared })
	store := &secondRead{Store: shared.Store}
	b := newWorld(t, brisk, device, func(c *ca.Config) {
		c.Shared = ca.Shared{Store: store, Files: shared.Files, LogWait: shared.LogWait}
	})
	if err := a.Rotate(t.Context(), capb.RotateRequest_STEP_PREPARE, "", false); err != nil {
		t.Fatal(err)
	}
	if err := b.CatchUp(t.Context()); err != nil {
		t.Fatal(err)
	}
	store.happens = func() {
		if err := a.Rotate(t.Context(), capb.RotateRequest_STEP_ACTIVATE, "", true); err != nil {
			t.Error(err)
		}
	}
	keyFiles := func() int {
		return len(must(filepath.Glob(filepath.Join(b.cfg.DataDir, "authority/keys/intermediate-*.key"))))
	}
	before, keys := b.Intermediate(), keyFiles()
	store.mu.Lock()
	store.left = 1
	store.mu.Unlock()
	if err := b.RenewIntermediate(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !a.Root().Equal(b.Root()) || b.Intermediate().Equal(before) || b.Intermediate().CheckSignatureFrom(a.Root()) != nil {
		t.Errorf("the root is another one at the other replica: %v; the intermediate is the former one: %v", !a.Root().Equal(b.Root()), b.Intermediate().Equal(before))
	}
	if now := keyFiles(); now != keys+1 {
		t.Errorf("%d key files after %d", now, keys)
	}
	intact(t, b)
}
