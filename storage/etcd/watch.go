package etcd

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/signet-mesh/signet/storage"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Watch yields the changes after a revision. See storage.Store. While etcd is away it
// waits; when it is back it goes on without a gap, or yields storage.ErrCompacted. What
// a slow receiver has not taken yet is in memory.
func (s *Store) Watch(ctx context.Context, prefix string, after uint64) iter.Seq2[storage.Event, error] {
	return func(yield func(storage.Event, error) bool) {
		err := storage.CheckPrefix(prefix)
		if err == nil {
			w := &watcher{s: s, prefix: prefix, seen: after, yield: yield}
			err = w.run(ctx)
		}
		if err != nil {
			yield(storage.Event{}, fmt.Errorf("watching %q in etcd: %w", prefix, err))
		}
	}
}

// errStopped is that the receiver wants no more, or that its context ended.
var errStopped = errors.New("stopped")

type watcher struct {
	s      *Store
	prefix string
	// seen is a revision such that every change up to it was yielded.
	seen  uint64
	yield func(storage.Event, error) bool
}

func (w *watcher) run(ctx context.Context) error {
	for {
		err := w.stream(ctx)
		switch {
		case errors.Is(err, errStopped):
			return nil
		case w.s.life.Err() != nil:
			return storage.ErrClosed
		case ctx.Err() != nil:
			return nil
		case errors.As(err, &finalError{}):
			return err
		}
		if w.s.sleep(ctx, 100*time.Millisecond) != nil {
			continue
		}
	}
}

// stream watches until something ends it.
func (w *watcher) stream(ctx context.Context) error {
	start, err := w.start(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(w.s.life, cancel)()
	// A member that has lost the others ends the stream; another goes on.
	changes := w.s.client.Watch(clientv3.WithRequireLeader(ctx), w.s.entryKey(w.prefix), clientv3.WithPrefix(),
		clientv3.WithRev(start), clientv3.WithProgressNotify())
	for resp := range changes {
		if err := resp.Err(); err != nil {
			return err
		}
		// All events of a revision come in one response, and it is complete up to there.
		for _, ev := range resp.Events {
			if err := w.event(ctx, ev); err != nil {
				return err
			}
		}
		if n := len(resp.Events); n > 0 {
			w.seen = max(w.seen, uint64(resp.Events[n-1].Kv.ModRevision))
		} else if resp.IsProgressNotify() {
			w.seen = max(w.seen, uint64(resp.Header.Revision))
		}
	}
	return errors.New("the stream ended")
}

// start is the revision from which etcd is asked for changes. Others write to the same
// cluster, which compacts what is old whoever wrote it: where nothing of this store has
// changed since, nothing is missing although etcd has forgotten that time.
func (w *watcher) start(ctx context.Context) (int64, error) {
	var start int64
	err := w.s.try(ctx, func(ctx context.Context) error {
		resp, err := w.s.client.Get(ctx, w.s.revisionKey(), clientv3.WithKeysOnly())
		if err != nil {
			return err
		}
		newest, err := w.s.parseRevision(resp.Kvs)
		switch start = int64(w.seen) + 1; {
		case err != nil:
			return err
		case w.seen > uint64(resp.Header.Revision):
			return final(fmt.Errorf("revision %d is not reached yet, etcd is at %d; list again: %w", w.seen, resp.Header.Revision, storage.ErrCompacted))
		case newest <= w.seen:
			start = resp.Header.Revision + 1
			return nil
		}
		// What is too old is told apart from other failures here, where one answers for
		// all. Of the revision that history was compacted to a deletion may be gone, so
		// the one that was seen must be known itself.
		_, err = w.s.client.Get(ctx, w.s.revisionKey(), clientv3.WithCountOnly(), clientv3.WithRev(max(start-1, 1)))
		if errors.Is(err, rpctypes.ErrCompacted) {
			return final(fmt.Errorf("changes after revision %d are gone: %w", w.seen, storage.ErrCompacted))
		}
		return err
	})
	if err != nil && (errors.Is(err, storage.ErrCompacted) || errors.Is(err, storage.ErrCorrupt)) {
		err = final(err)
	}
	return start, err
}

func (w *watcher) event(ctx context.Context, ev *clientv3.Event) error {
	if ctx.Err() != nil {
		return errStopped
	}
	e := storage.Event{Deleted: ev.Type == mvccpb.DELETE}
	if e.Deleted {
		e.Entry = storage.Entry{Key: w.s.userKey(ev.Kv), Revision: uint64(ev.Kv.ModRevision)}
	} else {
		var err error
		if e.Entry, err = w.s.parseEntry(ev.Kv); err != nil {
			return final(err)
		}
	}
	if !w.yield(e, nil) {
		return errStopped
	}
	return nil
}
