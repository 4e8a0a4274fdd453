package authz_test

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
	security "istio.io/api/security/v1beta1"
	typev1beta1 "istio.io/api/type/v1beta1"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// The vocabularies are small, so that values meet and stand in each other's way,
// and have each kind of match.
var (
	principalValues = map[string][]string{
		"exact":  {"cluster.local/ns/a/sa/x", "own.td/ns/a/sa/x", "own.td/ns/b/sa/y", "old.td/ns/a/sa/y", "far.td/ns/a/sa/x", "own.td/ns/a", "a*b"},
		"prefix": {"own.td/ns/a/*", "own.td/*", "o*"}, "suffix": {"*/sa/x", "*y", "*/ns/a/sa/x", "*x*"}, "presence": {"*"},
	}
	namespaceValues = map[string][]string{
		"exact": {"a", "b", "sa", "a/sa"}, "prefix": {"a*", "*/sa*"}, "suffix": {"*b", "*a"}, "presence": {"*"}, "middle": {"a*b", "*a*"},
	}
	ipValues     = map[string][]string{"exact": {"10.0.0.1", "2001:db8::1"}, "block": {"10.0.0.9/8", "192.0.2.0/24", "2001:db8::/32", "0.0.0.0/0"}}
	hostValues   = map[string][]string{"exact": {"a.example", "A.example:80"}, "prefix": {"a.*", "A.example:*"}, "suffix": {"*.Example", "*:80"}, "presence": {"*"}}
	methodValues = map[string][]string{"exact": {"GET", "get", "POST"}, "prefix": {"P*", "G*"}, "suffix": {"*T", "*ST"}, "presence": {"*"}}
	pathValues   = map[string][]string{"exact": {"/a", "/a/b", "/A"}, "prefix": {"/a*", "/a/*", "/*"}, "suffix": {"*/b", "*.php", "*a*"}, "presence": {"*"}}
	toPathValues = map[string][]string{
		"exact": pathValues["exact"], "prefix": pathValues["prefix"], "suffix": pathValues["suffix"], "presence": {"*"},
		"template": {"/{*}", "/a/{*}", "/{**}", "/{*}/b", "/a/{**}", "/{**}/b", "/{*}/{*}", "{*}", "/a/{**}/x/y", "/{*}/"},
	}
	portValues = map[string][]string{"exact": {"80", "8080", "0443"}}

	accountValues  = map[string][]string{"exact": {"x", "y", "a/x", "b/y", "ns/a", "ab/x"}}
	domainValues   = map[string][]string{"exact": {"own.td", "old.td", "far.td", "cluster.local"}, "prefix": {"o*", "own*"}, "suffix": {"*.td", "*local"}, "presence": {"*"}}
	identityValues = map[string][]string{
		"exact": {"https://i/s", "i/s", "i", "https://i/"}, "prefix": {"https://i/s*", "i/*", "https*", "https://i/*"},
		"suffix": {"*s", "*/s", "*i/s"}, "presence": {"*"},
	}
	issuerValues   = map[string][]string{"exact": {"https://i", "i", "x"}, "prefix": {"https*", "i*"}, "suffix": {"*i", "*//i"}, "presence": {"*"}}
	headerValues   = map[string][]string{"exact": {"a", "b", "a,b", "B"}, "prefix": {"a*", "b,*"}, "suffix": {"*a", "*,b"}, "presence": {"*"}}
	claimValues    = map[string][]string{"exact": {"a", "b", "s"}, "prefix": {"a*"}, "suffix": {"*b", "*s"}, "presence": {"*"}}
	metadataValues = map[string][]string{"exact": {"a", "[b]", "[a"}, "prefix": {"a*", "[a*]"}, "suffix": {"*b", "[*b]"}, "presence": {"*", "[*]"}}
	sniValues      = map[string][]string{"exact": {"a.example", "b.example", "A.example"}, "prefix": {"a.*"}, "suffix": {"*.example"}, "presence": {"*"}}

	// conditions are keys and their values.
	conditions = map[string]map[string][]string{
		"source.ip": ipValues, "remote.ip": ipValues, "destination.ip": ipValues, "destination.port": portValues, "connection.sni": sniValues,
		"source.namespace": namespaceValues, "source.principal": principalValues, "source.serviceAccount": accountValues, "source.trustDomain": domainValues,
		"request.auth.principal": identityValues, "request.auth.audiences": claimValues, "request.auth.presenter": claimValues,
		"request.headers[X-A]": headerValues, "request.headers[host]": hostValues, "request.headers[:method]": methodValues, "request.headers[:path]": pathValues,
		"request.auth.claims[iss]": issuerValues, "request.auth.claims[nested][a]": claimValues, "request.auth.claims[list]": claimValues,
		"experimental.envoy.filters.network.x[a]": metadataValues, "request.headersX[a]": headerValues,
	}

	someNames = []string{
		"spiffe://own.td/ns/a/sa/x", "spiffe://own.td/ns/b/sa/y", "spiffe://old.td/ns/a/sa/y", "spiffe://old.td/ns/a/sa/x", "spiffe://far.td/ns/a/sa/x",
		"spiffe://cluster.local/ns/a/sa/x", "spiffe://own.td/ns/ab/sa/x", "spiffe://own.td/ns/ns/a/ns/b/x", "spiffe://own.td/ns/a", "spiffe://x", "spiffe://a*b",
		"dns.example", "CN=/ns/a/x", "", "spiffe://own.td/ns/a/\xff/sa/x", "spiffe://own.td/ns/a\n/sa/x*", "own.td/ns/a/sa/x", "spiffe://own.td/ns//a/sa/y",
	}
	someHosts   = []string{"a.example", "A.EXAMPLE", "a.example:80", "b.example", "x", ""}
	someMethods = []string{"GET", "get", "POST", "PUT", "PST", ""}
	somePaths   = []string{"/a", "/a/", "/a/b", "/a?x=/b", "/a/b#y", "/A", "/", "?", "x.php", "/a/b", "/x/b?q", "/xa*", "/a\xff", "", "/a\nb", "*", "/a/x/y", "/x", "/x/", "/*/b", "//b", "/a/[", "/a//x/y"}
	somePorts   = []uint16{80, 443, 8080, 9}
	someIPs     = []string{"10.0.0.1", "10.9.9.9", "192.0.2.9", "203.0.113.1", "2001:db8::1", "2001:db9::1"}
)

// world is one set of random policies, as text and as the naive evaluator has
// them.
type world struct {
	naive
	yaml   []byte
	fields []field
	kinds  map[field]string // FIELD KIND ACTION
}

type generator struct{ *rand.Rand }

func pick[T any](g generator, list []T) T { return list[g.IntN(len(list))] }

// values picks a list of values and says which kind of match the first is of.
func (g generator) values(all map[string][]string) (list []string, kind string) {
	kinds := make([]string, 0, len(all))
	for _, k := range []string{"exact", "prefix", "suffix", "presence", "middle", "block", "template"} {
		if all[k] != nil {
			kinds = append(kinds, k)
		}
	}
	kind = pick(g, kinds)
	list = append(list, pick(g, all[kind]))
	for g.IntN(4) == 0 {
		list = append(list, pick(g, all[pick(g, kinds)]))
	}
	if g.IntN(40) == 0 { // more than are compared one by one
		for i := range 12 {
			list = append(list, fmt.Sprintf("9%d", i))
		}
		if all["block"] != nil {
			list = list[:1]
		}
	}
	return list[:min(len(list), 16)], kind // more service accounts are refused
}

func (g generator) world() *world {
	w := &world{kinds: map[field]string{}}
	w.root = "root"
	w.domains = []string{"own.td", "old.td"}
	// Half of the worlds are one rule for one namespace, so that each of its
	// lists has a say.
	focus := g.IntN(2) == 0
	policies := 1 + g.IntN(3)
	if focus {
		policies = 1
	} else if g.IntN(8) == 0 {
		policies = 20 + g.IntN(20) // so many that they are not gone through
	}
	for p := range policies {
		spec := &security.AuthorizationPolicy{}
		action := pick(g, []string{"ALLOW", "ALLOW", "DENY", "DENY", "AUDIT", "CUSTOM"})
		spec.Action = security.AuthorizationPolicy_Action(security.AuthorizationPolicy_Action_value[action])
		custom := action == "CUSTOM"
		if custom {
			spec.ActionDetail = &security.AuthorizationPolicy_Provider{
				Provider: &security.AuthorizationPolicy_ExtensionProvider{Name: pick(g, []string{"ask", "ask", "ask", "other"})},
			}
		}
		dry := (action == "ALLOW" || action == "DENY") && g.IntN(6) == 0
		rules := 1 + g.IntN(2)
		if focus {
			rules = 1
		} else if action == "ALLOW" && g.IntN(12) == 0 {
			rules = 0
		}
		if !focus && g.IntN(60) == 0 {
			rules = 12 // so that the order of names is not that of numbers
		}
		for j := range rules {
			rule := &security.Rule{}
			set := func(i int, name string, list *[]string, all map[string][]string) {
				var kind string
				*list, kind = g.values(all)
				f := field{p, j, i, name}
				w.fields = append(w.fields, f)
				w.kinds[f] = name + " " + kind + " " + action
			}
			froms, tos := g.IntN(3), g.IntN(3)
			if focus {
				froms = g.IntN(2)
				tos = 1 - froms
			}
			for i := range froms {
				s := &security.Source{}
				for g.IntN(5) > 0 || proto.Size(s) == 0 {
					one := g.IntN(12)
					if custom { // it runs before anybody's identity is known
						one = g.IntN(4)
					}
					switch accounts := len(s.ServiceAccounts)+len(s.NotServiceAccounts) > 0; {
					case one == 0:
						set(i, "ipBlocks", &s.IpBlocks, ipValues)
					case one == 1:
						set(i, "not ipBlocks", &s.NotIpBlocks, ipValues)
					case one == 2:
						set(i, "remoteIpBlocks", &s.RemoteIpBlocks, ipValues)
					case one == 3:
						set(i, "not remoteIpBlocks", &s.NotRemoteIpBlocks, ipValues)
					case one == 4:
						set(i, "requestPrincipals", &s.RequestPrincipals, identityValues)
					case one == 5:
						set(i, "not requestPrincipals", &s.NotRequestPrincipals, identityValues)
					case one == 6:
						set(i, "trustDomains", &s.TrustDomains, domainValues)
					case one == 7:
						set(i, "not trustDomains", &s.NotTrustDomains, domainValues)
					case one == 8 && !accounts:
						set(i, "principals", &s.Principals, principalValues)
					case one == 9 && !accounts:
						set(i, "not principals", &s.NotPrincipals, principalValues)
					case one == 10 && !accounts:
						set(i, "namespaces", &s.Namespaces, namespaceValues)
					case one == 11 && !accounts:
						set(i, "not namespaces", &s.NotNamespaces, namespaceValues)
					}
					if !custom && len(s.Principals)+len(s.NotPrincipals)+len(s.Namespaces)+len(s.NotNamespaces) == 0 {
						switch g.IntN(6) {
						case 0:
							set(i, "serviceAccounts", &s.ServiceAccounts, accountValues)
						case 1:
							set(i, "not serviceAccounts", &s.NotServiceAccounts, accountValues)
						}
					}
					if g.IntN(2) == 0 {
						break
					}
				}
				rule.From = append(rule.From, &security.Rule_From{Source: s})
			}
			for i := range tos {
				o := &security.Operation{}
				for g.IntN(5) > 0 || proto.Size(o) == 0 {
					switch g.IntN(8) {
					case 0:
						set(i, "hosts", &o.Hosts, hostValues)
					case 1:
						set(i, "not hosts", &o.NotHosts, hostValues)
					case 2:
						set(i, "methods", &o.Methods, methodValues)
					case 3:
						set(i, "not methods", &o.NotMethods, methodValues)
					case 4:
						set(i, "paths", &o.Paths, toPathValues)
					case 5:
						set(i, "not paths", &o.NotPaths, toPathValues)
					case 6:
						set(i, "ports", &o.Ports, portValues)
					case 7:
						set(i, "not ports", &o.NotPorts, portValues)
					}
					if g.IntN(2) == 0 {
						break
					}
				}
				rule.To = append(rule.To, &security.Rule_To{Operation: o})
			}
			whens := max(0, g.IntN(5)-2)
			if froms+tos == 0 || focus && g.IntN(3) > 0 {
				whens = 1
				if focus {
					rule.From, rule.To = nil, nil
				}
			}
			for i := range whens {
				keys := slices.Sorted(maps.Keys(conditions))
				key := pick(g, keys)
				for custom && (strings.HasPrefix(key, "request.auth") || strings.HasPrefix(key, "source.") && key != "source.ip") {
					key = pick(g, keys)
				}
				c := &security.Condition{Key: key}
				if g.IntN(2) == 0 {
					set(i, "when "+key, &c.Values, conditions[key])
				}
				if len(c.Values) == 0 || g.IntN(3) == 0 {
					set(i, "not when "+key, &c.NotValues, conditions[key])
				}
				rule.When = append(rule.When, c)
			}
			spec.Rules = append(spec.Rules, rule)
		}
		n := naivePolicy{pick(g, []string{"one", "one", "one", "two", "root"}), fmt.Sprintf("p%d", policies-p), dry, spec}
		if focus {
			n.namespace = "one"
		} else if g.IntN(3) == 0 {
			spec.Selector = &typev1beta1.WorkloadSelector{MatchLabels: map[string]string{"app": pick(g, []string{"web", "db"})}}
		}
		w.policies = append(w.policies, n)
		w.document("AuthorizationPolicy", n.namespace, n.name, 0, spec, dry)
	}
	if focus || g.IntN(3) > 0 {
		return w
	}
	modes := []security.PeerAuthentication_MutualTLS_Mode{0, 1, 2, 3, 3}
	for i := range 1 + g.IntN(5) {
		p := naivePeer{pick(g, []string{"one", "one", "two", "root"}), fmt.Sprintf("q%d", 9-i), int64(g.IntN(2)), &security.PeerAuthentication{}}
		if g.IntN(3) > 0 {
			p.Mtls = &security.PeerAuthentication_MutualTLS{Mode: pick(g, modes)}
		}
		if g.IntN(2) == 0 {
			p.Selector = &typev1beta1.WorkloadSelector{MatchLabels: map[string]string{"app": "web"}}
			for range g.IntN(3) {
				if p.PortLevelMtls == nil {
					p.PortLevelMtls = map[uint32]*security.PeerAuthentication_MutualTLS{}
				}
				p.PortLevelMtls[uint32(pick(g, somePorts))] = &security.PeerAuthentication_MutualTLS{Mode: pick(g, modes)}
			}
		}
		w.peer = append(w.peer, p)
		w.document("PeerAuthentication", p.namespace, p.name, p.created, p.PeerAuthentication, false)
	}
	return w
}

func (w *world) document(kind, namespace, name string, created int64, spec proto.Message, dry bool) {
	j, err := protojson.Marshal(spec)
	if err != nil {
		panic(err)
	}
	w.yaml = fmt.Appendf(w.yaml, "---\napiVersion: security.istio.io/v1\nkind: %s\nmetadata: {name: %s, namespace: %s, creationTimestamp: %q%s}\nspec: %s\n",
		kind, name, namespace, time.Unix(created, 0).UTC().Format(time.RFC3339), map[bool]string{true: `, annotations: {istio.io/dry-run: "true"}`}[dry], j)
}

// What claims and metadata hold. Requests share these values: nothing may change
// them, and building them anew was a third of the cost of a million pairs.
var (
	someValues   = values("a", "b", "ab", "s", "", nil, true, 1.5, []any{"a", "x"}, []any{"b", 1.0}, []any{}, map[string]any{"a": "a"}, map[string]any{"a": []any{"b"}})
	someIssuers  = values("https://i", "i", "https://i", "x", "i", "")
	someSubjects = values("s", "s", "as", "", "t", []any{"s"})
)

func values(all ...any) (list []*structpb.Value) {
	for _, v := range all {
		value, err := structpb.NewValue(v)
		if err != nil {
			panic(err) // a mistake in the lists above
		}
		list = append(list, value)
	}
	return list
}

func (g generator) request() authz.Request {
	r := authz.Request{
		Known: authz.FieldsHTTP, HTTP: g.IntN(8) > 0,
		Method: []byte(pick(g, someMethods)), Path: []byte(pick(g, somePaths)), Host: []byte(pick(g, someHosts)),
		DestinationPort: pick(g, somePorts), SourceIP: netip.MustParseAddr(pick(g, someIPs)),
	}
	if g.IntN(4) > 0 {
		r.Authenticated = true
		r.Principal = []byte(pick(g, someNames))
		for g.IntN(6) == 0 {
			r.OtherNames = append(r.OtherNames, []byte(pick(g, someNames)))
		}
	}
	r.DestinationIP = netip.MustParseAddr(pick(g, someIPs))
	r.RemoteIP = netip.MustParseAddr(pick(g, someIPs))
	if g.IntN(2) == 0 {
		r.Known &^= authz.FieldRemoteIP
	}
	r.SNI = []byte(pick(g, []string{"a.example", "A.EXAMPLE", "b.example", ""}))
	for range g.IntN(4) {
		r.Headers = append(r.Headers, authz.Header{
			Name: pick(g, []string{"x-a", "x-a", "x-forwarded-for", "x-b"}), Form: pick(g, []authz.HeaderForm{0, 0, 0, 0, authz.HeaderJoined, authz.HeaderUnclear}),
			Value: []byte(pick(g, []string{"a", "b", "a,b", "b,a", "a,a", "", "10.0.0.1", "192.0.2.9, 10.0.0.1", "10.0.0.1,", "::ffff:10.0.0.1", "x", "b,x,a"})),
		})
	}
	if g.IntN(3) > 0 {
		value := func() *structpb.Value { return pick(g, someValues) }
		claims := map[string]*structpb.Value{"aud": value(), "azp": value(), "nested": value(), "list": value()}
		if g.IntN(6) > 0 {
			claims["iss"] = pick(g, someIssuers)
			claims["sub"] = pick(g, someSubjects)
		}
		r.Claims = &structpb.Struct{Fields: claims}
		if g.IntN(2) == 0 {
			r.Metadata = map[string]*structpb.Struct{"envoy.filters.network.x": {Fields: map[string]*structpb.Value{"a": value()}}}
		}
	}
	for _, absent := range []*[]byte{&r.Method, &r.Path, &r.Host} {
		if g.IntN(4) == 0 {
			*absent = nil
		}
	}
	if g.IntN(3) == 0 {
		for range 1 + g.IntN(3) {
			r.Known &^= 1 << g.IntN(13)
		}
	}
	return r
}

// FuzzParse holds that no text makes the package panic, that what cannot be
// enforced denies, and that a problem goes with it.
func FuzzParse(f *testing.F) {
	seeds, err := os.ReadDir("testdata/corpus")
	if err != nil {
		f.Fatal(err)
	}
	for _, e := range seeds {
		b, err := os.ReadFile("testdata/corpus/" + e.Name())
		if err != nil {
			f.Fatal(err)
		}
		_, text, _ := bytes.Cut(b, []byte("-- policy.yaml --\n"))
		text, _, _ = bytes.Cut(text, []byte("\n-- "))
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		rs, problems := authz.Parse("f.yaml", text)
		errors := 0
		for _, p := range problems {
			if p.Error() == "" || p.Line < 0 || p.Line > bytes.Count(text, []byte("\n"))+2 {
				t.Fatalf("problem %+v", p)
			}
			if p.Severity == authz.SeverityError {
				errors++
				if p.Fix == "" || p.Reason == "" || strings.ContainsAny(p.Error(), "\n\r\x00") {
					t.Fatalf("problem %+v", p)
				}
			}
		}
		bad := 0
		for _, r := range rs {
			if r.Reason() != "" {
				bad++
			}
		}
		if (bad > 0) != (errors > 0) {
			t.Fatalf("%d bad resources and %d errors", bad, errors)
		}
		set, _ := authz.Set{}.Update(rs)
		snapshot, _ := authz.Compile(set, authz.Options{})
		for r, state := range set.All() {
			w := identity.Workload{Namespace: r.Namespace()}
			req := authz.Request{Known: authz.FieldsHTTP, HTTP: true, Path: text, Principal: text, Authenticated: true}
			d := snapshot.For(w).Decide(&req)
			_ = d.Text()
			if state == authz.StateRefused && r.Kind() == "" && d.Allowed {
				t.Fatal("something is unreadable and everything is allowed")
			}
		}
		again, _ := set.Update(rs)
		if again.Len() != set.Len() {
			t.Fatalf("updating with the same resources went from %d to %d", set.Len(), again.Len())
		}
	})
}
