package attest

import (
	"crypto/sha256"
	"sync"
	"time"

	"github.com/signet-mesh/signet/identity"
)

// cache remembers accepted tokens by their hash. It is a bounded map and not an
// LRU: only accepted tokens get in, so nobody can fill it who cannot have the issuer
// sign for it; a hit then needs no write lock; and the cost of evicting the wrong
// entry is one signature verification.
type cache struct {
	limit int

	mu     sync.RWMutex
	proofs map[[sha256.Size]byte]*proof // guarded by mu; a proof is never changed

	changed identity.Watched[uint64] // how many were added
}

func newCache(limit int) *cache {
	return &cache{limit: limit, proofs: map[[sha256.Size]byte]*proof{}}
}

func (c *cache) lookup(sum [sha256.Size]byte) (*proof, bool) {
	c.mu.RLock()
	p, ok := c.proofs[sum]
	c.mu.RUnlock()
	return p, ok
}

func (c *cache) drop(sum [sha256.Size]byte) {
	c.mu.Lock()
	delete(c.proofs, sum)
	c.mu.Unlock()
}

func (c *cache) len() int {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return len(c.proofs)
}

// add remembers p. When the cache is full it first forgets what has expired and
// then, if less than a tenth became free, arbitrary entries up to that tenth, so
// that a full cache is not swept at each addition.
func (c *cache) add(sum [sha256.Size]byte, p *proof, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.proofs) >= c.limit {
		for s, old := range c.proofs {
			if !now.Before(old.expires) {
				delete(c.proofs, s)
			}
		}
		keep := c.limit - max(1, c.limit/10)
		for s := range c.proofs {
			if len(c.proofs) <= keep {
				break
			}
			delete(c.proofs, s)
		}
	}
	c.proofs[sum] = p
	c.changed.Store(c.changed.Value() + 1)
}

// each calls yield for every proof.
func (c *cache) each(yield func(sum [sha256.Size]byte, p *proof)) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	for sum, p := range c.proofs {
		yield(sum, p)
	}
}
