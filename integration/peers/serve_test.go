package peers

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/util"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/extauthz"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"
	"github.com/signet-mesh/signet/identity/attest/devissuer"
)

// The servers of checks that are measured beside Signet's. Each runs as a process of
// its own with one thread for Go code, so that what it takes can be told from what
// the client takes.
//
//   - signet is package extauthz behind the gate, as signet-agent has it: the proof of
//     each RPC is verified.
//   - raw is gRPC with a codec that hands over the bytes, with signet-agent's workers
//     and a handler that does nothing; raw-plain is the same without workers, and
//     generated is gRPC as everybody uses it with such a handler: what a check can
//     cost at least.
//   - opa is a server of our own that does what OPA's plugin for Envoy documents: the
//     message as JSON, as input of a prepared query. opa-direct spares it the JSON
//     and makes the input of the four fields that the policy reads.
var servers = map[string]func(policies int) (*grpc.Server, func()){
	"signet":     serveSignet,
	"raw":        func(int) (*grpc.Server, func()) { return serveRaw(grpc.NumStreamWorkers(streamWorkers)) },
	"raw-plain":  func(int) (*grpc.Server, func()) { return serveRaw() },
	"generated":  serveGenerated,
	"opa":        func(n int) (*grpc.Server, func()) { return serveOPA(n, opaInput) },
	"opa-direct": func(n int) (*grpc.Server, func()) { return serveOPA(n, opaDirect) },
}

// The environment of a server: which, where, by how many policies.
const (
	serverName     = "SIGNET_PEER"
	serverSocket   = "SIGNET_PEER_SOCKET"
	serverPolicies = "SIGNET_PEER_POLICIES"
)

func TestMain(m *testing.M) {
	if name := os.Getenv(serverName); name != "" {
		if err := beServer(name); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// beServer serves until standard input ends. A line "storm" there has the policies
// changed a hundred times a second, "calm" no more.
func beServer(name string) error {
	policies, err := strconv.Atoi(os.Getenv(serverPolicies))
	if err != nil {
		return err
	}
	if name == "signet" || strings.HasPrefix(name, "raw") {
		debug.SetGCPercent(400) // signet-agent's
	}
	s, change := servers[name](policies)
	l, err := net.Listen("unix", os.Getenv(serverSocket))
	if err != nil {
		return err
	}
	if token == "" { // all get the same headers
		token = strings.Repeat("x", 900)
	}
	fmt.Printf("%s\n", token)
	var storm atomic.Bool
	go func() {
		for range time.Tick(10 * time.Millisecond) {
			if storm.Load() {
				change()
			}
		}
	}()
	go func() {
		lines := bufio.NewScanner(os.Stdin)
		for lines.Scan() {
			storm.Store(lines.Text() == "storm")
		}
		s.Stop()
	}()
	return s.Serve(l)
}

// token is the proof that RPCs need, for those servers that want one.
var token string

// policyText is policy n, which allows three clients to POST below a path of its
// own; version changes it.
func policyText(n, version int) string {
	var principals []string
	for j := range clients {
		principals = append(principals, client(n, j))
	}
	return fmt.Sprintf("---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p%d, namespace: default}\n"+
		"spec: {rules: [{from: [{source: {principals: [%s]}}], to: [{operation: {methods: [POST], paths: ['%s*', '/version/%d']}}]}]}\n",
		n, strings.Join(principals, ", "), prefix(n), version)
}

// Anybody may GET /open, which is asked through a proxy without TLS.
const (
	openPolicy = "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: open, namespace: default}\n" +
		"spec: {rules: [{to: [{operation: {methods: [GET], paths: [/open]}}]}]}\n"
	openRule = "allow if {\n\tinput.attributes.request.http.method == \"GET\"\n\tinput.attributes.request.http.path == \"/open\"\n}\n"
)

func serveSignet(policies int) (*grpc.Server, func()) {
	must := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	var b strings.Builder
	for i := range policies {
		b.WriteString(policyText(i, 0))
	}
	b.WriteString(openPolicy)
	resources, problems := authz.Parse("p.yaml", []byte(b.String()))
	if len(problems) > 0 {
		panic(problems[0].String())
	}
	set, _ := authz.Set{}.Update(resources)
	first, _ := authz.Compile(set, authz.Options{})
	var snapshot atomic.Pointer[authz.Snapshot]
	snapshot.Store(first)
	version := 0
	change := func() { // one policy of them all
		version++
		n := version % policies
		rs, _ := authz.Parse("p.yaml", []byte(policyText(n, version)))
		// A set is all resources that there are.
		resources[n] = rs[0]
		set, _ = set.Update(resources)
		next, _ := snapshot.Load().Update(set)
		snapshot.Store(next)
	}

	issuer, err := devissuer.New(devissuer.Options{})
	must(err)
	dir, err := os.MkdirTemp("", "")
	must(err)
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "jwks.json")
	must(os.WriteFile(file, issuer.JWKS(), 0o600))
	keys, err := attest.OpenKeys(attest.KeysConfig{File: file, Interval: time.Hour})
	must(err)
	pod := identity.Workload{Namespace: "default", ServiceAccount: "things", Pod: "things-0", PodUID: "0f1e2d3c-0000-4000-8000-000000000001",
		Node: "node-a", Labels: map[string]string{"app": "things"}, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.2")}}
	pods := &identity.Pods{}
	pods.Set(pod)
	token, err = issuer.Token(devissuer.Claims{Namespace: pod.Namespace, ServiceAccount: pod.ServiceAccount, Pod: pod.Pod, PodUID: pod.PodUID, Node: pod.Node,
		Audience: []string{"signet"}, TTL: time.Hour}, time.Now())
	must(err)
	attestor, err := attest.New(attest.Config{Issuer: issuer.URL(), Audience: "signet", Keys: keys, Pods: pods, Node: pod.Node, AnyServiceAccount: true})
	must(err)
	gate, err := attest.NewGate(attest.GateConfig{Attestor: attestor, Pods: pods})
	must(err)
	checks, err := extauthz.New(extauthz.Config{Snapshot: snapshot.Load})
	must(err)
	creds, err := attest.Credentials(attest.ConnectionsConfig{})
	must(err)
	s := grpc.NewServer(grpc.NumStreamWorkers(streamWorkers), grpc.Creds(creds), grpc.ForceServerCodecV2(extauthz.Codec()),
		grpc.InTapHandle(gate.Tap), grpc.UnaryInterceptor(gate.Unary), grpc.StreamInterceptor(gate.Stream),
		grpc.MaxRecvMsgSize(256<<10), grpc.MaxHeaderListSize(32<<10), grpc.MaxConcurrentStreams(1000))
	checks.Register(s)
	return s, change
}

// rawMessage and rawCodec hand bytes over.
type rawMessage struct{ b mem.Buffer }

type rawCodec struct{ encoding.CodecV2 }

var rawAnswer = mem.BufferSlice{mem.SliceBuffer{0x0a, 0, 0x1a, 0}}

func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	v.(*rawMessage).b = data.MaterializeToBuffer(mem.DefaultBufferPool())
	return nil
}

func (rawCodec) Marshal(any) (mem.BufferSlice, error) { return rawAnswer, nil }

// streamWorkers is signet-agent's number.
const streamWorkers = 256

func serveRaw(options ...grpc.ServerOption) (*grpc.Server, func()) {
	s := grpc.NewServer(append(options, grpc.ForceServerCodecV2(rawCodec{encoding.GetCodecV2("proto")}))...)
	s.RegisterService(&grpc.ServiceDesc{ServiceName: authv3.Authorization_ServiceDesc.ServiceName, HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{MethodName: "Check", Handler: func(_ any, _ context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			m := new(rawMessage)
			if err := decode(m); err != nil {
				return nil, err
			}
			m.b.Free()
			return m, nil
		}}}}, struct{}{})
	return s, func() {}
}

// checker is a server of generated types.
type checker func(context.Context, *authv3.CheckRequest) (*authv3.CheckResponse, error)

func (c checker) Check(ctx context.Context, r *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	return c(ctx, r)
}

var (
	allow = &authv3.CheckResponse{Status: &status.Status{}, HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{}}}
	deny  = &authv3.CheckResponse{Status: &status.Status{Code: int32(codes.PermissionDenied)}}
)

func serveGenerated(int) (*grpc.Server, func()) {
	s := grpc.NewServer()
	authv3.RegisterAuthorizationServer(s, checker(func(context.Context, *authv3.CheckRequest) (*authv3.CheckResponse, error) { return allow, nil }))
	return s, func() {}
}

// opaInput is what OPA's plugin makes of a request: the message in JSON.
func opaInput(r *authv3.CheckRequest) (ast.Value, error) {
	b, err := protojson.Marshal(r)
	if err != nil {
		return nil, err
	}
	var input map[string]any
	if err := util.UnmarshalJSON(b, &input); err != nil {
		return nil, err
	}
	path, _, _ := strings.Cut(r.GetAttributes().GetRequest().GetHttp().GetPath(), "?")
	var segments []any
	for s := range strings.SplitSeq(strings.TrimLeft(path, "/"), "/") {
		segments = append(segments, s)
	}
	input["parsed_path"] = segments
	return ast.InterfaceToValue(input)
}

// opaDirect is what the policy reads, in the same place.
func opaDirect(r *authv3.CheckRequest) (ast.Value, error) {
	h := r.GetAttributes().GetRequest().GetHttp()
	object := func(kv ...*ast.Term) *ast.Term {
		o := ast.NewObject()
		for i := 0; i < len(kv); i += 2 {
			o.Insert(kv[i], kv[i+1])
		}
		return ast.NewTerm(o)
	}
	return object(ast.StringTerm("attributes"), object(
		ast.StringTerm("source"), object(ast.StringTerm("principal"), ast.StringTerm(r.GetAttributes().GetSource().GetPrincipal())),
		ast.StringTerm("request"), object(ast.StringTerm("http"), object(
			ast.StringTerm("method"), ast.StringTerm(h.GetMethod()), ast.StringTerm("path"), ast.StringTerm(h.GetPath()))),
	)).Value, nil
}

func serveOPA(policies int, input func(*authv3.CheckRequest) (ast.Value, error)) (*grpc.Server, func()) {
	prepare := func(version int) rego.PreparedEvalQuery {
		var b strings.Builder
		b.WriteString("package mesh\n\ndefault allow := false\n")
		for i := range policies {
			for j := range clients {
				fmt.Fprintf(&b, "allow if {\n\tinput.attributes.source.principal == %q\n\tinput.attributes.request.http.method == \"POST\"\n\tstartswith(input.attributes.request.http.path, %q)\n}\n",
					"spiffe://"+client(i, j), prefix(i))
			}
		}
		b.WriteString(openRule)
		q, err := rego.New(rego.Query("data.mesh.allow"), rego.Module("mesh.rego", b.String())).PrepareForEval(context.Background())
		if err != nil {
			panic(err)
		}
		return q
	}
	var query atomic.Pointer[rego.PreparedEvalQuery]
	q := prepare(0)
	query.Store(&q)
	s := grpc.NewServer()
	authv3.RegisterAuthorizationServer(s, checker(func(ctx context.Context, r *authv3.CheckRequest) (*authv3.CheckResponse, error) {
		v, err := input(r)
		if err != nil {
			return nil, err
		}
		rs, err := query.Load().Eval(ctx, rego.EvalParsedInput(v))
		if err != nil {
			return nil, err
		}
		if rs.Allowed() {
			return allow, nil
		}
		return deny, nil
	}))
	return s, func() {
		next := prepare(0)
		query.Store(&next)
	}
}

// process is a running server.
type process struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	socket string
	token  string
}

func startServer(tb testing.TB, name string, policies int) *process {
	tb.Helper()
	p := &process{socket: filepath.Join(tb.TempDir(), "s")}
	p.cmd = exec.Command(os.Args[0])
	p.cmd.Env = append(os.Environ(), "GOMAXPROCS=1", serverName+"="+name, serverSocket+"="+p.socket, serverPolicies+"="+strconv.Itoa(policies))
	p.cmd.Stderr = os.Stderr
	var err error
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		tb.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		p.in.Close()
		p.cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		tb.Fatalf("server %s: %v", name, err)
	}
	p.token = strings.TrimSpace(line)
	return p
}

// say tells the server "storm" or "calm".
func (p *process) say(tb testing.TB, what string) {
	tb.Helper()
	if _, err := io.WriteString(p.in, what+"\n"); err != nil {
		tb.Fatal(err)
	}
}

// processor is how much processor time the server has used.
func (p *process) processor(tb testing.TB) time.Duration {
	tb.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", p.cmd.Process.Pid))
	if err != nil {
		tb.Fatal(err)
	}
	var sum time.Duration
	for _, f := range tasks {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // a thread that has ended
		}
		n, err := strconv.ParseInt(strings.Fields(string(b))[0], 10, 64)
		if err != nil {
			tb.Fatal(err)
		}
		sum += time.Duration(n)
	}
	return sum
}
