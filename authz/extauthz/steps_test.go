package extauthz_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/extauthz"
)

type tokens func(p *authz.Program, r *authz.Request) extauthz.Verified

func (f tokens) Claims(_ context.Context, p *authz.Program, r *authz.Request) extauthz.Verified {
	return f(p, r)
}

type providers func(name string, message []byte) (extauthz.ProviderAnswer, error)

func (f providers) Ask(_ context.Context, name string, message []byte) (extauthz.ProviderAnswer, error) {
	return f(name, message)
}

// records are those of one test; it checks one request after the other.
type records []extauthz.Record

func (rs *records) Add(r *extauthz.Record) {
	kept := *r
	kept.Message, kept.Asked = slices.Clone(r.Message), slices.Clone(r.Asked)
	request := *r.Request
	kept.Request = &request
	*rs = append(*rs, kept)
}

const tokenPolicy = `apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: tokens, namespace: default}
spec: {jwtRules: [{issuer: https://issuer.example, jwksUri: https://issuer.example/jwks}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: subject, namespace: default}
spec: {rules: [{from: [{source: {requestPrincipals: [https://issuer.example/alice]}}]}]}
`

// bearer gives the request a token.
func bearer(a *authv3.AttributeContext) {
	a.Request.Http.HeaderMap = raw(":path", "/ok?q=1", ":method", "GET", ":authority", "server:8080", "authorization", "Bearer x.y.z")
}

func setHeader(name, value string) *corev3.HeaderValueOption {
	return &corev3.HeaderValueOption{Header: &corev3.HeaderValue{Key: name, Value: value}}
}

func TestTokensAreVerifiedWhereTheProxyDidNot(t *testing.T) {
	t.Parallel()
	claims := &structpb.Struct{Fields: map[string]*structpb.Value{"iss": structpb.NewStringValue("https://issuer.example"), "sub": structpb.NewStringValue("alice")}}
	asked := 0
	var kept records
	w := newWorldWith(t, extauthz.Config{
		Snapshot: fixed(compile(t, tokenPolicy)), Records: &kept,
		Tokens: tokens(func(p *authz.Program, r *authz.Request) extauthz.Verified {
			asked++
			for range p.TokenRules() {
				for _, h := range r.Headers {
					switch string(h.Value) {
					case "Bearer x.y.z":
						r.Claims = claims
						return extauthz.Verified{Upstream: &authv3.OkHttpResponse{Headers: []*corev3.HeaderValueOption{setHeader("x-payload", "p")}, HeadersToRemove: []string{"authorization"}}}
					case "Bearer bad":
						return extauthz.Verified{Refused: "Jwt is expired", Err: errors.New("it expired")}
					}
				}
			}
			return extauthz.Verified{}
		}),
	})
	w.deny(check(), authz.ReasonNoAllowRule)
	a, err := w.Check(as(server), check(bearer))
	if err != nil || a.GetOkResponse() == nil || len(a.GetOkResponse().GetHeaders()) != 1 || !slices.Equal(a.GetOkResponse().GetHeadersToRemove(), []string{"authorization"}) {
		t.Errorf("answer %v, error %v; want allowed with the token's changes", a, err)
	}
	a, err = w.Check(as(server), check(func(a *authv3.AttributeContext) {
		bearer(a)
		a.Request.Http.HeaderMap.Headers[3].RawValue = []byte("Bearer bad")
	}))
	if err != nil || a.GetDeniedResponse().GetStatus().GetCode() != 401 || a.GetDeniedResponse().GetBody() != "Jwt is expired" {
		t.Errorf("answer %v, error %v; want 401", a, err)
	}
	// The proxy's own word stands.
	if a, err := w.Check(as(server), check(func(a *authv3.AttributeContext) {
		bearer(a)
		a.MetadataContext = &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
			"envoy.filters.http.jwt_authn": {Fields: map[string]*structpb.Value{"payload": structpb.NewStructValue(claims)}}}}
	})); err != nil || !proto.Equal(a.GetOkResponse(), &authv3.OkHttpResponse{}) {
		t.Errorf("answer %v, error %v; want allowed without changes", a, err)
	}
	w.deny(check(func(a *authv3.AttributeContext) { a.Request = nil }), authz.ReasonNoAllowRule)
	if asked != 3 {
		t.Errorf("asked %d times; want 3", asked)
	}
	if len(kept) != 5 || kept[2].Err == nil || kept[1].Err != nil || kept[1].Request.Claims != claims {
		t.Errorf("records %+v", kept)
	}
}

const askPolicy = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: ask, namespace: default}
spec: {action: CUSTOM, provider: {name: opa}, rules: [{to: [{operation: {paths: [/ask*]}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny, namespace: default}
spec: {action: DENY, rules: [{to: [{operation: {paths: [/ask/denied]}}]}]}
`

func TestProvidersAreAskedFirst(t *testing.T) {
	t.Parallel()
	metadata := func(k string) *structpb.Struct {
		return &structpb.Struct{Fields: map[string]*structpb.Value{k: structpb.NewStringValue("theirs")}}
	}
	deniedStatus := &statuspb.Status{Code: int32(codes.PermissionDenied), Message: "internal detail"}
	for name, c := range map[string]struct {
		path    string
		says    extauthz.ProviderAnswer
		err     error
		want    authz.Reason
		inspect func(t *testing.T, a *authv3.CheckResponse)
	}{
		"allowed by it and by the rest": {"/ask", extauthz.ProviderAnswer{Allowed: true}, nil, authz.ReasonNoAllowPolicy, func(t *testing.T, a *authv3.CheckResponse) {
			if !proto.Equal(a.GetOkResponse(), &authv3.OkHttpResponse{}) || a.GetDynamicMetadata() != nil {
				t.Errorf("answer %v", a)
			}
		}},
		"allowed with changes": {"/ask", extauthz.ProviderAnswer{Allowed: true, Response: &authv3.CheckResponse{DynamicMetadata: metadata("k"),
			HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{Headers: []*corev3.HeaderValueOption{setHeader("x-user", "alice")}}}}}, nil, authz.ReasonNoAllowPolicy, func(t *testing.T, a *authv3.CheckResponse) {
			if len(a.GetOkResponse().GetHeaders()) != 1 || a.GetDynamicMetadata().GetFields()["k"] == nil {
				t.Errorf("answer %v", a)
			}
		}},
		"allowed by it and denied by the rest": {"/ask/denied", extauthz.ProviderAnswer{Allowed: true, Response: &authv3.CheckResponse{DynamicMetadata: metadata("k")}}, nil, authz.ReasonDenyRule, nil},
		"denied by it":                         {"/ask", extauthz.ProviderAnswer{}, nil, extauthz.ReasonProviderDenied, nil},
		"denied with its answer": {"/ask", extauthz.ProviderAnswer{Response: &authv3.CheckResponse{Status: deniedStatus, DynamicMetadata: metadata("reason"),
			HttpResponse: &authv3.CheckResponse_DeniedResponse{DeniedResponse: &authv3.DeniedHttpResponse{Status: &typev3.HttpStatus{Code: 418}, Body: "teapot"}}}}, nil, "", func(t *testing.T, a *authv3.CheckResponse) {
			d := a.GetDeniedResponse()
			if a.GetStatus().GetCode() != int32(codes.PermissionDenied) || a.GetStatus().GetMessage() != "" || d.GetStatus().GetCode() != 418 || d.GetBody() != "teapot" ||
				a.GetDynamicMetadata().GetFields()["reason"].GetStringValue() != "provider-denied" {
				t.Errorf("answer %v", a)
			}
		}},
		// An answer that contradicts itself is no way in.
		"denied with the status of success": {"/ask", extauthz.ProviderAnswer{Response: &authv3.CheckResponse{Status: &statuspb.Status{},
			HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{}}}}, nil, extauthz.ReasonProviderDenied, nil},
		"denied with text that is no UTF-8": {"/ask", extauthz.ProviderAnswer{Response: &authv3.CheckResponse{
			HttpResponse: &authv3.CheckResponse_DeniedResponse{DeniedResponse: &authv3.DeniedHttpResponse{Body: "\xff"}}}}, nil, "", func(t *testing.T, a *authv3.CheckResponse) {
			if a.GetStatus().GetCode() != int32(codes.PermissionDenied) || a.GetOkResponse() != nil {
				t.Errorf("answer %v", a)
			}
		}},
		"an error with an answer": {"/ask", extauthz.ProviderAnswer{Allowed: true}, errors.New("it closed early"), extauthz.ReasonProviderFailed, nil},
		"not asked":               {"/other", extauthz.ProviderAnswer{}, errors.New("never"), authz.ReasonNoAllowPolicy, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var kept records
			var asked []string
			var w *world
			request := check(path(c.path))
			message, err := proto.Marshal(request)
			if err != nil {
				t.Fatal(err)
			}
			w = newWorldWith(t, extauthz.Config{Snapshot: fixed(compile(t, askPolicy)), Records: &kept,
				Providers: providers(func(name string, got []byte) (extauthz.ProviderAnswer, error) {
					asked = append(asked, name)
					if !slices.Equal(got, message) {
						t.Errorf("provider got %q", got)
					}
					return c.says, c.err
				})})
			a, err := answerToBytes(t, w.Server, as(server), message)
			if err != nil {
				t.Fatal(err)
			}
			if c.inspect != nil {
				c.inspect(t, a)
			} else if c.want == authz.ReasonNoAllowPolicy {
				if a.GetOkResponse() == nil {
					t.Errorf("answer %v; want allowed", a)
				}
			} else if err := isDenial(a, c.want); err != nil {
				t.Errorf("%v: %v", err, a)
			}
			if len(kept) != 1 {
				t.Fatalf("%d records", len(kept))
			}
			r := kept[0]
			if c.want != "" && r.Decision.Reason != c.want || !slices.Equal(r.Asked, asked) || !slices.Equal(r.Message, message) ||
				r.Program == nil || r.Snapshot == nil || r.Workload.PodUID != server.PodUID || string(r.Request.Path) != c.path {
				t.Errorf("record %+v", r)
			}
			if (c.err != nil && c.path == "/ask") != (r.Err != nil) {
				t.Errorf("error in the record: %v", r.Err)
			}
			if r.Decision.Reason == extauthz.ReasonProviderDenied && r.Decision.Policy != "default/ask" {
				t.Errorf("policy %q", r.Decision.Policy)
			}
		})
	}
}

// failing are records that panic.
type failing struct{}

func (*failing) Add(*extauthz.Record) { panic("no") }

func TestPanicsOfStepsDeny(t *testing.T) {
	t.Parallel()
	var kept records
	w := newWorldWith(t, extauthz.Config{Snapshot: fixed(compile(t, askPolicy)), Records: &kept,
		Providers: providers(func(string, []byte) (extauthz.ProviderAnswer, error) { panic("secret") })})
	w.deny(check(path("/ask")), extauthz.ReasonInternal)
	w.allow(check())
	if len(kept) != 2 || kept[0].Decision.Reason != extauthz.ReasonInternal || kept[0].Err == nil || kept[0].Program != nil || len(kept[0].Message) == 0 {
		t.Errorf("records %+v", kept)
	}
	panicking := newWorldWith(t, extauthz.Config{Snapshot: fixed(compile(t, askPolicy)), Records: (*failing)(nil)})
	panicking.deny(check(), extauthz.ReasonInternal)
	if log := w.log.String(); !strings.Contains(log, "check panicked") {
		t.Errorf("log %q", log)
	}
}

// TestCodecLeavesOtherMessages: a server has one codec for all its methods.
func TestCodecLeavesOtherMessages(t *testing.T) {
	t.Parallel()
	own, plain := extauthz.Codec(), encoding.GetCodecV2("proto")
	if own.Name() != plain.Name() {
		t.Errorf("its name is %q", own.Name())
	}
	for _, m := range []proto.Message{check(), durationpb.New(5), &authv3.CheckResponse{}} {
		b, err := own.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		got := m.ProtoReflect().New().Interface()
		if err := plain.Unmarshal(b, got); err != nil || !proto.Equal(got, m) {
			t.Errorf("%T: error %v", m, err)
		}
		proto.Reset(got)
		if err := own.Unmarshal(b, got); err != nil || !proto.Equal(got, m) {
			t.Errorf("%T: error %v", m, err)
		}
	}
	for _, v := range []any{nil, 1, "x"} {
		_, want := plain.Marshal(v)
		if _, err := own.Marshal(v); fmt.Sprint(err) != fmt.Sprint(want) {
			t.Errorf("%v: error %v; want %v", v, err, want)
		}
	}
}
