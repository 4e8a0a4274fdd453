// Package process runs the programs that tests need beside the ones of this
// repository: each can be ended, frozen and started again with the same address and
// data, and none outlives the test.
//
// # Trust
//
// It is linked into tests only, and runs what it is told to.
package process

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os/exec"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Patience is how long anything that should happen at once may take on a busy
// machine.
const Patience = 60 * time.Second

// FreePorts are ports below the range that the kernel hands out, and below those of
// signet demo, so that a process that was ended finds its port again, and no connection
// has it. Each is returned to one caller on this machine, until the test binary ends.
func FreePorts(n int) (ports []string, err error) {
	for tries := 0; len(ports) < n; tries++ {
		port := strconv.Itoa(16000 + rand.IntN(4000))
		free := claim(port)
		if free == nil {
			ports = append(ports, port)
		} else if tries > 1000 {
			return nil, free
		}
	}
	return ports, nil
}

// claim takes a port that is free. A name in the abstract namespace of sockets, which the
// kernel keeps until the process ends, tells other test binaries whose it is: they run at
// the same time.
func claim(port string) error {
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: "@signet-test-port-" + port}); err != nil {
		return errors.Join(err, syscall.Close(fd))
	}
	l, err := net.Listen("tcp", "127.0.0.1:"+port)
	if err != nil {
		return errors.Join(err, syscall.Close(fd))
	}
	return l.Close()
}

// Process is a program that serves. Its methods are safe for concurrent use, but only
// one caller may end and start it.
type Process struct {
	// Name is for messages.
	Name string
	// Command makes what is started, each time.
	Command func() *exec.Cmd
	// Ready is nil once it serves.
	Ready func() error

	log tail

	mu    sync.Mutex
	cmd   *exec.Cmd     // guarded by mu; nil: not running
	ended chan struct{} // guarded by mu; closed when cmd was waited for
}

// Start starts the process again, with the same address and data, and waits until
// it serves.
func (p *Process) Start(tb testing.TB) {
	tb.Helper()
	p.Launch(tb)
	p.WaitReady(tb)
}

// Launch is Start without waiting.
func (p *Process) Launch(tb testing.TB) {
	tb.Helper()
	if err := p.Begin(); err != nil {
		tb.Fatal(err)
	}
}

// Begin is Launch where no test runs yet.
func (p *Process) Begin() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd != nil {
		return fmt.Errorf("starting %s: it runs", p.Name)
	}
	cmd := p.Command()
	cmd.Stdout, cmd.Stderr = &p.log, &p.log
	// Should the test binary be killed, no cleanup runs; the kernel then ends it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, ended := make(chan error), make(chan struct{})
	go func() {
		// The kernel means the thread that starts the child, so that thread has to
		// live as long: others may end before, with a goroutine that locked them.
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ended is in its log
		}
		close(ended)
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("starting %s: %w", p.Name, err)
	}
	p.cmd, p.ended = cmd, ended
	return nil
}

// WaitReady waits until the process serves.
func (p *Process) WaitReady(tb testing.TB) {
	tb.Helper()
	if err := p.Await(Patience); err != nil {
		tb.Fatalf("%v\n%s", err, p.Log())
	}
}

// Await is WaitReady for a limited time.
func (p *Process) Await(within time.Duration) error {
	deadline := time.Now().Add(within)
	for {
		err := p.Ready()
		if err == nil {
			return nil
		}
		p.mu.Lock()
		ended := p.ended
		p.mu.Unlock()
		select {
		case <-ended:
			return fmt.Errorf("%s ended before it was ready: %w", p.Name, err)
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s is not ready after %v: %w", p.Name, within, err)
		}
	}
}

// Stop ends the process in order and waits for its end.
func (p *Process) Stop(tb testing.TB) { p.end(tb, syscall.SIGTERM) }

// Kill ends the process by kill -9 and waits for its end.
func (p *Process) Kill(tb testing.TB) { p.end(tb, syscall.SIGKILL) }

// Freeze stops the process as it is (SIGSTOP): its connections stay and nothing
// answers. Thaw goes on.
func (p *Process) Freeze(tb testing.TB) { p.signal(tb, syscall.SIGSTOP) }

// Thaw undoes Freeze.
func (p *Process) Thaw(tb testing.TB) { p.signal(tb, syscall.SIGCONT) }

func (p *Process) signal(tb testing.TB, s syscall.Signal) {
	tb.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		tb.Fatalf("%s does not run", p.Name)
	}
	if err := p.cmd.Process.Signal(s); err != nil {
		tb.Fatalf("%s: %v", p.Name, err)
	}
}

func (p *Process) end(tb testing.TB, s syscall.Signal) {
	tb.Helper()
	if err := p.Finish(s); err != nil {
		tb.Error(err)
	}
}

// Finish ends the process by a signal and waits for its end. It does nothing if the
// process does not run.
func (p *Process) Finish(s syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		return nil
	}
	// The error is that it has ended already.
	_ = p.cmd.Process.Signal(syscall.SIGCONT)
	_ = p.cmd.Process.Signal(s)
	var err error
	select {
	case <-p.ended:
	case <-time.After(Patience):
		err = errors.Join(fmt.Errorf("%s did not end within %v", p.Name, Patience), p.cmd.Process.Kill())
		<-p.ended
	}
	p.cmd = nil
	return err
}

// PID is the process id, 0 when it does not run.
func (p *Process) PID() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		return 0
	}
	return p.cmd.Process.Pid
}

// Log is the end of what the process has written, over all of its starts.
func (p *Process) Log() string { return p.log.String() }

// tail keeps the last kilobytes of what is written.
type tail struct {
	mu sync.Mutex
	b  bytes.Buffer
}

const tailSize = 16 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b.Write(p)
	if n := t.b.Len(); n > 2*tailSize {
		t.b.Next(n - tailSize)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.b.String()
	if len(s) > tailSize {
		s = "…" + s[len(s)-tailSize:]
	}
	return s
}
