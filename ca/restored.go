package ca

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/journal"
	"github.com/signet-mesh/signet/ca/replica"
	"github.com/signet-mesh/signet/storage"
)

// rejoin begins a replica's part of a state that was restored from an older copy: as
// another instance, with a key of the log of its own, whose first record says so. Its
// intermediates go on: proxies have what they signed.
func (a *Authority) rejoin(ctx context.Context, j journal.Journal, revision uint64, former replica.Former) error {
	a.cfg.Log.Info("a replica goes on as another instance, in a state that was restored", "instance", a.instance, "was", former.Instance, "records", former.Sequence)
	// Before the key of the log counts, so that no log of a restored state begins without.
	if a.log.Head().Sequence == 0 {
		if err := a.decide(ctx, &capb.Decision{What: capb.Decision_WHAT_RESTORED, Instance: uint32(former.Instance),
			Sequence: former.Sequence, Hash: former.Hash, Reason: former.Reason}); err != nil {
			return err
		}
	}
	if _, err := newLogKey(a.keys, &j); err != nil {
		return err
	}
	// The key of one that has ended may be gone since the copy was made.
	now, signs := a.clock.read().wall, false
	j.Authorities = slices.DeleteFunc(slices.Clone(j.Authorities), func(e journal.Entry) bool {
		c, err := e.Cert()
		if e.Kind != journal.KindIntermediate || err != nil || c == nil {
			return false // what cannot be read is not for here
		}
		ended := now.After(c.NotAfter)
		signs = signs || !ended && e.State == journal.StateActive
		return ended
	})
	if _, waits := j.Request(); !signs && !waits {
		entries, err := a.ownIntermediates(ctx, j)
		if err != nil {
			return err
		}
		j.Authorities = append(j.Authorities, entries...)
	}
	_, err := j.Commit(ctx, a.store, revision)
	return err
}

// openFormer opens the logs of the instances that this replica was, until Close. They are
// in the shared state, and only this replica reads them.
func (a *Authority) openFormer(ctx context.Context) error {
	if !a.cfg.shared() {
		return nil
	}
	all, err := replica.FormerOf(ctx, a.cfg.Shared.Store, a.instance)
	if err != nil {
		return fmt.Errorf("reading which instances this replica was: %w", err)
	}
	for _, f := range all {
		log, err := storage.OpenLog(sharedLog(f.Instance), storage.LogOptions{Instance: uint32(f.Instance), FS: a.cfg.Shared.Files, ReadOnly: true, LockTimeout: a.cfg.Shared.LogWait})
		if errors.Is(err, fs.ErrNotExist) {
			continue // it had none, or all of it was pruned
		}
		if err != nil {
			return err
		}
		a.retiredLogs = append(a.retiredLogs, bookLog{log, uint32(f.Instance), a.losses.retired[uint32(f.Instance)].LogPublicKey})
	}
	return nil
}

// was reports whether this replica was an instance whose log it has.
func (a *Authority) was(instance byte) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.cfg.shared() && slices.ContainsFunc(a.retiredLogs, func(l bookLog) bool { return l.instance == uint32(instance) })
}

// pruneFormer removes the logs of instances that this replica was when all that they did
// is older than the retention.
func (a *Authority) pruneFormer(now time.Time) error {
	for _, r := range a.losses.retired {
		if !a.was(r.Instance) || now.Sub(r.Retired) < a.cfg.LogRetention {
			continue
		}
		if err := a.dropFormer(r.Instance); err != nil {
			return fmt.Errorf("pruning the log of instance %d: %w", r.Instance, err)
		}
		a.cfg.Log.Info("the issuance log of a former instance is gone", "instance", r.Instance, "older_than", a.cfg.LogRetention)
	}
	return nil
}

func (a *Authority) dropFormer(instance uint8) (err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	i := slices.IndexFunc(a.retiredLogs, func(l bookLog) bool { return l.instance == uint32(instance) })
	if err := a.retiredLogs[i].Close(); err != nil {
		return err
	}
	a.retiredLogs = slices.Delete(slices.Clone(a.retiredLogs), i, i+1)
	files, dir := a.cfg.Shared.Files, sharedLog(instance)
	lock, err := files.Lock(dir, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	names, err := files.List(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := files.Remove(path.Join(dir, name)); err != nil {
			return err
		}
	}
	return nil
}
