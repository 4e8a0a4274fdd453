package ca

import (
	"errors"
	"fmt"
	"sync"
	"time"
)

// maxStepBack is how far the clock may lie before the newest record. Less is a
// correction by a time daemon and time goes on from the newest record; more means
// that this or the earlier time is wrong, and certificates made now could outlive
// what anybody meant.
const maxStepBack = 5 * time.Minute

// ErrClock is returned while the system clock is more than five minutes before
// the newest thing that the authority recorded. Nothing is signed then.
var ErrClock = errors.New("the system clock is more than five minutes before the newest record")

// clock is wall-clock time that does not go back behind what was recorded.
type clock struct {
	wall func() time.Time

	mu     sync.Mutex
	newest time.Time // of what was recorded, without a monotonic reading; guarded by mu
}

// now is the time to put into certificates. Only what was recorded holds it: a
// glitch into the future that nobody used is over when it is over.
func (c *clock) now() (time.Time, error) {
	// Round(0) drops the monotonic reading, which would hide a step of the clock.
	t := c.wall().Round(0)
	c.mu.Lock()
	defer c.mu.Unlock()
	if t.Before(c.newest) {
		if c.newest.Sub(t) > maxStepBack {
			return time.Time{}, fmt.Errorf("%w: it says %s, the newest record is of %s; set the clock right and start again",
				ErrClock, t.UTC().Format(time.RFC3339), c.newest.UTC().Format(time.RFC3339))
		}
		return c.newest, nil
	}
	return t, nil
}

// recorded notes that something with time t became durable.
func (c *clock) recorded(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t = t.Round(0); t.After(c.newest) {
		c.newest = t
	}
}
