package kube

import (
	"context"
	"log/slog"
	"net/http"
	"time"

	"github.com/signet-mesh/signet/identity"
	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
)

// Feed is what the reflectors of a Cluster write into.
type Feed struct{ Pods, Nodes, Accounts cache.ReflectorStore }

// Fed is a Cluster without an API server: a test writes into its feed, answers its
// TokenReviews and tells it the issuer's keys.
func Fed(api reviewer, fetch func(context.Context) (issuer string, jwks []byte, err error), want string) (*Cluster, Feed) {
	c := &Cluster{log: slog.New(slog.DiscardHandler), view: newView()}
	var err error
	if c.metrics, err = newMetrics(nil, c.view); err != nil {
		panic(err)
	}
	c.reviews = newReviews(api, c.metrics)
	c.view.gone = c.reviews.forget
	c.keys = newKeys(fetch, want, c.log, c.metrics)
	return c, Feed{c.view.podStore(), c.view.nodeUIDs().store(), c.view.accountUIDs().store()}
}

// RunFed is Run without the watches and duties.
func (c *Cluster) RunFed(ctx context.Context) error {
	var g errgroup.Group
	g.Go(func() error { return c.view.expire(ctx) })
	g.Go(func() error { return c.keys.run(ctx) })
	return g.Wait()
}

// Keys is the source of keys alone.
func (c *Cluster) Keys() *keys { return c.keys }

// Remembered is how many TokenReviews are remembered.
func (c *Cluster) Remembered() int {
	c.reviews.mu.Lock()
	defer c.reviews.mu.Unlock()
	return len(c.reviews.good)
}

const MaxReviews = maxReviews

// Review asks as an Attestor does.
func (c *Cluster) Review(ctx context.Context, audience, token string, w identity.Workload) error {
	return c.reviews.check(ctx, audience, token, w)
}

// Term is how long one replica may do what only the elected one may.
type Term struct{ t term }

func (t *Term) On() bool { return t.t.on() }

// Elect does the duties while the lock is held.
func (t *Term) Elect(ctx context.Context, lock resourcelock.Interface, duties func(context.Context)) error {
	return t.t.elect(ctx, lock, duties)
}

// Transport refuses what the duties must not do.
func (t *Term) Transport(rt http.RoundTripper) http.RoundTripper { return termTransport{&t.t, rt} }

const (
	LeaseDuration = leaseDuration
	RetryPeriod   = retryPeriod
)

// Tried notes how an attempt to watch went.
func (c *Cluster) Tried(resource string, err error) { c.view.tried(resource, err) }

// Away is what signet_kube_away says.
func (c *Cluster) Away() bool { return c.view.away() }

// RootCerts is what is known of the namespaces in which Istio's clients are.
type RootCerts struct{ r *rootCerts }

func NewRootCerts() RootCerts { return RootCerts{newRootCerts()} }

func (r RootCerts) Namespaces() cache.ReflectorStore { return r.r.namespaceStore() }

// Wrote notes that the ConfigMap of a namespace was written.
func (r RootCerts) Wrote(namespace string) { r.r.wrote(namespace, time.Now()) }

// Written is how many namespaces are remembered for that.
func (r RootCerts) Written() int { return len(r.r.written) }

// Policies are those that wait to be looked at.
type Policies struct{ p *policies }

func NewPolicies() Policies { return Policies{newPolicies()} }

func (p Policies) Store() cache.ReflectorStore { return p.p.store() }

// Work is what is done with them until ctx ends.
func (p Policies) Work(ctx context.Context, report func(*unstructured.Unstructured, int) error) {
	defer context.AfterFunc(ctx, p.p.queue.ShutDown)()
	p.p.work(report)
}

// Waiting is how many there are.
func (p Policies) Waiting() int {
	p.p.mu.Lock()
	defer p.p.mu.Unlock()
	return len(p.p.todo)
}
