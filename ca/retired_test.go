package ca_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/replica"
	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/storagetest"
)

// aged is a world whose clock can be set ahead, with logs of many small files.
type aged struct {
	*world
	off time.Duration // of the clock; changed while nothing runs
}

const agedRetention = 48 * time.Hour

func newAged(t *testing.T, edits ...func(*ca.Config)) *aged {
	t.Helper()
	a := &aged{}
	a.world = newWorld(t, append(edits, func(c *ca.Config) {
		c.LogRetention, c.LogOptions.SegmentSize = agedRetention, 4<<10
		ca.WithWall(c, a.wall)
	})...)
	agent, _ := a.attest(agentA)
	for range 40 {
		a.leaf(agent)
	}
	return a
}

func (a *aged) wall() time.Time { return time.Now().Round(0).Add(a.off) }

// prune removes what is old by a clock that is believed.
func (a *aged) prune() error {
	a.SetClock(a.wall, a.wall())
	return a.PruneLog(a.t.Context())
}

// formerLog is a replica that was restored, with the log of what it was before, whose files
// are in the folder log/001.
func formerLog(t *testing.T) (w *aged, shared ca.Shared, files *storagetest.CrashFS) {
	t.Helper()
	shared = newShared(t)
	w = newAged(t, func(c *ca.Config) { c.Shared, c.RootReplica, c.Instance = shared, 1, 1 })
	w.close()
	done, err := (replica.Restoration{Store: shared.Store, Files: shared.Files, Wait: 50 * time.Millisecond, Reason: "a test"}).Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	w.cfg.Instance, w.cfg.RootReplica = done.Replicas[0].To, done.Replicas[0].To
	w.open()
	intact(t, w.world)
	return w, shared, shared.Files.(*storagetest.CrashFS)
}

// TestAFormerLogGoesHoweverOftenThatFails: a file at a time, with a failure after each, and
// now and then the process ends.
func TestAFormerLogGoesHoweverOftenThatFails(t *testing.T) {
	t.Parallel()
	w, shared, files := formerLog(t)
	if err := w.prune(); err != nil || len(must(files.List("log/001"))) < 3 {
		t.Fatalf("%d files before they are old, %v", len(must(files.List("log/001"))), err)
	}
	w.off = agedRetention + time.Hour
	// That it goes cannot be recorded: then nothing goes.
	healthy := w.cfg.Shared
	w.close()
	w.cfg.Shared.Store = &failing{Store: shared.Store, left: 1 << 20}
	w.open()
	w.cfg.Shared.Store.(*failing).left = 0
	before := files.Ops()
	if err := w.prune(); !errors.Is(err, storagetest.ErrInjected) {
		t.Errorf("it goes without being on record: %v", err)
	}
	for _, op := range files.Ops()[len(before):] {
		if op.Kind == storagetest.Remove && filepath.Dir(op.Name) == "log/001" {
			t.Errorf("%v, without being on record", op)
		}
	}
	w.cfg.Shared.Store.(*failing).left = 1 << 20
	intact(t, w.world) // it is read as before
	w.close()
	w.cfg.Shared = healthy
	w.open()
	removed := 0
	files.Fail(func(op storagetest.Op) storagetest.Fault {
		if op.Kind != storagetest.Remove || filepath.Dir(op.Name) != "log/001" {
			return storagetest.NoFault
		}
		if removed++; removed%2 == 0 {
			return storagetest.NoFault
		}
		return storagetest.NotPersisted
	})
	attempts := 0
	for ; ; attempts++ {
		if attempts > 1000 {
			t.Fatal("it never ends")
		}
		err := w.prune()
		if err == nil {
			break
		}
		if !errors.Is(err, storagetest.ErrInjected) {
			t.Fatalf("attempt %d: %v", attempts, err)
		}
		intact(t, w.world)
		if attempts%2 == 0 {
			w.close()
			w.open()
			intact(t, w.world)
		}
	}
	if left := must(files.List("log/001")); len(left) > 0 || attempts < 3 {
		t.Errorf("%d attempts, left: %q", attempts, left)
	}
	files.Fail(nil)
	w.close()
	w.open()
	intact(t, w.world)
	if err := w.prune(); err != nil {
		t.Error(err)
	}
}

// TestAReplicaAnswersWhileAFormerLogGoes: what removes the log may take as long as it wants.
func TestAReplicaAnswersWhileAFormerLogGoes(t *testing.T) {
	t.Parallel()
	w, _, files := formerLog(t)
	w.off = agedRetention + time.Hour
	reached, release := make(chan struct{}), make(chan struct{})
	first := true
	files.Fail(func(op storagetest.Op) storagetest.Fault {
		if op.Kind == storagetest.Remove && filepath.Dir(op.Name) == "log/001" && first {
			first = false
			close(reached)
			<-release
		}
		return storagetest.NoFault
	})
	pruned := make(chan error, 1)
	go func() { pruned <- w.prune() }()
	select {
	case <-reached:
	case err := <-pruned:
		t.Fatalf("no file was removed: %v", err)
	}
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		_, _ = w.Ready(), w.Alarms()
		intact(t, w.world)
	}()
	select {
	case <-answered:
	case <-time.After(time.Minute):
		t.Error("it does not say whether it is ready")
	}
	close(release)
	<-answered
	if err := <-pruned; err != nil {
		t.Error(err)
	}
}

// TestAFormerLogThatIsDamaged stops the replica, unless it is so old that it goes anyway.
func TestAFormerLogThatIsDamaged(t *testing.T) {
	t.Parallel()
	w, _, files := formerLog(t)
	w.close()
	names := must(files.List("log/001"))
	slices.Sort(names)
	files.RemoveFile("log/001/" + names[0])
	if a, err := ca.Open(t.Context(), w.cfg); !errors.Is(err, storage.ErrCorrupt) {
		t.Errorf("with a file missing: %v", err)
		if a != nil {
			_ = a.Close()
		}
	}
	// A clock that is ahead at the start removes nothing, once it is right.
	w.off = agedRetention + time.Hour
	w.open()
	w.off = 0
	if err := w.prune(); err != nil {
		t.Error(err)
	}
	if left := must(files.List("log/001")); len(left) != len(names)-1 {
		t.Errorf("left by a clock that was ahead: %q", left)
	}
	w.close()
	w.off = agedRetention + time.Hour
	w.open()
	intact(t, w.world)
	if err := w.prune(); err != nil {
		t.Error(err)
	}
	if left := must(files.List("log/001")); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	w.close()
	w.off = 0
	w.open()
	intact(t, w.world)
}

// TestARetiredLogGoesAndAllOfItDoes: in a folder, whatever a process that ended had left.
func TestARetiredLogGoesAndAllOfItDoes(t *testing.T) {
	t.Parallel()
	w := newAged(t)
	b := w.backup(w.admin())
	w.close()
	keysDir := filepath.Join(w.cfg.DataDir, "authority/keys")
	w.cfg.DataDir = emptyDir(t)
	restored, err := ca.Restore(t.Context(), ca.RestoreConfig{Backup: bytes.NewReader(b), DataDir: w.cfg.DataDir, KeysDir: keysDir})
	if err != nil {
		t.Fatal(err)
	}
	w.cfg.Instance = restored.Instance
	dir := filepath.Join(w.cfg.DataDir, "authority/retired/001")
	whole := copyTree(t, dir)
	var names []string
	for name := range whole {
		names = append(names, name)
	}
	slices.Sort(names)
	gone := func(what string) {
		t.Helper()
		if left := must(os.ReadDir(filepath.Dir(dir))); len(left) > 0 {
			t.Errorf("%s: left: %v", what, left)
		}
	}
	put := func(dir string, files []string) {
		t.Helper()
		mkdir(t, dir, 0o700)
		for _, name := range files {
			if err := os.WriteFile(filepath.Join(dir, name), whole[name], 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	// It had its other name, and some files, or all of them, had gone.
	for n := range len(names) + 1 {
		put(dir+".gone", names[n:])
		w.open()
		intact(t, w.world)
		gone("ended in the middle")
		w.close()
	}
	// Under its own name it is empty, as an earlier version could leave it.
	put(dir, nil)
	w.open()
	intact(t, w.world)
	w.close()
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	// A file is missing: that is not overlooked, unless it is so old that it goes anyway.
	put(dir, names[1:])
	if a, err := ca.Open(t.Context(), w.cfg); !errors.Is(err, storage.ErrCorrupt) {
		t.Errorf("with a file missing: %v", err)
		if a != nil {
			_ = a.Close()
		}
	}
	w.off = agedRetention + time.Hour
	w.open()
	intact(t, w.world)
	if err := w.prune(); err != nil {
		t.Error(err)
	}
	gone("with a file missing, and old")
	w.close()
	// All of it, while it is served.
	put(dir, names)
	w.open()
	if err := w.prune(); err != nil {
		t.Error(err)
	}
	gone("old")
	intact(t, w.world)
}
