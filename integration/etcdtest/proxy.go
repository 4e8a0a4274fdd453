package etcdtest

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
)

// peerProxy stands before a member and lets its peers through, but for those that are
// cut off.
type peerProxy struct {
	listener net.Listener
	target   string

	mu    sync.Mutex
	gone  map[string]bool     // guarded by mu
	conns map[net.Conn]string // by the ID of who is there; guarded by mu
}

func newPeerProxy(target string) (*peerProxy, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &peerProxy{listener: l, target: target, gone: map[string]bool{}, conns: map[net.Conn]string{}}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go p.serve(c)
		}
	}()
	return p, nil
}

func (p *peerProxy) Close() {
	p.listener.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		c.Close()
	}
}

func (p *peerProxy) cut(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gone[id] = true
	for c, from := range p.conns {
		if from == id || from == "" {
			c.Close()
		}
	}
}

func (p *peerProxy) mend() {
	p.mu.Lock()
	defer p.mu.Unlock()
	clear(p.gone)
}

func (p *peerProxy) serve(c net.Conn) {
	defer c.Close()
	// Each request of a connection is from the same member. The first says from which, or
	// it only asks whether somebody is there: then nobody knows, and while a member is cut
	// off that is not good enough.
	var seen strings.Builder
	from := ""
	if r, err := http.ReadRequest(bufio.NewReader(io.TeeReader(c, &seen))); err == nil {
		from = r.Header.Get("X-Server-From")
	}
	p.mu.Lock()
	if p.gone[from] || from == "" && len(p.gone) > 0 {
		p.mu.Unlock()
		return
	}
	p.conns[c] = from
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.conns, c)
		p.mu.Unlock()
	}()
	up, err := net.Dial("tcp", p.target)
	if err != nil {
		return
	}
	defer up.Close()
	if _, err := io.WriteString(up, seen.String()); err != nil {
		return
	}
	join(c, up)
}

// join copies both ways until one side ends.
func join(a, b net.Conn) {
	done := make(chan struct{}, 2)
	for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
		go func() {
			_, _ = io.Copy(way[0], way[1]) // how it ended does not matter
			done <- struct{}{}
		}()
	}
	<-done
	a.Close()
	b.Close()
	<-done
}

// Link is a way of one client to one member. What goes over it can be held back.
type Link struct {
	// Endpoint is where the client connects.
	Endpoint string

	target   string
	listener net.Listener
	mu       sync.Mutex
	cond     sync.Cond
	requests bool // are held back; guarded by mu
	answers  bool // are lost; guarded by mu
	closed   bool // guarded by mu
}

// NewLink makes a way to a member, until the test ends.
func (c *Cluster) NewLink(tb testing.TB, m *Member) *Link {
	tb.Helper()
	u, err := url.Parse(m.Endpoint)
	if err != nil {
		tb.Fatal(err)
	}
	l := &Link{target: u.Host}
	l.cond.L = &l.mu
	if l.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		tb.Fatal(err)
	}
	l.Endpoint = u.Scheme + "://" + l.listener.Addr().String()
	go func() {
		for {
			c, err := l.listener.Accept()
			if err != nil {
				return
			}
			go l.serve(c)
		}
	}()
	tb.Cleanup(func() {
		l.listener.Close()
		l.mu.Lock()
		defer l.mu.Unlock()
		l.closed = true
		l.cond.Broadcast()
	})
	return l
}

// HoldRequests keeps what the client sends until Heal, when it is delivered even if the
// client has given up.
func (l *Link) HoldRequests() { l.set(true, false) }

// LoseAnswers delivers what the client sends and drops what comes back.
func (l *Link) LoseAnswers() { l.set(false, true) }

// Heal lets everything through again. Connections that lost something end.
func (l *Link) Heal() { l.set(false, false) }

func (l *Link) set(requests, answers bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.requests, l.answers = requests, answers
	l.cond.Broadcast()
}

func (l *Link) serve(c net.Conn) {
	up, err := net.Dial("tcp", l.target)
	if err != nil {
		c.Close()
		return
	}
	go func() {
		// The member sees the end of the client after all that the client sent.
		defer up.Close()
		b := make([]byte, 64<<10)
		for {
			n, err := c.Read(b)
			l.mu.Lock()
			for l.requests && !l.closed {
				l.cond.Wait()
			}
			l.mu.Unlock()
			if n > 0 {
				if _, err := up.Write(b[:n]); err != nil {
					return
				}
			}
			if err != nil {
				return
			}
		}
	}()
	defer c.Close()
	b, lost := make([]byte, 64<<10), false
	for {
		n, err := up.Read(b)
		l.mu.Lock()
		drop := l.answers
		l.mu.Unlock()
		if err != nil || lost && !drop {
			return
		}
		if lost = lost || drop; lost {
			continue
		}
		if _, err := c.Write(b[:n]); err != nil {
			// The client has gone; what it sent still arrives.
			lost = true
		}
	}
}
