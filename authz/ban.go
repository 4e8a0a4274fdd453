package authz

import (
	"fmt"
	"sync"
	"time"

	"github.com/signet-mesh/signet/identity"
)

// KindBan is the kind of a ban in Decision.Kind; Decision.Policy then names its
// subject.
const KindBan = "Ban"

// bans are a set of bans, with the rules in whose name they deny. Immutable.
type bans struct {
	set *identity.Bans
	// rules are by ban; names is that of the first ban of a SPIFFE ID, or nil.
	rules map[*identity.Ban]*Rule
	names *Rule
}

func newBans(set *identity.Bans) *bans {
	b := &bans{set: set, rules: make(map[*identity.Ban]*Rule, set.Len())}
	list := set.All()
	for i := range list {
		ban := &list[i]
		r := &Rule{Kind: KindBan, Index: -1, Action: ActionDeny, Reason: ReasonBanned, policy: ban.Subject.String(), detail: ban.Reason}
		if !ban.Until.IsZero() {
			r.detail = fmt.Sprintf("%s (until %s)", ban.Reason, ban.Until.UTC().Format(time.RFC3339))
		}
		b.rules[ban] = r
	}
	if first := set.Names(); first != nil {
		b.names = b.rules[first]
	}
	return b
}

// check denies a peer that is banned, or may be. The reason is empty for others.
//
// A serial that is not known denies nobody: few proxies send certificates unless they
// are told to, and who bans a certificate does not mean all of them. Who the peer is
// every proxy can say, so where a SPIFFE ID is banned, not knowing it denies.
func (b *bans) check(r *Request) (*Rule, Reason) {
	if all := b.set.Everybody(); all != nil {
		return b.rules[all], ReasonBanUnknown
	}
	if len(r.Serial) > 0 {
		if ban := b.set.Serial(r.Serial); ban != nil {
			return b.rules[ban], ReasonBanned
		}
	}
	if b.names == nil || r.Known&FieldPeer != 0 && !r.Authenticated {
		return nil, ""
	}
	if ban := b.set.ID(r.Principal); ban != nil {
		return b.rules[ban], ReasonBanned
	}
	for _, name := range r.OtherNames {
		if ban := b.set.ID(name); ban != nil {
			return b.rules[ban], ReasonBanned
		}
	}
	if r.Known&(FieldPeer|FieldPrincipal) != FieldPeer|FieldPrincipal {
		return b.names, ReasonBanUnknown
	}
	return nil, ""
}

// banned makes programs of a snapshot deny by bans. Safe for concurrent use; nil is no
// bans.
type banned struct {
	*bans

	mu sync.RWMutex
	// programs are those with the bans by those without, guarded by mu.
	programs map[*Program]*Program
}

// again is the same for another snapshot.
func (b *banned) again() *banned {
	if b == nil {
		return nil
	}
	return &banned{bans: b.bans, programs: make(map[*Program]*Program)}
}

// program is p with the bans.
func (b *banned) program(p *Program) *Program {
	b.mu.RLock()
	q := b.programs[p]
	b.mu.RUnlock()
	if q != nil {
		return q
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if q := b.programs[p]; q != nil {
		return q
	}
	if len(b.programs) >= maxClasses {
		clear(b.programs)
	}
	with := *p
	with.bans = b.bans
	b.programs[p] = &with
	return &with
}

// Bans are those that s denies by, before any policy.
func (s *Snapshot) Bans() *identity.Bans {
	if s == nil || s.bans == nil {
		return nil
	}
	return s.bans.set
}

// WithBans is s with these bans in the place of those that it has: programs of it deny
// whom they mean before anything else. Nothing is compiled again, and what is made of
// it by Update has the same bans. s goes on as it is. A nil Snapshot, which denies
// everything, stays nil.
func (s *Snapshot) WithBans(set *identity.Bans) *Snapshot {
	if s == nil || s.compiler == nil || s.Bans() == set || s.Bans().Len()+set.Len() == 0 {
		return s
	}
	next := &Snapshot{compiler: s.compiler, spaces: s.spaces, others: s.others, generation: s.generation}
	if set.Len() > 0 {
		next.bans = &banned{bans: newBans(set), programs: make(map[*Program]*Program)}
	}
	return next
}
