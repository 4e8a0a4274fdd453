package integration_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/integration/envoytest"
)

// demoRows are the rows of `signet demo`, in order.
var demoRows = []string{"identity", "mtls", "no-certificate", "allow", "deny", "strict", "edit", "rotation",
	"other-node", "expired", "audience", "agent-restart", "agent-away", "ca-restart"}

// quickRows take no longer than a second together.
var quickRows = []string{"mtls", "no-certificate", "allow", "deny", "strict", "edit", "other-node", "expired", "audience"}

// demoPatience bounds one run of the demo, with race builds on a busy machine.
const demoPatience = 3 * time.Minute

// demo is a run of `signet demo` that can be told from others: by its folder for
// temporary files and by a mark in the environment of all of its processes.
type demo struct {
	cmd    *exec.Cmd
	tmp    string
	mark   string
	stdout lines
	stderr lines
	ended  chan struct{} // closed when the demo was waited for
	err    error         // of the wait; readable once ended is closed
}

// startDemo runs the demo. Whatever it leaves is removed with the test.
func startDemo(t *testing.T, args ...string) *demo {
	t.Helper()
	d := newDemo(t, args...)
	d.start(t)
	return d
}

func newDemo(t *testing.T, args ...string) *demo {
	t.Helper()
	return newDemoOf(t, programs(t), args...)
}

// newDemoOf is a demo of the programs in a folder.
func newDemoOf(t *testing.T, bin string, args ...string) *demo {
	t.Helper()
	d := &demo{cmd: exec.Command(filepath.Join(bin, "signet"), append([]string{"demo"}, args...)...), ended: make(chan struct{})}
	var err error
	// The path of t.TempDir is too long for sockets below it.
	if d.tmp, err = os.MkdirTemp("", "demo-test-"); err != nil {
		t.Fatal(err)
	}
	d.mark = "SIGNET_DEMO_TEST=" + filepath.Base(d.tmp)
	d.cmd.Env = append(os.Environ(), "TMPDIR="+d.tmp, "ENVOY="+envoytest.Path(t), d.mark,
		// A race ends the program, which the demo then says.
		"GORACE="+os.Getenv("GORACE")+" halt_on_error=1")
	d.cmd.Stdout, d.cmd.Stderr = &d.stdout, &d.stderr
	return d
}

func (d *demo) start(t *testing.T) {
	t.Helper()
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		d.err = d.cmd.Wait()
		close(d.ended)
	}()
	t.Cleanup(func() {
		_ = d.cmd.Process.Kill()
		<-d.ended
		for _, pid := range d.processes(t) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		for _, path := range append(d.state(t), d.tmp) {
			if err := os.RemoveAll(path); err != nil {
				t.Error(err)
			}
		}
		if t.Failed() {
			t.Logf("standard output:\n%s\nstandard error:\n%s", &d.stdout, &d.stderr)
		}
	})
}

// wait waits for the end and returns the exit status; -1 if a signal ended it.
func (d *demo) wait(t *testing.T) int {
	t.Helper()
	select {
	case <-d.ended:
	case <-time.After(demoPatience):
		t.Fatalf("the demo still runs after %s", demoPatience)
	}
	return d.cmd.ProcessState.ExitCode()
}

// saw waits until standard error holds a string.
func (d *demo) saw(t *testing.T, text string) {
	t.Helper()
	deadline := time.Now().Add(demoPatience)
	for !strings.Contains(d.stderr.String(), text) {
		select {
		case <-d.ended:
			t.Fatalf("the demo ended without saying %q", text)
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			t.Fatalf("the demo has not said %q", text)
		}
	}
}

// processes are those that carry the mark, other than zombies.
func (d *demo) processes(t *testing.T) (pids []int) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f) // empty for zombies
		if err == nil && slices.Contains(strings.Split(string(b), "\x00"), d.mark) {
			pids = append(pids, atoi(filepath.Base(filepath.Dir(f))))
		}
	}
	return pids
}

var startedIn = regexp.MustCompile(`starting .* in (\S+)`)

// state are the folders of the agent's saved state, whose names begin like that of
// the demo's folder.
func (d *demo) state(t *testing.T) (found []string) {
	t.Helper()
	m := startedIn.FindStringSubmatch(d.stderr.String())
	if m == nil {
		return nil
	}
	for _, tmpfs := range []string{"/dev/shm", os.Getenv("XDG_RUNTIME_DIR")} {
		if tmpfs == "" {
			continue
		}
		f, err := filepath.Glob(filepath.Join(tmpfs, filepath.Base(m[1])+"-*"))
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, f...)
	}
	return found
}

// leavesNoProcess must hold at the very moment at which the demo has ended, or
// soon where it was killed: then the kernel ends the others.
func (d *demo) leavesNoProcess(t *testing.T, within time.Duration) {
	t.Helper()
	deadline := time.Now().Add(within)
	for {
		left := d.processes(t)
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			for _, pid := range left {
				cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
				t.Errorf("process %d is left: %q", pid, cmdline)
			}
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// leavesNothing: no process, no file, no socket, no saved state.
func (d *demo) leavesNothing(t *testing.T) {
	t.Helper()
	d.leavesNoProcess(t, 0)
	err := filepath.WalkDir(d.tmp, func(path string, _ fs.DirEntry, err error) error {
		if path != d.tmp {
			t.Errorf("left behind: %s", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if left := d.state(t); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// demoTable is what --output json prints.
type demoTable struct {
	Held bool
	Rows []struct {
		Row, Outcome, Problem string
		Sabotaged             bool
		Seconds               float64
		Observed              []string
	}
}

func (d *demo) table(t *testing.T) demoTable {
	t.Helper()
	var table demoTable
	if err := json.Unmarshal([]byte(d.stdout.String()), &table); err != nil {
		t.Fatalf("standard output is not the table: %v", err)
	}
	return table
}

// demoWithin is how long the demo may take; make soak asserts it, where nothing else
// runs.
var demoWithin = flag.Duration("demo-within", demoPatience, "how long the demo of TestDemoHolds may take")

// It is not parallel: a request waits only some seconds for an agent that restarts.
func TestDemoHolds(t *testing.T) {
	d := newDemo(t, "--output", "json")
	began := time.Now()
	d.start(t)
	if code := d.wait(t); code != 0 {
		t.Errorf("exit status %d, want 0", code)
	}
	took := time.Since(began)
	d.leavesNothing(t)
	table := d.table(t)
	var names []string
	for _, r := range table.Rows {
		names = append(names, r.Row)
		if r.Outcome != "held" || len(r.Observed) == 0 {
			t.Errorf("row %s: %s, observed %q, %s", r.Row, r.Outcome, r.Observed, r.Problem)
		}
		for _, line := range r.Observed {
			t.Logf("%s: %s", r.Row, line)
		}
	}
	if !slices.Equal(names, demoRows) || !table.Held {
		t.Errorf("held %t, rows %v, want %v", table.Held, names, demoRows)
	}
	t.Logf("note: the demo took %.1f s", took.Seconds())
	if took > *demoWithin {
		t.Errorf("the demo took %s, more than %s", took, *demoWithin)
	}
}

// TestDemoRowsCanFail: a sabotaged row does not hold, the exit status says so and
// the error names the row, and what was sabotaged is mended: no other row fails.
func TestDemoRowsCanFail(t *testing.T) {
	t.Parallel()
	for _, row := range demoRows {
		t.Run(row, func(t *testing.T) {
			t.Parallel()
			// TestDemoHolds runs all rows with the race detector.
			d := newDemoOf(t, plainPrograms(t), "--break", row, "--only", strings.Join(append(slices.Clone(quickRows), row), ","), "--output", "json")
			d.start(t)
			if code := d.wait(t); code != 1 {
				t.Errorf("exit status %d, want 1", code)
			}
			d.leavesNothing(t)
			if want := "signet: these rows did not hold: " + row + "\n"; !strings.HasSuffix(d.stderr.String(), want) {
				t.Errorf("the error is not %q", want)
			}
			table := d.table(t)
			if table.Held || len(table.Rows) < len(quickRows) {
				t.Errorf("held %t, %d rows", table.Held, len(table.Rows))
			}
			for _, r := range table.Rows {
				want := "held"
				switch {
				case r.Row == row:
					want = "FAILED"
				case row == "identity":
					// Without identities there is nothing to look at.
					want = "not run"
				}
				if r.Outcome != want || r.Sabotaged != (r.Row == row) {
					t.Errorf("row %s: %s (sabotaged: %t) %s, want %s", r.Row, r.Outcome, r.Sabotaged, r.Problem, want)
				}
			}
		})
	}
}

func TestDemoInterruptedLeavesNothing(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		until string // standard error says this
		after time.Duration
		only  string
		do    func(*os.Process) error
	}{
		"Ctrl-C at the start":            {"starting ", 0, "", interrupt},
		"Ctrl-C while programs start":    {"starting ", 150 * time.Millisecond, "", interrupt},
		"Ctrl-C under traffic":           {"rotation: ", 2 * time.Second, "rotation", interrupt},
		"Ctrl-C while the agent is dead": {"agent-restart: ", 1250 * time.Millisecond, "agent-restart", interrupt},
		"Ctrl-C again and again": {"rotation: ", time.Second, "rotation", func(p *os.Process) error {
			for range 20 {
				if err := p.Signal(os.Interrupt); errors.Is(err, os.ErrProcessDone) {
					return nil
				} else if err != nil {
					return err
				}
				time.Sleep(5 * time.Millisecond)
			}
			return nil
		}},
		"SIGTERM":           {"mtls: ", 0, "mtls,rotation", func(p *os.Process) error { return p.Signal(syscall.SIGTERM) }},
		"a closed terminal": {"mtls: ", 0, "mtls,rotation", func(p *os.Process) error { return p.Signal(syscall.SIGHUP) }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			args := []string{}
			if c.only != "" {
				args = append(args, "--only", c.only)
			}
			d := startDemo(t, args...)
			d.saw(t, c.until)
			time.Sleep(c.after) // the moment is arbitrary
			if err := c.do(d.cmd.Process); err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			if code := d.wait(t); code != 1 {
				t.Errorf("exit status %d, want 1", code)
			}
			if took := time.Since(began); took > time.Minute {
				t.Errorf("it took %s to end", took)
			}
			d.leavesNothing(t)
		})
	}
}

func TestDemoWithAClosedPipeLeavesNothing(t *testing.T) {
	t.Parallel()
	// As in `signet demo | head -0`: by default the signal of the first write would
	// end the program at once.
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	d := newDemo(t, "--only", "mtls")
	d.cmd.Stdout = w
	d.start(t)
	w.Close()
	if code := d.wait(t); code != 1 || !strings.Contains(d.stderr.String(), "printing the result") {
		t.Errorf("exit status %d, want 1 and an error about printing", code)
	}
	d.leavesNothing(t)
}

func TestDemoKilledLeavesNoProcess(t *testing.T) {
	t.Parallel()
	d := startDemo(t, "--only", "rotation")
	d.saw(t, "rotation: ")
	if n := len(d.processes(t)); n < 5 {
		t.Errorf("%d processes run, want the demo, signet-ca, signet-agent and two Envoys", n)
	}
	if err := d.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	d.wait(t)
	d.leavesNoProcess(t, time.Minute)
}

// TestDemoKeep holds what scripts rely on.
func TestDemoKeep(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "keep-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	d := startDemo(t, "--keep", "--dir", dir)
	ready := filepath.Join(dir, "ready")
	waitFor(t, d, ready)

	for _, name := range []string{"agent.sock", "root.pem", "issuer/jwks.json", "issuer/key.pem", "policies", "ca.yaml", "agent.yaml", "server.yaml", "client.yaml"} {
		if _, err := os.Lstat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"server.yaml", "client.yaml"} {
		envoytest.Validate(t, filepath.Join(dir, name))
	}
	// What ready says is also printed, on lines of their own.
	addresses := readAddresses(t, ready)
	for name, value := range addresses {
		if !strings.Contains("\n"+d.stdout.String(), "\n"+name+": "+value+"\n") {
			t.Errorf("%s: %s is not printed on a line of its own", name, value)
		}
	}
	server, client := addresses["server"], addresses["client"]
	if !regexp.MustCompile(`^https://127\.0\.0\.1:[0-9]+$`).MatchString(server) {
		t.Fatalf("server: %q", server)
	}
	if code := statusOf(t, client+"/hello"); code != 200 {
		t.Errorf("GET /hello through the client's proxy: %d, want 200", code)
	}
	if code := statusOf(t, client+"/admin"); code != 403 {
		t.Errorf("GET /admin through the client's proxy: %d, want 403", code)
	}
	plain := strings.Replace(server, "https", "http", 1)
	if code := statusOf(t, plain+"/hello"); code != 200 {
		t.Errorf("GET /hello in plaintext: %d, want 200", code)
	}
	// The edit that is printed does what is said of it.
	mesh := filepath.Join(dir, "policies", "mesh.yaml")
	if !strings.Contains(d.stdout.String(), "sed -i s/PERMISSIVE/STRICT/ "+mesh) {
		t.Error("it is not said how to change a policy")
	}
	if out, err := exec.Command("sed", "-i", "s/PERMISSIVE/STRICT/", mesh).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for deadline := time.Now().Add(time.Minute); statusOf(t, plain+"/hello") != 403; {
		if time.Now().After(deadline) {
			t.Fatal("plaintext is still accepted under STRICT")
		}
	}

	if len(d.state(t)) == 0 {
		t.Error("the agent has no folder for its state; is there no tmpfs?")
	}
	if err := d.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if code := d.wait(t); code != 0 {
		t.Errorf("exit status %d after Ctrl-C, want 0", code)
	}
	d.leavesNoProcess(t, 0)
	if left := d.state(t); len(left) > 0 {
		t.Errorf("the agent's keys are left behind: %v", left)
	}
	if _, err := os.Stat(ready); err != nil {
		t.Errorf("the files did not stay: %v", err)
	}
	// Its remains are not taken for a new folder.
	again := startDemo(t, "--keep", "--dir", dir)
	if code := again.wait(t); code != 1 || !strings.Contains(again.stderr.String(), "is not empty") {
		t.Errorf("exit status %d, want 1 and that the folder is not empty", code)
	}
}

func TestDemoKeepTellsOfADeadDaemon(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "keep-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	d := startDemo(t, "--keep", "--dir", dir)
	waitFor(t, d, filepath.Join(dir, "ready"))
	killed := 0
	for _, pid := range d.processes(t) {
		cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err == nil && strings.Contains(string(cmdline), "signet-agent\x00") {
			killed++
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
	}
	if killed != 1 {
		t.Fatalf("%d agents run, want 1", killed)
	}
	if code := d.wait(t); code != 1 {
		t.Errorf("exit status %d, want 1", code)
	}
	for _, want := range []string{"signet: signet-agent ended by itself: signal: killed", "signet-agent.log", "serving proxies"} {
		if !strings.Contains(d.stderr.String(), want) {
			t.Errorf("it does not say %q", want)
		}
	}
	d.leavesNoProcess(t, 0)
}

// waitFor waits for a file.
func waitFor(t *testing.T, d *demo, file string) {
	t.Helper()
	deadline := time.Now().Add(demoPatience)
	for {
		_, err := os.Stat(file)
		if err == nil {
			return
		}
		select {
		case <-d.ended:
			t.Fatalf("the demo ended without %s", file)
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// readAddresses reads "name: value" lines.
func readAddresses(t *testing.T, file string) map[string]string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	addresses := map[string]string{}
	for line := range strings.Lines(string(b)) {
		name, value, ok := strings.Cut(strings.TrimSpace(line), ": ")
		if !ok {
			t.Errorf("%s has a line %q", file, line)
		}
		addresses[name] = value
	}
	return addresses
}

// statusOf makes a request with curl, as a reader would; 0 without an answer.
func statusOf(t *testing.T, url string) int {
	t.Helper()
	out, _ := exec.Command("curl", "--silent", "--max-time", "60", "--output", os.DevNull, "--write-out", "%{http_code}", url).Output()
	return atoi(string(out))
}

func interrupt(p *os.Process) error { return p.Signal(os.Interrupt) }

// lines is a bytes.Buffer for concurrent use.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
