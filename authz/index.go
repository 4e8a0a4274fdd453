package authz

import (
	"bytes"
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"google.golang.org/protobuf/types/known/structpb"
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

// demand is a value that leads to a rule.
type demand struct {
	kind  demandKind
	text  string // of a text, a namespace, an account's name
	space string // of an account: the namespace
	port  uint16
	block netip.Prefix
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

// demands are what a rule demands of one attribute: one of the values.
type demands struct {
	dimension
	path   []string
	values []demand
}

// demandsOf lists the attributes of which the rule demands values.
func demandsOf(r *rule) []demands {
	var out []demands
	for i := range r.when {
		if d, ok := r.when[i].demands(); ok {
			out = append(out, d)
		}
	}
	for _, alternatives := range [][]conditions{r.from, r.to} {
		if len(alternatives) == 0 {
			continue
		}
		for i := range alternatives[0] {
			d, ok := alternatives[0][i].demands()
			for _, other := range alternatives[1:] {
				if !ok {
					break
				}
				ok = false
				for k := range other {
					if more, does := other[k].demands(); does && more.dimension == d.dimension {
						d.values = append(d.values, more.values...)
						ok = true
						break
					}
				}
			}
			if ok {
				out = append(out, d)
			}
		}
	}
	return out
}

// demands are the values of the condition, if it leads anywhere.
func (c *condition) demands() (d demands, ok bool) {
	if c.not {
		return d, false
	}
	d.reads = c.reads
	switch c.reads {
	case readsPort:
		for _, p := range c.values.(ports) {
			d.values = append(d.values, demand{kind: demandsPort, port: p})
		}
		return d, true
	case readsMethod, readsPath, readsHost, readsPrincipal, readsSNI:
		return d, c.values.(*patterns).demands(&d)
	case readsHeader:
		h := c.values.(*headerTest)
		switch d.name = h.name; h.name {
		case ":method", ":path", ":authority", "host":
			return d, false
		}
		return d, h.demands(&d)
	case readsClaim:
		t := c.values.(*claimTest)
		d.name, d.path = strings.Join(t.path, "\x00"), t.path
		return d, t.demands(&d)
	case readsIdentity:
		return c.values.(identityTest).demands()
	case readsNamespace:
		n := c.values.(*namespaces)
		d.reads = readsPrincipal
		for _, v := range n.plain {
			d.values = append(d.values, demand{kind: demandsNamespace, text: v})
		}
		return d, len(n.globs) == 0
	case readsAccount:
		d.reads = readsPrincipal
		for _, a := range c.values.(accounts) {
			d.values = append(d.values, demand{kind: demandsAccount, space: a.namespace, text: a.name})
		}
		return d, true
	case readsTrustDomain:
		d.reads = readsPrincipal
		for _, t := range c.values.(trustDomains) {
			d.values = append(d.values, demand{kind: demandsPrefix, text: t.first})
		}
		return d, true
	case readsSourceIP, readsDestinationIP, readsRemoteIP:
		n := c.values.(*nets)
		for _, s := range n.list {
			d.values = append(d.values, demand{kind: demandsBlock, block: s.block})
		}
		return d, len(n.zoned) == 0
	}
	return d, false
}

// demands adds the values, if they all lead somewhere.
func (p *patterns) demands(d *demands) bool {
	for i := range p.list {
		v := &p.list[i]
		switch v.shape {
		case exactly:
			d.values = append(d.values, demand{kind: demandsText, text: v.text})
		case prefixed:
			d.values = append(d.values, demand{kind: demandsPrefix, text: v.text})
		case suffixed:
			d.values = append(d.values, demand{kind: demandsSuffix, text: v.text})
		case templated:
			d.values = append(d.values, demand{kind: demandsTemplate, text: v.text})
		default:
			return false
		}
	}
	if p.set == nil {
		return true
	}
	for v := range p.set.exact {
		d.values = append(d.values, demand{kind: demandsText, text: v})
	}
	p.set.prefix.each("", func(v string) { d.values = append(d.values, demand{kind: demandsPrefix, text: v}) })
	p.set.suffix.each("", func(v string) { d.values = append(d.values, demand{kind: demandsSuffix, text: reversed(v)}) })
	return true
}

// demands is about the subjects, or the issuers where a subject can be any.
func (t identityTest) demands() (d demands, ok bool) {
	d.reads, d.path = readsClaim, []string{"sub"}
	d.name = "sub"
	for i := range t {
		if ok = t[i].subject.demands(&d); !ok {
			break
		}
	}
	if ok {
		return d, true
	}
	d.path, d.name, d.values = []string{"iss"}, "iss", nil
	for i := range t {
		if !t[i].issuer.demands(&d) {
			return d, false
		}
	}
	return d, true
}

const (
	// few rules are gone through without an index.
	few = 4
	// crowded is a list of rules that gets an index of its own.
	crowded = 16
)

// newIndex indexes all of the rules.
func newIndex(rules []*rule) *index {
	b := &indexer{demands: make([][]demands, len(rules))}
	all := make([]int32, len(rules))
	for i, r := range rules {
		all[i] = int32(i)
		if len(rules) > few {
			b.demands[i] = demandsOf(r)
		}
	}
	return b.index(all, nil)
}

type indexer struct{ demands [][]demands }

type counted struct {
	dimension
	demand
}

// index indexes some of the rules by other dimensions than those.
func (b *indexer) index(list []int32, without []dimension) *index {
	x := &index{}
	if len(list) <= few {
		x.always = list
		return x
	}
	shared := make(map[counted]int32, 2*len(list))
	for _, n := range list {
		for _, d := range b.demands[n] {
			if slices.Contains(without, d.dimension) {
				continue
			}
			for _, v := range d.values {
				shared[counted{d.dimension, v}]++
			}
		}
	}
	for _, n := range list {
		var best *demands
		cost := len(list)
		for i := range b.demands[n] {
			d := &b.demands[n][i]
			if slices.Contains(without, d.dimension) {
				continue
			}
			c := len(d.values) / 64 // one with fewer values takes less space
			for _, v := range d.values {
				c = max(c, int(shared[counted{d.dimension, v}]))
			}
			if c < cost || best != nil && c == cost && d.reads > best.reads && d.reads <= readsPrincipal {
				best, cost = d, c
			}
		}
		if best == nil {
			x.always = append(x.always, n)
			continue
		}
		x.branch(best).add(n, best.values)
	}
	for _, g := range x.branches {
		g.postings(func(p *posting) {
			if len(p.rules) <= crowded {
				return
			}
			if below := b.index(p.rules, append(slices.Clone(without), g.dimension)); len(below.branches) > 0 {
				p.rules, p.below = nil, below
			}
		})
	}
	return x
}

func (x *index) branch(d *demands) *branch {
	for _, g := range x.branches {
		if g.dimension == d.dimension {
			return g
		}
	}
	g := &branch{dimension: d.dimension, path: d.path}
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
		return of(&g.ports, v.port)
	case demandsBlock:
		lengths := &g.lengths[family(v.block.Addr())]
		if at, known := slices.BinarySearch(*lengths, v.block.Bits()); !known {
			*lengths = slices.Insert(*lengths, at, v.block.Bits())
		}
		return of(&g.blocks, v.block)
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

// ruleset is the rules of one action, in the order in which Envoy would report
// them.
type ruleset struct {
	language
	rules []*rule
	index *index

	// tcp is what the rules come to for bare connections, made when the first one
	// comes.
	once sync.Once
	tcp  *ruleset
}

func newRuleset(rules []*rule, l language) *ruleset {
	slices.SortFunc(rules, func(a, b *rule) int { return cmp.Compare(a.order, b.order) })
	return &ruleset{language: l, rules: rules, index: newIndex(rules)}
}

// connections is the ruleset for bare connections.
func (s *ruleset) connections() *ruleset {
	s.once.Do(func() {
		var rules []*rule
		for _, r := range s.rules {
			if r.http {
				r = newRule(r.Rule, s.language, true)
			}
			if r != nil {
				rules = append(rules, r)
			}
		}
		s.tcp = newRuleset(rules, s.language)
	})
	return s.tcp
}

// search is the state of going through a ruleset: the first rule found that
// certainly matches and the first that may, as indexes into rules, or their
// number.
type search struct {
	rules          []*rule
	view           *view
	certain, doubt int32
}

// find returns the first rule that certainly matches, or else the first that
// may, or none.
func (s *ruleset) find(v *view) match {
	if s == nil {
		return match{}
	}
	if !v.HTTP {
		s = s.connections()
	}
	n := int32(len(s.rules))
	q := search{s.rules, v, n, n}
	q.index(s.index)
	switch {
	case q.certain < n:
		return match{s.rules[q.certain].Rule, true}
	case q.doubt < n:
		return match{s.rules[q.doubt].Rule, false}
	}
	return match{}
}

// try evaluates the rules of an ascending list that could still be the first.
func (q *search) try(list []int32) {
	for _, i := range list {
		if i >= q.certain {
			return
		}
		switch q.rules[i].match(q.view) {
		case yes:
			q.certain = i
			return
		case maybe:
			q.doubt = min(q.doubt, i)
		}
	}
}

func (q *search) visit(p *posting) {
	if p == nil {
		return
	}
	if p.below != nil {
		q.index(p.below)
		return
	}
	q.try(p.rules)
}

func (q *search) index(x *index) {
	q.try(x.always)
	for _, g := range x.branches {
		if g.all[0] < q.certain {
			q.branch(g)
		}
	}
}

// branch tries what the values of the branch's attribute lead to.
func (q *search) branch(g *branch) {
	v := q.view
	switch g.reads {
	case readsPrincipal:
		switch v.peer {
		case maybe:
			q.try(g.all)
		case yes:
			q.name(g, v.Principal)
			for _, n := range v.OtherNames {
				q.name(g, n)
			}
		}
	case readsPath:
		q.known(g, FieldPath, v.path)
		if g.templates != nil && v.Known&FieldPath != 0 && v.path != nil {
			q.walk(g.templates, v.path)
		}
	case readsHost:
		q.known(g, FieldHost, v.host)
	case readsMethod:
		q.known(g, FieldMethod, v.Method)
	case readsSNI:
		if v.Known&FieldSNI == 0 {
			q.try(g.all)
			return
		}
		var buf [256]byte
		q.text(g, lower(v.SNI, buf[:]))
	case readsPort:
		if v.Known&FieldDestinationPort == 0 {
			q.try(g.all)
			return
		}
		q.visit(g.ports[v.DestinationPort])
	case readsHeader:
		q.header(g)
	case readsClaim:
		if v.Known&FieldClaims == 0 {
			q.try(g.all)
			return
		}
		value := descend(v.Claims, g.path)
		// Also an empty text: "ISSUER/" is a principal with an empty subject.
		if s, ok := value.GetKind().(*structpb.Value_StringValue); ok {
			q.text(g, bytesOf(s.StringValue))
		}
		for _, e := range value.GetListValue().GetValues() {
			q.text(g, bytesOf(e.GetStringValue()))
		}
	case readsSourceIP:
		q.address(g, v.Known&FieldSourceIP != 0, v.SourceIP.Unmap().WithZone(""))
	case readsDestinationIP:
		q.address(g, v.Known&FieldDestinationIP != 0, v.DestinationIP.Unmap().WithZone(""))
	case readsRemoteIP:
		if v.derived == no {
			v.remote, v.derived = v.deriveRemote()
		}
		q.address(g, v.derived == yes, v.remote)
	default:
		q.try(g.all)
	}
}

func (q *search) known(g *branch, f Field, value []byte) {
	switch {
	case q.view.Known&f == 0:
		q.try(g.all)
	case value != nil:
		q.text(g, value)
	}
}

// text tries what one value of a text leads to.
func (q *search) text(g *branch, b []byte) {
	if g.exact != nil {
		q.visit(g.exact[string(b)])
	}
	if g.prefix != nil {
		for n, i := g.prefix, 0; n != nil; n, i = n.prefix(b, i) {
			q.visit(n.post)
		}
	}
	if g.suffix != nil {
		for n, i := g.suffix, 0; n != nil; n, i = n.suffix(b, i) {
			q.visit(n.post)
		}
	}
}

// name tries what a name of the peer leads to.
func (q *search) name(g *branch, name []byte) {
	q.text(g, name)
	if g.namespaces == nil && g.accounts == nil {
		return
	}
	for ns, rest := nextNamespace(name); ns != nil; ns, rest = nextNamespace(rest) {
		if g.namespaces != nil {
			q.visit(g.namespaces[string(ns)])
		}
		if accounts := g.accounts[string(ns)]; accounts != nil {
			// rest begins with the slash before ns.
			below := rest[1+len(ns):]
			for {
				i := bytes.Index(below, []byte("/sa/"))
				if i < 0 {
					break
				}
				below = below[i+len("/sa"):]
				account := below[1:]
				if end := bytes.IndexByte(account, '/'); end >= 0 {
					account = account[:end]
				}
				q.visit(accounts[string(account)])
			}
		}
	}
}

func (q *search) header(g *branch) {
	v := q.view
	if v.Known&FieldHeaders == 0 || v.joins {
		q.try(g.all)
		return
	}
	for i := range v.Headers {
		if h := &v.Headers[i]; h.Name == g.dimension.name && h.Form != HeaderValue {
			q.try(g.all)
			return
		}
	}
	for i := range v.Headers {
		if h := &v.Headers[i]; h.Name == g.dimension.name {
			q.text(g, h.Value)
		}
	}
}

func (q *search) address(g *branch, known bool, a netip.Addr) {
	if !known || !a.IsValid() {
		q.try(g.all)
		return
	}
	for _, bits := range g.lengths[family(a)] {
		p, err := a.Prefix(bits)
		if err == nil {
			q.visit(g.blocks[p])
		}
	}
}

// walk tries the templates that the path can be of.
func (q *search) walk(t *trie, path []byte) {
	if t.any != nil {
		for n, i := t.any, 0; n != nil; n, i = n.suffix(path, i) {
			q.visit(n.post)
		}
	}
	segment, rest, more := path, []byte(nil), false
	if i := bytes.IndexByte(path, '/'); i >= 0 {
		segment, rest, more = path[:i], path[i+1:], true
	}
	if t.literal != nil {
		q.step(t.literal[string(segment)], rest, more)
	}
	if len(segment) > 0 {
		q.step(t.one, rest, more)
	}
}

func (q *search) step(t *trie, rest []byte, more bool) {
	switch {
	case t == nil:
	case more:
		q.walk(t, rest)
	default:
		q.visit(t.end)
	}
}
