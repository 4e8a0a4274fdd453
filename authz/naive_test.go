package authz_test

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	security "istio.io/api/security/v1beta1"

	"github.com/signet-mesh/signet/authz"
)

// naive is an evaluator written from the description of what Istio's compiler
// emits, regular expressions and all. It shares no code with the package and
// does everything the long way. It can be told to invert one list of values,
// which tells whether that list decides.
type naive struct {
	policies []naivePolicy
	peer     []naivePeer
	root     string
	domains  []string
}

type naivePolicy struct {
	namespace, name string
	*security.AuthorizationPolicy
}

type naivePeer struct {
	namespace, name string
	created         int64
	*security.PeerAuthentication
}

// field names one list of values in one policy.
type field struct {
	policy, rule, entry int
	name                string
}

const (
	isFalse = iota
	isUnknown
	isTrue
)

func selected(selector, labels map[string]string) bool {
	for k, v := range selector {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// decide gives the decision, the reason, and the policy and rule it names.
func (n *naive) decide(ns string, labels map[string]string, r *authz.Request, invert *field) string {
	if !n.peerAllows(ns, labels, r) {
		return "deny peer"
	}
	type hit struct {
		id   string
		text string
	}
	var certain, maybe [2][]hit
	allowPolicies := 0
	for i, p := range n.policies {
		if p.namespace != ns && p.namespace != n.root || !selected(p.GetSelector().GetMatchLabels(), labels) {
			continue
		}
		a := 0
		if p.GetAction() == security.AuthorizationPolicy_DENY {
			a = 1
		} else {
			allowPolicies++
		}
		for j, rule := range p.GetRules() {
			h := hit{fmt.Sprintf("ns[%s]-policy[%s]-rule[%d]", p.namespace, p.name, j), fmt.Sprintf("%s/%s[%d]", p.namespace, p.name, j)}
			switch n.rule(rule, a == 1, r, i, j, invert) {
			case isTrue:
				certain[a] = append(certain[a], h)
			case isUnknown:
				maybe[a] = append(maybe[a], h)
			}
		}
	}
	first := func(hs []hit) string {
		return slices.MinFunc(hs, func(a, b hit) int { return strings.Compare(a.id, b.id) }).text
	}
	switch {
	case len(certain[1]) > 0:
		return "deny deny-rule " + first(certain[1])
	case len(maybe[1]) > 0:
		return "deny deny-unknown " + first(maybe[1])
	case allowPolicies == 0:
		return "allow no-allow-policy"
	case len(certain[0]) > 0:
		return "allow allow-rule " + first(certain[0])
	case len(maybe[0]) > 0:
		return "deny allow-unknown " + first(maybe[0])
	}
	return "deny no-allow-rule"
}

// peerAllows is PeerAuthentication: the effective mode of the port, and whether
// the peer may be without a certificate where it is STRICT.
func (n *naive) peerAllows(ns string, labels map[string]string, r *authz.Request) bool {
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
	strict := mode == security.PeerAuthentication_MutualTLS_STRICT
	if w != nil {
		for port, m := range w.GetPortLevelMtls() {
			if m.GetMode() == security.PeerAuthentication_MutualTLS_UNSET {
				continue
			}
			portStrict := m.GetMode() == security.PeerAuthentication_MutualTLS_STRICT
			if r.Known&authz.FieldDestinationPort == 0 {
				strict = strict || portStrict
			} else if uint16(port) == r.DestinationPort {
				strict = portStrict
			}
		}
	}
	return !strict || r.Known&authz.FieldPeer != 0 && r.Authenticated
}

func (n *naive) rule(rule *security.Rule, deny bool, r *authz.Request, p, j int, invert *field) int {
	from := isTrue
	for i, f := range rule.GetFrom() {
		if i == 0 {
			from = isFalse
		}
		s := f.GetSource()
		and := isTrue
		for _, c := range []struct {
			name     string
			yes, not []string
			one      func(string, *authz.Request) int
		}{
			{"principals", n.expand(s.GetPrincipals()), n.expand(s.GetNotPrincipals()), naivePrincipal},
			{"namespaces", s.GetNamespaces(), s.GetNotNamespaces(), naiveNamespace},
			{"ipBlocks", s.GetIpBlocks(), s.GetNotIpBlocks(), naiveIP},
		} {
			and = min(and, clause(c.yes, r, c.one, invert != nil && *invert == field{p, j, i, c.name}, false))
			and = min(and, clause(c.not, r, c.one, invert != nil && *invert == field{p, j, i, "not " + c.name}, true))
		}
		from = max(from, and)
	}
	to := isTrue
	httpOnly := false
	for i, t := range rule.GetTo() {
		if i == 0 {
			to = isFalse
		}
		o := t.GetOperation()
		and := isTrue
		for _, c := range []struct {
			name     string
			yes, not []string
			one      func(string, *authz.Request) int
			http     bool
		}{
			{"hosts", o.GetHosts(), o.GetNotHosts(), naiveHost, true},
			{"methods", o.GetMethods(), o.GetNotMethods(), naiveMethod, true},
			{"paths", o.GetPaths(), o.GetNotPaths(), naivePath, true},
			{"ports", o.GetPorts(), o.GetNotPorts(), naivePort, false},
		} {
			if c.http && len(c.yes)+len(c.not) > 0 {
				httpOnly = true
				if !r.HTTP {
					continue
				}
			}
			and = min(and, clause(c.yes, r, c.one, invert != nil && *invert == field{p, j, i, c.name}, false))
			and = min(and, clause(c.not, r, c.one, invert != nil && *invert == field{p, j, i, "not " + c.name}, true))
		}
		to = max(to, and)
	}
	if httpOnly && !r.HTTP && !deny {
		return isFalse
	}
	return min(from, to)
}

func clause(values []string, r *authz.Request, one func(string, *authz.Request) int, invert, not bool) int {
	if len(values) == 0 {
		return isTrue
	}
	or := isFalse
	for _, v := range values {
		or = max(or, one(v, r))
	}
	if not != invert {
		return isTrue - or
	}
	return or
}

// expand is Istio's ReplaceTrustDomainAliases for domains without stars.
func (n *naive) expand(values []string) []string {
	var out []string
	for _, v := range values {
		parts := strings.Split(v, "/")
		if len(parts) != 5 || parts[0] == "*" || strings.Contains(parts[0], "*") || parts[0] != "cluster.local" && !slices.Contains(n.domains, parts[0]) {
			out = append(out, v)
			continue
		}
		for _, d := range n.domains {
			out = append(out, strings.Join(append([]string{d}, parts[1:]...), "/"))
		}
	}
	return out
}

// names are what Envoy's authenticated matcher tries, or what is known of them.
func names(r *authz.Request) (list [][]byte, known bool) {
	if r.Known&authz.FieldPeer == 0 {
		return nil, false
	}
	if !r.Authenticated {
		return nil, true
	}
	return append([][]byte{r.Principal}, r.OtherNames...), r.Known&authz.FieldPrincipal != 0
}

var compiled sync.Map

var query = regexp.MustCompile(`(?s)[?#].*`)

// full is RE2's full match; what "." does with odd bytes is unknown.
func full(expr string, b []byte) int {
	re, ok := compiled.Load(expr)
	if !ok {
		re, _ = compiled.LoadOrStore(expr, regexp.MustCompile(`\A(?s:`+expr+`)\z`))
	}
	odd := strings.ContainsAny(string(b), "\n") || strings.ToValidUTF8(string(b), "\uFFFD!") != string(b)
	if re.(*regexp.Regexp).Match(b) {
		if odd {
			return isUnknown
		}
		return isTrue
	}
	return isFalse
}

func naivePrincipal(v string, r *authz.Request) int {
	list, known := names(r)
	if !known {
		return isUnknown
	}
	or := isFalse
	for _, name := range list {
		switch {
		case v == "*":
			or = max(or, full(".+", name))
		case strings.HasPrefix(v, "*"):
			or = max(or, full("spiffe://.*"+regexp.QuoteMeta(v[1:]), name))
		case strings.HasSuffix(v, "*"):
			if strings.HasPrefix(string(name), "spiffe://"+v[:len(v)-1]) {
				or = isTrue
			}
		case string(name) == "spiffe://"+v:
			or = isTrue
		}
	}
	return or
}

func naiveNamespace(v string, r *authz.Request) int {
	list, known := names(r)
	if !known {
		return isUnknown
	}
	or := isFalse
	for _, name := range list {
		or = max(or, full(".*/ns/"+strings.ReplaceAll(regexp.QuoteMeta(v), `\*`, ".*")+"/.*", name))
	}
	return or
}

func naiveIP(v string, r *authz.Request) int {
	if r.Known&authz.FieldSourceIP == 0 {
		return isUnknown
	}
	if !strings.Contains(v, "/") {
		v += map[bool]string{true: "/32", false: "/128"}[strings.Contains(v, ".") && !strings.Contains(v, ":")]
	}
	if netip.MustParsePrefix(v).Contains(r.SourceIP) {
		return isTrue
	}
	return isFalse
}

func naivePort(v string, r *authz.Request) int {
	if r.Known&authz.FieldDestinationPort == 0 {
		return isUnknown
	}
	if n, _ := strconv.Atoi(v); n == int(r.DestinationPort) {
		return isTrue
	}
	return isFalse
}

func naiveString(v, s string) int {
	ok := false
	switch {
	case strings.HasPrefix(v, "*"):
		ok = strings.HasSuffix(s, v[1:])
	case strings.HasSuffix(v, "*"):
		ok = strings.HasPrefix(s, v[:len(v)-1])
	default:
		ok = s == v
	}
	if ok {
		return isTrue
	}
	return isFalse
}

func naiveHost(v string, r *authz.Request) int {
	switch {
	case r.Known&authz.FieldHost == 0:
		return isUnknown
	case r.Host == nil:
		return isFalse
	case v == "*":
		return isTrue
	}
	lower := func(s string) string {
		b := []byte(s)
		for i := range b {
			if strings.IndexByte("ABCDEFGHIJKLMNOPQRSTUVWXYZ", b[i]) >= 0 {
				b[i] |= 0x20
			}
		}
		return string(b)
	}
	return naiveString(lower(v), lower(string(r.Host)))
}

func naiveMethod(v string, r *authz.Request) int {
	switch {
	case r.Known&authz.FieldMethod == 0:
		return isUnknown
	case r.Method == nil:
		return isFalse
	case v == "*":
		return isTrue
	}
	return naiveString(v, string(r.Method))
}

func naivePath(v string, r *authz.Request) int {
	switch {
	case r.Known&authz.FieldPath == 0:
		return isUnknown
	case r.Path == nil:
		return isFalse
	}
	path := query.ReplaceAllString(string(r.Path), "")
	if v == "*" {
		return full(".+", []byte(path))
	}
	return naiveString(v, path)
}
