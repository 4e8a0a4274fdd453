package holder_test

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/signet-mesh/signet/identity/holder"
)

func TestRenewAt(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	in := func(d time.Duration) time.Time { return now.Add(d) }
	for _, c := range []struct {
		name     string
		notAfter time.Time
		chosen   time.Time
		r        float64
		want     time.Time
	}{
		{"obeys a choice in the middle", in(time.Hour), in(31 * time.Minute), 0, in(31 * time.Minute)},
		{"obeys an early choice", in(time.Hour), in(time.Minute), 0, in(time.Minute)},
		{"leaves an eighth for retries", in(time.Hour), in(time.Hour - time.Second), 0, in(52*time.Minute + 30*time.Second)},
		{"makes no loop of a choice that is now", in(time.Hour), now, 0, in(10 * time.Second)},
		{"makes no loop of a choice that is past", in(time.Hour), in(-time.Hour), 0, in(10 * time.Second)},
		{"waits an eighth at least of a short life", in(8 * time.Second), now, 0, in(time.Second)},
		{"takes half the life without a choice", in(time.Hour), time.Time{}, 0.5, in(30 * time.Minute)},
		{"takes half the life for a choice at the end", in(time.Hour), in(time.Hour), 0.5, in(30 * time.Minute)},
		{"takes half the life for a choice after the end", in(time.Hour), in(24 * time.Hour), 0.5, in(30 * time.Minute)},
		{"jitters half the life down by a tenth", in(time.Hour), time.Time{}, 0, in(24 * time.Minute)},
		{"jitters half the life up by a tenth", in(time.Hour), time.Time{}, 1, in(36 * time.Minute)},
		{"renews an expired SVID now", in(-time.Second), in(time.Minute), 0, now},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := holder.RenewAt(now, c.notAfter, c.chosen, c.r); !got.Equal(c.want) {
				t.Errorf("renewAt = now+%s, want now+%s", got.Sub(now), c.want.Sub(now))
			}
		})
	}
}

// Whatever an authority chooses, renewal is after now and before the end.
func FuzzRenewAt(f *testing.F) {
	f.Add(int64(time.Hour), int64(30*time.Minute), 0.5)
	f.Add(int64(1), int64(-1), 0.0)
	f.Add(int64(time.Second), int64(1<<62), 0.999)
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, left, chosen int64, r float64) {
		if left <= 0 || left > int64(10*365*24*time.Hour) || !(r >= 0 && r < 1) {
			return // outside the domain of the function
		}
		notAfter := now.Add(time.Duration(left))
		got := holder.RenewAt(now, notAfter, now.Add(time.Duration(chosen)), r)
		if got.Before(now) || !got.Before(notAfter) && left > 1 {
			t.Errorf("renewAt = now+%s of %s", got.Sub(now), time.Duration(left))
		}
		if left > int64(time.Minute) && got.Sub(now) < 7*time.Second {
			t.Errorf("renewAt = now+%s of %s makes a loop", got.Sub(now), time.Duration(left))
		}
	})
}

func TestBackoff(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name         string
		failures     int
		left, advice time.Duration
		least, most  time.Duration // for r = 0 and r → 1
	}{
		{"starts with a second", 1, 0, 0, 500 * time.Millisecond, time.Second},
		{"doubles", 2, 0, 0, time.Second, 2 * time.Second},
		{"doubles again", 5, 0, 0, 8 * time.Second, 16 * time.Second},
		{"ends at 30 seconds", 6, 0, 0, 15 * time.Second, 30 * time.Second},
		{"stays there", 1 << 40, 0, 0, 15 * time.Second, 30 * time.Second},
		{"takes no failure for one", 0, 0, 0, 500 * time.Millisecond, time.Second},
		{"is not changed by much life", 9, time.Hour, 0, 15 * time.Second, 30 * time.Second},
		{"is an eighth of little life", 9, 80 * time.Second, 0, 5 * time.Second, 10 * time.Second},
		{"has a floor near the end", 9, time.Millisecond, 0, 125 * time.Millisecond, 250 * time.Millisecond},
		{"obeys advice", 1, 0, time.Minute, time.Minute, 66 * time.Second},
		{"obeys advice with much life", 1, time.Hour, time.Minute, time.Minute, 66 * time.Second},
		{"bounds advice", 1, 0, 24 * time.Hour, 5 * time.Minute, 5*time.Minute + 30*time.Second},
		{"bounds advice by half the life", 1, time.Minute, 5 * time.Minute, 30 * time.Second, 33 * time.Second},
		{"obeys advice that is shorter than its own wait", 6, 0, time.Second, time.Second, 1100 * time.Millisecond},
		{"makes no loop of short advice", 6, 0, time.Millisecond, 250 * time.Millisecond, 250 * time.Millisecond},
		{"waits long for hopeless evidence", 1, 0, -1, time.Minute, 2 * time.Minute},
		{"waits less for it with little life", 1, 80 * time.Second, -1, 5 * time.Second, 10 * time.Second},
		{"has a floor for it", 1, time.Second, -1, 2500 * time.Millisecond, 5 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := holder.Backoff(c.failures, c.left, c.advice, 0); got != c.least {
				t.Errorf("least wait %s, want %s", got, c.least)
			}
			if got := holder.Backoff(c.failures, c.left, c.advice, 1); got != c.most {
				t.Errorf("most wait %s, want %s", got, c.most)
			}
		})
	}
	for range 10_000 {
		failures, left, advice := rand.IntN(100), rand.N(2*time.Hour), rand.N(20*time.Minute)-10*time.Minute
		got := holder.Backoff(failures, left, advice, rand.Float64())
		if got < 125*time.Millisecond || got > 5*time.Minute+30*time.Second {
			t.Fatalf("backoff(%d, %s, %s) = %s", failures, left, advice, got)
		}
		if left > 20*time.Second && got >= left {
			t.Fatalf("backoff(%d, %s, %s) = %s misses the end", failures, left, advice, got)
		}
	}
}

func TestAttemptTimeout(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name       string
		left, want time.Duration
	}{
		{"is the longest with nothing to lose", 0, 15 * time.Second},
		{"is the longest with much life", time.Hour, 15 * time.Second},
		{"is a quarter of little life", 20 * time.Second, 5 * time.Second},
		{"is a second at least", time.Second, time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := holder.AttemptTimeout(c.left); got != c.want {
				t.Errorf("attemptTimeout(%s) = %s, want %s", c.left, got, c.want)
			}
		})
	}
}
