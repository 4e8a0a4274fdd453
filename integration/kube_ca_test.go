package integration_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/integration/kubetest"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	core "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// kubeCA is signet-ca as a process, in a cluster, with the permissions that
// deploy/manifests give it.
type kubeCA struct {
	*standalone
	cluster *kubetest.Cluster
}

// newKubeCA starts one. more is further configuration, in YAML.
func newKubeCA(tb testing.TB, bin string, c *kubetest.Cluster, more string) *kubeCA {
	tb.Helper()
	k := prepareKubeCA(tb, bin, c, more)
	k.start("signet-ca")
	return k
}

// prepareKubeCA does everything but start it.
func prepareKubeCA(tb testing.TB, bin string, c *kubetest.Cluster, more string) *kubeCA {
	tb.Helper()
	c.Apply(tb, "../deploy/manifests")
	return kubeCAWith(tb, bin, c, "kubeconfig: "+c.Kubeconfig(tb, c.As(tb, "signet-system", "signet-ca")), more)
}

// kubeCAWith is prepareKubeCA with more of what the configuration says of Kubernetes.
func kubeCAWith(tb testing.TB, bin string, c *kubetest.Cluster, kubernetes, more string) *kubeCA {
	tb.Helper()
	k := &kubeCA{cluster: c, standalone: &standalone{tb: tb, bin: bin, dir: tb.TempDir(), ca: filepath.Join(bin, "signet-ca"), caAddr: freeAddr(tb),
		http: map[string]string{"signet-ca": freeAddr(tb)}, procs: map[string]*process{}}}
	if err := os.Mkdir(filepath.Join(k.dir, "ca"), 0o700); err != nil {
		tb.Fatal(err)
	}
	k.write("signet-ca.yaml", fmt.Sprintf("dataDir: %s/ca\nlisten: %s\ndnsNames: [localhost]\nhttp: {listen: %q}\nkubernetes: {enabled: true, %s}\n%s",
		k.dir, k.caAddr, k.http["signet-ca"], kubernetes, more))
	return k
}

// roots waits for the trust bundle that the authority publishes.
func (k *kubeCA) roots() *x509.CertPool {
	k.tb.Helper()
	pool := x509.NewCertPool()
	kubetest.Poll(k.tb, "the trust bundle", func() error {
		m, err := k.cluster.Kube.CoreV1().ConfigMaps("signet-system").Get(k.tb.Context(), "signet-trust", metav1.GetOptions{})
		if err == nil && !pool.AppendCertsFromPEM([]byte(m.Data["root.pem"])) {
			err = errors.New("it holds no certificate")
		}
		return err
	})
	return pool
}

// conn connects with an agent's SVID, or with none.
func (k *kubeCA) conn(roots *x509.CertPool, cert *tls.Certificate) capb.AuthorityClient {
	k.tb.Helper()
	cfg := &tls.Config{RootCAs: roots, ServerName: "localhost", MinVersion: tls.VersionTLS13}
	if cert != nil {
		cfg.Certificates = []tls.Certificate{*cert}
	}
	c, err := grpc.NewClient("passthrough:///"+k.caAddr, grpc.WithTransportCredentials(credentials.NewTLS(cfg)))
	if err != nil {
		k.tb.Fatal(err)
	}
	k.tb.Cleanup(func() { c.Close() })
	return capb.NewAuthorityClient(c)
}

// simAgent is what an agent does on the wire, by hand.
type simAgent struct {
	capb.AuthorityClient
	cert *tls.Certificate
}

func newSPKI(tb testing.TB) (*ecdsa.PrivateKey, []byte) {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	pub, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		tb.Fatal(err)
	}
	return key, pub
}

// tryAgent attests with a token.
func (k *kubeCA) tryAgent(roots *x509.CertPool, token string) (*simAgent, error) {
	k.tb.Helper()
	key, pub := newSPKI(k.tb)
	ctx, cancel := context.WithTimeout(k.tb.Context(), time.Minute)
	defer cancel()
	resp, err := k.conn(roots, nil).Attest(ctx, &capb.AttestRequest{PublicKey: pub, Evidence: &capb.AttestRequest_Token{Token: token}})
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(resp.GetSvid().GetChain()[0])
	if err != nil {
		k.tb.Fatal(err)
	}
	cert := &tls.Certificate{Certificate: resp.GetSvid().GetChain(), PrivateKey: key, Leaf: leaf}
	return &simAgent{k.conn(roots, cert), cert}, nil
}

// agent is the agent of a node: its pod is created first.
func (k *kubeCA) agent(roots *x509.CertPool, node string) (*simAgent, *core.Pod) {
	k.tb.Helper()
	pod := k.agentPod(node)
	return k.attested(roots, pod), pod
}

func (k *kubeCA) agentPod(node string) *core.Pod {
	k.tb.Helper()
	return k.cluster.Pod(k.tb, kubetest.PodSpec{Namespace: "signet-system", ServiceAccount: "signet-agent", Node: node, Name: "signet-agent-" + node})
}

// attested makes an agent of that pod, waiting until the authority has seen it.
func (k *kubeCA) attested(roots *x509.CertPool, pod *core.Pod) *simAgent {
	k.tb.Helper()
	token := k.cluster.Token(k.tb, pod, "signet-ca", time.Hour)
	var a *simAgent
	kubetest.Poll(k.tb, "the agent to be attested", func() (err error) {
		a, err = k.tryAgent(roots, token)
		return err
	})
	return a
}

func byPodUID(uid string) *capb.IssueItem {
	return &capb.IssueItem{Kind: &capb.IssueItem_X509{X509: &capb.X509Kind{}}, Evidence: &capb.IssueItem_PodUid{PodUid: uid}}
}

func byToken(token string) *capb.IssueItem {
	return &capb.IssueItem{Kind: &capb.IssueItem_X509{X509: &capb.X509Kind{}}, Evidence: &capb.IssueItem_Token{Token: token}}
}

// issue asks for one SVID with a fresh key: the identity, or the refusal.
func (a *simAgent) issue(tb testing.TB, item *capb.IssueItem) (id string, refusal *capb.Refusal, err error) {
	tb.Helper()
	_, item.PublicKey = newSPKI(tb)
	ctx, cancel := context.WithTimeout(tb.Context(), time.Minute)
	defer cancel()
	s, err := a.Issue(ctx)
	if err != nil {
		return "", nil, err
	}
	if err := s.Send(&capb.IssueRequest{Id: 1, Items: []*capb.IssueItem{item}}); err != nil {
		_, err = s.Recv()
		return "", nil, err
	}
	resp, err := s.Recv()
	if err != nil {
		return "", nil, err
	}
	r := resp.GetResults()[0]
	if r.GetX509() == nil {
		return "", r.GetRefusal(), nil
	}
	leaf, err := x509.ParseCertificate(r.GetX509().GetChain()[0])
	if err != nil {
		tb.Fatal(err)
	}
	got, err := identity.CheckSVID(leaf)
	if err != nil {
		tb.Fatal(err)
	}
	return got.String(), nil, nil
}

// mustIssue waits until the identity is issued.
func (a *simAgent) mustIssue(tb testing.TB, item *capb.IssueItem, want string) {
	tb.Helper()
	kubetest.Poll(tb, "an SVID of "+want, func() error {
		id, refusal, err := a.issue(tb, item)
		if err == nil && refusal != nil {
			err = fmt.Errorf("%v: %s", refusal.GetCode(), refusal.GetMessage())
		}
		if err == nil && id != want {
			tb.Fatalf("it names %s", id)
		}
		return err
	})
}

func TestAuthorityOnKubernetes(t *testing.T) {
	t.Parallel()
	bin := programs(t)
	c := kubetest.Start(t, kubetest.Options{})
	k := newKubeCA(t, bin, c, "")
	roots := k.roots()
	c.Node(t, "node-a")
	c.Node(t, "node-b")
	agent, _ := k.agent(roots, "node-a")
	web := c.Pod(t, kubetest.PodSpec{Namespace: "shop", ServiceAccount: "web", Node: "node-a"})
	db := c.Pod(t, kubetest.PodSpec{Namespace: "shop", ServiceAccount: "db", Node: "node-b"})
	agent.mustIssue(t, byPodUID(string(web.UID)), "spiffe://cluster.local/ns/shop/sa/web")
	agent.mustIssue(t, byToken(c.Token(t, web, "signet", time.Hour)), "spiffe://cluster.local/ns/shop/sa/web")
	kubetest.Poll(t, "the other node's pod to be known and refused", func() error {
		id, refusal, err := agent.issue(t, byPodUID(string(db.UID)))
		if err == nil && refusal.GetCode() != capb.Refusal_CODE_OTHER_NODE {
			err = fmt.Errorf("got %q, %v", id, refusal)
		}
		return err
	})
	c.DeletePod(t, web)
	kubetest.Poll(t, "a deleted pod to be refused", func() error {
		id, refusal, err := agent.issue(t, byPodUID(string(web.UID)))
		if err == nil && refusal.GetCode() != capb.Refusal_CODE_UNKNOWN_WORKLOAD {
			err = fmt.Errorf("got %q, %v", id, refusal)
		}
		return err
	})
}
