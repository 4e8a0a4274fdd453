package demo

import (
	"context"
	"errors"
	"fmt"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// errNoSVID means that the agent accepts a caller but has nothing for it yet.
var errNoSVID = errors.New("the agent has no SVID for this caller yet")

// fetchSVID asks the agent for the SVID of the pod whose token it shows, as a
// proxy does: on an SDS stream. An agent that refuses the token answers with code
// Unauthenticated.
func fetchSVID(ctx context.Context, socket, token string) (*x509svid.SVID, error) {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	// The agent keeps a stream open until it has an SVID; where it has one, the
	// answer comes at once.
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, fmt.Errorf("connecting to the agent: %w", err)
	}
	defer conn.Close()
	stream, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(
		metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token))
	if err != nil {
		return nil, fmt.Errorf("opening an SDS stream: %w", err)
	}
	// A refusal is told by Recv; the error of Send is only that there was one.
	_ = stream.Send(&discoveryv3.DiscoveryRequest{TypeUrl: "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret", ResourceNames: []string{"default"}})
	for {
		resp, err := stream.Recv()
		if status.Code(err) == codes.DeadlineExceeded {
			return nil, fmt.Errorf("waited %s: %w", answerWithin, errNoSVID)
		}
		if err != nil {
			return nil, err
		}
		for _, r := range resp.GetResources() {
			var secret tlsv3.Secret
			if err := r.UnmarshalTo(&secret); err != nil {
				return nil, fmt.Errorf("reading the agent's answer: %w", err)
			}
			c := secret.GetTlsCertificate()
			return x509svid.Parse(c.GetCertificateChain().GetInlineBytes(), c.GetPrivateKey().GetInlineBytes())
		}
	}
}

// svidOf fetches the newest SVID of a pod of this node.
func (s *stage) svidOf(ctx context.Context, p pod) (*x509svid.SVID, error) {
	token, err := s.kubelet.token(p, forAgent, time.Now())
	if err != nil {
		return nil, err
	}
	svid, err := fetchSVID(ctx, s.socket(), token)
	if err != nil {
		return nil, fmt.Errorf("fetching the SVID of pod %s: %w", p.name, err)
	}
	return svid, nil
}
