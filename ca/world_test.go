package ca_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"
	"github.com/signet-mesh/signet/identity/attest/attesttest"
	"github.com/signet-mesh/signet/integration/leaktest"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == upstreamArg {
		if err := beTheUpstream(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	leaktest.Main(m)
}

var td = spiffeid.RequireTrustDomainFromString("cluster.local")

// Pods of the small world that most tests run in.
var (
	agentA  = identity.Workload{Namespace: "signet-system", ServiceAccount: "signet-agent", Pod: "agent-a", PodUID: "uid-agent-a", Node: "node-a", NodeUID: "uid-node-a"}
	agentB  = identity.Workload{Namespace: "signet-system", ServiceAccount: "signet-agent", Pod: "agent-b", PodUID: "uid-agent-b", Node: "node-b", NodeUID: "uid-node-b"}
	server  = identity.Workload{Namespace: "default", ServiceAccount: "server", Pod: "server-0", PodUID: "uid-server", Node: "node-a", NodeUID: "uid-node-a", Labels: map[string]string{"app": "server"}}
	client  = identity.Workload{Namespace: "default", ServiceAccount: "client", Pod: "client-0", PodUID: "uid-client", Node: "node-a", NodeUID: "uid-node-a"}
	onNodeB = identity.Workload{Namespace: "default", ServiceAccount: "db", Pod: "db-0", PodUID: "uid-db", Node: "node-b", NodeUID: "uid-node-b"}
)

// world is an authority on real storage, reached over a pipe with real TLS.
type world struct {
	*ca.Authority
	t      testing.TB
	issuer *attesttest.Issuer
	pods   *identity.Pods
	cfg    ca.Config
	pipe   *bufconn.Listener
	time   func() time.Time // of clients; nil: time.Now
	server *grpc.Server
	stop   context.CancelFunc
	done   chan struct{}
	// attestor verifies tokens for an audience, of these accounts; of none: of all.
	attestor func(audience string, accounts ...string) *attest.Attestor
}

// config is a world's configuration; edits change it before anything is opened.
func newWorld(t testing.TB, edits ...func(*ca.Config)) *world {
	t.Helper()
	w := &world{t: t, issuer: attesttest.NewIssuer(t), pods: &identity.Pods{}}
	w.pods.Replace([]identity.Workload{agentA, agentB, server, client, onNodeB})
	keys, err := attest.OpenKeys(attest.KeysConfig{File: w.issuer.JWKSFile()})
	if err != nil {
		t.Fatal(err)
	}
	w.attestor = func(audience string, accounts ...string) *attest.Attestor {
		a, err := attest.New(attest.Config{Issuer: w.issuer.URL(), Audience: audience, Keys: keys, Pods: w.pods,
			ServiceAccounts: accounts, AnyServiceAccount: len(accounts) == 0})
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	dir := filepath.Join(t.TempDir(), "data")
	mkdir(t, dir, 0o700)
	w.cfg = ca.Config{TrustDomain: td, DataDir: dir, DNSNames: []string{"localhost"}, Pods: w.pods,
		Agents: w.attestor("signet-ca", "signet-system/signet-agent"), Workloads: w.attestor("signet"), Log: slog.New(slog.DiscardHandler)}
	for _, e := range edits {
		e(&w.cfg)
	}
	w.open()
	t.Cleanup(w.close)
	return w
}

// open starts the authority and serves it.
func (w *world) open() {
	w.t.Helper()
	a, err := ca.Open(w.t.Context(), w.cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	w.serve(a)
}

// serve serves an authority that was opened.
func (w *world) serve(a *ca.Authority) {
	w.Authority = a
	w.pipe = bufconn.Listen(64 << 10)
	w.server = a.NewServer()
	ctx, stop := context.WithCancel(context.Background())
	w.stop, w.done = stop, make(chan struct{})
	go func() {
		defer close(w.done)
		go func() { <-ctx.Done(); w.server.Stop() }()
		_ = w.server.Serve(w.pipe)
	}()
}

// close ends it and checks every invariant of what it left behind.
func (w *world) close() {
	w.t.Helper()
	if w.stop == nil {
		return
	}
	w.stop()
	w.stop = nil
	<-w.done
	w.server.Stop()
	if err := w.Log().Err(); err == nil {
		check(w)
	}
	if err := w.Authority.Close(); err != nil && w.Log().Err() == nil {
		w.t.Error(err)
	}
}

// check verifies the log, and that serials are unique and sorted by time as they
// are meant to be.
func check(w *world) {
	w.t.Helper()
	if err := w.Log().Verify(context.Background()); err != nil {
		w.t.Errorf("issuance log: %v", err)
	}
	seen := map[string]bool{}
	for r := range records(w) {
		if r.GetDecision() != nil {
			continue
		}
		s := string(r.Serial)
		if seen[s] {
			w.t.Errorf("serial %x was recorded twice", r.Serial)
		}
		seen[s] = true
		if len(r.KeyHash) != 32 || r.NotAfter <= r.NotBefore || r.Kind == 0 || r.Evidence == 0 || len(r.Serial) != 17 {
			w.t.Errorf("record is incomplete: %v", r)
		}
	}
}

// records reads the whole issuance log.
func records(w *world) func(func(*capb.IssuanceRecord) bool) {
	return func(yield func(*capb.IssuanceRecord) bool) {
		for rec, err := range w.Log().Scan(context.Background(), 1) {
			if err != nil {
				w.t.Errorf("reading the log: %v", err)
				return
			}
			r := &capb.IssuanceRecord{}
			if err := proto.Unmarshal(rec.Data, r); err != nil {
				w.t.Errorf("record %d: %v", rec.Sequence, err)
				return
			}
			if !yield(r) {
				return
			}
		}
	}
}

// recorded reports whether the certificate's serial is in the log.
func (w *world) recorded(c *x509.Certificate) bool {
	for r := range records(w) {
		if string(r.Serial) == string(c.SerialNumber.FillBytes(make([]byte, 17))) {
			return true
		}
	}
	return false
}

func newKey(t testing.TB) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key, spki(t, key.Public())
}

func spki(t testing.TB, pub crypto.PublicKey) []byte {
	t.Helper()
	b, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// dial connects with a client certificate, or with none.
func (w *world) dial(cert *tls.Certificate) capb.AuthorityClient {
	w.t.Helper()
	return capb.NewAuthorityClient(w.conn(cert))
}

func (w *world) conn(cert *tls.Certificate) *grpc.ClientConn {
	w.t.Helper()
	roots := x509.NewCertPool()
	for _, c := range trustOf(w).Roots() {
		roots.AddCert(c)
	}
	cfg := &tls.Config{RootCAs: roots, ServerName: "localhost", MinVersion: tls.VersionTLS13, Time: w.time}
	if cert != nil {
		cfg.Certificates = []tls.Certificate{*cert}
	}
	conn, err := grpc.NewClient("passthrough:///pipe", grpc.WithTransportCredentials(credentials.NewTLS(cfg)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return w.pipe.DialContext(ctx) }))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { conn.Close() })
	return conn
}

// attest makes an agent of that pod, and returns a connection with its SVID.
func (w *world) attest(agent identity.Workload) (capb.AuthorityClient, *tls.Certificate) {
	w.t.Helper()
	cert, err := w.tryAttest(w.dial(nil), func(r *capb.AttestRequest) {
		r.Evidence = &capb.AttestRequest_Token{Token: w.issuer.Token(agent, "signet-ca")}
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return w.dial(cert), cert
}

func (w *world) tryAttest(c capb.AuthorityClient, edit func(*capb.AttestRequest)) (*tls.Certificate, error) {
	w.t.Helper()
	return w.tryAttestFor(c, edit, new(*capb.Trust))
}

// tryAttestFor is tryAttest, and the trust that comes with the SVID.
func (w *world) tryAttestFor(c capb.AuthorityClient, edit func(*capb.AttestRequest), trust **capb.Trust) (*tls.Certificate, error) {
	w.t.Helper()
	key, pub := newKey(w.t)
	req := &capb.AttestRequest{PublicKey: pub}
	edit(req)
	resp, err := c.Attest(w.t.Context(), req)
	if err != nil {
		return nil, err
	}
	*trust = resp.GetTrust()
	leaf, err := x509.ParseCertificate(resp.GetSvid().GetChain()[0])
	if err != nil {
		w.t.Fatal(err)
	}
	return &tls.Certificate{Certificate: resp.GetSvid().GetChain(), PrivateKey: key, Leaf: leaf}, nil
}

// issue sends one batch on a stream of its own.
func issue(t testing.TB, c capb.AuthorityClient, items ...*capb.IssueItem) ([]*capb.IssueResult, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	s, err := c.Issue(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.Send(&capb.IssueRequest{Id: 7, Items: items}); err != nil {
		_, err = s.Recv()
		return nil, err
	}
	resp, err := s.Recv()
	if err != nil {
		return nil, err
	}
	if resp.GetId() != 7 || len(resp.GetResults()) != len(items) {
		t.Fatalf("response %d with %d results for %d items", resp.GetId(), len(resp.GetResults()), len(items))
	}
	return resp.GetResults(), s.CloseSend()
}

// item asks for an X.509-SVID with a fresh key; with sets the evidence.
func item(t testing.TB, with func(*capb.IssueItem)) *capb.IssueItem {
	t.Helper()
	_, pub := newKey(t)
	i := &capb.IssueItem{PublicKey: pub, Kind: &capb.IssueItem_X509{X509: &capb.X509Kind{}}}
	with(i)
	return i
}

func byUID(uid string) func(*capb.IssueItem) {
	return func(i *capb.IssueItem) { i.Evidence = &capb.IssueItem_PodUid{PodUid: uid} }
}

func byToken(token string) func(*capb.IssueItem) {
	return func(i *capb.IssueItem) { i.Evidence = &capb.IssueItem_Token{Token: token} }
}
