package external

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// Command has a certificate request signed elsewhere: the request, in PEM, is its
// standard input, the chain, in PEM, its standard output.
type Command struct {
	// Argv is the program and its arguments. No shell is between.
	Argv []string
	// Timeout is how long it may take; then it and what it started are killed.
	Timeout time.Duration
	// Env is added to the authority's own environment.
	Env []string
}

// maxStderr bounds what an error repeats of what the command said.
const maxStderr = 2048

// Sign runs the command. The error holds the end of what it said on standard error.
func (c Command) Sign(ctx context.Context, csr []byte) (chain []byte, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, c.Timeout, fmt.Errorf("it did not end within %v", c.Timeout))
	defer cancel()
	cmd := exec.CommandContext(ctx, c.Argv[0], c.Argv[1:]...)
	cmd.Stdin = bytes.NewReader(csr)
	stdout, stderr := &capped{limit: maxText}, &capped{limit: maxText, ring: true}
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.Env = append(os.Environ(), c.Env...)
	// A group of its own, so that nothing that it started outlives it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 2 * time.Second
	err = cmd.Run()
	if cause := context.Cause(ctx); err != nil && cause != nil {
		err = cause
	}
	if err == nil && stdout.over {
		err = fmt.Errorf("it printed more than %d bytes", maxText)
	}
	if err != nil {
		said := strings.TrimSpace(string(stderr.b))
		if len(said) > maxStderr {
			said = "…" + said[len(said)-maxStderr:]
		}
		if said != "" {
			err = fmt.Errorf("%w; it said: %s", err, said)
		}
		return nil, fmt.Errorf("running %s: %w", c.Argv[0], err)
	}
	if len(bytes.TrimSpace(stdout.b)) == 0 {
		return nil, fmt.Errorf("running %s: %w", c.Argv[0], errors.New("it printed nothing; the chain, in PEM, belongs on its standard output"))
	}
	return stdout.b, nil
}

// capped keeps the beginning, or as a ring the end, of what is written.
type capped struct {
	b     []byte
	limit int
	ring  bool
	over  bool
}

func (c *capped) Write(p []byte) (int, error) {
	c.b = append(c.b, p...)
	if len(c.b) > c.limit {
		c.over = true
		if c.ring {
			c.b = append([]byte(nil), c.b[len(c.b)-maxStderr:]...)
		} else {
			c.b = c.b[:c.limit]
		}
	}
	return len(p), nil
}
