package caclient_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/caclient"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"
	"github.com/signet-mesh/signet/identity/attest/attesttest"
	"github.com/signet-mesh/signet/integration/leaktest"
	"github.com/signet-mesh/signet/integration/process"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

var (
	td     = spiffeid.RequireTrustDomainFromString("cluster.local")
	agent  = identity.Workload{Namespace: "signet-system", ServiceAccount: "signet-agent", Pod: "agent-a", PodUID: "uid-agent-a", Node: "node-a", NodeUID: "uid-node-a"}
	server = identity.Workload{Namespace: "default", ServiceAccount: "server", Pod: "server-0", PodUID: "uid-server", Node: "node-a", NodeUID: "uid-node-a", Labels: map[string]string{"app": "server"}}
	remote = identity.Workload{Namespace: "default", ServiceAccount: "db", Pod: "db-0", PodUID: "uid-db", Node: "node-b", NodeUID: "uid-node-b"}
)

// authority is a real one on loopback that can be stopped and started.
type authority struct {
	*ca.Authority
	t      *testing.T
	cfg    ca.Config
	issuer *attesttest.Issuer
	pods   *identity.Pods
	addr   string
	stop   func()
}

func newAuthority(t *testing.T, edits ...func(*ca.Config)) *authority {
	t.Helper()
	// Below the range of ports that connections get, so that it is there again after a stop.
	ports, err := process.FreePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{t: t, issuer: attesttest.NewIssuer(t), pods: &identity.Pods{}, addr: "127.0.0.1:" + ports[0]}
	a.pods.Replace([]identity.Workload{agent, server, remote})
	keys, err := attest.OpenKeys(attest.KeysConfig{File: a.issuer.JWKSFile()})
	if err != nil {
		t.Fatal(err)
	}
	attestor := func(audience string) *attest.Attestor {
		at, err := attest.New(attest.Config{Issuer: a.issuer.URL(), Audience: audience, Keys: keys, Pods: a.pods, AnyServiceAccount: true})
		if err != nil {
			t.Fatal(err)
		}
		return at
	}
	dir := filepath.Join(t.TempDir(), "ca")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	a.cfg = ca.Config{TrustDomain: td, DataDir: dir, Pods: a.pods, Agents: attestor("signet-ca"), Workloads: attestor("signet")}
	for _, e := range edits {
		e(&a.cfg)
	}
	a.start()
	t.Cleanup(func() { a.stop() })
	return a
}

// start serves on the address of the time before.
func (a *authority) start() {
	a.t.Helper()
	var err error
	if a.Authority, err = ca.Open(a.t.Context(), a.cfg); err != nil {
		a.t.Fatal(err)
	}
	l, err := net.Listen("tcp", a.addr)
	if err != nil {
		a.t.Fatal(err)
	}
	s := a.NewServer()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Serve(l) })
	wg.Go(func() { _ = a.Run(ctx) })
	a.stop = sync.OnceFunc(func() {
		s.Stop()
		cancel()
		wg.Wait()
		if err := a.Close(); err != nil {
			a.t.Error(err)
		}
	})
}

// config is that of an agent that this authority accepts.
func (a *authority) config() caclient.Config {
	a.t.Helper()
	dir := a.t.TempDir()
	trust, _ := a.Trust()
	write(a.t, filepath.Join(dir, "root.pem"), trust.PEM())
	write(a.t, filepath.Join(dir, "token"), []byte(a.issuer.Token(agent, "signet-ca")+"\n"))
	return caclient.Config{Addresses: []string{a.addr}, TrustDomain: td, Node: "node-a", Pods: &identity.Pods{},
		RootFile: filepath.Join(dir, "root.pem"), TokenFile: filepath.Join(dir, "token"), Version: "test"}
}

func write(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// run runs a client until the test ends or end is called.
func run(t *testing.T, cfg caclient.Config) (c *caclient.Client, end func()) {
	t.Helper()
	c, err := caclient.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c, runThis(t, c)
}

// runThis runs a client that was made.
func runThis(t *testing.T, c *caclient.Client) (end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	end = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(end)
	return end
}

// eventually polls until f holds.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !f() {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
		<-time.After(5 * time.Millisecond)
	}
}

func ready(t *testing.T, c *caclient.Client) {
	t.Helper()
	eventually(t, "a session", func() bool { return c.Ready() == nil && c.Synced() })
}

func request(t *testing.T) (identity.Request, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return identity.Request{PublicKey: pub}, key
}

func TestAttestWatchAndIssue(t *testing.T) {
	a := newAuthority(t)
	cfg := a.config()
	c, _ := run(t, cfg)
	ready(t, c)
	if tr, _ := c.Trust(); tr.Sequence() != 1 || !tr.Roots()[0].Equal(rootOf(a)) {
		t.Errorf("trust %d", tr.Sequence())
	}
	if w, ok := cfg.Pods.Lookup("uid-server"); !ok || !w.Equal(server) {
		t.Errorf("pod %+v, want %+v", w, server)
	}
	if _, ok := cfg.Pods.Lookup("uid-db"); ok || cfg.Pods.Len() != 2 || c.NodeUID() != "uid-node-a" {
		t.Errorf("%d pods of node %s", cfg.Pods.Len(), c.NodeUID())
	}
	byUID, _ := request(t)
	byUID.PodUID = "uid-server"
	byToken, _ := request(t)
	byToken.Token = a.issuer.Token(server, "signet")
	foreign, _ := request(t)
	foreign.PodUID = "uid-db"
	unknown, _ := request(t)
	unknown.PodUID = "uid-later"
	rs, err := c.Issue(t.Context(), []identity.Request{byUID, foreign, byToken, unknown})
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range []int{0, 2} {
		id, err := identity.CheckSVID(rs[i].Chain[0])
		if err != nil || id.String() != "spiffe://cluster.local/ns/default/sa/server" || rs[i].Err != nil || !rs[i].RenewAt.After(time.Now()) {
			t.Errorf("result %d: %s, %v, %+v", i, id, err, rs[i])
		}
	}
	if rs[1].Err == nil || rs[1].RetryAfter >= 0 || rs[1].Chain != nil {
		t.Errorf("a pod on another node: %+v", rs[1])
	}
	if rs[3].Err == nil || rs[3].RetryAfter <= 0 {
		t.Errorf("a pod that may come: %+v", rs[3])
	}

	a.pods.Delete("uid-server")
	eventually(t, "the pod's end", func() bool { _, ok := cfg.Pods.Lookup("uid-server"); return !ok })
	if rs, err := c.Issue(t.Context(), []identity.Request{byUID}); err != nil || rs[0].Err == nil {
		t.Errorf("a pod that is gone: %+v, %v", rs, err)
	}
}

func rootOf(a *authority) *x509.Certificate {
	tr, _ := a.Trust()
	return tr.Roots()[0]
}

// TestConcurrentBatches: answers find their callers.
func TestConcurrentBatches(t *testing.T) {
	a := newAuthority(t)
	c, _ := run(t, a.config())
	ready(t, c)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for range 5 {
				r, key := request(t)
				r.PodUID = "uid-server"
				rs, err := c.Issue(t.Context(), []identity.Request{r})
				if err != nil || rs[0].Err != nil {
					t.Errorf("%v, %v", rs, err)
					return
				}
				if !key.PublicKey.Equal(rs[0].Chain[0].PublicKey) {
					t.Error("an answer went to another caller")
				}
			}
		})
	}
	wg.Wait()
}

// TestTheAuthorityIsRecognisedByRootAndName: servers that are not the authority
// get nothing, least of all the token.
func TestTheAuthorityIsRecognisedByRootAndName(t *testing.T) {
	a, other := newAuthority(t), newAuthority(t)
	sum := sha256.Sum256(rootOf(a).Raw)
	c, _ := run(t, a.config())
	ready(t, c)
	// A workload's SVID is a server certificate of the same root.
	r, key := request(t)
	r.PodUID = "uid-server"
	rs, err := c.Issue(t.Context(), []identity.Request{r})
	if err != nil || rs[0].Err != nil {
		t.Fatal(rs, err)
	}
	workload := &tls.Certificate{PrivateKey: key, Certificate: [][]byte{rs[0].Chain[0].Raw, rs[0].Chain[1].Raw, rootOf(a).Raw}}
	for _, v := range []struct {
		name string
		edit func(*caclient.Config)
		good bool
		says string
	}{
		{"by the hash of the root", func(c *caclient.Config) { c.RootFile, c.RootHash = "", hex.EncodeToString(sum[:]) }, true, ""},
		{"another authority is refused by file", func(c *caclient.Config) { c.Addresses = []string{other.addr} }, false, "not an authority"},
		{"another authority is refused by hash", func(c *caclient.Config) {
			c.Addresses, c.RootFile, c.RootHash = []string{other.addr}, "", hex.EncodeToString(sum[:])
		}, false, "no certificate with the pinned hash"},
		{"a workload that poses as one is refused", func(c *caclient.Config) { c.Addresses = []string{impostor(t, workload)} }, false, "its certificate names"},
		{"a workload that poses as one is refused, also by hash", func(c *caclient.Config) {
			c.Addresses, c.RootFile, c.RootHash = []string{impostor(t, workload)}, "", hex.EncodeToString(sum[:])
		}, false, "its certificate names"},
		{"without the file of roots nothing is trusted", func(c *caclient.Config) { c.RootFile += "-x" }, false, "reading pinned roots"},
		{"with a file that holds something else too", func(c *caclient.Config) {
			write(t, c.RootFile, append(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte{1}}), '\n'))
		}, false, "only certificates belong there"},
		{"another trust domain is refused", func(c *caclient.Config) { c.TrustDomain = spiffeid.RequireTrustDomainFromString("other.domain") }, false, "not an authority"},
		{"the token of another node is refused", func(c *caclient.Config) { c.Node = "node-b" }, false, "token is of another node"},
		{"without its token there is nothing to show", func(c *caclient.Config) { c.TokenFile += "-x" }, false, "reading the agent's token"},
		{"an empty token is none", func(c *caclient.Config) { write(t, c.TokenFile, []byte("\n")) }, false, "no token"},
	} {
		t.Run(v.name, func(t *testing.T) {
			cfg := a.config()
			v.edit(&cfg)
			c, end := run(t, cfg)
			defer end()
			if v.good {
				ready(t, c)
				return
			}
			eventually(t, "a reason", func() bool { err := c.Ready(); return err != nil && strings.Contains(err.Error(), v.says) })
			if cred, _ := c.Credential(); cred != nil {
				t.Error("it has a credential")
			}
			if tr, _ := c.Trust(); tr != nil && v.says != "token is of another node" {
				t.Error("it believes a bundle")
			}
		})
	}
}

// impostor serves TLS with that certificate, and gRPC behind it.
func impostor(t *testing.T, cert *tls.Certificate) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{*cert}})))
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	t.Cleanup(func() { s.Stop(); <-done })
	return l.Addr().String()
}

// TestTheAgentsSVIDIsRenewed under constant issuance: no batch fails. A busy machine has
// the half of an SVID's life to get to it.
func TestTheAgentsSVIDIsRenewed(t *testing.T) {
	t.Parallel()
	a := newAuthority(t, func(c *ca.Config) {
		c.SVID = ca.SVIDConfig{TTL: 8 * time.Second, AgentTTL: 8 * time.Second, MinTTL: time.Second}
	})
	c, _ := run(t, a.config())
	ready(t, c)
	serials := map[string]bool{}
	for len(serials) < 4 {
		cred, _ := c.Credential()
		serials[cred.SVID.Certificates[0].SerialNumber.String()] = true
		r, _ := request(t)
		r.PodUID = "uid-server"
		if rs, err := c.Issue(t.Context(), []identity.Request{r}); err != nil || rs[0].Err != nil {
			t.Fatalf("after %d SVIDs: %v, %v", len(serials), rs, err)
		}
		time.Sleep(5 * time.Millisecond) // the pace of the load
	}
}

// TestTheAuthorityGoesAwayAndComesBack: the client keeps what it has and goes on
// with the same SVID; with what was saved it starts without the authority.
func TestTheAuthorityGoesAwayAndComesBack(t *testing.T) {
	a := newAuthority(t)
	cfg := a.config()
	c, end := run(t, cfg)
	ready(t, c)
	cred, _ := c.Credential()
	a.stop()
	eventually(t, "the loss", func() bool { return c.Ready() != nil })
	r, _ := request(t)
	r.PodUID = "uid-server"
	if _, err := c.Issue(t.Context(), []identity.Request{r}); !errors.Is(err, caclient.ErrUnavailable) {
		t.Errorf("Issue without an authority: %v", err)
	}
	if tr, _ := c.Trust(); tr == nil || cfg.Pods.Len() != 2 {
		t.Error("what was known is gone")
	}
	times, again := c.Reached()
	a.start()
	eventually(t, "the return", func() bool { return c.Ready() == nil })
	select {
	case <-again:
	case <-time.After(time.Minute):
		t.Error("nobody was told of the return")
	}
	if now, _ := c.Reached(); now <= times {
		t.Errorf("reached %d times, %d before", now, times)
	}
	eventually(t, "issuance", func() bool {
		rs, err := c.Issue(t.Context(), []identity.Request{r})
		return err == nil && rs[0].Err == nil
	})
	if now, _ := c.Credential(); now != cred {
		t.Error("the return cost an attestation")
	}

	end()
	saved, _ := c.Credential()
	trust, _ := c.Trust()
	a.stop()
	next := a.config()
	next.Saved, next.SavedTrust = saved, trust
	next.TokenFile += "-gone"
	c, _ = run(t, next)
	if tr, _ := c.Trust(); tr != trust {
		t.Error("saved trust is not there at once")
	}
	a.start()
	ready(t, c)
}

// TestAnAuthorityThatForgotItsAgents: its store was restored from before they
// attested. They come back by token.
func TestAnAuthorityThatForgotItsAgents(t *testing.T) {
	a := newAuthority(t)
	c, _ := run(t, a.config())
	a.stop()
	before := map[string][]byte{}
	for _, name := range []string{"state.db"} {
		b, err := os.ReadFile(filepath.Join(a.cfg.DataDir, "authority", name))
		if err != nil {
			t.Fatal(err)
		}
		before[name] = b
	}
	a.start()
	ready(t, c)
	first, _ := c.Credential()
	a.stop()
	for name, b := range before {
		if bytes.Contains(b, first.SVID.Certificates[0].SerialNumber.Bytes()) {
			t.Fatal("the copy is too new")
		}
		write(t, filepath.Join(a.cfg.DataDir, "authority", name), b)
	}
	a.start()
	eventually(t, "another SVID", func() bool {
		now, _ := c.Credential()
		return now != nil && now != first && c.Ready() == nil
	})
}

// TestAnOlderBundleIsRefused: a sequence never goes back.
func TestAnOlderBundleIsRefused(t *testing.T) {
	a := newAuthority(t)
	cfg := a.config()
	trust, err := identity.NewTrust(7, td, []*x509.Certificate{rootOf(a)})
	if err != nil {
		t.Fatal(err)
	}
	cfg.SavedTrust = trust
	c, _ := run(t, cfg)
	eventually(t, "the refusal", func() bool {
		err := c.Ready()
		return err != nil && strings.Contains(err.Error(), "an old state was put back")
	})
	if now, _ := c.Trust(); now.Sequence() != 7 {
		t.Errorf("sequence %d", now.Sequence())
	}
}

func TestConfigIsChecked(t *testing.T) {
	a := newAuthority(t)
	for name, edit := range map[string]func(*caclient.Config){
		"ca.addresses": func(c *caclient.Config) { c.Addresses = nil },
		"HOST:PORT":    func(c *caclient.Config) { c.Addresses = []string{"x"} },
		"ca.rootFile":  func(c *caclient.Config) { c.RootFile = "" },
		"give one":     func(c *caclient.Config) { c.RootHash = "00" },
		"ca.rootHash":  func(c *caclient.Config) { c.RootFile, c.RootHash = "", "00" },
		"node":         func(c *caclient.Config) { c.Node = "a/b" },
		"ca.tokenFile": func(c *caclient.Config) { c.TokenFile = "" },
		"set of pods":  func(c *caclient.Config) { c.Pods = nil },
	} {
		cfg := a.config()
		edit(&cfg)
		if _, err := caclient.New(cfg); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestRenewalsHaveAPause: a clock that is ahead makes every SVID due at once
// and must not make the agent renew without end.
func TestRenewalsHaveAPause(t *testing.T) {
	a := newAuthority(t)
	cfg := a.config()
	c, end := run(t, cfg)
	ready(t, c)
	saved, _ := c.Credential()
	end()
	due := *saved
	due.RenewAt = time.Now().Add(-time.Minute)
	cfg = a.config()
	cfg.Saved = &due
	c, _ = run(t, cfg)
	ready(t, c)
	<-time.After(300 * time.Millisecond)
	if now, _ := c.Credential(); now != &due {
		t.Error("an SVID that was due was renewed without a pause: a clock that is ahead would do that without end")
	}
}
