package authz

import (
	"fmt"
	"strconv"

	security "istio.io/api/security/v1beta1"
)

// rule is a compiled rule. It is immutable and shared by programs.
type rule struct {
	*Rule
	// order is the name that Envoy sorts policies by, so it says which of
	// several matching rules is reported.
	order string
	from  []from
	to    []to
	// http says that the rule reads an attribute that only HTTP has.
	http bool
}

// from is a compiled source: all of its fields must hold. nil fields hold.
type from struct {
	principals, notPrincipals *patterns
	namespaces, notNamespaces *namespaces
	ips, notIPs               blocks
}

// to is a compiled operation: all of its fields must hold.
type to struct {
	hosts, notHosts     *patterns
	methods, notMethods *patterns
	paths, notPaths     *patterns
	ports, notPorts     []uint16
}

func newRule(meta *Rule) *rule {
	c := &rule{Rule: meta, order: fmt.Sprintf("ns[%s]-policy[%s]-rule[%d]", meta.Namespace, meta.Name, meta.Index)}
	for _, f := range meta.Spec.GetFrom() {
		c.from = append(c.from, newFrom(f.GetSource()))
	}
	for _, t := range meta.Spec.GetTo() {
		op := newTo(t.GetOperation())
		c.to = append(c.to, op)
		c.http = c.http || op.hosts != nil || op.notHosts != nil || op.methods != nil || op.notMethods != nil ||
			op.paths != nil || op.notPaths != nil
	}
	return c
}

func newFrom(s *security.Source) from {
	return from{
		principals: principalPatterns(s.GetPrincipals()), notPrincipals: principalPatterns(s.GetNotPrincipals()),
		namespaces: newNamespaces(s.GetNamespaces()), notNamespaces: newNamespaces(s.GetNotNamespaces()),
		ips: newBlocks(s.GetIpBlocks()), notIPs: newBlocks(s.GetNotIpBlocks()),
	}
}

func newTo(o *security.Operation) to {
	return to{
		hosts: hostPatterns(o.GetHosts()), notHosts: hostPatterns(o.GetNotHosts()),
		methods: methodPatterns(o.GetMethods()), notMethods: methodPatterns(o.GetNotMethods()),
		paths: pathPatterns(o.GetPaths()), notPaths: pathPatterns(o.GetNotPaths()),
		ports: newPorts(o.GetPorts()), notPorts: newPorts(o.GetNotPorts()),
	}
}

func newPorts(list []string) []uint16 {
	if len(list) == 0 {
		return nil
	}
	ports := make([]uint16, 0, len(list))
	for _, v := range list {
		if n, err := strconv.ParseUint(v, 10, 16); err == nil {
			ports = append(ports, uint16(n))
		}
	}
	return ports
}

// view is a request as the rules read it, prepared once for all of them.
type view struct {
	*Request
	// peer says what is known of the peer's names: no if there certainly are
	// none, yes if they are all known.
	peer truth
	path []byte
}

func newView(r *Request) view {
	v := view{Request: r, peer: maybe, path: r.Path}
	switch {
	case r.Known&FieldPeer == 0:
	case !r.Authenticated:
		v.peer = no
	case r.Known&FieldPrincipal != 0:
		v.peer = yes
	}
	// Envoy's path matcher leaves out the query and the fragment.
	for i, c := range v.path {
		if c == '?' || c == '#' {
			v.path = v.path[:i]
			break
		}
	}
	return v
}

// match evaluates the rule.
func (c *rule) match(v *view) truth {
	if !v.HTTP && c.http && c.Action == ActionAllow {
		// Istio leaves such a rule out for TCP, with all of its alternatives.
		return no
	}
	t := anyFrom(c.from, v)
	if t == no {
		return no
	}
	return min(t, anyTo(c.to, v))
}

// anyFrom is true of no alternatives at all: a rule without "from" is about
// every peer.
func anyFrom(alternatives []from, v *view) truth {
	if len(alternatives) == 0 {
		return yes
	}
	best := no
	for i := range alternatives {
		if best = max(best, alternatives[i].match(v)); best == yes {
			break
		}
	}
	return best
}

func anyTo(alternatives []to, v *view) truth {
	if len(alternatives) == 0 {
		return yes
	}
	best := no
	for i := range alternatives {
		if best = max(best, alternatives[i].match(v)); best == yes {
			break
		}
	}
	return best
}

func (f *from) match(v *view) truth {
	t := yes
	if f.principals != nil {
		t = v.principal(f.principals)
	}
	if t != no && f.notPrincipals != nil {
		t = min(t, v.principal(f.notPrincipals).not())
	}
	if t != no && f.namespaces != nil {
		t = min(t, v.namespace(f.namespaces))
	}
	if t != no && f.notNamespaces != nil {
		t = min(t, v.namespace(f.notNamespaces).not())
	}
	if t != no && f.ips != nil {
		t = min(t, v.source(f.ips))
	}
	if t != no && f.notIPs != nil {
		t = min(t, v.source(f.notIPs).not())
	}
	return t
}

func (o *to) match(v *view) truth {
	t := yes
	if o.ports != nil {
		t = v.port(o.ports)
	}
	if t != no && o.notPorts != nil {
		t = min(t, v.port(o.notPorts).not())
	}
	if !v.HTTP {
		// Only a DENY rule comes here with HTTP fields. Istio drops them from it,
		// which makes it wider.
		return t
	}
	if t != no && o.methods != nil {
		t = min(t, v.text(FieldMethod, v.Method, o.methods))
	}
	if t != no && o.notMethods != nil {
		t = min(t, v.text(FieldMethod, v.Method, o.notMethods).not())
	}
	if t != no && o.paths != nil {
		t = min(t, v.text(FieldPath, v.path, o.paths))
	}
	if t != no && o.notPaths != nil {
		t = min(t, v.text(FieldPath, v.path, o.notPaths).not())
	}
	if t != no && o.hosts != nil {
		t = min(t, v.text(FieldHost, v.Host, o.hosts))
	}
	if t != no && o.notHosts != nil {
		t = min(t, v.text(FieldHost, v.Host, o.notHosts).not())
	}
	return t
}

// text holds an attribute against patterns. An absent one matches none, so it
// satisfies every not-form.
func (v *view) text(f Field, value []byte, p *patterns) truth {
	switch {
	case v.Known&f == 0:
		return maybe
	case value == nil:
		return no
	}
	return p.match(value)
}

// principal holds the peer's names against patterns: as in Envoy any of them
// may match, and a peer without a certificate has none.
func (v *view) principal(p *patterns) truth {
	if v.peer != yes {
		return v.peer
	}
	t := p.match(v.Principal)
	for _, n := range v.OtherNames {
		t = max(t, p.match(n))
	}
	return t
}

func (v *view) namespace(n *namespaces) truth {
	if v.peer != yes {
		return v.peer
	}
	t := n.match(v.Principal)
	for _, name := range v.OtherNames {
		t = max(t, n.match(name))
	}
	return t
}

func (v *view) source(bs blocks) truth {
	if v.Known&FieldSourceIP == 0 || !v.SourceIP.IsValid() {
		return maybe
	}
	return toTruth(bs.match(v.SourceIP.Unmap().WithZone("")))
}

func (v *view) port(ports []uint16) truth {
	if v.Known&FieldDestinationPort == 0 {
		return maybe
	}
	for _, p := range ports {
		if p == v.DestinationPort {
			return yes
		}
	}
	return no
}
