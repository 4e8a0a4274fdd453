package limit

import (
	"errors"
	"net"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/credentials"
)

// GuardConfig bounds connections. Zero values mean the defaults.
type GuardConfig struct {
	// Connections are open at once at most; 0 means 32768.
	Connections int
	// Handshakes are under way at once at most, and PerAddress those of one address; 0
	// means 128 and 64. More would only make each take longer.
	Handshakes, PerAddress int
	// Timeout is how long a handshake may take, with its waiting for a place; 0 means 5
	// seconds.
	Timeout time.Duration
	// Name tells doors apart in metrics.
	Name string
	// Metrics may be nil.
	Metrics prometheus.Registerer
}

// ErrNoPlace is why a connection is closed before anything is read of it.
var ErrNoPlace = errors.New("too many connections or handshakes at once")

// Guard bounds what the connections of a server can hold before its TLS knows who they
// are. It wraps the server's credentials, of which it is one more step.
func Guard(c credentials.TransportCredentials, cfg GuardConfig) credentials.TransportCredentials {
	def := func(n *int, v int) {
		if *n <= 0 {
			*n = v
		}
	}
	def(&cfg.Connections, 32768)
	def(&cfg.Handshakes, 128)
	def(&cfg.PerAddress, 64)
	if cfg.Timeout <= 0 {
		cfg.Timeout = 5 * time.Second
	}
	d := &connections{cfg: cfg, places: make(chan struct{}, cfg.Handshakes), byAddress: map[string]int{},
		refused: prometheus.NewCounter(prometheus.CounterOpts{Name: "signet_ca_connections_refused_total",
			Help: "Connections that were closed because there are too many, or too many half-open ones.", ConstLabels: prometheus.Labels{"door": cfg.Name}})}
	if cfg.Metrics != nil {
		cfg.Metrics.MustRegister(d.refused, prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "signet_ca_connections",
			Help: "Connections that are open.", ConstLabels: prometheus.Labels{"door": cfg.Name}},
			func() float64 { d.mu.Lock(); defer d.mu.Unlock(); return float64(d.open) }))
	}
	return guarded{c, d}
}

// connections is the places of a server's connections.
type connections struct {
	cfg     GuardConfig
	places  chan struct{} // of handshakes
	refused prometheus.Counter

	mu        sync.Mutex
	open      int            // guarded by mu
	byAddress map[string]int // handshakes; guarded by mu
}

// enter takes a place for a connection of an address, which its handshake has too.
func (d *connections) enter(address string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.open >= d.cfg.Connections || d.byAddress[address] >= d.cfg.PerAddress {
		return false
	}
	d.open++
	d.byAddress[address]++
	return true
}

// shaken gives the handshake's place back.
func (d *connections) shaken(address string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.byAddress[address]--; d.byAddress[address] <= 0 {
		delete(d.byAddress, address)
	}
}

func (d *connections) leave() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.open--
}

type guarded struct {
	credentials.TransportCredentials
	connections *connections
}

// ServerHandshake implements credentials.TransportCredentials.
func (g guarded) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	d, deadline := g.connections, time.Now().Add(g.connections.cfg.Timeout)
	address := addressOf(c)
	if !d.enter(address) {
		d.refused.Inc()
		_ = c.Close()
		return nil, nil, ErrNoPlace
	}
	left := sync.OnceFunc(d.leave)
	timeout := time.NewTimer(d.cfg.Timeout)
	defer timeout.Stop()
	select {
	case d.places <- struct{}{}:
	case <-timeout.C:
		d.shaken(address)
		left()
		d.refused.Inc()
		_ = c.Close()
		return nil, nil, ErrNoPlace
	}
	// gRPC has set a deadline, which is later, and takes it away afterwards.
	_ = c.SetDeadline(deadline)
	secured, info, err := g.TransportCredentials.ServerHandshake(c)
	<-d.places
	d.shaken(address)
	if err != nil {
		left()
		return nil, nil, err
	}
	return &counted{secured, left}, info, nil
}

// Clone implements credentials.TransportCredentials.
func (g guarded) Clone() credentials.TransportCredentials {
	return guarded{g.TransportCredentials.Clone(), g.connections}
}

// addressOf is whose handshakes are counted together.
func addressOf(c net.Conn) string {
	a := c.RemoteAddr()
	if a == nil {
		return ""
	}
	host, _, err := net.SplitHostPort(a.String())
	if err != nil {
		return a.String()
	}
	return host
}

// counted gives its place back when it is closed.
type counted struct {
	net.Conn
	left func()
}

// Close closes the connection.
func (c *counted) Close() error {
	c.left()
	return c.Conn.Close()
}
