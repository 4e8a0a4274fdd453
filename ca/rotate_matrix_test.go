//go:build !race

// In a bubble of synctest, as rotate_nodes_test.go, and so not with -race.

package ca_test

import (
	"crypto/x509"
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/storage/storagetest"
)

var everyFault = flag.Bool("every-fault", false, "let each write of a rotation go wrong in every way, and not every third of the log and each of the state in one way")

// rotationMatrix runs one life of an authority again and again in which it is rotated, and
// lets another write of it go wrong each time.
type rotationMatrix struct {
	matrix
	chains [][]*x509.Certificate // what went out, leaf and intermediate
	told   uint64                // highest sequence that an agent was told
	roots  map[string]*x509.Certificate
	asked  map[string]bool // roots whose revocation was asked for
	first  string          // ID of the root that the authority began with
}

// life is a rotation by hand to its end, and one by schedule to the removal of the former
// root. arm is called when the authority is there and has an agent, which acknowledges
// nothing, so that whoever activates has to force it. A step that failed is not tried
// again, and the next ones are.
func (m *rotationMatrix) life(cfg ca.Config, arm func()) {
	m.chains, m.told, m.roots, m.asked = nil, 0, map[string]*x509.Certificate{}, map[string]bool{}
	w := &world{t: m, cfg: cfg, issuer: m.base.issuer, pods: m.base.pods}
	w.serve(must(ca.Open(m.Context(), cfg)))
	defer func() {
		w.stop()
		<-w.done
		w.server.Stop()
		_ = w.Close()
	}()
	look := func() {
		m.told = max(m.told, trustOf(w).Sequence())
		for _, c := range trustOf(w).Roots() {
			m.roots[idOf(c)] = c
		}
	}
	leaf := func() {
		look()
		if chain := m.tryLeaf(w); chain != nil {
			m.chains = append(m.chains, chain)
			if err := verifies(chain, trustOf(w).Roots()...); err != nil {
				m.Errorf("a leaf does not verify when it goes out: %v", err)
			}
		}
	}
	rotate := func(step capb.RotateRequest_Step, id string, force bool) error {
		err := w.Rotate(m.Context(), step, id, force)
		leaf()
		return err
	}
	leaf()
	first := idOf(w.Root())
	m.first = first
	arm()
	_ = rotate(capb.RotateRequest_STEP_REPLACE, first, false)
	if err := rotate(capb.RotateRequest_STEP_ACTIVATE, "", false); err == nil {
		m.Error("the next root is used although the agent lacks it")
	}
	_ = rotate(capb.RotateRequest_STEP_ACTIVATE, "", true)
	_ = w.SignHead(m.Context())
	_ = rotate(capb.RotateRequest_STEP_RENEW, "", false)
	_ = rotate(capb.RotateRequest_STEP_TAINT, first, false)
	m.asked[first] = true
	_ = rotate(capb.RotateRequest_STEP_REVOKE, first, true)

	_ = rotate(capb.RotateRequest_STEP_PREPARE, "", false)
	_ = rotate(capb.RotateRequest_STEP_ACTIVATE, "", true)
	time.Sleep(cfg.SVID.MaxTTL + 3*cfg.SVID.Backdate)
	_ = w.RotateDue(m.Context())
	leaf()
}

// tryLeaf attests an agent and has it obtain an SVID, without connections that stay.
func (m *rotationMatrix) tryLeaf(w *world) []*x509.Certificate {
	conn := w.conn(nil)
	defer conn.Close()
	cert, err := w.tryAttest(capb.NewAuthorityClient(conn), func(r *capb.AttestRequest) {
		r.Evidence = &capb.AttestRequest_Token{Token: w.issuer.Token(agentA, "signet-ca")}
	})
	if err != nil {
		return nil
	}
	own := w.conn(cert)
	defer own.Close()
	rs, err := issue(m, capb.NewAuthorityClient(own), item(m, byUID(server.PodUID)))
	if err != nil || rs[0].GetX509() == nil {
		return nil
	}
	var chain []*x509.Certificate
	for _, der := range rs[0].GetX509().GetChain() {
		chain = append(chain, must(x509.ParseCertificate(der)))
	}
	return chain
}

// stages are where an authority's roots stand, by ID.
func stages(w *world) map[string]string { return must(w.Stages()) }

// check opens what is left, holds the invariants of package rotation and of the log
// against it, and has the rotation go on to its end.
func (m *rotationMatrix) check(what string, cfg ca.Config) {
	m.Helper()
	a, err := ca.Open(m.Context(), cfg)
	if err != nil {
		m.Errorf("%s: %v", what, err)
		return
	}
	w := &world{t: m, cfg: cfg, issuer: m.base.issuer, pods: m.base.pods}
	w.serve(a)
	defer w.close() // which verifies the log
	sound := func(when string) {
		m.Helper()
		if problems, err := a.VerifyAll(m.Context()); err != nil || len(problems) > 0 {
			m.Errorf("%s, %s: %v, %v", what, when, problems, err)
		}
		active := ""
		for id, stage := range stages(w) {
			if stage == "active" {
				active += id
			}
		}
		trusted := func(c *x509.Certificate) bool { return slices.ContainsFunc(trustOf(w).Roots(), c.Equal) }
		if active != idOf(w.Root()) || !trusted(w.Root()) {
			m.Errorf("%s, %s: active is %q, and what signs is %s; it is trusted: %v", what, when, active, idOf(w.Root()), trusted(w.Root()))
		}
		if now := trustOf(w).Sequence(); now < m.told {
			m.Errorf("%s, %s: the sequence went back from %d to %d", what, when, m.told, now)
		}
		if chain := m.tryLeaf(w); chain == nil || verifies(chain, trustOf(w).Roots()...) != nil {
			m.Errorf("%s, %s: it issues %d certificates, which do not verify", what, when, len(chain))
		}
		in, forced := map[string]bool{}, ""
		for r := range records(w) {
			in[string(r.GetSerial())] = true
			if d := r.GetDecision(); d.GetWhat() == capb.Decision_WHAT_ROTATION_OVERRIDDEN {
				forced += d.GetReason() + "\n"
			}
		}
		for _, chain := range m.chains {
			for _, c := range chain {
				if !in[string(ca.Serial(c))] {
					m.Errorf("%s, %s: certificate %x went out and has no record", what, when, ca.Serial(c))
				}
			}
			if err := verifies(chain, trustOf(w).Roots()...); err != nil && time.Now().Before(chain[0].NotAfter) {
				for id, c := range m.roots {
					if chain[1].CheckSignatureFrom(c) == nil && !(m.asked[id] && strings.Contains(forced, id+" is revoked")) {
						m.Errorf("%s, %s: a leaf of root %s does not verify, and nobody revoked that: %v", what, when, id, err)
					}
				}
			}
		}
		// The agent never acknowledged anything: whatever signs is in use by force.
		for id, stage := range stages(w) {
			if (stage == "active" || stage == "old") && id != m.first && !strings.Contains(forced, id+" is activated") {
				m.Errorf("%s, %s: root %s is %s, which was not recorded:\n%s", what, when, id, stage, forced)
			}
		}
	}
	sound("opened again")
	// On to one root, which is none of those that were active in between.
	if len(stages(w)) > 0 {
		before := idOf(w.Root())
		m.asked[before] = true
		for _, id := range slices.Sorted(maps.Keys(stages(w))) {
			if id != before && stages(w)[id] == "old" {
				m.asked[id] = true
				if err := w.Rotate(m.Context(), capb.RotateRequest_STEP_REPLACE, id, false); err != nil {
					m.Errorf("%s, going on: %v", what, err)
				}
				_ = w.Rotate(m.Context(), capb.RotateRequest_STEP_TAINT, id, false) // it may be tainted
				if err := w.Rotate(m.Context(), capb.RotateRequest_STEP_REVOKE, id, true); err != nil {
					m.Errorf("%s, going on: %v", what, err)
				}
			}
		}
		for _, s := range []capb.RotateRequest_Step{capb.RotateRequest_STEP_REPLACE, capb.RotateRequest_STEP_ACTIVATE, capb.RotateRequest_STEP_TAINT, capb.RotateRequest_STEP_REVOKE} {
			if err := w.Rotate(m.Context(), s, before, true); err != nil {
				m.Errorf("%s, going on: %v: %v", what, s, err)
			}
		}
		if left := stages(w); len(left) != 1 || left[idOf(w.Root())] != "active" || idOf(w.Root()) == before {
			m.Errorf("%s: gone on with to its end: %v", what, left)
		}
		for _, c := range trustOf(w).Roots() {
			m.roots[idOf(c)] = c
		}
		sound("gone on with")
	}
}

// TestRotationCrashMatrix: each write of the log and of the state in two rotations is lost,
// lands but is reported failed, is half written, or is not synced before a crash; or the
// crash comes just before it. Then the authority is opened again.
func TestRotationCrashMatrix(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &rotationMatrix{matrix: matrix{T: t, base: newWorld(t, hours)}}
		m.base.close()
		faults := []storagetest.Fault{storagetest.NotPersisted, storagetest.Persisted, storagetest.Partial, storagetest.Forgotten}
		names := []string{"lost", "landed, reported failed", "half written", "sync forgotten", "crash before it"}
		runs, checks, chains := 0, 0, 0
		// A record is a write and a sync, so every third takes both in turn.
		hit := func(n, fault int) bool { return *everyFault || n%3 == 0 && n/3%len(names) == fault }

		fs := storagetest.NewCrashFS()
		clean, first := m.config(crashable{fs}), 0
		m.life(clean, func() { first = len(fs.Ops()) })
		ops := fs.Ops()[first:]
		if len(m.chains) < 9 || len(m.asked) != 1 || len(ops) < 60 {
			t.Fatalf("a life without failures: %d leaves, %d operations of the log", len(m.chains), len(ops))
		}
		m.check("without failures", clean)
		crashed := func(cfg ca.Config, fs *storagetest.CrashFS) ca.Config {
			to := cfg
			to.DataDir = copyData(t, cfg.DataDir)
			to.LogOptions.FS = moved{fs.Crash(storagetest.Loss{}), cfg.DataDir, to.DataDir}
			return to
		}
		for n := range ops {
			for fault, f := range faults {
				if !hit(n, fault) {
					continue
				}
				fs := storagetest.NewCrashFS()
				cfg := m.config(crashable{fs})
				m.life(cfg, func() { fs.FailNth(len(fs.Ops())+n, f) })
				what := fmt.Sprintf("log: %v %s", ops[n], names[fault])
				m.check(what+", then unsynced bytes dropped", crashed(cfg, fs))
				fs.Fail(nil)
				m.check(what+", then a restart", cfg)
				runs, checks, chains = runs+1, checks+2, chains+len(m.chains)
			}
			if !hit(n, len(faults)) {
				continue
			}
			fs := storagetest.NewCrashFS()
			cfg := m.config(crashable{fs})
			var then ca.Config
			var saw rotationMatrix
			m.life(cfg, func() {
				at := len(fs.Ops()) + n
				fs.Fail(func(op storagetest.Op) storagetest.Fault {
					if op.N == at {
						then, saw = crashed(cfg, fs), *m
						saw.roots = maps.Clone(m.roots)
						saw.asked = maps.Clone(m.asked)
					}
					return storagetest.NoFault
				})
			})
			if then.DataDir != "" {
				saw.check(fmt.Sprintf("log: a crash before %v, unsynced bytes dropped", ops[n]), then)
				runs, checks, chains = runs+1, checks+1, chains+len(saw.chains)
			}
		}

		commits := 0
		armed := false
		counted := m.config(crashable{storagetest.NewCrashFS()})
		counted.StoreOptions.Hook = func(landed bool) error {
			if landed && armed {
				commits++
			}
			return nil
		}
		m.life(counted, func() { armed = true })
		if commits < 12 {
			t.Fatalf("only %d commits", commits)
		}
		for n := range commits {
			for fault, name := range []string{"lost", "landed, reported failed", "unsynced bytes dropped"} {
				if !*everyFault && n%3 != fault {
					continue
				}
				i, armed, old, path := 0, false, []byte(nil), ""
				cfg := m.config(crashable{storagetest.NewCrashFS()})
				cfg.StoreOptions.Hook = func(landed bool) error {
					if !armed {
						return nil
					}
					if !landed {
						i++
					}
					if i != n+1 || landed != (fault > 0) {
						if i == n+1 && !landed {
							path = statePath(cfg.DataDir)
							old = must(os.ReadFile(path))
						}
						return nil
					}
					return storagetest.ErrInjected
				}
				m.life(cfg, func() { armed = true })
				if fault == 2 {
					if err := os.WriteFile(path, old, 0o600); err != nil {
						t.Fatal(err)
					}
				}
				cfg.StoreOptions.Hook = nil
				m.check(fmt.Sprintf("state: commit %d %s", n, name), cfg)
				runs, checks, chains = runs+1, checks+1, chains+len(m.chains)
			}
		}
		t.Logf("note: two rotations have %d writes of the log and %d of the state; in %d runs one of them went wrong, and the authority was opened again %d times; of %d SVIDs that went out in them each had its record",
			len(ops), commits, runs, checks, chains)
	})
}
