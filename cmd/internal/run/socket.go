package run

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// errServing says that somebody serves on a socket, or may.
var errServing = errors.New("another process is serving on it; stop that one first")

// ListenUnix listens on a Unix socket with exactly that mode, replacing a socket
// that a killed predecessor left behind. The socket is made under another name
// and renamed into place, so nobody ever connects to one with another mode, and
// connections that race the change reach either the old socket or the new.
// Something at path that is not a socket is not removed: that is an error, and so is a
// socket on which somebody serves, who may be leaving and is waited for, for at most
// wait.
//
// Whoever may connect can open the socket's folder, too, and lock it, so there is no
// lock: of two who begin in the same moment both may get a listener, and the one whose
// socket was replaced learns it from [ServeGRPC].
func ListenUnix(path string, mode fs.FileMode, wait time.Duration) (net.Listener, error) {
	for deadline := time.Now().Add(wait); ; time.Sleep(20 * time.Millisecond) {
		l, err := listenUnix(path, mode)
		if err == nil {
			return l, nil
		}
		if !errors.Is(err, errServing) || !time.Now().Before(deadline) {
			return nil, fmt.Errorf("listening on %s: %w", path, err)
		}
	}
}

func listenUnix(path string, mode fs.FileMode) (*unixListener, error) {
	if fi, err := os.Lstat(path); err == nil && fi.Mode()&fs.ModeSocket == 0 {
		return nil, errors.New("there is a file of that name that is not a socket; remove it or choose another path")
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	switch c, err := net.Dial("unix", path); {
	case err == nil:
		c.Close()
		return nil, errServing
	case errors.Is(err, syscall.EAGAIN):
		// A full backlog: somebody serves, and is busy.
		return nil, fmt.Errorf("%w (%w)", errServing, err)
	case !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("looking whether another process serves on it: %w", err)
	}
	// In containers every process has the same number.
	tmp := filepath.Join(filepath.Dir(path), fmt.Sprintf(".%.6s.%s", rand.Text(), filepath.Base(path)))
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	own, err := os.Lstat(tmp)
	if err == nil {
		err = errors.Join(os.Chmod(tmp, mode), os.Rename(tmp, path))
	}
	if err != nil {
		l.Close()
		_ = os.Remove(tmp)
		return nil, err
	}
	return &unixListener{Listener: l, path: path, own: own}, nil
}

// unixListener removes the socket's file when it is closed in order, once, unless it
// is a successor's by then.
type unixListener struct {
	net.Listener
	path string
	own  fs.FileInfo
	once sync.Once
	err  error
}

func (l *unixListener) Close() error {
	l.once.Do(func() {
		l.err = l.Listener.Close()
		if l.replaced() == nil {
			l.err = errors.Join(l.err, os.Remove(l.path))
		}
	})
	return l.err
}

// replaced says that another's socket is where this one's was, so that nobody finds
// this one any more.
func (l *unixListener) replaced() error {
	if fi, err := os.Lstat(l.path); err == nil && !os.SameFile(fi, l.own) {
		return errors.New("another process has put its own socket in the place of this one; run one of the two")
	}
	return nil
}
