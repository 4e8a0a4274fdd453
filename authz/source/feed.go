package source

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/go-logr/logr"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

const (
	// listTimeout bounds one page of a list.
	listTimeout = 30 * time.Second
	// firstBackoff and maxBackoff bound the time between two attempts to reach the
	// API server; it doubles, with as much again at random.
	firstBackoff = 200 * time.Millisecond
	maxBackoff   = 5 * time.Second
	// busyFor is how long the API server may put off requests (429) until it counts as
	// away.
	busyFor = time.Minute
)

// feed follows the resources of one kind. Its methods Add to Resync are what
// client-go's reflector calls.
type feed struct {
	kind     string
	resource string // its name in URLs
	client   dynamic.ResourceInterface
	wake     func() // something changed

	mu     sync.Mutex
	texts  map[string][]byte // by NAMESPACE/NAME; guarded by mu
	synced bool              // the list was complete once; guarded by mu
	err    error             // why the last request failed; guarded by mu
	busy   time.Time         // since when the API server puts off requests; zero: it does not; guarded by mu
}

// state is what a feed has: all resources as of one moment, whether that was ever
// complete, and why it may be out of date now.
func (f *feed) state() (texts map[string][]byte, synced bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.texts), f.synced, f.err
}

// contact is what the last request says of the API server. One that puts off requests
// is neither here nor there, until that has lasted for busyFor: everybody comes back
// at once after an outage, and who makes it busy must not make tokens last longer.
func (f *feed) contact() Contact {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case apierrors.IsTooManyRequests(f.err):
		if time.Since(f.busy) >= busyFor {
			return ContactAway
		}
		return ContactNone
	case f.err != nil && unreachable(f.err):
		return ContactAway
	case f.err != nil || f.synced:
		return ContactAnswers
	}
	return ContactNone
}

// run follows the resources until ctx ends.
func (f *feed) run(ctx context.Context) {
	quiet := logr.Discard() // what goes wrong is told by tried, once for each outage
	r := cache.NewReflectorWithOptions(f, &unstructured.Unstructured{}, f, cache.ReflectorOptions{
		Logger: &quiet, Name: f.resource, TypeDescription: f.kind,
		Backoff: &wait.Backoff{Duration: firstBackoff, Cap: maxBackoff, Steps: 6, Factor: 2, Jitter: 1},
	})
	r.RunWithContext(klog.NewContext(ctx, quiet))
}

var _ cache.ListerWatcherWithContext = (*feed)(nil)

// ListWithContext implements [cache.ListerWatcherWithContext].
func (f *feed) ListWithContext(ctx context.Context, opt metav1.ListOptions) (runtime.Object, error) {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	if opt.ResourceVersion == "0" {
		// That may be answered from a cache that lags behind what a predecessor of
		// this process has seen.
		opt.ResourceVersion = ""
	}
	list, err := f.client.List(ctx, opt)
	f.tried(ctx, "listing", err)
	if err != nil {
		return nil, err
	}
	return list, nil
}

// WatchWithContext implements [cache.ListerWatcherWithContext].
func (f *feed) WatchWithContext(ctx context.Context, opt metav1.ListOptions) (apiwatch.Interface, error) {
	w, err := f.client.Watch(ctx, opt)
	f.tried(ctx, "watching", err)
	return w, err
}

// List implements [cache.ListerWatcher]; the reflector does not call it.
func (f *feed) List(opt metav1.ListOptions) (runtime.Object, error) {
	return f.ListWithContext(context.Background(), opt)
}

// Watch implements [cache.ListerWatcher]; the reflector does not call it.
func (f *feed) Watch(opt metav1.ListOptions) (apiwatch.Interface, error) {
	return f.WatchWithContext(context.Background(), opt)
}

// IsWatchListSemanticsUnSupported has the reflector list, and then watch: every API
// server can do that, and both verbs are used.
func (f *feed) IsWatchListSemanticsUnSupported() bool { return true }

// tried notes how a request went. A version that the server no longer has is not an
// error: the reflector lists again.
func (f *feed) tried(ctx context.Context, what string, err error) {
	if err != nil && (ctx.Err() == context.Canceled || apierrors.IsResourceExpired(err) || apierrors.IsGone(err)) {
		return
	}
	if err != nil {
		if apierrors.IsNotFound(err) {
			err = errNoSuchType
		}
		err = fmt.Errorf("%s %s: %w", what, f.resource, err)
	}
	f.mu.Lock()
	before := f.err
	f.err = err
	if !apierrors.IsTooManyRequests(err) {
		f.busy = time.Time{}
	} else if f.busy.IsZero() {
		f.busy = time.Now()
	}
	f.mu.Unlock()
	if err != nil || before != nil {
		f.wake()
	}
}

// Add implements [cache.ReflectorStore].
func (f *feed) Add(obj any) error { return f.put(obj) }

// Update implements [cache.ReflectorStore].
func (f *feed) Update(obj any) error { return f.put(obj) }

func (f *feed) put(obj any) error {
	key, text, err := textOf(obj)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.texts[key] = text
	f.wake()
	return nil
}

// Delete implements [cache.ReflectorStore].
func (f *feed) Delete(obj any) error {
	u, ok := obj.(*unstructured.Unstructured)
	if !ok {
		return fmt.Errorf("a %T was deleted", obj)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.texts, keyOf(u))
	f.wake()
	return nil
}

// Replace implements [cache.ReflectorStore]: a list that is complete.
func (f *feed) Replace(objects []any, _ string) error {
	texts := make(map[string][]byte, len(objects))
	for _, obj := range objects {
		key, text, err := textOf(obj)
		if err != nil {
			return err
		}
		texts[key] = text
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.texts, f.synced = texts, true
	f.wake()
	return nil
}

// Resync implements [cache.ReflectorStore].
func (f *feed) Resync() error { return nil }

func keyOf(u *unstructured.Unstructured) string { return u.GetNamespace() + "/" + u.GetName() }

// textOf is a resource as [authz.Parse] takes it, as the API server sent it: fields
// that this version does not know must be seen, and refused, not lost in a type of
// ours. What the API server keeps for others is left out, so that a changed status
// is no change.
func textOf(obj any) (key string, text []byte, err error) {
	u, ok := obj.(*unstructured.Unstructured)
	if !ok {
		return "", nil, fmt.Errorf("a %T was received", obj)
	}
	kept := make(map[string]any, len(u.Object))
	for name, value := range u.Object {
		if name != "status" && name != "metadata" {
			kept[name] = value
		}
	}
	metadata := map[string]any{}
	if all, ok := u.Object["metadata"].(map[string]any); ok {
		for _, name := range []string{"name", "namespace", "creationTimestamp"} {
			if value, ok := all[name]; ok {
				metadata[name] = value
			}
		}
		if annotations, ok := all["annotations"].(map[string]any); ok {
			copied := maps.Clone(annotations)
			delete(copied, lastApplied)
			if len(copied) > 0 {
				metadata["annotations"] = copied
			}
		}
	}
	kept["metadata"] = metadata
	text, err = (&unstructured.Unstructured{Object: kept}).MarshalJSON()
	if err != nil {
		return "", nil, fmt.Errorf("%s: %w", keyOf(u), err)
	}
	return keyOf(u), bytes.TrimRight(text, "\n"), nil
}

// lastApplied is kubectl's copy of the whole resource.
const lastApplied = "kubectl.kubernetes.io/last-applied-configuration"
