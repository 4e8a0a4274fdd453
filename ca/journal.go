package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/signet-mesh/signet/ca/profile"
	"github.com/signet-mesh/signet/ca/rotation"
	"github.com/signet-mesh/signet/storage"
)

const (
	journalKey = "journal"
	// Version 2 has certificates that others signed, version 3 roots that follow each
	// other.
	journalVersion = 3
)

const (
	kindRoot         = "root"
	kindIntermediate = "intermediate"
	// stateActive signs; stateOld no longer does, but what it signed is valid.
	stateActive = "active"
	stateOld    = "old"
	// statePending is a request that nobody has signed yet; stateNext will sign when
	// its time comes.
	statePending = "pending"
	stateNext    = "next"
	// A root of this authority's own is prepared and then published before it is
	// active, as package rotation has it.
	statePrepared  = string(rotation.Prepared)
	statePublished = string(rotation.Published)
)

// journal is the authority's state: one record, replaced as a whole by
// compare-and-swap. Private keys are not in it, only where they are.
type journal struct {
	Version     int    `json:"version"`
	TrustDomain string `json:"trustDomain"`
	Instance    uint8  `json:"instance"`
	// Sequence numbers the states of trust; it never goes back.
	Sequence uint64 `json:"sequence"`
	// LogKey is the KMS URI of the key that signs heads of the log.
	LogKey       string         `json:"logKey"`
	LogPublicKey []byte         `json:"logPublicKey"` // SubjectPublicKeyInfo, DER
	Authorities  []journalEntry `json:"authorities"`
	// Source is who signs the intermediates. It cannot change.
	Source string `json:"source,omitempty"`
	// SeriesStart and SeriesEnd are when the newest chain of an offline root was
	// imported, and when the last of them ends.
	SeriesStart time.Time `json:"seriesStart,omitzero"`
	SeriesEnd   time.Time `json:"seriesEnd,omitzero"`
	// Others are the intermediates of other replicas, by instance. They are read where
	// state is shared, and never written.
	Others map[string][]journalEntry `json:"others,omitempty"`
}

type journalEntry struct {
	Kind        string `json:"kind"`
	State       string `json:"state"`
	Certificate []byte `json:"certificate,omitempty"` // DER; none while it is pending
	Key         string `json:"key,omitempty"`         // KMS URI; none where somebody else has it
	// External says that somebody else signed it, so that it is not in the log.
	External bool `json:"external,omitempty"`
	// Chain is what lies between it and the root, DER.
	Chain [][]byte `json:"chain,omitempty"`
	// Request is what is to be signed, PKCS#10, DER.
	Request []byte `json:"request,omitempty"`
	// Until is when an old root that somebody else signed leaves the bundle: no leaf
	// under it is valid then.
	Until time.Time `json:"until,omitzero"`
	// The rest is what package rotation says of this authority's own root and of what
	// is below it; the fields are those of rotation.Root and rotation.Intermediate.
	Sequence      uint64    `json:"sequence,omitempty"`
	Since         time.Time `json:"since,omitzero"`
	Leaves        time.Time `json:"leaves,omitzero"`
	Tainted       time.Time `json:"tainted,omitzero"`
	TaintSequence uint64    `json:"taintSequence,omitempty"`
	Condemned     time.Time `json:"condemned,omitzero"`
}

// authorityID is the name of an authority towards operators and in package rotation:
// its serial, because an intermediate can follow another one with the same key.
func authorityID(c *x509.Certificate) string { return hex.EncodeToString(profile.Serial(c)) }

// turns reports whether an entry is in the hands of package rotation: this authority's
// own root, or an intermediate below it that signs or has signed.
func (e journalEntry) turns() bool {
	return !e.External && (e.Kind == kindRoot || e.State == stateActive || e.State == stateOld)
}

// rotation is the state of this authority's own root and of what is below it.
func (j journal) rotation() (rotation.State, error) {
	s := rotation.State{Sequence: j.Sequence}
	roots := map[string]string{} // IDs by subject key identifier
	for _, e := range j.Authorities {
		if !e.turns() || e.Kind != kindRoot {
			continue
		}
		c, err := e.cert()
		if err != nil {
			return rotation.State{}, err
		}
		roots[string(c.SubjectKeyId)] = authorityID(c)
		s.Roots = append(s.Roots, rotation.Root{ID: authorityID(c), Stage: rotation.Stage(e.State), Start: c.NotBefore, End: c.NotAfter,
			Sequence: e.Sequence, Since: e.Since, Tainted: e.Tainted, TaintSequence: e.TaintSequence, Condemned: e.Condemned})
	}
	below := func(replica uint8, entries []journalEntry) error {
		for _, e := range entries {
			if !e.turns() || e.Kind != kindIntermediate {
				continue
			}
			c, err := e.cert()
			if err != nil {
				return err
			}
			root, there := roots[string(c.AuthorityKeyId)]
			if !there {
				continue // another replica has taken it out of the bundle
			}
			s.Intermediates = append(s.Intermediates, rotation.Intermediate{ID: authorityID(c), Root: root, Replica: replica,
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

// turn makes the journal say what a state says. It returns what left the journal: roots,
// and intermediates below them or without a leaf that could be valid.
func (j *journal) turn(s rotation.State) (gone []journalEntry, err error) {
	j.Sequence = s.Sequence
	active, _ := s.Active()
	var issuing []byte // subject key identifier of the active root
	for _, e := range j.Authorities {
		if c, err := e.cert(); err == nil && c != nil && authorityID(c) == active.ID {
			issuing = c.SubjectKeyId
		}
	}
	next := make([]journalEntry, 0, len(j.Authorities))
	for _, e := range j.Authorities {
		c, err := e.cert()
		if err != nil {
			return nil, err
		}
		stays := true
		switch {
		case !e.turns():
			// One that was published and not used yet is of no use below another root.
			stays = e.External || c == nil || e.State != stateNext || bytes.Equal(c.AuthorityKeyId, issuing)
		case e.Kind == kindRoot:
			var r rotation.Root
			if r, stays = s.Root(authorityID(c)); stays {
				e.State, e.Sequence, e.Since, e.Tainted, e.TaintSequence, e.Condemned = string(r.Stage), r.Sequence, r.Since, r.Tainted, r.TaintSequence, r.Condemned
			}
		default:
			i := slices.IndexFunc(s.Intermediates, func(m rotation.Intermediate) bool { return m.ID == authorityID(c) })
			if stays = i >= 0; stays {
				m := s.Intermediates[i]
				if e.State = stateActive; !m.Leaves.IsZero() {
					e.State = stateOld
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

// tainted are the subject key identifiers of authorities whose SVIDs are to be replaced
// now.
func (j journal) tainted() (ids [][]byte, err error) {
	s, err := j.rotation()
	if err != nil {
		return nil, err
	}
	tainted := s.Tainted()
	all := slices.Clone(j.Authorities)
	for _, n := range slices.Sorted(maps.Keys(j.Others)) {
		all = append(all, j.Others[n]...)
	}
	for _, e := range all {
		if !e.turns() {
			continue
		}
		c, err := e.cert()
		if err != nil {
			return nil, err
		}
		if slices.Contains(tainted, authorityID(c)) {
			ids = append(ids, c.SubjectKeyId)
		}
	}
	return ids, nil
}

// cert is the entry's certificate; nil while it is pending.
func (e journalEntry) cert() (*x509.Certificate, error) {
	if e.State == statePending {
		return nil, nil
	}
	c, err := x509.ParseCertificate(e.Certificate)
	if err != nil {
		return nil, fmt.Errorf("journal: %s certificate: %w", e.Kind, err)
	}
	return c, nil
}

// pub is the entry's public key.
func (e journalEntry) pub() (crypto.PublicKey, error) {
	if e.State != statePending {
		c, err := e.cert()
		if err != nil {
			return nil, err
		}
		return c.PublicKey, nil
	}
	r, err := x509.ParseCertificateRequest(e.Request)
	if err != nil {
		return nil, fmt.Errorf("journal: request: %w", err)
	}
	return r.PublicKey, nil
}

// issuer is an entry with its key, without what lies above.
func (e journalEntry) issuer(key crypto.Signer) (*issuer, error) {
	c, err := e.cert()
	if err != nil {
		return nil, err
	}
	iss := &issuer{cert: c, key: key}
	if e.Kind == kindRoot {
		return iss, nil
	}
	iss.chain = []*x509.Certificate{c}
	for _, der := range e.Chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("journal: chain of the %s: %w", e.Kind, err)
		}
		iss.chain = append(iss.chain, c)
	}
	return iss, nil
}

// roots are the certificates that are trusted.
func (j journal) roots() (roots []*x509.Certificate, err error) {
	for _, e := range j.Authorities {
		if e.Kind != kindRoot || e.State == statePrepared {
			continue
		}
		c, err := e.cert()
		if err != nil {
			return nil, err
		}
		if c == nil {
			return nil, errors.New("journal: a root without a certificate")
		}
		roots = append(roots, c)
	}
	return roots, nil
}

var errNoJournal = errors.New("the store holds no journal: it is not this authority's; restore the right one from backup")

func loadJournal(ctx context.Context, s storage.Store) (journal, uint64, error) {
	e, err := s.Get(ctx, journalKey)
	if errors.Is(err, storage.ErrNotFound) {
		return journal{}, 0, errNoJournal
	}
	if err != nil {
		return journal{}, 0, fmt.Errorf("reading the journal: %w", err)
	}
	j, err := parseJournal(e.Value)
	if err != nil {
		return journal{}, 0, err
	}
	return j, e.Revision, nil
}

func parseJournal(b []byte) (journal, error) {
	var version struct{ Version int }
	if err := json.Unmarshal(b, &version); err != nil {
		return journal{}, fmt.Errorf("reading the journal: %w", err)
	}
	if version.Version > journalVersion {
		return journal{}, fmt.Errorf("reading the journal: %w: it has version %d, this build reads up to %d; run the newer signet-ca", storage.ErrNewerFormat, version.Version, journalVersion)
	}
	var j journal
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&j); err != nil {
		return journal{}, fmt.Errorf("reading the journal: %w", err)
	}
	return j, j.upgrade()
}

// upgrade fills in what a journal of an earlier version does not say. Its own root was
// the only one, and has been there from the beginning; the leaves of an intermediate
// that signs no more end with it at the latest.
func (j *journal) upgrade() error {
	if j.Version < 1 || j.Version >= 3 {
		return nil
	}
	j.Version = journalVersion
	for i := range j.Authorities {
		e := &j.Authorities[i]
		if !e.turns() {
			continue
		}
		c, err := e.cert()
		if err != nil {
			return err
		}
		switch {
		case e.Kind == kindRoot:
			e.Sequence, e.Since = 1, c.NotBefore
		case e.State == stateOld:
			e.Leaves = c.NotAfter
		}
	}
	return nil
}

// commit replaces the journal that was read at revision; 0 means that there was
// none. with are changes that belong to it.
func (j journal) commit(ctx context.Context, s storage.Store, revision uint64, with ...storage.Op) (uint64, error) {
	b, err := json.Marshal(j)
	if err != nil {
		return 0, fmt.Errorf("writing the journal: %w", err)
	}
	next, err := s.Commit(ctx, []storage.Cond{{Key: journalKey, Revision: revision}}, append([]storage.Op{{Key: journalKey, Value: b}}, with...))
	if err != nil {
		return 0, fmt.Errorf("writing the journal: %w", err)
	}
	return next, nil
}

// hashStatement is what the log's key signs of a head or a checkpoint.
func hashStatement(b []byte) [sha256.Size]byte { return sha256.Sum256(b) }

// verifyHead reports whether h carries a signature of this replica's log key.
func (a *Authority) verifyHead(h storage.Head) bool {
	pub, ok := a.logKey.Public().(*ecdsa.PublicKey)
	sum := hashStatement(h.SignedBytes())
	return ok && h.Instance == uint32(a.instance) && ecdsa.VerifyASN1(pub, sum[:], h.Signature)
}
