package ca

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/replica"
	"github.com/signet-mesh/signet/ca/revocation"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/storage"

	"google.golang.org/protobuf/types/known/timestamppb"
)

// ErrBanned is why nothing is issued to a SPIFFE ID, to a node, or for a certificate
// that is to be renewed.
var ErrBanned = errors.New("it is banned")

var (
	errBan   = errors.New("that cannot be banned")
	errNoBan = errors.New("there is no such ban")
)

const (
	// maxBans bounds the bans in force, maxBanSerials the certificates that the bans of
	// nodes mean: both go to every agent in one message.
	maxBans       = 4096
	maxBanSerials = 64 << 10
	// banMemory is how long bans are remembered that have ended, and maxEnded how many.
	banMemory = 30 * 24 * time.Hour
	maxEnded  = 4096
	// retryBanned is when one may ask again to whom nothing is issued.
	retryBanned = time.Minute
	// banTries is how often a change is tried that others are quicker with.
	banTries = 16
	// reloadTime is how long a change of bans may take to be read back; tendBans tries again.
	reloadTime = 5 * time.Second
)

// banSerials is how many certificates the bans of nodes can mean.
func (c *Config) banSerials() int { return cmp.Or(c.maxBanSerials, maxBanSerials) }

// bansState is the bans of the store, as of a revision. It is not changed.
type bansState struct {
	revision uint64
	// said is the revision of the bans, by which agents call those in force.
	said uint64
	// number is the record of that, if there is one, and numberAt its revision in the store.
	number   replica.BanRevision
	numberAt uint64
	// records are all that are remembered, by subject.
	records map[string]banRecord
	// set are those in force.
	set *identity.Bans
	// serials are how many certificates the ban of a node means, by subject; a node is
	// missing whose certificates this replica has not collected.
	serials map[string]int
	// stored is how many certificates the bans of nodes have in the store, expired ones too.
	stored int
	// mine are how many of those in force this replica has stored, and parts the keys where
	// they are, by subject.
	mine  map[string]int
	parts map[string][]string
	// own are those of them that this replica has collected, by subject.
	own map[string][]revocation.Serial
}

type banRecord struct {
	revocation.Ban
	revision uint64
}

// banned is the state of bans; there always is one after start.
func (a *Authority) banned() *bansState {
	if s := a.bans.Value(); s != nil {
		return s
	}
	return &bansState{}
}

// loadBans reads the bans and puts them in force. bansMu is held, or nobody else runs
// yet.
func (a *Authority) loadBans(ctx context.Context) error {
	all, revision, err := a.store.List(ctx, revocation.BanStore)
	if err != nil {
		return fmt.Errorf("reading bans: %w", err)
	}
	s := &bansState{revision: revision, records: make(map[string]banRecord, len(all)), serials: map[string]int{}, mine: map[string]int{}, parts: map[string][]string{}, own: map[string][]revocation.Serial{}}
	var entries, parts []storage.Entry
	for _, e := range all {
		switch {
		case strings.HasPrefix(e.Key, revocation.BanPrefix):
			entries = append(entries, e)
		case strings.HasPrefix(e.Key, revocation.SerialsPrefix):
			parts = append(parts, e)
		case e.Key == replica.BanRevisionKey:
			if s.number, err = replica.ParseBanRevision(e); err != nil {
				return err
			}
			s.numberAt = e.Revision
		}
	}
	now := a.clock.past()
	var list []identity.Ban
	for _, e := range entries {
		b, err := revocation.ParseBan(e)
		if err != nil {
			return err
		}
		s.records[b.Subject] = banRecord{b, e.Revision}
		if b.Ended != nil {
			continue
		}
		subject, err := identity.ParseBanSubject(b.Subject)
		if err != nil {
			return err // never: ParseBan has read it
		}
		ban := identity.Ban{Subject: subject, Until: b.Until, Reason: b.Reason}
		if subject.Kind() == identity.BanNode {
			first, collected := revocation.SerialsKey(b.Subject, a.instance, 0), false
			own := strings.TrimSuffix(first, "0000")
			var mine []revocation.Serial
			for _, p := range parts {
				if !strings.HasPrefix(p.Key, revocation.SerialsOf(b.Subject)) {
					continue
				}
				serials, err := revocation.ParseSerials(p)
				if err != nil {
					return err
				}
				s.stored += len(serials)
				for i := range serials {
					if now.Before(serials[i].Until) {
						ban.Serials = append(ban.Serials, serials[i].Serial[:])
						if strings.HasPrefix(p.Key, own) {
							s.mine[b.Subject]++
						}
					}
				}
				if strings.HasPrefix(p.Key, own) {
					mine = append(mine, serials...)
					s.parts[b.Subject] = append(s.parts[b.Subject], p.Key)
				}
				collected = collected || p.Key == first // which is stored last
			}
			if collected {
				s.serials[b.Subject], s.own[b.Subject] = len(ban.Serials), mine
			}
		}
		list = append(list, ban)
	}
	s.set, s.said = identity.NewBans(list), s.revision
	old := a.bans.Value()
	same := old != nil && old.set.Equal(s.set)
	if same {
		s.set = old.set
	}
	switch {
	case s.number.Revision > 0:
		s.said = s.number.Revision
		if t := a.trust.Value(); t != nil {
			s.said = s.number.Said(t.Sequence())
		}
	case same:
		s.said = old.said // agents need not hear of it
	}
	a.bans.Store(s)
	return nil
}

// commitBans is a commit that changes the bans in force, and their revision with them.
// bansMu is held.
func (a *Authority) commitBans(ctx context.Context, s *bansState, conds []storage.Cond, ops []storage.Op) error {
	// It stays above the store's revision, which builds say that do not know this record,
	// for as long as replicas of both kinds run.
	next := s.number
	next.Revision = max(next.Revision, s.revision) + 1
	value, err := next.Encode()
	if err != nil {
		return err
	}
	_, err = a.store.Commit(ctx, append(conds, storage.Cond{Key: replica.BanRevisionKey, Revision: s.numberAt}),
		append(ops, storage.Op{Key: replica.BanRevisionKey, Value: value}))
	return err
}

// numberBans gives the bans of a state of an earlier build a revision of their own. Agents
// know them by revisions of the store, so it begins where that is.
func (a *Authority) numberBans(ctx context.Context) error {
	a.bansMu.Lock()
	defer a.bansMu.Unlock()
	if a.banned().number.Revision > 0 {
		return nil
	}
	if err := a.commitBans(ctx, a.banned(), nil, nil); err != nil && !errors.Is(err, storage.ErrConflict) {
		return fmt.Errorf("numbering bans: %w", err)
	}
	return a.loadBans(ctx)
}

// followBans takes up what other replicas change, until ctx ends. It has a watch of its
// own: a ban must not wait for who takes up a change of the journal.
func (a *Authority) followBans(ctx context.Context) error {
	for ctx.Err() == nil {
		after := a.banned().revision
		for e, err := range a.store.Watch(ctx, revocation.BanStore, after) {
			if err != nil {
				break // what was missed is read below
			}
			if e.Revision <= a.banned().revision {
				continue // this replica's own change
			}
			if err := a.reloadBans(ctx); err != nil {
				break
			}
		}
		if ctx.Err() != nil {
			break
		}
		a.fails("bans of other replicas", a.reloadBans(ctx))
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
	return nil
}

func (a *Authority) reloadBans(ctx context.Context) error {
	a.bansMu.Lock()
	defer a.bansMu.Unlock()
	return a.loadBans(ctx)
}

// refuseBanned is an error that wraps ErrBanned for a certificate that must not be
// issued. The authority's own are not asked about.
func (a *Authority) refuseBanned(c *certificate) error {
	if c.kind != capb.IssuanceRecord_KIND_AGENT && c.kind != capb.IssuanceRecord_KIND_WORKLOAD {
		return nil
	}
	set := a.banned().set
	if set == nil {
		return nil
	}
	ban := set.ID([]byte(c.owner()))
	if ban == nil && c.node != "" {
		ban = set.Node(c.node)
	}
	if ban == nil && len(c.requester) > 0 {
		ban = set.Serial(c.requester)
	}
	if ban == nil {
		return nil
	}
	return fmt.Errorf("%w: %s (%s)", ErrBanned, ban.Subject, ban.Reason)
}

// refuseAgent is an error for an agent whose node or SVID is banned.
func (b *bansState) refuseAgent(r *agent) error {
	if ban := b.set.Node(r.Node); ban != nil {
		return fmt.Errorf("%w: node %s (%s)", ErrBanned, r.Node, ban.Reason)
	}
	if ban := b.set.Serial(r.serial); ban != nil {
		return fmt.Errorf("%w: the agent's SVID %x, by %s (%s)", ErrBanned, r.serial, ban.Subject, ban.Reason)
	}
	return nil
}

// checkBan refuses what nobody can want to ban, and what a ban would not do.
func (a *Authority) checkBan(s identity.BanSubject) error {
	id := s.ID()
	path, own := strings.CutPrefix(id, a.cfg.TrustDomain.IDString())
	if id == "" || !own || path != "" && path[0] != '/' {
		return nil
	}
	below := s.Kind() == identity.BanBelow
	switch first, _, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/"); {
	case first == "signet":
		return fmt.Errorf("%w: %s is a name of the authority, of its agents or of operators; ban an agent by its node, node/NAME", errBan, s)
	case below && path == "":
		return fmt.Errorf("%w: %s is everybody, the authority and its agents too", errBan, s)
	case below && path == "/ns":
		return fmt.Errorf("%w: %s is every workload of the trust domain; ban namespaces, %s/ns/NAMESPACE/*", errBan, s, a.cfg.TrustDomain.IDString())
	}
	return nil
}

// addBan bans a subject, or changes its ban. What is returned is in force here and
// durable; pending is why more than that is not done yet.
func (a *Authority) addBan(ctx context.Context, text, reason string, until time.Time, by string) (resp *capb.AddBanResponse, err error) {
	subject, err := identity.ParseBanSubject(text)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errBan, err)
	}
	if err := a.checkBan(subject); err != nil {
		return nil, err
	}
	now := a.clock.past() // also by a clock that cannot be believed
	if reason == "" || len(reason) > revocation.MaxComment {
		return nil, fmt.Errorf("%w: a reason of 1 to %d bytes is required", errBan, revocation.MaxComment)
	}
	if !until.IsZero() && !until.After(now) {
		return nil, fmt.Errorf("%w: it would have ended at %s", errBan, until.UTC().Format(time.RFC3339))
	}
	b := revocation.Ban{Subject: subject.String(), Reason: reason, By: by, At: now.UTC().Truncate(time.Second), Until: until.UTC()}
	if until.IsZero() {
		b.Until = time.Time{}
	}
	inLog := false
	if subject.Kind() == identity.BanSerial {
		switch r, err := a.issuedRecord(ctx, subject.Serial()); {
		case errors.Is(err, errNotIssued): // of another authority, perhaps
		case err != nil:
			return nil, err
		case r.GetKind() != capb.IssuanceRecord_KIND_WORKLOAD && r.GetKind() != capb.IssuanceRecord_KIND_AGENT:
			return nil, fmt.Errorf("%w: %s is the authority's own; replace it instead", errBan, subject)
		default:
			end := time.Unix(r.GetNotAfter(), 0).UTC()
			if !now.Before(end) {
				return nil, fmt.Errorf("%w: the certificate expired at %s", errBan, end.Format(time.RFC3339))
			}
			if b.SPIFFEID, inLog = r.GetSpiffeId(), true; b.Until.IsZero() || b.Until.After(end) {
				b.Until = end
			}
		}
	}
	if subject.Kind() == identity.BanNode {
		a.nodes.begin(b.Subject)
		defer a.nodes.end(b.Subject)
	}
	changed, err := a.changeBan(ctx, b.Subject, func(old *revocation.Ban) (revocation.Ban, error) {
		if old == nil && a.banned().set.Len() >= maxBans {
			return b, fmt.Errorf("%w: %d bans are in force, which is the most; ban what is above, or remove some", errBan, maxBans)
		}
		return b, nil
	})
	if err != nil {
		return nil, err
	}
	a.cfg.Log.Warn("banned", "subject", b.Subject, "reason", reason, "by", by, "until", b.Until)
	// What was under way when the ban came into force is recorded when this returns.
	a.awaitRecording()
	var pending []string
	wait := func(what string, err error) {
		if err != nil {
			a.cfg.Log.Error("a ban is in force, but not all that goes with it", "subject", b.Subject, "err", err)
			pending = append(pending, what+": "+err.Error())
		}
	}
	wait("the log has no record of it yet", a.logBans(ctx))
	resp = &capb.AddBanResponse{Changed: changed}
	switch subject.Kind() {
	case identity.BanNode:
		records, err := a.collectSerials(ctx, subject)
		wait("not all certificates of the node are banned yet", err)
		if a.cfg.CRL.Enabled && (err == nil || errors.Is(err, errBanCut)) {
			n, err := a.revokeAll(ctx, records, reason, by)
			resp.Revoked = uint32(n)
			wait("not all certificates of the node are revoked", err)
		}
	case identity.BanSerial:
		if serial := subject.Serial(); a.cfg.CRL.Enabled && a.elsewhere(serial) {
			e, _, err := a.askRevoke(ctx, serial, bannedReason, reason, by)
			if err == nil {
				resp.Revoked, err = 1, a.awaitList(ctx, e)
			}
			if !errors.Is(err, errNotIssued) {
				wait("it is on no CRL", err)
			}
		}
		if a.cfg.CRL.Enabled && inLog {
			_, _, err := a.revoke(ctx, subject.Serial(), bannedReason, reason, by)
			if err == nil {
				resp.Revoked, err = 1, a.relist(ctx)
			}
			wait("it is on no CRL", err)
		}
	}
	s := a.banned()
	resp.Ban, resp.Revision, resp.Pending = s.record(b.Subject), s.said, strings.Join(pending, "; ")
	return resp, nil
}

// bannedReason is why banned certificates are on a list: privilegeWithdrawn.
const bannedReason revocation.Reason = 9

// removeBan ends the ban of a subject.
func (a *Authority) removeBan(ctx context.Context, text, reason, by string) (*capb.RemoveBanResponse, error) {
	subject, err := identity.ParseBanSubject(text)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoBan, err)
	}
	if reason == "" || len(reason) > revocation.MaxComment {
		return nil, fmt.Errorf("%w: a reason of 1 to %d bytes is required", errBan, revocation.MaxComment)
	}
	now := a.clock.past().UTC().Truncate(time.Second)
	_, err = a.changeBan(ctx, subject.String(), func(old *revocation.Ban) (revocation.Ban, error) {
		if old == nil {
			return revocation.Ban{}, fmt.Errorf("%w: of %s", errNoBan, subject)
		}
		next := *old
		next.Ended, next.Logged = &revocation.BanEnd{Reason: reason, By: by, At: now}, false
		return next, nil
	})
	if err != nil {
		return nil, err
	}
	a.cfg.Log.Warn("ban removed", "subject", subject.String(), "reason", reason, "by", by)
	a.fails("bans", a.logBans(ctx))
	s := a.banned()
	return &capb.RemoveBanResponse{Ban: s.record(subject.String()), Revision: s.said}, nil
}

// changeBan changes the ban of a subject by compare-and-swap, and puts the result in
// force. edit gets the ban that is in force, or nil. Changed says that there was one.
func (a *Authority) changeBan(ctx context.Context, subject string, edit func(old *revocation.Ban) (revocation.Ban, error)) (changed bool, err error) {
	a.bansMu.Lock()
	defer a.bansMu.Unlock()
	for try := 1; ; try++ {
		was := a.banned().records[subject] // none: revision 0, which is a key that is not there
		var old *revocation.Ban
		if was.revision > 0 && was.Ended == nil {
			old = &was.Ban
		}
		next, err := edit(old)
		if err != nil {
			return false, err
		}
		value, err := next.Encode()
		if err != nil {
			return false, fmt.Errorf("%w: %w", errBan, err)
		}
		key := revocation.BanKey(subject)
		ops := []storage.Op{{Key: key, Value: value}}
		if next.Ended != nil || old == nil {
			// What a ban of the same node had before is collected anew, or not needed.
			gone, _, err := a.store.List(ctx, revocation.SerialsOf(subject))
			if err != nil {
				return false, fmt.Errorf("%w: changing the ban of %s: %w", ErrUnavailable, subject, err)
			}
			for _, e := range gone[:min(len(gone), storage.MaxOps-2)] {
				ops = append(ops, storage.Op{Key: e.Key, Delete: true})
			}
		}
		err = a.commitBans(ctx, a.banned(), []storage.Cond{{Key: key, Revision: was.revision}}, ops)
		if errors.Is(err, storage.ErrConflict) && try < banTries {
			if err := a.loadBans(ctx); err != nil {
				return false, err
			}
			continue
		}
		// Also after an error: the change may have happened, and then it counts. And also when
		// who asked for it is gone: what is stored must be in force.
		loadCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), reloadTime)
		loadErr := a.loadBans(loadCtx)
		cancel()
		if a.bansStale.Store(loadErr != nil); err == nil {
			err = loadErr
		}
		if err != nil {
			return false, fmt.Errorf("%w: changing the ban of %s: %w", ErrUnavailable, subject, err)
		}
		return old != nil, nil
	}
}

// logBans records the decisions that are not in the log yet. A crash may have one
// recorded twice, and none is left out.
func (a *Authority) logBans(ctx context.Context) error {
	a.bansMu.Lock()
	defer a.bansMu.Unlock()
	did := false
	for _, r := range a.banned().records {
		if r.Logged {
			continue
		}
		d := &capb.Decision{What: capb.Decision_WHAT_BANNED, Instance: uint32(a.instance), Reason: r.Reason, By: r.By,
			Ban: &capb.BannedSubject{Subject: r.Subject, At: r.At.Unix()}}
		if !r.Until.IsZero() {
			d.Ban.Until = r.Until.Unix()
		}
		if r.Ended != nil {
			d.What, d.Reason, d.By, d.Ban.At = capb.Decision_WHAT_BAN_ENDED, r.Ended.Reason, r.Ended.By, r.Ended.At.Unix()
		}
		if err := a.decide(ctx, d); err != nil {
			return err
		}
		r.Logged = true
		value, err := r.Encode()
		if err != nil {
			return err
		}
		key := revocation.BanKey(r.Subject)
		_, err = a.store.Commit(ctx, []storage.Cond{{Key: key, Revision: r.revision}}, []storage.Op{{Key: key, Value: value}})
		if err != nil && !errors.Is(err, storage.ErrConflict) {
			return fmt.Errorf("%w: recording a ban: %w", ErrUnavailable, err)
		}
		did = true
	}
	if did {
		return a.loadBans(ctx)
	}
	return nil
}

// tendBans ends bans whose time is over, does what a crash or a failure has left
// undone, and forgets what ended long ago.
func (a *Authority) tendBans(ctx context.Context) error {
	now := a.clock.past() // who does not know the time ends no ban
	if a.bansStale.Load() {
		if err := a.reloadBans(ctx); err != nil {
			return err
		}
		a.bansStale.Store(false)
	}
	var errs []error
	s := a.banned()
	var ended []banRecord
	for subject, r := range s.records {
		switch {
		case r.Ended != nil:
			ended = append(ended, r)
		case !r.Until.IsZero() && !now.Before(r.Until):
			_, err := a.changeBan(ctx, subject, func(old *revocation.Ban) (revocation.Ban, error) {
				if old == nil {
					return revocation.Ban{}, errNoBan
				}
				next := *old
				if !next.Until.IsZero() && !now.Before(next.Until) {
					next.Ended, next.Logged = &revocation.BanEnd{Reason: "its time was over", By: a.id.String(), At: now.UTC().Truncate(time.Second)}, false
				}
				return next, nil
			})
			if !errors.Is(err, errNoBan) {
				errs = append(errs, err)
			}
		default:
			if strings.HasPrefix(subject, "node/") {
				errs = append(errs, a.tendNode(ctx, subject))
			}
		}
	}
	a.alarm("banned nodes", a.nodes.keep(s))
	a.alarm("lost bans", a.lostBans.unanswered(a.banned()))
	errs = append(errs, a.numberBans(ctx), a.logBans(ctx), a.forgetBans(ctx, ended, now))
	return errors.Join(errs...)
}

// forgetBans forgets bans that ended long ago, or before many others.
func (a *Authority) forgetBans(ctx context.Context, ended []banRecord, now time.Time) error {
	slices.SortFunc(ended, func(x, y banRecord) int { return x.Ended.At.Compare(y.Ended.At) })
	var conds []storage.Cond
	var ops []storage.Op
	for i, r := range ended {
		if len(ops) < storage.MaxOps && r.Logged && (now.Sub(r.Ended.At) > banMemory || len(ended)-i > maxEnded) {
			key := revocation.BanKey(r.Subject)
			conds, ops = append(conds, storage.Cond{Key: key, Revision: r.revision}), append(ops, storage.Op{Key: key, Delete: true})
		}
	}
	if len(ops) == 0 {
		return nil
	}
	if _, err := a.store.Commit(ctx, conds, ops); err != nil && !errors.Is(err, storage.ErrConflict) {
		return fmt.Errorf("forgetting bans: %w", err)
	}
	return a.reloadBans(ctx)
}

// record is what operators see of a ban.
func (b *bansState) record(subject string) *capb.BanRecord {
	r := b.records[subject]
	p := &capb.BanRecord{Subject: subject, Reason: r.Reason, By: r.By, At: timestamppb.New(r.At), SpiffeId: r.SPIFFEID, Serials: uint32(b.serials[subject])}
	if !r.Until.IsZero() {
		p.Until = timestamppb.New(r.Until)
	}
	if r.Ended != nil {
		p.Ended = &capb.BanEnd{Reason: r.Ended.Reason, By: r.Ended.By, At: timestamppb.New(r.Ended.At)}
	}
	return p
}

// toProto is what agents get.
func (b *bansState) toProto(now time.Time) *capb.Bans {
	out := &capb.Bans{Revision: b.said, Now: timestamppb.New(now)}
	for _, ban := range b.set.All() {
		p := &capb.Ban{Reason: ban.Reason, Serials: ban.Serials}
		switch s := ban.Subject; s.Kind() {
		case identity.BanID:
			p.Subject = &capb.Ban_SpiffeId{SpiffeId: s.ID()}
		case identity.BanBelow:
			p.Subject = &capb.Ban_SpiffeIdPrefix{SpiffeIdPrefix: s.ID()}
		case identity.BanSerial:
			p.Subject = &capb.Ban_Serial{Serial: s.Serial()}
		case identity.BanNode:
			p.Subject = &capb.Ban_Node{Node: s.Node()}
		}
		if !ban.Until.IsZero() {
			p.Until = timestamppb.New(ban.Until)
		}
		out.Bans = append(out.Bans, p)
	}
	return out
}

// bansStatus lists the nodes with agents, and how far they have come with the bans.
func (as *agents) bansStatus() (out []*capb.BanAgent) {
	as.mu.RLock()
	defer as.mu.RUnlock()
	for m, s := range as.streams {
		out = append(out, &capb.BanAgent{Node: m.node, Connected: s.open > 0, Revision: s.bans, Unread: s.bansUnread})
	}
	slices.SortFunc(out, func(a, b *capb.BanAgent) int { return strings.Compare(a.Node, b.Node) })
	return out
}

// enforces notes which bans the agent of a machine enforces.
func (as *agents) enforces(m machine, revision uint64, unread uint32) {
	as.mu.Lock()
	defer as.mu.Unlock()
	if s := as.streams[m]; s != nil {
		s.bans, s.bansUnread = revision, unread
	}
}
