package storage_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/storagetest"
)

func TestOpenLogRefuses(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		prepare func(t *testing.T, dir string) // dir holds a log
		opt     storage.LogOptions
		want    string
		is      error
	}{
		"instance 0":                     {opt: storage.LogOptions{}, want: "instance 0: must be 1 to 127"},
		"instance 128":                   {opt: storage.LogOptions{Instance: 128}, want: "instance 128"},
		"another instance":               {opt: storage.LogOptions{Instance: 2}, want: "the log is of instance 1, not 2"},
		"tiny segments":                  {opt: storage.LogOptions{Instance: 1, SegmentSize: 4095}, want: "segment size 4095"},
		"a negative timeout":             {opt: storage.LogOptions{Instance: 1, LockTimeout: -1}, want: "negative"},
		"a folder that its group reads":  {func(t *testing.T, dir string) { chmod(t, dir, 0o740) }, storage.LogOptions{Instance: 1}, "chmod 700", nil},
		"a folder that others enter":     {func(t *testing.T, dir string) { chmod(t, dir, 0o701) }, storage.LogOptions{Instance: 1}, "chmod 700", nil},
		"a segment that its group reads": {func(t *testing.T, dir string) { chmod(t, filepath.Join(dir, goldenNames[0]), 0o640) }, storage.LogOptions{Instance: 1}, "chmod 600", nil},
		"a folder that is missing": {func(t *testing.T, dir string) { remove(t, dir) },
			storage.LogOptions{Instance: 1, MustExist: true}, "", fs.ErrNotExist},
		"an empty folder where there must be a log": {func(t *testing.T, dir string) { remove(t, filepath.Join(dir, goldenNames[0])) },
			storage.LogOptions{Instance: 1, MustExist: true}, "restore the log from a backup", fs.ErrNotExist},
		"a parent that is missing": {func(t *testing.T, dir string) { remove(t, filepath.Dir(dir)) },
			storage.LogOptions{Instance: 1}, "", fs.ErrNotExist},
		"a file": {func(t *testing.T, dir string) {
			remove(t, dir)
			if err := os.WriteFile(dir, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, storage.LogOptions{Instance: 1}, "is not a folder", nil},
		"a folder in a segment's place": {func(t *testing.T, dir string) {
			remove(t, filepath.Join(dir, goldenNames[0]))
			if err := os.Mkdir(filepath.Join(dir, goldenNames[0]), 0o700); err != nil {
				t.Fatal(err)
			}
		}, storage.LogOptions{Instance: 1}, goldenNames[0], nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(privateDir(t), "parent", "log")
			if err := os.Mkdir(filepath.Dir(dir), 0o700); err != nil {
				t.Fatal(err)
			}
			l, err := storage.OpenLog(dir, storage.LogOptions{Instance: 1})
			if err != nil {
				t.Fatal(err)
			}
			closeLog(t, l)
			if tc.prepare != nil {
				tc.prepare(t, dir)
			}
			_, err = storage.OpenLog(dir, tc.opt)
			if err == nil || !strings.Contains(err.Error(), tc.want) || tc.is != nil && !errors.Is(err, tc.is) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
	if _, err := storage.OpenLog("", storage.LogOptions{Instance: 1}); err == nil {
		t.Error("a log without a folder was opened")
	}
}

func chmod(t *testing.T, name string, mode os.FileMode) {
	t.Helper()
	if err := os.Chmod(name, mode); err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, name string) {
	t.Helper()
	if err := os.RemoveAll(name); err != nil {
		t.Fatal(err)
	}
}

func TestALogIsOpenedOnceAndForItsOwnerOnly(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(privateDir(t), "log")
	opt := storage.LogOptions{Instance: 1, LockTimeout: 30 * time.Millisecond, SegmentSize: 4096}
	l, err := storage.OpenLog(dir, opt)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := l.Append(t.Context(), [][]byte{make([]byte, 3000)}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := storage.OpenLog(dir, opt); !errors.Is(err, storage.ErrLocked) || !strings.Contains(err.Error(), dir) {
		t.Errorf("opened twice: %v", err)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("folder: %v, %v", info.Mode(), err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(files) != 3 {
		t.Errorf("files %q, %v", files, err)
	}
	for _, name := range files {
		if info, err := os.Stat(name); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	// One that waits gets the log as soon as the other leaves.
	opt.LockTimeout = time.Minute
	opened := make(chan error)
	go func() {
		next, err := storage.OpenLog(dir, opt)
		if err == nil {
			err = next.Close()
		}
		opened <- err
	}()
	closeLog(t, l)
	if err := <-opened; err != nil {
		t.Error(err)
	}
}

// countingFS counts what is read.
type countingFS struct {
	*storagetest.CrashFS
	read *int
}

type countingFile struct {
	storage.File
	read *int
}

func (c countingFS) Open(name string) (storage.File, error) {
	f, err := c.CrashFS.Open(name)
	return countingFile{f, c.read}, err
}

func (f countingFile) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.File.ReadAt(p, off)
	*f.read += n
	return n, err
}

func TestOpeningReadsHeadersAndTheLastSegment(t *testing.T) {
	t.Parallel()
	mem := storagetest.NewCrashFS()
	opt := storage.LogOptions{SegmentSize: 64 << 10}
	l, err := openMem(mem, opt)
	if err != nil {
		t.Fatal(err)
	}
	for range 300 {
		if _, err := l.Append(t.Context(), [][]byte{make([]byte, 5000)}); err != nil {
			t.Fatal(err)
		}
	}
	closeLog(t, l)
	names, _ := mem.List(memDir)
	read := 0
	opt.FS, opt.Instance = countingFS{mem, &read}, 7
	if l, err = storage.OpenLog(memDir, opt); err != nil {
		t.Fatal(err)
	}
	// The last frame is read a second time, to be written once more.
	if most := len(names)*headerSize + 64<<10 + 6000; read > most {
		t.Errorf("opening %d segments read %d bytes, want at most %d", len(names), read, most)
	}
	read = 0
	for range l.Scan(t.Context(), 299) {
	}
	if read > 2*(64<<10)+2*headerSize {
		t.Errorf("scanning the last two records read %d bytes", read)
	}
	closeLog(t, l)
}
