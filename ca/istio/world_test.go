package istio_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/istio"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"
	"github.com/signet-mesh/signet/identity/attest/attesttest"
	"github.com/signet-mesh/signet/integration/leaktest"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/structpb"
	pb "istio.io/api/security/v1alpha1"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

var td = spiffeid.RequireTrustDomainFromString("cluster.local")

const dnsName = "istiod.istio-system.svc"

// Pods of the small world.
var (
	server  = identity.Workload{Namespace: "default", ServiceAccount: "server", Pod: "server-0", PodUID: "uid-server", Node: "node-a"}
	client  = identity.Workload{Namespace: "default", ServiceAccount: "client", Pod: "client-0", PodUID: "uid-client", Node: "node-a"}
	onNodeB = identity.Workload{Namespace: "default", ServiceAccount: "db", Pod: "db-0", PodUID: "uid-db", Node: "node-b"}
	ztunnel = identity.Workload{Namespace: "istio-system", ServiceAccount: "ztunnel", Pod: "ztunnel-a", PodUID: "uid-ztunnel", Node: "node-a"}
)

// world is an authority on real storage with Istio's door, reached over a pipe
// with real TLS.
type world struct {
	t      testing.TB
	issuer *attesttest.Issuer
	pods   *identity.Pods
	ca     ca.Config
	cfg    istio.Config
	log    *lines

	*istio.Door
	authority *ca.Authority
	pipe      *bufconn.Listener
	grpc      *grpc.Server
	done      sync.WaitGroup
	stop      context.CancelFunc
}

func newWorld(t testing.TB, edits ...func(*world)) *world {
	t.Helper()
	w := &world{t: t, issuer: attesttest.NewIssuer(t), pods: &identity.Pods{}, log: &lines{}}
	w.pods.Replace([]identity.Workload{server, client, onNodeB, ztunnel})
	keys, err := attest.OpenKeys(attest.KeysConfig{File: w.issuer.JWKSFile()})
	if err != nil {
		t.Fatal(err)
	}
	attestor := func(edit func(*attest.Config)) *attest.Attestor {
		c := attest.Config{Issuer: w.issuer.URL(), Keys: keys, Pods: w.pods, AnyServiceAccount: true}
		edit(&c)
		a, err := attest.New(c)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	dir := filepath.Join(t.TempDir(), "data")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(w.log, nil))
	w.ca = ca.Config{TrustDomain: td, DataDir: dir, Pods: w.pods, Log: log,
		Agents: attestor(func(c *attest.Config) { c.Audience = "signet-ca" }), Workloads: attestor(func(c *attest.Config) { c.Audience = "signet" })}
	w.cfg = istio.Config{Pods: w.pods, MaxTTL: time.Hour, NodeAccounts: []string{"istio-system/ztunnel"}, Log: log,
		Tokens: []ca.Attestor{attestor(func(c *attest.Config) { c.Audience, c.MaxLifetime = "istio-ca", 13*time.Hour })}}
	for _, e := range edits {
		e(w)
	}
	w.open()
	t.Cleanup(w.close)
	return w
}

// firstParty also accepts tokens of that audience, extended ones too.
func firstParty(audience string) func(*world) {
	return func(w *world) {
		keys, err := attest.OpenKeys(attest.KeysConfig{File: w.issuer.JWKSFile()})
		if err != nil {
			w.t.Fatal(err)
		}
		a, err := attest.New(attest.Config{Issuer: w.issuer.URL(), Keys: keys, Pods: w.pods, AnyServiceAccount: true, Audience: audience, Extended: true})
		if err != nil {
			w.t.Fatal(err)
		}
		w.cfg.Tokens = append(w.cfg.Tokens, a)
	}
}

// anyPodOf believes every pod of a node.
func anyPodOf(node string) func(*world) {
	return func(w *world) {
		keys, err := attest.OpenKeys(attest.KeysConfig{File: w.issuer.JWKSFile()})
		if err != nil {
			w.t.Fatal(err)
		}
		a, err := attest.New(attest.Config{Issuer: w.issuer.URL(), Keys: keys, Pods: w.pods, AnyServiceAccount: true, Audience: "istio-ca", AnyPodOf: []string{node}})
		if err != nil {
			w.t.Fatal(err)
		}
		w.cfg.AnyPodOf, w.cfg.Tokens = []string{node}, []ca.Attestor{a}
	}
}

func renewalFor(accounts ...string) func(*world) {
	return func(w *world) { w.cfg.RenewalFor = accounts }
}

func (w *world) open() {
	w.t.Helper()
	var err error
	if w.authority, err = ca.Open(w.t.Context(), w.ca); err != nil {
		w.t.Fatal(err)
	}
	w.cfg.Authority = w.authority
	if w.Door, err = istio.New(w.t.Context(), w.cfg); err != nil {
		w.t.Fatal(err)
	}
	w.pipe, w.grpc = bufconn.Listen(64<<10), w.NewServer()
	ctx, stop := context.WithCancel(context.Background())
	w.stop = stop
	pipe, server := w.pipe, w.grpc
	w.done.Go(func() { _ = server.Serve(pipe) })
	w.done.Go(func() {
		if err := w.Run(ctx); err != nil {
			w.t.Error(err)
		}
	})
}

func (w *world) close() {
	w.t.Helper()
	if w.stop == nil {
		return
	}
	w.grpc.Stop()
	w.stop()
	w.stop = nil
	w.done.Wait()
	if err := w.authority.Close(); err != nil {
		w.t.Error(err)
	}
}

func (w *world) restart() { w.close(); w.open() }

func (w *world) roots() *x509.CertPool {
	trust, _ := w.authority.Trust()
	pool := x509.NewCertPool()
	for _, c := range trust.Roots() {
		pool.AddCert(c)
	}
	return pool
}

// dial connects as Istio's clients do, with a client certificate or with none.
func (w *world) dial(cert *tls.Certificate) pb.IstioCertificateServiceClient {
	w.t.Helper()
	return pb.NewIstioCertificateServiceClient(w.conn(cert))
}

func (w *world) conn(cert *tls.Certificate) *grpc.ClientConn {
	cfg := &tls.Config{RootCAs: w.roots(), ServerName: dnsName}
	if cert != nil {
		cfg.Certificates = []tls.Certificate{*cert}
	}
	conn, err := grpc.NewClient("passthrough:///pipe", grpc.WithTransportCredentials(credentials.NewTLS(cfg)),
		grpc.WithDefaultCallOptions(grpc.MaxCallSendMsgSize(64<<20)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return w.pipe.DialContext(ctx) }))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { conn.Close() })
	return conn
}

// call is one call: metadata and request, which edits change.
type call struct {
	md   []string
	req  *pb.IstioCertificateRequest
	key  crypto.Signer
	cert *tls.Certificate
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func csrPEM(t testing.TB, key crypto.Signer, tmpl *x509.CertificateRequest) string {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, tmpl, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

type edit func(*call)

// bearer sends a token as Istio's clients do, from the cluster Kubernetes.
func bearer(token string) edit {
	return func(c *call) { c.md = append(c.md, "authorization", "Bearer "+token, "ClusterID", "Kubernetes") }
}
func md(kv ...string) edit         { return func(c *call) { c.md = append(c.md, kv...) } }
func with(t *tls.Certificate) edit { return func(c *call) { c.cert = t } }
func seconds(n int64) edit         { return func(c *call) { c.req.ValidityDuration = n } }
func csr(s string) edit            { return func(c *call) { c.req.Csr = s } }
func field(name string, v any) edit {
	return func(c *call) {
		if c.req.Metadata == nil {
			c.req.Metadata = &structpb.Struct{Fields: map[string]*structpb.Value{}}
		}
		value, err := structpb.NewValue(v)
		if err != nil {
			panic(err)
		}
		c.req.Metadata.Fields[name] = value
	}
}
func as(id string) edit { return field("ImpersonatedIdentity", id) }
func signedBy(t testing.TB, key crypto.Signer) edit {
	return func(c *call) { c.key, c.req.Csr = key, csrPEM(t, key, &x509.CertificateRequest{}) }
}

// try calls with a fresh key unless edits say otherwise.
func (w *world) try(edits ...edit) (*pb.IstioCertificateResponse, crypto.Signer, error) {
	w.t.Helper()
	c := &call{req: &pb.IstioCertificateRequest{}, key: newKey(w.t)}
	c.req.Csr = csrPEM(w.t, c.key, &x509.CertificateRequest{})
	for _, e := range edits {
		e(c)
	}
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
	defer cancel()
	resp, err := w.dial(c.cert).CreateCertificate(metadata.AppendToOutgoingContext(ctx, c.md...), c.req)
	return resp, c.key, err
}

// allow checks everything that holds for each certificate, and returns it.
func (w *world) allow(t testing.TB, id string, edits ...edit) *tls.Certificate {
	t.Helper()
	resp, key, err := w.try(edits...)
	if err != nil {
		t.Fatal(err)
	}
	return w.checkChain(t, id, resp.GetCertChain(), key)
}

// checkChain checks istiod's form of an answer: one certificate an element, the
// roots as the last.
func (w *world) checkChain(t testing.TB, id string, chain []string, key crypto.Signer) *tls.Certificate {
	t.Helper()
	if len(chain) != 3 {
		t.Fatalf("%d elements; want leaf, intermediate and roots", len(chain))
	}
	out := &tls.Certificate{PrivateKey: key}
	intermediates := x509.NewCertPool()
	for i, e := range chain {
		block, rest := pem.Decode([]byte(e))
		if block == nil || len(rest) > 0 || e[len(e)-1] != '\n' {
			t.Fatalf("element %d is not one certificate and a line break:\n%s", i, e)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		switch i {
		case 0:
			out.Leaf = c
		case 1:
			intermediates.AddCert(c)
		}
		if i < 2 {
			out.Certificate = append(out.Certificate, c.Raw)
		}
	}
	if trust, _ := w.authority.Trust(); chain[2] != string(trust.PEM()) {
		t.Error("the last element is not the roots")
	}
	if _, err := out.Leaf.Verify(x509.VerifyOptions{Roots: w.roots(), Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Error(err)
	}
	got, err := identity.CheckSVID(out.Leaf)
	if err != nil || got.String() != id {
		t.Errorf("it names %s, %v; want %s", got, err, id)
	}
	if l := out.Leaf; len(l.DNSNames)+len(l.IPAddresses)+len(l.EmailAddresses) > 0 || l.Subject.String() != "" {
		t.Errorf("it has other names: %v %v %v %s", l.DNSNames, l.IPAddresses, l.EmailAddresses, l.Subject)
	}
	if !out.Leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool }).Equal(key.Public()) {
		t.Error("another key was certified")
	}
	if r := w.record(out.Leaf); r == nil {
		t.Error("it is not in the issuance log")
	} else if r.Door != "istio" || r.SpiffeId != id || r.PodUid == "" || r.Node == "" {
		t.Errorf("record %v", r)
	}
	return out
}

// deny checks a refusal's code and message.
func (w *world) deny(t testing.TB, code codes.Code, message string, edits ...edit) {
	t.Helper()
	before := w.records()
	resp, _, err := w.try(edits...)
	if err == nil {
		t.Fatalf("issued:\n%v", resp)
	}
	if s := status.Convert(err); s.Code() != code || message != "" && s.Message() != message {
		t.Errorf("%v %q; want %v %q", s.Code(), s.Message(), code, message)
	}
	if after := w.records(); after != before {
		t.Errorf("%d records of a refused request", after-before)
	}
}

// records counts the workload certificates in the issuance log.
func (w *world) records() (n int) {
	for r, err := range w.authority.Issuances(context.Background(), time.Time{}) {
		if err != nil {
			w.t.Fatal(err)
		}
		if r.Kind == capb.IssuanceRecord_KIND_WORKLOAD {
			n++
		}
	}
	return n
}

func (w *world) record(c *x509.Certificate) *capb.IssuanceRecord {
	for r, err := range w.authority.Issuances(context.Background(), time.Time{}) {
		if err != nil {
			w.t.Fatal(err)
		}
		if bytes.Equal(r.Serial, ca.Serial(c)) {
			return r
		}
	}
	return nil
}

// lines is a log that can be read.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
