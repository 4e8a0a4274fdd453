package storagetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/signet-mesh/signet/storage"
)

// patience is how long the suites wait for what must happen, on a busy machine too.
const patience = time.Minute

// watched reads n events, each as key=value@revision.
func (s *storeTest) watched(prefix string, after uint64, n int) []string {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	var got []string
	for e, err := range s.Watch(ctx, prefix, after) {
		if err != nil {
			s.t.Fatalf("after %d events: %v", len(got), err)
		}
		got = append(got, event(e))
		if len(got) == n {
			return got
		}
	}
	s.t.Fatalf("the watch ended after %q", got)
	return nil
}

func event(e storage.Event) string {
	if e.Deleted {
		return fmt.Sprintf("%s deleted@%d", e.Key, e.Revision)
	}
	return fmt.Sprintf("%s=%s@%d", e.Key, e.Value, e.Revision)
}

func storeWatch(t *testing.T, s *storeTest) {
	r0 := s.commit(nil, set("a/0", "before"))
	r1 := s.commit(nil, set("a/1", "1"), set("b/1", "1"), set("a/2", "2"))
	s.commit(nil, set("b/1", "2"))
	s.commit(nil, del("missing"))
	r3 := s.commit(nil, del("a/1"), set("a/2", ""), del("missing"))
	want := []string{
		fmt.Sprintf("a/1=1@%d", r1), fmt.Sprintf("a/2=2@%d", r1),
		fmt.Sprintf("a/1 deleted@%d", r3), fmt.Sprintf("a/2=@%d", r3),
	}
	if got := s.watched("a/", r0, 4); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := s.watched("a/", r1, 2); !slices.Equal(got, want[2:]) {
		t.Errorf("after %d got %q, want %q", r1, got, want[2:])
	}
	// Many changes, so many in a commit that an engine might split it.
	const commits, ops = 7, 90
	after := s.commit(nil, set("many", ""))
	want = nil
	for i := range commits {
		var batch []storage.Op
		for j := range ops {
			batch = append(batch, set(fmt.Sprintf("many/%d", j), fmt.Sprint(i)))
		}
		r := s.commit(nil, batch...)
		for j := range ops {
			want = append(want, fmt.Sprintf("many/%d=%d@%d", j, i, r))
		}
	}
	if got := s.watched("many/", after, commits*ops); !slices.Equal(got, want) {
		t.Errorf("many changes: got %q, want %q", got, want)
	}
	if got := s.watched("", r0, 6); got[1] != fmt.Sprintf("b/1=1@%d", r1) {
		t.Errorf("without a prefix: %q", got)
	}
}

func storeWatchConcurrent(t *testing.T, s *storeTest) {
	_, rev, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	const writers, each = 4, 15
	var wg sync.WaitGroup
	results := make([][]string, 3)
	for i := range results {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			for e, err := range s.Watch(ctx, "w/", rev) {
				if err != nil {
					t.Errorf("watcher %d: %v", i, err)
					return
				}
				results[i] = append(results[i], event(e))
				if len(results[i]) == 2*writers*each {
					return
				}
			}
			t.Errorf("watcher %d saw only %d changes", i, len(results[i]))
		})
	}
	var mu sync.Mutex
	commits := map[uint64][]string{}
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				a, b := fmt.Sprintf("w/%d/a", w), fmt.Sprintf("w/%d/b", w)
				v := fmt.Sprint(i)
				r, err := s.Commit(t.Context(), nil, []storage.Op{set(a, v), set(b, v), set("other", v)})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				commits[r] = []string{fmt.Sprintf("%s=%s@%d", a, v, r), fmt.Sprintf("%s=%s@%d", b, v, r)}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	var revisions []uint64
	for r := range commits {
		revisions = append(revisions, r)
	}
	slices.Sort(revisions)
	var want []string
	for _, r := range revisions {
		want = append(want, commits[r]...)
	}
	for i, got := range results {
		if !slices.Equal(got, want) {
			t.Errorf("watcher %d saw\n%q\nwant\n%q", i, got, want)
		}
	}
}

func storeWatchResume(t *testing.T, s *storeTest) {
	first := s.commit(nil, set("a", "1"))
	second := s.commit(nil, set("a", "2"))
	s.reopen()
	third := s.commit(nil, set("a", "3"))
	// An engine may have forgotten the change to 2, but must not skip it.
	for e, err := range s.Watch(t.Context(), "", first) {
		if err == nil && event(e) != fmt.Sprintf("a=2@%d", second) || err != nil && !errors.Is(err, storage.ErrCompacted) {
			t.Errorf("after %d: %s, %v", first, event(e), err)
		}
		break
	}
	if got, want := s.watched("", second, 1), fmt.Sprintf("a=3@%d", third); got[0] != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func storeWatchContext(t *testing.T, s *storeTest) {
	rev := s.commit(nil, set("a", "0"))
	ctx, cancel := context.WithCancel(t.Context())
	s.commit(nil, set("a", "1"), set("a2", "1"))
	n := 0
	for e, err := range s.Watch(ctx, "", rev) {
		if err != nil {
			t.Errorf("error %v; the end of a context is none", err)
		}
		if n++; n > 1 {
			t.Errorf("%s after the context ended", event(e))
		}
		cancel()
	}
	if n != 1 {
		t.Errorf("%d events, want 1", n)
	}
	// While it waits for a change.
	ctx, cancel = context.WithCancel(t.Context())
	time.AfterFunc(10*time.Millisecond, cancel)
	for e, err := range s.Watch(ctx, "nothing/", rev) {
		t.Errorf("%s, %v", event(e), err)
	}
}

func storeWatchClosed(t *testing.T, s *storeTest) {
	rev := s.commit(nil, set("a", "0"))
	last := s.commit(nil, set("a", "1"))
	var got []string
	var end error
	for e, err := range s.Watch(t.Context(), "", rev) {
		if err != nil {
			end = err
			continue // an error must be the last thing
		}
		got = append(got, event(e))
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	if want := []string{fmt.Sprintf("a=1@%d", last)}; !slices.Equal(got, want) || !errors.Is(end, storage.ErrClosed) {
		t.Errorf("got %q, %v; want %q and ErrClosed", got, end, want)
	}
}

// taken reports whether a lease cannot be had at once.
func (s *storeTest) taken(name string) bool {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 50*time.Millisecond)
	defer cancel()
	l, err := s.Lease(ctx, name, time.Second)
	if err == nil {
		l.Release(s.t.Context())
	}
	return err != nil
}

func isDone(l storage.Lease) bool {
	select {
	case <-l.Done():
		return true
	default:
		return false
	}
}

// lease takes a lease that a busy machine does not lose.
func (s *storeTest) lease(name string) storage.Lease {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	l, err := s.Lease(ctx, name, 20*time.Second)
	if err != nil {
		s.t.Fatal(err)
	}
	return l
}

func storeLease(t *testing.T, s *storeTest) {
	a := s.lease("a")
	if isDone(a) || !s.taken("a") {
		t.Error("a is not held")
	}
	s.lease("b").Release(t.Context()) // held by nobody, so it can be had
	next := make(chan storage.Lease)
	go func() { next <- s.lease("a") }()
	if err := a.Release(t.Context()); err != nil {
		t.Error(err)
	}
	if !isDone(a) {
		t.Error("Done is open after Release")
	}
	b := <-next
	if err := a.Release(t.Context()); err != nil {
		t.Errorf("second Release: %v", err)
	}
	if isDone(b) || !s.taken("a") {
		t.Error("the second Release of the first holder ended the lease of the next one")
	}
	if err := b.Release(t.Context()); err != nil {
		t.Error(err)
	}
	s.lease("a").Release(t.Context())

	// Many want it; never two have it.
	var wg sync.WaitGroup
	var mu sync.Mutex
	holders := 0
	for range 6 {
		wg.Go(func() {
			l := s.lease("many")
			if !mu.TryLock() {
				t.Error("two hold the lease")
			} else {
				holders++
				mu.Unlock()
			}
			l.Release(t.Context())
		})
	}
	wg.Wait()
	if holders != 6 {
		t.Errorf("%d of 6 got the lease", holders)
	}
	if _, err := s.Lease(t.Context(), "short", time.Second-1); err == nil {
		t.Error("a lease of less than a second was given")
	}
}

func storeLeaseContext(t *testing.T, s *storeTest) {
	a := s.lease("a")
	defer a.Release(t.Context())
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("no longer wanted")
	time.AfterFunc(10*time.Millisecond, func() { cancel(reason) })
	if _, err := s.Lease(ctx, "a", time.Second); !errors.Is(err, reason) {
		t.Errorf("got %v, want the cause", err)
	}
	if isDone(a) {
		t.Error("a waiter that left took the lease along")
	}
}

func storeLeaseClosed(t *testing.T, s *storeTest) {
	a := s.lease("a")
	failed := make(chan error)
	go func() {
		_, err := s.Lease(t.Context(), "a", time.Second)
		failed <- err
	}()
	s.Close()
	if err := <-failed; !errors.Is(err, storage.ErrClosed) {
		t.Errorf("a waiter got %v, want ErrClosed", err)
	}
	<-a.Done()
	s.reopen()
	s.lease("a").Release(t.Context())
}
