package identity_test

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/signet-mesh/signet/identity"
)

func pod(uid, node string) identity.Workload {
	return identity.Workload{Namespace: "default", ServiceAccount: "web", Pod: "web-" + uid, PodUID: uid, Node: node}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func TestPodsTellOnlyWhoIsConcerned(t *testing.T) {
	p := &identity.Pods{}
	p.Replace([]identity.Workload{pod("1", "a"), pod("2", "b")})
	_, a := p.OnNode("a")
	_, b := p.OnNode("b")
	p.Set(pod("1", "a"))
	if isClosed(a) || isClosed(b) {
		t.Error("a pod that did not change was signalled")
	}
	p.Set(pod("3", "a"))
	if !isClosed(a) || isClosed(b) {
		t.Error("a new pod on node a must be signalled there and nowhere else")
	}
	pods, a := p.OnNode("a")
	if len(pods) != 2 || pods[0].PodUID != "1" || pods[1].PodUID != "3" {
		t.Errorf("node a has %v", pods)
	}
	p.Set(pod("3", "b"))
	if !isClosed(a) || !isClosed(b) {
		t.Error("a pod that moved must be signalled on both nodes")
	}
	if pods, _ := p.OnNode("a"); len(pods) != 1 {
		t.Errorf("after the move node a has %v", pods)
	}
	_, a = p.OnNode("a")
	p.Delete("2")
	p.Delete("2")
	if _, ok := p.Lookup("2"); ok || isClosed(a) {
		t.Error("deleting a pod on node b must remove it and not be signalled on node a")
	}
	p.Set(identity.Workload{Namespace: "default"})
	if p.Len() != 2 {
		t.Errorf("a pod without a UID was kept: %d pods", p.Len())
	}
	p.Replace(nil)
	if p.Len() != 0 || !isClosed(a) {
		t.Error("replacing by nothing must empty the set and signal")
	}
}

// TestPodsAgreeWithAMap compares random changes with a plain map, under
// concurrent readers.
func TestPodsAgreeWithAMap(t *testing.T) {
	p := &identity.Pods{}
	model := map[string]identity.Workload{}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for !isClosed(stop) {
			pods, _ := p.OnNode("n1")
			for _, w := range pods {
				if w.Node != "n1" {
					t.Errorf("pod %s of node %s listed on n1", w.PodUID, w.Node)
				}
			}
		}
	})
	r := rand.New(rand.NewPCG(1, 2))
	for range 5000 {
		uid := fmt.Sprint(r.IntN(20))
		switch r.IntN(4) {
		case 0:
			p.Delete(uid)
			delete(model, uid)
		case 1:
			if r.IntN(50) == 0 {
				p.Replace([]identity.Workload{pod(uid, "n1")})
				clear(model)
				model[uid] = pod(uid, "n1")
			}
		default:
			w := pod(uid, fmt.Sprintf("n%d", r.IntN(3)))
			p.Set(w)
			model[uid] = w
		}
		n := 0
		for i := range 3 {
			pods, _ := p.OnNode(fmt.Sprintf("n%d", i))
			for _, w := range pods {
				n++
				if !model[w.PodUID].Equal(w) {
					t.Fatalf("set has %+v, model %+v", w, model[w.PodUID])
				}
			}
		}
		if n != len(model) || p.Len() != n {
			t.Fatalf("set has %d pods on nodes and %d in all, model %d", n, p.Len(), len(model))
		}
	}
	close(stop)
	wg.Wait()
}

func TestWatched(t *testing.T) {
	var w identity.Watched[int]
	v, changed := w.Load()
	if v != 0 || isClosed(changed) {
		t.Fatalf("zero value: %d", v)
	}
	w.Store(7)
	if !isClosed(changed) || w.Value() != 7 {
		t.Error("Store must set the value and wake who waits")
	}
	if _, changed := w.Load(); isClosed(changed) {
		t.Error("the next channel must be open")
	}
}

func TestAPodIsFoundByNodeAndAccount(t *testing.T) {
	p := &identity.Pods{}
	if _, ok := p.Find("a", "default", "web"); ok {
		t.Error("an empty set has a pod")
	}
	p.Replace([]identity.Workload{pod("2", "a"), pod("1", "a"), pod("0", "b")})
	if w, ok := p.Find("a", "default", "web"); !ok || w.PodUID != "1" {
		t.Errorf("found %v, %v; want the lowest UID on node a", w, ok)
	}
	for _, c := range [][3]string{{"c", "default", "web"}, {"a", "other", "web"}, {"a", "default", "db"}} {
		if w, ok := p.Find(c[0], c[1], c[2]); ok {
			t.Errorf("%v: found %v", c, w)
		}
	}
	p.Delete("1")
	p.Delete("2")
	if w, ok := p.Find("a", "default", "web"); ok {
		t.Errorf("found %v after it was deleted", w)
	}
}
