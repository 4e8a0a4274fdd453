package explain_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
	security "istio.io/api/security/v1beta1"
	typev1beta1 "istio.io/api/type/v1beta1"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// generator makes random policies of small vocabularies, so that values meet and
// stand in each other's way.
type generator struct{ *rand.Rand }

func pick[T any](g generator, list []T) T { return list[g.IntN(len(list))] }

var (
	principals = []string{"own.td/ns/a/sa/x", "own.td/ns/b/sa/y", "cluster.local/ns/a/sa/y", "far.td/ns/a/sa/x", "own.td/ns/a/*", "own.td/*", "*/sa/x", "*y", "*"}
	spaces     = []string{"a", "b", "a*", "*b", "*", "a*b"}
	accounts   = []string{"x", "y", "a/x", "b/y"}
	domains    = []string{"own.td", "old.td", "far.td", "o*", "*.td", "*"}
	blocks     = []string{"10.0.0.1", "10.0.0.9/8", "192.0.2.0/24", "2001:db8::/32", "0.0.0.0/0"}
	identities = []string{"https://i/s", "i/s", "i/*", "https://i/*", "*/s", "*"}
	hosts      = []string{"a.example", "A.example:80", "a.*", "*.Example", "*"}
	methods    = []string{"GET", "POST", "P*", "*T", "*"}
	paths      = []string{"/a", "/a/b", "/a*", "/a/*", "*/b", "*", "/{*}", "/a/{**}", "/{*}/b"}
	ports      = []string{"80", "8080", "443"}
	texts      = []string{"a", "b", "a*", "*b", "*"}
	servers    = []string{"a.example", "b.example", "*.example", "*"}
	conditions = map[string][]string{
		"source.ip": blocks, "remote.ip": blocks, "destination.ip": blocks, "destination.port": ports, "connection.sni": servers,
		"source.namespace": spaces, "source.principal": principals, "source.serviceAccount": accounts, "source.trustDomain": domains,
		"request.auth.principal": identities, "request.auth.audiences": texts, "request.auth.presenter": texts, "request.auth.claims[groups]": texts,
		"request.auth.claims[nested][a]": texts, "request.headers[X-A]": texts, "request.headers[host]": hosts, "request.headers[:method]": methods,
		"request.headers[:path]": paths[:6], "experimental.envoy.filters.network.x[a]": {"a", "[b]", "a*", "[*b]"}, "request.headersX[a]": texts,
	}
	keys = func() (ks []string) {
		for k := range conditions {
			ks = append(ks, k)
		}
		slices.Sort(ks)
		return ks
	}()
	workload = identity.Workload{Namespace: "one", Labels: map[string]string{"app": "web", "version": "v1"}}
	options  = func() authz.Options {
		td, err := identity.ParseTrustDomain("own.td")
		if err != nil {
			panic(err)
		}
		return authz.Options{TrustDomain: td, TrustDomainAliases: []string{"old.td"}, RootNamespace: "root"}
	}()
)

// values picks a few.
func (g generator) values(all []string) (list []string) {
	list = append(list, pick(g, all))
	for g.IntN(3) == 0 {
		if v := pick(g, all); !slices.Contains(list, v) {
			list = append(list, v)
		}
	}
	return list
}

// world is a set of random policies.
type world struct {
	set      authz.Set
	snapshot *authz.Snapshot
	text     []byte
	// constructs are the kinds of things that are in it.
	constructs map[string]bool
}

func (w *world) document(kind, namespace, name string, spec proto.Message, dry bool) {
	j, err := protojson.Marshal(spec)
	if err != nil {
		panic(err)
	}
	w.text = fmt.Appendf(w.text, "---\napiVersion: security.istio.io/v1\nkind: %s\nmetadata: {name: %s, namespace: %s%s}\nspec: %s\n",
		kind, name, namespace, map[bool]string{true: `, annotations: {istio.io/dry-run: "true"}`}[dry], j)
}

func (g generator) source(w *world, custom bool) *security.Source {
	s := &security.Source{}
	set := func(name string, list *[]string, all []string) {
		if len(*list) == 0 {
			*list = g.values(all)
			w.constructs[name] = true
		}
	}
	for proto.Size(s) == 0 || g.IntN(3) == 0 {
		one := g.IntN(14)
		if custom {
			one = g.IntN(4)
		}
		bare := len(s.ServiceAccounts)+len(s.NotServiceAccounts) == 0
		named := len(s.Principals)+len(s.NotPrincipals)+len(s.Namespaces)+len(s.NotNamespaces) > 0
		switch {
		case one == 0:
			set("ipBlocks", &s.IpBlocks, blocks)
		case one == 1:
			set("notIpBlocks", &s.NotIpBlocks, blocks)
		case one == 2:
			set("remoteIpBlocks", &s.RemoteIpBlocks, blocks)
		case one == 3:
			set("notRemoteIpBlocks", &s.NotRemoteIpBlocks, blocks)
		case one == 4:
			set("requestPrincipals", &s.RequestPrincipals, identities)
		case one == 5:
			set("notRequestPrincipals", &s.NotRequestPrincipals, identities)
		case one == 6:
			set("trustDomains", &s.TrustDomains, domains)
		case one == 7:
			set("notTrustDomains", &s.NotTrustDomains, domains)
		case one == 8 && bare:
			set("principals", &s.Principals, principals)
		case one == 9 && bare:
			set("notPrincipals", &s.NotPrincipals, principals)
		case one == 10 && bare:
			set("namespaces", &s.Namespaces, spaces)
		case one == 11 && bare:
			set("notNamespaces", &s.NotNamespaces, spaces)
		case one == 12 && !named:
			set("serviceAccounts", &s.ServiceAccounts, accounts)
		case one == 13 && !named:
			set("notServiceAccounts", &s.NotServiceAccounts, accounts)
		}
	}
	return s
}

func (g generator) operation(w *world) *security.Operation {
	o := &security.Operation{}
	for proto.Size(o) == 0 || g.IntN(3) == 0 {
		set := func(name string, list *[]string, all []string) {
			*list = g.values(all)
			w.constructs[name] = true
		}
		switch g.IntN(8) {
		case 0:
			set("hosts", &o.Hosts, hosts)
		case 1:
			set("notHosts", &o.NotHosts, hosts)
		case 2:
			set("methods", &o.Methods, methods)
		case 3:
			set("notMethods", &o.NotMethods, methods)
		case 4:
			set("paths", &o.Paths, paths)
		case 5:
			set("notPaths", &o.NotPaths, paths)
		case 6:
			set("ports", &o.Ports, ports)
		case 7:
			set("notPorts", &o.NotPorts, ports)
		}
	}
	return o
}

func (g generator) policy(w *world, name string) {
	spec := &security.AuthorizationPolicy{}
	action := pick(g, []string{"ALLOW", "ALLOW", "ALLOW", "DENY", "DENY", "AUDIT", "CUSTOM"})
	w.constructs[action] = true
	spec.Action = security.AuthorizationPolicy_Action(security.AuthorizationPolicy_Action_value[action])
	custom := action == "CUSTOM"
	if custom {
		spec.ActionDetail = &security.AuthorizationPolicy_Provider{Provider: &security.AuthorizationPolicy_ExtensionProvider{Name: pick(g, []string{"ask", "ask", "ask", "other"})}}
	}
	dry := (action == "ALLOW" || action == "DENY") && g.IntN(10) == 0
	rules := 1 + g.IntN(2)
	if action == "ALLOW" && g.IntN(12) == 0 {
		rules = 0
	}
	for range rules {
		rule := &security.Rule{}
		for range g.IntN(3) {
			rule.From = append(rule.From, &security.Rule_From{Source: g.source(w, custom)})
		}
		for range g.IntN(3) {
			rule.To = append(rule.To, &security.Rule_To{Operation: g.operation(w)})
		}
		for range max(0, g.IntN(4)-2) {
			key := pick(g, keys)
			for custom && (len(key) > 12 && key[:12] == "request.auth" || len(key) > 7 && key[:7] == "source." && key != "source.ip") {
				key = pick(g, keys)
			}
			w.constructs[key] = true
			c := &security.Condition{Key: key}
			if g.IntN(3) > 0 {
				c.Values = g.values(conditions[key])
			}
			if len(c.Values) == 0 || g.IntN(4) == 0 {
				c.NotValues = g.values(conditions[key])
			}
			rule.When = append(rule.When, c)
		}
		spec.Rules = append(spec.Rules, rule)
	}
	ns := pick(g, []string{"one", "one", "one", "one", "two", "root"})
	if g.IntN(3) == 0 {
		spec.Selector = &typev1beta1.WorkloadSelector{MatchLabels: map[string]string{"app": pick(g, []string{"web", "web", "db"})}}
	}
	w.document("AuthorizationPolicy", ns, name, spec, dry)
}

func (g generator) world(t testing.TB) *world {
	w := &world{constructs: map[string]bool{}}
	for i := range 1 + g.IntN(4) {
		g.policy(w, fmt.Sprintf("p%d", i))
	}
	modes := []security.PeerAuthentication_MutualTLS_Mode{0, 1, 2, 3, 3, 3}
	if g.IntN(4) == 0 {
		for i := range 1 + g.IntN(2) {
			p := &security.PeerAuthentication{Mtls: &security.PeerAuthentication_MutualTLS{Mode: pick(g, modes)}}
			ns := pick(g, []string{"one", "one", "root"})
			if ns == "one" && g.IntN(2) == 0 {
				p.Selector = &typev1beta1.WorkloadSelector{MatchLabels: map[string]string{"app": "web"}}
				if g.IntN(2) == 0 {
					p.PortLevelMtls = map[uint32]*security.PeerAuthentication_MutualTLS{80: {Mode: pick(g, modes)}, 8080: {Mode: pick(g, modes)}}
					w.constructs["portLevelMtls"] = true
				}
			}
			w.constructs["PeerAuthentication"] = true
			w.document("PeerAuthentication", ns, fmt.Sprintf("q%d", i), p, false)
		}
	}
	if g.IntN(4) == 0 {
		p := &security.RequestAuthentication{}
		for range 1 + g.IntN(2) {
			rule := &security.JWTRule{Issuer: pick(g, []string{"https://i", "i"})}
			if g.IntN(2) == 0 {
				rule.Audiences = []string{"a"}
			}
			switch g.IntN(4) {
			case 0:
				rule.FromHeaders = []*security.JWTHeader{{Name: "X-T", Prefix: "t "}}
			case 1:
				rule.FromCookies = []string{"t"}
			}
			p.JwtRules = append(p.JwtRules, rule)
		}
		w.constructs["RequestAuthentication"] = true
		w.document("RequestAuthentication", "one", "t", p, false)
	}
	if g.IntN(30) == 0 {
		w.text = append(w.text, "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: bad, namespace: one}\nspec: {action: DENY, rules: [{to: [{operation: {ports: [http]}}]}]}\n"...)
		w.constructs["invalid"] = true
	}
	resources, problems := authz.Parse("w.yaml", w.text)
	for _, p := range problems {
		if p.Severity == authz.SeverityError && !w.constructs["invalid"] {
			t.Fatalf("%v\n%s", p, w.text)
		}
	}
	w.set, _ = authz.Set{}.Update(resources)
	w.snapshot, _ = authz.Compile(w.set, options)
	return w
}

func (g generator) request() authz.Request {
	ips := []string{"10.0.0.1", "10.9.9.9", "192.0.2.9", "203.0.113.1", "2001:db8::1"}
	r := authz.Request{
		Known: authz.FieldsHTTP, HTTP: g.IntN(8) > 0,
		Method: []byte(pick(g, []string{"GET", "POST", "PUT", "get", ""})), Path: []byte(pick(g, []string{"/a", "/a/", "/a/b", "/a?x=/b", "/", "/x", "/x/b#y", "", "/a\nb", "/a\xff"})),
		Host: []byte(pick(g, []string{"a.example", "A.EXAMPLE", "a.example:80", "b.example", ""})), SNI: []byte(pick(g, []string{"a.example", "b.example", ""})),
		DestinationPort: pick(g, []uint16{80, 443, 8080, 9}),
		SourceIP:        netip.MustParseAddr(pick(g, ips)), DestinationIP: netip.MustParseAddr(pick(g, ips)), RemoteIP: netip.MustParseAddr(pick(g, ips)),
	}
	if g.IntN(2) == 0 {
		r.Known &^= authz.FieldRemoteIP
	}
	if g.IntN(5) > 0 {
		r.Authenticated = true
		r.Principal = []byte(pick(g, []string{"spiffe://own.td/ns/a/sa/x", "spiffe://own.td/ns/b/sa/y", "spiffe://old.td/ns/a/sa/y", "spiffe://far.td/ns/a/sa/x", "spiffe://own.td/ns/ab/sa/x", "dns.example", "spiffe://own.td/x"}))
		if g.IntN(10) == 0 {
			r.OtherNames = append(r.OtherNames, []byte("spiffe://own.td/ns/b/sa/y"))
		}
	}
	for range g.IntN(3) {
		r.Headers = append(r.Headers, authz.Header{
			Name: pick(g, []string{"x-a", "x-a", "x-forwarded-for", "x-t", "cookie", "authorization"}), Form: pick(g, []authz.HeaderForm{0, 0, 0, 0, authz.HeaderJoined, authz.HeaderUnclear, authz.HeaderHidden}),
			Value: []byte(pick(g, []string{"a", "b", "a,b", "", "10.0.0.1", "t x", "t=x", "Bearer x"})),
		})
	}
	if g.IntN(2) == 0 {
		value := func() any {
			return pick(g, []any{"a", "b", "ab", "", nil, true, []any{"a", "x"}, map[string]any{"a": "a"}})
		}
		claims := map[string]any{"aud": value(), "azp": value(), "groups": value(), "nested": value()}
		if g.IntN(6) > 0 {
			claims["iss"], claims["sub"] = pick(g, []any{"https://i", "i", "x"}), pick(g, []any{"s", "t", ""})
		}
		r.Claims, _ = structpb.NewStruct(claims)
		s, _ := structpb.NewStruct(map[string]any{"a": pick(g, []any{"a", "b", []any{"b"}})})
		r.Metadata = map[string]*structpb.Struct{"envoy.filters.network.x": s}
	}
	for _, absent := range []*[]byte{&r.Method, &r.Path, &r.Host} {
		if g.IntN(8) == 0 {
			*absent = nil
		}
	}
	if g.IntN(4) == 0 {
		for range 1 + g.IntN(3) {
			r.Known &^= 1 << g.IntN(13)
		}
	}
	return r
}
