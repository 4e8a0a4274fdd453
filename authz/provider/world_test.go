package provider_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/extauthz"
	"github.com/signet-mesh/signet/authz/provider"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/integration/process"
)

// policies ask "them" about /ask and below, deny what ends in /denied, and allow
// the rest of that to everybody. Whatever is not a request is asked about too.
const policies = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: ask, namespace: default}
spec: {action: CUSTOM, provider: {name: them}, rules: [{to: [{operation: {paths: [/ask*, //ask*]}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny, namespace: default}
spec: {action: DENY, rules: [{to: [{operation: {paths: ["*/denied"]}}], from: [{source: {notPrincipals: ["nobody"]}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow, namespace: default}
spec: {rules: [{to: [{operation: {notPaths: [/closed]}}]}, {to: [{operation: {ports: ["3306"]}}]}]}
`

var server = identity.Workload{Namespace: "default", ServiceAccount: "server", PodUID: "1"}

// world is an ext_authz service with one provider, "them".
type world struct {
	t   testing.TB
	s   *extauthz.Server
	p   *provider.Providers
	reg *prometheus.Registry
	// last is the record of the last check.
	last struct {
		authz.Decision
		err   error
		asked []string
	}
}

func (w *world) Add(r *extauthz.Record) {
	w.last.Decision, w.last.err, w.last.asked = r.Decision, r.Err, append([]string(nil), r.Asked...)
}

func newWorld(t testing.TB, s provider.Spec) *world {
	t.Helper()
	s.Name = "them"
	w := &world{t: t, reg: prometheus.NewPedanticRegistry()}
	var err error
	if w.p, err = provider.New(provider.Config{Providers: []provider.Spec{s}, Metrics: w.reg}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.p.Close() })
	rs, problems := authz.Parse("p.yaml", []byte(policies))
	set, _ := authz.Set{}.Update(rs)
	snapshot, more := authz.Compile(set, authz.Options{TrustDomain: spiffeid.RequireTrustDomainFromString("cluster.local")})
	for _, p := range append(problems, more...) {
		if p.Severity == authz.SeverityError {
			t.Fatal(p)
		}
	}
	w.s, err = extauthz.New(extauthz.Config{Snapshot: func() *authz.Snapshot { return snapshot }, Providers: w.p, Records: w})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func header(name, value string) *corev3.HeaderValue {
	return &corev3.HeaderValue{Key: name, RawValue: []byte(value)}
}

// request is a check of GET on a path.
func request(path string, change ...func(h *authv3.AttributeContext_HttpRequest)) *authv3.CheckRequest {
	h := &authv3.AttributeContext_HttpRequest{Method: "GET", Path: strings.ToValidUTF8(path, "!"), Host: "shop.example:8080",
		HeaderMap: &corev3.HeaderMap{Headers: []*corev3.HeaderValue{header(":method", "GET"), header(":path", path), header(":authority", "shop.example:8080"),
			header("authorization", "Bearer t"), header("x-user", "alice"), header("x-user", "bob"), header("x-other", "o"), header("connection", "close")}}}
	for _, c := range change {
		c(h)
	}
	return &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
		Source:      &authv3.AttributeContext_Peer{Address: address("10.0.0.1", 4000), Principal: "spiffe://cluster.local/ns/default/sa/client"},
		Destination: &authv3.AttributeContext_Peer{Address: address("10.0.0.2", 8080)},
		Request:     &authv3.AttributeContext_Request{Http: h},
	}}
}

// connection is a check of a bare connection.
func connection() *authv3.CheckRequest {
	r := request("/")
	r.Attributes.Request = nil
	r.Attributes.Destination.Address = address("10.0.0.2", 3306)
	return r
}

func address(ip string, port uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{Address: ip, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port}}}}
}

// check answers a check.
func (w *world) check(r *authv3.CheckRequest) *authv3.CheckResponse {
	w.t.Helper()
	message, err := proto.Marshal(r)
	if err != nil {
		w.t.Fatal(err)
	}
	b, err := w.s.Answer(identity.WithCaller(w.t.Context(), identity.Caller{Workload: server}), message)
	if err != nil {
		w.t.Fatal(err)
	}
	a := &authv3.CheckResponse{}
	if err := proto.Unmarshal(b, a); err != nil {
		w.t.Fatal(err)
	}
	if allowed := a.GetStatus().GetCode() == 0 && a.GetOkResponse() != nil; allowed != w.last.Allowed || allowed && a.GetDeniedResponse() != nil {
		w.t.Fatalf("decided %+v, answered %v", w.last.Decision, a)
	}
	return a
}

// closed checks that the request is denied for that reason.
func (w *world) closed(r *authv3.CheckRequest, reason authz.Reason) *authv3.CheckResponse {
	w.t.Helper()
	a := w.check(r)
	if w.last.Allowed || w.last.Reason != reason {
		w.t.Errorf("decided %s for %s (%v); want denied for %s", w.last.Verdict(), w.last.Reason, w.last.err, reason)
	}
	return a
}

// at is where a listener is.
func at(t testing.TB, a net.Addr) provider.Address {
	t.Helper()
	host, port, err := net.SplitHostPort(a.String())
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	return provider.Address{Service: host, Port: n, Timeout: provider.MaxTimeout}
}

// nobody is an address that nobody listens at, and nobody else will.
func nobody(t testing.TB) net.Addr {
	t.Helper()
	ports, err := process.FreePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(ports[0])
	if err != nil {
		t.Fatal(err)
	}
	return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: n}
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// serve serves gRPC by a handler of bytes.
func serve(t testing.TB, answer func(ctx context.Context, message []byte) ([]byte, error), opts ...grpc.ServerOption) provider.Address {
	t.Helper()
	l := listen(t)
	s := grpc.NewServer(append(opts, grpc.ForceServerCodec(bytesCodec{}), grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		var m []byte
		if err := stream.RecvMsg(&m); err != nil {
			return err
		}
		b, err := answer(stream.Context(), m)
		if err != nil {
			return err
		}
		return stream.SendMsg(&b)
	}))...)
	go s.Serve(l)
	t.Cleanup(s.Stop)
	return at(t, l.Addr())
}

// answers serves gRPC by one answer.
func answers(t testing.TB, r *authv3.CheckResponse) provider.Address {
	b, err := proto.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	return serve(t, func(context.Context, []byte) ([]byte, error) { return b, nil })
}

type bytesCodec struct{}

func (bytesCodec) Name() string                  { return "proto" }
func (bytesCodec) Marshal(v any) ([]byte, error) { return *v.(*[]byte), nil }
func (bytesCodec) Unmarshal(b []byte, v any) error {
	*v.(*[]byte) = append([]byte(nil), b...)
	return nil
}

// accept hands each connection to a function.
func accept(t testing.TB, with func(c net.Conn)) provider.Address {
	t.Helper()
	l := listen(t)
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
	return at(t, l.Addr())
}

// certificates makes a root, and a certificate for 127.0.0.1 under it, as files.
func certificates(t testing.TB) (caFile, certFile, keyFile string) {
	t.Helper()
	dir := t.TempDir()
	key := func() *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	write := func(name, kind string, der []byte) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	root, leaf := key(), key()
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, root.Public(), root)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"them.example"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, c, ca, leaf.Public(), root)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(leaf)
	if err != nil {
		t.Fatal(err)
	}
	return write("ca.pem", "CERTIFICATE", caDER), write("cert.pem", "CERTIFICATE", der), write("key.pem", "EC PRIVATE KEY", keyDER)
}
