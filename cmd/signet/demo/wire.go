package demo

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"
)

const (
	// answerWithin is how long an answer may take. The proxies wait 3 s for an
	// agent that is away.
	answerWithin = 10 * time.Second
	maxBody      = 64 << 10
)

// wire is one HTTP/1.1 connection. net/http's client would hide what is looked
// for here: it opens connections as it likes and silently sends a request again
// whose connection broke.
type wire struct {
	conn net.Conn
	in   *bufio.Reader
	host string
}

// answer is what came back.
type answer struct {
	status int
	body   string
}

// dialWire connects, with TLS if a configuration is given. With TLS 1.3 a server
// that refuses the client's certificate says so only at the first read.
func dialWire(ctx context.Context, address string, cfg *tls.Config) (*wire, error) {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	var conn net.Conn
	var err error
	if cfg == nil {
		conn, err = (&net.Dialer{}).DialContext(ctx, "tcp", address)
	} else {
		conn, err = (&tls.Dialer{Config: cfg}).DialContext(ctx, "tcp", address)
	}
	if err != nil {
		return nil, err
	}
	return &wire{conn: conn, in: bufio.NewReader(conn), host: address}, nil
}

func (w *wire) close() { _ = w.conn.Close() }

// peer is the certificates that the other side showed.
func (w *wire) peer() []*x509.Certificate {
	c, ok := w.conn.(*tls.Conn)
	if !ok {
		return nil
	}
	return c.ConnectionState().PeerCertificates
}

// refusal is what the other side says before it is asked anything; nil if that is
// nothing for a while.
func (w *wire) refusal(patience time.Duration) error {
	if err := w.conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	_, err := w.in.Peek(1)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return err
}

// get makes one request and reads all of its answer, which leaves the connection
// ready for the next one. After an error it is not.
func (w *wire) get(ctx context.Context, path string) (answer, error) {
	if err := w.conn.SetDeadline(time.Now().Add(answerWithin)); err != nil {
		return answer{}, err
	}
	stop := context.AfterFunc(ctx, func() { _ = w.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	a, err := w.exchange(path)
	if err != nil && ctx.Err() != nil {
		return answer{}, context.Cause(ctx)
	}
	return a, err
}

func (w *wire) exchange(path string) (answer, error) {
	if _, err := fmt.Fprintf(w.conn, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", path, w.host); err != nil {
		return answer{}, fmt.Errorf("sending the request: %w", err)
	}
	resp, err := http.ReadResponse(w.in, nil)
	if err != nil {
		return answer{}, fmt.Errorf("reading the answer: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return answer{}, fmt.Errorf("reading the body of the answer: %w", err)
	}
	return answer{resp.StatusCode, strings.TrimSpace(string(body))}, nil
}

// get makes one request on a connection of its own.
func get(ctx context.Context, address, path string) (answer, error) {
	w, err := dialWire(ctx, address, nil)
	if err != nil {
		return answer{}, err
	}
	defer w.close()
	return w.get(ctx, path)
}
