package storage

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// syncBuckets reach from a fast disk with a write cache to one that hangs.
var syncBuckets = prometheus.ExponentialBuckets(50e-6, 2, 18)

// collectors registers all or none, for as long as a store or a log is open, so
// that it can be opened again in the same process.
type collectors struct {
	registry prometheus.Registerer
	all      []prometheus.Collector
}

func (c *collectors) register(r prometheus.Registerer, all ...prometheus.Collector) error {
	if r == nil {
		return nil
	}
	c.registry = r
	for _, m := range all {
		if err := r.Register(m); err != nil {
			c.unregister()
			return errors.Join(errors.New("registering metrics"), err)
		}
		c.all = append(c.all, m)
	}
	return nil
}

func (c *collectors) unregister() {
	for _, m := range c.all {
		c.registry.Unregister(m)
	}
	c.all = nil
}

type logMetrics struct {
	collectors
	sync    prometheus.Histogram
	records prometheus.Counter
	batches prometheus.Counter
	failed  prometheus.Gauge
}

func newLogMetrics(r prometheus.Registerer) (*logMetrics, error) {
	m := &logMetrics{
		sync: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "signet_storage_log_sync_seconds", Buckets: syncBuckets,
			Help: "Time that fsync of the issuance log took."}),
		records: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "signet_storage_log_records_total",
			Help: "Records that were made durable in the issuance log."}),
		batches: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "signet_storage_log_batches_total",
			Help: "Writes that made them durable; records per batch is what group commit saves."}),
		failed: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "signet_storage_log_failed",
			Help: "1 if a write to the issuance log failed: nothing is recorded, and so nothing issued, until it is opened again."}),
	}
	return m, m.register(r, m.sync, m.records, m.batches, m.failed)
}

func (m *logMetrics) synced(d time.Duration) { m.sync.Observe(d.Seconds()) }

func (m *logMetrics) batch(records int) {
	m.batches.Inc()
	m.records.Add(float64(records))
}

func (m *logMetrics) failing(failing bool) {
	if failing {
		m.failed.Set(1)
	} else {
		m.failed.Set(0)
	}
}

type boltMetrics struct {
	collectors
	commit    prometheus.Histogram
	conflicts prometheus.Counter
	failed    prometheus.Gauge
}

func newBoltMetrics(r prometheus.Registerer) (*boltMetrics, error) {
	m := &boltMetrics{
		commit: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "signet_storage_commit_seconds", Buckets: syncBuckets,
			Help: "Time that a commit to the state took, from its turn to durable."}),
		conflicts: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "signet_storage_conflicts_total",
			Help: "Commits that were refused because a condition did not hold."}),
		failed: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "signet_storage_failed",
			Help: "1 if a commit to the state failed with unknown outcome: the store refuses everything until restart."}),
	}
	return m, m.register(r, m.commit, m.conflicts, m.failed)
}
