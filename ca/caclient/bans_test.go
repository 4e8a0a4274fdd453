package caclient_test

import (
	"context"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca/caclient"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/identity"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// subjects are whom bans mean.
func subjects(b *identity.Bans) (out []string) {
	for _, ban := range b.All() {
		out = append(out, ban.Subject.String())
	}
	return out
}

// TestBansReachAgentsAndStay: they come within a second, are enforced before they are
// acknowledged, and a successor has them before it reaches anybody.
func TestBansReachAgentsAndStay(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	cfg := a.config()
	var mu sync.Mutex
	var enforced []string
	cfg.Enforce = func(b *identity.Bans) { mu.Lock(); defer mu.Unlock(); enforced = subjects(b) }
	c, err := caclient.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = c.Run(ctx) }()
	defer func() { cancel(); <-done }()
	op := a.admin()
	const who = "spiffe://cluster.local/ns/default/*"
	eventually(t, "the ban", func() bool { return c.Ready() == nil })
	resp, err := op.AddBan(t.Context(), &capb.AddBanRequest{Subject: who, Reason: "r", Until: timestamppb.New(time.Now().Add(time.Hour))})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the ban", func() bool {
		l, err := op.ListBans(t.Context(), &capb.ListBansRequest{})
		return err == nil && len(l.GetAgents()) == 1 && l.GetAgents()[0].GetRevision() >= resp.GetRevision()
	})
	mu.Lock()
	if !slices.Equal(enforced, []string{who}) {
		t.Errorf("acknowledged, and enforced are %v", enforced)
	}
	mu.Unlock()
	saved, _ := c.SavedBans()
	next, err := caclient.New(caclient.Config{Addresses: []string{"127.0.0.1:1"}, TrustDomain: td, Node: "node-a", Pods: &identity.Pods{}, RootFile: cfg.RootFile,
		TokenFile: cfg.TokenFile, SavedBans: saved, Enforce: cfg.Enforce})
	if err != nil {
		t.Fatal(err)
	}
	b, _ := next.Bans()
	if got := subjects(b); !slices.Equal(got, []string{who}) || time.Until(b.All()[0].Until) > time.Hour || time.Until(b.All()[0].Until) < 50*time.Minute {
		t.Errorf("a successor has %v", got)
	}
	if _, err := op.RemoveBan(t.Context(), &capb.RemoveBanRequest{Subject: who, Reason: "r"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the ban", func() bool { b, _ := c.Bans(); return b.Len() == 0 })
}

func (a *authority) admin() capb.AdminClient {
	a.t.Helper()
	path := filepath.Join(a.t.TempDir(), "s")
	s := a.NewAdminServer()
	l, err := net.Listen("unix", path)
	if err != nil {
		a.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { conn.Close(); s.Stop(); <-done })
	return capb.NewAdminClient(conn)
}

// TestBansThatCannotBeRead: a kind of a later version bans what that says to ban
// otherwise, else everybody; what was saved and cannot be read bans everybody.
func TestBansThatCannotBeRead(t *testing.T) {
	t.Parallel()
	// Field 15 is of no version yet.
	later := func(b *capb.Ban) *capb.Ban {
		b.ProtoReflect().SetUnknown([]byte{15<<3 | 2, 1, 'x'})
		return b
	}
	ours := &capb.Ban{Subject: &capb.Ban_Node{Node: "n"}}
	for name, c := range map[string]struct {
		bans   []*capb.Ban
		want   []string
		unread uint32
	}{
		"none":                          {nil, nil, 0},
		"of each kind":                  {[]*capb.Ban{{Subject: &capb.Ban_SpiffeId{SpiffeId: "spiffe://td/a"}}, {Subject: &capb.Ban_SpiffeIdPrefix{SpiffeIdPrefix: "spiffe://td/b"}}, {Subject: &capb.Ban_Serial{Serial: []byte{0, 1}}}, ours}, []string{"node/n", "serial/01", "spiffe://td/a", "spiffe://td/b/*"}, 0},
		"a later kind":                  {[]*capb.Ban{ours, later(&capb.Ban{})}, []string{"everybody", "node/n"}, 1},
		"a later kind that says more":   {[]*capb.Ban{later(&capb.Ban{Otherwise: "spiffe://td/ns/a/*"})}, []string{"spiffe://td/ns/a/*"}, 1},
		"a later kind, badly otherwise": {[]*capb.Ban{later(&capb.Ban{Otherwise: "td/ns/a/*"})}, []string{"everybody"}, 1},
		"nothing at all":                {[]*capb.Ban{{}}, []string{"everybody"}, 1},
		"a name that is none":           {[]*capb.Ban{{Subject: &capb.Ban_SpiffeId{SpiffeId: "x"}}}, []string{"everybody"}, 1},
		"two in the place of one":       {[]*capb.Ban{later(&capb.Ban{Otherwise: "node/n", Until: timestamppb.Now()}), ours}, []string{"node/n"}, 1},
	} {
		set, unread := caclient.ParseBans(&capb.Bans{Bans: c.bans})
		if got := subjects(set); !slices.Equal(got, c.want) || unread != c.unread {
			t.Errorf("%s: %v, %d unread", name, got, unread)
		}
		if name == "two in the place of one" && !set.All()[0].Until.IsZero() {
			t.Error("of two the shorter counts")
		}
	}
	good, err := proto.Marshal(&capb.Bans{Revision: 3, Bans: []*capb.Ban{ours}})
	if err != nil {
		t.Fatal(err)
	}
	head := []byte{1, 0, 0, 0, 0, 0, 0, 0, 9}
	for name, c := range map[string]struct {
		saved []byte
		want  []string
	}{
		"nothing":         {nil, nil},
		"what was saved":  {append(slices.Clone(head), good...), []string{"node/n"}},
		"a later version": {append([]byte{2}, good...), []string{"everybody"}},
		"half of it":      {head[:4], []string{"everybody"}},
		"rubble":          {append(slices.Clone(head), 0xff, 0xff), []string{"everybody"}},
	} {
		var enforced *identity.Bans
		_, err := caclient.New(caclient.Config{Addresses: []string{"127.0.0.1:1"}, TrustDomain: td, Node: "node-a", Pods: &identity.Pods{}, RootHash: hash, TokenFile: "x",
			SavedBans: c.saved, Enforce: func(b *identity.Bans) { enforced = b }})
		if err != nil {
			t.Fatal(err)
		}
		if got := subjects(enforced); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v", name, got)
		}
	}
}

const hash = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// TestOlderBansDoNotTakeThePlaceOfNewer: a replica that is behind lifts no ban; a
// restored authority does.
func TestOlderBansDoNotTakeThePlaceOfNewer(t *testing.T) {
	t.Parallel()
	cfg := newAuthority(t).config()
	c, err := caclient.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ban := []*capb.Ban{{Subject: &capb.Ban_Node{Node: "n"}, Until: timestamppb.New(time.Unix(5000, 0))}}
	count := func() int { b, _ := c.Bans(); return b.Len() }
	c.Heed(&capb.Bans{Revision: 7, Bans: ban, Now: timestamppb.New(time.Unix(4000, 0))})
	b, _ := c.Bans()
	if left := time.Until(b.All()[0].Until); left < 999*time.Second || left > 1001*time.Second {
		t.Errorf("it ends in %v by this clock; the authority said in 1000 s", left)
	}
	c.Heed(&capb.Bans{Revision: 6})
	if count() != 1 {
		t.Error("an older state lifted a ban")
	}
	c.Heed(nil)
	if count() != 1 {
		t.Error("saying nothing lifted a ban")
	}
	c.Heed(&capb.Bans{Revision: 8})
	if count() != 0 {
		t.Error("a newer state did not count")
	}
}

// trustOf is what the authority trusts, under a sequence.
func (a *authority) trustOf(sequence uint64) *capb.Trust {
	trust, _ := a.Trust()
	p := &capb.Trust{Sequence: sequence, TrustDomain: td.Name(), Bundles: []*capb.Bundle{{TrustDomain: td.Name()}}}
	for _, r := range trust.Roots() {
		p.Bundles[0].X509Authorities = append(p.Bundles[0].X509Authorities, r.Raw)
	}
	return p
}

// TestBansOfARestoredAuthority: it counts from where the backup was, in bans and in trust,
// which leaps; whatever trust went through since the backup, its bans count.
func TestBansOfARestoredAuthority(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	c, err := caclient.New(a.config())
	if err != nil {
		t.Fatal(err)
	}
	believe := func(sequence uint64) {
		t.Helper()
		if err := c.Believe(a.trustOf(sequence)); err != nil {
			t.Fatal(err)
		}
	}
	believe(12)
	c.Heed(&capb.Bans{Revision: 5000})
	believe(10 + 1<<20)
	c.Heed(&capb.Bans{Revision: 12, Bans: []*capb.Ban{{Subject: &capb.Ban_Node{Node: "n"}}}})
	if b, _ := c.Bans(); b.Len() != 1 {
		t.Error("the bans of a restored authority do not count")
	}
	c.Heed(&capb.Bans{Revision: 11})
	if b, _ := c.Bans(); b.Len() != 1 {
		t.Error("older bans of the restored authority count")
	}
}

// TestWhatIsNotKnownOfBansIsSaved, for the next version of the agent to read.
func TestWhatIsNotKnownOfBansIsSaved(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	unknown := []byte{0xc2, 0x3e, 1, 'x'} // field 1000, of no version yet
	said := &capb.Bans{Revision: 3, Bans: []*capb.Ban{{Subject: &capb.Ban_Node{Node: "n"}, Until: timestamppb.New(time.Now().Add(time.Hour))}}}
	said.ProtoReflect().SetUnknown(unknown)
	said.Bans[0].ProtoReflect().SetUnknown(unknown)
	cfg := a.config()
	for range 2 { // as it was said, and as it was read
		c, err := caclient.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if cfg.SavedBans == nil {
			c.Heed(said)
		}
		saved, _ := c.SavedBans()
		got := &capb.Bans{}
		if err := proto.Unmarshal(saved[9:], got); err != nil {
			t.Fatal(err)
		}
		if string(got.ProtoReflect().GetUnknown()) != string(unknown) || string(got.GetBans()[0].ProtoReflect().GetUnknown()) != string(unknown) {
			t.Errorf("saved as %v", got)
		}
		cfg.SavedBans = saved
	}
}

// TestBansOfTwoSessionsAtOnce: a renewal has two sessions for a moment, and what the earlier
// one was told must not take the place of what the later one was told meanwhile.
func TestBansOfTwoSessionsAtOnce(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	cfg := a.config()
	var mu sync.Mutex
	var enforced []string
	first, later := make(chan struct{}), make(chan struct{})
	cfg.Enforce = func(b *identity.Bans) {
		if b.Len() == 1 {
			close(first)
			// The later ones come now, if anything lets them.
			select {
			case <-later:
			case <-time.After(time.Second):
			}
		}
		mu.Lock()
		defer mu.Unlock()
		enforced = subjects(b)
	}
	c, err := caclient.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	hear := func(bans *capb.Bans) {
		if err := c.Hear(&capb.WatchTrustResponse{Trust: a.trustOf(9), Bans: bans}); err != nil {
			t.Error(err)
		}
	}
	one, two := &capb.Ban{Subject: &capb.Ban_Node{Node: "one"}}, &capb.Ban{Subject: &capb.Ban_Node{Node: "two"}}
	var wg sync.WaitGroup
	wg.Go(func() { hear(&capb.Bans{Revision: 10, Bans: []*capb.Ban{one}}) })
	wg.Go(func() {
		<-first
		hear(&capb.Bans{Revision: 11, Bans: []*capb.Ban{one, two}})
		close(later)
	})
	wg.Wait()
	b, _ := c.Bans()
	if got := subjects(b); len(got) != 2 || len(enforced) != 2 {
		t.Errorf("known are %v, enforced are %v", got, enforced)
	}
}

// TestTrustOfTwoSessionsAtOnce is the same of trust: whoever has heard of a sequence finds
// no earlier one.
func TestTrustOfTwoSessionsAtOnce(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	c, err := caclient.New(a.config())
	if err != nil {
		t.Fatal(err)
	}
	var next atomic.Uint64
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 5000 {
				sequence := next.Add(1)
				err := c.Hear(&capb.WatchTrustResponse{Trust: a.trustOf(sequence)})
				if known, _ := c.Trust(); err == nil && known.Sequence() < sequence {
					t.Errorf("sequence %d is believed, and %d known", sequence, known.Sequence())
					return
				}
			}
		})
	}
	wg.Wait()
}
