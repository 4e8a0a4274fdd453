package integration_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/signet-mesh/signet/integration/kubetest"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestIstioOnKubernetes: a real API server's tokens and pods at Istio's door, the
// root for Istio's clients in every namespace, and istiod's own certificate.
func TestIstioOnKubernetes(t *testing.T) {
	t.Parallel()
	bin := programs(t)
	c := kubetest.Start(t, kubetest.Options{})
	for _, ns := range []string{"istio-system", "shop", "local-path-storage"} {
		c.Namespace(t, ns)
	}
	c.Apply(t, "../deploy/istio")
	addr := freeAddr(t)
	k := newKubeCA(t, bin, c, fmt.Sprintf(`istio:
  listen: %q
  firstPartyAudience: %q
  nodeAccounts: [istio-system/ztunnel]
  renewalFor: [shop/web]
  publishRoot: true
  istiod: {secret: istiod-tls}
`, addr, kubetest.APIAudience))
	k.roots()
	api := c.Kube.CoreV1()

	// The root, everywhere but where istiod leaves it out.
	root := func(ns string) (*core.ConfigMap, error) {
		return api.ConfigMaps(ns).Get(t.Context(), "istio-ca-root-cert", metav1.GetOptions{})
	}
	trust, err := api.ConfigMaps("signet-system").Get(t.Context(), "signet-trust", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	want := trust.Data["root.pem"]
	right := func(ns string) func() error {
		return func() error {
			m, err := root(ns)
			if err == nil && (m.Data["root-cert.pem"] != want || m.Labels["istio.io/config"] != "true" || m.Immutable != nil) {
				err = fmt.Errorf("it is %v %v", m.Labels, m.Data)
			}
			return err
		}
	}
	for _, ns := range []string{"default", "kube-system", "shop", "istio-system", "signet-system"} {
		kubetest.Poll(t, "the root in "+ns, right(ns))
	}
	c.Namespace(t, "later")
	kubetest.Poll(t, "the root in a new namespace", right("later"))
	for _, ns := range []string{"kube-public", "kube-node-lease", "local-path-storage"} {
		if _, err := root(ns); !apierrors.IsNotFound(err) {
			t.Errorf("the root in %s: %v", ns, err)
		}
	}
	edit := func(ns string, f func(*core.ConfigMap)) {
		t.Helper()
		kubetest.Poll(t, "an edit", func() error {
			m, err := root(ns)
			if err != nil {
				return err
			}
			f(m)
			_, err = api.ConfigMaps(ns).Update(t.Context(), m, metav1.UpdateOptions{})
			return err
		})
	}
	edit("shop", func(m *core.ConfigMap) {
		m.Data = map[string]string{"root-cert.pem": "forged", "mine": "stays"}
		m.Labels = nil
	})
	kubetest.Poll(t, "a foreign edit to be undone", right("shop"))
	if m, err := root("shop"); err != nil || m.Data["mine"] != "stays" {
		t.Errorf("another key was lost: %v, %v", m.Data, err)
	}
	yes := true
	edit("later", func(m *core.ConfigMap) { m.Immutable = &yes })
	kubetest.Poll(t, "an immutable one to be made again", right("later"))
	if err := api.ConfigMaps("default").Delete(t.Context(), "istio-ca-root-cert", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	kubetest.Poll(t, "a deleted one to be made again", right("default"))

	// istiod's own certificate.
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(want))
	kubetest.Poll(t, "istiod's certificate", func() error {
		s, err := api.Secrets("istio-system").Get(t.Context(), "istiod-tls", metav1.GetOptions{})
		if err != nil {
			return err
		}
		pair, err := tls.X509KeyPair(s.Data["tls.crt"], s.Data["tls.key"])
		if err != nil || string(s.Data["ca.crt"]) != want || s.Type != core.SecretTypeTLS {
			return fmt.Errorf("%v, %s", err, s.Type)
		}
		intermediates := x509.NewCertPool()
		for _, der := range pair.Certificate[1:] {
			if i, err := x509.ParseCertificate(der); err == nil {
				intermediates.AddCert(i)
			}
		}
		_, err = pair.Leaf.Verify(x509.VerifyOptions{Roots: pool, Intermediates: intermediates, DNSName: "istiod.istio-system.svc"})
		return err
	})

	// Pods and their tokens.
	client := istioClient{t, addr, []byte(want)}
	c.Node(t, "node-a")
	c.Node(t, "node-b")
	web := c.Pod(t, kubetest.PodSpec{Namespace: "shop", ServiceAccount: "web", Node: "node-a"})
	db := c.Pod(t, kubetest.PodSpec{Namespace: "shop", ServiceAccount: "db", Node: "node-b"})
	zt := c.Pod(t, kubetest.PodSpec{Namespace: "istio-system", ServiceAccount: "ztunnel", Node: "node-a"})
	id := func(ns, sa string) string { return "spiffe://cluster.local/ns/" + ns + "/sa/" + sa }
	issued := func(what, want string, ask func() (*tls.Certificate, error)) (cert *tls.Certificate) {
		t.Helper()
		kubetest.Poll(t, what, func() (err error) {
			cert, err = ask()
			if err == nil && cert.Leaf.URIs[0].String() != want {
				t.Fatalf("%s: it names %v", what, cert.Leaf.URIs)
			}
			return err
		})
		return cert
	}
	refused := func(what string, cert *tls.Certificate, token, as string, md ...string) {
		t.Helper()
		if _, err := client.certificate(cert, token, as, md...); status.Code(err) != codes.Unauthenticated {
			t.Errorf("%s: %v; want Unauthenticated", what, err)
		}
	}
	token := c.Token(t, web, "istio-ca", 12*time.Hour)
	first := issued("a sidecar's certificate", id("shop", "web"), func() (*tls.Certificate, error) { return client.certificate(nil, token, "") })
	next := issued("a renewal", id("shop", "web"), func() (*tls.Certificate, error) { return client.certificate(first, "", "") })
	ztoken := c.Token(t, zt, "istio-ca", 12*time.Hour)
	issued("ztunnel's certificate for a pod", id("shop", "web"), func() (*tls.Certificate, error) {
		return client.certificate(nil, ztoken, id("shop", "web"))
	})
	issued("a certificate for a token of the API server's own audience", id("shop", "db"), func() (*tls.Certificate, error) {
		// As kubelet asks for it; the API server makes it good for a year.
		return client.certificate(nil, c.Token(t, db, kubetest.APIAudience, 3607*time.Second), "")
	})
	refused("ztunnel for a pod of another node", nil, ztoken, id("shop", "db"))
	refused("another audience", nil, c.Token(t, web, "signet", time.Hour), "")
	refused("an unbound token", nil, c.UnboundToken(t, "shop", "web", "istio-ca", time.Hour), "")
	refused("another cluster", nil, token, "", "clusterid", "remote")

	// The API server is not asked: it may be away.
	c.APIServer.Freeze(t)
	issued("a certificate while the API server is away", id("shop", "web"), func() (*tls.Certificate, error) {
		return client.certificate(nil, token, "")
	})
	c.APIServer.Thaw(t)

	c.DeletePod(t, web)
	kubetest.Poll(t, "the token of a deleted pod to be refused", func() error {
		if _, err := client.certificate(nil, token, ""); status.Code(err) != codes.Unauthenticated {
			return fmt.Errorf("got %w", errors.Join(err, errors.New("not refused")))
		}
		return nil
	})
	refused("the certificate of a deleted pod", next, "", "")
	refused("ztunnel for a deleted pod", nil, ztoken, id("shop", "web"))
}
