package source_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/authz/source"
)

func TestFolderGone(t *testing.T) {
	t.Parallel()
	gone := func(f *folder) {
		f.t.Helper()
		f.eventually("it is not ready", func() bool { return f.Ready() != nil })
		f.want("a", true)
		f.want("b", true)
		if f.Generation() != 1 {
			f.t.Errorf("generation %d; want 1", f.Generation())
		}
		if !f.hasProblem("policies", "cannot be read") {
			f.t.Errorf("problems %v; want one of the folder", f.Problems())
		}
		if f.metric("signet_source_age_seconds") <= 0 || f.metric("signet_source_errors_total") < 1 {
			f.t.Error("metrics do not tell")
		}
	}
	back := func(f *folder, name string) {
		f.t.Helper()
		f.eventually("it is ready", func() bool { return f.Ready() == nil })
		f.eventually(name+" is in force", func() bool { return f.forbidden(name) })
		if f.metric("signet_source_age_seconds") != 0 {
			f.t.Error("the age is not 0 again")
		}
	}

	t.Run("by rm -rf keeps the policies", func(t *testing.T) {
		t.Parallel()
		// One that takes longer than is waited for, as on a busy machine, may be seen
		// as the removal of a file that it is at first.
		f := open(t, policies(t, "a", "b"))
		for tries := 0; ; tries++ {
			began := time.Now()
			must(t, os.RemoveAll(f.dir))
			if time.Since(began) < source.GatherRemovals {
				break
			}
			if tries == 100 {
				t.Fatalf("removing a folder never took less than %v", source.GatherRemovals)
			}
			f = open(t, policies(t, "a", "b"))
		}
		gone(f)
		// A folder that is created anew fills up: it must not open anything.
		must(t, os.Mkdir(f.dir, 0o755))
		f.eventually("it says that the folder was created anew", func() bool {
			return f.Ready() != nil && strings.Contains(f.Ready().Error(), "created anew")
		})
		put(t, f.file("c"), forbid("c"))
		gone(f)
		f.want("c", false)
		must(t, os.Rename(f.dir, f.dir+".new"))
		must(t, os.Rename(f.dir+".new", f.dir))
		back(f, "c")
		f.want("a", false)
		move(t, f.file("d"), forbid("d"))
		f.eventually("changes of the new folder are seen", func() bool { return f.forbidden("d") })
	})

	t.Run("by a rename and back goes on", func(t *testing.T) {
		t.Parallel()
		f := open(t, policies(t, "a", "b"))
		must(t, os.Rename(f.dir, f.dir+".old"))
		gone(f)
		must(t, os.Rename(f.dir+".old", f.dir))
		back(f, "a")
		move(t, f.file("c"), forbid("c"))
		f.eventually("c is in force", func() bool { return f.forbidden("c") })
	})

	t.Run("replaced by a rename is a change of all", func(t *testing.T) {
		t.Parallel()
		f := open(t, policies(t, "a", "b"))
		next := f.dir + ".next"
		must(t, os.Mkdir(next, 0o755))
		put(t, filepath.Join(next, "c.yaml"), forbid("c"))
		must(t, unix.Renameat2(unix.AT_FDCWD, next, unix.AT_FDCWD, f.dir, unix.RENAME_EXCHANGE))
		back(f, "c")
		f.want("a", false)
		put(t, f.file("c"), forbid("d"))
		f.reported("c.yaml", inPlace)
		f.want("c", true)
	})

	t.Run("behind a link that is swapped is a change of all", func(t *testing.T) {
		t.Parallel()
		top := t.TempDir()
		for _, n := range []string{"1", "2", "3"} {
			must(t, os.MkdirAll(filepath.Join(top, n, "policies"), 0o755))
			put(t, filepath.Join(top, n, "policies", "p.yaml"), forbid("p"+n))
		}
		swap := func(n string) {
			must(t, os.Symlink(n, filepath.Join(top, "tmp")))
			must(t, os.Rename(filepath.Join(top, "tmp"), filepath.Join(top, "current")))
		}
		swap("1")
		f := open(t, filepath.Join(top, "current", "policies"))
		f.want("p1", true)
		swap("2")
		back(f, "p2")
		f.want("p1", false)
		swap("3")
		back(f, "p3")
		f.want("p2", false)
	})

	t.Run("a file in its place keeps the policies", func(t *testing.T) {
		t.Parallel()
		f := open(t, policies(t, "a", "b"))
		must(t, os.Rename(f.dir, f.dir+".old"))
		put(t, f.dir, forbid("c"))
		gone(f)
	})

	t.Run("too many files keep the policies, and events", func(t *testing.T) {
		t.Parallel()
		f := open(t, policies(t, "a", "b"))
		for i := range source.MaxFiles {
			must(t, os.Link(f.file("a"), filepath.Join(f.dir, fmt.Sprintf("n%d.yml", i))))
		}
		f.eventually("it is not ready", func() bool { return f.Ready() != nil })
		move(t, f.file("a"), forbid("c"))
		f.want("a", true)
		f.want("c", false)
		for i := range source.MaxFiles {
			must(t, os.Remove(filepath.Join(f.dir, fmt.Sprintf("n%d.yml", i))))
		}
		back(f, "c")
		f.want("a", false)
	})
}
