package ca_test

import (
	"context"
	"testing"
	"testing/synctest"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestAgentsAreHeldToTheirLimits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, testAgentsAreHeldToTheirLimits) // a busy machine gives nobody more
}

func testAgentsAreHeldToTheirLimits(t *testing.T) {
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
	w.close()
}

// TestAFloodOfStreamsIsRefused, and others go on.
func TestAFloodOfStreamsIsRefused(t *testing.T) {
	t.Parallel()
	synctest.Test(t, testAFloodOfStreamsIsRefused) // a busy machine would be slower than the limit
}

func testAFloodOfStreamsIsRefused(t *testing.T) {
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
	w.close()
}
