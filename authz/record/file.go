package record

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// File is a file of records that begins anew when it is large enough: FILE is then
// named FILE.1, what was FILE.1 is FILE.2, and the oldest is removed. Nothing else may
// write there; who moves it away gets a new one. It is mode 0600.
type File struct {
	path string
	most int64
	keep int
	open func(path string) (file, error)

	f file // nil after an error; owned by write
	// size is where the last whole record ends; torn says that more stands there.
	size int64
	torn bool
}

// file is an *os.File.
type file interface {
	io.Writer
	Truncate(size int64) error
	Stat() (os.FileInfo, error)
	Close() error
}

// Defaults of a file of records.
const (
	DefaultFileBytes = 100 << 20
	DefaultFiles     = 5
)

// OpenFile opens a file of records, of at most maxBytes, beside keep older ones;
// 0 means [DefaultFileBytes] and [DefaultFiles]. It fails where nothing can be
// written.
func OpenFile(path string, maxBytes int64, keep int) (*File, error) {
	if maxBytes == 0 {
		maxBytes = DefaultFileBytes
	}
	if keep == 0 {
		keep = DefaultFiles
	}
	if !filepath.IsAbs(path) || maxBytes < 1<<20 || keep < 1 {
		return nil, fmt.Errorf("opening the file of decision records %q: it must be an absolute path, of 1 MiB at least, with one older file at least", path)
	}
	f := &File{path: path, most: maxBytes, keep: keep, open: func(path string) (file, error) {
		return os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	}}
	if err := f.reopen(); err != nil {
		return nil, fmt.Errorf("opening the file of decision records: %w", err)
	}
	return f, nil
}

func (f *File) name() string        { return "file" }
func (f *File) wait() time.Duration { return 0 }

// reopen opens the file and finds out whether its last record is whole.
func (f *File) reopen() error {
	f.close()
	h, err := f.open(f.path)
	if err != nil {
		return err
	}
	info, err := h.Stat()
	switch {
	case err != nil:
	case !info.Mode().IsRegular():
		err = fmt.Errorf("%s is no regular file", f.path)
	case info.Size() > 0:
		var last [1]byte
		old, e := os.Open(f.path)
		if e == nil {
			_, e = old.ReadAt(last[:], info.Size()-1)
			old.Close()
		}
		f.torn = e != nil || last[0] != '\n'
	default:
		f.torn = false
	}
	if err != nil {
		h.Close()
		return err
	}
	f.f, f.size = h, info.Size()
	return nil
}

// moved reports whether the path leads to another file by now, or to none.
func (f *File) moved() bool {
	if f.f == nil {
		return true
	}
	ours, err := f.f.Stat()
	if err != nil {
		return true
	}
	now, err := os.Stat(f.path)
	return err != nil || !os.SameFile(ours, now)
}

func (f *File) write(_ context.Context, lines []line) (lost int, err error) {
	if f.moved() {
		if err := f.reopen(); err != nil {
			return len(lines), err
		}
	}
	// One write for all that fits.
	var b []byte
	n := 0
	flush := func() {
		if n > 0 {
			if e := f.put(b); e != nil {
				lost, err = lost+n, e
			}
		}
		b, n = b[:0], 0
	}
	for _, l := range lines {
		if f.size+int64(len(b)+len(l.text)) > f.most {
			flush()
			if e := f.rotate(); e != nil {
				err = e
			}
		}
		b, n = append(b, l.text...), n+1
	}
	flush()
	return lost, err
}

// put writes whole records, or none of them: a part is taken back, or at least
// ended, so that the next record stands on a line of its own.
func (f *File) put(b []byte) error {
	if f.f == nil {
		if err := f.reopen(); err != nil {
			return err
		}
	}
	if f.size > 0 && f.size+int64(len(b)) > f.most+f.most/2 {
		return fmt.Errorf("%s has grown to %d bytes and cannot be renamed", f.path, f.size)
	}
	if f.torn {
		b = append([]byte{'\n'}, b...)
	}
	n, err := f.f.Write(b)
	if err == nil {
		f.size, f.torn = f.size+int64(n), false
		return nil
	}
	if n > 0 {
		if f.f.Truncate(f.size) != nil {
			f.size, f.torn = f.size+int64(n), true
		}
	}
	return err
}

// rotate begins a new file. Where that fails the old one goes on.
func (f *File) rotate() error {
	if f.size == 0 {
		return nil
	}
	older := func(i int) string { return f.path + "." + strconv.Itoa(i) }
	for i := f.keep - 1; i >= 1; i-- {
		if err := os.Rename(older(i), older(i+1)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	if err := os.Rename(f.path, older(1)); err != nil {
		return err
	}
	return f.reopen()
}

func (f *File) close() error {
	if f.f == nil {
		return nil
	}
	err := f.f.Close()
	f.f = nil
	return err
}

// Stream writes records to w, such as standard output. It may block.
func Stream(name string, w io.Writer) Output { return stream{name, w} }

type stream struct {
	called string
	w      io.Writer
}

func (s stream) name() string        { return s.called }
func (s stream) wait() time.Duration { return 0 }
func (s stream) close() error        { return nil }

func (s stream) write(_ context.Context, lines []line) (lost int, err error) {
	var b []byte
	for _, l := range lines {
		b = append(b, l.text...)
	}
	n, err := s.w.Write(b)
	if err == nil {
		return 0, nil
	}
	for _, l := range lines {
		if n -= len(l.text); n < 0 {
			lost++
		}
	}
	return lost, err
}
