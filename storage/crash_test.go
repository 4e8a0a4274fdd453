package storage_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"testing"

	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/storagetest"
)

const memDir = "/data/log"

// openMem opens a log in memory.
func openMem(fs *storagetest.CrashFS, opt storage.LogOptions) (*storage.FileLog, error) {
	opt.Instance, opt.FS = 7, fs
	if opt.SegmentSize == 0 {
		opt.SegmentSize = 4096
	}
	return storage.OpenLog(memDir, opt)
}

func mustOpenMem(t testing.TB, fs *storagetest.CrashFS) *storage.FileLog {
	t.Helper()
	l, err := openMem(fs, storage.LogOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func closeLog(t testing.TB, l *storage.FileLog) {
	t.Helper()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

// acks is what a log has acknowledged.
type acks struct {
	records map[uint64]string
	signed  uint64
}

// work uses a log until something fails: small and large batches, rotations, and
// signed heads. It adds what was acknowledged to a and returns the first error.
func (a *acks) work(l *storage.FileLog, rounds int) error {
	if a.records == nil {
		a.records = map[uint64]string{}
	}
	ctx := context.Background()
	for i := range rounds {
		var records [][]byte
		for j := range 1 + i%3 {
			records = append(records, fmt.Appendf(nil, "round %d, record %d, %0*d", i, j, 500*(i%4), 0))
		}
		last, err := l.Append(ctx, records)
		if err != nil {
			return err
		}
		for j, r := range records {
			a.records[last-uint64(len(records)-1-j)] = string(r)
		}
		if i%3 == 0 {
			h := l.Head()
			h.Signature = fmt.Appendf(nil, "signature %d", i)
			if err := l.AppendHead(ctx, h); err != nil {
				return err
			}
			a.signed = h.Sequence
		}
	}
	return nil
}

// check opens the log that a crash left, verifies that nothing acknowledged is
// missing, and goes on with it.
func (a *acks) check(t *testing.T, fs *storagetest.CrashFS, what string) {
	t.Helper()
	l, err := openMem(fs, storage.LogOptions{})
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	storagetest.CheckLog(t, l, a.records)
	if signed, _ := l.SignedHead(); signed.Sequence < a.signed {
		t.Errorf("signed head at %d, %d was acknowledged", signed.Sequence, a.signed)
	}
	// What was read is durable now: heads may be signed over it.
	before := l.Head()
	again, err := openMem(fs.Crash(storagetest.Loss{}), storage.LogOptions{})
	if err != nil {
		t.Fatalf("%s, and once more: %v", what, err)
	}
	if !again.Head().Equal(before) {
		t.Errorf("head %+v was not durable, now %+v", before, again.Head())
	}
	closeLog(t, again)

	b := acks{records: map[uint64]string{}, signed: a.signed}
	for k, v := range a.records {
		b.records[k] = v
	}
	if err := b.work(l, 4); err != nil {
		t.Errorf("appending after recovery: %v", err)
	}
	storagetest.CheckLog(t, l, b.records)
	closeLog(t, l)
	if t.Failed() {
		t.Fatalf("failed: %s", what)
	}
}

var losses = map[string]storagetest.Loss{
	"everything unsynced lost":        {},
	"only names kept":                 {Names: true},
	"a process crash, nothing lost":   {Keep: math.MaxInt32, Names: true},
	"bytes kept, names lost":          {Keep: math.MaxInt32},
	"lost bytes read as zeros":        {Zeros: true, Names: true},
	"the first 40 bytes kept":         {Keep: 40, Names: true},
	"the last 40 bytes kept":          {Keep: 40, Newest: true, Zeros: true, Names: true},
	"the first 200 bytes, then zeros": {Keep: 200, Zeros: true},
}

var faults = map[string]storagetest.Fault{
	"not persisted":           storagetest.NotPersisted,
	"persisted but error":     storagetest.Persisted,
	"partly done":             storagetest.Partial,
	"forgotten by the kernel": storagetest.Forgotten,
}

const workRounds = 13

func TestNoAcknowledgedRecordIsLostWhicheverOperationFails(t *testing.T) {
	t.Parallel()
	clean := storagetest.NewCrashFS()
	l := mustOpenMem(t, clean)
	var all acks
	if err := all.work(l, workRounds); err != nil {
		t.Fatal(err)
	}
	closeLog(t, l)
	names, _ := clean.List(memDir)
	if len(names) < 3 {
		t.Fatalf("the work fills only %d segments", len(names))
	}
	for faultName, fault := range faults {
		t.Run(faultName, func(t *testing.T) {
			t.Parallel()
			for n, op := range clean.Ops() {
				if testing.Short() && n%3 != int(fault)%3 {
					continue
				}
				fs := storagetest.NewCrashFS()
				fs.FailNth(n, fault)
				var a acks
				l, err := openMem(fs, storage.LogOptions{})
				if err == nil {
					if err = a.work(l, workRounds); !errors.Is(err, storage.ErrNotDurable) || !errors.Is(err, storagetest.ErrInjected) {
						t.Fatalf("failed %v: work returned %v", op, err)
					}
					stays(t, fs, l)
				} else if !errors.Is(err, storagetest.ErrInjected) {
					t.Fatalf("failed %v: OpenLog returned %v", op, err)
				}
				for lossName, loss := range losses {
					a.check(t, fs.Crash(loss), fmt.Sprintf("failed %v, then %s", op, lossName))
				}
				if l != nil {
					// Opened again without a crash, as a supervisor does.
					closeLog(t, l)
				}
				fs.Fail(nil)
				a.check(t, fs, fmt.Sprintf("failed %v, then a restart", op))
			}
		})
	}
}

// stays verifies that a log that saw a failed write touches nothing anymore.
func stays(t *testing.T, fs *storagetest.CrashFS, l *storage.FileLog) {
	t.Helper()
	before := len(fs.Ops())
	head := l.Head()
	for range 3 {
		if _, err := l.Append(context.Background(), [][]byte{[]byte("late")}); !errors.Is(err, storage.ErrNotDurable) {
			t.Fatalf("Append after a failed write: %v", err)
		}
		h := l.Head()
		h.Signature = []byte("s")
		if err := l.AppendHead(context.Background(), h); !errors.Is(err, storage.ErrNotDurable) {
			t.Fatalf("AppendHead after a failed write: %v", err)
		}
	}
	if after := fs.Ops(); len(after) != before {
		t.Fatalf("operations after a failed write: %v", after[before:])
	}
	if !l.Head().Equal(head) {
		t.Fatal("the head moved after a failed write")
	}
	// What was acknowledged can still be read.
	storagetest.CheckLog(t, l, nil)
}

// torn returns what a crash can leave when the last of three writes was not synced:
// the file system, and what was acknowledged.
func torn(t *testing.T) (*storagetest.CrashFS, acks) {
	t.Helper()
	fs := storagetest.NewCrashFS()
	l := mustOpenMem(t, fs)
	var a acks
	if err := a.work(l, 2); err != nil {
		t.Fatal(err)
	}
	fs.Fail(func(op storagetest.Op) storagetest.Fault {
		if op.Kind == storagetest.Sync {
			return storagetest.NotPersisted
		}
		return storagetest.NoFault
	})
	if _, err := l.Append(context.Background(), [][]byte{[]byte("not acknowledged"), make([]byte, 200)}); !errors.Is(err, storage.ErrNotDurable) {
		t.Fatalf("Append without fsync: %v", err)
	}
	closeLog(t, l)
	return fs, a
}

func TestAWriteTornAtAnyByteIsCut(t *testing.T) {
	t.Parallel()
	fs, a := torn(t)
	unsynced := fs.Unsynced()
	if unsynced < 250 {
		t.Fatalf("only %d unsynced bytes", unsynced)
	}
	step := 1
	if testing.Short() {
		step = 7
	}
	for keep := 0; keep <= unsynced; keep += step {
		for _, loss := range []storagetest.Loss{
			{Keep: keep},
			{Keep: keep, Zeros: true},
			{Keep: keep, Zeros: true, Newest: true},
		} {
			crashed := fs.Crash(loss)
			a.check(t, crashed, fmt.Sprintf("%+v", loss))
			l := mustOpenMem(t, fs.Crash(loss))
			if got, least := l.Head().Sequence, uint64(len(a.records)); got != least && got != least+2 {
				t.Errorf("%+v: %d records, want %d or all of the last write", loss, got, least)
			}
			if keep == unsynced && l.Head().Sequence != uint64(len(a.records)+2) {
				t.Errorf("a write that reached the disk whole was cut")
			}
			closeLog(t, l)
		}
	}
}

func TestRecoveryItselfMayFailAnywhere(t *testing.T) {
	t.Parallel()
	fs, a := torn(t)
	for _, first := range []storagetest.Loss{{Keep: 100}, {Keep: 100, Zeros: true, Names: true}, {Keep: math.MaxInt32}} {
		for faultName, fault := range faults {
			for n := 0; ; n++ {
				crashed := fs.Crash(first)
				crashed.FailNth(n, fault)
				l, err := openMem(crashed, storage.LogOptions{})
				if err == nil {
					closeLog(t, l)
					if n < 3 {
						t.Fatalf("recovery has only %d operations", n)
					}
					break
				}
				if !errors.Is(err, storagetest.ErrInjected) {
					t.Fatalf("operation %d %s: %v", n, faultName, err)
				}
				crashed.Fail(nil)
				what := fmt.Sprintf("%+v, recovery's operation %d %s", first, n, faultName)
				for lossName, loss := range losses {
					a.check(t, crashed.Crash(loss), what+", then "+lossName)
				}
				a.check(t, crashed, what+", then a restart")
			}
		}
	}
}

func TestAnUnfinishedSegmentIsRemoved(t *testing.T) {
	t.Parallel()
	fs := storagetest.NewCrashFS()
	var a acks
	l := mustOpenMem(t, fs)
	if err := a.work(l, 2); err != nil {
		t.Fatal(err)
	}
	closeLog(t, l)
	fs.WriteFile(memDir+"/000000000002.seg.tmp", []byte("half a header"))
	fs.WriteFile(memDir+"/notes.txt", []byte("not ours"))
	a.check(t, fs, "with a file left over")
	if _, err := fs.ReadFile(memDir + "/000000000002.seg.tmp"); err == nil {
		t.Error("the unfinished segment is still there")
	}
	if _, err := fs.ReadFile(memDir + "/notes.txt"); err != nil {
		t.Error("a file that is not ours was removed")
	}
}

func TestFsyncComesBeforeTheAnswer(t *testing.T) {
	t.Parallel()
	fs := storagetest.NewCrashFS()
	l := mustOpenMem(t, fs)
	defer closeLog(t, l)
	for i := range 40 {
		record := fmt.Appendf(nil, "the record with number %d", i)
		if fs.Durable(record) {
			t.Fatal("durable before it was appended")
		}
		if _, err := l.Append(context.Background(), [][]byte{record, make([]byte, 300)}); err != nil {
			t.Fatal(err)
		}
		if !fs.Durable(record) || fs.Unsynced() != 0 {
			t.Fatalf("record %d was acknowledged before it was durable; %d bytes are unsynced", i, fs.Unsynced())
		}
		fs.Mark("answered")
	}
	last := storagetest.Kind("")
	for _, op := range fs.Ops() {
		if op.Kind == storagetest.Mark && last != storagetest.Sync {
			t.Errorf("%v follows %s, want a sync", op, last)
		}
		last = op.Kind
	}
}
