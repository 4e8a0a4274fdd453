package run_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/cmd/internal/run"
	"github.com/signet-mesh/signet/integration/leaktest"
	"github.com/signet-mesh/signet/integration/process"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

func TestLogs(t *testing.T) {
	var b bytes.Buffer
	log, err := run.LogConfig{Format: "json", Level: "warn"}.New(&b)
	if err != nil {
		t.Fatal(err)
	}
	log.Info("no")
	log.Warn("yes", "node", "a")
	if s := b.String(); !strings.Contains(s, `"msg":"yes","node":"a"`) || strings.Contains(s, "no\"") {
		t.Error(s)
	}
	for _, c := range []run.LogConfig{{Format: "xml"}, {Level: "loud"}} {
		if _, err := c.New(&b); err == nil {
			t.Errorf("%+v was taken", c)
		}
	}
}

func TestHealthSaysEveryReason(t *testing.T) {
	h := &run.Health{}
	if h.Err() != nil {
		t.Error("an empty Health is not ready")
	}
	var err error
	h.Add("store", func() error { return err })
	h.Add("log", func() error { return err })
	if h.Err() != nil {
		t.Error(h.Err())
	}
	err = errors.New("disk full")
	if got := h.Err(); got == nil || got.Error() != "store: disk full\nlog: disk full" {
		t.Errorf("got %v", got)
	}
	err = nil
	h.End()
	if h.Err() == nil {
		t.Error("ready while shutting down")
	}
}

func TestHTTP(t *testing.T) {
	ports, err := process.FreePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	addr := "127.0.0.1:" + ports[0]
	reg := prometheus.NewRegistry()
	c := prometheus.NewCounter(prometheus.CounterOpts{Name: "signet_test_total", Help: "x"})
	reg.MustRegister(c)
	h := &run.Health{}
	for _, pprof := range []bool{false, true} {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			done <- run.ServeHTTP(ctx, run.HTTPConfig{Listen: addr, Pprof: pprof}, reg, h, slog.New(slog.DiscardHandler))
		}()
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		get := func(path string) (int, string) {
			t.Helper()
			for deadline := time.Now().Add(time.Minute); ; <-time.After(time.Millisecond) {
				resp, err := client.Get("http://" + addr + path)
				if err != nil {
					if time.Now().After(deadline) {
						t.Fatal(err)
					}
					continue
				}
				b, _ := io.ReadAll(resp.Body)
				resp.Body.Close()
				return resp.StatusCode, string(b)
			}
		}
		if s, b := get("/metrics"); s != 200 || !strings.Contains(b, "signet_test_total 0") {
			t.Errorf("metrics: %d %s", s, b)
		}
		if s, _ := get("/healthz"); s != 200 {
			t.Errorf("healthz: %d", s)
		}
		if s, _ := get("/readyz"); s != 200 {
			t.Errorf("readyz: %d", s)
		}
		want := 404
		if pprof {
			want = 200
			h.Add("x", func() error { return errors.New("the reason") })
			if s, b := get("/readyz"); s != 503 || !strings.Contains(b, "x: the reason") {
				t.Errorf("readyz: %d %s", s, b)
			}
			if s, _ := get("/healthz"); s != 200 {
				t.Errorf("healthz must not fail with readiness: %d", s)
			}
		}
		if s, _ := get("/debug/pprof/cmdline"); s != want {
			t.Errorf("pprof %v: %d", pprof, s)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if err := run.ServeHTTP(t.Context(), run.HTTPConfig{Listen: "256.0.0.1:1"}, reg, h, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("an address that cannot be listened on was taken")
	}
	if err := run.ServeHTTP(t.Context(), run.HTTPConfig{}, reg, h, nil); err != nil {
		t.Error(err)
	}
}

// TestTheEndIsInOrder: readiness, then servers, then loops; and a job that fails
// ends all the others.
func TestTheEndIsInOrder(t *testing.T) {
	for _, failing := range []string{"", "loop", "server"} {
		var mu sync.Mutex
		var order []string
		note := func(s string) { mu.Lock(); defer mu.Unlock(); order = append(order, s) }
		job := func(name string) run.Job {
			return func(ctx context.Context) error {
				if name == failing {
					return errors.New(name + " broke")
				}
				<-ctx.Done()
				note(name)
				return ctx.Err()
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		if failing == "" {
			time.AfterFunc(time.Millisecond, cancel)
		}
		err := run.InOrder(ctx, func(error) { note("ending") }, []run.Job{job("loop"), job("loop2")}, []run.Job{job("server"), job("server2")})
		cancel()
		if failing == "" && err != nil || failing != "" && (err == nil || err.Error() != failing+" broke") {
			t.Errorf("%q: %v", failing, err)
		}
		text := strings.Join(order, " ")
		if strings.Index(text, "server") > strings.Index(text, "loop") && strings.Contains(text, "server") && failing != "server" || !strings.Contains(text, "ending") {
			t.Errorf("%q: order %v", failing, order)
		}
	}
}

func TestUnixSocketIsReplacedOnlyWhenNobodyServes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	l, err := run.ListenUnix(path, 0o666, 0)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o666 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	first := l
	go func() {
		for {
			c, err := first.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	if _, err := run.ListenUnix(path, 0o600, 0); err == nil || !strings.Contains(err.Error(), "another process is serving") {
		t.Errorf("a socket in use: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it stays behind: %v", err)
	}
	// One that a killed process left behind.
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	l, err = run.ListenUnix(path, 0o600, 0)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := run.ListenUnix(path, 0o600, 0); err == nil {
		t.Error("a file was replaced by a socket")
	}
	if b, _ := os.ReadFile(path); string(b) != "precious" {
		t.Errorf("the file holds %q", b)
	}
	if es, _ := os.ReadDir(filepath.Dir(path)); len(es) != 1 {
		t.Errorf("left behind: %v", es)
	}
}

// TestGRPCDrainsAndThenCuts: a stream that never ends does not hold the end up.
func TestGRPCDrainsAndThenCuts(t *testing.T) {
	if err := endOfAStream(t, 50*time.Millisecond, nil); err == nil {
		t.Error("the stream goes on")
	}
}

// TestGRPCEndsStreams: nor does it where nothing is cut, and its client is told.
func TestGRPCEndsStreams(t *testing.T) {
	streams := run.NewStreams()
	if err := endOfAStream(t, time.Hour, streams, grpc.StreamInterceptor(streams.Intercept)); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "successor") {
		t.Errorf("the client of the stream is told %v", err)
	}
}

// endOfAStream ends a server with an open stream, and returns what its client gets.
func endOfAStream(t *testing.T, drain time.Duration, streams *run.Streams, options ...grpc.ServerOption) error {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(options...)
	healthpb.RegisterHealthServer(s, health.NewServer())
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- run.ServeGRPC(ctx, s, l, drain, streams) }()
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	w, err := healthpb.NewHealthClient(conn).Watch(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Recv(); err != nil {
		t.Fatal(err)
	}
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("the server waits for its stream")
	}
	_, err = w.Recv()
	return err
}

func TestWriteFileIsAllOrNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "root.pem")
	for _, content := range []string{"one", "two"} {
		if err := run.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(path); err != nil || string(b) != content {
			t.Errorf("%q, %v", b, err)
		}
	}
	if fi, _ := os.Stat(path); fi.Mode().Perm() != 0o644 {
		t.Errorf("mode %v", fi.Mode())
	}
	if err := run.WriteFile(filepath.Join(dir, "no", "file"), nil, 0o644); err == nil {
		t.Error("written into a folder that does not exist")
	}
	if err := os.Mkdir(filepath.Join(dir, "taken"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := run.WriteFile(filepath.Join(dir, "taken"), nil, 0o644); err == nil {
		t.Error("a folder was replaced")
	}
	if es, _ := os.ReadDir(dir); fmt.Sprint(len(es)) != "2" {
		t.Errorf("left behind: %v", es)
	}
}

// TestALatePredecessorLeavesItsSuccessorAlone: closing twice, as a server and its
// owner do, must not remove the socket of whoever listens by now.
func TestALatePredecessorLeavesItsSuccessorAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	first, err := run.ListenUnix(path, 0o600, 0)
	if err != nil {
		t.Fatal(err)
	}
	first.Close()
	second, err := run.ListenUnix(path, 0o600, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	first.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the successor's socket is gone: %v", err)
	}
}

// TestASocketIsWaitedForWhileItsServerLeaves: a predecessor that is leaving is no
// reason to fail, whoever has its folder open and locked.
func TestASocketIsWaitedForWhileItsServerLeaves(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s.sock")
	pod, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer pod.Close()
	if err := syscall.Flock(int(pod.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	first, err := run.ListenUnix(path, 0o666, 0)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer first.Close()
		for range 2 { // looks whether anybody serves
			c, err := first.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			c.Close()
		}
	}()
	second, err := run.ListenUnix(path, 0o666, time.Minute)
	if err != nil {
		t.Fatalf("a predecessor that leaves is waited for: %v", err)
	}
	defer second.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
}

// TestWhoLosesItsSocketLearnsIt: of two that begin in the same moment one does not go
// on unseen, and does not take the other's socket along when it ends.
func TestWhoLosesItsSocketLearnsIt(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s.sock")
	lost, err := run.ListenUnix(path, 0o666, 0)
	if err != nil {
		t.Fatal(err)
	}
	// The other looked before the first was there.
	won, err := run.ListenUnix(filepath.Join(dir, "t.sock"), 0o666, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer won.Close()
	if err := os.Rename(filepath.Join(dir, "t.sock"), path); err != nil {
		t.Fatal(err)
	}
	if err := run.ServeGRPC(t.Context(), grpc.NewServer(), lost, time.Second, nil); err == nil || !strings.Contains(err.Error(), "in the place of this one") {
		t.Errorf("serving without a socket returned %v", err)
	}
	lost.Close()
	if c, err := net.Dial("unix", path); err != nil {
		t.Errorf("the other's socket: %v", err)
	} else {
		c.Close()
	}
}

// FuzzConfig: any text is refused or read into a configuration, which is printed as
// text that reads as the same.
func FuzzConfig(f *testing.F) {
	type config struct {
		Text  string        `yaml:"text"`
		Wait  time.Duration `yaml:"wait"`
		Names []string      `yaml:"names"`
		Below struct {
			Number *uint32           `yaml:"number,omitempty"`
			Labels map[string]string `yaml:"labels,omitempty"`
		} `yaml:"below"`
	}
	f.Add("text: a\nwait: 10s\nnames: [a, \"*/*\"]\nbelow: {number: 7, labels: {a: b}}\n")
	f.Add("a: &a [*a]\n")
	f.Add("text: a\n---\ntext: b\n")
	f.Add("")
	dir := f.TempDir()
	read := func(t *testing.T, text string) (c config, err error) {
		path := filepath.Join(dir, "config.yaml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return c, run.LoadConfig(path, &c)
	}
	f.Fuzz(func(t *testing.T, text string) {
		c, err := read(t, text)
		if err != nil {
			return
		}
		var first, again bytes.Buffer
		if err := run.PrintConfig(&first, c); err != nil {
			t.Fatal(err)
		}
		if c, err = read(t, first.String()); err != nil {
			t.Fatalf("%v in what was printed:\n%s", err, first.String())
		}
		if err := run.PrintConfig(&again, c); err != nil || again.String() != first.String() {
			t.Fatalf("%v\n%s\nreads as\n%s", err, first.String(), again.String())
		}
	})
}
