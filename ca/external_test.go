package ca_test

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/external/externaltest"
	"github.com/signet-mesh/signet/identity"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// logBuffer is what an authority logs.
type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}
func (b *logBuffer) count(s string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Count(b.b.String(), s)
}

// run does the authority's background work until the test stops it.
func (w *world) run() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
	}
}

// leaf issues an SVID for the server, on the strength of its pod.
func (w *world) leaf(agent capb.AuthorityClient) []*x509.Certificate {
	w.t.Helper()
	rs, err := issue(w.t, agent, item(w.t, byUID(server.PodUID)))
	if err != nil || rs[0].GetX509() == nil {
		w.t.Fatalf("no SVID: %v, %v", rs, err)
	}
	var chain []*x509.Certificate
	for _, der := range rs[0].GetX509().GetChain() {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			w.t.Fatal(err)
		}
		chain = append(chain, c)
	}
	return chain
}

// verifies checks a chain as a peer does that trusts roots.
func verifies(chain []*x509.Certificate, roots ...*x509.Certificate) error {
	opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), CurrentTime: time.Now()}
	for _, c := range chain[1:] {
		opts.Intermediates.AddCert(c)
	}
	for _, r := range roots {
		opts.Roots.AddCert(r)
	}
	_, err := chain[0].Verify(opts)
	return err
}

func short(c *ca.Config) {
	c.SVID.TTL, c.SVID.AgentTTL, c.SVID.MaxTTL = 2*time.Minute, 10*time.Minute, 10*time.Minute
	c.IntermediateTTL = time.Hour
}

// series signs requests: each for an hour, beginning 30 minutes after the one before.
func series(t *testing.T, root *externaltest.Signer, requests [][]byte, from time.Duration) (chains [][]byte) {
	t.Helper()
	for i, csr := range requests {
		start := from + time.Duration(i)*30*time.Minute
		chains = append(chains, externaltest.PEM(root.Sign(t, csr, externaltest.Valid(start, start+time.Hour)), root.Cert))
	}
	return chains
}

// TestOfflineRoot: requests, a series of three, its alarms, the next series taken in
// while the authority serves, and the end.
func TestOfflineRoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root := externaltest.Root(t, "offline", externaltest.P256)
		log := &logBuffer{}
		var first []*x509.Certificate
		w := newWorld(t, short, func(c *ca.Config) {
			c.OfflineRoot, c.Log = true, slog.New(slog.NewTextHandler(log, nil))
			if _, err := ca.Open(t.Context(), *c); err == nil || !strings.Contains(err.Error(), "authority csr") {
				t.Errorf("without a series: %v", err)
			}
			offline(t, *c, func(o *ca.Offline) {
				a, b := must(o.Requests(t.Context(), 2)), must(o.Requests(t.Context(), 3))
				if len(a) != 2 || len(b) != 3 || string(a[0]) != string(b[0]) || string(a[1]) != string(b[1]) {
					t.Errorf("%d requests, then %d, and not the same", len(a), len(b))
				}
				s := must(o.Import(t.Context(), series(t, root, b, -time.Minute)))
				first = s.Intermediates
				if len(first) != 3 || !s.Root.Equal(root.Cert) || !s.End.Equal(first[2].NotAfter) {
					t.Errorf("imported %+v", s)
				}
				if left := must(o.Requests(t.Context(), 0)); len(left) != 0 {
					t.Errorf("%d requests wait", len(left))
				}
			})
		})
		start := time.Now()
		stop := w.run()
		defer func() { stop(); w.close() }()
		agent, _ := w.attest(agentA)
		at := func(d time.Duration) {
			t.Helper()
			time.Sleep(time.Until(start.Add(d)))
			synctest.Wait()
			if err := w.Ready(); err != nil {
				t.Errorf("after %v: not ready: %v", d, err)
			}
			agent, _ = w.attest(agentA)
			if chain := w.leaf(agent); verifies(chain, root.Cert) != nil || time.Until(chain[0].NotAfter) < 119*time.Second {
				t.Errorf("after %v: an SVID that ends in %v: %v", d, time.Until(chain[0].NotAfter), verifies(chain, root.Cert))
			}
		}
		for i, d := range []time.Duration{time.Minute, 40 * time.Minute, 70 * time.Minute} {
			at(d)
			if !w.Intermediate().Equal(first[i]) {
				t.Errorf("after %v: the intermediate is not number %d", d, i+1)
			}
		}
		// The series has 119 minutes: alarms at 79 and at 107.
		for _, c := range []struct {
			after time.Duration
			alarm string
		}{{78 * time.Minute, ""}, {80 * time.Minute, "a third"}, {108 * time.Minute, "a tenth"}} {
			at(c.after)
			if err := w.Alarms(); (err == nil) != (c.alarm == "") || err != nil && !strings.Contains(err.Error(), c.alarm) {
				t.Errorf("after %v: alarm %v", c.after, err)
			}
		}
		if log.count("a third") != 1 || log.count("a tenth") != 1 {
			t.Errorf("logged %d and %d times", log.count("a third"), log.count("a tenth"))
		}
		// The next series, while it serves.
		requests := must(w.Requests(t.Context(), 1))
		if _, err := w.Import(t.Context(), series(t, externaltest.Root(t, "another", externaltest.P256), requests, 0)); !errors.Is(err, ca.ErrImport) {
			t.Errorf("under another root: %v", err)
		}
		must(w.Import(t.Context(), series(t, root, requests, -15*time.Minute)))
		at(111 * time.Minute)
		if err := w.Alarms(); err != nil {
			t.Errorf("with a new series: %v", err)
		}
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		if err := w.Ready(); err == nil || !strings.Contains(err.Error(), "authority csr") {
			t.Errorf("after the end: %v", err)
		}
		if files := must(os.ReadDir(filepath.Join(w.cfg.DataDir, "authority/keys"))); len(files) != 3 {
			t.Errorf("%d keys are left; those of expired intermediates go when the next is taken", len(files))
		}
	})
}

// offline opens the authority while nobody serves it.
func offline(t *testing.T, cfg ca.Config, f func(*ca.Offline)) {
	t.Helper()
	o, err := ca.OpenOffline(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	f(o)
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
}

func offlineConfig(t *testing.T) ca.Config {
	t.Helper()
	cfg := ca.Config{TrustDomain: td, OfflineRoot: true, DataDir: filepath.Join(t.TempDir(), "data")}
	mkdir(t, cfg.DataDir, 0o700)
	return cfg
}

// TestImportRefuses: what is wrong with one chain keeps all of them out.
func TestImportRefuses(t *testing.T) {
	t.Parallel()
	root := externaltest.Root(t, "offline", externaltest.P256)
	day := 24 * time.Hour
	sign := func(t *testing.T, csr []byte, from, to time.Duration) []byte {
		return externaltest.PEM(root.Sign(t, csr, externaltest.Valid(from, to)), root.Cert)
	}
	for name, c := range map[string]struct {
		chains func(t *testing.T, rs [][]byte) [][]byte
		says   string
	}{
		"a gap": {func(t *testing.T, rs [][]byte) [][]byte {
			return [][]byte{sign(t, rs[0], -day, day), sign(t, rs[1], 2*day, 3*day)}
		}, "must overlap"},
		"an overlap that cuts SVIDs short": {func(t *testing.T, rs [][]byte) [][]byte {
			return [][]byte{sign(t, rs[0], -day, day), sign(t, rs[1], day-time.Hour, 3*day)}
		}, "must overlap"},
		"none that is valid now": {func(t *testing.T, rs [][]byte) [][]byte { return [][]byte{sign(t, rs[0], day, 2*day)} }, "until then"},
		"one that is never used": {func(t *testing.T, rs [][]byte) [][]byte {
			return [][]byte{sign(t, rs[0], -day, 3*day), sign(t, rs[1], 0, 2*day)}
		}, "never be used"},
		"one twice": {func(t *testing.T, rs [][]byte) [][]byte {
			c := sign(t, rs[0], -day, day)
			return [][]byte{c, c}
		}, "imported once"},
		"one of no request": {func(t *testing.T, rs [][]byte) [][]byte {
			return [][]byte{sign(t, rs[0], -day, day), externaltest.PEM(root.Intermediate(t, "x", externaltest.P256).Chain()...)}
		}, "chain 2: key:"},
		"two roots": {func(t *testing.T, rs [][]byte) [][]byte {
			other := externaltest.Root(t, "other", externaltest.P256)
			return [][]byte{sign(t, rs[0], -day, 2*day), externaltest.PEM(other.Sign(t, rs[1], externaltest.Valid(0, 3*day)), other.Cert)}
		}, "another root"},
		"no root":        {func(t *testing.T, rs [][]byte) [][]byte { return [][]byte{externaltest.PEM(root.Sign(t, rs[0]))} }, "up to the root"},
		"an expired one": {func(t *testing.T, rs [][]byte) [][]byte { return [][]byte{sign(t, rs[0], -2*day, -day)} }, "expired"},
		"nothing":        {func(*testing.T, [][]byte) [][]byte { return nil }, "0 chains"},
		"rubble":         {func(*testing.T, [][]byte) [][]byte { return [][]byte{[]byte("x")} }, "chain 1: it holds no PEM"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := offlineConfig(t)
			offline(t, cfg, func(o *ca.Offline) {
				rs := must(o.Requests(t.Context(), 2))
				_, err := o.Import(t.Context(), c.chains(t, rs))
				if !errors.Is(err, ca.ErrImport) || !strings.Contains(err.Error(), c.says) {
					t.Errorf("got %v, want %q", err, c.says)
				}
				if again := must(o.Requests(t.Context(), 0)); len(again) != 2 || string(again[0]) != string(rs[0]) {
					t.Errorf("%d requests wait", len(again))
				}
			})
			offline(t, cfg, func(o *ca.Offline) {
				rs := must(o.Requests(t.Context(), 0))
				must(o.Import(t.Context(), [][]byte{sign(t, rs[0], -day, 2*day), sign(t, rs[1], 0, 3*day)}))
			})
		})
	}
	if _, err := ca.OpenOffline(t.Context(), ca.Config{TrustDomain: td, DataDir: t.TempDir()}); err == nil || !strings.Contains(err.Error(), "offlineRoot is not set") {
		t.Errorf("with an online root: %v", err)
	}
}

// TestFaultsOfAnOfflineRoot fails each commit in both ways: no request without its key,
// no intermediate in part.
func TestFaultsOfAnOfflineRoot(t *testing.T) {
	t.Parallel()
	root := externaltest.Root(t, "offline", externaltest.P256)
	for _, landed := range []bool{false, true} {
		var armed bool
		cfg := offlineConfig(t)
		good := cfg
		cfg.StoreOptions.Hook = func(l bool) error {
			if armed && l == landed {
				return errors.New("injected failure")
			}
			return nil
		}
		fails := func(step string, f func(*ca.Offline) error) {
			o, err := ca.OpenOffline(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			armed = true
			if f(o) == nil {
				t.Errorf("%s, landed=%v: a failed commit was taken for a good one", step, landed)
			}
			armed = false
			_ = o.Close()
		}
		fails("requests", func(o *ca.Offline) error { _, err := o.Requests(t.Context(), 2); return err })
		var rs [][]byte
		offline(t, good, func(o *ca.Offline) {
			if rs = must(o.Requests(t.Context(), 0)); len(rs) != map[bool]int{false: 0, true: 2}[landed] {
				t.Errorf("landed=%v: %d requests wait", landed, len(rs))
			}
			rs = must(o.Requests(t.Context(), 2))
		})
		chains := [][]byte{externaltest.PEM(root.Sign(t, rs[0], externaltest.Valid(-time.Hour, 24*time.Hour)), root.Cert), externaltest.PEM(root.Sign(t, rs[1], externaltest.Valid(0, 48*time.Hour)), root.Cert)}
		fails("import", func(o *ca.Offline) error { _, err := o.Import(t.Context(), chains); return err })
		offline(t, good, func(o *ca.Offline) {
			if left := must(o.Requests(t.Context(), 0)); len(left) != map[bool]int{false: 2, true: 0}[landed] {
				t.Errorf("landed=%v: %d requests wait after the import", landed, len(left))
			}
			if !landed {
				must(o.Import(t.Context(), chains))
			}
		})
		w := newWorld(t, func(c *ca.Config) { c.OfflineRoot, c.DataDir = true, cfg.DataDir })
		agent, _ := w.attest(agentA)
		if err := verifies(w.leaf(agent), root.Cert); err != nil {
			t.Error(err)
		}
		w.close()
	}
}

// TestALostKeyOfTheSeriesStopsTheStart: nothing is made in its place.
func TestALostKeyOfTheSeriesStopsTheStart(t *testing.T) {
	t.Parallel()
	root := externaltest.Root(t, "offline", externaltest.P256)
	cfg := offlineConfig(t)
	offline(t, cfg, func(o *ca.Offline) {
		rs := must(o.Requests(t.Context(), 1))
		must(o.Import(t.Context(), [][]byte{externaltest.PEM(root.Sign(t, rs[0]), root.Cert)}))
	})
	for _, key := range must(filepath.Glob(filepath.Join(cfg.DataDir, "authority/keys/intermediate-*"))) {
		if err := os.Remove(key); err != nil {
			t.Fatal(err)
		}
	}
	w := newWorld(t)
	w.close()
	full := w.cfg
	full.OfflineRoot, full.DataDir = true, cfg.DataDir
	if _, err := ca.Open(t.Context(), full); err == nil || !strings.Contains(err.Error(), "never makes a new key") {
		t.Errorf("got %v", err)
	}
	full.OfflineRoot = false
	if _, err := ca.Open(t.Context(), full); err == nil || !strings.Contains(err.Error(), "cannot change") {
		t.Errorf("with a root of its own: %v", err)
	}
}

// TestCacerts: a shared issuer, replaced under the same root, damaged, replaced under a
// new root that agents must know first, and the old root's end.
func TestCacerts(t *testing.T) {
	for _, kind := range []string{externaltest.P256, externaltest.RSA2048} {
		t.Run(kind, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { testCacerts(t, kind) })
		})
	}
}

func testCacerts(t *testing.T, kind string) {
	root := externaltest.Root(t, "one", kind)
	first := root.Intermediate(t, "first", kind)
	dir := t.TempDir()
	externaltest.Mount(t, dir, first.Istio(t))
	w := newWorld(t, func(c *ca.Config) {
		c.Cacerts = dir
		c.SVID.TTL, c.SVID.MaxTTL = time.Hour, 2*time.Hour
	})
	stop := w.run()
	defer func() { stop(); w.close() }()
	agent, _ := w.attest(agentA)
	issuedBy := func(s *externaltest.Signer, roots ...*x509.Certificate) []*x509.Certificate {
		t.Helper()
		chain := w.leaf(agent)
		if err := verifies(chain, roots...); err != nil || !chain[1].Equal(s.Cert) {
			t.Errorf("issued by %s: %v", chain[1].Subject, err)
		}
		return chain
	}
	issuedBy(first, root.Cert)

	second := root.Intermediate(t, "second", kind)
	externaltest.Mount(t, dir, second.Istio(t))
	time.Sleep(15 * time.Second)
	issuedBy(second, root.Cert)
	if seq := trustOf(w).Sequence(); seq != 1 {
		t.Errorf("the same root has sequence %d", seq)
	}

	broken := second.Istio(t)
	broken["ca-key.pem"] = externaltest.KeyPEM(t, first.Key)
	externaltest.Mount(t, dir, broken)
	time.Sleep(15 * time.Second)
	old := issuedBy(second, root.Cert)
	if err := w.Alarms(); err == nil || !strings.Contains(err.Error(), "key:") || w.Ready() != nil {
		t.Errorf("with files that do not belong together: alarm %v, ready %v", err, w.Ready())
	}

	// An agent that has not acknowledged the new root keeps it from being used.
	st, err := agent.WatchTrust(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	next := func() *capb.Trust {
		t.Helper()
		for {
			m, err := st.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if m.GetTrust().GetSequence() > 0 {
				return m.GetTrust()
			}
		}
	}
	next()
	newRoot := externaltest.Root(t, "two", kind)
	third := newRoot.Intermediate(t, "third", kind)
	externaltest.Mount(t, dir, third.CertManager(t))
	for _, name := range []string{"ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(5 * time.Minute)
	synctest.Wait()
	issuedBy(second, root.Cert)
	if err := w.Alarms(); err != nil {
		t.Errorf("with good files: %v", err)
	}
	var published *capb.Trust
	for published = next(); published.GetSequence() < 2; published = next() {
	}
	if n := len(published.GetBundles()[0].GetX509Authorities()); n != 2 {
		t.Errorf("the bundle has %d roots", n)
	}
	if err := st.Send(&capb.WatchTrustRequest{Acknowledged: published.GetSequence()}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Minute)
	synctest.Wait()
	issuedBy(third, newRoot.Cert)
	if err := verifies(old, root.Cert, newRoot.Cert); err != nil {
		t.Error(err)
	}

	// The old root is there as long as a leaf under it, and no longer.
	time.Sleep(110 * time.Minute)
	synctest.Wait()
	if n := len(trustOf(w).Roots()); n != 2 {
		t.Errorf("%d roots while leaves of the old one are valid", n)
	}
	time.Sleep(20 * time.Minute)
	synctest.Wait()
	if roots := trustOf(w).Roots(); len(roots) != 1 || !roots[0].Equal(newRoot.Cert) || trustOf(w).Sequence() != 3 {
		t.Errorf("%d roots, sequence %d", len(roots), trustOf(w).Sequence())
	}

	// A replacement while the authority is down is taken at the start.
	stop()
	w.close()
	fourth := externaltest.Root(t, "three", kind).Intermediate(t, "fourth", kind)
	externaltest.Mount(t, dir, fourth.CertManager(t))
	w.open()
	stop = w.run()
	agent, _ = w.attest(agentA)
	issuedBy(fourth, trustOf(w).Roots()...)
	if n := len(trustOf(w).Roots()); n != 2 {
		t.Errorf("%d roots after a replacement while it was down", n)
	}
	stop()
	w.close()
	if err := os.RemoveAll(filepath.Join(dir, "..data")); err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Open(t.Context(), w.cfg); err == nil || !strings.Contains(err.Error(), "belong there") {
		t.Errorf("without the files: %v", err)
	}
	externaltest.Mount(t, dir, fourth.CertManager(t))
	w.open()
	stop = w.run()
}

func trustOf(w *world) *identity.Trust { t, _ := w.Trust(); return t }

// TestUpstream has a command sign: this test's own binary, as TestMain lets it.
func TestUpstream(t *testing.T) {
	t.Parallel()
	root := externaltest.Root(t, "upstream", externaltest.P256)
	dir := t.TempDir()
	for name, text := range map[string][]byte{"root.pem": externaltest.PEM(root.Cert), "key.pem": externaltest.KeyPEM(t, root.Key), "mode": nil} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	mode := func(m string) {
		if err := os.WriteFile(filepath.Join(dir, "mode"), []byte(m), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	w := newWorld(t, func(c *ca.Config) {
		c.Upstream = ca.UpstreamConfig{Exec: []string{os.Args[0], upstreamArg, dir}, RootFile: filepath.Join(dir, "root.pem")}
		mode("fail")
		if _, err := ca.Open(t.Context(), *c); err == nil || !strings.Contains(err.Error(), "the upstream is closed") {
			t.Errorf("a command that fails: %v", err)
		}
		if _, err := os.Stat(filepath.Join(c.DataDir, "authority")); err == nil {
			t.Error("an authority is there whose first intermediate nobody signed")
		}
		mode("good")
	})
	agent, _ := w.attest(agentA)
	if err := verifies(w.leaf(agent), root.Cert); err != nil {
		t.Fatal(err)
	}
	before := w.Intermediate()
	for m, says := range map[string]string{"fail": "the upstream is closed", "other key": "key:", "other root": "not one that is expected", "nothing": "printed nothing", "brief": "twice as long", "no pathlen": "pathlen:0"} {
		mode(m)
		keys := len(must(os.ReadDir(filepath.Join(w.cfg.DataDir, "authority/keys"))))
		if err := w.RenewIntermediate(t.Context()); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: got %v, want %q", m, err, says)
		}
		if !w.Intermediate().Equal(before) || len(must(os.ReadDir(filepath.Join(w.cfg.DataDir, "authority/keys")))) != keys {
			t.Errorf("%s: another intermediate, or a key that stays behind", m)
		}
	}
	mode("good")
	if err := w.RenewIntermediate(t.Context()); err != nil {
		t.Fatal(err)
	}
	if w.Intermediate().Equal(before) {
		t.Error("the intermediate was not renewed")
	}
	after := w.Intermediate()
	w.close()
	w.open()
	if !w.Intermediate().Equal(after) {
		t.Error("after a restart it is another one")
	}
	agent, _ = w.attest(agentA)
	if err := verifies(w.leaf(agent), root.Cert); err != nil {
		t.Error(err)
	}
}

const upstreamArg = "be-the-upstream"

// beTheUpstream signs the request on standard input.
func beTheUpstream(dir string) error {
	read := func(name string) []byte { return must(os.ReadFile(filepath.Join(dir, name))) }
	certBlock, _ := pem.Decode(read("root.pem"))
	keyBlock, _ := pem.Decode(read("key.pem"))
	key := must(x509.ParsePKCS8PrivateKey(keyBlock.Bytes))
	root := &externaltest.Signer{Cert: must(x509.ParseCertificate(certBlock.Bytes)), Key: key.(crypto.Signer)}
	t := &testing.T{}
	csr, _ := pem.Decode(must(io.ReadAll(os.Stdin)))
	out := func(c *x509.Certificate, root *externaltest.Signer) error {
		_, err := os.Stdout.Write(externaltest.PEM(c, root.Cert))
		return err
	}
	switch string(read("mode")) {
	case "good":
		return out(root.Sign(t, csr.Bytes), root)
	case "brief":
		return out(root.Sign(t, csr.Bytes, externaltest.Valid(-time.Minute, time.Hour)), root)
	case "no pathlen":
		return out(root.Sign(t, csr.Bytes, func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = -1, false }), root)
	case "other key":
		return out(root.Intermediate(t, "x", externaltest.P256).Cert, root)
	case "other root":
		other := externaltest.Root(t, "other", externaltest.P256)
		return out(other.Sign(t, csr.Bytes), other)
	case "nothing":
		return nil
	}
	return errors.New("the upstream is closed")
}

// TestAdminOfAnOfflineRoot: the two RPCs, and what they refuse.
func TestAdminOfAnOfflineRoot(t *testing.T) {
	t.Parallel()
	root := externaltest.Root(t, "offline", externaltest.P256)
	w := newWorld(t, func(c *ca.Config) {
		c.OfflineRoot = true
		offline(t, *c, func(o *ca.Offline) {
			must(o.Import(t.Context(), [][]byte{externaltest.PEM(root.Sign(t, must(o.Requests(t.Context(), 1))[0]), root.Cert)}))
		})
	})
	client := adminOf(t, w)
	resp, err := client.CreateRequests(t.Context(), &capb.CreateRequestsRequest{Count: 2})
	if err != nil || len(resp.GetRequests()) != 2 {
		t.Fatal(resp, err)
	}
	if _, err := client.CreateRequests(t.Context(), &capb.CreateRequestsRequest{Count: 1 << 30}); err == nil {
		t.Error("a billion requests")
	}
	if _, err := client.ImportChains(t.Context(), &capb.ImportChainsRequest{Chains: [][]byte{[]byte("x")}}); err == nil || !strings.Contains(err.Error(), "InvalidArgument") {
		t.Errorf("rubble: %v", err)
	}
	got, err := client.ImportChains(t.Context(), &capb.ImportChainsRequest{Chains: [][]byte{externaltest.PEM(root.Sign(t, resp.GetRequests()[1], externaltest.Valid(time.Hour, 60*24*time.Hour)))}})
	if err != nil || len(got.GetIntermediates()) != 1 || string(got.GetRoot()) != string(root.Cert.Raw) {
		t.Error(got, err)
	}
	if s, err := client.Status(t.Context(), &capb.StatusRequest{}); err != nil || len(s.GetAuthorities()) != 3 {
		t.Errorf("%d authorities in the status, %v", len(s.GetAuthorities()), err)
	}
	own := newWorld(t)
	if _, err := adminOf(t, own).CreateRequests(t.Context(), &capb.CreateRequestsRequest{Count: 1}); err == nil || !strings.Contains(err.Error(), "FailedPrecondition") {
		t.Errorf("with a root of its own: %v", err)
	}
}

func adminOf(t *testing.T, w *world) capb.AdminClient {
	t.Helper()
	l := must(listenUnix(filepath.Join(shortDir(t), "s")))
	s := w.NewAdminServer()
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	conn := must(grpc.NewClient("unix:"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials())))
	t.Cleanup(func() { conn.Close() })
	return capb.NewAdminClient(conn)
}

// shortDir is a folder whose path is short enough for a socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir := must(os.MkdirTemp("", "ca-"))
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}
