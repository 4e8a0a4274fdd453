package ca_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"math/big"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/identity"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func order(pub crypto.PublicKey) ca.Order {
	return ca.Order{Door: "test", Workload: server, PublicKey: pub, Evidence: capb.IssuanceRecord_EVIDENCE_TOKEN}
}

// TestAnOrderBecomesACertificateAndARecord: name, pod and node come from the
// workload, and the log says all of it.
func TestAnOrderBecomesACertificateAndARecord(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	key, _ := newKey(t)
	o := order(key.Public())
	o.TTL, o.Requester, o.TokenAt = 30*time.Minute, []byte{1, 2, 3}, time.Unix(1700000000, 0)
	out, err := w.Issue(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	leaf := out.Chain[0]
	id, err := identity.CheckSVID(leaf)
	if err != nil || id.String() != "spiffe://cluster.local/ns/default/sa/server" {
		t.Errorf("%s, %v", id, err)
	}
	if life := time.Until(leaf.NotAfter); life < 29*time.Minute || life > 30*time.Minute {
		t.Errorf("it lives for another %v", life)
	}
	if err := w.VerifyClient(out.Chain); err != nil {
		t.Error(err)
	}
	var found bool
	for r, err := range w.Issuances(t.Context(), time.Now().Add(-time.Minute)) {
		if err != nil {
			t.Fatal(err)
		}
		if string(r.Serial) != string(ca.Serial(leaf)) {
			continue
		}
		found = true
		if r.Door != "test" || r.PodUid != server.PodUID || r.Node != server.Node || r.TokenAt != 1700000000 ||
			string(r.Requester) != "\x01\x02\x03" || r.Kind != capb.IssuanceRecord_KIND_WORKLOAD || r.SpiffeId != id.String() {
			t.Errorf("record %v", r)
		}
	}
	if !found {
		t.Error("there is no record")
	}
}

func TestOrdersAreClampedOrRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *ca.Config) { c.SVID = ca.SVIDConfig{TTL: time.Hour, MaxTTL: 2 * time.Hour, MinTTL: time.Minute} })
	key, _ := newKey(t)
	for asked, want := range map[time.Duration]time.Duration{0: time.Hour, time.Second: time.Minute, -time.Hour: time.Minute, 10000 * time.Hour: 2 * time.Hour} {
		o := order(key.Public())
		o.TTL = asked
		out, err := w.Issue(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		if life := time.Until(out.Chain[0].NotAfter); life > want || life < want-10*time.Second {
			t.Errorf("asked for %v, it lives for %v; want %v", asked, life, want)
		}
	}
	before := w.Log().Head().Sequence
	bad := order(key.Public())
	bad.Workload.ServiceAccount = "a/b"
	if _, err := w.Issue(t.Context(), bad); err == nil {
		t.Error("a service account with a slash was named")
	}
	for _, o := range []ca.Order{{Workload: server, PublicKey: key.Public()}, {Door: "test", PublicKey: key.Public()}, order(nil)} {
		if _, err := w.Issue(t.Context(), o); err == nil {
			t.Errorf("%+v was issued", o)
		}
	}
	if after := w.Log().Head().Sequence; after != before {
		t.Errorf("%d records of refused orders", after-before)
	}
}

func TestPublicKeys(t *testing.T) {
	t.Parallel()
	ec := func(c elliptic.Curve) crypto.PublicKey { return must(ecdsa.GenerateKey(c, rand.Reader)).Public() }
	ed, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t)
	for name, pub := range map[string]crypto.PublicKey{"P-256": ec(elliptic.P256()), "P-384": ec(elliptic.P384()), "P-521": ec(elliptic.P521()),
		"Ed25519": ed, "RSA 2048": must(rsa.GenerateKey(rand.Reader, 2048)).Public()} {
		out, err := w.Issue(t.Context(), order(pub))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !out.Chain[0].PublicKey.(interface{ Equal(crypto.PublicKey) bool }).Equal(pub) {
			t.Errorf("%s: another key was certified", name)
		}
	}
	for name, pub := range map[string]crypto.PublicKey{"P-224": ec(elliptic.P224()), "nil": nil, "a string": "key",
		"RSA 1024": &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 1023), E: 65537}} {
		if _, err := w.Issue(t.Context(), order(pub)); !errors.Is(err, ca.ErrPublicKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestServingCertificatesForADoor(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	cert, renewAt, err := w.IssueServing(t.Context(), "test", spiffeid.ID{}, []string{"istiod.istio-system.svc"})
	if err != nil {
		t.Fatal(err)
	}
	if err := cert.Leaf.VerifyHostname("istiod.istio-system.svc"); err != nil || cert.Leaf.URIs[0].String() != w.ID().String() {
		t.Errorf("%v, %v", err, cert.Leaf.URIs)
	}
	if !renewAt.After(time.Now()) || !renewAt.Before(cert.Leaf.NotAfter) || !w.recorded(cert.Leaf) {
		t.Errorf("renewed at %v, recorded %v", renewAt, w.recorded(cert.Leaf))
	}
	for _, bad := range []string{"Istiod", "", "*.svc", "a b"} {
		if _, _, err := w.IssueServing(t.Context(), "test", spiffeid.ID{}, []string{bad}); err == nil {
			t.Errorf("%q was certified", bad)
		}
	}
	if _, _, err := w.IssueServing(t.Context(), "test", spiffeid.RequireFromString("spiffe://other/x"), nil); err == nil {
		t.Error("a foreign name was certified")
	}
}

// TestIssuancesBegin: the binary search finds the first record since a moment.
func TestIssuancesBegin(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	key, _ := newKey(t)
	for range 20 {
		if _, err := w.Issue(t.Context(), order(key.Public())); err != nil {
			t.Fatal(err)
		}
	}
	count := func(since time.Time) (n int) {
		for _, err := range w.Issuances(t.Context(), since) {
			if err != nil {
				t.Fatal(err)
			}
			n++
		}
		return n
	}
	all := int(w.Log().Head().Sequence)
	if n := count(time.Time{}); n != all {
		t.Errorf("%d of %d records since ever", n, all)
	}
	if n := count(time.Now().Add(time.Hour)); n > 1 {
		t.Errorf("%d records since the future", n)
	}
	var at time.Time
	for r, err := range w.Log().Scan(t.Context(), uint64(all-5)) {
		if err != nil {
			t.Fatal(err)
		}
		at = r.Time
		break
	}
	if n := count(at); n < 6 || n > 8 {
		t.Errorf("%d records since the sixth from the end", n)
	}
}
