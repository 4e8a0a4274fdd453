package storage_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/storage"
)

func openBolt(t testing.TB, path string, opt storage.BoltOptions) *storage.Bolt {
	t.Helper()
	b, err := storage.OpenBolt(path, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

// newBolt is an empty store whose file is checked at the end.
func newBolt(t testing.TB, opt storage.BoltOptions) (*storage.Bolt, string) {
	t.Helper()
	path := filepath.Join(privateDir(t), "state.db")
	t.Cleanup(func() { checkBolt(t, path) })
	return openBolt(t, path, opt), path
}

func put(key, value string) []storage.Op {
	return []storage.Op{{Key: key, Value: []byte(value)}}
}

func mustCommit(t testing.TB, b *storage.Bolt, ops []storage.Op) uint64 {
	t.Helper()
	rev, err := b.Commit(context.Background(), nil, ops)
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

func value(t testing.TB, b *storage.Bolt, key string) string {
	t.Helper()
	e, err := b.Get(context.Background(), key)
	if err != nil {
		return err.Error()
	}
	return string(e.Value)
}

func closeBolt(t testing.TB, b *storage.Bolt) {
	t.Helper()
	if err := b.Close(); err != nil {
		t.Error(err)
	}
}

// editBolt changes a store's file the way another program could.
func editBolt(t testing.TB, path string, edit func(tx *bbolt.Tx) error) {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(db.Update(edit), db.Close()); err != nil {
		t.Fatal(err)
	}
}

func setMeta(key string, value []byte) func(*bbolt.Tx) error {
	return func(tx *bbolt.Tx) error { return tx.Bucket([]byte("meta")).Put([]byte(key), value) }
}

func TestOpenBoltRefuses(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		prepare func(t *testing.T, path string) // path holds a store
		opt     storage.BoltOptions
		want    string
		is      error
	}{
		"a missing file that must exist": {func(t *testing.T, path string) { remove(t, path) }, storage.BoltOptions{MustExist: true}, path0, fs.ErrNotExist},
		"a missing folder":               {func(t *testing.T, path string) { remove(t, filepath.Dir(path)) }, storage.BoltOptions{}, path0, fs.ErrNotExist},
		"a file that its group reads":    {func(t *testing.T, path string) { chmod(t, path, 0o640) }, storage.BoltOptions{}, "chmod 600", nil},
		"a file that others write":       {func(t *testing.T, path string) { chmod(t, path, 0o602) }, storage.BoltOptions{}, "chmod 600", nil},
		"a folder that others read":      {func(t *testing.T, path string) { chmod(t, filepath.Dir(path), 0o755) }, storage.BoltOptions{}, "chmod 700", nil},
		"a link": {func(t *testing.T, path string) {
			if err := errors.Join(os.Rename(path, path+".real"), os.Symlink(path+".real", path)); err != nil {
				t.Fatal(err)
			}
		}, storage.BoltOptions{}, "not a regular file", nil},
		"an empty file": {func(t *testing.T, path string) {
			if err := os.Truncate(path, 0); err != nil {
				t.Fatal(err)
			}
		}, storage.BoltOptions{}, "the file is empty", storage.ErrCorrupt},
		"something else": {func(t *testing.T, path string) {
			if err := os.WriteFile(path, bytes.Repeat([]byte("text "), 20000), 0o600); err != nil {
				t.Fatal(err)
			}
		}, storage.BoltOptions{}, "restore it from a backup", storage.ErrCorrupt},
		"another program's database": {func(t *testing.T, path string) {
			editBolt(t, path, func(tx *bbolt.Tx) error { return tx.DeleteBucket([]byte("meta")) })
		}, storage.BoltOptions{}, "not a store of signet-ca", storage.ErrCorrupt},
		"a store without its state": {func(t *testing.T, path string) {
			editBolt(t, path, func(tx *bbolt.Tx) error { return tx.DeleteBucket([]byte("state")) })
		}, storage.BoltOptions{}, "no state or no revision in it", storage.ErrCorrupt},
		"a database without a format": {func(t *testing.T, path string) {
			editBolt(t, path, setMeta("format", nil))
		}, storage.BoltOptions{}, "not a store of signet-ca", storage.ErrCorrupt},
		"format 0": {func(t *testing.T, path string) {
			editBolt(t, path, setMeta("format", make([]byte, 4)))
		}, storage.BoltOptions{}, "format 0", storage.ErrCorrupt},
		"a newer format": {func(t *testing.T, path string) {
			editBolt(t, path, setMeta("format", binary.BigEndian.AppendUint32(nil, 2)))
		}, storage.BoltOptions{}, "format 2, this version knows 1: written by a newer signet-ca; use that version", storage.ErrNewerFormat},
		"a broken revision": {func(t *testing.T, path string) {
			editBolt(t, path, setMeta("revision", []byte("x")))
		}, storage.BoltOptions{}, "no state or no revision in it", storage.ErrCorrupt},
		"a revision that went back": {func(t *testing.T, path string) {
			editBolt(t, path, setMeta("revision", make([]byte, 8)))
		}, storage.BoltOptions{}, `entry "a" has revision 1, the store 0`, storage.ErrCorrupt},
		"an entry that was changed": {func(t *testing.T, path string) {
			editBolt(t, path, func(tx *bbolt.Tx) error {
				b := tx.Bucket([]byte("state"))
				v := bytes.Clone(b.Get([]byte("a")))
				v[len(v)-1] ^= 1
				return b.Put([]byte("a"), v)
			})
		}, storage.BoltOptions{}, `entry "a": wrong checksum`, storage.ErrCorrupt},
		"an entry under another key": {func(t *testing.T, path string) {
			editBolt(t, path, func(tx *bbolt.Tx) error {
				b := tx.Bucket([]byte("state"))
				return b.Put([]byte("b"), bytes.Clone(b.Get([]byte("a"))))
			})
		}, storage.BoltOptions{}, `entry "b": wrong checksum`, storage.ErrCorrupt},
		"a bucket among the entries": {func(t *testing.T, path string) {
			editBolt(t, path, func(tx *bbolt.Tx) error {
				_, err := tx.Bucket([]byte("state")).CreateBucket([]byte("b"))
				return err
			})
		}, storage.BoltOptions{}, `key "b" of bucket "state" is no entry`, storage.ErrCorrupt},
		"a tiny maximum size": {nil, storage.BoltOptions{MaxSize: 1000}, "maximum size 1000", nil},
		"a negative timeout":  {nil, storage.BoltOptions{LockTimeout: -1}, "negative", nil},
		"a negative history":  {nil, storage.BoltOptions{History: -1}, "history of -1", nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(privateDir(t), "folder", "state.db")
			if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			b := openBolt(t, path, storage.BoltOptions{})
			mustCommit(t, b, put("a", "1"))
			closeBolt(t, b)
			if tc.prepare != nil {
				tc.prepare(t, path)
			}
			before, _ := os.ReadFile(path)
			_, err := storage.OpenBolt(path, tc.opt)
			if err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), path) || tc.is != nil && !errors.Is(err, tc.is) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
			if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
				t.Error("a refused file was changed")
			}
		})
	}
	if _, err := storage.OpenBolt("", storage.BoltOptions{}); err == nil {
		t.Error("a store without a path was opened")
	}
}

const path0 = "state.db"

func TestAStoreIsOpenedOnceAndForItsOwnerOnly(t *testing.T) {
	t.Parallel()
	b, path := newBolt(t, storage.BoltOptions{})
	_, err := storage.OpenBolt(path, storage.BoltOptions{LockTimeout: 100 * time.Millisecond})
	if !errors.Is(err, storage.ErrLocked) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "stop it first") {
		t.Errorf("opened twice: %v", err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	opened := make(chan error)
	go func() {
		next, err := storage.OpenBolt(path, storage.BoltOptions{LockTimeout: time.Minute})
		if err == nil {
			err = next.Close()
		}
		opened <- err
	}()
	closeBolt(t, b)
	if err := <-opened; err != nil {
		t.Error(err)
	}
}

func TestAStoreIsCreatedWholeOrNotAtAll(t *testing.T) {
	t.Parallel()
	dir := privateDir(t)
	path := filepath.Join(dir, "state.db")
	// What a crash during creation leaves.
	for _, name := range []string{"state.db.new-123", "state.db.new-empty"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "state.db.backup"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// Several processes that start at once agree on one file.
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			b, err := storage.OpenBolt(path, storage.BoltOptions{LockTimeout: time.Minute})
			if err != nil {
				t.Error(err)
				return
			}
			mustCommit(t, b, put(fmt.Sprintf("starter/%d", i), "x"))
			closeBolt(t, b)
		})
	}
	wg.Wait()
	b := openBolt(t, path, storage.BoltOptions{MustExist: true})
	if entries, rev, err := b.List(t.Context(), "starter/"); err != nil || len(entries) != 8 || rev != 8 {
		t.Errorf("%d entries at revision %d, %v", len(entries), rev, err)
	}
	names, err := filepath.Glob(filepath.Join(dir, "*"))
	if want := []string{path, path + ".backup"}; err != nil || strings.Join(names, " ") != strings.Join(want, " ") {
		t.Errorf("files %q, want %q", names, want)
	}
}

func TestTheHookFailsACommitBeforeItLands(t *testing.T) {
	t.Parallel()
	broken := errors.New("broken")
	fail := false
	b, path := newBolt(t, storage.BoltOptions{Hook: func(landed bool) error {
		if fail && !landed {
			return broken
		}
		return nil
	}})
	rev := mustCommit(t, b, put("a", "1"))
	fail = true
	if _, err := b.Commit(t.Context(), nil, put("a", "2")); !errors.Is(err, broken) || errors.Is(err, storage.ErrNotDurable) {
		t.Errorf("got %v", err)
	}
	fail = false
	if got := value(t, b, "a"); got != "1" {
		t.Errorf("a is %s, want 1", got)
	}
	if next := mustCommit(t, b, put("b", "1")); next != rev+1 {
		t.Errorf("revision %d after %d", next, rev)
	}
	for e, err := range b.Watch(t.Context(), "", rev) {
		if err != nil || e.Key != "b" {
			t.Errorf("watched %q, %v", e.Key, err)
		}
		break
	}
	closeBolt(t, b)
	if got := value(t, openBolt(t, path, storage.BoltOptions{}), "a"); got != "1" {
		t.Errorf("opened again, a is %s", got)
	}
}

func TestTheHookFailsACommitThatLanded(t *testing.T) {
	t.Parallel()
	broken := errors.New("broken")
	fail := false
	reg := prometheus.NewRegistry()
	b, path := newBolt(t, storage.BoltOptions{Metrics: reg, Hook: func(landed bool) error {
		if fail && landed {
			return broken
		}
		return nil
	}})
	rev := mustCommit(t, b, put("a", "1"))
	if err := b.Err(); err != nil {
		t.Errorf("Err: %v", err)
	}
	lease, err := b.Lease(t.Context(), "job", time.Second)
	if err != nil {
		t.Fatal(err)
	}
	fail = true
	if _, err := b.Commit(t.Context(), nil, put("a", "2")); !errors.Is(err, storage.ErrNotDurable) || !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
	fail = false
	// Nobody may act on a state that may not be there after a crash.
	_, getErr := b.Get(t.Context(), "a")
	_, _, listErr := b.List(t.Context(), "")
	_, commitErr := b.Commit(t.Context(), nil, put("a", "3"))
	_, leaseErr := b.Lease(t.Context(), "other", time.Second)
	var watchErr error
	for _, watchErr = range b.Watch(t.Context(), "", rev) {
	}
	for i, err := range []error{getErr, listErr, commitErr, leaseErr, watchErr, b.Err()} {
		if !errors.Is(err, storage.ErrNotDurable) {
			t.Errorf("call %d returned %v, want ErrNotDurable", i, err)
		}
	}
	<-lease.Done()
	if err := testutil.GatherAndCompare(reg, strings.NewReader(`
# HELP signet_storage_failed 1 if a commit to the state failed with unknown outcome: the store refuses everything until restart.
# TYPE signet_storage_failed gauge
signet_storage_failed 1
`), "signet_storage_failed"); err != nil {
		t.Error(err)
	}
	closeBolt(t, b)
	b = openBolt(t, path, storage.BoltOptions{})
	if got := value(t, b, "a"); got != "2" {
		t.Errorf("opened again, a is %s, want 2", got)
	}
	if next := mustCommit(t, b, put("a", "3")); next != rev+2 {
		t.Errorf("revision %d, want %d", next, rev+2)
	}
}

// A failed fsync cannot be had from a disk at will, and bbolt has no seam for it.
func TestAFailedFsyncOfTheStoreIsFinal(t *testing.T) {
	t.Parallel()
	b, _ := newBolt(t, storage.BoltOptions{})
	mustCommit(t, b, put("a", "1"))
	for _, err := range []error{
		&os.PathError{Op: "write", Path: "state.db", Err: unix.ENOSPC},
		errors.New("file resize error: no space left on device"),
		bolterrors.ErrMaxSizeReached,
	} {
		if got := b.CommitFailed(err); !errors.Is(got, err) || errors.Is(got, storage.ErrNotDurable) {
			t.Errorf("%v became %v", err, got)
		}
		mustCommit(t, b, put("a", "2"))
	}
	for _, err := range []error{unix.EIO, unix.ENOSPC, errors.New("file sync error: input/output error"), &os.PathError{Op: "sync", Path: "state.db", Err: unix.EIO}} {
		b, _ := newBolt(t, storage.BoltOptions{})
		if got := b.CommitFailed(err); !errors.Is(got, err) || !errors.Is(got, storage.ErrNotDurable) {
			t.Errorf("%v became %v", err, got)
		}
		if _, err := b.Get(t.Context(), "a"); !errors.Is(err, storage.ErrNotDurable) {
			t.Errorf("then Get returned %v", err)
		}
		closeBolt(t, b)
	}
}

func TestOpeningAStoreMakesItDurable(t *testing.T) {
	t.Parallel()
	path := filepath.Join(privateDir(t), "state.db")
	last := 0
	for range 3 {
		closeBolt(t, openBolt(t, path, storage.BoltOptions{}))
		db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		err = db.View(func(tx *bbolt.Tx) error {
			if tx.ID() <= last {
				t.Errorf("transaction %d after %d: nothing was written", tx.ID(), last)
			}
			last = tx.ID()
			return nil
		})
		if err := errors.Join(err, db.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAFullStoreRefusesAndKeepsWhatItHas(t *testing.T) {
	t.Parallel()
	b, path := newBolt(t, storage.BoltOptions{MaxSize: 4 << 20})
	big := bytes.Repeat([]byte{1}, storage.MaxValue)
	n := 0
	for {
		_, err := b.Commit(t.Context(), nil, []storage.Op{{Key: fmt.Sprintf("big/%d", n), Value: big}})
		if err != nil {
			if !strings.Contains(err.Error(), "nothing was changed") || errors.Is(err, storage.ErrNotDurable) {
				t.Errorf("full: %v", err)
			}
			break
		}
		if n++; n > 8 {
			t.Fatal("MaxSize is not obeyed")
		}
	}
	if n == 0 {
		t.Fatal("nothing fits")
	}
	// It still answers, and has room for what is small, and again once something is deleted.
	if entries, rev, err := b.List(t.Context(), "big/"); err != nil || len(entries) != n || rev != uint64(n) {
		t.Errorf("%d entries at %d, %v; want %d", len(entries), rev, err, n)
	}
	mustCommit(t, b, put("small", "1"))
	mustCommit(t, b, []storage.Op{{Key: "big/0", Delete: true}})
	mustCommit(t, b, put("small", "2"))
	mustCommit(t, b, []storage.Op{{Key: "big/again", Value: big}})
	closeBolt(t, b)
	if got := value(t, openBolt(t, path, storage.BoltOptions{}), "small"); got != "2" {
		t.Errorf("opened again, small is %s", got)
	}
}

func TestAWatchThatCannotBeCompleteSaysSo(t *testing.T) {
	t.Parallel()
	b, _ := newBolt(t, storage.BoltOptions{History: 8})
	first := mustCommit(t, b, put("a", "0"))
	ended := func(after uint64) error {
		for _, err := range b.Watch(t.Context(), "", after) {
			return err
		}
		return nil
	}
	if err := ended(first + 100); !errors.Is(err, storage.ErrCompacted) {
		t.Errorf("a revision of the future: %v", err)
	}
	// A watcher that is slow while others commit.
	n := 0
	var slow error
	for e, err := range b.Watch(t.Context(), "", first-1) {
		if err != nil {
			slow = err
			break
		}
		if n++; string(e.Value) != fmt.Sprint(n-1) {
			t.Errorf("change %d is %s", n, e.Value)
		}
		if n == 1 {
			for i := range 20 {
				mustCommit(t, b, put("a", fmt.Sprint(i+1)))
			}
		}
	}
	if n != 1 || !errors.Is(slow, storage.ErrCompacted) {
		t.Errorf("a slow watcher got %d changes, then %v", n, slow)
	}
	if err := ended(first); !errors.Is(err, storage.ErrCompacted) || !strings.Contains(err.Error(), "list again") {
		t.Errorf("a revision of long ago: %v", err)
	}
	_, rev, err := b.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for back := range uint64(6) {
		if err := ended(rev - 1 - back); err != nil {
			t.Errorf("%d commits back: %v", back+1, err)
		}
	}
}

func TestTheHistoryOfLargeValuesIsBounded(t *testing.T) {
	t.Parallel()
	b, _ := newBolt(t, storage.BoltOptions{})
	first := mustCommit(t, b, put("a", "0"))
	for i := range 48 {
		mustCommit(t, b, []storage.Op{{Key: "a", Value: bytes.Repeat([]byte{byte(i)}, storage.MaxValue)}})
	}
	for _, err := range b.Watch(t.Context(), "", first) {
		if !errors.Is(err, storage.ErrCompacted) {
			t.Errorf("24 MiB of changes are kept: %v", err)
		}
		break
	}
}
