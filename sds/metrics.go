package sds

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	streams *prometheus.GaugeVec
	pushes  *prometheus.CounterVec
	nacks   *prometheus.CounterVec
	omitted *prometheus.CounterVec
	errors  *prometheus.CounterVec
}

// newMetrics registers with r, or nowhere if r is nil. The label type is the last
// part of the type URL, such as Secret.
func newMetrics(r prometheus.Registerer) (*metrics, error) {
	label := []string{"type"}
	m := &metrics{
		streams: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "signet_sds_open_streams",
			Help: "Streams that are open, by type of resource."}, label),
		pushes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "signet_sds_pushes_total",
			Help: "Responses sent on streams, by type of resource."}, label),
		nacks: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "signet_sds_nacks_total",
			Help: "Responses that a client refused, by type of resource."}, label),
		omitted: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "signet_sds_omitted_names_total",
			Help: "Names that were asked for and are not known, by type of resource."}, label),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "signet_sds_source_errors_total",
			Help: "Times that the source of a stream failed, by type of resource."}, label),
	}
	return m, register(r, m.streams, m.pushes, m.nacks, m.omitted, m.errors)
}

func register(r prometheus.Registerer, cs ...prometheus.Collector) error {
	if r == nil {
		return nil
	}
	for _, c := range cs {
		if err := r.Register(c); err != nil {
			return err
		}
	}
	return nil
}
