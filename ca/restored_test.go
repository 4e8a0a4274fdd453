package ca_test

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/replica"
	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/storagetest"
)

// TestASharedStateIsRestored: what `signet-ca restore-etcd` does to a state that was put
// back, seen from two replicas, twice, and over commits without an answer.
func TestASharedStateIsRestored(t *testing.T) {
	t.Parallel()
	shared := newShared(t)
	retention := 48 * time.Hour
	var off time.Duration // of both clocks; changed while neither runs
	one := func(c *ca.Config) {
		c.Shared, c.RootReplica, c.CRL.Enabled, c.LogRetention = shared, 1, true, retention
		ca.WithWall(c, func() time.Time { return time.Now().Round(0).Add(off) })
	}
	a := newWorld(t, one, func(c *ca.Config) { c.Instance = 1 })
	stopA := a.run()
	b := newWorld(t, one)
	stopB := b.run()
	agent, _ := b.attest(agentB)
	rs, err := issue(t, agent, item(t, byUID(onNodeB.PodUID)))
	if err != nil || rs[0].GetX509() == nil {
		t.Fatal(rs, err)
	}
	leaf := parseChain(t, rs[0].GetX509().GetChain())
	if ca.Serial(leaf[0])[0] != 2 {
		t.Fatalf("serial %x", ca.Serial(leaf[0]))
	}
	// A folder that has claimed an instance and not begun.
	if n, err := replica.Claim(t.Context(), shared.Store, "somebody", 0); err != nil || n != 3 {
		t.Fatal(n, err)
	}
	sequence, intermediate, root := trustOf(b).Sequence(), b.Intermediate(), b.Root()
	banned, err := a.admin().AddBan(t.Context(), &capb.AddBanRequest{Subject: someone("banned"), Reason: "a test"})
	if err != nil {
		t.Fatal(err)
	}
	restoration := replica.Restoration{Store: shared.Store, Files: shared.Files, Wait: 50 * time.Millisecond, Reason: "a test"}
	if _, err := restoration.Run(t.Context()); !errors.Is(err, storage.ErrLocked) || !strings.Contains(err.Error(), "stop every replica first") {
		t.Fatalf("while they run: %v", err)
	}
	stopA()
	a.close()
	if _, err := restoration.Run(t.Context()); !errors.Is(err, storage.ErrLocked) {
		t.Fatalf("while one runs: %v", err)
	}
	stopB()
	b.close()
	if _, err := (replica.Restoration{Store: shared.Store, Files: shared.Files}).Run(t.Context()); err == nil {
		t.Error("without a reason")
	}
	head, _ := b.Log().SignedHead()

	// A commit without an answer that has not happened changes nothing; one that has can be
	// done again, and only leaves numbers out.
	for _, landed := range []bool{false, true} {
		for n := 0; ; n++ {
			failing := restoration
			failing.Store = &nthUnknown{Store: shared.Store, armed: true, n: n, landed: landed}
			if _, err := failing.Run(t.Context()); err == nil {
				break
			} else if !errors.Is(err, storage.ErrUnknown) {
				t.Fatal(err)
			}
		}
	}
	done, err := restoration.Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("note: %+v", done)
	if len(done.Replicas) != 3 || done.Bans != 1 || done.TrustSequence < sequence+1<<20 {
		t.Errorf("%+v", done)
	}
	now := done.Replicas[0].To
	if _, err := ca.Open(t.Context(), a.cfg); !errors.Is(err, replica.ErrClaimed) || !strings.Contains(err.Error(), "since: set instance") {
		t.Errorf("the former instance in the configuration: %v", err)
	}

	begin := func() (end func()) {
		t.Helper()
		a.cfg.Instance, a.cfg.RootReplica, b.cfg.RootReplica = now, now, now
		a.open()
		stopA := a.run()
		b.open()
		stopB := b.run()
		return func() { stopA(); a.close(); stopB(); b.close() }
	}
	end := begin()
	if !b.Intermediate().Equal(intermediate) || !a.Root().Equal(root) {
		t.Error("another intermediate or root")
	}
	for _, w := range []*world{a, b} {
		eventually(t, "it to be ready", func() bool { return w.Ready() == nil })
		first := true
		for r := range records(w) {
			if d := r.GetDecision(); first && (d.GetWhat() != capb.Decision_WHAT_RESTORED || d.GetReason() != "a test" || len(d.GetHash()) != 32) {
				t.Errorf("the first record of %v: %v", w.ID(), r)
			}
			first = false
		}
		if first {
			t.Errorf("the log of %v is empty", w.ID())
		}
		if n := trustOf(w).Sequence(); n < done.TrustSequence {
			t.Errorf("trust sequence %d after %d", n, done.TrustSequence)
		}
		intact(t, w)
	}
	// What it was it knows: it revokes what it issued then, and heads of then tell nothing new.
	if err := b.Revoke(t.Context(), ca.Serial(leaf[0])); err != nil {
		t.Errorf("revoking what the former instance issued: %v", err)
	}
	eventually(t, "it to be on a list", func() bool { return a.revoked(leaf) && b.revoked(leaf) })
	agent, _ = b.attest(agentB)
	rs, err = issue(t, agent, item(t, byUID(onNodeB.PodUID)))
	if err != nil || rs[0].GetX509() == nil || rs[0].GetX509().GetChain()[0] == nil {
		t.Fatal(rs, err)
	}
	if s := ca.Serial(parseChain(t, rs[0].GetX509().GetChain())[0]); s[0] != done.Replicas[1].To {
		t.Errorf("serial %x, and it is instance %d", s, done.Replicas[1].To)
	}
	if err := b.Ready(); err != nil || head.Sequence == 0 {
		t.Errorf("head %d, %v", head.Sequence, err)
	}
	leaps := done.TrustSequence >> 20 << 20
	// An agent that knows of later bans than the copy says so once.
	for i, c := range []struct {
		revision, sequence uint64
		lost               bool
	}{
		{banned.GetRevision(), sequence, false},
		{banned.GetRevision(), 0, false},
		{leaps + banned.GetRevision() + 1, done.TrustSequence, false}, // of the restored state
		{leaps + banned.GetRevision(), 0, false},
		{leaps - 1<<20 + banned.GetRevision() + 1, 0, true}, // of an earlier version
		{banned.GetRevision() + 1<<30, sequence + 1, true},  // a year later, before it was done several times
	} {
		stream, err := agent.WatchTrust(t.Context())
		if err == nil {
			err = stream.Send(&capb.WatchTrustRequest{BansRevision: c.revision, BansSequence: c.sequence})
		}
		if err == nil {
			// What comes after it was heard.
			err = stream.Send(&capb.WatchTrustRequest{BansRevision: 1000 + uint64(i)})
		}
		if err != nil {
			t.Fatal(err)
		}
		op := b.admin()
		eventually(t, "it to be heard", func() bool {
			l, err := op.ListBans(t.Context(), &capb.ListBansRequest{})
			return err == nil && len(l.GetAgents()) == 1 && l.GetAgents()[0].GetRevision() == 1000+uint64(i)
		})
		if err := stream.CloseSend(); err != nil {
			t.Error(err)
		}
		if got := b.Alarms() != nil && strings.Contains(b.Alarms().Error(), "lost bans"); got != c.lost {
			t.Errorf("bans %+v: alarms: %v", c, b.Alarms())
		}
	}
	end()

	// Once more, with instances left out.
	restoration.From = 100
	if done, err = restoration.Run(t.Context()); err != nil || done.Replicas[0].To != 100 || done.Replicas[1].To != 101 {
		t.Fatalf("%+v, %v", done, err)
	}
	now = done.Replicas[0].To
	if n, err := replica.Claim(t.Context(), shared.Store, "somebody else", 0); err != nil || n < 103 {
		t.Errorf("somebody who joins is instance %d, %v", n, err)
	}
	end = begin()
	for _, w := range []*world{a, b} {
		intact(t, w)
	}
	if _, err := ca.Open(t.Context(), b.cfg); err == nil {
		t.Error("two processes are one replica")
	}
	end()

	// The logs of former instances go when they are as old as the retention.
	names, err := shared.Files.List("log/002")
	if err != nil || len(names) == 0 {
		t.Fatalf("the former log of the second: %q, %v", names, err)
	}
	off = retention + time.Hour
	b.open()
	if _, err := b.admin().AcceptClock(t.Context(), &capb.AcceptClockRequest{Record: b.Log().Head().Sequence, Reason: "it was off"}); err != nil {
		t.Logf("note: accepting the clock: %v", err)
	}
	if err := b.Tick(t.Context()); err != nil {
		t.Error(err)
	}
	if names, err := shared.Files.List("log/002"); err != nil || len(names) != 0 {
		t.Errorf("the former log of the second after the retention: %q, %v", names, err)
	}
	intact(t, b)
	b.close()
}

// TestARestoredStateNamesKeysThatHaveGone: the copy is from before an intermediate was
// replaced and its key removed.
func TestARestoredStateNamesKeysThatHaveGone(t *testing.T) {
	t.Parallel()
	shared := newShared(t)
	one := func(c *ca.Config) { c.Shared, c.RootReplica, c.CRL.Enabled = shared, 1, true }
	a := newWorld(t, brisk, one, func(c *ca.Config) { c.Instance = 1 })
	stopA := a.run()
	b := newWorld(t, brisk, one)
	stopA()
	keyFiles := func(w *world, kind string) []string {
		return must(filepath.Glob(filepath.Join(w.cfg.DataDir, "authority/keys", kind+"-*.key")))
	}
	remove := func(names ...string) {
		t.Helper()
		for _, name := range names {
			if err := os.Remove(name); err != nil {
				t.Fatal(err)
			}
		}
	}
	// One that waits for its list, in the copy.
	before := keyFiles(a, "intermediate")
	if err := a.RenewIntermediate(t.Context()); err != nil {
		t.Fatal(err)
	}
	next := slices.DeleteFunc(keyFiles(a, "intermediate"), func(name string) bool { return slices.Contains(before, name) })
	if len(before) != 1 || len(next) != 1 || len(keyFiles(b, "intermediate")) != 1 {
		t.Fatalf("keys %q, then %q, and %q", before, next, keyFiles(b, "intermediate"))
	}
	root, ofA, ofB := a.Root(), a.Intermediate(), b.Intermediate()
	a.close()
	b.close()
	restore := func() {
		t.Helper()
		done, err := (replica.Restoration{Store: shared.Store, Files: shared.Files, Wait: 50 * time.Millisecond, Reason: "a test"}).Run(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		a.cfg.Instance, a.cfg.RootReplica, b.cfg.RootReplica = done.Replicas[0].To, done.Replicas[0].To, done.Replicas[0].To
	}
	restore()
	remove(append(next, keyFiles(b, "intermediate")...)...)
	a.open()
	stopA = a.run()
	b.open()
	stopB := b.run()
	for _, w := range []*world{a, b} {
		eventually(t, "it to be ready", func() bool { return w.Ready() == nil })
		intact(t, w)
	}
	if !a.Root().Equal(root) || !a.Intermediate().Equal(ofA) {
		t.Error("the first has another root or intermediate")
	}
	if b.Intermediate().Equal(ofB) {
		t.Error("the second signs with what it has no key of")
	}
	agent, _ := b.attest(agentB)
	rs, err := issue(t, agent, item(t, byUID(onNodeB.PodUID)))
	if err != nil || rs[0].GetX509() == nil {
		t.Fatal(rs, err)
	}
	if err := verifies(parseChain(t, rs[0].GetX509().GetChain()), root); err != nil {
		t.Error(err)
	}
	stopB()
	b.close()
	stopA()
	a.close()

	// Without a restoration a key that is missing stays a reason not to start.
	remove(before...)
	if w, err := ca.Open(t.Context(), a.cfg); err == nil || !strings.Contains(err.Error(), "is missing: restore it") {
		t.Errorf("without its intermediate's key: %v", err)
		if w != nil {
			_ = w.Close()
		}
	}
	restore()
	a.open()
	if a.Intermediate().Equal(ofA) || !a.Root().Equal(root) {
		t.Error("the first signs with what it has no key of, or has another root")
	}
	if err := a.Ready(); err != nil {
		t.Error(err)
	}
	intact(t, a)
	a.close()

	// The root's key is restored by people.
	restore()
	remove(keyFiles(a, "root")...)
	if w, err := ca.Open(t.Context(), a.cfg); err == nil || !strings.Contains(err.Error(), "root-") || !strings.Contains(err.Error(), "is missing: restore it") {
		t.Errorf("without the root's key: %v", err)
		if w != nil {
			_ = w.Close()
		}
	}
}

// TestARestoredReplicaMovesToItsFolder with the logs of what it was, so that what those
// instances issued can still be looked up and revoked.
func TestARestoredReplicaMovesToItsFolder(t *testing.T) {
	t.Parallel()
	shared := newShared(t)
	w := newWorld(t, func(c *ca.Config) {
		c.Shared, c.RootReplica, c.Instance, c.CRL.Enabled, c.LogOptions.SegmentSize = shared, 1, 1, true, 4<<10
	})
	var leaves [][]*x509.Certificate
	serve := func() {
		t.Helper()
		agent, _ := w.attest(agentA)
		for range 15 {
			leaves = append(leaves, w.leaf(agent))
		}
		if err := w.SignHead(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	dir := filepath.Join(w.cfg.DataDir, "authority")
	m := replica.Migration{Dir: dir, Store: shared.Store, Files: shared.Files, Place: "there", Wait: 50 * time.Millisecond}
	for range 2 {
		serve()
		w.close()
		done, err := (replica.Restoration{Store: shared.Store, Files: shared.Files, Wait: 50 * time.Millisecond, Reason: "a test"}).Run(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.ToFolder(t.Context()); err == nil || !strings.Contains(err.Error(), "start it once") {
			t.Fatalf("before it has begun again: %v", err)
		}
		w.cfg.Instance, w.cfg.RootReplica = done.Replicas[0].To, done.Replicas[0].To
		w.open()
	}
	serve()
	instance := w.cfg.Instance
	w.close()

	// Something else is where a log goes: it stays, and nothing is moved.
	inWay := filepath.Join(dir, "retired/001")
	if err := os.MkdirAll(inWay, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := m.ToFolder(t.Context()); err == nil || !strings.Contains(err.Error(), "the log of instance 1, which this replica was") {
		t.Fatalf("with something in the way: %v", err)
	}
	if err := os.Remove(inWay); err != nil {
		t.Fatal(err)
	}
	// Of what an attempt has copied that was interrupted nothing is left, or all of it is used.
	mkdir(t, inWay+".migrating", 0o700)
	if err := os.WriteFile(filepath.Join(inWay+".migrating", "000000000001.seg"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "replica.moved", "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := m.ToFolder(t.Context()); err == nil {
		t.Fatal("it ended although the last step cannot be")
	}
	if err := os.RemoveAll(filepath.Join(dir, "replica.moved")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"state.db", "log"} { // as before they had their names
		if err := os.Rename(filepath.Join(dir, name), filepath.Join(dir, name+".migrating")); err != nil {
			t.Fatal(err)
		}
	}
	copied := copyTree(t, inWay)
	moved, err := m.ToFolder(t.Context())
	if err != nil || moved.Instance != instance {
		t.Fatalf("%+v, %v", moved, err)
	}
	t.Logf("note: %+v", moved)
	for name, b := range copyTree(t, inWay) {
		if !bytes.Equal(copied[name], b) {
			t.Errorf("%s is not what it was", name)
		}
	}
	if names := must(filepath.Glob(filepath.Join(dir, "retired/*"))); len(copied) < 2 || len(names) != 2 {
		t.Errorf("%d files; retired: %q", len(copied), names)
	}

	w.cfg.Shared, w.cfg.RootReplica = ca.Shared{}, 0
	w.open()
	defer w.run()()
	intact(t, w)
	if v, err := w.admin().VerifyLog(t.Context(), &capb.VerifyLogRequest{Store: true}); err != nil || len(v.GetLogs()) != 3 {
		t.Errorf("%v, %v", v, err)
	}
	of := map[byte]bool{}
	for _, leaf := range leaves {
		of[ca.Serial(leaf[0])[0]] = true
		if err := w.Revoke(t.Context(), ca.Serial(leaf[0])); err != nil {
			t.Errorf("revoking %x: %v", ca.Serial(leaf[0]), err)
		}
	}
	if len(of) != 3 {
		t.Errorf("leaves of instances %v", of)
	}
	eventually(t, "the first to be on a list", func() bool { return w.revoked(leaves[0]) })
	intact(t, w)
}

// TestARestorationLeavesNumbersOut: more than fit into one change, and over changes without an
// answer.
func TestARestorationLeavesNumbersOut(t *testing.T) {
	t.Parallel()
	_, upstream := upstreamFolder(t)
	shared := newShared(t)
	w := newWorld(t, func(c *ca.Config) { c.Upstream, c.Shared = upstream, shared })
	w.close()
	restoration := replica.Restoration{Store: shared.Store, Files: shared.Files, Wait: 50 * time.Millisecond, From: 120, Reason: "a test"}
	before := must(shared.Store.Get(t.Context(), "replicas/001")).Revision
	stopped := restoration
	stopped.Store = &failing{Store: shared.Store, left: 1, landed: true}
	if _, err := stopped.Run(t.Context()); !errors.Is(err, storagetest.ErrInjected) {
		t.Fatal(err)
	}
	if now := must(shared.Store.Get(t.Context(), "replicas/001")).Revision; now != before {
		t.Error("the replica is another instance although the restoration was interrupted before")
	}
	done, err := restoration.Run(t.Context())
	if err != nil || len(done.Replicas) != 1 || done.Replicas[0].To != 120 {
		t.Fatalf("%+v, %v", done, err)
	}
	w.open()
	intact(t, w)
	if n, err := replica.Claim(t.Context(), shared.Store, "somebody", 0); err != nil || n != 121 {
		t.Errorf("somebody who joins is instance %d, %v", n, err)
	}
	if _, err := replica.Claim(t.Context(), shared.Store, "somebody else", 7); !errors.Is(err, replica.ErrClaimed) {
		t.Errorf("a number that was left out: %v", err)
	}
}

// TestTheFirstRecordSaysWhatWasLost also where the state was restored again before the
// replica had begun.
func TestTheFirstRecordSaysWhatWasLost(t *testing.T) {
	t.Parallel()
	_, upstream := upstreamFolder(t)
	shared := newShared(t)
	w := newWorld(t, func(c *ca.Config) { c.Upstream, c.Shared = upstream, shared })
	restore := func(reason string) {
		t.Helper()
		if _, err := (replica.Restoration{Store: shared.Store, Files: shared.Files, Wait: 50 * time.Millisecond, Reason: reason}).Run(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	says := func(want ...string) {
		t.Helper()
		var got []string
		for r := range records(w) {
			if d := r.GetDecision(); d.GetWhat() == capb.Decision_WHAT_RESTORED {
				got = append(got, fmt.Sprintf("%d at %d: %s", d.GetInstance(), d.GetSequence(), d.GetReason()))
			} else if len(got) == 0 {
				t.Errorf("before it says anything: %v", r)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("it says %q, not %q", got, want)
		}
		intact(t, w)
	}
	w.close()
	lost := w.Log().Head().Sequence
	restore("disks")
	restore("the wrong snapshot")
	w.open()
	says(fmt.Sprintf("1 at %d: disks", lost), "2 at 0: the wrong snapshot")
	w.close()
	lost = w.Log().Head().Sequence
	restore("disks again")
	w.open()
	says(fmt.Sprintf("3 at %d: disks again", lost))
}
