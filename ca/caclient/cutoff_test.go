package caclient_test

import (
	"context"
	"errors"
	"iter"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/caclient"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/storage"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// cutState is a state from which a replica can be cut off: requests fail, and a watch says
// nothing.
type cutState struct {
	storage.Store
	mu    sync.Mutex
	ended chan struct{} // closed when it is over; nil: it is not cut off; guarded by mu
}

var errCutOff = errors.New("cut off from the state")

func (s *cutState) cut() { s.mu.Lock(); defer s.mu.Unlock(); s.ended = make(chan struct{}) }

func (s *cutState) mend() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.ended)
	s.ended = nil
}

func (s *cutState) until() <-chan struct{} { s.mu.Lock(); defer s.mu.Unlock(); return s.ended }

func (s *cutState) Get(ctx context.Context, key string) (storage.Entry, error) {
	if s.until() != nil {
		return storage.Entry{}, errCutOff
	}
	return s.Store.Get(ctx, key)
}

func (s *cutState) List(ctx context.Context, prefixes ...string) ([]storage.Entry, uint64, error) {
	if s.until() != nil {
		return nil, 0, errCutOff
	}
	return s.Store.List(ctx, prefixes...)
}

func (s *cutState) Commit(ctx context.Context, conds []storage.Cond, ops []storage.Op) (uint64, error) {
	if s.until() != nil {
		return 0, errCutOff
	}
	return s.Store.Commit(ctx, conds, ops)
}

func (s *cutState) Watch(ctx context.Context, prefix string, after uint64) iter.Seq2[storage.Event, error] {
	return func(yield func(storage.Event, error) bool) {
		for e, err := range s.Store.Watch(ctx, prefix, after) {
			if ended := s.until(); ended != nil {
				select {
				case <-ended:
				case <-ctx.Done():
					return
				}
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

// TestAReplicaThatIsCutOffFromTheState keeps no agent from a ban that another one is told: its
// agents leave it, although it answers and nobody asks it for anything.
func TestAReplicaThatIsCutOffFromTheState(t *testing.T) {
	t.Parallel()
	var state *cutState
	a, b, _ := twoReplicas(t, func(c *ca.Config) {
		state = &cutState{Store: c.Shared.Store}
		c.Shared.Store = state
	})
	cfg := a.config()
	cfg.Addresses = []string{a.addr, b.addr}
	wires := cables(&cfg)
	wires.leave(b.addr)
	c, end := run(t, cfg)
	ready(t, c)
	wires.leave("")
	opOfB := b.admin()
	within(t, "the agent to be connected", func() bool {
		l, err := opOfB.ListBans(t.Context(), &capb.ListBansRequest{})
		return err == nil && len(l.GetAgents()) == 1 && l.GetAgents()[0].GetConnected() && l.GetOtherReplicas() == 1
	})

	state.cut()
	began := time.Now()
	const who = "spiffe://cluster.local/ns/default/sa/server"
	resp, err := a.admin().AddBan(t.Context(), &capb.AddBanRequest{Subject: who, Reason: "r"})
	if err != nil {
		t.Fatal(err)
	}
	within(t, "the agent to know of the ban", func() bool { bans, _ := c.Bans(); return bans.Len() == 1 })
	t.Logf("note: after %v the agent knows of the ban", time.Since(began).Round(time.Millisecond))
	within(t, "the replica that is cut off not to be ready", func() bool { return b.Ready() != nil })

	// And what it does not know it is told when that is over.
	state.mend()
	within(t, "the replica to be ready, and to know of the ban", func() bool {
		l, err := opOfB.ListBans(t.Context(), &capb.ListBansRequest{})
		return err == nil && l.GetRevision() >= resp.GetRevision() && b.Ready() == nil
	})
	end()
	b.stop()
	a.stop()
}

// TestWhereEveryReplicaIsCutOff an agent goes to another one in some seconds, and then seldom.
func TestWhereEveryReplicaIsCutOff(t *testing.T) {
	t.Parallel()
	last := time.Now()
	for _, c := range []struct {
		last     *time.Time
		after    time.Duration
		random   float64
		min, max time.Duration
	}{
		{nil, 0, 0, 0, 0},
		{nil, 0, 0.999, caclient.LeaveWithin * 9 / 10, caclient.LeaveWithin},
		{&last, 0, 0, caclient.LeaveAgain / 2, caclient.LeaveAgain / 2},
		{&last, 0, 0.999, caclient.LeaveAgain * 9 / 10, caclient.LeaveAgain},
		{&last, caclient.LeaveAgain / 4, 0, caclient.LeaveAgain / 4, caclient.LeaveAgain / 4},
		{&last, caclient.LeaveAgain, 0.999, caclient.LeaveWithin * 9 / 10, caclient.LeaveWithin},
		{&last, time.Hour, 0.5, caclient.LeaveWithin / 2, caclient.LeaveWithin / 2},
	} {
		if got := caclient.LeaveIn(c.last, last.Add(c.after), c.random); got < c.min || got > c.max {
			t.Errorf("%v after one was left the next is left in %v, want %v to %v", c.after, got, c.min, c.max)
		}
	}

	var streams atomic.Int64
	s := &stub{}
	s.watchTrust = func(st grpc.BidiStreamingServer[capb.WatchTrustRequest, capb.WatchTrustResponse]) error {
		streams.Add(1)
		if err := st.Send(&capb.WatchTrustResponse{Trust: s.trust(false), StaleSince: timestamppb.Now()}); err != nil {
			return err
		}
		<-st.Context().Done()
		return nil
	}
	cfg := s.start(t)
	began := time.Now()
	run(t, cfg)
	eventually(t, "another session", func() bool { return streams.Load() >= 2 })
	for deadline := time.Now().Add(2 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if n, took := streams.Load(), time.Since(began); n > 2 && took < caclient.LeaveAgain/2 {
			t.Fatalf("%d sessions in %v", n, took)
		}
	}
}
