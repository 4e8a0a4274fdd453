package authz

import (
	"fmt"
	"strings"

	"github.com/signet-mesh/signet/identity"
)

// The kinds of resources, as they stand in Decision.Kind and in YAML.
const (
	KindPeerAuthentication    = "PeerAuthentication"
	KindAuthorizationPolicy   = "AuthorizationPolicy"
	KindRequestAuthentication = "RequestAuthentication"
)

// Reason is a stable code: scripts, metrics and audit records may rely on it.
type Reason string

// This is the one list of the reasons of this package.
const (
	// ReasonAllowRule: an ALLOW rule certainly matches. Allowed.
	ReasonAllowRule Reason = "allow-rule"
	// ReasonNoAllowPolicy: no DENY rule matches and no ALLOW policy selects the
	// workload. Allowed.
	ReasonNoAllowPolicy Reason = "no-allow-policy"

	// ReasonAskRule: a CUSTOM rule certainly matches, so its provider must be
	// asked. Neither allowed nor denied yet.
	ReasonAskRule Reason = "ask-rule"
	// ReasonAskUnknown: a CUSTOM rule may match; an attribute that it reads is
	// unknown. Its provider must be asked: asking once too often never opens.
	ReasonAskUnknown Reason = "ask-unknown"
	// ReasonProviders: a CUSTOM rule matches, or may, and CUSTOM policies with
	// different providers select the workload, which Istio by default denies.
	ReasonProviders Reason = "several-providers"

	// ReasonTokenRefused: the request has a token where a RequestAuthentication
	// looks for one, and the proxy verified none. Istio's proxies answer 401.
	ReasonTokenRefused Reason = "token-refused"
	// ReasonTokenForeign: the verified token has an issuer or an audience that no
	// RequestAuthentication of the workload accepts, or a claim of a type that
	// Istio's proxies refuse.
	ReasonTokenForeign Reason = "token-foreign"
	// ReasonTokenUnknown: the request may have a token that a RequestAuthentication
	// of the workload refuses; the request does not say.
	ReasonTokenUnknown Reason = "token-unknown"

	// ReasonPlaintext: PeerAuthentication is STRICT on the port and the peer
	// has no verified certificate.
	ReasonPlaintext Reason = "plaintext"
	// ReasonPlaintextUnknown: PeerAuthentication may be STRICT and the peer may
	// have no certificate; the request does not say.
	ReasonPlaintextUnknown Reason = "plaintext-unknown"
	// ReasonDenyRule: a DENY rule certainly matches.
	ReasonDenyRule Reason = "deny-rule"
	// ReasonDenyUnknown: a DENY rule may match; an attribute that it reads is
	// unknown.
	ReasonDenyUnknown Reason = "deny-unknown"
	// ReasonNoAllowRule: ALLOW policies select the workload and no rule of them
	// matches.
	ReasonNoAllowRule Reason = "no-allow-rule"
	// ReasonAllowUnknown: no ALLOW rule certainly matches, the named one may; an
	// attribute that it reads is unknown.
	ReasonAllowUnknown Reason = "allow-unknown"

	// ReasonBanned: the peer, or its certificate, is banned; Kind is [KindBan].
	ReasonBanned Reason = "banned"
	// ReasonBanUnknown: a SPIFFE ID is banned and the request does not say who the
	// peer is, or there is a ban that this build cannot read.
	ReasonBanUnknown Reason = "ban-unknown"

	// ReasonInvalid: a resource that selects the workload is one that Istio's
	// admission refuses, and it has no last good version.
	ReasonInvalid Reason = "invalid"
	// ReasonDuplicate: a resource that selects the workload exists twice, and it
	// has no last good version.
	ReasonDuplicate Reason = "duplicate"
	// ReasonUnreadable: a document cannot be read so far that it could have a
	// name; it could deny anything to anyone.
	ReasonUnreadable Reason = "unreadable"
	// ReasonNoPolicies: there are no policies to decide by, because none were
	// loaded yet.
	ReasonNoPolicies Reason = "no-policies"
)

// Decision is the answer to one [Request] and what it rests on. It is a small
// value; the zero Decision denies.
type Decision struct {
	// Allowed is false also where Ask is true: nothing is allowed until the
	// provider has been asked and [Program.After] has decided.
	Allowed bool
	// Ask says that a CUSTOM policy matches, so that Provider must be asked,
	// which in Istio comes before everything but mutual TLS. If it denies, the
	// request is denied; if it allows, [Program.After] has the rest.
	Ask bool
	// Provider is the name of the extension provider to ask.
	Provider string
	// Kind is the kind of the resource that decided, one of the Kind constants,
	// or empty where no resource did. KindBan is no resource: Policy is then whom the
	// ban is about, as [identity.BanSubject] writes it.
	Kind string
	// Policy is its "NAMESPACE/NAME", or empty where no single one decided, as
	// when no ALLOW rule matches.
	Policy string
	// Rule is the index of the rule that decided in the policy's rules, from 0,
	// or -1.
	Rule int
	// Reason says why.
	Reason Reason

	why *Rule // what Text renders; shared with the Program, never changed

	// stage is how many providers have allowed.
	stage int
	// What matched without deciding; shared with the Program, never changed.
	audit                   match
	shadowDeny, shadowAllow shadow
}

// Verdict is "allow", "deny" or "ask".
func (d Decision) Verdict() string {
	switch {
	case d.Ask:
		return "ask"
	case d.Allowed:
		return "allow"
	}
	return "deny"
}

// Match names a rule that matched without deciding.
type Match struct {
	// Policy is "NAMESPACE/NAME", Rule the index in its rules.
	Policy string
	Rule   int
	// Certain is false if the rule may match and an attribute that it reads is
	// unknown.
	Certain bool
}

// Audited is the first AUDIT rule that matches, certainly or not, in the order of
// Envoy's names. Where there is one Envoy sets the metadata access_log_hint. It
// never changes what is decided. A request that is refused before AUDIT policies
// are looked at (by PeerAuthentication, by RequestAuthentication, or because of
// a resource that cannot be enforced), or is still to be asked about, has none.
func (d Decision) Audited() (m Match, ok bool) {
	if d.audit.rule == nil {
		return Match{}, false
	}
	return Match{d.audit.rule.policy, d.audit.rule.Index, d.audit.certain}, true
}

// DryRun is what the policies of one action that are annotated istio.io/dry-run
// would have said. They never change what is decided.
type DryRun struct {
	// Action is ActionDeny or ActionAllow.
	Action Action
	// Allowed is what they alone say: no DENY rule matches, or an ALLOW rule
	// certainly does.
	Allowed bool
	// Match is the rule that says so; its Policy is empty if no rule does.
	Match
}

// DryRuns are the results of dry-run policies, DENY before ALLOW; nil if none
// select the workload. As in Envoy, those of ALLOW are not looked at where DENY
// has denied, and none are where the request was refused earlier.
func (d Decision) DryRuns() []DryRun {
	if !d.shadowDeny.ran && !d.shadowAllow.ran {
		return nil
	}
	var out []DryRun
	for _, s := range []struct {
		action Action
		shadow
	}{{ActionDeny, d.shadowDeny}, {ActionAllow, d.shadowAllow}} {
		if !s.ran {
			continue
		}
		r := DryRun{Action: s.action, Allowed: (s.action == ActionDeny) == (s.rule == nil), Match: Match{Rule: -1, Certain: true}}
		if s.rule != nil {
			r.Match = Match{s.rule.policy, s.rule.Index, s.certain}
			r.Allowed = s.action == ActionAllow && s.certain
		}
		out = append(out, r)
	}
	return out
}

// match is a rule that matches, or may; rule is nil for none.
type match struct {
	rule    *Rule
	certain bool
}

// shadow is what dry-run policies of one action say, if there are any and they
// were looked at.
type shadow struct {
	match
	ran bool
}

// Text renders the decision as one sentence for people. It is made on demand, so
// that deciding costs nothing for it. It tells what the policy says, never what
// the request said; values from policies are quoted and clipped.
func (d Decision) Text() string {
	var b strings.Builder
	switch d.Verdict() {
	case "allow":
		b.WriteString("allowed")
	case "ask":
		fmt.Fprintf(&b, "provider %s must be asked", clip(d.Provider))
	default:
		b.WriteString("denied")
	}
	if d.Policy != "" {
		fmt.Fprintf(&b, " by %s %s", d.Kind, d.Policy)
		if d.Rule >= 0 {
			fmt.Fprintf(&b, " rule %d", d.Rule)
		}
	}
	b.WriteString(": ")
	switch d.Reason {
	case ReasonAllowRule, ReasonDenyRule, ReasonAskRule:
		d.why.describe(&b)
	case ReasonProviders:
		b.WriteString("CUSTOM policies with different providers select the workload, which is not enabled: ")
		d.why.describe(&b)
	case ReasonTokenRefused:
		b.WriteString("the request has a token that was not verified")
	case ReasonTokenForeign:
		b.WriteString("the verified token is not one that a RequestAuthentication of the workload accepts")
	case ReasonTokenUnknown:
		b.WriteString("the request may have a token that was refused; the proxy did not say")
	case ReasonDenyUnknown, ReasonAskUnknown:
		b.WriteString("it may match, but the proxy did not send all that it reads: ")
		d.why.describe(&b)
	case ReasonAllowUnknown:
		b.WriteString("no rule certainly matches; this one may, but the proxy did not send all that it reads: ")
		d.why.describe(&b)
	case ReasonNoAllowPolicy:
		b.WriteString("no DENY rule matches and no ALLOW policy selects the workload")
	case ReasonNoAllowRule:
		b.WriteString("ALLOW policies select the workload and no rule of them matches")
	case ReasonPlaintext:
		b.WriteString("the port takes mutual TLS only and the peer has no certificate")
	case ReasonPlaintextUnknown:
		b.WriteString("the port may take mutual TLS only and the peer may have no certificate; the proxy did not say")
	case ReasonInvalid, ReasonDuplicate, ReasonUnreadable:
		fmt.Fprintf(&b, "the policy is %s and selects the workload", d.Reason)
		if d.Reason == ReasonUnreadable {
			b.Reset()
			b.WriteString("denied: a document that may be a policy is unreadable")
		}
		if d.why != nil {
			fmt.Fprintf(&b, ": %s:%d: %s", d.why.Origin, d.why.Line, d.why.detail)
		}
	case ReasonBanned, ReasonBanUnknown:
		switch {
		case d.why == nil:
			b.WriteString("a ban")
		case d.Reason == ReasonBanned:
			b.WriteString(clipPlain(d.why.detail))
		case d.Policy == identity.Everybody().String():
			b.WriteString("the authority bans somebody in a way that this version cannot read")
		default:
			b.WriteString("it may be about the peer; the proxy did not say who that is")
		}
	case ReasonNoPolicies:
		b.WriteString("no policies were loaded yet")
	default:
		b.WriteString("no decision was made")
	}
	return b.String()
}

// describe writes what the rule demands.
func (r *Rule) describe(b *strings.Builder) {
	spec := r.spec()
	if spec == nil {
		return
	}
	start := b.Len()
	part := func(sep, name string, values []string) {
		if len(values) == 0 || b.Len()-start > maxDescription {
			return
		}
		if b.Len() > start {
			b.WriteString(sep)
		}
		b.WriteString(name)
		for i, v := range values {
			if i == 3 && len(values) > 4 {
				fmt.Fprintf(b, " and %d more", len(values)-i)
				break
			}
			b.WriteString(" " + clip(v))
		}
	}
	for i, from := range spec.GetFrom() {
		sep := " and "
		if i > 0 {
			sep = " or "
		}
		s := from.GetSource()
		for _, f := range []struct {
			name   string
			values []string
		}{
			{"principals", s.GetPrincipals()}, {"notPrincipals", s.GetNotPrincipals()},
			{"requestPrincipals", s.GetRequestPrincipals()}, {"notRequestPrincipals", s.GetNotRequestPrincipals()},
			{"namespaces", s.GetNamespaces()}, {"notNamespaces", s.GetNotNamespaces()},
			{"serviceAccounts", s.GetServiceAccounts()}, {"notServiceAccounts", s.GetNotServiceAccounts()},
			{"trustDomains", s.GetTrustDomains()}, {"notTrustDomains", s.GetNotTrustDomains()},
			{"ipBlocks", s.GetIpBlocks()}, {"notIpBlocks", s.GetNotIpBlocks()},
			{"remoteIpBlocks", s.GetRemoteIpBlocks()}, {"notRemoteIpBlocks", s.GetNotRemoteIpBlocks()},
		} {
			n := b.Len()
			if part(sep, f.name, f.values); b.Len() > n {
				sep = " and "
			}
		}
	}
	for i, to := range spec.GetTo() {
		sep := "; "
		if i > 0 {
			sep = " or "
		}
		o := to.GetOperation()
		for _, f := range []struct {
			name   string
			values []string
		}{
			{"hosts", o.GetHosts()}, {"notHosts", o.GetNotHosts()},
			{"ports", o.GetPorts()}, {"notPorts", o.GetNotPorts()},
			{"methods", o.GetMethods()}, {"notMethods", o.GetNotMethods()},
			{"paths", o.GetPaths()}, {"notPaths", o.GetNotPaths()},
		} {
			n := b.Len()
			if part(sep, f.name, f.values); b.Len() > n {
				sep = " and "
			}
		}
	}
	for i, w := range spec.GetWhen() {
		sep := " and "
		if i == 0 {
			sep = "; when "
			if b.Len() == start {
				b.WriteString("when ")
				start = b.Len()
			}
		}
		key := clipPlain(w.GetKey())
		n := b.Len()
		if part(sep, key+" is", w.GetValues()); b.Len() > n {
			sep = " and "
		}
		part(sep, key+" is not", w.GetNotValues())
	}
	if b.Len() == start {
		b.WriteString("it matches every request")
	}
	fmt.Fprintf(b, " (%s:%d)", r.Origin, r.Line)
}

// maxDescription is about how long the description of a rule may get.
const maxDescription = 400
