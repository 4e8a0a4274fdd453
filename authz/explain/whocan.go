package explain

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"

	"google.golang.org/protobuf/encoding/protojson"
	security "istio.io/api/security/v1beta1"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// Answer says who may call a workload: whoever an entry of Allows matches, or anybody
// if Open, but for what Denies, Peer, Tokens and Refused stop, and with a word of a
// provider for what Asks match. It is exact, see [Coverage].
type Answer struct {
	Namespace string            `json:"namespace"`
	Labels    map[string]string `json:"labels,omitempty"`
	// Given is what was asked about; what it fixes is worked into the rules.
	Given Given `json:"given"`
	// Principals, Namespaces and Networks are those that Allows name, for a first
	// look: what is denied is not taken off.
	Principals []string `json:"principals,omitempty"`
	Namespaces []string `json:"namespaces,omitempty"`
	Networks   []string `json:"networks,omitempty"`
	// Refused are the resources that cannot be enforced, each of which denies all.
	Refused []Source `json:"refused,omitempty"`
	// Peer is where a certificate is demanded.
	Peer Peer `json:"peerAuthentication"`
	// Tokens are the rules that a token, where there is one, must be good for one of.
	Tokens []TokenSource `json:"tokens,omitempty"`
	// Asks are the rules that have a provider asked first. With Several there are
	// several providers, which is not enabled: what they match is denied.
	Asks    []Source `json:"asks,omitempty"`
	Several bool     `json:"severalProviders,omitempty"`
	Denies  []Source `json:"denies,omitempty"`
	Allows  []Source `json:"allows,omitempty"`
	// Open says that no ALLOW policy selects the workload.
	Open bool `json:"open"`
}

// Given is what is known of the requests that are asked about.
type Given struct {
	Method *string `json:"method,omitempty"`
	Path   *string `json:"path,omitempty"`
	Port   *uint16 `json:"port,omitempty"`
}

// Source is a rule.
type Source struct {
	Policy   string `json:"policy"`
	Rule     int    `json:"rule"`
	Origin   string `json:"file"`
	Line     int    `json:"line"`
	Provider string `json:"provider,omitempty"`
	// HTTP says that the rule reads what only HTTP has: a bare connection is allowed by
	// none such, and denied by it as if that were not there.
	HTTP bool `json:"http,omitempty"`
	// Match is what must hold, as in a rule of an AuthorizationPolicy, with the aliases
	// of trust domains; {} is any request.
	Match json.RawMessage `json:"match"`

	namespace string
	spec      *security.Rule
}

// TokenSource is a rule of a RequestAuthentication.
type TokenSource struct {
	Policy string          `json:"policy"`
	Rule   int             `json:"rule"`
	Match  json.RawMessage `json:"match"`
}

// Peer is PeerAuthentication: the mode of ports, and of those without one of their own.
type Peer struct {
	Mode   string          `json:"mode"`
	Policy string          `json:"policy,omitempty"`
	Ports  map[uint16]Peer `json:"ports,omitempty"`
}

// WhoCan says who may call a workload.
func WhoCan(s *authz.Snapshot, w identity.Workload, given Given) Answer {
	p := s.For(w)
	a := Answer{Namespace: w.Namespace, Labels: w.Labels, Given: given, Open: true}
	other, ports := p.PeerModes()
	a.Peer = Peer{Mode: other.Mode.String(), Policy: other.Policy}
	for port, m := range ports {
		if a.Peer.Ports == nil {
			a.Peer.Ports = map[uint16]Peer{}
		}
		a.Peer.Ports[port] = Peer{Mode: m.Mode.String(), Policy: m.Policy}
	}
	for t := range p.TokenRules() {
		j, err := protojson.Marshal(t.Spec)
		if err != nil {
			continue // never: it was read from JSON
		}
		a.Tokens = append(a.Tokens, TokenSource{t.Namespace + "/" + t.Name, t.Index, j})
	}
	providers := map[string]bool{}
	for r := range p.Rules() {
		src := Source{Policy: r.Resource(), Rule: r.Index, Origin: r.Origin, Line: r.Line, Provider: r.Provider, Match: json.RawMessage("{}"), namespace: r.Namespace}
		if r.Reason != "" {
			a.Refused = append(a.Refused, src)
			continue
		}
		if r.Action == authz.ActionCustom {
			providers[r.Provider] = true
		}
		if r.DryRun || r.Action == authz.ActionAudit {
			continue
		}
		if r.Action == authz.ActionAllow {
			a.Open = false
		}
		if r.Index < 0 {
			continue
		}
		spec, http, ok := given.simplify(newRule(r, s.Options().Envoy))
		if !ok {
			continue
		}
		j, err := protojson.Marshal(spec)
		if err != nil {
			continue // never: it was read from JSON
		}
		var compact bytes.Buffer
		if json.Compact(&compact, j) == nil {
			j = compact.Bytes()
		}
		src.Match, src.HTTP, src.spec = j, http, spec
		switch r.Action {
		case authz.ActionCustom:
			a.Asks = append(a.Asks, src)
		case authz.ActionDeny:
			a.Denies = append(a.Denies, src)
		default:
			a.Allows = append(a.Allows, src)
		}
	}
	a.Several = len(providers) > 1 && !s.Options().MultipleProviders
	a.summarize()
	return a
}

// simplify works what is given into a rule. ok is false if it then matches nothing.
func (g Given) simplify(r *rule) (spec *security.Rule, http, ok bool) {
	partial := &authz.Request{HTTP: true}
	if g.Method != nil {
		partial.Method, partial.Known = []byte(*g.Method), partial.Known|authz.FieldMethod
	}
	if g.Path != nil {
		partial.Path, partial.Known = []byte(*g.Path), partial.Known|authz.FieldPath
	}
	if g.Port != nil {
		partial.DestinationPort, partial.Known = *g.Port, partial.Known|authz.FieldDestinationPort
	}
	spec = &security.Rule{}
	truth := make(map[*test]authz.Truth, len(r.tests))
	for _, t := range r.tests {
		http = http || t.httpOnly()
		truth[t] = authz.Unknown
		if t.in != inWhen || t.of != ofPath { // request.headers[:path] has the query
			truth[t] = t.match(partial)
		}
	}
	// entry is whether an entry can hold, and what is left of it.
	entry := func(in where, i int) (left []*test, can bool) {
		for _, t := range r.tests {
			if t.in != in || t.entry != i {
				continue
			}
			switch truth[t] {
			case authz.No:
				return nil, false
			case authz.Unknown:
				left = append(left, t)
			}
		}
		return left, true
	}
	anyFrom, anyTo := len(r.Spec.GetFrom()) == 0, len(r.Spec.GetTo()) == 0
	for i := range r.Spec.GetFrom() {
		left, can := entry(inFrom, i)
		if !can {
			continue
		}
		anyFrom = anyFrom || len(left) == 0
		s := &security.Source{}
		for _, t := range left {
			*sourceList(s, t.list) = t.values
		}
		spec.From = append(spec.From, &security.Rule_From{Source: s})
	}
	for i := range r.Spec.GetTo() {
		left, can := entry(inTo, i)
		if !can {
			continue
		}
		anyTo = anyTo || len(left) == 0
		o := &security.Operation{}
		for _, t := range left {
			*operationList(o, t.list) = t.values
		}
		spec.To = append(spec.To, &security.Rule_To{Operation: o})
	}
	if !anyFrom && len(spec.From) == 0 || !anyTo && len(spec.To) == 0 {
		return nil, http, false
	}
	if anyFrom {
		spec.From = nil
	}
	if anyTo {
		spec.To = nil
	}
	for i, w := range r.Spec.GetWhen() {
		left, can := entry(inWhen, i)
		if !can {
			return nil, http, false
		}
		c := &security.Condition{Key: w.GetKey()}
		for _, t := range left {
			if t.not {
				c.NotValues = t.values
			} else {
				c.Values = t.values
			}
		}
		if len(left) > 0 {
			spec.When = append(spec.When, c)
		}
	}
	return spec, http, true
}

// summarize collects what rules name.
func (a *Answer) summarize() {
	add := func(to *[]string, more []string) {
		for _, v := range more {
			if !slices.Contains(*to, v) {
				*to = append(*to, v)
			}
		}
	}
	for _, src := range a.Allows {
		for _, c := range clausesOf(src.spec) {
			switch {
			case c.not:
			case c.name == "principals", c.name == "source.principal":
				add(&a.Principals, c.values)
			case c.name == "serviceAccounts", c.name == "source.serviceAccount":
				for _, v := range c.values {
					if !strings.Contains(v, "/") {
						v = src.namespace + "/" + v
					}
					add(&a.Principals, []string{"*/ns/" + strings.Replace(v, "/", "/sa/", 1)})
				}
			case c.name == "namespaces", c.name == "source.namespace":
				add(&a.Namespaces, c.values)
			case c.of == ofSource, c.of == ofRemote:
				add(&a.Networks, c.values)
			}
		}
	}
}

// Coverage evaluates an answer, by what the answer says and nothing else: it may come
// from JSON.
type Coverage struct {
	answer              Answer
	asks, denies, allow []*authz.Matcher
	tokens              []authz.TokenRule
}

// NewCoverage makes an answer ready, for Envoys of a version.
func NewCoverage(a Answer, envoy authz.EnvoyVersion) (*Coverage, error) {
	c := &Coverage{answer: a}
	for _, l := range []struct {
		from   []Source
		to     *[]*authz.Matcher
		action authz.Action
	}{{a.Asks, &c.asks, authz.ActionCustom}, {a.Denies, &c.denies, authz.ActionDeny}, {a.Allows, &c.allow, authz.ActionAllow}} {
		for _, src := range l.from {
			spec := &security.Rule{}
			if err := protojson.Unmarshal(src.Match, spec); err != nil {
				return nil, fmt.Errorf("rule %d of %s: %w", src.Rule, src.Policy, err)
			}
			namespace, _, _ := strings.Cut(src.Policy, "/")
			*l.to = append(*l.to, authz.NewMatcher(authz.Rule{Action: l.action, Namespace: namespace, Spec: spec}, envoy))
		}
	}
	for _, t := range a.Tokens {
		spec := &security.JWTRule{}
		if err := protojson.Unmarshal(t.Match, spec); err != nil {
			return nil, fmt.Errorf("rule %d of %s: %w", t.Rule, t.Policy, err)
		}
		c.tokens = append(c.tokens, authz.TokenRule{Spec: spec})
	}
	return c, nil
}

// Covers reports whether the answer is about the request and says that it is allowed
// without asking a provider.
func (c *Coverage) Covers(r *authz.Request) bool {
	about, verdict := c.Verdict(r)
	return about && verdict == "allow"
}

// Verdict is what the answer says of a request: "allow", "deny" or "ask". about is
// false if it was asked about other requests.
func (c *Coverage) Verdict(r *authz.Request) (about bool, verdict string) {
	g := c.answer.Given
	switch {
	case g.Method != nil && (!r.HTTP || r.Known&authz.FieldMethod == 0 || string(r.Method) != *g.Method || r.Method == nil),
		g.Path != nil && (!r.HTTP || r.Known&authz.FieldPath == 0 || r.Path == nil || pathOf(r.Path) != *g.Path),
		g.Port != nil && (r.Known&authz.FieldDestinationPort == 0 || r.DestinationPort != *g.Port):
		return false, "deny"
	case len(c.answer.Refused) > 0 || !c.peer(r):
		return true, "deny"
	}
	most := func(ms []*authz.Matcher, of []Source, http bool) (best authz.Truth) {
		for i, m := range ms {
			if http && of[i].HTTP && !r.HTTP {
				continue // the whole rule is left out
			}
			best = max(best, m.Match(r))
		}
		return best
	}
	if most(c.asks, c.answer.Asks, false) != authz.No {
		if c.answer.Several {
			return true, "deny"
		}
		return true, "ask"
	}
	if _, reason := authz.CheckTokens(c.tokens, r); reason != "" {
		return true, "deny"
	}
	behind := authz.AfterTokens(c.tokens, r)
	r = &behind
	if most(c.denies, c.answer.Denies, false) == authz.No && (c.answer.Open || most(c.allow, c.answer.Allows, true) == authz.Yes) {
		return true, "allow"
	}
	return true, "deny"
}

func pathOf(path []byte) string {
	if i := bytes.IndexAny(path, "?#"); i >= 0 {
		path = path[:i]
	}
	return string(path)
}

// peer reports whether PeerAuthentication lets the request in.
func (c *Coverage) peer(r *authz.Request) bool {
	if r.Known&authz.FieldPeer != 0 && r.Authenticated {
		return true
	}
	strict := authz.ModeStrict.String()
	if r.Known&authz.FieldDestinationPort != 0 {
		if p, ok := c.answer.Peer.Ports[r.DestinationPort]; ok {
			return p.Mode != strict
		}
		return c.answer.Peer.Mode != strict
	}
	if c.answer.Peer.Mode == strict {
		return false
	}
	for _, p := range c.answer.Peer.Ports {
		if p.Mode == strict {
			return false
		}
	}
	return true
}

// Write writes the answer for people.
func (a *Answer) Write(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, a.headline())
	switch peer := a.peerText(); {
	case len(a.Refused) > 0:
		for _, r := range a.Refused {
			fmt.Fprintf(w, "  %s (%s:%d) cannot be enforced, and denies everything\n", r.Policy, r.Origin, r.Line)
		}
		return w.Flush()
	case peer != "":
		fmt.Fprintf(w, "  only with a certificate: %s\n", peer)
	}
	for _, t := range a.Tokens {
		rule := &security.JWTRule{}
		if protojson.Unmarshal(t.Match, rule) == nil {
			text := "issuer " + quoted(rule.GetIssuer())
			if len(rule.GetAudiences()) > 0 {
				text += " for " + shorten(rule.GetAudiences())
			}
			fmt.Fprintf(w, "  with no token, or one of %s (rule %d of %s)\n", text, t.Rule, t.Policy)
		}
	}
	table(w, "allowed", a.Allows)
	table(w, "except, denied", a.Denies)
	if a.Several {
		table(w, "except, denied because several providers would have to be asked", a.Asks)
	} else {
		table(w, "only if the provider allows", a.Asks)
	}
	return w.Flush()
}

// headline is the answer in one sentence.
func (a *Answer) headline() string {
	what := "call"
	var about []string
	if a.Given.Method != nil {
		about = append(about, quoted(*a.Given.Method))
	}
	if a.Given.Path != nil {
		about = append(about, quoted(*a.Given.Path))
	}
	if len(about) > 0 {
		what = "send " + strings.Join(about, " ") + " to"
	}
	what += " the workload in " + quoted(a.Namespace)
	for _, k := range slices.Sorted(maps.Keys(a.Labels)) {
		what += " " + quoted(k) + "=" + quoted(a.Labels[k])
	}
	if a.Given.Port != nil {
		what += fmt.Sprintf(" on port %d", *a.Given.Port)
	}
	all := slices.ContainsFunc(a.Denies, func(s Source) bool { return len(clausesOf(s.spec)) == 0 })
	switch {
	case len(a.Refused) > 0:
		return "nobody can " + what + ": a policy cannot be enforced"
	case all:
		return "nobody can " + what + ": a DENY rule matches every request"
	case a.Open:
		return "anybody can " + what + ", but for the exceptions below: no ALLOW policy selects it"
	case len(a.Allows) == 0:
		return "nobody can " + what + ": ALLOW policies select it, and none of their rules can match"
	}
	return "these can " + what + ":"
}

// peerText says where certificates are demanded.
func (a *Answer) peerText() string {
	strict := authz.ModeStrict.String()
	if a.Given.Port != nil {
		p, ok := a.Peer.Ports[*a.Given.Port]
		if !ok {
			p = a.Peer
		}
		if p.Mode != strict {
			return ""
		}
		return fmt.Sprintf("STRICT by PeerAuthentication %s", p.Policy)
	}
	var parts []string
	for _, port := range slices.Sorted(maps.Keys(a.Peer.Ports)) {
		if p := a.Peer.Ports[port]; (p.Mode == strict) != (a.Peer.Mode == strict) {
			parts = append(parts, fmt.Sprint(port))
		}
	}
	switch {
	case a.Peer.Mode == strict && len(parts) > 0:
		return fmt.Sprintf("STRICT by PeerAuthentication %s, but for port %s", a.Peer.Policy, strings.Join(parts, ", "))
	case a.Peer.Mode == strict:
		return fmt.Sprintf("STRICT by PeerAuthentication %s", a.Peer.Policy)
	case len(parts) > 0:
		return "STRICT on port " + strings.Join(parts, ", ")
	}
	return ""
}

func table(w io.Writer, title string, rules []Source) {
	if len(rules) == 0 {
		return
	}
	fmt.Fprintf(w, "\n%s:\n  WHO\tWHAT\tWHEN\tBY\n", title)
	for _, src := range rules {
		what, when := operations(src.spec), "-"
		var conditions []string
		for _, c := range clausesOf(src.spec) {
			if c.in == inWhen {
				conditions = append(conditions, clauseText(c.name, c))
			}
		}
		if len(conditions) > 0 {
			when = strings.Join(conditions, " and ")
		}
		by := fmt.Sprintf("rule %d of %s (%s:%d)", src.Rule, src.Policy, src.Origin, src.Line)
		if src.Provider != "" {
			by = "provider " + quoted(src.Provider) + ", " + by
		}
		for i := range max(1, len(src.spec.GetFrom())) {
			fmt.Fprintf(w, "  %s\t%s\t%s\t%s\n", entryText(src.spec, inFrom, i, "anybody"), what, when, by)
		}
	}
}

func operations(spec *security.Rule) string {
	var all []string
	for i := range max(1, len(spec.GetTo())) {
		all = append(all, entryText(spec, inTo, i, "anything"))
	}
	return strings.Join(all, " or ")
}

func entryText(spec *security.Rule, in where, entry int, none string) string {
	var parts []string
	for _, c := range clausesOf(spec) {
		if c.in == in && c.entry == entry {
			parts = append(parts, clauseText(c.list, c))
		}
	}
	if len(parts) == 0 {
		return none
	}
	return strings.Join(parts, ", ")
}

func clauseText(name string, c clause) string {
	if c.in == inWhen && c.not {
		name += " not"
	}
	return name + " " + shorten(c.values)
}
