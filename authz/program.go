package authz

import (
	"iter"

	security "istio.io/api/security/v1beta1"
)

// Action is what a rule does to a request that matches it.
type Action uint8

const (
	// ActionAllow lets the request through, if no DENY rule matches.
	ActionAllow Action = iota
	// ActionDeny stops it.
	ActionDeny
	// ActionAudit marks it for the access log and changes nothing.
	ActionAudit
	// ActionCustom has an extension provider asked about it.
	ActionCustom
)

// String is the action as Istio writes it: ALLOW, DENY, AUDIT or CUSTOM.
func (a Action) String() string {
	switch a {
	case ActionDeny:
		return "DENY"
	case ActionAudit:
		return "AUDIT"
	case ActionCustom:
		return "CUSTOM"
	}
	return "ALLOW"
}

// Rule is one rule of a [Program], for exporters and explanations.
type Rule struct {
	// Kind, Namespace and Name are those of the resource.
	Kind, Namespace, Name string
	// Index is the rule's index in the policy, from 0, or -1 for a resource as a
	// whole: an ALLOW policy without rules, which matches nothing and so denies,
	// or, with a Reason, a resource that cannot be enforced, which denies
	// everything.
	Index  int
	Action Action
	// Provider is the extension provider that an ActionCustom rule has asked.
	Provider string
	// DryRun says that the rule only reports what it would have done.
	DryRun bool
	// Origin and Line are where the rule, or the resource, stands.
	Origin string
	Line   int
	// Spec is the rule with the aliases of its trust domains written out; nil if
	// Index is -1. It must not be changed.
	Spec *security.Rule
	// Reason is why the resource cannot be enforced, or empty.
	Reason Reason

	policy string // NAMESPACE/NAME
	detail string // of Reason, for texts
}

// decision names the rule. A nil rule stands for no resource.
func (r *Rule) decision(allowed bool, reason Reason) Decision {
	if r == nil {
		return Decision{Allowed: allowed, Rule: -1, Reason: reason}
	}
	return Decision{Allowed: allowed, Kind: r.Kind, Policy: r.policy, Rule: r.Index, Reason: reason, why: r}
}

// Program decides for one class of workloads. It is immutable and safe for
// concurrent use. A nil or
// zero Program denies everything with [ReasonNoPolicies].
type Program struct {
	// refused are the resources that cannot be enforced; while there is one,
	// everything is denied in its name.
	refused []*Rule
	peer    peerModes
	deny    *ruleset
	allow   *ruleset
	// allowing says that an ALLOW policy selects the workload, if only one
	// without rules; empty are those.
	allowing bool
	empty    []*Rule
}

// Decide answers the request. A resource that cannot be enforced denies first,
// whatever the request; then PeerAuthentication, DENY and ALLOW, in this order.
// It does not allocate, keeps nothing of r and is safe for concurrent use.
func (p *Program) Decide(r *Request) Decision {
	if p == nil || p.deny == nil { // nobody compiled it
		return Decision{Rule: -1, Reason: ReasonNoPolicies}
	}
	if len(p.refused) > 0 {
		return p.refused[0].decision(false, p.refused[0].Reason)
	}
	if d, ok := p.peer.check(r); !ok {
		return d
	}
	v := newView(r)
	if rule, certain := p.deny.find(&v); certain {
		return rule.decision(false, ReasonDenyRule)
	} else if rule != nil {
		return rule.decision(false, ReasonDenyUnknown)
	}
	if !p.allowing {
		return Decision{Allowed: true, Rule: -1, Reason: ReasonNoAllowPolicy}
	}
	if rule, certain := p.allow.find(&v); certain {
		return rule.decision(true, ReasonAllowRule)
	} else if rule != nil {
		return rule.decision(false, ReasonAllowUnknown)
	}
	return Decision{Kind: KindAuthorizationPolicy, Rule: -1, Reason: ReasonNoAllowRule}
}

// After decides what follows once the provider that d asks for has allowed the
// request: another provider must be asked, or the request is allowed or denied.
// d must be a decision of p about r.
func (p *Program) After(d Decision, r *Request) Decision {
	if !d.Ask {
		return d
	}
	return p.Decide(r)
}

// PeerMode is PeerAuthentication's mode on a port. Where a resource cannot be
// enforced everything is denied beside it, so there the mode says nothing.
func (p *Program) PeerMode(port uint16) Mode {
	if p == nil || p.deny == nil {
		return ModeStrict
	}
	return p.peer.at(port).mode
}

// Rules iterates over what the program enforces of AuthorizationPolicies, and
// over the resources of any kind that cannot be enforced, in the order in which
// they decide: those first, then DENY, then ALLOW, each by the name that Envoy
// sorts by.
func (p *Program) Rules() iter.Seq[Rule] {
	return func(yield func(Rule) bool) {
		if p == nil || p.deny == nil {
			return
		}
		for _, r := range p.refused {
			if !yield(*r) {
				return
			}
		}
		for _, r := range p.deny.rules {
			if !yield(*r.Rule) {
				return
			}
		}
		for _, r := range p.empty {
			if !yield(*r) {
				return
			}
		}
		for _, r := range p.allow.rules {
			if !yield(*r.Rule) {
				return
			}
		}
	}
}
