package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/signet-mesh/signet/ca/external"
	"github.com/signet-mesh/signet/ca/journal"
	"github.com/signet-mesh/signet/ca/revocation"
	"github.com/signet-mesh/signet/storage"
)

// Who signs the intermediates.
const (
	sourceOwn      = ""
	sourceOffline  = "offline"
	sourceFolder   = "cacerts"
	sourceUpstream = "upstream"
)

var sourceNames = map[string]string{
	sourceOwn:      "its own root",
	sourceOffline:  "an offline root (authority.offlineRoot)",
	sourceFolder:   "whoever fills authority.cacerts",
	sourceUpstream: "an upstream (authority.upstream.exec)",
}

func (c Config) source() string {
	switch {
	case c.OfflineRoot:
		return sourceOffline
	case c.Cacerts != "":
		return sourceFolder
	case len(c.Upstream.Exec) > 0:
		return sourceUpstream
	}
	return sourceOwn
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// staged is an issuer whose root is published and not yet trusted by everybody.
type staged struct {
	issuer   *issuer
	entry    journal.Entry
	root     *x509.Certificate
	roots    []*x509.Certificate // that stay
	sequence uint64              // of the trust that has the root
	list     uint64              // number of its first list; 0: none is needed, or there is none yet
	since    time.Time
	hash     [32]byte // of the folder that it is from
}

// current is the journal as it is.
func (a *Authority) current() journal.Journal {
	a.journalMu.Lock()
	defer a.journalMu.Unlock()
	return a.journal
}

// edit changes the journal, durably or not at all. f works on a copy. Where replicas
// share it, that is a copy of what they have now, and whoever raises the sequence signs
// its lists under that with the same commit.
func (a *Authority) edit(ctx context.Context, f func(j *journal.Journal) error) error {
	a.journalMu.Lock()
	defer a.journalMu.Unlock()
	if a.cfg.shared() {
		if err := a.reread(ctx); err != nil {
			return err
		}
	}
	for {
		next := a.journal
		next.Authorities = slices.Clone(next.Authorities)
		err := f(&next)
		if err != nil {
			return err
		}
		next.Version = journal.Version
		var signed signedLists
		if a.cfg.shared() && next.Sequence != a.journal.Sequence {
			// The roots go out in any case; the former lists are good for a while.
			signed, err = a.makeLists(next, true)
			a.lists.failed(err, time.Now())
		}
		revision, err := next.Commit(ctx, a.store, a.journalRevision, signed.ops...)
		if err == nil {
			a.setJournal(next, revision)
			if signed.by != nil {
				a.lists.store(signed.by)
			}
			return nil
		}
		// Another replica was first, or nobody knows whether this change has happened:
		// what is stored decides. A change that was not made is made on that.
		conflict := a.cfg.shared() && errors.Is(err, storage.ErrConflict)
		if !conflict && !errors.Is(err, storage.ErrUnknown) {
			return err
		}
		if rereadErr := a.reread(ctx); rereadErr != nil {
			return errors.Join(err, rereadErr)
		}
		if !conflict {
			return a.happened(next, err)
		}
	}
}

// setJournal replaces the journal in memory. journalMu is held.
func (a *Authority) setJournal(j journal.Journal, revision uint64) {
	a.journal, a.journalRevision = j, revision
	a.journalReads++
	a.clock.ends(j.End())
}

// happened is nil if the journal that was read again is the one that was to be written.
func (a *Authority) happened(next journal.Journal, err error) error {
	next.Others, next.Instance = a.journal.Others, a.journal.Instance
	wrote, wroteErr := json.Marshal(next)
	found, foundErr := json.Marshal(a.journal)
	if wroteErr == nil && foundErr == nil && bytes.Equal(wrote, found) {
		return nil
	}
	return err
}

// firstAuthorities are those that a new authority begins with.
func (a *Authority) firstAuthorities(ctx context.Context, source string) ([]journal.Entry, error) {
	switch source {
	case sourceOffline:
		return nil, nil // Request adds to it
	case sourceFolder:
		f, _, err := a.readFolder()
		if err != nil {
			return nil, err
		}
		return append(journal.RootEntries(f.Roots), folderEntry(f.Issuer)), nil
	case sourceUpstream:
		roots, err := external.ReadRoots(a.cfg.Upstream.RootFile)
		if err != nil {
			return nil, fmt.Errorf("authority.upstream.rootFile: %w", err)
		}
		_, _, entry, err := a.askUpstream(ctx, roots)
		return append(journal.RootEntries(roots), entry), err
	}
	return a.firstRoot(ctx)
}

// loadAuthorities makes issuers of the journal.
func (a *Authority) loadAuthorities(ctx context.Context) error {
	j := a.journal
	roots, err := j.Roots()
	if err != nil {
		return err
	}
	if len(roots) == 0 && j.Source == sourceOffline {
		return errors.New("no intermediate was imported yet: have the requests signed that `signet-ca authority csr` printed, then run `signet-ca authority import`")
	}
	if err := a.publishTrust(); err != nil {
		return err
	}
	for _, e := range j.Authorities {
		if e.State != journal.StateActive || e.Key == "" {
			continue
		}
		pub, err := e.Public()
		if err != nil {
			return err
		}
		if e.Kind == journal.KindRoot && !a.holdsRoot() {
			c, err := e.Cert()
			if err != nil {
				return err
			}
			a.root.Store(&issuer{cert: c})
			continue
		}
		key, err := a.keys.Open(e.Kind, e.Key, pub)
		if err != nil {
			return err
		}
		iss, err := issuerOf(e, key)
		if err != nil {
			return err
		}
		if e.Kind == journal.KindRoot {
			a.root.Store(iss)
		} else {
			a.intermediate.Store(iss)
		}
	}
	if j.Source == sourceFolder {
		return a.loadFolder(ctx)
	}
	now, clockErr := a.clock.now()
	if clockErr != nil {
		now = a.clock.past() // nothing is replaced; it waits for the clock, or for an operator
	}
	if a.intermediate.Load() == nil && j.Source == sourceOffline {
		if clockErr != nil {
			return a.believed()
		}
		return a.advance(ctx, now)
	}
	if err := a.restage(now); err != nil {
		return err
	}
	if !a.holdsRoot() {
		return a.awaitIntermediate(ctx)
	}
	if a.intermediate.Load() == nil || j.Source == sourceOwn && a.root.Load() == nil {
		return errors.New("journal: there is no active root or no active intermediate; restore the store from backup")
	}
	if j.Source != sourceOwn {
		if err := a.findRoot(a.intermediate.Load(), roots); err != nil {
			if j.Source != sourceUpstream || clockErr != nil {
				return err
			}
			return a.replaceOrphan(ctx)
		}
	}
	if clockErr != nil {
		return nil
	}
	if j.Source == sourceOwn && !now.Before(a.root.Load().cert.NotAfter) {
		return a.replaceExpiredRoot(ctx)
	}
	// An intermediate that expired while the authority was down, or whose root others took
	// out of the bundle, is replaced before anything is served; one that is due is left to
	// Run.
	if (!now.Before(a.intermediate.Load().cert.NotAfter) || a.orphaned()) && a.signing() == nil {
		return a.renewIntermediate(ctx)
	}
	return nil
}

// orphaned reports whether the intermediate is below a root that is not trusted any more,
// because another replica took it out of the bundle: what it signed would verify nowhere, so
// that it is as good as none.
func (a *Authority) orphaned() bool {
	iss := a.intermediate.Load()
	if iss == nil {
		return false
	}
	_, err := a.rootOf(iss, a.current())
	return err != nil
}

// replaceOrphan has an upstream sign another intermediate in the place of one whose root has
// left the bundle. It is used at once: the present one is good for nothing. Nobody else runs
// yet.
func (a *Authority) replaceOrphan(ctx context.Context) error {
	if a.staged.Load() == nil {
		if err := a.renewIntermediate(ctx); err != nil {
			return err
		}
	}
	if s := a.staged.Load(); s != nil && a.orphaned() {
		return a.settled(ctx, s)
	}
	return nil
}

// findRoot notes which root an issuer leads to.
func (a *Authority) findRoot(iss *issuer, roots []*x509.Certificate) error {
	r, err := leadsTo(iss, roots)
	if err == nil {
		a.root.Store(&issuer{cert: r})
	}
	return err
}

func (a *Authority) rootOf(iss *issuer, j journal.Journal) (*x509.Certificate, error) {
	roots, err := j.Roots()
	if err != nil {
		return nil, err
	}
	return leadsTo(iss, roots)
}

// leadsTo is the one of roots that an issuer leads to.
func leadsTo(iss *issuer, roots []*x509.Certificate) (*x509.Certificate, error) {
	last := iss.cert
	if n := len(iss.chain); n > 0 {
		last = iss.chain[n-1]
	}
	for _, r := range roots {
		if last.Equal(r) || last.CheckSignatureFrom(r) == nil {
			return r, nil
		}
	}
	return nil, fmt.Errorf("journal: no root in it signed %s: that root has left the bundle, or this is another authority's state", last.Subject)
}

// renewIntermediate replaces the intermediate under a root that every agent trusts
// already, so that nobody has to be waited for.
func (a *Authority) renewIntermediate(ctx context.Context) error {
	var err error
	switch a.cfg.source() {
	case sourceOwn:
		err = a.renewOwn(ctx)
	case sourceOffline:
		err = a.advance(ctx, time.Now().Round(0))
	case sourceUpstream:
		err = a.renewUpstream(ctx)
	case sourceFolder:
		if c := a.intermediate.Load().cert; !time.Now().Before(c.NotAfter) {
			err = fmt.Errorf("the issuer in %s expired at %s: replace it", a.cfg.Cacerts, c.NotAfter.Format(time.RFC3339))
		}
	}
	if err != nil {
		return fmt.Errorf("renewing the intermediate: %w", err)
	}
	return nil
}

func (a *Authority) renewOwn(ctx context.Context) error {
	root := a.root.Load()
	if root == nil {
		return errors.New("journal: there is no active root")
	}
	present, end := a.intermediate.Load().cert, root.cert.NotAfter
	below := bytes.Equal(present.AuthorityKeyId, root.cert.SubjectKeyId) // most often, and asked again and again
	if !present.NotAfter.Before(end) && (below || !a.orphaned()) {
		// Another intermediate would end no later: it gains nothing.
		return fmt.Errorf("the root ends at %s, no later than the intermediate: it is replaced first (`signet ca authority list`)", end.Format(time.RFC3339))
	}
	if !a.holdsRoot() {
		return a.askRoot(ctx)
	}
	err := a.useBelow(ctx, root)
	if !errors.Is(err, errOtherRoot) {
		return err
	}
	if err := a.adoptRoot(); err != nil {
		return err
	}
	if root = a.root.Load(); root.key == nil {
		return err
	}
	return a.useBelow(ctx, root)
}

// useBelow makes an intermediate below a root, and the active one of that.
func (a *Authority) useBelow(ctx context.Context, root *issuer) error {
	iss, entry, err := a.newAuthority(ctx, root)
	if err != nil {
		return err
	}
	return a.use(ctx, &staged{issuer: iss, entry: entry, root: root.cert})
}

// take makes an intermediate the active one: in the journal, and then here.
// Intermediates that have expired leave the journal, and their keys the disk. roots,
// if there are any, are those that stay trusted; others leave when no leaf under them
// can be valid any more. The entry replaces a former one of the same key.
func (a *Authority) take(ctx context.Context, iss *issuer, entry journal.Entry, roots []*x509.Certificate) error {
	if a.cfg.source() == sourceOwn {
		return a.succeed(ctx, iss, entry)
	}
	var gone []string
	now := a.clock.past() // a key that is removed does not come back
	// Leaves are valid that long; clocks of replicas are not quite the same.
	leaves := now.Add(a.cfg.SVID.MaxTTL + a.cfg.SVID.Backdate)
	err := a.edit(ctx, func(j *journal.Journal) error {
		present, err := j.Roots()
		if err != nil {
			return err
		}
		if a.cfg.shared() && len(present) > 0 {
			if _, err := leadsTo(iss, present); err != nil {
				return err // another replica took it out of the bundle a moment ago
			}
		}
		signed := slices.DeleteFunc(slices.Clone(j.Authorities), func(e journal.Entry) bool {
			return e.Kind != journal.KindIntermediate || e.State != journal.StateActive
		})
		var next []journal.Entry
		for _, e := range j.Authorities {
			c, err := e.Cert()
			if err != nil {
				return err
			}
			switch {
			case entry.Key != "" && e.Key == entry.Key:
				continue
			case e.Kind == journal.KindRoot && roots != nil && e.State == journal.StateActive && !slices.ContainsFunc(roots, c.Equal):
				e.State, e.Until = journal.StateOld, earlier(leaves, c.NotAfter)
			case e.Kind == journal.KindRoot && roots != nil && e.State == journal.StateOld && !slices.ContainsFunc(roots, c.Equal):
				// Another replica has left it before, and this one does now.
				for _, m := range signed {
					below, err := m.LeadsTo(c)
					if err != nil {
						return err
					}
					if until := earlier(leaves, c.NotAfter); below && !e.Until.IsZero() && e.Until.Before(until) {
						e.Until = until
					}
				}
			case e.Kind == journal.KindRoot && roots != nil && slices.ContainsFunc(roots, c.Equal):
				e.State, e.Until = journal.StateActive, time.Time{}
			case e.Kind == journal.KindIntermediate && c != nil && now.After(c.NotAfter), e.Kind == journal.KindIntermediate && c != nil && e.Key == "":
				if e.Key != "" {
					gone = append(gone, e.Key)
				}
				continue
			case e.Kind == journal.KindIntermediate && e.State == journal.StateActive:
				e.State = journal.StateOld
			}
			next = append(next, e)
		}
		entry.State = journal.StateActive
		j.Authorities = append(next, entry)
		return nil
	})
	if err != nil {
		return a.dropKey(entry, err)
	}
	a.intermediate.Store(iss)
	a.cfg.Log.Info("intermediate renewed", "serial", fmt.Sprintf("%x", iss.cert.SerialNumber), "not_after", iss.cert.NotAfter)
	for _, uri := range gone {
		if err := a.keys.Remove(journal.KindIntermediate, uri); err != nil {
			a.cfg.Log.Warn("an expired key stays behind", "err", err)
		}
	}
	return nil
}

// dropKey removes the key of an authority that did not come into the journal, which
// failed with err. Where nobody knows whether the journal names the key it stays until
// that is known: see tidyKeys.
func (a *Authority) dropKey(entry journal.Entry, err error) error {
	// Others than an upstream sign keys that have been there before.
	if entry.Key == "" || entry.External && a.cfg.source() != sourceUpstream || a.names(entry.Key) {
		return err
	}
	if errors.Is(err, storage.ErrNotDurable) || errors.Is(err, storage.ErrUnknown) {
		a.doubtful.add(entry)
		return err
	}
	return errors.Join(err, a.keys.Remove(entry.Kind, entry.Key))
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// takeExternal takes an intermediate that somebody else signed. If its root is new,
// the root is published first, and the intermediate taken when everybody has it:
// settle does that.
func (a *Authority) takeExternal(ctx context.Context, got external.Issuer, key crypto.Signer, entry journal.Entry, roots []*x509.Certificate, hash [32]byte) error {
	return a.use(ctx, &staged{issuer: &issuer{cert: got.Cert, key: key, chain: got.Chain}, entry: entry, root: got.Root, roots: roots, hash: hash})
}

// use makes an intermediate the active one: at once if everybody who has to has its
// root and, where lists are published, its list; otherwise those are published first
// and settle takes it when everybody has them.
func (a *Authority) use(ctx context.Context, s *staged) error {
	if a.cfg.CRL.Enabled {
		if err := revocation.CanSign(s.issuer.cert); err != nil {
			return err
		}
	}
	known := a.trust.Value().Roots()
	publish := slices.ContainsFunc(s.roots, func(r *x509.Certificate) bool { return !slices.ContainsFunc(known, r.Equal) })
	if a.cfg.shared() && len(s.roots) > 0 && !publish && !a.orphaned() {
		// Another replica may have published it, and wait for those who do not have it yet.
		used, err := a.current().Needs(s.root, nil, a.clock.past(), journal.StateActive)
		if err != nil {
			return a.dropKey(s.entry, err)
		}
		publish = !used
	}
	if !publish && !a.listFirst() {
		return a.settled(ctx, s)
	}
	before := a.staged.Swap(s) // its list is signed with the change
	err := a.changeTrust(ctx, func(j *journal.Journal) error {
		for _, e := range journal.RootEntries(s.roots) {
			if !j.HasRoot(e) {
				j.Authorities = append(j.Authorities, e)
			}
		}
		if s.entry.Key != "" && !slices.ContainsFunc(j.Authorities, func(e journal.Entry) bool { return e.Key == s.entry.Key && e.State != journal.StatePending }) {
			j.Authorities = slices.DeleteFunc(j.Authorities, s.entry.Follows)
			// A start finds it again.
			s.entry.State = journal.StateNext
			j.Authorities = append(j.Authorities, s.entry)
		}
		return nil
	})
	if err != nil {
		a.staged.Store(before)
		return a.dropKey(s.entry, err)
	}
	s.sequence, s.since = a.current().Sequence, time.Now()
	a.cfg.Log.Info("the next intermediate is published; it is used when every agent has what belongs to it", "subject", s.issuer.cert.Subject.String(),
		"root", s.root.Subject.String(), "sequence", s.sequence)
	return nil
}

// settled makes a staged intermediate the active one.
func (a *Authority) settled(ctx context.Context, s *staged) error {
	if err := a.take(ctx, s.issuer, s.entry, s.roots); err != nil {
		return err
	}
	if root := a.root.Load(); a.cfg.source() != sourceOwn && (root == nil || !root.cert.Equal(s.root)) {
		a.root.Store(&issuer{cert: s.root})
	}
	a.folderHash = s.hash
	a.staged.Store(nil)
	if s.entry.External && a.signing() == nil {
		return a.renewServing(ctx)
	}
	return nil
}

// restage finds the intermediate of the journal that was published and not yet used, the
// last one of several. In the series of an offline root those are many, and their time
// decides. One below a root that is not trusted any more is of no use, nor, of an own root, one
// below another root or that ends before the present one.
func (a *Authority) restage(now time.Time) error {
	j := a.current()
	if j.Source == sourceOffline || j.Source == sourceFolder {
		return nil
	}
	for _, e := range j.Authorities {
		if e.State != journal.StateNext || e.Key == "" {
			continue
		}
		c, err := e.Cert()
		if err != nil {
			return err
		}
		if !now.Before(c.NotAfter) {
			continue // tidyNext removes it
		}
		if j.Source == sourceOwn {
			root, signs := a.root.Load(), a.intermediate.Load()
			if root == nil || !bytes.Equal(c.AuthorityKeyId, root.cert.SubjectKeyId) || signs != nil && bytes.Equal(signs.cert.AuthorityKeyId, c.AuthorityKeyId) && c.NotAfter.Before(signs.cert.NotAfter) {
				continue
			}
		}
		key, err := a.keys.Open(e.Kind, e.Key, c.PublicKey)
		if err != nil {
			return err
		}
		iss, err := issuerOf(e, key)
		if err != nil {
			return err
		}
		root, err := a.rootOf(iss, j)
		if err != nil {
			continue // its root has left the bundle meanwhile
		}
		a.staged.Store(&staged{issuer: iss, entry: e, root: root, sequence: j.Sequence, since: now})
	}
	return nil
}

// issuerOf is an entry with its key, without what lies above.
func issuerOf(e journal.Entry, key crypto.Signer) (*issuer, error) {
	c, err := e.Cert()
	if err != nil {
		return nil, err
	}
	iss := &issuer{cert: c, key: key}
	if e.Kind == journal.KindRoot {
		return iss, nil
	}
	iss.chain = []*x509.Certificate{c}
	for _, der := range e.Chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("journal: chain of the %s: %w", e.Kind, err)
		}
		iss.chain = append(iss.chain, c)
	}
	return iss, nil
}
