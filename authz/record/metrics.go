package record

import (
	"maps"
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-mesh/signet/authz"
)

// metrics counts decisions by policy, and what becomes of records.
type metrics struct {
	policies  *prometheus.CounterVec
	dryRuns   *prometheus.CounterVec
	written   *prometheus.CounterVec
	lost      *prometheus.CounterVec
	unsampled prometheus.Counter

	most int
	mu   sync.Mutex
	// byPolicy are the counters of the policies that have one, in all most of them;
	// replaced under mu, never changed.
	byPolicy atomic.Pointer[map[string]*counters]
	others   *counters
	none     *counters
}

// counters are those of one policy.
type counters struct{ allow, deny prometheus.Counter }

func newMetrics(r prometheus.Registerer, maxPolicies int) (*metrics, error) {
	vec := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	m := &metrics{
		most: maxPolicies,
		policies: vec("signet_policy_decisions_total",
			"Decisions, by the policy that decided (NAMESPACE/NAME; none: no policy did; other: there are too many to count each) and decision (allow, deny).", "policy", "decision"),
		dryRuns: vec("signet_dry_run_decisions_total",
			"What dry-run policies would have decided, by action (DENY, ALLOW) and decision (allow, deny), beside the decision that was (enforced: allow, deny).", "action", "decision", "enforced"),
		written: vec("signet_records_written_total", "Decision records written, by output.", "output"),
		lost: vec("signet_records_lost_total",
			"Decision records lost, by output (all: before they came to any) and why (queue: too many were waiting; write: the output failed).", "output", "reason"),
		unsampled: prometheus.NewCounter(prometheus.CounterOpts{Name: "signet_records_unsampled_total", Help: "Allowed requests that were not recorded, by their share or their bound."}),
	}
	m.byPolicy.Store(&map[string]*counters{})
	m.others, m.none = m.counters("other"), m.counters("none")
	m.lost.WithLabelValues("all", "queue")
	if r == nil {
		return m, nil
	}
	all := []prometheus.Collector{m.policies, m.dryRuns, m.written, m.lost, m.unsampled}
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

func (m *metrics) counters(policy string) *counters {
	return &counters{m.policies.WithLabelValues(policy, "allow"), m.policies.WithLabelValues(policy, "deny")}
}

func (m *metrics) decided(d authz.Decision) {
	c := m.of(d.Policy)
	if d.Allowed {
		c.allow.Inc()
	} else {
		c.deny.Inc()
	}
	for _, run := range d.DryRuns() {
		m.dryRuns.WithLabelValues(run.Action.String(), verdict(run.Allowed), verdict(d.Allowed)).Inc()
	}
}

func verdict(allowed bool) string {
	if allowed {
		return "allow"
	}
	return "deny"
}

// of are the counters of a policy.
func (m *metrics) of(policy string) *counters {
	if policy == "" {
		return m.none
	}
	known := *m.byPolicy.Load()
	if c := known[policy]; c != nil {
		return c
	}
	if len(known) >= m.most {
		return m.others
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	known = *m.byPolicy.Load()
	if c := known[policy]; c != nil {
		return c
	}
	if len(known) >= m.most {
		return m.others
	}
	next := maps.Clone(known)
	next[policy] = m.counters(policy)
	m.byPolicy.Store(&next)
	return next[policy]
}
