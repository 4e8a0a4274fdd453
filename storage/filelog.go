package storage

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// LogOptions says how to open a FileLog. Only Instance is required.
type LogOptions struct {
	// Instance is the replica whose log it is, 1 to MaxInstance. A log belongs to
	// one instance forever.
	Instance uint32
	// SegmentSize is when a new segment file is started, in bytes. It bounds what
	// is read at start. Default 16 MiB; at least 4 KiB.
	SegmentSize int64
	// LockTimeout is how long to wait for another process that is about to
	// leave. Default 2 s.
	LockTimeout time.Duration
	// MustExist makes a missing log an error that wraps fs.ErrNotExist, where the
	// default is to begin an empty one.
	MustExist bool
	// ReadOnly opens an existing log to read it: nothing is written or cut, an
	// incomplete last write is left out and can be seen in Torn, and what changes
	// something returns ErrReadOnly. The folder is locked all the same.
	ReadOnly bool
	// FS is the file system, the operating system's if nil.
	FS FS
	// Remote says that FS is on the other side of a network, where failures pass. Then
	// Append does not outlast its context, and after a failed write the log opens itself
	// anew, again and again until that succeeds; until then everything fails with
	// ErrNotDurable. It goes on only if it finds what it had written, and at most the
	// write that failed more: where somebody else wrote in between it stays unusable.
	Remote bool
	// Now is the time of a record; nil means the system's clock, and that Append refuses
	// with ErrClock while that is five minutes or more before the newest record. Who has a
	// clock of its own decides itself what a step of the system's means: records never go
	// back behind the newest one.
	Now func() time.Time
	// Log receives the few things worth a line; nil discards them.
	Log *slog.Logger
	// Metrics registers signet_storage_log_*; nil registers none.
	Metrics prometheus.Registerer
}

// FileLog is the Log in a folder of segment files. It is made by OpenLog. One
// process at a time has it open.
type FileLog struct {
	dir         string
	instance    uint32
	logID       [16]byte
	segmentSize int64
	fs          FS
	now         func() time.Time // nil: the system's clock
	log         *slog.Logger
	metrics     *logMetrics
	lock        io.Closer
	readOnly    bool
	remote      bool
	torn        int64 // bytes behind the last complete write, where readOnly

	// reading is held shared by who reads old segments, exclusively by who removes
	// some; nobody waits for it exclusively.
	reading sync.RWMutex
	skipped atomic.Int32 // how often in a row Prune met who reads

	// Group commit has no goroutine of its own. The first caller that finds
	// nobody leading becomes the leader: it writes one frame for as many waiting
	// calls as fit and then passes the lead to the next waiting call, if any. So
	// no caller writes twice for others, and no lock is held across I/O.

	mu      sync.Mutex
	idle    sync.Cond  // signalled when leading becomes false; uses mu
	leading bool       // guarded by mu
	queue   []*pending // waiting calls, oldest first; guarded by mu
	closed  bool       // guarded by mu
	failed  error      // first failed write; guarded by mu
	stopped error      // why a remote log does not open itself anew; guarded by mu

	closing chan struct{}  // closed by Close
	tasks   sync.WaitGroup // what goes on after a write of a remote log failed

	// Changed only by the leader, under mu; the leader may read them without mu.
	chain      chain      // durable
	segments   []segment  // ascending; the last one is being written
	checkpoint Checkpoint // where the log begins, if it was pruned

	// Owned by the leader; by Close when nobody leads anymore.
	file File
	seed uint32
	buf  []byte
	// tailFirst is when the first batch of the last segment was written, Unix
	// nanoseconds; 0 if it has none.
	tailFirst int64
	// doubt is what the chain would be after the batch that is being written.
	doubt mark
}

var _ Log = (*FileLog)(nil)

// pending is one call that waits for its frame to be durable.
type pending struct {
	body  []byte // records, each with its length; nil for a head
	count int
	head  Head
	op    func() error // something else to do with the lead

	taken bool // the leader has it; guarded by FileLog.mu
	// lead is closed to make the call the leader. Then it is the oldest in the queue.
	lead chan struct{}
	// done is closed when last and err are set.
	done chan struct{}
	last uint64
	err  error
}

func newPending() *pending {
	return &pending{lead: make(chan struct{}), done: make(chan struct{})}
}

// Append adds records and returns the sequence of the last one when they are
// durable. See Log.
func (l *FileLog) Append(ctx context.Context, records [][]byte) (last uint64, err error) {
	if err := CheckAppend(records); err != nil {
		return 0, fmt.Errorf("appending to log %s: %w", l.dir, err)
	}
	p := newPending()
	p.count = len(records)
	size := 0
	for _, r := range records {
		size += 4 + len(r)
	}
	// A copy, so that a caller who gave up may reuse its records at once.
	p.body = make([]byte, 0, size)
	for _, r := range records {
		p.body = binary.BigEndian.AppendUint32(p.body, uint32(len(r)))
		p.body = append(p.body, r...)
	}
	if err := l.do(ctx, p); err != nil {
		return 0, fmt.Errorf("appending to log %s: %w", l.dir, err)
	}
	return p.last, nil
}

// Head is the newest durable state, unsigned.
func (l *FileLog) Head() Head {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.chain.unsigned()
}

// AppendHead records a signed head. See Log. A head that is refused leaves the
// log usable.
func (l *FileLog) AppendHead(ctx context.Context, h Head) error {
	p := newPending()
	p.head = h
	p.head.Signature = slices.Clone(h.Signature)
	if err := l.do(ctx, p); err != nil {
		return fmt.Errorf("recording signed head in log %s: %w", l.dir, err)
	}
	return nil
}

// SignedHead is the newest recorded signed head; ok is false if there is none.
func (l *FileLog) SignedHead() (h Head, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	h = l.chain.signed
	h.Signature = slices.Clone(h.Signature)
	return h, h.Signature != nil
}

// Close waits for the write that is going on, fails the calls that wait, and
// releases the folder. Only the first call does something.
func (l *FileLog) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	close(l.closing)
	for l.leading {
		l.idle.Wait()
	}
	l.mu.Unlock()
	l.tasks.Wait()
	l.mu.Lock()
	l.metrics.unregister()
	// The lock last: who gets it may rely on nobody writing.
	if err := errors.Join(l.closeFile(), l.unlock()); err != nil {
		return fmt.Errorf("closing log %s: %w", l.dir, err)
	}
	return nil
}

// usable is why nothing can be written, nil if it can. mu is held.
func (l *FileLog) usable() error {
	if l.closed {
		return ErrClosed
	}
	if l.readOnly {
		return ErrReadOnly
	}
	if l.stopped != nil {
		return fmt.Errorf("%w (first failure: %w); opening the log anew: %w", l.notDurable(), l.failed, l.stopped)
	}
	if l.failed != nil {
		return fmt.Errorf("%w (first failure: %w)", l.notDurable(), l.failed)
	}
	return nil
}

// do queues a call and returns when its outcome is known or ctx ends.
func (l *FileLog) do(ctx context.Context, p *pending) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	l.mu.Lock()
	if err := l.usable(); err != nil {
		l.mu.Unlock()
		return err
	}
	l.queue = append(l.queue, p)
	lead := !l.leading
	l.leading = true
	l.mu.Unlock()
	if !lead {
		select {
		case <-p.done:
			return p.err
		case <-p.lead:
		case <-ctx.Done():
			return l.giveUp(ctx, p)
		}
	}
	// Whoever is about to append does so now and shares this fsync: a goroutine in
	// fsync holds its processor for longer than many of them need.
	runtime.Gosched()
	l.mu.Lock()
	calls := l.take()
	l.mu.Unlock()
	if !l.remote {
		l.write(calls)
		return p.err
	}
	go l.write(calls) // ends with the requests of FS, which take a bounded time
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return l.giveUp(ctx, p)
	}
}

// giveUp takes a call back whose context ended while it waited.
func (l *FileLog) giveUp(ctx context.Context, p *pending) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if p.taken {
		return fmt.Errorf("%w, while it was being written: it may have happened", context.Cause(ctx))
	}
	i := slices.Index(l.queue, p)
	l.queue = slices.Delete(l.queue, i, i+1)
	select {
	case <-p.lead:
		// The lead came at the same moment; pass it on.
		l.passLead()
	default:
	}
	return context.Cause(ctx)
}

// passLead makes the oldest waiting call the leader. mu is held and the caller
// has the lead.
func (l *FileLog) passLead() {
	if err := l.usable(); err != nil {
		for _, p := range l.queue {
			p.taken, p.err = true, err
			close(p.done)
		}
		l.queue = nil
	}
	if len(l.queue) > 0 {
		close(l.queue[0].lead)
		return
	}
	l.leading = false
	l.idle.Broadcast()
}

// take removes from the queue what goes into one frame: the oldest call, and if it
// has records the calls with records after it, as far as they fit. mu is held.
func (l *FileLog) take() []*pending {
	n, count, size := 1, l.queue[0].count, len(l.queue[0].body)
	if count > 0 {
		for ; n < len(l.queue); n++ {
			p := l.queue[n]
			count += p.count
			size += len(p.body)
			if p.count == 0 || count > MaxRecords || size > MaxAppend {
				break
			}
		}
	}
	taken := slices.Clone(l.queue[:n])
	l.queue = slices.Delete(l.queue, 0, n)
	for _, p := range taken {
		p.taken = true
	}
	return taken
}

// write writes one frame for calls that were taken, and passes the lead on.
func (l *FileLog) write(calls []*pending) {
	var err error
	switch {
	case calls[0].op != nil:
		err = calls[0].op()
	case calls[0].count == 0:
		err = l.writeHead(calls[0].head)
	default:
		err = l.writeBatch(calls)
	}

	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range calls {
		p.err = err
		close(p.done)
	}
	l.passLead()
}

func (l *FileLog) writeBatch(calls []*pending) error {
	clock := l.now
	if clock == nil {
		clock = time.Now
	}
	now, last := clock().UnixNano(), l.chain.newest.time
	if behind := time.Duration(last - now); behind >= clockTolerance && l.now == nil {
		return fmt.Errorf("%w: it is %v behind, at %s; the newest record is of %s", ErrClock,
			behind.Round(time.Second), fromUnixNano(now).Format(time.RFC3339), fromUnixNano(last).Format(time.RFC3339))
	}
	now = max(now, last)
	if now <= 0 {
		return fmt.Errorf("%w: it shows a year before 1970", ErrClock)
	}
	bodies := make([][]byte, len(calls))
	count, size := 0, batchFixed+32+frameOverhead
	for i, p := range calls {
		bodies[i] = p.body
		count += p.count
		size += len(p.body)
	}
	if err := l.makeRoom(size); err != nil {
		return err
	}
	m := mark{sequence: l.chain.newest.sequence + uint64(count), time: now}
	first := l.chain.newest.sequence + 1
	l.buf, m.hash = appendBatch(beginFrame(l.buf, frameBatch), l.chain.newest, now, count, bodies)
	l.doubt = m
	if err := l.writeFrame(func(c *chain) { c.advance(m) }); err != nil {
		return err
	}
	if l.tailFirst == 0 {
		l.tailFirst = now
	}
	l.metrics.batch(count)
	for _, p := range calls {
		first += uint64(p.count)
		p.last = first - 1
	}
	return nil
}

func (l *FileLog) writeHead(h Head) error {
	if err := l.chain.checkHead(h); err != nil {
		return fmt.Errorf("%w; sign what Head returns now", err)
	}
	if err := l.makeRoom(frameOverhead + headFields + 4 + len(h.Signature)); err != nil {
		return err
	}
	l.buf = appendHead(beginFrame(l.buf, frameHead), h)
	return l.writeFrame(func(c *chain) { c.signed = h })
}

// writeFrame ends the frame in buf, makes it durable, and only then changes what
// the log says of itself.
func (l *FileLog) writeFrame(change func(*chain)) error {
	l.buf = endFrame(l.buf, l.seed)
	if _, err := l.file.WriteAt(l.buf, l.tail().size); err != nil {
		return l.fail(fmt.Errorf("writing segment %s: %w", segmentName(l.tail().index), err))
	}
	start := time.Now()
	if err := l.file.Sync(); err != nil {
		return l.fail(fmt.Errorf("syncing segment %s: %w", segmentName(l.tail().index), err))
	}
	l.metrics.synced(time.Since(start))
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tail().size += int64(len(l.buf))
	change(&l.chain)
	return nil
}

// fail makes the log unusable until it is opened again. The call that failed, all
// that wait and all that come get ErrNotDurable.
func (l *FileLog) fail(err error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.remote && l.failed == nil && !l.closed {
		l.tasks.Go(l.reopen)
	}
	l.failed = err
	l.metrics.failing(true)
	return fmt.Errorf("%w: %w", l.notDurable(), err)
}

// tail is the segment that is being written.
func (l *FileLog) tail() *segment { return &l.segments[len(l.segments)-1] }

// makeRoom starts a new segment if a frame would make the current one larger than
// it should be. A segment gets at least one frame.
func (l *FileLog) makeRoom(size int) error {
	tail := l.tail()
	if tail.size == headerSize || tail.size+int64(size) <= l.segmentSize {
		return nil
	}
	return l.rotate()
}

// rotate starts a new segment. The caller has the lead.
func (l *FileLog) rotate() error {
	tail := l.tail()
	h := segmentHeader{
		instance: l.instance,
		index:    tail.index + 1,
		logID:    l.logID,
		base:     l.chain.newest,
		prevSize: tail.size,
		carries:  l.chain.signed.Signature != nil,
	}
	f, n, err := createSegment(l.fs, l.dir, h, l.chain.signed)
	if err != nil {
		return l.fail(err)
	}
	old := l.file
	l.mu.Lock()
	l.file, l.seed, l.tailFirst = f, h.seed(), 0
	l.segments = append(l.segments, segment{index: h.index, base: h.base, size: n})
	l.mu.Unlock()
	if err := old.Close(); err != nil {
		return l.fail(fmt.Errorf("closing segment %s: %w", segmentName(h.index-1), err))
	}
	return nil
}

// createSegment makes a segment file with its header and the head that it carries,
// if it carries one. It gets its name only when its contents are durable: a file
// with a segment's name always has them.
func createSegment(fsys FS, dir string, h segmentHeader, signed Head) (f File, size int64, err error) {
	name := filepath.Join(dir, segmentName(h.index))
	defer func() {
		if err != nil {
			err = fmt.Errorf("creating segment %s: %w", segmentName(h.index), err)
			if f != nil {
				err = errors.Join(err, f.Close())
				f = nil
			}
		}
	}()
	if f, err = fsys.Create(name + tempSuffix); err != nil {
		return nil, 0, err
	}
	b := h.encode()
	if h.carries {
		b = append(b, endFrame(appendHead(beginFrame(nil, frameHead), signed), h.seed())...)
	}
	if _, err = f.WriteAt(b, 0); err != nil {
		return f, 0, err
	}
	if err = f.Sync(); err != nil {
		return f, 0, err
	}
	if err = fsys.Rename(name+tempSuffix, name); err != nil {
		return f, 0, err
	}
	if err = fsys.SyncDir(dir); err != nil {
		return f, 0, err
	}
	return f, int64(len(b)), nil
}
