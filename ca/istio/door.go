package istio

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/limit"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	pb "istio.io/api/security/v1alpha1"
)

// doorName is what records of the issuance log say of certificates from here.
const doorName = "istio"

// Limits of the wire.
const (
	// maxMessage bounds a request; what gRPC answers to a larger one is
	// ResourceExhausted, as istiod's does beyond 4 MiB.
	maxMessage = 64 << 10
	maxHeaders = 32 << 10 // a token has up to 16 KiB
	maxStreams = 512      // of one connection at once
	// maxInFlight and maxOfPod bound the RPCs that are worked on at once, of all and of
	// one pod, and callTime how long each may take: together with maxMessage that is
	// what proven callers can make the authority hold. As places become few so does what
	// one pod can have of them, and one whose message has not come for messageWait is
	// another pod's that has none.
	maxInFlight = 2048
	maxOfPod    = 512
	callTime    = 15 * time.Second
	messageWait = time.Second
)

// DefaultMaxTokenAge is how long certificates may be renewed by themselves, where
// that is on.
const DefaultMaxTokenAge = 24 * time.Hour

// Config says what a [Door] accepts.
type Config struct {
	// Authority issues. Required.
	Authority *ca.Authority
	// Pods is the authority's view of the pods that are alive. Required.
	Pods *identity.Pods
	// Tokens verify service-account tokens, one for each accepted audience; they are
	// asked in this order. At least one is required.
	Tokens []ca.Attestor
	// ClusterIDs are accepted as metadata clusterid, which Istio's clients take from
	// ISTIO_META_CLUSTER_ID. None means Kubernetes, Istio's own default.
	ClusterIDs []string
	// DNSNames go into the serving certificate; Istio's clients verify one of them.
	// None means istiod.istio-system.svc.
	DNSNames []string
	// MaxTTL is the longest life of a certificate, and that of one for which no life
	// is asked. Required.
	MaxTTL time.Duration
	// NodeAccounts are the service accounts, NAMESPACE/NAME, that may ask for the
	// certificates of the pods on their own node: ztunnel's. None means nobody may.
	NodeAccounts []string
	// RenewalFor are the service accounts whose certificates may be renewed with the
	// certificate alone: NAMESPACE/NAME, NAMESPACE/* or */*. None means that every
	// request needs a token.
	RenewalFor []string
	// MaxTokenAge is how long after the last token a certificate may still be
	// renewed by itself. Zero means DefaultMaxTokenAge.
	MaxTokenAge time.Duration
	// AnyPodOf are nodes whose pods count as alive although the view does not have
	// them, as in [attest.Config].
	AnyPodOf []string
	// Istiod, if not nil, has a serving certificate made for istiod itself.
	Istiod *Istiod
	// Log receives what operators should read; nil discards it.
	Log *slog.Logger
	// Metrics gets citadel_server_*, under Istio's names; nil means nowhere.
	Metrics prometheus.Registerer
}

// Door serves Istio's certificate RPC. New makes one, NewServer its server, Run
// keeps its own certificates fresh.
type Door struct {
	pb.UnimplementedIstioCertificateServiceServer
	cfg          Config
	td           spiffeid.TrustDomain
	clusters     map[string]struct{}
	nodeAccounts map[string]struct{}
	anyPodOf     map[string]struct{}
	renewals     *renewals     // nil: renewal is off
	places       *limit.Places // by pod
	metrics      *metrics
	warnings     *rate.Limiter

	serving atomic.Pointer[tls.Certificate]
	rest    atomic.Pointer[restOfChain]
	own     []*kept // owned by New and then by Run
	failing atomic.Pointer[error]
}

// New checks cfg, reads from the issuance log which certificates may be renewed,
// and makes the serving certificate.
func New(ctx context.Context, cfg Config) (*Door, error) {
	d, err := newDoor(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("opening Istio's door: %w", err)
	}
	return d, nil
}

func newDoor(ctx context.Context, cfg Config) (*Door, error) {
	if cfg.Authority == nil || cfg.Pods == nil || len(cfg.Tokens) == 0 {
		return nil, errors.New("an authority, a view of the pods and a verifier of tokens are required")
	}
	if cfg.MaxTTL < time.Second {
		return nil, fmt.Errorf("a maximum life of %v; it must be at least a second", cfg.MaxTTL)
	}
	if cfg.MaxTokenAge < 0 {
		return nil, fmt.Errorf("a maximum age of tokens of %v; it must be positive", cfg.MaxTokenAge)
	}
	if cfg.MaxTokenAge == 0 {
		cfg.MaxTokenAge = DefaultMaxTokenAge
	}
	if len(cfg.ClusterIDs) == 0 {
		cfg.ClusterIDs = []string{"Kubernetes"}
	}
	if len(cfg.DNSNames) == 0 {
		cfg.DNSNames = []string{"istiod.istio-system.svc"}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	d := &Door{cfg: cfg, td: cfg.Authority.ID().TrustDomain(), clusters: set(cfg.ClusterIDs), nodeAccounts: set(cfg.NodeAccounts),
		anyPodOf: set(cfg.AnyPodOf), metrics: newMetrics(cfg.Metrics), warnings: rate.NewLimiter(10, 50), places: limit.NewPlaces(limit.PlacesConfig{All: maxInFlight, PerHolder: maxOfPod, Wait: messageWait})}
	for _, a := range cfg.NodeAccounts {
		if err := checkAccount(a, false); err != nil {
			return nil, fmt.Errorf("node account %w", err)
		}
	}
	for _, a := range cfg.RenewalFor {
		if err := checkAccount(a, true); err != nil {
			return nil, fmt.Errorf("renewal for %w", err)
		}
	}
	if len(cfg.RenewalFor) > 0 {
		d.renewals = newRenewals(cfg.RenewalFor, cfg.MaxTokenAge)
		if err := d.renewals.load(ctx, cfg.Authority, time.Now().Round(0), cfg.MaxTTL); err != nil {
			return nil, err
		}
	}
	if err := d.keepOwn(ctx); err != nil {
		return nil, err
	}
	d.metrics.registerGauges(cfg.Metrics, cfg.Authority, d)
	return d, nil
}

// checkAccount takes NAMESPACE/NAME, and where patterns are allowed a * for the
// name or for both.
func checkAccount(s string, pattern bool) error {
	ns, name, ok := strings.Cut(s, "/")
	switch {
	case !ok || ns == "" || name == "" || strings.Contains(name, "/"):
		return fmt.Errorf("%q: write NAMESPACE/NAME", s)
	case !strings.Contains(s, "*"):
		return nil
	case !pattern:
		return fmt.Errorf("%q: a * is not allowed here; name the account", s)
	case s == "*/*" || name == "*" && !strings.Contains(ns, "*"):
		return nil
	}
	return fmt.Errorf("%q: write NAMESPACE/NAME, NAMESPACE/* or */*", s)
}

func set(list []string) map[string]struct{} {
	m := make(map[string]struct{}, len(list))
	for _, s := range list {
		m[s] = struct{}{}
	}
	return m
}

// NewServer makes a gRPC server for Istio's clients: TLS 1.3 with the serving
// certificate, no session tickets, and a client certificate, where one is given,
// that verifies under the roots of the trust domain.
func (d *Door) NewServer() *grpc.Server {
	s := grpc.NewServer(
		grpc.Creds(d.cfg.Authority.Guard("istio", credentials.NewTLS(d.tlsConfig()))),
		grpc.InTapHandle(d.admit),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(maxStreams),
		// A goroutine that has verified and signed before has the stack for it.
		grpc.NumStreamWorkers(uint32(128)),
		grpc.ConnectionTimeout(10*time.Second),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second, MaxConnectionIdle: 15 * time.Minute}),
		// Istio's clients ping every 30 seconds, also without a call.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	)
	pb.RegisterIstioCertificateServiceServer(s, d)
	return s
}

func (d *Door) tlsConfig() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true,
		NextProtos:             []string{"h2"},
		ClientAuth:             tls.RequestClientCert,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return d.serving.Load(), nil },
		// istiod's VerifyClientCertIfGiven: a certificate that does not verify ends the
		// handshake. The proof of possession is the handshake's.
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 {
				return nil
			}
			return d.cfg.Authority.VerifyClient(s.PeerCertificates)
		},
	}
}

// Ready is nil when the door can serve, else the reason why not.
func (d *Door) Ready() error {
	if err := d.failing.Load(); err != nil {
		return *err
	}
	return nil
}

// warn logs a refusal, at a bounded rate; metrics count every one.
func (d *Door) warn(message string, args ...any) {
	if d.warnings.Allow() {
		d.cfg.Log.Warn(message, args...)
	}
}

var _ ca.Attestor = (*attest.Attestor)(nil)
