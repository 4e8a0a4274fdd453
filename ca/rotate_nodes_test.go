//go:build !race

// With -race the detector of Go 1.26 crashes now and then on these tests, which make
// thousands of timers in bubbles of synctest from several goroutines (in
// runtime.(*timer).unlockAndRun all of a bubble's share one race context). So make test
// runs them without it; see SWEEPS in the Makefile.

package ca_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/identity"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// node is an agent that attests anew every five minutes and, if it listens, acknowledges every
// state of trust at once and has replaced whatever is tainted.
type node struct {
	w       *world
	agent   identity.Workload
	listens bool

	mu    sync.Mutex
	trust *capb.Trust // newest; guarded by mu
	most  int         // roots in a bundle; guarded by mu

	cancel context.CancelFunc
	done   chan struct{}
}

func (w *world) node(agent identity.Workload, listens bool) *node {
	ctx, cancel := context.WithCancel(context.Background())
	n := &node{w: w, agent: agent, listens: listens, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(n.done)
		for ctx.Err() == nil {
			n.live(ctx)
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
		}
	}()
	return n
}

// live is one SVID long, five minutes at most.
func (n *node) live(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	conn := n.w.conn(nil)
	defer conn.Close()
	var trust *capb.Trust
	cert, err := n.w.tryAttestFor(capb.NewAuthorityClient(conn), func(r *capb.AttestRequest) {
		r.Evidence = &capb.AttestRequest_Token{Token: n.w.issuer.Token(n.agent, "signet-ca")}
	}, &trust)
	if err != nil {
		return
	}
	n.took(trust)
	if !n.listens {
		<-ctx.Done()
		return
	}
	own := n.w.conn(cert)
	defer own.Close()
	s, err := capb.NewAuthorityClient(own).WatchTrust(ctx)
	for err == nil {
		var m *capb.WatchTrustResponse
		if m, err = s.Recv(); err == nil {
			n.took(m.GetTrust())
			err = s.Send(&capb.WatchTrustRequest{Acknowledged: m.GetTrust().GetSequence(), Renewed: m.GetTrust().GetSequence()})
		}
	}
}

func (n *node) took(t *capb.Trust) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.trust.GetSequence() > t.GetSequence() {
		n.w.t.Errorf("the sequence went back from %d to %d", n.trust.GetSequence(), t.GetSequence())
	}
	n.trust = t
	n.most = max(n.most, len(t.GetBundles()[0].GetX509Authorities()))
}

func (n *node) newest() *capb.Trust {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.trust
}

// roots are those of the newest bundle.
func (n *node) roots() (roots []*x509.Certificate) {
	for _, der := range n.newest().GetBundles()[0].GetX509Authorities() {
		roots = append(roots, must(x509.ParseCertificate(der)))
	}
	return roots
}

func (n *node) leave() { n.cancel(); <-n.done }

// TestTheRootIsReplacedAtHalfOfItsLife, again and again, and whatever is issued verifies
// at once with the bundles that nodes have acknowledged, and with those of nodes that
// come later for as long as it lives.
func TestTheRootIsReplacedAtHalfOfItsLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, hours)
		stop := w.run()
		a, b := w.node(agentA, true), w.node(agentB, true)
		synctest.Wait()
		type leaf struct {
			chain []*x509.Certificate
		}
		var leaves []leaf
		roots, inters := map[string]bool{}, map[string]bool{}
		for range 3 * 14 { // fourteen hours
			time.Sleep(20*time.Minute - 30*time.Second)
			leaves = append(leaves, leaf{w.once()})
			time.Sleep(30 * time.Second)
			roots[idOf(w.Root())], inters[idOf(w.Intermediate())] = true, true
			leaves = slices.DeleteFunc(leaves, func(l leaf) bool { return !time.Now().Before(l.chain[0].NotAfter) })
			for _, l := range leaves {
				for _, n := range []*node{a, b} {
					if err := verifies(l.chain, n.roots()...); err != nil {
						t.Fatalf("a leaf does not verify on %s: %v", n.agent.Node, err)
					}
				}
			}
			if err := w.Ready(); err != nil {
				t.Fatal(err)
			}
			if err := w.Alarms(); err != nil {
				t.Fatal(err)
			}
		}
		a.leave() // which has most to itself
		b.leave()
		if len(roots) < 4 || len(inters) < 20 || a.most != 2 || len(a.roots()) > 2 || rootKeys(w) > 2 {
			t.Errorf("in fourteen hours %d roots and %d intermediates, %d roots in a bundle at most, %d keys of roots at the end", len(roots), len(inters), a.most, rootKeys(w))
		}
		root := w.Root()
		stop()
		w.close()
		w.open()
		if !w.Root().Equal(root) {
			t.Error("after opening again another root is active")
		}
		client, _ := w.attest(agentA)
		if err := verifies(w.leaf(client), trustOf(w).Roots()...); err != nil {
			t.Error(err)
		}
		intact(t, w)
		w.close()
	})
}

// TestARotationWaitsForWhoIsMissing, until the agent acknowledges, its last SVID has
// ended, its node is gone, or the active root is about to end: the last is recorded and
// an alarm.
func TestARotationWaitsForWhoIsMissing(t *testing.T) {
	for name, c := range map[string]struct {
		then   func(w *world, n *node) *node
		within time.Duration
		forced bool
	}{
		"until it listens": {func(w *world, n *node) *node { n.leave(); return w.node(agentB, true) }, 3 * time.Minute, false},
		"until its last SVID has ended": {func(_ *world, n *node) *node {
			n.leave()
			return nil
		}, 13 * time.Minute, false},
		"until its node is gone": {func(w *world, n *node) *node {
			n.leave()
			w.pods.Delete(agentB.PodUID)
			w.pods.Delete(onNodeB.PodUID)
			return nil
		}, time.Minute, false},
		"until the root ends": {func(_ *world, n *node) *node { return n }, 4 * time.Hour, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				reg := prometheus.NewRegistry()
				w := newWorld(t, hours, func(c *ca.Config) { c.Metrics = reg })
				stop := w.run()
				defer stop()
				a, b := w.node(agentA, true), w.node(agentB, false)
				defer a.leave()
				defer func() { b.leave() }()
				first := w.Root()
				time.Sleep(5 * time.Hour)
				if !w.Root().Equal(first) || len(a.roots()) != 2 {
					t.Fatalf("an hour after half life, %d roots are in the bundle, and the first one is active: %v", len(a.roots()), w.Root().Equal(first))
				}
				err := w.Alarms()
				if err == nil || !strings.Contains(err.Error(), "node-b") || strings.Contains(err.Error(), "node-a") || w.Ready() != nil {
					t.Errorf("alarm: %v; readiness: %v", err, w.Ready())
				}
				if n := gauge(t, reg, "signet_ca_rotation_waits_for_nodes"); n != 1 {
					t.Errorf("the metric says that %v nodes are waited for", n)
				}
				began := time.Now()
				if n := c.then(w, b); n != nil {
					b = n
				}
				for w.Root().Equal(first) && time.Since(began) < c.within {
					time.Sleep(time.Second)
				}
				if w.Root().Equal(first) {
					t.Fatalf("after %v the first root is still active", c.within)
				}
				decisions := 0
				for r := range records(w) {
					if d := r.GetDecision(); d.GetWhat() == capb.Decision_WHAT_ROTATION_OVERRIDDEN && strings.Contains(d.GetReason(), "node-b") && strings.Contains(d.GetReason(), "deadline") {
						decisions++
					}
				}
				if (decisions == 1) != c.forced {
					t.Errorf("%d decisions are recorded", decisions)
				}
				time.Sleep(time.Minute)
				if err := w.Alarms(); (err != nil) != c.forced || c.forced && !strings.Contains(err.Error(), "node-b") {
					t.Errorf("alarm afterwards: %v", err)
				}
				if left := first.NotAfter.Sub(began.Add(c.within)); c.forced && (time.Until(first.NotAfter) > time.Hour || left > 0 && time.Until(first.NotAfter) < 50*time.Minute) {
					t.Errorf("it was used %v before the first root's end", time.Until(first.NotAfter))
				}
				if c.forced && gauge(t, reg, "signet_ca_active_root_lacking_nodes") != 1 {
					t.Error("the metric does not say that a node lacks the active root")
				}
			})
		})
	}
}

// TestOperatorsRotate goes through the commands: what is waited for is named, force is
// recorded, what is tainted is told, and what is revoked leaves the bundle.
func TestOperatorsRotate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, hours, func(c *ca.Config) { c.TaintSpread = 3 * time.Second })
		stop := w.run()
		defer stop()
		op, end := w.bubbleAdmin()
		defer end()
		a, b := w.node(agentA, true), w.node(agentB, false)
		defer a.leave()
		defer b.leave()
		time.Sleep(2 * time.Second)
		do := func(step capb.RotateRequest_Step, id string, force bool) *capb.RotateResponse {
			t.Helper()
			r, err := op.Rotate(t.Context(), &capb.RotateRequest{Step: step, Id: id, Force: force})
			if err != nil {
				t.Fatalf("%v: %v", step, err)
			}
			synctest.Wait()
			return r
		}
		refused := func(step capb.RotateRequest_Step, id string, code codes.Code) {
			t.Helper()
			before := must(w.Store().Get(t.Context(), "journal")).Revision
			if _, err := op.Rotate(t.Context(), &capb.RotateRequest{Step: step, Id: id, Force: true}); status.Code(err) != code {
				t.Errorf("%v of %s: %v", step, id, err)
			}
			if must(w.Store().Get(t.Context(), "journal")).Revision != before {
				t.Errorf("%v of %s was refused and changed the journal", step, id)
			}
		}
		first, inter := w.Root(), w.Intermediate()
		refused(capb.RotateRequest_STEP_UNSPECIFIED, "", codes.FailedPrecondition)
		refused(capb.RotateRequest_STEP_ACTIVATE, "", codes.FailedPrecondition)
		refused(capb.RotateRequest_STEP_TAINT, idOf(first), codes.FailedPrecondition)
		refused(capb.RotateRequest_STEP_TAINT, "00", codes.NotFound)
		refused(capb.RotateRequest_STEP_REVOKE, idOf(first), codes.FailedPrecondition)
		refused(capb.RotateRequest_STEP_REVOKE, idOf(inter), codes.NotFound)
		refused(capb.RotateRequest_STEP_DISCARD, idOf(first), codes.FailedPrecondition)

		// An intermediate that signs is replaced before it is tainted.
		do(capb.RotateRequest_STEP_TAINT, idOf(inter), false)
		if tr := a.newest(); len(tr.GetTainted()) != 1 || !bytes.Equal(tr.GetTainted()[0], inter.SubjectKeyId) || tr.GetTaintSpread().AsDuration() != 3*time.Second {
			t.Errorf("agents are told: %v", tr.GetTainted())
		}
		if w.Intermediate().Equal(inter) {
			t.Error("a tainted intermediate signs")
		}
		client, _ := w.attest(agentA)
		if err := verifies(w.leaf(client), first); err != nil {
			t.Error(err)
		}
		if id := do(capb.RotateRequest_STEP_RENEW, "", false).GetId(); id != idOf(w.Intermediate()) {
			t.Errorf("renew says %s", id)
		}

		// The next root.
		next := do(capb.RotateRequest_STEP_PREPARE, "", false).GetId()
		refused(capb.RotateRequest_STEP_PREPARE, "", codes.FailedPrecondition)
		if len(a.roots()) != 2 {
			t.Errorf("%d roots are published", len(a.roots()))
		}
		do(capb.RotateRequest_STEP_DISCARD, next, false)
		if len(a.roots()) != 1 || rootKeys(w) != 1 {
			t.Errorf("%d roots and %d keys after one was discarded", len(a.roots()), rootKeys(w))
		}
		next = do(capb.RotateRequest_STEP_PREPARE, "", false).GetId()
		time.Sleep(2 * time.Minute)
		waits := do(capb.RotateRequest_STEP_ACTIVATE, "", false).GetWaits()
		if !slices.Equal(waits.GetNodes(), []string{"node-b"}) || waits.GetUntil() != nil || waits.GetId() != next || !w.Root().Equal(first) {
			t.Errorf("it waits for %v", waits)
		}
		list := must(op.Authorities(t.Context(), &capb.AuthoritiesRequest{}))
		if !slices.Equal(list.GetActivation().GetNodes(), []string{"node-b"}) || !list.GetDeadline().AsTime().Equal(first.NotAfter.Add(-time.Hour)) || list.GetForeign() || !slices.Equal(list.GetLacking(), []string{"node-b"}) {
			t.Errorf("the list says %v", list)
		}
		do(capb.RotateRequest_STEP_ACTIVATE, "", true)
		if idOf(w.Root()) != next || verifies([]*x509.Certificate{w.Intermediate()}, w.Root()) != nil {
			t.Error("the next root does not sign")
		}
		if list = must(op.Authorities(t.Context(), &capb.AuthoritiesRequest{})); !slices.Equal(list.GetLacking(), []string{"node-b"}) {
			t.Errorf("the list does not say who lacks the active root: %v", list.GetLacking())
		}
		refused(capb.RotateRequest_STEP_REVOKE, idOf(first), codes.FailedPrecondition)
		do(capb.RotateRequest_STEP_TAINT, idOf(first), false)
		waits = do(capb.RotateRequest_STEP_REVOKE, idOf(first), false).GetWaits()
		if !slices.Equal(waits.GetNodes(), []string{"node-b"}) || waits.GetUntil() == nil || len(a.roots()) != 2 {
			t.Errorf("revoking waits for %v", waits)
		}
		if list = must(op.Authorities(t.Context(), &capb.AuthoritiesRequest{})); len(list.GetRevocations()) != 1 || list.GetRevocations()[0].GetId() != idOf(first) {
			t.Errorf("the list says of revocations: %v", list.GetRevocations())
		}
		do(capb.RotateRequest_STEP_REVOKE, idOf(first), true)
		if got := a.roots(); len(got) != 1 || idOf(got[0]) != next || rootKeys(w) != 1 {
			t.Errorf("%d roots and %d keys after one was revoked", len(got), rootKeys(w))
		}
		client, _ = w.attest(agentA)
		if err := verifies(w.leaf(client), a.roots()...); err != nil {
			t.Error(err)
		}
		var said []string
		for r := range records(w) {
			if d := r.GetDecision(); d.GetWhat() == capb.Decision_WHAT_ROTATION_OVERRIDDEN {
				said = append(said, d.GetReason())
			}
		}
		if len(said) != 2 || !strings.Contains(said[0], next+" is activated") || !strings.Contains(said[0], "node-b") || !strings.Contains(said[1], idOf(first)+" is revoked") {
			t.Errorf("recorded: %q", said)
		}
		intact(t, w)
	})
}
