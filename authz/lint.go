package authz

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	security "istio.io/api/security/v1beta1"
)

// Text is policy text and where it came from.
type Text struct {
	Origin string
	Data   []byte
}

// Lint reads policies as [Parse] does and says all that their author should know,
// ordered by origin and line:
//
//   - errors: what cannot be read, or Istio's admission refuses, and nothing else;
//   - dangers: what admission accepts and crashes Envoy, or Envoy refuses to load;
//   - warnings: what is decided as written, and likely not as it was meant: it
//     never matches, matches more than it seems to, or can be got round. Each has
//     a Code.
//
// Some warnings are about several resources together, such as a policy that reads
// tokens where none are verified: they hold for the texts that are given.
func Lint(texts []Text, o Options) []Problem {
	l := &lint{options: o, root: o.root()}
	var problems []Problem
	for _, t := range texts {
		_, ps := parse(t.Origin, t.Data, l)
		problems = append(problems, ps...)
	}
	problems = append(problems, l.together()...)
	problems = slices.DeleteFunc(problems, func(p Problem) bool {
		return p.Severity == SeverityInfo
	})
	slices.SortStableFunc(problems, func(a, b Problem) int {
		return cmp.Or(strings.Compare(a.Origin, b.Origin), a.Line-b.Line)
	})
	return problems
}

// lint is what Lint wants to know of resources beyond their own problems.
type lint struct {
	options   Options
	root      string
	resources []linted
}

// linted is a resource, as far as others are concerned.
type linted struct {
	key
	origin   string
	line     int
	selector []label
	// tokens says that a RequestAuthentication verifies some, or that a policy
	// reads what they say; the field that does is tokenField.
	tokens     bool
	tokenField string
	tokenLine  int
	// provider is whom a CUSTOM policy asks.
	provider string
}

// about names what a resource selects, for comparing.
func (r linted) about() string { return fmt.Sprint(r.namespace, r.selector) }

// together warns of what no resource shows alone.
func (l *lint) together() (problems []Problem) {
	warn := func(r linted, line int, field, code, fix, format string, args ...any) {
		problems = append(problems, Problem{
			Origin: r.origin, Line: line, Resource: r.id(), Field: field, Severity: SeverityWarning, Code: code,
			Message: fmt.Sprintf(format, args...), Fix: fix,
		})
	}
	first := make(map[key]linted)
	peers := make(map[string]linted)
	verified, required := make(map[string]bool), make(map[string]bool)
	for _, r := range l.resources {
		verified[r.namespace] = verified[r.namespace] || r.tokens && r.kind == KindRequestAuthentication
		required[r.namespace] = required[r.namespace] || r.tokens && r.kind == KindAuthorizationPolicy
	}
	for _, r := range l.resources {
		if before, ok := first[r.key]; ok {
			warn(r, r.line, "", "duplicate", "keep one of them", "is also at %s:%d; in a cluster the one that is applied last replaces the other, and the agent keeps the last good version of a folder's", before.origin, before.line)
			continue
		}
		first[r.key] = r
		switch r.kind {
		case KindPeerAuthentication:
			if before, ok := peers[r.about()]; ok {
				warn(r, r.line, "", "peer-duplicate", "merge the two", "%s selects the same workloads; only the oldest resource counts, nothing of the others", before.id())
			} else {
				peers[r.about()] = r
			}
		case KindRequestAuthentication:
			if !required[r.namespace] && !required[l.root] && !(r.namespace == l.root && anyTrue(required)) {
				warn(r, r.line, "", "token-optional", "add an AuthorizationPolicy that demands requestPrincipals", "refuses bad tokens, but a request without a token passes, and no AuthorizationPolicy here demands one")
			}
		case KindAuthorizationPolicy:
			for _, o := range l.resources {
				if r.provider != "" && o.provider != "" && o.provider != r.provider && o.key.compare(r.key) < 0 && l.meet(o, r) {
					warn(r, r.line, "spec.provider.name", "several-providers", "use one provider for a workload", "%s asks another provider, and may select the same workloads: Istio by default denies what such policies match", o.id())
					break
				}
			}
			if r.tokens && !verified[r.namespace] && !verified[l.root] && !(r.namespace == l.root && anyTrue(verified)) {
				warn(r, r.tokenLine, r.tokenField, "token-unverified", "add a RequestAuthentication", "reads what a token says, and no RequestAuthentication here verifies one: it never matches, its not-form always")
			}
		}
	}
	return problems
}

// meet reports whether two policies can select the same workload: no label that
// both ask for has two values.
func (l *lint) meet(a, b linted) bool {
	if a.namespace != b.namespace && a.namespace != l.root && b.namespace != l.root {
		return false
	}
	for _, x := range a.selector {
		for _, y := range b.selector {
			if x.name == y.name && x.value != y.value {
				return false
			}
		}
	}
	return true
}

func anyTrue(m map[string]bool) bool {
	for _, v := range m {
		if v {
			return true
		}
	}
	return false
}

// remember keeps a resource for together.
func (r *report) remember(res *resource, message any) {
	e := linted{key: res.key, origin: res.origin, line: res.line, selector: res.selector}
	switch m := message.(type) {
	case *security.RequestAuthentication:
		e.tokens = len(m.GetJwtRules()) > 0
	case *security.AuthorizationPolicy:
		e.provider = m.GetProvider().GetName()
		for i, rule := range m.GetRules() {
			for _, c := range clauses(rule, fmt.Sprintf("spec.rules[%d]", i)) {
				if !e.tokens && c.token {
					e.tokens, e.tokenField, e.tokenLine = true, c.path, r.at.line(c.path)
				}
			}
		}
	}
	r.lint.resources = append(r.lint.resources, e)
}

// clause is the values of one field of a rule.
type clause struct {
	path   string // of the list
	name   string // the attribute: the field's name without "not", or the condition's key
	not    bool
	values []string
	// http says that a bare connection has no such attribute; token that it is
	// what a token says; peer that it is what the peer's certificate says.
	http, token, peer bool
	// wildcards says that a star at the start or the end is one.
	wildcards bool
	when      bool
}

// clauses are the fields of a rule that have values.
func clauses(rule *security.Rule, path string) (all []clause) {
	for i, from := range rule.GetFrom() {
		all = append(all, sourceClauses(from.GetSource(), fmt.Sprintf("%s.from[%d].source", path, i))...)
	}
	for i, to := range rule.GetTo() {
		all = append(all, operationClauses(to.GetOperation(), fmt.Sprintf("%s.to[%d].operation", path, i))...)
	}
	for i, when := range rule.GetWhen() {
		all = append(all, conditionClauses(when, fmt.Sprintf("%s.when[%d]", path, i))...)
	}
	return all
}

// pair makes the clauses of a field and of its not-form.
func pair(path string, c clause, values, not []string) (cs []clause) {
	for _, c.not = range []bool{false, true} {
		c.values, c.path = values, path+"."+c.name
		if c.not {
			c.values, c.path = not, path+".not"+strings.ToUpper(c.name[:1])+c.name[1:]
		}
		if len(c.values) > 0 {
			cs = append(cs, c)
		}
	}
	return cs
}

func sourceClauses(s *security.Source, path string) []clause {
	return slices.Concat(
		pair(path, clause{name: "principals", peer: true, wildcards: true}, s.GetPrincipals(), s.GetNotPrincipals()),
		pair(path, clause{name: "requestPrincipals", token: true, http: true, wildcards: true}, s.GetRequestPrincipals(), s.GetNotRequestPrincipals()),
		pair(path, clause{name: "namespaces", peer: true}, s.GetNamespaces(), s.GetNotNamespaces()),
		pair(path, clause{name: "serviceAccounts", peer: true}, s.GetServiceAccounts(), s.GetNotServiceAccounts()),
		pair(path, clause{name: "ipBlocks"}, s.GetIpBlocks(), s.GetNotIpBlocks()),
		pair(path, clause{name: "remoteIpBlocks"}, s.GetRemoteIpBlocks(), s.GetNotRemoteIpBlocks()),
		pair(path, clause{name: "trustDomains", peer: true}, s.GetTrustDomains(), s.GetNotTrustDomains()),
	)
}

func operationClauses(o *security.Operation, path string) []clause {
	return slices.Concat(
		pair(path, clause{name: "hosts", http: true, wildcards: true}, o.GetHosts(), o.GetNotHosts()),
		pair(path, clause{name: "ports"}, o.GetPorts(), o.GetNotPorts()),
		pair(path, clause{name: "methods", http: true, wildcards: true}, o.GetMethods(), o.GetNotMethods()),
		pair(path, clause{name: "paths", http: true, wildcards: true}, o.GetPaths(), o.GetNotPaths()),
	)
}

func conditionClauses(w *security.Condition, path string) (cs []clause) {
	key := w.GetKey()
	c := clause{name: key, when: true}
	c.token = strings.HasPrefix(key, "request.auth.")
	c.http = c.token || strings.HasPrefix(key, "request.headers")
	c.peer = slices.Contains([]string{"source.principal", "source.namespace", "source.serviceAccount", "source.trustDomain"}, key)
	c.wildcards = c.http || key == "source.principal" || key == "connection.sni" || strings.HasPrefix(key, "experimental.")
	for _, c.not = range []bool{false, true} {
		c.values, c.path = w.GetValues(), path+".values"
		if c.not {
			c.values, c.path = w.GetNotValues(), path+".notValues"
		}
		if len(c.values) > 0 {
			cs = append(cs, c)
		}
	}
	return cs
}

// loadable finds what Envoy cannot load. It is asked about every policy, not only
// by Lint.
func (r *report) loadable(p *security.AuthorizationPolicy) {
	for i, rule := range p.GetRules() {
		for _, c := range clauses(rule, fmt.Sprintf("spec.rules[%d]", i)) {
			key := strings.TrimSuffix(strings.TrimSuffix(c.path, ".values"), ".notValues") + ".key"
			switch {
			case c.name == "paths" && !c.when:
				for j, v := range c.values {
					if hasTemplate(v) && (!strings.HasPrefix(v, "/") || strings.Contains(v, "//")) {
						r.danger("template-crash", fmt.Sprintf("%s[%d]", c.path, j), "begin it with one / and write no //", "Envoy crashes on the template %s, which Istio's admission accepts", clip(v))
					}
				}
			case strings.HasPrefix(c.name, "request.auth.claims[") && strings.Contains(c.name, "[]") && nested(c.name):
				r.danger("claim-refused", key, "name every claim of the path", "Envoy refuses a claim without a name, which Istio's admission accepts, and with it the whole configuration")
			case strings.HasPrefix(c.name, "request.headers[") && strings.ContainsAny(c.name, "\x00\r\n"):
				r.danger("header-refused", key, "correct the name", "Envoy refuses a header with such a name, which Istio's admission accepts, and with it the whole configuration")
			}
		}
	}
}

// loadableTokens is loadable for the places of tokens and their keys.
func (r *report) loadableTokens(p *security.RequestAuthentication) {
	header := func(path, value string) {
		if strings.ContainsAny(value, "\x00\r\n") {
			r.danger("header-refused", path, "correct the value", "Envoy refuses a header with such a name or prefix, which Istio's admission accepts, and with it the whole configuration")
		}
	}
	for i, j := range p.GetJwtRules() {
		path := fmt.Sprintf("spec.jwtRules[%d]", i)
		if text := j.GetJwks(); text != "" && !usableJWKS(text) {
			r.danger("jwks-refused", path+".jwks", "write a key set with a public key", "Envoy refuses a key set without one key that it can use, which Istio's admission accepts, and with it the whole configuration")
		}
		header(path+".outputPayloadToHeader", j.GetOutputPayloadToHeader())
		for n, h := range j.GetFromHeaders() {
			header(fmt.Sprintf("%s.fromHeaders[%d].name", path, n), h.GetName())
			header(fmt.Sprintf("%s.fromHeaders[%d].prefix", path, n), h.GetPrefix())
		}
	}
}

// nested reports whether what follows the claims' key is a sequence of names in
// brackets; else Istio takes all of it for one name.
func nested(key string) bool {
	rest := strings.TrimPrefix(key, "request.auth.claims")
	for rest != "" {
		end := strings.IndexByte(rest, ']')
		if rest[0] != '[' || end < 0 || strings.IndexByte(rest[1:end], '[') >= 0 {
			return false
		}
		rest = rest[end+1:]
	}
	return true
}
