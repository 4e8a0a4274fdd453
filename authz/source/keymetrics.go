package source

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// keyMetrics counts fetches.
type keyMetrics struct {
	good, failed prometheus.Counter
}

var (
	keySetsDesc = prometheus.NewDesc("signet_source_key_sets",
		"Key sets of tokens that RequestAuthentications of this node's pods name, by state: good, stale (the last fetch failed, the keys from before go on), missing (there are no keys: tokens are refused) or dropped (rules beyond a limit).",
		[]string{"state"}, nil)
	keyAgeDesc = prometheus.NewDesc("signet_source_key_sets_age_seconds",
		"Time since the oldest of the key sets in use was last fetched.", nil, nil)
)

// register makes the metrics and registers them, all or none.
func (k *KeySets) register(r prometheus.Registerer) error {
	fetches := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "signet_source_key_fetches_total",
		Help: "Fetches of key sets of tokens, by result.",
	}, []string{"result"})
	k.metrics = keyMetrics{fetches.WithLabelValues("good"), fetches.WithLabelValues("failed")}
	if r == nil {
		return nil
	}
	if err := r.Register(fetches); err != nil {
		return err
	}
	if err := r.Register(keyStates{k}); err != nil {
		r.Unregister(fetches)
		return err
	}
	return nil
}

type keyStates struct{ k *KeySets }

func (c keyStates) Describe(ch chan<- *prometheus.Desc) { ch <- keySetsDesc; ch <- keyAgeDesc }

func (c keyStates) Collect(ch chan<- prometheus.Metric) {
	states := map[string]int{"good": 0, "stale": 0, "missing": 0, "dropped": 0}
	c.k.mu.Lock()
	for _, n := range c.k.dropped {
		states["dropped"] += n
	}
	c.k.mu.Unlock()
	var age time.Duration
	for _, s := range *c.k.sets.Load() {
		s.mu.Lock()
		good, wanted, failing := s.good, s.wanted, s.failing
		s.mu.Unlock()
		switch {
		case !wanted:
			continue
		case s.keys.Load() == nil:
			states["missing"]++
			continue
		case failing:
			states["stale"]++
		default:
			states["good"]++
		}
		age = max(age, time.Since(good))
	}
	for state, n := range states {
		ch <- prometheus.MustNewConstMetric(keySetsDesc, prometheus.GaugeValue, float64(n), state)
	}
	ch <- prometheus.MustNewConstMetric(keyAgeDesc, prometheus.GaugeValue, age.Seconds())
}
