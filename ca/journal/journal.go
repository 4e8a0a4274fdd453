package journal

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/signet-mesh/signet/ca/rotation"
	"github.com/signet-mesh/signet/storage"
)

const (
	// Key is where the journal is in the store.
	Key = "journal"
	// Version is the format that is written: version 2 has certificates that others
	// signed, version 3 roots that follow each other.
	Version = 3
)

// Kinds and states of authorities.
const (
	KindRoot         = "root"
	KindIntermediate = "intermediate"
	// StateActive signs; StateOld no longer does, but what it signed is valid.
	StateActive = "active"
	StateOld    = "old"
	// StatePending is a request that nobody has signed yet; StateNext will sign when
	// its time comes.
	StatePending = "pending"
	StateNext    = "next"
	// A root of this authority's own is prepared and then published before it is
	// active, as package rotation has it.
	StatePrepared  = string(rotation.Prepared)
	StatePublished = string(rotation.Published)
)

// Journal is the authority's state: one record, replaced as a whole by
// compare-and-swap. Private keys are not in it, only where they are.
type Journal struct {
	Version     int    `json:"version"`
	TrustDomain string `json:"trustDomain"`
	Instance    uint8  `json:"instance"`
	// Sequence numbers the states of trust; it never goes back.
	Sequence uint64 `json:"sequence"`
	// LogKey is the KMS URI of the key that signs heads of the log.
	LogKey       string  `json:"logKey"`
	LogPublicKey []byte  `json:"logPublicKey"` // SubjectPublicKeyInfo, DER
	Authorities  []Entry `json:"authorities"`
	// Source is who signs the intermediates. It cannot change.
	Source string `json:"source,omitempty"`
	// SeriesStart and SeriesEnd are when the newest chain of an offline root was
	// imported, and when the last of them ends.
	SeriesStart time.Time `json:"seriesStart,omitzero"`
	SeriesEnd   time.Time `json:"seriesEnd,omitzero"`
	// Others are the intermediates of other replicas, by instance. They are read where
	// state is shared, and never written.
	Others map[string][]Entry `json:"others,omitempty"`
}

// Entry is an authority: a root or an intermediate.
type Entry struct {
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

// Cert is the entry's certificate; nil while it is pending.
func (e Entry) Cert() (*x509.Certificate, error) {
	if e.State == StatePending {
		return nil, nil
	}
	c, err := x509.ParseCertificate(e.Certificate)
	if err != nil {
		return nil, fmt.Errorf("journal: %s certificate: %w", e.Kind, err)
	}
	return c, nil
}

// Public is the entry's public key.
func (e Entry) Public() (crypto.PublicKey, error) {
	if e.State != StatePending {
		c, err := e.Cert()
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

// Roots are the certificates that are trusted.
func (j Journal) Roots() (roots []*x509.Certificate, err error) {
	for _, e := range j.Authorities {
		if e.Kind != KindRoot || e.State == StatePrepared {
			continue
		}
		c, err := e.Cert()
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

// ErrNone is Load's answer where there is no journal.
var ErrNone = errors.New("the store holds no journal: it is not this authority's; restore the right one from backup")

// Load reads the journal and returns it with its revision. A store without one is
// ErrNone.
func Load(ctx context.Context, s storage.Store) (Journal, uint64, error) {
	e, err := s.Get(ctx, Key)
	if errors.Is(err, storage.ErrNotFound) {
		return Journal{}, 0, ErrNone
	}
	if err != nil {
		return Journal{}, 0, fmt.Errorf("reading the journal: %w", err)
	}
	j, err := Parse(e.Value)
	if err != nil {
		return Journal{}, 0, err
	}
	return j, e.Revision, nil
}

// Parse reads a journal of this or an earlier version. One of a newer version wraps
// [storage.ErrNewerFormat]; a field that this version does not have is an error.
func Parse(b []byte) (Journal, error) {
	var version struct{ Version int }
	if err := json.Unmarshal(b, &version); err != nil {
		return Journal{}, fmt.Errorf("reading the journal: %w", err)
	}
	if version.Version > Version {
		return Journal{}, fmt.Errorf("reading the journal: %w: it has version %d, this build reads up to %d; run the newer signet-ca", storage.ErrNewerFormat, version.Version, Version)
	}
	var j Journal
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&j); err != nil {
		// encoding/json has no error of its own for an unknown field; what is no journal in any
		// version is found without asking for that.
		if json.Unmarshal(b, &Journal{}) == nil {
			err = fmt.Errorf("%w: a newer signet-ca has written what this build does not know (%w); run that one, and until then this journal is neither followed nor changed here", storage.ErrNewerFormat, err)
		}
		return Journal{}, fmt.Errorf("reading the journal: %w", err)
	}
	return j, j.upgrade()
}

// upgrade fills in what a journal of an earlier version does not say. Its own root was
// the only one, and has been there from the beginning; the leaves of an intermediate
// that signs no more end with it at the latest.
func (j *Journal) upgrade() error {
	if j.Version < 1 || j.Version >= 3 {
		return nil
	}
	j.Version = Version
	for i := range j.Authorities {
		e := &j.Authorities[i]
		if !e.Turns() {
			continue
		}
		c, err := e.Cert()
		if err != nil {
			return err
		}
		switch {
		case e.Kind == KindRoot:
			e.Sequence, e.Since = 1, c.NotBefore
		case e.State == StateOld:
			e.Leaves = c.NotAfter
		}
	}
	return nil
}

// Commit replaces the journal that was read at revision; 0 means that there was
// none. with are changes that belong to it.
func (j Journal) Commit(ctx context.Context, s storage.Store, revision uint64, with ...storage.Op) (uint64, error) {
	b, err := json.Marshal(j)
	if err != nil {
		return 0, fmt.Errorf("writing the journal: %w", err)
	}
	next, err := s.Commit(ctx, []storage.Cond{{Key: Key, Revision: revision}}, append([]storage.Op{{Key: Key, Value: b}}, with...))
	if err != nil {
		return 0, fmt.Errorf("writing the journal: %w", err)
	}
	return next, nil
}

// End is from when on none of this replica's intermediates can issue; zero if there is
// none yet.
func (j Journal) End() (end time.Time) {
	for _, e := range j.Authorities {
		if e.Kind != KindIntermediate || e.State != StateActive && e.State != StateNext {
			continue
		}
		if c, err := e.Cert(); err == nil && c != nil {
			if c.NotAfter.After(end) {
				end = c.NotAfter
			}
		}
	}
	return end
}

// Start is when the first of the roots that are trusted begins; zero if there is none.
func (j Journal) Start() (start time.Time) {
	roots, err := j.Roots()
	if err != nil || len(roots) == 0 {
		return start
	}
	return slices.MinFunc(roots, func(x, y *x509.Certificate) int { return x.NotBefore.Compare(y.NotBefore) }).NotBefore
}

// Request is the one that waits for the root's signature, if one does.
func (j Journal) Request() (Entry, bool) {
	i := slices.IndexFunc(j.Authorities, func(e Entry) bool { return e.Kind == KindIntermediate && e.State == StatePending })
	if i < 0 {
		return Entry{}, false
	}
	return j.Authorities[i], true
}
