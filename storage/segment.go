package storage

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"strconv"
	"strings"
)

const (
	segmentMagic  = "SIGNETLG"
	formatVersion = 1
	headerSize    = 128

	frameMagic       = "SGFR"
	frameHeaderSize  = 16
	frameTrailerSize = 4
	frameOverhead    = frameHeaderSize + frameTrailerSize

	frameBatch = 1
	frameHead  = 2

	batchFixed  = 32 + 8 + 8 + 4
	batchDomain = "signet.storage.batch.v1\x00"
	logDomain   = "signet.storage.log.v1\x00"

	maxPayload = batchFixed + MaxAppend + sha256.Size
	maxFrame   = maxPayload + frameOverhead
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// errInvalidFrame is why bytes are not a frame. Only at the end of the log may it
// mean a write that a crash cut short.
var errInvalidFrame = errors.New("no valid frame")

// mark is the state of the chain after a batch.
type mark struct {
	sequence uint64
	time     int64 // Unix nanoseconds; 0 before the first batch
	hash     [32]byte
}

// segmentHeader is what a segment says of itself and of what came before it, so
// that it can be verified alone.
type segmentHeader struct {
	instance uint32
	index    uint64 // the first segment has index 1
	logID    [16]byte
	base     mark  // after the last batch of the segment before
	prevSize int64 // size of the segment before, 0 in the first one
	// carries says that the first frame repeats the newest signed head, so that it
	// is found without reading the segments before.
	carries bool
}

// genesis is the chain's state before the first batch. The log ID makes the
// hashes of two logs of the same instance differ from the first record on.
func genesis(instance uint32, logID [16]byte) mark {
	b := append([]byte(logDomain), logID[:]...)
	return mark{hash: sha256.Sum256(binary.BigEndian.AppendUint32(b, instance))}
}

func (h segmentHeader) encode() []byte {
	b := make([]byte, 0, headerSize)
	b = append(b, segmentMagic...)
	b = binary.BigEndian.AppendUint32(b, formatVersion)
	b = binary.BigEndian.AppendUint32(b, h.instance)
	b = binary.BigEndian.AppendUint64(b, h.index)
	b = append(b, h.logID[:]...)
	b = binary.BigEndian.AppendUint64(b, h.base.sequence)
	b = binary.BigEndian.AppendUint64(b, uint64(h.base.time))
	b = append(b, h.base.hash[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(h.prevSize))
	if h.carries {
		b = append(b, 1)
	}
	b = b[:headerSize-4] // the rest is reserved and zero
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func parseSegmentHeader(b []byte) (segmentHeader, error) {
	if len(b) != headerSize || string(b[:8]) != segmentMagic {
		return segmentHeader{}, fmt.Errorf("not a log segment: %w", ErrCorrupt)
	}
	// The version comes first: a newer one may keep its checksum elsewhere.
	switch v := binary.BigEndian.Uint32(b[8:]); {
	case v > formatVersion:
		return segmentHeader{}, fmt.Errorf("segment format %d, this version knows %d: %w", v, formatVersion, ErrNewerFormat)
	case v == 0:
		return segmentHeader{}, fmt.Errorf("segment format 0: %w", ErrCorrupt)
	}
	if crc32.Checksum(b[:headerSize-4], castagnoli) != binary.BigEndian.Uint32(b[headerSize-4:]) {
		return segmentHeader{}, fmt.Errorf("segment header has a wrong checksum: %w", ErrCorrupt)
	}
	h := segmentHeader{
		instance: binary.BigEndian.Uint32(b[12:]),
		index:    binary.BigEndian.Uint64(b[16:]),
		logID:    [16]byte(b[24:40]),
		base: mark{
			sequence: binary.BigEndian.Uint64(b[40:]),
			time:     int64(binary.BigEndian.Uint64(b[48:])),
			hash:     [32]byte(b[56:88]),
		},
		prevSize: int64(binary.BigEndian.Uint64(b[88:])),
		carries:  b[96] == 1,
	}
	if !bytes.Equal(b[:headerSize-4], h.encode()[:headerSize-4]) {
		return segmentHeader{}, fmt.Errorf("segment header uses reserved bytes: %w", ErrNewerFormat)
	}
	return h, nil
}

// seed is what the checksums of the segment's frames start from. Nobody who may
// only choose the contents of records knows it, since the log ID is secret.
func (h segmentHeader) seed() uint32 {
	sum := sha256.Sum256(h.encode())
	return binary.BigEndian.Uint32(sum[:])
}

const segmentSuffix = ".seg"

func segmentName(index uint64) string { return fmt.Sprintf("%012d%s", index, segmentSuffix) }

// segmentIndex takes a file name apart; ok is false if it is not a segment's.
func segmentIndex(name string) (index uint64, ok bool) {
	digits, ok := strings.CutSuffix(name, segmentSuffix)
	if !ok {
		return 0, false
	}
	index, err := strconv.ParseUint(digits, 10, 64)
	return index, err == nil && segmentName(index) == name
}

// beginFrame starts a frame in buf; the payload is appended, then endFrame called.
func beginFrame(buf []byte, kind byte) []byte {
	buf = append(buf[:0], frameMagic...)
	return append(buf, kind, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
}

func endFrame(buf []byte, seed uint32) []byte {
	binary.BigEndian.PutUint32(buf[8:], uint32(len(buf)-frameHeaderSize))
	binary.BigEndian.PutUint32(buf[12:], crc32.Update(seed, castagnoli, buf[:12]))
	return binary.BigEndian.AppendUint32(buf, crc32.Update(seed, castagnoli, buf))
}

// parseFrameHeader returns the type and the length of the payload.
func parseFrameHeader(b []byte, seed uint32) (kind byte, length int, err error) {
	if len(b) < frameHeaderSize || string(b[:4]) != frameMagic ||
		crc32.Update(seed, castagnoli, b[:12]) != binary.BigEndian.Uint32(b[12:]) {
		return 0, 0, errInvalidFrame
	}
	// From here on the bytes are what somebody who knows the seed wrote.
	if b[5]|b[6]|b[7] != 0 {
		return 0, 0, fmt.Errorf("frame uses reserved bytes: %w", ErrNewerFormat)
	}
	n := binary.BigEndian.Uint32(b[8:])
	if n > maxPayload {
		return 0, 0, fmt.Errorf("frame of %d bytes, at most %d are allowed: %w", n, maxPayload, ErrCorrupt)
	}
	return b[4], int(n), nil
}

// checkFrame checks the whole of a frame whose header was parsed.
func checkFrame(b []byte, seed uint32) error {
	n := len(b) - frameTrailerSize
	if crc32.Update(seed, castagnoli, b[:n]) != binary.BigEndian.Uint32(b[n:]) {
		return errInvalidFrame
	}
	return nil
}

// batch is the content of a batch frame.
type batch struct {
	prev    [32]byte
	first   uint64
	time    int64
	count   uint32
	records []byte // count times length (4 bytes) and data
	hash    [32]byte
	head    *Head // a signed head in the place of a batch; count is 0
}

// after is the chain's state after the batch.
func (b batch) after() mark {
	return mark{sequence: b.first + uint64(b.count) - 1, time: b.time, hash: b.hash}
}

// appendBatch appends the payload of a batch whose records are in bodies, each a
// sequence of length (4 bytes) and data, and returns its hash.
func appendBatch(buf []byte, after mark, now int64, count int, bodies [][]byte) ([]byte, [32]byte) {
	start := len(buf)
	buf = append(buf, after.hash[:]...)
	buf = binary.BigEndian.AppendUint64(buf, after.sequence+1)
	buf = binary.BigEndian.AppendUint64(buf, uint64(now))
	buf = binary.BigEndian.AppendUint32(buf, uint32(count))
	for _, body := range bodies {
		buf = append(buf, body...)
	}
	hash := batchHash(buf[start:])
	return append(buf, hash[:]...), hash
}

func batchHash(payload []byte) (hash [32]byte) {
	s := sha256.New()
	s.Write([]byte(batchDomain))
	s.Write(payload)
	s.Sum(hash[:0])
	return hash
}

// parseBatch checks everything about a batch that can be checked without the
// chain. records aliases payload.
func parseBatch(payload []byte) (batch, error) {
	if len(payload) < batchFixed+sha256.Size {
		return batch{}, errors.New("batch is too short")
	}
	end := len(payload) - sha256.Size
	b := batch{
		prev:    [32]byte(payload[:32]),
		first:   binary.BigEndian.Uint64(payload[32:]),
		time:    int64(binary.BigEndian.Uint64(payload[40:])),
		count:   binary.BigEndian.Uint32(payload[48:]),
		records: payload[batchFixed:end],
		hash:    [32]byte(payload[end:]),
	}
	if batchHash(payload[:end]) != b.hash {
		return batch{}, errors.New("batch has a wrong hash")
	}
	if b.count == 0 || b.count > MaxRecords {
		return batch{}, fmt.Errorf("batch of %d records", b.count)
	}
	rest := b.records
	for range b.count {
		if len(rest) < 4 {
			return batch{}, errors.New("batch ends within a record")
		}
		n := binary.BigEndian.Uint32(rest)
		if n == 0 || n > MaxRecord || uint64(n) > uint64(len(rest)-4) {
			return batch{}, fmt.Errorf("batch has a record of %d bytes", n)
		}
		rest = rest[4+n:]
	}
	if len(rest) != 0 {
		return batch{}, fmt.Errorf("batch has %d bytes after its records", len(rest))
	}
	return b, nil
}

// each calls f for every record, in order, until f returns false. The data is a
// part of the batch with no room to grow into the next record.
func (b batch) each(f func(sequence uint64, data []byte) bool) bool {
	rest := b.records
	for i := range b.count {
		n := 4 + int(binary.BigEndian.Uint32(rest))
		if !f(b.first+uint64(i), rest[4:n:n]) {
			return false
		}
		rest = rest[n:]
	}
	return true
}

func appendHead(buf []byte, h Head) []byte {
	buf = appendHeadFields(buf, h)
	buf = binary.BigEndian.AppendUint32(buf, uint32(len(h.Signature)))
	return append(buf, h.Signature...)
}

func parseHead(payload []byte) (Head, error) {
	if len(payload) < headFields+4 {
		return Head{}, errors.New("signed head is too short")
	}
	h := Head{
		Instance:  binary.BigEndian.Uint32(payload),
		Sequence:  binary.BigEndian.Uint64(payload[4:]),
		Hash:      [32]byte(payload[12:44]),
		Time:      fromUnixNano(int64(binary.BigEndian.Uint64(payload[44:]))),
		Signature: bytes.Clone(payload[headFields+4:]),
	}
	n := binary.BigEndian.Uint32(payload[headFields:])
	if n == 0 || n > MaxSignature || int(n) != len(h.Signature) {
		return Head{}, fmt.Errorf("signed head has a signature of %d bytes", n)
	}
	return h, nil
}
