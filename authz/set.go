package authz

import (
	"cmp"
	"fmt"
	"iter"
	"maps"
	"slices"
)

// State says what a [Set] enforces for a resource.
type State uint8

const (
	// StateGood: the resource as it is written.
	StateGood State = iota
	// StateStale: the last good version, because what is written now is bad.
	StateStale
	// StateRefused: there is no good version, so the workloads that the
	// resource selects are denied.
	StateRefused
)

// String is "good", "stale" or "refused".
func (s State) String() string {
	switch s {
	case StateGood:
		return "good"
	case StateStale:
		return "stale"
	}
	return "refused"
}

// Set is an immutable collection of resources, at most one for each kind,
// namespace and name. The zero Set is empty.
type Set struct {
	entries map[key]entry
	// unreadable are the documents that could be any policy and that no earlier
	// resource accounts for. While there is one, everything is denied.
	unreadable []*resource
	// unaccounted is how many of them each origin has more than resources of it
	// went missing.
	unaccounted map[string]int
}

type entry struct {
	state State
	// res is what is enforced; in StateRefused it says what to deny.
	res *resource
	// origin is where the present text stands, which for a stale entry need not
	// be where res came from.
	origin string
}

// Update returns the set that follows s when the resources are all that there
// are now, from all origins, and the problems of putting them together. It is
// the one place that knows what becomes of a bad edit:
//
//   - A good resource is enforced as written.
//   - An invalid one, which Istio's admission would not have let in, changes
//     nothing: the last good version goes on (StateStale). Without one the
//     workloads that it selects are denied (StateRefused).
//   - One that exists twice is treated as invalid, with a problem that names
//     both places. If the two select differently, or have other targets, refusing
//     denies the whole namespace.
//   - A document that cannot be read could be any policy. If as many resources
//     of its origin went missing, it was one of them, and they all go on as they
//     were. If not, it could be a new DENY for anyone: everything is denied, until
//     the origin has fewer such documents. A resource that goes missing later
//     does not account for one that was there before.
//   - A resource that is not there any more, and not for that reason, is gone.
func (s Set) Update(resources []Resource) (Set, []Problem) {
	next := Set{entries: make(map[key]entry, len(resources))}
	var problems []Problem

	var twice map[key][]*resource                 // those that exist more than once
	var broken map[string][]*resource             // by origin
	texts := make([]*resource, 0, len(resources)) // the others, the first of each key
	for _, r := range resources {
		switch {
		case r.r == nil:
		case r.r.reason == ReasonUnreadable:
			if broken == nil {
				broken = make(map[string][]*resource)
			}
			broken[r.r.origin] = append(broken[r.r.origin], r.r)
		default:
			if first, ok := next.entries[r.r.key]; ok {
				if twice == nil {
					twice = make(map[key][]*resource)
				}
				if twice[r.r.key] == nil {
					twice[r.r.key] = []*resource{first.res}
				}
				twice[r.r.key] = append(twice[r.r.key], r.r)
				continue
			}
			next.entries[r.r.key] = entry{StateGood, r.r, r.r.origin}
			texts = append(texts, r.r)
		}
	}
	for _, now := range texts {
		if copies := twice[now.key]; copies != nil {
			now = duplicate(copies)
			problems = append(problems, Problem{
				Origin: now.origin, Line: now.line, Resource: now.id(), Reason: ReasonDuplicate,
				Message: now.detail, Fix: "keep one of them",
			})
		}
		if now.reason == "" {
			continue
		}
		before, known := s.entries[now.key]
		if known && before.state != StateRefused {
			next.entries[now.key] = entry{StateStale, before.res, now.origin}
			problems = append(problems, stale(now.origin, now.line, before.res))
		} else {
			next.entries[now.key] = entry{StateRefused, now, now.origin}
		}
	}
	slices.SortStableFunc(problems, func(a, b Problem) int { return cmp.Compare(a.Resource, b.Resource) })

	if len(broken) == 0 {
		return next, problems
	}
	missing := make(map[string][]key) // by origin
	for k, e := range s.entries {
		if _, ok := next.entries[k]; !ok && broken[e.origin] != nil {
			missing[e.origin] = append(missing[e.origin], k)
		}
	}
	for _, origin := range slices.Sorted(maps.Keys(broken)) {
		slices.SortFunc(missing[origin], key.compare)
		for _, k := range missing[origin] {
			e := s.entries[k]
			if e.state == StateGood {
				e.state = StateStale
			}
			next.entries[k] = e
			if e.state == StateStale {
				problems = append(problems, stale(origin, broken[origin][0].line, e.res))
			}
		}
		n := max(len(broken[origin])-len(missing[origin]), min(s.unaccounted[origin], len(broken[origin])))
		if n > 0 {
			next.unreadable = append(next.unreadable, broken[origin]...)
			if next.unaccounted == nil {
				next.unaccounted = make(map[string]int)
			}
			next.unaccounted[origin] = n
		}
	}
	return next, problems
}

// duplicate makes one refused resource of several with the same key.
func duplicate(texts []*resource) *resource {
	slices.SortStableFunc(texts, func(a, b *resource) int {
		return key{a.origin, "", ""}.compare(key{b.origin, "", ""})
	})
	d := &resource{key: texts[0].key, origin: texts[0].origin, line: texts[0].line, reason: ReasonDuplicate}
	same := !slices.ContainsFunc(texts[1:], func(t *resource) bool {
		return !slices.Equal(t.selector, texts[0].selector) || !slices.Equal(t.targets, texts[0].targets)
	})
	if same {
		d.selector, d.targets = texts[0].selector, texts[0].targets
	}
	d.detail = fmt.Sprintf("exists %d times: at %s and at %s", len(texts), texts[0].place(), texts[1].place())
	return d
}

func stale(origin string, line int, good *resource) Problem {
	return Problem{
		Origin: origin, Line: line, Resource: good.id(), Severity: SeverityWarning,
		Message: "the last good version stays in force, from " + good.place(),
		Fix:     "correct the text",
	}
}

// Len is the number of resources in the set, without those that could not be
// read.
func (s Set) Len() int { return len(s.entries) }

// resources iterates over what is enforced and over what could not be read, in
// no order.
func (s Set) resources(yield func(*resource) bool) {
	for _, e := range s.entries {
		if !yield(e.res) {
			return
		}
	}
	for _, u := range s.unreadable {
		if !yield(u) {
			return
		}
	}
}

// All iterates over what is enforced, ordered by kind, namespace and name, and
// then over the documents that could not be read and deny everything.
func (s Set) All() iter.Seq2[Resource, State] {
	return func(yield func(Resource, State) bool) {
		for _, k := range sortedKeys(s.entries) {
			if e := s.entries[k]; !yield(Resource{e.res}, e.state) {
				return
			}
		}
		for _, u := range s.unreadable {
			if !yield(Resource{u}, StateRefused) {
				return
			}
		}
	}
}

func sortedKeys[V any](m map[key]V) []key {
	return slices.SortedFunc(maps.Keys(m), key.compare)
}
