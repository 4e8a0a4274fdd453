package provider_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"golang.org/x/net/http2"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/extauthz"
	"github.com/signet-mesh/signet/authz/provider"
)

var (
	okStatus = &statuspb.Status{}
	okAnswer = &authv3.CheckResponse{Status: okStatus, HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{
		Headers: []*corev3.HeaderValueOption{{Header: &corev3.HeaderValue{Key: "x-checked", Value: "yes"}}}, HeadersToRemove: []string{"x-secret"}}}}
	deniedResponse = &authv3.CheckResponse_DeniedResponse{DeniedResponse: &authv3.DeniedHttpResponse{Status: &typev3.HttpStatus{Code: 402},
		Body: "pay first", Headers: []*corev3.HeaderValueOption{{Header: &corev3.HeaderValue{Key: "x-price", Value: "1"}}}}}
	deniedAnswer = &authv3.CheckResponse{Status: &statuspb.Status{Code: int32(codes.PermissionDenied)}, HttpResponse: deniedResponse}
)

func grpcSpec(a provider.Address) provider.Spec {
	return provider.Spec{GRPC: &provider.GRPC{Address: a}}
}

// TestGRPCProviderInOrder holds Istio's order: CUSTOM, then DENY, then ALLOW.
func TestGRPCProviderInOrder(t *testing.T) {
	t.Parallel()
	var got []byte
	says := okAnswer
	a := serve(t, func(_ context.Context, m []byte) ([]byte, error) {
		got = m
		return proto.Marshal(says)
	})
	w := newWorld(t, grpcSpec(a))
	r := request("/ask")
	want, err := proto.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if a := w.check(r); !w.last.Allowed || a.GetOkResponse().GetHeaders()[0].GetHeader().GetKey() != "x-checked" || a.GetOkResponse().GetHeadersToRemove()[0] != "x-secret" {
		t.Errorf("answer %v; want allowed, with the provider's changes", a)
	}
	sent, received := &authv3.CheckRequest{}, &authv3.CheckRequest{}
	if proto.Unmarshal(got, received) != nil || proto.Unmarshal(want, sent) != nil || !proto.Equal(sent, received) || len(got) != len(want) {
		t.Errorf("the provider got %v", received)
	}
	// CUSTOM allows, DENY denies; and the provider's changes are not told.
	if a := w.closed(request("/ask/denied"), authz.ReasonDenyRule); len(w.last.asked) != 1 || strings.Contains(a.String(), "x-checked") {
		t.Errorf("asked %v; answer %v", w.last.asked, a)
	}
	// DENY alone asks nobody.
	if w.closed(request("/denied"), authz.ReasonDenyRule); len(w.last.asked) != 0 {
		t.Errorf("asked %v", w.last.asked)
	}
	if w.closed(request("/closed"), authz.ReasonNoAllowRule); len(w.last.asked) != 0 {
		t.Errorf("asked %v", w.last.asked)
	}
	// CUSTOM denies what ALLOW allows, and before DENY; with its own words.
	says = deniedAnswer
	for _, path := range []string{"/ask", "/ask/denied"} {
		a := w.closed(request(path), extauthz.ReasonProviderDenied)
		if d := a.GetDeniedResponse(); d.GetStatus().GetCode() != 402 || d.GetBody() != "pay first" || d.GetHeaders()[0].GetHeader().GetKey() != "x-price" {
			t.Errorf("answer %v", a)
		}
		if w.last.Policy != "default/ask" || w.last.Rule != 0 {
			t.Errorf("decided by %s %d", w.last.Policy, w.last.Rule)
		}
	}
	// A rule of CUSTOM without its paths is about every connection.
	w.closed(connection(), extauthz.ReasonProviderDenied)
	says = okAnswer
	if w.check(connection()); w.last.Allowed {
		t.Error("DENY without its paths is about every connection too, and it is allowed")
	}
	if err := testutil.GatherAndCompare(w.reg, strings.NewReader(`
# HELP signet_provider_requests_total Requests to extension providers, by provider and outcome (allow, deny, timeout, busy, error). All but allow deny.
# TYPE signet_provider_requests_total counter
signet_provider_requests_total{outcome="allow",provider="them"} 3
signet_provider_requests_total{outcome="deny",provider="them"} 3
`), "signet_provider_requests_total"); err != nil {
		t.Error(err)
	}
}

// TestGRPCProviderThatLies closes whatever is not a whole answer in time.
func TestGRPCProviderThatLies(t *testing.T) {
	t.Parallel()
	huge := proto.Clone(okAnswer).(*authv3.CheckResponse)
	huge.GetOkResponse().Headers[0].Header.Value = strings.Repeat("x", 1<<20)
	marshal := func(r *authv3.CheckResponse) []byte {
		b, err := proto.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	fixed := func(b []byte, err error) func(t *testing.T) provider.Address {
		return func(t *testing.T) provider.Address {
			return serve(t, func(context.Context, []byte) ([]byte, error) { return b, err })
		}
	}
	for _, tt := range []struct {
		name string
		at   func(t *testing.T) provider.Address
		err  string
	}{
		{"says nothing in time", func(t *testing.T) provider.Address {
			// Not until its own context ends, which may be before the client's does.
			a := serve(t, func(context.Context, []byte) ([]byte, error) { <-t.Context().Done(); return marshal(okAnswer), nil })
			a.Timeout = 50 * time.Millisecond
			return a
		}, "did not answer in time"},
		{"takes connections and says nothing", func(t *testing.T) provider.Address {
			a := accept(t, func(c net.Conn) { io.Copy(io.Discard, c) })
			a.Timeout = 50 * time.Millisecond
			return a
		}, "did not answer in time"},
		{"is dead", func(t *testing.T) provider.Address { return at(t, nobody(t)) }, "refused"},
		{"has no address", func(t *testing.T) provider.Address {
			return provider.Address{Service: "nobody.invalid", Port: 1, Timeout: 5 * time.Second}
		}, ""},
		{"closes at once", func(t *testing.T) provider.Address { return accept(t, func(net.Conn) {}) }, "Unavailable"},
		{"closes after the request", func(t *testing.T) provider.Address {
			return accept(t, func(c net.Conn) { brokenHTTP2(c, nil) })
		}, "Unavailable"},
		{"closes in the middle of an allowing answer", func(t *testing.T) provider.Address {
			return accept(t, func(c net.Conn) {
				m := marshal(okAnswer)
				brokenHTTP2(c, append([]byte{0, 0, 0, 0, byte(len(m))}, m...))
			})
		}, "Unavailable"},
		{"speaks garbage", func(t *testing.T) provider.Address {
			return accept(t, func(c net.Conn) { c.Write(bytes.Repeat([]byte("garbage\x00\xff"), 1000)) })
		}, "Unavailable"},
		{"speaks HTTP/1", func(t *testing.T) provider.Address {
			return accept(t, func(c net.Conn) { io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") })
		}, "Unavailable"},
		{"answers bytes that are no message", fixed([]byte{0xff, 0xff, 0xff}, nil), "Internal"},
		{"answers text that is no UTF-8", fixed(bytes.Replace(marshal(okAnswer), []byte("x-checked"), []byte("x-check\xff\xfe"), 1), nil), "Internal"},
		{"answers too much", fixed(marshal(huge), nil), "ResourceExhausted"},
		{"answers nothing", fixed(nil, nil), "empty"},
		{"answers metadata only", fixed(marshal(&authv3.CheckResponse{DynamicMetadata: nil, HttpResponse: nil}), nil), "empty"},
		{"allows with the body of a denial", fixed(marshal(&authv3.CheckResponse{Status: okStatus, HttpResponse: deniedResponse}), nil), "it allows, with the answer to a denial"},
		{"reports an error beside OK", fixed(marshal(&authv3.CheckResponse{Status: okStatus, HttpResponse: &authv3.CheckResponse_ErrorResponse{ErrorResponse: &authv3.DeniedHttpResponse{}}}), nil), "an error of its own"},
		{"allows with a status that says nothing", fixed(marshal(&authv3.CheckResponse{Status: &statuspb.Status{Code: 2}, HttpResponse: okAnswer.HttpResponse}), nil), "neither allows nor denies"},
		{"allows with a status that is none", fixed(marshal(&authv3.CheckResponse{Status: &statuspb.Status{Code: -1}, HttpResponse: okAnswer.HttpResponse}), nil), "neither allows nor denies"},
		{"fails as RPC", fixed(marshal(okAnswer), status.Error(codes.PermissionDenied, "no\nsuch \x1b[31mthing")), `PermissionDenied: "no\nsuch \x1b[31mthing"`},
		{"succeeds without an answer", func(t *testing.T) provider.Address {
			l := listen(t)
			s := grpc.NewServer(grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error { return nil }))
			go s.Serve(l)
			t.Cleanup(s.Stop)
			return at(t, l.Addr())
		}, "Internal"},
		{"answers twice", func(t *testing.T) provider.Address {
			l := listen(t)
			s := grpc.NewServer(grpc.ForceServerCodec(bytesCodec{}), grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
				b := marshal(okAnswer)
				stream.SendMsg(&b)
				return stream.SendMsg(&b)
			}))
			go s.Serve(l)
			t.Cleanup(s.Stop)
			return at(t, l.Addr())
		}, "Internal"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, grpcSpec(tt.at(t)))
			for range 2 {
				a := w.closed(request("/ask"), extauthz.ReasonProviderFailed)
				if d := a.GetDeniedResponse(); d.GetStatus().GetCode() != 403 || d.GetBody() != "RBAC: access denied" {
					t.Errorf("answer %v", a)
				}
				if w.last.err == nil || !strings.Contains(w.last.err.Error(), tt.err) {
					t.Errorf("error %v; want %q", w.last.err, tt.err)
				}
			}
			// What asks nobody goes on.
			if w.check(request("/other")); !w.last.Allowed {
				t.Errorf("decided %+v", w.last)
			}
			w.closed(request("/denied"), authz.ReasonDenyRule)
		})
	}
}

// brokenHTTP2 speaks HTTP/2 until a request has come, answers with headers and data,
// and closes the connection without an end of the stream.
func brokenHTTP2(c net.Conn, data []byte) {
	if _, err := io.ReadFull(c, make([]byte, len(http2.ClientPreface))); err != nil {
		return
	}
	f := http2.NewFramer(c, c)
	f.WriteSettings()
	for {
		fr, err := f.ReadFrame()
		if err != nil {
			return
		}
		switch fr := fr.(type) {
		case *http2.SettingsFrame:
			if !fr.IsAck() {
				f.WriteSettingsAck()
			}
		case *http2.DataFrame:
			if data != nil {
				// :status 200, and content-type application/grpc as a literal.
				block := append([]byte{0x88, 0x0f, 0x10, 16}, "application/grpc"...)
				f.WriteHeaders(http2.HeadersFrameParam{StreamID: fr.StreamID, BlockFragment: block, EndHeaders: true})
				f.WriteData(fr.StreamID, false, data)
			}
			return
		}
	}
}

// TestGRPCDenialsAreMadeSendable passes on no status that a proxy cannot send.
func TestGRPCDenialsAreMadeSendable(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ code, want int32 }{{0, 403}, {100, 403}, {799, 403}, {200, 200}, {302, 302}} {
		w := newWorld(t, grpcSpec(answers(t, &authv3.CheckResponse{Status: &statuspb.Status{Code: 16},
			HttpResponse: &authv3.CheckResponse_DeniedResponse{DeniedResponse: &authv3.DeniedHttpResponse{Status: &typev3.HttpStatus{Code: typev3.StatusCode(tt.code)}}}})))
		if a := w.closed(request("/ask"), extauthz.ReasonProviderDenied); int32(a.GetDeniedResponse().GetStatus().GetCode()) != tt.want || a.GetStatus().GetCode() != 16 {
			t.Errorf("%d: answer %v", tt.code, a)
		}
	}
	// Without an answer for the client it is the usual one.
	w := newWorld(t, grpcSpec(answers(t, &authv3.CheckResponse{Status: &statuspb.Status{Code: 7}, HttpResponse: okAnswer.HttpResponse})))
	if a := w.closed(request("/ask"), extauthz.ReasonProviderDenied); a.GetDeniedResponse().GetStatus().GetCode() != 403 {
		t.Errorf("answer %v", a)
	}
}

// TestProviderComesBack: a provider that was away is asked again when it is back.
func TestProviderComesBack(t *testing.T) {
	t.Parallel()
	addr := nobody(t)
	w := newWorld(t, grpcSpec(at(t, addr)))
	w.closed(request("/ask"), extauthz.ReasonProviderFailed)
	again, err := net.Listen("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.ForceServerCodec(bytesCodec{}), grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		b, err := proto.Marshal(okAnswer)
		if err != nil {
			return err
		}
		return stream.SendMsg(&b)
	}))
	go s.Serve(again)
	t.Cleanup(s.Stop)
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if w.check(request("/ask")); w.last.Allowed {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("still %+v", w.last)
		}
	}
}

// TestRequestsInFlightAreBounded: one more than the provider may have is denied at
// once, and the slots are free again afterwards.
func TestRequestsInFlightAreBounded(t *testing.T) {
	t.Parallel()
	arrived, release := make(chan struct{}), make(chan struct{})
	a := serve(t, func(context.Context, []byte) ([]byte, error) {
		arrived <- struct{}{}
		<-release
		return proto.Marshal(okAnswer)
	})
	a.MaxInFlight, a.Timeout = 2, 20*time.Second
	w := newWorld(t, grpcSpec(a))
	message, err := proto.Marshal(request("/ask"))
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for range 2 {
		all.Go(func() {
			if says, err := w.p.Ask(t.Context(), "them", message); err != nil || !says.Allowed {
				t.Errorf("%+v, %v", says, err)
			}
		})
	}
	<-arrived
	<-arrived
	if says, err := w.p.Ask(t.Context(), "them", message); err == nil || !strings.Contains(err.Error(), "maxInFlight") || says.Allowed {
		t.Errorf("%+v, %v; want busy", says, err)
	}
	close(release)
	all.Wait()
	go func() { <-arrived }()
	if says, err := w.p.Ask(t.Context(), "them", message); err != nil || !says.Allowed {
		t.Errorf("%+v, %v", says, err)
	}
	// A caller that has gone is not waited for.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if says, err := w.p.Ask(ctx, "them", message); err == nil || says.Allowed {
		t.Errorf("%+v, %v", says, err)
	}
}

// TestUnknownProvider denies, with a reason and a metric of its own.
func TestUnknownProvider(t *testing.T) {
	t.Parallel()
	w := newWorld(t, grpcSpec(answers(t, okAnswer)))
	p, err := provider.New(provider.Config{})
	if err != nil {
		t.Fatal(err)
	}
	if says, err := p.Ask(t.Context(), "them", nil); err != extauthz.ErrUnknownProvider || says.Allowed {
		t.Errorf("%+v, %v", says, err)
	}
	if !w.p.Has("them") || w.p.Has("others") {
		t.Error("Has")
	}
	if says, err := w.p.Ask(t.Context(), "others", nil); err != extauthz.ErrUnknownProvider || says.Allowed {
		t.Errorf("%+v, %v", says, err)
	}
	if n := testutil.CollectAndCount(w.reg, "signet_provider_unknown_total"); n != 1 {
		t.Errorf("%d series", n)
	}
}

// TestProviderOverTLS verifies the provider, and proves the agent where that is
// configured.
func TestProviderOverTLS(t *testing.T) {
	t.Parallel()
	caFile, certFile, keyFile := certificates(t)
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	pem, err := os.ReadFile(caFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	creds := credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: roots, ClientAuth: tls.RequireAndVerifyClientCert})
	b, err := proto.Marshal(okAnswer)
	if err != nil {
		t.Fatal(err)
	}
	a := serve(t, func(context.Context, []byte) ([]byte, error) { return b, nil }, grpc.Creds(creds))
	for _, tt := range []struct {
		name    string
		tls     *provider.TLS
		allowed bool
	}{
		{"both are verified", &provider.TLS{CAFile: caFile, CertFile: certFile, KeyFile: keyFile}, true},
		{"by another name", &provider.TLS{CAFile: caFile, CertFile: certFile, KeyFile: keyFile, ServerName: "them.example"}, true},
		{"by a wrong name", &provider.TLS{CAFile: caFile, CertFile: certFile, KeyFile: keyFile, ServerName: "others.example"}, false},
		{"without the root", &provider.TLS{CertFile: certFile, KeyFile: keyFile}, false},
		{"without a certificate of the client", &provider.TLS{CAFile: caFile}, false},
		{"in plaintext", nil, false},
	} {
		a.TLS = tt.tls
		w := newWorld(t, grpcSpec(a))
		if w.check(request("/ask")); w.last.Allowed != tt.allowed || !tt.allowed && w.last.Reason != extauthz.ReasonProviderFailed {
			t.Errorf("%s: decided %+v", tt.name, w.last)
		}
	}
}
