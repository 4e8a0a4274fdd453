package ca_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/profile"
	"github.com/signet-mesh/signet/identity"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

func lint(p profile.Profile, tbs []byte) error {
	_, err := p.Lint(tbs)
	return err
}

// publicKeys are one of each kind that is certified.
func publicKeys(t testing.TB) map[string]crypto.PublicKey {
	t.Helper()
	keys := map[string]crypto.PublicKey{}
	for name, c := range map[string]elliptic.Curve{"P-256": elliptic.P256(), "P-384": elliptic.P384(), "P-521": elliptic.P521()} {
		keys[name] = must(ecdsa.GenerateKey(c, rand.Reader)).Public()
	}
	pub, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	keys["Ed25519"], keys["RSA"] = pub, must(rsa.GenerateKey(rand.Reader, 2048)).Public()
	return keys
}

// randomID is any SPIFFE ID with a path that the standard allows.
func randomID(r *mathrand.Rand) spiffeid.ID {
	const chars = "abcXYZ019.-_"
	var path []string
	for range 1 + r.IntN(5) {
		b := []byte("s")
		for range r.IntN(40) {
			b = append(b, chars[r.IntN(len(chars))])
		}
		path = append(path, string(b))
	}
	return must(spiffeid.FromSegments(td, path...))
}

// TestEveryKindOfCertificateHasItsProfile makes every kind of certificate, with
// every kind of key and with random names and lives, and holds it clause by clause
// against X509-SVID and against the table in DESIGN.md, by crypto/x509 and go-spiffe,
// which had no part in building it. OpenSSL verifies samples.
func TestEveryKindOfCertificateHasItsProfile(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	seed := uint64(time.Now().UnixNano())
	r := mathrand.New(mathrand.NewPCG(seed, 1))
	rounds := 6
	if testing.Short() {
		rounds = 1
	}
	made, samples := map[string]int{}, [][]*x509.Certificate{}
	for round := range rounds {
		for keyName, pub := range publicKeys(t) {
			for _, kind := range []capb.IssuanceRecord_Kind{capb.IssuanceRecord_KIND_INTERMEDIATE, capb.IssuanceRecord_KIND_SERVING,
				capb.IssuanceRecord_KIND_AGENT, capb.IssuanceRecord_KIND_WORKLOAD} {
				// Another key for each identity: a key that is in use is refused.
				if _, ok := pub.(*rsa.PublicKey); !ok {
					pub = publicKeysLike(pub)
				} else if kind != capb.IssuanceRecord_KIND_WORKLOAD {
					continue
				}
				id, ttl := randomID(r), time.Minute+time.Duration(r.Int64N(int64(23*time.Hour)))
				var names []string
				for i := range r.IntN(3) {
					names = append(names, fmt.Sprintf("n%d.example-%d.svc", i, r.IntN(100)))
				}
				if kind == capb.IssuanceRecord_KIND_INTERMEDIATE {
					id, names = spiffeid.ID{}, nil
				}
				start := time.Now()
				chain, err := w.Certify(t.Context(), kind, id, names, pub, ttl)
				if err != nil {
					t.Fatalf("seed %d: %v with %s: %v", seed, kind, keyName, err)
				}
				if made[kind.String()]++; round == 0 {
					samples = append(samples, chain)
				}
				c := chain[0]
				clauses(t, fmt.Sprintf("seed %d: %v with %s", seed, kind, keyName), w, kind, c)
				if got := pub.(interface{ Equal(crypto.PublicKey) bool }); !got.Equal(c.PublicKey) {
					t.Errorf("%v: another key is certified", kind)
				}
				if want := start.Add(ttl); c.NotAfter.After(want.Add(5*time.Second)) || c.NotAfter.Before(want.Add(-2*time.Second)) || c.NotBefore.After(start.Add(-58*time.Second)) {
					t.Errorf("%v: valid from %s to %s, asked for %v at %s", kind, c.NotBefore, c.NotAfter, ttl, start)
				}
				if kind == capb.IssuanceRecord_KIND_INTERMEDIATE {
					continue
				}
				if c.URIs[0].String() != id.String() || !slices.Equal(c.DNSNames, names) {
					t.Errorf("%v: names %v %v, want %s %v", kind, c.URIs, c.DNSNames, id, names)
				}
				trust, _ := w.Trust()
				if got, _, err := x509svid.Verify(chain, trust); err != nil || got != id {
					t.Errorf("%v: go-spiffe: %s, %v", kind, got, err)
				}
			}
		}
	}
	clauses(t, "root", w, capb.IssuanceRecord_KIND_ROOT, w.Root())
	clauses(t, "intermediate", w, capb.IssuanceRecord_KIND_INTERMEDIATE, w.Intermediate())
	verified := opensslVerify(t, w, samples)
	t.Logf("%v certificates; openssl verified %d", made, verified)
}

func publicKeysLike(pub crypto.PublicKey) crypto.PublicKey {
	if k, ok := pub.(*ecdsa.PublicKey); ok {
		return must(ecdsa.GenerateKey(k.Curve, rand.Reader)).Public()
	}
	_, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	return priv.Public()
}

// clauses are those of X509-SVID and of RFC 5280 that hold for a kind.
func clauses(t *testing.T, what string, w *world, kind capb.IssuanceRecord_Kind, c *x509.Certificate) {
	t.Helper()
	bad := func(clause string, got any) {
		t.Helper()
		t.Errorf("%s: %s: %v", what, clause, got)
	}
	critical := map[string]bool{}
	for _, e := range c.Extensions {
		if _, twice := critical[e.Id.String()]; twice {
			bad("RFC 5280 §4.2: an extension occurs once", e.Id)
		}
		critical[e.Id.String()] = e.Critical
	}
	serial := c.SerialNumber.Bytes()
	if c.Version != 3 || c.SerialNumber.Sign() <= 0 || len(serial) > 20 || len(serial) != 17 || serial[0] != 1 {
		bad("RFC 5280 §4.1.2.2: positive serial of at most 20 bytes, the first one the instance", serial)
	}
	if len(c.URIs) != 1 || c.URIs[0].Scheme != "spiffe" || c.URIs[0].Host != td.Name() || c.URIs[0].RawQuery+c.URIs[0].Fragment != "" || c.URIs[0].User != nil {
		bad("X509-SVID §2: exactly one URI SAN, a SPIFFE ID of the trust domain", c.URIs)
	}
	if len(c.EmailAddresses)+len(c.IPAddresses) != 0 {
		bad("no other SANs", c.IPAddresses)
	}
	sum := sha256.Sum256(spkiBits(t, c))
	if !bytes.Equal(c.SubjectKeyId, sum[:20]) {
		bad("RFC 7093 §2: the subject key identifier", c.SubjectKeyId)
	}
	if !critical["2.5.29.15"] {
		bad("X509-SVID §4.3: key usage is there and critical", critical)
	}
	if !critical["2.5.29.19"] || !c.BasicConstraintsValid {
		bad("basic constraints are there and critical", critical)
	}
	if len(c.UnhandledCriticalExtensions) != 0 || len(c.PermittedURIDomains)+len(c.CRLDistributionPoints)+len(c.OCSPServer) != 0 {
		bad("nothing that the profile does not have", c.Extensions)
	}
	if c.Subject.String() == "" != critical["2.5.29.17"] {
		bad("RFC 5280 §4.2.1.6: the SAN is critical where the subject is empty, and only there", critical)
	}
	root, inter := w.Root(), w.Intermediate()
	switch kind {
	case capb.IssuanceRecord_KIND_ROOT, capb.IssuanceRecord_KIND_INTERMEDIATE:
		if c.URIs[0].Path != "" {
			bad("X509-SVID §3.2: a signing certificate's SPIFFE ID has no path", c.URIs)
		}
		if !c.IsCA || c.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign || len(c.ExtKeyUsage) != 0 {
			bad("X509-SVID §4.1, §4.3: cA, keyCertSign and cRLSign", c.KeyUsage)
		}
		if len(c.Subject.SerialNumber) != 34 || len(c.DNSNames) != 0 {
			bad("a subject that is unique by its serial number", c.Subject)
		}
		if kind == capb.IssuanceRecord_KIND_ROOT {
			if c.MaxPathLen != 1 || len(c.AuthorityKeyId) != 0 && !bytes.Equal(c.AuthorityKeyId, c.SubjectKeyId) || c.CheckSignatureFrom(c) != nil || !bytes.Equal(c.RawIssuer, c.RawSubject) {
				bad("a root: pathLen 1, signed by itself", c.MaxPathLen)
			}
			return
		}
		if c.MaxPathLen != 0 || !c.MaxPathLenZero || c.CheckSignatureFrom(root) != nil || !bytes.Equal(c.AuthorityKeyId, root.SubjectKeyId) {
			bad("an intermediate: pathLen 0, signed by the root", c.MaxPathLen)
		}
		if c.NotAfter.After(root.NotAfter) {
			bad("it ends no later than its issuer", c.NotAfter)
		}
	default:
		if c.URIs[0].Path == "" || c.URIs[0].Path == "/" {
			bad("X509-SVID §5.2: a leaf's SPIFFE ID has a path", c.URIs)
		}
		if c.IsCA || c.KeyUsage != x509.KeyUsageDigitalSignature {
			bad("X509-SVID §4.1, §4.3: cA=false, digitalSignature alone", c.KeyUsage)
		}
		if !slices.Equal(c.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}) || len(c.UnknownExtKeyUsage) != 0 || critical["2.5.29.37"] {
			bad("X509-SVID §4.4: serverAuth and clientAuth, not critical", c.ExtKeyUsage)
		}
		if len(c.Subject.Names) != 0 {
			bad("the subject is empty", c.Subject)
		}
		if !bytes.Equal(c.AuthorityKeyId, inter.SubjectKeyId) || c.CheckSignatureFrom(inter) != nil || c.NotAfter.After(inter.NotAfter) || c.NotBefore.Before(inter.NotBefore) {
			bad("signed by the intermediate, within its life", c.AuthorityKeyId)
		}
		pool, inters := x509.NewCertPool(), x509.NewCertPool()
		pool.AddCert(root)
		inters.AddCert(inter)
		for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
			if _, err := c.Verify(x509.VerifyOptions{Roots: pool, Intermediates: inters, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
				bad("crypto/x509 verifies it", err)
			}
		}
		if _, err := identity.CheckSVID(c); err != nil {
			bad("identity.CheckSVID", err)
		}
	}
	if !w.recorded(c) {
		bad("it is in the issuance log", fmt.Sprintf("%x", c.SerialNumber))
	}
}

// spkiBits is the key's bit string.
func spkiBits(t *testing.T, c *x509.Certificate) []byte {
	t.Helper()
	var info struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}
	if rest, err := asn1.Unmarshal(c.RawSubjectPublicKeyInfo, &info); err != nil || len(rest) > 0 {
		t.Fatal(err)
	}
	return info.Key.Bytes
}

// opensslVerify has OpenSSL verify chains.
func opensslVerify(t *testing.T, w *world, chains [][]*x509.Certificate) (n int) {
	t.Helper()
	dir := t.TempDir()
	write := func(name string, certs ...*x509.Certificate) string {
		var b bytes.Buffer
		for _, c := range certs {
			if err := pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}); err != nil {
				t.Fatal(err)
			}
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	root, inter := write("root.pem", w.Root()), write("inter.pem", w.Intermediate())
	for i, chain := range chains {
		leaf := write(fmt.Sprintf("%d.pem", i), chain[0])
		args := []string{"verify", "-x509_strict", "-check_ss_sig", "-CAfile", root}
		if !chain[0].IsCA {
			args = append(args, "-purpose", "sslserver", "-untrusted", inter)
		}
		out, err := exec.CommandContext(t.Context(), "openssl", append(args, leaf)...).CombinedOutput()
		if err != nil || !strings.Contains(string(out), ": OK") {
			t.Errorf("openssl: %v: %s", err, out)
			continue
		}
		n++
	}
	return n
}

// TestLintRefusesEveryChangedByte changes each byte of what would be signed, cuts it
// at each place, and asks for each field to be something else.
func TestLintRefusesEveryChangedByte(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	_, agent := w.attest(agentA)
	changes := 0
	for _, c := range []struct {
		kind         capb.IssuanceRecord_Kind
		cert, issuer *x509.Certificate
	}{
		{capb.IssuanceRecord_KIND_ROOT, w.Root(), nil},
		{capb.IssuanceRecord_KIND_INTERMEDIATE, w.Intermediate(), w.Root()},
		{capb.IssuanceRecord_KIND_AGENT, agent.Leaf, w.Intermediate()},
	} {
		p, tbs := ca.ProfileOf(c.kind, c.cert, c.issuer), c.cert.RawTBSCertificate
		if err := lint(p, tbs); err != nil {
			t.Fatalf("%v: a good one is refused: %v", c.kind, err)
		}
		for i := range tbs {
			for _, x := range []byte{0x01, 0x80, 0xff} {
				b := bytes.Clone(tbs)
				b[i] ^= x
				if changes++; lint(p, b) == nil {
					t.Errorf("%v: byte %d changed by %#x is taken", c.kind, i, x)
				}
			}
			if changes++; lint(p, tbs[:i]) == nil {
				t.Errorf("%v: cut at %d it is taken", c.kind, i)
			}
		}
		if lint(p, append(bytes.Clone(tbs), 0)) == nil {
			t.Errorf("%v: a byte behind it is taken", c.kind)
		}
		for _, other := range []capb.IssuanceRecord_Kind{capb.IssuanceRecord_KIND_ROOT, capb.IssuanceRecord_KIND_INTERMEDIATE, capb.IssuanceRecord_KIND_WORKLOAD} {
			same := other == c.kind || c.kind == capb.IssuanceRecord_KIND_AGENT && other == capb.IssuanceRecord_KIND_WORKLOAD
			if lint(ca.ProfileOf(other, c.cert, c.issuer), tbs) == nil && !same {
				t.Errorf("%v passes for %v", c.kind, other)
			}
		}
	}
	t.Logf("%d changes refused", changes)
}

// FuzzLint: what passes is byte for byte what was to be signed.
func FuzzLint(f *testing.F) {
	w := newWorld(f)
	_, agent := w.attest(agentA)
	p := ca.ProfileOf(capb.IssuanceRecord_KIND_AGENT, agent.Leaf, w.Intermediate())
	good := agent.Leaf.RawTBSCertificate
	f.Add(good)
	f.Add(good[:len(good)/2])
	f.Add([]byte{0x30, 0x80})
	f.Fuzz(func(t *testing.T, tbs []byte) {
		if lint(p, tbs) == nil && !sameButOrder(tbs, good) {
			t.Errorf("%x was taken for %x", tbs, good)
		}
	})
}

// sameButOrder: RFC 5280 gives extensions no order.
func sameButOrder(a, b []byte) bool {
	a, b = bytes.Clone(a), bytes.Clone(b)
	slices.Sort(a)
	slices.Sort(b)
	return bytes.Equal(a, b)
}

// TestALifeBeyondTheConfiguredIsRefused before anything is recorded.
func TestALifeBeyondTheConfiguredIsRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	before := w.Log().Head().Sequence
	key, _ := newKey(t)
	if _, err := w.Certify(t.Context(), capb.IssuanceRecord_KIND_WORKLOAD, must(spiffeid.FromPath(td, "/a")), nil, key.Public(), 25*time.Hour); err == nil {
		t.Error("25 hours are taken")
	}
	// A name that DER has no place for in an IA5String never gets as far as the log.
	if _, err := w.Certify(t.Context(), capb.IssuanceRecord_KIND_WORKLOAD, must(spiffeid.FromPath(td, "/a")), []string{"n\u00e4me"}, key.Public(), time.Hour); err == nil {
		t.Error("a DNS name that is not ASCII is taken")
	}
	if _, err := w.Certify(t.Context(), capb.IssuanceRecord_KIND_WORKLOAD, spiffeid.ID{}, nil, key.Public(), time.Hour); err == nil {
		t.Error("a leaf without a SPIFFE ID is taken")
	}
	if after := w.Log().Head().Sequence; after != before {
		t.Errorf("%d records of what was not signed", after-before)
	}
}

// TestAKeyBelongsToOneIdentity: while a certificate lives its key is certified for
// no other identity, also after a restart.
func TestAKeyBelongsToOneIdentity(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a, agent := w.attest(agentA)
	_, pub := newKey(t)
	with := func(uid string, key []byte) *capb.IssueItem {
		i := item(t, byUID(uid))
		i.PublicKey = key
		return i
	}
	issued := func(rs []*capb.IssueResult, err error) []bool {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		var out []bool
		for _, r := range rs {
			out = append(out, r.GetX509() != nil)
			if r.GetX509() == nil && r.GetRefusal().GetCode() != capb.Refusal_CODE_MALFORMED {
				t.Errorf("refused with %v", r)
			}
		}
		return out
	}
	// In one batch the first one gets it.
	if got := issued(issue(t, a, with(server.PodUID, pub), with(client.PodUID, pub), with(server.PodUID, pub))); !slices.Equal(got, []bool{true, false, true}) && !slices.Equal(got, []bool{false, true, false}) {
		t.Errorf("in one batch: %v", got)
	}
	_, pub = newKey(t)
	if got := issued(issue(t, a, with(server.PodUID, pub))); !got[0] {
		t.Fatal("a fresh key is refused")
	}
	keys := map[string][]byte{"another workload's": pub, "the agent's own": spki(t, agent.Leaf.PublicKey),
		"the intermediate's": spki(t, w.Intermediate().PublicKey), "the root's": spki(t, w.Root().PublicKey)}
	for round := range 2 {
		for name, key := range keys {
			before := w.Log().Head().Sequence
			if got := issued(issue(t, a, with(client.PodUID, key))); got[0] {
				t.Errorf("round %d: %s key is certified once more", round, name)
			}
			if w.Log().Head().Sequence != before {
				t.Errorf("round %d: %s key left a record", round, name)
			}
		}
		if got := issued(issue(t, a, with(server.PodUID, pub))); !got[0] {
			t.Errorf("round %d: the same identity may not renew with its key", round)
		}
		w.close()
		w.open()
		a = w.dial(agent)
	}
}

func TestKeyUsesAreBoundedAndExpire(t *testing.T) {
	t.Parallel()
	forgot := 0
	u := ca.NewKeyUses(6400, func(n int) { forgot += n })
	now := time.Unix(1_800_000_000, 0)
	hash := func(i int) []byte { h := sha256.Sum256(fmt.Appendf(nil, "key %d", i)); return h[:] }
	for i := range 50_000 {
		if err := u.Claim(hash(i), "a", now.Add(time.Duration(i+1)*time.Second), now); err != nil {
			t.Fatal(err)
		}
		if u.Len() > 6400 {
			t.Fatalf("%d keys are remembered, 6400 may be", u.Len())
		}
	}
	if forgot != 50_000-u.Len() {
		t.Errorf("%d were forgotten, %d counted", 50_000-u.Len(), forgot)
	}
	if err := u.Claim(hash(49_999), "b", now.Add(time.Hour), now); !errors.Is(err, ca.ErrKeyInUse) {
		t.Errorf("the key that ends last was forgotten: %v", err)
	}
	if err := u.Claim(hash(49_999), "b", now.Add(20*time.Hour), now.Add(50_000*time.Second)); err != nil {
		t.Errorf("a key whose certificate has expired: %v", err)
	}
	// A shorter renewal does not shorten the claim.
	if err := u.Claim(hash(49_999), "b", now.Add(time.Second), now); err != nil {
		t.Error(err)
	}
	if err := u.Claim(hash(49_999), "c", now.Add(time.Hour), now.Add(19*time.Hour)); !errors.Is(err, ca.ErrKeyInUse) {
		t.Errorf("a shorter renewal ended the claim: %v", err)
	}
	u.Expire(now.Add(30 * time.Hour))
	if u.Len() != 0 {
		t.Errorf("%d keys stay", u.Len())
	}
}

// TestOnlyAcceptedKeysAreCertified: down to P-256 alone.
func TestOnlyAcceptedKeysAreCertified(t *testing.T) {
	t.Parallel()
	for name, pub := range publicKeys(t) {
		der := spki(t, pub)
		if _, err := profile.ParsePublicKey(der, profile.AllKeys); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := profile.ParsePublicKey(der, []string{profile.KeyP256}); (err == nil) != (name == profile.KeyP256) {
			t.Errorf("%s where only P-256 is accepted: %v", name, err)
		}
		for n := range der {
			if _, err := profile.ParsePublicKey(der[:n], profile.AllKeys); err == nil {
				t.Errorf("%s: cut at %d it is taken", name, n)
			}
		}
	}
	w := newWorld(t)
	w.close()
	for _, bad := range [][]string{{}, {"RSA"}, {"P-256", "DSA"}} {
		cfg := w.cfg
		cfg.SVID.AcceptedKeys = bad
		if a, err := ca.Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "svid.acceptedKeys") {
			t.Errorf("%v: %v", bad, err)
			if a != nil {
				_ = a.Close()
			}
		}
	}
}
