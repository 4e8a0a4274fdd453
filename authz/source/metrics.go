package source

import (
	"math"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-mesh/signet/authz"
)

type metrics struct {
	inPlace prometheus.Counter
	failed  prometheus.Counter
}

// newMetrics makes the metrics of what b tells and registers them, all or none.
func newMetrics(r prometheus.Registerer, b *board) (*metrics, error) {
	m := &metrics{
		inPlace: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "signet_source_writes_in_place_total",
			Help: "Changes of policy files that were not applied, because they were not renamed into place.",
		}),
		failed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "signet_source_errors_total",
			Help: "Times that the policies could not be read as a whole, each reason counted once.",
		}),
	}
	if r == nil {
		return m, nil
	}
	gauge := func(name, help string, value func(*status) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 {
			b.mu.Lock()
			defer b.mu.Unlock()
			return value(&b.status)
		})
	}
	all := []prometheus.Collector{
		m.inPlace, m.failed, resourceCounts{b},
		gauge("signet_source_generation", "Number of the snapshot that is in force.",
			func(s *status) float64 { return float64(s.generation) }),
		gauge("signet_source_age_seconds", "Time for which the snapshot in force was not known to be what the folder or the cluster says; 0 while all is well, +Inf without a snapshot.",
			func(s *status) float64 {
				if s.err == nil {
					return 0
				}
				if s.good.IsZero() {
					return math.Inf(1)
				}
				return time.Since(s.good).Seconds()
			}),
		gauge("signet_source_problems", "Problems of the policies that keep a resource from being enforced as written.",
			func(s *status) (n float64) {
				for _, p := range s.problems {
					if p.Severity == authz.SeverityError {
						n++
					}
				}
				return n
			}),
	}
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

var resourcesDesc = prometheus.NewDesc("signet_source_resources",
	"Policy resources by kind, and state: good, stale (last good version goes on) or refused (the workloads it selects are denied).",
	[]string{"kind", "state"}, nil)

var (
	kinds = []string{
		authz.KindAuthorizationPolicy, authz.KindPeerAuthentication, authz.KindRequestAuthentication,
		unknownKind,
	}
	states = []authz.State{authz.StateGood, authz.StateStale, authz.StateRefused}
)

// unknownKind is documents that could not be read, and kinds that there are not:
// a label must not take any value that a file may hold.
const unknownKind = "unknown"

func knownKind(kind string) string {
	if slices.Contains(kinds, kind) {
		return kind
	}
	return unknownKind
}

// kindState is a pair of labels; both are closed sets.
type kindState struct {
	kind  string
	state authz.State
}

// resourceCounts collects the numbers of resources, with zeros, so that a series
// does not end when the last resource of a state goes.
type resourceCounts struct{ b *board }

func (c resourceCounts) Describe(ch chan<- *prometheus.Desc) { ch <- resourcesDesc }

func (c resourceCounts) Collect(ch chan<- prometheus.Metric) {
	c.b.mu.Lock()
	counts := c.b.status.counts // replaced, never changed
	c.b.mu.Unlock()
	for _, kind := range kinds {
		for _, state := range states {
			ch <- prometheus.MustNewConstMetric(resourcesDesc, prometheus.GaugeValue,
				float64(counts[kindState{kind, state}]), kind, state.String())
		}
	}
}
