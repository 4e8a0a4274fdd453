package caclient

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/identity"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// bansVersion is the first byte of what SavedBans returns; the trust sequence follows
// in 8 bytes, and then a capb.Bans whose times are by this machine's clock.
const bansVersion = 1

// restored is half of that by which a restore raises the trust sequence: bans that are older
// than those which are known count only then. The other half is for what trust went through
// between the backup and the loss, which the restored authority does not count.
const restored = 1 << 19

// heldBans are the bans as an authority said them last. They are not changed.
type heldBans struct {
	set      *identity.Bans
	revision uint64
	unread   uint32
	sequence uint64 // of trust, when they were said
	saved    []byte
}

// Bans are those in force, as the authority said last, or as they were saved before a
// restart; some may have ended since. The channel is closed when it says others.
func (c *Client) Bans() (*identity.Bans, <-chan struct{}) {
	h, changed := c.bans.Load()
	if h == nil {
		return nil, changed
	}
	return h.set, changed
}

// SavedBans is the bans for Config.SavedBans of a successor, nil if none were said, and
// a channel that is closed when they change.
func (c *Client) SavedBans() ([]byte, <-chan struct{}) {
	h, changed := c.bans.Load()
	if h == nil {
		return nil, changed
	}
	return h.saved, changed
}

// heed takes the bans that an authority says; nil says nothing. hearing is held.
func (c *Client) heed(p *capb.Bans) {
	if p == nil {
		return
	}
	now := time.Now()
	var ahead time.Duration
	if p.GetNow().CheckValid() == nil {
		// A ban ends when the authority means it to, however this clock is set.
		ahead = now.Sub(p.GetNow().AsTime())
	}
	next := &heldBans{revision: p.GetRevision()}
	if t := c.trust.Value(); t != nil {
		next.sequence = t.Sequence()
	}
	if old := c.bans.Value(); old != nil && next.revision < old.revision && next.sequence < old.sequence+restored {
		// Of a replica that is behind: it will say the newer ones.
		c.cfg.Log.Warn("the authority says older bans than are known; those that are known stay", "revision", next.revision, "known", old.revision)
		return
	}
	ours := proto.CloneOf(p)
	ours.Now = nil
	for _, b := range ours.GetBans() {
		if b.GetUntil().CheckValid() == nil {
			b.Until = timestamppb.New(b.GetUntil().AsTime().Add(ahead))
		}
	}
	c.holdBans(ours, next, now)
	if next.unread > 0 {
		c.cfg.Log.Error("the authority bans somebody in a way that this version cannot read; what it says to do then is done, or everybody is denied: update this agent", "bans", next.unread)
	}
}

// holdBans puts bans in force whose times are by this clock, which says now. They end when
// so much time has elapsed, by the monotonic clock: a step of the other ends no ban.
func (c *Client) holdBans(p *capb.Bans, next *heldBans, now time.Time) {
	next.set, next.unread = parseBans(p)
	list := slices.Clone(next.set.All())
	for i := range list {
		if u := list[i].Until; !u.IsZero() {
			list[i].Until = now.Add(u.Sub(now))
		}
	}
	next.set = identity.NewBans(list)
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(p)
	if err != nil { // never, for what came off a wire
		c.cfg.Log.Error("bans cannot be saved", "err", err)
	} else {
		next.saved = append(binary.BigEndian.AppendUint64([]byte{bansVersion}, next.sequence), b...)
	}
	if c.cfg.Enforce != nil {
		c.cfg.Enforce(next.set)
	}
	c.bans.Store(next)
}

// loadBans takes what SavedBans returned before a restart. What cannot be read may have
// banned anybody, so everybody is banned until an authority says otherwise.
func (c *Client) loadBans(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	p, next := &capb.Bans{}, &heldBans{}
	var err error
	switch {
	case b[0] != bansVersion:
		err = fmt.Errorf("version %d, this build reads %d", b[0], bansVersion)
	case len(b) < 9:
		err = errors.New("it is cut off")
	default:
		next.sequence = binary.BigEndian.Uint64(b[1:])
		err = proto.Unmarshal(b[9:], p)
	}
	if err != nil {
		p, next.sequence = &capb.Bans{Bans: []*capb.Ban{{Reason: "the saved bans cannot be read"}}}, 0
	}
	next.revision = p.GetRevision()
	now := time.Now()
	for _, b := range p.GetBans() {
		// This clock may be wrong, and nobody has said that the ban is over: it stays until
		// the authority is heard.
		if u := b.GetUntil(); u.CheckValid() == nil && !now.Before(u.AsTime()) {
			b.Until = nil
		}
	}
	c.holdBans(p, next, now)
	if err != nil {
		return fmt.Errorf("the saved bans cannot be read, so everybody is denied until the authority is reached: %w", err)
	}
	return nil
}

// parseBans reads bans. One that this build cannot read bans what it says to ban
// otherwise, or else everybody.
func parseBans(p *capb.Bans) (set *identity.Bans, unread uint32) {
	list := make([]identity.Ban, 0, len(p.GetBans()))
	known := make(map[identity.BanSubject]int, len(p.GetBans()))
	for _, b := range p.GetBans() {
		subject, err := subjectOf(b)
		if err != nil {
			unread++
			if subject, err = identity.ParseBanSubject(b.GetOtherwise()); err != nil {
				subject = identity.Everybody()
			}
		}
		ban := identity.Ban{Subject: subject, Reason: b.GetReason(), Serials: b.GetSerials()}
		if u := b.GetUntil(); u != nil && u.CheckValid() == nil {
			ban.Until = u.AsTime()
		}
		// Two of one subject can be where one is of another kind: the longer one counts.
		if i, twice := known[subject]; twice {
			if list[i].Until.IsZero() || !ban.Until.IsZero() && !ban.Until.After(list[i].Until) {
				continue
			}
			list[i].Until = ban.Until
			continue
		}
		known[subject] = len(list)
		list = append(list, ban)
	}
	return identity.NewBans(list), unread
}

func subjectOf(b *capb.Ban) (identity.BanSubject, error) {
	switch s := b.GetSubject().(type) {
	case *capb.Ban_SpiffeId:
		return identity.ParseBanSubject(s.SpiffeId)
	case *capb.Ban_SpiffeIdPrefix:
		return identity.ParseBanSubject(s.SpiffeIdPrefix + "/*")
	case *capb.Ban_Serial:
		return identity.ParseBanSubject(fmt.Sprintf("serial/%x", s.Serial))
	case *capb.Ban_Node:
		return identity.ParseBanSubject("node/" + s.Node)
	}
	return identity.BanSubject{}, errors.New("a kind of ban that this version does not know")
}
