package authz

import (
	"bytes"
	"net/netip"
	"slices"

	"google.golang.org/protobuf/types/known/structpb"
)

// search is the state of going through a table: the first rule found that
// certainly matches and the first that may, as indexes into rules, or their
// number.
type search struct {
	rules          []*rule
	gone           []uint64
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
	n := int32(len(s.base.rules))
	q := search{s.base.rules, s.gone, v, n, n}
	q.index(s.base.index)
	var certain, doubt *rule
	if q.certain < n {
		certain = s.base.rules[q.certain]
	}
	if q.doubt < n {
		doubt = s.base.rules[q.doubt]
	}
	if s.extra != nil {
		m := int32(len(s.extra.rules))
		e := search{s.extra.rules, nil, v, m, m}
		e.index(s.extra.index)
		if e.certain < m && s.at[e.certain] <= q.certain {
			certain = s.extra.rules[e.certain]
		}
		if e.doubt < m && s.at[e.doubt] <= q.doubt {
			doubt = s.extra.rules[e.doubt]
		}
	}
	switch {
	case certain != nil:
		return match{certain.Rule, true}
	case doubt != nil:
		return match{doubt.Rule, false}
	}
	return match{}
}

// try evaluates the rules of an ascending list that could still be the first.
func (q *search) try(list []int32) {
	for _, i := range list {
		if i >= q.certain {
			return
		}
		if q.gone != nil && q.gone[i/64]&(1<<(i%64)) != 0 {
			continue
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
		if hidden(value) || slices.ContainsFunc(value.GetListValue().GetValues(), hidden) {
			q.try(g.all)
			return
		}
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
		q.address(g, true, v.remoteAddress())
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
				account, _, _ := bytes.Cut(below[1:], []byte("/"))
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
