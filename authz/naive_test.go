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
	dry             bool
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

// decide gives the decision, the reason, and the policy and rule it names, and
// what AUDIT and dry-run policies say.
func (n *naive) decide(ns string, labels map[string]string, r *authz.Request, invert *field) string {
	if !n.peerAllows(ns, labels, r) {
		return "deny peer"
	}
	type hit struct {
		id   string
		text string
		is   int
	}
	hits := map[string][]hit{} // by action, "DENY dry" of dry-run policies, "CUSTOM provider"
	selecting := map[string]bool{}
	var providers []string
	for i, p := range n.policies {
		if p.namespace != ns && p.namespace != n.root || !selected(p.GetSelector().GetMatchLabels(), labels) {
			continue
		}
		a := p.GetAction().String()
		if p.dry {
			a += " dry"
		}
		if name := p.GetProvider().GetName(); name != "" {
			a += " " + name
			if !slices.Contains(providers, name) {
				providers = append(providers, name)
			}
		}
		selecting[a] = true
		for j, rule := range p.GetRules() {
			h := hit{fmt.Sprintf("ns[%s]-policy[%s]-rule[%d]", p.namespace, p.name, j), fmt.Sprintf("%s/%s[%d]", p.namespace, p.name, j), isFalse}
			if h.is = n.rule(rule, p, r, i, j, invert); h.is != isFalse {
				hits[a] = append(hits[a], h)
			}
		}
	}
	// first is the first certain match in the order of names, or else the first
	// that may be one.
	first := func(a string) hit {
		best := hit{is: isFalse}
		for _, h := range hits[a] {
			if h.is > best.is || h.is == best.is && h.id < best.id {
				best = h
			}
		}
		return best
	}
	slices.Sort(providers)
	for _, name := range providers {
		switch h := first("CUSTOM " + name); {
		case h.is == isFalse:
		case len(providers) > 1:
			return "deny several-providers " + h.text
		case h.is == isTrue:
			return "ask ask-rule " + h.text + " " + name
		default:
			return "ask ask-unknown " + h.text + " " + name
		}
	}
	beside := ""
	mark := func(h hit) {
		if h.is == isUnknown {
			beside += " maybe"
		}
		if h.is != isFalse {
			beside += " " + h.text
		}
	}
	if h := first("AUDIT"); h.is != isFalse {
		beside += " audit"
		mark(h)
	}
	if selecting["DENY dry"] {
		h := first("DENY dry")
		beside += " dry-run DENY " + map[bool]string{true: "allow", false: "deny"}[h.is == isFalse]
		mark(h)
	}
	switch h := first("DENY"); h.is {
	case isTrue:
		return "deny deny-rule " + h.text + beside
	case isUnknown:
		return "deny deny-unknown " + h.text + beside
	}
	if selecting["ALLOW dry"] {
		h := first("ALLOW dry")
		beside += " dry-run ALLOW " + map[bool]string{true: "allow", false: "deny"}[h.is == isTrue]
		mark(h)
	}
	if !selecting["ALLOW"] {
		return "allow no-allow-policy" + beside
	}
	switch h := first("ALLOW"); h.is {
	case isTrue:
		return "allow allow-rule " + h.text + beside
	case isUnknown:
		return "deny allow-unknown " + h.text + beside
	}
	return "deny no-allow-rule" + beside
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

// list is one field of a source or an operation, or a condition.
type list struct {
	name     string
	yes, not []string
	one      func(string, *authz.Request) int
	http     bool
}

func (n *naive) source(s *security.Source, p naivePolicy) []list {
	return []list{
		{"principals", n.expand(s.GetPrincipals()), n.expand(s.GetNotPrincipals()), naivePrincipal, false},
		{"namespaces", s.GetNamespaces(), s.GetNotNamespaces(), naiveNamespace, false},
		{"serviceAccounts", s.GetServiceAccounts(), s.GetNotServiceAccounts(), naiveAccount(p.namespace), false},
		{"trustDomains", n.expandDomains(s.GetTrustDomains()), n.expandDomains(s.GetNotTrustDomains()), naiveTrustDomain, false},
		{"requestPrincipals", s.GetRequestPrincipals(), s.GetNotRequestPrincipals(), naiveIdentity, true},
		{"ipBlocks", s.GetIpBlocks(), s.GetNotIpBlocks(), naiveIP, false},
		{"remoteIpBlocks", s.GetRemoteIpBlocks(), s.GetNotRemoteIpBlocks(), naiveRemoteIP, false},
	}
}

func (n *naive) operation(o *security.Operation) []list {
	return []list{
		{"hosts", o.GetHosts(), o.GetNotHosts(), naiveHost, true},
		{"methods", o.GetMethods(), o.GetNotMethods(), naiveMethod, true},
		{"paths", o.GetPaths(), o.GetNotPaths(), naivePath, true},
		{"ports", o.GetPorts(), o.GetNotPorts(), naivePort, false},
	}
}

// condition is what a key means. broken says that Istio cannot generate it.
func (n *naive) condition(c *security.Condition, p naivePolicy) (l list, broken bool) {
	l = list{name: "when " + c.GetKey(), yes: c.GetValues(), not: c.GetNotValues()}
	brackets := regexp.MustCompile(`^([^\[]*)\[(.*)\]$`).FindStringSubmatch(c.GetKey())
	switch k := c.GetKey(); {
	case k == "source.ip":
		l.one = naiveIP
	case k == "remote.ip":
		l.one = naiveRemoteIP
	case k == "destination.ip":
		l.one = naiveDestinationIP
	case k == "destination.port":
		l.one = naivePort
	case k == "connection.sni":
		l.one = naiveSNI
	case k == "source.namespace":
		l.one = naiveNamespace
	case k == "source.principal":
		l.yes, l.not, l.one = n.expand(l.yes), n.expand(l.not), naivePrincipal
	case k == "source.serviceAccount":
		l.one = naiveAccount(p.namespace)
	case k == "source.trustDomain":
		l.yes, l.not, l.one = n.expandDomains(l.yes), n.expandDomains(l.not), naiveTrustDomain
	case k == "request.auth.principal":
		l.one, l.http = naiveIdentity, true
	case k == "request.auth.audiences":
		l.one, l.http = naiveClaim("aud"), true
	case k == "request.auth.presenter":
		l.one, l.http = naiveClaim("azp"), true
	case brackets[1] == "request.headers":
		l.one, l.http = naiveHeader(brackets[2]), true
	case brackets[1] == "request.auth.claims":
		l.one, l.http = naiveClaim(strings.Split(brackets[2], "][")...), true
	case strings.HasPrefix(k, "experimental.envoy.filters."):
		l.one = naiveMetadata(strings.TrimPrefix(brackets[1], "experimental."), brackets[2])
	default:
		l.http, broken = true, true
	}
	return l, broken
}

func (n *naive) rule(rule *security.Rule, p naivePolicy, r *authz.Request, pi, j int, invert *field) int {
	strict := p.GetAction() == security.AuthorizationPolicy_ALLOW
	lost := false // the rule as a whole
	all := func(lists []list, entry int) int {
		and := isTrue
		for _, c := range lists {
			if len(c.yes)+len(c.not) == 0 {
				continue
			}
			if c.one == nil || c.http && !r.HTTP {
				lost = lost || strict
				continue
			}
			and = min(and, clause(c, c.yes, r, invert != nil && *invert == field{pi, j, entry, c.name}, false))
			and = min(and, clause(c, c.not, r, invert != nil && *invert == field{pi, j, entry, "not " + c.name}, true))
		}
		return and
	}
	from := isTrue
	for i, f := range rule.GetFrom() {
		if i == 0 {
			from = isFalse
		}
		from = max(from, all(n.source(f.GetSource(), p), i))
	}
	to := isTrue
	for i, t := range rule.GetTo() {
		if i == 0 {
			to = isFalse
		}
		to = max(to, all(n.operation(t.GetOperation()), i))
	}
	when := isTrue
	for i, w := range rule.GetWhen() {
		l, _ := n.condition(w, p)
		when = min(when, all([]list{l}, i))
	}
	if lost {
		return isFalse
	}
	return min(from, to, when)
}

func clause(l list, values []string, r *authz.Request, invert, not bool) int {
	if len(values) == 0 {
		return isTrue
	}
	// A joined header may be several values or one: what holds of every way to
	// split it holds.
	or := -1
	for _, q := range splits(l.name, r) {
		one := isFalse
		for _, v := range values {
			one = max(one, l.one(v, q))
		}
		if or >= 0 && or != one {
			one = isUnknown
		}
		or = one
	}
	if not != invert {
		return isTrue - or
	}
	return or
}

// splits are the requests that r may be as far as a list can tell.
func splits(name string, r *authz.Request) []*authz.Request {
	rs := []*authz.Request{r}
	header, ok := strings.CutPrefix(name, "when request.headers[")
	for i := range r.Headers {
		h := r.Headers[i]
		if !ok || h.Form != authz.HeaderJoined || !strings.EqualFold(h.Name+"]", header) {
			continue
		}
		pieces := strings.Split(string(h.Value), ",")
		var next []*authz.Request
		for _, q := range rs {
			for cuts := range 1 << (len(pieces) - 1) {
				c := *q
				c.Headers = slices.Clone(q.Headers)
				c.Headers[i] = authz.Header{Name: h.Name, Value: []byte(pieces[0])}
				last := i
				for k, p := range pieces[1:] {
					if cuts&(1<<k) == 0 {
						c.Headers[last].Value = []byte(string(c.Headers[last].Value) + "," + p)
						continue
					}
					last = len(c.Headers)
					c.Headers = append(c.Headers, authz.Header{Name: h.Name, Value: []byte(p)})
				}
				next = append(next, &c)
			}
		}
		rs = next
	}
	return rs
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

func inBlock(v string, a netip.Addr) int {
	if !strings.Contains(v, "/") {
		v += map[bool]string{true: "/32", false: "/128"}[strings.Contains(v, ".") && !strings.Contains(v, ":")]
	}
	if netip.MustParsePrefix(v).Contains(a) {
		return isTrue
	}
	return isFalse
}

func naiveIP(v string, r *authz.Request) int {
	if r.Known&authz.FieldSourceIP == 0 {
		return isUnknown
	}
	return inBlock(v, r.SourceIP)
}

func naiveDestinationIP(v string, r *authz.Request) int {
	if r.Known&authz.FieldDestinationIP == 0 {
		return isUnknown
	}
	return inBlock(v, r.DestinationIP)
}

// naiveRemoteIP is the last entry of X-Forwarded-For, or else the peer.
func naiveRemoteIP(v string, r *authz.Request) int {
	if r.Known&authz.FieldRemoteIP != 0 {
		return inBlock(v, r.RemoteIP)
	}
	if r.HTTP {
		if r.Known&authz.FieldHeaders == 0 {
			return isUnknown
		}
		var all []string
		for _, h := range r.Headers {
			if h.Name == "x-forwarded-for" {
				if h.Form == authz.HeaderUnclear {
					return isUnknown
				}
				all = append(all, string(h.Value))
			}
		}
		text := strings.Join(all, ",")
		if i := strings.LastIndex(text, ","); i >= 0 && i+1 < len(text) {
			text = text[i+1:]
		}
		if a, err := netip.ParseAddr(strings.TrimSpace(text)); err == nil {
			return inBlock(v, a)
		}
	}
	return naiveIP(v, r)
}

func naiveSNI(v string, r *authz.Request) int {
	if r.Known&authz.FieldSNI == 0 {
		return isUnknown
	}
	return naiveAny(v, strings.ToLower(string(r.SNI)))
}

// naiveAny is Istio's StringMatcher.
func naiveAny(v, s string) int {
	if v == "*" {
		return full(".+", []byte(s))
	}
	return naiveString(v, s)
}

func ofNames(r *authz.Request, one func(name []byte) int) int {
	list, known := names(r)
	if !known {
		return isUnknown
	}
	or := isFalse
	for _, name := range list {
		or = max(or, one(name))
	}
	return or
}

func naiveAccount(namespace string) func(string, *authz.Request) int {
	return func(v string, r *authz.Request) int {
		ns, sa, ok := strings.Cut(v, "/")
		if !ok {
			ns, sa = namespace, v
		}
		return ofNames(r, func(name []byte) int {
			return full("spiffe://.+/ns/"+regexp.QuoteMeta(ns)+"/(.+/|)sa/"+regexp.QuoteMeta(sa)+"(/.+)?", name)
		})
	}
}

func naiveTrustDomain(v string, r *authz.Request) int {
	return ofNames(r, func(name []byte) int {
		pre, suf, star := strings.Cut(v, "*")
		prefix := ""
		switch {
		case v == "*":
			prefix = "spiffe://"
		case !star:
			prefix = "spiffe://" + v + "/"
		default:
			return full("spiffe://"+regexp.QuoteMeta(pre)+"[^/]*"+regexp.QuoteMeta(suf)+"/.*", name)
		}
		if strings.HasPrefix(string(name), prefix) {
			return isTrue
		}
		return isFalse
	})
}

// expandDomains is Istio's ExpandTrustDomainAliases.
func (n *naive) expandDomains(values []string) []string {
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

// naiveIdentity is the table of Istio's request principals.
func naiveIdentity(v string, r *authz.Request) int {
	if r.Known&authz.FieldClaims == 0 {
		return isUnknown
	}
	text := func(claim string) (string, bool) {
		s, ok := r.Claims.AsMap()[claim].(string)
		return s, ok
	}
	iss, ok1 := text("iss")
	sub, ok2 := text("sub")
	if r.Claims == nil || !ok1 || !ok2 {
		return isFalse
	}
	nonEmpty := func(s string) int { return full(".+", []byte(s)) }
	is := func(b bool) int {
		if b {
			return isTrue
		}
		return isFalse
	}
	i := strings.LastIndex(v, "/")
	switch {
	case v == "*":
		return min(nonEmpty(iss), nonEmpty(sub))
	case strings.HasPrefix(v, "*/") && i == 1:
		return min(nonEmpty(iss), is(sub == v[2:]))
	case strings.HasPrefix(v, "*") && i >= 0:
		return is(strings.HasSuffix(iss, v[1:i]) && sub == v[i+1:])
	case strings.HasPrefix(v, "*"):
		return min(nonEmpty(iss), is(strings.HasSuffix(sub, v[1:])))
	case strings.HasSuffix(v, "/*"):
		return min(is(iss == v[:i]), nonEmpty(sub))
	case strings.HasSuffix(v, "*") && i >= 0:
		return is(iss == v[:i] && strings.HasPrefix(sub, v[i+1:len(v)-1]))
	case strings.HasSuffix(v, "*"):
		return min(is(strings.HasPrefix(iss, v[:len(v)-1])), nonEmpty(sub))
	case i >= 0:
		return is(iss == v[:i] && sub == v[i+1:])
	}
	return is(iss == v && sub == "")
}

func naiveClaim(path ...string) func(string, *authz.Request) int {
	return func(v string, r *authz.Request) int {
		if r.Known&authz.FieldClaims == 0 {
			return isUnknown
		}
		var value any
		if r.Claims != nil {
			value = any(r.Claims.AsMap())
		}
		for _, k := range path {
			m, _ := value.(map[string]any)
			value = m[k]
		}
		switch x := value.(type) {
		case string:
			return naiveAny(v, x)
		case []any:
			or := isFalse
			for _, e := range x {
				if s, ok := e.(string); ok {
					or = max(or, naiveAny(v, s))
				}
			}
			return or
		}
		return isFalse
	}
}

func naiveMetadata(filter, key string) func(string, *authz.Request) int {
	return func(v string, r *authz.Request) int {
		s, ok := r.Metadata[filter]
		if !ok {
			if r.Known&authz.FieldMetadata == 0 {
				return isUnknown
			}
			return isFalse
		}
		value := s.AsMap()[key]
		if strings.HasPrefix(v, "[") && strings.HasSuffix(v, "]") {
			or := isFalse
			elements, _ := value.([]any)
			for _, e := range elements {
				if s, ok := e.(string); ok {
					or = max(or, naiveAny(strings.Trim(v, "[]"), s))
				}
			}
			return or
		}
		if s, ok := value.(string); ok {
			return naiveAny(v, s)
		}
		return isFalse
	}
}

// naiveHeader looks at each value by itself.
func naiveHeader(name string) func(string, *authz.Request) int {
	return func(v string, r *authz.Request) int {
		one := func(value string) int {
			if v == "*" {
				return isTrue
			}
			return naiveString(v, value)
		}
		own := func(f authz.Field, value []byte) int {
			switch {
			case r.Known&f == 0:
				return isUnknown
			case value == nil:
				return isFalse
			}
			return one(string(value))
		}
		switch strings.ToLower(name) {
		case "host", ":authority":
			return own(authz.FieldHost, r.Host)
		case ":path":
			return own(authz.FieldPath, r.Path)
		case ":method":
			return own(authz.FieldMethod, r.Method)
		}
		or := isFalse
		if r.Known&authz.FieldHeaders == 0 {
			or = isUnknown
		}
		for _, h := range r.Headers {
			if h.Name != strings.ToLower(name) {
				continue
			}
			if h.Form == authz.HeaderUnclear && v != "*" {
				or = max(or, isUnknown)
			} else {
				or = max(or, one(string(h.Value)))
			}
		}
		return or
	}
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
	if strings.Contains(v, "{*}") || strings.Contains(v, "{**}") {
		const char = `[a-zA-Z0-9\-._~%!$&'()+,;:@=*]`
		expr := regexp.QuoteMeta(v)
		expr = strings.ReplaceAll(expr, `\{\*\*\}`, "(?:"+char+"|/)*")
		expr = strings.ReplaceAll(expr, `\{\*\}`, char+"+")
		if regexp.MustCompile("^(?s:" + expr + ")$").MatchString(path) {
			return isTrue
		}
		return isFalse
	}
	return naiveAny(v, path)
}
