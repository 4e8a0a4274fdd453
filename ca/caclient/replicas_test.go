package caclient_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/caclient"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/storagetest"
)

func TestAgentsSpreadOverReplicas(t *testing.T) {
	t.Parallel()
	addresses := []string{"ca-0:8443", "ca-1:8443", "ca-2:8443"}
	first := map[string]int{}
	for i := range 3000 {
		node := fmt.Sprint("node-", i)
		o := caclient.NewOrder(node, addresses)
		now := o.Now()
		first[now[0]]++
		if !slices.Equal(now, caclient.NewOrder(node, []string{addresses[2], addresses[0], addresses[1]}).Now()) {
			t.Fatalf("%s has another order when they are named in another one", node)
		}
		o.Last(now[0])
		if got := o.Now(); !slices.Equal(got, []string{now[1], now[2], now[0]}) {
			t.Fatalf("after %v, without the first, %v", now, got)
		}
		o.Last("ca-9:8443")
		o.Last("")
		if got := o.Now(); len(got) != 3 {
			t.Fatalf("after one that there is not %v", got)
		}
	}
	for _, a := range addresses {
		if n := first[a]; n < 900 || n > 1100 {
			t.Errorf("%d of 3000 agents begin with %s", n, a)
		}
	}
}

// logs are a place of logs of which some can refuse to be written.
type logs struct {
	storage.FS
	mu  sync.Mutex
	off map[string]bool // by folder; guarded by mu
}

func (l *logs) set(folder string, off bool) { l.mu.Lock(); defer l.mu.Unlock(); l.off[folder] = off }

func (l *logs) refuses(name string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.off[filepath.Dir(name)]
}

func (l *logs) Open(name string) (storage.File, error) {
	f, err := l.FS.Open(name)
	return logFile{f, l, name}, err
}

func (l *logs) Create(name string) (storage.File, error) {
	f, err := l.FS.Create(name)
	return logFile{f, l, name}, err
}

type logFile struct {
	storage.File
	l    *logs
	name string
}

func (f logFile) WriteAt(b []byte, at int64) (int, error) {
	if f.l.refuses(f.name) {
		return 0, errors.New("the disk is away")
	}
	return f.File.WriteAt(b, at)
}

// TestAnAgentLeavesAReplicaThatCannotIssue, and does not run from one to the other where
// none can.
func TestAnAgentLeavesAReplicaThatCannotIssue(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "shared")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	state, err := storage.OpenBolt(filepath.Join(dir, "state.db"), storage.BoltOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { state.Close() })
	fs := storagetest.NewCrashFS()
	parent, err := fs.Lock("log", true)
	if err != nil {
		t.Fatal(err)
	}
	parent.Close()
	files := &logs{FS: fs, off: map[string]bool{}}
	a := newAuthority(t, func(c *ca.Config) {
		c.Shared, c.RootReplica, c.Instance = ca.Shared{Store: state, Files: files, LogWait: time.Second}, 1, 1
	})
	b := newAuthority(t, func(c *ca.Config) {
		c.Shared, c.RootReplica, c.Pods, c.Agents, c.Workloads = a.cfg.Shared, 1, a.cfg.Pods, a.cfg.Agents, a.cfg.Workloads
	})
	cfg := a.config()
	cfg.Addresses = []string{a.addr, b.addr}
	var dials atomic.Int64
	cfg.Dial = func(ctx context.Context, address string) (net.Conn, error) {
		dials.Add(1)
		return (&net.Dialer{}).DialContext(ctx, "tcp", address)
	}
	c, end := run(t, cfg)
	ready(t, c)
	// by is the instance that issues, 0 for none.
	by := func() byte {
		r, _ := request(t)
		r.PodUID = "uid-server"
		rs, err := c.Issue(t.Context(), []identity.Request{r})
		if err != nil || rs[0].Err != nil {
			return 0
		}
		return ca.Serial(rs[0].Chain[0])[0]
	}
	with := by()
	if with == 0 {
		t.Fatal("nothing is issued")
	}
	for range 20 {
		if got := by(); got != with {
			t.Fatalf("it does not stay with %d, but asks %d", with, got)
		}
	}
	files.set(fmt.Sprintf("log/%03d", with), true)
	began := time.Now()
	eventually(t, "the other one to issue", func() bool { return by() == 3-with })
	t.Logf("note: after %v the other replica issues", time.Since(began).Round(time.Millisecond))
	files.set(fmt.Sprintf("log/%03d", 3-with), true)
	before := dials.Load()
	for began := time.Now(); time.Since(began) < 3*time.Second; time.Sleep(10 * time.Millisecond) {
		if by() != 0 {
			t.Fatal("something is issued that cannot be recorded")
		}
	}
	if n := dials.Load() - before; n < 2 || n > 12 {
		t.Errorf("%d connections in three seconds in which no replica can issue", n)
	}
	files.set("log/001", false)
	files.set("log/002", false)
	eventually(t, "it to go on", func() bool { return by() != 0 && a.Ready() == nil && b.Ready() == nil })
	end()
	b.stop()
	a.stop()
}
