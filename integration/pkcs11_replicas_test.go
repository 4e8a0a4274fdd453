package integration_test

import (
	"context"
	"crypto/x509"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// authorities are the authorities that a replica lists, by kind and state.
func (r *caReplicas) authorities(name string) map[string][]string {
	r.tb.Helper()
	out := r.signet("ca", "authority", "list", "--socket", filepath.Join(r.dir, name, "admin.sock"))
	all := map[string][]string{}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) > 2 && (f[1] == "root" || f[1] == "intermediate") {
			all[f[1]+" "+f[2]] = append(all[f[1]+" "+f[2]], f[0])
		}
	}
	return all
}

// TestReplicasWithARootInAToken: two replicas on etcd have their intermediates signed by
// one real PKCS#11 token. Each takes another intermediate, and the root is replaced, while
// whoever does the step is killed (-9) in the middle of it: the other one goes on, and no
// replica has a key of a root in its folder.
func TestReplicasWithARootInAToken(t *testing.T) {
	t.Parallel()
	tok := newToken(t)
	r, _ := newRooted(t, 6)
	r.ca, r.env = pkcs11Program(t), tok.env
	names := []string{"ca1", "ca2"}
	for _, name := range names {
		path := filepath.Join(r.dir, name+".yaml")
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		text := strings.ReplaceAll(string(b), "rootReplica: 1", fmt.Sprintf("keys: {root: %q}", tok.uri()))
		r.write(name+".yaml", strings.ReplaceAll(text, "instance: 1\n", ""))
	}
	socket := func(name string) string { return filepath.Join(r.dir, name, "admin.sock") }
	for _, name := range names {
		r.serve(name)
	}
	r.start("signet-agent")
	workload := 0
	svid := func() []*x509.Certificate {
		t.Helper()
		for deadline := time.Now().Add(2 * time.Minute); ; {
			c, err := r.svid(workload, time.Minute)
			if err == nil {
				workload++
				var chain []*x509.Certificate
				for _, der := range c.Certificate {
					x, err := x509.ParseCertificate(der)
					if err != nil {
						t.Fatal(err)
					}
					chain = append(chain, x)
				}
				return chain
			}
			if time.Now().After(deadline) {
				t.Fatalf("no SVID: %v\n%s", err, r.procs["signet-agent"].log.String())
			}
		}
	}
	svid()
	noRoots := func() {
		t.Helper()
		for _, name := range names {
			if found, err := filepath.Glob(filepath.Join(r.dir, name, "authority", "keys", "root-*")); err != nil || len(found) > 0 {
				t.Errorf("%s has %q, %v", name, found, err)
			}
		}
	}
	noRoots()

	// Each signs with another intermediate, which the token certified.
	for _, name := range names {
		before := r.authorities(name)["intermediate active"]
		r.signet("ca", "authority", "renew", "--socket", socket(name))
		r.wait(name+" to sign with another intermediate", func() bool {
			now := r.authorities(name)
			return len(now["intermediate old"]) > 0 && len(now["intermediate active"]) == 1 && now["intermediate active"][0] != before[0]
		})
	}
	svid()

	// The root, by ca1, which is killed while it holds the lease of the step.
	before := r.authorities("ca2")["root active"]
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	leased := r.cluster.Client().Watch(ctx, "/signet/l/rotation", clientv3.WithPrefix(), clientv3.WithFilterDelete())
	prepared := make(chan error, 1)
	go func() {
		prepared <- exec.CommandContext(ctx, filepath.Join(r.bin, "signet"), "ca", "authority", "prepare", "--socket", socket("ca1")).Run()
	}()
	select {
	case <-leased:
	case <-time.After(2 * time.Minute):
		t.Fatal("nobody takes the lease of a rotation")
	}
	r.stop("ca1", syscall.SIGKILL)
	err := <-prepared
	t.Logf("note: ca1 was killed when it had the lease; the command that it was given: %v", err)
	began := time.Now()
	for {
		now := r.authorities("ca2")
		if len(now["root active"]) == 1 && now["root active"][0] != before[0] || len(now["root prepared"])+len(now["root published"]) > 0 {
			break
		}
		// It waits for the lease that the dead one has; nothing is prepared twice.
		out, err := exec.CommandContext(t.Context(), filepath.Join(r.bin, "signet"), "ca", "authority", "prepare", "--socket", socket("ca2")).CombinedOutput()
		if err == nil {
			break
		}
		if time.Since(began) > 2*time.Minute {
			t.Fatalf("ca2 cannot prepare a root: %v\n%s\n%s", err, out, r.procs["ca2"].log.String())
		}
	}
	r.wait("ca2 to use another root", func() bool {
		now := r.authorities("ca2")
		return len(now["root active"]) == 1 && now["root active"][0] != before[0]
	})
	t.Logf("note: %v after the kill ca2 uses another root", time.Since(began).Round(time.Millisecond))
	r.serve("ca1")
	for _, name := range names {
		r.wait(name+" to sign below it", func() bool {
			now := r.authorities(name)
			return len(now["root active"]) == 1 && now["root active"][0] != before[0] && len(now["intermediate active"]) == 1 && len(now["intermediate old"]) > 1
		})
		if now := r.authorities(name); len(now["root active"])+len(now["root old"]) != 2 || len(now["root prepared"])+len(now["root published"]) != 0 {
			t.Errorf("%s lists other roots than the former and the present one: %v", name, now)
		}
	}
	noRoots()
	chain := svid()
	pool, between := x509.NewCertPool(), x509.NewCertPool()
	text, err := os.ReadFile(filepath.Join(r.dir, "root.pem"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range certificates(t, text) {
		pool.AddCert(c)
	}
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: pool, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		t.Error(err)
	}
	for _, name := range names {
		r.signet("ca", "log", "verify", "--store", "--socket", socket(name))
	}
	if err := errorsIn(r.procs); err != nil {
		t.Error(err)
	}
	for _, name := range append(names, "signet-agent") {
		r.stop(name, syscall.SIGTERM)
	}
}
