package integration_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca/capb"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// recorded are the keys of the installation and the revision of each.
func (r *caReplicas) recorded(t *testing.T) map[string]int64 {
	t.Helper()
	resp, err := r.cluster.Client().Get(t.Context(), "/signet/", clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string]int64{}
	for _, kv := range resp.Kvs {
		keys[string(kv.Key)] = kv.ModRevision
	}
	return keys
}

// TestEtcdIsFull: the quota of etcd is reached while two replicas issue. Nothing is issued
// then, nothing recorded, not by halves either, and readiness and errors say what to do;
// done, all goes on without a restart.
func TestEtcdIsFull(t *testing.T) {
	t.Parallel()
	r := newCAReplicas(t, 2, "--quota-backend-bytes=16777216")
	r.serve("ca1")
	r.serve("ca2")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var loads sync.WaitGroup
	defer loads.Wait()
	defer cancel()
	for _, name := range []string{"ca1", "ca2"} {
		loads.Go(func() { r.load(ctx, name) })
	}
	both := func() {
		t.Helper()
		at := time.Now()
		r.wait("both to issue", func() bool { return r.since(at, "ca1") > 5 && r.since(at, "ca2") > 5 })
	}
	both()
	agent, err := r.attested(ctx, "ca1")
	if err != nil {
		t.Fatal(err)
	}
	defer agent.Close()

	// Somebody else fills it.
	filler := make([]byte, 512<<10)
	rand.Read(filler)
	for i := 0; ; i++ {
		put, done := context.WithTimeout(t.Context(), 30*time.Second)
		_, err := r.cluster.Client().Put(put, fmt.Sprint("other/", i), string(filler))
		done()
		if errors.Is(err, rpctypes.ErrNoSpace) {
			break
		}
		if i > 200 {
			t.Fatalf("the quota is not reached: %v", err)
		}
	}
	for _, name := range []string{"ca1", "ca2"} {
		r.wait(name+" to say that etcd is full", func() bool { return strings.Contains(r.ready(name), "etcd is full") })
		resp, err := http.Get("http://" + r.http[name] + "/readyz")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusServiceUnavailable {
			t.Errorf("%s is unready with status %d", name, resp.StatusCode)
		}
		r.wait(name+" to say so in its metrics", func() bool { return bytes.Contains(r.get(name, "/metrics"), []byte("signet_storage_failed 1")) })
	}
	t.Logf("note: readiness of ca1 while etcd is full:\n%s", r.ready("ca1"))

	// What was recorded before may be handed out, and noted here, a little later.
	at := time.Now()
	r.wait("what was given out before to be noted", func() bool {
		at = time.Now()
		time.Sleep(time.Second)
		return r.since(at, "") == 0
	})
	before := r.recorded(t)
	r.mu.Lock()
	failed := r.failed
	r.mu.Unlock()
	stream, err := capb.NewAuthorityClient(agent).Issue(ctx)
	if err != nil {
		t.Fatal(err)
	}
	_, pub, err := newPublicKey()
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&capb.IssueRequest{Items: []*capb.IssueItem{{PublicKey: pub, Kind: &capb.IssueItem_X509{X509: &capb.X509Kind{}}, Evidence: &capb.IssueItem_PodUid{PodUid: "uid-w0"}}}}); err != nil {
		t.Fatal(err)
	}
	if resp, err := stream.Recv(); err == nil {
		if res := resp.GetResults()[0]; res.GetX509() != nil || res.GetRefusal() == nil {
			t.Errorf("issued while etcd is full: %v", res)
		} else {
			t.Logf("note: an agent is told: %v", res.GetRefusal())
		}
	} else if status.Code(err) != codes.Unavailable {
		t.Errorf("an agent is told: %v", err)
	}
	ban := func() (string, error) {
		out, err := exec.CommandContext(t.Context(), filepath.Join(r.bin, "signet"), "ca", "ban", "add", "--socket", filepath.Join(r.dir, "ca1", "admin.sock"),
			"spiffe://cluster.local/ns/default/sa/w1", "--reason", "a test").CombinedOutput()
		return string(out), err
	}
	// Where etcd does not answer in time another reason is as true.
	r.wait("a ban to be refused because etcd is full", func() bool {
		out, err := ban()
		if err == nil {
			t.Fatalf("a ban while etcd is full: %s", out)
		}
		told := strings.Contains(out, "etcd is full")
		t.Logf("note: a ban while etcd is full: %s", out)
		return told
	})
	r.wait("more failures", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return r.failed > failed+20 })
	if n := r.since(at, ""); n > 0 {
		t.Errorf("%d certificates were given out while etcd was full", n)
	}
	for key, revision := range r.recorded(t) {
		if before[key] != revision {
			t.Errorf("%s was written while etcd was full", key)
		}
	}

	// What docs/replicas.md says.
	revision := regexp.MustCompile(`"revision":(\d+)`).FindStringSubmatch(r.cluster.Ctl(t, "endpoint", "status", "--write-out", "json"))
	if revision == nil {
		t.Fatal("no revision")
	}
	r.cluster.Ctl(t, "del", "other/", "--prefix")
	r.cluster.Ctl(t, "compact", revision[1])
	r.cluster.Compact(t) // what was deleted just now, too
	r.cluster.Ctl(t, "defrag")
	r.cluster.Ctl(t, "alarm", "disarm")
	both()
	for _, name := range []string{"ca1", "ca2"} {
		r.waitReady(name)
		r.wait(name+" to say in its metrics that it can record", func() bool { return bytes.Contains(r.get(name, "/metrics"), []byte("signet_storage_failed 0")) })
	}
	if out := r.signet("ca", "ban", "list", "--socket", filepath.Join(r.dir, "ca2", "admin.sock")); strings.Contains(out, "sa/w1") {
		t.Errorf("a ban that was refused is there:\n%s", out)
	}
	if out, err := ban(); err != nil {
		t.Errorf("a ban after: %v\n%s", err, out)
	}
	cancel()
	loads.Wait()
	for _, name := range []string{"ca1", "ca2"} {
		r.signet("ca", "log", "verify", "--store", "--socket", filepath.Join(r.dir, name, "admin.sock"))
		r.stop(name, syscall.SIGTERM)
	}
	r.check(t)
}
