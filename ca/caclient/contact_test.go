package caclient_test

import (
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/caclient"
	"github.com/signet-mesh/signet/ca/capb"
)

// TestTheRootIsReplacedWhileAnAgentIsCutOff: its SVID is refused in the handshake then, which
// looks as if nobody were there. It comes back by its token, long before that SVID ends.
func TestTheRootIsReplacedWhileAnAgentIsCutOff(t *testing.T) {
	t.Parallel()
	for name, addresses := range map[string]int{"one address": 1, "two addresses": 2} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := newAuthority(t)
			cfg := a.config()
			if addresses == 2 {
				cfg.Addresses = []string{a.addr, "localhost:" + port(t, a.addr)}
			}
			wires := cables(&cfg)
			c, _ := run(t, cfg)
			ready(t, c)
			before, _ := c.Credential()
			wires.leave("nowhere")
			eventually(t, "the cut", func() bool { return c.Ready() != nil })
			replaceRoot(t, a)
			trust, _ := a.Trust()
			write(t, cfg.RootFile, trust.PEM())
			wires.leave("")
			deadline := time.Now().Add(3 * time.Minute) // it takes less than one
			for now := before; now == before || c.Ready() != nil; now, _ = c.Credential() {
				if time.Now().After(deadline) {
					t.Fatalf("it does not come back: %v", c.Ready())
				}
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
}

func port(t *testing.T, address string) string {
	t.Helper()
	_, p, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// replaceRoot puts another root in the place of the active one, waiting for nobody.
func replaceRoot(t *testing.T, a *authority) {
	t.Helper()
	op := a.admin()
	old, err := op.Authorities(t.Context(), &capb.AuthoritiesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	root := ""
	for _, x := range old.GetAuthorities() {
		if x.GetState() == "active" && x.GetKind() == "root" {
			root = x.GetId()
		}
	}
	for _, s := range []struct {
		step capb.RotateRequest_Step
		id   string
	}{{capb.RotateRequest_STEP_PREPARE, ""}, {capb.RotateRequest_STEP_ACTIVATE, ""}, {capb.RotateRequest_STEP_TAINT, root}, {capb.RotateRequest_STEP_REVOKE, root}} {
		if _, err := op.Rotate(t.Context(), &capb.RotateRequest{Step: s.step, Id: s.id, Force: true}); err != nil {
			t.Fatalf("%s: %v", s.step, err)
		}
	}
}

// TestAnAgentWhoseMachineSlept renews when the system's clock says so: timers stood still.
func TestAnAgentWhoseMachineSlept(t *testing.T) {
	t.Parallel()
	a := newAuthority(t, func(c *ca.Config) { c.SVID.AgentTTL = time.Hour })
	c, err := caclient.New(a.config())
	if err != nil {
		t.Fatal(err)
	}
	var slept atomic.Int64
	c.SetWall(func() time.Time { return time.Now().Add(time.Duration(slept.Load())) })
	runThis(t, c)
	ready(t, c)
	before, _ := c.Credential()
	slept.Store(int64(59 * time.Minute))
	deadline := time.Now().Add(2 * time.Minute)
	for now := before; now == before; now, _ = c.Credential() {
		if time.Now().After(deadline) {
			t.Fatal("it was not renewed")
		}
		time.Sleep(10 * time.Millisecond)
	}
}
