package limit_test

import (
	"crypto/tls"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/ca/limit"

	"google.golang.org/grpc/credentials"
)

// TestHalfOpenHandshakesAreBounded in number, in all and by address, and in time.
func TestHalfOpenHandshakesAreBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := limit.Guard(credentials.NewTLS(&tls.Config{}), limit.GuardConfig{Connections: 8, Handshakes: 3, PerAddress: 2})
		start := time.Now()
		type end struct {
			err error
			at  time.Duration
		}
		ends := map[string]chan end{}
		var clients []net.Conn
		open := func(address string) {
			client, server := net.Pipe()
			clients = append(clients, client)
			if ends[address] == nil {
				ends[address] = make(chan end, 10)
			}
			go func() {
				_, _, err := c.ServerHandshake(from{server, address})
				ends[address] <- end{err, time.Since(start)}
			}()
			synctest.Wait()
		}
		// Two of an address are under way, and more of it are closed.
		for range 4 {
			open("10.0.0.1:1")
		}
		for range 2 {
			if e := <-ends["10.0.0.1:1"]; e.err == nil || e.at != 0 {
				t.Errorf("too many of an address: %+v", e)
			}
		}
		// One more fits, and others wait; of all, no more than eight are open.
		for range 2 {
			open("10.0.0.2:1")
			open("10.0.0.3:1")
			open("10.0.0.4:1")
		}
		open("10.0.0.5:1")
		if e := <-ends["10.0.0.5:1"]; e.err == nil || e.at != 0 {
			t.Errorf("too many of all: %+v", e)
		}
		// Who says nothing is gone after five seconds, also if it had to wait.
		for a, n := range map[string]int{"10.0.0.1:1": 2, "10.0.0.2:1": 2, "10.0.0.3:1": 2, "10.0.0.4:1": 2} {
			for range n {
				if e := <-ends[a]; e.err == nil || e.at > 5*time.Second {
					t.Errorf("%s: %+v", a, e)
				}
			}
		}
		for _, c := range clients {
			_ = c.Close()
		}
		if n := limit.OpenConnections(c); n != 0 {
			t.Errorf("%d connections count as open", n)
		}
	})
}

// from is a connection from an address.
type from struct {
	net.Conn
	address string
}

func (f from) RemoteAddr() net.Addr { return addr(f.address) }

type addr string

func (addr) Network() string  { return "tcp" }
func (a addr) String() string { return string(a) }
