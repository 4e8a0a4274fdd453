package storage

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"time"
)

const (
	checkpointName   = "checkpoint"
	checkpointMagic  = "SIGNETCP"
	checkpointDomain = "signet.storage.checkpoint.v1\x00"
	// checkpointFixed is everything up to the signature.
	checkpointFixed = 8 + 4 + 4 + 8 + 16 + 8 + 8 + 32 + 8 + 4
)

// Checkpoint is the beginning of a pruned log: the state of the chain before the
// first record that was kept. Signed, it says that what came before was removed
// because of its age, and not by somebody who had something to hide.
type Checkpoint struct {
	// Instance is whose log it is.
	Instance uint32
	// Segment is the index of the first segment that was kept.
	Segment uint64
	// Sequence and Hash are those of the last record that was removed, Time is that
	// record's time, in UTC.
	Sequence uint64
	Hash     [32]byte
	Time     time.Time
	// Pruned is when the decision was made, in UTC.
	Pruned time.Time
	// Signature is over SignedBytes. The scheme and the key are the authority's
	// business.
	Signature []byte
}

// SignedBytes is the canonical form of a checkpoint that is signed and verified:
// the ASCII bytes "signet.storage.checkpoint.v1" and a zero byte, then big-endian
// Instance (4 bytes), Segment (8), Sequence (8), Hash (32), Time and Pruned as
// Unix nanoseconds (8 each). No signed head has that form, so that no head can be
// made into a permission to remove records.
func (c Checkpoint) SignedBytes() []byte {
	b := []byte(checkpointDomain)
	b = binary.BigEndian.AppendUint32(b, c.Instance)
	b = binary.BigEndian.AppendUint64(b, c.Segment)
	b = binary.BigEndian.AppendUint64(b, c.Sequence)
	b = append(b, c.Hash[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(unixNano(c.Time)))
	return binary.BigEndian.AppendUint64(b, uint64(unixNano(c.Pruned)))
}

// mark is the state of the chain that the log goes on from.
func (c Checkpoint) mark() mark {
	return mark{sequence: c.Sequence, time: unixNano(c.Time), hash: c.Hash}
}

func (c Checkpoint) encode(logID [16]byte) []byte {
	b := make([]byte, 0, checkpointFixed+len(c.Signature)+4)
	b = append(b, checkpointMagic...)
	b = binary.BigEndian.AppendUint32(b, formatVersion)
	b = binary.BigEndian.AppendUint32(b, c.Instance)
	b = binary.BigEndian.AppendUint64(b, c.Segment)
	b = append(b, logID[:]...)
	b = binary.BigEndian.AppendUint64(b, c.Sequence)
	b = binary.BigEndian.AppendUint64(b, uint64(unixNano(c.Time)))
	b = append(b, c.Hash[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(unixNano(c.Pruned)))
	b = binary.BigEndian.AppendUint32(b, uint32(len(c.Signature)))
	b = append(b, c.Signature...)
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// parseCheckpoint reads the file that encode makes.
func parseCheckpoint(b []byte) (c Checkpoint, logID [16]byte, err error) {
	fail := func(format string, args ...any) (Checkpoint, [16]byte, error) {
		return Checkpoint{}, [16]byte{}, fmt.Errorf("checkpoint: "+format, args...)
	}
	if len(b) < 12 || string(b[:8]) != checkpointMagic {
		return fail("the file is no checkpoint: %w", ErrCorrupt)
	}
	switch v := binary.BigEndian.Uint32(b[8:]); {
	case v > formatVersion:
		return fail("format %d, this version knows %d: %w", v, formatVersion, ErrNewerFormat)
	case v == 0:
		return fail("format 0: %w", ErrCorrupt)
	}
	if len(b) < checkpointFixed+4 || crc32.Checksum(b[:len(b)-4], castagnoli) != binary.BigEndian.Uint32(b[len(b)-4:]) {
		return fail("wrong checksum: %w", ErrCorrupt)
	}
	logID = [16]byte(b[24:40])
	c = Checkpoint{
		Instance:  binary.BigEndian.Uint32(b[12:]),
		Segment:   binary.BigEndian.Uint64(b[16:]),
		Sequence:  binary.BigEndian.Uint64(b[40:]),
		Time:      fromUnixNano(int64(binary.BigEndian.Uint64(b[48:]))),
		Hash:      [32]byte(b[56:88]),
		Pruned:    fromUnixNano(int64(binary.BigEndian.Uint64(b[88:]))),
		Signature: bytes.Clone(b[checkpointFixed : len(b)-4]),
	}
	n := binary.BigEndian.Uint32(b[checkpointFixed-4:])
	if n == 0 || n > MaxSignature || int(n) != len(c.Signature) {
		return fail("a signature of %d bytes: %w", n, ErrCorrupt)
	}
	if c.Segment < 2 || c.Sequence == 0 {
		return fail("nothing was pruned by it: %w", ErrCorrupt)
	}
	return c, logID, nil
}

// readCheckpoint reads the checkpoint of the folder, if there is one.
func (l *FileLog) readCheckpoint(names []string) error {
	if !slices.Contains(names, checkpointName) {
		return nil
	}
	f, err := l.fs.Open(filepath.Join(l.dir, checkpointName))
	if err != nil {
		return fmt.Errorf("opening the checkpoint: %w", err)
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return fmt.Errorf("reading the checkpoint: %w", err)
	}
	if size > checkpointFixed+MaxSignature+4 {
		return fmt.Errorf("checkpoint: the file has %d bytes: %w", size, ErrCorrupt)
	}
	b := make([]byte, size)
	if _, err := f.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("reading the checkpoint: %w", err)
	}
	c, logID, err := parseCheckpoint(b)
	if err != nil {
		return err
	}
	if c.Instance != l.instance {
		return fmt.Errorf("checkpoint: it is of instance %d, not %d: %w", c.Instance, l.instance, ErrCorrupt)
	}
	l.checkpoint, l.logID = c, logID
	return nil
}

// first is the index of the first segment that the log has.
func (l *FileLog) first() uint64 { return max(l.checkpoint.Segment, 1) }

// Checkpoint is where a pruned log begins; ok is false for a log that has all of
// its records. Its signature is not verified.
func (l *FileLog) Checkpoint() (c Checkpoint, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c = l.checkpoint
	c.Signature = slices.Clone(c.Signature)
	return c, c.Segment > 0
}

// Prune removes the segments all of whose records were written before a moment,
// and returns how many. What is being written stays, but if it holds records that
// old a new segment is started, so that they go when the whole segment is that
// old. sign signs the checkpoint that takes the place of what is removed; it is
// durable before anything is removed. While somebody reads the log nothing is
// removed, and Prune returns 0.
func (l *FileLog) Prune(ctx context.Context, before time.Time, sign func(Checkpoint) (signature []byte, err error)) (removed int, err error) {
	if !l.reading.TryLock() {
		l.skipped.Add(1)
		return 0, nil
	}
	defer l.reading.Unlock()
	l.skipped.Store(0)
	var gone []segment
	p := newPending()
	p.op = func() (err error) { gone, err = l.prune(before.UnixNano(), sign); return err }
	if err := l.do(ctx, p); err != nil {
		return 0, fmt.Errorf("pruning log %s: %w", l.dir, err)
	}
	// Nothing refers to them anymore. What cannot be removed now is removed when the
	// log is opened.
	for _, s := range gone {
		if err := l.fs.Remove(filepath.Join(l.dir, segmentName(s.index))); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return removed, fmt.Errorf("pruning log %s: removing segment %s: %w", l.dir, segmentName(s.index), err)
		}
		removed++
	}
	return removed, nil
}

// PruneSkipped is how often in a row Prune has removed nothing because somebody read the
// log.
func (l *FileLog) PruneSkipped() int { return int(l.skipped.Load()) }

// prune decides what is removed and makes the checkpoint durable. The caller has
// the lead.
func (l *FileLog) prune(before int64, sign func(Checkpoint) ([]byte, error)) (gone []segment, err error) {
	if first := l.tailFirst; first != 0 && first < before {
		if err := l.rotate(); err != nil {
			return nil, err
		}
	}
	// No record before a segment is newer than its base.
	keep := len(l.segments) - 1
	for keep > 0 && l.segments[keep].base.time >= before {
		keep--
	}
	if keep == 0 || l.segments[keep].base.sequence == 0 {
		return nil, nil
	}
	s := l.segments[keep]
	c := Checkpoint{Instance: l.instance, Segment: s.index, Sequence: s.base.sequence, Hash: s.base.hash,
		Time: fromUnixNano(s.base.time), Pruned: time.Now().UTC().Round(0)}
	if c.Signature, err = sign(c); err != nil {
		return nil, fmt.Errorf("signing the checkpoint: %w", err)
	}
	if n := len(c.Signature); n == 0 || n > MaxSignature {
		return nil, fmt.Errorf("the checkpoint's signature has %d bytes; 1 to %d are allowed", n, MaxSignature)
	}
	// If this fails the old checkpoint is there or the new one, and the segments of
	// both: the log is good either way.
	if err := l.writeCheckpoint(c); err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	gone = slices.Clone(l.segments[:keep])
	l.segments = slices.Clone(l.segments[keep:])
	l.checkpoint = c
	return gone, nil
}

func (l *FileLog) writeCheckpoint(c Checkpoint) (err error) {
	name := filepath.Join(l.dir, checkpointName)
	if err := l.fs.Remove(name + tempSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("writing the checkpoint: %w", err)
	}
	f, err := l.fs.Create(name + tempSuffix)
	if err != nil {
		return fmt.Errorf("writing the checkpoint: %w", err)
	}
	_, err = f.WriteAt(c.encode(l.logID), 0)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = l.fs.Rename(name+tempSuffix, name)
	}
	if err == nil {
		err = l.fs.SyncDir(l.dir)
	}
	if err != nil {
		return fmt.Errorf("writing the checkpoint: %w", err)
	}
	return nil
}
