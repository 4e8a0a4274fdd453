package authz

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	security "istio.io/api/security/v1beta1"
	typev1beta1 "istio.io/api/type/v1beta1"
)

// This file says what Istio's admission refuses (its webhook and the schema of
// its custom resource definitions, with what verified against the real one
// corrected), and what it takes that is not enforced here yet.

// dryRun is the annotation that makes a policy's rules shadow rules.
const dryRun = "istio.io/dry-run"

func (r *report) authorizationPolicy(p *security.AuthorizationPolicy, metadata map[string]any) {
	r.selector(p.GetSelector(), p.GetTargetRef(), p.GetTargetRefs())
	action := p.GetAction()
	if len(p.GetRules()) == 0 && action == security.AuthorizationPolicy_DENY {
		r.invalid("spec.rules", "add an empty rule {} to deny everything", "a DENY policy without rules never matches")
	}
	if len(p.GetRules()) == 0 && action == security.AuthorizationPolicy_CUSTOM {
		r.invalid("spec.rules", "add an empty rule {} to ask about everything", "a CUSTOM policy without rules never matches")
	}
	switch {
	case action == security.AuthorizationPolicy_CUSTOM && p.GetProvider().GetName() == "":
		r.invalid("spec.provider.name", "name an extension provider", "a CUSTOM policy needs a provider")
	case action != security.AuthorizationPolicy_CUSTOM && p.GetProvider() != nil:
		r.invalid("spec.provider", "remove it or use action CUSTOM", "only a CUSTOM policy has a provider")
	}
	if action == security.AuthorizationPolicy_CUSTOM || action == security.AuthorizationPolicy_AUDIT {
		r.unsupported("spec.action", "action "+action.String())
	}
	r.annotations(metadata, action)
	if n := len(p.GetRules()); n > 512 {
		r.invalid("spec.rules", "split the policy", "has %d rules, at most 512 are accepted", n)
	}
	for i, rule := range p.GetRules() {
		r.rule(rule, action, fmt.Sprintf("spec.rules[%d]", i))
	}
}

func (r *report) annotations(metadata map[string]any, action security.AuthorizationPolicy_Action) {
	annotations, _ := metadata["annotations"].(map[string]any)
	v, given := annotations[dryRun]
	if !given {
		return
	}
	path := keyPath("metadata.annotations", dryRun)
	s, _ := v.(string)
	on, err := strconv.ParseBool(s)
	switch {
	case err != nil:
		r.invalid(path, `write "true" or "false"`, "%s is not a boolean", clip(s))
	case action != security.AuthorizationPolicy_ALLOW && action != security.AuthorizationPolicy_DENY:
		r.invalid(path, "remove it", "dry run exists for ALLOW and DENY only")
	case on:
		r.unsupported(path, "dry run")
	}
}

func (r *report) selector(s *typev1beta1.WorkloadSelector, ref *typev1beta1.PolicyTargetReference, refs []*typev1beta1.PolicyTargetReference) {
	r.matchLabels(s)
	n := 0
	for _, set := range []bool{s != nil, ref != nil, len(refs) > 0} {
		if set {
			n++
		}
	}
	if n > 1 {
		r.invalid("spec", "keep one of them", "only one of selector, targetRef and targetRefs can be set")
	}
	if len(refs) > 16 {
		r.invalid("spec.targetRefs", "split the resource", "has %d references, at most 16 are accepted", len(refs))
	}
	if ref != nil {
		r.targetRef(ref, "spec.targetRef")
	}
	for i, ref := range refs {
		r.targetRef(ref, fmt.Sprintf("spec.targetRefs[%d]", i))
	}
}

func (r *report) targetRef(ref *typev1beta1.PolicyTargetReference, path string) {
	if ref.GetName() == "" {
		r.invalid(path+".name", "name the target", "must not be empty")
	}
	if ref.GetNamespace() != "" {
		r.invalid(path+".namespace", "remove it", "a target in another namespace is not accepted")
	}
	g := ref.GetGroup()
	if g == "" {
		g = "core"
	}
	switch g + "/" + ref.GetKind() {
	case "core/Service", "networking.istio.io/ServiceEntry", "gateway.networking.k8s.io/Gateway", "gateway.networking.k8s.io/GatewayClass":
		r.unsupported(path, "a target reference")
	default:
		r.invalid(path, "refer to a Service, ServiceEntry, Gateway or GatewayClass", "%s is no kind that can be a target", clip(g+"/"+ref.GetKind()))
	}
}

func (r *report) matchLabels(s *typev1beta1.WorkloadSelector) {
	const path = "spec.selector.matchLabels"
	labels := s.GetMatchLabels()
	if len(labels) > 4096 {
		r.invalid(path, "remove some", "has %d labels, at most 4096 are accepted", len(labels))
	}
	for _, name := range sorted(labels) {
		value, at := labels[name], keyPath(path, name)
		switch {
		case name == "":
			r.invalid(path, "name the label", "has a label without a name")
		case strings.Contains(name, "*") || strings.Contains(value, "*"):
			r.invalid(at, "write one selector for each value", "wildcards are not accepted in selectors")
		case len(value) > 63:
			r.invalid(at, "no pod can have it; shorten it", "is longer than 63 characters")
		}
	}
}

func (r *report) rule(rule *security.Rule, action security.AuthorizationPolicy_Action, path string) {
	if n := len(rule.GetFrom()); n > 512 {
		r.invalid(path+".from", "split the rule", "has %d sources, at most 512 are accepted", n)
	}
	for i, from := range rule.GetFrom() {
		r.source(from.GetSource(), action, fmt.Sprintf("%s.from[%d].source", path, i))
	}
	for i, to := range rule.GetTo() {
		r.operation(to.GetOperation(), fmt.Sprintf("%s.to[%d].operation", path, i))
	}
	for i, when := range rule.GetWhen() {
		r.condition(when, action, fmt.Sprintf("%s.when[%d]", path, i))
	}
}

// values is one list of a source or an operation.
type values struct {
	field string
	list  []string
	// check tells what is wrong with one value, or nothing.
	check func(string) string
	// unsupported is what Istio takes there and is not enforced yet, or empty.
	unsupported string
	// custom says that CUSTOM policies can have it: they run before the peer's
	// and the request's identity are established.
	custom bool
}

func (r *report) source(s *security.Source, action security.AuthorizationPolicy_Action, path string) {
	r.lists(path, action, []values{
		{field: "principals", list: s.GetPrincipals()},
		{field: "notPrincipals", list: s.GetNotPrincipals()},
		{field: "requestPrincipals", list: s.GetRequestPrincipals(), unsupported: "requestPrincipals"},
		{field: "notRequestPrincipals", list: s.GetNotRequestPrincipals(), unsupported: "notRequestPrincipals"},
		{field: "namespaces", list: s.GetNamespaces()},
		{field: "notNamespaces", list: s.GetNotNamespaces()},
		{field: "serviceAccounts", list: s.GetServiceAccounts(), check: badServiceAccount, unsupported: "serviceAccounts"},
		{field: "notServiceAccounts", list: s.GetNotServiceAccounts(), check: badServiceAccount, unsupported: "notServiceAccounts"},
		{field: "ipBlocks", list: s.GetIpBlocks(), check: badIP, custom: true},
		{field: "notIpBlocks", list: s.GetNotIpBlocks(), check: badIP, custom: true},
		{field: "remoteIpBlocks", list: s.GetRemoteIpBlocks(), check: badIP, unsupported: "remoteIpBlocks", custom: true},
		{field: "notRemoteIpBlocks", list: s.GetNotRemoteIpBlocks(), check: badIP, unsupported: "notRemoteIpBlocks", custom: true},
		{field: "trustDomains", list: s.GetTrustDomains(), check: badTrustDomain, unsupported: "trustDomains"},
		{field: "notTrustDomains", list: s.GetNotTrustDomains(), check: badTrustDomain, unsupported: "notTrustDomains"},
	})
	accounts := len(s.GetServiceAccounts()) + len(s.GetNotServiceAccounts())
	others := len(s.GetPrincipals()) + len(s.GetNotPrincipals()) + len(s.GetNamespaces()) + len(s.GetNotNamespaces())
	if accounts > 0 && others > 0 {
		r.invalid(path, "keep one kind", "serviceAccounts cannot be combined with principals or namespaces")
	}
	if len(s.GetServiceAccounts()) > 16 || len(s.GetNotServiceAccounts()) > 16 {
		r.invalid(path, "add another source", "at most 16 serviceAccounts are accepted")
	}
	for _, f := range []values{{field: "ipBlocks", list: s.GetIpBlocks()}, {field: "notIpBlocks", list: s.GetNotIpBlocks()}} {
		for i, v := range f.list {
			if strings.Contains(v, "%") && badIP(v) == "" {
				r.unsupported(fmt.Sprintf("%s.%s[%d]", path, f.field, i), "an address with a zone")
			}
		}
	}
}

func (r *report) operation(o *security.Operation, path string) {
	r.lists(path, security.AuthorizationPolicy_ALLOW, []values{
		{field: "hosts", list: o.GetHosts()},
		{field: "notHosts", list: o.GetNotHosts()},
		{field: "ports", list: o.GetPorts(), check: badPort},
		{field: "notPorts", list: o.GetNotPorts(), check: badPort},
		{field: "methods", list: o.GetMethods()},
		{field: "notMethods", list: o.GetNotMethods()},
		{field: "paths", list: o.GetPaths(), check: badPath},
		{field: "notPaths", list: o.GetNotPaths(), check: badPath},
	})
	for _, f := range []values{{field: "paths", list: o.GetPaths()}, {field: "notPaths", list: o.GetNotPaths()}} {
		for i, v := range f.list {
			if hasTemplate(v) && badPath(v) == "" {
				r.unsupported(fmt.Sprintf("%s.%s[%d]", path, f.field, i), "a path template")
			}
		}
	}
}

// lists checks all lists of a source or an operation.
func (r *report) lists(path string, action security.AuthorizationPolicy_Action, all []values) {
	empty := true
	for _, f := range all {
		at := path + "." + f.field
		empty = empty && len(f.list) == 0
		for i, v := range f.list {
			if v == "" {
				r.invalid(fmt.Sprintf("%s[%d]", at, i), "write a value, or * for any", "must not be empty")
			} else if f.check != nil {
				if bad := f.check(v); bad != "" {
					r.invalid(fmt.Sprintf("%s[%d]", at, i), "correct the value", "%s %s", clip(v), bad)
				}
			}
		}
		if len(f.list) == 0 {
			continue
		}
		if f.unsupported != "" {
			r.unsupported(at, f.unsupported)
		}
		if action == security.AuthorizationPolicy_CUSTOM && !f.custom {
			r.invalid(at, "use it in an ALLOW or DENY policy", "is not accepted in CUSTOM policies")
		}
	}
	if empty {
		r.invalid(path, "set a field, or leave the whole entry out to match anything", "must not be empty")
	}
}

// conditionKeys are the keys of conditions: those with a name in brackets end
// in "[", which as in Istio are recognised by how they begin.
var conditionKeys = []struct {
	key    string
	check  func(string) string
	custom bool
}{
	{"request.headers[", nil, true},
	{"request.experimental.inline.headers[", nil, true},
	{"request.auth.claims[", nil, false},
	{"experimental.envoy.filters.[", nil, true},
	{"source.ip", badIP, true},
	{"remote.ip", badIP, true},
	{"source.namespace", nil, false},
	{"source.principal", nil, false},
	{"source.serviceAccount", badServiceAccount, false},
	{"source.trustDomain", nil, false},
	{"request.auth.principal", nil, false},
	{"request.auth.audiences", nil, false},
	{"request.auth.presenter", nil, false},
	{"destination.ip", badIP, true},
	{"destination.port", badPort, true},
	{"connection.sni", nil, true},
}

func (r *report) condition(c *security.Condition, action security.AuthorizationPolicy_Action, path string) {
	r.unsupported(path, "a condition (when)")
	if c.GetKey() == "" {
		r.invalid(path+".key", "write one of the condition keys", "must not be empty")
		return
	}
	if len(c.GetValues()) == 0 && len(c.GetNotValues()) == 0 {
		r.invalid(path, "write at least one of them", "has neither values nor notValues")
	}
	for _, k := range conditionKeys {
		stem, bracket := strings.CutSuffix(k.key, "[")
		if c.GetKey() != stem && !(bracket && strings.HasPrefix(c.GetKey(), stem)) {
			continue
		}
		if open := strings.IndexByte(c.GetKey(), '['); bracket &&
			!(strings.HasSuffix(c.GetKey(), "]") && open > 0 && open < len(c.GetKey())-2) {
			r.invalid(path+".key", "write it as "+stem+"[NAME]", "%s has no name in brackets", clip(c.GetKey()))
		}
		if action == security.AuthorizationPolicy_CUSTOM && !k.custom {
			r.invalid(path+".key", "use it in an ALLOW or DENY policy", "is not accepted in CUSTOM policies")
		}
		for _, f := range []values{{field: "values", list: c.GetValues()}, {field: "notValues", list: c.GetNotValues()}} {
			for i, v := range f.list {
				at := fmt.Sprintf("%s.%s[%d]", path, f.field, i)
				if v == "" {
					r.invalid(at, "write a value, or * for any", "must not be empty")
				} else if k.check != nil && k.check(v) != "" {
					r.invalid(at, "correct the value", "%s %s", clip(v), k.check(v))
				}
			}
		}
		return
	}
	r.invalid(path+".key", "write one of the condition keys", "%s is no attribute that conditions can read", clip(c.GetKey()))
}

func (r *report) peerAuthentication(p *security.PeerAuthentication) {
	r.matchLabels(p.GetSelector())
	ports := p.GetPortLevelMtls()
	if _, given := r.at.in("spec.portLevelMtls"); given && len(ports) == 0 && !r.refused("spec") {
		r.invalid("spec.portLevelMtls", "name a port or remove it", "must not be empty")
	}
	if len(ports) > 0 && len(p.GetSelector().GetMatchLabels()) == 0 {
		r.invalid("spec.portLevelMtls", "add a selector with labels", "modes by port need a selector")
	}
	for _, port := range slices.Sorted(maps.Keys(ports)) {
		if port == 0 || port > 65535 {
			r.invalid(fmt.Sprintf("spec.portLevelMtls[%d]", port), "write a port from 1 to 65535", "is not a port")
		}
	}
}

func (r *report) requestAuthentication(p *security.RequestAuthentication) {
	r.selector(p.GetSelector(), p.GetTargetRef(), p.GetTargetRefs())
	for i, j := range p.GetJwtRules() {
		if j.GetIssuer() == "" {
			r.invalid(fmt.Sprintf("spec.jwtRules[%d].issuer", i), "write the issuer", "must not be empty")
		}
	}
	r.unsupported("kind", "RequestAuthentication")
}

func badIP(v string) string {
	var err error
	if strings.Contains(v, "/") {
		_, err = netip.ParsePrefix(v)
	} else {
		_, err = netip.ParseAddr(v)
	}
	if err != nil {
		return "is neither an IP address nor a CIDR block"
	}
	return ""
}

func badPort(v string) string {
	if _, err := strconv.ParseUint(v, 10, 16); err != nil {
		return "is not a port from 0 to 65535"
	}
	return ""
}

func badServiceAccount(v string) string {
	ns, name, two := strings.Cut(v, "/")
	switch {
	case strings.Contains(v, "*"):
		return "has a wildcard"
	case len(v) > 320:
		return "is longer than 320 characters"
	case strings.Contains(name, "/") || ns == "" || two && name == "":
		return "is neither NAME nor NAMESPACE/NAME"
	}
	return ""
}

func badTrustDomain(v string) string {
	switch {
	case strings.Contains(v, "/"):
		return "has a slash"
	case strings.Count(v, "*") > 1 || strings.Contains(strings.Trim(v, "*"), "*"):
		return "may have one * at its start or end"
	}
	return ""
}

func hasTemplate(v string) bool {
	return strings.Contains(v, "{*}") || strings.Contains(v, "{**}")
}

// badPath follows Istio's CheckValidPathTemplate, which concerns every path: a
// brace outside of a template is refused everywhere.
func badPath(v string) string {
	template, last := hasTemplate(v), false
	for s := range strings.SplitSeq(strings.Trim(v, "/"), "/") {
		switch {
		case s == "{*}" || s == "{**}":
			if last {
				return "has a template after {**}"
			}
			last = s == "{**}"
		case strings.ContainsAny(s, "{}"):
			return "has a brace that is no {*} or {**} of its own segment"
		case template && !literal(s):
			return "has a template beside a segment that is empty or not of the characters of a URL path"
		}
	}
	return ""
}

// literal reports whether s is one or more characters that RFC 3986 allows in a
// path segment.
func literal(s string) bool {
	for i := range len(s) {
		if c := s[i]; !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-._~%!$&'()+,;:@=", c) >= 0) {
			return false
		}
	}
	return s != ""
}
