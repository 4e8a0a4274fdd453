package authz

import (
	"fmt"
	"slices"
	"testing"

	"github.com/signet-mesh/signet/identity"
)

// Tables that follow others: decisions show what is in them, and not how much of it was
// made anew or stays for ever.

// ruled are policies of one rule each, some of a row that is in order.
func ruled(from, to int) (ps []*policy) {
	for i := from; i < to; i++ {
		ps = append(ps, &policy{serial: uint64(i) + 1, rules: []*rule{{Rule: &Rule{Index: i, order: fmt.Sprintf("%06d", i)}}}})
	}
	return ps
}

// live are the rules of a set, by index, in the order in which they are found.
func (s *ruleset) live() (indexes []int) {
	var rules []*Rule
	for i, r := range s.base.rules {
		if s.gone == nil || s.gone[i>>6]>>(i&63)&1 == 0 {
			rules = append(rules, r.Rule)
		}
	}
	if s.extra != nil {
		for i := len(s.at) - 1; i >= 0; i-- {
			at := 0
			for at < len(rules) && rules[at].order < s.extra.rules[i].order {
				at++
			}
			rules = slices.Insert(rules, at, s.extra.rules[i].Rule)
		}
	}
	for _, r := range rules {
		indexes = append(indexes, r.Index)
	}
	return indexes
}

// TestATableIsMadeAnewWhenEnoughHasChanged, which is 64 rules, or one in sixteen of a
// large table, and not before: what went counts, and what came.
func TestATableIsMadeAnewWhenEnoughHasChanged(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		rules, went, came int
		anew              bool
	}{
		{100, 64, 0, false}, {100, 65, 0, true},
		{100, 0, 64, false}, {100, 0, 65, true},
		{100, 32, 32, false}, {100, 33, 32, true},
		{1600, 100, 0, false}, {1600, 101, 0, true},
		{1600, 50, 50, false}, {1600, 50, 51, true},
	} {
		s := newRuleset(ruled(0, c.rules), language{})
		next := s.follow(ruled(c.went, c.rules+c.came))
		if anew := next.base != s.base; anew != c.anew {
			t.Errorf("%d of %d rules went and %d came: made anew: %t", c.went, c.rules, c.came, anew)
		}
		var want []int
		for i := c.went; i < c.rules+c.came; i++ {
			want = append(want, i)
		}
		if got := next.live(); !slices.Equal(got, want) {
			t.Errorf("%d of %d rules went and %d came: the rules are %v", c.went, c.rules, c.came, got)
		}
	}
}

// TestChangesOfOnePolicyDoNotAddUp: a policy that is changed again and again is one
// change, and one that comes and goes is none, so that neither has the table made anew.
func TestChangesOfOnePolicyDoNotAddUp(t *testing.T) {
	t.Parallel()
	first := newRuleset(ruled(0, 100), language{})
	s, serial := first, uint64(1000)
	for range 200 {
		policies := ruled(0, 100)
		changed := *policies[7]
		serial++
		changed.serial = serial
		s = s.follow(append(slices.Delete(policies, 7, 8), &changed))
	}
	if s.base != first.base || s.fewer != 1 || s.extra == nil || len(s.extra.rules) != 1 {
		t.Errorf("200 changes of one policy: %d rules went, and came %+v; the table is the same: %t", s.fewer, s.extra, s.base == first.base)
	}
	s = first
	for range 200 {
		serial++
		comes := ruled(100, 101)[0]
		comes.serial = serial
		s = s.follow(append(ruled(0, 100), comes)).follow(ruled(0, 100))
	}
	if s.base != first.base || s.fewer != 0 || s.extra != nil || s.at != nil {
		t.Errorf("a policy came and went 200 times: %d rules went, and came %+v; the table is the same: %t", s.fewer, s.extra, s.base == first.base)
	}
}

// TestChangesKeepTheTableOfConnections: what bare connections have of the rules follows
// changes as the rules do, also those of policies of which it has nothing.
func TestChangesKeepTheTableOfConnections(t *testing.T) {
	t.Parallel()
	policy := func(name, operation string) Resource {
		rs, problems := Parse(name, fmt.Appendf(nil, "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: %s, namespace: a}\nspec: {rules: [{to: [{operation: {%s}}]}]}\n", name, operation))
		if len(problems) > 0 {
			t.Fatal(problems)
		}
		return rs[0]
	}
	port := func(i int) Resource { return policy(fmt.Sprintf("port%02d", i), fmt.Sprintf("ports: ['%d']", 1000+i)) }
	// By name the one of requests comes before those of ports.
	rs := []Resource{policy("path", "paths: [/0]")}
	for i := range 20 {
		rs = append(rs, port(i))
	}
	set, _ := Set{}.Update(rs)
	s, _ := Compile(set, Options{})
	var first *table
	step := func(what string, want map[uint16]bool) {
		t.Helper()
		p := s.For(identity.Workload{Namespace: "a"})
		tcp := p.allow.tcp.Load()
		if first == nil {
			first = p.allow.connections().base
		} else if tcp == nil || tcp.base != first {
			t.Fatalf("%s: the table of bare connections is made anew", what)
		}
		for port, want := range want {
			r := Request{Known: FieldsTCP, DestinationPort: port}
			if d := p.Decide(&r); d.Allowed != want {
				t.Fatalf("%s: a connection to port %d: %s", what, port, d.Text())
			}
		}
		set, _ = set.Update(rs)
		s, _ = s.Update(set)
	}
	all := map[uint16]bool{999: false, 1020: false}
	for i := range uint16(20) {
		all[1000+i] = true
	}
	step("at first", all)
	for i := range 200 {
		rs[0] = policy("path", fmt.Sprintf("paths: [/%d]", i+1))
		step(fmt.Sprintf("after %d changes of a path", i), all)
	}
	rs[4] = policy("port03", "ports: ['999']")
	step("after all changes of a path", all)
	all[999], all[1003] = true, false
	step("after the change of a port", all)
}

// TestAProgramReadsEachNameOnce, however many policies read it.
func TestAProgramReadsEachNameOnce(t *testing.T) {
	t.Parallel()
	s, _ := Compile(compileText(t, manyPolicies(3, "a", func(int) string { return "" })+manyPolicies(3, "istio-system", func(int) string { return "" })), Options{})
	if names := s.For(identity.Workload{Namespace: "a"}).Names(); len(names) != 0 {
		t.Errorf("paths have the names %v", names)
	}
	text := ""
	for i := range 5 {
		text += fmt.Sprintf("---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p%d, namespace: a}\n"+
			"spec: {rules: [{when: [{key: 'request.headers[x-a]', values: [v]}]}, {when: [{key: 'request.auth.claims[x-a]', values: [v]}]}]}\n", i)
	}
	s, _ = Compile(compileText(t, text), Options{})
	if names := s.For(identity.Workload{Namespace: "a"}).Names(); !slices.Equal(names, []Name{{Field: FieldHeaders, Name: "x-a"}, {Field: FieldClaims, Name: "x-a"}}) {
		t.Errorf("the names are %v", names)
	}
}

// TestATargetIsOfAGroupAndAKind: admission refuses the other combinations, and where
// one came through it would select nothing.
func TestATargetIsOfAGroupAndAKind(t *testing.T) {
	t.Parallel()
	const gateways = "gateway.networking.k8s.io"
	waypoint := map[string]string{gatewayLabel: "w", managedLabel: managedInMesh}
	for _, g := range []string{"", gateways, "networking.istio.io"} {
		for _, kind := range []string{"", "Gateway", "GatewayClass", "Service"} {
			for name, selects := range map[string]string{"w": "Gateway", "istio-waypoint": "GatewayClass", "": ""} {
				p := &policy{resource: &resource{targets: []target{{g, kind, name}}}, root: true}
				if got, want := p.selects(waypoint, true), g == gateways && kind != "" && kind == selects; got != want {
					t.Errorf("%s %s %q selects a waypoint: %t", g, kind, name, got)
				}
			}
		}
	}
}

// TestADecisionThatNobodyMadeHasAText: its fields are everybody's to fill in.
func TestADecisionThatNobodyMadeHasAText(t *testing.T) {
	t.Parallel()
	for _, reason := range []Reason{ReasonAllowRule, ReasonDenyRule, ReasonAskRule, ReasonDenyUnknown, ReasonAllowUnknown, ReasonProviders, ReasonInvalid, ReasonBanned} {
		if text := (Decision{Reason: reason, Kind: KindAuthorizationPolicy, Policy: "a/b"}).Text(); text == "" {
			t.Errorf("%s has no text", reason)
		}
	}
}
