package storage

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"path/filepath"
	"slices"
)

// Err is nil while records can be appended, else the reason why not: the log is
// closed, or a write failed and it must be opened again. It says nothing about
// the next write.
func (l *FileLog) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.usable()
}

// Err is nil while the store can be used, else the reason why not.
func (b *Bolt) Err() error { return b.usable() }

// Remote reports whether the log opens itself anew after a failure: see LogOptions.
func (l *FileLog) Remote() bool { return l.remote }

// Torn is how many bytes of an incomplete last write were found behind the end of
// a log that was opened for reading only.
func (l *FileLog) Torn() int64 { return l.torn }

// Holds reports whether the log holds the state that a head names. A head beyond
// the end, or with another hash at its place, is of a log that lost records, or of
// another log altogether. Neither time nor signature is compared. known is false
// for a head of before the log's checkpoint: what it names was pruned.
//
// A head that is not recent has the segment read that it names a state of.
func (l *FileLog) Holds(ctx context.Context, h Head) (same, known bool, err error) {
	l.mu.Lock()
	same, known = l.chain.holds(h)
	l.mu.Unlock()
	if known {
		return same, known, nil
	}
	l.reading.RLock()
	defer l.reading.RUnlock()
	s := l.snapshot()
	if h.Sequence < s.segments[0].base.sequence {
		return false, false, nil
	}
	// The last segment that starts at or before it.
	i := len(s.segments) - 1
	for s.segments[i].base.sequence > h.Sequence {
		i--
	}
	if b := s.segments[i].base; b.sequence == h.Sequence {
		return b.hash == h.Hash, true, nil
	}
	err = l.walk(ctx, s, i, func(b batch) (bool, error) {
		if b.count == 0 {
			return true, nil
		}
		after := b.after()
		same = after.sequence == h.Sequence && after.hash == h.Hash
		return after.sequence < h.Sequence, nil
	})
	if err != nil {
		return false, false, fmt.Errorf("looking for a head in log %s: %w", l.dir, err)
	}
	return same, true, nil
}

// Files calls visit for each file of the log as it is at one moment, in an order in
// which an interrupted copy is no log: the segments first, the checkpoint, if there
// is one, last. r gives size bytes. Nothing is checked; the log can be verified
// where it is copied to. It can run while others append.
func (l *FileLog) Files(ctx context.Context, visit func(name string, size int64, r io.Reader) error) error {
	l.reading.RLock()
	defer l.reading.RUnlock()
	l.mu.Lock()
	segments, checkpoint, err := slices.Clone(l.segments), l.checkpoint, error(nil)
	if l.closed {
		err = ErrClosed
	}
	l.mu.Unlock()
	for _, s := range segments {
		if err == nil {
			err = context.Cause(ctx)
		}
		if err == nil {
			err = l.visitFile(segmentName(s.index), s.size, visit)
		}
	}
	if err == nil && checkpoint.Segment > 0 {
		b := checkpoint.encode(l.logID)
		err = visit(checkpointName, int64(len(b)), bytes.NewReader(b))
	}
	if err != nil {
		return fmt.Errorf("reading log %s: %w", l.dir, err)
	}
	return nil
}

func (l *FileLog) visitFile(name string, size int64, visit func(string, int64, io.Reader) error) error {
	f, err := l.fs.Open(filepath.Join(l.dir, name))
	if err != nil {
		return err
	}
	defer f.Close()
	return visit(name, size, io.NewSectionReader(f, 0, size))
}
