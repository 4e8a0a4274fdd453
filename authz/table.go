package authz

import (
	"cmp"
	"slices"
	"sync/atomic"

	security "istio.io/api/security/v1beta1"
)

// ruleset is the rules of one action, in the order in which Envoy would report
// them: a table, and what changed since that was made, so that a change of one
// policy of many costs little.
type ruleset struct {
	language
	// policies are those whose rules these are, by serial.
	policies []*policy
	base     *table
	// gone are the rules of the base that are no more, a bit each; nil for none.
	gone  []uint64
	fewer int
	// extra are the rules that came since, nil for none; the i-th comes before
	// the at[i]-th of the base.
	extra *table
	at    []int32

	// tcp is what the rules come to for bare connections, made when the first one
	// comes.
	tcp atomic.Pointer[ruleset]
}

// table is sorted rules and their index.
type table struct {
	rules []*rule
	index *index
}

func newTable(rules []*rule) *table {
	slices.SortFunc(rules, func(a, b *rule) int { return cmp.Compare(a.order, b.order) })
	return &table{rules, newIndex(rules)}
}

// at is where the rule of a name is in the table, or would be.
func (t *table) at(order string) (i int, there bool) {
	return slices.BinarySearchFunc(t.rules, order, func(r *rule, order string) int { return cmp.Compare(r.order, order) })
}

func newRuleset(policies []*policy, l language) *ruleset {
	lists := make([][]*rule, len(policies))
	for i, p := range policies {
		lists[i] = p.rules
	}
	return &ruleset{language: l, policies: policies, base: newTable(slices.Concat(lists...))}
}

// enough is how much may change since a table was made.
func (t *table) enough() int { return max(64, len(t.rules)/16) }

// follow is the ruleset of other policies, made from s if they are mostly its
// own.
func (s *ruleset) follow(policies []*policy) *ruleset {
	var added, removed []*rule
	var came []*policy
	for i, k := 0, 0; i < len(policies) || k < len(s.policies); {
		switch {
		case k == len(s.policies) || i < len(policies) && policies[i].serial < s.policies[k].serial:
			added, came = append(added, policies[i].rules...), append(came, policies[i])
			i++
		case i == len(policies) || policies[i].serial > s.policies[k].serial:
			removed = append(removed, s.policies[k].rules...)
			k++
		default:
			i++
			k++
		}
	}
	next := s.change(added, removed)
	if next == nil {
		return newRuleset(policies, s.language)
	}
	next.policies = policies
	if tcp := s.tcp.Load(); tcp != nil {
		// Only what is named counts of the removed.
		if tcp = tcp.change(forTCP(came, s.language), removed); tcp != nil {
			next.tcp.Store(tcp)
		}
	}
	return next
}

// change is s with other rules, or nil if too much has changed.
func (s *ruleset) change(added, removed []*rule) *ruleset {
	next := &ruleset{language: s.language, base: s.base, gone: slices.Clone(s.gone), fewer: s.fewer}
	names := make(map[string]bool, len(removed))
	for _, r := range removed {
		names[r.order] = true
	}
	var extra []*rule
	if s.extra != nil {
		for _, r := range s.extra.rules {
			if names[r.order] {
				delete(names, r.order)
			} else {
				extra = append(extra, r)
			}
		}
	}
	extra = append(extra, added...)
	if next.fewer += len(names); next.fewer+len(extra) > s.base.enough() {
		return nil
	}
	for name := range names {
		i, there := s.base.at(name)
		if !there { // a rule that bare connections do not have
			next.fewer--
			continue
		}
		if next.gone == nil {
			next.gone = make([]uint64, len(s.base.rules)/64+1)
		}
		next.gone[i/64] |= 1 << (i % 64)
	}
	if len(extra) > 0 {
		next.extra = newTable(extra)
		next.at = make([]int32, len(extra))
		for i, r := range next.extra.rules {
			at, _ := s.base.at(r.order)
			next.at[i] = int32(at)
		}
	}
	return next
}

// forTCP are the rules of the policies as bare connections have them.
func forTCP(policies []*policy, l language) (out []*rule) {
	for _, p := range policies {
		var specs []*security.Rule
		for _, r := range p.rules {
			if r.http {
				if specs == nil {
					specs = p.specs()
				}
				r = newRule(r.Rule, specs[r.Index], l, true)
			}
			if r != nil {
				out = append(out, r)
			}
		}
	}
	return out
}

// connections is the ruleset for bare connections.
func (s *ruleset) connections() *ruleset {
	if tcp := s.tcp.Load(); tcp != nil {
		return tcp
	}
	s.tcp.CompareAndSwap(nil, &ruleset{language: s.language, base: newTable(forTCP(s.policies, s.language))})
	return s.tcp.Load()
}
