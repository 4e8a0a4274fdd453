package oracle_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/extauthz"
	"github.com/signet-mesh/signet/identity"
)

// program compiles what a mesh has for the workload, as the agent does.
func (m mesh) program(tb testing.TB) *authz.Program {
	tb.Helper()
	resources, problems := authz.Parse("world", []byte(m.Resources))
	for _, p := range problems {
		if p.Severity == authz.SeverityError {
			tb.Fatalf("the world is not valid: %v\n%s", p, m.Resources)
		}
	}
	set, problems := authz.Set{}.Update(resources)
	if len(problems) > 0 {
		tb.Fatalf("the world is not consistent: %v", problems)
	}
	td, err := spiffeid.TrustDomainFromString(m.TrustDomain)
	if err != nil {
		tb.Fatal(err)
	}
	snapshot, _ := authz.Compile(set, authz.Options{TrustDomain: td, TrustDomainAliases: m.Aliases, RootNamespace: m.RootNamespace})
	return snapshot.For(identity.Workload{Namespace: m.Namespace, Labels: m.Labels})
}

// verdict is what can be seen of a decision from outside, from either side.
type verdict struct {
	// Asked are the providers that were asked, in order.
	Asked []string
	// End is "allow", "deny", "401", "no" (a provider denied) or "closed" (a
	// plaintext connection where mutual TLS is demanded).
	End string
	// Policy is who denied or allowed, "NAMESPACE/NAME[RULE]", or empty.
	Policy string
	// Audit says that an AUDIT rule matched.
	Audit bool
	// DryRun are the results of dry-run policies: "DENY denied a/b[0]".
	DryRun []string
}

func (v verdict) String() string {
	return fmt.Sprintf("%s %s asked=%v audit=%t dryRun=%v", v.End, v.Policy, v.Asked, v.Audit, v.DryRun)
}

var policyID = regexp.MustCompile(`ns\[(.*?)\]-policy\[(.*?)\]-rule\[(\d+)\]`)

func shortPolicy(id string) string {
	if m := policyID.FindStringSubmatch(id); m != nil {
		return fmt.Sprintf("%s/%s[%s]", m[1], m[2], m[3])
	}
	return ""
}

// envoyVerdict reads an answer of the proxy.
func envoyVerdict(o outcome, l logged, asked []string) (v verdict, err error) {
	v.Asked = asked
	switch d := o.details; {
	case o.closed:
		v.End = "closed"
		return v, nil
	case strings.HasPrefix(d, "rbac_access_denied_matched_policy["):
		v.End, v.Policy = "deny", shortPolicy(d)
	case strings.HasPrefix(d, "jwt_authn_access_denied"):
		v.End = "401"
	case strings.HasPrefix(d, "ext_authz_denied"):
		v.End = "no"
	case strings.HasPrefix(d, "direct_response"), strings.HasPrefix(d, "route_not_found"):
		v.End = "allow"
		// Who allowed is in the metadata of the last filter, which is that of ALLOW
		// if there is one.
		if id, _ := l.RBAC["enforced_effective_policy_id"].(string); l.allowing {
			v.Policy = shortPolicy(id)
		}
	default:
		return v, fmt.Errorf("status %d with details %q", o.status, d)
	}
	v.Audit = l.Hint == true || l.Hint == "true"
	v.DryRun = dryRunsOf(l.RBAC)
	return v, nil
}

func dryRunsOf(meta map[string]any) (list []string) {
	for _, action := range []string{"deny", "allow"} {
		result, ok := meta["istio_dry_run_"+action+"_shadow_engine_result"].(string)
		if !ok {
			continue
		}
		id, _ := meta["istio_dry_run_"+action+"_shadow_effective_policy_id"].(string)
		list = append(list, strings.TrimSpace(strings.ToUpper(action)+" "+result+" "+shortPolicy(id)))
	}
	return list
}

// signetVerdict is what package authz decides about a request. unknown says that
// it rests on something that it could not know.
func signetVerdict(p *authz.Program, r *authz.Request, providerSaysNo bool) (v verdict, unknown bool, reason authz.Reason) {
	d := p.Decide(r)
	for d.Ask {
		unknown = unknown || d.Reason == authz.ReasonAskUnknown
		v.Asked = append(v.Asked, d.Provider)
		if providerSaysNo {
			v.End = "no"
			return v, unknown, d.Reason
		}
		d = p.After(d, r)
	}
	v.End = d.Verdict()
	switch d.Reason {
	case authz.ReasonTokenRefused, authz.ReasonTokenForeign:
		v.End = "401"
	case authz.ReasonPlaintext:
		v.End = "closed"
	case authz.ReasonDenyUnknown, authz.ReasonAllowUnknown, authz.ReasonPlaintextUnknown, authz.ReasonTokenUnknown:
		unknown = true
	}
	if (v.End == "deny" || d.Reason == authz.ReasonAllowRule) && d.Rule >= 0 {
		v.Policy = fmt.Sprintf("%s[%d]", d.Policy, d.Rule)
	}
	if m, ok := d.Audited(); ok {
		v.Audit = true
		unknown = unknown || !m.Certain
	}
	for _, dry := range d.DryRuns() {
		s := dry.Action.String() + " denied"
		if dry.Allowed {
			s = dry.Action.String() + " allowed"
		}
		if dry.Policy != "" {
			s += fmt.Sprintf(" %s[%d]", dry.Policy, dry.Rule)
		}
		unknown = unknown || !dry.Certain
		v.DryRun = append(v.DryRun, s)
	}
	return v, unknown, d.Reason
}

// pair is a world's workload and a request.
type pair struct {
	id      string
	world   world
	program *authz.Program
	shot    shot
	outcome outcome
	// allowing says that a filter for ALLOW policies stands last.
	allowing bool
}

// tally counts what became of pairs.
type tally struct {
	mu         sync.Mutex
	compared   int
	ends       map[string]int
	deviations map[string]int
	unreached  map[string]int // by details: refused before any filter of ours
	failures   int
}

func newTally() *tally {
	return &tally{ends: map[string]int{}, deviations: map[string]int{}, unreached: map[string]int{}}
}

// The deviations from Istio that docs/policies.md lists.
const (
	deviationUnknown = "what cannot be told of a value (a newline, bytes that are not UTF-8, a forwarded address with a zone) is unknown, and denied"
	deviationSANs    = "a certificate with several URI SANs is refused"
)

// compare holds a pair's two verdicts against each other.
func (t *tally) compare(tb testing.TB, p pair, l logged, rec *recorder) {
	tb.Helper()
	o := p.outcome
	before, after, asked := rec.of(p.id)
	t.mu.Lock()
	defer t.mu.Unlock()
	if o.closed && before == nil && p.shot.peer != "" {
		t.unreached["closed: "+o.details]++
		return
	}
	if !o.closed && before == nil {
		t.unreached[o.details]++
		return
	}
	l.allowing = p.allowing
	want, err := envoyVerdict(o, l, asked)
	if err != nil {
		t.failures++
		tb.Errorf("pair %s: the proxy's answer: %v", p.id, err)
		return
	}
	check := after
	if check == nil {
		check = before
	}
	if check == nil {
		check = newCheck(p.shot)
	}
	var r authz.Request
	if err := extauthz.FromCheckRequest(check, &r); err != nil {
		var bad *extauthz.RequestError
		if errors.As(err, &bad) && bad.Reason == extauthz.ReasonCertificate {
			t.deviations[deviationSANs]++
			return
		}
		t.failures++
		tb.Errorf("pair %s: reading the CheckRequest: %v", p.id, err)
		return
	}
	// The recorder is given the metadata of the filter that conditions read.
	r.Known |= authz.FieldMetadata
	got, unknown, reason := signetVerdict(p.program, &r, slices.Contains(p.shot.headers, [2]string{"x-provider", "no"}))
	if got.End == "allow" && !l.allowing { // the proxy does not say who allowed
		got.Policy = ""
	}
	t.compared++
	t.ends[want.End]++
	if want.String() == got.String() {
		return
	}
	if unknown && (got.End == "deny" || len(got.Asked) > len(want.Asked)) {
		t.deviations[deviationUnknown]++
		return
	}
	t.failures++
	if t.failures <= 3 {
		tb.Errorf("pair %s: Istio and Envoy: %v\n  signet (%s): %v\n  request: %+v\n  path seen: %q rbac: %v\n  policies:\n%s",
			p.id, want, reason, got, p.shot, o.path, l.RBAC, p.world.text)
	}
}

func (t *tally) report(tb testing.TB) {
	tb.Logf("note: Istio and Envoy: %d pairs compared; ends %v; deviations %v; refused before any filter %v", t.compared, t.ends, t.deviations, t.unreached)
	if t.failures > 5 {
		tb.Errorf("%d differences in all", t.failures)
	}
}

// seed is the run's, printed, and fixed by $SIGNET_SEED.
func seed(tb testing.TB) uint64 {
	n := uint64(time.Now().UnixNano())
	if s := os.Getenv("SIGNET_SEED"); s != "" {
		var err error
		if n, err = strconv.ParseUint(s, 10, 64); err != nil {
			tb.Fatalf("SIGNET_SEED: %v", err)
		}
	}
	tb.Logf("run again with SIGNET_SEED=%d", n)
	return n
}

// TestDecideAgreesWithIstioAndEnvoy is the harness at random: worlds of policies
// through Istio's selection and compiler into a real Envoy, requests of real
// clients, and the same decision from Decide, with the same policy named, the same
// providers asked, the same AUDIT and dry-run results.
func TestDecideAgreesWithIstioAndEnvoy(t *testing.T) {
	t.Parallel()
	pilot := startIstio(t)
	g := generator{rand.New(rand.NewPCG(seed(t), 1))}
	pki := newPKI(t, clientNames)
	rec, socket := startRecorder(t)
	worlds, connections, shots := whole(130, 15), 6, 5
	var workloads []workload
	var all []world
	for i := range worlds {
		w := g.world(pki.keySet(t))
		all = append(all, w)
		workloads = append(workloads, workload{name: fmt.Sprintf("w%d", i), filters: pilot.build(t, w.mesh), v6: w.v6})
	}
	proxy := startSidecars(t, workloads, pki, socket, []string{"ask", "other"})
	tokens := []string{}
	for _, c := range claimSets {
		if c == nil {
			tokens = append(tokens, "")
			continue
		}
		tokens = append(tokens, pki.sign(t, c))
	}
	tokens = append(tokens, "not.a.token")
	var pairs []pair
	n, answered := 0, 0
	for i, w := range all {
		program := w.program(t)
		for range connections {
			c := g.connection(w.v6)
			if c.peer != "" && w.mode(workloads[i].filters, c.dst.Port()) == "DISABLE" {
				c.peer, c.h2, c.sni = "", false, ""
			}
			cl := &client{pki: pki, address: proxy.addresses[workloads[i].name], connection: c, port: 10000 + n%50000}
			for range shots {
				n++
				p := pair{id: strconv.Itoa(n), world: w, program: program, shot: g.shot(c, tokens), allowing: workloads[i].filters.allowing()}
				p.shot.headers = append(p.shot.headers, [2]string{"x-pair", p.id})
				if p.outcome = cl.do(t, p.shot); !p.outcome.closed {
					answered++
				}
				pairs = append(pairs, p)
			}
			cl.close()
		}
	}
	logs := proxy.logs(t, answered)
	count := newTally()
	for _, p := range pairs {
		count.compare(t, p, logs[p.id], rec)
	}
	count.report(t)
	if want := whole(3000, 300); count.compared < want {
		t.Errorf("%d pairs compared, want %d", count.compared, want)
	}
}

func (w world) mode(f filters, port uint16) string {
	if m, ok := f.Modes[uint32(port)]; ok {
		return m
	}
	return f.Mode
}
