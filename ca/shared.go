package ca

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/signet-mesh/signet/ca/external"
	"github.com/signet-mesh/signet/ca/journal"
	"github.com/signet-mesh/signet/ca/replica"
	"github.com/signet-mesh/signet/ca/revocation"
	"github.com/signet-mesh/signet/storage"
)

// State is where an authority keeps its records. *storage.Bolt is one.
type State interface {
	storage.Store
	// Err is nil while records can be made durable, as far as is known, else why not.
	Err() error
	Close() error
}

// Shared is what replicas have in common: the state, and the place of a log for each.
// The zero value means that there is one authority, with files in its DataDir.
type Shared struct {
	// Store is open for as long as the authority is.
	Store storage.Store
	// Files hold the logs, each in the folder log/NNN of its instance.
	Files storage.FS
	// LogWait is how long to wait for the log of a process of this replica that died.
	LogWait time.Duration
}

// shared reports whether the state is one that replicas share.
func (c Config) shared() bool { return c.Shared.Store != nil }

// CheckShared refuses what replicas cannot have in common, before there is a Store.
func (c Config) CheckShared() error {
	return c.checkRootReplica()
}

// sharedFolder returns the authority's folder, which holds this replica's keys, and which
// replica it is; both are made if there are none.
func sharedFolder(cfg Config) (dir string, f replica.Identity, err error) {
	dir = filepath.Join(cfg.DataDir, FolderName)
	if err := checkDataDir(cfg); err != nil {
		return "", f, err
	}
	fail := func(err error) (string, replica.Identity, error) {
		return "", replica.Identity{}, fmt.Errorf("the replica's folder %s: %w", dir, err)
	}
	if _, err := os.Lstat(filepath.Join(dir, stateName)); err == nil {
		return fail(errors.New("it holds an authority with a state of its own: move that to etcd with `signet-ca migrate-store`, or choose another dataDir"))
	}
	for _, d := range []string{dir, filepath.Join(dir, keysName)} {
		if err := os.Mkdir(d, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return fail(err)
		}
	}
	if err := checkFolder(dir); err != nil {
		return "", f, err
	}
	f, err = replica.OpenIdentity(dir)
	return dir, f, err
}

// assembleShared opens this replica's part of the shared state, and makes it if the
// replica is new. Nothing that is stored is loaded yet.
func assembleShared(ctx context.Context, cfg Config) (a *Authority, dir string, err error) {
	dir, f, err := sharedFolder(cfg)
	if err != nil {
		return nil, "", err
	}
	claimed, err := replica.Claim(ctx, cfg.Shared.Store, f.ID, cfg.Instance, cfg.RootReplica)
	if err != nil {
		return nil, "", err
	}
	cfg.Instance = claimed
	if a, err = assemble(cfg, dir, true); err != nil {
		return nil, "", err
	}
	if err = a.checkRootFiles(dir); err == nil {
		err = a.join(ctx, dir, f)
	}
	if err != nil {
		return nil, "", errors.Join(err, a.closeStorage())
	}
	return a, dir, nil
}

// openSharedStorage is what assemble opens in the place of files.
func openSharedStorage(cfg Config, opt storage.LogOptions) (State, *storage.FileLog, error) {
	opt.FS, opt.Remote, opt.MustExist, opt.LockTimeout = cfg.Shared.Files, true, false, cfg.Shared.LogWait
	log, err := storage.OpenLog(sharedLog(cfg.Instance), opt)
	if errors.Is(err, storage.ErrLocked) {
		err = fmt.Errorf("another process is instance %d: %w", cfg.Instance, err)
	}
	if err != nil {
		return nil, nil, err
	}
	return replica.View(cfg.Shared.Store, cfg.Instance), log, nil
}

func sharedLog(instance uint8) string { return fmt.Sprintf("%s/%03d", logName, instance) }

// join makes what a replica has of its own, if it has not: the key of its log, and its
// intermediate. The first replica of all makes the roots, too. The log is locked, so one
// process of this replica does it; a lease keeps two replicas from both being the first.
func (a *Authority) join(ctx context.Context, dir string, f replica.Identity) error {
	for told := false; ; told = true {
		err := a.joinNow(ctx, dir, f)
		if !errors.Is(err, errNoRoot) {
			return err
		}
		if !told {
			a.cfg.Log.Warn("this replica joins when there is a root", "root_replica", a.cfg.RootReplica)
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, context.Cause(ctx))
		case <-time.After(askEvery):
		}
	}
}

func (a *Authority) joinNow(ctx context.Context, dir string, f replica.Identity) error {
	lease, err := a.store.Lease(ctx, "join", 10*time.Second)
	if err != nil {
		return err
	}
	defer func() { _ = lease.Release(context.WithoutCancel(ctx)) }() // it expires in any case
	for {
		err := a.joinOnce(ctx, f)
		if errors.Is(err, storage.ErrConflict) {
			continue // others changed what is in common
		}
		if err != nil {
			return fmt.Errorf("joining as instance %d: %w", a.instance, err)
		}
		if f.Begun {
			return nil
		}
		f.Begun = true
		return f.Save(dir)
	}
}

func (a *Authority) joinOnce(ctx context.Context, f replica.Identity) error {
	if err := replica.CheckMoved(ctx, a.cfg.Shared.Store); err != nil {
		return err
	}
	_, err := a.store.Get(ctx, journal.Key)
	first := errors.Is(err, storage.ErrNotFound)
	if err != nil && !first {
		return err
	}
	var j journal.Journal
	var revision uint64
	if !first {
		if j, revision, err = journal.Load(ctx, a.store); err != nil {
			return err
		}
	}
	var former []replica.Former
	if j.LogKey == "" {
		if former, err = replica.FormerOf(ctx, a.cfg.Shared.Store, a.instance); err != nil {
			return err
		}
	}
	switch {
	case j.LogKey != "":
		return nil
	case len(former) > 0:
		return a.rejoin(ctx, j, revision, former)
	case f.Begun:
		return errors.New("its part of the journal is gone: this is not the state that it belongs to; restore the right one, or give this replica an empty dataDir to begin as another instance")
	case !first && (j.TrustDomain != a.cfg.TrustDomain.Name() || j.Source != a.cfg.source()):
		return fmt.Errorf("the replicas there are of trust domain %s with intermediates signed by %s, this one is configured for %s and %s",
			j.TrustDomain, sourceNames[j.Source], a.cfg.TrustDomain.Name(), sourceNames[a.cfg.source()])
	case first && !a.holdsRoot():
		return errNoRoot
	case first:
		a.cfg.Log.Info("creating a new authority", "trust_domain", a.cfg.TrustDomain.Name(), "instance", a.instance)
		return a.found(ctx)
	}
	a.cfg.Log.Info("a replica joins", "trust_domain", j.TrustDomain, "instance", a.instance)
	if _, err := newLogKey(a.keys, &j); err != nil {
		return err
	}
	entries, err := a.ownIntermediates(ctx, j)
	if err != nil {
		return err
	}
	j.Authorities = append(j.Authorities, entries...)
	_, err = j.Commit(ctx, a.store, revision)
	return err
}

// ownIntermediates are those that a replica begins with under roots that are there.
func (a *Authority) ownIntermediates(ctx context.Context, j journal.Journal) ([]journal.Entry, error) {
	roots, err := j.Roots()
	if err != nil {
		return nil, err
	}
	trusted := func(root *x509.Certificate) error {
		for _, r := range roots {
			if r.Equal(root) {
				return nil
			}
		}
		return fmt.Errorf("its root %s is not trusted yet: let a replica that runs publish it first", root.Subject)
	}
	switch j.Source {
	case sourceOffline:
		return nil, nil // Request adds to it
	case sourceFolder:
		f, _, err := a.readFolder()
		if err == nil {
			err = trusted(f.Root)
		}
		return []journal.Entry{folderEntry(f.Issuer)}, err
	case sourceUpstream:
		pinned, err := external.ReadRoots(a.cfg.Upstream.RootFile)
		if err != nil {
			return nil, fmt.Errorf("authority.upstream.rootFile: %w", err)
		}
		got, _, entry, err := a.askUpstream(ctx, pinned)
		if err == nil {
			err = trusted(got.Root)
		}
		return []journal.Entry{entry}, err
	}
	if !a.holdsRoot() {
		e, err := a.newRequest()
		return []journal.Entry{e}, err
	}
	for _, e := range j.Authorities {
		if e.Kind != journal.KindRoot || e.State != journal.StateActive {
			continue
		}
		pub, err := e.Public()
		if err != nil {
			return nil, err
		}
		key, err := a.keys.Open(journal.KindRoot, e.Key, pub)
		if err != nil {
			return nil, err
		}
		root, err := issuerOf(e, key)
		if err != nil {
			return nil, err
		}
		_, entry, err := a.newAuthority(ctx, root)
		return []journal.Entry{entry}, err
	}
	return nil, errors.New("journal: there is no active root")
}

// errWentBack is why a stored state is not taken up.
var errWentBack = errors.New("the shared state went back")

// reread replaces the journal by what is stored, after others changed it or where it is
// unknown whether a change has happened. journalMu is held.
func (a *Authority) reread(ctx context.Context) error {
	if !a.cfg.shared() {
		j, revision, err := journal.Load(ctx, a.store)
		if err == nil {
			a.setJournal(j, revision)
		}
		return err
	}
	_, _, err := a.rereadWith(ctx)
	return err
}

// rereadWith is reread where replicas share their state. It returns what else there is
// below prefixes, all of one moment, and the revision of that.
func (a *Authority) rereadWith(ctx context.Context, also ...string) (entries []storage.Entry, revision uint64, err error) {
	// A sequence means one set of lists, so both are of one moment.
	prefixes := append([]string{journal.Key, revocation.ListPrefix}, also...)
	if a.cfg.CRL.Enabled {
		prefixes = append(prefixes, revocation.Prefix)
	}
	entries, revision, err = a.store.List(ctx, prefixes...)
	if err != nil {
		return nil, 0, fmt.Errorf("reading the journal: %w", err)
	}
	i := slices.IndexFunc(entries, func(e storage.Entry) bool { return e.Key == journal.Key })
	if i < 0 {
		return nil, 0, journal.ErrNone
	}
	j, err := journal.Parse(entries[i].Value)
	if err != nil {
		return nil, 0, err
	}
	var lists []storage.Entry
	var revoked []revocation.Entry
	for _, e := range entries {
		switch {
		case strings.HasPrefix(e.Key, revocation.ListPrefix):
			lists = append(lists, e)
		case strings.HasPrefix(e.Key, revocation.Prefix) && a.cfg.CRL.Enabled:
			r, err := revocation.Parse(e)
			if err != nil {
				return nil, 0, err
			}
			revoked = append(revoked, r)
		}
	}
	by, err := parseLists(lists)
	if err != nil {
		return nil, 0, err
	}
	if now := a.journal.Sequence; j.Sequence < now {
		return nil, 0, fmt.Errorf("%w: the state in etcd is of trust sequence %d, and %d was in force: etcd was restored from an older copy, and what came since would be taken back, "+
			"revocations too; this replica goes on with what it had and changes nothing: have etcd go on with the newer state, and do not restart replicas before", errWentBack, j.Sequence, now)
	}
	a.setJournal(j, entries[i].Revision)
	a.journalSeen = revision
	a.lists.read(by, revoked)
	return entries, revision, nil
}

// follow takes up what other replicas change, until ctx ends.
func (a *Authority) follow(ctx context.Context) error {
	const job = "other replicas"
	for ctx.Err() == nil {
		revision, err := a.catchUp(ctx)
		if err == nil {
			a.fails(job, nil)
		}
		for e, watchErr := range a.store.Watch(ctx, "", revision) {
			if err != nil {
				break
			}
			if err = watchErr; err == nil {
				err = a.followed(ctx, e)
			}
			if err != nil {
				break
			}
		}
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, storage.ErrCompacted) {
			continue
		}
		a.fails(job, err)
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
	return nil
}

// cutOffAfter is after how long without reading the shared state a replica tells its agents
// that it is cut off: they need not run about when etcd elects another leader.
const cutOffAfter = 5 * time.Second

// lookAtState returns a job that reads of the shared state what changes with the bans. A
// watch says nothing where nothing has changed, and nothing where it is cut off; agents that
// hear of no ban and no root any more are to know the difference. A ban that was not heard
// of is taken up.
func (a *Authority) lookAtState() func(context.Context) error {
	read := time.Now()
	return func(ctx context.Context) error {
		within, cancel := context.WithTimeout(ctx, cutOffAfter)
		defer cancel()
		e, err := a.store.Get(within, replica.BanRevisionKey)
		if errors.Is(err, storage.ErrNotFound) {
			err = nil // of an earlier build
		}
		if err == nil && e.Revision > a.banned().numberAt {
			err = a.reloadBans(within)
		}
		was := a.cutOff.Value()
		if err == nil {
			if read = time.Now(); !was.IsZero() {
				a.cutOff.Store(time.Time{})
			}
			return nil
		}
		if ctx.Err() != nil || time.Since(read) < cutOffAfter {
			return nil // it may be over at once
		}
		if was.IsZero() {
			a.cutOff.Store(read)
		}
		return fmt.Errorf("the shared state was not read since %s, and agents are told so: %w", read.UTC().Format(time.RFC3339), err)
	}
}

// catchUp makes what is known here what is stored, and returns the revision of that.
func (a *Authority) catchUp(ctx context.Context) (uint64, error) {
	// Trust is taken up first: in the rest may be something that this build cannot read.
	entries, revision, err := a.followState(ctx, agentPrefix, revocation.Prefix)
	if err != nil {
		return 0, err
	}
	var agents []storage.Entry
	revoked := revocation.Set{}
	for _, e := range entries {
		switch {
		case strings.HasPrefix(e.Key, agentPrefix):
			agents = append(agents, e)
		case strings.HasPrefix(e.Key, revocation.Prefix):
			r, err := revocation.Parse(e)
			if err != nil {
				return 0, err
			}
			revoked[string(r.Serial)] = r
		}
	}
	a.takeAgents(agents, revision)
	a.revokeMu.Lock()
	a.revoked.Store(a.withKnown(revoked))
	a.revokeMu.Unlock()
	a.takenBack.now()
	a.asked.now()
	a.askedToRevoke.now()
	return revision, nil
}

// followed takes up one change.
func (a *Authority) followed(ctx context.Context, e storage.Event) error {
	switch {
	case e.Key == journal.Key:
		a.journalMu.Lock()
		seen := e.Revision <= a.journalSeen && a.journal.Sequence == a.trust.Value().Sequence()
		a.journalMu.Unlock()
		if seen { // of several changes that came together
			a.asked.now()
			return nil
		}
		err := a.followJournal(ctx)
		a.asked.now()
		return err
	case strings.HasPrefix(e.Key, agentPrefix):
		a.agents.mu.Lock()
		if e.Deleted {
			serial, _ := agentSerial(e.Key) // another key is of no agent
			delete(a.agents.bySerial, string(serial))
			delete(a.agents.unread, e.Key)
		} else {
			a.agents.read(e.Entry)
		}
		a.agents.mu.Unlock()
		a.alarm("agents' records", a.agents.unreadable())
	case strings.HasPrefix(e.Key, askedPrefix):
		a.askedToRevoke.now()
	case strings.HasPrefix(e.Key, revocation.Prefix):
		a.revokeMu.Lock()
		defer a.revokeMu.Unlock()
		if !e.Deleted {
			r, err := revocation.Parse(e.Entry)
			if err == nil && !a.revoked.Value().Has(r.Serial) {
				a.revoked.Store(a.revoked.Value().With(r))
				a.takenBack.now()
			}
			return err
		}
		set := maps.Clone(a.revoked.Value())
		for serial, r := range set {
			if revocation.Key(r.Serial) == e.Key {
				delete(set, serial)
				a.revoked.Store(set)
				break
			}
		}
	}
	return nil
}

// followJournal takes up a change of the journal, and publishes what it made of trust.
func (a *Authority) followJournal(ctx context.Context) error {
	_, _, err := a.followState(ctx)
	return err
}

// followState is followJournal with what else there is below prefixes, all of one moment,
// and the revision of that.
func (a *Authority) followState(ctx context.Context, also ...string) (entries []storage.Entry, revision uint64, err error) {
	a.trustMu.Lock()
	defer a.trustMu.Unlock()
	a.journalMu.Lock()
	entries, revision, err = a.rereadWith(ctx, also...)
	sequence := a.journal.Sequence
	a.journalMu.Unlock()
	if err == nil && sequence != a.trust.Value().Sequence() {
		err = a.publishTrust()
	}
	return entries, revision, err
}
