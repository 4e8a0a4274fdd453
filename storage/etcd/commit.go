package etcd

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/signet-mesh/signet/storage"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// slotTTL is how long the slots of a process that died stay.
const slotTTL = 30 * time.Second

// slot is a key that one commit at a time writes along with its changes, on the
// condition that nobody has written it since the commit before. So whether a commit has
// happened can be asked, and one of which nobody knows can be kept from happening later:
// by writing its slot. Slots live with a lease, so that none is left behind.
type slot struct {
	key      string
	session  *session
	revision int64 // of the key, 0 before it exists
}

// takeSlot waits until fewer than maxCommits are under way.
func (s *Store) takeSlot(ctx context.Context) (*slot, error) {
	if err := s.ended(ctx); err != nil {
		return nil, err
	}
	select {
	case s.commits <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-s.life.Done():
		return nil, storage.ErrClosed
	}
	sl, err := s.newSlot(ctx)
	if err != nil {
		<-s.commits
		return nil, err
	}
	return sl, nil
}

func (s *Store) newSlot(ctx context.Context) (*slot, error) {
	s.mu.Lock()
	if se := s.session; se != nil && !se.over() {
		sl := &slot{key: s.slotKey(rand.Text()), session: se}
		if n := len(s.idle); n > 0 {
			sl, s.idle = s.idle[n-1], s.idle[:n-1]
		}
		s.mu.Unlock()
		return sl, nil
	}
	s.mu.Unlock()
	se, err := s.newSession(ctx, slotTTL)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if other := s.session; other != nil && !other.over() {
		// Somebody else was faster; one lease is enough. It expires in any case.
		go func(extra *session) { _ = extra.end(context.Background()) }(se)
		se = other
	} else {
		s.session, s.idle = se, nil
	}
	return &slot{key: s.slotKey(rand.Text()), session: se}, nil
}

// putSlot takes a slot back. open says that nobody knows what became of its commit.
func (s *Store) putSlot(sl *slot, open bool) {
	s.mu.Lock()
	switch {
	case open:
		s.open = append(s.open, sl)
		s.unsettled.Store(int64(len(s.open)))
	case sl.session == s.session && !sl.session.over():
		s.idle = append(s.idle, sl)
	}
	s.mu.Unlock()
	<-s.commits
}

// Commit applies ops if all conds hold. See storage.Store. Where etcd's answer was lost
// it asks again; an error that wraps storage.ErrUnknown means that it got none. Then
// the next call of any method settles the matter before it does what it is for: from
// then on the change is there, or it will never be.
func (s *Store) Commit(ctx context.Context, conds []storage.Cond, ops []storage.Op) (revision uint64, err error) {
	if err = storage.CheckCommit(conds, ops); err == nil {
		if err = s.settle(ctx); err == nil {
			start := time.Now()
			revision, err = s.commit(ctx, conds, ops)
			switch {
			case errors.Is(err, storage.ErrConflict):
				s.metrics.conflicts.Inc()
			case errors.Is(err, storage.ErrUnknown):
				s.metrics.unknown.Inc()
			case err == nil:
				s.metrics.commit.Observe(time.Since(start).Seconds())
			}
		}
	}
	if err != nil {
		return 0, fmt.Errorf("committing to etcd: %w", err)
	}
	return revision, nil
}

func (s *Store) commit(ctx context.Context, conds []storage.Cond, ops []storage.Op) (uint64, error) {
	sl, err := s.takeSlot(ctx)
	if err != nil {
		return 0, err
	}
	c := s.newChange(sl, conds, ops)
	err = s.try(ctx, c.attempt)
	unknown := err != nil && c.sent
	s.putSlot(c.slot, unknown)
	if unknown {
		return 0, fmt.Errorf("%w: %w", storage.ErrUnknown, err)
	}
	return c.revision, err
}

// change is a commit on its way.
type change struct {
	s     *Store
	slot  *slot
	token string // what the slot holds when the commit has happened
	ifs   []clientv3.Cmp
	ops   []storage.Op
	// deletes says that the commit does nothing but delete, so that whether it changes
	// anything depends on what is there.
	deletes bool

	// sent says that a request may have arrived, or may yet, whose answer is not known.
	sent     bool
	revision uint64
}

func (s *Store) newChange(sl *slot, conds []storage.Cond, ops []storage.Op) *change {
	c := &change{s: s, slot: sl, token: rand.Text(), ops: ops,
		deletes: !slices.ContainsFunc(ops, func(o storage.Op) bool { return !o.Delete })}
	for _, cond := range conds {
		// A key that is not there has revision 0 for etcd, too.
		c.ifs = append(c.ifs, clientv3.Compare(clientv3.ModRevision(s.entryKey(cond.Key)), "=", int64(cond.Revision)))
	}
	return c
}

// attempt makes the request once. An error that is not final leaves it to be made again.
func (c *change) attempt(ctx context.Context) error {
	ops, at := c.ops, int64(0)
	if c.deletes && len(ops) > 0 {
		var err error
		if ops, at, err = c.existing(ctx); err != nil {
			return err
		}
	}
	s, sl := c.s, c.slot
	ifs := append(slices.Clone(c.ifs), clientv3.Compare(clientv3.ModRevision(sl.key), "=", sl.revision))
	if at > 0 {
		// Whatever changes an entry writes this key, too.
		ifs = append(ifs, clientv3.Compare(clientv3.ModRevision(s.revisionKey()), "=", at))
	}
	then := []clientv3.Op{clientv3.OpGet(s.revisionKey())}
	if len(ops) > 0 {
		then = []clientv3.Op{clientv3.OpPut(s.revisionKey(), ""), clientv3.OpPut(sl.key, c.token, clientv3.WithLease(sl.session.Lease()))}
		for _, op := range ops {
			if op.Delete {
				then = append(then, clientv3.OpDelete(s.entryKey(op.Key)))
			} else {
				then = append(then, clientv3.OpPut(s.entryKey(op.Key), encodeEntry(op.Key, op.Value)))
			}
		}
	}
	resp, err := s.client.Txn(ctx).If(ifs...).Then(then...).Else(c.explain(), clientv3.OpGet(s.revisionKey())).Commit()
	if err != nil {
		return c.failed(err, len(ops) > 0)
	}
	if !resp.Succeeded {
		return c.declined(resp, at)
	}
	c.sent = false
	if len(ops) > 0 {
		sl.revision, c.revision = resp.Header.Revision, uint64(resp.Header.Revision)
		return nil
	}
	c.revision, err = s.parseRevision(resp.Responses[0].GetResponseRange().Kvs)
	return err
}

// explain is what is done where a condition did not hold: it says whether the slot is as
// it was. If it is, and an earlier request may still be on its way, the slot is written,
// so that the request changes nothing when it arrives.
func (c *change) explain() clientv3.Op {
	same := []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(c.slot.key), "=", c.slot.revision)}
	var fence []clientv3.Op
	if c.sent {
		fence = append(fence, c.slot.fence())
	}
	return clientv3.OpTxn(same, fence, []clientv3.Op{clientv3.OpGet(c.slot.key)})
}

func (sl *slot) fence() clientv3.Op {
	return clientv3.OpPut(sl.key, "", clientv3.WithLease(sl.session.Lease()))
}

// existing are the deletions of keys that are there, and the store's revision then.
func (c *change) existing(ctx context.Context) (ops []storage.Op, revision int64, err error) {
	gets := []clientv3.Op{clientv3.OpGet(c.s.revisionKey())}
	for _, op := range c.ops {
		gets = append(gets, clientv3.OpGet(c.s.entryKey(op.Key), clientv3.WithCountOnly()))
	}
	resp, err := c.s.client.Txn(ctx).Then(gets...).Commit()
	if err != nil {
		return nil, 0, err
	}
	r, err := c.s.parseRevision(resp.Responses[0].GetResponseRange().Kvs)
	if err != nil {
		return nil, 0, err
	}
	for i, op := range c.ops {
		if resp.Responses[i+1].GetResponseRange().Count > 0 {
			ops = append(ops, op)
		}
	}
	return ops, int64(r), nil
}

// failed takes a request without an answer, or one that was refused.
func (c *change) failed(err error, writes bool) error {
	if errors.Is(err, rpctypes.ErrLeaseNotFound) {
		// The lease of the slot is gone, and with it whatever was on its way.
		if c.sent {
			return final(errors.New("the lease ended before etcd said whether it happened; it will not happen any more"))
		}
		return c.renew()
	}
	if !refused(err) {
		c.sent = c.sent || writes
	}
	return err
}

// renew takes a slot of another lease, for the next attempt.
func (c *change) renew() error {
	ctx, cancel := context.WithTimeout(c.s.life, c.s.timeout)
	defer cancel()
	c.s.mu.Lock()
	if c.s.session == c.slot.session {
		c.s.session, c.s.idle = nil, nil
	}
	c.s.mu.Unlock()
	sl, err := c.s.newSlot(ctx)
	if err != nil {
		return err
	}
	c.slot = sl
	return errors.New("the lease of this process had ended")
}

// declined takes the answer that a condition did not hold.
func (c *change) declined(resp *clientv3.TxnResponse, at int64) error {
	explained := resp.Responses[0].GetResponseTxn()
	if explained.Succeeded {
		if c.sent {
			c.sent, c.slot.revision = false, resp.Header.Revision
		}
		now, err := c.s.parseRevision(resp.Responses[1].GetResponseRange().Kvs)
		if err != nil {
			return err
		}
		if at > 0 && int64(now) != at {
			return errors.New("changed by others in between") // once more
		}
		return final(storage.ErrConflict)
	}
	return c.slotChanged(explained)
}

// slotChanged decides what a slot means that is not as this commit found it.
func (c *change) slotChanged(explained *etcdserverpb.TxnResponse) error {
	kvs := explained.Responses[0].GetResponseRange().Kvs
	switch {
	case len(kvs) == 0 && c.sent:
		return final(errors.New("the lease ended before etcd said whether it happened; it will not happen any more"))
	case len(kvs) == 0:
		return c.renew()
	case string(kvs[0].Value) != c.token:
		return final(fmt.Errorf("%s was written by somebody else: %w", c.slot.key, storage.ErrCorrupt))
	}
	// An earlier request has arrived, and only its answer was lost.
	c.sent, c.slot.revision, c.revision = false, kvs[0].ModRevision, uint64(kvs[0].ModRevision)
	return nil
}

// settle makes certain that no commit of before happens later. It writes the slots that
// are open: a commit that has not happened finds its slot changed.
func (s *Store) settle(ctx context.Context) error {
	if s.unsettled.Load() == 0 {
		return nil
	}
	s.mu.Lock()
	open := slices.Clone(s.open)
	s.mu.Unlock()
	for _, sl := range open {
		if err := s.settleSlot(ctx, sl); err != nil {
			return fmt.Errorf("settling a commit of unknown outcome: %w", err)
		}
	}
	return nil
}

func (s *Store) settleSlot(ctx context.Context, sl *slot) error {
	err := s.try(ctx, func(ctx context.Context) error {
		_, err := s.client.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(sl.key), "=", sl.revision)).Then(sl.fence()).Commit()
		return err
	})
	if err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.open, sl); i >= 0 {
		s.open = slices.Delete(s.open, i, i+1)
		s.unsettled.Store(int64(len(s.open)))
		s.log.Info("a commit of unknown outcome is settled: it has happened, or it never will")
	}
	return nil
}
