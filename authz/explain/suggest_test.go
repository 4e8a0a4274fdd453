package explain_test

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/explain"
)

var denied = flag.Int("denied", whole(500, 100), "how many denied requests TestSuggestions has explained")

// verdict decides with providers that allow.
func verdict(c explain.Case) bool {
	p := c.Snapshot.For(c.Workload)
	d := p.Decide(&c.Request)
	for d.Ask {
		d = p.After(d, &c.Request)
	}
	return d.Allowed
}

// TestSuggestions holds that each of many random denied requests has a suggestion,
// that each suggestion turns the decision round, and that it no longer does when any
// part is left out.
func TestSuggestions(t *testing.T) {
	g := generator{rand.New(rand.NewPCG(6, 3))}
	counts := map[string]int{}
	n, worlds := 0, 0
	for n < *denied {
		w := g.world(t)
		worlds++
		for range 2 {
			c := explain.Case{Set: w.set, Snapshot: w.snapshot, Workload: workload, Request: g.request()}
			if verdict(c) {
				continue
			}
			n++
			e := explain.Explain(c)
			counts["reason "+string(e.Reason)]++
			if e.Decision != "deny" {
				t.Fatalf("%s: %s", e.Decision, e.Summary)
			}
			if len(e.Suggestions) == 0 {
				t.Errorf("no suggestion: %s\n%+v\n%s", e.Summary, c.Request, w.text)
			}
			for _, s := range e.Suggestions {
				counts["about "+s.About]++
				counts[fmt.Sprintf("parts %d", len(s.Parts))]++
				for _, p := range s.Parts {
					if s.About == "policies" {
						counts["policies "+p.Change]++
					}
				}
				check(t, c, s, w)
			}
			about := map[string]bool{}
			for _, s := range e.Suggestions {
				about[s.About] = true
			}
			counts["with "+fmt.Sprint(slices.Sorted(maps.Keys(about)))]++
		}
	}
	t.Logf("%d denied requests in %d sets of policies:", n, worlds)
	for _, k := range slices.Sorted(maps.Keys(counts)) {
		t.Logf("%6d %s", counts[k], k)
	}
	for _, r := range []authz.Reason{
		authz.ReasonNoAllowRule, authz.ReasonAllowUnknown, authz.ReasonDenyRule, authz.ReasonDenyUnknown, authz.ReasonPlaintext, authz.ReasonPlaintextUnknown,
		authz.ReasonTokenRefused, authz.ReasonTokenForeign, authz.ReasonTokenUnknown, authz.ReasonProviders, authz.ReasonInvalid,
	} {
		if counts["reason "+string(r)] == 0 && !raceEnabled {
			t.Errorf("no request was denied for %s", r)
		}
	}
}

func check(t *testing.T, c explain.Case, s explain.Suggestion, w *world) {
	t.Helper()
	changed, err := c.With(s.Parts...)
	if err != nil {
		t.Fatalf("%s: %v\n%s", s.Text, err, w.text)
	}
	if !verdict(changed) {
		t.Errorf("%q does not turn the decision round\n%+v\n%s", s.Text, c.Request, w.text)
	}
	for i := range s.Parts {
		rest := slices.Delete(slices.Clone(s.Parts), i, i+1)
		less, err := c.With(rest...)
		if err != nil {
			continue // the rest alone is no valid change
		}
		if verdict(less) {
			t.Errorf("%q is not needed in %q\n%+v\n%s", s.Parts[i].Text, s.Text, c.Request, w.text)
		}
	}
}
