package source

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// fate is how what has a name now came to have it, as far as events tell. A
// removal is no fate: whether something is there is seen by looking, and whatever
// comes after a removal has an event of its own. (An exchange of two names ends
// with IN_MOVED_FROM for one of them, although it is there.)
type fate uint8

const (
	unseen  fate = iota
	renamed      // it was renamed to this name: complete
	written      // it was created or written in place: maybe not complete
)

const (
	// IN_EXCL_UNLINK: who still writes to a file that a rename replaced must not
	// make its successor look written.
	folderEvents = unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_CREATE | unix.IN_DELETE | unix.IN_MODIFY |
		unix.IN_ATTRIB | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR | unix.IN_EXCL_UNLINK
	parentEvents = unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_CREATE | unix.IN_DELETE | unix.IN_ONLYDIR

	// maxNames bounds the names that events are remembered for; more count as
	// lost events.
	maxNames = 2 * maxFiles
)

// happened is what the events since the last take say.
type happened struct {
	files map[string]fate // by name in the folder; only names that matter
	// places has the last fate of the names in the folder's parents that the
	// folder's path goes through, by watch descriptor and name.
	places map[place]fate
	lost   bool      // events were dropped by the kernel or by maxNames
	some   bool      // there was something, if only to the folder itself
	first  time.Time // the first event
	gone   time.Time // the last removal of a file
}

// then is what both say, where next came after h.
func (h happened) then(next happened) happened {
	if next.lost {
		// The kernel dropped events between the two.
		return next
	}
	h.files = over(h.files, next.files)
	h.places = over(h.places, next.places)
	if len(h.files) > maxNames {
		h.files = nil
	}
	return h
}

func over[K comparable](old, newer map[K]fate) map[K]fate {
	if len(old) == 0 {
		return newer
	}
	maps.Copy(old, newer)
	return old
}

type place struct {
	wd   int32
	name string
}

// watch reads inotify events and keeps, for each name, the last that matters.
// Reading and remembering are one step under mu, so that drain sees everything
// that happened before it was called.
type watch struct {
	file *os.File
	conn syscall.RawConn
	wake chan struct{} // has a token when something happened

	mu     sync.Mutex
	buf    []byte         // guarded by mu
	folder int32          // watch descriptor of the adopted folder, -1: none; guarded by mu
	places map[place]bool // what parents are watched for; guarded by mu
	now    happened       // guarded by mu
}

func newWatch() (*watch, error) {
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("creating an inotify instance: %w; if there are too many, raise fs.inotify.max_user_instances", err)
	}
	// Nonblocking, so the runtime polls it and Close ends a Read.
	f := os.NewFile(uintptr(fd), "inotify")
	conn, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("using an inotify instance: %w", err)
	}
	return &watch{file: f, conn: conn, wake: make(chan struct{}, 1), buf: make([]byte, 64<<10), folder: -1}, nil
}

// run reads events until close. It always returns an error; after close it means
// nothing.
func (w *watch) run() error {
	for {
		var failed error
		err := w.conn.Read(func(fd uintptr) bool {
			some, err := w.read(int(fd))
			failed = err
			return some || err != nil
		})
		if err = errors.Join(err, failed); err != nil {
			return fmt.Errorf("reading inotify events: %w", err)
		}
		select {
		case w.wake <- struct{}{}:
		default:
		}
	}
}

func (w *watch) close() { w.file.Close() }

// read takes in all events that are there; some says that there were any.
func (w *watch) read(fd int) (some bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for {
		n, err := unix.Read(fd, w.buf)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return some, nil
		case err != nil:
			return some, err
		case n == 0:
			return some, nil
		}
		some = true
		w.note(w.buf[:n], time.Now())
	}
}

// note takes in a buffer of events. mu is held.
func (w *watch) note(b []byte, now time.Time) {
	for len(b) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(b))
		mask := binary.NativeEndian.Uint32(b[4:])
		size := int(binary.NativeEndian.Uint32(b[12:]))
		b = b[unix.SizeofInotifyEvent:]
		if size > len(b) {
			w.now.lost = true
			return
		}
		name, _, _ := bytes.Cut(b[:size], []byte{0})
		b = b[size:]
		w.noteOne(wd, mask, string(name), now)
	}
}

func (w *watch) noteOne(wd int32, mask uint32, name string, now time.Time) {
	h := &w.now
	switch {
	case mask&unix.IN_Q_OVERFLOW != 0:
		// What is known may be outdated by what is not.
		h.lost, h.files, h.places = true, nil, nil
	case wd == w.folder && mask&(unix.IN_IGNORED|unix.IN_UNMOUNT|unix.IN_DELETE_SELF|unix.IN_MOVE_SELF) != 0:
	case wd == w.folder && mask&unix.IN_ATTRIB != 0:
		// Permissions may have changed; that alone is no write.
	case wd == w.folder && relevant(name):
		if mask&(unix.IN_MOVED_FROM|unix.IN_DELETE) != 0 {
			h.gone = now
			break
		}
		if len(h.files) >= maxNames {
			h.lost, h.files = true, nil
		}
		if h.files == nil {
			h.files = map[string]fate{}
		}
		h.files[name] = fateOf(mask)
	case w.places[place{wd, name}]:
		if mask&(unix.IN_MOVED_FROM|unix.IN_DELETE) != 0 {
			break
		}
		if h.places == nil {
			h.places = map[place]fate{}
		}
		h.places[place{wd, name}] = fateOf(mask)
	default:
		return
	}
	if !h.some {
		h.some, h.first = true, now
	}
}

func fateOf(mask uint32) fate {
	if mask&unix.IN_MOVED_TO != 0 {
		return renamed
	}
	return written
}

// drain takes in the events of everything that happened before the call.
func (w *watch) drain() error {
	var failed error
	err := w.conn.Control(func(fd uintptr) { _, failed = w.read(int(fd)) })
	if err = errors.Join(err, failed); err != nil {
		return fmt.Errorf("reading inotify events: %w", err)
	}
	return nil
}

// take is what happened since the last take.
func (w *watch) take() (happened, error) {
	if err := w.drain(); err != nil {
		return happened{}, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	h := w.now
	w.now = happened{}
	return h, nil
}

// writtenNow says, after a drain, which names were written since the last take.
func (w *watch) writtenNow() (names map[string]bool, lost bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, f := range w.now.files {
		if f == written {
			if names == nil {
				names = map[string]bool{}
			}
			names[name] = true
		}
	}
	return names, w.now.lost
}

// pending says when the first event came that was not taken yet, and when the
// last file was removed.
func (w *watch) pending() (some bool, first, gone time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now.some, w.now.first, w.now.gone
}

// descriptor is the watch descriptor of an open folder, which is watched from
// then on. As long as the folder exists it stays the same, and no other folder
// ever gets it: unlike an inode number it identifies the folder.
func (w *watch) descriptor(dir *os.File) (wd int32, err error) {
	// By way of the open file: the path could lead elsewhere by now.
	return w.add(fmt.Sprintf("/proc/self/fd/%d", dir.Fd()), folderEvents)
}

func (w *watch) add(path string, mask uint32) (wd int32, err error) {
	var failed error
	err = w.conn.Control(func(fd uintptr) {
		n, err := unix.InotifyAddWatch(int(fd), path, mask)
		wd, failed = int32(n), err
	})
	if err = errors.Join(err, failed); err != nil {
		return -1, fmt.Errorf("watching %s: %w", path, err)
	}
	return wd, nil
}

// follow makes wd the folder whose events are noted, and watches the parents that
// the paths go through. It returns the place of the last path. A parent that
// cannot be watched is left out: changes there are found by the regular look.
func (w *watch) follow(wd int32, paths ...string) (last place) {
	places := map[place]bool{}
	for _, p := range paths {
		parent, name := filepath.Split(p)
		last = place{-1, name}
		if name == "" {
			continue // the root of the file system has no parent
		}
		// Added to what may be there: the parent may be the folder itself, where
		// the path is a link in it.
		pd, err := w.add(parent, parentEvents|unix.IN_MASK_ADD)
		if err != nil {
			continue
		}
		last.wd = pd
		places[last] = true
	}
	w.mu.Lock()
	keep := map[int32]bool{wd: true}
	for p := range places {
		keep[p.wd] = true
	}
	drop := map[int32]bool{w.folder: true}
	for p := range w.places {
		drop[p.wd] = true
	}
	if wd != w.folder {
		w.now.files = nil
	}
	w.folder, w.places = wd, places
	w.mu.Unlock()
	for old := range drop {
		if old >= 0 && !keep[old] {
			w.forget(old)
		}
	}
	return last
}

// forget ends a watch. It may have ended with its folder, so failure means
// nothing.
func (w *watch) forget(wd int32) {
	_ = w.conn.Control(func(fd uintptr) { _, _ = unix.InotifyRmWatch(int(fd), uint32(wd)) })
}

// relevant reports whether a name in the folder is one that matters.
func relevant(name string) bool { return name == dataLink || isPolicy(name) }

func isPolicy(name string) bool {
	return !strings.HasPrefix(name, ".") && (strings.HasSuffix(name, ".yaml") || strings.HasSuffix(name, ".yml"))
}
