package replica

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/signet-mesh/signet/storage"
)

// BanRevisionKey is where the revision of the bans is stored: the number by which agents
// know them. It is changed with each change of those in force, and in the same commit. It
// is a record and not the store's revision, because it goes where the state goes: another
// store begins to count anew.
const BanRevisionKey = "ban-revision"

const banRevisionVersion = 1

// BanRevision is that record.
type BanRevision struct {
	Version  int    `json:"version"`
	Revision uint64 `json:"revision"`
	// Restored is about the last time that the state was put back from an older copy; nil if
	// it never was.
	Restored *RestoredBans `json:"restored,omitempty"`

	rest storage.Rest
}

// RestoredBans tell what was banned after the copy was made that a state was restored from.
type RestoredBans struct {
	// Revision is that of the bans of the copy.
	Revision uint64 `json:"revision"`
	// Sequence is the trust sequence that the restored state began with, At when.
	Sequence uint64    `json:"sequence"`
	At       time.Time `json:"at"`
}

// Lost reports whether bans are newer than those of the copy, and older than the restored
// state: said is by which revision an agent knows them, and sequence that of trust when it
// was told, 0 if that is not known.
func (r *RestoredBans) Lost(said, sequence uint64) bool {
	if r == nil || sequence >= r.Sequence {
		return false
	}
	if sequence == 0 { // then of the time just before the restore
		sequence = r.Sequence - sequenceLeap
		if said >= r.Revision+leaps(r.Sequence) {
			return false
		}
	}
	return said > r.Revision+leaps(sequence)
}

// leaps is what restores have added to a trust sequence.
func leaps(sequence uint64) uint64 { return sequence / sequenceLeap * sequenceLeap }

// Restore notes that the state is restored, and begins with a trust sequence.
func (r *BanRevision) Restore(sequence uint64, at time.Time) {
	r.Restored = &RestoredBans{Revision: r.Revision, Sequence: sequence, At: at}
}

// Said is by which revision agents know the bans. A restore leaps with the sequence of
// trust: what agents heard since the copy was made has no number in common with what is said
// from then on.
func (r BanRevision) Said(trustSequence uint64) uint64 {
	return r.Revision + leaps(trustSequence)
}

// Encode is the record as it is stored, with what else the one had that it takes the
// place of.
func (r BanRevision) Encode() ([]byte, error) {
	r.Version = banRevisionVersion
	b, err := storage.EncodeRecord(r, r.rest)
	if err == nil && r.Revision == 0 {
		err = errors.New("it begins at 1")
	}
	if err != nil {
		return nil, fmt.Errorf("recording the revision of the bans: %w", err)
	}
	return b, nil
}

// ParseBanRevision reads the one of the store.
func ParseBanRevision(e storage.Entry) (BanRevision, error) {
	r, rest, err := storage.ParseVersioned(e.Value, banRevisionVersion, func(r BanRevision) int { return r.Version })
	if err == nil && r.Revision == 0 {
		err = errors.New("it is none")
	}
	if err != nil {
		return BanRevision{}, fmt.Errorf("reading the revision of the bans: %w", err)
	}
	r.rest = rest
	return r, nil
}

// numberBans gives the bans of a state of an earlier build a revision of their own, before
// it is moved: agents know them by revisions of the store that is left.
func numberBans(ctx context.Context, s storage.Store) error {
	entries, revision, err := s.List(ctx, "")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Key == BanRevisionKey || e.Key == movedKey {
			return nil // or another build has begun to move it, and ends that
		}
	}
	value, err := BanRevision{Revision: revision + 1}.Encode()
	if err != nil {
		return err
	}
	_, err = s.Commit(ctx, []storage.Cond{{Key: BanRevisionKey}}, []storage.Op{{Key: BanRevisionKey, Value: value}})
	return err
}
