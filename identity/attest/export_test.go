package attest

import (
	"net"

	"google.golang.org/grpc/credentials"
)

// WithPeer has connections counted by what peer says of them.
func WithPeer(c *ConnectionsConfig, peer func(net.Conn) string) { c.peer = peer }

// Accept has a pod prove itself on a connection.
func Accept(on credentials.AuthInfo, pod string) { on.(*connection).accepted("", &proof{podUID: pod}) }

// PeerOf is who is at the other end of a connection.
var PeerOf = peerOf
