package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	authenticationv1 "k8s.io/client-go/kubernetes/typed/authentication/v1"
	coordinationv1 "k8s.io/client-go/kubernetes/typed/coordination/v1"
	corev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"
)

// Config says which cluster, and what to do there.
type Config struct {
	// REST says where the API server is, and as whom to speak to it. Required; it is
	// not changed.
	REST *rest.Config
	// Namespace is that of the installation: the Lease and the ConfigMap are in it.
	// Required.
	Namespace string
	// Issuer, if not empty, is the only issuer of tokens that is accepted; another
	// one at the API server is an error. Empty takes what the API server says.
	Issuer string
	// Name tells this replica from every other one in the Lease. Required.
	Name string
	// Log receives what operators should read; nil discards it.
	Log *slog.Logger
	// Metrics is where metrics are registered; nil means nowhere.
	Metrics prometheus.Registerer
}

// Cluster is a Kubernetes cluster as an authority sees it. It is safe for
// concurrent use. Nothing is watched before [Cluster.Run].
type Cluster struct {
	cfg    Config
	log    *slog.Logger
	rest   *rest.Config
	http   *http.Client
	core   *corev1.CoreV1Client
	leases *coordinationv1.CoordinationV1Client
	// Duties are done with these: they change nothing while term is not on.
	dutyHTTP *http.Client
	duty     *corev1.CoreV1Client
	term     term
	view     *view
	keys     *keys
	reviews  *reviews
	metrics  *metrics
}

// Open prepares everything and contacts nobody: an API server that is away is
// waited for in Run.
func Open(cfg Config) (*Cluster, error) {
	switch {
	case cfg.REST == nil:
		return nil, errors.New("connecting to Kubernetes: no API server is configured")
	case cfg.Namespace == "":
		return nil, errors.New("connecting to Kubernetes: the namespace of the installation is required")
	case cfg.Name == "":
		return nil, errors.New("connecting to Kubernetes: this replica has no name")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	rc := rest.CopyConfig(cfg.REST)
	rc.UserAgent = "signet-ca"
	rc.ContentType = "application/vnd.kubernetes.protobuf"
	rc.AcceptContentTypes = "application/vnd.kubernetes.protobuf,application/json"
	// Everything here is bounded where it begins; the API server has its own
	// priorities for the rest.
	rc.QPS, rc.Burst = 200, 400
	c := &Cluster{cfg: cfg, log: cfg.Log, rest: rc}
	if err := c.connect(); err != nil {
		return nil, fmt.Errorf("connecting to Kubernetes at %s: %w", rc.Host, err)
	}
	return c, nil
}

func (c *Cluster) connect() error {
	var err error
	// One HTTP client, hence one connection, for all of them.
	if c.http, err = rest.HTTPClientFor(c.rest); err != nil {
		return err
	}
	if c.core, err = corev1.NewForConfigAndClient(c.rest, c.http); err != nil {
		return err
	}
	transport := c.http.Transport
	if transport == nil {
		transport = http.DefaultTransport
	}
	c.dutyHTTP = &http.Client{Transport: termTransport{&c.term, transport}, Timeout: c.http.Timeout}
	if c.duty, err = corev1.NewForConfigAndClient(c.rest, c.dutyHTTP); err != nil {
		return err
	}
	if c.leases, err = coordinationv1.NewForConfigAndClient(c.rest, c.http); err != nil {
		return err
	}
	authn, err := authenticationv1.NewForConfigAndClient(c.rest, c.http)
	if err != nil {
		return err
	}
	c.view = newView()
	if c.metrics, err = newMetrics(c.cfg.Metrics, c.view); err != nil {
		return err
	}
	c.reviews = newReviews(authn.TokenReviews(), c.metrics)
	c.view.gone = c.reviews.forget
	c.keys = newKeys(discovery{c.core.RESTClient()}.fetch, c.cfg.Issuer, c.log, c.metrics)
	return nil
}

// Pods are the pods that are alive, with the UIDs of their nodes and service
// accounts. It is filled while Run runs.
func (c *Cluster) Pods() *identity.Pods { return &c.view.pods }

// TokenKeys are the keys of the API server's issuer.
func (c *Cluster) TokenKeys() interface {
	Published() (keys identity.TokenKeys, changed <-chan struct{})
	attest.KeySource
} {
	return c.keys
}

// Synced waits until pods, nodes and service accounts were read once and the
// issuer's keys are known. Before that nobody must be served from Pods.
func (c *Cluster) Synced(ctx context.Context) error {
	for _, ready := range []<-chan struct{}{c.view.synced, c.keys.known} {
		select {
		case <-ready:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// Ready is nil once Synced would return, and from then on: an API server that goes
// away does not take away what is known. Else it says what is waited for.
func (c *Cluster) Ready() error {
	if waiting := c.view.waiting(); waiting != "" {
		return fmt.Errorf("%s have not been read from the API server yet%s", waiting, because(c.view.trouble()))
	}
	select {
	case <-c.keys.known:
		return nil
	default:
		return fmt.Errorf("the keys of the API server's issuer have not been read yet%s", because(c.keys.trouble()))
	}
}

// Stale is since when Pods is not kept up to date because the API server cannot be watched, or
// has not had the time yet to tell what happened meanwhile; zero while it is.
func (c *Cluster) Stale() time.Time { return c.view.stale() }

func because(err error) string {
	if err == nil {
		return ""
	}
	return ": " + err.Error()
}

// Duties are what the elected replica does. A nil field is a duty that nobody has.
type Duties struct {
	// Trust is the state of trust to publish, and a channel that is closed when it
	// changes, as of ca.Authority.
	Trust func() (*identity.Trust, <-chan struct{})
	// RootCerts is what Istio's clients verify the authority under: the ConfigMap
	// istio-ca-root-cert of each namespace. nil leaves those to istiod.
	RootCerts func() (*identity.Trust, <-chan struct{})
	// CheckPolicy says what keeps a policy from being enforced as it is written;
	// empty if nothing does. The object is JSON, without status and managed fields.
	CheckPolicy func(object []byte) []PolicyProblem
}

// Run watches the cluster until ctx ends, and does the duties while this replica
// is the elected one. It returns nil when ctx ended: an API server that is away
// or says no is tried again for as long as it takes.
func (c *Cluster) Run(ctx context.Context, d Duties) error {
	// client-go logs through klog; what it says goes where ours goes.
	ctx = klog.NewContext(ctx, logr.FromSlogHandler(clientLog{c.log.Handler()}))
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return c.watch(ctx) })
	g.Go(func() error { return c.view.expire(ctx) })
	g.Go(func() error { return c.keys.run(ctx) })
	if d.Trust != nil || d.RootCerts != nil || d.CheckPolicy != nil {
		g.Go(func() error {
			return c.lead(ctx, func(ctx context.Context) {
				var g errgroup.Group
				if d.Trust != nil {
					g.Go(func() error { return c.publishTrust(ctx, d.Trust) })
				}
				if d.RootCerts != nil {
					g.Go(func() error { return c.publishRootCerts(ctx, d.RootCerts) })
				}
				if d.CheckPolicy != nil {
					g.Go(func() error { return c.reportPolicies(ctx, d.CheckPolicy) })
				}
				_ = g.Wait() // both end with ctx only
			})
		})
	}
	return g.Wait()
}

// pause waits for d or until ctx ends, and reports whether ctx goes on.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// clientLog lowers what client-go says: its errors are transient and are told by
// this package, where they matter, once.
type clientLog struct{ slog.Handler }

func (h clientLog) Enabled(ctx context.Context, _ slog.Level) bool {
	return h.Handler.Enabled(ctx, slog.LevelDebug)
}

func (h clientLog) Handle(ctx context.Context, r slog.Record) error {
	// Not everybody who logs an error asks first whether that is wanted.
	if !h.Handler.Enabled(ctx, slog.LevelDebug) {
		return nil
	}
	r.Level = slog.LevelDebug
	return h.Handler.Handle(ctx, r)
}

func (h clientLog) WithAttrs(as []slog.Attr) slog.Handler { return clientLog{h.Handler.WithAttrs(as)} }
func (h clientLog) WithGroup(name string) slog.Handler    { return clientLog{h.Handler.WithGroup(name)} }
