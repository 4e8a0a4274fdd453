package authz

import (
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	security "istio.io/api/security/v1beta1"
	typev1beta1 "istio.io/api/type/v1beta1"
)

// This file says what Istio's webhook refuses, and what the rules of its custom
// resource definitions (x-kubernetes-validations) refuse that concern more than
// one value; the schemas are in schema.go.

// isDryRun reports whether a policy has the annotation, with a value that is true.
func isDryRun(metadata map[string]any) bool {
	annotations, _ := metadata["annotations"].(map[string]any)
	s, _ := annotations[dryRun].(string)
	on, _ := strconv.ParseBool(s)
	return on
}

// dryRun is the annotation that makes a policy's rules shadow rules.
const dryRun = "istio.io/dry-run"

// bannedAnnotations are Istio's own; its webhook refuses resources of others that
// have them.
var bannedAnnotations = []string{"internal.istio.io/webhook-always-reject", "internal.istio.io/parents", "internal.istio.io/parent-namespace"}

// tree is a specification as it was written, without what was null. Rules of
// definitions ask whether a field is there; the message can't tell an empty list
// from none.
type tree map[string]any

func (t tree) has(field string) bool { _, ok := t[field]; return ok }

// list are the objects in a field.
func (t tree) list(field string) []tree {
	values, _ := t[field].([]any)
	objects := make([]tree, len(values))
	for i, v := range values {
		objects[i], _ = v.(map[string]any)
	}
	return objects
}

func (t tree) object(field string) tree {
	m, _ := t[field].(map[string]any)
	return m
}

func (r *report) authorizationPolicy(p *security.AuthorizationPolicy, spec tree, metadata map[string]any) {
	r.targets(p.GetSelector(), p.GetTargetRef(), p.GetTargetRefs(), spec)
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
	r.dryRun(metadata, action)
	rules := spec.list("rules")
	for i, rule := range p.GetRules() {
		path := fmt.Sprintf("spec.rules[%d]", i)
		r.rule(rule, action, path)
		for j, from := range rules[i].list("from") {
			source := from.object("source")
			if (source.has("serviceAccounts") || source.has("notServiceAccounts")) &&
				(source.has("principals") || source.has("notPrincipals") || source.has("namespaces") || source.has("notNamespaces")) {
				r.invalid(fmt.Sprintf("%s.from[%d].source", path, j), "keep one kind", "serviceAccounts cannot be combined with principals or namespaces")
			}
		}
	}
}

// dryRun checks the annotation of a policy.
func (r *report) dryRun(metadata map[string]any, action security.AuthorizationPolicy_Action) {
	annotations, _ := metadata["annotations"].(map[string]any)
	v, given := annotations[dryRun]
	if !given {
		return
	}
	path := keyPath("metadata.annotations", dryRun)
	s, _ := v.(string)
	_, err := strconv.ParseBool(s)
	switch {
	case action != security.AuthorizationPolicy_ALLOW && action != security.AuthorizationPolicy_DENY:
		r.invalid(path, "remove it", "dry run exists for ALLOW and DENY only")
	case err != nil:
		r.invalid(path, `write "true" or "false"`, "%s is not a boolean", clip(s))
	}
}

// annotations checks what concerns every kind, and all but AuthorizationPolicy.
func (r *report) annotations(metadata map[string]any, kind string) {
	annotations, _ := metadata["annotations"].(map[string]any)
	for _, name := range bannedAnnotations {
		if _, given := annotations[name]; given {
			r.invalid(keyPath("metadata.annotations", name), "remove it", "is for Istio's own use")
		}
	}
	if _, given := annotations[dryRun]; given && kind != KindAuthorizationPolicy {
		r.invalid(keyPath("metadata.annotations", dryRun), "remove it", "dry run exists for AuthorizationPolicy only")
	}
}

// targets checks what says whom a resource is about.
func (r *report) targets(s *typev1beta1.WorkloadSelector, ref *typev1beta1.PolicyTargetReference, refs []*typev1beta1.PolicyTargetReference, spec tree) {
	r.matchLabels(s)
	n := 0
	for _, field := range aboutFields {
		if spec.has(field) {
			n++
		}
	}
	if n > 1 {
		r.anyone = true
		r.invalid("spec", "keep one of them", "only one of selector, targetRef and targetRefs can be set")
	}
	if ref != nil {
		r.targetRef(ref, "spec.targetRef")
	}
	for i, ref := range refs {
		r.targetRef(ref, fmt.Sprintf("spec.targetRefs[%d]", i))
	}
}

func (r *report) targetRef(ref *typev1beta1.PolicyTargetReference, path string) {
	if ref.GetNamespace() != "" {
		r.invalid(path+".namespace", "remove it", "a target in another namespace is not accepted")
	}
	g := ref.GetGroup()
	if g == "" {
		g = "core"
	}
	switch g + "/" + ref.GetKind() {
	case "core/Service", "networking.istio.io/ServiceEntry", "gateway.networking.k8s.io/Gateway", "gateway.networking.k8s.io/GatewayClass":
	default:
		r.invalid(path, "refer to a Service, ServiceEntry, Gateway or GatewayClass", "%s is no kind that can be a target", clip(g+"/"+ref.GetKind()))
	}
}

func (r *report) matchLabels(s *typev1beta1.WorkloadSelector) {
	const path = "spec.selector.matchLabels"
	for _, name := range sorted(s.GetMatchLabels()) {
		switch {
		case name == "":
			r.invalid(path, "name the label", "has a label without a name")
		case strings.Contains(name, "*") || strings.Contains(s.GetMatchLabels()[name], "*"):
			r.invalid(keyPath(path, name), "write one selector for each value", "wildcards are not accepted in selectors")
		}
	}
}

func (r *report) rule(rule *security.Rule, action security.AuthorizationPolicy_Action, path string) {
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
	// custom says that CUSTOM policies can have it: they run before the peer's
	// and the request's identity are established.
	custom bool
}

func (r *report) source(s *security.Source, action security.AuthorizationPolicy_Action, path string) {
	r.lists(path, action, []values{
		{field: "principals", list: s.GetPrincipals()},
		{field: "notPrincipals", list: s.GetNotPrincipals()},
		{field: "requestPrincipals", list: s.GetRequestPrincipals()},
		{field: "notRequestPrincipals", list: s.GetNotRequestPrincipals()},
		{field: "namespaces", list: s.GetNamespaces()},
		{field: "notNamespaces", list: s.GetNotNamespaces()},
		{field: "serviceAccounts", list: s.GetServiceAccounts(), check: badServiceAccount},
		{field: "notServiceAccounts", list: s.GetNotServiceAccounts(), check: badServiceAccount},
		{field: "ipBlocks", list: s.GetIpBlocks(), check: badIP, custom: true},
		{field: "notIpBlocks", list: s.GetNotIpBlocks(), check: badIP, custom: true},
		{field: "remoteIpBlocks", list: s.GetRemoteIpBlocks(), check: badIP, custom: true},
		{field: "notRemoteIpBlocks", list: s.GetNotRemoteIpBlocks(), check: badIP, custom: true},
		{field: "trustDomains", list: s.GetTrustDomains(), check: badTrustDomain},
		{field: "notTrustDomains", list: s.GetNotTrustDomains(), check: badTrustDomain},
	})
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
		if action == security.AuthorizationPolicy_CUSTOM && !f.custom {
			r.invalid(at, "use it in an ALLOW or DENY policy", "is not accepted in CUSTOM policies")
		}
	}
	if empty && !r.refused(path) {
		r.invalid(path, "set a field, or leave the whole entry out to match anything", "must not be empty")
	}
}

// conditionKeys are the keys of conditions. Those that take a name in brackets
// are told by how they begin, as in Istio, which therefore takes
// "request.headersX[a]" too.
var conditionKeys = []struct {
	key      string
	brackets bool
	check    func(string) string
	most     int // values; 0 is no bound
}{
	{key: "request.headers", brackets: true},
	{key: "request.auth.claims", brackets: true},
	{key: "experimental.envoy.filters.", brackets: true},
	{key: "source.ip", check: badIP},
	{key: "remote.ip", check: badIP},
	{key: "source.namespace"},
	{key: "source.principal"},
	{key: "source.serviceAccount", check: badServiceAccount, most: 16},
	{key: "source.trustDomain", check: badWildcard},
	{key: "request.auth.principal"},
	{key: "request.auth.audiences"},
	{key: "request.auth.presenter"},
	{key: "destination.ip", check: badIP},
	{key: "destination.port", check: badPort},
	{key: "connection.sni"},
}

func (r *report) condition(c *security.Condition, action security.AuthorizationPolicy_Action, path string) {
	key := c.GetKey()
	if key == "" {
		if r.refused(path + ".key") {
			return
		}
		r.invalid(path+".key", "write one of the condition keys", "must not be empty")
		return
	}
	if len(c.GetValues()) == 0 && len(c.GetNotValues()) == 0 {
		r.invalid(path, "write at least one of them", "has neither values nor notValues")
	}
	// CUSTOM policies are asked before the peer's and the request's identity are
	// established.
	if action == security.AuthorizationPolicy_CUSTOM && (strings.HasPrefix(key, "request.auth.") ||
		slices.Contains([]string{"source.namespace", "source.serviceAccount", "source.trustDomain", "source.principal"}, key)) {
		r.invalid(path+".key", "use it in an ALLOW or DENY policy", "is not accepted in CUSTOM policies")
	}
	for _, k := range conditionKeys {
		if key != k.key && !(k.brackets && strings.HasPrefix(key, k.key)) {
			continue
		}
		if open := strings.IndexByte(key, '['); k.brackets && !(strings.HasSuffix(key, "]") && open > 0 && open < len(key)-2) {
			r.invalid(path+".key", "write it as "+k.key+"[NAME]", "%s has no name in brackets", clip(key))
		}
		for _, f := range []values{{field: "values", list: c.GetValues()}, {field: "notValues", list: c.GetNotValues()}} {
			if k.most > 0 && len(f.list) > k.most {
				r.invalid(path+"."+f.field, "add another condition or rule", "has %d values, at most %d are accepted", len(f.list), k.most)
			}
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
	if len(c.GetValues())+len(c.GetNotValues()) > 0 {
		r.invalid(path+".key", "write one of the condition keys", "%s is no attribute that conditions can read", clip(key))
	}
}

func (r *report) peerAuthentication(p *security.PeerAuthentication, spec tree) {
	r.matchLabels(p.GetSelector())
	if spec.has("portLevelMtls") && len(p.GetSelector().GetMatchLabels()) == 0 {
		r.invalid("spec.portLevelMtls", "add a selector with labels", "modes by port need a selector")
	}
}

func (r *report) requestAuthentication(p *security.RequestAuthentication, spec tree) {
	r.targets(p.GetSelector(), p.GetTargetRef(), p.GetTargetRefs(), spec)
	rules := spec.list("jwtRules")
	for i, j := range p.GetJwtRules() {
		path := fmt.Sprintf("spec.jwtRules[%d]", i)
		if j.GetIssuer() == "" && j.GetJwksUri() == "" {
			r.invalid(path, "write the issuer", "has neither issuer nor jwksUri")
		}
		n := 0
		for _, field := range []string{"jwksUri", "jwks_uri", "jwks"} {
			if rules[i].has(field) {
				n++
			}
		}
		if n > 1 {
			r.invalid(path, "keep one of them", "only one of jwks and jwksUri can be set")
		}
		if v := j.GetJwksUri(); v != "" {
			if u, err := url.ParseRequestURI(v); err != nil || u.Scheme != "http" && u.Scheme != "https" || badURLPort(u) {
				r.invalid(path+".jwksUri", "write an http:// or https:// URL", "%s is no such URL", clip(v))
			}
		}
		if v := j.GetJwks(); v != "" {
			if bad := badJWKS(v); bad != "" {
				r.invalid(path+".jwks", "write a JSON Web Key Set", "%s", bad)
			}
		}
		if d := j.GetTimeout(); d != nil {
			if t := d.AsDuration(); t < time.Millisecond || t%time.Millisecond != 0 {
				r.invalid(path+".timeout", "write it in whole milliseconds", "%s is less than 1ms, or not in whole milliseconds", t)
			}
		}
	}
}

// badURLPort reports whether a URL has a port that Istio can't read.
func badURLPort(u *url.URL) bool {
	_, err := strconv.Atoi(u.Port())
	return u.Port() != "" && err != nil
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
	if strings.Contains(v, "/") {
		return "has a slash"
	}
	return badWildcard(v)
}

func badWildcard(v string) string {
	if strings.Count(v, "*") > 1 || strings.Contains(strings.Trim(v, "*"), "*") {
		return "may have one * at its start or end"
	}
	return ""
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
