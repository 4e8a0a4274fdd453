package external_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca/external"
	"github.com/signet-mesh/signet/ca/external/externaltest"
	"github.com/signet-mesh/signet/ca/keys"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var td = spiffeid.RequireTrustDomainFromString("cluster.local")

// want are the parts of a chain that Check is tried with.
type want struct {
	root, up *externaltest.Signer
	key      crypto.Signer
	csr      []byte
	p        external.Profile
}

func newWant(t *testing.T) *want {
	t.Helper()
	w := &want{root: externaltest.Root(t, "root", externaltest.P256), key: externaltest.Key(t, externaltest.P256)}
	w.up = w.root.Intermediate(t, "policy", externaltest.P384)
	var err error
	if w.csr, err = external.Request(w.key, td, 1); err != nil {
		t.Fatal(err)
	}
	w.p = external.Profile{TrustDomain: td, DNSNames: []string{"ca.example"}, Key: w.key.Public(), Roots: []*x509.Certificate{w.root.Cert}}
	return w
}

func TestCheck(t *testing.T) {
	t.Parallel()
	hour := time.Hour
	for _, c := range []struct {
		name  string
		chain func(t *testing.T, w *want) []*x509.Certificate
		says  string // empty: it is good
	}{
		{"up to the root", func(t *testing.T, w *want) []*x509.Certificate {
			return []*x509.Certificate{w.root.Sign(t, w.csr), w.root.Cert}
		}, ""},
		{"without the root", func(t *testing.T, w *want) []*x509.Certificate {
			return []*x509.Certificate{w.root.Sign(t, w.csr)}
		}, ""},
		{"with one between", func(t *testing.T, w *want) []*x509.Certificate {
			return append([]*x509.Certificate{w.up.Sign(t, w.csr)}, w.up.Chain()...)
		}, ""},
		{"without a SPIFFE ID", func(t *testing.T, w *want) []*x509.Certificate {
			return []*x509.Certificate{w.root.Sign(t, w.csr, func(c *x509.Certificate) { c.URIs = nil })}
		}, ""},
		{"constrained to the trust domain", func(t *testing.T, w *want) []*x509.Certificate {
			return []*x509.Certificate{w.root.Sign(t, w.csr, func(c *x509.Certificate) {
				c.PermittedURIDomains, c.PermittedDNSDomains, c.PermittedDNSDomainsCritical = []string{"cluster.local"}, []string{"example"}, true
			})}
		}, ""},
		{"for nothing", func(*testing.T, *want) []*x509.Certificate { return nil }, "no certificate"},
		{"of another key", func(t *testing.T, w *want) []*x509.Certificate {
			return w.root.Intermediate(t, "x", externaltest.P256).Chain()
		}, "key:"},
		{"in the wrong order", func(t *testing.T, w *want) []*x509.Certificate {
			return []*x509.Certificate{w.up.Sign(t, w.csr), w.root.Cert, w.up.Cert}
		}, "order:"},
		{"with a gap", func(t *testing.T, w *want) []*x509.Certificate {
			return []*x509.Certificate{w.up.Sign(t, w.csr)}
		}, "add what is missing"},
		{"under another root", func(t *testing.T, w *want) []*x509.Certificate {
			other := externaltest.Root(t, "root", externaltest.P256)
			return []*x509.Certificate{other.Sign(t, w.csr), other.Cert}
		}, "not one that is expected"},
		{"that signs itself", func(t *testing.T, w *want) []*x509.Certificate {
			return []*x509.Certificate{(&externaltest.Signer{Key: w.key}).Sign(t, w.csr)}
		}, "not one that is expected"},
		{"that is no authority", func(t *testing.T, w *want) []*x509.Certificate {
			return []*x509.Certificate{w.root.Sign(t, w.csr, func(c *x509.Certificate) {
				c.IsCA, c.MaxPathLenZero, c.KeyUsage = false, false, x509.KeyUsageDigitalSignature
			})}
		}, "profile:"},
		{"that may not sign certificates", func(t *testing.T, w *want) []*x509.Certificate {
			return []*x509.Certificate{w.root.Sign(t, w.csr, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign })}
		}, "keyCertSign"},
		{"of another trust domain", func(t *testing.T, w *want) []*x509.Certificate {
			return []*x509.Certificate{w.root.Sign(t, w.csr, externaltest.SPIFFE("spiffe://other.test"))}
		}, "names spiffe://other.test"},
		{"with the name of a workload", func(t *testing.T, w *want) []*x509.Certificate {
			return []*x509.Certificate{w.root.Sign(t, w.csr, externaltest.SPIFFE("spiffe://cluster.local/ns/a/sa/b"))}
		}, "profile:"},
		{"without a path length", func(t *testing.T, w *want) []*x509.Certificate {
			return []*x509.Certificate{w.root.Sign(t, w.csr, func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = -1, false })}
		}, "pathlen:0"},
		{"with a path length of 1", func(t *testing.T, w *want) []*x509.Certificate {
			return []*x509.Certificate{w.root.Sign(t, w.csr, func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 1, false })}
		}, "pathlen:0"},
		{"under one that may sign leaves only", func(t *testing.T, w *want) []*x509.Certificate {
			up := w.root.Intermediate(t, "x", externaltest.P256, func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true })
			return append([]*x509.Certificate{up.Sign(t, w.csr)}, up.Chain()...)
		}, "path length:"},
		{"that expired", func(t *testing.T, w *want) []*x509.Certificate {
			return []*x509.Certificate{w.root.Sign(t, w.csr, externaltest.Valid(-2*hour, -hour))}
		}, "expired"},
		{"that is not valid yet", func(t *testing.T, w *want) []*x509.Certificate {
			return []*x509.Certificate{w.root.Sign(t, w.csr, externaltest.Valid(hour, 2*hour))}
		}, "not valid before"},
		{"that outlives its root", func(t *testing.T, w *want) []*x509.Certificate {
			return []*x509.Certificate{w.root.Sign(t, w.csr, externaltest.Valid(-hour, 11*365*24*hour))}
		}, "after what signed it"},
		{"constrained to another domain", func(t *testing.T, w *want) []*x509.Certificate {
			return []*x509.Certificate{w.root.Sign(t, w.csr, func(c *x509.Certificate) {
				c.PermittedURIDomains, c.PermittedDNSDomainsCritical = []string{"other.test"}, true
			})}
		}, "constraints:"},
		{"constrained to other DNS names", func(t *testing.T, w *want) []*x509.Certificate {
			return []*x509.Certificate{w.root.Sign(t, w.csr, func(c *x509.Certificate) { c.ExcludedDNSDomains = []string{"ca.example"} })}
		}, "constraints:"},
		{"under one constrained to another domain", func(t *testing.T, w *want) []*x509.Certificate {
			up := w.root.Intermediate(t, "x", externaltest.P256, func(c *x509.Certificate) { c.ExcludedURIDomains = []string{"cluster.local"} })
			return append([]*x509.Certificate{up.Sign(t, w.csr)}, up.Chain()...)
		}, "constraints:"},
		{"for servers only", func(t *testing.T, w *want) []*x509.Certificate {
			return []*x509.Certificate{w.root.Sign(t, w.csr, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })}
		}, "constraints:"},
		{"with an unknown critical extension", func(t *testing.T, w *want) []*x509.Certificate {
			return []*x509.Certificate{w.root.Sign(t, w.csr, func(c *x509.Certificate) {
				c.ExtraExtensions = append(c.ExtraExtensions, unknownCritical)
			})}
		}, "critical extension"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newWant(t)
			chain := c.chain(t, w)
			iss, err := external.Check(chain, w.p, time.Now())
			if c.says == "" {
				if err != nil {
					t.Fatal(err)
				}
				if !iss.Root.Equal(w.root.Cert) || !iss.Cert.Equal(chain[0]) || len(iss.Chain) == 0 || !iss.Chain[0].Equal(iss.Cert) || iss.Chain[len(iss.Chain)-1].Equal(iss.Root) {
					t.Errorf("issuer %+v", iss)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want %q", err, c.says)
			}
		})
	}
}

// TestAChainWithOneByteChangedIsRefused, wherever it is.
func TestAChainWithOneByteChangedIsRefused(t *testing.T) {
	t.Parallel()
	w := newWant(t)
	der := w.root.Sign(t, w.csr).Raw
	good := 0
	for i := range der {
		changed := bytes.Clone(der)
		changed[i] ^= 1
		certs, err := external.Certificates(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: changed}))
		if err == nil {
			_, err = external.Check(certs, w.p, time.Now())
		}
		if err == nil {
			t.Errorf("byte %d of %d changed: accepted", i, len(der))
		} else {
			good++
		}
	}
	t.Logf("%d of %d refused", good, len(der))
}

func TestCertificatesRefusesWhatIsNone(t *testing.T) {
	t.Parallel()
	w := newWant(t)
	root := externaltest.PEM(w.root.Cert)
	for name, c := range map[string]struct{ text, says string }{
		"nothing":          {"", "no PEM"},
		"a key":            {string(externaltest.KeyPEM(t, w.key)), `"PRIVATE KEY"`},
		"half a block":     {string(root[:len(root)/2]), "damaged"},
		"a block and half": {string(root) + string(root[:len(root)/2]), "damaged"},
		"rubble in PEM":    {"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "certificate 1"},
		"too many":         {strings.Repeat(string(root), 65), "more than 64"},
		"too much":         {strings.Repeat("x", 1<<20+1), "at most"},
	} {
		if _, err := external.Certificates([]byte(c.text)); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: got %v, want %q", name, err, c.says)
		}
	}
	if got, err := external.Certificates([]byte("Certificate:\n  Data: x\n" + string(root) + "\nsubject=x\n" + string(root))); err != nil || len(got) != 2 {
		t.Errorf("with openssl's text between: %d, %v", len(got), err)
	}
}

func readFolder(dir string) (external.Folder, error) {
	f, _, err := external.ReadFolder(dir, external.Profile{TrustDomain: td}, func(text []byte) (crypto.Signer, error) { return keys.ParseKey(text, nil) }, time.Now())
	return f, err
}

func TestReadFolder(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{externaltest.P256, externaltest.P384, externaltest.RSA2048} {
		root := externaltest.Root(t, "root", kind)
		between := root.Intermediate(t, "between", kind)
		issuer := between.Intermediate(t, "issuer", kind, externaltest.Valid(-time.Hour, 24*time.Hour))
		under := root.Intermediate(t, "under the root", kind)
		for name, c := range map[string]struct {
			s     *externaltest.Signer
			files map[string][]byte
			chain int
		}{
			"Istio's four":                     {issuer, issuer.Istio(t), 2},
			"Istio's, chain without itself":    {issuer, edit(issuer.Istio(t), "cert-chain.pem", externaltest.PEM(between.Cert)), 2},
			"Istio's, an empty chain":          {under, edit(under.Istio(t), "cert-chain.pem", nil), 1},
			"Istio's, chain in the other file": {issuer, edit(edit(issuer.Istio(t), "cert-chain.pem", nil), "ca-cert.pem", externaltest.PEM(issuer.Cert, between.Cert)), 2},
			"Istio's, with two roots":          {issuer, issuer.Istio(t, externaltest.Root(t, "old", kind).Cert, root.Cert), 2},
			"a root that signs leaves":         {root, root.Istio(t), 0},
			"cert-manager's":                   {issuer, issuer.CertManager(t), 2},
		} {
			dir := t.TempDir()
			externaltest.Mount(t, dir, c.files)
			f, err := readFolder(dir)
			if err != nil {
				t.Errorf("%s, %s: %v", kind, name, err)
				continue
			}
			if !f.Cert.Equal(c.s.Cert) || !f.Root.Equal(root.Cert) || len(f.Chain) != c.chain {
				t.Errorf("%s, %s: %s, root %s, %d in the chain", kind, name, f.Cert.Subject, f.Root.Subject, len(f.Chain))
			}
			externaltest.Mount(t, dir, edit(c.files, "x", nil))
			if again, err := readFolder(dir); err != nil || again.Hash != f.Hash {
				t.Errorf("%s, %s: the same files have another hash, or %v", kind, name, err)
			}
		}
	}
}

func edit(files map[string][]byte, name string, text []byte) map[string][]byte {
	out := map[string][]byte{}
	for k, v := range files {
		out[k] = v
	}
	out[name] = text
	return out
}

func TestReadFolderRefuses(t *testing.T) {
	t.Parallel()
	root := externaltest.Root(t, "root", externaltest.P256)
	issuer := root.Intermediate(t, "issuer", externaltest.P256)
	other := externaltest.Root(t, "other", externaltest.P256)
	good := issuer.Istio(t)
	for name, c := range map[string]struct {
		spoil func(dir string) error
		says  string
	}{
		"nothing":                    {func(dir string) error { return os.RemoveAll(filepath.Join(dir, "ca-cert.pem")) }, "Istio's four files"},
		"no key":                     {func(dir string) error { return os.Remove(filepath.Join(dir, "ca-key.pem")) }, "Istio's four files"},
		"no root":                    {func(dir string) error { return os.Remove(filepath.Join(dir, "root-cert.pem")) }, "Istio's four files"},
		"another key":                {put("ca-key.pem", externaltest.KeyPEM(t, other.Key)), "key:"},
		"another root":               {put("root-cert.pem", externaltest.PEM(other.Cert)), "expected"},
		"a key open to others":       {func(dir string) error { return os.Chmod(filepath.Join(dir, "ca-key.pem"), 0o644) }, "defaultMode: 0440"},
		"a certificate that's a key": {put("ca-cert.pem", good["ca-key.pem"]), "PRIVATE KEY"},
		"half a key":                 {put("ca-key.pem", good["ca-key.pem"][:60]), "no PEM"},
	} {
		dir := t.TempDir()
		for name, text := range good {
			if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.spoil(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := readFolder(dir); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: got %v, want %q", name, err, c.says)
		} else if strings.Contains(err.Error(), "MI") && strings.Contains(err.Error(), "==") {
			t.Errorf("%s: the error tells the key: %v", name, err)
		}
	}
}

func put(name string, text []byte) func(string) error {
	return func(dir string) error { return os.WriteFile(filepath.Join(dir, name), text, 0o600) }
}

func TestCommand(t *testing.T) {
	t.Parallel()
	run := func(timeout time.Duration, script string) (string, error) {
		out, err := external.Command{Argv: []string{"sh", "-c", script}, Timeout: timeout, Env: []string{"SIGNET_TTL_SECONDS=60"}}.Sign(context.Background(), []byte("request\n"))
		return string(out), err
	}
	if out, err := run(time.Minute, `cat; echo "$SIGNET_TTL_SECONDS"; echo noise >&2`); err != nil || out != "request\n60\n" {
		t.Errorf("%q, %v", out, err)
	}
	for name, c := range map[string]struct {
		timeout time.Duration
		script  string
		says    string
	}{
		"fails":         {time.Minute, "echo the reason >&2; exit 3", "it said: the reason"},
		"says nothing":  {time.Minute, "true", "printed nothing"},
		"says too much": {time.Minute, "head -c 2000000 /dev/zero", "more than"},
		"is slow":       {50 * time.Millisecond, "sleep 100 & sleep 100", "did not end within"},
		"is noisy":      {time.Minute, "head -c 3000000 /dev/zero | tr '\\0' x >&2; echo the end >&2; exit 1", "the end"},
	} {
		start := time.Now()
		if _, err := run(c.timeout, c.script); err == nil || !strings.Contains(err.Error(), c.says) || len(err.Error()) > 3000 {
			t.Errorf("%s: got %v, want %q", name, err, c.says)
		}
		if d := time.Since(start); d > time.Minute {
			t.Errorf("%s: it took %v", name, d)
		}
	}
	if _, err := (external.Command{Argv: []string{"/nonexistent/x"}, Timeout: time.Minute}).Sign(context.Background(), nil); err == nil || !strings.Contains(err.Error(), "/nonexistent/x") {
		t.Errorf("a command that is not there: %v", err)
	}
}

// FuzzImport: whatever a file of a chain holds, parsing and checking it ends without a
// panic, and what is accepted certifies the key under the root.
func FuzzImport(f *testing.F) {
	t := &testing.T{}
	w := newWant(t)
	good := externaltest.PEM(w.root.Sign(t, w.csr), w.root.Cert)
	f.Add(good)
	f.Add(externaltest.PEM(append([]*x509.Certificate{w.up.Sign(t, w.csr)}, w.up.Chain()...)...))
	f.Add(good[:len(good)/2])
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		certs, err := external.Certificates(text)
		if err != nil {
			return
		}
		iss, err := external.Check(certs, w.p, time.Now())
		if err != nil {
			return
		}
		if pub, ok := iss.Cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(w.key.Public()) || !iss.Root.Equal(w.root.Cert) {
			t.Errorf("accepted another key or root: %s", iss.Cert.Subject)
		}
	})
}
