package explain

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	security "istio.io/api/security/v1beta1"
	"sigs.k8s.io/yaml"

	"github.com/signet-mesh/signet/authz"
)

// removeRules takes the rules out that are to be removed, the last first.
func (d *draft) removeRules(id string, m proto.Message) error {
	is := slices.Clone(d.rules[id])
	slices.Sort(is)
	for _, i := range slices.Backward(slices.Compact(is)) {
		p, ok := m.(*security.AuthorizationPolicy)
		if !ok || i >= len(p.Rules) {
			return errGone
		}
		p.Rules = slices.Delete(p.Rules, i, i+1)
	}
	return nil
}

// yamlOf is a message as YAML, as in a policy.
func yamlOf(m proto.Message) string {
	j, err := protojson.Marshal(m)
	if err != nil {
		return ""
	}
	y, err := yaml.JSONToYAML(j)
	if err != nil {
		return ""
	}
	return string(y)
}

// listItem is YAML as an item of a list.
func listItem(y string) string {
	var b strings.Builder
	lead := "- "
	for line := range strings.Lines(y) {
		b.WriteString(lead + line)
		lead = "  "
	}
	return b.String()
}

// ruleEdit is a change of one rule.
func (s *search) ruleEdit(r *authz.Rule, field, verb, value, text string, cost int, apply func(*security.Rule) error) Part {
	id := r.Kind + " " + r.Resource()
	change := func(d *draft) (*security.Rule, error) {
		m, err := d.spec(id)
		if err != nil {
			return nil, err
		}
		p, ok := m.(*security.AuthorizationPolicy)
		if !ok || r.Index >= len(p.Rules) {
			return nil, errGone
		}
		return p.Rules[r.Index], apply(p.Rules[r.Index])
	}
	part := Part{
		On: id, Field: fmt.Sprintf("spec.rules[%d]", r.Index), Change: verb, Value: value, cost: cost,
		Text: fmt.Sprintf("%s rule %d of %s %s (%s:%d)", text, r.Index, r.Action, r.Resource(), r.Origin, r.Line),
	}
	if field != "" {
		part.Field += "." + field
	}
	part.key = id + " " + part.Field
	if verb != "set" {
		part.key += " " + verb + value
	}
	part.policy = func(d *draft) error { _, err := change(d); return err }
	part.yaml = func() string {
		now, err := change(&draft{set: s.Set, specs: map[string]proto.Message{}})
		if err != nil {
			return ""
		}
		return listItem(yamlOf(now))
	}
	return part
}

// addTo adds a value to a clause's list.
func (s *search) addTo(r *authz.Rule, c clause, value string) Part {
	p := s.ruleEdit(r, c.path(), "add", value, fmt.Sprintf("add %s to %s of", quoted(value), c.path()), 3, func(spec *security.Rule) error {
		if !c.inside(spec) {
			return errGone
		}
		l := c.listIn(spec)
		*l = append(*l, value)
		return nil
	})
	return p
}

// removeFrom removes a value from a clause's list, which must not lose its last one
// if that widens it.
func (s *search) removeFrom(r *authz.Rule, c clause, value string) Part {
	return s.ruleEdit(r, c.path(), "remove", value, fmt.Sprintf("remove %s from %s of", quoted(value), c.path()), 3, func(spec *security.Rule) error {
		if !c.inside(spec) {
			return errGone
		}
		l := c.listIn(spec)
		rest := slices.DeleteFunc(slices.Clone(*l), func(v string) bool { return v == value })
		if len(rest) == len(*l) || len(rest) == 0 && !c.not {
			return errGone
		}
		*l = rest
		if w := c.entry; c.in == inWhen && len(spec.When[w].Values)+len(spec.When[w].NotValues) == 0 {
			return errGone
		}
		return nil
	})
}

// inside reports whether a rule has the clause's place.
func (c *clause) inside(r *security.Rule) bool {
	switch c.in {
	case inFrom:
		return c.entry < len(r.From) && r.From[c.entry].Source != nil
	case inTo:
		return c.entry < len(r.To) && r.To[c.entry].Operation != nil
	}
	return c.entry < len(r.When)
}

// exact are values of a field that match nothing but what the request has, or none.
func exact(c *clause, r *authz.Request) string {
	var v string
	switch c.of {
	case ofPrincipal:
		if !r.Authenticated || r.Known&authz.FieldPrincipal == 0 {
			return ""
		}
		name, ok := strings.CutPrefix(string(r.Principal), scheme)
		if !ok {
			return ""
		}
		parts := strings.Split(name, "/")
		spiffe := len(parts) == 5 && parts[1] == "ns" && parts[3] == "sa"
		switch c.name {
		case "principals", "source.principal":
			v = name
		case "namespaces", "source.namespace":
			if spiffe {
				v = parts[2]
			}
		case "serviceAccounts", "source.serviceAccount":
			if spiffe {
				v = parts[2] + "/" + parts[4]
			}
		}
	case ofMethod:
		if r.Known&authz.FieldMethod != 0 {
			v = string(r.Method)
		}
	case ofPath:
		if r.Known&authz.FieldPath != 0 {
			v = string(r.Path)
			if i := strings.IndexAny(v, "?#"); i >= 0 && c.in == inTo {
				v = v[:i]
			}
		}
	case ofHost:
		if r.Known&authz.FieldHost != 0 {
			v = string(r.Host)
		}
	case ofSNI:
		if r.Known&authz.FieldSNI != 0 {
			v = lowerASCII(string(r.SNI))
		}
	case ofPort:
		if r.Known&authz.FieldDestinationPort != 0 {
			v = strconv.Itoa(int(r.DestinationPort))
		}
	case ofSource:
		if r.Known&authz.FieldSourceIP != 0 && r.SourceIP.IsValid() {
			v = r.SourceIP.Unmap().WithZone("").String()
		}
	case ofRemote:
		switch {
		case r.Known&authz.FieldRemoteIP != 0 && r.RemoteIP.IsValid():
			v = r.RemoteIP.WithZone("").String()
		case r.Known&authz.FieldSourceIP != 0 && r.SourceIP.IsValid():
			v = r.SourceIP.Unmap().WithZone("").String() // tried: it counts if there is no x-forwarded-for
		}
	case ofDestination:
		if r.Known&authz.FieldDestinationIP != 0 && r.DestinationIP.IsValid() {
			v = r.DestinationIP.Unmap().WithZone("").String()
		}
	case ofIdentity:
		if f := r.Claims.GetFields(); isText(f["iss"]) && isText(f["sub"]) {
			v = f["iss"].GetStringValue() + "/" + f["sub"].GetStringValue()
		}
	default:
		name := string(c.of)
		if h, ok := strings.CutPrefix(name, string(ofHeader)); ok {
			for _, have := range r.Headers {
				if have.Name == h && have.Form == authz.HeaderValue {
					v = string(have.Value)
					break
				}
			}
		} else if cl, ok := strings.CutPrefix(name, string(ofClaim)); ok {
			value := claimAt(r.Claims, claimPath(cl))
			if v = value.GetStringValue(); v == "" {
				for _, e := range value.GetListValue().GetValues() {
					if v = e.GetStringValue(); v != "" {
						break
					}
				}
			}
		}
	}
	if v == "" || !utf8.ValidString(v) || strings.HasPrefix(v, "*") || strings.HasSuffix(v, "*") || strings.ContainsAny(v, "{}") {
		return ""
	}
	return v
}

// certain is the clause with a value if it then certainly matches the request.
func (s *search) certain(c clause, value, namespace string, r *authz.Request) bool {
	if value == "" {
		return false
	}
	c.values, c.not = []string{value}, false
	c.list = strings.TrimPrefix(c.list, "not")
	switch c.in {
	case inFrom, inTo:
		c.list = c.name
	default:
		c.list = "values"
	}
	m := authz.NewMatcher(authz.Rule{Namespace: namespace, Action: authz.ActionAllow, Spec: c.alone()}, s.Snapshot.Options().Envoy)
	return m.Match(r) == authz.Yes
}

// exactRule is a rule that matches who asks and what is asked, and nothing else that
// is known of the request.
func (s *search) exactRule(r *authz.Request) (rule *security.Rule, text string) {
	rule = &security.Rule{}
	var who, what []string
	caller := &security.Source{}
	for _, c := range []clause{
		{in: inFrom, name: "principals", list: "principals", of: ofPrincipal},
		{in: inFrom, name: "ipBlocks", list: "ipBlocks", of: ofSource},
	} {
		if v := exact(&c, r); s.certain(c, v, "", r) {
			*sourceList(caller, c.list) = []string{v}
			who = append(who, v)
			break
		}
	}
	if len(who) > 0 {
		rule.From = []*security.Rule_From{{Source: caller}}
	}
	op := &security.Operation{}
	names := []field{{name: "methods", of: ofMethod}, {name: "paths", of: ofPath}, {name: "ports", of: ofPort}}
	for _, f := range names {
		if f.of == ofPort && len(what) > 0 || !r.HTTP && f.of != ofPort {
			continue
		}
		c := clause{in: inTo, name: f.name, list: f.name, of: f.of}
		if v := exact(&c, r); s.certain(c, v, "", r) {
			*operationList(op, f.name) = []string{v}
			if f.of == ofPort {
				v = "port " + v
			}
			what = append(what, v)
		}
	}
	if len(what) > 0 {
		rule.To = []*security.Rule_To{{Operation: op}}
	}
	text = strings.Join(what, " ")
	if text == "" {
		text = "everything"
	}
	if len(who) > 0 {
		text += " from " + quoted(who[0])
	} else {
		text += " from anybody"
	}
	return rule, text
}

// policyRepairs are changes of policies that get round what decided.
func (s *search) policyRepairs(a at) (out []edit) {
	r := &a.Request
	rule := a.deciding()
	add := func(ps ...Part) { out = append(out, ps) }
	if !s.want {
		if a.Reason == authz.ReasonAllowRule || a.Reason == authz.ReasonNoAllowPolicy {
			add(s.newPolicy(r, authz.ActionDeny))
		}
		return out
	}
	switch a.Reason {
	case authz.ReasonDenyRule, authz.ReasonDenyUnknown, authz.ReasonProviders, authz.ReasonAskRule, authz.ReasonAskUnknown:
		if rule == nil || rule.Index < 0 {
			break
		}
		for i := range rule.alternatives {
			if alt := &rule.alternatives[i]; alt.match(r) != authz.No {
				for _, p := range s.exceptions(rule, alt, r) {
					add(p)
				}
				break
			}
		}
		if s.desperate {
			add(s.removeRule(&rule.Rule))
		}
	case authz.ReasonNoAllowRule, authz.ReasonAllowUnknown:
		out = append(out, s.widen(a)...)
		if p, ok := s.newRule(a); ok {
			add(p)
		} else {
			add(s.newPolicy(r, authz.ActionAllow))
		}
	case authz.ReasonPlaintext, authz.ReasonPlaintextUnknown:
		for _, p := range s.permissive(a) {
			add(p)
		}
	case authz.ReasonTokenForeign:
		out = append(out, s.takeToken(a)...)
	case authz.ReasonTokenRefused, authz.ReasonTokenUnknown:
		if s.desperate {
			out = append(out, s.removeResource(a)...)
		}
	case authz.ReasonInvalid, authz.ReasonDuplicate, authz.ReasonUnreadable:
		out = append(out, s.removeResource(a)...)
	}
	return out
}

// exceptions are changes after which an alternative of the rule does not match the
// request, and matches as before what is not like it.
func (s *search) exceptions(rule *rule, alt *alternative, r *authz.Request) (out []Part) {
	// Values that are nothing but the request's.
	for _, t := range alt.tests {
		if t.not || len(t.values) < 2 {
			continue
		}
		if v := exact(&t.clause, r); v != "" && slices.Contains(t.values, v) {
			out = append(out, s.removeFrom(&rule.Rule, t.clause, v))
		}
	}
	from, to := -1, -1
	for _, t := range alt.tests {
		switch t.in {
		case inFrom:
			from = t.entry
		case inTo:
			to = t.entry
		}
	}
	from, to = s.entries(rule, alt, from, to)
	var exceptions []exception
	for _, x := range []exception{
		{inFrom, "principals", "notPrincipals", ofPrincipal, ""},
		{inFrom, "ipBlocks", "notIpBlocks", ofSource, ""},
		{inTo, "paths", "notPaths", ofPath, ""},
		{inTo, "methods", "notMethods", ofMethod, ""},
		{inTo, "ports", "notPorts", ofPort, ""},
	} {
		c := clause{in: x.in, name: x.name, list: x.name, of: x.of}
		x.value = exact(&c, r)
		switch {
		case !s.certain(c, x.value, rule.Namespace, r):
		case c.httpOnly() && !r.HTTP:
		case x.of == ofPort && r.HTTP && len(exceptions) > 0:
		case x.of == ofSource && len(exceptions) > 0:
			// A name is better than an address.
		case x.of == ofPrincipal && rule.Action == authz.ActionCustom:
			// CUSTOM comes before names are known.
		default:
			exceptions = append(exceptions, x)
		}
	}
	if len(exceptions) == 0 {
		return out
	}
	texts := make([]string, len(exceptions))
	for i, x := range exceptions {
		texts[i] = quoted(x.value)
		// One by itself excepts more than the request: only who asks, what is asked.
		if x.of == ofPrincipal || x.of == ofPath || x.of == ofSource || s.desperate || len(exceptions) == 1 {
			out = append(out, s.except(rule, x, from, to))
		}
	}
	// A rule about nothing but a value matches nothing without it.
	if len(rule.alternatives) == 1 {
		exceptions = slices.DeleteFunc(exceptions, func(x exception) bool {
			return slices.ContainsFunc(alt.tests, func(t *test) bool { return t.list == x.name && slices.Equal(t.values, []string{x.value}) })
		})
	}
	if len(exceptions) > 1 {
		out = append(out, s.exceptAll(rule, exceptions, from, to, strings.Join(texts, " ")))
	}
	return out
}

// exception is a value that a rule no longer matches.
type exception struct {
	in        where
	name, not string
	of        attribute
	value     string
}

// put adds the exception to an alternative of a rule.
func (x *exception) put(spec *security.Rule, from, to int) error {
	switch {
	case x.in == inFrom && from < len(spec.From) && hasAccounts(spec.From[from].GetSource()):
		// Such a source may not have principals.
		key := "source.principal"
		if x.of == ofSource {
			key = "source.ip"
		}
		spec.When = append(spec.When, &security.Condition{Key: key, NotValues: []string{x.value}})
	case x.in == inFrom:
		if len(spec.From) == 0 {
			spec.From = []*security.Rule_From{{Source: &security.Source{}}}
		}
		if from >= len(spec.From) {
			return errGone
		}
		if spec.From[from].Source == nil {
			spec.From[from].Source = &security.Source{}
		}
		l := sourceList(spec.From[from].Source, x.not)
		*l = append(*l, x.value)
	default:
		if len(spec.To) == 0 {
			spec.To = []*security.Rule_To{{Operation: &security.Operation{}}}
		}
		if to >= len(spec.To) {
			return errGone
		}
		if spec.To[to].Operation == nil {
			spec.To[to].Operation = &security.Operation{}
		}
		l := operationList(spec.To[to].Operation, x.not)
		*l = append(*l, x.value)
	}
	return nil
}

// except is one exception, which concerns more than the request.
func (s *search) except(rule *rule, x exception, from, to int) Part {
	path := fmt.Sprintf("to[%d].operation.%s", to, x.not)
	if x.in == inFrom {
		path = fmt.Sprintf("from[%d].source.%s", from, x.not)
		if from < len(rule.Spec.From) && hasAccounts(rule.Spec.From[from].GetSource()) {
			path = "when"
		}
	}
	p := s.ruleEdit(&rule.Rule, path, "add", x.value, fmt.Sprintf("except %s %s, by %s, from", x.of, quoted(x.value), path), 4, func(spec *security.Rule) error {
		return x.put(spec, from, to)
	})
	if x.in == inFrom {
		p.note = "the rule then says nothing about anything else that " + quoted(x.value) + " asks for"
	} else {
		p.cost, p.note = 6, "the rule then says nothing about anybody's requests with that "+string(x.of)
	}
	return p
}

// exceptAll is the exception of one request alone: a rule is made into several, each
// of which lets one of its values by, so that they are all said of nothing else.
func (s *search) exceptAll(rule *rule, xs []exception, from, to int, text string) Part {
	id := rule.Kind + " " + rule.Resource()
	split := func(d *draft) (all []*security.Rule, err error) {
		m, err := d.spec(id)
		if err != nil {
			return nil, err
		}
		p, ok := m.(*security.AuthorizationPolicy)
		if !ok || rule.Index >= len(p.Rules) {
			return nil, errGone
		}
		for _, x := range xs {
			r := proto.CloneOf(p.Rules[rule.Index])
			if err := x.put(r, from, to); err != nil {
				return nil, err
			}
			all = append(all, r)
		}
		p.Rules[rule.Index] = all[0]
		p.Rules = append(p.Rules, all[1:]...)
		return all, nil
	}
	return Part{
		On: id, Field: fmt.Sprintf("spec.rules[%d]", rule.Index), Change: "set", Value: text, cost: 5, key: fmt.Sprintf("%s rule %d without %s", id, rule.Index, text),
		Text:   fmt.Sprintf("except exactly %s from rule %d of %s %s (%s:%d), by splitting it into %d rules", text, rule.Index, rule.Action, rule.Resource(), rule.Origin, rule.Line, len(xs)),
		policy: func(d *draft) error { _, err := split(d); return err },
		yaml: func() string {
			all, err := split(&draft{set: s.Set, specs: map[string]proto.Message{}})
			if err != nil {
				return ""
			}
			var b strings.Builder
			for _, r := range all {
				b.WriteString(listItem(yamlOf(r)))
			}
			return b.String()
		},
	}
}

// entries are the indexes of from and to of an alternative; a nil source or operation
// has no tests that would tell.
func (s *search) entries(rule *rule, alt *alternative, from, to int) (int, int) {
	n := max(1, len(rule.Spec.GetTo()))
	for i := range rule.alternatives {
		if &rule.alternatives[i] == alt {
			return i / n, i % n
		}
	}
	return max(from, 0), max(to, 0)
}

func hasAccounts(s *security.Source) bool {
	return len(s.GetServiceAccounts())+len(s.GetNotServiceAccounts()) > 0
}

func (s *search) removeRule(r *authz.Rule) Part {
	id := r.Kind + " " + r.Resource()
	return Part{
		On: id, Field: fmt.Sprintf("spec.rules[%d]", r.Index), Change: "remove", cost: 20, key: fmt.Sprint(id, " rule ", r.Index),
		Text: fmt.Sprintf("remove rule %d of %s %s (%s:%d)", r.Index, r.Action, r.Resource(), r.Origin, r.Line),
		note: "this opens more than this request: everything that only this rule stopped",
		policy: func(d *draft) error {
			m, err := d.spec(id)
			if err != nil {
				return err
			}
			if p, ok := m.(*security.AuthorizationPolicy); ok && len(p.Rules) == 1+len(d.rules[id]) {
				for res := range d.set.All() { // a policy must have rules
					if res.String() == id {
						d.removed[res] = true
					}
				}
			}
			d.rules[id] = append(d.rules[id], r.Index)
			return nil
		},
	}
}

// widen are changes of single lists of ALLOW rules that nearly match.
func (s *search) widen(a at) (out []edit) {
	r := &a.Request
	for _, rule := range a.rules {
		if rule.Action != authz.ActionAllow || rule.DryRun || rule.Reason != "" || rule.Index < 0 {
			continue
		}
	alternatives:
		for i := range rule.alternatives {
			failing := rule.alternatives[i].failing(r)
			if len(failing) == 0 || len(failing) > 2 {
				continue
			}
			var e edit
			for _, t := range failing {
				v := exact(&t.clause, r)
				switch {
				case !t.not && narrow(t.name) && s.certain(t.clause, v, rule.Namespace, r):
					e = append(e, s.addTo(&rule.Rule, t.clause, v))
				case t.not && slices.Contains(t.values, v):
					e = append(e, s.removeFrom(&rule.Rule, t.clause, v))
				default:
					continue alternatives
				}
			}
			for i := range e {
				e[i].note = "this also allows " + quoted(e[i].Value) + " in every other request that the rest of the rule matches"
			}
			out = append(out, e)
		}
	}
	slices.SortStableFunc(out, func(a, b edit) int { return cmp.Compare(len(a), len(b)) })
	return out[:min(len(out), 6)]
}

// narrow says that a value of a field stands for one caller or one thing, not for
// all of a namespace or a trust domain.
func narrow(name string) bool {
	switch name {
	case "namespaces", "source.namespace", "trustDomains", "source.trustDomain":
		return false
	}
	return true
}

func (s *search) root() string { return cmp.Or(s.Snapshot.Options().RootNamespace, "istio-system") }

// permissive are changes of PeerAuthentications that let plaintext in.
func (s *search) permissive(a at) (out []Part) {
	r := &a.Request
	permissive := &security.PeerAuthentication_MutualTLS{Mode: security.PeerAuthentication_MutualTLS_PERMISSIVE}
	portKnown := r.Known&authz.FieldDestinationPort != 0 && r.DestinationPort != 0
	port := uint32(r.DestinationPort)
	note := "plaintext has no identity: rules on principals never match it, and nobody proves who asks; giving the caller a certificate is better"
	own := false
	for res := range s.Set.All() {
		spec, ok := res.Spec().(*security.PeerAuthentication)
		if selected, _ := a.Snapshot.Selects(res, s.Workload); !ok || !selected {
			continue
		}
		id := res.String()
		file, line := res.Origin()
		edit := func(field, value, text string, cost int, note string, apply func(*security.PeerAuthentication)) {
			out = append(out, Part{
				On: id, Field: field, Change: "set", Value: value, cost: cost, key: id + " " + field, note: note,
				Text: fmt.Sprintf("%s in %s (%s:%d)", text, id, file, line),
				yaml: func() string {
					now := proto.CloneOf(spec)
					apply(now)
					return "spec:\n" + indent(yamlOf(now))
				},
				policy: func(d *draft) error {
					m, err := d.spec(id)
					if err != nil {
						return err
					}
					p, ok := m.(*security.PeerAuthentication)
					if !ok {
						return errGone
					}
					apply(p)
					return nil
				},
			})
		}
		workload := len(spec.GetSelector().GetMatchLabels()) > 0
		own = own || workload
		if workload && portKnown {
			field := fmt.Sprintf("spec.portLevelMtls[%d].mode", port)
			edit(field, "PERMISSIVE", fmt.Sprintf("set the mode of port %d to PERMISSIVE", port), 7, note, func(p *security.PeerAuthentication) {
				if p.PortLevelMtls == nil {
					p.PortLevelMtls = map[uint32]*security.PeerAuthentication_MutualTLS{}
				}
				p.PortLevelMtls[port] = permissive
			})
			continue
		}
		if !workload && !s.desperate && len(s.Workload.Labels) > 0 && s.Workload.Namespace != s.root() {
			continue // one port of one workload is enough
		}
		cost, more := 12, note+"; it concerns every port of every workload that the resource is about"
		if workload {
			for p, m := range spec.GetPortLevelMtls() {
				if m.GetMode() != security.PeerAuthentication_MutualTLS_STRICT {
					continue
				}
				edit(fmt.Sprintf("spec.portLevelMtls[%d].mode", p), "PERMISSIVE", fmt.Sprintf("set the mode of port %d to PERMISSIVE", p), 7, note, func(pa *security.PeerAuthentication) {
					pa.PortLevelMtls[p] = permissive
				})
			}
			cost = 8
		}
		edit("spec.mtls.mode", "PERMISSIVE", "set the mode to PERMISSIVE", cost, more, func(p *security.PeerAuthentication) { p.Mtls = permissive })
	}
	labels := s.selector()
	if !own && len(labels) > 0 && s.Workload.Namespace != s.root() {
		spec := &security.PeerAuthentication{Selector: selectorOf(labels)}
		text := "the workload take plaintext"
		if portKnown {
			spec.PortLevelMtls = map[uint32]*security.PeerAuthentication_MutualTLS{port: permissive}
			text = fmt.Sprintf("port %d of the workload take plaintext", port)
		} else {
			spec.Mtls = permissive
		}
		name := s.unused("permissive")
		out = append(out, s.create(authz.KindPeerAuthentication, name, spec, fmt.Sprintf("create PeerAuthentication %s/%s, which lets %s", s.Workload.Namespace, name, text), 7, note))
	}
	if !own && len(labels) == 0 && s.Workload.Namespace != s.root() {
		name := s.unused("permissive")
		out = append(out, s.create(authz.KindPeerAuthentication, name, &security.PeerAuthentication{Mtls: permissive},
			fmt.Sprintf("create PeerAuthentication %s/%s, which lets the namespace take plaintext", s.Workload.Namespace, name), 13, note))
	}
	return out
}

func indent(y string) string {
	var b strings.Builder
	for line := range strings.Lines(y) {
		b.WriteString("  " + line)
	}
	return b.String()
}

// takeToken are changes of RequestAuthentications that take the request's token.
func (s *search) takeToken(a at) (out []edit) {
	f := a.Request.Claims.GetFields()
	iss := f["iss"].GetStringValue()
	var aud string
	if aud = f["aud"].GetStringValue(); aud == "" {
		for _, v := range f["aud"].GetListValue().GetValues() {
			if aud = v.GetStringValue(); aud != "" {
				break
			}
		}
	}
	for tr := range a.program.TokenRules() {
		id := authz.KindRequestAuthentication + " " + tr.Namespace + "/" + tr.Name
		change := func(field, value, text string, apply func(*security.RequestAuthentication) error) {
			out = append(out, edit{{
				On: id, Field: field, Change: "add", Value: value, cost: 4, key: id + " " + field, Text: text + fmt.Sprintf(" of %s (%s:%d)", id, tr.Origin, tr.Line),
				policy: func(d *draft) error {
					m, err := d.spec(id)
					if err != nil {
						return err
					}
					p, ok := m.(*security.RequestAuthentication)
					if !ok {
						return errGone
					}
					return apply(p)
				},
			}})
		}
		if len(tr.Spec.GetAudiences()) > 0 && aud != "" && (tr.Spec.GetIssuer() == "" || tr.Spec.GetIssuer() == iss) {
			field := fmt.Sprintf("spec.jwtRules[%d].audiences", tr.Index)
			change(field, aud, fmt.Sprintf("add %s to %s", quoted(aud), field), func(p *security.RequestAuthentication) error {
				if tr.Index >= len(p.JwtRules) {
					return errGone
				}
				p.JwtRules[tr.Index].Audiences = append(p.JwtRules[tr.Index].Audiences, aud)
				return nil
			})
		}
		if iss != "" {
			rule := &security.JWTRule{Issuer: iss}
			if aud != "" {
				rule.Audiences = []string{aud}
			}
			change("spec.jwtRules", iss, fmt.Sprintf("add a rule for issuer %s to jwtRules", quoted(iss)), func(p *security.RequestAuthentication) error {
				p.JwtRules = append(p.JwtRules, proto.CloneOf(rule))
				return nil
			})
			out[len(out)-1][0].yaml = func() string { return listItem(yamlOf(rule)) }
			out[len(out)-1][0].cost = 8
			out[len(out)-1][0].note = "this trusts the issuer: only if it is one of yours"
		}
	}
	if s.desperate {
		out = append(out, s.removeResource(a)...)
	}
	return out
}

// removeResource removes the resource that decided.
func (s *search) removeResource(a at) (out []edit) {
	for r := range a.Set.All() {
		named := r.Kind() == a.Kind && r.Namespace()+"/"+r.Name() == a.Policy
		if !named && !(r.Reason() == authz.ReasonUnreadable && a.Reason == authz.ReasonUnreadable) && !(r.Reason() != "" && r.Reason() == a.Reason && a.Kind == "") {
			continue
		}
		file, line := r.Origin()
		what := r.String()
		if r.Name() == "" {
			what = "the document"
		}
		note := "mend it instead, if it should say something: signet authz lint says what is wrong"
		if r.Reason() == "" {
			note = "this opens more than this request"
		}
		out = append(out, edit{{
			On: what, Change: "remove", cost: 15, key: fmt.Sprintf("%s %s:%d", what, file, line), note: note,
			Text:   fmt.Sprintf("remove %s (%s:%d)", what, file, line),
			policy: func(d *draft) error { d.removed[r] = true; return nil },
		}})
	}
	return out
}
