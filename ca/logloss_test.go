package ca_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/storage"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

func (w *world) logDir() string { return filepath.Join(w.cfg.DataDir, "authority/log") }

// admin connects as an operator.
func (w *world) admin() capb.AdminClient {
	w.t.Helper()
	path := filepath.Join(w.t.TempDir(), "a")
	l := must(listenUnix(path))
	s := w.NewAdminServer()
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	conn := must(grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials())))
	w.t.Cleanup(func() { conn.Close(); s.Stop(); <-done })
	return capb.NewAdminClient(conn)
}

func headProto(h storage.Head) *capb.LogHead {
	return &capb.LogHead{Instance: h.Instance, Sequence: h.Sequence, Hash: h.Hash[:], Time: timestamppb.New(h.Time), Signature: h.Signature}
}

// issueSome makes n records, and returns a signed head over them.
func (w *world) issueSome(a capb.AuthorityClient, n int) storage.Head {
	w.t.Helper()
	for range n {
		rs, err := issue(w.t, a, item(w.t, byUID(server.PodUID)))
		if err != nil || rs[0].GetX509() == nil {
			w.t.Fatal(rs, err)
		}
	}
	if err := w.SignHead(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
	h, _ := w.Log().SignedHead()
	return h
}

// show lets the agent of a connection return heads, and waits until they were heard.
func (w *world) show(a capb.AuthorityClient, heads ...storage.Head) {
	w.t.Helper()
	ctx, cancel := context.WithCancel(w.t.Context())
	defer cancel()
	s, err := a.WatchTrust(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	m := &capb.WatchTrustRequest{}
	for _, h := range heads {
		m.LogHeads = append(m.LogHeads, headProto(h))
	}
	if err := s.Send(m); err != nil {
		w.t.Fatal(err)
	}
	// An impossible acknowledgement ends the stream after what came before it.
	if err := s.Send(&capb.WatchTrustRequest{Acknowledged: 1 << 60}); err != nil {
		w.t.Fatal(err)
	}
	for err == nil {
		_, err = s.Recv()
	}
	if status.Code(err) != codes.InvalidArgument {
		w.t.Fatal(err)
	}
}

func (w *world) mayIssue(a capb.AuthorityClient) bool {
	w.t.Helper()
	rs, err := issue(w.t, a, item(w.t, byUID(server.PodUID)))
	if err != nil {
		w.t.Fatal(err)
	}
	if c := rs[0].GetRefusal().GetCode(); rs[0].GetX509() == nil && c != capb.Refusal_CODE_UNAVAILABLE {
		w.t.Errorf("refused with %v", c)
	}
	return rs[0].GetX509() != nil
}

// TestALogThatLostRecordsStopsSigning until an operator decides: over a restart,
// and a second loss stops it anew.
func TestALogThatLostRecordsStopsSigning(t *testing.T) {
	t.Parallel()
	registry := prometheus.NewRegistry()
	w := newWorld(t, func(c *ca.Config) { c.Metrics = registry })
	w.close()
	old := copyTree(t, w.logDir())
	w.cfg.Metrics = nil
	w.open()
	a, cert := w.attest(agentA)
	held := w.issueSome(a, 3)
	w.show(a, held)
	if !w.mayIssue(a) {
		t.Fatal("a head that the log holds stops it")
	}
	held = w.issueSome(a, 1)
	w.close()
	restoreTree(t, old, w.logDir())
	w.cfg.Metrics = prometheus.NewRegistry()
	w.open()
	a = w.dial(cert)
	if !w.mayIssue(a) {
		t.Fatal("nobody has told yet")
	}
	// Without a signature of this authority a head tells nothing.
	forged := held
	forged.Sequence++
	w.show(a, forged)
	if !w.mayIssue(a) || w.Ready() != nil {
		t.Fatal("a forged head stops it")
	}
	before := w.Log().Head()
	w.show(a, held)
	if w.mayIssue(a) {
		t.Error("it signs although its log lost records")
	}
	if err := w.Ready(); !errors.Is(err, ca.ErrLogLoss) || !strings.Contains(err.Error(), fmt.Sprintf("accept-loss --sequence %d", held.Sequence)) {
		t.Errorf("Ready: %v", err)
	}
	if _, err := w.tryAttest(w.dial(nil), func(r *capb.AttestRequest) {
		r.Evidence = &capb.AttestRequest_Token{Token: w.issuer.Token(agentA, "signet-ca")}
	}); err == nil {
		t.Error("it attests although its log lost records")
	}
	if got := gauge(t, w.cfg.Metrics.(*prometheus.Registry), "signet_ca_log_lost_record"); got != float64(held.Sequence) {
		t.Errorf("the metric says %v", got)
	}
	if !w.Log().Head().Equal(before) {
		t.Error("the log grew")
	}
	w.close()
	w.cfg.Metrics = prometheus.NewRegistry()
	w.open() // it starts for its operator, without a serving certificate
	if w.Ready() == nil {
		t.Fatal("a restart forgot the loss")
	}
	op := w.admin()
	if st, err := op.Status(t.Context(), &capb.StatusRequest{}); err != nil || st.GetLostHead().GetSequence() != held.Sequence {
		t.Errorf("status: %v, %v", st.GetLostHead(), err)
	}
	if v, err := op.VerifyLog(t.Context(), &capb.VerifyLogRequest{}); err != nil || len(v.GetProblems()) == 0 {
		t.Errorf("verification finds %v, %v", v.GetProblems(), err)
	}
	if c, err := op.Backup(t.Context(), &capb.BackupRequest{}); err == nil {
		if _, err := c.Recv(); status.Code(err) != codes.Unavailable {
			t.Errorf("a backup of it: %v", err)
		}
	}
	for _, bad := range []*capb.AcceptLogLossRequest{{Sequence: held.Sequence - 1, Reason: "x"}, {Sequence: held.Sequence}, {Sequence: held.Sequence, Reason: strings.Repeat("x", 501)}} {
		if _, err := op.AcceptLogLoss(t.Context(), bad); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("accepting %v: %v", bad, err)
		}
	}
	if w.Ready() == nil {
		t.Fatal("a refused decision lets it sign")
	}
	if _, err := op.AcceptLogLoss(t.Context(), &capb.AcceptLogLossRequest{Sequence: held.Sequence, Reason: "the disk died"}); err != nil {
		t.Fatal(err)
	}
	if err := w.RenewServing(t.Context()); err != nil {
		t.Fatal(err)
	}
	a, _ = w.attest(agentA)
	w.show(a, held) // agents go on holding it
	if !w.mayIssue(a) || w.Ready() != nil {
		t.Errorf("after the decision: %v", w.Ready())
	}
	decided := 0
	for r := range records(w) {
		if d := r.GetDecision(); d != nil {
			decided++
			if d.GetWhat() != capb.Decision_WHAT_LOG_LOSS_ACCEPTED || d.GetSequence() != held.Sequence || d.GetReason() != "the disk died" {
				t.Errorf("decision %v", d)
			}
		}
	}
	if decided != 1 {
		t.Errorf("%d decisions in the log", decided)
	}
	if v, err := op.VerifyLog(t.Context(), &capb.VerifyLogRequest{Store: true}); err != nil || len(v.GetProblems()) != 1 || !strings.Contains(v.GetProblems()[0], "the SVID of the agent") {
		t.Errorf("what is left to find is the agent whose record was lost: %v, %v", v.GetProblems(), err)
	}

	// A second loss is another decision.
	a, cert = w.attest(agentA)
	old = copyTree(t, w.logDir())
	held = w.issueSome(a, 2)
	w.close()
	restoreTree(t, old, w.logDir())
	w.cfg.Metrics = nil
	w.open()
	w.show(w.dial(cert), held)
	if w.Ready() == nil {
		t.Error("a second loss is not noticed")
	}
	w.close()
	// The flag accepts the one that it names.
	w.cfg.AcceptLogLoss = held.Sequence - 1
	w.open()
	if w.Ready() == nil {
		t.Error("the flag of another loss accepts this one")
	}
	w.close()
	w.cfg.AcceptLogLoss = held.Sequence
	w.open()
	if err := w.Ready(); err != nil {
		t.Error(err)
	}
	w.close()
	w.open() // it has no effect twice
	w.cfg.AcceptLogLoss = 0
	if a, _ = w.attest(agentA); !w.mayIssue(a) {
		t.Error("it does not sign after the decision")
	}
}

// TestARestoredLogEndsTheLoss: the operator finds the right log and puts it back.
func TestARestoredLogEndsTheLoss(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.close()
	old := copyTree(t, w.logDir())
	w.open()
	a, cert := w.attest(agentA)
	held := w.issueSome(a, 3)
	w.close()
	good := copyTree(t, w.logDir())
	restoreTree(t, old, w.logDir())
	w.open()
	w.show(w.dial(cert), held)
	if w.Ready() == nil {
		t.Fatal("not noticed")
	}
	w.close()
	restoreTree(t, good, w.logDir())
	w.open()
	if err := w.Ready(); err != nil || !w.mayIssue(w.dial(cert)) {
		t.Errorf("with the right log: %v", err)
	}
}

// TestADamagedLogIsNoticedByAHead: an old segment that is not what it was is read
// when an agent shows a head within it, and is an alarm that stays.
func TestADamagedLogIsNoticedByAHead(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *ca.Config) { c.LogOptions.SegmentSize = 4 << 10 })
	a, cert := w.attest(agentA)
	held := w.issueSome(a, 2)
	w.issueSome(a, 30)
	w.close()
	w.open() // and what it had in memory is gone
	first := filepath.Join(w.logDir(), "000000000001.seg")
	good := must(os.ReadFile(first))
	b := bytes.Clone(good)
	b[300] ^= 1
	if err := os.WriteFile(first, b, 0o600); err != nil {
		t.Fatal(err)
	}
	a = w.dial(cert)
	w.show(a, held)
	for range 2 {
		if err := w.Ready(); !errors.Is(err, storage.ErrCorrupt) {
			t.Errorf("Ready: %v", err)
		}
		newest, _ := w.Log().SignedHead()
		w.show(a, newest) // is fine, and changes nothing
	}
	if err := os.WriteFile(first, good, 0o600); err != nil {
		t.Fatal(err)
	}
	w.close()
	w.open()
	if w.show(w.dial(cert), held); w.Ready() != nil {
		t.Errorf("mended: %v", w.Ready())
	}
}

// TestALogOfSomebodyElseIsNotStarted: heads and checkpoints carry signatures.
func TestALogOfSomebodyElseIsNotStarted(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.close()
	l := must(storage.OpenLog(w.logDir(), storage.LogOptions{Instance: 1, MustExist: true}))
	h := l.Head()
	h.Signature = []byte("not a signature")
	if err := l.AppendHead(t.Context(), h); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if a, err := ca.Open(t.Context(), w.cfg); err == nil || !strings.Contains(err.Error(), "not signed by this authority's log key") {
		t.Errorf("got %v", err)
		if a != nil {
			_ = a.Close()
		}
	}
}

// TestOldRecordsLeaveTheLog over fake weeks; what is left verifies.
func TestOldRecordsLeaveTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *ca.Config) {
			c.HeadInterval, c.LogRetention = time.Hour, 48*time.Hour
			c.LogOptions.SegmentSize = 4 << 10
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- w.Run(ctx) }()
		for range 12 {
			a, _ := w.attest(agentA)
			w.issueSome(a, 5)
			time.Sleep(12 * time.Hour)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		c, ok := w.Log().Checkpoint()
		if age := time.Since(c.Time); !ok || age < 48*time.Hour || age > 72*time.Hour {
			t.Errorf("pruned up to %v ago", age)
		}
		names := must(os.ReadDir(w.logDir()))
		if len(names) > 20 {
			t.Errorf("%d files are left", len(names))
		}
		w.close()
		f := must(ca.OpenFolder(w.cfg.DataDir))
		v, err := f.Verify(t.Context(), nil, true)
		if err != nil || len(v.GetProblems()) != 0 || v.GetLogs()[0].GetFirst() != c.Sequence+1 || v.GetLogs()[0].GetPruned() == nil {
			t.Errorf("%v, %v", v, err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		w.open()
		w.close()
	})
}
