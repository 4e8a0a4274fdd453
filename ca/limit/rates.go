package limit

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Rates are limiters by name, of bounded number. Safe for concurrent use.
type Rates struct {
	limit rate.Limit
	burst int

	mu         sync.Mutex
	young, old map[string]*rate.Limiter // guarded by mu; two generations
}

// maxRates is how many names are remembered: of more, those are forgotten that were not
// heard of for longest.
const maxRates = 1 << 17

// NewRates makes limiters that allow each name limit a second, and burst at once; nil,
// which allows everything, if limit is 0.
func NewRates(limit, burst int) *Rates {
	if limit <= 0 {
		return nil
	}
	return &Rates{limit: rate.Limit(limit), burst: max(burst, limit)}
}

// Take takes n for a name; or else nothing, and says after which time n would be there.
// More than the burst is taken as the burst.
func (r *Rates) Take(name string, n int, now time.Time) (after time.Duration) {
	if r == nil {
		return 0
	}
	r.mu.Lock()
	l := r.young[name]
	if l == nil {
		if l = r.old[name]; l == nil {
			l = rate.NewLimiter(r.limit, r.burst)
		}
		if len(r.young) >= maxRates/2 || r.young == nil {
			r.old, r.young = r.young, make(map[string]*rate.Limiter)
		}
		r.young[name] = l
	}
	r.mu.Unlock()
	res := l.ReserveN(now, min(n, r.burst))
	if after = res.DelayFrom(now); after > 0 {
		res.CancelAt(now)
	}
	return after
}
