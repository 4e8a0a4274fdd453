package authz

import (
	"cmp"
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
)

// An index narrows down which rules can match a request at all. It never decides:
// what it finds is still evaluated.
//
// Each rule is in one branch, by an attribute of which it demands certain values
// whatever else it says: the one with the fewest other rules for the same
// values. Where still too many share a value there is another index below, by
// another attribute. A branch is gone through as a whole where its attribute is
// unknown.
type index struct {
	// always are rules that demand nothing an index knows, or few.
	always   []int32
	branches []*branch
}

// dimension is an attribute to index by; name is that of a header or a claim.
type dimension struct {
	reads attribute
	name  string
}

// branch is the rules of an index by one attribute.
type branch struct {
	dimension
	path []string // of a claim
	all  []int32

	exact          map[string]*posting
	prefix, suffix *radix
	templates      *trie
	// namespaces and accounts are of the peer's names.
	namespaces map[string]*posting
	accounts   map[string]map[string]*posting
	ports      map[uint16]*posting
	blocks     map[netip.Prefix]*posting
	// lengths are those of the blocks, for IPv4 and IPv6.
	lengths [2][]int
}

// posting is the rules that a value leads to, ascending, or an index of them.
type posting struct {
	rules []int32
	below *index
}

// demand is a value that leads to a rule: one of those that it demands of an
// attribute.
type demand struct {
	dimension int32 // of the indexer
	kind      demandKind
	// text is the value; of an account it is its name, and space its namespace.
	// Of a port it is two bytes, of a block how it is written.
	text, space string
}

type demandKind uint8

const (
	demandsText demandKind = iota
	demandsPrefix
	demandsSuffix
	demandsTemplate
	demandsNamespace
	demandsAccount
	demandsPort
	demandsBlock
)

// demands are the values that a rule demands of one attribute, in the indexer's
// list.
type demands struct {
	dimension  int32
	start, end int32
}

const (
	// few rules are gone through without an index.
	few = 4
	// crowded is a list of rules that gets an index of its own.
	crowded = 16
)

// indexer makes an index of rules.
type indexer struct {
	// dimensions are the attributes, and what they are called here.
	dimensions []dimension
	paths      [][]string // of claims
	known      map[dimension]int32
	values     []demand
	// demands are those of each rule; rule n has those from of[n] to of[n+1].
	demands []demands
	of      []int32
}

// newIndex indexes all of the rules.
func newIndex(rules []*rule) *index {
	all := make([]int32, len(rules))
	for i := range rules {
		all[i] = int32(i)
	}
	if len(rules) <= few {
		return &index{always: all}
	}
	b := &indexer{
		known:  make(map[dimension]int32),
		values: make([]demand, 0, 2*len(rules)), demands: make([]demands, 0, 2*len(rules)), of: make([]int32, 0, len(rules)+1),
	}
	for _, r := range rules {
		b.of = append(b.of, int32(len(b.demands)))
		b.rule(r)
	}
	b.of = append(b.of, int32(len(b.demands)))
	return b.index(all)
}

func (b *indexer) dimension(reads attribute, name string, path []string) int32 {
	d := dimension{reads, name}
	n, ok := b.known[d]
	if !ok {
		n = int32(len(b.dimensions))
		b.dimensions, b.paths = append(b.dimensions, d), append(b.paths, path)
		b.known[d] = n
	}
	return n
}

// claim is the dimension of a claim. Its name has the length before each key,
// because a key may hold any character: no two paths may have one name.
func (b *indexer) claim(path []string) int32 {
	var name []byte
	for _, k := range path {
		name = append(binary.AppendUvarint(name, uint64(len(k))), k...)
	}
	return b.dimension(readsClaim, string(name), path)
}

// rule lists the attributes of which the rule demands values.
func (b *indexer) rule(r *rule) {
	for i := range r.when {
		start := int32(len(b.values))
		if d, ok := b.condition(&r.when[i]); ok {
			b.demands = append(b.demands, demands{d, start, int32(len(b.values))})
		}
	}
	for _, alternatives := range [2][]conditions{r.from, r.to} {
		if len(alternatives) == 0 {
			continue
		}
		for i := range alternatives[0] {
			start := int32(len(b.values))
			d, ok := b.condition(&alternatives[0][i])
			for _, other := range alternatives[1:] {
				found := false
				for k := 0; ok && !found && k < len(other); k++ {
					before := len(b.values)
					more, does := b.condition(&other[k])
					if found = does && more == d; !found {
						b.values = b.values[:before]
					}
				}
				ok = ok && found
			}
			if ok {
				b.demands = append(b.demands, demands{d, start, int32(len(b.values))})
			}
		}
	}
}

// condition adds the values of a condition and tells of what they are; ok is
// false if it leads nowhere, and then some may have been added that nobody looks
// at.
func (b *indexer) condition(c *condition) (d int32, ok bool) {
	if c.not {
		return 0, false
	}
	switch c.reads {
	case readsPort:
		d = b.dimension(readsPort, "", nil)
		for _, p := range c.values.(ports) {
			b.add(d, demandsPort, string([]byte{byte(p >> 8), byte(p)}))
		}
		return d, true
	case readsMethod, readsPath, readsHost, readsPrincipal, readsSNI:
		d = b.dimension(c.reads, "", nil)
		return d, b.patterns(d, c.values.(*patterns))
	case readsHeader:
		h := c.values.(*headerTest)
		switch h.name {
		case ":method", ":path", ":authority", "host":
			return 0, false
		}
		d = b.dimension(readsHeader, h.name, nil)
		return d, b.patterns(d, h.patterns)
	case readsClaim:
		t := c.values.(*claimTest)
		d = b.claim(t.path)
		return d, b.patterns(d, t.patterns)
	case readsIdentity:
		// By the subjects, or by the issuers where a subject can be any.
		t, before := c.values.(identityTest), len(b.values)
		d, ok = b.claim([]string{"sub"}), true
		for i := 0; ok && i < len(t); i++ {
			ok = b.patterns(d, &t[i].subject)
		}
		if ok {
			return d, true
		}
		b.values = b.values[:before]
		d, ok = b.claim([]string{"iss"}), true
		for i := 0; ok && i < len(t); i++ {
			ok = b.patterns(d, &t[i].issuer)
		}
		return d, ok
	case readsNamespace:
		n := c.values.(*namespaces)
		d = b.dimension(readsPrincipal, "", nil)
		for _, v := range n.plain {
			b.add(d, demandsNamespace, v)
		}
		return d, len(n.globs) == 0
	case readsAccount:
		d = b.dimension(readsPrincipal, "", nil)
		for _, a := range c.values.(accounts) {
			b.values = append(b.values, demand{d, demandsAccount, a.name, a.namespace})
		}
		return d, true
	case readsTrustDomain:
		d = b.dimension(readsPrincipal, "", nil)
		for _, t := range c.values.(trustDomains) {
			b.add(d, demandsPrefix, t.first)
		}
		return d, true
	case readsSourceIP, readsDestinationIP, readsRemoteIP:
		n := c.values.(*nets)
		d = b.dimension(c.reads, "", nil)
		for _, s := range n.list {
			b.add(d, demandsBlock, s.block.String())
		}
		return d, len(n.zoned) == 0
	}
	return 0, false
}

func (b *indexer) add(d int32, kind demandKind, text string) {
	b.values = append(b.values, demand{d, kind, text, ""})
}

// patterns adds the values, if they all lead somewhere.
func (b *indexer) patterns(d int32, p *patterns) bool {
	for i := range p.list {
		v := &p.list[i]
		switch v.shape {
		case exactly:
			b.add(d, demandsText, v.text)
		case prefixed:
			b.add(d, demandsPrefix, v.text)
		case suffixed:
			b.add(d, demandsSuffix, v.text)
		case templated:
			b.add(d, demandsTemplate, v.text)
		default:
			return false
		}
	}
	if p.set != nil {
		for v := range p.set.exact {
			b.add(d, demandsText, v)
		}
		p.set.prefix.each("", func(v string) { b.add(d, demandsPrefix, v) })
		p.set.suffix.each("", func(v string) { b.add(d, demandsSuffix, reversed(v)) })
	}
	return true
}

// index indexes some of the rules. It ends, because what they all share is never
// chosen: each index below has fewer.
func (b *indexer) index(list []int32) *index {
	x := &index{}
	shared := make(map[demand]int32, 2*len(list))
	for _, n := range list {
		for _, d := range b.demands[b.of[n]:b.of[n+1]] {
			for _, v := range b.values[d.start:d.end] {
				shared[v]++
			}
		}
	}
	nest(shared)
	for _, n := range list {
		best, cost, rank := demands{dimension: -1}, int32(len(list)), attribute(0)
		for _, d := range b.demands[b.of[n]:b.of[n+1]] {
			c := (d.end - d.start) / 64 // one with fewer values takes less space
			for _, v := range b.values[d.start:d.end] {
				c = max(c, shared[v])
			}
			// Of equal ones the names of the peer are preferred, then the path.
			reads := b.dimensions[d.dimension].reads
			if c < cost || best.dimension >= 0 && c == cost && reads > rank && reads <= readsPrincipal {
				best, cost, rank = d, c, reads
			}
		}
		if best.dimension < 0 {
			x.always = append(x.always, n)
			continue
		}
		x.branch(b.dimensions[best.dimension], b.paths[best.dimension]).add(n, b.values[best.start:best.end])
	}
	for _, g := range x.branches {
		g.postings(func(p *posting) {
			if len(p.rules) <= crowded {
				return
			}
			if below := b.index(p.rules); len(below.branches) > 0 {
				p.rules, p.below = nil, below
			}
		})
	}
	return x
}

// nest adds up what shares a value with what shares others that a request which
// has it may have too: prefixes of each other, or suffixes.
func nest(shared map[demand]int32) {
	var nested []demand
	for v := range shared {
		switch v.kind {
		case demandsPrefix:
			nested = append(nested, v)
		case demandsSuffix:
			// Turned around, suffixes are prefixes.
			nested = append(nested, demand{v.dimension, v.kind, reversed(v.text), v.text})
		}
	}
	slices.SortFunc(nested, func(a, b demand) int {
		return cmp.Or(cmp.Compare(a.dimension, b.dimension), cmp.Compare(a.kind, b.kind), cmp.Compare(a.text, b.text))
	})
	of := func(v demand) demand {
		if v.kind == demandsSuffix {
			return demand{v.dimension, v.kind, v.space, ""}
		}
		return v
	}
	// above is the longest other value that each begins with; over and under are
	// how many rules share those above and, at most, those below.
	above := make([]int, len(nested))
	over, under := make([]int32, len(nested)), make([]int32, len(nested))
	var open []int
	for i, v := range nested {
		for len(open) > 0 {
			o := nested[open[len(open)-1]]
			if o.dimension == v.dimension && o.kind == v.kind && strings.HasPrefix(v.text, o.text) {
				break
			}
			open = open[:len(open)-1]
		}
		above[i] = -1
		if len(open) > 0 {
			above[i] = open[len(open)-1]
			over[i] = over[above[i]] + shared[of(nested[above[i]])]
		}
		open = append(open, i)
	}
	for i, a := range slices.Backward(above) {
		if a >= 0 {
			under[a] = max(under[a], under[i]+shared[of(nested[i])])
		}
	}
	for i, v := range nested {
		shared[of(v)] += over[i] + under[i]
	}
}

func (x *index) branch(d dimension, path []string) *branch {
	for _, g := range x.branches {
		if g.dimension == d {
			return g
		}
	}
	g := &branch{dimension: d, path: path}
	x.branches = append(x.branches, g)
	return g
}

// add puts a rule where its values lead to.
func (g *branch) add(n int32, values []demand) {
	g.all = append(g.all, n)
	for _, v := range values {
		p := g.posting(v)
		if len(p.rules) == 0 || p.rules[len(p.rules)-1] != n {
			p.rules = append(p.rules, n)
		}
	}
}

// posting is what a value leads to, made if there is none yet.
func (g *branch) posting(v demand) *posting {
	switch v.kind {
	case demandsText:
		return of(&g.exact, v.text)
	case demandsNamespace:
		return of(&g.namespaces, v.text)
	case demandsAccount:
		if g.accounts == nil {
			g.accounts = make(map[string]map[string]*posting)
		}
		names := g.accounts[v.space]
		p := of(&names, v.text)
		g.accounts[v.space] = names
		return p
	case demandsPort:
		return of(&g.ports, uint16(v.text[0])<<8|uint16(v.text[1]))
	case demandsBlock:
		block := netip.MustParsePrefix(v.text) // it was written by one
		lengths := &g.lengths[family(block.Addr())]
		if at, known := slices.BinarySearch(*lengths, block.Bits()); !known {
			*lengths = slices.Insert(*lengths, at, block.Bits())
		}
		return of(&g.blocks, block)
	}
	at := g.in(v)
	if *at == nil {
		*at = &posting{}
	}
	return *at
}

// in is where the posting of a value is kept that is found in a tree.
func (g *branch) in(v demand) **posting {
	switch v.kind {
	case demandsPrefix:
		if g.prefix == nil {
			g.prefix = &radix{}
		}
		return g.prefix.at(v.text)
	case demandsSuffix:
		if g.suffix == nil {
			g.suffix = &radix{}
		}
		return g.suffix.at(reversed(v.text))
	}
	if g.templates == nil {
		g.templates = &trie{}
	}
	return g.templates.at(v.text)
}

// of is the posting of a key, made if there is none yet.
func of[K comparable](m *map[K]*posting, k K) *posting {
	p := (*m)[k]
	if p == nil {
		if *m == nil {
			*m = make(map[K]*posting)
		}
		p = &posting{}
		(*m)[k] = p
	}
	return p
}

func family(a netip.Addr) int {
	if a.BitLen() == 32 {
		return 0
	}
	return 1
}

// postings calls all for each posting of the branch.
func (g *branch) postings(all func(*posting)) {
	for _, m := range []map[string]*posting{g.exact, g.namespaces} {
		for _, p := range m {
			all(p)
		}
	}
	for _, m := range g.accounts {
		for _, p := range m {
			all(p)
		}
	}
	for _, p := range g.ports {
		all(p)
	}
	for _, p := range g.blocks {
		all(p)
	}
	g.prefix.postings(all)
	g.suffix.postings(all)
	g.templates.postings(all)
}

// trie finds templates by their segments. A path may lead along the literal and
// along {*} at each, so what is looked at is bounded by the templates that share
// its beginning.
type trie struct {
	literal map[string]*trie
	one     *trie
	end     *posting
	// any is where {**} stands, by the text behind it, turned around.
	any *radix
}

func (t *trie) at(text string) **posting {
	for {
		segment, rest, more := strings.Cut(text, "/")
		switch segment {
		case matchAny:
			if t.any == nil {
				t.any = &radix{}
			}
			return t.any.at(reversed(text[len(matchAny):]))
		case matchOne:
			if t.one == nil {
				t.one = &trie{}
			}
			t = t.one
		default:
			k := t.literal[segment]
			if k == nil {
				if t.literal == nil {
					t.literal = make(map[string]*trie)
				}
				k = &trie{}
				t.literal[segment] = k
			}
			t = k
		}
		if !more {
			return &t.end
		}
		text = rest
	}
}

func (t *trie) postings(yield func(*posting)) {
	if t == nil {
		return
	}
	if t.end != nil {
		yield(t.end)
	}
	for _, k := range t.literal {
		k.postings(yield)
	}
	t.one.postings(yield)
	t.any.postings(yield)
}
