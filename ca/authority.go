package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/journal"
	"github.com/signet-mesh/signet/ca/keys"
	"github.com/signet-mesh/signet/ca/limit"
	"github.com/signet-mesh/signet/ca/replica"
	"github.com/signet-mesh/signet/ca/revocation"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/storage"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/time/rate"
)

// ErrUnavailable is returned while nothing can be issued, because nothing can be
// recorded or because no authority is valid. Nothing was signed.
var ErrUnavailable = errors.New("the authority cannot issue now")

// Authority is one replica of the certificate authority. Open makes one, Run does
// its background work, Close ends it.
type Authority struct {
	cfg      Config
	instance uint8
	id       spiffeid.ID // its own SPIFFE ID
	store    State
	log      *storage.FileLog
	keys     *keys.Ring
	logKey   crypto.Signer
	clock    *clock
	keptClock
	agents  *agents
	keyUses *keyUses
	metrics *metrics

	journalMu       sync.Mutex      // held while the journal is changed
	journal         journal.Journal // written by Open, and then by edit alone; guarded by journalMu
	journalRevision uint64          // guarded by journalMu
	journalReads    uint64          // how often journal was replaced; guarded by journalMu
	journalSeen     uint64          // revision of the shared state when it was read; guarded by journalMu

	bans   identity.Watched[*bansState]
	bansMu sync.Mutex // held while bans are changed
	// bansStale says that the bans may not be those of the store, after a failure.
	bansStale atomic.Bool
	// cutOff is since when the state that replicas share was not read, if that is so for
	// long; zero otherwise.
	cutOff   identity.Watched[time.Time]
	nodes    nodeBans
	lostBans lostBans
	// recording is held for reading from where a certificate is held against the bans until
	// it is recorded, so that who takes it after a ban finds all that came before it in
	// the log.
	recording sync.RWMutex

	root   atomic.Pointer[issuer] // without a key where somebody else has it
	staged atomic.Pointer[staged] // set by Open and then by Run
	// trustMu is held while what others trust is changed, and shared while an agent gets
	// its first trust; before journalMu.
	trustMu    sync.RWMutex
	rotationMu sync.Mutex // held during a step of package rotation; before trustMu
	began      time.Time
	parsed     atomic.Pointer[parsedRotation]
	badAnswers badAnswers // guarded by rotationMu
	doubtful   doubtfulKeys
	// heldUpSince is from when on the lease for a step that is due could not be had; guarded by rotationMu.
	heldUpSince time.Time
	lists       lists // changed together with journal where replicas share it
	// What Run does when other replicas or their agents did something.
	takenBack, heard, asked, askedToRevoke poke
	revoked                                identity.Watched[revocation.Set]
	revokeMu                               sync.Mutex         // held while something is revoked
	unstored                               []revocation.Entry // revoked in the log and perhaps not in the state; guarded by revokeMu
	folderHash                             [sha256.Size]byte  // of the folder that the issuer is from; owned by Open and then by Run
	folderGood                             folderGood         // owned by Run
	upstreamAgain                          time.Time          // when an upstream is asked under another root again; owned by Run
	intermediate                           atomic.Pointer[issuer]
	trust                                  identity.Watched[*identity.Trust]
	head                                   identity.Watched[storage.Head] // newest signed head; zero before the first
	serving                                atomic.Pointer[tls.Certificate]
	servingMu                              sync.Mutex
	servingRenew                           time.Time // guarded by servingMu
	// servingOf is the certificate that was last seen to have signed servingLeaf. Both
	// are guarded by servingMu.
	servingOf, servingLeaf *x509.Certificate
	losses                 losses
	strangers              *limit.Places // of first attestations under way, by address
	queue                  *limit.Queue  // of what agents ask for
	identities             *limit.Rates  // by node and SPIFFE ID
	clients                *limit.Rates  // of other doors, by pod
	heads                  *limit.Rates  // of the log, that agents return, by node
	streams                *limit.Rates  // RPCs of agents, by node

	// warnings bounds the lines that refused callers can make the log grow by; the
	// metrics count every refusal.
	warnings *rate.Limiter
	// lookUps bounds how often agents can make a replica read what is shared.
	lookUps *rate.Limiter

	mu       sync.Mutex
	failures map[string]error // what Run fails at now, by job; guarded by mu
	alarms   map[string]error // what needs an operator while all still works; guarded by mu
	// retiredLogs are those of instances from before a restore; guarded by mu.
	retiredLogs []bookLog
	// dropped are instances that this replica was whose logs are on record as gone, and
	// may not all be; damaged are those whose logs are not read, and go when it is certain
	// that they are as old as they seemed at the start. Owned by Open and then by Run.
	dropped, damaged []uint8
}

// Open opens the authority in cfg.DataDir, or makes a new one if the folder holds
// none. It refuses to start, with an error that says what to do, when a store is
// there without its keys or log or the other way round, when the folder is open
// to others, and when another process has it. It never makes new keys for an authority that
// exists.
func Open(ctx context.Context, cfg Config) (*Authority, error) {
	cfg = cfg.withDefaults()
	if err := cfg.check(); err != nil {
		return nil, err
	}
	if cfg.shared() {
		a, dir, err := assembleShared(ctx, cfg)
		if err == nil {
			a, err = a.opened(ctx)
		}
		if err != nil {
			return nil, fmt.Errorf("opening the replica in %s: %w", dir, err)
		}
		return a, nil
	}
	dir, err := ensureFolder(ctx, cfg)
	if err != nil {
		return nil, err
	}
	a, err := assemble(cfg, dir, true)
	if err == nil {
		a, err = a.opened(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("opening the authority in %s: %w", dir, err)
	}
	return a, nil
}

// FolderName is the authority's folder in DataDir.
const FolderName = "authority"

// Parts of the authority's folder.
const (
	stateName = "state.db"
	logName   = "log"
	keysName  = "keys"
)

// ensureFolder returns the authority's folder, complete; it makes a new authority
// if there is none.
func ensureFolder(ctx context.Context, cfg Config) (string, error) {
	if err := checkDataDir(cfg); err != nil {
		return "", err
	}
	dir := filepath.Join(cfg.DataDir, FolderName)
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return dir, create(ctx, cfg, dir)
	}
	if err := checkFolder(dir); err != nil {
		return "", err
	}
	return dir, checkComplete(dir)
}

// checkDataDir refuses a dataDir that is missing, or in which others could put another
// authority in this one's place.
func checkDataDir(cfg Config) error {
	fi, err := os.Stat(cfg.DataDir)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("dataDir %s does not exist: mount the volume, or run: install -d -m 700 %s", cfg.DataDir, cfg.DataDir)
	}
	if err != nil {
		return fmt.Errorf("dataDir: %w", err)
	}
	if !fi.IsDir() {
		return fmt.Errorf("dataDir %s is not a folder", cfg.DataDir)
	}
	if fi.Mode().Perm()&0o007 != 0 {
		return fmt.Errorf("dataDir %s has mode %v and is open to others: run: chmod o-rwx %s", cfg.DataDir, fi.Mode().Perm(), cfg.DataDir)
	}
	// Whoever may rename in dataDir could put another authority in this one's place.
	if fi.Mode().Perm()&0o020 != 0 && fi.Mode()&fs.ModeSticky == 0 && !ours(fi) {
		return fmt.Errorf("dataDir %s belongs to somebody else and its group may write: run: chown %d %s", cfg.DataDir, os.Geteuid(), cfg.DataDir)
	}
	return nil
}

// checkFolder refuses an authority's folder that is somebody else's or open to others.
func checkFolder(dir string) error {
	fi, err := os.Lstat(dir)
	switch {
	case err != nil:
		return fmt.Errorf("dataDir: %w", err)
	case !ours(fi):
		return fmt.Errorf("%s belongs to another user than the one that runs signet-ca (%d): it is not this authority's; restore it, or run: chown -R %d %s", dir, os.Geteuid(), os.Geteuid(), dir)
	case !fi.IsDir() || fi.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("%s has mode %v: it must be a folder that only its owner can enter; run: chmod 700 %s", dir, fi.Mode(), dir)
	}
	return nil
}

// ours reports whether a file belongs to the user that this process runs as.
func ours(fi fs.FileInfo) bool {
	st, ok := fi.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Geteuid()
}

// checkComplete refuses a folder from which something is gone. Nothing is made
// anew in its place: a lost key is restored or the loss is decided by a person.
func checkComplete(dir string) error {
	var have, missing []string
	for _, p := range []string{stateName, keysName, logName} {
		if _, err := os.Stat(filepath.Join(dir, p)); err == nil {
			have = append(have, p)
		} else {
			missing = append(missing, p)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("the authority in %s is incomplete: it has %v but not %v; restore what is missing from backup, "+
			"or, to give up this authority and every SVID under it, remove the folder and start again", dir, have, missing)
	}
	return nil
}

// create makes a new authority in a folder of another name and renames it.
func create(ctx context.Context, cfg Config, dir string) (err error) {
	cfg.Log.Info("creating a new authority", "trust_domain", cfg.TrustDomain.Name(), "folder", dir)
	defer func() {
		if err != nil {
			err = fmt.Errorf("creating a new authority in %s: %w", dir, err)
		}
	}()
	// One that a crash left behind was never used: nothing is lost with it.
	tmp := dir + ".new"
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	for _, d := range []string{tmp, filepath.Join(tmp, keysName), filepath.Join(tmp, logName)} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return err
		}
	}
	a, err := assemble(cfg, tmp, false)
	if err != nil {
		return err
	}
	err = errors.Join(a.found(ctx), a.closeStorage())
	if err != nil {
		return err
	}
	for _, d := range []string{filepath.Join(tmp, keysName), tmp} {
		if err := keys.SyncFolder(d); err != nil {
			return err
		}
	}
	if err := os.Rename(tmp, dir); err != nil {
		return err
	}
	return keys.SyncFolder(cfg.DataDir)
}

// assemble opens the storage below dir and nothing that is stored in it. mustExist
// is false only where a new authority is made, in a folder that is not in use yet.
func assemble(cfg Config, dir string, mustExist bool) (*Authority, error) {
	id, err := identity.AuthorityID(cfg.TrustDomain, cfg.Instance)
	if err != nil {
		return nil, err
	}
	keyConfig := cfg.Keys
	keyConfig.Folder, keyConfig.Logger = filepath.Join(dir, keysName), cfg.Log
	ring, err := keys.Open(keyConfig)
	if err != nil {
		return nil, err
	}
	// The storage engines' own metrics are registered once, not for the folder
	// that a new authority is made in.
	storeOpt, logOpt := cfg.StoreOptions, cfg.LogOptions
	storeOpt.MustExist, logOpt.MustExist = mustExist, mustExist
	if mustExist {
		storeOpt.Metrics, logOpt.Metrics, logOpt.Log = cfg.Metrics, cfg.Metrics, cfg.Log
	}
	logOpt.Instance = uint32(cfg.Instance)
	clk := newClock(cfg.wall)
	logOpt.Now, clk.earliest = clk.stamp, cfg.Built
	openStorage := openFiles
	if cfg.shared() {
		openStorage = func(_ string, _ storage.BoltOptions, opt storage.LogOptions) (State, *storage.FileLog, error) {
			return openSharedStorage(cfg, opt)
		}
	}
	store, log, err := openStorage(dir, storeOpt, logOpt)
	if err != nil {
		return nil, err
	}
	var reg prometheus.Registerer
	if mustExist {
		reg = cfg.Metrics
	}
	a := &Authority{cfg: cfg, instance: cfg.Instance, id: id, store: store, log: log, keys: ring,
		clock: clk, failures: map[string]error{}, alarms: map[string]error{}, warnings: rate.NewLimiter(10, 50), metrics: newMetrics(reg)}
	a.began = time.Now()
	a.lookUps = rate.NewLimiter(10, 20)
	a.strangers = limit.NewPlaces(limit.PlacesConfig{All: maxStrangers, Wait: strangerWait, Shared: true})
	a.takenBack, a.heard, a.asked, a.askedToRevoke = make(poke, 1), make(poke, 1), make(poke, 1), make(poke, 1)
	clk.begin(log.Head().Time, log.Head().Time)
	l := cfg.Limits
	a.queue = limit.NewQueue(limit.QueueConfig{Rate: l.AgentRate, Burst: l.AgentBurst, Metrics: reg})
	a.heads = limit.NewRates(headRate, headBurst)
	a.identities, a.clients, a.streams = limit.NewRates(l.IdentityRate, l.IdentityBurst), limit.NewRates(l.ClientRate, l.ClientBurst), limit.NewRates(streamRate, streamBurst)
	a.keyUses = newKeyUses(maxKeyUses, func(n int) { a.metrics.keysForgot.Add(float64(n)) })
	return a, nil
}

// openFiles opens the state and the log that are files of the authority's folder.
func openFiles(dir string, storeOpt storage.BoltOptions, logOpt storage.LogOptions) (State, *storage.FileLog, error) {
	store, err := storage.OpenBolt(filepath.Join(dir, stateName), storeOpt)
	if err != nil {
		return nil, nil, err
	}
	log, err := storage.OpenLog(filepath.Join(dir, logName), logOpt)
	if err != nil {
		return nil, nil, errors.Join(err, store.Close())
	}
	return store, log, nil
}

// found makes keys, root and first intermediate, and commits them as the first
// journal.
func (a *Authority) found(ctx context.Context) error {
	j := journal.Journal{Version: journal.Version, TrustDomain: a.cfg.TrustDomain.Name(), Instance: a.instance, Sequence: 1, Source: a.cfg.source()}
	_, err := newLogKey(a.keys, &j)
	if err != nil {
		return err
	}
	if j.Authorities, err = a.firstAuthorities(ctx, j.Source); err != nil {
		return err
	}
	_, err = j.Commit(ctx, a.store, 0)
	return err
}

// newAuthority makes a key and has parent certify it; a nil parent makes a root.
func (a *Authority) newAuthority(ctx context.Context, parent *issuer) (*issuer, journal.Entry, error) {
	kind, ttl, state := capb.IssuanceRecord_KIND_INTERMEDIATE, a.cfg.IntermediateTTL, journal.KindIntermediate
	if parent == nil {
		kind, ttl, state = capb.IssuanceRecord_KIND_ROOT, a.cfg.RootTTL, journal.KindRoot
	}
	uri, key, err := a.keys.Create(state)
	if err != nil {
		return nil, journal.Entry{}, err
	}
	if parent == nil && slices.ContainsFunc(a.current().Authorities, func(e journal.Entry) bool { return e.Key == uri }) {
		return nil, journal.Entry{}, errFixedKey
	}
	signer := parent
	if parent == nil {
		signer = &issuer{key: key}
	}
	out, err := a.issue(ctx, signer, []certificate{{kind: kind, evidence: capb.IssuanceRecord_EVIDENCE_SELF, pub: key.Public(), ttl: ttl}})
	if err == nil {
		err = out[0].err
	}
	if err != nil {
		// The key certifies nothing; it must not stay behind as if it did.
		return nil, journal.Entry{}, errors.Join(err, a.keys.Remove(state, uri))
	}
	c := out[0].chain[0]
	iss := &issuer{cert: c, key: key}
	if parent != nil {
		iss.chain = []*x509.Certificate{c}
	}
	return iss, journal.Entry{Kind: state, State: journal.StateActive, Certificate: c.Raw, Key: uri}, nil
}

// opened starts an authority that is complete, or closes its storage.
func (a *Authority) opened(ctx context.Context) (*Authority, error) {
	if err := a.start(ctx); err != nil {
		return nil, errors.Join(err, a.closeStorage())
	}
	a.registerGauges(a.cfg.Metrics)
	return a, nil
}

// start loads what the storage holds and makes the serving certificate.
func (a *Authority) start(ctx context.Context) error {
	if err := a.loadLosses(ctx); err != nil {
		return err
	}
	if err := a.loadRevocations(ctx); err != nil {
		return err
	}
	if err := a.loadJournal(ctx); err != nil {
		return err
	}
	// What has ended is asked from here on.
	if err := a.loadClock(ctx); err != nil {
		return err
	}
	if err := a.acceptClockAtStart(ctx); err != nil {
		return err
	}
	if err := a.loadAuthorities(ctx); err != nil {
		return err
	}
	if err := a.loadBans(ctx); err != nil {
		return err
	}
	if a.cfg.shared() {
		// Before an agent hears of the store's revision, which another replica has not come to.
		if err := a.numberBans(ctx); err != nil {
			return err
		}
	}
	var err error
	if a.agents, err = loadAgents(ctx, a.store, a.cfg.shared()); err != nil {
		return err
	}
	a.alarm("agents' records", a.agents.unreadable())
	if a.cfg.shared() {
		a.agents.unsaid = map[string]bool{}
	}
	if err := a.loadKeyUses(ctx); err != nil {
		return err
	}
	if err := a.startLists(ctx); err != nil {
		return err
	}
	if head, ok := a.log.SignedHead(); ok {
		if !a.verifyHead(head) {
			return fmt.Errorf("issuance log: the signed head at record %d is not signed by this authority's log key: somebody else wrote it; restore the log from backup", head.Sequence)
		}
		a.head.Store(head)
	}
	if c, ok := a.log.Checkpoint(); ok && !verifyCheckpoint(a.journal.LogPublicKey, c) {
		return fmt.Errorf("issuance log: the checkpoint at record %d is not signed by this authority's log key: the records before it were removed by somebody else; restore the log from backup", c.Sequence)
	}
	if a.cfg.AcceptLogLoss > 0 {
		// A flag that stays in a unit file accepts that loss and no other.
		if err := a.acceptLoss(ctx, a.cfg.AcceptLogLoss, "flag --accept-log-loss"); errors.Is(err, errNoLoss) {
			a.cfg.Log.Warn("--accept-log-loss has no effect; remove it", "err", err)
		} else if err != nil {
			return err
		}
	}
	if err := a.signing(); err != nil {
		// It starts all the same, for the operator, and serves agents as long as it can.
		a.cfg.Log.Error("nothing is signed until an operator decides", "err", err)
		return nil
	}
	if a.believed() != nil {
		return nil // Run makes a serving certificate when the clock is right
	}
	if a.orphaned() {
		// Nothing could be signed before an operator accepted the loss, just now.
		if err := a.renewIntermediate(ctx); err != nil {
			return err
		}
	}
	return a.renewServing(ctx)
}

// loadJournal reads the journal and checks that it is of this configuration.
func (a *Authority) loadJournal(ctx context.Context) error {
	if err := replica.CheckMoved(ctx, a.store); err != nil {
		return err
	}
	if err := a.reread(ctx); err != nil {
		return err
	}
	j := a.journal
	if j.TrustDomain != a.cfg.TrustDomain.Name() {
		return fmt.Errorf("it is of trust domain %s, the configuration says %s: a trust domain cannot be renamed; set trustDomain back, or choose another dataDir", j.TrustDomain, a.cfg.TrustDomain.Name())
	}
	if j.Instance != a.instance {
		return fmt.Errorf("it is instance %d, the configuration says %d: set instance back, so that serials stay unique", j.Instance, a.instance)
	}
	logPub, err := x509.ParsePKIXPublicKey(j.LogPublicKey)
	if err != nil {
		return fmt.Errorf("journal: the log's public key: %w", err)
	}
	if a.logKey, err = a.keys.Open(keys.Log, j.LogKey, logPub); err != nil {
		return err
	}
	if j.Source != a.cfg.source() {
		return fmt.Errorf("its intermediates are signed by %s, the configuration says %s: that cannot change for an authority that exists; set it back, or choose another dataDir", sourceNames[j.Source], sourceNames[a.cfg.source()])
	}
	return nil
}

// Trust is the current state of trust, and a channel that is closed when it
// changes.
func (a *Authority) Trust() (*identity.Trust, <-chan struct{}) { return a.trust.Load() }

// ID is the authority's own SPIFFE ID.
func (a *Authority) ID() spiffeid.ID { return a.id }

// Ready is nil when the authority can issue, else the reason why not.
func (a *Authority) Ready() error {
	if err := a.believed(); err != nil {
		return err
	}
	if err := a.failing(); err != nil {
		return err
	}
	if err := a.signing(); err != nil {
		return err
	}
	switch c, now := a.intermediate.Load().cert, a.clock.latest(); {
	case !now.Before(c.NotAfter):
		return fmt.Errorf("the intermediate expired at %s", c.NotAfter.Format(time.RFC3339))
	case now.Before(c.NotBefore):
		return fmt.Errorf("the intermediate is not valid before %s: it was made by another clock", c.NotBefore.Format(time.RFC3339))
	}
	return errors.Join(a.log.Err(), a.store.Err(), a.keys.Err())
}

func (a *Authority) renew(ctx context.Context) error {
	now, err := a.clock.now()
	if err != nil {
		return nil // Ready says so, and until then nothing begins and nothing ends
	}
	c := a.intermediate.Load().cert
	errs := []error{a.watchExternal(ctx, now)}
	// By a clock in doubt nothing is replaced that is still good.
	if !a.clock.read().doubted || !now.Before(c.NotAfter) {
		errs = append(errs, a.settle(ctx, now), a.dropRoots(ctx, a.clock.past()), a.rotateDue(ctx))
		// Half life, where life is what the certificate was made for; the root's end
		// may have cut it.
		if a.cfg.source() != sourceOwn && a.staged.Load() == nil && now.After(c.NotBefore.Add(c.NotAfter.Sub(c.NotBefore)/2)) {
			errs = append(errs, a.renewIntermediate(ctx))
		}
		errs = append(errs, a.followRootFile(ctx, now))
		// One that a clock made which was ahead, before an operator accepted the right one.
		if a.cfg.source() == sourceOwn && a.staged.Load() == nil && now.Before(c.NotBefore) {
			errs = append(errs, a.renewIntermediate(ctx))
		}
		// Also when the intermediate cannot be renewed: it is good for days yet.
		errs = append(errs, a.tendLists(ctx, now))
	}
	if a.servingDue(now) {
		errs = append(errs, a.renewServing(ctx))
	}
	return errors.Join(errs...)
}

// renewServing makes a new key and certificate for the authority's own address.
// The key is in memory only. The root goes out with the chain, so that an agent
// that knows no more than the root's hash can find it.
func (a *Authority) renewServing(ctx context.Context) error {
	iss := a.intermediate.Load()
	// Before anything is recorded: what is below no root serves nobody.
	root, err := a.rootOf(iss, a.current())
	if err != nil {
		return fmt.Errorf("renewing the serving certificate: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("renewing the serving certificate: %w", err)
	}
	out, err := a.issue(ctx, iss, []certificate{{
		kind: capb.IssuanceRecord_KIND_SERVING, evidence: capb.IssuanceRecord_EVIDENCE_SELF,
		id: a.id, dnsNames: a.cfg.DNSNames, pub: key.Public(), ttl: a.cfg.SVID.AgentTTL,
	}})
	if err == nil {
		err = out[0].err
	}
	if err != nil {
		return fmt.Errorf("renewing the serving certificate: %w", err)
	}
	cert := &tls.Certificate{PrivateKey: key, Leaf: out[0].chain[0]}
	for _, c := range append(out[0].chain, root) {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	a.servingMu.Lock()
	defer a.servingMu.Unlock()
	a.serving.Store(cert)
	a.servingRenew = out[0].renewAt
	return nil
}

// servingDue reports whether the serving certificate has to be replaced: because of its
// time, or because it is not from the intermediate that signs now, whose root may be
// another.
func (a *Authority) servingDue(now time.Time) bool {
	a.servingMu.Lock()
	defer a.servingMu.Unlock()
	c, of := a.serving.Load(), a.intermediate.Load().cert
	switch {
	case !now.Before(a.servingRenew) || c == nil || now.Before(c.Leaf.NotBefore):
		return true
	case a.cfg.source() != sourceOwn:
		return false
	// A signature is verified once: this is asked every second.
	case a.servingOf == of && a.servingLeaf == c.Leaf:
		return false
	case c.Leaf.CheckSignatureFrom(of) != nil:
		return true
	}
	a.servingOf, a.servingLeaf = of, c.Leaf
	return false
}

// warn logs a refusal, at a bounded rate: refused callers must not fill a disk.
func (a *Authority) warn(message string, args ...any) {
	if a.warnings.Allow() {
		a.cfg.Log.Warn(message, args...)
	}
}

// Close signs the log's last head and closes the storage. Run and the services
// must have ended.
func (a *Authority) Close() error {
	return errors.Join(a.signHead(context.Background()), a.closeStorage())
}

func (a *Authority) closeStorage() error {
	return errors.Join(a.log.Close(), closeLogs(a.retiredLogs), a.store.Close(), a.keys.Close())
}
