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

// clock is wall-clock time that does not go back.
type clock struct {
	wall func() time.Time

	mu     sync.Mutex
	newest time.Time // guarded by mu
}

func (c *clock) now() (time.Time, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.wall()
	if t.Before(c.newest) {
		if c.newest.Sub(t) > maxStepBack {
			return time.Time{}, fmt.Errorf("%w: it says %s, the newest record is of %s; set the clock right and start again",
				ErrClock, t.UTC().Format(time.RFC3339), c.newest.UTC().Format(time.RFC3339))
		}
		return c.newest, nil
	}
	c.newest = t
	return t, nil
}
