package ca_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/storagetest"
)

// stored reports whether the state has a certificate as revoked.
func stored(t testing.TB, s storage.Store, serial []byte) bool {
	t.Helper()
	all, _, err := s.List(t.Context(), "revoked/")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		if e.Key == "revoked/"+hex.EncodeToString(serial) {
			return true
		}
	}
	return false
}

// timesRevoked is how often the log says that a certificate is.
func (w *world) timesRevoked(serial []byte) (n int) {
	w.t.Helper()
	for r := range records(w) {
		if bytes.Equal(r.GetDecision().GetRevoked().GetSerial(), serial) {
			n++
		}
	}
	return n
}

// TestARevocationThatWasNotStored is recorded, and the state does not have it: who asks
// again is told that it is revoked when the state has it, and nobody has to ask.
func TestARevocationThatWasNotStored(t *testing.T) {
	t.Parallel()
	for _, again := range []bool{false, true} {
		f := &faultyWrite{where: "state", fault: "lost"}
		w := newWorld(t, withCRL, f.configure)
		agent, _ := w.attest(agentA)
		chain := w.leaf(agent)
		serial, op := ca.Serial(chain[0]), w.admin()
		f.arm()
		if _, err := op.Revoke(t.Context(), &capb.RevokeRequest{Serial: serial, Reason: 1}); err == nil || stored(t, w.Store(), serial) {
			t.Fatalf("the commit failed, and it says %v", err)
		}
		f.disarm()
		if again {
			if resp, err := op.Revoke(t.Context(), &capb.RevokeRequest{Serial: serial, Reason: 4}); err != nil || !resp.GetAlready() || resp.GetRevocation().GetReason() != 1 || !w.revoked(chain) {
				t.Errorf("again: %v, %v", resp, err)
			}
		} else if err := w.TendRevoked(t.Context()); err != nil {
			t.Error(err)
		}
		if !stored(t, w.Store(), serial) {
			t.Errorf("asked again %v: the state does not have it", again)
		}
		if n := w.timesRevoked(serial); n != 1 {
			t.Errorf("it is recorded %d times", n)
		}
		intact(t, w)
		w.close()
	}
}

// TestARevocationOutlivesWhoAskedForIt: the client leaves while it is being recorded.
func TestARevocationOutlivesWhoAskedForIt(t *testing.T) {
	t.Parallel()
	f := &faultyWrite{}
	w := newWorld(t, withCRL, f.configure)
	agent, _ := w.attest(agentA)
	chain := w.leaf(agent)
	ctx, leave := context.WithCancel(t.Context())
	f.fs.Fail(func(storagetest.Op) storagetest.Fault { leave(); return storagetest.NoFault })
	err := w.Revoke(ctx, ca.Serial(chain[0]))
	f.disarm()
	if ctx.Err() == nil {
		t.Fatal("the client is there yet")
	}
	if err != nil || !stored(t, w.Store(), ca.Serial(chain[0])) {
		t.Errorf("recorded %d times, and not stored: %v", w.timesRevoked(ca.Serial(chain[0])), err)
	}
}

// revokedFails is a state in which commits of revocations fail.
type revokedFails struct {
	storage.Store
	mu    sync.Mutex
	left  int      // how many yet; guarded by mu
	early []string // requests that left before what they asked for was stored; guarded by mu
}

func (s *revokedFails) Commit(ctx context.Context, conds []storage.Cond, ops []storage.Op) (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range ops {
		if strings.HasPrefix(o.Key, "revoked/") && s.left > 0 {
			s.left--
			return 0, storagetest.ErrInjected
		}
		if serial, asked := strings.CutPrefix(o.Key, "revoke-asked/"); asked && o.Delete {
			if _, err := s.Get(ctx, "revoked/"+serial); err != nil {
				s.early = append(s.early, serial)
			}
		}
	}
	return s.Store.Commit(ctx, conds, ops)
}

func (s *revokedFails) fail(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.left = n
}

// twoWith are two replicas with lists over such a state.
func twoWith(t *testing.T) (a, b *world, store *revokedFails) {
	t.Helper()
	_, upstream := upstreamFolder(t)
	shared := newShared(t)
	store = &revokedFails{Store: shared.Store}
	shared.Store = store
	edit := func(c *ca.Config) { c.Upstream, c.Shared, c.CRL.Enabled = upstream, shared, true }
	return newWorld(t, edit), newWorld(t, edit), store
}

// TestAReplicaForgetsNoRevocation that it has recorded, when it reads the state anew.
func TestAReplicaForgetsNoRevocation(t *testing.T) {
	t.Parallel()
	a, b, store := twoWith(t)
	agent, _ := a.attest(agentA)
	chain := a.leaf(agent)
	serial := ca.Serial(chain[0])
	store.fail(1)
	if err := a.Revoke(t.Context(), serial); err == nil {
		t.Fatal("it was confirmed and is not stored")
	}
	for range 2 {
		if err := a.CatchUp(t.Context()); err != nil {
			t.Fatal(err)
		}
		if a.Revoked() != 1 {
			t.Error("who issued it does not know any more")
		}
	}
	if err := a.Relist(t.Context()); err != nil || !a.revoked(chain) {
		t.Errorf("it is not on the next list: %v", err)
	}
	if err := a.Revoke(t.Context(), serial); err != nil || !stored(t, store, serial) {
		t.Errorf("again: %v, and the state does not have it", err)
	}
	if err := b.CatchUp(t.Context()); err != nil || b.Revoked() != 1 {
		t.Errorf("the other replica does not know: %v", err)
	}
	for _, w := range []*world{a, b} {
		intact(t, w)
	}
}

// TestARequestToRevokeStays until what it asks for is stored.
func TestARequestToRevokeStays(t *testing.T) {
	t.Parallel()
	a, b, store := twoWith(t)
	defer a.run()()
	defer b.run()()
	agent, _ := b.attest(agentB)
	rs, err := issue(t, agent, item(t, byUID(onNodeB.PodUID)))
	if err != nil || rs[0].GetX509() == nil {
		t.Fatal(rs, err)
	}
	chain := parseChain(t, rs[0].GetX509().GetChain())
	store.fail(1)
	_, err = adminOf(t, a).Revoke(t.Context(), &capb.RevokeRequest{Serial: ca.Serial(chain[0]), Reason: 1})
	eventually(t, fmt.Sprintf("it to be revoked everywhere, which said %v", err), func() bool {
		return stored(t, store, ca.Serial(chain[0])) && a.revoked(chain) && b.revoked(chain)
	})
	store.mu.Lock()
	defer store.mu.Unlock()
	if store.left > 0 || len(store.early) > 0 {
		t.Errorf("%d faults are left; requests that left too early: %v", store.left, store.early)
	}
}

// TestABanOfANodeIsRepeated: whichever write of it fails, and whenever who asked for it
// leaves and it crashes, the certificates of the node are revoked soon, each once.
func TestABanOfANodeIsRepeated(t *testing.T) {
	t.Parallel()
	runs := 0
	for _, leaves := range []bool{false, true} {
		for n, hit := 0, true; hit; n++ {
			name := fmt.Sprintf("leaves %v, write %d", leaves, n)
			ctx, leave := context.WithCancel(t.Context())
			f := &faultyWrite{where: "state", fault: "lost", n: n}
			w := newWorld(t, withCRL, f.configure, func(c *ca.Config) {
				fail := c.StoreOptions.Hook
				c.StoreOptions.Hook = func(landed bool) error {
					if !leaves {
						return fail(landed)
					}
					if f.armed && landed {
						if f.count++; f.count == n+1 {
							f.hit = true
							leave()
						}
					}
					return nil
				}
			})
			agent, cert := w.attest(agentA)
			chain := w.leaf(agent)
			f.arm()
			err := w.AddBanAs(ctx, "node/node-a")
			f.disarm()
			leave()
			list, listErr := w.admin().ListBans(t.Context(), &capb.ListBansRequest{})
			if listErr != nil {
				t.Fatal(listErr)
			}
			if leaves { // and it crashes then
				w.reopen()
			}
			_ = w.Tick(t.Context()) // what it knows of bans can be old yet
			if err := w.Tick(t.Context()); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			for _, serial := range [][]byte{ca.Serial(chain[0]), ca.Serial(cert.Leaf)} {
				in, times := stored(t, w.Store(), serial), w.timesRevoked(serial)
				if banned := len(list.GetBans()) == 1; banned && (!in || times != 1) || !banned && (in || err == nil) {
					t.Errorf("%s: banned %v (%v); in the state as revoked %v, recorded %d times", name, banned, err, in, times)
				}
			}
			intact(t, w)
			w.close()
			hit = f.hit
			runs++
		}
	}
	if runs < 8 {
		t.Errorf("only %d runs", runs)
	}
}
