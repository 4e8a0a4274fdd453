package caclient

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	failures prometheus.Counter
	notAfter prometheus.Gauge
}

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		failures: prometheus.NewCounter(prometheus.CounterOpts{Name: "signet_agent_authority_failures_total",
			Help: "Attempts to attest, renew or follow the authority that failed."}),
		notAfter: prometheus.NewGauge(prometheus.GaugeOpts{Name: "signet_agent_svid_not_after_seconds",
			Help: "When the agent's own SVID ends, Unix seconds."}),
	}
	if r != nil {
		r.MustRegister(m.failures, m.notAfter)
	}
	return m
}
