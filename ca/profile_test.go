package ca_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/identity"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
)

var (
	otherTD = spiffeid.RequireTrustDomainFromString("other.domain")
	noTD    spiffeid.TrustDomain
	update  = flag.Bool("update", false, "rewrite golden files")
)

// TestProfile holds every kind of certificate against the table in DESIGN.md.
func TestProfile(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a, agent := w.attest(agentA)
	rs, err := issue(t, a, item(t, byUID(server.PodUID)))
	if err != nil {
		t.Fatal(err)
	}
	workload := verify(t, w, rs[0].GetX509(), "spiffe://cluster.local/ns/default/sa/server")
	now := time.Now()
	near := func(name string, got, want time.Time) {
		t.Helper()
		if d := got.Sub(want); d > 3*time.Second || d < -20*time.Second {
			t.Errorf("%s: %s, want about %s", name, got, want)
		}
	}

	root, inter := w.Root(), w.Intermediate()
	for name, c := range map[string]*x509.Certificate{"root": root, "intermediate": inter} {
		if err := identity.CheckAuthority(c); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		// X509-SVID §3.2: a signing certificate's SPIFFE ID has no path.
		if len(c.URIs) != 1 || c.URIs[0].String() != "spiffe://cluster.local" || c.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign || len(c.ExtKeyUsage) != 0 {
			t.Errorf("%s: URIs %v, key usage %v, extended %v", name, c.URIs, c.KeyUsage, c.ExtKeyUsage)
		}
		if c.Subject.SerialNumber == "" || c.SerialNumber.Sign() <= 0 || len(c.SerialNumber.Bytes()) > 20 {
			t.Errorf("%s: subject %s, serial %x", name, c.Subject, c.SerialNumber)
		}
		if !w.recorded(c) {
			t.Errorf("%s: not in the log", name)
		}
	}
	if root.Subject.String() == inter.Subject.String() || root.MaxPathLen != 1 || inter.MaxPathLen != 0 || !inter.MaxPathLenZero {
		t.Errorf("subjects %s, %s; path lengths %d, %d", root.Subject, inter.Subject, root.MaxPathLen, inter.MaxPathLen)
	}
	near("root", root.NotAfter, now.Add(365*24*time.Hour))
	near("intermediate", inter.NotAfter, now.Add(7*24*time.Hour))
	if err := inter.CheckSignatureFrom(root); err != nil {
		t.Error(err)
	}

	for name, c := range map[string]*x509.Certificate{"agent": agent.Leaf, "workload": workload} {
		if _, err := identity.CheckSVID(c); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if len(c.Subject.Names) != 0 || len(c.DNSNames)+len(c.IPAddresses)+len(c.EmailAddresses) != 0 || c.KeyUsage != x509.KeyUsageDigitalSignature {
			t.Errorf("%s: subject %s, key usage %v", name, c.Subject, c.KeyUsage)
		}
		if !bytes.Equal(c.AuthorityKeyId, inter.SubjectKeyId) || len(c.SubjectKeyId) != 20 {
			t.Errorf("%s: AKI %x, SKI %x", name, c.AuthorityKeyId, c.SubjectKeyId)
		}
		near(name+" begins", c.NotBefore, now.Add(-time.Minute))
		near(name+" ends", c.NotAfter, now.Add(time.Hour))
		if s := c.SerialNumber.FillBytes(make([]byte, 17)); s[0] != 1 {
			t.Errorf("%s: serial %x is not of instance 1", name, s)
		}
	}
}

func TestDNSNames(t *testing.T) {
	t.Parallel()
	for name, ok := range map[string]bool{"localhost": true, "a.b-c.svc": true, "1.2": true, "": false, "A": false, "*.a": false, "a..b": false, ".a": false,
		"a.": false, "-a": false, "a-": false, "a-.b": false, "a_b": false, "a b": false} {
		if ca.ValidDNSName(name) != ok {
			t.Errorf("%q: %v", name, !ok)
		}
	}
}

// TestIssuanceRecordGolden guards the payload of the issuance log: what was
// written once must be read for ever.
func TestIssuanceRecordGolden(t *testing.T) {
	t.Parallel()
	r := &capb.IssuanceRecord{Kind: capb.IssuanceRecord_KIND_WORKLOAD, Serial: bytes.Repeat([]byte{1}, 17), SpiffeId: "spiffe://cluster.local/ns/default/sa/server",
		Node: "node-a", Evidence: capb.IssuanceRecord_EVIDENCE_TOKEN, PodUid: "6f2b8a0e-0000-4000-8000-000000000001", Requester: bytes.Repeat([]byte{2}, 17),
		Authority: bytes.Repeat([]byte{3}, 20), NotBefore: 1795478400, NotAfter: 1795482000, KeyHash: bytes.Repeat([]byte{4}, 32)}
	golden(t, "record.golden", r)
	golden(t, "decision.golden", &capb.IssuanceRecord{Kind: capb.IssuanceRecord_KIND_DECISION, Decision: &capb.Decision{
		What: capb.Decision_WHAT_LOG_LOSS_ACCEPTED, Instance: 1, Sequence: 4711, Hash: bytes.Repeat([]byte{5}, 32), Reason: "the disk died"}})
}

func golden(t *testing.T, name string, r *capb.IssuanceRecord) {
	t.Helper()
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b, want) {
		t.Errorf("the encoding changed:\n%x\nwant\n%x", b, want)
	}
	again := &capb.IssuanceRecord{}
	if err := proto.Unmarshal(want, again); err != nil || !proto.Equal(again, r) {
		t.Errorf("%s is read as %v, %v", name, again, err)
	}
	t.Logf("%s has %d bytes", name, len(b))
}

// TestNoKeyAndNoTokenIsEverKept: not in the log, not in the state, not in a backup.
func TestNoKeyAndNoTokenIsEverKept(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	agentToken := w.issuer.Token(agentA, "signet-ca")
	cert, err := w.tryAttest(w.dial(nil), func(r *capb.AttestRequest) { r.Evidence = &capb.AttestRequest_Token{Token: agentToken} })
	if err != nil {
		t.Fatal(err)
	}
	token := w.issuer.Token(server, "signet")
	if rs, err := issue(t, w.dial(cert), item(t, byToken(token))); err != nil || rs[0].GetX509() == nil {
		t.Fatal(rs, err)
	}
	var backup bytes.Buffer
	if err := w.Backup(t.Context(), &backup); err != nil {
		t.Fatal(err)
	}
	w.close()
	kept := map[string][]byte{"backup": backup.Bytes(), "state.db": must(os.ReadFile(w.cfg.DataDir + "/authority/state.db"))}
	for name, b := range copyTree(t, w.logDir()) {
		kept["log/"+name] = b
	}
	var secrets [][]byte
	for _, t := range []string{token, agentToken} {
		for part := range strings.SplitSeq(t, ".") {
			secrets = append(secrets, []byte(part[:20]), []byte(part[len(part)-20:]))
		}
	}
	for _, b := range copyTree(t, w.cfg.DataDir+"/authority/keys") {
		block, _ := pem.Decode(b)
		key := must(x509.ParsePKCS8PrivateKey(block.Bytes)).(*ecdsa.PrivateKey)
		secrets = append(secrets, must(key.Bytes()))
	}
	secrets = append(secrets, must(cert.PrivateKey.(*ecdsa.PrivateKey).Bytes()), []byte("PRIVATE KEY"))
	for name, b := range kept {
		for i, s := range secrets {
			if bytes.Contains(b, s) {
				t.Errorf("%s holds secret %d", name, i)
			}
		}
	}
}

// TestTheClockSeesAStep: a monotonic reading, as time.Now has one, must not hide
// that the wall clock was set back.
func TestTheClockSeesAStep(t *testing.T) {
	t.Parallel()
	newest := time.Now() // with a monotonic reading
	for _, c := range []struct {
		step time.Duration
		want time.Duration // after newest
		bad  bool
	}{{0, 0, false}, {time.Hour, time.Hour, false}, {-4 * time.Minute, 0, false}, {-6 * time.Minute, 0, true}} {
		// AddDate drops nothing, Add moves both readings: only a time without the
		// monotonic reading is what a stepped clock gives.
		got, err := ca.ClockAt(newest.Round(0).Add(c.step), newest)
		if (err != nil) != c.bad || err == nil && !got.Equal(newest.Round(0).Add(c.want)) {
			t.Errorf("step %v: %v, %v", c.step, got.Sub(newest.Round(0)), err)
		}
	}
}
