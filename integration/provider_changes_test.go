package integration_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/extauthz"
	"github.com/signet-mesh/signet/authz/provider"
	"github.com/signet-mesh/signet/integration/envoytest"
)

// changing is a provider that allows, with the changes of a row of the table, and
// behind the filter that asked it whatever then keeps what it is asked about.
type changing struct {
	authv3.UnimplementedAuthorizationServer
	rows []change
	mu   sync.Mutex
	got  map[string]authz.Request // of the filter behind, by row
}

func (p *changing) Check(_ context.Context, r *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	var read authz.Request
	if err := extauthz.FromCheckRequest(r, &read); err != nil {
		return nil, err
	}
	row := header(&read, "x-row")
	ok := &authv3.OkHttpResponse{}
	if r.GetAttributes().GetContextExtensions()["behind"] != "" {
		p.mu.Lock()
		p.got[row] = read
		p.mu.Unlock()
	} else {
		for _, c := range p.rows {
			if c.name == row {
				ok = c.answer
			}
		}
	}
	return &authv3.CheckResponse{Status: &statuspb.Status{}, HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: ok}}, nil
}

// header are the values of a header, one behind the other.
func header(r *authz.Request, name string) string {
	var values []string
	for _, h := range r.Headers {
		if h.Name == name {
			values = append(values, string(h.Value))
		}
	}
	return strings.Join(values, "|")
}

// change is a row: what a provider answers.
type change struct {
	name   string
	answer *authv3.OkHttpResponse
	// refused says that Signet denies it.
	refused bool
}

// seenRequest is what the application gets.
type seenRequest struct {
	Method, URI, Host string
	Header            http.Header
}

// TestChangesOfProvidersAgreeWithEnvoy: what a provider changes of a request is the
// same to the policies behind it, and to the application, whether Envoy asks it itself,
// as in Istio, or Signet does.
func TestChangesOfProvidersAgreeWithEnvoy(t *testing.T) {
	t.Parallel()
	set := func(name, value string) *corev3.HeaderValueOption {
		return &corev3.HeaderValueOption{Header: &corev3.HeaderValue{Key: name, Value: value}}
	}
	appended := func(name, value string, more bool) *corev3.HeaderValueOption {
		o := set(name, value)
		//lint:ignore SA1019 providers write it, and every Envoy reads it
		o.Append = wrapperspb.Bool(more)
		return o
	}
	action := func(name, value string, a corev3.HeaderValueOption_HeaderAppendAction) *corev3.HeaderValueOption {
		o := set(name, value)
		o.AppendAction = a
		return o
	}
	headers := func(os ...*corev3.HeaderValueOption) *authv3.OkHttpResponse {
		return &authv3.OkHttpResponse{Headers: os}
	}
	param := func(k, v string) []*corev3.QueryParameter { return []*corev3.QueryParameter{{Key: k, Value: v}} }
	p := &changing{got: map[string]authz.Request{}, rows: []change{
		{name: "nothing", answer: headers()},
		{name: "a header that is there", answer: headers(set("x-a", "new"))},
		{name: "a header that is there twice", answer: headers(set("X-Two", "new"))},
		{name: "a header that is not there", answer: headers(set("x-new", "new"))},
		{name: "an empty value", answer: headers(set("x-a", ""))},
		{name: "twice", answer: headers(set("x-a", "1"), set("x-a", "2"))},
		{name: "in place", answer: headers(appended("x-a", "new", false))},
		{name: "appended", answer: headers(appended("x-a", "new", true))},
		{name: "appended to two", answer: headers(appended("x-two", "new", true))},
		{name: "appended to nothing", answer: headers(appended("x-new", "new", true))},
		{name: "appended twice", answer: headers(appended("x-a", "1", true), appended("x-a", "2", true))},
		{name: "set and appended", answer: headers(appended("x-a", "1", false), appended("x-a", "2", true))},
		{name: "appended and set", answer: headers(appended("x-a", "1", true), appended("x-a", "2", false))},
		{name: "appended to an empty value", answer: headers(appended("x-empty", "new", true))},
		{name: "appended to an empty value twice", answer: headers(appended("x-empty", "1", true), appended("x-empty", "2", true))},
		{name: "nothing appended", answer: headers(appended("x-a", "", true), appended("x-empty", "", true), appended("cookie", "", true))},
		{name: "set to nothing and appended", answer: headers(set("x-a", ""), appended("x-a", "b", true))},
		{name: "set and nothing appended", answer: headers(set("x-a", "b"), appended("x-a", "", true))},
		{name: "set twice and appended", answer: headers(set("x-a", "1"), set("x-a", "2"), appended("x-a", "3", true), appended("x-a", "4", true))},
		{name: "appended to the cookies", answer: headers(appended("Cookie", "role=guest", true))},
		{name: "appended to the cookies twice", answer: headers(appended("cookie", "c=1", true), appended("cookie", "d=2", true))},
		{name: "cookies set", answer: headers(set("cookie", "c=1"))},
		{name: "cookies set and appended", answer: headers(set("cookie", "c=1"), appended("cookie", "d=2", true))},
		{name: "cookies set to nothing and appended", answer: headers(set("cookie", ""), appended("cookie", "d=2", true))},
		{name: "if absent, and is", answer: headers(action("x-new", "new", corev3.HeaderValueOption_ADD_IF_ABSENT))},
		{name: "if absent, and is not", answer: headers(action("x-a", "new", corev3.HeaderValueOption_ADD_IF_ABSENT))},
		{name: "if there, and is not", answer: headers(action("x-new", "new", corev3.HeaderValueOption_OVERWRITE_IF_EXISTS))},
		{name: "if there, and is", answer: headers(action("x-a", "new", corev3.HeaderValueOption_OVERWRITE_IF_EXISTS))},
		{name: "overwritten or added", answer: headers(action("x-a", "new", corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD))},
		{name: "removed", answer: &authv3.OkHttpResponse{HeadersToRemove: []string{"X-A", "x-two", "x-not-there"}}},
		{name: "set and removed", answer: &authv3.OkHttpResponse{Headers: []*corev3.HeaderValueOption{set("x-a", "new")}, HeadersToRemove: []string{"x-a"}}},
		{name: "host removed", answer: &authv3.OkHttpResponse{HeadersToRemove: []string{"host", ":path", ":authority"}}},
		{name: "the token set", answer: headers(set("authorization", "Bearer theirs"))},
		{name: "the path", answer: headers(set(":path", "/other?z=1"))},
		{name: "the authority", answer: headers(set(":authority", "other.example"))},
		{name: "the host", answer: headers(set("host", "other.example"))},
		{name: "the method", answer: headers(set(":method", "PUT"))},
		{name: "the scheme", answer: headers(set(":scheme", "https")), refused: true},
		{name: "the length", answer: headers(set("content-length", "5")), refused: true},
		{name: "a raw value", answer: headers(&corev3.HeaderValueOption{Header: &corev3.HeaderValue{Key: "x-a", RawValue: []byte("raw")}}), refused: true},
		{name: "a line break", answer: headers(set("x-a", "a\r\nx-b: b")), refused: true},
		{name: "a parameter", answer: &authv3.OkHttpResponse{QueryParametersToSet: param("new", "1")}},
		{name: "a parameter that is there", answer: &authv3.OkHttpResponse{QueryParametersToSet: param("b", "9")}},
		{name: "a parameter removed", answer: &authv3.OkHttpResponse{QueryParametersToRemove: []string{"b"}}},
		{name: "a parameter set and removed", answer: &authv3.OkHttpResponse{QueryParametersToSet: param("new", "1"), QueryParametersToRemove: []string{"new", "e%6E"}}},
		{name: "a parameter removed under its decoded name", answer: &authv3.OkHttpResponse{QueryParametersToRemove: []string{"en"}}},
		{name: "all parameters", answer: &authv3.OkHttpResponse{QueryParametersToRemove: []string{"a", "b", "c", "e%6E"}}},
		{name: "path and parameter", answer: &authv3.OkHttpResponse{Headers: []*corev3.HeaderValueOption{set(":path", "/o?q=1")}, QueryParametersToRemove: []string{"q"}}, refused: true},
	}}
	// What an HTTP provider answers.
	web := map[string]http.Header{
		"HTTP: nothing":             {},
		"HTTP: set":                 {"X-A": {"new"}, "X-Two": {"new"}, "X-New": {"new"}},
		"HTTP: set to nothing":      {"X-A": {""}},
		"HTTP: twice":               {"X-A": {"1", "2"}, "X-New": {"1", "2"}, "X-Two": {"3", "4", "5"}},
		"HTTP: twice the same":      {"X-A": {"1", "1"}},
		"HTTP: nothing and a value": {"X-A": {"", "2"}, "X-New": {"1", ""}},
		"HTTP: with a comma":        {"X-A": {"1,2", "3"}},
		"HTTP: cookies":             {"Cookie": {"c=1", "d=2"}},
		"HTTP: removed":             {"X-Envoy-Auth-Headers-To-Remove": {"x-a, x-two"}},
		"HTTP: removed, in two":     {"X-Envoy-Auth-Headers-To-Remove": {"x-a", "x-two"}},
		"HTTP: set and removed":     {"X-A": {"new"}, "X-Envoy-Auth-Headers-To-Remove": {"x-a"}},
		"HTTP: not wanted":          {"X-B": {"new"}},
	}
	webServer := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		maps.Copy(rw.Header(), web[r.Header.Get("X-Row")])
	}))
	t.Cleanup(webServer.Close)
	upstream := []string{"x-a", "x-two", "x-new", "x-empty", "cookie"}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	providerServer := grpc.NewServer()
	authv3.RegisterAuthorizationServer(providerServer, p)
	go providerServer.Serve(l)
	t.Cleanup(providerServer.Stop)

	asks, err := provider.New(provider.Config{Providers: []provider.Spec{{Name: "them", GRPC: &provider.GRPC{Address: providerAt(t, l.Addr())}},
		{Name: "web", HTTP: &provider.HTTP{Address: providerAt(t, webServer.Listener.Addr()), IncludeRequestHeadersInCheck: []string{"x-row"}, HeadersToUpstreamOnAllow: upstream}}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { asks.Close() })
	rs, problems := authz.Parse("p.yaml", []byte(`apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: ask, namespace: default}
spec: {action: CUSTOM, provider: {name: them}, rules: [{to: [{operation: {notPaths: [/web]}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: web, namespace: default}
spec: {action: CUSTOM, provider: {name: web}, rules: [{to: [{operation: {paths: [/web]}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: reads, namespace: default}
spec: {action: AUDIT, rules: [{when: [{key: "request.headers[x-a]", values: [nobody]}]}]}
`))
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	policies, _ := authz.Set{}.Update(rs)
	snapshot, _ := authz.Compile(policies, authz.Options{MultipleProviders: true})
	decided := decidedOn{}
	checks, err := extauthz.New(extauthz.Config{Snapshot: func() *authz.Snapshot { return snapshot }, Providers: asks, Records: &decided})
	if err != nil {
		t.Fatal(err)
	}
	socket := serveChecks(t, checks)
	app := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		_ = json.NewEncoder(rw).Encode(seenRequest{r.Method, r.RequestURI, r.Host, r.Header})
	}))
	t.Cleanup(app.Close)
	file := filepath.Join(t.TempDir(), "envoy.json")
	if err := os.WriteFile(file, changesEnvoy(t, socket, l.Addr(), webServer.Listener.Addr(), app.Listener.Addr(), upstream), 0o600); err != nil {
		t.Fatal(err)
	}
	envoy := envoytest.Start(t, file)
	envoy.WaitReady(t)
	ask := func(listener, path, row string) (int, seenRequest) {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+envoy.Listener(t, listener)+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Host = "app.example"
		r.Header = http.Header{"X-Row": {row}, "X-A": {"a"}, "X-Two": {"1", "2"}, "X-Empty": {""}, "Cookie": {"a=b"}, "Authorization": {"Bearer client"}}
		res, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		var got seenRequest
		if res.StatusCode == 200 {
			if err := json.Unmarshal(b, &got); err != nil {
				t.Fatalf("%s: %v: %s", row, err, b)
			}
		}
		return res.StatusCode, got
	}
	names := []string{"X-A", "X-Two", "X-New", "X-B", "X-Empty", "Cookie", "Authorization"}
	compare := func(listener, path, row string) {
		t.Helper()
		mine, got := ask("signet", path, row)
		status, want := ask(listener, path, row)
		if status != 200 || mine != 200 {
			t.Errorf("%s: Envoy %d, Signet %d", row, status, mine)
			return
		}
		if got.Method != want.Method || got.URI != want.URI || got.Host != want.Host {
			t.Errorf("%s: the application gets\nEnvoy:  %s %s %s\nSignet: %s %s %s", row, want.Method, want.Host, want.URI, got.Method, got.Host, got.URI)
		}
		p.mu.Lock()
		envoys := p.got[row]
		p.mu.Unlock()
		signets := decided.of(row)
		for _, name := range names {
			if w, g := strings.Join(want.Header.Values(name), ","), strings.Join(got.Header.Values(name), ","); w != g {
				t.Errorf("%s: the application gets %s\nEnvoy:  %q\nSignet: %q", row, name, w, g)
			}
			if w, g := header(&envoys, strings.ToLower(name)), header(&signets, strings.ToLower(name)); w != g {
				t.Errorf("%s: policies see %s\nEnvoy:  %q\nSignet: %q", row, name, w, g)
			}
		}
		if string(envoys.Path) != string(signets.Path) || string(envoys.Host) != string(signets.Host) || string(envoys.Method) != string(signets.Method) {
			t.Errorf("%s: policies see\nEnvoy:  %s %s %s\nSignet: %s %s %s", row, envoys.Method, envoys.Host, envoys.Path, signets.Method, signets.Host, signets.Path)
		}
	}
	const path = "/p/x?b=2&a&e%6E=3&b=1&c=%41"
	for _, row := range p.rows {
		if !row.refused {
			compare("istio", path, row.name)
		} else if status, _ := ask("signet", path, row.name); status != 403 {
			t.Errorf("%s: %d; want it denied", row.name, status)
		}
	}
	for _, row := range slices.Sorted(maps.Keys(web)) {
		compare("istio-web", "/web", row)
	}
}

// decidedOn are what was decided on, by row.
type decidedOn struct {
	mu  sync.Mutex
	got map[string]authz.Request
}

func (rs *decidedOn) Add(r *extauthz.Record) {
	kept := authz.Request{Method: slices.Clone(r.Request.Method), Path: slices.Clone(r.Request.Path), Host: slices.Clone(r.Request.Host)}
	for _, h := range r.Request.Headers {
		kept.Headers = append(kept.Headers, authz.Header{Name: strings.Clone(h.Name), Value: slices.Clone(h.Value)})
	}
	row := header(&kept, "x-row")
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if rs.got == nil {
		rs.got = map[string]authz.Request{}
	}
	rs.got[row] = kept
}

func (rs *decidedOn) of(row string) authz.Request {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	return rs.got[row]
}

// changesEnvoy is the bootstrap of an Envoy that asks the provider itself, on one
// port, and the agent on another.
func changesEnvoy(t *testing.T, socket string, them, web, app net.Addr, upstream []string) []byte {
	t.Helper()
	type object = map[string]any
	typed := func(name, kind string, config object) object {
		config["@type"] = "type.googleapis.com/" + kind
		return object{"name": name, "typed_config": config}
	}
	at := func(a net.Addr) object {
		host, port, _ := net.SplitHostPort(a.String())
		return object{"socket_address": object{"address": host, "port_value": json.Number(port)}}
	}
	cluster := func(name string, address, http object) object {
		return object{"name": name, "type": "STATIC", "connect_timeout": "5s",
			"typed_extension_protocol_options": object{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": object{
				"@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions", "explicit_http_config": http}},
			"load_assignment": object{"cluster_name": name, "endpoints": []object{{"lb_endpoints": []object{{"endpoint": object{"address": address}}}}}}}
	}
	authorizer := func(name, cluster string) object {
		return typed("envoy.filters.http.ext_authz."+name, "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz", object{
			"transport_api_version": "V3", "encode_raw_headers": true,
			"grpc_service": object{"envoy_grpc": object{"cluster_name": cluster}, "timeout": "60s"}})
	}
	exactly := func(names ...string) object {
		var patterns []object
		for _, name := range names {
			patterns = append(patterns, object{"exact": name, "ignore_case": true})
		}
		return object{"patterns": patterns}
	}
	// As Istio writes it.
	webAuthorizer := typed("envoy.filters.http.ext_authz.web", "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz", object{
		"transport_api_version": "V3", "allowed_headers": exactly("x-row"), "http_service": object{
			"server_uri":             object{"uri": "http://web.example", "cluster": "web", "timeout": "60s"},
			"authorization_response": object{"allowed_upstream_headers": exactly(upstream...)}}})
	listener := func(name string, filters ...object) object {
		route := object{"match": object{"prefix": "/"}, "route": object{"cluster": "app"}, "typed_per_filter_config": object{
			"envoy.filters.http.ext_authz.behind": object{"@type": "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute",
				"check_settings": object{"context_extensions": object{"behind": "yes"}}}}}
		filters = append(filters, typed("envoy.filters.http.router", "envoy.extensions.filters.http.router.v3.Router", object{}))
		return object{"name": name, "address": object{"socket_address": object{"address": "127.0.0.1", "port_value": 0}}, "filter_chains": []object{{"filters": []object{
			typed("envoy.filters.network.http_connection_manager", "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager", object{
				"stat_prefix": name, "normalize_path": true, "http_filters": filters,
				"route_config": object{"virtual_hosts": []object{{"name": "all", "domains": []string{"*"}, "routes": []object{route}}}}})}}}}
	}
	b, err := json.Marshal(object{"node": object{"id": "e", "cluster": "e"}, "static_resources": object{
		"listeners": []object{listener("istio", authorizer("first", "them"), authorizer("behind", "them")), listener("istio-web", webAuthorizer, authorizer("behind", "them")), listener("signet", authorizer("agent", "agent"))},
		"clusters": []object{
			cluster("agent", object{"pipe": object{"path": socket}}, object{"http2_protocol_options": object{}}),
			cluster("them", at(them), object{"http2_protocol_options": object{}}),
			cluster("web", at(web), object{"http_protocol_options": object{}}),
			cluster("app", at(app), object{"http_protocol_options": object{}}),
		}}})
	if err != nil {
		t.Fatal(fmt.Errorf("the bootstrap: %w", err))
	}
	return b
}
