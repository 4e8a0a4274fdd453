package authz_test

import (
	"fmt"
	"net/netip"
	"runtime"
	"strings"
	"testing"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// shape is a kind of policies that an index could be bad at. rule is the rule of
// the i-th policy, request one that the rule of that policy matches.
type shape struct {
	rule    func(i int) string
	request func(i int, r *authz.Request)
}

func client(i int) string { return fmt.Sprintf("cluster.local/ns/ns-%d/sa/client-%d", i%100, i) }

// shapes are compared with the first, which is what meshes have.
var shapes = []struct {
	name string
	shape
}{
	{"a-principal-and-a-path", shape{
		func(i int) string {
			return fmt.Sprintf("{from: [{source: {principals: [%s]}}], to: [{operation: {methods: [GET, HEAD], paths: [/api/v1/things/%d/*]}}]}", client(i), i)
		},
		func(i int, r *authz.Request) { r.Path = fmt.Appendf(nil, "/api/v1/things/%d/x?y=z", i) },
	}},
	{"prefixes-of-one-stem", shape{
		func(i int) string {
			return fmt.Sprintf("{to: [{operation: {paths: [/api/v1/namespaces/default/things/%d/*]}}]}", i)
		},
		func(i int, r *authz.Request) { r.Path = fmt.Appendf(nil, "/api/v1/namespaces/default/things/%d/x", i) },
	}},
	{"prefixes-inside-each-other", shape{
		func(i int) string {
			return fmt.Sprintf("{from: [{source: {principals: [%s]}}], to: [{operation: {paths: [/%s*]}}]}", client(i%7), strings.Repeat("a", i%200))
		},
		func(i int, r *authz.Request) { r.Path = []byte("/" + strings.Repeat("a", 250)) },
	}},
	{"one-principal", shape{
		func(i int) string {
			return fmt.Sprintf("{from: [{source: {principals: [%s]}}], to: [{operation: {paths: [/things/%d]}}]}", client(0), i)
		},
		func(i int, r *authz.Request) { r.Path = fmt.Appendf(nil, "/things/%d", i) },
	}},
	{"a-grid-of-principals-and-paths", shape{
		func(i int) string {
			return fmt.Sprintf("{from: [{source: {principals: [%s]}}], to: [{operation: {paths: [/things/%d]}}]}", client(i%100), i/100)
		},
		func(i int, r *authz.Request) {
			r.Principal, r.Path = []byte("spiffe://"+client(i%100)), fmt.Appendf(nil, "/things/%d", i/100)
		},
	}},
	{"templates", shape{
		func(i int) string { return fmt.Sprintf(`{to: [{operation: {paths: ["/v1/{*}/things/%d/{**}"]}}]}`, i) },
		func(i int, r *authz.Request) { r.Path = fmt.Appendf(nil, "/v1/x/things/%d/y/z", i) },
	}},
	{"suffixes", shape{
		func(i int) string { return fmt.Sprintf(`{to: [{operation: {hosts: ["*.h%d.example"]}}]}`, i) },
		func(i int, r *authz.Request) { r.Host = fmt.Appendf(nil, "a.h%d.example", i) },
	}},
	{"accounts", shape{
		func(i int) string {
			return fmt.Sprintf("{from: [{source: {serviceAccounts: [ns-%d/client-%d]}}], to: [{operation: {methods: [GET]}}]}", i%100, i)
		},
		func(i int, r *authz.Request) {},
	}},
	{"blocks", shape{
		func(i int) string {
			return fmt.Sprintf("{from: [{source: {ipBlocks: [10.%d.%d.0/24]}}]}", i/250, i%250)
		},
		func(i int, r *authz.Request) {
			r.SourceIP = netip.AddrFrom4([4]byte{10, byte(i / 250), byte(i % 250), 9})
		},
	}},
	{"headers", shape{
		func(i int) string {
			return fmt.Sprintf(`{when: [{key: "request.headers[x-tenant]", values: [t%d]}]}`, i)
		},
		func(i int, r *authz.Request) {
			r.Headers = append(r.Headers, authz.Header{Name: "x-tenant", Value: fmt.Appendf(nil, "t%d", i)})
		},
	}},
	{"request-principals", shape{
		func(i int) string {
			return fmt.Sprintf("{from: [{source: {requestPrincipals: [https://issuer/u%d]}}]}", i)
		},
		func(i int, r *authz.Request) {
			r.Claims, _ = structpb.NewStruct(map[string]any{"iss": "https://issuer", "sub": fmt.Sprintf("u%d", i)})
		},
	}},
}

func (s shape) policies(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p%d, namespace: default}\nspec: {rules: [%s]}\n", i, s.rule(i))
	}
	return b.String()
}

func (s shape) requestOf(i int) authz.Request {
	r := authz.Request{
		Known: authz.FieldsHTTP &^ authz.FieldRemoteIP, HTTP: true, Authenticated: true, Principal: []byte("spiffe://" + client(i)),
		SourceIP: netip.MustParseAddr("192.0.2.1"), DestinationIP: netip.MustParseAddr("10.0.0.1"), DestinationPort: 8080,
		Method: []byte("GET"), Path: []byte("/"), Host: []byte("things.default.svc:8080"),
		Headers: []authz.Header{{Name: "user-agent", Value: []byte("x")}, {Name: "accept", Value: []byte("*/*")}},
	}
	s.request(i, &r)
	return r
}

// miss makes r one that no rule matches.
func miss(r authz.Request) authz.Request {
	r.Principal, r.Path, r.Host = []byte("spiffe://cluster.local/ns/x/sa/nobody"), []byte("/v1/x/nothing"), []byte("nothing")
	r.SourceIP, r.Headers, r.Claims = netip.MustParseAddr("192.0.2.1"), nil, nil
	return r
}

func BenchmarkDecideShapes(b *testing.B) {
	for _, s := range shapes {
		for _, n := range []int{100, 1000, 10_000} {
			p := compile(b, s.policies(n), authz.Options{}).For(identity.Workload{Namespace: "default"})
			hit := s.requestOf(n / 2)
			if s.name == "one-principal" {
				hit.Principal = []byte("spiffe://" + client(0))
			}
			if d := p.Decide(&hit); !d.Allowed && s.name != "prefixes-inside-each-other" {
				b.Fatalf("%s: %s", s.name, d.Text())
			}
			missed := miss(hit)
			for name, r := range map[string]*authz.Request{"hit": &hit, "miss": &missed} {
				b.Run(fmt.Sprintf("%s/policies=%d/%s", s.name, n, name), func(b *testing.B) {
					b.ReportAllocs()
					for b.Loop() {
						p.Decide(r)
					}
				})
			}
		}
	}
}

// BenchmarkDecideLarge is 100,000 policies of the first shape for one workload.
func BenchmarkDecideLarge(b *testing.B) {
	const n = 100_000
	s := shapes[0].shape
	p := snapshotOf(b, s.policies(n), n).For(identity.Workload{Namespace: "default"})
	hit := s.requestOf(n / 2)
	missed := miss(hit)
	for name, r := range map[string]*authz.Request{"hit": &hit, "miss": &missed} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				p.Decide(r)
			}
		})
	}
}

// resourcesOf parses policies in parts, because a text has a bound on documents.
func resourcesOf(t testing.TB, text string, n int) []authz.Resource {
	t.Helper()
	var all []authz.Resource
	docs := strings.SplitAfter(text, "\n---\n")
	for at := 0; at < len(docs); at += 10_000 {
		part := strings.Join(docs[at:min(at+10_000, len(docs))], "")
		rs, problems := authz.Parse(fmt.Sprintf("p%d.yaml", at), []byte(part))
		for _, p := range problems {
			if p.Severity == authz.SeverityError {
				t.Fatal(p)
			}
		}
		all = append(all, rs...)
	}
	if len(all) != n {
		t.Fatalf("%d resources, want %d", len(all), n)
	}
	return all
}

func snapshotOf(t testing.TB, text string, n int) *authz.Snapshot {
	t.Helper()
	set, _ := authz.Set{}.Update(resourcesOf(t, text, n))
	s, _ := authz.Compile(set, authz.Options{})
	return s
}

// BenchmarkOneChange is from one changed resource of 10,000 to the next decision:
// where all select the workload, and where each of 100 namespaces has its own.
func BenchmarkOneChange(b *testing.B) {
	const n = 10_000
	s := shapes[0].shape
	for name, namespaces := range map[string]int{"one-workload": 1, "100-namespaces": 100} {
		b.Run(name, func(b *testing.B) {
			var text strings.Builder
			for i, doc := range strings.Split(s.policies(n), "---\n")[1:] {
				text.WriteString("---\n" + strings.Replace(doc, "namespace: default", fmt.Sprintf("namespace: n%d", i%namespaces), 1))
			}
			rs := resourcesOf(b, text.String(), n)
			set, _ := authz.Set{}.Update(rs)
			snapshot, _ := authz.Compile(set, authz.Options{})
			w := identity.Workload{Namespace: "n0"}
			snapshot.For(w)
			changes := make([]authz.Resource, 2)
			for i := range changes {
				c, _ := authz.Parse("p0.yaml", fmt.Appendf(nil, "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p0, namespace: n0}\nspec: {rules: [{to: [{operation: {paths: [/%d]}}]}]}", i))
				changes[i] = c[0]
			}
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				rs[0] = changes[i%2]
				i++
				set, _ = set.Update(rs)
				snapshot, _ = snapshot.Update(set)
				r := authz.Request{Known: authz.FieldsHTTP, HTTP: true, Method: []byte("GET"), Path: []byte("/0")}
				if d := snapshot.For(w).Decide(&r); d.Allowed != (i%2 == 1) {
					b.Fatal(d.Text())
				}
			}
		})
	}
}

// BenchmarkMemory tells what a compiled policy takes, with its resource.
func BenchmarkMemory(b *testing.B) {
	const n = 10_000
	for _, s := range shapes[:1] {
		text := s.policies(n)
		for b.Loop() {
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			snapshot := snapshotOf(b, text, n)
			snapshot.For(identity.Workload{Namespace: "default"})
			runtime.GC()
			runtime.ReadMemStats(&after)
			b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/n, "bytes/policy")
			runtime.KeepAlive(snapshot)
		}
	}
}
