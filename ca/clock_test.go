package ca_test

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const year = 365 * 24 * time.Hour

// stepped is a world whose system clock is off by what a test says.
type stepped struct {
	*world
	off      atomic.Int64
	registry *prometheus.Registry
}

func newStepped(t *testing.T) *stepped {
	s := &stepped{registry: prometheus.NewRegistry()}
	s.world = newWorld(t, func(c *ca.Config) {
		// A short retention, so that a wrong year has something to prune.
		c.LogRetention, c.LogOptions.SegmentSize, c.Metrics = 30*24*time.Hour, 4<<10, s.registry
		ca.WithWall(c, func() time.Time { return time.Now().Round(0).Add(time.Duration(s.off.Load())) })
	})
	// Agents take what begins up to five minutes after now, as package caclient does.
	s.time = func() time.Time { return time.Now().Add(270 * time.Second) }
	return s
}

// reopen starts it again, by a clock that is off by d.
func (s *stepped) reopen(d time.Duration) {
	s.t.Helper()
	s.close()
	s.off.Store(int64(d))
	s.registry = prometheus.NewRegistry()
	s.cfg.Metrics = s.registry
	s.open()
}

// kept is what time takes away.
func (s *stepped) kept() string {
	s.t.Helper()
	bans, err := s.admin().ListBans(s.t.Context(), &capb.ListBansRequest{All: true})
	if err != nil {
		s.t.Fatal(err)
	}
	inForce := 0
	for _, b := range bans.GetBans() {
		if b.GetEnded() == nil {
			inForce++
		}
	}
	first, _ := s.Log().Checkpoint()
	return fmt.Sprintf("%d of %d bans in force, %d revocations, %d agents' records, %d roots, records from %d, %v keys",
		inForce, len(bans.GetBans()), s.Revoked(), s.Records(), len(trustOf(s.world).Roots()), first.Sequence+1, s.CertifiedKeys() > 0)
}

// signs reports whether an authority certifies something of its own.
func (s *stepped) signs() bool {
	s.t.Helper()
	err := s.RenewServing(s.t.Context())
	if err != nil && !errors.Is(err, ca.ErrClock) {
		s.t.Errorf("signing: %v", err)
	}
	return err == nil
}

// TestTheClockOfAnAuthority: steps of five minutes and more, and wrong years, at a start and
// while it runs. Whatever the clock says, nothing is lost; a clock that cannot be right
// signs nothing and says so; and when it is right again, signing goes on.
func TestTheClockOfAnAuthority(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		off  time.Duration
		// refused: nothing is signed. poisons: what is signed by it has a time that the right
		// clock is too far behind of.
		refused, poisons bool
	}{
		{"-4m", -4 * time.Minute, false, false},
		{"+4m", 4 * time.Minute, false, false},
		{"-6m", -6 * time.Minute, true, false},
		{"+6m", 6 * time.Minute, false, true},
		{"-2h", -2 * time.Hour, true, false},
		{"+2h", 2 * time.Hour, false, true},
		{"-1y", -year, true, false},
		{"+1y", year, true, false},
		{"the year 2000", time.Until(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)), true, false},
		{"the year 2100", time.Until(time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC)), true, false},
	} {
		for _, boot := range []bool{false, true} {
			when := map[bool]string{false: "while it runs", true: "at a start"}[boot]
			t.Run(strings.ReplaceAll(c.name+" "+when, " ", "-"), func(t *testing.T) {
				t.Parallel()
				w := newStepped(t)
				agent, _ := w.attest(agentA)
				w.issueSome(agent, 20)
				leaf := w.leaf(agent)[0]
				op := w.admin()
				for _, b := range []*capb.AddBanRequest{
					{Subject: "spiffe://cluster.local/ns/default/sa/client", Reason: "r", Until: timestamppb.New(time.Now().Add(time.Hour))},
					{Subject: "node/node-b", Reason: "r"}, {Subject: "spiffe://cluster.local/ns/over/*", Reason: "r"},
				} {
					if _, err := op.AddBan(t.Context(), b); err != nil {
						t.Fatal(err)
					}
				}
				if _, err := op.RemoveBan(t.Context(), &capb.RemoveBanRequest{Subject: "spiffe://cluster.local/ns/over/*", Reason: "r"}); err != nil {
					t.Fatal(err)
				}
				if err := w.Revoke(t.Context(), ca.Serial(leaf)); err != nil {
					t.Fatal(err)
				}
				if err := w.Tick(t.Context()); err != nil {
					t.Fatal(err)
				}
				before := w.kept()
				if boot {
					w.reopen(c.off)
				} else {
					w.off.Store(int64(c.off))
				}
				for range 2 {
					if err := w.Tick(t.Context()); err != nil {
						t.Errorf("background work: %v", err)
					}
				}
				if got := w.kept(); got != before {
					t.Errorf("of %s\nis left  %s", before, got)
				}
				if past := w.Past(); past.After(time.Now().Add(5*time.Minute)) || past.Before(time.Now().Add(-time.Minute)) {
					t.Errorf("it takes %v for over", past)
				}
				value := gauge(t, w.registry, "signet_ca_clock")
				ready, record := w.Ready(), w.Log().Head().Sequence
				signs := w.signs()
				switch {
				case signs == c.refused:
					t.Errorf("it signs: %v; ready: %v", signs, ready)
				case c.refused && (!errors.Is(ready, ca.ErrClock) || value != 2 || !strings.Contains(ready.Error(), fmt.Sprintf("--accept-clock %d", record))):
					t.Errorf("ready: %v, metric: %v", ready, value)
				case !c.refused && (ready != nil || value == 2):
					t.Errorf("ready: %v, metric: %v", ready, value)
				case c.refused && w.Log().Head().Sequence != record:
					t.Error("the log grew")
				}
				// A ban counts all the same, and is recorded.
				if r, err := w.admin().AddBan(t.Context(), &capb.AddBanRequest{Subject: "spiffe://cluster.local/ns/new/*", Reason: "r"}); err != nil || r.GetPending() != "" {
					t.Errorf("a ban: %v, %v", r, err)
				}
				w.off.Store(0) // right again
				heals := "signs again by itself"
				if c.poisons {
					heals = "signs again when an operator has accepted it"
					if w.signs() || w.Ready() == nil {
						t.Error("it signs by a time before the newest record")
					}
					if _, err := w.admin().AcceptClock(t.Context(), &capb.AcceptClockRequest{Record: w.Log().Head().Sequence, Reason: "the clock was wrong"}); err != nil {
						t.Error(err)
					}
				}
				if !w.signs() || w.Ready() != nil {
					t.Errorf("right again: %v", w.Ready())
				}
				again, _ := w.attest(agentA)
				after := w.leaf(again)[0]
				if d := time.Until(after.NotAfter) - time.Hour; d < -5*time.Minute || d > 5*time.Minute {
					t.Errorf("what it signs then ends at %v", after.NotAfter)
				}
				if err := w.Revoke(t.Context(), ca.Serial(after)); err != nil {
					t.Errorf("finding a certificate of after: %v", err)
				}
				problems, err := w.VerifyAll(t.Context())
				if err != nil || len(problems) > 0 {
					t.Errorf("verification: %v, %v", problems, err)
				}
				w.reopen(0)
				if !w.signs() || w.Ready() != nil {
					t.Errorf("started again: %v", w.Ready())
				}
				if again, _ := w.attest(agentA); !w.mayIssue(again) {
					t.Error("started again: it does not issue")
				}
				did := map[bool]string{true: "signs nothing and is not ready", false: "signs"}[c.refused]
				t.Logf("note: authority, clock %s %s: %s; kept: %s; right again it %s", c.name, when, did, before, heals)
			})
		}
	}
}

// TestAClockIsAccepted: only the one that the operator was told of, with a reason, and it
// is recorded before anything is signed.
func TestAClockIsAccepted(t *testing.T) {
	t.Parallel()
	w := newStepped(t)
	a, _ := w.attest(agentA)
	w.issueSome(a, 3)
	w.reopen(40 * 24 * time.Hour) // it was off for forty days
	if w.signs() || !errors.Is(w.Ready(), ca.ErrClock) {
		t.Fatal("it signs")
	}
	record, op := w.Log().Head().Sequence, w.admin()
	for _, bad := range []*capb.AcceptClockRequest{{Record: record - 1, Reason: "r"}, {Record: record + 1, Reason: "r"}, {Record: record}, {Record: record, Reason: strings.Repeat("x", 501)}} {
		if _, err := op.AcceptClock(t.Context(), bad); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("accepting %v: %v", bad, err)
		}
	}
	if w.signs() {
		t.Fatal("a refused decision lets it sign")
	}
	w.close()
	w.cfg.AcceptClock, w.cfg.Metrics = record-1, nil
	w.open()
	if w.Ready() == nil {
		t.Error("the flag of another record accepts this clock")
	}
	w.close()
	w.cfg.AcceptClock = record
	w.open()
	if err := w.Tick(t.Context()); err != nil || w.Ready() != nil || !w.signs() {
		t.Errorf("accepted: %v, %v", err, w.Ready())
	}
	var decisions []string
	for r := range records(w.world) {
		if d := r.GetDecision(); d != nil {
			decisions = append(decisions, d.GetWhat().String())
			if at := time.Unix(d.GetClock().GetClock(), 0); time.Until(at) < 39*24*time.Hour || d.GetSequence() != record || d.GetReason() == "" {
				t.Errorf("recorded: %v", d)
			}
		} else if len(decisions) == 0 && time.Until(time.Unix(r.GetNotAfter(), 0)) > 366*24*time.Hour {
			t.Error("something was signed before the decision")
		}
	}
	if len(decisions) != 1 {
		t.Errorf("decisions: %v", decisions)
	}
	// The clock was wrong after all, and the flag is still there.
	w.reopen(0)
	if w.Ready() == nil || w.signs() {
		t.Fatal("a flag of before accepts another clock")
	}
	if _, err := w.admin().AcceptClock(t.Context(), &capb.AcceptClockRequest{Record: w.Log().Head().Sequence, Reason: "it was wrong"}); err != nil {
		t.Fatal(err)
	}
	if err := w.Tick(t.Context()); err != nil {
		t.Error(err)
	}
	// What the wrong clock made is not valid yet, and is replaced.
	if !time.Now().After(w.Intermediate().NotBefore) || w.Ready() != nil {
		t.Errorf("the intermediate begins at %v; %v", w.Intermediate().NotBefore, w.Ready())
	}
	w.reopen(0)
	a, _ = w.attest(agentA)
	if !w.mayIssue(a) {
		t.Error("it does not issue")
	}
	if problems, err := w.VerifyAll(t.Context()); err != nil || len(problems) > 0 {
		t.Errorf("verification: %v, %v", problems, err)
	}
	if _, err := w.admin().AcceptClock(t.Context(), &capb.AcceptClockRequest{Record: w.Log().Head().Sequence, Reason: "r"}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a clock that is believed is accepted: %v", err)
	}
}

// TestADoubtOutlivesARestart: that something was signed by a clock in doubt does not make it
// believed; an agent that is recognised does.
func TestADoubtOutlivesARestart(t *testing.T) {
	t.Parallel()
	w := newStepped(t)
	w.attest(agentA)
	for range 3 {
		w.reopen(20 * time.Hour)
		if got := gauge(t, w.registry, "signet_ca_clock"); got != 1 || w.Ready() != nil {
			t.Fatalf("the metric says %v; %v", got, w.Ready())
		}
		if err := w.Tick(t.Context()); err != nil || w.Records() != 1 {
			t.Errorf("%d agents' records; %v", w.Records(), err)
		}
	}
	if w.Past().After(time.Now().Add(time.Minute)) {
		t.Errorf("it takes %v for over", w.Past())
	}
}
