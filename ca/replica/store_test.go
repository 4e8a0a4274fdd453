package replica_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/signet-mesh/signet/ca/replica"
	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/storagetest"
)

// newState is one that two views can share: it is one process's, which does not matter
// to a view.
func newState(t *testing.T) *storage.Bolt {
	t.Helper()
	dir := privateDir(t)
	b, err := storage.OpenBolt(filepath.Join(dir, "state.db"), storage.BoltOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

func claim(t *testing.T, s storage.Store, id string, wanted uint8) uint8 {
	t.Helper()
	n, err := replica.Claim(t.Context(), s, id, wanted)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestClaim(t *testing.T) {
	t.Parallel()
	s := newState(t)
	if _, err := s.Commit(t.Context(), nil, []storage.Op{{Key: "instances/002", Value: []byte("{}")}}); err != nil {
		t.Fatal(err)
	}
	if n := claim(t, s, "a", 0); n != 1 {
		t.Errorf("the first got instance %d", n)
	}
	if n := claim(t, s, "b", 0); n != 3 {
		t.Errorf("the second got instance %d; 2 was retired", n)
	}
	if n := claim(t, s, "c", 9); n != 9 {
		t.Errorf("got instance %d, wanted 9", n)
	}
	for id, want := range map[string]uint8{"a": 1, "b": 3, "c": 9} {
		for _, wanted := range []uint8{0, want} {
			if n := claim(t, s, id, wanted); n != want {
				t.Errorf("%s has instance %d, then %d", id, want, n)
			}
		}
	}
	for name, c := range map[string]struct {
		id     string
		wanted uint8
	}{"another's": {"d", 1}, "one from before a restore": {"d", 2}, "another than it has": {"a", 7}} {
		if n, err := replica.Claim(t.Context(), s, c.id, c.wanted); !errors.Is(err, replica.ErrClaimed) {
			t.Errorf("%s: instance %d, %v", name, n, err)
		}
	}
	for _, c := range []struct {
		id     string
		wanted uint8
	}{{"", 0}, {"d", 128}} {
		if _, err := replica.Claim(t.Context(), s, c.id, c.wanted); err == nil {
			t.Errorf("%+v was accepted", c)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := replica.Claim(ctx, s, "d", 0); !errors.Is(err, context.Canceled) {
		t.Errorf("after its context: %v", err)
	}
}

func TestClaimAtTheSameTime(t *testing.T) {
	t.Parallel()
	s := newState(t)
	var wg sync.WaitGroup
	got := make([]uint8, 20)
	for i := range got {
		wg.Go(func() { got[i] = claim(t, s, fmt.Sprint("replica ", i), 0) })
	}
	wg.Wait()
	seen := map[uint8]bool{}
	for _, n := range got {
		if seen[n] || n < 1 || int(n) > len(got) {
			t.Errorf("instances %v", got)
			break
		}
		seen[n] = true
	}
	for i := len(got); i < storage.MaxInstance; i++ {
		claim(t, s, fmt.Sprint("replica ", i), 0)
	}
	if n, err := replica.Claim(t.Context(), s, "one more", 0); err == nil {
		t.Errorf("after all were given out: %d", n)
	}
}

// The view passes what a Store must do, under names that it treats as others.
func TestViewIsAStore(t *testing.T) {
	t.Parallel()
	storagetest.Store(t, func(t *testing.T) storagetest.StorePlace {
		path := filepath.Join(privateDir(t), "state.db")
		var failing, landed bool
		var mu sync.Mutex
		return storagetest.StorePlace{
			Open: func() (storagetest.ClosableStore, error) {
				b, err := storage.OpenBolt(path, storage.BoltOptions{LockTimeout: 1, History: 1000, Hook: func(after bool) error {
					mu.Lock()
					defer mu.Unlock()
					if failing && after == landed {
						return storagetest.ErrInjected
					}
					return nil
				}})
				if err != nil {
					return nil, err
				}
				return closing{replica.View(b, 1), b}, nil
			},
			Fail: func(_ storagetest.ClosableStore, after bool) func() {
				mu.Lock()
				defer mu.Unlock()
				failing, landed = true, after
				return func() { mu.Lock(); defer mu.Unlock(); failing = false }
			},
			Forget: func(t *testing.T, s storage.Store) {
				for i := range 1200 {
					if _, err := s.Commit(t.Context(), nil, []storage.Op{{Key: "forget/me", Value: fmt.Append(nil, i)}}); err != nil {
						t.Error(err)
					}
				}
			},
		}
	})
}

type closing struct {
	*replica.Store
	b *storage.Bolt
}

func (c closing) Close() error { return c.b.Close() }

type journal struct {
	Version     int                    `json:"version"`
	TrustDomain string                 `json:"trustDomain"`
	Instance    uint8                  `json:"instance"`
	Sequence    uint64                 `json:"sequence"`
	LogKey      string                 `json:"logKey,omitempty"`
	Authorities []authority            `json:"authorities"`
	Others      map[string][]authority `json:"others,omitempty"`
}

type authority struct {
	Kind string `json:"kind"`
	Key  string `json:"key"`
}

func read(t *testing.T, s storage.Store) (j journal, revision uint64) {
	t.Helper()
	e, err := s.Get(t.Context(), "journal")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(e.Value, &j); err != nil {
		t.Fatal(err)
	}
	return j, e.Revision
}

func write(t *testing.T, s storage.Store, j journal, revision uint64) (uint64, error) {
	t.Helper()
	b, err := json.Marshal(j)
	if err != nil {
		t.Fatal(err)
	}
	return s.Commit(t.Context(), []storage.Cond{{Key: "journal", Revision: revision}}, []storage.Op{{Key: "journal", Value: b}})
}

func TestTwoReplicasShareAJournal(t *testing.T) {
	t.Parallel()
	s := newState(t)
	a, b := replica.View(s, claim(t, s, "a", 1)), replica.View(s, claim(t, s, "b", 2))
	if _, err := a.Get(t.Context(), "journal"); !errors.Is(err, storage.ErrNotFound) {
		t.Fatalf("before there is one: %v", err)
	}
	first := journal{Version: 3, TrustDomain: "td", Instance: 1, Sequence: 1, LogKey: "log a", Authorities: []authority{{"root", ""}, {"intermediate", "a1"}}}
	rev, err := write(t, a, first, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := write(t, b, first, 0); !errors.Is(err, storage.ErrConflict) {
		t.Errorf("a second first journal: %v", err)
	}
	if got, r := read(t, a); fmt.Sprint(got) != fmt.Sprint(first) || r != rev {
		t.Errorf("read %+v at %d, wrote %+v at %d", got, r, first, rev)
	}
	// The second joins: it sees the roots and not the other's keys as its own.
	j, r := read(t, b)
	if j.Instance != 2 || j.LogKey != "" || j.Sequence != 1 || len(j.Authorities) != 1 || len(j.Others["1"]) != 1 {
		t.Errorf("the second sees %+v", j)
	}
	j.LogKey, j.Authorities = "log b", append(j.Authorities, authority{"intermediate", "b1"})
	if _, err := write(t, b, j, r); err != nil {
		t.Fatal(err)
	}
	// That changed nothing of the first.
	first.Authorities = append(first.Authorities, authority{"intermediate", "a2"})
	if _, err = write(t, a, first, rev); err != nil {
		t.Fatalf("the first renews while the second does: %v", err)
	}
	// What they have in common can be changed by one at a time.
	jb, rb := read(t, b)
	ja, ra := read(t, a)
	jb.Sequence, ja.Sequence = 2, 2
	if _, err := write(t, b, jb, rb); err != nil {
		t.Fatal(err)
	}
	if _, err := write(t, a, ja, ra); !errors.Is(err, storage.ErrConflict) {
		t.Errorf("a change on what another has changed: %v", err)
	}
	if _, err := a.Commit(t.Context(), []storage.Cond{{Key: "journal", Revision: ra}}, []storage.Op{{Key: "agents/1"}}); !errors.Is(err, storage.ErrConflict) {
		t.Errorf("a commit on a journal that was changed: %v", err)
	}
	ja, ra = read(t, a)
	if ja.Sequence != 2 || ja.LogKey != "log a" || len(ja.Authorities) != 3 {
		t.Errorf("the first sees %+v", ja)
	}
	if _, err := a.Commit(t.Context(), []storage.Cond{{Key: "journal", Revision: ra}}, []storage.Op{{Key: "agents/1"}}); err != nil {
		t.Error(err)
	}
	// Each has a record of what its own log lost.
	for i, v := range []*replica.Store{a, b} {
		if _, err := v.Commit(t.Context(), []storage.Cond{{Key: "log-loss"}}, []storage.Op{{Key: "log-loss", Value: fmt.Append(nil, i)}}); err != nil {
			t.Error(err)
		}
	}
	for i, v := range []*replica.Store{a, b} {
		if e, err := v.Get(t.Context(), "log-loss"); err != nil || string(e.Value) != fmt.Sprint(i) || e.Key != "log-loss" {
			t.Errorf("replica %d: %+v, %v", i, e, err)
		}
		entries, _, err := v.List(t.Context(), "")
		var names []string
		for _, e := range entries {
			names = append(names, e.Key)
		}
		if got := strings.Join(names, " "); err != nil || got != "agents/1 journal log-loss" {
			t.Errorf("replica %d lists %s, %v", i, got, err)
		}
	}
}

func TestWatchTellsOfEveryPart(t *testing.T) {
	t.Parallel()
	s := newState(t)
	a, b := replica.View(s, claim(t, s, "a", 1)), replica.View(s, claim(t, s, "b", 2))
	j := journal{Version: 3, Sequence: 1, Authorities: []authority{{"root", ""}}}
	if _, err := write(t, a, j, 0); err != nil {
		t.Fatal(err)
	}
	_, start, err := a.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	jb, rb := read(t, b)
	jb.LogKey = "log b"
	if _, err := write(t, b, jb, rb); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Commit(t.Context(), nil, []storage.Op{{Key: "log-loss"}, {Key: "agents/1"}}); err != nil {
		t.Fatal(err)
	}
	var got []string
	for e, err := range a.Watch(t.Context(), "", start) {
		if err != nil {
			t.Fatal(err)
		}
		if got = append(got, e.Key); e.Key == "agents/1" {
			break
		}
	}
	if fmt.Sprint(got) != "[journal agents/1]" {
		t.Errorf("the watch tells of %v", got)
	}
}

// TestAnIdentityOfALaterVersion keeps what this one does not know of it.
func TestAnIdentityOfALaterVersion(t *testing.T) {
	t.Parallel()
	dir := privateDir(t)
	if err := os.WriteFile(filepath.Join(dir, "replica"), []byte(`{"version":1,"id":"x","begun":false,"later":{"a":1}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	i, err := replica.OpenIdentity(dir)
	if err != nil {
		t.Fatal(err)
	}
	i.Begun = true
	if err := i.Save(dir); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "replica")); err != nil || string(b) != `{"begun":true,"id":"x","later":{"a":1},"version":1}` {
		t.Errorf("%s, %v", b, err)
	}
}
