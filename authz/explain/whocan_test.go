package explain_test

import (
	"encoding/json"
	"flag"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/signet-mesh/signet/authz/explain"
)

var asked = flag.Int("asked", whole(100_000, 15_000), "how many random requests TestWhoCanIsExact holds against answers")

// TestWhoCanIsExact holds that a random request is allowed if and only if the answer to
// who can covers it, once it has been through JSON, and that it is asked about likewise.
func TestWhoCanIsExact(t *testing.T) {
	g := generator{rand.New(rand.NewPCG(6, 2))}
	verdicts, constructs, n, other, worlds := map[string]int{}, map[string]int{}, 0, 0, 0
	for n < *asked {
		w := g.world(t)
		worlds++
		p := w.snapshot.For(workload)
		var coverages []*explain.Coverage
		for i := range 3 {
			var given explain.Given
			switch i {
			case 1:
				port := pick(g, []uint16{80, 8080})
				given.Port = &port
			case 2:
				method, path := pick(g, []string{"GET", "POST"}), pick(g, []string{"/a", "/a/b", "/"})
				given.Method, given.Path = &method, &path
			}
			j, err := json.Marshal(explain.WhoCan(w.snapshot, workload, given))
			if err != nil {
				t.Fatal(err)
			}
			var a explain.Answer
			if err := json.Unmarshal(j, &a); err != nil {
				t.Fatal(err)
			}
			c, err := explain.NewCoverage(a, w.snapshot.Options().Envoy)
			if err != nil {
				t.Fatal(err)
			}
			coverages = append(coverages, c)
		}
		for range 200 {
			r := g.request()
			d := p.Decide(&r)
			for i, c := range coverages {
				about, got := c.Verdict(&r)
				if i == 0 && !about {
					t.Fatal("an answer about everything is not about a request")
				}
				if !about {
					other++
					continue
				}
				n++
				if got != d.Verdict() || c.Covers(&r) != (d.Verdict() == "allow") {
					t.Fatalf("answer %d says %s, and the decision is %s\n%+v\n%s", i, got, d.Text(), r, w.text)
				}
				verdicts[got]++
				if i > 0 {
					verdicts[got+" with method, path or port given"]++
				}
				if !r.HTTP {
					verdicts[got+" of bare connections"]++
				}
			}
			for c := range w.constructs {
				constructs[c]++
			}
		}
	}
	t.Logf("%d answers about requests, %d sets of policies; %d times it was not what was asked about", n, worlds, other)
	for _, m := range []map[string]int{verdicts, constructs} {
		for _, k := range slices.Sorted(maps.Keys(m)) {
			t.Logf("%8d %s", m[k], k)
		}
	}
	for _, v := range []string{"allow", "deny", "ask"} {
		if verdicts[v] < n/50 {
			t.Errorf("only %d of %d are %s", verdicts[v], n, v)
		}
	}
	// fields are all that rules can name; each must have been there.
	for _, f := range append([]string{
		"ALLOW", "DENY", "AUDIT", "CUSTOM", "PeerAuthentication", "portLevelMtls", "RequestAuthentication", "invalid",
		"principals", "notPrincipals", "namespaces", "notNamespaces", "serviceAccounts", "notServiceAccounts", "trustDomains", "notTrustDomains",
		"ipBlocks", "notIpBlocks", "remoteIpBlocks", "notRemoteIpBlocks", "requestPrincipals", "notRequestPrincipals",
		"hosts", "notHosts", "methods", "notMethods", "paths", "notPaths", "ports", "notPorts",
	}, keys...) {
		if constructs[f] == 0 {
			t.Errorf("no policy had %s", f)
		}
	}
}
