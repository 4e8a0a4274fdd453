package extauthz

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// Config is what [New] needs.
type Config struct {
	// Snapshot is the policies to decide by; it is called for each check and
	// must be safe for concurrent use. While it returns nil everything is denied.
	// It is required.
	Snapshot func() *authz.Snapshot
	// Tokens verifies tokens where the proxy did not; nil: a request that has one
	// where a RequestAuthentication looks for it is then denied.
	Tokens Tokens
	// Providers are asked where a CUSTOM policy matches; nil: such a request is
	// denied.
	Providers Providers
	// Records takes every answer that is given; nil: nobody does.
	Records Records
	// Denial is what clients of denied requests get, Denials what they get in
	// workloads of a namespace instead.
	Denial  Denial
	Denials map[string]Denial
	// Log gets a record for each denial, at level info; nil discards.
	Log *slog.Logger
	// Metrics is where metrics are registered; nil registers none.
	Metrics prometheus.Registerer
}

// Server answers checks. It is safe for concurrent use.
type Server struct {
	snapshot  func() *authz.Snapshot
	tokens    Tokens
	providers Providers
	records   Records
	log       *slog.Logger
	metrics   *metrics
	reader    reader
	denials   *denials
	checks    sync.Pool // of *check
	allowed   *answer
	// info and handler are what interceptors get.
	info    *grpc.UnaryServerInfo
	handler grpc.UnaryHandler
}

// New makes a Server.
func New(cfg Config) (*Server, error) {
	if cfg.Snapshot == nil {
		return nil, errors.New("making the ext_authz service: no source of policies is configured")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	ds, err := newDenials(cfg.Denial, cfg.Denials)
	if err != nil {
		return nil, fmt.Errorf("making the ext_authz service: %w", err)
	}
	m, err := newMetrics(cfg.Metrics)
	if err != nil {
		return nil, fmt.Errorf("registering metrics of the ext_authz service: %w", err)
	}
	s := &Server{
		snapshot: cfg.Snapshot, tokens: cfg.Tokens, providers: cfg.Providers, records: cfg.Records,
		log: cfg.Log, metrics: m, denials: ds, allowed: encode(allowed(&rewrite{}, nil)),
		reader: reader{
			peers:    &remembered[*peer]{most: maxPeers, longest: maxCertificate},
			metadata: &remembered[map[string]*structpb.Struct]{most: maxMetadata, longest: maxMetadataSize},
		},
	}
	s.checks.New = func() any { return new(check) }
	s.info = &grpc.UnaryServerInfo{Server: s, FullMethod: authv3.Authorization_Check_FullMethodName}
	s.handler = func(ctx context.Context, m any) (any, error) { return s.answer(ctx, m.(*message).bytes()) }
	return s, nil
}

// Register registers the service at a server that was made with [Codec]. The
// server's interceptors have to put the proven caller into the context of each RPC,
// as identity/attest.Gate does; they cannot see what is in its messages.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	r.RegisterService(&grpc.ServiceDesc{
		ServiceName: authv3.Authorization_ServiceDesc.ServiceName,
		HandlerType: (*any)(nil),
		Metadata:    authv3.Authorization_ServiceDesc.Metadata,
		Methods:     []grpc.MethodDesc{{MethodName: "Check", Handler: serve}},
	}, s)
}

// serve is the handler of the method Check.
func serve(srv any, ctx context.Context, decode func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
	s, m := srv.(*Server), new(message)
	defer m.free()
	if err := decode(m); err != nil {
		return nil, err
	}
	if interceptor == nil {
		return s.handler(ctx, m)
	}
	return interceptor(ctx, m, s.info, s.handler)
}

// Answer answers one check: a CheckRequest in bytes by a CheckResponse in bytes,
// which must not be changed. The caller is taken from ctx. Its only error is
// Unauthenticated, for a ctx without a proven caller.
func (s *Server) Answer(ctx context.Context, message []byte) (response []byte, err error) {
	a, err := s.answer(ctx, message)
	if err != nil {
		return nil, err
	}
	return a.bytes, nil
}

// check is one check while it is answered. It is used again.
type check struct {
	Record
	attributes
	request authz.Request
	asked   [2]string // behind Record.Asked
	// What is passed on to the proxy if the answer is the provider's, or allows.
	rewrite  rewrite
	verified Verified
	passed   []*authv3.CheckResponse
	denied   *authv3.CheckResponse
	// disowned says that the proxy's word about the token does not count any more.
	disowned bool
}

// reset makes c empty and keeps its space.
func (c *check) reset() {
	c.attributes.reset()
	c.Record = Record{}
	c.request = authz.Request{Headers: kept(c.request.Headers)}
	c.rewrite, c.verified, c.passed, c.denied, c.disowned = rewrite{}, Verified{}, nil, nil, false
}

func (s *Server) answer(ctx context.Context, message []byte) (a *answer, err error) {
	caller := identity.CallerIn(ctx)
	if caller == nil || caller.Workload.IsZero() {
		s.metrics.unproven.Inc()
		return nil, status.Error(codes.Unauthenticated, "the caller did not prove which pod it is")
	}
	c := s.checks.Get().(*check)
	c.Record = Record{Time: time.Now(), Workload: &caller.Workload, Message: message, Request: &c.request}
	c.Asked = c.asked[:0]
	defer func() {
		if v := recover(); v != nil {
			s.metrics.panics.Inc()
			s.log.Error("check panicked", "pod_uid", caller.Workload.PodUID, "err", fmt.Sprint(v), "stack", string(debug.Stack()))
			// c may be anything now; it is not used again.
			d := authz.Decision{Rule: -1, Reason: ReasonInternal}
			s.metrics.answered(&d, 0, nil)
			s.recordPanic(&caller.Workload, message, d)
			a, err = encode((&Denial{}).response(d, false, nil, "")), nil
		}
	}()
	s.decide(ctx, c)
	a = s.encode(c)
	c.Took = time.Since(c.Time)
	s.metrics.answered(&c.Decision, c.Took, &c.attributes)
	if !c.Decision.Allowed {
		s.logDenied(ctx, c)
	}
	if s.records != nil {
		s.records.Add(&c.Record)
	}
	c.reset()
	s.checks.Put(c)
	return a, nil
}

// recordPanic records a denial of which nothing is known but the message. What
// panicked may have been the records.
func (s *Server) recordPanic(w *identity.Workload, message []byte, d authz.Decision) {
	if s.records == nil {
		return
	}
	defer func() { _ = recover() }()
	s.records.Add(&Record{Time: time.Now(), Workload: w, Message: message, Request: &authz.Request{}, Decision: d,
		Err: errors.New("a defect of this program, of which its log tells")})
}

// decide takes a check through its steps: read the message, ask providers, verify
// tokens, decide.
func (s *Server) decide(ctx context.Context, c *check) {
	c.Snapshot = s.snapshot()
	c.Program = c.Snapshot.For(*c.Workload)
	err := s.read(c)
	if err == nil {
		err = checkDestination(c.Workload, c.request.DestinationIP)
	}
	if err != nil {
		reason := ReasonInternal
		var re *RequestError
		if errors.As(err, &re) {
			reason = re.Reason
		}
		c.Decision, c.Err = authz.Decision{Rule: -1, Reason: reason}, err
		c.Snapshot, c.Program = nil, nil
		return
	}
	if len(c.labels.list) > 0 && !c.labels.equal(c.Workload.Labels) {
		s.metrics.labels.Inc()
	}
	verifies := c.request.HTTP && len(c.Program.Verifies()) > 0
	if !verifies {
		for c.Decision = c.Program.Decide(&c.request); c.Decision.Ask; c.Decision = c.Program.After(c.Decision, &c.request) {
			if !s.ask(ctx, c) {
				return
			}
		}
		return
	}
	// Providers first: what they change of the request may be its token.
	for d := c.Program.Custom(&c.request); d.Ask; d = c.Program.CustomAfter(d, &c.request) {
		c.Decision = d
		if !s.ask(ctx, c) {
			return
		}
	}
	if s.tokens != nil && c.request.Claims == nil {
		c.verified = s.tokens.Claims(ctx, c.Program, &c.request)
		c.Err = c.verified.Err
		if c.verified.Upstream != nil || c.request.Claims != nil {
			c.request.Token = c.rewrite.token(c.verified.Upstream, &c.request)
		}
	}
	if c.disowned && c.request.Claims == nil && mayBeTakenOut(c.Program.Verifies(), &c.request) {
		c.request.Known &^= authz.FieldClaims | authz.FieldMetadata
	}
	if c.request.Claims == nil {
		// Policies see no header in which a token's claims would be; nor does the
		// application, whoever verifies tokens and whatever it says.
		c.rewrite.remove(c.Program.Outputs())
	}
	if len(c.Asked) > 0 {
		c.Decision = c.Program.After(c.Decision, &c.request)
	} else {
		c.Decision = c.Program.Decide(&c.request)
	}
}

// mayBeTakenOut reports whether a request in which no token is seen may have come with one
// that the proxy has verified and taken out, in another place than a provider changed.
func mayBeTakenOut(rules []*authz.TokenRule, r *authz.Request) bool {
	out := false
	for _, rule := range rules {
		for range rule.Tokens(r) {
			return false // who verified it has said what it is
		}
		out = out || !rule.Spec.GetForwardOriginalToken()
	}
	return out
}

// ask has the provider asked that the decision names, and makes what it changes in
// the request. It reports whether it allowed; if not, the decision is a denial.
func (s *Server) ask(ctx context.Context, c *check) bool {
	deny := func(reason authz.Reason, err error) bool {
		d := c.Decision
		d.Ask, d.Allowed, d.Reason = false, false, reason
		c.Decision, c.Err = d, err
		return false
	}
	name := c.Decision.Provider
	if s.providers == nil {
		return deny(ReasonNotAsked, errors.New("a CUSTOM policy wants an extension provider to be asked, and none is configured"))
	}
	message := c.Message
	if len(c.rewrite.headers)+len(c.rewrite.params) > 0 {
		var err error
		if message, err = c.rewrite.message(c.Message, &c.request); err != nil {
			return deny(ReasonInternal, err)
		}
	}
	c.Asked = append(c.Asked, name)
	switch a, err := s.providers.Ask(ctx, name, message); {
	case err != nil:
		c.denied = a.Response
		reason := ReasonProviderFailed
		if errors.Is(err, ErrUnknownProvider) {
			reason = ReasonProviderUnknown
		}
		return deny(reason, fmt.Errorf("asking extension provider %s: %w", name, err))
	case !a.Allowed:
		c.denied = a.Response
		return deny(ReasonProviderDenied, nil)
	default:
		if err := s.changedBy(c, a.Response); err != nil {
			return deny(ReasonProviderFailed, fmt.Errorf("asking extension provider %s: %w", name, err))
		}
		return true
	}
}

// changedBy makes what a provider that allowed changes in the request.
func (s *Server) changedBy(c *check, by *authv3.CheckResponse) error {
	c.Changed = append(c.Changed, nil)
	if by == nil {
		return nil
	}
	c.passed = append(c.passed, by)
	ok := by.GetOkResponse()
	//lint:ignore SA1019 a filter of Envoy that is older than the other field reads this one
	if c.request.Metadata[authzFilter] != nil && (by.GetDynamicMetadata() != nil || ok.GetDynamicMetadata() != nil) {
		return errChange("metadata that policies may have from another filter")
	}
	if ok == nil || !c.request.HTTP {
		return nil
	}
	if c.request.Known&authz.FieldHeaders == 0 && len(ok.GetHeaders())+len(ok.GetHeadersToRemove()) > 0 {
		// Nobody needed them so far.
		var all authz.Request
		if err := FromBytes(c.Message, authz.FieldHeaders, &all); err != nil {
			return err
		}
		c.request.Headers, c.request.Known = all.Headers, c.request.Known|all.Known&authz.FieldHeaders
	}
	// In Istio claims come after providers and have the last word in their headers. Where
	// the proxy has verified the token it has put them there before, and there they stay.
	var settled []string
	if c.request.Claims != nil {
		settled = c.Program.Outputs()
	}
	changes, err := c.rewrite.provider(ok, &c.request, settled)
	if err != nil {
		return err
	}
	c.Changed[len(c.Changed)-1] = changes
	if c.request.Claims != nil && changes.LooksAt(c.Program.Verifies()) {
		// The proxy verified a token of the request as it came. What is there now was
		// not, and in Istio would be.
		c.request.DisownToken()
		c.disowned = true
	}
	return nil
}

// read reads the message into the request, as much as the policies need.
func (s *Server) read(c *check) error {
	needed := c.Program.Reads()
	if !c.attributes.scan(c.Message, needed&authz.FieldHeaders != 0) {
		return errMessage
	}
	return s.reader.read(&c.attributes, needed, &c.request)
}

// checkDestination refuses an address that the calling pod cannot have.
func checkDestination(w *identity.Workload, dst netip.Addr) error {
	if !dst.IsValid() || dst.IsLoopback() || len(w.Addresses) == 0 {
		return nil
	}
	if slices.ContainsFunc(w.Addresses, func(a netip.Addr) bool { return a.Unmap().WithZone("") == dst }) {
		return nil
	}
	return &RequestError{ReasonDestination, "the destination address is not one of the calling pod"}
}

func (s *Server) logDenied(ctx context.Context, c *check) {
	if !s.log.Enabled(ctx, slog.LevelInfo) {
		return
	}
	d := c.Decision
	source := string(c.source.principal)
	if len(source) > maxPrincipal {
		source = source[:maxPrincipal] + "…"
	}
	method, path := c.request.Method, c.request.Path
	if c.Program == nil { // the request may be half filled
		method, path = c.method, c.path
	}
	attrs := []slog.Attr{
		slog.String("pod_uid", c.Workload.PodUID),
		slog.String("spiffe_id", source),
		slog.String("method", logged(method)),
		slog.String("path", logged(path)),
		slog.String("kind", d.Kind),
		slog.String("policy", d.Policy),
		slog.Int("rule", d.Rule),
		slog.String("reason", string(d.Reason)),
	}
	if c.Err != nil {
		attrs = append(attrs, slog.Any("err", c.Err))
	} else {
		attrs = append(attrs, slog.String("text", d.Text()))
	}
	s.log.LogAttrs(ctx, slog.LevelInfo, "check denied", attrs...)
}
