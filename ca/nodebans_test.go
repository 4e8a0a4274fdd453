package ca_test

import (
	"sync"
	"testing"

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
