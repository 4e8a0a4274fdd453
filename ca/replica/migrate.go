package replica

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/signet-mesh/signet/storage"
)

// movedKey says, in a state that was moved, or is being moved, where to.
const movedKey = "moved"

// ErrMoved is why a state is not used: it was moved elsewhere, or is being moved.
var ErrMoved = errors.New("the state has moved")

// moved is the record under movedKey.
type moved struct {
	Version int `json:"version"`
	// ID is that of the replica that moves. To is for people.
	ID string `json:"id"`
	To string `json:"to"`
	// From is set where the state is the one that is moved to, and not complete.
	From string `json:"from,omitempty"`
}

// CheckMoved is nil if a state can be used.
func CheckMoved(ctx context.Context, s storage.Store) error {
	m, _, err := readMoved(ctx, s)
	switch {
	case err != nil:
		return err
	case m.From != "":
		return fmt.Errorf("%w: it is being moved here from %s; run `signet-ca migrate-store` there until it ends", ErrMoved, m.From)
	case m.ID != "":
		return fmt.Errorf("%w to %s; run `signet-ca migrate-store` again if it did not end, and configure that one", ErrMoved, m.To)
	}
	return nil
}

// readMoved returns the record and its revision; zero if there is none.
func readMoved(ctx context.Context, s storage.Store) (m moved, revision uint64, err error) {
	e, err := s.Get(ctx, movedKey)
	if errors.Is(err, storage.ErrNotFound) {
		return m, 0, nil
	}
	if err == nil {
		err = json.Unmarshal(e.Value, &m)
	}
	if err != nil {
		return m, 0, fmt.Errorf("reading whether the state has moved: %w", err)
	}
	return m, e.Revision, nil
}

// Migration moves one authority's state and log between its folder and a shared state.
type Migration struct {
	// Dir is the authority's folder, which keeps its keys and the logs of instances from
	// before a restore.
	Dir string
	// Store and Files are the shared state; Place is what people call it.
	Store storage.Store
	Files storage.FS
	Place string
	// Wait is how long to wait for the log of a process that died.
	Wait time.Duration
}

// Moved is what was moved.
type Moved struct {
	Instance uint8
	Entries  int    // of the state
	Files    int    // of the log, and of those from before a restore
	Reused   int    // of those, that an earlier attempt had copied
	Records  uint64 // the last record
}

// Names in the authority's folder.
const (
	stateName   = "state.db"
	logName     = "log"
	retiredName = "retired" // logs of instances from before a restore
	newSuffix   = ".migrating"
	movedSuffix = ".moved"
)

func sharedLog(instance uint8) string { return fmt.Sprintf("%s/%03d", logName, instance) }

// ToShared moves the authority of the folder into the shared state, which must hold
// none. While it runs nobody can use either. All is copied and compared first; then the
// folder is marked as moved, then the shared state begins to be an authority's, then the
// files get other names. Interrupted at any point it can be run again, and ends; before the
// mark the authority can also go on as it was.
func (m Migration) ToShared(ctx context.Context) (out Moved, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("moving the authority in %s to %s: %w", m.Dir, m.Place, err)
		}
	}()
	id, err := OpenIdentity(m.Dir)
	if err != nil {
		return out, err
	}
	if _, err := os.Lstat(filepath.Join(m.Dir, stateName)); errors.Is(err, fs.ErrNotExist) {
		return out, m.finished(ctx, id, &out)
	}
	source, err := storage.OpenBolt(filepath.Join(m.Dir, stateName), storage.BoltOptions{MustExist: true})
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, source.Close()) }()
	if err := numberBans(ctx, source); err != nil {
		return out, err
	}
	entries, journal, err := readAll(ctx, source)
	if err != nil {
		return out, err
	}
	out.Instance = journal.Instance
	if aside, err := m.logIsAside(ctx, source, id); err != nil {
		return out, err
	} else if aside {
		return out, m.finished(ctx, id, &out)
	}
	log, err := storage.OpenLog(filepath.Join(m.Dir, logName), storage.LogOptions{Instance: uint32(out.Instance), ReadOnly: true})
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	out.Records = log.Head().Sequence
	view := View(m.Store, out.Instance)
	if err := m.reserve(ctx, id, journal); err != nil {
		return out, err
	}
	if err := m.copyLog(ctx, log, &out); err != nil {
		return out, err
	}
	if err := m.copyEntries(ctx, view, entries, &out); err != nil {
		return out, err
	}
	if err := m.compareLog(ctx, log, out.Instance); err != nil {
		return out, err
	}
	if err := mark(ctx, source, moved{Version: 1, ID: id.ID, To: m.Place}); err != nil {
		return out, err
	}
	if err := m.begin(ctx, view, entries); err != nil {
		return out, err
	}
	id.Begun = true
	if err := id.Save(m.Dir); err != nil {
		return out, err
	}
	return out, m.putAside()
}

// logIsAside says that an attempt was interrupted in the middle of putAside: all is in
// the shared state, and of the folder's files the log has its other name already.
func (m Migration) logIsAside(ctx context.Context, source storage.Store, id Identity) (bool, error) {
	there, _, err := readMoved(ctx, source)
	if err != nil || !id.Begun || there.ID != id.ID {
		return false, err
	}
	_, err = os.Lstat(filepath.Join(m.Dir, logName))
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	return false, err
}

// putAside renames what was moved, so that a configuration of before finds nothing. The
// state is last: as long as it has its name it says that it was moved.
func (m Migration) putAside() error {
	for _, name := range []string{logName, stateName} {
		if err := aside(filepath.Join(m.Dir, name)); err != nil {
			return err
		}
	}
	return syncFolder(m.Dir)
}

// aside gives a file or folder the name of what was moved, with a number after it if
// something has that name since an earlier move: nothing is ever written over.
func aside(name string) error {
	to := name + movedSuffix
	for n := 2; ; n++ {
		_, err := os.Lstat(to)
		if errors.Is(err, fs.ErrNotExist) {
			break
		}
		if err != nil {
			return err
		}
		to = fmt.Sprintf("%s%s.%d", name, movedSuffix, n)
	}
	if err := os.Rename(name, to); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// finished is nil if there is nothing left to move.
func (m Migration) finished(ctx context.Context, id Identity, out *Moved) error {
	if !id.Begun {
		return fmt.Errorf("there is no %s: %w", stateName, fs.ErrNotExist)
	}
	instance, err := Claim(ctx, m.Store, id.ID, 0)
	if err != nil {
		return err
	}
	out.Instance = instance
	return m.putAside()
}

// journalPart is what a migration has to know of a journal.
type journalPart struct {
	Instance uint8 `json:"instance"`
}

// readAll reads a state, without the mark of a migration.
func readAll(ctx context.Context, s storage.Store) (entries []storage.Entry, j journalPart, err error) {
	if entries, _, err = s.List(ctx, ""); err != nil {
		return nil, j, err
	}
	entries = slices.DeleteFunc(entries, func(e storage.Entry) bool { return e.Key == movedKey })
	i := slices.IndexFunc(entries, func(e storage.Entry) bool { return e.Key == journalKey })
	if i < 0 {
		return nil, j, errors.New("the state holds no journal: it is not that of an authority")
	}
	if err := json.Unmarshal(entries[i].Value, &j); err != nil {
		return nil, j, fmt.Errorf("reading the journal: %w", err)
	}
	return entries, j, nil
}

// reserve claims the instance in the shared state, and marks that as being filled.
func (m Migration) reserve(ctx context.Context, id Identity, j journalPart) error {
	mine, revision, err := readMoved(ctx, m.Store)
	if err != nil {
		return err
	}
	_, err = m.Store.Get(ctx, journalKey)
	switch {
	case mine.ID != "" && mine.ID != id.ID && mine.From == "":
		return fmt.Errorf("%w to %s: what it left there is kept, and not written over; name another place (storage.etcd.prefix)", ErrMoved, mine.To)
	case mine.ID != "" && mine.ID != id.ID:
		return fmt.Errorf("%w: another authority is being moved there, from %s", ErrMoved, mine.From)
	case err == nil:
		if n, claimErr := Claim(ctx, m.Store, id.ID, j.Instance); claimErr != nil || n != j.Instance {
			return fmt.Errorf("there is an authority already; a folder that is to join it begins empty: %w", claimErr)
		}
		return nil // an earlier attempt got so far
	case !errors.Is(err, storage.ErrNotFound):
		return err
	}
	if mine.ID == "" {
		b, err := json.Marshal(moved{Version: 1, ID: id.ID, From: m.Dir})
		if err != nil {
			return err
		}
		if _, err := m.Store.Commit(ctx, []storage.Cond{{Key: movedKey, Revision: revision}, {Key: journalKey}}, []storage.Op{{Key: movedKey, Value: b}}); err != nil {
			return err
		}
	}
	_, err = Claim(ctx, m.Store, id.ID, j.Instance)
	return err
}

// copyLog makes the files of the shared log those of the log.
func (m Migration) copyLog(ctx context.Context, log *storage.FileLog, out *Moved) (err error) {
	dir := sharedLog(out.Instance)
	lock, err := lockWithin(ctx, m.Files, dir, m.Wait)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	present, err := m.Files.List(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	kept := map[string]bool{}
	err = log.Files(ctx, func(name string, size int64, r io.Reader) error {
		kept[name] = true
		out.Files++
		return m.copyFile(ctx, path.Join(dir, name), slices.Contains(present, name), size, r, out)
	})
	if err != nil {
		return err
	}
	for _, name := range present {
		if !kept[name] { // of an earlier attempt; it was pruned since
			if err := m.Files.Remove(path.Join(dir, name)); err != nil {
				return err
			}
		}
	}
	return nil
}

func lockWithin(ctx context.Context, files storage.FS, dir string, wait time.Duration) (io.Closer, error) {
	deadline := time.Now().Add(wait)
	for {
		lock, err := files.Lock(dir, true)
		if err == nil || !errors.Is(err, storage.ErrLocked) || time.Now().After(deadline) {
			return lock, err
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// copyFile copies one file, or goes on with a copy that is as far as it goes the same.
func (m Migration) copyFile(ctx context.Context, name string, present bool, size int64, r io.Reader, out *Moved) error {
	data, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	if int64(len(data)) != size {
		return fmt.Errorf("%s has %d bytes, not %d", name, len(data), size)
	}
	start := int64(0)
	var f storage.File
	if present {
		if f, err = m.Files.Open(name); err != nil {
			return err
		}
		if start, err = f.Size(); err != nil {
			return err
		}
		there := make([]byte, start)
		if _, err := f.ReadAt(there, 0); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if bytes.HasPrefix(data, there) {
			out.Reused++
		} else {
			if err := errors.Join(f.Close(), m.Files.Remove(name)); err != nil {
				return err
			}
			present, start = false, 0
		}
	}
	if !present {
		if f, err = m.Files.Create(name); err != nil {
			return err
		}
	}
	for start < size {
		if ctx.Err() != nil {
			return errors.Join(context.Cause(ctx), f.Close())
		}
		n := min(size-start, 1<<20)
		if _, err = f.WriteAt(data[start:start+n], start); err == nil {
			err = f.Sync()
		}
		if err != nil {
			return errors.Join(err, f.Close())
		}
		start += n
	}
	return errors.Join(f.Close(), m.Files.SyncDir(path.Dir(name)))
}

// copyEntries makes the entries of the shared state those of the state, but for the
// journal, which comes last.
func (m Migration) copyEntries(ctx context.Context, view *Store, entries []storage.Entry, out *Moved) error {
	present, _, err := view.List(ctx, "")
	if err != nil {
		return err
	}
	old := map[string]storage.Entry{}
	for _, e := range present {
		if e.Key == journalKey {
			out.Entries = len(entries)
			return nil // an earlier attempt was complete
		}
		old[e.Key] = e
	}
	delete(old, movedKey)
	var ops []storage.Op
	size := 0
	flush := func() error {
		if len(ops) == 0 {
			return nil
		}
		_, err := view.Commit(ctx, nil, ops)
		ops, size = nil, 0
		return err
	}
	add := func(op storage.Op) error {
		n := len(op.Key) + len(op.Value)
		if len(ops) == storage.MaxOps || size+n > storage.MaxCommit/2 {
			if err := flush(); err != nil {
				return err
			}
		}
		ops, size = append(ops, op), size+n
		return nil
	}
	for _, e := range entries {
		out.Entries++
		there, ok := old[e.Key]
		delete(old, e.Key)
		if e.Key == journalKey || ok && bytes.Equal(there.Value, e.Value) {
			continue
		}
		if err := add(storage.Op{Key: e.Key, Value: e.Value}); err != nil {
			return err
		}
	}
	for key := range old {
		if err := add(storage.Op{Key: key, Delete: true}); err != nil {
			return err
		}
	}
	return flush()
}

// compareLog reads the copy of a log whole, and checks that it is the log.
func (m Migration) compareLog(ctx context.Context, log *storage.FileLog, instance uint8) (err error) {
	c, err := m.openShared(instance)
	if err != nil {
		return fmt.Errorf("checking the copy of the log: %w", err)
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	return sameLog(ctx, log, c)
}

// openShared opens the log of an instance in the shared state to read it.
func (m Migration) openShared(instance uint8) (*storage.FileLog, error) {
	return storage.OpenLog(sharedLog(instance), storage.LogOptions{Instance: uint32(instance), FS: m.Files, ReadOnly: true, LockTimeout: max(m.Wait, time.Second)})
}

// sameLog checks that b holds what a holds, and that both are whole.
func sameLog(ctx context.Context, a, b *storage.FileLog) error {
	if !a.Head().Equal(b.Head()) {
		return fmt.Errorf("the copy of the log ends at record %d, the log at record %d: %w", b.Head().Sequence, a.Head().Sequence, storage.ErrCorrupt)
	}
	signedA, okA := a.SignedHead()
	signedB, okB := b.SignedHead()
	checkA, _ := a.Checkpoint()
	checkB, _ := b.Checkpoint()
	if okA != okB || !signedA.Equal(signedB) || !bytes.Equal(checkA.Signature, checkB.Signature) {
		return fmt.Errorf("the copy of the log has another signed head or checkpoint: %w", storage.ErrCorrupt)
	}
	return errors.Join(a.Verify(ctx), b.Verify(ctx))
}

// mark makes a state unusable, for good.
func mark(ctx context.Context, s storage.Store, m moved) error {
	now, revision, err := readMoved(ctx, s)
	if err != nil {
		return err
	}
	if now == m {
		return nil
	}
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	_, err = s.Commit(ctx, []storage.Cond{{Key: movedKey, Revision: revision}}, []storage.Op{{Key: movedKey, Value: b}})
	return err
}

// begin compares what was copied and makes the shared state that of an authority. If an
// earlier attempt has done that there is nothing to compare: others use it since.
func (m Migration) begin(ctx context.Context, view *Store, entries []storage.Entry) error {
	present, _, err := view.List(ctx, "")
	if err != nil {
		return err
	}
	var journal storage.Entry
	want := map[string][]byte{}
	for _, e := range entries {
		if e.Key == journalKey {
			journal = e
		} else {
			want[e.Key] = e.Value
		}
	}
	if slices.ContainsFunc(present, func(e storage.Entry) bool { return e.Key == journalKey }) {
		return nil
	}
	mark := uint64(0)
	for _, e := range present {
		if e.Key == movedKey {
			mark = e.Revision
			continue
		}
		if v, ok := want[e.Key]; !ok || !bytes.Equal(v, e.Value) {
			return fmt.Errorf("entry %q is not what was copied: somebody else writes there", e.Key)
		}
		delete(want, e.Key)
	}
	if len(want) > 0 {
		return fmt.Errorf("%d entries that were copied are gone: somebody else writes there", len(want))
	}
	_, err = view.Commit(ctx, []storage.Cond{{Key: journalKey}, {Key: movedKey, Revision: mark}},
		[]storage.Op{{Key: journalKey, Value: journal.Value}, {Key: movedKey, Delete: true}})
	return err
}

// ToFolder moves the one replica that the shared state has into its folder, with the logs
// of the instances that it was before the state was restored. Other
// replicas must not have begun: what they issued would have no log any more. While it runs
// nobody can use either. It can be run again as ToShared can.
func (m Migration) ToFolder(ctx context.Context) (out Moved, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("moving the authority in %s to %s: %w", m.Place, m.Dir, err)
		}
	}()
	id, err := OpenIdentity(m.Dir)
	if err != nil {
		return out, err
	}
	if !id.Begun {
		return out, m.finishedBack(ctx, &out)
	}
	if out.Instance, err = Claim(ctx, m.Store, id.ID, 0); err != nil {
		return out, err
	}
	// The log is this process's from here on, so no replica of this folder runs.
	log, err := m.openShared(out.Instance)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("the replica has not issued yet, or not since the state was restored: start it once before: %w", err)
	}
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	if err := m.alone(ctx, out.Instance); err != nil {
		return out, err
	}
	before, _, err := readMoved(ctx, m.Store)
	if err != nil {
		return out, err
	}
	again := before.ID == id.ID
	if err := numberBans(ctx, m.Store); err != nil {
		return out, err
	}
	// From here on nobody joins.
	if err := mark(ctx, m.Store, moved{Version: 1, ID: id.ID, To: m.Dir}); err != nil {
		return out, err
	}
	if err := m.alone(ctx, out.Instance); err != nil {
		return out, err
	}
	entries, err := m.folderEntries(ctx, out.Instance)
	if err != nil {
		return out, err
	}
	out.Records = log.Head().Sequence
	// The state gets its name last: where it has it, all is there.
	if _, err := os.Lstat(filepath.Join(m.Dir, stateName)); errors.Is(err, fs.ErrNotExist) {
		if err := m.copyFormer(ctx, &out); err != nil {
			return out, err
		}
		if err := m.makeFolder(ctx, entries, log, &out); err != nil {
			return out, err
		}
		for _, name := range []string{logName, stateName} {
			if err := os.Rename(filepath.Join(m.Dir, name+newSuffix), filepath.Join(m.Dir, name)); err != nil {
				return out, err
			}
		}
	} else if err != nil || !again {
		return out, errors.Join(err, fmt.Errorf("there is a %s in the folder already", stateName))
	}
	if err := syncFolder(m.Dir); err != nil { // what takes the place of the identity is there before that goes
		return out, err
	}
	// finishedBack reads it there, so it replaces one of an earlier move.
	if err := os.Rename(filepath.Join(m.Dir, identityName), filepath.Join(m.Dir, identityName+movedSuffix)); err != nil {
		return out, err
	}
	return out, syncFolder(m.Dir)
}

// finishedBack is nil if the folder has what was moved into it, and nothing is left to do.
func (m Migration) finishedBack(ctx context.Context, out *Moved) error {
	none := fmt.Errorf("the folder is that of no replica: %w", fs.ErrNotExist)
	b, err := os.ReadFile(filepath.Join(m.Dir, identityName+movedSuffix))
	if errors.Is(err, fs.ErrNotExist) {
		return none
	}
	var was Identity
	if err == nil {
		err = json.Unmarshal(b, &was)
	}
	if err == nil {
		_, err = os.Lstat(filepath.Join(m.Dir, stateName))
	}
	if err != nil {
		return errors.Join(none, err)
	}
	there, _, err := readMoved(ctx, m.Store)
	if err != nil {
		return err
	}
	if was.ID == "" || there.ID != was.ID || there.From != "" {
		return none
	}
	out.Instance, err = Claim(ctx, m.Store, was.ID, 0)
	return err
}

// alone refuses to leave the logs of other replicas behind.
func (m Migration) alone(ctx context.Context, instance uint8) error {
	entries, _, err := m.Store.List(ctx, recordPrefix)
	if err != nil {
		return err
	}
	for _, e := range entries {
		r, err := parseRecord(e)
		if err != nil {
			return err
		}
		issued := r.Journal != nil || slices.ContainsFunc(r.Former, func(f Former) bool { return f.Sequence > 0 })
		if e.Key != recordKey(instance) && issued {
			return fmt.Errorf("replica %s has issued, too, and its log would be lost: state of several replicas stays shared", strings.TrimPrefix(e.Key, recordPrefix))
		}
	}
	return nil
}

// folderEntries are the state as an authority has it that shares it with nobody.
func (m Migration) folderEntries(ctx context.Context, instance uint8) ([]storage.Entry, error) {
	all, _, err := m.Store.List(ctx, "")
	if err != nil {
		return nil, err
	}
	entries, _, err := View(m.Store, instance).entries(all)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(entries, func(e storage.Entry) bool { return e.Key == movedKey }), nil
}

// makeFolder makes state and log under other names, complete and compared.
func (m Migration) makeFolder(ctx context.Context, entries []storage.Entry, log *storage.FileLog, out *Moved) (err error) {
	state, logDir := filepath.Join(m.Dir, stateName+newSuffix), filepath.Join(m.Dir, logName+newSuffix)
	// Of an attempt that did not end: all of it is in the shared state.
	for _, name := range []string{state, logDir, filepath.Join(m.Dir, logName)} {
		if err := os.RemoveAll(name); err != nil {
			return err
		}
	}
	target, err := storage.OpenBolt(state, storage.BoltOptions{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, target.Close()) }()
	for _, e := range entries {
		if _, err := target.Commit(ctx, []storage.Cond{{Key: e.Key}}, []storage.Op{{Key: e.Key, Value: e.Value}}); err != nil {
			return err
		}
		out.Entries++
	}
	if err := copyToFolder(ctx, log, logDir, out.Instance, &out.Files); err != nil {
		return err
	}
	out.Records = log.Head().Sequence
	return syncFolder(m.Dir)
}

// copyToFolder makes a folder that holds a log, compared with it, and counts the files.
func copyToFolder(ctx context.Context, log *storage.FileLog, dir string, instance uint8, files *int) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	err := log.Files(ctx, func(name string, size int64, r io.Reader) error {
		*files++
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		_, err = io.CopyN(f, r, size)
		return errors.Join(err, f.Sync(), f.Close())
	})
	if err != nil {
		return err
	}
	return errors.Join(compareFolder(ctx, log, dir, instance), syncFolder(dir))
}

// compareFolder checks that a folder holds a log.
func compareFolder(ctx context.Context, log *storage.FileLog, dir string, instance uint8) error {
	c, err := storage.OpenLog(dir, storage.LogOptions{Instance: uint32(instance), ReadOnly: true})
	if err != nil {
		return fmt.Errorf("checking the copy of the log: %w", err)
	}
	return errors.Join(sameLog(ctx, log, c), c.Close())
}

// copyFormer copies the logs of the instances that the replica was before the shared state
// was restored to where a folder has those.
func (m Migration) copyFormer(ctx context.Context, out *Moved) error {
	all, err := FormerOf(ctx, m.Store, out.Instance)
	if err != nil {
		return err
	}
	for _, f := range all {
		if f.Dropped {
			continue
		}
		if err := m.copyFormerLog(ctx, f.Instance, out); err != nil {
			return fmt.Errorf("the log of instance %d, which this replica was: %w", f.Instance, err)
		}
	}
	return nil
}

func (m Migration) copyFormerLog(ctx context.Context, instance uint8, out *Moved) (err error) {
	log, err := m.openShared(instance)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it had none, or all of it was pruned
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	above := filepath.Join(m.Dir, retiredName)
	dir := filepath.Join(above, fmt.Sprintf("%03d", instance))
	if _, err := os.Lstat(dir); err == nil {
		// An attempt that did not end has made it; what does not hold that log stays as it is.
		return compareFolder(ctx, log, dir, instance)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Mkdir(above, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := os.RemoveAll(dir + newSuffix); err != nil {
		return err
	}
	if err := copyToFolder(ctx, log, dir+newSuffix, instance, &out.Files); err != nil {
		return err
	}
	if err := os.Rename(dir+newSuffix, dir); err != nil {
		return err
	}
	return syncFolder(above)
}
