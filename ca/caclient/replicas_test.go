package caclient_test

import (
	"context"
	"errors"
	"fmt"
	"io"
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
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/storagetest"
)

func TestAgentsSpreadOverReplicas(t *testing.T) {
	t.Parallel()
	addresses := []string{"ca-0:8443", "ca-1:8443", "ca-2:8443"}
	first, at := map[string]int{}, time.Now()
	for i := range 3000 {
		node := fmt.Sprint("node-", i)
		o := caclient.NewOrder(node, addresses)
		now := o.At(at)
		first[now[0]]++
		if !slices.Equal(now, caclient.NewOrder(node, []string{addresses[2], addresses[0], addresses[1]}).At(at)) {
			t.Fatalf("%s has another order when they are named in another one", node)
		}
		o.Last(now[0], at)
		if got := o.At(at); !slices.Equal(got, []string{now[1], now[2], now[0]}) {
			t.Fatalf("after %v, without the first, %v", now, got)
		}
		o.Last("ca-9:8443", at)
		o.Last("", at)
		if got := o.At(at); len(got) != 3 {
			t.Fatalf("after one that there is not %v", got)
		}
		// Who was left last is last, and each is back in its place after a while.
		o.Last(now[1], at.Add(time.Minute))
		for after, want := range map[time.Duration][]string{
			2 * time.Minute:                  {now[2], now[0], now[1]},
			10*time.Minute - time.Nanosecond: {now[2], now[0], now[1]},
			10 * time.Minute:                 {now[0], now[2], now[1]},
			11 * time.Minute:                 now,
		} {
			if got := caclient.Clone(o).At(at.Add(after)); !slices.Equal(got, want) {
				t.Fatalf("of %v the first two were left, and after %v it is %v", now, after, got)
			}
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

// twoReplicas share a state. Which of them can write its log is set in files; edits change
// the configuration of the second.
func twoReplicas(t *testing.T, edits ...func(*ca.Config)) (a, b *authority, files *logs) {
	t.Helper()
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
	files = &logs{FS: fs, off: map[string]bool{}}
	a = newAuthority(t, func(c *ca.Config) {
		c.Shared, c.RootReplica, c.Instance = ca.Shared{Store: state, Files: files, LogWait: time.Second}, 1, 1
	})
	b = newAuthority(t, func(c *ca.Config) {
		c.Shared, c.RootReplica, c.Pods, c.Agents, c.Workloads = a.cfg.Shared, 1, a.cfg.Pods, a.cfg.Agents, a.cfg.Workloads
		for _, e := range edits {
			e(c)
		}
	})
	return a, b, files
}

// behindOne has an agent know one address, as that of a Service, which leads to a replica
// of the test's choice.
func behindOne(cfg *caclient.Config, first *authority) (ready *atomic.Pointer[authority]) {
	ready = &atomic.Pointer[authority]{}
	ready.Store(first)
	cfg.Addresses = []string{"signet-ca:8443"}
	cfg.Dial = func(ctx context.Context, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", ready.Load().addr)
	}
	return ready
}

// issuing is the instance that issues to an agent, 0 for none.
func issuing(t *testing.T, c *caclient.Client) byte {
	t.Helper()
	r, _ := request(t)
	r.PodUID = "uid-server"
	rs, err := c.Issue(t.Context(), []identity.Request{r})
	if err != nil || rs[0].Err != nil {
		return 0
	}
	return ca.Serial(rs[0].Chain[0])[0]
}

// TestAnAgentLeavesAReplicaBehindAService: with one address it does not stay with a
// replica that is there and can issue nothing, and that new connections do not reach.
func TestAnAgentLeavesAReplicaBehindAService(t *testing.T) {
	t.Parallel()
	a, b, files := twoReplicas(t)
	cfg := a.config()
	service := behindOne(&cfg, a)
	c, end := run(t, cfg)
	ready(t, c)
	by := func() byte { return issuing(t, c) }
	eventually(t, "the first to issue", func() bool { return by() == 1 })
	service.Store(b)
	for range 10 {
		if by() != 1 {
			t.Fatal("it left a replica that issues")
		}
	}
	files.set("log/001", true)
	began := time.Now()
	eventually(t, "the other one to issue", func() bool { return by() == 2 })
	t.Logf("note: after %v the other replica issues", time.Since(began).Round(time.Millisecond))
	files.set("log/001", false)
	eventually(t, "the first one to be ready again", func() bool { return a.Ready() == nil })
	end()
	b.stop()
	a.stop()
}

// TestAnAgentIsRenewedByAnotherReplica, where the one that it is connected to cannot, and
// nothing else is asked of that.
func TestAnAgentIsRenewedByAnotherReplica(t *testing.T) {
	t.Parallel()
	a, b, files := twoReplicas(t)
	cfg := a.config()
	service := behindOne(&cfg, a)
	c, end := run(t, cfg)
	ready(t, c)
	cred, _ := c.Credential()
	end()
	// So that it is due as soon as it may be.
	cfg.Saved = &caclient.Credential{SVID: cred.SVID, RenewAt: time.Now(), TokenBy: cred.TokenBy}
	cfg.Pods = &identity.Pods{}
	files.set("log/001", true)
	c, end = run(t, cfg)
	ready(t, c)
	service.Store(b)
	eventually(t, "another SVID", func() bool {
		cred, _ := c.Credential()
		return cred != nil && ca.Serial(cred.SVID.Certificates[0])[0] == 2
	})
	log, err := b.admin().ListLog(t.Context(), &capb.ListLogRequest{})
	if err != nil {
		t.Fatal(err)
	}
	renewed := false
	for {
		e, err := log.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		renewed = renewed || e.GetRecord().GetKind() == capb.IssuanceRecord_KIND_AGENT && e.GetRecord().GetEvidence() == capb.IssuanceRecord_EVIDENCE_RENEWAL
	}
	if !renewed {
		t.Error("its SVID was replaced, and not renewed")
	}
	files.set("log/001", false)
	eventually(t, "the first one to be ready again", func() bool { return a.Ready() == nil })
	end()
	b.stop()
	a.stop()
}

// TestAnAgentLeavesAReplicaThatCannotIssue, and does not run from one to the other where
// none can.
func TestAnAgentLeavesAReplicaThatCannotIssue(t *testing.T) {
	t.Parallel()
	a, b, files := twoReplicas(t)
	cfg := a.config()
	cfg.Addresses = []string{a.addr, b.addr}
	var dials atomic.Int64
	cfg.Dial = func(ctx context.Context, address string) (net.Conn, error) {
		dials.Add(1)
		return (&net.Dialer{}).DialContext(ctx, "tcp", address)
	}
	c, end := run(t, cfg)
	ready(t, c)
	by := func() byte { return issuing(t, c) }
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
	before, n := dials.Load(), int64(0)
	began = time.Now()
	for ; time.Since(began) < 3*time.Second || n < 2 && time.Since(began) < time.Minute; time.Sleep(10 * time.Millisecond) {
		if by() != 0 {
			t.Fatal("something is issued that cannot be recorded")
		}
		n = dials.Load() - before
	}
	if took := time.Since(began); n < 2 || float64(n) > 4*took.Seconds() {
		t.Errorf("%d connections in %v in which no replica can issue", n, took.Round(time.Millisecond))
	}
	files.set("log/001", false)
	files.set("log/002", false)
	eventually(t, "it to go on", func() bool { return by() != 0 && a.Ready() == nil && b.Ready() == nil })
	end()
	b.stop()
	a.stop()
}
