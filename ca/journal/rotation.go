package journal

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strconv"

	"github.com/signet-mesh/signet/ca/rotation"
)

// ID is the name of an authority towards operators and in package rotation:
// its serial, because an intermediate can follow another one with the same key.
func ID(c *x509.Certificate) string {
	const serial = 17 // bytes of this authority's serials, as package profile makes them
	return hex.EncodeToString(c.SerialNumber.FillBytes(make([]byte, max(serial, (c.SerialNumber.BitLen()+7)/8))))
}

// Turns reports whether an entry is in the hands of package rotation: this authority's
// own root, or an intermediate below it that signs or has signed.
func (e Entry) Turns() bool {
	return !e.External && (e.Kind == KindRoot || e.State == StateActive || e.State == StateOld)
}

// Rotation is the state of this authority's own root and of what is below it.
func (j Journal) Rotation() (rotation.State, error) {
	s := rotation.State{Sequence: j.Sequence}
	roots := map[string]string{} // IDs by subject key identifier
	for _, e := range j.Authorities {
		if !e.Turns() || e.Kind != KindRoot {
			continue
		}
		c, err := e.Cert()
		if err != nil {
			return rotation.State{}, err
		}
		roots[string(c.SubjectKeyId)] = ID(c)
		s.Roots = append(s.Roots, rotation.Root{ID: ID(c), Stage: rotation.Stage(e.State), Start: c.NotBefore, End: c.NotAfter,
			Sequence: e.Sequence, Since: e.Since, Tainted: e.Tainted, TaintSequence: e.TaintSequence, Condemned: e.Condemned})
	}
	below := func(replica uint8, entries []Entry) error {
		for _, e := range entries {
			if !e.Turns() || e.Kind != KindIntermediate {
				continue
			}
			c, err := e.Cert()
			if err != nil {
				return err
			}
			root, there := roots[string(c.AuthorityKeyId)]
			if !there {
				continue // another replica has taken it out of the bundle
			}
			s.Intermediates = append(s.Intermediates, rotation.Intermediate{ID: ID(c), Root: root, Replica: replica,
				Start: c.NotBefore, End: c.NotAfter, Leaves: e.Leaves, Tainted: e.Tainted})
		}
		return nil
	}
	if err := below(j.Instance, j.Authorities); err != nil {
		return rotation.State{}, err
	}
	for _, n := range slices.Sorted(maps.Keys(j.Others)) {
		replica, err := strconv.ParseUint(n, 10, 7)
		if err == nil {
			err = below(uint8(replica), j.Others[n])
		}
		if err != nil {
			return rotation.State{}, fmt.Errorf("journal: replica %s: %w", n, err)
		}
	}
	return s, nil
}

// Turn makes the journal say what a state says. It returns what left the journal: roots,
// and intermediates below them or without a leaf that could be valid.
func (j *Journal) Turn(s rotation.State) (gone []Entry, err error) {
	j.Sequence = s.Sequence
	active, _ := s.Active()
	var issuing []byte // subject key identifier of the active root
	for _, e := range j.Authorities {
		if c, err := e.Cert(); err == nil && c != nil && ID(c) == active.ID {
			issuing = c.SubjectKeyId
		}
	}
	next := make([]Entry, 0, len(j.Authorities))
	for _, e := range j.Authorities {
		c, err := e.Cert()
		if err != nil {
			return nil, err
		}
		stays := true
		switch {
		case !e.Turns():
			// One that was published and not used yet is of no use below another root.
			stays = e.External || c == nil || e.State != StateNext || bytes.Equal(c.AuthorityKeyId, issuing)
		case e.Kind == KindRoot:
			var r rotation.Root
			if r, stays = s.Root(ID(c)); stays {
				e.State, e.Sequence, e.Since, e.Tainted, e.TaintSequence, e.Condemned = string(r.Stage), r.Sequence, r.Since, r.Tainted, r.TaintSequence, r.Condemned
			}
		default:
			i := slices.IndexFunc(s.Intermediates, func(m rotation.Intermediate) bool { return m.ID == ID(c) })
			if stays = i >= 0; stays {
				m := s.Intermediates[i]
				if e.State = StateActive; !m.Leaves.IsZero() {
					e.State = StateOld
				}
				e.Leaves, e.Tainted = m.Leaves, m.Tainted
			}
		}
		if stays {
			next = append(next, e)
		} else {
			gone = append(gone, e)
		}
	}
	j.Authorities = next
	return gone, nil
}

// Tainted are the subject key identifiers of authorities whose SVIDs are to be replaced
// now.
func (j Journal) Tainted() (ids [][]byte, err error) {
	s, err := j.Rotation()
	if err != nil {
		return nil, err
	}
	tainted := s.Tainted()
	all := slices.Clone(j.Authorities)
	for _, n := range slices.Sorted(maps.Keys(j.Others)) {
		all = append(all, j.Others[n]...)
	}
	for _, e := range all {
		if !e.Turns() {
			continue
		}
		c, err := e.Cert()
		if err != nil {
			return nil, err
		}
		if slices.Contains(tainted, ID(c)) {
			ids = append(ids, c.SubjectKeyId)
		}
	}
	return ids, nil
}

// Elsewhere is an error for an intermediate of another replica, which only that
// can take out of use.
func (j Journal) Elsewhere(id string) error {
	for n, entries := range j.Others {
		for _, e := range entries {
			if c, err := e.Cert(); err == nil && c != nil && ID(c) == id {
				return fmt.Errorf("%w: %s is an intermediate of replica %s: ask that one", rotation.ErrStage, id, n)
			}
		}
	}
	return nil
}
