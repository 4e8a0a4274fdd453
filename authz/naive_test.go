package authz_test

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	security "istio.io/api/security/v1beta1"

	"github.com/signet-mesh/signet/authz"
)

// naive is an evaluator written from the description of what Istio's compiler
// emits and what Envoy makes of it, regular expressions and all. It shares no code
// with the package and does everything the long way. It can be told to invert one
// list of values, which tells whether that list decides.
type naive struct {
	policies []naivePolicy
	peer     []naivePeer
	root     string
	domains  []string
}

type naivePolicy struct {
	namespace, name string
	dry             bool
	*security.AuthorizationPolicy
}

type naivePeer struct {
	namespace, name string
	created         int64
	*security.PeerAuthentication
}

// field names one list of values in one policy: an entry of from, of to or of
// when. A not-form begins with "not ".
type field struct {
	policy, rule, entry int
	name                string
}

const (
	isFalse = iota
	isUnknown
	isTrue
)

func truth(b bool) int {
	if b {
		return isTrue
	}
	return isFalse
}

func selected(selector, labels map[string]string) bool {
	for k, v := range selector {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// hit is a rule that matches, or may.
type hit struct {
	id   string // as Envoy sorts them
	text string // NAMESPACE/NAME[RULE]
	sure bool
	by   string // provider
}

// first is the one that is reported: a certain one before an uncertain one, then
// by name.
func first(hits []hit) *hit {
	if len(hits) == 0 {
		return nil
	}
	h := slices.MinFunc(hits, func(a, b hit) int {
		if a.sure != b.sure {
			return cmp.Compare(truth(b.sure), truth(a.sure))
		}
		return strings.Compare(a.id, b.id)
	})
	return &h
}

func (h *hit) String() string {
	if h == nil {
		return "-"
	}
	return fmt.Sprintf("%s(%t)", h.text, h.sure)
}

// decide tells everything that can be told of a decision, in one line: each
// provider that must be asked, then what follows if all of them allow.
func (n *naive) decide(ns string, labels map[string]string, r *authz.Request, invert *field) string {
	switch n.peerAllows(ns, labels, r) {
	case isFalse:
		return "deny plaintext"
	case isUnknown:
		return "deny plaintext-unknown"
	}
	// By action; dry-run policies are apart.
	hits := map[security.AuthorizationPolicy_Action][]hit{}
	shadow := map[security.AuthorizationPolicy_Action][]hit{}
	enforced := map[security.AuthorizationPolicy_Action]int{}
	dry := map[security.AuthorizationPolicy_Action]int{}
	providers := map[string]bool{}
	for i, p := range n.policies {
		if p.namespace != ns && p.namespace != n.root || !selected(p.GetSelector().GetMatchLabels(), labels) {
			continue
		}
		a := p.GetAction()
		if p.dry {
			dry[a]++
		} else {
			enforced[a]++
		}
		if a == security.AuthorizationPolicy_CUSTOM {
			providers[p.GetProvider().GetName()] = true
		}
		for j, rule := range p.GetRules() {
			m := n.rule(rule, p.namespace, a, r, i, j, invert)
			if m == isFalse {
				continue
			}
			h := hit{
				fmt.Sprintf("ns[%s]-policy[%s]-rule[%d]", p.namespace, p.name, j), fmt.Sprintf("%s/%s[%d]", p.namespace, p.name, j),
				m == isTrue, p.GetProvider().GetName(),
			}
			if p.dry {
				shadow[a] = append(shadow[a], h)
			} else {
				hits[a] = append(hits[a], h)
			}
		}
	}
	var out string
	if custom := hits[security.AuthorizationPolicy_CUSTOM]; len(custom) > 0 {
		if len(providers) > 1 {
			// Providers are gone through by name; each denies what its rules match.
			for _, name := range slices.Sorted(maps.Keys(providers)) {
				if h := first(slices.DeleteFunc(slices.Clone(custom), func(h hit) bool { return h.by != name })); h != nil {
					return "deny several-providers " + h.text
				}
			}
		}
		h := first(custom)
		reason := "ask-rule"
		if !h.sure {
			reason = "ask-unknown"
		}
		out = fmt.Sprintf("ask %s %s %s > ", h.by, reason, h.text)
	}
	audit := "audit " + first(hits[security.AuthorizationPolicy_AUDIT]).String()
	dryRuns := ""
	if dry[security.AuthorizationPolicy_DENY] > 0 {
		h := first(shadow[security.AuthorizationPolicy_DENY])
		dryRuns += fmt.Sprintf(" dry DENY %t %v", h == nil, h)
	}
	deny := first(hits[security.AuthorizationPolicy_DENY])
	if deny == nil && dry[security.AuthorizationPolicy_ALLOW] > 0 {
		h := first(shadow[security.AuthorizationPolicy_ALLOW])
		dryRuns += fmt.Sprintf(" dry ALLOW %t %v", h != nil && h.sure, h)
	}
	allow := first(hits[security.AuthorizationPolicy_ALLOW])
	switch {
	case deny != nil && deny.sure:
		out += "deny deny-rule " + deny.text
	case deny != nil:
		out += "deny deny-unknown " + deny.text
	case enforced[security.AuthorizationPolicy_ALLOW] == 0:
		out += "allow no-allow-policy"
	case allow != nil && allow.sure:
		out += "allow allow-rule " + allow.text
	case allow != nil:
		out += "deny allow-unknown " + allow.text
	default:
		out += "deny no-allow-rule"
	}
	return out + " " + audit + dryRuns
}

// peerAllows is PeerAuthentication: the effective mode of the port, and whether
// the peer may be without a certificate where it is STRICT.
func (n *naive) peerAllows(ns string, labels map[string]string, r *authz.Request) int {
	pick := func(keep func(naivePeer) bool) *naivePeer {
		var best *naivePeer
		for i := range n.peer {
			p := &n.peer[i]
			if keep(*p) && (best == nil || p.created < best.created || p.created == best.created && p.name < best.name) {
				best = p
			}
		}
		return best
	}
	mode := security.PeerAuthentication_MutualTLS_PERMISSIVE
	apply := func(p *naivePeer) {
		if p != nil && p.GetMtls().GetMode() != security.PeerAuthentication_MutualTLS_UNSET {
			mode = p.GetMtls().GetMode()
		}
	}
	none := func(p naivePeer) bool { return len(p.GetSelector().GetMatchLabels()) == 0 }
	apply(pick(func(p naivePeer) bool { return p.namespace == n.root && none(p) }))
	if ns != n.root {
		apply(pick(func(p naivePeer) bool { return p.namespace == ns && none(p) }))
	}
	w := pick(func(p naivePeer) bool {
		return p.namespace == ns && ns != n.root && !none(p) && selected(p.GetSelector().GetMatchLabels(), labels)
	})
	apply(w)
	modes := map[bool]bool{mode == security.PeerAuthentication_MutualTLS_STRICT: true}
	if w != nil {
		for port, m := range w.GetPortLevelMtls() {
			if m.GetMode() == security.PeerAuthentication_MutualTLS_UNSET {
				continue
			}
			strict := m.GetMode() == security.PeerAuthentication_MutualTLS_STRICT
			if r.Known&authz.FieldDestinationPort == 0 {
				modes[strict] = true
			} else if uint16(port) == r.DestinationPort {
				modes = map[bool]bool{strict: true}
			}
		}
	}
	switch {
	case !modes[true], r.Known&authz.FieldPeer != 0 && r.Authenticated:
		return isTrue
	case modes[false], r.Known&authz.FieldPeer == 0:
		return isUnknown
	}
	return isFalse
}

// list is one list of values of a rule: what the field is, and its two forms.
type list struct {
	name     string
	yes, not []string
	one      func(v string, r *authz.Request) int
	http     bool                                        // only HTTP has it
	all      func(values []string, r *authz.Request) int // instead of one, for all values
	broken   bool                                        // it compiles to nothing: an ALLOW rule is left out, others get wider
}

// rule is the compiled form of a rule: any principal and any permission, each with
// the conditions, which are in all of them.
func (n *naive) rule(rule *security.Rule, ns string, a security.AuthorizationPolicy_Action, r *authz.Request, p, j int, invert *field) int {
	leftOut := false
	all := func(i int, lists []list) int {
		and := isTrue
		for _, l := range lists {
			if len(l.yes)+len(l.not) == 0 {
				continue
			}
			if l.broken || l.http && !r.HTTP {
				leftOut = true
				continue
			}
			and = min(and, l.clause(l.yes, r, invert != nil && *invert == field{p, j, i, l.name}, false))
			and = min(and, l.clause(l.not, r, invert != nil && *invert == field{p, j, i, "not " + l.name}, true))
		}
		return and
	}
	from, to, when := isTrue, isTrue, isTrue
	for i, f := range rule.GetFrom() {
		if i == 0 {
			from = isFalse
		}
		from = max(from, all(i, n.source(f.GetSource(), ns)))
	}
	for i, t := range rule.GetTo() {
		if i == 0 {
			to = isFalse
		}
		to = max(to, all(i, operation(t.GetOperation())))
	}
	for i, c := range rule.GetWhen() {
		when = min(when, all(i, []list{n.condition(c, ns)}))
	}
	if leftOut && a == security.AuthorizationPolicy_ALLOW {
		return isFalse
	}
	return min(from, to, when)
}

func (n *naive) source(s *security.Source, ns string) []list {
	return []list{
		{"principals", n.expand(s.GetPrincipals()), n.expand(s.GetNotPrincipals()), naivePrincipal, false, nil, false},
		{"namespaces", s.GetNamespaces(), s.GetNotNamespaces(), naiveNamespace, false, nil, false},
		{"serviceAccounts", s.GetServiceAccounts(), s.GetNotServiceAccounts(), naiveAccount(ns), false, nil, false},
		{"trustDomains", n.aliases(s.GetTrustDomains()), n.aliases(s.GetNotTrustDomains()), naiveDomain, false, nil, false},
		{"ipBlocks", s.GetIpBlocks(), s.GetNotIpBlocks(), naiveSourceIP, false, nil, false},
		{"remoteIpBlocks", s.GetRemoteIpBlocks(), s.GetNotRemoteIpBlocks(), naiveRemoteIP, false, nil, false},
		{"requestPrincipals", s.GetRequestPrincipals(), s.GetNotRequestPrincipals(), naiveRequestPrincipal, true, nil, false},
	}
}

func operation(o *security.Operation) []list {
	return []list{
		{"hosts", o.GetHosts(), o.GetNotHosts(), naiveHost, true, nil, false},
		{"methods", o.GetMethods(), o.GetNotMethods(), naiveMethod, true, nil, false},
		{"paths", o.GetPaths(), o.GetNotPaths(), naivePath, true, nil, false},
		{"ports", o.GetPorts(), o.GetNotPorts(), naivePort, false, nil, false},
	}
}

func (n *naive) condition(c *security.Condition, ns string) list {
	l := list{name: c.GetKey(), yes: c.GetValues(), not: c.GetNotValues()}
	switch k := c.GetKey(); {
	case k == "source.ip":
		l.one = naiveSourceIP
	case k == "remote.ip":
		l.one = naiveRemoteIP
	case k == "source.namespace":
		l.one = naiveNamespace
	case k == "source.principal":
		l.yes, l.not, l.one = n.expand(l.yes), n.expand(l.not), naivePrincipal
	case k == "source.serviceAccount":
		l.one = naiveAccount(ns)
	case k == "source.trustDomain":
		l.yes, l.not, l.one = n.aliases(l.yes), n.aliases(l.not), naiveDomain
	case k == "destination.ip":
		l.one = naiveDestinationIP
	case k == "destination.port":
		l.one = naivePort
	case k == "connection.sni":
		l.one = naiveSNI
	case k == "request.auth.principal":
		l.one, l.http = naiveRequestPrincipal, true
	case k == "request.auth.audiences":
		l.one, l.http = naiveClaim("aud"), true
	case k == "request.auth.presenter":
		l.one, l.http = naiveClaim("azp"), true
	case strings.HasPrefix(k, "request.auth.claims["):
		l.one, l.http = naiveClaim(strings.Split(strings.TrimSuffix(strings.TrimPrefix(k, "request.auth.claims["), "]"), "][")...), true
	case strings.HasPrefix(k, "request.headers["):
		l.all, l.http = naiveHeader(strings.TrimSuffix(strings.TrimPrefix(k, "request.headers["), "]")), true
	case strings.HasPrefix(k, "experimental.envoy.filters."):
		filter, key, _ := strings.Cut(strings.TrimSuffix(strings.TrimPrefix(k, "experimental."), "]"), "[")
		l.one = naiveMetadata(filter, key)
	default: // admission lets keys pass that only begin like one
		l.broken = true
	}
	return l
}

func (l list) clause(values []string, r *authz.Request, invert, not bool) int {
	if len(values) == 0 {
		return isTrue
	}
	or := isFalse
	if l.all != nil {
		or = l.all(values, r)
	}
	for _, v := range values {
		if l.all != nil {
			break
		}
		or = max(or, l.one(v, r))
	}
	if not != invert {
		return isTrue - or
	}
	return or
}

// holds is what one list says of a request, its not-form taken into account.
func (n *naive) holds(f field, r *authz.Request) int {
	p := n.policies[f.policy]
	rule := p.GetRules()[f.rule]
	var lists []list
	if f.entry < len(rule.GetFrom()) {
		lists = append(lists, n.source(rule.GetFrom()[f.entry].GetSource(), p.namespace)...)
	}
	if f.entry < len(rule.GetTo()) {
		lists = append(lists, operation(rule.GetTo()[f.entry].GetOperation())...)
	}
	if f.entry < len(rule.GetWhen()) {
		lists = append(lists, n.condition(rule.GetWhen()[f.entry], p.namespace))
	}
	name, not := strings.CutPrefix(f.name, "not ")
	for _, l := range lists {
		if l.name != name {
			continue
		}
		if not {
			return l.clause(l.not, r, false, true)
		}
		return l.clause(l.yes, r, false, false)
	}
	panic("no such list: " + f.name)
}

// expand is Istio's ReplaceTrustDomainAliases for domains without stars.
func (n *naive) expand(values []string) []string {
	var out []string
	for _, v := range values {
		parts := strings.Split(v, "/")
		if len(parts) != 5 || strings.Contains(parts[0], "*") || parts[0] != "cluster.local" && !slices.Contains(n.domains, parts[0]) {
			out = append(out, v)
			continue
		}
		for _, d := range n.domains {
			out = append(out, strings.Join(append([]string{d}, parts[1:]...), "/"))
		}
	}
	return out
}

// aliases is Istio's ExpandTrustDomainAliases.
func (n *naive) aliases(values []string) []string {
	var out []string
	for _, v := range values {
		if slices.Contains(n.domains, v) {
			out = append(out, n.domains...)
		} else {
			out = append(out, v)
		}
	}
	return out
}
