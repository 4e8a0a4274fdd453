package ca

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/signet-mesh/signet/ca/journal"
	"github.com/signet-mesh/signet/ca/keys"
)

// An authority's key is made first, then its certificate, and then the journal names both.
// Where the answer to that change was lost, or the process died before it, something is
// left of which the journal is the truth: an intermediate that is published and that nobody
// takes, or a key that the journal does not name.

// strayLife is how much longer than an intermediate lives a key file is kept that the
// journal does not name.
const strayLife = 24 * time.Hour

// doubtfulKeys are those of which nobody knew whether the journal names them. Safe for
// concurrent use.
type doubtfulKeys struct {
	mu      sync.Mutex
	entries []journal.Entry // guarded by mu
}

func (d *doubtfulKeys) add(entries ...journal.Entry) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.entries = append(d.entries, entries...)
}

// take are those that there are; they are not there any more.
func (d *doubtfulKeys) take() (entries []journal.Entry) {
	d.mu.Lock()
	defer d.mu.Unlock()
	entries, d.entries = d.entries, nil
	return entries
}

// tidy takes up what the journal says of changes without an answer. rotationMu is held.
func (a *Authority) tidy(ctx context.Context, now time.Time) error {
	return errors.Join(a.tidyNext(ctx, now), a.tidyKeys(ctx))
}

// tidyKeys removes keys that were in doubt and that the journal does not name. A change
// that is not there when it is read does not come later.
func (a *Authority) tidyKeys(ctx context.Context) error {
	doubtful := a.doubtful.take()
	if len(doubtful) == 0 {
		return nil
	}
	read := a.followJournal
	if !a.cfg.shared() {
		read = func(ctx context.Context) error {
			a.journalMu.Lock()
			defer a.journalMu.Unlock()
			return a.reread(ctx)
		}
	}
	if err := read(ctx); err != nil {
		a.doubtful.add(doubtful...)
		return err
	}
	for _, e := range doubtful {
		if a.names(e.Key) {
			continue
		}
		if err := a.keys.Remove(e.Kind, e.Key); err != nil {
			a.doubtful.add(e)
			return err
		}
		a.cfg.Log.Info("a key is removed whose authority did not come into the journal", "kind", e.Kind)
	}
	return nil
}

// names reports whether the journal, as it is known here, has an authority with a key.
func (a *Authority) names(key string) bool {
	return slices.ContainsFunc(a.current().Authorities, func(e journal.Entry) bool { return e.Key == key })
}

// tidyNext finds an intermediate that is published and that nobody is about to take: it
// is taken in its turn. Others that are published are of no use: they leave the journal,
// and their keys the disk.
func (a *Authority) tidyNext(ctx context.Context, now time.Time) error {
	if s := a.cfg.source(); s == sourceOffline || s == sourceFolder {
		return nil // a series has many
	}
	next := func(e journal.Entry) bool {
		return e.Kind == journal.KindIntermediate && e.State == journal.StateNext
	}
	if !slices.ContainsFunc(a.current().Authorities, next) {
		return nil
	}
	if a.staged.Load() == nil {
		if err := a.restage(now); err != nil {
			return err
		}
	}
	s := a.staged.Load()
	stray := func(e journal.Entry) bool {
		return next(e) && (s == nil || !bytes.Equal(e.Certificate, s.issuer.cert.Raw))
	}
	if !slices.ContainsFunc(a.current().Authorities, stray) {
		return nil
	}
	var gone []journal.Entry
	err := a.edit(ctx, func(j *journal.Journal) error {
		gone = nil // of a former try
		j.Authorities = slices.DeleteFunc(j.Authorities, func(e journal.Entry) bool {
			if stray(e) {
				gone = append(gone, e)
			}
			return stray(e)
		})
		return nil
	})
	if err != nil {
		return fmt.Errorf("taking an intermediate that nobody uses out of the journal: %w", err)
	}
	for _, e := range gone {
		if e.Key == "" || a.names(e.Key) {
			continue
		}
		if err := a.keys.Remove(e.Kind, e.Key); err != nil {
			a.cfg.Log.Warn("a key that signs nothing stays behind", "kind", e.Kind, "err", err)
		}
	}
	a.cfg.Log.Info("intermediates that were published and not used left the journal", "number", len(gone))
	return nil
}

// tidyFiles removes key files of intermediates that the journal does not name, as a
// process leaves one that dies between the two. Whatever was signed for such a key has
// ended by then, so that no journal could name it with reason, an older or newer one put
// back neither. Roots' keys stay: those are for people to remove.
func (a *Authority) tidyFiles() {
	if a.cfg.source() != sourceOwn || a.believed() != nil {
		return
	}
	c := a.intermediate.Load().cert
	life := max(a.cfg.IntermediateTTL, c.NotAfter.Sub(c.NotBefore)) + strayLife
	files, err := a.keys.Files(keys.Intermediate)
	if err != nil {
		a.warn("keys that signed nothing are not looked for", "err", err)
		return
	}
	for _, f := range files {
		if a.clock.past().Sub(f.Modified) < life || a.names(f.URI) {
			continue
		}
		if err := a.keys.Remove(keys.Intermediate, f.URI); err != nil {
			a.warn("a key that signs nothing stays behind", "key", f.URI, "err", err)
			continue
		}
		a.cfg.Log.Info("a key is removed that the journal does not name, and of which whatever it could have signed has ended", "key", f.URI, "made", f.Modified)
	}
}
