package holder_test

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/holder"
)

func TestNewRefusesAnIncompleteConfig(t *testing.T) {
	t.Parallel()
	a := newAuthority()
	for name, spoil := range map[string]func(*holder.Config){
		"TrustDomain is required":   func(c *holder.Config) { c.TrustDomain = spiffeid.TrustDomain{} },
		"Issuer is required":        func(c *holder.Config) { c.Issuer = nil },
		"Pods is required":          func(c *holder.Config) { c.Pods = nil },
		"Node is required":          func(c *holder.Config) { c.Node = "" },
		"Trust is required":         func(c *holder.Config) { c.Trust = nil },
		"MaxIdentities is -1":       func(c *holder.Config) { c.MaxIdentities = -1 },
		"registering metrics: dupl": func(c *holder.Config) { c.Metrics = taken(t, a) },
	} {
		cfg := config(a)
		spoil(&cfg)
		if h, err := holder.New(cfg); err == nil || h != nil || !strings.Contains(err.Error(), name) {
			t.Errorf("New = %v, %v; want an error with %q", h, err, name)
		}
	}
}

// taken is a registry in which another holder has its metrics.
func taken(t *testing.T, a *authority) prometheus.Registerer {
	r := prometheus.NewRegistry()
	cfg := config(a)
	cfg.Metrics = r
	if _, err := holder.New(cfg); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestSVIDIsThereAfterTheChannelCloses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		a.pods.Set(pod("web", "web-1"))
		reg := prometheus.NewRegistry()
		cfg := config(a)
		cfg.Metrics = reg
		h, err := holder.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		news := h.Changed()
		svid, changed := ask(t, h, caller(pod("web", "web-1")))
		if svid != nil {
			t.Fatal("there is an SVID before anybody issued one")
		}
		if got := value(t, reg, "signet_holder_waiting"); got != 1 {
			t.Errorf("signet_holder_waiting = %v, want 1", got)
		}
		run(t, h)
		<-changed
		have(t, h, a, caller(pod("web", "web-1")))
		if !closed(news) {
			t.Error("Changed was not closed")
		}
		for name, want := range map[string]float64{
			"signet_holder_svids":               1,
			"signet_holder_waiting":             0,
			"signet_holder_overdue":             0,
			"signet_holder_next_expiry_seconds": 3600,
			"signet_holder_first_svid_seconds":  1,
		} {
			if got := value(t, reg, name); got != want {
				t.Errorf("%s = %v, want %v", name, got, want)
			}
		}
		if got := value(t, reg, "signet_holder_requests_total", "kind=first", "result=issued"); got != 1 {
			t.Errorf("%v requests were counted, want 1", got)
		}
	})
}

func TestSVIDRefuses(t *testing.T) {
	t.Parallel()
	a := newAuthority()
	a.pods.Replace([]identity.Workload{
		pod("web", "web-1"), pod("api", "api-1"),
		{Namespace: "default", ServiceAccount: "far", PodUID: "far-1", Node: "node-b"},
	})
	cfg := config(a)
	cfg.MaxIdentities = 1
	h, err := holder.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ask(t, h, caller(pod("web", "web-1")))
	for _, c := range []struct {
		name string
		w    identity.Workload
		want error
	}{
		{"a pod that is not in the view", pod("web", "web-2"), holder.ErrUnknownPod},
		{"a pod of another node", identity.Workload{Namespace: "default", ServiceAccount: "far", PodUID: "far-1", Node: "node-b"}, holder.ErrUnknownPod},
		{"a service account that the view does not confirm", pod("admin", "web-1"), holder.ErrUnknownPod},
		{"a namespace that the view does not confirm", identity.Workload{Namespace: "kube-system", ServiceAccount: "web", PodUID: "web-1", Node: "node-a"}, holder.ErrUnknownPod},
		{"more identities than it may keep", pod("api", "api-1"), holder.ErrFull},
		{"a name that cannot be in a SPIFFE ID", identity.Workload{Namespace: "../x", ServiceAccount: "web", PodUID: "web-1", Node: "node-a"}, nil},
	} {
		svid, changed, err := h.SVID(caller(c.w))
		if err == nil || svid != nil || changed != nil || (c.want != nil && !errors.Is(err, c.want)) {
			t.Errorf("%s: SVID = %v, %v, %v; want %v", c.name, svid, changed, err, c.want)
		}
	}
}

func TestPodsOfOneIdentityShareOneSVID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		a.pods.Replace([]identity.Workload{pod("web", "web-1"), pod("web", "web-2"), pod("api", "api-1")})
		h := start(t, config(a))
		for _, w := range []identity.Workload{pod("web", "web-1"), pod("web", "web-2"), pod("api", "api-1")} {
			ask(t, h, caller(w))
		}
		synctest.Wait()
		one, two, api := have(t, h, a, caller(pod("web", "web-1"))), have(t, h, a, caller(pod("web", "web-2"))), have(t, h, a, caller(pod("api", "api-1")))
		if one != two {
			t.Error("two pods of one identity have two SVIDs")
		}
		if one.PrivateKey.(*ecdsa.PrivateKey).Equal(api.PrivateKey) {
			t.Error("two identities have one key")
		}
		issued := 0
		for _, c := range a.log() {
			issued += len(c.requests)
		}
		if issued != 2 {
			t.Errorf("%d SVIDs were asked for, want 2", issued)
		}
	})
}

func TestIdentityIsDroppedWithItsLastPod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		one, two := pod("web", "web-1"), pod("web", "web-2")
		a.pods.Replace([]identity.Workload{one, two})
		h := start(t, config(a))
		ask(t, h, caller(one))
		synctest.Wait()
		_, changed := ask(t, h, caller(one))

		a.pods.Delete("web-1")
		if _, _, err := h.SVID(caller(one)); !errors.Is(err, holder.ErrUnknownPod) {
			t.Errorf("the pod that left is answered with %v, want ErrUnknownPod", err)
		}
		synctest.Wait()
		if !closed(changed) {
			t.Error("the channel of the pod that left is open, though the answer is another now")
		}
		first := have(t, h, a, caller(two))
		_, changed = ask(t, h, caller(two))
		news := h.Changed()

		a.pods.Delete("web-2")
		synctest.Wait()
		if !closed(changed) || !closed(news) {
			t.Error("the last pod left and the channels are open")
		}
		if held := h.Export(); len(held) != 0 {
			t.Errorf("the last pod left and there is still %v", held)
		}

		// A pod that comes later gets an SVID of its own.
		a.pods.Set(two)
		ask(t, h, caller(two))
		synctest.Wait()
		if have(t, h, a, caller(two)) == first {
			t.Error("the SVID of the pods that left came back")
		}
	})
}

func TestDroppedKeyLeavesTheMemory(t *testing.T) {
	a := newAuthority()
	w := pod("web", "web-1")
	a.pods.Set(w)
	h := start(t, config(a))
	key := func() weak.Pointer[ecdsa.PrivateKey] {
		_, changed := ask(t, h, caller(w))
		<-changed
		return weak.Make(have(t, h, a, caller(w)).PrivateKey.(*ecdsa.PrivateKey))
	}()
	runtime.GC()
	if key.Value() == nil {
		t.Fatal("the key of a living identity is gone: the test shows nothing")
	}
	news := h.Changed()
	a.pods.Delete("web-1")
	<-news
	for deadline := time.Now().Add(time.Minute); ; {
		runtime.GC()
		if key.Value() == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("something still refers to the key of a dropped identity")
		}
		runtime.Gosched()
	}
	runtime.KeepAlive(h)
}

func TestAnswerForADroppedIdentityIsThrownAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		w := pod("web", "web-1")
		a.pods.Set(w)
		first := make(chan struct{})
		a.before = func(context.Context, []identity.Request) error { <-first; return nil }
		// The agent's view of the pods changes before that of the authority.
		cfg := config(a)
		cfg.Pods = &identity.Pods{}
		cfg.Pods.Set(w)
		h := start(t, cfg)
		_, changed := ask(t, h, caller(w))
		synctest.Wait()
		cfg.Pods.Delete("web-1")
		synctest.Wait()
		if !closed(changed) {
			t.Error("the pod left and the channel is open")
		}
		// It is wanted anew while the answer for the old one is still to come.
		second := make(chan struct{})
		a.set(func() { a.before = func(context.Context, []identity.Request) error { <-second; return nil } })
		cfg.Pods.Set(w)
		ask(t, h, caller(w))
		synctest.Wait()
		close(first)
		synctest.Wait()
		if svid, _ := ask(t, h, caller(w)); svid != nil {
			t.Error("the answer for the dropped identity was taken for the new one")
		}
		close(second)
		synctest.Wait()
		have(t, h, a, caller(w))
	})
}

func TestHealthNamesTheWorstRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		a.pods.Replace([]identity.Workload{pod("web", "web-1"), pod("api", "api-1"), pod("new", "new-1")})
		h := start(t, config(a))
		ask(t, h, caller(pod("web", "web-1")))
		time.Sleep(time.Minute)
		ask(t, h, caller(pod("api", "api-1")))
		time.Sleep(time.Second)
		if err := h.Health(); err != nil {
			t.Errorf("Health = %v, want nil", err)
		}
		a.set(func() { a.before = a.down })
		// A first SVID that does not come is no missed renewal.
		ask(t, h, caller(pod("new", "new-1")))
		time.Sleep(20 * time.Minute)
		if err := h.Health(); err != nil {
			t.Errorf("Health = %v, want nil", err)
		}
		time.Sleep(20 * time.Minute)
		err := h.Health()
		if !errors.Is(err, errDown) {
			t.Fatalf("Health = %v, want the reason", err)
		}
		for _, want := range []string{"2 of 3 SVIDs", "spiffe://cluster.local/ns/default/sa/web expires at 2000-01-01T01:00:00Z"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("Health = %q, want it to say %q", err, want)
			}
		}
		a.set(func() { a.before = nil })
		time.Sleep(time.Minute)
		if err := h.Health(); err != nil {
			t.Errorf("Health = %v, want nil after the renewal", err)
		}
	})
}

func TestSavedSVIDs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		web, api := pod("web", "web-1"), pod("api", "api-1")
		a.pods.Replace([]identity.Workload{web, api})
		first, err := holder.New(config(a))
		if err != nil {
			t.Fatal(err)
		}
		stop := run(t, first)
		ask(t, first, caller(web))
		ask(t, first, caller(api))
		time.Sleep(20 * time.Minute)
		stop()
		saved := first.Export()
		if len(saved) != 2 || saved[0].SVID.ID.Path() != "/ns/default/sa/api" {
			t.Fatalf("Export = %v, want api and web in this order", saved)
		}

		a.set(func() { a.before = a.down })
		cfg := config(a)
		cfg.Saved = saved
		h := start(t, cfg)
		got, _ := ask(t, h, caller(web))
		if got != saved[1].SVID {
			t.Error("the saved SVID is not served at once")
		}
		// It is renewed at the time that was saved, though nobody asked for api.
		time.Sleep(5 * time.Minute)
		if n := a.callCount(); n != 2 && n != 1 {
			t.Errorf("%d calls before the time of renewal", n)
		}
		a.set(func() { a.before = nil })
		time.Sleep(6 * time.Minute)
		for _, held := range h.Export() {
			if !held.RenewAt.After(time.Now()) {
				t.Errorf("%v was not renewed", held)
			}
		}
		if have(t, h, a, caller(web)) == saved[1].SVID {
			t.Error("the saved SVID was not renewed")
		}
	})
}

func TestSavedSVIDsThatAreLeftOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		web := pod("web", "web-1")
		a.pods.Set(web)
		h := start(t, config(a))
		ask(t, h, caller(web))
		synctest.Wait()
		good := h.Export()
		other := newAuthority()
		for _, c := range []struct {
			name  string
			saved []holder.Held
			spoil func(*holder.Config)
			keeps int
		}{
			{"is kept as it should be", good, nil, 1},
			{"comes twice", append(good[:1:1], holder.Held{SVID: a.newSVID("/ns/default/sa/web", time.Hour)}), nil, 1},
			{"has no pod", good, func(c *holder.Config) { c.Pods = &identity.Pods{} }, 0},
			{"is of another root", good, func(c *holder.Config) { c.Trust = func() *identity.Trust { return other.trust } }, 0},
			{"cannot be verified yet", good, func(c *holder.Config) { c.Trust = func() *identity.Trust { return nil } }, 0},
			{"is nothing", []holder.Held{{}}, nil, 0},
			{"has another key", []holder.Held{{SVID: func() *x509svid.SVID { s := *good[0].SVID; s.PrivateKey = newKey(); return &s }()}}, nil, 0},
			{"has another name", []holder.Held{{SVID: func() *x509svid.SVID {
				s := *good[0].SVID
				s.ID = spiffeid.RequireFromString("spiffe://cluster.local/ns/default/sa/api")
				return &s
			}()}}, nil, 0},
		} {
			cfg := config(a)
			cfg.Saved = c.saved
			if c.spoil != nil {
				c.spoil(&cfg)
			}
			h, err := holder.New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			held := h.Export()
			if len(held) != c.keeps {
				t.Errorf("an SVID that %s: %d are kept, want %d", c.name, len(held), c.keeps)
			}
			if len(held) > 0 && held[0].SVID != good[0].SVID {
				t.Errorf("an SVID that %s: another one is kept", c.name)
			}
		}
		time.Sleep(time.Hour)
		cfg := config(a)
		cfg.Saved = good
		if h, err := holder.New(cfg); err != nil || len(h.Export()) != 0 {
			t.Errorf("an expired SVID is kept (%v)", err)
		}
	})
}

func TestHeldPrintsWithoutItsKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		a.pods.Set(pod("web", "web-1"))
		h := start(t, config(a))
		ask(t, h, caller(pod("web", "web-1")))
		synctest.Wait()
		held := h.Export()[0]
		secret := scalar(held.SVID.PrivateKey).String()
		var log strings.Builder
		l := slog.New(slog.NewJSONHandler(&log, nil))
		state := holder.State{Agent: held.SVID, SVIDs: []holder.Held{held}}
		l.Info("held", "held", held, "state", state)
		fmt.Fprintf(&log, "%v %+v %s %v %+v", held, held, held, state, state)
		if strings.Contains(log.String(), secret) || strings.Contains(log.String(), "PrivateKey") {
			t.Errorf("the key was printed: %s", log.String())
		}
		if !strings.Contains(log.String(), "spiffe://cluster.local/ns/default/sa/web") {
			t.Errorf("the identity was not printed: %s", log.String())
		}
	})
}

// Many callers, pods that come and go, an authority that fails now and then: the
// race detector looks on, and every SVID that is given out is right.
func TestConcurrentUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority()
		a.ttl = 10 * time.Second
		n := 0
		a.before = func(context.Context, []identity.Request) error {
			a.mu.Lock()
			defer a.mu.Unlock()
			if n++; n%5 == 0 {
				return errDown
			}
			return nil
		}
		const identities, podsEach = 8, 3
		w := func(i int) identity.Workload {
			return pod(fmt.Sprintf("sa-%d", i/podsEach), fmt.Sprintf("pod-%d", i))
		}
		for i := range identities * podsEach {
			a.pods.Set(w(i))
		}
		h := start(t, config(a))
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		var wg sync.WaitGroup
		seen := make([]int, identities*podsEach)
		for i := range identities * podsEach {
			wg.Go(func() {
				for ctx.Err() == nil {
					svid, changed, err := h.SVID(withToken(w(i), "token of "+w(i).PodUID))
					if err != nil {
						changed = nil // the pod is away; look again in a while
					} else if svid != nil {
						check(t, svid, a, w(i))
						seen[i]++
					}
					select {
					case <-changed:
					case <-time.After(700 * time.Millisecond):
					case <-ctx.Done():
					}
				}
			})
		}
		wg.Go(func() { // one identity after the other loses its pods and gets them back
			for i := 0; ctx.Err() == nil; i++ {
				p := w(i % (identities * podsEach))
				a.pods.Delete(p.PodUID)
				time.Sleep(time.Duration(i%7) * 100 * time.Millisecond)
				a.pods.Set(p)
			}
		})
		wg.Go(func() {
			for ctx.Err() == nil {
				news := h.Changed()
				_ = h.Export()
				_ = h.Health()
				h.Retry()
				select {
				case <-news:
				case <-ctx.Done():
				}
				time.Sleep(10 * time.Millisecond)
			}
		})
		wg.Wait()
		for i, n := range seen {
			if n < 50 {
				t.Errorf("pod %d saw an SVID %d times in a minute", i, n)
			}
		}
		if most := a.mostAtOnce(); most > maxInFlight {
			t.Errorf("%d batches at a time, at most %d are allowed", most, maxInFlight)
		}
	})
}
