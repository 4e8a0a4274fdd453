package ca

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/maphash"
	"runtime"
	"sync"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/storage"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// ErrKeyInUse is why a key is not certified: a certificate for another identity
// that has not expired carries it. Who holds the key would have both identities.
var ErrKeyInUse = errors.New("the public key is certified for another identity already")

const (
	keyShards = 64
	// maxKeyUses bounds what is remembered, at about 32 bytes each.
	maxKeyUses = 2 << 20
)

// keyUses remembers which identity each certified key belongs to until the
// certificate expires. Keys and identities are 64-bit hashes under a seed of this
// process, so nobody can look for two that collide. It is filled from the log at
// start, and is safe for concurrent use.
//
// When there is no room the certificates that end first are forgotten: a key of
// theirs could be certified for another identity in the rest of their lives.
type keyUses struct {
	seed   maphash.Seed
	limit  int // of a shard
	forgot func(n int)
	shards [keyShards]keyShard
}

type keyShard struct {
	mu   sync.Mutex
	uses map[uint64]keyUse // guarded by mu
	most int               // what uses was made for or grew to; guarded by mu
}

type keyUse struct {
	identity uint64
	notAfter int64 // Unix seconds
}

func newKeyUses(limit int, forgot func(n int)) *keyUses {
	u := &keyUses{seed: maphash.MakeSeed(), limit: max(limit/keyShards, 1), forgot: forgot}
	for i := range u.shards {
		u.shards[i].uses = map[uint64]keyUse{}
	}
	return u
}

// claim notes that a key is about to be certified for an identity until notAfter,
// or refuses with ErrKeyInUse. keyHash is SHA-256 of the SubjectPublicKeyInfo.
func (u *keyUses) claim(keyHash []byte, identity string, notAfter, now time.Time) error {
	if u.claimHashed(maphash.Bytes(u.seed, keyHash), maphash.String(u.seed, identity), notAfter.Unix(), now.Unix()) {
		return nil
	}
	return fmt.Errorf("%w (key hash %x)", ErrKeyInUse, keyHash)
}

// claimHashed is claim with the hashes of key and identity; times are Unix seconds.
func (u *keyUses) claimHashed(key, id uint64, notAfter, now int64) bool {
	s := &u.shards[key%keyShards]
	s.mu.Lock()
	defer s.mu.Unlock()
	old, ok := s.uses[key]
	if ok && old.identity != id && old.notAfter > now {
		return false
	}
	use := keyUse{identity: id, notAfter: notAfter}
	if ok && old.identity == id {
		use.notAfter = max(use.notAfter, old.notAfter)
	}
	if !ok && len(s.uses) >= u.limit {
		u.makeRoom(s, now)
	}
	s.uses[key] = use
	s.most = max(s.most, len(s.uses))
	return true
}

// recall notes what was claimed before a restart, without asking.
func (u *keyUses) recall(key uint64, use keyUse, now int64) {
	s := &u.shards[key%keyShards]
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.uses) >= u.limit {
		u.makeRoom(s, now)
	}
	s.uses[key] = use
	s.most = max(s.most, len(s.uses))
}

// makeRoom drops what has expired, or else what ends in the first eighth of the
// lives that are left. The shard's mu is held.
func (u *keyUses) makeRoom(s *keyShard, now int64) {
	s.sweep(now)
	if len(s.uses) < u.limit {
		return
	}
	first, last := int64(0), int64(0)
	for _, use := range s.uses {
		if first == 0 || use.notAfter < first {
			first = use.notAfter
		}
		last = max(last, use.notAfter)
	}
	before := len(s.uses)
	s.sweep(first + (last-first)/8)
	u.forgot(before - len(s.uses))
}

// sweep drops what ends at or before a moment. mu is held.
func (s *keyShard) sweep(end int64) {
	for k, use := range s.uses {
		if use.notAfter <= end {
			delete(s.uses, k)
		}
	}
	// A map never shrinks.
	if s.most > 1024 && len(s.uses) < s.most/4 {
		smaller := make(map[uint64]keyUse, len(s.uses))
		for k, use := range s.uses {
			smaller[k] = use
		}
		s.uses, s.most = smaller, len(smaller)
	}
}

// expire drops what has expired, one shard after the other.
func (u *keyUses) expire(now time.Time) {
	for i := range u.shards {
		s := &u.shards[i]
		s.mu.Lock()
		s.sweep(now.Unix())
		s.mu.Unlock()
	}
}

// len is how many keys are remembered.
func (u *keyUses) len() (n int) {
	for i := range u.shards {
		s := &u.shards[i]
		s.mu.Lock()
		n += len(s.uses)
		s.mu.Unlock()
	}
	return n
}

// loadKeyUses fills keyUses after a restart: with the authorities of the journal,
// and with what the log has of the time in which a leaf that is still valid can
// have been issued.
func (a *Authority) loadKeyUses(ctx context.Context) error {
	now := a.clock.past()
	for _, e := range a.journal.Authorities {
		c, err := e.Cert()
		if err != nil {
			return err
		}
		if c == nil {
			continue
		}
		hash := sha256.Sum256(c.RawSubjectPublicKeyInfo)
		// What is certified is certified: a conflict is for the log's verification.
		_ = a.keyUses.claim(hash[:], "", c.NotAfter, now)
	}
	b, err := a.read(ctx)
	if err != nil {
		return err
	}
	since := now.Add(-a.cfg.SVID.MaxTTL)
	for _, l := range b.logs {
		if l.FileLog.Head().Time.After(since) {
			if err := a.claimRecorded(ctx, l.FileLog, since, now); err != nil {
				return err
			}
		}
	}
	return nil
}

// claimRecorded reads the log on this goroutine and claims the keys on others.
func (a *Authority) claimRecorded(ctx context.Context, log *storage.FileLog, since, now time.Time) error {
	g, ctx := errgroup.WithContext(ctx)
	chunks := make(chan []storage.Record, 4)
	for range max(2, runtime.GOMAXPROCS(0)) {
		g.Go(func() error {
			for chunk := range chunks {
				for _, r := range chunk {
					if err := a.claimRecord(r, now.Unix()); err != nil {
						return err
					}
				}
			}
			return nil
		})
	}
	g.Go(func() error {
		defer close(chunks)
		const size = 2048
		chunk := make([]storage.Record, 0, size)
		send := func() error {
			select {
			case chunks <- chunk:
				chunk = make([]storage.Record, 0, size)
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		for r, err := range log.Scan(ctx, log.Since(since)) {
			if err != nil {
				return err
			}
			if chunk = append(chunk, r); len(chunk) == size {
				if err := send(); err != nil {
					return err
				}
			}
		}
		return send()
	})
	return g.Wait()
}

// claimRecord claims the key of a record. One that cannot be claimed was certified
// twice: that is for verification to find.
func (a *Authority) claimRecord(r storage.Record, now int64) error {
	keyHash, id, notAfter, decision, err := keyOfRecord(r.Data)
	if err == nil && decision {
		m := &capb.IssuanceRecord{}
		if err = proto.Unmarshal(r.Data, m); err == nil && m.GetDecision().GetRevoked() != nil {
			a.recall(m.GetDecision().GetRevoked(), m.GetDecision(), time.Unix(now, 0))
		}
	}
	if err != nil {
		return fmt.Errorf("record %d of the issuance log: %w", r.Sequence, err)
	}
	if u := a.keyUses; notAfter > now && len(keyHash) > 0 {
		u.recall(maphash.Bytes(u.seed, keyHash), keyUse{maphash.Bytes(u.seed, id), notAfter}, now)
	}
	return nil
}

// keyOfRecord reads what is needed of an IssuanceRecord, in a tenth of the time
// that reading it whole takes: a start reads a million.
func keyOfRecord(b []byte) (keyHash, id []byte, notAfter int64, decision bool, err error) {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return nil, nil, 0, false, protowire.ParseError(n)
		}
		b = b[n:]
		decision = decision || number == fieldDecision
		switch {
		case number == fieldSpiffeID && kind == protowire.BytesType, number == fieldKeyHash && kind == protowire.BytesType:
			v, m := protowire.ConsumeBytes(b)
			if n = m; n >= 0 && number == fieldSpiffeID {
				id = v
			} else if n >= 0 {
				keyHash = v
			}
		case number == fieldNotAfter && kind == protowire.VarintType:
			v, m := protowire.ConsumeVarint(b)
			n, notAfter = m, int64(v)
		default:
			n = protowire.ConsumeFieldValue(number, kind, b)
		}
		if n < 0 {
			return nil, nil, 0, false, protowire.ParseError(n)
		}
		b = b[n:]
	}
	return keyHash, id, notAfter, decision, nil
}

// Field numbers of IssuanceRecord.
const (
	fieldSpiffeID = 3
	fieldNotAfter = 10
	fieldKeyHash  = 11
	fieldDecision = 20
)
