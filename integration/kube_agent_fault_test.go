package integration_test

import (
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/integration/kubetest"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	security "istio.io/api/security/v1beta1"
)

// stateDir is where the agent keeps its state.
func (n *kubeNode) stateDir() string {
	n.tb.Helper()
	b, err := os.ReadFile(filepath.Join(n.dir, "signet-agent.yaml"))
	if err != nil {
		n.tb.Fatal(err)
	}
	_, after, _ := strings.Cut(string(b), "stateDir: ")
	dir, _, _ := strings.Cut(after, "\n")
	return dir
}

// unready waits until readiness of the agent says something.
func (n *kubeNode) unready(says string) {
	n.tb.Helper()
	kubetest.Poll(n.tb, "the agent to say "+says, func() error {
		resp, err := requests.Get("http://" + n.http["signet-agent"] + "/readyz")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err == nil && (resp.StatusCode != http.StatusServiceUnavailable || !strings.Contains(string(b), says)) {
			err = fmt.Errorf("it says %s: %s", resp.Status, b)
		}
		return err
	})
}

// metric is the value of a metric of the agent without labels.
func (n *kubeNode) metric(name string) string {
	n.tb.Helper()
	resp, err := requests.Get("http://" + n.http["signet-agent"] + "/metrics")
	if err != nil {
		n.tb.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		n.tb.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			return strings.TrimSpace(value)
		}
	}
	n.tb.Fatalf("there is no metric %s", name)
	return ""
}

// TestOutagesOnKubernetes takes the API server and etcd away, under traffic, for
// longer than tokens and SVIDs live. It is not parallel, as it asserts that no request
// fails.
func TestOutagesOnKubernetes(t *testing.T) {
	c := kubetest.Start(t, kubetest.Options{})
	n := newKubeNode(t, c, "svid: {ttl: 12s, minTTL: 5s}\n", "")
	n.startSidecars(10 * time.Minute)
	n.create(n.policy("deny", security.AuthorizationPolicy_DENY, paths("/admin")))
	n.becomes(403, "/admin")

	// Tokens that are good for seconds, as if kubelet were about to replace them.
	const life = 16 * time.Second
	var used, unused string
	for tries := 1; ; tries++ {
		n.rotateTokens(life)
		used, unused = c.Sign(t, n.client, "signet", life, nil), c.Sign(t, n.client, "signet", life, nil)
		expired := time.Now().Add(life - time.Second)
		if err := n.secret(used); err != nil {
			t.Fatal(err)
		}
		// New streams, with these tokens.
		n.stop("signet-agent", syscall.SIGTERM)
		n.start("signet-agent")
		for n.get("/hello") != 200 && time.Now().Before(expired) {
			time.Sleep(20 * time.Millisecond)
		}
		if time.Now().Before(expired) {
			break
		}
		// A busy machine may not start an agent within the life of such a token.
		if tries == 5 {
			t.Fatalf("%d times the sidecars' streams were not there again within %v", tries, life)
		}
	}
	allowed, denied := n.load("/hello", 200), n.load("/admin", 403)

	c.APIServer.Kill(t)
	expired := time.Now().Add(life)
	n.unready("policies")
	time.Sleep(time.Until(expired) + life/2) // tokens have expired, SVIDs were renewed
	if err := n.secret(used); err != nil {
		t.Errorf("a token that was accepted before it expired: %v", err)
	}
	if err := n.secret(unused); status.Code(err) != codes.Unauthenticated {
		t.Errorf("a token first seen expired: %v", err)
	}
	allowed.held(t, "the API server away for longer than tokens and SVIDs live")
	denied.held(t, "denied meanwhile")

	// Both restart in the outage; Envoy's streams come back with expired tokens, and
	// the policies are the saved ones.
	n.stop("signet-agent", syscall.SIGKILL)
	n.launch("signet-agent")
	took := n.becomes(200, "/hello")
	n.becomes(403, "/admin")
	t.Logf("the agent killed in the outage: answers again after %v", took.Round(time.Millisecond))
	allowed, denied = n.load("/hello", 200), n.load("/admin", 403)
	if err := n.secret(used); err != nil {
		t.Errorf("after a restart, a token that was accepted before it expired: %v", err)
	}
	if err := n.secret(unused); status.Code(err) != codes.Unauthenticated {
		t.Errorf("after a restart, a token first seen expired: %v", err)
	}
	if age := n.metric("signet_source_age_seconds"); age == "0" || age == "+Inf" {
		t.Errorf("the age of the policies is %s", age)
	}
	n.unready("stay in force")

	// Back, with another serving certificate: kubelet rotates, policies count.
	c.NewServingCertificate(t)
	c.APIServer.Start(t)
	n.rotateTokens(10 * time.Minute)
	n.waitReady("signet-agent")
	n.create(n.policy("deny-too", security.AuthorizationPolicy_DENY, paths("/secret")))
	n.becomes(403, "/secret")

	// etcd goes and comes back.
	c.Etcd.Kill(t)
	time.Sleep(time.Second)
	c.Etcd.Start(t)
	c.APIServer.WaitReady(t)
	n.create(n.policy("deny-three", security.AuthorizationPolicy_DENY, paths("/three")))
	n.becomes(403, "/three")
	allowed.held(t, "the API server back with another certificate, etcd killed and back")
	denied.held(t, "denied meanwhile")

	// An agent that has nothing saved and nobody to ask gives nothing away.
	n.stop("signet-agent", syscall.SIGTERM)
	if err := os.RemoveAll(n.stateDir()); err != nil {
		t.Fatal(err)
	}
	fresh := c.Token(t, n.client, "signet", 10*time.Minute)
	c.APIServer.Kill(t)
	n.launch("signet-agent")
	n.unready("every check is denied")
	if got := n.get("/hello"); got == 200 {
		t.Errorf("GET /hello is allowed by an agent that knows nothing")
	}
	if err := n.secret(fresh); err == nil {
		t.Error("a secret from an agent that knows nothing")
	}
	c.APIServer.Start(t)
	n.waitReady("signet-agent")
	n.becomes(200, "/hello")
	n.becomes(403, "/admin")
}

// killAgentFor is how long the agent is killed again and again; make soak takes
// longer.
var killAgentFor = flag.Duration("kill-agent", 5*time.Second, "how long TestAgentKilledUnderIssuance kills the agent")

// TestAgentKilledUnderIssuance kills the agent at random moments while SVIDs are
// renewed all the time. Every invariant holds after each restart.
func TestAgentKilledUnderIssuance(t *testing.T) {
	c := kubetest.Start(t, kubetest.Options{})
	n := newKubeNode(t, c, "svid: {ttl: 5s, minTTL: 2s}\n", "")
	n.startSidecars(10 * time.Minute)
	n.create(n.policy("deny", security.AuthorizationPolicy_DENY, paths("/admin")))
	n.becomes(403, "/admin")
	seed := time.Now().UnixNano()
	random := rand.New(rand.NewPCG(uint64(seed), 0))
	t.Logf("seed %d", seed)

	kills := 0
	for end := time.Now().Add(*killAgentFor); time.Now().Before(end); kills++ {
		time.Sleep(time.Duration(random.Int64N(int64(700 * time.Millisecond))))
		n.stop("signet-agent", syscall.SIGKILL)
		n.launch("signet-agent")
		if random.IntN(3) > 0 {
			continue // again at once, perhaps before it listens
		}
		n.invariants()
	}
	n.waitReady("signet-agent")
	n.invariants()
	if kills == 0 {
		t.Error("nothing was killed")
	}
	n.kubeCA.stop("signet-ca", syscall.SIGTERM)
	out, err := exec.Command(filepath.Join(n.bin, "signet-ca"), "verify-store", "--config", filepath.Join(n.dir, "signet-ca.yaml")).CombinedOutput()
	if err != nil {
		t.Errorf("the authority's state and log: %v\n%s", err, out)
	}
	t.Logf("%d kills; signet-ca verify-store says %s", kills, out)
}

// invariants are what holds a moment after each restart: what is allowed is, what is
// denied is, and what Envoy holds is the server's, valid, by the authority.
func (n *kubeNode) invariants() {
	n.tb.Helper()
	n.becomes(200, "/hello")
	n.becomes(403, "/admin")
	kubetest.Poll(n.tb, "a valid certificate in Envoy", func() error {
		b, err := n.served()
		if err != nil {
			return err
		}
		if !strings.Contains(b, serverID) {
			return fmt.Errorf("Envoy has %s", b)
		}
		return nil
	})
	if log := n.procs["signet-agent"].log.String(); strings.Contains(log, "saved state is not used") || strings.Contains(log, "panic") {
		n.tb.Errorf("the agent says:\n%s", log)
	}
	if _, err := os.Stat(filepath.Join(n.stateDir(), "state")); err != nil {
		n.tb.Error(err)
	}
}

// served is what the server's Envoy says of its certificates.
func (n *kubeNode) served() (string, error) {
	resp, err := requests.Get("http://" + n.sidecars["server"].Admin() + "/certs")
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}
