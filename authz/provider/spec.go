package provider

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"golang.org/x/net/http/httpguts"
)

// Bounds of a provider's work.
const (
	// DefaultTimeout is how long an answer may take where the Spec does not say.
	// Istio waits for ten minutes; a client does not.
	DefaultTimeout = time.Second
	// MaxTimeout is the longest that a Spec may say.
	MaxTimeout = time.Minute
	// DefaultMaxInFlight is how many requests may be at a provider where the Spec
	// does not say.
	DefaultMaxInFlight = 1000

	maxAnswer = 256 << 10 // bytes of an answer, and of its headers
)

// Spec is one provider: its name and one of the two kinds.
type Spec struct {
	// Name is what CUSTOM policies call it (provider.name).
	Name string `yaml:"name"`
	GRPC *GRPC  `yaml:"envoyExtAuthzGrpc,omitempty"`
	HTTP *HTTP  `yaml:"envoyExtAuthzHttp,omitempty"`
}

// Address is where a provider is and how it is asked, for either kind.
type Address struct {
	// Service is its host name or address, in Istio's form [NAMESPACE/]HOST; the
	// namespace is not needed. Port is required.
	Service string `yaml:"service"`
	Port    int    `yaml:"port"`
	// Timeout is how long an answer may take; 0 means [DefaultTimeout].
	Timeout time.Duration `yaml:"timeout"`
	// FailOpen must be false.
	FailOpen bool `yaml:"failOpen"`
	// ClearRouteCache must be false: the proxy's ext_authz filter says that.
	ClearRouteCache bool `yaml:"clearRouteCache"`
	// StatusOnError is the HTTP status of a denial because the provider did not
	// answer; empty means 403.
	StatusOnError string `yaml:"statusOnError"`
	// MaxInFlight is how many requests may be at the provider at a time; one more is
	// denied. 0 means [DefaultMaxInFlight].
	MaxInFlight int `yaml:"maxInFlight"`
	// TLS is used where it is set; else the provider is spoken to in plaintext.
	TLS *TLS `yaml:"tls,omitempty"`
	// IncludeRequestBodyInCheck has the body of the request sent, which the proxy
	// must send to the agent (with_request_body). A gRPC provider gets it wherever
	// the proxy sends it.
	IncludeRequestBodyInCheck *Body `yaml:"includeRequestBodyInCheck,omitempty"`
}

// TLS says how a provider's certificate is verified, and the client's own.
type TLS struct {
	// CAFile is a PEM file of the roots; empty means those of the system.
	CAFile string `yaml:"caFile"`
	// ServerName is what the certificate must be for; empty means the service.
	ServerName string `yaml:"serverName"`
	// CertFile and KeyFile are the client's certificate, read at each handshake.
	CertFile string `yaml:"certFile"`
	KeyFile  string `yaml:"keyFile"`
}

// Body says how much of a request's body is sent.
type Body struct {
	// MaxRequestBytes is the largest body; a larger one denies, or is cut.
	MaxRequestBytes     int  `yaml:"maxRequestBytes"`
	AllowPartialMessage bool `yaml:"allowPartialMessage"`
	// PackAsBytes is for the proxy (pack_as_bytes); it is not used here.
	PackAsBytes bool `yaml:"packAsBytes"`
}

// GRPC is a provider that serves envoy.service.auth.v3.Authorization.
type GRPC struct {
	Address `yaml:",inline"`
}

// HTTP is a provider that is asked by plain HTTP requests. Lists of headers hold
// names, prefixes ("x-*") and suffixes ("*-id"), whose case does not matter.
type HTTP struct {
	Address `yaml:",inline"`
	// PathPrefix goes before the path of the request.
	PathPrefix string `yaml:"pathPrefix"`
	// IncludeRequestHeadersInCheck are headers of the request that the provider gets
	// beside Host and Authorization.
	IncludeRequestHeadersInCheck []string `yaml:"includeRequestHeadersInCheck"`
	// IncludeAdditionalHeadersInCheck are fixed headers that the provider gets,
	// instead of the request's of that name.
	IncludeAdditionalHeadersInCheck map[string]string `yaml:"includeAdditionalHeadersInCheck"`
	// HeadersToUpstreamOnAllow are headers of the answer that are set in the request.
	HeadersToUpstreamOnAllow []string `yaml:"headersToUpstreamOnAllow"`
	// HeadersToDownstreamOnAllow are headers of the answer that are added to the
	// workload's answer.
	HeadersToDownstreamOnAllow []string `yaml:"headersToDownstreamOnAllow"`
	// HeadersToDownstreamOnDeny are headers of the answer that a denied client gets,
	// beside WWW-Authenticate and Location; none means all.
	HeadersToDownstreamOnDeny []string `yaml:"headersToDownstreamOnDeny"`
}

// check refuses what cannot be meant, and fills in defaults.
func (a Address) check() (Address, error) {
	if _, host, ok := strings.Cut(a.Service, "/"); ok {
		a.Service = host
	}
	switch {
	case a.Service == "":
		return a, errors.New("service is missing: say which host the provider is")
	case strings.ContainsAny(a.Service, "/ \t\n"):
		return a, fmt.Errorf("service %q is no host name: write [NAMESPACE/]HOST", a.Service)
	case a.Port < 1 || a.Port > 65535:
		return a, fmt.Errorf("port %d: must be from 1 to 65535", a.Port)
	case a.FailOpen:
		return a, errors.New("failOpen: true would let requests through whenever the provider is away, so it is refused; remove it, and take the CUSTOM policy away where requests must not depend on the provider")
	case a.ClearRouteCache:
		return a, errors.New("clearRouteCache: true cannot be done from here; set clear_route_cache in the proxy's ext_authz filter")
	case a.Timeout < 0 || a.Timeout > MaxTimeout:
		return a, fmt.Errorf("timeout %v: must be at most %v", a.Timeout, MaxTimeout)
	case a.MaxInFlight < 0:
		return a, fmt.Errorf("maxInFlight %d is negative", a.MaxInFlight)
	case a.IncludeRequestBodyInCheck != nil && a.IncludeRequestBodyInCheck.MaxRequestBytes <= 0:
		return a, errors.New("includeRequestBodyInCheck.maxRequestBytes must be positive")
	case a.TLS != nil && (a.TLS.CertFile == "") != (a.TLS.KeyFile == ""):
		return a, errors.New("tls: certFile and keyFile need each other")
	}
	if a.StatusOnError != "" {
		n, err := strconv.Atoi(a.StatusOnError)
		if _, ok := typev3.StatusCode_name[int32(n)]; err != nil || !ok || n < 300 {
			return a, fmt.Errorf("statusOnError %q: must be an HTTP status that is a denial, as 403 or 503", a.StatusOnError)
		}
	}
	a.Timeout = cmp.Or(a.Timeout, DefaultTimeout)
	a.MaxInFlight = cmp.Or(a.MaxInFlight, DefaultMaxInFlight)
	return a, nil
}

func (h *HTTP) check() error {
	if h.PathPrefix != "" && (!strings.HasPrefix(h.PathPrefix, "/") || !plain([]byte(h.PathPrefix)) || strings.ContainsAny(h.PathPrefix, "?#")) {
		return fmt.Errorf("pathPrefix %q: must be a path that begins with /", h.PathPrefix)
	}
	for _, l := range []struct {
		key   string
		names []string
	}{
		{"includeRequestHeadersInCheck", h.IncludeRequestHeadersInCheck}, {"headersToUpstreamOnAllow", h.HeadersToUpstreamOnAllow},
		{"headersToDownstreamOnAllow", h.HeadersToDownstreamOnAllow}, {"headersToDownstreamOnDeny", h.HeadersToDownstreamOnDeny},
	} {
		for _, n := range l.names {
			if bare := strings.TrimSuffix(strings.TrimPrefix(n, "*"), "*"); !httpguts.ValidHeaderFieldName(bare) || strings.Contains(bare, "*") {
				return fmt.Errorf("%s: %q is no name of a header, nor one with a star at an end", l.key, n)
			}
		}
	}
	for _, n := range slices.Sorted(maps.Keys(h.IncludeAdditionalHeadersInCheck)) {
		if strings.EqualFold(n, "host") && !sendable(h.IncludeAdditionalHeadersInCheck[n]) {
			return fmt.Errorf("includeAdditionalHeadersInCheck: %q is no host that can be sent: write HOST or HOST:PORT", h.IncludeAdditionalHeadersInCheck[n])
		}
		if !httpguts.ValidHeaderFieldName(n) || !httpguts.ValidHeaderFieldValue(h.IncludeAdditionalHeadersInCheck[n]) {
			return fmt.Errorf("includeAdditionalHeadersInCheck: %q cannot be sent as a header", n)
		}
	}
	return nil
}

// names matches names of headers as a list has them.
type names []string

func newNames(list []string) names {
	out := make(names, len(list))
	for i, n := range list {
		out[i] = strings.ToLower(n)
	}
	return out
}

// match reports whether a name, in lower case, is in the list. As in policies the
// leading star is looked at first.
func (ns names) match(name string) bool {
	for _, n := range ns {
		switch {
		case strings.HasPrefix(n, "*"):
			if strings.HasSuffix(name, n[1:]) {
				return true
			}
		case strings.HasSuffix(n, "*"):
			if strings.HasPrefix(name, n[:len(n)-1]) {
				return true
			}
		case n == name:
			return true
		}
	}
	return false
}
