package identity_test

import (
	"strings"
	"testing"

	"github.com/signet-mesh/signet/identity"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var td = spiffeid.RequireTrustDomainFromString("cluster.local")

func TestNames(t *testing.T) {
	for _, c := range []struct {
		name string
		id   func() (spiffeid.ID, error)
		want string
	}{
		{"a workload", func() (spiffeid.ID, error) { return identity.WorkloadID(td, "default", "web") }, "spiffe://cluster.local/ns/default/sa/web"},
		{"an agent", func() (spiffeid.ID, error) { return identity.AgentID(td, "node-1.example") }, "spiffe://cluster.local/signet/agent/node-1.example"},
		{"an authority", func() (spiffeid.ID, error) { return identity.AuthorityID(td, 127) }, "spiffe://cluster.local/signet/ca/127"},
		{"an operator", func() (spiffeid.ID, error) { return identity.OperatorID(td, "ann") }, "spiffe://cluster.local/signet/operator/ann"},
	} {
		id, err := c.id()
		if err != nil || id.String() != c.want {
			t.Errorf("%s: got %q, %v; want %q", c.name, id, err, c.want)
		}
	}
}

// TestSegmentAlphabet walks all bytes: a name with any byte outside the
// SPIFFE-ID §2.2 alphabet is refused, and so is every way to add, remove or
// leave out a segment.
func TestSegmentAlphabet(t *testing.T) {
	for b := range 256 {
		name := "a" + string([]byte{byte(b)}) + "z"
		_, err := identity.WorkloadID(td, name, "sa")
		_, err2 := identity.WorkloadID(td, "ns", name)
		ok := b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || b >= '0' && b <= '9' || b == '-' || b == '_' || b == '.'
		if (err == nil) != ok || (err2 == nil) != ok {
			t.Errorf("byte %#x: namespace %v, service account %v; allowed must be %v", b, err, err2, ok)
		}
	}
	for _, name := range []string{"", ".", "..", "a/b", "/", "a/", "%2e", "ns/x/sa/y", strings.Repeat("a", 254), strings.Repeat("a", 1<<20)} {
		if id, err := identity.WorkloadID(td, name, "sa"); err == nil {
			t.Errorf("namespace %.30q made %.80s", name, id)
		}
		if id, err := identity.AgentID(td, name); err == nil {
			t.Errorf("node %.30q made %.80s", name, id)
		}
	}
	for _, n := range []uint8{0, 128, 255} {
		if id, err := identity.AuthorityID(td, n); err == nil {
			t.Errorf("instance %d made %s", n, id)
		}
	}
}

func TestKindsOfNamesAreDistinct(t *testing.T) {
	agent, _ := identity.AgentID(td, "n")
	authority, _ := identity.AuthorityID(td, 1)
	workload, _ := identity.WorkloadID(td, "signet", "agent")
	foreign := spiffeid.RequireFromString("spiffe://other.domain/signet/ca/1")
	deeper := spiffeid.RequireFromString("spiffe://cluster.local/signet/ca/1/2")
	for _, c := range []struct {
		id                         spiffeid.ID
		workload, agent, authority bool
	}{
		{agent, false, true, false},
		{authority, false, false, true},
		{workload, true, false, false},
		{foreign, false, false, false},
		{deeper, false, false, false},
		{td.ID(), false, false, false},
		{spiffeid.RequireFromString("spiffe://cluster.local/ns/a/sa/b/c"), false, false, false},
	} {
		_, _, w := identity.SplitWorkloadID(c.id)
		_, a := identity.AgentNode(c.id)
		if w != c.workload || a != c.agent || identity.IsAuthority(td, c.id) != c.authority {
			t.Errorf("%s: workload %v, agent %v, authority %v", c.id, w, a, identity.IsAuthority(td, c.id))
		}
	}
}

func TestTrustDomain(t *testing.T) {
	for name, ok := range map[string]bool{
		"cluster.local": true, "a_b-c.1": true, "": false, "UPPER": false, "spiffe://cluster.local": false, "a/b": false,
		"a:1": false, strings.Repeat("a", 255): true, strings.Repeat("a", 256): false,
	} {
		if _, err := identity.ParseTrustDomain(name); (err == nil) != ok {
			t.Errorf("trust domain %.40q: %v; allowed must be %v", name, err, ok)
		}
	}
	if _, err := identity.ParseID("spiffe://td/" + strings.Repeat("a", 2048)); err == nil {
		t.Error("a SPIFFE ID of more than 2048 bytes was taken")
	}
}

// FuzzWorkloadID states that a name that is made names exactly what it was made
// from.
func FuzzWorkloadID(f *testing.F) {
	f.Add("default", "web")
	f.Add("..", "a/b")
	f.Add("a\x00", "%2f")
	f.Fuzz(func(t *testing.T, ns, sa string) {
		id, err := identity.WorkloadID(td, ns, sa)
		if err != nil {
			return
		}
		gotNS, gotSA, ok := identity.SplitWorkloadID(id)
		if !ok || gotNS != ns || gotSA != sa {
			t.Fatalf("%q/%q made %s, which names %q/%q", ns, sa, id, gotNS, gotSA)
		}
		if again, err := identity.ParseID(id.String()); err != nil || again != id {
			t.Fatalf("%s parses as %s, %v", id, again, err)
		}
	})
}
