package ca

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/journal"
	"github.com/signet-mesh/signet/ca/profile"
	"github.com/signet-mesh/signet/ca/revocation"
	"github.com/signet-mesh/signet/storage"

	"google.golang.org/protobuf/proto"
)

// maxRevoked bounds the certificates that are revoked at one time: a list of so many
// fits into an entry of the store and a message to agents. Who has to take back more
// replaces the intermediate.
const maxRevoked = 8192

// listPause is how long after a failure lists are not signed again.
const listPause = time.Minute

// storeTime is how long it may take to make part of the state what the log says.
const storeTime = 5 * time.Second

var (
	// errNotIssued is why a serial is not revoked that is in no log.
	errNotIssued = errors.New("no such certificate was issued")
	// errNotRevoked is why a certificate is not revoked.
	errNotRevoked = errors.New("it cannot be revoked")
)

// lists are the newest CRLs, by the subject key identifier of their authority. Safe for
// concurrent use.
type lists struct {
	mu    sync.Mutex
	by    map[string]*x509.RevocationList // guarded by mu; not changed
	retry time.Time                       // before which nothing is tried again; guarded by mu
	err   error                           // why some could not be signed; guarded by mu
	also  []revocation.Entry              // what was revoked when by was read; guarded by mu
}

func (l *lists) alsoRevoked() []revocation.Entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.also
}

// read replaces the lists, and what was revoked, by those of one moment of the state.
func (l *lists) read(by map[string]*x509.RevocationList, revoked []revocation.Entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.by, l.also = by, revoked
}

// failed notes whether all lists that had to be were signed.
func (l *lists) failed(err error, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err, l.retry = err, (time.Time{}); err != nil {
		l.retry = now.Add(listPause)
	}
}

func (l *lists) failure() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

func (l *lists) value() map[string]*x509.RevocationList {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.by
}

func (l *lists) store(by map[string]*x509.RevocationList) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.by = by
}

// all are the lists in the order of their authorities.
func (l *lists) all() (out []*x509.RevocationList) {
	by := l.value()
	for _, authority := range slices.Sorted(maps.Keys(by)) {
		out = append(out, by[authority])
	}
	return out
}

// earliest is when the first of them has to be replaced; zero if there is none.
func (l *lists) earliest() (end time.Time) {
	for _, c := range l.value() {
		if end.IsZero() || c.NextUpdate.Before(end) {
			end = c.NextUpdate
		}
	}
	return end
}

// loadRevocations reads what was revoked, and the lists.
func (a *Authority) loadRevocations(ctx context.Context) error {
	entries, _, err := a.store.List(ctx, revocation.Prefix)
	if err != nil {
		return fmt.Errorf("reading revocations: %w", err)
	}
	set := revocation.Set{}
	for _, s := range entries {
		e, err := revocation.Parse(s)
		if err != nil {
			return err
		}
		set[string(e.Serial)] = e
	}
	a.revoked.Store(set)
	if entries, _, err = a.store.List(ctx, revocation.ListPrefix); err != nil {
		return fmt.Errorf("reading CRLs: %w", err)
	}
	by, err := parseLists(entries)
	if err == nil {
		a.lists.store(by)
	}
	return err
}

func parseLists(entries []storage.Entry) (map[string]*x509.RevocationList, error) {
	by := map[string]*x509.RevocationList{}
	for _, s := range entries {
		c, err := revocation.ParseList(s)
		if err != nil {
			return nil, err
		}
		by[string(c.AuthorityKeyId)] = c
	}
	return by, nil
}

// startLists brings the state and the lists to what the log and the configuration say:
// what was recorded and not stored, because of a crash or in a backup, is revoked. Each
// start takes a new sequence where there are lists, so that one never means two states.
func (a *Authority) startLists(ctx context.Context) error {
	if err := a.tendRevoked(ctx); err != nil {
		return err
	}
	if !a.cfg.CRL.Enabled && a.cfg.shared() {
		// Those of this replica leave with a change of trust of their own.
		if !slices.ContainsFunc(a.lists.all(), func(c *x509.RevocationList) bool { return a.hasKey(c.AuthorityKeyId) }) {
			return nil
		}
	} else if !a.cfg.CRL.Enabled {
		var ops []storage.Op
		for authority := range a.lists.value() {
			ops = append(ops, storage.Op{Key: revocation.ListKey([]byte(authority)), Delete: true})
		}
		if len(ops) == 0 {
			return nil
		}
		for part := range storage.Parts(ops) {
			if _, err := a.store.Commit(ctx, nil, part); err != nil {
				return fmt.Errorf("removing CRLs that are not published any more: %w", err)
			}
		}
		a.lists.store(nil)
	} else if err := revocation.CanSign(a.intermediate.Load().cert); err != nil {
		return fmt.Errorf("authority.crl: %w", err)
	}
	return a.relist(ctx)
}

// recall notes a revocation of the log that is not in the state.
func (a *Authority) recall(r *capb.RevokedCertificate, d *capb.Decision, now time.Time) {
	e := entryOf(r, d)
	if a.revoked.Value().Has(e.Serial) || !now.Before(e.Until) {
		return
	}
	a.revokeMu.Lock()
	defer a.revokeMu.Unlock()
	a.unstored = append(a.unstored, e)
}

// entryOf is what a decision of the log says.
func entryOf(r *capb.RevokedCertificate, d *capb.Decision) revocation.Entry {
	return revocation.Entry{Serial: r.GetSerial(), SPIFFEID: r.GetSpiffeId(), Authority: r.GetAuthority(), Reason: revocation.Reason(r.GetReason()),
		Comment: d.GetReason(), By: d.GetBy(), Revoked: time.Unix(r.GetRevoked(), 0).UTC(), Until: time.Unix(r.GetNotAfter(), 0).UTC()}
}

// storeRevoked makes part of the state what was recorded as revoked and is not known to
// be there, whoever waits for that. It counts here before. What could not be stored is
// tried again: by who asks to have it revoked again, by tendRevoked, and at the next start.
// revokeMu is held.
func (a *Authority) storeRevoked(ctx context.Context) error {
	if set := a.revoked.Value(); slices.ContainsFunc(a.unstored, func(e revocation.Entry) bool { return !set.Has(e.Serial) }) {
		a.revoked.Store(set.With(a.unstored...))
	}
	for len(a.unstored) > 0 {
		part := a.unstored[:min(len(a.unstored), storage.MaxOps)]
		ops, said := make([]storage.Op, 0, len(part)), map[string]bool{}
		for _, e := range part {
			b, err := e.Encode()
			if err != nil {
				return err
			}
			// The log can say it twice, a commit cannot.
			if key := revocation.Key(e.Serial); !said[key] {
				ops, said[key] = append(ops, storage.Op{Key: key, Value: b}), true
			}
		}
		within, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeTime)
		_, err := a.store.Commit(within, nil, ops)
		cancel()
		if err != nil {
			return fmt.Errorf("%w: recording a revocation: %w", ErrUnavailable, err)
		}
		a.unstored = a.unstored[len(part):]
	}
	return nil
}

// tendRevoked stores what the log says and the state does not.
func (a *Authority) tendRevoked(ctx context.Context) error {
	a.revokeMu.Lock()
	defer a.revokeMu.Unlock()
	return a.storeRevoked(ctx)
}

// withKnown is what was revoked by a state that was read, and what is known here to be:
// of what this replica has recorded, or stored after that was read. What is revoked
// stays so until it need not be said any more. revokeMu is held.
func (a *Authority) withKnown(read revocation.Set) revocation.Set {
	known, _ := a.revoked.Value().With(a.unstored...).Split(a.clock.past(), a.cfg.CRL.Lifetime)
	maps.Copy(known, read)
	return known
}

// recordable cuts decisions into parts that the log takes at once.
func recordable(ds []*capb.Decision) iter.Seq[[]*capb.Decision] {
	const around = 32 // the record of a decision is so much longer, at most
	return func(yield func([]*capb.Decision) bool) {
		for len(ds) > 0 {
			n, size := 1, proto.Size(ds[0])+around
			for ; n < min(len(ds), storage.MaxRecords); n++ {
				if size += proto.Size(ds[n]) + around; size > storage.MaxAppend {
					break
				}
			}
			if !yield(ds[:n]) {
				return
			}
			ds = ds[n:]
		}
	}
}

// recordRevoked records that certificates are revoked: in the log first, because what is
// there a start makes part of the state, and then in the state. What is recorded counts,
// whatever became of the commit. n is how many are recorded. Who leaves meanwhile does not
// leave half of it behind: nobody would know whether the log has it. revokeMu is held.
func (a *Authority) recordRevoked(ctx context.Context, ds ...*capb.Decision) (n int, err error) {
	for part := range recordable(ds) {
		if ctx.Err() != nil {
			return n, fmt.Errorf("%w: recording a revocation: %w", ErrUnavailable, context.Cause(ctx))
		}
		if err := a.decide(context.WithoutCancel(ctx), part...); err != nil {
			return n, err
		}
		n += len(part)
		for _, d := range part {
			a.unstored = append(a.unstored, entryOf(d.GetRevoked(), d))
		}
		if err := a.storeRevoked(ctx); err != nil {
			return n, err
		}
	}
	return n, nil
}

// Revoke takes a certificate back that this authority issued: recorded in the log and
// in the state, refused here from then on, and on a new CRL if there are any. Again is
// true if it was revoked before; nothing changes then, but that it becomes part of the
// state if it is not yet. An error wraps errNotIssued or
// errNotRevoked where the serial is the reason, and nothing was recorded.
func (a *Authority) revoke(ctx context.Context, serial []byte, reason revocation.Reason, comment, by string) (e revocation.Entry, again bool, err error) {
	a.revokeMu.Lock()
	defer a.revokeMu.Unlock()
	set := a.revoked.Value()
	if e, again := set[string(serial)]; again {
		if slices.ContainsFunc(a.unstored, func(u revocation.Entry) bool { return bytes.Equal(u.Serial, serial) }) {
			err = a.storeRevoked(ctx)
		}
		return e, err == nil, err
	}
	switch {
	case !reason.Valid():
		return e, false, fmt.Errorf("%w: %v is not one that is taken", errNotRevoked, reason)
	case len(comment) > revocation.MaxComment:
		return e, false, fmt.Errorf("%w: a comment of %d bytes; at most %d are allowed", errNotRevoked, len(comment), revocation.MaxComment)
	case len(set) >= maxRevoked:
		return e, false, fmt.Errorf("%w: %d certificates are revoked already, which is the most; replace the intermediate instead", errNotRevoked, len(set))
	}
	now := a.clock.past() // also by a clock that cannot be believed
	r, err := a.issuedRecord(ctx, serial)
	if err != nil {
		return e, false, err
	}
	until := time.Unix(r.GetNotAfter(), 0).UTC()
	switch {
	case r.GetKind() == capb.IssuanceRecord_KIND_ROOT || r.GetKind() == capb.IssuanceRecord_KIND_INTERMEDIATE:
		return e, false, fmt.Errorf("%w: %x is the authority's own %s: no list of its own can take it back; replace the root", errNotRevoked, serial, strings.ToLower(strings.TrimPrefix(r.GetKind().String(), "KIND_")))
	case !now.Before(until):
		return e, false, fmt.Errorf("%w: %x expired at %s", errNotRevoked, serial, until.Format(time.RFC3339))
	}
	revoked := &capb.RevokedCertificate{Serial: serial, SpiffeId: r.GetSpiffeId(), Authority: r.GetAuthority(), Reason: uint32(reason), Revoked: now.Unix(), NotAfter: r.GetNotAfter()}
	d := &capb.Decision{What: capb.Decision_WHAT_REVOKED, Instance: uint32(a.instance), Reason: comment, By: by, Revoked: revoked}
	if e = entryOf(revoked, d); len(e.Authority) == 0 {
		return e, false, fmt.Errorf("%w: the record of %x does not name its issuer", errNotRevoked, serial)
	}
	if _, err := a.recordRevoked(ctx, d); err != nil {
		return e, false, err
	}
	a.cfg.Log.Warn("certificate revoked", "serial", fmt.Sprintf("%x", serial), "spiffe_id", e.SPIFFEID, "reason", reason.String(), "by", by)
	return e, false, nil
}

// issuedRecord is the record of a certificate.
func (a *Authority) issuedRecord(ctx context.Context, serial []byte) (*capb.IssuanceRecord, error) {
	if len(serial) != profile.SerialLength {
		return nil, fmt.Errorf("%w: a serial of this authority has %d bytes, this one has %d", errNotIssued, profile.SerialLength, len(serial))
	}
	b, err := a.read(ctx)
	if err != nil {
		return nil, err
	}
	for _, l := range b.logs {
		if l.instance != uint32(serial[0]) {
			continue
		}
		// A serial carries its time, and its record is of about then.
		from, to := profile.SerialTime(serial).Add(-serialSlack), a.recordedBy(profile.SerialTime(serial))
		for rec, err := range l.Scan(ctx, l.Since(from)) {
			if err != nil {
				return nil, err
			}
			if rec.Time.After(to) {
				break
			}
			r := &capb.IssuanceRecord{}
			if err := proto.Unmarshal(rec.Data, r); err != nil {
				return nil, fmt.Errorf("record %d of instance %d: %w", rec.Sequence, l.instance, err)
			}
			if bytes.Equal(r.GetSerial(), serial) {
				return r, nil
			}
		}
	}
	return nil, fmt.Errorf("%w: the issuance log has no record of %x", errNotIssued, serial)
}

// listIssuers are the authorities that need a list: those whose certificates can be
// valid, and the one that is about to be used. Of one without a key nobody has it any
// more.
func (a *Authority) listIssuers(j journal.Journal, now time.Time) (out []*issuer, err error) {
	add := func(iss *issuer) {
		if now.Before(iss.cert.NotAfter) && !slices.ContainsFunc(out, func(o *issuer) bool { return o.cert.Equal(iss.cert) }) {
			out = append(out, iss)
		}
	}
	if s := a.staged.Load(); s != nil {
		add(s.issuer)
	}
	if iss := a.intermediate.Load(); iss != nil {
		add(iss)
	}
	var errs []error
	for _, e := range j.Authorities {
		if e.Kind != journal.KindIntermediate || e.State != journal.StateActive && e.State != journal.StateOld {
			continue
		}
		c, err := e.Cert()
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(out, func(o *issuer) bool { return o.cert.Equal(c) }) || !now.Before(c.NotAfter) {
			continue
		}
		iss := &issuer{cert: c}
		if e.Key != "" {
			if iss.key, err = a.keys.Open(e.Kind, e.Key, c.PublicKey); err != nil {
				errs = append(errs, fmt.Errorf("the CRL of %s: %w", c.Subject, err))
			}
		}
		out = append(out, iss)
	}
	return out, errors.Join(errs...)
}

// journalOps is how many operations a change of the journal takes, of those of a commit: one
// for what replicas have in common, and one for what is this one's own.
const journalOps = 2

// signedLists are lists that were signed and are not stored yet.
type signedLists struct {
	by  map[string]*x509.RevocationList // all that there will be, by authority
	ops []storage.Op
}

// makeLists signs a list of each authority whose key is here, under the number of a
// journal; the lists of others stay, of those that are in the journal. Where one cannot
// be signed the former one stays, and the error says so. shared: other replicas
// have theirs in the same state.
func (a *Authority) makeLists(j journal.Journal, shared bool) (out signedLists, err error) {
	past := a.clock.past()
	now, err := a.clock.now()
	if err != nil {
		return signedLists{}, fmt.Errorf("signing CRLs: %w", err)
	}
	set, before := a.revoked.Value().With(a.lists.alsoRevoked()...), a.lists.value()
	issuers, err := a.listIssuers(j, now)
	errs := []error{err}
	out.by = map[string]*x509.RevocationList{}
	if shared {
		kept, err := othersLists(j, before, now)
		if err != nil {
			return signedLists{}, fmt.Errorf("signing CRLs: %w", err)
		}
		out.by = kept
	}
	if !a.cfg.CRL.Enabled {
		issuers = nil
	}
	for _, iss := range issuers {
		id := string(iss.cert.SubjectKeyId)
		if old := before[id]; old != nil {
			out.by[id] = old
		}
		if iss.key == nil {
			continue
		}
		c, err := revocation.Sign(revocation.Order{Issuer: iss.cert, Key: iss.key, Number: j.Sequence,
			// By a clock in doubt a list must not begin in what others have for the future.
			From: earlier(now, past).Add(-a.cfg.SVID.Backdate), Until: now.Add(a.cfg.CRL.Lifetime), Revoked: set})
		if err != nil {
			errs = append(errs, err)
			continue
		}
		out.by[id] = c
		out.ops = append(out.ops, storage.Op{Key: revocation.ListKey(iss.cert.SubjectKeyId), Value: c.Raw})
	}
	for id := range before {
		if out.by[id] != nil {
			continue
		}
		if shared && len(out.ops) >= storage.MaxOps-journalOps {
			out.by[id] = before[id] // what is not removed is said; the next change removes it
		} else {
			out.ops = append(out.ops, storage.Op{Key: revocation.ListKey([]byte(id)), Delete: true})
		}
	}
	return out, errors.Join(errs...)
}

// othersLists are those of the authorities of other replicas whose certificates can be
// valid.
func othersLists(j journal.Journal, lists map[string]*x509.RevocationList, now time.Time) (map[string]*x509.RevocationList, error) {
	out := map[string]*x509.RevocationList{}
	for _, entries := range j.Others {
		for _, e := range entries {
			c, err := e.Cert()
			if err != nil {
				return nil, err
			}
			if c == nil || e.Kind != journal.KindIntermediate || !now.Before(c.NotAfter) {
				continue
			}
			if l := lists[string(c.SubjectKeyId)]; l != nil {
				out[string(c.SubjectKeyId)] = l
			}
		}
	}
	return out, nil
}

// signLists signs a list of each authority under the number that the journal has by
// now, stores them, and makes them the current ones. trustMu is held.
func (a *Authority) signLists(ctx context.Context) error {
	j := a.current()
	signed, err := a.makeLists(j, false)
	if signed.by == nil {
		return err
	}
	errs := []error{err}
	for _, op := range signed.ops {
		if _, err := a.store.Commit(ctx, nil, []storage.Op{op}); err != nil {
			errs = append(errs, err)
			for id := range signed.by { // the former one stays
				if !op.Delete && revocation.ListKey([]byte(id)) == op.Key {
					if old := a.lists.value()[id]; old != nil {
						signed.by[id] = old
					} else {
						delete(signed.by, id)
					}
				}
			}
		}
	}
	a.lists.store(signed.by)
	err = errors.Join(errs...)
	a.lists.failed(err, time.Now())
	if err != nil {
		return fmt.Errorf("publishing CRLs: %w", err)
	}
	a.cfg.Log.Info("CRLs signed", "number", j.Sequence, "count", len(signed.by), "revoked", len(a.revoked.Value()))
	return nil
}

// relist signs the lists anew and publishes them as a state of trust of their own.
func (a *Authority) relist(ctx context.Context) error {
	return a.changeTrust(ctx, func(*journal.Journal) error { return nil })
}

// listAfter is how long what other replicas revoke is collected before lists are signed.
const listAfter = 50 * time.Millisecond

// tendTakenBack puts on this replica's lists what others have revoked.
func (a *Authority) tendTakenBack(ctx context.Context) error {
	if !a.cfg.CRL.Enabled || !a.listsDue(a.clock.past()) {
		return nil
	}
	return a.relist(ctx)
}

// tendLists signs the lists anew when it is time, and forgets what expired.
func (a *Authority) tendLists(ctx context.Context, now time.Time) error {
	if err := a.forgetRevoked(ctx, a.clock.past()); err != nil {
		return err
	}
	if !a.cfg.CRL.Enabled || !a.listsDue(now) {
		return nil
	}
	return a.relist(ctx)
}

// listsDue reports whether a list is missing, does not say what it has to, or is at
// half of its life.
func (a *Authority) listsDue(now time.Time) bool {
	a.lists.mu.Lock()
	retry := a.lists.retry
	a.lists.mu.Unlock()
	if now.Before(retry) {
		return false
	}
	by, set := a.lists.value(), a.revoked.Value()
	due := func(iss *issuer) bool {
		c := by[string(iss.cert.SubjectKeyId)]
		return c == nil || !revocation.Holds(c, set)
	}
	if s := a.staged.Load(); s != nil && due(s.issuer) || due(a.intermediate.Load()) {
		return true
	}
	half := a.cfg.CRL.Lifetime / 2
	// Of an authority without a key the list ends; the SVIDs under it ended before.
	return slices.ContainsFunc(a.lists.all(), func(c *x509.RevocationList) bool {
		return a.hasKey(c.AuthorityKeyId) && (c.NextUpdate.Sub(now) < half || now.Before(c.ThisUpdate) || !revocation.Holds(c, set))
	})
}

// hasKey reports whether the key of an authority is there to sign lists.
func (a *Authority) hasKey(authority []byte) bool {
	if iss := a.intermediate.Load(); bytes.Equal(iss.cert.SubjectKeyId, authority) {
		return true
	}
	if s := a.staged.Load(); s != nil && bytes.Equal(s.issuer.cert.SubjectKeyId, authority) {
		return true
	}
	return slices.ContainsFunc(a.current().Authorities, func(e journal.Entry) bool {
		c, err := e.Cert()
		return err == nil && c != nil && e.Key != "" && bytes.Equal(c.SubjectKeyId, authority)
	})
}

// forgetRevoked drops what need not be said any more.
func (a *Authority) forgetRevoked(ctx context.Context, now time.Time) error {
	a.revokeMu.Lock()
	defer a.revokeMu.Unlock()
	said, over := a.revoked.Value().Split(now, a.cfg.CRL.Lifetime)
	if len(over) == 0 {
		return nil
	}
	ops := make([]storage.Op, len(over))
	for i, e := range over {
		ops[i] = storage.Op{Key: revocation.Key(e.Serial), Delete: true}
	}
	for part := range storage.Parts(ops) {
		if _, err := a.store.Commit(ctx, nil, part); err != nil {
			return fmt.Errorf("forgetting revocations of what expired: %w", err)
		}
	}
	a.revoked.Store(said)
	return nil
}

// listFirst reports whether an intermediate may be used only when everybody has its
// list: proxies that check lists refuse what an authority without one issued.
func (a *Authority) listFirst() bool {
	iss := a.intermediate.Load()
	return a.cfg.CRL.Enabled && iss != nil && a.clock.past().Before(iss.cert.NotAfter) && !a.orphaned()
}

// listed is the sequence that agents must have acknowledged for an intermediate to be
// used, and whether its list exists, if there has to be one.
func (a *Authority) listed(s *staged) (sequence uint64, ok bool) {
	if !a.cfg.CRL.Enabled {
		return s.sequence, true
	}
	if c := a.lists.value()[string(s.issuer.cert.SubjectKeyId)]; s.list == 0 && c != nil {
		s.list = c.Number.Uint64()
	}
	return max(s.sequence, s.list), s.list != 0
}

// refuseRevoked is an error for a certificate that was revoked.
func (a *Authority) refuseRevoked(c *x509.Certificate) error {
	if e, ok := a.revoked.Value()[string(profile.Serial(c))]; ok {
		return fmt.Errorf("certificate %x was revoked at %s (%v)", e.Serial, e.Revoked.Format(time.RFC3339), e.Reason)
	}
	return nil
}

// ErrRevoked is why nothing is issued for a certificate that is to be renewed, or that
// asks: it was revoked.
var ErrRevoked = errors.New("the certificate that asks was revoked")

// refuseRequester is an error that wraps ErrRevoked for what is asked for with a
// certificate that was revoked. A door that keeps a connection, or what it verified, need
// not look by itself.
func (a *Authority) refuseRequester(c *certificate) error {
	if len(c.requester) > 0 && a.revoked.Value().Has(c.requester) {
		return fmt.Errorf("%w: %x", ErrRevoked, c.requester)
	}
	return nil
}

// CRLs are the lists that are published, DER, by the subject key identifier of their
// authority in hexadecimal.
func (a *Authority) CRLs() map[string][]byte {
	out := map[string][]byte{}
	for id, c := range a.lists.value() {
		out[fmt.Sprintf("%x", id)] = c.Raw
	}
	return out
}
