package ca_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

func (w *world) ban(op capb.AdminClient, subject string) *capb.AddBanResponse {
	w.t.Helper()
	resp, err := op.AddBan(w.t.Context(), &capb.AddBanRequest{Subject: subject, Reason: "a laptop"})
	if err != nil {
		w.t.Fatalf("%s: %v", subject, err)
	}
	if resp.GetPending() != "" {
		w.t.Errorf("%s: pending: %s", subject, resp.GetPending())
	}
	return resp
}

func (w *world) unban(op capb.AdminClient, subject string) {
	w.t.Helper()
	if _, err := op.RemoveBan(w.t.Context(), &capb.RemoveBanRequest{Subject: subject, Reason: "found again"}); err != nil {
		w.t.Fatalf("%s: %v", subject, err)
	}
}

// decisions are what the log says of bans: subject, what, reason.
func (w *world) decisions() (out []string) {
	w.t.Helper()
	for r := range records(w) {
		if b := r.GetDecision().GetBan(); b != nil {
			out = append(out, fmt.Sprintf("%s %s %q", b.GetSubject(), r.GetDecision().GetWhat(), r.GetDecision().GetReason()))
		}
	}
	return out
}

func TestABannedIDIsIssuedNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	agent, _ := w.attest(agentA)
	op := w.admin()
	byToken := func() (*capb.IssueResult, error) {
		rs, err := issue(t, agent, item(t, byToken(w.issuer.Token(server, "signet"))))
		if err != nil {
			return nil, err
		}
		return rs[0], nil
	}
	for _, ban := range []string{"spiffe://cluster.local/ns/default/sa/server", "spiffe://cluster.local/ns/default/*"} {
		resp := w.ban(op, ban)
		if b := resp.GetBan(); b.GetSubject() != ban || b.GetReason() != "a laptop" || !strings.HasPrefix(b.GetBy(), "uid ") || b.GetUntil() != nil || resp.GetChanged() {
			t.Errorf("%v", resp)
		}
		rs, err := issue(t, agent, item(t, byUID(server.PodUID)), item(t, byUID(client.PodUID)))
		if err != nil {
			t.Fatal(err)
		}
		if f := rs[0].GetRefusal(); f.GetCode() != capb.Refusal_CODE_BANNED || f.GetRetryAfter().AsDuration() <= 0 || strings.Contains(f.GetMessage(), "laptop") {
			t.Errorf("%s: %v", ban, rs[0])
		}
		if below := strings.HasSuffix(ban, "*"); (rs[1].GetX509() == nil) != below {
			t.Errorf("%s: the other: %v", ban, rs[1])
		}
		if r, err := byToken(); err != nil || r.GetRefusal().GetCode() != capb.Refusal_CODE_BANNED {
			t.Errorf("%s, with a token: %v, %v", ban, r, err)
		}
		_, err = w.Issue(t.Context(), ca.Order{Door: "test", Workload: server, Evidence: capb.IssuanceRecord_EVIDENCE_TOKEN, PublicKey: public(t)})
		if err == nil || !strings.Contains(err.Error(), ca.ErrBanned.Error()) {
			t.Errorf("%s, at a door: %v", ban, err)
		}
		w.unban(op, ban)
		if r, err := byToken(); err != nil || r.GetX509() == nil {
			t.Errorf("%s, removed: %v, %v", ban, r, err)
		}
	}
	want := []string{
		`spiffe://cluster.local/ns/default/sa/server WHAT_BANNED "a laptop"`, `spiffe://cluster.local/ns/default/sa/server WHAT_BAN_ENDED "found again"`,
		`spiffe://cluster.local/ns/default/* WHAT_BANNED "a laptop"`, `spiffe://cluster.local/ns/default/* WHAT_BAN_ENDED "found again"`,
	}
	if got := w.decisions(); !slices.Equal(got, want) {
		t.Errorf("the log says\n%s", strings.Join(got, "\n"))
	}
	if problems, err := w.VerifyAll(t.Context()); err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
}

func TestABannedNode(t *testing.T) {
	t.Parallel()
	for _, crl := range []bool{false, true} {
		w := newWorld(t, func(c *ca.Config) { c.CRL.Enabled = crl })
		agent, cert := w.attest(agentA)
		other, otherCert := w.attest(agentB)
		chain := w.leaf(agent)
		rs, err := issue(t, other, item(t, byUID(onNodeB.PodUID)))
		if err != nil || rs[0].GetX509() == nil {
			t.Fatal(rs, err)
		}
		watch, err := other.WatchTrust(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if m, err := watch.Recv(); err != nil || m.GetBans() == nil || len(m.GetBans().GetBans()) != 0 {
			t.Fatalf("at first: %v, %v", m, err)
		}
		cut, err := agent.WatchNode(t.Context(), &capb.WatchNodeRequest{})
		if err != nil {
			t.Fatal(err)
		}
		op := w.admin()
		resp := w.ban(op, "node/node-a")
		if n := resp.GetBan().GetSerials(); n != 2 {
			t.Errorf("%d certificates are banned with the node; the agent's and the pod's are 2", n)
		}
		if crl && (resp.GetRevoked() != 2 || !w.revoked(chain)) || !crl && resp.GetRevoked() != 0 {
			t.Errorf("crl %v: %d revoked", crl, resp.GetRevoked())
		}
		for err == nil {
			_, err = cut.Recv()
		}
		if c := status.Code(err); c != codes.Unauthenticated && c != codes.PermissionDenied {
			t.Errorf("a stream of the node: %v", err)
		}
		if rs, err := issue(t, agent, item(t, byUID(server.PodUID))); err == nil {
			t.Errorf("the node's agent gets %v", rs)
		}
		if _, err := issue(t, w.dial(cert), item(t, byUID(server.PodUID))); err == nil {
			t.Error("the node's agent connects")
		}
		if _, err := w.tryAttest(w.dial(nil), func(r *capb.AttestRequest) {
			r.Evidence = &capb.AttestRequest_Token{Token: w.issuer.Token(agentA, "signet-ca")}
		}); status.Code(err) != codes.PermissionDenied {
			t.Errorf("the node's agent attests: %v", err)
		}
		if _, err := w.Issue(t.Context(), ca.Order{Door: "test", Workload: server, Evidence: capb.IssuanceRecord_EVIDENCE_TOKEN, PublicKey: public(t)}); err == nil {
			t.Error("a pod of the node at a door")
		}
		// The other node goes on, and learns of it.
		if rs, err := issue(t, w.dial(otherCert), item(t, byUID(onNodeB.PodUID))); err != nil || rs[0].GetX509() == nil {
			t.Errorf("the other node: %v, %v", rs, err)
		}
		for {
			m, err := watch.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if b := m.GetBans().GetBans(); len(b) == 1 && b[0].GetNode() == "node-a" && len(b[0].GetSerials()) == 2 && m.GetBans().GetNow() != nil {
				break
			}
		}
		// After a restart it is as before.
		w.close()
		w.open()
		if _, err := issue(t, w.dial(cert), item(t, byUID(server.PodUID))); err == nil {
			t.Error("after a restart the node's agent connects")
		}
		op = w.admin()
		list, err := op.ListBans(t.Context(), &capb.ListBansRequest{})
		if err != nil || len(list.GetBans()) != 1 || list.GetBans()[0].GetSerials() != 2 {
			t.Errorf("after a restart: %v, %v", list, err)
		}
		w.unban(op, "node/node-a")
		if _, err := issue(t, w.dial(cert), item(t, byUID(server.PodUID))); (err == nil) == crl {
			t.Errorf("crl %v; removed: %v: what is revoked stays so, and nothing else does", crl, err)
		}
		if _, c := w.attest(agentA); c == nil {
			t.Error("the agent cannot attest again")
		}
		if problems, err := w.VerifyAll(t.Context()); err != nil || len(problems) > 0 {
			t.Errorf("%v, %v", problems, err)
		}
		w.close()
	}
}

func TestABannedSerial(t *testing.T) {
	t.Parallel()
	w := newWorld(t, withCRL)
	agent, cert := w.attest(agentA)
	chain := w.leaf(agent)
	op := w.admin()
	resp := w.ban(op, fmt.Sprintf("serial/%x", ca.Serial(chain[0])))
	if b := resp.GetBan(); b.GetSpiffeId() != "spiffe://cluster.local/ns/default/sa/server" || !b.GetUntil().AsTime().Equal(chain[0].NotAfter) || resp.GetRevoked() != 1 || !w.revoked(chain) {
		t.Errorf("%v", resp)
	}
	// A certificate that is not from here is banned too, on no list.
	if resp := w.ban(op, "serial/7700"); resp.GetRevoked() != 0 || resp.GetBan().GetUntil() != nil {
		t.Errorf("%v", resp)
	}
	w.ban(op, fmt.Sprintf("serial/%x", ca.Serial(cert.Leaf)))
	if _, err := issue(t, w.dial(cert), item(t, byUID(server.PodUID))); err == nil {
		t.Error("an agent with a banned SVID connects")
	}
	if _, fresh := w.attest(agentA); fresh == nil {
		t.Error("the agent gets no other")
	}
	// Renewals on the strength of a banned certificate, at any door.
	_, err := w.Issue(t.Context(), ca.Order{Door: "test", Workload: server, Evidence: capb.IssuanceRecord_EVIDENCE_RENEWAL, Requester: ca.Serial(chain[0]), PublicKey: public(t)})
	if err == nil || !strings.Contains(err.Error(), ca.ErrBanned.Error()) {
		t.Errorf("%v", err)
	}
}

func TestWhatCannotBeBanned(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	agent, _ := w.attest(agentA)
	chain := w.leaf(agent)
	op := w.admin()
	past := timestamppb.New(time.Now().Add(-time.Second))
	for name, q := range map[string]*capb.AddBanRequest{
		"everybody":                   {Subject: "spiffe://cluster.local/*", Reason: "r"},
		"every workload":              {Subject: "spiffe://cluster.local/ns/*", Reason: "r"},
		"the agents":                  {Subject: "spiffe://cluster.local/signet/*", Reason: "r"},
		"an agent by name":            {Subject: "spiffe://cluster.local/signet/agent/node-a", Reason: "r"},
		"the authority":               {Subject: "spiffe://cluster.local/signet/ca/1", Reason: "r"},
		"the intermediate":            {Subject: fmt.Sprintf("serial/%x", ca.Serial(chain[1])), Reason: "r"},
		"no reason":                   {Subject: "node/x"},
		"a long reason":               {Subject: "node/x", Reason: strings.Repeat("x", 501)},
		"the past":                    {Subject: "node/x", Reason: "r", Until: past},
		"no time":                     {Subject: "node/x", Reason: "r", Until: &timestamppb.Timestamp{Nanos: -1}},
		"nobody":                      {Reason: "r"},
		"what cannot be read":         {Subject: "spiffe://cluster.local/ns/a*", Reason: "r"},
		"a kind that does not exist":  {Subject: "pod/x", Reason: "r"},
		"a name beside a path's star": {Subject: "spiffe://cluster.local/ns/*/sa/x", Reason: "r"},
	} {
		if resp, err := op.AddBan(t.Context(), q); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v, %v", name, resp, err)
		}
	}
	if _, err := op.RemoveBan(t.Context(), &capb.RemoveBanRequest{Subject: "node/x", Reason: "r"}); status.Code(err) != codes.NotFound {
		t.Errorf("removed what is not banned: %v", err)
	}
	// Another trust domain's, all of it; and a name that only begins like ours.
	w.ban(op, "spiffe://other/*")
	w.ban(op, "spiffe://cluster.localhost/*")
	w.ban(op, "node/nobody-has-seen-it")
	if got := len(w.decisions()); got != 3 {
		t.Errorf("%d decisions", got)
	}
}

func TestBansEndAndChange(t *testing.T) {
	t.Parallel()
	synctest.Test(t, testBansEndAndChange)
}

func testBansEndAndChange(t *testing.T) {
	w := newWorld(t)
	defer w.run()()
	agent, _ := w.attest(agentA)
	op, end := w.bubbleAdmin()
	defer end()
	const id = "spiffe://cluster.local/ns/default/sa/server"
	w.ban(op, id)
	resp, err := op.AddBan(t.Context(), &capb.AddBanRequest{Subject: id, Reason: "for a moment", Until: timestamppb.New(time.Now().Add(1500 * time.Millisecond))})
	if err != nil || !resp.GetChanged() || resp.GetBan().GetReason() != "for a moment" {
		t.Fatalf("%v, %v", resp, err)
	}
	if rs, err := issue(t, agent, item(t, byUID(server.PodUID))); err != nil || rs[0].GetRefusal().GetCode() != capb.Refusal_CODE_BANNED {
		t.Errorf("%v, %v", rs, err)
	}
	until(t, func() bool {
		rs, err := issue(t, agent, item(t, byUID(server.PodUID)))
		return err == nil && rs[0].GetX509() != nil
	})
	all, err := op.ListBans(t.Context(), &capb.ListBansRequest{All: true})
	if now, err := op.ListBans(t.Context(), &capb.ListBansRequest{}); err != nil || len(now.GetBans()) != 0 {
		t.Errorf("%v, %v", now, err)
	}
	if err != nil || len(all.GetBans()) != 1 || all.GetBans()[0].GetEnded().GetBy() != "spiffe://cluster.local/signet/ca/1" {
		t.Errorf("%v, %v", all, err)
	}
	until(t, func() bool { return len(w.decisions()) == 3 })
}

// until waits for what comes by itself.
func until(t *testing.T, f func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !f(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it did not come")
		}
	}
}

// TestIssuingWhileANodeIsBanned: of what was issued at any moment before the ban, none
// is left out.
func TestIssuingWhileANodeIsBanned(t *testing.T) {
	t.Parallel()
	for range 3 {
		w := newWorld(t)
		agent, _ := w.attest(agentA)
		op := w.admin()
		ctx, cancel := context.WithCancel(t.Context())
		issued := make(chan [][]byte, 4)
		for range 4 {
			go func() {
				var serials [][]byte
				defer func() { issued <- serials }()
				for ctx.Err() == nil {
					rs, err := issue(t, agent, item(t, byUID(server.PodUID)))
					if err != nil {
						return
					}
					if x := rs[0].GetX509(); x != nil {
						serials = append(serials, ca.Serial(parse(t, x.GetChain()[0])))
					}
				}
			}()
		}
		until(t, func() bool { return w.Log().Head().Sequence > 30 })
		resp := w.ban(op, "node/node-a")
		cancel()
		n := 0
		for range 4 {
			for _, s := range <-issued {
				n++
				if !w.Banned(s) {
					t.Errorf("%x was issued and is not banned", s)
				}
			}
		}
		if n == 0 || int(resp.GetBan().GetSerials()) < n {
			t.Errorf("%d were issued, %d are banned", n, resp.GetBan().GetSerials())
		}
		w.close()
	}
}

// TestBanFaults: each write of a ban and of its removal is lost, or lands and is
// reported failed; then the authority is opened again. What was confirmed is so, and
// both are in the log in the end.
func TestBanFaults(t *testing.T) {
	t.Parallel()
	runs := 0
	for _, remove := range []bool{false, true} {
		for _, where := range []string{"log", "state"} {
			for _, fault := range []string{"lost", "landed, reported failed"} {
				for n := 0; ; n++ {
					name := fmt.Sprintf("remove %v, %s: write %d %s", remove, where, n, fault)
					f := &faultyWrite{where: where, fault: fault, n: n}
					w := newWorld(t, f.configure)
					agent, _ := w.attest(agentA)
					w.leaf(agent)
					op := w.admin()
					if remove {
						w.ban(op, "node/node-a")
					}
					f.arm()
					var err error
					if remove {
						_, err = op.RemoveBan(t.Context(), &capb.RemoveBanRequest{Subject: "node/node-a", Reason: "r"})
					} else {
						_, err = op.AddBan(t.Context(), &capb.AddBanRequest{Subject: "node/node-a", Reason: "r"})
					}
					f.disarm()
					w.reopen()
					bans, lerr := w.admin().ListBans(t.Context(), &capb.ListBansRequest{})
					if lerr != nil {
						t.Fatal(lerr)
					}
					isBanned := len(bans.GetBans()) == 1
					if err == nil && isBanned == remove {
						t.Errorf("%s: confirmed, and after a restart banned is %v", name, isBanned)
					}
					if err := w.TendBans(t.Context()); err != nil {
						t.Errorf("%s: %v", name, err)
					}
					log := w.decisions()
					last := ""
					if len(log) > 0 {
						last = log[len(log)-1]
					}
					if got := strings.Contains(last, "WHAT_BANNED"); got != isBanned {
						t.Errorf("%s: banned is %v, the log ends with %q", name, isBanned, last)
					}
					if isBanned && !w.Banned(w.lastSerial("node-a")) {
						t.Errorf("%s: the node's certificates are not banned", name)
					}
					if problems, err := w.VerifyAll(t.Context()); err != nil || len(problems) > 0 {
						t.Errorf("%s: %v, %v", name, problems, err)
					}
					w.close()
					runs++
					if !f.hit {
						break
					}
				}
			}
		}
	}
	if runs < 16 {
		t.Errorf("only %d runs", runs)
	}
}

func TestAgentsSayWhichBansTheyEnforce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	agent, _ := w.attest(agentA)
	s, err := agent.WatchTrust(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	op := w.admin()
	resp := w.ban(op, "spiffe://cluster.local/ns/x/*")
	state := func() *capb.BanAgent {
		l, err := op.ListBans(t.Context(), &capb.ListBansRequest{})
		if err != nil || len(l.GetAgents()) != 1 {
			t.Fatal(l, err)
		}
		return l.GetAgents()[0]
	}
	until(t, func() bool { return state().GetConnected() })
	if g := state(); g.GetRevision() != 0 || g.GetNode() != "node-a" {
		t.Errorf("%v", g)
	}
	for {
		m, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if b := m.GetBans(); b.GetRevision() >= resp.GetRevision() {
			if len(b.GetBans()) != 1 || b.GetBans()[0].GetSpiffeIdPrefix() != "spiffe://cluster.local/ns/x" {
				t.Errorf("%v", b)
			}
			if err := s.Send(&capb.WatchTrustRequest{BansRevision: b.GetRevision(), BansUnread: 1}); err != nil {
				t.Fatal(err)
			}
			break
		}
	}
	until(t, func() bool { g := state(); return g.GetRevision() >= resp.GetRevision() && g.GetUnread() == 1 })
	// What did not change is not sent again.
	if err := w.SignHead(t.Context()); err != nil {
		t.Fatal(err)
	}
	for {
		m, err := s.Recv()
		if err != nil || m.GetBans() != nil {
			t.Fatalf("%v, %v", m.GetBans(), err)
		}
		if m.GetLogHead() != nil {
			break
		}
	}
}

// public is a fresh key.
func public(t *testing.T) crypto.PublicKey {
	t.Helper()
	key, _ := newKey(t)
	return key.Public()
}

func parse(t *testing.T, der []byte) *x509.Certificate {
	t.Helper()
	return must(x509.ParseCertificate(der))
}

// lastSerial is that of the last certificate that was recorded for a node.
func (w *world) lastSerial(node string) (serial []byte) {
	w.t.Helper()
	for r := range records(w) {
		if r.GetNode() == node {
			serial = r.GetSerial()
		}
	}
	return serial
}

// TestABanOfANodeRevokesWhatItRecorded: whatever write fails, a certificate that the log
// has as revoked is revoked at once, and not from the next start on.
func TestABanOfANodeRevokesWhatItRecorded(t *testing.T) {
	t.Parallel()
	runs, revoked := 0, 0
	for n := 0; ; n++ {
		f := &faultyWrite{where: "state", fault: "lost", n: n}
		w := newWorld(t, withCRL, f.configure)
		agent, _ := w.attest(agentA)
		w.leaf(agent)
		op := w.admin()
		f.arm()
		_, _ = op.AddBan(t.Context(), &capb.AddBanRequest{Subject: "node/node-a", Reason: "r"})
		f.disarm()
		resp, err := op.Revocations(t.Context(), &capb.RevocationsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for r := range records(w) {
			serial := r.GetDecision().GetRevoked().GetSerial()
			if serial == nil {
				continue
			}
			revoked++
			if !slices.ContainsFunc(resp.GetRevocations(), func(x *capb.Revocation) bool { return bytes.Equal(x.GetSerial(), serial) }) {
				t.Errorf("write %d failed: %x is recorded as revoked, and is not", n, serial)
			}
		}
		w.close()
		runs++
		if !f.hit {
			break
		}
	}
	if runs < 4 || revoked == 0 {
		t.Errorf("%d runs, %d certificates revoked", runs, revoked)
	}
}

// TestABanOutlivesWhoAskedForIt: the client leaves between the commit and its being read
// back; and where it cannot be read back then, it is soon.
func TestABanOutlivesWhoAskedForIt(t *testing.T) {
	t.Parallel()
	var leave context.CancelFunc
	w := newWorld(t, func(c *ca.Config) {
		c.StoreOptions.Hook = func(landed bool) error {
			if landed && leave != nil {
				leave()
			}
			return nil
		}
	})
	a, _ := w.attest(agentA)
	ctx, cancel := context.WithCancel(t.Context())
	leave = cancel
	err := w.AddBanAs(ctx, "spiffe://cluster.local/ns/default/sa/server")
	leave = nil
	if ctx.Err() == nil {
		t.Fatal("the client is there yet")
	}
	if rs, issueErr := issue(t, a, item(t, byUID(server.PodUID))); issueErr != nil || rs[0].GetRefusal().GetCode() != capb.Refusal_CODE_BANNED {
		t.Errorf("the ban said %v, and then: %v, %v", err, rs, issueErr)
	}
	if err := w.TendBans(t.Context()); err != nil {
		t.Error(err)
	}
	decisions := 0
	for r := range records(w) {
		if r.GetDecision().GetBan() != nil {
			decisions++
		}
	}
	if decisions != 1 {
		t.Errorf("%d decisions in the log", decisions)
	}
}
