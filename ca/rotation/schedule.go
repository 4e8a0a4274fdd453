package rotation

import (
	"time"
)

// Do is what a [Step] does.
type Do string

// What can be due.
const (
	DoPrepare  Do = "prepare"  // make a root
	DoPublish  Do = "publish"  // the root that is prepared
	DoActivate Do = "activate" // the root that is published
	DoSucceed  Do = "succeed"  // make an intermediate below the active root
	DoRemove   Do = "remove"   // an old root without leaves
	DoDiscard  Do = "discard"  // a root on the way that ended before it was used
)

// Step is something that is due.
type Step struct {
	Do       Do
	Root     string   // of DoRemove and DoDiscard
	Override Override // of DoActivate
}

// Due is what a replica should do now, in order. It is nothing while everything waits
// for somebody, and it is the same on every replica but for [DoSucceed], which is
// about a replica's own intermediate. Roots and intermediates are replaced at half of
// their life.
func (s State) Due(replica uint8, v View) (steps []Step) {
	active, ok := s.Active()
	next, onTheWay := s.Next()
	switch {
	case !onTheWay && (!ok || !v.Now.Before(half(active.Start, active.End))):
		steps = append(steps, Step{Do: DoPrepare})
	case onTheWay && !v.Now.Before(next.End):
		steps = append(steps, Step{Do: DoDiscard, Root: next.ID})
	case onTheWay && next.Stage == Prepared:
		steps = append(steps, Step{Do: DoPublish})
	case onTheWay && s.Waiting(v) == nil:
		steps = append(steps, Step{Do: DoActivate})
	case onTheWay && s.late(v):
		steps = append(steps, Step{Do: DoActivate, Override: Deadline})
	}
	if m, signs := s.Issuer(replica, v.Now); ok && v.Now.Before(active.End) && (!signs || m.Root != active.ID || s.spent(m, active, v)) {
		steps = append(steps, Step{Do: DoSucceed})
	}
	for _, r := range s.Roots {
		if r.Stage == Old && s.leaves(r.ID, v).IsZero() {
			steps = append(steps, Step{Do: DoRemove, Root: r.ID})
		}
	}
	return steps
}

// spent reports whether an intermediate has lived half of its life and another one
// could live longer.
func (s State) spent(m Intermediate, root Root, v View) bool {
	return !v.Now.Before(half(m.Start, m.End)) && m.End.Before(root.End)
}

func half(start, end time.Time) time.Time { return start.Add(end.Sub(start) / 2) }
