package storage_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/storage"
)

// What follows has correct checksums and yet is nothing that we would write: only
// the checks behind the checksums can refuse it.

// forgedBatch is the payload of a batch with a correct hash.
func forgedBatch(prev []byte, first uint64, at int64, count uint32, records ...[]byte) []byte {
	b := slices.Clone(prev)
	b = binary.BigEndian.AppendUint64(b, first)
	b = binary.BigEndian.AppendUint64(b, uint64(at))
	b = binary.BigEndian.AppendUint32(b, count)
	b = slices.Concat(append([][]byte{b}, records...)...)
	hash := sha256.Sum256(slices.Concat([]byte("signet.storage.batch.v1\x00"), b))
	return append(b, hash[:]...)
}

// rec is a record of a batch that says it has n bytes.
func rec(n uint32, data string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, n), data...)
}

func forgedHead(h storage.Head, length uint32) []byte {
	b := h.SignedBytes()[len("signet.storage.head.v1\x00"):]
	return append(binary.BigEndian.AppendUint32(slices.Clone(b), length), h.Signature...)
}

// reseal changes a segment's header and corrects its checksum. Frames that follow
// are not valid anymore.
func reseal(header []byte, change func(h []byte)) []byte {
	b := slices.Clone(header[:headerSize])
	change(b)
	binary.BigEndian.PutUint32(b[headerSize-4:], crc(0, b[:headerSize-4]))
	return b
}

func TestForgedFramesAreRefused(t *testing.T) {
	t.Parallel()
	header := golden(t)[0][:headerSize]
	genesis := header[56:88]
	at := time.Now().UnixNano()
	good := forgedBatch(genesis, 1, at, 2, rec(1, "a"), rec(2, "bc"))
	hash := good[len(good)-32:]
	head := storage.Head{Instance: 7, Sequence: 2, Hash: [32]byte(hash), Time: time.Unix(0, at), Signature: []byte("s")}
	headWith := func(change func(h *storage.Head)) []byte {
		h := head
		change(&h)
		return forgedHead(h, uint32(len(h.Signature)))
	}
	badHash := slices.Clone(good)
	badHash[len(badHash)-1]++
	many := bytes.Repeat(rec(1, "x"), storage.MaxRecords+1)
	huge := encodeFrame(header, 1, nil)
	binary.BigEndian.PutUint32(huge[8:], 1<<31)
	binary.BigEndian.PutUint32(huge[12:], crc(seedOf(header), huge[:12]))

	type frame struct {
		kind    byte
		payload []byte
	}
	first := frame{1, good}
	open := func(frames ...frame) (*storage.FileLog, error) {
		b := slices.Clone(header)
		for _, f := range frames {
			b = append(b, encodeFrame(header, f.kind, f.payload)...)
		}
		return openMem(memLog(b), storage.LogOptions{})
	}
	l, err := open(first, frame{2, headWith(func(*storage.Head) {})}, frame{1, forgedBatch(hash, 3, at, 1, rec(1, "d"))})
	if err != nil {
		t.Fatalf("the examples are not valid before they are changed: %v", err)
	}
	closeLog(t, l)

	for name, tc := range map[string]struct {
		last frame
		want string
	}{
		"a wrong hash":                 {frame{1, badHash}, "batch has a wrong hash"},
		"another chain":                {frame{1, forgedBatch(genesis, 3, at, 1, rec(1, "d"))}, "does not continue the hash chain"},
		"a gap":                        {frame{1, forgedBatch(hash, 4, at, 1, rec(1, "d"))}, "batch starts at sequence 4, 3 is due"},
		"a sequence twice":             {frame{1, forgedBatch(hash, 2, at, 1, rec(1, "d"))}, "batch starts at sequence 2, 3 is due"},
		"a time that goes back":        {frame{1, forgedBatch(hash, 3, at-1, 1, rec(1, "d"))}, "older than the one before"},
		"no record":                    {frame{1, forgedBatch(hash, 3, at, 0)}, "batch of 0 records"},
		"too many records":             {frame{1, forgedBatch(hash, 3, at, storage.MaxRecords+1, many)}, "batch of 4097 records"},
		"fewer records than it says":   {frame{1, forgedBatch(hash, 3, at, 2, rec(1, "d"))}, "ends within a record"},
		"more records than it says":    {frame{1, forgedBatch(hash, 3, at, 1, rec(1, "d"), rec(1, "e"))}, "5 bytes after its records"},
		"an empty record":              {frame{1, forgedBatch(hash, 3, at, 1, rec(0, ""))}, "a record of 0 bytes"},
		"a record too large":           {frame{1, forgedBatch(hash, 3, at, 1, rec(storage.MaxRecord+1, strings.Repeat("x", storage.MaxRecord+1)))}, "a record of 65537 bytes"},
		"a record beyond the end":      {frame{1, forgedBatch(hash, 3, at, 1, rec(2, "d"))}, "a record of 2 bytes"},
		"a tiny batch":                 {frame{1, make([]byte, 83)}, "batch is too short"},
		"a tiny head":                  {frame{2, make([]byte, 55)}, "signed head is too short"},
		"a head without signature":     {frame{2, headWith(func(h *storage.Head) { h.Signature = nil })}, "a signature of 0 bytes"},
		"a head with a huge signature": {frame{2, headWith(func(h *storage.Head) { h.Signature = make([]byte, storage.MaxSignature+1) })}, "a signature of 8193 bytes"},
		"a head longer than it says":   {frame{2, forgedHead(storage.Head{Instance: 7, Sequence: 2, Hash: head.Hash, Time: head.Time, Signature: []byte("ss")}, 1)}, "a signature of 1 bytes"},
		"a head of another instance":   {frame{2, headWith(func(h *storage.Head) { h.Instance = 8 })}, "head is of instance 8"},
		"a head with another hash":     {frame{2, headWith(func(h *storage.Head) { h.Hash[0]++ })}, "not of this log"},
		"a head with another time":     {frame{2, headWith(func(h *storage.Head) { h.Time = h.Time.Add(1) })}, "not of this log"},
		"a head of the future":         {frame{2, headWith(func(h *storage.Head) { h.Sequence = 3 })}, "not a recent state"},
		"a head within a batch":        {frame{2, headWith(func(h *storage.Head) { h.Sequence = 1 })}, "not a recent state"},
	} {
		_, err := open(first, tc.last)
		if !errors.Is(err, storage.ErrCorrupt) || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), "segment 000000000001.seg, offset ") {
			t.Errorf("%s: got %v, want %q", name, err, tc.want)
		}
	}
	if _, err := open(frame{1, forgedBatch(genesis, 1, 0, 1, rec(1, "d"))}); !errors.Is(err, storage.ErrCorrupt) {
		t.Errorf("a first batch without a time: %v", err)
	}
	if _, err := openMem(memLog(slices.Concat(header, huge)), storage.LogOptions{}); !errors.Is(err, storage.ErrCorrupt) || !strings.Contains(err.Error(), "frame of 2147483648 bytes") {
		t.Errorf("a huge frame: %v", err)
	}
}

func TestForgedHeadersAreRefused(t *testing.T) {
	t.Parallel()
	segments := golden(t)
	for name, tc := range map[string]struct {
		segments [][]byte
		want     string
	}{
		"another genesis":              {[][]byte{reseal(segments[0], func(h []byte) { h[60]++ })}, "is not the first of a log"},
		"a segment before the first":   {[][]byte{reseal(segments[0], func(h []byte) { h[95] = 1 })}, "is not the first of a log"},
		"a head before the first":      {[][]byte{reseal(segments[0], func(h []byte) { h[96] = 1 })}, "is not the first of a log"},
		"another instance's segment":   {[][]byte{segments[0], reseal(segments[1], func(h []byte) { h[15] = 8 })}, "000000000002.seg is of another log"},
		"another log's ID":             {[][]byte{segments[0], reseal(segments[1], func(h []byte) { h[24]++ })}, "000000000002.seg is of another log"},
		"a time before the one before": {[][]byte{segments[0], reseal(segments[1], func(h []byte) { clear(h[48:56]); h[48] = 0x80 })}, "000000000002.seg starts before"},
		"another size than there is":   {[][]byte{segments[0], reseal(segments[1], func(h []byte) { h[95]++ })}, "segment 000000000001.seg has 1492 bytes, but"},
		"a batch in a carried head's place": {[][]byte{segments[0], func() []byte {
			h := reseal(segments[1], func([]byte) {})
			return append(h, encodeFrame(h, 1, forgedBatch(h[56:88], 11, time.Now().UnixNano(), 1, rec(1, "x")))...)
		}()}, "does not start with the newest signed head"},
	} {
		if _, err := openMem(memLog(tc.segments...), storage.LogOptions{}); !errors.Is(err, storage.ErrCorrupt) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, want %q", name, err, tc.want)
		}
	}

	// Opening reads only the last segment; these are found by Verify.
	carried := func(header []byte, change func(h *storage.Head)) []byte {
		b := segments[1][headerSize+16:]
		h := storage.Head{Instance: 7, Sequence: binary.BigEndian.Uint64(b[4:]), Hash: [32]byte(b[12:]),
			Time: time.Unix(0, int64(binary.BigEndian.Uint64(b[44:]))), Signature: []byte("signature 4")}
		change(&h)
		return append(slices.Clone(header), encodeFrame(header, 2, forgedHead(h, uint32(len(h.Signature))))...)
	}
	unchanged := func([]byte) {}
	for name, tc := range map[string]struct {
		second []byte
		want   string
	}{
		"another hash than the segment before ends with": {carried(reseal(segments[1], func(h []byte) { h[56]++ }), func(*storage.Head) {}), "segment 000000000001.seg ends at sequence 10"},
		"fewer records than the segment before has":      {carried(reseal(segments[1], func(h []byte) { h[47]-- }), func(*storage.Head) {}), "segment 000000000001.seg ends at sequence 10"},
		"a signed head left out":                         {reseal(segments[1], func(h []byte) { h[96] = 0 }), "does not carry the newest signed head"},
		"another signature":                              {carried(reseal(segments[1], unchanged), func(h *storage.Head) { h.Signature = []byte("forged") }), "does not start with the newest signed head"},
		"another head":                                   {carried(reseal(segments[1], unchanged), func(h *storage.Head) { h.Sequence = 4; h.Hash[0]++ }), "does not start with the newest signed head"},
	} {
		l, err := openMem(memLog(segments[0], tc.second), storage.LogOptions{})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if err := l.Verify(context.Background()); !errors.Is(err, storage.ErrCorrupt) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: Verify returned %v, want %q", name, err, tc.want)
		}
		closeLog(t, l)
	}
}

func TestVerifyFindsWhatChangedUnderAnOpenLog(t *testing.T) {
	t.Parallel()
	segments := golden(t)
	first := filepath.Join(memDir, goldenNames[0])
	for name, data := range map[string][]byte{
		"a segment that grew":       append(slices.Clone(segments[0]), "more"...),
		"a segment that shrank":     segments[0][:len(segments[0])-1],
		"a segment of another log":  reseal(segments[0], func(h []byte) { h[24]++ }),
		"another segment's content": segments[1],
	} {
		fs := memLog(segments...)
		l := mustOpenMem(t, fs)
		fs.WriteFile(first, data)
		if err := l.Verify(context.Background()); !errors.Is(err, storage.ErrCorrupt) || !strings.Contains(err.Error(), goldenNames[0]) {
			t.Errorf("%s: %v", name, err)
		}
		fs.RemoveFile(first)
		if err := l.Verify(context.Background()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a segment that is gone: %v", err)
		}
		closeLog(t, l)
	}
}
