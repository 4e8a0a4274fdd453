package integration_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/extauthz"
	"github.com/signet-mesh/signet/authz/provider"
	"github.com/signet-mesh/signet/authz/record"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/integration/envoytest"
)

// authorizer is a gRPC provider that allows, but for paths that end in "no" and
// connections from nowhere.
type authorizer struct {
	authv3.UnimplementedAuthorizationServer
	mu    sync.Mutex
	asked []string
}

func (a *authorizer) Check(_ context.Context, r *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	h := r.GetAttributes().GetRequest().GetHttp()
	path := h.GetPath()
	for _, hv := range h.GetHeaderMap().GetHeaders() {
		if hv.GetKey() == ":path" {
			path = string(hv.GetRawValue())
		}
	}
	a.mu.Lock()
	a.asked = append(a.asked, path)
	a.mu.Unlock()
	if strings.HasSuffix(path, "no") {
		return &authv3.CheckResponse{Status: &statuspb.Status{Code: int32(codes.PermissionDenied)}, HttpResponse: &authv3.CheckResponse_DeniedResponse{
			DeniedResponse: &authv3.DeniedHttpResponse{Status: &typev3.HttpStatus{Code: 402}, Body: "pay first",
				Headers: []*corev3.HeaderValueOption{{Header: &corev3.HeaderValue{Key: "x-price", Value: "1"}}}}}}, nil
	}
	return &authv3.CheckResponse{Status: &statuspb.Status{}, HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{
		Headers:         []*corev3.HeaderValueOption{{Header: &corev3.HeaderValue{Key: "x-user", Value: "alice"}}},
		HeadersToRemove: []string{"x-secret"}}}}, nil
}

// asking is one kind of provider: a policy has it asked about /NAME and below.
type asking struct {
	name string
	spec provider.Spec
	// closed says that it never gives an answer that can be relied on, and status
	// what the client then gets.
	closed bool
	status int
}

func providerAt(t *testing.T, a net.Addr) provider.Address {
	t.Helper()
	host, port, err := net.SplitHostPort(a.String())
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	return provider.Address{Service: host, Port: n, Timeout: 10 * time.Second}
}

// speaking serves each connection by a function, until the test ends.
func speaking(t *testing.T, with func(c net.Conn)) provider.Address {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				with(c)
			}()
		}
	}()
	return providerAt(t, l.Addr())
}

// afterRequest answers a request of HTTP/1 with bytes, and closes.
func afterRequest(answer string) func(net.Conn) {
	return func(c net.Conn) {
		buf := make([]byte, 64<<10)
		for n := 0; !bytes.Contains(buf[:n], []byte("\r\n\r\n")); {
			m, err := c.Read(buf[n:])
			if err != nil {
				return
			}
			n += m
		}
		io.WriteString(c, answer)
	}
}

// TestProvidersBehindEnvoy: CUSTOM policies through a real Envoy, with providers of
// both kinds that answer, and with such that are slow, dead, lying or closing early:
// each of those closes what it is asked about, and nothing else. The records of it
// all are decided again.
func TestProvidersBehindEnvoy(t *testing.T) {
	t.Parallel()
	g := &authorizer{}
	gs := grpc.NewServer()
	authv3.RegisterAuthorizationServer(gs, g)
	gl, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go gs.Serve(gl)
	t.Cleanup(gs.Stop)

	var mu sync.Mutex
	var got *http.Request
	var gotBody string
	hs := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		mu.Lock()
		got, gotBody = r.Clone(context.Background()), string(b)
		mu.Unlock()
		rw.Header().Set("X-User", "bob")
		rw.Header().Add("Set-Cookie", "a=1")
		rw.Header().Add("Set-Cookie", "b=2")
		switch {
		case strings.HasSuffix(r.URL.Path, "no"):
			rw.Header().Set("Location", "https://login.example/")
			rw.WriteHeader(302)
		case strings.HasSuffix(r.URL.Path, "401"):
			rw.Header().Set("WWW-Authenticate", "Basic")
			rw.WriteHeader(401)
			io.WriteString(rw, "who are you")
		case strings.HasSuffix(r.URL.Path, "500"):
			rw.WriteHeader(500)
		}
	}))
	t.Cleanup(hs.Close)
	httpAddress := providerAt(t, hs.Listener.Addr())
	httpAddress.IncludeRequestBodyInCheck = &provider.Body{MaxRequestBytes: 16}

	stuck := func(c net.Conn) { io.Copy(io.Discard, c) }
	short := func(a provider.Address) provider.Address { a.Timeout = 200 * time.Millisecond; return a }
	unavailable := func(a provider.Address) provider.Address { a.StatusOnError = "503"; return a }
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead := providerAt(t, gone.Addr())
	gone.Close()
	grpcOf := func(a provider.Address) provider.Spec { return provider.Spec{GRPC: &provider.GRPC{Address: a}} }
	httpOf := func(a provider.Address) provider.Spec { return provider.Spec{HTTP: &provider.HTTP{Address: a}} }
	all := []asking{
		{name: "grpc", spec: grpcOf(providerAt(t, gl.Addr()))},
		{name: "http", spec: provider.Spec{HTTP: &provider.HTTP{Address: httpAddress, PathPrefix: "/check", IncludeRequestHeadersInCheck: []string{"x-ask*"},
			HeadersToUpstreamOnAllow: []string{"x-user"}, HeadersToDownstreamOnAllow: []string{"set-cookie"}}}},
		{"grpc-slow", grpcOf(short(speaking(t, stuck))), true, 403},
		{"http-slow", httpOf(short(speaking(t, stuck))), true, 403},
		{"grpc-dead", grpcOf(unavailable(dead)), true, 503},
		{"http-dead", httpOf(unavailable(dead)), true, 503},
		{"grpc-closing", grpcOf(speaking(t, func(c net.Conn) {})), true, 403},
		{"http-closing", httpOf(speaking(t, afterRequest(""))), true, 403},
		{"grpc-garbage", grpcOf(speaking(t, func(c net.Conn) { io.WriteString(c, strings.Repeat("garbage\x00", 100)) })), true, 403},
		{"http-garbage", httpOf(speaking(t, afterRequest("garbage\r\n\r\n"))), true, 403},
		{"http-torn", httpOf(speaking(t, afterRequest("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc"))), true, 403},
		{"http-huge", httpOf(speaking(t, afterRequest("HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"+strings.Repeat("x", 1_000_000)))), true, 403},
		{"http-upgrade", httpOf(speaking(t, afterRequest("HTTP/1.1 101 Go\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"))), true, 403},
		{"http-as-grpc", grpcOf(providerAt(t, hs.Listener.Addr())), true, 403},
	}
	var text strings.Builder
	var specs []provider.Spec
	for i, a := range all {
		a.spec.Name = a.name
		specs = append(specs, a.spec)
		fmt.Fprintf(&text, "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: ask-%d, namespace: default}\n"+
			"spec: {action: CUSTOM, provider: {name: %s}, rules: [{to: [{operation: {paths: [\"/%s\", \"/%s/*\"]}}]}]}\n", i, a.name, a.name, a.name)
	}
	text.WriteString(`---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nobody, namespace: default}
spec: {action: CUSTOM, provider: {name: nobody}, rules: [{to: [{operation: {paths: [/nobody]}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny, namespace: default}
spec: {action: DENY, rules: [{to: [{operation: {paths: ["*/denied"]}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow, namespace: default}
spec: {rules: [{to: [{operation: {methods: [GET, POST]}}]}]}
`)
	rs, problems := authz.Parse("p.yaml", []byte(text.String()))
	for _, p := range problems {
		if p.Severity == authz.SeverityError {
			t.Fatal(p)
		}
	}
	set, _ := authz.Set{}.Update(rs)
	snapshot, _ := authz.Compile(set, authz.Options{MultipleProviders: true})
	p, err := provider.New(provider.Config{Providers: specs})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	var records bytes.Buffer
	recorder, err := record.New(record.Config{Outputs: []record.Output{record.Stream("test", &records)}, Allowed: 1, AllowedPerSecond: 10000})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	recorded := make(chan error, 1)
	go func() { recorded <- recorder.Run(ctx) }()
	checks, err := extauthz.New(extauthz.Config{Snapshot: func() *authz.Snapshot { return snapshot }, Providers: p, Records: recorder})
	if err != nil {
		t.Fatal(err)
	}
	socket := serveChecks(t, checks)

	// The application tells what reached it.
	app := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(rw, "user=%s secret=%s", r.Header.Get("X-User"), r.Header.Get("X-Secret"))
	}))
	t.Cleanup(app.Close)
	file := filepath.Join(t.TempDir(), "envoy.yaml")
	if err := os.WriteFile(file, []byte(customEnvoy(socket, app.Listener.Addr().String())), 0o600); err != nil {
		t.Fatal(err)
	}
	envoy := envoytest.Start(t, file)
	envoy.WaitReady(t)
	at := envoy.Listener(t, "http")
	client := &http.Client{Timeout: time.Minute, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	ask := func(method, path, body string) (status int, text string, h http.Header) {
		t.Helper()
		r, err := http.NewRequest(method, "http://"+at+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header = http.Header{"X-Secret": {"s"}, "X-User": {"mallory"}, "X-Ask": {"please"}, "Authorization": {"Bearer t"}}
		res, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, string(b), res.Header
	}
	// want asks and compares, and returns the headers of the answer.
	want := func(path string, status int, text string) http.Header {
		t.Helper()
		s, b, h := ask("GET", path, "")
		if s != status || b != text {
			t.Errorf("%s: %d %q; want %d %q", path, s, b, status, text)
		}
		return h
	}
	const denied = "RBAC: access denied"

	// Providers that answer, in order.
	want("/", 200, "user=mallory secret=s")
	want("/denied", 403, denied)
	want("/grpc/yes?q=1", 200, "user=alice secret=")
	want("/grpc/denied", 403, denied)
	if h := want("/grpc/no", 402, "pay first"); h.Get("X-Price") != "1" {
		t.Errorf("headers %v", h)
	}
	if s, _, _ := ask("PUT", "/grpc/yes", ""); s != 403 {
		t.Errorf("a method that ALLOW does not have: %d", s)
	}
	g.mu.Lock()
	if a := strings.Join(g.asked, " "); a != "/grpc/yes?q=1 /grpc/denied /grpc/no /grpc/yes" {
		t.Errorf("asked about %s", a)
	}
	g.mu.Unlock()
	if h := want("/http/yes?q=%2f", 200, "user=bob secret=s"); strings.Join(h["Set-Cookie"], " ") != "a=1 b=2" {
		t.Errorf("headers %v", h)
	}
	mu.Lock()
	if got == nil {
		t.Fatal("the HTTP provider was not asked")
	}
	if got.RequestURI != "/check/http/yes?q=%2f" || got.Host != at || got.Header.Get("Authorization") != "Bearer t" || got.Header.Get("X-Ask") != "please" || got.Header.Get("X-Secret") != "" {
		t.Errorf("the provider got %s %s %v", got.Host, got.RequestURI, got.Header)
	}
	mu.Unlock()
	want("/http/denied", 403, denied)
	if h := want("/http/no", 302, ""); h.Get("Location") != "https://login.example/" || strings.Join(h["Set-Cookie"], " ") != "a=1 b=2" {
		t.Errorf("headers %v", h)
	}
	if h := want("/http/401", 401, "who are you"); h.Get("WWW-Authenticate") != "Basic" {
		t.Errorf("headers %v", h)
	}
	want("/http/500", 403, denied)
	if s, b, _ := ask("POST", "/http/yes", "0123456789abcdef"); s != 200 || gotBody != "0123456789abcdef" {
		t.Errorf("%d %q, the provider got %q", s, b, gotBody)
	}
	if s, _, _ := ask("POST", "/http/yes", "0123456789abcdef+"); s != 403 {
		t.Errorf("a body that is too large: %d", s)
	}
	want("/nobody", 403, denied)

	// Providers that do not: closed each time, for ALLOW and DENY alike, also where
	// many ask at once, and whatever does not ask them goes on.
	closed := 0
	var many sync.WaitGroup
	for _, a := range all {
		if !a.closed {
			continue
		}
		for range 3 {
			many.Go(func() {
				for _, path := range []string{"/" + a.name, "/" + a.name + "/denied"} {
					if s, b, _ := ask("GET", path, ""); s != a.status || strings.Contains(b, "user=") {
						t.Errorf("%s: %d %q; want %d", path, s, b, a.status)
					}
				}
			})
			closed += 2
		}
	}
	many.Wait()
	want("/", 200, "user=mallory secret=s")
	want("/grpc/yes", 200, "user=alice secret=")

	// A bare connection: the gRPC provider and the others are asked in the order of
	// their names, and the first that fails ends it.
	c, err := net.Dial("tcp", envoy.Listener(t, "tcp"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	if b, err := io.ReadAll(c); len(b) > 0 || err != nil && !errors.Is(err, io.EOF) && !strings.Contains(err.Error(), "reset") {
		t.Errorf("the connection got %q, %v", b, err)
	}

	cancel()
	if err := <-recorded; err != nil {
		t.Fatal(err)
	}
	counts := map[authz.Reason]int{}
	for r, err := range record.Read(&records) {
		if err != nil {
			t.Fatal(err)
		}
		counts[r.Reason]++
		if d, ok := record.Replay(snapshot.For(r.Workload), &r); !ok || d.Allowed != r.Allowed || d.Reason != r.Reason || d.Policy != r.Policy {
			t.Errorf("decided again: %+v; the record: %+v", d, r)
		}
		if bytes.Contains(r.Append(nil, record.Shown{AllHeaders: true, Query: true}), []byte("Bearer t")) {
			t.Error("a record shows a token")
		}
	}
	t.Logf("%d closed; records: %v", closed, counts)
	if counts[extauthz.ReasonProviderFailed] != closed+3 || counts[extauthz.ReasonProviderDenied] != 3 || counts[extauthz.ReasonProviderUnknown] != 1 ||
		counts[authz.ReasonDenyRule] != 3 || counts[authz.ReasonAllowRule] != 6 || counts[authz.ReasonNoAllowRule] != 1 {
		t.Errorf("%d closed; records: %v", closed, counts)
	}
}

// customEnvoy is the bootstrap of an Envoy that has every request, and every
// connection, checked.
func customEnvoy(socket, app string) string {
	host, port, _ := net.SplitHostPort(app)
	return fmt.Sprintf(`
node: {id: e, cluster: e}
static_resources:
  listeners:
  - name: http
    address: {socket_address: {address: 127.0.0.1, port_value: 0}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: http
          normalize_path: true
          http_filters:
          - name: envoy.filters.http.ext_authz
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz
              transport_api_version: V3
              encode_raw_headers: true
              failure_mode_allow: false
              with_request_body: {max_request_bytes: 1024, allow_partial_message: true, pack_as_bytes: true}
              grpc_service: {envoy_grpc: {cluster_name: agent}, timeout: 20s}
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
          route_config:
            virtual_hosts:
            - {name: all, domains: ["*"], routes: [{match: {prefix: "/"}, route: {cluster: app}}]}
  - name: tcp
    address: {socket_address: {address: 127.0.0.1, port_value: 0}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.ext_authz
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.ext_authz.v3.ExtAuthz
          stat_prefix: tcp
          transport_api_version: V3
          grpc_service: {envoy_grpc: {cluster_name: agent}, timeout: 20s}
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: tcp
          cluster: app
  clusters:
  - name: agent
    connect_timeout: 5s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    load_assignment: {cluster_name: agent, endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: %q}}}}]}]}
  - name: app
    connect_timeout: 5s
    load_assignment: {cluster_name: app, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: %s, port_value: %s}}}}]}]}
`, socket, host, port)
}

// TestAgentAsksAndRecords: the program does both as it is configured, and goes on
// with the file of records that a crash has torn.
func TestAgentAsksAndRecords(t *testing.T) {
	t.Parallel()
	gs := grpc.NewServer()
	authv3.RegisterAuthorizationServer(gs, &authorizer{})
	gl, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go gs.Serve(gl)
	t.Cleanup(gs.Stop)
	file := filepath.Join(t.TempDir(), "decisions.jsonl")
	a := providerAt(t, gl.Addr())
	s := newStandalone(t, programs(t), 1, `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: ask, namespace: default}
spec: {action: CUSTOM, provider: {name: them}, rules: [{}]}
`, func(s *standalone) {
		s.before = func() {
			b, err := os.ReadFile(filepath.Join(s.dir, "signet-agent.yaml"))
			if err != nil {
				t.Fatal(err)
			}
			s.write("signet-agent.yaml", string(b)+fmt.Sprintf("extensionProviders: [{name: them, envoyExtAuthzGrpc: {service: %s, port: %d, timeout: 10s}}]\nrecords: {file: %s, allowed: 1}\n",
				a.Service, a.Port, file))
		}
	})
	client := authv3.NewAuthorizationClient(s.dial())
	check := func(path string, code codes.Code) {
		t.Helper()
		ctx, cancel := context.WithTimeout(s.as(t.Context(), 0), time.Minute)
		defer cancel()
		r, err := client.Check(ctx, &authv3.CheckRequest{Attributes: &authv3.AttributeContext{Source: &authv3.AttributeContext_Peer{},
			Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{Method: "GET", Path: path, Host: "w0"}}}}, grpc.WaitForReady(true))
		if err != nil || codes.Code(r.GetStatus().GetCode()) != code {
			t.Errorf("%s: %v, %v; want %s", path, r, err, code)
		}
	}
	lines := func(n int) string {
		t.Helper()
		for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
			b, err := os.ReadFile(file)
			if err == nil && bytes.Count(b, []byte("\n")) >= n {
				return string(b)
			}
			if time.Now().After(end) {
				t.Fatalf("%v: %s", err, b)
			}
		}
	}
	check("/yes", codes.OK)
	check("/no", codes.PermissionDenied)
	whole := lines(2)
	s.stop("signet-agent", syscall.SIGKILL)
	if err := os.WriteFile(file, []byte(whole+whole[:100]), 0o600); err != nil {
		t.Fatal(err)
	}
	s.start("signet-agent")
	check("/no", codes.PermissionDenied)
	var good, torn int
	for r, err := range record.Read(strings.NewReader(lines(4))) {
		if err != nil {
			torn++
			continue
		}
		good++
		if r.Workload.ServiceAccount != "w0" || r.Generation == 0 || len(r.Answers) != 1 || r.Answers[0].Provider != "them" || r.Answers[0].Allowed != r.Allowed ||
			r.Allowed != (string(r.Request.Path) == "/yes") {
			t.Errorf("record %+v", r)
		}
	}
	if good != 3 || torn != 1 {
		t.Errorf("%d records and %d torn lines", good, torn)
	}
}

// serveChecks answers checks on a socket, as those of one workload, until the test ends.
func serveChecks(t *testing.T, checks *extauthz.Server) (socket string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "checks") // not TempDir: the path of a socket is at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket = filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.ForceServerCodecV2(extauthz.Codec()), grpc.UnaryInterceptor(func(ctx context.Context, m any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
		return h(identity.WithCaller(ctx, identity.Caller{Workload: identity.Workload{Namespace: "default", ServiceAccount: "server", PodUID: "u"}}), m)
	}))
	checks.Register(s)
	go s.Serve(l)
	t.Cleanup(s.Stop)
	return socket
}
