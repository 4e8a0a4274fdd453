package storagetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-mesh/signet/storage"
)

// ClosableStore is a store that an engine opened.
type ClosableStore interface {
	storage.Store
	io.Closer
}

// StorePlace is where a store is, and what a test can do to it there.
type StorePlace struct {
	// Open opens the store.
	Open func() (ClosableStore, error)
	// Shared says that several can have it open; where it is not set the second gets
	// storage.ErrLocked.
	Shared bool
	// Fail has what s is asked from then on fail without an answer until heal is called,
	// which is called once: where landed is set only the answer is lost, otherwise the
	// request, which may yet arrive after heal. An engine may have to be opened again.
	Fail func(s ClosableStore, landed bool) (heal func())
	// Forget has changes up to now forgotten, as far as watchers could ask for them. It
	// may change entries below forget/.
	Forget func(t *testing.T, s storage.Store)
}

// Store tests that an engine keeps the contract of storage.Store, and prints how much it
// asked. fresh makes the place of an empty store.
func Store(t *testing.T, fresh func(t *testing.T) StorePlace) {
	c := &counts{}
	t.Cleanup(func() { t.Log(c) })
	for _, tc := range []struct {
		name string
		test func(*testing.T, *storeTest)
	}{
		{"is empty at first", storeEmpty},
		{"changes entries by revision", storeRevisions},
		{"changes nothing on a conflict", storeConflict},
		{"only checks where there is nothing to change", storeCheckOnly},
		{"shares no memory with callers", storeCopies},
		{"takes and refuses by size", storeSizes},
		{"refuses bad keys", storeKeys},
		{"lists by prefix in order", storeList},
		{"lists several prefixes as of one moment", storeListSeveral},
		{"loses no update of concurrent writers", storeConcurrent},
		{"keeps everything across reopening", storeReopen},
		{"does what a map does", storeModel},
		{"ends calls whose context ended", storeContext},
		{"refuses everything once closed", storeClosed},
		{"watches every change in order", storeWatch},
		{"watches while others commit", storeWatchConcurrent},
		{"resumes a watch or says that it cannot", storeWatchResume},
		{"ends a watch with its context", storeWatchContext},
		{"ends a watch when closed", storeWatchClosed},
		{"leases to one at a time", storeLease},
		{"ends the wait for a lease with its context", storeLeaseContext},
		{"ends leases when closed", storeLeaseClosed},
		{"is one store for all who have it open, or one's alone", storeSeveral},
		{"says unknown and then the truth", storeUnknown},
		{"keeps what it acknowledged when it fails", storeFails},
		{"says what a watch cannot know any more", storeForgotten},
		{"hides no gap from a watch", storeGaps},
		{"ends a lease that is lost", storeLeaseLost},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			c.tests.Add(1)
			place := fresh(t)
			st := &storeTest{t: t, place: place, counts: c}
			st.openStore = func() (ClosableStore, error) {
				s, err := place.Open()
				if err != nil {
					return nil, err
				}
				return &countedStore{s, c}, nil
			}
			st.reopen()
			t.Cleanup(func() { st.ClosableStore.Close() })
			tc.test(t, st)
		})
	}
}

// storeTest is the store of one test; its helpers end the test on an error.
type storeTest struct {
	ClosableStore
	t         *testing.T
	place     StorePlace
	counts    *counts
	openStore func() (ClosableStore, error)
}

func (s *storeTest) reopen() {
	s.t.Helper()
	if s.ClosableStore != nil {
		if err := s.Close(); err != nil {
			s.t.Fatal(err)
		}
	}
	var err error
	if s.ClosableStore, err = s.openStore(); err != nil {
		s.t.Fatal(err)
	}
}

func (s *storeTest) commit(conds []storage.Cond, ops ...storage.Op) uint64 {
	s.t.Helper()
	rev, err := s.Commit(s.t.Context(), conds, ops)
	if err != nil {
		s.t.Fatal(err)
	}
	return rev
}

func (s *storeTest) refuse(want error, conds []storage.Cond, ops ...storage.Op) {
	s.t.Helper()
	before := s.list("")
	if _, err := s.Commit(s.t.Context(), conds, ops); err == nil || want != nil && !errors.Is(err, want) {
		s.t.Fatalf("Commit returned %v, want error %v", err, want)
	}
	if after := s.list(""); after != before {
		s.t.Fatalf("the refused commit changed\n%s\nto\n%s", before, after)
	}
}

func (s *storeTest) value(key string) string {
	s.t.Helper()
	e, err := s.Get(s.t.Context(), key)
	if errors.Is(err, storage.ErrNotFound) {
		return "not found"
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return fmt.Sprintf("%s@%d", e.Value, e.Revision)
}

// list is one line for the revision and one for each entry.
func (s *storeTest) list(prefix string) string {
	s.t.Helper()
	entries, rev, err := s.List(s.t.Context(), prefix)
	if err != nil {
		s.t.Fatal(err)
	}
	return listing(entries, rev)
}

func listing(entries []storage.Entry, rev uint64) string {
	var b strings.Builder
	fmt.Fprintf(&b, "revision %d\n", rev)
	for _, e := range entries {
		fmt.Fprintf(&b, "%s=%.40q@%d\n", e.Key, e.Value, e.Revision)
	}
	return b.String()
}

func set(key, value string) storage.Op { return storage.Op{Key: key, Value: []byte(value)} }
func del(key string) storage.Op        { return storage.Op{Key: key, Delete: true} }

func storeEmpty(t *testing.T, s *storeTest) {
	if got := s.value("a"); got != "not found" {
		t.Errorf("Get of a missing key: %s", got)
	}
	if entries, _, err := s.List(t.Context(), ""); err != nil || len(entries) != 0 {
		t.Errorf("List: %v, %v", entries, err)
	}
}

func storeRevisions(t *testing.T, s *storeTest) {
	r1 := s.commit([]storage.Cond{{Key: "a"}}, set("a", "1"), set("b", "1"))
	if got, want := s.value("a"), fmt.Sprintf("1@%d", r1); got != want {
		t.Errorf("a is %s, want %s", got, want)
	}
	r2 := s.commit([]storage.Cond{{Key: "a", Revision: r1}}, set("a", ""))
	if r2 <= r1 {
		t.Errorf("revision %d after %d", r2, r1)
	}
	if got, want := s.value("a"), fmt.Sprintf("@%d", r2); got != want {
		t.Errorf("a is %s, want %s", got, want)
	}
	if got, want := s.value("b"), fmt.Sprintf("1@%d", r1); got != want {
		t.Errorf("b is %s, want %s: another key's revision must not change", got, want)
	}
	r3 := s.commit([]storage.Cond{{Key: "a", Revision: r2}}, del("a"))
	if r3 <= r2 || s.value("a") != "not found" {
		t.Errorf("after deletion at %d: a is %s", r3, s.value("a"))
	}
	if r4 := s.commit([]storage.Cond{{Key: "a"}}, set("a", "2")); r4 <= r3 {
		t.Errorf("revision %d after %d", r4, r3)
	}
}

func storeConflict(t *testing.T, s *storeTest) {
	r := s.commit(nil, set("a", "1"), set("b", "1"))
	s.refuse(storage.ErrConflict, []storage.Cond{{Key: "a"}}, set("b", "2"))
	s.refuse(storage.ErrConflict, []storage.Cond{{Key: "a", Revision: r + 1}}, set("b", "2"))
	s.refuse(storage.ErrConflict, []storage.Cond{{Key: "c", Revision: r}}, set("b", "2"))
	s.refuse(storage.ErrConflict, []storage.Cond{{Key: "a", Revision: r}, {Key: "b"}}, set("b", "2"), del("a"), set("c", "1"))
}

func storeCheckOnly(t *testing.T, s *storeTest) {
	r := s.commit(nil, set("a", "1"))
	for _, ops := range [][]storage.Op{nil, {del("missing")}} {
		if got := s.commit([]storage.Cond{{Key: "a", Revision: r}}, ops...); got != r {
			t.Errorf("revision %d, want %d", got, r)
		}
		s.refuse(storage.ErrConflict, []storage.Cond{{Key: "a"}}, ops...)
	}
	if r2 := s.commit(nil, del("missing"), set("a", "2")); r2 <= r {
		t.Errorf("revision %d after %d", r2, r)
	}
}

func storeCopies(t *testing.T, s *storeTest) {
	_, rev, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	v := []byte("value")
	s.commit(nil, storage.Op{Key: "a", Value: v})
	copy(v, "XXXXX")
	e, err := s.Get(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	copy(e.Value, "YYYYY")
	entries, _, err := s.List(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	copy(entries[0].Value, "ZZZZZ")
	for range 2 {
		for ev, err := range s.Watch(t.Context(), "", rev) {
			if err != nil || string(ev.Value) != "value" {
				t.Fatalf("Watch: %q, %v", ev.Value, err)
			}
			copy(ev.Value, "WWWWW")
			break
		}
	}
	if e, err = s.Get(t.Context(), "a"); err != nil || string(e.Value) != "value" {
		t.Errorf("Get: %q, %v", e.Value, err)
	}
}

func storeSizes(t *testing.T, s *storeTest) {
	big := func(n int) []byte { return bytes.Repeat([]byte{7}, n) }
	key := strings.Repeat("k", storage.MaxKey)
	s.commit([]storage.Cond{{Key: key}}, storage.Op{Key: key, Value: big(storage.MaxValue)})
	if e, err := s.Get(t.Context(), key); err != nil || !bytes.Equal(e.Value, big(storage.MaxValue)) {
		t.Errorf("largest value: %d bytes, %v", len(e.Value), err)
	}
	s.refuse(nil, nil, set(key+"k", ""))
	s.refuse(nil, []storage.Cond{{Key: key + "k"}})
	s.refuse(nil, nil, storage.Op{Key: "a", Value: big(storage.MaxValue + 1)})

	var ops []storage.Op
	var conds []storage.Cond
	for i := range storage.MaxOps {
		ops = append(ops, set(fmt.Sprintf("many/%d", i), "x"))
		conds = append(conds, storage.Cond{Key: fmt.Sprintf("many/%d", i)})
	}
	s.commit(conds, ops...)
	s.refuse(nil, nil, append(ops, set("many/more", "x"))...)
	s.refuse(nil, append(conds, storage.Cond{Key: "more"}))

	half := storage.MaxCommit/2 - 1
	s.commit(nil, storage.Op{Key: "a", Value: big(half)}, storage.Op{Key: "b", Value: big(half)})
	s.refuse(nil, nil, storage.Op{Key: "a", Value: big(half)}, storage.Op{Key: "bb", Value: big(half)})
	s.refuse(nil, nil, set("a", "1"), set("a", "2"))
	s.refuse(nil, nil, set("a", "1"), del("a"))
	s.refuse(nil, nil, storage.Op{Key: "a", Value: []byte("x"), Delete: true})
}

func storeKeys(t *testing.T, s *storeTest) {
	for c := range 256 {
		key := "a" + string([]byte{byte(c)})
		op := set(key, "1")
		if c > ' ' && c <= '~' {
			s.commit(nil, op)
			if got := s.value(key); !strings.HasPrefix(got, "1@") {
				t.Errorf("key %q: %s", key, got)
			}
			continue
		}
		_, err := s.Commit(t.Context(), nil, []storage.Op{op})
		_, condErr := s.Commit(t.Context(), []storage.Cond{{Key: key}}, nil)
		_, getErr := s.Get(t.Context(), key)
		_, _, listErr := s.List(t.Context(), key)
		_, leaseErr := s.Lease(t.Context(), key, time.Minute)
		if err == nil || condErr == nil || getErr == nil || errors.Is(getErr, storage.ErrNotFound) || listErr == nil || leaseErr == nil {
			t.Errorf("key with byte 0x%02x: %v, %v, %v, %v, %v", c, err, condErr, getErr, listErr, leaseErr)
		}
		for _, err := range s.Watch(t.Context(), key, 0) {
			if err == nil {
				t.Errorf("watch of a prefix with byte 0x%02x", c)
			}
			break
		}
	}
	s.refuse(nil, nil, set("", "1"))
	s.refuse(nil, []storage.Cond{{}})
	if _, err := s.Get(t.Context(), ""); err == nil || errors.Is(err, storage.ErrNotFound) {
		t.Errorf("Get of an empty key: %v", err)
	}
}

func storeList(t *testing.T, s *storeTest) {
	keys := []string{"a", "a!", "a-b", "a/", "a/b", "a/b/c", "a0", "ab", "b", "~"}
	shuffled := slices.Clone(keys)
	rand.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
	for _, k := range shuffled {
		s.commit(nil, set(k, k))
	}
	last := s.commit(nil, set("other", "1"))
	for _, prefix := range []string{"", "a", "a/", "a/b/c", "a/b/c/", "b", "~", "c"} {
		var want []string
		for _, k := range append(keys[:len(keys)-1:len(keys)-1], "other", "~") {
			if strings.HasPrefix(k, prefix) {
				want = append(want, k)
			}
		}
		entries, rev, err := s.List(t.Context(), prefix)
		if err != nil || rev != last {
			t.Fatalf("List(%q): revision %d, %v; want %d", prefix, rev, err, last)
		}
		var got []string
		for _, e := range entries {
			got = append(got, e.Key)
		}
		if !slices.Equal(got, want) {
			t.Errorf("List(%q) = %q, want %q", prefix, got, want)
		}
	}
}

// storeListSeveral lists what is below several prefixes: each entry once, in order, more
// than an engine reads at once, and all of one commit while others change both sides.
func storeListSeveral(t *testing.T, s *storeTest) {
	for _, none := range [][]string{nil, {"a", "\n"}, make([]string, storage.MaxOps+1)} {
		if _, _, err := s.List(t.Context(), none...); err == nil {
			t.Errorf("List(%q) has no error", none)
		}
	}
	const each = 300
	all := map[string]bool{}
	for _, p := range []string{"a/", "b", "b/", "c/", "d/"} {
		for i := 0; i < each; i += 100 {
			var ops []storage.Op
			for k := i; k < i+100; k++ {
				key := fmt.Sprintf("%s%03d", p, k)
				ops, all[key] = append(ops, set(key, "0")), true
			}
			s.commit(nil, ops...)
		}
	}
	for _, prefixes := range [][]string{{"d/", "a/"}, {"b", "b/", "b/1"}, {"c/299", "c/299", "c/3", "a/0"}, {"", "b"}, {"x", "y"}} {
		var want, got []string
		for _, k := range slices.Sorted(maps.Keys(all)) {
			if slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(k, p) }) {
				want = append(want, k)
			}
		}
		entries, _, err := s.List(t.Context(), prefixes...)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			got = append(got, e.Key)
		}
		if !slices.Equal(got, want) {
			t.Errorf("List(%q) has %d entries, %.100q…, want %d, %.100q…", prefixes, len(got), got, len(want), want)
		}
	}
	// Both keys are always changed together.
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(done)
		for i := range 60 {
			v := fmt.Sprint(i)
			if _, err := s.Commit(t.Context(), nil, []storage.Op{set("a/000", v), set("d/299", v)}); err != nil {
				t.Error(err)
				return
			}
		}
	})
	defer wg.Wait()
	for ended := false; !ended; {
		select {
		case <-done:
			ended = true // and look once more
		default:
		}
		entries, rev, err := s.List(t.Context(), "d/", "a/")
		if err != nil {
			t.Fatal(err)
		}
		first, last := entries[0], entries[len(entries)-1]
		if len(entries) != 2*each || string(first.Value) != string(last.Value) || first.Revision != last.Revision && string(first.Value) != "0" || first.Revision > rev {
			t.Fatalf("at revision %d %d entries: %s=%s@%d, %s=%s@%d", rev, len(entries), first.Key, first.Value, first.Revision, last.Key, last.Value, last.Revision)
		}
	}
}

func storeConcurrent(t *testing.T, s *storeTest) {
	const writers, each = 8, 10
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for done := 0; done < each; {
				e, err := s.Get(t.Context(), "counter")
				if err != nil && !errors.Is(err, storage.ErrNotFound) {
					t.Error(err)
					return
				}
				_, err = s.Commit(t.Context(), []storage.Cond{{Key: "counter", Revision: e.Revision}},
					[]storage.Op{{Key: "counter", Value: append(e.Value, 'x')}})
				switch {
				case err == nil:
					done++
				case !errors.Is(err, storage.ErrConflict):
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if e, err := s.Get(t.Context(), "counter"); err != nil || len(e.Value) != writers*each {
		t.Errorf("%d of %d updates are there, %v", len(e.Value), writers*each, err)
	}
}

func storeReopen(t *testing.T, s *storeTest) {
	s.commit(nil, set("a", "1"), set("b", ""))
	r := s.commit(nil, del("a"))
	before := s.list("")
	s.reopen()
	if after := s.list(""); after != before {
		t.Errorf("before\n%safter\n%s", before, after)
	}
	if next := s.commit(nil, set("a", "2")); next <= r {
		t.Errorf("revision %d after %d", next, r)
	}
}

// storeModel runs random commits against the store and against a map.
func storeModel(t *testing.T, s *storeTest) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	steps := 150
	if testing.Short() {
		steps = 40
	}
	model := map[string]storage.Entry{}
	_, rev, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	key := func() string { return fmt.Sprintf("k%02d", rnd.IntN(12)) }
	for step := range steps {
		var conds []storage.Cond
		hold := true
		for range rnd.IntN(3) {
			c := storage.Cond{Key: key()}
			c.Revision = model[c.Key].Revision
			if rnd.IntN(5) == 0 {
				c.Revision++
				hold = false
			}
			conds = append(conds, c)
		}
		var ops []storage.Op
		next, changes := map[string]storage.Entry{}, false
		for k, e := range model {
			next[k] = e
		}
		for range rnd.IntN(4) {
			op := storage.Op{Key: key()}
			if slices.ContainsFunc(ops, func(o storage.Op) bool { return o.Key == op.Key }) {
				continue
			}
			if _, exists := model[op.Key]; rnd.IntN(3) == 0 {
				op.Delete = true
				delete(next, op.Key)
				changes = changes || exists
			} else {
				op.Value = bytes.Repeat([]byte{byte(step)}, rnd.IntN(3000))
				next[op.Key] = storage.Entry{Key: op.Key, Value: op.Value, Revision: rev + 1}
				changes = true
			}
			ops = append(ops, op)
		}
		got, err := s.Commit(t.Context(), conds, ops)
		switch {
		case !hold && !errors.Is(err, storage.ErrConflict):
			t.Fatalf("step %d: %v, want a conflict", step, err)
		case !hold:
		case err != nil:
			t.Fatalf("step %d: %v", step, err)
		case changes && got <= rev, !changes && got != rev:
			t.Fatalf("step %d: revision %d after %d", step, got, rev)
		default:
			for k, e := range next {
				if e.Revision == rev+1 {
					e.Revision = got
					next[k] = e
				}
			}
			model, rev = next, got
		}
		if rnd.IntN(25) == 0 {
			s.reopen()
		}
		var want []storage.Entry
		for _, e := range model {
			want = append(want, e)
		}
		slices.SortFunc(want, func(a, b storage.Entry) int { return strings.Compare(a.Key, b.Key) })
		if got, want := s.list(""), listing(want, rev); got != want {
			t.Fatalf("step %d: store\n%smodel\n%s", step, got, want)
		}
	}
}

func storeContext(t *testing.T, s *storeTest) {
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("no longer wanted")
	cancel(reason)
	_, getErr := s.Get(ctx, "a")
	_, _, listErr := s.List(ctx, "a")
	_, commitErr := s.Commit(ctx, nil, []storage.Op{set("a", "1")})
	_, leaseErr := s.Lease(ctx, "a", time.Minute)
	for i, err := range []error{getErr, listErr, commitErr, leaseErr} {
		if !errors.Is(err, reason) {
			t.Errorf("call %d returned %v, want the cause", i, err)
		}
	}
	if got := s.value("a"); got != "not found" {
		t.Errorf("a is %s", got)
	}
	lease, err := s.Lease(t.Context(), "a", time.Minute)
	if err != nil {
		t.Fatalf("a lease that nobody got is held: %v", err)
	}
	lease.Release(t.Context())
}

func storeClosed(t *testing.T, s *storeTest) {
	s.commit(nil, set("a", "1"))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	_, getErr := s.Get(t.Context(), "a")
	_, _, listErr := s.List(t.Context(), "a")
	_, commitErr := s.Commit(t.Context(), nil, []storage.Op{set("a", "1")})
	_, leaseErr := s.Lease(t.Context(), "a", time.Minute)
	for i, err := range []error{getErr, listErr, commitErr, leaseErr} {
		if !errors.Is(err, storage.ErrClosed) {
			t.Errorf("call %d returned %v, want ErrClosed", i, err)
		}
	}
}
