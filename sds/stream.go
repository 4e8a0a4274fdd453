package sds

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"time"

	"google.golang.org/grpc"

	"github.com/signet-mesh/signet/identity"
)

const (
	// retryAfter is when a source that failed is asked again, unless it reports a
	// change before.
	retryAfter = 5 * time.Second
	// A stream may send requestBurst requests at once, then one each
	// requestInterval. Envoy sends one for each response.
	requestBurst    = 100
	requestInterval = 100 * time.Millisecond
)

// protocol is the state of one stream in one of the two xDS protocols. Its methods
// are called by one goroutine and do not block.
type protocol[Req, Resp any] interface {
	// request takes in a request. An error is a gRPC status that ends the stream.
	request(*Req) (event, error)
	// wanted is the names to ask the source for.
	wanted() []string
	// respond is the response that is due, if any.
	respond(rs []Resource, complete bool) (resp *Resp, omitted int)
	// acknowledged is the trust that the client has acknowledged.
	acknowledged() (sequence uint64, carries bool)
	// from is what the client calls itself, for the log.
	from() string
}

// serve runs a stream: one goroutine reads, one writes, and this one waits, so
// that the stream ends with its context whatever the other two are blocked in.
// They end when serve has returned, because gRPC then fails what they wait for.
func serve[Req, Resp any](s service, st grpc.BidiStreamingServer[Req, Resp], p protocol[Req, Resp]) error {
	caller, err := callerOf(st.Context())
	if err != nil {
		return err
	}
	open := s.metrics.streams.WithLabelValues(s.label())
	open.Inc()
	defer open.Dec()
	ctx, cancel := context.WithCancel(st.Context())
	defer cancel()
	requests := make(chan *Req)
	over := make(chan error, 2)
	go func() { over <- read(ctx, st, requests) }()
	go func() {
		w := &pusher[Req, Resp]{service: s, st: st, p: p, caller: caller,
			log: s.log.With("pod_uid", caller.PodUID, "type", s.label()), ack: acknowledgment{all: &s.acks}}
		over <- w.run(ctx, requests)
	}()
	select {
	case err := <-over:
		return err
	case <-ctx.Done():
		s.log.Debug("stream ended", "pod_uid", caller.PodUID, "type", s.label(), "err", context.Cause(ctx))
		return ended(ctx)
	}
}

// read hands on the requests of a stream until it ends. It is nil if the client
// has closed its side: xDS clients do so only to end the stream.
func read[Req, Resp any](ctx context.Context, st grpc.BidiStreamingServer[Req, Resp], requests chan<- *Req) error {
	var rate pace
	for {
		r, err := st.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if d := rate.wait(time.Now()); d > 0 {
			select {
			case <-time.After(d):
			case <-ctx.Done():
				return ended(ctx)
			}
		}
		select {
		case requests <- r:
		case <-ctx.Done():
			return ended(ctx)
		}
	}
}

// pace says how long a request has to wait for its turn.
type pace struct {
	next time.Time // when the next request would be due if there were no burst
}

func (p *pace) wait(now time.Time) time.Duration {
	if p.next.Before(now) {
		p.next = now
	}
	d := p.next.Sub(now) - (requestBurst-1)*requestInterval
	p.next = p.next.Add(requestInterval)
	return max(d, 0)
}

// pusher writes one stream. All that it knows of the stream is its own.
type pusher[Req, Resp any] struct {
	service
	st     grpc.BidiStreamingServer[Req, Resp]
	p      protocol[Req, Resp]
	caller identity.Workload
	log    *slog.Logger
	ack    acknowledgment

	changed <-chan struct{} // of the source's newest answer
	retry   <-chan time.Time
	release context.CancelFunc // ends the source's interest in the newest answer
	failing bool
}

func (w *pusher[Req, Resp]) run(ctx context.Context, requests <-chan *Req) error {
	w.release = func() {}
	defer func() { w.release() }()
	defer w.ack.set(0, false)
	for {
		select {
		case <-ctx.Done():
			return ended(ctx)
		case r := <-requests:
			ev, err := w.p.request(r)
			if err != nil {
				return err
			}
			if ev.refused {
				w.metrics.nacks.WithLabelValues(w.label()).Inc()
				w.log.Warn("client refused a response; it keeps what it has", "proxy", w.p.from(), "err", ev.reason)
			}
			if !ev.ask {
				w.ack.set(w.p.acknowledged())
				continue
			}
		case <-w.changed:
		case <-w.retry:
		}
		if err := w.push(ctx); err != nil {
			return err
		}
	}
}

// push asks the source, and sends what the client lacks of the answer.
func (w *pusher[Req, Resp]) push(ctx context.Context) error {
	w.release()
	asked, release := context.WithCancel(ctx)
	w.release, w.changed, w.retry = release, nil, nil

	var rs []Resource
	var err error
	if names := w.p.wanted(); len(names) > 0 {
		w.ack.asking()
		rs, w.changed, err = w.source.Resources(asked, w.caller, w.typeURL, names)
	}
	if err != nil {
		w.retry = time.After(retryAfter)
		w.metrics.errors.WithLabelValues(w.label()).Inc()
		if !w.failing {
			// Once for each time that it begins to fail: a stream asks every few seconds.
			w.log.Warn("source of resources failed; the client keeps what it has", "proxy", w.p.from(), "err", err)
		}
	}
	w.failing = err != nil
	resp, omitted := w.p.respond(rs, err == nil)
	// Said before the response is out: the stream carries what it is about to be sent.
	w.ack.set(w.p.acknowledged())
	if omitted > 0 {
		w.metrics.omitted.WithLabelValues(w.label()).Add(float64(omitted))
	}
	if resp == nil {
		return nil
	}
	if err := w.st.Send(resp); err != nil {
		return err
	}
	w.metrics.pushes.WithLabelValues(w.label()).Inc()
	return nil
}
