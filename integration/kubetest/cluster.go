package kubetest

import (
	"bytes"
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/integration/parts"
	"github.com/signet-mesh/signet/integration/process"

	istio "istio.io/client-go/pkg/clientset/versioned"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// Issuer is the issuer of the cluster's service-account tokens.
const Issuer = "https://kubernetes.default.svc.cluster.local"

// APIAudience is the audience of tokens for the API server itself.
const APIAudience = Issuer

const adminToken = "admin-of-a-test-cluster"

// Process is etcd or the API server.
type Process = process.Process

const patience = process.Patience

// Options say what differs from a cluster of defaults.
type Options struct {
	// Args are further arguments of kube-apiserver.
	Args []string
	// AuditLog has the API server write one line of JSON per request, without
	// bodies; see [Cluster.Audit].
	AuditLog bool
	// NoPolicyTypes leaves Istio's CRDs out; [Cluster.InstallPolicyTypes] adds
	// them later.
	NoPolicyTypes bool
}

// Cluster is a running API server with its etcd. Both end with the test.
type Cluster struct {
	// Etcd and APIServer can be ended and started again.
	Etcd, APIServer *Process
	// URL is https://127.0.0.1:PORT.
	URL string
	// CAFile holds the certificate that the serving certificate is issued by.
	CAFile string
	// Kube and Istio act as the administrator, without a limit on requests.
	Kube  kubernetes.Interface
	Istio istio.Interface

	dir     string
	tls     *authority
	signing *rsa.PrivateKey
	admin   *rest.Config
	options Options
}

var find = sync.OnceValues(func() (p struct{ root, etcd, apiServer string }, err error) {
	if p.root, err = parts.Root(); err != nil {
		return p, err
	}
	etcd, err := parts.FindEtcd(p.root)
	if err != nil {
		return p, err
	}
	apiServer, err := parts.FindAPIServer(p.root)
	p.etcd, p.apiServer = etcd.Path, apiServer.Path
	return p, err
})

// Start runs a cluster. Without the programs the test is skipped, in CI it fails.
func Start(tb testing.TB, opt Options) *Cluster {
	tb.Helper()
	programs, err := find()
	switch {
	case err == nil:
	case errors.Is(err, parts.ErrMissing) && os.Getenv("CI") == "":
		tb.Skip(err)
	default:
		tb.Fatal(err)
	}
	c := &Cluster{dir: tb.TempDir(), options: opt}
	if err := c.prepare(); err != nil {
		tb.Fatalf("preparing a cluster: %v", err)
	}
	tb.Cleanup(func() {
		for _, p := range []*Process{c.APIServer, c.Etcd} {
			if p != nil {
				// Nobody needs what it could still save.
				if err := p.Finish(syscall.SIGKILL); err != nil {
					tb.Error(err)
				}
			}
		}
		if tb.Failed() && c.APIServer != nil {
			tb.Logf("end of the API server's log:\n%s", c.APIServer.Log())
		}
	})
	// Another process may take a port between the choice and the start.
	for try := 0; ; try++ {
		err := c.run(programs.etcd, programs.apiServer)
		if err == nil {
			break
		}
		if try == 2 {
			tb.Fatal(err)
		}
		tb.Logf("starting the cluster once more: %v", err)
	}
	if !opt.NoPolicyTypes {
		c.InstallPolicyTypes(tb)
	}
	return c
}

// prepare writes what the processes read.
func (c *Cluster) prepare() (err error) {
	if c.tls, err = newAuthority(); err != nil {
		return err
	}
	c.CAFile = filepath.Join(c.dir, "ca.crt")
	if c.signing, err = rsa.GenerateKey(random, 2048); err != nil {
		return err
	}
	files := map[string][]byte{
		c.CAFile:                           c.tls.certificatePEM(),
		filepath.Join(c.dir, "sa.key"):     privatePEM(c.signing),
		filepath.Join(c.dir, "sa.pub"):     publicPEM(&c.signing.PublicKey),
		filepath.Join(c.dir, "tokens.csv"): []byte(adminToken + ",admin,admin,system:masters\n"),
		filepath.Join(c.dir, "audit.yaml"): []byte("apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived]\nrules: [{level: Metadata}]\n"),
	}
	for path, b := range files {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			return err
		}
	}
	return c.newServingCertificate()
}

func (c *Cluster) newServingCertificate() error {
	cert, key, err := c.tls.issue()
	if err != nil {
		return err
	}
	// The API server re-reads the pair when either file changes, and keeps what it
	// has while they do not fit.
	for name, b := range map[string][]byte{"serving.key": key, "serving.crt": cert} {
		path := filepath.Join(c.dir, name)
		if err := errors.Join(os.WriteFile(path+".new", b, 0o600), os.Rename(path+".new", path)); err != nil {
			return err
		}
	}
	return nil
}

// NewServingCertificate gives the API server another certificate, by the same
// authority, to serve with when it starts the next time.
func (c *Cluster) NewServingCertificate(tb testing.TB) {
	tb.Helper()
	if err := c.newServingCertificate(); err != nil {
		tb.Fatal(err)
	}
}

// run starts both processes on free ports and waits until they serve.
func (c *Cluster) run(etcd, apiServer string) (err error) {
	ports, err := process.FreePorts(3)
	if err != nil {
		return err
	}
	data, err := os.MkdirTemp(c.dir, "etcd-")
	if err != nil {
		return err
	}
	etcdURL := "http://127.0.0.1:" + ports[0]
	c.Etcd = &Process{Name: "etcd", Command: func() *exec.Cmd {
		return exec.Command(etcd, "--data-dir", data,
			"--listen-client-urls", etcdURL, "--advertise-client-urls", etcdURL, "--listen-peer-urls", "http://127.0.0.1:"+ports[1],
			"--unsafe-no-fsync", "--log-level", "warn", "--log-outputs", "stderr")
	}, Ready: func() error { return ask(http.DefaultTransport, etcdURL+"/health") }}

	c.URL = "https://127.0.0.1:" + ports[2]
	args := []string{
		"--etcd-servers=" + etcdURL,
		"--tls-cert-file=" + filepath.Join(c.dir, "serving.crt"), "--tls-private-key-file=" + filepath.Join(c.dir, "serving.key"),
		"--cert-dir=" + filepath.Join(c.dir, "certs"),
		"--secure-port=" + ports[2], "--bind-address=127.0.0.1",
		"--service-account-key-file=" + filepath.Join(c.dir, "sa.pub"), "--service-account-signing-key-file=" + filepath.Join(c.dir, "sa.key"),
		"--service-account-issuer=" + Issuer,
		"--token-auth-file=" + filepath.Join(c.dir, "tokens.csv"), "--authorization-mode=Node,RBAC",
		"--service-cluster-ip-range=10.0.0.0/24", "--allow-privileged=true",
		// Nothing waits for the drain of an API server in a test.
		"--shutdown-delay-duration=0s",
	}
	if c.options.AuditLog {
		args = append(args, "--audit-policy-file="+filepath.Join(c.dir, "audit.yaml"), "--audit-log-path="+c.auditLog())
	}
	args = append(args, c.options.Args...)
	c.admin = &rest.Config{
		Host: c.URL, BearerToken: adminToken, TLSClientConfig: rest.TLSClientConfig{CAFile: c.CAFile},
		QPS: -1, UserAgent: "kubetest",
	}
	transport, err := rest.TransportFor(c.admin)
	if err != nil {
		return err
	}
	c.APIServer = &Process{
		Name: "kube-apiserver",
		Command: func() *exec.Cmd {
			cmd := exec.Command(apiServer, args...)
			// It is small, and begins with much that is thrown away: it may take memory
			// for time.
			cmd.Env = append(os.Environ(), "GOGC=400")
			return cmd
		},
		Ready: func() error { return ask(transport, c.URL+"/readyz") },
	}
	if c.Kube, err = kubernetes.NewForConfig(c.admin); err != nil {
		return err
	}
	if c.Istio, err = istio.NewForConfig(c.admin); err != nil {
		return err
	}
	for _, p := range []*Process{c.Etcd, c.APIServer} {
		if err = p.Begin(); err == nil {
			err = p.Await(patience)
		}
		if err != nil {
			err = fmt.Errorf("%w\n%s", err, p.Log())
			return errors.Join(err, c.APIServer.Finish(syscall.SIGKILL), c.Etcd.Finish(syscall.SIGKILL))
		}
	}
	return nil
}

// Admin is how the administrator reaches the API server.
func (c *Cluster) Admin() *rest.Config { return rest.CopyConfig(c.admin) }

func (c *Cluster) auditLog() string { return filepath.Join(c.dir, "audit.log") }

// Audit is the API server's audit log so far: one JSON object of type
// audit.k8s.io/v1 Event per line.
func (c *Cluster) Audit(tb testing.TB) []byte {
	tb.Helper()
	b, err := os.ReadFile(c.auditLog())
	if err != nil {
		tb.Fatal(err)
	}
	// The last line may still be written.
	return b[:bytes.LastIndexByte(b, '\n')+1]
}

// ask is nil if a GET gives 200.
func ask(transport http.RoundTripper, url string) error {
	client := &http.Client{Transport: transport, Timeout: 5 * time.Second}
	resp, err := client.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", url, resp.Status, b)
	}
	return err
}

// InstallPolicyTypes creates the CRDs of security.istio.io, as the module
// istio.io/api has them, and waits until they are served.
func (c *Cluster) InstallPolicyTypes(tb testing.TB) {
	tb.Helper()
	programs, err := find()
	if err != nil {
		tb.Fatal(err)
	}
	cmd := exec.CommandContext(tb.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "istio.io/api")
	cmd.Dir = programs.root
	out, err := cmd.Output()
	if err != nil {
		tb.Fatalf("finding the module istio.io/api: %v", err)
	}
	file, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(out)), "kubernetes", "customresourcedefinitions.gen.yaml"))
	if err != nil {
		tb.Fatal(err)
	}
	var crds bytes.Buffer
	for doc := range bytes.SplitSeq(file, []byte("\n---\n")) {
		var meta metav1.PartialObjectMetadata
		if err := yaml.Unmarshal(doc, &meta); err != nil {
			tb.Fatal(err)
		}
		if strings.HasSuffix(meta.Name, ".security.istio.io") {
			crds.WriteString("---\n")
			crds.Write(doc)
			crds.WriteString("\n")
		}
	}
	c.apply(tb, "istio.io/api", crds.Bytes())
	Poll(tb, "Istio's policy types to be served", func() error {
		ctx, cancel := context.WithTimeout(tb.Context(), 5*time.Second)
		defer cancel()
		security := c.Istio.SecurityV1()
		_, errA := security.AuthorizationPolicies("").List(ctx, metav1.ListOptions{})
		_, errP := security.PeerAuthentications("").List(ctx, metav1.ListOptions{})
		_, errR := security.RequestAuthentications("").List(ctx, metav1.ListOptions{})
		return errors.Join(errA, errP, errR)
	})
}

// Poll tries until it succeeds, and fails the test with the last error when a
// minute is over.
func Poll(tb testing.TB, what string, try func() error) {
	tb.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := try()
		if err == nil {
			return
		}
		select {
		case <-tb.Context().Done():
			tb.Fatalf("waiting for %s: %v", what, err)
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			tb.Fatalf("waited %v for %s: %v", patience, what, err)
		}
	}
}
