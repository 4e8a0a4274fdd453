package storage

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"sort"
	"strings"
	"sync"
)

const (
	defaultHistory = 16384
	// maxHistoryBytes bounds what the kept changes take, keys and values.
	maxHistoryBytes = 16 << 20
	// watchBatch is about how many changes are taken at once for a watcher.
	watchBatch = 256
)

// history is the newest changes of a store, for its watchers. Nothing is kept per
// watcher: one that is too slow finds what it needs gone.
type history struct {
	limit int

	mu      sync.Mutex
	events  []Event       // every change after floor, in order; guarded by mu
	bytes   int           // of keys and values in events; guarded by mu
	floor   uint64        // guarded by mu
	newest  uint64        // guarded by mu
	changed chan struct{} // closed and replaced when something is added; guarded by mu
	err     error         // why there will be no more; guarded by mu
}

func newHistory(limit int, revision uint64) *history {
	return &history{limit: limit, floor: revision, newest: revision, changed: make(chan struct{})}
}

// add takes the events of one commit, which all have its revision.
func (h *history) add(events []Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, e := range events {
		h.bytes += len(e.Key) + len(e.Value)
	}
	h.events = append(h.events, events...)
	h.newest = events[0].Revision
	if len(h.events) > h.limit || h.bytes > maxHistoryBytes {
		h.trim()
	}
	close(h.changed)
	h.changed = make(chan struct{})
}

// trim drops the oldest commits, a quarter more than it must, so that it is not
// done for each commit. mu is held.
func (h *history) trim() {
	n := 0
	for n < len(h.events) && (len(h.events)-n > h.limit*3/4 || h.bytes > maxHistoryBytes*3/4) {
		h.floor = h.events[n].Revision
		for ; n < len(h.events) && h.events[n].Revision == h.floor; n++ {
			h.bytes -= len(h.events[n].Key) + len(h.events[n].Value)
		}
	}
	h.events = slices.Delete(h.events, 0, n)
}

// end wakes the watchers for the last time.
func (h *history) end(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.err == nil {
		h.err = err
		close(h.changed)
	}
}

// next returns whole commits after a revision, or, if there are none yet, what to
// wait for.
func (h *history) next(after uint64) (events []Event, changed <-chan struct{}, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if after < h.floor {
		return nil, nil, fmt.Errorf("changes up to revision %d are gone, those after %d were asked for: %w", h.floor, after, ErrCompacted)
	}
	if after > h.newest {
		return nil, nil, fmt.Errorf("revision %d is not reached yet, the store is at %d; list again: %w", after, h.newest, ErrCompacted)
	}
	i := sort.Search(len(h.events), func(i int) bool { return h.events[i].Revision > after })
	j := min(i+watchBatch, len(h.events))
	for j < len(h.events) && h.events[j].Revision == h.events[j-1].Revision {
		j++
	}
	if i == j {
		return nil, h.changed, h.err
	}
	return slices.Clone(h.events[i:j]), nil, nil
}

// watch yields until ctx ends or yield returns false; then it returns nil.
func (h *history) watch(ctx context.Context, prefix string, after uint64, yield func(Event, error) bool) error {
	for {
		events, changed, err := h.next(after)
		if err != nil {
			return err
		}
		for _, e := range events {
			if ctx.Err() != nil {
				return nil
			}
			after = e.Revision
			if !strings.HasPrefix(e.Key, prefix) {
				continue
			}
			e.Value = bytes.Clone(e.Value)
			if !yield(e, nil) {
				return nil
			}
		}
		if len(events) > 0 {
			continue
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}
