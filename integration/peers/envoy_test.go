package peers

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/integration/envoytest"
)

// parts are what of a proxy's configuration has it ask the server of checks at socket;
// empty where there is none.
func parts(socket, token string) (filter, cluster string) {
	if socket == "" {
		return "", ""
	}
	filter = fmt.Sprintf(`
                - name: envoy.filters.http.ext_authz
                  typed_config:
                    "@type": type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz
                    transport_api_version: V3
                    grpc_service:
                      envoy_grpc: {cluster_name: checks}
                      timeout: 3s
                      initial_metadata: [{key: authorization, value: "Bearer %s"}]`, token)
	cluster = fmt.Sprintf(`
    - name: checks
      type: STATIC
      load_assignment: {cluster_name: checks, endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: %q}}}}]}]}
      typed_extension_protocol_options:
        envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
          "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
          explicit_http_config: {http2_protocol_options: {}}`, socket)
	return filter, cluster
}

// config is a proxy that answers every request itself, once whoever is asked allows.
func config(filter, cluster string) string {
	clusters := "  clusters: []\n"
	if cluster != "" {
		clusters = "  clusters:" + cluster + "\n"
	}
	return fmt.Sprintf(`static_resources:
  listeners:
    - name: in
      address: {socket_address: {address: 127.0.0.1, port_value: 0}}
      filter_chains:
        - filters:
            - name: envoy.filters.network.http_connection_manager
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
                stat_prefix: in
                route_config:
                  virtual_hosts: [{name: v, domains: ["*"], routes: [{match: {prefix: /}, direct_response: {status: 200}}]}]
                http_filters:%s
                - name: envoy.filters.http.router
                  typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
%s`, filter, clusters)
}

// BenchmarkThroughEnvoy asks a real Envoy 500 times a second over eight connections, with
// nobody to ask behind it, Signet, and OPA: the latency that a client sees.
func BenchmarkThroughEnvoy(b *testing.B) {
	const rate, connections = 500, 8
	for _, name := range []string{"none", "signet", "opa-direct", "opa"} {
		b.Run("server="+name, func(b *testing.B) {
			socket, token := "", ""
			if name != "none" {
				p := startServer(b, name, checkPolicies)
				socket, token = p.socket, p.token
			}
			file := filepath.Join(b.TempDir(), "envoy.yaml")
			if err := os.WriteFile(file, []byte(config(parts(socket, token))), 0o600); err != nil {
				b.Fatal(err)
			}
			envoy := envoytest.Start(b, file)
			envoy.WaitReady(b)
			url := "http://" + envoy.Listener(b, "in") + "/open"

			var left atomic.Int64
			var mu sync.Mutex
			var took []time.Duration
			run := func(n int) {
				left.Store(int64(n))
				took = took[:0]
				var group sync.WaitGroup
				for range connections {
					group.Go(func() {
						client := &http.Client{Transport: &http.Transport{MaxConnsPerHost: 1}}
						defer client.CloseIdleConnections()
						var own []time.Duration
						for tick := time.NewTicker(time.Second * connections / rate); left.Add(-1) >= 0; <-tick.C {
							start := time.Now()
							resp, err := client.Get(url)
							if err != nil {
								b.Error(err)
								return
							}
							_, _ = io.Copy(io.Discard, resp.Body)
							resp.Body.Close()
							if resp.StatusCode != 200 {
								b.Errorf("status %d", resp.StatusCode)
								return
							}
							own = append(own, time.Since(start))
						}
						mu.Lock()
						defer mu.Unlock()
						took = append(took, own...)
					})
				}
				group.Wait()
			}
			run(100)
			b.ResetTimer()
			run(b.N)
			b.StopTimer()
			if len(took) > 0 {
				b.ReportMetric(float64(quantile(took, 0.5).Nanoseconds())/1e3, "p50-us")
				b.ReportMetric(float64(quantile(took, 0.99).Nanoseconds())/1e3, "p99-us")
			}
		})
	}
}
