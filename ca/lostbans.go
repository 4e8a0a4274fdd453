package ca

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// A state that is restored has the bans of its copy. Those from after that are gone, and
// agents lift them when they hear of the others; but first they say which they enforced.

// lostBansKept is for how long an alarm says that bans were lost where nobody bans anybody
// again: perhaps there is nobody to ban.
const lostBansKept = 24 * time.Hour

// lostBans are the nodes whose agents enforced bans that a restored state does not know.
// Safe for concurrent use.
type lostBans struct {
	mu    sync.Mutex
	nodes map[string]bool // guarded by mu
	last  time.Time       // when one was shown last; guarded by mu
}

// answered reports whether an operator has banned somebody, or ended a ban, since the
// state was restored.
func (b *bansState) answered() bool {
	r := b.number.Restored
	if r == nil {
		return true
	}
	for _, ban := range b.records {
		if ban.At.After(r.At) || ban.Ended != nil && ban.Ended.At.After(r.At) && (ban.Until.IsZero() || ban.Ended.At.Before(ban.Until)) {
			return true
		}
	}
	return false
}

// shown notes that the agent of a node has shown that bans were lost. It reports whether
// that is new.
func (l *lostBans) shown(node string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	known := l.nodes[node]
	if l.nodes == nil {
		l.nodes = map[string]bool{}
	}
	l.nodes[node], l.last = true, time.Now()
	return !known
}

// unanswered is an error while nobody has done anything about bans that were lost.
func (l *lostBans) unanswered(b *bansState) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.nodes) == 0 {
		return nil
	}
	if b.answered() || time.Since(l.last) > lostBansKept {
		l.nodes = nil
		return nil
	}
	names, more := slices.Sorted(maps.Keys(l.nodes)), ""
	if n := len(names) - maxNamed; n > 0 {
		names, more = names[:maxNamed], fmt.Sprintf(" and %d more", n)
	}
	return fmt.Errorf("agents, %d, enforced bans from after the copy that the state was restored from at %s, and have lifted them since: ban again whom they meant (signet ca ban); on nodes %s%s",
		len(l.nodes), b.number.Restored.At.UTC().Format(time.RFC3339), strings.Join(names, ", "), more)
}
