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
	young, old map[string]rememberedValue[V]
	// heavy is the weight of the young one, guarded by mu.
	heavy int
}

type rememberedValue[V any] struct {
	v      V
	weight int
}

// maxRememberedWeight is how much memory, about, each generation takes at most, in
// bytes.
const maxRememberedWeight = 4 << 20

func (r *remembered[V]) get(text string) (v V, ok bool) {
	if r == nil {
		return v, false
	}
	r.mu.RLock()
	e, young := r.young[text]
	if !young {
		e, ok = r.old[text]
	}
	r.mu.RUnlock()
	if young {
		return e.v, true
	}
	if ok {
		r.put(text, e.v, e.weight)
	}
	return e.v, ok
}

// put remembers v, which must not be changed any more; it copies the text. weight is
// about how many bytes v takes.
func (r *remembered[V]) put(text string, v V, weight int) {
	if r == nil || len(text) > r.longest || weight+len(text) > maxRememberedWeight {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, there := r.young[text]; there {
		return
	}
	if len(r.young) >= r.most || r.young == nil || r.heavy+weight+len(text) > maxRememberedWeight {
		r.old, r.young, r.heavy = r.young, make(map[string]rememberedValue[V]), 0
	}
	r.young[strings.Clone(text)] = rememberedValue[V]{v, weight}
	r.heavy += weight + len(text)
}
