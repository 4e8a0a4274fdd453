package explain

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
)

// Changes to a request, each of one attribute.

func change(of attribute, verb, value, text string, cost int, apply func(*authz.Request)) Part {
	return Part{On: "request", Field: string(of), Change: verb, Value: value, Text: text, key: string(of), cost: cost, request: apply}
}

func setMethod(v string) Part {
	return change(ofMethod, "set", v, "use method "+quoted(v), 2, func(r *authz.Request) {
		r.Method, r.Known = []byte(v), r.Known|authz.FieldMethod
	})
}

func setPath(v string) Part {
	return change(ofPath, "set", v, "ask for path "+quoted(v), 2, func(r *authz.Request) {
		r.Path, r.QueryHidden, r.Known = []byte(v), false, r.Known|authz.FieldPath
	})
}

func setHost(v string) Part {
	return change(ofHost, "set", v, "ask for host "+quoted(v), 3, func(r *authz.Request) {
		r.Host, r.Known = []byte(v), r.Known|authz.FieldHost
	})
}

func setSNI(v string) Part {
	return change(ofSNI, "set", v, "ask for server name "+quoted(v)+" in TLS", 4, func(r *authz.Request) {
		r.SNI, r.Known = []byte(v), r.Known|authz.FieldSNI
	})
}

func setPort(v uint16) Part {
	return change(ofPort, "set", fmt.Sprint(v), fmt.Sprintf("call port %d", v), 3, func(r *authz.Request) {
		r.DestinationPort, r.Known = v, r.Known|authz.FieldDestinationPort
	})
}

func setAddress(of attribute, v netip.Addr) Part {
	switch of {
	case ofDestination:
		return change(of, "set", v.String(), "call address "+v.String(), 6, func(r *authz.Request) {
			r.DestinationIP, r.Known = v, r.Known|authz.FieldDestinationIP
		})
	case ofRemote:
		return change(of, "set", v.String(), "come from client address "+v.String()+" (the last entry of x-forwarded-for)", 5, func(r *authz.Request) {
			r.RemoteIP, r.Known = v, r.Known|authz.FieldRemoteIP
		})
	}
	return change(of, "set", v.String(), "call from address "+v.String(), 5, func(r *authz.Request) {
		r.SourceIP, r.Known = v, r.Known|authz.FieldSourceIP
	})
}

func setPrincipal(name string) Part {
	p := change(ofPrincipal, "set", name, "call as "+quoted(strings.TrimPrefix(name, scheme)), 2, func(r *authz.Request) {
		r.Authenticated, r.Principal, r.OtherNames = true, []byte(name), nil
		r.Known |= authz.FieldPeer | authz.FieldPrincipal
	})
	return p
}

func dropPrincipal() Part {
	return change(ofPrincipal, "remove", "", "call without a certificate", 9, func(r *authz.Request) {
		r.Authenticated, r.Principal, r.OtherNames = false, nil, nil
		r.Known |= authz.FieldPeer | authz.FieldPrincipal
	})
}

func setHeader(name, v string) Part {
	return change(ofHeader+attribute(name), "set", v, fmt.Sprintf("send header %s: %s", name, quoted(v)), 2, func(r *authz.Request) {
		r.Headers = withoutHeader(r.Headers, name)
		r.Headers = append(r.Headers, authz.Header{Name: name, Value: []byte(v)})
	})
}

func dropHeader(name string) Part {
	return change(ofHeader+attribute(name), "remove", "", "send no header "+name, 2, func(r *authz.Request) {
		r.Headers = withoutHeader(r.Headers, name)
		r.Known |= authz.FieldHeaders
	})
}

func withoutHeader(hs []authz.Header, name string) []authz.Header {
	return slices.DeleteFunc(slices.Clone(hs), func(h authz.Header) bool { return h.Name == name })
}

// withToken is a request with a verified token, whose claims may be changed.
func withToken(r *authz.Request) map[string]*structpb.Value {
	r.Known |= authz.FieldClaims
	if r.Claims == nil {
		r.Claims = &structpb.Struct{}
	} else {
		r.Claims = proto.CloneOf(r.Claims)
	}
	if r.Claims.Fields == nil {
		r.Claims.Fields = map[string]*structpb.Value{}
	}
	return r.Claims.Fields
}

func setClaim(name, v string) Part {
	return change(ofClaim+attribute(name), "set", v, fmt.Sprintf("have a token whose claim %s is %s", name, quoted(v)), 3, func(r *authz.Request) {
		fields, path := withToken(r), claimPath(name)
		for _, k := range path[:len(path)-1] {
			s := fields[k].GetStructValue()
			if s == nil || s.Fields == nil {
				s = &structpb.Struct{Fields: map[string]*structpb.Value{}}
				fields[k] = structpb.NewStructValue(s)
			}
			fields = s.Fields
		}
		fields[path[len(path)-1]] = structpb.NewStringValue(v)
	})
}

func dropClaim(name string) Part {
	return change(ofClaim+attribute(name), "remove", "", "have a token without claim "+name, 3, func(r *authz.Request) {
		fields, path := withToken(r), claimPath(name)
		for _, k := range path[:len(path)-1] {
			fields = fields[k].GetStructValue().GetFields()
		}
		delete(fields, path[len(path)-1])
	})
}

func validToken() Part {
	return change("token", "set", "", "have a token that verifies", 3, func(r *authz.Request) { withToken(r) })
}

func noToken() Part {
	return change("token", "remove", "", "send no token", 3, func(r *authz.Request) {
		r.Known |= authz.FieldClaims
		r.Claims = nil
	})
}

func setMetadata(name, v string) Part {
	filter, key, _ := strings.Cut(strings.TrimSuffix(name, "]"), "[")
	return change(ofMetadata+attribute(name), "set", v, fmt.Sprintf("have the filter %s say %s: %s", filter, key, quoted(v)), 6, func(r *authz.Request) {
		r.Metadata = maps.Clone(r.Metadata)
		if r.Metadata == nil {
			r.Metadata = map[string]*structpb.Struct{}
		}
		s := &structpb.Struct{}
		if old := r.Metadata[filter]; old != nil {
			s = proto.CloneOf(old)
		}
		if s.Fields == nil {
			s.Fields = map[string]*structpb.Value{}
		}
		s.Fields[key] = structpb.NewStringValue(v)
		if strings.HasPrefix(v, "[") && strings.HasSuffix(v, "]") {
			s.Fields[key] = structpb.NewListValue(&structpb.ListValue{Values: []*structpb.Value{structpb.NewStringValue(strings.Trim(v, "[]"))}})
		}
		r.Metadata[filter] = s
	})
}

// witnesses are texts that a pattern is likely to match, the plainest first.
func witnesses(v, any string) []string {
	switch {
	case strings.Contains(v, "{*}") || strings.Contains(v, "{**}"):
		return []string{strings.NewReplacer("{**}", "x", "{*}", "x").Replace(v), strings.NewReplacer("{**}", "", "{*}", "x").Replace(v)}
	case v == "*":
		return []string{any}
	case strings.HasPrefix(v, "*"):
		return []string{v[1:], any + v[1:]}
	case strings.HasSuffix(v, "*"):
		return []string{v[:len(v)-1], v[:len(v)-1] + "x"}
	}
	return []string{v}
}

// candidates are changes of an attribute that tests of it might want, or not want.
func (s *search) candidates(of attribute, tests []*test, r *authz.Request) (out []edit) {
	seen := map[string]bool{}
	add := func(ps ...Part) {
		if id := edit(ps).id(); !seen[id] {
			seen[id] = true
			out = append(out, ps)
		}
	}
	texts := func(any string, others []string, set func(string) Part) {
		for _, v := range others { // those that are in use come first
			for _, t := range tests {
				for _, p := range t.values {
					if strings.HasPrefix(p, "*") && strings.HasSuffix(v, p[1:]) || strings.HasSuffix(p, "*") && strings.HasPrefix(v, p[:len(p)-1]) {
						add(set(v))
					}
				}
			}
		}
		for _, t := range tests {
			for _, p := range t.values {
				for _, w := range witnesses(p, any) {
					add(set(w))
				}
			}
		}
		for _, v := range others {
			add(set(v))
		}
	}
	switch of {
	case ofMethod:
		texts("x", []string{"GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"}, setMethod)
	case ofPath:
		texts("/x", []string{"/", "/x", "/other"}, setPath)
	case ofHost:
		texts("x", []string{"example.com", "other.example"}, setHost)
	case ofSNI:
		texts("x", []string{"example.com", "other.example", ""}, setSNI)
	case ofPort:
		for _, t := range tests {
			for _, v := range t.values {
				if n, err := strconv.ParseUint(v, 10, 16); err == nil {
					add(setPort(uint16(n)))
				}
			}
		}
		for _, n := range []uint16{8080, 80, 9090, 65000} {
			add(setPort(n))
		}
	case ofSource, ofRemote, ofDestination:
		for _, t := range tests {
			for _, v := range t.values {
				if p, err := netip.ParsePrefix(v); err == nil {
					a := p.Masked().Addr()
					if p.Bits() < a.BitLen() {
						add(setAddress(of, a.Next()))
					}
					add(setAddress(of, a))
				} else if a, err := netip.ParseAddr(v); err == nil && a.Zone() == "" {
					add(setAddress(of, a))
				}
			}
		}
		for _, v := range []string{"192.0.2.1", "198.51.100.1", "203.0.113.200", "2001:db8::1", "2001:db9::1"} {
			add(setAddress(of, netip.MustParseAddr(v)))
		}
	case ofPrincipal:
		for _, n := range s.names(tests, r) {
			p := setPrincipal(n)
			if s.base.Request.Known&authz.FieldPeer != 0 && !s.base.Request.Authenticated {
				p.Text = "call with a certificate, as " + quoted(strings.TrimPrefix(n, scheme))
			}
			add(p)
		}
		add(dropPrincipal())
	case ofIdentity:
		for _, t := range tests {
			for _, v := range t.values {
				i := strings.LastIndexByte(v, '/')
				iss, sub := v, ""
				if i >= 0 {
					iss, sub = v[:i], v[i+1:]
				}
				switch {
				case v == "*":
					iss, sub = "https://issuer.example", "x"
				case i < 0 && strings.HasPrefix(v, "*"):
					iss, sub = "https://issuer.example", v[1:]
				case i < 0 && strings.HasSuffix(v, "*"):
					iss, sub = v[:len(v)-1], "x"
				default:
					iss = witnesses(iss, "https://issuer.example")[0]
					if iss == "" {
						iss = "https://issuer.example"
					}
					sub = witnesses(sub, "x")[0]
				}
				if sub == "" && strings.HasSuffix(v, "*") {
					sub = "x"
				}
				add(setClaim("[iss]", iss), setClaim("[sub]", sub))
			}
		}
		add(setClaim("[iss]", "https://other.example"))
		add(setClaim("[sub]", "other"))
		add(noToken())
	default:
		switch name := string(of); {
		case strings.HasPrefix(name, string(ofHeader)):
			name = strings.TrimPrefix(name, string(ofHeader))
			texts("x", []string{"x", "other"}, func(v string) Part { return setHeader(name, v) })
			add(dropHeader(name))
		case strings.HasPrefix(name, string(ofClaim)):
			name = strings.TrimPrefix(name, string(ofClaim))
			texts("x", []string{"x", "other"}, func(v string) Part { return setClaim(name, v) })
			add(dropClaim(name))
			add(noToken())
		case strings.HasPrefix(name, string(ofMetadata)):
			name = strings.TrimPrefix(name, string(ofMetadata))
			for _, t := range tests {
				for _, v := range t.values {
					if inner, list := strings.CutPrefix(v, "["); list && strings.HasSuffix(v, "]") {
						add(setMetadata(name, "["+witnesses(strings.Trim(inner, "[]"), "x")[0]+"]"))
						continue
					}
					add(setMetadata(name, witnesses(v, "x")[0]))
				}
			}
			add(setMetadata(name, "other"))
		}
	}
	return out
}

// names are principals that tests might want: made of the pieces that they name.
func (s *search) names(tests []*test, r *authz.Request) (out []string) {
	td := s.Snapshot.Options().TrustDomain.Name()
	domains := []string{cmp.Or(td, "cluster.local")}
	namespaces := []string{cmp.Or(s.Workload.Namespace, "default")}
	accounts := []string{"default"}
	var whole []string
	for _, t := range tests {
		for _, v := range t.values {
			name := t.name
			switch name {
			case "principals", "source.principal":
				switch {
				case v == "*":
				case strings.HasPrefix(v, "*"):
					rest := v[1:]
					if i := strings.LastIndexByte(rest, '/'); i >= 0 {
						accounts = append(accounts, rest[i+1:])
						if parts := strings.Split(rest, "/"); len(parts) >= 4 && parts[len(parts)-4] == "ns" {
							namespaces = append(namespaces, parts[len(parts)-3])
						}
					} else {
						accounts = append(accounts, rest)
					}
					whole = append(whole, scheme+domains[0]+"/ns/"+namespaces[0]+rest, scheme+domains[0]+rest)
				case strings.HasSuffix(v, "*"):
					p := v[:len(v)-1]
					parts := strings.Split(p, "/")
					switch {
					case len(parts) == 4 && parts[3] == "":
						whole = append(whole, scheme+p+"sa/default")
					case len(parts) == 2 && parts[1] == "":
						whole = append(whole, scheme+p+"ns/default/sa/default")
					}
					if len(parts) > 2 && parts[1] == "ns" {
						namespaces = append(namespaces, parts[2])
					}
					if len(parts) > 1 {
						domains = append(domains, parts[0])
					}
					whole = append(whole, scheme+p, scheme+p+"x", scheme+p+"/ns/"+namespaces[0]+"/sa/default")
				default:
					whole = append(whole, scheme+v)
					if parts := strings.Split(v, "/"); len(parts) == 5 {
						domains, namespaces, accounts = append(domains, parts[0]), append(namespaces, parts[2]), append(accounts, parts[4])
					}
				}
			case "namespaces", "source.namespace":
				namespaces = append(namespaces, strings.ReplaceAll(v, "*", ""), strings.ReplaceAll(v, "*", "x"))
			case "serviceAccounts", "source.serviceAccount":
				ns, sa, ok := strings.Cut(v, "/")
				if ok {
					namespaces = append(namespaces, ns)
				} else {
					sa = v
				}
				accounts = append(accounts, sa)
			case "trustDomains", "source.trustDomain":
				if w := witnesses(v, "example.org")[0]; w != "" {
					domains = append(domains, w)
				}
			}
		}
	}
	// An account without a namespace is of the policy's.
	namespaces = append(namespaces, s.Snapshot.Options().RootNamespace, "default", "other")
	domains = append(domains, "other.example")
	accounts = append(accounts, "other")
	add := func(n string) {
		if !slices.Contains(out, n) && len(out) < 400 {
			out = append(out, n)
		}
	}
	for _, n := range whole {
		add(n)
	}
	for _, d := range domains {
		for _, n := range namespaces {
			for _, a := range accounts {
				if n != "" && a != "" {
					add(scheme + d + "/ns/" + n + "/sa/" + a)
				}
			}
		}
	}
	return out
}

// byAttribute are the tests of an alternative by what they read.
func (a *alternative) byAttribute() (order []attribute, tests map[attribute][]*test) {
	tests = map[attribute][]*test{}
	for _, t := range a.tests {
		if tests[t.of] == nil {
			order = append(order, t.of)
		}
		tests[t.of] = append(tests[t.of], t)
	}
	return order, tests
}

func apply(r *authz.Request, e edit) *authz.Request {
	changed := *r
	for _, p := range e {
		p.request(&changed)
	}
	return &changed
}

// fulfil are changes that make an alternative match.
func (s *search) fulfil(a *alternative, r *authz.Request) (out []edit) {
	order, tests := a.byAttribute()
	var choices [][]edit
	for _, of := range order {
		if !slices.ContainsFunc(tests[of], func(t *test) bool { return t.match(r) != authz.Yes }) {
			continue
		}
		var good []edit
		for _, e := range s.candidates(of, tests[of], r) {
			now := apply(r, e)
			if !slices.ContainsFunc(tests[of], func(t *test) bool { return t.match(now) != authz.Yes }) {
				if good = append(good, e); len(good) == 3 {
					break
				}
			}
		}
		if len(good) == 0 {
			return nil
		}
		choices = append(choices, good)
	}
	if len(choices) == 0 {
		return nil
	}
	for k := range 3 {
		var e edit
		more := false
		for _, c := range choices {
			e = e.with(c[min(k, len(c)-1)])
			more = more || k < len(c)
		}
		if more {
			out = append(out, e)
		}
	}
	return out
}

// falsify are changes after which an alternative certainly does not match.
func (s *search) falsify(a *alternative, r *authz.Request) (out []edit) {
	order, tests := a.byAttribute()
	for _, of := range order {
		n := 0
		for _, e := range s.candidates(of, tests[of], r) {
			now := apply(r, e)
			if slices.ContainsFunc(tests[of], func(t *test) bool { return t.match(now) == authz.No }) {
				out = append(out, e)
				if n++; n == 3 {
					break
				}
			}
		}
	}
	return out
}

// requestRepairs are changes to the request that get round what decided.
func (s *search) requestRepairs(a at) (out []edit) {
	r := &a.Request
	if !s.want { // what allows must not match
		if a.Reason == authz.ReasonAllowRule {
			return s.around(a.deciding(), r)
		}
		return nil
	}
	switch a.Reason {
	case authz.ReasonPlaintext, authz.ReasonPlaintextUnknown:
		var callers []*test
		for _, rule := range a.rules {
			if rule.Action == authz.ActionAllow && !rule.DryRun {
				for _, t := range rule.tests {
					if t.of == ofPrincipal && !t.not {
						callers = append(callers, t)
					}
				}
			}
		}
		out = s.candidates(ofPrincipal, callers, r)[:1]
	case authz.ReasonDenyRule, authz.ReasonDenyUnknown, authz.ReasonProviders, authz.ReasonAskRule, authz.ReasonAskUnknown:
		return s.around(a.deciding(), r)
	case authz.ReasonNoAllowRule, authz.ReasonAllowUnknown:
		for _, alt := range a.allowing() {
			out = append(out, s.fulfil(alt, r)...)
		}
	case authz.ReasonTokenRefused, authz.ReasonTokenForeign, authz.ReasonTokenUnknown:
		out = s.otherToken(a)
	}
	return out
}

// around are changes after which the rule matches by one alternative less.
func (s *search) around(rule *rule, r *authz.Request) []edit {
	if rule == nil {
		return nil
	}
	for i := range rule.alternatives {
		if a := &rule.alternatives[i]; a.match(r) != authz.No {
			return s.falsify(a, r)
		}
	}
	return nil
}

// allowing are the alternatives of ALLOW rules, those first of which least is in the
// way.
func (a *at) allowing() (out []*alternative) {
	for _, rule := range a.rules {
		if rule.Action != authz.ActionAllow || rule.DryRun || rule.Reason != "" {
			continue
		}
		if !a.Request.HTTP && slices.ContainsFunc(rule.tests, func(t *test) bool { return t.httpOnly() }) {
			continue
		}
		for i := range rule.alternatives {
			out = append(out, &rule.alternatives[i])
		}
	}
	n := make(map[*alternative]int, len(out))
	for _, alt := range out {
		n[alt] = len(alt.failing(&a.Request))
	}
	slices.SortStableFunc(out, func(x, y *alternative) int { return cmp.Compare(n[x], n[y]) })
	return out[:min(len(out), 12)]
}

// otherToken are changes to the token that a RequestAuthentication refuses.
func (s *search) otherToken(a at) (out []edit) {
	r := &a.Request
	for tr := range a.program.TokenRules() {
		e := edit{}
		switch iss := tr.Spec.GetIssuer(); {
		case iss != "" && claimText(r.Claims.GetFields()["iss"]) != quoted(iss):
			e = append(e, setClaim("[iss]", iss))
		case r.Claims == nil:
			e = append(e, validToken())
		}
		if aud := tr.Spec.GetAudiences(); len(aud) > 0 {
			if _, reason := authz.CheckTokens([]authz.TokenRule{tr}, apply(r, e)); reason != "" {
				e = append(e, setClaim("[aud]", aud[0]))
			}
		}
		if r.Claims != nil {
			for _, name := range []string{"iss", "sub"} {
				if v := r.Claims.GetFields()[name]; v != nil && !isText(v) && !(name == "iss" && tr.Spec.GetIssuer() != "") {
					e = append(e, setClaim("["+name+"]", "x"))
				}
			}
		}
		if len(e) > 0 {
			out = append(out, e)
		}
	}
	// Without a token it passes, where none is needed.
	e := edit{}
	if r.Known&authz.FieldClaims == 0 || r.Claims != nil {
		e = append(e, noToken())
	}
	for tr := range a.program.TokenRules() {
		places := tr.Spec.GetFromHeaders()
		if len(places) == 0 && len(tr.Spec.GetFromParams())+len(tr.Spec.GetFromCookies()) == 0 {
			e = e.with(edit{dropHeader("authorization")})
		}
		for _, h := range places {
			e = e.with(edit{dropHeader(lowerASCII(h.GetName()))})
		}
		if len(tr.Spec.GetFromCookies()) > 0 {
			e = e.with(edit{dropHeader("cookie")})
		}
	}
	if path, query, ok := strings.Cut(string(r.Path), "?"); ok && query != "" {
		e = e.with(edit{setPath(path)})
	}
	return append(out, e)
}

func isText(v *structpb.Value) bool {
	_, ok := v.GetKind().(*structpb.Value_StringValue)
	return ok
}
