package authz_test

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/record"
	"github.com/signet-mesh/signet/identity"
)

// allShown is what the generators make.
var allShown = record.Shown{
	AllHeaders: true, AllClaims: true, Query: true,
	Read: []authz.Name{{Field: authz.FieldMetadata, Name: "a", Filter: "envoy.filters.x"}, {Field: authz.FieldMetadata, Name: "a", Filter: "envoy.filters.network.x"}},
}

// outcome is all that can be told of a decision.
func outcome(d authz.Decision) string {
	m, ok := d.Audited()
	return fmt.Sprintf("%s %s %s %d %s %s %v %t %v", d.Verdict(), d.Kind, d.Policy, d.Rule, d.Reason, d.Provider, m, ok, d.DryRuns())
}

// asked decides, where providers answer; those that say nothing are refused.
func asked(p *authz.Program, r *authz.Request, answer func(provider string) bool) (d authz.Decision, answers []record.Answer) {
	for d = p.Decide(r); d.Ask; d = p.After(d, r) {
		a := record.Answer{Provider: d.Provider, Allowed: answer(d.Provider)}
		if !a.Allowed {
			a.Reason = "provider-denied"
		}
		if answers = append(answers, a); !a.Allowed {
			d.Ask, d.Reason = false, a.Reason
			return d, answers
		}
	}
	return d, answers
}

// replayWorld is random policies, some with RequestAuthentication.
func (g generator) replayWorld() (text []byte, p *authz.Program, w identity.Workload) {
	text = g.world().yaml
	if g.IntN(2) == 0 {
		text = g.edgeDocument("p")
	}
	if g.IntN(2) == 0 {
		text = fmt.Appendf(text, "---\napiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {name: jwt, namespace: root}\nspec: {jwtRules: [%s]}\n",
			pick(g, []string{"{issuer: i}", "{issuer: i, audiences: [a]}", "{issuer: i, fromHeaders: [{name: X-A, prefix: a}]}", "{issuer: i, fromCookies: [c]}", "{issuer: i, fromParams: [x]}"}))
	}
	rs, _ := authz.Parse("x", text)
	set, _ := authz.Set{}.Update(rs)
	snapshot, _ := authz.Compile(set, authz.Options{RootNamespace: "root", MultipleProviders: g.IntN(2) == 0})
	w = identity.Workload{Namespace: pick(g, []string{"one", "a", "two"}), Labels: map[string]string{"app": "web"}}
	return text, snapshot.For(w), w
}

// replayRequest is a random request, often with something that may be a token.
func (g generator) replayRequest() authz.Request {
	r := g.request()
	if g.IntN(2) == 0 {
		r = g.edgeRequest()
	}
	switch g.IntN(6) {
	case 0:
		r.Headers = append(r.Headers, authz.Header{Name: pick(g, []string{"authorization", "cookie"}), Value: []byte(pick(g, []string{"Bearer x", "Basic x", "c=x", "c=x; d=y"}))})
	case 1:
		r.Path = []byte("/a?" + pick(g, []string{"access_token=x", "x=y", "access%5ftoken=secret&y", "#access_token=x", "&&x", "x", "*", "y&x=1&z", "access_token&q=1"}))
	case 2:
		r.Method = []byte("OPTIONS")
		r.Headers = append(r.Headers, authz.Header{Name: "origin", Value: []byte("o")}, authz.Header{Name: "access-control-request-method", Value: []byte("GET")})
	}
	if g.IntN(2) == 0 {
		r.Claims = nil
	}
	// All names together are in a record if they are short enough.
	r.Principal = r.Principal[:min(len(r.Principal), 1000)]
	for i, n := range r.OtherNames {
		r.OtherNames[i] = n[:min(len(n), 1000)]
	}
	return r
}

func recordOf(w identity.Workload, r authz.Request, d authz.Decision, answers []record.Answer) record.Record {
	out := record.Record{Time: time.Unix(1, 2).UTC(), Workload: w, Request: r, Allowed: d.Allowed, Kind: d.Kind, Policy: d.Policy,
		Rule: d.Rule, Reason: d.Reason, DryRuns: d.DryRuns(), Answers: answers}
	if m, ok := d.Audited(); ok {
		out.Audited = &m
	}
	return out
}

// TestRecordsDecideAgain holds that a record that shows everything is decided as the
// request was, and tells everything of the decision; and that one that hides
// something is decided either the same, or as something unknown, and never more
// openly.
func TestRecordsDecideAgain(t *testing.T) {
	t.Parallel()
	seed := seeded(t)
	g := generator{rand.New(rand.NewPCG(seed, 9))}
	worlds := 2000
	switch {
	case raceEnabled:
		worlds = 50
	case testing.Short():
		worlds = 250
	}
	unknowns := []authz.Reason{authz.ReasonAskUnknown, authz.ReasonDenyUnknown, authz.ReasonAllowUnknown, authz.ReasonTokenUnknown, authz.ReasonProviders, authz.ReasonPlaintextUnknown}
	same, unknown, allowed := 0, 0, 0
	for world := range worlds {
		text, p, w := g.replayWorld()
		for range 30 {
			r := g.replayRequest()
			fails := g.IntN(3) == 0
			answer := func(string) bool { return !fails }
			d, answers := asked(p, &r, answer)
			rec := recordOf(w, r, d, answers)
			where := func(line []byte) string {
				return fmt.Sprintf("seed %d, world %d: %s\n%+v\n%s\n%s", seed, world, d.Text(), r, line, text)
			}

			line := rec.Append(nil, allShown)
			back, err := record.Decode(line)
			if err != nil {
				t.Fatalf("%v: %s", err, where(line))
			}
			if again := back.Append(nil, allShown); string(again) != string(line) {
				t.Fatalf("encoded again: %s\n%s", again, where(line))
			}
			if !sameRecord(back, rec) {
				t.Fatalf("decoded: %+v\n%s", back, where(line))
			}
			after, ok := record.Replay(p, &back)
			if !ok || outcome(after) != outcome(d) && !holdsOddities(&r) {
				t.Fatalf("replayed: %s; decided: %s\n%s", outcome(after), outcome(d), where(line))
			}

			// What the policies read is enough for those policies, but for tokens.
			show := record.Shown{Read: p.Names(), Query: true}
			if back, err = record.Decode(rec.Append(nil, show)); err != nil {
				t.Fatalf("%v: %s", err, where(line))
			}
			if after, _ = record.Replay(p, &back); outcome(after) != outcome(d) && !holdsOddities(&r) && after.Reason != authz.ReasonTokenUnknown {
				t.Fatalf("replayed with what the policies read: %s; decided: %s\n%s", outcome(after), outcome(d), where(rec.Append(nil, show)))
			}

			show = record.Shown{AllHeaders: g.IntN(2) == 0, AllClaims: g.IntN(2) == 0, Query: g.IntN(2) == 0,
				Headers: map[string]bool{"x-a": g.IntN(2) == 0}, Claims: map[string]bool{"iss": true, "sub": true, "a": g.IntN(2) == 0, "aud": true},
				Redacted: map[string]bool{"authorization": true, "cookie": true, "x-b": true}}
			if g.IntN(2) == 0 {
				for rule := range p.TokenRules() {
					headers, params := rule.Places()
					show.TokenHeaders, show.TokenParams = append(show.TokenHeaders, headers...), append(show.TokenParams, params...)
				}
			}
			line = rec.Append(nil, show)
			if back, err = record.Decode(line); err != nil {
				t.Fatalf("%v: %s", err, where(line))
			}
			// Others may be asked now, of whom nothing is recorded: they answer as they
			// would have.
			after, _ = asked(p, &back.Request, answer)
			switch {
			case outcome(after) == outcome(d):
				same++
			case after.Allowed && !d.Allowed:
				t.Fatalf("more open: %s; decided: %s\n%s", after.Text(), outcome(d), where(line))
			case d.Allowed != after.Allowed && !slices.Contains(unknowns, after.Reason) && after.Reason != "provider-denied":
				t.Fatalf("replayed for a reason of its own: %s; decided: %s\n%s", outcome(after), outcome(d), where(line))
			default:
				unknown++
			}
			if d.Allowed {
				allowed++
			}
		}
	}
	t.Logf("seed %d: %d the same, %d unknown, %d allowed", seed, same, unknown, allowed)
	if same < worlds*10 || unknown < worlds/4 || allowed < worlds*3 {
		t.Errorf("too few: %d the same, %d unknown, %d allowed", same, unknown, allowed)
	}
}

// holdsOddities reports whether claims or metadata hold what JSON cannot say, which
// a record hides.
func holdsOddities(r *authz.Request) bool {
	var odd func(v *structpb.Value) bool
	odd = func(v *structpb.Value) bool {
		switch k := v.GetKind().(type) {
		case *structpb.Value_ListValue:
			return slices.ContainsFunc(k.ListValue.GetValues(), odd)
		case *structpb.Value_StructValue:
			for _, e := range k.StructValue.GetFields() {
				if e != nil && odd(e) {
					return true
				}
			}
		case *structpb.Value_StringValue:
			_, err := proto.Marshal(v)
			return err != nil
		case nil:
			return true
		}
		return false
	}
	for _, s := range append([]*structpb.Struct{r.Claims}, r.Metadata["envoy.filters.x"], r.Metadata["envoy.filters.network.x"]) {
		for _, v := range s.GetFields() {
			if v != nil && odd(v) {
				return true
			}
		}
	}
	return false
}

// sameRecord compares all but claims and metadata, which the bytes were compared of.
func sameRecord(a, b record.Record) bool {
	for _, r := range []*record.Record{&a, &b} {
		r.Request.Claims, r.Request.Metadata = nil, nil
		for i := range r.Request.OtherNames {
			r.Request.OtherNames[i] = append([]byte{}, r.Request.OtherNames[i]...)
		}
		r.Request.Headers = slices.Clone(r.Request.Headers)
		for i := range r.Request.Headers {
			r.Request.Headers[i].Value = append([]byte{}, r.Request.Headers[i].Value...)
		}
	}
	return reflect.DeepEqual(a, b)
}
