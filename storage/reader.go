package storage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"path/filepath"
	"slices"
	"time"
)

// readAhead is how much of a segment is read at once.
const readAhead = 256 << 10

// segmentReader reads the frames of one segment in order and checks them against
// the chain. It belongs to one goroutine.
type segmentReader struct {
	f      File
	name   string
	header segmentHeader
	seed   uint32
	chain  *chain

	offset int64 // of the next frame
	limit  int64 // reading ends here
	last   int64 // offset of the frame that next returned last, 0 if none

	buf    []byte // bytes of the file from bufOff on
	bufOff int64
}

// readHeader reads a segment's header and checks that it is the one that belongs
// there.
func readHeader(f File, name string, index uint64) (segmentHeader, error) {
	b := make([]byte, headerSize)
	if _, err := f.ReadAt(b, 0); errors.Is(err, io.EOF) {
		return segmentHeader{}, fmt.Errorf("segment %s is shorter than its header: %w", name, ErrCorrupt)
	} else if err != nil {
		return segmentHeader{}, fmt.Errorf("reading segment %s: %w", name, err)
	}
	h, err := parseSegmentHeader(b)
	if err != nil {
		return segmentHeader{}, fmt.Errorf("segment %s: %w", name, err)
	}
	if h.index != index {
		return segmentHeader{}, fmt.Errorf("segment %s says that it is number %d: %w", name, h.index, ErrCorrupt)
	}
	return h, nil
}

// newSegmentReader reads up to limit. The chain must be at the segment's base.
func newSegmentReader(f File, name string, h segmentHeader, c *chain, limit int64) *segmentReader {
	return &segmentReader{f: f, name: name, header: h, seed: h.seed(), chain: c, offset: headerSize, limit: limit}
}

// at names the place of an error.
func (s *segmentReader) at(err error) error {
	return fmt.Errorf("segment %s, offset %d: %w", s.name, s.offset, err)
}

// bytes returns n bytes from the current offset, or fewer at the limit. They are
// valid until the next call.
func (s *segmentReader) bytes(n int) ([]byte, error) {
	n = int(min(int64(n), s.limit-s.offset))
	start := s.offset - s.bufOff
	if start < 0 || start+int64(n) > int64(len(s.buf)) {
		size := int(min(int64(max(n, readAhead)), s.limit-s.offset))
		if cap(s.buf) < size {
			s.buf = make([]byte, size)
		}
		s.buf, s.bufOff, start = s.buf[:size], s.offset, 0
		if m, err := s.f.ReadAt(s.buf, s.offset); m < size {
			s.buf = nil
			if errors.Is(err, io.EOF) {
				err = fmt.Errorf("file ends before %d bytes: %w", s.limit, ErrCorrupt)
			}
			return nil, err
		}
	}
	return s.buf[start : start+int64(n)], nil
}

// next reads a frame, checks it and advances the chain. b is the batch, with
// count 0 for a signed head; it is valid until the next call. The error is io.EOF
// at the limit, errInvalidFrame for bytes that are no frame, and anything else,
// ErrCorrupt among it, where a crash cannot be the reason. No error moves the
// reader.
func (s *segmentReader) next() (b batch, err error) {
	carried := s.header.carries && s.offset == headerSize
	if s.offset == s.limit {
		if carried {
			return batch{}, s.at(fmt.Errorf("the newest signed head is missing: %w", ErrCorrupt))
		}
		return batch{}, io.EOF
	}
	raw, err := s.bytes(frameHeaderSize)
	if err != nil {
		return batch{}, s.at(err)
	}
	kind, n, err := parseFrameHeader(raw, s.seed)
	if err != nil {
		return batch{}, s.at(err)
	}
	size := n + frameOverhead
	if raw, err = s.bytes(size); err != nil {
		return batch{}, s.at(err)
	}
	if len(raw) < size {
		return batch{}, s.at(errInvalidFrame)
	}
	if err := checkFrame(raw, s.seed); err != nil {
		return batch{}, s.at(err)
	}
	if carried && kind != frameHead {
		return batch{}, s.at(fmt.Errorf("segment does not start with the newest signed head: %w", ErrCorrupt))
	}
	payload := raw[frameHeaderSize : frameHeaderSize+n]
	switch kind {
	case frameBatch:
		if b, err = parseBatch(payload); err == nil {
			err = s.chain.batch(b)
		}
	case frameHead:
		var h Head
		if h, err = parseHead(payload); err == nil {
			err = s.chain.head(h, carried)
			b.head = &h
		}
	default:
		return batch{}, s.at(fmt.Errorf("frame of type %d: %w", kind, ErrNewerFormat))
	}
	if err != nil {
		return batch{}, s.at(fmt.Errorf("%w: %w", err, ErrCorrupt))
	}
	s.last = s.offset
	s.offset += int64(size)
	return b, nil
}

// torn decides, after next returned errInvalidFrame, whether a crash during one
// write explains the bytes from the current offset to the end: there are no more
// of them than one frame has, they do not go on after a frame whose length is
// known, and no valid frame follows. Since at most one frame is ever written and
// not yet synced, anything else is damage. So is a missing carried head, which was
// durable before the segment had its name.
func (s *segmentReader) torn() error {
	size := s.limit - s.offset
	if s.header.carries && s.offset == headerSize {
		return s.at(fmt.Errorf("the newest signed head is unreadable: %w", ErrCorrupt))
	}
	if size > maxFrame {
		return s.at(fmt.Errorf("%d bytes that are no frame, more than one write leaves: %w", size, ErrCorrupt))
	}
	tail, err := s.bytes(int(size))
	if err != nil {
		return s.at(err)
	}
	if _, n, err := parseFrameHeader(tail, s.seed); err == nil && n+frameOverhead < len(tail) {
		return s.at(fmt.Errorf("frame with a wrong checksum and %d bytes after it: %w", len(tail)-n-frameOverhead, ErrCorrupt))
	}
	for i := 1; i < len(tail); i++ {
		j := bytes.Index(tail[i:], []byte(frameMagic))
		if j < 0 {
			break
		}
		i += j
		_, n, err := parseFrameHeader(tail[i:], s.seed)
		if errors.Is(err, errInvalidFrame) || err == nil && n+frameOverhead > len(tail)-i {
			continue
		}
		if err != nil || checkFrame(tail[i:i+n+frameOverhead], s.seed) == nil {
			return s.at(fmt.Errorf("no frame here, but one at offset %d: %w", s.offset+int64(i), ErrCorrupt))
		}
	}
	return nil
}

// segment is what an open log knows of one of its segments.
type segment struct {
	index uint64
	base  mark
	size  int64 // durable size
}

// snapshot is the durable log at one moment.
type snapshot struct {
	segments []segment
	newest   mark
	err      error // ErrClosed
}

func (l *FileLog) snapshot() snapshot {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := snapshot{segments: slices.Clone(l.segments), newest: l.chain.newest}
	if l.closed {
		s.err = ErrClosed
	}
	return s
}

// walk reads the segments of a snapshot from one on, checks everything, and calls
// visit for each batch, and for each signed head as a batch without records, until
// it returns false or an error.
func (l *FileLog) walk(ctx context.Context, s snapshot, from int, visit func(batch) (bool, error)) error {
	if s.err != nil {
		return s.err
	}
	c := newChain(l.instance, s.segments[from].base)
	for i, seg := range s.segments[from:] {
		last := from+i == len(s.segments)-1
		if done, err := l.walkSegment(ctx, seg, last, &c, visit); done || err != nil {
			return err
		}
		end := s.newest
		if !last {
			end = s.segments[from+i+1].base
		}
		if c.newest != end {
			return fmt.Errorf("segment %s ends at sequence %d; what follows it continues from %d or from another hash: %w",
				segmentName(seg.index), c.newest.sequence, end.sequence, ErrCorrupt)
		}
	}
	return nil
}

// walkSegment reads one segment of a snapshot; done means that visit has enough.
func (l *FileLog) walkSegment(ctx context.Context, seg segment, last bool, c *chain, visit func(batch) (bool, error)) (done bool, err error) {
	name := segmentName(seg.index)
	f, err := l.fs.Open(filepath.Join(l.dir, name))
	if err != nil {
		return false, fmt.Errorf("opening segment %s: %w", name, err)
	}
	defer f.Close()
	h, err := readHeader(f, name, seg.index)
	if err != nil {
		return false, err
	}
	if h.base != seg.base || h.instance != l.instance || h.logID != l.logID {
		return false, fmt.Errorf("segment %s is not the one that was opened: %w", name, ErrCorrupt)
	}
	if c.signed.Signature != nil && !h.carries {
		return false, fmt.Errorf("segment %s does not carry the newest signed head: %w", name, ErrCorrupt)
	}
	size, err := f.Size()
	if err != nil {
		return false, fmt.Errorf("reading segment %s: %w", name, err)
	}
	// Behind the durable size of the last segment somebody may be writing.
	if size < seg.size || size > seg.size && !last {
		return false, fmt.Errorf("segment %s has %d bytes, not %d: %w", name, size, seg.size, ErrCorrupt)
	}
	r := newSegmentReader(f, name, h, c, seg.size)
	for {
		if ctx.Err() != nil {
			return false, context.Cause(ctx)
		}
		b, err := r.next()
		switch {
		case err == io.EOF:
			return false, nil
		case errors.Is(err, errInvalidFrame):
			return false, fmt.Errorf("%w: %w", err, ErrCorrupt)
		case err != nil:
			return false, err
		}
		if more, err := visit(b); err != nil {
			return false, r.at(err)
		} else if !more {
			return true, nil
		}
	}
}

// Scan yields the records from a sequence on, up to the newest one when it was
// called; 0 and 1 both mean all that was not pruned. It checks everything that it reads and yields an
// error last: ErrCorrupt, ErrClosed, that of reading, or ctx's cause. It can run
// while others append.
func (l *FileLog) Scan(ctx context.Context, from uint64) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		l.reading.RLock()
		defer l.reading.RUnlock()
		s := l.snapshot()
		if from > s.newest.sequence && s.err == nil {
			return
		}
		// The last segment that starts at or before from.
		start := len(s.segments) - 1
		for start > 0 && s.segments[start].base.sequence >= max(from, 1) {
			start--
		}
		err := l.walk(ctx, s, start, func(b batch) (bool, error) {
			if b.count == 0 {
				return true, nil
			}
			t := fromUnixNano(b.time)
			// One copy for the batch: the reader reuses its buffer.
			b.records = slices.Clone(b.records)
			return b.each(func(sequence uint64, data []byte) bool {
				return sequence < from || yield(Record{Sequence: sequence, Time: t, Data: data}, nil)
			}), nil
		})
		if err != nil {
			yield(Record{}, fmt.Errorf("reading log %s: %w", l.dir, err))
		}
	}
}

// Since is where a Scan has to start to see every record of t or later. It may see
// older ones first, by as much as a segment holds.
func (l *FileLog) Since(t time.Time) uint64 {
	s := l.snapshot()
	i := len(s.segments) - 1
	// The records of a segment are not older than the newest one before it.
	for i > 0 && s.segments[i].base.time >= t.UnixNano() {
		i--
	}
	return s.segments[i].base.sequence + 1
}

// Verify reads the whole log and checks every checksum, hash, sequence and time,
// that the segments continue each other and that signed heads name states of the
// chain. It does not verify signatures. It can run while others append.
func (l *FileLog) Verify(ctx context.Context) error {
	return l.VerifyHeads(ctx, func(Head) error { return nil })
}

// VerifyHeads is Verify that also has each recorded signed head checked, in order,
// after it was found to name a state of the chain. A head that later segments repeat
// is checked once for each.
func (l *FileLog) VerifyHeads(ctx context.Context, check func(Head) error) error {
	l.reading.RLock()
	defer l.reading.RUnlock()
	err := l.walk(ctx, l.snapshot(), 0, func(b batch) (bool, error) {
		if b.head == nil {
			return true, nil
		}
		return true, check(*b.head)
	})
	if err != nil {
		return fmt.Errorf("verifying log %s: %w", l.dir, err)
	}
	return nil
}
