package integration_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/integration/kubetest"

	api "istio.io/api/security/v1beta1"
	security "istio.io/client-go/pkg/apis/security/v1"
	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
)

// pair is two authorities with a root each and one Lease. Which of them wrote the
// ConfigMap of roots is seen from what is in it.
type pair struct {
	t         *testing.T
	cluster   *kubetest.Cluster
	namespace string
	a, b      *kubeCA

	mu    sync.Mutex
	roots []string // each content that the ConfigMap had, in order; guarded by mu
}

func newPair(t *testing.T, bin string, c *kubetest.Cluster, namespace, kubeconfig string) *pair {
	p := &pair{t: t, cluster: c, namespace: namespace}
	p.watch()
	for i, k := range []**kubeCA{&p.a, &p.b} {
		*k = kubeCAWith(t, bin, c, "kubeconfig: "+kubeconfig+", namespace: "+namespace, fmt.Sprintf("instance: %d\n", i+1))
		(*k).start("signet-ca")
		p.holds(p.a)
	}
	return p
}

// watch notes every content of the ConfigMap, until the test ends.
func (p *pair) watch() {
	maps := p.cluster.Kube.CoreV1().ConfigMaps(p.namespace)
	ctx, cancel := context.WithCancel(context.Background())
	w, err := maps.Watch(ctx, metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", "signet-trust").String()})
	if err != nil {
		p.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for e := range w.ResultChan() {
			if m, ok := e.Object.(*core.ConfigMap); ok && e.Type != "DELETED" {
				p.mu.Lock()
				p.roots = append(p.roots, m.Data["root.pem"])
				p.mu.Unlock()
			}
		}
	}()
	p.t.Cleanup(func() { cancel(); w.Stop(); <-done })
}

// seen is what was noted so far.
func (p *pair) seen() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.roots...)
}

// holds waits until the Lease is k's, and returns how long that took.
func (p *pair) holds(k *kubeCA) time.Duration {
	p.t.Helper()
	want := "-1"
	if k == p.b {
		want = "-2"
	}
	began := time.Now()
	kubetest.Poll(p.t, "the Lease to be that of instance "+want[1:], func() error {
		l, err := p.cluster.Kube.CoordinationV1().Leases(p.namespace).Get(p.t.Context(), "signet-ca", metav1.GetOptions{})
		if err == nil && (l.Spec.HolderIdentity == nil || !strings.HasSuffix(*l.Spec.HolderIdentity, want)) {
			err = fmt.Errorf("it is held by %v", l.Spec.HolderIdentity)
		}
		return err
	})
	return time.Since(began)
}

// published waits until somebody has written another root than before, and returns it.
func (p *pair) published(before string) string {
	p.t.Helper()
	var root string
	kubetest.Poll(p.t, "the roots to be published", func() error {
		all := p.seen()
		if len(all) == 0 || all[len(all)-1] == before || all[len(all)-1] == "" {
			return errors.New("not yet")
		}
		root = all[len(all)-1]
		return nil
	})
	return root
}

// tookOver is what must be true after the second took over: it did in time, and from
// then on only its root was written, however much there was to repair.
func (p *pair) tookOver(first string, meanwhile func()) {
	t := p.t
	t.Helper()
	// The Lease lasts 15 s, is renewed every two seconds, and looked at as often: how long
	// nobody is elected at most is tested in package kube, by a clock of its own.
	t.Logf("the second took over after %v", p.holds(p.b).Round(100*time.Millisecond))
	second := p.published(first)
	meanwhile()
	for range 5 {
		// It may be there again before Delete returns.
		before := len(p.seen())
		if err := p.cluster.Kube.CoreV1().ConfigMaps(p.namespace).Delete(t.Context(), "signet-trust", metav1.DeleteOptions{}); err == nil {
			kubetest.Poll(t, "the ConfigMap to be made again", func() error {
				if len(p.seen()) == before {
					return errors.New("not yet")
				}
				return nil
			})
		}
	}
	turned := 0
	for i, root := range p.seen() {
		switch {
		case root != first && root != second:
			t.Errorf("write %d is nobody's", i)
		case root == second:
			turned++
		case turned > 0:
			t.Fatalf("write %d is the first one's, after %d writes of the second", i, turned)
		}
	}
	t.Logf("%d writes of the first, then %d of the second", len(p.seen())-turned, turned)
}

// TestTwoReplicas: of two authorities with one Lease one has the duties. When it is
// killed the other one takes over within the time of the Lease; when it is only stopped
// for so long, and goes on, it does nothing any more.
func TestTwoReplicas(t *testing.T) {
	t.Parallel()
	bin := programs(t)
	c := kubetest.Start(t, kubetest.Options{})
	c.Apply(t, "../deploy/manifests")
	c.Namespace(t, "other")
	t.Run("killed", func(t *testing.T) {
		t.Parallel()
		p := newPair(t, bin, c, "signet-system", c.Kubeconfig(t, c.As(t, "signet-system", "signet-ca")))
		first := p.published("")
		p.a.stop("signet-ca", syscall.SIGKILL)
		p.tookOver(first, func() {})
	})
	t.Run("stopped for a while", func(t *testing.T) {
		t.Parallel()
		p := newPair(t, bin, c, "other", c.Kubeconfig(t, c.Admin()))
		first := p.published("")
		a := p.a.procs["signet-ca"].cmd.Process
		if err := a.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = a.Signal(syscall.SIGCONT) })
		p.tookOver(first, func() {
			if err := a.Signal(syscall.SIGCONT); err != nil {
				t.Fatal(err)
			}
		})
	})
	t.Run("events are refused", func(t *testing.T) {
		t.Parallel()
		c.Namespace(t, "full")
		c.ApplyYAML(t, `
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {name: no-events}
spec:
  matchConstraints:
    resourceRules:
    - {apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [events]}
  validations:
  - {expression: "object.metadata.namespace != 'full'", message: there are too many}
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata: {name: no-events}
spec: {policyName: no-events, validationActions: [Deny]}
`)
		written := 0
		kubetest.Poll(t, "Events to be refused", func() error {
			_, err := c.Kube.CoreV1().Events("full").Create(t.Context(), &core.Event{ObjectMeta: metav1.ObjectMeta{GenerateName: "e-"},
				InvolvedObject: core.ObjectReference{Namespace: "full"}}, metav1.CreateOptions{})
			if err == nil {
				written++
				return errors.New("one was written")
			}
			if !strings.Contains(err.Error(), "there are too many") {
				t.Fatal(err)
			}
			return nil
		})
		c.Namespace(t, "third")
		k := kubeCAWith(t, bin, c, "kubeconfig: "+c.Kubeconfig(t, c.Admin())+", namespace: third", "")
		k.start("signet-ca")
		began := time.Now()
		const policies = 30 // in a minute: none may wait for its Event
		for i := range policies {
			p := &security.AuthorizationPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "full", Name: fmt.Sprintf("bad-%d", i)},
				Spec: api.AuthorizationPolicy{Rules: []*api.Rule{{To: []*api.Rule_To{{Operation: &api.Operation{Paths: []string{"/a/{*}/b/{**}/{**}"}}}}}}}}
			if _, err := c.Istio.SecurityV1().AuthorizationPolicies("full").Create(t.Context(), p, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		kubetest.Poll(t, "the conditions", func() error {
			list, err := c.Istio.SecurityV1().AuthorizationPolicies("full").List(t.Context(), metav1.ListOptions{})
			if err != nil {
				return err
			}
			for _, p := range list.Items {
				if len(p.Status.GetConditions()) == 0 {
					return fmt.Errorf("%s has none", p.Name)
				}
			}
			return nil
		})
		t.Logf("the conditions of %d policies took %v", policies, time.Since(began).Round(time.Millisecond))
		if events, err := c.Kube.CoreV1().Events("full").List(t.Context(), metav1.ListOptions{}); err != nil || len(events.Items) > written {
			t.Errorf("%d Events were written, %v", len(events.Items)-written, err)
		}
		kubetest.Poll(t, "the log to say that an Event was refused", func() error {
			if !strings.Contains(k.procs["signet-ca"].log.String(), "there are too many") {
				return errors.New("it does not")
			}
			return nil
		})
	})
}
