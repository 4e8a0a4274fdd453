package extauthz

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-mesh/signet/authz"
)

// metrics counts checks. Kinds and reasons are closed sets, so the number of
// series is bounded.
type metrics struct {
	checks  *prometheus.CounterVec
	seconds prometheus.Histogram

	unproven prometheus.Counter
	labels   prometheus.Counter
	panics   prometheus.Counter
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	m := &metrics{
		checks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_extauthz_checks_total",
			Help: "Checks answered, by decision (allow, deny), kind of the resource that decided (none: no resource did) and reason.",
		}, []string{"decision", "kind", "reason"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "signet_extauthz_check_seconds",
			Help:    "Time to answer a check, without the transport.",
			Buckets: []float64{1e-6, 2.5e-6, 5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 1e-3, 1e-2, 1e-1},
		}),
		unproven: counter("signet_extauthz_unauthenticated_total", "Checks refused because the caller proved nothing."),
		labels:   counter("signet_extauthz_label_differences_total", "Checks whose destination labels are not those of the calling pod. They are ignored."),
		panics:   counter("signet_extauthz_panics_total", "Checks denied because of a defect of this program."),
	}
	if r == nil {
		return m, nil
	}
	all := []prometheus.Collector{m.checks, m.seconds, m.unproven, m.labels, m.panics}
	for i, c := range all {
		if err := r.Register(c); err != nil {
			for _, d := range all[:i] {
				r.Unregister(d)
			}
			return nil, err
		}
	}
	return m, nil
}

func (m *metrics) answered(d authz.Decision, took time.Duration) {
	kind := d.Kind
	if kind == "" {
		kind = "none"
	}
	m.checks.WithLabelValues(d.Verdict(), kind, string(d.Reason)).Inc()
	m.seconds.Observe(took.Seconds())
}
