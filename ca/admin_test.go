package ca_test

import (
	"context"
	"net"
	"testing"

	"github.com/signet-mesh/signet/ca/capb"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
)

func TestStatus(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a, cert := w.attest(agentA)
	s, err := a.WatchTrust(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	if err := w.SignHead(t.Context()); err != nil {
		t.Fatal(err)
	}
	l := bufconn.Listen(1 << 16)
	server := w.NewAdminServer()
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(l) }()
	defer func() { server.Stop(); <-done }()
	conn, err := grpc.NewClient("passthrough:///admin", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	st, err := capb.NewAdminClient(conn).Status(t.Context(), &capb.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if st.GetTrustDomain() != "cluster.local" || st.GetInstance() != 1 || st.GetTrustSequence() != 1 || len(st.GetAuthorities()) != 2 ||
		st.GetLogHead().GetSequence() != w.Log().Head().Sequence {
		t.Errorf("%v", st)
	}
	if as := st.GetAgents(); len(as) != 1 || as[0].GetNode() != "node-a" || !as[0].GetConnected() ||
		string(as[0].GetSerial()) != string(cert.Leaf.SerialNumber.FillBytes(make([]byte, 17))) {
		t.Errorf("agents: %v", st.GetAgents())
	}
}
