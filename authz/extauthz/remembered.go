package extauthz

import (
	"strings"
	"sync"
)

// remembered is what was made of texts that come again and again, and take long to
// read. A nil *remembered remembers nothing.
type remembered[V any] struct {
	// most is how many each of two generations holds, longest how long a text may be.
	most, longest int

	mu sync.RWMutex
	// Two generations, guarded by mu: when the young one is full it becomes the
	// old one, and what was not used since then is forgotten.
	young, old map[string]V
}

func (r *remembered[V]) get(text string) (v V, ok bool) {
	if r == nil {
		return v, false
	}
	r.mu.RLock()
	v, young := r.young[text]
	if !young {
		v, ok = r.old[text]
	}
	r.mu.RUnlock()
	if young {
		return v, true
	}
	if ok {
		r.put(text, v)
	}
	return v, ok
}

// put remembers v, which must not be changed any more; it copies the text.
func (r *remembered[V]) put(text string, v V) {
	if r == nil || len(text) > r.longest {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.young) >= r.most || r.young == nil {
		r.old, r.young = r.young, make(map[string]V)
	}
	r.young[strings.Clone(text)] = v
}
