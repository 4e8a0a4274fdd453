package extauthz

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"unicode/utf8"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"golang.org/x/net/http/httpguts"
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

// ReasonHeader is the response header that carries a [Denial]'s reason.
const ReasonHeader = "x-signet-reason"

// Denial is what the client of a denied request gets; the zero value is what
// Istio's sidecars answer. What a provider of a CUSTOM policy answers is passed on
// instead where it denies.
//
// A gRPC request (content-type application/grpc) gets the status PERMISSION_DENIED,
// or UNAUTHENTICATED for a token, with the text as its message, whatever Status and
// JSON say.
type Denial struct {
	// Status is the HTTP status, from 400 to 599; 0 is 403. For a token that is
	// refused it is always 401.
	Status int
	// Text is the body; empty is "RBAC: access denied". For a token that is refused
	// the body says what is wrong with it.
	Text string
	// JSON makes the body {"code": STATUS, "message": TEXT}.
	JSON bool
	// Headers are set besides.
	Headers map[string]string
	// Reason adds the header x-signet-reason with the code of the reason, as
	// deny-rule. It never names a policy.
	Reason bool
}

// check says what is wrong with d.
func (d *Denial) check() error {
	if d.Status != 0 && (d.Status < 400 || d.Status > 599) {
		return fmt.Errorf("status %d: must be from 400 to 599", d.Status)
	}
	if !utf8.ValidString(d.Text) {
		return fmt.Errorf("text %q: is not UTF-8", d.Text)
	}
	if len(d.Text) > 4096 {
		return fmt.Errorf("the text has %d bytes; at most 4096 are sent", len(d.Text))
	}
	for name, value := range d.Headers {
		switch strings.ToLower(name) {
		case "content-type", "content-length", "transfer-encoding", "connection", "grpc-status", "grpc-message", "www-authenticate", ReasonHeader:
			return fmt.Errorf("header %s: is set by the proxy or by this service", name)
		}
		if !httpguts.ValidHeaderFieldName(name) || !httpguts.ValidHeaderFieldValue(value) || !utf8.ValidString(value) {
			return fmt.Errorf("header %q: %q is no header", name, value)
		}
	}
	return nil
}

// denials are the answers to requests that are denied.
type denials struct {
	mesh       *Denial
	namespaces map[string]*Denial

	mu sync.RWMutex
	// made is what was answered before, guarded by mu. It has an entry for each rule
	// that denied.
	made map[denialKey]*answer
}

// denialKey is all that a denial depends on, but for those of tokens.
type denialKey struct {
	as                   *Denial
	grpc                 bool
	kind, policy, reason string
	rule                 int
}

// maxDenials is how many answers are kept at most.
const maxDenials = 4096

func newDenials(mesh Denial, namespaces map[string]Denial) (*denials, error) {
	ds := &denials{mesh: &mesh, namespaces: make(map[string]*Denial, len(namespaces)), made: make(map[denialKey]*answer)}
	if err := mesh.check(); err != nil {
		return nil, fmt.Errorf("what denied requests are answered: %w", err)
	}
	for ns, d := range namespaces {
		if err := d.check(); err != nil {
			return nil, fmt.Errorf("what denied requests of namespace %s are answered: %w", ns, err)
		}
		ds.namespaces[ns] = &d
	}
	return ds, nil
}

func (ds *denials) of(namespace string) *Denial {
	if d, ok := ds.namespaces[namespace]; ok {
		return d
	}
	return ds.mesh
}

// answer is the denial of a check.
func (ds *denials) answer(c *check) *answer {
	d := &c.Decision
	as, grpc := ds.of(c.Workload.Namespace), c.attributes.grpc()
	if tokenRefused(d.Reason) {
		return encode(as.response(*d, grpc, &c.verified, c.attributes.realm()))
	}
	k := denialKey{as, grpc, d.Kind, d.Policy, string(d.Reason), d.Rule}
	ds.mu.RLock()
	a := ds.made[k]
	ds.mu.RUnlock()
	if a != nil {
		return a
	}
	a = encode(as.response(*d, grpc, nil, ""))
	ds.mu.Lock()
	defer ds.mu.Unlock()
	if len(ds.made) >= maxDenials {
		clear(ds.made)
	}
	ds.made[k] = a
	return a
}

// tokenRefused reports whether a denial is one of a token, which Istio's proxies
// answer with 401.
func tokenRefused(r authz.Reason) bool {
	return r == authz.ReasonTokenRefused || r == authz.ReasonTokenForeign
}

// response is a denial. token and realm are of a token that was refused; token may be
// nil.
func (as *Denial) response(d authz.Decision, grpc bool, token *Verified, realm string) *authv3.CheckResponse {
	code, status, text := codes.PermissionDenied, cmp.Or(as.Status, http.StatusForbidden), cmp.Or(as.Text, deniedBody)
	if grpc {
		// The proxy makes the gRPC status of the HTTP one.
		status = http.StatusForbidden
	}
	challenge := tokenRefused(d.Reason)
	if challenge {
		code, status, text = codes.Unauthenticated, http.StatusUnauthorized, tokenBody
		if token != nil {
			text = cmp.Or(token.Refused, tokenBody)
		}
		if token != nil && token.Forbidden {
			code, status = codes.PermissionDenied, http.StatusForbidden
		}
	}
	var headers []*corev3.HeaderValueOption
	set := func(name, value string) {
		headers = append(headers, &corev3.HeaderValueOption{
			Header:       &corev3.HeaderValue{Key: name, Value: value},
			AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
		})
	}
	if as.JSON && !grpc {
		set("content-type", "application/json")
		text = jsonBody(status, text)
	}
	if challenge {
		// As Envoy's jwt_authn has it, RFC 6750 section 3.
		set("www-authenticate", `Bearer realm="`+realm+`", error="invalid_token"`)
	}
	if as.Reason {
		set(ReasonHeader, string(d.Reason))
	}
	for _, name := range slices.Sorted(maps.Keys(as.Headers)) {
		set(strings.ToLower(name), as.Headers[name])
	}
	return &authv3.CheckResponse{
		Status: &statuspb.Status{Code: int32(code)},
		HttpResponse: &authv3.CheckResponse_DeniedResponse{DeniedResponse: &authv3.DeniedHttpResponse{
			Status: &typev3.HttpStatus{Code: typev3.StatusCode(status)}, Headers: headers, Body: text,
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

func jsonBody(status int, text string) string {
	b, err := json.Marshal(struct {
		Code    int    `json:"code"`
		Message string `json:"message"`
	}{status, text})
	if err != nil { // never, for a number and a text
		return "{}"
	}
	return string(b) + "\n"
}

// deniedBy is the denial of a provider, as it stands, but for what would not be one.
func (as *Denial) deniedBy(d authz.Decision, grpc bool, by *authv3.CheckResponse) *authv3.CheckResponse {
	r := as.response(d, grpc, nil, "")
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

// allowed lets a request through, changed as the providers and then the token say:
// in Istio that comes after CUSTOM.
func allowed(changed *rewrite, providers []*authv3.CheckResponse) *authv3.CheckResponse {
	ok := &authv3.OkHttpResponse{}
	r := &authv3.CheckResponse{
		Status:       &statuspb.Status{Code: int32(codes.OK)},
		HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: ok},
	}
	for _, p := range providers {
		m := p.GetDynamicMetadata()
		//lint:ignore SA1019 to Envoy it is in place of the other
		if own := p.GetOkResponse().GetDynamicMetadata(); own != nil {
			m = own
		}
		if m != nil {
			if r.DynamicMetadata == nil {
				r.DynamicMetadata = &structpb.Struct{}
			}
			proto.Merge(r.DynamicMetadata, m)
		}
	}
	changed.answer(ok)
	return r
}

// encode is the answer to a check that was decided.
func (s *Server) encode(c *check) *answer {
	switch {
	case c.Decision.Allowed && c.verified.Upstream == nil && len(c.passed)+len(c.rewrite.headers) == 0:
		return s.allowed
	case c.Decision.Allowed:
		return encode(allowed(&c.rewrite, c.passed))
	case c.denied != nil:
		return encode(s.denials.of(c.Workload.Namespace).deniedBy(c.Decision, c.attributes.grpc(), c.denied))
	}
	return s.denials.answer(c)
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

// header is the first value of a header, empty where there is none.
func (a *attributes) header(name string) []byte {
	for i := range a.raw {
		if headerName(a.raw[i].key) == name {
			v, _ := a.raw[i].value()
			return v
		}
	}
	v, _ := a.joinedHeaders().get(name)
	return v
}

// grpc reports whether the request is one of gRPC, as Envoy sees it.
func (a *attributes) grpc() bool {
	rest, ok := bytes.CutPrefix(a.header("content-type"), []byte("application/grpc"))
	return ok && (len(rest) == 0 || rest[0] == '+')
}

// realm is the URI of the request, with which Envoy's jwt_authn tells what a token
// was for. Whatever is not plain there is percent-encoded.
func (a *attributes) realm() string {
	const maxPath = 256
	path := a.header(":path")
	if len(path) == 0 {
		path = a.path
	}
	if len(path) == 0 {
		return ""
	}
	host := a.header(":authority")
	if len(host) == 0 {
		host = a.host
	}
	proto := a.header("x-forwarded-proto")
	if len(proto) == 0 {
		proto = []byte("http")
	}
	var b strings.Builder
	for _, part := range [][]byte{proto, []byte("://"), host[:min(len(host), maxPath)], path[:min(len(path), maxPath)]} {
		for _, c := range part {
			if c <= ' ' || c >= 0x7f || c == '"' || c == '\\' {
				fmt.Fprintf(&b, "%%%02X", c)
			} else {
				b.WriteByte(c)
			}
		}
	}
	return b.String()
}
