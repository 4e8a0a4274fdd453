package ca_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/storagetest"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
)

func withCRL(c *ca.Config) { c.CRL.Enabled = true }

// revoked reports whether the lists that agents get say that a certificate is revoked;
// there has to be one of its issuer, good now and signed by it.
func (w *world) revoked(chain []*x509.Certificate) bool {
	w.t.Helper()
	trust, _ := w.Trust()
	for _, list := range trust.CRLs() {
		if !bytes.Equal(list.AuthorityKeyId, chain[0].AuthorityKeyId) {
			continue
		}
		if err := list.CheckSignatureFrom(chain[1]); err != nil {
			w.t.Errorf("the list's signature: %v", err)
		}
		if now := time.Now(); now.Before(list.ThisUpdate) || !now.Before(list.NextUpdate) {
			w.t.Errorf("the list is good from %v to %v, and it is %v", list.ThisUpdate, list.NextUpdate, now)
		}
		return slices.ContainsFunc(list.RevokedCertificateEntries, func(e x509.RevocationListEntry) bool { return e.SerialNumber.Cmp(chain[0].SerialNumber) == 0 })
	}
	w.t.Errorf("there is no list of the issuer of %x", chain[0].SerialNumber)
	return false
}

func TestRevoke(t *testing.T) {
	t.Parallel()
	w := newWorld(t, withCRL)
	agent, cert := w.attest(agentA)
	one, other := w.leaf(agent), w.leaf(agent)
	op := w.admin()
	before, changed := w.Trust()
	resp, err := op.Revoke(t.Context(), &capb.RevokeRequest{Serial: ca.Serial(one[0]), Reason: 1, Comment: "a laptop"})
	if err != nil {
		t.Fatal(err)
	}
	after, _ := w.Trust()
	select {
	case <-changed:
	default:
		t.Error("agents were not told")
	}
	if resp.GetCrlNumber() != after.Sequence() || after.Sequence() <= before.Sequence() || resp.GetAlready() || !strings.HasPrefix(resp.GetRevocation().GetBy(), "uid ") {
		t.Errorf("%v; the sequence was %d and is %d", resp, before.Sequence(), after.Sequence())
	}
	if !w.revoked(one) || w.revoked(other) {
		t.Error("the list has not the one that was revoked alone")
	}
	if again, err := op.Revoke(t.Context(), &capb.RevokeRequest{Serial: ca.Serial(one[0]), Reason: 4}); err != nil || !again.GetAlready() || again.GetRevocation().GetReason() != 1 || again.GetCrlNumber() != resp.GetCrlNumber() {
		t.Errorf("again: %v, %v", again, err)
	}
	for name, c := range map[string]struct {
		serial []byte
		reason uint32
		want   codes.Code
	}{
		"a serial that nobody has": {append([]byte{1}, make([]byte, 16)...), 1, codes.NotFound},
		"half a serial":            {ca.Serial(other[0])[:8], 1, codes.NotFound},
		"none":                     {nil, 1, codes.NotFound},
		"the intermediate":         {ca.Serial(other[1]), 2, codes.FailedPrecondition},
		"the root":                 {ca.Serial(w.Root()), 2, codes.FailedPrecondition},
		"a hold":                   {ca.Serial(other[0]), 6, codes.FailedPrecondition},
		"a reason of a byte more":  {ca.Serial(other[0]), 257, codes.FailedPrecondition},
	} {
		if _, err := op.Revoke(t.Context(), &capb.RevokeRequest{Serial: c.serial, Reason: c.reason}); status.Code(err) != c.want {
			t.Errorf("%s: %v", name, err)
		}
	}

	// An agent's SVID: its streams end, and it is refused.
	s, err := agent.WatchTrust(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m, err := s.Recv()
	if err != nil || len(m.GetTrust().GetCrls()) != 1 {
		t.Fatalf("%v, %v", m, err)
	}
	if _, err := op.Revoke(t.Context(), &capb.RevokeRequest{Serial: ca.Serial(cert.Leaf)}); err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = s.Recv()
	}
	if status.Code(err) != codes.Unauthenticated && status.Code(err) != codes.PermissionDenied {
		t.Errorf("the stream of a revoked agent: %v", err)
	}
	if rs, err := issue(t, agent, item(t, byUID(server.PodUID))); err == nil {
		t.Errorf("a revoked agent gets %v", rs)
	}
	if _, err := issue(t, w.dial(cert), item(t, byUID(server.PodUID))); err == nil {
		t.Error("a revoked agent connects")
	}
	if problems, err := w.VerifyAll(t.Context()); err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}

	// After a restart it is as before, with a list of a higher number.
	number := w.number()
	w.close()
	w.open()
	if !w.revoked(one) || w.number() <= number {
		t.Errorf("after a restart; the number was %d and is %d", number, w.number())
	}
	all, err := w.admin().Revocations(t.Context(), &capb.RevocationsRequest{})
	if err != nil || len(all.GetRevocations()) != 2 || len(all.GetCrls()) != 1 ||
		!slices.ContainsFunc(all.GetRevocations(), func(r *capb.Revocation) bool { return r.GetComment() == "a laptop" }) {
		t.Errorf("%v, %v", all, err)
	}
	// Where none is published any more, none is left that could be taken for one.
	w.close()
	w.cfg.CRL.Enabled = false
	w.open()
	trust, _ := w.Trust()
	if len(trust.CRLs()) != 0 || len(w.CRLs()) != 0 || trust.Sequence() <= number {
		t.Errorf("%d lists, sequence %d", len(trust.CRLs()), trust.Sequence())
	}
	if _, err := issue(t, w.dial(cert), item(t, byUID(server.PodUID))); err == nil {
		t.Error("without lists a revoked agent connects")
	}
}

// number is that of the list of the active intermediate.
func (w *world) number() uint64 {
	w.t.Helper()
	trust, _ := w.Trust()
	for _, c := range trust.CRLs() {
		if bytes.Equal(c.AuthorityKeyId, w.Intermediate().SubjectKeyId) {
			return c.Number.Uint64()
		}
	}
	w.t.Fatal("there is no list of the active intermediate")
	return 0
}

// TestRevocationFaults: each write of a revocation and its list is lost, or lands and
// is reported failed; then the authority is opened again. What was confirmed or is in
// the log is revoked, no number is given to two lists, and all verifies.
func TestRevocationFaults(t *testing.T) {
	t.Parallel()
	runs := 0
	for _, where := range []string{"log", "state"} {
		for _, fault := range []string{"lost", "landed, reported failed"} {
			for n := 0; ; n++ {
				name := fmt.Sprintf("%s: write %d %s", where, n, fault)
				f := &faultyWrite{where: where, fault: fault, n: n}
				w := newWorld(t, withCRL, f.configure)
				agent, _ := w.attest(agentA)
				chain := w.leaf(agent)
				seen := map[string][]byte{}
				note := func() {
					trust, _ := w.Trust()
					for _, c := range trust.CRLs() {
						key := fmt.Sprintf("%x %v", c.AuthorityKeyId, c.Number)
						if old := seen[key]; old != nil && !bytes.Equal(old, c.Raw) {
							t.Errorf("%s: two lists with number %v", name, c.Number)
						}
						seen[key] = c.Raw
					}
				}
				note()
				op := w.admin()
				f.arm()
				_, err := op.Revoke(t.Context(), &capb.RevokeRequest{Serial: ca.Serial(chain[0]), Reason: 1})
				f.disarm()
				note()
				w.reopen()
				note()
				logged := false
				for r := range records(w) {
					logged = logged || bytes.Equal(r.GetDecision().GetRevoked().GetSerial(), ca.Serial(chain[0]))
				}
				if err == nil && !logged {
					t.Errorf("%s: confirmed, and not in the log", name)
				}
				if got := w.revoked(chain); got != logged {
					t.Errorf("%s: in the log %v, on the list %v", name, logged, got)
				}
				if problems, err := w.VerifyAll(t.Context()); err != nil || len(problems) > 0 {
					t.Errorf("%s: %v, %v", name, problems, err)
				}
				if _, err := w.admin().Revoke(t.Context(), &capb.RevokeRequest{Serial: ca.Serial(chain[0]), Reason: 1}); err != nil || !w.revoked(chain) {
					t.Errorf("%s: tried again: %v", name, err)
				}
				note()
				w.close()
				runs++
				if !f.hit {
					break
				}
			}
		}
	}
	t.Logf("%d runs", runs)
	if runs < 10 {
		t.Errorf("only %d runs", runs)
	}
}

// TestARestoreLosesNoRevocation, not even one that was in the log alone when the
// backup was made, and uses no number again.
func TestARestoreLosesNoRevocation(t *testing.T) {
	t.Parallel()
	fail := false
	w := newWorld(t, withCRL, func(c *ca.Config) {
		c.StoreOptions.Hook = func(landed bool) error {
			if fail && !landed {
				return storagetest.ErrInjected
			}
			return nil
		}
	})
	agent, _ := w.attest(agentA)
	stored, logged := w.leaf(agent), w.leaf(agent)
	op := w.admin()
	if _, err := op.Revoke(t.Context(), &capb.RevokeRequest{Serial: ca.Serial(stored[0]), Reason: 1}); err != nil {
		t.Fatal(err)
	}
	fail = true
	if _, err := op.Revoke(t.Context(), &capb.RevokeRequest{Serial: ca.Serial(logged[0]), Reason: 1}); err == nil {
		t.Fatal("a revocation was confirmed that is not stored")
	}
	b := w.backup(op)
	fail = false
	number := w.number()
	w.close()
	keys := filepath.Join(w.cfg.DataDir, "authority/keys")
	w.cfg.DataDir = emptyDir(t)
	r, err := ca.Restore(t.Context(), ca.RestoreConfig{Backup: bytes.NewReader(b), DataDir: w.cfg.DataDir, KeysDir: keys})
	if err != nil {
		t.Fatal(err)
	}
	w.cfg.Instance = r.Instance
	w.open()
	if !w.revoked(stored) || !w.revoked(logged) {
		t.Errorf("revoked after the restore: %v, %v", w.revoked(stored), w.revoked(logged))
	}
	if n := w.number(); n <= number+1<<16 {
		t.Errorf("number %d after the restore, %d before", n, number)
	}
	if problems, err := w.VerifyAll(t.Context()); err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
}

// TestVerificationFindsARevocationThatNobodyDecided, and one that is another than
// what was decided.
func TestVerificationFindsARevocationThatNobodyDecided(t *testing.T) {
	t.Parallel()
	w := newWorld(t, withCRL)
	agent, _ := w.attest(agentA)
	chain := w.leaf(agent)
	if _, err := w.admin().Revoke(t.Context(), &capb.RevokeRequest{Serial: ca.Serial(chain[0]), Reason: 1}); err != nil {
		t.Fatal(err)
	}
	key := "revoked/" + hex.EncodeToString(ca.Serial(chain[0]))
	e, err := w.Store().Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	other := bytes.Clone(ca.Serial(chain[0]))
	other[16] ^= 1
	forged := strings.Replace(string(e.Value), b64(ca.Serial(chain[0])), b64(other), 1)
	put(t, w.Store(), "revoked/"+hex.EncodeToString(other), forged)
	expect(t, w, "no record of the issuance log says so")
	put(t, w.Store(), "revoked/"+hex.EncodeToString(other), "")
	put(t, w.Store(), key, strings.Replace(string(e.Value), `"reason":1`, `"reason":4`, 1))
	expect(t, w, "is not what the state says")
	put(t, w.Store(), key, string(e.Value))
	list, err := w.Store().Get(t.Context(), "crl/"+hex.EncodeToString(chain[0].AuthorityKeyId))
	if err != nil {
		t.Fatal(err)
	}
	list.Value[len(list.Value)-1] ^= 1
	put(t, w.Store(), list.Key, string(list.Value))
	expect(t, w, "CRL")
}

// bubbleAdmin connects as an operator without a socket, on which fake time would wait.
func (w *world) bubbleAdmin() (op capb.AdminClient, end func()) {
	w.t.Helper()
	l := bufconn.Listen(1 << 16)
	s := w.NewAdminServer()
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	conn := must(grpc.NewClient("passthrough:///admin", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) })))
	return capb.NewAdminClient(conn), func() { conn.Close(); s.Stop(); <-done }
}

func b64(b []byte) string { return base64.StdEncoding.EncodeToString(b) }

// put writes an entry behind the authority's back; "" deletes it.
func put(t testing.TB, s storage.Store, key, value string) {
	t.Helper()
	op := storage.Op{Key: key, Value: []byte(value), Delete: value == ""}
	if op.Delete {
		op.Value = nil
	}
	if _, err := s.Commit(t.Context(), nil, []storage.Op{op}); err != nil {
		t.Fatal(err)
	}
}

func expect(t testing.TB, w *world, problem string) {
	t.Helper()
	problems, err := w.VerifyAll(t.Context())
	if err != nil || len(problems) == 0 || !strings.Contains(strings.Join(problems, "\n"), problem) {
		t.Errorf("%q is not found: %q, %v", problem, problems, err)
	}
}

// TestListsAreNeverLate: for thirty hours an agent that acknowledges finds a good list
// of the issuer of each certificate, in what it had acknowledged before; entries go.
func TestListsAreNeverLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, withCRL, func(c *ca.Config) {
			c.HeadInterval, c.SVID.AgentTTL, c.SVID.MaxTTL, c.IntermediateTTL = time.Hour, 2*time.Hour, 4*time.Hour, 12*time.Hour
		})
		defer w.close()
		defer w.run()()
		acknowledged := map[string]bool{}
		issuers, numbers := map[string]bool{}, uint64(0)
		for hour := range 30 {
			agent, _ := w.attest(agentA)
			s, err := agent.WatchTrust(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			m, err := s.Recv()
			if err != nil {
				t.Fatal(err)
			}
			chain := w.leaf(agent)
			id := string(chain[0].AuthorityKeyId)
			if hour > 0 && !acknowledged[id] {
				t.Errorf("hour %d: the issuer of %x is used before its list was acknowledged", hour, chain[0].SerialNumber)
			}
			issuers[id] = true
			acknowledged = map[string]bool{}
			for _, der := range m.GetTrust().GetCrls() {
				list := must(x509.ParseRevocationList(der))
				acknowledged[string(list.AuthorityKeyId)] = true
				if left := time.Until(list.NextUpdate); left < 4*time.Hour-time.Minute && string(list.AuthorityKeyId) == id {
					t.Errorf("hour %d: the list has %v left", hour, left)
				}
				if list.Number.Uint64() < numbers {
					t.Errorf("hour %d: number %v after %d", hour, list.Number, numbers)
				}
				numbers = max(numbers, list.Number.Uint64())
			}
			if hour == 5 {
				op, end := w.bubbleAdmin()
				if _, err := op.Revoke(t.Context(), &capb.RevokeRequest{Serial: ca.Serial(chain[0])}); err != nil {
					t.Fatal(err)
				}
				end()
			}
			if err := s.Send(&capb.WatchTrustRequest{Acknowledged: m.GetTrust().GetSequence()}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Hour)
		}
		if len(issuers) < 4 {
			t.Errorf("%d intermediates in thirty hours", len(issuers))
		}
		if err := w.Ready(); err != nil {
			t.Error(err)
		}
		if all, _, err := w.Store().List(t.Context(), "revoked/"); err != nil || len(all) != 0 {
			t.Errorf("what expired long ago is still revoked: %v, %v", all, err)
		}
	})
}

// TestAnIntermediateIsNotUsedBeforeItsList: an agent that does not acknowledge is waited
// for, over a restart too, until the present intermediate is about to end.
func TestAnIntermediateIsNotUsedBeforeItsList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, withCRL, func(c *ca.Config) { c.HeadInterval, c.SVID.AgentTTL = time.Hour, 24*time.Hour })
		defer w.close()
		stop := w.run()
		agent, _ := w.attest(agentA)
		s, err := agent.WatchTrust(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		m, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		first := w.Intermediate()
		if err := s.Send(&capb.WatchTrustRequest{Acknowledged: m.GetTrust().GetSequence()}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * 24 * time.Hour) // before half of its life; the agent's SVID is another by then
		_, cert := w.attest(agentA)
		time.Sleep(14 * time.Hour)
		trust, _ := w.Trust()
		if !w.Intermediate().Equal(first) || len(trust.CRLs()) != 2 {
			t.Fatalf("after half of its life: taken %v, %d lists", !w.Intermediate().Equal(first), len(trust.CRLs()))
		}
		stop()
		w.close()
		w.open()
		stop = w.run()
		defer func() { stop() }()
		trust, _ = w.Trust()
		if !w.Intermediate().Equal(first) || len(trust.CRLs()) != 2 {
			t.Errorf("after a restart: taken %v, %d lists", !w.Intermediate().Equal(first), len(trust.CRLs()))
		}
		if s, err = w.dial(cert).WatchTrust(t.Context()); err == nil {
			m, err = s.Recv()
		}
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		if !w.Intermediate().Equal(first) {
			t.Error("it was taken although the agent did not acknowledge")
		}
		if err := s.Send(&capb.WatchTrustRequest{Acknowledged: m.GetTrust().GetSequence()}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute)
		if w.Intermediate().Equal(first) {
			t.Error("it was not taken although all acknowledged")
		}
	})
}
