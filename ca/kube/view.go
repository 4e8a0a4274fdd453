package kube

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/signet-mesh/signet/identity"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// graceLeeway is how long a pod counts after its grace period has ended. It is
// what the API server gives tokens that are bound to a pod which is being deleted
// (k8s.io/kubernetes/pkg/serviceaccount/claims.go).
const graceLeeway = time.Minute

// view is what was read of pods, nodes and service accounts, and what follows from
// it: the set of pods that are alive.
type view struct {
	pods identity.Pods
	// synced is closed when all three were read once.
	synced chan struct{}
	// gone is called with the UID of each pod that left the set; it must not call
	// back. Set before the view is used.
	gone func(uid string)

	mu       sync.Mutex
	byKey    map[string]*pod                // NAMESPACE/NAME; guarded by mu
	onNode   map[string]map[string]struct{} // node → keys of pods; guarded by mu
	ofSA     map[string]map[string]struct{} // service account → keys of pods; guarded by mu
	nodes    map[string]string              // name → UID; guarded by mu
	accounts map[string]string              // NAMESPACE/NAME → UID; guarded by mu
	read     map[string]bool                // which of the three were read; guarded by mu
	failed   map[string]failure             // of what is watched and does not work; guarded by mu
	lost     time.Time                      // since when it is not kept up to date; zero if it is; guarded by mu
	back     time.Time                      // since when all can be watched again; guarded by mu
	ending   map[string]time.Time           // keys of pods that are being deleted → their end; guarded by mu
	wake     chan struct{}                  // one element: ending changed
}

// pod is what is kept of a pod, whether or not it counts. It is never changed.
type pod struct {
	w    identity.Workload // without the UIDs of node and service account
	ends time.Time         // zero unless it is being deleted
}

const (
	podsResource     = "pods"
	nodesResource    = "nodes"
	accountsResource = "service accounts"
)

func newView() *view {
	return &view{
		synced: make(chan struct{}), gone: func(string) {}, wake: make(chan struct{}, 1),
		byKey: map[string]*pod{}, onNode: map[string]map[string]struct{}{}, ofSA: map[string]map[string]struct{}{},
		nodes: map[string]string{}, accounts: map[string]string{}, read: map[string]bool{}, failed: map[string]failure{}, ending: map[string]time.Time{},
	}
}

// podOf is what counts of a pod object; nil if the pod has ended. One that is not
// on a node yet, or has no service account, as static pods have none, is not alive
// because there is no node and no account with an empty name.
func podOf(o *corev1.Pod) *pod {
	if o.Status.Phase == corev1.PodSucceeded || o.Status.Phase == corev1.PodFailed {
		return nil
	}
	p := &pod{w: identity.Workload{
		Namespace: o.Namespace, ServiceAccount: o.Spec.ServiceAccountName,
		Pod: o.Name, PodUID: string(o.UID), Node: o.Spec.NodeName, Labels: o.Labels,
	}}
	for _, ip := range o.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			p.w.Addresses = append(p.w.Addresses, a)
		}
	}
	// The deletion timestamp is when the grace period ends, not when it began.
	if o.DeletionTimestamp != nil {
		p.ends = o.DeletionTimestamp.Add(graceLeeway)
	}
	return p
}

func (p *pod) account() string { return key(p.w.Namespace, p.w.ServiceAccount) }

func key(namespace, name string) string { return namespace + "/" + name }

// alive is the workload that a pod is now; ok is false if it does not count. mu is
// held.
func (v *view) alive(p *pod, now time.Time) (w identity.Workload, ok bool) {
	if !p.ends.IsZero() && !now.Before(p.ends) {
		return w, false
	}
	w = p.w
	if w.NodeUID, ok = v.nodes[w.Node]; !ok {
		return w, false
	}
	w.ServiceAccountUID, ok = v.accounts[p.account()]
	return w, ok
}

// put keeps what is known of the pod with that key now; a nil p forgets it. gone
// is the UID that the key no longer stands for, if it stood for one. mu is held.
func (v *view) put(k string, p *pod) (gone []string) {
	if old := v.byKey[k]; old != nil {
		if p == nil || p.w.PodUID != old.w.PodUID {
			gone = []string{old.w.PodUID}
		}
		unlink(v.onNode, old.w.Node, k)
		unlink(v.ofSA, old.account(), k)
		delete(v.byKey, k)
		delete(v.ending, k)
	}
	if p == nil {
		return gone
	}
	v.byKey[k] = p
	link(v.onNode, p.w.Node, k)
	link(v.ofSA, p.account(), k)
	if !p.ends.IsZero() {
		v.ending[k] = p.ends
		select {
		case v.wake <- struct{}{}:
		default:
		}
	}
	return gone
}

func link(m map[string]map[string]struct{}, name, k string) {
	if m[name] == nil {
		m[name] = map[string]struct{}{}
	}
	m[name][k] = struct{}{}
}

func unlink(m map[string]map[string]struct{}, name, k string) {
	delete(m[name], k)
	if len(m[name]) == 0 {
		delete(m, name)
	}
}

// settle brings the set of pods up to date with what is known of the pods with
// those keys, as one change. gone are UIDs that no key stands for any more. mu is
// held.
func (v *view) settle(keys iter.Seq[string], gone ...string) {
	now := time.Now()
	var set []identity.Workload
	for k := range keys {
		p := v.byKey[k]
		if p == nil {
			continue
		}
		if w, ok := v.alive(p, now); ok {
			set = append(set, w)
		} else {
			gone = append(gone, p.w.PodUID)
		}
	}
	v.pods.Apply(set, gone)
	for _, uid := range gone {
		v.gone(uid)
	}
}

// listed is settle for all pods, after a complete list of something. mu is held.
func (v *view) listed(resource string, gone ...string) {
	v.settle(maps.Keys(v.byKey), gone...)
	v.read[resource] = true
	if v.complete() {
		select {
		case <-v.synced:
		default:
			close(v.synced)
		}
	}
}

// complete reports whether all three were read once. mu is held.
func (v *view) complete() bool {
	return v.read[podsResource] && v.read[nodesResource] && v.read[accountsResource]
}

// waiting names what was not read yet; empty if all was.
func (v *view) waiting() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	var names []string
	for _, r := range []string{podsResource, nodesResource, accountsResource} {
		if !v.read[r] {
			names = append(names, r)
		}
	}
	return strings.Join(names, ", ")
}

// failure is why something cannot be watched, and since when.
type failure struct {
	err   error
	since time.Time
}

// busyFor is how long an API server may put off requests (429) until it counts as
// away: one that is briefly busy asks everybody to come back in a second.
const busyFor = time.Minute

// away reports whether the API server has to be taken for away now.
func (f failure) away(now time.Time) bool {
	return !apierrors.IsTooManyRequests(f.err) || now.Sub(f.since) >= busyFor
}

// trouble is why the API server does not answer at the moment, or nil.
func (v *view) trouble() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	var errs []error
	for _, r := range slices.Sorted(maps.Keys(v.failed)) {
		errs = append(errs, fmt.Errorf("%s: %w", r, v.failed[r].err))
	}
	return errors.Join(errs...)
}

// away reports whether anything that is watched has to do without the API server.
func (v *view) away() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	now := time.Now()
	for _, f := range v.failed {
		if f.away(now) {
			return true
		}
	}
	return false
}

// catchUp is how long the API server may take, once it is watched again, to tell what
// happened meanwhile.
const catchUp = 10 * time.Second

// stale is since when the view is not kept up to date; zero if it is.
func (v *view) stale() (since time.Time) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.look(time.Now())
}

// look is stale, and remembers. mu is held.
func (v *view) look(now time.Time) (since time.Time) {
	for _, f := range v.failed {
		if f.away(now) && (v.lost.IsZero() || f.since.Before(v.lost)) {
			v.lost = f.since
		}
	}
	switch {
	case v.lost.IsZero():
	case len(v.failed) > 0:
		v.back = time.Time{}
	case v.back.IsZero():
		v.back = now
	case now.Sub(v.back) >= catchUp:
		v.lost, v.back = time.Time{}, time.Time{}
	}
	return v.lost
}

// tried notes how an attempt to read or watch a resource went. changed says that the
// one before went otherwise.
func (v *view) tried(resource string, err error) (changed bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	now := time.Now()
	v.look(now)
	defer v.look(now)
	before, failed := v.failed[resource]
	switch {
	case err == nil:
		delete(v.failed, resource)
		return failed
	case failed && apierrors.IsTooManyRequests(err) == apierrors.IsTooManyRequests(before.err):
		v.failed[resource] = failure{err, before.since}
		return false
	default:
		v.failed[resource] = failure{err, now}
		return true
	}
}

// expire takes pods out of the set whose grace period ended, until ctx ends.
func (v *view) expire(ctx context.Context) error {
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		case <-v.wake:
		}
		v.mu.Lock()
		now := time.Now()
		next := now.Add(time.Minute) // also if the wall clock is set
		var over []string
		for k, ends := range v.ending {
			if !now.Before(ends) {
				over = append(over, k)
				delete(v.ending, k)
			} else if ends.Before(next) {
				next = ends
			}
		}
		v.settle(slices.Values(over))
		v.mu.Unlock()
		t.Reset(time.Until(next))
	}
}

// replacePods takes a complete list of pods.
func (v *view) replacePods(list map[string]*pod) {
	v.mu.Lock()
	defer v.mu.Unlock()
	var gone []string
	for k := range v.byKey {
		if list[k] == nil {
			gone = append(gone, v.put(k, nil)...)
		}
	}
	for k, p := range list {
		gone = append(gone, v.put(k, p)...)
	}
	v.listed(podsResource, gone...)
}

// setPod takes what is known of one pod now; nil is nothing.
func (v *view) setPod(k string, p *pod) {
	v.mu.Lock()
	defer v.mu.Unlock()
	gone := v.put(k, p)
	v.settle(slices.Values([]string{k}), gone...)
}

// uids is the part of the view that is about names with a UID: nodes, service
// accounts.
type uids struct {
	v        *view
	resource string
	// known is v's map from name to UID and users its index from name to the keys
	// of pods. Guarded by v.mu.
	known map[string]string
	users map[string]map[string]struct{}
	// alive reports whether the object counts.
	alive func(*metav1.PartialObjectMetadata) bool
}

func (v *view) nodeUIDs() *uids {
	return &uids{v: v, resource: nodesResource, known: v.nodes, users: v.onNode,
		alive: func(*metav1.PartialObjectMetadata) bool { return true }}
}

// accountUIDs leaves out those that are being deleted: the API server issues no
// token for them any more.
func (v *view) accountUIDs() *uids {
	return &uids{v: v, resource: accountsResource, known: v.accounts, users: v.ofSA,
		alive: func(o *metav1.PartialObjectMetadata) bool { return o.DeletionTimestamp == nil }}
}

// name is how pods refer to the object.
func (u *uids) name(o *metav1.PartialObjectMetadata) string {
	if o.Namespace == "" {
		return o.Name
	}
	return key(o.Namespace, o.Name)
}

func (u *uids) set(o *metav1.PartialObjectMetadata) {
	if !u.alive(o) {
		u.delete(o)
		return
	}
	u.v.mu.Lock()
	defer u.v.mu.Unlock()
	n := u.name(o)
	if u.known[n] == string(o.UID) {
		return // nodes report all the time, and nothing follows from that
	}
	u.known[n] = string(o.UID)
	u.v.settle(maps.Keys(u.users[n]))
}

func (u *uids) delete(o *metav1.PartialObjectMetadata) {
	u.v.mu.Lock()
	defer u.v.mu.Unlock()
	n := u.name(o)
	delete(u.known, n)
	u.v.settle(maps.Keys(u.users[n]))
}

func (u *uids) replace(list []*metav1.PartialObjectMetadata) {
	u.v.mu.Lock()
	defer u.v.mu.Unlock()
	clear(u.known)
	for _, o := range list {
		if u.alive(o) {
			u.known[u.name(o)] = string(o.UID)
		}
	}
	u.v.listed(u.resource)
}
