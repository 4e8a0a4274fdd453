package rotation_test

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca/rotation"
)

// Every transition on a life of two roots: what it waits for, to the second, what it
// refuses, and what it leaves as it was.
var (
	day  = 24 * time.Hour
	t0   = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	life = rotation.Rules{Leaf: 24 * time.Hour, Propagation: time.Minute, Slack: time.Second, Deadline: 7 * day}
)

func root(id string, start time.Time) rotation.Root {
	return rotation.Root{ID: id, Start: start, End: start.Add(100 * day)}
}

func inter(id, root string, replica uint8, start time.Time) rotation.Intermediate {
	return rotation.Intermediate{ID: id, Root: root, Replica: replica, Start: start, End: start.Add(8 * day)}
}

func when(now time.Time, agents ...rotation.Agent) rotation.View {
	return rotation.View{Now: now, Agents: agents, Rules: life}
}

func mustBe(t *testing.T) func(rotation.State, error) rotation.State {
	return func(s rotation.State, err error) rotation.State {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
}

// refused sees that a transition failed and changed nothing.
func refused(t *testing.T, want error, text string, before, after rotation.State, err error) {
	t.Helper()
	if err == nil || want != nil && !errors.Is(err, want) || !strings.Contains(err.Error(), text) {
		t.Errorf("error %v, want %v with %q", err, want, text)
	}
	if !same(before, after) {
		t.Errorf("a transition that failed changed %+v to %+v", before, after)
	}
}

// waits sees that a transition waits for exactly these.
func waits(t *testing.T, nodes string, until time.Time, before, after rotation.State, err error) {
	t.Helper()
	var w *rotation.WaitingError
	if !errors.As(err, &w) {
		t.Fatalf("it does not wait: %v", err)
	}
	if got := strings.Join(w.Nodes, " "); got != nodes || !w.Until.Equal(until) {
		t.Errorf("it waits for %q until %v, want %q until %v", got, w.Until, nodes, until)
	}
	if !same(before, after) {
		t.Errorf("a transition that waits changed %+v to %+v", before, after)
	}
}

func same(a, b rotation.State) bool {
	return a.Sequence == b.Sequence && slices.Equal(a.Roots, b.Roots) && slices.Equal(a.Intermediates, b.Intermediates)
}

// first is an authority with one root and an intermediate for each of two replicas.
func first(t *testing.T) rotation.State {
	t.Helper()
	s := mustBe(t)(rotation.State{}.Prepare(root("a", t0), t0))
	s = mustBe(t)(s.Succeed(inter("i1", "a", 1, t0), when(t0)))
	return mustBe(t)(s.Succeed(inter("j1", "a", 2, t0), when(t0)))
}

func TestTransitions(t *testing.T) {
	t.Parallel()
	s := first(t)
	if s.Sequence != 1 || !slices.Equal(s.Trusted(), []string{"a"}) {
		t.Fatalf("the first root: %+v", s)
	}
	if a, ok := s.Active(); !ok || a.Sequence != 1 || !a.Since.Equal(t0) {
		t.Fatalf("the first root is active at once, not %+v", a)
	}

	// Prepare.
	after, err := s.Prepare(root("a", t0), t0)
	refused(t, rotation.ErrStage, "there already", s, after, err)
	after, err = s.Prepare(root("", t0), t0)
	refused(t, rotation.ErrStage, "there already", s, after, err)
	after, err = s.Prepare(root("b", t0), t0.Add(100*day))
	refused(t, nil, "it ended at", s, after, err)
	after, err = s.Publish(t0)
	refused(t, rotation.ErrStage, "no root is prepared", s, after, err)
	after, err = s.Activate(when(t0), rotation.Force)
	refused(t, rotation.ErrStage, "no root is published", s, after, err)
	now := t0.Add(50 * day)
	b := root("b", now)
	b.Tainted, b.TaintSequence, b.Sequence, b.Stage = now, 9, 9, rotation.Old // what a caller says of these does not count
	p := mustBe(t)(s.Prepare(b, now))
	if r, _ := p.Root("b"); p.Sequence != 1 || r.Stage != rotation.Prepared || r.Sequence != 0 || !r.Since.Equal(now) || !r.Tainted.IsZero() || r.TaintSequence != 0 {
		t.Errorf("prepared: %+v", p)
	}
	if len(s.Roots) != 1 || !slices.Equal(p.Trusted(), []string{"a"}) || p.Lacking("b", when(now, rotation.Agent{Node: "n", Until: now.Add(day)})) != nil {
		t.Error("a prepared root is trusted")
	}
	after, err = p.Prepare(root("c", now), now)
	refused(t, rotation.ErrStage, "root b is prepared", p, after, err)
	after, err = p.Activate(when(now), rotation.Force)
	refused(t, rotation.ErrStage, "no root is published", p, after, err)

	// Publish and activate.
	p2 := mustBe(t)(p.Publish(now.Add(time.Second)))
	if r, _ := p2.Root("b"); p2.Sequence != 2 || r.Stage != rotation.Published || r.Sequence != 2 || !r.Since.Equal(now.Add(time.Second)) || !slices.Equal(p2.Trusted(), []string{"a", "b"}) {
		t.Errorf("published: %+v", p2)
	}
	at := now.Add(time.Second + life.Propagation + life.Slack)
	agents := []rotation.Agent{
		{Node: "y", Acknowledged: 1, Until: at.Add(time.Hour)}, {Node: "x", Acknowledged: 1, Until: at.Add(-life.Slack).Add(time.Nanosecond)},
		{Node: "x", Acknowledged: 1, Until: at.Add(time.Hour)}, {Node: "over", Acknowledged: 1, Until: at.Add(-life.Slack)}, {Node: "z", Acknowledged: 2, Until: at.Add(time.Hour)},
	}
	after, err = p2.Activate(when(at, agents...), "")
	waits(t, "x y", time.Time{}, p2, after, err)
	after, err = p2.Activate(when(at, agents...), rotation.Deadline)
	waits(t, "x y", time.Time{}, p2, after, err)
	after, err = p2.Activate(when(at.Add(-time.Nanosecond)), "")
	waits(t, "", at, p2, after, err)
	after, err = p2.Activate(when(p2.Roots[1].End), rotation.Force)
	refused(t, nil, "it ended at", p2, after, err)
	if got := p2.Lacking("b", when(at, agents...)); !slices.Equal(got, []string{"x", "y"}) {
		t.Errorf("b is not acknowledged by %v", got)
	}
	if got := p2.Lacking("a", when(at, agents...)); got != nil {
		t.Errorf("a is not acknowledged by %v", got)
	}
	if got := p2.Lacking("nobody", when(at, agents...)); got != nil {
		t.Errorf("a root that is not there is missed by %v", got)
	}
	deadline := t0.Add(93 * day)
	after, err = p2.Activate(when(deadline.Add(-time.Nanosecond), rotation.Agent{Node: "y", Until: deadline.Add(day)}), rotation.Deadline)
	waits(t, "y", time.Time{}, p2, after, err)
	mustBe(t)(p2.Activate(when(deadline, rotation.Agent{Node: "y", Until: deadline.Add(day)}), rotation.Deadline))
	mustBe(t)(p2.Activate(when(now.Add(time.Second), agents...), rotation.Force))
	act := mustBe(t)(p2.Activate(when(at), ""))
	if ra, _ := act.Root("a"); ra.Stage != rotation.Old || !ra.Since.Equal(at) {
		t.Errorf("the former root: %+v", ra)
	}
	if rb, ok := act.Active(); !ok || rb.ID != "b" || !rb.Since.Equal(at) || act.Sequence != 2 {
		t.Errorf("the active root: %+v", rb)
	}
	if p2.Waiting(when(at)) != nil || act.Waiting(when(t0, agents...)) != nil {
		t.Error("nothing is waited for")
	}

	// Succeed.
	after, err = act.Succeed(inter("i2", "a", 1, at), when(at))
	refused(t, rotation.ErrStage, "its root a is old", act, after, err)
	after, err = act.Succeed(inter("i2", "c", 1, at), when(at))
	refused(t, rotation.ErrUnknown, "root c", act, after, err)
	after, err = act.Succeed(inter("i1", "b", 1, at), when(at))
	refused(t, rotation.ErrStage, "there already", act, after, err)
	after, err = act.Succeed(inter("", "b", 1, at), when(at))
	refused(t, rotation.ErrStage, "there already", act, after, err)
	// Those of the first root have ended by now, so nothing is left to say of them.
	i2 := inter("i2", "b", 1, at)
	i2.Leaves, i2.Tainted = at, at
	one := mustBe(t)(act.Succeed(i2, when(at)))
	if len(one.Intermediates) != 1 || one.Intermediates[0].ID != "i2" || !one.Intermediates[0].Leaves.IsZero() || !one.Intermediates[0].Tainted.IsZero() {
		t.Errorf("intermediates: %+v", one.Intermediates)
	}
	if m, ok := one.Issuer(1, at); !ok || m.ID != "i2" {
		t.Errorf("replica 1 signs with %+v", m)
	}
	if _, ok := one.Issuer(2, at); ok {
		t.Error("replica 2 signs with something that ended")
	}
	if _, ok := one.Issuer(1, at.Add(8*day)); ok {
		t.Error("replica 1 signs with something that ended")
	}
	later := at.Add(4 * day)
	two := mustBe(t)(one.Succeed(inter("i3", "b", 1, later), when(later)))
	if m := two.Intermediates[0]; m.ID != "i2" || !m.Leaves.Equal(later.Add(life.Leaf+life.Slack)) {
		t.Errorf("the former intermediate: %+v", m)
	}
	last := at.Add(8 * day).Add(-time.Hour)
	if m := mustBe(t)(one.Succeed(inter("i3", "b", 1, last), when(last))).Intermediates[0]; !m.Leaves.Equal(m.End) {
		t.Errorf("no leaf outlives its intermediate: %+v", m)
	}
	if other := mustBe(t)(two.Succeed(inter("j2", "b", 2, later), when(later))); !other.Intermediates[1].Leaves.IsZero() {
		t.Error("a replica said that another signs no more")
	}
}

// lived is an authority whose first root is old, with intermediates of a life that
// overlap.
func lived(t *testing.T) (s rotation.State, at time.Time) {
	t.Helper()
	at = t0.Add(4 * day)
	s = first(t)
	s = mustBe(t)(s.Prepare(root("b", at), at))
	s = mustBe(t)(s.Publish(at))
	s = mustBe(t)(s.Activate(when(at), rotation.Force))
	return s, at
}

func TestTransitionsOfAnOldRoot(t *testing.T) {
	t.Parallel()
	s, at := lived(t)
	after, err := s.Remove("a", when(at), "")
	waits(t, "", t0.Add(8*day+life.Slack), s, after, err)
	after, err = s.Remove("b", when(at), rotation.Force)
	refused(t, rotation.ErrStage, "it is active", s, after, err)
	after, err = s.Remove("c", when(at), rotation.Force)
	refused(t, rotation.ErrUnknown, "root c", s, after, err)
	after, err = s.Discard("a")
	refused(t, rotation.ErrStage, "taint and revoke", s, after, err)
	after, err = s.Discard("c")
	refused(t, rotation.ErrUnknown, "root c", s, after, err)

	// One replica signs below the new root, the other could still below the old one.
	one := mustBe(t)(s.Succeed(inter("i2", "b", 1, at), when(at)))
	after, err = one.Remove("a", when(at.Add(2*day)), "")
	waits(t, "", t0.Add(8*day+life.Slack), one, after, err)
	both := mustBe(t)(one.Succeed(inter("j2", "b", 2, at), when(at)))
	end := at.Add(life.Leaf + 2*life.Slack)
	after, err = both.Remove("a", when(end.Add(-time.Nanosecond)), "")
	waits(t, "", end, both, after, err)
	gone := mustBe(t)(both.Remove("a", when(end), ""))
	if gone.Sequence != both.Sequence+1 || !slices.Equal(gone.Trusted(), []string{"b"}) || len(gone.Intermediates) != 2 {
		t.Errorf("after it left: %+v", gone)
	}
	if forced := mustBe(t)(both.Remove("a", when(at), rotation.Force)); !same(forced, gone) {
		t.Errorf("by force: %+v", forced)
	}
	if len(both.Roots) != 2 || len(both.Intermediates) != 4 {
		t.Error("a transition changed what it was called on")
	}

	// Taint and revoke.
	after, err = both.Taint("b", at)
	refused(t, rotation.ErrStage, "activate another one first", both, after, err)
	after, err = both.Taint("c", at)
	refused(t, rotation.ErrUnknown, "c", both, after, err)
	after, err = both.Revoke("a", when(end), rotation.Force)
	refused(t, rotation.ErrStage, "taint it first", both, after, err)
	after, err = both.Revoke("b", when(end), rotation.Force)
	refused(t, rotation.ErrStage, "activate another one first", both, after, err)
	after, err = both.Revoke("c", when(end), rotation.Force)
	refused(t, rotation.ErrUnknown, "root c", both, after, err)
	tainted := mustBe(t)(both.Taint("a", at))
	if got := tainted.Tainted(); !slices.Equal(got, []string{"a", "i1", "j1"}) || tainted.Sequence != both.Sequence+1 || len(both.Tainted()) != 0 {
		t.Errorf("tainted: %v at %d", got, tainted.Sequence)
	}
	after, err = tainted.Taint("a", at.Add(time.Hour))
	refused(t, rotation.ErrUnknown, "tainted already", tainted, after, err)
	seq := tainted.Sequence
	soon := at.Add(life.Propagation + life.Slack)
	n := rotation.Agent{Node: "n", Renewed: seq - 1, Acknowledged: seq, Until: soon.Add(day)}
	done := rotation.Agent{Node: "m", Renewed: seq, Until: soon.Add(day)}
	after, err = tainted.Revoke("a", when(soon, n, done), "")
	waits(t, "n", time.Time{}, tainted, after, err)
	after, err = tainted.Revoke("a", when(soon.Add(-time.Nanosecond), done), "")
	waits(t, "", soon, tainted, after, err)
	if tainted.Unreplaced("a", when(soon, done)) != nil || tainted.Unreplaced("b", when(soon, n)) != nil || tainted.Unreplaced("c", when(soon, n)) != nil || both.Unreplaced("a", when(soon, n)) != nil {
		t.Error("nothing is waited for")
	}
	revoked := mustBe(t)(tainted.Revoke("a", when(soon, done), ""))
	if revoked.Sequence != seq+1 || !slices.Equal(revoked.Trusted(), []string{"b"}) || len(revoked.Intermediates) != 2 {
		t.Errorf("revoked: %+v", revoked)
	}
	mustBe(t)(tainted.Revoke("a", when(at, n), rotation.Force))

	// A replica that still signs below the root holds its revocation up, not by force.
	half := mustBe(t)(one.Taint("a", at))
	if _, ok := half.Issuer(2, at); ok {
		t.Error("replica 2 signs below a tainted root")
	}
	_, err = half.Revoke("a", when(soon), "")
	var w *rotation.WaitingError
	if !errors.As(err, &w) || !slices.Equal(w.Replicas, []uint8{2}) || !strings.Contains(err.Error(), "[2]") {
		t.Errorf("revoking below a replica: %v", err)
	}
	if w := half.Unreplaced("a", when(t0.Add(8*day+life.Slack))); w != nil {
		t.Errorf("its intermediate has ended, and it is waited for: %v", w)
	}

	// An intermediate.
	ti := mustBe(t)(both.Taint("i2", at))
	if got := ti.Tainted(); !slices.Equal(got, []string{"i2"}) || ti.Sequence != both.Sequence+1 {
		t.Errorf("tainted: %v", got)
	}
	if _, ok := ti.Issuer(1, at); ok {
		t.Error("a tainted intermediate signs")
	}
	after, err = ti.Taint("i2", at)
	refused(t, rotation.ErrUnknown, "tainted already", ti, after, err)
}

func TestTransitionsDiscard(t *testing.T) {
	t.Parallel()
	s := first(t)
	p := mustBe(t)(s.Prepare(root("b", t0), t0))
	if d := mustBe(t)(p.Discard("b")); !same(d, s) {
		t.Errorf("discarded: %+v", d)
	}
	p = mustBe(t)(p.Publish(t0))
	if d := mustBe(t)(p.Discard("b")); d.Sequence != 3 || len(d.Roots) != 1 {
		t.Errorf("discarded after it was published: %+v", d)
	}
}

// TestTransitionsDoNotAskForOrder: a root is found wherever it stands, and what came of a
// state is no part of another that came of it.
func TestTransitionsDoNotAskForOrder(t *testing.T) {
	t.Parallel()
	if r, ok := (rotation.State{}).Active(); ok {
		t.Errorf("without roots %+v is active", r)
	}
	s := first(t)
	s.Roots = slices.Grow(s.Roots, 4)
	b, c := mustBe(t)(s.Prepare(root("b", t0), t0)), mustBe(t)(s.Prepare(root("c", t0), t0))
	if _, ok := b.Root("b"); !ok {
		t.Error("another transition of the same state took the root's place")
	}
	slices.Reverse(c.Roots)
	if n, ok := c.Next(); !ok || n.ID != "c" {
		t.Errorf("the next root is %+v", n)
	}
	p := mustBe(t)(c.Publish(t0))
	if p.Waiting(when(t0)) == nil {
		t.Error("nobody is waited for")
	}
	if r, ok := mustBe(t)(p.Activate(when(t0), rotation.Force)).Active(); !ok || r.ID != "c" {
		t.Errorf("%+v is active", r)
	}
}

// TestDue goes through the schedule, to the second.
func TestDue(t *testing.T) {
	t.Parallel()
	due := func(s rotation.State, v rotation.View) string {
		var out []string
		for _, step := range s.Due(1, v) {
			out = append(out, strings.TrimSpace(string(step.Do)+" "+step.Root+string(step.Override)))
		}
		return strings.Join(out, ", ")
	}
	expect := func(what string, s rotation.State, v rotation.View, want string) {
		t.Helper()
		if got := due(s, v); got != want {
			t.Errorf("%s: %q is due, want %q", what, got, want)
		}
	}
	expect("nothing yet", rotation.State{}, when(t0), "prepare")
	s := first(t)
	expect("new", s, when(t0), "")
	expect("before half of an intermediate's life", s, when(t0.Add(4*day-time.Nanosecond)), "")
	expect("half of an intermediate's life", s, when(t0.Add(4*day)), "succeed")
	expect("an intermediate ended", s, when(t0.Add(8*day)), "succeed")
	half := t0.Add(50 * day)
	fresh := mustBe(t)(s.Succeed(inter("i2", "a", 1, half.Add(-day)), when(half.Add(-day))))
	expect("before half of the root's life", fresh, when(half.Add(-time.Nanosecond)), "")
	expect("half of the root's life", fresh, when(half), "prepare")
	p := mustBe(t)(fresh.Prepare(root("b", half), half))
	expect("prepared", p, when(half), "publish")
	expect("prepared too long ago", p, when(half.Add(100*day)), "discard b")
	p = mustBe(t)(p.Publish(half))
	y := rotation.Agent{Node: "y", Until: t0.Add(1000 * day)}
	expect("published", p, when(half), "")
	ready := half.Add(life.Propagation + life.Slack)
	expect("acknowledged", p, when(ready), "activate")
	expect("not acknowledged", p, when(ready, y), "")
	expect("not acknowledged at the deadline", mustBe(t)(p.Succeed(inter("i3", "a", 1, t0.Add(92*day)), when(t0.Add(92*day)))), when(t0.Add(93*day), y), "activate deadline")
	act := mustBe(t)(p.Activate(when(ready), ""))
	expect("active", act, when(ready), "succeed")
	act = mustBe(t)(act.Succeed(inter("i3", "b", 1, ready), when(ready)))
	end := ready.Add(life.Leaf + 2*life.Slack)
	expect("old, before its last leaf ended", act, when(end.Add(-time.Nanosecond)), "")
	expect("old, and its last leaf has ended", act, when(end), "remove a")
	expect("an intermediate below the active root is tainted", mustBe(t)(act.Taint("i3", ready)), when(ready), "succeed")

	// An intermediate that ends with its root is not replaced by another like it, and
	// nothing can be made below a root that ended.
	cut := s
	cut.Intermediates = []rotation.Intermediate{{ID: "i9", Root: "a", Replica: 1, Start: t0.Add(96 * day), End: t0.Add(100 * day)}}
	if got := due(cut, when(t0.Add(99*day))); got != "prepare" {
		t.Errorf("at the root's end %q is due", got)
	}
	if got := due(cut, when(t0.Add(100*day))); got != "prepare" {
		t.Errorf("after the root's end %q is due", got)
	}
}

func TestTransitionsOfACondemnedRoot(t *testing.T) {
	t.Parallel()
	s := first(t)
	now := t0.Add(day)
	after, err := s.Condemn("b", now)
	refused(t, rotation.ErrUnknown, "replacing root b", s, after, err)
	b := root("b", now)
	b.Condemned = now // what a caller says of it does not count
	p := mustBe(t)(s.Prepare(b, now))
	if r, _ := p.Root("b"); !r.Condemned.IsZero() {
		t.Error("a root is condemned from the beginning")
	}
	after, err = p.Condemn("b", now)
	refused(t, rotation.ErrStage, "it is prepared and was not used; discard it", p, after, err)
	p = mustBe(t)(p.Publish(now))
	after, err = p.Condemn("b", now)
	refused(t, rotation.ErrStage, "it is published", p, after, err)

	c := mustBe(t)(p.Condemn("a", now))
	if p.Roots[0].Condemned.Equal(now) || c.Sequence != p.Sequence || !slices.Equal(c.Trusted(), p.Trusted()) {
		t.Errorf("it changed %+v, or trust: %+v", p, c)
	}
	again := mustBe(t)(c.Condemn("a", now.Add(day)))
	if r, _ := again.Root("a"); !r.Condemned.Equal(now) || !same(c, again) {
		t.Errorf("condemned again: %+v", again)
	}
	c = mustBe(t)(c.Activate(when(now.Add(time.Hour)), rotation.Force))
	if r, _ := c.Root("a"); r.Stage != rotation.Old || !r.Condemned.Equal(now) {
		t.Errorf("after another one is active: %+v", r)
	}
	// An old one can be, and what was noted goes with it.
	old := mustBe(t)(mustBe(t)(p.Activate(when(now.Add(time.Hour)), rotation.Force)).Condemn("a", now))
	old = mustBe(t)(mustBe(t)(old.Taint("a", now.Add(time.Hour))).Revoke("a", when(now.Add(time.Hour)), rotation.Force))
	if _, ok := old.Root("a"); ok {
		t.Errorf("it is revoked: %+v", old)
	}
}

// TestSignedAfterItWasRetired: the root of an intermediate stays until what that signed
// after the state had retired it has ended.
func TestSignedAfterItWasRetired(t *testing.T) {
	be := mustBe(t)
	s := be(rotation.State{}.Prepare(root("r1", t0), t0))
	s = be(s.Succeed(inter("i1", "r1", 1, t0), when(t0)))
	s = be(s.Succeed(inter("i2", "r1", 1, t0), when(t0.Add(day))))
	leaves := func(s rotation.State, id string) time.Time {
		i := slices.IndexFunc(s.Intermediates, func(m rotation.Intermediate) bool { return m.ID == id })
		return s.Intermediates[i].Leaves
	}
	for name, c := range map[string]struct {
		id   string
		at   time.Time
		want time.Time // zero: nothing changes
	}{
		"within the slack":            {"i1", t0.Add(day + time.Second), time.Time{}},
		"later":                       {"i1", t0.Add(day + time.Hour), t0.Add(2*day + time.Hour + time.Second)},
		"so late that it ends before": {"i1", t0.Add(7*day + time.Hour), t0.Add(8 * day)},
		"one that signs":              {"i2", t0.Add(2 * day), time.Time{}},
		"one that is not there":       {"i3", t0.Add(2 * day), time.Time{}},
	} {
		before := s
		got, longer := s.Signed(c.id, when(c.at))
		if longer != !c.want.IsZero() || longer && !leaves(got, c.id).Equal(c.want) || !longer && !same(got, before) || !leaves(s, "i1").Equal(t0.Add(2*day+time.Second)) {
			t.Errorf("%s: %v, %v", name, longer, got.Intermediates)
		}
		if _, again := got.Signed(c.id, when(c.at)); again {
			t.Errorf("%s: a second time", name)
		}
	}
}
