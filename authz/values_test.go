package authz_test

import (
	"encoding/json"
	"fmt"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	security "istio.io/api/security/v1beta1"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// FuzzValues holds one value of a policy against one attribute of a request, in
// each field that compares text, and asks the naive evaluator.
func FuzzValues(f *testing.F) {
	for _, s := range []struct{ value, attribute string }{
		{"*", ""}, {"*", "a"}, {"*a", "ba"}, {"a*", "ab"}, {"**", "*"}, {"*a*", "xa*"}, {"a*b", "spiffe://td/ns/a/x/b/sa/y"},
		{"/a", "/a?b#c"}, {"A.example:80", "a.EXAMPLE:80"}, {"é", "É"}, {"a", "spiffe://td/ns/ns/a/"}, {"a/b", "/ns/a/b/"}, {"*", "\xff\n"},
		{"cluster.local/ns/a/sa/x", "spiffe://old.td/ns/a/sa/x"}, {"\\*", "\\"}, {"[", "/ns/[/"}, {"/", "/ns///"}, {"*/", "spiffe://"},
	} {
		f.Add(s.value, []byte(s.attribute))
	}
	f.Fuzz(func(t *testing.T, value string, attribute []byte) {
		quoted, err := json.Marshal(value)
		if err != nil || len(value) > 300 {
			return
		}
		for _, c := range []struct {
			spec   string
			source *security.Source
			op     *security.Operation
		}{
			{spec: "from: [{source: {principals: [%s]}}]", source: &security.Source{Principals: []string{value}}},
			{spec: "from: [{source: {namespaces: [%s]}}]", source: &security.Source{Namespaces: []string{value}}},
			{spec: "to: [{operation: {hosts: [%s]}}]", op: &security.Operation{Hosts: []string{value}}},
			{spec: "to: [{operation: {methods: [%s]}}]", op: &security.Operation{Methods: []string{value}}},
			{spec: "to: [{operation: {paths: [%s]}}]", op: &security.Operation{Paths: []string{value}}},
		} {
			rs, problems := authz.Parse("f", []byte(policyYAML("p", "{rules: [{"+fmt.Sprintf(c.spec, quoted)+"}]}")))
			if len(problems) > 0 || len(rs) != 1 {
				continue
			}
			var back string
			if json.Unmarshal(quoted, &back) != nil || back != value {
				continue // no text that a document can hold
			}
			set, _ := authz.Set{}.Update(rs)
			snapshot, _ := authz.Compile(set, authz.Options{
				TrustDomain: spiffeid.RequireTrustDomainFromString("own.td"), TrustDomainAliases: []string{"old.td"},
			})
			rule := &security.Rule{}
			if c.source != nil {
				rule.From = []*security.Rule_From{{Source: c.source}}
			} else {
				rule.To = []*security.Rule_To{{Operation: c.op}}
			}
			n := naive{root: "istio-system", domains: []string{"own.td", "old.td"}, policies: []naivePolicy{
				{"default", "p", false, &security.AuthorizationPolicy{Rules: []*security.Rule{rule}}},
			}}
			r := authz.Request{
				Known: authz.FieldsHTTP, HTTP: true, Authenticated: true,
				Principal: attribute, Host: attribute, Method: attribute, Path: attribute,
			}
			got := render(snapshot.For(identity.Workload{Namespace: "default"}).Decide(&r))
			if want := n.decide("default", nil, &r, nil); got != want {
				t.Errorf("%s with %q on %q: got %s, want %s", c.spec, value, attribute, got, want)
			}
		}
	})
}
