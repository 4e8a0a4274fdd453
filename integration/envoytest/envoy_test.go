package envoytest_test

import (
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/signet-mesh/signet/integration/envoytest"
)

const bootstrap = `
node: {id: test, cluster: test}
static_resources:
  listeners:
    - name: hello
      address: {socket_address: {address: 127.0.0.1, port_value: 0}}
      filter_chains:
        - filters:
            - name: envoy.filters.network.http_connection_manager
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
                stat_prefix: hello
                route_config:
                  virtual_hosts:
                    - name: all
                      domains: ["*"]
                      routes: [{match: {prefix: /}, direct_response: {status: 200, body: {inline_string: hello}}}]
                http_filters:
                  - name: envoy.filters.http.router
                    typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
`

func TestEnvoyServesAndEnds(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "envoy.yaml")
	if err := os.WriteFile(file, []byte(bootstrap), 0o600); err != nil {
		t.Fatal(err)
	}
	envoytest.Validate(t, file)
	e := envoytest.Start(t, file)
	e.WaitReady(t)

	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + e.Listener(t, "hello"))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, _ := io.ReadAll(resp.Body); string(body) != "hello" {
		t.Errorf("body %q, want hello", body)
	}
	e.WaitStat(t, "http.hello.downstream_rq_2xx", 1)
	if n := e.Stats(t)["http.hello.downstream_rq_4xx"]; n != 0 {
		t.Errorf("%d answers 4xx, want 0", n)
	}

	e.Stop()
	if err := syscall.Kill(e.PID(), 0); err != syscall.ESRCH {
		t.Errorf("the process is still there: %v", err)
	}
	if !strings.Contains(e.Log(), "SIGTERM") {
		t.Errorf("the log does not tell of the signal:\n%s", e.Log())
	}
	e.Stop() // a second time is harmless
}
