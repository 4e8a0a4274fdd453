package authz

import (
	"cmp"
	"iter"
	"slices"

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
	// order is the name that Envoy sorts policies by, so it says which of several
	// matching rules is reported.
	order string
	of    *policy
}

// spec is the rule's specification, or nil.
func (r *Rule) spec() *security.Rule {
	if r == nil || r.of == nil {
		return nil
	}
	return r.of.specs()[r.Index]
}

// decide makes d a decision in the name of the rule; a nil rule stands for no
// resource.
func (d *Decision) decide(r *Rule, allowed bool, reason Reason) {
	d.Allowed, d.Reason, d.Rule = allowed, reason, -1
	if r != nil {
		d.Kind, d.Policy, d.Rule, d.why = r.Kind, r.policy, r.Index, r
	}
}

// Program decides for one class of workloads. It is immutable and safe for
// concurrent use. A nil or zero Program denies everything with
// [ReasonNoPolicies].
type Program struct {
	language
	// compiled says that this is no zero Program.
	compiled bool
	// bans come before everything; nil is none.
	bans *bans
	// reads are the attributes that any policy reads, names what of those they read
	// by name.
	reads Field
	names []Name
	// refused are the resources that cannot be enforced; while there is one,
	// everything is denied in its name.
	refused []*Rule
	peer    peerModes
	tokens  tokens
	// verifies are tokens by issuer, outputs the headers in which they put claims.
	verifies []*TokenRule
	outputs  []string
	// custom are the CUSTOM rules by provider, in the order of the providers'
	// names. several says that Istio would not ask several.
	custom  []provider
	several bool
	// Rulesets are nil where no policy of that kind selects the workload.
	audit, deny, allow      *ruleset
	shadowDeny, shadowAllow *ruleset
	// layers are all rulesets, in the order of Rules.
	layers []ranked
}

// layer is policies that are looked at together.
type layer struct {
	action   Action
	provider string
	dryRun   bool
}

type ranked struct {
	layer
	rules *ruleset
}

// compare is the order of Rules.
func (l layer) compare(o layer) int {
	dry := func(l layer) int {
		if l.dryRun {
			return 1
		}
		return 0
	}
	return cmp.Or(cmp.Compare(o.action, l.action), cmp.Compare(l.provider, o.provider), cmp.Compare(dry(l), dry(o)))
}

type provider struct {
	name  string
	rules *ruleset
}

// Decide answers the request, in Istio's order: PeerAuthentication, CUSTOM,
// RequestAuthentication, AUDIT, DENY, ALLOW. Before all of them a ban denies whom it
// means, and a resource that cannot be enforced denies whatever the request. It does
// not allocate, but for an authority longer than 256 bytes with upper-case letters in
// it, for a malformed IPv6 address in X-Forwarded-For where policies read that, and for
// headers in which RequestAuthentications put claims; it keeps nothing of r and is safe
// for concurrent use.
func (p *Program) Decide(r *Request) (d Decision) {
	p.decide(&d, r, 0, false)
	return d
}

// Custom is as much of Decide as comes before tokens: the decision asks for the first
// extension provider that must be asked, or it does not ask, and then says nothing
// else. So CUSTOM policies can be done with before the request's token is looked at:
// providers may change it.
func (p *Program) Custom(r *Request) (d Decision) {
	p.decide(&d, r, 0, true)
	return d
}

// CustomAfter is as much of After, for a decision of Custom.
func (p *Program) CustomAfter(d Decision, r *Request) (next Decision) {
	p.decide(&next, r, d.stage+1, true)
	return next
}

// After decides what follows once the provider that d asks for has allowed the
// request: another provider must be asked, or the request is allowed or denied. What
// the provider has changed must be in r ([Changes.Apply]).
// d must be a decision of p about r; one that does not ask is returned as it is.
func (p *Program) After(d Decision, r *Request) (next Decision) {
	if !d.Ask {
		return d
	}
	p.decide(&next, r, d.stage+1, false)
	return next
}

// decide answers once that many providers have allowed; custom ends it before tokens.
// d is zero.
func (p *Program) decide(d *Decision, r *Request, asked int, custom bool) {
	if p == nil || !p.compiled {
		d.decide(nil, false, ReasonNoPolicies)
		return
	}
	if p.bans != nil {
		if by, reason := p.bans.check(r); reason != "" {
			d.decide(by, false, reason)
			return
		}
	}
	if len(p.refused) > 0 {
		d.decide(p.refused[0], false, p.refused[0].Reason)
		return
	}
	if by, reason := p.peer.check(r); reason != "" {
		d.decide(by, false, reason)
		return
	}
	v := newView(r, p.language)
	if hasUpper(v.host) {
		p.folded(d, &v, asked, custom)
		return
	}
	p.policies(d, &v, asked, custom)
}

// folded is policies for a host with upper-case letters.
//
//go:noinline
func (p *Program) folded(d *Decision, v *view, asked int, custom bool) {
	var buf [256]byte
	w := *v // a copy, so that the buffer need not live longer than this call
	w.host = lower(v.host, buf[:])
	p.policies(d, &w, asked, custom)
}

// policies decides by what comes after PeerAuthentication.
func (p *Program) policies(d *Decision, v *view, asked int, custom bool) {
	for i := asked; i < len(p.custom); i++ {
		m := p.custom[i].rules.find(v)
		if m.rule == nil {
			continue
		}
		if p.several {
			d.decide(m.rule, false, ReasonProviders)
			return
		}
		d.decide(m.rule, false, ReasonAskRule)
		if !m.certain {
			d.Reason = ReasonAskUnknown
		}
		d.Ask, d.Provider, d.stage = true, p.custom[i].name, i
		return
	}
	if custom {
		return
	}
	if len(p.tokens) > 0 {
		if by, reason := p.tokens.check(v); reason != "" {
			d.decide(by, false, reason)
			return
		}
	}
	if rewrites(v.Request, p.outputs) {
		p.rewritten(d, v)
		return
	}
	p.rules(d, v)
}

// rules decides by AUDIT, DENY and ALLOW.
func (p *Program) rules(d *Decision, v *view) {
	if p.audit != nil {
		d.audit = p.audit.find(v)
	}
	if p.shadowDeny != nil {
		d.shadowDeny = shadow{p.shadowDeny.find(v), true}
	}
	if p.deny != nil {
		if m := p.deny.find(v); m.rule != nil {
			reason := ReasonDenyRule
			if !m.certain {
				reason = ReasonDenyUnknown
			}
			d.decide(m.rule, false, reason)
			return
		}
	}
	if p.shadowAllow != nil {
		d.shadowAllow = shadow{p.shadowAllow.find(v), true}
	}
	if p.allow == nil {
		d.decide(nil, true, ReasonNoAllowPolicy)
		return
	}
	switch m := p.allow.find(v); {
	case m.rule == nil:
		d.decide(nil, false, ReasonNoAllowRule)
		d.Kind = KindAuthorizationPolicy
	case m.certain:
		d.decide(m.rule, true, ReasonAllowRule)
	default:
		d.decide(m.rule, false, ReasonAllowUnknown)
	}
}

// Reads are the attributes that a decision of p can depend on, beside
// Request.HTTP: Decide answers the same about a request without the others, in
// Known and in its fields. So who reads requests off a wire need not read all of
// them.
func (p *Program) Reads() Field {
	if p == nil {
		return 0
	}
	return p.reads
}

// Name is something that policies read of a request by its name.
type Name struct {
	// Field is FieldHeaders, FieldClaims or FieldMetadata.
	Field Field
	// Name is a header in lower case, the first part of a claim's name, or a key in
	// the metadata of Filter.
	Name, Filter string
}

// Names are what the AuthorizationPolicies of p read by name, each once, in no
// order. A decision depends on other headers only where tokens are looked for, or
// the client's address; and on other claims only by RequestAuthentication, which
// reads iss, sub and aud. The list must not be changed.
func (p *Program) Names() []Name {
	if p == nil {
		return nil
	}
	return p.names
}

// PeerMode is PeerAuthentication's mode on a port. Where a resource cannot be
// enforced everything is denied beside it, so there the mode says nothing.
func (p *Program) PeerMode(port uint16) Mode {
	if p == nil || !p.compiled {
		return ModeStrict
	}
	return p.peer.at(port).mode
}

// Rules iterates over what the program enforces of AuthorizationPolicies, and
// over the resources of any kind that cannot be enforced, in the order in which
// they decide: those first, then CUSTOM by provider, AUDIT, DENY and ALLOW, each
// by the name that Envoy sorts by, the rules of dry-run policies last.
func (p *Program) Rules() iter.Seq[Rule] {
	return func(yield func(Rule) bool) {
		if p == nil {
			return
		}
		lists := [][]*Rule{p.refused}
		for _, l := range p.layers {
			var list []*Rule
			for _, pol := range l.rules.policies {
				specs := pol.specs()
				for i, r := range pol.listed {
					full := *r
					full.Spec = specs[i]
					list = append(list, &full)
				}
				if len(pol.listed) == 0 && l.action == ActionAllow {
					list = append(list, pol.whole)
				}
			}
			slices.SortFunc(list, func(a, b *Rule) int { return cmp.Compare(a.order, b.order) })
			lists = append(lists, list)
		}
		for _, list := range lists {
			for _, r := range list {
				if !yield(*r) {
					return
				}
			}
		}
	}
}
