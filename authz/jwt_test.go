package authz_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// tokenProgram is the program of a workload with RequestAuthentications of rules in
// YAML.
func tokenProgram(tb testing.TB, rules ...string) *authz.Program {
	tb.Helper()
	var docs []string
	for i, r := range rules {
		docs = append(docs, fmt.Sprintf("apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {name: r%d}\nspec: {jwtRules: [%s]}\n", i, r))
	}
	resources, problems := authz.Parse("test", []byte(strings.Join(docs, "---\n")))
	set, more := authz.Set{}.Update(resources)
	if problems = append(problems, more...); len(problems) > 0 {
		tb.Fatal(problems)
	}
	snapshot, _ := authz.Compile(set, authz.Options{})
	return snapshot.For(identity.Workload{Namespace: "default"})
}

func TestTokensAreFoundWhereRulesLook(t *testing.T) {
	t.Parallel()
	usual := tokenProgram(t, "{issuer: a}").Verifies()[0]
	other := tokenProgram(t, `{issuer: a, fromHeaders: [{name: X-B, prefix: "T "}, {name: X-A}, {name: X-B, prefix: "T "}], fromParams: [q, p], fromCookies: [d, c]}`).Verifies()[0]
	some := func(rule string) *authz.TokenRule { return tokenProgram(t, rule).Verifies()[0] }
	for _, c := range []struct {
		name    string
		rule    *authz.TokenRule
		path    string
		headers []string
		want    string // "TEXT in PLACE", joined by commas
	}{
		{"nothing", usual, "/", nil, ""},
		{"the usual header", usual, "/", []string{"authorization", "Bearer x.y.z"}, "x.y.z in authorization"},
		{"another case", usual, "/", []string{"authorization", "bearer x.y.z"}, ""},
		{"a prefix in the middle", usual, "/", []string{"authorization", "Basic Bearer x"}, "x in authorization"},
		{"what no token has, behind the prefix", usual, "/", []string{"authorization", `Bearer  "x" y`}, `x" y in authorization`},
		{"each character that a token has", usual, "/", []string{"authorization", "Bearer -", "authorization", "Bearer _", "authorization", "Bearer .", "authorization", "Bearer 0", "authorization", "Bearer 9", "authorization", "Bearer A", "authorization", "Bearer Z", "authorization", "Bearer a", "authorization", "Bearer z"},
			"- in authorization,_ in authorization,. in authorization,0 in authorization,9 in authorization,A in authorization,Z in authorization,a in authorization,z in authorization"},
		{"nothing that a token has", usual, "/", []string{"authorization", "Bearer @[`{/:"}, "Bearer @[`{/: in authorization"},
		{"the usual parameter", usual, "/?access_token=x.y.z", nil, "x.y.z in access_token"},
		{"a parameter in percent", usual, "/?a&access%5ftoken=x%2Ey%2z%&b", nil, "x.y%2z% in access_token"},
		{"a parameter without a value", usual, "/?access_token", nil, " in access_token"},
		{"a parameter twice", usual, "/?access_token=x&access_token=y", nil, "x in access_token"},
		{"a fragment", usual, "/?a#access_token=x", nil, ""},
		{"a parameter and a header", usual, "/?access_token=y", []string{"authorization", "Bearer x"}, "x in authorization,y in access_token"},
		{"headers of its own", other, "/?access_token=y", []string{"x-b", "T x", "authorization", "Bearer x", "x-a", "y"}, "y in x-a,x in x-b"},
		{"a header twice", other, "/", []string{"x-b", "T x", "x-b", "x", "x-b", "T y"}, "x in x-b,y in x-b"},
		{"parameters of its own", other, "/?q=x&p=y", nil, "y in p,x in q"},
		{"cookies", other, "/", []string{"cookie", `a=b;  d="x"; c=y; c=z`, "cookie", "d=z"}, "y in ,x in "},
		{"cookies that only look like it", other, "/", []string{"cookie", `cc=x; c; c =x; ="c"`}, ""},
		{"cookies in half a quote", other, "/", []string{"cookie", `c="x; d="`}, `"x in ," in `},
		{"an empty cookie", other, "/", []string{"cookie", `c=; d=""`}, " in , in "},
		{"a place of its own and no usual one, a header and a parameter", some("{issuer: a, fromHeaders: [{name: h}], fromParams: [p]}"), "/?access_token=x", []string{"authorization", "Bearer x"}, ""},
		{"a place of its own and no usual one, a header and a cookie", some("{issuer: a, fromHeaders: [{name: h}], fromCookies: [p]}"), "/?access_token=x", []string{"authorization", "Bearer x"}, ""},
		{"a place of its own and no usual one, a parameter and a cookie", some("{issuer: a, fromParams: [h], fromCookies: [p]}"), "/?access_token=x", []string{"authorization", "Bearer x"}, ""},
		{"places that are named twice", some("{issuer: a, fromHeaders: [{name: h}, {name: g}, {name: f}, {name: H}], fromParams: [q, p, q], fromCookies: [d, c, d]}"), "/?p=1&q=2",
			[]string{"cookie", "c=3;d=4", "h", "5", "g", "6", "f", "7"}, "7 in f,6 in g,5 in h,1 in p,2 in q,3 in ,4 in "},
		{"everything", other, "/?p=3", []string{"cookie", "c=4", "x-b", "T 2", "x-a", "1"}, "1 in x-a,2 in x-b,3 in p,4 in "},
	} {
		r := authz.Request{Known: authz.FieldsHTTP, HTTP: true, Path: []byte(c.path)}
		for i := 0; i < len(c.headers); i += 2 {
			r.Headers = append(r.Headers, authz.Header{Name: c.headers[i], Value: []byte(c.headers[i+1])})
		}
		var got []string
		for token := range c.rule.Tokens(&r) {
			got = append(got, string(token.Text())+" in "+token.Header+token.Param)
		}
		if strings.Join(got, ",") != c.want {
			t.Errorf("%s: %q, want %q", c.name, strings.Join(got, ","), c.want)
		}
		for range c.rule.Tokens(&r) {
			break // who has seen enough may stop
		}
	}
}

func TestWhatARuleLooksAtIsCompleteOrNot(t *testing.T) {
	t.Parallel()
	usual := tokenProgram(t, "{issuer: a}").Verifies()[0]
	params := tokenProgram(t, "{issuer: a, fromParams: [q]}").Verifies()[0]
	headers := tokenProgram(t, "{issuer: a, fromHeaders: [{name: X}]}").Verifies()[0]
	cookies := tokenProgram(t, "{issuer: a, fromCookies: [c]}").Verifies()[0]
	two := tokenProgram(t, "{issuer: a, fromHeaders: [{name: X}], fromCookies: [c]}").Verifies()[0]
	if r := (authz.Request{Known: authz.FieldsHTTP &^ authz.FieldHeaders}); two.Complete(&r) {
		t.Error("a rule of a header and a cookie is complete without headers")
	}
	for name, want := range map[string]bool{"x": false, "cookie": false, "other": true} {
		if r := (authz.Request{Known: authz.FieldsHTTP, Headers: []authz.Header{{Name: name, Form: authz.HeaderHidden}}}); two.Complete(&r) != want {
			t.Errorf("hidden %s: complete %t, want %t", name, !want, want)
		}
	}
	hidden := []authz.Header{{Name: "cookie", Form: authz.HeaderHidden}}
	for _, c := range []struct {
		name                            string
		request                         authz.Request
		usual, params, headers, cookies bool
	}{
		{"all", authz.Request{Known: authz.FieldsHTTP}, true, true, true, true},
		{"no headers", authz.Request{Known: authz.FieldsHTTP &^ authz.FieldHeaders}, false, true, false, false},
		{"no path", authz.Request{Known: authz.FieldsHTTP &^ authz.FieldPath}, false, false, true, true},
		{"half a path", authz.Request{Known: authz.FieldsHTTP &^ authz.FieldPath, Path: []byte("/!")}, true, true, true, true},
		{"a hidden cookie", authz.Request{Known: authz.FieldsHTTP, Headers: hidden}, true, true, true, false},
	} {
		for rule, want := range map[*authz.TokenRule]bool{usual: c.usual, params: c.params, headers: c.headers, cookies: c.cookies} {
			if rule.Complete(&c.request) != want {
				t.Errorf("%s: %v: complete %t, want %t", c.name, rule.Spec, !want, want)
			}
		}
	}
}

func TestIssuersAndAudiences(t *testing.T) {
	t.Parallel()
	anybody := tokenProgram(t, "{jwksUri: 'https://a/'}").Verifies()[0]
	rule := tokenProgram(t, "{issuer: a, audiences: [shop, 'https://api.example/', 'http://x']}").Verifies()[0]
	for iss, want := range map[string]bool{"a": true, "A": false, "a/": false, "": false} {
		if rule.TakesIssuer(iss) != want || !anybody.TakesIssuer(iss) {
			t.Errorf("issuer %q", iss)
		}
	}
	for aud, want := range map[string]bool{
		"shop": true, "shop/": true, "https://shop": true, "http://shop/": true, "SHOP": false, "shop//": false, "ftp://shop": false, "https://http://shop": false,
		"api.example": true, "https://api.example": true, "http://api.example/": true, "api.example/x": false, "x": true, "": false, "/": false,
	} {
		text := structpb.NewStringValue(aud)
		list := structpb.NewListValue(&structpb.ListValue{Values: []*structpb.Value{structpb.NewNumberValue(1), structpb.NewStringValue("none"), text}})
		if rule.TakesAudience(text) != want || rule.TakesAudience(list) != want || !anybody.TakesAudience(text) {
			t.Errorf("audience %q, want %t", aud, want)
		}
	}
	for _, aud := range []*structpb.Value{nil, structpb.NewNumberValue(1), structpb.NewListValue(&structpb.ListValue{}), structpb.NewNullValue()} {
		if rule.TakesAudience(aud) || !anybody.TakesAudience(aud) {
			t.Errorf("audience %v", aud)
		}
	}
}

func TestRulesAreTriedByIssuer(t *testing.T) {
	t.Parallel()
	p := tokenProgram(t, "{issuer: b, fromParams: ['1']}, {issuer: a}", "{issuer: c}", "{issuer: b, fromParams: ['2']}")
	var got []string
	for _, r := range p.Verifies() {
		got = append(got, r.Spec.GetIssuer()+strings.Join(r.Spec.GetFromParams(), ""))
	}
	if want := []string{"a", "b1", "b2", "c"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	first, again := p.Verifies(), p.Verifies()
	if &first[0] != &again[0] || (*authz.Program)(nil).Verifies() != nil || tokenProgram(t).Verifies() != nil {
		t.Error("not the same, or some of nothing")
	}
	// Where everything is refused nobody looks for tokens.
	resources, _ := authz.Parse("test", []byte("apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {name: a}\nspec: {jwtRules: [{issuer: a}]}\n---\n"+
		"apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: b}\nspec: {action: DENY}\n"))
	set, _ := authz.Set{}.Update(resources)
	snapshot, _ := authz.Compile(set, authz.Options{})
	if got := snapshot.For(identity.Workload{Namespace: "default"}).Verifies(); got != nil {
		t.Errorf("%v", got)
	}
}
