package attest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"github.com/signet-mesh/signet/identity"
)

// DefaultMargin is how long before its proof a stream ends.
const DefaultMargin = 5 * time.Second

// GateConfig says how a [Gate] works.
type GateConfig struct {
	// Attestor verifies the tokens. Required.
	Attestor *Attestor
	// Pods is the view that streams are held against; the Attestor's. Required.
	Pods *identity.Pods
	// Open are the methods that need no proof, such as
	// /grpc.health.v1.Health/Check. Their context has no caller.
	Open []string
	// Margin is how long before its proof a stream ends, but at most a tenth of
	// what the proof had left when the stream began. Zero means DefaultMargin.
	Margin time.Duration
	// Log is told of refused RPCs, at most ten a second.
	Log *slog.Logger
	// Metrics, if not nil, gets signet_attest_streams and
	// signet_attest_streams_ended_total.
	Metrics prometheus.Registerer
}

// Gate lets only proven callers through to the handlers of a gRPC server. Its
// methods Unary and Stream are the interceptors, Tap goes before them.
//
// A server without TLS is best made with [Credentials], which make a known token cheap.
//
// The proof is the token in the RPC's metadata, under authorization: exactly one
// value, with or without "Bearer ". It belongs to the RPC, never to the connection,
// which a proxy may share. Without a good one the RPC fails with Unauthenticated,
// also if the pod is not in the view yet: a proxy comes back in any case, with a
// backoff of its own. Unavailable means that tokens cannot be checked at the moment.
// Handlers find the caller with [identity.CallerFrom].
//
// A stream ends before its proof: its context ends with the cause
// ErrProofExpires a little before the token expires, and with ErrPodGone as soon
// as the view loses the pod or says something else of it. From then on nothing can
// be sent or received on it, and its status is Unavailable (come back with a fresh
// token; Envoy does so without a warning) or Unauthenticated, whatever the handler
// returns. The handler must return when its context ends, also out of a Recv in
// another goroutine. Labels and addresses may change while a stream lives; the caller
// in its context has those of its beginning. While tokens cannot be replaced
// ([Config.Outage]) a stream goes on, and is looked at again every minute.
type Gate struct {
	cfg     GateConfig
	log     *slog.Logger
	open    map[string]struct{}
	metrics *gateMetrics
	streams streams
	limit   limiter
}

// NewGate checks cfg and makes a Gate.
func NewGate(cfg GateConfig) (*Gate, error) {
	if cfg.Attestor == nil || cfg.Pods == nil {
		return nil, errors.New("setting up the gate: an attestor and its view of the pods are required")
	}
	if cfg.Margin < 0 {
		return nil, fmt.Errorf("setting up the gate: margin is %s; it must be positive", cfg.Margin)
	}
	if cfg.Margin == 0 {
		cfg.Margin = DefaultMargin
	}
	g := &Gate{cfg: cfg, log: cfg.Log, open: make(map[string]struct{}, len(cfg.Open)), streams: streams{pods: cfg.Pods}}
	if g.log == nil {
		g.log = slog.New(slog.DiscardHandler)
	}
	for _, m := range cfg.Open {
		if !strings.HasPrefix(m, "/") || strings.Count(m, "/") != 2 || strings.HasSuffix(m, "/") {
			return nil, fmt.Errorf("setting up the gate: %q is not a method; write /package.Service/Method", m)
		}
		g.open[m] = struct{}{}
	}
	var err error
	if g.metrics, err = newGateMetrics(cfg.Metrics); err != nil {
		return nil, fmt.Errorf("setting up the gate: %w", err)
	}
	return g, nil
}

// Tap is a tap.ServerInHandle (grpc.InTapHandle): it refuses an RPC without a good
// proof on its headers, before any message is read, so that callers who prove
// nothing cannot make the server hold their messages. It only keeps out: Unary and
// Stream verify again, since a message may be slow to come.
func (g *Gate) Tap(ctx context.Context, info *tap.Info) (context.Context, error) {
	if _, ok := g.open[info.FullMethodName]; ok {
		return ctx, nil
	}
	if _, err := g.caller(ctx, info.Header["authorization"]); err != nil {
		return ctx, g.refuse(ctx, info.FullMethodName, err)
	}
	return ctx, nil
}

// Unary is a grpc.UnaryServerInterceptor. The context of the call ends, with the
// cause ErrProofExpires, when the proof does.
func (g *Gate) Unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if _, ok := g.open[info.FullMethod]; ok {
		return handler(ctx, req)
	}
	caller, err := g.caller(ctx, metadata.ValueFromIncomingContext(ctx, "authorization"))
	if err != nil {
		return nil, g.refuse(ctx, info.FullMethod, err)
	}
	// Most calls carry a deadline that is nearer, and need no timer.
	if d, ok := ctx.Deadline(); !ok || d.After(caller.Until) {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadlineCause(ctx, caller.Until, ErrProofExpires)
		defer cancel()
	}
	return handler(identity.WithCaller(ctx, caller), req)
}

// Stream is a grpc.StreamServerInterceptor.
func (g *Gate) Stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if _, ok := g.open[info.FullMethod]; ok {
		return handler(srv, ss)
	}
	caller, err := g.caller(ss.Context(), metadata.ValueFromIncomingContext(ss.Context(), "authorization"))
	if err != nil {
		return g.refuse(ss.Context(), info.FullMethod, err)
	}
	ctx, cancel := context.WithCancelCause(identity.WithCaller(ss.Context(), caller))
	defer cancel(nil)
	leave := g.streams.add(caller.Workload, cancel)
	defer leave()
	g.metrics.open.Inc()
	defer g.metrics.open.Dec()
	proven := &provenStream{ServerStream: ss, ctx: ctx}
	stop := g.endInTime(proven, caller, cancel)
	defer stop()

	err = handler(srv, proven)
	if cause := proofEnd(ctx); cause != nil {
		g.metrics.ended(cause)
		return endStatus(cause)
	}
	return err
}

// endInTime cancels a stream a little before its proof ends, or, where the proof can
// be held on to, looks again then. stop must be called when the stream has ended.
func (g *Gate) endInTime(s *provenStream, caller identity.Caller, cancel context.CancelCauseFunc) (stop func()) {
	s.until.Store(&caller.Until)
	before := func(until time.Time) time.Duration {
		left := time.Until(until)
		return left - min(g.cfg.Margin, left/10)
	}
	ready := make(chan struct{})
	var timer *time.Timer
	timer = time.AfterFunc(before(caller.Until), func() {
		<-ready
		if s.ctx.Err() != nil {
			return
		}
		until, err := g.cfg.Attestor.hold(s.ctx, caller.Token)
		if err != nil {
			cancel(ErrProofExpires)
			return
		}
		s.until.Store(&until)
		timer.Reset(before(until))
	})
	close(ready)
	return func() { timer.Stop() }
}

// caller verifies the token in an RPC's metadata, of which values are those of
// authorization.
func (g *Gate) caller(ctx context.Context, values []string) (c identity.Caller, err error) {
	var token string
	switch {
	case len(values) == 1:
		token = trimScheme(values[0])
	case len(values) > 1:
		// Which one is meant would be a guess, and a proxy may have added one to
		// what its client sent.
		err := refuse(checkMalformed, "%d values of authorization; exactly one is accepted", len(values))
		g.cfg.Attestor.metrics.count(false, err)
		return c, err
	}
	w, until, err := g.cfg.Attestor.attestOn(ctx, connectionOf(ctx), token)
	if err != nil {
		return c, err
	}
	return identity.Caller{Workload: w, Until: until, Token: token}, nil
}

// trimScheme removes the authentication scheme, which is case-insensitive (RFC
// 9110 section 11.1), and the spaces after it (RFC 6750 section 2.1).
func trimScheme(v string) string {
	const scheme = "bearer "
	if len(v) >= len(scheme) && strings.EqualFold(v[:len(scheme)], scheme) {
		return strings.TrimLeft(v[len(scheme):], " ")
	}
	return v
}

// refuse logs why an RPC is refused and returns what its client may know.
func (g *Gate) refuse(ctx context.Context, method string, err error) error {
	if ok, suppressed := g.limit.allow(time.Now()); ok {
		g.log.WarnContext(ctx, "caller refused", "method", method, "suppressed", suppressed, "err", err)
	}
	if errors.Is(err, ErrUnavailable) {
		return status.Error(codes.Unavailable, Public(err))
	}
	return status.Error(codes.Unauthenticated, Public(err))
}

// proofEnd is why a Gate ended ctx, or nil.
func proofEnd(ctx context.Context) error {
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, ErrProofExpires), errors.Is(cause, ErrPodGone):
		return cause
	default:
		return nil
	}
}

func endStatus(cause error) error {
	if errors.Is(cause, ErrProofExpires) {
		return status.Error(codes.Unavailable, Public(cause))
	}
	return status.Error(codes.Unauthenticated, Public(cause))
}

// provenStream is a stream that carries nothing once its proof has ended. It holds
// a context because grpc.ServerStream is asked for one.
type provenStream struct {
	grpc.ServerStream
	ctx   context.Context
	until atomic.Pointer[time.Time]
}

func (s *provenStream) Context() context.Context { return s.ctx }

func (s *provenStream) SendMsg(m any) error {
	if err := s.ended(); err != nil {
		return err
	}
	return s.ServerStream.SendMsg(m)
}

func (s *provenStream) RecvMsg(m any) error {
	if err := s.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	return s.ended()
}

// ended looks at the clock too: the timer runs on the monotonic clock, which stands
// still while a machine sleeps and does not follow when the time is set.
func (s *provenStream) ended() error {
	if cause := proofEnd(s.ctx); cause != nil {
		return endStatus(cause)
	}
	if !time.Now().Before(*s.until.Load()) {
		return endStatus(ErrProofExpires)
	}
	return nil
}

// streams are the open streams by node. One goroutine for each node that has any
// holds them against the view, so that a change of one pod does not wake
// thousands of streams. The goroutine starts with the first stream of its node and
// has ended when leave of the last one returns.
type streams struct {
	pods *identity.Pods

	mu    sync.Mutex
	nodes map[string]*nodeStreams // guarded by mu
}

type nodeStreams struct {
	members map[*member]struct{} // guarded by streams.mu
	stop    chan struct{}        // closed by the last member
	done    chan struct{}        // closed when the goroutine ends
}

type member struct {
	w      identity.Workload
	cancel context.CancelCauseFunc
}

// add watches over a stream of w until leave is called.
func (s *streams) add(w identity.Workload, cancel context.CancelCauseFunc) (leave func()) {
	m := &member{w: w, cancel: cancel}
	s.mu.Lock()
	n := s.nodes[w.Node]
	if n == nil {
		n = &nodeStreams{members: map[*member]struct{}{}, stop: make(chan struct{}), done: make(chan struct{})}
		if s.nodes == nil {
			s.nodes = map[string]*nodeStreams{}
		}
		s.nodes[w.Node] = n
		go s.watch(w.Node, n)
	}
	n.members[m] = struct{}{}
	s.mu.Unlock()
	// What changed before m was added woke nobody for it.
	s.check(m)
	return func() {
		s.mu.Lock()
		delete(n.members, m)
		last := len(n.members) == 0
		if last {
			delete(s.nodes, w.Node)
			close(n.stop)
		}
		s.mu.Unlock()
		if last {
			<-n.done
		}
	}
}

func (s *streams) watch(node string, n *nodeStreams) {
	defer close(n.done)
	for {
		// The channel first, then the check: no change falls in between.
		_, changed := s.pods.OnNode(node)
		s.mu.Lock()
		for m := range n.members {
			s.check(m)
		}
		s.mu.Unlock()
		select {
		case <-changed:
		case <-n.stop:
			return
		}
	}
}

// check ends the stream of m if the view no longer has its pod as it was. Labels
// and addresses may change; who the pod is may not.
func (s *streams) check(m *member) {
	v, ok := s.pods.Lookup(m.w.PodUID)
	if !ok || v.Namespace != m.w.Namespace || v.ServiceAccount != m.w.ServiceAccount || v.Pod != m.w.Pod ||
		v.Node != m.w.Node || (v.NodeUID != "" && m.w.NodeUID != "" && v.NodeUID != m.w.NodeUID) {
		m.cancel(ErrPodGone)
	}
}

// limiter allows ten lines of log a second. Refusals come from a socket that
// everybody can reach, and a log that can be flooded hides what matters.
type limiter struct {
	mu         sync.Mutex
	second     int64
	count      int
	suppressed int
}

// allow reports whether one more line may be written now, and how many were not
// since the last one.
func (l *limiter) allow(now time.Time) (ok bool, suppressed int) {
	const perSecond = 10
	l.mu.Lock()
	defer l.mu.Unlock()
	if s := now.Unix(); s != l.second {
		l.second, l.count = s, 0
	}
	if l.count >= perSecond {
		l.suppressed++
		return false, 0
	}
	l.count++
	suppressed, l.suppressed = l.suppressed, 0
	return true, suppressed
}
