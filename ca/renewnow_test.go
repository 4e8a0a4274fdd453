package ca_test

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
)

// withoutRoot is a replica whose replica with the root does not run, and that one.
func withoutRoot(t *testing.T) (b, a *world) {
	t.Helper()
	shared := newShared(t)
	one := func(c *ca.Config) { c.Shared, c.RootReplica = shared, 1 }
	a = newWorld(t, brisk, one, func(c *ca.Config) { c.Instance = 1 })
	stop := a.run()
	b = newWorld(t, brisk, one)
	stop()
	return b, a
}

// TestAnOperatorWhoWaitsHoldsNothingUp: while a step waits for the replica with the root,
// what is due is done, and the step ends when that has signed.
func TestAnOperatorWhoWaitsHoldsNothingUp(t *testing.T) {
	t.Parallel()
	for name, step := range map[string]capb.RotateRequest_Step{"renew": capb.RotateRequest_STEP_RENEW, "taint": capb.RotateRequest_STEP_TAINT} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, a := withoutRoot(t)
			before := b.Intermediate()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			done := make(chan error, 1)
			go func() { done <- b.Rotate(ctx, step, idOf(before), false) }()
			eventually(t, "the request", func() bool { return b.RequestHash() != nil })
			tick := make(chan error, 1)
			go func() { tick <- b.Tick(t.Context()) }()
			select {
			case err := <-tick:
				if err != nil {
					t.Error(err)
				}
			case err := <-done: // after half a minute
				t.Fatalf("what is due waits for the operator's step, which says %v", err)
			}
			defer a.run()()
			if err := <-done; err != nil || b.Intermediate().Equal(before) {
				t.Errorf("%v; another one signs: %v", err, !b.Intermediate().Equal(before))
			}
			intact(t, b)
		})
	}
}

// TestAnOperatorDoesNotWaitForEver for a replica with the root that is away.
func TestAnOperatorDoesNotWaitForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, _ := withoutRoot(t)
		before := b.Intermediate()
		for name, step := range map[string]capb.RotateRequest_Step{"renew": capb.RotateRequest_STEP_RENEW, "taint": capb.RotateRequest_STEP_TAINT} {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
			start := time.Now()
			err := b.Rotate(ctx, step, idOf(before), false)
			cancel()
			if took := time.Since(start); err == nil || took < 29*time.Second || took > 31*time.Second || !strings.Contains(err.Error(), "replica 1") || !strings.Contains(err.Error(), "see that it runs") {
				t.Errorf("%s: after %v: %v", name, took, err)
			}
			if !b.Intermediate().Equal(before) || b.RequestHash() == nil {
				t.Errorf("%s: another one signs: %v; the request is gone: %v", name, !b.Intermediate().Equal(before), b.RequestHash() == nil)
			}
			// And one whose client has left ends before.
			ctx, cancel = context.WithTimeout(t.Context(), 2*time.Second)
			start = time.Now()
			if err := b.Rotate(ctx, step, idOf(before), false); err == nil || time.Since(start) > 3*time.Second {
				t.Errorf("%s without a client: after %v: %v", name, time.Since(start), err)
			}
			cancel()
		}
	})
}
