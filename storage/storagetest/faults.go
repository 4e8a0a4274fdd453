package storagetest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/signet-mesh/signet/storage"
)

// another opens the store once more, as another process would.
func (s *storeTest) another() ClosableStore {
	s.t.Helper()
	other, err := s.openStore()
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { other.Close() })
	return other
}

// fail has the store fail until heal.
func (s *storeTest) fail(landed bool) (heal func()) {
	return s.place.Fail(s.ClosableStore.(*countedStore).ClosableStore, landed)
}

// recover opens the store again if it has to be after a failure.
func (s *storeTest) recover() {
	s.t.Helper()
	if _, err := s.Get(s.t.Context(), "recovered"); errors.Is(err, storage.ErrNotDurable) {
		s.reopen()
	}
}

func storeSeveral(t *testing.T, s *storeTest) {
	if !s.place.Shared {
		if other, err := s.openStore(); !errors.Is(err, storage.ErrLocked) {
			if err == nil {
				other.Close()
			}
			t.Fatalf("opened twice: %v, want ErrLocked", err)
		}
		return
	}
	const each = 8
	stores := []ClosableStore{s, s.another(), s.another()}
	first := s.commit(nil, set("counter", ""))
	var wg sync.WaitGroup
	seen := make([]string, len(stores))
	for i, st := range stores {
		wg.Go(func() {
			for done := 0; done < each; {
				e, err := st.Get(t.Context(), "counter")
				if err == nil {
					_, err = st.Commit(t.Context(), []storage.Cond{{Key: "counter", Revision: e.Revision}},
						[]storage.Op{{Key: "counter", Value: append(e.Value, 'x')}, {Key: fmt.Sprintf("of/%d/%d", i, done)}})
				}
				if err == nil {
					done++
				} else if !errors.Is(err, storage.ErrConflict) {
					t.Error(err)
					return
				}
			}
		})
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			n := 0
			for e, err := range st.Watch(ctx, "counter", first) {
				if err != nil {
					t.Error(err)
					return
				}
				seen[i] += event(e) + "\n"
				if n++; n == each*len(stores) {
					return
				}
			}
			t.Errorf("watcher %d saw only %d changes", i, n)
		})
	}
	wg.Wait()
	for i := range stores {
		if seen[i] != seen[0] {
			t.Errorf("watcher %d saw\n%swatcher 0\n%s", i, seen[i], seen[0])
		}
	}
	if entries, _, err := stores[1].List(t.Context(), "of/"); err != nil || len(entries) != each*len(stores) {
		t.Errorf("%d of %d commits are there, %v", len(entries), each*len(stores), err)
	}
}

// storeUnknown has the outcome of commits lost: after that what is read must stay so.
func storeUnknown(t *testing.T, s *storeTest) {
	for i := range 4 {
		landed := i%2 == 0
		old := s.commit(nil, set("a", "old"), set("gone", "yes"))
		heal := s.fail(landed)
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		_, err := s.Commit(ctx, []storage.Cond{{Key: "a", Revision: old}}, []storage.Op{set("a", "new"), del("gone")})
		cancel()
		if err == nil || errors.Is(err, storage.ErrConflict) {
			t.Fatalf("landed %v: a commit without an answer returned %v", landed, err)
		}
		heal()
		s.recover()
		e, err := s.Get(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		before := s.list("")
		happened := string(e.Value) == "new"
		if happened != (e.Revision != old) || happened != (s.value("gone") == "not found") {
			t.Errorf("landed %v: half of a commit happened: %s", landed, before)
		}
		// What is on its way still must not come after.
		time.Sleep(50 * time.Millisecond)
		if after := s.list(""); after != before {
			t.Errorf("landed %v: read\n%sthen\n%s", landed, before, after)
		}
		s.commit([]storage.Cond{{Key: "a", Revision: e.Revision}}, set("a", "decided"))
		if got := s.value("a"); got[:7] != "decided" {
			t.Errorf("landed %v: a is %s", landed, got)
		}
	}
}

// storeFails has the store fail while many write.
func storeFails(t *testing.T, s *storeTest) {
	acknowledged := map[string]bool{}
	for round := range 3 {
		var mu sync.Mutex
		var wg sync.WaitGroup
		started := make(chan struct{}, 4)
		for w := range 4 {
			wg.Go(func() {
				for i := 0; ; i++ {
					key := fmt.Sprintf("k/%d/%d/%d", round, w, i)
					_, err := s.Commit(t.Context(), []storage.Cond{{Key: key}}, []storage.Op{set(key, "v")})
					if err != nil {
						if errors.Is(err, storage.ErrConflict) {
							t.Errorf("%s: %v, although nobody else wrote it", key, err)
						}
						return
					}
					mu.Lock()
					acknowledged[key] = true
					mu.Unlock()
					if i == 3 {
						started <- struct{}{}
					}
				}
			})
		}
		for range 4 {
			<-started
		}
		heal := s.fail(rand.IntN(2) == 0)
		wg.Wait()
		heal()
		s.recover()
		entries, _, err := s.List(t.Context(), "k/")
		if err != nil {
			t.Fatal(err)
		}
		there := map[string]bool{}
		for _, e := range entries {
			there[e.Key] = true
		}
		for key := range acknowledged {
			if !there[key] {
				t.Errorf("%s was acknowledged and is gone", key)
			}
		}
		if extra := len(there) - len(acknowledged); extra > 4*(round+1) {
			t.Errorf("%d more keys than were acknowledged; at most one of each writer can be", extra)
		}
	}
}

func storeForgotten(t *testing.T, s *storeTest) {
	old := s.commit(nil, set("a", "1"))
	s.commit(nil, set("a", "2"))
	s.place.Forget(t, s)
	for e, err := range s.Watch(t.Context(), "a", old) {
		if !errors.Is(err, storage.ErrCompacted) {
			t.Errorf("got %v, %v; want ErrCompacted", event(e), err)
		}
		break
	}
	_, rev, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	next := s.commit(nil, set("a", "3"))
	if got, want := s.watched("a", rev, 1), fmt.Sprintf("a=3@%d", next); got[0] != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// storeGaps follows a store by watching, and by listing where the watch says that it
// must, while others write, history is forgotten, and the store fails.
func storeGaps(t *testing.T, s *storeTest) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	const last = "end"
	var writing sync.WaitGroup
	// Where one process has the store it fails for the watcher with it, and ends; so the
	// failures of that engine are in the other tests.
	writer := ClosableStore(s)
	if s.place.Shared {
		writer = s.another()
	}
	commit := func(ops ...storage.Op) {
		if _, err := writer.Commit(ctx, nil, ops); err != nil {
			t.Error(err)
		}
	}
	writing.Go(func() {
		for i := range 60 {
			heal := func() {}
			if s.place.Shared && i%20 == 10 {
				heal = s.fail(i%40 == 10)
			}
			commit(set(fmt.Sprintf("g/%d", rand.IntN(10)), fmt.Sprint(i)), del(fmt.Sprintf("g/%d", 10+rand.IntN(5))))
			commit(set(fmt.Sprintf("g/%d", 10+rand.IntN(5)), fmt.Sprint(i)))
			if i%20 == 10 {
				s.place.Forget(t, writer)
				commit(set("g/0", fmt.Sprint("forgotten ", i)))
			}
			heal()
		}
		commit(set("g/"+last, "1"))
	})
	view := map[string]string{}
	for relists := 0; ; relists++ {
		entries, rev, err := s.List(ctx, "g/")
		if err != nil {
			if ctx.Err() != nil {
				t.Fatal(err)
			}
			continue
		}
		clear(view)
		for _, e := range entries {
			view[e.Key] = fmt.Sprintf("%s@%d", e.Value, e.Revision)
		}
		if view["g/"+last] != "" {
			break
		}
		newest := rev
		for e, err := range s.Watch(ctx, "g/", rev) {
			if err != nil {
				if !errors.Is(err, storage.ErrCompacted) {
					t.Fatal(err)
				}
				break
			}
			if e.Revision < newest {
				t.Errorf("%s after revision %d", event(e), newest)
			}
			newest = e.Revision
			if delete(view, e.Key); !e.Deleted {
				view[e.Key] = fmt.Sprintf("%s@%d", e.Value, e.Revision)
			}
			if e.Key == "g/"+last || relists%2 == 0 && rand.IntN(10) == 0 {
				time.Sleep(time.Millisecond) // a slow receiver
			}
			if e.Key == "g/"+last {
				break
			}
		}
		if view["g/"+last] != "" {
			break
		}
		if ctx.Err() != nil {
			t.Fatal("the last change was not seen")
		}
	}
	writing.Wait()
	entries, _, err := writer.List(ctx, "g/")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if want := fmt.Sprintf("%s@%d", e.Value, e.Revision); view[e.Key] != want {
			t.Errorf("%s is %s, the watcher has %q", e.Key, want, view[e.Key])
		}
	}
	if len(view) != len(entries) {
		t.Errorf("the watcher has %d entries, the store %d", len(view), len(entries))
	}
}

func storeLeaseLost(t *testing.T, s *storeTest) {
	waiting, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	l, err := s.Lease(waiting, "job", time.Second) // others wait for its end
	if err != nil {
		t.Fatal(err)
	}
	if !s.place.Shared {
		// Nobody else can have it; but a store that fails can promise nothing.
		heal := s.fail(true)
		if _, err := s.Commit(t.Context(), nil, []storage.Op{set("a", "1")}); err == nil {
			t.Fatal("the commit succeeded")
		}
		<-l.Done()
		heal()
		s.recover()
		s.lease("job").Release(t.Context())
		return
	}
	other := s.another()
	rev := s.commit(nil, set("work", "of the first"))
	heal := s.fail(false)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	l2, err := other.Lease(ctx, "job", 20*time.Second)
	if err != nil {
		t.Fatalf("the lease of a holder that is away cannot be had: %v", err)
	}
	defer l2.Release(t.Context())
	select {
	case <-l.Done():
	case <-ctx.Done():
		t.Error("the holder was not told that its lease is lost")
	}
	if _, err := other.Commit(ctx, []storage.Cond{{Key: "work", Revision: rev}}, []storage.Op{set("work", "of the second")}); err != nil {
		t.Fatal(err)
	}
	heal()
	s.refuse(storage.ErrConflict, []storage.Cond{{Key: "work", Revision: rev}}, set("work", "of the first again"))
	if isDone(l2) {
		t.Error("the second holder lost the lease when the first came back")
	}
	if err := l.Release(t.Context()); err != nil {
		t.Errorf("releasing a lease that was lost: %v", err)
	}
}

func logLocked(t *testing.T, l *logTest) {
	l.append("a")
	if other, err := l.openLog(); !errors.Is(err, storage.ErrLocked) {
		if err == nil {
			other.Close()
		}
		t.Errorf("opened twice: %v, want ErrLocked", err)
	}
	l.append("b")
}

// usable waits until a log that failed takes records again, opening it if it must.
func (l *logTest) usable() {
	l.t.Helper()
	deadline := time.Now().Add(patience)
	for time.Now().Before(deadline) {
		last, err := l.Append(l.t.Context(), [][]byte{[]byte("usable")})
		if err == nil {
			l.acknowledged(last, "usable")
			return
		}
		l.mu.Lock()
		l.unsure++ // it may be there all the same
		l.mu.Unlock()
		if p, ok := l.ClosableLog.(*storage.FileLog); !ok || !p.Remote() {
			l.reopen()
		}
		time.Sleep(5 * time.Millisecond)
	}
	l.t.Fatal("the log takes no records after the failure has passed")
}

// logFails has writes fail while many append: what was acknowledged is there, in one
// chain, and what was not may be there once at most.
func logFails(t *testing.T, l *logTest) {
	for round := range 4 {
		var wg sync.WaitGroup
		started := make(chan struct{}, 4)
		for w := range 4 {
			wg.Go(func() {
				for i := 0; ; i++ {
					r := fmt.Sprintf("round %d, caller %d, record %d", round, w, i)
					last, err := l.Append(t.Context(), [][]byte{[]byte(r)})
					if err != nil {
						l.counts.unknown.Add(1)
						l.mu.Lock()
						l.unsure++
						l.mu.Unlock()
						return
					}
					l.acknowledged(last, r)
					if i == 2 {
						started <- struct{}{}
					}
				}
			})
		}
		for range 4 {
			<-started
		}
		heal := l.place.Fail(l.ClosableLog, round%2 == 0)
		wg.Wait()
		heal()
		l.usable()
		h := l.Head()
		h.Signature = []byte("signature")
		if err := l.AppendHead(t.Context(), h); err != nil {
			t.Error(err)
		}
		l.check()
	}
	seen := map[string]bool{}
	for r, err := range l.Scan(t.Context(), 1) {
		if err != nil {
			t.Fatal(err)
		}
		if s := string(r.Data); s != "usable" && seen[s] {
			t.Errorf("%q is there twice", s)
		} else {
			seen[s] = true
		}
	}
	l.reopen()
}

func logStolen(t *testing.T, l *logTest) {
	if l.place.Steal == nil {
		return // the lock of a file cannot be lost while its holder lives
	}
	l.append("of the first")
	signed := l.Head()
	signed.Signature = []byte("of the first")
	other, heal, err := l.place.Steal(l.ClosableLog)
	if err != nil {
		t.Fatal(err)
	}
	heal()
	// Before the second has written: where the first would write is nothing yet.
	if last, err := l.Append(t.Context(), [][]byte{[]byte("of the first again")}); err == nil {
		t.Fatalf("who lost the log wrote record %d", last)
	}
	if last, err := other.Append(t.Context(), [][]byte{[]byte("of the second")}); err != nil || last != 2 {
		t.Fatalf("record %d, %v", last, err)
	}
	for range 5 {
		if last, err := l.Append(t.Context(), [][]byte{[]byte("of the first again")}); err == nil {
			t.Fatalf("who lost the log wrote record %d", last)
		}
		if err := l.AppendHead(t.Context(), signed); err == nil {
			t.Error("who lost the log recorded a head")
		}
		time.Sleep(20 * time.Millisecond)
	}
	if last, err := other.Append(t.Context(), [][]byte{[]byte("of the second again")}); err != nil || last != 3 {
		t.Fatalf("record %d, %v", last, err)
	}
	// Also when the second has left: the first did not write what is there now.
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	for range 90 { // long enough for an engine that tries again to find the log free
		if last, err := l.Append(t.Context(), [][]byte{[]byte("of the first again")}); err == nil {
			t.Fatalf("who lost the log wrote record %d", last)
		}
		time.Sleep(50 * time.Millisecond)
	}
	l.want = map[uint64]string{1: "of the first", 2: "of the second", 3: "of the second again"}
	l.reopen()
}
