package ca_test

import (
	"encoding/binary"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca/capb"

	"google.golang.org/protobuf/types/known/timestamppb"
)

// TestHeadsOfOneNodeAreBounded: who returns heads without end has no more compared than
// others would ever return, and takes nothing from those.
func TestHeadsOfOneNodeAreBounded(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	agent, _ := w.attest(agentA)
	s, err := agent.WatchTrust(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(time.Minute)
	for n := uint64(1); !w.TooManyHeads(agentA.Node); {
		m := &capb.WatchTrustRequest{}
		for range 256 {
			hash := make([]byte, 32)
			binary.BigEndian.PutUint64(hash, n)
			m.LogHeads = append(m.LogHeads, &capb.LogHead{Instance: 1, Sequence: n, Hash: hash, Time: timestamppb.Now(), Signature: []byte("none")})
			n++
		}
		if err := s.Send(m); err != nil {
			t.Fatal(err)
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d heads, and each is compared", n)
		}
	}
	if w.TooManyHeads(agentB.Node) {
		t.Error("those of another node are not compared")
	}
	if err := w.Ready(); err != nil {
		t.Error(err)
	}
}
