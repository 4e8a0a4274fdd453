package integration_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/identity/attest/devissuer"
	proc "github.com/signet-mesh/signet/integration/process"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// standalone is an authority and an agent as processes, for a list of workloads
// on node-a: default/w0, default/w1, …
type standalone struct {
	tb     testing.TB
	dir    string
	bin    string
	issuer *devissuer.Issuer
	caAddr string
	http   map[string]string // metrics and health by program
	procs  map[string]*process
	// What a test may change before the programs start.
	ca     string   // another program in the place of signet-ca
	caYAML string   // more of signet-ca's configuration
	agent  string   // more of signet-agent's configuration
	env    []string // more of the programs' environment
	before func()   // called when the configuration is there
}

func newStandalone(tb testing.TB, bin string, workloads int, policies string, edits ...func(*standalone)) *standalone {
	tb.Helper()
	s := &standalone{tb: tb, bin: bin, dir: tb.TempDir(), caAddr: freeAddr(tb), http: map[string]string{"signet-ca": freeAddr(tb), "signet-agent": freeAddr(tb)}, procs: map[string]*process{}}
	var err error
	if s.issuer, _, err = devissuer.Create(filepath.Join(s.dir, "issuer"), devissuer.Options{}); err != nil {
		tb.Fatal(err)
	}
	for _, d := range []string{"ca", "policies", "sock"} {
		if err := os.Mkdir(filepath.Join(s.dir, d), 0o700); err != nil {
			tb.Fatal(err)
		}
	}
	s.ca = filepath.Join(bin, "signet-ca")
	for _, edit := range edits {
		edit(s)
	}
	s.write("policies/policies.yaml", policies)
	s.write("agent-token", s.token("signet-ca", "signet-system", "signet-agent", "uid-agent", "node-a"))
	var list strings.Builder
	list.WriteString("- {namespace: signet-system, serviceAccount: signet-agent, pod: uid-agent, podUID: uid-agent, node: node-a}\n")
	for i := range workloads {
		fmt.Fprintf(&list, "- {namespace: default, serviceAccount: w%d, pod: uid-w%d, podUID: uid-w%d, node: node-a, labels: {app: w%d}}\n", i, i, i, i)
	}
	tokens := fmt.Sprintf("tokens: {issuer: %q, jwksFile: %s/issuer/jwks.json}\n", s.issuer.URL(), s.dir)
	s.write("signet-ca.yaml", fmt.Sprintf("dataDir: %s/ca\nlisten: %s\npublish: {rootFile: %s/root.pem}\nhttp: {listen: %q}\n%s%sworkloads:\n%s",
		s.dir, s.caAddr, s.dir, s.http["signet-ca"], s.caYAML, tokens, list.String()))
	s.write("signet-agent.yaml", fmt.Sprintf("node: node-a\nsocket: %s/sock/agent.sock\nstateDir: \"\"\nca: {addresses: [%q], rootFile: %s/root.pem, tokenFile: %s/agent-token}\nhttp: {listen: %q}\npolicies: {dir: %s/policies}\n%s%s",
		s.dir, s.caAddr, s.dir, s.dir, s.http["signet-agent"], s.dir, s.agent, tokens))
	if s.before != nil {
		s.before()
	}
	s.start("signet-ca")
	s.start("signet-agent")
	return s
}

func (s *standalone) write(name, content string) {
	s.tb.Helper()
	if err := os.WriteFile(filepath.Join(s.dir, name), []byte(content), 0o600); err != nil {
		s.tb.Fatal(err)
	}
}

func (s *standalone) token(audience, namespace, account, uid, node string) string {
	s.tb.Helper()
	token, err := s.issuer.Token(devissuer.Claims{Audience: []string{audience}, Namespace: namespace, ServiceAccount: account, Pod: uid, PodUID: uid, Node: node, TTL: time.Hour}, time.Now())
	if err != nil {
		s.tb.Fatal(err)
	}
	return token
}

// process is a child that dies with this test binary.
type process struct {
	cmd  *exec.Cmd
	log  lockedBuffer
	done chan struct{}
	err  error
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}
func (b *lockedBuffer) String() string { b.mu.Lock(); defer b.mu.Unlock(); return b.b.String() }

// start starts a program and waits until it is ready.
func (s *standalone) start(program string) {
	s.tb.Helper()
	s.launch(program)
	s.waitReady(program)
}

// launch starts a program.
func (s *standalone) launch(program string) {
	s.tb.Helper()
	name, _, _ := strings.Cut(program, "@") // signet-agent@b is another agent
	path := filepath.Join(s.bin, name)
	if program == "signet-ca" && s.ca != "" {
		path = s.ca
	}
	p := &process{cmd: exec.Command(path, "serve", "--config", filepath.Join(s.dir, program+".yaml")), done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), s.env...)
	p.cmd.Stderr = &p.log
	p.run(s.tb)
	s.procs[program] = p
	s.tb.Cleanup(func() { s.stop(program, syscall.SIGTERM) })
}

// run starts the child.
func (p *process) run(tb testing.TB) {
	tb.Helper()
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		// Pdeathsig is tied to the thread that starts the child.
		runtime.LockOSThread()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			p.err = p.cmd.Wait()
		}
		close(p.done)
	}()
	if err := <-started; err != nil {
		tb.Fatal(err)
	}
}

// waitReady waits until a program that runs is ready.
func (s *standalone) waitReady(program string) {
	s.tb.Helper()
	p := s.procs[program]
	deadline := time.Now().Add(time.Minute)
	for {
		resp, err := http.Get("http://" + s.http[program] + "/readyz")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return
			}
		}
		select {
		case <-p.done:
			s.tb.Fatalf("%s ended: %v\n%s", program, p.err, p.log.String())
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			s.tb.Fatalf("%s is not ready: %v\n%s", program, err, p.log.String())
		}
	}
}

func (s *standalone) stop(program string, sig syscall.Signal) {
	s.tb.Helper()
	p := s.procs[program]
	select {
	case <-p.done:
		return
	default:
	}
	_ = p.cmd.Process.Signal(sig)
	select {
	case <-p.done:
	case <-time.After(time.Minute):
		_ = p.cmd.Process.Kill()
		<-p.done
		s.tb.Errorf("%s did not end on %v\n%s", program, sig, p.log.String())
	}
	if sig == syscall.SIGTERM && p.err != nil {
		s.tb.Errorf("%s: %v\n%s", program, p.err, p.log.String())
	}
	if strings.Contains(p.log.String(), "DATA RACE") {
		s.tb.Errorf("%s: data race\n%s", program, p.log.String())
	}
}

func freeAddr(tb testing.TB) string {
	tb.Helper()
	ports, err := proc.FreePorts(1)
	if err != nil {
		tb.Fatal(err)
	}
	return net.JoinHostPort("127.0.0.1", ports[0])
}

// dial connects to the agent's socket.
func (s *standalone) dial() *grpc.ClientConn {
	s.tb.Helper()
	return s.dialAt(s.dir + "/sock/agent.sock")
}

func (s *standalone) dialAt(socket string) *grpc.ClientConn {
	s.tb.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		s.tb.Fatal(err)
	}
	s.tb.Cleanup(func() { conn.Close() })
	return conn
}

func (s *standalone) as(ctx context.Context, i int) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+s.token("signet", "default", fmt.Sprintf("w%d", i), fmt.Sprintf("uid-w%d", i), "node-a"))
}

func fetch(ctx context.Context, conn *grpc.ClientConn, names ...string) (*discoveryv3.DiscoveryResponse, error) {
	// A stream that stays open counts against the thousand of a connection.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	st, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx)
	if err != nil {
		return nil, err
	}
	// A stream that was refused already fails Send with io.EOF; Recv says why.
	if err := st.Send(&discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: names}); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return st.Recv()
}

// TestGarbageIsRefusedAndHarmsNobody throws at both doors what is no protocol, and
// what is too much of one; then both still serve.
func TestGarbageIsRefusedAndHarmsNobody(t *testing.T) {
	t.Parallel()
	s := newStandalone(t, programs(t), 2, "")
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	for name, payload := range map[string][]byte{
		"nothing":              nil,
		"text":                 []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
		"zeros":                make([]byte, 1<<20),
		"half a preface":       []byte("PRI * HTTP/2.0\r\n\r\nSM"),
		"a preface and rubble": append([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), bytes.Repeat([]byte{0xff}, 1<<16)...),
		"a TLS hello cut off":  {0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3},
	} {
		for _, door := range []struct{ network, addr string }{{"unix", s.dir + "/sock/agent.sock"}, {"tcp", s.caAddr}, {"unix", s.dir + "/ca/admin.sock"}} {
			c, err := net.Dial(door.network, door.addr)
			if err != nil {
				t.Fatal(err)
			}
			_ = c.SetDeadline(time.Now().Add(time.Minute))
			_, _ = c.Write(payload) // the other side may close at any byte
			if u, ok := c.(interface{ CloseWrite() error }); ok {
				_ = u.CloseWrite()
			}
			if _, err := io.Copy(io.Discard, c); err != nil && strings.Contains(err.Error(), "timeout") {
				t.Errorf("%s: %s keeps the connection", name, door.addr)
			}
			c.Close()
		}
	}
	conn := s.dial()
	checks := authv3.NewAuthorizationClient(conn)
	for name, c := range map[string]struct {
		call func() error
		code codes.Code
	}{
		"no token":             {func() error { _, err := fetch(ctx, conn, "default"); return err }, codes.Unauthenticated},
		"no token for a check": {func() error { _, err := checks.Check(ctx, &authv3.CheckRequest{}); return err }, codes.Unauthenticated},
		"two tokens":           {func() error { _, err := fetch(s.as(s.as(ctx, 0), 1), conn, "default"); return err }, codes.Unauthenticated},
		"a name of 1 MB":       {func() error { _, err := fetch(s.as(ctx, 0), conn, strings.Repeat("n", 1<<20)); return err }, codes.ResourceExhausted},
		"100,000 names":        {func() error { _, err := fetch(s.as(ctx, 0), conn, make([]string, 100_000)...); return err }, codes.InvalidArgument},
		"a check of 2 MB": {func() error {
			_, err := checks.Check(s.as(ctx, 0), &authv3.CheckRequest{Attributes: &authv3.AttributeContext{ContextExtensions: map[string]string{"a": strings.Repeat("x", 2<<20)}}})
			return err
		}, codes.ResourceExhausted},
	} {
		if err := c.call(); status.Code(err) != c.code {
			t.Errorf("%s: %v, want %v", name, err, c.code)
		}
	}
	// An empty check says nothing of the request: it is answered, and denied.
	if r, err := checks.Check(s.as(ctx, 0), &authv3.CheckRequest{}); err != nil || r.GetStatus().GetCode() == int32(codes.OK) {
		t.Errorf("an empty check: %v, %v", r, err)
	}
	for i := range 2 {
		if r, err := fetch(s.as(ctx, i), conn, "default", "ROOTCA", "nobody"); err != nil || len(r.GetResources()) == 0 {
			t.Errorf("w%d: %v, %v", i, r, err)
		}
	}
}
