package ca

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/storage"
)

// ErrLogLoss is why nothing is signed after an agent showed a signed head that the
// log does not hold: records were lost, or an old copy of the log was put back. An
// operator restores the log or accepts the loss.
var ErrLogLoss = errors.New("the issuance log lost records")

const (
	lossKey        = "log-loss"
	lossVersion    = 1
	instancePrefix = "instances/"
	retiredVersion = 1
	// maxAccepted and maxVouched bound what is kept.
	maxAccepted = 32
	maxVouched  = 1024
	// headRate and headBurst are how many heads of a node are compared that are not known
	// yet: each can have a segment of the log read. An agent that connects returns up to
	// maxHeads, and later one for each that is signed.
	headRate  = 1.0
	headBurst = 4 * maxHeads
	maxReason = 500
)

// logLoss is what is known of heads that the log should hold and does not.
type logLoss struct {
	Version int `json:"version"`
	// Lost is the highest such head that nobody has decided on.
	Lost *lostHead `json:"lost,omitempty"`
	// Accepted are the newest ones that an operator accepted.
	Accepted []lostHead `json:"accepted,omitempty"`

	rest storage.Rest
}

type lostHead struct {
	Instance  uint32    `json:"instance"`
	Sequence  uint64    `json:"sequence"`
	Hash      []byte    `json:"hash"`
	Time      time.Time `json:"time"`
	Signature []byte    `json:"signature"`
	// Node is that of the agent that showed it, Noticed when, and LogSequence the
	// last record that the log had then.
	Node        string    `json:"node"`
	Noticed     time.Time `json:"noticed"`
	LogSequence uint64    `json:"logSequence"`
	// AcceptedAt and Reason are the operator's decision.
	AcceptedAt time.Time `json:"acceptedAt,omitzero"`
	Reason     string    `json:"reason,omitempty"`
}

func (l *lostHead) head() storage.Head {
	h := storage.Head{Instance: l.Instance, Sequence: l.Sequence, Time: l.Time, Signature: l.Signature}
	copy(h.Hash[:], l.Hash)
	return h
}

// retired is an instance that this authority was before it was restored. Its log
// is read, and never written again.
type retired struct {
	Version      int       `json:"version"`
	Instance     uint8     `json:"instance"`
	LogPublicKey []byte    `json:"logPublicKey"` // SubjectPublicKeyInfo, DER
	Sequence     uint64    `json:"sequence"`     // last record of its log, as it was restored
	Hash         []byte    `json:"hash"`
	Retired      time.Time `json:"retired"`
}

func retiredKey(instance uint8) string { return fmt.Sprintf("%s%03d", instancePrefix, instance) }

// losses watches over the heads that come back. It is safe for concurrent use.
type losses struct {
	now     atomic.Pointer[lostHead] // the loss that stops signing
	retired map[uint32]retired       // immutable after load

	mu       sync.Mutex
	state    logLoss           // guarded by mu
	revision uint64            // guarded by mu
	vouched  map[[32]byte]bool // hashes of heads that the log holds; guarded by mu
	beyond   map[uint32]uint64 // newest record that a retired instance is known to have had; guarded by mu
}

// loadLosses reads what was noticed and decided before a restart.
func (a *Authority) loadLosses(ctx context.Context) error {
	l := &a.losses
	l.vouched, l.beyond, l.retired = map[[32]byte]bool{}, map[uint32]uint64{}, map[uint32]retired{}
	entries, _, err := a.store.List(ctx, instancePrefix)
	if err != nil {
		return fmt.Errorf("reading retired instances: %w", err)
	}
	for _, e := range entries {
		r, err := parseRetired(e)
		if err != nil {
			return err
		}
		l.retired[uint32(r.Instance)] = r
	}
	if err := a.openRetired(ctx); err != nil {
		return err
	}
	if err := a.openFormer(ctx); err != nil {
		return err
	}
	e, err := a.store.Get(ctx, lossKey)
	if errors.Is(err, storage.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading what was lost of the log: %w", err)
	}
	if l.state, err = parseLoss(e); err != nil {
		return err
	}
	l.revision = e.Revision
	lost := l.state.Lost
	if lost == nil {
		return nil
	}
	if same, known, err := a.log.Holds(ctx, lost.head()); err != nil || !known || !same {
		l.now.Store(lost)
		return err
	}
	a.cfg.Log.Info("the issuance log holds again what was missing", "record", lost.Sequence)
	next := l.state
	next.Lost = nil
	return a.commitLoss(ctx, next)
}

func parseLoss(e storage.Entry) (logLoss, error) {
	l, rest, err := storage.ParseVersioned(e.Value, lossVersion, func(l logLoss) int { return l.Version })
	if err != nil {
		return logLoss{}, fmt.Errorf("reading what was lost of the log: %w", err)
	}
	l.rest = rest
	return l, nil
}

func parseRetired(e storage.Entry) (retired, error) {
	r, _, err := storage.ParseVersioned(e.Value, retiredVersion, func(r retired) int { return r.Version })
	if err == nil && (retiredKey(r.Instance) != e.Key || len(r.Hash) != 32) {
		err = errors.New("it names another instance")
	}
	if err != nil {
		return retired{}, fmt.Errorf("reading retired instance %s: %w", strings.TrimPrefix(e.Key, instancePrefix), err)
	}
	return r, nil
}

// commitLoss makes a new state durable. mu is held, or nobody else runs yet.
func (a *Authority) commitLoss(ctx context.Context, next logLoss) error {
	next.Version = lossVersion
	b, err := storage.EncodeRecord(next, next.rest)
	if err != nil {
		return fmt.Errorf("recording what was lost of the log: %w", err)
	}
	revision, err := a.store.Commit(ctx, []storage.Cond{{Key: lossKey, Revision: a.losses.revision}}, []storage.Op{{Key: lossKey, Value: b}})
	if errors.Is(err, storage.ErrUnknown) {
		// What is stored now stays so.
		if e, getErr := a.store.Get(ctx, lossKey); getErr == nil && bytes.Equal(e.Value, b) {
			revision, err = e.Revision, nil
		}
	}
	if err != nil {
		return fmt.Errorf("recording what was lost of the log: %w", err)
	}
	a.losses.state, a.losses.revision = next, revision
	return nil
}

// signing is nil while the log is known to be whole, as far as anybody told.
func (a *Authority) signing() error {
	l := a.losses.now.Load()
	if l == nil {
		return nil
	}
	return fmt.Errorf("%w: %w: node %s holds a signed head at record %d that the log, now at %d, does not hold; "+
		"restore the log, or find out why and accept the loss: signet ca log accept-loss --sequence %d --reason …",
		ErrUnavailable, ErrLogLoss, l.Node, l.Sequence, a.log.Head().Sequence, l.Sequence)
}

// returned takes a head that an agent of a node has seen. It counts only with a
// valid signature: an agent cannot make the authority believe that its log was cut.
func (a *Authority) returned(ctx context.Context, node string, h storage.Head) {
	l := &a.losses
	if r, ok := l.retired[h.Instance]; ok {
		a.returnedRetired(node, h, r)
		return
	}
	l.mu.Lock()
	known := l.vouched[h.Hash] || slices.ContainsFunc(l.state.Accepted, func(acc lostHead) bool { return !h.Time.After(acc.AcceptedAt) })
	l.mu.Unlock()
	if known {
		return
	}
	if after := a.heads.Take(node, 1, time.Now()); after > 0 {
		a.warn("an agent returns too many heads of the log; this one is not compared", "node", node, "record", h.Sequence)
		return
	}
	if !a.verifyHead(h) {
		return
	}
	same, known, err := a.log.Holds(ctx, h)
	if err != nil && ctx.Err() != nil {
		return // its agent left, and returns it again
	}
	if err != nil {
		job := "comparing heads"
		if errors.Is(err, storage.ErrCorrupt) {
			job = "issuance log" // stays until somebody has seen to it and starts anew
		}
		a.fails(job, fmt.Errorf("comparing a head of node %s with the issuance log: %w", node, err))
		return
	}
	a.fails("comparing heads", nil)
	l.mu.Lock()
	defer l.mu.Unlock()
	if same {
		if len(l.vouched) >= maxVouched {
			clear(l.vouched)
		}
		l.vouched[h.Hash] = true
	}
	if same || !known || l.state.Lost != nil && l.state.Lost.Sequence >= h.Sequence {
		return
	}
	lost := &lostHead{Instance: h.Instance, Sequence: h.Sequence, Hash: h.Hash[:], Time: h.Time, Signature: h.Signature,
		Node: node, Noticed: time.Now().UTC().Round(0), LogSequence: a.log.Head().Sequence}
	l.now.Store(lost) // at once, whatever becomes of the commit
	a.cfg.Log.Error("the issuance log does not hold a head that it signed: records were lost or an old copy was put back; nothing is signed until an operator decides",
		"node", node, "record", h.Sequence, "log", lost.LogSequence)
	next := l.state
	next.Lost = lost
	if err := a.commitLoss(ctx, next); err != nil {
		a.fails("issuance log", err)
		l.state.Lost = lost
	}
}

// returnedRetired counts what a backup did not have: the operator decided when it
// was restored, so nothing stops.
func (a *Authority) returnedRetired(node string, h storage.Head, r retired) {
	if h.Sequence <= r.Sequence || !verifyHeadWith(r.LogPublicKey, h) {
		return
	}
	l := &a.losses
	l.mu.Lock()
	defer l.mu.Unlock()
	if h.Sequence <= l.beyond[h.Instance] {
		return
	}
	l.beyond[h.Instance] = h.Sequence
	a.metrics.retiredLost.WithLabelValues(fmt.Sprint(h.Instance)).Set(float64(h.Sequence - r.Sequence))
	a.cfg.Log.Warn("the backup that this authority was restored from did not have the newest records of the instance before",
		"node", node, "instance", h.Instance, "records", h.Sequence-r.Sequence, "first", r.Sequence+1)
}

// acceptLoss records that an operator accepts the loss of the head at sequence, in
// the log first, and lets the authority sign again.
func (a *Authority) acceptLoss(ctx context.Context, sequence uint64, reason string) error {
	l := &a.losses
	l.mu.Lock()
	defer l.mu.Unlock()
	lost := l.state.Lost
	if lost == nil {
		return fmt.Errorf("accepting a loss: %w: no loss is open", errNoLoss)
	}
	if lost.Sequence != sequence {
		return fmt.Errorf("accepting a loss: %w: the head that was lost is at record %d, not %d", errNoLoss, lost.Sequence, sequence)
	}
	if reason == "" || len(reason) > maxReason {
		return fmt.Errorf("accepting a loss: %w: a reason of 1 to %d bytes is needed, for those who read the log later", errNoLoss, maxReason)
	}
	now, err := a.clock.now()
	if err != nil {
		return err
	}
	err = a.decide(ctx, &capb.Decision{What: capb.Decision_WHAT_LOG_LOSS_ACCEPTED, Instance: lost.Instance, Sequence: lost.Sequence, Hash: lost.Hash, Reason: reason})
	if err != nil {
		return fmt.Errorf("accepting a loss: %w", err)
	}
	accepted := *lost
	accepted.AcceptedAt, accepted.Reason = later(now, lost.Time).UTC(), reason
	next := l.state
	next.Lost, next.Accepted = nil, append(slices.Clone(next.Accepted), accepted)
	if n := len(next.Accepted) - maxAccepted; n > 0 {
		next.Accepted = next.Accepted[n:]
	}
	if err := a.commitLoss(ctx, next); err != nil {
		return fmt.Errorf("accepting a loss: %w", err)
	}
	l.now.Store(nil)
	a.cfg.Log.Warn("an operator accepted that the issuance log lost records; signing goes on", "record", sequence, "reason", reason)
	return nil
}

// errNoLoss is why a decision does not apply.
var errNoLoss = errors.New("that cannot be accepted")
