package attest

import (
	"errors"
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// tokenMetrics counts attestations. Every series exists from the start, so that
// counting allocates nothing and a rate can be taken over the first failure.
type tokenMetrics struct {
	verified   prometheus.Counter
	remembered prometheus.Counter
	failed     map[check]prometheus.Counter
}

func newTokenMetrics(r prometheus.Registerer, audience string, c *cache) (*tokenMetrics, error) {
	labels := prometheus.Labels{"audience": audience}
	total := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name:        "signet_attest_tokens_total",
		Help:        "Tokens by result: verified, remembered (accepted without verifying the signature again), or the check that they failed.",
		ConstLabels: labels,
	}, []string{"result"})
	size := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name:        "signet_attest_remembered",
		Help:        "Accepted tokens that are remembered.",
		ConstLabels: labels,
	}, func() float64 { return float64(c.len()) })
	if err := register(r, total, size); err != nil {
		return nil, err
	}
	m := &tokenMetrics{
		verified:   total.WithLabelValues("verified"),
		remembered: total.WithLabelValues("remembered"),
		failed:     make(map[check]prometheus.Counter, len(checks)),
	}
	for _, c := range checks {
		m.failed[c] = total.WithLabelValues(string(c))
	}
	return m, nil
}

func (m *tokenMetrics) count(remembered bool, err error) {
	switch {
	case err == nil && remembered:
		m.remembered.Inc()
	case err == nil:
		m.verified.Inc()
	default:
		m.failed[checkOf(err)].Inc()
	}
}

// gateMetrics counts the streams that a Gate watches over.
type gateMetrics struct {
	open    prometheus.Gauge
	expired prometheus.Counter
	gone    prometheus.Counter
}

func newGateMetrics(r prometheus.Registerer) (*gateMetrics, error) {
	open := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "signet_attest_streams",
		Help: "Streams of proven callers that are open.",
	})
	ended := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "signet_attest_streams_ended_total",
		Help: "Streams that were ended with their proof: proof_expires or pod_gone.",
	}, []string{"reason"})
	if err := register(r, open, ended); err != nil {
		return nil, err
	}
	return &gateMetrics{open: open, expired: ended.WithLabelValues("proof_expires"), gone: ended.WithLabelValues("pod_gone")}, nil
}

func (m *gateMetrics) ended(cause error) {
	switch {
	case errors.Is(cause, ErrProofExpires):
		m.expired.Inc()
	case errors.Is(cause, ErrPodGone):
		m.gone.Inc()
	}
}

func register(r prometheus.Registerer, cs ...prometheus.Collector) error {
	if r == nil {
		return nil
	}
	for _, c := range cs {
		if err := r.Register(c); err != nil {
			return fmt.Errorf("registering metrics: %w", err)
		}
	}
	return nil
}
