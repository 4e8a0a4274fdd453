package ca_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/storage"
)

// lostAnswer has one change of a replica's own part of the journal happen and end without
// an answer: the one after passing others. What is read next cannot be read, or meanwhile happens
// before it is.
type lostAnswer struct {
	storage.Store
	meanwhile func() // nil: the read fails

	mu    sync.Mutex
	armed bool // guarded by mu
	pass  int  // guarded by mu
	hit   bool // guarded by mu
	deaf  bool // the next read fails; guarded by mu
}

func (s *lostAnswer) arm(pass int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.armed, s.pass = true, pass
}

func (s *lostAnswer) wasHit() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.hit }

func (s *lostAnswer) Commit(ctx context.Context, conds []storage.Cond, ops []storage.Op) (uint64, error) {
	own := false
	for _, o := range ops {
		own = own || strings.HasPrefix(o.Key, "replicas/")
	}
	s.mu.Lock()
	loses := false
	if s.armed && own {
		s.pass--
		loses = s.pass < 0
	}
	if loses {
		s.armed = false
	}
	s.mu.Unlock()
	revision, err := s.Store.Commit(ctx, conds, ops)
	if !loses || err != nil {
		return revision, err
	}
	if s.meanwhile != nil {
		s.meanwhile()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hit, s.deaf = true, s.meanwhile == nil
	return 0, fmt.Errorf("no answer: %w", storage.ErrUnknown)
}

func (s *lostAnswer) List(ctx context.Context, prefixes ...string) ([]storage.Entry, uint64, error) {
	s.mu.Lock()
	deaf := s.deaf
	s.deaf = false
	s.mu.Unlock()
	if deaf {
		return nil, 0, errors.New("no quorum")
	}
	return s.Store.List(ctx, prefixes...)
}

// TestAReplicaSignsWithWhatTheJournalSays, also where the change that said so was reported
// as failed. What it signed until it knew is valid to its end.
func TestAReplicaSignsWithWhatTheJournalSays(t *testing.T) {
	t.Parallel()
	for source, edit := range map[string]func(t *testing.T) func(*ca.Config){
		"a root in a device": func(*testing.T) func(*ca.Config) { return newDevice().configure },
		"an upstream": func(t *testing.T) func(*ca.Config) {
			_, upstream := upstreamFolder(t)
			return func(c *ca.Config) { c.Upstream = upstream }
		},
	} {
		for _, lists := range []bool{false, true} {
			for _, foreign := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, lists %v, foreign change %v", source, lists, foreign), func(t *testing.T) {
					t.Parallel()
					shared := newShared(t)
					both := edit(t)
					b := newWorld(t, brisk, both, func(c *ca.Config) { c.Shared, c.CRL.Enabled = shared, lists })
					store := &lostAnswer{Store: shared.Store}
					if foreign {
						store.meanwhile = func() {
							if err := b.Relist(t.Context()); err != nil {
								t.Error(err)
							}
						}
					}
					a := newWorld(t, brisk, both, func(c *ca.Config) {
						c.Shared, c.CRL.Enabled = ca.Shared{Store: store, Files: shared.Files, LogWait: shared.LogWait}, lists
					})
					before := a.Intermediate()
					if lists { // the next one is published, and then used
						store.arm(1)
					} else {
						store.arm(0)
					}
					err := a.RenewIntermediate(t.Context())
					if lists && err == nil {
						eventually(t, "it to be used", func() bool { err = a.Tick(t.Context()); return store.wasHit() })
					}
					// The same round of work has read the journal and taken it up where it could.
					known := lists && foreign
					if !errors.Is(err, storage.ErrUnknown) || !known && !a.Intermediate().Equal(before) {
						t.Fatalf("%v; another one signs: %v", err, !a.Intermediate().Equal(before))
					}
					time.Sleep(100 * time.Millisecond) // more than the slack of brisk
					late := time.Now()
					stop := a.run()
					eventually(t, "what the journal says to sign", func() bool { return !a.Intermediate().Equal(before) })
					eventually(t, "it to be ready", func() bool { return a.Ready() == nil })
					inter := a.Intermediate()
					client, _ := a.attest(agentA)
					if leaf := a.leaf(client); !leaf[1].Equal(inter) {
						t.Error("a leaf is from the former one")
					}
					for _, s := range must(adminOf(t, a).Authorities(t.Context(), &capb.AuthoritiesRequest{})).GetAuthorities() {
						if s.GetId() == idOf(before) && !known && source == "a root in a device" && s.GetLeaves().AsTime().Before(late.Add(a.cfg.SVID.MaxTTL)) {
							t.Errorf("a leaf of %s ends at %s, and the journal says %s", late, late.Add(a.cfg.SVID.MaxTTL), s.GetLeaves().AsTime())
						}
					}
					stop()
					intact(t, a)
					a.close()
					a.open()
					if !a.Intermediate().Equal(inter) {
						t.Error("after opening again another one signs: it was not what the journal says")
					}
				})
			}
		}
	}
}
