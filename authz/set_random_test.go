package authz_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// lastGood is a model of [authz.Set.Update], in the words of its documentation.
type lastGood struct {
	// has are the policies that are enforced: a version, or 0 where there never was
	// a good one, and the file where the present text stands.
	has map[string]standing
	// blind are the files that have more unreadable documents than policies of
	// theirs went missing, and how many more.
	blind map[string]int
}

type standing struct {
	version int
	file    string
	stale   bool
}

// document is one of a file: a version of a policy, a bad one (0), or one that
// cannot be read (no name).
type document struct {
	name    string
	version int
}

func (m lastGood) update(files map[string][]document) lastGood {
	next := lastGood{map[string]standing{}, map[string]int{}}
	unreadable := map[string]int{}
	copies := map[string][]document{}
	where := map[string]string{} // of the first copy
	for _, file := range slices.Sorted(maps.Keys(files)) {
		for _, d := range files[file] {
			if d.name == "" {
				unreadable[file]++
				continue
			}
			if copies[d.name] == nil {
				where[d.name] = file
			}
			copies[d.name] = append(copies[d.name], d)
		}
	}
	for name, list := range copies {
		before := m.has[name]
		switch {
		case len(list) == 1 && list[0].version > 0:
			next.has[name] = standing{list[0].version, where[name], false}
		case before.version > 0: // bad: the last good version goes on
			next.has[name] = standing{before.version, where[name], true}
		default:
			next.has[name] = standing{0, where[name], false}
		}
	}
	missing := map[string]int{}
	for name, s := range m.has {
		if copies[name] == nil && unreadable[s.file] > 0 {
			s.stale = s.version > 0
			next.has[name] = s
			missing[s.file]++
		}
	}
	for file, n := range unreadable {
		if more := max(n-missing[file], min(n, m.blind[file])); more > 0 {
			next.blind[file] = more
		}
	}
	return next
}

// decide is what becomes of a request for a version of a policy, which denies it.
func (m lastGood) decide(name string, version int) string {
	refused := ""
	for _, n := range slices.Sorted(maps.Keys(m.has)) {
		if m.has[n].version == 0 && refused == "" {
			refused = n
		}
	}
	switch {
	case len(m.blind) > 0 && refused == "":
		return "deny unreadable"
	case len(m.blind) > 0:
		return "deny refused or unreadable"
	case refused != "":
		return "deny refused default/" + refused
	case m.has[name].version == version:
		return "deny default/" + name
	}
	return "allow"
}

// TestUpdateKeepsTheLastGoodVersionOfAnything follows folders through random edits,
// good and bad, of policies that move between files, are there twice, go missing and
// cannot be read, and holds each set against the model.
func TestUpdateKeepsTheLastGoodVersionOfAnything(t *testing.T) {
	t.Parallel()
	seed := seeded(t)
	g := rand.New(rand.NewPCG(seed, 11))
	names, fileNames := []string{"p", "q", "r"}, []string{"a", "b"}
	runs, steps := 200, 25
	if testing.Short() || raceEnabled {
		runs = 40
	}
	seen := map[string]int{}
	for range runs {
		var set authz.Set
		var snapshot *authz.Snapshot
		model := lastGood{}
		files := map[string][]document{}
		version := 0
		var history []string
		for range steps {
			for range 1 + g.IntN(2) { // edits
				file := fileNames[g.IntN(len(fileNames))]
				list := slices.Clone(files[file])
				version++
				switch kind := g.IntN(10); {
				case len(list) == 0 || kind < 3:
					list = append(list, document{names[g.IntN(len(names))], version})
				case kind < 5: // another version
					i := g.IntN(len(list))
					list[i].version = version
				case kind == 5:
					list[g.IntN(len(list))].version = 0
				case kind == 6:
					list[g.IntN(len(list))].name = ""
				default:
					i := g.IntN(len(list))
					list = slices.Delete(list, i, i+1)
				}
				files[file] = list
			}
			var resources []authz.Resource
			for _, file := range fileNames {
				var all strings.Builder
				for _, d := range files[file] {
					switch {
					case d.name == "":
						all.WriteString(broken)
					case d.version == 0:
						all.WriteString(policyYAML(d.name, invalidSpec))
					default:
						all.WriteString(policyYAML(d.name, fmt.Sprintf("{action: DENY, rules: [{to: [{operation: {methods: [V%d]}}]}]}", d.version)))
					}
				}
				rs, _ := authz.Parse(file, []byte(all.String()))
				resources = append(resources, rs...)
			}
			g.Shuffle(len(resources), func(i, k int) { resources[i], resources[k] = resources[k], resources[i] })
			// The first of several copies is the one in the first file, in whichever
			// order they come: it is where they are said to be.
			history = append(history, fmt.Sprint(files))
			model = model.update(files)
			set, _ = set.Update(resources)
			if snapshot == nil {
				snapshot, _ = authz.Compile(set, authz.Options{})
			} else {
				snapshot, _ = snapshot.Update(set)
			}
			where := func() string { return fmt.Sprintf("seed %d: %s", seed, strings.Join(history, "\n")) }
			var want, got []string
			for _, n := range slices.Sorted(maps.Keys(model.has)) {
				state := map[bool]string{true: "stale", false: "good"}[model.has[n].stale]
				if model.has[n].version == 0 {
					state = "refused"
				}
				want = append(want, n+" "+state)
				seen[state]++
			}
			for r, state := range set.All() {
				if _, name, ok := strings.Cut(r.String(), "default/"); ok {
					got = append(got, name+" "+state.String())
				}
			}
			if !slices.Equal(got, want) {
				t.Fatalf("enforced are %q, want %q; %s", got, want, where())
			}
			program := snapshot.For(identity.Workload{Namespace: "default"})
			for _, n := range names {
				for _, v := range []int{max(1, model.has["p"].version), max(1, model.has["q"].version), max(1, model.has["r"].version), 1 + g.IntN(version)} {
					d := program.Decide(&authz.Request{Known: authz.FieldsHTTP, HTTP: true, Method: fmt.Appendf(nil, "V%d", v)})
					want := model.decide(n, v)
					if want == "allow" && d.Reason == authz.ReasonDenyRule && d.Policy != "default/"+n {
						continue // it is another policy's version
					}
					got := "deny " + d.Policy
					switch {
					case d.Allowed:
						got = "allow"
					case d.Reason == authz.ReasonUnreadable:
						got = "deny unreadable"
					case d.Reason != authz.ReasonDenyRule:
						got = "deny refused " + d.Policy
					}
					if want == "deny refused or unreadable" && (got == "deny unreadable" || strings.HasPrefix(got, "deny refused ")) {
						continue
					}
					if got != want {
						t.Fatalf("V%d: %q, want %q; %s", v, got, want, where())
					}
					seen[strings.Fields(got)[0]]++
				}
			}
		}
	}
	t.Logf("%v", seen)
	for _, what := range []string{"good", "stale", "refused", "allow", "deny"} {
		if seen[what] < 20 {
			t.Errorf("%s was seen %d times", what, seen[what])
		}
	}
}
