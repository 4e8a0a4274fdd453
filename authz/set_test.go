package authz_test

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// policyYAML is an AuthorizationPolicy of the namespace default.
func policyYAML(name, spec string) string {
	return "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: " + name + ", namespace: default}\nspec: " + spec + "\n"
}

const (
	denyGet     = "{action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}"
	denyPost    = "{action: DENY, rules: [{to: [{operation: {methods: [POST]}}]}]}"
	invalidSpec = "{action: DENY}"
	webOnly     = "{selector: {matchLabels: {app: web}}, action: DENY}" // invalid too
	goodWeb     = "{selector: {matchLabels: {app: web}}, action: DENY, rules: [{}]}"
	broken      = "---\nkind: [unclosed\n"
)

// folder is what an agent's folder of policies holds: names and texts.
type folder map[string]string

// parse reads all of the folder.
func (f folder) parse() (rs []authz.Resource) {
	for _, name := range slices.Sorted(maps.Keys(f)) {
		r, _ := authz.Parse(name, []byte(f[name]))
		rs = append(rs, r...)
	}
	return rs
}

// states lists what a set enforces.
func states(s authz.Set) (list []string) {
	for r, state := range s.All() {
		origin, _ := r.Origin()
		list = append(list, strings.TrimSpace(fmt.Sprintf("%s %s %s", r, state, origin)))
	}
	return list
}

// get and post are decisions about two methods for a workload without labels.
func methods(s authz.Set, labels map[string]string) string {
	snapshot, _ := authz.Compile(s, authz.Options{})
	p := snapshot.For(identity.Workload{Namespace: "default", Labels: labels})
	var out []string
	for _, m := range []string{"GET", "POST"} {
		out = append(out, m+" "+render(p.Decide(&authz.Request{Known: authz.FieldsHTTP, HTTP: true, Method: []byte(m)})))
	}
	return strings.Join(out, ", ")
}

// TestUpdate follows folders through edits, good and bad, and says after each
// step what is enforced.
func TestUpdate(t *testing.T) {
	t.Parallel()
	const nothing = "GET allow no-allow-policy, POST allow no-allow-policy"
	type step struct {
		folder folder
		states []string
		want   string
	}
	p := func(s string) string { return "AuthorizationPolicy default/" + s }
	for name, steps := range map[string][]step{
		"a good edit is enforced": {
			{folder{"a": policyYAML("p", denyGet)}, []string{p("p good a")}, "GET deny deny-rule default/p[0], POST allow no-allow-policy"},
			{folder{"a": policyYAML("p", denyPost)}, []string{p("p good a")}, "GET allow no-allow-policy, POST deny deny-rule default/p[0]"},
			{folder{}, nil, nothing},
		},
		"an invalid edit keeps the last good version, until it is mended": {
			{folder{"a": policyYAML("p", denyGet)}, []string{p("p good a")}, "GET deny deny-rule default/p[0], POST allow no-allow-policy"},
			{folder{"a": policyYAML("p", invalidSpec)}, []string{p("p stale a")}, "GET deny deny-rule default/p[0], POST allow no-allow-policy"},
			{folder{"a": policyYAML("p", "{rulez: []}")}, []string{p("p stale a")}, "GET deny deny-rule default/p[0], POST allow no-allow-policy"},
			{folder{"a": policyYAML("p", denyPost)}, []string{p("p good a")}, "GET allow no-allow-policy, POST deny deny-rule default/p[0]"},
		},
		"an invalid resource that was never good denies what it selects, until it is mended or gone": {
			{folder{"a": policyYAML("p", webOnly)}, []string{p("p refused a")}, nothing},
			{folder{"a": policyYAML("p", invalidSpec)}, []string{p("p refused a")}, "GET deny invalid default/p, POST deny invalid default/p"},
			{folder{"a": policyYAML("p", denyPost)}, []string{p("p good a")}, "GET allow no-allow-policy, POST deny deny-rule default/p[0]"},
		},
		"a bad edit of one resource leaves the others of the file alone": {
			{folder{"a": policyYAML("p", denyGet) + policyYAML("q", denyPost)}, []string{p("p good a"), p("q good a")}, "GET deny deny-rule default/p[0], POST deny deny-rule default/q[0]"},
			{folder{"a": policyYAML("p", invalidSpec)}, []string{p("p stale a")}, "GET deny deny-rule default/p[0], POST allow no-allow-policy"},
		},
		"a document that became unreadable keeps what it was": {
			{folder{"a": policyYAML("p", denyGet) + policyYAML("q", denyPost)}, []string{p("p good a"), p("q good a")}, "GET deny deny-rule default/p[0], POST deny deny-rule default/q[0]"},
			{folder{"a": policyYAML("p", denyGet) + broken}, []string{p("p good a"), p("q stale a")}, "GET deny deny-rule default/p[0], POST deny deny-rule default/q[0]"},
			{folder{"a": policyYAML("p", denyGet) + broken}, []string{p("p good a"), p("q stale a")}, "GET deny deny-rule default/p[0], POST deny deny-rule default/q[0]"},
			{folder{"a": policyYAML("p", denyGet)}, []string{p("p good a")}, "GET deny deny-rule default/p[0], POST allow no-allow-policy"},
		},
		"an unreadable document that was not there before denies everything": {
			{folder{"a": policyYAML("p", denyGet), "b": ""}, []string{p("p good a")}, "GET deny deny-rule default/p[0], POST allow no-allow-policy"},
			{folder{"a": policyYAML("p", denyGet) + broken, "b": ""}, []string{p("p good a"), "refused a"}, "GET deny unreadable, POST deny unreadable"},
			{folder{"a": policyYAML("p", denyGet), "b": broken}, []string{p("p good a"), "refused b"}, "GET deny unreadable, POST deny unreadable"},
			{folder{"a": policyYAML("p", denyGet), "b": ""}, []string{p("p good a")}, "GET deny deny-rule default/p[0], POST allow no-allow-policy"},
		},
		"a resource that goes missing does not account for an unreadable document that was there before": {
			{folder{"a": policyYAML("p", denyGet)}, []string{p("p good a")}, "GET deny deny-rule default/p[0], POST allow no-allow-policy"},
			{folder{"a": policyYAML("p", denyGet) + broken}, []string{p("p good a"), "refused a"}, "GET deny unreadable, POST deny unreadable"},
			{folder{"a": broken}, []string{p("p stale a"), "refused a"}, "GET deny unreadable, POST deny unreadable"},
			{folder{"a": broken}, []string{p("p stale a"), "refused a"}, "GET deny unreadable, POST deny unreadable"},
			{folder{"a": policyYAML("q", denyPost)}, []string{p("q good a")}, "GET allow no-allow-policy, POST deny deny-rule default/q[0]"},
		},
		"two unreadable documents and one resource missing: one of them is new": {
			{folder{"a": policyYAML("p", denyGet)}, []string{p("p good a")}, "GET deny deny-rule default/p[0], POST allow no-allow-policy"},
			{folder{"a": broken + broken}, []string{p("p stale a"), "refused a", "refused a"}, "GET deny unreadable, POST deny unreadable"},
		},
		"an unreadable document elsewhere does not account for a resource that is gone": {
			{folder{"a": policyYAML("p", denyGet), "b": policyYAML("q", denyPost)}, []string{p("p good a"), p("q good b")}, "GET deny deny-rule default/p[0], POST deny deny-rule default/q[0]"},
			{folder{"b": broken}, []string{p("q stale b")}, "GET allow no-allow-policy, POST deny deny-rule default/q[0]"},
		},
		"a refused resource stays refused while its document is unreadable": {
			{folder{"a": policyYAML("p", invalidSpec)}, []string{p("p refused a")}, "GET deny invalid default/p, POST deny invalid default/p"},
			{folder{"a": broken}, []string{p("p refused a")}, "GET deny invalid default/p, POST deny invalid default/p"},
		},
		"a last good version belongs to where the bad text stands": {
			{folder{"b": policyYAML("p", denyGet)}, []string{p("p good b")}, "GET deny deny-rule default/p[0], POST allow no-allow-policy"},
			{folder{"a": policyYAML("p", invalidSpec)}, []string{p("p stale b")}, "GET deny deny-rule default/p[0], POST allow no-allow-policy"},
			{folder{"a": broken}, []string{p("p stale b")}, "GET deny deny-rule default/p[0], POST allow no-allow-policy"},
		},
		"a second copy keeps the last good version, whichever file it is in": {
			{folder{"b": policyYAML("p", denyGet)}, []string{p("p good b")}, "GET deny deny-rule default/p[0], POST allow no-allow-policy"},
			{folder{"a": policyYAML("p", denyPost), "b": policyYAML("p", denyGet)}, []string{p("p stale b")}, "GET deny deny-rule default/p[0], POST allow no-allow-policy"},
			{folder{"a": policyYAML("p", denyPost)}, []string{p("p good a")}, "GET allow no-allow-policy, POST deny deny-rule default/p[0]"},
		},
		"copies that select differently deny the whole namespace": {
			{folder{"a": policyYAML("p", strings.Replace(goodWeb, "web", "db", 1)), "b": policyYAML("p", goodWeb)}, []string{p("p refused a")},
				"GET deny duplicate default/p, POST deny duplicate default/p"},
		},
		"a resource moves to another file": {
			{folder{"a": policyYAML("p", denyGet)}, []string{p("p good a")}, "GET deny deny-rule default/p[0], POST allow no-allow-policy"},
			{folder{"a": "", "b": policyYAML("p", denyGet)}, []string{p("p good b")}, "GET deny deny-rule default/p[0], POST allow no-allow-policy"},
			// and its last good version belongs to the new place
			{folder{"a": "", "b": broken}, []string{p("p stale b")}, "GET deny deny-rule default/p[0], POST allow no-allow-policy"},
			{folder{"a": broken, "b": ""}, []string{"refused a"}, "GET deny unreadable, POST deny unreadable"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var set authz.Set
			for i, s := range steps {
				before := states(set)
				next, problems := set.Update(s.folder.parse())
				if !slices.Equal(states(set), before) {
					t.Errorf("step %d changed the set before it", i)
				}
				set = next
				got := states(set)
				if d := cmp.Diff(s.states, got); d != "" {
					t.Errorf("step %d (-want +got):\n%s", i, d)
				}
				if d := cmp.Diff(s.want, methods(set, nil)); d != "" {
					t.Errorf("step %d (-want +got):\n%s", i, d)
				}
				stale := 0
				for _, st := range set.All() {
					if st == authz.StateStale {
						stale++
					}
				}
				warned := 0
				for _, p := range problems {
					if p.Severity == authz.SeverityWarning && strings.Contains(p.Message, "last good version") {
						warned++
					}
				}
				if warned != stale {
					t.Errorf("step %d: %d stale resources, %d warnings about them", i, stale, warned)
				}
			}
		})
	}
}

func TestUpdateKeepsWhatAnUnreadableOriginHad(t *testing.T) {
	t.Parallel()
	set, _ := authz.Set{}.Update(folder{"a": policyYAML("p", denyGet) + policyYAML("q", denyPost)}.parse())
	gone, problem := authz.Unreadable("a", errors.New("permission denied"))
	if problem.Reason != authz.ReasonUnreadable || problem.Origin != "a" || problem.Message != "permission denied" {
		t.Errorf("problem %+v", problem)
	}
	set, _ = set.Update([]authz.Resource{gone})
	if got, want := states(set), []string{"AuthorizationPolicy default/p stale a", "AuthorizationPolicy default/q stale a"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	set, _ = authz.Set{}.Update([]authz.Resource{gone})
	if got, want := methods(set, nil), "GET deny unreadable, POST deny unreadable"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestDuplicatesNameBothPlaces(t *testing.T) {
	t.Parallel()
	_, problems := authz.Set{}.Update(folder{"b": "\n" + policyYAML("p", denyGet), "a": policyYAML("p", denyGet)}.parse())
	if len(problems) != 1 {
		t.Fatalf("problems %v", problems)
	}
	want := "a:2: AuthorizationPolicy default/p: exists 2 times: at a:2 and at b:3; keep one of them"
	if got := problems[0].Error(); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
