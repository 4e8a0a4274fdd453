package etcd

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"sync"

	"github.com/signet-mesh/signet/storage"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// maxChunk is the largest value that a file is written in: what etcd takes in one
// request with its default settings is half as much again.
const maxChunk = 1 << 20

// ErrLost is why nothing more is written to a folder: this process no longer owns it.
// It may have stood still for so long that another one took over.
var ErrLost = errors.New("the folder is no longer this process's")

// files are folders of files below the store's prefix. A file is a sequence of values,
// each with the offset where it begins in its key.
//
// Whoever locks a folder becomes its owner, in a key of its own. Each change is made on
// the condition that this key is as it was when the folder was locked. So from the moment
// that a folder is locked nothing that was asked for before can still change it, be it of
// another process, one that stood still, or a request that was under way for long: what is
// read after is all there will be.
type files struct {
	s *Store

	mu     sync.Mutex
	owners map[string]*owner // by folder; guarded by mu
	// created are open files by the name that they were created under: one that gets
	// another name goes on under that. Guarded by mu.
	created map[string]*file
	// left are the revisions of owners' keys that this process gave up and could not
	// remove: it need not wait until they expire. Guarded by mu.
	left map[string]int64
}

var _ storage.FS = (*files)(nil)

// Files are folders of files in the store, for logs: as LogOptions.FS of
// storage.OpenLog, with Remote set. Names are relative paths. Of all processes one at a
// time owns a folder: from Lock to Close, or until Options.OwnerTTL after it died.
func (s *Store) Files() storage.FS { return &s.files }

// owner is the lock of a folder.
type owner struct {
	f        *files
	dir      string
	session  *session
	revision int64 // of the key
}

// sessions are the leases of all owners.
func (f *files) sessions() (all []*session) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, o := range f.owners {
		all = append(all, o.session)
	}
	return all
}

// Lock makes this process the owner of a folder, or fails with storage.ErrLocked.
func (f *files) Lock(dir string, _ bool) (io.Closer, error) {
	dir = path.Clean(dir)
	if err := storage.CheckKey(dir); err != nil || path.IsAbs(dir) || strings.HasPrefix(dir, ".") {
		return nil, fmt.Errorf("folder %q cannot be in etcd: %w", dir, errors.Join(err, fs.ErrInvalid))
	}
	ctx := f.s.life
	f.mu.Lock()
	left := f.left[dir]
	f.mu.Unlock()
	// Most often it is locked for longer than a moment: ask before taking a lease.
	if err := f.s.try(ctx, func(ctx context.Context) error {
		resp, err := f.s.client.Get(ctx, f.s.ownerKey(dir))
		if err == nil && len(resp.Kvs) == 0 {
			left = 0
		} else if err == nil && resp.Kvs[0].ModRevision != left {
			err = locked(resp.Kvs[0])
		}
		return err
	}); err != nil {
		return nil, err
	}
	se, err := f.s.newSession(ctx, f.s.ttl)
	if err != nil {
		return nil, err
	}
	o := &owner{f: f, dir: dir, session: se}
	token := f.s.name + " " + rand.Text()
	err = f.s.try(ctx, func(ctx context.Context) error {
		key := f.s.ownerKey(dir)
		resp, err := f.s.client.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", left)).
			Then(clientv3.OpPut(key, token, clientv3.WithLease(se.Lease()))).Else(clientv3.OpGet(key)).Commit()
		if err != nil {
			return err
		}
		if o.revision = resp.Header.Revision; resp.Succeeded {
			return nil
		}
		kvs := resp.Responses[0].GetResponseRange().Kvs
		switch {
		case len(kvs) == 0 && left != 0:
			left = 0 // it has just expired
			return errors.New("it is free now")
		case len(kvs) == 0:
			return final(fmt.Errorf("%w: %s", ErrLost, "what was taken has expired"))
		case string(kvs[0].Value) != token:
			return locked(kvs[0])
		}
		o.revision = kvs[0].ModRevision // an earlier request had arrived
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, se.end(ctx))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.owners[dir] = o
	delete(f.left, dir)
	return o, nil
}

func locked(kv *mvccpb.KeyValue) error {
	who, _, _ := strings.Cut(string(kv.Value), " ")
	return final(fmt.Errorf("%w: %s has it", storage.ErrLocked, who))
}

// Close gives the folder up: from then on this process changes nothing in it, whatever
// was asked for before.
func (o *owner) Close() error {
	o.f.mu.Lock()
	if o.f.owners[o.dir] == o {
		delete(o.f.owners, o.dir)
	}
	o.f.mu.Unlock()
	if o.f.s.life.Err() != nil {
		return nil // the store gave it up
	}
	if err := o.session.end(o.f.s.life); err != nil {
		o.f.s.log.Warn("a folder stays locked for others for a while", "dir", o.dir, "err", err)
		o.f.mu.Lock()
		o.f.left[o.dir] = o.revision
		o.f.mu.Unlock()
	}
	return nil
}

// write changes files of a folder that this process owns. Then must be such that doing it
// twice is doing it once. If more conditions are given and do not hold, it returns what
// els found.
func (f *files) write(dir string, ifs []clientv3.Cmp, then, els []clientv3.Op) (found *clientv3.TxnResponse, err error) {
	f.mu.Lock()
	o := f.owners[dir]
	f.mu.Unlock()
	if o == nil {
		return nil, fmt.Errorf("changing folder %s: %w", dir, ErrLost)
	}
	key := f.s.ownerKey(dir)
	ifs = append(slices.Clone(ifs), clientv3.Compare(clientv3.ModRevision(key), "=", o.revision))
	els = append([]clientv3.Op{clientv3.OpGet(key)}, els...)
	err = f.s.try(f.s.life, func(ctx context.Context) error {
		resp, err := f.s.client.Txn(ctx).If(ifs...).Then(then...).Else(els...).Commit()
		if err != nil || resp.Succeeded {
			return err
		}
		if kvs := resp.Responses[0].GetResponseRange().Kvs; len(kvs) == 0 || kvs[0].ModRevision != o.revision {
			return final(fmt.Errorf("changing folder %s: %w", dir, ErrLost))
		}
		found = resp
		return nil
	})
	return found, err
}

// chunkKey is the key of what a file has from an offset on.
func (f *files) chunkKey(name string, offset int64) string {
	return fmt.Sprintf("%s%016x", f.s.fileKey(name), offset)
}

// chunkOffset takes the key of a chunk apart.
func (f *files) chunkOffset(name string, kv *mvccpb.KeyValue) (offset int64, err error) {
	digits := strings.TrimPrefix(string(kv.Key), f.s.fileKey(name))
	if _, err := fmt.Sscanf(digits, "%016x", &offset); err != nil || f.chunkKey(name, offset) != string(kv.Key) || offset < 0 || len(kv.Value) == 0 {
		return 0, fmt.Errorf("key %q does not belong to a file: %w", kv.Key, storage.ErrCorrupt)
	}
	return offset, nil
}

func (f *files) end(name string) string { return clientv3.GetPrefixRangeEnd(f.s.fileKey(name)) }

// get is one read of etcd.
func (f *files) get(key string, opts ...clientv3.OpOption) (resp *clientv3.GetResponse, err error) {
	err = f.s.try(f.s.life, func(ctx context.Context) (err error) {
		resp, err = f.s.client.Get(ctx, key, opts...)
		return err
	})
	return resp, err
}

// List returns the names of the files in a folder. A file may have many values, so it
// goes from one file to the next instead of over all of them.
func (f *files) List(dir string) (names []string, err error) {
	below := f.s.fileKey(path.Clean(dir))
	end := clientv3.GetPrefixRangeEnd(below)
	for key := below; ; {
		resp, err := f.get(key, clientv3.WithRange(end), clientv3.WithLimit(1), clientv3.WithKeysOnly())
		if err != nil {
			return nil, err
		}
		if len(resp.Kvs) == 0 {
			return names, nil
		}
		name, _, ok := strings.Cut(strings.TrimPrefix(string(resp.Kvs[0].Key), below), "/")
		if !ok {
			return nil, fmt.Errorf("key %q does not belong to a file: %w", resp.Kvs[0].Key, storage.ErrCorrupt)
		}
		names = append(names, name)
		key = clientv3.GetPrefixRangeEnd(below + name + "/")
	}
}

// Open opens a file.
func (f *files) Open(name string) (storage.File, error) {
	name = path.Clean(name)
	resp, err := f.get(f.s.fileKey(name), clientv3.WithRange(f.end(name)), clientv3.WithSort(clientv3.SortByKey, clientv3.SortDescend), clientv3.WithLimit(1))
	if err != nil {
		return nil, err
	}
	if len(resp.Kvs) == 0 {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	last, err := f.chunkOffset(name, resp.Kvs[0])
	if err != nil {
		return nil, err
	}
	return &file{f: f, name: name, size: last + int64(len(resp.Kvs[0].Value))}, nil
}

// Create creates a file, which is there when it is first synced.
func (f *files) Create(name string) (storage.File, error) {
	name = path.Clean(name)
	if _, err := f.Open(name); err == nil {
		return nil, &fs.PathError{Op: "create", Path: name, Err: fs.ErrExist}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	fl := &file{f: f, name: name}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.created[name] = fl
	return fl, nil
}

// Rename gives a file another name, as one change. Both are small.
func (f *files) Rename(from, to string) error {
	from, to = path.Clean(from), path.Clean(to)
	for _, name := range []string{from, to} {
		resp, err := f.get(f.s.fileKey(name), clientv3.WithRange(f.end(name)), clientv3.WithCountOnly())
		switch {
		case err != nil:
			return err
		case resp.Count == 0 && name == from:
			return &fs.PathError{Op: "rename", Path: from, Err: fs.ErrNotExist}
		case resp.Count > 1:
			return &fs.PathError{Op: "rename", Path: name, Err: errors.New("the file has more than one value")}
		}
	}
	resp, err := f.get(f.chunkKey(from, 0))
	if err != nil {
		return err
	}
	if len(resp.Kvs) == 0 {
		return fmt.Errorf("file %s does not begin at 0: %w", from, storage.ErrCorrupt)
	}
	if _, err = f.write(path.Dir(to), nil, []clientv3.Op{
		clientv3.OpPut(f.chunkKey(to, 0), string(resp.Kvs[0].Value)),
		clientv3.OpDelete(f.s.fileKey(from), clientv3.WithRange(f.end(from))),
	}, nil); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if fl := f.created[from]; fl != nil {
		delete(f.created, from)
		fl.name = to
	}
	return nil
}

// Remove removes a file.
func (f *files) Remove(name string) error {
	name = path.Clean(name)
	resp, err := f.get(f.s.fileKey(name), clientv3.WithRange(f.end(name)), clientv3.WithCountOnly())
	if err == nil && resp.Count == 0 {
		err = &fs.PathError{Op: "remove", Path: name, Err: fs.ErrNotExist}
	}
	if err == nil {
		_, err = f.write(path.Dir(name), nil, []clientv3.Op{clientv3.OpDelete(f.s.fileKey(name), clientv3.WithRange(f.end(name)))}, nil)
	}
	return err
}

// SyncDir does nothing: every change is durable when it has been made.
func (f *files) SyncDir(string) error { return nil }

// file is an open file. One goroutine at a time uses it, and renames it.
type file struct {
	f    *files
	name string

	mu      sync.Mutex
	size    int64  // of what is synced; guarded by mu
	pending []span // written and not yet synced, in the order of the calls; guarded by mu
	window  span   // what was read last; guarded by mu
	page    int64  // how many values are read at once; guarded by mu
}

// span is a part of a file.
type span struct {
	offset int64
	data   []byte
}

func (s span) end() int64 { return s.offset + int64(len(s.data)) }

// Size is the size of what is synced.
func (fl *file) Size() (int64, error) {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	return fl.size, nil
}

// Close ends the use of the file.
func (fl *file) Close() error {
	fl.f.mu.Lock()
	defer fl.f.mu.Unlock()
	if fl.f.created[fl.name] == fl {
		delete(fl.f.created, fl.name)
	}
	return nil
}

// ReadAt reads what is synced. See io.ReaderAt.
func (fl *file) ReadAt(p []byte, offset int64) (n int, err error) {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	for n < len(p) {
		at := offset + int64(n)
		if at >= fl.size {
			return n, io.EOF
		}
		if at < fl.window.offset || at >= fl.window.end() {
			if err := fl.load(at); err != nil {
				return n, err
			}
		}
		n += copy(p[n:], fl.window.data[at-fl.window.offset:min(fl.window.end(), fl.size)-fl.window.offset])
	}
	return n, nil
}

// The window is about this large.
const windowSize = 512 << 10

// load reads values from the one on that has an offset. mu is held.
func (fl *file) load(at int64) error {
	start := fl.chunk(at)
	if at != fl.window.end() {
		// Somewhere else: find where the value begins.
		resp, err := fl.f.get(fl.chunk(0), clientv3.WithRange(fl.chunk(at)+"\x00"), clientv3.WithKeysOnly(),
			clientv3.WithSort(clientv3.SortByKey, clientv3.SortDescend), clientv3.WithLimit(1))
		if err != nil {
			return err
		}
		if len(resp.Kvs) == 0 {
			return fl.missing(at)
		}
		start, fl.page = string(resp.Kvs[0].Key), 1
	}
	resp, err := fl.f.get(start, clientv3.WithRange(fl.f.end(fl.name)), clientv3.WithLimit(max(fl.page, 1)))
	if err != nil {
		return err
	}
	w := span{}
	for i, kv := range resp.Kvs {
		offset, err := fl.f.chunkOffset(fl.name, kv)
		if err != nil {
			return err
		}
		if i == 0 {
			w.offset = offset
		} else if offset != w.end() {
			return fl.missing(w.end())
		}
		w.data = append(w.data, kv.Value...)
	}
	if at < w.offset || at >= w.end() {
		return fl.missing(at)
	}
	// As many the next time as are about the right size together.
	if len(w.data) < windowSize {
		fl.page = min(2*max(fl.page, 1), 1024)
	} else if len(w.data) > 2*windowSize {
		fl.page = max(fl.page/2, 1)
	}
	fl.window = w
	return nil
}

func (fl *file) chunk(offset int64) string { return fl.f.chunkKey(fl.name, offset) }

func (fl *file) missing(at int64) error {
	return fmt.Errorf("file %s has nothing at offset %d: %w", fl.name, at, storage.ErrCorrupt)
}

// WriteAt keeps what is written until Sync. It goes behind the end, or is what is there
// already.
func (fl *file) WriteAt(p []byte, offset int64) (int, error) {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	fl.pending = append(fl.pending, span{offset, bytes.Clone(p)})
	return len(p), nil
}

// Sync makes what was written durable.
func (fl *file) Sync() error {
	fl.mu.Lock()
	pending, size := fl.pending, fl.size
	fl.pending = nil
	fl.mu.Unlock()
	for _, w := range pending {
		if w.offset != size {
			if err := fl.same(w, size); err != nil {
				return err
			}
			continue
		}
		for len(w.data) > 0 {
			n := min(len(w.data), maxChunk)
			if err := fl.append(span{w.offset, w.data[:n]}); err != nil {
				return err
			}
			w.offset, w.data = w.offset+int64(n), w.data[n:]
		}
		size = w.offset
	}
	// Also where there was nothing to write: what was read is this process's to go on from.
	if len(pending) == 0 {
		_, err := fl.f.write(path.Dir(fl.name), nil, nil, nil)
		return err
	}
	return nil
}

// same checks that what is to be written is there.
func (fl *file) same(w span, size int64) error {
	if w.offset > size || w.end() > size {
		return fmt.Errorf("file %s: writing at offset %d of %d: %w", fl.name, w.offset, size, fs.ErrInvalid)
	}
	b := make([]byte, len(w.data))
	if _, err := fl.ReadAt(b, w.offset); err != nil {
		return err
	}
	if !bytes.Equal(b, w.data) {
		return fmt.Errorf("file %s: changing what is there at offset %d: %w", fl.name, w.offset, fs.ErrInvalid)
	}
	_, err := fl.f.write(path.Dir(fl.name), nil, nil, nil)
	return err
}

// append adds a value at the end. An earlier request for the same may have arrived.
func (fl *file) append(w span) error {
	key := fl.chunk(w.offset)
	found, err := fl.f.write(path.Dir(fl.name), []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(key), "=", 0)},
		[]clientv3.Op{clientv3.OpPut(key, string(w.data))}, []clientv3.Op{clientv3.OpGet(key)})
	if err != nil {
		return err
	}
	if found != nil {
		if kvs := found.Responses[1].GetResponseRange().Kvs; len(kvs) != 1 || !bytes.Equal(kvs[0].Value, w.data) {
			return fmt.Errorf("file %s has something else at offset %d already: %w", fl.name, w.offset, storage.ErrCorrupt)
		}
	}
	fl.mu.Lock()
	defer fl.mu.Unlock()
	fl.size = w.end()
	return nil
}

// Truncate cuts the end off.
func (fl *file) Truncate(size int64) error {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	if size >= fl.size {
		return nil
	}
	then := []clientv3.Op{clientv3.OpDelete(fl.chunk(size), clientv3.WithRange(fl.f.end(fl.name)))}
	if size > 0 {
		// The value that has the new end, if that is in the middle of it.
		resp, err := fl.f.get(fl.chunk(0), clientv3.WithRange(fl.chunk(size)), clientv3.WithSort(clientv3.SortByKey, clientv3.SortDescend), clientv3.WithLimit(1))
		if err != nil {
			return err
		}
		offset, err := fl.f.chunkOffset(fl.name, resp.Kvs[0])
		if err != nil {
			return err
		}
		if keep := size - offset; keep < int64(len(resp.Kvs[0].Value)) {
			then = append(then, clientv3.OpPut(fl.chunk(offset), string(resp.Kvs[0].Value[:keep])))
		}
	}
	if _, err := fl.f.write(path.Dir(fl.name), nil, then, nil); err != nil {
		return err
	}
	fl.size, fl.window, fl.page = size, span{}, 0
	return nil
}
