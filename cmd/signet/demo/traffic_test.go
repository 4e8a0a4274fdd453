package demo_test

import (
	"bufio"
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/cmd/signet/demo"
	"github.com/signet-mesh/signet/integration/process"
)

// wait polls until cond holds.
func wait(t *testing.T, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("waited a minute for %s", what)
		}
		time.Sleep(5 * time.Millisecond) // poll
	}
}

func address(s *httptest.Server) string { return s.Listener.Addr().String() }

func TestTrafficKeepsItsConnections(t *testing.T) {
	t.Parallel()
	var served atomic.Int32
	s := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { served.Add(1) }))
	defer s.Close()
	load := demo.StartTraffic(t.Context(), address(s), "/hello", 8, 10*time.Millisecond)
	wait(t, "requests", func() bool { return served.Load() >= 80 })
	rep := load.End()
	if rep.Requests() != int(served.Load()) {
		t.Errorf("%d requests are counted, %d were served", rep.Requests(), served.Load())
	}
	if err := rep.Err(8); err != nil || rep.Failed() != 0 || rep.Dials() != 8 {
		t.Errorf("%v: %v, want no failure on 8 connections", rep, err)
	}
}

func TestEachKindOfFailureIsCounted(t *testing.T) {
	t.Parallel()
	for name, fail := range map[string]struct {
		handler http.HandlerFunc
		want    string
	}{
		"another status": {func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "closed for lunch", http.StatusForbidden) }, "status 403: closed for lunch"},
		"a connection that breaks before the answer": {func(w http.ResponseWriter, _ *http.Request) { panic(http.ErrAbortHandler) }, "reading the answer: "},
		"a body that breaks off": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			w.Write([]byte("half"))
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}, "reading the body of the answer: "},
	} {
		t.Run(name, func(t *testing.T) {
			var served atomic.Int32
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				// The second request of the connection: net/http's client would hide
				// its failure by sending it again.
				if served.Add(1) == 2 {
					fail.handler(w, r)
				}
			}))
			defer s.Close()
			load := demo.StartTraffic(t.Context(), address(s), "/hello", 1, time.Millisecond)
			wait(t, "requests", func() bool { return served.Load() >= 4 })
			rep := load.End()
			if rep.Failed() != 1 {
				t.Errorf("%v, want 1 failed", rep)
			}
			if err := rep.Err(1); err == nil || !strings.Contains(err.Error(), fail.want) {
				t.Errorf("error %v, want one that says %q", err, fail.want)
			}
		})
	}
}

func TestNobodyAtTheAddressIsAFailure(t *testing.T) {
	t.Parallel()
	ports, err := process.FreePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	load := demo.StartTraffic(t.Context(), "127.0.0.1:"+ports[0], "/hello", 1, time.Millisecond)
	wait(t, "attempts", func() bool { return load.Failures() > 0 })
	if rep := load.End(); rep.Requests() == 0 || rep.Failed() != rep.Requests() || rep.Err(1) == nil {
		t.Errorf("%v, want that all failed", rep)
	}
}

func TestANewConnectionIsNoticed(t *testing.T) {
	t.Parallel()
	// A server that ends connections in order, after two answers: nothing fails
	// that the client could see, but it is not the one connection that it had.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var connections atomic.Int32
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			connections.Add(1)
			in := bufio.NewReader(c)
			for range 2 {
				if r, err := http.ReadRequest(in); err == nil {
					r.Body.Close()
					c.Write([]byte("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"))
				}
			}
			c.Close()
		}
	}()
	load := demo.StartTraffic(t.Context(), l.Addr().String(), "/hello", 1, time.Millisecond)
	wait(t, "a second connection", func() bool { return connections.Load() > 1 })
	if rep := load.End(); rep.Err(1) == nil {
		t.Errorf("%v is no error although the server closed connections", rep)
	}
}

func TestAnInterruptIsNoFailure(t *testing.T) {
	t.Parallel()
	arrived := make(chan struct{}, 1)
	s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		arrived <- struct{}{}
		<-r.Context().Done()
	}))
	defer s.Close()
	ctx, cancel := context.WithCancel(t.Context())
	load := demo.StartTraffic(ctx, address(s), "/hello", 1, time.Millisecond)
	<-arrived
	cancel()
	if rep := load.End(); rep.Requests() != 0 {
		t.Errorf("%v, want that the request which was interrupted does not count", rep)
	}
}

func TestARequestThatHasBegunIsWaitedFor(t *testing.T) {
	t.Parallel()
	arrived, answer := make(chan struct{}, 1), make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		select {
		case arrived <- struct{}{}:
		default:
		}
		<-answer
	}))
	defer s.Close()
	began := time.Now()
	load := demo.StartTraffic(t.Context(), address(s), "/hello", 1, time.Millisecond)
	<-arrived
	middle := time.Now()
	ended := make(chan struct{})
	go func() {
		<-ended
		time.Sleep(100 * time.Millisecond)
		close(answer)
	}()
	rep := load.EndAfter(func() { close(ended) })
	if rep.Requests() != 1 || rep.Failed() != 0 || rep.Slowest() < 100*time.Millisecond {
		t.Errorf("%v, want one request that took at least 100 ms and did not fail, and none after it", rep)
	}
	if n := rep.During(middle, middle.Add(time.Millisecond)); n != 1 {
		t.Errorf("%d requests were under way in the middle, want 1", n)
	}
	if n := rep.During(began.Add(-time.Second), began); n != 0 {
		t.Errorf("%d requests were under way before the beginning, want 0", n)
	}
}

func TestNoTrafficShowsNothing(t *testing.T) {
	t.Parallel()
	if err := (demo.Report{}).Err(0); err == nil {
		t.Error("a report of no requests is no error")
	}
}

func TestWireTellsWhatTheOtherSideSaysFirst(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for name, closes := range map[string]bool{"nothing": false, "that it ends": true} {
		t.Run(name, func(t *testing.T) {
			w, err := demo.DialWire(t.Context(), l.Addr().String(), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer w.Close()
			c, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if closes {
				c.Close()
			}
			patience := 20 * time.Millisecond
			if closes {
				patience = time.Minute
			}
			if err := w.Refusal(patience); (err != nil) != closes {
				t.Errorf("error %v, want one: %t", err, closes)
			}
		})
	}
}

func TestWireEndsWithItsContext(t *testing.T) {
	t.Parallel()
	arrived := make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		close(arrived)
		<-r.Context().Done()
	}))
	defer s.Close()
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("the reason")
	w, err := demo.DialWire(ctx, address(s), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	go func() {
		<-arrived
		cancel(reason)
	}()
	if _, _, err := w.Get(ctx, "/hello"); !errors.Is(err, reason) {
		t.Errorf("error %v, want %v", err, reason)
	}
}
