package authz

import (
	"cmp"
	"slices"
	"strings"
)

// ruleset is the rules of one action, in the order in which Envoy would report
// them, with indexes that narrow down which rules can match a request at all.
//
// Every rule is in exactly one of three groups: found by the peer's name, found
// by the path, or always looked at. The indexes never decide: what they find
// is still evaluated, and a group is gone through as a whole where its
// attribute is unknown.
type ruleset struct {
	rules []*rule

	// byName finds the rules of which every source demands an exact principal,
	// byNamespace also those that demand a plain namespace.
	byName, byNamespace map[string][]int32
	named               []int32

	// byPath and byPrefix find the rules of which every operation demands an
	// exact path or one of the prefixes, whose lengths are prefixes.
	byPath, byPrefix map[string][]int32
	prefixes         []int
	pathed           []int32

	rest []int32
}

func newRuleset(rules []*rule) *ruleset {
	slices.SortFunc(rules, func(a, b *rule) int { return cmp.Compare(a.order, b.order) })
	s := &ruleset{rules: rules}
	for i, r := range rules {
		switch n := int32(i); {
		case s.indexNames(r, n):
			s.named = append(s.named, n)
		case s.indexPaths(r, n):
			s.pathed = append(s.pathed, n)
		default:
			s.rest = append(s.rest, n)
		}
	}
	return s
}

func (s *ruleset) indexNames(r *rule, n int32) bool {
	for i := range r.from {
		if f := &r.from[i]; !exactOnly(f.principals) && !(f.namespaces != nil && len(f.namespaces.globs) == 0) {
			return false
		}
	}
	for i := range r.from {
		f := &r.from[i]
		if exactOnly(f.principals) {
			for _, v := range f.principals.exact {
				post(&s.byName, v, n)
			}
			continue
		}
		for _, v := range f.namespaces.plain {
			post(&s.byNamespace, v, n)
		}
	}
	return len(r.from) > 0
}

func (s *ruleset) indexPaths(r *rule, n int32) bool {
	for i := range r.to {
		if p := r.to[i].paths; p == nil || p.any || len(p.suffix) > 0 {
			return false
		}
	}
	for i := range r.to {
		for _, v := range r.to[i].paths.exact {
			post(&s.byPath, v, n)
		}
		for _, v := range r.to[i].paths.prefix {
			post(&s.byPrefix, v, n)
			if at, known := slices.BinarySearch(s.prefixes, len(v)); !known {
				s.prefixes = slices.Insert(s.prefixes, at, len(v))
			}
		}
	}
	return len(r.to) > 0
}

func exactOnly(p *patterns) bool {
	return p != nil && !p.any && len(p.prefix) == 0 && len(p.suffix) == 0
}

// post adds a rule to the list of a value, once.
func post(m *map[string][]int32, v string, n int32) {
	if *m == nil {
		*m = make(map[string][]int32)
	}
	list := (*m)[v]
	if len(list) > 0 && list[len(list)-1] == n {
		return
	}
	(*m)[strings.Clone(v)] = append(list, n)
}

// search is the state of going through a ruleset: the first rule found that
// certainly matches and the first that may, as indexes into rules, or their
// number.
type search struct {
	set            *ruleset
	view           *view
	certain, doubt int32
}

// find returns the first rule that certainly matches, or else the first that
// may, or nil.
func (s *ruleset) find(v *view) (r *rule, certain bool) {
	q := search{s, v, int32(len(s.rules)), int32(len(s.rules))}
	q.try(s.rest)
	switch v.peer {
	case maybe:
		q.try(s.named)
	case yes:
		q.name(v.Principal)
		for _, n := range v.OtherNames {
			q.name(n)
		}
	}
	if v.Known&FieldPath == 0 || !v.HTTP {
		q.try(s.pathed)
	} else if v.path != nil {
		if s.byPath != nil {
			q.try(s.byPath[string(v.path)])
		}
		for _, n := range s.prefixes {
			if n > len(v.path) {
				break
			}
			q.try(s.byPrefix[string(v.path[:n])])
		}
	}
	switch n := int32(len(s.rules)); {
	case q.certain < n:
		return s.rules[q.certain], true
	case q.doubt < n:
		return s.rules[q.doubt], false
	}
	return nil, false
}

// name tries the rules that a name of the peer leads to.
func (q *search) name(name []byte) {
	if q.set.byName != nil {
		q.try(q.set.byName[string(name)])
	}
	if q.set.byNamespace == nil {
		return
	}
	for ns, rest := nextNamespace(name); ns != nil; ns, rest = nextNamespace(rest) {
		q.try(q.set.byNamespace[string(ns)])
	}
}

// try evaluates the rules of an ascending list that could still be the first.
func (q *search) try(list []int32) {
	for _, i := range list {
		if i >= q.certain {
			return
		}
		switch q.set.rules[i].match(q.view) {
		case yes:
			q.certain = i
			return
		case maybe:
			q.doubt = min(q.doubt, i)
		}
	}
}
