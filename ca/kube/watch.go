package kube

import (
	"context"
	"fmt"
	"time"

	"github.com/go-logr/logr"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
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
		c.reflect(ctx, podsResource, &corev1.Pod{}, c.view.podStore(), &cache.ListWatch{
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
		uids     *uids
	}{{"nodes", c.view.nodeUIDs()}, {"serviceaccounts", c.view.accountUIDs()}} {
		get := names.Resource(schema.GroupVersionResource{Version: "v1", Resource: r.resource})
		g.Go(func() error {
			c.reflect(ctx, r.uids.resource, &metav1.PartialObjectMetadata{}, r.uids.store(), &cache.ListWatch{
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
	if err != nil {
		c.metrics.failures.WithLabelValues(resource).Inc()
	}
	switch changed := c.view.tried(resource, err); {
	case !changed:
	case err == nil:
		c.log.Info("the API server can be watched again", "resource", resource)
	case apierrors.IsTooManyRequests(err):
		c.log.Warn("the API server is busy and puts off requests; what is known stays, and it is asked again when it says", "resource", resource, "err", err)
	default:
		c.log.Warn("the API server cannot be watched; what is known stays, and it is tried again", "resource", resource, "err", err)
	}
}

// podStore is the reflector's way into the view.
func (v *view) podStore() store[corev1.Pod] {
	return store[corev1.Pod]{
		put:    func(o *corev1.Pod) { v.setPod(key(o.Namespace, o.Name), podOf(o)) },
		remove: func(o *corev1.Pod) { v.setPod(key(o.Namespace, o.Name), nil) },
		replace: func(list []*corev1.Pod) {
			all := make(map[string]*pod, len(list))
			for _, o := range list {
				if p := podOf(o); p != nil {
					all[key(o.Namespace, o.Name)] = p
				}
			}
			v.replacePods(all)
		},
		strip: func(o *corev1.Pod) *corev1.Pod {
			return &corev1.Pod{
				ObjectMeta: metav1.ObjectMeta{Namespace: o.Namespace, Name: o.Name, UID: o.UID, Labels: o.Labels,
					DeletionTimestamp: o.DeletionTimestamp, ResourceVersion: o.ResourceVersion},
				Spec:   corev1.PodSpec{NodeName: o.Spec.NodeName, ServiceAccountName: o.Spec.ServiceAccountName},
				Status: corev1.PodStatus{Phase: o.Status.Phase, PodIPs: o.Status.PodIPs},
			}
		},
	}
}

// store is the reflector's way to the UIDs of nodes or service accounts.
func (u *uids) store() store[metav1.PartialObjectMetadata] {
	return store[metav1.PartialObjectMetadata]{put: u.set, remove: u.delete, replace: u.replace, strip: nameOnly}
}

// nameOnly leaves an object its name, its UID and whether it is being deleted.
func nameOnly(o *metav1.PartialObjectMetadata) *metav1.PartialObjectMetadata {
	return &metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Namespace: o.Namespace, Name: o.Name, UID: o.UID,
		DeletionTimestamp: o.DeletionTimestamp, ResourceVersion: o.ResourceVersion}}
}
