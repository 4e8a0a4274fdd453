package authz_test

import (
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// TestAgainKnowsOfTheTokenWhatItCan: what a token said holds for a request with the same
// changes, and otherwise only where the proxy itself has said it and no change has
// touched where tokens are looked for.
func TestAgainKnowsOfTheTokenWhatItCan(t *testing.T) {
	t.Parallel()
	const (
		askA = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: a, namespace: default}
spec: {action: CUSTOM, provider: {name: a}, rules: [{}]}
---
`
		askB = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: b, namespace: default}\nspec: {action: CUSTOM, provider: {name: b}, rules: [{}]}\n---\n"
		jwt  = "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {name: jwt, namespace: default}\nspec: {jwtRules: [{issuer: iss}]}\n---\n"
		rest = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: banned, namespace: default}
spec: {action: DENY, rules: [{from: [{source: {requestPrincipals: [iss/banned]}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: user, namespace: default}
spec: {rules: [{from: [{source: {requestPrincipals: [iss/good]}}]}, {to: [{operation: {paths: [/open]}}]}]}
`
	)
	claims := func(sub string) *structpb.Struct {
		return &structpb.Struct{Fields: map[string]*structpb.Value{"iss": structpb.NewStringValue("iss"), "sub": structpb.NewStringValue(sub)}}
	}
	token := &authz.Changes{Names: []string{"authorization"}, Headers: []authz.Header{{Name: "authorization", Value: []byte("Bearer other")}}}
	user := &authz.Changes{Names: []string{"x-user"}, Headers: []authz.Header{{Name: "x-user", Value: []byte("alice")}}}
	path := &authz.Changes{Path: []byte("/open")}
	for _, c := range []struct {
		name, policies, path string
		claims               *structpb.Struct
		verified             *authz.Changes // Request.Token
		a, b                 *authz.Changes // of the providers a and b
		want                 authz.Reason
	}{
		{"the same changes", askA + jwt, "/", claims("good"), &authz.Changes{}, token, nil, authz.ReasonAllowRule},
		{"a provider set the token, and is not asked", jwt, "/", claims("good"), &authz.Changes{}, token, nil, authz.ReasonTokenUnknown},
		{"nor is the token looked for", "", "/", claims("good"), &authz.Changes{}, token, nil, authz.ReasonDenyUnknown},
		{"a provider took the token, and is not asked", "", "/open", nil, nil, token, nil, authz.ReasonDenyUnknown},
		{"a provider that is not asked changed something else", jwt, "/open", nil, nil, user, nil, authz.ReasonTokenUnknown},
		{"a provider that is not asked changed nothing", jwt, "/open", nil, nil, &authz.Changes{}, nil, authz.ReasonAllowRule},
		{"one of two is asked", askA + jwt, "/open", nil, nil, user, token, authz.ReasonTokenUnknown},
		{"the other", askB + jwt, "/open", nil, nil, user, token, authz.ReasonTokenUnknown},
		{"both are asked", askA + askB + jwt, "/", nil, nil, user, path, authz.ReasonAllowRule},
		{"both are asked, in the other order", askA + askB + jwt, "/open", nil, nil, user, path, authz.ReasonTokenUnknown},
		{"the proxy's word, and the provider is not asked", jwt, "/", claims("good"), nil, user, nil, authz.ReasonAllowRule},
		{"the proxy's word, and tokens are looked for where the provider has put another", askA + jwt, "/", claims("good"), nil, token, nil, authz.ReasonTokenUnknown},
		{"the proxy's word, and claims are put where the provider has put something", askA + strings.Replace(jwt, "iss}", "iss, outputClaimToHeaders: [{header: X-User, claim: sub}]}", 1), "/", claims("good"), nil, user, nil, authz.ReasonTokenUnknown},
		{"the proxy's word about somebody who is denied", askA, "/open", claims("banned"), nil, token, nil, authz.ReasonDenyRule},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := compile(t, c.policies+rest, authz.Options{MultipleProviders: true})
			r := authz.Request{Known: authz.FieldsHTTP, HTTP: true, Method: []byte("GET"), Path: []byte(c.path), Claims: c.claims, Token: c.verified}
			then := []*authz.Changes{c.a, c.b}
			if strings.HasSuffix(c.name, "in the other order") {
				slices.Reverse(then)
			}
			d, _ := s.For(identity.Workload{Namespace: "default"}).Again(&r, then, func(d authz.Decision, _ *authz.Request) (*authz.Changes, bool) {
				return map[string]*authz.Changes{"a": c.a, "b": c.b}[d.Provider], true
			})
			if d.Reason != c.want {
				t.Errorf("%s, want %s: %s", d.Reason, c.want, d.Text())
			}
			if r.Known != authz.FieldsHTTP || r.Claims != c.claims || r.Token != c.verified || string(r.Path) != c.path {
				t.Errorf("the request is now %+v", r)
			}
		})
	}
}

// TestAgainForgetsTheToken: what the proxy's filter said of a token can also be in its
// metadata, which CUSTOM policies may read. Where a change may have taken that away they
// do not know, either.
func TestAgainForgetsTheToken(t *testing.T) {
	t.Parallel()
	const filter = authz.JWTFilter
	p := compile(t, `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: a, namespace: default}
spec: {action: CUSTOM, provider: {name: a}, rules: [{when: [{key: "experimental.`+filter+`[group]", values: [asked]}]}]}
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: jwt, namespace: default}
spec: {jwtRules: [{issuer: iss}]}
`, authz.Options{}).For(identity.Workload{Namespace: "default"})
	said := func(group string) map[string]*structpb.Struct {
		return map[string]*structpb.Struct{filter: {Fields: map[string]*structpb.Value{"group": structpb.NewStringValue(group)}}}
	}
	user := &authz.Changes{Names: []string{"x-user"}}
	for _, c := range []struct {
		name, group string
		then        []*authz.Changes
		changes     *authz.Changes
		asked       bool
		forgotten   bool
		want        authz.Reason
	}{
		{"nothing was changed", "other", nil, user, false, false, authz.ReasonNoAllowPolicy},
		{"a change may have taken it away", "other", []*authz.Changes{user}, user, true, false, authz.ReasonNoAllowPolicy},
		{"nothing was changed then, and something is now", "asked", nil, user, true, true, authz.ReasonTokenUnknown},
		{"something was changed then, and nothing is now", "other", []*authz.Changes{user}, nil, true, true, authz.ReasonTokenUnknown},
	} {
		claims := &structpb.Struct{Fields: map[string]*structpb.Value{"iss": structpb.NewStringValue("iss"), "sub": structpb.NewStringValue("good")}}
		r := authz.Request{Known: authz.FieldsHTTP | authz.FieldMetadata, HTTP: true, Path: []byte("/"), Claims: claims, Token: &authz.Changes{}, Metadata: said(c.group)}
		asked := false
		d, now := p.Again(&r, c.then, func(authz.Decision, *authz.Request) (*authz.Changes, bool) { asked = true; return c.changes, true })
		if asked != c.asked || d.Reason != c.want {
			t.Errorf("%s: asked: %t, %s", c.name, asked, d.Text())
		}
		if forgotten := now.Claims == nil && now.Token == nil && len(now.Metadata) == 0 && now.Known&(authz.FieldClaims|authz.FieldMetadata) == 0; forgotten != c.forgotten {
			t.Errorf("%s: behind it there is %+v", c.name, now)
		}
		if r.Claims != claims || r.Token == nil || len(r.Metadata) != 1 {
			t.Errorf("%s: the request is now %+v", c.name, r)
		}
	}
}
