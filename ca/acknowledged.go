package ca

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/signet-mesh/signet/storage"
)

// What an agent acknowledged belongs to its record where replicas share their state: an
// agent talks to one of them, and all must know for whom a root waits. It is a fact about
// a sequence, which names one state of trust for ever, so that whoever stores it late or
// twice does no harm. It is stored when it changes: once for each change of trust and
// agent, many agents in one commit.

const (
	// sayAfter is how long what agents say is collected before it is stored.
	sayAfter = 200 * time.Millisecond
	// sayAtOnce is how many records one commit changes; each is a condition, too.
	sayAtOnce = 100
	// sayTries is how often a commit is tried anew whose records others have changed.
	sayTries = 4
)

// said is what agents of a machine said, at most.
type said struct{ acknowledged, renewed uint64 }

// machine tells nodes apart that have or had the same name.
type machine struct{ node, uid string }

func (r *agent) machine() machine { return machine{r.Node, r.NodeUID} }

// stored is what the records say. mu is held.
func (as *agents) stored() map[machine]said {
	out := map[machine]said{}
	for _, r := range as.bySerial {
		if r.Acknowledged > 0 || r.Renewed > 0 {
			s := out[r.machine()]
			out[r.machine()] = said{max(s.acknowledged, r.Acknowledged), max(s.renewed, r.Renewed)}
		}
	}
	return out
}

// put takes a record up, unless a newer one is known. mu is held.
func (as *agents) put(r *agent) {
	if old := as.bySerial[string(r.serial)]; old == nil || old.revision <= r.revision {
		as.bySerial[string(r.serial)] = r
	}
}

// read takes up a record that is stored. mu is held, or nobody else has it yet.
func (as *agents) read(e storage.Entry) {
	r, err := parseAgent(e)
	if err != nil {
		if as.unread == nil {
			as.unread = map[string]error{}
		}
		as.unread[e.Key] = err
		if serial, err := agentSerial(e.Key); err == nil {
			delete(as.bySerial, string(serial)) // what was known is not so any more
		}
		return
	}
	delete(as.unread, e.Key)
	as.put(r)
}

// readAll replaces the records by those that were stored at a revision.
func (as *agents) readAll(entries []storage.Entry, revision uint64) {
	as.mu.Lock()
	defer as.mu.Unlock()
	before := as.bySerial
	as.bySerial, as.unread = make(map[string]*agent, len(before)), nil
	for _, e := range entries {
		as.read(e)
	}
	for _, r := range before {
		if r.revision > revision { // it was stored meanwhile
			as.put(r)
		}
	}
}

// unreadable is why some records are not read; nil if all are.
func (as *agents) unreadable() error {
	as.mu.RLock()
	defer as.mu.RUnlock()
	if len(as.unread) == 0 {
		return nil
	}
	key := slices.Min(slices.Collect(maps.Keys(as.unread)))
	return fmt.Errorf("%d records of agents cannot be read; no new root is used without force while they are there: %w", len(as.unread), as.unread[key])
}

// rereadAgents takes up what is stored of agents now, whatever the watch has told.
func (a *Authority) rereadAgents(ctx context.Context) error {
	if a.agents == nil {
		return nil // nobody serves agents yet
	}
	entries, revision, err := a.store.List(ctx, agentPrefix)
	if err != nil {
		return fmt.Errorf("reading agents: %w", err)
	}
	a.takeAgents(entries, revision)
	return nil
}

// takeAgents replaces the records of agents by those that were stored at a revision.
func (a *Authority) takeAgents(entries []storage.Entry, revision uint64) {
	a.agents.readAll(entries, revision)
	a.alarm("agents' records", a.agents.unreadable())
}

// carryOn has a new record say what older ones of the machine do. Whoever attests gets
// the newest trust, so that it holds of the new SVID, too.
func (as *agents) carryOn(r *agent) {
	as.mu.RLock()
	defer as.mu.RUnlock()
	if as.unsaid == nil {
		return
	}
	for _, o := range as.bySerial {
		if o.machine() == r.machine() {
			r.Acknowledged, r.Renewed = max(r.Acknowledged, o.Acknowledged), max(r.Renewed, o.Renewed)
		}
	}
}

// sayAcknowledged stores what agents said since it was last called.
func (a *Authority) sayAcknowledged(ctx context.Context) error {
	as := a.agents
	as.mu.Lock()
	var serials []string
	for s := range as.unsaid {
		serials = append(serials, s)
	}
	if as.unsaid != nil {
		as.unsaid = map[string]bool{}
	}
	as.mu.Unlock()
	for part := range slices.Chunk(serials, sayAtOnce) {
		if err := as.say(ctx, part); err != nil {
			as.mu.Lock()
			for _, s := range serials { // those that are stored change nothing the next time
				as.unsaid[s] = true
			}
			as.mu.Unlock()
			return fmt.Errorf("recording what agents acknowledged: %w", err)
		}
	}
	return nil
}

// say stores what some agents said.
func (as *agents) say(ctx context.Context, serials []string) error {
	for try := 1; ; try++ {
		var conds []storage.Cond
		var ops []storage.Op
		next := as.news(serials)
		for _, r := range next {
			b, err := storage.EncodeRecord(r, r.rest)
			if err != nil {
				return err
			}
			key := agentKey(r.serial)
			conds, ops = append(conds, storage.Cond{Key: key, Revision: r.revision}), append(ops, storage.Op{Key: key, Value: b})
		}
		if len(ops) == 0 {
			return nil
		}
		revision, err := as.store.Commit(ctx, conds, ops)
		if err == nil {
			as.mu.Lock()
			for _, r := range next {
				r.revision = revision
				if as.bySerial[string(r.serial)] != nil { // else it was removed meanwhile
					as.put(r)
				}
			}
			as.mu.Unlock()
			return nil
		}
		// Of an outcome that nobody knows the next try finds out: it meets what is there.
		if !errors.Is(err, storage.ErrConflict) && !errors.Is(err, storage.ErrUnknown) || try == sayTries {
			return err
		}
		if err := as.reread(ctx, next); err != nil {
			return err
		}
	}
}

// news are the records, as they should be, of agents that said something that theirs do
// not.
func (as *agents) news(serials []string) (next []*agent) {
	as.mu.RLock()
	defer as.mu.RUnlock()
	for _, serial := range serials {
		r := as.bySerial[serial]
		if r == nil || as.streams[r.machine()] == nil {
			continue
		}
		s, n := as.streams[r.machine()], *r
		n.Acknowledged, n.Renewed = max(n.Acknowledged, s.acknowledged), max(n.Renewed, s.renewed)
		if n.Acknowledged != r.Acknowledged || n.Renewed != r.Renewed {
			next = append(next, &n)
		}
	}
	return next
}

// reread takes up what the store says of some agents.
func (as *agents) reread(ctx context.Context, rs []*agent) error {
	for _, r := range rs {
		e, err := as.store.Get(ctx, agentKey(r.serial))
		if errors.Is(err, storage.ErrNotFound) {
			as.mu.Lock()
			delete(as.bySerial, string(r.serial))
			as.mu.Unlock()
			continue
		}
		if err != nil {
			return err
		}
		as.mu.Lock()
		as.read(e)
		as.mu.Unlock()
	}
	return nil
}

// newestFor is the sequence of the newest trust. Where an agent has heard of a later one,
// another replica may have told it before this one has learnt of it.
func (a *Authority) newestFor(heard uint64) uint64 {
	newest := a.trust.Value().Sequence()
	if heard <= newest || !a.cfg.shared() || !a.lookUps.Allow() {
		return newest
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := a.followJournal(ctx); err != nil {
		a.cfg.Log.Warn("an agent has heard of a trust that is not known here", "sequence", heard, "err", err)
	}
	return a.trust.Value().Sequence()
}
