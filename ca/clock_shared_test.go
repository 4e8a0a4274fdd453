package ca_test

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/integration/etcdtest"
	"github.com/signet-mesh/signet/storage"

	"github.com/prometheus/client_golang/prometheus"
)

// newSteppedReplica is a replica whose system clock is off by what a test says. What Run
// does with the clock the test does, with Tick.
func newSteppedReplica(t *testing.T, shared ca.Shared, upstream ca.UpstreamConfig) *stepped {
	t.Helper()
	s := &stepped{registry: prometheus.NewRegistry()}
	s.world = newWorld(t, func(c *ca.Config) {
		c.Shared, c.Upstream, c.Metrics = shared, upstream, s.registry
		c.IntermediateTTL = 30 * 24 * time.Hour
		ca.WithWall(c, func() time.Time { return time.Now().Round(0).Add(time.Duration(s.off.Load())) })
	})
	return s
}

func (s *stepped) tick() {
	s.t.Helper()
	if err := s.Tick(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
}

// goesOn has time pass for the replica, as its clock says it, and as its clock is kept.
func (s *stepped) goesOn(d time.Duration) {
	s.t.Helper()
	s.off.Add(int64(d))
	s.tick()
}

// keptTime is what an instance keeps of the time in the shared state.
func keptTime(t *testing.T, shared ca.Shared, instance string) time.Time {
	t.Helper()
	e, err := shared.Store.Get(t.Context(), "replica-clock/"+instance)
	if err != nil {
		t.Fatal(err)
	}
	var kept struct{ Time time.Time }
	if err := json.Unmarshal(e.Value, &kept); err != nil {
		t.Fatal(err)
	}
	return kept.Time
}

func (s *stepped) clockSays(want float64) {
	s.t.Helper()
	families, err := s.registry.Gather()
	if err != nil {
		s.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "signet_ca_clock" {
			if got := f.GetMetric()[0].GetGauge().GetValue(); got != want {
				s.t.Errorf("signet_ca_clock is %v, not %v; ready: %v", got, want, s.Ready())
			}
			return
		}
	}
	s.t.Error("there is no signet_ca_clock")
}

// TestAReplicaWithAWrongClock: on a real etcd the clock of one replica jumps, by so little
// that its agents would confirm it. The other one's record contradicts it, so it refuses
// itself; and whatever it keeps, the other one goes on by its own clock, over restarts.
func TestAReplicaWithAWrongClock(t *testing.T) {
	t.Parallel()
	const believed, doubted, refused = 0, 1, 2
	const off = 30 * time.Minute
	_, upstream := upstreamFolder(t)
	cluster := etcdtest.Start(t, etcdtest.Options{})
	shared := etcdState(t, cluster, "/clocks/")
	right := newSteppedReplica(t, shared, upstream)
	wrong := newSteppedReplica(t, etcdState(t, cluster, "/clocks/"), upstream)
	// Agents whose clocks are wrong, too, or who do not look.
	wrong.time = func() time.Time { return time.Now().Add(time.Duration(wrong.off.Load())) }
	for range 2 {
		for _, s := range []*stepped{right, wrong} {
			s.goesOn(20 * time.Second)
			s.clockSays(believed)
		}
	}
	before := keptTime(t, shared, "002")

	jumped := func(meanwhile float64) {
		t.Helper()
		wrong.clockSays(meanwhile)
		// An agent would confirm it: its SVID and its token are valid by both clocks.
		_, err := wrong.tryAttest(wrong.dial(nil), func(r *capb.AttestRequest) {
			r.Evidence = &capb.AttestRequest_Token{Token: wrong.issuer.Token(agentB, "signet-ca")}
		})
		if (err != nil) != (meanwhile == refused) {
			t.Errorf("an agent proves its node: %v", err)
		}
		wrong.tick()
		wrong.clockSays(meanwhile)
		if kept := keptTime(t, shared, "002"); kept.After(before.Add(time.Minute)) {
			t.Errorf("a clock in doubt is kept: %v after %v", kept, before)
		}
		right.goesOn(20 * time.Second)
		wrong.tick()
		wrong.clockSays(refused)
		if err := wrong.Ready(); err == nil || !strings.Contains(err.Error(), "replica 1, whose clock did not jump, says") {
			t.Errorf("readiness of the replica with the wrong clock: %v", err)
		} else {
			t.Logf("note: %v", err)
		}
		if wrong.signs() {
			t.Error("it signs")
		}
		// Also after long, and whoever is recognised.
		for range 3 {
			right.goesOn(20 * time.Second)
			wrong.tick()
			wrong.clockSays(refused)
		}
		if err := right.Ready(); err != nil || !right.signs() {
			t.Errorf("the other one: %v", err)
		}
		right.clockSays(believed)
	}
	wrong.off.Add(int64(off))
	wrong.tick()
	jumped(refused) // other replicas are heard first
	wrong.off.Add(-int64(off))
	wrong.tick()
	wrong.clockSays(believed)
	if err := wrong.Ready(); err != nil || !wrong.signs() {
		t.Errorf("with the right clock again: %v", err)
	}

	// At a start, too; then it can have signed before it hears the other one, and an operator
	// accepts the right clock, as after any that was ahead.
	before = keptTime(t, shared, "002")
	wrong.reopen(time.Duration(wrong.off.Load()) + off)
	wrong.tick()
	jumped(doubted)
	wrong.off.Add(-int64(off))
	wrong.tick()
	wrong.clockSays(refused)
	if _, err := wrong.admin().AcceptClock(t.Context(), &capb.AcceptClockRequest{Record: wrong.Log().Head().Sequence, Reason: "it was half an hour ahead"}); err != nil {
		t.Fatal(err)
	}
	wrong.clockSays(believed)

	// What a replica believed all the same, because it was alone for long, refuses no other.
	for i := range 2 {
		b, err := json.Marshal(map[string]any{"version": 1, "time": time.Now().Add(year + time.Duration(i)*time.Minute).UTC()})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := shared.Store.Commit(t.Context(), nil, []storage.Op{{Key: "replica-clock/002", Value: b}}); err != nil {
			t.Fatal(err)
		}
		right.goesOn(20 * time.Second)
	}
	if err := right.Alarms(); err == nil || !strings.Contains(err.Error(), "the clock of replica 2 says") {
		t.Errorf("the other one's alarms: %v", err)
	}
	right.reopen(time.Duration(right.off.Load()))
	right.clockSays(believed)
	if err := right.Ready(); err != nil || !right.signs() {
		t.Errorf("the other one after a start: %v", err)
	}

	// One that was off for long knows the time from the others.
	wrong.close()
	put(t, shared.Store, "replica-clock/002", "")
	b, err := json.Marshal(map[string]any{"version": 1, "time": time.Now().UTC()})
	if err != nil {
		t.Fatal(err)
	}
	put(t, shared.Store, "replica-clock/002", string(b))
	for range 30 {
		right.goesOn(4 * time.Minute)
	}
	right.clockSays(believed)
	wrong.reopen(time.Duration(right.off.Load()))
	wrong.clockSays(believed)
}

// clockAnswers is a state that does not answer a commit of the time, which it has made,
// once it is armed.
type clockAnswers struct {
	storage.Store
	armed atomic.Bool
}

func (s *clockAnswers) Commit(ctx context.Context, conds []storage.Cond, ops []storage.Op) (uint64, error) {
	hit := slices.ContainsFunc(ops, func(o storage.Op) bool { return strings.HasPrefix(o.Key, "replica-clock/") }) && s.armed.CompareAndSwap(true, false)
	revision, err := s.Store.Commit(ctx, conds, ops)
	if hit && err == nil {
		return 0, storage.ErrUnknown
	}
	return revision, err
}

// TestReplicasKeepTheTimeSideBySide: neither that another replica has kept the time just
// now, nor that its record was changed, nor a lost answer, makes one unready that has its
// record as it should be.
func TestReplicasKeepTheTimeSideBySide(t *testing.T) {
	t.Parallel()
	_, upstream := upstreamFolder(t)
	shared := newShared(t)
	a := newSteppedReplica(t, shared, upstream)
	store := &clockAnswers{Store: shared.Store}
	shared.Store = store
	b := newSteppedReplica(t, shared, upstream)
	goOn := func(what string) {
		t.Helper()
		for _, s := range []*stepped{a, b} {
			s.off.Add(int64(4 * time.Minute))
		}
		for i, s := range []*stepped{a, b} {
			before := keptTime(t, shared, []string{"001", "002"}[i])
			if err := s.TendClock(t.Context()); err != nil {
				t.Errorf("%s: replica %d: %v", what, i+1, err)
			}
			if err := s.Ready(); err != nil {
				t.Errorf("%s: replica %d: %v", what, i+1, err)
			}
			if kept := keptTime(t, shared, []string{"001", "002"}[i]); kept.Sub(before) < 3*time.Minute {
				t.Errorf("%s: replica %d keeps %v after %v", what, i+1, kept, before)
			}
		}
	}
	for range 2 {
		a.goesOn(20 * time.Second) // that there is a record
		b.goesOn(20 * time.Second)
	}
	for range 3 {
		goOn("one after the other")
	}
	e, err := shared.Store.Get(t.Context(), "replica-clock/002")
	if err != nil {
		t.Fatal(err)
	}
	put(t, shared.Store, e.Key, string(e.Value))
	goOn("after another change of the record")
	store.armed.Store(true)
	goOn("with an answer lost")
	if store.armed.Load() {
		t.Error("no answer was lost")
	}
}
