//go:build !linux

package attest

import "net"

// peerOf is not known here; agents run on Linux.
func peerOf(net.Conn) string { return "" }
