package caclient_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/caclient"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/identity"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// TestAReplicaThatIsCutOffFromThePods takes none from agents that it does not know, until it
// knows again, and does not keep agents with a new pod.
func TestAReplicaThatIsCutOffFromThePods(t *testing.T) {
	t.Parallel()
	var stale atomic.Bool
	stale.Store(true)
	lost, known := time.Now().Add(-time.Hour), &identity.Pods{}
	known.Replace([]identity.Workload{agent, server})
	a, b, _ := twoReplicas(t, func(c *ca.Config) {
		c.Pods = known
		c.PodsStale = func() time.Time {
			if stale.Load() {
				return lost
			}
			return time.Time{}
		}
	})
	young, old := server, server
	young.PodUID, young.Pod, old.PodUID, old.Pod = "uid-young", "server-1", "uid-old", "server-2"
	a.pods.Set(young)
	known.Set(old)

	cfg := a.config()
	cfg.Addresses = []string{a.addr, b.addr}
	wires := cables(&cfg)
	wires.leave(a.addr)
	c, _ := run(t, cfg)
	has := func(uid string) bool { _, ok := cfg.Pods.Lookup(uid); return ok }
	within(t, "the young pod", func() bool { return has("uid-young") && c.Ready() == nil })

	wires.leave(b.addr)
	within(t, "what the other replica knows", func() bool { return has("uid-old") })
	if !has("uid-young") {
		t.Fatal("a replica that is cut off took a pod that began since")
	}

	// It issues for those it knows. For others the agent leaves it.
	ask := func(uid string) func() bool {
		return func() bool {
			r, _ := request(t)
			r.PodUID = uid
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			rs, err := c.Issue(ctx, []identity.Request{r})
			return err == nil && rs[0].Err == nil
		}
	}
	within(t, "an SVID of the replica that is cut off", ask("uid-old"))
	wires.leave("")
	within(t, "an SVID of the other replica", ask("uid-young"))

	// When it knows again, what is not there is gone.
	within(t, "what the first replica knows", func() bool { return !has("uid-old") })
	wires.leave(b.addr)
	within(t, "what the other replica knows", func() bool { return has("uid-old") })
	if !has("uid-young") {
		t.Fatal("a replica that is cut off took a pod that began since")
	}
	stale.Store(false)
	within(t, "the end of a pod", func() bool { return !has("uid-young") })
}

// within polls until f holds, for long enough on a machine that is busy.
func within(t *testing.T, what string, f func() bool) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for !f() {
		if time.Now().After(deadline) {
			t.Fatalf("waited for %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// cabling is the network between an agent and its authorities.
type cabling struct {
	mu    sync.Mutex
	only  string // the one address that can be reached; empty: all; guarded by mu
	conns []net.Conn
}

// cables has an agent dial through a network that can be cut.
func cables(cfg *caclient.Config) *cabling {
	n := &cabling{}
	cfg.Dial = func(ctx context.Context, address string) (net.Conn, error) {
		n.mu.Lock()
		cut := n.only != "" && n.only != address
		n.mu.Unlock()
		if cut {
			return nil, errors.New("cut off")
		}
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
		if err == nil {
			n.mu.Lock()
			n.conns = append(n.conns, conn)
			n.mu.Unlock()
		}
		return conn, err
	}
	return n
}

// leave leaves one address that can be reached, and breaks all connections; empty mends
// all and breaks none.
func (n *cabling) leave(only string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.only = only
	if only == "" {
		return
	}
	for _, conn := range n.conns {
		conn.Close()
	}
	n.conns = nil
}

// TestAStaleViewChangesNoPod that an agent has heard of from another replica: its labels
// there may be older, and a policy that denies may hang on those of now.
func TestAStaleViewChangesNoPod(t *testing.T) {
	t.Parallel()
	pod := func(uid, version string) *capb.Pod {
		return &capb.Pod{Uid: uid, Namespace: "default", Name: uid, ServiceAccount: "server", Labels: map[string]string{"version": version}}
	}
	since := timestamppb.Now()
	streams := [][]*capb.WatchNodeResponse{
		// Of a replica that was cut off when the agent began there is nothing newer to be had.
		{{Full: true, StaleSince: since, Pods: []*capb.Pod{pod("a", "1")}}},
		{{Full: true, Pods: []*capb.Pod{pod("a", "3")}}},
		{{Full: true, StaleSince: since, Pods: []*capb.Pod{pod("a", "2"), pod("b", "1")}}, {StaleSince: since, Pods: []*capb.Pod{pod("a", "1"), pod("c", "1")}},
			// It knows again.
			{Full: true, Pods: []*capb.Pod{pod("a", "4"), pod("b", "1")}}},
	}
	said := make(chan *capb.WatchNodeResponse)
	var stream atomic.Int32
	s := &stub{}
	s.watchNode = func(st grpc.ServerStreamingServer[capb.WatchNodeResponse]) error {
		for range streams[min(int(stream.Add(1)), len(streams))-1] {
			select {
			case m := <-said:
				if err := st.Send(m); err != nil {
					return err
				}
			case <-st.Context().Done():
				return nil
			}
		}
		return errors.New("the end of a stream")
	}
	cfg := s.start(t)
	run(t, cfg)
	for i, want := range []map[string]string{{"a": "1"}, {"a": "3"}, {"a": "3", "b": "1"}, {"a": "3", "b": "1", "c": "1"}, {"a": "4", "b": "1"}} {
		m := slices.Concat(streams...)[i]
		select {
		case said <- m:
		case <-time.After(2 * time.Minute):
			t.Fatal("nobody listens")
		}
		got := map[string]string{}
		within(t, fmt.Sprint(want, " after ", m), func() bool {
			pods, _ := cfg.Pods.OnNode("node-a")
			clear(got)
			for _, w := range pods {
				got[w.PodUID] = w.Labels["version"]
			}
			return maps.Equal(got, want)
		})
	}
}
