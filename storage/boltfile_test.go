package storage_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.etcd.io/bbolt"

	"github.com/signet-mesh/signet/storage"
)

// TestADamagedFileIsAnErrorNotACrash cuts a store's file and changes its bytes. On
// such files bbolt panics, or dies of a memory fault; whatever passes the
// examination before must open and hold what was stored.
func TestADamagedFileIsAnErrorNotACrash(t *testing.T) {
	t.Parallel()
	path := filepath.Join(privateDir(t), "state.db")
	b := openBolt(t, path, storage.BoltOptions{})
	var ops []storage.Op
	for i := range 60 {
		ops = append(ops, put(fmt.Sprintf("key/%03d", i), strings.Repeat("v", 100))...)
	}
	mustCommit(t, b, ops)
	closeBolt(t, b)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	used := len(bytes.TrimRight(whole, "\x00"))
	refused, accepted := 0, 0
	try := func(what string, data []byte) {
		if err := storage.Examine(bytes.NewReader(data), int64(len(data))); err != nil {
			if refused++; !errors.Is(err, storage.ErrCorrupt) && !errors.Is(err, storage.ErrNewerFormat) {
				t.Errorf("%s: %v", what, err)
			}
			return
		}
		if accepted++; accepted%101 != 0 {
			return // opening for real takes some fsyncs
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		b, err := storage.OpenBolt(path, storage.BoltOptions{})
		if err != nil {
			t.Errorf("%s: %v", what, err)
			return
		}
		entries, _, err := b.List(t.Context(), "")
		if err != nil || len(entries) != 60 {
			t.Errorf("%s: accepted with %d of 60 entries, %v", what, len(entries), err)
		}
		for _, e := range entries {
			if string(e.Value) != strings.Repeat("v", 100) {
				t.Errorf("%s: entry %q is %.20q…", what, e.Key, e.Value)
			}
		}
		closeBolt(t, b)
	}
	for size := 0; size < used; size += 503 {
		try(fmt.Sprintf("cut to %d bytes", size), whole[:size])
	}
	step := 3
	if testing.Short() {
		step = 29
	}
	data := bytes.Clone(whole)
	for off := 0; off < used; off += step {
		flip := []byte{0x01, 0x80, 0xff, 0x10}[off%4]
		data[off] ^= flip
		try(fmt.Sprintf("byte %d changed by %#x", off, flip), data)
		data[off] ^= flip
	}
	t.Logf("%d refused, %d accepted", refused, accepted)
	if refused < accepted/10 || accepted < refused/10 {
		t.Errorf("%d refused, %d accepted", refused, accepted)
	}
}

// FuzzExamine gives arbitrary files to the examination. What passes, bbolt must be
// able to read.
func FuzzExamine(f *testing.F) {
	dir := f.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		f.Fatal(err)
	}
	for i, n := range []int{0, 1, 200} {
		path := filepath.Join(dir, fmt.Sprint(i))
		b := openBolt(f, path, storage.BoltOptions{})
		for j := 0; j < n; j += 100 {
			var ops []storage.Op
			for k := j; k < min(j+100, n); k++ {
				ops = append(ops, put(fmt.Sprint(k), strings.Repeat("v", k))...)
			}
			mustCommit(f, b, ops)
		}
		closeBolt(f, b)
		data, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(bytes.TrimRight(data, "\x00"), uint32(0), byte(0))
		f.Add(bytes.TrimRight(data, "\x00"), uint32(4096*2+17), byte(1))
	}
	path := filepath.Join(dir, "fuzz")
	f.Fuzz(func(t *testing.T, data []byte, off uint32, flip byte) {
		if int64(off) < int64(len(data)) {
			data[off] ^= flip
		}
		if len(data) > 1<<20 || storage.Examine(bytes.NewReader(data), int64(len(data))) != nil {
			return
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		db, err := bbolt.Open(path, 0o600, &bbolt.Options{NoFreelistSync: true, NoSync: true})
		if err != nil {
			t.Fatalf("passed, but bbolt says: %v", err)
		}
		err = db.View(func(tx *bbolt.Tx) error {
			for err := range tx.Check() {
				return err
			}
			return nil
		})
		if err := errors.Join(err, db.Close()); err != nil {
			t.Errorf("passed, but bbolt finds: %v", err)
		}
	})
}

// TestForgedPagesAreRefused changes the structure of a bbolt file, which has no
// checksums but those of its meta pages.
func TestForgedPagesAreRefused(t *testing.T) {
	t.Parallel()
	path := filepath.Join(privateDir(t), "state.db")
	b := openBolt(t, path, storage.BoltOptions{})
	var ops []storage.Op
	for i := range 60 {
		ops = append(ops, put(fmt.Sprintf("key/%03d", i), strings.Repeat("v", 100))...)
	}
	mustCommit(t, b, ops)
	closeBolt(t, b)
	// Another program wrote to it: then it has a list of free pages, too.
	editBolt(t, path, func(tx *bbolt.Tx) error { return nil })
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	u16, u32, u64 := binary.NativeEndian.Uint16, binary.NativeEndian.Uint32, binary.NativeEndian.Uint64
	put32, put64 := binary.NativeEndian.PutUint32, binary.NativeEndian.PutUint64
	pageSize := int(u32(whole[24:]))
	meta := whole[16:80]
	if other := whole[pageSize+16 : pageSize+80]; u64(other[48:]) > u64(meta[48:]) {
		meta = other
	}
	whole = whole[:int(u64(meta[40:]))*pageSize] // the rest is growth, not used yet
	page := func(b []byte, id uint64) []byte { return b[int(id)*pageSize : int(id+1)*pageSize] }
	root := u64(meta[16:])
	// The root page holds the buckets; that of the state is large enough for pages
	// of its own: a branch and its leaves.
	branch := uint64(0)
	rootPage := page(whole, root)
	for i := range int(u16(rootPage[10:])) {
		off := 16 + i*16
		pos, ksize := int(u32(rootPage[off+4:])), int(u32(rootPage[off+8:]))
		if string(rootPage[off+pos:off+pos+ksize]) == "state" {
			branch = u64(rootPage[off+pos+ksize:])
		}
	}
	if u16(page(whole, branch)[8:]) != 1 {
		t.Fatalf("page %d is no branch page", branch)
	}
	leaf, sibling := u64(page(whole, branch)[16+8:]), u64(page(whole, branch)[32+8:])
	free := u64(meta[32:])

	check := func(b []byte) error { return storage.Examine(bytes.NewReader(b), int64(len(b))) }
	if err := check(whole); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(b []byte){
		"a page with another number":    func(b []byte) { page(b, leaf)[0]++ },
		"a page of another kind":        func(b []byte) { page(b, leaf)[8] = 0x10 },
		"a page of two kinds":           func(b []byte) { page(b, leaf)[8] = 0x03 },
		"a page that continues others":  func(b []byte) { put32(page(b, min(leaf, sibling))[12:], uint32(max(leaf, sibling)-min(leaf, sibling))) },
		"a page that never ends":        func(b []byte) { put32(page(b, leaf)[12:], 1<<31) },
		"a branch without children":     func(b []byte) { page(b, branch)[10] = 0 },
		"a branch that is its child":    func(b []byte) { put64(page(b, branch)[16+8:], branch) },
		"a child twice":                 func(b []byte) { put64(page(b, branch)[32+8:], leaf) },
		"children exchanged":            func(b []byte) { put64(page(b, branch)[16+8:], sibling); put64(page(b, branch)[32+8:], leaf) },
		"a child that is the meta page": func(b []byte) { put64(page(b, branch)[16+8:], 1) },
		"a child beyond the end":        func(b []byte) { put64(page(b, branch)[16+8:], 1<<40) },
		"a branch key beyond the page":  func(b []byte) { put32(page(b, branch)[16+4:], 1<<31) },
		"a next branch key beyond it":   func(b []byte) { put32(page(b, branch)[32+4:], 1<<31) },
		"more elements than fit":        func(b []byte) { page(b, leaf)[11] = 0xff },
		"a key among the elements":      func(b []byte) { put32(page(b, leaf)[16+4:], 16) },
		"a key beyond the page":         func(b []byte) { put32(page(b, leaf)[16+8:], 1<<31) },
		"a value beyond the page":       func(b []byte) { put32(page(b, leaf)[16+12:], 1<<31) },
		"keys out of order": func(b []byte) {
			// The first two entries are of one size: each one's place for the other's.
			p := page(b, leaf)
			first, second := u32(p[16+4:]), u32(p[32+4:])
			put32(p[16+4:], second+16)
			put32(p[32+4:], first-16)
		},
		"an entry that is a bucket":    func(b []byte) { page(b, leaf)[16] = 1 },
		"a bucket that is an entry":    func(b []byte) { page(b, root)[16] = 0 },
		"a used page in the free list": func(b []byte) { put64(page(b, free)[16:], leaf) },
		"a meta page in the free list": func(b []byte) { put64(page(b, free)[16:], 0) },
		"a page beyond the end in it":  func(b []byte) { put64(page(b, free)[16:], 1<<40) },
		"a free list too long":         func(b []byte) { page(b, free)[11] = 0x7f },
		"a free list much too long":    func(b []byte) { copy(page(b, free)[10:], "\xff\xff"); put64(page(b, free)[16:], 1<<60) },
		"a free list of another kind":  func(b []byte) { page(b, free)[8] = 2 },
	} {
		data := bytes.Clone(whole)
		change(data)
		if err := check(data); !errors.Is(err, storage.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for off := range 64 {
		for _, base := range []int{16, pageSize + 16} {
			data := bytes.Clone(whole)
			data[base+off] ^= 0x04
			if err := check(data); !errors.Is(err, storage.ErrCorrupt) || !strings.Contains(err.Error(), "meta page") {
				t.Errorf("byte %d of the meta page at %d: %v", off, base, err)
			}
		}
	}
}
