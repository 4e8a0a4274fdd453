package storage_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/storagetest"
)

// sealed signs a checkpoint, for tests.
func sealed(c storage.Checkpoint) ([]byte, error) {
	return append([]byte("sealed "), c.SignedBytes()...), nil
}

func isSealed(c storage.Checkpoint) bool {
	want, _ := sealed(c)
	return bytes.Equal(c.Signature, want)
}

const checkpointFile = memDir + "/checkpoint"

func TestPruningLeavesACheckpoint(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		mem := storagetest.NewCrashFS()
		l := mustOpenMem(t, mem)
		var a acks
		for range 4 {
			if err := a.work(l, 8); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Hour)
		}
		before := time.Now().Add(-150 * time.Minute) // the first two of the four are older
		names, _ := mem.List(memDir)
		removed, err := l.Prune(t.Context(), before, sealed)
		if err != nil || removed == 0 {
			t.Fatalf("%d of %d segments removed, %v", removed, len(names), err)
		}
		c, ok := l.Checkpoint()
		if !ok || !isSealed(c) || !c.Time.Before(before) || c.Segment != uint64(removed)+1 || c.Pruned.IsZero() {
			t.Errorf("checkpoint %+v after %d segments", c, removed)
		}
		for round := range 2 {
			storagetest.CheckLog(t, l, a.records)
			for r, err := range l.Scan(t.Context(), 1) {
				if err != nil || r.Sequence != c.Sequence+1 {
					t.Errorf("the first record is %d, %v; %d were pruned", r.Sequence, err, c.Sequence)
				}
				break
			}
			for r, err := range l.Scan(t.Context(), l.Since(before)) {
				if err != nil || r.Sequence > c.Sequence+60 {
					t.Errorf("since the pruning: %d, %v", r.Sequence, err)
				}
				break
			}
			if same, known, err := l.Holds(t.Context(), storage.Head{Instance: 7, Sequence: c.Sequence, Hash: c.Hash}); !same || !known || err != nil {
				t.Errorf("the state at the checkpoint: %v, %v, %v", same, known, err)
			}
			if _, known, err := l.Holds(t.Context(), storage.Head{Instance: 7, Sequence: c.Sequence - 1}); known && round > 0 || err != nil {
				t.Errorf("a state that was pruned is known, %v", err)
			}
			if again, err := l.Prune(t.Context(), before, sealed); err != nil || again != 0 {
				t.Errorf("pruned once more: %d, %v", again, err)
			}
			closeLog(t, l)
			l = mustOpenMem(t, mem)
		}
		if err := a.work(l, 8); err != nil {
			t.Fatal(err)
		}
		storagetest.CheckLog(t, l, a.records)

		// Whoever prunes all leaves what comes next.
		time.Sleep(time.Hour)
		if _, err := l.Prune(t.Context(), time.Now(), sealed); err != nil {
			t.Fatal(err)
		}
		for r, err := range l.Scan(t.Context(), 1) {
			t.Errorf("record %d is left, %v", r.Sequence, err)
		}
		head := l.Head()
		closeLog(t, l)
		l = mustOpenMem(t, mem)
		if !l.Head().Equal(head) {
			t.Errorf("head %+v, before reopening %+v", l.Head(), head)
		}
		if err := a.work(l, 3); err != nil {
			t.Fatal(err)
		}
		storagetest.CheckLog(t, l, a.records)
		closeLog(t, l)
	})
}

// pruned is a log in memory that was pruned.
func pruned(t testing.TB) *storagetest.CrashFS {
	t.Helper()
	mem := storagetest.NewCrashFS()
	l, err := openMem(mem, storage.LogOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var a acks
	if err := a.work(l, 13); err != nil {
		t.Fatal(err)
	}
	if n, err := l.Prune(context.Background(), time.Now().Add(time.Hour), sealed); err != nil || n == 0 {
		t.Fatal(n, err)
	}
	if err := a.work(l, 13); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return mem
}

func TestAPrunedLogCannotBeCutAnywhereElse(t *testing.T) {
	t.Parallel()
	mem := pruned(t)
	names, _ := mem.List(memDir)
	if len(names) < 4 {
		t.Fatalf("only %v", names)
	}
	content := map[string][]byte{}
	for _, n := range names {
		b, err := mem.ReadFile(filepath.Join(memDir, n))
		if err != nil {
			t.Fatal(err)
		}
		content[n] = b
	}
	with := func(change func(fs *storagetest.CrashFS)) error {
		fs := storagetest.NewCrashFS()
		for n, b := range content {
			fs.WriteFile(filepath.Join(memDir, n), b)
		}
		change(fs)
		l, err := openMem(fs, storage.LogOptions{ReadOnly: true})
		if err != nil {
			return err
		}
		defer closeLog(t, l)
		if err := l.Verify(t.Context()); err != nil {
			return err
		}
		if c, _ := l.Checkpoint(); !isSealed(c) {
			return storage.ErrCorrupt
		}
		return nil
	}
	if err := with(func(*storagetest.CrashFS) {}); err != nil {
		t.Fatal(err)
	}
	if err := with(func(fs *storagetest.CrashFS) { fs.RemoveFile(checkpointFile) }); !errors.Is(err, storage.ErrCorrupt) {
		t.Errorf("without its checkpoint: %v", err)
	}
	cp := content["checkpoint"]
	for i := range cp {
		for _, x := range []byte{1, 0x80} {
			b := bytes.Clone(cp)
			b[i] ^= x
			if err := with(func(fs *storagetest.CrashFS) { fs.WriteFile(checkpointFile, b) }); err == nil {
				t.Errorf("byte %d of the checkpoint changed", i)
			}
		}
		if err := with(func(fs *storagetest.CrashFS) { fs.WriteFile(checkpointFile, cp[:i]) }); !errors.Is(err, storage.ErrCorrupt) {
			t.Errorf("checkpoint cut at %d: %v", i, err)
		}
	}
	last := names[len(names)-1]
	for _, n := range names {
		if n == "checkpoint" || n > last {
			continue
		}
		if err := with(func(fs *storagetest.CrashFS) { fs.RemoveFile(filepath.Join(memDir, n)) }); n != newest(names) && !errors.Is(err, storage.ErrCorrupt) {
			t.Errorf("without segment %s: %v", n, err)
		}
	}
}

func newest(names []string) string {
	out := ""
	for _, n := range names {
		if filepath.Ext(n) == ".seg" {
			out = max(out, n)
		}
	}
	return out
}

func TestNothingIsLostWhereverPruningFails(t *testing.T) {
	t.Parallel()
	runs := 0
	for faultName, fault := range faults {
		for n := 0; ; n++ {
			fs := storagetest.NewCrashFS()
			l := mustOpenMem(t, fs)
			var a acks
			if err := a.work(l, 13); err != nil {
				t.Fatal(err)
			}
			first, failed := len(fs.Ops()), false
			fs.Fail(func(op storagetest.Op) storagetest.Fault {
				if op.N == first+n {
					failed = true
					return fault
				}
				return storagetest.NoFault
			})
			_, err := l.Prune(t.Context(), time.Now().Add(time.Hour), sealed)
			fs.Fail(nil)
			if !failed {
				closeLog(t, l)
				break
			}
			runs++
			what := fmt.Sprintf("operation %d %s (%v)", n, faultName, err)
			c, _ := l.Checkpoint()
			for lossName, loss := range losses {
				crashed := fs.Crash(loss)
				a.check(t, crashed, what+", then "+lossName)
				after, err := openMem(crashed, storage.LogOptions{})
				if err != nil {
					t.Fatal(err)
				}
				if got, ok := after.Checkpoint(); ok && !isSealed(got) || got.Sequence < c.Sequence {
					t.Errorf("%s, then %s: checkpoint %+v, was %+v", what, lossName, got, c)
				}
				closeLog(t, after)
			}
			// The log goes on, if nothing that it needs failed, and prunes later.
			if l.Err() == nil {
				if err := a.work(l, 3); err != nil {
					t.Errorf("%s: appending afterwards: %v", what, err)
				}
				if _, err := l.Prune(t.Context(), time.Now().Add(time.Hour), sealed); err != nil {
					t.Errorf("%s: pruning afterwards: %v", what, err)
				}
			}
			closeLog(t, l)
			a.check(t, fs, what+", then a restart")
		}
	}
	if runs < 20 {
		t.Errorf("only %d failures", runs)
	}
	t.Logf("%d failures of pruning, each with %d kinds of crash", runs, len(losses))
}

func TestNothingIsPrunedWhileItIsRead(t *testing.T) {
	t.Parallel()
	l := mustOpenMem(t, storagetest.NewCrashFS())
	defer closeLog(t, l)
	var a acks
	if err := a.work(l, 13); err != nil {
		t.Fatal(err)
	}
	for range l.Scan(t.Context(), 1) {
		if n, err := l.Prune(t.Context(), time.Now().Add(time.Hour), sealed); n != 0 || err != nil {
			t.Fatalf("%d segments were removed under a reader, %v", n, err)
		}
		_, _ = l.Prune(t.Context(), time.Now().Add(time.Hour), sealed)
		break
	}
	if n := l.PruneSkipped(); n != 2 {
		t.Errorf("skipped %d times, not 2", n)
	}
	refused := errors.New("no key")
	if _, err := l.Prune(t.Context(), time.Now().Add(time.Hour), func(storage.Checkpoint) ([]byte, error) { return nil, refused }); !errors.Is(err, refused) {
		t.Errorf("without a signature: %v", err)
	}
	if _, ok := l.Checkpoint(); ok || l.Err() != nil {
		t.Errorf("a checkpoint that nobody signed, %v", l.Err())
	}
	if n, err := l.Prune(t.Context(), time.Now().Add(time.Hour), sealed); n == 0 || err != nil {
		t.Errorf("%d segments, %v", n, err)
	}
	if n := l.PruneSkipped(); n != 0 {
		t.Errorf("skipped %d times in a row after one that was not", n)
	}
	storagetest.CheckLog(t, l, a.records)
}

func TestReadingOnlyChangesNothing(t *testing.T) {
	t.Parallel()
	fs, a := torn(t)
	crashed := fs.Crash(storagetest.Loss{Keep: 100})
	crashed.WriteFile(memDir+"/000000000009.seg.tmp", []byte("left over"))
	before := len(crashed.Ops())
	l, err := openMem(crashed, storage.LogOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	storagetest.CheckLog(t, l, a.records)
	if l.Torn() != 100 {
		t.Errorf("%d bytes of an incomplete write, want 100", l.Torn())
	}
	h := l.Head()
	h.Signature = []byte("s")
	_, appendErr := l.Append(t.Context(), [][]byte{[]byte("x")})
	_, pruneErr := l.Prune(t.Context(), time.Now(), sealed)
	for what, err := range map[string]error{"Append": appendErr, "AppendHead": l.AppendHead(t.Context(), h), "Prune": pruneErr} {
		if !errors.Is(err, storage.ErrReadOnly) {
			t.Errorf("%s: %v, want ErrReadOnly", what, err)
		}
	}
	closeLog(t, l)
	if ops := crashed.Ops()[before:]; len(ops) != 0 {
		t.Errorf("operations: %v", ops)
	}
	if _, err := openMem(storagetest.NewCrashFS(), storage.LogOptions{ReadOnly: true}); err == nil {
		t.Error("a log that does not exist was opened")
	}
}

func TestFilesAreACopyOfTheLog(t *testing.T) {
	t.Parallel()
	for name, mem := range map[string]*storagetest.CrashFS{"whole": memLog(golden(t)...), "pruned": pruned(t)} {
		l, err := openMem(mem, storage.LogOptions{})
		if err != nil {
			t.Fatal(err)
		}
		copied := storagetest.NewCrashFS()
		err = l.Files(t.Context(), func(file string, size int64, r io.Reader) error {
			b, err := io.ReadAll(r)
			if int64(len(b)) != size {
				t.Errorf("%s: %d bytes, %d were told", file, len(b), size)
			}
			copied.WriteFile(filepath.Join(memDir, file), b)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		c, err := openMem(copied, storage.LogOptions{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		if !c.Head().Equal(l.Head()) || c.Verify(t.Context()) != nil {
			t.Errorf("%s: copied at %+v, the log is at %+v, %v", name, c.Head(), l.Head(), c.Verify(t.Context()))
		}
		closeLog(t, c)
		closeLog(t, l)
	}
}

// FuzzCheckpoint: a file that is taken for a checkpoint is one, byte by byte.
func FuzzCheckpoint(f *testing.F) {
	mem := pruned(f)
	good, err := mem.ReadFile(checkpointFile)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:40])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		again, err := storage.ReencodeCheckpoint(b)
		if err != nil {
			if !errors.Is(err, storage.ErrCorrupt) && !errors.Is(err, storage.ErrNewerFormat) {
				t.Errorf("%v", err)
			}
			return
		}
		if !bytes.Equal(again, b) {
			t.Errorf("%x was read and is written as %x", b, again)
		}
	})
}

// TestCheckpointGolden: what was written once must be read for ever.
func TestCheckpointGolden(t *testing.T) {
	t.Parallel()
	path := filepath.Join("testdata", "checkpoint")
	if *update {
		mem := pruned(t)
		b, err := mem.ReadFile(checkpointFile)
		if err == nil {
			err = os.WriteFile(path, b, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	again, err := storage.ReencodeCheckpoint(b)
	if err != nil || !bytes.Equal(again, b) {
		t.Errorf("the golden checkpoint %x is written as %x, %v", b, again, err)
	}
	b[11]++ // the version
	if _, err := storage.ReencodeCheckpoint(b); !errors.Is(err, storage.ErrNewerFormat) {
		t.Errorf("a newer version: %v", err)
	}
}
