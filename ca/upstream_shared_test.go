package ca_test

import (
	"encoding/base64"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/external/externaltest"
	"github.com/signet-mesh/signet/storage"
)

// nextUpstream has an upstream sign with another root, and no other be trusted.
func nextUpstream(t *testing.T, upstream ca.UpstreamConfig) *externaltest.Signer {
	t.Helper()
	next := externaltest.Root(t, "next", externaltest.P256)
	for name, text := range map[string][]byte{"root.pem": externaltest.PEM(next.Cert), "key.pem": externaltest.KeyPEM(t, next.Key)} {
		if err := os.WriteFile(filepath.Join(filepath.Dir(upstream.RootFile), name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return next
}

// TestAnUpstreamsRootStaysForOtherReplicas: the one that renews first does not take the
// root away from those that sign below it yet, and these renew, too.
func TestAnUpstreamsRootStaysForOtherReplicas(t *testing.T) {
	t.Parallel()
	root, upstream := upstreamFolder(t)
	shared := newShared(t)
	edit := func(c *ca.Config) { brisk(c); c.Upstream, c.Shared = upstream, shared }
	a, b := newWorld(t, edit), newWorld(t, edit)
	trusts := func(w *world) bool { return slices.ContainsFunc(trustOf(w).Roots(), root.Cert.Equal) }
	at := func(w *world, d time.Duration) {
		t.Helper()
		then := time.Now().Add(d)
		w.SetClock(func() time.Time { return then }, then)
		if err := w.CatchUp(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := w.Tick(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.SetClock(time.Now, time.Now())
	}
	leaf := func() error {
		t.Helper()
		if err := b.RenewServing(t.Context()); err != nil { // by the present clock
			t.Fatal(err)
		}
		agent, _ := b.attest(agentA)
		return verifies(b.leaf(agent), trustOf(a).Roots()...)
	}
	setMode := func(mode string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(filepath.Dir(upstream.RootFile), "mode"), []byte(mode), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	next := nextUpstream(t, upstream)
	if err := a.RenewIntermediate(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the first to use the next root", func() bool { at(a, 0); return verifies1(a, next) })
	// When all leaves that the first has signed under the former root have ended, the second
	// signs under it; for now it cannot change that.
	setMode("closed")
	at(b, 2*time.Minute)
	if err := b.Alarms(); err == nil || !strings.Contains(err.Error(), "authority.upstream.rootFile") {
		t.Errorf("alarms of the second: %v", err)
	}
	at(a, 3*time.Minute)
	if !verifies1(b, root) || !trusts(a) {
		t.Fatalf("the second signs under the former root: %v, the first trusts it: %v", verifies1(b, root), trusts(a))
	}
	if err := leaf(); err != nil {
		t.Error(err)
	}
	setMode("good")
	eventually(t, "the second to use the next root", func() bool { at(b, 5*time.Minute); return verifies1(b, next) })
	if err := b.Alarms(); err != nil {
		t.Errorf("alarms of the second: %v", err)
	}
	// What it has signed until then stays valid for a minute.
	at(a, 5*time.Minute+30*time.Second)
	if !trusts(a) {
		t.Error("the former root left before the leaves of the second ended")
	}
	at(a, 7*time.Minute)
	if trusts(a) || len(trustOf(a).Roots()) != 1 {
		t.Error("the former root stays when nobody has signed under it for long")
	}
	if err := b.CatchUp(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := leaf(); err != nil {
		t.Error(err)
	}
}

// TestAReplicaWaitsForARootThatAnotherPublished: that it is in the bundle does not mean that
// everybody has it.
func TestAReplicaWaitsForARootThatAnotherPublished(t *testing.T) {
	t.Parallel()
	_, upstream := upstreamFolder(t)
	shared := newShared(t)
	edit := func(c *ca.Config) { brisk(c); c.Upstream, c.Shared = upstream, shared }
	a, b := newWorld(t, edit), newWorld(t, edit)
	next := nextUpstream(t, upstream)
	for _, w := range []*world{a, b} {
		if err := w.CatchUp(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := w.RenewIntermediate(t.Context()); err != nil {
			t.Fatal(err)
		}
		if len(trustOf(w).Roots()) != 2 || verifies1(w, next) {
			t.Errorf("%v: %d roots; it uses the next: %v", w.ID(), len(trustOf(w).Roots()), verifies1(w, next))
		}
	}
	for _, w := range []*world{a, b} {
		eventually(t, "it to be used", func() bool {
			return w.CatchUp(t.Context()) == nil && w.Tick(t.Context()) == nil && verifies1(w, next)
		})
	}
}

// TestAReplicaWithoutItsUpstreamsRoot starts all the same when its root has left the bundle
// while it was down: the upstream signs another intermediate.
func TestAReplicaWithoutItsUpstreamsRoot(t *testing.T) {
	t.Parallel()
	root, upstream := upstreamFolder(t)
	shared := newShared(t)
	edit := func(c *ca.Config) { brisk(c); c.Upstream, c.Shared = upstream, shared }
	a, b := newWorld(t, edit), newWorld(t, edit)
	b.close()
	next := nextUpstream(t, upstream)
	if err := a.RenewIntermediate(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the first to use the next root", func() bool { return a.Tick(t.Context()) == nil && verifies1(a, next) })
	// As a version would have done it that did not look at other replicas.
	e := must(shared.Store.Get(t.Context(), "journal"))
	var j map[string]any
	if err := json.Unmarshal(e.Value, &j); err != nil {
		t.Fatal(err)
	}
	j["authorities"] = slices.DeleteFunc(j["authorities"].([]any), func(o any) bool {
		return o.(map[string]any)["certificate"] == base64.StdEncoding.EncodeToString(root.Cert.Raw)
	})
	j["sequence"] = j["sequence"].(float64) + 1
	must(shared.Store.Commit(t.Context(), nil, []storage.Op{{Key: "journal", Value: must(json.Marshal(j))}}))
	if err := a.CatchUp(t.Context()); err != nil {
		t.Fatal(err)
	}
	if roots := trustOf(a).Roots(); len(roots) != 1 || !roots[0].Equal(next.Cert) {
		t.Fatalf("%d roots", len(roots))
	}
	b.open()
	agent, _ := b.attest(agentA)
	if err := verifies(b.leaf(agent), trustOf(a).Roots()...); err != nil || !verifies1(b, next) {
		t.Errorf("under the next root: %v: %v", verifies1(b, next), err)
	}
}
