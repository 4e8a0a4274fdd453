package envoytest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/integration/parts"
	"github.com/signet-mesh/signet/integration/process"
)

// patience is how long anything that Envoy should do at once may take on a busy
// machine.
const patience = process.Patience

var find = sync.OnceValues(func() (parts.Part, error) { return parts.FindEnvoy(context.Background()) })

// Path returns Envoy's program. Without one the test is skipped, in CI it fails.
func Path(tb testing.TB) string {
	tb.Helper()
	part, err := find()
	switch {
	case err == nil:
		return part.Path
	case errors.Is(err, parts.ErrMissing) && os.Getenv("CI") == "":
		tb.Skip(err)
	default:
		tb.Fatal(err)
	}
	return ""
}

// Validate fails the test unless Envoy accepts the configuration file.
func Validate(tb testing.TB, file string) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), patience)
	defer cancel()
	out, err := exec.CommandContext(ctx, Path(tb), "--mode", "validate", "-c", file, "-l", "warning").CombinedOutput()
	if err != nil {
		tb.Fatalf("envoy --mode validate -c %s: %v\n%s", file, err, out)
	}
}

// Envoy is a running Envoy. Its methods are safe for concurrent use.
type Envoy struct {
	cmd   *exec.Cmd
	admin string
	log   buffer
	ended chan struct{} // closed when the process was waited for
	err   error         // of the wait; readable once ended is closed
	stop  sync.Once
}

// Start runs Envoy with a bootstrap file and waits for its admin interface, not
// for readiness: without its certificate a listener never becomes ready. The
// bootstrap's own admin address is replaced, so that tests do not meet. args are
// further arguments. Envoy is ended with the test; if the test failed, the end of
// its log is shown.
func Start(tb testing.TB, file string, args ...string) *Envoy {
	tb.Helper()
	adminFile := filepath.Join(tb.TempDir(), "admin")
	e := &Envoy{ended: make(chan struct{})}
	e.cmd = exec.Command(Path(tb), append([]string{
		"-c", file,
		"--config-yaml", "admin: {address: {socket_address: {address: 127.0.0.1, port_value: 0}}}",
		"--admin-address-path", adminFile,
		"--concurrency", "1",
		"--disable-hot-restart",
		"--file-flush-interval-msec", "20", // access logs; the default is 10 s
		"-l", "warning",
	}, args...)...)
	e.cmd.Stdout, e.cmd.Stderr = &e.log, &e.log
	// Should the test binary be killed, no cleanup runs; the kernel then ends Envoy.
	e.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		// The kernel means the thread that starts the child, so that thread has to
		// live as long: others may end before, with a goroutine that locked them.
		runtime.LockOSThread()
		err := e.cmd.Start()
		started <- err
		if err == nil {
			e.err = e.cmd.Wait()
		}
		close(e.ended)
	}()
	if err := <-started; err != nil {
		tb.Fatalf("starting Envoy: %v", err)
	}
	tb.Cleanup(func() {
		e.Stop()
		if tb.Failed() {
			tb.Logf("log of Envoy with %s:\n%s", file, tail(e.Log(), 8<<10))
		}
	})
	wait(tb, "Envoy's admin interface", func() error {
		select {
		case <-e.ended:
			tb.Fatalf("Envoy ended: %v\n%s", e.err, tail(e.Log(), 8<<10))
		default:
		}
		b, err := os.ReadFile(adminFile)
		if err != nil {
			return err
		}
		e.admin = strings.TrimSpace(string(b))
		if e.admin == "" {
			return errors.New("its address is not written yet")
		}
		return nil
	})
	return e
}

// Stop ends Envoy and waits until it has ended. It may be called again.
func (e *Envoy) Stop() {
	e.stop.Do(func() {
		// The error is that it has ended already.
		_ = e.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-e.ended:
		case <-time.After(20 * time.Second):
			_ = e.cmd.Process.Kill()
		}
	})
	<-e.ended
}

// PID is the process id.
func (e *Envoy) PID() int { return e.cmd.Process.Pid }

// Admin is HOST:PORT of the admin interface.
func (e *Envoy) Admin() string { return e.admin }

// Log is what Envoy has written to standard output and standard error so far.
func (e *Envoy) Log() string { return e.log.String() }

// WaitReady waits until Envoy has its secrets and listens.
func (e *Envoy) WaitReady(tb testing.TB) {
	tb.Helper()
	wait(tb, "Envoy to be ready", func() error {
		_, err := e.ask(tb.Context(), "/ready")
		return err
	})
}

// Listener is HOST:PORT of a listener by name, as it was bound.
func (e *Envoy) Listener(tb testing.TB, name string) string {
	tb.Helper()
	listeners := e.Listeners(tb)
	if address, ok := listeners[name]; ok {
		return address
	}
	tb.Fatalf("Envoy has no listener %q: %v", name, listeners)
	return ""
}

// Listeners are HOST:PORT of all listeners by name, as they were bound.
func (e *Envoy) Listeners(tb testing.TB) map[string]string {
	tb.Helper()
	var answer struct {
		Statuses []struct {
			Name    string `json:"name"`
			Address struct {
				Socket struct {
					Address string `json:"address"`
					Port    uint16 `json:"port_value"`
				} `json:"socket_address"`
			} `json:"local_address"`
		} `json:"listener_statuses"`
	}
	b, err := e.ask(tb.Context(), "/listeners?format=json")
	if err == nil {
		err = json.Unmarshal(b, &answer)
	}
	if err != nil {
		tb.Fatalf("asking Envoy for its listeners: %v", err)
	}
	listeners := make(map[string]string)
	for _, s := range answer.Statuses {
		listeners[s.Name] = net.JoinHostPort(s.Address.Socket.Address, strconv.Itoa(int(s.Address.Socket.Port)))
	}
	return listeners
}

// Stats are all counters and gauges by name.
func (e *Envoy) Stats(tb testing.TB) map[string]int64 {
	tb.Helper()
	b, err := e.ask(tb.Context(), "/stats")
	if err != nil {
		tb.Fatalf("asking Envoy for its statistics: %v", err)
	}
	stats := make(map[string]int64)
	for line := range strings.Lines(string(b)) {
		var n int64
		name, value, ok := strings.Cut(strings.TrimSpace(line), ": ")
		if !ok {
			continue
		}
		// Histograms and text readouts do not parse as a number alone.
		if _, err := fmt.Sscanf(value, "%d", &n); err == nil && fmt.Sprint(n) == value {
			stats[name] = n
		}
	}
	return stats
}

// WaitStat waits until a counter or gauge is at least n.
func (e *Envoy) WaitStat(tb testing.TB, name string, n int64) {
	tb.Helper()
	wait(tb, fmt.Sprintf("Envoy's %s to be at least %d", name, n), func() error {
		if got := e.Stats(tb)[name]; got < n {
			return fmt.Errorf("it is %d", got)
		}
		return nil
	})
}

// WaitLog waits until what Envoy has written holds a string. An access log is
// written some time after the answer.
func (e *Envoy) WaitLog(tb testing.TB, part string) {
	tb.Helper()
	wait(tb, fmt.Sprintf("Envoy to write %q", part), func() error {
		if !strings.Contains(e.Log(), part) {
			return errors.New("it has not")
		}
		return nil
	})
}

// ask asks the admin interface; any status but 200 is an error.
func (e *Envoy) ask(ctx context.Context, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+e.admin+path, nil)
	if err != nil {
		return nil, err
	}
	// A connection kept open would be a goroutine that outlives the test.
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", path, resp.Status, tail(strings.TrimSpace(string(b)), 200))
	}
	return b, err
}

// wait polls until try succeeds; it fails the test with try's last error when
// patience is over.
func wait(tb testing.TB, what string, try func() error) {
	tb.Helper()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			tb.Fatalf("waited %s for %s: %v", patience, what, err)
		case <-tb.Context().Done():
			tb.Fatalf("waiting for %s: %v", what, tb.Context().Err())
		}
	}
}

func tail(s string, n int) string {
	if len(s) > n {
		return "…" + s[len(s)-n:]
	}
	return s
}

// buffer is a bytes.Buffer for concurrent use.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
