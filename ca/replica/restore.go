package replica

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/signet-mesh/signet/storage"
)

const (
	// sequenceLeap is what a restoration adds to the trust sequence: more than anybody can
	// have used since the copy was made. It is that of a restored backup.
	sequenceLeap = 1 << 20

	listPrefix = "crl/"
	banPrefix  = "bans/"
	// MaxRestoreReason is how many bytes a reason may have.
	MaxRestoreReason = 500
)

// Former is an instance that a replica was before the shared state was restored. Its log
// is read, and never written again.
type Former struct {
	Instance uint8 `json:"instance"`
	// Sequence and Hash are of the last record that the copy of its log had.
	Sequence uint64 `json:"sequence"`
	Hash     []byte `json:"hash"`
	// At and Reason are the operator's decision.
	At     time.Time `json:"at"`
	Reason string    `json:"reason"`
	// Dropped says that its log is older than the retention, and gone or half removed.
	Dropped bool `json:"dropped,omitempty"`
}

// FormerOf are the instances that the replica with an instance was, oldest first.
func FormerOf(ctx context.Context, s storage.Store, instance uint8) ([]Former, error) {
	e, err := s.Get(ctx, recordKey(instance))
	if errors.Is(err, storage.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	r, err := parseRecord(e)
	return r.Former, err
}

// DropFormer records that the log of an instance that the replica was is not to be read
// any more. Then it can be removed.
func DropFormer(ctx context.Context, s storage.Store, instance, former uint8) error {
	for {
		err := dropFormer(ctx, s, instance, former)
		if ctx.Err() == nil && (errors.Is(err, storage.ErrConflict) || errors.Is(err, storage.ErrUnknown)) {
			continue // what is stored now tells
		}
		if err != nil {
			return fmt.Errorf("recording that the log of instance %d goes: %w", former, err)
		}
		return nil
	}
}

func dropFormer(ctx context.Context, s storage.Store, instance, former uint8) error {
	e, err := s.Get(ctx, recordKey(instance))
	if err != nil {
		return err
	}
	r, err := parseRecord(e)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(r.Former, func(f Former) bool { return f.Instance == former })
	if i < 0 {
		return errors.New("it was never that instance")
	}
	if r.Former[i].Dropped {
		return nil
	}
	r.Former[i].Dropped = true
	b, err := storage.EncodeRecord(r, r.rest)
	if err != nil {
		return err
	}
	_, err = s.Commit(ctx, []storage.Cond{{Key: e.Key, Revision: e.Revision}}, []storage.Op{{Key: e.Key, Value: b}})
	return err
}

// Restoration makes a shared state that was put back from an older copy one that
// replicas can go on with. What was recorded since the copy is gone, and numbers that
// came since may have been seen: so every replica becomes another instance, whose log
// begins with a record of that, and the trust sequence leaps. The logs of the instances
// before stay, to be read, and heads that agents hold of them tell how much is missing.
type Restoration struct {
	Store storage.Store
	Files storage.FS
	// Wait is how long to wait for the log of a process that died.
	Wait time.Duration
	// From is the lowest instance to give; 0 means 1. Those below that nobody had are never
	// given to anybody: replicas that joined since the copy may have been some of them.
	From uint8
	// Reason is for who reads the logs later.
	Reason string
}

// Restored is what a restoration did.
type Restored struct {
	TrustSequence uint64
	// Bans are in force: what was banned or lifted since the copy was made is not among
	// them.
	Bans     int
	Replicas []Renumbered // in the order of their former instances
}

// Renumbered is a replica that became another instance.
type Renumbered struct {
	From, To uint8
	Records  uint64 // the last record of the log that was From's
}

// retired is what the authority keeps of an instance that is nobody's any more.
type retired struct {
	Version      int       `json:"version"`
	Instance     uint8     `json:"instance"`
	LogPublicKey []byte    `json:"logPublicKey"`
	Sequence     uint64    `json:"sequence"`
	Hash         []byte    `json:"hash"`
	Retired      time.Time `json:"retired"`
}

// Run does it, as one change, but for lists that go and numbers that are left out before.
// No replica may run: one that does holds its log, which is an error. After an error the
// rest is as it was, or, where that is not known, it can be done again, and only leaves more
// numbers out.
func (r Restoration) Run(ctx context.Context) (Restored, error) {
	out, err := r.run(ctx)
	if err != nil {
		return Restored{}, fmt.Errorf("going on with a restored state: %w", err)
	}
	return out, nil
}

func (r Restoration) run(ctx context.Context) (out Restored, err error) {
	if r.Reason == "" || len(r.Reason) > MaxRestoreReason {
		return out, fmt.Errorf("a reason of 1 to %d bytes is needed, for those who read the logs later", MaxRestoreReason)
	}
	if r.From > storage.MaxInstance {
		return out, fmt.Errorf("instance %d: must be 1 to %d", r.From, storage.MaxInstance)
	}
	if err := CheckMoved(ctx, r.Store); err != nil {
		return out, err
	}
	entries, _, err := r.Store.List(ctx, "")
	if err != nil {
		return out, err
	}
	w := &restoring{Restoration: r, now: time.Now().UTC().Round(0), used: map[uint8]bool{}}
	defer func() { err = errors.Join(err, w.close()) }()
	if err := w.read(ctx, entries); err != nil {
		return out, err
	}
	if err := w.renumber(); err != nil {
		return out, err
	}
	// Their numbers may have been used for others since; new ones are signed at the start.
	// Before the rest, because there can be many, and without them nothing is wrong.
	for part := range storage.Parts(w.lists) {
		if _, err := r.Store.Commit(ctx, nil, part); err != nil {
			return out, err
		}
	}
	// Also before: there can be more than fit into the change, and nobody has had them.
	for part := range slices.Chunk(w.unused, storage.MaxOps/2) {
		if err := w.leaveOut(ctx, part); err != nil {
			return out, err
		}
	}
	if len(w.ops) > storage.MaxOps {
		return out, fmt.Errorf("%d replicas: too many for one change", len(w.out.Replicas))
	}
	if _, err := r.Store.Commit(ctx, w.conds, w.ops); err != nil {
		return out, err
	}
	return w.out, nil
}

// restoring is a restoration under way.
type restoring struct {
	Restoration
	now      time.Time
	used     map[uint8]bool // instances that somebody has or had
	replicas []restoredReplica
	clocks   []keptClock
	lists    []storage.Op
	unused   []uint8        // instances that nobody had and nobody is to get
	bans     *storage.Entry // the revision of the bans, if there is one
	conds    []storage.Cond
	ops      []storage.Op
	out      Restored
}

type restoredReplica struct {
	instance uint8
	record   record
	log      *storage.FileLog // nil: it had not begun
}

// keptClock is what a replica kept of the time, as it will be kept.
type keptClock struct {
	instance uint8
	value    []byte
}

func (w *restoring) close() error {
	var errs []error
	for _, x := range w.replicas {
		if x.log != nil {
			errs = append(errs, x.log.Close())
		}
	}
	return errors.Join(errs...)
}

func (w *restoring) op(revision uint64, op storage.Op) {
	w.conds, w.ops = append(w.conds, storage.Cond{Key: op.Key, Revision: revision}), append(w.ops, op)
}

// read takes the state apart.
func (w *restoring) read(ctx context.Context, entries []storage.Entry) error {
	var found bool
	for _, e := range entries {
		var err error
		switch {
		case e.Key == journalKey:
			found = true
			err = w.leap(e)
		case strings.HasPrefix(e.Key, clockPrefix):
			err = w.clock(e)
		case strings.HasPrefix(e.Key, listPrefix):
			w.lists = append(w.lists, storage.Op{Key: e.Key, Delete: true})
		case e.Key == BanRevisionKey:
			w.bans = &e
		case strings.HasPrefix(e.Key, banPrefix):
			err = w.ban(e)
		case strings.HasPrefix(e.Key, lossPrefix):
			w.op(e.Revision, storage.Op{Key: e.Key, Delete: true})
		case strings.HasPrefix(e.Key, retiredPrefix):
			var n uint8
			if n, err = instanceOf(e.Key, retiredPrefix); err == nil {
				w.used[n] = true
			}
		case strings.HasPrefix(e.Key, recordPrefix):
			err = w.replica(ctx, e)
		}
		if err != nil {
			return err
		}
	}
	if !found {
		return errors.New("the state holds no journal: it is not that of an authority")
	}
	if w.bans == nil {
		return nil
	}
	r, err := ParseBanRevision(*w.bans)
	if err != nil {
		return err
	}
	r.Restore(w.out.TrustSequence, w.now)
	value, err := r.Encode()
	w.op(w.bans.Revision, storage.Op{Key: BanRevisionKey, Value: value})
	return err
}

// ban counts a ban that is in force.
func (w *restoring) ban(e storage.Entry) error {
	var b struct {
		Until time.Time       `json:"until"`
		Ended json.RawMessage `json:"ended"`
	}
	if err := json.Unmarshal(e.Value, &b); err != nil {
		return fmt.Errorf("reading a ban: %w", err)
	}
	if b.Ended == nil && (b.Until.IsZero() || w.now.Before(b.Until)) {
		w.out.Bans++
	}
	return nil
}

// leap raises the trust sequence.
func (w *restoring) leap(e storage.Entry) error {
	var j map[string]json.RawMessage
	var sequence uint64
	err := json.Unmarshal(e.Value, &j)
	if err == nil {
		err = json.Unmarshal(j["sequence"], &sequence)
	}
	if err != nil {
		return fmt.Errorf("reading the journal: %w", err)
	}
	w.out.TrustSequence = sequence + sequenceLeap
	j["sequence"], _ = json.Marshal(w.out.TrustSequence) // of a number, which cannot fail
	b, err := json.Marshal(j)
	w.op(e.Revision, storage.Op{Key: journalKey, Value: b})
	return err
}

// clock makes what a replica knew of the time what it is now: an operator is there and has
// the clock before their eyes.
func (w *restoring) clock(e storage.Entry) error {
	n, err := instanceOf(e.Key, clockPrefix)
	if err != nil {
		return err
	}
	var c map[string]json.RawMessage
	var version int
	err = json.Unmarshal(e.Value, &c)
	if err == nil {
		err = json.Unmarshal(c["version"], &version)
	}
	if err == nil && version != 1 {
		err = fmt.Errorf("%w: version %d", storage.ErrNewerFormat, version)
	}
	if err != nil {
		return fmt.Errorf("reading what was known of the time: %w", err)
	}
	c["time"], _ = json.Marshal(w.now) // of a time, which cannot fail
	b, err := json.Marshal(c)
	w.op(e.Revision, storage.Op{Key: e.Key, Delete: true})
	w.clocks = append(w.clocks, keptClock{n, b})
	return err
}

// replica opens the log of a replica, which is then this process's, and reads it whole.
func (w *restoring) replica(ctx context.Context, e storage.Entry) error {
	n, err := instanceOf(e.Key, recordPrefix)
	if err != nil {
		return err
	}
	x := restoredReplica{instance: n}
	if x.record, err = parseRecord(e); err != nil {
		return err
	}
	w.used[n] = true
	if x.record.Journal["logKey"] != nil {
		x.log, err = storage.OpenLog(sharedLog(n), storage.LogOptions{Instance: uint32(n), FS: w.Files, ReadOnly: true, LockTimeout: max(w.Wait, time.Second)})
		switch {
		case errors.Is(err, storage.ErrLocked):
			return fmt.Errorf("replica %d runs: stop every replica first: %w", n, err)
		case errors.Is(err, fs.ErrNotExist):
			return fmt.Errorf("replica %d has no log: this is not a whole copy: %w", n, err)
		case err != nil:
			return err
		}
	}
	w.replicas = append(w.replicas, x)
	if x.log != nil {
		if err := x.log.Verify(ctx); err != nil {
			return fmt.Errorf("the log of replica %d: %w", n, err)
		}
	}
	w.op(e.Revision, storage.Op{Key: e.Key, Delete: true})
	return nil
}

// renumber gives each replica another instance, and retires the one that it was.
func (w *restoring) renumber() error {
	next := max(w.From, 1)
	for n := uint8(1); n < next; n++ {
		if !w.used[n] {
			w.unused = append(w.unused, n)
			w.used[n] = true
		}
	}
	for _, x := range w.replicas {
		for ; w.used[next]; next++ {
		}
		if next > storage.MaxInstance {
			return errors.New("every instance has been used")
		}
		gone := retired{Instance: x.instance, Hash: make([]byte, 32)}
		if x.log != nil {
			head := x.log.Head()
			gone.Sequence, gone.Hash = head.Sequence, head.Hash[:]
			if err := json.Unmarshal(x.record.Journal["logPublicKey"], &gone.LogPublicKey); err != nil {
				return fmt.Errorf("reading replica %d: the log's public key: %w", x.instance, err)
			}
		}
		if err := w.retire(gone); err != nil {
			return err
		}
		r := x.record
		delete(r.Journal, "logKey")
		delete(r.Journal, "logPublicKey")
		r.Former = append(r.Former, Former{Instance: x.instance, Sequence: gone.Sequence, Hash: gone.Hash, At: w.now, Reason: w.Reason})
		b, err := storage.EncodeRecord(r, r.rest)
		if err != nil {
			return err
		}
		w.op(0, storage.Op{Key: recordKey(next), Value: b})
		for _, c := range w.clocks {
			if c.instance == x.instance {
				w.op(0, storage.Op{Key: fmt.Sprintf("%s%03d", clockPrefix, next), Value: c.value})
			}
		}
		w.used[next] = true
		w.out.Replicas = append(w.out.Replicas, Renumbered{From: x.instance, To: next, Records: gone.Sequence})
	}
	return nil
}

func (w *restoring) retire(r retired) error {
	op, err := w.retirement(r)
	w.op(0, op)
	w.used[r.Instance] = true
	return err
}

func (w *restoring) retirement(r retired) (storage.Op, error) {
	r.Version, r.Retired = 1, w.now
	b, err := json.Marshal(r)
	return storage.Op{Key: fmt.Sprintf("%s%03d", retiredPrefix, r.Instance), Value: b}, err
}

// leaveOut retires instances that nobody had, unless somebody has one of them by now.
func (w *restoring) leaveOut(ctx context.Context, instances []uint8) error {
	var conds []storage.Cond
	var ops []storage.Op
	for _, n := range instances {
		op, err := w.retirement(retired{Instance: n, Hash: make([]byte, 32)})
		if err != nil {
			return err
		}
		conds, ops = append(conds, storage.Cond{Key: recordKey(n)}, storage.Cond{Key: op.Key}), append(ops, op)
	}
	_, err := w.Store.Commit(ctx, conds, ops)
	return err
}
