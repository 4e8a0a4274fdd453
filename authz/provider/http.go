package provider

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"golang.org/x/net/http/httpguts"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/signet-mesh/signet/authz/extauthz"
)

type httpAsker struct {
	client   *http.Client
	scheme   string
	host     string
	prefix   string
	include  names
	fixed    map[string]string
	body     *Body
	upstream names
	onAllow  names
	onDeny   names
}

func newHTTP(a Address, s *HTTP) (asker, error) {
	h := &httpAsker{
		scheme: "http", host: a.host(), prefix: s.PathPrefix, body: a.IncludeRequestBodyInCheck, fixed: s.IncludeAdditionalHeadersInCheck,
		include: newNames(s.IncludeRequestHeadersInCheck), upstream: newNames(s.HeadersToUpstreamOnAllow),
		onAllow: newNames(s.HeadersToDownstreamOnAllow), onDeny: newNames(s.HeadersToDownstreamOnDeny),
	}
	c, err := a.tlsConfig()
	if err != nil {
		return nil, err
	}
	if c != nil {
		h.scheme = "https"
	}
	h.client = &http.Client{
		// An answer that sends elsewhere is for the client.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			DialContext:         (&net.Dialer{Timeout: a.Timeout, KeepAlive: 30 * time.Second}).DialContext,
			TLSClientConfig:     c,
			TLSHandshakeTimeout: a.Timeout,
			MaxIdleConnsPerHost: 64, IdleConnTimeout: 90 * time.Second,
			MaxResponseHeaderBytes: 64 << 10,
			DisableCompression:     true,
		},
	}
	return h, nil
}

func (h *httpAsker) close() error {
	h.client.CloseIdleConnections()
	return nil
}

func (h *httpAsker) ask(ctx context.Context, message []byte) (extauthz.ProviderAnswer, error) {
	check, err := readRequest(message)
	if err != nil {
		return extauthz.ProviderAnswer{}, err
	}
	r, err := h.request(ctx, check)
	if err != nil {
		return extauthz.ProviderAnswer{}, err
	}
	res, err := h.client.Do(r)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) { // which would tell the path, with its query
			err = u.Err
		}
		return extauthz.ProviderAnswer{}, err
	}
	defer res.Body.Close()
	switch {
	case res.StatusCode >= 500:
		return extauthz.ProviderAnswer{}, fmt.Errorf("it answers with HTTP status %d", res.StatusCode)
	case res.StatusCode == http.StatusSwitchingProtocols:
		return extauthz.ProviderAnswer{}, errors.New("it changes the protocol")
	case res.StatusCode == http.StatusOK:
		// The whole answer, so that one which breaks off is none.
		if _, err := readAll(res.Body); err != nil {
			return extauthz.ProviderAnswer{}, err
		}
		return h.allowed(res.Header)
	}
	body, err := readAll(res.Body)
	if err != nil {
		return extauthz.ProviderAnswer{}, err
	}
	return h.denied(res, body), nil
}

// readAll reads a body that is not too large.
func readAll(from io.Reader) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(from, maxAnswer+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("reading its answer: %w", err)
	case len(b) > maxAnswer:
		return nil, fmt.Errorf("its answer is larger than %d bytes", maxAnswer)
	}
	return b, nil
}

// request is what the provider is sent, as Envoy would.
func (h *httpAsker) request(ctx context.Context, of *authv3.AttributeContext_HttpRequest) (*http.Request, error) {
	if of == nil {
		return nil, errors.New("an HTTP provider cannot be asked about a connection that is not HTTP")
	}
	headers, pseudo := headersOf(of)
	method, path, host := cmp.Or(pseudo[":method"], of.GetMethod()), cmp.Or(pseudo[":path"], of.GetPath()), cmp.Or(pseudo[":authority"], of.GetHost())
	switch {
	case method == "" || method == http.MethodConnect:
		return nil, fmt.Errorf("an HTTP provider cannot be asked about the method %q", method)
	case !strings.HasPrefix(path, "/") || !plain([]byte(path)):
		return nil, errors.New("an HTTP provider cannot be asked about a path that does not begin with /, or that holds a space or a control character")
	}
	u, err := h.target(h.prefix + path)
	if err != nil {
		return nil, err
	}
	r := (&http.Request{
		Method: method, URL: u,
		Host: host, Header: http.Header{}, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
	}).WithContext(ctx)
	r.Header["User-Agent"] = nil // none of our own
	for _, hd := range headers {
		if hd.name == "authorization" || h.include.match(hd.name) && !perHop(hd.name) && hd.name != "content-length" && hd.name != "host" {
			r.Header[http.CanonicalHeaderKey(hd.name)] = append(r.Header[http.CanonicalHeaderKey(hd.name)], hd.value)
		}
	}
	for k, v := range h.fixed {
		if strings.EqualFold(k, "host") {
			r.Host = v
			continue
		}
		r.Header.Set(k, v)
	}
	if !sendable(r.Host) {
		return nil, errors.New("an HTTP provider cannot be asked about a host that is empty or that holds what cannot stand in Host (RFC 9110 section 7.2)")
	}
	return r, h.addBody(r, of, headers)
}

// sendable reports whether net/http sends a host as it is: it sends none instead of
// one with other bytes, the provider's own instead of an empty one, and IPv6
// addresses without their zone.
func sendable(host string) bool {
	zone := strings.HasPrefix(host, "[") && strings.Contains(host, "%")
	return host != "" && !zone && httpguts.ValidHostHeader(host)
}

// target is the provider's URL whose request line holds the path byte by byte, in
// origin form.
func (h *httpAsker) target(path string) (*url.URL, error) {
	u := &url.URL{Scheme: h.scheme, Host: h.host}
	if !strings.HasPrefix(path, "//") {
		u.Opaque = path
		return u, nil
	}
	// Package url writes what is opaque and begins with two slashes in absolute form,
	// and there a server takes the host from the target, whatever Host says (RFC 9112
	// section 3.2.2). So it gets a path, which it writes as it likes.
	u.RawPath, u.RawQuery, u.ForceQuery = path, "", false
	if raw, query, ok := strings.Cut(path, "?"); ok {
		u.RawPath, u.RawQuery, u.ForceQuery = raw, query, true
	}
	var err error
	if u.Path, err = url.PathUnescape(u.RawPath); err != nil || u.RequestURI() != path {
		return nil, errors.New("an HTTP provider cannot be asked about a path that begins with // and holds what does not stand in a path (RFC 3986 section 3.3)")
	}
	return u, nil
}

// addBody adds the body of the request, where that is wanted.
func (h *httpAsker) addBody(r *http.Request, of *authv3.AttributeContext_HttpRequest, headers []header) error {
	if h.body == nil {
		return nil
	}
	const mark = "x-envoy-auth-partial-body" // Envoy's own, where it sends bodies; the client's is dropped there
	i := slices.IndexFunc(headers, func(hd header) bool { return hd.name == mark })
	if i < 0 {
		// Envoy sets it only where there is a body. A method that usually has one must
		// say that there is none.
		if bodiless(r.Method, headers) {
			return nil
		}
		return errors.New("the proxy does not send bodies of requests; set with_request_body in its ext_authz filter")
	}
	body, partial := of.GetRawBody(), headers[i].value != "false"
	if len(body) == 0 {
		body = []byte(of.GetBody())
	}
	if len(body) > h.body.MaxRequestBytes {
		body, partial = body[:h.body.MaxRequestBytes], true
	}
	if partial && !h.body.AllowPartialMessage {
		return errors.New("the body of the request is larger than the provider is to get (maxRequestBytes)")
	}
	r.Header.Set(mark, map[bool]string{true: "true", false: "false"}[partial])
	r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	if len(body) == 0 {
		r.Body = http.NoBody
	}
	return nil
}

// bodiless reports whether the headers of a request say that it has no body.
func bodiless(method string, headers []header) bool {
	none := method == http.MethodGet || method == http.MethodHead || method == http.MethodOptions || method == http.MethodDelete
	for _, hd := range headers {
		switch hd.name {
		case "transfer-encoding":
			return false
		case "content-length":
			if none = hd.value == "0"; !none {
				return false
			}
		}
	}
	return none
}

type header struct{ name, value string }

// headersOf lists the headers of a request in lower case, apart from the
// pseudo-headers.
func headersOf(of *authv3.AttributeContext_HttpRequest) (list []header, pseudo map[string]string) {
	pseudo = map[string]string{}
	add := func(name, value string) {
		if name = strings.ToLower(name); strings.HasPrefix(name, ":") {
			pseudo[name] = value
		} else {
			list = append(list, header{name, value})
		}
	}
	for _, hv := range of.GetHeaderMap().GetHeaders() {
		value := hv.GetValue()
		if hv.RawValue != nil {
			value = string(hv.RawValue)
		}
		add(hv.GetKey(), value)
	}
	if len(of.GetHeaderMap().GetHeaders()) == 0 {
		for name, value := range of.GetHeaders() {
			add(name, value)
		}
	}
	return list, pseudo
}

// plain reports whether no byte could end the line of a request.
func plain(b []byte) bool {
	return !slices.ContainsFunc(b, func(c byte) bool { return c <= ' ' || c == 0x7f })
}

// perHop reports whether a header is about one connection.
func perHop(name string) bool {
	switch name {
	case "connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "http2-settings":
		return true
	}
	return false
}

// toRemove is where a provider names headers that the request is to lose.
const toRemove = "x-envoy-auth-headers-to-remove"

func (h *httpAsker) allowed(answer http.Header) (extauthz.ProviderAnswer, error) {
	ok := &authv3.OkHttpResponse{}
	for _, name := range slices.Sorted(maps.Keys(answer)) {
		lower := strings.ToLower(name)
		if lower == toRemove {
			for _, v := range answer[name] {
				for n := range strings.SplitSeq(v, ",") {
					if n = strings.TrimSpace(n); n != "" {
						ok.HeadersToRemove = append(ok.HeadersToRemove, n)
					}
				}
			}
			continue
		}
		if perHop(lower) || lower == "content-length" {
			continue
		}
		for i, v := range answer[name] {
			if !utf8.ValidString(v) {
				if h.upstream.match(lower) || h.onAllow.match(lower) {
					return extauthz.ProviderAnswer{}, fmt.Errorf("the header %s of its answer is no UTF-8", lower)
				}
				continue
			}
			// As in Envoy the last replaces those before, and the request's own.
			if h.upstream.match(lower) && i == len(answer[name])-1 {
				ok.Headers = append(ok.Headers, option(lower, v, false))
			}
			if h.onAllow.match(lower) {
				ok.ResponseHeadersToAdd = append(ok.ResponseHeadersToAdd, option(lower, v, true))
			}
		}
	}
	return extauthz.ProviderAnswer{Allowed: true, Response: &authv3.CheckResponse{
		Status:       &statuspb.Status{Code: int32(codes.OK)},
		HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: ok},
	}}, nil
}

func (h *httpAsker) denied(res *http.Response, body []byte) extauthz.ProviderAnswer {
	d := &authv3.DeniedHttpResponse{Status: denialStatus(res.StatusCode), Body: strings.ToValidUTF8(string(body), "\uFFFD")}
	for _, name := range slices.Sorted(maps.Keys(res.Header)) {
		lower := strings.ToLower(name)
		if perHop(lower) || lower == "content-length" || lower == "host" {
			continue
		}
		if len(h.onDeny) > 0 && !h.onDeny.match(lower) && lower != "www-authenticate" && lower != "location" {
			continue
		}
		for _, v := range res.Header[name] {
			if utf8.ValidString(v) {
				d.Headers = append(d.Headers, option(lower, v, false))
			}
		}
	}
	code := codes.PermissionDenied
	if res.StatusCode == http.StatusUnauthorized {
		code = codes.Unauthenticated
	}
	return extauthz.ProviderAnswer{Response: &authv3.CheckResponse{
		Status:       &statuspb.Status{Code: int32(code)},
		HttpResponse: &authv3.CheckResponse_DeniedResponse{DeniedResponse: d},
	}}
}

func option(name, value string, more bool) *corev3.HeaderValueOption {
	//lint:ignore SA1019 this is the field that every Envoy's ext_authz filter reads; append_action is not
	return &corev3.HeaderValueOption{Header: &corev3.HeaderValue{Key: name, Value: value}, Append: wrapperspb.Bool(more)}
}
