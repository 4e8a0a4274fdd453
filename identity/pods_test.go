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

// TestNodesThatWereAskedForAreForgotten: whoever asks for a node by a name that nobody
// has, or that nobody has any more, leaves nothing behind, and is woken when it comes.
func TestNodesThatWereAskedForAreForgotten(t *testing.T) {
	p := &identity.Pods{}
	const n = 10_000
	name := func(i int) string { return fmt.Sprint("node-", i) }
	var waiting []<-chan struct{}
	for i := range n {
		_, c := p.OnNode(name(i))
		waiting = append(waiting, c)
	}
	if kept := p.Waiting(); kept != 1 {
		t.Errorf("%d channels for names that nobody has", kept)
	}
	for i := range n {
		p.Set(pod(name(i), name(i)))
		if !isClosed(waiting[i]) {
			t.Fatalf("who waits for %s was not woken", name(i))
		}
		_, waiting[i] = p.OnNode(name(i))
	}
	for i := range n {
		if isClosed(waiting[i]) {
			t.Fatalf("the first pod of another node woke who waits for %s", name(i))
		}
	}
	_, nobody := p.OnNode("node")
	for i := range n {
		p.Delete(name(i))
		if !isClosed(waiting[i]) || isClosed(nobody) {
			t.Fatalf("after the last pod of %s: woken %v, others %v", name(i), isClosed(waiting[i]), isClosed(nobody))
		}
	}
	p.Set(pod("1", "a"))
	p.Delete("1")
	if kept := p.Waiting(); kept != 0 {
		t.Errorf("%d channels are left, and there is no pod", kept)
	}
}

func TestHasNode(t *testing.T) {
	p := &identity.Pods{}
	w := pod("1", "a")
	w.NodeUID = "uid-a"
	p.Replace([]identity.Workload{w, pod("2", "b")})
	for _, c := range []struct {
		node, uid string
		want      bool
	}{
		{"a", "uid-a", true}, {"a", "", true}, {"a", "uid-of-before", false}, {"b", "uid-b", true}, {"c", "", false}, {"", "", false},
	} {
		if got := p.HasNode(c.node, c.uid); got != c.want {
			t.Errorf("HasNode(%q, %q) = %v", c.node, c.uid, got)
		}
	}
	if p.Waiting() != 0 {
		t.Error("looking keeps a channel")
	}
	p.Delete("1")
	if p.HasNode("a", "") {
		t.Error("its last pod has gone")
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
