package integration_test

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"

	"github.com/signet-mesh/signet/identity/attest/devissuer"
	"github.com/signet-mesh/signet/integration/envoytest"
)

var churn = flag.Duration("churn", 4*time.Second, "how long checks go on under churn of policies")

// edition is one version of the policies. Bit i of a mask is about the path /p{i}.
type edition struct {
	n         int
	allowed   uint8 // to w1, over mutual TLS
	denied    uint8 // to everybody
	plaintext uint8 // to everybody
	token     uint8 // to w1 by a token in the request
	tcp       bool  // bare connections are taken
}

func (e edition) yaml(world churnWorld) string {
	paths := func(mask uint8) string {
		list := []string{"/never"}
		for i := range 8 {
			if mask&(1<<i) != 0 {
				list = append(list, fmt.Sprintf("/p%d", i))
			}
		}
		return "[" + strings.Join(list, ", ") + "]"
	}
	tcp := ""
	if e.tcp {
		tcp = fmt.Sprintf("  - {to: [{operation: {ports: [%q]}}]}\n", world.tcpPort)
	}
	return fmt.Sprintf(`apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow, namespace: default}
spec:
  selector: {matchLabels: {app: w0}}
  rules:
  - {from: [{source: {principals: [cluster.local/ns/default/sa/w1]}}], to: [{operation: {methods: [GET], paths: %s}}]}
  - {to: [{operation: {methods: [GET], paths: %s}}]}
  - {from: [{source: {requestPrincipals: ["%s/system:serviceaccount:default:w1"]}}], to: [{operation: {methods: [GET], paths: %s}}]}
  - {to: [{operation: {paths: [/edition/%d]}}]}
%s---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny, namespace: default}
spec:
  action: DENY
  rules: # of a bare connection the port alone is read
  - {to: [{operation: {ports: [%q], paths: %s}}]}
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: tokens, namespace: default}
spec: {selector: {matchLabels: {app: w0}}, jwtRules: [{issuer: %q, jwksUri: %q}]}
`, paths(e.allowed), paths(e.plaintext), world.issuer, paths(e.token), e.n, tcp, world.inboundPort, paths(e.denied), world.issuer, world.jwks)
}

// churnWorld is what stays the same in all editions.
type churnWorld struct{ inboundPort, tcpPort, issuer, jwks string }

// allows is the decision of the edition about a path: for w1, for anybody else, and
// for a connection (path -1). The caller "token" is w1 with a token in its requests,
// "forged" has one that somebody else signed.
func (e edition) allows(who string, path int) bool {
	switch {
	case path < 0:
		return e.tcp
	case who == "forged":
		return false
	case e.denied&(1<<path) != 0:
		return false
	case e.plaintext&(1<<path) != 0:
		return true
	}
	return who == "w1" && e.allowed&(1<<path) != 0 || who == "token" && e.token&(1<<path) != 0
}

// history is when which edition may have been in force: from when it was written
// until the next one was seen to decide.
type history struct {
	mu       sync.Mutex
	editions []period // guarded by mu
	// away is when the agent was away; the last may go on.
	away []lifetime // guarded by mu
}

type period struct {
	edition
	lifetime
}

type lifetime struct{ from, to time.Time } // to is zero while it goes on

func (s lifetime) meets(from, to time.Time) bool {
	return !s.from.After(to) && (s.to.IsZero() || !s.to.Before(from))
}

// possible says which decisions are right for a request that lived so long: an
// edition that was in force meanwhile allows, one denies; and whether the agent
// was away.
func (h *history) possible(who string, path int, from, to time.Time) (allow, deny, away bool, editions int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, p := range h.editions {
		if p.meets(from, to) {
			editions++
			if p.allows(who, path) {
				allow = true
			} else {
				deny = true
			}
		}
	}
	for _, s := range h.away {
		away = away || s.meets(from, to)
	}
	return allow, deny, away, editions
}

// counts are what became of requests.
type counts struct {
	sure, during, allowed, denied, unanswered, late, wrong atomic.Int64
}

// TestNoWrongDecisionUnderChurn: clients of a real Envoy, over mutual TLS, plaintext,
// with tokens and over bare connections, while the policies change several times a
// second, the agent is restarted, orderly and not, and the server of the tokens' keys
// is away half of the time, also when the agent starts. Each answer has to be the decision of an edition of
// the policies that was in force while the request lived. No answer at all (403 without
// a reason, a closed connection) is allowed only while the agent is away, or where the
// proxy has waited for its whole timeout.
func TestNoWrongDecisionUnderChurn(t *testing.T) {
	tcpAddr, inbound := freeAddr(t), freeAddr(t)
	_, tcpPort, _ := net.SplitHostPort(tcpAddr)
	_, inboundPort, _ := net.SplitHostPort(inbound)
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "app") }))
	t.Cleanup(app.Close)
	echo := echoServer(t)

	// What the agent saves, keys of tokens among it, must be on a tmpfs.
	state, err := os.MkdirTemp("/dev/shm", "signet-churn-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(state) })
	var keys keyServer
	keysURL := httptest.NewServer(&keys)
	t.Cleanup(keysURL.Close)
	world := churnWorld{inboundPort, tcpPort, devissuer.DefaultURL, keysURL.URL + "/jwks"}
	s := newStandalone(t, programs(t), 3, edition{}.yaml(world), func(s *standalone) {
		keys.set = s.issuer.JWKS()
		s.before = func() {
			file := filepath.Join(s.dir, "signet-agent.yaml")
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			text := strings.Replace(string(b), `stateDir: ""`, "stateDir: "+state+"/state\nallowSwap: true", 1)
			text = strings.Replace(text, "policies: {", "policies: {keys: {refresh: 1s, allowPlaintext: true, allowAddresses: [127.0.0.1]}, ", 1)
			s.write("signet-agent.yaml", text+"checks: {denial: {reason: true}}\n")
		}
	})
	if s.issuer.URL() != world.issuer {
		t.Fatalf("the issuer is %s", s.issuer.URL())
	}
	stranger, err := devissuer.New(devissuer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	forged, err := stranger.Token(devissuer.Claims{Audience: []string{"api"}, Namespace: "default", ServiceAccount: "w1", Pod: "uid-w1", PodUID: "uid-w1", Node: "node-a", TTL: time.Hour}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	tokens := map[string]string{"token": s.token("api", "default", "w1", "uid-w1", "node-a"), "forged": forged}
	s.write("w0-token", s.token("signet", "default", "w0", "uid-w0", "node-a"))
	file := filepath.Join(s.dir, "envoy.yaml")
	if out, err := exec.Command(filepath.Join(s.bin, "signet"), "envoy", "bootstrap", "-o", file, "--socket", s.dir+"/sock/agent.sock", "--token-file", s.dir+"/w0-token",
		"--inbound", inbound, "--app", strings.TrimPrefix(app.URL, "http://")).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	addTCP(t, file, tcpAddr, echo)
	envoy := envoytest.Start(t, file)
	envoy.WaitReady(t)

	h := &history{editions: []period{{lifetime: lifetime{from: time.Now()}}}}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	start := time.Now()
	var got counts
	var group sync.WaitGroup
	certificates := map[string]*tls.Certificate{"w1": s.svid(t, 1), "w2": s.svid(t, 2)}
	s.untilTokensAreGood(t, inbound, tokens["token"])
	for i := range 64 {
		who := []string{"w1", "token", "w2", "", "w1", "token", "forged", ""}[i%8]
		group.Go(func() {
			if i%16 == 15 {
				got.connect(ctx, t, h, tcpAddr)
			} else {
				got.request(ctx, t, h, inbound, who, certificates[who], tokens[who])
			}
		})
	}
	writes := s.change(t, h, world, &keys)
	stop()
	group.Wait()
	t.Logf("note: %d answers in %s under %d editions of the policies and %d restarts of the agent: %d by the one edition in force, %d while it changed; %d allowed, %d denied, %d unanswered while the agent was away, %d because of the timeout, %d wrong; the keys were asked for %d times, of which %d in vain",
		got.sure.Load()+got.during.Load()+got.unanswered.Load(), time.Since(start).Round(time.Second), writes, len(h.away), got.sure.Load(), got.during.Load(), got.allowed.Load(), got.denied.Load(), got.unanswered.Load(), got.late.Load(), got.wrong.Load(), keys.asked.Load(), keys.refused.Load())
	if n := got.wrong.Load(); n > 0 {
		t.Errorf("%d wrong decisions", n)
	}
	if got.allowed.Load() == 0 || got.denied.Load() == 0 || got.sure.Load() == 0 {
		t.Error("too little happened for that to mean anything")
	}
}

// checkTimeout is how long the proxy waits for an answer. On a machine that does not get
// round to a process for so long the request is denied without one.
const checkTimeout = 3 * time.Second

// change writes editions, makes sure of each, and restarts the agent now and then, for
// the time of the flag, but never less than a few.
func (s *standalone) change(t *testing.T, h *history, world churnWorld, keys *keyServer) (written int) {
	client := authv3.NewAuthorizationClient(s.dial())
	calls := s.as(t.Context(), 0)
	end := time.Now().Add(*churn)
	for n := 1; n <= 8 || time.Now().Before(end); n++ {
		e := edition{n, uint8(rand.Uint32()), uint8(rand.Uint32() & rand.Uint32()), uint8(rand.Uint32() & rand.Uint32()), uint8(rand.Uint32()), rand.IntN(2) == 0}
		keys.away.Store(n/3%2 == 1)
		s.write("next.yaml", e.yaml(world))
		h.mu.Lock()
		h.editions = append(h.editions, period{e, lifetime{from: time.Now()}})
		h.mu.Unlock()
		if err := os.Rename(s.dir+"/next.yaml", s.dir+"/policies/policies.yaml"); err != nil {
			t.Error(err)
			return n
		}
		if n%12 == 6 {
			s.restart(t, h, []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL}[n/12%2])
		}
		for { // until the agent decides by it
			r, err := client.Check(calls, &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
				Source: &authv3.AttributeContext_Peer{}, Destination: &authv3.AttributeContext_Peer{},
				Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{Method: "GET", Path: fmt.Sprintf("/edition/%d", n), Host: "x"}},
			}}, grpc.WaitForReady(true))
			if err == nil && r.GetOkResponse() != nil {
				break
			}
			if t.Context().Err() != nil {
				t.Errorf("edition %d: %v", n, err)
				return n
			}
			time.Sleep(time.Millisecond) // others want the processor
		}
		seen := time.Now()
		h.mu.Lock()
		h.editions[len(h.editions)-2].to = seen
		h.mu.Unlock()
		written = n
		time.Sleep(time.Duration(50+rand.IntN(200)) * time.Millisecond) // of which the edition alone is in force
	}
	return written
}

func (s *standalone) restart(t *testing.T, h *history, sig syscall.Signal) {
	h.mu.Lock()
	h.away = append(h.away, lifetime{from: time.Now()})
	h.mu.Unlock()
	s.stop("signet-agent", sig)
	s.start("signet-agent")
	h.mu.Lock()
	// Envoy may still be waiting before its next attempt.
	h.away[len(h.away)-1].to = time.Now().Add(time.Second)
	h.mu.Unlock()
}

// judge counts an answer: allowed, denied, or none.
func (c *counts) judge(t *testing.T, h *history, who string, path int, from time.Time, allowed, denied bool, detail string) {
	to := time.Now()
	mayAllow, mayDeny, away, editions := h.possible(who, path, from, to)
	switch {
	case allowed && mayAllow, denied && mayDeny:
		if editions == 1 {
			c.sure.Add(1)
		} else {
			c.during.Add(1)
		}
		if allowed {
			c.allowed.Add(1)
		} else {
			c.denied.Add(1)
		}
	case !allowed && away:
		c.unanswered.Add(1)
	case !allowed && to.Sub(from) >= checkTimeout:
		c.late.Add(1)
	default:
		if c.wrong.Add(1) <= 5 {
			t.Errorf("%q asked for path %d from %s for %s: allowed %v, denied %v (%s); possible were allow %v, deny %v, by %d editions", who, path, from, to.Sub(from), allowed, denied, detail, mayAllow, mayDeny, editions)
		}
	}
}

// request asks for paths over one connection until ctx ends.
func (c *counts) request(ctx context.Context, t *testing.T, h *history, address, who string, certificate *tls.Certificate, token string) {
	transport := &http.Transport{MaxConnsPerHost: 1}
	defer transport.CloseIdleConnections()
	scheme := "http"
	if certificate != nil {
		scheme = "https"
		// Whom Envoy speaks as is not what is tested here.
		transport.TLSClientConfig = &tls.Config{Certificates: []tls.Certificate{*certificate}, InsecureSkipVerify: true}
	}
	client := &http.Client{Transport: transport, Timeout: time.Minute}
	for ctx.Err() == nil {
		path := rand.IntN(8)
		from := time.Now()
		resp, err := client.Do(bearing(ctx, fmt.Sprintf("%s://%s/p%d?q=1", scheme, address, path), token))
		if err != nil {
			t.Errorf("%q: %v", who, err)
			return
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		reason := resp.Header.Get("x-signet-reason")
		switch {
		case err != nil:
			t.Errorf("%q: %v", who, err)
			return
		case resp.StatusCode == 200 && string(body) == "app":
			c.judge(t, h, who, path, from, true, false, "200")
		case resp.StatusCode == 403:
			c.judge(t, h, who, path, from, false, who != "forged" && (reason == "deny-rule" || reason == "no-allow-rule"), "403 "+reason)
		case resp.StatusCode == 401:
			c.judge(t, h, who, path, from, false, who == "forged" && reason == "token-refused", "401 "+reason)
		default:
			t.Errorf("%q: status %d, %q", who, resp.StatusCode, body)
			return
		}
		time.Sleep(time.Duration(rand.IntN(40)) * time.Millisecond) // the load, not a synchronisation
	}
}

// bearing is a request with a token, if there is one. It is not given up when the test
// ends: an answer that is not waited for would not be judged.
func bearing(ctx context.Context, url, token string) *http.Request {
	r, err := http.NewRequestWithContext(context.WithoutCancel(ctx), http.MethodGet, url, nil)
	if err != nil {
		panic(err) // the URL is the test's own
	}
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	return r
}

// keyServer serves a key set, or answers 503.
type keyServer struct {
	set            []byte
	away           atomic.Bool
	asked, refused atomic.Int64
}

func (k *keyServer) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	k.asked.Add(1)
	if k.away.Load() {
		k.refused.Add(1)
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	_, _ = w.Write(k.set)
}

// untilTokensAreGood waits until the agent has the keys: before it has them for the
// first time it refuses every token.
func (s *standalone) untilTokensAreGood(t *testing.T, inbound, token string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		resp, err := http.DefaultClient.Do(bearing(t.Context(), "http://"+inbound+"/p0", token))
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusForbidden && resp.Header.Get("x-signet-reason") == "no-allow-rule" {
				return
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("a good token is still refused: %v, %v", resp, err)
		}
	}
}

// connect opens bare connections until ctx ends.
func (c *counts) connect(ctx context.Context, t *testing.T, h *history, address string) {
	for ctx.Err() == nil {
		from := time.Now()
		conn, err := net.DialTimeout("tcp", address, time.Minute)
		if err != nil {
			t.Error(err)
			return
		}
		_ = conn.SetDeadline(from.Add(time.Minute))
		_, err = conn.Write([]byte("x"))
		if err == nil {
			_, err = io.ReadFull(conn, make([]byte, 1))
		}
		conn.Close()
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() {
			t.Error(err)
			return
		}
		c.judge(t, h, "", -1, from, err == nil, err != nil, fmt.Sprint(err))
		time.Sleep(time.Duration(rand.IntN(60)) * time.Millisecond)
	}
}

// svid fetches the certificate of workload i, as its proxy would.
func (s *standalone) svid(t *testing.T, i int) *tls.Certificate {
	t.Helper()
	ctx, cancel := context.WithTimeout(s.as(t.Context(), i), time.Minute)
	defer cancel()
	r, err := fetch(ctx, s.dial(), "default")
	if err != nil {
		t.Fatal(err)
	}
	var secret tlsv3.Secret
	if err := r.GetResources()[0].UnmarshalTo(&secret); err != nil {
		t.Fatal(err)
	}
	bytesOf := func(d *corev3.DataSource) []byte { return d.GetInlineBytes() }
	c, err := tls.X509KeyPair(bytesOf(secret.GetTlsCertificate().GetCertificateChain()), bytesOf(secret.GetTlsCertificate().GetPrivateKey()))
	if err != nil {
		t.Fatal(err)
	}
	return &c
}

// echoServer answers each connection with what it sends.
func echoServer(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	group.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			group.Go(func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		group.Wait()
	})
	return l.Addr().String()
}

// addTCP adds a listener for bare connections, each decided by the agent, to a
// configuration of `signet envoy bootstrap`.
func addTCP(t *testing.T, file, address, upstream string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	socket := func(address string) string {
		host, port, _ := net.SplitHostPort(address)
		return fmt.Sprintf("{socket_address: {address: %s, port_value: %s}}", host, port)
	}
	before, after, ok := strings.Cut(string(b), "\n  clusters:\n")
	if !ok {
		t.Fatal("the configuration has no clusters")
	}
	listener := fmt.Sprintf(`
    - name: tcp
      address: %s
      filter_chains:
        - filters:
            - name: envoy.filters.network.ext_authz
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.filters.network.ext_authz.v3.ExtAuthz
                stat_prefix: tcp
                transport_api_version: V3
                failure_mode_allow: false
                grpc_service:
                  envoy_grpc: {cluster_name: signet-agent}
                  timeout: 3s
                  retry_policy: {retry_on: "unavailable,connect-failure,reset", num_retries: 60, retry_back_off: {base_interval: 0.05s, max_interval: 0.25s}}
            - name: envoy.filters.network.tcp_proxy
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
                stat_prefix: tcp
                cluster: echo
`, socket(address))
	cluster := fmt.Sprintf(`    - name: echo
      type: STATIC
      load_assignment:
        cluster_name: echo
        endpoints: [{lb_endpoints: [{endpoint: {address: %s}}]}]
`, socket(upstream))
	if err := os.WriteFile(file, []byte(before+listener+"\n  clusters:\n"+cluster+after), 0o600); err != nil {
		t.Fatal(err)
	}
}
