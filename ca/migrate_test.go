package ca_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/replica"
	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/storagetest"
)

// failing is a state that fails after some commits, before or after they land.
type failing struct {
	storage.Store
	left   int
	landed bool
}

func (f *failing) Commit(ctx context.Context, conds []storage.Cond, ops []storage.Op) (uint64, error) {
	f.left--
	if f.left < 0 {
		if f.landed {
			_, _ = f.Store.Commit(ctx, conds, ops) // what it says is lost
		}
		return 0, storagetest.ErrInjected
	}
	return f.Store.Commit(ctx, conds, ops)
}

func TestMigration(t *testing.T) {
	t.Parallel()
	_, upstream := upstreamFolder(t)
	w := newWorld(t, func(c *ca.Config) { c.Upstream, c.LogOptions.SegmentSize = upstream, 4<<10 })
	agent, cert := w.attest(agentA)
	for range 40 {
		w.leaf(agent)
	}
	if err := w.SignHead(t.Context()); err != nil {
		t.Fatal(err)
	}
	head, id, intermediate, trusted := w.Log().Head(), w.ID(), w.Intermediate(), trustOf(w)
	dir := filepath.Join(w.cfg.DataDir, "authority")
	shared := newShared(t)
	m := replica.Migration{Dir: dir, Store: shared.Store, Files: shared.Files, Place: "there", Wait: 50 * time.Millisecond}
	if _, err := m.ToShared(t.Context()); !errors.Is(err, storage.ErrLocked) {
		t.Fatalf("while the authority runs: %v", err)
	}
	w.close()

	// It is interrupted by every commit, and goes on each time. Until the folder is marked
	// the authority can go on as it was.
	attempts, reused := 0, 0
	for n := 0; ; n++ {
		stopped := m
		stopped.Store = &failing{Store: shared.Store, left: n / 2, landed: n%2 == 1}
		moved, err := stopped.ToShared(t.Context())
		reused = max(reused, moved.Reused)
		if err == nil {
			break
		}
		if attempts++; !errors.Is(err, storagetest.ErrInjected) {
			t.Fatalf("attempt %d: %v", n, err)
		}
		if n == 2 {
			w.open()
			agent, _ = w.attest(agentA)
			w.leaf(agent)
			w.close()
			head = mustHead(t, dir)
		}
		if n > 100 {
			t.Fatal("it never ends")
		}
	}
	moved, err := m.ToShared(t.Context())
	if err != nil || moved.Instance != 1 {
		t.Fatalf("once more: %+v, %v", moved, err)
	}
	t.Logf("%d attempts were interrupted; files reused by one: %d", attempts, reused)
	if attempts < 4 || reused == 0 {
		t.Errorf("%d attempts, %d files reused", attempts, reused)
	}

	// It was killed between the two names that it changes last.
	for _, name := range []string{"state.db", "log"} {
		if err := os.Rename(filepath.Join(dir, name+".moved"), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		if moved, err := m.ToShared(t.Context()); err != nil || moved.Instance != 1 {
			t.Fatalf("when only %s has its former name: %+v, %v", name, moved, err)
		}
		if _, err := os.Lstat(filepath.Join(dir, name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s was not put aside: %v", name, err)
		}
	}

	// What is left cannot be served.
	if _, err := ca.Open(t.Context(), w.cfg); err == nil {
		t.Fatal("the folder that was left makes an authority")
	}
	for _, name := range []string{"state.db", "log"} {
		if err := os.Rename(filepath.Join(dir, name+".moved"), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := ca.Open(t.Context(), w.cfg); !errors.Is(err, replica.ErrMoved) {
		t.Fatalf("the files under their old names: %v", err)
	}
	if _, err := m.ToShared(t.Context()); err != nil { // puts them aside again
		t.Fatal(err)
	}

	w.cfg.Shared = shared
	w.open()
	if w.ID() != id || !w.Intermediate().Equal(intermediate) {
		t.Errorf("it is %v now, with another intermediate: %v", w.ID(), !w.Intermediate().Equal(intermediate))
	}
	if same, known, err := w.Log().Holds(t.Context(), head); err != nil || !same || !known {
		t.Errorf("the log does not hold what it held: %v, %v, %v", same, known, err)
	}
	if now := trustOf(w); now.Sequence() < trusted.Sequence() || string(now.PEM()) != string(trusted.PEM()) {
		t.Error("it trusts something else")
	}
	if rs, err := issue(t, w.dial(cert), item(t, byUID(server.PodUID))); err != nil || rs[0].GetX509() == nil {
		t.Errorf("an agent of before is not known: %v", err)
	}
	if _, err := m.ToFolder(t.Context()); !errors.Is(err, storage.ErrLocked) {
		t.Errorf("back, while it runs: %v", err)
	}
	other := newWorld(t, func(c *ca.Config) { c.Upstream, c.Shared = upstream, shared })
	w.close()
	if _, err := m.ToFolder(t.Context()); err == nil || !strings.Contains(err.Error(), "has issued, too") {
		t.Errorf("back, with another replica: %v", err)
	}
	other.close()
}

// TestAMigrationEndsAfterOthersHaveJoined: it was interrupted when the shared state was an
// authority's already, and another replica began there before it was run again.
func TestAMigrationEndsAfterOthersHaveJoined(t *testing.T) {
	t.Parallel()
	_, upstream := upstreamFolder(t)
	w := newWorld(t, func(c *ca.Config) { c.Upstream = upstream })
	_, cert := w.attest(agentA)
	id := w.ID()
	w.close()
	dir := filepath.Join(w.cfg.DataDir, "authority")
	shared := newShared(t)
	m := replica.Migration{Dir: dir, Store: shared.Store, Files: shared.Files, Place: "there", Wait: 50 * time.Millisecond}
	for n := 0; ; n++ {
		stopped := m
		stopped.Store = &failing{Store: shared.Store, landed: true} // one more commit each time
		if _, err := stopped.ToShared(t.Context()); !errors.Is(err, storagetest.ErrInjected) {
			t.Fatalf("attempt %d: %v", n, err)
		}
		if _, err := shared.Store.Get(t.Context(), "journal"); err == nil {
			break
		} else if !errors.Is(err, storage.ErrNotFound) || n > 100 {
			t.Fatal(err)
		}
	}
	other := newWorld(t, func(c *ca.Config) { c.Upstream, c.Shared = upstream, shared })
	agent, _ := other.attest(agentB)
	if rs, err := issue(t, agent, item(t, byUID(onNodeB.PodUID))); err != nil || rs[0].GetX509() == nil {
		t.Fatal(rs, err)
	}
	if moved, err := m.ToShared(t.Context()); err != nil || moved.Instance != 1 {
		t.Fatalf("once more: %+v, %v", moved, err)
	}
	w.cfg.Shared = shared
	w.open()
	if w.ID() != id {
		t.Errorf("it is %v now", w.ID())
	}
	if rs, err := issue(t, w.dial(cert), item(t, byUID(server.PodUID))); err != nil || rs[0].GetX509() == nil {
		t.Errorf("an agent of before is not known: %v", err)
	}
	intact(t, w)
	intact(t, other)
}

// mustHead is the head of the log of an authority that is down.
func mustHead(t *testing.T, dir string) storage.Head {
	t.Helper()
	l, err := storage.OpenLog(filepath.Join(dir, "log"), storage.LogOptions{Instance: 1, ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Head()
}

func TestMigrationBack(t *testing.T) {
	t.Parallel()
	_, upstream := upstreamFolder(t)
	shared := newShared(t)
	w := newWorld(t, func(c *ca.Config) { c.Upstream, c.Shared, c.LogOptions.SegmentSize = upstream, shared, 4<<10 })
	agent, cert := w.attest(agentA)
	for range 40 {
		w.leaf(agent)
	}
	id, intermediate := w.ID(), w.Intermediate()
	w.close()
	dir := filepath.Join(w.cfg.DataDir, "authority")
	m := replica.Migration{Dir: dir, Store: shared.Store, Files: shared.Files, Place: "there", Wait: 50 * time.Millisecond}
	for n := range 2 {
		stopped := m
		stopped.Store = &failing{Store: shared.Store, left: 0, landed: n == 1}
		if _, err := stopped.ToFolder(t.Context()); !errors.Is(err, storagetest.ErrInjected) {
			t.Fatal(err)
		}
	}
	// Something is in the way: nothing is lost, and then it goes on.
	if err := os.MkdirAll(filepath.Join(dir, "replica.moved", "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := m.ToFolder(t.Context()); err == nil {
		t.Fatal("it ended although the last step cannot be")
	}
	if _, err := ca.Open(t.Context(), w.cfg); !errors.Is(err, replica.ErrMoved) && (err == nil || !strings.Contains(err.Error(), "state of its own")) {
		t.Fatalf("the state that was left: %v", err)
	}
	if err := os.RemoveAll(filepath.Join(dir, "replica.moved")); err != nil {
		t.Fatal(err)
	}
	moved, err := m.ToFolder(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", moved)
	// Whoever was interrupted at the very end runs it again.
	if again, err := m.ToFolder(t.Context()); err != nil || again.Instance != moved.Instance {
		t.Errorf("once more: %+v, %v", again, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "state.db")); errors.Is(err, fs.ErrNotExist) {
		t.Fatal("there is no state")
	}
	w.cfg.Shared = ca.Shared{}
	w.open()
	if w.ID() != id || !w.Intermediate().Equal(intermediate) {
		t.Error("it is another one")
	}
	if rs, err := issue(t, w.dial(cert), item(t, byUID(server.PodUID))); err != nil || rs[0].GetX509() == nil {
		t.Errorf("an agent of before is not known: %v", err)
	}
	// It can go and come back again; what earlier moves left in the folder stays.
	head := w.Log().Head()
	w.close()
	if _, err := m.ToShared(t.Context()); !errors.Is(err, replica.ErrMoved) || !strings.Contains(err.Error(), "not written over") {
		t.Errorf("to where it was: %v", err)
	}
	for n := range 3 {
		next := newShared(t)
		m.Store, m.Files = next.Store, next.Files
		if _, err := m.ToShared(t.Context()); err != nil {
			t.Fatalf("move %d: %v", n, err)
		}
		if moved, err := m.ToFolder(t.Context()); err != nil || moved.Records != head.Sequence {
			t.Fatalf("move %d back: %+v, %v", n, moved, err)
		}
	}
	for _, name := range []string{"log.moved", "log.moved.2", "log.moved.3", "state.db.moved.3"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
	w.open()
	if same, known, err := w.Log().Holds(t.Context(), head); err != nil || !same || !known || w.ID() != id {
		t.Errorf("after three moves the log does not hold what it held: %v, %v, %v", same, known, err)
	}
}
