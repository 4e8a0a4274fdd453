package ca_test

import (
	"fmt"
	"testing"
	"time"

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
