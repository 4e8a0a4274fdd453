package integration_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// ban runs signet ca ban.
func (s *standalone) ban(verb, subject string, args ...string) string {
	s.tb.Helper()
	return s.signet(append([]string{"ca", "ban", verb, "--socket", s.dir + "/ca/admin.sock", subject, "--reason", "a stolen laptop"}, args...)...)
}

// TestABanIsEnforcedByEnvoyAtOnce: a SPIFFE ID is banned fifty times while it sends
// requests; each time the seconds from the start of the command to the first 403 are
// taken. Another identity goes on all the time.
func TestABanIsEnforcedByEnvoyAtOnce(t *testing.T) {
	t.Parallel()
	s := newStandalone(t, programs(t), 3, "")
	ask, inbound := s.pairAt()
	becomes(t, 200, "/", func(string) int { return ask() })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	other := s.ownSVID(ctx, s.dial(), 2)
	others := load(t, 200, func() int { time.Sleep(50 * time.Millisecond); code, _ := over(inbound, other); return code })
	const who = "spiffe://cluster.local/ns/default/sa/w1"
	var took []time.Duration
	for i := range 50 {
		first := make(chan time.Time, 1)
		go func() {
			for ctx.Err() == nil {
				if ask() == 403 {
					first <- time.Now()
					return
				}
				time.Sleep(2 * time.Millisecond) // the pace of the traffic
			}
		}()
		began := time.Now()
		out := s.ban("add", who, "--output", "json", "--wait", "1m")
		select {
		case at := <-first:
			took = append(took, at.Sub(began))
		case <-ctx.Done():
			t.Fatal("there was no 403")
		}
		var said struct {
			Agents []struct{ Enforces bool }
			Ban    struct{ Subject, Reason string }
		}
		if err := json.Unmarshal([]byte(out), &said); err != nil || len(said.Agents) != 1 || !said.Agents[0].Enforces || said.Ban.Subject != who {
			t.Fatalf("the command prints %s: %v", out, err)
		}
		if i == 49 {
			break // stays banned
		}
		s.ban("remove", who)
		until(t, "requests are allowed again", func() bool { return ask() == 200 })
	}
	slices.Sort(took)
	t.Logf("from the command to the first 403, of %d: p50 %.3f s, p99 %.3f s, longest %.3f s", len(took),
		took[len(took)/2].Seconds(), took[len(took)*99/100].Seconds(), took[len(took)-1].Seconds())
	others.held(t, "another identity, meanwhile")
	if log := s.procs["signet-agent"].log.String(); !strings.Contains(log, "reason=banned") || !strings.Contains(log, who) {
		t.Error("the agent's log does not name the ban")
	}
	resp, err := http.Get("http://" + s.http["signet-agent"] + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	m, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || !strings.Contains(string(m), `signet_extauthz_checks_total{decision="deny",kind="Ban",reason="banned"}`) {
		t.Error("the agent's metrics do not count the ban")
	}
	// Its SVID is not renewed, and no other is issued.
	if _, err := fetch(s.as(shortly(t), 1), s.dial(), "default"); err == nil {
		t.Log("the agent still hands out what it holds, until that expires")
	}
	t.Logf("list prints\n%s", s.signet("ca", "ban", "list", "--socket", s.dir+"/ca/admin.sock"))
	t.Logf("add prints\n%s", s.ban("add", who, "--expires", "24h"))
	t.Logf("a node: add prints\n%s", s.ban("add", "node/nowhere"))
	t.Logf("a certificate: add prints\n%s", s.ban("add", fmt.Sprintf("serial/%x", other.Leaf.SerialNumber)))
	// That one was never named, its certificate is.
	until(t, "the certificate is denied", func() bool { code, _ := over(inbound, other); return code == 403 })
}

// shortly is a context of some seconds.
func shortly(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// TestBansSurviveRestarts: of the authority; and of the agent, while the authority is
// away. They end when they were told to, also then.
func TestBansSurviveRestarts(t *testing.T) {
	t.Parallel()
	state, err := os.MkdirTemp("/dev/shm", "signet-ban-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(state) })
	s := newStandalone(t, programs(t), 2, "", func(s *standalone) {
		s.before = func() {
			b, err := os.ReadFile(filepath.Join(s.dir, "signet-agent.yaml"))
			if err != nil {
				t.Fatal(err)
			}
			s.write("signet-agent.yaml", strings.Replace(string(b), `stateDir: ""`, "stateDir: "+state+"/state\nallowSwap: true", 1))
		}
	})
	ask, _ := s.pairAt()
	becomes(t, 200, "/", func(string) int { return ask() })
	s.ban("add", "spiffe://cluster.local/ns/default/sa/w1")
	until(t, "it is denied", func() bool { return ask() == 403 })
	s.stop("signet-ca", syscall.SIGKILL)
	s.start("signet-ca")
	if out := s.signet("ca", "ban", "list", "--socket", s.dir+"/ca/admin.sock", "-o", "json"); !strings.Contains(out, "a stolen laptop") {
		t.Errorf("after its restart the authority knows\n%s", out)
	}
	until(t, "the state is saved", func() bool {
		b, err := os.ReadFile(state + "/state/state")
		// It is in JSON, in base64, from some byte on.
		found := false
		for skip := range 3 {
			text := strings.TrimRight(base64.StdEncoding.EncodeToString([]byte(strings.Repeat("x", skip)+"a stolen laptop")), "=")
			found = found || strings.Contains(string(b), text[4:16])
		}
		return err == nil && found
	})
	s.stop("signet-ca", syscall.SIGTERM)
	s.stop("signet-agent", syscall.SIGKILL)
	s.launch("signet-agent")
	// However long a busy machine takes to start it.
	until(t, "the agent denies by what it saved", func() bool {
		if code := ask(); code == 200 {
			t.Fatal("an agent that starts without the authority allows what is banned")
		}
		return strings.Contains(s.procs["signet-agent"].log.String(), "reason=banned")
	})
	for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if code := ask(); code == 200 {
			t.Fatal("an agent that has started without the authority allows what is banned")
		}
	}
	s.start("signet-ca")
	s.ban("add", "spiffe://cluster.local/ns/default/sa/w1", "--expires", "2s")
	until(t, "the ban is over", func() bool { return ask() == 200 })
}
