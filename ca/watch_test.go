package ca_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/keys"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/storage"

	"go.step.sm/crypto/kms/apiv1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

func TestWatchNodeTellsTheNodesPodsAndTheirChanges(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a, _ := w.attest(agentA)
	s, err := a.WatchNode(t.Context(), &capb.WatchNodeRequest{})
	if err != nil {
		t.Fatal(err)
	}
	recv := func() (set []string, m *capb.WatchNodeResponse) {
		t.Helper()
		m, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range m.GetPods() {
			set = append(set, p.GetUid())
		}
		return set, m
	}
	set, m := recv()
	if !m.GetFull() || strings.Join(set, " ") != "uid-agent-a uid-client uid-server" || m.GetNodeUid() != "uid-node-a" {
		t.Errorf("first: %v", m)
	}
	fresh := identity.Workload{Namespace: "default", ServiceAccount: "server", Pod: "server-1", PodUID: "uid-server-1", Node: "node-a", Labels: map[string]string{"app": "server"}}
	w.pods.Set(onNodeB) // nothing new, and not of this node
	w.pods.Set(fresh)
	set, m = recv()
	if m.GetFull() || strings.Join(set, " ") != "uid-server-1" || m.GetPods()[0].GetLabels()["app"] != "server" || len(m.GetDeleted()) != 0 {
		t.Errorf("after a new pod: %v", m)
	}
	w.pods.Delete("uid-server-1")
	if set, m = recv(); len(set) != 0 || strings.Join(m.GetDeleted(), " ") != "uid-server-1" {
		t.Errorf("after its end: %v", m)
	}
}

func TestWatchTrust(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a, _ := w.attest(agentA)
	s, err := a.WatchTrust(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if tr := m.GetTrust(); tr.GetSequence() != 1 || tr.GetTrustDomain() != "cluster.local" || len(tr.GetBundles()) != 1 || string(tr.GetBundles()[0].GetX509Authorities()[0]) != string(w.Root().Raw) {
		t.Errorf("trust: %v", m.GetTrust())
	}
	if err := w.SignHead(t.Context()); err != nil {
		t.Fatal(err)
	}
	if m, err = s.Recv(); err != nil {
		t.Fatal(err)
	}
	h := m.GetLogHead()
	if h.GetSequence() != w.Log().Head().Sequence || len(h.GetSignature()) == 0 {
		t.Fatalf("head: %v", h)
	}
	var hash [32]byte
	copy(hash[:], h.GetHash())
	head := storage.Head{Instance: h.GetInstance(), Sequence: h.GetSequence(), Hash: hash, Time: h.GetTime().AsTime(), Signature: h.GetSignature()}
	if !w.VerifyHead(head) {
		t.Error("the head's signature does not verify")
	}
	for name, edit := range map[string]func(*storage.Head){
		"sequence": func(h *storage.Head) { h.Sequence++ }, "hash": func(h *storage.Head) { h.Hash[0] ^= 1 },
		"time": func(h *storage.Head) { h.Time = h.Time.Add(1) }, "instance": func(h *storage.Head) { h.Instance++ },
	} {
		other := head
		edit(&other)
		if w.VerifyHead(other) {
			t.Errorf("another %s verifies too", name)
		}
	}

	// A head that nobody signed is no alarm; the real one, once the log is
	// shorter, is.
	forged := &capb.LogHead{Instance: 1, Sequence: 1 << 40, Hash: make([]byte, 32), Time: timestamppb.Now(), Signature: h.GetSignature()}
	if err := s.Send(&capb.WatchTrustRequest{Acknowledged: 1, LogHeads: []*capb.LogHead{forged, h, {}}}); err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&capb.WatchTrustRequest{Acknowledged: 2}); err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = s.Recv()
	}
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("a sequence that does not exist was acknowledged: %v", err)
	}
	if w.Ready() != nil {
		t.Errorf("forged head: %v", w.Ready())
	}
}

// TestALogThatLostRecordsIsNoticed puts an older copy of the log back.
func TestALogThatLostRecordsIsNoticed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.close()
	old := copyTree(t, w.cfg.DataDir+"/authority/log")
	w.open()
	a, cert := w.attest(agentA)
	for range 3 {
		if _, err := issue(t, a, item(t, byUID(server.PodUID))); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.SignHead(t.Context()); err != nil {
		t.Fatal(err)
	}
	s, err := a.WatchTrust(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	w.close()
	restoreTree(t, old, w.cfg.DataDir+"/authority/log")
	w.open()
	if s, err = w.dial(cert).WatchTrust(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&capb.WatchTrustRequest{LogHeads: []*capb.LogHead{m.GetLogHead()}}); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(time.Minute)
	for w.Ready() == nil && time.Now().Before(deadline) {
		if err := s.Send(&capb.WatchTrustRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Ready(); err == nil || !strings.Contains(err.Error(), "lost records") {
		t.Errorf("not noticed: %v", err)
	}
}

// TestTheIntermediateIsRenewedBeforeItEnds runs eight fake days.
func TestTheIntermediateIsRenewedBeforeItEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *ca.Config) { c.HeadInterval = time.Hour })
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- w.Run(ctx) }()
		first := w.Intermediate()
		seen := map[string]bool{}
		for day := range 16 {
			time.Sleep(12 * time.Hour)
			if now := time.Now(); !now.Before(w.Intermediate().NotAfter.Add(-3 * 24 * time.Hour)) {
				t.Errorf("half day %d: %v of the intermediate are left", day, w.Intermediate().NotAfter.Sub(now))
			}
			seen[w.Intermediate().Subject.String()] = true
			a, _ := w.attest(agentA)
			rs, err := issue(t, a, item(t, byUID(server.PodUID)))
			if err != nil {
				t.Fatal(err)
			}
			verify(t, w, rs[0].GetX509(), "spiffe://cluster.local/ns/default/sa/server")
		}
		if len(seen) != 3 || w.Intermediate().Equal(first) {
			t.Errorf("%d intermediates in 8 days", len(seen))
		}
		if err := w.Ready(); err != nil {
			t.Error(err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		w.close()
		w.open()
		if w.Intermediate().Equal(first) {
			t.Error("after opening again the first intermediate is back")
		}
		if w.Agents() == 0 || w.Agents() > 2 {
			t.Errorf("%d agent SVIDs are on record; those that expired must be forgotten", w.Agents())
		}
		w.close()
	})
}

// TestAStreamEndsWithItsSVID, and a renewal needs a fresh token once a day.
func TestAStreamEndsWithItsSVID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- w.Run(ctx) }()
		a, cert := w.attest(agentA)
		s, err := a.WatchNode(t.Context(), &capb.WatchNodeRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		_, err = s.Recv()
		if left := time.Until(cert.Leaf.NotAfter); status.Code(err) != codes.Unauthenticated || left > 0 || left < -time.Second {
			t.Errorf("ended with %v, %v before the SVID's end", err, left)
		}
		start := time.Now()
		_, cert = w.attest(agentA)
		renewals := 0
		for err = nil; err == nil; {
			time.Sleep(50 * time.Minute)
			next, e := w.tryAttest(w.dial(cert), func(r *capb.AttestRequest) { r.Evidence = &capb.AttestRequest_Renewal{Renewal: &capb.Renewal{}} })
			if err = e; err == nil {
				cert = next
				renewals++
			}
		}
		if d := time.Since(start); status.Code(err) != codes.Unauthenticated || d < 24*time.Hour || d > 25*time.Hour {
			t.Errorf("after %v and %d renewals: %v", d, renewals, err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		w.close()
	})
}

// oneKey is a key management that has one key and makes none.
type oneKey struct{ key *ecdsa.PrivateKey }

func (k oneKey) GetPublicKey(*apiv1.GetPublicKeyRequest) (crypto.PublicKey, error) {
	return k.key.Public(), nil
}
func (oneKey) CreateKey(*apiv1.CreateKeyRequest) (*apiv1.CreateKeyResponse, error) {
	return nil, errors.New("no key is made here")
}
func (k oneKey) CreateSigner(*apiv1.CreateSignerRequest) (crypto.Signer, error) { return k.key, nil }
func (oneKey) Close() error                                                     { return nil }

// TestTheServingCertificateOutlivesTheIntermediatesRenewal: where the configuration names
// the root's key no other root can be made. An alarm says so at half of its life; in its
// last days no intermediate can be renewed, and agents must still be served.
func TestTheServingCertificateOutlivesTheIntermediatesRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *ca.Config) {
			c.RootTTL, c.IntermediateTTL, c.HeadInterval = 5*24*time.Hour, 2*24*time.Hour, time.Hour
			key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
			c.Keys.Made = map[string]string{keys.Root: "awskms:key-id=only"}
			c.Keys.Managers = map[string]keys.Opener{"awskms": func(context.Context, apiv1.Options) (apiv1.KeyManager, error) { return oneKey{key}, nil }}
		})
		first := w.Root()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- w.Run(ctx) }()
		refused, alarmed := false, false
		for time.Now().Add(6 * time.Hour).Before(first.NotAfter) {
			time.Sleep(5 * time.Hour)
			refused = refused || w.Ready() != nil
			if err := w.Alarms(); err != nil && !alarmed {
				alarmed = true
				if left := time.Until(first.NotAfter); !strings.Contains(err.Error(), "names one key") || left > 3*24*time.Hour || left < 2*24*time.Hour {
					t.Errorf("%v before the root's end the alarm is %v", left, err)
				}
			}
			a, _ := w.attest(agentA)
			if rs, err := issue(t, a, item(t, byUID(server.PodUID))); err != nil || rs[0].GetX509() == nil {
				t.Fatalf("%v before the root's end: %v, %v", time.Until(w.Root().NotAfter), rs, err)
			}
		}
		if !refused || !alarmed || !w.Root().Equal(first) {
			t.Errorf("readiness said that the root has to be replaced: %v; an alarm: %v", refused, alarmed)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		w.close()
	})
}

// TestAnUnreadStreamEndsToo: an agent that does not read cannot hold its streams
// open beyond its SVID.
func TestAnUnreadStreamEndsToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a, cert := w.attest(agentA)
		s, err := a.WatchNode(t.Context(), &capb.WatchNodeRequest{})
		if err != nil {
			t.Fatal(err)
		}
		// More than the flow-control window, and nobody reads.
		labels := map[string]string{}
		for i := range 200 {
			labels[strings.Repeat("k", 50)+string(rune('a'+i%26))+strings.Repeat("x", i)] = strings.Repeat("v", 60)
		}
		for i := range 50 {
			p := server
			p.PodUID, p.Labels = "uid-"+string(rune('A'+i)), labels
			w.pods.Set(p)
			synctest.Wait()
		}
		time.Sleep(time.Until(cert.Leaf.NotAfter) + time.Second)
		synctest.Wait()
		late := server
		late.PodUID = "uid-late"
		w.pods.Set(late)
		for err == nil {
			var m *capb.WatchNodeResponse
			m, err = s.Recv()
			for _, p := range m.GetPods() {
				if p.GetUid() == "uid-late" {
					t.Error("a pod of after the SVID's end was told")
				}
			}
		}
		if status.Code(err) != codes.Unauthenticated {
			t.Errorf("it ended with %v", err)
		}
		w.close()
	})
}

// TestALogThatGrewBackIsNoticed: as long as before, with other records.
func TestALogThatGrewBackIsNoticed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.close()
	old := copyTree(t, w.cfg.DataDir+"/authority/log")
	w.open()
	a, cert := w.attest(agentA)
	if _, err := issue(t, a, item(t, byUID(server.PodUID))); err != nil {
		t.Fatal(err)
	}
	if err := w.SignHead(t.Context()); err != nil {
		t.Fatal(err)
	}
	head, _ := w.Log().SignedHead()
	w.close()
	restoreTree(t, old, w.cfg.DataDir+"/authority/log")
	w.open()
	a = w.dial(cert)
	for w.Log().Head().Sequence <= head.Sequence {
		if _, err := issue(t, a, item(t, byUID(server.PodUID))); err != nil {
			t.Fatal(err)
		}
	}
	if same, known, err := w.Log().Holds(t.Context(), head); same || !known || err != nil {
		t.Errorf("the log says that it holds a foreign head: %v, %v", same, known)
	}
	if same, known, err := w.Log().Holds(t.Context(), w.Log().Head()); !same || !known || err != nil {
		t.Errorf("the log does not know its own head: %v, %v", same, known)
	}
	s, err := a.WatchTrust(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&capb.WatchTrustRequest{LogHeads: []*capb.LogHead{{Instance: head.Instance, Sequence: head.Sequence, Hash: head.Hash[:],
		Time: timestamppb.New(head.Time), Signature: head.Signature}}}); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(time.Minute)
	for w.Ready() == nil && time.Now().Before(deadline) {
		if err := s.Send(&capb.WatchTrustRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Ready(); err == nil || !strings.Contains(err.Error(), "lost records") {
		t.Errorf("not noticed: %v", err)
	}
}
