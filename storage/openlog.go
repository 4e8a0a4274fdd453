package storage

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	defaultSegmentSize = 16 << 20
	minSegmentSize     = 4 << 10
	defaultLockTimeout = 2 * time.Second
	lockInterval       = 20 * time.Millisecond

	// tempSuffix marks a segment that is being created. One that is left over
	// was never part of the log.
	tempSuffix = ".tmp"
)

// OpenLog opens the log in a folder, which is created, with mode 0700, if its
// parent exists. It reads the last segment whole and of every other one the
// header: that the segments continue each other and have the size that the next
// one recorded is certain afterwards; Verify reads the rest.
//
// An incomplete last write is cut off, with a line in the log. Everything else
// that is not as it was written is an error that wraps ErrCorrupt and names the
// segment and the offset. Other errors are ErrLocked, ErrNewerFormat, a folder or
// file that others can read, a log of another instance, and those of the file
// system.
func OpenLog(dir string, opt LogOptions) (*FileLog, error) {
	l := &FileLog{
		dir:         dir,
		instance:    opt.Instance,
		segmentSize: opt.SegmentSize,
		fs:          opt.FS,
		now:         opt.Now,
		log:         opt.Log,
		readOnly:    opt.ReadOnly,
		remote:      opt.Remote,
		closing:     make(chan struct{}),
	}
	l.idle.L = &l.mu
	if l.segmentSize == 0 {
		l.segmentSize = defaultSegmentSize
	}
	if l.fs == nil && l.readOnly {
		l.fs = readOnlyFS{}
	} else if l.fs == nil {
		l.fs = osFS{}
	}
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	timeout := opt.LockTimeout
	if timeout == 0 {
		timeout = defaultLockTimeout
	}
	if err := l.open(opt, timeout); err != nil {
		err = errors.Join(err, l.closeFile(), l.unlock())
		return nil, fmt.Errorf("opening log %s: %w", dir, err)
	}
	return l, nil
}

func (l *FileLog) open(opt LogOptions, timeout time.Duration) (err error) {
	switch {
	case l.dir == "":
		return errors.New("no folder given")
	case l.instance < 1 || l.instance > MaxInstance:
		return fmt.Errorf("instance %d: must be 1 to %d", l.instance, MaxInstance)
	case l.segmentSize < minSegmentSize:
		return fmt.Errorf("segment size %d: must be at least %d", l.segmentSize, minSegmentSize)
	case timeout < 0:
		return fmt.Errorf("lock timeout %v is negative", timeout)
	}
	if l.lock, err = lockFolder(l.fs, l.dir, !opt.MustExist && !l.readOnly, timeout); err != nil {
		return err
	}
	indexes, err := l.list()
	if err != nil {
		return err
	}
	switch {
	case len(indexes) > 0:
		err = l.load(indexes)
	case opt.MustExist || l.readOnly:
		err = fmt.Errorf("no segment found; restore the log from a backup: %w", fs.ErrNotExist)
	default:
		err = l.begin()
	}
	if err != nil {
		return err
	}
	l.metrics, err = newLogMetrics(opt.Metrics)
	return err
}

// lockFolder waits a moment for a process that is about to leave.
func lockFolder(fsys FS, dir string, create bool, timeout time.Duration) (io.Closer, error) {
	deadline := time.Now().Add(timeout)
	for {
		lock, err := fsys.Lock(dir, create)
		if err == nil || !errors.Is(err, ErrLocked) {
			return lock, err
		}
		if !time.Now().Before(deadline) {
			return nil, fmt.Errorf("%w, after waiting %v; stop it first (to find it: fuser %q)", err, timeout, dir)
		}
		time.Sleep(lockInterval)
	}
}

// list reads the checkpoint, returns the indexes of the segments, ascending and
// without gaps, and removes what a creation or a pruning that did not end left over.
func (l *FileLog) list() ([]uint64, error) {
	names, err := l.fs.List(l.dir)
	if err != nil {
		return nil, err
	}
	if err := l.readCheckpoint(names); err != nil {
		return nil, err
	}
	var indexes []uint64
	var leftOver []string
	for _, name := range names {
		if index, ok := segmentIndex(name); ok && index < l.first() {
			leftOver = append(leftOver, name)
		} else if ok {
			indexes = append(indexes, index)
		} else if n, ok := strings.CutSuffix(name, tempSuffix); ok {
			if _, ok := segmentIndex(n); ok || n == checkpointName {
				leftOver = append(leftOver, name)
			}
		}
	}
	slices.Sort(indexes)
	for i, index := range indexes {
		if want := l.first() + uint64(i); index != want {
			return nil, fmt.Errorf("segment %s is missing: %w", segmentName(want), ErrCorrupt)
		}
	}
	if l.checkpoint.Segment > 0 && len(indexes) == 0 {
		return nil, fmt.Errorf("segment %s is missing: %w", segmentName(l.first()), ErrCorrupt)
	}
	if l.readOnly {
		return indexes, nil
	}
	for _, name := range leftOver {
		if err := l.fs.Remove(filepath.Join(l.dir, name)); err != nil {
			return nil, fmt.Errorf("removing what was left over: %w", err)
		}
	}
	return indexes, nil
}

// begin creates the first segment of an empty log.
func (l *FileLog) begin() error {
	rand.Read(l.logID[:])
	h := segmentHeader{instance: l.instance, index: 1, logID: l.logID, base: genesis(l.instance, l.logID)}
	f, size, err := createSegment(l.fs, l.dir, h, Head{})
	if err != nil {
		return err
	}
	l.file, l.seed = f, h.seed()
	l.chain = newChain(l.instance, h.base)
	l.segments = []segment{{index: 1, base: h.base, size: size}}
	if err := l.settleNames(); err != nil {
		return err
	}
	l.log.Info("began an empty issuance log", "dir", l.dir, "instance", l.instance)
	return nil
}

// load reads the headers of all segments and the last segment whole.
func (l *FileLog) load(indexes []uint64) error {
	var last segmentHeader
	for _, index := range indexes {
		name := segmentName(index)
		f, err := l.fs.Open(filepath.Join(l.dir, name))
		if err != nil {
			return fmt.Errorf("opening segment %s: %w", name, err)
		}
		if l.file != nil {
			if err := l.file.Close(); err != nil {
				return errors.Join(err, f.Close())
			}
		}
		l.file = f
		h, err := readHeader(f, name, index)
		if err != nil {
			return err
		}
		if err := l.link(h, last); err != nil {
			return err
		}
		size, err := f.Size()
		if err != nil {
			return fmt.Errorf("reading segment %s: %w", name, err)
		}
		l.segments = append(l.segments, segment{index: index, base: h.base, size: size})
		last = h
	}
	l.seed = last.seed()
	l.chain = newChain(l.instance, last.base)
	return l.loadTail(last)
}

// link checks that a segment continues the one before.
func (l *FileLog) link(h, prev segmentHeader) error {
	name := segmentName(h.index)
	if c := l.checkpoint; prev.index == 0 && c.Segment > 0 {
		if h.logID != l.logID || h.instance != c.Instance || h.base != c.mark() {
			return fmt.Errorf("segment %s is not what the checkpoint goes on with: %w", name, ErrCorrupt)
		}
		return nil
	}
	if h.index == 1 {
		l.logID = h.logID
		if h.instance != l.instance {
			return fmt.Errorf("the log is of instance %d, not %d; a restored or moved authority takes a new instance and a new folder", h.instance, l.instance)
		}
		if h.base != genesis(h.instance, h.logID) || h.prevSize != 0 || h.carries {
			return fmt.Errorf("segment %s is not the first of a log: %w", name, ErrCorrupt)
		}
		return nil
	}
	if h.logID != l.logID || h.instance != l.instance {
		return fmt.Errorf("segment %s is of another log: %w", name, ErrCorrupt)
	}
	if h.base.sequence < prev.base.sequence || h.base.time < prev.base.time {
		return fmt.Errorf("segment %s starts before %s: %w", name, segmentName(prev.index), ErrCorrupt)
	}
	if size := l.tail().size; size != h.prevSize {
		return fmt.Errorf("segment %s has %d bytes, but %s recorded %d: %w", segmentName(prev.index), size, name, h.prevSize, ErrCorrupt)
	}
	return nil
}

// loadTail reads the last segment, cuts what a crash left of a last write, and
// makes what remains durable.
func (l *FileLog) loadTail(h segmentHeader) error {
	tail := l.tail()
	name := segmentName(h.index)
	r := newSegmentReader(l.file, name, h, &l.chain, tail.size)
	var err error
	for err == nil {
		var b batch
		if b, err = r.next(); err == nil && b.count > 0 && l.tailFirst == 0 {
			l.tailFirst = b.time
		}
	}
	cut := int64(0)
	if errors.Is(err, errInvalidFrame) {
		if err := r.torn(); err != nil {
			return err
		}
		cut = r.limit - r.offset
		if l.readOnly {
			l.torn, tail.size = cut, r.offset
			return nil
		}
		if err := l.file.Truncate(r.offset); err != nil {
			return fmt.Errorf("cutting the incomplete write at the end of segment %s: %w", name, err)
		}
	} else if err != io.EOF {
		return err
	}
	tail.size = r.offset
	if l.readOnly {
		return nil
	}
	if err := l.settle(r.last); err != nil {
		return fmt.Errorf("making segment %s durable: %w", name, err)
	}
	if cut > 0 {
		l.log.Warn("cut an incomplete write off the issuance log; nothing that was acknowledged is lost if the last stop was a crash",
			"segment", name, "offset", r.offset, "bytes", cut)
	}
	return nil
}

// settle makes durable what was read. The last frame may be in the page cache
// only, and if the process before had a failed fsync the kernel may hold its pages
// for clean, so that an fsync alone would do nothing: it is written once more.
func (l *FileLog) settle(last int64) error {
	if last > 0 {
		b := make([]byte, l.tail().size-last)
		if _, err := l.file.ReadAt(b, last); err != nil {
			return err
		}
		if _, err := l.file.WriteAt(b, last); err != nil {
			return err
		}
	}
	if err := l.file.Sync(); err != nil {
		return err
	}
	return l.settleNames()
}

// settleNames makes the names of the segments and of the folder durable, which a
// process before may have created without getting so far.
func (l *FileLog) settleNames() error {
	if err := l.fs.SyncDir(l.dir); err != nil {
		return fmt.Errorf("syncing the folder: %w", err)
	}
	if err := l.fs.SyncDir(filepath.Dir(filepath.Clean(l.dir))); err != nil {
		return fmt.Errorf("syncing the folder above: %w", err)
	}
	return nil
}
