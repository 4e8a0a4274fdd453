package integration_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// build is the three programs in a folder, built once for all tests that ask.
type build struct {
	flags []string
	once  sync.Once
	dir   string
	err   error
	out   []byte
}

var built, builtPlain = build{flags: []string{"-race"}}, build{}

// programs builds the three programs with the race detector, once for all tests,
// and returns the folder that they are in.
func programs(t testing.TB) string {
	t.Helper()
	return built.folder(t)
}

// plainPrograms are the programs without the race detector, which take a third of the
// processor's time: for what runs again and again and was run with it.
func plainPrograms(t testing.TB) string {
	t.Helper()
	return builtPlain.folder(t)
}

func (b *build) folder(t testing.TB) string {
	t.Helper()
	b.once.Do(func() { b.out, b.err = b.make() })
	if b.err != nil {
		t.Fatalf("building the programs: %v\n%s", b.err, b.out)
	}
	return b.dir
}

func (b *build) make() (out []byte, err error) {
	if b.dir, err = os.MkdirTemp("", "signet-programs-*"); err != nil {
		return nil, err
	}
	removeAtEnd(b.dir)
	// One go command links them side by side, by the names of their folders.
	args := append(append([]string{"build"}, b.flags...), "-ldflags=-s -w", "-o", b.dir+"/", "../cmd/ca", "../cmd/agent", "../cmd/signet")
	if out, err = exec.Command("go", args...).CombinedOutput(); err != nil {
		return out, err
	}
	for _, name := range []string{"ca", "agent"} {
		if err := os.Rename(filepath.Join(b.dir, name), filepath.Join(b.dir, "signet-"+name)); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

// removeAtEnd removes a folder when all tests have run.
func removeAtEnd(dir string) { leftovers.Store(dir, nil) }

var leftovers sync.Map

func TestMain(m *testing.M) {
	code := m.Run()
	leftovers.Range(func(dir, _ any) bool { _ = os.RemoveAll(dir.(string)); return true })
	os.Exit(code)
}
