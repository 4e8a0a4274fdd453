package ca

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/signet-mesh/signet/ca/journal"
	"github.com/signet-mesh/signet/identity"
)

// changeTrust changes the journal in a way that those who trust it must learn of:
// durably, under a new sequence number, with lists of that number where lists are
// published. One change at a time, so that a sequence means one state.
func (a *Authority) changeTrust(ctx context.Context, f func(j *journal.Journal) error) error {
	a.trustMu.Lock()
	defer a.trustMu.Unlock()
	err := a.edit(ctx, func(j *journal.Journal) error {
		if err := f(j); err != nil {
			return err
		}
		j.Sequence++
		return nil
	})
	if err != nil {
		return err
	}
	return a.changed(ctx)
}

// changed publishes what a change of the journal made of trust. trustMu is held.
func (a *Authority) changed(ctx context.Context) error {
	if a.cfg.shared() {
		a.fails("crl", a.lists.failure()) // of edit, which has signed them
	} else if a.cfg.CRL.Enabled {
		// The roots go out in any case; the former lists are good for a while.
		a.fails("crl", a.signLists(ctx))
	}
	return a.publishTrust()
}

// publishTrust makes the journal's roots, and the lists, the ones that are trusted, as
// far as there are any.
// trustMu is held, or nobody else runs yet.
func (a *Authority) publishTrust() error {
	a.journalMu.Lock()
	j, lists := a.journal, a.lists.all()
	a.journalMu.Unlock()
	roots, err := j.Roots()
	if err != nil {
		return err
	}
	t, err := identity.NewTrust(j.Sequence, a.cfg.TrustDomain, roots)
	// Replicas say the same of a sequence, whether they sign lists themselves or not.
	if err == nil && (a.cfg.CRL.Enabled || a.cfg.shared()) {
		t, err = t.WithCRLs(lists)
	}
	if err != nil {
		return err
	}
	tainted, err := j.Tainted()
	if err != nil {
		return err
	}
	a.trust.Store(t.WithTainted(tainted, a.cfg.TaintSpread))
	return nil
}

// settle takes a staged intermediate when every agent has acknowledged its root, and
// those who do not acknowledge had their time; or when the present one is about to
// end.
func (a *Authority) settle(ctx context.Context, now time.Time) error {
	a.rotationMu.Lock()
	defer a.rotationMu.Unlock()
	if err := a.adopt(ctx); err != nil {
		return fmt.Errorf("taking the next intermediate: %w", err)
	}
	if err := a.tidy(ctx, now); err != nil {
		return err
	}
	s := a.staged.Load()
	if s == nil {
		return nil
	}
	sequence, listed := a.listed(s)
	missing := a.behind(sequence, now)
	left := a.intermediate.Load().cert.NotAfter.Sub(now)
	late := left < a.cfg.SVID.TTL
	if !late && (!listed || len(missing) > 0 || now.Sub(s.since) < a.cfg.Propagation) {
		return nil
	}
	if late && len(missing) > 0 {
		a.cfg.Log.Error("the next intermediate is used although not all agents have what belongs to it: the present one ends", "left", left, "nodes", strings.Join(missing, " "))
	}
	if err := a.settled(ctx, s); err != nil {
		return fmt.Errorf("taking the next intermediate: %w", err)
	}
	return nil
}

// errNoneDue ends a change of the journal that would change nothing.
var errNoneDue = errors.New("nothing is due")

// dropRoots takes roots out of the bundle when no leaf under them can be valid, and no
// replica goes on signing under them: each has its own file of an upstream's roots, and its
// own time to renew.
func (a *Authority) dropRoots(ctx context.Context, now time.Time) error {
	over := func(e journal.Entry) bool {
		return e.Kind == journal.KindRoot && e.State == journal.StateOld && !e.Until.IsZero() && now.After(e.Until)
	}
	j := a.current()
	if !slices.ContainsFunc(j.Authorities, over) {
		return nil
	}
	// Of the journal that is changed, so that no replica takes an intermediate meanwhile.
	drop := func(j *journal.Journal) error {
		var stay []*x509.Certificate
		for _, e := range j.Authorities {
			if e.Kind != journal.KindRoot || over(e) {
				continue
			}
			c, err := e.Cert()
			if err != nil {
				return err
			}
			stay = append(stay, c)
		}
		kept := make([]journal.Entry, 0, len(j.Authorities))
		for _, e := range j.Authorities {
			needed := true
			if over(e) {
				c, err := e.Cert()
				if err == nil {
					needed, err = j.Needs(c, stay, now, journal.StateActive, journal.StateNext)
				}
				if err != nil {
					return err
				}
			}
			if needed {
				kept = append(kept, e)
			}
		}
		if len(kept) == len(j.Authorities) {
			return errNoneDue
		}
		j.Authorities = kept
		return nil
	}
	err := drop(&j) // of a copy: most often nothing is to be changed
	if err == nil {
		err = a.changeTrust(ctx, drop)
	}
	if errors.Is(err, errNoneDue) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("taking an old root out of the bundle: %w", err)
	}
	a.cfg.Log.Info("an old root left the bundle", "sequence", a.current().Sequence)
	return nil
}
