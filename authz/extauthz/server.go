package extauthz

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"runtime/debug"
	"slices"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"github.com/prometheus/client_golang/prometheus"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// deniedBody and tokenBody are what Istio's sidecars answer with.
const (
	deniedBody = "RBAC: access denied"
	tokenBody  = "Jwt verification fails"
)

// Config is what [New] needs.
type Config struct {
	// Snapshot is the policies to decide by; it is called for each check and
	// must be safe for concurrent use. While it returns nil everything is denied.
	// It is required.
	Snapshot func() *authz.Snapshot
	// Log gets a record for each denial, at level info; nil discards.
	Log *slog.Logger
	// Metrics is where metrics are registered; nil registers none.
	Metrics prometheus.Registerer
}

// Server answers checks. It is safe for concurrent use.
type Server struct {
	snapshot func() *authz.Snapshot
	log      *slog.Logger
	metrics  *metrics
	peers    peers
	// allowed is the answer to every check that is allowed. It is shared, and
	// so never changed.
	allowed *authv3.CheckResponse
}

// New makes a Server.
func New(cfg Config) (*Server, error) {
	if cfg.Snapshot == nil {
		return nil, errors.New("making the ext_authz service: no source of policies is configured")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	m, err := newMetrics(cfg.Metrics)
	if err != nil {
		return nil, fmt.Errorf("registering metrics of the ext_authz service: %w", err)
	}
	return &Server{snapshot: cfg.Snapshot, log: cfg.Log, metrics: m, allowed: &authv3.CheckResponse{
		Status:       &statuspb.Status{Code: int32(codes.OK)},
		HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{}},
	}}, nil
}

// Register registers the service. The registrar's interceptors have to put the
// proven caller into the context of each RPC, as identity/attest.Gate does.
func (s *Server) Register(r grpc.ServiceRegistrar) { authv3.RegisterAuthorizationServer(r, s) }

// Check answers one check; the caller is taken from ctx. Its only error is
// Unauthenticated, for a ctx without a proven caller. The answer must not be
// changed.
func (s *Server) Check(ctx context.Context, r *authv3.CheckRequest) (answer *authv3.CheckResponse, err error) {
	caller, ok := identity.CallerFrom(ctx)
	if !ok || caller.Workload.IsZero() {
		s.metrics.unproven.Inc()
		return nil, status.Error(codes.Unauthenticated, "the caller did not prove which pod it is")
	}
	start := time.Now()
	defer func() {
		if v := recover(); v != nil {
			s.metrics.panics.Inc()
			s.log.Error("check panicked", "pod_uid", caller.Workload.PodUID, "err", fmt.Sprint(v), "stack", string(debug.Stack()))
			d := authz.Decision{Rule: -1, Reason: ReasonInternal}
			s.metrics.answered(d, time.Since(start))
			answer, err = denied(d), nil
		}
	}()
	var req authz.Request
	d, why := s.decide(&caller.Workload, r, &req)
	s.metrics.answered(d, time.Since(start))
	if d.Allowed {
		return s.allowed, nil
	}
	s.logDenied(ctx, &caller.Workload, r, &req, d, why)
	return denied(d), nil
}

// decide fills req and decides. why is set where no policy was asked.
func (s *Server) decide(w *identity.Workload, r *authv3.CheckRequest, req *authz.Request) (d authz.Decision, why error) {
	dst, err := s.peers.read(r, req)
	if err == nil {
		err = checkDestination(w, dst)
	}
	if err != nil {
		reason := ReasonInternal
		var re *RequestError
		if errors.As(err, &re) {
			reason = re.Reason
		}
		return authz.Decision{Rule: -1, Reason: reason}, err
	}
	if labels := r.GetAttributes().GetDestination().GetLabels(); len(labels) > 0 && !maps.Equal(labels, w.Labels) {
		s.metrics.labels.Inc()
	}
	if d = s.snapshot().For(*w).Decide(req); d.Ask {
		// Nobody is asked, so nobody has allowed.
		d.Ask, d.Allowed, d.Reason = false, false, ReasonNotAsked
		return d, errors.New("a CUSTOM policy wants an extension provider to be asked, which this version does not do")
	}
	return d, nil
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

func denied(d authz.Decision) *authv3.CheckResponse {
	code, httpCode, body := codes.PermissionDenied, typev3.StatusCode_Forbidden, deniedBody
	if d.Reason == authz.ReasonTokenRefused || d.Reason == authz.ReasonTokenForeign {
		code, httpCode, body = codes.Unauthenticated, typev3.StatusCode_Unauthorized, tokenBody
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

func (s *Server) logDenied(ctx context.Context, w *identity.Workload, r *authv3.CheckRequest, req *authz.Request, d authz.Decision, why error) {
	if !s.log.Enabled(ctx, slog.LevelInfo) {
		return
	}
	source := r.GetAttributes().GetSource().GetPrincipal()
	if len(source) > maxPrincipal {
		source = source[:maxPrincipal] + "…"
	}
	method, path := req.Method, req.Path
	if why != nil { // req may be half filled
		h := r.GetAttributes().GetRequest().GetHttp()
		method, path = []byte(h.GetMethod()), []byte(h.GetPath())
	}
	attrs := []slog.Attr{
		slog.String("pod_uid", w.PodUID),
		slog.String("spiffe_id", source),
		slog.String("method", logged(method)),
		slog.String("path", logged(path)),
		slog.String("kind", d.Kind),
		slog.String("policy", d.Policy),
		slog.Int("rule", d.Rule),
		slog.String("reason", string(d.Reason)),
	}
	if why != nil {
		attrs = append(attrs, slog.Any("err", why))
	} else {
		attrs = append(attrs, slog.String("text", d.Text()))
	}
	s.log.LogAttrs(ctx, slog.LevelInfo, "check denied", attrs...)
}
