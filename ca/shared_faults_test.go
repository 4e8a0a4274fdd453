package ca_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/storage"
)

// nthUnknown has one commit, the n-th after arm, end without an answer: after it happened,
// or instead of that. Commits of leases and of agents' records do not count.
type nthUnknown struct {
	storage.Store
	mu     sync.Mutex
	armed  bool
	n      int
	landed bool
	hit    string // the keys that it was about; guarded by mu
}

func (s *nthUnknown) Commit(ctx context.Context, conds []storage.Cond, ops []storage.Op) (uint64, error) {
	var keys []string
	for _, o := range ops {
		if !strings.HasPrefix(o.Key, "agents/") {
			kind, _, _ := strings.Cut(o.Key, "/")
			keys = append(keys, kind)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.armed && len(keys) > 0 {
		if s.n--; s.n < 0 {
			s.armed, s.hit = false, strings.Join(keys, " ")
			if s.landed {
				if _, err := s.Store.Commit(ctx, conds, ops); err != nil {
					return 0, err
				}
			}
			return 0, fmt.Errorf("no answer: %w", storage.ErrUnknown)
		}
	}
	return s.Store.Commit(ctx, conds, ops)
}

// underALostAnswer has two replicas revoke, ask for an intermediate and replace their root,
// while the n-th of their commits ends without an answer. What comes of it is one state,
// whole, in which a sequence never meant two things, and all goes on. It returns what the
// commit was about. life is that of the agent's SVID.
func underALostAnswer(t *testing.T, shared ca.Shared, life time.Duration, n int, landed bool) string {
	store := &nthUnknown{Store: shared.Store, n: n, landed: landed}
	shared.Store = store
	one := func(c *ca.Config) {
		brisk(c)
		c.SVID.AgentTTL, c.SVID.MaxTTL = life, max(life, c.SVID.MaxTTL)
		c.Shared, c.RootReplica, c.CRL.Enabled = shared, 1, true
	}
	a := newWorld(t, one, func(c *ca.Config) { c.Instance = 1 })
	defer a.run()()
	b := newWorld(t, one)
	defer b.run()()
	means := map[uint64]string{}
	var meansMu sync.Mutex
	note := func() {
		for _, w := range []*world{a, b} {
			tr := trustOf(w)
			is := string(tr.PEM()) + string(tr.CRLPEM())
			meansMu.Lock()
			if was, ok := means[tr.Sequence()]; ok && was != is {
				t.Errorf("sequence %d means two states", tr.Sequence())
			}
			means[tr.Sequence()] = is
			meansMu.Unlock()
		}
	}
	step := func(what string, try func() error, done func() bool) {
		t.Helper()
		var err error
		eventually(t, what, func() bool {
			note()
			if done() {
				return true
			}
			err = try()
			return done()
		})
		if t.Failed() {
			t.Fatalf("%s: %v", what, err)
		}
	}
	client, _ := b.attest(agentB)
	watchTrust(t, client, true)
	rs, err := issue(t, client, item(t, byUID(onNodeB.PodUID)))
	if err != nil || rs[0].GetX509() == nil {
		t.Fatal(rs, err)
	}
	leaf := parseChain(t, rs[0].GetX509().GetChain())
	store.mu.Lock()
	store.armed = true
	store.mu.Unlock()
	op, end := b.bubbleAdmin()
	defer end()
	step("it to be revoked", func() error {
		_, err := op.Revoke(t.Context(), &capb.RevokeRequest{Serial: ca.Serial(leaf[0]), Reason: 1})
		return err
	}, func() bool { return a.revoked(leaf) && b.revoked(leaf) })
	inter := b.Intermediate()
	step("another intermediate", func() error { return b.Rotate(t.Context(), capb.RotateRequest_STEP_RENEW, "", false) }, func() bool { return !b.Intermediate().Equal(inter) })
	root := a.Root()
	step("another root", func() error { return a.Rotate(t.Context(), capb.RotateRequest_STEP_PREPARE, "", false) }, func() bool { return len(trustOf(a).Roots()) == 2 })
	step("it to be used", func() error { return a.Rotate(t.Context(), capb.RotateRequest_STEP_ACTIVATE, "", true) }, func() bool { return !a.Root().Equal(root) })
	step("both to sign below it", func() error { time.Sleep(5 * time.Millisecond); return nil }, func() bool {
		return a.Intermediate().CheckSignatureFrom(a.Root()) == nil && b.Intermediate().CheckSignatureFrom(a.Root()) == nil
	})
	step("one state", func() error { time.Sleep(5 * time.Millisecond); return nil }, func() bool {
		ta, tb := trustOf(a), trustOf(b)
		return ta.Sequence() == tb.Sequence() && string(ta.PEM()) == string(tb.PEM()) && string(ta.CRLPEM()) == string(tb.CRLPEM())
	})
	if !a.revoked(leaf) || !b.revoked(leaf) {
		t.Error("what was revoked is on no list any more")
	}
	if n := rootKeys(a); n != 2 || rootKeys(b) != 0 {
		t.Errorf("%d and %d keys of roots", n, rootKeys(b))
	}
	for _, w := range []*world{a, b} {
		eventually(t, "it to be ready", func() bool { return w.Ready() == nil })
		intact(t, w)
	}
	store.mu.Lock()
	defer store.mu.Unlock()
	return store.hit
}
