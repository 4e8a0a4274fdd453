package integration_test

import (
	"context"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestAPodThatHoldsTheSocketsFolder: every pod can open the folder of the agent's socket
// and lock it. The next agent starts all the same, with a folder for its state and
// without.
func TestAPodThatHoldsTheSocketsFolder(t *testing.T) {
	t.Parallel()
	state, err := os.MkdirTemp("/dev/shm", "signet-socket-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(state) })
	for _, dir := range []string{"", state} {
		s := newStandalone(t, programs(t), 1, "")
		// It is the test's configuration with another folder.
		path := filepath.Join(s.dir, "signet-agent.yaml")
		config, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		s.write("signet-agent.yaml", strings.Replace(string(config), `stateDir: ""`, `stateDir: "`+dir+`"`+"\nallowSwap: true", 1))
		for _, how := range []int{syscall.LOCK_SH, syscall.LOCK_EX} {
			// The pod has it while the agent runs, or gets it when the agent ends.
			pod, err := os.Open(s.dir + "/sock")
			if err != nil {
				t.Fatal(err)
			}
			locked := make(chan error, 1)
			go func() { locked <- syscall.Flock(int(pod.Fd()), how) }()
			s.stop("signet-agent", syscall.SIGTERM)
			if err := <-locked; err != nil {
				t.Fatal(err)
			}
			s.start("signet-agent")
			pod.Close()
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if r, err := fetch(s.as(ctx, 0), s.dial(), "default"); err != nil || len(r.GetResources()) == 0 {
			t.Errorf("%v, %v", r, err)
		}
	}
}

// TestASocketIsForOneAgent: another agent of the same socket is refused, whatever folder
// it has for its state, and takes nothing from the first.
func TestASocketIsForOneAgent(t *testing.T) {
	t.Parallel()
	s := newStandalone(t, programs(t), 1, "")
	s.http["signet-agent@b"] = freeAddr(t)
	config, err := os.ReadFile(filepath.Join(s.dir, "signet-agent.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	s.write("signet-agent@b.yaml", strings.Replace(string(config), s.http["signet-agent"], s.http["signet-agent@b"], 1))
	s.launch("signet-agent@b")
	second := s.procs["signet-agent@b"]
	<-second.done
	if second.err == nil || !strings.Contains(second.log.String(), "another process is serving on it") {
		t.Errorf("the second agent: %v\n%s", second.err, second.log.String())
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if r, err := fetch(s.as(ctx, 0), s.dial(), "default"); err != nil || len(r.GetResources()) == 0 {
		t.Errorf("%v, %v", r, err)
	}
	resp, err := http.Get("http://" + s.http["signet-agent"] + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); err != nil || !strings.Contains(string(b), `signet_attest_connections{proven="true"} 1`) {
		t.Errorf("the agent does not count its connections (%v)", err)
	}
}
