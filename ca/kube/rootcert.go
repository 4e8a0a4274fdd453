package kube

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/signet-mesh/signet/identity"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/tools/cache"
)

// The ConfigMap of each namespace under which Istio's clients verify whoever issues
// their certificates, its one key that is ours, and the label that it has in
// istiod's hands.
const (
	RootCertConfigMap  = "istio-ca-root-cert"
	RootCertKey        = "root-cert.pem"
	rootCertLabel      = "istio.io/config"
	rootCertResource   = "the ConfigMaps " + RootCertConfigMap
	namespacesResource = "namespaces"
)

// withoutRootCert are the namespaces that istiod leaves out, too.
var withoutRootCert = map[string]bool{"kube-public": true, "kube-node-lease": true, "local-path-storage": true}

// rootCerts is what is known of namespaces and their ConfigMaps, and which of them
// have to be looked at.
type rootCerts struct {
	mu         sync.Mutex
	namespaces map[string]bool              // names of those that are not being deleted; nil: not read yet; guarded by mu
	maps       map[string]*corev1.ConfigMap // by namespace; nil: not read yet; guarded by mu
	due        map[string]struct{}          // namespaces to look at; guarded by mu
	written    map[string]rewrite           // by namespace that there is; guarded by mu
	changed    chan struct{}                // has room for one: due is not empty
}

func newRootCerts() *rootCerts {
	return &rootCerts{due: map[string]struct{}{}, written: map[string]rewrite{}, changed: make(chan struct{}, 1)}
}

// look notes that namespaces are due; none means all. mu is held.
func (r *rootCerts) look(namespaces ...string) {
	if len(namespaces) == 0 {
		for n := range r.namespaces {
			r.due[n] = struct{}{}
		}
	}
	for _, n := range namespaces {
		r.due[n] = struct{}{}
	}
	select {
	case r.changed <- struct{}{}:
	default:
	}
}

// take returns the namespaces that are due and have to have the ConfigMap, with what
// there is, once both were read.
func (r *rootCerts) take() map[string]*corev1.ConfigMap {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.namespaces == nil || r.maps == nil {
		return nil
	}
	out := make(map[string]*corev1.ConfigMap, len(r.due))
	for n := range r.due {
		if r.namespaces[n] && !withoutRootCert[n] {
			out[n] = r.maps[n]
		}
	}
	r.due = map[string]struct{}{}
	return out
}

// publishRootCerts keeps the ConfigMap in every namespace until ctx ends. Somebody
// else who insists on other contents (an istiod whose CA is still on) is answered
// ever more slowly, so that the two do not keep the API server busy.
func (c *Cluster) publishRootCerts(ctx context.Context, trust func() (*identity.Trust, <-chan struct{})) error {
	names, err := metadata.NewForConfigAndClient(c.rest, c.http)
	if err != nil {
		return fmt.Errorf("publishing %s: %w", rootCertResource, err)
	}
	known := newRootCerts()
	var watches errgroup.Group
	defer func() { _ = watches.Wait() }()
	all := names.Resource(schema.GroupVersionResource{Version: "v1", Resource: "namespaces"})
	watches.Go(func() error {
		c.reflect(ctx, namespacesResource, &metav1.PartialObjectMetadata{}, known.namespaceStore(), &cache.ListWatch{
			ListWithContextFunc:  func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return all.List(ctx, o) },
			WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) { return all.Watch(ctx, o) },
		})
		return nil
	})
	only := fields.OneTermEqualSelector("metadata.name", RootCertConfigMap).String()
	cms := c.core.ConfigMaps("")
	watches.Go(func() error {
		c.reflect(ctx, rootCertResource, &corev1.ConfigMap{}, known.mapStore(), &cache.ListWatch{
			ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				o.FieldSelector = only
				return cms.List(ctx, o)
			},
			WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
				o.FieldSelector = only
				return cms.Watch(ctx, o)
			},
		})
		return nil
	})
	failed := false
	for {
		t, trustChanged := trust()
		now := time.Now()
		wait := time.Minute
		for n, have := range known.take() {
			if next := known.next(n); now.Before(next) {
				known.again(n)
				wait = min(wait, next.Sub(now))
				continue
			}
			wrote, err := c.putRootCert(ctx, n, have, t)
			switch {
			case ctx.Err() != nil:
				return nil
			case err != nil:
				if !failed {
					c.log.Warn("a ConfigMap for Istio's clients cannot be written; it is tried again until it succeeds", "configmap", RootCertConfigMap, "namespace", n, "err", err)
				}
				failed = true
				known.again(n)
				wait = min(wait, time.Second)
			case wrote:
				failed = false
				known.wrote(n, now)
				c.metrics.rootCerts.Inc()
			}
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-trustChanged:
			known.mu.Lock()
			known.look()
			known.mu.Unlock()
		case <-known.changed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// again makes a namespace due without waking anybody.
func (r *rootCerts) again(namespace string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.due[namespace] = struct{}{}
}

// next is when the ConfigMap of a namespace may be written again.
func (r *rootCerts) next(namespace string) time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.written[namespace].next()
}

// wrote notes that it was written, unless the namespace went meanwhile.
func (r *rootCerts) wrote(namespace string, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.namespaces[namespace] {
		r.written[namespace] = r.written[namespace].after(now)
	}
}

// rewrite is when a namespace's ConfigMap was written last, and how often in a row.
type rewrite struct {
	at    time.Time
	count int
}

// next is when it may be written again: after a second, and each time after twice
// as long, up to a minute.
func (w rewrite) next() time.Time {
	if w.count == 0 {
		return time.Time{}
	}
	return w.at.Add(min(time.Second<<min(w.count-1, 6), time.Minute))
}

func (w rewrite) after(now time.Time) rewrite {
	// Whoever was quiet for a while does not insist.
	if now.Sub(w.at) > 5*time.Minute {
		return rewrite{now, 1}
	}
	return rewrite{now, w.count + 1}
}

// putRootCert makes a namespace's ConfigMap what it must be, where have (nil: it
// does not exist) differs. Other keys, labels and annotations stay.
func (c *Cluster) putRootCert(ctx context.Context, namespace string, have *corev1.ConfigMap, t *identity.Trust) (wrote bool, err error) {
	api := c.duty.ConfigMaps(namespace)
	roots := string(t.PEM())
	if have == nil {
		m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: RootCertConfigMap, Labels: map[string]string{rootCertLabel: "true"}},
			Data: map[string]string{RootCertKey: roots}}
		_, err := api.Create(ctx, m, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) || apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) || apierrors.IsNotFound(err) {
			return false, nil // the watch tells the rest
		}
		if err != nil {
			return false, fmt.Errorf("creating it: %w", err)
		}
		return true, nil
	}
	frozen := have.Immutable != nil && *have.Immutable
	switch {
	case have.Data[RootCertKey] == roots && have.Labels[rootCertLabel] == "true" && !frozen, have.DeletionTimestamp != nil:
		return false, nil
	case frozen:
		// It could not follow a change of roots. The watch sees it gone, and it is
		// created again.
		err := api.Delete(ctx, RootCertConfigMap, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: (*types.UID)(&have.UID)}})
		if err != nil && !apierrors.IsNotFound(err) {
			return false, fmt.Errorf("replacing it, because it was made immutable: %w", err)
		}
		return true, nil
	}
	m := have.DeepCopy()
	m.Data = maps.Clone(m.Data)
	if m.Data == nil {
		m.Data = map[string]string{}
	}
	m.Data[RootCertKey] = roots
	delete(m.BinaryData, RootCertKey)
	m.Labels = merged(m.Labels, map[string]string{rootCertLabel: "true"})
	// What it was compared with must still be there; else the watch brings what is.
	if _, err := api.Update(ctx, m, metav1.UpdateOptions{}); apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		return false, nil
	} else if err != nil {
		return false, fmt.Errorf("updating it: %w", err)
	}
	return true, nil
}

// PutTLSSecret makes a Secret for TLS hold these files, whatever it held. It is not
// read, so the permission to create and to update is enough.
func (c *Cluster) PutTLSSecret(ctx context.Context, namespace, name string, files map[string][]byte) error {
	s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name,
		Labels: map[string]string{"app.kubernetes.io/name": "signet", "app.kubernetes.io/component": "ca"}},
		Type: corev1.SecretTypeTLS, Data: files}
	_, err := c.core.Secrets(namespace).Update(ctx, s, metav1.UpdateOptions{})
	if apierrors.IsNotFound(err) {
		_, err = c.core.Secrets(namespace).Create(ctx, s, metav1.CreateOptions{})
	}
	if err != nil {
		return fmt.Errorf("writing Secret %s/%s: %w", namespace, name, err)
	}
	return nil
}

// namespaceStore is the reflector's way to the names of namespaces.
func (r *rootCerts) namespaceStore() store[metav1.PartialObjectMetadata] {
	remove := func(name string) {
		delete(r.namespaces, name)
		delete(r.written, name)
	}
	return store[metav1.PartialObjectMetadata]{
		put: func(o *metav1.PartialObjectMetadata) {
			r.mu.Lock()
			defer r.mu.Unlock()
			if r.namespaces == nil {
				r.namespaces = map[string]bool{}
			}
			if o.DeletionTimestamp != nil {
				remove(o.Name)
			} else if !r.namespaces[o.Name] {
				r.namespaces[o.Name] = true
				r.look(o.Name)
			}
		},
		remove: func(o *metav1.PartialObjectMetadata) {
			r.mu.Lock()
			defer r.mu.Unlock()
			remove(o.Name)
		},
		replace: func(list []*metav1.PartialObjectMetadata) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.namespaces = make(map[string]bool, len(list))
			for _, o := range list {
				if o.DeletionTimestamp == nil {
					r.namespaces[o.Name] = true
				}
			}
			maps.DeleteFunc(r.written, func(name string, _ rewrite) bool { return !r.namespaces[name] })
			r.look()
		},
		strip: nameOnly,
	}
}

// mapStore is the reflector's way to the ConfigMaps.
func (r *rootCerts) mapStore() store[corev1.ConfigMap] {
	return store[corev1.ConfigMap]{
		put: func(o *corev1.ConfigMap) {
			r.mu.Lock()
			defer r.mu.Unlock()
			if r.maps == nil {
				r.maps = map[string]*corev1.ConfigMap{}
			}
			r.maps[o.Namespace] = o
			r.look(o.Namespace)
		},
		remove: func(o *corev1.ConfigMap) {
			r.mu.Lock()
			defer r.mu.Unlock()
			delete(r.maps, o.Namespace)
			r.look(o.Namespace)
		},
		replace: func(list []*corev1.ConfigMap) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.maps = make(map[string]*corev1.ConfigMap, len(list))
			for _, o := range list {
				r.maps[o.Namespace] = o
			}
			r.look()
		},
		strip: func(o *corev1.ConfigMap) *corev1.ConfigMap {
			o.ManagedFields = nil
			return o
		},
	}
}
