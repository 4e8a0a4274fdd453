package replica

import (
	"context"
	"errors"
	"fmt"

	"github.com/signet-mesh/signet/storage"
)

// BanRevisionKey is where the revision of the bans is stored: the number by which agents
// know them. It is changed with each change of those in force, and in the same commit. It
// is a record and not the store's revision, because it goes where the state goes: another
// store begins to count anew.
const BanRevisionKey = "ban-revision"

const banRevisionVersion = 1

type banRevision struct {
	Version  int    `json:"version"`
	Revision uint64 `json:"revision"`
}

// EncodeBanRevision is the revision of the bans as it is stored, with what else the record
// had that it takes the place of.
func EncodeBanRevision(revision uint64, rest storage.Rest) ([]byte, error) {
	b, err := storage.EncodeRecord(banRevision{banRevisionVersion, revision}, rest)
	if err == nil && revision == 0 {
		err = errors.New("it begins at 1")
	}
	if err != nil {
		return nil, fmt.Errorf("recording the revision of the bans: %w", err)
	}
	return b, nil
}

// ParseBanRevision reads the one of the store, and the rest of its record.
func ParseBanRevision(e storage.Entry) (revision uint64, rest storage.Rest, err error) {
	var r banRevision
	rest, err = storage.ParseRecord(e.Value, &r)
	switch {
	case err != nil:
	case r.Version > banRevisionVersion:
		err = fmt.Errorf("%w: version %d, this build reads up to %d", storage.ErrNewerFormat, r.Version, banRevisionVersion)
	case r.Version < 1 || r.Revision == 0:
		err = errors.New("it is none")
	}
	if err != nil {
		return 0, "", fmt.Errorf("reading the revision of the bans: %w", err)
	}
	return r.Revision, rest, nil
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
	value, err := EncodeBanRevision(revision+1, "")
	if err != nil {
		return err
	}
	_, err = s.Commit(ctx, []storage.Cond{{Key: BanRevisionKey}}, []storage.Op{{Key: BanRevisionKey, Value: value}})
	return err
}
