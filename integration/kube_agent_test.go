package integration_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/integration/envoytest"
	"github.com/signet-mesh/signet/integration/kubetest"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	security "istio.io/api/security/v1beta1"
	typev1beta1 "istio.io/api/type/v1beta1"
	istio "istio.io/client-go/pkg/apis/security/v1"
	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// kubeNode is node-a of a cluster: signet-agent with the permissions that
// deploy/manifests give it, two pods, and an Envoy for each.
type kubeNode struct {
	*kubeCA
	tmp            string // short enough for a socket in it
	agentPod       *core.Pod
	server, client *core.Pod
	sidecars       map[string]*envoytest.Envoy
	inbound        string // address of the server's sidecar
	outbound       string // URL of the client's sidecar
}

const serverID = "spiffe://cluster.local/ns/shop/sa/server"

// newKubeNode starts an authority and an agent, each with further configuration.
func newKubeNode(tb testing.TB, c *kubetest.Cluster, moreCA, moreAgent string) *kubeNode {
	tb.Helper()
	n := prepareKubeNode(tb, c, moreCA, moreAgent)
	n.start("signet-agent")
	return n
}

// prepareKubeNode does everything but start the agent.
func prepareKubeNode(tb testing.TB, c *kubetest.Cluster, moreCA, moreAgent string) *kubeNode {
	tb.Helper()
	envoytest.Path(tb)
	n := &kubeNode{kubeCA: newKubeCA(tb, programs(tb), c, moreCA), sidecars: map[string]*envoytest.Envoy{}}
	n.http["signet-agent"] = freeAddr(tb)
	state := ""
	for dir, to := range map[string]*string{"": &n.tmp, "/dev/shm": &state} {
		made, err := os.MkdirTemp(dir, "kube-")
		if err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(func() { _ = os.RemoveAll(made) })
		*to = made
	}
	if err := os.Chmod(state, 0o700); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if tb.Failed() {
			for name, p := range n.procs {
				log := p.log.String()
				tb.Logf("end of the log of %s:\n%s", name, log[max(0, len(log)-6000):])
			}
		}
	})
	c.Node(tb, "node-a")
	c.Node(tb, "node-b")
	n.agentPod = n.kubeCA.agentPod("node-a")
	n.server = c.Pod(tb, kubetest.PodSpec{Namespace: "shop", ServiceAccount: "server", Node: "node-a", Labels: map[string]string{"app": "server"}})
	n.client = c.Pod(tb, kubetest.PodSpec{Namespace: "shop", ServiceAccount: "client", Node: "node-a"})
	n.putToken("agent-token", c.Token(tb, n.agentPod, "signet-ca", time.Hour))
	n.mountTrust()
	n.write("signet-agent.yaml", fmt.Sprintf("socket: %s/agent.sock\nstateDir: %s\nca: {addresses: [%q], rootFile: %s/root.pem, tokenFile: %s/agent-token}\n"+
		"http: {listen: %q}\nkubernetes: {enabled: true, kubeconfig: %s}\nnode: node-a\n%s",
		n.tmp, state, n.caAddr, n.dir, n.dir, n.http["signet-agent"], c.Kubeconfig(tb, c.As(tb, "signet-system", "signet-agent")), moreAgent))
	return n
}

// mountTrust does what kubelet does with the ConfigMap signet-trust.
func (n *kubeNode) mountTrust() {
	n.tb.Helper()
	n.roots() // waits for it
	m, err := n.cluster.Kube.CoreV1().ConfigMaps("signet-system").Get(n.tb.Context(), "signet-trust", metav1.GetOptions{})
	if err != nil {
		n.tb.Fatal(err)
	}
	n.putToken("root.pem", m.Data["root.pem"])
}

// putToken replaces a file whole, as kubelet does.
func (n *kubeNode) putToken(name, token string) {
	n.tb.Helper()
	n.write(name+".new", token)
	if err := os.Rename(filepath.Join(n.dir, name+".new"), filepath.Join(n.dir, name)); err != nil {
		n.tb.Fatal(err)
	}
}

// sidecars starts both Envoys, with tokens of that lifetime, and waits until the
// server answers through them.
func (n *kubeNode) startSidecars(lifetime time.Duration) {
	n.tb.Helper()
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello\n") }))
	n.tb.Cleanup(app.Close)
	n.rotateTokens(lifetime)
	n.inbound = freeAddr(n.tb)
	outbound := freeAddr(n.tb)
	n.outbound = "http://" + outbound
	for name, args := range map[string][]string{
		"server": {"--inbound", n.inbound, "--app", strings.TrimPrefix(app.URL, "http://"), "--access-log"},
		"client": {"--no-inbound", "--outbound", "server=" + outbound + "," + n.inbound + "," + serverID},
	} {
		file := filepath.Join(n.dir, name+".yaml")
		cmd := exec.Command(filepath.Join(n.bin, "signet"), append([]string{"envoy", "bootstrap", "-o", file,
			"--socket", n.tmp + "/agent.sock", "--token-file", filepath.Join(n.dir, name+"-token"), "--admin", freeAddr(n.tb)}, args...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			n.tb.Fatalf("%v: %s", err, out)
		}
		n.sidecars[name] = envoytest.Start(n.tb, file)
	}
	n.becomes(200, "/hello")
}

// rotateTokens gives both sidecars new tokens. The API server's own are good for ten
// minutes at least; shorter ones are signed with its key.
func (n *kubeNode) rotateTokens(lifetime time.Duration) {
	n.tb.Helper()
	for name, pod := range map[string]*core.Pod{"server": n.server, "client": n.client} {
		if lifetime >= 10*time.Minute {
			n.putToken(name+"-token", n.cluster.Token(n.tb, pod, "signet", lifetime))
		} else {
			n.putToken(name+"-token", n.cluster.Sign(n.tb, pod, "signet", lifetime, nil))
		}
	}
}

// requests is a client of the sidecars.
var requests = &http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true,
	TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}

// get is the status of a GET through both sidecars, 0 without an answer.
func (n *kubeNode) get(path string) int { return get(n.outbound + path) }

// plain is the status of a GET that goes around the client's sidecar.
func (n *kubeNode) plain(path string) int { return get("http://" + n.inbound + path) }

func get(url string) int {
	resp, err := requests.Get(url)
	if err != nil {
		return 0
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode
}

// becomes waits for a status and returns how long that took.
func (n *kubeNode) becomes(want int, path string) time.Duration {
	n.tb.Helper()
	return becomes(n.tb, want, path, n.get)
}

func becomes(tb testing.TB, want int, path string, get func(string) int) time.Duration {
	tb.Helper()
	began := time.Now()
	for {
		got := get(path)
		if got == want {
			return time.Since(began)
		}
		if time.Since(began) > time.Minute {
			tb.Fatalf("GET %s: %d, want %d", path, got, want)
		}
		// The time that a change takes is told to a few milliseconds; an outage is not
		// asked five hundred times a second.
		if time.Since(began) < time.Second {
			time.Sleep(2 * time.Millisecond)
		} else {
			time.Sleep(20 * time.Millisecond)
		}
	}
}

// traffic is a stream of requests that must all be answered alike.
type traffic struct {
	stop  func() (good int, bad []string)
	count atomic.Int64
}

// load sends requests for a path until stop, each of which must get the status.
func (n *kubeNode) load(path string, want int) *traffic {
	return load(n.tb, want, func() int { return n.get(path) })
}

func load(tb testing.TB, want int, get func() int) *traffic {
	t := &traffic{}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	var mu sync.Mutex
	var bad []string
	for range 2 {
		wg.Go(func() {
			for ctx.Err() == nil {
				if got := get(); got == want {
					t.count.Add(1)
				} else {
					mu.Lock()
					bad = append(bad, fmt.Sprintf("%d at %s", got, time.Now().Format(time.TimeOnly)))
					mu.Unlock()
				}
				select {
				case <-ctx.Done():
				case <-time.After(25 * time.Millisecond):
				}
			}
		})
	}
	t.stop = sync.OnceValues(func() (int, []string) {
		cancel()
		wg.Wait()
		return int(t.count.Load()), bad
	})
	tb.Cleanup(func() { t.stop() })
	return t
}

// held ends the traffic and fails the test if a request was answered otherwise.
func (t *traffic) held(tb testing.TB, what string) {
	tb.Helper()
	good, bad := t.stop()
	if len(bad) > 0 || good == 0 {
		tb.Errorf("%s: %d requests were answered as they should be, %d were not: %.300v", what, good, len(bad), bad)
		return
	}
	tb.Logf("%s: %d requests, none failed", what, good)
}

// secret asks the agent for the SVID as the bearer of a token: the SPIFFE ID, or the
// status.
func (n *kubeNode) secret(token string) error {
	n.tb.Helper()
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(n.tb.Context(), "authorization", "Bearer "+token), time.Minute)
	defer cancel()
	s := &standalone{tb: n.tb, dir: n.tmp}
	_, err := fetch(ctx, s.dialAt(n.tmp+"/agent.sock"), "default")
	return err
}

// policy for the server's pod.
func (n *kubeNode) policy(name string, action security.AuthorizationPolicy_Action, rule *security.Rule) *istio.AuthorizationPolicy {
	return &istio.AuthorizationPolicy{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "shop"}, Spec: security.AuthorizationPolicy{
		Selector: &typev1beta1.WorkloadSelector{MatchLabels: map[string]string{"app": "server"}}, Action: action, Rules: []*security.Rule{rule},
	}}
}

func paths(paths ...string) *security.Rule {
	return &security.Rule{To: []*security.Rule_To{{Operation: &security.Operation{Paths: paths}}}}
}

func (n *kubeNode) create(p *istio.AuthorizationPolicy) {
	n.tb.Helper()
	if _, err := n.cluster.Istio.SecurityV1().AuthorizationPolicies(p.Namespace).Create(n.tb.Context(), p, metav1.CreateOptions{}); err != nil {
		n.tb.Fatal(err)
	}
}

// TestDemoOnKubernetes is the demo's table on a real API server, with policies as
// custom resources. It is not parallel: a request waits only some seconds for an
// agent that restarts.
func TestDemoOnKubernetes(t *testing.T) {
	c := kubetest.Start(t, kubetest.Options{})
	n := newKubeNode(t, c, "svid: {ttl: 16s, minTTL: 5s}\n", "")
	n.startSidecars(10 * time.Minute)
	row := func(name, format string, args ...any) {
		t.Helper()
		t.Logf("%-14s %s", name, fmt.Sprintf(format, args...))
	}
	rows := func(name string, f func(t *testing.T)) {
		t.Helper()
		if !t.Run(name, f) {
			t.Errorf("row %s did not hold", name)
		}
	}
	policies := c.Istio.SecurityV1()

	rows("identity", func(t *testing.T) {
		resp, err := http.Get("http://" + n.sidecars["server"].Admin() + "/certs")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil || !strings.Contains(string(b), serverID) {
			t.Errorf("the server's Envoy has %s, %v", b, err)
		}
	})
	rows("mtls", func(t *testing.T) {
		if got := n.get("/hello"); got != 200 {
			t.Errorf("GET /hello: %d", got)
		}
	})
	rows("allow", func(t *testing.T) {
		began := time.Now()
		allow := paths("/hello", "/admin")
		allow.From = []*security.Rule_From{{Source: &security.Source{Principals: []string{"cluster.local/ns/shop/sa/client"}}}}
		n.create(n.policy("allow", security.AuthorizationPolicy_ALLOW, allow))
		asked := time.Since(began)
		becomes(t, 403, "/other", n.get)
		row("allow", "a policy was enforced by Envoy %v after it was asked for; the API server took %v of that", time.Since(began).Round(time.Millisecond), asked.Round(time.Millisecond))
		if got := n.get("/hello"); got != 200 {
			t.Errorf("GET /hello as the client: %d, want 200", got)
		}
		if got := n.plain("/hello"); got != 403 {
			t.Errorf("GET /hello as nobody: %d, want 403", got)
		}
	})
	rows("deny", func(t *testing.T) {
		began := time.Now()
		n.create(n.policy("deny", security.AuthorizationPolicy_DENY, paths("/admin")))
		becomes(t, 403, "/admin", n.get)
		row("deny", "enforced after %v", time.Since(began).Round(time.Millisecond))
	})
	rows("edit", func(t *testing.T) {
		p, err := policies.AuthorizationPolicies("shop").Get(t.Context(), "deny", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		p.Spec.Rules = []*security.Rule{paths("/hello")}
		began := time.Now()
		if _, err := policies.AuthorizationPolicies("shop").Update(t.Context(), p, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		becomes(t, 403, "/hello", n.get)
		row("edit", "enforced after %v", time.Since(began).Round(time.Millisecond))
		began = time.Now()
		if err := policies.AuthorizationPolicies("shop").Delete(t.Context(), "deny", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		becomes(t, 200, "/hello", n.get)
		row("removal", "counted after %v", time.Since(began).Round(time.Millisecond))
	})
	rows("strict", func(t *testing.T) {
		if err := policies.AuthorizationPolicies("shop").Delete(t.Context(), "allow", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		becomes(t, 200, "/hello", n.plain)
		strict := &istio.PeerAuthentication{ObjectMeta: metav1.ObjectMeta{Name: "default", Namespace: "istio-system"},
			Spec: security.PeerAuthentication{Mtls: &security.PeerAuthentication_MutualTLS{Mode: security.PeerAuthentication_MutualTLS_STRICT}}}
		c.Namespace(t, "istio-system")
		if _, err := policies.PeerAuthentications("istio-system").Create(t.Context(), strict, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		becomes(t, 403, "/hello", n.plain)
		if got := n.get("/hello"); got != 200 {
			t.Errorf("GET /hello over mutual TLS: %d", got)
		}
	})
	rows("tokens", func(t *testing.T) {
		other := c.Pod(t, kubetest.PodSpec{Namespace: "shop", ServiceAccount: "db", Node: "node-b"})
		for name, token := range map[string]string{
			"other-node": c.Token(t, other, "signet", 10*time.Minute),
			"audience":   c.Token(t, n.client, "signet-ca", 10*time.Minute),
			"unbound":    c.UnboundToken(t, "shop", "client", "signet", 10*time.Minute),
			"issuer":     c.Sign(t, n.client, "signet", time.Minute, func(claims map[string]any) { claims["iss"] = "https://elsewhere.test" }),
			"expired": c.Sign(t, n.client, "signet", time.Minute, func(claims map[string]any) {
				claims["exp"], claims["iat"] = time.Now().Add(-time.Second).Unix(), time.Now().Add(-time.Minute).Unix()
			}),
		} {
			if err := n.secret(token); status.Code(err) != codes.Unauthenticated {
				t.Errorf("%s: %v, want Unauthenticated", name, err)
			}
		}
		if err := n.secret(c.Token(t, n.client, "signet", 10*time.Minute)); err != nil {
			t.Errorf("a good one: %v", err)
		}
	})
	rows("rotation", func(t *testing.T) {
		load := n.load("/hello", 200)
		updates := func() (sum int64) {
			for name, value := range n.sidecars["server"].Stats(t) {
				if strings.HasSuffix(name, "sds.default.update_success") {
					sum += value
				}
			}
			return sum
		}
		before := updates()
		kubetest.Poll(t, "two renewals", func() error {
			if now := updates(); before == 0 || now < before+2 {
				return fmt.Errorf("Envoy took %d secrets, %d before", now, before)
			}
			return nil
		})
		load.held(t, "two renewals under traffic")
	})
	rows("agent-restart", func(t *testing.T) {
		load := n.load("/hello", 200)
		away := time.Duration(0)
		for _, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGKILL, syscall.SIGTERM} {
			began := time.Now()
			n.stop("signet-agent", signal)
			n.start("signet-agent")
			n.becomes(200, "/hello")
			away = max(away, time.Since(began))
		}
		// A proxy waits three seconds for an agent. On a machine that takes longer to
		// start one, requests are denied, and nothing else.
		if away < 2500*time.Millisecond {
			load.held(t, "the agent killed twice and restarted once")
			return
		}
		good, bad := load.stop()
		t.Logf("note: the agent was away for %v, longer than proxies wait: %d requests were answered, %d denied", away, good, len(bad))
		if good == 0 || slices.ContainsFunc(bad, func(s string) bool { return !strings.HasPrefix(s, "403 ") }) {
			t.Errorf("%d requests were answered; not denied, but wrong: %.300v", good, bad)
		}
	})
	rows("ca-restart", func(t *testing.T) {
		load := n.load("/hello", 200)
		n.kubeCA.stop("signet-ca", syscall.SIGKILL)
		n.kubeCA.start("signet-ca")
		load.held(t, "the authority killed and restarted")
	})
	rows("informer-lag", func(t *testing.T) {
		// What the agent hears of pods comes two seconds late.
		authority := n.procs["signet-ca"].cmd.Process
		if err := authority.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		fresh := c.Pod(t, kubetest.PodSpec{Namespace: "shop", ServiceAccount: "fresh", Node: "node-a"})
		token := c.Token(t, fresh, "signet", 10*time.Minute)
		if err := n.secret(token); status.Code(err) != codes.Unauthenticated {
			t.Errorf("a token of a pod that is not in the view: %v", err)
		}
		time.Sleep(2 * time.Second)
		if err := authority.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		kubetest.Poll(t, "an SVID for the new pod", func() error { return n.secret(token) })
		row("informer-lag", "an SVID %v after the view caught up", time.Since(began).Round(time.Millisecond))
	})
	rows("other-pod-gone", func(t *testing.T) {
		token := c.Token(t, n.client, "signet", 10*time.Minute)
		c.DeletePod(t, n.client)
		kubetest.Poll(t, "a deleted pod's token to be refused", func() error {
			if err := n.secret(token); status.Code(err) != codes.Unauthenticated {
				return errors.New("it is good")
			}
			return nil
		})
	})
}
