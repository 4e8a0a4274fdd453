package extauthz

import (
	"cmp"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
)

// deniedBody and tokenBody are what Istio's sidecars answer with.
const (
	deniedBody = "RBAC: access denied"
	tokenBody  = "Jwt verification fails"
)

// encode is the answer to a check that was decided.
func (s *Server) encode(c *check) *answer {
	switch {
	case c.Decision.Allowed && c.verified.Upstream == nil && len(c.passed) == 0:
		return s.allowed
	case c.Decision.Allowed:
		return encode(allowed(c.verified.Upstream, c.passed))
	case c.Decision.Reason == ReasonProviderDenied && c.denied != nil:
		return encode(deniedBy(c.Decision, c.denied))
	}
	return encode(denied(c.Decision, c.verified.Refused))
}

func encode(r *authv3.CheckResponse) *answer {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(r)
	if err != nil {
		// Only text that is no UTF-8 can be the reason, which a provider sent. The
		// bare status denies.
		b, _ = proto.Marshal(&authv3.CheckResponse{Status: &statuspb.Status{Code: int32(codes.PermissionDenied)}})
	}
	return newAnswer(b)
}

// allowed lets a request through, changed as the tokens and then the providers say.
func allowed(tokens *authv3.OkHttpResponse, providers []*authv3.CheckResponse) *authv3.CheckResponse {
	ok := &authv3.OkHttpResponse{}
	r := &authv3.CheckResponse{
		Status:       &statuspb.Status{Code: int32(codes.OK)},
		HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: ok},
	}
	if tokens != nil {
		proto.Merge(ok, tokens)
	}
	for _, p := range providers {
		if o := p.GetOkResponse(); o != nil {
			proto.Merge(ok, o)
		}
		if m := p.GetDynamicMetadata(); m != nil {
			if r.DynamicMetadata == nil {
				r.DynamicMetadata = &structpb.Struct{}
			}
			proto.Merge(r.DynamicMetadata, m)
		}
	}
	return r
}

// deniedBy is the denial of a provider, as it stands, but for what would not be one.
func deniedBy(d authz.Decision, by *authv3.CheckResponse) *authv3.CheckResponse {
	r := denied(d, "")
	if c := codes.Code(by.GetStatus().GetCode()); c == codes.Unauthenticated {
		r.Status.Code = int32(c)
	}
	if h := by.GetDeniedResponse(); h != nil {
		h = proto.Clone(h).(*authv3.DeniedHttpResponse)
		if h.GetStatus().GetCode() == 0 {
			h.Status = &typev3.HttpStatus{Code: typev3.StatusCode_Forbidden}
		}
		r.HttpResponse = &authv3.CheckResponse_DeniedResponse{DeniedResponse: h}
	}
	for k, v := range by.GetDynamicMetadata().GetFields() {
		if _, own := r.DynamicMetadata.Fields[k]; !own {
			r.DynamicMetadata.Fields[k] = v
		}
	}
	return r
}

// denied is a denial; refused is the body where it is for a token.
func denied(d authz.Decision, refused string) *authv3.CheckResponse {
	code, httpCode, body := codes.PermissionDenied, typev3.StatusCode_Forbidden, deniedBody
	if d.Reason == authz.ReasonTokenRefused || d.Reason == authz.ReasonTokenForeign {
		code, httpCode, body = codes.Unauthenticated, typev3.StatusCode_Unauthorized, cmp.Or(refused, tokenBody)
	}
	return &authv3.CheckResponse{
		Status: &statuspb.Status{Code: int32(code)},
		HttpResponse: &authv3.CheckResponse_DeniedResponse{DeniedResponse: &authv3.DeniedHttpResponse{
			Status: &typev3.HttpStatus{Code: httpCode},
			Body:   body,
		}},
		DynamicMetadata: &structpb.Struct{Fields: map[string]*structpb.Value{
			"decision": structpb.NewStringValue(d.Verdict()),
			"kind":     structpb.NewStringValue(d.Kind),
			"policy":   structpb.NewStringValue(d.Policy),
			"rule":     structpb.NewNumberValue(float64(d.Rule)),
			"reason":   structpb.NewStringValue(string(d.Reason)),
		}},
	}
}
