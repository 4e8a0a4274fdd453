package storage

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// FS is what a FileLog needs of a file system. Tests put one below it that loses
// what was not synced; everything else uses the operating system's. Names are
// paths as given to OpenLog.
type FS interface {
	// Lock locks a folder against other processes until the result is closed,
	// or fails with ErrLocked at once. A missing folder is created if create is
	// set; its name is durable after SyncDir of its parent. A folder that others
	// can read is refused.
	Lock(dir string, create bool) (io.Closer, error)
	// List returns the names of the files in a folder.
	List(dir string) ([]string, error)
	// Open opens a file to read and write. One that others can read is refused.
	Open(name string) (File, error)
	// Create creates a file that only its owner can read; it must not exist.
	Create(name string) (File, error)
	// Rename gives a file another name, as one change.
	Rename(from, to string) error
	// Remove removes a file.
	Remove(name string) error
	// SyncDir makes creations, renames and removals in a folder durable.
	SyncDir(dir string) error
}

// File is an open file of an FS.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	// Size is the file's size in bytes.
	Size() (int64, error)
	// Truncate changes the size.
	Truncate(size int64) error
	// Sync makes the contents and the size durable.
	Sync() error
}

// osFS is the file system of the operating system.
type osFS struct{}

func (osFS) Lock(dir string, create bool) (io.Closer, error) {
	if create {
		if err := makePrivateDir(dir); err != nil {
			return nil, err
		}
	}
	if err := checkPrivateDir(dir); err != nil {
		return nil, err
	}
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		d.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrLocked
		}
		return nil, err
	}
	return d, nil
}

func (osFS) List(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}

func (osFS) Open(name string) (File, error) {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil {
		err = checkPrivateFile(name, info)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return osFile{f}, nil
}

func (osFS) Create(name string) (File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (osFS) Rename(from, to string) error { return os.Rename(from, to) }

func (osFS) Remove(name string) error { return os.Remove(name) }

func (osFS) SyncDir(dir string) error { return syncDir(dir) }

// readOnlyFS is osFS for who must not change anything, and may not be allowed to.
type readOnlyFS struct{ osFS }

func (readOnlyFS) Open(name string) (File, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil {
		err = checkPrivateFile(name, info)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return osFile{f}, nil
}

func (readOnlyFS) Create(string) (File, error) { return nil, ErrReadOnly }

func (readOnlyFS) Rename(string, string) error { return ErrReadOnly }

func (readOnlyFS) Remove(string) error { return ErrReadOnly }

func (readOnlyFS) SyncDir(string) error { return ErrReadOnly }

type osFile struct{ *os.File }

func (f osFile) Size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// syncDir makes the names in a folder durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	if err := d.Sync(); err != nil {
		d.Close()
		return err
	}
	return d.Close()
}

// makePrivateDir creates a folder if it is missing. Its parent must exist: a
// mistyped path should be an error, not a new tree.
func makePrivateDir(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// checkPrivateDir refuses a folder that anyone but its owner may enter.
func checkPrivateDir(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%s is not a folder", dir)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("folder %s is open to others (mode %04o); run: chmod 700 %q", dir, info.Mode().Perm(), dir)
	}
	return nil
}

// checkPrivateFile refuses a file that anyone but its owner may read or write.
func checkPrivateFile(name string, info fs.FileInfo) error {
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file", name)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("file %s is open to others (mode %04o); run: chmod 600 %q", name, info.Mode().Perm(), name)
	}
	return nil
}
