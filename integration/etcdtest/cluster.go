package etcdtest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
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

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// Options say what differs from one member without TLS.
type Options struct {
	// Members is how many there are; 0 means 1.
	Members int
	// TLS has clients prove themselves by a certificate of the cluster's authority.
	TLS bool
	// Args are further arguments of every member.
	Args []string
}

// Cluster is a running cluster. It ends with the test.
type Cluster struct {
	Members []*Member
	// CAFile, CertFile and KeyFile are what a client needs where Options.TLS is set.
	CAFile, CertFile, KeyFile string

	tb     testing.TB
	dir    string
	tools  string           // folder of etcdctl and etcdutl
	client *clientv3.Client // of the administrator
	tls    *tls.Config
}

// Member is one of a cluster.
type Member struct {
	*process.Process
	// Endpoint is where clients reach it.
	Endpoint string

	name     string
	data     string // its folder; set while it does not run
	peer     string // HOST:PORT where it listens for the others
	announce string // HOST:PORT where they reach it, through its proxy
	id       string // as members name each other; empty before the cluster runs
	proxy    *peerProxy
}

// found are the programs.
type found struct{ etcd, tools string }

var find = sync.OnceValues(func() (f found, err error) {
	root, err := parts.Root()
	if err != nil {
		return f, err
	}
	etcd, err := parts.FindEtcd(root)
	if err != nil {
		return f, err
	}
	tools, err := parts.FindEtcdTools(root)
	return found{etcd.Path, tools.Path}, err
})

// Start runs a cluster. Without the program the test is skipped, in CI it fails.
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
	c := &Cluster{tb: tb, dir: tb.TempDir(), tools: programs.tools}
	if opt.TLS {
		if err := c.newKeys(); err != nil {
			tb.Fatal(err)
		}
	}
	tb.Cleanup(c.end)
	// Another process may take a port between the choice and the start.
	for try := 0; ; try++ {
		if err = c.run(programs.etcd, opt); err == nil {
			return c
		}
		c.end()
		if try == 2 {
			tb.Fatal(err)
		}
		tb.Logf("starting the cluster once more: %v", err)
	}
}

func (c *Cluster) end() {
	if c.client != nil {
		_ = c.client.Close() // the members end next
		c.client = nil
	}
	for _, m := range c.Members {
		if err := m.Finish(syscall.SIGKILL); err != nil {
			c.tb.Error(err)
		}
		m.proxy.Close()
	}
	c.Members = nil
}

func (c *Cluster) run(program string, opt Options) error {
	n := max(opt.Members, 1)
	scheme := "http://"
	if opt.TLS {
		scheme = "https://"
	}
	ports, err := process.FreePorts(2 * n)
	if err != nil {
		return err
	}
	var all []string
	for i := range n {
		m := &Member{name: fmt.Sprint("m", i), Endpoint: scheme + "127.0.0.1:" + ports[2*i], peer: "127.0.0.1:" + ports[2*i+1]}
		if m.proxy, err = newPeerProxy(m.peer); err != nil {
			return err
		}
		c.Members = append(c.Members, m)
		m.announce = m.proxy.listener.Addr().String()
		all = append(all, m.name+"=http://"+m.announce)
	}
	for _, m := range c.Members {
		if m.data, err = os.MkdirTemp(c.dir, m.name+"-"); err != nil {
			return err
		}
		args := []string{"--name", m.name, "--initial-cluster", strings.Join(all, ","), "--initial-cluster-token", "test",
			"--listen-client-urls", m.Endpoint, "--advertise-client-urls", m.Endpoint,
			"--listen-peer-urls", "http://" + m.peer, "--initial-advertise-peer-urls", "http://" + m.announce,
			"--unsafe-no-fsync", "--log-level", "warn", "--log-outputs", "stderr"}
		if opt.TLS {
			args = append(args, "--cert-file", c.CertFile, "--key-file", c.KeyFile, "--trusted-ca-file", c.CAFile, "--client-cert-auth")
		}
		args = append(args, opt.Args...)
		m.Process = &process.Process{Name: "etcd " + m.name, Command: func() *exec.Cmd { return exec.Command(program, append(args, "--data-dir", m.data)...) },
			Ready: func() error { return c.ask(m) }}
	}
	if c.client, err = clientv3.New(clientv3.Config{Endpoints: c.Endpoints(), TLS: c.tls, DialTimeout: 5 * time.Second, Logger: zap.NewNop()}); err != nil {
		return err
	}
	for _, m := range c.Members {
		if err := m.Begin(); err != nil {
			return err
		}
	}
	for _, m := range c.Members {
		if err := m.Await(process.Patience); err != nil {
			return fmt.Errorf("%w\n%s", err, m.Log())
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), process.Patience)
	defer cancel()
	list, err := c.client.MemberList(ctx)
	if err != nil {
		return err
	}
	names := map[string]string{}
	for _, m := range list.Members {
		names[m.Name] = fmt.Sprintf("%x", m.ID)
	}
	for _, m := range c.Members {
		m.id = names[m.name]
	}
	return nil
}

// ask is nil if a member knows a leader.
func (c *Cluster) ask(m *Member) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	s, err := c.client.Status(ctx, m.Endpoint)
	if err == nil && s.Leader == 0 {
		err = errors.New("there is no leader")
	}
	return err
}

// Endpoints are where clients reach the members.
func (c *Cluster) Endpoints() (all []string) {
	for _, m := range c.Members {
		all = append(all, m.Endpoint)
	}
	return all
}

// TLS is a client's side of TLS; nil where Options.TLS is not set.
func (c *Cluster) TLS() *tls.Config {
	if c.tls == nil {
		return nil
	}
	return c.tls.Clone()
}

// Client is the administrator, who reaches every member whoever is cut off.
func (c *Cluster) Client() *clientv3.Client { return c.client }

// Leader waits until a majority agrees on a leader, and returns it. Members that do not
// answer have no voice.
func (c *Cluster) Leader(tb testing.TB) *Member {
	tb.Helper()
	deadline := time.Now().Add(process.Patience)
	for time.Now().Before(deadline) {
		votes := map[string]int{}
		for _, m := range c.Members {
			ctx, cancel := context.WithTimeout(tb.Context(), time.Second)
			if s, err := c.client.Status(ctx, m.Endpoint); err == nil && s.Leader != 0 {
				votes[fmt.Sprintf("%x", s.Leader)]++
			}
			cancel()
		}
		for _, m := range c.Members {
			if votes[m.id] > len(c.Members)/2 {
				return m
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	tb.Fatalf("no leader within %v", process.Patience)
	return nil
}

// Cut cuts a member off from all others until Mend. Clients still reach it.
func (c *Cluster) Cut(m *Member) {
	for _, other := range c.Members {
		if other != m {
			m.proxy.cut(other.id)
			other.proxy.cut(m.id)
		}
	}
}

// Mend undoes every Cut.
func (c *Cluster) Mend() {
	for _, m := range c.Members {
		m.proxy.mend()
	}
}

// Ctl runs etcdctl against all members, and returns what it prints.
func (c *Cluster) Ctl(tb testing.TB, args ...string) string {
	tb.Helper()
	args = append(args, "--endpoints", strings.Join(c.Endpoints(), ","), "--command-timeout", process.Patience.String())
	if c.tls != nil {
		args = append(args, "--cacert", c.CAFile, "--cert", c.CertFile, "--key", c.KeyFile)
	}
	return c.tool(tb, "etcdctl", args...)
}

func (c *Cluster) tool(tb testing.TB, name string, args ...string) string {
	tb.Helper()
	out, err := exec.CommandContext(tb.Context(), filepath.Join(c.tools, name), args...).CombinedOutput()
	if err != nil {
		tb.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// Snapshot saves what the cluster holds to a file.
func (c *Cluster) Snapshot(tb testing.TB, file string) {
	tb.Helper()
	args := []string{"snapshot", "save", file, "--endpoints", c.Members[0].Endpoint}
	if c.tls != nil {
		args = append(args, "--cacert", c.CAFile, "--cert", c.CertFile, "--key", c.KeyFile)
	}
	c.tool(tb, "etcdctl", args...)
}

// Restore ends all members, has etcdutl make each a folder from a snapshot, and starts
// them. args are further arguments of etcdutl.
func (c *Cluster) Restore(tb testing.TB, file string, args ...string) {
	tb.Helper()
	var all []string
	for _, m := range c.Members {
		m.Kill(tb)
		all = append(all, m.name+"=http://"+m.announce)
	}
	for _, m := range c.Members {
		dir, err := os.MkdirTemp(c.dir, m.name+"-restored-")
		if err != nil {
			tb.Fatal(err)
		}
		m.data = filepath.Join(dir, "data") // which etcdutl makes
		c.tool(tb, "etcdutl", append([]string{"snapshot", "restore", file, "--name", m.name, "--data-dir", m.data, "--initial-cluster", strings.Join(all, ","),
			"--initial-cluster-token", "test", "--initial-advertise-peer-urls", "http://" + m.announce}, args...)...)
	}
	for _, m := range c.Members {
		m.Launch(tb)
	}
	for _, m := range c.Members {
		m.WaitReady(tb)
	}
}

// Compact makes the cluster forget all revisions before the present one.
func (c *Cluster) Compact(tb testing.TB) {
	tb.Helper()
	deadline := time.Now().Add(process.Patience)
	for {
		// A member that is cut off may be asked first.
		ctx, cancel := context.WithTimeout(tb.Context(), 2*time.Second)
		resp, err := c.client.Get(ctx, "compact")
		if err == nil {
			_, err = c.client.Compact(ctx, resp.Header.Revision)
		}
		cancel()
		if err == nil || errors.Is(err, rpctypes.ErrCompacted) {
			return
		}
		if time.Now().After(deadline) {
			tb.Errorf("compacting: %v", err)
			return
		}
	}
}

// newKeys makes an authority and one pair that serves members and clients.
func (c *Cluster) newKeys() error {
	ca, caKey, err := newAuthority()
	if err != nil {
		return err
	}
	cert, key, err := issue(ca, caKey)
	if err != nil {
		return err
	}
	c.CAFile, c.CertFile, c.KeyFile = filepath.Join(c.dir, "ca.pem"), filepath.Join(c.dir, "cert.pem"), filepath.Join(c.dir, "key.pem")
	for name, b := range map[string][]byte{c.CAFile: pemCertificate(ca.Raw), c.CertFile: cert, c.KeyFile: key} {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			return err
		}
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	c.tls = &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}
	return nil
}
