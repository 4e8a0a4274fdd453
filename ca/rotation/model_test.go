package rotation_test

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca/rotation"
)

var (
	depth = flag.Int("depth", 0, "explore so many events deep instead of what make test does")
	walks = flag.Int("walks", whole(300, 20), "random walks through whole rotations")
	limit = flag.Int("states", whole(20_000, 1_000), "explore at most so many states of each start; 0: all")
)

// The world of the model. A tick is a second. Everything that a transition decides is
// decided by the package itself; the model has the store, the clocks, the network, the
// replicas' memories and the agents around it.
const (
	replicas = 2
	agents   = 3
	streams  = 2

	leafLife         = 2 // ticks
	agentLife        = 3
	intermediateLife = 8
	rootLife         = 40
	maxRoots         = 3
)

var rules = rotation.Rules{Leaf: leafLife * time.Second, Propagation: time.Second, Slack: 2 * time.Second, Deadline: 2 * leafLife * time.Second}

// world is one state. It is a value and its key is its contents.
type world struct {
	tick    int
	horizon int            // nothing happens later
	journal rotation.State // in the store
	version int            // of the journal, for compare-and-swap

	// What each replica has read last. A replica that crashed reads anew.
	replica [replicas]struct {
		state   rotation.State
		version int
		skew    int // of its clock
		next    int // number of its next intermediate
	}
	roots int // that were made

	agent   [agents]node
	bundles map[int][]string // by sequence, as published; never changes
	leaf    [maxRoots]int    // by number of the root: when the last leaf below it ends
	forced  bool             // an override or an emergency was recorded
	acts    int              // of the operator, that are left
}

// node is a node with its agent.
type node struct {
	counts bool // is on record
	until  int  // end of its last SVID, and of its workloads' after it
	acked  int  // in the store
	saved  int  // sequence that it finds again when it restarts; 0: nothing
	holds  int  // sequence of the bundle that it has; 0: it does not run
	stream [streams]int
	inbox  uint32 // sequences of bundles under way to it
	outbox uint32 // acknowledgements under way from it
}

// takenUp is what an agent acknowledges: what all streams of its node have taken up,
// and what a restart would find again.
func (a node) takenUp() int {
	up := min(a.holds, a.saved)
	for _, seq := range a.stream {
		if seq > 0 {
			up = min(up, seq)
		}
	}
	return up
}

func at(tick int) time.Time { return time.Unix(int64(tick), 0).UTC() }

func (w *world) clone() *world {
	c := *w
	return &c
}

func (w *world) key() []byte {
	// Agents are alike, and so are the streams of one: their order says nothing.
	nodes := w.agent
	for i := range nodes {
		slices.Sort(nodes[i].stream[:])
	}
	slices.SortFunc(nodes[:], func(a, b node) int {
		return cmp.Or(cmp.Compare(a.until, b.until), cmp.Compare(a.acked, b.acked), cmp.Compare(a.saved, b.saved), cmp.Compare(a.holds, b.holds), slices.Compare(a.stream[:], b.stream[:]),
			cmp.Compare(a.inbox, b.inbox), cmp.Compare(a.outbox, b.outbox))
	})
	b := make([]byte, 0, 256)
	put := func(ns ...int) {
		for _, n := range ns {
			b = append(b, byte(n), byte(n>>8))
		}
	}
	put(w.tick, w.version, w.roots, w.acts)
	if w.forced {
		put(1)
	}
	for _, a := range nodes {
		put(a.until, a.acked, a.saved, a.holds, a.stream[0], a.stream[1], int(a.inbox), int(a.outbox))
	}
	since := func(t time.Time) int {
		if t.IsZero() {
			return -1
		}
		return int(t.Unix())
	}
	state := func(s rotation.State) {
		put(int(s.Sequence), len(s.Roots))
		for _, r := range s.Roots {
			put(number(r.ID), int(r.Stage[0])<<8|int(r.Stage[1]), int(r.Sequence), since(r.Since), since(r.Tainted), int(r.TaintSequence))
		}
		for _, m := range s.Intermediates {
			put(number(m.ID), number(m.Root), int(m.Replica), since(m.Leaves), since(m.Start), since(m.Tainted))
		}
	}
	state(w.journal)
	for _, r := range w.replica {
		put(r.version, r.skew, r.next)
		if r.version != w.version {
			state(r.state)
		}
	}
	for _, end := range w.leaf {
		put(max(end, w.tick))
	}
	return b
}

// now is a replica's clock.
func (w *world) now(i int) time.Time { return at(w.tick + w.replica[i].skew) }

// view is what a replica sees: its clock, and the agents as they are in the store.
func (w *world) view(i int) rotation.View {
	v := rotation.View{Now: w.now(i), Rules: rules}
	for n, a := range w.agent {
		if a.counts {
			v.Agents = append(v.Agents, rotation.Agent{Node: fmt.Sprint("node-", n), Acknowledged: uint64(a.acked), Renewed: uint64(a.acked), Until: at(a.until)})
		}
	}
	return v
}

// commit is compare-and-swap of the journal by a replica that decided on what it had
// read; a replica that lost reads anew.
func (w *world) commit(i int, next rotation.State) bool {
	r := &w.replica[i]
	if r.version != w.version {
		r.state, r.version = w.journal, w.version
		return false
	}
	w.version++
	if next.Sequence != w.journal.Sequence {
		w.bundles = maps.Clone(w.bundles) // other worlds have it, too
		w.bundles[int(next.Sequence)] = next.Trusted()
	}
	w.journal, r.state, r.version = next, next, w.version
	return true
}

// violation is an invariant that does not hold.
type violation string

func (v violation) Error() string { return string(v) }

// start is a world with one root, an intermediate for each replica, and agents that
// run and have acknowledged everything.
func start(t testing.TB, rootAge int) *world {
	w := &world{bundles: map[int][]string{}, acts: 1}
	w.tick = rootAge
	s, err := rotation.State{}.Prepare(rotation.Root{ID: "root-0", Start: at(0), End: at(rootLife)}, at(0))
	if err != nil {
		t.Fatal(err)
	}
	w.roots = 1
	for i := range w.replica {
		v := rotation.View{Now: at(w.tick), Rules: rules}
		if s, err = s.Succeed(intermediate(i, 0, "root-0", w.tick), v); err != nil {
			t.Fatal(err)
		}
		w.replica[i].next = 1
	}
	w.journal, w.version = s, 1
	w.bundles[1] = s.Trusted()
	for i := range w.replica {
		w.replica[i].state, w.replica[i].version = s, 1
	}
	for i := range w.agent {
		a := &w.agent[i]
		a.counts, a.until, a.acked, a.saved, a.holds = true, w.tick+agentLife+leafLife, 1, 1, 1
		a.stream = [streams]int{1, 1}
	}
	return w
}

func intermediate(replica, number int, root string, now int) rotation.Intermediate {
	return rotation.Intermediate{ID: fmt.Sprintf("i%d-%d", replica, number), Root: root, Replica: uint8(replica + 1),
		Start: at(now), End: at(min(now+intermediateLife, rootLife+now))}
}

// step lets a replica do what is due on what it has read last.
func (w *world) step(i int, step rotation.Step) error {
	r := &w.replica[i]
	v := w.view(i)
	var next rotation.State
	var err error
	switch step.Do {
	case rotation.DoPrepare:
		if w.roots == maxRoots {
			return nil
		}
		next, err = r.state.Prepare(rotation.Root{ID: fmt.Sprint("root-", w.roots), Start: v.Now, End: v.Now.Add(rootLife * time.Second)}, v.Now)
	case rotation.DoPublish:
		next, err = r.state.Publish(v.Now)
	case rotation.DoActivate:
		next, err = r.state.Activate(v, step.Override)
	case rotation.DoSucceed:
		active, _ := r.state.Active()
		m := intermediate(i, r.next, active.ID, w.tick+r.skew)
		m.End = earlier(m.End, active.End)
		next, err = r.state.Succeed(m, v)
	case rotation.DoRemove:
		next, err = r.state.Remove(step.Root, v, step.Override)
	case rotation.DoDiscard:
		next, err = r.state.Discard(step.Root)
	}
	if err != nil {
		return fmt.Errorf("what is due was refused: %v: %w", step, err)
	}
	if w.commit(i, next) {
		switch {
		case step.Do == rotation.DoPrepare:
			w.roots++
		case step.Do == rotation.DoSucceed:
			r.next++
		}
		w.forced = w.forced || step.Override != ""
	}
	return nil
}

// act is an operator's doing, at the first replica.
type act struct {
	name string
	do   func(s rotation.State, v rotation.View) (rotation.State, error)
	// recorded says that what follows is on the operator's responsibility.
	recorded bool
}

// acts are what an operator can do with the state that the first replica has.
func (w *world) operator() (out []act) {
	s := w.replica[0].state
	for _, r := range s.Roots {
		switch r.Stage {
		case rotation.Active:
		case rotation.Old:
			if r.Tainted.IsZero() {
				out = append(out, act{"taints " + r.ID, func(s rotation.State, v rotation.View) (rotation.State, error) { return s.Taint(r.ID, v.Now) }, false})
				continue
			}
			out = append(out,
				act{"revokes " + r.ID, func(s rotation.State, v rotation.View) (rotation.State, error) { return s.Revoke(r.ID, v, "") }, true},
				act{"revokes by force " + r.ID, func(s rotation.State, v rotation.View) (rotation.State, error) {
					return s.Revoke(r.ID, v, rotation.Force)
				}, true})
		case rotation.Published:
			out = append(out, act{"activates by force " + r.ID, func(s rotation.State, v rotation.View) (rotation.State, error) {
				return s.Activate(v, rotation.Force)
			}, true})
			fallthrough
		case rotation.Prepared:
			out = append(out, act{"discards " + r.ID, func(s rotation.State, _ rotation.View) (rotation.State, error) { return s.Discard(r.ID) }, false})
		}
	}
	if m, ok := s.Issuer(1, w.now(0)); ok {
		out = append(out, act{"taints " + m.ID, func(s rotation.State, v rotation.View) (rotation.State, error) { return s.Taint(m.ID, v.Now) }, false})
	}
	return out
}

// operate lets the operator do something; what is refused changes nothing.
func (w *world) operate(a act) error {
	w.acts--
	next, err := a.do(w.replica[0].state, w.view(0))
	if err != nil {
		var waits *rotation.WaitingError
		if !errors.As(err, &waits) {
			return fmt.Errorf("the operator %s: %w", a.name, err)
		}
		return nil
	}
	if w.commit(0, next) {
		w.forced = w.forced || a.recorded
	}
	return nil
}

func number(root string) int { return int(root[len(root)-1] - '0') }

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// issue lets a replica sign a leaf with what it believes to be its issuer.
func (w *world) issue(i int) (bool, error) {
	r := &w.replica[i]
	m, ok := r.state.Issuer(uint8(i+1), w.now(i))
	if !ok {
		return false, nil
	}
	end := min(w.tick+r.skew+leafLife, int(m.End.Unix()))
	n := number(m.Root)
	w.leaf[n] = max(w.leaf[n], end)
	return true, w.everybodyTrusts(m.Root)
}

// everybodyTrusts is the first invariant: who counts and runs trusts the root of every
// leaf that is issued, on each of its streams.
func (w *world) everybodyTrusts(root string) error {
	if w.forced {
		return nil
	}
	for n, a := range w.agent {
		if a.holds == 0 || w.tick >= a.until {
			continue
		}
		for _, seq := range append([]int{a.holds}, a.stream[:]...) {
			if seq > 0 && !slices.Contains(w.bundles[seq], root) {
				return violation(fmt.Sprintf("a leaf below %s is issued; node-%d is at bundle %d, which has %v", root, n, seq, w.bundles[seq]))
			}
		}
	}
	return nil
}

// holds are the invariants of a state.
func (w *world) check() error {
	for n, end := range w.leaf {
		if id := fmt.Sprint("root-", n); end > w.tick && !w.forced && !slices.Contains(w.journal.Trusted(), id) {
			return violation(fmt.Sprintf("%s has a leaf that is valid until %d and left the bundle by %d", id, end, w.tick))
		}
	}
	n := 0
	for _, r := range w.journal.Roots {
		if r.Stage == rotation.Active {
			n++
		}
	}
	if n != 1 {
		return violation(fmt.Sprintf("%d roots are active", n))
	}
	if got := w.bundles[int(w.journal.Sequence)]; !slices.Equal(got, w.journal.Trusted()) {
		return violation(fmt.Sprintf("bundle %d was %v and is %v", w.journal.Sequence, got, w.journal.Trusted()))
	}
	return nil
}

// event is something that can happen.
type event struct {
	format string
	args   []any
	do     func(*world) error
}

func (e event) String() string { return fmt.Sprintf(e.format, e.args...) }

// receive hands a bundle to an agent; one that is older than its own does nothing.
func (w *world) receive(n, seq int) {
	a := &w.agent[n]
	if a.holds > 0 && seq > a.holds {
		a.holds = seq
	}
}

// events are all that can happen now.
func (w *world) events() (es []event) {
	add := func(do func(*world) error, format string, args ...any) { es = append(es, event{format, args, do}) }
	if w.tick < w.horizon {
		add(func(w *world) error { w.tick++; return nil }, "tick")
	}
	for i := range w.replica {
		r := w.replica[i]
		if r.version != w.version {
			add(func(w *world) error {
				w.replica[i].state, w.replica[i].version = w.journal, w.version
				return nil
			}, "replica %d reads, or restarts", i+1)
		}
		for _, step := range r.state.Due(uint8(i+1), w.view(i)) {
			add(func(w *world) error { return w.step(i, step) }, "replica %d: %v", i+1, step)
		}
		if _, ok := r.state.Issuer(uint8(i+1), w.now(i)); ok {
			add(func(w *world) error { _, err := w.issue(i); return err }, "replica %d issues", i+1)
		}
		if i == 0 && w.acts > 0 {
			for _, a := range w.operator() {
				add(func(w *world) error { return w.operate(a) }, "the operator %s", a.name)
			}
		}
		for _, skew := range []int{-1, 0, 1} {
			if i == 1 && skew != r.skew {
				add(func(w *world) error { w.replica[i].skew = skew; return nil }, "clock of replica %d goes to %+d", i+1, skew)
			}
		}
	}
	for n := range w.agent {
		a := w.agent[n]
		for i := range w.replica {
			// A record is committed on the condition that the journal is the one that was
			// read, so what is handed over with the SVID is the newest bundle. It is the
			// agent's first, or it renews.
			if w.replica[i].version == w.version {
				until := w.tick + w.replica[i].skew + agentLife + leafLife
				if a.holds == 0 || a.until < until {
					add(func(w *world) error {
						a := &w.agent[n]
						a.counts, a.until, a.holds = true, max(a.until, until), int(w.journal.Sequence)
						return nil
					}, "node-%d attests at replica %d", n, i+1)
				}
			}
			if seq := int(w.replica[i].state.Sequence); a.holds > 0 && a.inbox&(1<<seq) == 0 && seq != a.holds {
				add(func(w *world) error { w.agent[n].inbox |= 1 << seq; return nil }, "replica %d sends bundle %d to node-%d", i+1, seq, n)
			}
		}
		if a.holds == 0 {
			continue
		}
		for seq := 1; seq < 24; seq++ {
			if a.inbox&(1<<seq) != 0 {
				add(func(w *world) error { w.receive(n, seq); return nil }, "node-%d receives bundle %d, which may come again", n, seq)
				add(func(w *world) error { w.receive(n, seq); w.agent[n].inbox &^= 1 << seq; return nil }, "node-%d receives bundle %d", n, seq)
				add(func(w *world) error { w.agent[n].inbox &^= 1 << seq; return nil }, "bundle %d to node-%d is lost", seq, n)
			}
			if a.outbox&(1<<seq) != 0 {
				add(func(w *world) error { w.acknowledge(n, seq); return nil }, "acknowledgement %d of node-%d arrives, and may again", seq, n)
				add(func(w *world) error { w.acknowledge(n, seq); w.agent[n].outbox &^= 1 << seq; return nil }, "acknowledgement %d of node-%d arrives", seq, n)
				add(func(w *world) error { w.agent[n].outbox &^= 1 << seq; return nil }, "acknowledgement %d of node-%d is lost", seq, n)
			}
		}
		for k := range a.stream {
			if a.stream[k] != a.holds {
				add(func(w *world) error { w.agent[n].stream[k] = w.agent[n].holds; return nil }, "stream %d of node-%d opens or takes up bundle %d", k, n, a.holds)
			}
			if a.stream[k] != 0 {
				add(func(w *world) error { w.agent[n].stream[k] = 0; return nil }, "stream %d of node-%d closes", k, n)
			}
		}
		if a.saved != a.holds {
			add(func(w *world) error { w.agent[n].saved = w.agent[n].holds; return nil }, "node-%d saves bundle %d", n, a.holds)
		}
		if a.saved > 0 {
			add(func(w *world) error {
				a := &w.agent[n]
				a.holds, a.stream, a.inbox = a.saved, [streams]int{}, 0
				return nil
			}, "node-%d crashes and comes back with bundle %d", n, a.saved)
		}
		if up := a.takenUp(); up > a.acked && a.outbox&(1<<up) == 0 {
			add(func(w *world) error { w.agent[n].outbox |= 1 << up; return nil }, "node-%d acknowledges %d", n, up)
		}
		add(func(w *world) error {
			a := &w.agent[n]
			a.holds, a.saved, a.stream, a.inbox = 0, 0, [streams]int{}, 0
			return nil
		}, "node-%d crashes and loses its state", n)
	}
	return es
}

func (w *world) acknowledge(n, seq int) { w.agent[n].acked = max(w.agent[n].acked, seq) }

// after is the world after an event, or the invariant that it breaks.
func (w *world) after(e event) (*world, error) {
	next := w.clone()
	if err := e.do(next); err != nil {
		return next, err
	}
	if next.journal.Sequence < w.journal.Sequence {
		return next, violation("the sequence went back")
	}
	return next, next.check()
}

// calm lets everything go well: messages arrive, replicas read and do what is due,
// leaves are issued, time goes by. It returns an error if the rotation is not over
// after a while, with only the newest root in the bundle.
func (w *world) calm() error {
	w = w.clone()
	for i := range w.replica {
		w.replica[i].skew = 0
	}
	for range 3 * rootLife {
		for range 4 {
			for i := range w.replica {
				w.replica[i].state, w.replica[i].version = w.journal, w.version
				for _, step := range w.replica[i].state.Due(uint8(i+1), w.view(i)) {
					if w.replica[i].version != w.version {
						break
					}
					if step.Do == rotation.DoPrepare {
						continue // one rotation is enough
					}
					if err := w.step(i, step); err != nil {
						return err
					}
					w.replica[i].state, w.replica[i].version = w.journal, w.version
				}
				if _, err := w.issue(i); err != nil {
					return err
				}
			}
			for n := range w.agent {
				a := &w.agent[n]
				a.counts, a.until, a.holds, a.saved = true, w.tick+agentLife+leafLife, int(w.journal.Sequence), int(w.journal.Sequence)
				for k := range a.stream {
					a.stream[k] = a.holds
				}
				a.acked = a.holds
			}
			if err := w.check(); err != nil {
				return err
			}
		}
		if active, ok := w.journal.Active(); ok && len(w.journal.Roots) == 1 && active.Tainted.IsZero() {
			for i := range w.replica {
				if m, ok := w.journal.Issuer(uint8(i+1), w.now(i)); !ok || m.Root != active.ID {
					return fmt.Errorf("replica %d has no issuer below the active root", i+1)
				}
			}
			return nil
		}
		w.tick++
	}
	return fmt.Errorf("the rotation does not end: %+v", w.journal.Roots)
}

// phases are worlds at the stages of a rotation in which everything has gone well so
// far, from each of which all that can go wrong is explored.
func phases(t testing.TB) map[string]*world {
	out := map[string]*world{}
	w := start(t, rootLife/2-1)
	add := func(name string) {
		c := w.clone()
		c.horizon = w.tick + 12
		out[name] = c
	}
	add("before half life")
	w.tick++
	do := func(i int, want rotation.Do) {
		for _, s := range w.replica[i].state.Due(uint8(i+1), w.view(i)) {
			if s.Do == want {
				if err := w.step(i, s); err != nil {
					t.Fatal(err)
				}
				w.replica[1-i].state, w.replica[1-i].version = w.journal, w.version
				return
			}
		}
		t.Fatalf("%s is not due for replica %d: %+v", want, i+1, w.journal)
	}
	do(0, rotation.DoPrepare)
	add("prepared")
	do(1, rotation.DoPublish)
	add("published")
	for n := range w.agent {
		w.agent[n] = node{counts: true, until: w.tick + agentLife + leafLife, acked: 2, saved: 2, holds: 2, stream: [streams]int{2, 2}}
	}
	w.tick += 3
	add("acknowledged")
	for i := range w.replica {
		if _, err := w.issue(i); err != nil {
			t.Fatal(err)
		}
	}
	do(0, rotation.DoActivate)
	add("active")
	do(1, rotation.DoSucceed)
	add("one replica signs below the new root")
	do(0, rotation.DoSucceed)
	add("both replicas sign below the new root")
	w.tick += leafLife + 2*int(rules.Slack/time.Second) - 1
	for n := range w.agent {
		w.agent[n].until = w.tick + agentLife + leafLife
	}
	add("before the old root leaves")
	w.tick++
	do(1, rotation.DoRemove)
	add("the old root left")
	return out
}

// explore visits every state that can be reached from a world, in order of the number
// of events, until a limit. It returns how many there were and how deep all of them.
func explore(w *world, maxDepth, maxStates int, visit func(w *world, path string) error) (states, deep int, err error) {
	type reached struct {
		w    *world
		path *trail
	}
	seen := map[[16]byte]bool{}
	sum := func(w *world) (k [16]byte) { h := sha256.Sum256(w.key()); copy(k[:], h[:]); return k }
	seen[sum(w)] = true
	frontier := []reached{{w: w}}
	for ; len(frontier) > 0 && deep < maxDepth; deep++ {
		var next []reached
		for _, r := range frontier {
			for _, e := range r.w.events() {
				n, err := r.w.after(e)
				path := &trail{r.path, e}
				if err != nil {
					return len(seen), deep, fmt.Errorf("%w\nafter:%s", err, path)
				}
				k := sum(n)
				if seen[k] {
					continue
				}
				seen[k] = true
				if err := visit(n, ""); err != nil {
					return len(seen), deep, fmt.Errorf("%w\nafter:%s", err, path)
				}
				if maxStates > 0 && len(seen) >= maxStates {
					return len(seen), deep, nil
				}
				next = append(next, reached{n, path})
			}
		}
		frontier = next
	}
	return len(seen), deep, nil
}

// trail is how a state was reached.
type trail struct {
	before *trail
	event  event
}

func (p *trail) String() string {
	if p == nil {
		return ""
	}
	return p.before.String() + "\n  " + p.event.String()
}

// TestModel explores the states of a rotation and holds the invariants against each;
// from one in a hundred it also sees that the rotation ends when all goes well.
func TestModel(t *testing.T) {
	t.Parallel()
	deepest := 1000
	if *depth > 0 {
		deepest = *depth
	}
	total := 0
	worlds := phases(t)
	most := *limit
	if testing.Short() {
		most = min(most, 5_000)
	}
	for _, name := range slices.Sorted(maps.Keys(worlds)) {
		n, calm := 0, 0
		states, deep, err := explore(worlds[name], deepest, most, func(w *world, _ string) error {
			if n++; n%100 != 0 {
				return nil
			}
			calm++
			return w.calm()
		})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		total += states
		t.Logf("note: from %q: %d states, all those of up to %d events, no violation; %d of them end well", name, states, deep, calm)
	}
	t.Logf("note: %d states", total)
}

// TestModelRandom goes further than everything can be explored: random walks through
// whole rotations, two of them in a row.
func TestModelRandom(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(1, 2))
	done := map[string]int{}
	for walk := range *walks {
		// In every fourth walk a node never acknowledges, and in all of these the replicas
		// come to the deadline.
		mute := walk%4 == 0
		w := start(t, rootLife/2-1)
		w.horizon = 3 * rootLife
		if w.acts = 0; walk%3 == 1 {
			w.acts = 4
		}
		var path *trail
		for range 400 {
			es := w.events()
			if mute {
				es = slices.DeleteFunc(es, func(e event) bool { return strings.HasPrefix(e.format, "node-%d ack") && e.args[0] == 0 })
			}
			if len(es) == 0 {
				break
			}
			e := es[rng.IntN(len(es))]
			// Trouble is half as likely as what helps.
			if strings.Contains(e.format, "lost") || strings.Contains(e.format, "crashes") || strings.Contains(e.format, "again") {
				e = es[rng.IntN(len(es))]
			}
			path = &trail{path, e}
			next, err := w.after(e)
			if err != nil {
				t.Fatalf("%v\nafter:%s", err, path)
			}
			if next.journal.Sequence != w.journal.Sequence {
				done["bundles"]++
			}
			if a, _ := next.journal.Active(); a.ID != "root-0" {
				if b, _ := w.journal.Active(); a.ID != b.ID {
					done["activations"]++
				}
			}
			if len(next.journal.Roots) < len(w.journal.Roots) {
				done["roots gone"]++
			}
			if next.forced && !w.forced {
				done[map[bool]string{true: "forced", false: "deadlines"}[strings.HasPrefix(e.format, "the operator")]]++
			}
			if next.acts < w.acts {
				done["acts of the operator"]++
			}
			w = next
		}
	}
	t.Logf("note: %d walks: %v", *walks, done)
	for _, what := range []string{"activations", "roots gone", "deadlines", "forced", "acts of the operator"} {
		if done[what] == 0 {
			t.Errorf("no walk had %s", what)
		}
	}
}
