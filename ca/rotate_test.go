package ca_test

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/rotation"
	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/storagetest"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// once attests an agent, issues an SVID for the server, and leaves no connection.
func (w *world) once() []*x509.Certificate {
	w.t.Helper()
	conn := w.conn(nil)
	defer conn.Close()
	cert, err := w.tryAttest(capb.NewAuthorityClient(conn), func(r *capb.AttestRequest) {
		r.Evidence = &capb.AttestRequest_Token{Token: w.issuer.Token(agentA, "signet-ca")}
	})
	if err != nil {
		w.t.Fatal(err)
	}
	own := w.conn(cert)
	defer own.Close()
	return w.leaf(capb.NewAuthorityClient(own))
}

// hours is a configuration whose root lives for eight hours.
func hours(c *ca.Config) {
	short(c)
	c.RootTTL, c.HeadInterval = 8*time.Hour, time.Hour
	c.SVID.Backdate = 10 * time.Second
}

// intact verifies log and state.
func intact(t testing.TB, w *world) {
	t.Helper()
	if problems, err := w.VerifyAll(t.Context()); err != nil || len(problems) > 0 {
		t.Errorf("%q, %v", problems, err)
	}
}

func idOf(c *x509.Certificate) string { return hex.EncodeToString(ca.Serial(c)) }

// rootKeys are the files of roots' keys.
func rootKeys(w *world) int {
	return len(must(filepath.Glob(filepath.Join(w.cfg.DataDir, "authority/keys/root-*"))))
}

// TestAnAuthorityThatWasAwayTooLong opens after its root has ended.
func TestAnAuthorityThatWasAwayTooLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, hours)
		first := w.Root()
		w.close()
		time.Sleep(20 * time.Hour)
		w.open()
		if w.Root().Equal(first) || !time.Now().Before(w.Root().NotAfter) {
			t.Fatal("the root that ended is active")
		}
		client, _ := w.attest(agentA)
		if err := verifies(w.leaf(client), w.Root()); err != nil {
			t.Error(err)
		}
		stop := w.run()
		time.Sleep(time.Hour)
		stop()
		if got := trustOf(w).Roots(); len(got) != 1 || w.Ready() != nil {
			t.Errorf("%d roots are trusted; %v", len(got), w.Ready())
		}
		intact(t, w)
		w.close()
	})
}

// TestAnAgentIsEnrolledWithTheNewestTrust: its record hangs on the journal that its first
// trust is of.
func TestAnAgentIsEnrolledWithTheNewestTrust(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.attest(agentA)
	// Somebody else's journal: the record must not land beside it.
	e := must(w.Store().Get(t.Context(), "journal"))
	if _, err := w.Store().Commit(t.Context(), nil, []storage.Op{{Key: "journal", Value: e.Value}}); err != nil {
		t.Fatal(err)
	}
	_, err := w.tryAttest(w.dial(nil), func(r *capb.AttestRequest) {
		r.Evidence = &capb.AttestRequest_Token{Token: w.issuer.Token(agentB, "signet-ca")}
	})
	if status.Code(err) != codes.Unavailable || w.Agents() != 1 {
		t.Errorf("beside another journal: %v, %d agents", err, w.Agents())
	}
}

// TestFormerJournals reads each version, and writes the present one.
func TestFormerJournals(t *testing.T) {
	t.Parallel()
	want := must(os.ReadFile("testdata/journal-v3.golden"))
	for _, name := range []string{"journal-v1.json", "journal-v2.json", "journal-v3.golden"} {
		got, err := ca.RewriteJournal(must(os.ReadFile(filepath.Join("testdata", name))))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if *update && name == "journal-v2.json" {
			if err := os.WriteFile("testdata/journal-v3.golden", got, 0o600); err != nil {
				t.Fatal(err)
			}
			want = got
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s becomes\n%s\nand should be\n%s", name, got, want)
		}
	}
	for _, text := range []string{"", "{", `{"version":4}`, `{"version":3,"unknown":1}`, `{"version":2,"authorities":[{"kind":"root","state":"active","certificate":"AA=="}]}`} {
		if _, err := ca.RewriteJournal([]byte(text)); err == nil {
			t.Errorf("%q was read", text)
		}
	}
}

// TestRotationFaults lets each commit of a rotation be lost, or land and be reported
// failed, and opens the authority again: there is one active root, what it issues
// verifies with the bundle, what was issued before does as long as its root was not
// revoked, and the rotation can be gone on with to its end.
func TestRotationFaults(t *testing.T) {
	t.Parallel()
	commits := rotateWithFault(t, -1, false)
	if commits < 6 {
		t.Fatalf("a rotation has %d commits", commits)
	}
	for n := range commits {
		rotateWithFault(t, n, false)
		rotateWithFault(t, n, true)
	}
	t.Logf("note: %d commits, each lost and each landed", commits)
}

// rotateWithFault replaces the root, and lets commit n fail, before or after it lands.
func rotateWithFault(t *testing.T, n int, landed bool) (commits int) {
	t.Helper()
	what := fmt.Sprintf("commit %d lost", n)
	if landed {
		what = fmt.Sprintf("commit %d landed and was reported failed", n)
	}
	armed := false
	w := newWorld(t, func(c *ca.Config) {
		c.StoreOptions.Hook = func(l bool) error {
			if !armed {
				return nil
			}
			if !l {
				commits++
			}
			if l == landed && commits == n+1 {
				return storagetest.ErrInjected
			}
			return nil
		}
	})
	client, _ := w.attest(agentA)
	old := w.leaf(client)
	first := idOf(w.Root())
	rotate := func() {
		for _, s := range []struct {
			step capb.RotateRequest_Step
			id   string
		}{{capb.RotateRequest_STEP_PREPARE, ""}, {capb.RotateRequest_STEP_ACTIVATE, ""}, {capb.RotateRequest_STEP_TAINT, first}, {capb.RotateRequest_STEP_REVOKE, first}} {
			_ = w.Rotate(t.Context(), s.step, s.id, true)
		}
	}
	trusted := func(id string) bool {
		return slices.ContainsFunc(trustOf(w).Roots(), func(c *x509.Certificate) bool { return idOf(c) == id })
	}
	sound := func(when string) {
		t.Helper()
		client, _ := w.attest(agentA)
		if err := verifies(w.leaf(client), trustOf(w).Roots()...); err != nil {
			t.Errorf("%s, %s: %v", what, when, err)
		}
		if !trusted(idOf(w.Root())) {
			t.Errorf("%s, %s: the active root is not trusted", what, when)
		}
		intact(t, w)
	}
	armed = true
	rotate()
	armed = false
	w.close()
	w.cfg.StoreOptions.Hook = nil
	w.open()
	sound("opened again")
	if err := verifies(old, trustOf(w).Roots()...); (err == nil) != trusted(first) {
		t.Errorf("%s: what was issued before: %v", what, err)
	}
	rotate()
	sound("gone on with")
	if trusted(first) {
		t.Errorf("%s: the first root is still trusted", what)
	}
	w.close()
	return commits
}

// TestAnOverrideIsRecordedBeforeItHappens: when the journal is about to change, the issuance
// log says durably who was not waited for; and when it cannot, nothing happens.
func TestAnOverrideIsRecordedBeforeItHappens(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		// before is what comes before; it returns what the record will say.
		before func(w *world) (says string)
		do     func(w *world) error
	}{
		"activated by force": {
			func(w *world) string { return nextOf(w) + " is activated" },
			func(w *world) error { return w.Rotate(w.t.Context(), capb.RotateRequest_STEP_ACTIVATE, "", true) },
		},
		"activated at the deadline": {
			func(w *world) string {
				next := nextOf(w)
				time.Sleep(time.Until(w.Root().NotAfter.Add(-30 * time.Minute)))
				if err := errors.Join(w.RenewIntermediate(w.t.Context()), w.RenewServing(w.t.Context())); err != nil {
					w.t.Fatal(err)
				}
				w.attest(agentA) // which counts
				return next + " is activated"
			},
			func(w *world) error { return errors.Join(w.RotateDue(w.t.Context()), w.Alarms()) },
		},
		"revoked by force": {
			func(w *world) string {
				first := idOf(w.Root())
				nextOf(w)
				for _, s := range []capb.RotateRequest_Step{capb.RotateRequest_STEP_ACTIVATE, capb.RotateRequest_STEP_TAINT} {
					if err := w.Rotate(w.t.Context(), s, first, true); err != nil {
						w.t.Fatal(err)
					}
				}
				return first + " is revoked"
			},
			func(w *world) error {
				for id, stage := range must(w.Stages()) {
					if stage == "old" {
						return w.Rotate(w.t.Context(), capb.RotateRequest_STEP_REVOKE, id, true)
					}
				}
				return errors.New("no root is old")
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fs, says, changes := storagetest.NewCrashFS(), "", 0
				w := newWorld(t, hours, func(c *ca.Config) {
					c.LogOptions.FS = crashable{fs}
					c.StoreOptions.Hook = func(landed bool) error {
						if says != "" && !landed {
							if changes++; changes == 1 && !fs.Durable([]byte(says)) {
								t.Errorf("the journal changes before it is recorded that root %s", says)
							}
						}
						return nil
					}
				})
				w.attest(agentA)
				says = c.before(w)
				was := must(w.Stages())
				if err := c.do(w); err != nil && name != "activated at the deadline" { // which raises an alarm
					t.Fatal(err)
				}
				if maps.Equal(was, must(w.Stages())) || changes == 0 {
					t.Fatalf("nothing changed: %v", was)
				}
				w.close()

				// Again, with a log that takes nothing.
				says, changes = "", 0
				w = newWorld(t, hours, func(c *ca.Config) {
					c.LogOptions.FS = crashable{storagetest.NewCrashFS()}
					fs = c.LogOptions.FS.(crashable).CrashFS
				})
				w.attest(agentA)
				c.before(w)
				was = must(w.Stages())
				fs.Fail(func(storagetest.Op) storagetest.Fault { return storagetest.NotPersisted })
				if err := c.do(w); err == nil || !maps.Equal(was, must(w.Stages())) {
					t.Errorf("with a log that takes nothing: %v; the roots were %v and are %v", err, was, must(w.Stages()))
				}
				fs.Fail(nil)
				w.reopen()
				if now := must(w.Stages()); !maps.Equal(was, now) {
					t.Errorf("opened again: the roots were %v and are %v", was, now)
				}
				w.close()
			})
		})
	}
}

// nextOf publishes another root.
func nextOf(w *world) string {
	w.t.Helper()
	if err := w.Rotate(w.t.Context(), capb.RotateRequest_STEP_PREPARE, "", false); err != nil {
		w.t.Fatal(err)
	}
	for id, stage := range must(w.Stages()) {
		if stage == "published" {
			return id
		}
	}
	w.t.Fatal("no root is published")
	return ""
}

// TestAReplacementIsAnAlarmUntilItIsDone: which root is to go is durable before anything
// else is done, beginning again does nothing, and an alarm names it until it is gone.
func TestAReplacementIsAnAlarmUntilItIsDone(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	first := idOf(w.Root())
	rotate := func(step capb.RotateRequest_Step, id string) error { return w.Rotate(t.Context(), step, id, true) }
	alarm := func() string {
		t.Helper()
		if err := w.RotateDue(t.Context()); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(w.Alarms())
	}
	if err := rotate(capb.RotateRequest_STEP_REPLACE, "0100"); !errors.Is(err, rotation.ErrUnknown) || len(must(w.Stages())) != 1 {
		t.Errorf("a root that is not there: %v, %v", err, must(w.Stages()))
	}
	if got := alarm(); strings.Contains(got, "replaced") {
		t.Errorf("before: %s", got)
	}
	for range 2 {
		if err := rotate(capb.RotateRequest_STEP_REPLACE, first); err != nil || len(must(w.Stages())) != 2 || must(w.Stages())[first] != "active" {
			t.Fatalf("begun: %v, %v", err, must(w.Stages()))
		}
	}
	for id, stage := range must(w.Stages()) {
		if err := rotate(capb.RotateRequest_STEP_REPLACE, id); id != first && (stage != "published" || !errors.Is(err, rotation.ErrStage)) {
			t.Errorf("the root that is %s: %v", stage, err)
		}
	}
	w.close()
	w.open()
	for _, step := range []capb.RotateRequest_Step{capb.RotateRequest_STEP_ACTIVATE, capb.RotateRequest_STEP_REPLACE, capb.RotateRequest_STEP_TAINT} {
		if err := rotate(step, first); err != nil || len(must(w.Stages())) != 2 {
			t.Fatalf("%v: %v, %v", step, err, must(w.Stages()))
		}
		if got := alarm(); !strings.Contains(got, "signet ca authority replace-root --now "+first) {
			t.Errorf("after %v: %s", step, got)
		}
	}
	if err := rotate(capb.RotateRequest_STEP_REVOKE, first); err != nil {
		t.Fatal(err)
	}
	if got := alarm(); strings.Contains(got, "replaced") || len(must(w.Stages())) != 1 {
		t.Errorf("when it is done: %s, %v", got, must(w.Stages()))
	}
}
