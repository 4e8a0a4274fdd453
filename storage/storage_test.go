package storage_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/storagetest"
)

func TestBoltIsAStore(t *testing.T) {
	t.Parallel()
	storagetest.Store(t, func(t *testing.T) func() (storagetest.ClosableStore, error) {
		path := filepath.Join(privateDir(t), "state.db")
		t.Cleanup(func() { checkBolt(t, path) })
		return func() (storagetest.ClosableStore, error) {
			b, err := storage.OpenBolt(path, storage.BoltOptions{})
			if err != nil {
				return nil, err
			}
			return b, nil
		}
	})
}

func TestFileLogIsALog(t *testing.T) {
	t.Parallel()
	for name, opt := range map[string]storage.LogOptions{
		"in one segment":   {},
		"in many segments": {SegmentSize: 4096},
		"in memory":        {FS: storagetest.NewCrashFS(), SegmentSize: 8192},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			storagetest.Log(t, func(t *testing.T) func() (storagetest.ClosableLog, error) {
				dir := filepath.Join(privateDir(t), "log")
				opt := opt
				opt.Instance = 1
				return func() (storagetest.ClosableLog, error) { return storage.OpenLog(dir, opt) }
			})
		})
	}
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
