package kube

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	failures  *prometheus.CounterVec
	keys      *prometheus.CounterVec
	reviews   *prometheus.CounterVec
	repairs   prometheus.Counter
	rootCerts prometheus.Counter
	policies  *prometheus.CounterVec
	leading   prometheus.Gauge
}

func newMetrics(r prometheus.Registerer, v *view) (*metrics, error) {
	vec := func(name, help, label string, values ...string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{label})
		for _, v := range values {
			c.WithLabelValues(v)
		}
		return c
	}
	m := &metrics{
		failures: vec("signet_kube_watch_failures_total", "Failures to list or watch, by resource.", "resource", podsResource, nodesResource, accountsResource),
		keys:     vec("signet_kube_keys_total", "Readings of the issuer's keys, by result: read, failed.", "result", "read", "failed"),
		reviews:  vec("signet_kube_reviews_total", "TokenReviews by result: good, remembered (not asked again), refused, unavailable.", "result", "good", "remembered", "refused", "unavailable"),
		policies: vec("signet_kube_policy_reports_total", "Conditions written to policies, by status: False (not enforced as written), True (enforced again).", "status", "False", "True"),
		repairs: prometheus.NewCounter(prometheus.CounterOpts{Name: "signet_kube_trust_writes_total",
			Help: "Writes of the ConfigMap with the trust bundle: first publication, rotation, and repair of foreign edits."}),
		rootCerts: prometheus.NewCounter(prometheus.CounterOpts{Name: "signet_kube_istio_root_writes_total",
			Help: "Writes of the ConfigMaps istio-ca-root-cert, repairs of foreign edits included."}),
		leading: prometheus.NewGauge(prometheus.GaugeOpts{Name: "signet_kube_leader", Help: "1 while this replica holds the Lease."}),
	}
	pods := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "signet_kube_pods", Help: "Pods that count as alive."},
		func() float64 { return float64(v.pods.Len()) })
	away := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "signet_kube_away", Help: "1 while the API server cannot be watched, or has put off requests for a minute; what it said last is used."},
		func() float64 {
			if v.away() {
				return 1
			}
			return 0
		})
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.failures, m.keys, m.reviews, m.policies, m.repairs, m.rootCerts, m.leading, pods, away} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("registering metrics: %w", err)
		}
	}
	return m, nil
}
