package identity

import "sync"

// Watched is a value that others wait on, safe for concurrent use. The zero
// value holds the zero T.
type Watched[T any] struct {
	mu      sync.Mutex
	value   T             // guarded by mu; immutable once stored
	changed chan struct{} // guarded by mu; nil until somebody waits
}

// Load is the value, and a channel that is closed at the next Store.
func (w *Watched[T]) Load() (value T, changed <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.changed == nil {
		w.changed = make(chan struct{})
	}
	return w.value, w.changed
}

// Value is the value alone.
func (w *Watched[T]) Value() T {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.value
}

// Store sets the value and wakes all who wait. The value must not be changed
// afterwards.
func (w *Watched[T]) Store(value T) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.value = value
	if w.changed != nil {
		close(w.changed)
		w.changed = nil
	}
}
