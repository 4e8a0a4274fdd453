package caclient

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/identity"

	"google.golang.org/protobuf/proto"
)

// heads are the signed heads of authorities' issuance logs that this agent has
// seen: for each instance the one that covers most records, and, where that is
// another one, the one that was written last, so that a log that was cut is found
// out and the cut one is watched too. They go back to the authority, which finds out
// by them that its log lost records.
type heads struct {
	mu         sync.Mutex
	byInstance map[uint32]seen                   // guarded by mu
	all        identity.Watched[[]*capb.LogHead] // what byInstance holds, in order
}

type seen struct{ highest, newest *capb.LogHead } // immutable

const (
	// maxInstance is the highest instance byte.
	maxInstance = 0x7f
	// headsVersion is the first byte of what save returns.
	headsVersion = 1
	maxSignature = 256
	maxHash      = 64
)

// see takes a head that an authority sent. Nothing that is not needed is kept of it.
func (h *heads) see(p *capb.LogHead) {
	if p.GetSequence() == 0 || p.GetInstance() > maxInstance || len(p.GetSignature()) > maxSignature || len(p.GetHash()) > maxHash {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.byInstance[p.GetInstance()]
	if s.highest == nil || p.GetSequence() > s.highest.GetSequence() {
		s.highest = p
	}
	if s.newest == nil || p.GetTime().AsTime().After(s.newest.GetTime().AsTime()) {
		s.newest = p
	}
	if s == h.byInstance[p.GetInstance()] {
		return
	}
	if h.byInstance == nil {
		h.byInstance = map[uint32]seen{}
	}
	h.byInstance[p.GetInstance()] = s
	var all []*capb.LogHead
	for i := range uint32(maxInstance + 1) {
		s, ok := h.byInstance[i]
		if !ok {
			continue
		}
		if all = append(all, s.highest); s.newest != s.highest {
			all = append(all, s.newest)
		}
	}
	h.all.Store(all)
}

// sameHeads compares by pointer: heads are immutable and kept.
func sameHeads(a, b []*capb.LogHead) bool { return slices.Equal(a, b) }

// load takes what save returned.
func (h *heads) load(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	if b[0] != headsVersion {
		return fmt.Errorf("saved heads of issuance logs have version %d, and this program reads %d", b[0], headsVersion)
	}
	m := &capb.WatchTrustRequest{}
	if err := proto.Unmarshal(b[1:], m); err != nil {
		return errors.New("saved heads of issuance logs are damaged")
	}
	for _, p := range m.GetLogHeads() {
		h.see(p)
	}
	return nil
}

// LogHeads is what the agent has to keep over a restart so that an authority cannot
// forget what it has signed, for Config.SavedLogHeads, and a channel that is closed
// when it changes. It is nil before the first head.
func (c *Client) LogHeads() (saved []byte, changed <-chan struct{}) {
	all, changed := c.heads.all.Load()
	if len(all) == 0 {
		return nil, changed
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(&capb.WatchTrustRequest{LogHeads: all})
	if err != nil {
		return nil, changed // of messages that were received, none is invalid
	}
	return append([]byte{headsVersion}, b...), changed
}
