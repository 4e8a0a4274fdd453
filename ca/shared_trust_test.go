package ca_test

import (
	"context"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/external/externaltest"
	"github.com/signet-mesh/signet/storage"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// sharedStore counts commits that change agents' records, and can have them fail.
type sharedStore struct {
	storage.Store
	mu      sync.Mutex
	commits int   // guarded by mu
	records int   // guarded by mu
	fault   error // of the next ones, guarded by mu
	landed  bool  // they happen all the same, guarded by mu
	faults  int   // that are left, guarded by mu
}

func (s *sharedStore) Commit(ctx context.Context, conds []storage.Cond, ops []storage.Op) (uint64, error) {
	n := 0
	for _, o := range ops {
		if strings.HasPrefix(o.Key, "agents/") && !o.Delete {
			n++
		}
	}
	if n == 0 {
		return s.Store.Commit(ctx, conds, ops)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.commits++
	s.records += n
	if s.faults > 0 {
		s.faults--
		if s.landed {
			if _, err := s.Store.Commit(ctx, conds, ops); err != nil {
				return 0, err
			}
		}
		return 0, s.fault
	}
	return s.Store.Commit(ctx, conds, ops)
}

func (s *sharedStore) fail(n int, landed bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults, s.landed, s.fault = n, landed, err
}

func (s *sharedStore) count() (commits, records int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.commits, s.records
}

// watching is an agent's WatchTrust stream, which acknowledges when it is told to.
type watching struct {
	t      *testing.T
	stream capb.Authority_WatchTrustClient
	mu     sync.Mutex
	seq    uint64 // guarded by mu
	auto   bool   // it acknowledges everything at once
}

func watchTrust(t *testing.T, agent capb.AuthorityClient, auto ...bool) *watching {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	s, err := agent.WatchTrust(ctx)
	if err != nil {
		t.Fatal(err)
	}
	w := &watching{t: t, stream: s, auto: len(auto) > 0}
	go func() {
		for {
			m, err := s.Recv()
			if err != nil {
				return
			}
			w.mu.Lock()
			w.seq = m.GetTrust().GetSequence()
			w.mu.Unlock()
			if w.auto {
				_ = s.Send(&capb.WatchTrustRequest{Acknowledged: m.GetTrust().GetSequence(), Renewed: m.GetTrust().GetSequence()})
			}
		}
	}()
	eventually(t, "the stream to begin", func() bool { return w.sequence() > 0 })
	return w
}

func (w *watching) sequence() uint64 { w.mu.Lock(); defer w.mu.Unlock(); return w.seq }

func (w *watching) acknowledge(seq uint64) {
	w.t.Helper()
	if err := w.stream.Send(&capb.WatchTrustRequest{Acknowledged: seq, Renewed: seq}); err != nil {
		w.t.Fatal(err)
	}
}

// TestReplicasWaitForEachOthersAgents: a root from outside is used when the agents of every
// replica have it, whichever replica they talk to, over restarts and lost answers of
// the state.
func TestReplicasWaitForEachOthersAgents(t *testing.T) {
	t.Parallel()
	_, upstream := upstreamFolder(t)
	shared := newShared(t)
	store := &sharedStore{Store: shared.Store}
	shared.Store = store
	edit := func(c *ca.Config) {
		brisk(c)
		c.SVID.AgentTTL = 40 * time.Second // so that agents' streams last, and work is looked for each second
		c.Upstream, c.Shared = upstream, shared
	}
	a, b := newWorld(t, edit), newWorld(t, edit)
	stopA := a.run()
	defer func() { stopA() }()
	defer b.run()()
	clientA, _ := a.attest(agentA)
	clientB, _ := b.attest(agentB)
	onA, onB := watchTrust(t, clientA), watchTrust(t, clientB)

	// The upstream has another root, which this one trusts from now on.
	dir := filepath.Dir(upstream.RootFile)
	next := externaltest.Root(t, "next", externaltest.P256)
	old := must(os.ReadFile(upstream.RootFile))
	for name, text := range map[string][]byte{"root.pem": append(externaltest.PEM(next.Cert), old...), "key.pem": externaltest.KeyPEM(t, next.Key)} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	before := a.Intermediate()
	if err := a.RenewIntermediate(t.Context()); err != nil {
		t.Fatal(err)
	}
	seq := trustOf(a).Sequence()
	if len(trustOf(a).Roots()) != 2 || !a.Intermediate().Equal(before) {
		t.Fatalf("%d roots; another intermediate: %v", len(trustOf(a).Roots()), !a.Intermediate().Equal(before))
	}
	for _, w := range []*watching{onA, onB} {
		eventually(t, "the agents to be told", func() bool { return w.sequence() >= seq })
	}
	for _, w := range []*world{a, b} {
		eventually(t, "both to wait for both", func() bool { return slices.Equal(w.Behind(seq), []string{"node-a", "node-b"}) })
	}
	// Two commits that have no answer, of which one happens; and one that does not.
	store.fail(1, true, storage.ErrUnknown)
	onA.acknowledge(seq)
	eventually(t, "b to know what was said to a", func() bool { return slices.Equal(b.Behind(seq), []string{"node-b"}) })
	if w := a.Behind(seq); !slices.Equal(w, []string{"node-b"}) {
		t.Errorf("a waits for %q", w)
	}
	// What was said to a replica that is gone is known all the same.
	stopA()
	a.close()
	a.open()
	if w := a.Behind(seq); !slices.Equal(w, []string{"node-b"}) {
		t.Errorf("after a restart a waits for %q", w)
	}
	stopA = a.run()
	if !a.Intermediate().Equal(before) {
		t.Error("the root is used although an agent of another replica lacks it")
	}
	store.fail(3, false, storage.ErrUnknown)
	onB.acknowledge(seq)
	eventually(t, "a to use the root", func() bool { return len(a.Behind(seq)) == 0 && verifies1(a, next) })
	if len(b.Behind(seq)) != 0 {
		t.Errorf("b waits for %q", b.Behind(seq))
	}
	// A failure that lasts is a reason not to be ready, and nothing is forgotten.
	store.fail(1000, false, errors.New("etcd does not answer"))
	if err := a.Relist(t.Context()); err != nil {
		t.Fatal(err)
	}
	seq = trustOf(a).Sequence()
	eventually(t, "the next sequence", func() bool { return onB.sequence() >= seq })
	onB.acknowledge(seq)
	eventually(t, "b to say that it cannot record it", func() bool {
		err := b.Ready()
		return err != nil && strings.Contains(err.Error(), "recording what agents acknowledged")
	})
	store.fail(0, false, nil)
	eventually(t, "a to hear of it", func() bool { return !slices.Contains(a.Behind(seq), "node-b") && b.Ready() == nil })
}

func parseChain(t *testing.T, ders [][]byte) (chain []*x509.Certificate) {
	t.Helper()
	for _, der := range ders {
		chain = append(chain, must(x509.ParseCertificate(der)))
	}
	return chain
}

func verifies1(w *world, root *externaltest.Signer) bool {
	return w.Intermediate().CheckSignatureFrom(root.Cert) == nil
}

// TestAcknowledgementsAreFewWrites: what agents repeat is not written again, and many
// agents are one commit.
func TestAcknowledgementsAreFewWrites(t *testing.T) {
	t.Parallel()
	_, upstream := upstreamFolder(t)
	shared := newShared(t)
	store := &sharedStore{Store: shared.Store}
	shared.Store = store
	a := newWorld(t, func(c *ca.Config) { c.Upstream, c.Shared = upstream, shared })
	defer a.run()()
	var streams []*watching
	for range 3 {
		client, _ := a.attest(agentA)
		streams = append(streams, watchTrust(t, client))
	}
	seq := trustOf(a).Sequence()
	_, records := store.count()
	for range 50 {
		for _, s := range streams {
			s.acknowledge(seq)
		}
		time.Sleep(10 * time.Millisecond) // two rounds of writing, at least
	}
	eventually(t, "it to be stored", func() bool { _, n := store.count(); return n > records })
	// quiet is how many commits there are when all that was said has been written.
	quiet := func() (commits int) {
		t.Helper()
		eventually(t, "nothing more to be written", func() bool {
			commits, _ = store.count()
			time.Sleep(3 * time.Second) // a busy machine may get to it late
			now, _ := store.count()
			return now == commits
		})
		return commits
	}
	commits := quiet()
	if _, after := store.count(); after-records > 3 {
		t.Errorf("%d records were written of 150 acknowledgements of three agents", after-records)
	}
	for _, s := range streams {
		s.acknowledge(seq)
	}
	time.Sleep(600 * time.Millisecond)
	if n, _ := store.count(); n != commits {
		t.Errorf("%d commits, without news", n-commits)
	}
	// A new SVID says what the former one did.
	client, _ := a.attest(agentA)
	s := watchTrust(t, client)
	commits = quiet()
	s.acknowledge(seq)
	time.Sleep(600 * time.Millisecond)
	if n, _ := store.count(); n != commits {
		t.Errorf("%d commits for an SVID that followed another", n-commits)
	}
}

// TestAnAgentThatKnowsMoreThanItsReplica moves from one replica to another before that
// has heard of the newest trust.
func TestAnAgentThatKnowsMoreThanItsReplica(t *testing.T) {
	t.Parallel()
	_, upstream := upstreamFolder(t)
	shared := newShared(t)
	edit := func(c *ca.Config) { c.Upstream, c.Shared = upstream, shared }
	a, b := newWorld(t, edit), newWorld(t, edit)
	client, _ := b.attest(agentB)
	s := watchTrust(t, client)
	if err := a.Relist(t.Context()); err != nil { // b follows nothing: it does not run
		t.Fatal(err)
	}
	seq := trustOf(a).Sequence()
	if trustOf(b).Sequence() >= seq {
		t.Fatal("b has heard of it")
	}
	s.acknowledge(seq)
	eventually(t, "b to look it up", func() bool { return trustOf(b).Sequence() == seq && s.sequence() == seq })
	s.acknowledge(seq + 1)
	eventually(t, "the stream to end that acknowledges what there is not", func() bool { return s.stream.Context().Err() != nil })
}

// TestReplicasRevokeTogether: the lists of all replicas' issuers are one state of trust,
// and what is revoked anywhere is on the list of who issued it.
func TestReplicasRevokeTogether(t *testing.T) {
	t.Parallel()
	_, upstream := upstreamFolder(t)
	shared := newShared(t)
	edit := func(c *ca.Config) {
		c.Upstream, c.Shared, c.CRL.Enabled, c.Propagation = upstream, shared, true, time.Millisecond
	}
	a, b := newWorld(t, edit), newWorld(t, edit)
	defer a.run()()
	stopB := b.run()
	defer func() { stopB() }()
	same := func() bool {
		ta, tb := trustOf(a), trustOf(b)
		return ta.Sequence() == tb.Sequence() && string(ta.PEM()) == string(tb.PEM()) && string(ta.CRLPEM()) == string(tb.CRLPEM()) && len(ta.CRLs()) == 2
	}
	eventually(t, "one state of trust with two lists", same)
	agentOfA, _ := a.attest(agentA)
	agentOfB, certB := b.attest(agentB)
	leafA := a.leaf(agentOfA)
	rs, err := issue(t, agentOfB, item(t, byUID(onNodeB.PodUID)))
	if err != nil || rs[0].GetX509() == nil {
		t.Fatal(rs, err)
	}
	for name, w := range map[string]*world{"a": a, "b": b} {
		if w.revoked(leafA) {
			t.Errorf("%s: nothing is revoked", name)
		}
	}
	start := time.Now()
	if _, err := adminOf(t, a).Revoke(t.Context(), &capb.RevokeRequest{Serial: ca.Serial(leafA[0]), Reason: 1}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "both to have it on the list", func() bool { return a.revoked(leafA) && b.revoked(leafA) })
	t.Logf("note: on the lists of both after %v", time.Since(start).Round(time.Millisecond))
	eventually(t, "one state of trust", same)
	// Any replica can be told. The issuer does it, and says why not.
	chainOfAgent := parseChain(t, certB.Certificate)
	opA := adminOf(t, a)
	resp, err := opA.Revoke(t.Context(), &capb.RevokeRequest{Serial: ca.Serial(certB.Leaf), Reason: 1, Comment: "elsewhere"})
	if err != nil || resp.GetPending() != "" || resp.GetAlready() || resp.GetRevocation().GetComment() != "elsewhere" {
		t.Errorf("another's certificate: %v, %v", resp, err)
	}
	eventually(t, "it to be on the list of both", func() bool { return a.revoked(chainOfAgent) && b.revoked(chainOfAgent) })
	if resp, err := opA.Revoke(t.Context(), &capb.RevokeRequest{Serial: ca.Serial(certB.Leaf), Reason: 1}); err != nil || !resp.GetAlready() {
		t.Errorf("again: %v, %v", resp, err)
	}
	for name, c := range map[string]struct {
		serial []byte
		reason uint32
		want   codes.Code
	}{
		"one that it never issued":    {append([]byte{2}, make([]byte, 16)...), 1, codes.NotFound},
		"one of nobody":               {append([]byte{9}, make([]byte, 16)...), 1, codes.NotFound},
		"a reason that there is not":  {ca.Serial(chainOfAgent[0]), 8, codes.FailedPrecondition},
		"an intermediate of somebody": {ca.Serial(chainOfAgent[1]), 1, codes.NotFound},
	} {
		if name == "a reason that there is not" {
			c.serial = append([]byte{2}, make([]byte, 16)...)
		}
		if _, err := opA.Revoke(t.Context(), &capb.RevokeRequest{Serial: c.serial, Reason: c.reason}); status.Code(err) != c.want {
			t.Errorf("%s: %v", name, err)
		}
	}
	if left, _, err := shared.Store.List(t.Context(), "revoke-asked/"); err != nil || len(left) != 0 {
		t.Errorf("%d requests are left, %v", len(left), err)
	}
	// An issuer that is away does it when it is back.
	stopB()
	agentOfB2, _ := b.attest(agentB)
	rs2, err := issue(t, agentOfB2, item(t, byUID(onNodeB.PodUID)))
	if err != nil || rs2[0].GetX509() == nil {
		t.Fatal(rs2, err)
	}
	later := parseChain(t, rs2[0].GetX509().GetChain())
	if _, err := opA.Revoke(t.Context(), &capb.RevokeRequest{Serial: ca.Serial(later[0]), Reason: 1}); status.Code(err) != codes.Unavailable {
		t.Errorf("while the issuer is away: %v", err)
	}
	stopB = b.run()
	eventually(t, "it to be revoked when the issuer is back", func() bool { return a.revoked(later) && b.revoked(later) })
	// A ban of a node is on the list of every replica that issued for it.
	if _, err := adminOf(t, a).AddBan(t.Context(), &capb.AddBanRequest{Subject: "node/node-b", Reason: "a test"}); err != nil {
		t.Fatal(err)
	}
	chainB := parseChain(t, rs[0].GetX509().GetChain())
	eventually(t, "b to revoke what it issued for the node", func() bool { return a.revoked(chainB) && b.revoked(chainB) })
	eventually(t, "one state of trust", same)
	// Each changes lists at once, and a sequence is one state all the same.
	seen := map[uint64]string{}
	var mu sync.Mutex
	note := func(w *world) {
		tr := trustOf(w)
		mu.Lock()
		defer mu.Unlock()
		if was, ok := seen[tr.Sequence()]; ok && was != string(tr.CRLPEM())+string(tr.PEM()) {
			t.Errorf("sequence %d means two states", tr.Sequence())
		}
		seen[tr.Sequence()] = string(tr.CRLPEM()) + string(tr.PEM())
	}
	var wg, watching sync.WaitGroup
	stop := make(chan struct{})
	for _, w := range []*world{a, b} {
		wg.Go(func() {
			for range 15 {
				if err := w.Relist(t.Context()); err != nil {
					t.Error(err)
				}
				note(w)
			}
		})
		watching.Go(func() {
			for {
				_, changed := w.Trust()
				note(w)
				select {
				case <-changed:
				case <-stop:
					return
				}
			}
		})
	}
	wg.Wait()
	eventually(t, "one state of trust", same)
	close(stop)
	watching.Wait()
	// Lists are of the state: one that does not sign any hands on those of the others.
	stopB()
	b.close()
	b.cfg.CRL.Enabled = false
	b.open()
	stopB = b.run()
	eventually(t, "the list of one to be left", func() bool {
		ta, tb := trustOf(a), trustOf(b)
		return ta.Sequence() == tb.Sequence() && len(ta.CRLs()) == 1 && string(ta.CRLPEM()) == string(tb.CRLPEM())
	})
	for _, w := range []*world{a, b} {
		intact(t, w)
	}
}
