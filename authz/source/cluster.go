package source

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// settleRemovals is how long a removal waits until it is looked at: by then the API
// server says so if the resource's type is being removed. retryServed is when it is
// asked again, servedTimeout bounds asking.
const (
	settleRemovals = 100 * time.Millisecond
	retryServed    = time.Second
	servedTimeout  = 10 * time.Second
)

// ClusterConfig is what [NewCluster] needs.
type ClusterConfig struct {
	// REST says where the API server is, and as whom to speak to it. Required.
	REST *rest.Config
	// Options are handed to [authz.Compile].
	Options authz.Options
	// Saved is what [Cluster.Export] told a predecessor; nil if there is nothing.
	Saved []byte
	// Log is told of new snapshots, and once of each problem; nil discards.
	Log *slog.Logger
	// Metrics is where metrics are registered; nil registers none.
	Metrics prometheus.Registerer
}

// Cluster is the policies of a Kubernetes cluster. Its methods are safe for
// concurrent use.
type Cluster struct {
	options authz.Options
	log     *slog.Logger
	metrics *metrics
	api     dynamic.Interface
	served  func(ctx context.Context) (map[string]bool, error)
	feeds   []*feed
	wake    chan struct{} // holds one element if there is something to look at
	running atomic.Bool
	export  identity.Watched[*exported]
	contact identity.Watched[Contact]

	// Owned by NewCluster and then by Run.
	synced   bool                  // a complete state of the cluster was adopted
	texts    map[string]clusterDoc // what is in force, by KIND NAMESPACE/NAME; a new map for each change
	set      authz.Set
	compiled []authz.Problem // of putting the resources together
	removals time.Time       // since when removals wait; zero: there are none

	board
}

// clusterDoc is one resource of a cluster.
type clusterDoc struct {
	text []byte // as it stands in the cluster
	// good is the text that is enforced: text, or the last good version of it;
	// nil if there is none.
	good      []byte
	resources []authz.Resource // text, parsed
	problems  []authz.Problem
}

// policyTypes are the types that are read, and no other.
var policyTypes = []struct{ kind, resource string }{
	{authz.KindAuthorizationPolicy, "authorizationpolicies"},
	{authz.KindPeerAuthentication, "peerauthentications"},
	{authz.KindRequestAuthentication, "requestauthentications"},
}

var policyGroup = schema.GroupVersion{Group: "security.istio.io", Version: "v1"}

// NewCluster prepares to follow the policies of a cluster and contacts nobody. Saved
// policies are in force at once; those that cannot be used are left out, as if there
// were none, which the log says. [Cluster.Run] does the work.
func NewCluster(cfg ClusterConfig) (*Cluster, error) {
	if cfg.REST == nil {
		return nil, errors.New("opening the policies of the cluster: no API server is configured")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	client, err := dynamic.NewForConfig(cfg.REST)
	if err != nil {
		return nil, fmt.Errorf("opening the policies of the cluster: %w", err)
	}
	discovery, err := discoveryFor(cfg.REST)
	if err != nil {
		return nil, fmt.Errorf("opening the policies of the cluster: %w", err)
	}
	c := &Cluster{
		options: cfg.Options, log: cfg.Log, api: client, served: discovery,
		wake: make(chan struct{}, 1), texts: map[string]clusterDoc{},
	}
	c.status.changed = make(chan struct{})
	c.status.err = errNotSynced
	for _, t := range policyTypes {
		c.feeds = append(c.feeds, &feed{
			kind: t.kind, resource: t.resource, client: client.Resource(policyGroup.WithResource(t.resource)),
			wake: c.look, texts: map[string][]byte{},
		})
	}
	if c.metrics, err = newMetrics(cfg.Metrics, &c.board); err != nil {
		return nil, fmt.Errorf("registering metrics of the policies of the cluster: %w", err)
	}
	if cfg.Saved != nil {
		if err := c.load(cfg.Saved); err != nil {
			c.log.Warn("saved policies are not used: until the cluster's are known every check is denied", "err", err)
		}
	}
	return c, nil
}

var errNotSynced = errors.New("they were not read yet")

// load puts saved policies into force.
func (c *Cluster) load(saved []byte) error {
	at, docs, err := decodeSaved(saved)
	if err != nil {
		return err
	}
	// First what was good, then what stands there now: so the last good versions
	// take the places that they had.
	var good, present []authz.Resource
	for key, d := range docs {
		d.resources, d.problems = authz.Parse(key, d.text)
		present = append(present, d.resources...)
		if d.good != nil {
			resources, _ := authz.Parse(key, d.good)
			good = append(good, resources...)
		}
		docs[key] = d
	}
	c.texts = docs
	c.set, _ = c.set.Update(good)
	c.compile(present)
	c.mu.Lock()
	c.status.good = at
	c.mu.Unlock()
	c.log.Info("saved policies in force until the cluster's are known", "resources", c.set.Len(), "saved", at.UTC().Format(time.RFC3339))
	return nil
}

// discoveryFor asks which of the policy types are served and not being removed:
// while a CRD is, its resources cannot be created any more.
func discoveryFor(cfg *rest.Config) (func(ctx context.Context) (map[string]bool, error), error) {
	cfg = dynamic.ConfigFor(cfg)
	cfg.GroupVersion = &policyGroup
	cfg.APIPath = "/apis"
	client, err := rest.RESTClientFor(cfg)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) (map[string]bool, error) {
		ctx, cancel := context.WithTimeout(ctx, servedTimeout)
		defer cancel()
		b, err := client.Get().AbsPath("/apis/"+policyGroup.String()).SetHeader("Accept", "application/json").DoRaw(ctx)
		if apierrors.IsNotFound(err) {
			return map[string]bool{}, nil
		}
		if err != nil {
			return nil, err
		}
		var list metav1.APIResourceList
		if err := json.Unmarshal(b, &list); err != nil {
			return nil, err
		}
		served := map[string]bool{}
		for _, r := range list.APIResources {
			served[r.Name] = slices.Contains(r.Verbs, "create")
		}
		return served, nil
	}, nil
}

// look has Run look at the feeds.
func (c *Cluster) look() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Run follows the cluster until ctx ends, and returns its cause. It can run once.
func (c *Cluster) Run(ctx context.Context) error {
	if !c.running.CompareAndSwap(false, true) {
		return errors.New("following the policies of the cluster: it ran already")
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	for _, f := range c.feeds {
		wg.Go(func() { f.run(ctx) })
	}
	for {
		again := c.adopt(ctx)
		var timer <-chan time.Time
		if again > 0 {
			timer = time.After(again)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-timer:
		case <-c.wake:
			// More comes with it, as when a folder is applied.
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-time.After(gather):
			}
		}
	}
}

// adopt puts what the feeds have into force. It returns when to do so again even if
// nothing changes; zero: not before.
func (c *Cluster) adopt(ctx context.Context) (again time.Duration) {
	texts := map[string][]byte{}
	complete := true
	var contacts []Contact
	var errs []error
	for _, f := range c.feeds {
		of, synced, err := f.state()
		if err != nil {
			errs = append(errs, err)
		} else if !synced {
			errs = append(errs, fmt.Errorf("listing %s: %w", f.resource, errNotSynced))
		}
		contacts = append(contacts, f.contact())
		complete = complete && synced
		for key, text := range of {
			texts[f.kind+" "+key] = text
		}
	}
	// The worst that any of them says; of ContactNone nothing follows.
	if next := slices.Max(contacts); next != ContactNone && next != c.contact.Value() {
		c.contact.Store(next)
	}
	if !complete {
		// A part of the policies is not what the cluster says: what is missing may be
		// a DENY, or the ALLOW without which everything is allowed.
		c.publish(errors.Join(errs...))
		return 0
	}
	again, err := c.confirm(ctx, texts)
	if err != nil {
		errs = append(errs, err)
		if !c.synced {
			c.publish(errors.Join(errs...))
			return again
		}
	}
	c.synced = true
	c.put(texts)
	c.publish(errors.Join(errs...))
	return again
}

// confirm makes sure that what is missing was removed by somebody who meant it, and
// puts back what was not, or not yet. When a type is removed from the cluster, its
// resources go first, one by one: that opens what they close, and is no policy.
func (c *Cluster) confirm(ctx context.Context, texts map[string][]byte) (again time.Duration, err error) {
	var missing []string
	for key := range c.texts {
		if _, ok := texts[key]; !ok {
			missing = append(missing, key)
		}
	}
	if len(missing) == 0 && c.synced {
		c.removals = time.Time{}
		return 0, nil
	}
	putBack := func(of func(key string) bool) {
		for _, key := range missing {
			if of(key) {
				texts[key] = c.texts[key].text
			}
		}
	}
	all := func(string) bool { return true }
	if c.removals.IsZero() {
		c.removals = time.Now()
	}
	if wait := settleRemovals - time.Since(c.removals); wait > 0 && c.synced {
		putBack(all)
		return wait, nil
	}
	served, err := c.served(ctx)
	if err != nil {
		putBack(all)
		return retryServed, fmt.Errorf("asking whether the types of policies are served: %w", err)
	}
	var gone []string
	for _, f := range c.feeds {
		if served[f.resource] {
			continue
		}
		gone = append(gone, f.resource)
		putBack(func(key string) bool { return strings.HasPrefix(key, f.kind+" ") })
	}
	if len(gone) > 0 {
		return retryServed, fmt.Errorf("the API server does not serve %v, or no longer lets them be created: the type is being removed; install Istio's CRDs", gone)
	}
	c.removals = time.Time{}
	return 0, nil
}

// put makes texts the policies in force, if they are not yet.
func (c *Cluster) put(texts map[string][]byte) {
	changed := c.snapshot.Load() == nil || len(texts) != len(c.texts)
	docs := make(map[string]clusterDoc, len(texts))
	for key, text := range texts {
		d, ok := c.texts[key]
		if !ok || !bytes.Equal(d.text, text) {
			changed = true
			d.text = text
			d.resources, d.problems = authz.Parse(key, text)
		}
		docs[key] = d
	}
	if !changed {
		return
	}
	c.texts = docs
	var all []authz.Resource
	for _, key := range slices.Sorted(maps.Keys(docs)) {
		all = append(all, docs[key].resources...)
	}
	c.compile(all)
}

// compile puts the resources that there are into force.
func (c *Cluster) compile(all []authz.Resource) {
	var together []authz.Problem
	c.set, together = c.set.Update(all)
	snapshot, compiled := c.follow(c.set, c.options)
	c.compiled = slices.Concat(together, compiled)
	for res, state := range c.set.All() {
		key := res.Kind() + " " + res.Namespace() + "/" + res.Name()
		d, ok := c.texts[key]
		if !ok {
			continue
		}
		switch state {
		case authz.StateGood:
			d.good = d.text
		case authz.StateRefused:
			d.good = nil
		}
		c.texts[key] = d
	}
	generation := c.replace(snapshot, c.set)
	c.export.Store(&exported{docs: c.texts})
	c.log.Info("policies loaded", "generation", generation, "resources", c.set.Len())
}

// publish makes known how the policies fare: err is why they may be out of date.
func (c *Cluster) publish(err error) {
	var problems []authz.Problem
	for _, key := range slices.Sorted(maps.Keys(c.texts)) {
		problems = append(problems, c.texts[key].problems...)
	}
	problems = append(problems, c.compiled...)
	now := time.Now()
	c.mu.Lock()
	if err != nil && c.status.err == nil {
		c.status.good = now // until now it was what the cluster said
	}
	c.mu.Unlock()
	was := c.tell(c.log, problems, err, now)
	switch {
	case err != nil && (was == nil || errors.Is(was, errNotSynced) && was.Error() != err.Error()):
		c.metrics.failed.Inc()
		c.log.Warn("the policies of the cluster cannot be followed; the last ones stay in force", "err", err)
	case err == nil && was != nil:
		c.log.Info("following the policies of the cluster")
	}
}

// Ready is nil if the snapshot is what the cluster says, or why that is not known.
// Decisions go on with the last snapshot in either case, and deny where there is
// none. Bad resources do not make it unready: what they deny is denied on purpose.
func (c *Cluster) Ready() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.status.err == nil:
		return nil
	case c.status.good.IsZero():
		return fmt.Errorf("reading the policies of the cluster: %w; every check is denied until then", c.status.err)
	}
	return fmt.Errorf("reading the policies of the cluster: %w; those of %s stay in force",
		c.status.err, c.status.good.UTC().Format(time.RFC3339))
}

// Export is the policies in force, for a successor, and a channel that is closed
// when they change. It is nil while there are none.
func (c *Cluster) Export() (saved []byte, changed <-chan struct{}) {
	e, changed := c.export.Load()
	if e == nil {
		return nil, changed
	}
	body, err := e.encode()
	if err != nil {
		c.log.Warn("policies cannot be saved; after a restart that does not reach the API server every check would be denied", "err", err)
		return nil, changed
	}
	c.mu.Lock()
	good := c.status.good
	if c.status.err == nil {
		good = time.Now()
	}
	c.mu.Unlock()
	return withHeader(good, body), changed
}

// Contact says how it stands with the API server, and has a channel that is closed
// when that may have changed.
func (c *Cluster) Contact() (contact Contact, changed <-chan struct{}) { return c.contact.Load() }

// Contact is whether an API server answers.
type Contact uint8

const (
	// ContactNone: it was asked and has not answered yet, or only that it is busy.
	ContactNone Contact = iota
	// ContactAnswers: it answers, be it that it refuses.
	ContactAnswers
	// ContactAway: it cannot be reached, says that it cannot do its work, or has been
	// too busy for a minute.
	ContactAway
)

// unreachable reports whether the error says that nobody answered, or that the API
// server cannot do its work.
func unreachable(err error) bool {
	var s apierrors.APIStatus
	if errors.As(err, &s) {
		code := s.Status().Code
		return code >= 500 || code == 0
	}
	return !errors.Is(err, errNoSuchType)
}

// errNoSuchType is the API server's answer for a type without a CRD.
var errNoSuchType = errors.New("the API server does not serve this type; install Istio's CRDs")
