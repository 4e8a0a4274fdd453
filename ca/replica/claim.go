package replica

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/signet-mesh/signet/storage"
)

const (
	recordPrefix  = "replicas/"
	lossPrefix    = "replica-loss/"
	clockPrefix   = "replica-clock/"
	retiredPrefix = "instances/"
	recordVersion = 1

	journalKey = "journal"
	lossKey    = "log-loss"
	clockKey   = "clock"
)

// ErrClaimed is why an instance cannot be had: it belongs, or belonged, to another
// replica.
var ErrClaimed = errors.New("the instance belongs to another replica")

// record is what is kept for one replica.
type record struct {
	Version int    `json:"version"`
	ID      string `json:"id"`
	// Journal is the replica's own part of the journal; none before it has begun.
	Journal map[string]json.RawMessage `json:"journal,omitempty"`
	// Former are the instances that the replica was before the state was restored.
	Former []Former `json:"former,omitempty"`

	rest storage.Rest
}

func recordKey(instance uint8) string { return fmt.Sprintf("%s%03d", recordPrefix, instance) }

// instanceOf is whose a record is, by its key.
func instanceOf(key, prefix string) (uint8, error) {
	n, err := strconv.ParseUint(strings.TrimPrefix(key, prefix), 10, 8)
	if err != nil || n < 1 || n > storage.MaxInstance {
		return 0, fmt.Errorf("entry %q names no instance", key)
	}
	return uint8(n), nil
}

func parseRecord(e storage.Entry) (record, error) {
	r, rest, err := storage.ParseVersioned(e.Value, recordVersion, func(r record) int { return r.Version })
	if r.rest = rest; err == nil && r.ID == "" {
		err = errors.New("it has no ID")
	}
	if err != nil {
		return record{}, fmt.Errorf("reading replica %s: %w", strings.TrimPrefix(e.Key, recordPrefix), err)
	}
	return r, nil
}

// Claim makes an instance that of the replica with an ID, and returns it: the wanted one,
// or with 0 the one that it has, else the lowest that nobody has ever had and that is not
// reserved. It fails with ErrClaimed if the wanted one is somebody else's, or the replica
// has another.
func Claim(ctx context.Context, s storage.Store, id string, wanted uint8, reserved ...uint8) (uint8, error) {
	if id == "" || wanted > storage.MaxInstance {
		return 0, fmt.Errorf("claiming instance %d for replica %q: an ID and an instance up to %d are needed", wanted, id, storage.MaxInstance)
	}
	for ctx.Err() == nil {
		instance, err := claim(ctx, s, id, wanted, reserved)
		if errors.Is(err, storage.ErrConflict) || errors.Is(err, storage.ErrUnknown) {
			continue // read again: it is this replica's, or somebody else's
		}
		if err != nil {
			return 0, fmt.Errorf("claiming an instance: %w", err)
		}
		return instance, nil
	}
	return 0, fmt.Errorf("claiming an instance: %w", context.Cause(ctx))
}

func claim(ctx context.Context, s storage.Store, id string, wanted uint8, reserved []uint8) (uint8, error) {
	used := map[uint8]string{} // by whom; empty: before a restore
	former := map[uint8]bool{} // instances that this replica was
	for _, prefix := range []string{recordPrefix, retiredPrefix} {
		entries, _, err := s.List(ctx, prefix)
		if err != nil {
			return 0, err
		}
		for _, e := range entries {
			n, err := strconv.ParseUint(strings.TrimPrefix(e.Key, prefix), 10, 8)
			if err != nil {
				return 0, fmt.Errorf("entry %q names no instance", e.Key)
			}
			if prefix == retiredPrefix {
				used[uint8(n)] = ""
				continue
			}
			r, err := parseRecord(e)
			if err != nil {
				return 0, err
			}
			used[uint8(n)] = r.ID
			for _, f := range r.Former {
				former[f.Instance] = former[f.Instance] || r.ID == id
			}
		}
	}
	for n, owner := range used {
		if owner != id {
			continue
		}
		if wanted != n && former[wanted] {
			return 0, fmt.Errorf("%w: the state was restored, and this replica, which was instance %d, is instance %d since: set instance, and authority.rootReplica at all replicas if it named this one", ErrClaimed, wanted, n)
		}
		if wanted != 0 && wanted != n {
			return 0, fmt.Errorf("%w: this one has instance %d, not %d; set instance back", ErrClaimed, n, wanted)
		}
		return n, nil
	}
	instance := wanted
	if owner, taken := used[wanted]; wanted != 0 && taken {
		if owner == "" {
			return 0, fmt.Errorf("%w: instance %d was this authority's before a restore", ErrClaimed, wanted)
		}
		return 0, fmt.Errorf("%w: instance %d is that of replica %s; serials that it gave out could come again; choose another, or give this replica the folder of that one", ErrClaimed, wanted, owner)
	}
	for n := uint8(1); instance == 0; n++ {
		if n > storage.MaxInstance {
			return 0, errors.New("every instance has been used: each folder of data that was lost has taken one with it")
		}
		if _, taken := used[n]; !taken && !slices.Contains(reserved, n) {
			instance = n
		}
	}
	b, err := json.Marshal(record{Version: recordVersion, ID: id})
	if err != nil {
		return 0, err
	}
	_, err = s.Commit(ctx, []storage.Cond{{Key: recordKey(instance)}, {Key: fmt.Sprintf("%s%03d", retiredPrefix, instance)}},
		[]storage.Op{{Key: recordKey(instance), Value: b}})
	return instance, err
}

// Instances are those that replicas have claimed.
func Instances(entries []storage.Entry) (all []uint8) {
	for _, e := range entries {
		if digits, ok := strings.CutPrefix(e.Key, recordPrefix); ok {
			if n, err := strconv.ParseUint(digits, 10, 8); err == nil {
				all = append(all, uint8(n))
			}
		}
	}
	slices.Sort(all)
	return all
}
