package authz_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

func banned(t testing.TB, subjects ...string) *identity.Bans {
	t.Helper()
	var list []identity.Ban
	for _, s := range subjects {
		if s == "everybody" {
			list = append(list, identity.Ban{Subject: identity.Everybody(), Reason: "?"})
			continue
		}
		b, err := identity.ParseBanSubject(s)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, identity.Ban{Subject: b, Reason: "stolen"})
	}
	return identity.NewBans(list)
}

func TestBansComeBeforePolicies(t *testing.T) {
	t.Parallel()
	const id = "spiffe://cluster.local/ns/shop/sa/cart"
	known := authz.FieldPeer | authz.FieldPrincipal
	peer := authz.Request{Known: known, Authenticated: true, Principal: []byte(id), Serial: []byte{1, 2}}
	with := func(f func(*authz.Request)) authz.Request { r := peer; f(&r); return r }
	for name, c := range map[string]struct {
		ban    string
		r      authz.Request
		reason authz.Reason // empty: the policies decide
	}{
		"the ID":                             {id, peer, authz.ReasonBanned},
		"the ID, of a request":               {id, with(func(r *authz.Request) { r.HTTP = true }), authz.ReasonBanned},
		"another":                            {id + "2", peer, ""},
		"a namespace":                        {"spiffe://cluster.local/ns/shop/*", peer, authz.ReasonBanned},
		"the beginning of a segment":         {"spiffe://cluster.local/ns/sho/*", peer, ""},
		"another of the peer's names":        {id, with(func(r *authz.Request) { r.Principal, r.OtherNames = []byte("x"), [][]byte{[]byte("y"), []byte(id)} }), authz.ReasonBanned},
		"a peer that nothing is known of":    {id, authz.Request{}, authz.ReasonBanUnknown},
		"a peer whose names are not known":   {id, authz.Request{Known: authz.FieldPeer, Authenticated: true}, authz.ReasonBanUnknown},
		"a known name of a peer, not all":    {id, authz.Request{Known: authz.FieldPeer, Authenticated: true, Principal: []byte(id)}, authz.ReasonBanned},
		"a peer without TLS":                 {id, authz.Request{Known: known}, ""},
		"a peer without TLS, with no names":  {id, authz.Request{Known: authz.FieldPeer}, ""},
		"a serial":                           {"serial/0102", peer, authz.ReasonBanned},
		"a serial with zeros before it":      {"serial/0102", with(func(r *authz.Request) { r.Serial = []byte{0, 1, 2} }), authz.ReasonBanned},
		"another serial":                     {"serial/0103", peer, ""},
		"a serial that is not known":         {"serial/0102", with(func(r *authz.Request) { r.Serial = nil }), ""},
		"a serial, and nothing of the peer":  {"serial/0102", authz.Request{}, ""},
		"a node":                             {"node/a", peer, ""},
		"in a way that nobody here can read": {"everybody", authz.Request{Known: known}, authz.ReasonBanUnknown},
	} {
		s := compile(t, "", authz.Options{})
		free := s.For(identity.Workload{Namespace: "default"}).Decide(&c.r)
		d := s.WithBans(banned(t, c.ban)).For(identity.Workload{Namespace: "default"}).Decide(&c.r)
		if c.reason == "" {
			if d != free || !d.Allowed {
				t.Errorf("%s: %+v", name, d)
			}
			continue
		}
		if d.Allowed || d.Ask || d.Reason != c.reason || d.Kind != authz.KindBan || d.Policy != c.ban || d.Rule != -1 {
			t.Errorf("%s: %+v", name, d)
		}
		if text := d.Text(); !strings.HasPrefix(text, "denied by Ban "+c.ban+": ") || c.reason == authz.ReasonBanned && !strings.Contains(text, "stolen") {
			t.Errorf("%s: %s", name, text)
		}
	}
}

// TestABanNeverOpens: whatever policies and request are, a decision with bans is the one
// without, or a denial in a ban's name; and who is banned is denied.
func TestABanNeverOpens(t *testing.T) {
	t.Parallel()
	s := compile(t, ladder(20), authz.Options{})
	n := 0
	for name, r := range ladderRequests(20) {
		for _, known := range []authz.Field{authz.FieldsHTTP, authz.FieldsTCP, 0} {
			for _, ban := range []string{"spiffe://cluster.local/ns/none/*", "spiffe://" + strings.TrimPrefix(string(r.Principal), "spiffe://"), "serial/01", "everybody"} {
				if b, err := identity.ParseBanSubject(ban); ban != "everybody" && (err != nil || b.IsZero()) {
					continue
				}
				r.Known = known
				with := s.WithBans(banned(t, ban))
				was, is := s.For(identity.Workload{Namespace: "default"}).Decide(&r), with.For(identity.Workload{Namespace: "default"}).Decide(&r)
				if is != was && (is.Allowed || is.Ask || is.Kind != authz.KindBan) {
					t.Errorf("%s, %s: %+v, without it %+v", name, ban, is, was)
				}
				if mine := string(r.Principal) == ban || ban == "everybody"; mine && is.Kind != authz.KindBan && r.Authenticated {
					t.Errorf("%s, %s: %+v", name, ban, is)
				}
				n++
			}
		}
	}
	if n < 20 {
		t.Errorf("only %d decisions", n)
	}
}

func TestSnapshotsKeepTheirBans(t *testing.T) { // counts allocations, so not in parallel
	rs, _ := authz.Parse("p", []byte(ladder(5)))
	set, _ := authz.Set{}.Update(rs)
	s, _ := authz.Compile(set, authz.Options{})
	w := identity.Workload{Namespace: "default"}
	bans := banned(t, "node/x", "serial/01")
	with := s.WithBans(bans)
	if with.Bans() != bans || s.Bans() != nil || with.WithBans(bans) != with || s.WithBans(nil) != s || with.Generation() != s.Generation() {
		t.Error("WithBans")
	}
	if again := with.For(w); with.For(w) == s.For(w) || with.For(w) != again {
		t.Error("programs are not kept")
	}
	r := authz.Request{Serial: []byte{1}}
	next, _ := with.Update(set)
	for name, c := range map[string]*authz.Snapshot{"first": with, "updated": next, "free": with.WithBans(nil), "none": s} {
		want := name == "first" || name == "updated"
		if d := c.For(w).Decide(&r); (d.Reason == authz.ReasonBanned) != want {
			t.Errorf("%s: %+v", name, d)
		}
	}
	var none *authz.Snapshot
	if none.WithBans(bans) != nil || none.Bans() != nil {
		t.Error("a nil snapshot")
	}
	zero := new(authz.Snapshot)
	if d := zero.WithBans(bans).For(w).Decide(&r); d.Allowed {
		t.Errorf("a zero snapshot: %+v", d)
	}
	p := with.For(w)
	if n := testing.AllocsPerRun(100, func() { p.Decide(&r); with.For(w) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkDecideWithBans(b *testing.B) {
	s := compile(b, ladder(100), authz.Options{})
	r := ladderRequests(100)["hit"]
	r.Serial = []byte{1, 2, 3}
	for _, n := range []int{0, 1, 1000, 10_000} {
		var list []string
		for i := range n {
			list = append(list, fmt.Sprintf([]string{"spiffe://cluster.local/ns/n%d/*", "spiffe://cluster.local/ns/a/sa/s%d", "serial/01%06x"}[i%3], i))
		}
		p := s.WithBans(banned(b, list...)).For(identity.Workload{Namespace: "default"})
		b.Run(fmt.Sprintf("bans=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				p.Decide(&r)
			}
		})
	}
}
