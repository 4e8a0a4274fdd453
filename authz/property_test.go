package authz_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
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
	portValues   = map[string][]string{"exact": {"80", "8080", "0443"}}

	someNames = []string{
		"spiffe://own.td/ns/a/sa/x", "spiffe://own.td/ns/b/sa/y", "spiffe://old.td/ns/a/sa/y", "spiffe://old.td/ns/a/sa/x", "spiffe://far.td/ns/a/sa/x",
		"spiffe://cluster.local/ns/a/sa/x", "spiffe://own.td/ns/ab/sa/x", "spiffe://own.td/ns/ns/a/ns/b/x", "spiffe://own.td/ns/a", "spiffe://x", "spiffe://a*b",
		"dns.example", "CN=/ns/a/x", "", "spiffe://own.td/ns/a/\xff/sa/x", "spiffe://own.td/ns/a\n/sa/x*", "own.td/ns/a/sa/x", "spiffe://own.td/ns//a/sa/y",
	}
	someHosts   = []string{"a.example", "A.EXAMPLE", "a.example:80", "b.example", "x", ""}
	someMethods = []string{"GET", "get", "POST", "PUT", "PST", ""}
	somePaths   = []string{"/a", "/a/", "/a/b", "/a?x=/b", "/a/b#y", "/A", "/", "?", "x.php", "/a/b", "/x/b?q", "/xa*", "/a\xff", "", "/a\nb", "*"}
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
	for _, k := range []string{"exact", "prefix", "suffix", "presence", "middle", "block"} {
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
	return list, kind
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
	}
	for p := range policies {
		spec := &security.AuthorizationPolicy{}
		action := "ALLOW"
		if g.IntN(2) == 0 {
			spec.Action, action = security.AuthorizationPolicy_DENY, "DENY"
		}
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
					switch g.IntN(6) {
					case 0:
						set(i, "principals", &s.Principals, principalValues)
					case 1:
						set(i, "not principals", &s.NotPrincipals, principalValues)
					case 2:
						set(i, "namespaces", &s.Namespaces, namespaceValues)
					case 3:
						set(i, "not namespaces", &s.NotNamespaces, namespaceValues)
					case 4:
						set(i, "ipBlocks", &s.IpBlocks, ipValues)
					case 5:
						set(i, "not ipBlocks", &s.NotIpBlocks, ipValues)
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
						set(i, "paths", &o.Paths, pathValues)
					case 5:
						set(i, "not paths", &o.NotPaths, pathValues)
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
			spec.Rules = append(spec.Rules, rule)
		}
		n := naivePolicy{pick(g, []string{"one", "one", "one", "two", "root"}), fmt.Sprintf("p%d", policies-p), spec}
		if focus {
			n.namespace = "one"
		} else if g.IntN(3) == 0 {
			spec.Selector = &typev1beta1.WorkloadSelector{MatchLabels: map[string]string{"app": pick(g, []string{"web", "db"})}}
		}
		w.policies = append(w.policies, n)
		w.document("AuthorizationPolicy", n.namespace, n.name, 0, spec)
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
		w.document("PeerAuthentication", p.namespace, p.name, p.created, p.PeerAuthentication)
	}
	return w
}

func (w *world) document(kind, namespace, name string, created int64, spec proto.Message) {
	j, err := protojson.Marshal(spec)
	if err != nil {
		panic(err)
	}
	w.yaml = fmt.Appendf(w.yaml, "---\napiVersion: security.istio.io/v1\nkind: %s\nmetadata: {name: %s, namespace: %s, creationTimestamp: %q}\nspec: %s\n",
		kind, name, namespace, time.Unix(created, 0).UTC().Format(time.RFC3339), j)
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
	for _, absent := range []*[]byte{&r.Method, &r.Path, &r.Host} {
		if g.IntN(4) == 0 {
			*absent = nil
		}
	}
	if g.IntN(3) == 0 {
		for range 1 + g.IntN(3) {
			r.Known &^= 1 << g.IntN(7)
		}
	}
	return r
}

// TestDecideAgreesWithTheNaiveEvaluator goes the whole way from text to
// decision, for random policies and requests, and counts how often each field
// in each kind of match and action decides: that is, inverting what it says
// changes the answer.
func TestDecideAgreesWithTheNaiveEvaluator(t *testing.T) {
	t.Parallel()
	worlds, each := 2000, 100
	if testing.Short() || raceEnabled {
		worlds = 200
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	g := generator{rand.New(rand.NewPCG(seed, 1))}
	opts := authz.Options{TrustDomain: spiffeid.RequireTrustDomainFromString("own.td"), TrustDomainAliases: []string{"old.td"}, RootNamespace: "root"}
	type count struct{ pairs, decides, trueDecides, unknown int }
	counts := map[string]*count{}
	pairs := 0
	for range worlds {
		w := g.world()
		rs, problems := authz.Parse("w.yaml", w.yaml)
		if len(problems) > 0 {
			t.Fatalf("%v in\n%s", problems[0], w.yaml)
		}
		set, problems := authz.Set{}.Update(rs)
		if len(problems) > 0 {
			t.Fatalf("%v in\n%s", problems[0], w.yaml)
		}
		snapshot, _ := authz.Compile(set, opts)
		for range each {
			r := g.request()
			who := identity.Workload{Namespace: pick(g, []string{"one", "one", "two", "root", "none"}), Labels: map[string]string{"app": pick(g, []string{"web", "web", "db", "x"})}}
			d := snapshot.For(who).Decide(&r)
			got := render(d)
			if d.Kind == authz.KindPeerAuthentication {
				got = "deny peer"
			}
			want := w.decide(who.Namespace, who.Labels, &r, nil)
			if got != want {
				t.Fatalf("seed %d: got %q, want %q\nworkload %s %v\nrequest %+v\nmethod %q path %q host %q principal %q %q\n%s", seed, got, want,
					who.Namespace, who.Labels, r, r.Method, r.Path, r.Host, r.Principal, r.OtherNames, w.yaml)
			}
			pairs++
			if len(w.fields) == 0 {
				continue
			}
			f := pick(g, w.fields)
			c := counts[w.kinds[f]]
			if c == nil {
				c = &count{}
				counts[w.kinds[f]] = c
			}
			c.pairs++
			if w.decide(who.Namespace, who.Labels, &r, &f)[:4] != want[:4] {
				c.decides++
				// Inverting takes a match away if it opens a DENY or closes an ALLOW.
				if (want[:4] == "deny") == strings.HasSuffix(w.kinds[f], "DENY") {
					c.trueDecides++
				}
			}
			if r.Known != authz.FieldsHTTP {
				c.unknown++
			}
		}
	}
	t.Logf("%d pairs", pairs)
	if worlds < 2000 {
		return // too few to count
	}
	// 2 actions, positive and not: 4 kinds of principals, hosts, methods and
	// paths, 5 of namespaces, 2 of ipBlocks, 1 of ports.
	if cells := 2 * 2 * (4*4 + 5 + 2 + 1); len(counts) != cells {
		t.Errorf("%d cells of field, match and action were met, want %d", len(counts), cells)
	}
	for _, cell := range sortedCells(counts) {
		c := counts[cell]
		t.Logf("%-32s %6d pairs, true and decides in %4.1f%%, false and decides in %4.1f%%, something unknown in %4.1f%%", cell, c.pairs,
			100*float64(c.trueDecides)/float64(c.pairs), 100*float64(c.decides-c.trueDecides)/float64(c.pairs), 100*float64(c.unknown)/float64(c.pairs))
		if c.trueDecides < 5 || c.decides-c.trueDecides < 5 {
			t.Errorf("%s: true and decides in %d of %d pairs, false and decides in %d: too few to tell anything", cell, c.trueDecides, c.pairs, c.decides-c.trueDecides)
		}
	}
}

func sortedCells[V any](m map[string]V) []string {
	var cells []string
	for c := range m {
		i := 0
		for i < len(cells) && cells[i] < c {
			i++
		}
		cells = append(cells[:i], append([]string{c}, cells[i:]...)...)
	}
	return cells
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
