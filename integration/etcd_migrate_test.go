package integration_test

import (
	"context"
	"errors"
	"flag"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/integration/etcdtest"

	clientv3 "go.etcd.io/etcd/client/v3"
)

var killEveryStep = flag.Bool("kill-every-step", false, "kill a migration of the store after each of its steps, and not after three of them")

// TestMigrationsAreKilled: an authority is moved to a real etcd and back by the real
// program, which is killed (-9) as soon as it has done a step, and run again, step by step.
// It ends, nothing is lost, and what serves in between serves as before.
func TestMigrationsAreKilled(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, etcdtest.Options{TLS: true})
	s := newStandalone(t, programs(t), 6, "", func(s *standalone) {
		s.caYAML = "instance: 1\nissuanceLog: {headInterval: 200ms}\nsvid: {agentTTL: 1m}\n"
	})
	dir := filepath.Join(s.dir, "ca", "authority")
	socket := filepath.Join(s.dir, "ca", "admin.sock")
	plain, err := os.ReadFile(filepath.Join(s.dir, "signet-ca.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	shared := string(plain) + "authority: {rootReplica: 1}\nstorage: {etcd: {endpoints: [" + cluster.Endpoints()[0] + "], caFile: " + cluster.CAFile +
		", certFile: " + cluster.CertFile + ", keyFile: " + cluster.KeyFile + ", ownerTTL: 2s}}\n"
	s.write("with-etcd.yaml", shared)
	workload := 0
	issue := func() {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		for {
			chain, err := s.chain(ctx, s.dial(), workload)
			if err == nil {
				if chain[0].SerialNumber.FillBytes(make([]byte, 17))[0] != 1 {
					t.Errorf("another instance: %x", chain[0].SerialNumber)
				}
				break
			}
			if ctx.Err() != nil {
				t.Fatalf("no SVID: %v\n%s", err, s.procs["signet-agent"].log.String())
			}
		}
		workload++
	}
	// head keeps one far away, and verify holds all that there is against it.
	head := filepath.Join(s.dir, "head.json")
	keep := func() {
		t.Helper()
		until(t, "a signed head", func() bool {
			out, err := exec.CommandContext(t.Context(), filepath.Join(s.bin, "signet"), "ca", "log", "head", "--socket", socket).Output()
			return err == nil && os.WriteFile(head, out, 0o600) == nil
		})
	}
	verify := func() {
		t.Helper()
		t.Logf("note: %s", strings.TrimSpace(s.signet("ca", "log", "verify", "--store", "--socket", socket, "--head", head)))
	}

	key := func(name string) func() bool {
		return func() bool {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			resp, err := cluster.Client().Get(ctx, "/signet/"+name, clientv3.WithPrefix(), clientv3.WithCountOnly())
			return err == nil && resp.Count > 0
		}
	}
	file := func(name string) func() bool {
		return func() bool { _, err := os.Lstat(filepath.Join(dir, name)); return err == nil }
	}
	gone := func(name string) func() bool {
		return func() bool {
			_, err := os.Lstat(filepath.Join(dir, name))
			return errors.Is(err, fs.ErrNotExist)
		}
	}
	// move runs the program once for each step, kills it when that is done, and then lets it end.
	move := func(to string, steps ...func() bool) {
		t.Helper()
		killed := 0
		for _, done := range append(steps, func() bool { return false }) {
			cmd := exec.CommandContext(t.Context(), filepath.Join(s.bin, "signet-ca"), "migrate-store", "--config", filepath.Join(s.dir, "with-etcd.yaml"), "--to", to)
			var out lockedBuffer
			cmd.Stdout, cmd.Stderr = &out, &out
			cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			for running := true; running; {
				select {
				case err := <-ended:
					if err != nil {
						t.Fatalf("to %s, after %d kills: %v\n%s", to, killed, err, out.String())
					}
					running = false
				default:
					if done() {
						_ = cmd.Process.Kill() // it may have ended
						if err := <-ended; err != nil {
							killed++
						}
						running = false
					} else {
						time.Sleep(100 * time.Microsecond)
					}
				}
			}
		}
		t.Logf("note: to %s: killed %d times", to, killed)
		if killed < 2 {
			t.Errorf("to %s: it was killed %d times only", to, killed)
		}
	}

	issue()
	keep()
	s.stop("signet-ca", syscall.SIGTERM)
	steps := func(some []func() bool, others ...func() bool) []func() bool {
		if *killEveryStep {
			return append(some, others...)
		}
		return some
	}
	move("etcd", steps([]func() bool{key("f/log/001/"), key("s/agents/"), gone("log")}, key("s/moved"), key("s/journal"))...)
	if out := s.refuses(t); !strings.Contains(out, "incomplete") && !strings.Contains(out, "moved") {
		t.Errorf("where it was it says: %s", out)
	}
	s.write("signet-ca.yaml", shared)
	s.start("signet-ca")
	verify()
	issue()
	keep()
	s.stop("signet-ca", syscall.SIGTERM)
	move("folder", steps([]func() bool{file("state.db.migrating"), file("log"), file("state.db")}, key("s/moved"), file("log.migrating"))...)
	if out := s.refuses(t); !strings.Contains(out, "moved") && !strings.Contains(out, "state of its own") {
		t.Errorf("where it was it says: %s", out)
	}
	s.write("signet-ca.yaml", string(plain))
	s.start("signet-ca")
	verify()
	issue()
	s.stop("signet-ca", syscall.SIGTERM)
	if out, err := exec.CommandContext(t.Context(), filepath.Join(s.bin, "signet-ca"), "verify-store", "--config", filepath.Join(s.dir, "signet-ca.yaml")).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	s.stop("signet-agent", syscall.SIGTERM)
}
