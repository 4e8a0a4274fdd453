package ca

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/journal"
	"github.com/signet-mesh/signet/ca/keys"
	"github.com/signet-mesh/signet/storage"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// retiredName is the folder, in the authority's, with the logs of instances that
// this authority was before it was restored, each in a folder of its number.
const retiredName = "retired"

func retiredDir(dir string, instance uint8) string {
	return filepath.Join(dir, retiredName, fmt.Sprintf("%03d", instance))
}

// book is an authority's state and logs as they are at one moment, to be read.
type book struct {
	journal journal.Journal
	entries []storage.Entry
	logs    []bookLog // in the order in which they were written
	lost    *lostHead
}

type bookLog struct {
	*storage.FileLog
	instance uint32
	key      []byte // SubjectPublicKeyInfo of the key that signed its heads
}

// Folder is the folder of an authority that no process serves, opened to read it.
// Nothing is changed, and no key is needed.
type Folder struct{ book }

// OpenFolder opens the authority in dataDir. It fails with storage.ErrLocked while
// a process serves it: ask that process then.
func OpenFolder(dataDir string) (*Folder, error) {
	f, err := openFolder(filepath.Join(dataDir, FolderName))
	if err != nil {
		return nil, fmt.Errorf("opening the authority in %s: %w", dataDir, err)
	}
	return f, nil
}

func openFolder(dir string) (*Folder, error) {
	entries, _, err := storage.ReadBolt(filepath.Join(dir, stateName), 0)
	if err != nil {
		return nil, err
	}
	f := &Folder{}
	if f.book, err = newBook(entries); err != nil {
		return nil, err
	}
	err = f.addRetired(dir, func(retired, error) bool { return false })
	if err == nil {
		var log *storage.FileLog
		log, err = storage.OpenLog(filepath.Join(dir, logName), storage.LogOptions{Instance: uint32(f.journal.Instance), ReadOnly: true})
		if err == nil {
			f.logs = append(f.logs, bookLog{log, uint32(f.journal.Instance), f.journal.LogPublicKey})
		}
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// Close ends the reading.
func (f *Folder) Close() error { return closeLogs(f.logs) }

func closeLogs(logs []bookLog) error {
	var errs []error
	for _, l := range logs {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// newBook reads the journal among the entries of a store.
func newBook(entries []storage.Entry) (book, error) {
	b := book{entries: entries}
	i := slices.IndexFunc(entries, func(e storage.Entry) bool { return e.Key == journal.Key })
	if i < 0 {
		return book{}, errors.New("the store holds no journal: it is not that of an authority")
	}
	var err error
	b.journal, err = journal.Parse(entries[i].Value)
	return b, err
}

// addRetired opens the logs of retired instances that are there, oldest first. One that
// cannot be read is left out if without allows that.
func (b *book) addRetired(dir string, without func(retired, error) bool) error {
	var all []retired
	for _, e := range b.entries {
		if len(e.Key) > len(instancePrefix) && e.Key[:len(instancePrefix)] == instancePrefix {
			r, err := parseRetired(e)
			if err != nil {
				return err
			}
			all = append(all, r)
		}
	}
	slices.SortFunc(all, func(a, b retired) int { return a.Retired.Compare(b.Retired) })
	for _, r := range all {
		log, err := storage.OpenLog(retiredDir(dir, r.Instance), storage.LogOptions{Instance: uint32(r.Instance), ReadOnly: true})
		if errors.Is(err, fs.ErrNotExist) {
			continue // all of it was pruned
		}
		if err != nil && without(r, err) {
			continue
		}
		if err != nil {
			return err
		}
		b.logs = append(b.logs, bookLog{log, uint32(r.Instance), r.LogPublicKey})
	}
	return nil
}

// read is the book of an authority that runs. The logs are the authority's own: it
// closes them.
func (a *Authority) read(ctx context.Context) (book, error) {
	entries, _, err := a.store.List(ctx, "")
	if err != nil {
		return book{}, err
	}
	b, err := newBook(entries)
	if err != nil {
		return book{}, err
	}
	a.mu.Lock()
	b.logs = slices.Clone(a.retiredLogs)
	a.mu.Unlock()
	b.logs = append(b.logs, bookLog{a.log, uint32(a.instance), b.journal.LogPublicKey})
	b.lost = a.losses.now.Load()
	return b, nil
}

// openRetired opens the logs of retired instances, until Close.
func (a *Authority) openRetired(ctx context.Context) error {
	entries, _, err := a.store.List(ctx, instancePrefix)
	if err != nil {
		return fmt.Errorf("reading retired instances: %w", err)
	}
	if err := a.removeGone(); err != nil {
		a.cfg.Log.Warn("what is left of the log of a retired instance stays for now", "err", err)
	}
	b := book{entries: entries}
	err = b.addRetired(filepath.Join(a.cfg.DataDir, FolderName), a.goesAnyway)
	a.retiredLogs = b.logs
	return err
}

// goesAnyway reports whether a log of a retired instance that cannot be read is older than
// the retention: somebody may have begun to remove it. Whoever could damage it could also
// have removed it whole.
func (a *Authority) goesAnyway(r retired, err error) bool {
	if !errors.Is(err, storage.ErrCorrupt) || a.cfg.LogRetention == 0 || a.clock.latest().Sub(r.Retired) < a.cfg.LogRetention {
		return false
	}
	a.cfg.Log.Warn("the log of a retired instance is damaged, and older than the retention: it is not read, and goes", "instance", r.Instance, "err", err)
	return true
}

// goneSuffix is in the name of a retired log that is being removed.
const goneSuffix = ".gone"

// closeRetired closes the log of a retired instance, which is not read any more.
func (a *Authority) closeRetired(instance uint8) error {
	a.mu.Lock()
	i := slices.IndexFunc(a.retiredLogs, func(l bookLog) bool { return l.instance == uint32(instance) })
	if i < 0 {
		a.mu.Unlock()
		return nil // it could not be opened
	}
	l := a.retiredLogs[i]
	a.retiredLogs = slices.Delete(slices.Clone(a.retiredLogs), i, i+1)
	a.mu.Unlock()
	return l.Close()
}

// dropRetired closes the log of a retired instance and removes it. It has another name
// before the first file goes: half of a log is not to be found under its own.
func (a *Authority) dropRetired(instance uint8) error {
	if err := a.closeRetired(instance); err != nil {
		return err
	}
	dir := retiredDir(filepath.Join(a.cfg.DataDir, FolderName), instance)
	if err := os.Rename(dir, dir+goneSuffix); err != nil {
		return err
	}
	if err := keys.SyncFolder(filepath.Dir(dir)); err != nil {
		return err
	}
	return a.removeGone()
}

// removeGone removes what is left of retired logs whose removal began.
func (a *Authority) removeGone() error {
	dir := filepath.Join(a.cfg.DataDir, FolderName, retiredName)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), goneSuffix) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return err
}

// Records yields the records that are asked for, oldest first, those of retired
// instances before. An error comes last.
func (b book) Records(ctx context.Context, q *capb.ListLogRequest) iter.Seq2[*capb.LogEntry, error] {
	return func(yield func(*capb.LogEntry, error) bool) {
		sent := uint64(0)
		for i, l := range b.logs {
			from := uint64(1)
			if q.GetFrom() > 0 {
				if i < len(b.logs)-1 {
					continue // the number is of the present log
				}
				from = q.GetFrom()
			}
			if t := q.GetSince(); t != nil {
				from = max(from, l.Since(t.AsTime()))
			}
			for r, err := range l.Scan(ctx, from) {
				if err != nil {
					yield(nil, err)
					return
				}
				if t := q.GetUntil(); t != nil && r.Time.After(t.AsTime()) {
					break
				}
				e := &capb.LogEntry{Instance: l.instance, Sequence: r.Sequence, Time: timestamppb.New(r.Time), Record: &capb.IssuanceRecord{}}
				if err := proto.Unmarshal(r.Data, e.Record); err != nil {
					yield(nil, fmt.Errorf("record %d of instance %d: %w", r.Sequence, l.instance, err))
					return
				}
				if !asked(q, r.Time, e.Record) {
					continue
				}
				if !yield(e, nil) {
					return
				}
				if sent++; q.GetLimit() > 0 && sent == q.GetLimit() {
					return
				}
			}
		}
	}
}

// asked reports whether a record is one that q asks for.
func asked(q *capb.ListLogRequest, at time.Time, r *capb.IssuanceRecord) bool {
	return (q.GetSince() == nil || !at.Before(q.GetSince().AsTime())) &&
		(q.GetSpiffeId() == "" || q.GetSpiffeId() == r.GetSpiffeId()) &&
		(q.GetNode() == "" || q.GetNode() == r.GetNode()) &&
		(q.GetPodUid() == "" || q.GetPodUid() == r.GetPodUid()) &&
		(len(q.GetSerial()) == 0 || string(q.GetSerial()) == string(r.GetSerial())) &&
		(len(q.GetKeyHash()) == 0 || string(q.GetKeyHash()) == string(r.GetKeyHash()))
}

// Head is the newest signed head of the present log, to be kept elsewhere; ok is
// false if there is none.
func (b book) Head() (h *capb.LogHead, ok bool) {
	s, ok := b.logs[len(b.logs)-1].SignedHead()
	if !ok {
		return nil, false
	}
	return headToProto(s), true
}
