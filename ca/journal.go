package ca

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/signet-mesh/signet/storage"
)

const (
	journalKey     = "journal"
	journalVersion = 1
)

const (
	kindRoot         = "root"
	kindIntermediate = "intermediate"
	// stateActive signs; stateOld no longer does, but what it signed is valid.
	stateActive = "active"
	stateOld    = "old"
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
}

type journalEntry struct {
	Kind        string `json:"kind"`
	State       string `json:"state"`
	Certificate []byte `json:"certificate"` // DER
	Key         string `json:"key"`         // KMS URI
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
