package integration_test

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/integration/parts"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/grpc"
)

// token is a PKCS#11 token of SoftHSM, in a folder that can be taken away.
type token struct {
	dir, pin string
	soft     parts.SoftHSM
	env      []string
}

const tokenPIN = "a PIN, not 1234"

// newToken initializes one. Without SoftHSM the test is skipped, in CI it fails.
func newToken(tb testing.TB) *token {
	tb.Helper()
	soft, err := parts.FindSoftHSM(tb.Context())
	if errors.Is(err, parts.ErrMissing) && os.Getenv("CI") == "" {
		tb.Skip(err)
	} else if err != nil {
		tb.Fatal(err)
	}
	dir := tb.TempDir()
	tok := &token{dir: filepath.Join(dir, "tokens"), pin: filepath.Join(dir, "pin"), soft: soft, env: []string{"SOFTHSM2_CONF=" + filepath.Join(dir, "softhsm2.conf")}}
	if err := errors.Join(os.Mkdir(tok.dir, 0o700), os.WriteFile(tok.pin, []byte(tokenPIN+"\n"), 0o600),
		os.WriteFile(filepath.Join(dir, "softhsm2.conf"), []byte("directories.tokendir = "+tok.dir+"\nobjectstore.backend = file\nlog.level = ERROR\n"), 0o600)); err != nil {
		tb.Fatal(err)
	}
	tok.util(tb, "--init-token", "--free", "--label", "signet", "--so-pin", "the officer's", "--pin", tokenPIN)
	return tok
}

func (t *token) util(tb testing.TB, args ...string) string {
	tb.Helper()
	cmd := exec.Command(t.soft.Path, append(args, "--module", t.soft.Module)...)
	cmd.Env = append(os.Environ(), t.env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		tb.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
	return string(out)
}

func (t *token) uri() string {
	return fmt.Sprintf("pkcs11:module-path=%s;token=signet?pin-source=%s", t.soft.Module, t.pin)
}

// remove takes the token out, back puts it in again.
func (t *token) remove(tb testing.TB) {
	tb.Helper()
	if err := errors.Join(os.Rename(t.dir, t.dir+".out"), os.Mkdir(t.dir, 0o700)); err != nil {
		tb.Fatal(err)
	}
}

func (t *token) back(tb testing.TB) {
	tb.Helper()
	if err := errors.Join(os.Remove(t.dir), os.Rename(t.dir+".out", t.dir)); err != nil {
		tb.Fatal(err)
	}
}

var withPKCS11 = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "signet-pkcs11-*")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "signet-ca-pkcs11")
	cmd := exec.Command("go", "build", "-race", "-ldflags=-s -w", "-tags", "pkcs11", "-o", path, "../cmd/ca")
	if out, err := cmd.CombinedOutput(); err != nil {
		return path, fmt.Errorf("building signet-ca with PKCS#11: %w\n%s", err, out)
	}
	return path, nil
})

// pkcs11Program builds signet-ca with the tag pkcs11, once for all tests.
func pkcs11Program(tb testing.TB) string {
	tb.Helper()
	path, err := withPKCS11()
	if path != "" {
		removeAtEnd(filepath.Dir(path))
	}
	if err != nil {
		tb.Fatal(err)
	}
	return path
}

func onToken(tok *token, program string, kinds ...string) func(*standalone) {
	return func(s *standalone) {
		s.ca, s.env = program, tok.env
		s.caYAML = "authority:\n  keys:\n"
		for _, k := range kinds {
			s.caYAML += fmt.Sprintf("    %s: %q\n", k, tok.uri())
		}
	}
}

// ready is what /readyz says, and its status.
func (s *standalone) ready(program string) (int, string) {
	resp, err := http.Get("http://" + s.http[program] + "/readyz")
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b)
}

// until polls for something that must come.
func until(tb testing.TB, what string, f func() bool) {
	tb.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !f(); {
		if time.Now().After(deadline) {
			tb.Fatalf("in vain: %s", what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// chain fetches a workload's certificates over SDS, leaf first.
func (s *standalone) chain(ctx context.Context, conn *grpc.ClientConn, i int) ([]*x509.Certificate, error) {
	s.tb.Helper()
	r, err := fetch(s.as(ctx, i), conn, "default")
	if err != nil {
		return nil, err
	}
	var secret tlsv3.Secret
	if err := r.GetResources()[0].UnmarshalTo(&secret); err != nil {
		s.tb.Fatal(err)
	}
	return certificates(s.tb, secret.GetTlsCertificate().GetCertificateChain().GetInlineBytes()), nil
}

func certificates(tb testing.TB, text []byte) (cs []*x509.Certificate) {
	tb.Helper()
	for {
		var b *pem.Block
		if b, text = pem.Decode(text); b == nil {
			return cs
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			tb.Fatal(err)
		}
		cs = append(cs, c)
	}
}

// keyFiles are the names of the authority's keys that are files, without what makes
// them unique.
func (s *standalone) keyFiles() (names []string) {
	s.tb.Helper()
	entries, err := os.ReadDir(filepath.Join(s.dir, "ca", "authority", "keys"))
	if err != nil {
		s.tb.Fatal(err)
	}
	for _, e := range entries {
		kind, _, _ := strings.Cut(e.Name(), "-")
		names = append(names, kind)
	}
	return names
}

// TestATokenSignsTheIntermediate: the root's key is in SoftHSM and nowhere else; the
// intermediate's is a file. Without the token leaves are issued, and nothing starts.
func TestATokenSignsTheIntermediate(t *testing.T) {
	t.Parallel()
	tok := newToken(t)
	s := newStandalone(t, programs(t), 1, "", onToken(tok, pkcs11Program(t), "root"))
	if got := strings.Join(s.keyFiles(), " "); got != "intermediate log" {
		t.Errorf("keys in files: %s", got)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	chain, err := s.chain(ctx, s.dial(), 0)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(s.dir, "root.pem"))
	if err != nil {
		t.Fatal(err)
	}
	root := certificates(t, text)[0]
	if len(chain) != 2 || chain[1].CheckSignatureFrom(root) != nil || root.CheckSignatureFrom(root) != nil {
		t.Fatalf("%d certificates; the intermediate is not signed by the root in the token", len(chain))
	}
	t.Logf("the token signed %s and %s", root.Subject, chain[1].Subject)
	s.stop("signet-ca", syscall.SIGTERM)

	tok.remove(t)
	out := s.refuses(t)
	if !strings.Contains(out, "put it back") {
		t.Errorf("without the token: %s", out)
	}
	tok.back(t)
	s.start("signet-ca")
	if again, err := os.ReadFile(filepath.Join(s.dir, "root.pem")); err != nil || string(again) != string(text) {
		t.Errorf("with the token again: another root, or %v", err)
	}
	s.stop("signet-ca", syscall.SIGTERM)

	if err := os.WriteFile(tok.pin, []byte("wrong\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := s.refuses(t); !strings.Contains(out, "PIN") {
		t.Errorf("with a wrong PIN: %s", out)
	}
	if err := os.WriteFile(tok.pin, []byte(tokenPIN), 0o600); err != nil {
		t.Fatal(err)
	}
	s.ca = filepath.Join(s.bin, "signet-ca")
	if out := s.refuses(t); !strings.Contains(out, "make build-pkcs11") {
		t.Errorf("the static program: %s", out)
	}
}

// refuses runs signet-ca, which must not start, and returns what it says.
func (s *standalone) refuses(t *testing.T) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.ca, "serve", "--config", filepath.Join(s.dir, "signet-ca.yaml"))
	cmd.Env = append(os.Environ(), s.env...)
	out, err := cmd.CombinedOutput()
	if err == nil || ctx.Err() != nil {
		t.Errorf("it started: %v\n%s", err, out)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return lines[len(lines)-1]
}

// TestATokenThatIsTakenOutAndPutBack: leaves are signed in SoftHSM. While the token
// is out nothing is issued and readiness says why; when it is back all goes on,
// without a restart.
func TestATokenThatIsTakenOutAndPutBack(t *testing.T) {
	t.Parallel()
	tok := newToken(t)
	s := newStandalone(t, programs(t), 3, "", onToken(tok, pkcs11Program(t), "root", "intermediate"))
	if got := strings.Join(s.keyFiles(), " "); got != "log" {
		t.Errorf("keys in files: %s", got)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	conn := s.dial()
	if _, err := s.chain(ctx, conn, 0); err != nil {
		t.Fatal(err)
	}
	for i := 1; i <= 2; i++ {
		tok.remove(t)
		got := make(chan error, 1)
		go func() { _, err := s.chain(ctx, conn, i); got <- err }()
		until(t, "readiness says that the device does not sign", func() bool {
			code, text := s.ready("signet-ca")
			return code == http.StatusServiceUnavailable && strings.Contains(text, "key device")
		})
		select {
		case err := <-got:
			t.Fatalf("an SVID, or an error, without the token: %v", err)
		default:
		}
		tok.back(t)
		if err := <-got; err != nil {
			t.Fatal(err)
		}
		until(t, "ready again", func() bool { code, _ := s.ready("signet-ca"); return code == http.StatusOK })
	}
	if log := s.procs["signet-ca"].log.String(); strings.Count(log, "the key device signs again") != 2 {
		t.Errorf("the log does not tell of both returns:\n%s", log)
	}
}
