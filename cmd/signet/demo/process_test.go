package demo_test

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/cmd/signet/demo"
	"github.com/signet-mesh/signet/integration/leaktest"
)

// asParent makes the test binary a program that starts a child and waits.
const asParent = "SIGNET_DEMO_TEST_PARENT"

func TestMain(m *testing.M) {
	if dir := os.Getenv(asParent); dir != "" {
		p, err := demo.Start("child", dir, "/bin/sleep", "1000")
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(p.PID())
		<-p.Ended()
		os.Exit(0)
	}
	leaktest.Main(m)
}

// alive reports whether a process exists and is no zombie.
func alive(pid int) bool { s := state(pid); return s != "" && s != "Z" }

// state is the letter of a process's state, of proc(5); empty if there is no such process.
func state(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	_, after, _ := strings.Cut(string(b), ") ")
	return after[:min(1, len(after))]
}

func TestAChildDiesWithAProgramThatIsKilled(t *testing.T) {
	t.Parallel()
	parent := exec.Command(os.Args[0])
	parent.Env = append(os.Environ(), asParent+"="+t.TempDir())
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	defer parent.Wait()
	defer parent.Process.Kill()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	child, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatalf("the program says %q", line)
	}
	if !alive(child) {
		t.Fatal("the child is not there")
	}
	if group, err := syscall.Getpgid(child); err != nil || group != child {
		t.Errorf("the child is in process group %d, %v; want one of its own, which no Ctrl-C reaches", group, err)
	}
	// Threads of the program come and go; the child must not go with them.
	time.Sleep(100 * time.Millisecond)
	if !alive(child) {
		t.Fatal("the child died while the program lives")
	}
	if err := parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	wait(t, "the end of the child", func() bool { return !alive(child) })
}

func start(t *testing.T, script string) *demo.Process {
	t.Helper()
	p, _ := startIn(t, script)
	return p
}

// startIn is start, and the folder of its logs.
func startIn(t *testing.T, script string) (p *demo.Process, logs string) {
	t.Helper()
	logs = t.TempDir()
	p, err := demo.Start("child", logs, "/bin/sh", "-c", script)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	return p, logs
}

func TestEndEndsAnyChild(t *testing.T) {
	t.Parallel()
	for name, script := range map[string]string{
		"one that obeys":           "exec sleep 1000",
		"one that ignores SIGTERM": "trap '' TERM; echo ready >&2; while :; do sleep 0.05; done",
		"one that has ended":       "exit 3",
		"one that is stopped":      "kill -STOP $$",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, dir := startIn(t, script)
			switch name {
			case "one that ignores SIGTERM":
				wait(t, "it to ignore it", func() bool {
					b, err := os.ReadFile(filepath.Join(dir, "child.log"))
					return err == nil && strings.Contains(string(b), "ready")
				})
			case "one that has ended":
				<-p.Ended()
			case "one that is stopped":
				wait(t, "it to stop", func() bool { return state(p.PID()) == "T" })
			}
			began := time.Now()
			p.End()
			if alive(p.PID()) {
				t.Error("it is still there")
			}
			if took := time.Since(began); took > time.Minute {
				t.Errorf("it took %s", took)
			}
			p.End() // again, on a process id that may be another's by now
		})
	}
}

func TestOnlyAnUnexpectedEndIsASurprise(t *testing.T) {
	t.Parallel()
	p := start(t, "exec sleep 1000")
	if err := p.Surprise(); err != nil {
		t.Errorf("while it runs: %v", err)
	}
	p.Kill()
	if err := p.Surprise(); err != nil {
		t.Errorf("after it was killed: %v", err)
	}
	p = start(t, "exit 3")
	<-p.Ended()
	if err := p.Surprise(); err == nil || !strings.Contains(err.Error(), "child ended by itself: exit status 3") {
		t.Errorf("after it ended by itself: %v", err)
	}
}

func TestOutputGoesToFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for range 2 { // a second start appends
		p, err := demo.Start("child", dir, "/bin/sh", "-c", "echo out; echo err >&2")
		if err != nil {
			t.Fatal(err)
		}
		<-p.Ended()
	}
	for file, want := range map[string]string{"child.log": "err\nerr\n", "child.access.log": "out\nout\n"} {
		info, err := os.Stat(filepath.Join(dir, file))
		if err != nil || info.Mode() != 0o600 {
			t.Errorf("%s has mode %v, %v; want 0600", file, info.Mode(), err)
		}
		if b, err := os.ReadFile(filepath.Join(dir, file)); err != nil || string(b) != want {
			t.Errorf("%s holds %q, %v; want %q", file, b, err, want)
		}
	}
}

func TestAProgramThatIsNotThereIsAnError(t *testing.T) {
	t.Parallel()
	_, err := demo.Start("child", t.TempDir(), filepath.Join(t.TempDir(), "none"))
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "starting child") {
		t.Errorf("error %v", err)
	}
}

func TestTail(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "log")
	write := func(s string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := demo.Tail(file, 2); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of a file that is not there: %v", err)
	}
	write("")
	if _, err := demo.Tail(file, 2); err == nil {
		t.Error("an empty file has a tail")
	}
	for content, want := range map[string]string{
		"a\n": "a", "a\nb": "a\nb", "a\nb\nc\n": "b\nc",
		strings.Repeat("x", 1<<20) + "\nb\nc\n": "b\nc",
	} {
		write(content)
		if got, err := demo.Tail(file, 2); err != nil || got != want {
			t.Errorf("tail of %.20q is %q, %v; want %q", content, got, err, want)
		}
	}
}
