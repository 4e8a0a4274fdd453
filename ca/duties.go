package ca

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
)

// Run does the authority's background work until ctx ends: it signs the log's
// head, renews the intermediate and the serving certificate, forgets agents whose
// SVIDs expired, and prunes the log. It returns nil when ctx ended; a failure is retried, and
// is the reason in Ready meanwhile.
func (a *Authority) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.every(ctx, "head", a.cfg.HeadInterval, a.signHead) })
	g.Go(func() error { return a.every(ctx, "renewal", a.tick(), a.renew) })
	g.Go(func() error { return a.every(ctx, "agents", time.Minute, a.forgetAgents) })
	g.Go(func() error { return a.every(ctx, "bans", time.Second, a.tendBans) })
	g.Go(func() error { return a.every(ctx, "recorded revocations", time.Second, a.tendRevoked) })
	g.Go(func() error { return a.every(ctx, "pruning", pruneEvery, a.pruneLog) })
	if a.cfg.shared() {
		g.Go(func() error { return a.follow(ctx) })
		g.Go(func() error { return a.followBans(ctx) })
		g.Go(func() error { return a.every(ctx, "shared state", time.Second, a.lookAtState()) })
		g.Go(func() error { return a.when(ctx, "acknowledgements", a.heard, sayAfter, a.sayAcknowledged) })
		g.Go(func() error { return a.when(ctx, "lists", a.takenBack, listAfter, a.tendTakenBack) })
		g.Go(func() error { return a.when(ctx, "revocations", a.askedToRevoke, listAfter, a.answerRevocations) })
		g.Go(func() error {
			return a.every(ctx, "asked revocations", pruneEvery, func(context.Context) error { a.askedToRevoke.now(); return nil })
		})
		if a.cfg.RootReplica == a.instance {
			g.Go(func() error { return a.when(ctx, "requests", a.asked, answerAfter, a.answerRequests) })
			g.Go(func() error {
				return a.every(ctx, "requests again", answerAgain, func(context.Context) error { a.asked.now(); return nil })
			})
		}
	}
	g.Go(func() error {
		return a.every(ctx, "key devices", 2*time.Second, func(context.Context) error { a.keys.Probe(); return nil })
	})
	g.Go(func() error {
		return a.every(ctx, "keys", time.Minute, func(context.Context) error { a.keyUses.expire(a.clock.past()); a.tidyFiles(); return nil })
	})
	g.Go(func() error { return a.every(ctx, "clock", min(time.Minute, a.clockPause()), a.tendClock) })
	return g.Wait()
}

// pruneEvery is how often old records are looked for.
const pruneEvery = 10 * time.Minute

// pruneAlarm is after how many times in a row that readers of the log kept old records
// there an alarm says so.
const pruneAlarm = 36

// tick is how often due renewals are looked for: often enough for SVIDs of
// seconds.
func (a *Authority) tick() time.Duration {
	return min(max(a.cfg.SVID.AgentTTL/20, 100*time.Millisecond), 10*time.Second)
}

// every calls f each d until ctx ends. What f failed at last is a reason not to
// be ready, until it succeeds.
func (a *Authority) every(ctx context.Context, job string, d time.Duration, f func(context.Context) error) error {
	t := time.NewTicker(d)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		err := f(ctx)
		if ctx.Err() != nil {
			return nil
		}
		a.fails(job, err)
	}
}

// poke says that there is something to do.
type poke chan struct{}

func (p poke) now() {
	select {
	case p <- struct{}{}:
	default: // it is known already
	}
}

// when calls f a while after each poke, so that many are one call, and every second while
// it fails, until ctx ends.
func (a *Authority) when(ctx context.Context, job string, p poke, after time.Duration, f func(context.Context) error) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-p:
		}
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(after):
			}
			err := f(ctx)
			if ctx.Err() != nil {
				return nil
			}
			if a.fails(job, err); err == nil {
				break
			}
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
		}
	}
}

// fails notes what a job failed at last, nil if it succeeded.
func (a *Authority) fails(job string, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if again := a.failures[job] != nil; err != nil {
		a.failures[job] = err
		if !again {
			a.cfg.Log.Error("background work failed; it is tried again until it succeeds", "job", job, "err", err)
		}
	} else {
		delete(a.failures, job)
		if again {
			a.cfg.Log.Info("background work succeeds again", "job", job)
		}
	}
}

func (a *Authority) failing() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return errors.Join(slices.Collect(maps.Values(a.failures))...)
}

// alarm notes what needs an operator while all still works; nil ends it.
func (a *Authority) alarm(name string, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	before := a.alarms[name]
	if err == nil {
		delete(a.alarms, name)
		if before != nil {
			a.cfg.Log.Info("alarm ended", "alarm", name)
		}
		return
	}
	a.alarms[name] = err
	if before == nil || before.Error() != err.Error() {
		a.cfg.Log.Error("alarm", "alarm", name, "err", err)
	}
}

// Alarms is what needs an operator while all still works, nil if nothing does.
func (a *Authority) Alarms() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(a.alarms)) {
		errs = append(errs, fmt.Errorf("%s: %w", name, a.alarms[name]))
	}
	return errors.Join(errs...)
}
