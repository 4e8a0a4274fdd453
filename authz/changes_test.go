package authz_test

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

const claimHeaders = `apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: jwt, namespace: default}
spec: {jwtRules: [{issuer: iss, outputClaimToHeaders: [{header: X-Group, claim: group}], fromHeaders: [{name: X-Token}], fromParams: [t]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: default}
spec:
  rules:
  - when: [{key: "request.headers[x-group]", values: [admin]}]
  - when: [{key: "request.headers[x-token]", values: ["*"]}]
  - when: [{key: "request.headers[:path]", values: ["/q?a=1"]}]
  - to: [{operation: {paths: [/other], hosts: [other.example], methods: [PUT]}}]
`

// TestWhatTokensChange: what comes after tokens is decided on the request as the
// verification of its token leaves it, and on no header that a client put in the place
// of a claim.
func TestWhatTokensChange(t *testing.T) {
	p := compile(t, claimHeaders, authz.Options{}).For(identity.Workload{Namespace: "default"})
	claims := &structpb.Struct{Fields: map[string]*structpb.Value{"iss": structpb.NewStringValue("iss")}}
	h := func(kv ...string) (hs []authz.Header) {
		for i := 0; i < len(kv); i += 2 {
			hs = append(hs, authz.Header{Name: kv[i], Value: []byte(kv[i+1])})
		}
		return hs
	}
	named := func(path string, hidden bool, names []string, kv ...string) *authz.Changes {
		c := &authz.Changes{Names: names, Headers: h(kv...), QueryHidden: hidden}
		if path != "" {
			c.Path = []byte(path)
		}
		return c
	}
	group := []string{"x-group"}
	for name, c := range map[string]struct {
		headers []authz.Header
		claims  *structpb.Struct
		token   *authz.Changes
		want    authz.Reason
	}{
		"no token, a client's header":             {h("x-group", "admin"), nil, nil, authz.ReasonNoAllowRule},
		"no token, though something is in Token":  {h("x-group", "admin"), nil, named("", false, group, "x-group", "admin"), authz.ReasonNoAllowRule},
		"no token and no header":                  {nil, nil, nil, authz.ReasonNoAllowRule},
		"a claim in the header":                   {nil, claims, named("", false, group, "x-group", "admin"), authz.ReasonAllowRule},
		"a claim in place of the client's":        {h("x-group", "admin"), claims, named("", false, group, "x-group", "user"), authz.ReasonNoAllowRule},
		"a token without the claim":               {h("x-group", "admin"), claims, named("", false, group), authz.ReasonNoAllowRule},
		"the proxy's own word":                    {h("x-group", "admin"), claims, nil, authz.ReasonAllowRule},
		"the token's header is gone":              {h("x-token", "x"), claims, named("", false, []string{"x-token", "x-group"}), authz.ReasonNoAllowRule},
		"the token's header is forwarded":         {h("x-token", "x"), claims, named("", false, group), authz.ReasonAllowRule},
		"the token's parameter is gone":           {nil, claims, named("/q?a=1", false, group), authz.ReasonAllowRule},
		"a path, a host and a method are changed": {nil, claims, &authz.Changes{Names: group, Path: []byte("/other"), Host: []byte("OTHER.example"), Method: []byte("PUT")}, authz.ReasonAllowRule},
		"a query that is not known":               {nil, claims, named("/q?a=1", true, group), authz.ReasonAllowUnknown},
		// Verified by other rules than these.
		"a header that these rules set and those did not": {h("x-group", "admin"), claims, &authz.Changes{}, authz.ReasonAllowUnknown},
		"a header that those rules set and these do not":  {nil, claims, named("", false, []string{"x-group", "x-token"}, "x-token", "x"), authz.ReasonAllowUnknown},
	} {
		path := "/q?b=2"
		if c.claims != nil {
			path = "/q?t=x&a=1"
		}
		r := authz.Request{Known: authz.FieldsHTTP &^ authz.FieldRemoteIP, HTTP: true, Method: []byte("GET"), Path: []byte(path), Host: []byte("a"),
			Headers: slices.Clone(c.headers), Claims: c.claims, Token: c.token}
		if d := p.Decide(&r); d.Reason != c.want {
			t.Errorf("%s: %s, want %s", name, d.Reason, c.want)
		}
		if fmt.Sprint(r.Headers) != fmt.Sprint(c.headers) || string(r.Path) != path {
			t.Errorf("%s: Decide changed the request: %+v", name, r)
		}
		behind := authz.AfterTokens(slices.Collect(p.TokenRules()), &r)
		if behind.Token != nil {
			t.Errorf("%s: behind tokens one is still to be applied", name)
		}
		rules := slices.Collect(p.Rules())
		best := authz.No
		for _, rule := range rules {
			best = max(best, authz.NewMatcher(rule, authz.EnvoyVersion{}).Match(&behind))
		}
		if want := map[authz.Reason]authz.Truth{authz.ReasonAllowRule: authz.Yes, authz.ReasonAllowUnknown: authz.Unknown}[c.want]; best != want {
			t.Errorf("%s: behind tokens the rules match: %s, want %s", name, best, want)
		}
		most := 1.0 // a list of headers, where they change
		if c.claims == nil && c.headers == nil {
			most = 0
		}
		if allocated := testing.AllocsPerRun(10, func() { p.Decide(&r) }); allocated > most && !raceEnabled {
			t.Errorf("%s: Decide allocates %v times", name, allocated)
		}
	}
}

// TestChangesOfARequest: what a provider changes is in the request that follows, and
// the request before is left alone.
func TestChangesOfARequest(t *testing.T) {
	t.Parallel()
	p := compile(t, claimHeaders, authz.Options{}).For(identity.Workload{Namespace: "default"})
	was := authz.Request{Known: authz.FieldsHTTP &^ authz.FieldRemoteIP, HTTP: true, Method: []byte("GET"), Path: []byte("/"), Host: []byte("a"),
		SourceIP: netip.MustParseAddr("10.0.0.1"), Headers: []authz.Header{{Name: "x-forwarded-for", Value: []byte("192.0.2.1")}, {Name: "x-a", Value: []byte("1")}}}
	r := was
	(*authz.Changes)(nil).Apply(&r)
	(&authz.Changes{Names: []string{"x-forwarded-for", "x-a"}, Headers: []authz.Header{{Name: "x-a", Value: []byte("2")}},
		Method: []byte("PUT"), Path: []byte("/other?x"), Host: []byte("OTHER.example")}).Apply(&r)
	if d := p.Decide(&r); d.Reason != authz.ReasonAllowRule || d.Rule != 3 {
		t.Errorf("%+v", d)
	}
	if len(r.Headers) != 1 || string(r.Headers[0].Value) != "2" || r.RemoteIP != netip.MustParseAddr("192.0.2.1") {
		t.Errorf("changed: %+v", r)
	}
	if len(was.Headers) != 2 || string(was.Headers[1].Value) != "1" || string(was.Path) != "/" {
		t.Errorf("the request before: %+v", was)
	}
	// What a record does not show is unknown behind the change, and the rest is not.
	for hidden, want := range map[authz.Field]string{authz.FieldMethod: "///a", authz.FieldPath: "GET//a", authz.FieldHost: "GET///"} {
		r = was
		(&authz.Changes{Hidden: hidden}).Apply(&r)
		if got := fmt.Sprintf("%s/%s/%s", r.Method, r.Path, r.Host); r.Known != was.Known&^hidden || got != want {
			t.Errorf("hidden %v: %s, known %v of %v", hidden, got, r.Known, was.Known)
		}
	}
	if (*authz.Program)(nil).Outputs() != nil || (*authz.Changes)(nil).SetsAny(p.Outputs()) {
		t.Error("nothing puts claims into headers, or changes them")
	}
	// An address that cannot be known does not become known.
	r = was
	r.Headers = []authz.Header{{Name: "x-forwarded-for", Value: []byte("192.0.2.1"), Form: authz.HeaderUnclear}}
	(&authz.Changes{Names: []string{"x-forwarded-for"}}).Apply(&r)
	if r.RemoteIP.IsValid() {
		t.Errorf("the client's address is %s", r.RemoteIP)
	}
	if len(r.Headers) != 0 {
		t.Errorf("a header that was removed is there: %+v", r.Headers)
	}
	// One that the proxy has told stays.
	r = was
	r.RemoteIP, r.Known = netip.MustParseAddr("192.0.2.7"), r.Known|authz.FieldRemoteIP
	(&authz.Changes{Names: []string{"x-forwarded-for"}}).Apply(&r)
	if r.RemoteIP != netip.MustParseAddr("192.0.2.7") {
		t.Errorf("the client's address became %s", r.RemoteIP)
	}
	// Behind tokens it is that of the headers as they came.
	r = was
	r.Headers = append(slices.Clone(r.Headers), authz.Header{Name: "x-group", Value: []byte("admin")})
	if behind := authz.AfterTokens(slices.Collect(p.TokenRules()), &r); len(behind.Headers) != 2 || behind.RemoteIP != netip.MustParseAddr("192.0.2.1") {
		t.Errorf("behind tokens: %+v", behind)
	}
	rules := p.Verifies()
	for _, c := range []struct {
		changes authz.Changes
		want    bool
	}{
		{authz.Changes{Names: []string{"x-token"}}, true}, {authz.Changes{Names: []string{"x-a"}}, false},
		{authz.Changes{Path: []byte("/")}, true}, {authz.Changes{Host: []byte("a")}, false},
	} {
		if c.changes.LooksAt(rules) != c.want {
			t.Errorf("%+v: %t", c.changes, !c.want)
		}
	}
	headersAlone := compile(t, `apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: jwt, namespace: default}
spec: {jwtRules: [{issuer: iss, fromHeaders: [{name: X-Token}]}]}
`, authz.Options{}).For(identity.Workload{Namespace: "default"}).Verifies()
	if c := (authz.Changes{Path: []byte("/")}); c.LooksAt(headersAlone) {
		t.Error("a path is no place of tokens for a rule that looks at headers alone")
	}
	if got := authz.ParamNames([]byte("/?a=1#&access_token=3"), "access_token"); len(got) > 0 {
		t.Errorf("in a fragment: %q", got)
	}
	if got := authz.ParamNames([]byte("/?access%5Ftoken=1&a&access_token=2&access%5ftoken&access%5Ftoken#access_token=3"), "access_token"); !slices.Equal(got, []string{"access%5Ftoken", "access_token", "access%5ftoken"}) {
		t.Errorf("%q", got)
	}
}

// TestPlacesOfTokens: what hides tokens in records, and what tells whether a record has
// all that a rule looks at, know where it looks.
func TestPlacesOfTokens(t *testing.T) {
	t.Parallel()
	rule := func(where string) *authz.TokenRule {
		p := compile(t, fmt.Sprintf(`apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: jwt, namespace: default}
spec: {jwtRules: [{issuer: iss%s}]}
`, where), authz.Options{}).For(identity.Workload{Namespace: "default"})
		return p.Verifies()[0]
	}
	for where, c := range map[string]struct{ headers, params []string }{
		"": {[]string{"authorization"}, []string{authz.DefaultParam}},
		", fromHeaders: [{name: X-Token}], fromParams: [t]": {[]string{"x-token"}, []string{"t"}},
		", fromCookies: [c]": {[]string{"cookie"}, nil},
	} {
		if headers, params := rule(where).Places(); !slices.Equal(headers, c.headers) || !slices.Equal(params, c.params) {
			t.Errorf("%q: %v and %v", where, headers, params)
		}
	}
	for _, c := range []struct {
		where, path string
		hidden      bool
		complete    bool
	}{
		{", fromParams: [t]", "/q?a=1&*", true, false},
		{", fromParams: [t]", "/q?*", false, true}, // a parameter of that name
		{", fromParams: [t]", "/q?a=*", true, true},
		{", fromParams: [t]", "/*", true, true},
		{"", "/q?*", true, true}, // the default one is never hidden like that
	} {
		r := authz.Request{Known: authz.FieldsHTTP, HTTP: true, Path: []byte(c.path), QueryHidden: c.hidden}
		if got := rule(c.where).Complete(&r); got != c.complete {
			t.Errorf("%q, %s: complete is %t", c.where, c.path, got)
		}
	}
}
