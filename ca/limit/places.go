package limit

import (
	"container/list"
	"sync"
	"time"
)

// PlacesConfig bounds what is under way at once.
type PlacesConfig struct {
	// All is how many places there are. Required.
	All int
	// PerHolder is the most that one holder has; 0 means All.
	PerHolder int
	// Wait is how long whoever has a place may leave it unused, see [Place.Arrived], while
	// there is none for another one.
	Wait time.Duration
	// Shared says that a holder is perhaps several callers, as an address is: of those, one
	// who comes may take the place of one who does not use it.
	Shared bool
}

// Places are what callers hold of something of which there is not much. No holder has more
// than half of what the others leave, so that a few cannot take all, and there is one for who
// has none before another gets one more. Where all are taken, who has none gets that of whoever
// leaves it unused for longest. It is safe for concurrent use.
type Places struct {
	cfg PlacesConfig

	mu      sync.Mutex
	all     int            // guarded by mu
	held    map[string]int // by holder; guarded by mu
	waiting list.List      // of *Place that are not used yet, oldest first; guarded by mu
}

// Place is one of them.
type Place struct {
	places *Places
	holder string
	since  time.Time
	end    func()
	unused *list.Element // guarded by places.mu
	left   bool          // guarded by places.mu
}

// NewPlaces makes places that nobody has.
func NewPlaces(cfg PlacesConfig) *Places {
	if cfg.PerHolder <= 0 {
		cfg.PerHolder = cfg.All
	}
	return &Places{cfg: cfg, held: map[string]int{}}
}

// Take takes a place, if there is one for the holder. end is called when it is given to
// another one, from whose Take that is; what has it must end then.
func (p *Places) Take(holder string, now time.Time, end func()) (*Place, bool) {
	p.mu.Lock()
	var goes *Place
	if n := p.held[holder]; n >= p.cfg.PerHolder || 2*n >= p.cfg.All-p.all {
		switch {
		case n == 0: // all are taken
			goes = p.idle(now, func(*Place) bool { return true })
		case p.cfg.Shared:
			goes = p.idle(now, func(o *Place) bool { return o.holder == holder })
		}
		if goes == nil {
			p.mu.Unlock()
			return nil, false
		}
		p.leave(goes)
	}
	p.all++
	p.held[holder]++
	t := &Place{places: p, holder: holder, since: now, end: end}
	t.unused = p.waiting.PushBack(t)
	p.mu.Unlock()
	if goes != nil {
		goes.end()
	}
	return t, true
}

// idle is the place of some that is unused for longest, and for too long; nil if there is
// none. mu is held.
func (p *Places) idle(now time.Time, of func(*Place) bool) *Place {
	for e := p.waiting.Front(); e != nil; e = e.Next() {
		t := e.Value.(*Place)
		if now.Sub(t.since) < p.cfg.Wait {
			return nil
		}
		if of(t) {
			return t
		}
	}
	return nil
}

// leave gives a place back, once. mu is held.
func (p *Places) leave(t *Place) {
	if t.left {
		return
	}
	t.left = true
	p.used(t)
	p.all--
	if p.held[t.holder]--; p.held[t.holder] <= 0 {
		delete(p.held, t.holder)
	}
}

// used takes a place from those that are not used. mu is held.
func (p *Places) used(t *Place) {
	if t.unused != nil {
		p.waiting.Remove(t.unused)
		t.unused = nil
	}
}

// Arrived says that what the place is for is there, so that it is nobody else's any more.
func (t *Place) Arrived() {
	t.places.mu.Lock()
	defer t.places.mu.Unlock()
	t.places.used(t)
}

// Leave gives the place back. More than one call is one.
func (t *Place) Leave() {
	t.places.mu.Lock()
	defer t.places.mu.Unlock()
	t.places.leave(t)
}

// Taken is how many places are taken.
func (p *Places) Taken() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.all
}
