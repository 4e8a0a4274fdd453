package extauthz_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc/codes"

	"github.com/signet-mesh/signet/authz/extauthz"
	"github.com/signet-mesh/signet/identity"
)

// said is what a client gets.
type said struct {
	status  int
	body    string
	headers map[string]string
}

func clientGets(t *testing.T, a *authv3.CheckResponse) said {
	t.Helper()
	if c := codes.Code(a.GetStatus().GetCode()); a.GetOkResponse() != nil || c != codes.PermissionDenied && c != codes.Unauthenticated {
		t.Fatalf("answer %v; want a denial", a)
	}
	d := a.GetDeniedResponse()
	s := said{int(d.GetStatus().GetCode()), d.GetBody(), map[string]string{}}
	for _, h := range d.GetHeaders() {
		if _, twice := s.headers[h.GetHeader().GetKey()]; twice {
			t.Errorf("header %s twice", h.GetHeader().GetKey())
		}
		s.headers[h.GetHeader().GetKey()] = h.GetHeader().GetValue()
	}
	return s
}

func TestDenials(t *testing.T) {
	t.Parallel()
	grpc := func(contentType string) func(a *authv3.AttributeContext) {
		return func(a *authv3.AttributeContext) {
			path("/ok/secret")(a)
			a.Request.Http.HeaderMap.Headers = append(a.Request.Http.HeaderMap.Headers, raw("content-type", contentType).Headers...)
		}
	}
	token := func(a *authv3.AttributeContext) {
		path("/ok/secret?x=\"\r\ny\xff")(a)
		a.Request.Http.Path = ""
		a.Request.Http.HeaderMap.Headers = append(a.Request.Http.HeaderMap.Headers, raw("authorization", "Bearer x", "x-forwarded-proto", "https").Headers...)
	}
	joinedGRPC := func(a *authv3.AttributeContext) {
		path("/ok/secret")(a)
		joined(a)
		a.Request.Http.Headers["content-type"] = "application/grpc"
	}
	const realm = `Bearer realm="https://server:8080/ok/secret?x=%22%0D%0Ay%FF", error="invalid_token"`
	custom := extauthz.Denial{Status: 404, Text: "not found", Headers: map[string]string{"X-Denied-By": "signet"}}
	inJSON := extauthz.Denial{Text: "no \"entry\"", JSON: true}
	reasons := extauthz.Denial{Reason: true}
	for name, c := range map[string]struct {
		denial extauthz.Denial
		change func(a *authv3.AttributeContext)
		want   said
	}{
		"as Istio":                        {extauthz.Denial{}, path("/ok/secret"), said{403, "RBAC: access denied", nil}},
		"as Istio, a token":               {extauthz.Denial{}, token, said{401, "Jwt verification fails", map[string]string{"www-authenticate": realm}}},
		"status, text and headers":        {custom, path("/ok/secret"), said{404, "not found", map[string]string{"x-denied-by": "signet"}}},
		"of a token 401 remains":          {custom, token, said{401, "Jwt verification fails", map[string]string{"x-denied-by": "signet", "www-authenticate": realm}}},
		"JSON":                            {inJSON, path("/ok/secret"), said{403, `{"code":403,"message":"no \"entry\""}` + "\n", map[string]string{"content-type": "application/json"}}},
		"JSON of a token":                 {inJSON, token, said{401, `{"code":401,"message":"Jwt verification fails"}` + "\n", map[string]string{"content-type": "application/json", "www-authenticate": realm}}},
		"reasons":                         {reasons, path("/ok/secret"), said{403, "RBAC: access denied", map[string]string{"x-signet-reason": "deny-rule"}}},
		"reasons of a token":              {reasons, token, said{401, "Jwt verification fails", map[string]string{"x-signet-reason": "token-refused", "www-authenticate": realm}}},
		"gRPC":                            {custom, grpc("application/grpc"), said{403, "not found", map[string]string{"x-denied-by": "signet"}}},
		"gRPC with a codec, no JSON":      {inJSON, grpc("application/grpc+proto"), said{403, "no \"entry\"", nil}},
		"gRPC in joined headers":          {custom, joinedGRPC, said{403, "not found", map[string]string{"x-denied-by": "signet"}}},
		"gRPC-Web is HTTP to the proxy":   {custom, grpc("application/grpc-web"), said{404, "not found", map[string]string{"x-denied-by": "signet"}}},
		"what is malformed is denied too": {custom, func(a *authv3.AttributeContext) { a.Source.Address = socketAddress("x", 1) }, said{404, "not found", map[string]string{"x-denied-by": "signet"}}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorldWith(t, extauthz.Config{Snapshot: fixed(compile(t, policyText+"---\n"+tokenRule)), Denial: c.denial})
			for range 2 { // the second is remembered
				a, err := w.Check(as(server), check(c.change))
				if err != nil {
					t.Fatal(err)
				}
				got := clientGets(t, a)
				if c.want.headers == nil {
					c.want.headers = map[string]string{}
				}
				if fmt.Sprint(got) != fmt.Sprint(c.want) {
					t.Errorf("the client gets\n%v, want\n%v", got, c.want)
				}
				if strings.Contains(got.body+fmt.Sprint(got.headers), "deny-secret") {
					t.Errorf("it names the policy: %v", got)
				}
				if c.denial.JSON && strings.HasPrefix(got.body, "{") && !json.Valid([]byte(got.body)) {
					t.Errorf("body %q is no JSON", got.body)
				}
				if m := a.GetDynamicMetadata().AsMap(); m["reason"] == "deny-rule" && m["policy"] != "default/deny-secret" {
					t.Errorf("the proxy is not told the policy: %v", m)
				}
			}
		})
	}
}

// tokenRule is a RequestAuthentication.
const tokenRule = `apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: tokens, namespace: default}
spec: {jwtRules: [{issuer: https://issuer.example, jwksUri: https://issuer.example/jwks}]}
`

func TestDenialsOfNamespaces(t *testing.T) {
	t.Parallel()
	w := newWorldWith(t, extauthz.Config{Snapshot: fixed(nil), Denial: extauthz.Denial{Status: 404}, Denials: map[string]extauthz.Denial{"open": {Reason: true}}})
	for namespace, want := range map[string]said{
		"open":   {403, "RBAC: access denied", map[string]string{"x-signet-reason": "no-policies"}},
		"closed": {404, "RBAC: access denied", map[string]string{}},
	} {
		a, err := w.Check(as(identity.Workload{Namespace: namespace, PodUID: "u"}), check())
		if err != nil {
			t.Fatal(err)
		}
		if got := clientGets(t, a); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: the client gets %v; want %v", namespace, got, want)
		}
	}
}

func TestDenialsRefused(t *testing.T) {
	t.Parallel()
	for name, d := range map[string]extauthz.Denial{
		"a status of success": {Status: 200}, "a redirect": {Status: 302}, "no status": {Status: 600},
		"text that is no UTF-8": {Text: "\xff"}, "endless text": {Text: strings.Repeat("x", 5000)},
		"a header that is none": {Headers: map[string]string{"a b": "c"}}, "a header with a line break": {Headers: map[string]string{"a": "b\r\nc: d"}},
		"the proxy's header": {Headers: map[string]string{"Content-Length": "0"}}, "our header": {Headers: map[string]string{"X-Signet-Reason": "x"}},
	} {
		for _, cfg := range []extauthz.Config{{Denial: d}, {Denials: map[string]extauthz.Denial{"n": d}}} {
			cfg.Snapshot = fixed(nil)
			if _, err := extauthz.New(cfg); err == nil {
				t.Errorf("%s: no error", name)
			}
		}
	}
}
