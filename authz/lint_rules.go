package authz

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	security "istio.io/api/security/v1beta1"
)

// This file is the warnings of Lint about one resource. Each has a case in
// testdata/lint.

func (r *report) lintPolicy(p *security.AuthorizationPolicy, spec tree, metadata map[string]any) {
	action := p.GetAction()
	r.lintTargets(p.GetSelector().GetMatchLabels(), spec)
	if annotations, _ := metadata["annotations"].(map[string]any); annotations != nil {
		s, _ := annotations[dryRun].(string)
		if on, err := strconv.ParseBool(s); err == nil && on {
			consequence := "what it would deny is not denied"
			if action == security.AuthorizationPolicy_ALLOW {
				consequence = "it does not count as an ALLOW policy either: without another one everything is allowed"
			}
			r.warn("dry-run", keyPath("metadata.annotations", dryRun), "remove the annotation to enforce the policy", "is not enforced, only reported; %s", consequence)
		}
	}
	if action == security.AuthorizationPolicy_AUDIT && len(p.GetRules()) == 0 {
		r.warn("audit-nothing", "spec", "add a rule", "an AUDIT policy without rules never matches")
	}
	rules := spec.list("rules")
	for i, rule := range p.GetRules() {
		path := fmt.Sprintf("spec.rules[%d]", i)
		for _, f := range []string{"from", "to"} {
			if rules[i].has(f) && len(rules[i].list(f)) == 0 {
				r.warn("empty-list", path+"."+f, "remove it, or write an entry", "an empty list does not mean nothing: it means any")
			}
		}
		all := clauses(rule, path)
		r.lintTCP(rule, action, path)
		r.lintAbsence(rule, action, path)
		r.lintContradictions(all)
		for _, c := range all {
			r.lintClause(c, action)
		}
		for j, w := range rule.GetWhen() {
			r.lintKey(w.GetKey(), fmt.Sprintf("%s.when[%d].key", path, j), action)
		}
	}
}

// lintTargets warns of what selects more, or less, than it seems to.
func (r *report) lintTargets(labels map[string]string, spec tree) {
	if spec.has("targetRef") || spec.has("targetRefs") && len(spec.list("targetRefs")) > 0 {
		r.warn("target-ref", "spec", "use a selector for workloads with sidecars", "a resource with a target reference is for gateways and waypoints; sidecars pass it over")
	}
	if spec.has("selector") && len(labels) == 0 {
		r.warn("selector-empty", "spec.selector", "write labels, or remove it to say so", "a selector without labels selects every workload of the namespace")
	}
}

// lintTCP warns of what a rule becomes on a bare connection, which has no HTTP
// attributes: Istio leaves the whole of an ALLOW rule out, and takes them out of
// other rules, which then match more.
func (r *report) lintTCP(rule *security.Rule, action security.AuthorizationPolicy_Action, path string) {
	var when, froms, tos []bool // whether the alternative has HTTP attributes
	http := func(cs []clause) bool { return slices.ContainsFunc(cs, func(c clause) bool { return c.http }) }
	for _, w := range rule.GetWhen() {
		when = append(when, http(conditionClauses(w, "")))
	}
	for _, f := range rule.GetFrom() {
		froms = append(froms, http(sourceClauses(f.GetSource(), "")))
	}
	bounded := len(rule.GetTo()) > 0 // every alternative is bound to ports
	for _, t := range rule.GetTo() {
		tos = append(tos, http(operationClauses(t.GetOperation(), "")))
		bounded = bounded && len(t.GetOperation().GetPorts())+len(t.GetOperation().GetNotPorts()) > 0
	}
	for _, w := range rule.GetWhen() {
		bounded = bounded || w.GetKey() == "destination.port"
	}
	all := slices.Concat(when, froms, tos)
	switch {
	case !slices.Contains(all, true):
	case action == security.AuthorizationPolicy_ALLOW:
		// Expected where nothing but HTTP is meant.
		if slices.Contains(froms, true) && slices.Contains(froms, false) || slices.Contains(tos, true) && slices.Contains(tos, false) {
			r.warn("tcp-dropped", path, "make a rule of its own of the entries for TCP", "on TCP ports the whole rule is left out, with the entries that read no HTTP attribute")
		}
	case bounded:
	case !slices.ContainsFunc(clauses(rule, ""), func(c clause) bool { return !c.http }):
		r.warn("tcp-everything", path, "add ports to each operation", "reads HTTP attributes only, which are ignored on TCP ports: there it matches every connection")
	default:
		r.warn("tcp-wider", path, "add ports to each operation", "its HTTP attributes are ignored on TCP ports: there it matches more connections")
	}
}

// lintAbsence warns of ALLOW rules that are satisfied by what is not there.
func (r *report) lintAbsence(rule *security.Rule, action security.AuthorizationPolicy_Action, path string) {
	if action != security.AuthorizationPolicy_ALLOW {
		return
	}
	var common []clause
	for j, w := range rule.GetWhen() {
		common = append(common, conditionClauses(w, fmt.Sprintf("%s.when[%d]", path, j))...)
	}
	check := func(cs []clause) {
		has := func(what func(clause) bool, not bool) (clause, bool) {
			i := slices.IndexFunc(cs, func(c clause) bool { return what(c) && c.not == not })
			if i < 0 {
				return clause{}, false
			}
			return cs[i], true
		}
		peer := func(c clause) bool { return c.peer }
		token := func(c clause) bool { return c.token }
		if c, not := has(peer, true); not {
			if _, positive := has(peer, false); !positive {
				r.warn("plaintext-allowed", c.path, "name who may as well, or make mutual TLS STRICT", "a peer without a certificate is none of these, so plaintext is allowed")
			}
		}
		if c, not := has(token, true); not {
			if _, positive := has(token, false); !positive {
				r.warn("no-token-allowed", c.path, `demand a token as well, as in requestPrincipals: ["*"]`, "a request without a token has none of these, so it is allowed")
			}
		}
	}
	if len(rule.GetFrom()) == 0 {
		check(common)
	}
	for j, f := range rule.GetFrom() {
		check(append(sourceClauses(f.GetSource(), fmt.Sprintf("%s.from[%d].source", path, j)), common...))
	}
	for _, c := range common {
		positive := slices.ContainsFunc(common, func(o clause) bool { return !o.not && strings.EqualFold(o.name, c.name) })
		if c.not && !positive && strings.HasPrefix(c.name, "request.headers[") {
			r.warn("no-header-allowed", c.path, "add values, such as *, if the header must be there", "a request without the header has none of these, so it is allowed")
		}
	}
}

// lintContradictions warns of fields that exclude all that they name.
func (r *report) lintContradictions(all []clause) {
	for _, c := range all {
		if c.not {
			continue
		}
		for _, n := range all {
			dir := func(p string) string { return p[:strings.LastIndexByte(p, '.')] }
			if !n.not || n.name != c.name || dir(n.path) != dir(c.path) {
				continue
			}
			if !slices.ContainsFunc(c.values, func(v string) bool { return !slices.Contains(n.values, v) }) {
				r.warn("never-matches", c.path, "remove one of the two", "everything that is named is excluded again by the not-form, so the entry never matches")
			}
		}
	}
}

// lintClause warns of values that do not mean what they seem to.
func (r *report) lintClause(c clause, action security.AuthorizationPolicy_Action) {
	// evades says that what a value fails to match gets through.
	evades := action == security.AuthorizationPolicy_ALLOW == c.not && action != security.AuthorizationPolicy_AUDIT
	if c.name == "remoteIpBlocks" || c.name == "remote.ip" {
		r.warn("remote-ip", c.path, "use ipBlocks, or see to it that a proxy you trust sets the header", "at a sidecar this is the last entry of X-Forwarded-For, which the client can choose")
	}
	if c.name == "trustDomains" {
		r.warn("trust-domain-channel", c.path, "use principals where clusters have that policy", "Istio's admission policy for the stable channel, where it is installed, refuses this field")
	}
	if c.name == "methods" && evades && slices.Contains(c.values, "GET") && !slices.Contains(c.values, "HEAD") {
		r.warn("method-head", c.path, "add HEAD", "GET does not include HEAD, which many servers answer as they do GET")
	}
	for i, v := range c.values {
		w := valueLint{r, c, v, fmt.Sprintf("%s[%d]", c.path, i), evades}
		if v != strings.TrimSpace(v) {
			w.warn("space", "remove the space", "%s has space around it, which no request has")
		}
		if c.wildcards && !(c.name == "paths" && hasTemplate(v)) {
			w.stars()
		}
		switch c.name {
		case "principals", "source.principal":
			w.principal()
		case "serviceAccounts", "source.serviceAccount":
			if !strings.Contains(v, "/") && w.namespace() == r.lint.root {
				w.warn("service-account-root", "write NAMESPACE/"+plain(v), "%s is a service account of the root namespace, not of the workload's")
			}
		case "requestPrincipals", "request.auth.principal":
			if !strings.ContainsAny(v, "/*") {
				w.warn("request-principal-shape", "write ISSUER/SUBJECT", "%s has no subject, and only a token with an empty one matches")
			}
		case "ipBlocks", "source.ip", "remoteIpBlocks", "remote.ip", "destination.ip":
			w.address()
		case "hosts":
			w.host()
		case "methods":
			if v != strings.ToUpper(v) {
				w.warn("method-case", "write it in capitals", "%s is not in capitals: methods respect case, and HTTP/1 takes no other")
			}
		case "paths":
			w.path()
		case "connection.sni":
			if v != strings.ToLower(v) {
				w.warn("sni-case", "write it in lower case", "%s never matches: proxies see the server name in lower case")
			}
		}
		if strings.HasPrefix(c.name, "request.auth.claims") {
			w.claim()
		}
	}
}

// valueLint is one value of a clause.
type valueLint struct {
	*report
	clause
	v, at  string
	evades bool
}

// warn has the value as the one argument of its text.
func (w valueLint) warn(code, fix, format string) {
	w.report.warn(code, w.at, fix, format, clip(w.v))
}

// namespace is the policy's.
func (w valueLint) namespace() string {
	_, name, _ := strings.Cut(w.resource, " ")
	ns, _, _ := strings.Cut(name, "/")
	return ns
}

func (w valueLint) stars() {
	inner := w.v
	if strings.HasPrefix(inner, "*") {
		inner = inner[1:]
	} else {
		inner = strings.TrimSuffix(inner, "*")
	}
	if strings.Contains(inner, "*") && !(strings.HasSuffix(w.name, "rincipals") && strings.Contains(w.v, "/*")) {
		w.warn("star", "leave one * at the start or the end", "in %s only one * at the start or the end stands for anything; the others stand for themselves")
	}
}

func (w valueLint) principal() {
	parts := strings.Split(w.v, "/")
	full := len(parts) == 5 && parts[1] == "ns" && parts[3] == "sa"
	td := w.lint.options.TrustDomain.Name()
	switch {
	case strings.HasPrefix(w.v, "spiffe:"):
		w.warn("principal-scheme", "remove spiffe://", "%s never matches: principals are written without spiffe://")
	case strings.HasPrefix(w.v, "*"):
	case len(parts) != 5 && strings.HasPrefix(w.v, "cluster.local/") && td != "" && td != "cluster.local":
		w.warn("principal-pointer", "write the trust domain, or a principal of five parts", "in %s cluster.local does not stand for the trust domain of the mesh, nor for its aliases: it does so in principals of five parts only")
	case !full && !strings.HasSuffix(w.v, "*"):
		w.warn("principal-shape", "write TRUSTDOMAIN/ns/NAMESPACE/sa/SERVICEACCOUNT", "%s is not the name of a workload")
	}
}

func (w valueLint) address() {
	address, bits, prefix := strings.Cut(w.v, "/")
	a, err := netip.ParseAddr(address)
	if err != nil {
		return
	}
	switch {
	case a.Is4In6():
		w.warn("ip-mapped", "write the IPv4 address", "%s never matches: a peer with that IPv4 address has no such IPv6 address")
	case a.Zone() != "":
		w.warn("ip-zone", "remove the zone", "%s has a zone, which no peer's address has")
	case prefix:
		n, err := strconv.Atoi(bits)
		if p, perr := a.Prefix(n); err == nil && perr == nil && p.Addr() != a {
			w.report.warn("ip-bits", w.at, "write "+p.String(), "%s means all of %s", clip(w.v), p)
		}
	}
}

func (w valueLint) host() {
	switch {
	case strings.Contains(w.v, "/"):
		w.warn("host-shape", "write the host alone", "%s never matches: a host has no scheme and no path")
	case w.evades && !strings.Contains(w.v, "*") && !portOf(w.v):
		w.warn("host-port", "name "+plain(w.v)+":* as well", "%s does not match when the client adds a port, or a dot")
	}
}

func portOf(host string) bool {
	i := strings.LastIndexByte(host, ':')
	return i >= 0 && i > strings.LastIndexByte(host, ']')
}

func (w valueLint) path() {
	v, template := w.v, hasTemplate(w.v)
	switch exact := strings.TrimSuffix(strings.TrimPrefix(v, "*"), "*"); {
	case strings.ContainsAny(v, "?#"):
		w.warn("path-query", "remove what begins at the ? or #", "%s never matches: paths are compared without query and fragment")
	case !strings.HasPrefix(v, "/") && !strings.HasPrefix(v, "*") && !template:
		w.warn("path-slash", "begin it with /", "%s never matches: every path begins with /")
	case !template && abnormal(exact):
		w.warn("path-normal", "write it as proxies normalize it", "%s never matches: proxies resolve /./ and /../, turn \\ into /, and decode or encode characters before policies see the path")
	case !w.evades:
		if !w.not && strings.HasPrefix(v, "/") && strings.HasSuffix(v, "*") && len(v) > 2 && !strings.HasSuffix(v, "/*") && alphanumeric(v[len(v)-2]) {
			w.warn("path-prefix", "end it with /*, and name "+plain(strings.TrimSuffix(v, "*"))+" as well", "%s matches every path that begins so, also of a longer word")
		}
	case template:
		w.warn("path-template", "allow what may be, instead", "%s can be got round: it does not match the path without its last slash, with // or ;parameters in other places, or with [ or ] in a segment")
	case v == "*":
	case strings.HasSuffix(v, "*"):
		w.warn("path-evaded", "allow what may be, instead", "%s can be got round: // is not merged by default, and case and ;parameters count")
	default:
		w.warn("path-evaded", "allow what may be, instead", "%s can be got round: a slash at the end, // (not merged by default), another case or ;parameters make another path, which servers may take for the same")
	}
}

// abnormal reports whether no normalized path has the text in it: dot segments,
// backslashes, unreserved characters in percent form, or raw characters that
// proxies put into percent form.
func abnormal(path string) bool {
	if strings.Contains(path, "/./") || strings.Contains(path, "/../") || strings.HasSuffix(path, "/.") || strings.HasSuffix(path, "/..") {
		return true
	}
	for i := range len(path) {
		c := path[i]
		if c <= ' ' || c >= 0x7f || strings.IndexByte(`\"<>^{|}`+"`", c) >= 0 {
			return true
		}
		if c != '%' || i+2 >= len(path) {
			continue
		}
		if n, err := strconv.ParseUint(path[i+1:i+3], 16, 8); err == nil && (alphanumeric(byte(n)) || strings.IndexByte("-._~", byte(n)) >= 0) {
			return true
		}
	}
	return false
}

func alphanumeric(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
}

func (w valueLint) claim() {
	_, number := strconv.ParseFloat(w.v, 64)
	switch {
	case number == nil || w.v == "true" || w.v == "false":
		w.warn("claim-type", "have the issuer write it as a string", "%s looks like a number or a boolean, and only claims that are strings or lists of them match")
	case strings.Contains(w.v, " ") && (w.name == "request.auth.claims[scope]" || w.name == "request.auth.claims[permission]"):
		w.warn("claim-list", "write one value for each word", "%s has a space, and this claim is split at spaces")
	}
}

// lintKey warns of keys of conditions.
func (r *report) lintKey(key, path string, action security.AuthorizationPolicy_Action) {
	for _, k := range conditionKeys {
		rest, ok := strings.CutPrefix(key, k.key)
		if !ok || !k.brackets || k.key == "experimental.envoy.filters." {
			continue
		}
		if !strings.HasPrefix(rest, "[") {
			effect := "the rule is left out"
			if action != security.AuthorizationPolicy_ALLOW {
				effect = "the rule matches more, as if the condition were not there"
			}
			r.warn("key-unknown", path, "write "+k.key+"[NAME]", "%s is no attribute, though Istio's admission takes it; %s", clip(key), effect)
		} else if k.key == "request.auth.claims" && !nested(key) {
			r.warn("claim-nesting", path, "write [A][B] for B in A", "in %s the brackets do not pair up, so all of it is the name of one claim", clip(key))
		}
	}
	switch strings.ToLower(key) {
	case "request.headers[:path]":
		r.warn("header-path", path, "use paths", "this is the path with its query; paths are compared without")
	case "request.headers[host]":
		r.warn("header-host", path, "use hosts", "this reads :authority, and respects case where hosts do not")
	}
	if strings.HasPrefix(key, "experimental.") {
		r.warn("experimental", path, "test it with the filter", "matches only where that filter has left metadata; elsewhere it never matches, and its not-form always does")
	}
}

func (r *report) lintPeer(p *security.PeerAuthentication, res *resource, spec tree) {
	if len(p.GetSelector().GetMatchLabels()) > 0 && res.namespace == r.lint.root {
		r.warn("peer-root-selector", "spec.selector", "put it into the workload's namespace", "in the root namespace a PeerAuthentication with a selector selects nothing")
	}
	if spec.has("selector") && len(p.GetSelector().GetMatchLabels()) == 0 {
		r.warn("selector-empty", "spec.selector", "write labels, or remove it to say so", "a selector without labels selects every workload of the namespace")
	}
	const what = "turns mutual TLS off: peers have no names, so principals, namespaces and serviceAccounts of policies never match, and their not-forms always do"
	if p.GetMtls().GetMode() == security.PeerAuthentication_MutualTLS_DISABLE {
		r.warn("peer-disable", "spec.mtls.mode", "use PERMISSIVE or STRICT", what)
	}
	for port, m := range p.GetPortLevelMtls() {
		if m.GetMode() == security.PeerAuthentication_MutualTLS_DISABLE {
			r.warn("peer-disable", fmt.Sprintf("spec.portLevelMtls[%d].mode", port), "use PERMISSIVE or STRICT", what)
		}
	}
}

func (r *report) lintTokens(p *security.RequestAuthentication, spec tree) {
	r.lintTargets(p.GetSelector().GetMatchLabels(), spec)
	issuers := make(map[string]int)
	for i, j := range p.GetJwtRules() {
		path := fmt.Sprintf("spec.jwtRules[%d]", i)
		if before, ok := issuers[j.GetIssuer()]; ok {
			r.warn("issuer-duplicate", path+".issuer", "merge the two", "rule %d has the same issuer; which of the two a token is held against is not defined", before)
		}
		issuers[j.GetIssuer()] = i
		if len(j.GetAudiences()) == 0 {
			r.warn("token-audience", path, "name the audiences", "accepts tokens that the issuer made for any other service")
		}
		switch uri := j.GetJwksUri(); {
		case strings.HasPrefix(uri, "http:"):
			r.warn("jwks-plaintext", path+".jwksUri", "use https", "keys that are fetched without TLS can be replaced on the way")
		case uri == "" && j.GetJwks() == "" && !strings.HasPrefix(j.GetIssuer(), "https://"):
			r.warn("jwks-nowhere", path, "write jwksUri or jwks", "there are no keys, and the issuer is no https:// URL below which they could be found: every token is refused")
		}
		if privateJWKS(j.GetJwks()) {
			r.warn("jwks-private", path+".jwks", "keep only the public keys, and replace these", "holds private or symmetric keys, which everybody who can read the resource can sign with")
		}
	}
}
