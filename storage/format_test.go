package storage_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/storagetest"
)

var update = flag.Bool("update", false, "write the golden files anew")

// The golden log has two segments, with batches and a signed head in each.
var goldenNames = []string{"000000000001.seg", "000000000002.seg"}

const headerSize = 128

// golden returns the segments of the golden log.
func golden(t testing.TB) [][]byte {
	t.Helper()
	var segments [][]byte
	for _, name := range goldenNames {
		b, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			t.Fatal(err)
		}
		segments = append(segments, b)
	}
	return segments
}

// memLog is a file system that holds a log with these segments.
func memLog(segments ...[]byte) *storagetest.CrashFS {
	fs := storagetest.NewCrashFS()
	for i, s := range segments {
		fs.WriteFile(filepath.Join(memDir, fmt.Sprintf("%012d.seg", i+1)), s)
	}
	return fs
}

// writeGolden appends what the golden log holds to an empty one. In a synctest
// bubble time starts at the same moment, so only the log ID is random.
func writeGolden(t *testing.T, fs *storagetest.CrashFS) {
	ctx := context.Background()
	l := mustOpenMem(t, fs)
	defer closeLog(t, l)
	for i := range 10 {
		time.Sleep(time.Second)
		records := [][]byte{fmt.Appendf(nil, "record %d", i), bytes.Repeat([]byte{byte(i)}, 1+50*i)}
		if _, err := l.Append(ctx, records[:1+i%2]); err != nil {
			t.Error(err)
		}
		if i == 4 || i == 8 {
			h := l.Head()
			h.Signature = fmt.Appendf(nil, "signature %d", i)
			if err := l.AppendHead(ctx, h); err != nil {
				t.Error(err)
			}
		}
		if i == 6 {
			if _, err := l.Append(ctx, [][]byte{make([]byte, 2500)}); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestSegmentFormatStays(t *testing.T) {
	fs := storagetest.NewCrashFS()
	if !*update {
		fs = memLog(golden(t)[0][:headerSize])
	}
	synctest.Test(t, func(t *testing.T) { writeGolden(t, fs) })
	names, _ := fs.List(memDir)
	if len(names) != len(goldenNames) {
		t.Fatalf("the log has the files %q, want %q", names, goldenNames)
	}
	var text strings.Builder
	for _, name := range goldenNames {
		got, err := fs.ReadFile(filepath.Join(memDir, name))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&text, "%s: %d bytes\n", name, len(got))
		dump(t, &text, got)
		path := filepath.Join("testdata", name)
		if *update {
			if err := os.WriteFile(path, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if want, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s differs from the golden file (%v); a changed format needs a new version", name, err)
		}
	}
	path := filepath.Join("testdata", "segments.txt")
	if *update {
		if err := os.WriteFile(path, []byte(text.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if want, err := os.ReadFile(path); err != nil || text.String() != string(want) {
		t.Errorf("dump differs from %s (%v):\n%s", path, err, text.String())
	}
}

func crc(seed uint32, b []byte) uint32 {
	return crc32.Update(seed, crc32.MakeTable(crc32.Castagnoli), b)
}

// seedOf is what the checksums of a segment's frames start from.
func seedOf(segment []byte) uint32 {
	sum := sha256.Sum256(segment[:headerSize])
	return binary.BigEndian.Uint32(sum[:])
}

// dump decodes a segment from the description in the package comment, without the
// code under test, and prints every field.
func dump(t *testing.T, w *strings.Builder, b []byte) {
	t.Helper()
	off := 0
	take := func(n int) []byte {
		t.Helper()
		if len(b)-off < n {
			t.Fatalf("%d bytes expected at %d of %d", n, off, len(b))
		}
		off += n
		return b[off-n : off]
	}
	u32 := func() uint32 { return binary.BigEndian.Uint32(take(4)) }
	u64 := func() uint64 { return binary.BigEndian.Uint64(take(8)) }
	when := func() string { return time.Unix(0, int64(u64())).UTC().Format(time.RFC3339Nano) }

	fmt.Fprintf(w, "  magic %q version %d instance %d index %d\n", take(8), u32(), u32(), u64())
	fmt.Fprintf(w, "  log ID %x\n", take(16))
	fmt.Fprintf(w, "  before: sequence %d, %s, hash %x\n", u64(), when(), take(32))
	fmt.Fprintf(w, "  segment before has %d bytes, carries %d, reserved %x\n", u64(), take(1)[0], take(27))
	sum := crc(0, b[:off])
	if got := u32(); got != sum || off != headerSize {
		t.Errorf("header checksum %08x at %d, want %08x", got, off, sum)
	}
	seed := seedOf(b)
	for off < len(b) {
		start := off
		fmt.Fprintf(w, "  %d: magic %q", start, take(4))
		kind := take(1)[0]
		fmt.Fprintf(w, " type %d reserved %x", kind, take(3))
		length := int(u32())
		fmt.Fprintf(w, " length %d", length)
		sum := crc(seed, b[start:off])
		if got := u32(); got != sum {
			t.Errorf("frame header checksum %08x, want %08x", got, sum)
		}
		payload := off
		switch kind {
		case 1:
			fmt.Fprintf(w, " batch after %x…", take(32)[:4])
			first, at, count := u64(), when(), u32()
			fmt.Fprintf(w, " from %d at %s:", first, at)
			for range count {
				r := take(int(u32()))
				fmt.Fprintf(w, " %d×%q", len(r), r[:min(len(r), 12)])
			}
			hash := sha256.Sum256(slices.Concat([]byte("signet.storage.batch.v1\x00"), b[payload:off]))
			got := take(32)
			if !bytes.Equal(got, hash[:]) {
				t.Errorf("batch hash %x, want %x", got, hash)
			}
			fmt.Fprintf(w, " hash %x…\n", got[:4])
		case 2:
			fmt.Fprintf(w, " head of %d at sequence %d, hash %x…, %s,", u32(), u64(), take(32)[:4], when())
			fmt.Fprintf(w, " signature %q\n", take(int(u32())))
		default:
			t.Fatalf("frame of type %d", kind)
		}
		if off-payload != length {
			t.Errorf("payload of %d bytes, length says %d", off-payload, length)
		}
		sum = crc(seed, b[start:off])
		if got := u32(); got != sum {
			t.Errorf("frame checksum %08x, want %08x", got, sum)
		}
	}
}

func TestHeadIsSignedInOneForm(t *testing.T) {
	t.Parallel()
	h := storage.Head{Instance: 3, Sequence: 258, Hash: sha256.Sum256([]byte("x")), Time: time.Unix(1, 2), Signature: []byte("not part of it")}
	want := hex.EncodeToString([]byte("signet.storage.head.v1\x00")) + "00000003" + "0000000000000102" +
		"2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881" + "000000003b9aca02"
	if got := hex.EncodeToString(h.SignedBytes()); got != want {
		t.Errorf("SignedBytes\n%s, want\n%s", got, want)
	}
	seen := map[string]string{}
	for name, change := range map[string]func(*storage.Head){
		"the head itself":  func(*storage.Head) {},
		"another instance": func(h *storage.Head) { h.Instance++ },
		"another sequence": func(h *storage.Head) { h.Sequence++ },
		"another hash":     func(h *storage.Head) { h.Hash[31]++ },
		"another time":     func(h *storage.Head) { h.Time = h.Time.Add(1) },
		"the zero time":    func(h *storage.Head) { h.Time = time.Time{} },
	} {
		c := h
		change(&c)
		if other, twice := seen[string(c.SignedBytes())]; twice {
			t.Errorf("%s and %s have the same form", name, other)
		}
		seen[string(c.SignedBytes())] = name
	}
	h.Signature, h.Time = nil, h.Time.In(time.FixedZone("", 3600))
	if got := hex.EncodeToString(h.SignedBytes()); got != want {
		t.Error("signature or time zone change the form")
	}
}

// records reads all records of a log, as far as it can be read.
func records(l *storage.FileLog) (all []string, err error) {
	for r, err := range l.Scan(context.Background(), 0) {
		if err != nil {
			return all, err
		}
		all = append(all, fmt.Sprintf("%d %v %q", r.Sequence, r.Time, r.Data))
	}
	return all, nil
}

// lastFrame is the offset of the last frame of a segment.
func lastFrame(segment []byte) int {
	off, last := headerSize, headerSize
	for off < len(segment) {
		last = off
		off += 16 + int(binary.BigEndian.Uint32(segment[off+8:])) + 4
	}
	return last
}

// TestNoChangedByteIsAccepted changes each byte of the golden log. Every change
// must be noticed; only one in the very last frame may be taken for a write that
// a crash cut short, which loses that frame and nothing else.
func TestNoChangedByteIsAccepted(t *testing.T) {
	t.Parallel()
	segments := golden(t)
	l := mustOpenMem(t, memLog(segments...))
	whole, err := records(l)
	if err != nil {
		t.Fatal(err)
	}
	closeLog(t, l)
	tail := lastFrame(segments[1])
	for i, segment := range segments {
		for off := range segment {
			if testing.Short() && off%4 != 0 {
				continue
			}
			flip := []byte{0x01, 0x80, 0xff}[off%3]
			changed := slices.Clone(segments)
			changed[i] = slices.Clone(segment)
			changed[i][off] ^= flip
			l, err := openMem(memLog(changed...), storage.LogOptions{})
			inTail := i == 1 && off >= tail
			switch {
			case err != nil && inTail:
				t.Fatalf("%s, byte %d: a torn tail is no error: %v", goldenNames[i], off, err)
			case err != nil:
				if !errors.Is(err, storage.ErrCorrupt) && !errors.Is(err, storage.ErrNewerFormat) || !strings.Contains(err.Error(), goldenNames[i]) {
					t.Fatalf("%s, byte %d: error %v", goldenNames[i], off, err)
				}
				continue
			}
			got, scanErr := records(l)
			verifyErr := l.Verify(context.Background())
			closeLog(t, l)
			if inTail {
				if scanErr != nil || verifyErr != nil || !slices.Equal(got, whole[:len(whole)-2]) {
					t.Fatalf("%s, byte %d, in the last frame: %d records, %v, %v", goldenNames[i], off, len(got), scanErr, verifyErr)
				}
				continue
			}
			if scanErr == nil || !errors.Is(verifyErr, storage.ErrCorrupt) && !errors.Is(verifyErr, storage.ErrNewerFormat) {
				t.Fatalf("%s, byte %d changed by 0x%02x was accepted: %v, %v", goldenNames[i], off, flip, scanErr, verifyErr)
			}
			if len(got) > 0 && !slices.Equal(got, whole[:len(got)]) {
				t.Fatalf("%s, byte %d: records differ before the error", goldenNames[i], off)
			}
		}
	}
}

func TestALogCutAnywhereIsAPrefixOrAnError(t *testing.T) {
	t.Parallel()
	segments := golden(t)
	l := mustOpenMem(t, memLog(segments...))
	whole, _ := records(l)
	closeLog(t, l)
	// The header and the head after it are durable before the file has its name.
	carried := headerSize + 20 + int(binary.BigEndian.Uint32(segments[1][headerSize+8:]))
	step := 1
	if testing.Short() {
		step = 17
	}
	for size := 0; size < len(segments[1]); size += step {
		l, err := openMem(memLog(segments[0], segments[1][:size]), storage.LogOptions{})
		if size < carried {
			if !errors.Is(err, storage.ErrCorrupt) {
				t.Errorf("last segment cut to %d bytes: %v", size, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("last segment cut to %d bytes: %v", size, err)
			continue
		}
		if got, err := records(l); err != nil || !slices.Equal(got, whole[:len(got)]) {
			t.Errorf("last segment cut to %d bytes: %d records, %v", size, len(got), err)
		}
		closeLog(t, l)
	}
	for size := 0; size < len(segments[0]); size += step {
		if _, err := openMem(memLog(segments[0][:size], segments[1]), storage.LogOptions{}); !errors.Is(err, storage.ErrCorrupt) || !strings.Contains(err.Error(), goldenNames[0]) {
			t.Errorf("first segment cut to %d bytes: %v", size, err)
		}
	}
}

func TestDamageIsNamedAndNeverRepaired(t *testing.T) {
	t.Parallel()
	segments := golden(t)
	other := storagetest.NewCrashFS()
	l := mustOpenMem(t, other)
	var a acks
	if err := a.work(l, workRounds); err != nil {
		t.Fatal(err)
	}
	closeLog(t, l)
	foreign := func(i int) []byte {
		b, err := other.ReadFile(filepath.Join(memDir, fmt.Sprintf("%012d.seg", i)))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	join := func(b ...[]byte) []byte { return slices.Concat(b...) }
	carried := headerSize + 20 + int(binary.BigEndian.Uint32(segments[1][headerSize+8:]))
	frame := segments[0][headerSize : headerSize+20+int(binary.BigEndian.Uint32(segments[0][headerSize+8:]))]
	zeros := make([]byte, 5<<20)
	tail := lastFrame(segments[1])
	mangled := slices.Clone(segments[1])
	mangled[tail+20]++

	for name, tc := range map[string]struct {
		segments [][]byte
		want     string
	}{
		"a missing first segment":             {[][]byte{nil, segments[1]}, "segment 000000000001.seg is missing"},
		"a missing segment":                   {[][]byte{segments[0], nil, segments[1]}, "segment 000000000002.seg is missing"},
		"exchanged segments":                  {[][]byte{segments[1], segments[0]}, "segment 000000000001.seg says that it is number 2"},
		"a segment twice":                     {[][]byte{segments[0], segments[0]}, "segment 000000000002.seg says that it is number 1"},
		"another log's segment":               {[][]byte{segments[0], foreign(2)}, "segment 000000000002.seg is of another log"},
		"another log's frame in the middle":   {[][]byte{join(segments[0][:headerSize], foreign(1)[headerSize:headerSize+600], segments[0][headerSize:])}, "segment 000000000001.seg, offset 128: no frame here, but one at offset 728"},
		"a frame twice":                       {[][]byte{join(segments[0][:headerSize], frame, segments[0][headerSize:])}, "segment 000000000001.seg, offset 244: batch starts at sequence 1, 2 is due"},
		"a frame left out":                    {[][]byte{join(segments[0][:headerSize], segments[0][headerSize+len(frame):])}, "segment 000000000001.seg, offset 128: batch starts at sequence 2, 1 is due"},
		"a carried head left out":             {[][]byte{segments[0], join(segments[1][:headerSize], segments[1][carried:])}, "segment 000000000002.seg, offset 128: segment does not start with the newest signed head"},
		"a carried head cut off":              {[][]byte{segments[0], segments[1][:carried-1]}, "segment 000000000002.seg, offset 128: the newest signed head is unreadable"},
		"a valid frame after the damage":      {[][]byte{segments[0], join(segments[1], []byte("damage"), encodeFrame(segments[1], 3, []byte("x")))}, ": no frame here, but one at offset 4074"},
		"bytes after a damaged frame":         {[][]byte{segments[0], join(mangled, []byte("more"))}, "offset 3497: frame with a wrong checksum and 4 bytes after it"},
		"more damage than one frame explains": {[][]byte{segments[0], join(segments[1], zeros)}, fmt.Sprintf("offset %d: 5242880 bytes that are no frame", len(segments[1]))},
		"a carried head cut off whole":        {[][]byte{segments[0], segments[1][:headerSize]}, "segment 000000000002.seg, offset 128: the newest signed head is missing"},
		"a grown segment":                     {[][]byte{join(segments[0], frame), segments[1]}, "segment 000000000001.seg has "},
		"an empty file":                       {[][]byte{segments[0], {}}, "segment 000000000002.seg is shorter than its header"},
		"something else":                      {[][]byte{zeros[:500]}, "segment 000000000001.seg: not a log segment"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			fs := memLog(tc.segments...)
			for i, s := range tc.segments {
				if s == nil {
					fs.RemoveFile(filepath.Join(memDir, fmt.Sprintf("%012d.seg", i+1)))
				}
			}
			_, err := openMem(fs, storage.LogOptions{})
			if !errors.Is(err, storage.ErrCorrupt) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
			if ops := fs.Ops(); len(ops) != 0 {
				t.Errorf("a damaged log was changed: %v", ops)
			}
		})
	}
}

// encodeFrame makes a frame that is valid in a segment.
func encodeFrame(segment []byte, kind byte, payload []byte) []byte {
	seed := seedOf(segment)
	b := append([]byte("SGFR"), kind, 0, 0, 0)
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	b = binary.BigEndian.AppendUint32(b, crc(seed, b))
	b = append(b, payload...)
	return binary.BigEndian.AppendUint32(b, crc(seed, b))
}

func TestWhatANewerVersionWroteIsRefused(t *testing.T) {
	t.Parallel()
	segments := golden(t)
	reseal := func(change func(header []byte)) []byte {
		b := slices.Clone(segments[0][:headerSize])
		change(b)
		binary.BigEndian.PutUint32(b[headerSize-4:], crc(0, b[:headerSize-4]))
		return b
	}
	header := segments[0][:headerSize]
	reservedByte := encodeFrame(header, 1, make([]byte, 100))
	reservedByte[5] = 1
	binary.BigEndian.PutUint32(reservedByte[12:], crc(seedOf(header), reservedByte[:12]))
	for name, segment := range map[string][]byte{
		"version 2":                       reseal(func(h []byte) { h[11] = 2 }),
		"version 2 with another checksum": append(slices.Clone(header[:11]), append([]byte{2}, header[12:]...)...),
		"a reserved byte of the header":   reseal(func(h []byte) { h[100] = 1 }),
		"a frame of type 3":               slices.Concat(header, encodeFrame(header, 3, []byte("checkpoint"))),
		"a reserved byte of a frame":      slices.Concat(header, reservedByte),
	} {
		fs := memLog(segment)
		if _, err := openMem(fs, storage.LogOptions{}); !errors.Is(err, storage.ErrNewerFormat) {
			t.Errorf("%s: %v", name, err)
		}
		if ops := fs.Ops(); len(ops) != 0 {
			t.Errorf("%s: the log was changed: %v", name, ops)
		}
	}
}

// FuzzOpenLog opens arbitrary bytes as the last segment of the golden log and, if
// they start with a segment's header, as the only one.
func FuzzOpenLog(f *testing.F) {
	segments := golden(f)
	for _, s := range segments {
		f.Add(s)
		f.Add(s[:headerSize])
		f.Add(s[:len(s)-10])
	}
	l, err := openMem(memLog(segments...), storage.LogOptions{})
	if err != nil {
		f.Fatal(err)
	}
	whole, _ := records(l)
	closeLog(f, l)
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, fs := range []*storagetest.CrashFS{memLog(data), memLog(segments[0], data)} {
			checkOpened(t, fs, whole, data, segments)
		}
	})
}

// checkOpened opens a log that may be anything. If that succeeds the log must be
// sound, usable, and, where the header is a golden one's, a prefix of the golden log.
func checkOpened(t *testing.T, fs *storagetest.CrashFS, whole []string, data []byte, segments [][]byte) {
	t.Helper()
	l, err := openMem(fs, storage.LogOptions{})
	if err != nil {
		if !errors.Is(err, storage.ErrCorrupt) && !errors.Is(err, storage.ErrNewerFormat) && !strings.Contains(err.Error(), "is of instance") {
			t.Errorf("unexpected error: %v", err)
		}
		return
	}
	got, err := records(l)
	if err != nil {
		t.Errorf("opened, but cannot be read: %v", err)
	}
	if err := l.Verify(context.Background()); err != nil {
		t.Errorf("opened, but does not verify: %v", err)
	}
	for _, s := range segments {
		if whole != nil && bytes.HasPrefix(data, s[:headerSize]) && (len(got) > len(whole) || !slices.Equal(got, whole[:len(got)])) {
			t.Errorf("%d records that were never appended", len(got))
		}
	}
	closeLog(t, l)
	if l, err = openMem(fs, storage.LogOptions{}); err != nil {
		t.Errorf("opened once, but not twice: %v", err)
		return
	}
	if again, err := records(l); err != nil || !slices.Equal(got, again) {
		t.Errorf("%d records, opened again %d, %v", len(got), len(again), err)
	}
	closeLog(t, l)
}

// FuzzFrame puts arbitrary payloads into frames with correct checksums, and, for a
// batch, with the correct hash, so that the parsers behind them are reached.
func FuzzFrame(f *testing.F) {
	segments := golden(f)
	for _, s := range segments {
		for off := headerSize; off < len(s); {
			n := int(binary.BigEndian.Uint32(s[off+8:]))
			f.Add(s[off+4], s[off+16:off+16+n], false)
			if s[off+4] == 1 {
				f.Add(byte(1), s[off+16:off+16+n-32], true)
			}
			off += 20 + n
		}
	}
	f.Fuzz(func(t *testing.T, kind byte, payload []byte, hash bool) {
		header := segments[0][:headerSize]
		if hash {
			sum := sha256.Sum256(slices.Concat([]byte("signet.storage.batch.v1\x00"), payload))
			payload = slices.Concat(payload, sum[:])
		}
		if len(payload) > 5<<20 {
			return
		}
		checkOpened(t, memLog(slices.Concat(header, encodeFrame(header, kind, payload))), nil, nil, nil)
	})
}
