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
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/journal"
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
	err = f.addRetired(dir)
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

// addRetired opens the logs of retired instances that are there, oldest first.
func (b *book) addRetired(dir string) error {
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
		d := retiredDir(dir, r.Instance)
		if _, err := os.Stat(d); errors.Is(err, fs.ErrNotExist) {
			continue // all of it was pruned
		}
		log, err := storage.OpenLog(d, storage.LogOptions{Instance: uint32(r.Instance), ReadOnly: true})
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
	b := book{entries: entries}
	err = b.addRetired(filepath.Join(a.cfg.DataDir, FolderName))
	a.retiredLogs = b.logs
	return err
}

// dropRetired closes the log of a retired instance and removes it.
func (a *Authority) dropRetired(instance uint8) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	var errs []error
	a.retiredLogs = slices.DeleteFunc(a.retiredLogs, func(l bookLog) bool {
		if l.instance != uint32(instance) {
			return false
		}
		errs = append(errs, l.Close())
		return true
	})
	return errors.Join(append(errs, os.RemoveAll(retiredDir(filepath.Join(a.cfg.DataDir, FolderName), instance)))...)
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
