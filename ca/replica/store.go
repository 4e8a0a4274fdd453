package replica

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/signet-mesh/signet/storage"
)

// common are the keys of the journal that replicas have in common, beside roots.
var common = []string{"version", "trustDomain", "sequence", "source"}

// Store is the shared state as one replica sees it. Keys that are not kept for each
// replica go through. It is safe for concurrent use.
type Store struct {
	storage.Store
	instance uint8

	mu sync.Mutex
	// seen are the revisions of the two parts of the journal that this replica last
	// read or wrote together; a journal's revision is the higher one. Guarded by mu.
	seen parts
}

type parts struct{ common, own uint64 }

func (p parts) revision() uint64 { return max(p.common, p.own) }

// View is the state s as the replica sees it that has claimed an instance.
func View(s storage.Store, instance uint8) *Store { return &Store{Store: s, instance: instance} }

// own is where a key is that each replica has for itself; that of any other key is it.
func (s *Store) own(key string) string {
	switch key {
	case lossKey:
		return fmt.Sprintf("%s%03d", lossPrefix, s.instance)
	case clockKey:
		return fmt.Sprintf("%s%03d", clockPrefix, s.instance)
	}
	return key
}

// shown is the reverse of own.
func (s *Store) shown(key string) string {
	for _, k := range []string{lossKey, clockKey} {
		if key == s.own(k) {
			return k
		}
	}
	return key
}

// hidden reports whether a key is one of those that are shown under another name.
func hidden(key string) bool {
	return strings.HasPrefix(key, recordPrefix) || strings.HasPrefix(key, lossPrefix) || strings.HasPrefix(key, clockPrefix)
}

// Clocks are what replicas keep of the time, by instance, as the authority wrote it.
func Clocks(ctx context.Context, s storage.Store) (map[uint8]storage.Entry, error) {
	entries, _, err := s.List(ctx, clockPrefix)
	if err != nil {
		return nil, err
	}
	all := map[uint8]storage.Entry{}
	for _, e := range entries {
		n, err := instanceOf(e.Key, clockPrefix)
		if err != nil {
			return nil, err
		}
		all[n] = e
	}
	return all, nil
}

// Get is that of storage.Store. The journal has the field "others" beside its own: the
// authorities of other replicas by instance.
func (s *Store) Get(ctx context.Context, key string) (storage.Entry, error) {
	switch key {
	case journalKey:
		entries, _, err := s.Store.List(ctx, journalKey, recordPrefix)
		if err != nil {
			return storage.Entry{}, err
		}
		e, p, err := s.merge(entries)
		if err != nil {
			return storage.Entry{}, err
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.seen = p
		return e, nil
	case lossKey, clockKey:
		e, err := s.Store.Get(ctx, s.own(key))
		if key == clockKey && errors.Is(err, storage.ErrNotFound) {
			// That of all replicas, from before each kept its own: it is not changed any more.
			e, err = s.Store.Get(ctx, key)
			e.Revision = 0
		}
		e.Key = key
		return e, err
	}
	return s.Store.Get(ctx, key)
}

// List is that of storage.Store. Of what is shared it reads no more than it is asked for,
// and the parts of the journal.
func (s *Store) List(ctx context.Context, prefixes ...string) ([]storage.Entry, uint64, error) {
	from, shown := slices.Clone(prefixes), false
	for _, p := range prefixes {
		if strings.HasPrefix(journalKey, p) {
			from, shown = append(from, journalKey, recordPrefix), true
		}
		for _, key := range []string{lossKey, clockKey} {
			if strings.HasPrefix(key, p) {
				from, shown = append(from, s.own(key)), true
			}
		}
	}
	if !shown {
		return s.Store.List(ctx, prefixes...)
	}
	all, revision, err := s.Store.List(ctx, from...)
	if err != nil {
		return nil, 0, err
	}
	entries, p, err := s.entries(all)
	if err != nil {
		return nil, 0, err
	}
	if p.common != 0 {
		s.mu.Lock()
		s.seen = p
		s.mu.Unlock()
	}
	return slices.DeleteFunc(entries, func(e storage.Entry) bool {
		return !slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(e.Key, p) })
	}), revision, nil
}

// entries are those of the shared state as this replica sees them, with the revisions of
// the journal's parts, if there is one.
func (s *Store) entries(all []storage.Entry) (out []storage.Entry, p parts, err error) {
	hasClock := slices.ContainsFunc(all, func(e storage.Entry) bool { return e.Key == s.own(clockKey) })
	for _, e := range all {
		switch {
		case e.Key == journalKey:
			if e, p, err = s.merge(all); err != nil {
				return nil, parts{}, err
			}
		case e.Key == clockKey && hasClock:
			continue
		case s.shown(e.Key) != e.Key:
			e.Key = s.shown(e.Key)
		case hidden(e.Key):
			continue
		}
		out = append(out, e)
	}
	slices.SortFunc(out, func(a, b storage.Entry) int { return strings.Compare(a.Key, b.Key) })
	return out, p, nil
}

// merge makes the journal of both parts.
func (s *Store) merge(all []storage.Entry) (e storage.Entry, p parts, err error) {
	journal, others := map[string]json.RawMessage{}, map[string]json.RawMessage{}
	var own record
	for _, x := range all {
		switch {
		case x.Key == journalKey:
			if err := json.Unmarshal(x.Value, &journal); err != nil {
				return e, p, fmt.Errorf("reading the journal: %w", err)
			}
			p.common = x.Revision
		case strings.HasPrefix(x.Key, recordPrefix):
			r, err := parseRecord(x)
			if err != nil {
				return e, p, err
			}
			if x.Key == recordKey(s.instance) {
				own, p.own = r, x.Revision
			} else if a := r.Journal["authorities"]; a != nil {
				others[strings.TrimLeft(strings.TrimPrefix(x.Key, recordPrefix), "0")] = a
			}
		}
	}
	if p.common == 0 {
		return e, parts{}, storage.ErrNotFound
	}
	if p.own == 0 {
		return e, p, fmt.Errorf("instance %d is no longer claimed: the state is not the one that this replica belongs to: %w", s.instance, storage.ErrCorrupt)
	}
	authorities, err := concat(journal["authorities"], own.Journal["authorities"])
	if err != nil {
		return e, p, err
	}
	maps.Copy(journal, own.Journal)
	journal["instance"], _ = json.Marshal(s.instance) // of a number, which cannot fail
	journal["authorities"] = authorities
	if len(others) > 0 {
		if journal["others"], err = json.Marshal(others); err != nil {
			return e, p, err
		}
	}
	b, err := json.Marshal(journal)
	return storage.Entry{Key: journalKey, Value: b, Revision: p.revision()}, p, err
}

func concat(lists ...json.RawMessage) (json.RawMessage, error) {
	all := []json.RawMessage{}
	for _, l := range lists {
		var some []json.RawMessage
		if l != nil {
			if err := json.Unmarshal(l, &some); err != nil {
				return nil, fmt.Errorf("reading the journal: authorities: %w", err)
			}
		}
		all = append(all, some...)
	}
	return json.Marshal(all)
}

// split takes a journal apart.
func split(value []byte) (shared, own map[string]json.RawMessage, err error) {
	fail := func(err error) (map[string]json.RawMessage, map[string]json.RawMessage, error) {
		return nil, nil, fmt.Errorf("writing the journal: %w", err)
	}
	own, shared = map[string]json.RawMessage{}, map[string]json.RawMessage{}
	if err := json.Unmarshal(value, &own); err != nil {
		return fail(err)
	}
	for _, k := range common {
		if v, ok := own[k]; ok {
			shared[k] = v
			delete(own, k)
		}
	}
	var all []json.RawMessage
	if a := own["authorities"]; a != nil {
		if err := json.Unmarshal(a, &all); err != nil {
			return fail(err)
		}
	}
	roots, rest := []json.RawMessage{}, []json.RawMessage{}
	for _, a := range all {
		var kind struct{ Kind string }
		if err := json.Unmarshal(a, &kind); err != nil {
			return fail(err)
		}
		if kind.Kind == "root" {
			roots = append(roots, a)
		} else {
			rest = append(rest, a)
		}
	}
	delete(own, "others")
	delete(own, "instance")
	if shared["authorities"], err = json.Marshal(roots); err != nil {
		return fail(err)
	}
	if own["authorities"], err = json.Marshal(rest); err != nil {
		return fail(err)
	}
	return shared, own, nil
}

// Commit is that of storage.Store. A change of the journal writes what has changed of
// its two parts, on the condition that neither was changed by somebody else.
func (s *Store) Commit(ctx context.Context, conds []storage.Cond, ops []storage.Op) (uint64, error) {
	conds, ops = slices.Clone(conds), slices.Clone(ops)
	for i, o := range ops {
		ops[i].Key = s.own(o.Key)
	}
	for i, c := range conds {
		conds[i].Key = s.own(c.Key)
	}
	of := func(c storage.Cond) bool { return c.Key == journalKey }
	op := slices.IndexFunc(ops, func(o storage.Op) bool { return o.Key == journalKey })
	i := slices.IndexFunc(conds, of)
	if op < 0 && i < 0 {
		return s.Store.Commit(ctx, conds, ops)
	}
	if i < 0 || op >= 0 && ops[op].Delete {
		return 0, errors.New("the journal is changed on a condition, and never deleted")
	}
	s.mu.Lock()
	p, wanted := s.seen, conds[i].Revision
	s.mu.Unlock()
	conds = slices.DeleteFunc(conds, of)
	if wanted != 0 && p.revision() != wanted {
		return 0, fmt.Errorf("the journal has revision %d, not %d: %w", p.revision(), wanted, storage.ErrConflict)
	}
	if op >= 0 {
		return s.commitJournal(ctx, wanted, conds, ops, op)
	}
	if wanted == 0 {
		return s.Store.Commit(ctx, append(conds, storage.Cond{Key: journalKey}), ops)
	}
	return s.Store.Commit(ctx, append(conds, p.conds(s.instance)...), ops)
}

func (p parts) conds(instance uint8) []storage.Cond {
	return []storage.Cond{{Key: journalKey, Revision: p.common}, {Key: recordKey(instance), Revision: p.own}}
}

// commitJournal is a commit with a change of the journal among its ops. mu is held while
// it waits for the state: changes of the journal come one after the other.
func (s *Store) commitJournal(ctx context.Context, wanted uint64, conds []storage.Cond, ops []storage.Op, op int) (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	record, err := s.Store.Get(ctx, recordKey(s.instance))
	if err != nil {
		return 0, err
	}
	p := s.seen
	if wanted == 0 {
		// A first journal; the record is there since the claim.
		p = parts{own: record.Revision}
	} else if p.revision() != wanted {
		return 0, fmt.Errorf("the journal has revision %d, not %d: %w", p.revision(), wanted, storage.ErrConflict)
	}
	ops, wrote, err := s.splitOp(ctx, ops, op, record, p)
	if err != nil {
		return 0, err
	}
	revision, err := s.Store.Commit(ctx, append(conds, p.conds(s.instance)...), ops)
	if err != nil {
		return 0, err
	}
	if wrote.common != 0 {
		p.common = revision
	}
	if wrote.own != 0 {
		p.own = revision
	}
	s.seen = p
	return p.revision(), nil
}

// splitOp replaces the change of the journal by those of the parts that it changes, at
// least one; wrote says which.
func (s *Store) splitOp(ctx context.Context, ops []storage.Op, op int, old storage.Entry, p parts) (out []storage.Op, wrote parts, err error) {
	shared, own, err := split(ops[op].Value)
	if err != nil {
		return nil, wrote, err
	}
	r, err := parseRecord(old)
	if err != nil {
		return nil, wrote, err
	}
	r.Journal = own
	ownBytes, err := storage.EncodeRecord(r, r.rest)
	if err != nil {
		return nil, wrote, err
	}
	sharedBytes, err := json.Marshal(shared)
	if err != nil {
		return nil, wrote, err
	}
	var before []byte
	if p.common != 0 {
		e, err := s.Store.Get(ctx, journalKey)
		if err != nil {
			return nil, wrote, err
		}
		before = e.Value
	}
	out = slices.Delete(ops, op, op+1)
	if !bytes.Equal(before, sharedBytes) {
		out = append(out, storage.Op{Key: journalKey, Value: sharedBytes})
		wrote.common = 1
	}
	if !bytes.Equal(old.Value, ownBytes) || wrote.common == 0 {
		out = append(out, storage.Op{Key: recordKey(s.instance), Value: ownBytes})
		wrote.own = 1
	}
	return out, wrote, nil
}

// Watch is that of storage.Store. An event of the journal is that of one of its parts, or
// of the part of another replica, and has no value: read it.
func (s *Store) Watch(ctx context.Context, prefix string, after uint64) iter.Seq2[storage.Event, error] {
	if storage.CheckPrefix(prefix) != nil {
		return s.Store.Watch(ctx, prefix, after) // which says what is wrong
	}
	return func(yield func(storage.Event, error) bool) {
		for e, err := range s.Store.Watch(ctx, "", after) {
			if err == nil {
				switch {
				case s.shown(e.Key) != e.Key:
					e.Key = s.shown(e.Key)
				case e.Key == journalKey || strings.HasPrefix(e.Key, recordPrefix):
					e.Key, e.Value, e.Deleted = journalKey, nil, false
				case hidden(e.Key):
					continue
				}
				if !strings.HasPrefix(e.Key, prefix) {
					continue
				}
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

// Err is that of the state, where it says so.
func (s *Store) Err() error {
	if e, ok := s.Store.(interface{ Err() error }); ok {
		return e.Err()
	}
	return nil
}

// Close does nothing: whoever opened the shared state closes it.
func (s *Store) Close() error { return nil }
