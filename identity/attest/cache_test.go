package attest_test

import (
	"fmt"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-mesh/signet/identity/attest"
	"github.com/signet-mesh/signet/identity/attest/attesttest"
)

// Remembering a token never makes it good for longer than it would be otherwise.
func TestRememberedTokensEnd(t *testing.T) {
	t.Parallel()
	tests := map[string]func(t *testing.T, w *world, token string){
		"when they expire": func(t *testing.T, w *world, token string) {
			time.Sleep(10*time.Minute - time.Nanosecond)
			w.accept(t, token)
			time.Sleep(time.Nanosecond)
			w.refuse(t, token, attest.ErrRefused, "expired")
		},
		"when the pod is gone, and not a moment longer": func(t *testing.T, w *world, token string) {
			w.pods.Delete(server.PodUID)
			w.refuse(t, token, attest.ErrUnknownPod, "unknown_pod")
			w.pods.Set(server)
			w.accept(t, token)
		},
		"when the pod was made anew under its name": func(t *testing.T, w *world, token string) {
			again := server
			again.PodUID = "another"
			w.pods.Delete(server.PodUID)
			w.pods.Set(again)
			w.refuse(t, token, attest.ErrUnknownPod, "unknown_pod")
		},
		"when the view says something else of the pod": func(t *testing.T, w *world, token string) {
			changed := server
			changed.ServiceAccount = "admin"
			w.pods.Set(changed)
			w.refuse(t, token, attest.ErrRefused, "view")
		},
		"when the node was made anew": func(t *testing.T, w *world, token string) {
			changed := server
			changed.NodeUID = "another"
			w.pods.Set(changed)
			w.refuse(t, token, attest.ErrOtherNode, "other_node")
		},
		"when the issuer withdraws the key": func(t *testing.T, w *world, token string) {
			other := attesttest.NewIssuer(t)
			if err := os.WriteFile(w.file, other.JWKS(), 0o644); err != nil {
				t.Fatal(err)
			}
			time.Sleep(attest.DefaultKeysInterval)
			w.refuse(t, token, attest.ErrRefused, "no key with ID")
		},
	}
	for name, then := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				token := w.issuer.Token(server, audience)
				w.accept(t, token)
				w.accept(t, token)
				then(t, w, token)
			})
		})
	}
}

func TestRememberedTokensShowTheViewAsItIs(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	token := w.issuer.Token(server, audience)
	w.accept(t, token)
	changed := server
	changed.Labels = map[string]string{"app": "server", "canary": "true"}
	w.pods.Set(changed)
	if got, _, err := w.Attest(t.Context(), attest.Evidence{Token: token}); err != nil || !got.Equal(changed) {
		t.Errorf("Attest = %v, %v; want the new labels", got, err)
	}
}

// Keys that stay good while their file is broken keep tokens good, too.
func TestRememberedTokensOutliveABrokenKeyFile(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		token := w.issuer.Token(server, audience)
		w.accept(t, token)
		if err := os.Remove(w.file); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		w.accept(t, token)
		w.accept(t, w.issuer.Token(server, audience))
	})
}

func TestMemoryIsBounded(t *testing.T) {
	t.Parallel()
	for _, size := range []int{1, 2, 10, 25} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			t.Parallel()
			reg := prometheus.NewRegistry()
			w := newWorld(t, func(c *attest.Config) { c.CacheSize, c.Metrics = size, reg })
			for range 4 * size {
				w.accept(t, w.issuer.Token(server, audience))
				if n := gather(t, reg)["signet_attest_remembered{signet}"]; n < 1 || n > float64(size) {
					t.Fatalf("%v tokens are remembered; want 1 to %d", n, size)
				}
			}
			// Refused tokens take no room.
			before := gather(t, reg)["signet_attest_remembered{signet}"]
			for i := range 2 * size {
				w.refuse(t, w.issuer.Token(server, fmt.Sprint("other-", i)), attest.ErrRefused, "audience")
			}
			if after := gather(t, reg)["signet_attest_remembered{signet}"]; after != before {
				t.Errorf("%v tokens were remembered, %v after refusals", before, after)
			}
		})
	}
}

// What has expired makes room before what has not.
func TestMemoryForgetsExpiredTokensFirst(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		w := newWorld(t, func(c *attest.Config) { c.CacheSize, c.Metrics = 10, reg })
		long := make([]string, 8)
		for i := range long {
			long[i] = w.issuer.Token(server, audience, attesttest.TTL(time.Hour))
			w.accept(t, long[i])
		}
		for range 2 {
			w.accept(t, w.issuer.Token(server, audience, attesttest.TTL(time.Minute)))
		}
		time.Sleep(2 * time.Minute)
		w.accept(t, w.issuer.Token(server, audience))
		before := gather(t, reg)
		for _, token := range long {
			w.accept(t, token)
		}
		after := gather(t, reg)
		if n := after["signet_attest_tokens_total{signet,remembered}"] - before["signet_attest_tokens_total{signet,remembered}"]; n != 8 {
			t.Errorf("%v of 8 tokens that are still good were remembered", n)
		}
		if n := after["signet_attest_remembered{signet}"]; n != 9 {
			t.Errorf("%v tokens are remembered; want the 8 and the new one", n)
		}
	})
}
