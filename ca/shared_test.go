package ca_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/external/externaltest"
	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/storagetest"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// upstreamFolder is one in which this test's own binary finds a root, and its Upstream.
func upstreamFolder(t *testing.T) (*externaltest.Signer, ca.UpstreamConfig) {
	t.Helper()
	root, dir := externaltest.Root(t, "upstream", externaltest.P256), t.TempDir()
	for name, text := range map[string][]byte{"root.pem": externaltest.PEM(root.Cert), "key.pem": externaltest.KeyPEM(t, root.Key), "mode": []byte("good")} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root, ca.UpstreamConfig{Exec: []string{os.Args[0], upstreamArg, dir}, RootFile: filepath.Join(dir, "root.pem")}
}

// newShared is a state that replicas of one process share: that it is bbolt's and files
// in memory does not matter to them.
func newShared(t *testing.T) ca.Shared {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "shared")
	mkdir(t, dir, 0o700)
	b, err := storage.OpenBolt(filepath.Join(dir, "state.db"), storage.BoltOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	fs := storagetest.NewCrashFS()
	lock, err := fs.Lock("log", true)
	if err != nil {
		t.Fatal(err)
	}
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	return ca.Shared{Store: b, Files: fs, LogWait: 50 * time.Millisecond}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited for %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func TestReplicasShareTheirState(t *testing.T) {
	t.Parallel()
	root, upstream := upstreamFolder(t)
	shared := newShared(t)
	edit := func(c *ca.Config) { c.Upstream, c.Shared = upstream, shared }
	a := newWorld(t, edit)
	b := newWorld(t, edit)
	defer a.run()()
	defer b.run()()
	if a.ID() == b.ID() || a.Intermediate().Equal(b.Intermediate()) {
		t.Fatalf("both are %v", a.ID())
	}
	if !a.Root().Equal(b.Root()) {
		t.Fatal("they have different roots")
	}
	same := func() bool {
		ta, tb := trustOf(a), trustOf(b)
		return ta.Sequence() == tb.Sequence() && string(ta.PEM()) == string(tb.PEM())
	}
	eventually(t, "one state of trust", same)
	for _, w := range []*world{a, b} {
		if err := w.Ready(); err != nil {
			t.Errorf("%v is not ready: %v", w.ID(), err)
		}
	}
	// An agent that one replica knows is served by the other.
	agent, cert := a.attest(agentA)
	first, second := a.leaf(agent), []byte(nil)
	var chain = b.dial(cert)
	eventually(t, "the other replica to know the agent", func() bool {
		rs, err := issue(t, chain, item(t, byUID(server.PodUID)))
		if err != nil || rs[0].GetX509() == nil {
			return false
		}
		second = rs[0].GetX509().GetChain()[0]
		return true
	})
	if err := verifies(first, root.Cert); err != nil {
		t.Error(err)
	}
	if ca.Serial(first[0])[0] != 1 || len(second) == 0 {
		t.Errorf("serial %x is not of instance 1", ca.Serial(first[0]))
	}
	// What one takes back the other refuses: an agent's SVID above all.
	if _, err := adminOf(t, a).Revoke(t.Context(), &capb.RevokeRequest{Serial: ca.Serial(cert.Leaf), Reason: 1}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the other replica to refuse the agent", func() bool {
		_, err := issue(t, chain, item(t, byUID(server.PodUID)))
		return err != nil
	})
	// A ban that one is told holds at the other.
	agentOfB, _ := b.attest(agentB)
	mayIssue := func() bool {
		rs, err := issue(t, agentOfB, item(t, byUID(onNodeB.PodUID)))
		return err == nil && rs[0].GetX509() != nil
	}
	if !mayIssue() {
		t.Error("nothing is banned, and nothing issued")
	}
	if _, err := adminOf(t, a).AddBan(t.Context(), &capb.AddBanRequest{Subject: "spiffe://cluster.local/ns/default/sa/db", Reason: "a test"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the other replica to know of the ban", func() bool { return !mayIssue() })
	// Each renews its own, and what they have in common goes on as one.
	for range 3 {
		for _, w := range []*world{a, b} {
			if err := w.RenewIntermediate(t.Context()); err != nil {
				t.Fatalf("%v: %v", w.ID(), err)
			}
		}
	}
	eventually(t, "one state of trust after renewals", same)
}

// TestReplicasBeginWithOneNumberOfBans: whichever an agent hears first, the next ban is newer
// than what it has heard.
func TestReplicasBeginWithOneNumberOfBans(t *testing.T) {
	t.Parallel()
	shared := newShared(t)
	edit := func(c *ca.Config) { c.RootReplica, c.Shared = 1, shared }
	a := newWorld(t, edit, func(c *ca.Config) { c.Instance = 1 })
	stop := a.run()
	b := newWorld(t, edit)
	stop()
	heard, err := adminOf(t, b).ListBans(t.Context(), &capb.ListBansRequest{})
	if err != nil {
		t.Fatal(err)
	}
	next, err := adminOf(t, a).AddBan(t.Context(), &capb.AddBanRequest{Subject: "spiffe://cluster.local/ns/x/sa/a", Reason: "r"})
	if err != nil {
		t.Fatal(err)
	}
	if next.GetRevision() <= heard.GetRevision() {
		t.Errorf("a ban has revision %d, and the second replica's agents have heard of %d", next.GetRevision(), heard.GetRevision())
	}
}

func TestAReplicaIsItsFolder(t *testing.T) {
	t.Parallel()
	_, upstream := upstreamFolder(t)
	shared := newShared(t)
	edit := func(c *ca.Config) { c.Upstream, c.Shared = upstream, shared }
	a, b := newWorld(t, edit), newWorld(t, edit)
	idA, idB, inter := a.ID(), b.ID(), a.Intermediate()
	if _, err := ca.Open(t.Context(), a.cfg); !errors.Is(err, storage.ErrLocked) {
		t.Errorf("two processes of one replica: %v", err)
	}
	a.close()
	a.open()
	if a.ID() != idA || !a.Intermediate().Equal(inter) {
		t.Errorf("after a restart %v is %v, with another intermediate: %v", idA, a.ID(), !a.Intermediate().Equal(inter))
	}
	a.close()
	for name, c := range map[string]struct {
		edit func(*ca.Config)
		says string
	}{
		"another's instance":       {func(c *ca.Config) { c.Instance = 2 }, "set instance back"},
		"another trust domain":     {func(c *ca.Config) { c.TrustDomain = spiffeid.RequireTrustDomainFromString("other.test") }, "trust domain"},
		"the root in its folder":   {func(c *ca.Config) { c.Upstream = ca.UpstreamConfig{} }, "each replica would hold the key of the root"},
		"a state of somebody else": {func(c *ca.Config) { c.Shared = newShared(t) }, "its part of the journal is gone"},
	} {
		cfg := a.cfg
		c.edit(&cfg)
		if _, err := ca.Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %q", name, err, c.says)
		}
	}
	// A folder that was lost takes its instance along: nobody else gets it.
	c := newWorld(t, edit)
	if c.ID() == idA || c.ID() == idB {
		t.Errorf("a third folder is %v", c.ID())
	}
	cfg := c.cfg
	cfg.DataDir = filepath.Join(t.TempDir(), "data")
	mkdir(t, cfg.DataDir, 0o700)
	cfg.Instance = 1
	if _, err := ca.Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "belongs to another replica") {
		t.Errorf("a new folder with the instance of a lost one: %v", err)
	}
	// A folder of an authority that is one's own is not silently another one.
	own := newWorld(t)
	own.close()
	cfg = own.cfg
	edit(&cfg)
	if _, err := ca.Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "migrate-store") {
		t.Errorf("a folder with a state of its own: %v", err)
	}
}
