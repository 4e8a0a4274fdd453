package rotation

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Stage is where a root stands.
type Stage string

// The stages, in order.
const (
	Prepared  Stage = "prepared"
	Published Stage = "published"
	Active    Stage = "active"
	Old       Stage = "old"
)

// Root is a root authority.
type Root struct {
	ID       string // unique; hex of the subject key identifier
	Stage    Stage
	Start    time.Time // NotBefore
	End      time.Time // NotAfter
	Sequence uint64    // of the first bundle that has it; 0 while it is prepared
	Since    time.Time // when the stage began
	Tainted  time.Time // since when nothing below it should be used; zero: it is not
	// TaintSequence is that of the trust which says that it is tainted.
	TaintSequence uint64
	// Condemned is since when it is being replaced in an emergency; zero: it is not. No
	// transition hangs on it. Whoever goes on after an interruption finds by it which root
	// is to go, and which one has come in its place.
	Condemned time.Time
}

// Intermediate is an issuing authority of one replica.
type Intermediate struct {
	ID      string
	Root    string // ID of its root
	Replica uint8
	Start   time.Time
	End     time.Time
	// Leaves is when the last leaf below it has ended, as its replica said when it
	// stopped signing with it; zero while it may sign.
	Leaves  time.Time
	Tainted time.Time
}

// State is all authorities at one moment. It is a value: transitions return another.
type State struct {
	Sequence      uint64 // of the bundle
	Roots         []Root
	Intermediates []Intermediate
}

// Rules are what the configuration says about rotation.
type Rules struct {
	// Leaf is the longest life of a leaf.
	Leaf time.Duration
	// Propagation is how long consumers who cannot acknowledge a bundle have to take
	// it up.
	Propagation time.Duration
	// Deadline is how long before its end the active root is replaced whoever has not
	// acknowledged the next one.
	Deadline time.Duration
	// Slack is added wherever a moment that one replica's clock gave is compared with
	// another's: clocks differ by no more.
	Slack time.Duration
}

// Agent is what is known of a node's agent.
type Agent struct {
	Node string
	// Acknowledged is the highest sequence that every stream of the node has taken up.
	Acknowledged uint64
	// Renewed is the highest sequence of which it said that no SVID of the node is
	// below what that trust calls tainted.
	Renewed uint64
	// Until is when the last SVID of the node ends; from then on it does not count.
	Until time.Time
}

// View is what a transition that waits for somebody looks at.
type View struct {
	Now    time.Time
	Agents []Agent
	Rules  Rules
}

// Override is why a transition does not wait. The zero value waits.
type Override string

// The overrides. Each is recorded by the caller with what it did not wait for.
const (
	// Force is an operator's, who was told who is missing.
	Force Override = "force"
	// Deadline is the end of the active root, which is nearer than [Rules.Deadline].
	Deadline Override = "deadline"
)

// Refusals of transitions. Nothing changed.
var (
	// ErrStage is a transition that the stage of the authority does not allow.
	ErrStage = errors.New("not at this stage")
	// ErrUnknown is an authority that is not in the state.
	ErrUnknown = errors.New("no such authority")
)

// WaitingError is what a transition waits for. Nothing changed.
type WaitingError struct {
	// Nodes are those of agents that have not acknowledged the bundle.
	Nodes []string
	// Replicas have not taken another intermediate yet.
	Replicas []uint8
	// Until is when consumers who do not acknowledge have had their time, or when the
	// last leaf has ended; zero if it is past.
	Until time.Time
}

func (e *WaitingError) Error() string {
	var parts []string
	if len(e.Nodes) > 0 {
		parts = append(parts, fmt.Sprintf("%d nodes have not acknowledged it: %s", len(e.Nodes), strings.Join(e.Nodes, ", ")))
	}
	if len(e.Replicas) > 0 {
		parts = append(parts, fmt.Sprintf("replicas that have no other intermediate yet: %v", e.Replicas))
	}
	if !e.Until.IsZero() {
		parts = append(parts, "not before "+e.Until.UTC().Format(time.RFC3339))
	}
	return "waiting: " + strings.Join(parts, "; ")
}

func (s State) clone() State {
	s.Roots, s.Intermediates = slices.Clone(s.Roots), slices.Clone(s.Intermediates)
	return s
}

func (s State) at(stage Stage) int {
	return slices.IndexFunc(s.Roots, func(r Root) bool { return r.Stage == stage })
}

// Root is the root with that ID.
func (s State) Root(id string) (Root, bool) {
	i := slices.IndexFunc(s.Roots, func(r Root) bool { return r.ID == id })
	if i < 0 {
		return Root{}, false
	}
	return s.Roots[i], true
}

// Active is the root that signs; false before there is one.
func (s State) Active() (Root, bool) {
	i := s.at(Active)
	if i < 0 {
		return Root{}, false
	}
	return s.Roots[i], true
}

// Next is the root that is prepared or published; false if there is none.
func (s State) Next() (Root, bool) {
	i := slices.IndexFunc(s.Roots, func(r Root) bool { return r.Stage == Prepared || r.Stage == Published })
	if i < 0 {
		return Root{}, false
	}
	return s.Roots[i], true
}

// Trusted are the IDs of the roots in the bundle.
func (s State) Trusted() (ids []string) {
	for _, r := range s.Roots {
		if r.Stage != Prepared {
			ids = append(ids, r.ID)
		}
	}
	return ids
}

// Issuer is what a replica signs leaves with: its own intermediate that is valid and
// not tainted, below a root that is trusted and not tainted; false if there is none.
func (s State) Issuer(replica uint8, now time.Time) (Intermediate, bool) {
	for _, i := range s.Intermediates {
		r, ok := s.Root(i.Root)
		if i.Replica == replica && i.Leaves.IsZero() && i.Tainted.IsZero() && now.Before(i.End) &&
			ok && r.Stage != Prepared && r.Stage != Published && r.Tainted.IsZero() {
			return i, true
		}
	}
	return Intermediate{}, false
}
