package storage

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
)

// The file of bbolt, format version 2, in the byte order of the machine.
const (
	boltMagic      = 0xED0CDAED
	boltVersion    = 2
	boltPageHeader = 16 // id (8 bytes), flags (2), count (2), overflow (4)
	boltElement    = 16
	boltMetaSum    = 56 // the checksum covers what is before it
	boltBucketSize = 16 // root page (8), sequence (8)
	boltNoFreelist = ^uint64(0)
	boltMaxDepth   = 32

	boltBranch   = 0x01
	boltLeaf     = 0x02
	boltFreelist = 0x10
	boltIsBucket = 0x01
)

// boltFile checks a file before bbolt gets it. bbolt maps the file into memory and
// follows it without looking: pages that make no sense end the process, with a
// panic or a memory fault in a goroutine of its own where nobody can recover.
// This reads the same structure with bounds, and each page at most once.
type boltFile struct {
	r        io.ReaderAt
	pageSize int64
	pages    uint64 // pages that exist; ids are less than that
	seen     []bool // by page id
	// entry is called for each key of a bucket.
	entry   func(bucket string, key, value []byte) error
	buckets []string
}

// checkBoltFile reads a whole file of that size and calls entry for each key of
// each bucket, the keys of a bucket in ascending order. It returns the buckets.
// Where the structure is damaged the error wraps ErrCorrupt.
func checkBoltFile(r io.ReaderAt, size int64, entry func(bucket string, key, value []byte) error) (buckets []string, err error) {
	f := &boltFile{r: r, entry: entry}
	meta, err := f.meta(size)
	if err != nil {
		return nil, err
	}
	f.pages = binary.NativeEndian.Uint64(meta[40:])
	if f.pages < 3 || f.pages > uint64(size/f.pageSize) {
		return nil, fmt.Errorf("the file has %d bytes, its contents need %d pages of %d: %w", size, f.pages, f.pageSize, ErrCorrupt)
	}
	f.seen = make([]bool, f.pages)
	f.seen[0], f.seen[1] = true, true
	if err := f.tree("", binary.NativeEndian.Uint64(meta[16:]), nil, nil, 0); err != nil {
		return nil, err
	}
	if err := f.freelist(binary.NativeEndian.Uint64(meta[32:])); err != nil {
		return nil, err
	}
	return f.buckets, nil
}

// meta finds the newer of the two meta pages. bbolt would go on from one if the
// other were damaged, and so lose the last commit without a word, although it may
// have been acknowledged: the part that counts of a meta page lies in one sector,
// which disks write whole. So both must be there.
func (f *boltFile) meta(size int64) (newest []byte, err error) {
	for page, off := range []int64{0, -1} {
		if off < 0 {
			off = f.pageSize
		}
		b := make([]byte, boltPageHeader+boltMetaSum+8)
		if _, err := f.r.ReadAt(b, off); errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("%d bytes without meta page %d: %w", size, page, ErrCorrupt)
		} else if err != nil {
			return nil, err
		}
		m := b[boltPageHeader:]
		sum := fnv.New64a()
		sum.Write(m[:boltMetaSum])
		pageSize := int64(binary.NativeEndian.Uint32(m[8:]))
		switch {
		case binary.NativeEndian.Uint32(m) != boltMagic,
			binary.NativeEndian.Uint32(m[4:]) != boltVersion,
			binary.NativeEndian.Uint64(m[boltMetaSum:]) != sum.Sum64(),
			pageSize < 1024 || pageSize > 64<<10 || pageSize&(pageSize-1) != 0,
			page == 1 && pageSize != f.pageSize:
			return nil, fmt.Errorf("meta page %d is not valid, so the last commit may be lost: %w", page, ErrCorrupt)
		}
		f.pageSize = pageSize
		if newest == nil || binary.NativeEndian.Uint64(m[48:]) > binary.NativeEndian.Uint64(newest[48:]) {
			newest = m
		}
	}
	return newest, nil
}

func (f *boltFile) damaged(id uint64, format string, args ...any) error {
	return fmt.Errorf("page %d: %s: %w", id, fmt.Sprintf(format, args...), ErrCorrupt)
}

// page reads a page, with those that continue it, that nothing referred to before.
func (f *boltFile) page(id uint64) ([]byte, error) {
	if id >= f.pages {
		return nil, f.damaged(id, "there are only %d", f.pages)
	}
	header := make([]byte, boltPageHeader)
	if _, err := f.r.ReadAt(header, int64(id)*f.pageSize); err != nil {
		return nil, fmt.Errorf("reading page %d: %w", id, err)
	}
	if got := binary.NativeEndian.Uint64(header); got != id {
		return nil, f.damaged(id, "says that it is page %d", got)
	}
	n := 1 + uint64(binary.NativeEndian.Uint32(header[12:]))
	if n > f.pages-id {
		return nil, f.damaged(id, "continues behind the last page")
	}
	for i := id; i < id+n; i++ {
		if f.seen[i] {
			return nil, f.damaged(i, "is used twice")
		}
		f.seen[i] = true
	}
	b := make([]byte, int64(n)*f.pageSize)
	if _, err := f.r.ReadAt(b, int64(id)*f.pageSize); err != nil {
		return nil, fmt.Errorf("reading page %d: %w", id, err)
	}
	return b, nil
}

// tree checks a bucket's pages from id on, whose keys must be from low up to but
// not including high, where these are not nil. The bucket without a name is the
// root, which holds the others.
func (f *boltFile) tree(bucket string, id uint64, low, high []byte, depth int) error {
	if depth > boltMaxDepth {
		return f.damaged(id, "lies too deep")
	}
	b, err := f.page(id)
	if err != nil {
		return err
	}
	return f.elements(bucket, id, b, low, high, depth)
}

// elements checks a page, or a small bucket that lies within a page as if it were
// one.
func (f *boltFile) elements(bucket string, id uint64, b, low, high []byte, depth int) error {
	flags, count := binary.NativeEndian.Uint16(b[8:]), int(binary.NativeEndian.Uint16(b[10:]))
	if flags != boltBranch && flags != boltLeaf {
		return f.damaged(id, "flags %#x are no part of a tree", flags)
	}
	if flags == boltBranch && count == 0 || boltPageHeader+count*boltElement > len(b) {
		return f.damaged(id, "%d elements", count)
	}
	var previous []byte
	for i := range count {
		off := boltPageHeader + i*boltElement
		e := b[off : off+boltElement]
		var kind uint32
		var pos, keySize, valueSize, child uint64
		if flags == boltBranch {
			pos, keySize = uint64(binary.NativeEndian.Uint32(e)), uint64(binary.NativeEndian.Uint32(e[4:]))
			child = binary.NativeEndian.Uint64(e[8:])
		} else {
			kind, pos = binary.NativeEndian.Uint32(e), uint64(binary.NativeEndian.Uint32(e[4:]))
			keySize, valueSize = uint64(binary.NativeEndian.Uint32(e[8:])), uint64(binary.NativeEndian.Uint32(e[12:]))
		}
		start := uint64(off) + pos
		if start < uint64(boltPageHeader+count*boltElement) || start+keySize+valueSize > uint64(len(b)) {
			return f.damaged(id, "element %d lies outside of it", i)
		}
		key := b[start : start+keySize]
		if i == 0 && low != nil && bytes.Compare(key, low) < 0 || i > 0 && bytes.Compare(key, previous) <= 0 ||
			high != nil && bytes.Compare(key, high) >= 0 {
			return f.damaged(id, "key %d is out of order", i)
		}
		previous = key
		var err error
		if flags == boltBranch {
			next := high
			if i+1 < count {
				if next, err = f.branchKey(id, b, count, i+1); err != nil {
					return err
				}
			}
			err = f.tree(bucket, child, key, next, depth+1)
		} else {
			err = f.leaf(bucket, id, kind, key, b[start+keySize:start+keySize+valueSize], depth)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// branchKey is the key of an element of a branch page, where the next child starts.
func (f *boltFile) branchKey(id uint64, b []byte, count, i int) ([]byte, error) {
	off := boltPageHeader + i*boltElement
	start := uint64(off) + uint64(binary.NativeEndian.Uint32(b[off:]))
	end := start + uint64(binary.NativeEndian.Uint32(b[off+4:]))
	if start < uint64(boltPageHeader+count*boltElement) || end > uint64(len(b)) {
		return nil, f.damaged(id, "element %d lies outside of it", i)
	}
	return b[start:end], nil
}

// leaf checks a key and its value: in the root bucket a bucket, in these an entry.
func (f *boltFile) leaf(bucket string, id uint64, kind uint32, key, value []byte, depth int) error {
	if bucket != "" {
		if kind != 0 {
			return f.damaged(id, "key %.40q of bucket %q is no entry", key, bucket)
		}
		return f.entry(bucket, key, value)
	}
	if kind != boltIsBucket || len(value) < boltBucketSize || len(key) == 0 {
		return f.damaged(id, "key %.40q is no bucket", key)
	}
	f.buckets = append(f.buckets, string(key))
	if root := binary.NativeEndian.Uint64(value); root != 0 {
		return f.tree(string(key), root, nil, nil, depth+1)
	}
	inline := value[boltBucketSize:]
	if len(inline) < boltPageHeader || binary.NativeEndian.Uint16(inline[8:]) != boltLeaf {
		return f.damaged(id, "bucket %q within it is damaged", key)
	}
	return f.elements(string(key), id, inline, nil, nil, depth+1)
}

// freelist checks the list of free pages, which a file that other tools wrote may
// have: a page that is used must not be in it.
func (f *boltFile) freelist(id uint64) error {
	if id == boltNoFreelist {
		return nil
	}
	b, err := f.page(id)
	if err != nil {
		return err
	}
	ids, count := b[boltPageHeader:], uint64(binary.NativeEndian.Uint16(b[10:]))
	if count == 0xffff {
		count, ids = binary.NativeEndian.Uint64(ids), ids[8:]
	}
	if binary.NativeEndian.Uint16(b[8:]) != boltFreelist || count > uint64(len(ids)/8) {
		return f.damaged(id, "is no list of free pages")
	}
	for i := range count {
		free := binary.NativeEndian.Uint64(ids[i*8:])
		if free >= f.pages || f.seen[free] {
			return f.damaged(id, "page %d is not free", free)
		}
		f.seen[free] = true
	}
	return nil
}
