package source

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"

	"github.com/prometheus/client_golang/prometheus"
)

// Bans puts the bans of the authority before the policies of a source: Snapshot is
// what checks decide by. It is safe for concurrent use.
type Bans struct {
	policies func() *authz.Snapshot
	log      *slog.Logger
	now      atomic.Pointer[identity.Bans] // nil: none

	mu   sync.Mutex     // held while bans are put in force
	from *identity.Bans // what now is the rest of; guarded by mu

	made atomic.Pointer[made]
}

// made is the last snapshot that was made, and what of.
type made struct {
	of    *authz.Snapshot
	bans  *identity.Bans
	whole *authz.Snapshot
}

// NewBans makes a Bans before policies; reg may be nil.
func NewBans(policies func() *authz.Snapshot, log *slog.Logger, reg prometheus.Registerer) *Bans {
	b := &Bans{policies: policies, log: log}
	if log == nil {
		b.log = slog.New(slog.DiscardHandler)
	}
	if reg != nil {
		reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "signet_authz_bans", Help: "Bans that checks are denied by."},
			func() float64 { return float64(b.now.Load().Len()) }))
	}
	return b
}

// Snapshot is that of the policies, with the bans that are in force. Where neither
// changed it is the one before.
func (b *Bans) Snapshot() *authz.Snapshot {
	s, bans := b.policies(), b.now.Load()
	if bans == nil {
		return s
	}
	if m := b.made.Load(); m != nil && m.of == s && m.bans == bans {
		return m.whole
	}
	m := &made{s, bans, s.WithBans(bans)}
	b.made.Store(m)
	return m.whole
}

// Put puts bans in force, in the place of those before: the next check has them. Those
// that have ended are left out.
func (b *Bans) Put(from *identity.Bans) (next time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	set, next := from.At(time.Now())
	if set.Len() == 0 {
		set = nil
	}
	old := b.now.Load()
	if old == set || b.from == from && old.Len() == set.Len() {
		return next // what is left is the same
	}
	b.from = from
	if old.Equal(set) {
		return next
	}
	b.now.Store(set)
	b.log.Info("bans in force", "count", set.Len(), "before", old.Len())
	return next
}

// Follow puts in force what bans says, and ends bans when their time is over, until
// ctx ends.
func (b *Bans) Follow(ctx context.Context, bans func() (*identity.Bans, <-chan struct{})) error {
	for {
		set, changed := bans()
		var end <-chan time.Time
		if next := b.Put(set); !next.IsZero() {
			// Not for long at once: bans end by the wall clock, which can be set.
			end = time.After(min(max(time.Until(next), 10*time.Millisecond), maxBanSleep))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-end:
		}
	}
}

// maxBanSleep is the longest that the end of a ban is slept for.
const maxBanSleep = 10 * time.Second
