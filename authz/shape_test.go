package authz

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Shape describes the index of the program's DENY rules, which are all of one
// policy: a line for each place that leads to rules, and below it the index that
// is there. Rules have their index in the policy.
func (p *Program) Shape() string {
	s := outline{rules: p.deny.base.rules}
	s.index("", p.deny.base.index)
	return s.String()
}

type outline struct {
	strings.Builder
	rules []*rule
}

func (s *outline) list(list []int32) string {
	var names []int
	for _, i := range list {
		names = append(names, s.rules[i].Index)
	}
	slices.Sort(names)
	return strings.Trim(fmt.Sprint(names), "[]")
}

func (s *outline) index(indent string, x *index) {
	if len(x.always) > 0 {
		fmt.Fprintf(s, "%salways: %s\n", indent, s.list(x.always))
	}
	for _, b := range x.branches {
		reads := []string{
			"port", "method", "path", "host", "source IP", "destination IP", "remote IP", "principal",
			"", "", "", "SNI", "header", "", "claim", "",
		}[b.reads]
		if b.reads == readsHeader {
			reads += " " + b.name
		}
		if b.path != nil {
			reads += " " + strings.Join(b.path, ".")
		}
		fmt.Fprintf(s, "%sby %s: %s\n", indent, reads, s.list(b.all))
		indent := indent + "  "
		each(s, indent, "", b.exact)
		s.radix(indent, "begins with ", b.prefix, false)
		s.radix(indent, "ends in ", b.suffix, true)
		s.trie(indent, "template ", b.templates)
		each(s, indent, "namespace ", b.namespaces)
		for _, ns := range slices.Sorted(maps.Keys(b.accounts)) {
			each(s, indent, "account "+ns+"/", b.accounts[ns])
		}
		each(s, indent, "port ", b.ports)
		blocks := make(map[string]*posting)
		for block, p := range b.blocks {
			blocks[block.String()] = p
		}
		each(s, indent, "block ", blocks)
		if b.blocks != nil {
			fmt.Fprintf(s, "%slengths of blocks: %d\n", indent, b.lengths)
		}
		var all []int32
		b.postings(func(p *posting) { all = append(all, p.all()...) })
		slices.Sort(all)
		if all = slices.Compact(all); !slices.Equal(all, b.all) {
			fmt.Fprintf(s, "%sthe postings lead to %s\n", indent, s.list(all))
		}
	}
}

// all are the rules below.
func (p *posting) all() []int32 {
	if p.below == nil {
		return p.rules
	}
	all := slices.Clone(p.below.always)
	for _, b := range p.below.branches {
		all = append(all, b.all...)
	}
	return all
}

func each[K cmp.Ordered](s *outline, indent, what string, m map[K]*posting) {
	for _, k := range slices.Sorted(maps.Keys(m)) {
		s.posting(indent, what+fmt.Sprint(k), m[k])
	}
}

func (s *outline) posting(indent, what string, p *posting) {
	if p == nil {
		return
	}
	fmt.Fprintf(s, "%s%s: %s\n", indent, what, s.list(p.rules))
	if p.below != nil {
		s.index(indent+"  ", p.below)
	}
}

// radix writes the tree as it is, without what is above in each text.
func (s *outline) radix(indent, what string, n *radix, turned bool) {
	if n == nil {
		return
	}
	label := n.label
	if turned {
		label = reversed(label)
	}
	if n.post != nil {
		s.posting(indent, what+label, n.post)
	} else if label != "" {
		fmt.Fprintf(s, "%s%s%s\n", indent, what, label)
	}
	for _, k := range n.kids {
		s.radix(indent+"  ", what, k, turned)
	}
}

func (s *outline) trie(indent, what string, t *trie) {
	if t == nil {
		return
	}
	s.posting(indent, what, t.end)
	for _, k := range slices.Sorted(maps.Keys(t.literal)) {
		s.trie(indent, what+k+"/", t.literal[k])
	}
	s.trie(indent, what+"{*}/", t.one)
	s.radix(indent, what+"{**} ends in ", t.any, true)
}
