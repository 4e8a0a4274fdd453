package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"google.golang.org/protobuf/proto"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/journal"
	"github.com/signet-mesh/signet/ca/keys"
	"github.com/signet-mesh/signet/storage"
)

// newLogKey makes the key that signs heads of a log that begins, and names it in the
// journal.
func newLogKey(ring *keys.Ring, j *journal.Journal) (crypto.Signer, error) {
	uri, key, err := ring.Create(keys.Log)
	if err != nil {
		return nil, err
	}
	j.LogKey = uri
	j.LogPublicKey, err = x509.MarshalPKIXPublicKey(key.Public())
	return key, err
}

// signHead signs the head of the log, if it grew since the last.
func (a *Authority) signHead(ctx context.Context) error {
	h := a.log.Head()
	if signed, ok := a.log.SignedHead(); h.Sequence == 0 || ok && signed.Sequence == h.Sequence {
		return nil
	}
	if a.signing() != nil {
		return nil // a head would vouch for a log that lost records
	}
	var err error
	if h.Signature, err = a.signStatement(h.SignedBytes()); err != nil {
		return fmt.Errorf("signing the log's head: %w", err)
	}
	if err := a.log.AppendHead(ctx, h); err != nil {
		return fmt.Errorf("recording the log's head: %w", err)
	}
	a.head.Store(h)
	return nil
}

func (a *Authority) signStatement(b []byte) ([]byte, error) {
	sum := hashStatement(b)
	return a.logKey.Sign(rand.Reader, sum[:], crypto.SHA256)
}

// hashStatement is what the log's key signs of a head or a checkpoint.
func hashStatement(b []byte) [sha256.Size]byte { return sha256.Sum256(b) }

// verifyHead reports whether h carries a signature of this replica's log key.
func (a *Authority) verifyHead(h storage.Head) bool {
	pub, ok := a.logKey.Public().(*ecdsa.PublicKey)
	sum := hashStatement(h.SignedBytes())
	return ok && h.Instance == uint32(a.instance) && ecdsa.VerifyASN1(pub, sum[:], h.Signature)
}

// verifyHeadWith reports whether a head carries the signature of a log key, given
// as SubjectPublicKeyInfo.
func verifyHeadWith(spki []byte, h storage.Head) bool {
	return verifyStatement(spki, h.SignedBytes(), h.Signature)
}

// verifyCheckpoint is verifyHeadWith for the beginning of a pruned log.
func verifyCheckpoint(spki []byte, c storage.Checkpoint) bool {
	return verifyStatement(spki, c.SignedBytes(), c.Signature)
}

func verifyStatement(spki, message, signature []byte) bool {
	pub, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		return false
	}
	ec, ok := pub.(*ecdsa.PublicKey)
	sum := hashStatement(message)
	return ok && ecdsa.VerifyASN1(ec, sum[:], signature)
}

// decide records an operator's decisions in the issuance log: all, or none.
func (a *Authority) decide(ctx context.Context, ds ...*capb.Decision) error {
	records := make([][]byte, 0, len(ds))
	for _, d := range ds {
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(&capb.IssuanceRecord{Kind: capb.IssuanceRecord_KIND_DECISION, Decision: d})
		if err != nil {
			return fmt.Errorf("encoding a decision: %w", err)
		}
		records = append(records, b)
	}
	if _, err := a.log.Append(ctx, records); err != nil {
		return fmt.Errorf("%w: recording a decision in the issuance log: %w", ErrUnavailable, err)
	}
	return nil
}

// pruneLog removes records of the issuance log that are older than the retention,
// in this log and in those of retired instances.
func (a *Authority) pruneLog(ctx context.Context) error {
	left := errors.Join(a.removeGone(), a.removeDropped(ctx)) // whose removal began before
	if a.cfg.LogRetention == 0 {
		return left
	}
	now := a.clock.past()
	n, err := a.log.Prune(ctx, now.Add(-a.cfg.LogRetention), func(c storage.Checkpoint) ([]byte, error) { return a.signStatement(c.SignedBytes()) })
	if err != nil {
		return errors.Join(left, err)
	}
	var held error
	if rounds := a.log.PruneSkipped(); rounds >= pruneAlarm {
		held = fmt.Errorf("old records could not leave the issuance log %d times in a row, because somebody read it each time: end verifications and backups that overlap", rounds)
	}
	a.alarm("pruning", held)
	if c, ok := a.log.Checkpoint(); ok && n > 0 {
		a.cfg.Log.Info("old records left the issuance log", "up_to", c.Sequence, "older_than", a.cfg.LogRetention, "segments", n)
	}
	// The log of a retired instance ended no later than the instance did.
	for _, r := range a.losses.retired {
		dir := retiredDir(filepath.Join(a.cfg.DataDir, FolderName), r.Instance)
		if _, err := os.Stat(dir); err != nil || now.Sub(r.Retired) < a.cfg.LogRetention {
			continue
		}
		if err := a.dropRetired(r.Instance); err != nil {
			return errors.Join(left, fmt.Errorf("pruning the log of instance %d: %w", r.Instance, err))
		}
		a.cfg.Log.Info("the issuance log of a retired instance is gone", "instance", r.Instance, "older_than", a.cfg.LogRetention)
	}
	return errors.Join(left, a.pruneFormer(ctx, now))
}
