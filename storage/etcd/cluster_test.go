package etcd_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/integration/etcdtest"
	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/etcd"
)

// replica does to etcd what a replica of the authority does: it records in its own log
// before anything counts, changes shared state by compare-and-swap, and holds a lease
// for a job. What it was told is acknowledged it says to who asks; the test holds that
// against what is there in the end.
type replica struct {
	Endpoints []string
	Prefix    string
	Instance  uint32
	Name      string
}

// said is one thing that a replica was told.
type said struct {
	Kind     string `json:"kind"` // open, record, count, lease, lost, failed
	Who      string `json:"who"`
	Instance uint32 `json:"instance,omitempty"`
	N        uint64 `json:"n,omitempty"`
	Text     string `json:"text,omitempty"`
	at       time.Time
}

func (r replica) run(ctx context.Context, say func(said)) error {
	s, err := openAtLast(ctx, etcd.Options{Endpoints: r.Endpoints, Prefix: r.Prefix, Name: r.Name, Timeout: time.Second, OwnerTTL: 2 * time.Second})
	if err != nil {
		return err
	}
	defer s.Close()
	l, err := storage.OpenLog(fmt.Sprintf("log/%03d", r.Instance), storage.LogOptions{Instance: r.Instance, FS: s.Files(), Remote: true, SegmentSize: 64 << 10, LockTimeout: time.Minute})
	if err != nil {
		return err
	}
	defer l.Close()
	tell := func(kind string, n uint64, text string) {
		say(said{Kind: kind, Who: r.Name, Instance: r.Instance, N: n, Text: text})
	}
	tell("open", l.Head().Sequence, "")
	var wg sync.WaitGroup
	wg.Go(func() { r.records(ctx, l, tell) })
	wg.Go(func() { r.counts(ctx, s, tell) })
	wg.Go(func() { r.job(ctx, s, tell) })
	wg.Wait()
	return nil
}

// openAtLast opens a store, again where the cluster is too slow for a short timeout.
func openAtLast(ctx context.Context, opt etcd.Options) (s *etcd.Store, err error) {
	for deadline := time.Now().Add(time.Minute); ; pause(ctx, 50*time.Millisecond) {
		if s, err = etcd.Open(ctx, opt); err == nil || ctx.Err() != nil || time.Now().After(deadline) {
			return s, err
		}
	}
}

// records appends to the log as fast as that goes, from four callers.
func (r replica) records(ctx context.Context, l *storage.FileLog, tell func(string, uint64, string)) {
	var wg sync.WaitGroup
	for c := range 4 {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				text := fmt.Sprintf("%s caller %d record %d", r.Name, c, i)
				last, err := l.Append(ctx, [][]byte{[]byte(text)})
				if err == nil {
					tell("record", last, text)
					continue
				}
				tell("failed", uint64(c), err.Error())
				pause(ctx, 50*time.Millisecond)
			}
		})
	}
	wg.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			h := l.Head()
			h.Signature = []byte("signature of " + r.Name)
			_ = l.AppendHead(ctx, h) // refused while the log is closed
			pause(ctx, 200*time.Millisecond)
		}
	})
	wg.Wait()
}

// counts raises a counter that all replicas share, and leaves a key for each number.
func (r replica) counts(ctx context.Context, s storage.Store, tell func(string, uint64, string)) {
	for i := 0; ctx.Err() == nil; i++ {
		e, err := s.Get(ctx, "counter")
		if err != nil && !errors.Is(err, storage.ErrNotFound) {
			pause(ctx, 50*time.Millisecond)
			continue
		}
		var n uint64
		_, _ = fmt.Sscan(string(e.Value), &n) // 0 at first
		n++
		text := fmt.Sprintf("%s %d", r.Name, i)
		key := fmt.Sprintf("t/%08d", n)
		_, err = s.Commit(ctx, []storage.Cond{{Key: "counter", Revision: e.Revision}, {Key: key}},
			[]storage.Op{{Key: "counter", Value: fmt.Append(nil, n)}, {Key: key, Value: []byte(text)}})
		switch {
		case err == nil:
			tell("count", n, text)
		case errors.Is(err, storage.ErrUnknown):
			// Read again: from then on it is certain.
			for ctx.Err() == nil {
				e, err := s.Get(ctx, key)
				if err == nil && string(e.Value) == text {
					tell("count", n, text)
				}
				if err == nil || errors.Is(err, storage.ErrNotFound) {
					break
				}
				pause(ctx, 50*time.Millisecond)
			}
		}
		pause(ctx, 5*time.Millisecond)
	}
}

// job holds a lease and counts its terms, by compare-and-swap.
func (r replica) job(ctx context.Context, s storage.Store, tell func(string, uint64, string)) {
	for ctx.Err() == nil {
		l, err := s.Lease(ctx, "job", 2*time.Second)
		if err != nil {
			pause(ctx, 50*time.Millisecond)
			continue
		}
		tell("lease", 0, "")
		select {
		case <-ctx.Done():
			_ = l.Release(context.WithoutCancel(ctx)) // it expires in any case
			return
		case <-l.Done():
			tell("lost", 0, "")
		}
	}
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// replicaEnv makes the test binary one replica, so that it can be stopped as a process.
const replicaEnv = "SIGNET_TEST_ETCD_REPLICA"

func TestMain(m *testing.M) {
	text := os.Getenv(replicaEnv)
	if text == "" {
		os.Exit(m.Run())
	}
	var r replica
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		panic(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	var mu sync.Mutex
	out := json.NewEncoder(os.Stdout)
	err := r.run(ctx, func(s said) {
		mu.Lock()
		defer mu.Unlock()
		_ = out.Encode(s) // who reads it is gone otherwise
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// history is everything that replicas said.
type history struct {
	t     *testing.T
	start time.Time

	mu    sync.Mutex
	all   []said
	marks []string
}

func (h *history) add(s said) {
	s.at = time.Now()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.all = append(h.all, s)
}

func (h *history) mark(format string, args ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.marks = append(h.marks, fmt.Sprintf("%5.1f s  ", time.Since(h.start).Seconds())+fmt.Sprintf(format, args...))
}

// since is how many things of a kind were said after a moment, by who (empty: by all).
func (h *history) since(at time.Time, kind, who string) (n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := len(h.all) - 1; i >= 0 && h.all[i].at.After(at); i-- {
		if s := h.all[i]; s.Kind == kind && (who == "" || s.Who == who) {
			n++
		}
	}
	return n
}

// durableAfterFailure is how many records a replica was told of, after a moment, by callers
// of which one was told before that nothing is recorded.
func (h *history) durableAfterFailure(at time.Time, who string) (n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	failed := map[string]bool{}
	for _, s := range h.all {
		if s.Who != who || !s.at.After(at) {
			continue
		}
		switch s.Kind {
		case "failed":
			failed[fmt.Sprintf("%s caller %d ", who, s.N)] = true
		case "record":
			for caller := range failed {
				if strings.HasPrefix(s.Text, caller) {
					n++
				}
			}
		}
	}
	return n
}

// wait waits until n things of a kind were said after a moment.
func (h *history) wait(at time.Time, kind, who string, n int) {
	h.t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for h.since(at, kind, who) < n {
		if time.Now().After(deadline) {
			h.t.Fatalf("waited for %d × %s by %q since %.1f s, got %d%s", n, kind, who, at.Sub(h.start).Seconds(), h.since(at, kind, who), h.last(who))
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// last is what a replica was told last of each kind, and how often since the start.
func (h *history) last(who string) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	last, n := map[string]said{}, map[string]int{}
	for _, s := range h.all {
		if who == "" || s.Who == who {
			last[s.Kind] = s
			n[s.Kind]++
		}
	}
	var b strings.Builder
	for _, kind := range slices.Sorted(maps.Keys(last)) {
		s := last[kind]
		fmt.Fprintf(&b, "\n\t%d × %s, the last at %.1f s: %d %s", n[kind], kind, s.at.Sub(h.start).Seconds(), s.N, s.Text)
	}
	for _, m := range h.marks {
		fmt.Fprintf(&b, "\n\t%s", m)
	}
	return b.String()
}

// replicaProcess is a replica in a process of its own.
type replicaProcess struct {
	cmd  *exec.Cmd
	done chan error
}

func (h *history) startProcess(r replica) *replicaProcess {
	h.t.Helper()
	b, err := json.Marshal(r)
	if err != nil {
		h.t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), replicaEnv+"="+string(b))
	out, err := cmd.StdoutPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	var errs strings.Builder
	cmd.Stderr = &errs
	// Should the test binary be killed, the kernel ends it: when the thread ends that
	// started it, so that thread has to live as long.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	p := &replicaProcess{cmd: cmd, done: make(chan error, 1)}
	go func() {
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		lines := bufio.NewReader(out)
		for {
			line, err := lines.ReadBytes('\n')
			if err != nil {
				break
			}
			var s said
			if json.Unmarshal(line, &s) == nil {
				h.add(s)
			}
		}
		if err = cmd.Wait(); err != nil {
			err = fmt.Errorf("%w: %s", err, errs.String())
		}
		p.done <- err
	}()
	if err := <-started; err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = cmd.Process.Kill() }) // it has ended if all went well
	return p
}

func (p *replicaProcess) signal(t *testing.T, s os.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		t.Error(err)
	}
}

// TestClusterFaults lets three replicas work on a cluster of three members to which
// everything happens that happens to clusters.
func TestClusterFaults(t *testing.T) {
	if testing.Short() {
		t.Skip("half a minute")
	}
	t.Parallel()
	c := etcdtest.Start(t, etcdtest.Options{Members: 3, Args: []string{"--heartbeat-interval=50", "--election-timeout=500"}})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	prefix := newPrefix()
	h := &history{t: t, start: time.Now()}
	endpoints := c.Endpoints()
	var replicas sync.WaitGroup
	for i := range 2 {
		r := replica{Endpoints: endpoints, Prefix: prefix, Instance: uint32(i + 1), Name: fmt.Sprint("replica-", i+1)}
		replicas.Go(func() {
			if err := r.run(ctx, h.add); err != nil && ctx.Err() == nil {
				t.Errorf("%s: %v", r.Name, err)
			}
		})
	}
	third := replica{Endpoints: endpoints, Prefix: prefix, Instance: 3, Name: "replica-3"}
	process := h.startProcess(third)

	watcher, err := openAtLast(ctx, etcd.Options{Endpoints: endpoints, Prefix: prefix, Timeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer watcher.Close()
	v := &view{t: t, seen: map[string]string{}}
	replicas.Go(func() { v.follow(ctx, watcher) })

	all := func() time.Time {
		t.Helper()
		at := time.Now()
		for i := range 3 {
			h.wait(at, "record", fmt.Sprint("replica-", i+1), 20)
		}
		h.wait(at, "count", "", 10)
		return at
	}
	h.wait(h.start, "open", "", 3)
	h.mark("three replicas write")
	all()
	time.Sleep(2 * time.Second) // what a cluster without faults does, to compare

	leader := c.Leader(t)
	h.mark("the leader is killed")
	leader.Kill(t)
	all()
	h.mark("all three write again")
	leader.Start(t)
	h.mark("the killed member is back")
	all()

	first, second := c.Members[0], c.Members[1]
	h.mark("two of three members are frozen: no quorum")
	first.Freeze(t)
	second.Freeze(t)
	// What was acknowledged before is told by replicas that the machine may not get to at once.
	acknowledged := func(at time.Time) int { return h.since(at, "record", "") + h.since(at, "count", "") }
	lost := time.Now()
	for began := lost; ; {
		time.Sleep(time.Second)
		if acknowledged(lost) == 0 {
			break
		}
		if lost = time.Now(); lost.Sub(began) > time.Minute {
			t.Error("without a quorum more and more is acknowledged")
			break
		}
	}
	time.Sleep(3 * time.Second)
	if n := acknowledged(lost); n > 0 {
		t.Errorf("%d records and commits were acknowledged without a quorum", n)
	}
	first.Thaw(t)
	second.Thaw(t)
	h.mark("quorum is back")
	all()
	h.mark("all three write again")

	leader = c.Leader(t)
	h.mark("the leader is cut off from the others; clients still reach it")
	c.Cut(leader)
	all()
	h.mark("all three write again")
	c.Compact(t)
	c.Mend()
	h.mark("history is compacted while members differ, and the cut mended")
	all()
	c.Compact(t)
	all()

	h.mark("replica 3 is stopped (SIGSTOP) for longer than its leases")
	stopped := time.Now()
	process.signal(t, syscall.SIGSTOP)
	successor := third
	successor.Name = "replica-3b"
	next := h.startProcess(successor)
	h.wait(stopped, "open", successor.Name, 1)
	h.mark("another process has its log")
	h.wait(stopped, "record", successor.Name, 50)
	h.mark("replica 3 goes on")
	process.signal(t, syscall.SIGCONT)
	resumed := time.Now()
	h.wait(resumed, "failed", third.Name, 20)
	h.wait(time.Now(), "record", successor.Name, 50)
	// What it had been told before it was stopped it says only now; then each of its
	// callers fails, and goes on failing.
	late := h.durableAfterFailure(resumed, third.Name)
	h.mark("replica 3 was told of %d records after it had lost its log", late)
	if late > 0 {
		t.Errorf("who lost its log was told that %d records are durable", late)
	}

	cancel()
	process.signal(t, os.Interrupt)
	next.signal(t, os.Interrupt)
	for _, p := range []*replicaProcess{process, next} {
		if err := <-p.done; err != nil {
			t.Errorf("a replica ended: %v", err)
		}
	}
	replicas.Wait()
	h.check(c, prefix, v)
}

// view follows the shared state by watching, and lists anew where it has to.
type view struct {
	t       *testing.T
	seen    map[string]string
	relists int
	events  int
}

func (v *view) follow(ctx context.Context, s storage.Store) {
	for ctx.Err() == nil {
		entries, rev, err := s.List(ctx, "t/")
		if err != nil {
			pause(ctx, 50*time.Millisecond)
			continue
		}
		v.relists++
		listed := map[string]string{}
		for _, e := range entries {
			listed[e.Key] = string(e.Value)
		}
		for key := range v.seen {
			if listed[key] != v.seen[key] {
				v.t.Errorf("%s was seen as %q and listed as %q", key, v.seen[key], listed[key])
			}
		}
		v.seen = listed
		for e, err := range s.Watch(ctx, "t/", rev) {
			if err != nil {
				if !errors.Is(err, storage.ErrCompacted) {
					v.t.Errorf("watching: %v", err)
				}
				break
			}
			v.events++
			// Numbers come in order, without a gap: that is what compare-and-swap makes.
			if want := fmt.Sprintf("t/%08d", len(v.seen)+1); e.Key != want {
				v.t.Errorf("the watch yields %s, %s is due", e.Key, want)
			}
			v.seen[e.Key] = string(e.Value)
		}
	}
}

// check holds what replicas were told against what is there.
func (h *history) check(c *etcdtest.Cluster, prefix string, v *view) {
	t := h.t
	s, err := openAtLast(t.Context(), etcd.Options{Endpoints: c.Endpoints(), Prefix: prefix, Timeout: 2 * time.Second, OwnerTTL: 2 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	records := map[uint32]map[uint64]string{1: {}, 2: {}, 3: {}}
	counts := map[uint64]string{}
	failed := 0
	for _, x := range h.all {
		switch x.Kind {
		case "record":
			if old, twice := records[x.Instance][x.N]; twice {
				t.Errorf("record %d of instance %d was given to %q and to %q", x.N, x.Instance, old, x.Text)
			}
			records[x.Instance][x.N] = x.Text
		case "count":
			if old, twice := counts[x.N]; twice {
				t.Errorf("number %d was given to %q and to %q", x.N, old, x.Text)
			}
			counts[x.N] = x.Text
		case "failed":
			failed++
		}
	}
	total, unacknowledged := 0, 0
	for instance, want := range records {
		l, err := storage.OpenLog(fmt.Sprintf("log/%03d", instance), storage.LogOptions{Instance: instance, FS: s.Files(), ReadOnly: true, LockTimeout: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		there, texts := uint64(0), map[string]bool{}
		for r, err := range l.Scan(t.Context(), 1) {
			if err != nil {
				t.Fatal(err)
			}
			there = r.Sequence
			if w, ok := want[r.Sequence]; ok && w != string(r.Data) {
				t.Errorf("instance %d: record %d is %q, acknowledged was %q", instance, r.Sequence, r.Data, w)
			}
			if texts[string(r.Data)] {
				t.Errorf("instance %d: %q is there twice", instance, r.Data)
			}
			texts[string(r.Data)] = true
		}
		for n, text := range want {
			if n > there {
				t.Errorf("instance %d: record %d, %q, was acknowledged and is not there", instance, n, text)
			}
		}
		if err := l.Verify(t.Context()); err != nil {
			t.Error(err)
		}
		total, unacknowledged = total+int(there), unacknowledged+int(there)-len(want)
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
	entries, _, err := s.List(t.Context(), "t/")
	if err != nil {
		t.Fatal(err)
	}
	for i, e := range entries {
		if want := fmt.Sprintf("t/%08d", i+1); e.Key != want {
			t.Fatalf("%s where %s should be: a number was skipped", e.Key, want)
		}
		if text, ok := counts[uint64(i+1)]; ok && text != string(e.Value) {
			t.Errorf("%s is %q, acknowledged was %q", e.Key, e.Value, text)
		}
		if w, ok := v.seen[e.Key]; ok && w != string(e.Value) {
			t.Errorf("%s is %q, the watcher saw %q", e.Key, e.Value, w)
		}
		delete(counts, uint64(i+1))
	}
	if len(counts) > 0 {
		t.Errorf("%d acknowledged commits are not there: %v", len(counts), counts)
	}
	t.Logf("%d records in three logs, %d of them never acknowledged, %d appends failed; %d commits; watcher: %d events, %d listings",
		total, unacknowledged, failed, len(entries), v.events, v.relists)
	h.print()
}

// print shows how many records were acknowledged in each half second, and what happened.
func (h *history) print() {
	const step = 500 * time.Millisecond
	var rate []int
	for _, x := range h.all {
		if x.Kind == "record" {
			i := int(x.at.Sub(h.start) / step)
			for len(rate) <= i {
				rate = append(rate, 0)
			}
			rate[i]++
		}
	}
	var b strings.Builder
	b.WriteString("records acknowledged per second, every half second:\n")
	for i, n := range rate {
		fmt.Fprintf(&b, "%6d", int(float64(n)/step.Seconds()))
		if i%20 == 19 {
			fmt.Fprintf(&b, "   to %v\n", time.Duration(i+1)*step)
		}
	}
	h.t.Logf("%s\n%s", b.String(), strings.Join(h.marks, "\n"))
}
