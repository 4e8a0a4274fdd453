package authz_test

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/structpb"
	security "istio.io/api/security/v1beta1"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// The fuzz targets here hold one value of a policy against one attribute of a
// request and ask the naive evaluator; first with the rule alone, then among
// others like it, so that it is found by an index.

// agree fails the test unless the package and the naive evaluator say the same of
// the rules. Rules that admission refuses are of no interest.
func agree(t *testing.T, r *authz.Request, action security.AuthorizationPolicy_Action, rules ...*security.Rule) {
	t.Helper()
	spec := &security.AuthorizationPolicy{Action: action, Rules: rules}
	w := &world{naive: naive{root: "root", domains: []string{"own.td", "old.td"}}}
	w.policies = []naivePolicy{{"one", "p", false, spec}}
	j, err := protojson.Marshal(spec)
	if err != nil {
		return // no text that a document can hold
	}
	rs, problems := authz.Parse("f", []byte(`{"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "p", "namespace": "one"}, "spec": `+string(j)+"}"))
	for _, p := range problems {
		if p.Severity == authz.SeverityError {
			return
		}
	}
	set, _ := authz.Set{}.Update(rs)
	snapshot, _ := authz.Compile(set, naiveOptions)
	program := snapshot.For(identity.Workload{Namespace: "one"})
	if got, want := everything(program, r), w.decide("one", nil, r, nil); got != want {
		t.Errorf("got  %s\nwant %s\nrequest %+v\npolicy %s", got, want, r, j)
	}
}

// among is the rule between five that have something else in the place of its value.
func among(value string, rule func(value string) *security.Rule) []*security.Rule {
	if value == "" {
		return []*security.Rule{rule(value)}
	}
	return []*security.Rule{rule("x"), rule(value + "x"), rule("x" + value), rule(value), rule(string([]rune(value)[:1])), rule("y")}
}

func fuzzRule(t *testing.T, r *authz.Request, value string, rule func(value string) *security.Rule) {
	t.Helper()
	if len(value) > 300 {
		return
	}
	agree(t, r, security.AuthorizationPolicy_ALLOW, rule(value))
	agree(t, r, security.AuthorizationPolicy_DENY, among(value, rule)...)
}

// FuzzValues is about the fields that compare text.
func FuzzValues(f *testing.F) {
	for _, s := range []struct{ value, attribute string }{
		{"*", ""}, {"*", "a"}, {"*a", "ba"}, {"a*", "ab"}, {"**", "*"}, {"*a*", "xa*"}, {"a*b", "spiffe://td/ns/a/x/b/sa/y"},
		{"/a", "/a?b#c"}, {"A.example:80", "a.EXAMPLE:80"}, {"é", "É"}, {"a", "spiffe://td/ns/ns/a/"}, {"a/b", "/ns/a/b/"}, {"*", "\xff\n"},
		{"cluster.local/ns/a/sa/x", "spiffe://old.td/ns/a/sa/x"}, {"\\*", "\\"}, {"[", "/ns/[/"}, {"/", "/ns///"}, {"*/", "spiffe://"},
		{"a/x", "spiffe://td/ns/a/sa/x"}, {"x.y", "spiffe://td/ns/one/k/v/sa/x.y/z"}, {"old.td", "spiffe://own.td/x"}, {"o*", "spiffe://own.td/"}, {"*.td", "spiffe://a/b.td/c"},
	} {
		f.Add(s.value, []byte(s.attribute))
	}
	f.Fuzz(func(t *testing.T, value string, attribute []byte) {
		r := authz.Request{
			Known: authz.FieldsHTTP, HTTP: true, Authenticated: true,
			Principal: attribute, Host: attribute, Method: attribute, Path: attribute, SNI: attribute,
		}
		for _, source := range []func(v string) *security.Source{
			func(v string) *security.Source { return &security.Source{Principals: []string{v}} },
			func(v string) *security.Source { return &security.Source{Namespaces: []string{v}} },
			func(v string) *security.Source { return &security.Source{ServiceAccounts: []string{v}} },
			func(v string) *security.Source { return &security.Source{TrustDomains: []string{v}} },
			func(v string) *security.Source { return &security.Source{NotPrincipals: []string{v}} },
		} {
			fuzzRule(t, &r, value, func(v string) *security.Rule {
				return &security.Rule{From: []*security.Rule_From{{Source: source(v)}}}
			})
		}
		for _, operation := range []func(v string) *security.Operation{
			func(v string) *security.Operation { return &security.Operation{Hosts: []string{v}} },
			func(v string) *security.Operation { return &security.Operation{Methods: []string{v}} },
			func(v string) *security.Operation { return &security.Operation{NotPaths: []string{v}} },
		} {
			fuzzRule(t, &r, value, func(v string) *security.Rule {
				return &security.Rule{To: []*security.Rule_To{{Operation: operation(v)}}}
			})
		}
		fuzzRule(t, &r, value, func(v string) *security.Rule {
			return &security.Rule{When: []*security.Condition{{Key: "connection.sni", Values: []string{v}}}}
		})
	})
}

// FuzzTemplates is about paths and their templates.
func FuzzTemplates(f *testing.F) {
	for _, s := range []struct{ template, path string }{
		{"/{*}", "/a"}, {"/{*}", "/"}, {"/a/{**}", "/a"}, {"/a/{**}", "/a/b/c?d"}, {"/{**}/b", "/b"}, {"/{*}/b/{**}", "/x/b/"}, {"/a/{*}/", "/a/b/"},
		{"{*}", "a"}, {"{**}", ""}, {"//a/{*}", "//a/b"}, {"/{*}", "/a\xff"}, {"/{*}", "/[x]"}, {"/{*}/{*}", "/a*/b;c"}, {"/a/{**}/x/y", "/a/x/y"}, {"/{*}", "/a\n"},
	} {
		f.Add(s.template, []byte(s.path))
	}
	f.Fuzz(func(t *testing.T, template string, path []byte) {
		r := authz.Request{Known: authz.FieldsHTTP, HTTP: true, Path: path}
		for _, not := range []bool{false, true} {
			fuzzRule(t, &r, template, func(v string) *security.Rule {
				o := &security.Operation{Paths: []string{v}}
				if not {
					o = &security.Operation{NotPaths: []string{v, "/{*}/never"}}
				}
				return &security.Rule{To: []*security.Rule_To{{Operation: o}}}
			})
		}
	})
}

// FuzzHeaders is about the values of a header, each by itself or joined.
func FuzzHeaders(f *testing.F) {
	for _, s := range []struct {
		value, second, one, two string
		form                    byte
	}{
		{"*", "", "", "", 0}, {"a", "", "a,b", "", 1}, {"a,b", "", "a,b", "", 1}, {"a*", "*b", "a,b", "c", 1}, {"b", "", "a", "b", 0}, {"*b", "", "a,b,b", "", 1}, {"a", "*", "a", "", 2},
	} {
		f.Add(s.value, s.second, []byte(s.one), []byte(s.two), s.form)
	}
	f.Fuzz(func(t *testing.T, value, second string, one, two []byte, form byte) {
		if strings.Count(string(one), ",") > 8 || form > 2 {
			return // too many ways to split for somebody who tries them all
		}
		r := authz.Request{Known: authz.FieldsHTTP, HTTP: true, Headers: []authz.Header{{Name: "x-a", Value: one, Form: authz.HeaderForm(form)}}}
		if len(two) > 0 {
			r.Headers = append(r.Headers, authz.Header{Name: "x-a", Value: two}, authz.Header{Name: "x-b", Value: one})
		}
		values := func(v string) []string {
			if second != "" {
				return []string{v, second}
			}
			return []string{v}
		}
		for _, not := range []bool{false, true} {
			fuzzRule(t, &r, value, func(v string) *security.Rule {
				c := &security.Condition{Key: "request.headers[X-A]", Values: values(v)}
				if not {
					c = &security.Condition{Key: "request.headers[x-a]", NotValues: values(v)}
				}
				return &security.Rule{When: []*security.Condition{c}}
			})
		}
	})
}

// FuzzTokens is about claims, of any shape, and request principals.
func FuzzTokens(f *testing.F) {
	for _, s := range []struct{ value, claims string }{
		{"*", `{"iss": "https://i", "sub": "s", "c": "v"}`}, {"https://i/s", `{"iss": "https://i", "sub": "s"}`}, {"i", `{"iss": "i", "sub": ""}`}, {"i/", `{"iss": "i", "sub": ""}`},
		{"*s", `{"iss": "x", "sub": "as"}`}, {"i*", `{"iss": "ix", "sub": ["s"]}`}, {"v", `{"c": ["x", "v", 1], "n": {"c": "v"}}`}, {"1", `{"c": 1}`}, {"*", `{"c": [""]}`}, {"*/s", `{"iss": "", "sub": "s"}`},
	} {
		f.Add(s.value, []byte(s.claims))
	}
	f.Fuzz(func(t *testing.T, value string, claims []byte) {
		var object map[string]any
		if json.Unmarshal(claims, &object) != nil {
			return
		}
		s, err := structpb.NewStruct(object)
		if err != nil {
			return
		}
		r := authz.Request{Known: authz.FieldsHTTP, HTTP: true, Claims: s, Metadata: map[string]*structpb.Struct{"envoy.filters.a": s}}
		for _, key := range []string{"request.auth.claims[c]", "request.auth.claims[n][c]", "request.auth.principal", "request.auth.audiences", "request.auth.presenter", "experimental.envoy.filters.a[c]"} {
			fuzzRule(t, &r, value, func(v string) *security.Rule {
				return &security.Rule{When: []*security.Condition{{Key: key, Values: []string{v}}}}
			})
			fuzzRule(t, &r, value, func(v string) *security.Rule {
				return &security.Rule{When: []*security.Condition{{Key: key, NotValues: []string{v}}}}
			})
		}
	})
}

// TestParseIPv4 holds the reader of X-Forwarded-For's entries against the
// library's, for texts that differ from addresses in one place.
func TestParseIPv4(t *testing.T) {
	t.Parallel()
	for _, address := range []string{"10.0.0.1", "255.255.255.255", "0.0.0.0", "1.22.133.4"} {
		texts := []string{address, "", ".", address + ".", "." + address, address + "1", "0" + address, address + ".1"}
		for i := range len(address) {
			texts = append(texts, address[:i], address[i:], address[:i]+address[i+1:])
			for c := range 256 {
				texts = append(texts, address[:i]+string([]byte{byte(c)})+address[i+1:], address[:i]+string([]byte{byte(c)})+address[i:])
			}
		}
		for _, text := range texts {
			got, ok := authz.ParseIPv4([]byte(text))
			want, err := netip.ParseAddr(text)
			if wantOK := err == nil && want.Is4(); ok != wantOK || ok && got != want {
				t.Fatalf("%q was read as %v, %v; want %v, %v", text, got, ok, want, wantOK)
			}
		}
	}
}
