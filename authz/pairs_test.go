package authz_test

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	security "istio.io/api/security/v1beta1"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// million asks for the whole of TestDecideAgreesWithTheNaiveEvaluator, which is
// worth doing only without the race detector.
var million = flag.Bool("million", false, "compare a million pairs with the naive evaluator and assert the table of what decided")

var naiveOptions = authz.Options{TrustDomain: spiffeid.RequireTrustDomainFromString("own.td"), TrustDomainAliases: []string{"old.td"}, RootNamespace: "root"}

// cell is a field in one kind of match and one action.
type cell struct {
	place  string // from, to or when
	name   string // of the field, or of the key of a condition
	not    bool
	kind   string
	values []string
	action security.AuthorizationPolicy_Action
}

func (c cell) field() field {
	if c.not {
		return field{name: "not " + c.name}
	}
	return field{name: c.name}
}

func (c cell) String() string {
	name := c.name
	if c.place == "when" {
		name = "when " + name
	}
	if c.not {
		name = "not " + name
	}
	return fmt.Sprintf("%-46s %-9s %s", name, c.kind, c.action)
}

// allCells is the whole language: each field, in each kind of match, positive and
// not, under each action that admission takes it with.
func allCells() (cells []cell) {
	identities := func(name string) bool {
		return strings.HasPrefix(name, "request.auth") || strings.HasPrefix(name, "source.") && name != "source.ip" ||
			slices.Contains([]string{"principals", "namespaces", "serviceAccounts", "trustDomains", "requestPrincipals"}, name)
	}
	add := func(place string, fields map[string]map[string][]string) {
		for _, name := range slices.Sorted(maps.Keys(fields)) {
			if strings.HasPrefix(name, "request.headersX") { // it matches nothing, so it never decides
				continue
			}
			for _, kind := range slices.Sorted(maps.Keys(fields[name])) {
				for a := range security.AuthorizationPolicy_Action(4) {
					if a == security.AuthorizationPolicy_CUSTOM && identities(name) {
						continue
					}
					for _, not := range []bool{false, true} {
						cells = append(cells, cell{place, name, not, kind, fields[name][kind], a})
					}
				}
			}
		}
	}
	add("from", map[string]map[string][]string{
		"principals": principalValues, "namespaces": namespaceValues, "serviceAccounts": accountValues, "trustDomains": domainValues,
		"requestPrincipals": identityValues, "ipBlocks": ipValues, "remoteIpBlocks": ipValues,
	})
	add("to", map[string]map[string][]string{"hosts": hostValues, "methods": methodValues, "paths": toPathValues, "ports": portValues})
	add("when", conditions)
	return cells
}

// world is a policy of one rule, in which the cell's list stands alone or beside
// one other list.
func (c cell) world(g generator) *world {
	values := []string{pick(g, c.values)}
	for g.IntN(3) == 0 && len(values) < 4 {
		values = append(values, pick(g, c.values))
	}
	rule := &security.Rule{}
	set := func(not bool, yes, no *[]string) {
		if not {
			yes = no
		}
		*yes = values
	}
	var s *security.Source
	var o *security.Operation
	switch c.place {
	case "from":
		s = &security.Source{}
		lists := map[string][2]*[]string{
			"principals": {&s.Principals, &s.NotPrincipals}, "namespaces": {&s.Namespaces, &s.NotNamespaces},
			"serviceAccounts": {&s.ServiceAccounts, &s.NotServiceAccounts}, "trustDomains": {&s.TrustDomains, &s.NotTrustDomains},
			"requestPrincipals": {&s.RequestPrincipals, &s.NotRequestPrincipals}, "ipBlocks": {&s.IpBlocks, &s.NotIpBlocks},
			"remoteIpBlocks": {&s.RemoteIpBlocks, &s.NotRemoteIpBlocks},
		}[c.name]
		set(c.not, lists[0], lists[1])
		rule.From = []*security.Rule_From{{Source: s}}
	case "to":
		o = &security.Operation{}
		lists := map[string][2]*[]string{
			"hosts": {&o.Hosts, &o.NotHosts}, "methods": {&o.Methods, &o.NotMethods},
			"paths": {&o.Paths, &o.NotPaths}, "ports": {&o.Ports, &o.NotPorts},
		}[c.name]
		set(c.not, lists[0], lists[1])
		rule.To = []*security.Rule_To{{Operation: o}}
	default:
		when := &security.Condition{Key: c.name}
		set(c.not, &when.Values, &when.NotValues)
		rule.When = []*security.Condition{when}
	}
	switch g.IntN(8) { // something beside it that often matches, too
	case 0:
		if s == nil {
			s = &security.Source{}
			rule.From = []*security.Rule_From{{Source: s}}
		}
		if c.name != "ipBlocks" {
			s.NotIpBlocks = []string{"10.0.0.1"}
		}
	case 1:
		if o == nil {
			o = &security.Operation{}
			rule.To = []*security.Rule_To{{Operation: o}}
		}
		if c.name != "methods" {
			o.Methods = []string{"*"}
		}
		if c.name != "ports" {
			o.Ports = []string{"80", "443"}
		}
	case 2:
		rule.When = append(rule.When, &security.Condition{Key: "connection.sni", NotValues: []string{"b.example"}})
	case 3: // an alternative, and another rule of the same action
		if rule.From != nil {
			rule.From = append(rule.From, &security.Rule_From{Source: &security.Source{IpBlocks: []string{"203.0.113.0/24"}}})
		}
	}
	if o != nil && len(o.Methods)+len(o.NotMethods)+len(o.Ports)+len(o.NotPorts)+len(o.Paths)+len(o.NotPaths)+len(o.Hosts)+len(o.NotHosts) == 0 {
		o.Ports = []string{"80"}
	}
	if s != nil && c.place != "from" && len(s.NotIpBlocks) == 0 {
		s.IpBlocks = []string{"10.0.0.1"}
	}
	spec := &security.AuthorizationPolicy{Action: c.action, Rules: []*security.Rule{rule}}
	if c.action == security.AuthorizationPolicy_CUSTOM {
		spec.ActionDetail = &security.AuthorizationPolicy_Provider{Provider: &security.AuthorizationPolicy_ExtensionProvider{Name: "ask"}}
	}
	w := &world{naive: naive{root: "root", domains: []string{"own.td", "old.td"}}}
	w.policies = []naivePolicy{{"one", "p", false, spec}}
	w.document("AuthorizationPolicy", "one", "p", 0, spec, false)
	return w
}

func (w *world) compile(tb testing.TB) *authz.Snapshot {
	rs, problems := authz.Parse("w.yaml", w.yaml)
	for _, p := range problems {
		if p.Severity == authz.SeverityError {
			tb.Fatalf("%v in\n%s", p, w.yaml)
		}
	}
	set, problems := authz.Set{}.Update(rs)
	if len(problems) > 0 {
		tb.Fatalf("%v in\n%s", problems[0], w.yaml)
	}
	snapshot, _ := authz.Compile(set, naiveOptions)
	return snapshot
}

// everything tells all of a decision, in the words of the naive evaluator.
func everything(p *authz.Program, r *authz.Request) string {
	var b strings.Builder
	d := p.Decide(r)
	for d.Ask {
		fmt.Fprintf(&b, "ask %s %s %s[%d] > ", d.Provider, d.Reason, d.Policy, d.Rule)
		d = p.After(d, r)
	}
	fmt.Fprintf(&b, "%s %s", d.Verdict(), d.Reason)
	if d.Rule >= 0 {
		fmt.Fprintf(&b, " %s[%d]", d.Policy, d.Rule)
	}
	if d.Kind == authz.KindPeerAuthentication || d.Reason == authz.ReasonProviders {
		return b.String()
	}
	match := func(m authz.Match) string {
		if m.Policy == "" {
			return "-"
		}
		return fmt.Sprintf("%s[%d](%t)", m.Policy, m.Rule, m.Certain)
	}
	m, _ := d.Audited()
	b.WriteString(" audit " + match(m))
	for _, dry := range d.DryRuns() {
		fmt.Fprintf(&b, " dry %s %t %s", dry.Action, dry.Allowed, match(dry.Match))
	}
	return b.String()
}

// tally is what was seen of a cell.
type tally struct{ pairs, trueDecides, falseDecides, unknown int }

// seeded is the run's generator; $SIGNET_SEED repeats a run.
func seeded(tb testing.TB) uint64 {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("SIGNET_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			tb.Fatalf("SIGNET_SEED: %v", err)
		}
	}
	tb.Logf("run again with SIGNET_SEED=%d", seed)
	return seed
}

// TestDecideAgreesWithTheNaiveEvaluator goes the whole way from text to decision.
// Each cell of the language has worlds of its own, whose requests are chosen so
// that the cell's list is true as often as false; a pair counts as decided by the
// list if inverting what it says changes what can be seen of the decision: the
// answer, for AUDIT the log, for CUSTOM the provider. Beside them are worlds of
// many policies.
func TestDecideAgreesWithTheNaiveEvaluator(t *testing.T) {
	t.Parallel()
	cells := allCells()
	seed := seeded(t)
	worlds, each, wild := 2, 10, 200
	switch {
	case *million:
		worlds, each, wild = 48, 25, 3000
	case testing.Short() || raceEnabled:
		worlds, each, wild = 1, 6, 40
	}
	counts := make([]tally, len(cells))
	pairs := compareInShards(t, len(cells), func(i int) int {
		g := generator{rand.New(rand.NewPCG(seed, uint64(i)))}
		for range worlds {
			w := cells[i].world(g)
			snapshot := w.compile(t)
			for range each {
				compareCell(t, w, snapshot, cells[i], g, &counts[i])
			}
		}
		return counts[i].pairs
	})
	pairs += compareInShards(t, wild, func(i int) int {
		g := generator{rand.New(rand.NewPCG(seed, uint64(1e6+i)))}
		w := g.world()
		snapshot := w.compile(t)
		for range 100 {
			r := g.request()
			who := identity.Workload{Namespace: pick(g, []string{"one", "one", "two", "root", "none"}), Labels: map[string]string{"app": pick(g, []string{"web", "web", "db", "x"})}}
			comparePair(t, w, snapshot, who, &r)
		}
		return 100
	})
	fields := slices.CompactFunc(slices.Clone(cells), func(a, b cell) bool { return a.place == b.place && a.name == b.name })
	crowds := max(1, worlds/4)
	pairs += compareInShards(t, len(fields)*crowds, func(i int) int {
		g := generator{rand.New(rand.NewPCG(seed, uint64(2e6+i)))}
		w := crowd(g, fields[i%len(fields)], cells)
		snapshot := w.compile(t)
		for range each {
			r := g.request()
			comparePair(t, w, snapshot, identity.Workload{Namespace: "one", Labels: map[string]string{"app": "web"}}, &r)
		}
		return each
	})
	t.Logf("note: %d pairs of policies and requests agree with the naive evaluator", pairs)
	if !*million {
		return // too few to count
	}
	if pairs < 1_000_000 {
		t.Errorf("only %d pairs", pairs)
	}
	t.Logf("note: %-75s %7s %8s %8s %8s", "field, kind of match, action", "pairs", "true", "false", "unknown")
	least := [2]float64{1, 1}
	for i, c := range cells {
		n := counts[i]
		yes, no := float64(n.trueDecides)/float64(n.pairs), float64(n.falseDecides)/float64(n.pairs)
		t.Logf("note: %-75s %7d %7.1f%% %7.1f%% %7.1f%%", c, n.pairs, 100*yes, 100*no, 100*float64(n.unknown)/float64(n.pairs))
		if n.pairs < 1000 || yes < 0.2 || no < 0.2 {
			t.Errorf("%s: %d pairs, true and decides in %.1f%%, false and decides in %.1f%%; want 1000, 20%%, 20%%", c, n.pairs, 100*yes, 100*no)
		}
		least = [2]float64{min(least[0], yes), min(least[1], no)}
	}
	t.Logf("note: %d cells; true and decides in %.1f%% at least, false and decides in %.1f%% at least", len(cells), 100*least[0], 100*least[1])
}

// crowd is a policy of so many rules about one field that they are found by an
// index, some of them with so many values that those are, too.
func crowd(g generator, f cell, cells []cell) *world {
	mine := slices.DeleteFunc(slices.Clone(cells), func(c cell) bool {
		return c.place != f.place || c.name != f.name || c.not || c.action != security.AuthorizationPolicy_DENY
	})
	spec := &security.AuthorizationPolicy{Action: pick(g, []security.AuthorizationPolicy_Action{security.AuthorizationPolicy_DENY, security.AuthorizationPolicy_ALLOW})}
	for range 6 + g.IntN(40) {
		c := pick(g, mine)
		c.action = spec.Action
		c.values = slices.Clone(c.values)
		for range g.IntN(3) * g.IntN(8) { // values that nothing has, in the form of the others
			if v := pick(g, c.values); strings.HasPrefix(v, "*") {
				c.values = append(c.values, v+fmt.Sprint(g.IntN(90)))
			} else if c.kind == "exact" && c.name != "ipBlocks" && c.name != "remoteIpBlocks" && !strings.HasSuffix(c.name, ".ip") && !strings.HasSuffix(strings.ToLower(c.name), "port") && c.name != "ports" {
				c.values = append(c.values, fmt.Sprint(g.IntN(90))+v)
			}
		}
		rule := c.world(g).policies[0].Rules[0]
		if g.IntN(2) == 0 && f.name != "serviceAccounts" && len(c.values) > 8 {
			for _, from := range rule.From {
				if len(from.Source.GetPrincipals()) > 0 {
					from.Source.Principals = c.values
				}
			}
			for _, to := range rule.To {
				if len(to.Operation.GetPaths()) > 0 {
					to.Operation.Paths = c.values
				}
				if len(to.Operation.GetHosts()) > 0 {
					to.Operation.Hosts = c.values
				}
			}
		}
		spec.Rules = append(spec.Rules, rule)
	}
	w := &world{naive: naive{root: "root", domains: []string{"own.td", "old.td"}}}
	w.policies = []naivePolicy{{"one", "p", false, spec}}
	w.document("AuthorizationPolicy", "one", "p", 0, spec, false)
	return w
}

// compareInShards does n pieces of work on all processors and adds up their pairs.
func compareInShards(t *testing.T, n int, work func(i int) int) (pairs int) {
	var wg sync.WaitGroup
	var mu sync.Mutex
	next := 0
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for {
				mu.Lock()
				i := next
				next++
				mu.Unlock()
				if i >= n || t.Failed() {
					return
				}
				done := work(i)
				mu.Lock()
				pairs += done
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return pairs
}

func compareCell(t *testing.T, w *world, snapshot *authz.Snapshot, c cell, g generator, n *tally) {
	f := c.field()
	r := g.request()
	want := isTrue // or the other, whichever has decided less often so far
	if n.trueDecides > n.falseDecides {
		want = isFalse
	}
	for range 60 {
		if !r.HTTP && g.IntN(4) > 0 {
			r.HTTP = true
		}
		if w.holds(f, &r) == want {
			break
		}
		r = g.request()
	}
	who := identity.Workload{Namespace: "one", Labels: map[string]string{"app": "web"}}
	comparePair(t, w, snapshot, who, &r)
	n.pairs++
	holds := w.holds(f, &r)
	if holds == isUnknown || w.decide("one", who.Labels, &r, nil) == w.decide("one", who.Labels, &r, &f) {
		if holds == isUnknown {
			n.unknown++
		}
		return
	}
	if holds == isTrue {
		n.trueDecides++
	} else {
		n.falseDecides++
	}
}

func comparePair(t *testing.T, w *world, snapshot *authz.Snapshot, who identity.Workload, r *authz.Request) {
	got, want := everything(snapshot.For(who), r), w.decide(who.Namespace, who.Labels, r, nil)
	if got != want && !t.Failed() {
		t.Errorf("got  %q\nwant %q\nworkload %s %v\nrequest %+v\nmethod %q path %q host %q principal %q %q\n%s", got, want,
			who.Namespace, who.Labels, r, r.Method, r.Path, r.Host, r.Principal, r.OtherNames, w.yaml)
	}
}
