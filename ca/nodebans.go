package ca

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/profile"
	"github.com/signet-mesh/signet/ca/revocation"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/storage"

	"google.golang.org/protobuf/proto"
)

// A ban of a node is of every certificate that was issued for it, and each replica knows
// its own: it collects them from its log, and revokes them where lists are published.

// nodeBans is what is being done for the bans of nodes, by subject. Safe for concurrent
// use.
type nodeBans struct {
	mu   sync.Mutex
	busy map[string]int      // operators' bans that are at it; guarded by mu
	held map[string]heldNode // whose certificates cannot all be revoked, or banned; guarded by mu
	cut  map[string]heldNode // whose certificates are not all banned; err nil: they are; guarded by mu
}

// heldNode is a node whose certificates could not all be revoked, and are not looked at
// again before a while is over.
type heldNode struct {
	again time.Time
	err   error
}

// begin notes that an operator's ban of a node is at it, until end.
func (n *nodeBans) begin(subject string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.busy == nil {
		n.busy = map[string]int{}
	}
	n.busy[subject]++
}

func (n *nodeBans) end(subject string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.busy[subject]--; n.busy[subject] == 0 {
		delete(n.busy, subject)
	}
}

// due reports whether background work may look at a node, whose certificates were
// collected before or were not.
func (n *nodeBans) due(subject string, collected bool) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.busy[subject] == 0 && (!collected || !time.Now().Before(n.held[subject].again))
}

// collected notes whether all certificates of a node were banned that this replica issued
// for it, or why not: then they are collected again after a while.
func (n *nodeBans) collected(subject string, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cut == nil {
		n.cut = map[string]heldNode{}
	}
	n.cut[subject] = heldNode{time.Now().Add(listPause), err}
}

// again reports whether the certificates of a node are to be collected again, of which
// there were too many. full says that there may be some of which that was not noted:
// before a restart.
func (n *nodeBans) again(subject string, full bool) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	c, noted := n.cut[subject]
	if !noted {
		return full
	}
	return c.err != nil && !time.Now().Before(c.again)
}

// hold notes that all was tried for a node, and why not all could be revoked.
func (n *nodeBans) hold(subject string, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.held == nil {
		n.held = map[string]heldNode{}
	}
	n.held[subject] = heldNode{time.Now().Add(listPause), err}
}

// revoked notes that nothing is left to be revoked of a node.
func (n *nodeBans) revoked(subject string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.held, subject)
}

// keep forgets nodes that are not banned any more, and returns why the certificates of
// others are not all revoked.
func (n *nodeBans) keep(s *bansState) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	var errs []error
	for _, nodes := range []map[string]heldNode{n.held, n.cut} {
		for subject, h := range nodes {
			if r := s.records[subject]; r.revision == 0 || r.Ended != nil {
				delete(nodes, subject)
			} else if h.err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", subject, h.err))
			}
		}
	}
	slices.SortFunc(errs, func(x, y error) int { return cmp.Compare(x.Error(), y.Error()) })
	return errors.Join(errs...)
}

// tendNode does what is left to do for the ban of a node: because another replica was
// told, or after a crash or a failure.
func (a *Authority) tendNode(ctx context.Context, subject string) error {
	s := a.banned()
	r := s.records[subject]
	if r.revision == 0 || r.Ended != nil {
		return nil
	}
	own, collected := s.own[subject]
	if collected && a.nodes.again(subject, s.stored >= a.cfg.banSerials()) {
		collected = false
	}
	if collected && (!a.cfg.CRL.Enabled || !a.leaves(own)) {
		a.nodes.revoked(subject)
		return nil
	}
	if !a.nodes.due(subject, collected) {
		return nil
	}
	node, err := identity.ParseBanSubject(subject)
	if err != nil {
		return err
	}
	records := a.nodeRecords
	if !collected {
		records = a.collectSerials
	}
	list, err := records(ctx, node)
	if errors.Is(err, errBanCut) {
		err = nil // an alarm says so, and what can be banned is
	}
	if err == nil && a.cfg.CRL.Enabled {
		_, err = a.revokeAll(ctx, list, r.Reason, r.By)
	}
	// What is left then is too much, or its record does not name its issuer: a scan of the
	// log for it each second would change nothing.
	if errors.Is(err, errNotRevoked) {
		a.nodes.hold(subject, err)
		return nil
	} else if err == nil {
		a.nodes.hold(subject, nil)
	}
	return err
}

// leaves reports whether one of the certificates that are banned with a node is not
// revoked.
func (a *Authority) leaves(serials []revocation.Serial) bool {
	now, set := a.clock.past(), a.revoked.Value()
	return slices.ContainsFunc(serials, func(s revocation.Serial) bool { return now.Before(s.Until) && !set.Has(s.Serial[:]) })
}

// nodeRecords are those of every certificate that this replica issued for a node's agent
// and pods and that has not expired.
func (a *Authority) nodeRecords(ctx context.Context, node identity.BanSubject) (records []*capb.IssuanceRecord, err error) {
	now := a.clock.past()
	b, err := a.read(ctx)
	if err != nil {
		return nil, err
	}
	for _, l := range b.logs {
		for rec, err := range l.Scan(ctx, l.Since(now.Add(-a.cfg.SVID.MaxTTL-a.cfg.SVID.Backdate-maxStepBack))) {
			if err != nil {
				return nil, fmt.Errorf("collecting the certificates of %s: %w", node, err)
			}
			r := &capb.IssuanceRecord{}
			if err := proto.Unmarshal(rec.Data, r); err != nil {
				return nil, fmt.Errorf("collecting the certificates of %s: record %d: %w", node, rec.Sequence, err)
			}
			if r.GetNode() != node.Node() || r.GetNotAfter() <= now.Unix() || len(r.GetSerial()) != profile.SerialLength ||
				r.GetKind() != capb.IssuanceRecord_KIND_AGENT && r.GetKind() != capb.IssuanceRecord_KIND_WORKLOAD {
				continue
			}
			records = append(records, r)
		}
	}
	return records, nil
}

// awaitRecording returns when what was under way when it was called is recorded: of what
// is in the log then, nothing is missing that was held against the bans as they were
// before. No lock is held.
func (a *Authority) awaitRecording() {
	a.recording.Lock()
	//lint:ignore SA2001 it waits for those who hold it
	a.recording.Unlock()
}

// collectSerials bans every certificate that this replica issued for a node's agent
// and pods and that has not expired. What it returns are their records, all of them also
// with an error that wraps errBanCut: of so many only the newest are banned.
func (a *Authority) collectSerials(ctx context.Context, node identity.BanSubject) (records []*capb.IssuanceRecord, err error) {
	a.awaitRecording()
	if records, err = a.nodeRecords(ctx, node); err != nil {
		return nil, err
	}
	slices.SortStableFunc(records, func(x, y *capb.IssuanceRecord) int { return cmp.Compare(x.GetNotBefore(), y.GetNotBefore()) })
	a.bansMu.Lock()
	defer a.bansMu.Unlock()
	was := a.banned().records[node.String()]
	for {
		now := a.banned().records[was.Subject]
		if now.revision == 0 || now.Ended != nil {
			return nil, nil // it was removed in the meantime
		}
		if now.revision != was.revision {
			return nil, fmt.Errorf("%w: banning the certificates of %s: %w", ErrUnavailable, node, storage.ErrConflict)
		}
		list, cut := a.fitting(was.Subject, records)
		stored, err := a.storeSerials(ctx, was, list)
		if err != nil {
			return nil, fmt.Errorf("%w: banning the certificates of %s: %w", ErrUnavailable, node, err)
		}
		if stored {
			a.nodes.collected(was.Subject, cut)
			return records, cut
		}
	}
}

// storeSerials makes part of the ban of a node what this replica collected for it. It
// returns false if there is no room for it any more, or the ban is another one now.
// bansMu is held.
func (a *Authority) storeSerials(ctx context.Context, was banRecord, list []revocation.Serial) (bool, error) {
	s := a.banned()
	if own, collected := s.own[was.Subject]; collected && slices.Equal(own, list) {
		return true, nil
	}
	parts := slices.Collect(slices.Chunk(list, revocation.MaxSerials))
	if len(parts) == 0 {
		parts = [][]revocation.Serial{nil} // that they were collected
	}
	for i, part := range slices.Backward(parts) { // the first is last: it says that all are there
		ops := []storage.Op{{Key: revocation.SerialsKey(was.Subject, a.instance, i), Value: revocation.EncodeSerials(part)}}
		for _, key := range s.parts[was.Subject] { // what a longer list had
			if i == 0 && key > revocation.SerialsKey(was.Subject, a.instance, len(parts)-1) && len(ops) < storage.MaxOps-1 {
				ops = append(ops, storage.Op{Key: key, Delete: true})
			}
		}
		for try := 1; ; try++ {
			err := a.commitBans(ctx, a.banned(), []storage.Cond{{Key: revocation.BanKey(was.Subject), Revision: was.revision}}, ops)
			if errors.Is(err, storage.ErrConflict) && try < banTries {
				// Other replicas collect theirs at the same time.
				if err := a.loadBans(ctx); err != nil {
					return false, err
				}
				if a.banned().records[was.Subject].revision != was.revision || a.room(was.Subject) < len(list) {
					return false, nil
				}
				continue
			}
			if err != nil {
				return false, err
			}
			break
		}
		if err := a.loadBans(ctx); err != nil {
			return false, err
		}
	}
	return true, nil
}

// room is how many certificates of a node this replica can ban. bansMu is held.
func (a *Authority) room(subject string) int {
	s := a.banned()
	room := a.cfg.banSerials() + s.mine[subject] // which are replaced
	for _, b := range s.set.All() {
		room -= len(b.Serials)
	}
	return max(room, 0)
}

// errBanCut is why not all certificates of a node are banned with it.
var errBanCut = errors.New("not all of its certificates are banned")

// fitting are those of a node's certificates that bans have room for: the ones that were
// issued last. The error, which wraps errBanCut, names the rest; records are those of all,
// the oldest first. bansMu is held.
func (a *Authority) fitting(subject string, records []*capb.IssuanceRecord) ([]revocation.Serial, error) {
	list := make([]revocation.Serial, 0, len(records))
	for _, r := range records {
		list = append(list, revocation.Serial{Serial: [profile.SerialLength]byte(r.GetSerial()), Until: time.Unix(r.GetNotAfter(), 0).UTC()})
	}
	room := a.room(subject)
	rest := len(list) - room
	if rest <= 0 {
		return list, nil
	}
	var last int64
	ids := map[string]bool{}
	for _, r := range records[:rest] {
		last = max(last, r.GetNotAfter())
		ids[r.GetSpiffeId()] = true
	}
	names, more := slices.Sorted(maps.Keys(ids)), ""
	if n := len(names) - maxNamed; n > 0 {
		names, more = names[:maxNamed], fmt.Sprintf(" and %d more", n)
	}
	return list[rest:], fmt.Errorf("%w: the newest %d of %d are, and the bans of nodes can mean %d; the others end by %s and are of %s%s: ban these SPIFFE IDs too, or replace the intermediate",
		errBanCut, room, len(list), a.cfg.banSerials(), time.Unix(last, 0).UTC().Format(time.RFC3339), strings.Join(names, ", "), more)
}

// maxNamed is how many SPIFFE IDs an alarm names.
const maxNamed = 8

// revokeAll revokes certificates by their records, those that can be, in one list.
func (a *Authority) revokeAll(ctx context.Context, records []*capb.IssuanceRecord, comment, by string) (n int, err error) {
	now := a.clock.past()
	n, err = func() (int, error) {
		a.revokeMu.Lock()
		defer a.revokeMu.Unlock()
		if err := a.storeRevoked(ctx); err != nil { // of an attempt before
			return 0, err
		}
		set := a.revoked.Value()
		var decisions []*capb.Decision
		for _, r := range records {
			if set.Has(r.GetSerial()) || len(r.GetAuthority()) == 0 {
				continue
			}
			decisions = append(decisions, &capb.Decision{What: capb.Decision_WHAT_REVOKED, Instance: uint32(a.instance), Reason: comment, By: by,
				Revoked: &capb.RevokedCertificate{Serial: r.GetSerial(), SpiffeId: r.GetSpiffeId(), Authority: r.GetAuthority(),
					Reason: uint32(bannedReason), Revoked: now.Unix(), NotAfter: r.GetNotAfter()}})
		}
		if len(set)+len(decisions) > maxRevoked {
			return 0, fmt.Errorf("%w: %d certificates would be revoked; %d are the most: replace the intermediate", errNotRevoked, len(set)+len(decisions), maxRevoked)
		}
		return a.recordRevoked(ctx, decisions...)
	}()
	if err != nil || n == 0 && !a.listsDue(now) {
		return n, err
	}
	return n, a.relist(ctx)
}
