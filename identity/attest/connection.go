package attest

import (
	"context"
	"net"
	"sync/atomic"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/peer"
)

// Credentials are for a server behind a [Gate] on a socket without TLS (grpc.Creds).
// They give each connection a place to remember the token that came on it last, so
// that a proxy's next RPC costs no hash of its token. The connection proves nothing
// by that: each RPC brings its token, and what it proved is held against the clock,
// the issuer's keys and the view of the pods each time.
func Credentials() credentials.TransportCredentials {
	return plain{insecure.NewCredentials()}
}

type plain struct {
	credentials.TransportCredentials
}

func (plain) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return c, &connection{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.NoSecurity}}, nil
}

func (p plain) Clone() credentials.TransportCredentials {
	return plain{p.TransportCredentials.Clone()}
}

// connection is one connection; its context's peer has it.
type connection struct {
	credentials.CommonAuthInfo
	last atomic.Pointer[presented]
}

// AuthType implements credentials.AuthInfo.
func (*connection) AuthType() string { return "insecure" }

// presented is a token that was accepted, and what it proved. It is immutable.
type presented struct {
	token string
	proof *proof
}

// connectionOf is where ctx's RPC came in, or nil.
func connectionOf(ctx context.Context) *connection {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	c, _ := p.AuthInfo.(*connection)
	return c
}
