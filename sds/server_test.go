package sds_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/sds"
)

func openSotW(t *testing.T, n *node, pod string) *sotwWire {
	t.Helper()
	ctx, cancel := context.WithCancel(as(t.Context(), pod))
	t.Cleanup(cancel)
	st, err := n.client().StreamSecrets(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return &sotwWire{t: t, inbox: receive(st), st: st}
}

func TestWithoutProofNothingIsServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.set("default", "1", 0)
		n := startNode(t, w)
		req := &discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}}
		_, fetchErr := n.client().FetchSecrets(t.Context(), req)
		st, err := n.client().StreamSecrets(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_, streamErr := st.Recv()
		dt, err := n.client().DeltaSecrets(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_, deltaErr := dt.Recv()
		for name, err := range map[string]error{"FetchSecrets": fetchErr, "StreamSecrets": streamErr, "DeltaSecrets": deltaErr} {
			if status.Code(err) != codes.Unauthenticated {
				t.Errorf("%s: %v", name, err)
			}
		}
		if len(w.calls) != 0 {
			t.Errorf("the source was asked %d times", len(w.calls))
		}
	})
}

func TestEachCallerGetsItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		for _, pod := range []string{"pod-a", "pod-b"} {
			w.only[pod] = map[string]sds.Resource{"default": resource("default", "key-of-"+pod, 0)}
		}
		n := startNode(t, w)
		for _, pod := range []string{"pod-a", "pod-b"} {
			c := openSotW(t, n, pod)
			c.send([]string{"default"})
			synctest.Wait()
			if got, _ := c.next(); fmt.Sprint(got) != "[default=key-of-"+pod+"]" {
				t.Errorf("%s got %v", pod, got)
			}
		}
	})
}

func TestFetch(t *testing.T) {
	for _, c := range []struct {
		name  string
		world func(w *world)
		names []string
		want  string // resources or the error
		after time.Duration
	}{
		{"returns what there is", func(w *world) { w.set("default", "1", 0) }, []string{"default", "nosuch"}, "default=1", 0},
		{"without names returns the wildcard", func(w *world) { w.set("default", "1", 0); w.set("ROOTCA", "r", 0) }, nil, "ROOTCA=r default=1", 0},
		{"of unknown names returns an empty response", func(w *world) {}, []string{"nosuch"}, "", 0},
		{"waits for what is not there yet", func(w *world) {
			w.rs["default"] = sds.Resource{Name: "default"}
			time.AfterFunc(3*time.Second, func() { w.set("default", "1", 0) })
		}, []string{"default"}, "default=1", 3 * time.Second},
		{"returns the rest when it has waited", func(w *world) {
			w.rs["default"] = sds.Resource{Name: "default"}
			w.set("ROOTCA", "r", 0)
		}, []string{"default", "ROOTCA"}, "ROOTCA=r", 10 * time.Second},
		{"says so when it has waited for nothing", func(w *world) { w.rs["default"] = sds.Resource{Name: "default"} },
			[]string{"default"}, "not available yet", 10 * time.Second},
		{"does not tell why the source fails", func(w *world) { w.err = fmt.Errorf("secret reason") },
			[]string{"default"}, "not available yet", 10 * time.Second},
		{"refuses too many names", func(w *world) {}, strings.Fields(numbered("a", 257)), "at most 256", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				c.world(w)
				n := startNode(t, w)
				begin := time.Now()
				resp, err := n.client().FetchSecrets(as(t.Context(), "pod-a"), &discoveryv3.DiscoveryRequest{ResourceNames: c.names})
				got := fmt.Sprint(status.Convert(err).Message())
				if err == nil {
					var rs []string
					for _, a := range resp.GetResources() {
						rs = append(rs, read(t, a))
					}
					got = strings.Join(rs, " ")
				}
				if err == nil && got != c.want || err != nil && (c.want == "" || !strings.Contains(got, c.want)) {
					t.Errorf("got %q, %v", got, err)
				}
				if d := time.Since(begin); d != c.after {
					t.Errorf("after %v", d)
				}
			})
		})
	}
}

func TestFetchEndsWithItsProofAndItsClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.rs["default"] = sds.Resource{Name: "default"}
		n := startNode(t, w)
		ctx, cancel := context.WithTimeout(as(t.Context(), "pod-a"), time.Second)
		defer cancel()
		begin := time.Now()
		_, err := n.client().FetchSecrets(ctx, &discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}})
		if err == nil || time.Since(begin) != time.Second {
			t.Errorf("%v after %v", err, time.Since(begin))
		}
	})
}

// A client that does not read blocks nobody else, and goes with its proof.
func TestAClientThatNeverReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		big := func(i int) string { return strings.Repeat("x", 50_000) + fmt.Sprint(i) }
		w.set("default", big(0), 0)
		n := startNode(t, w)
		st, err := n.client().StreamSecrets(as(t.Context(), "pod-lazy"))
		if err != nil {
			t.Fatal(err)
		}
		if err := st.Send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}}); err != nil {
			t.Fatal(err)
		}
		good := openSotW(t, n, "pod-a")
		good.send([]string{"default"})
		for i := range 20 {
			synctest.Wait()
			if got, _ := good.next(); fmt.Sprint(got) != "[default="+big(i)+"]" {
				t.Fatalf("push %d did not come", i)
			}
			good.answer(false, "")
			w.set("default", big(i+1), 0)
		}
		synctest.Wait()
		if pushes := n.metric(t, "signet_sds_pushes_total"); pushes > 30 {
			t.Errorf("%v pushes: the lazy client is not blocked, so this shows nothing", pushes)
		}
		n.expire("pod-lazy")
		synctest.Wait()
		select {
		case err := <-n.ended:
			if status.Code(err) != codes.Unavailable {
				t.Errorf("the stream ended with %v", err)
			}
		default:
			t.Error("the stream of the client that does not read is still open")
		}
		if open := n.metric(t, "signet_sds_open_streams"); open != 1 {
			t.Errorf("%v streams are open", open)
		}
	})
}

func TestAClientThatSendsAndNeverReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.set("a", strings.Repeat("x", 50_000), 0)
		w.set("b", strings.Repeat("x", 50_000), 0)
		n := startNode(t, w)
		ctx, cancel := context.WithCancel(as(t.Context(), "pod-lazy"))
		st, err := n.client().StreamSecrets(ctx)
		if err != nil {
			t.Fatal(err)
		}
		sent := make(chan int)
		go func() {
			i := 0
			for ; ; i++ {
				if st.Send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{string(rune('a' + i%2)), strings.Repeat("y", 2000)}}) != nil {
					break
				}
			}
			sent <- i
		}()
		time.Sleep(time.Hour)
		if pushes := n.metric(t, "signet_sds_pushes_total"); pushes > 10 {
			t.Errorf("%v pushes to a client that does not read", pushes)
		}
		cancel()
		if i := <-sent; i > 200 {
			t.Errorf("%d requests were taken from a client that does not read", i)
		}
	})
}

func TestClosingTheSendingSideEndsTheStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := startNode(t, newWorld())
		c := openSotW(t, n, "pod-a")
		if err := c.st.CloseSend(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if err := <-n.ended; err != nil {
			t.Errorf("ended with %v", err)
		}
	})
}

// What a source does to wait for a change must not pile up on a long stream.
func TestTheSourceLearnsThatAnAnswerIsNotWaitedForAnyMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		n := startNode(t, w)
		c := openSotW(t, n, "pod-a")
		for i := range 10 {
			c.send([]string{fmt.Sprint(i)})
			synctest.Wait()
		}
		for i, ctx := range w.calls {
			if over := ctx.Err() != nil; over != (i < len(w.calls)-1) {
				t.Errorf("call %d of %d: ended is %v", i, len(w.calls), over)
			}
		}
		n.expire("pod-a")
		synctest.Wait()
		if w.calls[len(w.calls)-1].Err() == nil {
			t.Error("the last call outlives its stream")
		}
	})
}

func TestNewChecksItsConfig(t *testing.T) {
	t.Parallel()
	if _, err := sds.New(sds.Config{}); err == nil {
		t.Error("no source is accepted")
	}
	r := prometheus.NewRegistry()
	if _, err := sds.New(sds.Config{Source: newWorld(), Metrics: r}); err != nil {
		t.Error(err)
	}
	if _, err := sds.New(sds.Config{Source: newWorld(), Metrics: r}); err == nil {
		t.Error("metrics are registered twice")
	}
}
