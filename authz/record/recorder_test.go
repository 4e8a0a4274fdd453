package record_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/extauthz"
	"github.com/signet-mesh/signet/authz/record"
	"github.com/signet-mesh/signet/identity"
)

const policies = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: ask, namespace: shop}
spec: {action: CUSTOM, provider: {name: opa}, rules: [{to: [{operation: {paths: [/ask*]}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny, namespace: shop}
spec: {action: DENY, rules: [{when: [{key: "request.headers[x-role]", values: [guest]}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: next, namespace: shop, annotations: {istio.io/dry-run: "true"}}
spec: {action: DENY, rules: [{to: [{operation: {paths: [/next]}}]}]}
`

var cart = identity.Workload{Namespace: "shop", ServiceAccount: "cart", Pod: "cart-1", PodUID: "u", Node: "n", Labels: map[string]string{"app": "cart"}}

// answers are those of a provider.
type answers func(path []byte) (extauthz.ProviderAnswer, error)

func (f answers) Ask(_ context.Context, _ string, message []byte) (extauthz.ProviderAnswer, error) {
	var r authz.Request
	if err := extauthz.FromBytes(message, authz.FieldsHTTP, &r); err != nil {
		return extauthz.ProviderAnswer{}, err
	}
	return f(r.Path)
}

// service is an ext_authz service with a recorder.
type service struct {
	t        testing.TB
	s        *extauthz.Server
	r        *record.Recorder
	reg      *prometheus.Registry
	log      *bytes.Buffer
	snapshot *authz.Snapshot
}

func newService(t testing.TB, cfg record.Config) *service {
	t.Helper()
	w := &service{t: t, reg: prometheus.NewPedanticRegistry(), log: &bytes.Buffer{}}
	cfg.Metrics = w.reg
	cfg.Log = slog.New(slog.NewTextHandler(w.log, nil))
	var err error
	if w.r, err = record.New(cfg); err != nil {
		t.Fatal(err)
	}
	rs, _ := authz.Parse("p.yaml", []byte(policies))
	set, _ := authz.Set{}.Update(rs)
	w.snapshot, _ = authz.Compile(set, authz.Options{})
	w.s, err = extauthz.New(extauthz.Config{Snapshot: func() *authz.Snapshot { return w.snapshot }, Records: w.r,
		Providers: answers(func(path []byte) (extauthz.ProviderAnswer, error) {
			switch string(path) {
			case "/ask/allowed":
				return extauthz.ProviderAnswer{Allowed: true}, nil
			case "/ask/denied":
				return extauthz.ProviderAnswer{}, nil
			}
			return extauthz.ProviderAnswer{}, errors.New("it is away")
		})})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// check checks a request with headers (NAME, VALUE, …) beside those that carry
// secrets.
func (w *service) check(path string, headers ...string) {
	w.t.Helper()
	m := &corev3.HeaderMap{}
	for i, s := range append([]string{":method", "GET", ":path", path, ":authority", "cart", "user-agent", "agent-secret", "authorization", "Bearer token-secret",
		"cookie", "c=cookie-secret", "x-request-id", "r-1", "traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}, headers...) {
		if i%2 == 0 {
			m.Headers = append(m.Headers, &corev3.HeaderValue{Key: s})
		} else {
			m.Headers[i/2].RawValue = []byte(s)
		}
	}
	b, err := proto.Marshal(&authv3.CheckRequest{Attributes: &authv3.AttributeContext{
		Source:  &authv3.AttributeContext_Peer{Principal: "spiffe://cluster.local/ns/web/sa/front"},
		Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{HeaderMap: m}},
	}})
	if err != nil {
		w.t.Fatal(err)
	}
	w.checkBytes(b)
}

func (w *service) checkBytes(b []byte) {
	w.t.Helper()
	if _, err := w.s.Answer(identity.WithCaller(context.Background(), identity.Caller{Workload: cart}), b); err != nil {
		w.t.Fatal(err)
	}
	// The bytes are used again.
	clear(b)
}

// finish runs the recorder for what waits.
func (w *service) finish() {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := w.r.Run(ctx); err != nil {
		w.t.Fatal(err)
	}
}

func (w *service) metric(name, text string) {
	w.t.Helper()
	if err := testutil.GatherAndCompare(w.reg, strings.NewReader(text), name); err != nil {
		w.t.Error(err)
	}
}

// TestRecorder records what was decided, and how; each record is decided again.
func TestRecorder(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	w := newService(t, record.Config{Outputs: []record.Output{record.Stream("stdout", &out)}, Allowed: 1})
	w.check("/a?q=query-secret")
	w.check("/b", "x-role", "admin", "x-role", "guest")
	w.check("/ask/allowed", "x-role", "guest")
	w.check("/ask/denied")
	w.check("/ask/failed")
	w.check("/next")
	w.checkBytes([]byte("\xff\xff"))
	w.check("/twice", ":path", "/other")
	w.finish()
	var got []string
	for r, err := range record.Read(bytes.NewReader(out.Bytes())) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprintf("%s %t %s %d %s %v %v", r.Request.Path, r.Allowed, r.Policy, r.Rule, r.Reason, r.Answers, r.DryRuns))
		d, ok := record.Replay(w.snapshot.For(r.Workload), &r)
		if d.Allowed != r.Allowed || d.Reason != r.Reason || d.Policy != r.Policy || ok == r.Unread {
			t.Errorf("decided again: %+v, %t; the record: %+v", d, ok, r)
		}
		if r.Workload.PodUID != "u" || r.Workload.Labels["app"] != "cart" || r.Generation != 1 && !r.Unread || r.Time.IsZero() || r.Latency <= 0 {
			t.Errorf("record %+v", r)
		}
		if !r.Unread && (r.RequestID != "r-1" || r.TraceID != "4bf92f3577b34da6a3ce929d0e0e4736" || string(r.Request.Principal) != "spiffe://cluster.local/ns/web/sa/front") {
			t.Errorf("record %+v", r)
		}
	}
	dry := "[{DENY true { -1 true}}]"
	want := []string{
		"/a?q= true  -1 no-allow-policy [] " + dry,
		"/b false shop/deny 0 deny-rule [] " + dry,
		"/ask/allowed false shop/deny 0 deny-rule [{opa true  <nil>}] " + dry,
		"/ask/denied false shop/ask 0 provider-denied [{opa false provider-denied <nil>}] []",
		"/ask/failed false shop/ask 0 provider-failed [{opa false provider-failed <nil>}] []",
		"/next true  -1 no-allow-policy [] [{DENY false {shop/next 0 true}}]",
		" false  -1 check-request [] []",
		" false  -1 check-request [] []",
	}
	if g, w := strings.Join(got, "\n"), strings.Join(want, "\n"); g != w {
		t.Errorf("recorded\n%s\nwant\n%s", g, w)
	}
	text := out.String()
	if strings.Contains(text, "secret") || !strings.Contains(text, `"name":"authorization","form":"hidden","value":"Bearer "`) || !strings.Contains(text, `"value":"guest"`) || !strings.Contains(text, `"error":"asking extension provider opa: it is away"`) {
		t.Errorf("records\n%s", text)
	}
	w.metric("signet_dry_run_decisions_total", `
# HELP signet_dry_run_decisions_total What dry-run policies would have decided, by action (DENY, ALLOW) and decision (allow, deny), beside the decision that was (enforced: allow, deny).
# TYPE signet_dry_run_decisions_total counter
signet_dry_run_decisions_total{action="DENY",decision="allow",enforced="allow"} 1
signet_dry_run_decisions_total{action="DENY",decision="allow",enforced="deny"} 2
signet_dry_run_decisions_total{action="DENY",decision="deny",enforced="allow"} 1
`)
}

// tokenPolicies look for tokens in every kind of place, and have policies that read
// those places.
const tokenPolicies = `apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: jwt, namespace: shop}
spec: {jwtRules: [{issuer: a, fromHeaders: [{name: X-JWT}, {name: x-prefixed, prefix: "Bearer "}, {name: x-request-id, prefix: t}], fromParams: [jwt, "a b"], fromCookies: [sid], outputPayloadToHeader: X-Payload}, {issuer: b}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: reads, namespace: shop}
spec: {action: DENY, rules: [{when: [{key: "request.headers[x-jwt]", values: ["x*"]}, {key: "request.headers[x-prefixed]", values: ["x"]},
  {key: "request.headers[cookie]", values: ["x"]}, {key: "request.headers[authorization]", values: ["x"]}, {key: "request.headers[x-role]", values: ["x"]},
  {key: "request.headers[x-payload]", values: ["x"]}]}]}
`

// TestTokensAreNotRecorded: whatever is configured, and whatever policies read, no
// record has what stands where tokens are looked for.
func TestTokensAreNotRecorded(t *testing.T) {
	t.Parallel()
	rs, problems := authz.Parse("p.yaml", []byte(tokenPolicies))
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	set, _ := authz.Set{}.Update(rs)
	role := []string{"x-role", "role-shown", "x-shown", "header-shown"}
	for _, tt := range []struct {
		path    string
		headers []string
		want    string
	}{
		{"/1?q=v", []string{"x-jwt", "token-secret"}, "/1?q=v"},
		{"/2?q=v", []string{"x-prefixed", "Bearer token-secret"}, "/2?q=v"},
		{"/3?q=v&jwt=token-secret&p", nil, "/3?q=v&jwt=&p"},
		{"/4?access%5Ftoken=token-secret&access_token=token-secret#secret", nil, "/4?access%5Ftoken=&access_token="},
		{"/5?%61%20b=token-secret&", nil, "/5?%61%20b="},
		{"/6?jwt&q=v", []string{"cookie", "sid=token-secret"}, "/6?jwt&q=v"},
		{"/7", []string{"x-request-id", "token-secret"}, "/7"},
		{"/9", []string{"x-jwt", "token-secret", "x-payload", "payload-secret"}, "/9"},
		// What was refused before any policy was asked.
		{"/8?jwt=token-secret", []string{"x-jwt", "token-secret", ":path", "/other"}, ""},
	} {
		var out bytes.Buffer
		w := newService(t, record.Config{Outputs: []record.Output{record.Stream("stdout", &out)}, Allowed: 1, Query: true, Redacted: []string{},
			Headers: []string{"x-jwt", "cookie", "authorization", "x-prefixed", "x-request-id", "x-payload", "x-shown"}})
		w.snapshot, _ = authz.Compile(set, authz.Options{})
		w.check(tt.path, append(tt.headers, role...)...)
		w.finish()
		line := out.String()
		if strings.Contains(line, "secret") {
			t.Errorf("%s: %s", tt.path, line)
		}
		r, err := record.Decode([]byte(line))
		if err != nil {
			t.Fatal(err)
		}
		if r.Allowed || string(r.Request.Path) != tt.want || r.Unread == (tt.want != "") {
			t.Errorf("%s: %s", tt.path, line)
		}
		if !r.Unread && (r.Reason != authz.ReasonTokenRefused || !strings.Contains(line, "role-shown") || !strings.Contains(line, "header-shown")) {
			t.Errorf("%s: %s", tt.path, line)
		}
		if d, ok := record.Replay(w.snapshot.For(r.Workload), &r); ok && d.Allowed {
			t.Errorf("%s: decided again it is allowed: %s", tt.path, line)
		}
	}
}

// TestQueriesAreHidden: a parameter without a value may be a secret, as a value is.
func TestQueriesAreHidden(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]string{
		"/reset?secret": "/reset?*", "/reset?secret&a=secret&secret": "/reset?*&a=&*", "/reset?": "/reset?", "/reset?a=secret&&b=": "/reset?a=&&b=",
		"/reset?access_token&%61ccess_token&access_token_secret": "/reset?access_token&%61ccess_token&*", "/reset#secret": "/reset", "/reset?secret#secret": "/reset?*",
		"/reset?%73ecret": "/reset?*", "/reset?a?secret": "/reset?*", "/reset": "/reset", "/?secret": "/?*",
	} {
		s := sample()
		s.Request.Path, s.Request.Headers = []byte(path), nil
		r, err := record.Decode(s.Append(nil, record.Shown{}))
		if err != nil {
			t.Fatal(err)
		}
		if got := string(r.Request.Path); got != want || r.Request.QueryHidden != strings.ContainsAny(path, "?#") {
			t.Errorf("%s: recorded %s, hidden %t; want %s", path, got, r.Request.QueryHidden, want)
		}
		if r, err = record.Decode(s.Append(nil, record.Shown{Query: true})); err != nil || string(r.Request.Path) != path || r.Request.QueryHidden {
			t.Errorf("%s: recorded with its query as %s, %t: %v", path, r.Request.Path, r.Request.QueryHidden, err)
		}
	}
}

// TestAllowedAreSampled: denials always, allowed requests by their share and bound.
func TestAllowedAreSampled(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		share     float64
		perSecond int
		least     int
		most      int
	}{{0, 0, 0, 0}, {1, 10, 10, 10}, {1, 5000, 2000, 2000}, {0.5, 5000, 850, 1150}} {
		synctest.Test(t, func(t *testing.T) { // where no time passes
			var out bytes.Buffer
			w := newService(t, record.Config{Outputs: []record.Output{record.Stream("stdout", &out)}, Allowed: tt.share, AllowedPerSecond: tt.perSecond})
			for range 2000 {
				w.check("/a")
			}
			for range 20 {
				w.check("/b", "x-role", "guest")
			}
			w.finish()
			allowed, denied := strings.Count(out.String(), `"decision":"allow"`), strings.Count(out.String(), `"decision":"deny"`)
			if allowed < tt.least || allowed > tt.most || denied != 20 {
				t.Errorf("share %v, %d a second: %d allowed, %d denied", tt.share, tt.perSecond, allowed, denied)
			}
			if n := testutil.ToFloat64(collector(t, w.reg, "signet_records_unsampled_total")); int(n) != 2000-allowed {
				t.Errorf("%v unsampled", n)
			}
		})
	}
}

// collector is one metric of a registry.
func collector(t *testing.T, reg *prometheus.Registry, name string) prometheus.Collector {
	t.Helper()
	all, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	g := prometheus.NewGauge(prometheus.GaugeOpts{Name: "x"})
	for _, f := range all {
		if f.GetName() == name {
			for _, m := range f.GetMetric() {
				g.Add(m.GetCounter().GetValue())
			}
		}
	}
	return g
}

// TestNothingWaitsForRecords: what is too much is dropped and counted, and an output
// that never comes back holds up neither checks nor the end.
func TestNothingWaitsForRecords(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		stuck := make(chan struct{})
		defer close(stuck)
		var good bytes.Buffer
		w := newService(t, record.Config{QueueBytes: 64 << 10, Outputs: []record.Output{
			record.Stream("stuck", writer(func(b []byte) (int, error) { <-stuck; return len(b), nil })), record.Stream("good", &good)}})
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- w.r.Run(ctx) }()
		const n = 3000
		for i := range n {
			w.check(fmt.Sprintf("/%d", i), "x-role", "guest")
			if i%50 == 0 {
				synctest.Wait()
			}
		}
		synctest.Wait()
		if got := strings.Count(good.String(), "\n"); got != n {
			t.Errorf("%d records at the good output", got)
		}
		start := time.Now()
		cancel()
		if err := <-ended; err != nil || time.Since(start) > 5*time.Second {
			t.Errorf("ended after %v: %v", time.Since(start), err)
		}
		if lost := testutil.ToFloat64(collector(t, w.reg, "signet_records_lost_total")); lost < n-200 {
			t.Errorf("%v lost", lost)
		}
		if !strings.Contains(w.log.String(), "are lost") {
			t.Errorf("log %s", w.log)
		}
	})
	// Before Run, and where it cannot keep up.
	w := newService(t, record.Config{QueueBytes: 64 << 10, Outputs: []record.Output{record.Stream("stdout", io.Discard)}})
	for range 1000 {
		w.check("/a", "x-role", "guest")
	}
	w.finish()
	lost := testutil.ToFloat64(collector(t, w.reg, "signet_records_lost_total"))
	written := testutil.ToFloat64(collector(t, w.reg, "signet_records_written_total"))
	if lost < 500 || written < 50 || lost+written != 1000 {
		t.Errorf("%v lost, %v written", lost, written)
	}
}

type writer func(b []byte) (int, error)

func (w writer) Write(b []byte) (int, error) { return w(b) }

// TestRecorderBesideChecks is for the race detector.
func TestRecorderBesideChecks(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	n := 0
	w := newService(t, record.Config{Allowed: 1, AllowedPerSecond: 1 << 20, Outputs: []record.Output{record.Stream("x", writer(func(b []byte) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		for r, err := range record.Read(bytes.NewReader(b)) {
			if err != nil || string(r.Request.Method) != "GET" {
				t.Errorf("%v: %+v", err, r)
			}
			n++
		}
		return len(b), nil
	}))}})
	ctx, cancel := context.WithCancel(t.Context())
	var all, run sync.WaitGroup
	run.Go(func() { w.r.Run(ctx) })
	for i := range 4 {
		all.Go(func() {
			for range 200 {
				w.check(fmt.Sprintf("/%d", i), "x-role", []string{"guest", "admin"}[i%2])
			}
		})
	}
	all.Wait()
	// At the end only so long is waited for what is not written yet.
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		mu.Lock()
		done := n == 800
		mu.Unlock()
		if done {
			break
		}
	}
	cancel()
	run.Wait()
	if n != 800 {
		t.Errorf("%d records", n)
	}
}

// TestPoliciesAreCountedUpToABound keeps the number of series bounded.
func TestPoliciesAreCountedUpToABound(t *testing.T) {
	t.Parallel()
	w := newService(t, record.Config{MaxPolicies: 1})
	w.check("/a")
	w.check("/b", "x-role", "guest")
	w.check("/ask/denied")
	w.check("/b", "x-role", "guest")
	w.metric("signet_policy_decisions_total", `
# HELP signet_policy_decisions_total Decisions, by the policy that decided (NAMESPACE/NAME; none: no policy did; other: there are too many to count each) and decision (allow, deny).
# TYPE signet_policy_decisions_total counter
signet_policy_decisions_total{decision="allow",policy="none"} 1
signet_policy_decisions_total{decision="allow",policy="other"} 0
signet_policy_decisions_total{decision="allow",policy="shop/deny"} 0
signet_policy_decisions_total{decision="deny",policy="none"} 0
signet_policy_decisions_total{decision="deny",policy="other"} 1
signet_policy_decisions_total{decision="deny",policy="shop/deny"} 2
`)
}

func TestConfigsAreRefused(t *testing.T) {
	t.Parallel()
	for _, cfg := range []record.Config{{Allowed: -0.1}, {Allowed: 1.1}, {AllowedPerSecond: -1}, {QueueBytes: -1}, {MaxPolicies: -1}} {
		if _, err := record.New(cfg); err == nil {
			t.Errorf("%+v is taken", cfg)
		}
	}
}

// BenchmarkAdd is what a check pays for its record.
func BenchmarkAdd(b *testing.B) {
	for name, cfg := range map[string]record.Config{
		"counted": {}, "unsampled": {Outputs: []record.Output{record.Stream("x", io.Discard)}},
		"recorded": {Outputs: []record.Output{record.Stream("x", io.Discard)}, Allowed: 1, AllowedPerSecond: 1 << 40, QueueBytes: 1 << 30},
	} {
		b.Run(name, func(b *testing.B) {
			w := newService(b, cfg)
			ctx, cancel := context.WithCancel(b.Context())
			done := make(chan error)
			go func() { done <- w.r.Run(ctx) }()
			p := w.snapshot.For(cart)
			req := authz.Request{}
			r := &extauthz.Record{Time: time.Now(), Workload: &cart, Message: make([]byte, 1000), Request: &req, Snapshot: w.snapshot, Program: p, Decision: p.Decide(&req)}
			r.Decision.Allowed = true
			b.ReportAllocs()
			for b.Loop() {
				w.r.Add(r)
			}
			cancel()
			<-done
		})
	}
}

// TestRecorderOfChanges: what a provider and a token changed of a request is in its
// record, hidden like the request's own, so that it is decided again as it was; also by
// policies that would have put other claims elsewhere.
func TestRecorderOfChanges(t *testing.T) {
	t.Parallel()
	compile := func(text string) *authz.Snapshot {
		rs, problems := authz.Parse("p.yaml", []byte(text))
		set, more := authz.Set{}.Update(rs)
		if problems = append(problems, more...); len(problems) > 0 {
			t.Fatal(problems)
		}
		s, _ := authz.Compile(set, authz.Options{})
		return s
	}
	const text = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: ask, namespace: shop}
spec: {action: CUSTOM, provider: {name: opa}, rules: [{to: [{operation: {paths: [/ask*]}}]}]}
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: jwt, namespace: shop}
spec: {jwtRules: [{issuer: iss, outputClaimToHeaders: [{header: x-group, claim: group}], outputPayloadToHeader: X-Payload}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow, namespace: shop}
spec:
  rules:
  - when: [{key: "request.headers[x-user]", values: [alice]}]
  - when: [{key: "request.headers[x-group]", values: [admin]}]
  - to: [{operation: {paths: [/changed]}}]
  - when: [{key: "request.headers[x-payload]", values: [none]}]
`
	snapshot := compile(text)
	claims := &structpb.Struct{Fields: map[string]*structpb.Value{"iss": structpb.NewStringValue("iss"), "group": structpb.NewStringValue("admin")}}
	var out bytes.Buffer
	rec, err := record.New(record.Config{Outputs: []record.Output{record.Stream("stdout", &out)}, Allowed: 1, AllowedPerSecond: 10000})
	if err != nil {
		t.Fatal(err)
	}
	set := func(kv ...string) *authv3.OkHttpResponse {
		o := &authv3.OkHttpResponse{}
		for i := 0; i < len(kv); i += 2 {
			o.Headers = append(o.Headers, &corev3.HeaderValueOption{Header: &corev3.HeaderValue{Key: kv[i], Value: kv[i+1]}})
		}
		return o
	}
	s, err := extauthz.New(extauthz.Config{Snapshot: func() *authz.Snapshot { return snapshot }, Records: rec,
		Providers: answers(func(path []byte) (extauthz.ProviderAnswer, error) {
			ok := map[string]*authv3.OkHttpResponse{
				"/ask/alice":   set("x-user", "alice", "x-secret", "provider-secret"),
				"/ask/mallory": set("x-user", "mallory"),
				"/ask/path":    set(":path", "/changed?q=query-secret"),
				"/ask/token":   set("authorization", "Bearer provider-secret"),
				"/ask/gone":    {HeadersToRemove: []string{"authorization"}},
			}[string(path)]
			return extauthz.ProviderAnswer{Allowed: true, Response: &authv3.CheckResponse{HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: ok}}}, nil
		}),
		Tokens: verifying(func(r *authz.Request) extauthz.Verified {
			for _, h := range r.Headers {
				if h.Name == "authorization" {
					r.Claims = claims
					ok := set("x-group", "admin", "x-payload", "payload-secret")
					ok.HeadersToRemove = []string{"authorization"}
					return extauthz.Verified{Upstream: ok}
				}
			}
			return extauthz.Verified{}
		})})
	if err != nil {
		t.Fatal(err)
	}
	ctx := identity.WithCaller(t.Context(), identity.Caller{Workload: cart})
	check := func(path string, proxy *structpb.Struct, headers ...string) {
		h := &authv3.AttributeContext_HttpRequest{HeaderMap: &corev3.HeaderMap{}}
		for i, kv := 0, append([]string{":path", path, ":method", "GET", ":authority", "cart"}, headers...); i < len(kv); i += 2 {
			h.HeaderMap.Headers = append(h.HeaderMap.Headers, &corev3.HeaderValue{Key: kv[i], RawValue: []byte(kv[i+1])})
		}
		r := &authv3.CheckRequest{Attributes: &authv3.AttributeContext{Source: &authv3.AttributeContext_Peer{}, Request: &authv3.AttributeContext_Request{Http: h}}}
		if proxy != nil {
			r.Attributes.MetadataContext = &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
				"envoy.filters.http.jwt_authn": {Fields: map[string]*structpb.Value{"payload": structpb.NewStructValue(proxy)}}}}
		}
		b, err := proto.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Answer(ctx, b); err != nil {
			t.Fatal(err)
		}
	}
	check("/ask/alice", nil, "x-user", "mallory")
	check("/ask/mallory", nil, "x-user", "alice")
	check("/ask/path", nil)
	check("/ask/token", nil)
	check("/ask/token", &structpb.Struct{Fields: map[string]*structpb.Value{"iss": structpb.NewStringValue("iss")}}, "x-group", "user")
	check("/ask/gone", nil, "authorization", "Bearer client-secret", "x-group", "admin")
	check("/ask/gone", claims, "x-group", "admin")
	check("/", nil, "authorization", "Bearer client-secret", "x-group", "user")
	check("/", nil, "x-group", "admin")
	check("/", claims, "x-group", "admin")
	done, cancel := context.WithCancel(t.Context())
	cancel()
	if err := rec.Run(done); err != nil {
		t.Fatal(err)
	}
	// Policies that ask nobody, so that nobody knows what token the request had.
	_, unasked, _ := strings.Cut(text, "---\n")
	nobody := compile(unasked)
	banned := compile("apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: deny, namespace: shop}\nspec: {action: DENY, rules: [{from: [{source: {requestPrincipals: ['iss/*']}}]}]}\n")
	other := compile(strings.ReplaceAll(text, "outputClaimToHeaders: [{header: x-group", "outputClaimToHeaders: [{header: x-user"))
	var got []string
	for r, err := range record.Read(bytes.NewReader(out.Bytes())) {
		if err != nil {
			t.Fatal(err)
		}
		d, ok := record.Replay(snapshot.For(cart), &r)
		if !ok || d.Allowed != r.Allowed || d.Reason != r.Reason || d.Rule != r.Rule {
			t.Errorf("decided again: %+v, %t; the record: %+v", d, ok, r)
		}
		then, _ := record.Replay(other.For(cart), &r)
		if len(r.Answers) > 0 {
			if d, ok := record.Replay(nobody.For(cart), &r); !ok || d.Allowed || d.Reason != authz.ReasonTokenUnknown {
				t.Errorf("%s, where nobody is asked: %+v, %t", r.Request.Path, d, ok)
			}
			if d, ok := record.Replay(banned.For(cart), &r); !ok || d.Allowed || d.Reason != authz.ReasonDenyUnknown {
				t.Errorf("%s, where some tokens are denied: %+v, %t", r.Request.Path, d, ok)
			}
		}
		got = append(got, fmt.Sprintf("%s %s %d, other rules: %s", r.Request.Path, r.Reason, r.Rule, then.Reason))
	}
	want := []string{
		"/ask/alice allow-rule 0, other rules: no-allow-rule", "/ask/mallory no-allow-rule -1, other rules: no-allow-rule", "/ask/path allow-rule 2, other rules: allow-rule",
		"/ask/token allow-rule 1, other rules: allow-unknown", "/ask/token allow-rule 1, other rules: allow-unknown",
		"/ask/gone no-allow-rule -1, other rules: allow-rule", "/ask/gone token-unknown 0, other rules: token-unknown",
		"/ allow-rule 1, other rules: allow-unknown", "/ no-allow-rule -1, other rules: allow-rule", "/ allow-rule 1, other rules: allow-rule",
	}
	if g, w := strings.Join(got, "\n"), strings.Join(want, "\n"); g != w {
		t.Errorf("recorded\n%s\nwant\n%s", g, w)
	}
	if text := out.String(); strings.Contains(text, "provider-secret") || strings.Contains(text, "payload-secret") || strings.Contains(text, "client-secret") || strings.Contains(text, "query-secret") {
		t.Errorf("records show what is hidden\n%s", out.String())
	}
	// A record that says more than its version can is refused.
	line, _, _ := strings.Cut(out.String(), "\n")
	if _, err := record.Decode([]byte(strings.Replace(line, `"version":2`, `"version":1`, 1))); err == nil || !strings.Contains(err.Error(), "only version 2") {
		t.Errorf("a record of version 1 with changes: %v", err)
	}
}

// verifying verifies tokens.
type verifying func(r *authz.Request) extauthz.Verified

func (f verifying) Claims(_ context.Context, _ *authz.Program, r *authz.Request) extauthz.Verified {
	return f(r)
}

// TestWhatWaitsIsBounded: what is bounded is what waits with a check, too: the changes
// of providers and the claims of its token; and at the outputs nothing of it waits.
func TestWhatWaitsIsBounded(t *testing.T) {
	t.Parallel()
	long := bytes.Repeat([]byte("v"), 4<<10)
	var list []*structpb.Value
	for range 100 {
		list = append(list, structpb.NewNumberValue(1))
	}
	request := &authz.Request{}
	for name, c := range map[string]struct {
		request authz.Request
		changed *authz.Changes
	}{
		"changes of a provider": {changed: &authz.Changes{Names: []string{"x-a"}, Headers: []authz.Header{{Name: "x-a", Value: long}}}},
		"names of headers":      {changed: &authz.Changes{Names: slices.Repeat([]string{"x-a"}, 100)}},
		"a path":                {changed: &authz.Changes{Path: long}},
		"changes of a token":    {request: authz.Request{Claims: &structpb.Struct{}, Token: &authz.Changes{Headers: []authz.Header{{Name: "x-a", Value: long}}}}},
		"claims": {request: authz.Request{Claims: &structpb.Struct{Fields: map[string]*structpb.Value{
			"a": structpb.NewStructValue(&structpb.Struct{Fields: map[string]*structpb.Value{"b": structpb.NewListValue(&structpb.ListValue{Values: list})}})}}}},
		"a claim": {request: authz.Request{Claims: &structpb.Struct{Fields: map[string]*structpb.Value{"a": structpb.NewStringValue(string(long))}}}},
	} {
		w := newService(t, record.Config{QueueBytes: 64 << 10, Outputs: []record.Output{record.Stream("x", io.Discard)}})
		add := func(n int, r *authz.Request, changed *authz.Changes) {
			for range n {
				w.r.Add(&extauthz.Record{Time: time.Now(), Workload: &cart, Request: r, Snapshot: w.snapshot, Program: w.snapshot.For(cart), Asked: []string{"opa"}, Changed: []*authz.Changes{changed}})
			}
		}
		lost := func() int {
			return int(testutil.ToFloat64(collector(t, w.reg, "signet_records_lost_total")))
		}
		if add(100, request, nil); lost() != 0 {
			t.Errorf("%s: %d of nothing are lost", name, lost())
		}
		if w.r.Waiting(); w.r.Bytes() != 0 {
			t.Errorf("%s: %d bytes wait where nothing does", name, w.r.Bytes())
		}
		if add(100, &c.request, c.changed); lost() < 80 {
			t.Errorf("%s: %d of 100 are lost", name, lost())
		}
		heads := w.r.Waiting()
		if len(heads) != 100-lost() || w.r.Bytes() != 0 {
			t.Errorf("%s: %d were recorded, %d lost; %d bytes wait", name, len(heads), lost(), w.r.Bytes())
		}
		for _, h := range heads {
			if h.Request.Claims != nil || h.Answers != nil || h.Workload.Pod != "cart-1" {
				t.Errorf("%s: there waits %+v", name, h)
			}
		}
	}
}
