package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"
)

func runDev(t *testing.T, args ...string) (stdout string, err error) {
	t.Helper()
	cmd := newDevCommand()
	var out bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetErr(&bytes.Buffer{})
	cmd.SilenceUsage = true
	cmd.SetArgs(args)
	err = cmd.Execute()
	return out.String(), err
}

func tokenArgs(dir string, more ...string) []string {
	return append([]string{"token", "--dir", dir, "--audience", "signet", "--namespace", "default",
		"--service-account", "server", "--pod", "server-0", "--pod-uid", "uid-0", "--node", "node-a"}, more...)
}

func TestDevTokensAreAccepted(t *testing.T) {
	t.Parallel()
	for _, alg := range []string{"ES256", "RS256"} {
		t.Run(alg, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "issuer")
			out, err := runDev(t, "issuer", "--dir", dir, "--alg", alg)
			if err != nil {
				t.Fatal(err)
			}
			if want := filepath.Join(dir, "jwks.json"); !strings.Contains(out, want) || !strings.Contains(out, "https://dev.signet.invalid") {
				t.Fatalf("printed %q; want issuer and %s", out, want)
			}
			for name, want := range map[string]os.FileMode{"": 0o700 | os.ModeDir, "key.pem": 0o600, "jwks.json": 0o644} {
				info, err := os.Stat(filepath.Join(dir, name))
				if err != nil || info.Mode() != want {
					t.Errorf("%q has mode %v, %v; want %v", name, info.Mode(), err, want)
				}
			}
			keys, err := attest.OpenKeys(attest.KeysConfig{File: filepath.Join(dir, "jwks.json")})
			if err != nil {
				t.Fatal(err)
			}
			pod := identity.Workload{Namespace: "default", ServiceAccount: "server", Pod: "server-0", PodUID: "uid-0", Node: "node-a", NodeUID: "node-uid"}
			var pods identity.Pods
			pods.Set(pod)
			a, err := attest.New(attest.Config{Issuer: "https://dev.signet.invalid", Audience: "signet", Keys: keys, Pods: &pods, AnyServiceAccount: true})
			if err != nil {
				t.Fatal(err)
			}
			token, err := runDev(t, tokenArgs(dir)...)
			if err != nil {
				t.Fatal(err)
			}
			if w, _, err := a.Attest(t.Context(), attest.Evidence{Token: strings.TrimSuffix(token, "\n")}); err != nil || !w.Equal(pod) {
				t.Errorf("Attest = %v, %v", w, err)
			}
			if token, err = runDev(t, tokenArgs(dir, "--node-uid", "another")...); err != nil {
				t.Fatal(err)
			}
			if _, _, err := a.Attest(t.Context(), attest.Evidence{Token: strings.TrimSuffix(token, "\n")}); err == nil {
				t.Error("a token with another node UID was accepted")
			}
		})
	}
}

func TestDevIssuerIsKept(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if _, err := runDev(t, "issuer", "--dir", dir); err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(filepath.Join(dir, "key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	out, err := runDev(t, "issuer", "--dir", dir)
	if err != nil || !strings.Contains(out, "# kept") {
		t.Errorf("second time: %q, %v; want it kept", out, err)
	}
	for _, flag := range [][2]string{{"--issuer", "https://other.invalid"}, {"--alg", "RS256"}} {
		if _, err := runDev(t, "issuer", "--dir", dir, flag[0], flag[1]); err == nil {
			t.Errorf("%v over another issuer succeeded", flag)
		}
	}
	if after, err := os.ReadFile(filepath.Join(dir, "key.pem")); err != nil || !bytes.Equal(key, after) {
		t.Errorf("the key changed (%v)", err)
	}
}

func TestDevTokenWritesASecretFileWhole(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if _, err := runDev(t, "issuer", "--dir", filepath.Join(dir, "issuer")); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(dir, "token")
	if err := os.WriteFile(name, []byte("old, and readable by all"), 0o644); err != nil {
		t.Fatal(err)
	}
	args := tokenArgs(filepath.Join(dir, "issuer"), "--out", name, "--ttl", "90s", "--audience", "second")
	if out, err := runDev(t, args...); err != nil || out != "" {
		t.Fatalf("printed %q, %v; want nothing", out, err)
	}
	info, err := os.Stat(name)
	if err != nil || info.Mode() != 0o600 {
		t.Fatalf("mode %v, %v; want 0600", info.Mode(), err)
	}
	token, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(string(token), ".")
	if len(parts) != 3 || strings.TrimSpace(string(token)) != string(token) {
		t.Fatalf("%q is not a bare compact token", token)
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	var c struct {
		Aud           []string
		Exp, Iat, Nbf int64
		Jti, Sub      string
	}
	if err := json.Unmarshal(payload, &c); err != nil {
		t.Fatal(err)
	}
	if c.Exp-c.Iat != 90 || c.Nbf != c.Iat || c.Jti == "" || c.Sub != "system:serviceaccount:default:server" ||
		len(c.Aud) != 2 || c.Aud[0] != "signet" || c.Aud[1] != "second" {
		t.Errorf("claims %s", payload)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("left %v, %v; want issuer and token", entries, err)
	}
	if _, err := runDev(t, tokenArgs(filepath.Join(dir, "issuer"), "--out", filepath.Join(dir, "issuer"))...); err == nil {
		t.Error("a token was written over a folder")
	}
	if entries, err = os.ReadDir(dir); err != nil || len(entries) != 2 {
		t.Errorf("after a failure: left %v, %v; want issuer and token", entries, err)
	}
}

func TestDevRefuses(t *testing.T) {
	t.Parallel()
	good := func(t *testing.T) string {
		dir := t.TempDir()
		if _, err := runDev(t, "issuer", "--dir", dir); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	tests := map[string]struct {
		args func(t *testing.T) []string
		want string
	}{
		"an unknown algorithm":       {func(t *testing.T) []string { return []string{"issuer", "--dir", t.TempDir(), "--alg", "none"} }, "RS256 or ES256"},
		"an issuer without a folder": {func(*testing.T) []string { return []string{"issuer"} }, `"dir" not set`},
		"a folder with the rest of an interrupted attempt": {func(t *testing.T) []string {
			dir := good(t)
			if err := os.Remove(filepath.Join(dir, "issuer.json")); err != nil {
				t.Fatal(err)
			}
			return []string{"issuer", "--dir", dir}
		}, "interrupted"},
		"a token without an issuer": {func(t *testing.T) []string { return tokenArgs(t.TempDir()) }, "signet dev issuer --dir"},
		"a token without a pod UID": {func(t *testing.T) []string { return tokenArgs(good(t), "--pod-uid", "") }, "no pod UID"},
		"a colon in a namespace":    {func(t *testing.T) []string { return tokenArgs(good(t), "--namespace", "a:b") }, "no colon"},
		"a lifetime of nothing":     {func(t *testing.T) []string { return tokenArgs(good(t), "--ttl", "1ms") }, "shortest"},
		"a key that others can read": {func(t *testing.T) []string {
			dir := good(t)
			if err := os.Chmod(filepath.Join(dir, "key.pem"), 0o640); err != nil {
				t.Fatal(err)
			}
			return tokenArgs(dir)
		}, "chmod 600"},
		"the key of another issuer": {func(t *testing.T) []string {
			dir, other := good(t), good(t)
			if err := os.Rename(filepath.Join(other, "key.pem"), filepath.Join(dir, "key.pem")); err != nil {
				t.Fatal(err)
			}
			return tokenArgs(dir)
		}, "is about key"},
		"a folder that cannot be made": {func(*testing.T) []string { return []string{"issuer", "--dir", "/dev/null/issuer"} }, "not a directory"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := runDev(t, tt.args(t)...); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v; want one with %q", err, tt.want)
			}
		})
	}
}
