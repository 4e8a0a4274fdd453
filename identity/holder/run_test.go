package holder_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/holder"
)

// maxInFlight is how many batches may be under way, as the documentation says.
const maxInFlight = 4

func TestRunIsRefusedTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := start(t, config(newAuthority()))
		synctest.Wait()
		if err := h.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "active already") {
			t.Errorf("a second Run returned %v", err)
		}
	})
}

func TestRunGoesOnAfterItWasStopped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		a.pods.Set(pod("web", "web-1"))
		h, err := holder.New(config(a))
		if err != nil {
			t.Fatal(err)
		}
		a.before = func(ctx context.Context, _ []identity.Request) error { <-ctx.Done(); return ctx.Err() }
		stop := run(t, h)
		ask(t, h, caller(pod("web", "web-1")))
		synctest.Wait()
		stop() // in the middle of an attempt, which is not counted as failed
		a.set(func() { a.before = nil })
		run(t, h)
		synctest.Wait()
		have(t, h, a, caller(pod("web", "web-1")))
	})
}

func TestTwelveHoursOfRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		w := pod("web", "web-1")
		a.pods.Set(w)
		a.renewAt = func(now, notAfter time.Time) time.Time {
			left := notAfter.Sub(now)
			return now.Add(left/2 + time.Duration((rand.Float64()-.5)*float64(left)/5))
		}
		reg := prometheus.NewRegistry()
		cfg := config(a)
		cfg.Metrics = reg
		h := start(t, cfg)
		_, changed := ask(t, h, caller(w))
		<-changed
		var last *x509svid.SVID
		keys := map[string]bool{}
		var chosen time.Time
		for end := time.Now().Add(12 * time.Hour); time.Now().Before(end); {
			svid := have(t, h, a, caller(w))
			if left := time.Until(svid.Certificates[0].NotAfter); left < 23*time.Minute {
				t.Fatalf("the SVID has %s left with an authority that answers", left)
			}
			if svid != last {
				key := scalar(svid.PrivateKey).String()
				if keys[key] {
					t.Fatal("a key was used twice")
				}
				keys[key] = true
				if last != nil && time.Since(chosen) > 10*time.Second {
					t.Errorf("renewed at %s, the authority chose %s", time.Now(), chosen)
				}
				last, chosen = svid, h.Export()[0].RenewAt
				if _, c := ask(t, h, caller(w)); closed(c) {
					t.Error("the channel that came with the newest SVID is closed")
				}
			}
			time.Sleep(10 * time.Second)
		}
		keys[scalar(have(t, h, a, caller(w)).PrivateKey).String()] = true // it may have come in the last ten seconds
		// Every 24 to 36 minutes in 12 hours.
		if len(keys) < 20 || len(keys) > 31 {
			t.Errorf("%d SVIDs in 12 hours", len(keys))
		}
		if got := value(t, reg, "signet_holder_requests_total", "kind=renewal", "result=issued"); int(got) != len(keys)-1 {
			t.Errorf("%v renewals were counted, there were %d", got, len(keys)-1)
		}
		if a.callCount() != len(keys) {
			t.Errorf("%d calls for %d SVIDs", a.callCount(), len(keys))
		}
	})
}

func TestOutageShorterThanHalfALifeIsNotNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		w := pod("web", "web-1")
		a.pods.Set(w)
		reg := prometheus.NewRegistry()
		cfg := config(a)
		cfg.Metrics = reg
		h := start(t, cfg)
		_, changed := ask(t, h, caller(w))
		<-changed
		time.Sleep(time.Second) // look a second after each minute
		begin := time.Now()
		for minute := range 120 {
			switch minute {
			case 29:
				a.set(func() { a.before = a.down })
			case 57:
				a.set(func() { a.before = nil })
			}
			have(t, h, a, caller(w))
			missed := minute >= 30 && minute <= 57
			if err := h.Health(); (err != nil) != missed {
				t.Errorf("in minute %d Health = %v", minute, err)
			}
			if got := value(t, reg, "signet_holder_overdue"); (got == 1) != missed {
				t.Errorf("in minute %d signet_holder_overdue = %v", minute, got)
			}
			time.Sleep(time.Until(begin.Add(time.Duration(minute+1) * time.Minute)))
		}
		// 27 minutes of attempts every 15 to 30 seconds, and not in a loop.
		failed := value(t, reg, "signet_holder_requests_total", "kind=renewal", "result=unavailable")
		if failed < 54 || failed > 120 {
			t.Errorf("%v attempts in an outage of 27 minutes", failed)
		}
	})
}

func TestOutageUntilExpiry(t *testing.T) {
	for _, c := range []struct {
		name  string
		retry bool
		most  time.Duration // from the end of the outage to the SVID
	}{
		{"recovers by backoff", false, 30 * time.Second},
		{"recovers at once when told", true, time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newAuthority()
				w := pod("web", "web-1")
				a.pods.Set(w)
				reg := prometheus.NewRegistry()
				cfg := config(a)
				cfg.Metrics = reg
				h := start(t, cfg)
				_, changed := ask(t, h, caller(w))
				<-changed
				svid := have(t, h, a, caller(w))
				a.set(func() { a.before = a.down })

				_, changed = ask(t, h, caller(w))
				expiry := svid.Certificates[0].NotAfter
				time.Sleep(time.Until(expiry) - time.Nanosecond)
				if got := have(t, h, a, caller(w)); got != svid || closed(changed) {
					t.Error("the last SVID is not served until it expires")
				}
				time.Sleep(time.Nanosecond)
				if got, _ := ask(t, h, caller(w)); got != nil {
					t.Error("an expired SVID is given out")
				}
				synctest.Wait()
				if !closed(changed) {
					t.Error("the SVID expired and the channel is open")
				}
				if len(h.Export()) != 0 {
					t.Error("an expired SVID is exported")
				}
				if err := h.Health(); !errors.Is(err, errDown) || !strings.Contains(err.Error(), "expired at 2000-01-01T01:00:00Z") {
					t.Errorf("Health = %v", err)
				}
				if got := value(t, reg, "signet_holder_svids"); got != 0 {
					t.Errorf("signet_holder_svids = %v, want 0", got)
				}
				// Attempts became denser: there was one in the last two seconds.
				if at := a.lastCall().at; expiry.Sub(at) > 2*time.Second {
					t.Errorf("the last attempt was %s before expiry", expiry.Sub(at))
				}
				if n := a.callCount(); n > 200 {
					t.Errorf("%d attempts", n)
				}
				time.Sleep(5 * time.Minute)
				_, changed = ask(t, h, caller(w))
				a.set(func() { a.before = nil })
				if c.retry {
					h.Retry()
				}
				since := time.Now()
				<-changed
				if took := time.Since(since); took > c.most {
					t.Errorf("%s from the end of the outage to the SVID", took)
				}
				have(t, h, a, caller(w))
				if err := h.Health(); err != nil {
					t.Errorf("Health = %v, want nil", err)
				}
			})
		})
	}
}

func TestOneAnswerEndsTheOutageForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		a.before = a.down
		h := start(t, config(a))
		const n = 100
		for i := range n {
			w := pod(fmt.Sprint("sa-", i), fmt.Sprint("pod-", i))
			a.pods.Set(w)
			ask(t, h, caller(w))
		}
		time.Sleep(10 * time.Minute)
		if calls := a.callCount(); calls > 600 {
			t.Errorf("%d calls in ten minutes for %d SVIDs: retries do not share batches", calls, n)
		}
		a.set(func() { a.before, a.calls = nil, nil })
		late := pod("late", "late-1")
		a.pods.Set(late)
		ask(t, h, caller(late))
		synctest.Wait()
		have(t, h, a, caller(late))
		time.Sleep(time.Second)
		synctest.Wait()
		if got := len(h.Export()); got != n+1 {
			t.Errorf("a second after the first answer there are %d SVIDs, want %d", got, n+1)
		}
		if calls := a.callCount(); calls > 10 {
			t.Errorf("%d calls for %d SVIDs", calls, n)
		}
	})
}

func TestBackoffOfAFirstSVID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		a.before = a.down
		w := pod("web", "web-1")
		a.pods.Set(w)
		h := start(t, config(a))
		ask(t, h, caller(w))
		for range 600 {
			time.Sleep(time.Second)
			ask(t, h, caller(w)) // asking again and again changes nothing
		}
		want := 500 * time.Millisecond
		calls := a.log()
		for i := 1; i < len(calls); i++ {
			gap := calls[i].at.Sub(calls[i-1].at)
			if gap < want || gap > 2*want {
				t.Errorf("wait %d was %s, want %s to %s", i, gap, want, 2*want)
			}
			want = min(2*want, holder.LastRetry/2)
		}
		if len(calls) < 20 {
			t.Errorf("%d attempts in ten minutes", len(calls))
		}
	})
}

func TestEvidence(t *testing.T) {
	hopeless := func(bad ...string) func(identity.Request, spiffeid.ID) *identity.Result {
		return func(r identity.Request, _ spiffeid.ID) *identity.Result {
			for _, b := range bad {
				if r.Token == b || r.PodUID == b {
					return &identity.Result{Err: errRefused, RetryAfter: -1}
				}
			}
			return nil
		}
	}
	for _, c := range []struct {
		name   string
		token  string
		answer func(identity.Request, spiffeid.ID) *identity.Result
		first  []string // evidence for the first SVID, in order
		renew  []string // evidence for its renewal
	}{
		{"is the token, then the pod", "token of web-2", nil, []string{"token of web-2"}, []string{"web-2"}},
		{"is the pod of the caller without a token", "", nil, []string{"web-2"}, []string{"web-2"}},
		{"is the pod when the token is refused", "token of web-2", hopeless("token of web-2"), []string{"token of web-2", "web-2"}, []string{"web-2"}},
		{"is another pod when the first is refused", "", hopeless("web-2"), []string{"web-2", "web-1"}, []string{"web-2", "web-1"}},
		{"is the pod when the token is too long", "token of web-2 " + strings.Repeat("x", 20_000), nil, []string{"web-2"}, []string{"web-2"}},
		{"alternates when a refusal may pass", "token of web-2", func(r identity.Request, _ spiffeid.ID) *identity.Result {
			if r.PodUID == "web-1" {
				return nil
			}
			return &identity.Result{Err: errRefused}
		}, []string{"token of web-2", "web-2", "web-1"}, []string{"web-2", "web-1"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newAuthority()
				a.pods.Replace([]identity.Workload{pod("web", "web-1"), pod("web", "web-2")})
				a.answer = c.answer
				h := start(t, config(a))
				shown := func() (evidence []string) {
					a.set(func() {
						for _, call := range a.calls {
							evidence = append(evidence, call.requests[0].Token+call.requests[0].PodUID)
						}
						a.calls = nil
					})
					return evidence
				}
				ask(t, h, withToken(pod("web", "web-2"), c.token))
				time.Sleep(10 * time.Second)
				have(t, h, a, caller(pod("web", "web-2")))
				if got := shown(); fmt.Sprint(got) != fmt.Sprint(c.first) {
					t.Errorf("evidence for the first SVID was %q, want %q", got, c.first)
				}
				time.Sleep(31 * time.Minute)
				if got := shown(); fmt.Sprint(got) != fmt.Sprint(c.renew) {
					t.Errorf("evidence for the renewal was %q, want %q", got, c.renew)
				}
			})
		})
	}
}

func TestTokenThatHasExpiredIsNotShown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		a.pods.Set(pod("web", "web-1"))
		h := start(t, config(a))
		ask(t, h, identity.Caller{Workload: pod("web", "web-1"), Token: "token of web-1", Until: time.Now()})
		synctest.Wait()
		if r := a.lastCall().requests[0]; r.Token != "" || r.PodUID != "web-1" {
			t.Errorf("the evidence was token %q, pod %q", r.Token, r.PodUID)
		}
	})
}

func TestTokenHelpsARenewalThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		w := pod("web", "web-1")
		a.pods.Set(w)
		h := start(t, config(a))
		ask(t, h, withToken(w, "token of web-1 the first")) // not kept longer than needed
		synctest.Wait()
		svid := have(t, h, a, caller(w))
		// The authority wants a token from now on.
		a.set(func() {
			a.answer = func(r identity.Request, _ spiffeid.ID) *identity.Result {
				if r.Token == "" {
					return &identity.Result{Err: errRefused, RetryAfter: -1}
				}
				return nil
			}
		})
		time.Sleep(30*time.Minute + time.Second)
		if h.Health() == nil {
			t.Fatal("the renewal did not fail")
		}
		ask(t, h, withToken(w, "token of web-1"))
		time.Sleep(time.Second)
		synctest.Wait()
		if have(t, h, a, caller(w)) == svid {
			t.Error("a caller came with a token and the SVID was not renewed")
		}
	})
}

func TestRetryAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		w := pod("web", "web-1")
		a.pods.Set(w)
		a.answer = func(identity.Request, spiffeid.ID) *identity.Result {
			return &identity.Result{Err: errRefused, RetryAfter: 90 * time.Second}
		}
		reg := prometheus.NewRegistry()
		cfg := config(a)
		cfg.Metrics = reg
		h := start(t, cfg)
		ask(t, h, withToken(w, "token of web-1"))
		for i := range 5 * 60 {
			time.Sleep(time.Second)
			ask(t, h, withToken(w, fmt.Sprint("token of web-1 ", i))) // new tokens do not help against it
		}
		calls := a.log()
		for i := 1; i < len(calls); i++ {
			if gap := calls[i].at.Sub(calls[i-1].at); gap < 90*time.Second || gap > 100*time.Second {
				t.Errorf("wait %d was %s, the authority said 90 s", i, gap)
			}
		}
		if len(calls) != 4 {
			t.Errorf("%d attempts in five minutes, want 4", len(calls))
		}
		if got := value(t, reg, "signet_holder_requests_total", "kind=first", "result=refused"); got != 4 {
			t.Errorf("%v refusals were counted, want 4", got)
		}
	})
}

func TestHopelessEvidence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		w := pod("web", "web-1")
		a.pods.Set(w)
		a.answer = func(identity.Request, spiffeid.ID) *identity.Result {
			return &identity.Result{Err: errRefused, RetryAfter: -1}
		}
		h := start(t, config(a))
		count := func() (n int) {
			n = a.callCount()
			a.set(func() { a.calls = nil })
			return n
		}
		c := withToken(w, "token of web-1")
		ask(t, h, c)
		time.Sleep(holder.HopelessRetry/2 - time.Second)
		if n := count(); n != 2 {
			t.Errorf("%d attempts with two pieces of evidence, want 2", n)
		}
		for range 20 * 60 {
			time.Sleep(time.Second)
			ask(t, h, c) // the same token again
		}
		if n := count(); n < 2*9 || n > 2*21 {
			t.Errorf("%d attempts in 20 minutes, want two every one to two minutes", n)
		}
		// New evidence is shown at once: a token, then another pod.
		settle := func() {
			time.Sleep(3 * holder.HopelessRetry)
			for n := -1; n != 0; {
				count()
				time.Sleep(20 * time.Second)
				n = a.callCount()
			}
		}
		settle()
		ask(t, h, withToken(w, "token of web-1 again"))
		time.Sleep(time.Second)
		synctest.Wait()
		if n := count(); n != 1 {
			t.Errorf("%d attempts with a new token, want 1", n)
		}
		settle()
		a.pods.Set(pod("web", "web-2"))
		time.Sleep(time.Second)
		synctest.Wait()
		if n := count(); n != 1 {
			t.Errorf("%d attempts with a new pod, want 1", n)
		}
		// Ever new tokens buy no more than one attempt a second, and not for long.
		settle()
		for i := range 1000 {
			time.Sleep(10 * time.Millisecond)
			ask(t, h, withToken(w, fmt.Sprint("token of web-1 number ", i)))
		}
		if n := count(); n < 9 || n > 11 {
			t.Errorf("%d attempts in ten seconds of new tokens", n)
		}
		for i := range 1000 {
			time.Sleep(100 * time.Millisecond)
			ask(t, h, withToken(w, fmt.Sprint("token of web-1 also ", i)))
		}
		if n := count(); n > 60 {
			t.Errorf("%d attempts in the 100 seconds after that", n)
		}
	})
}

func TestEvidenceThatLeavesIsReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		a.pods.Replace([]identity.Workload{pod("web", "web-1"), pod("web", "web-2")})
		cfg := config(a)
		cfg.Pods = &identity.Pods{}
		cfg.Pods.Replace([]identity.Workload{pod("web", "web-1"), pod("web", "web-2")})
		a.answer = func(r identity.Request, _ spiffeid.ID) *identity.Result {
			if n := len(a.calls); n == 1 { // mu is held
				cfg.Pods.Delete("web-2")
				return &identity.Result{Err: errRefused, RetryAfter: -1}
			}
			return nil
		}
		h := start(t, cfg)
		ask(t, h, caller(pod("web", "web-1")))
		time.Sleep(2 * holder.HopelessRetry)
		have(t, h, a, caller(pod("web", "web-1")))
		for i, c := range a.log() {
			if r := c.requests[0]; r.PodUID == "" {
				t.Errorf("attempt %d had no evidence", i)
			}
		}
	})
}

func TestHangingAuthority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		a.before = func(ctx context.Context, requests []identity.Request) error {
			for _, r := range requests {
				if strings.HasPrefix(r.PodUID, "bad") {
					<-ctx.Done()
					return ctx.Err()
				}
			}
			return nil
		}
		h := start(t, config(a))
		for i := range 100 {
			w := pod(fmt.Sprint("bad-", i), fmt.Sprint("bad-", i))
			a.pods.Set(w)
			ask(t, h, caller(w)) // and returns, although an attempt hangs
			synctest.Wait()
		}
		time.Sleep(5 * time.Minute)
		for i := range 20 {
			w := pod(fmt.Sprint("good-", i), fmt.Sprint("good-", i))
			a.pods.Set(w)
			ask(t, h, caller(w))
			synctest.Wait()
			have(t, h, a, caller(w)) // no time has passed
			time.Sleep(3 * time.Second)
		}
		for _, c := range a.log() {
			if d := c.deadline.Sub(c.at); d != holder.MaxAttempt {
				t.Fatalf("an attempt had %s, want %s", d, holder.MaxAttempt)
			}
		}
		if most := a.mostAtOnce(); most > maxInFlight {
			t.Errorf("%d batches at a time", most)
		}
	})
}

func TestRenewalSurvivesAnAuthorityThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		a.ttl = 20 * time.Second
		w := pod("web", "web-1")
		a.pods.Set(w)
		h := start(t, config(a))
		ask(t, h, caller(w))
		synctest.Wait()
		have(t, h, a, caller(w))
		a.set(func() {
			a.before = func(ctx context.Context, _ []identity.Request) error {
				if a.callCount() == 2 { // the first renewal
					<-ctx.Done()
					return ctx.Err()
				}
				return nil
			}
		})
		for range 60 {
			time.Sleep(time.Second)
			have(t, h, a, caller(w))
		}
	})
}

func TestBatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		h, err := holder.New(config(a))
		if err != nil {
			t.Fatal(err)
		}
		const n = 300
		long := " " + strings.Repeat("x", 15<<10)
		for i := range n {
			w := pod(fmt.Sprint("sa-", i), fmt.Sprint("pod-", i))
			a.pods.Set(w)
			c := caller(w)
			if i < 150 {
				c = withToken(w, "token of "+w.PodUID+long)
			}
			ask(t, h, c)
		}
		run(t, h)
		synctest.Wait()
		if got := len(h.Export()); got != n {
			t.Errorf("%d SVIDs, want %d", got, n)
		}
		// 2.2 MB of tokens, at most 1 MB at a time, and not an item each.
		if calls := a.callCount(); calls < 3 || calls > 5 {
			t.Errorf("%d calls, want 3 to 5", calls)
		}
		for i, c := range a.log() {
			size := 0
			for _, r := range c.requests {
				size += len(r.PublicKey) + len(r.Token) + len(r.PodUID)
			}
			if len(c.requests) > holder.MaxBatch || size > holder.MaxBatchBytes {
				t.Errorf("batch %d has %d items, %d bytes", i, len(c.requests), size)
			}
		}
	})
}

func TestNothingIsAskedBeforeTrustIsKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		w := pod("web", "web-1")
		a.pods.Set(w)
		cfg := config(a)
		var trust *identity.Trust
		cfg.Trust = func() *identity.Trust { a.mu.Lock(); defer a.mu.Unlock(); return trust }
		h := start(t, cfg)
		ask(t, h, caller(w))
		time.Sleep(10 * time.Minute)
		if n := a.callCount(); n != 0 {
			t.Errorf("%d calls without a trust bundle to verify the answers", n)
		}
		a.set(func() { trust = a.trust })
		h.Retry()
		time.Sleep(time.Second)
		synctest.Wait()
		have(t, h, a, caller(w))
	})
}
