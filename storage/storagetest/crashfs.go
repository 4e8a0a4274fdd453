package storagetest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"sync"

	"github.com/signet-mesh/signet/storage"
)

// ErrInjected is what a failed operation returns.
var ErrInjected = errors.New("injected failure")

// Kind is what an operation does.
type Kind string

// The operations that change something, and Mark, which only notes a moment.
const (
	Mkdir    Kind = "mkdir"
	Create   Kind = "create"
	Write    Kind = "write"
	Truncate Kind = "truncate"
	Sync     Kind = "sync"
	Rename   Kind = "rename"
	Remove   Kind = "remove"
	SyncDir  Kind = "syncdir"
	Mark     Kind = "mark"
)

// Op is one operation, in the order in which they happened.
type Op struct {
	// N counts from 0.
	N    int
	Kind Kind
	// Name is the file, the folder or the text of the mark.
	Name string
	// Offset and Size are what was written; Size is the new one for Truncate.
	Offset int64
	Size   int
}

func (o Op) String() string {
	if o.Kind == Write {
		return fmt.Sprintf("%d %s %s %d+%d", o.N, o.Kind, o.Name, o.Offset, o.Size)
	}
	return fmt.Sprintf("%d %s %s", o.N, o.Kind, o.Name)
}

// Fault is how an operation fails.
type Fault int

const (
	// NoFault lets the operation succeed.
	NoFault Fault = iota
	// NotPersisted fails without doing anything.
	NotPersisted
	// Persisted does it, durably, and fails all the same.
	Persisted
	// Partial writes half of the bytes and fails, as a full disk does. Other
	// operations do nothing and fail.
	Partial
	// Forgotten makes a sync fail the way Linux does: what was to be synced stays
	// readable, is held for clean, and no later sync writes it unless it is
	// written again. Other operations do nothing and fail.
	Forgotten
)

// Loss is what of the unsynced changes reaches the disk at a crash. The zero value
// loses all of them.
type Loss struct {
	// Keep is how many unsynced bytes survive, counted over all files in the order
	// in which they were written.
	Keep int
	// Newest makes the last bytes survive and not the first ones.
	Newest bool
	// Zeros makes files as long as they were, with zeros for what was lost, as
	// delayed allocation does. Otherwise they end where the surviving bytes end.
	Zeros bool
	// Names makes unsynced creations, renames and removals survive.
	Names bool
}

// CrashFS is a storage.FS in memory. Folders are created by Lock; modes do not
// exist. It is safe for concurrent use.
type CrashFS struct {
	mu      sync.Mutex
	fault   func(Op) Fault
	ops     []Op
	dirs    map[string]bool // value: durable
	names   map[string]*inode
	durable map[string]*inode // names as after a crash
	pending []change          // what is not synced, in order
	locks   map[string]bool
}

var _ storage.FS = (*CrashFS)(nil)

// inode is a file without its name.
type inode struct {
	data []byte // what reads see
	disk []byte // what a crash leaves
}

// change is one unsynced change: bytes at an offset, a new size, or a name.
type change struct {
	file *inode
	off  int64
	data []byte // nil: truncate to off

	dir   string // a change of names in this folder, else empty
	apply func(names map[string]*inode)
}

// NewCrashFS returns an empty file system.
func NewCrashFS() *CrashFS {
	return &CrashFS{
		dirs:    map[string]bool{},
		names:   map[string]*inode{},
		durable: map[string]*inode{},
		locks:   map[string]bool{},
	}
}

// Fail sets what decides about the fate of each operation that changes something;
// nil lets all succeed. f is called before the operation, may block, and may not
// change the file system.
func (c *CrashFS) Fail(f func(Op) Fault) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fault = f
}

// FailNth makes the operation that has number n, and no other, fail.
func (c *CrashFS) FailNth(n int, f Fault) {
	c.Fail(func(op Op) Fault {
		if op.N == n {
			return f
		}
		return NoFault
	})
}

// Ops returns what happened so far.
func (c *CrashFS) Ops() []Op {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.ops)
}

// Mark notes a moment among the operations, such as that a key signed.
func (c *CrashFS) Mark(text string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ops = append(c.ops, Op{N: len(c.ops), Kind: Mark, Name: text})
}

// Unsynced is how many bytes and names were written and would not survive a crash
// that loses all that was not synced.
func (c *CrashFS) Unsynced() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for _, ch := range c.pending {
		n += max(1, len(ch.data))
	}
	return n
}

// Durable reports whether some file that would survive every crash contains part.
func (c *CrashFS) Durable(part []byte) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, f := range c.durable {
		if bytes.Contains(f.disk, part) {
			return true
		}
	}
	return false
}

// Crash returns the file system as it is found after a crash, unlocked and without
// faults. c itself goes on as if nothing had happened.
func (c *CrashFS) Crash(l Loss) *CrashFS {
	c.mu.Lock()
	defer c.mu.Unlock()
	d := NewCrashFS()

	// Copies of the files, as far as they are durable.
	files := map[*inode]*inode{}
	copyOf := func(f *inode) *inode {
		if files[f] == nil {
			files[f] = &inode{disk: bytes.Clone(f.disk)}
		}
		return files[f]
	}
	total := 0
	names := maps.Clone(c.durable)
	for _, ch := range c.pending {
		total += len(ch.data)
		if ch.dir != "" && l.Names {
			ch.apply(names)
		}
	}
	from, to := 0, l.Keep // the surviving range of all unsynced bytes
	if l.Newest {
		from, to = total-l.Keep, total
	}
	at := 0
	for _, ch := range c.pending {
		if ch.dir != "" {
			continue
		}
		f := copyOf(ch.file)
		if ch.data == nil {
			if l.Keep > 0 && from <= at && at <= to {
				f.disk = resize(f.disk, ch.off)
			}
			continue
		}
		i, j := min(max(from-at, 0), len(ch.data)), min(max(to-at, 0), len(ch.data))
		if i < j {
			f.disk = writeAt(f.disk, ch.data[i:j], ch.off+int64(i))
		}
		if end := ch.off + int64(len(ch.data)); l.Zeros && end > int64(len(f.disk)) {
			f.disk = resize(f.disk, end)
		}
		at += len(ch.data)
	}
	for dir, durable := range c.dirs {
		if durable || l.Names {
			d.dirs[dir] = true
		}
	}
	for name, f := range names {
		if !d.dirs[filepath.Dir(name)] {
			continue // lost with its folder
		}
		g := copyOf(f)
		g.data = bytes.Clone(g.disk)
		d.names[name], d.durable[name] = g, g
	}
	return d
}

// ReadFile returns what a file holds.
func (c *CrashFS) ReadFile(name string) ([]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f := c.names[name]
	if f == nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	return bytes.Clone(f.data), nil
}

// WriteFile sets what a file holds, durably and without being recorded, as an
// attacker or a bad disk would.
func (c *CrashFS) WriteFile(name string, data []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f := &inode{data: bytes.Clone(data), disk: bytes.Clone(data)}
	c.dirs[filepath.Dir(name)] = true
	c.names[name], c.durable[name] = f, f
}

// RemoveFile removes a file, durably and without being recorded.
func (c *CrashFS) RemoveFile(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.names, name)
	delete(c.durable, name)
}

// do records an operation and runs it, as far as the fault lets it. persist makes
// durable what run did; it runs for the fault Persisted only. Both run under mu.
func (c *CrashFS) do(op Op, run func() error, persist func()) (Fault, error) {
	c.mu.Lock()
	op.N = len(c.ops)
	c.ops = append(c.ops, op)
	decide := c.fault
	c.mu.Unlock()
	fault := NoFault
	if decide != nil {
		fault = decide(op)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if fault == NoFault || fault == Persisted {
		if err := run(); err != nil {
			return fault, err
		}
	}
	if fault == NoFault {
		return fault, nil
	}
	if fault == Persisted {
		persist()
	}
	return fault, fmt.Errorf("%s %s: %w", op.Kind, op.Name, ErrInjected)
}

// flush makes the changes durable that ours selects.
func (c *CrashFS) flush(ours func(change) bool) {
	c.pending = slices.DeleteFunc(c.pending, func(ch change) bool {
		if !ours(ch) {
			return false
		}
		switch {
		case ch.dir != "":
			ch.apply(c.durable)
		case ch.data == nil:
			ch.file.disk = resize(ch.file.disk, ch.off)
		default:
			ch.file.disk = writeAt(ch.file.disk, ch.data, ch.off)
		}
		return true
	})
}

func (c *CrashFS) flushDir(dir string) {
	c.flush(func(ch change) bool { return ch.dir == dir })
	for d := range c.dirs {
		if filepath.Dir(d) == dir {
			c.dirs[d] = true
		}
	}
}

func (c *CrashFS) flushFile(f *inode) {
	c.flush(func(ch change) bool { return ch.file == f })
}

// rename changes names now, and durably with the next sync of the folder.
func (c *CrashFS) rename(dir string, apply func(map[string]*inode)) {
	apply(c.names)
	c.pending = append(c.pending, change{dir: dir, apply: apply})
}

// Lock implements storage.FS.
func (c *CrashFS) Lock(dir string, create bool) (io.Closer, error) {
	c.mu.Lock()
	_, exists := c.dirs[dir]
	c.mu.Unlock()
	if !exists {
		if !create {
			return nil, &fs.PathError{Op: "open", Path: dir, Err: fs.ErrNotExist}
		}
		_, err := c.do(Op{Kind: Mkdir, Name: dir},
			func() error { c.dirs[dir] = false; return nil },
			func() { c.dirs[dir] = true })
		if err != nil {
			return nil, err
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.locks[dir] {
		return nil, storage.ErrLocked
	}
	c.locks[dir] = true
	return unlock(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.locks, dir)
	}), nil
}

type unlock func()

func (u unlock) Close() error { u(); return nil }

// List implements storage.FS.
func (c *CrashFS) List(dir string) ([]string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var names []string
	for name := range c.names {
		if filepath.Dir(name) == dir {
			names = append(names, filepath.Base(name))
		}
	}
	return names, nil
}

// Open implements storage.FS.
func (c *CrashFS) Open(name string) (storage.File, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f := c.names[name]
	if f == nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	return &file{fs: c, name: name, inode: f}, nil
}

// Create implements storage.FS.
func (c *CrashFS) Create(name string) (storage.File, error) {
	dir, f := filepath.Dir(name), &inode{}
	_, err := c.do(Op{Kind: Create, Name: name}, func() error {
		if c.names[name] != nil {
			return &fs.PathError{Op: "create", Path: name, Err: fs.ErrExist}
		}
		c.rename(dir, func(names map[string]*inode) { names[name] = f })
		return nil
	}, func() { c.flushDir(dir) })
	if err != nil {
		return nil, err
	}
	return &file{fs: c, name: name, inode: f}, nil
}

// Rename implements storage.FS. Both names must be in one folder.
func (c *CrashFS) Rename(from, to string) error {
	dir := filepath.Dir(to)
	_, err := c.do(Op{Kind: Rename, Name: to}, func() error {
		f := c.names[from]
		if f == nil || filepath.Dir(from) != dir {
			return &fs.PathError{Op: "rename", Path: from, Err: fs.ErrNotExist}
		}
		c.rename(dir, func(names map[string]*inode) {
			delete(names, from)
			names[to] = f
		})
		return nil
	}, func() { c.flushDir(dir) })
	return err
}

// Remove implements storage.FS.
func (c *CrashFS) Remove(name string) error {
	dir := filepath.Dir(name)
	_, err := c.do(Op{Kind: Remove, Name: name}, func() error {
		if c.names[name] == nil {
			return &fs.PathError{Op: "remove", Path: name, Err: fs.ErrNotExist}
		}
		c.rename(dir, func(names map[string]*inode) { delete(names, name) })
		return nil
	}, func() { c.flushDir(dir) })
	return err
}

// SyncDir implements storage.FS.
func (c *CrashFS) SyncDir(dir string) error {
	_, err := c.do(Op{Kind: SyncDir, Name: dir},
		func() error { c.flushDir(dir); return nil }, func() {})
	return err
}

// file is an open file. It keeps its inode when the name changes.
type file struct {
	fs    *CrashFS
	name  string
	inode *inode

	closed bool // guarded by fs.mu
}

// open is the error of using a closed file. fs.mu is held.
func (f *file) open() error {
	if f.closed {
		return &fs.PathError{Op: "use", Path: f.name, Err: fs.ErrClosed}
	}
	return nil
}

func (f *file) ReadAt(p []byte, off int64) (int, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if err := f.open(); err != nil {
		return 0, err
	}
	if off >= int64(len(f.inode.data)) {
		return 0, io.EOF
	}
	n := copy(p, f.inode.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// write changes the contents now, and durably with the next sync.
func (f *file) write(p []byte, off int64) {
	f.inode.data = writeAt(f.inode.data, p, off)
	f.fs.pending = append(f.fs.pending, change{file: f.inode, off: off, data: bytes.Clone(p)})
}

func (f *file) WriteAt(p []byte, off int64) (int, error) {
	fault, err := f.fs.do(Op{Kind: Write, Name: f.name, Offset: off, Size: len(p)}, func() error {
		if err := f.open(); err != nil {
			return err
		}
		f.write(p, off)
		return nil
	}, func() { f.fs.flushFile(f.inode) })
	if err == nil {
		return len(p), nil
	}
	if fault == Partial {
		f.fs.mu.Lock()
		defer f.fs.mu.Unlock()
		f.write(p[:len(p)/2], off)
		return len(p) / 2, err
	}
	return 0, err
}

func (f *file) Truncate(size int64) error {
	_, err := f.fs.do(Op{Kind: Truncate, Name: f.name, Size: int(size)}, func() error {
		if err := f.open(); err != nil {
			return err
		}
		f.inode.data = resize(f.inode.data, size)
		f.fs.pending = append(f.fs.pending, change{file: f.inode, off: size})
		return nil
	}, func() { f.fs.flushFile(f.inode) })
	return err
}

func (f *file) Sync() error {
	fault, err := f.fs.do(Op{Kind: Sync, Name: f.name}, func() error {
		if err := f.open(); err != nil {
			return err
		}
		f.fs.flushFile(f.inode)
		return nil
	}, func() {})
	if fault == Forgotten {
		f.fs.mu.Lock()
		defer f.fs.mu.Unlock()
		f.fs.pending = slices.DeleteFunc(f.fs.pending, func(ch change) bool { return ch.file == f.inode })
	}
	return err
}

func (f *file) Size() (int64, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	return int64(len(f.inode.data)), f.open()
}

func (f *file) Close() error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if err := f.open(); err != nil {
		return err
	}
	f.closed = true
	return nil
}

func resize(b []byte, size int64) []byte {
	if size <= int64(len(b)) {
		return b[:size:size]
	}
	return append(b, make([]byte, size-int64(len(b)))...)
}

func writeAt(b, p []byte, off int64) []byte {
	if end := off + int64(len(p)); end > int64(len(b)) {
		b = resize(b, end)
	}
	copy(b[off:], p)
	return b
}
