package identity_test

import (
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/identity"
)

func subject(t testing.TB, s string) identity.BanSubject {
	t.Helper()
	b, err := identity.ParseBanSubject(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func bans(t testing.TB, subjects ...string) *identity.Bans {
	t.Helper()
	var list []identity.Ban
	for _, s := range subjects {
		list = append(list, identity.Ban{Subject: subject(t, s)})
	}
	return identity.NewBans(list)
}

func TestParseBanSubject(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"spiffe://cluster.local/ns/a/sa/b": "", "spiffe://cluster.local/ns/a/*": "", "spiffe://other/*": "",
		"serial/01ff": "", "serial/1ff": "serial/01ff", "serial/0001:FF": "serial/01ff", "node/worker-1.example": "",
	} {
		if want == "" {
			want = in
		}
		got, err := identity.ParseBanSubject(in)
		if err != nil || got.String() != want {
			t.Errorf("%s: %s, %v", in, got, err)
		}
		if again, err := identity.ParseBanSubject(got.String()); err != nil || again != got {
			t.Errorf("%s is not read as it is written: %v, %v", got, again, err)
		}
	}
	for _, in := range []string{
		"", "*", "spiffe://", "spiffe:///x", "spiffe://cluster.local", "spiffe://cluster.local/", "spiffe://cluster.local/ns/a/", "spiffe://cluster.local/ns/a*",
		"spiffe://cluster.local/ns/*/sa/b", "spiffe://cluster.local/ns//*", "spiffe://cluster.local/../*", "spiffe://Cluster.local/ns/a", "SPIFFE://cluster.local/ns/a",
		"spiffe://cluster.local/*/*", "spiffe://*", "spiffe://cluster.local" + strings.Repeat("/a", 33), "spiffe://cluster.local/" + strings.Repeat("a", 2048),
		"serial/", "serial/0", "serial/00", "serial/xy", "serial/" + strings.Repeat("11", 21), "node/", "node/a/b", "node/ö", "node/" + strings.Repeat("a", 300), "everybody", "pod/x", "cluster.local/ns/a/sa/b",
	} {
		if s, err := identity.ParseBanSubject(in); err == nil {
			t.Errorf("%q is read as %s", in, s)
		}
	}
}

func TestBansMeanWholeSegments(t *testing.T) { // counts allocations, so not in parallel
	b := bans(t, "spiffe://td/ns/shop/*", "spiffe://td/ns/shop/sa/cart", "spiffe://other/*", "spiffe://td/ns/a/sa/b", "serial/0102", "node/n1")
	for id, want := range map[string]string{
		"spiffe://td/ns/shop/sa/cart":  "spiffe://td/ns/shop/sa/cart",
		"spiffe://td/ns/shop/sa/cart2": "spiffe://td/ns/shop/*",
		"spiffe://td/ns/shop":          "spiffe://td/ns/shop/*",
		"spiffe://td/ns/shop/":         "spiffe://td/ns/shop/*",
		"spiffe://td/ns/shopping/sa/x": "", "spiffe://td/ns/sho": "", "spiffe://td/ns/a/sa/bc": "", "spiffe://td/ns/a/sa/b/c": "",
		"spiffe://other/x": "spiffe://other/*", "spiffe://other": "spiffe://other/*", "spiffe://other2/x": "", "spiffe://td/ns/a/sa/b": "spiffe://td/ns/a/sa/b",
		"": "", "spiffe://": "", "td/ns/shop/sa/cart": "", "other": "", "spiffe://td/x/ns/shop/sa/cart": "",
	} {
		got := ""
		if ban := b.ID([]byte(id)); ban != nil {
			got = ban.Subject.String()
		}
		if got != want {
			t.Errorf("%s: by %q, want %q", id, got, want)
		}
	}
	if b.Serial([]byte{0, 1, 2}) == nil || b.Serial([]byte{1, 2}) == nil || b.Serial([]byte{1, 2, 0}) != nil || b.Serial(nil) != nil {
		t.Error("serials")
	}
	if b.Node("n1") == nil || b.Node("n") != nil || b.Node("") != nil {
		t.Error("nodes")
	}
	var none *identity.Bans
	if none.ID([]byte("spiffe://td/x")) != nil || none.Serial([]byte{1}) != nil || none.Node("n") != nil || none.Len() != 0 || none.Everybody() != nil || none.Names() != nil || identity.NewBans(nil) != nil {
		t.Error("none bans somebody")
	}
	if n := testing.AllocsPerRun(100, func() { b.ID([]byte("spiffe://td/ns/shop/sa/other")); b.Serial([]byte{0, 1}) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestBansAgreeWithALookAtEach holds the look-ups against a comparison with each ban.
func TestBansAgreeWithALookAtEach(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(1, 2))
	path := func() string {
		s := "spiffe://" + []string{"td", "tdx", "o"}[rng.IntN(3)]
		for range rng.IntN(6) {
			s += "/" + []string{"a", "b", "aa", "ns", "sa"}[rng.IntN(5)]
		}
		return s
	}
	hits := 0
	for range 3000 {
		var list []string
		seen := map[string]bool{}
		for range rng.IntN(8) {
			s := path()
			if strings.Count(s, "/") == 2 || rng.IntN(2) == 0 {
				s += "/*"
			}
			if !seen[s] {
				seen[s], list = true, append(list, s)
			}
		}
		b := bans(t, list...)
		for range 10 {
			id, want := path(), ""
			for _, s := range list {
				if above, below := strings.CutSuffix(s, "/*"); (s == id || below && (id == above || strings.HasPrefix(id, above+"/"))) &&
					(want == "" || s == id || want != id && len(s) > len(want)) {
					want = s
				}
			}
			got := ""
			if ban := b.ID([]byte(id)); ban != nil {
				got, hits = ban.Subject.String(), hits+1
			}
			if got != want {
				t.Fatalf("%s of %q: %q, want %q", id, list, got, want)
			}
		}
	}
	if hits < 1000 {
		t.Errorf("only %d were banned", hits)
	}
}

func TestBansEnd(t *testing.T) {
	t.Parallel()
	now := time.Now()
	b := identity.NewBans([]identity.Ban{
		{Subject: subject(t, "node/a"), Until: now.Add(time.Minute)}, {Subject: subject(t, "node/b"), Until: now.Add(time.Second)}, {Subject: subject(t, "node/c")}})
	if in, next := b.At(now); in != b || !next.Equal(now.Add(time.Second)) {
		t.Errorf("now: %d, %v", in.Len(), next)
	}
	if in, next := b.At(now.Add(time.Second)); in.Len() != 2 || in.Node("b") != nil || !next.Equal(now.Add(time.Minute)) {
		t.Errorf("a second later: %d, %v", in.Len(), next)
	}
	if in, next := b.At(now.Add(time.Hour)); in.Len() != 1 || in.Node("c") == nil || !next.IsZero() {
		t.Errorf("an hour later: %d, %v", in.Len(), next)
	}
}

func FuzzParseBanSubject(f *testing.F) {
	for _, s := range []string{"spiffe://td/ns/a/*", "serial/01:02", "node/x", "spiffe://td/a"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		b, err := identity.ParseBanSubject(s)
		if err != nil {
			return
		}
		again, err := identity.ParseBanSubject(b.String())
		if err != nil || again != b {
			t.Fatalf("%q is read as %s, and that as %s, %v", s, b, again, err)
		}
		set := identity.NewBans([]identity.Ban{{Subject: b}})
		if id := b.ID(); id != "" && (set.ID([]byte(id)) == nil || set.ID([]byte(id+"x")) != nil) {
			t.Fatalf("%s does not mean itself alone", b)
		}
	})
}
