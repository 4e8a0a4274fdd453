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
	"slices"
	"strings"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/journal"
	"github.com/signet-mesh/signet/ca/profile"
	"github.com/signet-mesh/signet/ca/replica"
	"github.com/signet-mesh/signet/ca/revocation"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/storage"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	// maxProblems is how many problems are told; the rest is counted.
	maxProblems = 50
	// serialSlack is how far the time in a serial may lie from that of its record:
	// five minutes of a clock that was set back, and the wait for the disk.
	serialSlack = 6 * time.Minute
	// verifyKeyUses is how many keys verification remembers.
	verifyKeyUses = 16 << 20
)

// Verify checks the logs: the chain, the signatures of heads and checkpoints, every
// record, that no serial occurs twice and no key belongs to two identities, and that
// the logs hold heads that somebody kept. With store it also checks the state, and
// that what the state relies on is in the log. What is wrong is in the answer; the
// error is ctx's.
func (b book) Verify(ctx context.Context, heads []*capb.LogHead, store bool) (*capb.VerifyResponse, error) {
	v := &verifier{book: b, resp: &capb.VerifyResponse{}, wanted: map[string]*wanted{}, revoked: map[string]revocation.Entry{}}
	if store {
		v.state()
	}
	for _, l := range b.logs {
		v.log(ctx, l)
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	for _, w := range v.wanted {
		if !w.found && !v.pruned(w.serial) {
			v.bad("%s (serial %x) has no record in the issuance log", w.what, w.serial)
		}
	}
	for _, e := range v.revoked {
		if !v.pruned(e.Serial) {
			v.bad("state: certificate %x is revoked, and no record of the issuance log says so", e.Serial)
		}
	}
	for _, p := range heads {
		v.head(ctx, p)
	}
	if l := b.lost; l != nil {
		v.bad("log of instance %d: it does not hold the signed head at record %d that node %s showed", l.Instance, l.Sequence, l.Node)
	}
	return v.resp, context.Cause(ctx)
}

type verifier struct {
	book
	resp   *capb.VerifyResponse
	wanted map[string]*wanted // by serial
	// revoked is what the state says and the log has not said yet, by serial.
	revoked map[string]revocation.Entry
}

// wanted is a certificate that must have a record.
type wanted struct {
	what    string
	serial  []byte
	keyHash []byte // nil: not known
	node    string
	podUID  string
	end     int64
	found   bool
}

func (v *verifier) bad(format string, args ...any) {
	if len(v.resp.Problems) == maxProblems {
		v.resp.More++
		return
	}
	v.resp.Problems = append(v.resp.Problems, fmt.Sprintf(format, args...))
}

// log checks one log, with two passes: first that it is what was written, then what
// it says.
func (v *verifier) log(ctx context.Context, l bookLog) {
	bad := func(format string, args ...any) {
		v.bad("log of instance %d: "+format, append([]any{l.instance}, args...)...)
	}
	r := &capb.LogReport{Instance: l.instance, First: 1, Last: l.FileLog.Head().Sequence, Torn: uint64(l.Torn())}
	v.resp.Logs = append(v.resp.Logs, r)
	if c, ok := l.Checkpoint(); ok {
		r.First, r.Pruned = c.Sequence+1, timestamppb.New(c.Pruned)
		if !verifyCheckpoint(l.key, c) {
			bad("the checkpoint at record %d is not signed by its key: records were removed by somebody else", c.Sequence)
		}
	}
	var last storage.Head
	err := l.VerifyHeads(ctx, func(h storage.Head) error {
		if h.Equal(last) {
			return nil // a new segment repeats it
		}
		if !verifyHeadWith(l.key, h) {
			bad("the signed head at record %d is not signed by its key", h.Sequence)
		}
		last = h
		r.Heads++
		return nil
	})
	if err != nil {
		bad("%v", err)
		return
	}
	if r.Torn > 0 {
		bad("%d bytes after record %d are no complete write: a crash left them, and then starting the authority cuts them off, or somebody changed them", r.Torn, r.Last)
	}
	if last.Signature != nil {
		r.Head = headToProto(last)
	}
	c := recordChecker{v: v, bad: bad, instance: l.instance, keys: newKeyUses(verifyKeyUses, func(int) {}), serials: map[int64]map[[profile.SerialLength]byte]bool{}}
	for rec, err := range l.Scan(ctx, 1) {
		if err != nil {
			bad("%v", err)
			return
		}
		if c.record(rec) {
			r.Certificates++
		}
	}
}

// recordChecker checks the records of one log, in order, with bounded memory: a
// serial carries its time, so one that occurs twice does so within a short time.
type recordChecker struct {
	v        *verifier
	bad      func(format string, args ...any)
	instance uint32
	keys     *keyUses
	serials  map[int64]map[[profile.SerialLength]byte]bool // by minute
	n        int
	// accepted is the clock that an operator accepted last, if it was before the time of
	// its record, held: that records have until it has caught up.
	accepted, held time.Time
	made           time.Time // of the newest certificate, by its serial
}

// record reports whether the record is of a certificate.
func (c *recordChecker) record(rec storage.Record) bool {
	r := &capb.IssuanceRecord{}
	if err := proto.Unmarshal(rec.Data, r); err != nil {
		c.bad("record %d: %v", rec.Sequence, err)
		return false
	}
	if r.GetKind() == capb.IssuanceRecord_KIND_DECISION {
		if err := c.v.decision(r); err != nil {
			c.bad("record %d: %v", rec.Sequence, err)
		}
		if at := time.Unix(r.GetDecision().GetClock().GetClock(), 0); r.GetDecision().GetWhat() == capb.Decision_WHAT_CLOCK_ACCEPTED && at.Before(rec.Time) {
			c.accepted, c.held = at, rec.Time
		}
		return false
	}
	if err := c.certificate(r, rec.Time); err != nil {
		c.bad("record %d (serial %x): %v", rec.Sequence, r.GetSerial(), err)
	}
	if c.n++; c.n%100_000 == 0 {
		c.keys.expire(c.made)
	}
	if w := c.v.wanted[string(r.GetSerial())]; w != nil {
		w.found = true
		if w.keyHash != nil && !bytes.Equal(w.keyHash, r.GetKeyHash()) || w.end != r.GetNotAfter() || w.node != r.GetNode() || w.podUID != r.GetPodUid() {
			c.bad("record %d is of another certificate than %s with the same serial %x", rec.Sequence, w.what, w.serial)
		}
	}
	return true
}

func (c *recordChecker) certificate(r *capb.IssuanceRecord, at time.Time) error {
	if _, known := capb.IssuanceRecord_Kind_name[int32(r.GetKind())]; !known || r.GetKind() == capb.IssuanceRecord_KIND_UNSPECIFIED {
		return fmt.Errorf("kind %d is not known to this version", r.GetKind())
	}
	authority := r.GetKind() == capb.IssuanceRecord_KIND_ROOT || r.GetKind() == capb.IssuanceRecord_KIND_INTERMEDIATE
	switch {
	case len(r.GetSerial()) != profile.SerialLength:
		return errors.New("the serial does not have 17 bytes")
	case uint32(r.GetSerial()[0]) != c.instance:
		return errors.New("the serial is of another instance")
	case r.GetEvidence() == capb.IssuanceRecord_EVIDENCE_UNSPECIFIED:
		return errors.New("the evidence is missing")
	case len(r.GetKeyHash()) != sha256.Size:
		return errors.New("the hash of the key is missing")
	case r.GetNotAfter() <= r.GetNotBefore():
		return errors.New("the validity is not a period")
	case len(r.GetAuthority()) == 0 && r.GetKind() != capb.IssuanceRecord_KIND_ROOT:
		return errors.New("the authority is missing")
	}
	serial, made := [profile.SerialLength]byte(r.GetSerial()), profile.SerialTime(r.GetSerial())
	if d := at.Sub(made); (d > serialSlack || d < -serialSlack) && !c.behind(made, at) {
		return fmt.Errorf("the serial is of %s, the record of %s", made.Format(time.RFC3339), at.Format(time.RFC3339))
	}
	minute := made.Unix() / 60
	if c.serials[minute] == nil {
		for m := range c.serials {
			if m < minute-2*int64(serialSlack/time.Minute)-1 {
				delete(c.serials, m)
			}
		}
		c.serials[minute] = map[[profile.SerialLength]byte]bool{}
	}
	if c.serials[minute][serial] {
		return errors.New("the serial occurs twice")
	}
	c.serials[minute][serial] = true
	if !authority {
		id, err := identity.ParseID(r.GetSpiffeId())
		if err != nil {
			return fmt.Errorf("SPIFFE ID %q: %w", r.GetSpiffeId(), err)
		}
		if id.TrustDomain().Name() != c.v.journal.TrustDomain {
			return fmt.Errorf("%s is not of trust domain %s", id, c.v.journal.TrustDomain)
		}
	} else if r.GetSpiffeId() != "" {
		return errors.New("an authority with the name of a leaf")
	}
	c.made = made
	return c.keys.claim(r.GetKeyHash(), r.GetSpiffeId(), time.Unix(r.GetNotAfter(), 0), made)
}

// behind reports whether a serial's time may be that much before its record's, because an
// operator accepted a clock that had gone back.
func (c *recordChecker) behind(made, at time.Time) bool {
	return at.Equal(c.held) && !made.Before(c.accepted.Add(-serialSlack)) && !made.After(at)
}

// ownSerial reports whether a serial is one that an instance of this authority makes.
func (v *verifier) ownSerial(serial []byte) bool {
	for _, l := range v.logs {
		if len(serial) == profile.SerialLength && uint32(serial[0]) == l.instance {
			return true
		}
	}
	return false
}

// pruned reports whether the record of a serial may have been removed because of
// its age.
func (v *verifier) pruned(serial []byte) bool {
	for _, l := range v.logs {
		if uint32(serial[0]) == l.instance {
			c, ok := l.Checkpoint()
			return ok && profile.SerialTime(serial).Before(c.Time.Add(serialSlack))
		}
	}
	return true // its log is gone with its age
}

// head checks that a log holds a head that somebody kept.
func (v *verifier) head(ctx context.Context, p *capb.LogHead) {
	h, err := headFromProto(p)
	if err != nil {
		v.bad("a head that was given: %v", err)
		return
	}
	for _, l := range v.logs {
		if l.instance != h.Instance {
			continue
		}
		if !verifyHeadWith(l.key, h) {
			v.bad("the head at record %d of instance %d that was given is not signed by the key of that log", h.Sequence, h.Instance)
			return
		}
		same, known, err := l.Holds(ctx, h)
		switch {
		case err != nil:
			v.bad("log of instance %d: %v", h.Instance, err)
		case known && !same && h.Sequence > l.FileLog.Head().Sequence:
			v.bad("log of instance %d: it ends at record %d, and a signed head covers record %d: its end was cut, or an older copy was put back", h.Instance, l.FileLog.Head().Sequence, h.Sequence)
		case known && !same:
			v.bad("log of instance %d: up to record %d it is not what a signed head says: records were replaced", h.Instance, h.Sequence)
		}
		return
	}
	v.bad("the head at record %d is of instance %d, of which there is no log", h.Sequence, h.Instance)
}

// state checks the store, and notes what must be in the log.
func (v *verifier) state() {
	v.authorities()
	for _, e := range v.entries {
		v.resp.Entries++
		if err := v.entry(e); err != nil {
			v.bad("state: %v", err)
		}
	}
}

// entry checks one record of the store. What a start reads must be readable.
func (v *verifier) entry(e storage.Entry) (err error) {
	below := func(prefix string) bool { return strings.HasPrefix(e.Key, prefix) }
	switch {
	case below(agentPrefix):
		v.agent(e)
	case below(revocation.Prefix):
		v.revocation(e)
	case below(revocation.ListPrefix):
		v.list(e)
	case below(instancePrefix):
		_, err = parseRetired(e)
	case below(revocation.BanPrefix):
		_, err = revocation.ParseBan(e)
	case below(revocation.SerialsPrefix):
		_, err = revocation.ParseSerials(e)
	case e.Key == replica.BanRevisionKey:
		_, err = replica.ParseBanRevision(e)
	case below(askedPrefix):
		if _, err = serialAsked(e.Key); err == nil {
			_, err = parseAsked(e)
		}
	case below(signedPrefix):
		_, err = parseSigned(e)
	case e.Key == clockKey:
		_, err = parseClock(e)
	case e.Key == lossKey:
		_, err = parseLoss(e)
	}
	return err
}

// revocation checks what was revoked, and notes that the log must say so.
func (v *verifier) revocation(s storage.Entry) {
	e, err := revocation.Parse(s)
	if err != nil {
		v.bad("state: %v", err)
		return
	}
	v.revoked[string(e.Serial)] = e
}

// list checks a CRL: signed by an authority of the journal, with a number that was
// durable before.
func (v *verifier) list(s storage.Entry) {
	list, err := revocation.ParseList(s)
	if err != nil {
		v.bad("state: %v", err)
		return
	}
	if !list.Number.IsUint64() || list.Number.Uint64() > v.journal.Sequence {
		v.bad("state: CRL %s has number %v, and the trust sequence is %d: numbers are taken from it", s.Key, list.Number, v.journal.Sequence)
	}
	for _, e := range v.journal.Authorities {
		c, err := e.Cert()
		if err != nil || c == nil || !bytes.Equal(c.SubjectKeyId, list.AuthorityKeyId) {
			continue
		}
		if err := list.CheckSignatureFrom(c); err != nil {
			v.bad("state: CRL %s: %v", s.Key, err)
		}
	}
}

// decision checks an operator's decision.
func (v *verifier) decision(r *capb.IssuanceRecord) error {
	d := r.GetDecision()
	switch {
	case d.GetWhat() == capb.Decision_WHAT_UNSPECIFIED || len(r.GetSerial()) != 0:
		return errors.New("a decision that says nothing")
	case d.GetWhat() == capb.Decision_WHAT_BANNED || d.GetWhat() == capb.Decision_WHAT_BAN_ENDED:
		if _, err := identity.ParseBanSubject(d.GetBan().GetSubject()); err != nil || d.GetBan().GetAt() == 0 || d.GetReason() == "" {
			return errors.New("a decision about a ban that does not say which, when or why")
		}
		return nil
	case d.GetWhat() == capb.Decision_WHAT_CLOCK_ACCEPTED && (d.GetClock().GetClock() == 0 || d.GetReason() == ""):
		return errors.New("a decision about a clock that does not say which, or why")
	case d.GetWhat() != capb.Decision_WHAT_REVOKED:
		return nil
	}
	said := entryOf(d.GetRevoked(), d)
	if _, err := said.Encode(); err != nil {
		return fmt.Errorf("a decision to revoke: %w", err)
	}
	if e, ok := v.revoked[string(said.Serial)]; ok {
		delete(v.revoked, string(said.Serial))
		if e.Reason != said.Reason || !e.Until.Equal(said.Until) || !bytes.Equal(e.Authority, said.Authority) {
			return fmt.Errorf("the decision to revoke %x is not what the state says", said.Serial)
		}
	}
	return nil
}

func (v *verifier) agent(e storage.Entry) {
	var r agent
	serial, err := agentSerial(e.Key)
	if err == nil {
		err = json.Unmarshal(e.Value, &r)
	}
	switch {
	case err != nil:
		v.bad("state: agent %s: %v", e.Key, err)
	case r.Version > agentVersion:
		v.bad("state: agent %s: %v", e.Key, storage.ErrNewerFormat)
	case r.Node == "" || r.NotAfter.IsZero():
		v.bad("state: agent %s is incomplete", e.Key)
	case !v.ownSerial(serial):
		if len(serial) != profile.SerialLength {
			v.bad("state: agent %s has a serial that no instance of this authority makes", e.Key)
		}
	default:
		v.wanted[string(serial)] = &wanted{what: "the SVID of the agent on node " + r.Node, serial: serial, node: r.Node, podUID: r.PodUID, end: r.NotAfter.Unix()}
	}
}

// authorities checks the journal.
func (v *verifier) authorities() {
	j := v.journal
	if _, err := spiffeid.TrustDomainFromString(j.TrustDomain); err != nil {
		v.bad("journal: %v", err)
	}
	if j.Instance < 1 || j.Instance > storage.MaxInstance || j.Sequence == 0 {
		v.bad("journal: instance %d, trust sequence %d", j.Instance, j.Sequence)
	}
	if _, err := x509.ParsePKIXPublicKey(j.LogPublicKey); err != nil {
		v.bad("journal: the log's public key: %v", err)
	}
	var roots, inters []*x509.Certificate
	active := 0
	for i, e := range j.Authorities {
		if e.State == journal.StatePending {
			if _, err := e.Public(); err != nil {
				v.bad("journal: authority %d: %v", i, err)
			}
			active++ // it will be, when somebody has signed it
			continue
		}
		c, err := e.Cert()
		if err == nil {
			err = identity.CheckAuthority(c)
		}
		if err != nil {
			v.bad("journal: authority %d: %v", i, err)
			continue
		}
		for _, der := range e.Chain {
			up, err := x509.ParseCertificate(der)
			if err != nil {
				v.bad("journal: chain of authority %d: %v", i, err)
				continue
			}
			inters = append(inters, up)
		}
		if e.State == journal.StateActive {
			active++
		}
		if e.Kind == journal.KindRoot {
			roots = append(roots, c)
		} else {
			inters = append(inters, c)
		}
		if serial := profile.Serial(c); !e.External && v.ownSerial(serial) {
			hash := sha256.Sum256(c.RawSubjectPublicKeyInfo)
			v.wanted[string(serial)] = &wanted{what: e.Kind + " of the journal", serial: serial, keyHash: hash[:], end: c.NotAfter.Unix()}
		}
	}
	for _, n := range slices.Sorted(maps.Keys(j.Others)) {
		for i, e := range j.Others[n] {
			v.other(n, i, e)
		}
	}
	if active == 0 || len(roots) == 0 && j.Source != sourceOffline {
		v.bad("journal: there is no active authority, or no root")
	}
	for _, c := range inters {
		if !signedByOne(c, roots) && !signedByOne(c, inters) && !slices.ContainsFunc(roots, c.Equal) {
			v.bad("journal: no authority in it signed the intermediate %x", c.SerialNumber)
		}
	}
	for _, c := range roots {
		if bytes.Equal(c.RawIssuer, c.RawSubject) && c.CheckSignatureFrom(c) != nil {
			v.bad("journal: the root %x is not signed by itself", c.SerialNumber)
		}
	}
}

// other checks what another replica has in the journal: its own verification holds it
// against its log.
func (v *verifier) other(instance string, i int, e journal.Entry) {
	c, err := e.Cert()
	switch {
	case e.State == journal.StatePending:
		_, err = e.Public()
	case err == nil && c == nil:
		err = errors.New("its certificate is missing")
	case err == nil:
		err = identity.CheckAuthority(c)
	}
	if err != nil {
		v.bad("journal: authority %d of replica %s: %v", i, instance, err)
	}
}

func signedByOne(c *x509.Certificate, issuers []*x509.Certificate) bool {
	for _, i := range issuers {
		if !i.Equal(c) && c.CheckSignatureFrom(i) == nil {
			return true
		}
	}
	return false
}
