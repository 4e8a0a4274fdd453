package demo

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"sync"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
)

// observer is another server of the server's pod, without a proxy: a TLS server
// that notes which certificate the client's proxy shows it. Each request is on a
// connection of its own, so that each is a handshake.
type observer struct {
	address string
	server  *http.Server
	done    chan struct{} // closed when it has stopped serving

	mu     sync.Mutex
	serial string // guarded by mu; of the last peer, in hexadecimal
}

// startObserver listens; it fetches its SVID anew for each handshake.
func startObserver(s *stage) (*observer, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("starting the observer: %w", err)
	}
	o := &observer{address: l.Addr().String(), done: make(chan struct{})}
	o.server = &http.Server{Handler: o, ErrorLog: log.New(io.Discard, "", 0)} // a failed handshake is a failed request
	o.server.SetKeepAlivesEnabled(false)
	cfg := &tls.Config{GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		svid, err := s.svidOf(hello.Context(), serverPod)
		if err != nil {
			return nil, err
		}
		bundle, client, err := s.trust(clientPod)
		if err != nil {
			return nil, err
		}
		cfg := tlsconfig.MTLSServerConfig(svid, bundle, tlsconfig.AuthorizeID(client))
		cfg.NextProtos = []string{"http/1.1"}
		cfg.SessionTicketsDisabled = true
		return cfg, nil
	}}
	go func() {
		defer close(o.done)
		_ = o.server.Serve(tls.NewListener(l, cfg)) // its error is that it was closed
	}()
	return o, nil
}

func (o *observer) stop() {
	_ = o.server.Close()
	<-o.done
}

// ServeHTTP notes the peer, whose certificate was verified.
func (o *observer) ServeHTTP(_ http.ResponseWriter, r *http.Request) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.serial = fmt.Sprintf("%x", r.TLS.PeerCertificates[0].SerialNumber)
}

// peerSerial has the client's proxy make a connection and returns the serial that
// it showed.
func (o *observer) peerSerial(ctx context.Context, s *stage) (string, error) {
	a, err := get(ctx, s.at.toObserver, helloPath)
	if err == nil && a.status != 200 {
		err = fmt.Errorf("status %d: %s", a.status, a.body)
	}
	if err != nil {
		return "", fmt.Errorf("asking the observer through the client's proxy: %w", err)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.serial, nil
}

// trust is the roots as the authority publishes them, and the SPIFFE ID that a
// peer must have.
func (s *stage) trust(peer pod) (*x509bundle.Bundle, spiffeid.ID, error) {
	id, err := spiffeid.FromString(peer.id())
	if err != nil {
		return nil, id, err
	}
	bundle, err := x509bundle.Load(id.TrustDomain(), s.rootFile())
	if err != nil {
		return nil, id, fmt.Errorf("reading the published roots: %w", err)
	}
	return bundle, id, nil
}

// dialServer opens a connection to the server's proxy, as the client with its
// newest SVID, or without a certificate. The proxy's certificate is verified, and
// must be the server's.
func (s *stage) dialServer(ctx context.Context, withCertificate bool) (*wire, error) {
	bundle, server, err := s.trust(serverPod)
	if err != nil {
		return nil, err
	}
	cfg := tlsconfig.TLSClientConfig(bundle, tlsconfig.AuthorizeID(server))
	if withCertificate {
		svid, err := s.svidOf(ctx, clientPod)
		if err != nil {
			return nil, err
		}
		cfg = tlsconfig.MTLSClientConfig(svid, bundle, tlsconfig.AuthorizeID(server))
	}
	cfg.NextProtos = []string{"http/1.1"}
	return dialWire(ctx, s.at.server, cfg)
}
