package integration_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

var built struct {
	once sync.Once
	dir  string
	err  error
	out  []byte
}

// programs builds the three programs with the race detector, once for all tests,
// and returns the folder that they are in.
func programs(t testing.TB) string {
	t.Helper()
	built.once.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "signet-programs-*"); built.err != nil {
			return
		}
		// One go command links them side by side, by the names of their folders.
		cmd := exec.Command("go", "build", "-race", "-ldflags=-s -w", "-o", built.dir+"/", "../cmd/ca", "../cmd/agent", "../cmd/signet")
		if built.out, built.err = cmd.CombinedOutput(); built.err != nil {
			return
		}
		for _, name := range []string{"ca", "agent"} {
			if built.err = os.Rename(filepath.Join(built.dir, name), filepath.Join(built.dir, "signet-"+name)); built.err != nil {
				return
			}
		}
	})
	if built.err != nil {
		t.Fatalf("building the programs: %v\n%s", built.err, built.out)
	}
	return built.dir
}

// removeAtEnd removes a folder when all tests have run.
func removeAtEnd(dir string) { leftovers.Store(dir, nil) }

var leftovers sync.Map

func TestMain(m *testing.M) {
	code := m.Run()
	leftovers.Range(func(dir, _ any) bool { _ = os.RemoveAll(dir.(string)); return true })
	if built.dir != "" {
		_ = os.RemoveAll(built.dir)
	}
	os.Exit(code)
}
