package kube_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"maps"
	mathrand "math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/kube"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"
	"github.com/signet-mesh/signet/identity/attest/attesttest"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/test/bufconn"
)

const tokenEvery = 30 * time.Minute

// world is a random cluster, an authority that sees it through kube, and agents.
type world struct {
	t       *testing.T
	rand    *mathrand.Rand
	covered map[string]int
	step    int
	history []string

	actual, seen state
	queues       map[string][]func() // by kind
	ever         map[string]apiPod   // by UID
	everUID      []string
	uids         int
	tokens       []*token
	agents       []*agent
	issued       map[string]int // "SPIFFEID UID" → how often

	issuer    *attesttest.Issuer
	stranger  *attesttest.Issuer // signs with a key of its own
	api       *api
	feed      kube.Feed
	during    atomic.Pointer[interruption]
	authority *ca.Authority
	pipe      *bufconn.Listener
	server    *grpc.Server
	stop      context.CancelFunc
	wg        sync.WaitGroup
	roots     *x509.CertPool
}

// interrupted verifies workloads' tokens and lets something happen meanwhile.
type interrupted struct {
	ca.Attestor
	w *world
}

func (i interrupted) Attest(ctx context.Context, e attest.Evidence) (identity.Workload, time.Time, error) {
	w, until, err := i.Attestor.Attest(ctx, e)
	if err == nil {
		if d := i.w.during.Swap(nil); d != nil {
			d.happens()
			close(d.done)
		}
	}
	return w, until, err
}

// interruption happens while a workload's token is verified.
type interruption struct {
	happens func()
	done    chan struct{}
}

// happened takes back an interruption that nothing came to, or waits until it is
// over.
func (w *world) happened(d *interruption) {
	if w.during.Swap(nil) == nil {
		<-d.done
	}
}

func newWorld(t *testing.T, seed uint64, covered map[string]int) *world {
	w := &world{t: t, rand: mathrand.New(mathrand.NewPCG(seed, 0)), covered: covered, actual: newState(), seen: newState(),
		queues: map[string][]func(){}, ever: map[string]apiPod{}, issued: map[string]int{}, issuer: attesttest.NewIssuer(t), stranger: attesttest.NewIssuer(t)}
	w.api = &api{w: w}
	cluster, feed := kube.Fed(w.api, func(context.Context) (string, []byte, error) { return w.issuer.URL(), w.issuer.JWKS(), nil }, "")
	w.feed = feed
	agents, err := cluster.Attestor(attest.Config{Audience: "signet-ca", ServiceAccounts: accountNames[:1]}, true)
	if err != nil {
		t.Fatal(err)
	}
	workloads, err := cluster.Attestor(attest.Config{Audience: "signet", AnyServiceAccount: true}, false)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "ca")
	must(os.Mkdir(dir, 0o700))
	td := spiffeid.RequireTrustDomainFromString("cluster.local")
	w.authority, err = ca.Open(t.Context(), ca.Config{TrustDomain: td, DataDir: dir, DNSNames: []string{"localhost"},
		SVID: ca.SVIDConfig{TTL: 10 * time.Minute, AgentTTL: 20 * time.Minute}, TokenEvery: tokenEvery,
		Pods: cluster.Pods(), Agents: agents, Workloads: interrupted{workloads, w}})
	if err != nil {
		t.Fatal(err)
	}
	trust, _ := w.authority.Trust()
	w.roots = x509.NewCertPool()
	for _, c := range trust.Roots() {
		w.roots.AddCert(c)
	}
	ctx, stop := context.WithCancel(context.Background())
	w.stop = stop
	w.wg.Go(func() { _ = cluster.RunFed(ctx) })
	w.wg.Go(func() { _ = w.authority.Run(ctx) })
	w.pipe, w.server = bufconn.Listen(64<<10), w.authority.NewServer()
	w.wg.Go(func() { _ = w.server.Serve(w.pipe) })

	for _, n := range nodeNames {
		w.createNode(n)
	}
	for _, a := range accountNames {
		w.createAccount(a)
	}
	for i, n := range nodeNames {
		p := apiPod{namespace: "signet-system", name: fmt.Sprintf("agent-%d", i), uid: w.newUID(), account: "signet-agent", node: n}
		w.ever[p.uid], w.everUID = p, append(w.everUID, p.uid)
		w.setPod(p)
	}
	for _, k := range kinds {
		w.relist(k)
	}
	synctest.Wait()
	if err := cluster.Synced(ctx); err != nil {
		t.Fatal(err)
	}
	for _, p := range slices.SortedFunc(maps.Values(w.actual.pods), func(a, b apiPod) int { return strings.Compare(a.uid, b.uid) }) {
		tok := w.mint(p, "signet-ca", "")
		cert, err := w.attestToken(tok.text)
		if err != nil {
			t.Fatal(err)
		}
		w.adopt(cert, tok)
	}
	return w
}

func (w *world) close() {
	for _, a := range w.agents {
		a.end()
	}
	w.stop()
	w.server.Stop()
	w.wg.Wait()
	if err := w.authority.Close(); err != nil {
		w.t.Error(err)
	}
}

// pass lets time pass, for everything in the world.
func (w *world) pass(d time.Duration) {
	w.note("%v pass", d)
	time.Sleep(d)
	synctest.Wait()
}

func (w *world) note(format string, args ...any) {
	w.history = append(w.history, fmt.Sprintf("%4d %s ", w.step, time.Now().Format("15:04:05"))+fmt.Sprintf(format, args...))
}

// agent is one agent SVID, and what is on its streams.
type agent struct {
	pod     identity.Workload
	cert    *tls.Certificate
	conn    *grpc.ClientConn
	tokenAt time.Time
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	// lapsed says that it was dead for a moment, between two events, so that its
	// streams may have ended.
	lapsed bool

	mu     sync.Mutex
	pods   map[string]string // UID → what was told of it; guarded by mu
	open   int               // streams; guarded by mu
	untrue string            // guarded by mu
}

func (a *agent) String() string { return fmt.Sprintf("agent %s on %s", a.pod.PodUID, a.pod.Node) }

// adopt makes an agent of an SVID, with open streams.
func (w *world) adopt(cert *tls.Certificate, tok *token) {
	a := &agent{pod: tok.claims, cert: cert, conn: w.dial(cert), tokenAt: time.Now(), pods: map[string]string{}}
	w.agents = append(w.agents, a)
	a.follow()
	synctest.Wait()
}

// follow opens the agent's streams.
func (a *agent) follow() {
	ctx, cancel := context.WithCancel(context.Background())
	a.cancel = func() { cancel(); a.wg.Wait() }
	a.lapsed, a.open = false, 2
	client := capb.NewAuthorityClient(a.conn)
	end := func() { a.mu.Lock(); a.open--; a.mu.Unlock() }
	a.wg.Go(func() {
		defer end()
		s, err := client.WatchNode(ctx, &capb.WatchNodeRequest{})
		for err == nil {
			var m *capb.WatchNodeResponse
			if m, err = s.Recv(); err == nil {
				a.hear(m)
			}
		}
	})
	a.wg.Go(func() {
		defer end()
		s, err := client.WatchTrust(ctx)
		for err == nil {
			_, err = s.Recv()
		}
	})
}

// end ends an agent for good.
func (a *agent) end() {
	a.cancel()
	a.conn.Close()
}

func (a *agent) hear(m *capb.WatchNodeResponse) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if m.GetFull() {
		clear(a.pods)
	}
	if m.GetNodeUid() != a.pod.NodeUID {
		a.untrue = "node UID " + m.GetNodeUid()
	}
	for _, p := range m.GetPods() {
		a.pods[p.GetUid()] = p.GetUid() + " " + p.GetNamespace() + "/" + p.GetServiceAccount()
	}
	for _, uid := range m.GetDeleted() {
		delete(a.pods, uid)
	}
}

// watched is what the agent was told of its node, and how many of its two streams
// are open.
func (a *agent) watched() (pods []string, open int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Sorted(maps.Values(a.pods)), a.open
}

func (a *agent) violation() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.untrue
}

// anyAgent is one of the last agents: dead ones stay for a while.
func (w *world) anyAgent() *agent {
	if n := len(w.agents); n > 10 {
		for _, old := range w.agents[:n-10] {
			old.end()
		}
		w.agents = slices.Clone(w.agents[n-10:])
	}
	// More often one that is alive.
	for range 3 {
		if a := pick(w.rand, w.agents); w.agentDead(a) == "" {
			return a
		}
	}
	return pick(w.rand, w.agents)
}

func (w *world) dial(cert *tls.Certificate) *grpc.ClientConn {
	cfg := &tls.Config{RootCAs: w.roots, ServerName: "localhost", MinVersion: tls.VersionTLS13}
	if cert != nil {
		cfg.Certificates = []tls.Certificate{*cert}
	}
	conn, err := grpc.NewClient("passthrough:///pipe", grpc.WithTransportCredentials(credentials.NewTLS(cfg)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return w.pipe.DialContext(ctx) }))
	if err != nil {
		w.t.Fatal(err)
	}
	return conn
}

func newKey(t testing.TB) (*ecdsa.PrivateKey, []byte) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return key, pub
}

// attestToken shows a token on a connection of its own.
func (w *world) attestToken(token string) (*tls.Certificate, error) {
	conn := w.dial(nil)
	defer conn.Close()
	return w.tryAttest(conn, &capb.AttestRequest{Evidence: &capb.AttestRequest_Token{Token: token}})
}

func (w *world) tryAttest(conn *grpc.ClientConn, req *capb.AttestRequest) (*tls.Certificate, error) {
	key, pub := newKey(w.t)
	req.PublicKey = pub
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	resp, err := capb.NewAuthorityClient(conn).Attest(ctx, req)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(resp.GetSvid().GetChain()[0])
	if err != nil {
		w.t.Fatal(err)
	}
	return &tls.Certificate{Certificate: resp.GetSvid().GetChain(), PrivateKey: key, Leaf: leaf}, nil
}

// issue asks for one SVID: the name in the certificate, or why there is none.
func (w *world) issue(a *agent, item *capb.IssueItem) (id string, refusal *capb.Refusal, err error) {
	_, item.PublicKey = newKey(w.t)
	item.Kind = &capb.IssueItem_X509{X509: &capb.X509Kind{}}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	s, err := capb.NewAuthorityClient(a.conn).Issue(ctx)
	if err == nil {
		err = s.Send(&capb.IssueRequest{Id: 1, Items: []*capb.IssueItem{item}})
	}
	if err != nil {
		return "", nil, err
	}
	resp, err := s.Recv()
	if err != nil {
		return "", nil, err
	}
	r := resp.GetResults()[0]
	if r.GetX509() == nil {
		return "", r.GetRefusal(), nil
	}
	leaf, err := x509.ParseCertificate(r.GetX509().GetChain()[0])
	if err != nil {
		w.t.Fatal(err)
	}
	got, err := identity.CheckSVID(leaf)
	if err != nil {
		w.t.Fatal(err)
	}
	return got.String(), nil, nil
}

// checkLog compares the issuance log with what was obtained: what was refused must
// not have been certified either.
func (w *world) checkLog() {
	logged := map[string]int{}
	for r, err := range w.authority.Issuances(context.Background(), time.Time{}) {
		if err != nil {
			w.t.Error(err)
			return
		}
		if r.GetKind() == capb.IssuanceRecord_KIND_WORKLOAD {
			logged[r.GetSpiffeId()+" "+r.GetPodUid()]++
		}
	}
	if !maps.Equal(logged, w.issued) {
		w.t.Errorf("the issuance log has\n%v\nobtained were\n%v", logged, w.issued)
	}
}
