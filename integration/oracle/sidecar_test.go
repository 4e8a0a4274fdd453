package oracle_test

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/integration/envoytest"
)

// A workload is a listener in the shape that Istio gives to the inbound side of a
// sidecar, in front of nothing: what is let through is answered by the proxy.
type workload struct {
	name    string
	filters filters
	v6      bool // it listens on ::1, else on 127.0.0.1
	tcp     bool // it has the TCP filters in front of an echo
	hcm     map[string]any
}

// sidecars is a real Envoy with a listener for each workload.
type sidecars struct {
	*envoytest.Envoy
	addresses map[string]string // by workload
	dir       string            // of the access logs
}

type object = map[string]any

func typed(name, typ string, fields object) object {
	config := object{"@type": "type.googleapis.com/" + typ}
	for k, v := range fields {
		config[k] = v
	}
	return object{"name": name, "typed_config": config}
}

// startSidecars runs Envoy. asked is where the recorder and all providers listen.
func startSidecars(tb testing.TB, workloads []workload, pki *pki, asked string, providers []string) *sidecars {
	tb.Helper()
	dir := tb.TempDir()
	s := &sidecars{addresses: map[string]string{}, dir: dir}
	var listeners []object
	for _, w := range workloads {
		listeners = append(listeners, s.listener(w, pki))
	}
	clusters := []object{unixCluster("recorder", asked)}
	for _, p := range providers {
		clusters = append(clusters, unixCluster("outbound|9000||"+p+".providers.svc.cluster.local", asked))
	}
	bootstrap := object{
		"node":             object{"id": "oracle", "cluster": "oracle"},
		"static_resources": object{"listeners": listeners, "clusters": clusters},
		// Istio's bootstrap sets these for its sidecars.
		"layered_runtime": object{"layers": []object{{"name": "istio", "static_layer": object{
			"envoy.reloadable_features.http_reject_path_with_fragment": false,
			"re2.max_program_size.error_level":                         32768,
		}}}},
	}
	b, err := json.Marshal(bootstrap)
	if err != nil {
		tb.Fatal(err)
	}
	file := filepath.Join(dir, "envoy.json")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		tb.Fatal(err)
	}
	s.Envoy = envoytest.Start(tb, file)
	s.WaitReady(tb)
	for name, address := range s.Listeners(tb) {
		s.addresses[name] = address
	}
	return s
}

func unixCluster(name, path string) object {
	return object{
		"name": name, "type": "STATIC", "connect_timeout": "5s",
		"typed_extension_protocol_options": object{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": object{
			"@type":                "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
			"explicit_http_config": object{"http2_protocol_options": object{}},
		}},
		"circuit_breakers": object{"thresholds": []object{{"max_requests": 10000, "max_pending_requests": 10000, "max_connections": 10000}}},
		"load_assignment": object{"cluster_name": name, "endpoints": []object{{"lb_endpoints": []object{{
			"endpoint": object{"address": object{"pipe": object{"path": path}}},
		}}}}},
	}
}

// listener has a filter chain for each way in that PeerAuthentication leaves open:
// STRICT only TLS, DISABLE only plaintext, PERMISSIVE both; ports with a mode of
// their own have chains of their own. The PROXY protocol stands for the kernel's
// original destination, so that a connection can be to any address and port.
func (s *sidecars) listener(w workload, pki *pki) object {
	ip := "127.0.0.1"
	if w.v6 {
		ip = "::1"
	}
	filters := s.httpChain(w)
	if w.tcp {
		filters = s.tcpChain(w)
	}
	var chains []object
	add := func(mode string, match object) {
		for _, transport := range map[string][]string{
			"STRICT": {"tls"}, "DISABLE": {"raw_buffer"}, "PERMISSIVE": {"tls", "raw_buffer"},
		}[mode] {
			m := object{"transport_protocol": transport}
			for k, v := range match {
				m[k] = v
			}
			c := object{"name": fmt.Sprint(len(chains)), "filter_chain_match": m, "filters": filters}
			if transport == "tls" {
				c["transport_socket"] = pki.downstream()
			}
			chains = append(chains, c)
		}
	}
	add(w.filters.Mode, nil)
	for port, mode := range w.filters.Modes {
		add(mode, object{"destination_port": port})
	}
	l := object{
		"name":    w.name,
		"address": object{"socket_address": object{"address": ip, "port_value": 0}},
		"listener_filters": []object{
			typed("envoy.filters.listener.proxy_protocol", "envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol", nil),
			typed("envoy.filters.listener.tls_inspector", "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector", nil),
		},
		"listener_filters_timeout": "5s",
		"filter_chains":            chains,
	}
	if w.tcp {
		l["access_log"] = []object{typed("envoy.access_loggers.file", "envoy.extensions.access_loggers.file.v3.FileAccessLog", object{
			"path": filepath.Join(s.dir, "tcp.log"),
			"log_format": object{"json_format": object{
				"workload": w.name, "peer": "%DOWNSTREAM_REMOTE_ADDRESS%",
				"details": "%CONNECTION_TERMINATION_DETAILS%", "transport": "%DOWNSTREAM_TRANSPORT_FAILURE_REASON%",
				"rbac": "%DYNAMIC_METADATA(envoy.filters.network.rbac)%", "hint": "%DYNAMIC_METADATA(envoy.common:access_log_hint)%",
			}},
		})}
	}
	return l
}

// Headers of answers tell what became of a request. The metadata of filters is
// complete only in the access log: a filter that refuses writes its own after the
// answer.
var answerHeaders = []object{
	{"header": object{"key": "x-details", "value": "%RESPONSE_CODE_DETAILS%"}},
	{"header": object{"key": "x-path", "value": "%REQ(:PATH)%"}, "keep_empty_value": true},
}

// logged is a line of the access log.
type logged struct {
	Pair    string         `json:"pair"`
	Details string         `json:"details"`
	RBAC    map[string]any `json:"rbac"`
	Hint    any            `json:"hint"`

	allowing bool
}

// logs reads the access log of requests, by pair, once it has n of them.
func (s *sidecars) logs(tb testing.TB, n int) map[string]logged {
	tb.Helper()
	deadline := time.Now().Add(wirePatience)
	for {
		b, err := os.ReadFile(filepath.Join(s.dir, "http.log"))
		if err != nil && !os.IsNotExist(err) {
			tb.Fatal(err)
		}
		lines := map[string]logged{}
		for line := range strings.Lines(string(b)) {
			var l logged
			if strings.HasSuffix(line, "\n") {
				if err := json.Unmarshal([]byte(line), &l); err != nil {
					tb.Fatalf("a line of the access log: %v: %s", err, line)
				}
				lines[l.Pair] = l
			}
		}
		if len(lines) >= n {
			return lines
		}
		if time.Now().After(deadline) {
			tb.Fatalf("the access log has %d of %d requests", len(lines), n)
		}
		time.Sleep(20 * time.Millisecond) // polling a file that another process writes
	}
}

func (s *sidecars) httpChain(w workload) []object {
	chain := []any{
		// For conditions on the metadata of filters: x-meta-KEY becomes KEY.
		typed("envoy.filters.http.header_to_metadata", "envoy.extensions.filters.http.header_to_metadata.v3.Config", object{
			"request_rules": []object{metadataRule("x-meta-a", "a"), metadataRule("x-meta-b", "b")},
		}),
		recorderHTTP("before"),
	}
	local := 0 // the first filter behind CUSTOM and the token
	for i, f := range w.filters.HTTP {
		var head struct {
			Name string `json:"name"`
		}
		if json.Unmarshal(f, &head) != nil || head.Name != "envoy.filters.http.rbac" || strings.Contains(string(f), "-deny-due-to-bad-CUSTOM-action") {
			local = i + 1
		}
	}
	for i, f := range w.filters.HTTP {
		// The second recorder stands where signet-agent would: after the token is
		// verified, before AUDIT, DENY and ALLOW.
		if i == local {
			chain = append(chain, recorderHTTP("after"))
		}
		chain = append(chain, f)
	}
	if local == len(w.filters.HTTP) {
		chain = append(chain, recorderHTTP("after"))
	}
	chain = append(chain, typed("envoy.filters.http.router", "envoy.extensions.filters.http.router.v3.Router", nil))
	hcm := object{
		"stat_prefix": "inbound", "codec_type": "AUTO", "server_name": "istio-envoy",
		"normalize_path": true, "use_remote_address": false, "path_with_escaped_slashes_action": "KEEP_UNCHANGED",
		"forward_client_cert_details":     "APPEND_FORWARD",
		"set_current_client_cert_details": object{"subject": true, "dns": true, "uri": true},
		"upgrade_configs":                 []object{{"upgrade_type": "websocket"}},
		"stream_idle_timeout":             "0s",
		// Envoy waits a second for clients to close first where it ends a connection;
		// these do not.
		"delayed_close_timeout": "0.02s",
		"access_log": []object{typed("envoy.access_loggers.file", "envoy.extensions.access_loggers.file.v3.FileAccessLog", object{
			"path": filepath.Join(s.dir, "http.log"),
			"log_format": object{"json_format": object{
				"pair": "%REQ(X-PAIR)%", "details": "%RESPONSE_CODE_DETAILS%",
				"rbac": "%DYNAMIC_METADATA(envoy.filters.http.rbac)%", "hint": "%DYNAMIC_METADATA(envoy.common:access_log_hint)%",
			}},
		})},
		"route_config": object{"name": "inbound", "validate_clusters": false, "virtual_hosts": []object{{
			"name": "inbound|http", "domains": []string{"*"}, "routes": []object{
				{"match": object{"prefix": "/"}, "direct_response": object{"status": 200}},
				{"match": object{"connect_matcher": object{}}, "direct_response": object{"status": 200}},
			},
		}}},
		"http2_protocol_options": object{"allow_connect": true},
		"http_filters":           chain,
		"local_reply_config": object{"mappers": []object{{
			"filter":         object{"status_code_filter": object{"comparison": object{"op": "GE", "value": object{"default_value": 0, "runtime_key": "none"}}}},
			"headers_to_add": answerHeaders,
		}}},
	}
	for k, v := range w.hcm {
		hcm[k] = v
	}
	return []object{typed("envoy.filters.network.http_connection_manager",
		"envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager", hcm)}
}

func metadataRule(header, key string) object {
	return object{"header": header, "on_header_present": object{"metadata_namespace": "envoy.filters.test", "key": key, "type": "STRING"}, "remove": false}
}

// recorderHTTP is an ext_authz filter that is always answered OK, configured as
// signet's own.
func recorderHTTP(authority string) object {
	return typed("envoy.filters.http.ext_authz."+authority, "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz", object{
		"transport_api_version": "V3", "include_peer_certificate": true, "include_tls_session": true, "encode_raw_headers": true,
		"metadata_context_namespaces": []string{"envoy.filters.http.jwt_authn", "envoy.filters.test"},
		"grpc_service":                object{"envoy_grpc": object{"cluster_name": "recorder", "authority": authority}, "timeout": "20s"},
	})
}

func (s *sidecars) tcpChain(w workload) []object {
	recorder := typed("envoy.filters.network.ext_authz", "envoy.extensions.filters.network.ext_authz.v3.ExtAuthz", object{
		"stat_prefix": "recorder", "transport_api_version": "V3", "include_peer_certificate": true, "include_tls_session": true,
		"grpc_service": object{"envoy_grpc": object{"cluster_name": "recorder", "authority": "before"}, "timeout": "20s"},
	})
	chain := []object{recorder}
	for _, f := range w.filters.TCP {
		var o object
		if json.Unmarshal(f, &o) == nil {
			chain = append(chain, o)
		}
	}
	return append(chain, typed("envoy.filters.network.echo", "envoy.extensions.filters.network.echo.v3.Echo", nil))
}

// unixSocket is a listener in a folder of the test.
func unixSocket(tb testing.TB) (net.Listener, string) {
	tb.Helper()
	// Not TempDir: the path of a socket is at most 107 bytes.
	dir, err := os.MkdirTemp("", "oracle")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		tb.Fatal(err)
	}
	return l, path
}
