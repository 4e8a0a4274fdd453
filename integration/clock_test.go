package integration_test

import (
	"encoding/json"
	"io"
	"net/http"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/storage"
)

// TestARefusedClock: real programs, and a state that says that it was later already. The
// authority starts and is not ready, says what to do, and signs when an operator has done
// it, over its socket or with the flag; the agent recovers by itself.
func TestARefusedClock(t *testing.T) {
	s := newStandalone(t, programs(t), 1, "")
	state := filepath.Join(s.dir, "ca/authority/state.db")
	later := func(by time.Duration) {
		s.stop("signet-ca", syscall.SIGTERM)
		db, err := storage.OpenBolt(state, storage.BoltOptions{MustExist: true})
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(map[string]any{"version": 1, "time": time.Now().Add(by).UTC()})
		if err == nil {
			_, err = db.Commit(t.Context(), nil, []storage.Op{{Key: "clock", Value: b}})
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	get := func(path string) string {
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
			if resp, err := http.Get("http://" + s.http["signet-ca"] + path); err == nil {
				b, _ := io.ReadAll(resp.Body)
				resp.Body.Close()
				return string(b)
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s does not answer\n%s", path, s.procs["signet-ca"].log.String())
			}
		}
	}
	record := regexp.MustCompile(`--accept-clock (\d+)`)
	for _, flag := range []bool{false, true} {
		later(time.Hour)
		s.launch("signet-ca")
		var said []string
		until(t, "readiness says what to do", func() bool { said = record.FindStringSubmatch(get("/readyz")); return said != nil })
		if !strings.Contains(get("/metrics"), "signet_ca_clock 2") {
			t.Error("the metric does not say it")
		}
		if flag {
			s.stop("signet-ca", syscall.SIGTERM)
			yaml := filepath.Join(s.dir, "signet-ca.yaml")
			p := &process{cmd: exec.Command(filepath.Join(s.bin, "signet-ca"), "serve", "--config", yaml, "--accept-clock", said[1]), done: make(chan struct{})}
			p.cmd.Stderr = &p.log
			p.run(t)
			s.procs["signet-ca"] = p
		} else if out, err := exec.Command(filepath.Join(s.bin, "signet"), "ca", "accept-clock", "--socket", filepath.Join(s.dir, "ca/admin.sock"), "--record", said[1], "--reason", "a test").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		s.waitReady("signet-ca")
		if !strings.Contains(get("/metrics"), "signet_ca_clock 0") {
			t.Error("accepted, and the metric does not say it")
		}
		s.waitReady("signet-agent")
	}
	out, err := exec.Command(filepath.Join(s.bin, "signet"), "ca", "log", "list", "--socket", filepath.Join(s.dir, "ca/admin.sock")).CombinedOutput()
	if err != nil || strings.Count(string(out), "clock-accepted") != 2 {
		t.Errorf("the log: %v\n%s", err, out)
	}
	if out, err := exec.Command(filepath.Join(s.bin, "signet"), "ca", "log", "verify", "--store", "--socket", filepath.Join(s.dir, "ca/admin.sock")).CombinedOutput(); err != nil {
		t.Errorf("verification: %v\n%s", err, out)
	}
	t.Log("note: real programs, state an hour ahead of the clock: not ready, nothing signed; accepted 2 times, over the socket and with the flag, recorded 2 times, verified")
}
