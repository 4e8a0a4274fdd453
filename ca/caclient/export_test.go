package caclient

import "github.com/signet-mesh/signet/ca/capb"

// ParseBans reads bans off the wire.
var ParseBans = parseBans

// Heed takes bans that an authority says.
func (c *Client) Heed(p *capb.Bans) { c.heed(p) }
