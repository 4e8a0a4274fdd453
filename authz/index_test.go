package authz_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/structpb"
	security "istio.io/api/security/v1beta1"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// edges are values at which an index could part from the rule behind it. All of
// them pass admission where they are used.
var edges = struct {
	text, names, policyNames, paths, templates, hosts, ips, keys []string
}{
	text:        []string{"", "a", "A", "ab", "b", ",", "a,b", "*", "a\x00", "\x00", "\xff", "a\n", "é", "\u212a", strings.Repeat("a", 3000), "9", "ba"},
	names:       []string{"", "spiffe://", "spiffe:///", "spiffe://t/ns/a/sa/x", "spiffe://t/ns/a/sa/sa/x", "spiffe://t/ns/ns/ns/a/sa/x/", "spiffe://t/ns//ns/a/sa/x/y", "spiffe://t/ns/a/b/sa/x", "spiffe://t/ns/a/sa/", "spiffe:///ns/a/sa/x", "/ns/a/", "ns/a/sa/x", "spiffe://t/ns/a/sa/x/sa/y", "spiffe://t/ns/b/sa/y\n", "spiffe://t/\xff/ns/b/sa/y", "CN=x", "a", "spiffe://t/ns/\x00/sa/\x00", "spiffe://t" + strings.Repeat("/ns/a", 300) + "/sa/x", "spiffe://u/ns/ab/sa/xy"},
	policyNames: []string{"t/ns/a/sa/x", "t/ns/b/sa/y", "t/*", "*", "*/sa/x", "*x", "**", "t/ns/a/sa/x/", "\u0000", "*é", "u/ns/a*"},
	paths:       []string{"", "/", "//", "/a", "/a/", "/a/b", "a", "/a//b", "/A", "/a/x/b", "/a?x", "?", "#", "/a#b", "/\x00", "/\xff", "/a/*/b", "/a%2fb", "/a/b/c/d", strings.Repeat("/a", 1000), "*", "/[", "/a/[/b"},
	templates:   []string{"/{*}", "/{**}", "{*}", "{**}", "/a/{*}", "/a/{**}", "/a/{*}/b", "/{*}/{*}", "/{**}/b", "/a/{**}/b", "{*}/", "/{*}/", "/{*}/{**}", "//a/{*}", "/a/{*}/{**}/d", "{**}/b"},
	hosts:       []string{"", "a", "A", "a:80", "a.", "é", "\u212a", "\x00", "\xff", strings.Repeat("A", 300), "b.a", "*"},
	ips:         []string{"0.0.0.0", "10.0.0.1", "10.255.255.255", "255.255.255.255", "::", "::1", "::ffff:10.0.0.1", "fe80::1%eth0", "fe80::1", "2001:db8::1", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"},
	keys:        []string{"a", "a\x00b", "a][b", "b", "\x00", "a\x00", "sub", "iss", "a]", "é"},
}

var edgeBlocks = []string{"0.0.0.0/0", "::/0", "10.0.0.1", "10.0.0.0/8", "10.0.0.1/32", "10.0.0.7/31", "::ffff:10.0.0.1", "::ffff:10.0.0.0/104", "::ffff:0:0/96", "::/1", "fe80::1%eth0", "fe80::1", "fe80::/10", "::1/128", "255.255.255.255"}

// pattern is one of the values as text, prefix and suffix.
func (g generator) pattern(list []string) string {
	v := pick(g, list)
	for v == "" || strings.Contains(v, "\xff") {
		v = pick(g, list)
	}
	switch g.IntN(4) {
	case 0:
		return v + "*"
	case 1:
		return "*" + v
	}
	return v
}

func (g generator) several(one func() string) (out []string) {
	for n := g.IntN(3); n >= 0; n-- {
		out = append(out, one())
	}
	if g.IntN(20) == 0 {
		for len(out) < 14 {
			out = append(out, one())
		}
	}
	return out
}

// edgeRule is a rule of values at the edges.
func (g generator) edgeRule() *security.Rule {
	of := func(list []string) []string { return g.several(func() string { return pick(g, list) }) }
	patterns := func(list []string) []string { return g.several(func() string { return g.pattern(list) }) }
	r := &security.Rule{}
	for range g.IntN(3) {
		s := &security.Source{}
		switch g.IntN(7) {
		case 0:
			s.Principals = of(edges.policyNames)
		case 1:
			s.Namespaces = of([]string{"a", "b", "ab", "a*", "*b", "*", "ns", "\x00", "sa"})
		case 2:
			s.ServiceAccounts = of([]string{"a/x", "x", "b/y", "ns/x", "sa/x"})
		case 3:
			s.TrustDomains = of([]string{"t", "u", "*", "t*", "*t"})
		case 4:
			s.RequestPrincipals = of([]string{"i/s", "i/", "/s", "/", "i", "*", "*s", "i*", "*/s", "i/*", "*i/s", "i/s*", "**", "*/"})
		case 5:
			s.IpBlocks = of(edgeBlocks)
		case 6:
			s.RemoteIpBlocks = of(edgeBlocks)
		}
		r.From = append(r.From, &security.Rule_From{Source: s})
	}
	for range g.IntN(3) {
		o := &security.Operation{}
		switch g.IntN(4) {
		case 0:
			o.Hosts = patterns(edges.hosts)
		case 1:
			o.Methods = patterns(edges.text)
		case 2:
			o.Paths = g.several(func() string {
				if g.IntN(2) == 0 {
					return pick(g, edges.templates)
				}
				return g.pattern(edges.paths[:12])
			})
		case 3:
			o.Ports = of([]string{"0", "1", "080", "65535"})
		}
		r.To = append(r.To, &security.Rule_To{Operation: o})
	}
	for range g.IntN(3) {
		w := &security.Condition{}
		switch g.IntN(7) {
		case 0:
			w.Key, w.Values = "request.headers["+pick(g, []string{"x-a", "X-A", "x-b", "x-a\x00", "host", ":path"})+"]", patterns(edges.text)
		case 1, 2, 3:
			w.Key, w.Values = "request.auth.claims["+pick(g, edges.keys)+"]", patterns(edges.text)
			if g.IntN(3) == 0 {
				w.Key += "[" + pick(g, edges.keys) + "]"
			}
		case 4:
			w.Key, w.Values = "connection.sni", patterns(edges.hosts)
		case 5:
			w.Key, w.Values = "destination.ip", of(edgeBlocks)
		case 6:
			w.Key, w.Values = "experimental.envoy.filters.x[a]", patterns(edges.text)
		}
		if g.IntN(5) == 0 {
			w.Values, w.NotValues = nil, w.Values
		}
		r.When = append(r.When, w)
	}
	return r
}

func (g generator) edgeRequest() authz.Request {
	text := func(list []string) []byte {
		if g.IntN(6) == 0 {
			return nil
		}
		return []byte(pick(g, list))
	}
	ip := func() netip.Addr {
		if g.IntN(8) == 0 {
			return netip.Addr{}
		}
		return netip.MustParseAddr(pick(g, edges.ips))
	}
	r := authz.Request{
		Known: authz.FieldsHTTP, HTTP: g.IntN(5) > 0, Authenticated: g.IntN(5) > 0, Principal: text(edges.names),
		SourceIP: ip(), RemoteIP: ip(), DestinationIP: ip(), DestinationPort: pick(g, []uint16{0, 1, 80, 65535}),
		SNI: text(edges.hosts), Method: text(edges.text), Path: text(edges.paths), Host: text(edges.hosts),
	}
	for range g.IntN(3) {
		r.OtherNames = append(r.OtherNames, text(edges.names))
	}
	for range g.IntN(4) {
		r.Headers = append(r.Headers, authz.Header{
			Name: pick(g, []string{"x-a", "x-a", "x-b", "x-a\x00", "x-forwarded-for", "host"}), Value: text(append(edges.text, edges.ips...)),
			Form: pick(g, []authz.HeaderForm{0, 0, 0, authz.HeaderJoined, authz.HeaderUnclear}),
		})
	}
	var value func(depth int) *structpb.Value
	value = func(depth int) *structpb.Value {
		switch g.IntN(8) {
		case 0:
			return structpb.NewNullValue()
		case 1:
			return structpb.NewNumberValue(9)
		case 2:
			return nil
		case 3:
			l := &structpb.ListValue{}
			for range g.IntN(3) {
				l.Values = append(l.Values, value(0))
			}
			return structpb.NewListValue(l)
		case 4, 5:
			if depth > 0 {
				s := &structpb.Struct{Fields: map[string]*structpb.Value{}}
				for range 4 {
					s.Fields[pick(g, edges.keys)] = value(depth - 1)
				}
				return structpb.NewStructValue(s)
			}
		}
		return structpb.NewStringValue(pick(g, edges.text))
	}
	if g.IntN(4) > 0 {
		r.Claims = &structpb.Struct{Fields: map[string]*structpb.Value{}}
		for range 5 {
			r.Claims.Fields[pick(g, edges.keys)] = value(2)
		}
		if g.IntN(2) == 0 {
			r.Claims.Fields["iss"] = structpb.NewStringValue(pick(g, []string{"i", "", "ii", "j"}))
			r.Claims.Fields["sub"] = structpb.NewStringValue(pick(g, []string{"s", "", "ss", "t"}))
		}
	}
	if g.IntN(2) == 0 {
		r.Metadata = map[string]*structpb.Struct{"envoy.filters.x": {Fields: map[string]*structpb.Value{"a": value(1)}}}
	}
	if g.IntN(3) == 0 {
		for range 1 + g.IntN(3) {
			r.Known &^= 1 << g.IntN(13)
		}
	}
	return r
}

// edgeDocument is a policy of such rules.
func (g generator) edgeDocument(name string) []byte {
	spec := &security.AuthorizationPolicy{}
	if g.IntN(2) == 0 {
		spec.Action = security.AuthorizationPolicy_DENY
	}
	for range 1 + g.IntN(3) {
		spec.Rules = append(spec.Rules, g.edgeRule())
	}
	j, err := protojson.Marshal(spec)
	if err != nil {
		panic(err)
	}
	return fmt.Appendf(nil, "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: %s, namespace: a}\nspec: %s\n", name, j)
}

// TestTheIndexLosesNoRule holds each decision by the indexes, freshly made and
// followed through changes, against one that goes through all rules, with values
// at which an index could part from the rules behind it.
func TestTheIndexLosesNoRule(t *testing.T) {
	t.Parallel()
	seed := seeded(t)
	g := generator{rand.New(rand.NewPCG(seed, 5))}
	worlds, requests := 120, 300
	switch {
	case raceEnabled:
		worlds = 10
	case testing.Short():
		worlds = 40
	}
	good, decided := 0, map[authz.Reason]int{}
	for world := range worlds {
		var rs []authz.Resource
		for k, want := 0, pick(g, []int{3, 10, 40, 120}); len(rs) < want; k++ {
			got, problems := authz.Parse("x", g.edgeDocument(fmt.Sprintf("p%d", k)))
			if len(problems) == 0 { // admission has its own tests
				rs = append(rs, got...)
				good++
			}
		}
		opts := authz.Options{}
		if g.IntN(4) == 0 {
			opts.Envoy = authz.EnvoyVersion{Major: 1, Minor: 30}
		}
		set, _ := authz.Set{}.Update(rs[:len(rs)*4/5])
		snapshot, _ := authz.Compile(set, opts)
		for step := range 2 {
			p := snapshot.For(identity.Workload{Namespace: "a"})
			scan := p.Scan()
			for range requests / 2 {
				r := g.edgeRequest()
				got, want := p.Decide(&r), scan.Decide(&r)
				decided[want.Reason]++
				if render(got) != render(want) {
					t.Fatalf("seed %d, world %d, step %d: by the index %q, without %q for %+v: %s", seed, world, step, render(got), render(want), r, want.Text())
				}
			}
			set, _ = set.Update(rs[len(rs)/5:])
			snapshot, _ = snapshot.Update(set)
		}
	}
	t.Logf("seed %d: %d policies, %v", seed, good, decided)
	for _, reason := range []authz.Reason{authz.ReasonAllowRule, authz.ReasonDenyRule, authz.ReasonDenyUnknown, authz.ReasonAllowUnknown, authz.ReasonNoAllowRule} {
		if decided[reason] < 20 && !raceEnabled { // a few worlds need not come to all
			t.Errorf("only %d decisions %s", decided[reason], reason)
		}
	}
}

// TestClaimsOfAnyNameAreApart: one tenant's policy about a claim with a NUL in its
// name must not lead the index of another's DENY astray.
func TestClaimsOfAnyNameAreApart(t *testing.T) {
	t.Parallel()
	var text []byte
	add := func(namespace, name, key, value string) {
		text = fmt.Appendf(text, "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: %s, namespace: %s}\n"+
			"spec: {action: DENY, rules: [{when: [{key: %q, values: [%s]}]}]}\n", name, namespace, key, value)
	}
	for i := range 6 {
		add("a", fmt.Sprintf("p%d", i), "request.auth.claims[group\x00name]", fmt.Sprintf("x%d", i))
	}
	add("istio-system", "guard", "request.auth.claims[group][name]", "guests")
	rs, problems := authz.Parse("x", text)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	set, _ := authz.Set{}.Update(rs)
	snapshot, _ := authz.Compile(set, authz.Options{})
	claims, _ := structpb.NewStruct(map[string]any{"group": map[string]any{"name": "guests"}})
	d := snapshot.For(identity.Workload{Namespace: "a"}).Decide(&authz.Request{Known: authz.FieldsHTTP, HTTP: true, Claims: claims})
	if got, want := render(d), "deny deny-rule istio-system/guard[0]"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
