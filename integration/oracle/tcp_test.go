package oracle_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// connected is a line of the access log of connections.
type connected struct {
	Peer    string `json:"peer"`
	Details string `json:"details"`
	logged
}

// connections reads the access log of connections by the client's port, once it
// has n of them.
func (s *sidecars) connections(tb testing.TB, n int) map[string]connected {
	tb.Helper()
	deadline := time.Now().Add(wirePatience)
	for {
		b, err := os.ReadFile(filepath.Join(s.dir, "tcp.log"))
		if err != nil && !os.IsNotExist(err) {
			tb.Fatal(err)
		}
		lines := map[string]connected{}
		for line := range strings.Lines(string(b)) {
			if !strings.HasSuffix(line, "\n") {
				continue
			}
			var c connected
			if err := json.Unmarshal([]byte(line), &c); err != nil {
				tb.Fatalf("a line of the access log: %v: %s", err, line)
			}
			lines["port "+c.Peer[strings.LastIndexByte(c.Peer, ':')+1:]] = c
		}
		if len(lines) >= n {
			return lines
		}
		if time.Now().After(deadline) {
			tb.Fatalf("the access log has %d of %d connections", len(lines), n)
		}
		time.Sleep(20 * time.Millisecond) // polling a file that another process writes
	}
}

// echo says something and reports whether it comes back.
func (c *client) echo(tb testing.TB) bool {
	tb.Helper()
	defer c.close()
	conn, err := c.pki.dial(tb, c.address, c.connection, c.port)
	if err != nil {
		return false
	}
	c.conn = conn
	if _, err := io.WriteString(conn, "hello\n"); err != nil {
		return false
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	return err == nil && line == "hello\n"
}

// TestDecideAgreesWithIstioAndEnvoyOnConnections is the harness for workloads that
// do not speak HTTP: the same random worlds through Istio's compiler for TCP.
func TestDecideAgreesWithIstioAndEnvoyOnConnections(t *testing.T) {
	t.Parallel()
	pilot := startIstio(t)
	g := generator{rand.New(rand.NewPCG(seed(t), 2))}
	pki := newPKI(t, clientNames)
	rec, socket := startRecorder(t)
	const worlds, connections = 60, 9
	var workloads []workload
	var all []world
	for i := range worlds {
		w := g.world(pki.keySet(t))
		all = append(all, w)
		workloads = append(workloads, workload{name: fmt.Sprintf("w%d", i), filters: pilot.build(t, w.mesh), v6: w.v6, tcp: true})
	}
	proxy := startSidecars(t, workloads, pki, socket, []string{"ask", "other"})
	var pairs []pair
	for i, w := range all {
		program := w.program(t)
		for range connections {
			c := g.connection(w.v6)
			c.h2 = false
			if c.peer != "" && w.mode(workloads[i].filters, c.dst.Port()) == "DISABLE" {
				c.peer, c.sni = "", ""
			}
			port := 10000 + len(pairs)
			cl := &client{pki: pki, address: proxy.addresses[workloads[i].name], connection: c, port: port}
			p := pair{id: connectionKey(uint32(port)), world: w, program: program, shot: shot{connection: c}}
			p.outcome.closed = !cl.echo(t)
			pairs = append(pairs, p)
		}
	}
	logs := proxy.connections(t, len(pairs))
	count := newTally()
	for _, p := range pairs {
		l, ok := logs[p.id]
		before, _, _ := rec.of(p.id)
		p.outcome.details = l.Details
		switch {
		case !ok:
			t.Errorf("pair %s: the access log does not have it", p.id)
			continue
		case !p.outcome.closed && l.Details == "":
			p.outcome.details = "direct_response" // it got an answer
		case p.outcome.closed && before == nil && p.shot.peer != "":
			t.Errorf("pair %s: a TLS connection ended before any filter: %+v", p.id, l)
			continue
		case before != nil:
			p.outcome.closed = false
		}
		count.compare(t, p, l.logged, rec)
	}
	count.report(t)
	if count.compared < 500 {
		t.Errorf("%d connections compared, want 500", count.compared)
	}
}
