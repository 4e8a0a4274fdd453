package provider

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-mesh/signet/authz/extauthz"
)

// metrics counts what is asked. Providers are those of the configuration, so the
// number of series is bounded.
type metrics struct {
	requests *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	unknown  prometheus.Counter
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_provider_requests_total",
			Help: "Requests to extension providers, by provider and outcome (allow, deny, timeout, busy, error). All but allow deny.",
		}, []string{"provider", "outcome"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "signet_provider_seconds", Help: "Time that extension providers take to answer, or not to.",
			Buckets: []float64{5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 1, 5},
		}, []string{"provider"}),
		unknown: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "signet_provider_unknown_total",
			Help: "Requests denied because a CUSTOM policy names an extension provider that is not configured.",
		}),
	}
	if r == nil {
		return m, nil
	}
	all := []prometheus.Collector{m.requests, m.seconds, m.unknown}
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

func (m *metrics) asked(name string, a extauthz.ProviderAnswer, err error, took time.Duration) {
	outcome := "error"
	switch {
	case err == nil && a.Allowed:
		outcome = "allow"
	case err == nil:
		outcome = "deny"
	case errors.Is(err, errTimeout):
		outcome = "timeout"
	case errors.Is(err, errBusy):
		outcome = "busy"
	}
	m.requests.WithLabelValues(name, outcome).Inc()
	m.seconds.WithLabelValues(name).Observe(took.Seconds())
}
