package ca

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/storage"
)

const (
	agentPrefix  = "agents/"
	agentVersion = 1
)

// agent is what an agent SVID stands for: the pod and the node that were proved
// when it was issued. An SVID that is not on record is worth nothing here.
type agent struct {
	Version  int       `json:"version"`
	Node     string    `json:"node"`
	NodeUID  string    `json:"nodeUID,omitempty"`
	PodUID   string    `json:"podUID"`
	NotAfter time.Time `json:"notAfter"`
	// TokenAt is when a token was last verified; renewals hand it on.
	TokenAt time.Time `json:"tokenAt"`
	// Workloads is when the last workload's SVID can end that was issued to the agent,
	// as lives were configured when it was attested.
	Workloads time.Time `json:"workloads,omitzero"`
	// Acknowledged and Renewed are what the agent said of trust, as in rotation.Agent.
	// They are kept where replicas share their state, so that each knows what was said to
	// another.
	Acknowledged uint64 `json:"acknowledged,omitempty"`
	Renewed      uint64 `json:"renewed,omitempty"`

	serial   []byte
	revision uint64 // of the record in the store
	rest     storage.Rest
}

// until is when the last SVID of the agent's node can end that was issued on the
// strength of this one; ttl is the present life of a workload's SVID.
func (r *agent) until(ttl time.Duration) time.Time {
	if end := r.NotAfter.Add(ttl); end.After(r.Workloads) {
		return end
	}
	return r.Workloads
}

// agents is the set of agent SVIDs that are good, in memory and in the store.
type agents struct {
	store storage.Store

	mu       sync.RWMutex
	bySerial map[string]*agent          // guarded by mu; records are immutable
	streams  map[machine]*streamsOfNode // guarded by mu
	// unread are the records that this build cannot read, by key, and why. Nobody is
	// served on one, and rotation counts each as somebody who has acknowledged nothing.
	unread map[string]error // guarded by mu
	unsaid map[string]bool  // serials of which something is to be stored; guarded by mu; nil: nothing ever is
}

// streamsOfNode is what WatchTrust last heard from a node.
type streamsOfNode struct {
	open         int
	acknowledged uint64
	// bans is the revision of the bans that the agent enforces, bansUnread how many of
	// them it cannot read.
	bans       uint64
	bansUnread uint32
	renewed    uint64
}

// loadAgents reads the records of a store. Where replicas share it one of a later version
// may have written some that this one cannot read: that is no reason not to start, as it
// is none to end.
func loadAgents(ctx context.Context, s storage.Store, shared bool) (*agents, error) {
	entries, _, err := s.List(ctx, agentPrefix)
	if err != nil {
		return nil, fmt.Errorf("reading agents: %w", err)
	}
	as := &agents{store: s, bySerial: map[string]*agent{}, streams: map[machine]*streamsOfNode{}}
	for _, e := range entries {
		if as.read(e); !shared && as.unread[e.Key] != nil {
			return nil, as.unread[e.Key]
		}
	}
	return as, nil
}

func agentKey(serial []byte) string { return agentPrefix + hex.EncodeToString(serial) }

func agentSerial(key string) ([]byte, error) {
	return hex.DecodeString(strings.TrimPrefix(key, agentPrefix))
}

func parseAgent(e storage.Entry) (*agent, error) {
	var r agent
	rest, err := storage.ParseRecord(e.Value, &r)
	if err == nil && r.Version > agentVersion {
		err = fmt.Errorf("%w: it has version %d, this build reads up to %d; run the newer signet-ca", storage.ErrNewerFormat, r.Version, agentVersion)
	}
	if err == nil {
		r.serial, err = agentSerial(e.Key)
	}
	if err != nil {
		return nil, fmt.Errorf("reading agent %s: %w", e.Key, err)
	}
	r.revision, r.rest = e.Revision, rest
	return &r, nil
}

// enrol makes an agent SVID good, durably, and returns the state of trust that the agent
// begins with. It is the newest one when the record becomes durable: a root that is used
// after that waits for the agent, and one that is used already is in it.
func (a *Authority) enrol(ctx context.Context, r agent) (*identity.Trust, error) {
	r.Workloads = r.NotAfter.Add(a.cfg.SVID.TTL)
	a.agents.carryOn(&r)
	for try := 0; ; try++ {
		was := a.journalUnchanged()
		trust, err := a.enrolNow(ctx, r)
		if !errors.Is(err, storage.ErrConflict) || !a.cfg.shared() || try == 8 {
			return trust, err
		}
		if a.journalUnchanged() != was {
			continue // somebody has read it meanwhile: many enrol after a change
		}
		// Another replica changed the journal, and this one has not heard of it yet.
		if err := a.followJournal(ctx); err != nil {
			return nil, fmt.Errorf("%w: recording agent on %s: %w", ErrUnavailable, r.Node, err)
		}
	}
}

func (a *Authority) enrolNow(ctx context.Context, r agent) (*identity.Trust, error) {
	a.trustMu.RLock()
	defer a.trustMu.RUnlock()
	for {
		same := a.journalUnchanged()
		err := a.agents.add(ctx, r, same)
		if errors.Is(err, storage.ErrConflict) && a.journalUnchanged() != same {
			continue // another change of the journal, which trust does not hang on
		}
		return a.trust.Value(), err
	}
}

// add makes an agent SVID good, durably, if a condition holds.
func (as *agents) add(ctx context.Context, r agent, cond storage.Cond) error {
	r.Version = agentVersion
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("recording agent on %s: %w", r.Node, err)
	}
	key := agentKey(r.serial)
	if r.revision, err = as.store.Commit(ctx, []storage.Cond{{Key: key}, cond}, []storage.Op{{Key: key, Value: b}}); err != nil {
		return fmt.Errorf("%w: recording agent on %s: %w", ErrUnavailable, r.Node, err)
	}
	as.mu.Lock()
	defer as.mu.Unlock()
	as.put(&r)
	return nil
}

func (as *agents) lookup(serial []byte) (*agent, bool) {
	as.mu.RLock()
	defer as.mu.RUnlock()
	r, ok := as.bySerial[string(serial)]
	return r, ok
}

// alive checks that what the agent's SVID was issued on still holds: its pod is
// there, on the same node, under an account that agents may have. The node's UID is
// compared where both sides know it.
func (a *Authority) alive(r *agent) error {
	if !a.clock.latest().Before(r.NotAfter) {
		return fmt.Errorf("agent SVID %x expired at %s", r.serial, r.NotAfter.Format(time.RFC3339))
	}
	w, ok := a.cfg.Pods.Lookup(r.PodUID)
	switch {
	case !ok:
		return fmt.Errorf("agent pod %s of SVID %x is gone", r.PodUID, r.serial)
	case w.Node != r.Node:
		return fmt.Errorf("agent pod %s of SVID %x is on node %s, not %s", r.PodUID, r.serial, w.Node, r.Node)
	case w.NodeUID != "" && r.NodeUID != "" && w.NodeUID != r.NodeUID:
		return fmt.Errorf("node %s of agent SVID %x was replaced", r.Node, r.serial)
	case !a.cfg.Agents.Allows(w):
		return fmt.Errorf("service account %s/%s of agent SVID %x is not on the list of agents' accounts (any more)", w.Namespace, w.ServiceAccount, r.serial)
	}
	return nil
}

// forget removes agents of whose nodes the last SVID ended before now; ttl is the present
// life of a workload's SVID.
func (as *agents) forget(ctx context.Context, ttl time.Duration, now time.Time) error {
	as.mu.RLock()
	var ops []storage.Op
	for _, r := range as.bySerial {
		if r.until(ttl).Before(now) {
			ops = append(ops, storage.Op{Key: agentKey(r.serial), Delete: true})
		}
	}
	as.mu.RUnlock()
	for part := range storage.Parts(ops) {
		if _, err := as.store.Commit(ctx, nil, part); err != nil {
			return fmt.Errorf("forgetting expired agents: %w", err)
		}
		if err := as.forgotten(part); err != nil {
			return err
		}
	}
	as.mu.Lock()
	defer as.mu.Unlock()
	known := make(map[machine]bool, len(as.bySerial))
	for _, r := range as.bySerial {
		known[r.machine()] = true
	}
	maps.DeleteFunc(as.streams, func(m machine, s *streamsOfNode) bool { return s.open == 0 && !known[m] })
	return nil
}

// forgotten drops the agents whose records were deleted.
func (as *agents) forgotten(ops []storage.Op) error {
	as.mu.Lock()
	defer as.mu.Unlock()
	for _, op := range ops {
		serial, err := agentSerial(op.Key)
		if err != nil {
			return fmt.Errorf("forgetting agent %s: %w", op.Key, err)
		}
		delete(as.bySerial, string(serial))
	}
	return nil
}

func (a *Authority) forgetAgents(ctx context.Context) error {
	// A while later than rotation counts them, so that clocks may differ.
	return a.agents.forget(ctx, a.cfg.SVID.TTL+a.cfg.SVID.Backdate, a.clock.past())
}

// watching notes that a WatchTrust stream of a machine opened (+1) or closed (-1).
func (as *agents) watching(m machine, delta int) {
	as.mu.Lock()
	defer as.mu.Unlock()
	s := as.streams[m]
	if s == nil {
		s = &streamsOfNode{}
		as.streams[m] = s
	}
	s.open += delta
}

// acknowledge notes what the agent r said of trust. It reports whether there is something
// to store.
func (as *agents) acknowledge(r *agent, sequence, renewed uint64) bool {
	as.mu.Lock()
	defer as.mu.Unlock()
	s := as.streams[r.machine()]
	if s == nil {
		return false
	}
	s.acknowledged, s.renewed = max(s.acknowledged, sequence), max(s.renewed, renewed)
	is := as.bySerial[string(r.serial)]
	if as.unsaid == nil || is == nil || is.Acknowledged >= s.acknowledged && is.Renewed >= s.renewed {
		return false
	}
	as.unsaid[string(r.serial)] = true
	return true
}
