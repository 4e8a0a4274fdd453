package ca_test

import (
	"context"
	"crypto/tls"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
)

// TestHalfOpenHandshakesAreBounded in number, in all and by address, and in time.
func TestHalfOpenHandshakesAreBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := ca.GuardWith(credentials.NewTLS(&tls.Config{}), 8, 3, 2)
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
		if n := ca.OpenConnections(c); n != 0 {
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

func TestAgentsAreHeldToTheirLimits(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *ca.Config) {
		c.Limits = ca.LimitsConfig{AgentRate: 1, AgentBurst: 6, IdentityRate: 1, IdentityBurst: 2}
	})
	agent, _ := w.attest(agentA) // one of six
	var busy, issued int
	for range 4 {
		rs, err := issue(t, agent, item(t, byUID(server.PodUID)))
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case rs[0].GetX509() != nil:
			issued++
		case rs[0].GetRefusal().GetCode() == capb.Refusal_CODE_BUSY && rs[0].GetRefusal().GetRetryAfter().AsDuration() > 0:
			busy++
		default:
			t.Error(rs)
		}
	}
	if issued < 2 || issued > 3 || busy == 0 {
		t.Errorf("of one identity %d were issued and %d put off; 2 at once are the limit", issued, busy)
	}
	// Another identity of that agent still gets some; beyond its burst the agent gets no more.
	got := 0
	for range 8 {
		rs, err := issue(t, agent, item(t, byUID(client.PodUID)), item(t, byUID(server.PodUID)))
		if err != nil {
			t.Fatal(err)
		}
		if rs[0].GetX509() != nil {
			got++
		}
	}
	if got == 0 || got > 4 {
		t.Errorf("another identity got %d", got)
	}
	other, _ := w.attest(agentB)
	if rs, err := issue(t, other, item(t, byUID(onNodeB.PodUID))); err != nil || rs[0].GetX509() == nil {
		t.Errorf("another agent: %v, %v", rs, err)
	}
}

// TestAFloodOfStreamsIsRefused, and others go on.
func TestAFloodOfStreamsIsRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	agent, _ := w.attest(agentA)
	refused := 0
	for range 800 {
		ctx, cancel := context.WithCancel(t.Context())
		s, err := agent.WatchNode(ctx, &capb.WatchNodeRequest{})
		if err == nil {
			_, err = s.Recv()
		}
		cancel()
		if status.Code(err) == codes.ResourceExhausted {
			refused++
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if refused == 0 {
		t.Error("no call was refused")
	}
	other, _ := w.attest(agentB)
	if rs, err := issue(t, other, item(t, byUID(onNodeB.PodUID))); err != nil || rs[0].GetX509() == nil {
		t.Errorf("another agent: %v, %v", rs, err)
	}
}
