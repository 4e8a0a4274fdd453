package attest_test

import (
	"os"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/identity/attest"
)

// TestAConnectionProvesNothing: whatever was proved on a connection before, an RPC is
// what its own token says, now.
func TestAConnectionProvesNothing(t *testing.T) {
	for name, c := range map[string]struct {
		change func(t *testing.T, g *gated, token string) (next string)
		want   codes.Code
	}{
		"the same token":           {func(t *testing.T, g *gated, token string) string { return token }, codes.OK},
		"another token of the pod": {func(t *testing.T, g *gated, _ string) string { return g.issuer.Token(server, audience) }, codes.OK},
		"no token":                 {func(*testing.T, *gated, string) string { return "" }, codes.Unauthenticated},
		"a token that differs in its last letter": {func(_ *testing.T, _ *gated, token string) string {
			last := byte('A')
			if token[len(token)-5] == last {
				last = 'B'
			}
			return token[:len(token)-5] + string(last) + token[len(token)-4:]
		}, codes.Unauthenticated},
		"the pod is gone": {func(t *testing.T, g *gated, token string) string {
			g.pods.Delete(server.PodUID)
			return token
		}, codes.Unauthenticated},
		"the pod's account is another": {func(t *testing.T, g *gated, token string) string {
			other := server
			other.ServiceAccount = "other"
			g.pods.Set(other)
			return token
		}, codes.Unauthenticated},
		"the token has expired": {func(t *testing.T, g *gated, token string) string {
			for range 12 { // in use, so that the connection stays
				time.Sleep(10 * time.Minute)
				_, _ = g.ask(bearing(t.Context(), token), "Ask")
			}
			return token
		}, codes.Unauthenticated},
		"its key is the issuer's no more": {func(t *testing.T, g *gated, token string) string {
			if err := os.Rename(newWorld(t).file, g.file); err != nil {
				t.Fatal(err)
			}
			time.Sleep(2 * attest.DefaultKeysInterval)
			return token
		}, codes.Unauthenticated},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGated(t)
				token := g.issuer.Token(server, audience)
				for range 3 {
					if who, err := g.ask(bearing(t.Context(), token), "Ask"); err != nil || who != server.Pod {
						t.Fatalf("%q, error %v", who, err)
					}
				}
				next := c.change(t, g, token)
				for range 2 {
					ctx := t.Context()
					if next != "" {
						ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+next)
					}
					who, err := g.ask(ctx, "Ask")
					if status.Code(err) != c.want || (err == nil) != (who == server.Pod) {
						t.Errorf("%q, error %v; want %s", who, err, c.want)
					}
				}
			})
		})
	}
}
