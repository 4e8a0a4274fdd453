package explain_test

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/explain"
	"github.com/signet-mesh/signet/identity"
)

// TestTraceAddsUp holds that what an explanation says of each rule, each by itself,
// comes to the decision that was made, and that what it says of each field comes to
// what it says of the rule.
func TestTraceAddsUp(t *testing.T) {
	g := generator{rand.New(rand.NewPCG(6, 1))}
	decided := map[string]int{}
	for range 120 {
		w := g.world(t)
		c := explain.Case{Set: w.set, Snapshot: w.snapshot, Workload: workload, Request: g.request()}
		e := explain.Explain(c)
		stages := map[string]explain.Stage{}
		seen := 0
		for _, s := range e.Stages {
			stages[s.Name] = s
			seen += len(s.Policies)
		}
		if seen != w.set.Len() {
			t.Fatalf("%d of %d resources were considered", seen, w.set.Len())
		}
		// worst is the most that a rule of the stage says.
		worst := func(stage string) (truth string, policies int) {
			truth = "no"
			for _, p := range stages[stage].Policies {
				if !p.Selected || p.DryRun {
					continue
				}
				policies++
				for _, r := range p.Rules {
					addsUp(t, &c, p, r)
					if r.Matches == "yes" || r.Matches == "unknown" && truth == "no" {
						truth = r.Matches
					}
				}
			}
			return truth, policies
		}
		custom, _ := worst("CUSTOM")
		deny, _ := worst("DENY")
		allow, allowing := worst("ALLOW")
		d := c.Snapshot.For(c.Workload).Decide(&c.Request)
		var want authz.Reason
		switch {
		case d.Reason == authz.ReasonInvalid:
			for _, p := range stages["policies that cannot be enforced"].Policies {
				if p.Selected {
					want = authz.ReasonInvalid
				}
			}
		case strings.HasPrefix(string(d.Reason), "plaintext"):
			want = d.Reason // PeerAuthentication is told of by mode
		case custom != "no" && d.Reason == authz.ReasonProviders:
			want = authz.ReasonProviders
		case custom != "no":
			want = map[string]authz.Reason{"yes": authz.ReasonAskRule, "unknown": authz.ReasonAskUnknown}[custom]
		case strings.HasPrefix(string(d.Reason), "token"):
			for _, p := range stages[authz.KindRequestAuthentication].Policies {
				for _, r := range p.Rules {
					if r.Matches != "yes" {
						want = d.Reason
					}
				}
			}
		case deny != "no":
			want = map[string]authz.Reason{"yes": authz.ReasonDenyRule, "unknown": authz.ReasonDenyUnknown}[deny]
		case allowing == 0:
			want = authz.ReasonNoAllowPolicy
		default:
			want = map[string]authz.Reason{"yes": authz.ReasonAllowRule, "unknown": authz.ReasonAllowUnknown, "no": authz.ReasonNoAllowRule}[allow]
		}
		if want != d.Reason {
			t.Fatalf("decided for %s, and the trace says %s\n%+v\n%s", d.Reason, want, c.Request, w.text)
		}
		decided[string(d.Reason)]++
	}
	t.Log(decided)
}

// addsUp holds what is said of a rule's fields against what is said of the rule.
func addsUp(t *testing.T, c *explain.Case, p explain.Policy, r explain.Rule) {
	t.Helper()
	if r.Index < 0 || !c.Request.HTTP { // what a bare connection has not is left out
		return
	}
	value := map[string]int{"no": 0, "unknown": 1, "yes": 2}
	from, to, when := map[string]int{}, map[string]int{}, 2
	for _, f := range r.Clauses {
		entry, _, _ := strings.Cut(f.Field, "]")
		holds := value[f.Holds]
		switch entry[:3] {
		case "fro":
			if v, ok := from[entry]; !ok || holds < v {
				from[entry] = holds
			}
		case "to[":
			if v, ok := to[entry]; !ok || holds < v {
				to[entry] = holds
			}
		default:
			when = min(when, holds)
		}
	}
	best := func(m map[string]int) int {
		if len(m) == 0 {
			return 2
		}
		b := 0
		for _, v := range m {
			b = max(b, v)
		}
		return b
	}
	if got := min(when, best(from), best(to)); got != value[r.Matches] {
		t.Fatalf("%s rule %d: matches %s, and its fields come to %d: %+v", p.Policy, r.Index, r.Matches, got, r.Clauses)
	}
}

// TestProvidersAreExplainedOneAfterTheOther: a CUSTOM rule is held against the request
// as its provider is asked about it, behind the changes of those before, and what has
// not answered yet is what decides.
func TestProvidersAreExplainedOneAfterTheOther(t *testing.T) {
	t.Parallel()
	rs, problems := authz.Parse("p.yaml", []byte(`apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: a, namespace: default}
spec: {action: CUSTOM, provider: {name: a}, rules: [{to: [{operation: {paths: [/came]}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: b, namespace: default}
spec: {action: CUSTOM, provider: {name: b}, rules: [{to: [{operation: {paths: [/a]}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: c, namespace: default}
spec: {action: CUSTOM, provider: {name: c}, rules: [{to: [{operation: {paths: [/came, /a]}}]}]}
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: jwt, namespace: default}
spec: {jwtRules: [{issuer: iss}]}
`))
	set, more := authz.Set{}.Update(rs)
	if problems = append(problems, more...); len(problems) > 0 {
		t.Fatal(problems)
	}
	c := explain.Case{Set: set, Workload: identity.Workload{Namespace: "default"}, Providers: map[string]bool{"a": true},
		Request: authz.Request{Known: authz.FieldsHTTP, HTTP: true, Method: []byte("GET"), Path: []byte("/came"),
			Headers: []authz.Header{{Name: "authorization", Value: []byte("Bearer bad")}}},
		Changes: []explain.Change{{Provider: "a", Changes: &authz.Changes{Path: []byte("/a"), Names: []string{"authorization"}}}, {Provider: "b", Changes: &authz.Changes{Path: []byte("/b")}}}}
	c.Snapshot, _ = authz.Compile(set, authz.Options{MultipleProviders: true})
	matches := func(e explain.Explanation) (out []string) {
		for _, s := range e.Stages {
			for _, p := range s.Policies {
				for _, r := range p.Rules {
					out = append(out, p.Policy+" "+r.Matches)
				}
			}
		}
		return out
	}
	want := []string{"default/a yes", "default/b yes", "default/c no", "default/jwt yes"}
	e := explain.Explain(c)
	if e.Decision != "ask" || e.Policy != "default/b" || !strings.HasPrefix(e.Summary, "provider b decides:") || !strings.Contains(e.Summary, "CUSTOM policy default/b (p.yaml:9)") || !slices.Equal(e.Asks, []string{"a", "b"}) {
		t.Errorf("where b has not answered: %+v", e)
	}
	if got := matches(e); !slices.Equal(got, want) {
		t.Errorf("the rules match %q, want %q", got, want)
	}
	c.Providers["b"] = true
	if e := explain.Explain(c); e.Decision != "allow" || !slices.Equal(matches(e), want) {
		t.Errorf("where both allow: %+v", e)
	}
	c.Providers["b"] = false
	e = explain.Explain(c)
	if e.Decision != "deny" || !strings.Contains(e.Summary, "provider b said no; rule 0 of CUSTOM policy default/b") || len(e.Because) != 1 || !strings.Contains(e.Because[0], `/a is in paths`) {
		t.Errorf("where b denies: %s; %q", e.Summary, e.Because)
	}
}
