package etcd

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics have the names that other engines use for the same things.
type metrics struct {
	registry  prometheus.Registerer
	all       []prometheus.Collector
	commit    prometheus.Histogram
	conflicts prometheus.Counter
	unknown   prometheus.Counter
}

func newMetrics(r prometheus.Registerer, away func() bool) (*metrics, error) {
	m := &metrics{
		commit: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "signet_storage_commit_seconds", Buckets: prometheus.ExponentialBuckets(50e-6, 2, 18),
			Help: "Time that a commit to the state took, from its turn to durable."}),
		conflicts: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "signet_storage_conflicts_total",
			Help: "Commits that were refused because a condition did not hold."}),
		unknown: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "signet_storage_unknown_total",
			Help: "Commits to etcd of which nobody learned whether they happened."}),
	}
	failed := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "signet_storage_failed",
		Help: "1 while etcd does not answer or is full: nothing is recorded, and so nothing issued."},
		func() float64 {
			if away() {
				return 1
			}
			return 0
		})
	if r == nil {
		return m, nil
	}
	m.registry = r
	for _, c := range []prometheus.Collector{m.commit, m.conflicts, m.unknown, failed} {
		if err := r.Register(c); err != nil {
			m.unregister()
			return nil, errors.Join(errors.New("registering metrics"), err)
		}
		m.all = append(m.all, c)
	}
	return m, nil
}

func (m *metrics) unregister() {
	for _, c := range m.all {
		m.registry.Unregister(c)
	}
	m.all = nil
}
