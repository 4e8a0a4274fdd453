package kube

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
)

// PolicyProblem is a reason why a policy is not enforced as it is written.
type PolicyProblem struct {
	// Reason is a word in CamelCase, for machines.
	Reason string
	// Message says what is wrong, and what to do.
	Message string
}

// policyCondition is the condition that is False while a policy is not enforced as
// it is written. A policy that never had a problem has no such condition: with
// thousands of them nobody wants as many writes.
const policyCondition = "signet.dev/Enforced"

// maxPolicyMessage is how many bytes a condition or Event says at most; an Event
// takes 1024.
const maxPolicyMessage = 1000

// eventTimeout bounds writing an Event.
const eventTimeout = 5 * time.Second

var policyResources = []schema.GroupVersionResource{
	{Group: "security.istio.io", Version: "v1", Resource: "authorizationpolicies"},
	{Group: "security.istio.io", Version: "v1", Resource: "peerauthentications"},
	{Group: "security.istio.io", Version: "v1", Resource: "requestauthentications"},
}

// reportPolicies tells, until ctx ends, the authors of policies that are not
// enforced as written.
func (c *Cluster) reportPolicies(ctx context.Context, check func([]byte) []PolicyProblem) error {
	// Policies are read as the API server has them and not through somebody's
	// types, so that nothing of them is lost before they are checked.
	plain := rest.CopyConfig(c.rest)
	plain.ContentType, plain.AcceptContentTypes = "application/json", "application/json"
	api, err := dynamic.NewForConfigAndClient(plain, c.dutyHTTP)
	if err != nil {
		return fmt.Errorf("watching policies: %w", err)
	}
	var g errgroup.Group
	for _, gvr := range policyResources {
		todo := newPolicies()
		r := api.Resource(gvr)
		g.Go(func() error {
			c.reflect(ctx, gvr.Resource, &unstructured.Unstructured{}, todo.store(), &cache.ListWatch{
				ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
					return r.List(ctx, o)
				},
				WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
					return r.Watch(ctx, o)
				},
			})
			return nil
		})
		g.Go(func() error {
			defer context.AfterFunc(ctx, todo.queue.ShutDown)()
			todo.work(func(o *unstructured.Unstructured, attempt int) error {
				if ctx.Err() != nil {
					return nil
				}
				err := c.reportPolicy(ctx, r, o, check)
				switch {
				case err == nil || ctx.Err() != nil || apierrors.IsConflict(err) || apierrors.IsNotFound(err):
					// It changed or went meanwhile: the watch brings what there is.
					return nil
				case attempt == 0:
					c.log.Warn("reporting a policy that is not enforced failed; it is tried again", "kind", o.GetKind(), "namespace", o.GetNamespace(), "policy", o.GetName(), "err", err)
				}
				return err
			})
			return nil
		})
	}
	return g.Wait()
}

// condition is one of a policy's status.conditions.
type condition struct {
	Type               string `json:"type"`
	Status             string `json:"status"`
	Reason             string `json:"reason,omitempty"`
	Message            string `json:"message,omitempty"`
	LastTransitionTime string `json:"lastTransitionTime,omitempty"`
	ObservedGeneration int64  `json:"observedGeneration,omitempty,string"`
}

// reportPolicy writes the Event and then the condition, so that a replica which
// ends in between is followed by one that writes both; the Event's name makes the
// second writing of it fail, as it should. An Event that cannot be written (a quota, a
// namespace that is going) holds the condition back by eventTimeout at most.
func (c *Cluster) reportPolicy(ctx context.Context, api dynamic.NamespaceableResourceInterface, o *unstructured.Unstructured, check func([]byte) []PolicyProblem) error {
	body := o.DeepCopy()
	delete(body.Object, "status")
	body.SetManagedFields(nil)
	text, err := json.Marshal(body)
	if err != nil {
		return fmt.Errorf("encoding it: %w", err)
	}
	want := condition{Type: policyCondition, Status: "True", Reason: "Enforced", Message: "enforced as written"}
	if problems := check(text); len(problems) > 0 {
		want.Status, want.Reason = "False", problems[0].Reason
		var all []string
		for _, p := range problems {
			all = append(all, p.Message)
		}
		want.Message = clip(strings.Join(all, "; "), maxPolicyMessage)
	}
	want.ObservedGeneration = o.GetGeneration()
	others, before := conditionsOf(o)
	if before == nil && want.Status == "True" {
		return nil
	}
	if before != nil && before["status"] == want.Status && before["reason"] == want.Reason && before["message"] == want.Message && fmt.Sprint(before["observedGeneration"]) == fmt.Sprint(want.ObservedGeneration) {
		return nil
	}
	now := time.Now().UTC()
	want.LastTransitionTime = now.Format(time.RFC3339)
	if before != nil && before["status"] == want.Status {
		if t, ok := before["lastTransitionTime"].(string); ok {
			want.LastTransitionTime = t
		}
	}
	var untold error
	if want.Status == "False" {
		untold = c.policyEvent(ctx, o, want, now)
	}
	// The resource version makes the list of conditions, which is replaced whole,
	// that of the policy that was read.
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"resourceVersion": o.GetResourceVersion(), "uid": o.GetUID()},
		"status":   map[string]any{"conditions": append(others, want)},
	})
	if err != nil {
		return fmt.Errorf("encoding its condition: %w", err)
	}
	if _, err := api.Namespace(o.GetNamespace()).Patch(ctx, o.GetName(), types.MergePatchType, patch, metav1.PatchOptions{}, "status"); err != nil {
		return fmt.Errorf("writing its condition: %w", err)
	}
	if untold != nil {
		c.log.Warn("a policy's condition was written, and the Event that says the same was not", "kind", o.GetKind(), "namespace", o.GetNamespace(), "policy", o.GetName(), "err", untold)
	}
	c.metrics.policies.WithLabelValues(want.Status).Inc()
	c.log.Info("reported a policy's condition", "kind", o.GetKind(), "namespace", o.GetNamespace(), "policy", o.GetName(), "enforced", want.Status, "reason", want.Reason)
	return nil
}

// conditionsOf are the policy's conditions of others, and ours, nil if it has none.
func conditionsOf(o *unstructured.Unstructured) (others []any, own map[string]any) {
	all, _, _ := unstructured.NestedSlice(o.Object, "status", "conditions")
	for _, c := range all {
		if m, ok := c.(map[string]any); ok && m["type"] == policyCondition {
			own = m
			continue
		}
		others = append(others, c)
	}
	return others, own
}

// policyEvent creates the one Event for a version of a policy.
func (c *Cluster) policyEvent(ctx context.Context, o *unstructured.Unstructured, why condition, now time.Time) error {
	sum := sha256.Sum256([]byte(fmt.Sprint(o.GetUID(), "/", o.GetGeneration(), "/", why.Reason, "/", why.Message)))
	name := o.GetName()
	if len(name) > 200 {
		name = strings.TrimRight(name[:200], ".-")
	}
	ctx, cancel := context.WithTimeout(ctx, eventTimeout)
	defer cancel()
	_, err := c.duty.Events(o.GetNamespace()).Create(ctx, &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{Namespace: o.GetNamespace(), Name: name + "." + hex.EncodeToString(sum[:8])},
		InvolvedObject: corev1.ObjectReference{APIVersion: o.GetAPIVersion(), Kind: o.GetKind(), Namespace: o.GetNamespace(), Name: o.GetName(),
			UID: o.GetUID(), ResourceVersion: o.GetResourceVersion()},
		Type: corev1.EventTypeWarning, Reason: why.Reason, Message: why.Message,
		Source: corev1.EventSource{Component: "signet-ca"}, ReportingController: "signet.dev/ca", ReportingInstance: c.cfg.Name,
		FirstTimestamp: metav1.NewTime(now), LastTimestamp: metav1.NewTime(now), Count: 1,
	}, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	return err
}

// clip cuts s to n bytes at the end of a character.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n-len("…")], "") + "…"
}

// policies are those that have to be looked at: the newest version of each. One that
// failed is tried again ever more slowly, and keeps nobody else waiting.
type policies struct {
	queue workqueue.TypedRateLimitingInterface[string]
	mu    sync.Mutex
	todo  map[string]*unstructured.Unstructured // by NAMESPACE/NAME; guarded by mu
}

func newPolicies() *policies {
	return &policies{todo: map[string]*unstructured.Unstructured{},
		queue: workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](time.Second, time.Minute))}
}

// work hands each to report, with the number of attempts that failed before, until the
// queue is shut down.
func (p *policies) work(report func(o *unstructured.Unstructured, attempt int) error) {
	for {
		k, down := p.queue.Get()
		if down {
			return
		}
		p.mu.Lock()
		o := p.todo[k]
		p.mu.Unlock()
		if o != nil && report(o, p.queue.NumRequeues(k)) != nil {
			p.queue.AddRateLimited(k)
		} else {
			p.queue.Forget(k)
			p.mu.Lock()
			if p.todo[k] == o {
				delete(p.todo, k)
			}
			p.mu.Unlock()
		}
		p.queue.Done(k)
	}
}

// store is the reflector's way to them.
func (p *policies) store() store[unstructured.Unstructured] {
	put := func(o *unstructured.Unstructured) {
		k := key(o.GetNamespace(), o.GetName())
		p.mu.Lock()
		p.todo[k] = o
		p.mu.Unlock()
		p.queue.Add(k)
	}
	return store[unstructured.Unstructured]{
		put: put,
		remove: func(o *unstructured.Unstructured) {
			p.mu.Lock()
			defer p.mu.Unlock()
			delete(p.todo, key(o.GetNamespace(), o.GetName()))
		},
		replace: func(all []*unstructured.Unstructured) {
			p.mu.Lock()
			clear(p.todo)
			p.mu.Unlock()
			for _, o := range all {
				put(o)
			}
		},
		strip: func(o *unstructured.Unstructured) *unstructured.Unstructured {
			o.SetManagedFields(nil)
			return o
		},
	}
}
