package oracle_test

import (
	"context"
	"crypto/sha256"
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/extauthz"
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
	s := grpc.NewServer(grpc.ForceServerCodecV2(heldCodec{encoding.GetCodecV2("proto"), tb}))
	authv3.RegisterAuthorizationServer(s, r)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	tb.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			tb.Errorf("the recorder: %v", err)
		}
		tb.Logf("note: %d CheckRequests of real Envoys scanned as the generated decoder reads them", held.Swap(0))
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

var keepChecks = flag.String("keep-checks", "", "write a CheckRequest of each form that proxies send into this `folder`, as seeds for package extauthz")

// heldCodec holds each CheckRequest of a proxy, byte by byte as it came, against
// both ways in which package extauthz reads one.
type heldCodec struct {
	encoding.CodecV2
	tb testing.TB
}

var held, forms atomic.Int64

func (c heldCodec) Unmarshal(data mem.BufferSlice, v any) error {
	if err := c.CodecV2.Unmarshal(data, v); err != nil {
		return err
	}
	check, ok := v.(*authv3.CheckRequest)
	if !ok {
		return nil
	}
	held.Add(1)
	b := data.Materialize()
	var scanned, read authz.Request
	got, want := extauthz.FromBytes(b, authz.FieldsHTTP, &scanned), extauthz.FromCheckRequest(check, &read)
	if fmt.Sprint(got) != fmt.Sprint(want) {
		c.tb.Errorf("%x\nscanned: %v\nread: %v", b, got, want)
	} else if want != nil || same(read, scanned) {
		return c.keep(b)
	} else if d := cmp.Diff(read, scanned, cmpopts.EquateComparable(netip.Addr{}), protocmp.Transform(), cmpopts.EquateEmpty(), cmpopts.SortSlices(func(a, b authz.Header) int {
		return strings.Compare(a.Name, b.Name)
	})); d != "" {
		c.tb.Errorf("%x: read and scanned: %s", b, d)
	}
	return c.keep(b)
}

// same is a quick look that finds most equal requests equal; a diff of each would take
// longer than the proxies.
func same(a, b authz.Request) bool {
	if !proto.Equal(a.Claims, b.Claims) || !maps.EqualFunc(a.Metadata, b.Metadata, func(a, b *structpb.Struct) bool { return proto.Equal(a, b) }) {
		return false
	}
	for _, r := range []*authz.Request{&a, &b} {
		r.Claims, r.Metadata = nil, nil
		r.Headers = slices.SortedStableFunc(slices.Values(r.Headers), func(a, b authz.Header) int { return strings.Compare(a.Name, b.Name) })
	}
	return reflect.DeepEqual(a, b)
}

// keep writes a message whose fields no kept one has.
func (c heldCodec) keep(b []byte) error {
	if *keepChecks == "" {
		return nil
	}
	var form func(b []byte, depth int) string
	form = func(b []byte, depth int) (s string) {
		for len(b) > 0 {
			n, typ, size := protowire.ConsumeTag(b)
			if size < 0 {
				return "?"
			}
			b = b[size:]
			v, size := protowire.ConsumeBytes(b)
			if typ != protowire.BytesType {
				size = protowire.ConsumeFieldValue(n, typ, b)
			}
			if size < 0 {
				return "?"
			}
			s, b = s+fmt.Sprint(n), b[size:]
			if typ == protowire.BytesType && depth > 0 {
				s += "(" + form(v, depth-1) + ")"
			}
		}
		return s
	}
	sum := sha256.Sum256([]byte(form(b, 3)))
	path := filepath.Join(*keepChecks, fmt.Sprintf("%x.pb", sum[:6]))
	if _, err := os.Stat(path); err == nil || forms.Load() >= 60 {
		return nil
	}
	forms.Add(1)
	return os.WriteFile(path, b, 0o644)
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
