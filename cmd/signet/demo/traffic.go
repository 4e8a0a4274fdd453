package demo

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
)

// traffic is constant load on one address: a number of connections, each with one
// request after the other, at a steady pace.
type traffic struct {
	address, path string
	every         time.Duration // between two requests of a connection

	stop chan struct{} // closed when no further request may begin
	wg   sync.WaitGroup

	mu      sync.Mutex
	samples []sample // guarded by mu
	dials   int      // guarded by mu
}

// sample is one request.
type sample struct {
	began   time.Time
	took    time.Duration
	failure string // empty: the answer was 200
}

// startTraffic begins at once. Every answer but 200, and every error, of the
// connection too, is a failed request; nothing is tried again.
func startTraffic(ctx context.Context, address, path string, connections int, every time.Duration) *traffic {
	t := &traffic{address: address, path: path, every: every, stop: make(chan struct{})}
	for i := range connections {
		// Spread over the interval, as independent clients are.
		t.wg.Go(func() { t.connection(ctx, every*time.Duration(i)/time.Duration(connections)) })
	}
	return t
}

// connection is what one of the clients does.
func (t *traffic) connection(ctx context.Context, offset time.Duration) {
	next := time.Now().Add(offset)
	var w *wire
	defer func() {
		if w != nil {
			w.close()
		}
	}()
	for t.wait(ctx, next) {
		// A request that took longer than the interval delays the next one, so
		// that there is never more than one on a connection.
		next = time.Now().Add(t.every)
		s := sample{began: time.Now()}
		var err error
		if w == nil {
			t.mu.Lock()
			t.dials++
			t.mu.Unlock()
			w, err = dialWire(ctx, t.address, nil)
		}
		var a answer
		if err == nil {
			a, err = w.get(ctx, t.path)
		}
		s.took = time.Since(s.began)
		switch {
		case ctx.Err() != nil:
			return // interrupted; that says nothing about the product
		case err != nil:
			s.failure = err.Error()
			if w != nil {
				w.close()
				w = nil
			}
		case a.status != 200:
			s.failure = fmt.Sprintf("status %d: %.80s", a.status, a.body)
		}
		t.mu.Lock()
		t.samples = append(t.samples, s)
		t.mu.Unlock()
	}
}

// wait waits for a moment; false if the traffic ends before.
func (t *traffic) wait(ctx context.Context, until time.Time) bool {
	timer := time.NewTimer(time.Until(until))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.stop:
		return false
	case <-timer.C:
	}
	// Where the moment has passed long ago select takes either.
	select {
	case <-t.stop:
		return false
	default:
		return true
	}
}

// end lets the requests that have begun end, and returns what was seen. It must
// be called once.
func (t *traffic) end() report {
	close(t.stop)
	t.wg.Wait()
	t.mu.Lock()
	defer t.mu.Unlock()
	return report{samples: t.samples, dials: t.dials}
}

// failures are the requests that have failed so far.
func (t *traffic) failures() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return report{samples: t.samples}.failed()
}

// report is what some traffic saw.
type report struct {
	samples []sample
	dials   int
}

func (r report) failed() (n int) {
	for _, s := range r.samples {
		if s.failure != "" {
			n++
		}
	}
	return n
}

// slowest is how long the request took that took longest.
func (r report) slowest() (d time.Duration) {
	for _, s := range r.samples {
		d = max(d, s.took)
	}
	return d
}

// during is how many requests were under way at some moment between the two.
func (r report) during(from, to time.Time) (n int) {
	for _, s := range r.samples {
		if s.began.Before(to) && s.began.Add(s.took).After(from) {
			n++
		}
	}
	return n
}

// String is the line for the table.
func (r report) String() string {
	return fmt.Sprintf("%d requests on %d connections, %d failed, slowest %s", len(r.samples), r.dials, r.failed(), short(r.slowest()))
}

// err is nil if requests were made, none failed and no connection had to be made
// anew.
func (r report) err(connections int) error {
	reasons := map[string]int{}
	for _, s := range r.samples {
		if s.failure != "" {
			reasons[s.failure]++
		}
	}
	switch {
	case len(r.samples) == 0:
		return fmt.Errorf("no request was made")
	case len(reasons) > 0:
		// The most frequent reason says most.
		worst := slices.MaxFunc(slices.Sorted(maps.Keys(reasons)), func(a, b string) int { return reasons[a] - reasons[b] })
		return fmt.Errorf("%d of %d requests failed, %d of them with %q", r.failed(), len(r.samples), reasons[worst], worst)
	case r.dials != connections:
		return fmt.Errorf("%d connections were made, not %d", r.dials, connections)
	}
	return nil
}

// short is a duration for people.
func short(d time.Duration) string {
	switch {
	case d >= time.Second:
		return fmt.Sprintf("%.2f s", d.Seconds())
	case d >= 10*time.Millisecond:
		return fmt.Sprintf("%.0f ms", float64(d)/1e6)
	default:
		return fmt.Sprintf("%.1f ms", float64(d)/1e6)
	}
}
