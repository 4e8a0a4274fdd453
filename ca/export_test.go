package ca

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/journal"
	"github.com/signet-mesh/signet/ca/profile"
	"github.com/signet-mesh/signet/storage"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var ValidDNSName = validDNSName

// WrapKeys replaces the signing keys of root and intermediate.
func (a *Authority) WrapKeys(wrap func(crypto.Signer) crypto.Signer) {
	root := *a.root.Load()
	root.key = wrap(root.key)
	a.root.Store(&root)
	inter := *a.intermediate.Load()
	inter.key = wrap(inter.key)
	a.intermediate.Store(&inter)
}

func (a *Authority) Root() *x509.Certificate         { return a.root.Load().cert }
func (a *Authority) Intermediate() *x509.Certificate { return a.intermediate.Load().cert }
func (a *Authority) Log() *storage.FileLog           { return a.log }
func (a *Authority) Store() *storage.Bolt            { return a.store.(*storage.Bolt) }
func (a *Authority) SignHead(ctx context.Context) error {
	return a.signHead(ctx)
}
func (a *Authority) VerifyHead(h storage.Head) bool { return a.verifyHead(h) }
func (a *Authority) RenewIntermediate(ctx context.Context) error {
	a.rotationMu.Lock()
	defer a.rotationMu.Unlock()
	return a.renewIntermediate(ctx)
}

// SetClock makes the authority see another time, and forget the newest it saw.
func (a *Authority) SetClock(now func() time.Time, newest time.Time) {
	a.clock.mu.Lock()
	defer a.clock.mu.Unlock()
	a.clock.wall, a.clock.newest = now, newest
	a.clock.known, a.clock.knownAt = newest, a.clock.mono()
}

// WithWall gives an authority that will be opened another system clock.
func WithWall(c *Config, wall func() time.Time) { c.wall = wall }

// WithBanSerials gives an authority that will be opened another limit of the certificates
// that bans of nodes mean.
func WithBanSerials(c *Config, n int) { c.maxBanSerials = n }

// LookAgainAtNodes has background work look at banned nodes as after a pause.
func (a *Authority) LookAgainAtNodes() {
	a.nodes.mu.Lock()
	defer a.nodes.mu.Unlock()
	for _, nodes := range []map[string]heldNode{a.nodes.held, a.nodes.cut} {
		for subject, h := range nodes {
			nodes[subject] = heldNode{err: h.err}
		}
	}
}

// TooManyHeads reports whether a head of the log that a node returns now is not compared.
func (a *Authority) TooManyHeads(node string) bool { return a.heads.Take(node, 1, time.Now()) > 0 }

// Tick does once what Run does again and again.
func (a *Authority) Tick(ctx context.Context) error {
	a.keyUses.expire(a.clock.past())
	a.tidyFiles()
	return errors.Join(a.tendClock(ctx), a.renew(ctx), a.forgetAgents(ctx), a.tendBans(ctx), a.tendRevoked(ctx), a.pruneLog(ctx), a.signHead(ctx))
}

// PruneLog removes old records and logs.
func (a *Authority) PruneLog(ctx context.Context) error { return a.pruneLog(ctx) }

// Revoke takes a certificate back.
func (a *Authority) Revoke(ctx context.Context, serial []byte) error {
	_, _, err := a.revoke(ctx, serial, 4, "a test", "a test")
	return err
}

// RecordRevoked records that certificates are revoked.
func (a *Authority) RecordRevoked(ctx context.Context, ds ...*capb.Decision) (int, error) {
	a.revokeMu.Lock()
	defer a.revokeMu.Unlock()
	return a.recordRevoked(ctx, ds...)
}

// TendRevoked stores what was recorded as revoked and is not in the state.
func (a *Authority) TendRevoked(ctx context.Context) error { return a.tendRevoked(ctx) }

// AnswerRevocations answers what other replicas ask.
func (a *Authority) AnswerRevocations(ctx context.Context) error { return a.answerRevocations(ctx) }

// CatchUp reads the shared state as after a watch of it was lost.
func (a *Authority) CatchUp(ctx context.Context) error {
	_, err := a.catchUp(ctx)
	return err
}

// Revoked is how many certificates are known to be revoked.
func (a *Authority) Revoked() int { return len(a.revoked.Value()) }

// Records is how many agents' records are kept, those that have ended, too.
func (a *Authority) Records() int {
	a.agents.mu.RLock()
	defer a.agents.mu.RUnlock()
	return len(a.agents.bySerial)
}

// Past is the latest moment that is certainly over.
func (a *Authority) Past() time.Time { return a.clock.past() }

// Agents is the number of agent SVIDs on record.
func (a *Authority) Agents() int { return len(a.agents.status()) }

// ClockAt is what the clock says when the wall says t, and something was recorded
// at newest.
func ClockAt(t, newest time.Time) (time.Time, error) {
	c := &clock{wall: func() time.Time { return t }}
	c.recorded(newest)
	return c.now()
}

// Certify runs the ceremony for one certificate of a kind, under the authority that
// signs that kind.
func (a *Authority) Certify(ctx context.Context, kind capb.IssuanceRecord_Kind, id spiffeid.ID, dnsNames []string, pub crypto.PublicKey, ttl time.Duration) ([]*x509.Certificate, error) {
	iss := a.intermediate.Load()
	if kind == capb.IssuanceRecord_KIND_INTERMEDIATE {
		iss = a.root.Load()
	}
	out, err := a.issue(ctx, iss, []certificate{{kind: kind, evidence: capb.IssuanceRecord_EVIDENCE_SELF, id: id, dnsNames: dnsNames, pub: pub, ttl: ttl}})
	if err != nil {
		return nil, err
	}
	return out[0].chain, out[0].err
}

// ProfileOf is the profile that a certificate has which issuer signed; a nil issuer
// means itself.
func ProfileOf(kind capb.IssuanceRecord_Kind, c, issuer *x509.Certificate) profile.Profile {
	p := profile.Profile{Kind: kind, Serial: profile.Serial(c), NotBefore: c.NotBefore, NotAfter: c.NotAfter, SPKI: c.RawSubjectPublicKeyInfo,
		URI: c.URIs[0].String(), DNSNames: c.DNSNames, Subject: c.RawSubject, Issuer: c.RawIssuer, Signer: c.PublicKey}
	if issuer != nil {
		p.IssuerKey, p.Signer = issuer.SubjectKeyId, issuer.PublicKey
	}
	return p
}

// KeyUses is the memory of certified keys.
type KeyUses struct{ u *keyUses }

func NewKeyUses(limit int, forgot func(int)) KeyUses { return KeyUses{newKeyUses(limit, forgot)} }

func (k KeyUses) Claim(keyHash []byte, identity string, notAfter, now time.Time) error {
	return k.u.claim(keyHash, identity, notAfter, now)
}
func (k KeyUses) Expire(now time.Time) { k.u.expire(now) }
func (k KeyUses) Len() int             { return k.u.len() }

// CertifiedKeys is how many keys the authority remembers.
func (a *Authority) CertifiedKeys() int { return a.keyUses.len() }

// Rotate does a step of a rotation as an operator.
func (a *Authority) Rotate(ctx context.Context, step capb.RotateRequest_Step, id string, force bool) error {
	_, err := a.rotateBy(ctx, &capb.RotateRequest{Step: step, Id: id, Force: force}, "a test")
	return err
}

// RotateDue does what is due by the schedule.
func (a *Authority) RotateDue(ctx context.Context) error { return a.rotateDue(ctx) }

// Stages are where its own roots stand, by ID.
func (a *Authority) Stages() (map[string]string, error) {
	s, err := a.rotationState()
	stages := map[string]string{}
	for _, r := range s.Roots {
		stages[r.ID] = string(r.Stage)
	}
	return stages, err
}

// RewriteJournal reads a journal and writes it in the present format, indented.
func RewriteJournal(b []byte) ([]byte, error) {
	j, err := journal.Parse(b)
	if err != nil {
		return nil, err
	}
	if _, err := j.Rotation(); err != nil {
		return nil, err
	}
	return json.MarshalIndent(j, "", "  ")
}

// Behind are the nodes whose agents have not acknowledged a state of trust.
func (a *Authority) Behind(sequence uint64) []string { return a.behind(sequence, time.Now()) }

// Relist publishes another state of trust, with new lists where there are any.
func (a *Authority) Relist(ctx context.Context) error { return a.relist(ctx) }

// RenewServing makes a new serving certificate.
func (a *Authority) RenewServing(ctx context.Context) error { return a.renewServing(ctx) }

// VerifyAll is what an operator's verification of log and state finds.
func (a *Authority) VerifyAll(ctx context.Context) ([]string, error) {
	b, err := a.read(ctx)
	if err != nil {
		return nil, err
	}
	v, err := b.Verify(ctx, nil, true)
	return v.GetProblems(), err
}

// Banned reports whether a serial is banned.
func (a *Authority) Banned(serial []byte) bool { return a.banned().set.Serial(serial) != nil }

// AddBanAs bans a subject for a client that may leave.
func (a *Authority) AddBanAs(ctx context.Context, subject string) error {
	_, err := a.addBan(ctx, subject, "r", time.Time{}, "a test")
	return err
}

// RecordingAwaited reports whether somebody waits for what is under way to be recorded.
func (a *Authority) RecordingAwaited() bool {
	if a.recording.TryRLock() {
		a.recording.RUnlock()
		return false
	}
	return true
}

// TendBans does the background work of bans once.
func (a *Authority) TendBans(ctx context.Context) error { return a.tendBans(ctx) }

// RequestHash is the SHA-256 of the request for an intermediate that waits; nil if none
// does.
func (a *Authority) RequestHash() []byte {
	e, waits := a.current().Request()
	if !waits {
		return nil
	}
	sum := sha256.Sum256(e.Request)
	return sum[:]
}

// AskAgainAt is when the replica with the root is asked for an intermediate again after
// answers that could not be taken, and how many there were.
func (a *Authority) AskAgainAt() (at time.Time, bad int) {
	a.rotationMu.Lock()
	defer a.rotationMu.Unlock()
	return a.badAnswers.until, a.badAnswers.times
}

// SetAskAgain has it asked again at a time.
func (a *Authority) SetAskAgain(at time.Time) {
	a.rotationMu.Lock()
	defer a.rotationMu.Unlock()
	a.badAnswers.until = at
}

// PauseAfter is how long nothing is asked for after so many bad answers in a row.
func PauseAfter(n int) time.Duration {
	var b badAnswers
	now := time.Now()
	for range n {
		b.add(errBadAnswer, now)
	}
	return b.until.Sub(now)
}

// SayAcknowledged stores what agents said.
func (a *Authority) SayAcknowledged(ctx context.Context) error { return a.sayAcknowledged(ctx) }

// TendClock keeps the time, if it is due.
func (a *Authority) TendClock(ctx context.Context) error { return a.tendClock(ctx) }

// ReloadBans takes up the bans that are stored.
func (a *Authority) ReloadBans(ctx context.Context) error { return a.reloadBans(ctx) }

// FollowChange takes up a change of the journal that a watch tells of.
func (a *Authority) FollowChange(ctx context.Context, revision uint64) error {
	return a.followed(ctx, storage.Event{Entry: storage.Entry{Key: journal.Key, Revision: revision}})
}

// HeldUpSince has the lease for a step that is due missing since another time, if it is
// missing, and returns since when it was.
func (a *Authority) HeldUpSince(t time.Time) (was time.Time) {
	a.rotationMu.Lock()
	defer a.rotationMu.Unlock()
	if was = a.heldUpSince; !was.IsZero() {
		a.heldUpSince = t
	}
	return was
}

// Strangers is how many first attestations have a place.
func (a *Authority) Strangers() int { return a.strangers.Taken() }
