package integration_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	proc "github.com/signet-mesh/signet/integration/process"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	pb "istio.io/api/security/v1alpha1"
)

// istioCA is the authority of examples/istio-ca, on a free port.
type istioCA struct {
	tb       testing.TB
	bin, dir string
	addr     string
	cmd      *exec.Cmd
	out      *lockedBuffer
	done     chan error
}

func startIstioCA(tb testing.TB, bin string) *istioCA {
	tb.Helper()
	c := &istioCA{tb: tb, bin: bin, dir: filepath.Join(tb.TempDir(), "istio-ca"), addr: freeAddr(tb)}
	c.start()
	tb.Cleanup(c.stop)
	return c
}

// start runs the example and returns when root.pem says that the port answers.
func (c *istioCA) start() {
	c.tb.Helper()
	c.out, c.done = &lockedBuffer{}, make(chan error, 1)
	c.cmd = exec.Command("bash", "../examples/istio-ca/run.sh", c.dir, c.addr)
	c.cmd.Env = append(os.Environ(), "PATH="+c.bin+":"+os.Getenv("PATH"))
	c.cmd.Stdout, c.cmd.Stderr = c.out, c.out
	root := filepath.Join(c.dir, "root.pem")
	before, _ := os.Stat(root)
	if err := c.cmd.Start(); err != nil {
		c.tb.Fatal(err)
	}
	cmd, done := c.cmd, c.done
	go func() { done <- cmd.Wait() }()
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if fi, err := os.Stat(root); err == nil && (before == nil || !os.SameFile(before, fi) || !fi.ModTime().Equal(before.ModTime())) {
			return
		}
		select {
		case err := <-c.done:
			c.cmd = nil
			c.tb.Fatalf("the example ended: %v\n%s", err, c.out.String())
		default:
		}
		if time.Now().After(deadline) {
			c.tb.Fatalf("no root.pem\n%s", c.out.String())
		}
	}
}

// stop ends it as Ctrl-C does.
func (c *istioCA) stop() {
	if c.cmd == nil {
		return
	}
	_ = c.cmd.Process.Signal(syscall.SIGINT)
	select {
	case err := <-c.done:
		if err != nil {
			c.tb.Errorf("the example ended with %v\n%s", err, c.out.String())
		}
	case <-time.After(time.Minute):
		_ = c.cmd.Process.Kill()
		c.tb.Errorf("the example did not end\n%s", c.out.String())
	}
	c.cmd = nil
}

// token is what the command line of the product makes.
func (c *istioCA) token(audience, namespace, account, pod, node string) string {
	c.tb.Helper()
	cmd := exec.Command(filepath.Join(c.bin, "signet"), "dev", "token", "--dir", filepath.Join(c.dir, "issuer"), "--audience", audience,
		"--namespace", namespace, "--service-account", account, "--pod", pod, "--pod-uid", "uid-"+pod, "--node", node)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		c.tb.Fatalf("%v\n%s", err, errs.String())
	}
	return strings.TrimSpace(out.String())
}

// certificate asks for one as pilot-agent does.
func (c *istioCA) certificate(cert *tls.Certificate, token, impersonate string) (*tls.Certificate, error) {
	c.tb.Helper()
	root, err := os.ReadFile(filepath.Join(c.dir, "root.pem"))
	if err != nil {
		c.tb.Fatal(err)
	}
	return istioClient{c.tb, c.addr, root}.certificate(cert, token, impersonate)
}

// istioClient asks at an address for certificates, as Istio's own clients do.
type istioClient struct {
	tb   testing.TB
	addr string
	root []byte // PEM
}

func (c istioClient) certificate(cert *tls.Certificate, token, impersonate string, md ...string) (*tls.Certificate, error) {
	c.tb.Helper()
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(c.root)
	cfg := &tls.Config{RootCAs: pool, ServerName: "istiod.istio-system.svc"}
	if cert != nil {
		cfg.Certificates = []tls.Certificate{*cert}
	}
	conn, err := grpc.NewClient(c.addr, grpc.WithTransportCredentials(credentials.NewTLS(cfg)))
	if err != nil {
		c.tb.Fatal(err)
	}
	defer conn.Close()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		c.tb.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		c.tb.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(c.tb.Context(), time.Minute)
	defer cancel()
	if len(md) == 0 {
		md = []string{"ClusterID", "Kubernetes"}
	}
	if token != "" {
		md = append(md, "authorization", "Bearer "+token)
	}
	req := &pb.IstioCertificateRequest{Csr: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})), ValidityDuration: 86400}
	if impersonate != "" {
		req.Metadata = &structpb.Struct{Fields: map[string]*structpb.Value{"ImpersonatedIdentity": structpb.NewStringValue(impersonate)}}
	}
	resp, err := pb.NewIstioCertificateServiceClient(conn).CreateCertificate(metadata.AppendToOutgoingContext(ctx, md...), req)
	if err != nil {
		return nil, err
	}
	chain := resp.GetCertChain()
	if len(chain) < 2 || chain[len(chain)-1] != string(c.root) {
		return nil, errors.New("the last element is not the root")
	}
	out := &tls.Certificate{PrivateKey: key}
	for _, e := range chain[:len(chain)-1] {
		b, _ := pem.Decode([]byte(e))
		out.Certificate = append(out.Certificate, b.Bytes)
	}
	out.Leaf, err = x509.ParseCertificate(out.Certificate[0])
	return out, err
}

// TestIstioCAExample: what `make example-istio-ca` starts does what its page says,
// also after a restart.
func TestIstioCAExample(t *testing.T) {
	t.Parallel()
	c := startIstioCA(t, programs(t))
	is := func(cert *tls.Certificate, err error, id string) *tls.Certificate {
		t.Helper()
		if err != nil {
			t.Fatalf("%v\n%s", err, c.out.String())
		}
		if got := cert.Leaf.URIs[0].String(); got != id {
			t.Errorf("it names %s; want %s", got, id)
		}
		return cert
	}
	denied := func(_ *tls.Certificate, err error) {
		t.Helper()
		if status.Code(err) != codes.Unauthenticated {
			t.Errorf("%v; want Unauthenticated", err)
		}
	}
	for deadline := time.Now().Add(proc.Patience); !strings.Contains(c.out.String(), "ISTIO.ANYPODOF IS SET"); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it does not warn")
		}
	}
	id := "spiffe://cluster.local/ns/shop/sa/cart"
	cert, err := c.certificate(nil, c.token("istio-ca", "shop", "cart", "cart-0", "node-a"), "")
	first := is(cert, err, id)
	cert, err = c.certificate(first, "", "")
	second := is(cert, err, id)
	server := "spiffe://cluster.local/ns/default/sa/server"
	cert, err = c.certificate(nil, c.token("istio-ca", "istio-system", "ztunnel", "ztunnel-a", "node-a"), server)
	is(cert, err, server)
	denied(c.certificate(nil, c.token("istio-ca", "shop", "cart", "cart-0", "node-b"), ""))
	denied(c.certificate(nil, c.token("signet", "shop", "cart", "cart-0", "node-a"), ""))
	denied(c.certificate(nil, "", ""))
	denied(c.certificate(nil, c.token("istio-ca", "shop", "cart", "cart-0", "node-a"), server))

	// The restarted authority has the same root, and knows what may be renewed.
	c.stop()
	c.start()
	cert, err = c.certificate(second, "", "")
	is(cert, err, id)
}
