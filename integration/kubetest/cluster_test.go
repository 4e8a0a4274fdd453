package kubetest_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/integration/kubetest"

	security "istio.io/api/security/v1beta1"
	istio "istio.io/client-go/pkg/apis/security/v1"
	authentication "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

func TestCluster(t *testing.T) {
	t.Parallel()
	began := time.Now()
	c := kubetest.Start(t, kubetest.Options{AuditLog: true})
	t.Logf("ready after %v", time.Since(began).Round(time.Millisecond))

	version, err := c.Kube.Discovery().ServerVersion()
	if err != nil || version.GitVersion != "v1.37.2" {
		t.Fatalf("version %v, %v; want v1.37.2", version, err)
	}
	node := c.Node(t, "node-a")
	pod := c.Pod(t, kubetest.PodSpec{Namespace: "shop", ServiceAccount: "web", Node: "node-a", Labels: map[string]string{"app": "web"}, IP: "10.1.2.3"})

	// Both tokens are the API server's to vouch for, bound to pod and node.
	review := func(token, audience string) authentication.TokenReviewStatus {
		t.Helper()
		answer, err := c.Kube.AuthenticationV1().TokenReviews().Create(t.Context(), &authentication.TokenReview{
			Spec: authentication.TokenReviewSpec{Token: token, Audiences: []string{audience}}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return answer.Status
	}
	for name, token := range map[string]string{
		"requested": c.Token(t, pod, "signet", 10*time.Minute),
		"signed":    c.Sign(t, pod, "signet", time.Minute, nil),
	} {
		s := review(token, "signet")
		extra := func(key string) string { return strings.Join(s.User.Extra["authentication.kubernetes.io/"+key], " ") }
		if !s.Authenticated || s.User.Username != "system:serviceaccount:shop:web" || extra("pod-uid") != string(pod.UID) || extra("node-uid") != string(node.UID) {
			t.Errorf("%s token: %+v", name, s)
		}
		if s := review(token, "signet-ca"); s.Authenticated {
			t.Errorf("%s token: another audience was taken", name)
		}
	}
	if s := review(c.Sign(t, pod, "signet", time.Minute, func(claims map[string]any) { claims["exp"] = time.Now().Add(-time.Minute).Unix() }), "signet"); s.Authenticated {
		t.Error("an expired token was taken")
	}

	// A service account may do what its roles say: here nothing.
	restricted, err := kubernetes.NewForConfig(c.As(t, "shop", "web"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := restricted.CoreV1().Pods("shop").List(t.Context(), metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("listing pods without a role: %v, want forbidden", err)
	}
	c.ApplyYAML(t, `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: reader}
rules: [{apiGroups: [""], resources: [pods], verbs: [list]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: reader}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: reader}
subjects: [{kind: ServiceAccount, namespace: shop, name: web}]
`)
	fromFile, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig(t, c.As(t, "shop", "web")))
	if err != nil {
		t.Fatal(err)
	}
	if restricted, err = kubernetes.NewForConfig(fromFile); err != nil {
		t.Fatal(err)
	}
	kubetest.Poll(t, "the role to count", func() error {
		_, err := restricted.CoreV1().Pods("shop").List(t.Context(), metav1.ListOptions{})
		return err
	})
	if log := c.Audit(t); !bytes.Contains(log, []byte(`"system:serviceaccount:shop:web"`)) {
		t.Errorf("the audit log does not name the account:\n%.2000s", log)
	}

	// Policies are stored and come back, also after both processes were killed.
	policy := &istio.PeerAuthentication{ObjectMeta: metav1.ObjectMeta{Name: "strict", Namespace: "shop"},
		Spec: security.PeerAuthentication{Mtls: &security.PeerAuthentication_MutualTLS{Mode: security.PeerAuthentication_MutualTLS_STRICT}}}
	if _, err := c.Istio.SecurityV1().PeerAuthentications("shop").Create(t.Context(), policy, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	before := serial(t, c)
	c.APIServer.Kill(t)
	c.Etcd.Kill(t)
	c.Etcd.Start(t)
	c.NewServingCertificate(t)
	c.APIServer.Start(t)
	if after := serial(t, c); after == before {
		t.Error("the serving certificate is the same after a restart with a new one")
	}
	got, err := c.Istio.SecurityV1().PeerAuthentications("shop").Get(t.Context(), "strict", metav1.GetOptions{})
	if err != nil || got.Spec.GetMtls().GetMode() != security.PeerAuthentication_MutualTLS_STRICT {
		t.Errorf("after a restart: %v, %v", got, err)
	}

	// A pod that terminates stays; a deleted one is gone, and so is its token.
	// The API server remembers for ten seconds what it took: each of these is another one.
	n := 0
	fresh := func() string {
		n++
		return c.Sign(t, pod, "signet", 10*time.Minute, func(claims map[string]any) { claims["jti"] = strconv.Itoa(n) })
	}
	if s := review(fresh(), "signet"); !s.Authenticated {
		t.Error("a token of a pod that is there is refused")
	}
	c.TerminatePod(t, pod)
	if p, err := c.Kube.CoreV1().Pods("shop").Get(t.Context(), "web", metav1.GetOptions{}); err != nil || p.DeletionTimestamp == nil {
		t.Errorf("a terminating pod: %v, %v", p, err)
	}
	c.DeletePod(t, pod)
	// The API server looks for the pod in what it has heard of.
	kubetest.Poll(t, "a token that was never seen to be refused after its pod is gone", func() error {
		if s := review(fresh(), "signet"); s.Authenticated {
			return errors.New("it is taken")
		}
		return nil
	})

	pids := []int{c.APIServer.PID(), c.Etcd.PID()}
	c.APIServer.Stop(t)
	c.Etcd.Stop(t)
	for _, pid := range pids {
		if err := syscall.Kill(pid, 0); err != syscall.ESRCH {
			t.Errorf("process %d is still there: %v", pid, err)
		}
	}
}

func TestAClusterWithoutPolicyTypes(t *testing.T) {
	t.Parallel()
	c := kubetest.Start(t, kubetest.Options{NoPolicyTypes: true})
	if _, err := c.Istio.SecurityV1().PeerAuthentications("").List(t.Context(), metav1.ListOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("a type that is not installed: %v, want not found", err)
	}
	c.InstallPolicyTypes(t)
	// Nobody answers while it is frozen, and it goes on after.
	c.APIServer.Freeze(t)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := c.Kube.CoreV1().Namespaces().List(ctx, metav1.ListOptions{}); err == nil {
		t.Error("a frozen API server answered")
	}
	c.APIServer.Thaw(t)
	c.APIServer.WaitReady(t)
}

// serial is that of the certificate that the API server presents.
func serial(t *testing.T, c *kubetest.Cluster) string {
	t.Helper()
	ca, err := os.ReadFile(c.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	conn, err := tls.Dial("tcp", strings.TrimPrefix(c.URL, "https://"), &tls.Config{RootCAs: roots})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates[0].SerialNumber.String()
}
