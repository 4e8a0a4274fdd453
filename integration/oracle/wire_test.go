package oracle_test

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// connection says how a client comes in.
type connection struct {
	peer   string // name of the client's certificate; empty: plaintext
	source string // IP address that it comes from
	dst    netip.AddrPort
	sni    string
	h2     bool
}

// shot is one request, in bytes that no library has touched.
type shot struct {
	connection
	method, path, authority string
	headers                 [][2]string
}

// outcome is what the proxy did.
type outcome struct {
	// closed: the connection was ended without an answer.
	closed  bool
	status  int
	details string
	path    string // :path as the filters saw it
}

const wirePatience = time.Minute

// connectionKey names a connection by the port in its PROXY header.
func connectionKey(port uint32) string { return fmt.Sprintf("port %d", port) }

// dial opens a connection to a workload. port is the client's as the PROXY header
// tells it.
func (p *pki) dial(tb testing.TB, address string, c connection, port int) (net.Conn, error) {
	tb.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(c.source)}, Timeout: wirePatience}
	conn, err := d.DialContext(tb.Context(), "tcp", address)
	if err != nil {
		return nil, err
	}
	_ = conn.SetDeadline(time.Now().Add(wirePatience))
	family := "TCP4"
	if c.dst.Addr().Is6() {
		family = "TCP6"
	}
	if _, err := fmt.Fprintf(conn, "PROXY %s %s %s %d %d\r\n", family, c.source, c.dst.Addr(), port, c.dst.Port()); err != nil {
		_ = conn.Close()
		return nil, err
	}
	if c.peer == "" {
		return conn, nil
	}
	cert, ok := p.clients[c.peer]
	if !ok {
		tb.Fatalf("no client %q", c.peer)
	}
	alpn := "http/1.1"
	if c.h2 {
		alpn = "h2"
	}
	t := tls.Client(conn, &tls.Config{
		Certificates: []tls.Certificate{cert}, ServerName: c.sni, NextProtos: []string{alpn},
		// The proxy is the thing under test; its name is beside the point.
		InsecureSkipVerify: true,
	})
	if err := t.HandshakeContext(tb.Context()); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return t, nil
}

// client keeps one connection to a workload and opens it again when it ended.
type client struct {
	pki     *pki
	address string
	connection
	port int
	conn net.Conn
	r    *bufio.Reader
	h2   *h2client
}

func (c *client) close() {
	if c.conn != nil {
		_ = c.conn.Close()
		c.conn = nil
	}
}

// do sends a shot and waits for the answer.
func (c *client) do(tb testing.TB, s shot) outcome {
	tb.Helper()
	if c.conn == nil {
		conn, err := c.pki.dial(tb, c.address, c.connection, c.port)
		if err != nil {
			return outcome{closed: true, details: err.Error()}
		}
		c.conn, c.r, c.h2 = conn, bufio.NewReader(conn), nil
	}
	_ = c.conn.SetDeadline(time.Now().Add(wirePatience))
	var o outcome
	var keep bool
	var err error
	if c.connection.h2 {
		o, keep, err = c.doH2(s)
	} else {
		o, keep, err = c.doH1(s)
	}
	if err != nil {
		c.close()
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() {
			tb.Fatalf("no answer to %+v: %v", s, err)
		}
		return outcome{closed: true, details: err.Error()}
	}
	if !keep {
		c.close()
	}
	return o
}

func (c *client) doH1(s shot) (o outcome, keep bool, err error) {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: %s\r\n", s.method, s.path, s.authority)
	for _, h := range s.headers {
		fmt.Fprintf(&b, "%s: %s\r\n", h[0], h[1])
	}
	b.WriteString("\r\n")
	if _, err := c.conn.Write(b.Bytes()); err != nil {
		return o, false, err
	}
	// net/http reads an answer as belonging to a method; only HEAD and CONNECT matter.
	req := &http.Request{Method: s.method}
	resp, err := http.ReadResponse(c.r, req)
	if err != nil {
		return o, false, err
	}
	if s.method != "CONNECT" {
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			return o, false, err
		}
	}
	_ = resp.Body.Close()
	o = outcome{
		status: resp.StatusCode, details: resp.Header.Get("x-details"), path: resp.Header.Get("x-path"),
	}
	return o, !resp.Close && s.method != "CONNECT", nil
}

type h2client struct {
	framer *http2.Framer
	enc    *hpack.Encoder
	buf    bytes.Buffer
	stream uint32
}

func (c *client) doH2(s shot) (o outcome, keep bool, err error) {
	if c.h2 == nil {
		if _, err := io.WriteString(c.conn, http2.ClientPreface); err != nil {
			return o, false, err
		}
		c.h2 = &h2client{framer: http2.NewFramer(c.conn, c.r), stream: 1}
		c.h2.enc = hpack.NewEncoder(&c.h2.buf)
		c.h2.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
		c.h2.framer.AllowIllegalWrites = true
		if err := c.h2.framer.WriteSettings(); err != nil {
			return o, false, err
		}
	}
	h := c.h2
	h.buf.Reset()
	field := func(name, value string) { _ = h.enc.WriteField(hpack.HeaderField{Name: name, Value: value}) }
	field(":method", s.method)
	if s.method != "CONNECT" {
		field(":scheme", "http")
		field(":path", s.path)
	}
	field(":authority", s.authority)
	for _, hd := range s.headers {
		field(strings.ToLower(hd[0]), hd[1])
	}
	id := h.stream
	h.stream += 2
	if err := h.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: h.buf.Bytes(), EndHeaders: true, EndStream: s.method != "CONNECT"}); err != nil {
		return o, false, err
	}
	for {
		f, err := h.framer.ReadFrame()
		if err != nil {
			return o, false, err
		}
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				if err := h.framer.WriteSettingsAck(); err != nil {
					return o, false, err
				}
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				if err := h.framer.WritePing(true, f.Data); err != nil {
					return o, false, err
				}
			}
		case *http2.MetaHeadersFrame:
			if f.StreamID != id {
				continue
			}
			for _, hf := range f.Fields {
				switch hf.Name {
				case ":status":
					_, _ = fmt.Sscan(hf.Value, &o.status)
				case "x-details":
					o.details = hf.Value
				case "x-path":
					o.path = hf.Value
				}
			}
			if f.StreamEnded() || s.method == "CONNECT" {
				return o, s.method != "CONNECT", nil
			}
		case *http2.DataFrame:
			if f.StreamID == id && f.StreamEnded() {
				return o, true, nil
			}
		case *http2.RSTStreamFrame:
			if f.StreamID == id {
				if o.status != 0 {
					return o, true, nil
				}
				return outcome{closed: true, details: "reset: " + f.ErrCode.String()}, true, nil
			}
		case *http2.GoAwayFrame:
			return o, false, fmt.Errorf("the proxy goes away: %s", f.ErrCode)
		}
	}
}
