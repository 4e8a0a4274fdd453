package sds_test

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
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/url"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/sds"
)

var td = spiffeid.RequireTrustDomainFromString("cluster.local")

// authority issues SVIDs as the real one does: root, intermediate, leaf.
type authority struct {
	t            testing.TB
	root, inter  *x509.Certificate
	rootK, inteK *ecdsa.PrivateKey
	serial       int64
}

func newAuthority(t testing.TB) *authority {
	a := &authority{t: t}
	a.rootK, a.inteK = a.key(), a.key()
	a.root = a.sign(&x509.Certificate{IsCA: true, KeyUsage: x509.KeyUsageCertSign, SubjectKeyId: []byte{1}}, &a.rootK.PublicKey, nil, a.rootK)
	a.inter = a.sign(&x509.Certificate{IsCA: true, KeyUsage: x509.KeyUsageCertSign, SubjectKeyId: []byte{2}}, &a.inteK.PublicKey, a.root, a.rootK)
	return a
}

func (a *authority) key() *ecdsa.PrivateKey {
	a.t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	return k
}

func (a *authority) sign(c *x509.Certificate, pub crypto.PublicKey, parent *x509.Certificate, k crypto.Signer) *x509.Certificate {
	a.t.Helper()
	a.serial++
	c.SerialNumber = big.NewInt(a.serial)
	c.BasicConstraintsValid = true
	c.NotBefore = time.Now().Add(-time.Minute)
	if c.NotAfter.IsZero() {
		c.NotAfter = time.Now().Add(time.Hour)
	}
	if parent == nil {
		parent = c
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, pub, k)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert
}

func (a *authority) svid(w identity.Workload, ttl time.Duration) *x509svid.SVID {
	a.t.Helper()
	id, err := w.ID(td)
	if err != nil {
		a.t.Fatal(err)
	}
	k := a.key()
	leaf := a.sign(&x509.Certificate{KeyUsage: x509.KeyUsageDigitalSignature, URIs: []*url.URL{id.URL()}, NotAfter: time.Now().Add(ttl),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}, &k.PublicKey, a.inter, a.inteK)
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{leaf, a.inter}, PrivateKey: k}
}

func (a *authority) trust(sequence uint64) *identity.Trust {
	a.t.Helper()
	t, err := identity.NewTrust(sequence, td, []*x509.Certificate{a.root})
	if err != nil {
		a.t.Fatal(err)
	}
	return t
}

// svids is the SVIDs of a node.
type svids struct {
	mu      sync.Mutex
	byPod   map[string]*x509svid.SVID
	err     error
	changed chan struct{}
	callers []identity.Caller
}

func newSVIDs() *svids {
	return &svids{byPod: map[string]*x509svid.SVID{}, changed: make(chan struct{})}
}

func (s *svids) SVID(c identity.Caller) (*x509svid.SVID, <-chan struct{}, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.callers = append(s.callers, c)
	if s.err != nil {
		return nil, nil, s.err
	}
	return s.byPod[c.Workload.PodUID], s.changed, nil
}

func (s *svids) set(m map[string]*x509svid.SVID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for pod, v := range m {
		s.byPod[pod] = v
	}
	close(s.changed)
	s.changed = make(chan struct{})
}

type fixture struct {
	ca      *authority
	svids   *svids
	trust   identity.Watched[*identity.Trust]
	secrets *sds.Secrets
	metrics *prometheus.Registry
}

func newFixture(t testing.TB) *fixture {
	t.Helper()
	f := &fixture{ca: newAuthority(t), svids: newSVIDs(), metrics: prometheus.NewRegistry()}
	var err error
	f.secrets, err = sds.NewSecrets(sds.SecretsConfig{TrustDomain: td, SVIDs: f.svids, Trust: f.trust.Load, Metrics: f.metrics})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// ask is what the secrets have for pod-a, by name.
func (f *fixture) ask(t testing.TB, names ...string) (rs map[string]sds.Resource, changed <-chan struct{}, err error) {
	t.Helper()
	got, changed, err := f.secrets.Resources(t.Context(), workload("pod-a"), sds.SecretType, names)
	rs = map[string]sds.Resource{}
	for _, r := range got {
		if _, twice := rs[r.Name]; twice {
			t.Errorf("%s is there twice", r.Name)
		}
		rs[r.Name] = r
	}
	return rs, changed, err
}

const idA, idB = "spiffe://cluster.local/ns/shop/sa/pod-a", "spiffe://cluster.local/ns/shop/sa/pod-b"

func TestSecretNames(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.svids.set(map[string]*x509svid.SVID{"pod-a": f.ca.svid(workload("pod-a"), time.Hour), "pod-b": f.ca.svid(workload("pod-b"), time.Hour)})
	f.trust.Store(f.ca.trust(7))
	for _, c := range []struct {
		name string
		ask  []string
		want string
	}{
		{"default is the caller's SVID", []string{"default"}, "default:svid"},
		{"ROOTCA is the bundle", []string{"ROOTCA"}, "ROOTCA:bundle"},
		{"the caller's SPIFFE ID is its SVID", []string{idA}, idA + ":svid"},
		{"the trust domain's ID is the bundle", []string{"spiffe://cluster.local"}, "spiffe://cluster.local:bundle"},
		{"the wildcard is default and ROOTCA", []string{"*"}, "ROOTCA:bundle default:svid"},
		{"names add to the wildcard, once", []string{"*", "default", idA}, "ROOTCA:bundle default:svid " + idA + ":svid"},
		{"another workload's SPIFFE ID is unknown", []string{idB}, ""},
		{"an agent's SPIFFE ID is unknown", []string{"spiffe://cluster.local/signet/agent/node-a"}, ""},
		{"another trust domain is unknown", []string{"spiffe://other.example"}, ""},
		{"names are exact", []string{"Default", "rootca", "default ", idA + "/", "SPIFFE://cluster.local", "", "cluster.local", "ALL"}, ""},
		{"nothing is nothing", nil, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			rs, _, err := f.ask(t, c.ask...)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, n := range sorted(rs) {
				s := unpack(t, rs[n].Body)
				if err := s.Validate(); err != nil {
					t.Errorf("Envoy's own validation: %v", err)
				}
				kind := "svid"
				if s.GetTlsCertificate() == nil {
					kind = "bundle"
				}
				if s.GetName() != n || (kind == "bundle") != (rs[n].TrustSequence == 7) {
					t.Errorf("%s is called %s and has trust sequence %d", n, s.GetName(), rs[n].TrustSequence)
				}
				got = append(got, n+":"+kind)
			}
			if fmt.Sprint(got) != "["+c.want+"]" {
				t.Errorf("got %v", got)
			}
		})
	}
	if got := counter(t, f.metrics, "signet_sds_refused_identities_total"); got != 4 {
		t.Errorf("%v identities refused", got)
	}
	if rs, _, err := f.secrets.Resources(t.Context(), workload("pod-a"), "type.googleapis.com/other", []string{"default"}); len(rs) != 0 || err != nil {
		t.Errorf("another type: %v, %v", rs, err)
	}
}

func counter(t testing.TB, g prometheus.Gatherer, name string) float64 {
	t.Helper()
	return (&node{metrics: g.(*prometheus.Registry)}).metric(t, name)
}

func TestSVIDOnTheWire(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	svid := f.ca.svid(workload("pod-a"), time.Hour)
	f.svids.set(map[string]*x509svid.SVID{"pod-a": svid})
	f.trust.Store(f.ca.trust(1))
	rs, _, err := f.ask(t, "default", "ROOTCA")
	if err != nil {
		t.Fatal(err)
	}
	c := unpack(t, rs["default"].Body).GetTlsCertificate()
	chain, key := c.GetCertificateChain().GetInlineBytes(), c.GetPrivateKey().GetInlineBytes()
	// What a TLS stack and what a SPIFFE library make of it.
	if _, err := tls.X509KeyPair(chain, key); err != nil {
		t.Fatal(err)
	}
	got, err := x509svid.Parse(chain, key)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Certificates) != 2 || !got.Certificates[0].Equal(svid.Certificates[0]) {
		t.Errorf("chain has %d certificates; the leaf must be the first of two", len(got.Certificates))
	}
	if b, _ := pem.Decode(key); b == nil || b.Type != "PRIVATE KEY" {
		t.Error("the key is not PKCS #8")
	}
	ca := unpack(t, rs["ROOTCA"].Body).GetValidationContext().GetTrustedCa().GetInlineBytes()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) || !bytes.Equal(ca, f.trust.Value().PEM()) {
		t.Fatalf("trusted_ca is %q", ca)
	}
	inter := x509.NewCertPool()
	inter.AddCert(got.Certificates[1])
	if _, err := got.Certificates[0].Verify(x509.VerifyOptions{Roots: pool, Intermediates: inter}); err != nil {
		t.Error(err)
	}
}

func TestWhatIsNotThereYetHasNoContent(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	wantEmpty := func(names ...string) <-chan struct{} {
		t.Helper()
		rs, changed, err := f.ask(t, names...)
		if err != nil || len(rs) != len(names) {
			t.Fatalf("%d resources, %v", len(rs), err)
		}
		for n, r := range rs {
			if r.Body != nil {
				t.Errorf("%s has content", n)
			}
		}
		return changed
	}
	svidCame, trustCame := wantEmpty("default", idA), wantEmpty("ROOTCA")
	f.svids.set(map[string]*x509svid.SVID{"pod-a": f.ca.svid(workload("pod-a"), time.Hour)})
	<-svidCame
	f.trust.Store(f.ca.trust(1))
	<-trustCame
	rs, changed, err := f.ask(t, "default", "ROOTCA")
	if err != nil || rs["default"].Body == nil || rs["ROOTCA"].Body == nil {
		t.Fatalf("got %v, %v", sorted(rs), err)
	}
	// Either of two changes is told.
	f.trust.Store(f.ca.trust(2))
	<-changed
	_, changed, _ = f.ask(t, "default", "ROOTCA")
	f.svids.set(map[string]*x509svid.SVID{"pod-a": f.ca.svid(workload("pod-a"), -time.Second)})
	<-changed
	wantEmpty("default") // expired
}

func TestAskingForTheBundleWantsNoIdentity(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.trust.Store(f.ca.trust(1))
	if _, _, err := f.ask(t, "ROOTCA", idB, "nosuch"); err != nil {
		t.Fatal(err)
	}
	if len(f.svids.callers) != 0 {
		t.Error("an SVID was wanted")
	}
}

func TestTheProofOfTheCallerGoesAlong(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	for _, proven := range []string{"pod-a", "pod-b"} {
		ctx := identity.WithCaller(t.Context(), identity.Caller{Workload: workload(proven), Token: "token"})
		if _, _, err := f.secrets.Resources(ctx, workload("pod-a"), sds.SecretType, []string{"default"}); err != nil {
			t.Fatal(err)
		}
	}
	a, b := f.svids.callers[0], f.svids.callers[1]
	if a.Token != "token" || b.Token != "" || b.Workload.PodUID != "pod-a" {
		t.Errorf("callers %+v and %+v: a proof goes with its own workload only", a, b)
	}
}

type badKey struct{ crypto.Signer }

func (badKey) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("no")
}

func TestWhatFailsHoldsBackNothingElse(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		spoil func(f *fixture)
		want  string // that still has content
	}{
		{"the SVIDs fail", func(f *fixture) { f.svids.err = errors.New("out of order") }, "ROOTCA"},
		{"the SVID is another workload's", func(f *fixture) {
			f.svids.set(map[string]*x509svid.SVID{"pod-a": f.ca.svid(workload("pod-b"), time.Hour)})
		}, "ROOTCA"},
		{"the SVID has no certificate", func(f *fixture) { f.svids.byPod["pod-a"].Certificates = nil }, "ROOTCA"},
		{"the key cannot be encoded", func(f *fixture) { f.svids.byPod["pod-a"].PrivateKey = badKey{} }, "ROOTCA"},
		{"the trust is another trust domain's", func(f *fixture) {
			other, err := identity.NewTrust(9, spiffeid.RequireTrustDomainFromString("other.example"), []*x509.Certificate{f.ca.root})
			if err != nil {
				panic(err)
			}
			f.trust.Store(other)
		}, "default"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t)
			f.svids.set(map[string]*x509svid.SVID{"pod-a": f.ca.svid(workload("pod-a"), time.Hour)})
			f.trust.Store(f.ca.trust(1))
			c.spoil(f)
			rs, _, err := f.ask(t, "default", "ROOTCA")
			if err == nil {
				t.Error("no error")
			}
			if len(rs) != 2 {
				t.Errorf("%d resources; both names are known", len(rs))
			}
			for n, r := range rs {
				if (r.Body != nil) != (n == c.want) {
					t.Errorf("%s has content: %v", n, r.Body != nil)
				}
			}
		})
	}
}

func TestACallerWithoutANameGetsTheBundleOnly(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.trust.Store(f.ca.trust(1))
	w := workload("pod-a")
	w.Namespace = "../kube-system"
	rs, _, err := f.secrets.Resources(t.Context(), w, sds.SecretType, []string{"default", "ROOTCA"})
	if err == nil || len(f.svids.callers) != 0 {
		t.Errorf("an SVID was wanted for %s: %v", w.Namespace, err)
	}
	for _, r := range rs {
		if (r.Body != nil) != (r.Name == "ROOTCA") {
			t.Errorf("%s has content: %v", r.Name, r.Body != nil)
		}
	}
}

func TestVersionsFollowTheContent(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	one, two := f.ca.svid(workload("pod-a"), time.Hour), f.ca.svid(workload("pod-a"), time.Hour)
	version := func(name string) string {
		t.Helper()
		rs, _, err := f.ask(t, name)
		if err != nil {
			t.Fatal(err)
		}
		return rs[name].Version
	}
	f.svids.set(map[string]*x509svid.SVID{"pod-a": one})
	f.trust.Store(f.ca.trust(1))
	v1, r1 := version("default"), version("ROOTCA")
	same := *one
	f.svids.set(map[string]*x509svid.SVID{"pod-a": &same})
	f.trust.Store(f.ca.trust(2))
	if version("default") != v1 || version("ROOTCA") != r1 {
		t.Error("the same content has another version")
	}
	f.svids.set(map[string]*x509svid.SVID{"pod-a": two})
	f.trust.Store(newAuthority(t).trust(3))
	if version("default") == v1 || version("ROOTCA") == r1 {
		t.Error("other content has the same version")
	}
	if v1 == "" || r1 == "" {
		t.Error("empty version")
	}
}

// The encoded form holds a private key, so it must go when the SVID goes.
func TestTheEncodedFormGoesWithTheSVID(t *testing.T) {
	f := newFixture(t)
	for range 3 {
		f.svids.set(map[string]*x509svid.SVID{"pod-a": f.ca.svid(workload("pod-a"), time.Hour)})
		for _, name := range []string{"default", idA, "default"} {
			if _, _, err := f.ask(t, name); err != nil {
				t.Fatal(err)
			}
		}
	}
	left := func(want int) {
		t.Helper()
		deadline := time.Now().Add(time.Minute)
		for f.secrets.Encoded() != want {
			if time.Now().After(deadline) {
				t.Fatalf("%d SVIDs are kept, not %d", f.secrets.Encoded(), want)
			}
			runtime.GC()
			runtime.Gosched()
		}
	}
	left(1) // the one that is still held
	f.svids.set(map[string]*x509svid.SVID{"pod-a": nil})
	left(0)
}

func TestAnSVIDIsEncodedOnceForAllStreams(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.svids.set(map[string]*x509svid.SVID{"pod-a": f.ca.svid(workload("pod-a"), time.Hour)})
	a, _, _ := f.ask(t, "default")
	b, _, _ := f.ask(t, "default")
	if a["default"].Body != b["default"].Body {
		t.Error("two streams have two encodings")
	}
}

func TestWaitingForTwoChangesEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		ctx, cancel := context.WithCancel(t.Context())
		_, changed, err := f.secrets.Resources(ctx, workload("pod-a"), sds.SecretType, []string{"default", "ROOTCA"})
		if err != nil || changed == nil {
			t.Fatal(err)
		}
		cancel() // the bubble fails if a goroutine is left
	})
}

func TestSecretsConfigIsChecked(t *testing.T) {
	t.Parallel()
	good := sds.SecretsConfig{TrustDomain: td, SVIDs: newSVIDs(), Trust: (&identity.Watched[*identity.Trust]{}).Load, Metrics: prometheus.NewRegistry()}
	if _, err := sds.NewSecrets(good); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*sds.SecretsConfig){
		"no trust domain":       func(c *sds.SecretsConfig) { c.TrustDomain = spiffeid.TrustDomain{} },
		"no SVIDs":              func(c *sds.SecretsConfig) { c.SVIDs = nil },
		"no trust":              func(c *sds.SecretsConfig) { c.Trust = nil },
		"metrics already there": func(*sds.SecretsConfig) {},
	} {
		c := good
		spoil(&c)
		if _, err := sds.NewSecrets(c); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// FuzzSecretNames asks for any name: nothing but the caller's own SVID and the
// bundle may come, under exactly that name.
func FuzzSecretNames(f *testing.F) {
	for _, n := range []string{"default", "ROOTCA", "*", idA, idB, "spiffe://cluster.local", "spiffe://cluster.local/ns/shop/sa/pod-a/../pod-b", ""} {
		f.Add(n)
	}
	fx := newFixture(f)
	own := fx.ca.svid(workload("pod-a"), 24*time.Hour)
	fx.svids.set(map[string]*x509svid.SVID{"pod-a": own, "pod-b": fx.ca.svid(workload("pod-b"), 24*time.Hour)})
	fx.trust.Store(fx.ca.trust(1))
	f.Fuzz(func(t *testing.T, name string) {
		rs, _, err := fx.secrets.Resources(t.Context(), workload("pod-a"), sds.SecretType, []string{name})
		if err != nil {
			t.Fatal(err)
		}
		known := slices.Contains([]string{"default", "ROOTCA", "*", idA, "spiffe://cluster.local"}, name)
		if known != (len(rs) > 0) {
			t.Fatalf("%q has %d resources", name, len(rs))
		}
		for _, r := range rs {
			s := unpack(t, r.Body)
			if name != "*" && s.GetName() != name {
				t.Errorf("%q got %q", name, s.GetName())
			}
			if c := s.GetTlsCertificate(); c != nil {
				got, err := x509svid.Parse(c.GetCertificateChain().GetInlineBytes(), c.GetPrivateKey().GetInlineBytes())
				if err != nil || got.ID != own.ID {
					t.Errorf("%q got an SVID of %v, %v", name, got, err)
				}
			}
		}
	})
}
