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
// intermediates go on, since proxies have what they signed, but for those whose keys have
// gone since the copy was made: there is another one then.
func (a *Authority) rejoin(ctx context.Context, j journal.Journal, revision uint64, former []replica.Former) error {
	var ds []*capb.Decision
	for _, f := range restorations(former) {
		a.cfg.Log.Info("a replica goes on as another instance, in a state that was restored", "instance", a.instance, "was", f.Instance, "records", f.Sequence)
		ds = append(ds, &capb.Decision{What: capb.Decision_WHAT_RESTORED, Instance: uint32(f.Instance), Sequence: f.Sequence, Hash: f.Hash, Reason: f.Reason})
	}
	// Before the key of the log counts, so that no log of a restored state begins without.
	if a.log.Head().Sequence == 0 {
		if err := a.decide(ctx, ds...); err != nil {
			return err
		}
	}
	if _, err := newLogKey(a.keys, &j); err != nil {
		return err
	}
	now, signs := a.clock.read().wall, false
	var own []journal.Entry
	for _, e := range j.Authorities {
		c, err := e.Cert()
		if e.Kind != journal.KindIntermediate || err != nil {
			own = append(own, e) // what cannot be read is not for here
			continue
		}
		missing := false
		if e.Key != "" {
			if missing, err = a.keys.Missing(e.Key); err != nil {
				return err
			}
		}
		switch {
		case c != nil && now.After(c.NotAfter):
			continue // its key may be gone since the copy was made
		case c == nil && missing:
			a.cfg.Log.Warn("a request for an intermediate is given up, whose key has gone since the state was copied", "key", e.Key)
			continue
		case missing:
			// It has had its time since, or somebody has lost the key: it signs no more. What it
			// signed may be valid, for as long as it is itself.
			a.cfg.Log.Warn("an intermediate signs no more, because its key has gone since the state was copied", "serial", journal.ID(c), "key", e.Key, "not_after", c.NotAfter)
			if e.State != journal.StateOld && !e.External {
				e.Leaves = c.NotAfter
			}
			e.State, e.Key = journal.StateOld, ""
		}
		signs = signs || e.State == journal.StateActive
		own = append(own, e)
	}
	j.Authorities = own
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

// restorations are those of what a replica was that no log says yet: the newest of an
// instance with records, which is what was lost, and others after it that came before the
// replica had begun anew.
func restorations(former []replica.Former) []replica.Former {
	for i := len(former) - 1; i > 0; i-- {
		if former[i].Sequence > 0 {
			return former[i:]
		}
	}
	return former
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
		if f.Dropped {
			a.dropped = append(a.dropped, f.Instance)
			continue
		}
		r := a.losses.retired[uint32(f.Instance)]
		log, err := storage.OpenLog(sharedLog(f.Instance), storage.LogOptions{Instance: uint32(f.Instance), FS: a.cfg.Shared.Files, ReadOnly: true, LockTimeout: a.cfg.Shared.LogWait})
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue // it had none, or all of it was pruned
		case err != nil && !r.Retired.IsZero() && a.goesAnyway(r, err):
			a.damaged = append(a.damaged, f.Instance)
			continue
		case err != nil:
			return err
		}
		a.retiredLogs = append(a.retiredLogs, bookLog{log, uint32(f.Instance), r.LogPublicKey})
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
// is older than the retention. That one goes is on record before its first file is removed:
// half of a log is not opened again.
func (a *Authority) pruneFormer(ctx context.Context, now time.Time) error {
	for _, r := range a.losses.retired {
		this := func(instance uint8) bool { return instance == r.Instance }
		if !a.was(r.Instance) && !slices.ContainsFunc(a.damaged, this) || now.Sub(r.Retired) < a.cfg.LogRetention {
			continue
		}
		err := replica.DropFormer(ctx, a.cfg.Shared.Store, a.instance, r.Instance)
		if err == nil {
			a.dropped = append(a.dropped, r.Instance)
			a.damaged = slices.DeleteFunc(a.damaged, this)
			err = a.closeRetired(r.Instance)
		}
		if err != nil {
			return fmt.Errorf("pruning the log of instance %d: %w", r.Instance, err)
		}
		a.cfg.Log.Info("the issuance log of a former instance is not read any more", "instance", r.Instance, "older_than", a.cfg.LogRetention)
	}
	return a.removeDropped(ctx)
}

// removeDropped removes what there is of the logs of former instances that are not read
// any more, until nothing is left.
func (a *Authority) removeDropped(ctx context.Context) error {
	var errs []error
	a.dropped = slices.DeleteFunc(a.dropped, func(instance uint8) bool {
		err := a.removeFormer(ctx, instance)
		if err != nil {
			errs = append(errs, fmt.Errorf("removing the log of instance %d: %w", instance, err))
		}
		return err == nil
	})
	return errors.Join(errs...)
}

func (a *Authority) removeFormer(ctx context.Context, instance uint8) (err error) {
	if err := replica.DropFormer(ctx, a.cfg.Shared.Store, a.instance, instance); err != nil {
		return err
	}
	files, dir := a.cfg.Shared.Files, sharedLog(instance)
	names, err := files.List(dir)
	if err != nil || len(names) == 0 {
		return err
	}
	lock, err := files.Lock(dir, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	for _, name := range names {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := files.Remove(path.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return files.SyncDir(dir)
}
