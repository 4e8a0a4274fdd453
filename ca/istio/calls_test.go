package istio_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"math"
	"net"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca/istio"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest/attesttest"

	"google.golang.org/grpc/codes"
)

const (
	msgCaller      = "request authenticate failure"
	msgImpersonate = "request impersonation authentication failure"
	msgEncoding    = "CSR signing error (certificate signing request is not properly encoded)"
	msgParse       = "CSR signing error (failed to parse X.509 certificate signing request)"
	apiAudience    = "https://kubernetes.default.svc.cluster.local"
)

// TestCallsAreAnsweredAsIstiodDoes: each call with the code and, where istiod has
// one, the message that istiod gives. Where they differ, istiod names what istiod
// does and why the row of docs/istio.md that lists the difference.
func TestCallsAreAnsweredAsIstiodDoes(t *testing.T) {
	w := newWorld(t, firstParty(apiAudience))
	tok := func(p identity.Workload, e ...attesttest.Edit) string { return w.issuer.Token(p, "istio-ca", e...) }
	good := bearer(tok(server))
	ztoken := bearer(tok(ztunnel))
	id := func(sa string) string { return "spiffe://cluster.local/ns/default/sa/" + sa }
	key := newKey(t)
	ask := func(tmpl *x509.CertificateRequest) edit {
		return func(c *call) { c.key, c.req.Csr = key, csrPEM(t, key, tmpl) }
	}
	plain := csrPEM(t, key, &x509.CertificateRequest{})
	block, _ := pem.Decode([]byte(plain))
	der := func(typ string, b []byte) string { return string(pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: b})) }
	forged := append([]byte(nil), block.Bytes...)
	forged[len(forged)-1] ^= 1
	rsaKey := func(bits int) crypto.Signer {
		k, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	t.Setenv("GODEBUG", "rsa1024min=0")
	ecKey := func(c elliptic.Curve) crypto.Signer {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	more := &x509.CertificateRequest{
		Subject:  pkix.Name{CommonName: "istiod", Organization: []string{"system:masters"}},
		DNSNames: []string{"istiod.istio-system.svc", "evil.example"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, EmailAddresses: []string{"a@example.com"},
		URIs:            []*url.URL{{Scheme: "spiffe", Host: "cluster.local", Path: "/ns/istio-system/sa/istiod"}, {Scheme: "spiffe", Host: "cluster.local", Path: "/signet/ca/1"}},
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 0x03, 0x01, 0x01, 0xff}}},
	}
	old := attesttest.Issued(time.Now().Add(-time.Hour))
	extended := []attesttest.Edit{attesttest.TTL(365 * 24 * time.Hour), attesttest.Claim("kubernetes.io/warnafter", time.Now().Add(time.Hour).Unix())}
	other := attesttest.NewIssuer(t)
	gone := server
	gone.PodUID = "uid-gone"
	moved := server
	moved.Node = "node-b"

	type row struct {
		name    string
		edits   []edit
		code    codes.Code
		message string
		id      string        // of the certificate, if one is issued
		life    time.Duration // of it; 0: the maximum
		istiod  string        // what istiod does, where that is something else
		why     string        // the first words of the row in docs/istio.md
	}
	e := func(e ...edit) []edit { return e }
	rows := []row{
		// Who calls.
		{name: "a good token", edits: e(good), id: id("server")},
		{name: "a good token of another account", edits: e(bearer(tok(client))), id: id("client")},
		{name: "a token as kubelet makes them for 12 hours", edits: e(bearer(tok(server, attesttest.TTL(12*time.Hour)))), id: id("server")},
		{name: "no metadata at all", code: codes.Unauthenticated, message: msgCaller},
		{name: "an empty authorization", edits: e(md("authorization", "")), code: codes.Unauthenticated, message: msgCaller},
		{name: "a token without Bearer", edits: e(md("authorization", tok(server))), code: codes.Unauthenticated, message: msgCaller},
		{name: "another scheme", edits: e(md("authorization", "Basic "+tok(server))), code: codes.Unauthenticated, message: msgCaller},
		{name: "two good tokens", edits: e(bearer(tok(server)), md("authorization", "Bearer "+tok(client))), code: codes.Unauthenticated, message: msgCaller,
			istiod: "takes the first", why: "Two `authorization` values"},
		{name: "garbage", edits: e(bearer("garbage")), code: codes.Unauthenticated, message: msgCaller},
		{name: "a token of another issuer's key", edits: e(bearer(tok(server, attesttest.SignedBy(other)))), code: codes.Unauthenticated, message: msgCaller},
		{name: "a token that says alg none", edits: e(bearer(tok(server, attesttest.Header("alg", "none"), attesttest.Unsigned()))), code: codes.Unauthenticated, message: msgCaller},
		{name: "an expired token", edits: e(bearer(tok(server, old))), code: codes.Unauthenticated, message: msgCaller},
		{name: "a token that is not valid yet", edits: e(bearer(tok(server, attesttest.Issued(time.Now().Add(time.Hour))))), code: codes.Unauthenticated, message: msgCaller},
		{name: "the audience of Signet's agents", edits: e(bearer(w.issuer.Token(server, "signet-ca"))), code: codes.Unauthenticated, message: msgCaller},
		{name: "the audience of Signet's proxies", edits: e(bearer(w.issuer.Token(server, "signet"))), code: codes.Unauthenticated, message: msgCaller},
		{name: "two audiences", edits: e(bearer(tok(server, attesttest.Claim("aud", []string{"istio-ca", "other"})))), code: codes.Unauthenticated, message: msgCaller,
			istiod: "takes it if one is right", why: "A token with further audiences"},
		{name: "the API server's audience, where allowed", edits: e(bearer(w.issuer.Token(server, apiAudience, extended...))), id: id("server")},
		{name: "the API server's audience, good for a year", edits: e(bearer(w.issuer.Token(server, apiAudience, attesttest.TTL(365*24*time.Hour)))), code: codes.Unauthenticated, message: msgCaller,
			istiod: "takes it", why: "A token that is good for longer"},
		{name: "a pod that is gone", edits: e(bearer(tok(gone))), code: codes.Unauthenticated, message: msgCaller},
		{name: "a pod that is elsewhere", edits: e(bearer(tok(moved))), code: codes.Unauthenticated, message: msgCaller},
		{name: "a token that is bound to no pod", edits: e(bearer(tok(server, attesttest.Without("kubernetes.io/pod")))), code: codes.Unauthenticated, message: msgCaller,
			istiod: "takes it", why: "A token that is bound to no pod"},
		{name: "a user that is no service account", edits: e(bearer(tok(server, attesttest.Claim("sub", "system:admin")))), code: codes.Unauthenticated, message: msgCaller},
		// Which cluster.
		{name: "no cluster", edits: e(md("authorization", "Bearer "+tok(server))), id: id("server")},
		{name: "an empty cluster", edits: e(md("authorization", "Bearer "+tok(server), "clusterid", "")), id: id("server")},
		{name: "the wrong cluster", edits: e(md("authorization", "Bearer "+tok(server), "clusterid", "remote")), code: codes.Unauthenticated, message: msgCaller},
		{name: "the right cluster in other letters", edits: e(md("authorization", "Bearer "+tok(server), "clusterid", "kubernetes")), code: codes.Unauthenticated, message: msgCaller},
		// In whose name.
		{name: "ztunnel for itself", edits: e(ztoken), id: "spiffe://cluster.local/ns/istio-system/sa/ztunnel"},
		{name: "ztunnel for a pod on its node", edits: e(ztoken, as(id("server"))), id: id("server")},
		{name: "an empty impersonated identity", edits: e(good, as("")), id: id("server")},
		{name: "an impersonated identity that is no string", edits: e(good, field("ImpersonatedIdentity", 7.0)), id: id("server")},
		{name: "ztunnel for a pod on another node", edits: e(ztoken, as(id("db"))), code: codes.Unauthenticated, message: msgImpersonate},
		{name: "ztunnel for an account without a pod", edits: e(ztoken, as(id("nobody"))), code: codes.Unauthenticated, message: msgImpersonate},
		{name: "ztunnel for what is no SPIFFE ID", edits: e(ztoken, as("default/server")), code: codes.Unauthenticated, message: msgImpersonate},
		{name: "ztunnel for an authority", edits: e(ztoken, as("spiffe://cluster.local/signet/ca/1")), code: codes.Unauthenticated, message: msgImpersonate},
		{name: "ztunnel for another trust domain", edits: e(ztoken, as("spiffe://other/ns/default/sa/server")), code: codes.Unauthenticated, message: msgImpersonate,
			istiod: "issues it", why: "An impersonated identity of another trust domain"},
		{name: "a workload for another", edits: e(good, as(id("client"))), code: codes.Unauthenticated, message: msgImpersonate},
		{name: "a workload for itself", edits: e(good, as(id("server"))), code: codes.Unauthenticated, message: msgImpersonate},
		// What is asked.
		{name: "a CSR that asks for more", edits: e(good, ask(more)), id: id("server")},
		{name: "a CSR of a name that Istio's clients put in", edits: e(good, ask(&x509.CertificateRequest{URIs: []*url.URL{{Scheme: "spiffe", Host: "cluster.local", Path: "/ns/default/sa/server"}}})), id: id("server")},
		{name: "an old name of the block", edits: e(good, func(c *call) { c.key, c.req.Csr = key, der("NEW CERTIFICATE REQUEST", block.Bytes) }), id: id("server")},
		{name: "a signer for Kubernetes", edits: e(good, field("CertSigner", "")), id: id("server")},
		{name: "an RSA key of 2048 bits", edits: e(good, signedBy(t, rsaKey(2048))), id: id("server")},
		{name: "an RSA key of 1024 bits", edits: e(good, signedBy(t, rsaKey(1024))), code: codes.InvalidArgument, istiod: "signs it", why: "RSA keys below 2048"},
		{name: "a P-384 key", edits: e(good, signedBy(t, ecKey(elliptic.P384()))), id: id("server")},
		{name: "a P-521 key", edits: e(good, signedBy(t, ecKey(elliptic.P521()))), id: id("server")},
		{name: "a P-224 key", edits: e(good, signedBy(t, ecKey(elliptic.P224()))), code: codes.InvalidArgument, istiod: "signs it", why: "RSA keys below 2048"},
		{name: "an Ed25519 key", edits: e(good, signedBy(t, ed)), id: id("server")},
		{name: "a key that is certified for another account", edits: e(bearer(tok(client)), ask(&x509.CertificateRequest{})), code: codes.InvalidArgument,
			message: "CSR signing error (the public key is certified for another identity already)", istiod: "signs it", why: "A key that is certified for another identity"},
		{name: "no CSR", edits: e(good, csr("")), code: codes.InvalidArgument, message: msgEncoding},
		{name: "a CSR that is no PEM", edits: e(good, csr("CSR")), code: codes.InvalidArgument, message: msgEncoding},
		{name: "a CSR that is no DER", edits: e(good, csr(der("CERTIFICATE REQUEST", []byte("no DER")))), code: codes.InvalidArgument, message: msgParse},
		{name: "a CSR that ends early", edits: e(good, csr(der("CERTIFICATE REQUEST", block.Bytes[:100]))), code: codes.InvalidArgument, message: msgParse},
		{name: "a certificate in its place", edits: e(good, csr(der("CERTIFICATE", w.serverCertificate()))), code: codes.InvalidArgument},
		{name: "a CSR that another key signed", edits: e(good, csr(der("CERTIFICATE REQUEST", forged))), code: codes.InvalidArgument, message: "CSR signing error (x509: ECDSA verification failure)"},
		{name: "a CSR of 20 KiB", edits: e(good, csr(plain+strings.Repeat("\n", 20<<10))), code: codes.InvalidArgument, istiod: "reads up to 4 MiB", why: "Requests above"},
		{name: "a CSR of 5 MiB", edits: e(good, csr(strings.Repeat("A", 5<<20))), code: codes.ResourceExhausted},
		// For how long.
		{name: "no lifetime", edits: e(good, seconds(0)), id: id("server")},
		{name: "a negative lifetime", edits: e(good, seconds(-1)), id: id("server")},
		{name: "half an hour", edits: e(good, seconds(1800)), id: id("server"), life: 30 * time.Minute},
		{name: "24 hours, as pilot-agent asks", edits: e(good, seconds(86400)), id: id("server"), istiod: "grants 24 h", why: "A lifetime above the maximum"},
		{name: "10,000 hours", edits: e(good, seconds(36000000)), id: id("server"), istiod: "InvalidArgument", why: "A lifetime above the maximum"},
		{name: "more seconds than time has", edits: e(good, seconds(math.MaxInt64)), id: id("server"), istiod: "overflows", why: "A lifetime above the maximum"},
		{name: "a second", edits: e(good, seconds(1)), id: id("server"), life: time.Minute, istiod: "grants a second", why: "A lifetime below the minimum"},
	}
	page, err := os.ReadFile("../../docs/istio.md")
	if err != nil {
		t.Fatal(err)
	}
	deviating := 0
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			if (r.istiod == "") != (r.why == "") || r.why != "" && !strings.Contains(string(page), "| "+r.why) {
				t.Errorf("istiod %q; docs/istio.md has no row that begins with %q", r.istiod, r.why)
			}
			if r.code != codes.OK {
				w.deny(t, r.code, r.message, r.edits...)
				return
			}
			life := r.life
			if life == 0 {
				life = time.Hour
			}
			c := w.allow(t, r.id, r.edits...)
			if left := time.Until(c.Leaf.NotAfter); left > life || left < life-time.Minute/2 {
				t.Errorf("it lives for another %v; want %v", left, life)
			}
		})
		if r.istiod != "" {
			deviating++
		}
	}
	t.Logf("%d calls, %d of them listed deviations", len(rows), deviating)
	if len(rows) < 40 {
		t.Errorf("only %d calls", len(rows))
	}
	if s := w.log.String(); strings.Contains(s, tok(server)[:40]) || strings.Contains(s, "eyJ") {
		t.Error("the log holds a token")
	}
}

// serverCertificate is some certificate, in DER.
func (w *world) serverCertificate() []byte {
	trust, _ := w.authority.Trust()
	return trust.Roots()[0].Raw
}

// TestWithoutNodeAccounts: where none is configured nobody impersonates.
func TestWithoutNodeAccounts(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(w *world) { w.cfg.NodeAccounts = nil })
	w.deny(t, codes.Unauthenticated, msgImpersonate, bearer(w.issuer.Token(ztunnel, "istio-ca")), as("spiffe://cluster.local/ns/default/sa/server"))
}

// TestImpersonationEndsWithThePod: both the pod and the node's own proxy must be
// there.
func TestImpersonationEndsWithThePod(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	token := bearer(w.issuer.Token(ztunnel, "istio-ca"))
	name := "spiffe://cluster.local/ns/default/sa/server"
	c := w.allow(t, name, token, as(name))
	if r := w.record(c.Leaf); r.GetPodUid() != server.PodUID || r.GetNode() != "node-a" || r.GetTokenAt() != 0 || r.GetEvidence().String() != "EVIDENCE_IMPERSONATION" {
		t.Errorf("record %v", r)
	}
	w.pods.Delete(server.PodUID)
	w.deny(t, codes.Unauthenticated, msgImpersonate, token, as(name))
	w.pods.Set(server)
	w.allow(t, name, token, as(name))
	w.pods.Delete(ztunnel.PodUID)
	w.deny(t, codes.Unauthenticated, msgCaller, token, as(name))
}

func TestBadConfigurationsAreRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for name, c := range map[string]struct {
		edit func(*istio.Config)
		says string
	}{
		"no authority":                {func(c *istio.Config) { c.Authority = nil }, "are required"},
		"no verifier":                 {func(c *istio.Config) { c.Tokens = nil }, "are required"},
		"no maximum":                  {func(c *istio.Config) { c.MaxTTL = 0 }, "maximum life"},
		"a negative age":              {func(c *istio.Config) { c.MaxTokenAge = -1 }, "maximum age"},
		"a node account without name": {func(c *istio.Config) { c.NodeAccounts = []string{"ztunnel"} }, "NAMESPACE/NAME"},
		"any node account":            {func(c *istio.Config) { c.NodeAccounts = []string{"*/*"} }, "not allowed here"},
		"renewal for a half pattern":  {func(c *istio.Config) { c.RenewalFor = []string{"default/ser*"} }, "NAMESPACE/*"},
		"renewal for any namespace":   {func(c *istio.Config) { c.RenewalFor = []string{"*/server"} }, "NAMESPACE/*"},
		"a DNS name with capitals":    {func(c *istio.Config) { c.DNSNames = []string{"Istiod"} }, "DNS name"},
		"istiod without a place":      {func(c *istio.Config) { c.Istiod = &istio.Istiod{DNSNames: []string{"a"}} }, "a place where"},
		"istiod with a name that is no": {func(c *istio.Config) {
			c.Istiod = &istio.Istiod{Namespace: "a/b", ServiceAccount: "istiod", DNSNames: []string{"a"}, Deliver: istio.Folder(t.TempDir())}
		}, "istiod's serving certificate"},
	} {
		cfg := w.cfg
		c.edit(&cfg)
		if _, err := istio.New(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v; want %q", name, err, c.says)
		}
	}
}

// TestPEM: the encoding is that of encoding/pem, whatever the length.
func TestPEM(t *testing.T) {
	t.Parallel()
	for n := range 300 {
		der := make([]byte, n)
		for i := range der {
			der[i] = byte(i*7 + n)
		}
		if got, want := istio.EncodePEM(der), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})); got != want {
			t.Fatalf("%d bytes:\n%s\nwant\n%s", n, got, want)
		}
	}
}
