package attest_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"
)

// gated is a server behind a Gate. Ask and Open answer with the caller's pod,
// or "nobody"; Watch sends it and then waits for the end of its context; Deaf does
// not look at its context and echoes what it receives; Sink only counts it.
type gated struct {
	*world
	conn *grpc.ClientConn
	log  *bytes.Buffer
	reg  *prometheus.Registry

	mu     sync.Mutex
	heard  int             // messages that Sink received; guarded by mu
	ctx    context.Context // of the last unary call; guarded by mu
	causes []error         // why streams ended; guarded by mu
}

const service = "/test.Gated/"

func newGated(t *testing.T, change ...func(*attest.GateConfig)) *gated {
	t.Helper()
	g := &gated{world: newWorld(t), log: &bytes.Buffer{}, reg: prometheus.NewRegistry()}
	cfg := attest.GateConfig{
		Attestor: g.Attestor, Pods: g.pods, Open: []string{service + "Open", service + "OpenWatch"},
		Log: slog.New(slog.NewTextHandler(g.log, nil)), Metrics: g.reg,
	}
	for _, c := range change {
		c(&cfg)
	}
	gate, err := attest.NewGate(cfg)
	if err != nil {
		t.Fatal(err)
	}
	unary := func(srv any, ctx context.Context, decode func(any) error, intercept grpc.UnaryServerInterceptor) (any, error) {
		var in wrapperspb.StringValue
		if err := decode(&in); err != nil {
			return nil, err
		}
		return intercept(ctx, &in, &grpc.UnaryServerInfo{FullMethod: service + in.Value}, func(ctx context.Context, _ any) (any, error) {
			g.mu.Lock()
			g.ctx = ctx
			g.mu.Unlock()
			if in.Value == "Slow" {
				<-ctx.Done()
				return nil, status.FromContextError(context.Cause(ctx)).Err()
			}
			return wrapperspb.String(who(ctx)), nil
		})
	}
	watch := func(_ any, s grpc.ServerStream) error {
		if err := s.SendMsg(wrapperspb.String(who(s.Context()))); err != nil {
			return err
		}
		<-s.Context().Done()
		g.mu.Lock()
		g.causes = append(g.causes, context.Cause(s.Context()))
		g.mu.Unlock()
		if err := s.SendMsg(wrapperspb.String("too late")); err == nil {
			return errors.New("something was sent after the end")
		}
		return nil // OK, as a careless handler would have it
	}
	echo := func(_ any, s grpc.ServerStream) error {
		for {
			var m wrapperspb.StringValue
			if err := s.RecvMsg(&m); err != nil {
				return err
			}
			if err := s.SendMsg(&m); err != nil {
				return err
			}
		}
	}
	sink := func(_ any, s grpc.ServerStream) error {
		if err := s.SendMsg(wrapperspb.String(who(s.Context()))); err != nil {
			return err
		}
		for {
			if err := s.RecvMsg(&wrapperspb.StringValue{}); err != nil {
				return err
			}
			g.mu.Lock()
			g.heard++
			g.mu.Unlock()
		}
	}
	creds, err := attest.Credentials(attest.ConnectionsConfig{Metrics: g.reg})
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.Creds(creds), grpc.UnaryInterceptor(gate.Unary), grpc.StreamInterceptor(gate.Stream))
	server.RegisterService(&grpc.ServiceDesc{
		ServiceName: "test.Gated", HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{MethodName: "Ask", Handler: unary}, {MethodName: "Open", Handler: unary}, {MethodName: "Slow", Handler: unary}},
		Streams: []grpc.StreamDesc{
			{StreamName: "Watch", Handler: watch, ServerStreams: true, ClientStreams: true},
			{StreamName: "OpenWatch", Handler: watch, ServerStreams: true, ClientStreams: true},
			{StreamName: "Sink", Handler: sink, ServerStreams: true, ClientStreams: true},
			{StreamName: "Deaf", Handler: echo, ServerStreams: true, ClientStreams: true},
		},
	}, struct{}{})
	listener := bufconn.Listen(1 << 16)
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	g.conn, err = grpc.NewClient("passthrough:///gated", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.conn.Close(); err != nil {
			t.Error(err)
		}
		server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return g
}

func who(ctx context.Context) string {
	c, ok := identity.CallerFrom(ctx)
	if !ok {
		return "nobody"
	}
	if c.Token == "" || time.Until(c.Until) <= 0 || c.Workload.Labels["app"] != "server" {
		return fmt.Sprintf("a caller without proof: until %s, %v", c.Until, c.Workload)
	}
	return c.Workload.Pod
}

func bearing(ctx context.Context, values ...string) context.Context {
	for _, v := range values {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", v)
	}
	return ctx
}

func (g *gated) ask(ctx context.Context, method string) (string, error) {
	var out wrapperspb.StringValue
	err := g.conn.Invoke(ctx, service+method, wrapperspb.String(method), &out)
	return out.Value, err
}

// stream opens a stream and waits until it has said who the caller is.
func (g *gated) stream(t *testing.T, ctx context.Context, method string) (first string, s grpc.ClientStream, err error) {
	t.Helper()
	s, err = g.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, service+method)
	if err != nil {
		t.Fatal(err)
	}
	if method == "Deaf" {
		if err := s.SendMsg(wrapperspb.String("echo")); err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
	}
	first, err = recv(s)
	return first, s, err
}

func recv(s grpc.ClientStream) (string, error) {
	var m wrapperspb.StringValue
	err := s.RecvMsg(&m)
	return m.Value, err
}
