package provider

import (
	"context"
	"errors"
	"fmt"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	protocodec "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/authz/extauthz"
)

type grpcAsker struct{ conn *grpc.ClientConn }

func newGRPC(a Address) (asker, error) {
	creds := insecure.NewCredentials()
	switch c, err := a.tlsConfig(); {
	case err != nil:
		return nil, err
	case c != nil:
		creds = credentials.NewTLS(c)
	}
	conn, err := grpc.NewClient("dns:///"+a.host(),
		grpc.WithTransportCredentials(creds),
		grpc.WithNoProxy(), grpc.WithDisableRetry(), grpc.WithDisableServiceConfig(),
		// A headless service has several addresses.
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"round_robin":{}}]}`),
		grpc.WithIdleTimeout(0),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 5 * time.Second},
			MinConnectTimeout: 3 * time.Second,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 5 * time.Second}),
		grpc.WithMaxHeaderListSize(64<<10),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(codec{encoding.GetCodecV2(protocodec.Name)}),
			grpc.MaxCallRecvMsgSize(maxAnswer)))
	if err != nil {
		return nil, err
	}
	return grpcAsker{conn}, nil
}

func (g grpcAsker) close() error { return g.conn.Close() }

func (g grpcAsker) ask(ctx context.Context, message []byte) (extauthz.ProviderAnswer, error) {
	r := &authv3.CheckResponse{}
	if err := g.conn.Invoke(ctx, authv3.Authorization_Check_FullMethodName, raw(message), r); err != nil {
		s := status.Convert(err)
		return extauthz.ProviderAnswer{}, fmt.Errorf("%s: %s", s.Code(), clip(s.Message()))
	}
	switch c := codes.Code(r.GetStatus().GetCode()); {
	case r.GetErrorResponse() != nil:
		return extauthz.ProviderAnswer{}, errors.New("it reports an error of its own")
	case c == codes.PermissionDenied || c == codes.Unauthenticated:
		if d := r.GetDeniedResponse(); d != nil {
			d.Status = denialStatus(int(d.GetStatus().GetCode()))
		}
		return extauthz.ProviderAnswer{Response: r}, nil
	case c != codes.OK:
		// To Envoy it is an error too.
		return extauthz.ProviderAnswer{}, fmt.Errorf("it answers with the status %s, which neither allows nor denies", c)
	case r.GetDeniedResponse() != nil:
		return extauthz.ProviderAnswer{}, errors.New("it allows, with the answer to a denial")
	case r.GetStatus() == nil && r.GetOkResponse() == nil:
		return extauthz.ProviderAnswer{}, errors.New("its answer is empty")
	}
	return extauthz.ProviderAnswer{Allowed: true, Response: r}, nil
}

// codec sends bytes as they are.
type codec struct{ encoding.CodecV2 }

// raw is a message in bytes.
type raw []byte

// Marshal copies the bytes: a call that ended may still hold what it was to send,
// while the caller uses its bytes again.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if b, ok := v.(raw); ok {
		return mem.BufferSlice{mem.Copy(b, mem.DefaultBufferPool())}, nil
	}
	return c.CodecV2.Marshal(v)
}

// clip bounds what is told of a provider's own words; %q makes them harmless.
func clip(s string) string {
	const most = 200
	if len(s) > most {
		s = s[:most] + "…"
	}
	return fmt.Sprintf("%q", s)
}
