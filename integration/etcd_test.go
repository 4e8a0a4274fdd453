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

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/external/externaltest"
	"github.com/signet-mesh/signet/identity/attest/devissuer"
	"github.com/signet-mesh/signet/integration/etcdtest"
	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/etcd"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/proto"
)

// caReplicas are signet-ca processes that share a state in etcd, under an offline root.
type caReplicas struct {
	*standalone // for its processes; its own authority and agent are not started
	cluster     *etcdtest.Cluster
	root        *externaltest.Signer
	start0      time.Time

	mu     sync.Mutex
	issued []issuedBy // guarded by mu
	failed int        // guarded by mu
}

type issuedBy struct {
	replica string
	serial  [17]byte
	at      time.Time
}

// newCAReplicas makes the configurations of n replicas, and their cluster, to whose members
// args are given.
func newCAReplicas(t *testing.T, n int, args ...string) *caReplicas {
	t.Helper()
	s := &standalone{tb: t, bin: programs(t), dir: t.TempDir(), http: map[string]string{}, procs: map[string]*process{}}
	r := &caReplicas{standalone: s, root: externaltest.Root(t, "offline", externaltest.P256), start0: time.Now(),
		cluster: etcdtest.Start(t, etcdtest.Options{Members: 3, TLS: true, Args: append([]string{"--heartbeat-interval=50", "--election-timeout=500"}, args...)})}
	var err error
	if s.issuer, _, err = devissuer.Create(filepath.Join(s.dir, "issuer"), devissuer.Options{}); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		r.add(fmt.Sprint("ca", i+1))
	}
	return r
}

// add makes the configuration and the intermediate of one more replica.
func (r *caReplicas) add(name string) {
	t := r.tb
	t.Helper()
	if err := os.Mkdir(filepath.Join(r.dir, name), 0o700); err != nil {
		t.Fatal(err)
	}
	r.http[name] = freeAddr(t)
	r.write(name+".yaml", fmt.Sprintf("dataDir: %s/%s\nlisten: %s\nhttp: {listen: %q}\ntokens: {issuer: %q, jwksFile: %s/issuer/jwks.json}\n"+
		"authority: {offlineRoot: true}\nstorage: {etcd: {endpoints: [%s], caFile: %s, certFile: %s, keyFile: %s, timeout: 1s, ownerTTL: 2s}}\n"+
		"workloads:\n- {namespace: signet-system, serviceAccount: signet-agent, pod: uid-agent, podUID: uid-agent, node: node-a}\n"+
		"- {namespace: default, serviceAccount: w0, pod: uid-w0, podUID: uid-w0, node: node-a}\n",
		r.dir, name, r.listen(name), r.http[name], r.issuer.URL(), r.dir, strings.Join(r.cluster.Endpoints(), ", "), r.cluster.CAFile, r.cluster.CertFile, r.cluster.KeyFile))
	config := filepath.Join(r.dir, name+".yaml")
	run := func(args ...string) []byte {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), filepath.Join(r.bin, "signet-ca"), append(args, "--config", config)...).CombinedOutput()
		if err != nil {
			t.Fatalf("signet-ca %v: %v\n%s", args, err, out)
		}
		return out
	}
	block, _ := pem.Decode(run("authority", "csr", "--count", "1"))
	if block == nil {
		t.Fatal("no request was printed")
	}
	c := r.root.Sign(t, block.Bytes)
	r.write(name+"-chain.pem", string(externaltest.PEM(c, r.root.Cert)))
	run("authority", "import", filepath.Join(r.dir, name+"-chain.pem"))
}

func (r *caReplicas) listen(name string) string {
	if r.http[name+" agents"] == "" {
		r.http[name+" agents"] = freeAddr(r.tb)
	}
	return r.http[name+" agents"]
}

func (r *caReplicas) serve(name string) {
	r.tb.Helper()
	program := r.ca
	if program == "" {
		program = filepath.Join(r.bin, "signet-ca")
	}
	p := &process{cmd: exec.Command(program, "serve", "--config", filepath.Join(r.dir, name+".yaml")), done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), r.env...)
	p.cmd.Stderr = &p.log
	p.run(r.tb)
	r.procs[name] = p
	r.tb.Cleanup(func() { r.stop(name, syscall.SIGTERM) })
	r.waitReady(name)
}

// attested connects to a replica as an agent that has proved its node there.
func (r *caReplicas) attested(ctx context.Context, name string) (*grpc.ClientConn, error) {
	dial := func(pair *tls.Certificate) (*grpc.ClientConn, error) {
		// Who is asked does not matter here: what comes back is verified.
		cfg := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}
		if pair != nil {
			cfg.Certificates = []tls.Certificate{*pair}
		}
		return grpc.NewClient(r.listen(name), grpc.WithTransportCredentials(credentials.NewTLS(cfg)))
	}
	conn, err := dial(nil)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	key, pub, err := newPublicKey()
	if err != nil {
		return nil, err
	}
	resp, err := capb.NewAuthorityClient(conn).Attest(ctx, &capb.AttestRequest{PublicKey: pub,
		Evidence: &capb.AttestRequest_Token{Token: r.token("signet-ca", "signet-system", "signet-agent", "uid-agent", "node-a")}})
	if err != nil {
		return nil, err
	}
	return dial(&tls.Certificate{Certificate: resp.GetSvid().GetChain(), PrivateKey: key})
}

func newPublicKey() (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	pub, err := x509.MarshalPKIXPublicKey(key.Public())
	return key, pub, err
}

// pace is between an answer and the next request of a stream: a few hundred requests per
// second are always under way somewhere when something happens, and leave the processors
// to the other tests.
const pace = 20 * time.Millisecond

// load has a replica issue what one agent asks for on a few streams.
func (r *caReplicas) load(ctx context.Context, name string) {
	roots := x509.NewCertPool()
	roots.AddCert(r.root.Cert)
	for ctx.Err() == nil {
		conn, err := r.attested(ctx, name)
		if err != nil {
			r.fails(ctx)
			continue
		}
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				for ctx.Err() == nil && r.stream(ctx, name, conn, roots) == nil {
				}
			})
		}
		wg.Wait()
		conn.Close()
		r.fails(ctx)
	}
}

func (r *caReplicas) fails(ctx context.Context) {
	if ctx.Err() != nil {
		return
	}
	r.mu.Lock()
	r.failed++
	r.mu.Unlock()
	select {
	case <-ctx.Done():
	case <-time.After(100 * time.Millisecond):
	}
}

var errNotIssued = errors.New("not issued")

func (r *caReplicas) stream(ctx context.Context, name string, conn *grpc.ClientConn, roots *x509.CertPool) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	s, err := capb.NewAuthorityClient(conn).Issue(ctx)
	if err != nil {
		return err
	}
	for {
		_, pub, err := newPublicKey()
		if err != nil {
			return err
		}
		if err := s.Send(&capb.IssueRequest{Items: []*capb.IssueItem{{PublicKey: pub, Kind: &capb.IssueItem_X509{X509: &capb.X509Kind{}}, Evidence: &capb.IssueItem_PodUid{PodUid: "uid-w0"}}}}); err != nil {
			return err
		}
		resp, err := s.Recv()
		if err != nil {
			return err
		}
		chain := resp.GetResults()[0].GetX509().GetChain()
		if len(chain) < 2 {
			return errNotIssued
		}
		leaf, err := x509.ParseCertificate(chain[0])
		if err != nil {
			return err
		}
		inter, err := x509.ParseCertificate(chain[1])
		if err != nil {
			return err
		}
		between := x509.NewCertPool()
		between.AddCert(inter)
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
			r.tb.Errorf("%s issued what does not verify: %v", name, err)
			return err
		}
		r.mu.Lock()
		r.issued = append(r.issued, issuedBy{name, [17]byte(leaf.SerialNumber.FillBytes(make([]byte, 17))), time.Now()})
		r.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-time.After(pace):
		}
	}
}

// since is how many certificates a replica (empty: any) gave out after a moment.
func (r *caReplicas) since(at time.Time, name string) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := len(r.issued) - 1; i >= 0 && r.issued[i].at.After(at); i-- {
		if name == "" || r.issued[i].replica == name {
			n++
		}
	}
	return n
}

func (r *caReplicas) wait(what string, ok func() bool) {
	r.tb.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			r.tb.Fatalf("waited for %s\n%s\n%s", what, r.procs["ca1"].log.String(), r.procs["ca2"].log.String())
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// ready is what readiness says.
func (r *caReplicas) ready(name string) string {
	resp, err := http.Get("http://" + r.http[name] + "/readyz")
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(b))
}

// TestReplicasOnEtcd: two real authorities on a real cluster to which everything happens
// that happens to clusters. Whatever was given out is recorded, once, in one whole chain.
func TestReplicasOnEtcd(t *testing.T) {
	t.Parallel()
	r := newCAReplicas(t, 2)
	r.serve("ca1")
	r.serve("ca2")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var loads sync.WaitGroup
	for _, name := range []string{"ca1", "ca2"} {
		loads.Go(func() { r.load(ctx, name) })
	}
	r.start0 = time.Now()
	var marks []string
	mark := func(format string, args ...any) {
		marks = append(marks, fmt.Sprintf("%5.1f s  ", time.Since(r.start0).Seconds())+fmt.Sprintf(format, args...))
	}
	both := func() {
		t.Helper()
		at := time.Now()
		r.wait("both to issue", func() bool { return r.since(at, "ca1") > 20 && r.since(at, "ca2") > 20 })
	}
	both()
	mark("both issue")
	time.Sleep(time.Second) // what it is without faults, to compare

	leader := r.cluster.Leader(t)
	mark("the leader of etcd is killed")
	leader.Kill(t)
	both()
	mark("both issue")
	leader.Start(t)

	mark("two of three members are frozen: no quorum")
	r.cluster.Members[0].Freeze(t)
	r.cluster.Members[1].Freeze(t)
	for _, name := range []string{"ca1", "ca2"} {
		r.wait(name+" to say that nothing can be recorded", func() bool { return strings.Contains(r.ready(name), "nothing can be recorded") })
	}
	mark("both are unready: %s", strings.ReplaceAll(r.ready("ca1"), "\n", "; "))
	lost := time.Now()
	r.wait("what was given out before to be noted", func() bool {
		lost = time.Now()
		time.Sleep(time.Second)
		return r.since(lost, "") == 0
	})
	time.Sleep(2 * time.Second)
	if n := r.since(lost, ""); n > 0 {
		t.Errorf("%d certificates were given out without a quorum", n)
	}
	r.cluster.Members[0].Thaw(t)
	r.cluster.Members[1].Thaw(t)
	mark("quorum is back")
	both()
	for _, name := range []string{"ca1", "ca2"} {
		r.waitReady(name)
	}
	mark("both issue and are ready, without a restart")

	leader = r.cluster.Leader(t)
	r.cluster.Cut(leader)
	mark("the leader is cut off; clients still reach it")
	both()
	r.cluster.Compact(t)
	r.cluster.Mend()
	mark("both issue; history is compacted, the cut mended")
	both()

	mark("ca1 is stopped (SIGSTOP) for longer than its log is kept for it")
	if err := r.procs["ca1"].cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	stopped := time.Now()
	time.Sleep(4 * time.Second)
	r.wait("the other one to issue meanwhile", func() bool { return r.since(stopped, "ca2") > 0 })
	if err := r.procs["ca1"].cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	mark("ca1 goes on")
	both()
	mark("both issue")
	cancel()
	loads.Wait()
	for _, name := range []string{"ca1", "ca2"} {
		r.stop(name, syscall.SIGTERM)
	}
	r.check(t)
	const step = 500 * time.Millisecond
	var rate []int
	for _, x := range r.issued {
		if i := int(x.at.Sub(r.start0) / step); i >= 0 {
			for len(rate) <= i {
				rate = append(rate, 0)
			}
			rate[i]++
		}
	}
	var b strings.Builder
	for i, n := range rate {
		fmt.Fprintf(&b, "%6d", 2*n)
		if i%20 == 19 {
			fmt.Fprintf(&b, "   to %v\n", time.Duration(i+1)*step)
		}
	}
	t.Logf("%d certificates, %d failures; certificates per second, every half second:\n%s\n%s", len(r.issued), r.failed, b.String(), strings.Join(marks, "\n"))
}

// check holds what was given out against the logs.
func (r *caReplicas) check(t *testing.T) {
	t.Helper()
	s, err := etcd.Open(t.Context(), etcd.Options{Endpoints: r.cluster.Endpoints(), TLS: r.cluster.TLS(), MustExist: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	recorded := map[[17]byte]bool{}
	for _, instance := range []uint32{1, 2} {
		l, err := storage.OpenLog(fmt.Sprintf("log/%03d", instance), storage.LogOptions{Instance: instance, FS: s.Files(), ReadOnly: true, LockTimeout: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		for rec, err := range l.Scan(t.Context(), 1) {
			if err != nil {
				t.Fatal(err)
			}
			var x capb.IssuanceRecord
			if err := proto.Unmarshal(rec.Data, &x); err != nil {
				t.Fatal(err)
			}
			if len(x.GetSerial()) != 17 {
				continue // a decision
			}
			serial := [17]byte(x.GetSerial())
			if recorded[serial] || serial[0] != byte(instance) {
				t.Errorf("serial %x is in the log of instance %d, and was there before: %v", serial, instance, recorded[serial])
			}
			recorded[serial] = true
		}
		if err := errors.Join(l.Verify(t.Context()), l.Close()); err != nil {
			t.Error(err)
		}
	}
	given := map[[17]byte]bool{}
	for _, x := range r.issued {
		if given[x.serial] {
			t.Errorf("serial %x was given out twice", x.serial)
		}
		given[x.serial] = true
		if !recorded[x.serial] {
			t.Errorf("%s gave out %x, which is in no log", x.replica, x.serial)
		}
	}
	t.Logf("%d certificates were given out, all of them recorded; %d records in two whole logs", len(given), len(recorded))
	for _, name := range []string{"ca1", "ca2"} {
		if log := r.procs[name].log.String(); bytes.Contains([]byte(log), []byte("panic")) {
			t.Errorf("%s\n%s", name, log)
		}
	}
}
