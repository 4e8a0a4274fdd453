package ca_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/storage"
)

// TestManyExpiredAgentsAreForgotten has more records of agents end at once than one commit
// takes, as after signet-ca was off for a day: the next tick forgets all of them.
func TestManyExpiredAgentsAreForgotten(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.attest(agentA)
	const n = 2*storage.MaxOps + 9
	var ops []storage.Op
	for i := range n {
		ops = append(ops, storage.Op{Key: fmt.Sprintf("agents/%034x", i+1),
			Value: fmt.Appendf(nil, `{"version":1,"node":"node-%d","podUID":"uid-%d","notAfter":%q,"tokenAt":%q}`, i, i,
				time.Now().Add(-72*time.Hour).UTC().Format(time.RFC3339), time.Now().Add(-96*time.Hour).UTC().Format(time.RFC3339))})
	}
	for part := range storage.Parts(ops) {
		if _, err := w.Store().Commit(t.Context(), nil, part); err != nil {
			t.Fatal(err)
		}
	}
	w.reopen()
	if got := w.Records(); got != n+1 {
		t.Fatalf("%d agents are on record, not %d", got, n+1)
	}
	if err := w.Tick(t.Context()); err != nil {
		t.Error(err)
	}
	if got := w.Records(); got != 1 {
		t.Errorf("%d agents are still known", got)
	}
	if entries, _, err := w.Store().List(t.Context(), "agents/"); err != nil || len(entries) != 1 {
		t.Errorf("%d agents are still on record: %v", len(entries), err)
	}
	if err := w.Ready(); err != nil {
		t.Error(err)
	}
}

// TestAReplicaStartsBesideALaterVersion, which has written an agent's record in a format of
// its own: one that runs goes on, so one that is started again does. An authority alone
// refuses what it cannot read, since nobody else would ever remove it.
func TestAReplicaStartsBesideALaterVersion(t *testing.T) {
	t.Parallel()
	record := storage.Op{Key: fmt.Sprintf("agents/%034x", 1), Value: []byte(`{"version":2,"nodes":["n"]}`)}
	shared := newShared(t)
	a := newWorld(t, func(c *ca.Config) { c.Shared, c.RootReplica, c.Instance = shared, 1, 1 })
	_, cert := a.attest(agentA)
	if _, err := shared.Store.Commit(t.Context(), nil, []storage.Op{record}); err != nil {
		t.Fatal(err)
	}
	a.reopen()
	if err := a.Ready(); err != nil {
		t.Errorf("it is not ready: %v", err)
	}
	if err := a.Alarms(); err == nil || !strings.Contains(err.Error(), "agents' records: 1 records of agents cannot be read") {
		t.Errorf("alarms: %v", err)
	}
	if rs, err := issue(t, a.dial(cert), item(t, byUID(server.PodUID))); err != nil || rs[0].GetX509() == nil {
		t.Errorf("an agent whose record can be read: %v, %v", rs, err)
	}
	if missing := a.Behind(trustOf(a).Sequence()); !slices.ContainsFunc(missing, func(n string) bool { return strings.Contains(n, record.Key) }) {
		t.Errorf("a root would wait for %q", missing)
	}
	record.Value, record.Delete = nil, true
	if _, err := shared.Store.Commit(t.Context(), nil, []storage.Op{record}); err != nil {
		t.Fatal(err)
	}
	if err := a.CatchUp(t.Context()); err != nil || a.Alarms() != nil {
		t.Errorf("when it is gone: %v, alarms: %v", err, a.Alarms())
	}

	w := newWorld(t)
	record.Value, record.Delete = []byte(`{"version":2,"nodes":["n"]}`), false
	if _, err := w.Store().Commit(t.Context(), nil, []storage.Op{record}); err != nil {
		t.Fatal(err)
	}
	w.close()
	if _, err := ca.Open(t.Context(), w.cfg); !errors.Is(err, storage.ErrNewerFormat) {
		t.Errorf("an authority alone: %v", err)
	}
}
