package istio

import (
	"time"

	"github.com/signet-mesh/signet/ca"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are istiod's, under its names, so that dashboards go on.
type metrics struct {
	csr, authentication, parsing, success, busy prometheus.Counter
	signing                                     *prometheus.CounterVec
}

func newMetrics(r prometheus.Registerer) *metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	m := &metrics{
		csr:            counter("citadel_server_csr_count", "Requests for a certificate."),
		authentication: counter("citadel_server_authentication_failure_count", "Requests whose caller, or whose right to ask in another's name, was not proved."),
		parsing:        counter("citadel_server_csr_parsing_err_count", "Requests with a CSR that cannot be used."),
		success:        counter("citadel_server_success_cert_issuance_count", "Certificates that were issued."),
		busy:           counter("signet_ca_istio_busy_total", "Requests that were turned away because too many were being worked on."),
		signing: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "citadel_server_csr_sign_err_count",
			Help: "Requests that were not signed, by kind of error."}, []string{"error"}),
	}
	if r != nil {
		r.MustRegister(m.csr, m.authentication, m.parsing, m.success, m.busy, m.signing)
	}
	return m
}

// registerGauges adds what is read at each scrape.
func (*metrics) registerGauges(r prometheus.Registerer, a *ca.Authority, d *Door) {
	if r == nil {
		return
	}
	gauge := func(name, help string, f func() float64) {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f))
	}
	root := func() time.Time {
		t, _ := a.Trust()
		return t.Roots()[0].NotAfter
	}
	gauge("citadel_server_root_cert_expiry_timestamp", "When the root ends, Unix seconds.", func() float64 { return float64(root().Unix()) })
	gauge("citadel_server_root_cert_expiry_seconds", "Seconds until the root ends.", func() float64 { return time.Until(root()).Seconds() })
	gauge("signet_ca_istio_serving_not_after_seconds", "When the serving certificate of Istio's door ends, Unix seconds.",
		func() float64 { return float64(d.serving.Load().Leaf.NotAfter.Unix()) })
	gauge("signet_ca_istio_renewable", "Certificates that may be renewed by themselves.", func() float64 {
		if d.renewals == nil {
			return 0
		}
		return float64(d.renewals.len())
	})
}
