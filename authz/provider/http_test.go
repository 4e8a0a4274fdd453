package provider_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/extauthz"
	"github.com/signet-mesh/signet/authz/provider"
)

// httpWorld has an HTTP provider that tells what it got.
func httpWorld(t *testing.T, h http.HandlerFunc, change ...func(s *provider.HTTP)) *world {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	spec := &provider.HTTP{Address: at(t, s.Listener.Addr())}
	for _, c := range change {
		c(spec)
	}
	return newWorld(t, provider.Spec{HTTP: spec})
}

// rawWorld has an HTTP provider that answers with bytes, and closes.
func rawWorld(t *testing.T, answer string, change ...func(s *provider.HTTP)) *world {
	t.Helper()
	spec := &provider.HTTP{Address: accept(t, func(c net.Conn) {
		if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
			io.WriteString(c, answer)
		}
	})}
	for _, c := range change {
		c(spec)
	}
	return newWorld(t, provider.Spec{HTTP: spec})
}

func TestHTTPProviderGetsTheRequest(t *testing.T) {
	t.Parallel()
	var got *http.Request
	var body string
	w := httpWorld(t, func(rw http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		got, body = r, string(b)
		rw.Header().Set("X-User", "alice")
		rw.Header().Add("X-Group", "a")
		rw.Header().Add("X-Group", "b")
		rw.Header().Set("X-Envoy-Auth-Headers-To-Remove", "authorization, x-other")
		rw.Header().Set("Set-Cookie", "s=1")
		rw.Header().Set("X-Internal", "1")
	}, func(s *provider.HTTP) {
		s.IncludeRequestHeadersInCheck = []string{"X-U*", "connection", "host"}
		s.IncludeAdditionalHeadersInCheck = map[string]string{"X-Mesh": "signet", "x-user-kind": "any"}
		s.HeadersToUpstreamOnAllow = []string{"x-user", "*-group"}
		s.HeadersToDownstreamOnAllow = []string{"set-cookie"}
	})
	a := w.check(request("/ask/%2e%2E/a;b?q=%zz#f"))
	if !w.last.Allowed {
		t.Fatalf("decided %+v", w.last)
	}
	if got.Method != "GET" || got.RequestURI != "/ask/%2e%2E/a;b?q=%zz#f" || got.Host != "shop.example:8080" || got.Header.Get("Authorization") != "Bearer t" ||
		fmt.Sprint(got.Header["X-User"]) != "[alice bob]" || got.Header.Get("X-Other") != "" || got.Header.Get("X-Mesh") != "signet" || got.Header.Get("X-User-Kind") != "any" ||
		got.Header.Get("User-Agent") != "" || got.Header.Get("Accept-Encoding") != "" || got.Close || body != "" {
		t.Errorf("the provider got %s %s %s %v %q", got.Method, got.RequestURI, got.Host, got.Header, body)
	}
	ok := a.GetOkResponse()
	var headers []string
	for _, h := range ok.GetHeaders() {
		//lint:ignore SA1019 see option
		headers = append(headers, fmt.Sprintf("%s=%s %t", h.Header.Key, h.Header.Value, h.Append.GetValue()))
	}
	if s := strings.Join(headers, ", "); s != "x-group=b false, x-user=alice false" {
		t.Errorf("headers to upstream: %s", s)
	}
	if len(ok.GetResponseHeadersToAdd()) != 1 || ok.GetResponseHeadersToAdd()[0].Header.Key != "set-cookie" || fmt.Sprint(ok.GetHeadersToRemove()) != "[authorization x-other]" {
		t.Errorf("answer %v", ok)
	}
	// Without lists nothing changes.
	w = httpWorld(t, func(rw http.ResponseWriter, _ *http.Request) { rw.Header().Set("X-User", "alice") })
	if a := w.check(request("/ask")); !w.last.Allowed || len(a.GetOkResponse().GetHeaders())+len(a.GetOkResponse().GetResponseHeadersToAdd()) != 0 {
		t.Errorf("answer %v", a)
	}
}

// TestHTTPProviderSeesThePath: no path becomes another one, or a host, on the way.
func TestHTTPProviderSeesThePath(t *testing.T) {
	t.Parallel()
	var got, host string
	handler := func(_ http.ResponseWriter, r *http.Request) { got, host = r.RequestURI, r.Host }
	plain := httpWorld(t, handler)
	prefixed := httpWorld(t, handler, func(s *provider.HTTP) { s.PathPrefix = "/check" })
	for _, path := range []string{"/ask", "/ask/", "/ask?", "/ask??x", "/ask//x", "/ask/..//x", "/ask%00", "/ask\\", "/ask\xff", "/ask/http://evil/"} {
		if plain.check(request(path)); !plain.last.Allowed || got != path || host != "shop.example:8080" {
			t.Errorf("%q: the provider got %q at %q: %v", path, got, host, plain.last.err)
		}
		if prefixed.check(request(path)); !prefixed.last.Allowed || got != "/check"+path {
			t.Errorf("%q: the provider got %q: %v", path, got, prefixed.last.err)
		}
	}
	// Two slashes are no host: the target stays in origin form, and the host the client's.
	for _, path := range []string{"//ask/x", "//ask", "//ask?", "//ask??x", "//ask?a=%zz#f", "//ask/?q=/../\xff", "//ask//x", "//ask/..//x", "//ask%00", "//ask/%2e%2E/%2F%41", "//ask/a;b=c,d:@!$&'()*+~",
		"//ask/http://evil/", "//ask:80/", "//ask@evil/", "//ask/[x]"} {
		if plain.check(request(path)); !plain.last.Allowed || got != path || host != "shop.example:8080" {
			t.Errorf("%q: the provider got %q at %q: %v", path, got, host, plain.last.err)
		}
		if prefixed.check(request(path)); !prefixed.last.Allowed || got != "/check"+path || host != "shop.example:8080" {
			t.Errorf("%q: the provider got %q at %q: %v", path, got, host, prefixed.last.err)
		}
	}
	// Nothing that package url would write otherwise is asked about.
	for _, path := range []string{"//ask\\", "//ask\xff", "//ask/%zz", "//ask/%", "//ask#f", "//ask/\"x\"", "//ask/é", "//ask/{x}|^`"} {
		got = ""
		if plain.closed(request(path), extauthz.ReasonProviderFailed); got != "" {
			t.Errorf("%q: the provider got %q", path, got)
		}
		if strings.Contains(path, "%") {
			continue // Go's server does not take it
		}
		if prefixed.check(request(path)); !prefixed.last.Allowed || got != "/check"+path {
			t.Errorf("%q: the provider got %q: %v", path, got, prefixed.last.err)
		}
	}
	for _, path := range []string{"/ask x", "/ask\tx", "/ask\r\nX: y", "/ask\x00", "/ask\x7f"} {
		plain.closed(request(path), extauthz.ReasonProviderFailed)
	}
	method := func(m string) func(h *authv3.AttributeContext_HttpRequest) {
		return func(h *authv3.AttributeContext_HttpRequest) {
			h.Method = m
			h.HeaderMap.Headers[0] = header(":method", m)
		}
	}
	for _, m := range []string{"CONNECT", "GET /x HTTP/1.1\r\nA: b\r\n\r\nGET", "G T"} {
		plain.closed(request("/ask", method(m)), extauthz.ReasonProviderFailed)
	}
	if plain.check(request("/ask", method("PROPFIND"))); !plain.last.Allowed {
		t.Errorf("decided %+v", plain.last)
	}
	got = ""
	if plain.closed(connection(), extauthz.ReasonProviderFailed); got != "" {
		t.Error("the provider was asked about a connection")
	}
}

// TestHTTPProviderSeesTheHost: no host becomes another one, or none, on the way.
func TestHTTPProviderSeesTheHost(t *testing.T) {
	t.Parallel()
	asked, got := 0, ""
	handler := func(_ http.ResponseWriter, r *http.Request) { asked, got = asked+1, r.Host }
	w := httpWorld(t, handler)
	of := func(host string) *authv3.CheckRequest {
		return request("/ask", func(h *authv3.AttributeContext_HttpRequest) {
			h.Host = strings.ToValidUTF8(host, "!")
			h.HeaderMap.Headers[2] = header(":authority", host)
		})
	}
	for _, host := range []string{"shop.example", "SHOP.example:80", "shop.example.", "[::1]:8080", "10.0.0.1", "a_b", "a%20b", "a,b;c=d", "shop.example:"} {
		if w.check(of(host)); !w.last.Allowed || got != host {
			t.Errorf("%q: the provider got %q: %v", host, got, w.last.err)
		}
	}
	asked = 0
	bad := []string{"", "user@shop.example", "shop.example/x", "shop example", "shop.example\\", "münchen.example", "a\xffb", "[fe80::1%eth0]:80", "[fe80::1%25eth0]", "a?b", "a#b", "a\r\nb", "{}", "<a>", "a\"b"}
	for _, host := range bad {
		w.closed(of(host), extauthz.ReasonProviderFailed)
	}
	if asked != 0 {
		t.Errorf("the provider was asked %d times about hosts that cannot be sent", asked)
	}
	// Where the provider gets a fixed host, the request's does not matter.
	w = httpWorld(t, handler, func(s *provider.HTTP) {
		s.IncludeAdditionalHeadersInCheck = map[string]string{"Host": "provider.example"}
	})
	if w.check(of("user@shop.example")); !w.last.Allowed || got != "provider.example" {
		t.Errorf("the provider got %q: %v", got, w.last.err)
	}
	for _, host := range bad {
		s := &provider.HTTP{Address: provider.Address{Service: "127.0.0.1", Port: 80}, IncludeAdditionalHeadersInCheck: map[string]string{"host": host}}
		if _, err := provider.New(provider.Config{Providers: []provider.Spec{{Name: "them", HTTP: s}}}); err == nil {
			t.Errorf("the fixed host %q is taken", host)
		}
	}
}

func TestHTTPProviderInOrder(t *testing.T) {
	t.Parallel()
	status := 200
	w := httpWorld(t, func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Location", "https://login.example/")
		rw.Header().Set("X-Why", "because")
		rw.WriteHeader(status)
		if status != 204 && status != 304 {
			io.WriteString(rw, "body \xff")
		}
	})
	w.closed(request("/ask/denied"), authz.ReasonDenyRule)
	for _, tt := range []struct {
		status, want int32
		reason       authz.Reason
	}{
		{401, 401, extauthz.ReasonProviderDenied}, {403, 403, extauthz.ReasonProviderDenied}, {302, 302, extauthz.ReasonProviderDenied},
		{201, 201, extauthz.ReasonProviderDenied}, {204, 204, extauthz.ReasonProviderDenied}, {429, 429, extauthz.ReasonProviderDenied}, {299, 403, extauthz.ReasonProviderDenied},
		{418, 403, extauthz.ReasonProviderDenied}, {500, 403, extauthz.ReasonProviderFailed}, {503, 403, extauthz.ReasonProviderFailed}, {599, 403, extauthz.ReasonProviderFailed},
	} {
		status = int(tt.status)
		for _, path := range []string{"/ask", "/ask/denied"} {
			a := w.closed(request(path), tt.reason)
			d := a.GetDeniedResponse()
			if int32(d.GetStatus().GetCode()) != tt.want {
				t.Errorf("%d: answer %v", tt.status, a)
			}
			if tt.reason != extauthz.ReasonProviderDenied {
				continue
			}
			told := map[string]string{}
			for _, h := range d.GetHeaders() {
				told[h.Header.Key] = h.Header.Value
			}
			if told["location"] != "https://login.example/" || told["x-why"] != "because" || told["content-length"] != "" || status == 401 && d.GetBody() != "body \uFFFD" {
				t.Errorf("%d: answer %v", tt.status, a)
			}
		}
	}
	w = httpWorld(t, func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Location", "/l")
		rw.Header().Set("X-Why", "because")
		rw.Header().Set("X-Told", "yes")
		rw.WriteHeader(302)
	}, func(s *provider.HTTP) { s.HeadersToDownstreamOnDeny, s.StatusOnError = []string{"x-told"}, "503" })
	var names []string
	for _, h := range w.closed(request("/ask"), extauthz.ReasonProviderDenied).GetDeniedResponse().GetHeaders() {
		names = append(names, h.Header.Key)
	}
	if strings.Join(names, " ") != "location x-told" {
		t.Errorf("told %v", names)
	}
}

// TestHTTPProviderThatLies closes whatever is not a whole answer in time.
func TestHTTPProviderThatLies(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, answer, err string }{
		{"closes at once", "", "EOF"},
		{"speaks garbage", "garbage\x00\xff\r\n\r\n", "malformed HTTP"},
		{"breaks off in the headers", "HTTP/1.1 200 OK\r\nContent-", "malformed"},
		{"breaks off in the body", "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", "EOF"},
		{"breaks off in a chunk", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc", "EOF"},
		{"answers too much", "HTTP/1.1 200 OK\r\nContent-Length: 2000000\r\n\r\n" + strings.Repeat("x", 2_000_000), "larger than"},
		{"answers endless headers", "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 1<<20) + "\r\n\r\n", "exceeded"},
		{"denies with too much", "HTTP/1.1 403 No\r\nContent-Length: 2000000\r\n\r\n" + strings.Repeat("x", 2_000_000), "larger than"},
		{"says go on, and ends", "HTTP/1.1 100 Continue\r\n\r\n", "EOF"},
		{"says go on for ever", strings.Repeat("HTTP/1.1 102 Processing\r\n\r\n", 5000), ""},
		{"changes the protocol", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "changes the protocol"},
		{"answers with two lengths", "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", "Content-Length"},
		{"answers with a status that is none", "HTTP/1.1 20x OK\r\nContent-Length: 0\r\n\r\n", "malformed HTTP"},
		{"answers 200 with the error of a gRPC server", "HTTP/1.1 500 Internal Server Error\r\ngrpc-status: 0\r\nContent-Length: 0\r\n\r\n", "HTTP status 500"},
		{"answers a preface of HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "malformed HTTP"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := rawWorld(t, tt.answer, func(s *provider.HTTP) { s.StatusOnError = "503" })
			a := w.closed(request("/ask?token=secret"), extauthz.ReasonProviderFailed)
			if a.GetDeniedResponse().GetStatus().GetCode() != 503 {
				t.Errorf("answer %v", a)
			}
			if w.last.err == nil || !strings.Contains(w.last.err.Error(), tt.err) || strings.Contains(w.last.err.Error(), "secret") {
				t.Errorf("error %v; want %q", w.last.err, tt.err)
			}
		})
	}
	t.Run("is slow", func(t *testing.T) {
		t.Parallel()
		for name, handler := range map[string]http.HandlerFunc{
			"before the answer": func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
			"in the answer": func(rw http.ResponseWriter, r *http.Request) {
				rw.WriteHeader(200)
				rw.(http.Flusher).Flush()
				<-r.Context().Done()
			},
		} {
			w := httpWorld(t, handler, func(s *provider.HTTP) { s.Timeout = 50 * time.Millisecond })
			if w.closed(request("/ask"), extauthz.ReasonProviderFailed); !strings.Contains(w.last.err.Error(), "did not answer in time") {
				t.Errorf("%s: %v", name, w.last.err)
			}
		}
	})
	t.Run("is dead", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t, provider.Spec{HTTP: &provider.HTTP{Address: at(t, nobody(t))}})
		w.closed(request("/ask"), extauthz.ReasonProviderFailed)
	})
}

func TestHTTPProviderGetsTheBody(t *testing.T) {
	t.Parallel()
	var got, mark string
	handler := func(_ http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		got, mark = fmt.Sprintf("%s %d", b, r.ContentLength), r.Header.Get("X-Envoy-Auth-Partial-Body")
	}
	with := func(partial bool) func(s *provider.HTTP) {
		return func(s *provider.HTTP) {
			s.IncludeRequestBodyInCheck = &provider.Body{MaxRequestBytes: 5, AllowPartialMessage: partial}
		}
	}
	body := func(b, mark string) func(h *authv3.AttributeContext_HttpRequest) {
		return func(h *authv3.AttributeContext_HttpRequest) {
			h.RawBody = []byte(b)
			if mark != "" {
				h.HeaderMap.Headers = append(h.HeaderMap.Headers, header("x-envoy-auth-partial-body", mark))
			}
		}
	}
	whole, part := httpWorld(t, handler, with(false)), httpWorld(t, handler, with(true))
	if whole.check(request("/ask", body("12345", "false"))); !whole.last.Allowed || got != "12345 5" || mark != "false" {
		t.Errorf("got %q %q: %+v", got, mark, whole.last)
	}
	if whole.check(request("/ask", body("", "false"))); !whole.last.Allowed || got != " 0" {
		t.Errorf("got %q %q: %+v", got, mark, whole.last)
	}
	whole.closed(request("/ask", body("123456", "false")), extauthz.ReasonProviderFailed)
	whole.closed(request("/ask", body("123", "true")), extauthz.ReasonProviderFailed)
	// A proxy that sends no bodies: only what certainly has none.
	says := func(method string, headers ...string) func(h *authv3.AttributeContext_HttpRequest) {
		return func(h *authv3.AttributeContext_HttpRequest) {
			h.Method, h.HeaderMap.Headers[0] = method, header(":method", method)
			for i := 0; i < len(headers); i += 2 {
				h.HeaderMap.Headers = append(h.HeaderMap.Headers, header(headers[i], headers[i+1]))
			}
		}
	}
	for _, c := range []func(h *authv3.AttributeContext_HttpRequest){says("GET"), says("DELETE"), says("POST", "content-length", "0"), says("GET", "content-length", "0")} {
		if whole.check(request("/ask", c)); !whole.last.Allowed || got != " 0" {
			t.Errorf("got %q: %+v", got, whole.last)
		}
	}
	for _, c := range []func(h *authv3.AttributeContext_HttpRequest){says("POST"), says("PATCH"), says("GET", "content-length", "5"), says("GET", "transfer-encoding", "chunked"),
		says("POST", "content-length", "0", "content-length", "5"), says("POST", "content-length", "0", "transfer-encoding", "chunked")} {
		whole.closed(request("/ask", c), extauthz.ReasonProviderFailed)
	}
	if part.check(request("/ask", body("123456", "false"))); !part.last.Allowed || got != "12345 5" || mark != "true" {
		t.Errorf("got %q %q: %+v", got, mark, part.last)
	}
	none := httpWorld(t, handler)
	if none.check(request("/ask", body("123", "false"))); !none.last.Allowed || got != " 0" {
		t.Errorf("got %q: %+v", got, none.last)
	}
}

// TestSpecsAreRefused names what is wrong with a configuration.
func TestSpecsAreRefused(t *testing.T) {
	t.Parallel()
	good := provider.Address{Service: "opa.default.svc", Port: 9191}
	h := func(change func(h *provider.HTTP)) provider.Spec {
		s := &provider.HTTP{Address: good}
		change(s)
		return provider.Spec{Name: "x", HTTP: s}
	}
	a := func(change func(a *provider.Address)) provider.Spec {
		s := &provider.GRPC{Address: good}
		change(&s.Address)
		return provider.Spec{Name: "x", GRPC: s}
	}
	for want, s := range map[string]provider.Spec{
		"name is missing":          {GRPC: &provider.GRPC{Address: good}},
		"exactly one of":           {Name: "x"},
		"exactly one of envoyExt":  {Name: "x", GRPC: &provider.GRPC{Address: good}, HTTP: &provider.HTTP{Address: good}},
		"service is missing":       a(func(a *provider.Address) { a.Service = "" }),
		"is no host name":          a(func(a *provider.Address) { a.Service = "http://x/y" }),
		"port 0":                   a(func(a *provider.Address) { a.Port = 0 }),
		"port 65536":               a(func(a *provider.Address) { a.Port = 65536 }),
		"failOpen":                 a(func(a *provider.Address) { a.FailOpen = true }),
		"clearRouteCache":          a(func(a *provider.Address) { a.ClearRouteCache = true }),
		"timeout 10m":              a(func(a *provider.Address) { a.Timeout = 10 * time.Minute }),
		"timeout -1s":              a(func(a *provider.Address) { a.Timeout = -time.Second }),
		"statusOnError \"200\"":    a(func(a *provider.Address) { a.StatusOnError = "200" }),
		"statusOnError \"x\"":      a(func(a *provider.Address) { a.StatusOnError = "x" }),
		"maxInFlight -1":           a(func(a *provider.Address) { a.MaxInFlight = -1 }),
		"maxRequestBytes":          a(func(a *provider.Address) { a.IncludeRequestBodyInCheck = &provider.Body{} }),
		"certFile and keyFile":     a(func(a *provider.Address) { a.TLS = &provider.TLS{CertFile: "x"} }),
		"tls.caFile: open":         a(func(a *provider.Address) { a.TLS = &provider.TLS{CAFile: "/nowhere"} }),
		"tls.certFile: open":       a(func(a *provider.Address) { a.TLS = &provider.TLS{CertFile: "/nowhere", KeyFile: "/nowhere"} }),
		"pathPrefix \"check\"":     h(func(h *provider.HTTP) { h.PathPrefix = "check" }),
		"pathPrefix \"/a?b\"":      h(func(h *provider.HTTP) { h.PathPrefix = "/a?b" }),
		"headersToUpstreamOnAllow": h(func(h *provider.HTTP) { h.HeadersToUpstreamOnAllow = []string{"*"} }),
		"\"a*b\" is no name":       h(func(h *provider.HTTP) { h.HeadersToDownstreamOnDeny = []string{"a*b"} }),
		"additional":               h(func(h *provider.HTTP) { h.IncludeAdditionalHeadersInCheck = map[string]string{"a": "b\r\nc"} }),
	} {
		if want == "additional" {
			want = "cannot be sent as a header"
		}
		if _, err := provider.New(provider.Config{Providers: []provider.Spec{s}}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v; want %q", s, err, want)
		}
	}
	twice := a(func(*provider.Address) {})
	if _, err := provider.New(provider.Config{Providers: []provider.Spec{twice, twice}}); err == nil || !strings.Contains(err.Error(), "twice") {
		t.Errorf("%v", err)
	}
	if p, err := provider.New(provider.Config{Providers: []provider.Spec{a(func(a *provider.Address) { a.Service = "bar/opa.example" })}}); err != nil || !p.Has("x") {
		t.Errorf("%v", err)
	}
}
