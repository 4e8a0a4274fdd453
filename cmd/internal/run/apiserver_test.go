package run_test

import (
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/signet-mesh/signet/cmd/internal/run"

	"k8s.io/client-go/rest"
)

// TestCredentialsOfAPod: the variables and files that Kubernetes gives every pod lead
// to the API server, with a token that is read again when it is refused.
func TestCredentialsOfAPod(t *testing.T) {
	var good atomic.Value
	api := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer "+good.Load().(string) {
			w.WriteHeader(http.StatusUnauthorized)
		}
	}))
	defer api.Close()
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(says string) {
		t.Helper()
		if c, err := run.APIServer("", dir); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("got %v, %v; want an error that says %q", c, err, says)
		}
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	t.Setenv("KUBERNETES_SERVICE_PORT", "")
	refused("KUBERNETES_SERVICE_HOST")
	at, err := url.Parse(api.URL)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", at.Hostname())
	refused("KUBERNETES_SERVICE_PORT")
	t.Setenv("KUBERNETES_SERVICE_PORT", at.Port())
	refused("reading the token")
	write("token", "")
	refused("is empty")
	write("token", "first\n")
	// The system's certificate authorities are nobody's idea of the API server.
	refused("ca.crt")
	write("ca.crt", "no certificate")
	refused("holds no certificate")
	write("ca.crt", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: api.Certificate().Raw})))

	c, err := run.APIServer("", dir)
	if err != nil {
		t.Fatal(err)
	}
	client, err := rest.HTTPClientFor(c)
	if err != nil {
		t.Fatal(err)
	}
	defer client.CloseIdleConnections()
	get := func(want int) {
		t.Helper()
		resp, err := client.Get(c.Host)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("the answer is %s, want %d", resp.Status, want)
		}
	}
	good.Store("first")
	get(http.StatusOK)
	good.Store("second")
	write("token", "second")
	get(http.StatusUnauthorized)
	get(http.StatusOK)
}

func TestKubeconfigThatCannotBeRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if _, err := run.APIServer(path, ""); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a kubeconfig that does not exist: %v", err)
	}
}
