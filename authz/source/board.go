package source

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/signet-mesh/signet/authz"
)

// board is where a source shows what it has: the snapshot in force and how it
// fares. Its exported methods are safe for concurrent use.
type board struct {
	snapshot atomic.Pointer[authz.Snapshot]
	mu       sync.Mutex
	status   status // guarded by mu
}

// status is what the accessors tell. Slices and maps in it are replaced, never
// changed.
type status struct {
	generation uint64
	changed    chan struct{}
	problems   []authz.Problem
	counts     map[kindState]int
	err        error     // why the policies cannot be read now
	good       time.Time // when they last could; zero: never
}

// follow compiles set; what did not change since the snapshot in force is taken
// from there.
func (b *board) follow(set authz.Set, o authz.Options) (*authz.Snapshot, []authz.Problem) {
	if before := b.snapshot.Load(); before != nil {
		return before.Update(set)
	}
	return authz.Compile(set, o)
}

// replace puts a snapshot of set into force and returns its number.
func (b *board) replace(snapshot *authz.Snapshot, set authz.Set) (generation uint64) {
	counts := map[kindState]int{}
	for res, state := range set.All() {
		counts[kindState{knownKind(res.Kind()), state}]++
	}
	b.snapshot.Store(snapshot)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.status.generation++
	b.status.counts = counts
	close(b.status.changed)
	b.status.changed = make(chan struct{})
	return b.status.generation
}

// tell makes known what is wrong with the policies, logs what is new of that, and
// returns why they could not be read before. good is when they were read, if err is
// nil.
func (b *board) tell(log *slog.Logger, problems []authz.Problem, err error, good time.Time) (was error) {
	b.mu.Lock()
	old, was := b.status.problems, b.status.err
	b.status.problems, b.status.err = problems, err
	if err == nil {
		b.status.good = good
	}
	b.mu.Unlock()
	known := make(map[authz.Problem]bool, len(old))
	for _, p := range old {
		known[p] = true
	}
	for _, p := range problems {
		if known[p] {
			continue
		}
		level := slog.LevelWarn
		if p.Severity == authz.SeverityInfo {
			level = slog.LevelInfo
		}
		log.Log(context.Background(), level, "problem with policies", "severity", p.Severity.String(), "reason", string(p.Reason), "err", p)
	}
	return was
}

// Snapshot is the policies in force. It is nil, which denies everything, only for a
// [Cluster] that has neither been synced nor been given saved policies.
func (b *board) Snapshot() *authz.Snapshot { return b.snapshot.Load() }

// Generation counts the snapshots, from 1.
func (b *board) Generation() uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.status.generation
}

// Changed is closed at the next change of the snapshot. To miss none, ask for it
// before Snapshot.
func (b *board) Changed() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.status.changed
}

// Problems is what is wrong with the policies now, by origin. The caller may keep
// it, and must not change it.
func (b *board) Problems() []authz.Problem {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.status.problems
}
