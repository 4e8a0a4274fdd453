package demo

import (
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
)

// service is the application behind the server's proxy. It remembers what it
// was told about the peer of the last request for each path.
type service struct {
	address string
	server  *http.Server
	done    chan struct{} // closed when it has stopped serving

	mu   sync.Mutex
	last map[string]seen // guarded by mu
}

// seen is one request as the service saw it.
type seen struct {
	count int
	// xfcc is X-Forwarded-Client-Cert, which the server's proxy sets from the
	// certificate that it verified; what a client wrote there is dropped.
	xfcc string
}

// startService serves on l.
func startService(l net.Listener) *service {
	s := &service{address: l.Addr().String(), done: make(chan struct{}), last: map[string]seen{}}
	// No timeouts: a connection that the service closed while its proxy sends a
	// request on it would look like a failure of the product.
	s.server = &http.Server{Handler: s}
	go func() {
		defer close(s.done)
		_ = s.server.Serve(l) // its error is that it was closed
	}()
	return s
}

func (s *service) stop() {
	_ = s.server.Close()
	<-s.done
}

// ServeHTTP tells the caller who it is to the server.
func (s *service) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	xfcc := r.Header.Get("X-Forwarded-Client-Cert")
	s.mu.Lock()
	s.last[r.URL.Path] = seen{s.last[r.URL.Path].count + 1, xfcc}
	s.mu.Unlock()
	peer := xfccValue(xfcc, "URI")
	if peer == "" {
		peer = "nobody that could prove it (plaintext)"
	}
	fmt.Fprintf(w, "%s: hello to %s\n", r.URL.Path, peer)
}

// about is what the service saw on a path.
func (s *service) about(path string) seen {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last[path]
}

// xfccValue is the value of a key of an X-Forwarded-Client-Cert header of one
// element; a second one is not looked at: the proxy writes one. Values of SPIFFE
// IDs and hashes hold none of the characters that would be quoted.
func xfccValue(header, key string) string {
	element, _, _ := strings.Cut(header, ",")
	for part := range strings.SplitSeq(element, ";") {
		if k, v, ok := strings.Cut(part, "="); ok && strings.EqualFold(k, key) {
			return strings.Trim(v, `"`)
		}
	}
	return ""
}
