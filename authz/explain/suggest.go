package explain

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/signet-mesh/signet/authz"
)

// Suggestion is a change that turns a decision round, which has been tried, and
// does not without any of its parts, which has been tried too.
type Suggestion struct {
	// About is "request" or "policies".
	About string `json:"about"`
	// Text is a sentence.
	Text  string `json:"text"`
	Parts []Part `json:"parts"`
	// Asks are the providers that are asked then; it holds if they allow.
	Asks []string `json:"asks,omitempty"`
	// Note is what else to know, as what else a change opens.
	Note string `json:"note,omitempty"`
}

// Part is one of the changes of a suggestion.
type Part struct {
	// On is "request", or a resource as "KIND NAMESPACE/NAME".
	On string `json:"on"`
	// Field is an attribute of the request, or the path of a field in the resource;
	// empty for the resource as a whole.
	Field string `json:"field,omitempty"`
	// Change is "set", "add", "remove" or "create".
	Change string `json:"change"`
	Value  string `json:"value,omitempty"`
	// YAML is what the resource then says, at the field's rule or as a whole.
	YAML string `json:"yaml,omitempty"`
	Text string `json:"text"`

	key     string // what is changed, so that no two parts change the same
	cost    int
	note    string
	request func(*authz.Request)
	policy  func(*draft) error
	yaml    func() string // YAML, once it is wanted
}

// draft is a change of a set in the making.
type draft struct {
	set     authz.Set
	specs   map[string]proto.Message // by resource
	rules   map[string][]int         // to be removed, by resource
	removed map[authz.Resource]bool
	added   []string
}

// spec is the specification of a resource, to be changed.
func (d *draft) spec(id string) (proto.Message, error) {
	if m, ok := d.specs[id]; ok {
		return m, nil
	}
	for r := range d.set.All() {
		if r.String() == id {
			if m := r.Spec(); m != nil {
				d.specs[id] = m
				return m, nil
			}
		}
	}
	return nil, fmt.Errorf("there is no %s that could be changed", id)
}

// With is the case after changes. A change that Istio's admission would refuse is an
// error.
func (c Case) With(parts ...Part) (Case, error) {
	c.Request.Headers = slices.Clone(c.Request.Headers)
	d := &draft{set: c.Set, specs: map[string]proto.Message{}, rules: map[string][]int{}, removed: map[authz.Resource]bool{}}
	policies := false
	for _, p := range parts {
		switch {
		case p.request != nil:
			p.request(&c.Request)
		case p.policy != nil:
			policies = true
			if err := p.policy(d); err != nil {
				return Case{}, err
			}
		}
	}
	if !policies {
		return c, nil
	}
	var resources []authz.Resource
	for r := range c.Set.All() {
		switch m, changed := d.specs[r.String()]; {
		case d.removed[r]:
		case changed:
			if err := d.removeRules(r.String(), m); err != nil {
				return Case{}, err
			}
			now, err := r.With(m)
			if err != nil {
				return Case{}, err
			}
			resources = append(resources, now)
		default:
			resources = append(resources, r)
		}
	}
	for _, text := range d.added {
		rs, problems := authz.Parse("suggestion", []byte(text))
		for _, p := range problems {
			if p.Severity == authz.SeverityError {
				return Case{}, p
			}
		}
		resources = append(resources, rs...)
	}
	set, problems := authz.Set{}.Update(resources)
	for _, p := range problems {
		if p.Origin == "suggestion" {
			return Case{}, p
		}
	}
	c.Set = set
	c.Snapshot, _ = c.Snapshot.Update(set)
	return c, nil
}

// Bounds of a search: of what is tried, of what is found, and of the parts of one
// suggestion.
const (
	maxTries       = 80
	maxSuggestions = 3
	maxParts       = 6
)

// edit is a change of one or more parts.
type edit []Part

func (e edit) cost() (n int) {
	for _, p := range e {
		n += p.cost
	}
	return n
}

func (e edit) keys() string {
	keys := make([]string, len(e))
	for i, p := range e {
		keys[i] = p.key
	}
	slices.Sort(keys)
	return strings.Join(keys, "\n")
}

func (e edit) id() string {
	ids := make([]string, len(e))
	for i, p := range e {
		ids[i] = p.key + "=" + p.Change + p.Value
	}
	slices.Sort(ids)
	return strings.Join(ids, "\n")
}

// with adds another; its parts replace those of the same key.
func (e edit) with(more edit) edit {
	out := slices.Clone(e)
	for _, p := range more {
		if i := slices.IndexFunc(out, func(q Part) bool { return q.key == p.key }); i >= 0 {
			out[i] = p
		} else {
			out = append(out, p)
		}
	}
	return out
}

// suggest finds the smallest changes that turn the decision round.
func (c *Case) suggest(t *tracer) []Suggestion {
	out := []Suggestion{}
	if t.Allowed && c.open(t.outcome) {
		return out // a provider decides
	}
	s := &search{Case: c, want: !t.Allowed, base: t, tried: map[string]trial{}}
	out = append(out, s.run("request", s.requestRepairs)...)
	out = append(out, s.run("policies", s.policyRepairs)...)
	if len(out) == 0 {
		s.desperate = true
		out = append(out, s.run("request", s.requestRepairs)...)
		out = append(out, s.run("policies", s.policyRepairs)...)
	}
	return out
}

// search is one for changes.
type search struct {
	*Case
	want bool // what is to be decided
	base *tracer
	// desperate allows changes that open more than would be needed.
	desperate bool
	// tried are the outcomes of changes, by what they are.
	tried map[string]trial
}

// trial is what became of a change: where it led, if it could be made.
type trial struct {
	at
	ok bool
}

// at is where a search is: a case with changes, and its decision.
type at struct {
	*tracer
	edit edit
}

// try decides the case with changes. ok is false if they cannot be made.
func (s *search) try(e edit) (a at, ok bool) {
	id := e.id()
	if t, ok := s.tried[id]; ok {
		return t.at, t.ok
	}
	if c, err := s.With(e...); err == nil {
		p := c.program()
		a, ok = at{&tracer{Case: &c, program: p, outcome: c.decide(p, &c.Request)}, e}, true
	}
	s.tried[id] = trial{a, ok}
	return a, ok
}

func (a *at) load() {
	envoy := a.Snapshot.Options().Envoy
	for r := range a.program.Rules() {
		a.rules = append(a.rules, newRule(r, envoy))
	}
}

// flipped reports whether the decision is the one that is wanted.
func (s *search) flipped(a at) bool {
	return a.Allowed == s.want && a.refusedBy == "" || !s.want && !a.Allowed
}

// run goes from the cheapest changes to dearer ones, by what each decision says
// would have to be otherwise.
func (s *search) run(about string, repairs func(at) []edit) (out []Suggestion) {
	type state struct {
		edit
		n int
	}
	queue := []state{{}}
	seen := map[string]bool{"": true}
	found := map[string]bool{} // by what is changed
	for tries := 0; len(queue) > 0 && tries < maxTries && len(out) < maxSuggestions; tries++ {
		slices.SortStableFunc(queue, func(a, b state) int { return cmp.Or(cmp.Compare(a.n, b.n), cmp.Compare(len(a.edit), len(b.edit))) })
		now := queue[0].edit
		queue = queue[1:]
		a, ok := s.try(now)
		if !ok {
			continue
		}
		if s.flipped(a) {
			small, ok := s.smallest(now)
			if keys := small.keys(); ok && !found[keys] {
				found[keys] = true
				out = append(out, s.suggestion(about, small))
			}
			continue
		}
		if about == "request" {
			a.rules = s.base.rules
		} else {
			a.load()
		}
		for _, e := range repairs(a) {
			next := now.with(e)
			if id := next.id(); !seen[id] && len(next) <= maxParts {
				seen[id] = true
				queue = append(queue, state{next, next.cost()})
			}
		}
	}
	slices.SortStableFunc(out, func(a, b Suggestion) int { return cmp.Compare(edit(a.Parts).cost(), edit(b.Parts).cost()) })
	return out
}

// smallest is the part of a change that suffices and of which nothing can be left
// out.
func (s *search) smallest(e edit) (edit, bool) {
	for i := 0; i < len(e); {
		if a, ok := s.try(slices.Delete(slices.Clone(e), i, i+1)); ok && s.flipped(a) {
			e = slices.Delete(slices.Clone(e), i, i+1)
			i = 0
			continue
		}
		i++
	}
	// Of few parts every choice is tried: two may be superfluous together.
	if n := len(e); n > 2 && n <= 4 {
		for mask := 1; mask < 1<<n-1; mask++ {
			var some edit
			for i := range e {
				if mask&(1<<i) != 0 {
					some = append(some, e[i])
				}
			}
			if a, ok := s.try(some); ok && s.flipped(a) {
				return s.smallest(some)
			}
		}
	}
	return e, len(e) > 0
}

// suggestion is a change in words.
func (s *search) suggestion(about string, e edit) Suggestion {
	e = slices.Clone(e)
	out := Suggestion{About: about, Parts: e}
	texts := make([]string, len(e))
	var notes []string
	for i, p := range e {
		texts[i] = p.Text
		if p.yaml != nil {
			e[i].YAML = p.yaml()
		}
		if p.note != "" && !slices.Contains(notes, p.note) {
			notes = append(notes, p.note)
		}
	}
	out.Text = strings.Join(texts, ", and ")
	out.Note = strings.Join(notes, "; ")
	if a, ok := s.try(e); ok {
		for _, p := range a.asks {
			if _, known := s.Providers[p]; !known {
				out.Asks = append(out.Asks, p)
			}
		}
	}
	return out
}

var errGone = errors.New("a change has nothing to change")
