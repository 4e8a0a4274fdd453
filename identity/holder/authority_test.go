package holder_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/holder"
	"github.com/signet-mesh/signet/integration/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

var td = spiffeid.RequireTrustDomainFromString("cluster.local")

var (
	errDown    = errors.New("authority is down")
	errRefused = errors.New("evidence refused")
)

// ca is an issuing certificate and its key.
type ca struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

var serial = struct {
	sync.Mutex
	n int64
}{}

func nextSerial() *big.Int {
	serial.Lock()
	defer serial.Unlock()
	serial.n++
	return big.NewInt(serial.n)
}

func newKey() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return key
}

// scalar is the private number of an ECDSA key.
func scalar(key crypto.Signer) *big.Int {
	b, err := key.(*ecdsa.PrivateKey).Bytes()
	if err != nil {
		panic(err)
	}
	return new(big.Int).SetBytes(b)
}

// newCA makes an authority below parent, or a root if parent is nil.
func newCA(name string, parent *ca, life time.Duration) *ca {
	now := time.Now()
	c := &ca{key: newKey()}
	tmpl := &x509.Certificate{
		SerialNumber:          nextSerial(),
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             now.Add(-time.Minute),
		NotAfter:              now.Add(life),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	if parent == nil {
		parent = &ca{cert: tmpl, key: c.key}
	}
	c.cert = parent.sign(tmpl, c.key.Public())
	return c
}

func (c *ca) sign(tmpl *x509.Certificate, pub any) *x509.Certificate {
	der, err := x509.CreateCertificate(rand.Reader, tmpl, c.cert, pub, c.key)
	if err != nil {
		panic(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	return cert
}

// leafTemplate is an SVID as the profile wants it.
func leafTemplate(id spiffeid.ID, notAfter time.Time) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber:          nextSerial(),
		NotBefore:             time.Now().Add(-time.Minute),
		NotAfter:              notAfter,
		URIs:                  []*url.URL{id.URL()},
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
}

// authority is an Issuer with real certificates. A test that wants it to behave
// badly sets one of the functions, with set.
type authority struct {
	td          spiffeid.TrustDomain
	root, inter *ca
	trust       *identity.Trust
	pods        *identity.Pods
	ttl         time.Duration

	mu sync.Mutex
	// before may fail or delay a whole call.
	before func(ctx context.Context, requests []identity.Request) error
	// answer may answer one request instead of the authority.
	answer func(r identity.Request, id spiffeid.ID) *identity.Result
	// lie may change all answers.
	lie func([]identity.Result) []identity.Result
	// renewAt chooses; nil is half the time to live.
	renewAt func(now, notAfter time.Time) time.Time

	calls    []call
	inFlight int
	most     int // calls at the same time
}

type call struct {
	at       time.Time
	deadline time.Time
	requests []identity.Request
}

func newAuthority() *authority {
	a := &authority{td: td, pods: &identity.Pods{}, ttl: time.Hour}
	a.root = newCA("root", nil, 365*24*time.Hour)
	a.inter = newCA("intermediate", a.root, 7*24*time.Hour)
	var err error
	if a.trust, err = identity.NewTrust(1, td, []*x509.Certificate{a.root.cert}); err != nil {
		panic(err)
	}
	return a
}

func (a *authority) set(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
}

func (a *authority) down(ctx context.Context, _ []identity.Request) error { return errDown }

func (a *authority) Issue(ctx context.Context, requests []identity.Request) ([]identity.Result, error) {
	a.mu.Lock()
	deadline, _ := ctx.Deadline()
	a.calls = append(a.calls, call{at: time.Now(), deadline: deadline, requests: requests})
	a.inFlight++
	a.most = max(a.most, a.inFlight)
	before := a.before
	a.mu.Unlock()
	defer a.set(func() { a.inFlight-- })
	if before != nil {
		if err := before(ctx, requests); err != nil {
			return nil, err
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	results := make([]identity.Result, len(requests))
	for i, r := range requests {
		results[i] = a.issue(r)
	}
	if a.lie != nil {
		results = a.lie(results)
	}
	return results, nil
}

// issue answers one request. A token is "token of POD" and maybe more words.
func (a *authority) issue(r identity.Request) identity.Result {
	uid := r.PodUID
	if (r.Token == "") == (uid == "") {
		return identity.Result{Err: errors.New("exactly one evidence is needed"), RetryAfter: -1}
	}
	if r.Token != "" {
		uid = strings.Fields(r.Token)[2]
	}
	w, ok := a.pods.Lookup(uid)
	if !ok {
		return identity.Result{Err: errors.New("unknown pod"), RetryAfter: time.Second}
	}
	id, err := w.ID(a.td)
	if err != nil {
		return identity.Result{Err: err, RetryAfter: -1}
	}
	if a.answer != nil {
		if res := a.answer(r, id); res != nil {
			return *res
		}
	}
	pub, err := x509.ParsePKIXPublicKey(r.PublicKey)
	if err != nil {
		return identity.Result{Err: err, RetryAfter: -1}
	}
	now := time.Now()
	leaf := a.inter.sign(leafTemplate(id, now.Add(a.ttl)), pub)
	renewAt := now.Add(a.ttl / 2)
	if a.renewAt != nil {
		renewAt = a.renewAt(now, leaf.NotAfter)
	}
	return identity.Result{Chain: []*x509.Certificate{leaf, a.inter.cert}, RenewAt: renewAt}
}

// log is the calls so far.
func (a *authority) log() []call {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.calls)
}

func (a *authority) callCount() int { return len(a.log()) }

func (a *authority) lastCall() call {
	calls := a.log()
	return calls[len(calls)-1]
}

// mostAtOnce is how many calls were under way at the same time.
func (a *authority) mostAtOnce() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.most
}

// pod is a pod of service account sa on node-a.
func pod(sa, uid string) identity.Workload {
	return identity.Workload{Namespace: "default", ServiceAccount: sa, Pod: uid, PodUID: uid, Node: "node-a"}
}

func caller(w identity.Workload) identity.Caller { return identity.Caller{Workload: w} }

func withToken(w identity.Workload, token string) identity.Caller {
	return identity.Caller{Workload: w, Token: token, Until: time.Now().Add(time.Hour)}
}

func config(a *authority) holder.Config {
	return holder.Config{
		TrustDomain: td,
		Issuer:      a,
		Pods:        a.pods,
		Node:        "node-a",
		Trust:       func() *identity.Trust { return a.trust },
	}
}

// start makes a holder and runs it until the test ends.
func start(t *testing.T, cfg holder.Config) *holder.Holder {
	t.Helper()
	h, err := holder.New(cfg)
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	run(t, h)
	return h
}

// run runs h until the test ends or stop is called.
func run(t *testing.T, h *holder.Holder) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v, want the cause of its context's end", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// ask is one call of SVID that must not fail.
func ask(t *testing.T, h *holder.Holder, c identity.Caller) (*x509svid.SVID, <-chan struct{}) {
	t.Helper()
	svid, changed, err := h.SVID(c)
	if err != nil {
		t.Fatalf("SVID of %s: %v", c.Workload.PodUID, err)
	}
	if changed == nil {
		t.Fatalf("SVID of %s: no channel", c.Workload.PodUID)
	}
	return svid, changed
}

// have is an SVID that must be there and usable.
func have(t *testing.T, h *holder.Holder, a *authority, c identity.Caller) *x509svid.SVID {
	t.Helper()
	svid, _ := ask(t, h, c)
	if svid == nil {
		t.Fatalf("at %s there is no SVID for %s", time.Now().Format(time.TimeOnly), c.Workload.PodUID)
	}
	check(t, svid, a, c.Workload)
	return svid
}

// check verifies everything that must hold of an SVID that is given out.
func check(t *testing.T, svid *x509svid.SVID, a *authority, w identity.Workload) {
	t.Helper()
	want, err := w.ID(td)
	if err != nil {
		t.Fatal(err)
	}
	if svid.ID != want {
		t.Errorf("SVID is of %s, want %s", svid.ID, want)
	}
	if got, _, err := x509svid.Verify(svid.Certificates, a.trust, x509svid.WithTime(time.Now())); err != nil || got != want {
		t.Errorf("SVID of %s does not verify: %s, %v", want, got, err)
	}
	if !svid.PrivateKey.(*ecdsa.PrivateKey).PublicKey.Equal(svid.Certificates[0].PublicKey) {
		t.Errorf("SVID of %s has another key than its certificate", want)
	}
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// value is a metric's value: of a counter or gauge, or the count of a histogram.
// labels are "name=value".
func value(t *testing.T, r *prometheus.Registry, name string, labels ...string) float64 {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
	metric:
		for _, m := range f.GetMetric() {
			have := map[string]bool{}
			for _, l := range m.GetLabel() {
				have[fmt.Sprintf("%s=%s", l.GetName(), l.GetValue())] = true
			}
			for _, l := range labels {
				if !have[l] {
					continue metric
				}
			}
			switch {
			case m.Counter != nil:
				return m.Counter.GetValue()
			case m.Gauge != nil:
				return m.Gauge.GetValue()
			default:
				return float64(m.Histogram.GetSampleCount())
			}
		}
	}
	t.Fatalf("no metric %s %v", name, labels)
	return 0
}
