package attest_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/signet-mesh/signet/identity/attest"
)

// door is the connections of a socket, without a server.
type door struct {
	creds credentials.TransportCredentials
	who   string // the process of the next connection
}

// visit is a connection as its server and its client have it.
type visit struct {
	server net.Conn
	info   credentials.AuthInfo
	client net.Conn
}

func newDoor(t *testing.T, cfg attest.ConnectionsConfig) *door {
	t.Helper()
	d := &door{}
	attest.WithPeer(&cfg, func(net.Conn) string { return d.who })
	var err error
	if d.creds, err = attest.Credentials(cfg); err != nil {
		t.Fatal(err)
	}
	return d
}

func (d *door) open(t *testing.T, who string) *visit {
	t.Helper()
	d.who = who
	near, far := net.Pipe()
	c, info, err := d.creds.ServerHandshake(near)
	if err != nil {
		t.Fatal(err)
	}
	v := &visit{c, info, far}
	t.Cleanup(func() { c.Close(); far.Close() })
	return v
}

// closed reports whether the server has closed it.
func (v *visit) closed() bool {
	_ = v.client.SetReadDeadline(time.Now())
	_, err := v.client.Read(make([]byte, 1))
	return errors.Is(err, io.EOF)
}

func count(visits []*visit) (open int) {
	for _, v := range visits {
		if !v.closed() {
			open++
		}
	}
	return open
}

func TestWhoHasMostConnectionsLosesOne(t *testing.T) {
	t.Run("among those that prove nothing", func(t *testing.T) {
		d := newDoor(t, attest.ConnectionsConfig{Unproven: 10, Total: 100, Prove: time.Hour})
		other, proven := d.open(t, "other"), d.open(t, "proven")
		attest.Accept(proven.info, "pod-1")
		var flood []*visit
		for range 1000 {
			flood = append(flood, d.open(t, "flood"))
		}
		if other.closed() || proven.closed() || count(flood) != 9 || count(flood[991:]) != 9 {
			t.Errorf("closed: another's %v, a proven one %v; %d of the flood are open", other.closed(), proven.closed(), count(flood))
		}
	})
	t.Run("of a pod that has more than it may", func(t *testing.T) {
		d := newDoor(t, attest.ConnectionsConfig{PerPod: 5, Prove: time.Hour})
		other := d.open(t, "other")
		attest.Accept(other.info, "pod-2")
		var pod []*visit
		for range 20 {
			v := d.open(t, "proxy")
			attest.Accept(v.info, "pod-1")
			pod = append(pod, v)
		}
		if other.closed() || count(pod) != 5 || count(pod[15:]) != 5 {
			t.Errorf("closed: another's %v; %d are open", other.closed(), count(pod))
		}
	})
	t.Run("in all", func(t *testing.T) {
		d := newDoor(t, attest.ConnectionsConfig{Total: 20, Prove: time.Hour})
		few, many := []*visit{}, []*visit{}
		for i := range 30 {
			v := d.open(t, "proxy")
			if i%6 == 0 {
				attest.Accept(v.info, "pod-1")
				few = append(few, v)
				continue
			}
			attest.Accept(v.info, "pod-2")
			many = append(many, v)
		}
		if count(few) != 5 || count(many) != 15 || count(many[10:]) != 15 {
			t.Errorf("%d and %d are open, want 5 and 15", count(few), count(many))
		}
	})
	t.Run("one that left is not counted", func(t *testing.T) {
		d := newDoor(t, attest.ConnectionsConfig{Unproven: 2, Total: 10, Prove: time.Hour})
		stays := d.open(t, "a")
		for range 100 {
			v := d.open(t, "b")
			v.server.Close()
			v.server.Close() // as a server and its owner may
		}
		for range 100 {
			v := d.open(t, "b")
			attest.Accept(v.info, "pod-1")
			v.server.Close()
		}
		for range 100 {
			v := d.open(t, "b")
			v.server.Close()
			attest.Accept(v.info, "pod-1")
		}
		if stays.closed() {
			t.Error("a place was taken for connections that are closed")
		}
	})
}

func TestAConnectionThatProvesNothingIsClosedInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDoor(t, attest.ConnectionsConfig{})
		silent, proven := d.open(t, "a"), d.open(t, "b")
		time.Sleep(9 * time.Second)
		attest.Accept(proven.info, "pod-1")
		if silent.closed() {
			t.Error("closed before its time")
		}
		time.Sleep(2 * time.Second)
		if !silent.closed() || proven.closed() {
			t.Errorf("closed: the silent one %v, the proven one %v", silent.closed(), proven.closed())
		}
		time.Sleep(24 * time.Hour)
		if proven.closed() {
			t.Error("one that proved something was closed")
		}
	})
}

// TestAFloodOfConnectionsKeepsNobodyOut: thousands of connections with a preface and no
// token, over a real socket; a proxy gets its answer and keeps its stream, and the others
// are gone after their time.
func TestAFloodOfConnectionsKeepsNobodyOut(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	gate, err := attest.NewGate(attest.GateConfig{Attestor: w.Attestor, Pods: w.pods})
	if err != nil {
		t.Fatal(err)
	}
	reg := prometheus.NewRegistry()
	creds, err := attest.Credentials(attest.ConnectionsConfig{Unproven: 64, Prove: 3 * time.Second, Metrics: reg})
	if err != nil {
		t.Fatal(err)
	}
	serve := grpc.NewServer(grpc.Creds(creds), grpc.InTapHandle(gate.Tap), grpc.StreamInterceptor(gate.Stream))
	serve.RegisterService(&grpc.ServiceDesc{ServiceName: "test.Gated", HandlerType: (*any)(nil), Streams: []grpc.StreamDesc{{StreamName: "Echo", ServerStreams: true, ClientStreams: true,
		Handler: func(_ any, s grpc.ServerStream) error {
			for {
				if err := s.RecvMsg(&wrapperspb.StringValue{}); err != nil {
					return err
				}
				if err := s.SendMsg(wrapperspb.String(who(s.Context()))); err != nil {
					return err
				}
			}
		}}}}, struct{}{})
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- serve.Serve(l) }()
	t.Cleanup(func() {
		serve.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})

	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		t.Fatal(err)
	}
	n := min(5000, int(files.Cur)/4)
	if raceEnabled {
		n = min(n, 1000)
	}
	// Preface and an empty SETTINGS frame: what a client says that then says nothing.
	hello := []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
	var flood sync.WaitGroup
	for range n {
		var c net.Conn
		for {
			if c, err = net.Dial("unix", path); err == nil {
				break
			}
			if !errors.Is(err, syscall.EAGAIN) { // more wait to be accepted than may
				t.Fatal(err)
			}
			time.Sleep(time.Millisecond)
		}
		_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
		_, _ = c.Write(hello) // it may be closed already
		flood.Go(func() {
			defer c.Close()
			if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("a connection without a proof is still open")
			}
		})
	}
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(bearing(t.Context(), w.issuer.Token(server, audience)), 2*time.Minute)
	defer cancel()
	echo := func(s grpc.ClientStream) error {
		if err := s.SendMsg(wrapperspb.String("")); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		pod, err := recv(s)
		if err == nil && pod != server.Pod {
			err = fmt.Errorf("answered as %q", pod)
		}
		return err
	}
	// As Envoy does, it comes back until it is answered.
	var stream grpc.ClientStream
	for {
		stream, err = conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, service+"Echo", grpc.WaitForReady(true))
		if err == nil {
			if err = echo(stream); err == nil {
				break
			}
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
	}
	flood.Wait()
	if err := echo(stream); err != nil {
		t.Errorf("the stream of who proved itself: %v", err)
	}
	metrics := gather(t, reg)
	if closed := metrics["signet_attest_connections_closed_total{too_many}"] + metrics["signet_attest_connections_closed_total{unproven}"]; closed < float64(n) {
		t.Errorf("%v connections were closed of %d", closed, n)
	}
	if metrics["signet_attest_connections_closed_total{unproven}"] == 0 {
		t.Error("none was closed for its time")
	}
}

func TestProcessesAreToldApart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var who []string
	for range 2 {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		who = append(who, attest.PeerOf(s))
	}
	if want := fmt.Sprintf("process %d", syscall.Getpid()); who[0] != want || who[1] != want {
		t.Errorf("this process is %q, want %q", who, want)
	}
	if near, _ := net.Pipe(); attest.PeerOf(near) != "" {
		t.Error("a pipe has a process")
	}
}
