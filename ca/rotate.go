package ca

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/journal"
	"github.com/signet-mesh/signet/ca/rotation"
	"github.com/signet-mesh/signet/storage"
)

// This file does what package rotation decides, for an authority with a root of its
// own. rotationMu is held by whoever does a step, so that keys and what is in memory
// follow the journal.

// errFixedKey is why no root is made where the configuration names one key.
var errFixedKey = errors.New("authority.keys.root names one key, and the active root has it: a new root needs another one; name that, the former one stays where it is")

// rules are what the configuration says about rotation.
func (c Config) rules() rotation.Rules {
	longest := c.Propagation
	for _, d := range c.Consumers {
		longest = max(longest, d)
	}
	return rotation.Rules{Leaf: c.SVID.MaxTTL, Propagation: longest, Slack: c.SVID.Backdate, Deadline: min(c.IntermediateTTL, c.RootTTL/4)}
}

func (a *Authority) rotationView(now time.Time) rotation.View {
	return rotation.View{Now: now, Agents: a.counting(), Rules: a.cfg.rules()}
}

// rotationState is the state of the journal, parsed once for each time that it was
// replaced: what other replicas have changes without a revision of this one's.
func (a *Authority) rotationState() (rotation.State, error) {
	a.journalMu.Lock()
	j, reads := a.journal, a.journalReads
	a.journalMu.Unlock()
	if p := a.parsed.Load(); p != nil && p.reads == reads {
		return p.state, nil
	}
	s, err := j.Rotation()
	if err == nil {
		a.parsed.Store(&parsedRotation{reads, s})
	}
	return s, err
}

// parsedRotation is the state of a journal.
type parsedRotation struct {
	reads uint64
	state rotation.State
}

// rotate changes the journal by a transition of package rotation, and publishes trust if
// that changed. added are authorities that the transition brings in. Keys of those that
// leave are removed.
func (a *Authority) rotate(ctx context.Context, f func(rotation.State) (rotation.State, error), added ...journal.Entry) error {
	a.trustMu.Lock()
	defer a.trustMu.Unlock()
	var gone []journal.Entry
	before := a.current().Sequence
	err := a.edit(ctx, func(j *journal.Journal) error {
		s, err := j.Rotation()
		if err != nil {
			return err
		}
		if s, err = f(s); err != nil {
			return err
		}
		for _, e := range added {
			// The entry of one that was published before it is used, or of its request.
			j.Authorities = append(slices.DeleteFunc(j.Authorities, e.Follows), e)
		}
		gone, err = j.Turn(s)
		return err
	})
	if err != nil {
		return err
	}
	after := a.current()
	for _, e := range gone {
		if e.Key == "" || slices.ContainsFunc(after.Authorities, func(o journal.Entry) bool { return o.Key == e.Key }) {
			continue
		}
		if err := a.keys.Remove(e.Kind, e.Key); err != nil {
			a.cfg.Log.Warn("a key that signs nothing any more stays behind", "kind", e.Kind, "err", err)
		}
	}
	if after.Sequence == before {
		return nil
	}
	return a.changed(ctx)
}

// firstRoot makes the root and the intermediate that a new authority begins with.
func (a *Authority) firstRoot(ctx context.Context) ([]journal.Entry, error) {
	root, rootEntry, err := a.newAuthority(ctx, nil)
	if err != nil {
		return nil, err
	}
	iss, entry, err := a.newAuthority(ctx, root)
	if err != nil {
		return nil, err
	}
	now, err := a.clock.now()
	if err != nil {
		return nil, err
	}
	s, err := rotation.State{}.Prepare(rootOf(root), now)
	if err == nil {
		s, err = s.Succeed(a.intermediateOf(iss, s), rotation.View{Now: now, Rules: a.cfg.rules()})
	}
	if err != nil {
		return nil, err
	}
	j := journal.Journal{Authorities: []journal.Entry{rootEntry, entry}}
	_, err = j.Turn(s)
	return j.Authorities, err
}

// rootOf is what package rotation needs to know of a root.
func rootOf(iss *issuer) rotation.Root {
	return rotation.Root{ID: journal.ID(iss.cert), Start: iss.cert.NotBefore, End: iss.cert.NotAfter}
}

// intermediateOf is what package rotation needs to know of an intermediate that the
// active root signed.
func (a *Authority) intermediateOf(iss *issuer, s rotation.State) rotation.Intermediate {
	active, _ := s.Active()
	return rotation.Intermediate{ID: journal.ID(iss.cert), Root: active.ID, Replica: a.instance, Start: iss.cert.NotBefore, End: iss.cert.NotAfter}
}

// rotateDue does what is due of this authority's own root and intermediate, and raises
// the alarms. It does nothing where the root is somebody else's.
func (a *Authority) rotateDue(ctx context.Context) error {
	if a.cfg.source() != sourceOwn {
		return nil
	}
	a.rotationMu.Lock()
	defer a.rotationMu.Unlock()
	now, err := a.clock.now()
	if err != nil {
		return fmt.Errorf("rotating authorities: %w", err)
	}
	if err := a.adopt(ctx); err != nil {
		return fmt.Errorf("rotating authorities: %w", err)
	}
	s, err := a.rotationState()
	if err != nil {
		return err
	}
	v := a.rotationView(now)
	// What cannot be done of a root is an alarm as long as the present one is good; that
	// there is no intermediate soon is a failure. A bad answer of the replica with the root
	// is like none: the present one goes on.
	var failed, troubles []error
	due := s.Due(a.instance, v)
	if !slices.ContainsFunc(due, func(step rotation.Step) bool { return step.Do != rotation.DoSucceed }) {
		a.heldUpSince = time.Time{} // somebody has done it
	}
	for _, step := range due {
		switch err := a.rotationStep(ctx, step, now); {
		case err == nil, errors.Is(err, errElsewhere):
		case step.Do == rotation.DoSucceed && !errors.Is(err, errBadAnswer):
			failed = append(failed, err)
		default:
			troubles = append(troubles, err)
		}
	}
	a.alarm("rotation", errors.Join(troubles...))
	if s, err = a.rotationState(); err != nil {
		return errors.Join(append(failed, err)...)
	}
	a.watchRotation(s, v)
	a.watchRequest(now)
	if m, ok := s.Issuer(a.instance, now); ok && now.After(m.Start.Add(m.End.Sub(m.Start)/2)) {
		if r, ok := s.Root(m.Root); ok && !m.End.Before(r.End) {
			failed = append(failed, fmt.Errorf("the intermediate cannot be renewed: its root ends at %s and has to be replaced (`signet ca authority list`)", r.End.Format(time.RFC3339)))
		}
	}
	return errors.Join(failed...)
}

func (a *Authority) rotationStep(ctx context.Context, step rotation.Step, now time.Time) error {
	if step.Do == rotation.DoSucceed {
		if a.staged.Load() != nil {
			return nil // it waits for its list
		}
		return a.renewIntermediate(ctx)
	}
	still := func() (bool, error) {
		s, err := a.rotationState()
		return slices.Contains(s.Due(a.instance, a.rotationView(now)), step), err
	}
	return a.alone(ctx, 0, still, func() error { return a.rootStep(ctx, step, now) })
}

// rootStep does what is due of a root.
func (a *Authority) rootStep(ctx context.Context, step rotation.Step, now time.Time) error {
	switch step.Do {
	case rotation.DoPrepare:
		return a.prepareRoot(ctx)
	case rotation.DoPublish:
		return a.publishRoot(ctx, now)
	case rotation.DoActivate:
		return a.activateRoot(ctx, step.Override, "the deadline")
	case rotation.DoRemove:
		err := a.rotate(ctx, func(s rotation.State) (rotation.State, error) {
			return s.Remove(step.Root, rotation.View{Now: now, Rules: a.cfg.rules()}, step.Override)
		})
		if err == nil {
			a.cfg.Log.Info("an old root left the bundle", "root", step.Root, "sequence", a.current().Sequence)
		}
		return err
	case rotation.DoDiscard:
		return a.discardRoot(ctx, step.Root)
	}
	return fmt.Errorf("step %q is not known", step.Do)
}

// prepareRoot makes a root with a key of its own, which nobody trusts yet. rotationMu is
// held.
func (a *Authority) prepareRoot(ctx context.Context) error {
	s, err := a.rotationState()
	if err != nil {
		return err
	}
	if next, ok := s.Next(); ok {
		return fmt.Errorf("preparing a root: %w: root %s is %s", rotation.ErrStage, next.ID, next.Stage)
	}
	iss, entry, err := a.newAuthority(ctx, nil)
	if err != nil {
		return fmt.Errorf("preparing a root: %w", err)
	}
	now, err := a.clock.now()
	if err == nil {
		err = a.rotate(ctx, func(s rotation.State) (rotation.State, error) { return s.Prepare(rootOf(iss), now) }, entry)
	}
	if err != nil {
		return a.dropKey(entry, err)
	}
	a.cfg.Log.Info("the next root is prepared", "root", journal.ID(iss.cert), "not_after", iss.cert.NotAfter)
	return nil
}

// publishRoot puts the prepared root into the bundle. rotationMu is held.
func (a *Authority) publishRoot(ctx context.Context, now time.Time) error {
	err := a.rotate(ctx, func(s rotation.State) (rotation.State, error) { return s.Publish(now) })
	if err == nil {
		a.cfg.Log.Info("the next root is published; it is used when everybody has it", "sequence", a.current().Sequence)
	}
	return err
}

// discardRoot gives up the root that is on the way. rotationMu is held.
func (a *Authority) discardRoot(ctx context.Context, id string) error {
	err := a.rotate(ctx, func(s rotation.State) (rotation.State, error) { return s.Discard(id) })
	if err == nil {
		a.cfg.Log.Warn("the root on the way is discarded", "root", id, "sequence", a.current().Sequence)
	}
	return err
}

// activateRoot lets the published root sign. An override that does not wait for
// somebody is recorded in the issuance log first: by is who decided. rotationMu is held.
func (a *Authority) activateRoot(ctx context.Context, o rotation.Override, by string) error {
	now, err := a.clock.now()
	if err != nil {
		return err
	}
	j := a.current()
	s, err := j.Rotation()
	if err != nil {
		return err
	}
	next, ok := s.Next()
	if !ok || next.Stage != rotation.Published {
		return fmt.Errorf("activating the next root: %w: no root is published", rotation.ErrStage)
	}
	// Its key first: a root that cannot sign must not become the active one.
	iss, err := a.ownRoot(j, next.ID)
	if err != nil {
		return fmt.Errorf("activating root %s: %w", next.ID, err)
	}
	v := a.rotationView(now)
	waits := s.Waiting(v)
	if waits != nil && o != "" {
		if err := a.recordOverride(ctx, next.ID, "activated", o, by, waits); err != nil {
			return err
		}
	}
	err = a.rotate(ctx, func(s rotation.State) (rotation.State, error) {
		// What is on record, and opened, is that one; another replica whose turn ran into this
		// one may have put another in its place.
		if r, ok := s.Next(); !ok || r.ID != next.ID {
			return s, fmt.Errorf("activating root %s: %w: it is not the one on the way any more (`signet ca authority list`)", next.ID, rotation.ErrStage)
		}
		return s.Activate(v, o)
	})
	if err != nil {
		return err
	}
	a.root.Store(iss)
	a.staged.Store(nil) // below the former root
	a.cfg.Log.Info("another root is active", "root", next.ID, "not_after", iss.cert.NotAfter)
	return nil
}

// recordOverride makes the issuance log say what was not waited for.
func (a *Authority) recordOverride(ctx context.Context, id, done string, o rotation.Override, by string, waits *rotation.WaitingError) error {
	missing := "for nobody"
	if waits != nil {
		missing = waits.Error()
		a.metrics.overrides.WithLabelValues(string(o)).Inc()
		a.cfg.Log.Error("a root is "+done+" although somebody is missing", "root", id, "override", string(o), "by", by, "err", waits)
	}
	return a.decide(ctx, &capb.Decision{What: capb.Decision_WHAT_ROTATION_OVERRIDDEN, Instance: uint32(a.instance), By: by,
		Reason: strings.TrimSpace(fmt.Sprintf("root %s is %s; %s %s", id, done, missing, o))})
}

// ownRoot is a root in the journal, with its key if this replica holds that.
func (a *Authority) ownRoot(j journal.Journal, id string) (*issuer, error) {
	for _, e := range j.Authorities {
		if !e.Turns() || e.Kind != journal.KindRoot {
			continue
		}
		c, err := e.Cert()
		if err != nil {
			return nil, err
		}
		if journal.ID(c) != id {
			continue
		}
		if !a.holdsRoot() {
			return &issuer{cert: c}, nil
		}
		key, err := a.keys.Open(journal.KindRoot, e.Key, c.PublicKey)
		if err != nil {
			return nil, err
		}
		return issuerOf(e, key)
	}
	return nil, fmt.Errorf("%w: root %s", rotation.ErrUnknown, id)
}

// errOtherRoot is why an intermediate is not used: another replica has activated another
// root since it was made.
var errOtherRoot = errors.New("it is not below the active root")

// succeed makes an intermediate below the active root the one that signs.
func (a *Authority) succeed(ctx context.Context, iss *issuer, entry journal.Entry) error {
	now, err := a.clock.now()
	if err != nil {
		return a.dropKey(entry, err)
	}
	entry.State = journal.StateActive
	err = a.rotate(ctx, func(s rotation.State) (rotation.State, error) {
		active, _ := s.Active() // another replica may have changed it a moment ago
		if root := a.root.Load(); root == nil || journal.ID(root.cert) != active.ID || iss.cert.CheckSignatureFrom(root.cert) != nil {
			return s, fmt.Errorf("the intermediate %s: %w", iss.cert.Subject, errOtherRoot)
		}
		v := rotation.View{Now: now, Rules: a.cfg.rules()}
		if signs := a.intermediate.Load(); signs != nil {
			s, _ = s.Signed(journal.ID(signs.cert), v) // by the journal another one may have taken its place before
		}
		return s.Succeed(a.intermediateOf(iss, s), v)
	}, entry)
	if err != nil {
		return a.dropKey(entry, err)
	}
	a.intermediate.Store(iss)
	a.cfg.Log.Info("intermediate renewed", "serial", journal.ID(iss.cert), "not_after", iss.cert.NotAfter)
	return nil
}

// replaceExpiredRoot is for an authority that was down until its root had ended: nobody
// can be waited for any more. What it does is what the deadline would have done.
func (a *Authority) replaceExpiredRoot(ctx context.Context) error {
	a.cfg.Log.Error("the root ended while the authority was away; another one takes its place now", "not_after", a.root.Load().cert.NotAfter)
	for range 4 { // prepare, publish, activate, succeed
		if err := a.rotateDue(ctx); err != nil {
			return err
		}
		if now := a.clock.latest(); now.Before(a.root.Load().cert.NotAfter) && now.Before(a.intermediate.Load().cert.NotAfter) {
			return nil
		}
	}
	return fmt.Errorf("the root ended at %s, and no other could take its place", a.root.Load().cert.NotAfter.Format(time.RFC3339))
}

// watchRotation says who is waited for, and who cannot verify what is issued.
func (a *Authority) watchRotation(s rotation.State, v rotation.View) {
	active, _ := s.Active()
	waits := s.Waiting(v)
	lacking := s.Lacking(active.ID, v)
	var held, without error
	if next, ok := s.Next(); ok && waits != nil && len(waits.Nodes) > 0 && waits.Until.IsZero() {
		held = fmt.Errorf("root %s is published and not used yet, because agents have not acknowledged it on: %s; from %s on it is used whoever is missing (`signet ca authority list`)",
			next.ID, strings.Join(waits.Nodes, ", "), active.End.Add(-v.Rules.Deadline).Format(time.RFC3339))
	}
	a.alarm("next root", held)
	// Agents say what they acknowledged again when they are back after a start.
	if len(lacking) > 0 && time.Since(a.began) > a.cfg.Propagation {
		without = fmt.Errorf("root %s is in use, and agents have not acknowledged it on: %s; what is issued does not verify there until they are back", active.ID, strings.Join(lacking, ", "))
	}
	a.alarm("active root", without)
	var replaced error
	for _, r := range s.Roots {
		if !r.Condemned.IsZero() {
			replaced = errors.Join(replaced, fmt.Errorf("root %s is being replaced in an emergency since %s, and is trusted until that is done: `signet ca authority replace-root --now %s` goes on with it",
				r.ID, r.Condemned.Format(time.RFC3339), r.ID))
		}
	}
	a.alarm("root replacement", replaced)
	missing := 0
	if waits != nil {
		missing = len(waits.Nodes)
	}
	a.metrics.waitsFor.Set(float64(missing))
	a.metrics.lacking.Set(float64(len(lacking)))
}

// counting are the agents that are waited for, with what they acknowledged: until their
// node is gone, or the last SVID that they can have been given has ended.
func (a *Authority) counting() (out []rotation.Agent) {
	as := a.agents
	if as == nil {
		return nil // nobody serves agents yet
	}
	newest := a.trust.Value().Sequence()
	as.mu.RLock()
	defer as.mu.RUnlock()
	gone := map[string]bool{}
	stored := as.stored()
	for _, r := range as.bySerial {
		said := stored[r.machine()]
		c := rotation.Agent{Node: r.Node, Until: r.until(a.cfg.SVID.TTL), Acknowledged: said.acknowledged, Renewed: said.renewed}
		if s := as.streams[r.machine()]; s != nil {
			c.Acknowledged, c.Renewed = max(c.Acknowledged, s.acknowledged), max(c.Renewed, s.renewed)
		}
		if min(c.Acknowledged, c.Renewed) < newest {
			key := r.Node + "\x00" + r.NodeUID
			is, known := gone[key]
			if !known {
				is = a.nodeGone(r)
				gone[key] = is
			}
			if is {
				continue
			}
		}
		out = append(out, c)
	}
	for key := range as.unread {
		// Its end cannot be read either: it counts until it is gone, or somebody forces.
		out = append(out, rotation.Agent{Node: "(unreadable record " + key + ")", Until: endOfTime})
	}
	return out
}

// endOfTime is later than any certificate ends (RFC 5280 §4.1.2.5).
var endOfTime = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)

// nodeGone reports whether no pod is left on the node that an agent was attested on.
func (a *Authority) nodeGone(r *agent) bool { return !a.cfg.Pods.HasNode(r.Node, r.NodeUID) }

// behind are the nodes of agents that count and have not acknowledged a state of trust.
func (a *Authority) behind(sequence uint64, now time.Time) (nodes []string) {
	for _, c := range a.counting() {
		if now.Before(c.Until) && c.Acknowledged < sequence && !slices.Contains(nodes, c.Node) {
			nodes = append(nodes, c.Node)
		}
	}
	slices.Sort(nodes)
	return nodes
}

// journalUnchanged is the condition that the journal is the one that this replica has.
func (a *Authority) journalUnchanged() storage.Cond {
	a.journalMu.Lock()
	defer a.journalMu.Unlock()
	return storage.Cond{Key: journal.Key, Revision: a.journalRevision}
}
