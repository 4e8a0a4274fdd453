package ca_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/storage"
)

// unanswered is a state on which one change of a replica's own part of the journal has no
// answer, and nothing can be read until it is healed.
type unanswered struct {
	storage.Store
	lands bool

	mu    sync.Mutex
	armed bool // guarded by mu
	away  bool // guarded by mu
}

var errAway = errors.New("no quorum")

func (s *unanswered) set(armed, away bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.armed, s.away = armed, away
}

func (s *unanswered) isAway() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.away }

func (s *unanswered) Commit(ctx context.Context, conds []storage.Cond, ops []storage.Op) (uint64, error) {
	s.mu.Lock()
	hit := s.armed && slices.ContainsFunc(ops, func(o storage.Op) bool { return strings.HasPrefix(o.Key, "replicas/") })
	if hit {
		s.armed, s.away = false, true
	}
	s.mu.Unlock()
	if hit && s.lands {
		if _, err := s.Store.Commit(ctx, conds, ops); err != nil {
			return 0, err
		}
	}
	if hit {
		return 0, fmt.Errorf("no answer: %w", storage.ErrUnknown)
	}
	return s.Store.Commit(ctx, conds, ops)
}

func (s *unanswered) List(ctx context.Context, prefixes ...string) ([]storage.Entry, uint64, error) {
	if s.isAway() {
		return nil, 0, errAway
	}
	return s.Store.List(ctx, prefixes...)
}

// ownPart is what the state has of the authorities of a replica, by state, and which keys
// it names.
func ownPart(t *testing.T, s storage.Store, instance int) (states []string, named map[string]bool) {
	t.Helper()
	named = map[string]bool{}
	for _, key := range []string{"journal", fmt.Sprintf("replicas/%03d", instance)} {
		var part struct {
			Authorities []struct{ State, Key string }
			Journal     struct {
				LogKey      string
				Authorities []struct{ State, Key string }
			}
		}
		if err := json.Unmarshal(must(s.Get(t.Context(), key)).Value, &part); err != nil {
			t.Fatal(err)
		}
		for _, e := range part.Journal.Authorities {
			states = append(states, e.State)
		}
		for _, e := range append(part.Authorities, part.Journal.Authorities...) {
			named[strings.TrimPrefix(e.Key, "softkms:")] = true
		}
		named[strings.TrimPrefix(part.Journal.LogKey, "softkms:")] = true
	}
	return states, named
}

// TestNothingIsLeftOfALostAnswer: an intermediate that was published without an answer is
// used in its turn; keys that the journal does not name leave the disk.
func TestNothingIsLeftOfALostAnswer(t *testing.T) {
	t.Parallel()
	for source, edit := range map[string]func(t *testing.T) func(*ca.Config){
		"its own root": func(*testing.T) func(*ca.Config) {
			return func(c *ca.Config) { c.RootReplica, c.Instance = 1, 1 }
		},
		"an upstream": func(t *testing.T) func(*ca.Config) {
			_, upstream := upstreamFolder(t)
			return func(c *ca.Config) { c.Upstream = upstream }
		},
	} {
		for _, lists := range []bool{false, true} {
			for _, lands := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, lists %v, it happens %v", source, lists, lands), func(t *testing.T) {
					t.Parallel()
					shared := newShared(t)
					store := &unanswered{Store: shared.Store, lands: lands}
					w := newWorld(t, brisk, edit(t), func(c *ca.Config) {
						c.Shared, c.CRL.Enabled = ca.Shared{Store: store, Files: shared.Files, LogWait: shared.LogWait}, lists
					})
					before := w.Intermediate()
					keys := func() (names []string) {
						for _, e := range must(os.ReadDir(filepath.Join(w.cfg.DataDir, "authority/keys"))) {
							names = append(names, e.Name())
						}
						return names
					}
					had := len(keys())
					store.set(true, false)
					if err := w.RenewIntermediate(t.Context()); !errors.Is(err, storage.ErrUnknown) && !errors.Is(err, errAway) {
						t.Fatal(err)
					}
					if len(keys()) != had+1 {
						t.Fatalf("of a change that may have happened the key is gone: %v", keys())
					}
					_ = w.Tick(t.Context()) // nothing can be read
					if len(keys()) != had+1 {
						t.Fatalf("while it is not known whether it happened the key is gone: %v", keys())
					}
					store.set(false, false)
					// Nobody has it renewed: what there is is taken, or tidied.
					eventually(t, "it to be tidy", func() bool {
						if err := w.CatchUp(t.Context()); err != nil {
							t.Fatal(err)
						}
						_ = w.Tick(t.Context())
						states, _ := ownPart(t, shared.Store, 1)
						return !slices.Contains(states, "next") && w.Intermediate().Equal(before) != lands && (lands || len(keys()) == had)
					})
					states, named := ownPart(t, shared.Store, 1)
					for _, k := range keys() {
						if !named[k] {
							t.Errorf("the journal, with authorities %v, does not name key %s", states, k)
						}
					}
					intact(t, w)
					inter := w.Intermediate()
					w.close()
					w.open()
					if !w.Intermediate().Equal(inter) {
						t.Error("after opening again another one signs")
					}
				})
			}
		}
	}
}

// TestPublishedIntermediatesThatNobodyUses: of several the last one is used, and the others
// leave the journal and their keys the disk.
func TestPublishedIntermediatesThatNobodyUses(t *testing.T) {
	t.Parallel()
	shared := newShared(t)
	store := &unanswered{Store: shared.Store, lands: true}
	w := newWorld(t, brisk, withCRL, func(c *ca.Config) {
		c.Shared, c.RootReplica, c.Instance = ca.Shared{Store: store, Files: shared.Files, LogWait: shared.LogWait}, 1, 1
	})
	had := len(must(filepath.Glob(filepath.Join(w.cfg.DataDir, "authority/keys/intermediate-*"))))
	for range 3 {
		store.set(true, false)
		if err := w.RenewIntermediate(t.Context()); !errors.Is(err, storage.ErrUnknown) && !errors.Is(err, errAway) {
			t.Fatal(err)
		}
		store.set(false, false)
	}
	states, _ := ownPart(t, shared.Store, 1)
	if n := len(slices.DeleteFunc(states, func(s string) bool { return s != "next" })); n != 3 {
		t.Fatalf("%d are published and not used, not 3", n)
	}
	if err := w.CatchUp(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the last one to be used", func() bool {
		if err := w.Tick(t.Context()); err != nil {
			t.Fatal(err)
		}
		states, _ := ownPart(t, shared.Store, 1)
		return !slices.Contains(states, "next") && slices.Contains(states, "old")
	})
	states, named := ownPart(t, shared.Store, 1)
	if want := []string{"active", "old"}; !slices.Equal(slices.Sorted(slices.Values(states)), want) {
		t.Errorf("its authorities are %v, want %v", states, want)
	}
	left := must(filepath.Glob(filepath.Join(w.cfg.DataDir, "authority/keys/intermediate-*")))
	for _, k := range left {
		if !named[filepath.Base(k)] {
			t.Errorf("the journal does not name key %s", k)
		}
	}
	if len(left) != had+1 {
		t.Errorf("%d keys are left, want %d", len(left), had+1)
	}
	intact(t, w)
}

// TestAKeyThatACrashLeft leaves the disk when all that it can have signed has ended; what the
// journal names stays, and so do keys of roots, the log's, and what is no key.
func TestAKeyThatACrashLeft(t *testing.T) {
	t.Parallel()
	w := newWorld(t, brisk)
	dir := filepath.Join(w.cfg.DataDir, "authority/keys")
	old := time.Now().Add(-48 * time.Hour) // an intermediate lives for an hour, and a day is given
	text := []byte("a key")
	for name, at := range map[string]time.Time{"intermediate-0badf00d.key": old, "intermediate-0000cafe.key": time.Now().Add(-24 * time.Hour), "root-0badf00d.key": old,
		"log-0badf00d.key": old, "intermediate-0badf00d.key.bak": old, "intermediate-mine.key": old} {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path, text, 0o600), os.Chtimes(path, at, at)); err != nil {
			t.Fatal(err)
		}
	}
	for _, e := range must(os.ReadDir(dir)) { // also of those that are in use
		path := filepath.Join(dir, e.Name())
		if b := must(os.ReadFile(path)); !bytes.Equal(b, text) {
			if err := os.Chtimes(path, old, old); err != nil {
				t.Fatal(err)
			}
		}
	}
	before := must(os.ReadDir(dir))
	if err := w.Tick(t.Context()); err != nil {
		t.Fatal(err)
	}
	var gone []string
	after := must(os.ReadDir(dir))
	for _, e := range before {
		if !slices.ContainsFunc(after, func(o os.DirEntry) bool { return o.Name() == e.Name() }) {
			gone = append(gone, e.Name())
		}
	}
	if want := []string{"intermediate-0badf00d.key"}; !slices.Equal(gone, want) {
		t.Errorf("%v are gone, want %v", gone, want)
	}
	w.reopen()
	if err := w.Rotate(t.Context(), capb.RotateRequest_STEP_RENEW, "", false); err != nil {
		t.Error(err)
	}
	intact(t, w)
}
