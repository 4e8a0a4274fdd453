package storage

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
)

// recentMarks is how many batches back a head may be signed and still be checked
// and recorded: at the fastest measured pace of small batches, some seconds.
const recentMarks = 8192

// chain is what is known of a log up to some point, and the rules by which it may
// go on. Writer and readers share it, so nothing is written that would not be
// read.
type chain struct {
	instance uint32
	start    uint64 // sequence that reading began after; 0: it began with the log
	newest   mark
	// recent holds the marks of the newest batches, ascending and without gaps
	// between batches; newest is the last one. It starts with the first mark known.
	recent []mark
	signed Head // newest signed head; Signature nil: none
}

func newChain(instance uint32, base mark) chain {
	return chain{instance: instance, start: base.sequence, newest: base, recent: []mark{base}}
}

// advance goes on to the state after a batch.
func (c *chain) advance(m mark) {
	c.newest = m
	if len(c.recent) >= 2*recentMarks {
		c.recent = c.recent[:copy(c.recent, c.recent[len(c.recent)-recentMarks:])]
	}
	c.recent = append(c.recent, m)
}

// batch checks a batch against the chain and goes on.
func (c *chain) batch(b batch) error {
	if b.first != c.newest.sequence+1 {
		return fmt.Errorf("batch starts at sequence %d, %d is due", b.first, c.newest.sequence+1)
	}
	if b.prev != c.newest.hash {
		return fmt.Errorf("batch at sequence %d does not continue the hash chain", b.first)
	}
	if b.time <= 0 || b.time < c.newest.time {
		return fmt.Errorf("batch at sequence %d is older than the one before", b.first)
	}
	c.advance(b.after())
	return nil
}

// find is the place of a sequence among the recent marks.
func (c *chain) find(sequence uint64) (i int, ok bool) {
	return slices.BinarySearchFunc(c.recent, sequence, func(m mark, s uint64) int { return cmp.Compare(m.sequence, s) })
}

// holds says whether the chain went through the state that a head names; known is
// false for one from before the recent marks.
func (c *chain) holds(h Head) (same, known bool) {
	if h.Instance != c.instance {
		return false, true
	}
	if h.Sequence < c.recent[0].sequence {
		return false, false
	}
	i, ok := c.find(h.Sequence)
	return ok && c.recent[i].hash == h.Hash, true
}

// checkHead checks a signed head against what is known of the chain.
func (c *chain) checkHead(h Head) error {
	if len(h.Signature) == 0 || len(h.Signature) > MaxSignature {
		return fmt.Errorf("signature has %d bytes; 1 to %d are allowed", len(h.Signature), MaxSignature)
	}
	if h.Instance != c.instance {
		return fmt.Errorf("head is of instance %d, the log of %d", h.Instance, c.instance)
	}
	if h.Sequence < c.signed.Sequence {
		return fmt.Errorf("head at sequence %d is before the newest signed one at %d", h.Sequence, c.signed.Sequence)
	}
	// Who reads remembers the newest recentMarks at least, so no more are asked for.
	i, ok := c.find(h.Sequence)
	if !ok || len(c.recent)-i > recentMarks {
		return fmt.Errorf("head at sequence %d is not a recent state of this log", h.Sequence)
	}
	if m := c.recent[i]; m.hash != h.Hash || m.time != unixNano(h.Time) {
		return fmt.Errorf("head at sequence %d is not of this log", h.Sequence)
	}
	return nil
}

// head checks a signed head that is read back and goes on. carried says that a
// new segment repeats it.
func (c *chain) head(h Head, carried bool) error {
	if carried && c.signed.Signature != nil {
		if !h.Equal(c.signed) {
			return errors.New("segment does not start with the newest signed head")
		}
		return nil
	}
	if h.Instance == c.instance && h.Sequence < c.start && h.Sequence >= c.signed.Sequence {
		// What it covers is in a segment before the one that reading began with: it is
		// carried, or was signed before that segment began and recorded after.
		c.signed = h
		return nil
	}
	if err := c.checkHead(h); err != nil {
		return err
	}
	c.signed = h
	return nil
}

// unsigned is the newest state as a Head.
func (c *chain) unsigned() Head {
	return Head{Instance: c.instance, Sequence: c.newest.sequence, Hash: c.newest.hash, Time: fromUnixNano(c.newest.time)}
}
