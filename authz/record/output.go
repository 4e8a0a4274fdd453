package record

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"
)

// Output is where records go: a [File], an [OTLP] or a [Stream].
type Output interface {
	// name is what metrics and logs call it.
	name() string
	// wait is how long a record may wait for others to go with it.
	wait() time.Duration
	// write writes lines. What it lost of them, with an error, is not tried again. It
	// returns soon after ctx ends.
	write(ctx context.Context, lines []line) (lost int, err error)
	// close is called once, after the last write.
	close() error
}

// line is a record in its form, and as it is.
type line struct {
	text   []byte
	record *Record // its head
}

const maxBatch = 512

// output feeds an Output.
type output struct {
	Output
	queue   chan line
	bytes   atomic.Int64 // of the lines in queue
	most    int64
	log     *slog.Logger
	metrics *metrics
	failing bool // owned by run
}

func (r *Recorder) newOutput(o Output) *output {
	out := &output{Output: o, queue: make(chan line, 16<<10), most: r.most, log: r.log, metrics: r.metrics}
	r.metrics.written.WithLabelValues(o.name())
	return out
}

// add is called by Recorder.Run alone.
func (o *output) add(l line) {
	n := int64(len(l.text))
	if o.bytes.Add(n) <= o.most {
		select {
		case o.queue <- l:
			return
		default:
		}
	}
	o.bytes.Add(-n)
	o.metrics.lost.WithLabelValues(o.name(), "queue").Inc()
}

// run writes until the queue is closed or ctx ends.
func (o *output) run(ctx context.Context) {
	defer func() {
		if err := o.close(); err != nil {
			o.log.Error("closing an output of decision records", "output", o.name(), "err", err)
		}
	}()
	batch := make([]line, 0, maxBatch)
	for {
		var ok bool
		if batch, ok = o.collect(ctx, batch[:0]); len(batch) > 0 {
			o.flush(ctx, batch)
		}
		if !ok {
			return
		}
	}
}

// collect waits for a line, and takes those that come with it. ok is false after the
// last.
func (o *output) collect(ctx context.Context, batch []line) (_ []line, ok bool) {
	take := func(l line) {
		o.bytes.Add(-int64(len(l.text)))
		batch = append(batch, l)
	}
	select {
	case l, ok := <-o.queue:
		if !ok {
			return batch, false
		}
		take(l)
	case <-ctx.Done():
		return batch, false
	}
	patience := time.NewTimer(o.wait())
	defer patience.Stop()
	for len(batch) < maxBatch {
		select {
		case l, ok := <-o.queue:
			if !ok {
				return batch, false
			}
			take(l)
			continue
		default:
		}
		if o.wait() == 0 {
			break
		}
		select {
		case l, ok := <-o.queue:
			if !ok {
				return batch, false
			}
			take(l)
		case <-patience.C:
			return batch, true
		case <-ctx.Done():
			return batch, false
		}
	}
	return batch, true
}

func (o *output) flush(ctx context.Context, batch []line) {
	lost, err := o.write(ctx, batch)
	o.metrics.written.WithLabelValues(o.name()).Add(float64(len(batch) - lost))
	if lost > 0 {
		o.metrics.lost.WithLabelValues(o.name(), "write").Add(float64(lost))
	}
	// Told when it begins and when it ends; what is in between is counted.
	switch failing := err != nil; {
	case failing && !o.failing:
		o.log.Error("decision records are lost", "output", o.name(), "err", err)
		o.failing = true
	case !failing && o.failing:
		o.log.Info("decision records are kept again", "output", o.name())
		o.failing = false
	}
}
