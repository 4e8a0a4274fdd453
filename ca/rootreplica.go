package ca

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/external"
	"github.com/signet-mesh/signet/ca/journal"
	"github.com/signet-mesh/signet/ca/keys"
	"github.com/signet-mesh/signet/ca/profile"
	"github.com/signet-mesh/signet/storage"
)

// Where replicas share their state, the key of a root of their own is in a device that
// all reach, or with one of them. In the first case each makes its intermediates itself,
// and whoever holds a lease replaces the root. In the second case the others ask: a
// request waits in a replica's own part of the journal, where the one with the root sees
// it, and the answer is an entry of the state. Nobody has to be up at the same time.

const (
	signedPrefix  = "signed/"
	signedVersion = 1

	// answerAfter is the time between a request and the answer, so that one replica cannot
	// have the root sign more often. askEvery is how often the answer is looked for.
	answerAfter = 200 * time.Millisecond
	askEvery    = 250 * time.Millisecond
	// answerAgain is how often requests are looked for that could not be answered: no
	// change of the journal needs to follow them.
	answerAgain = 10 * time.Second
	// askAgain is how long nothing is asked for after an answer that could not be taken,
	// twice as long after each that follows, up to askAgainMost: each costs a signature of
	// the root and a record, and what is wrong is for people to mend.
	askAgain     = time.Second
	askAgainMost = 5 * time.Minute
	// leaseWait is how long an operator's step waits for another replica's.
	leaseWait = 10 * time.Second
	// heldUpAlarm is how long a step may be due and not be done because the lease for it
	// cannot be had: much longer than any step takes.
	heldUpAlarm = time.Minute
)

var (
	// errElsewhere is why a step of a rotation is not done here.
	errElsewhere = errors.New("another replica has the root's key (authority.rootReplica)")
	// errNoRoot is why a replica cannot join yet.
	errNoRoot = errors.New("there is no root yet: start the replica that has its key (authority.rootReplica)")
	// errBadAnswer is why the present intermediate goes on although there is an answer.
	errBadAnswer = errors.New("the answer of the replica with the root (authority.rootReplica) cannot be used")
)

// badAnswers is what is known of answers in a row that could not be taken.
type badAnswers struct {
	last  error
	times int
	until time.Time // before which nothing is asked for
	// revision is that of the last one: as long as it is there, there is no other.
	revision uint64
}

// add notes another one.
func (b *badAnswers) add(err error, now time.Time) {
	wait := askAgainMost
	if b.times < 16 {
		wait = min(wait, askAgain<<b.times)
	}
	b.last, b.times, b.until = err, b.times+1, now.Add(wait)
}

// signed is the answer to a request for an intermediate.
type signed struct {
	Version int `json:"version"`
	// Request is the SHA-256 of the request.
	Request []byte `json:"request"`
	// Certificate is what the root signed, DER.
	Certificate []byte `json:"certificate"`
}

func signedKey(instance uint8) string { return fmt.Sprintf("%s%03d", signedPrefix, instance) }

func parseSigned(e storage.Entry) (s signed, err error) {
	s, _, err = storage.ParseVersioned(e.Value, signedVersion, func(s signed) int { return s.Version })
	if err == nil && (len(s.Request) != sha256.Size || len(s.Certificate) == 0) {
		err = errors.New("it is incomplete")
	}
	if err != nil {
		return signed{}, fmt.Errorf("reading %s: %w", e.Key, err)
	}
	return s, nil
}

// checkRootReplica refuses what would let more than one replica hold the root's key, or
// none.
func (c Config) checkRootReplica() error {
	root := c.Keys.Made[keys.Root]
	file := root == "" || strings.HasPrefix(root, "softkms:")
	switch {
	case c.RootReplica > storage.MaxInstance:
		return fmt.Errorf("authority.rootReplica %d: must be an instance, 1 to %d", c.RootReplica, storage.MaxInstance)
	case c.source() != sourceOwn && c.RootReplica != 0:
		return errors.New("authority.rootReplica: the root is not this authority's own, so no replica has its key")
	case c.source() != sourceOwn:
		return nil
	case c.RootReplica == 0 && file:
		return errors.New("authority.keys.root is a file, and state is shared (storage.etcd): each replica would hold the key of the root, " +
			"so that taking any one over is taking all; name the one that holds it (authority.rootReplica), keep the key in a device that all reach (authority.keys.root), " +
			"or keep the root offline (authority.offlineRoot) or with another authority (authority.upstream)")
	case c.RootReplica != 0 && !file && c.Instance != c.RootReplica:
		return fmt.Errorf("authority.keys.root, and the root's key is with replica %d (authority.rootReplica): this one needs no way to it; leave authority.keys.root out", c.RootReplica)
	}
	return nil
}

// checkRootFiles refuses a replica that holds keys of roots and is not the one that may.
func (a *Authority) checkRootFiles(dir string) error {
	if a.cfg.source() != sourceOwn || a.cfg.RootReplica == a.instance {
		return nil
	}
	found, err := filepath.Glob(filepath.Join(dir, keysName, keys.Root+"-*.key"))
	if err != nil || len(found) == 0 {
		return err
	}
	if a.cfg.RootReplica == 0 {
		return fmt.Errorf("%s is the key of a root, and the key of the root is to be in a device that all replicas reach (authority.keys.root): let one replica hold this one "+
			"(authority.rootReplica) until that root has left the bundle, or delete the file here", filepath.Base(found[0]))
	}
	return fmt.Errorf("%s is the key of a root, and this is instance %d while authority.rootReplica is %d: a replica that does not sign with it must not hold it; move it to that replica, or delete it here",
		filepath.Base(found[0]), a.instance, a.cfg.RootReplica)
}

// holdsRoot reports whether this replica signs with the root's key. It is true where the
// root is somebody else's, too: then there is nobody else to ask.
func (a *Authority) holdsRoot() bool {
	return !a.cfg.shared() || a.cfg.RootReplica == 0 || a.cfg.RootReplica == a.instance
}

// adoptRoot makes the active root of the journal the one that this replica's
// intermediates stand below, after another replica has changed it. rotationMu is held, or
// nobody else runs yet.
func (a *Authority) adoptRoot() error {
	if !a.cfg.shared() || a.cfg.source() != sourceOwn {
		return nil
	}
	j := a.current()
	s, err := j.Rotation()
	if err != nil {
		return err
	}
	active, ok := s.Active()
	if root := a.root.Load(); !ok || root != nil && journal.ID(root.cert) == active.ID {
		return nil
	}
	iss, err := a.ownRoot(j, active.ID)
	if err != nil {
		return fmt.Errorf("opening root %s, which is active now: %w", active.ID, err)
	}
	a.root.Store(iss)
	a.staged.Store(nil) // below the former root
	return nil
}

// alone does a step of a rotation that only one replica may do at a time, and is none of
// this one if another has the root's key. With wait of 0 whoever else is at it is left
// to it, for heldUpAlarm; then that is an error. still reports whether there is something to do after what others did.
func (a *Authority) alone(ctx context.Context, wait time.Duration, still func() (bool, error), step func() error) error {
	if !a.cfg.shared() {
		return step()
	}
	if !a.holdsRoot() {
		return errElsewhere
	}
	within, cancel := context.WithTimeout(ctx, max(wait, time.Second))
	defer cancel()
	lease, err := a.store.Lease(within, "rotation", 10*time.Second)
	if err != nil {
		if wait == 0 && within.Err() != nil && ctx.Err() == nil {
			return a.heldUp()
		}
		return fmt.Errorf("waiting for another replica's step of a rotation: %w", err)
	}
	defer func() { _ = lease.Release(context.WithoutCancel(ctx)) }() // it expires in any case
	a.heldUpSince = time.Time{}
	if err := a.followJournal(ctx); err != nil {
		return err
	}
	if err := a.adoptRoot(); err != nil {
		return err
	}
	// What the watch told of agents may be old, and a root waits for each of them. Who
	// enrols from here on gets the trust that the journal has now.
	if err := a.rereadAgents(ctx); err != nil {
		return err
	}
	if due, err := still(); err != nil || !due {
		return err
	}
	return step()
}

// heldUp is nil if the lease for a step that is due could not be had and that is not for
// long yet. rotationMu is held.
func (a *Authority) heldUp() error {
	a.metrics.heldUp.Inc()
	now := time.Now()
	if a.heldUpSince.IsZero() {
		a.heldUpSince = now
		a.cfg.Log.Info("a step of a rotation is due, and left to another replica, which is at one")
	}
	if now.Sub(a.heldUpSince) < heldUpAlarm {
		return nil
	}
	return fmt.Errorf("a step of a rotation is due since %s and not done: another replica holds the lease for it and does not do it, or etcd does not give it: see which replica was at a rotation last (`signet ca authority list`, its log), and end it if it hangs",
		a.heldUpSince.UTC().Format(time.RFC3339))
}

// newRequest makes a key and a request for an intermediate below the root.
func (a *Authority) newRequest() (journal.Entry, error) {
	uri, key, err := a.keys.Create(keys.Intermediate)
	if err != nil {
		return journal.Entry{}, err
	}
	csr, err := external.Request(key, a.cfg.TrustDomain, a.instance)
	if err != nil {
		return journal.Entry{}, errors.Join(err, a.keys.Remove(keys.Intermediate, uri))
	}
	return journal.Entry{Kind: journal.KindIntermediate, State: journal.StatePending, Key: uri, Request: csr}, nil
}

// askRoot has the replica with the root's key sign another intermediate: it puts a
// request into the journal, and takes the answer when there is one. That there is none
// yet is no error: the present intermediate goes on. One that cannot be taken is an error
// that wraps errBadAnswer, and so it is for as long as nothing is asked for because of
// that. rotationMu is held, or nobody else runs yet.
func (a *Authority) askRoot(ctx context.Context) error {
	e, waits := a.current().Request()
	if bad := a.badAnswers; !waits && time.Now().Before(bad.until) {
		return fmt.Errorf("%w; it is asked again at %s", bad.last, bad.until.UTC().Format(time.RFC3339))
	}
	if !waits {
		e, err := a.newRequest()
		if err != nil {
			return err
		}
		if err := a.edit(ctx, func(j *journal.Journal) error { j.Authorities = append(j.Authorities, e); return nil }); err != nil {
			return a.dropKey(e, err)
		}
		a.cfg.Log.Info("the replica with the root is asked for an intermediate", "root_replica", a.cfg.RootReplica)
		return nil
	}
	iss, entry, err := a.rootsAnswer(ctx, e)
	if err != nil {
		err = fmt.Errorf("%w: %w", errBadAnswer, err)
		// Whatever is wrong with it, another key and request get another answer.
		drop := func(j *journal.Journal) error {
			j.Authorities = slices.DeleteFunc(j.Authorities, func(o journal.Entry) bool { return o.State == journal.StatePending && o.Key == e.Key })
			return nil
		}
		if editErr := a.edit(ctx, drop); editErr != nil {
			return errors.Join(err, editErr)
		}
		a.badAnswers.add(err, time.Now())
		return a.dropKey(e, err)
	}
	if iss == nil {
		return nil
	}
	a.badAnswers = badAnswers{}
	return a.use(ctx, &staged{issuer: iss, entry: entry, root: a.root.Load().cert})
}

// rootsAnswer is the intermediate that was signed for a request; nil if there is none yet. An
// error wraps what is wrong with the one that there is, and is told of each once.
func (a *Authority) rootsAnswer(ctx context.Context, e journal.Entry) (iss *issuer, entry journal.Entry, err error) {
	got, err := a.store.Get(ctx, signedKey(a.instance))
	if err != nil || got.Revision == a.badAnswers.revision {
		return nil, e, nil // none, or it cannot be read now: it is looked for again
	}
	defer func() {
		if err != nil {
			a.badAnswers.revision = got.Revision
		}
	}()
	s, err := parseSigned(got)
	if err != nil {
		return nil, e, err
	}
	if sum := sha256.Sum256(e.Request); !bytes.Equal(s.Request, sum[:]) {
		return nil, e, nil // of a former one
	}
	c, err := x509.ParseCertificate(s.Certificate)
	if err != nil {
		return nil, e, fmt.Errorf("what the replica with the root signed: %w", err)
	}
	root := a.root.Load().cert
	if !bytes.Equal(c.AuthorityKeyId, root.SubjectKeyId) {
		return nil, e, nil // of a former root, or of one that is active and not known here yet
	}
	pub, err := e.Public()
	if err != nil {
		return nil, e, err
	}
	now, err := a.clock.now()
	if err != nil {
		return nil, e, nil // it is looked for again when the clock is right
	}
	_, err = external.Check([]*x509.Certificate{c}, external.Profile{TrustDomain: a.cfg.TrustDomain, DNSNames: a.cfg.DNSNames, Key: pub, Roots: []*x509.Certificate{root}}, now)
	if err == nil && c.NotAfter.Sub(now) < 2*max(a.cfg.SVID.TTL, a.cfg.SVID.AgentTTL) && c.NotAfter.Before(root.NotAfter) {
		err = fmt.Errorf("validity: it ends at %s; it must last twice as long as an SVID", c.NotAfter.Format(time.RFC3339))
	}
	if err != nil {
		return nil, e, fmt.Errorf("what the replica with the root signed: %w", err)
	}
	key, err := a.keys.Open(keys.Intermediate, e.Key, pub)
	if err != nil {
		return nil, e, err
	}
	return &issuer{cert: c, key: key, chain: []*x509.Certificate{c}},
		journal.Entry{Kind: journal.KindIntermediate, State: journal.StateActive, Certificate: c.Raw, Key: e.Key}, nil
}

// awaitIntermediate is for a replica that has none that is valid, below a root that is
// trusted: it asks until it has.
// Nobody else runs yet.
func (a *Authority) awaitIntermediate(ctx context.Context) error {
	valid := func() bool {
		iss := a.intermediate.Load()
		return iss != nil && a.clock.past().Before(iss.cert.NotAfter) && !a.orphaned()
	}
	for said := ""; !valid(); {
		err := a.followJournal(ctx)
		if err == nil {
			err = a.adoptRoot()
		}
		if err == nil && a.root.Load() != nil {
			err = a.askRoot(ctx)
		}
		if valid() {
			break
		}
		if text := fmt.Sprint(err); text != said {
			said = text
			a.cfg.Log.Warn("nothing can be issued before the replica with the root has signed an intermediate for this one", "root_replica", a.cfg.RootReplica, "err", err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for replica %d to sign an intermediate: %w", a.cfg.RootReplica, context.Cause(ctx))
		case <-time.After(askEvery):
		}
	}
	return nil
}

// answerRequests signs what other replicas ask for. One that cannot be answered is an
// alarm: this replica and the others are as good as before.
func (a *Authority) answerRequests(ctx context.Context) error {
	j := a.current()
	var errs []error
	for _, n := range slices.Sorted(maps.Keys(j.Others)) {
		e, waits := journal.Journal{Authorities: j.Others[n]}.Request()
		if !waits {
			continue
		}
		instance, err := strconv.ParseUint(n, 10, 7)
		if err == nil {
			err = a.signFor(ctx, uint8(instance), e)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("the request of replica %s: %w", n, err))
		}
	}
	a.alarm("requests of replicas", errors.Join(errs...))
	return nil
}

// signFor signs an intermediate for another replica, unless that has been done. Of the
// request the key counts and nothing else.
func (a *Authority) signFor(ctx context.Context, instance uint8, e journal.Entry) error {
	a.rotationMu.Lock()
	root := a.root.Load() // it is active, or was a moment ago: then the other one asks on
	a.rotationMu.Unlock()
	sum := sha256.Sum256(e.Request)
	was, err := a.store.Get(ctx, signedKey(instance))
	switch {
	case errors.Is(err, storage.ErrNotFound):
		was.Revision = 0
	case err != nil:
		return err
	default:
		s, err := parseSigned(was)
		if errors.Is(err, storage.ErrNewerFormat) {
			return err
		}
		if err == nil && bytes.Equal(s.Request, sum[:]) {
			c, err := x509.ParseCertificate(s.Certificate)
			if err == nil && bytes.Equal(c.AuthorityKeyId, root.cert.SubjectKeyId) && a.clock.past().Before(c.NotAfter) {
				return nil
			}
		}
	}
	csr, err := x509.ParseCertificateRequest(e.Request)
	if err == nil {
		err = csr.CheckSignature()
	}
	var pub any
	if err == nil {
		pub, err = profile.ParsePublicKey(csr.RawSubjectPublicKeyInfo, []string{profile.KeyP256, profile.KeyP384, profile.KeyP521, profile.KeyRSA})
	}
	if err != nil {
		return fmt.Errorf("%w; it is left unanswered", err)
	}
	out, err := a.issue(ctx, root, []certificate{{kind: capb.IssuanceRecord_KIND_INTERMEDIATE, evidence: capb.IssuanceRecord_EVIDENCE_SELF, pub: pub, ttl: a.cfg.IntermediateTTL, forInstance: instance}})
	if err == nil {
		err = out[0].err
	}
	if err != nil {
		return err
	}
	c := out[0].chain[0]
	b, err := json.Marshal(signed{Version: signedVersion, Request: sum[:], Certificate: c.Raw})
	if err != nil {
		return err
	}
	if _, err := a.store.Commit(ctx, []storage.Cond{{Key: signedKey(instance), Revision: was.Revision}}, []storage.Op{{Key: signedKey(instance), Value: b}}); err != nil {
		return err
	}
	a.cfg.Log.Info("an intermediate is signed for another replica", "instance", instance, "serial", journal.ID(c), "not_after", c.NotAfter)
	return nil
}

// watchRequest raises the alarm when the intermediate comes to its end and the replica
// with the root does not answer: when less than a third, and again when less than a tenth
// of its life is left.
func (a *Authority) watchRequest(now time.Time) {
	if a.holdsRoot() {
		return
	}
	iss := a.intermediate.Load()
	_, waits := a.current().Request()
	life, left := iss.cert.NotAfter.Sub(iss.cert.NotBefore), iss.cert.NotAfter.Sub(now)
	part := ""
	switch {
	case left < life/10:
		part = "a tenth"
	case left < life/3:
		part = "a third"
	}
	if !waits && a.badAnswers.last == nil || part == "" {
		a.alarm("root replica", nil)
		return
	}
	a.alarm("root replica", fmt.Errorf("less than %s is left of the life of the intermediate, which ends at %s, and replica %d, which has the root's key (authority.rootReplica), has not signed the next: start it",
		part, iss.cert.NotAfter.Format(time.RFC3339), a.cfg.RootReplica))
}
