package oracle_test

import (
	"context"
	"strings"
	"sync"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
)

// recorder answers all external authorizers. Requests tell which pair they are of
// in the header x-pair, connections by the port that they come from.
type recorder struct {
	authv3.UnimplementedAuthorizationServer
	mu     sync.Mutex
	checks map[string]map[string]*authv3.CheckRequest // by pair, then "before" and "after"
	asked  map[string][]string                        // providers by pair
}

func startRecorder(tb testing.TB) (r *recorder, path string) {
	tb.Helper()
	r = &recorder{checks: map[string]map[string]*authv3.CheckRequest{}, asked: map[string][]string{}}
	l, path := unixSocket(tb)
	s := grpc.NewServer()
	authv3.RegisterAuthorizationServer(s, r)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	tb.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			tb.Errorf("the recorder: %v", err)
		}
	})
	return r, path
}

// Check is OK for the recorder. A provider says no where the request has the
// header x-provider: no.
func (r *recorder) Check(ctx context.Context, c *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	who := strings.Join(md.Get(":authority"), "")
	pair, verdict := "", ""
	if h := c.GetAttributes().GetRequest().GetHttp(); h == nil {
		a := c.GetAttributes().GetSource().GetAddress().GetSocketAddress()
		pair = connectionKey(a.GetPortValue())
	} else {
		pair, verdict = h.GetHeaders()["x-pair"], h.GetHeaders()["x-provider"]
		for _, hv := range h.GetHeaderMap().GetHeaders() {
			if hv.GetKey() == "x-pair" {
				pair = string(hv.GetRawValue())
			}
		}
	}
	provider, isProvider := strings.CutSuffix(who, ".providers.svc.cluster.local")
	r.mu.Lock()
	defer r.mu.Unlock()
	if isProvider {
		r.asked[pair] = append(r.asked[pair], provider)
		if verdict == "no" {
			return &authv3.CheckResponse{Status: &status.Status{Code: int32(codes.PermissionDenied)}}, nil
		}
	} else {
		if r.checks[pair] == nil {
			r.checks[pair] = map[string]*authv3.CheckRequest{}
		}
		r.checks[pair][who] = c
	}
	return &authv3.CheckResponse{}, nil
}

// of is what was recorded of a pair: the CheckRequests before everything and after
// the token was verified, nil if it did not get there, and who was asked.
func (r *recorder) of(pair string) (before, after *authv3.CheckRequest, asked []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.checks[pair]["before"], r.checks[pair]["after"], r.asked[pair]
}

// newCheck is the CheckRequest of a plaintext connection, where the proxy sends
// none because it ended the connection.
func newCheck(s shot) *authv3.CheckRequest {
	address := func(ip string, port uint32) *authv3.AttributeContext_Peer {
		return &authv3.AttributeContext_Peer{Address: &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
			Address: ip, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port},
		}}}}
	}
	check := &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
		Source: address(s.source, 40000), Destination: address(s.dst.Addr().String(), uint32(s.dst.Port())),
	}}
	if s.method == "" { // a bare connection
		return check
	}
	h := &authv3.AttributeContext_HttpRequest{Method: s.method, Path: s.path, Host: s.authority, HeaderMap: &corev3.HeaderMap{}}
	for _, hv := range append([][2]string{{":method", s.method}, {":path", s.path}, {":authority", s.authority}}, s.headers...) {
		h.HeaderMap.Headers = append(h.HeaderMap.Headers, &corev3.HeaderValue{Key: strings.ToLower(hv[0]), RawValue: []byte(hv[1])})
	}
	check.Attributes.Request = &authv3.AttributeContext_Request{Http: h}
	return check
}
