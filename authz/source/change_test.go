package source_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/authz/source"
)

const inPlace = "not applied"

func TestRenamesCount(t *testing.T) {
	t.Parallel()

	t.Run("of a new file", func(t *testing.T) {
		t.Parallel()
		f := open(t, policies(t, "a"))
		changed := f.Changed()
		move(t, f.file("b"), forbid("b"))
		<-changed
		f.want("a", true)
		f.want("b", true)
		if f.Generation() != 2 {
			t.Errorf("generation %d; want 2", f.Generation())
		}
	})

	t.Run("over a file", func(t *testing.T) {
		t.Parallel()
		f := open(t, policies(t, "a"))
		move(t, f.file("a"), forbid("b"))
		f.eventually("b is in force", func() bool { return f.forbidden("b") })
		f.want("a", false)
	})

	t.Run("as an exchange of two files", func(t *testing.T) {
		t.Parallel()
		f := open(t, policies(t, "a"))
		put(t, filepath.Join(f.dir, "b"), forbid("b"))
		must(t, unix.Renameat2(unix.AT_FDCWD, f.file("a"), unix.AT_FDCWD, filepath.Join(f.dir, "b"), unix.RENAME_EXCHANGE))
		f.eventually("b is in force", func() bool { return f.forbidden("b") })
		f.want("a", false)
		must(t, unix.Renameat2(unix.AT_FDCWD, filepath.Join(f.dir, "b"), unix.AT_FDCWD, f.file("a"), unix.RENAME_EXCHANGE))
		f.eventually("a is in force", func() bool { return f.forbidden("a") })
		f.want("b", false)
	})

	t.Run("of a link", func(t *testing.T) {
		t.Parallel()
		f := open(t, policies(t, "a"))
		elsewhere := filepath.Join(t.TempDir(), "b")
		put(t, elsewhere, forbid("b"))
		must(t, os.Symlink(elsewhere, filepath.Join(f.dir, ".new")))
		must(t, os.Rename(filepath.Join(f.dir, ".new"), f.file("a")))
		f.eventually("b is in force", func() bool { return f.forbidden("b") })
		f.want("a", false)
	})

	t.Run("within the folder", func(t *testing.T) {
		t.Parallel()
		f := open(t, policies(t, "a"))
		must(t, os.Rename(f.file("a"), f.file("z")))
		f.settled()
		f.want("a", true)
		if len(f.Problems()) != 0 {
			t.Errorf("problems %v; want none, not even a duplicate", f.Problems())
		}
	})

	t.Run("as sed -i does them", func(t *testing.T) {
		t.Parallel()
		f := open(t, policies(t, "a"))
		if out, err := exec.Command("sed", "-i", "s/a, namespace/b, namespace/; s,/a,/b,", f.file("a")).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		f.eventually("b is in force", func() bool { return f.forbidden("b") })
		f.want("a", false)
	})

	t.Run("even while the replaced file is still written", func(t *testing.T) {
		t.Parallel()
		f := open(t, policies(t, "a"))
		old, err := os.OpenFile(f.file("a"), os.O_WRONLY|os.O_APPEND, 0)
		must(t, err)
		defer old.Close()
		move(t, f.file("a"), forbid("b"))
		_, err = io.WriteString(old, "# late\n")
		must(t, err)
		f.eventually("b is in force", func() bool { return f.forbidden("b") })
		f.settled()
		if len(f.Problems()) != 0 {
			t.Errorf("problems %v; want none", f.Problems())
		}
	})

	t.Run("and a removal counts", func(t *testing.T) {
		t.Parallel()
		f := open(t, policies(t, "a", "b"))
		must(t, os.Remove(f.file("a")))
		f.eventually("a is gone", func() bool { return !f.forbidden("a") })
		f.want("b", true)
		must(t, os.Remove(f.file("b")))
		f.eventually("b is gone", func() bool { return !f.forbidden("b") })
	})

	t.Run("and a file with the same contents makes no snapshot", func(t *testing.T) {
		t.Parallel()
		f := open(t, policies(t, "a"))
		move(t, f.file("a"), forbid("a"))
		f.settled()
		if g := f.Generation(); g != 3 {
			t.Errorf("generation %d; want 3: the start, the marker and its removal", g)
		}
	})

	t.Run("and several at once make one snapshot", func(t *testing.T) {
		t.Parallel()
		f := openWith(t, policies(t), time.Hour, nil)
		for try := 0; ; try++ {
			before := f.Generation()
			for i := range 5 {
				put(t, filepath.Join(f.dir, fmt.Sprintf(".%d", i)), forbid(fmt.Sprintf("p%d-%d", i, try)))
			}
			began := time.Now()
			for i := range 5 {
				must(t, os.Rename(filepath.Join(f.dir, fmt.Sprintf(".%d", i)), f.file(fmt.Sprint("p", i))))
			}
			took := time.Since(began)
			f.eventually("all are in force", func() bool {
				for i := range 5 {
					if !f.forbidden(fmt.Sprintf("p%d-%d", i, try)) {
						return false
					}
				}
				return true
			})
			if took < source.Gather {
				if g := f.Generation(); g != before+1 {
					t.Errorf("%d snapshots for five renames within %v; want 1", g-before, took)
				}
				break
			}
			if try == 1000 {
				t.Fatalf("five renames never took less than %v", source.Gather)
			}
		}
	})

	t.Run("and a bad file keeps what came from it", func(t *testing.T) {
		t.Parallel()
		f := open(t, policies(t, "a", "b"))
		move(t, f.file("a"), "{")
		f.reported("a.yaml", "")
		f.settled()
		f.want("a", true)
		f.want("b", true)
		if n := f.metric("signet_source_resources", "AuthorizationPolicy", "stale"); n != 1 {
			t.Errorf("%v stale policies counted; want 1", n)
		}
		if f.metric("signet_source_problems") == 0 {
			t.Error("no problem counted")
		}
		move(t, f.file("a"), forbid("c"))
		f.eventually("c is in force", func() bool { return f.forbidden("c") })
		f.want("a", false)
		f.eventually("no problem is left", func() bool { return len(f.Problems()) == 0 })
		if n := strings.Count(f.log.String(), "problem with policies"); n == 0 || n > 2 {
			t.Errorf("%d problems logged; want each once:\n%s", n, f.log)
		}
	})
}

func TestWritesInPlaceDoNotCount(t *testing.T) {
	t.Parallel()
	cp := func(t *testing.T, from, to string) {
		if out, err := exec.Command("cp", from, to).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	// Each writes to a.yaml, which forbids a, or creates b.yaml.
	for name, c := range map[string]struct {
		file  string
		write func(t *testing.T, f *folder)
	}{
		"appending": {"a.yaml", func(t *testing.T, f *folder) {
			w, err := os.OpenFile(f.file("a"), os.O_WRONLY|os.O_APPEND, 0)
			must(t, err)
			defer w.Close()
			_, err = io.WriteString(w, "---\n"+forbid("b"))
			must(t, err)
		}},
		"truncating": {"a.yaml", func(t *testing.T, f *folder) {
			must(t, os.Truncate(f.file("a"), 0))
		}},
		"truncating and writing": {"a.yaml", func(t *testing.T, f *folder) {
			put(t, f.file("a"), forbid("b"))
		}},
		"writing as many bytes and setting the time back": {"a.yaml", func(t *testing.T, f *folder) {
			st, err := os.Stat(f.file("a"))
			must(t, err)
			put(t, f.file("a"), forbid("b"))
			must(t, os.Chtimes(f.file("a"), st.ModTime(), st.ModTime()))
		}},
		"cp over a file": {"a.yaml", func(t *testing.T, f *folder) {
			from := filepath.Join(t.TempDir(), "from")
			put(t, from, forbid("b"))
			cp(t, from, f.file("a"))
		}},
		"cp to a new file": {"b.yaml", func(t *testing.T, f *folder) {
			from := filepath.Join(t.TempDir(), "from")
			put(t, from, forbid("b"))
			cp(t, from, f.file("b"))
		}},
		"removing and creating": {"a.yaml", func(t *testing.T, f *folder) {
			must(t, os.Remove(f.file("a")))
			put(t, f.file("a"), forbid("b")) // often the same inode
		}},
		"renaming away and creating, as some editors do": {"a.yaml", func(t *testing.T, f *folder) {
			must(t, os.Rename(f.file("a"), f.file("a")+"~"))
			put(t, f.file("a"), forbid("b"))
		}},
		"renaming and going on writing": {"b.yaml", func(t *testing.T, f *folder) {
			// Nobody has seen the file as it was at the rename, unless the folder
			// was quicker than this; then that counts, and what followed does not.
			w, err := os.Create(filepath.Join(f.dir, ".b"))
			must(t, err)
			defer w.Close()
			must(t, os.Rename(filepath.Join(f.dir, ".b"), f.file("b")))
			_, err = io.WriteString(w, forbid("b"))
			must(t, err)
		}},
		"writing through another name": {"a.yaml", func(t *testing.T, f *folder) {
			other := filepath.Join(f.dir, ".other")
			must(t, os.Link(f.file("a"), other))
			put(t, other, "---\n"+forbid("b"))
		}},
		"making a hard link": {"b.yaml", func(t *testing.T, f *folder) {
			put(t, filepath.Join(f.dir, ".b"), forbid("b"))
			must(t, os.Link(filepath.Join(f.dir, ".b"), f.file("b")))
		}},
		"making a link": {"b.yaml", func(t *testing.T, f *folder) {
			put(t, filepath.Join(f.dir, ".b"), forbid("b"))
			must(t, os.Symlink(".b", f.file("b")))
		}},
		"making a FIFO": {"b.yaml", func(t *testing.T, f *folder) {
			must(t, unix.Mkfifo(f.file("b"), 0o644))
		}},
		"making a folder": {"b.yaml", func(t *testing.T, f *folder) {
			must(t, os.Mkdir(f.file("b"), 0o755))
		}},
		"making a huge file": {"b.yaml", func(t *testing.T, f *folder) {
			put(t, f.file("b"), forbid("b"))
			must(t, os.Truncate(f.file("b"), 1<<40))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := open(t, policies(t, "a"))
			c.write(t, f)
			f.reported(c.file, inPlace)
			f.settled()
			if !f.hasProblem(c.file, inPlace) {
				t.Error("the report did not last")
			}
			// Between the two steps of these the file is gone, which may be seen.
			if name != "removing and creating" && name != "renaming away and creating, as some editors do" {
				f.want("a", true)
			}
			f.want("b", false)
			if err := f.Ready(); err != nil {
				t.Errorf("not ready: %v", err)
			}
			if n := f.metric("signet_source_writes_in_place_total"); n < 1 || n > 2 {
				t.Errorf("%v writes in place counted; want 1", n)
			}
			if n := strings.Count(f.log.String(), inPlace); n < 1 || n > 2 {
				t.Errorf("%d reports logged; want 1:\n%s", n, f.log)
			}
		})
	}

	t.Run("unless what they write is what was there", func(t *testing.T) {
		t.Parallel()
		f := open(t, policies(t, "a"))
		put(t, f.file("a"), forbid("b"))
		f.reported("a.yaml", inPlace)
		put(t, f.file("a"), forbid("a"))
		f.eventually("the report is gone", func() bool { return !f.hasProblem("a.yaml", inPlace) })
		if f.Generation() != 1 {
			t.Errorf("generation %d; want 1", f.Generation())
		}
	})

	t.Run("unless they are renamed into place afterwards, as the report says", func(t *testing.T) {
		t.Parallel()
		f := open(t, policies(t, "a"))
		put(t, f.file("a"), forbid("b"))
		f.reported("a.yaml", "mv a.yaml .a.yaml && mv .a.yaml a.yaml")
		cmd := exec.Command("sh", "-c", "mv a.yaml .a.yaml && mv .a.yaml a.yaml")
		cmd.Dir = f.dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		f.eventually("b is in force", func() bool { return f.forbidden("b") })
		f.want("a", false)
		f.eventually("the report is gone", func() bool { return len(f.Problems()) == 0 })
	})

	t.Run("and a removed file is not kept because it was written", func(t *testing.T) {
		t.Parallel()
		f := open(t, policies(t, "a"))
		put(t, f.file("a"), forbid("b"))
		f.reported("a.yaml", inPlace)
		must(t, os.Remove(f.file("a")))
		f.eventually("a is gone", func() bool { return !f.forbidden("a") })
		f.eventually("the report is gone", func() bool { return len(f.Problems()) == 0 })
	})
}

func TestLostEvents(t *testing.T) {
	t.Parallel()
	f := open(t, policies(t, "a", "b"))
	// What needs no event to be known: a removal, and a file that did not change.
	must(t, os.Remove(f.file("b")))
	must(t, source.LoseEvents(f.Folder))
	f.eventually("b is gone", func() bool { return !f.forbidden("b") })
	f.want("a", true)
	move(t, f.file("c"), forbid("c"))
	f.eventually("c is in force", func() bool { return f.forbidden("c") || f.hasProblem("c.yaml", inPlace) })
}

func TestUnreadableFile(t *testing.T) {
	t.Parallel()
	f := open(t, policies(t, "a"))
	elsewhere := filepath.Join(f.dir, ".elsewhere")
	must(t, os.Symlink(filepath.Base(elsewhere), filepath.Join(f.dir, ".a")))
	must(t, os.Rename(filepath.Join(f.dir, ".a"), f.file("a")))
	f.reported("a.yaml", "no such file")
	f.settled()
	f.want("a", true)
	if n := f.metric("signet_source_resources", "AuthorizationPolicy", "stale"); n != 1 {
		t.Errorf("%v stale policies counted; want 1", n)
	}
	move(t, f.file("a"), forbid("b"))
	f.eventually("b is in force", func() bool { return f.forbidden("b") })
	f.want("a", false)
}

// TestRenameIsSeenByItsEvent: a rename is seen although the next regular look is an hour
// away. How fast is what the benchmark tells.
func TestRenameIsSeenByItsEvent(t *testing.T) {
	t.Parallel()
	f := openWith(t, policies(t), time.Hour, nil)
	for i := range 3 {
		tmp, name := filepath.Join(f.dir, ".tmp"), fmt.Sprint("p", i)
		put(t, tmp, forbid(name))
		must(t, os.Rename(tmp, f.file("p")))
		f.eventually(name+" is in force", func() bool { return f.forbidden(name) })
	}
}

func BenchmarkRenameToSnapshot(b *testing.B) {
	for _, n := range []int{1, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			dir := b.TempDir()
			for i := range n {
				if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("n%d.yaml", i)), []byte(forbid(fmt.Sprint("n", i))), 0o644); err != nil {
					b.Fatal(err)
				}
			}
			f, err := source.OpenFolder(source.Config{Dir: dir})
			if err != nil {
				b.Fatal(err)
			}
			ended := make(chan error)
			ctx, cancel := context.WithCancel(b.Context())
			go func() { ended <- f.Run(ctx) }()
			defer func() { cancel(); <-ended }()
			tmp := filepath.Join(dir, ".tmp")
			i := 0
			for b.Loop() {
				i++
				b.StopTimer()
				if err := os.WriteFile(tmp, []byte(forbid(fmt.Sprint("p", i))), 0o644); err != nil {
					b.Fatal(err)
				}
				changed := f.Changed()
				b.StartTimer()
				if err := os.Rename(tmp, filepath.Join(dir, "p.yaml")); err != nil {
					b.Fatal(err)
				}
				<-changed
			}
		})
	}
}
