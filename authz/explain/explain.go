package explain

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// Case is a request and what decides about it.
type Case struct {
	// Set are the policies, Snapshot is what they compile to.
	Set      authz.Set
	Snapshot *authz.Snapshot
	// Workload is the destination of the request: its namespace and labels count.
	Workload identity.Workload
	Request  authz.Request
	// Providers are the answers of extension providers, as far as they are known. One
	// that is not here is taken to allow, where that is needed to go on.
	Providers map[string]bool
	// Changes are what those that allowed changed of the request, in the order in which
	// they were asked. Request.Claims and Request.Token were found behind them.
	Changes []Change
}

// Change is what an extension provider that allowed changed of a request.
type Change struct {
	Provider string
	Changes  *authz.Changes
}

// Explanation is why a request was decided as it was, and what would decide it
// otherwise.
type Explanation struct {
	// Decision is "allow", "deny", or "ask" where a provider has the last word.
	Decision string `json:"decision"`
	// Summary is the verdict in one sentence.
	Summary string `json:"summary"`
	// Kind, Policy, Rule and Reason are those of the decision.
	Kind   string       `json:"kind"`
	Policy string       `json:"policy"`
	Rule   int          `json:"rule"`
	Reason authz.Reason `json:"reason"`
	// Asks are the extension providers that are asked.
	Asks []string `json:"asks,omitempty"`
	// Because is what decided, in more detail.
	Because []string `json:"because,omitempty"`
	// Misses are the ALLOW rules that did not match, the nearest first.
	Misses []Miss `json:"nearMisses,omitempty"`
	// Stages are all policies, in the order of evaluation.
	Stages []Stage `json:"stages"`
	// Suggestions are the smallest changes that turn the decision round.
	Suggestions []Suggestion `json:"suggestions"`
}

// Miss is an ALLOW rule that does not certainly match, and what is in its way.
type Miss struct {
	Policy string   `json:"policy"`
	Rule   int      `json:"rule"`
	Origin string   `json:"file"`
	Line   int      `json:"line"`
	But    []Clause `json:"but"`
	Note   string   `json:"note,omitempty"`
}

// Stage is one step of a decision.
type Stage struct {
	Name string `json:"name"`
	// Reached is false if an earlier stage decided.
	Reached  bool     `json:"reached"`
	Policies []Policy `json:"policies,omitempty"`
}

// Policy is one resource.
type Policy struct {
	Kind   string `json:"kind"`
	Policy string `json:"policy"`
	Action string `json:"action,omitempty"`
	DryRun bool   `json:"dryRun,omitempty"`
	Origin string `json:"file"`
	Line   int    `json:"line"`
	// Selected says whether it is about the workload; Why says why not, or what
	// the resource comes to as a whole.
	Selected bool   `json:"selected"`
	Why      string `json:"why,omitempty"`
	Rules    []Rule `json:"rules,omitempty"`
}

// Rule is one rule of a policy.
type Rule struct {
	Index int `json:"rule"`
	Line  int `json:"line"`
	// Matches is "yes", "no" or "unknown".
	Matches string   `json:"matches"`
	Clauses []Clause `json:"fields,omitempty"`
	Note    string   `json:"note,omitempty"`
}

// Clause is one list of values of a rule, and what it says of the request.
type Clause struct {
	// Field is where it stands in the rule, as from[0].source.principals.
	Field string `json:"field"`
	// Values are those of the policy, with the aliases of trust domains.
	Values []string `json:"values"`
	// Got is the value of the request, for people.
	Got string `json:"got"`
	// Holds is "yes", "no" or "unknown"; of a not-form it is the negation that holds.
	Holds string `json:"holds"`
	// Text is a sentence.
	Text string `json:"text"`
}

// program decides for the case.
func (c *Case) program() *authz.Program { return c.Snapshot.For(c.Workload) }

// outcome is a decision to the end: with the answers of providers.
type outcome struct {
	authz.Decision
	asks []string
	// asked are the decisions to ask them, each with the request as the provider sees it.
	asked []asking
	// refusedBy is the provider that denied.
	refusedBy string
	// custom is the request behind the providers, behind is that as AUDIT, DENY and
	// ALLOW see it.
	custom, behind authz.Request
}

type asking struct {
	authz.Decision
	request authz.Request
}

func (c *Case) decide(p *authz.Program, r *authz.Request) (o outcome) {
	then := make([]*authz.Changes, len(c.Changes))
	for i := range c.Changes {
		then[i] = c.Changes[i].Changes
	}
	o.Decision, o.custom = p.Again(r, then, func(d authz.Decision, r *authz.Request) (*authz.Changes, bool) {
		o.asks, o.asked = append(o.asks, d.Provider), append(o.asked, asking{d, *r})
		if allowed, known := c.Providers[d.Provider]; known && !allowed {
			o.refusedBy = d.Provider
			return nil, false
		}
		for i := range c.Changes {
			if c.Changes[i].Provider == d.Provider {
				return c.Changes[i].Changes, true
			}
		}
		return nil, true
	})
	o.behind = authz.AfterTokens(slices.Collect(p.TokenRules()), &o.custom)
	return o
}

// open reports whether some provider that is asked has not answered.
func (c *Case) open(o outcome) bool { return len(c.unanswered(o)) > 0 }

// unanswered are the decisions to ask providers that have not answered.
func (c *Case) unanswered(o outcome) (out []asking) {
	for _, a := range o.asked {
		if _, known := c.Providers[a.Provider]; !known {
			out = append(out, a)
		}
	}
	return out
}

// Explain explains.
func Explain(c Case) Explanation {
	p := c.program()
	o := c.decide(p, &c.Request)
	e := Explanation{
		Decision: "deny", Kind: o.Kind, Policy: o.Policy, Rule: o.Rule, Reason: o.Reason, Asks: o.asks,
	}
	switch {
	case o.Allowed && c.open(o):
		d := c.unanswered(o)[0]
		e.Decision, e.Kind, e.Policy, e.Rule, e.Reason = "ask", d.Kind, d.Policy, d.Rule, d.Reason
	case o.Allowed:
		e.Decision = "allow"
	}
	envoy := c.Snapshot.Options().Envoy
	var rules []*rule
	for r := range p.Rules() {
		rules = append(rules, newRule(r, envoy))
	}
	t := &tracer{Case: &c, program: p, rules: rules, outcome: o}
	e.Stages = t.stages()
	if o.Reason == authz.ReasonNoAllowRule || o.Reason == authz.ReasonAllowUnknown {
		e.Misses = t.misses()
	}
	e.Summary, e.Because = t.verdict(e.Decision)
	e.Suggestions = c.suggest(t)
	return e
}

// tracer tells how a decision came about.
type tracer struct {
	*Case
	program *authz.Program
	rules   []*rule
	outcome
}

// sees is the request as the rule sees it.
func (t *tracer) sees(r *rule) *authz.Request {
	if r.Action != authz.ActionCustom {
		return &t.behind
	}
	// Providers are asked in the order of the rules, which is that of their names.
	for i := range t.asked {
		if t.asked[i].Provider >= r.Provider {
			return &t.asked[i].request
		}
	}
	return &t.custom
}

// clause is what a test says of the request.
func (t *tracer) clause(x *test, r *rule) Clause {
	truth := x.match(t.sees(r))
	got, known := got(x.of, t.sees(r))
	c := Clause{Field: x.path(), Values: x.values, Got: got, Holds: truth.String()}
	label := string(x.of)
	if x.in == inWhen {
		label = x.name
	}
	values := shorten(x.values)
	switch {
	case x.of == ofNothing:
		c.Text = fmt.Sprintf("%s is no key that Istio knows", quoted(x.name))
		if r.Action == authz.ActionAllow {
			c.Text += ", so the whole rule is left out"
		} else {
			c.Text += ", so it is left out and the rule gets wider"
		}
	case !t.Request.HTTP && x.httpOnly() && r.Action == authz.ActionAllow:
		c.Text = fmt.Sprintf("%s: a bare connection has none, so the whole rule is left out", label)
	case !t.Request.HTTP && x.httpOnly():
		c.Text = fmt.Sprintf("%s: a bare connection has none, so %s is not looked at", label, x.list)
	case truth == authz.Unknown && !known:
		c.Text = fmt.Sprintf("%s: %s; it is held against %s", label, got, values)
	case truth == authz.Unknown:
		c.Text = fmt.Sprintf("%s: whether %s is in %s %s cannot be told", label, got, x.list, values)
	case (truth == authz.Yes) != x.not:
		c.Text = fmt.Sprintf("%s: %s is in %s %s", label, got, x.list, values)
	default:
		c.Text = fmt.Sprintf("%s: %s is not in %s %s", label, got, x.list, values)
	}
	return c
}

// shorten is a list of values, with its end cut off if it is long.
func shorten(values []string) string {
	const most = 6
	out := make([]string, 0, most)
	for i, v := range values {
		if i == most-1 && len(values) > most {
			out = append(out, fmt.Sprintf("and %d more", len(values)-i))
			break
		}
		out = append(out, quoted(v))
	}
	return "[" + strings.Join(out, ", ") + "]"
}

// quoted is a text that people may see: bounded, and in quotes if it holds anything
// that is not plain.
func quoted(s string) string {
	const most = 120
	end := ""
	if len(s) > most {
		s, end = s[:most], "…"
	}
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c >= 0x7f || c == '"' || c == '\\' || c == ',' {
			return fmt.Sprintf("%q", s) + end
		}
	}
	if s == "" {
		return `""`
	}
	return s + end
}

// traced is a rule as it stands with the request.
func (t *tracer) traced(r *rule) Rule {
	out := Rule{Index: r.Index, Line: r.Line, Matches: r.whole.Match(t.sees(r)).String()}
	for _, x := range r.tests {
		out.Clauses = append(out.Clauses, t.clause(x, r))
	}
	switch {
	case r.Index < 0:
		out.Note = "it has no rules, so it matches nothing and denies what no other policy allows"
	case len(r.tests) == 0:
		out.Note = "it has no conditions, so it matches every request"
	}
	return out
}

// misses are the ALLOW rules by how little is in the way of their matching.
func (t *tracer) misses() []Miss {
	type scored struct {
		Miss
		absent int
	}
	var all []scored
	for _, r := range t.rules {
		if r.Action != authz.ActionAllow || r.DryRun || r.Reason != "" || r.Kind != authz.KindAuthorizationPolicy {
			continue
		}
		m := scored{Miss: Miss{Policy: r.Resource(), Rule: r.Index, Origin: r.Origin, Line: r.Line}}
		if r.Index < 0 {
			m.Note, m.absent = "it has no rules, so it matches nothing", 100
			all = append(all, m)
			continue
		}
		best := r.nearest(t.sees(r))
		for _, x := range best {
			m.But = append(m.But, t.clause(x, r))
			m.absent += 2
			if x.of == ofPrincipal || x.of == ofIdentity {
				m.absent++ // an operation is sooner the wrong one than a caller
			}
		}
		if !t.Request.HTTP && slices.ContainsFunc(r.tests, func(x *test) bool { return x.httpOnly() }) {
			m.absent += 10
			if len(m.But) == 0 {
				m.Note = "it reads attributes of HTTP, so a bare connection is not held against it"
			}
		}
		all = append(all, m)
	}
	slices.SortStableFunc(all, func(a, b scored) int { return cmp.Compare(a.absent, b.absent) })
	out := make([]Miss, len(all))
	for i := range all {
		out[i] = all[i].Miss
	}
	return out
}

// nearest are the failing tests of the alternative with the fewest.
func (r *rule) nearest(req *authz.Request) (best []*test) {
	for i := range r.alternatives {
		f := r.alternatives[i].failing(req)
		if i == 0 || len(f) < len(best) {
			best = f
		}
	}
	return best
}

// Refused is the explanation of a request that was denied before any policy was
// asked.
func Refused(reason authz.Reason, detail string) Explanation {
	return Explanation{
		Decision: "deny", Rule: -1, Reason: reason, Stages: []Stage{}, Suggestions: []Suggestion{},
		Summary: "denied: no policy was asked: " + detail,
	}
}
