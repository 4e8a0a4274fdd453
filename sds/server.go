package sds

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/identity"
)

// fetchWait is how long FetchSecrets waits for what is not there yet. It is below
// the 15 s that Envoy gives an initial fetch by default.
const fetchWait = 10 * time.Second

// Config is what a [Server] needs.
type Config struct {
	// Source is what is served. Required.
	Source Source
	// Log takes refusals by clients and failures of the source. Nil means none.
	Log *slog.Logger
	// Metrics registers the server's metrics. Nil means that they are kept but
	// registered nowhere.
	Metrics prometheus.Registerer
}

// Server serves the resources of a Source on gRPC streams. It is safe for
// concurrent use, has no background work, and needs no closing: its streams end
// with the gRPC server.
type Server struct {
	source  Source
	log     *slog.Logger
	metrics *metrics
	acks    acknowledgments
}

// New checks cfg and makes a Server.
func New(cfg Config) (*Server, error) {
	if cfg.Source == nil {
		return nil, errors.New("sds: no source configured")
	}
	s := &Server{source: cfg.Source, log: cfg.Log}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	var err error
	if s.metrics, err = newMetrics(cfg.Metrics); err != nil {
		return nil, fmt.Errorf("registering metrics of sds: %w", err)
	}
	return s, nil
}

// Register adds the services of s to r: SecretDiscoveryService. The gRPC server
// must have interceptors that put the proven identity.Caller in the context of
// each RPC.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	secretv3.RegisterSecretDiscoveryServiceServer(r, secretService{service{s, SecretType}})
}

// Acknowledged is the highest sequence of trust, at most current, that every open
// stream which carries a trust bundle has acknowledged, and a channel that is
// closed when another call may answer differently. current is the sequence of the
// trust that the Source serves at the time of the call, and the answer where no
// stream carries a bundle. A stream that acknowledged a bundle of an older sequence
// with the same content counts as having acknowledged the newer.
//
// The answer never falls: a stream that opens later is never sent less than what
// was served when the answer was given. Clients without a stream (FetchSecrets) are
// not in it.
func (s *Server) Acknowledged(current uint64) (sequence uint64, changed <-chan struct{}) {
	return s.acks.lowest(current)
}

// service is the engine with one type of resource, behind one xDS service.
type service struct {
	*Server
	typeURL string
}

// label is the value of the metrics' label.
func (s service) label() string { return s.typeURL[strings.LastIndexByte(s.typeURL, '.')+1:] }

// secretService gives the engine the method names of the secrets' service.
type secretService struct{ service }

func (s secretService) StreamSecrets(st grpc.BidiStreamingServer[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse]) error {
	return serve(s.service, st, &sotw{typeURL: s.typeURL})
}

func (s secretService) DeltaSecrets(st grpc.BidiStreamingServer[discoveryv3.DeltaDiscoveryRequest, discoveryv3.DeltaDiscoveryResponse]) error {
	return serve(s.service, st, &delta{typeURL: s.typeURL})
}

func (s secretService) FetchSecrets(ctx context.Context, r *discoveryv3.DiscoveryRequest) (*discoveryv3.DiscoveryResponse, error) {
	return s.fetch(ctx, r)
}

// fetch answers one request outside a stream: with all that the client asked for,
// or after fetchWait with what there is of it.
func (s service) fetch(ctx context.Context, r *discoveryv3.DiscoveryRequest) (*discoveryv3.DiscoveryResponse, error) {
	caller, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	// One request is the first and last of a state-of-the-world stream.
	p := &sotw{typeURL: s.typeURL}
	if _, err := p.request(r); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	timeout := time.NewTimer(fetchWait)
	defer timeout.Stop()
	for waited := false; ; {
		rs, changed, err := s.source.Resources(ctx, caller, s.typeURL, p.wanted())
		if err != nil {
			s.metrics.errors.WithLabelValues(s.label()).Inc()
			s.log.Warn("source of resources failed", "pod_uid", caller.PodUID, "err", err)
		}
		pending := err != nil
		for _, r := range rs {
			pending = pending || r.Body == nil
		}
		if !pending || waited {
			resp, omitted := p.respond(rs, err == nil)
			s.metrics.omitted.WithLabelValues(s.label()).Add(float64(omitted))
			switch {
			case resp != nil:
				resp.Nonce = "" // there is no stream to acknowledge on
				return resp, nil
			case pending:
				return nil, status.Error(codes.Unavailable, "the resources are not available yet; try again later")
			}
			return &discoveryv3.DiscoveryResponse{TypeUrl: s.typeURL}, nil
		}
		select {
		case <-ctx.Done():
			return nil, ended(ctx)
		case <-changed:
		case <-timeout.C:
			waited = true
		}
	}
}

// callerOf is the workload that an RPC was proven to come from.
func callerOf(ctx context.Context) (identity.Workload, error) {
	c, ok := identity.CallerFrom(ctx)
	if !ok || c.Workload.IsZero() {
		return identity.Workload{}, status.Error(codes.Unauthenticated, "no proof of identity; send a service-account token")
	}
	return c.Workload, nil
}

// ended is how a client learns that its RPC's context is over. The cause is for
// the log; the client is told the same whatever it was.
func ended(ctx context.Context) error {
	if context.Cause(ctx) == context.Canceled {
		// The client left, or the server stops.
		return status.Error(codes.Canceled, "the stream was cancelled")
	}
	return status.Error(codes.Unavailable, "the proof of identity expires; reconnect with a fresh token")
}
