package kube

import (
	"context"
	"fmt"
	"maps"
	"strconv"
	"time"

	"github.com/signet-mesh/signet/identity"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

// The ConfigMap, in the namespace of the installation, that agents pin the
// authority's roots from, and its one key.
const (
	TrustConfigMap = "signet-trust"
	TrustKey       = "root.pem"
	// sequenceAnnotation is for people: under which sequence number the bundle
	// was published.
	sequenceAnnotation = "signet.dev/sequence"
)

const trustResource = "the ConfigMap " + TrustConfigMap

// publishTrust keeps the ConfigMap as it must be until ctx ends. It watches that
// one object, so an edit by somebody else is undone at once, and at a bounded rate
// where somebody insists.
func (c *Cluster) publishTrust(ctx context.Context, trust func() (*identity.Trust, <-chan struct{})) error {
	api := c.core.ConfigMaps(c.cfg.Namespace)
	only := fields.OneTermEqualSelector("metadata.name", TrustConfigMap).String()
	seen := &identity.Watched[seenMap]{}
	// The selector leaves one object at most.
	put := func(o *corev1.ConfigMap) { seen.Store(seenMap{true, o}) }
	remove := func(*corev1.ConfigMap) { seen.Store(seenMap{read: true}) }
	one := store[corev1.ConfigMap]{put: put, remove: remove, replace: func(all []*corev1.ConfigMap) {
		remove(nil)
		for _, o := range all {
			put(o)
		}
	}}
	watching := make(chan struct{})
	go func() {
		defer close(watching)
		c.reflect(ctx, trustResource, &corev1.ConfigMap{}, one, &cache.ListWatch{
			ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				o.FieldSelector = only
				return api.List(ctx, o)
			},
			WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
				o.FieldSelector = only
				return api.Watch(ctx, o)
			},
		})
	}()
	defer func() { <-watching }()
	limit := rate.NewLimiter(rate.Every(time.Second), 5)
	failed := false
	for {
		t, trustChanged := trust()
		now, mapChanged := seen.Load()
		var again <-chan time.Time
		if now.read {
			wrote, err := c.putTrust(ctx, now.object, t)
			switch {
			case ctx.Err() != nil:
				return nil
			case err != nil:
				if !failed {
					c.log.Warn("the trust bundle cannot be published; it is tried again until it succeeds", "configmap", TrustConfigMap, "err", err)
				}
				failed, again = true, time.After(time.Second)
			case wrote != "":
				failed = false
				c.metrics.repairs.Inc()
				c.log.Info("trust bundle published", "configmap", TrustConfigMap, "namespace", c.cfg.Namespace, "sequence", t.Sequence(), "why", wrote)
			default:
				failed = false
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-trustChanged:
		case <-mapChanged:
		case <-again:
		}
		if err := limit.Wait(ctx); err != nil {
			return nil
		}
	}
}

// putTrust makes the ConfigMap what it must be, where now (nil: it does not exist)
// differs, and says why it wrote. What it was compared with must still be there:
// a conflict is an error, and the watch brings what there is instead.
func (c *Cluster) putTrust(ctx context.Context, now *corev1.ConfigMap, t *identity.Trust) (why string, err error) {
	api := c.duty.ConfigMaps(c.cfg.Namespace)
	data := map[string]string{TrustKey: string(t.PEM())}
	sequence := strconv.FormatUint(t.Sequence(), 10)
	want := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{
		Namespace: c.cfg.Namespace, Name: TrustConfigMap,
		Labels:      map[string]string{"app.kubernetes.io/name": "signet", "app.kubernetes.io/component": "ca"},
		Annotations: map[string]string{sequenceAnnotation: sequence},
	}, Data: data}
	if now == nil {
		if _, err := api.Create(ctx, want, metav1.CreateOptions{}); err != nil {
			return "", fmt.Errorf("creating it: %w", err)
		}
		return "it did not exist", nil
	}
	correct := maps.Equal(now.Data, data) && len(now.BinaryData) == 0
	frozen := now.Immutable != nil && *now.Immutable
	switch {
	case now.DeletionTimestamp != nil:
		// Somebody's finalizer holds it; nothing of it can be made right but data.
		if correct || frozen {
			return "", nil
		}
	case frozen:
		// Also where it is correct: it could not follow the next change.
		if err := api.Delete(ctx, TrustConfigMap, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: (*types.UID)(&now.UID)}}); err != nil && !apierrors.IsNotFound(err) {
			return "", fmt.Errorf("replacing it, because it was made immutable: %w", err)
		}
		return "it was made immutable, and is created again", nil
	case correct && now.Annotations[sequenceAnnotation] == sequence:
		return "", nil
	}
	// Labels and annotations of others stay; data is ours alone.
	want.ResourceVersion, want.UID = now.ResourceVersion, now.UID
	want.Finalizers, want.OwnerReferences = now.Finalizers, now.OwnerReferences
	want.Labels, want.Annotations = merged(now.Labels, want.Labels), merged(now.Annotations, want.Annotations)
	if _, err := api.Update(ctx, want, metav1.UpdateOptions{}); err != nil {
		return "", fmt.Errorf("updating it: %w", err)
	}
	return "it differed", nil
}

func merged(a, b map[string]string) map[string]string {
	m := maps.Clone(a)
	if m == nil {
		m = map[string]string{}
	}
	maps.Copy(m, b)
	return m
}

// seenMap is what is known of a ConfigMap: nothing yet, or the object, nil where there
// is none.
type seenMap struct {
	read   bool
	object *corev1.ConfigMap
}
