package authz_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// compile is the snapshot of a text that has no problems.
func compile(t testing.TB, text string, o authz.Options) *authz.Snapshot {
	t.Helper()
	rs, problems := authz.Parse("policy.yaml", []byte(text))
	set, more := authz.Set{}.Update(rs)
	for _, p := range append(problems, more...) {
		t.Fatal(p)
	}
	s, _ := authz.Compile(set, o)
	return s
}

func TestNothingDeniesUntilPoliciesAreLoaded(t *testing.T) {
	t.Parallel()
	r := authz.Request{Known: authz.FieldsHTTP, HTTP: true, Authenticated: true}
	var none *authz.Snapshot
	for name, p := range map[string]*authz.Program{
		"of no snapshot":     none.For(identity.Workload{Namespace: "default"}),
		"of a zero snapshot": new(authz.Snapshot).For(identity.Workload{Namespace: "default"}),
		"a zero program":     new(authz.Program),
	} {
		if d := p.Decide(&r); d.Allowed || d.Reason != authz.ReasonNoPolicies || d.Rule != -1 {
			t.Errorf("%s: %+v", name, d)
		}
		if m := p.PeerMode(80); m != authz.ModeStrict {
			t.Errorf("%s: mode %v", name, m)
		}
		for r := range p.Rules() {
			t.Errorf("%s: rule %+v", name, r)
		}
	}
	var d authz.Decision
	if d.Allowed || d.Text() != "denied: no decision was made" {
		t.Errorf("the zero decision: %q", d.Text())
	}
	var empty authz.Set
	s, _ := authz.Compile(empty, authz.Options{})
	if d := s.For(identity.Workload{}).Decide(&r); !d.Allowed {
		t.Errorf("an empty set is loaded and has no policies: %+v", d)
	}
}

const sharedYAML = `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: web, namespace: default}
spec: {selector: {matchLabels: {app: web}}, action: DENY, rules: [{to: [{operation: {paths: [/web]}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: v2, namespace: default}
spec: {selector: {matchLabels: {version: v2}}, action: DENY, rules: [{to: [{operation: {paths: [/v2]}}]}]}
`

func TestForSharesProgramsBetweenWorkloadsThatTheSamePoliciesSelect(t *testing.T) {
	t.Parallel()
	s := compile(t, sharedYAML, authz.Options{})
	of := func(ns string, kv ...string) *authz.Program {
		w := identity.Workload{Namespace: ns, Labels: map[string]string{}}
		for i := 0; i < len(kv); i += 2 {
			w.Labels[kv[i]] = kv[i+1]
		}
		return s.For(w)
	}
	if of("default", "app", "web", "pod", "1") != of("default", "app", "web", "pod", "2") {
		t.Error("labels that no selector reads make another program")
	}
	if of("default", "app", "db") != of("default", "app", "cache", "version", "v1") {
		t.Error("classes without policies have different programs")
	}
	if of("one") != of("two", "app", "web") {
		t.Error("namespaces without policies have different programs")
	}
	if of("default", "app", "web") == of("default", "app", "web", "version", "v2") {
		t.Error("workloads with different policies share a program")
	}
	if of("default", "app", "v2") == of("default", "version", "v2") {
		t.Error("a label was taken for another")
	}
	// "app=web" and an absent label, against values that run into each other.
	if of("default", "app", "web\x01v2") == of("default", "app", "web", "version", "v2\x00") {
		t.Error("labels that no pod can have ran into each other")
	}
	if of("default", "app", "webv2") == of("default", "app", "web", "version", "v2") {
		t.Error("labels ran into each other")
	}
}

func TestForStaysRightBeyondWhatItRemembers(t *testing.T) {
	t.Parallel()
	s := compile(t, sharedYAML, authz.Options{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range 10_000 {
				app := fmt.Sprint(i)
				want := "allow no-allow-policy"
				if i%100 == 0 {
					app, want = "web", "deny deny-rule default/web[0]"
				}
				p := s.For(identity.Workload{Namespace: "default", Labels: map[string]string{"app": app}})
				r := authz.Request{Known: authz.FieldsHTTP, HTTP: true, Path: []byte("/web")}
				if got := render(p.Decide(&r)); got != want {
					t.Errorf("app %s: %s, want %s", app, got, want)
					return
				}
			}
		})
	}
	wg.Wait()
}

const exportYAML = `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: b, namespace: default}
spec:
  rules:
  - from:
    - source: {principals: [cluster.local/ns/default/sa/a]}
  - to:
    - operation: {methods: [GET]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: empty, namespace: default}
spec: {}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: c, namespace: default}
spec:
  action: DENY
  rules: [{}]
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: w, namespace: default}
spec: {selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}, portLevelMtls: {80: {mode: DISABLE}}}
`

func TestRulesListWhatAProgramEnforces(t *testing.T) {
	t.Parallel()
	const more = `---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: r, namespace: default}
spec: {selector: {}, jwtRules: [{}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: ask, namespace: default}
spec: {action: CUSTOM, provider: {name: opa}, rules: [{}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: watch, namespace: default}
spec: {action: AUDIT, rules: [{}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: a-dry, namespace: default, annotations: {istio.io/dry-run: "true"}}
spec: {action: DENY, rules: [{}]}
`
	rs, _ := authz.Parse("p", []byte(exportYAML+more))
	set, _ := authz.Set{}.Update(rs)
	s, _ := authz.Compile(set, authz.Options{TrustDomainAliases: []string{"old.td"}})
	var got []string
	for r := range s.For(identity.Workload{Namespace: "default", Labels: map[string]string{"app": "web"}}).Rules() {
		line := fmt.Sprintf("%s %s/%s[%d] %s %s:%d %s", r.Kind, r.Namespace, r.Name, r.Index, r.Action, r.Origin, r.Line, r.Reason)
		if r.DryRun {
			line += "dry run"
		}
		line += r.Provider
		for _, f := range r.Spec.GetFrom() {
			line += fmt.Sprint(f.GetSource().GetPrincipals())
		}
		for _, t := range r.Spec.GetTo() {
			line += fmt.Sprint(t.GetOperation().GetMethods())
		}
		if (r.Spec == nil) != (r.Index < 0) {
			t.Errorf("%s has the specification %v", line, r.Spec)
		}
		got = append(got, line)
	}
	want := []string{
		"RequestAuthentication default/r[-1] DENY p:29 invalid",
		"AuthorizationPolicy default/ask[0] CUSTOM p:37 opa",
		"AuthorizationPolicy default/watch[0] AUDIT p:42 ",
		"AuthorizationPolicy default/c[0] DENY p:22 ",
		"AuthorizationPolicy default/a-dry[0] DENY p:47 dry run",
		"AuthorizationPolicy default/b[0] ALLOW p:7 [cluster.local/ns/default/sa/a old.td/ns/default/sa/a]",
		"AuthorizationPolicy default/b[1] ALLOW p:9 [GET]",
		"AuthorizationPolicy default/empty[-1] ALLOW p:12 ",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("rules (-want +got):\n%s", d)
	}
	for range s.For(identity.Workload{Namespace: "default"}).Rules() {
		break // stopping early is fine
	}
}

// TestAsEnvoyVersion is what versions of Envoy differ in.
func TestAsEnvoyVersion(t *testing.T) {
	t.Parallel()
	const text = `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: default}
spec:
  rules:
  - to: [{operation: {paths: ["/t/{*}"]}}]
  - when: [{key: "request.headers[x]", values: [b]}]
  - when: [{key: "request.headers[x]", values: ["a,b"]}]
`
	for _, c := range []struct{ version, request, want string }{
		{"", "GET /t/a*", "allow allow-rule default/p[0]"},
		{"1.34.1", "GET /t/a*", "allow allow-rule default/p[0]"},
		{"1.34", "GET /t/a*", "deny no-allow-rule"},
		{"1.33.3", "GET /t/a*", "allow allow-rule default/p[0]"},
		{"1.33.2", "GET /t/a*", "deny no-allow-rule"},
		{"1.30.9", "GET /t/a*", "deny no-allow-rule"},
		{"1.40.0", "GET / header=x:a header=x:b", "allow allow-rule default/p[1]"},
		{"1.37.0", "GET / header=x:a header=x:b", "allow allow-rule default/p[2]"},
		{"1.37.0", "GET / joined=x:a,b", "allow allow-rule default/p[2]"},
		{"1.37.0", "GET / header=x:b", "allow allow-rule default/p[1]"},
		{"1.37.0", "GET / header=x:a header=x:b header=x:c", "deny no-allow-rule"},
		{"1.37.0", "GET / unclear=x:a", "deny allow-unknown default/p[1]"},
		{"1.37.0", "GET / unknown=headers", "deny allow-unknown default/p[1]"},
		{"1.36.5", "GET / header=x:a header=x:b", "allow allow-rule default/p[1]"},
		{"1.36.4", "GET / header=x:a header=x:b", "allow allow-rule default/p[2]"},
	} {
		var o authz.Options
		if c.version != "" {
			var err error
			if o.Envoy, err = authz.ParseEnvoyVersion(c.version); err != nil {
				t.Fatal(err)
			}
		}
		r := parseRequest(t, c.request)
		if got := render(compile(t, text, o).For(identity.Workload{Namespace: "default"}).Decide(&r)); got != c.want {
			t.Errorf("as %s: %s: got %s, want %s", c.version, c.request, got, c.want)
		}
	}
	for _, bad := range []string{"1", "v1.40.0", "1.40.0-dev", "1..0", "1.2.3.4", "-1.2", ""} {
		if v, err := authz.ParseEnvoyVersion(bad); err == nil {
			t.Errorf("%q was read as %v", bad, v)
		}
	}
}

// TestAfterAsking goes on once a provider has allowed: to the next one, and then
// to what other policies say.
func TestAfterAsking(t *testing.T) {
	t.Parallel()
	const text = `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: a, namespace: default}
spec: {action: CUSTOM, provider: {name: second}, rules: [{}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: b, namespace: default}
spec: {action: CUSTOM, provider: {name: first}, rules: [{to: [{operation: {methods: [GET]}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: c, namespace: default}
spec: {action: DENY, rules: [{to: [{operation: {paths: [/x]}}]}]}
`
	p := compile(t, text, authz.Options{MultipleProviders: true}).For(identity.Workload{Namespace: "default"})
	for request, want := range map[string][]string{
		"GET /":   {"ask ask-rule default/b[0] first", "ask ask-rule default/a[0] second", "allow no-allow-policy"},
		"POST /":  {"ask ask-rule default/a[0] second", "allow no-allow-policy"},
		"POST /x": {"ask ask-rule default/a[0] second", "deny deny-rule default/c[0]"},
	} {
		r := parseRequest(t, request)
		d := p.Decide(&r)
		var got []string
		for ; d.Ask; d = p.After(d, &r) {
			if d.Allowed {
				t.Errorf("%s: allowed before %s was asked", request, d.Provider)
			}
			got = append(got, render(d))
		}
		got = append(got, render(d))
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", request, diff)
		}
		if again := p.After(d, &r); again != d {
			t.Errorf("%s: after a decision that asks nobody comes %s", request, render(again))
		}
		// Who asks before tokens are looked at asks the same ones, and then has decided nothing.
		asked := []string{}
		for d = p.Custom(&r); d.Ask; d = p.CustomAfter(d, &r) {
			if asked = append(asked, render(d)); len(asked) > len(want) {
				break
			}
		}
		if diff := cmp.Diff(want[:len(want)-1], asked); diff != "" || d != (authz.Decision{}) {
			t.Errorf("%s: before tokens (-want +got), ends with %+v:\n%s", request, d, diff)
		}
	}
}

func TestPeerMode(t *testing.T) {
	t.Parallel()
	s := compile(t, exportYAML, authz.Options{})
	p := s.For(identity.Workload{Namespace: "default", Labels: map[string]string{"app": "web"}})
	q := s.For(identity.Workload{Namespace: "default"})
	got := fmt.Sprint(p.PeerMode(80), p.PeerMode(81), q.PeerMode(80))
	if want := "DISABLE STRICT PERMISSIVE"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestTextSaysWhyInOneSentence(t *testing.T) {
	t.Parallel()
	text := func(spec, request string) string {
		rs, _ := authz.Parse("p.yaml", []byte(policyYAML("p", spec)+"---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: strict}\nspec: {mtls: {mode: STRICT}}\n"))
		set, _ := authz.Set{}.Update(rs)
		s, _ := authz.Compile(set, authz.Options{})
		r := parseRequest(t, request)
		return s.For(identity.Workload{Namespace: "default"}).Decide(&r).Text()
	}
	const from = "from=cluster.local/ns/default/sa/a"
	long := "{rules: [{to: [{operation: {paths: [" + strings.Repeat("/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa,", 300) + "]}}]}]}"
	for _, c := range []struct{ spec, request, want string }{
		{denyGet, "GET / " + from, `denied by AuthorizationPolicy default/p rule 0: methods "GET" (p.yaml:5)`},
		{denyGet, "POST / " + from, "allowed: no DENY rule matches and no ALLOW policy selects the workload"},
		{denyGet, "GET / unknown=method " + from, `denied by AuthorizationPolicy default/p rule 0: it may match, but the proxy did not send all that it reads: methods "GET" (p.yaml:5)`},
		{denyGet, "GET /", "denied by PeerAuthentication default/strict: the port takes mutual TLS only and the peer has no certificate"},
		{denyGet, "GET / unknown=peer", "denied by PeerAuthentication default/strict: the port may take mutual TLS only and the peer may have no certificate; the proxy did not say"},
		{"{rules: [{}]}", "GET / " + from, "allowed by AuthorizationPolicy default/p rule 0: it matches every request (p.yaml:5)"},
		{"{}", "GET / " + from, "denied: ALLOW policies select the workload and no rule of them matches"},
		{`{rules: [{from: [{source: {principals: ["*"], notNamespaces: [a, b]}}, {source: {ipBlocks: [10.0.0.0/8]}}], to: [{operation: {paths: [/a, /b, /c, /d, /e], notPorts: ["1"]}}, {operation: {hosts: ["a\nb"]}}]}]}`,
			"GET /a " + from, `allowed by AuthorizationPolicy default/p rule 0: principals "*" and notNamespaces "a" "b" or ipBlocks "10.0.0.0/8"; notPorts "1" and paths "/a" "/b" "/c" and 2 more or hosts "a\nb" (p.yaml:5)`},
		{"{rules: [{to: [{operation: {methods: [GET]}}]}]}", "GET / unknown=method " + from, `denied by AuthorizationPolicy default/p rule 0: no rule certainly matches; this one may, but the proxy did not send all that it reads: methods "GET" (p.yaml:5)`},
		{invalidSpec, "GET / " + from, "denied by AuthorizationPolicy default/p: the policy is invalid and selects the workload: p.yaml:2: spec.rules: a DENY policy without rules never matches"},
		{"{}\n" + broken, "GET /", "denied: a document that may be a policy is unreadable: p.yaml:6: document cannot be read: did not find expected ',' or ']'"},
		{long, "GET / " + from, "denied: ALLOW policies select the workload and no rule of them matches"},
	} {
		if got := text(c.spec, c.request); got != c.want {
			t.Errorf("%s on %s:\n got %s\nwant %s", c.request, c.spec, got, c.want)
		}
	}
	if got := text(long, "GET /aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa "+from); len(got) > 1000 {
		t.Errorf("a text of %d bytes", len(got))
	}
}

// ladder is n policies in the namespace default, each about one principal, one
// path and one method; every tenth denies.
func ladder(n int) string {
	var b strings.Builder
	for i := range n {
		action := "ALLOW"
		if i%10 == 9 {
			action = "DENY"
		}
		fmt.Fprintf(&b, `---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p%d, namespace: default}
spec:
  action: %s
  rules:
  - from: [{source: {principals: [cluster.local/ns/default/sa/client-%d]}}]
    to: [{operation: {methods: [GET, HEAD], paths: [/api/v1/things/%d/*]}}]
`, i, action, i, i)
	}
	return b.String()
}

// ladderRequests are a hit in the middle, a miss, and a plaintext request.
func ladderRequests(n int) map[string]authz.Request {
	request := func(client, path string) authz.Request {
		return authz.Request{
			Known: authz.FieldsHTTP, HTTP: true, Authenticated: client != "", Principal: []byte("spiffe://cluster.local/ns/default/sa/" + client),
			SourceIP: netip.MustParseAddr("10.0.0.1"), DestinationPort: 8080,
			Method: []byte("GET"), Path: []byte(path), Host: []byte("things.default.svc:8080"),
		}
	}
	return map[string]authz.Request{
		"hit":       request(fmt.Sprintf("client-%d", n/2), fmt.Sprintf("/api/v1/things/%d/x?y=z", n/2)),
		"miss":      request("client-0", "/api/v1/other"),
		"plaintext": request("", "/api/v1/other"),
	}
}

func TestDecideDoesNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Log("the race detector allocates; the numbers are the program's only without it")
		return
	}
	s := compile(t, ladder(50)+"---"+exportYAML, authz.Options{})
	w := identity.Workload{Namespace: "default", Labels: map[string]string{"app": "db"}}
	p := s.For(w)
	for name, r := range ladderRequests(50) {
		r.OtherNames = [][]byte{[]byte("spiffe://td/ns/ns/x/y")}
		for _, known := range []authz.Field{authz.FieldsHTTP, authz.FieldsTCP, 0} {
			r.Known = known
			if n := testing.AllocsPerRun(100, func() { p.Decide(&r) }); n != 0 {
				t.Errorf("%s with %b known: %v allocations", name, known, n)
			}
		}
	}
	if n := testing.AllocsPerRun(100, func() { s.For(w) }); n != 0 {
		t.Errorf("For: %v allocations", n)
	}
}

func BenchmarkDecide(b *testing.B) {
	for _, n := range []int{10, 100, 1000, 10_000} {
		s := compile(b, ladder(n), authz.Options{})
		p := s.For(identity.Workload{Namespace: "default"})
		for _, name := range []string{"hit", "miss", "plaintext"} {
			r := ladderRequests(n)[name]
			b.Run(fmt.Sprintf("policies=%d/%s", n, name), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					p.Decide(&r)
				}
			})
		}
	}
}

func BenchmarkFor(b *testing.B) {
	s := compile(b, ladder(1000), authz.Options{})
	w := identity.Workload{Namespace: "default", Labels: map[string]string{"app": "web"}}
	b.ReportAllocs()
	for b.Loop() {
		s.For(w)
	}
}

func BenchmarkParse(b *testing.B) {
	text := []byte(ladder(1000))
	b.ReportAllocs()
	for b.Loop() {
		authz.Parse("p", text)
	}
}

func BenchmarkCompile(b *testing.B) {
	rs, _ := authz.Parse("p", []byte(ladder(10_000)))
	set, _ := authz.Set{}.Update(rs)
	b.ReportAllocs()
	for b.Loop() {
		s, _ := authz.Compile(set, authz.Options{})
		s.For(identity.Workload{Namespace: "default"})
	}
}

func Example() {
	resources, problems := authz.Parse("policies.yaml", []byte(`
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny-admin, namespace: default}
spec:
  action: DENY
  rules:
  - from: [{source: {notPrincipals: [cluster.local/ns/default/sa/admin]}}]
    to: [{operation: {paths: [/admin*]}}]
`))
	set, more := authz.Set{}.Update(resources)
	snapshot, warnings := authz.Compile(set, authz.Options{})
	fmt.Println(len(problems) + len(more) + len(warnings))

	program := snapshot.For(identity.Workload{Namespace: "default"})
	decision := program.Decide(&authz.Request{
		Known: authz.FieldsHTTP, HTTP: true, Method: []byte("GET"), Path: []byte("/admin?all"), Host: []byte("shop"),
	})
	fmt.Println(decision.Allowed, decision.Policy, decision.Rule, decision.Reason)
	fmt.Println(decision.Text())
	// Output:
	// 0
	// false default/deny-admin 0 deny-rule
	// denied by AuthorizationPolicy default/deny-admin rule 0: notPrincipals "cluster.local/ns/default/sa/admin"; paths "/admin*" (policies.yaml:8)
}

// TestDecideDoesNotAllocateForAnyPolicy goes through the language at random.
func TestDecideDoesNotAllocateForAnyPolicy(t *testing.T) {
	if raceEnabled {
		t.Log("the race detector allocates; the numbers are the program's only without it")
		return
	}
	seed := seeded(t)
	g := generator{rand.New(rand.NewPCG(seed, 3))}
	for range 150 {
		w := g.world()
		rs, _ := authz.Parse("w.yaml", w.yaml)
		set, _ := authz.Set{}.Update(rs)
		s, _ := authz.Compile(set, authz.Options{RootNamespace: "root"})
		p := s.For(identity.Workload{Namespace: "one", Labels: map[string]string{"app": "web"}})
		for range 6 {
			r := g.request()
			if n := testing.AllocsPerRun(3, func() { p.Decide(&r) }); n != 0 {
				t.Fatalf("seed %d: %v allocations for %+v\n%s", seed, n, r, w.yaml)
			}
		}
	}
}
