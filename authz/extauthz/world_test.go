package extauthz_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/extauthz"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/integration/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

const client = "spiffe://cluster.local/ns/default/sa/client"

// policyText lets client GET /ok/… and anybody who is authenticated POST, except
// to /ok/secret.
const policyText = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow-client, namespace: default}
spec:
  selector: {matchLabels: {app: server}}
  rules:
  - from:
    - source: {principals: [cluster.local/ns/default/sa/client]}
    to:
    - operation: {methods: [GET], paths: [/ok*]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny-secret, namespace: default}
spec:
  action: DENY
  rules:
  - to:
    - operation: {paths: [/ok/secret]}
`

// server is the pod that the checks are about.
var server = identity.Workload{
	Namespace: "default", ServiceAccount: "server", Pod: "server-0", PodUID: "uid-server",
	Labels:    map[string]string{"app": "server"},
	Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")},
}

func compile(t testing.TB, text string) *authz.Snapshot {
	t.Helper()
	return compileWith(t, text, authz.Options{})
}

func compileWith(t testing.TB, text string, o authz.Options) *authz.Snapshot {
	t.Helper()
	resources, problems := authz.Parse("test.yaml", []byte(text))
	for _, p := range problems {
		t.Fatal(p)
	}
	set, problems := authz.Set{}.Update(resources)
	for _, p := range problems {
		t.Fatal(p)
	}
	snapshot, problems := authz.Compile(set, o)
	for _, p := range problems {
		t.Fatal(p)
	}
	return snapshot
}

func socketAddress(ip string, port uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: ip, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port},
	}}}
}

func pipe() *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: "/run/x.sock"}}}
}

func internal() *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_EnvoyInternalAddress{EnvoyInternalAddress: &corev3.EnvoyInternalAddress{
		AddressNameSpecifier: &corev3.EnvoyInternalAddress_ServerListenerName{ServerListenerName: "l"},
	}}}
}

func raw(kv ...string) *corev3.HeaderMap {
	m := &corev3.HeaderMap{}
	for i := 0; i < len(kv); i += 2 {
		m.Headers = append(m.Headers, &corev3.HeaderValue{Key: kv[i], RawValue: []byte(kv[i+1])})
	}
	return m
}

// check is what Envoy sends with encode_raw_headers for GET /ok?q=1 from client,
// changed by the functions.
func check(change ...func(a *authv3.AttributeContext)) *authv3.CheckRequest {
	a := &authv3.AttributeContext{
		Source:      &authv3.AttributeContext_Peer{Address: socketAddress("10.0.0.1", 40000), Principal: client},
		Destination: &authv3.AttributeContext_Peer{Address: socketAddress("10.0.0.2", 8080), Principal: "spiffe://cluster.local/ns/default/sa/server"},
		Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{
			Id: "1", Method: "GET", Path: "/ok?q=1", Host: "server:8080", Scheme: "https", Protocol: "HTTP/2",
			HeaderMap: raw(":authority", "server:8080", ":path", "/ok?q=1", ":method", "GET", ":scheme", "https", "user-agent", "x"),
		}},
	}
	for _, c := range change {
		c(a)
	}
	return &authv3.CheckRequest{Attributes: a}
}

// path makes the request one for that path, in both forms.
func path(p string) func(a *authv3.AttributeContext) {
	return func(a *authv3.AttributeContext) {
		a.Request.Http.Path = p
		a.Request.Http.HeaderMap = raw(":authority", "server:8080", ":path", p, ":method", a.Request.Http.Method)
	}
}

// joined makes the request one without encode_raw_headers.
func joined(a *authv3.AttributeContext) {
	h := a.Request.Http
	h.HeaderMap = nil
	h.Headers = map[string]string{":authority": h.Host, ":path": h.Path, ":method": h.Method, "user-agent": "x"}
}

// certificate makes a self-signed certificate, as a CheckRequest holds it.
func certificate(t testing.TB, subject string, dns []string, uris ...string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: dns,
		Subject: pkix.Name{CommonName: subject},
	}
	for _, s := range uris {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		c.URIs = append(c.URIs, u)
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return encode(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// encode is Envoy's way of URL encoding PEM.
func encode(pem []byte) string {
	return strings.NewReplacer("\n", "%0A", " ", "%20", "+", "%2B", "/", "%2F", "=", "%3D").Replace(string(pem))
}

// world is a Server with its log and metrics.
type world struct {
	*extauthz.Server
	t   testing.TB
	log *buffer
	reg *prometheus.Registry
}

type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func newWorld(t testing.TB, snapshot func() *authz.Snapshot) *world {
	t.Helper()
	return newWorldWith(t, extauthz.Config{Snapshot: snapshot})
}

func newWorldWith(t testing.TB, cfg extauthz.Config) *world {
	t.Helper()
	w := &world{t: t, log: &buffer{}, reg: prometheus.NewPedanticRegistry()}
	cfg.Log, cfg.Metrics = slog.New(slog.NewTextHandler(w.log, nil)), w.reg
	var err error
	if w.Server, err = extauthz.New(cfg); err != nil {
		t.Fatal(err)
	}
	return w
}

// Check is Answer on messages.
func (w *world) Check(ctx context.Context, r *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	w.t.Helper()
	return answerTo(w.t, w.Server, ctx, r)
}

func answerTo(t testing.TB, s *extauthz.Server, ctx context.Context, r *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	t.Helper()
	b, err := proto.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	return answerToBytes(t, s, ctx, b)
}

func answerToBytes(t testing.TB, s *extauthz.Server, ctx context.Context, b []byte) (*authv3.CheckResponse, error) {
	t.Helper()
	b, err := s.Answer(ctx, b)
	if err != nil {
		return nil, err
	}
	a := new(authv3.CheckResponse)
	if err := proto.Unmarshal(b, a); err != nil {
		t.Fatalf("the answer is no CheckResponse: %v", err)
	}
	return a, nil
}

func fixed(s *authz.Snapshot) func() *authz.Snapshot { return func() *authz.Snapshot { return s } }

func as(w identity.Workload) context.Context {
	return identity.WithCaller(context.Background(), identity.Caller{Workload: w})
}

// allow checks that server is allowed the request.
func (w *world) allow(r *authv3.CheckRequest) {
	w.t.Helper()
	a, err := w.Check(as(server), r)
	if err != nil {
		w.t.Fatal(err)
	}
	if codes.Code(a.GetStatus().GetCode()) != codes.OK || a.GetOkResponse() == nil || a.GetDynamicMetadata() != nil {
		w.t.Errorf("answer %v; want allowed; log:\n%s", a, w.log)
	}
}

// deny checks that server is denied the request for that reason.
func (w *world) deny(r *authv3.CheckRequest, reason authz.Reason) {
	w.t.Helper()
	w.denyTo(server, r, reason)
}

func (w *world) denyTo(pod identity.Workload, r *authv3.CheckRequest, reason authz.Reason) {
	w.t.Helper()
	a, err := w.Check(as(pod), r)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := isDenial(a, reason); err != nil {
		w.t.Errorf("%v: %v", err, a)
	}
}

// isDenial says what is wrong with a denial for that reason; any for "".
func isDenial(a *authv3.CheckResponse, reason authz.Reason) error {
	d := a.GetDeniedResponse()
	got := a.GetDynamicMetadata().GetFields()["reason"].GetStringValue()
	switch {
	case codes.Code(a.GetStatus().GetCode()) != codes.PermissionDenied || a.GetStatus().GetMessage() != "" || len(a.GetStatus().GetDetails()) != 0:
		return errors.New("the status is not a bare PermissionDenied")
	case d.GetStatus().GetCode() != 403 || d.GetBody() != "RBAC: access denied" || len(d.GetHeaders()) != 0:
		return errors.New("the client does not get Istio's bare 403")
	case a.GetDynamicMetadata().GetFields()["decision"].GetStringValue() != "deny":
		return errors.New("the metadata does not say deny")
	case reason != "" && got != string(reason):
		return errors.New("the reason is " + got + "; want " + string(reason))
	case got == "":
		return errors.New("there is no reason")
	}
	return nil
}

// metric is the value of a counter, or the count of a histogram, with those
// label values in the order of their names.
func (w *world) metric(name string, values ...string) float64 {
	w.t.Helper()
	families, err := w.reg.Gather()
	if err != nil {
		w.t.Fatal(err)
	}
	for _, mf := range families {
		if mf.GetName() != name {
			continue
		}
	metrics:
		for _, m := range mf.GetMetric() {
			for i, l := range m.GetLabel() {
				if l.GetValue() != values[i] {
					continue metrics
				}
			}
			return m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return 0
}

func clone(r *authv3.CheckRequest) *authv3.CheckRequest { return proto.Clone(r).(*authv3.CheckRequest) }
