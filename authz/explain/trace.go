package explain

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	security "istio.io/api/security/v1beta1"

	"github.com/signet-mesh/signet/authz"
)

// The names of stages, in the order of evaluation.
const (
	stageUnusable = "policies that cannot be enforced"
	stagePeer     = authz.KindPeerAuthentication
	stageCustom   = "CUSTOM"
	stageToken    = authz.KindRequestAuthentication
	stageAudit    = "AUDIT"
	stageDeny     = "DENY"
	stageAllow    = "ALLOW"
)

var stageNames = []string{stageUnusable, stagePeer, stageCustom, stageToken, stageAudit, stageDeny, stageAllow}

// decidedAt is the index of the stage that decided.
func (o *outcome) decidedAt() int {
	switch o.Reason {
	case authz.ReasonInvalid, authz.ReasonDuplicate, authz.ReasonUnreadable, authz.ReasonNoPolicies:
		return 0
	case authz.ReasonPlaintext, authz.ReasonPlaintextUnknown:
		return 1
	case authz.ReasonProviders, authz.ReasonAskRule, authz.ReasonAskUnknown:
		return 2
	case authz.ReasonTokenRefused, authz.ReasonTokenForeign, authz.ReasonTokenUnknown:
		return 3
	case authz.ReasonDenyRule, authz.ReasonDenyUnknown:
		return 5
	}
	return 6
}

// stages are all resources of the case.
func (t *tracer) stages() []Stage {
	stages := make([]Stage, len(stageNames))
	for i, name := range stageNames {
		stages[i] = Stage{Name: name, Reached: i <= t.decidedAt()}
	}
	ranks := make(map[string]int) // of rules' resources, as they are evaluated
	for i, r := range t.rules {
		if _, ok := ranks[r.Resource()]; !ok {
			ranks[r.Resource()] = i
		}
	}
	for r := range t.Set.All() {
		at, p := t.policy(r)
		stages[at].Policies = append(stages[at].Policies, p)
	}
	for _, s := range stages {
		slices.SortStableFunc(s.Policies, func(a, b Policy) int {
			selected := func(p Policy) int {
				if p.Selected {
					return 0
				}
				return 1
			}
			rank := func(p Policy) int {
				if n, ok := ranks[p.Policy]; ok {
					return n
				}
				return len(t.rules)
			}
			return cmp.Or(cmp.Compare(selected(a), selected(b)), cmp.Compare(rank(a), rank(b)))
		})
	}
	return slices.DeleteFunc(stages, func(s Stage) bool { return len(s.Policies) == 0 })
}

// policy is a resource, and the stage that it belongs to.
func (t *tracer) policy(r authz.Resource) (stage int, p Policy) {
	p = Policy{Kind: r.Kind(), Policy: r.Namespace() + "/" + r.Name(), DryRun: r.DryRun()}
	if r.Name() == "" {
		p.Policy = ""
	}
	p.Origin, p.Line = r.Origin()
	p.Selected, p.Why = t.Snapshot.Selects(r, t.Workload)
	if r.Reason() != "" {
		if p.Selected {
			p.Why = fmt.Sprintf("it is %s, so it denies everything to the workloads that it selects", r.Reason())
		}
		return 0, p
	}
	switch spec := r.Spec().(type) {
	case *security.PeerAuthentication:
		if p.Selected {
			p.Why = peerText(spec)
		}
		return 1, p
	case *security.RequestAuthentication:
		if p.Selected {
			p.Rules = t.tokenRules(r)
		}
		return 3, p
	case *security.AuthorizationPolicy:
		p.Action = spec.GetAction().String()
		if p.Selected {
			for _, rule := range t.rules {
				if rule.Kind == p.Kind && rule.Namespace == r.Namespace() && rule.Name == r.Name() {
					p.Rules = append(p.Rules, t.traced(rule))
				}
			}
		}
		return slices.Index(stageNames, p.Action), p
	}
	return 0, p
}

func peerText(spec *security.PeerAuthentication) string {
	text := "mode " + spec.GetMtls().GetMode().String()
	for _, port := range slices.Sorted(maps.Keys(spec.GetPortLevelMtls())) {
		text += fmt.Sprintf(", port %d %s", port, spec.GetPortLevelMtls()[port].GetMode())
	}
	return text
}

func (t *tracer) tokenRules(r authz.Resource) (out []Rule) {
	for tr := range t.program.TokenRules() {
		if tr.Namespace != r.Namespace() || tr.Name != r.Name() {
			continue
		}
		rule := Rule{Index: tr.Index, Line: tr.Line, Matches: authz.Yes.String()}
		_, reason := authz.CheckTokens([]authz.TokenRule{tr}, &t.custom)
		about := "tokens of issuer " + quoted(tr.Spec.GetIssuer())
		if len(tr.Spec.GetAudiences()) > 0 {
			about += " for audiences " + shorten(tr.Spec.GetAudiences())
		}
		switch _, known := token(&t.custom); {
		case reason == authz.ReasonTokenForeign:
			rule.Matches = authz.No.String()
			f := t.custom.Claims.GetFields()
			rule.Note = fmt.Sprintf("%s: the token is of issuer %s for %s", about, claimText(f["iss"]), claimText(f["aud"]))
		case reason == authz.ReasonTokenRefused:
			rule.Matches = authz.No.String()
			rule.Note = about + ": the request has a token where this rule looks for one, and it was not verified"
		case reason == authz.ReasonTokenUnknown:
			rule.Matches = authz.Unknown.String()
			rule.Note = about + ": whether the request has a token where this rule looks for one is not known"
		case known && t.custom.Claims == nil:
			rule.Note = about + ": no token where this rule looks for one, which it lets pass"
		default:
			rule.Note = about + ": it takes the token"
		}
		out = append(out, rule)
	}
	return out
}

// operation is what a request asks for, in a few words.
func operation(r *authz.Request) string {
	var b strings.Builder
	if r.HTTP {
		method, known := got(ofMethod, r)
		if !known || r.Method == nil {
			method = "a request"
		}
		b.WriteString(method)
		if path, known := got(ofPath, r); known && r.Path != nil {
			b.WriteString(" " + path)
		}
	} else {
		b.WriteString("a connection")
	}
	return b.String()
}

// subject is the request in a few words.
func (c *Case) subject() string {
	r := &c.Request
	var b strings.Builder
	b.WriteString(operation(r))
	switch who, known := got(ofPrincipal, r); {
	case known && r.Authenticated:
		b.WriteString(" from " + who)
	case known:
		b.WriteString(" from " + who)
		if r.SourceIP.IsValid() {
			fmt.Fprintf(&b, " (%s)", r.SourceIP)
		}
	default:
		b.WriteString(" from a peer of whom " + notSent)
	}
	if r.Known&authz.FieldDestinationPort != 0 {
		fmt.Fprintf(&b, " to port %d", r.DestinationPort)
	}
	return b.String()
}

// deciding is the rule that the decision names, or nil.
func (t *tracer) deciding() *rule {
	for _, r := range t.rules {
		if r.Resource() == t.Policy && r.Kind == t.Kind && r.Index == t.Rule {
			return r
		}
	}
	return nil
}

// verdict is the decision in one sentence, and what it rests on.
func (t *tracer) verdict(decision string) (summary string, because []string) {
	r := t.deciding()
	by := func() string {
		if r == nil {
			return fmt.Sprintf("%s %s", t.Kind, t.Policy)
		}
		return fmt.Sprintf("rule %d of %s policy %s (%s:%d)", r.Index, r.Action, t.Policy, r.Origin, r.Line)
	}
	matched := func() {
		if r == nil {
			return
		}
		if len(r.tests) == 0 {
			because = append(because, "the rule has no conditions, so it matches every request")
			return
		}
		for _, a := range r.alternatives {
			if a.match(t.sees(r)) == authz.No {
				continue
			}
			for _, x := range a.tests {
				because = append(because, t.clause(x, r).Text)
			}
			break
		}
	}
	unknowns := func(r *rule) {
		if r == nil {
			return
		}
		hints := map[string]bool{}
		for _, x := range r.tests {
			if x.match(t.sees(r)) == authz.Unknown {
				if h := hint(x.of); h != "" && !hints[h] {
					hints[h] = true
					because = append(because, h)
				}
			}
		}
	}
	subject := t.subject()
	switch {
	case t.refusedBy != "":
		summary = fmt.Sprintf("denied: %s: provider %s said no; %s has it asked", subject, quoted(t.refusedBy), by())
		matched()
		return summary, because
	case decision == "ask":
		var open []string
		for _, a := range t.unanswered(t.outcome) {
			open = append(open, a.Provider)
		}
		summary = fmt.Sprintf("provider %s decides: %s: %s has it asked", quoted(strings.Join(open, ", ")), subject, t.asker())
		because = append(because, "if it allows, the request is "+t.Text())
		return summary, because
	}
	switch t.Reason {
	case authz.ReasonAllowRule:
		summary = fmt.Sprintf("allowed: %s: %s matches, and no DENY rule does", subject, by())
		matched()
	case authz.ReasonNoAllowPolicy:
		summary = fmt.Sprintf("allowed: %s: no DENY rule matches, and no ALLOW policy selects the workload", subject)
	case authz.ReasonDenyRule:
		summary = fmt.Sprintf("denied: %s: %s matches", subject, by())
		matched()
	case authz.ReasonDenyUnknown:
		summary = fmt.Sprintf("denied: %s: %s may match, and the proxy did not send all that it reads", subject, by())
		matched()
		unknowns(r)
	case authz.ReasonNoAllowRule:
		n := 0
		for _, r := range t.rules {
			if r.Action == authz.ActionAllow && !r.DryRun && r.Index >= 0 {
				n++
			}
		}
		switch n {
		case 0:
			summary = fmt.Sprintf("denied: %s: ALLOW policies select the workload and have no rules, so they allow nothing", subject)
		case 1:
			summary = fmt.Sprintf("denied: %s: the only ALLOW rule does not match", subject)
		default:
			summary = fmt.Sprintf("denied: %s: none of %d ALLOW rules matches", subject, n)
		}
	case authz.ReasonAllowUnknown:
		summary = fmt.Sprintf("denied: %s: no ALLOW rule certainly matches; %s may, but the proxy did not send all that it reads", subject, by())
		unknowns(r)
	case authz.ReasonPlaintext:
		summary = fmt.Sprintf("denied: %s: the port takes mutual TLS only (STRICT, by %s %s), and the peer came without a certificate", subject, t.Kind, t.Policy)
		because = append(because, "Istio's own proxies close such a connection during the handshake; a caller outside the mesh, or with mutual TLS off in its DestinationRule, looks like this")
	case authz.ReasonPlaintextUnknown:
		summary = fmt.Sprintf("denied: %s: the port may take mutual TLS only (STRICT, by %s %s), and the proxy did not say enough to know whether the peer has a certificate or which port it is", subject, t.Kind, t.Policy)
	case authz.ReasonProviders:
		summary = fmt.Sprintf("denied: %s: %s matches, and CUSTOM policies with different providers select the workload, which is not enabled", subject, by())
		matched()
	case authz.ReasonTokenRefused:
		summary = fmt.Sprintf("denied with 401: %s: it has a token that was not verified, and RequestAuthentication %s looks for one there", subject, t.Policy)
		because = append(because, "expired, of another issuer or audience, signed by an unknown key, or malformed; a request without a token would not be refused here")
	case authz.ReasonTokenForeign:
		f := t.custom.Claims.GetFields()
		summary = fmt.Sprintf("denied with 401: %s: no RequestAuthentication takes its token, of issuer %s for %s", subject, claimText(f["iss"]), claimText(f["aud"]))
		for tr := range t.program.TokenRules() {
			text := fmt.Sprintf("rule %d of %s/%s takes issuer %s", tr.Index, tr.Namespace, tr.Name, quoted(tr.Spec.GetIssuer()))
			if len(tr.Spec.GetAudiences()) > 0 {
				text += " for " + shorten(tr.Spec.GetAudiences())
			}
			because = append(because, text)
		}
	case authz.ReasonTokenUnknown:
		summary = fmt.Sprintf("denied: %s: it may have a token that RequestAuthentication %s refuses, and the proxy did not say", subject, t.Policy)
		because = append(because, hint(ofIdentity))
	default:
		summary = t.Text()
	}
	return summary, because
}

// asker is the rule that has the first provider asked that has not answered.
func (t *tracer) asker() string {
	d := t.unanswered(t.outcome)[0]
	for _, r := range t.rules {
		if r.Resource() == d.Policy && r.Kind == d.Kind && r.Index == d.Rule {
			return fmt.Sprintf("rule %d of CUSTOM policy %s (%s:%d)", r.Index, d.Policy, r.Origin, r.Line)
		}
	}
	return d.Policy
}

// hint says how the proxy is told to send what is missing.
func hint(of attribute) string {
	switch of {
	case ofPrincipal:
		return "set include_peer_certificate in the ext_authz filter, so that all names of the peer are known"
	case ofSNI:
		return "set include_tls_session in the ext_authz filter, so that the server name is known"
	case ofIdentity:
		return "put the ext_authz filter behind jwt_authn and set metadata_context_namespaces to [envoy.filters.http.jwt_authn], so that tokens are known"
	case ofMethod, ofPath, ofHost:
		return "set encode_raw_headers in the ext_authz filter, so that these bytes are known as they are"
	case ofSource, ofDestination, ofPort:
		return "the connection has no IP address, as on a Unix socket: rules on addresses or ports cannot be known there"
	case ofRemote:
		return "set encode_raw_headers in the ext_authz filter and let it send x-forwarded-for"
	}
	switch {
	case strings.HasPrefix(string(of), string(ofHeader)):
		return "set encode_raw_headers in the ext_authz filter, so that headers are known value by value"
	case strings.HasPrefix(string(of), string(ofClaim)):
		return hint(ofIdentity)
	case strings.HasPrefix(string(of), string(ofMetadata)):
		filter, _, _ := strings.Cut(strings.TrimPrefix(string(of), string(ofMetadata)), "[")
		return "add " + filter + " to metadata_context_namespaces of the ext_authz filter"
	}
	return ""
}
