package oracle_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/integration/envoytest"
)

// TestLoadableIsWhatEnvoyLoads has Istio make filters of resources that its admission
// accepts, and a real Envoy load them: it does where Resource.Loadable says so, and
// otherwise refuses them, or crashes.
func TestLoadableIsWhatEnvoyLoads(t *testing.T) {
	t.Parallel()
	gate := startIstio(t)
	envoy := envoytest.Path(t)
	var good []listener
	refused := 0
	for _, c := range loadableCases(t) {
		rs, problems := authz.Parse(c.name, []byte(c.text))
		if len(rs) != 1 || rs[0].Reason() != "" {
			t.Fatalf("%s: %v", c.name, problems)
		}
		loadable := rs[0].Loadable()
		if c.sign != "" && loadable != (c.sign == "+") {
			t.Errorf("%s: loadable: %v", c.name, loadable)
		}
		l := listener{c.name, gate.build(t, mesh{Resources: c.text, Namespace: "shop", Providers: []string{"p"}})}
		if loadable {
			good = append(good, l)
			continue
		}
		refused++
		if out, err := validate(t, envoy, l); err == nil {
			t.Errorf("%s: Envoy loads what is said not to be loadable\n%s", c.name, out)
		}
	}
	// Those that it loads it loads together, which is faster.
	if out, err := validate(t, envoy, good...); err != nil {
		for _, l := range good {
			if out, err := validate(t, envoy, l); err != nil {
				t.Errorf("%s: %v\n%.2000s", l.name, err, out)
			}
		}
		t.Errorf("%v\n%.2000s", err, out)
	}
	t.Logf("%d resources that Envoy loads, %d that it does not", len(good), refused)
	if len(good) < 100 || refused < 30 {
		t.Errorf("%d and %d are too few", len(good), refused)
	}
}

type loadableCase struct{ name, sign, text string }

// loadableCases are those of testdata/loadable.txt, and what the lists of admission
// accept, of which that is not said.
func loadableCases(t *testing.T) (cases []loadableCase) {
	t.Helper()
	read := func(file, kind string) {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for n, line := range strings.Split(string(b), "\n") {
			sign, spec, ok := strings.Cut(line, " ")
			if !ok || sign == "#" || kind != "" && sign != "+" {
				continue
			}
			of := kind
			if kind != "" {
				sign = ""
			} else {
				of, spec, _ = strings.Cut(spec, " ")
			}
			cases = append(cases, loadableCase{fmt.Sprintf("%s:%d", filepath.Base(file), n+1), sign,
				"{apiVersion: security.istio.io/v1, kind: " + of + ", metadata: {name: p, namespace: shop}, spec: " + spec + "}"})
		}
	}
	read("testdata/loadable.txt", "")
	read("../../authz/testdata/admission/authorizationpolicy.txt", authz.KindAuthorizationPolicy)
	read("../../authz/testdata/admission/requestauthentication.txt", authz.KindRequestAuthentication)
	return cases
}

type listener struct {
	name    string
	filters filters
}

// validate has Envoy load listeners with the filters.
func validate(t *testing.T, envoy string, listeners ...listener) (string, error) {
	t.Helper()
	var ls []any
	for i, l := range listeners {
		http := append([]json.RawMessage{}, l.filters.HTTP...)
		http = append(http, json.RawMessage(`{"name":"router","typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}`))
		ls = append(ls, map[string]any{
			"name": fmt.Sprintf("l%d", i), "address": map[string]any{"socket_address": map[string]any{"address": "127.0.0.1", "port_value": 0}},
			"filter_chains": []any{map[string]any{"filters": []any{map[string]any{"name": "hcm", "typed_config": map[string]any{
				"@type":       "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
				"stat_prefix": "x", "route_config": map[string]any{"name": "r"}, "http_filters": http,
			}}}}},
		})
	}
	b, err := json.Marshal(map[string]any{"static_resources": map[string]any{
		"listeners": ls,
		"clusters":  []any{map[string]any{"name": "outbound|9000||p.providers.svc.cluster.local", "type": "STATIC", "load_assignment": map[string]any{"cluster_name": "x"}}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "envoy.json")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), envoy, "--mode", "validate", "-c", file, "-l", "critical").CombinedOutput()
	return string(out), err
}
