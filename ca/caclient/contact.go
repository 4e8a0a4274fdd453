package caclient

import (
	"context"
	mathrand "math/rand/v2"
	"net"
	"sync"
	"time"
)

const (
	// silence is how long no stream may be answered before the token is tried, whatever
	// was heard before: an authority that was set up anew, or whose root was replaced, refuses
	// old SVIDs in the handshake, which looks like one that is away.
	silence = 30 * time.Second
	// refusal is for how long, at least, connections must be made and come to nothing: when an
	// authority is back that was away, its agents come back with what they have. Each
	// waits up to twice as long as the others.
	refusal = 8 * time.Second
	// outage is after which time the token is tried although no connection is made.
	outage = 2 * time.Minute
	// lookAgain is how often a session is looked at.
	lookAgain = 5 * time.Second
)

// contact is what is known, over all sessions, of whether the authority answers. It is
// safe for concurrent use.
type contact struct {
	mu       sync.Mutex
	live     int           // streams that were answered and have not ended; guarded by mu
	since    time.Time     // since when there is none, or the token was tried; guarded by mu
	dialed   time.Time     // the first connection that was made since then; guarded by mu
	patience time.Duration // for how long connections may come to nothing; guarded by mu
}

// begin notes that a stream is answered, end that it ended.
func (c *contact) begin() { c.mu.Lock(); defer c.mu.Unlock(); c.live++ }

func (c *contact) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.live--; c.live == 0 {
		c.restart()
	}
}

// tried notes that the token was tried, or is about to be.
func (c *contact) tried() { c.mu.Lock(); defer c.mu.Unlock(); c.restart() }

// restart begins to wait. c.mu is held.
func (c *contact) restart() {
	c.since, c.dialed = time.Now(), time.Time{}
	c.patience = refusal + time.Duration(mathrand.Float64()*float64(refusal))
}

// silent reports whether it is time to try the token because no stream is answered.
func (c *contact) silent(now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.live > 0 || now.Sub(c.since) < silence {
		return false
	}
	return !c.dialed.IsZero() && now.Sub(c.dialed) >= c.patience || now.Sub(c.since) >= outage+c.patience
}

// dialer is dial, and notes what is made.
func (c *contact) dialer(dial func(ctx context.Context, address string) (net.Conn, error)) func(ctx context.Context, address string) (net.Conn, error) {
	return func(ctx context.Context, address string) (net.Conn, error) {
		conn, err := dial(ctx, address)
		if err == nil {
			c.mu.Lock()
			if c.dialed.IsZero() {
				c.dialed = time.Now()
			}
			c.mu.Unlock()
		}
		return conn, err
	}
}
