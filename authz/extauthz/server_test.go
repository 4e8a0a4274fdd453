package extauthz_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/extauthz"
	"github.com/signet-mesh/signet/identity"
)

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	if _, err := extauthz.New(extauthz.Config{}); err == nil {
		t.Error("New took a config without policies")
	}
	r := prometheus.NewRegistry()
	for i := range 2 {
		if _, err := extauthz.New(extauthz.Config{Snapshot: fixed(nil), Metrics: r}); (err != nil) != (i == 1) {
			t.Errorf("New number %d with one registry: error %v", i+1, err)
		}
	}
}

// TestCheckDeniesWhatNobodyAsks: a CUSTOM policy that matches is no decision, and
// must not be taken for one.
func TestCheckDeniesWhatNobodyAsks(t *testing.T) {
	t.Parallel()
	w := newWorld(t, fixed(compile(t, `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: ask, namespace: default}
spec: {action: CUSTOM, provider: {name: opa}, rules: [{to: [{operation: {paths: [/ask]}}]}]}
`)))
	w.deny(check(path("/ask")), extauthz.ReasonNotAsked)
	w.allow(check(path("/other")))
	if n := w.metric("signet_extauthz_checks_total", "deny", "AuthorizationPolicy", "provider-not-asked"); n != 1 {
		t.Errorf("%v denied checks counted; want 1", n)
	}
	if log := w.log.String(); !strings.Contains(log, "default/ask") || !strings.Contains(log, "none is configured") {
		t.Errorf("the log does not say why: %s", log)
	}
}

// TestCheckRefusesATokenWith401 is what Istio's proxies answer.
func TestCheckRefusesATokenWith401(t *testing.T) {
	t.Parallel()
	w := newWorld(t, fixed(compile(t, `apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: tokens, namespace: default}
spec: {jwtRules: [{issuer: https://issuer.example, jwksUri: https://issuer.example/jwks}]}
`)))
	w.allow(check())
	answer, err := w.Check(as(server), check(func(a *authv3.AttributeContext) {
		a.Request.Http.HeaderMap = raw(":path", "/ok?q=1", ":method", "GET", ":authority", "server:8080", "authorization", "Bearer x.y.z")
	}))
	if err != nil {
		t.Fatal(err)
	}
	d := answer.GetDeniedResponse()
	if codes.Code(answer.GetStatus().GetCode()) != codes.Unauthenticated || d.GetStatus().GetCode() != 401 || d.GetBody() != "Jwt verification fails" ||
		answer.GetDynamicMetadata().GetFields()["reason"].GetStringValue() != "token-refused" {
		t.Errorf("answer %v", answer)
	}
}

func TestCheck(t *testing.T) {
	t.Parallel()
	policies := compile(t, policyText)

	t.Run("allows what the policies allow", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t, fixed(policies))
		w.allow(check())
		w.allow(check(joined))
		w.allow(check(path("/ok/x")))
		if s := w.log.String(); s != "" {
			t.Errorf("an allowed check was logged: %s", s)
		}
		if n := w.metric("signet_extauthz_checks_total", "allow", "AuthorizationPolicy", "allow-rule"); n != 3 {
			t.Errorf("%v allowed checks counted; want 3", n)
		}
		if n := w.metric("signet_extauthz_check_seconds"); n != 3 {
			t.Errorf("%v checks timed; want 3", n)
		}
	})

	t.Run("denies what the policies deny, and says why to the proxy and the log only", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t, fixed(policies))
		a, err := w.Check(as(server), check(path("/ok/secret?token=hunter2")))
		if err != nil {
			t.Fatal(err)
		}
		if err := isDenial(a, authz.ReasonDenyRule); err != nil {
			t.Error(err)
		}
		m := a.GetDynamicMetadata().AsMap()
		if m["kind"] != "AuthorizationPolicy" || m["policy"] != "default/deny-secret" || m["rule"] != 0.0 {
			t.Errorf("metadata %v; want the rule that denied", m)
		}
		line := w.log.String()
		for _, part := range []string{
			`msg="check denied"`, "pod_uid=uid-server", "spiffe_id=" + client, "method=GET", "path=/ok/secret ",
			"kind=AuthorizationPolicy", "policy=default/deny-secret", "rule=0", "reason=deny-rule",
		} {
			if !strings.Contains(line, part) {
				t.Errorf("the log has no %s: %s", part, line)
			}
		}
		if strings.Contains(line, "hunter2") {
			t.Errorf("the log has the query: %s", line)
		}
		if n := w.metric("signet_extauthz_checks_total", "deny", "AuthorizationPolicy", "deny-rule"); n != 1 {
			t.Errorf("%v denied checks counted; want 1", n)
		}
	})

	t.Run("denies other methods, peers and plaintext", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t, fixed(policies))
		w.deny(check(func(a *authv3.AttributeContext) { a.Request.Http.Method = "POST" }, path("/ok")), authz.ReasonNoAllowRule)
		w.deny(check(func(a *authv3.AttributeContext) { a.Source.Principal = client + "2" }), authz.ReasonNoAllowRule)
		w.deny(check(func(a *authv3.AttributeContext) { a.Source.Principal = "" }), authz.ReasonNoAllowRule)
	})

	t.Run("denies what cannot be known", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t, fixed(policies))
		w.deny(check(path("/ok!"), joined), authz.ReasonDenyUnknown)
		w.deny(check(func(a *authv3.AttributeContext) { a.Source.Principal = "CN=client" }), authz.ReasonAllowUnknown)
	})

	t.Run("decides connections by Istio's rules for TCP", func(t *testing.T) {
		t.Parallel()
		tcp := func(a *authv3.AttributeContext) { a.Request = nil }
		// The DENY rule reads the path, so without it it denies everything.
		newWorld(t, fixed(policies)).deny(check(tcp), authz.ReasonDenyRule)
		ports := newWorld(t, fixed(compile(t, `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: ports, namespace: default}
spec:
  rules:
  - to:
    - operation: {ports: ["8080"]}
`)))
		ports.allow(check(tcp))
		ports.deny(check(tcp, func(a *authv3.AttributeContext) { a.Destination.Address = socketAddress("10.0.0.2", 8081) }), authz.ReasonNoAllowRule)
	})

	t.Run("takes the destination from the proof, not from the request", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t, fixed(policies))
		other := server
		other.Labels = map[string]string{"app": "other"}
		claims := func(a *authv3.AttributeContext) { a.Destination.Labels = map[string]string{"app": "server"} }
		// The ALLOW policy does not select it, so nothing but the DENY holds.
		r := check(claims, func(a *authv3.AttributeContext) { a.Source.Principal = client + "2" })
		if a, err := w.Check(as(other), clone(r)); err != nil || a.GetOkResponse() == nil {
			t.Errorf("answer %v, error %v; want allowed", a, err)
		}
		if n := w.metric("signet_extauthz_label_differences_total"); n != 1 {
			t.Errorf("%v differences counted; want 1", n)
		}
		w.deny(r, authz.ReasonNoAllowRule)
		w.allow(check(func(a *authv3.AttributeContext) { a.Destination.Labels = nil }))
		if n := w.metric("signet_extauthz_label_differences_total"); n != 1 {
			t.Errorf("%v differences counted; want 1 still", n)
		}
	})

	t.Run("denies a destination address that contradicts the proof", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t, fixed(policies))
		at := func(ip string) *authv3.CheckRequest {
			return check(func(a *authv3.AttributeContext) { a.Destination.Address = socketAddress(ip, 8080) })
		}
		for _, ip := range []string{"10.0.0.2", "fd00::2", "::ffff:10.0.0.2", "127.0.0.1", "127.9.9.9", "::1"} {
			w.allow(at(ip))
		}
		for _, ip := range []string{"10.0.0.3", "fd00::3", "0.0.0.0", "::"} {
			w.deny(at(ip), extauthz.ReasonDestination)
		}
		w.allow(check(func(a *authv3.AttributeContext) { a.Destination.Address = pipe() }))
		w.allow(check(func(a *authv3.AttributeContext) { a.Destination.Address = internal() }))
		w.allow(check(func(a *authv3.AttributeContext) { a.Destination = nil }))
		mapped := server
		mapped.Addresses = []netip.Addr{netip.MustParseAddr("::ffff:10.0.0.9")}
		w.denyTo(mapped, at("10.0.0.2"), extauthz.ReasonDestination)
		unknown := server
		unknown.Addresses = nil
		for _, pod := range []struct {
			w  identity.Workload
			ip string
		}{{mapped, "10.0.0.9"}, {unknown, "10.0.0.3"}} {
			if a, err := w.Check(as(pod.w), at(pod.ip)); err != nil || a.GetOkResponse() == nil {
				t.Errorf("%s: answer %v, error %v; want allowed", pod.ip, a, err)
			}
		}
	})

	t.Run("refuses a caller who proved nothing", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t, fixed(policies))
		for _, ctx := range []context.Context{context.Background(), as(identity.Workload{})} {
			a, err := w.Check(ctx, check())
			if a != nil || status.Code(err) != codes.Unauthenticated {
				t.Errorf("answer %v, error %v; want Unauthenticated", a, err)
			}
		}
		if n := w.metric("signet_extauthz_unauthenticated_total"); n != 2 {
			t.Errorf("%v counted; want 2", n)
		}
	})

	t.Run("denies while there are no policies", func(t *testing.T) {
		t.Parallel()
		newWorld(t, fixed(nil)).deny(check(), authz.ReasonNoPolicies)
	})

	t.Run("denies when it panics", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t, func() *authz.Snapshot { panic("a defect") })
		w.deny(check(), extauthz.ReasonInternal)
		if n := w.metric("signet_extauthz_panics_total"); n != 1 {
			t.Errorf("%v panics counted; want 1", n)
		}
		if !strings.Contains(w.log.String(), "a defect") {
			t.Errorf("the log does not tell: %s", w.log)
		}
	})

	t.Run("logs malformed requests without what could forge or fill the log", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t, fixed(policies))
		w.deny(check(func(a *authv3.AttributeContext) {
			a.Source.Principal = strings.Repeat("p", 5000)
			a.Request.Http.Path = "/x\nmsg=forged" + strings.Repeat("y", 5000) + "?secret"
		}), extauthz.ReasonRequest)
		line := w.log.String()
		if len(line) > 4000 || strings.Count(line, "\n") != 1 || strings.Contains(line, "secret") {
			t.Errorf("%d bytes of log: %s", len(line), line)
		}
	})
}

func TestPeersAreRemembered(t *testing.T) {
	t.Parallel()
	w := newWorld(t, fixed(compile(t, policyText)))
	svid := certificate(t, "", nil, client)
	with := func(c string) *authv3.CheckRequest {
		return check(func(a *authv3.AttributeContext) { a.Source.Certificate = c })
	}
	for i := range 2*extauthz.MaxPeers + 10 {
		// PEM may have empty lines after it, so one certificate has many forms.
		w.allow(with(svid + strings.Repeat("%0A", i)))
		w.allow(with(svid))
		w.deny(with("x"), extauthz.ReasonCertificate)
		if n := extauthz.Peers(w.Server); n > 2*extauthz.MaxPeers {
			t.Fatalf("%d certificates are remembered; want at most %d", n, 2*extauthz.MaxPeers)
		}
	}
	w.deny(check(func(a *authv3.AttributeContext) { a.Source.Certificate, a.Source.Principal = svid, client+"2" }), extauthz.ReasonCertificate)
}

// serve serves w on l, with callers that are pod, and returns a client.
func serve(t testing.TB, s *extauthz.Server, pod *identity.Workload, l net.Listener, dial func(context.Context, string) (net.Conn, error)) authv3.AuthorizationClient {
	t.Helper()
	g := grpc.NewServer(grpc.ForceServerCodecV2(extauthz.Codec()), grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		if pod != nil {
			ctx = identity.WithCaller(ctx, identity.Caller{Workload: *pod})
		}
		return next(ctx, req)
	}))
	s.Register(g)
	done := make(chan error)
	go func() { done <- g.Serve(l) }()
	conn, err := grpc.NewClient("passthrough:///x", grpc.WithContextDialer(dial), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		g.Stop()
		<-done
	})
	return authv3.NewAuthorizationClient(conn)
}

func serveMemory(t testing.TB, s *extauthz.Server, pod *identity.Workload) authv3.AuthorizationClient {
	l := bufconn.Listen(1 << 20)
	return serve(t, s, pod, l, func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) })
}

func TestOverGRPC(t *testing.T) {
	t.Parallel()
	w := newWorld(t, fixed(compile(t, policyText)))
	c := serveMemory(t, w.Server, &server)
	if a, err := c.Check(t.Context(), check()); err != nil || a.GetOkResponse() == nil {
		t.Errorf("answer %v, error %v; want allowed", a, err)
	}
	a, err := c.Check(t.Context(), check(path("/ok/secret")))
	if err != nil {
		t.Fatalf("a denial is the error %v; want status OK", err)
	}
	if err := isDenial(a, authz.ReasonDenyRule); err != nil {
		t.Error(err)
	}
	if a, err := c.Check(t.Context(), &authv3.CheckRequest{}); err != nil || isDenial(a, extauthz.ReasonRequest) != nil {
		t.Errorf("answer %v, error %v; want a denial", a, err)
	}
	nobody := serveMemory(t, w.Server, nil)
	if _, err := nobody.Check(t.Context(), check()); status.Code(err) != codes.Unauthenticated {
		t.Errorf("error %v; want Unauthenticated", err)
	}
}

// TestPolicyChange swaps the policies under load: each answer is that of one of
// the snapshots, and after the swap has returned, of the new one.
func TestPolicyChange(t *testing.T) {
	t.Parallel()
	snapshots := []*authz.Snapshot{compile(t, policyText), compile(t, strings.ReplaceAll(policyText, "/ok", "/new"))}
	var current atomic.Pointer[authz.Snapshot]
	current.Store(snapshots[0])
	w := newWorld(t, current.Load)
	svid := certificate(t, "", nil, client)
	c := serveMemory(t, w.Server, &server)
	requests := []*authv3.CheckRequest{
		check(path("/ok"), func(a *authv3.AttributeContext) { a.Source.Certificate = svid }),
		check(path("/new"), func(a *authv3.AttributeContext) { a.Source.Certificate = svid }),
	}
	ask := func(i int) bool {
		a, err := c.Check(t.Context(), requests[i])
		if err != nil {
			t.Error(err)
		} else if a.GetOkResponse() == nil {
			if err := isDenial(a, authz.ReasonNoAllowRule); err != nil {
				t.Error(err)
			}
		}
		return a.GetOkResponse() != nil
	}
	stop := make(chan struct{})
	var group sync.WaitGroup
	for range 16 {
		group.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					ask(0)
					ask(1)
				}
			}
		})
	}
	for i := range 100 {
		now := i % 2
		current.Store(snapshots[now])
		if !ask(now) || ask(1-now) {
			t.Errorf("swap %d: an answer was not of the snapshot in force", i)
		}
	}
	close(stop)
	group.Wait()
}

func BenchmarkCheck(b *testing.B) {
	snapshot := compile(b, policyText)
	svid := certificate(b, "", nil, client)
	request := check(func(a *authv3.AttributeContext) {
		a.Source.Certificate = svid
		a.Request.Http.HeaderMap = raw(":authority", "server:8080", ":path", "/ok?q=1", ":method", "GET", ":scheme", "https",
			"user-agent", "curl/8.5.0", "accept", "*/*", "x-request-id", "5a3b1c9e-0000-4000-8000-000000000000", "x-forwarded-proto", "https")
	})
	refused := clone(request)
	path("/ok/secret")(refused.Attributes)

	s, err := extauthz.New(extauthz.Config{Snapshot: fixed(snapshot), Metrics: prometheus.NewRegistry()})
	if err != nil {
		b.Fatal(err)
	}
	for _, c := range []struct {
		name string
		r    *authv3.CheckRequest
	}{{"allow", request}, {"deny", refused}} {
		b.Run("process/"+c.name, func(b *testing.B) {
			ctx := as(server)
			message, err := proto.Marshal(c.r)
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				if _, err := s.Answer(ctx, message); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	for _, n := range []int{1, 64} {
		b.Run(fmt.Sprintf("socket/%d", n), func(b *testing.B) {
			path := filepath.Join(b.TempDir(), "s")
			l, err := net.Listen("unix", path)
			if err != nil {
				b.Fatal(err)
			}
			c := serve(b, s, &server, l, func(ctx context.Context, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", path)
			})
			if _, err := c.Check(b.Context(), request); err != nil {
				b.Fatal(err)
			}
			b.ResetTimer()
			var left atomic.Int64
			left.Store(int64(b.N))
			var group sync.WaitGroup
			for range n {
				group.Go(func() {
					for left.Add(-1) >= 0 {
						if a, err := c.Check(b.Context(), request); err != nil || a.GetOkResponse() == nil {
							b.Errorf("answer %v, error %v", a, err)
							return
						}
					}
				})
			}
			group.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "checks/s")
		})
	}
}
