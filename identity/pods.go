package identity

import (
	"slices"
	"strings"
	"sync"
)

// Pods is a set of pods by UID, safe for concurrent use. The authority fills one
// from its informer or its static list, the agent one from what the authority
// says about its node. The zero value is an empty set.
type Pods struct {
	mu    sync.RWMutex
	byUID map[string]Workload            // guarded by mu
	nodes map[string]map[string]struct{} // node → pod UIDs; guarded by mu
	// changed holds, for each node that has pods and that somebody waits on, the
	// channel that is closed at the next change of that node's pods. Guarded by mu.
	changed map[string]chan struct{}
	// first is closed when a node gets its first pod. Who waits on a node without pods
	// waits on it: nodes may be asked for by any name. Guarded by mu; nil until
	// somebody waits.
	first chan struct{}
}

// Lookup is the pod with that UID; ok is false if it is not in the set.
func (p *Pods) Lookup(uid string) (w Workload, ok bool) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	w, ok = p.byUID[uid]
	return w, ok
}

// OnNode is the pods of a node, ordered by UID, and a channel that is closed
// when another call would answer differently. Where there are none it may also be closed
// without a difference.
func (p *Pods) OnNode(node string) (pods []Workload, changed <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for uid := range p.nodes[node] {
		pods = append(pods, p.byUID[uid])
	}
	slices.SortFunc(pods, func(a, b Workload) int { return strings.Compare(a.PodUID, b.PodUID) })
	if len(pods) == 0 {
		if p.first == nil {
			p.first = make(chan struct{})
		}
		return nil, p.first
	}
	c := p.changed[node]
	if c == nil {
		c = make(chan struct{})
		if p.changed == nil {
			p.changed = map[string]chan struct{}{}
		}
		p.changed[node] = c
	}
	return pods, c
}

// HasNode reports whether a pod is on that node. Where both are known, the UID of the
// pod's node must be nodeUID: another node may have the same name.
func (p *Pods) HasNode(node, nodeUID string) bool {
	p.mu.RLock()
	defer p.mu.RUnlock()
	for uid := range p.nodes[node] {
		if has := p.byUID[uid].NodeUID; has == "" || nodeUID == "" || has == nodeUID {
			return true
		}
	}
	return false
}

// Find is a pod of that namespace and service account on that node, the one with
// the lowest UID if there are several; ok is false if there is none.
func (p *Pods) Find(node, namespace, serviceAccount string) (w Workload, ok bool) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	for uid := range p.nodes[node] {
		c := p.byUID[uid]
		if c.Namespace == namespace && c.ServiceAccount == serviceAccount && (!ok || uid < w.PodUID) {
			w, ok = c, true
		}
	}
	return w, ok
}

// Len is the number of pods in the set.
func (p *Pods) Len() int {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return len(p.byUID)
}

// Set adds the pod or replaces what was known of its UID. A pod without a UID
// is ignored: it could not be found again.
func (p *Pods) Set(w Workload) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.set(w)
}

// Delete removes the pod with that UID, if it is in the set.
func (p *Pods) Delete(uid string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.delete(uid)
}

// Replace makes pods the whole set, as one change.
func (p *Pods) Replace(pods []Workload) {
	p.mu.Lock()
	defer p.mu.Unlock()
	keep := make(map[string]struct{}, len(pods))
	for _, w := range pods {
		keep[w.PodUID] = struct{}{}
		p.set(w)
	}
	for uid := range p.byUID {
		if _, ok := keep[uid]; !ok {
			p.delete(uid)
		}
	}
}

// Apply deletes the pods with the UIDs in gone and then adds or replaces those in
// pods, as one change: nobody sees a part of it.
func (p *Pods) Apply(pods []Workload, gone []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, uid := range gone {
		p.delete(uid)
	}
	for _, w := range pods {
		p.set(w)
	}
}

func (p *Pods) set(w Workload) {
	if w.PodUID == "" {
		return
	}
	old, ok := p.byUID[w.PodUID]
	if ok && old.Equal(w) {
		return
	}
	if ok && old.Node != w.Node {
		p.delete(w.PodUID)
	}
	if p.byUID == nil {
		p.byUID = map[string]Workload{}
		p.nodes = map[string]map[string]struct{}{}
	}
	p.byUID[w.PodUID] = w
	if p.nodes[w.Node] == nil {
		p.nodes[w.Node] = map[string]struct{}{}
		if p.first != nil {
			close(p.first)
			p.first = nil
		}
	}
	p.nodes[w.Node][w.PodUID] = struct{}{}
	p.signal(w.Node)
}

func (p *Pods) delete(uid string) {
	w, ok := p.byUID[uid]
	if !ok {
		return
	}
	delete(p.byUID, uid)
	delete(p.nodes[w.Node], uid)
	if len(p.nodes[w.Node]) == 0 {
		delete(p.nodes, w.Node)
	}
	p.signal(w.Node)
}

func (p *Pods) signal(node string) {
	if c := p.changed[node]; c != nil {
		close(c)
		delete(p.changed, node)
	}
}
