package source_test

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-mesh/signet/authz/source"
)

// still opens a Folder that does not run.
func still(t *testing.T, dir string) *folder {
	t.Helper()
	f := &folder{t: t, dir: dir, log: &buffer{}, reg: prometheus.NewPedanticRegistry()}
	var err error
	f.Folder, err = source.OpenFolder(source.Config{Dir: dir, Metrics: f.reg})
	must(t, err)
	return f
}

// between has f call once in the next reading.
func (f *folder) between(call func()) {
	done := false
	source.Between(f.Folder, func() {
		if !done {
			done = true
			call()
		}
	})
}

// reread has f read, as often as it has to.
func (f *folder) reread() {
	f.t.Helper()
	for n := 0; source.Reread(f.Folder); n++ {
		if n == 100 {
			f.t.Fatal("the folder never settles")
		}
	}
}

// TestChangesWhileReading changes the folder in the middle of a reading.
func TestChangesWhileReading(t *testing.T) {
	t.Parallel()

	t.Run("a file that is written after it was renamed does not count", func(t *testing.T) {
		t.Parallel()
		f := still(t, policies(t, "a"))
		move(t, f.file("a"), forbid("b"))
		move(t, f.file("new"), forbid("new"))
		f.between(func() {
			for _, name := range []string{"a", "new"} {
				w, err := os.OpenFile(f.file(name), os.O_WRONLY|os.O_APPEND, 0)
				must(t, err)
				_, err = io.WriteString(w, "---\n"+forbid("c"))
				must(t, errors.Join(err, w.Close()))
			}
		})
		for range 2 { // neither in this reading nor in the next
			f.reread()
			f.want("a", true)
			for _, name := range []string{"b", "c", "new"} {
				f.want(name, false)
			}
		}
		if !f.hasProblem("a.yaml", inPlace) || !f.hasProblem("new.yaml", inPlace) {
			t.Errorf("problems %v; want both files", f.Problems())
		}
	})

	t.Run("a file that is renamed once more counts", func(t *testing.T) {
		t.Parallel()
		f := still(t, policies(t, "a"))
		move(t, f.file("a"), forbid("b"))
		f.between(func() { move(t, f.file("a"), forbid("c")) })
		f.reread()
		f.want("b", true)
		f.reread()
		f.want("b", false)
		f.want("c", true)
	})

	t.Run("a file does not count if events are lost", func(t *testing.T) {
		t.Parallel()
		f := still(t, policies(t, "a"))
		move(t, f.file("a"), forbid("b"))
		f.between(func() { must(t, source.LoseEvents(f.Folder)) })
		f.reread()
		f.reread()
		f.want("a", true)
		if !f.hasProblem("a.yaml", "not seen to be renamed") {
			t.Errorf("problems %v; want one about a.yaml", f.Problems())
		}
	})

	t.Run("a rename does not count if what followed was lost", func(t *testing.T) {
		t.Parallel()
		f := still(t, policies(t, "a"))
		// Written through a name elsewhere, so there is no event for it.
		elsewhere := filepath.Join(t.TempDir(), "other")
		move(t, f.file("a"), forbid("b"))
		must(t, os.Link(f.file("a"), elsewhere))
		must(t, source.LoseEvents(f.Folder))
		put(t, elsewhere, forbid("c"))
		f.reread()
		f.want("a", true)
		f.want("b", false)
		f.want("c", false)
		if !f.hasProblem("a.yaml", inPlace) {
			t.Errorf("problems %v; want one about a.yaml", f.Problems())
		}
	})

	t.Run("a volume is read again after a swap", func(t *testing.T) {
		t.Parallel()
		v := &volume{t: t, dir: policies(t)}
		v.write(map[string]string{"a.yaml": forbid("a1"), "b.yaml": forbid("b1")})
		f := still(t, v.dir)
		v.write(map[string]string{"a.yaml": forbid("a2"), "b.yaml": forbid("b2")})
		f.between(func() { v.write(map[string]string{"a.yaml": forbid("a3"), "b.yaml": forbid("b3")}) })
		if !source.Reread(f.Folder) {
			t.Error("it was not to be read again")
		}
		f.want("a1", true)
		f.want("a2", false)
		f.reread()
		f.want("a3", true)
		f.want("b3", true)
		f.want("a1", false)
	})

	t.Run("a folder that is deleted is not one without policies", func(t *testing.T) {
		t.Parallel()
		f := still(t, policies(t, "a"))
		must(t, os.Rename(f.file("a"), filepath.Join(f.dir, ".a"))) // as the first file that rm -rf takes
		f.between(func() { must(t, os.RemoveAll(f.dir)) })
		f.reread()
		f.want("a", true)
		if f.Ready() == nil {
			t.Error("it is ready")
		}
	})

	t.Run("a folder that is replaced is not mixed with the old one", func(t *testing.T) {
		t.Parallel()
		f := still(t, policies(t, "a", "b"))
		next := f.dir + ".next"
		must(t, os.Mkdir(next, 0o755))
		put(t, filepath.Join(next, "c.yaml"), forbid("c"))
		must(t, os.Remove(f.file("b")))
		f.between(func() {
			must(t, os.Rename(f.dir, f.dir+".old"))
			must(t, os.Rename(next, f.dir))
		})
		if !source.Reread(f.Folder) {
			t.Error("it was not to be read again")
		}
		f.want("b", true)
		f.reread()
		f.want("c", true)
		f.want("a", false)
	})
}

func TestNewLinkOfVolumeBeforeItsSwap(t *testing.T) {
	t.Parallel()
	v := &volume{t: t, dir: policies(t)}
	v.write(map[string]string{"a.yaml": forbid("a")})
	f := still(t, v.dir)
	must(t, os.Symlink("..data/b.yaml", f.file("b"))) // older kubelets make it first
	f.reread()
	if f.Generation() != 1 || len(f.Problems()) != 0 || f.Ready() != nil {
		t.Errorf("generation %d, problems %v, ready %v; want 1, none, ready", f.Generation(), f.Problems(), f.Ready())
	}
	v.write(map[string]string{"a.yaml": forbid("a"), "b.yaml": forbid("b")})
	f.reread()
	f.want("a", true)
	f.want("b", true)
}

func TestSwapToTheSameName(t *testing.T) {
	t.Parallel()
	v := &volume{t: t, dir: policies(t)}
	v.write(map[string]string{"a.yaml": forbid("a")})
	f := still(t, v.dir)
	put(t, f.file("a"), forbid("b"))
	f.reread()
	f.want("a", true)
	data := filepath.Join(v.dir, "..data")
	to, err := os.Readlink(data)
	must(t, err)
	must(t, os.Symlink(to, data+"_tmp"))
	must(t, os.Rename(data+"_tmp", data))
	f.reread()
	f.want("b", true)
	f.want("a", false)
}

func TestEventsOutliveAnError(t *testing.T) {
	t.Parallel()
	f := still(t, policies(t, "a"))
	move(t, f.file("a"), forbid("b"))
	must(t, os.Rename(f.dir, f.dir+".old"))
	f.reread()
	if f.Ready() == nil {
		t.Error("it is ready without its folder")
	}
	f.want("a", true)
	must(t, os.Rename(f.dir+".old", f.dir))
	f.reread()
	f.want("b", true)
	if f.Ready() != nil || len(f.Problems()) != 0 {
		t.Errorf("ready %v, problems %v; want ready and none", f.Ready(), f.Problems())
	}
}

func TestNoiseNextToTheFolder(t *testing.T) {
	t.Parallel()
	var readings atomic.Int32
	f := openWith(t, policies(t, "a"), time.Hour, func() { readings.Add(1) })
	for range 20 {
		put(t, f.dir+".tmp", "")
		put(t, filepath.Join(f.dir, ".hidden"), "")
		must(t, os.Remove(f.dir+".tmp"))
	}
	f.settled()
	// The marker comes in two readings, and each may be split by the load.
	if n := readings.Load(); n > 6 {
		t.Errorf("%d readings; want 2, because nothing else happened that matters", n)
	}
}

func TestRemovalsWait(t *testing.T) {
	t.Parallel()
	// Regular looks that come all the time make no difference.
	f := openWith(t, policies(t, "a", "b", "c", "d", "e"), 10*time.Millisecond, nil)
	for _, name := range []string{"a", "b", "c", "d"} {
		changed := f.Changed()
		start := time.Now()
		must(t, os.Remove(f.file(name)))
		<-changed
		if took := time.Since(start); took < source.GatherRemovals {
			t.Errorf("a removal was applied after %v; want %v at least, in case the folder is being deleted", took, source.GatherRemovals)
		}
	}
}

// TestWithoutPermission needs a user whom permissions bind: for root it runs
// itself as nobody.
func TestWithoutPermission(t *testing.T) {
	t.Parallel()
	if os.Geteuid() == 0 {
		asNobody(t)
		return
	}
	f := openWith(t, policies(t, "a", "b"), time.Hour, nil) // events alone have to do
	must(t, os.Chmod(f.file("b"), 0))
	tmp := filepath.Join(f.dir, ".tmp")
	put(t, tmp, forbid("c"))
	must(t, os.Chmod(tmp, 0))
	must(t, os.Rename(tmp, f.file("a")))
	f.reported("a.yaml", "permission denied")
	f.want("a", true)
	f.want("b", true) // it was read before
	must(t, os.Chmod(f.file("a"), 0o600))
	f.eventually("c is in force", func() bool { return f.forbidden("c") })
	f.want("a", false)

	must(t, os.Chmod(f.dir, 0o300))
	f.eventually("it is not ready", func() bool { return f.Ready() != nil })
	f.want("c", true)
	must(t, os.Chmod(f.dir, 0o700))
	f.eventually("it is ready", func() bool { return f.Ready() == nil })
	f.want("c", true)
}

// asNobody runs the calling test again in a process of user nobody.
func asNobody(t *testing.T) {
	t.Helper()
	// Not t.TempDir: nobody may not pass through its parent.
	dir, err := os.MkdirTemp("", "signet-nobody")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	tmp := filepath.Join(dir, "tmp")
	must(t, os.Mkdir(tmp, 0o700))
	const nobody = 65534
	must(t, os.Chown(tmp, nobody, nobody))
	self, err := os.Executable()
	must(t, err)
	program := filepath.Join(dir, "program")
	// By another process: what this one writes may still be open in a child that another
	// test is starting, and cannot be run until then.
	if out, err := exec.Command("install", "-m", "755", self, program).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	cmd := exec.Command(program, "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Dir = tmp
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp, "HOME="+tmp)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("as nobody: %v\n%s", err, out)
	}
}
