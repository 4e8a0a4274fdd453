package explain

import (
	"fmt"
	"slices"
	"strings"

	security "istio.io/api/security/v1beta1"

	"github.com/signet-mesh/signet/authz"
)

// field is one field of a source or an operation and its not-form.
type field struct {
	name, not string
	// of is the attribute that it reads, as a word for people.
	of attribute
}

// attribute is what clauses read of a request; those of one attribute are held
// against the same value. Headers, claims and metadata have their name behind it.
type attribute string

const (
	ofPrincipal   attribute = "principal"
	ofIdentity    attribute = "request principal"
	ofSource      attribute = "source address"
	ofRemote      attribute = "remote address"
	ofDestination attribute = "destination address"
	ofHost        attribute = "host"
	ofMethod      attribute = "method"
	ofPath        attribute = "path"
	ofPort        attribute = "port"
	ofSNI         attribute = "server name"
	ofHeader      attribute = "header "
	ofClaim       attribute = "claim "
	ofMetadata    attribute = "metadata "
	ofNothing     attribute = "" // a key that only begins like a known one
)

var sourceFields = []field{
	{"principals", "notPrincipals", ofPrincipal},
	{"namespaces", "notNamespaces", ofPrincipal},
	{"serviceAccounts", "notServiceAccounts", ofPrincipal},
	{"trustDomains", "notTrustDomains", ofPrincipal},
	{"ipBlocks", "notIpBlocks", ofSource},
	{"remoteIpBlocks", "notRemoteIpBlocks", ofRemote},
	{"requestPrincipals", "notRequestPrincipals", ofIdentity},
}

var operationFields = []field{
	{"hosts", "notHosts", ofHost}, {"ports", "notPorts", ofPort},
	{"methods", "notMethods", ofMethod}, {"paths", "notPaths", ofPath},
}

// list is the list of a field, by which it can be changed.
func sourceList(s *security.Source, name string) *[]string {
	switch name {
	case "principals":
		return &s.Principals
	case "notPrincipals":
		return &s.NotPrincipals
	case "namespaces":
		return &s.Namespaces
	case "notNamespaces":
		return &s.NotNamespaces
	case "serviceAccounts":
		return &s.ServiceAccounts
	case "notServiceAccounts":
		return &s.NotServiceAccounts
	case "trustDomains":
		return &s.TrustDomains
	case "notTrustDomains":
		return &s.NotTrustDomains
	case "ipBlocks":
		return &s.IpBlocks
	case "notIpBlocks":
		return &s.NotIpBlocks
	case "remoteIpBlocks":
		return &s.RemoteIpBlocks
	case "notRemoteIpBlocks":
		return &s.NotRemoteIpBlocks
	case "requestPrincipals":
		return &s.RequestPrincipals
	case "notRequestPrincipals":
		return &s.NotRequestPrincipals
	}
	panic("explain: no field " + name)
}

func operationList(o *security.Operation, name string) *[]string {
	switch name {
	case "hosts":
		return &o.Hosts
	case "notHosts":
		return &o.NotHosts
	case "ports":
		return &o.Ports
	case "notPorts":
		return &o.NotPorts
	case "methods":
		return &o.Methods
	case "notMethods":
		return &o.NotMethods
	case "paths":
		return &o.Paths
	case "notPaths":
		return &o.NotPaths
	}
	panic("explain: no field " + name)
}

// where is the part of a rule that a clause stands in.
type where uint8

const (
	inFrom where = iota
	inTo
	inWhen
)

// clause is one list of values of a rule: one form of a field or of a condition.
type clause struct {
	in    where
	entry int
	// name is the field's, or the condition's key; list is the list's name, which
	// says whether it is the not-form.
	name, list string
	not        bool
	of         attribute
	values     []string
}

// path is where the clause stands in its rule.
func (c *clause) path() string {
	switch c.in {
	case inFrom:
		return fmt.Sprintf("from[%d].source.%s", c.entry, c.list)
	case inTo:
		return fmt.Sprintf("to[%d].operation.%s", c.entry, c.list)
	}
	return fmt.Sprintf("when[%d].%s", c.entry, c.list)
}

// in is the clause's list in a rule that has it.
func (c *clause) listIn(r *security.Rule) *[]string {
	switch c.in {
	case inFrom:
		return sourceList(r.From[c.entry].Source, c.list)
	case inTo:
		return operationList(r.To[c.entry].Operation, c.list)
	}
	if c.not {
		return &r.When[c.entry].NotValues
	}
	return &r.When[c.entry].Values
}

// alone is a rule of nothing but the clause.
func (c *clause) alone() *security.Rule {
	switch c.in {
	case inFrom:
		s := &security.Source{}
		*sourceList(s, c.list) = c.values
		return &security.Rule{From: []*security.Rule_From{{Source: s}}}
	case inTo:
		o := &security.Operation{}
		*operationList(o, c.list) = c.values
		return &security.Rule{To: []*security.Rule_To{{Operation: o}}}
	}
	w := &security.Condition{Key: c.name}
	if c.not {
		w.NotValues = c.values
	} else {
		w.Values = c.values
	}
	return &security.Rule{When: []*security.Condition{w}}
}

// httpOnly says that a bare connection has no such attribute.
func (c *clause) httpOnly() bool {
	switch c.of {
	case ofHost, ofMethod, ofPath, ofIdentity, ofNothing:
		return true
	}
	return strings.HasPrefix(string(c.of), string(ofHeader)) || strings.HasPrefix(string(c.of), string(ofClaim)) || c.in == inWhen && strings.HasPrefix(c.name, "request.")
}

// conditionOf is the attribute that a condition's key names, as Istio reads keys.
func conditionOf(key string) attribute {
	switch key {
	case "source.ip":
		return ofSource
	case "remote.ip":
		return ofRemote
	case "destination.ip":
		return ofDestination
	case "destination.port":
		return ofPort
	case "connection.sni":
		return ofSNI
	case "source.principal", "source.namespace", "source.serviceAccount", "source.trustDomain":
		return ofPrincipal
	case "request.auth.principal":
		return ofIdentity
	case "request.auth.audiences":
		return ofClaim + "[aud]"
	case "request.auth.presenter":
		return ofClaim + "[azp]"
	}
	if name, ok := strings.CutPrefix(key, "request.headers["); ok && strings.HasSuffix(name, "]") {
		switch name = lowerASCII(strings.TrimSuffix(name, "]")); name {
		case ":method":
			return ofMethod
		case ":path":
			return ofPath
		case ":authority", "host":
			return ofHost
		}
		return ofHeader + attribute(name)
	}
	if name, ok := strings.CutPrefix(key, "request.auth.claims"); ok && strings.HasPrefix(name, "[") && strings.HasSuffix(name, "]") {
		return ofClaim + attribute(name)
	}
	if name, ok := strings.CutPrefix(key, "experimental."); ok && strings.HasPrefix(name, "envoy.filters.") && strings.Contains(name, "[") {
		return ofMetadata + attribute(name)
	}
	return ofNothing
}

func lowerASCII(s string) string {
	return strings.Map(func(r rune) rune {
		if 'A' <= r && r <= 'Z' {
			return r + 'a' - 'A'
		}
		return r
	}, s)
}

// clausesOf are all clauses of a rule, in the order in which they stand there.
func clausesOf(r *security.Rule) (cs []clause) {
	add := func(in where, entry int, f field, yes, no []string) {
		for _, v := range []struct {
			list   string
			not    bool
			values []string
		}{{f.name, false, yes}, {f.not, true, no}} {
			if len(v.values) > 0 {
				cs = append(cs, clause{in, entry, f.name, v.list, v.not, f.of, v.values})
			}
		}
	}
	for i, from := range r.GetFrom() {
		if s := from.GetSource(); s != nil {
			for _, f := range sourceFields {
				add(inFrom, i, f, *sourceList(s, f.name), *sourceList(s, f.not))
			}
		}
	}
	for i, to := range r.GetTo() {
		if o := to.GetOperation(); o != nil {
			for _, f := range operationFields {
				add(inTo, i, f, *operationList(o, f.name), *operationList(o, f.not))
			}
		}
	}
	for i, w := range r.GetWhen() {
		f := field{w.GetKey(), "", conditionOf(w.GetKey())}
		n := len(cs)
		add(inWhen, i, f, w.GetValues(), w.GetNotValues())
		for k := n; k < len(cs); k++ {
			cs[k].list = "values"
			if cs[k].not {
				cs[k].list = "notValues"
			}
		}
	}
	return cs
}

// test is a clause with what it says of requests.
type test struct {
	clause
	matcher *authz.Matcher
}

func (t *test) match(r *authz.Request) authz.Truth { return t.matcher.Match(r) }

// alternative is one way to match a rule: an entry of from, one of to, and all of
// when. All of its tests must hold.
type alternative struct{ tests []*test }

func (a *alternative) match(r *authz.Request) authz.Truth {
	truth := authz.Yes
	for _, t := range a.tests {
		truth = min(truth, t.match(r))
	}
	return truth
}

// failing are the tests that do not certainly hold.
func (a *alternative) failing(r *authz.Request) (out []*test) {
	for _, t := range a.tests {
		if t.match(r) != authz.Yes {
			out = append(out, t)
		}
	}
	return out
}

// rule is a rule in parts.
type rule struct {
	authz.Rule
	tests        []*test
	alternatives []alternative
	whole        *authz.Matcher
}

// maxAlternatives bounds how many ways to match a rule are looked at.
const maxAlternatives = 64

func newRule(r authz.Rule, envoy authz.EnvoyVersion) *rule {
	out := &rule{Rule: r, whole: authz.NewMatcher(r, envoy)}
	if r.Index < 0 || r.Reason != "" {
		return out
	}
	for _, c := range clausesOf(r.Spec) {
		one := r
		one.Spec = c.alone()
		out.tests = append(out.tests, &test{c, authz.NewMatcher(one, envoy)})
	}
	pick := func(in where, entry int) (ts []*test) {
		for _, t := range out.tests {
			if t.in == in && (t.entry == entry || in == inWhen) {
				ts = append(ts, t)
			}
		}
		return ts
	}
	when := pick(inWhen, 0)
	for i := range max(1, len(r.Spec.GetFrom())) {
		for j := range max(1, len(r.Spec.GetTo())) {
			if len(out.alternatives) < maxAlternatives {
				out.alternatives = append(out.alternatives, alternative{slices.Concat(pick(inFrom, i), pick(inTo, j), when)})
			}
		}
	}
	return out
}
