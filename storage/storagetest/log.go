package storagetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-mesh/signet/storage"
)

// ClosableLog is a log that an engine opened.
type ClosableLog interface {
	storage.Log
	io.Closer
}

// LogPlace is where a log is, and what a test can do to it there.
type LogPlace struct {
	// Open opens the log.
	Open func() (ClosableLog, error)
	// Fail is as in StorePlace.
	Fail func(l ClosableLog, landed bool) (heal func())
	// Steal has another process take the log over while l, which cannot reach it
	// meanwhile, believes to have it; heal lets l reach it again. nil where that cannot
	// happen.
	Steal func(l ClosableLog) (other ClosableLog, heal func(), err error)
}

// Log tests that an engine keeps the contract of storage.Log, and prints how much it
// asked. fresh makes the place of an empty log.
func Log(t *testing.T, fresh func(t *testing.T) LogPlace) {
	c := &counts{}
	t.Cleanup(func() { t.Log(c) })
	for _, tc := range []struct {
		name string
		test func(*testing.T, *logTest)
	}{
		{"is empty at first", logEmpty},
		{"numbers records without gaps", logSequence},
		{"stamps the time", logTime},
		{"takes and refuses by size", logSizes},
		{"keeps what concurrent callers append", logConcurrent},
		{"keeps everything across reopening", logReopen},
		{"scans while others append", logScanConcurrent},
		{"stops a scan", logScanStops},
		{"shares no memory with callers", logCopies},
		{"has a head that depends on every record", logHead},
		{"records signed heads", logSignedHead},
		{"records a head that was signed long before", logLateHead},
		{"refuses heads that it never had", logBadHead},
		{"appends nothing for a context that ended", logContext},
		{"refuses everything once closed", logClosed},
		{"belongs to one at a time", logLocked},
		{"acknowledges nothing that it does not know", logFails},
		{"takes nothing from who lost it", logStolen},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			c.tests.Add(1)
			place := fresh(t)
			lt := &logTest{t: t, place: place, counts: c, openLog: place.Open}
			lt.reopen()
			t.Cleanup(func() {
				lt.check()
				lt.ClosableLog.Close()
			})
			tc.test(t, lt)
		})
	}
}

// logTest is the log of one test and what must be in it.
type logTest struct {
	ClosableLog
	t       *testing.T
	place   LogPlace
	counts  *counts
	openLog func() (ClosableLog, error)
	closed  bool

	mu     sync.Mutex
	want   map[uint64]string // acknowledged records
	unsure int               // records of which nobody knows
}

func (l *logTest) reopen() {
	l.t.Helper()
	if l.ClosableLog != nil {
		if err := l.Close(); err != nil {
			l.t.Fatal(err)
		}
	}
	var err error
	if l.ClosableLog, err = l.openLog(); err != nil {
		l.t.Fatal(err)
	}
}

// append appends records and returns the last one's sequence.
func (l *logTest) append(records ...string) uint64 {
	l.t.Helper()
	data := make([][]byte, len(records))
	for i, r := range records {
		data[i] = []byte(r)
	}
	last, err := l.Append(context.Background(), data)
	if err != nil {
		l.t.Error(err)
		return 0
	}
	l.acknowledged(last, records...)
	return last
}

// acknowledged notes records that Append said are there.
func (l *logTest) acknowledged(last uint64, records ...string) {
	l.t.Helper()
	l.counts.records.Add(int64(len(records)))
	l.counts.appends.Add(1)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.want == nil {
		l.want = map[uint64]string{}
	}
	for i, r := range records {
		seq := last - uint64(len(records)-1-i)
		if old, twice := l.want[seq]; twice {
			l.t.Errorf("sequence %d given to %.40q and %.40q", seq, old, r)
		}
		l.want[seq] = r
	}
}

// check verifies what holds for every log at every time.
func (l *logTest) check() {
	l.t.Helper()
	if l.closed {
		return
	}
	n := CheckLog(l.t, l.ClosableLog, l.want)
	l.counts.scanned.Add(int64(n))
	if n < len(l.want) || n > len(l.want)+l.unsure {
		l.t.Errorf("log has %d records, %d were appended and of %d nobody knows", n, len(l.want), l.unsure)
	}
}

// CheckLog verifies that a log can be read, has no gap, no time that goes back, a
// head that is its last record's, a signed head that it had, and the records that
// were acknowledged. It returns how many records there are, pruned ones included.
func CheckLog(t testing.TB, l storage.Log, acknowledged map[uint64]string) int {
	t.Helper()
	n, missing := 0, len(acknowledged)
	var last time.Time
	if p, ok := l.(interface {
		Checkpoint() (storage.Checkpoint, bool)
	}); ok {
		// What was pruned is not missing.
		c, _ := p.Checkpoint()
		n, last = int(c.Sequence), c.Time
		for seq := range acknowledged {
			if seq <= c.Sequence {
				missing--
			}
		}
	}
	head := l.Head()
	for r, err := range l.Scan(context.Background(), 0) {
		if err != nil {
			t.Errorf("scan: %v", err)
			return n
		}
		if n++; r.Sequence != uint64(n) {
			t.Errorf("record %d has sequence %d", n, r.Sequence)
			return n
		}
		if r.Time.Before(last) {
			t.Errorf("record %d is of %v, the one before of %v", n, r.Time, last)
		}
		last = r.Time
		if want, ok := acknowledged[r.Sequence]; ok {
			missing--
			if want != string(r.Data) {
				t.Errorf("record %d is %.40q, want %.40q", n, r.Data, want)
			}
		}
	}
	if missing != 0 {
		t.Errorf("%d acknowledged records are missing", missing)
	}
	if head.Sequence != uint64(n) || !head.Time.Equal(last) {
		t.Errorf("head is at %d of %v, last record %d of %v", head.Sequence, head.Time, n, last)
	}
	if signed, ok := l.SignedHead(); ok && signed.Sequence > head.Sequence {
		t.Errorf("signed head at %d, log ends at %d", signed.Sequence, head.Sequence)
	}
	if v, ok := l.(interface{ Verify(context.Context) error }); ok {
		if err := v.Verify(context.Background()); err != nil {
			t.Error(err)
		}
	}
	return n
}

func logEmpty(t *testing.T, l *logTest) {
	h := l.Head()
	if h.Instance == 0 || h.Sequence != 0 || h.Hash == [32]byte{} || !h.Time.IsZero() || h.Signature != nil {
		t.Errorf("head %+v", h)
	}
	if h, ok := l.SignedHead(); ok {
		t.Errorf("signed head %+v", h)
	}
	for _, from := range []uint64{0, 1, 2} {
		for r, err := range l.Scan(t.Context(), from) {
			t.Errorf("scan: %+v, %v", r, err)
		}
	}
	l.reopen()
	if got := l.Head(); !got.Equal(h) {
		t.Errorf("head %+v, before reopening %+v", got, h)
	}
}

func logSequence(t *testing.T, l *logTest) {
	if got := l.append("one"); got != 1 {
		t.Errorf("first sequence %d", got)
	}
	if got := l.append("two", "three", "four"); got != 4 {
		t.Errorf("sequence %d, want 4", got)
	}
	if got := l.append("five"); got != 5 {
		t.Errorf("sequence %d, want 5", got)
	}
	for from := uint64(0); from <= 7; from++ {
		next := max(from, 1)
		for r, err := range l.Scan(t.Context(), from) {
			if err != nil || r.Sequence != next || string(r.Data) != l.want[next] {
				t.Fatalf("from %d: record %d %q, %v; want %d %q", from, r.Sequence, r.Data, err, next, l.want[next])
			}
			next++
		}
		if next != max(from, 6) {
			t.Errorf("scan from %d ended before %d", from, next)
		}
	}
}

func logTime(t *testing.T, l *logTest) {
	before := time.Now()
	l.append("a")
	after := time.Now()
	got := l.Head().Time
	if got.Before(before.Round(0)) || got.After(after.Round(0)) || got.Location() != time.UTC {
		t.Errorf("time %v, appended between %v and %v", got, before, after)
	}
	for r, err := range l.Scan(t.Context(), 1) {
		if err != nil || !r.Time.Equal(got) {
			t.Errorf("record of %v, head of %v, %v", r.Time, got, err)
		}
	}
}

func logSizes(t *testing.T, l *logTest) {
	l.append(string(make([]byte, storage.MaxRecord)), "x")
	many := make([]string, storage.MaxRecords)
	for i := range many {
		many[i] = fmt.Sprintf("record %d", i)
	}
	l.append(many...)
	bad := map[string][][]byte{
		"no records":             {},
		"an empty record":        {[]byte("x"), {}},
		"a record too large":     {[]byte("x"), make([]byte, storage.MaxRecord+1)},
		"too many records":       make([][]byte, storage.MaxRecords+1),
		"too many bytes of them": make([][]byte, storage.MaxAppend/storage.MaxRecord+1),
	}
	for i := range bad["too many records"] {
		bad["too many records"][i] = []byte("x")
	}
	for i := range bad["too many bytes of them"] {
		bad["too many bytes of them"][i] = make([]byte, storage.MaxRecord)
	}
	head := l.Head()
	for name, records := range bad {
		if _, err := l.Append(t.Context(), records); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
	if !l.Head().Equal(head) {
		t.Error("a refused append changed the log")
	}
	// The largest append of all.
	largest := make([]string, storage.MaxAppend/storage.MaxRecord-1)
	for i := range largest {
		largest[i] = string(bytes.Repeat([]byte{byte(i)}, storage.MaxRecord))
	}
	largest = append(largest, string(make([]byte, storage.MaxRecord-4*(len(largest)+1))))
	l.append(largest...)
}

func logConcurrent(t *testing.T, l *logTest) {
	const callers, each = 16, 12
	var wg sync.WaitGroup
	for c := range callers {
		wg.Go(func() {
			last := uint64(0)
			for i := range each {
				records := make([]string, 1+rand.IntN(3))
				for j := range records {
					records[j] = fmt.Sprintf("caller %d, call %d, record %d", c, i, j)
				}
				got := l.append(records...)
				if got < last+uint64(len(records)) {
					t.Errorf("caller %d: sequence %d after %d", c, got, last)
				}
				last = got
			}
		})
	}
	wg.Wait()
}

func logReopen(t *testing.T, l *logTest) {
	for i := range 5 {
		l.append(fmt.Sprintf("record %d", i), "and one more")
		h := l.Head()
		h.Signature = fmt.Appendf(nil, "signature %d", i)
		if i%2 == 0 {
			if err := l.AppendHead(t.Context(), h); err != nil {
				t.Fatal(err)
			}
		}
		head := l.Head()
		signed, ok := l.SignedHead()
		l.check()
		l.reopen()
		l.check()
		if got := l.Head(); !got.Equal(head) {
			t.Errorf("head %+v, before reopening %+v", got, head)
		}
		if got, gotOK := l.SignedHead(); !got.Equal(signed) || gotOK != ok {
			t.Errorf("signed head %+v, before reopening %+v", got, signed)
		}
	}
}

func logScanConcurrent(t *testing.T, l *logTest) {
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				l.append(fmt.Sprintf("record %d", i))
			}
		}
	})
	for range 20 {
		least, n := l.Head().Sequence, uint64(0)
		for r, err := range l.Scan(t.Context(), 1) {
			if n++; err != nil || r.Sequence != n {
				t.Fatalf("record %d has sequence %d, %v", n, r.Sequence, err)
			}
		}
		if n < least {
			t.Errorf("scan ended at %d, the log had %d before", n, least)
		}
	}
	close(stop)
	wg.Wait()
}

func logScanStops(t *testing.T, l *logTest) {
	l.append("a", "b")
	l.append("c")
	n := 0
	for range l.Scan(t.Context(), 1) {
		n++
		break
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("no longer wanted")
	cancel(reason)
	for _, err := range l.Scan(ctx, 1) {
		if n++; !errors.Is(err, reason) {
			t.Errorf("got %v, want the cause", err)
		}
	}
	if n != 2 {
		t.Errorf("%d steps, want 2", n)
	}
}

func logCopies(t *testing.T, l *logTest) {
	data := []byte("record")
	if _, err := l.Append(t.Context(), [][]byte{data, data}); err != nil {
		t.Fatal(err)
	}
	l.want = map[uint64]string{1: "record", 2: "record"}
	copy(data, "XXXXXX")
	for r, err := range l.Scan(t.Context(), 1) {
		if err != nil || string(r.Data) != "record" {
			t.Errorf("record %q, %v", r.Data, err)
		}
		copy(r.Data, "YYYYYY")
		_ = append(r.Data, "ZZZZZZ..."...) // must not reach the next record
	}
	// What a scan yielded stays while it goes on.
	for i := range 12 {
		l.append(string(bytes.Repeat([]byte{byte('a' + i)}, 60_000)))
	}
	var kept [][]byte
	for r, err := range l.Scan(t.Context(), 1) {
		if err != nil {
			t.Fatal(err)
		}
		kept = append(kept, r.Data)
	}
	for i, data := range kept {
		if want := l.want[uint64(i)+1]; string(data) != want {
			t.Errorf("record %d became %.10q…, was %.10q…", i+1, data, want)
		}
	}
	h := l.Head()
	h.Signature = []byte("signature")
	if err := l.AppendHead(t.Context(), h); err != nil {
		t.Fatal(err)
	}
	copy(h.Signature, "XXXXXXXXX")
	h, _ = l.SignedHead()
	copy(h.Signature, "YYYYYYYYY")
	if h, _ = l.SignedHead(); string(h.Signature) != "signature" {
		t.Errorf("signature %q", h.Signature)
	}
}

func logHead(t *testing.T, l *logTest) {
	seen := map[[32]byte]bool{l.Head().Hash: true}
	for range 5 {
		last := l.append("the same")
		h := l.Head()
		if seen[h.Hash] || h.Sequence != last {
			t.Errorf("head %+v after record %d", h, last)
		}
		seen[h.Hash] = true
	}
}

func logSignedHead(t *testing.T, l *logTest) {
	sign := func(h storage.Head, s string) storage.Head { h.Signature = []byte(s); return h }
	record := func(h storage.Head) {
		t.Helper()
		if err := l.AppendHead(t.Context(), h); err != nil {
			t.Fatal(err)
		}
		if got, ok := l.SignedHead(); !ok || !got.Equal(h) {
			t.Fatalf("signed head %+v, want %+v", got, h)
		}
	}
	record(sign(l.Head(), "of an empty log"))
	l.append("a")
	h1 := sign(l.Head(), "first")
	l.append("b")
	record(h1) // signed while others appended
	record(sign(l.Head(), "second"))
	record(sign(l.Head(), "second, by another key"))
	if err := l.AppendHead(t.Context(), h1); err == nil {
		t.Error("an older head was accepted")
	}
	l.append("c")
	record(sign(l.Head(), string(bytes.Repeat([]byte{1}, storage.MaxSignature))))
	l.reopen()
	record(sign(l.Head(), "after reopening"))
}

// logLateHead: a head is recorded after others have appended so much since it was signed
// that it lies far behind; the log opens all the same, and still has it.
func logLateHead(t *testing.T, l *logTest) {
	for i := range 8 {
		h := l.Head()
		h.Signature = fmt.Appendf(nil, "signature %d", i)
		for range i {
			l.append(strings.Repeat("x", 2000), strings.Repeat("y", 2000))
		}
		if err := l.AppendHead(t.Context(), h); err != nil {
			t.Fatal(err)
		}
		l.reopen()
		if got, ok := l.SignedHead(); !ok || !got.Equal(h) {
			t.Fatalf("signed head %+v after opening again, want %+v", got, h)
		}
		l.append("z")
	}
}

func logBadHead(t *testing.T, l *logTest) {
	l.append("a")
	l.append("b", "c")
	good := l.Head()
	good.Signature = []byte("signature")
	for name, change := range map[string]func(*storage.Head){
		"of another instance":        func(h *storage.Head) { h.Instance++ },
		"of the future":              func(h *storage.Head) { h.Sequence++ },
		"in the middle of an append": func(h *storage.Head) { h.Sequence-- },
		"with another record's hash": func(h *storage.Head) { h.Sequence = 1 },
		"with another hash":          func(h *storage.Head) { h.Hash[0]++ },
		"with another time":          func(h *storage.Head) { h.Time = h.Time.Add(1) },
		"without a signature":        func(h *storage.Head) { h.Signature = nil },
		"with a huge signature":      func(h *storage.Head) { h.Signature = make([]byte, storage.MaxSignature+1) },
	} {
		h := good
		change(&h)
		if err := l.AppendHead(t.Context(), h); err == nil {
			t.Errorf("a head %s was accepted", name)
		}
	}
	if h, ok := l.SignedHead(); ok {
		t.Errorf("signed head %+v", h)
	}
	if err := l.AppendHead(t.Context(), good); err != nil {
		t.Error(err)
	}
}

func logContext(t *testing.T, l *logTest) {
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("no longer wanted")
	cancel(reason)
	if _, err := l.Append(ctx, [][]byte{[]byte("a")}); !errors.Is(err, reason) {
		t.Errorf("got %v, want the cause", err)
	}
	l.append("b")
}

func logClosed(t *testing.T, l *logTest) {
	l.append("a")
	head := l.Head()
	head.Signature = []byte("s")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l.closed = true
	if err := l.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if _, err := l.Append(t.Context(), [][]byte{[]byte("b")}); !errors.Is(err, storage.ErrClosed) {
		t.Errorf("Append: %v", err)
	}
	if err := l.AppendHead(t.Context(), head); !errors.Is(err, storage.ErrClosed) {
		t.Errorf("AppendHead: %v", err)
	}
	for _, err := range l.Scan(t.Context(), 1) {
		if !errors.Is(err, storage.ErrClosed) {
			t.Errorf("Scan: %v", err)
		}
	}
}
