package demo

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"
)

// grace is how long a child may take to end after SIGTERM.
const grace = 2 * time.Second

// process is a child that cannot outlive this program, however that ends.
type process struct {
	name  string
	pid   int
	log   string        // file of standard error
	ended chan struct{} // closed when the child was waited for
	err   error         // how it ended; readable once ended is closed
	// meant is set before the child is made to end, so that its end surprises
	// nobody.
	meant atomic.Bool
}

// start runs a program in a process group of its own, so that a Ctrl-C of the
// terminal does not reach it. Standard error is appended to logs/NAME.log, standard
// output to logs/NAME.access.log: only Envoy writes there.
func start(name, logs string, argv ...string) (*process, error) {
	p := &process{name: name, log: filepath.Join(logs, name+".log"), ended: make(chan struct{})}
	cmd := exec.Command(argv[0], argv[1:]...)
	for _, out := range []struct {
		file string
		to   *io.Writer
	}{{p.log, &cmd.Stderr}, {accessLog(logs, name), &cmd.Stdout}} {
		f, err := os.OpenFile(out.file, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return nil, fmt.Errorf("starting %s: %w", name, err)
		}
		defer f.Close() // the child has its own
		*out.to = f
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error, 1)
	go func() {
		// The kernel sends Pdeathsig when the thread that made the child ends, and
		// the runtime ends threads as it likes, but not one that is locked.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			p.err = cmd.Wait()
			close(p.ended)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	p.pid = cmd.Process.Pid
	return p, nil
}

// accessLog is where the standard output of a child goes.
func accessLog(logs, name string) string { return filepath.Join(logs, name+".access.log") }

// signal sends a signal, unless the child was waited for: then its id may be
// another process's.
func (p *process) signal(s syscall.Signal) {
	select {
	case <-p.ended:
	default:
		// The error is that it ended a moment ago.
		_ = syscall.Kill(p.pid, s)
	}
}

// kill ends the child as a crash would, and waits for it.
func (p *process) kill() {
	p.meant.Store(true)
	p.signal(syscall.SIGKILL)
	<-p.ended
}

// end asks the child to end and waits for it; after grace it is killed.
func (p *process) end() {
	p.meant.Store(true)
	p.signal(syscall.SIGTERM)
	// One that is stopped would never hear it.
	p.signal(syscall.SIGCONT)
	t := time.NewTimer(grace)
	defer t.Stop()
	select {
	case <-p.ended:
	case <-t.C:
		p.kill()
	}
}

// surprise is an error once the child has ended although nobody made it.
func (p *process) surprise() error {
	select {
	case <-p.ended:
		if !p.meant.Load() {
			return fmt.Errorf("%s ended by itself: %s", p.name, describe(p.err))
		}
	default:
	}
	return nil
}

func describe(err error) string {
	if err == nil {
		return "exit status 0"
	}
	return err.Error()
}
