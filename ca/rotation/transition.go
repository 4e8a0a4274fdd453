package rotation

import (
	"fmt"
	"slices"
	"time"
)

// Prepare adds a root that has a key and is not trusted yet. There is one at a time on
// the way. The first root of all is active at once: nobody trusts anything yet.
func (s State) Prepare(r Root, now time.Time) (State, error) {
	if n, ok := s.Next(); ok {
		return s, fmt.Errorf("preparing root %s: %w: root %s is %s; activate or discard it first", r.ID, ErrStage, n.ID, n.Stage)
	}
	if _, ok := s.Root(r.ID); ok || r.ID == "" {
		return s, fmt.Errorf("preparing root %s: %w: it is there already", r.ID, ErrStage)
	}
	if !now.Before(r.End) {
		return s, fmt.Errorf("preparing root %s: it ended at %s", r.ID, r.End.Format(time.RFC3339))
	}
	s = s.clone()
	r.Stage, r.Since, r.Sequence, r.Tainted, r.TaintSequence, r.Condemned = Prepared, now, 0, time.Time{}, 0, time.Time{}
	if len(s.Roots) == 0 {
		s.Sequence++
		r.Stage, r.Sequence = Active, s.Sequence
	}
	s.Roots = append(s.Roots, r)
	return s, nil
}

// Publish puts the prepared root into the bundle.
func (s State) Publish(now time.Time) (State, error) {
	i := s.at(Prepared)
	if i < 0 {
		return s, fmt.Errorf("publishing: %w: no root is prepared", ErrStage)
	}
	s = s.clone()
	s.Sequence++
	s.Roots[i].Stage, s.Roots[i].Since, s.Roots[i].Sequence = Published, now, s.Sequence
	return s, nil
}

// Waiting is what the activation of the published root waits for; nil if for nothing.
func (s State) Waiting(v View) *WaitingError {
	i := s.at(Published)
	if i < 0 {
		return nil
	}
	var w WaitingError
	w.Nodes = v.missing(func(a Agent) bool { return a.Acknowledged >= s.Roots[i].Sequence })
	if at := s.Roots[i].Since.Add(v.Rules.Propagation + v.Rules.Slack); v.Now.Before(at) {
		w.Until = at
	}
	if w.Nodes == nil && w.Until.IsZero() {
		return nil
	}
	return &w
}

// missing are the nodes of agents that count and of which something does not hold.
func (v View) missing(holds func(Agent) bool) (nodes []string) {
	for _, a := range v.Agents {
		if !holds(a) && v.Now.Before(a.Until.Add(v.Rules.Slack)) && !slices.Contains(nodes, a.Node) {
			nodes = append(nodes, a.Node)
		}
	}
	slices.Sort(nodes)
	return nodes
}

// Lacking are the nodes of agents that count and have not acknowledged a root that is
// in the bundle: what is issued below it does not verify there.
func (s State) Lacking(id string, v View) []string {
	r, _ := s.Root(id) // one that is not in the bundle has sequence 0, which nobody lacks
	return v.missing(func(a Agent) bool { return a.Acknowledged >= r.Sequence })
}

// Activate lets the published root sign, in the place of the active one, which is old
// from then on. It waits for the agents and for [Rules.Propagation] unless it is
// overridden; a [Deadline] is checked, too.
func (s State) Activate(v View, o Override) (State, error) {
	i := s.at(Published)
	if i < 0 {
		return s, fmt.Errorf("activating: %w: no root is published", ErrStage)
	}
	if !v.Now.Before(s.Roots[i].End) {
		return s, fmt.Errorf("activating root %s: it ended at %s", s.Roots[i].ID, s.Roots[i].End.Format(time.RFC3339))
	}
	if w := s.Waiting(v); w != nil && o != Force && !(o == Deadline && s.late(v)) {
		return s, fmt.Errorf("activating root %s: %w", s.Roots[i].ID, w)
	}
	s = s.clone()
	if j := s.at(Active); j >= 0 {
		s.Roots[j].Stage, s.Roots[j].Since = Old, v.Now
	}
	s.Roots[i].Stage, s.Roots[i].Since = Active, v.Now
	return s, nil
}

// late reports whether the active root ends so soon that nobody is waited for.
func (s State) late(v View) bool {
	r, ok := s.Active()
	return !ok || !v.Now.Before(r.End.Add(-v.Rules.Deadline))
}

// Succeed gives a replica an intermediate below the active root to sign with. The one
// that it signed with until then signs no more: only its own replica may say so.
func (s State) Succeed(next Intermediate, v View) (State, error) {
	r, ok := s.Root(next.Root)
	switch {
	case !ok:
		return s, fmt.Errorf("taking intermediate %s: %w: root %s", next.ID, ErrUnknown, next.Root)
	case r.Stage != Active || !r.Tainted.IsZero():
		return s, fmt.Errorf("taking intermediate %s: %w: its root %s is %s and not the active one", next.ID, ErrStage, r.ID, r.Stage)
	case next.ID == "" || slices.ContainsFunc(s.Intermediates, func(i Intermediate) bool { return i.ID == next.ID }):
		return s, fmt.Errorf("taking intermediate %s: %w: it is there already", next.ID, ErrStage)
	}
	s = s.clone()
	for i := range s.Intermediates {
		m := &s.Intermediates[i]
		if m.Replica == next.Replica && m.Leaves.IsZero() {
			m.Leaves = earlier(v.Now.Add(v.Rules.Leaf+v.Rules.Slack), m.End)
		}
	}
	// Those without a leaf that could be valid say nothing any more.
	s.Intermediates = slices.DeleteFunc(s.Intermediates, func(m Intermediate) bool { return m.over(v) })
	next.Leaves, next.Tainted = time.Time{}, time.Time{}
	s.Intermediates = append(s.Intermediates, next)
	return s, nil
}

// Signed notes that an intermediate which signs no more by this state has signed until
// now all the same: its replica did not know that another one had taken its place. It
// reports whether that changes anything: it does not for one that signs, for one that is
// not in the state, and within [Rules.Slack] of when its place was taken.
func (s State) Signed(id string, v View) (State, bool) {
	i := slices.IndexFunc(s.Intermediates, func(m Intermediate) bool { return m.ID == id })
	if i < 0 || s.Intermediates[i].Leaves.IsZero() {
		return s, false
	}
	if m := s.Intermediates[i]; !m.Leaves.Before(earlier(v.Now.Add(v.Rules.Leaf), m.End)) {
		return s, false
	}
	s = s.clone()
	m := &s.Intermediates[i]
	m.Leaves = earlier(v.Now.Add(v.Rules.Leaf+v.Rules.Slack), m.End)
	return s, true
}

// over reports whether no leaf of an intermediate can be valid.
func (m Intermediate) over(v View) bool {
	return !v.Now.Before(m.End.Add(v.Rules.Slack)) || !m.Leaves.IsZero() && !v.Now.Before(m.Leaves.Add(v.Rules.Slack))
}

// Remove takes an old root out of the bundle, with its intermediates. It waits until
// no leaf below it can be valid, unless it is forced.
func (s State) Remove(id string, v View, o Override) (State, error) {
	r, ok := s.Root(id)
	if !ok {
		return s, fmt.Errorf("removing root %s: %w", id, ErrUnknown)
	}
	if r.Stage != Old {
		return s, fmt.Errorf("removing root %s: %w: it is %s", id, ErrStage, r.Stage)
	}
	if until := s.leaves(id, v); !until.IsZero() && o != Force {
		return s, fmt.Errorf("removing root %s: %w", id, &WaitingError{Until: until})
	}
	s = s.clone()
	s.Sequence++
	s.drop(id)
	return s, nil
}

// leaves is when the last leaf below a root has ended; zero if it has.
func (s State) leaves(root string, v View) (until time.Time) {
	for _, m := range s.Intermediates {
		if m.Root != root || m.over(v) {
			continue
		}
		end := m.End
		if !m.Leaves.IsZero() {
			end = m.Leaves
		}
		if end = end.Add(v.Rules.Slack); end.After(until) {
			until = end
		}
	}
	return until
}

func (s *State) drop(root string) {
	s.Roots = slices.DeleteFunc(s.Roots, func(r Root) bool { return r.ID == root })
	s.Intermediates = slices.DeleteFunc(s.Intermediates, func(m Intermediate) bool { return m.Root == root })
}

// Discard gives up a root that is prepared or published: nothing was issued below it.
func (s State) Discard(id string) (State, error) {
	r, ok := s.Root(id)
	if !ok {
		return s, fmt.Errorf("discarding root %s: %w", id, ErrUnknown)
	}
	if r.Stage != Prepared && r.Stage != Published {
		return s, fmt.Errorf("discarding root %s: %w: it is %s; taint and revoke it instead", id, ErrStage, r.Stage)
	}
	s = s.clone()
	if r.Stage == Published {
		s.Sequence++
	}
	s.drop(id)
	return s, nil
}

// Revoke takes an old root that is tainted out of the bundle although leaves below it
// can be valid. It waits until every replica has taken another intermediate, every agent
// that counts has said that it replaced what was below the root, and those who say
// nothing had [Rules.Propagation], unless it is forced. Leaves that nobody replaced do
// not verify any more, which is what it is for; the caller records it.
func (s State) Revoke(id string, v View, o Override) (State, error) {
	r, ok := s.Root(id)
	switch {
	case !ok:
		return s, fmt.Errorf("revoking root %s: %w", id, ErrUnknown)
	case r.Stage != Old:
		return s, fmt.Errorf("revoking root %s: %w: it is %s; activate another one first", id, ErrStage, r.Stage)
	case r.Tainted.IsZero():
		return s, fmt.Errorf("revoking root %s: %w: taint it first, so that what is below it is replaced", id, ErrStage)
	}
	if w := s.Unreplaced(id, v); w != nil && o != Force {
		return s, fmt.Errorf("revoking root %s: %w", id, w)
	}
	s = s.clone()
	s.Sequence++
	s.drop(id)
	return s, nil
}

// Unreplaced is what the revocation of a tainted root waits for; nil if for nothing, or
// if the root is not tainted.
func (s State) Unreplaced(id string, v View) *WaitingError {
	r, ok := s.Root(id)
	if !ok || r.Tainted.IsZero() {
		return nil
	}
	w := WaitingError{Nodes: v.missing(func(a Agent) bool { return a.Renewed >= r.TaintSequence })}
	for _, m := range s.Intermediates {
		if m.Root == r.ID && m.Leaves.IsZero() && !m.over(v) && !slices.Contains(w.Replicas, m.Replica) {
			w.Replicas = append(w.Replicas, m.Replica)
		}
	}
	if at := r.Tainted.Add(v.Rules.Propagation + v.Rules.Slack); v.Now.Before(at) {
		w.Until = at
	}
	if w.Nodes == nil && w.Replicas == nil && w.Until.IsZero() {
		return nil
	}
	return &w
}

// Taint marks an old root or an intermediate whose leaves are to be replaced now. The
// active root cannot be tainted: another has to be active first. An intermediate that
// is tainted signs no more, so its replica takes another.
func (s State) Taint(id string, now time.Time) (State, error) {
	if r, ok := s.Root(id); ok && r.Stage != Old {
		return s, fmt.Errorf("tainting root %s: %w: it is %s; activate another one first", id, ErrStage, r.Stage)
	}
	s = s.clone()
	for i := range s.Roots {
		if s.Roots[i].ID == id && s.Roots[i].Tainted.IsZero() {
			s.Sequence++
			s.Roots[i].Tainted, s.Roots[i].TaintSequence = now, s.Sequence
			return s, nil
		}
	}
	for i := range s.Intermediates {
		if s.Intermediates[i].ID == id && s.Intermediates[i].Tainted.IsZero() {
			s.Sequence++
			s.Intermediates[i].Tainted = now
			return s, nil
		}
	}
	return s, fmt.Errorf("tainting %s: %w, or it is tainted already", id, ErrUnknown)
}

// Condemn notes that a root that signs or has signed is being replaced in an emergency.
// One that was noted before stays as it is.
func (s State) Condemn(id string, now time.Time) (State, error) {
	i := slices.IndexFunc(s.Roots, func(r Root) bool { return r.ID == id })
	if i < 0 {
		return s, fmt.Errorf("replacing root %s: %w", id, ErrUnknown)
	}
	if r := s.Roots[i]; r.Stage != Active && r.Stage != Old {
		return s, fmt.Errorf("replacing root %s: %w: it is %s and was not used; discard it instead", id, ErrStage, r.Stage)
	}
	if s.Roots[i].Condemned.IsZero() {
		s = s.clone()
		s.Roots[i].Condemned = now
	}
	return s, nil
}

// Tainted are the IDs of authorities whose leaves are to be replaced now.
func (s State) Tainted() (ids []string) {
	for _, r := range s.Roots {
		if !r.Tainted.IsZero() {
			ids = append(ids, r.ID)
		}
	}
	for _, m := range s.Intermediates {
		if r, _ := s.Root(m.Root); !m.Tainted.IsZero() || !r.Tainted.IsZero() {
			ids = append(ids, m.ID)
		}
	}
	return ids
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
