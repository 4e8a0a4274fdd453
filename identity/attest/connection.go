package attest

import (
	"container/list"
	"context"
	"math"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/peer"
)

// Defaults of a [ConnectionsConfig].
const (
	defaultConnections = 8192
	defaultPerPod      = 512
	defaultUnproven    = 1024
	defaultProve       = 10 * time.Second
)

// ConnectionsConfig bounds the connections of a socket that everybody on a node can
// reach. Zero values mean the defaults.
type ConnectionsConfig struct {
	// Total are open at once at most; 0 means 8192, and not more than half of the files
	// that this process may have open.
	Total int
	// PerPod is how many one pod may have that has proved itself; 0 means 512.
	PerPod int
	// Unproven is how many may be open on which nobody has proved anything yet; 0 means
	// 1024.
	Unproven int
	// Prove is how long a connection has until its first RPC with a good proof; 0 means
	// 10 seconds.
	Prove time.Duration
	// Metrics, if not nil, gets signet_attest_connections and
	// signet_attest_connections_closed_total.
	Metrics prometheus.Registerer
	// peer tells processes apart; nil means peerOf.
	peer func(net.Conn) string
}

// Credentials are for a server behind a [Gate] on a socket without TLS (grpc.Creds).
//
// They give each connection a place to remember the token that came on it last, so
// that a proxy's next RPC costs no hash of its token. The connection proves nothing
// by that: each RPC brings its token, and what it proved is held against the clock,
// the issuer's keys and the view of the pods each time.
//
// And they bound connections, since one costs its client next to nothing and the server
// some tens of kilobytes and a file. A new one is never refused: another is closed, the oldest
// of whoever has most. Those on which nobody has proved anything are the first to be
// closed, and have some seconds in any case; with as many as there may be the process with
// most of them loses one. So does a pod that has more than it may.
func Credentials(cfg ConnectionsConfig) (credentials.TransportCredentials, error) {
	def := func(n *int, v int) {
		if *n <= 0 {
			*n = v
		}
	}
	def(&cfg.Total, min(defaultConnections, max(files()/2, 16)))
	def(&cfg.PerPod, defaultPerPod)
	def(&cfg.Unproven, defaultUnproven)
	cfg.Unproven = min(cfg.Unproven, max(cfg.Total/2, 1))
	if cfg.Prove <= 0 {
		cfg.Prove = defaultProve
	}
	if cfg.peer == nil {
		cfg.peer = peerOf
	}
	c := &connections{cfg: cfg, unproven: crowd{of: map[string]*list.List{}}, proven: crowd{of: map[string]*list.List{}}}
	if err := c.register(cfg.Metrics); err != nil {
		return nil, err
	}
	return plain{insecure.NewCredentials(), c}, nil
}

// files is how many this process may have open.
func files() int {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return 1024
	}
	return int(min(l.Cur, math.MaxInt32))
}

type plain struct {
	credentials.TransportCredentials
	connections *connections
}

// ServerHandshake implements credentials.TransportCredentials.
func (p plain) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	on := &connection{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.NoSecurity}, all: p.connections, raw: c, who: p.connections.cfg.peer(c)}
	p.connections.enter(on)
	return placed{c, on}, on, nil
}

func (p plain) Clone() credentials.TransportCredentials {
	return plain{p.TransportCredentials.Clone(), p.connections}
}

// placed gives its place back when it is closed.
type placed struct {
	net.Conn
	on *connection
}

// Close closes the connection.
func (c placed) Close() error {
	c.on.all.leave(c.on)
	return c.Conn.Close()
}

// connection is one connection; its context's peer has it.
type connection struct {
	credentials.CommonAuthInfo
	last atomic.Pointer[presented]

	all    *connections
	raw    net.Conn
	timer  *time.Timer // closes it if nothing is proved
	proved atomic.Bool

	who string        // a process, or the pod that proved itself first; guarded by all.mu
	in  *crowd        // where it is counted, nil when it has left; guarded by all.mu
	at  *list.Element // in in.of[who]; guarded by all.mu
}

// AuthType implements credentials.AuthInfo.
func (*connection) AuthType() string { return "insecure" }

// accepted remembers the token that came last, and that somebody has proved to be a pod.
func (c *connection) accepted(token string, p *proof) {
	c.last.Store(&presented{token, p})
	if c.proved.CompareAndSwap(false, true) {
		c.all.prove(c, p.podUID)
	}
}

// presented is a token that was accepted, and what it proved. It is immutable.
type presented struct {
	token string
	proof *proof
}

// connectionOf is where ctx's RPC came in, or nil.
func connectionOf(ctx context.Context) *connection {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	c, _ := p.AuthInfo.(*connection)
	return c
}

// crowd is connections by who has them, oldest first.
type crowd struct {
	of map[string]*list.List
	n  int
}

func (w *crowd) add(c *connection) {
	l := w.of[c.who]
	if l == nil {
		l = list.New()
		w.of[c.who] = l
	}
	c.in, c.at = w, l.PushBack(c)
	w.n++
}

func (w *crowd) remove(c *connection) {
	l := w.of[c.who]
	l.Remove(c.at)
	if l.Len() == 0 {
		delete(w.of, c.who)
	}
	c.in, c.at = nil, nil
	w.n--
}

// oldest is the oldest connection of whoever has most.
func (w *crowd) oldest() *connection {
	var most *list.List
	for _, l := range w.of {
		if most == nil || l.Len() > most.Len() {
			most = l
		}
	}
	return most.Front().Value.(*connection)
}

// connections are those of a socket.
type connections struct {
	cfg              ConnectionsConfig
	tooMany, tooLong prometheus.Counter
	mu               sync.Mutex
	unproven, proven crowd // guarded by mu
}

func (a *connections) register(r prometheus.Registerer) error {
	closed := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "signet_attest_connections_closed_total",
		Help: "Connections that were closed because there are too many (too_many), or because nothing was proved in time (unproven).",
	}, []string{"reason"})
	a.tooMany, a.tooLong = closed.WithLabelValues("too_many"), closed.WithLabelValues("unproven")
	open := func(proven string, w *crowd) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name:        "signet_attest_connections",
			Help:        "Connections that are open, by whether a pod has proved itself on them.",
			ConstLabels: prometheus.Labels{"proven": proven},
		}, func() float64 { a.mu.Lock(); defer a.mu.Unlock(); return float64(w.n) })
	}
	return register(r, closed, open("true", &a.proven), open("false", &a.unproven))
}

// enter counts a new connection, for which another may have to go.
func (a *connections) enter(c *connection) {
	a.mu.Lock()
	var gone *connection
	switch {
	case a.unproven.n >= a.cfg.Unproven, a.unproven.n > 0 && a.unproven.n+a.proven.n >= a.cfg.Total:
		gone = a.unproven.oldest()
	case a.unproven.n+a.proven.n >= a.cfg.Total:
		gone = a.proven.oldest()
	}
	if gone != nil {
		gone.in.remove(gone)
	}
	a.unproven.add(c)
	c.timer = time.AfterFunc(a.cfg.Prove, func() { a.expire(c) })
	a.mu.Unlock()
	a.drop(gone, a.tooMany)
}

// prove counts a connection as a pod's.
func (a *connections) prove(c *connection, pod string) {
	a.mu.Lock()
	if c.in == nil {
		a.mu.Unlock()
		return
	}
	c.timer.Stop()
	c.in.remove(c)
	c.who = pod
	a.proven.add(c)
	var gone *connection
	if l := a.proven.of[pod]; l.Len() > a.cfg.PerPod {
		gone = l.Front().Value.(*connection)
		gone.in.remove(gone)
	}
	a.mu.Unlock()
	a.drop(gone, a.tooMany)
}

// expire closes a connection on which nothing was proved in time.
func (a *connections) expire(c *connection) {
	a.mu.Lock()
	late := c.in == &a.unproven
	if late {
		a.unproven.remove(c)
	}
	a.mu.Unlock()
	if late {
		a.drop(c, a.tooLong)
	}
}

// leave takes note that a connection has been closed.
func (a *connections) leave(c *connection) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c.timer.Stop()
	if c.in != nil {
		c.in.remove(c)
	}
}

// drop closes a connection, which may be nil, that has no place any more.
func (a *connections) drop(c *connection, reason prometheus.Counter) {
	if c == nil {
		return
	}
	c.timer.Stop()
	reason.Inc()
	_ = c.raw.Close() // whoever serves it finds out
}
