package integration_test

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca/external/externaltest"
	"github.com/signet-mesh/signet/integration/envoytest"
	"github.com/signet-mesh/signet/integration/parts"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/go-jose/go-jose/v4"
	"google.golang.org/grpc"
)

// brief makes SVIDs of seconds, so that a test sees them renewed.
const brief = "svid: {ttl: 10s, agentTTL: 20s, minTTL: 10s, maxTTL: 20s}\n"

// pair are two real Envoys, the sidecars of w0 and w1, with requests going from w1
// through both to an application.
func (s *standalone) pair() func() int {
	s.tb.Helper()
	ask, _ := s.pairAt()
	return ask
}

// pairAt is pair, and where w0's proxy is reached.
func (s *standalone) pairAt() (ask func() int, inbound string) {
	s.tb.Helper()
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello\n") }))
	s.tb.Cleanup(app.Close)
	inbound = freeAddr(s.tb)
	outbound := freeAddr(s.tb)
	for i, args := range [][]string{
		{"--inbound", inbound, "--app", strings.TrimPrefix(app.URL, "http://")},
		{"--no-inbound", "--outbound", "server=" + outbound + "," + inbound + ",spiffe://cluster.local/ns/default/sa/w0"},
	} {
		name := fmt.Sprintf("w%d", i)
		s.write(name+"-token", s.token("signet", "default", name, "uid-"+name, "node-a"))
		file := filepath.Join(s.dir, name+".yaml")
		cmd := exec.Command(filepath.Join(s.bin, "signet"), append([]string{"envoy", "bootstrap", "-o", file,
			"--socket", s.dir + "/sock/agent.sock", "--token-file", filepath.Join(s.dir, name+"-token"), "--admin", freeAddr(s.tb)}, args...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			s.tb.Fatalf("%v: %s", err, out)
		}
		envoytest.Start(s.tb, file)
	}
	return func() int { return get("http://" + outbound + "/") }, inbound
}

// authority runs signet-ca authority and returns what it prints.
func (s *standalone) authority(args ...string) string {
	s.tb.Helper()
	cmd := exec.Command(s.ca, append(append([]string{"authority"}, args...), "--config", filepath.Join(s.dir, "signet-ca.yaml"))...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		s.tb.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
	return string(out)
}

func (s *standalone) openssl(args ...string) string {
	s.tb.Helper()
	cmd := exec.Command("openssl", args...)
	cmd.Dir = s.dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		s.tb.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
	return string(out)
}

// roots are those that the agent tells proxies.
func (s *standalone) roots(ctx context.Context, conn *grpc.ClientConn) []*x509.Certificate {
	s.tb.Helper()
	r, err := fetch(s.as(ctx, 0), conn, "ROOTCA")
	if err != nil {
		s.tb.Fatal(err)
	}
	var secret tlsv3.Secret
	if err := r.GetResources()[0].UnmarshalTo(&secret); err != nil {
		s.tb.Fatal(err)
	}
	return certificates(s.tb, secret.GetValidationContext().GetTrustedCa().GetInlineBytes())
}

// TestOfflineRootUnderTraffic: openssl is the root. It signs the first of a series before
// the authority starts, and the next while two Envoys talk under it.
func TestOfflineRootUnderTraffic(t *testing.T) {
	t.Parallel()
	var s *standalone
	newStandalone(t, programs(t), 2, "", func(n *standalone) {
		s = n
		s.caYAML = "authority: {offlineRoot: true}\n" + brief
		s.before = func() {
			s.write("root.cnf", `[ca]
default_ca = root
[root]
database = index.txt
new_certs_dir = .
rand_serial = yes
unique_subject = no
copy_extensions = copyall
default_md = sha256
policy = any
certificate = offline.pem
private_key = offline.key
[any]
commonName = optional
organizationName = optional
serialNumber = optional
`)
			s.write("index.txt", "")
			s.openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "offline.key", "-out", "offline.pem",
				"-subj", "/CN=offline root", "-days", "3650", "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign")
			if out := s.refuses(t); !strings.Contains(out, "authority csr") {
				t.Errorf("before the ceremony it says %q", out)
			}
			s.authority("csr", "--count", "1", "--out", s.dir)
			s.sign("01", -2*time.Hour, 3*time.Minute)
			t.Logf("import prints\n%s", s.authority("import", filepath.Join(s.dir, "01.pem")))
		}
	})
	ask := s.pair()
	becomes(t, 200, "/", func(string) int { return ask() })
	requests := load(t, 200, ask)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	conn := s.dial()
	first, err := s.chain(ctx, conn, 0)
	if err != nil {
		t.Fatal(err)
	}
	s.authority("csr", "--count", "1", "--out", s.dir) // the daemon is asked
	s.sign("01", -time.Minute, 30*24*time.Hour)
	t.Logf("import, while it serves, prints\n%s", s.authority("import", filepath.Join(s.dir, "01.pem")))
	until(t, "an SVID under the next intermediate", func() bool {
		chain, err := s.chain(ctx, conn, 0)
		return err == nil && !chain[1].Equal(first[1])
	})
	requests.held(t, "from one intermediate of the series to the next")
}

// sign is what a ceremony does with NAME.csr.
func (s *standalone) sign(name string, from, to time.Duration) {
	s.tb.Helper()
	const layout = "20060102150405Z"
	now := time.Now().UTC()
	s.openssl("ca", "-config", "root.cnf", "-in", name+".csr", "-out", name+".pem", "-notext", "-batch",
		"-startdate", now.Add(from).Format(layout), "-enddate", now.Add(to).Format(layout))
	root, err := os.ReadFile(filepath.Join(s.dir, "offline.pem"))
	if err != nil {
		s.tb.Fatal(err)
	}
	f, err := os.OpenFile(filepath.Join(s.dir, name+".pem"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		s.tb.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(root); err != nil {
		s.tb.Fatal(err)
	}
}

// TestCacertsUnderTraffic: two Envoys talk under Istio's cacerts while the issuer is
// replaced, first under the same root, then under another; the old root leaves.
func TestCacertsUnderTraffic(t *testing.T) {
	t.Parallel()
	root, next := externaltest.Root(t, "one", externaltest.RSA2048), externaltest.Root(t, "two", externaltest.P256)
	dir := t.TempDir()
	first, second, third := root.Intermediate(t, "first", externaltest.RSA2048), root.Intermediate(t, "second", externaltest.P256), next.Intermediate(t, "third", externaltest.P256)
	externaltest.Mount(t, dir, first.Istio(t))
	s := newStandalone(t, programs(t), 2, "", func(s *standalone) {
		s.caYAML = fmt.Sprintf("authority: {cacerts: %q, propagation: 2s}\n", dir) + brief
	})
	ask := s.pair()
	becomes(t, 200, "/", func(string) int { return ask() })
	requests := load(t, 200, ask)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	conn := s.dial()
	for i, issuer := range []*externaltest.Signer{first, second, third} {
		if i > 0 {
			externaltest.Mount(t, dir, issuer.Istio(t))
		}
		began := time.Now()
		until(t, "an SVID of "+issuer.Cert.Subject.String(), func() bool {
			chain, err := s.chain(ctx, conn, 0)
			return err == nil && chain[1].Equal(issuer.Cert)
		})
		t.Logf("%s, %s: after %v", issuer.Cert.Subject, issuer.Cert.PublicKeyAlgorithm, time.Since(began).Round(time.Millisecond))
	}
	until(t, "the old root leaves the bundle", func() bool {
		roots := s.roots(ctx, conn)
		return len(roots) == 1 && roots[0].Equal(next.Cert)
	})
	requests.held(t, "three issuers, two roots")
}

// TestUpstreamStepCA has step-ca sign every intermediate.
func TestUpstreamStepCA(t *testing.T) {
	t.Parallel()
	root, err := parts.Root()
	if err != nil {
		t.Fatal(err)
	}
	step, err := parts.FindStepCA(root)
	if errors.Is(err, parts.ErrMissing) && os.Getenv("CI") == "" {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	top := externaltest.Root(t, "step root", externaltest.P256)
	stepCA := top.Intermediate(t, "step intermediate", externaltest.P256, func(c *x509.Certificate) { c.MaxPathLen = 1 })
	addr := freeAddr(t)
	const password = "the provisioner's"
	for name, text := range map[string][]byte{"root.pem": externaltest.PEM(top.Cert), "step.pem": externaltest.PEM(stepCA.Cert),
		"step.key": externaltest.KeyPEM(t, stepCA.Key), "password": []byte(password), "ca.json": stepConfig(t, dir, addr, password)} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	server := exec.Command(step.Path, "serve", filepath.Join(dir, "ca.json"))
	log := &lockedBuffer{}
	server.Stdout, server.Stderr = log, log
	server.Env = append(os.Environ(), "STEPPATH="+dir)
	server.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Wait() }()
	stop := func() { _ = server.Process.Kill(); <-ended }
	stopped := false
	t.Cleanup(func() {
		if !stopped {
			stop()
		}
		if t.Failed() {
			t.Logf("step-ca:\n%s", log.String())
		}
	})
	until(t, "step-ca answers", func() bool { return get("https://"+addr+"/health") == 200 })

	s := newStandalone(t, programs(t), 1, "", func(s *standalone) {
		argv, err := json.Marshal([]string{step.Path, "sign", "--ca-url", "https://" + addr, "--root", dir + "/root.pem", "--provisioner", "signet", "--password-file", dir + "/password"})
		if err != nil {
			t.Fatal(err)
		}
		s.caYAML = fmt.Sprintf("authority: {intermediateTTL: 60s, rootTTL: 10m, upstream: {exec: %s, rootFile: %s/root.pem}}\n", argv, dir) + brief
	})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	conn := s.dial()
	first, err := s.chain(ctx, conn, 0)
	if err != nil {
		t.Fatal(err)
	}
	if len(first) != 3 || !first[2].Equal(stepCA.Cert) || first[1].CheckSignatureFrom(stepCA.Cert) != nil {
		t.Fatalf("%d certificates: the intermediate is not step-ca's", len(first))
	}
	t.Logf("step-ca signed %s, pathlen %d, for %v", first[1].Subject, first[1].MaxPathLen, first[1].NotAfter.Sub(first[1].NotBefore))
	var second []*x509.Certificate
	until(t, "step-ca signs the next intermediate", func() bool {
		second, err = s.chain(ctx, conn, 0)
		return err == nil && !second[1].Equal(first[1])
	})
	// Without step-ca the present one goes on, and readiness says why.
	stop()
	stopped = true
	time.Sleep(time.Until(second[1].NotBefore.Add(second[1].NotAfter.Sub(second[1].NotBefore) / 2)))
	until(t, "readiness says that the upstream is away", func() bool {
		code, text := s.ready("signet-ca")
		return code == http.StatusServiceUnavailable && strings.Contains(text, "authority.upstream.exec") && strings.Contains(text, "connection refused")
	})
	if chain, err := s.chain(ctx, conn, 0); err != nil || !chain[1].Equal(second[1]) {
		t.Errorf("without step-ca: %v", err)
	}
}

// stepConfig is step-ca's configuration, with a provisioner that makes intermediates.
func stepConfig(t *testing.T, dir, addr, password string) []byte {
	t.Helper()
	key := jose.JSONWebKey{Key: externaltest.Key(t, externaltest.P256), KeyID: "signet", Algorithm: string(jose.ES256), Use: "sig"}
	private, err := json.Marshal(key)
	if err != nil {
		t.Fatal(err)
	}
	e, err := jose.NewEncrypter(jose.A256GCM, jose.Recipient{Algorithm: jose.PBES2_HS256_A128KW, Key: []byte(password), PBES2Count: 1000, PBES2Salt: []byte("0123456789abcdef")}, nil)
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := e.Encrypt(private)
	if err != nil {
		t.Fatal(err)
	}
	compact, err := sealed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(map[string]any{
		"root": dir + "/root.pem", "crt": dir + "/step.pem", "key": dir + "/step.key", "address": addr, "dnsNames": []string{"127.0.0.1"},
		"authority": map[string]any{"provisioners": []any{map[string]any{"type": "JWK", "name": "signet", "key": key.Public(), "encryptedKey": compact,
			"claims":  map[string]any{"minTLSCertDuration": "10s", "maxTLSCertDuration": "720h"},
			"options": map[string]any{"x509": map[string]any{"template": stepTemplate(t)}}}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// stepTemplate is the one in the documentation.
func stepTemplate(t *testing.T) string {
	t.Helper()
	_, after, ok := strings.Cut(readText(t, "../docs/authority-keys.md"), "```json\n")
	template, _, end := strings.Cut(after, "\n```")
	if !ok || !end {
		t.Fatal("docs/authority-keys.md has no template for step-ca")
	}
	return template
}
