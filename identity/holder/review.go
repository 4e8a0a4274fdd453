package holder

import (
	"crypto/x509"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-mesh/signet/identity"
)

// haste is how soon an SVID is to be replaced.
type haste uint8

const (
	inTime   haste = iota // when its renewal is due
	inSpread              // its authority is tainted
	atOnce                // its peers do not believe it, or will not
)

// atOnceSpread keeps all nodes from asking in the same moment.
const atOnceSpread = time.Second

// Review has every identity renewed whose SVID is good no more, each once: at a random
// moment of the trust's spread if an authority issued it that is tainted
// ([identity.Trust.Tainted]), and within a second if it does not verify under the trust of
// the moment, if it, or an intermediate of its, is on a list of that ([identity.Trust.Revokes]),
// or if bans, which may be nil, have its serial. Until then it is served as before. An
// SVID that came within the last ten seconds waits for their end, so that an authority that
// has nothing better is not asked in a loop; renewals that fail back off as any other.
//
// It is to be called when trust or bans have changed, and when [Holder.Changed] says so,
// since an SVID may have been under way.
func (h *Holder) Review(bans *identity.Bans) {
	trust, now := h.trust(), h.now()
	if trust == nil {
		return // whatever came could not be verified
	}
	type held struct {
		id    spiffeid.ID
		e     *entry
		svid  *x509svid.SVID
		haste haste
		why   string
	}
	var look, verify []*held
	h.mu.Lock()
	defer h.mu.Unlock()
	departed := map[*identity.Trust]bool{}
	for id, e := range h.entries {
		if e.svid == nil || e.dark || e.hurried == atOnce {
			continue
		}
		l := &held{id: id, e: e, svid: e.svid}
		leaf := e.svid.Certificates[0]
		switch {
		case bans.Serial(leaf.SerialNumber.Bytes()) != nil:
			l.haste, l.why = atOnce, "its serial is banned"
		case slices.ContainsFunc(e.svid.Certificates, trust.Revokes):
			l.haste, l.why = atOnce, "it is revoked"
		case trust.Taints(leaf):
			l.haste, l.why = inSpread, "its authority is tainted"
		}
		if l.haste != inTime {
			look = append(look, l)
		}
		if l.haste != atOnce && e.good != trust {
			left, ok := departed[e.good]
			if !ok {
				left = rootLeft(e.good, trust)
				departed[e.good] = left
			}
			if left {
				verify = append(verify, l)
			} else {
				e.good = trust
			}
		}
	}
	if len(verify) > 0 {
		// Signatures of thousands of chains take their time.
		h.mu.Unlock()
		for _, l := range verify {
			at := identity.VerifiedAt(l.svid.Certificates, now)
			if _, _, err := x509svid.Verify(l.svid.Certificates, trust, x509svid.WithTime(at)); err != nil {
				if l.haste == inTime {
					look = append(look, l)
				}
				l.haste, l.why = atOnce, "the trust bundle has its root no more: "+err.Error()
			}
		}
		h.mu.Lock()
		for _, l := range verify {
			if l.haste != atOnce && l.e.svid == l.svid {
				l.e.good = trust
			}
		}
	}
	_, spread := trust.Tainted()
	for _, l := range look {
		e := l.e
		if h.entries[l.id] != e || e.svid != l.svid || e.hurried >= l.haste {
			continue // it has gone, or is another by now
		}
		e.hurried = l.haste
		within := spread
		if l.haste == atOnce {
			within = atOnceSpread
			h.log.Warn("svid is replaced before its time", "spiffe_id", l.id, "serial", serialOf(l.svid.Certificates[0]), "reason", l.why)
		}
		soon := now.Add(time.Duration(random() * float64(within)))
		if pace := e.taken.Add(minRenewal); soon.Before(pace) {
			soon = pace
		}
		if soon.Before(e.next) {
			e.next = soon
		}
	}
	if len(look) > 0 {
		h.poke()
	}
}

// rootLeft reports whether a root of old is not in t. What verified under old verifies
// under t otherwise.
func rootLeft(old, t *identity.Trust) bool {
	if old == nil {
		return true
	}
	roots := t.Roots()
	return slices.ContainsFunc(old.Roots(), func(c *x509.Certificate) bool {
		return !slices.ContainsFunc(roots, c.Equal)
	})
}

// Holds reports whether an SVID is held that t taints, or may come: one that was asked
// for before t was the trust of the moment may be from an authority that is tainted since.
func (h *Holder) Holds(t *identity.Trust) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, e := range h.entries {
		if e.svid != nil && t.Taints(e.svid.Certificates[0]) || e.inFlight && e.under != t {
			return true
		}
	}
	return false
}
