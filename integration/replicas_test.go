package integration_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/identity/attest/devissuer"
	"github.com/signet-mesh/signet/integration/etcdtest"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
)

// newRooted makes two replicas on etcd under a root that the first of them holds, with
// lists, and an agent that knows both. Workloads are of node-a. cut cuts the second one
// off from etcd, and mends that.
func newRooted(t *testing.T, workloads int) (r *caReplicas, cut func(bool)) {
	t.Helper()
	s := &standalone{tb: t, bin: programs(t), dir: t.TempDir(), http: map[string]string{"signet-agent": freeAddr(t)}, procs: map[string]*process{}}
	r = &caReplicas{standalone: s, start0: time.Now(),
		cluster: etcdtest.Start(t, etcdtest.Options{Members: 3, TLS: true, Args: []string{"--heartbeat-interval=50", "--election-timeout=500"}})}
	var err error
	if s.issuer, _, err = devissuer.Create(filepath.Join(s.dir, "issuer"), devissuer.Options{}); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"ca1", "ca2", "policies", "sock"} {
		if err := os.Mkdir(filepath.Join(s.dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	var list strings.Builder
	list.WriteString("- {namespace: signet-system, serviceAccount: signet-agent, pod: uid-agent, podUID: uid-agent, node: node-a}\n")
	for i := range workloads {
		fmt.Fprintf(&list, "- {namespace: default, serviceAccount: w%d, pod: uid-w%d, podUID: uid-w%d, node: node-a}\n", i, i, i)
	}
	way := newWay(t, strings.TrimPrefix(r.cluster.Endpoints()[0], "https://"))
	for i, name := range []string{"ca1", "ca2"} {
		r.http[name] = freeAddr(t)
		instance, endpoints := "", []string{"https://" + way.addr}
		if i == 0 {
			instance, endpoints = "instance: 1\n", r.cluster.Endpoints()
		}
		r.write(name+".yaml", fmt.Sprintf("%sdataDir: %s/%s\nlisten: %s\nhttp: {listen: %q}\npublish: {rootFile: %s/root.pem}\ntokens: {issuer: %q, jwksFile: %s/issuer/jwks.json}\n"+
			"authority: {rootReplica: 1, crl: {enabled: true}, propagation: 1s, taintSpread: 1s}\nsvid: {backdate: 1s, agentTTL: 1m}\n"+
			"storage: {etcd: {endpoints: [%s], caFile: %s, certFile: %s, keyFile: %s, timeout: 1s, ownerTTL: 2s}}\nworkloads:\n%s",
			instance, r.dir, name, r.listen(name), r.http[name], r.dir, r.issuer.URL(), r.dir, strings.Join(endpoints, ", "), r.cluster.CAFile, r.cluster.CertFile, r.cluster.KeyFile, list.String()))
	}
	s.write("agent-token", s.token("signet-ca", "signet-system", "signet-agent", "uid-agent", "node-a"))
	s.write("signet-agent.yaml", fmt.Sprintf("node: node-a\nsocket: %s/sock/agent.sock\nstateDir: \"\"\nca: {addresses: [%q, %q], rootFile: %s/root.pem, tokenFile: %s/agent-token}\nhttp: {listen: %q}\npolicies: {dir: %s/policies}\ntokens: {issuer: %q, jwksFile: %s/issuer/jwks.json}\n",
		s.dir, r.listen("ca1"), r.listen("ca2"), s.dir, s.dir, s.http["signet-agent"], s.dir, s.issuer.URL(), s.dir))
	return r, way.cut
}

// way is a way to a member of the cluster that can be cut.
type way struct {
	addr string
	mu   sync.Mutex
	off  bool                  // guarded by mu
	open map[net.Conn]struct{} // guarded by mu
}

func newWay(t *testing.T, to string) *way {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &way{addr: l.Addr().String(), open: map[net.Conn]struct{}{}}
	t.Cleanup(func() { l.Close(); w.cut(true) })
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", to)
			if err != nil || !w.add(in, out) {
				in.Close()
				continue
			}
			go func() { _, _ = io.Copy(out, in); out.Close() }()
			go func() { _, _ = io.Copy(in, out); in.Close() }()
		}
	}()
	return w
}

func (w *way) add(in, out net.Conn) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.off {
		out.Close()
		return false
	}
	w.open[in], w.open[out] = struct{}{}, struct{}{}
	return true
}

func (w *way) cut(off bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.off = off
	for c := range w.open {
		if off {
			c.Close()
		}
		delete(w.open, c)
	}
}

// svid is workload i's, if it comes within a time.
func (r *caReplicas) svid(i int, within time.Duration) (*tls.Certificate, error) {
	ctx, cancel := context.WithTimeout(r.tb.Context(), within)
	defer cancel()
	resp, err := fetch(r.as(ctx, i), r.dial(), "default")
	if err != nil {
		return nil, err
	}
	var secret tlsv3.Secret
	if err := resp.GetResources()[0].UnmarshalTo(&secret); err != nil {
		return nil, err
	}
	c, err := tls.X509KeyPair(secret.GetTlsCertificate().GetCertificateChain().GetInlineBytes(), secret.GetTlsCertificate().GetPrivateKey().GetInlineBytes())
	return &c, err
}

// instanceOf is the replica whose instance a serial begins with.
func instanceOf(c *x509.Certificate) string {
	return fmt.Sprint("ca", c.SerialNumber.FillBytes(make([]byte, 17))[0])
}

func (r *caReplicas) get(name, path string) []byte {
	r.tb.Helper()
	resp, err := http.Get("http://" + r.http[name] + path)
	if err != nil {
		r.tb.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		r.tb.Fatal(err)
	}
	return b
}

// listed reports whether a replica hands out a list that says that a certificate is
// revoked, by its issuer.
func (r *caReplicas) listed(name string, leaf *x509.Certificate) bool {
	for rest := r.get(name, "/crl/all.pem"); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return false
		}
		list, err := x509.ParseRevocationList(block.Bytes)
		if err != nil {
			r.tb.Fatal(err)
		}
		if string(list.AuthorityKeyId) != string(leaf.AuthorityKeyId) {
			continue
		}
		for _, e := range list.RevokedCertificateEntries {
			if e.SerialNumber.Cmp(leaf.SerialNumber) == 0 {
				return true
			}
		}
	}
}

// TestReplicasWithARoot: real processes on a real cluster. The agent goes on with another
// replica when its own is killed; what one revokes is on the lists of both; and the root
// that one holds is replaced for both, although etcd loses its quorum meanwhile.
func TestReplicasWithARoot(t *testing.T) {
	t.Parallel()
	const kills = 4
	r, cut := newRooted(t, 6+kills)
	r.serve("ca1")
	r.serve("ca2")
	r.start("signet-agent")
	one, err := r.svid(0, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	with := instanceOf(one.Leaf)
	for k := range kills {
		other := map[string]string{"ca1": "ca2", "ca2": "ca1"}[with]
		r.stop(with, syscall.SIGKILL)
		began := time.Now()
		var next *tls.Certificate
		for tries := 1; ; tries++ {
			if next, err = r.svid(1+k, time.Minute); err == nil {
				t.Logf("note: %v after kill -9 of %s the agent has the next SVID, from %s (attempt %d)", time.Since(began).Round(time.Millisecond), with, instanceOf(next.Leaf), tries)
				break
			}
			if time.Since(began) > 3*time.Minute {
				t.Fatalf("no SVID after %s was killed: %v\n%s", with, err, r.procs["signet-agent"].log.String())
			}
		}
		if instanceOf(next.Leaf) != other {
			t.Fatalf("an SVID of %s after %s was killed", instanceOf(next.Leaf), with)
		}
		r.serve(with)
		with = other
	}

	// A replica that answers and can record nothing is left.
	if with == "ca1" {
		r.stop("ca1", syscall.SIGKILL)
		if _, err = r.svid(3+kills, time.Minute); err != nil {
			t.Fatal(err)
		}
		r.serve("ca1")
	}
	cut(true)
	began := time.Now()
	moved, err := r.svid(4+kills, time.Minute)
	if err != nil || instanceOf(moved.Leaf) != "ca1" {
		t.Fatalf("the agent stays with a replica that lost etcd: %v\n%s", err, r.procs["signet-agent"].log.String())
	}
	t.Logf("note: %v after its replica lost etcd the agent has the next SVID from the other", time.Since(began).Round(time.Millisecond))
	cut(false)
	r.waitReady("ca2")

	// What is revoked.
	leaf, err := r.svid(1+kills, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	by := instanceOf(leaf.Leaf)
	other := map[string]string{"ca1": "ca2", "ca2": "ca1"}[by] // which can be told as well
	began = time.Now()
	r.signet("ca", "revoke", "--socket", filepath.Join(r.dir, other, "admin.sock"), fmt.Sprintf("%x", leaf.Leaf.SerialNumber.FillBytes(make([]byte, 17))), "--reason", "keyCompromise", "--comment", "stolen")
	for _, name := range []string{"ca1", "ca2"} {
		r.wait(name+" to have it on a list", func() bool { return r.listed(name, leaf.Leaf) })
	}
	t.Logf("note: %v after the command to %s what %s issued is on the lists of both", time.Since(began).Round(time.Millisecond), other, by)

	// The root: prepared, published and used for both, once the agent has it.
	list := func(name string) string {
		return r.signet("ca", "authority", "list", "--socket", filepath.Join(r.dir, name, "admin.sock"))
	}
	before := list("ca1")
	began = time.Now()
	r.signet("ca", "authority", "prepare", "--socket", filepath.Join(r.dir, "ca1", "admin.sock"))
	r.cluster.Members[0].Freeze(t)
	r.cluster.Members[1].Freeze(t)
	r.wait("ca2 to say that nothing can be recorded", func() bool { return strings.Contains(r.ready("ca2"), "nothing can be recorded") })
	r.cluster.Members[0].Thaw(t)
	r.cluster.Members[1].Thaw(t)
	for _, name := range []string{"ca1", "ca2"} {
		r.waitReady(name)
	}
	old := func(name, kind string) bool {
		for line := range strings.Lines(list(name)) {
			if f := strings.Fields(line); len(f) > 2 && f[1] == kind && f[2] == "old" {
				return true
			}
		}
		return false
	}
	for _, name := range []string{"ca1", "ca2"} {
		r.wait(name+" to use the next root", func() bool { return old(name, "root") && old(name, "intermediate") })
	}
	t.Logf("note: %v after the command both sign below the next root; quorum was lost in between. Before:\n%s\nafter, at ca2:\n%s", time.Since(began).Round(time.Millisecond), before, list("ca2"))
	next, err := r.svid(2+kills, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if string(next.Leaf.AuthorityKeyId) == string(leaf.Leaf.AuthorityKeyId) && instanceOf(next.Leaf) == by {
		t.Error("an SVID of the former intermediate")
	}
	if out := r.signet("ca", "authority", "list", "--socket", filepath.Join(r.dir, "ca2", "admin.sock")); strings.Contains(out, "node-a") {
		t.Errorf("ca2 waits for the agent, which talks to another replica or to it:\n%s", out)
	}
	for _, name := range []string{"ca1", "ca2"} {
		r.signet("ca", "log", "verify", "--store", "--socket", filepath.Join(r.dir, name, "admin.sock"))
	}
	found, err := filepath.Glob(filepath.Join(r.dir, "ca2", "authority", "keys", "root-*"))
	if err != nil || len(found) > 0 {
		t.Errorf("the other replica has %q, %v", found, err)
	}
	for _, name := range []string{"signet-agent", "ca1", "ca2"} {
		r.stop(name, syscall.SIGTERM)
	}
}
