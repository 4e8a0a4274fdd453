package identity_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/identity"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

func mustURL(t *testing.T, s string) *url.URL {
	t.Helper()
	u, err := url.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// authority makes a self-signed authority, changed by edit.
func authority(t *testing.T, edit func(*x509.Certificate)) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, URIs: []*url.URL{td.ID().URL()}}
	if edit != nil {
		edit(c)
	}
	return sign(t, c, c, key, key), key
}

func sign(t *testing.T, c, parent *x509.Certificate, key, parentKey *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), parentKey)
	if err != nil {
		t.Fatal(err)
	}
	out, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestCheckSVIDFollowsEveryClause(t *testing.T) {
	root, rootKey := authority(t, nil)
	for _, c := range []struct {
		name string
		edit func(*x509.Certificate)
		ok   bool
	}{
		{"the profile itself passes", func(*x509.Certificate) {}, true},
		{"a DNS name beside the URI passes (X509-SVID §2)", func(c *x509.Certificate) { c.DNSNames = []string{"a.example"} }, true},
		{"no URI SAN is refused", func(c *x509.Certificate) { c.URIs = nil; c.DNSNames = []string{"a.example"} }, false},
		{"two URI SANs are refused", func(c *x509.Certificate) { c.URIs = append(c.URIs, mustURL(t, "spiffe://cluster.local/ns/x/sa/y")) }, false},
		{"another scheme is refused", func(c *x509.Certificate) { c.URIs = []*url.URL{mustURL(t, "https://cluster.local/ns/a/sa/b")} }, false},
		{"a SPIFFE ID without a path is refused", func(c *x509.Certificate) { c.URIs = []*url.URL{td.ID().URL()} }, false},
		{"an authority is refused", func(c *x509.Certificate) { c.IsCA = true }, false},
		{"missing basic constraints are refused", func(c *x509.Certificate) { c.BasicConstraintsValid = false }, false},
		{"keyCertSign is refused", func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }, false},
		{"cRLSign is refused", func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }, false},
		{"missing digitalSignature is refused", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }, false},
		{"missing key usage is refused", func(c *x509.Certificate) { c.KeyUsage = 0 }, false},
		{"client authentication alone is refused", func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] }, false},
		{"server authentication alone is refused", func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }, false},
		{"a subject makes an uncritical SAN right", func(c *x509.Certificate) { c.Subject = pkix.Name{CommonName: "x"} }, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			tmpl := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: root.NotBefore, NotAfter: root.NotAfter, BasicConstraintsValid: true,
				KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
				URIs: []*url.URL{mustURL(t, "spiffe://cluster.local/ns/default/sa/web")}}
			c.edit(tmpl)
			cert := sign(t, tmpl, root, key, rootKey)
			id, err := identity.CheckSVID(cert)
			if (err == nil) != c.ok {
				t.Fatalf("got %v", err)
			}
			if err != nil {
				return
			}
			// What we accept, go-spiffe accepts too.
			trust, err := identity.NewTrust(1, td, []*x509.Certificate{root})
			if err != nil {
				t.Fatal(err)
			}
			if got, _, err := x509svid.Verify([]*x509.Certificate{cert}, trust); err != nil || got != id {
				t.Errorf("go-spiffe says %s, %v", got, err)
			}
		})
	}
}

func TestTrustTakesAuthoritiesOnly(t *testing.T) {
	root, _ := authority(t, nil)
	leaf, _ := authority(t, func(c *x509.Certificate) { c.IsCA = false; c.KeyUsage = x509.KeyUsageDigitalSignature })
	noSign, _ := authority(t, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign })
	for name, roots := range map[string][]*x509.Certificate{"none": nil, "a leaf": {root, leaf}, "one that may not sign": {noSign}} {
		if _, err := identity.NewTrust(1, td, roots); err == nil {
			t.Errorf("a bundle of %s was taken", name)
		}
	}
	tr, err := identity.NewTrust(3, td, []*x509.Certificate{root})
	if err != nil {
		t.Fatal(err)
	}
	roots := tr.Roots()
	roots[0] = leaf
	if tr.Sequence() != 3 || !tr.Roots()[0].Equal(root) {
		t.Error("a Trust must not change through what it returned")
	}
	other, _ := identity.ParseTrustDomain("other.domain")
	if _, err := tr.GetX509BundleForTrustDomain(other); err == nil {
		t.Error("the bundle of one trust domain was given for another")
	}
	if b, err := tr.GetX509BundleForTrustDomain(td); err != nil || !b.HasX509Authority(root) {
		t.Errorf("own bundle: %v", err)
	}
}

func TestWorkloadEqualSeesEveryField(t *testing.T) {
	c := identity.Caller{Workload: identity.Workload{Namespace: "n"}, Token: "secret"}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
		if strings.Contains(fmt.Sprintf(verb, c), "secret") {
			t.Errorf("%s prints a caller's token", verb)
		}
	}
	one, two := uint32(1), uint32(2)
	base := identity.Workload{Namespace: "n", ServiceAccount: "s", Pod: "p", PodUID: "u", Node: "o", NodeUID: "v", Labels: map[string]string{"a": "b"}, UnixUID: &one}
	if !base.Equal(base) || base.IsZero() {
		t.Fatal("a workload must equal itself and not be zero")
	}
	for i, edit := range []func(*identity.Workload){
		func(w *identity.Workload) { w.Namespace = "" }, func(w *identity.Workload) { w.ServiceAccount = "" }, func(w *identity.Workload) { w.Pod = "" },
		func(w *identity.Workload) { w.PodUID = "" }, func(w *identity.Workload) { w.Node = "" }, func(w *identity.Workload) { w.NodeUID = "" },
		func(w *identity.Workload) { w.Labels = nil }, func(w *identity.Workload) { w.UnixUID = nil }, func(w *identity.Workload) { w.UnixUID = &two },
	} {
		w := base
		edit(&w)
		if w.Equal(base) || base.Equal(w) {
			t.Errorf("edit %d was not seen", i)
		}
	}
}
