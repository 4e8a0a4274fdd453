package sds_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/sds"
)

var errProof = errors.New("proof expires in the test")

// world is a Source with resources that a test sets, the same for all callers
// unless given to one.
type world struct {
	mu      sync.Mutex
	rs      map[string]sds.Resource            // by name
	only    map[string]map[string]sds.Resource // by pod UID, by name
	wild    []string                           // what the wildcard gives
	extra   []sds.Resource                     // sent without being asked for
	err     error
	changed chan struct{}
	calls   []context.Context // of each call
}

func newWorld() *world {
	return &world{rs: map[string]sds.Resource{}, only: map[string]map[string]sds.Resource{},
		wild: []string{"default", "ROOTCA"}, changed: make(chan struct{})}
}

func (w *world) Resources(ctx context.Context, caller identity.Workload, typeURL string, names []string) (rs []sds.Resource, changed <-chan struct{}, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.calls = append(w.calls, ctx)
	if typeURL != sds.SecretType {
		return nil, nil, fmt.Errorf("asked for type %q", typeURL)
	}
	if slices.Contains(names, sds.Wildcard) {
		names = append(slices.Clone(names), w.wild...)
	}
	for _, n := range names {
		if r, ok := w.rs[n]; ok {
			rs = append(rs, r)
		} else if r, ok := w.only[caller.PodUID][n]; ok {
			rs = append(rs, r)
		}
	}
	return append(rs, w.extra...), w.changed, w.err
}

// update changes the world as f says and tells those who wait.
func (w *world) update(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
	close(w.changed)
	w.changed = make(chan struct{})
}

func (w *world) set(name, content string, sequence uint64) {
	w.update(func() { w.rs[name] = resource(name, content, sequence) })
}

// resource is a secret whose content a test reads back with read.
func resource(name, content string, sequence uint64) sds.Resource {
	b, err := proto.Marshal(&tlsv3.Secret{Name: name, Type: &tlsv3.Secret_GenericSecret{GenericSecret: &tlsv3.GenericSecret{
		Secret: &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: content}}}}})
	if err != nil {
		panic(err)
	}
	return sds.Resource{Name: name, Version: content, Body: &anypb.Any{TypeUrl: sds.SecretType, Value: b}, TrustSequence: sequence}
}

// read is name=content of a secret made by resource.
func read(t testing.TB, a *anypb.Any) string {
	t.Helper()
	s := unpack(t, a)
	return s.GetName() + "=" + s.GetGenericSecret().GetSecret().GetInlineString()
}

func unpack(t testing.TB, a *anypb.Any) *tlsv3.Secret {
	t.Helper()
	var s tlsv3.Secret
	if err := a.UnmarshalTo(&s); err != nil {
		t.Fatalf("unpacking a secret: %v", err)
	}
	return &s
}

// node is a server with callers in front of a source: metadata "pod: UID" proves
// the pod with that UID, whose service account is its UID too.
type node struct {
	server  *sds.Server
	conn    *grpc.ClientConn
	metrics *prometheus.Registry
	log     *lines

	mu    sync.Mutex
	kill  map[string][]context.CancelCauseFunc // ends the streams of a pod
	ended chan error                           // what each stream's handler returned
}

func workload(uid string) identity.Workload {
	return identity.Workload{Namespace: "shop", ServiceAccount: uid, Pod: uid + "-0", PodUID: uid, Node: "node-a"}
}

func startNode(t testing.TB, source sds.Source, opts ...grpc.DialOption) *node {
	t.Helper()
	n := &node{metrics: prometheus.NewRegistry(), log: &lines{}, kill: map[string][]context.CancelCauseFunc{}, ended: make(chan error, 4096)}
	var err error
	n.server, err = sds.New(sds.Config{Source: source, Metrics: n.metrics, Log: slog.New(slog.NewTextHandler(n.log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(grpc.StreamInterceptor(n.stream), grpc.UnaryInterceptor(n.unary))
	n.server.Register(g)
	l := bufconn.Listen(64 << 10)
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	opts = append([]grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) })}, opts...)
	n.conn, err = grpc.NewClient("passthrough:///agent", opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		n.conn.Close()
		g.Stop()
		if err := <-served; err != nil {
			t.Errorf("serving: %v", err)
		}
	})
	return n
}

func (n *node) client() secretv3.SecretDiscoveryServiceClient {
	return secretv3.NewSecretDiscoveryServiceClient(n.conn)
}

func (n *node) prove(ctx context.Context) (context.Context, string) {
	md, _ := metadata.FromIncomingContext(ctx)
	if pod := md.Get("pod"); len(pod) == 1 {
		return identity.WithCaller(ctx, identity.Caller{Workload: workload(pod[0]), Token: "token-of-" + pod[0]}), pod[0]
	}
	return ctx, ""
}

func (n *node) unary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
	ctx, _ = n.prove(ctx)
	return h(ctx, req)
}

func (n *node) stream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
	ctx, pod := n.prove(ss.Context())
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	n.mu.Lock()
	n.kill[pod] = append(n.kill[pod], cancel)
	n.mu.Unlock()
	err := h(srv, bound{ss, ctx})
	select {
	case n.ended <- err:
	default: // more streams than any test looks at
	}
	return err
}

// expire does what the agent's gate does when the proof of a pod ends.
func (n *node) expire(pod string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, cancel := range n.kill[pod] {
		cancel(errProof)
	}
}

type bound struct {
	grpc.ServerStream
	ctx context.Context
}

func (b bound) Context() context.Context { return b.ctx }

func as(ctx context.Context, pod string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "pod", pod)
}

// metric is the sum of a metric over its labels.
func (n *node) metric(t testing.TB, name string) (sum float64) {
	t.Helper()
	fs, err := n.metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range fs {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return sum
}

// lines is a log that a test reads.
type lines struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func sorted[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
