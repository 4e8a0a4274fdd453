package storage

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

const (
	storeFormat    = 1
	defaultMaxSize = 256 << 20
	// initialMmap is address space, and what the file grows to, sparsely, on its
	// first growth; readers do not stall a writer until it is full.
	initialMmap = 4 << 20
	// newSuffix marks a file that is being created; a random number follows.
	newSuffix = ".new-"
)

// OpenBolt opens the store in a file, and creates it if it is missing and its
// folder exists. Folder and file must be closed to everyone but the owner. A new
// file gets its name only when it is complete and durable, so a crash during
// creation leaves none; what it left is removed at the next opening.
//
// Before anything is written the whole file is locked, read and checked. Errors are
// ErrLocked, ErrNewerFormat, ErrCorrupt, and those of the file system.
func OpenBolt(path string, opt BoltOptions) (*Bolt, error) {
	if opt.LockTimeout == 0 {
		opt.LockTimeout = defaultLockTimeout
	}
	if opt.MaxSize == 0 {
		opt.MaxSize = defaultMaxSize
	}
	if opt.History == 0 {
		opt.History = defaultHistory
	}
	b, err := openBolt(path, opt)
	if err != nil {
		return nil, fmt.Errorf("opening store %s: %w", path, err)
	}
	return b, nil
}

func openBolt(path string, opt BoltOptions) (*Bolt, error) {
	switch {
	case path == "":
		return nil, errors.New("no path given")
	case opt.LockTimeout < 0:
		return nil, fmt.Errorf("lock timeout %v is negative", opt.LockTimeout)
	case opt.MaxSize < initialMmap:
		return nil, fmt.Errorf("maximum size %d: must be at least %d", opt.MaxSize, initialMmap)
	case opt.History < 1:
		return nil, fmt.Errorf("history of %d changes: must be at least 1", opt.History)
	}
	if err := checkPrivateDir(filepath.Dir(path)); err != nil {
		return nil, err
	}
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) && !opt.MustExist {
		if err := createBolt(path); err != nil {
			return nil, fmt.Errorf("creating it: %w", err)
		}
		info, err = os.Lstat(path)
	}
	if err != nil {
		return nil, err
	}
	if err := checkPrivateFile(path, info); err != nil {
		return nil, err
	}
	file, err := lockFile(path, os.O_RDWR, opt.LockTimeout)
	if err != nil {
		return nil, err
	}
	if err := examineFile(file); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	db, err := openDB(path, file, &bbolt.Options{
		MaxSize:         int(opt.MaxSize),
		InitialMmapSize: initialMmap,
	})
	if err != nil {
		return nil, err
	}
	b := &Bolt{
		path:    path,
		db:      db,
		file:    file,
		hook:    opt.Hook,
		writer:  make(chan struct{}, 1),
		closing: make(chan struct{}),
		leases:  map[string]*boltLease{},
	}
	if err := b.start(opt); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return b, nil
}

func (b *Bolt) start(opt BoltOptions) error {
	if err := removeLeftovers(b.path); err != nil {
		return err
	}
	revision, err := b.settle()
	if err != nil {
		return err
	}
	// Whoever created the file may not have got so far.
	if err := syncDir(filepath.Dir(b.path)); err != nil {
		return fmt.Errorf("making the name of the file durable: %w", err)
	}
	b.history = newHistory(opt.History, revision)
	b.metrics, err = newBoltMetrics(opt.Metrics)
	return err
}

// settle makes durable what was read. If the last fsync of the process before
// failed, its commit may be visible in the page cache, its meta page held for
// clean, and yet not be on the disk. One commit more, whose meta page goes to the
// other place, covers it: the data pages behind it were synced before.
func (b *Bolt) settle() (revision uint64, err error) {
	defer recoverDamage(&err)
	err = b.db.Update(func(tx *bbolt.Tx) error {
		var err error
		if revision, err = storeRevision(tx); err != nil {
			return err
		}
		return tx.Bucket(metaBucket).Put(formatKey, binary.BigEndian.AppendUint32(nil, storeFormat))
	})
	if err != nil {
		return 0, fmt.Errorf("making what was read durable: %w", err)
	}
	return revision, nil
}

// lockFile opens a file and locks it, waiting a moment for a process that is about
// to leave. Without waiting for one bbolt would wait forever.
func lockFile(path string, flags int, timeout time.Duration) (*os.File, error) {
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return nil, err
	}
	deadline := time.Now().Add(timeout)
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return f, nil
		case !errors.Is(err, unix.EWOULDBLOCK):
			return nil, errors.Join(fmt.Errorf("locking it: %w", err), f.Close())
		case !time.Now().Before(deadline):
			err = fmt.Errorf("%w, after waiting %v; stop it first (to find it: fuser %q)", ErrLocked, timeout, path)
			return nil, errors.Join(err, f.Close())
		}
		time.Sleep(lockInterval)
	}
}

// openDB gives an open and locked file to bbolt, which closes it, with the options
// that all our files have in common. Locking it once more does nothing.
func openDB(path string, file *os.File, opt *bbolt.Options) (db *bbolt.DB, err error) {
	opt.FreelistType = bbolt.FreelistMapType
	opt.NoFreelistSync = true
	opt.NoStatistics = true
	opt.Timeout = time.Second
	opt.OpenFile = func(string, int, os.FileMode) (*os.File, error) { return file, nil }
	defer func() {
		if r := recover(); r != nil {
			// The memory map, out of reach now, would keep the lock.
			unlockErr := unix.Flock(int(file.Fd()), unix.LOCK_UN)
			db, err = nil, errors.Join(fmt.Errorf("%v: %w", r, ErrCorrupt), unlockErr, file.Close())
		}
	}()
	return bbolt.Open(path, 0o600, opt)
}

// createBolt makes an empty store. If another process does the same at the same
// time, one of the two files gets the name.
func createBolt(path string) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+newSuffix+"*") // mode 0600
	if err != nil {
		return err
	}
	temp := f.Name()
	defer func() {
		if removeErr := os.Remove(temp); removeErr != nil && !errors.Is(removeErr, fs.ErrNotExist) {
			err = errors.Join(err, removeErr)
		}
	}()
	db, err := openDB(temp, f, &bbolt.Options{})
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		meta, err := tx.CreateBucket(metaBucket)
		if err != nil {
			return err
		}
		if _, err := tx.CreateBucket(stateBucket); err != nil {
			return err
		}
		return errors.Join(
			meta.Put(formatKey, binary.BigEndian.AppendUint32(nil, storeFormat)),
			meta.Put(revisionKey, make([]byte, 8)))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		return err
	}
	// A link, where a rename would replace what the other process made.
	err = os.Link(temp, path)
	if _, statErr := os.Lstat(path); err != nil && statErr == nil {
		return nil
	}
	return err
}

// removeLeftovers removes what a creation that did not end left. Who removes has
// the store open, so it exists and nobody needs them.
func removeLeftovers(path string) error {
	dir, base := filepath.Dir(path), filepath.Base(path)
	names, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range names {
		if strings.HasPrefix(e.Name(), base+newSuffix) {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("removing an unfinished store: %w", err)
			}
		}
	}
	return nil
}

// examineFile reads the whole of a locked file and changes nothing.
func examineFile(file *os.File) error {
	info, err := file.Stat()
	if err != nil {
		return err
	}
	return examine(file, info.Size())
}

// examine checks that a file is ours, of a format that this version knows, and
// undamaged.
func examine(file io.ReaderAt, size int64) error {
	if size == 0 {
		return fmt.Errorf("the file is empty: %w", ErrCorrupt)
	}
	meta := map[string][]byte{}
	newest, newestKey := uint64(0), ""
	buckets, err := checkBoltFile(file, size, func(bucket string, key, value []byte) error {
		if bucket == string(metaBucket) && len(value) <= 8 {
			meta[string(key)] = append([]byte{}, value...)
		}
		if bucket != string(stateBucket) {
			return nil
		}
		e, err := parseEntry(key, value)
		if e.Revision > newest {
			newest, newestKey = e.Revision, e.Key
		}
		return err
	})
	if err != nil {
		return err
	}
	format, revision := meta[string(formatKey)], meta[string(revisionKey)]
	if len(format) != 4 {
		return fmt.Errorf("not a store of signet-ca: %w", ErrCorrupt)
	}
	switch v := binary.BigEndian.Uint32(format); {
	case v > storeFormat:
		return fmt.Errorf("store format %d, this version knows %d: %w", v, storeFormat, ErrNewerFormat)
	case v == 0:
		return fmt.Errorf("store format 0: %w", ErrCorrupt)
	}
	if !slices.Contains(buckets, string(stateBucket)) || len(revision) != 8 {
		return fmt.Errorf("no state or no revision in it: %w", ErrCorrupt)
	}
	if r := binary.BigEndian.Uint64(revision); newest > r {
		return fmt.Errorf("entry %q has revision %d, the store %d: %w", newestKey, newest, r, ErrCorrupt)
	}
	return nil
}

// Check reads the whole file and checks its structure and every entry. Commits
// wait meanwhile.
func (b *Bolt) Check(ctx context.Context) error {
	err := b.exclusively(ctx, func() error { return examineFile(b.file) })
	if err != nil {
		return fmt.Errorf("checking store %s: %w", b.path, err)
	}
	return nil
}

// ReadBolt reads all of a store that no process has open, and changes nothing. It
// returns the entries in the order of the keys' bytes, and the store's revision. The
// whole file is checked. Errors are those of OpenBolt.
func ReadBolt(path string, lockTimeout time.Duration) (entries []Entry, revision uint64, err error) {
	fail := func(err error) ([]Entry, uint64, error) {
		return nil, 0, fmt.Errorf("reading store %s: %w", path, err)
	}
	info, err := os.Lstat(path)
	if err != nil {
		return fail(err)
	}
	if err := checkPrivateFile(path, info); err != nil {
		return fail(err)
	}
	if lockTimeout == 0 {
		lockTimeout = defaultLockTimeout
	}
	file, err := lockFile(path, os.O_RDONLY, lockTimeout)
	if err != nil {
		return fail(err)
	}
	defer file.Close()
	if err := examineFile(file); err != nil {
		return fail(err)
	}
	_, err = checkBoltFile(file, info.Size(), func(bucket string, key, value []byte) error {
		switch {
		case bucket == string(stateBucket):
			e, err := parseEntry(key, value)
			entries = append(entries, e)
			return err
		case bucket == string(metaBucket) && string(key) == string(revisionKey):
			revision = binary.BigEndian.Uint64(value)
		}
		return nil
	})
	if err != nil {
		return fail(err)
	}
	return entries, revision, nil
}
