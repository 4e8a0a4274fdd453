package extauthz_test

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/extauthz"
)

// changesPolicy asks two providers about requests below /one and /two, and then reads
// what they may have changed.
const changesPolicy = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: a, namespace: default}
spec: {action: CUSTOM, provider: {name: a}, rules: [{to: [{operation: {paths: [/a*]}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: b, namespace: default}
spec: {action: CUSTOM, provider: {name: b}, rules: [{when: [{key: "request.headers[x-stage]", values: [b]}]}]}
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: jwt, namespace: default}
spec: {jwtRules: [{issuer: iss, outputClaimToHeaders: [{header: x-group, claim: group}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow, namespace: default}
spec:
  rules:
  - when: [{key: "request.headers[x-user]", values: [alice]}]
  - when: [{key: "request.headers[x-group]", values: [admin]}]
  - when: [{key: "request.headers[:path]", values: ["/a?u=1"]}]
  - when: [{key: "request.headers[authorization]", values: ["*"]}]
  - to: [{operation: {paths: [/changed]}}]
`

func ok(headers []*corev3.HeaderValueOption, remove ...string) *authv3.CheckResponse {
	return okWith(&authv3.OkHttpResponse{Headers: headers, HeadersToRemove: remove})
}

func okWith(o *authv3.OkHttpResponse) *authv3.CheckResponse {
	return &authv3.CheckResponse{HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: o}}
}

func setTo(kv ...string) (out []*corev3.HeaderValueOption) {
	for i := 0; i < len(kv); i += 2 {
		out = append(out, setHeader(kv[i], kv[i+1]))
	}
	return out
}

// appended is an option that appends.
func appended(name, value string) *corev3.HeaderValueOption {
	o := setHeader(name, value)
	//lint:ignore SA1019 it is what Envoy reads
	o.Append = wrapperspb.Bool(true)
	return o
}

// told is what the proxy is told to change, for people.
func told(a *authv3.CheckResponse) string {
	var out []string
	for _, h := range a.GetOkResponse().GetHeaders() {
		//lint:ignore SA1019 it is what is told
		out = append(out, fmt.Sprintf("%s=%s%s", h.GetHeader().GetKey(), map[bool]string{true: "+"}[h.GetAppend().GetValue()], h.GetHeader().GetValue()))
	}
	for _, h := range a.GetOkResponse().GetHeadersToRemove() {
		out = append(out, "-"+h)
	}
	for _, p := range a.GetOkResponse().GetQueryParametersToSet() {
		out = append(out, "?"+p.GetKey()+"="+p.GetValue())
	}
	for _, p := range a.GetOkResponse().GetQueryParametersToRemove() {
		out = append(out, "?-"+p)
	}
	return strings.Join(out, " ")
}

// TestWhatProvidersChangeIsDecidedOn: what a provider makes of a request is what the
// next provider is asked about, what the token is looked for in, what DENY and ALLOW
// policies see, and what the proxy is told, claims last.
func TestWhatProvidersChangeIsDecidedOn(t *testing.T) {
	t.Parallel()
	good := &structpb.Struct{Fields: map[string]*structpb.Value{"iss": structpb.NewStringValue("iss"), "group": structpb.NewStringValue("admin")}}
	snapshot := compileWith(t, changesPolicy, authz.Options{MultipleProviders: true})
	for _, c := range []struct {
		name    string
		headers []string // of the client, beside the usual ones
		path    string
		a, b    *authv3.CheckResponse
		want    authz.Reason
		told    string
		asked   string // of b, about the header x-user
	}{
		{"the provider's user", []string{"x-user", "mallory"}, "/a", ok(setTo("X-User", "alice")), nil, authz.ReasonAllowRule, "x-user=alice", ""},
		{"a client's user", []string{"x-user", "alice"}, "/a", ok(setTo("x-user", "mallory")), nil, authz.ReasonNoAllowRule, "", ""},
		{"a client's user, removed", []string{"x-user", "alice"}, "/a", ok(nil, "X-User"), nil, authz.ReasonNoAllowRule, "", ""},
		{"a client's user, appended to", []string{"x-user", "alice"}, "/a", ok([]*corev3.HeaderValueOption{appended("x-user", "b")}), nil, authz.ReasonNoAllowRule, "", ""},
		{"appended to nothing", nil, "/a", ok([]*corev3.HeaderValueOption{appended("x-user", "alice")}), nil, authz.ReasonNoAllowRule, "", ""},
		{"a path", nil, "/a", ok(setTo(":path", "/changed?x")), nil, authz.ReasonAllowRule, ":path=/changed?x", ""},
		{"a parameter", nil, "/a?t=1", okWith(&authv3.OkHttpResponse{QueryParametersToSet: []*corev3.QueryParameter{{Key: "u", Value: "1"}}, QueryParametersToRemove: []string{"t"}}), nil,
			authz.ReasonAllowRule, "?u=1 ?-t", ""},
		{"the next is asked about it", []string{"x-user", "mallory"}, "/a", ok(setTo("x-user", "alice", "x-stage", "b")), ok(nil, "x-stage"), authz.ReasonAllowRule,
			"x-user=alice -x-stage", "alice"},
		{"the next has the last word", []string{"x-user", "mallory"}, "/a", ok(setTo("x-user", "alice", "x-stage", "b")), ok(setTo("x-user", "bob")), authz.ReasonNoAllowRule, "", "alice"},
		{"removed and set by the next", []string{"x-user", "mallory", "x-stage", "b"}, "/a", ok(nil, "x-user"), ok(setTo("x-user", "alice")), authz.ReasonAllowRule, "x-user=alice", ""},
		{"the next is no longer asked", []string{"x-user", "alice", "x-stage", "b"}, "/a", ok(nil, "x-stage"), nil, authz.ReasonAllowRule, "-x-stage", ""},
		{"a token that the provider set", nil, "/a", ok(setTo("authorization", "Bearer good")), nil, authz.ReasonAllowRule, "-authorization x-group=admin", ""},
		{"a bad token that the provider set", []string{"x-user", "alice"}, "/a", ok(setTo("authorization", "Bearer bad")), nil, authz.ReasonTokenRefused, "", ""},
		{"a bad token that the provider removed", []string{"x-user", "alice", "authorization", "Bearer bad"}, "/a", ok(nil, "authorization"), nil, authz.ReasonAllowRule, "-authorization -x-group", ""},
		{"a group that the provider set", nil, "/a", ok(setTo("x-group", "admin")), nil, authz.ReasonNoAllowRule, "", ""},
		{"a claim in place of the provider's", nil, "/a", ok(setTo("x-group", "user", "authorization", "Bearer good")), nil, authz.ReasonAllowRule, "x-group=admin -authorization", ""},
		{"a claim where the provider removed", []string{"authorization", "Bearer good"}, "/a", ok(nil, "x-group"), nil, authz.ReasonAllowRule, "x-group=admin -authorization", ""},
		// What cannot be followed is no answer.
		{"a scheme", []string{"x-user", "alice"}, "/a", ok(setTo(":scheme", "https")), nil, extauthz.ReasonProviderFailed, "", ""},
		{"a part of a path", []string{"x-user", "alice"}, "/a", ok([]*corev3.HeaderValueOption{appended(":path", "/x")}), nil, extauthz.ReasonProviderFailed, "", ""},
		{"an empty path", []string{"x-user", "alice"}, "/a", ok(setTo(":path", "")), nil, extauthz.ReasonProviderFailed, "", ""},
		{"a length", []string{"x-user", "alice"}, "/a", ok(setTo("Content-Length", "0")), nil, extauthz.ReasonProviderFailed, "", ""},
		{"a raw value", []string{"x-user", "alice"}, "/a", ok([]*corev3.HeaderValueOption{{Header: &corev3.HeaderValue{Key: "x-user", RawValue: []byte("bob")}}}), nil, extauthz.ReasonProviderFailed, "", ""},
		{"a line break", []string{"x-user", "alice"}, "/a", ok(setTo("x-a", "a\nx-user: b")), nil, extauthz.ReasonProviderFailed, "", ""},
		{"no name", []string{"x-user", "alice"}, "/a", ok(setTo("", "a")), nil, extauthz.ReasonProviderFailed, "", ""},
		{"no name, removed", []string{"x-user", "alice"}, "/a", ok(nil, "x\x01"), nil, extauthz.ReasonProviderFailed, "", ""},
		{"a name that is no text, removed", []string{"x-user", "alice"}, "/a", ok(nil, "x-\u0085"), nil, extauthz.ReasonProviderFailed, "", ""},
		{"as many names as can be", []string{"x-user", "alice"}, "/a", ok(nil, manyNames(1000)...), nil, authz.ReasonAllowRule, "-" + strings.Join(manyNames(1000), " -"), ""},
		{"too many names", []string{"x-user", "alice"}, "/a", ok(nil, manyNames(1001)...), nil, extauthz.ReasonProviderFailed, "", ""},
		{"too long names", []string{"x-user", "alice"}, "/a", ok(nil, strings.Repeat("x", 65<<10)), nil, extauthz.ReasonProviderFailed, "", ""},
		{"too long a value", []string{"x-user", "alice"}, "/a", ok(setTo("x-a", strings.Repeat("x", 65<<10))), nil, extauthz.ReasonProviderFailed, "", ""},
		{"too long an authority", []string{"x-user", "alice"}, "/a", ok(setTo(":authority", strings.Repeat("x", 65<<10))), nil, extauthz.ReasonProviderFailed, "", ""},
		{"a parameter of two", []string{"x-user", "alice"}, "/a", okWith(&authv3.OkHttpResponse{QueryParametersToSet: []*corev3.QueryParameter{{Key: "u", Value: "1&v=2"}}}), nil, extauthz.ReasonProviderFailed, "", ""},
		{"a field of another version", []string{"x-user", "alice"}, "/a", unknownField(ok(nil)), nil, extauthz.ReasonProviderFailed, "", ""},
		{"path and parameter", []string{"x-user", "alice", "x-stage", "b"}, "/a", ok(setTo(":path", "/changed?x")), okWith(&authv3.OkHttpResponse{QueryParametersToRemove: []string{"x"}}), extauthz.ReasonProviderFailed, "", ""},
		{"parameter and path", []string{"x-user", "alice", "x-stage", "b"}, "/a?x", okWith(&authv3.OkHttpResponse{QueryParametersToRemove: []string{"x"}}), ok(setTo(":path", "/changed")), extauthz.ReasonProviderFailed, "", ""},
	} {
		for _, form := range []string{"raw", "joined"} {
			t.Run(c.name+"/"+form, func(t *testing.T) {
				t.Parallel()
				var kept records
				asked := ""
				w := newWorldWith(t, extauthz.Config{Snapshot: fixed(snapshot), Records: &kept,
					Providers: providers(func(name string, message []byte) (extauthz.ProviderAnswer, error) {
						var r authz.Request
						if err := extauthz.FromBytes(message, authz.FieldsHTTP, &r); err != nil {
							t.Errorf("provider %s: %v", name, err)
						}
						if name == "a" {
							return extauthz.ProviderAnswer{Allowed: true, Response: proto.Clone(c.a).(*authv3.CheckResponse)}, nil
						}
						asked = one(&r, "x-user")
						if c.b == nil {
							return extauthz.ProviderAnswer{}, errors.New("not expected")
						}
						return extauthz.ProviderAnswer{Allowed: true, Response: proto.Clone(c.b).(*authv3.CheckResponse)}, nil
					}),
					Tokens: tokens(func(_ *authz.Program, r *authz.Request) extauthz.Verified {
						switch one(r, "authorization") {
						case "Bearer good":
							r.Claims = good
							return extauthz.Verified{Upstream: &authv3.OkHttpResponse{Headers: setTo("x-group", "admin"), HeadersToRemove: []string{"authorization"}}}
						case "":
							return extauthz.Verified{Upstream: &authv3.OkHttpResponse{HeadersToRemove: []string{"x-group"}}}
						}
						return extauthz.Verified{Err: errors.New("it is bad")}
					})})
				a, err := w.Check(as(server), check(func(a *authv3.AttributeContext) {
					h := a.Request.Http
					h.HeaderMap = raw(append([]string{":path", c.path, ":method", "GET", ":authority", "server:8080"}, c.headers...)...)
					h.Path, h.Method, h.Host = c.path, "GET", "server:8080"
					if form == "joined" {
						h.Headers = map[string]string{}
						for _, hv := range h.HeaderMap.GetHeaders() {
							h.Headers[hv.GetKey()] = string(hv.GetRawValue())
						}
						h.HeaderMap = nil
					}
				}))
				if err != nil || len(kept) != 1 {
					t.Fatalf("%v; %d records", err, len(kept))
				}
				r := kept[0]
				if r.Decision.Reason != c.want || (a.GetOkResponse() != nil) != (c.want == authz.ReasonAllowRule) {
					t.Fatalf("%s (%v), want %s; answer %v", r.Decision.Reason, r.Err, c.want, a)
				}
				if got := told(a); c.want == authz.ReasonAllowRule && !sameWords(got, c.told) && !sameWords(got, c.told+" -x-group") {
					t.Errorf("the proxy is told %q, want %q", got, c.told)
				}
				if asked != c.asked && !(c.asked == "" && len(r.Asked) == 2 && c.b != nil) {
					t.Errorf("the second provider is asked about the user %q, want %q", asked, c.asked)
				}
				// What was decided on can be told from the message and the changes.
				var again authz.Request
				if err := extauthz.FromBytes(r.Message, authz.FieldsHTTP, &again); err != nil {
					t.Fatal(err)
				}
				again.Claims, again.Token = r.Request.Claims, r.Request.Token
				d := r.Program.Decide(&again)
				for i := 0; d.Ask && i < len(r.Changed); i++ {
					r.Changed[i].Apply(&again)
					d = r.Program.After(d, &again)
				}
				if c.want != extauthz.ReasonProviderFailed && (d.Reason != r.Decision.Reason || d.Rule != r.Decision.Rule) {
					t.Errorf("decided again: %+v; then: %+v", d, r.Decision)
				}
			})
		}
	}
}

// appendPolicy asks about everything, and then denies by what was appended to. It
// looks for tokens in cookies.
const appendPolicy = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: a, namespace: default}
spec: {action: CUSTOM, provider: {name: a}, rules: [{}]}
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: jwt, namespace: default}
spec: {jwtRules: [{issuer: iss, fromCookies: [tok]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny, namespace: default}
spec:
  action: DENY
  rules:
  - when: [{key: "request.headers[x-role]", values: [admin, "user,admin", "1,new"]}]
  - when: [{key: "request.headers[cookie]", values: ["*; role=guest"]}]
`

// TestWhatIsAppendedIsDecidedOn: a value that a provider appends is joined to the one
// that is there as Envoy joins it, which is measured in
// TestChangesOfProvidersAgreeWithEnvoy. Where it is not known to which, policies that
// read it do not decide as if it were.
func TestWhatIsAppendedIsDecidedOn(t *testing.T) {
	t.Parallel()
	snapshot := compileWith(t, appendPolicy, authz.Options{})
	for _, c := range []struct {
		name    string
		headers []string // of the client, beside the usual ones
		options []*corev3.HeaderValueOption
		want    authz.Reason // with raw headers
		joined  authz.Reason // with joined ones; empty: as with raw ones
		told    string
		token   string // that is looked at
	}{
		{"to an empty value", []string{"x-role", ""}, []*corev3.HeaderValueOption{appended("x-role", "admin")}, authz.ReasonDenyRule, "", "", ""},
		{"to a value", []string{"x-role", "user"}, []*corev3.HeaderValueOption{appended("x-role", "admin")}, authz.ReasonDenyRule, "", "", ""},
		{"to another value", []string{"x-role", "guest"}, []*corev3.HeaderValueOption{appended("x-role", "admin")}, authz.ReasonNoAllowPolicy, "", "x-role=+admin", ""},
		{"nothing", []string{"x-role", "admin"}, []*corev3.HeaderValueOption{appended("x-role", "")}, authz.ReasonDenyRule, "", "", ""},
		{"nothing to another value", []string{"x-role", "guest"}, []*corev3.HeaderValueOption{appended("x-role", "")}, authz.ReasonNoAllowPolicy, "", "", ""},
		{"to what was set to nothing", nil, []*corev3.HeaderValueOption{setHeader("x-role", ""), appended("x-role", "admin")}, authz.ReasonDenyRule, "", "", ""},
		{"to what was set to nothing, not denied", nil, []*corev3.HeaderValueOption{setHeader("x-role", ""), appended("x-role", "b")}, authz.ReasonNoAllowPolicy, "", "x-role=b", ""},
		{"to the first of two", []string{"x-role", "1", "x-role", "2"}, []*corev3.HeaderValueOption{appended("x-role", "new")}, authz.ReasonDenyRule, authz.ReasonDenyUnknown, "", ""},
		{"to one with a comma", []string{"x-role", "1,2"}, []*corev3.HeaderValueOption{appended("x-role", "new")}, authz.ReasonNoAllowPolicy, authz.ReasonDenyUnknown, "x-role=+new", ""},
		{"to cookies", []string{"cookie", "a=b"}, []*corev3.HeaderValueOption{appended("cookie", "role=guest")}, authz.ReasonDenyRule, "", "", ""},
		{"to cookies that were set", nil, []*corev3.HeaderValueOption{setHeader("cookie", "a=b"), appended("cookie", "c=d")}, authz.ReasonNoAllowPolicy, "", "cookie=a=b; c=d", ""},
		{"a token to cookies", []string{"cookie", "a=b"}, []*corev3.HeaderValueOption{appended("cookie", "tok=bad")}, authz.ReasonTokenRefused, "", "", "bad"},
	} {
		for _, form := range []string{"raw", "joined"} {
			t.Run(c.name+"/"+form, func(t *testing.T) {
				t.Parallel()
				var kept records
				token := ""
				w := newWorldWith(t, extauthz.Config{Snapshot: fixed(snapshot), Records: &kept,
					Providers: providers(func(string, []byte) (extauthz.ProviderAnswer, error) {
						return extauthz.ProviderAnswer{Allowed: true, Response: proto.Clone(ok(c.options)).(*authv3.CheckResponse)}, nil
					}),
					Tokens: tokens(func(p *authz.Program, r *authz.Request) extauthz.Verified {
						for tok := range p.Verifies()[0].Tokens(r) {
							token = string(tok.Text())
							return extauthz.Verified{Err: errors.New("it is bad")}
						}
						return extauthz.Verified{}
					})})
				a, err := w.Check(as(server), check(func(a *authv3.AttributeContext) {
					h := a.Request.Http
					h.Headers, h.HeaderMap = nil, raw(append([]string{":path", "/a", ":method", "GET", ":authority", "server:8080"}, c.headers...)...)
					h.Path, h.Method, h.Host = "/a", "GET", "server:8080"
					if form == "joined" {
						h.Headers = map[string]string{}
						for _, hv := range h.HeaderMap.GetHeaders() {
							if was, there := h.Headers[hv.GetKey()]; there {
								hv.RawValue = []byte(was + "," + string(hv.GetRawValue()))
							}
							h.Headers[hv.GetKey()] = string(hv.GetRawValue())
						}
						h.HeaderMap = nil
					}
				}))
				if err != nil || len(kept) != 1 {
					t.Fatalf("%v; %d records", err, len(kept))
				}
				want := c.want
				if form == "joined" && c.joined != "" {
					want = c.joined
				}
				if got := kept[0].Decision.Reason; got != want || token != c.token {
					t.Fatalf("%s (%v) with the token %q, want %s with %q", got, kept[0].Err, token, want, c.token)
				}
				if got := told(a); want == authz.ReasonNoAllowPolicy && got != c.told {
					t.Errorf("the proxy is told %q, want %q", got, c.told)
				}
			})
		}
	}
}

// manyNames are names of n headers.
func manyNames(n int) (names []string) {
	for i := range n {
		names = append(names, fmt.Sprint("x-", i))
	}
	return names
}

func sameWords(a, b string) bool {
	x, y := strings.Fields(a), strings.Fields(b)
	slices.Sort(x)
	slices.Sort(y)
	return slices.Equal(x, y)
}

// one is the value of a header that is there once.
func one(r *authz.Request, name string) string {
	for _, h := range r.Headers {
		if h.Name == name {
			return string(h.Value)
		}
	}
	return ""
}

func unknownField(r *authv3.CheckResponse) *authv3.CheckResponse {
	r.GetOkResponse().ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 1000, protowire.VarintType), 1))
	return r
}

// askBoth asks two providers and reads nothing else.
const askBoth = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: a, namespace: default}
spec: {action: CUSTOM, provider: {name: a}, rules: [{}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: b, namespace: default}
spec: {action: CUSTOM, provider: {name: b}, rules: [{}]}
`

// TestTheNextProviderIsAskedAboutAllThatCame: but for what was changed, in whatever
// pieces it came.
func TestTheNextProviderIsAskedAboutAllThatCame(t *testing.T) {
	t.Parallel()
	whole := check(func(a *authv3.AttributeContext) {
		a.MetadataContext = metadataOf(3, 3)
		a.ContextExtensions = map[string]string{"a": "b"}
		a.Request.Http.Size = 7
	})
	whole.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 1000, protowire.VarintType), 1))
	whole.Attributes.Request.Http.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 1001, protowire.VarintType), 2))
	want := proto.Clone(whole).(*authv3.CheckRequest)
	want.Attributes.Request.Http.HeaderMap.Headers = append(want.Attributes.Request.Http.HeaderMap.Headers, raw("x-user", "alice").Headers...)
	marshal := func(m proto.Message) []byte {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	http := whole.Attributes.Request.Http
	rest := proto.Clone(whole).(*authv3.CheckRequest)
	rest.Attributes.Request.Http = &authv3.AttributeContext_HttpRequest{HeaderMap: http.HeaderMap}
	http.HeaderMap = nil
	pieces := slices.Concat(marshal(&authv3.CheckRequest{Attributes: &authv3.AttributeContext{Request: &authv3.AttributeContext_Request{Http: http}}}), marshal(rest))
	for name, b := range map[string][]byte{"whole": marshal(mergedFrom(t, pieces)), "in pieces": pieces} {
		asked := 0
		s := newWorldWith(t, extauthz.Config{Snapshot: fixed(compileWith(t, askBoth, authz.Options{MultipleProviders: true})),
			Providers: providers(func(name string, m []byte) (extauthz.ProviderAnswer, error) {
				asked++
				if got := mergedFrom(t, m); name == "b" && !proto.Equal(got, want) {
					t.Errorf("asked about\n%v\nwant\n%v", got, want)
				}
				return extauthz.ProviderAnswer{Allowed: true, Response: ok(setTo("x-user", "alice"))}, nil
			})})
		r, err := s.Answer(as(server), b)
		var a authv3.CheckResponse
		if err != nil || proto.Unmarshal(r, &a) != nil || a.GetOkResponse() == nil || asked != 2 {
			t.Errorf("%s: %v, %v; asked %d times", name, &a, err, asked)
		}
	}
}

func mergedFrom(t *testing.T, b []byte) *authv3.CheckRequest {
	r := &authv3.CheckRequest{}
	if err := proto.Unmarshal(b, r); err != nil {
		t.Error(err)
	}
	return r
}

// TestTheNextProvidersMessageTakesLittleMemory is not parallel: it counts what the
// process has.
func TestTheNextProvidersMessageTakesLittleMemory(t *testing.T) {
	s := newWorldWith(t, extauthz.Config{Snapshot: fixed(compileWith(t, askBoth, authz.Options{MultipleProviders: true})),
		Providers: providers(func(string, []byte) (extauthz.ProviderAnswer, error) {
			return extauthz.ProviderAnswer{Allowed: true, Response: ok(setTo("x-user", "alice"))}, nil
		})})
	b := withMetadata(t, metadataOf(128<<10, 0)) // 256 KiB
	answer := func() {
		r, err := s.Answer(as(server), b)
		var a authv3.CheckResponse
		if err != nil || proto.Unmarshal(r, &a) != nil || a.GetOkResponse() == nil {
			t.Fatalf("answer %v: %v", &a, err)
		}
	}
	answer()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	const n = 20
	for range n {
		answer()
	}
	runtime.ReadMemStats(&after)
	// Decoded and encoded it were some 9 MB for each.
	if took := (after.TotalAlloc - before.TotalAlloc) / n; took > 2<<20 {
		t.Errorf("a message of %d KiB takes %d KiB", len(b)>>10, took>>10)
	}
}

// TestNobodyForgesClaims: a header in which a token's claims would be is taken out of a
// request without one, whoever looks for tokens.
func TestNobodyForgesClaims(t *testing.T) {
	t.Parallel()
	none := tokens(func(*authz.Program, *authz.Request) extauthz.Verified { return extauthz.Verified{} })
	theirs := &structpb.Struct{Fields: map[string]*structpb.Value{"payload": structpb.NewStructValue(
		&structpb.Struct{Fields: map[string]*structpb.Value{"iss": structpb.NewStringValue("iss")}})}}
	for _, c := range []struct {
		name   string
		tokens extauthz.Tokens
		path   string
		proxys bool // the proxy has verified a token
		told   string
	}{
		{"nobody verifies", nil, "/", false, "-x-group"},
		{"one that says nothing", none, "/", false, "-x-group"},
		{"a provider set it, and nobody verifies", nil, "/a", false, "-x-group"},
		{"a provider set it, and one says nothing", none, "/a", false, "-x-group"},
		{"the proxy's", nil, "/", true, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newWorldWith(t, extauthz.Config{Snapshot: fixed(compileWith(t, changesPolicy, authz.Options{MultipleProviders: true})), Tokens: c.tokens,
				Providers: providers(func(string, []byte) (extauthz.ProviderAnswer, error) {
					return extauthz.ProviderAnswer{Allowed: true, Response: ok(setTo("x-group", "admin"))}, nil
				})})
			a, err := w.Check(as(server), check(func(a *authv3.AttributeContext) {
				a.Request.Http.HeaderMap = raw(":path", c.path, ":method", "GET", ":authority", "server:8080", "x-user", "alice", "x-group", "admin")
				a.Request.Http.Path = ""
				if c.proxys {
					a.MetadataContext = &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{"envoy.filters.http.jwt_authn": theirs}}
				}
			}))
			if err != nil || a.GetOkResponse() == nil {
				t.Fatalf("%v, %v", a, err)
			}
			if got := told(a); got != c.told {
				t.Errorf("the proxy is told %q, want %q", got, c.told)
			}
		})
	}
}

// TestAProvidersTokenIsNotTheProxys: what the proxy said of the token that came says
// nothing of the one that a provider has set.
func TestAProvidersTokenIsNotTheProxys(t *testing.T) {
	t.Parallel()
	theirs := &structpb.Struct{Fields: map[string]*structpb.Value{"iss": structpb.NewStringValue("iss"), "sub": structpb.NewStringValue("proxy")}}
	answer := ok(setTo("authorization", "Bearer other"))
	verified := 0
	var kept records
	w := newWorldWith(t, extauthz.Config{Snapshot: fixed(compileWith(t, changesPolicy, authz.Options{MultipleProviders: true})), Records: &kept,
		Providers: providers(func(string, []byte) (extauthz.ProviderAnswer, error) {
			return extauthz.ProviderAnswer{Allowed: true, Response: proto.Clone(answer).(*authv3.CheckResponse)}, nil
		}),
		Tokens: tokens(func(*authz.Program, *authz.Request) extauthz.Verified { verified++; return extauthz.Verified{} })})
	request := check(func(a *authv3.AttributeContext) {
		a.Request.Http.HeaderMap = raw(":path", "/a", ":method", "GET", ":authority", "server:8080", "x-user", "alice", "x-group", "user")
		a.Request.Http.Path = ""
		a.MetadataContext = &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
			"envoy.filters.http.jwt_authn": {Fields: map[string]*structpb.Value{"payload": structpb.NewStructValue(theirs)}}}}
	})
	reason := func() authz.Reason {
		t.Helper()
		if _, err := w.Check(as(server), request); err != nil {
			t.Fatal(err)
		}
		return kept[len(kept)-1].Decision.Reason
	}
	if got := reason(); got != authz.ReasonTokenRefused || verified != 1 || kept[0].Request.Claims != nil || kept[0].Request.Metadata["envoy.filters.http.jwt_authn"] != nil {
		t.Errorf("%s; verified %d times; %+v", got, verified, kept[0].Request)
	}
	// Nor does a provider say what the proxy's token does: claims have the last word.
	for _, answer = range []*authv3.CheckResponse{ok(setTo("X-Group", "admin", "x-user", "bob")), ok(nil, "x-group", "x-user"), ok([]*corev3.HeaderValueOption{appended("x-group", "admin")}, "x-user")} {
		a, err := w.Check(as(server), request)
		if err != nil {
			t.Fatal(err)
		}
		r := kept[len(kept)-1]
		if r.Decision.Reason != authz.ReasonNoAllowRule || verified != 1 || strings.Contains(fmt.Sprint(a), "x-group") {
			t.Errorf("%s; verified %d times; %v", r.Decision.Reason, verified, a)
		}
		if one(r.Request, "x-group") != "user" || r.Request.Claims == nil || slices.Contains(r.Changed[0].Names, "x-group") {
			t.Errorf("the record has %+v", r)
		}
	}
	kept = kept[:1]
	answer = ok(setTo("x-other", "1"))
	if got := reason(); got != authz.ReasonAllowRule || verified != 1 || kept[1].Request.Claims.GetFields()["sub"].GetStringValue() != "proxy" {
		t.Errorf("%s; verified %d times; %+v", got, verified, kept[1].Request)
	}
	// Metadata that policies may have from a filter before.
	answer.DynamicMetadata = &structpb.Struct{}
	if got := reason(); got != authz.ReasonAllowRule {
		t.Error(got)
	}
	request.Attributes.MetadataContext.FilterMetadata["envoy.filters.http.ext_authz"] = &structpb.Struct{}
	if got := reason(); got != extauthz.ReasonProviderFailed {
		t.Error(got)
	}
}

// TestATokenThatTheProxyTookOut: the proxy has verified a token and taken it out, and a
// provider changes a place where no token is left. Nobody can tell whether it was there
// that the token was, so the request is not one without a token.
func TestATokenThatTheProxyTookOut(t *testing.T) {
	t.Parallel()
	theirs := &structpb.Struct{Fields: map[string]*structpb.Value{"iss": structpb.NewStringValue("iss"), "sub": structpb.NewStringValue("alice")}}
	for spec, want := range map[string]authz.Reason{
		"issuer: iss, fromHeaders: [{name: authorization, prefix: 'Bearer '}, {name: x-jwt}]":                             authz.ReasonTokenUnknown,
		"issuer: iss, fromHeaders: [{name: authorization, prefix: 'Bearer '}, {name: x-jwt}], forwardOriginalToken: true": authz.ReasonAllowRule,
	} {
		policies := strings.Replace(changesPolicy, "issuer: iss", spec, 1) + "---\n" + `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-alice, namespace: default}
spec: {action: DENY, rules: [{from: [{source: {requestPrincipals: [iss/alice]}}]}]}
`
		var kept records
		w := newWorldWith(t, extauthz.Config{Snapshot: fixed(compileWith(t, policies, authz.Options{MultipleProviders: true})), Records: &kept,
			Providers: providers(func(string, []byte) (extauthz.ProviderAnswer, error) {
				return extauthz.ProviderAnswer{Allowed: true, Response: ok(nil, "authorization")}, nil
			}),
			Tokens: tokens(func(*authz.Program, *authz.Request) extauthz.Verified { return extauthz.Verified{} })})
		_, err := w.Check(as(server), check(func(a *authv3.AttributeContext) {
			a.Request.Http.HeaderMap = raw(":path", "/a", ":method", "GET", ":authority", "server:8080", "x-user", "alice")
			a.Request.Http.Path = ""
			a.MetadataContext = &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
				"envoy.filters.http.jwt_authn": {Fields: map[string]*structpb.Value{"payload": structpb.NewStructValue(theirs)}}}}
		}))
		if err != nil {
			t.Fatal(err)
		}
		if got := kept[0].Decision.Reason; got != want {
			t.Errorf("%s: %s", spec, got)
		}
	}
}

// TestChangesOutliveTheMessage: they are kept for the record, and the message is gRPC's,
// which writes the next one there.
func TestChangesOutliveTheMessage(t *testing.T) {
	t.Parallel()
	var kept records
	w := newWorldWith(t, extauthz.Config{Snapshot: fixed(compileWith(t, changesPolicy, authz.Options{MultipleProviders: true})), Records: &kept,
		Providers: providers(func(string, []byte) (extauthz.ProviderAnswer, error) {
			return extauthz.ProviderAnswer{Allowed: true, Response: ok([]*corev3.HeaderValueOption{appended("x-user", "bob"), setHeader("x-other", "1")}, "x-gone")}, nil
		})})
	message, err := proto.Marshal(check(func(a *authv3.AttributeContext) {
		a.Request.Http.HeaderMap = raw(":path", "/a", ":method", "GET", ":authority", "server:8080", "x-user", "alice", "x-user", "carol", "x-gone", "1")
		a.Request.Http.Path = ""
	}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Answer(as(server), message); err != nil {
		t.Fatal(err)
	}
	for i := range message {
		message[i] = 'z'
	}
	var got []string
	for _, h := range kept[0].Changed[0].Headers {
		got = append(got, h.Name+"="+string(h.Value))
	}
	slices.Sort(got)
	if want := []string{"x-other=1", "x-user=alice,bob", "x-user=carol"}; !slices.Equal(got, want) {
		t.Errorf("the changes became %q", got)
	}
}
