package attest_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"
	"github.com/signet-mesh/signet/identity/attest/attesttest"
	"github.com/signet-mesh/signet/integration/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

func TestGateTakesOneTokenFromMetadata(t *testing.T) {
	t.Parallel()
	g := newGated(t)
	token := g.issuer.Token(server, audience)
	tests := map[string]struct {
		values []string
		ok     bool
	}{
		"a bare token":                          {[]string{token}, true},
		"Bearer":                                {[]string{"Bearer " + token}, true},
		"bearer in small letters, three spaces": {[]string{"bEARER   " + token}, true},
		"nothing":                               {nil, false},
		"an empty value":                        {[]string{""}, false},
		"a scheme alone":                        {[]string{"Bearer "}, false},
		"a scheme without a space":              {[]string{"Bearer" + token}, false},
		"a scheme twice":                        {[]string{"Bearer Bearer " + token}, false},
		"another scheme":                        {[]string{"Basic " + token}, false},
		"a token of another audience":           {[]string{g.issuer.Token(server, "signet-ca")}, false},
		"two good tokens":                       {[]string{token, g.issuer.Token(server, audience)}, false},
		"the same token twice":                  {[]string{token, token}, false},
		"a good token and a bad one":            {[]string{token, "x"}, false},
		"a bad token and a good one":            {[]string{"x", token}, false},
		"two tokens with a comma":               {[]string{token + ", " + token}, false},
		"17 KiB":                                {[]string{strings.Repeat("x", 17<<10)}, false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := g.ask(bearing(t.Context(), tt.values...), "Ask")
			first, s, streamErr := g.stream(t, bearing(t.Context(), tt.values...), "Watch")
			if tt.ok {
				if got != server.Pod || err != nil || first != server.Pod || streamErr != nil {
					t.Errorf("Ask = %q, %v, Watch = %q, %v; want both to know the caller", got, err, first, streamErr)
				}
				if err := s.CloseSend(); err != nil {
					t.Error(err)
				}
				return
			}
			for _, err := range []error{err, streamErr} {
				if status.Code(err) != codes.Unauthenticated || status.Convert(err).Message() != attest.Public(attest.ErrRefused) {
					t.Errorf("%v; want Unauthenticated, without a reason", err)
				}
			}
		})
	}
}

func TestGateAnswersEachKindOfRefusal(t *testing.T) {
	t.Parallel()
	g := newGated(t)
	if _, err := g.ask(bearing(t.Context(), "a", "b"), "Ask"); status.Code(err) != codes.Unauthenticated || !strings.Contains(g.log.String(), "2 values of authorization") {
		t.Errorf("two values: %v, and the log says %q", err, g.log)
	}
	stranger := server
	stranger.PodUID = "stranger"
	for name, tt := range map[string]struct {
		token string
		want  error
	}{
		"an unknown pod": {g.issuer.Token(stranger, audience), attest.ErrUnknownPod},
		"another node":   {g.issuer.Token(server, audience, attesttest.Claim("kubernetes.io/node/name", "node-b")), attest.ErrOtherNode},
	} {
		_, err := g.ask(bearing(t.Context(), tt.token), "Ask")
		if status.Code(err) != codes.Unauthenticated || status.Convert(err).Message() != attest.Public(tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	broken, err := attest.New(attest.Config{Issuer: issuerURL, Audience: audience, Keys: brokenKeys{}, Pods: g.pods, AnyServiceAccount: true})
	if err != nil {
		t.Fatal(err)
	}
	g = newGated(t, func(c *attest.GateConfig) { c.Attestor = broken })
	if _, err := g.ask(bearing(t.Context(), g.issuer.Token(server, audience)), "Ask"); status.Code(err) != codes.Unavailable {
		t.Errorf("without keys: %v; want Unavailable", err)
	}
}

func TestGateLeavesOpenMethodsOpen(t *testing.T) {
	t.Parallel()
	g := newGated(t)
	for _, ctx := range []context.Context{t.Context(), bearing(t.Context(), "x")} {
		if got, err := g.ask(ctx, "Open"); got != "nobody" || err != nil {
			t.Errorf("Open = %q, %v; want nobody", got, err)
		}
		if got, _, err := g.stream(t, ctx, "OpenWatch"); got != "nobody" || err != nil {
			t.Errorf("OpenWatch = %q, %v; want nobody", got, err)
		}
		if _, err := g.ask(ctx, "Ask"); status.Code(err) != codes.Unauthenticated {
			t.Errorf("Ask = %v; want Unauthenticated", err)
		}
	}
}

func TestStreamsEndBeforeTheirProof(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		ttl, margin, after time.Duration
	}{
		"five seconds before":                             {10 * time.Minute, 0, 10*time.Minute - 5*time.Second},
		"a tenth before, if that is less":                 {20 * time.Second, 0, 18 * time.Second},
		"as long before as is configured":                 {10 * time.Minute, 30 * time.Second, 10*time.Minute - 30*time.Second},
		"a tenth before, if less than what is configured": {10 * time.Minute, time.Hour, 9 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				g := newGated(t, func(c *attest.GateConfig) { c.Margin = tt.margin })
				ctx := bearing(t.Context(), g.issuer.Token(server, audience, attesttest.TTL(tt.ttl)))
				if first, err := g.ask(ctx, "Ask"); first != server.Pod || err != nil {
					t.Fatal(first, err)
				}
				start := time.Now()
				first, s, err := g.stream(t, ctx, "Watch")
				if first != server.Pod || err != nil {
					t.Fatal(first, err)
				}
				got, err := recv(s)
				if status.Code(err) != codes.Unavailable || status.Convert(err).Message() != attest.Public(attest.ErrProofExpires) {
					t.Errorf("the stream ended with %q, %v; want Unavailable", got, err)
				}
				if d := time.Since(start); d != tt.after {
					t.Errorf("it ended after %s; want %s", d, tt.after)
				}
				if len(g.causes) != 1 || !errors.Is(g.causes[0], attest.ErrProofExpires) {
					t.Errorf("causes %v", g.causes)
				}
				metrics := gather(t, g.reg)
				if metrics["signet_attest_streams"] != 0 || metrics["signet_attest_streams_ended_total{proof_expires}"] != 1 {
					t.Errorf("metrics %v", metrics)
				}
				// The same token is good for the rest of its life, and no longer.
				if _, err := g.ask(ctx, "Ask"); err != nil {
					t.Errorf("before exp: %v", err)
				}
				time.Sleep(tt.ttl - tt.after)
				if _, err := g.ask(ctx, "Ask"); status.Code(err) != codes.Unauthenticated {
					t.Errorf("at exp: %v; want Unauthenticated", err)
				}
			})
		})
	}
}

func TestStreamsEndWithTheirPod(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		change func(*identity.Pods)
		ends   bool
	}{
		"gone":          {func(p *identity.Pods) { p.Delete(server.PodUID) }, true},
		"all pods gone": {func(p *identity.Pods) { p.Replace(nil) }, true},
		"another service account": {func(p *identity.Pods) {
			w := server
			w.ServiceAccount = "admin"
			p.Set(w)
		}, true},
		"another namespace": {func(p *identity.Pods) {
			w := server
			w.Namespace = "kube-system"
			p.Set(w)
		}, true},
		"another name": {func(p *identity.Pods) {
			w := server
			w.Pod = "server-1"
			p.Set(w)
		}, true},
		"another node": {func(p *identity.Pods) {
			w := server
			w.Node = "node-b"
			p.Set(w)
		}, true},
		"a node made anew": {func(p *identity.Pods) {
			w := server
			w.NodeUID = "another"
			p.Set(w)
		}, true},
		"another pod gone": {func(p *identity.Pods) { p.Delete("neighbour") }, false},
		"other labels": {func(p *identity.Pods) {
			w := server
			w.Labels = map[string]string{"app": "server", "canary": "true"}
			p.Set(w)
		}, false},
		"everything said again": {func(p *identity.Pods) { p.Replace([]identity.Workload{server}) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				g := newGated(t)
				neighbour := server
				neighbour.Pod, neighbour.PodUID = "neighbour", "neighbour"
				g.pods.Set(neighbour)
				ctx := bearing(t.Context(), g.issuer.Token(server, audience))
				var all []grpc.ClientStream
				for range 3 {
					first, s, err := g.stream(t, ctx, "Watch")
					if first != server.Pod || err != nil {
						t.Fatal(first, err)
					}
					all = append(all, s)
				}
				beside, other, err := g.stream(t, bearing(t.Context(), g.issuer.Token(neighbour, audience)), "Watch")
				if beside != "neighbour" || err != nil {
					t.Fatal(beside, err)
				}
				start := time.Now()
				tt.change(g.pods)
				for _, s := range all {
					got, err := recv(s)
					want, text := codes.Unauthenticated, attest.Public(attest.ErrPodGone)
					if !tt.ends {
						want, text = codes.Unavailable, attest.Public(attest.ErrProofExpires)
					}
					if status.Code(err) != want || status.Convert(err).Message() != text {
						t.Errorf("the stream ended with %q, %v; want %s", got, err, want)
					}
				}
				if d := time.Since(start); (d == 0) != tt.ends {
					t.Errorf("the streams ended after %s", d)
				}
				if _, err := recv(other); status.Code(err) == codes.OK {
					t.Error("the neighbour's stream never ended")
				} else if d := time.Since(start); d == 0 && !strings.Contains(name, "gone") {
					t.Errorf("the neighbour's stream ended with the other: %v", err)
				}
			})
		})
	}
}

// A handler that ignores its context can go on to wait, but neither talk nor listen.
func TestNothingIsSaidAfterTheProof(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newGated(t)
		for name, end := range map[string]func(){
			"expired": func() { time.Sleep(10 * time.Minute) },
			"gone":    func() { g.pods.Delete(server.PodUID) },
		} {
			g.pods.Set(server)
			first, s, err := g.stream(t, bearing(t.Context(), g.issuer.Token(server, audience)), "Deaf")
			if first != "echo" || err != nil {
				t.Fatal(first, err)
			}
			end()
			synctest.Wait()
			if err := s.SendMsg(wrapperspb.String("still there?")); err != nil {
				t.Fatal(err)
			}
			if got, err := recv(s); err == nil || status.Code(err) == codes.OK {
				t.Errorf("%s: the server answered %q, %v", name, got, err)
			}

			g.pods.Set(server)
			if _, s, err = g.stream(t, bearing(t.Context(), g.issuer.Token(server, audience)), "Sink"); err != nil {
				t.Fatal(err)
			}
			before := g.heard
			for i, said := range []string{"in time", "too late"} {
				if i == 1 {
					end()
					synctest.Wait()
				}
				if err := s.SendMsg(wrapperspb.String(said)); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				if n := g.heard - before; n != 1 {
					t.Errorf("%s: %d messages were heard after the one %s", name, n, said)
				}
			}
		}
	})
}

// A pod that goes between the moment it is looked up and the moment its stream is
// watched takes the stream with it.
func TestNoChangeIsMissedAtTheStart(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		vanishing := &vanishingPods{}
		g := newGated(t, func(c *attest.GateConfig) {
			w := newWorld(t, func(a *attest.Config) { a.Pods = vanishing })
			c.Attestor = w.Attestor
			vanishing.Pods, vanishing.issuer = c.Pods, w.issuer
		})
		// Somebody else's stream, so that the node is being watched already.
		neighbour := server
		neighbour.PodUID, neighbour.Pod = "neighbour", "neighbour"
		g.pods.Set(neighbour)
		if _, _, err := g.stream(t, bearing(t.Context(), vanishing.issuer.Token(neighbour, audience)), "Watch"); err != nil {
			t.Fatal(err)
		}
		vanishing.uid = server.PodUID
		start := time.Now()
		_, s, err := g.stream(t, bearing(t.Context(), vanishing.issuer.Token(server, audience)), "Watch")
		for err == nil {
			_, err = recv(s)
		}
		if status.Convert(err).Message() != attest.Public(attest.ErrPodGone) || time.Since(start) != 0 {
			t.Errorf("after %s: %v", time.Since(start), err)
		}
	})
}

// vanishingPods loses the pod with that UID as soon as somebody has seen it.
type vanishingPods struct {
	*identity.Pods
	issuer *attesttest.Issuer
	uid    string
}

func (p *vanishingPods) Lookup(uid string) (identity.Workload, bool) {
	w, ok := p.Pods.Lookup(uid)
	if uid == p.uid {
		p.Delete(uid)
		synctest.Wait() // until who watches has seen it, too
	}
	return w, ok
}

func TestUnaryCallsEndWithTheirProof(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newGated(t)
		ctx := bearing(t.Context(), g.issuer.Token(server, audience, attesttest.TTL(time.Minute)))
		start := time.Now()
		_, err := g.ask(ctx, "Slow")
		if err == nil || time.Since(start) != time.Minute {
			t.Errorf("it ended after %s with %v; want a minute", time.Since(start), err)
		}
		if cause := context.Cause(g.ctx); !errors.Is(cause, attest.ErrProofExpires) {
			t.Errorf("cause %v", cause)
		}
		// A nearer deadline of the caller stays.
		short, cancel := context.WithTimeout(bearing(t.Context(), g.issuer.Token(server, audience)), time.Second)
		defer cancel()
		start = time.Now()
		if _, err := g.ask(short, "Slow"); status.Code(err) != codes.DeadlineExceeded || time.Since(start) != time.Second {
			t.Errorf("it ended after %s with %v; want a second", time.Since(start), err)
		}
	})
}

// The goroutine that watches a node ends with the node's last stream, and the next
// stream starts another.
func TestWatchingStopsWithTheLastStream(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newGated(t)
		for range 3 {
			ctx, cancel := context.WithCancel(bearing(t.Context(), g.issuer.Token(server, audience)))
			first, s, err := g.stream(t, ctx, "Watch")
			if first != server.Pod || err != nil {
				t.Fatal(first, err)
			}
			if n := gather(t, g.reg)["signet_attest_streams"]; n != 1 {
				t.Errorf("%v streams; want 1", n)
			}
			cancel()
			if _, err := recv(s); status.Code(err) != codes.Canceled {
				t.Errorf("%v; want Canceled", err)
			}
			synctest.Wait()
			metrics := gather(t, g.reg)
			if metrics["signet_attest_streams"] != 0 || metrics["signet_attest_streams_ended_total{pod_gone}"] != 0 {
				t.Errorf("metrics %v", metrics)
			}
		}
	})
}

func TestRefusalsAreLoggedWithAReasonAtABoundedRate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newGated(t)
		token := g.issuer.Token(server, "other")
		for range 1000 {
			if _, err := g.ask(bearing(t.Context(), token), "Ask"); status.Code(err) != codes.Unauthenticated {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Second)
		if _, err := g.ask(bearing(t.Context(), token), "Ask"); status.Code(err) != codes.Unauthenticated {
			t.Fatal(err)
		}
		log := g.log.String()
		if n := strings.Count(log, "\n"); n != 11 {
			t.Errorf("%d lines of log; want 11", n)
		}
		for _, want := range []string{"suppressed=990", "method=/test.Gated/Ask", "audience", "level=WARN"} {
			if !strings.Contains(log, want) {
				t.Errorf("the log does not say %q", want)
			}
		}
		if strings.Contains(log, token) || strings.Contains(log, strings.Split(token, ".")[1]) {
			t.Error("the log contains the token")
		}
	})
}

func TestNewGateRefuses(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	reg := prometheus.NewRegistry()
	good := attest.GateConfig{Attestor: w.Attestor, Pods: w.pods, Metrics: reg}
	if _, err := attest.NewGate(good); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*attest.GateConfig){
		"no attestor":                func(c *attest.GateConfig) { c.Attestor = nil },
		"no pods":                    func(c *attest.GateConfig) { c.Pods = nil },
		"a negative margin":          func(c *attest.GateConfig) { c.Margin = -1 },
		"metrics that are there":     func(c *attest.GateConfig) { c.Metrics = reg },
		"a method without a slash":   func(c *attest.GateConfig) { c.Open = []string{"Check"} },
		"a service without a method": func(c *attest.GateConfig) { c.Open = []string{"/grpc.health.v1.Health/"} },
	} {
		cfg := good
		cfg.Metrics = nil
		change(&cfg)
		if g, err := attest.NewGate(cfg); err == nil || g != nil {
			t.Errorf("%s: NewGate = %v, %v", name, g, err)
		}
	}
}
