package kube

import (
	"context"
	"fmt"
	"time"

	"github.com/go-logr/logr"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

// livePods leaves with the API server what could not count here anyway.
const livePods = "spec.nodeName!=,status.phase!=Succeeded,status.phase!=Failed"

// backoff is between attempts to list and watch: a few authorities may come back
// quickly, and until they do, new pods wait.
func backoff() *wait.Backoff {
	return &wait.Backoff{Duration: 200 * time.Millisecond, Factor: 1.6, Jitter: 0.5, Steps: 10, Cap: 5 * time.Second}
}

// watch keeps the view up to date until ctx ends.
func (c *Cluster) watch(ctx context.Context) error {
	names, err := metadata.NewForConfigAndClient(c.rest, c.http)
	if err != nil {
		return fmt.Errorf("watching Kubernetes: %w", err)
	}
	pods := c.core.Pods("")
	var g errgroup.Group
	g.Go(func() error {
		c.reflect(ctx, podsResource, &corev1.Pod{}, podStore{c.view}, &cache.ListWatch{
			ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				o.FieldSelector = livePods
				return pods.List(ctx, o)
			},
			WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
				o.FieldSelector = livePods
				return pods.Watch(ctx, o)
			},
		})
		return nil
	})
	for _, r := range []struct {
		resource string
		store    uidStore
	}{{"nodes", uidStore{c.view.nodeUIDs()}}, {"serviceaccounts", uidStore{c.view.accountUIDs()}}} {
		get := names.Resource(schema.GroupVersionResource{Version: "v1", Resource: r.resource})
		g.Go(func() error {
			c.reflect(ctx, r.store.u.resource, &metav1.PartialObjectMetadata{}, r.store, &cache.ListWatch{
				ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return get.List(ctx, o) },
				WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
					return get.Watch(ctx, o)
				},
			})
			return nil
		})
	}
	return g.Wait()
}

// reflect hands what the API server has of a resource on to store until ctx ends:
// one watch, of which client-go's reflector takes up the thread again, or reads
// all anew where the API server has lost it.
func (c *Cluster) reflect(ctx context.Context, resource string, kind runtime.Object, store cache.ReflectorStore, lw *cache.ListWatch) {
	list, watching := lw.ListWithContextFunc, lw.WatchFuncWithContext
	noted := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			l, err := list(ctx, o)
			c.note(ctx, resource, err)
			return l, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			w, err := watching(ctx, o)
			c.note(ctx, resource, err)
			return w, err
		},
	}
	log := logr.FromContextOrDiscard(ctx)
	r := cache.NewReflectorWithOptions(noted, kind, store, cache.ReflectorOptions{
		Name: resource, TypeDescription: resource, Logger: (*klog.Logger)(&log), Backoff: backoff(),
	})
	r.RunWithContext(ctx)
}

// note keeps whether the API server answers, and says so when that changes.
func (c *Cluster) note(ctx context.Context, resource string, err error) {
	if ctx.Err() != nil {
		return
	}
	c.view.mu.Lock()
	before := c.view.failed[resource]
	c.view.failed[resource] = err
	c.view.mu.Unlock()
	if err != nil {
		c.metrics.failures.WithLabelValues(resource).Inc()
	}
	switch {
	case err != nil && before == nil:
		c.log.Warn("the API server cannot be watched; what is known stays, and it is tried again", "resource", resource, "err", err)
	case err == nil && before != nil:
		c.log.Info("the API server can be watched again", "resource", resource)
	}
}

// podStore is the reflector's way into the view.
type podStore struct{ v *view }

func (s podStore) Add(obj any) error {
	o, ok := obj.(*corev1.Pod)
	if !ok {
		return fmt.Errorf("%T instead of a pod", obj)
	}
	s.v.setPod(key(o.Namespace, o.Name), podOf(o))
	return nil
}

func (s podStore) Update(obj any) error { return s.Add(obj) }

func (s podStore) Delete(obj any) error {
	o, ok := obj.(*corev1.Pod)
	if !ok {
		return fmt.Errorf("%T instead of a pod", obj)
	}
	s.v.setPod(key(o.Namespace, o.Name), nil)
	return nil
}

func (s podStore) Replace(list []any, _ string) error {
	all := make(map[string]*pod, len(list))
	for _, obj := range list {
		o, ok := obj.(*corev1.Pod)
		if !ok {
			return fmt.Errorf("%T instead of a pod", obj)
		}
		if p := podOf(o); p != nil {
			all[key(o.Namespace, o.Name)] = p
		}
	}
	s.v.replacePods(all)
	return nil
}

func (podStore) Resync() error { return nil }

// Transformer strips a pod while it is read, so that a list of thousands is never
// held whole.
func (podStore) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) {
		o, ok := obj.(*corev1.Pod)
		if !ok {
			return obj, nil
		}
		return &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: o.Namespace, Name: o.Name, UID: o.UID, Labels: o.Labels,
				DeletionTimestamp: o.DeletionTimestamp, ResourceVersion: o.ResourceVersion},
			Spec:   corev1.PodSpec{NodeName: o.Spec.NodeName, ServiceAccountName: o.Spec.ServiceAccountName},
			Status: corev1.PodStatus{Phase: o.Status.Phase, PodIPs: o.Status.PodIPs},
		}, nil
	}
}

// uidStore is the reflector's way to the UIDs of nodes and service accounts.
type uidStore struct{ u *uids }

func (s uidStore) Add(obj any) error {
	o, ok := obj.(*metav1.PartialObjectMetadata)
	if !ok {
		return fmt.Errorf("%T instead of metadata", obj)
	}
	s.u.set(o)
	return nil
}

func (s uidStore) Update(obj any) error { return s.Add(obj) }

func (s uidStore) Delete(obj any) error {
	o, ok := obj.(*metav1.PartialObjectMetadata)
	if !ok {
		return fmt.Errorf("%T instead of metadata", obj)
	}
	s.u.delete(o)
	return nil
}

func (s uidStore) Replace(list []any, _ string) error {
	all := make([]*metav1.PartialObjectMetadata, 0, len(list))
	for _, obj := range list {
		o, ok := obj.(*metav1.PartialObjectMetadata)
		if !ok {
			return fmt.Errorf("%T instead of metadata", obj)
		}
		all = append(all, o)
	}
	s.u.replace(all)
	return nil
}

func (uidStore) Resync() error { return nil }

// Transformer strips an object of everything but its name and UID.
func (uidStore) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) {
		m, err := meta.Accessor(obj)
		if err != nil {
			return obj, nil
		}
		return &metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Namespace: m.GetNamespace(), Name: m.GetName(), UID: m.GetUID(),
			DeletionTimestamp: m.GetDeletionTimestamp(), ResourceVersion: m.GetResourceVersion()}}, nil
	}
}
