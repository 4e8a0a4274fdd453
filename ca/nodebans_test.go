package ca_test

import (
	"encoding/binary"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/storage"
)

// slowFiles are files whose Sync waits for as long as they are held.
type slowFiles struct {
	storage.FS

	mu      sync.Mutex
	held    chan struct{} // nil: none waits; guarded by mu
	waiting bool          // guarded by mu
}

type slowFile struct {
	storage.File
	of *slowFiles
}

func (s *slowFiles) Open(name string) (storage.File, error) {
	f, err := s.FS.Open(name)
	return slowFile{f, s}, err
}

func (s *slowFiles) Create(name string) (storage.File, error) {
	f, err := s.FS.Create(name)
	return slowFile{f, s}, err
}

func (f slowFile) Sync() error {
	f.of.mu.Lock()
	held := f.of.held
	f.of.waiting = held != nil
	f.of.mu.Unlock()
	if held != nil {
		<-held
	}
	return f.File.Sync()
}

func (s *slowFiles) isWaiting() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.waiting }

func (s *slowFiles) hold() (release func()) {
	held := make(chan struct{})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held = held
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.held = nil
		close(held)
	}
}

// TestABanReachesWhatIsUnderWayElsewhere: at a replica that was not asked, too, the ban of
// a node means the certificate whose record was on its way to the disk when it came.
func TestABanReachesWhatIsUnderWayElsewhere(t *testing.T) {
	t.Parallel()
	_, upstream := upstreamFolder(t)
	shared := newShared(t)
	edit := func(c *ca.Config) { c.Upstream, c.Shared = upstream, shared }
	a := newWorld(t, edit)
	files := &slowFiles{FS: shared.Files}
	shared.Files = files
	b := newWorld(t, edit)
	key := public(t)
	release := files.hold()
	released := sync.OnceFunc(release)
	defer released()
	issued := make(chan []byte, 1)
	go func() {
		out, err := b.Issue(t.Context(), ca.Order{Door: "test", Workload: server, Evidence: capb.IssuanceRecord_EVIDENCE_TOKEN, PublicKey: key})
		if err != nil {
			t.Errorf("what was under way: %v", err)
			issued <- nil
			return
		}
		issued <- ca.Serial(out.Chain[0])
	}()
	eventually(t, "a record on its way to the disk", files.isWaiting)
	if err := a.AddBanAs(t.Context(), "node/node-a"); err != nil {
		t.Fatal(err)
	}
	if err := b.ReloadBans(t.Context()); err != nil {
		t.Fatal(err)
	}
	tended := make(chan error, 1)
	go func() { tended <- b.TendBans(t.Context()) }()
	var early error
	over := false
	eventually(t, "the other replica to look for certificates of the node", func() bool {
		select {
		case early = <-tended:
			over = true
		default:
		}
		return over || b.RecordingAwaited()
	})
	released()
	if !over {
		early = <-tended
	}
	if early != nil {
		t.Error(early)
	}
	if serial := <-issued; serial == nil || !b.Banned(serial) {
		t.Errorf("%x was issued and is not banned", serial)
	}
}

// TestABannedNodeWithTooManyCertificates: the newest are banned, as many as there is room
// for; an alarm names the others, and the authority stays ready.
func TestABannedNodeWithTooManyCertificates(t *testing.T) {
	t.Parallel()
	const most = 4
	for _, crl := range []bool{false, true} {
		w := newWorld(t, func(c *ca.Config) { ca.WithBanSerials(c, most); c.CRL.Enabled = crl })
		agent, cert := w.attest(agentA)
		w.attest(agentB)
		serials := [][]byte{ca.Serial(cert.Leaf)}
		for range most + 1 {
			serials = append(serials, ca.Serial(w.leaf(agent)[0]))
		}
		op := w.admin()
		resp, err := op.AddBan(t.Context(), &capb.AddBanRequest{Subject: "node/node-a", Reason: "r"})
		if err != nil {
			t.Fatal(err)
		}
		if n := resp.GetBan().GetSerials(); n != most || !strings.Contains(resp.GetPending(), "the newest 4 of 6 are") {
			t.Errorf("%d are banned; pending: %s", n, resp.GetPending())
		}
		if want := uint32(len(serials)); crl && resp.GetRevoked() != want {
			t.Errorf("%d are revoked, not %d", resp.GetRevoked(), want)
		}
		goesOn := func(when string, alarms ...string) {
			t.Helper()
			for range 3 {
				w.LookAgainAtNodes()
				if err := w.TendBans(t.Context()); err != nil {
					t.Errorf("%s: %v", when, err)
				}
			}
			if err := w.Ready(); err != nil {
				t.Errorf("%s: %v", when, err)
			}
			said := ""
			if err := w.Alarms(); err != nil {
				said = err.Error()
			}
			for _, a := range alarms {
				if !strings.Contains(said, a) {
					t.Errorf("%s: no alarm says %q: %s", when, a, said)
				}
			}
			if len(alarms) == 0 && said != "" {
				t.Errorf("%s: %s", when, said)
			}
		}
		all := func(when string) {
			t.Helper()
			for i, s := range serials {
				if w.Banned(s) != (i >= len(serials)-most) {
					t.Errorf("%s: certificate %d is banned: %v", when, i, w.Banned(s))
				}
			}
		}
		theirs := []string{"node/node-a", "the newest 4 of 6 are", "spiffe://cluster.local/signet/agent/node-a", "spiffe://cluster.local/ns/default/sa/server"}
		goesOn("at first", theirs...)
		all("at first")
		revision := resp.GetRevision()
		if list, err := op.ListBans(t.Context(), &capb.ListBansRequest{}); err != nil || list.GetRevision() != revision {
			t.Errorf("revision %d and then %d: agents are told again what they know; %v", revision, list.GetRevision(), err)
		}
		w.close()
		w.open()
		goesOn("after a restart", theirs...)
		all("after a restart")

		// Another node finds no room, until the first one is not banned any more.
		op = w.admin()
		resp, err = op.AddBan(t.Context(), &capb.AddBanRequest{Subject: "node/node-b", Reason: "r"})
		if err != nil || resp.GetBan().GetSerials() != 0 || !strings.Contains(resp.GetPending(), "the newest 0 of 1 are") {
			t.Errorf("without room: %v, %v", resp, err)
		}
		goesOn("without room", append(theirs, "node/node-b", "spiffe://cluster.local/signet/agent/node-b")...)
		w.unban(op, "node/node-a")
		goesOn("with room again")
		list, err := op.ListBans(t.Context(), &capb.ListBansRequest{})
		for _, b := range list.GetBans() {
			if b.GetSubject() == "node/node-b" && b.GetSerials() != 1 {
				t.Errorf("with room again: %v", b)
			}
		}
		if err != nil {
			t.Error(err)
		}
		w.close()
	}
}

// TestManyLongRevocations: as many as one write of the log takes at most, with the longest
// reason and a long SPIFFE ID, are more bytes than it takes.
func TestManyLongRevocations(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ds := make([]*capb.Decision, storage.MaxRecords)
	for i := range ds {
		serial := make([]byte, 17)
		serial[0] = 1
		binary.BigEndian.PutUint32(serial[13:], uint32(i))
		ds[i] = &capb.Decision{What: capb.Decision_WHAT_REVOKED, Instance: 1, Reason: strings.Repeat("r", 500), By: "uid 0",
			Revoked: &capb.RevokedCertificate{Serial: serial, SpiffeId: "spiffe://cluster.local/ns/" + strings.Repeat("n", 63) + "/sa/" + strings.Repeat("s", 600), Authority: make([]byte, 20),
				Reason: 9, Revoked: time.Now().Unix(), NotAfter: time.Now().Add(time.Hour).Unix()}}
	}
	before := w.Log().Head().Sequence
	if n, err := w.RecordRevoked(t.Context(), ds...); err != nil || n != len(ds) {
		t.Fatalf("%d are recorded, %v", n, err)
	}
	if got := w.Log().Head().Sequence - before; got != uint64(len(ds)) || w.Revoked() != len(ds) {
		t.Errorf("the log has %d, and %d are revoked", got, w.Revoked())
	}
}
