package ca_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"testing"

	"github.com/signet-mesh/signet/ca/capb"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// TestStrangersLeaveRoomForAgents: whoever opens first attestations and sends nothing keeps
// no agent out, not even one behind the same address for long.
func TestStrangersLeaveRoomForAgents(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s, done := w.NewServer(), make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	defer func() { s.Stop(); <-done }()
	roots := x509.NewCertPool()
	for _, c := range trustOf(w).Roots() {
		roots.AddCert(c)
	}
	from := func(ip string) *grpc.ClientConn {
		t.Helper()
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}
		conn, err := grpc.NewClient("passthrough:///"+l.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: roots, ServerName: "localhost", MinVersion: tls.VersionTLS13})),
			grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return d.DialContext(ctx, "tcp", addr) }))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	attest := func(c *grpc.ClientConn) error {
		_, err := w.tryAttest(capb.NewAuthorityClient(c), func(r *capb.AttestRequest) {
			r.Evidence = &capb.AttestRequest_Token{Token: w.issuer.Token(agentA, "signet-ca")}
		})
		return err
	}
	// Headers and no message, on as many streams as there are places in all, and more.
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	conns := []*grpc.ClientConn{}
	open := func() {
		t.Helper()
		for i := range 8 {
			if len(conns) <= i {
				conns = append(conns, from("127.0.0.1"))
			}
			for range 16 {
				_, err := conns[i].NewStream(ctx, &grpc.StreamDesc{ClientStreams: true}, capb.Authority_Attest_FullMethodName)
				if err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	open()
	eventually(t, "one address to have its share", func() bool { return w.Strangers() >= 32 })
	if n := w.Strangers(); n != 32 {
		t.Errorf("one address has %d places, want 32", n)
	}
	if err := attest(from("127.0.0.2")); err != nil {
		t.Errorf("an agent of another address: %v", err)
	}
	// One whose address is the same, as the network has it, gets a place that is not used.
	same := from("127.0.0.1")
	eventually(t, "an agent of the same address", func() bool { return attest(same) == nil })
	cancel()
	eventually(t, "the places to be free", func() bool { return w.Strangers() == 0 })
}
