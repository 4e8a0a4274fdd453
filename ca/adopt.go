package ca

import (
	"bytes"
	"context"
	"crypto/x509"
	"fmt"
	"slices"

	"github.com/signet-mesh/signet/ca/journal"
	"github.com/signet-mesh/signet/ca/rotation"
)

// A change of the journal can be made and be reported as failed: the answer of the store was
// lost and it could not be read again, or others had changed the journal by then, so that
// it was not the one that had been written. Whoever made the change was told so and left
// what is in memory as it was. The journal that is read later is the truth.

// adopt makes what the journal says is active what signs here. rotationMu is held.
func (a *Authority) adopt(ctx context.Context) error {
	if err := a.adoptRoot(); err != nil {
		return err
	}
	return a.adoptIntermediate(ctx)
}

// adoptIntermediate makes the active intermediate of the journal the one that signs here.
// Until the root of the former one is sure to stay for as long as what that has signed
// meanwhile, the former one goes on. rotationMu is held.
func (a *Authority) adoptIntermediate(ctx context.Context) error {
	j, before := a.current(), a.intermediate.Load()
	i := slices.IndexFunc(j.Authorities, func(e journal.Entry) bool {
		return e.Kind == journal.KindIntermediate && e.State == journal.StateActive && e.Key != "" // a folder's key is there, and it is taken again
	})
	if i < 0 || before == nil || bytes.Equal(before.cert.Raw, j.Authorities[i].Certificate) {
		return nil
	}
	iss, root, err := a.openIntermediate(j, j.Authorities[i])
	if err != nil {
		return fmt.Errorf("opening the intermediate that the journal says is active: %w", err)
	}
	if root == nil {
		return nil // another replica has taken it out of the bundle, and another intermediate is due
	}
	if err := a.signedUntilNow(ctx, before); err != nil {
		return fmt.Errorf("intermediate %s is active by the journal, and %s goes on until the journal says how long its leaves are valid: %w", journal.ID(iss.cert), journal.ID(before.cert), err)
	}
	a.intermediate.Store(iss)
	if s := a.staged.Load(); s != nil && s.issuer.cert.Equal(iss.cert) {
		a.staged.Store(nil)
	}
	a.cfg.Log.Warn("the journal has another intermediate than the one that signed here, whose change was reported as failed; it signs from now on",
		"serial", journal.ID(iss.cert), "former", journal.ID(before.cert), "not_after", iss.cert.NotAfter)
	if a.cfg.source() == sourceOwn {
		return nil // adoptRoot has its root
	}
	a.root.Store(&issuer{cert: root})
	return a.renewServing(ctx)
}

// openIntermediate is an entry with its key, and the root that it leads to; nil if that is
// not in the journal.
func (a *Authority) openIntermediate(j journal.Journal, e journal.Entry) (*issuer, *x509.Certificate, error) {
	pub, err := e.Public()
	if err != nil {
		return nil, nil, err
	}
	roots, err := j.Roots()
	if err != nil {
		return nil, nil, err
	}
	key, err := a.keys.Open(e.Kind, e.Key, pub)
	if err != nil {
		return nil, nil, err
	}
	iss, err := issuerOf(e, key)
	if err != nil {
		return nil, nil, err
	}
	root, err := leadsTo(iss, roots)
	if err != nil {
		return iss, nil, nil // not an error here: see the caller
	}
	return iss, root, nil
}

// signedUntilNow has the journal say how long what is below an intermediate is valid that
// signed here after the journal had retired it, so that its root does not leave before.
func (a *Authority) signedUntilNow(ctx context.Context, iss *issuer) error {
	now := a.clock.latest()
	if a.cfg.source() == sourceOwn {
		id, v := journal.ID(iss.cert), rotation.View{Now: now, Rules: a.cfg.rules()}
		s, err := a.rotationState()
		if err != nil {
			return err
		}
		if _, longer := s.Signed(id, v); !longer {
			return nil
		}
		return a.rotate(ctx, func(s rotation.State) (rotation.State, error) { s, _ = s.Signed(id, v); return s, nil })
	}
	root, err := a.rootOf(iss, a.current())
	if err != nil {
		return nil // it has left, and nothing brings it back
	}
	until := earlier(now.Add(a.cfg.SVID.MaxTTL), root.NotAfter)
	lasts := func(e journal.Entry) bool {
		return e.Kind != journal.KindRoot || e.State != journal.StateOld || !bytes.Equal(e.Certificate, root.Raw) || !e.Until.Before(until)
	}
	if !slices.ContainsFunc(a.current().Authorities, func(e journal.Entry) bool { return !lasts(e) }) {
		return nil
	}
	return a.edit(ctx, func(j *journal.Journal) error {
		for i, e := range j.Authorities {
			if !lasts(e) {
				j.Authorities[i].Until = until
			}
		}
		return nil
	})
}
