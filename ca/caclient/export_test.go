package caclient

import (
	"maps"
	"time"

	"github.com/signet-mesh/signet/ca/capb"

	"google.golang.org/protobuf/proto"
)

// ParseBans reads bans off the wire.
var ParseBans = parseBans

// Hear takes what an authority says.
func (c *Client) Hear(m *capb.WatchTrustResponse) error { return c.hear(m) }

// Heed takes bans that an authority says.
func (c *Client) Heed(p *capb.Bans) { c.heed(p) }

// Believe takes a state of trust that an authority says.
func (c *Client) Believe(p *capb.Trust) error { return c.believe(p) }

// HighestHead is the highest sequence of the heads that LogHeads returned; 0: of none.
func HighestHead(saved []byte) (highest uint64) {
	var m capb.WatchTrustRequest
	if len(saved) == 0 || proto.Unmarshal(saved[1:], &m) != nil {
		return 0
	}
	for _, h := range m.GetLogHeads() {
		highest = max(highest, h.GetSequence())
	}
	return highest
}

// SetWall gives a client that does not run yet another system clock.
func (c *Client) SetWall(now func() time.Time) { c.wall = now }

// LeaveWithin is in how long, at most, for the first time.
const LeaveWithin = leaveWithin

// LeaveIn is in how long a replica is left that is cut off.
var LeaveIn = leaveIn

// LeaveAgain is how often that is, at most.
const LeaveAgain = leaveAgain

// Order is in which order an agent tries replicas.
type Order struct{ o *order }

func NewOrder(node string, addresses []string) Order { return Order{newOrder(node, addresses)} }

func (o Order) At(t time.Time) []string            { return o.o.at(t) }
func (o Order) Last(address string, now time.Time) { o.o.last(address, now) }

// Clone is an order that goes its own ways from here on.
func Clone(o Order) Order {
	return Order{&order{ranked: o.o.ranked, left: maps.Clone(o.o.left)}}
}
