package limit

import (
	"container/list"
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Urgency is how soon somebody needs an answer.
type Urgency uint8

const (
	// Urgent is who has nothing, or is about to lose it.
	Urgent Urgency = iota
	// InTime is who asks in good time.
	InTime

	urgencies = 2
)

// QueueConfig bounds a queue. Zero values mean the defaults.
type QueueConfig struct {
	// Items are worked on at once, and what the last request has beyond that: so nothing
	// is idle while a large one waits for room. 0 means 512.
	Items int
	// Bytes are what requests that wait may hold in all; 0 means 64 MiB.
	Bytes int64
	// Wait is the longest that a request may wait; 0 means 8 seconds. It is less than
	// callers wait for an answer, or work would be done for nobody.
	Wait time.Duration
	// Rate is how many items an agent may ask for in a second, Burst how many at once; 0
	// means as many as it likes.
	Rate, Burst int
	// Metrics may be nil.
	Metrics prometheus.Registerer
}

// Busy is why a request was sent away.
type Busy struct {
	// After is when there should be room.
	After time.Duration
	// Reason is "rate", "wait" or "memory".
	Reason string
}

// Error says so.
func (b *Busy) Error() string {
	return fmt.Sprintf("too much is asked for at once (%s); again in %v", b.Reason, b.After.Round(time.Millisecond))
}

// Ask is what wants to be worked on.
type Ask struct {
	// Agent is whose it is, Urgency how soon it is needed.
	Agent   string
	Urgency Urgency
	// Items and Bytes are how much it is.
	Items int
	Bytes int
}

// Queue is what requests of agents wait in. It is safe for concurrent use.
type Queue struct {
	cfg    QueueConfig
	rates  *Rates
	shed   *prometheus.CounterVec
	waited *prometheus.HistogramVec

	mu    sync.Mutex
	free  int              // items that may be begun besides; guarded by mu
	bytes int64            // of those who wait; guarded by mu
	items [urgencies]int   // of those who wait; guarded by mu
	lines [urgencies]*line // guarded by mu
	// pace is items per second that were given back lately, while others waited: what
	// waiting costs. Guarded by mu, as the beginning of the period that is counted.
	pace   float64
	since  time.Time
	worked int
}

// line is who waits, by agent; agents take turns.
type line struct {
	agents map[string]*list.Element // of turns
	turns  *list.List               // of *turn, whose turn it is first
}

// turn is the requests of one agent.
type turn struct {
	agent   string
	waiting *list.List // of *waiter
	// credit is how many items the agent may still have before it is another's turn.
	credit int
}

type waiter struct {
	Ask
	ready chan struct{} // closed when it may go on
	of    *turn
	at    *list.Element // in of.waiting; guarded by Queue.mu
}

// quantum is how many items an agent has in a turn: a whole batch of most nodes.
const quantum = 32

// NewQueue makes a queue.
func NewQueue(cfg QueueConfig) *Queue {
	def := func(n *int, v int) {
		if *n <= 0 {
			*n = v
		}
	}
	def(&cfg.Items, 512)
	if cfg.Bytes <= 0 {
		cfg.Bytes = 64 << 20
	}
	if cfg.Wait <= 0 {
		cfg.Wait = 8 * time.Second
	}
	q := &Queue{cfg: cfg, free: cfg.Items, rates: NewRates(cfg.Rate, cfg.Burst),
		shed: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "signet_ca_shed_total",
			Help: "Requests of agents that were sent away, by reason (rate, wait, memory)."}, []string{"reason"}),
		waited: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "signet_ca_wait_seconds",
			Help: "How long requests of agents waited to be worked on, by urgency.", Buckets: prometheus.ExponentialBuckets(0.001, 2, 14)}, []string{"urgency"}),
	}
	for i := range q.lines {
		q.lines[i] = &line{agents: map[string]*list.Element{}, turns: list.New()}
	}
	if cfg.Metrics != nil {
		cfg.Metrics.MustRegister(q.shed, q.waited, prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "signet_ca_waiting_items",
			Help: "Items that wait to be worked on."}, func() float64 { q.mu.Lock(); defer q.mu.Unlock(); return float64(q.items[Urgent] + q.items[InTime]) }))
	}
	return q
}

// Enter waits until r may be worked on; leave has to be called when it is done. The
// error is a *Busy, or that of ctx.
func (q *Queue) Enter(ctx context.Context, r Ask) (leave func(), err error) {
	now := time.Now()
	if after := q.rates.Take(r.Agent, r.Items, now); after > 0 {
		return nil, q.refuse("rate", after)
	}
	q.mu.Lock()
	if q.free > 0 && q.items[Urgent]+q.items[InTime] == 0 {
		q.free -= r.Items
		q.mu.Unlock()
		return q.leaver(r.Items), nil
	}
	if q.bytes+int64(r.Bytes) > q.cfg.Bytes {
		after := q.cost(q.items[Urgent] + q.items[InTime])
		q.mu.Unlock()
		return nil, q.refuse("memory", after)
	}
	if ahead := q.ahead(r); q.cost(ahead) > q.cfg.Wait {
		after := q.cost(ahead)
		q.mu.Unlock()
		return nil, q.refuse("wait", after)
	}
	w := &waiter{Ask: r, ready: make(chan struct{})}
	q.push(w)
	q.mu.Unlock()
	timeout := time.NewTimer(q.cfg.Wait)
	defer timeout.Stop()
	select {
	case <-w.ready:
	case <-ctx.Done():
		if q.abandon(w) {
			return nil, context.Cause(ctx)
		}
	case <-timeout.C:
		if q.abandon(w) {
			return nil, q.refuse("wait", q.cfg.Wait/2)
		}
	}
	q.waited.WithLabelValues([]string{"urgent", "renewal"}[r.Urgency]).Observe(time.Since(now).Seconds())
	return q.leaver(r.Items), nil
}

// refuse counts one that is sent away. Its agent is told a time of its own, so that all
// do not come back together.
func (q *Queue) refuse(reason string, after time.Duration) error {
	q.shed.WithLabelValues(reason).Inc()
	after = min(max(after, 200*time.Millisecond), 30*time.Second)
	return &Busy{After: after + time.Duration(rand.Float64()*float64(after)/2), Reason: reason}
}

func (q *Queue) leaver(items int) func() {
	return sync.OnceFunc(func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		q.free += items
		q.count(items)
		q.admit()
	})
}

// count keeps the pace, over periods of half a second in which somebody waited. mu is
// held.
func (q *Queue) count(items int) {
	now := time.Now()
	if q.items[Urgent]+q.items[InTime] == 0 {
		q.since, q.worked = time.Time{}, 0 // it could be faster, and nobody knows by how much
		return
	}
	if q.since.IsZero() {
		q.since, q.worked = now, 0
		return
	}
	q.worked += items
	if d := now.Sub(q.since); d >= 500*time.Millisecond {
		pace := float64(q.worked) / d.Seconds()
		if q.pace > 0 {
			pace = (pace + q.pace) / 2
		}
		q.pace, q.since, q.worked = pace, now, 0
	}
}

// cost is how long so many items take; nothing while the pace is not known. mu is held.
func (q *Queue) cost(items int) time.Duration {
	if q.pace == 0 {
		return 0
	}
	return time.Duration(float64(items) / q.pace * float64(time.Second))
}

// ahead is how many items come before r: at most what its line and those before it
// hold, and no more than as many of each other agent as of its own. mu is held.
func (q *Queue) ahead(r Ask) (n int) {
	for u := range r.Urgency {
		n += q.items[u]
	}
	l := q.lines[r.Urgency]
	own := r.Items
	if e := l.agents[r.Agent]; e != nil {
		t := e.Value.(*turn)
		for w := t.waiting.Front(); w != nil; w = w.Next() {
			own += w.Value.(*waiter).Items
		}
	}
	fair := (own + quantum) * (l.turns.Len() + 1)
	return n + min(q.items[r.Urgency], fair)
}

// push puts w into its line. mu is held.
func (q *Queue) push(w *waiter) {
	l := q.lines[w.Urgency]
	e := l.agents[w.Agent]
	if e == nil {
		e = l.turns.PushBack(&turn{agent: w.Agent, waiting: list.New(), credit: quantum})
		l.agents[w.Agent] = e
	}
	w.of = e.Value.(*turn)
	w.at = w.of.waiting.PushBack(w)
	q.items[w.Urgency] += w.Items
	q.bytes += int64(w.Bytes)
}

// admit lets go on who is next, while there is capacity. mu is held.
func (q *Queue) admit() {
	for u := range q.lines {
		l := q.lines[u]
		for e := l.turns.Front(); e != nil; e = l.turns.Front() {
			t := e.Value.(*turn)
			first := t.waiting.Front()
			if first == nil {
				l.turns.Remove(e)
				delete(l.agents, t.agent)
				continue
			}
			w := first.Value.(*waiter)
			switch {
			case q.free <= 0:
				return
			case t.credit <= 0:
				t.credit += quantum
				l.turns.MoveToBack(e)
				continue
			}
			t.waiting.Remove(first)
			t.credit -= w.Items
			q.free -= w.Items
			q.items[u] -= w.Items
			q.bytes -= int64(w.Bytes)
			close(w.ready)
		}
	}
}

// abandon takes w out of its line, and reports whether it was still there.
func (q *Queue) abandon(w *waiter) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	select {
	case <-w.ready:
		return false
	default:
	}
	w.of.waiting.Remove(w.at)
	q.items[w.Urgency] -= w.Items
	q.bytes -= int64(w.Bytes)
	q.admit() // who waited behind it may fit
	return true
}
