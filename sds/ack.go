package sds

import "sync"

// acknowledgments knows, over all streams, which trust the clients have
// acknowledged.
type acknowledgments struct {
	mu sync.Mutex
	// streams counts the streams by what they have acknowledged; streams that carry
	// no bundle are not in it. Guarded by mu.
	streams map[uint64]int
	best    uint64        // highest answer of lowest; guarded by mu
	changed chan struct{} // guarded by mu; nil until somebody waits
}

func (a *acknowledgments) lowest(current uint64) (sequence uint64, changed <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	low := current
	for s := range a.streams {
		low = min(low, s)
	}
	a.best = max(a.best, low)
	if a.changed == nil {
		a.changed = make(chan struct{})
	}
	return min(a.best, current), a.changed
}

// acknowledgment is the part of one stream, owned by its pusher.
type acknowledgment struct {
	all      *acknowledgments
	counted  bool
	sequence uint64
}

// asking is called before the source is asked. From then on the stream holds the
// answer back: what the source says may be older than what lowest is asked for
// before the stream can say what it was sent.
func (a *acknowledgment) asking() {
	if !a.counted {
		a.set(0, true)
	}
}

// set says what the stream has acknowledged; it does not count if it carries no bundle.
func (a *acknowledgment) set(sequence uint64, carries bool) {
	if carries == a.counted && (!carries || sequence == a.sequence) {
		return
	}
	all := a.all
	all.mu.Lock()
	defer all.mu.Unlock()
	if carries {
		if all.streams == nil {
			all.streams = map[uint64]int{}
		}
		all.streams[sequence]++
	}
	if a.counted {
		all.streams[a.sequence]--
		if all.streams[a.sequence] == 0 {
			delete(all.streams, a.sequence)
			// Only the last stream to leave a sequence can change the answer.
			if all.changed != nil {
				close(all.changed)
				all.changed = nil
			}
		}
	}
	a.counted, a.sequence = carries, sequence
}
