package holder

import (
	"math"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics is what the holder counts. The gauges are computed when they are read.
type metrics struct {
	requests *prometheus.CounterVec
	first    prometheus.Histogram
}

// newMetrics makes the metrics of h and registers them, all or none.
func newMetrics(r prometheus.Registerer, h *Holder) (*metrics, error) {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_holder_requests_total",
			Help: "SVIDs asked for, by kind (first, renewal) and result (issued, refused by the authority, invalid answer, unavailable authority).",
		}, []string{"kind", "result"}),
		first: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "signet_holder_first_svid_seconds",
			Help:    "Time from the first call for an identity until its SVID was there.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300},
		}),
	}
	for _, kind := range []string{"first", "renewal"} {
		for _, result := range []string{resultIssued, resultRefused, resultInvalid, resultUnavailable} {
			m.requests.WithLabelValues(kind, result) // a series exists before its first event
		}
	}
	if r == nil {
		return m, nil
	}
	gauge := func(name, help string, f func(now time.Time) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 {
			h.mu.Lock()
			defer h.mu.Unlock()
			return f(h.now())
		})
	}
	var done []prometheus.Collector
	for _, c := range []prometheus.Collector{
		m.requests, m.first,
		gauge("signet_holder_svids", "Valid SVIDs that are held.", func(now time.Time) (n float64) {
			for _, e := range h.entries {
				if e.svid != nil && now.Before(e.expires) {
					n++
				}
			}
			return n
		}),
		gauge("signet_holder_waiting", "Identities that are wanted and have no valid SVID.", func(now time.Time) (n float64) {
			for _, e := range h.entries {
				if e.svid == nil || !now.Before(e.expires) {
					n++
				}
			}
			return n
		}),
		gauge("signet_holder_overdue", "Identities whose renewal failed and was not made up for.", func(time.Time) (n float64) {
			for _, e := range h.entries {
				if e.overdue() {
					n++
				}
			}
			return n
		}),
		gauge("signet_holder_next_expiry_seconds", "Time until the first of the held SVIDs expires; +Inf while none is held.", func(now time.Time) float64 {
			next := math.Inf(1)
			for _, e := range h.entries {
				if e.svid != nil {
					next = min(next, e.expires.Sub(now).Seconds())
				}
			}
			return next
		}),
	} {
		if err := r.Register(c); err != nil {
			for _, d := range done {
				r.Unregister(d)
			}
			return nil, err
		}
		done = append(done, c)
	}
	return m, nil
}

// count counts the outcome of one request.
func (m *metrics) count(it *item) {
	kind := "first"
	if it.renewal {
		kind = "renewal"
	}
	m.requests.WithLabelValues(kind, it.result).Inc()
}
