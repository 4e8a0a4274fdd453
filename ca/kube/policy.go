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
	api, err := dynamic.NewForConfigAndClient(plain, c.http)
	if err != nil {
		return fmt.Errorf("watching policies: %w", err)
	}
	var g errgroup.Group
	for _, gvr := range policyResources {
		queue := newPolicyQueue()
		r := api.Resource(gvr)
		g.Go(func() error {
			c.reflect(ctx, gvr.Resource, &unstructured.Unstructured{}, queue, &cache.ListWatch{
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
			for attempt := 0; ; {
				o := queue.next(ctx)
				if o == nil {
					return nil
				}
				err := c.reportPolicy(ctx, r, o, check)
				switch {
				case err == nil || apierrors.IsConflict(err) || apierrors.IsNotFound(err):
					// It changed or went meanwhile; the watch brings what there is.
					attempt = 0
				case ctx.Err() != nil:
					return nil
				default:
					if attempt++; attempt == 1 {
						c.log.Warn("reporting a policy that is not enforced failed; it is tried again", "kind", o.GetKind(), "namespace", o.GetNamespace(), "policy", o.GetName(), "err", err)
					}
					queue.retry(o)
					if !pause(ctx, time.Second) {
						return nil
					}
				}
			}
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
// second writing of it fail, as it should.
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
	if want.Status == "False" {
		if err := c.policyEvent(ctx, o, want, now); err != nil {
			return err
		}
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
	_, err := c.core.Events(o.GetNamespace()).Create(ctx, &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{Namespace: o.GetNamespace(), Name: name + "." + hex.EncodeToString(sum[:8])},
		InvolvedObject: corev1.ObjectReference{APIVersion: o.GetAPIVersion(), Kind: o.GetKind(), Namespace: o.GetNamespace(), Name: o.GetName(),
			UID: o.GetUID(), ResourceVersion: o.GetResourceVersion()},
		Type: corev1.EventTypeWarning, Reason: why.Reason, Message: why.Message,
		Source: corev1.EventSource{Component: "signet-ca"}, ReportingController: "signet.dev/ca", ReportingInstance: c.cfg.Name,
		FirstTimestamp: metav1.NewTime(now), LastTimestamp: metav1.NewTime(now), Count: 1,
	}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("writing an Event about it: %w", err)
	}
	return nil
}

// clip cuts s to n bytes at the end of a character.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n-len("…")], "") + "…"
}

// policyQueue holds the newest version of each policy that was not looked at yet.
type policyQueue struct {
	mu    sync.Mutex
	todo  map[string]*unstructured.Unstructured // guarded by mu
	order []string                              // keys of todo, guarded by mu
	more  chan struct{}                         // one element
}

func newPolicyQueue() *policyQueue {
	return &policyQueue{todo: map[string]*unstructured.Unstructured{}, more: make(chan struct{}, 1)}
}

// next is a policy to look at; nil when ctx ended.
func (q *policyQueue) next(ctx context.Context) *unstructured.Unstructured {
	for {
		q.mu.Lock()
		for len(q.order) > 0 {
			k := q.order[0]
			q.order = q.order[1:]
			if o := q.todo[k]; o != nil {
				delete(q.todo, k)
				q.mu.Unlock()
				return o
			}
		}
		q.mu.Unlock()
		select {
		case <-q.more:
		case <-ctx.Done():
			return nil
		}
	}
}

func (q *policyQueue) put(o *unstructured.Unstructured, newer bool) {
	k := key(o.GetNamespace(), o.GetName())
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.todo[k] == nil {
		q.order = append(q.order, k)
	} else if !newer {
		return
	}
	q.todo[k] = o
	select {
	case q.more <- struct{}{}:
	default:
	}
}

// retry puts back a policy that was looked at, unless a newer version waits.
func (q *policyQueue) retry(o *unstructured.Unstructured) { q.put(o, false) }

func (q *policyQueue) Add(obj any) error {
	o, ok := obj.(*unstructured.Unstructured)
	if !ok {
		return fmt.Errorf("%T instead of a policy", obj)
	}
	q.put(o, true)
	return nil
}

func (q *policyQueue) Update(obj any) error { return q.Add(obj) }

func (q *policyQueue) Delete(obj any) error {
	if o, ok := obj.(*unstructured.Unstructured); ok {
		q.mu.Lock()
		delete(q.todo, key(o.GetNamespace(), o.GetName()))
		q.mu.Unlock()
	}
	return nil
}

func (q *policyQueue) Replace(list []any, _ string) error {
	q.mu.Lock()
	clear(q.todo)
	q.order = nil
	q.mu.Unlock()
	for _, obj := range list {
		if err := q.Add(obj); err != nil {
			return err
		}
	}
	return nil
}

func (*policyQueue) Resync() error { return nil }

// Transformer drops who manages which field.
func (*policyQueue) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) {
		if o, ok := obj.(*unstructured.Unstructured); ok {
			o.SetManagedFields(nil)
		}
		return obj, nil
	}
}
