package ca_test

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/caclient"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/replica"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/storage"
)

// realAgent is an agent's client that keeps what it knows over restarts.
type realAgent struct {
	w   *world
	cfg caclient.Config
	*caclient.Client
	end func()
}

func newRealAgent(w *world) *realAgent {
	w.t.Helper()
	dir := w.t.TempDir()
	for name, b := range map[string][]byte{"root": trustOf(w).PEM(), "token": []byte(w.issuer.Token(agentA, "signet-ca"))} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			w.t.Fatal(err)
		}
	}
	r := &realAgent{w: w, cfg: caclient.Config{Addresses: []string{"ca:1"}, TrustDomain: td, Node: "node-a", Pods: &identity.Pods{},
		RootFile: filepath.Join(dir, "root"), TokenFile: filepath.Join(dir, "token"),
		Dial: func(ctx context.Context, _ string) (net.Conn, error) { return w.pipe.DialContext(ctx) }}}
	r.start()
	w.t.Cleanup(func() { r.end() })
	return r
}

func (r *realAgent) start() {
	r.w.t.Helper()
	var err error
	if r.Client, err = caclient.New(r.cfg); err != nil {
		r.w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = r.Run(ctx) }()
	r.end = func() {
		cancel()
		<-done
		r.cfg.Saved, _ = r.Credential()
		r.cfg.SavedTrust, _ = r.Trust()
		r.cfg.SavedBans, _ = r.SavedBans()
	}
}

// enforces waits until the authority says that the agent enforces a revision of the bans,
// and then it must.
func (r *realAgent) enforces(op capb.AdminClient, revision uint64, want ...string) {
	t := r.w.t
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		l, err := op.ListBans(t.Context(), &capb.ListBansRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if g := l.GetAgents(); len(g) == 1 && g[0].GetConnected() && g[0].GetRevision() >= revision {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("nobody enforces revision %d: %v", revision, l)
		}
		time.Sleep(2 * time.Millisecond)
	}
	var got []string
	b, _ := r.Bans()
	for _, ban := range b.All() {
		got = append(got, strings.TrimPrefix(ban.Subject.String(), "spiffe://cluster.local/ns/x/sa/"))
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Fatalf("the authority says that the agent enforces revision %d, and it enforces %v, not %v", revision, got, want)
	}
}

// someone is a name for a SPIFFE ID.
func someone(name string) string { return "spiffe://cluster.local/ns/x/sa/" + name }

// TestBansOfAStateThatMoves: another store begins to count anew, and agents take what is
// banned there, and say so only then.
func TestBansOfAStateThatMoves(t *testing.T) {
	t.Parallel()
	for name, earlier := range map[string]bool{"of this build": false, "of an earlier build": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, upstream := upstreamFolder(t)
			w := newWorld(t, func(c *ca.Config) { c.Upstream = upstream })
			for range 40 {
				w.attest(agentA) // a store that was used for a while
			}
			op := w.admin()
			r := newRealAgent(w)
			r.enforces(op, w.ban(op, someone("a")).GetRevision(), "a")
			stop := func() {
				r.end()
				w.close()
			}
			start := func() {
				w.open()
				op = w.admin()
				r.start()
			}
			stop()
			dir := filepath.Join(w.cfg.DataDir, "authority")
			if earlier {
				b, err := storage.OpenBolt(filepath.Join(dir, "state.db"), storage.BoltOptions{MustExist: true})
				if err != nil {
					t.Fatal(err)
				}
				if err := deleteKey(t, b, replica.BanRevisionKey); err != nil {
					t.Fatal(err)
				}
				if err := b.Close(); err != nil {
					t.Fatal(err)
				}
			}
			shared := newShared(t)
			m := replica.Migration{Dir: dir, Store: shared.Store, Files: shared.Files, Place: "there", Wait: time.Second}
			if _, err := m.ToShared(t.Context()); err != nil {
				t.Fatal(err)
			}
			w.cfg.Shared = shared
			start()
			r.enforces(op, w.ban(op, someone("b")).GetRevision(), "a", "b")
			for range 40 {
				w.attest(agentA)
			}
			r.enforces(op, w.ban(op, someone("c")).GetRevision(), "a", "b", "c")
			stop()
			if earlier {
				if err := deleteKey(t, shared.Store, replica.BanRevisionKey); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := m.ToFolder(t.Context()); err != nil {
				t.Fatal(err)
			}
			w.cfg.Shared = ca.Shared{}
			start()
			resp, err := op.RemoveBan(t.Context(), &capb.RemoveBanRequest{Subject: someone("a"), Reason: "found again"})
			if err != nil {
				t.Fatal(err)
			}
			r.enforces(op, resp.GetRevision(), "b", "c")
			r.end()
		})
	}
}

// TestBansOfARestoredState: what agents heard after the backup has no revision in common
// with what they hear from then on.
func TestBansOfARestoredState(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	op := w.admin()
	r := newRealAgent(w)
	r.enforces(op, w.ban(op, someone("a")).GetRevision(), "a")
	var backup bytes.Buffer
	if err := w.Backup(t.Context(), &backup); err != nil {
		t.Fatal(err)
	}
	// Trust changes after the backup.
	if _, err := op.Rotate(t.Context(), &capb.RotateRequest{Step: capb.RotateRequest_STEP_PREPARE}); err != nil {
		t.Fatal(err)
	}
	w.ban(op, someone("b"))
	r.enforces(op, w.ban(op, someone("c")).GetRevision(), "a", "b", "c")
	r.end()
	w.close()
	keys := filepath.Join(w.cfg.DataDir, "authority/keys")
	w.cfg.DataDir = emptyDir(t)
	restored, err := ca.Restore(t.Context(), ca.RestoreConfig{Backup: &backup, DataDir: w.cfg.DataDir, KeysDir: keys})
	if err != nil {
		t.Fatal(err)
	}
	w.cfg.Instance = restored.Instance
	w.open()
	op = w.admin()
	r.start()
	l, err := op.ListBans(t.Context(), &capb.ListBansRequest{})
	if err != nil {
		t.Fatal(err)
	}
	r.enforces(op, l.GetRevision(), "a")
	// That others were banned it is told, until somebody has banned again.
	if err := w.Alarms(); err == nil || !strings.Contains(err.Error(), "lost bans: agents, 1, enforced bans from after the copy") || !strings.Contains(err.Error(), "node-a") {
		t.Errorf("alarms: %v", err)
	}
	eventually(t, "that to be over", func() bool {
		w.ban(op, someone("d"))
		return w.TendBans(t.Context()) == nil && w.Alarms() == nil
	})
	r.enforces(op, w.ban(op, someone("e")).GetRevision(), "a", "d", "e")
	r.end()
}
