package peers

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"testing"

	"github.com/casbin/casbin/v2"
	casbinmodel "github.com/casbin/casbin/v2/model"
	"github.com/cedar-policy/cedar-go"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/internal/transport"
	"google.golang.org/grpc/internal/xds/rbac"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// The policies: each allows three clients to POST below a path of its own. Every
// engine gets them in the form that its documentation shows for that.
const clients = 3

func client(policy, n int) string {
	return fmt.Sprintf("cluster.local/ns/default/sa/client-%d-%d", policy, n)
}

func prefix(policy int) string { return fmt.Sprintf("/api/v1/things/%d/", policy) }

// question is one request.
type question struct {
	principal, path string
	allowed         bool
}

// questions are one that a policy in the middle allows, and two that no policy does:
// of a client that is known, and of one that is not.
func questions(policies int) map[string]question {
	return map[string]question{
		"hit":     {client(policies/2, 1), prefix(policies/2) + "x", true},
		"miss":    {client(policies/3, 0), "/api/v1/other", false},
		"unknown": {"cluster.local/ns/default/sa/nobody", prefix(policies / 2), false},
	}
}

// An engine loads n policies. What it returns turns a question into the engine's own
// request, which is not measured, and that into a function that decides, which is.
type engine struct {
	name string
	load func(tb testing.TB, policies int) func(q question) (decide func() bool)
	// most is how many policies it can load in reasonable time.
	most int
}

var engines = []engine{
	{"signet", loadSignet, 100_000},
	{"grpc-rbac", loadGRPC, 10_000},
	{"cedar", loadCedar, 10_000},
	{"opa", loadOPA, 1_000},
	{"opa-data", loadOPAData, 10_000},
	{"casbin", loadCasbin, 10_000},
}

func loadSignet(tb testing.TB, policies int) func(question) func() bool {
	var b strings.Builder
	for i := range policies {
		var principals []string
		for j := range clients {
			principals = append(principals, client(i, j))
		}
		fmt.Fprintf(&b, "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p%d, namespace: default}\n"+
			"spec: {rules: [{from: [{source: {principals: [%s]}}], to: [{operation: {methods: [POST], paths: ['%s*']}}]}]}\n",
			i, strings.Join(principals, ", "), prefix(i))
	}
	var resources []authz.Resource
	for n, part := 0, b.String(); part != ""; n++ {
		// A file has at most 65,536 documents.
		cut := min(len(part), 16<<20)
		if i := strings.Index(part[cut:], "---\n"); i >= 0 {
			cut += i
		} else {
			cut = len(part)
		}
		rs, problems := authz.Parse(fmt.Sprintf("p%d.yaml", n), []byte(part[:cut]))
		if len(problems) > 0 {
			tb.Fatal(problems[0])
		}
		resources, part = append(resources, rs...), part[cut:]
	}
	set, problems := authz.Set{}.Update(resources)
	if len(problems) > 0 {
		tb.Fatal(problems[0])
	}
	snapshot, problems := authz.Compile(set, authz.Options{})
	if len(problems) > 0 {
		tb.Fatal(problems[0])
	}
	program := snapshot.For(identity.Workload{Namespace: "default"})
	return func(q question) func() bool {
		r := &authz.Request{
			Known: authz.FieldsHTTP, HTTP: true, Authenticated: true, Principal: []byte("spiffe://" + q.principal),
			SourceIP: netip.MustParseAddr("10.0.0.1"), DestinationPort: 8080,
			Method: []byte("POST"), Path: []byte(q.path), Host: []byte("things"),
		}
		return func() bool { return program.Decide(r).Allowed }
	}
}

func exact(s string) *matcherv3.StringMatcher {
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: s}}
}

// loadGRPC is the RBAC engine of grpc-go, which is Envoy's in Go, with the filter that
// Istio makes of such policies.
func loadGRPC(tb testing.TB, policies int) func(question) func() bool {
	config := &rbacv3.RBAC{Action: rbacv3.RBAC_ALLOW, Policies: make(map[string]*rbacv3.Policy)}
	for i := range policies {
		var ids []*rbacv3.Principal
		for j := range clients {
			ids = append(ids, &rbacv3.Principal{Identifier: &rbacv3.Principal_Authenticated_{Authenticated: &rbacv3.Principal_Authenticated{
				PrincipalName: exact("spiffe://" + client(i, j))}}})
		}
		config.Policies[fmt.Sprintf("ns[default]-policy[p%d]-rule[0]", i)] = &rbacv3.Policy{
			Principals: []*rbacv3.Principal{{Identifier: &rbacv3.Principal_OrIds{OrIds: &rbacv3.Principal_Set{Ids: ids}}}},
			Permissions: []*rbacv3.Permission{{Rule: &rbacv3.Permission_AndRules{AndRules: &rbacv3.Permission_Set{Rules: []*rbacv3.Permission{
				{Rule: &rbacv3.Permission_Header{Header: &routev3.HeaderMatcher{Name: ":method",
					HeaderMatchSpecifier: &routev3.HeaderMatcher_ExactMatch{ExactMatch: "POST"}}}},
				{Rule: &rbacv3.Permission_UrlPath{UrlPath: &matcherv3.PathMatcher{Rule: &matcherv3.PathMatcher_Path{
					Path: &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: prefix(i)}}}}}},
			}}}}},
		}
	}
	chain, err := rbac.NewChainEngine([]*rbacv3.RBAC{config}, "")
	if err != nil {
		tb.Fatal(err)
	}
	return func(q question) func() bool {
		id, err := url.Parse("spiffe://" + q.principal)
		if err != nil {
			tb.Fatal(err)
		}
		addr := &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: 8080}
		ctx := peer.NewContext(context.Background(), &peer.Peer{Addr: addr, LocalAddr: addr, AuthInfo: credentials.TLSInfo{
			State: tls.ConnectionState{PeerCertificates: []*x509.Certificate{{URIs: []*url.URL{id}}}}}})
		ctx = metadata.NewIncomingContext(ctx, metadata.MD{":authority": {"things"}})
		ctx = grpc.NewContextWithServerTransportStream(ctx, stream{q.path})
		ctx = transport.SetConnection(ctx, conn{addr: addr})
		return func() bool { return chain.IsAuthorized(ctx) == nil }
	}
}

// stream tells grpc-go the path of a call, and conn where it came in.
type stream struct{ method string }

func (s stream) Method() string               { return s.method }
func (s stream) SetHeader(metadata.MD) error  { return nil }
func (s stream) SendHeader(metadata.MD) error { return nil }
func (s stream) SetTrailer(metadata.MD) error { return nil }

type conn struct {
	net.Conn
	addr net.Addr
}

func (c conn) LocalAddr() net.Addr { return c.addr }

func loadCedar(tb testing.TB, policies int) func(question) func() bool {
	var b strings.Builder
	for i := range policies {
		for j := range clients {
			fmt.Fprintf(&b, "permit (principal == Workload::%q, action == Action::\"POST\", resource) when { context.path like %q };\n", client(i, j), prefix(i)+"*")
		}
	}
	set, err := cedar.NewPolicySetFromBytes("p.cedar", []byte(b.String()))
	if err != nil {
		tb.Fatal(err)
	}
	return func(q question) func() bool {
		r := cedar.Request{
			Principal: cedar.NewEntityUID("Workload", cedar.String(q.principal)), Action: cedar.NewEntityUID("Action", "POST"),
			Resource: cedar.NewEntityUID("Service", "things"), Context: cedar.NewRecord(cedar.RecordMap{"path": cedar.String(q.path)}),
		}
		return func() bool {
			d, _ := cedar.Authorize(set, cedar.EntityMap{}, r)
			return bool(d)
		}
	}
}

// loadOPA is a mesh policy in Rego with a rule for each client, which OPA's index of
// rules is made for.
func loadOPA(tb testing.TB, policies int) func(question) func() bool {
	var b strings.Builder
	b.WriteString("package mesh\n\ndefault allow := false\n")
	for i := range policies {
		for j := range clients {
			fmt.Fprintf(&b, "allow if {\n\tinput.principal == %q\n\tinput.method == \"POST\"\n\tstartswith(input.path, %q)\n}\n", client(i, j), prefix(i))
		}
	}
	return prepare(tb, b.String())
}

// loadOPAData is a mesh policy in Rego that walks over data.
func loadOPAData(tb testing.TB, policies int) func(question) func() bool {
	type rule struct {
		Principals []string `json:"principals"`
		Prefix     string   `json:"prefix"`
	}
	var rules []rule
	for i := range policies {
		r := rule{Prefix: prefix(i)}
		for j := range clients {
			r.Principals = append(r.Principals, client(i, j))
		}
		rules = append(rules, r)
	}
	j, err := json.Marshal(map[string]any{"rules": rules})
	if err != nil {
		tb.Fatal(err)
	}
	var data map[string]any
	if err := json.Unmarshal(j, &data); err != nil {
		tb.Fatal(err)
	}
	return prepare(tb, `package mesh

default allow := false
allow if {
	input.method == "POST"
	some rule in data.rules
	input.principal in rule.principals
	startswith(input.path, rule.prefix)
}
`, rego.Store(inmem.NewFromObject(data)))
}

func prepare(tb testing.TB, module string, options ...func(*rego.Rego)) func(question) func() bool {
	ctx := context.Background()
	query, err := rego.New(append(options, rego.Query("data.mesh.allow"), rego.Module("mesh.rego", module))...).PrepareForEval(ctx)
	if err != nil {
		tb.Fatal(err)
	}
	return func(q question) func() bool {
		input, err := ast.InterfaceToValue(map[string]any{"principal": q.principal, "method": "POST", "path": q.path})
		if err != nil {
			tb.Fatal(err)
		}
		return func() bool {
			rs, err := query.Eval(ctx, rego.EvalParsedInput(input))
			return err == nil && rs.Allowed()
		}
	}
}

func loadCasbin(tb testing.TB, policies int) func(question) func() bool {
	m, err := casbinmodel.NewModelFromString(`
[request_definition]
r = sub, obj, act
[policy_definition]
p = sub, obj, act
[policy_effect]
e = some(where (p.eft == allow))
[matchers]
m = r.sub == p.sub && keyMatch(r.obj, p.obj) && r.act == p.act
`)
	if err != nil {
		tb.Fatal(err)
	}
	e, err := casbin.NewEnforcer(m)
	if err != nil {
		tb.Fatal(err)
	}
	var lines [][]string
	for i := range policies {
		for j := range clients {
			lines = append(lines, []string{client(i, j), prefix(i) + "*", "POST"})
		}
	}
	if _, err := e.AddPolicies(lines); err != nil {
		tb.Fatal(err)
	}
	return func(q question) func() bool {
		r := []any{q.principal, q.path, "POST"}
		return func() bool {
			ok, err := e.Enforce(r...)
			return err == nil && ok
		}
	}
}

// TestEnginesAgree keeps the benchmark honest: all engines decide alike.
func TestEnginesAgree(t *testing.T) {
	for _, e := range engines {
		t.Run(e.name, func(t *testing.T) {
			ask := e.load(t, 100)
			for name, q := range questions(100) {
				if got := ask(q)(); got != q.allowed {
					t.Errorf("%s: allowed %v", name, got)
				}
			}
		})
	}
}

// BenchmarkEngines measures one decision of each engine. The names are such that
// integration/bench prints how many times the one named signet each takes.
func BenchmarkEngines(b *testing.B) {
	for _, e := range engines {
		for _, policies := range []int{100, 1_000, 10_000, 100_000} {
			if policies > e.most {
				continue
			}
			// Loading is done once, and only where something of it runs.
			var ask func(question) func() bool
			for _, name := range []string{"hit", "miss", "unknown"} {
				b.Run(fmt.Sprintf("engine=%s/policies=%d/%s", e.name, policies, name), func(b *testing.B) {
					if ask == nil {
						ask = e.load(b, policies)
					}
					q := questions(policies)[name]
					decide := ask(q)
					if decide() != q.allowed {
						b.Fatal("decides otherwise")
					}
					b.ReportAllocs()
					for b.Loop() {
						decide()
					}
				})
			}
		}
	}
}
