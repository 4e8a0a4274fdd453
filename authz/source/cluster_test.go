package source_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	security "istio.io/api/security/v1beta1"
	typev1beta1 "istio.io/api/type/v1beta1"
	istio "istio.io/client-go/pkg/apis/security/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/source"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/integration/kubetest"
)

// cluster is a Cluster under test.
type cluster struct {
	*source.Cluster
	t    *testing.T
	log  *buffer
	reg  *prometheus.Registry
	stop func()
}

// follow runs a Cluster until the test ends or stop is called.
func follow(t *testing.T, cfg *rest.Config, saved []byte) *cluster {
	t.Helper()
	c := &cluster{t: t, log: &buffer{}, reg: prometheus.NewRegistry()}
	var err error
	c.Cluster, err = source.NewCluster(source.ClusterConfig{REST: cfg, Saved: saved, Metrics: c.reg,
		Log: slog.New(slog.NewTextHandler(c.log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	stopped := false
	c.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run ended with %v", err)
		}
	}
	t.Cleanup(func() {
		c.stop()
		if t.Failed() {
			t.Log(c.log.String())
		}
	})
	return c
}

func (c *cluster) ready() {
	c.t.Helper()
	kubetest.Poll(c.t, "the policies to be followed", c.Ready)
}

func (c *cluster) notReady(says string) {
	c.t.Helper()
	kubetest.Poll(c.t, "the policies not to be followed, because "+says, func() error {
		if err := c.Ready(); err == nil || !strings.Contains(err.Error(), says) {
			return fmt.Errorf("Ready says %v", err)
		}
		return nil
	})
}

// in waits for the contact with the API server to be as it should.
func (c *cluster) in(want source.Contact) {
	c.t.Helper()
	kubetest.Poll(c.t, fmt.Sprintf("contact %d", want), func() error {
		if got, _ := c.Contact(); got != want {
			return fmt.Errorf("contact %d", got)
		}
		return nil
	})
}

// decide is the reason of the decision on a GET of a path for a workload of a
// namespace with the label app: web.
func (c *cluster) decide(namespace, path string) authz.Reason {
	c.t.Helper()
	w := identity.Workload{Namespace: namespace, ServiceAccount: "web", Labels: map[string]string{"app": "web"}}
	d := c.Snapshot().For(w).Decide(&authz.Request{Known: authz.FieldsHTTP, HTTP: true, Method: []byte("GET"), Path: []byte(path), Host: []byte("web")})
	if d.Allowed != (d.Reason == authz.ReasonAllowRule || d.Reason == authz.ReasonNoAllowPolicy) {
		c.t.Fatalf("allowed %t because %s", d.Allowed, d.Reason)
	}
	return d.Reason
}

func (c *cluster) soon(namespace, path string, want authz.Reason) {
	c.t.Helper()
	kubetest.Poll(c.t, fmt.Sprintf("%s in %s to be decided by %s", path, namespace, want), func() error {
		if got := c.decide(namespace, path); got != want {
			return fmt.Errorf("it is decided by %s", got)
		}
		return nil
	})
}

func (c *cluster) age() float64 {
	c.t.Helper()
	families, err := c.reg.Gather()
	if err != nil {
		c.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "signet_source_age_seconds" {
			return f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	c.t.Fatal("no metric of the age")
	return 0
}

// policy takes the paths, as an ALLOW or a DENY.
func policy(name string, action security.AuthorizationPolicy_Action, paths ...string) *istio.AuthorizationPolicy {
	return &istio.AuthorizationPolicy{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "shop", Annotations: map[string]string{
		"kubectl.kubernetes.io/last-applied-configuration": "{}", "note": "<stays & \u2028 😀>"}},
		Spec: security.AuthorizationPolicy{
			Selector: &typev1beta1.WorkloadSelector{MatchLabels: map[string]string{"app": "web"}}, Action: action,
			Rules: []*security.Rule{{To: []*security.Rule_To{{Operation: &security.Operation{Paths: paths}}}}},
		}}
}

const (
	allow = security.AuthorizationPolicy_ALLOW
	deny  = security.AuthorizationPolicy_DENY
)

func create(t *testing.T, k *kubetest.Cluster, p *istio.AuthorizationPolicy) *istio.AuthorizationPolicy {
	t.Helper()
	p, err := k.Istio.SecurityV1().AuthorizationPolicies(p.Namespace).Create(t.Context(), p, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func remove(t *testing.T, k *kubetest.Cluster, name string) {
	t.Helper()
	if err := k.Istio.SecurityV1().AuthorizationPolicies("shop").Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
}

// unsupported edits a policy so that it asks for what Istio admits and nobody here
// enforces yet, in a field that the API server keeps.
func invalid(t *testing.T, k *kubetest.Cluster, name string) {
	t.Helper()
	patch := `{"spec":{"rules":[{"to":[{"operation":{"paths":["/a{*}b"]}}]}]}}`
	if _, err := k.Istio.SecurityV1().AuthorizationPolicies("shop").Patch(t.Context(), name, "application/merge-patch+json", []byte(patch), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
}

func TestClusterIsFollowed(t *testing.T) {
	t.Parallel()
	k := kubetest.Start(t, kubetest.Options{NoPolicyTypes: true})
	k.Namespace(t, "shop")
	c := follow(t, k.Admin(), nil)

	// Without the types nothing is known: that is not "no policies".
	c.notReady("install Istio's CRDs")
	if got := c.decide("shop", "/"); got != authz.ReasonNoPolicies || c.Snapshot() != nil {
		t.Errorf("without the types: %s", got)
	}
	c.in(source.ContactAnswers) // one that says that there is no such type is not away
	if age := c.age(); !(age > 1e300) {
		t.Errorf("the age of nothing is %v, want +Inf", age)
	}
	k.InstallPolicyTypes(t)
	c.ready()
	if got := c.decide("shop", "/"); got != authz.ReasonNoAllowPolicy || c.age() != 0 {
		t.Errorf("without policies: %s, age %v", got, c.age())
	}

	began := time.Now()
	create(t, k, policy("web", allow, "/public"))
	c.soon("shop", "/private", authz.ReasonNoAllowRule)
	t.Logf("a policy counted %v after it was asked for", time.Since(began).Round(time.Millisecond))
	if got := c.decide("shop", "/public"); got != authz.ReasonAllowRule {
		t.Errorf("/public: %s", got)
	}
	if got := c.decide("other", "/private"); got != authz.ReasonNoAllowPolicy {
		t.Errorf("another namespace: %s", got)
	}
	create(t, k, policy("closed", deny, "/public"))
	c.soon("shop", "/public", authz.ReasonDenyRule)

	// A status is no change of a policy.
	generation := c.Generation()
	got, err := k.Istio.SecurityV1().AuthorizationPolicies("shop").Get(t.Context(), "web", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	got.Status.ObservedGeneration = 7
	if _, err := k.Istio.SecurityV1().AuthorizationPolicies("shop").UpdateStatus(t.Context(), got, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	// A bad edit leaves the last good version, and says so.
	invalid(t, k, "web")
	kubetest.Poll(t, "a problem", func() error {
		for _, p := range c.Problems() {
			if strings.Contains(p.Error(), "AuthorizationPolicy shop/web") {
				return nil
			}
		}
		return fmt.Errorf("problems are %v", c.Problems())
	})
	if got := c.decide("shop", "/private"); got != authz.ReasonNoAllowRule {
		t.Errorf("after a bad edit /private is decided by %s", got)
	}
	if n := c.Generation(); n != generation+1 {
		t.Errorf("%d snapshots for a changed status and an edit, want 1", n-generation)
	}
	remove(t, k, "closed")
	c.soon("shop", "/public", authz.ReasonAllowRule)

	// What is saved counts after a restart, the last good version included, also if
	// nobody answers.
	saved, _ := c.Export()
	c.stop()
	k.APIServer.Kill(t)
	again := follow(t, k.Admin(), saved)
	if got := again.decide("shop", "/private"); got != authz.ReasonNoAllowRule {
		t.Errorf("saved: /private is decided by %s", got)
	}
	if got := again.decide("shop", "/public"); got != authz.ReasonAllowRule {
		t.Errorf("saved: /public is decided by %s", got)
	}
	again.notReady("stay in force")
	again.in(source.ContactAway)
	if age := again.age(); age <= 0 || age > 600 {
		t.Errorf("the age of saved policies is %v", age)
	}
	// Without a saved state there is nothing to decide by.
	if got := follow(t, k.Admin(), nil).decide("shop", "/public"); got != authz.ReasonNoPolicies {
		t.Errorf("nothing saved and nobody there: %s", got)
	}
	k.APIServer.Start(t)
	again.ready()
	again.in(source.ContactAnswers)
	if age := again.age(); age != 0 {
		t.Errorf("age %v after the API server is back", age)
	}
	if got := again.decide("shop", "/private"); got != authz.ReasonNoAllowRule {
		t.Errorf("back again: /private is decided by %s", got)
	}
}

// TestRemovedTypesOpenNothing: when a CRD is deleted, its resources are deleted
// first. No policy says that what they close is to be open.
func TestRemovedTypesOpenNothing(t *testing.T) {
	t.Parallel()
	k := kubetest.Start(t, kubetest.Options{})
	k.Namespace(t, "shop")
	c := follow(t, k.Admin(), nil)
	for i := range 20 {
		create(t, k, policy(fmt.Sprintf("web-%d", i), allow, "/public"))
	}
	create(t, k, policy("closed", deny, "/public"))
	c.soon("shop", "/public", authz.ReasonDenyRule)
	c.soon("shop", "/private", authz.ReasonNoAllowRule)

	resources, err := dynamic.NewForConfig(k.Admin())
	if err != nil {
		t.Fatal(err)
	}
	crds := resources.Resource(schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"})
	const name = "authorizationpolicies.security.istio.io"
	if err := crds.Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	kubetest.Poll(t, "the type to be gone", func() error {
		if got := c.decide("shop", "/private"); got != authz.ReasonNoAllowRule {
			t.Fatalf("while the type is removed: /private is decided by %s", got)
		}
		if got := c.decide("shop", "/public"); got != authz.ReasonDenyRule {
			t.Fatalf("while the type is removed: /public is decided by %s", got)
		}
		if _, err := crds.Get(t.Context(), name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("it is there: %v", err)
		}
		if c.Ready() == nil {
			return errors.New("the agent has not noticed")
		}
		return nil
	})
	c.notReady("install Istio's CRDs")
	// A restart in this state knows no more.
	saved, _ := c.Export()
	c.stop()
	again := follow(t, k.Admin(), saved)
	again.notReady("install Istio's CRDs")
	if got := again.decide("shop", "/public"); got != authz.ReasonDenyRule {
		t.Errorf("after a restart without the type: /public is decided by %s", got)
	}
	// The other types go on.
	strict := &istio.PeerAuthentication{ObjectMeta: metav1.ObjectMeta{Name: "strict", Namespace: "other"},
		Spec: security.PeerAuthentication{Mtls: &security.PeerAuthentication_MutualTLS{Mode: security.PeerAuthentication_MutualTLS_STRICT}}}
	k.Namespace(t, "other")
	if _, err := k.Istio.SecurityV1().PeerAuthentications("other").Create(t.Context(), strict, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	// Once the types are back, what the cluster says counts: there are no policies.
	k.InstallPolicyTypes(t)
	again.ready()
	again.soon("shop", "/private", authz.ReasonNoAllowPolicy)
	again.soon("other", "/", authz.ReasonPlaintext)
}

// TestOutagesChangeNothing kills and restarts what stands behind the policies, and
// changes policies while nobody looks.
func TestOutagesChangeNothing(t *testing.T) {
	t.Parallel()
	k := kubetest.Start(t, kubetest.Options{})
	k.Namespace(t, "shop")
	create(t, k, policy("web", allow, "/public"))
	c := follow(t, k.Admin(), nil)
	c.soon("shop", "/private", authz.ReasonNoAllowRule)
	holds := func(what string) {
		t.Helper()
		if got := c.decide("shop", "/private"); got != authz.ReasonNoAllowRule {
			t.Errorf("%s: /private is decided by %s", what, got)
		}
	}

	k.APIServer.Kill(t)
	c.notReady("refused")
	holds("the API server is dead")
	k.NewServingCertificate(t)
	k.APIServer.Start(t)
	create(t, k, policy("closed", deny, "/public"))
	c.soon("shop", "/public", authz.ReasonDenyRule)
	c.ready()

	k.Etcd.Kill(t)
	holds("etcd is dead")
	k.Etcd.Start(t)
	k.APIServer.WaitReady(t)
	remove(t, k, "closed")
	c.soon("shop", "/public", authz.ReasonAllowRule)
	holds("etcd is back")
	c.ready()
}

// broken is a proxy before the API server, which spoils what it is told to.
type broken struct {
	*httptest.Server
	watches, lists atomic.Int64
	// end ends every watch when it is closed; tooOld answers watches with "too old
	// resource version"; empty answers lists of policies with nothing, as a server
	// does whose cache is not filled.
	end    atomic.Pointer[ending]
	tooOld atomic.Bool
	failed atomic.Bool // every list fails
	busy   atomic.Bool // everything is put off
}

func breakable(t *testing.T, k *kubetest.Cluster) (*broken, *rest.Config) {
	t.Helper()
	target, err := url.Parse(k.URL)
	if err != nil {
		t.Fatal(err)
	}
	transport, err := rest.TransportFor(k.Admin())
	if err != nil {
		t.Fatal(err)
	}
	b := &broken{}
	b.end.Store(&ending{now: make(chan struct{})})
	proxy := httputil.NewSingleHostReverseProxy(target)
	proxy.Transport, proxy.FlushInterval = transport, -1
	proxy.ErrorHandler = func(w http.ResponseWriter, r *http.Request, _ error) {
		if r.Context().Err() != nil {
			// A watch that was ended before it began is an empty one, as from an API
			// server, and not one that cannot do its work.
			w.Header().Set("Content-Type", "application/json")
			return
		}
		w.WriteHeader(http.StatusBadGateway)
	}
	b.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasPrefix(r.URL.Path, "/apis/security.istio.io/v1/") {
			proxy.ServeHTTP(w, r)
			return
		}
		if b.busy.Load() {
			http.Error(w, "come back later", http.StatusTooManyRequests)
			return
		}
		if r.URL.Query().Get("watch") == "" {
			b.lists.Add(1)
			if b.failed.Load() {
				http.Error(w, "no", http.StatusInternalServerError)
				return
			}
			proxy.ServeHTTP(w, r)
			return
		}
		b.watches.Add(1)
		if b.tooOld.Load() {
			w.Header().Set("Content-Type", "application/json")
			fmt.Fprintln(w, `{"type":"ERROR","object":{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Expired","code":410,"message":"too old resource version: 1 (2)"}}`)
			return
		}
		ctx, cancel := context.WithCancel(r.Context())
		defer cancel()
		end := b.join()
		defer end.open.Add(-1)
		go func() {
			select {
			case <-end.now:
				cancel()
			case <-ctx.Done():
			}
		}()
		proxy.ServeHTTP(w, r.WithContext(ctx))
	}))
	t.Cleanup(b.Close)
	return b, &rest.Config{Host: b.URL, QPS: -1}
}

// ending is what ends watches.
type ending struct {
	now  chan struct{} // closed to end them
	open atomic.Int64  // how many there are
}

// join is the ending that a watch which begins now will have.
func (b *broken) join() *ending {
	for {
		end := b.end.Load()
		end.open.Add(1)
		if b.end.Load() == end {
			return end
		}
		end.open.Add(-1) // it was ended in between
	}
}

// endWatches ends all watches that are open now, and waits until nothing more can come
// through them.
func (b *broken) endWatches(t *testing.T) {
	t.Helper()
	former := b.end.Swap(&ending{now: make(chan struct{})})
	close(former.now)
	kubetest.Poll(t, "watches to end", func() error {
		if n := former.open.Load(); n > 0 {
			return fmt.Errorf("%d are open", n)
		}
		return nil
	})
}

func TestWatchesThatEndLoseNothing(t *testing.T) {
	t.Parallel()
	k := kubetest.Start(t, kubetest.Options{})
	k.Namespace(t, "shop")
	create(t, k, policy("web", allow, "/public"))
	proxy, cfg := breakable(t, k)
	c := follow(t, cfg, nil)
	c.soon("shop", "/private", authz.ReasonNoAllowRule)
	c.ready()

	// Nobody sees the policies shrink while watches end, and nothing is missed.
	stop := make(chan struct{})
	opened := make(chan int, 1)
	go func() {
		n := 0
		for {
			select {
			case <-stop:
				opened <- n
				return
			// A state stays until the next event of the API server, for milliseconds.
			case <-time.After(200 * time.Microsecond):
				if c.decide("shop", "/private") != authz.ReasonNoAllowRule {
					n++
				}
			}
		}
	}()
	for i := range 5 {
		watches := proxy.watches.Load()
		proxy.endWatches(t)
		name := fmt.Sprintf("closed-%d", i)
		create(t, k, policy(name, deny, "/"+name))
		c.soon("shop", "/"+name, authz.ReasonDenyRule)
		kubetest.Poll(t, "new watches", func() error {
			if n := proxy.watches.Load(); n < watches+3 {
				return fmt.Errorf("%d, want %d", n, watches+3)
			}
			return nil
		})
	}
	// Versions that the server no longer has: everything is listed again, also while
	// that fails for some time.
	lists := proxy.lists.Load()
	proxy.failed.Store(true)
	proxy.tooOld.Store(true)
	proxy.endWatches(t)
	remove(t, k, "closed-0")
	create(t, k, policy("closed-5", deny, "/closed-5"))
	c.notReady("listing")
	if got := c.decide("shop", "/closed-0"); got != authz.ReasonDenyRule {
		t.Errorf("while lists fail /closed-0 is decided by %s", got)
	}
	proxy.failed.Store(false)
	c.soon("shop", "/closed-5", authz.ReasonDenyRule)
	proxy.tooOld.Store(false)
	c.soon("shop", "/closed-0", authz.ReasonNoAllowRule)
	c.ready()
	if n := proxy.lists.Load(); n <= lists {
		t.Errorf("%d lists after versions were too old, before %d", n, lists)
	}
	// An API server that puts off requests is said to be busy, and is not away: that
	// would make expired tokens last.
	proxy.busy.Store(true)
	proxy.endWatches(t)
	c.notReady("too many requests")
	// The watches that were cut are noticed one after the other.
	kubetest.Poll(t, "the busy API server to count as one that answers", func() error {
		if got, _ := c.Contact(); got != source.ContactAnswers {
			return fmt.Errorf("the contact is %d", got)
		}
		return nil
	})
	create(t, k, policy("closed-6", deny, "/closed-6"))
	proxy.busy.Store(false)
	c.soon("shop", "/closed-6", authz.ReasonDenyRule)
	c.ready()
	close(stop)
	if n := <-opened; n > 0 {
		t.Errorf("%d decisions without the ALLOW policy", n)
	}
}

// TestBusyIsNotAway: requests that are put off say nothing of an API server, until that
// has lasted for a minute.
func TestBusyIsNotAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		busy := apierrors.NewTooManyRequests("later", 1)
		f := source.NewFeed()
		says := func(want source.Contact, errs ...error) {
			t.Helper()
			for _, err := range errs {
				f.Tried(t.Context(), err)
			}
			if got := f.Contact(); got != want {
				t.Errorf("after %v the contact is %d, want %d", errs, got, want)
			}
		}
		says(source.ContactNone)
		says(source.ContactNone, busy)
		says(source.ContactAway, errors.New("connection refused"))
		says(source.ContactNone, busy) // perhaps it is only coming back
		time.Sleep(time.Minute - time.Nanosecond)
		says(source.ContactNone, busy)
		time.Sleep(time.Nanosecond)
		says(source.ContactAway, busy)
		says(source.ContactAnswers, apierrors.NewForbidden(schema.GroupResource{}, "", nil))
		says(source.ContactNone, busy)
		says(source.ContactAway, apierrors.NewServiceUnavailable("no"))
	})
}

// TestOnlyOneStateCounts: while one of the types cannot be listed, nothing of the
// others counts at a first start; what was saved does.
func TestOnlyOneStateCounts(t *testing.T) {
	t.Parallel()
	k := kubetest.Start(t, kubetest.Options{})
	k.Namespace(t, "shop")
	create(t, k, policy("web", allow, "/public"))
	k.ServiceAccount(t, "shop", "reader")
	k.ApplyYAML(t, `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: reader}
rules: [{apiGroups: [security.istio.io], resources: [authorizationpolicies, peerauthentications], verbs: [list, watch]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: reader}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: reader}
subjects: [{kind: ServiceAccount, namespace: shop, name: reader}]
`)
	c := follow(t, k.As(t, "shop", "reader"), nil)
	c.notReady("requestauthentications")
	if got := c.decide("shop", "/public"); got != authz.ReasonNoPolicies {
		t.Errorf("/public is decided by %s", got)
	}
	c.in(source.ContactAnswers) // one that forbids is not away
	k.ApplyYAML(t, `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: reader}
rules: [{apiGroups: [security.istio.io], resources: [authorizationpolicies, peerauthentications, requestauthentications], verbs: [list, watch]}]
`)
	c.ready()
	if got := c.decide("shop", "/public"); got != authz.ReasonAllowRule {
		t.Errorf("/public is decided by %s", got)
	}
}

// TestUnknownFieldsAreSeen: a field that only a newer CRD has is not lost on the way,
// it is refused.
func TestUnknownFieldsAreSeen(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		switch {
		case r.URL.Query().Get("watch") != "":
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		case strings.HasSuffix(r.URL.Path, "/v1"):
			fmt.Fprint(w, `{"kind":"APIResourceList","resources":[{"name":"authorizationpolicies","verbs":["create"]},{"name":"peerauthentications","verbs":["create"]},{"name":"requestauthentications","verbs":["create"]}]}`)
		case strings.HasSuffix(r.URL.Path, "/authorizationpolicies"):
			fmt.Fprint(w, `{"kind":"AuthorizationPolicyList","apiVersion":"security.istio.io/v1","metadata":{"resourceVersion":"7"},"items":[
				{"kind":"AuthorizationPolicy","apiVersion":"security.istio.io/v1","metadata":{"name":"a","namespace":"shop","managedFields":[{}],"newMetadata":1},
				 "spec":{"rules":[{"from":[{"source":{"moonPhases":["full"]}}]}]},"status":{"x":1}}]}`)
		default:
			fmt.Fprint(w, `{"kind":"List","apiVersion":"security.istio.io/v1","metadata":{"resourceVersion":"7"},"items":[]}`)
		}
	}))
	defer server.CloseClientConnections()
	c := follow(t, &rest.Config{Host: server.URL}, nil)
	c.ready()
	if got := c.decide("shop", "/"); got != authz.ReasonInvalid {
		t.Errorf("decided by %s, want invalid", got)
	}
	if p := c.Problems(); len(p) != 1 || !strings.Contains(p[0].Error(), "moonPhases") {
		t.Errorf("problems: %v", p)
	}
	c.stop()
	server.CloseClientConnections()
	server.Close()
}

func TestSavedPoliciesAreChecked(t *testing.T) {
	t.Parallel()
	docs := source.SavedForTest(t, `{"apiVersion":"security.istio.io/v1","kind":"AuthorizationPolicy","metadata":{"name":"a","namespace":"shop"},"spec":{}}`)
	cfg := &rest.Config{Host: "http://127.0.0.1:1"}
	open := func(saved []byte) *source.Cluster {
		c, err := source.NewCluster(source.ClusterConfig{REST: cfg, Saved: saved})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	if c := open(docs); c.Snapshot() == nil {
		t.Fatal("saved policies are not used")
	} else if again, _ := c.Export(); open(again).Snapshot() == nil {
		t.Error("what was loaded is not saved again")
	}
	// Each byte changed: the policies are used whole or not at all.
	for i := range docs {
		bad := append([]byte(nil), docs...)
		bad[i] ^= 0x20
		c := open(bad)
		if s := c.Snapshot(); s != nil {
			if d := s.For(identity.Workload{Namespace: "shop"}).Decide(&authz.Request{Known: authz.FieldsHTTP}); d.Allowed {
				t.Errorf("byte %d changed: allowed", i)
			}
		}
	}
	for i := range docs {
		if open(docs[:i]).Snapshot() != nil {
			t.Errorf("cut after %d bytes: used", i)
		}
	}
	newer := append([]byte(`{"version":2,"good":"2026-01-01T00:00:00Z"}`), docs[strings.IndexByte(string(docs), '\n'):]...)
	if open(newer).Snapshot() != nil {
		t.Error("a newer format is used")
	}
}
