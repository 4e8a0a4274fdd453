package caclient

import "github.com/signet-mesh/signet/ca/capb"

// ParseBans reads bans off the wire.
var ParseBans = parseBans

// Heed takes bans that an authority says.
func (c *Client) Heed(p *capb.Bans) { c.heed(p) }

// Believe takes a state of trust that an authority says.
func (c *Client) Believe(p *capb.Trust) error { return c.believe(p) }

// Order is in which order an agent tries replicas.
type Order struct{ o *order }

func NewOrder(node string, addresses []string) Order { return Order{newOrder(node, addresses)} }

func (o Order) Now() []string       { return o.o.now() }
func (o Order) Last(address string) { o.o.last(address) }
