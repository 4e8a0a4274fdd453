package explain

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// Diff collects which decisions a change of policies changes. The zero Diff is empty.
type Diff struct {
	// Requests is how many were decided, Changed how many of them otherwise than before.
	Requests int `json:"requests"`
	Changed  int `json:"changed"`
	// Moved is how many are decided alike, by another policy or for another reason.
	Moved int `json:"moved"`
	// Groups are the changes by workload, policies and caller; see Sort.
	Groups []*Group `json:"groups"`

	index map[string]*Group
}

// Group are requests of one caller whose decisions the same policies change.
type Group struct {
	Workload string `json:"workload"`
	Before   Side   `json:"before"`
	After    Side   `json:"after"`
	// Caller is the name in the peer's certificate, or what is known instead.
	Caller string `json:"caller"`
	Count  int    `json:"count"`
	// Examples are a few of the requests, in words.
	Examples []string `json:"examples"`
}

// Side is a decision before or after the change.
type Side struct {
	Decision string       `json:"decision"`
	Provider string       `json:"provider,omitempty"`
	Kind     string       `json:"kind"`
	Policy   string       `json:"policy"`
	Rule     int          `json:"rule"`
	Reason   authz.Reason `json:"reason"`
}

func sideOf(d authz.Decision) Side {
	return Side{d.Verdict(), d.Provider, d.Kind, d.Policy, d.Rule, d.Reason}
}

// String is the decision in a few words.
func (s Side) String() string {
	switch {
	case s.Decision == "ask":
		return fmt.Sprintf("ask %s, by %s rule %d", quoted(s.Provider), s.Policy, s.Rule)
	case s.Policy == "":
		return fmt.Sprintf("%s (%s)", s.Decision, s.Reason)
	case s.Rule < 0:
		return fmt.Sprintf("%s by %s (%s)", s.Decision, s.Policy, s.Reason)
	}
	return fmt.Sprintf("%s by %s rule %d (%s)", s.Decision, s.Policy, s.Rule, s.Reason)
}

// maxExamples is how many requests of a group are shown.
const maxExamples = 3

// Add counts a request of a workload and its decisions.
func (d *Diff) Add(w identity.Workload, r *authz.Request, before, after authz.Decision) {
	d.Requests++
	b, a := sideOf(before), sideOf(after)
	if b == a {
		return
	}
	if b.Decision == a.Decision && b.Provider == a.Provider {
		d.Moved++
		return
	}
	d.Changed++
	caller, _ := got(ofPrincipal, r)
	g := &Group{Workload: quoted(w.Namespace), Before: b, After: a, Caller: caller}
	if w.ServiceAccount != "" {
		g.Workload += "/" + quoted(w.ServiceAccount)
	}
	key := fmt.Sprintf("%s\n%+v\n%+v\n%s", g.Workload, b, a, caller)
	if have, ok := d.index[key]; ok {
		g = have
	} else {
		if d.index == nil {
			d.index = make(map[string]*Group)
		}
		d.index[key] = g
		d.Groups = append(d.Groups, g)
	}
	g.Count++
	example := operation(r)
	if r.Known&authz.FieldDestinationPort != 0 {
		example += fmt.Sprintf(" to port %d", r.DestinationPort)
	}
	if len(g.Examples) < maxExamples && !slices.Contains(g.Examples, example) {
		g.Examples = append(g.Examples, example)
	}
}

// Sort puts what opens first, then by policy and by how many requests there are.
func (d *Diff) Sort() {
	slices.SortStableFunc(d.Groups, func(x, y *Group) int {
		policy := func(g *Group) string { return cmp.Or(g.After.Policy, g.Before.Policy) }
		opens := func(g *Group) int {
			if g.After.Decision == "allow" {
				return 0
			}
			return 1
		}
		return cmp.Or(
			cmp.Compare(opens(x), opens(y)),
			cmp.Compare(policy(x), policy(y)), cmp.Compare(y.Count, x.Count), cmp.Compare(x.Caller, y.Caller),
		)
	})
}

// Write writes the changes for people: by what decides before and after, then by
// caller.
func (d *Diff) Write(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%d of %d requests are decided otherwise", d.Changed, d.Requests)
	if d.Moved > 0 {
		fmt.Fprintf(&b, "; %d alike, by another policy or for another reason", d.Moved)
	}
	fmt.Fprintln(&b)
	last := ""
	for _, g := range d.Groups {
		if head := fmt.Sprintf("%s: %s -> %s", g.Workload, g.Before, g.After); head != last {
			fmt.Fprintf(&b, "\n%s\n", head)
			last = head
		}
		fmt.Fprintf(&b, "  %6d from %s: %s", g.Count, g.Caller, strings.Join(g.Examples, "; "))
		if g.Count > len(g.Examples) {
			fmt.Fprint(&b, "; ...")
		}
		fmt.Fprintln(&b)
	}
	_, err := io.WriteString(w, b.String())
	return err
}
