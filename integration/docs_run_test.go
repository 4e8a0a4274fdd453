package integration_test

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/integration/envoytest"
)

// listens are the ports that servers of the pages have.
var listens = regexp.MustCompile(`127\.0\.0\.1[: ]2[89]\d{3}`)

var block = regexp.MustCompile("(?ms)^```(sh|text)\n(.*?)^```")

// TestDocsCommands runs the commands of the task pages as a reader would: all of
// a page in one shell, each block's output compared with the one that is printed
// below it, line by line.
func TestDocsCommands(t *testing.T) {
	t.Parallel()
	bin := programs(t)
	ports := map[string]string{}
	for _, page := range []string{"standalone.md", "policies.md", "explain.md", "istio.md", "authority.md", "authority-keys.md", "bans.md", "rotation.md"} {
		text, err := os.ReadFile(filepath.Join("../docs", page))
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range listens.FindAllString(string(text), -1) {
			if other := ports[p]; other != "" && other != page {
				t.Fatalf("%s and %s, which run at the same time, both have %s", other, page, p)
			}
			ports[p] = page
		}
		t.Run(page, func(t *testing.T) {
			t.Parallel()
			runPage(t, bin, elsewhere(t, string(text)))
		})
	}
}

// elsewhere is a page whose servers have ports and whose files have folders that nobody
// else has on this machine.
func elsewhere(t *testing.T, text string) string {
	t.Helper()
	ports := map[string]string{}
	text = listens.ReplaceAllStringFunc(text, func(p string) string {
		host, port := p[:len("127.0.0.1:")], p[len("127.0.0.1:"):]
		if ports[port] == "" {
			_, ports[port], _ = net.SplitHostPort(freeAddr(t))
		}
		return host + ports[port]
	})
	for _, parent := range []string{"/tmp/", "/dev/shm/"} {
		dir, err := os.MkdirTemp(parent, "docs-") // not TempDir: the path of a socket is at most 107 bytes
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		text = strings.ReplaceAll(text, parent+"signet-", dir+"/signet-")
	}
	return text
}

func runPage(t *testing.T, bin, text string) {
	t.Helper()
	// A marker after each block tells its output from the next one's.
	const marker = "---- end of block ----"
	script := "set -eu -o pipefail\nset -m\n"
	var want []string
	for _, b := range block.FindAllStringSubmatch(text, -1) {
		switch b[1] {
		case "sh":
			script += b[2] + "echo '" + marker + "'\n"
			want = append(want, "")
		case "text":
			want[len(want)-1] = b[2]
		}
	}
	if len(want) == 0 {
		t.Fatal("no commands were found")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash")
	cmd.Stdin = strings.NewReader(script)
	cmd.Dir = t.TempDir()
	cmd.Env = append(os.Environ(), "PATH="+bin+":"+filepath.Dir(envoytest.Path(t))+":"+os.Getenv("PATH"))
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	// A session of its own, so that whatever the page leaves behind can be found.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.WaitDelay = 5 * time.Second
	err := cmd.Run()
	if left := session(t, cmd.Process.Pid); len(left) > 0 {
		t.Errorf("left behind: %v", left)
		for _, pid := range left {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	if err != nil {
		t.Fatalf("%v\n%s\n%s", err, out.String(), errs.String())
	}
	got := strings.Split(out.String(), marker+"\n")
	for i, w := range want {
		rest := got[i]
		for line := range strings.Lines(w) {
			line = strings.TrimSpace(line)
			_, after, ok := strings.Cut(rest, line)
			if !ok {
				t.Errorf("block %d does not print %q; it printed\n%s\n%s", i+1, line, got[i], errs.String())
				break
			}
			rest = after
		}
	}
}

// session lists the processes of a session.
func session(t *testing.T, leader int) (pids []int) {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range stats {
		pid, sid, ok := parseStat(f)
		if ok && sid == leader {
			pids = append(pids, pid)
		}
	}
	return pids
}

// parseStat reads process and session from /proc/PID/stat (proc(5)); zombies do
// not count.
func parseStat(file string) (pid, sid int, ok bool) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, 0, false
	}
	s := string(b)
	open, end := strings.IndexByte(s, '('), strings.LastIndexByte(s, ')')
	f := strings.Fields(s[end+1:])
	if open < 0 || len(f) < 4 || f[0] == "Z" {
		return 0, 0, false
	}
	return atoi(s[:open]), atoi(f[3]), true
}

func atoi(s string) int {
	n := 0
	for _, c := range strings.TrimSpace(s) {
		n = n*10 + int(c-'0')
	}
	return n
}
