package extauthz

import (
	"cmp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-mesh/signet/authz"
)

// metrics counts checks. Kinds and reasons are closed sets, so the number of
// series is bounded.
type metrics struct {
	checks  *prometheus.CounterVec
	seconds prometheus.Histogram

	mu sync.Mutex
	// known are the counters of checks that were needed, a few: to look through them
	// takes less time than a hash of three texts. They are never changed, and others
	// put in their place under mu.
	known atomic.Pointer[[]counted]

	unproven prometheus.Counter
	labels   prometheus.Counter
	panics   prometheus.Counter
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	m := &metrics{
		checks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_extauthz_checks_total",
			Help: "Checks answered, by decision (allow, deny), kind of the resource that decided (none: no resource did) and reason.",
		}, []string{"decision", "kind", "reason"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "signet_extauthz_check_seconds",
			Help:    "Time to answer a check, without the transport.",
			Buckets: []float64{1e-6, 2.5e-6, 5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 1e-3, 1e-2, 1e-1},
		}),
		unproven: counter("signet_extauthz_unauthenticated_total", "Checks refused because the caller proved nothing."),
		labels:   counter("signet_extauthz_label_differences_total", "Checks whose destination labels are not those of the calling pod. They are ignored."),
		panics:   counter("signet_extauthz_panics_total", "Checks denied because of a defect of this program."),
	}
	if r == nil {
		return m, nil
	}
	all := []prometheus.Collector{m.checks, m.seconds, m.unproven, m.labels, m.panics}
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

// slow is what is worth an exemplar.
const slow = time.Millisecond

// answered counts an answer. One that denies, or took long, has an exemplar if the
// request can be found by something; of may be nil.
func (m *metrics) answered(d *authz.Decision, took time.Duration, of *attributes) {
	k := outcome{d.Verdict(), d.Kind, d.Reason}
	c := m.find(k)
	if c == nil {
		c = m.learn(k)
	}
	c.Inc()
	if of != nil && (!d.Allowed || took >= slow) {
		if by := of.exemplar(); by != nil {
			m.seconds.(prometheus.ExemplarObserver).ObserveWithExemplar(took.Seconds(), by)
			return
		}
	}
	m.seconds.Observe(took.Seconds())
}

// exemplar is what the request can be found by: its trace, else its identifier. The
// client chooses both, so whatever does not look like one is left out.
func (a *attributes) exemplar() prometheus.Labels {
	if t := Trace(a.header("traceparent")); t != "" {
		return prometheus.Labels{"trace_id": t}
	}
	const most = 64 // of the 128 characters that an exemplar may have
	if id := a.header("x-request-id"); len(id) > 0 && len(id) <= most && each(id, "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_.") {
		return prometheus.Labels{"request_id": string(id)}
	}
	return nil
}

// Trace is the trace that a header traceparent names (W3C Trace Context section 3.2:
// VERSION-TRACE-PARENT-FLAGS), or empty where it does not look like one.
func Trace(parent []byte) string {
	if t := parent; len(t) >= 55 && t[2] == '-' && t[35] == '-' && each(t[3:35], "0123456789abcdef") && !each(t[3:35], "0") {
		return string(t[3:35])
	}
	return ""
}

// each reports whether each byte is one of those.
func each(b []byte, of string) bool {
	for _, c := range b {
		if strings.IndexByte(of, c) < 0 {
			return false
		}
	}
	return true
}

// outcome is the labels of a counter.
type outcome struct {
	verdict, kind string
	reason        authz.Reason
}

// learn finds the counter of an outcome that had none.
func (m *metrics) learn(k outcome) prometheus.Counter {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c := m.find(k); c != nil {
		return c
	}
	var known []counted
	if l := m.known.Load(); l != nil {
		known = *l
	}
	c := m.checks.WithLabelValues(k.verdict, cmp.Or(k.kind, "none"), string(k.reason))
	known = append(slices.Clip(known), counted{k, c})
	m.known.Store(&known)
	return c
}

// find is the counter of an outcome; nil if there was none.
func (m *metrics) find(k outcome) prometheus.Counter {
	known := m.known.Load()
	if known == nil {
		return nil
	}
	for i := range *known {
		if c := &(*known)[i]; c.outcome == k {
			return c.counter
		}
	}
	return nil
}

// counted is the counter of an outcome.
type counted struct {
	outcome outcome
	counter prometheus.Counter
}
