package integration_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/integration/kubetest"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	security "istio.io/api/security/v1beta1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// volume is a folder as kubelet mounts a ConfigMap or a projected volume: each file is
// a link into ..data, which is itself a link that is replaced at once.
type volume struct {
	tb  testing.TB
	dir string
	n   int
}

func newVolume(tb testing.TB, files map[string]string) *volume {
	tb.Helper()
	v := &volume{tb: tb, dir: tb.TempDir()}
	v.put(files)
	for name := range files {
		if err := os.Symlink(filepath.Join("..data", name), filepath.Join(v.dir, name)); err != nil {
			tb.Fatal(err)
		}
	}
	return v
}

// put replaces all files at once.
func (v *volume) put(files map[string]string) {
	v.tb.Helper()
	v.n++
	next, link := fmt.Sprintf("..%d", v.n), filepath.Join(v.dir, "..data_tmp")
	err := os.Mkdir(filepath.Join(v.dir, next), 0o700)
	for name, text := range files {
		err = errors.Join(err, os.WriteFile(filepath.Join(v.dir, next, name), []byte(text), 0o600))
	}
	err = errors.Join(err, os.Symlink(next, link), os.Rename(link, filepath.Join(v.dir, "..data")))
	if v.n > 1 {
		err = errors.Join(err, os.RemoveAll(filepath.Join(v.dir, fmt.Sprintf("..%d", v.n-1))))
	}
	if err != nil {
		v.tb.Fatal(err)
	}
}

// TestInPods runs the authority and the agent with what Kubernetes gives to a pod and
// nothing else: the two variables, the folder of the service account, the projected
// token and the ConfigMap of roots, each as kubelet mounts it. All of these change
// while both run.
func TestInPods(t *testing.T) {
	t.Parallel()
	c := kubetest.Start(t, kubetest.Options{})
	c.Apply(t, "../deploy/manifests")
	at, err := url.Parse(c.URL)
	if err != nil {
		t.Fatal(err)
	}
	roots := string(must(os.ReadFile(c.CAFile)))
	// A token that is bound to a pod of the account ends with that pod.
	holder := func(account, name string) (token string, end func()) {
		t.Helper()
		p := c.Pod(t, kubetest.PodSpec{Namespace: "signet-system", ServiceAccount: account, Node: "node-a", Name: name})
		return c.Token(t, p, kubetest.APIAudience, time.Hour), func() { c.DeletePod(t, p) }
	}
	c.Node(t, "node-a")
	credentials := func(token string) map[string]string {
		return map[string]string{"token": token, "ca.crt": roots, "namespace": "signet-system"}
	}
	caToken, endCA := holder("signet-ca", "signet-ca-0")
	agentToken, endAgent := holder("signet-agent", "first")
	caAccount, agentAccount := newVolume(t, credentials(caToken)), newVolume(t, credentials(agentToken))

	k := kubeCAWith(t, programs(t), c, "serviceAccountDir: "+caAccount.dir, "")
	k.env = []string{"KUBERNETES_SERVICE_HOST=" + at.Hostname(), "KUBERNETES_SERVICE_PORT=" + at.Port()}
	k.start("signet-ca")
	k.roots() // waits for the ConfigMap
	trust, err := c.Kube.CoreV1().ConfigMaps("signet-system").Get(t.Context(), "signet-trust", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}

	// The agent finds the root of another authority in the ConfigMap first.
	_, strange := selfSigned(t)
	mounted := newVolume(t, map[string]string{"root.pem": string(strange)})
	own := newVolume(t, map[string]string{"signet-ca": c.Token(t, k.agentPod("node-a"), "signet-ca", time.Hour)})
	tmp := must(os.MkdirTemp("", "pod-")) // short enough for a socket in it
	t.Cleanup(func() { _ = os.RemoveAll(tmp) })
	k.http["signet-agent"] = freeAddr(t)
	k.write("signet-agent.yaml", fmt.Sprintf("socket: %s/agent.sock\nstateDir: \"\"\nca: {addresses: [%q], rootFile: %s/root.pem, tokenFile: %s/signet-ca}\n"+
		"http: {listen: %q}\nkubernetes: {enabled: true, serviceAccountDir: %s}\nnode: node-a\n",
		tmp, k.caAddr, mounted.dir, own.dir, k.http["signet-agent"], agentAccount.dir))
	k.launch("signet-agent")
	says := func(want string) {
		t.Helper()
		kubetest.Poll(t, "the agent to say "+want, func() error {
			text, code, err := page("http://" + k.http["signet-agent"] + "/readyz")
			if err == nil && (code != http.StatusServiceUnavailable || !strings.Contains(text, want)) {
				err = fmt.Errorf("it says %d: %s", code, text)
			}
			return err
		})
	}
	says("the server is not an authority of cluster.local")
	began := time.Now()
	mounted.put(trust.Data)
	k.waitReady("signet-agent")
	t.Logf("ready %v after the mounted root changed", time.Since(began).Round(time.Millisecond))

	n := &kubeNode{kubeCA: k, tmp: tmp}
	web := c.Pod(t, kubetest.PodSpec{Namespace: "shop", ServiceAccount: "web", Node: "node-a", Labels: map[string]string{"app": "server"}})
	good := c.Token(t, web, "signet", time.Hour)
	kubetest.Poll(t, "a secret", func() error { return n.secret(good) })
	becomes(t, int(codes.OK), "/admin", n.checked(good))

	// Kubelet replaces both tokens; the pods that the old ones are bound to go, and a
	// new API server remembers nothing of them.
	nextCA, _ := holder("signet-ca", "signet-ca-1")
	nextAgent, _ := holder("signet-agent", "second")
	caAccount.put(credentials(nextCA))
	agentAccount.put(credentials(nextAgent))
	endCA()
	endAgent()
	c.APIServer.Kill(t)
	c.APIServer.Start(t)
	began = time.Now()
	for name, token := range map[string]string{"the authority's": caToken, "the agent's": agentToken} {
		old := c.Admin()
		old.BearerToken = token
		if _, err := must(kubernetes.NewForConfig(old)).CoreV1().Pods("").List(t.Context(), metav1.ListOptions{}); !apierrors.IsUnauthorized(err) {
			t.Errorf("%s old token: %v, want Unauthorized", name, err)
		}
	}
	fresh := c.Pod(t, kubetest.PodSpec{Namespace: "shop", ServiceAccount: "fresh", Node: "node-a"})
	token := c.Token(t, fresh, "signet", time.Hour)
	kubetest.Poll(t, "a secret for a pod that the authority sees with its new token", func() error { return n.secret(token) })
	t.Logf("the authority sees new pods %v after its token was replaced and refused", time.Since(began).Round(time.Millisecond))
	n.create(n.policy("deny", security.AuthorizationPolicy_DENY, paths("/admin")))
	becomes(t, int(codes.PermissionDenied), "/admin", n.checked(good))
	t.Logf("the agent sees new policies %v after its token was replaced and refused", time.Since(began).Round(time.Millisecond))
}

// checked asks the agent for a decision as the pod of a token: the code of its answer.
func (n *kubeNode) checked(token string) func(path string) int {
	s := &standalone{tb: n.tb}
	client := authv3.NewAuthorizationClient(s.dialAt(n.tmp + "/agent.sock"))
	return func(path string) int {
		ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(n.tb.Context(), "authorization", "Bearer "+token), time.Minute)
		defer cancel()
		answer, err := client.Check(ctx, &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
			Source: &authv3.AttributeContext_Peer{}, Destination: &authv3.AttributeContext_Peer{},
			Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{Method: "GET", Path: path, Host: "web", Scheme: "http", Protocol: "HTTP/1.1"}},
		}})
		if err != nil {
			n.tb.Fatal(err)
		}
		return int(answer.GetStatus().GetCode())
	}
}
