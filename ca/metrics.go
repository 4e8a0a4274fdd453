package ca

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	issued       *prometheus.CounterVec
	refused      *prometheus.CounterVec
	signFailures prometheus.Counter
	lintFailures prometheus.Counter
	keysForgot   prometheus.Counter
	logFailures  prometheus.Counter
	retiredLost  *prometheus.GaugeVec
	batch        prometheus.Histogram
	overrides    *prometheus.CounterVec
	waitsFor     prometheus.Gauge
	lacking      prometheus.Gauge
	heldUp       prometheus.Counter
}

// newMetrics registers with r, or nowhere if r is nil.
func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		issued: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "signet_ca_certificates_issued_total",
			Help: "Certificates that were signed, by kind."}, []string{"kind"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "signet_ca_refusals_total",
			Help: "Requests that were refused, by method and code."}, []string{"method", "code"}),
		signFailures: prometheus.NewCounter(prometheus.CounterOpts{Name: "signet_ca_sign_failures_total",
			Help: "Certificates that were recorded but could not be signed."}),
		lintFailures: prometheus.NewCounter(prometheus.CounterOpts{Name: "signet_ca_lint_failures_total",
			Help: "Certificates that did not have their profile, and were neither recorded nor signed."}),
		keysForgot: prometheus.NewCounter(prometheus.CounterOpts{Name: "signet_ca_keys_forgotten_total",
			Help: "Certified keys that were forgotten before their certificates expired, because there are too many."}),
		retiredLost: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "signet_ca_retired_log_lost_records",
			Help: "Records of a retired instance that agents have a signed head of and that the backup did not have."}, []string{"instance"}),
		logFailures: prometheus.NewCounter(prometheus.CounterOpts{Name: "signet_ca_log_failures_total",
			Help: "Batches that could not be recorded, so that nothing was signed."}),
		overrides: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "signet_ca_rotation_overrides_total",
			Help: "Steps of a rotation that did not wait for somebody, by why: force (an operator) or deadline."}, []string{"override"}),
		waitsFor: prometheus.NewGauge(prometheus.GaugeOpts{Name: "signet_ca_rotation_waits_for_nodes",
			Help: "Nodes whose agents have not acknowledged the root that is published and not used yet."}),
		lacking: prometheus.NewGauge(prometheus.GaugeOpts{Name: "signet_ca_active_root_lacking_nodes",
			Help: "Nodes whose agents have not acknowledged the active root: what is issued does not verify there."}),
		heldUp: prometheus.NewCounter(prometheus.CounterOpts{Name: "signet_ca_rotation_held_up_total",
			Help: "Steps of a rotation that were due here and left to another replica, because that held the lease for one."}),
		batch: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "signet_ca_issue_seconds",
			Help: "Time to answer a batch.", Buckets: prometheus.ExponentialBuckets(0.0005, 2, 14)}),
	}
	if r != nil {
		r.MustRegister(m.issued, m.refused, m.signFailures, m.lintFailures, m.keysForgot, m.retiredLost, m.logFailures, m.batch, m.overrides, m.waitsFor, m.lacking, m.heldUp)
	}
	return m
}

// registerGauges adds what is read from the authority at each scrape.
func (a *Authority) registerGauges(r prometheus.Registerer) {
	if r == nil {
		return
	}
	gauge := func(name, help string, f func() float64) {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f))
	}
	gauge("signet_ca_root_not_after_seconds", "When the active root ends, Unix seconds.", func() float64 { return float64(a.root.Load().cert.NotAfter.Unix()) })
	gauge("signet_ca_intermediate_not_after_seconds", "When the active intermediate ends, Unix seconds.", func() float64 { return float64(a.intermediate.Load().cert.NotAfter.Unix()) })
	gauge("signet_ca_series_not_after_seconds", "When the last intermediate ends that an offline root signed, Unix seconds; 0 without one.", func() float64 {
		if end := a.current().SeriesEnd; !end.IsZero() {
			return float64(end.Unix())
		}
		return 0
	})
	gauge("signet_ca_series_alarm", "1 when less than a third is left of the life of the series of intermediates, 2 when less than a tenth is.", func() float64 { return float64(a.seriesAlarm(time.Now())) })
	gauge("signet_ca_alarms", "What needs an operator while all still works.", func() float64 { a.mu.Lock(); defer a.mu.Unlock(); return float64(len(a.alarms)) })
	gauge("signet_ca_serving_not_after_seconds", "When the serving certificate ends, Unix seconds.", func() float64 {
		c := a.serving.Load()
		if c == nil {
			return 0
		}
		return float64(c.Leaf.NotAfter.Unix())
	})
	gauge("signet_ca_log_records", "Sequence number of the newest record of the issuance log.", func() float64 { return float64(a.log.Head().Sequence) })
	gauge("signet_ca_log_lost_record", "Record of a signed head that the issuance log does not hold, for which nothing is signed; 0 if there is none.", func() float64 {
		l := a.losses.now.Load()
		if l == nil {
			return 0
		}
		return float64(l.Sequence)
	})
	gauge("signet_ca_log_first_record", "Sequence number of the oldest record of the issuance log.", func() float64 {
		c, _ := a.log.Checkpoint()
		return float64(c.Sequence + 1)
	})
	gauge("signet_ca_trust_sequence", "Sequence number of the current state of trust.", func() float64 { return float64(a.trust.Value().Sequence()) })
	gauge("signet_ca_certified_keys", "Keys with a certificate that has not expired, which no other identity can get certified.", func() float64 { return float64(a.keyUses.len()) })
	gauge("signet_ca_revoked_certificates", "Certificates that were revoked and have not expired long ago.", func() float64 { return float64(len(a.revoked.Value())) })
	gauge("signet_ca_crl_next_update_seconds", "When the first CRL expires, Unix seconds; 0 if none is published.", func() float64 {
		if end := a.lists.earliest(); !end.IsZero() {
			return float64(end.Unix())
		}
		return 0
	})
	gauge("signet_ca_clock", "What is thought of the system's clock: 0 believed, 1 in doubt, 2 refused, and nothing is signed.", func() float64 {
		switch r := a.clock.read(); {
		case r.refused:
			return 2
		case r.doubted:
			return 1
		}
		return 0
	})
	gauge("signet_ca_bans", "Bans in force.", func() float64 { return float64(a.banned().set.Len()) })
	gauge("signet_ca_pods", "Pods in the authority's view.", func() float64 { return float64(a.cfg.Pods.Len()) })
}
