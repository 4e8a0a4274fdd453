package run

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ListenUnix listens on a Unix socket with exactly that mode, replacing a socket
// that a killed predecessor left behind. The socket is made under another name
// and renamed into place, so nobody ever connects to one with another mode, and
// connections that race the change reach either the old socket or the new.
// Something at path that is not a socket is not removed: that is an error.
func ListenUnix(path string, mode fs.FileMode) (net.Listener, error) {
	if fi, err := os.Lstat(path); err == nil && fi.Mode()&fs.ModeSocket == 0 {
		return nil, fmt.Errorf("listening on %s: there is a file of that name that is not a socket; remove it or choose another path", path)
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("listening on %s: %w", path, err)
	}
	switch c, err := net.Dial("unix", path); {
	case err == nil:
		c.Close()
		return nil, fmt.Errorf("listening on %s: another process is serving on it; stop that one first", path)
	case !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, fs.ErrNotExist):
		// A full backlog, for one: somebody serves, and is busy.
		return nil, fmt.Errorf("listening on %s: looking whether another process serves on it: %w", path, err)
	}
	tmp := filepath.Join(filepath.Dir(path), fmt.Sprintf(".%d.%s", os.Getpid(), filepath.Base(path)))
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("listening on %s: removing a stale socket: %w", path, err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listening on %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(tmp, mode), os.Rename(tmp, path)); err != nil {
		l.Close()
		_ = os.Remove(tmp)
		return nil, fmt.Errorf("listening on %s: %w", path, err)
	}
	return &unixListener{Listener: l, path: path}, nil
}

// unixListener removes the socket's file when it is closed in order, once: later
// the path may be a successor's.
type unixListener struct {
	net.Listener
	path string
	once sync.Once
	err  error
}

func (l *unixListener) Close() error {
	l.once.Do(func() { l.err = errors.Join(l.Listener.Close(), os.Remove(l.path)) })
	return l.err
}

// LockFolder takes a folder for this process alone, until the result is closed or
// the process ends. It waits for a predecessor that is leaving, for at most wait.
func LockFolder(dir string, wait time.Duration) (io.Closer, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("locking folder: %w", err)
	}
	for deadline := time.Now().Add(wait); ; time.Sleep(20 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) || time.Now().After(deadline) {
			f.Close()
			return nil, fmt.Errorf("locking folder %s: %w: another process has it; stop that one first", dir, err)
		}
	}
}
