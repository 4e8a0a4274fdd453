package attest_test

import (
	"context"
	"net"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"
	"github.com/signet-mesh/signet/identity/attest/attesttest"
)

func BenchmarkAttest(b *testing.B) {
	ctx := context.Background()
	for _, alg := range []string{"ES256", "RS256"} {
		issuer := attesttest.NewIssuerFor(b, alg)
		keys, err := attest.OpenKeys(attest.KeysConfig{File: issuer.JWKSFile()})
		if err != nil {
			b.Fatal(err)
		}
		w := newWorld(b, func(c *attest.Config) { c.Keys = keys })
		e := attest.Evidence{Token: issuer.Token(server, audience)}
		bad := attest.Evidence{Token: issuer.Token(server, audience, attesttest.Claim("aud", "other"))}
		b.Run(alg+"/remembered", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, _, err := w.Attest(ctx, e); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(alg+"/remembered/parallel", func(b *testing.B) {
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if _, _, err := w.Attest(ctx, e); err != nil {
						b.Error(err)
					}
				}
			})
		})
		// A refused token is verified each time, as one that is seen first is.
		b.Run(alg+"/verified", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, _, err := w.Attest(ctx, bad); err == nil {
					b.Fatal("accepted")
				}
			}
		})
	}
}

func BenchmarkGateUnary(b *testing.B) {
	w := newWorld(b)
	g, err := attest.NewGate(attest.GateConfig{Attestor: w.Attestor, Pods: w.pods})
	if err != nil {
		b.Fatal(err)
	}
	ctx := metadata.NewIncomingContext(context.Background(), metadata.Pairs("authorization", "Bearer "+w.issuer.Token(server, audience)))
	ctx, cancel := context.WithTimeout(ctx, 1<<36) // as Envoy sets one, so that none is needed
	defer cancel()
	creds, err := attest.Credentials(attest.ConnectionsConfig{})
	if err != nil {
		b.Fatal(err)
	}
	near, _ := net.Pipe()
	c, on, err := creds.ServerHandshake(near)
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	connected := peer.NewContext(ctx, &peer.Peer{AuthInfo: on})
	info := &grpc.UnaryServerInfo{FullMethod: "/envoy.service.auth.v3.Authorization/Check"}
	handler := func(ctx context.Context, _ any) (any, error) {
		if _, ok := identity.CallerFrom(ctx); !ok {
			b.Error("no caller")
		}
		return nil, nil
	}
	for name, ctx := range map[string]context.Context{"by-hash": ctx, "by-connection": connected} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := g.Unary(ctx, nil, info, handler); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
