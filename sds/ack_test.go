package sds_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/sds"
)

var trustCases = []struct {
	name, script string
	delta        bool
}{
	{name: "without a stream it is the current sequence", script: `
		trust 7 7`},
	{name: "a stream without a bundle does not count", script: `
		set default 1
		> default
		< default=1
		trust 7 7`},
	{name: "a bundle that was sent counts from its acknowledgment", script: `
		set ROOTCA r1 7
		> ROOTCA
		< ROOTCA=r1
		trust 7 0
		ack
		trust 7 7`},
	{name: "a newer bundle counts from its own acknowledgment", script: `
		set ROOTCA r1 7
		> ROOTCA
		< ROOTCA=r1
		ack
		trust 7 7
		set ROOTCA r2 8
		trust 8 7
		< ROOTCA=r2
		trust 8 7
		ack
		trust 8 8`},
	{name: "a newer sequence of the same content needs no push", script: `
		set ROOTCA r1 7
		> ROOTCA
		< ROOTCA=r1
		ack
		quiet
		set ROOTCA r1 9
		quiet
		trust 9 9`},
	{name: "a newer sequence of the same content before the acknowledgment counts with it", script: `
		set ROOTCA r1 7
		> ROOTCA
		< ROOTCA=r1
		set ROOTCA r1 9
		quiet
		trust 9 0
		ack
		trust 9 9`},
	{name: "a refused bundle does not count, the same content neither", script: `
		set ROOTCA r1 7
		> ROOTCA
		< ROOTCA=r1
		ack
		quiet
		set ROOTCA r2 8
		< ROOTCA=r2
		nack bad
		quiet
		trust 8 7
		set ROOTCA r2 9
		quiet
		trust 9 7`},
	{name: "an overtaken acknowledgment does not count", script: `
		set ROOTCA r1 7
		> ROOTCA
		< ROOTCA=r1
		set ROOTCA r2 8
		< ROOTCA=r2
		old ack
		trust 8 0
		ack
		trust 8 8`},
	{name: "the bundle in a response that is refused for another resource keeps its acknowledgment", script: `
		set ROOTCA r1 7
		set default 1
		> ROOTCA default
		< ROOTCA=r1 default=1
		ack
		quiet
		set default 2
		< ROOTCA=r1 default=2
		nack bad certificate
		quiet
		set ROOTCA r1 8
		trust 8 8`},
	{name: "a request with the newest nonce and an older version is no acknowledgment", script: `
		set ROOTCA r1 7
		> ROOTCA
		< ROOTCA=r1
		raw nonce=1 version=older names=ROOTCA
		quiet
		trust 7 0
		ack
		trust 7 7`},
	{name: "a stream that gives the bundle up does not count", script: `
		set ROOTCA r1 7
		set default 1
		> ROOTCA default
		< ROOTCA=r1 default=1
		trust 7 0
		> default
		trust 7 7`},
	{name: "a stream that ended does not count", script: `
		set ROOTCA r1 7
		> ROOTCA
		< ROOTCA=r1
		trust 7 0
		expire
		end Unavailable
		trust 7 7`},
	{name: "the answer never falls when a new stream opens", script: `
		set ROOTCA r1 7
		> ROOTCA
		< ROOTCA=r1
		ack
		trust 7 7
		reconnect
		> ROOTCA
		< ROOTCA=r1
		trust 7 7
		set ROOTCA r2 8
		< ROOTCA=r2
		trust 8 7`},
	{name: "the lowest of several bundles on a stream counts", delta: true, script: `
		set ROOTCA r1 7
		set spiffe://td r1 7
		+ ROOTCA
		go
		< ROOTCA=r1
		ack
		+ spiffe://td
		go
		< spiffe://td=r1
		set ROOTCA r2 8
		< ROOTCA=r2
		ack
		trust 8 0
		set spiffe://td r2 8
		< spiffe://td=r2
		old ack
		trust 8 0
		ack
		trust 8 8`},
	{name: "each response is acknowledged for itself", delta: true, script: `
		set ROOTCA r1 7
		set default 1
		+ ROOTCA default
		go
		< ROOTCA=r1 default=1
		set default 2
		< default=2
		old ack
		trust 7 7
		ack
		trust 7 7`},
	{name: "what a client brings from an earlier stream is acknowledged", delta: true, script: `
		set ROOTCA r1 7
		+ ROOTCA
		resume ROOTCA=r1
		go
		quiet
		trust 7 7`},
	{name: "what a client brings from an earlier stream in another version is not", delta: true, script: `
		set ROOTCA r1 7
		+ ROOTCA
		resume ROOTCA=r0
		go
		< ROOTCA=r1
		trust 7 0`},
	{name: "a bundle that is sent again keeps what was acknowledged", delta: true, script: `
		set ROOTCA r1 7
		+ ROOTCA
		go
		< ROOTCA=r1
		ack
		+ ROOTCA
		go
		< ROOTCA=r1
		trust 7 7`},
	{name: "a bundle that is gone does not count", delta: true, script: `
		set ROOTCA r1 7
		+ ROOTCA
		go
		< ROOTCA=r1
		trust 7 0
		drop ROOTCA
		< -ROOTCA
		trust 8 8`},
}

func TestAcknowledged(t *testing.T) {
	for _, c := range trustCases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			play(t, c.delta, c.script)
		})
	}
}

func TestAcknowledgedIsTheLowestOfAllStreamsAndTellsWhenItRises(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.set("ROOTCA", "r1", 7)
		n := startNode(t, w)
		var cs []*sotwWire
		for range 3 {
			c := openSotW(t, n, "pod-a")
			c.send([]string{"ROOTCA"})
			synctest.Wait()
			c.next()
			cs = append(cs, c)
		}
		for i, c := range cs {
			got, changed := n.server.Acknowledged(7)
			if got != 0 {
				t.Errorf("after %d of 3 acknowledgments: %d", i, got)
			}
			c.answer(false, "")
			synctest.Wait()
			select {
			case <-changed:
				if i < 2 {
					t.Errorf("a change after %d of 3 acknowledgments", i+1)
				}
			default:
				if i == 2 {
					t.Error("no change after the last acknowledgment")
				}
			}
		}
		if got, _ := n.server.Acknowledged(7); got != 7 {
			t.Errorf("after all acknowledgments: %d", got)
		}
	})
}

// slow is a Source that waits between looking and answering.
type slow struct {
	*world
	gate chan struct{}
}

func (s slow) Resources(ctx context.Context, c identity.Workload, typ string, names []string) ([]sds.Resource, <-chan struct{}, error) {
	rs, changed, err := s.world.Resources(ctx, c, typ, names)
	<-s.gate
	return rs, changed, err
}

func TestAnAnswerUnderWayHoldsAcknowledgedBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := slow{newWorld(), make(chan struct{})}
		s.set("ROOTCA", "r1", 7)
		n := startNode(t, s)
		c := openSotW(t, n, "pod-a")
		c.send([]string{"ROOTCA"})
		synctest.Wait() // the source has looked at 7
		s.set("ROOTCA", "r2", 8)
		if got, _ := n.server.Acknowledged(8); got != 0 {
			t.Errorf("while 7 is about to be sent: %d", got)
		}
		close(s.gate)
		synctest.Wait()
		if got := fmt.Sprint(first(c.next())) + fmt.Sprint(first(c.next())); got != "[ROOTCA=r1][ROOTCA=r2]" {
			t.Errorf("got %s", got)
		}
		c.answer(false, "")
		synctest.Wait()
		if got, _ := n.server.Acknowledged(8); got != 8 {
			t.Errorf("after the acknowledgment: %d", got)
		}
	})
}

func first[A, B any](a A, _ B) A { return a }
