package attest_test

import (
	"context"
	"testing"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
)

// TestTheTapDecidesOnHeadersAlone: an RPC is let in to be read with a good proof
// or where none is needed, and the context says nothing that only an interceptor
// may say.
func TestTheTapDecidesOnHeadersAlone(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	gate, err := attest.NewGate(attest.GateConfig{Attestor: w.Attestor, Pods: w.pods, Open: []string{"/test.Gated/Open"}})
	if err != nil {
		t.Fatal(err)
	}
	good := w.issuer.Token(server, audience)
	for name, c := range map[string]struct {
		method string
		tokens []string
		code   codes.Code
	}{
		"a good token":                    {"/test.Gated/Ask", []string{good}, codes.OK},
		"a good token with its scheme":    {"/test.Gated/Ask", []string{"Bearer " + good}, codes.OK},
		"none":                            {"/test.Gated/Ask", nil, codes.Unauthenticated},
		"two":                             {"/test.Gated/Ask", []string{good, good}, codes.Unauthenticated},
		"a token for somebody else":       {"/test.Gated/Ask", []string{w.issuer.Token(server, "other")}, codes.Unauthenticated},
		"none, where none is needed":      {"/test.Gated/Open", nil, codes.OK},
		"a bad one, where none is needed": {"/test.Gated/Open", []string{"x"}, codes.OK},
	} {
		ctx := metadata.NewIncomingContext(t.Context(), metadata.MD{"authorization": c.tokens})
		out, err := gate.Tap(ctx, &tap.Info{FullMethodName: c.method, Header: metadata.MD{"authorization": c.tokens}})
		if status.Code(err) != c.code {
			t.Errorf("%s: %v, want %v", name, err, c.code)
		}
		if _, ok := identity.CallerFrom(out); ok || out == nil || out.Err() != context.Cause(ctx) {
			t.Errorf("%s: the tap changed the context", name)
		}
	}
}
