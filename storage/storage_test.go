package storage_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/storagetest"
)

func TestBoltIsAStore(t *testing.T) {
	t.Parallel()
	storagetest.Store(t, func(t *testing.T) storagetest.StorePlace {
		path := filepath.Join(privateDir(t), "state.db")
		t.Cleanup(func() { checkBolt(t, path) })
		const history = 1000 // a test watches 630 changes
		// 0: no failure, 1: before it is written, 2: after.
		var failing atomic.Int32
		return storagetest.StorePlace{
			Open: func() (storagetest.ClosableStore, error) {
				b, err := storage.OpenBolt(path, storage.BoltOptions{LockTimeout: 50 * time.Millisecond, History: history, Hook: func(landed bool) error {
					if f := failing.Load(); f == 1 && !landed || f == 2 && landed {
						return storagetest.ErrInjected
					}
					return nil
				}})
				if err != nil {
					return nil, err
				}
				return b, nil
			},
			Fail: func(_ storagetest.ClosableStore, landed bool) func() {
				failing.Store(1)
				if landed {
					failing.Store(2)
				}
				return func() { failing.Store(0) }
			},
			Forget: func(t *testing.T, s storage.Store) {
				for i := range history/storage.MaxOps + 2 {
					var ops []storage.Op
					for j := range storage.MaxOps {
						ops = append(ops, storage.Op{Key: fmt.Sprintf("forget/%d", j), Value: fmt.Append(nil, i)})
					}
					if _, err := s.Commit(t.Context(), nil, ops); err != nil {
						t.Error(err)
					}
				}
			},
		}
	})
}

func TestFileLogIsALog(t *testing.T) {
	t.Parallel()
	for name, opt := range map[string]storage.LogOptions{
		"in one segment":      {},
		"in many segments":    {SegmentSize: 4096},
		"in memory":           {FS: storagetest.NewCrashFS(), SegmentSize: 8192},
		"as if it was remote": {FS: storagetest.NewCrashFS(), SegmentSize: 8192, Remote: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			storagetest.Log(t, func(t *testing.T) storagetest.LogPlace {
				dir := filepath.Join(privateDir(t), "log")
				opt := opt
				opt.Instance, opt.LockTimeout = 1, 50*time.Millisecond
				faults := &faultyFS{FS: opt.FS}
				if opt.FS == nil {
					faults.FS = storage.OSFS()
				}
				opt.FS = faults
				return storagetest.LogPlace{
					Open: func() (storagetest.ClosableLog, error) {
						l, err := storage.OpenLog(dir, opt)
						if err != nil {
							return nil, err
						}
						return l, nil
					},
					Fail: func(_ storagetest.ClosableLog, landed bool) func() {
						faults.failing.Store(1)
						if landed {
							faults.failing.Store(2)
						}
						return func() { faults.failing.Store(0) }
					},
				}
			})
		})
	}
}

// faultyFS fails writes of files: before they are made (1) or after (2).
type faultyFS struct {
	storage.FS
	failing atomic.Int32
}

func (f *faultyFS) Open(name string) (storage.File, error)   { return f.wrap(f.FS.Open(name)) }
func (f *faultyFS) Create(name string) (storage.File, error) { return f.wrap(f.FS.Create(name)) }

func (f *faultyFS) wrap(file storage.File, err error) (storage.File, error) {
	if err != nil {
		return nil, err
	}
	return faultyFile{file, f}, nil
}

type faultyFile struct {
	storage.File
	fs *faultyFS
}

func (f faultyFile) WriteAt(p []byte, off int64) (int, error) {
	if f.fs.failing.Load() == 1 {
		return 0, storagetest.ErrInjected
	}
	return f.File.WriteAt(p, off)
}

func (f faultyFile) Sync() error {
	err := f.File.Sync()
	if f.fs.failing.Load() == 2 {
		return storagetest.ErrInjected
	}
	return err
}

// privateDir is a temporary folder with the mode that storage asks for.
func privateDir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// checkBolt opens a store that nobody has open and checks all of it.
func checkBolt(t testing.TB, path string) {
	t.Helper()
	b, err := storage.OpenBolt(path, storage.BoltOptions{MustExist: true})
	if err != nil {
		t.Error(err)
		return
	}
	if err := errors.Join(b.Check(context.Background()), b.Close()); err != nil {
		t.Error(err)
	}
}
