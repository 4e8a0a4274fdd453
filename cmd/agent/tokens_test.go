package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/extauthz"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/integration/envoytest"

	"github.com/go-jose/go-jose/v4"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
)

// tokenIssuer serves its keys over TLS and signs tokens.
type tokenIssuer struct {
	*httptest.Server
	roots  string // file
	signer jose.Signer
	set    atomic.Pointer[string]
	away   atomic.Bool
}

func newTokenIssuer(t *testing.T) *tokenIssuer {
	t.Helper()
	i := &tokenIssuer{}
	i.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case i.away.Load():
			w.WriteHeader(http.StatusServiceUnavailable)
		case r.URL.Path == "/.well-known/openid-configuration":
			fmt.Fprintf(w, `{"jwks_uri":%q}`, i.URL+"/keys")
		default:
			_, _ = io.WriteString(w, *i.set.Load())
		}
	}))
	i.rotate(t, "1")
	i.StartTLS()
	t.Cleanup(i.Close)
	i.roots = filepath.Join(t.TempDir(), "roots.pem")
	if err := os.WriteFile(i.roots, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return i
}

// rotate replaces the issuer's key.
func (i *tokenIssuer) rotate(t *testing.T, kid string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if i.signer, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: kid}}, nil); err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: kid}}})
	if err != nil {
		t.Fatal(err)
	}
	set := string(b)
	i.set.Store(&set)
}

func (i *tokenIssuer) token(t *testing.T, claims map[string]any) string {
	t.Helper()
	claims["iss"], claims["exp"] = i.URL, time.Now().Add(time.Hour).Unix()
	b, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	s, err := i.signer.Sign(b)
	if err != nil {
		t.Fatal(err)
	}
	text, err := s.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// fixedPolicies never change.
type fixedPolicies struct{ snapshot *authz.Snapshot }

func (p fixedPolicies) Snapshot() *authz.Snapshot { return p.snapshot }
func (fixedPolicies) Changed() <-chan struct{}    { return nil }
func (fixedPolicies) Ready() error                { return nil }
func (fixedPolicies) Run(context.Context) error   { return nil }

func compilePolicies(t *testing.T, text string) fixedPolicies {
	t.Helper()
	resources, problems := authz.Parse("test", []byte(text))
	set, more := authz.Set{}.Update(resources)
	if problems = append(problems, more...); len(problems) > 0 {
		t.Fatal(problems)
	}
	snapshot, _ := authz.Compile(set, authz.Options{})
	return fixedPolicies{snapshot}
}

// seen is what the application gets of a request.
type seen struct {
	Path    string
	Headers http.Header
}

// TestTokensThroughARealEnvoy has a real Envoy without jwt_authn ask: the keys come
// from the issuer's OpenID configuration, claims decide and go into headers, which no
// client can write itself, and the token does not reach the application.
func TestTokensThroughARealEnvoy(t *testing.T) {
	t.Parallel()
	issuer := newTokenIssuer(t)
	web := identity.Workload{Namespace: "default", ServiceAccount: "web", Pod: "web-1", PodUID: "u1", Node: "n", Labels: map[string]string{"app": "web"}}
	pods := &identity.Pods{}
	pods.Set(web)
	policies := compilePolicies(t, `apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: jwt, namespace: default}
spec:
  jwtRules:
  - issuer: `+issuer.URL+`
    audiences: [shop]
    outputPayloadToHeader: x-payload
    outputClaimToHeaders: [{header: x-user, claim: sub}, {header: x-team, claim: org.team}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: scoped, namespace: default}
spec:
  action: DENY
  rules:
  - from: [{source: {requestPrincipals: ["*"]}}]
    when: [{key: "request.auth.claims[scope]", notValues: [read]}]
  - to: [{operation: {paths: [/admins]}}]
    when: [{key: "request.headers[x-team]", notValues: [a]}]
`)
	var c config
	c.Policies.Keys.Refresh = time.Hour
	c.Policies.Keys.AllowAddresses, c.Policies.Keys.RootsFile = []string{"127.0.0.1"}, issuer.roots
	tokens, err := c.requestTokens(&saved{log: slog.New(slog.DiscardHandler)}, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	checks, err := extauthz.New(extauthz.Config{Snapshot: policies.Snapshot, Tokens: tokens})
	if err != nil {
		t.Fatal(err)
	}
	as := func(ctx context.Context, m any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		return next(identity.WithCaller(ctx, identity.Caller{Workload: web}), m)
	}
	server := grpc.NewServer(grpc.ForceServerCodecV2(extauthz.Codec()), grpc.UnaryInterceptor(as))
	checks.Register(server)
	dir, err := os.MkdirTemp("", "tokens") // not TempDir: the path of a socket is at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 3)
	go func() { ended <- server.Serve(socket) }()
	go func() { ended <- tokens.keys.Run(ctx) }()
	go func() { ended <- tokens.watch(ctx, policies, pods, "n") }()
	defer func() {
		cancel()
		server.Stop()
		for range cap(ended) {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
	}()
	application := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = json.NewEncoder(w).Encode(seen{r.RequestURI, r.Header})
	}))
	defer application.Close()
	envoy := envoytest.Start(t, envoyFile(t, socket.Addr().String(), application.Listener.Addr().(*net.TCPAddr).Port))
	envoy.WaitReady(t)
	url := "http://" + envoy.Listener(t, "inbound")
	get := func(path string, headers ...string) (int, string, http.Header, seen) {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(headers); i += 2 {
			r.Header.Add(headers[i], headers[i+1])
		}
		r.Close = true
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		var s seen
		if resp.StatusCode == 200 && json.Unmarshal(b, &s) != nil {
			t.Fatalf("the application's answer: %s", b)
		}
		return resp.StatusCode, string(b), resp.Header, s
	}
	eventually := func(token string, want int) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) { // polling a server
			status, body, _, _ := get("/", "authorization", "Bearer "+token)
			if status == want {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%d %s, want %d", status, body, want)
			}
		}
	}
	good := issuer.token(t, map[string]any{"sub": "alice", "aud": "shop", "scope": "read write", "org": map[string]any{"team": "a"}})
	eventually(good, 200) // the keys were fetched

	status, body, _, s := get("/x?a=b", "authorization", "Bearer "+good, "x-user", "root", "X-User", "admin", "x-team", "root", "x-payload", "e30")
	payload := strings.Split(good, ".")[1]
	if status != 200 || s.Path != "/x?a=b" || s.Headers.Get("Authorization") != "" ||
		!slices.Equal(s.Headers.Values("X-User"), []string{"alice"}) || !slices.Equal(s.Headers.Values("X-Team"), []string{"a"}) || !slices.Equal(s.Headers.Values("X-Payload"), []string{payload}) {
		t.Errorf("a good token: %d %s", status, body)
	}
	status, body, _, s = get("/x?a=b&access_token="+good+"&c=d", "x-user", "root")
	if status != 200 || strings.Contains(s.Path, "access_token") || !strings.Contains(s.Path, "a=b") || !slices.Equal(s.Headers.Values("X-User"), []string{"alice"}) {
		t.Errorf("a good token in a parameter: %d %s", status, body)
	}
	status, body, _, s = get("/", "x-user", "root", "x-team", "root", "x-payload", "e30", "x-other", "kept")
	if status != 200 || s.Headers.Get("X-User")+s.Headers.Get("X-Team")+s.Headers.Get("X-Payload") != "" || s.Headers.Get("X-Other") != "kept" {
		t.Errorf("no token: %d %s", status, body)
	}
	status, body, _, s = get("/x?a=b&access%5Ftoken="+good+"&access_token=other&c=d", "x-user", "root")
	if status != 200 || strings.Contains(s.Path, "token") || !slices.Equal(s.Headers.Values("X-User"), []string{"alice"}) {
		t.Errorf("a good token in a parameter with an encoded name: %d %s", status, body)
	}
	// A policy on a header with a claim reads the claim, not what a client wrote there.
	if status, body, _, _ = get("/admins", "x-team", "a"); status != 403 {
		t.Errorf("no token, and the header of a claim: %d %s", status, body)
	}
	if status, body, _, _ = get("/admins", "authorization", "Bearer "+good, "x-team", "b"); status != 200 {
		t.Errorf("a token with the claim: %d %s", status, body)
	}
	if status, body, _, _ = get("/admins", "authorization", "Bearer "+issuer.token(t, map[string]any{"sub": "eve", "aud": "shop", "scope": "read", "org": map[string]any{"team": "b"}}), "x-team", "a"); status != 403 {
		t.Errorf("a token with another claim, and the header: %d %s", status, body)
	}
	// So it is in a preflight, which has no token.
	if r, err := http.NewRequestWithContext(t.Context(), http.MethodOptions, url+"/x", nil); err != nil {
		t.Error(err)
	} else {
		r.Header = http.Header{"Origin": {"https://x"}, "Access-Control-Request-Method": {"GET"}, "X-User": {"root"}}
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		var s seen
		err = json.NewDecoder(resp.Body).Decode(&s)
		if resp.Body.Close(); err != nil || resp.StatusCode != 200 || s.Headers.Get("X-User") != "" {
			t.Errorf("a preflight: %d, %v; the application got %v", resp.StatusCode, err, s.Headers)
		}
	}
	for name, c := range map[string]struct {
		token  string
		status int
		body   string
	}{
		"a claim that is not there": {issuer.token(t, map[string]any{"sub": "bob", "aud": "shop", "scope": "write"}), 403, "RBAC: access denied"},
		"another audience":          {issuer.token(t, map[string]any{"sub": "bob", "aud": "bank"}), 403, "Audiences in Jwt are not allowed"},
		"a forged one":              {good[:len(good)-20] + strings.Repeat("A", 20), 401, "Jwt verification fails"},
		"none and a signature":      {base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + good[strings.IndexByte(good, '.'):], 401, "Jwt header [alg] is not supported"},
	} {
		status, body, headers, _ := get("/y", "authorization", "Bearer "+c.token)
		if status != c.status || body != c.body || c.body != "RBAC: access denied" && headers.Get("Www-Authenticate") != `Bearer realm="`+url+`/y", error="invalid_token"` {
			t.Errorf("%s: %d %q %v", name, status, body, headers)
		}
	}
	// A token with a key that is not known has the keys fetched again.
	issuer.rotate(t, "2")
	eventually(issuer.token(t, map[string]any{"sub": "alice", "aud": "shop", "scope": "read"}), 200)
	eventually(good, 401)
	// Without the issuer nothing changes.
	issuer.away.Store(true)
	eventually(issuer.token(t, map[string]any{"sub": "bob", "aud": "shop", "scope": "read"}), 200)
}

// envoyFile is the configuration of a sidecar that asks the agent and passes on to
// the application.
func envoyFile(t *testing.T, socket string, port int) string {
	t.Helper()
	type object = map[string]any
	typed := func(name, kind string, config object) object {
		config["@type"] = "type.googleapis.com/" + kind
		return object{"name": name, "typed_config": config}
	}
	cluster := func(name string, address, http object) object {
		return object{"name": name, "type": "STATIC", "connect_timeout": "5s",
			"typed_extension_protocol_options": object{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": object{
				"@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions", "explicit_http_config": http}},
			"load_assignment": object{"cluster_name": name, "endpoints": []object{{"lb_endpoints": []object{{"endpoint": object{"address": address}}}}}}}
	}
	hcm := typed("envoy.filters.network.http_connection_manager", "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager", object{
		"stat_prefix": "inbound", "normalize_path": true,
		"route_config": object{"virtual_hosts": []object{{"name": "all", "domains": []string{"*"}, "routes": []object{{"match": object{"prefix": "/"}, "route": object{"cluster": "application"}}}}}},
		"http_filters": []object{
			typed("envoy.filters.http.ext_authz", "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz", object{
				"transport_api_version": "V3", "encode_raw_headers": true, "metadata_context_namespaces": []string{"envoy.filters.http.jwt_authn"},
				"grpc_service": object{"envoy_grpc": object{"cluster_name": "agent"}, "timeout": "10s"},
			}),
			typed("envoy.filters.http.router", "envoy.extensions.filters.http.router.v3.Router", object{}),
		},
	})
	b, err := json.Marshal(object{"node": object{"id": "web", "cluster": "web"}, "static_resources": object{
		"listeners": []object{{"name": "inbound", "address": object{"socket_address": object{"address": "127.0.0.1", "port_value": 0}}, "filter_chains": []object{{"filters": []object{hcm}}}}},
		"clusters": []object{
			cluster("agent", object{"pipe": object{"path": socket}}, object{"http2_protocol_options": object{}}),
			cluster("application", object{"socket_address": object{"address": "127.0.0.1", "port_value": port}}, object{"http_protocol_options": object{}}),
		},
	}})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "envoy.json")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}
