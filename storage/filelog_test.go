package storage_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/storagetest"
)

// gate lets syncs wait until it is opened. It must be made in the bubble that
// uses it.
type gate struct{ open, reached chan struct{} }

func newGate(fs *storagetest.CrashFS) *gate {
	g := &gate{open: make(chan struct{}), reached: make(chan struct{})}
	var once sync.Once
	fs.Fail(func(op storagetest.Op) storagetest.Fault {
		if op.Kind == storagetest.Sync {
			once.Do(func() { close(g.reached) })
			<-g.open
		}
		return storagetest.NoFault
	})
	return g
}

func count(fs *storagetest.CrashFS, kind storagetest.Kind) (n int) {
	for _, op := range fs.Ops() {
		if op.Kind == kind {
			n++
		}
	}
	return n
}

func TestManyCallersShareOneFsync(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		mem := storagetest.NewCrashFS()
		reg := prometheus.NewRegistry()
		l, err := openMem(mem, storage.LogOptions{SegmentSize: 1 << 20, Metrics: reg})
		if err != nil {
			t.Fatal(err)
		}
		g := newGate(mem)
		before := count(mem, storagetest.Sync)
		var wg sync.WaitGroup
		var mu sync.Mutex
		acked := map[uint64]string{}
		const callers = 1000
		call := func(i int) {
			wg.Go(func() {
				r := fmt.Sprintf("record of caller %d", i)
				seq, err := l.Append(t.Context(), [][]byte{[]byte(r)})
				mu.Lock()
				defer mu.Unlock()
				if _, twice := acked[seq]; err != nil || twice {
					t.Errorf("sequence %d, given before: %t, %v", seq, twice, err)
				}
				acked[seq] = r
			})
		}
		// The first one syncs, all others wait.
		call(0)
		synctest.Wait()
		for i := 1; i < callers; i++ {
			call(i)
		}
		synctest.Wait()
		close(g.open)
		wg.Wait()
		if n := count(mem, storagetest.Sync) - before; n != 2 {
			t.Errorf("%d callers needed %d fsyncs, want 2", callers, n)
		}
		if len(acked) != callers {
			t.Errorf("%d of %d acknowledged", len(acked), callers)
		}
		storagetest.CheckLog(t, l, acked)
		want := `
# HELP signet_storage_log_batches_total Writes that made them durable; records per batch is what group commit saves.
# TYPE signet_storage_log_batches_total counter
signet_storage_log_batches_total 2
# HELP signet_storage_log_records_total Records that were made durable in the issuance log.
# TYPE signet_storage_log_records_total counter
signet_storage_log_records_total 1000
`
		if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "signet_storage_log_batches_total", "signet_storage_log_records_total"); err != nil {
			t.Error(err)
		}
		closeLog(t, l)
		if n, err := testutil.GatherAndCount(reg); n != 0 || err != nil {
			t.Errorf("%d metrics are registered after Close, %v", n, err)
		}
	})
}

func TestABatchHasALimit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		mem := storagetest.NewCrashFS()
		l, err := openMem(mem, storage.LogOptions{SegmentSize: 64 << 20})
		if err != nil {
			t.Fatal(err)
		}
		defer closeLog(t, l)
		g := newGate(mem)
		before := count(mem, storagetest.Sync)
		var wg sync.WaitGroup
		call := func(records [][]byte) {
			wg.Go(func() {
				if _, err := l.Append(t.Context(), records); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
		}
		many := make([][]byte, storage.MaxRecords)
		for i := range many {
			many[i] = []byte{byte(i)}
		}
		large := make([][]byte, 40)
		for i := range large {
			large[i] = make([]byte, storage.MaxRecord)
		}
		call(many[:1]) // alone: it found nobody waiting
		call(many)     // fills a batch with its count
		call(many[:1])
		call(large) // with the one before: not yet full
		call(large) // does not fit
		close(g.open)
		wg.Wait()
		if n := count(mem, storagetest.Sync) - before; n != 4 {
			t.Errorf("%d fsyncs, want 4", n)
		}
		storagetest.CheckLog(t, l, nil)
	})
}

func TestAFailedFsyncFailsEverybodyWhoWaits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		mem := storagetest.NewCrashFS()
		l := mustOpenMem(t, mem)
		release := make(chan struct{})
		mem.Fail(func(op storagetest.Op) storagetest.Fault {
			if op.Kind == storagetest.Sync {
				<-release
				return storagetest.NotPersisted
			}
			return storagetest.NoFault
		})
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				if _, err := l.Append(t.Context(), [][]byte{[]byte("x")}); !errors.Is(err, storage.ErrNotDurable) || !errors.Is(err, storagetest.ErrInjected) {
					t.Errorf("got %v, want ErrNotDurable and its cause", err)
				}
			})
		}
		synctest.Wait()
		close(release)
		wg.Wait()
		if h := l.Head(); h.Sequence != 0 {
			t.Errorf("head at %d", h.Sequence)
		}
		if err := l.Err(); !errors.Is(err, storage.ErrNotDurable) {
			t.Errorf("Err after a failed fsync: %v", err)
		}
		closeLog(t, l)
		if err := l.Err(); !errors.Is(err, storage.ErrClosed) {
			t.Errorf("Err after Close: %v", err)
		}
		l = mustOpenMem(t, mem.Crash(storagetest.Loss{}))
		if err := l.Err(); err != nil {
			t.Errorf("Err of a log that was opened again: %v", err)
		}
		closeLog(t, l)
	})
}

func TestACallerWhoGivesUpHarmsNobody(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		mem := storagetest.NewCrashFS()
		l := mustOpenMem(t, mem)
		g := newGate(mem)
		reason := errors.New("no longer wanted")
		type outcome struct {
			seq uint64
			err error
		}
		call := func(record string) (context.CancelCauseFunc, chan outcome) {
			ctx, cancel := context.WithCancelCause(t.Context())
			done := make(chan outcome, 1)
			data := []byte(record)
			go func() {
				seq, err := l.Append(ctx, [][]byte{data})
				for i := range data {
					data[i] = 'X' // the caller may reuse its memory
				}
				done <- outcome{seq, err}
			}()
			synctest.Wait()
			return cancel, done
		}
		_, leader := call("leader")
		cancelFirst, first := call("first")
		_, second := call("second")
		cancelThird, third := call("third")
		_, fourth := call("fourth")

		// Waiting calls leave before anybody wrote them. The first one would have
		// been the next leader.
		cancelFirst(reason)
		cancelThird(reason)
		for _, c := range []chan outcome{first, third} {
			if o := <-c; !errors.Is(o.err, reason) || strings.Contains(o.err.Error(), "may have happened") {
				t.Errorf("got %v, want the cause and no doubt", o.err)
			}
		}
		close(g.open)
		if o := <-leader; o.err != nil || o.seq != 1 {
			t.Errorf("leader: %+v", o)
		}
		if o := <-second; o.err != nil || o.seq != 2 {
			t.Errorf("second: %+v", o)
		}
		if o := <-fourth; o.err != nil || o.seq != 3 {
			t.Errorf("fourth: %+v", o)
		}
		storagetest.CheckLog(t, l, map[uint64]string{1: "leader", 2: "second", 3: "fourth"})

		// One leaves while another writes for it: it is in doubt, its record is there.
		g = newGate(mem)
		_, leader = call("leader")
		_, next := call("next")
		cancelTaken, taken := call("taken")
		g.open <- struct{}{} // the first batch; the second one, with both, waits
		synctest.Wait()
		cancelTaken(reason)
		if o := <-taken; !errors.Is(o.err, reason) || !strings.Contains(o.err.Error(), "may have happened") {
			t.Errorf("got %v, want the cause and the doubt", o.err)
		}
		close(g.open)
		if o := <-leader; o.err != nil {
			t.Error(o.err)
		}
		if o := <-next; o.err != nil {
			t.Error(o.err)
		}
		if n := storagetest.CheckLog(t, l, map[uint64]string{4: "leader", 5: "next", 6: "taken"}); n != 6 {
			t.Errorf("%d records, want 6", n)
		}
		closeLog(t, l)
	})
}

// TestTheLeadIsNeverLost cancels callers while another one syncs, so that some give
// up at the moment when the lead is passed to them. A lost lead hangs the log.
func TestTheLeadIsNeverLost(t *testing.T) {
	t.Parallel()
	mem := storagetest.NewCrashFS()
	l, err := openMem(mem, storage.LogOptions{SegmentSize: 16 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer closeLog(t, l)
	rounds := 3000
	if testing.Short() {
		rounds = 500
	}
	for range rounds {
		const callers = 6
		var ctxs [callers]context.Context
		var cancels [callers]context.CancelFunc
		for i := range callers {
			ctxs[i], cancels[i] = context.WithCancel(t.Context())
		}
		var next atomic.Int32
		mem.Fail(func(op storagetest.Op) storagetest.Fault {
			if op.Kind == storagetest.Sync {
				for range 3 {
					if i := next.Add(1); int(i) < callers {
						cancels[i]()
					}
				}
			}
			return storagetest.NoFault
		})
		var wg sync.WaitGroup
		for i := range callers {
			wg.Go(func() {
				if _, err := l.Append(ctxs[i], [][]byte{[]byte("x")}); err != nil && !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		for _, cancel := range cancels {
			cancel()
		}
		mem.Fail(nil)
		if _, err := l.Append(t.Context(), [][]byte{[]byte("x")}); err != nil {
			t.Fatal(err)
		}
	}
	storagetest.CheckLog(t, l, nil)
}

func TestCloseWaitsForTheWriterAndFailsTheOthers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		mem := storagetest.NewCrashFS()
		l := mustOpenMem(t, mem)
		g := newGate(mem)
		results := make(chan error, 3)
		for range 3 {
			go func() {
				_, err := l.Append(t.Context(), [][]byte{[]byte("x")})
				results <- err
			}()
			synctest.Wait()
		}
		closed := make(chan error)
		go func() { closed <- l.Close() }()
		synctest.Wait()
		select {
		case err := <-closed:
			t.Fatalf("Close returned %v while a caller was writing", err)
		default:
		}
		if _, err := openMem(mem, storage.LogOptions{LockTimeout: time.Millisecond}); !errors.Is(err, storage.ErrLocked) {
			t.Errorf("the folder is free while a caller is writing: %v", err)
		}
		close(g.open)
		if err := <-closed; err != nil {
			t.Error(err)
		}
		ok := 0
		for range 3 {
			switch err := <-results; {
			case err == nil:
				ok++
			case !errors.Is(err, storage.ErrClosed):
				t.Error(err)
			}
		}
		if ok != 1 {
			t.Errorf("%d callers were served, want the one that was writing", ok)
		}
		l = mustOpenMem(t, mem)
		if h := l.Head(); h.Sequence != 1 {
			t.Errorf("%d records, want 1", h.Sequence)
		}
		closeLog(t, l)
	})
}

// later returns a log whose newest record is that much later than the start of a
// synctest bubble.
func later(t *testing.T, d time.Duration) *storagetest.CrashFS {
	mem := storagetest.NewCrashFS()
	synctest.Test(t, func(t *testing.T) {
		l := mustOpenMem(t, mem)
		time.Sleep(d)
		if _, err := l.Append(t.Context(), [][]byte{[]byte("later")}); err != nil {
			t.Error(err)
		}
		closeLog(t, l)
	})
	return mem
}

func TestASmallStepBackGoesOnFromTheNewestRecord(t *testing.T) {
	t.Parallel()
	mem := later(t, 5*time.Minute-1)
	synctest.Test(t, func(t *testing.T) {
		l := mustOpenMem(t, mem)
		newest := l.Head().Time
		if got := time.Until(newest); got != 5*time.Minute-1 {
			t.Fatalf("the newest record is %v ahead", got)
		}
		if _, err := l.Append(t.Context(), [][]byte{[]byte("x")}); err != nil {
			t.Error(err)
		}
		if got := l.Head().Time; !got.Equal(newest) {
			t.Errorf("time %v, want %v", got, newest)
		}
		time.Sleep(10 * time.Minute)
		if _, err := l.Append(t.Context(), [][]byte{[]byte("x")}); err != nil {
			t.Error(err)
		}
		if got := l.Head().Time; !got.Equal(time.Now()) {
			t.Errorf("time %v, want %v", got, time.Now())
		}
		storagetest.CheckLog(t, l, nil)
		closeLog(t, l)
	})
}

func TestALargeStepBackIsRefused(t *testing.T) {
	t.Parallel()
	mem := later(t, 5*time.Minute)
	synctest.Test(t, func(t *testing.T) {
		l := mustOpenMem(t, mem)
		if _, err := l.Append(t.Context(), [][]byte{[]byte("x")}); !errors.Is(err, storage.ErrClock) {
			t.Errorf("got %v, want ErrClock", err)
		}
		// A head only repeats a time that is in the log.
		h := l.Head()
		h.Signature = []byte("s")
		if err := l.AppendHead(t.Context(), h); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Nanosecond)
		if _, err := l.Append(t.Context(), [][]byte{[]byte("x")}); err != nil {
			t.Errorf("once the clock is right again: %v", err)
		}
		closeLog(t, l)
	})
}

func TestALogKnowsItsOwnHeads(t *testing.T) {
	t.Parallel()
	mem := storagetest.NewCrashFS()
	l := mustOpenMem(t, mem)
	heads := []storage.Head{l.Head()}
	for range 12 {
		if _, err := l.Append(t.Context(), [][]byte{make([]byte, 500), []byte("x")}); err != nil {
			t.Fatal(err)
		}
		heads = append(heads, l.Head())
	}
	type answer struct{ same, known bool }
	ask := func(what string, h storage.Head, want answer) {
		t.Helper()
		if same, known, err := l.Holds(t.Context(), h); err != nil || (answer{same, known}) != want {
			t.Errorf("%s, at %d: same %t, known %t, want %+v", what, h.Sequence, same, known, want)
		}
	}
	change := func(h storage.Head, f func(*storage.Head)) storage.Head { f(&h); return h }
	for _, h := range heads {
		ask("a head it had", h, answer{true, true})
		ask("with another hash", change(h, func(h *storage.Head) { h.Hash[3]++ }), answer{false, true})
		ask("of another instance", change(h, func(h *storage.Head) { h.Instance++ }), answer{false, true})
		ask("within a batch, or beyond the end", change(h, func(h *storage.Head) { h.Sequence++ }), answer{false, true})
	}
	closeLog(t, l)
	l = mustOpenMem(t, mem)
	defer closeLog(t, l)
	ask("the newest one, opened again", heads[len(heads)-1], answer{true, true})
	for _, h := range heads {
		ask("one of a segment that was not read", h, answer{true, true})
		ask("of one, with another hash", change(h, func(h *storage.Head) { h.Hash[3]++ }), answer{false, true})
		ask("of one, within a batch", change(h, func(h *storage.Head) { h.Sequence++ }), answer{false, true})
	}
}

func TestHeadsOfLongAgoAreRefused(t *testing.T) {
	t.Parallel()
	l, err := openMem(storagetest.NewCrashFS(), storage.LogOptions{SegmentSize: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer closeLog(t, l)
	old := l.Head()
	old.Signature = []byte("s")
	for range 20000 {
		if _, err := l.Append(t.Context(), [][]byte{[]byte("x")}); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.AppendHead(t.Context(), old); err == nil {
		t.Error("a head of 20000 batches ago was accepted")
	}
	recent := l.Head()
	recent.Signature = []byte("s")
	for range 5000 {
		if _, err := l.Append(t.Context(), [][]byte{[]byte("x")}); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.AppendHead(t.Context(), recent); err != nil {
		t.Error(err)
	}
	if err := l.Verify(t.Context()); err != nil {
		t.Error(err)
	}
}
