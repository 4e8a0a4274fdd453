package kubetest

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	authentication "k8s.io/api/authentication/v1"
	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// Namespace makes sure that a namespace exists.
func (c *Cluster) Namespace(tb testing.TB, name string) {
	tb.Helper()
	_, err := c.Kube.CoreV1().Namespaces().Create(tb.Context(), &core.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		tb.Fatal(err)
	}
}

// ServiceAccount makes sure that a service account and its namespace exist.
func (c *Cluster) ServiceAccount(tb testing.TB, namespace, name string) {
	tb.Helper()
	c.Namespace(tb, namespace)
	_, err := c.Kube.CoreV1().ServiceAccounts(namespace).Create(tb.Context(), &core.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		tb.Fatal(err)
	}
}

// Node creates a node that says that it is ready.
func (c *Cluster) Node(tb testing.TB, name string) *core.Node {
	tb.Helper()
	node, err := c.Kube.CoreV1().Nodes().Create(tb.Context(), &core.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	if err != nil {
		tb.Fatal(err)
	}
	node.Status.Conditions = []core.NodeCondition{{Type: core.NodeReady, Status: core.ConditionTrue}}
	if node, err = c.Kube.CoreV1().Nodes().UpdateStatus(tb.Context(), node, metav1.UpdateOptions{}); err != nil {
		tb.Fatal(err)
	}
	return node
}

// PodSpec is a pod to be created; Namespace, ServiceAccount and Node are needed.
type PodSpec struct {
	Namespace      string
	ServiceAccount string
	Node           string
	// Name is the service account's name if it is empty.
	Name   string
	Labels map[string]string
	// IP, if given, becomes the pod's address.
	IP string
	// Owner, if given, is who controls the pod.
	Owner *metav1.OwnerReference
}

// Pod creates a running pod, its service account and its namespace.
func (c *Cluster) Pod(tb testing.TB, spec PodSpec) *core.Pod {
	tb.Helper()
	c.ServiceAccount(tb, spec.Namespace, spec.ServiceAccount)
	if spec.Name == "" {
		spec.Name = spec.ServiceAccount
	}
	pod := &core.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: spec.Name, Labels: spec.Labels},
		Spec: core.PodSpec{
			ServiceAccountName: spec.ServiceAccount, NodeName: spec.Node,
			Containers: []core.Container{{Name: "app", Image: "app"}},
		},
	}
	if spec.Owner != nil {
		pod.OwnerReferences = []metav1.OwnerReference{*spec.Owner}
	}
	pods := c.Kube.CoreV1().Pods(spec.Namespace)
	pod, err := pods.Create(tb.Context(), pod, metav1.CreateOptions{})
	if err != nil {
		tb.Fatal(err)
	}
	pod.Status.Phase = core.PodRunning
	if spec.IP != "" {
		pod.Status.PodIP, pod.Status.PodIPs = spec.IP, []core.PodIP{{IP: spec.IP}}
	}
	if pod, err = pods.UpdateStatus(tb.Context(), pod, metav1.UpdateOptions{}); err != nil {
		tb.Fatal(err)
	}
	return pod
}

// DeletePod deletes a pod at once, as a kubelet does when its containers have
// ended. A UID guards against deleting a successor of the same name.
func (c *Cluster) DeletePod(tb testing.TB, pod *core.Pod) {
	tb.Helper()
	c.deletePod(tb, pod, 0)
}

// TerminatePod begins the deletion of a pod, which stays with a deletionTimestamp,
// since there is no kubelet.
func (c *Cluster) TerminatePod(tb testing.TB, pod *core.Pod) {
	tb.Helper()
	c.deletePod(tb, pod, 30)
}

func (c *Cluster) deletePod(tb testing.TB, pod *core.Pod, grace int64) {
	tb.Helper()
	err := c.Kube.CoreV1().Pods(pod.Namespace).Delete(tb.Context(), pod.Name,
		metav1.DeleteOptions{GracePeriodSeconds: &grace, Preconditions: metav1.NewUIDPreconditions(string(pod.UID))})
	if err != nil {
		tb.Fatal(err)
	}
}

// Token asks the API server for a token of a pod's service account that is bound to
// the pod, as a kubelet does for a projected volume; the server adds its node. The
// least lifetime that it grants is ten minutes.
func (c *Cluster) Token(tb testing.TB, pod *core.Pod, audience string, lifetime time.Duration) string {
	tb.Helper()
	seconds := int64(lifetime / time.Second)
	request := &authentication.TokenRequest{Spec: authentication.TokenRequestSpec{
		Audiences: []string{audience}, ExpirationSeconds: &seconds,
		BoundObjectRef: &authentication.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID},
	}}
	return c.requestToken(tb, pod.Namespace, pod.Spec.ServiceAccountName, request)
}

// UnboundToken asks for a token of a service account that is bound to no object.
func (c *Cluster) UnboundToken(tb testing.TB, namespace, serviceAccount, audience string, lifetime time.Duration) string {
	tb.Helper()
	seconds := int64(lifetime / time.Second)
	return c.requestToken(tb, namespace, serviceAccount, &authentication.TokenRequest{Spec: authentication.TokenRequestSpec{Audiences: []string{audience}, ExpirationSeconds: &seconds}})
}

func (c *Cluster) requestToken(tb testing.TB, namespace, serviceAccount string, request *authentication.TokenRequest) string {
	tb.Helper()
	answer, err := c.Kube.CoreV1().ServiceAccounts(namespace).CreateToken(tb.Context(), serviceAccount, request, metav1.CreateOptions{})
	if err != nil {
		tb.Fatal(err)
	}
	return answer.Status.Token
}

// Sign makes a token as the API server would, of any lifetime and with any claims:
// claims says what a token of the pod has, and change may change it. The signature
// is by the cluster's own key.
func (c *Cluster) Sign(tb testing.TB, pod *core.Pod, audience string, lifetime time.Duration, change func(claims map[string]any)) string {
	tb.Helper()
	now := time.Now()
	account, err := c.Kube.CoreV1().ServiceAccounts(pod.Namespace).Get(tb.Context(), pod.Spec.ServiceAccountName, metav1.GetOptions{})
	if err != nil {
		tb.Fatal(err)
	}
	bound := map[string]any{
		"namespace":      pod.Namespace,
		"serviceaccount": map[string]any{"name": account.Name, "uid": account.UID},
		"pod":            map[string]any{"name": pod.Name, "uid": pod.UID},
	}
	if pod.Spec.NodeName != "" {
		node, err := c.Kube.CoreV1().Nodes().Get(tb.Context(), pod.Spec.NodeName, metav1.GetOptions{})
		if err != nil {
			tb.Fatal(err)
		}
		bound["node"] = map[string]any{"name": node.Name, "uid": node.UID}
	}
	claims := map[string]any{
		"iss": Issuer, "aud": []string{audience}, "sub": "system:serviceaccount:" + pod.Namespace + ":" + account.Name,
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(lifetime).Unix(), "jti": base64.RawURLEncoding.EncodeToString(randomBytes(16)),
		"kubernetes.io": bound,
	}
	if change != nil {
		change(claims)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: c.signing, KeyID: c.KeyID()}}, nil)
	if err != nil {
		tb.Fatal(err)
	}
	token, err := jwt.Signed(signer).Claims(claims).Serialize()
	if err != nil {
		tb.Fatal(err)
	}
	return token
}

// KeyID is the kid of the cluster's key, as the API server derives it.
func (c *Cluster) KeyID() string {
	der, err := x509.MarshalPKIXPublicKey(&c.signing.PublicKey)
	if err != nil {
		panic(err) // a key that this package made
	}
	sum := sha256.Sum256(der)
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// PublicKeyPEM is the cluster's public key of tokens.
func (c *Cluster) PublicKeyPEM() []byte { return publicPEM(&c.signing.PublicKey) }

// As is how a service account reaches the API server, by a token of an hour that is
// bound to nothing. The account must exist.
func (c *Cluster) As(tb testing.TB, namespace, serviceAccount string) *rest.Config {
	tb.Helper()
	cfg := c.Admin()
	cfg.BearerToken = c.UnboundToken(tb, namespace, serviceAccount, APIAudience, time.Hour)
	cfg.UserAgent = namespace + "/" + serviceAccount
	return cfg
}

// Kubeconfig writes a kubeconfig file of cfg, with a file for its token beside it,
// and returns its path.
func (c *Cluster) Kubeconfig(tb testing.TB, cfg *rest.Config) string {
	tb.Helper()
	dir := tb.TempDir()
	token := filepath.Join(dir, "token")
	path := filepath.Join(dir, "kubeconfig")
	err := errors.Join(
		os.WriteFile(token, []byte(cfg.BearerToken), 0o600),
		clientcmd.WriteToFile(clientcmdapi.Config{
			Clusters:       map[string]*clientcmdapi.Cluster{"test": {Server: cfg.Host, CertificateAuthority: c.CAFile}},
			AuthInfos:      map[string]*clientcmdapi.AuthInfo{"test": {TokenFile: token}},
			Contexts:       map[string]*clientcmdapi.Context{"test": {Cluster: "test", AuthInfo: "test"}},
			CurrentContext: "test",
		}, path))
	if err != nil {
		tb.Fatal(err)
	}
	return path
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	_, _ = random.Read(b) // never fails
	return b
}
