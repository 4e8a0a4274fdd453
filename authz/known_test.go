package authz_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// allows is whether the request gets through where every provider that is asked
// allows.
func allows(p *authz.Program, r *authz.Request) bool {
	d := p.Decide(r)
	for d.Ask {
		d = p.After(d, r)
	}
	return d.Allowed
}

// readsEnough checks that decisions are the same, to the last detail, about a request
// that has nothing but what the program reads.
func readsEnough(t *testing.T, p *authz.Program, r authz.Request) {
	t.Helper()
	reads := p.Reads()
	less := r
	less.Known &= reads
	without := func(f authz.Field) bool { return reads&f == 0 }
	if without(authz.FieldPeer) {
		less.Authenticated = false
	}
	if without(authz.FieldPrincipal) {
		less.Principal, less.OtherNames = nil, nil
	}
	if without(authz.FieldSourceIP) {
		less.SourceIP = netip.Addr{}
	}
	if without(authz.FieldRemoteIP) {
		less.RemoteIP = netip.Addr{}
	}
	if without(authz.FieldDestinationIP) {
		less.DestinationIP = netip.Addr{}
	}
	if without(authz.FieldDestinationPort) {
		less.DestinationPort = 0
	}
	if without(authz.FieldSNI) {
		less.SNI = nil
	}
	if without(authz.FieldMethod) {
		less.Method = nil
	}
	if without(authz.FieldPath) {
		less.Path = nil
	}
	if without(authz.FieldHost) {
		less.Host = nil
	}
	if without(authz.FieldHeaders) {
		less.Headers = nil
	}
	if without(authz.FieldClaims) {
		less.Claims = nil
	}
	if without(authz.FieldMetadata) {
		less.Metadata = nil
	}
	for want, got := p.Decide(&r), p.Decide(&less); ; want, got = p.After(want, &r), p.After(got, &less) {
		if want != got {
			t.Fatalf("of %+v\n  %s\nof what of it is read (%b), %+v\n  %s", r, want.Text(), reads, less, got.Text())
		}
		if !want.Ask {
			return
		}
	}
}

// TestKnowingLessNeverOpens takes from what is known of requests: what was denied
// stays denied, through policies of every action, dry-run ones, PeerAuthentication
// and RequestAuthentication. The remote address is left out, because without its
// bit it is derived.
func TestKnowingLessNeverOpens(t *testing.T) {
	t.Parallel()
	seed := seeded(t)
	g := generator{rand.New(rand.NewPCG(seed, 6))}
	worlds := 2000
	switch {
	case raceEnabled:
		worlds = 60
	case testing.Short():
		worlds = 300
	}
	denied, allowed := 0, 0
	for world := range worlds {
		text := g.world().yaml
		if g.IntN(2) == 0 {
			text = g.edgeDocument("p")
		}
		if g.IntN(2) == 0 {
			text = fmt.Appendf(text, "---\napiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {name: jwt, namespace: root}\nspec: {jwtRules: [%s]}\n",
				pick(g, []string{"{issuer: i}", "{issuer: i, audiences: [a]}", "{issuer: i, fromHeaders: [{name: X-A, prefix: a}]}", "{issuer: i, fromCookies: [c]}", "{issuer: i, fromParams: [x]}"}))
		}
		rs, _ := authz.Parse("x", text)
		set, _ := authz.Set{}.Update(rs)
		snapshot, _ := authz.Compile(set, authz.Options{RootNamespace: "root", MultipleProviders: g.IntN(2) == 0})
		p := snapshot.For(identity.Workload{Namespace: pick(g, []string{"one", "a", "two"}), Labels: map[string]string{"app": "web"}})
		for range 40 {
			r := g.request()
			if g.IntN(2) == 0 {
				r = g.edgeRequest()
			}
			switch g.IntN(6) {
			case 0:
				r.Headers = append(r.Headers, authz.Header{Name: pick(g, []string{"authorization", "cookie"}), Value: []byte(pick(g, []string{"Bearer x", "Basic x", "c=x"}))})
			case 1:
				r.Path = []byte("/a?" + pick(g, []string{"access_token=x", "x=y"}))
			case 2:
				r.Method = []byte("OPTIONS")
				r.Headers = append(r.Headers, authz.Header{Name: "origin", Value: []byte("o")}, authz.Header{Name: "access-control-request-method", Value: []byte("GET")})
			}
			if g.IntN(2) == 0 {
				r.Claims = nil
			}
			readsEnough(t, p, r)
			before := r.Known
			if allows(p, &r) {
				allowed++
				continue
			}
			denied++
			for bit := authz.Field(1); bit <= authz.FieldMetadata; bit <<= 1 {
				if r.Known = before &^ bit; bit != authz.FieldRemoteIP && allows(p, &r) {
					t.Fatalf("seed %d, world %d: without bit %b of %b it is allowed: %s\n%+v\n%s", seed, world, bit, before, p.Decide(&r).Text(), r, text)
				}
			}
			less := authz.Field(g.Uint32()) | authz.FieldRemoteIP
			if r.Known = before & less; allows(p, &r) {
				t.Fatalf("seed %d, world %d: with %b of %b it is allowed: %s\n%+v\n%s", seed, world, r.Known, before, p.Decide(&r).Text(), r, text)
			}
		}
	}
	t.Logf("seed %d: %d denied, %d allowed", seed, denied, allowed)
	if denied < 5000*worlds/2000 || allowed < 5000*worlds/2000 {
		t.Errorf("too few: %d denied, %d allowed", denied, allowed)
	}
}
