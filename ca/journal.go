package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/signet-mesh/signet/storage"
)

const (
	journalKey = "journal"
	// Version 2 has certificates that others signed.
	journalVersion = 2
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
	// Until is when an old root leaves the bundle: no leaf under it is valid then.
	Until time.Time `json:"until,omitzero"`
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
		if e.Kind != kindRoot {
			continue
		}
		c, err := e.cert()
		if err != nil {
			return nil, err
		}
		roots = append(roots, c)
	}
	return roots, nil
}

func loadJournal(ctx context.Context, s storage.Store) (journal, uint64, error) {
	e, err := s.Get(ctx, journalKey)
	if errors.Is(err, storage.ErrNotFound) {
		return journal{}, 0, errors.New("the store holds no journal: it is not this authority's; restore the right one from backup")
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
	return j, nil
}

// commit replaces the journal that was read at revision; 0 means that there was
// none.
func (j journal) commit(ctx context.Context, s storage.Store, revision uint64) (uint64, error) {
	b, err := json.Marshal(j)
	if err != nil {
		return 0, fmt.Errorf("writing the journal: %w", err)
	}
	next, err := s.Commit(ctx, []storage.Cond{{Key: journalKey, Revision: revision}}, []storage.Op{{Key: journalKey, Value: b}})
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
