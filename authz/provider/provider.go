package provider

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/signet-mesh/signet/authz/extauthz"
)

// Config is what [New] needs.
type Config struct {
	// Providers are those that can be asked.
	Providers []Spec
	// Metrics is where metrics are registered; nil registers none.
	Metrics prometheus.Registerer
}

// Providers asks providers. It is safe for concurrent use.
type Providers struct {
	byName  map[string]*provider
	metrics *metrics
}

// provider is one that can be asked.
type provider struct {
	name string
	Address
	// slots is how many requests may be at it; each holds one element.
	slots chan struct{}
	asker
}

// asker speaks to a provider. An error is whatever is not an answer.
type asker interface {
	ask(ctx context.Context, message []byte) (extauthz.ProviderAnswer, error)
	close() error
}

// New makes Providers. It connects to nobody: a provider that is away denies what it
// would be asked about, and keeps nobody from starting.
func New(cfg Config) (*Providers, error) {
	p := &Providers{byName: make(map[string]*provider, len(cfg.Providers))}
	for _, s := range cfg.Providers {
		if err := p.add(s); err != nil {
			p.Close()
			return nil, fmt.Errorf("extension provider %q: %w", s.Name, err)
		}
	}
	var err error
	if p.metrics, err = newMetrics(cfg.Metrics); err != nil {
		p.Close()
		return nil, fmt.Errorf("registering metrics of extension providers: %w", err)
	}
	return p, nil
}

func (p *Providers) add(s Spec) error {
	switch {
	case s.Name == "":
		return errors.New("name is missing: policies name it in provider.name")
	case p.byName[s.Name] != nil:
		return errors.New("it is there twice")
	case (s.GRPC == nil) == (s.HTTP == nil):
		return errors.New("exactly one of envoyExtAuthzGrpc and envoyExtAuthzHttp is needed")
	}
	out := &provider{name: s.Name}
	var err error
	if s.GRPC != nil {
		if out.Address, err = s.GRPC.Address.check(); err == nil {
			out.asker, err = newGRPC(out.Address)
		}
	} else {
		if out.Address, err = s.HTTP.Address.check(); err == nil {
			if err = s.HTTP.check(); err == nil {
				out.asker, err = newHTTP(out.Address, s.HTTP)
			}
		}
	}
	if err != nil {
		return err
	}
	out.slots = make(chan struct{}, out.MaxInFlight)
	p.byName[s.Name] = out
	return nil
}

// Has reports whether there is a provider of that name.
func (p *Providers) Has(name string) bool { return p.byName[name] != nil }

// Close ends the connections to the providers. What is asked now fails.
func (p *Providers) Close() error {
	var errs []error
	for _, pr := range p.byName {
		errs = append(errs, pr.close())
	}
	return errors.Join(errs...)
}

// Failures that are told apart.
var (
	errBusy    = errors.New("as many requests as it may have are at it already (maxInFlight)")
	errTimeout = errors.New("it did not answer in time")
)

// Ask asks the provider about a CheckRequest, in bytes as the proxy sent it; they
// are neither changed nor kept. An error wraps [extauthz.ErrUnknownProvider] where
// there is no provider of that name; beside any error stands the answer for the
// client, as statusOnError says.
func (p *Providers) Ask(ctx context.Context, name string, message []byte) (extauthz.ProviderAnswer, error) {
	pr := p.byName[name]
	if pr == nil {
		p.metrics.unknown.Inc()
		return extauthz.ProviderAnswer{}, extauthz.ErrUnknownProvider
	}
	start := time.Now()
	a, err := pr.take(ctx, message)
	p.metrics.asked(name, a, err, time.Since(start))
	if err != nil {
		return pr.failure(), err
	}
	return a, nil
}

func (p *provider) take(ctx context.Context, message []byte) (extauthz.ProviderAnswer, error) {
	select {
	case p.slots <- struct{}{}:
		defer func() { <-p.slots }()
	default:
		return extauthz.ProviderAnswer{}, errBusy
	}
	start := time.Now()
	ctx, cancel := context.WithTimeoutCause(ctx, p.Timeout, errTimeout)
	defer cancel()
	a, err := p.ask(ctx, message)
	switch {
	case err != nil && (context.Cause(ctx) == errTimeout || time.Since(start) >= p.Timeout):
		// The provider may have noticed before ctx did.
		return extauthz.ProviderAnswer{}, fmt.Errorf("%w (%v)", errTimeout, p.Timeout)
	case err != nil:
		return extauthz.ProviderAnswer{}, err
	}
	return a, nil
}

// failure is the answer to a client whose request the provider gave no answer about.
func (p *provider) failure() extauthz.ProviderAnswer {
	n, err := strconv.Atoi(p.StatusOnError)
	if err != nil {
		return extauthz.ProviderAnswer{}
	}
	return extauthz.ProviderAnswer{Response: &authv3.CheckResponse{HttpResponse: &authv3.CheckResponse_DeniedResponse{
		DeniedResponse: &authv3.DeniedHttpResponse{Status: &typev3.HttpStatus{Code: typev3.StatusCode(n)}}}}}
}

// denialStatus is the status of a denial: what a proxy can send, else 403.
func denialStatus(code int) *typev3.HttpStatus {
	if _, ok := typev3.StatusCode_name[int32(code)]; !ok || code < 200 {
		code = int(typev3.StatusCode_Forbidden)
	}
	return &typev3.HttpStatus{Code: typev3.StatusCode(code)}
}

// host is HOST:PORT.
func (a Address) host() string {
	if strings.Contains(a.Service, ":") && !strings.HasPrefix(a.Service, "[") {
		return "[" + a.Service + "]:" + strconv.Itoa(a.Port)
	}
	return a.Service + ":" + strconv.Itoa(a.Port)
}

// tlsConfig is nil where the provider is spoken to in plaintext.
func (a Address) tlsConfig() (*tls.Config, error) {
	if a.TLS == nil {
		return nil, nil
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: a.TLS.ServerName}
	if c.ServerName == "" {
		c.ServerName = strings.Trim(a.Service, "[]")
	}
	if f := a.TLS.CAFile; f != "" {
		pem, err := os.ReadFile(f)
		if err != nil {
			return nil, fmt.Errorf("tls.caFile: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("tls.caFile: %s holds no certificate in PEM", f)
		}
	}
	if certFile, keyFile := a.TLS.CertFile, a.TLS.KeyFile; certFile != "" {
		load := func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			cert, err := tls.LoadX509KeyPair(certFile, keyFile)
			return &cert, err
		}
		if _, err := load(nil); err != nil {
			return nil, fmt.Errorf("tls.certFile: %w", err)
		}
		c.GetClientCertificate = load
	}
	return c, nil
}

// readRequest reads what a CheckRequest says of the HTTP request, or nil. The rest is
// not read: metadata takes many times its size.
func readRequest(message []byte) (*authv3.AttributeContext_HttpRequest, error) {
	// Parts of a message that is there several times are one, one after the other.
	parts := [][]byte{message}
	for _, number := range []protowire.Number{1, 4, 2} { // attributes, request, http
		var within [][]byte
		for _, b := range parts {
			for len(b) > 0 {
				num, kind, n := protowire.ConsumeField(b)
				if n < 0 {
					return nil, errNone
				}
				if num == number && kind == protowire.BytesType {
					_, _, tag := protowire.ConsumeTag(b)
					data, _ := protowire.ConsumeBytes(b[tag:n])
					within = append(within, data)
				}
				b = b[n:]
			}
		}
		if parts = within; len(parts) == 0 {
			return nil, nil
		}
	}
	r := &authv3.AttributeContext_HttpRequest{}
	if err := proto.Unmarshal(bytes.Join(parts, nil), r); err != nil {
		return nil, errNone
	}
	return r, nil
}

var errNone = errors.New("the check is none")
