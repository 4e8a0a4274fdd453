package authz_test

import (
	"bytes"
	"fmt"
	"iter"
	"math/rand/v2"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// TestUpdateDecidesAsCompile changes a few policies of many again and again: a
// snapshot that follows another decides, names and lists what one that was
// compiled anew does, for requests and for bare connections.
func TestUpdateDecidesAsCompile(t *testing.T) {
	t.Parallel()
	seed := seeded(t)
	t.Logf("seed %d", seed)
	g := generator{rand.New(rand.NewPCG(seed, 2))}
	opts := authz.Options{TrustDomain: spiffeid.RequireTrustDomainFromString("own.td"), TrustDomainAliases: []string{"old.td"}, RootNamespace: "root", MultipleProviders: true}
	// Two readings, because a resource remembers what one compiler made of it.
	var a, b []authz.Resource
	for k := range 250 {
		text := bytes.ReplaceAll(g.world().yaml, []byte("{name: "), fmt.Appendf(nil, "{name: w%d-", k))
		for _, to := range []*[]authz.Resource{&a, &b} {
			rs, _ := authz.Parse(fmt.Sprintf("%d.yaml", k), text)
			*to = append(*to, rs...)
		}
	}
	in := make([]bool, len(a))
	for i := range in {
		in[i] = g.IntN(3) > 0
	}
	chosen := func(rs []authz.Resource) (out []authz.Resource) {
		for i, r := range rs {
			if in[i] {
				out = append(out, r)
			}
		}
		return out
	}
	steps := 60
	switch {
	case raceEnabled:
		steps = 5
	case testing.Short():
		steps = 15
	}
	set, _ := authz.Set{}.Update(chosen(a))
	following, _ := authz.Compile(set, opts)
	for step := range steps {
		for range 1 + g.IntN(4) {
			i := g.IntN(len(in))
			in[i] = !in[i]
		}
		set, _ = set.Update(chosen(a))
		following, _ = following.Update(set)
		anew, _ := authz.Set{}.Update(chosen(b))
		compiled, _ := authz.Compile(anew, opts)
		for _, ns := range []string{"one", "root"} {
			for _, app := range []string{"web", "db"} {
				w := identity.Workload{Namespace: ns, Labels: map[string]string{"app": app}}
				p, q := following.For(w), compiled.For(w)
				for range 40 {
					r := g.request()
					r.HTTP = g.IntN(2) == 0
					d, e := p.Decide(&r), q.Decide(&r)
					for render(d) == render(e) && d.Ask {
						d, e = p.After(d, &r), q.After(e, &r)
					}
					if render(d) != render(e) {
						t.Fatalf("seed %d, step %d, %s %s: %q, compiled anew %q for %+v", seed, step, ns, app, render(d), render(e), r)
					}
				}
				next, stop := pull(q)
				for r := range p.Rules() {
					if o, ok := next(); !ok || fmt.Sprint(r.Namespace, r.Name, r.Index, r.Action, r.DryRun, r.Provider) != fmt.Sprint(o.Namespace, o.Name, o.Index, o.Action, o.DryRun, o.Provider) {
						t.Fatalf("seed %d, step %d: rule %s/%s, compiled anew %s/%s", seed, step, r.Namespace, r.Name, o.Namespace, o.Name)
					}
				}
				if _, more := next(); more {
					t.Fatalf("seed %d, step %d: a rule is missing", seed, step)
				}
				stop()
			}
		}
	}
}

func pull(p *authz.Program) (func() (authz.Rule, bool), func()) { return iter.Pull(p.Rules()) }

// TestUpdateKeepsWhatDidNotChange holds that the program of a workload is the same
// one after a change that does not concern it.
func TestUpdateKeepsWhatDidNotChange(t *testing.T) {
	t.Parallel()
	policy := func(ns, name, path string) authz.Resource {
		rs, _ := authz.Parse(ns+name, fmt.Appendf(nil, "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: %s, namespace: %s}\nspec: {selector: {matchLabels: {app: %s}}, rules: [{to: [{operation: {paths: [%s]}}]}]}", name, ns, name, path))
		return rs[0]
	}
	rs := []authz.Resource{policy("a", "x", "/"), policy("a", "y", "/"), policy("b", "x", "/")}
	set, _ := authz.Set{}.Update(rs)
	before, _ := authz.Compile(set, authz.Options{})
	w := func(ns, app string) identity.Workload {
		return identity.Workload{Namespace: ns, Labels: map[string]string{"app": app}}
	}
	ax, ay, bx, none := before.For(w("a", "x")), before.For(w("a", "y")), before.For(w("b", "x")), before.For(w("c", "x"))
	rs[0] = policy("a", "x", "/changed")
	set, _ = set.Update(rs)
	after, _ := before.Update(set)
	if after.For(w("a", "x")) == ax {
		t.Error("the changed program is the old one")
	}
	if after.For(w("a", "y")) != ay || after.For(w("b", "x")) != bx || after.For(w("c", "x")) != none {
		t.Error("a program that nothing changed was made anew")
	}
}
