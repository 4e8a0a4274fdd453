package main

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/integration/envoytest"
)

const clientID = "spiffe://cluster.local/ns/default/sa/client"

// TestBootstrapRunsInEnvoy is the picture that a user has: an application behind
// one Envoy, a client behind another, both with the configuration that the command
// printed, and on each socket an agent, here a small one whose answers are known.
func TestBootstrapRunsInEnvoy(t *testing.T) {
	t.Parallel()
	envoytest.Path(t)
	authority := newFakeAuthority(t)
	app := newApp(t)

	serverDir, clientDir := newPod(t), newPod(t)
	serverDir.swap(t, "server-token-1")
	clientDir.swap(t, "client-token-1")
	agent := &fakeAgent{authority: authority, socket: filepath.Join(serverDir.path, "agent.sock"), ids: map[string]string{
		"server-token-1": serverID, "server-token-2": serverID, "server-token-3": serverID,
		"client-token-1": clientID,
	}}
	agent.start(t)

	server := envoytest.Start(t, serverDir.bootstrap(t, agent, "--inbound", "127.0.0.1:0", "--app", app.address, "--access-log", "--label", "app=server"))
	server.WaitReady(t)
	inbound := server.Listener(t, "inbound")
	client := envoytest.Start(t, clientDir.bootstrap(t, agent, "--no-inbound",
		"--outbound", "server=127.0.0.1:0,"+inbound+","+serverID+","+serverID+"2",
		"--outbound", "other=127.0.0.1:0,"+inbound+","+serverID+"2"))
	client.WaitReady(t)
	outbound := "http://" + client.Listener(t, "outbound_server")

	t.Run("mutual TLS with the identities that the agent gave", func(t *testing.T) {
		code, _ := get(t, outbound+"/hello", "Authorization", "the application's own", "X-Forwarded-Client-Cert", "URI=spiffe://forged",
			"X-Forwarded-For", "10.0.0.1", "X-Envoy-Original-Url", "forged", "X-Envoy-Internal", "true")
		if code != 200 {
			t.Fatalf("status %d, want 200", code)
		}
		saw := app.last(t)
		if xfcc := saw.Header.Get("X-Forwarded-Client-Cert"); !strings.Contains(xfcc, "URI="+clientID) || !strings.Contains(xfcc, "By="+serverID) || strings.Contains(xfcc, "forged") {
			t.Errorf("the application saw the peer as %q", xfcc)
		}
		if got := saw.Header.Get("Authorization"); got != "the application's own" {
			t.Errorf("the application saw authorization %q", got)
		}
		if got := saw.Header.Get("X-Forwarded-For"); got != "10.0.0.1" {
			t.Errorf("the application saw X-Forwarded-For %q", got)
		}
		for _, h := range []string{"X-Envoy-Original-Url", "X-Envoy-Internal"} {
			if got := saw.Header.Get(h); got != "" {
				t.Errorf("%s: %s went through both proxies", h, got)
			}
		}
		check := agent.lastCheck(t)
		a := check.request.GetAttributes()
		if got := a.GetSource().GetPrincipal(); got != clientID {
			t.Errorf("the agent was told the principal %q", got)
		}
		if a.GetSource().GetCertificate() == "" || a.GetTlsSession() == nil || len(a.GetRequest().GetHttp().GetHeaderMap().GetHeaders()) == 0 {
			t.Errorf("the certificate, the TLS session or the raw headers are missing in %v", a)
		}
		if got := a.GetDestination().GetLabels()["app"]; got != "server" {
			t.Errorf("the agent was told the label app=%q", got)
		}
		if check.authorization != "Bearer server-token-1" {
			t.Errorf("the agent was shown %q", check.authorization)
		}
	})

	t.Run("a refusal reaches the client and the access log names its policy", func(t *testing.T) {
		code, body := get(t, outbound+"/admin?secret=1")
		if code != 403 || body != "no admin" {
			t.Errorf("status %d, body %q; want 403 and the agent's body", code, body)
		}
		server.WaitLog(t, `"policy":"default/no-admin"`)
		if log := server.Log(); strings.Contains(log, "secret=1") {
			t.Errorf("the access log holds a query:\n%s", log)
		}
	})

	t.Run("plaintext is decided without a principal, with the path normalised", func(t *testing.T) {
		code := rawGet(t, inbound, "/a/./b/..//c%2Fd#fragment", "X-Forwarded-Client-Cert: URI=spiffe://forged", "X-Forwarded-For: 10.0.0.1", "X-Envoy-Internal: true")
		if code != 200 {
			t.Fatalf("status %d, want 200", code)
		}
		const want = "/a//c%2Fd"
		saw := app.last(t)
		if saw.RequestURI != want || saw.Header.Get("X-Forwarded-Client-Cert") != "" || saw.Header.Get("X-Envoy-Internal") != "" {
			t.Errorf("the application saw %s %v", saw.RequestURI, saw.Header)
		}
		a := agent.lastCheck(t).request.GetAttributes()
		if a.GetSource().GetPrincipal() != "" || a.GetRequest().GetHttp().GetPath() != want {
			t.Errorf("the agent was told principal %q, path %q", a.GetSource().GetPrincipal(), a.GetRequest().GetHttp().GetPath())
		}
	})

	t.Run("only workloads of the trust domain are peers", func(t *testing.T) {
		other := newFakeAuthority(t)
		for _, tt := range []struct {
			name string
			cert []tls.Certificate
			ok   bool
		}{
			{"a workload", []tls.Certificate{authority.leaf(t, clientID)}, true},
			{"nobody", nil, false},
			{"an agent", []tls.Certificate{authority.leaf(t, "spiffe://cluster.local/signet/agent/node-a")}, false},
			{"an authority", []tls.Certificate{authority.leaf(t, "spiffe://cluster.local/signet/ca/1")}, false},
			{"a workload of a longer trust domain", []tls.Certificate{authority.leaf(t, "spiffe://cluster.local.evil/ns/default/sa/client")}, false},
			{"a workload of a stranger's authority", []tls.Certificate{other.leaf(t, clientID)}, false},
		} {
			for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
				err := tlsGet(t, inbound, &tls.Config{Certificates: tt.cert, MinVersion: version, MaxVersion: version, InsecureSkipVerify: true}, nil)
				if (err == nil) != tt.ok {
					t.Errorf("%s, %s: error %v", tt.name, tls.VersionName(version), err)
				}
			}
		}
		if err := tlsGet(t, inbound, &tls.Config{Certificates: []tls.Certificate{authority.leaf(t, clientID)}, MinVersion: tls.VersionTLS11, MaxVersion: tls.VersionTLS11, InsecureSkipVerify: true}, nil); err == nil {
			t.Error("TLS 1.1 is taken")
		}
	})

	t.Run("no session is resumed", func(t *testing.T) {
		cfg := &tls.Config{Certificates: []tls.Certificate{authority.leaf(t, clientID)}, InsecureSkipVerify: true, ClientSessionCache: tls.NewLRUClientSessionCache(8)}
		for range 3 {
			if err := tlsGet(t, inbound, cfg, func(s tls.ConnectionState) {
				if s.DidResume {
					t.Error("a session was resumed")
				}
			}); err != nil {
				t.Fatal(err)
			}
		}
	})

	t.Run("an upstream of another identity gets no request", func(t *testing.T) {
		before := app.count()
		code, _ := get(t, "http://"+client.Listener(t, "outbound_other")+"/hello")
		if code != 503 || app.count() != before {
			t.Errorf("status %d, %d requests arrived; want 503 and none", code, app.count()-before)
		}
	})

	t.Run("a rotated token is picked up, by the kubelet's swap and by rename", func(t *testing.T) {
		serverDir.swap(t, "server-token-2")
		agent.waitToken(t, outbound, "Bearer server-token-2")
		serverDir.rename(t, "server-token-3")
		agent.waitToken(t, outbound, "Bearer server-token-3")
	})

	t.Run("an agent that restarts costs no request", func(t *testing.T) {
		// A proxy waits for three seconds. On a machine that takes as long for what happens
		// here meanwhile it is tried again.
		for tries := 0; ; tries++ {
			agent.stop()
			before := server.Stats(t)["cluster.signet-agent.upstream_rq_retry"]
			began, result := time.Now(), make(chan int, 1)
			go func() {
				code, _ := get(t, outbound+"/hello")
				result <- code
			}()
			server.WaitStat(t, "cluster.signet-agent.upstream_rq_retry", before+2)
			agent.start(t)
			away, code := time.Since(began), <-result
			if code == 200 {
				break
			}
			if away < 2*time.Second || tries == 20 {
				t.Fatalf("status %d, want 200: the agent was back after %v", code, away)
			}
		}
	})

	t.Run("an agent that stays away refuses everything", func(t *testing.T) {
		agent.stop()
		before, start := app.count(), time.Now()
		if code, _ := get(t, outbound+"/hello"); code != 403 {
			t.Errorf("status %d over mutual TLS, want 403", code)
		}
		if took := time.Since(start); took < 2900*time.Millisecond {
			t.Errorf("refused after %s: an agent that is back after 2.9 s would have cost a request", took)
		}
		if code := rawGet(t, inbound, "/hello"); code != 403 {
			t.Errorf("status %d over plaintext, want 403", code)
		}
		if n := app.count() - before; n != 0 {
			t.Errorf("%d requests reached the application", n)
		}
	})
}

// pod is the folder of a pod: its socket, its token, its Envoy's files.
type pod struct {
	path  string
	swaps int
}

func newPod(t *testing.T) *pod {
	t.Helper()
	// Not t.TempDir: the name of a test may make a path too long for a socket.
	dir, err := os.MkdirTemp("", "signet")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Mkdir(filepath.Join(dir, "tokens"), 0o700); err != nil {
		t.Fatal(err)
	}
	return &pod{path: dir}
}

func (p *pod) bootstrap(t *testing.T, a *fakeAgent, args ...string) string {
	t.Helper()
	file := filepath.Join(p.path, "envoy.yaml")
	mustSignet(t, append([]string{"envoy", "bootstrap", "-o", file, "--socket", a.socket, "--token-file", filepath.Join(p.path, "tokens", "signet-token")}, args...)...)
	return file
}

// swap replaces the token as the kubelet does: token → ..data/token, ..data → a
// folder, and a rename of ..data.
func (p *pod) swap(t *testing.T, token string) {
	t.Helper()
	p.swaps++
	tokens := filepath.Join(p.path, "tokens")
	version := fmt.Sprintf("..version-%d", p.swaps)
	err := errors.Join(
		os.Mkdir(filepath.Join(tokens, version), 0o700),
		os.WriteFile(filepath.Join(tokens, version, "signet-token"), []byte(token), 0o600),
		os.Symlink(version, filepath.Join(tokens, "..data_tmp")),
		os.Rename(filepath.Join(tokens, "..data_tmp"), filepath.Join(tokens, "..data")),
	)
	if p.swaps == 1 {
		err = errors.Join(err, os.Symlink("..data/signet-token", filepath.Join(tokens, "signet-token")))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// rename replaces the token by renaming a file over it.
func (p *pod) rename(t *testing.T, token string) {
	t.Helper()
	if err := replaceFile(filepath.Join(p.path, "tokens", "signet-token"), []byte(token)); err != nil {
		t.Fatal(err)
	}
}

// fakeAgent gives each token the SVID of an identity, and refuses /admin.
type fakeAgent struct {
	secretv3.UnimplementedSecretDiscoveryServiceServer
	authority *fakeAuthority
	socket    string
	ids       map[string]string // token → SPIFFE ID
	stop      func()

	mu     sync.Mutex
	checks []checkSeen
}

type checkSeen struct {
	authorization string
	request       *authv3.CheckRequest
}

func (a *fakeAgent) start(t *testing.T) {
	t.Helper()
	l, err := net.Listen("unix", a.socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	secretv3.RegisterSecretDiscoveryServiceServer(s, a)
	authv3.RegisterAuthorizationServer(s, a)
	go s.Serve(l)
	a.stop = s.Stop
	t.Cleanup(s.Stop)
}

// caller is the identity that the token of an RPC stands for.
func (a *fakeAgent) caller(ctx context.Context) (authorization, id string, err error) {
	md, _ := metadata.FromIncomingContext(ctx)
	values := md.Get("authorization")
	if len(values) != 1 {
		return "", "", status.Errorf(codes.Unauthenticated, "%d tokens", len(values))
	}
	token, ok := strings.CutPrefix(values[0], "Bearer ")
	if id = a.ids[token]; !ok || id == "" {
		return "", "", status.Error(codes.Unauthenticated, "unknown token")
	}
	return values[0], id, nil
}

func (a *fakeAgent) StreamSecrets(stream secretv3.SecretDiscoveryService_StreamSecretsServer) error {
	_, id, err := a.caller(stream.Context())
	if err != nil {
		return err
	}
	for {
		req, err := stream.Recv()
		if err != nil {
			return err
		}
		if req.VersionInfo != "" {
			continue // an acknowledgement
		}
		resp := &discoveryv3.DiscoveryResponse{VersionInfo: "1", Nonce: "1", TypeUrl: req.TypeUrl}
		for _, name := range req.ResourceNames {
			secret, err := anypb.New(a.authority.secret(name, id))
			if err != nil {
				return err
			}
			resp.Resources = append(resp.Resources, secret)
		}
		if err := stream.Send(resp); err != nil {
			return err
		}
	}
}

func (a *fakeAgent) Check(ctx context.Context, req *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	authorization, _, err := a.caller(ctx)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	a.checks = append(a.checks, checkSeen{authorization, req})
	a.mu.Unlock()
	resp := &authv3.CheckResponse{Status: &statuspb.Status{}}
	if strings.HasPrefix(req.GetAttributes().GetRequest().GetHttp().GetPath(), "/admin") {
		policy, err := structpb.NewStruct(map[string]any{"policy": "default/no-admin"})
		if err != nil {
			return nil, err
		}
		resp.Status.Code = int32(codes.PermissionDenied)
		resp.DynamicMetadata = policy
		resp.HttpResponse = &authv3.CheckResponse_DeniedResponse{DeniedResponse: &authv3.DeniedHttpResponse{Body: "no admin"}}
	}
	return resp, nil
}

func (a *fakeAgent) lastCheck(t *testing.T) checkSeen {
	t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.checks) == 0 {
		t.Fatal("the agent was not asked")
	}
	return a.checks[len(a.checks)-1]
}

// waitToken makes requests until the agent is shown a token.
func (a *fakeAgent) waitToken(t *testing.T, url, want string) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		code, _ := get(t, url+"/hello")
		got := a.lastCheck(t).authorization
		if code != 200 {
			t.Fatalf("status %d while the token was %q", code, got)
		}
		if got == want {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the agent is still shown %q, want %q", got, want)
		}
	}
}

// fakeAuthority is a root that signs leaves.
type fakeAuthority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newFakeAuthority(t *testing.T) *fakeAuthority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &fakeAuthority{cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
}

func (a *fakeAuthority) issue(id string) ([]byte, *ecdsa.PrivateKey, error) {
	u, err := url.Parse(id)
	if err != nil {
		return nil, nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{u}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, a.cert, key.Public(), a.key)
	return der, key, err
}

func (a *fakeAuthority) leaf(t *testing.T, id string) tls.Certificate {
	t.Helper()
	der, key, err := a.issue(id)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// secret is what SDS answers for a name; nil for one that does not exist.
func (a *fakeAuthority) secret(name, id string) *tlsv3.Secret {
	inline := func(b []byte) *corev3.DataSource {
		return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
	}
	switch name {
	case "ROOTCA":
		return &tlsv3.Secret{Name: name, Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{TrustedCa: inline(a.pem)}}}
	case "default":
		der, key, err := a.issue(id)
		if err != nil {
			return nil
		}
		pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return nil
		}
		return &tlsv3.Secret{Name: name, Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
			CertificateChain: inline(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
			PrivateKey:       inline(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})),
		}}}
	}
	return nil
}

// app is the application: it remembers its requests.
type app struct {
	address  string
	mu       sync.Mutex
	requests []*http.Request
}

func newApp(t *testing.T) *app {
	a := &app{}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.requests = append(a.requests, r)
	}))
	t.Cleanup(s.Close)
	a.address = s.Listener.Addr().String()
	return a
}

func (a *app) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.requests)
}

func (a *app) last(t *testing.T) *http.Request {
	t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.requests) == 0 {
		t.Fatal("no request reached the application")
	}
	return a.requests[len(a.requests)-1]
}

// get makes a request on a connection of its own; headers are names and values.
// It may run beside the test, so it reports errors without ending it: status 0.
func get(t *testing.T, url string, headers ...string) (int, string) {
	t.Helper()
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		t.Error(err)
		return 0, ""
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	req.Close = true
	resp, err := (&http.Client{Timeout: time.Minute}).Do(req)
	if err != nil {
		t.Error(err)
		return 0, ""
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Error(err)
	}
	return resp.StatusCode, string(body)
}

// rawGet sends a path as it is, which net/http would tidy.
func rawGet(t *testing.T, address, path string, headers ...string) int {
	t.Helper()
	conn, err := net.DialTimeout("tcp", address, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	return exchange(t, conn, path, headers...)
}

func exchange(t *testing.T, conn net.Conn, path string, headers ...string) int {
	t.Helper()
	conn.SetDeadline(time.Now().Add(time.Minute))
	lines := append([]string{"GET " + path + " HTTP/1.1", "Host: test", "Connection: close"}, headers...)
	if _, err := io.WriteString(conn, strings.Join(lines, "\r\n")+"\r\n\r\n"); err != nil {
		t.Log(err)
		return 0
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Log(err)
		return 0
	}
	defer resp.Body.Close()
	// A TLS 1.3 ticket, if there were one, would come before the body's end.
	_, _ = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode
}

// tlsGet makes a request over TLS. With TLS 1.3 a client learns that its
// certificate was refused only when it reads, so the answer is the proof.
func tlsGet(t *testing.T, address string, cfg *tls.Config, see func(tls.ConnectionState)) error {
	t.Helper()
	cfg = cfg.Clone()
	cfg.ServerName = "test"
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: time.Minute}, "tcp", address, cfg)
	if err != nil {
		return err
	}
	defer conn.Close()
	if see != nil {
		see(conn.ConnectionState())
	}
	if code := exchange(t, conn, "/hello"); code != 200 {
		return fmt.Errorf("status %d", code)
	}
	return nil
}
