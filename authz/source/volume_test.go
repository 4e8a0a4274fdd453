package source_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// volume is a folder as kubelet's atomic writer makes it.
type volume struct {
	t   *testing.T
	dir string
	n   int
}

// write brings the files, by name, in the order of kubelet: a folder of its own,
// ..data swapped, new links, old links and the old folder removed.
func (v *volume) write(files map[string]string) {
	v.t.Helper()
	v.n++
	stamp := fmt.Sprintf("..2026_11_24_00_00_00.%d", v.n)
	must(v.t, os.Mkdir(filepath.Join(v.dir, stamp), 0o755))
	for name, content := range files {
		put(v.t, filepath.Join(v.dir, stamp, name), content)
	}
	tmp, data := filepath.Join(v.dir, "..data_tmp"), filepath.Join(v.dir, "..data")
	old, err := os.Readlink(data)
	must(v.t, os.Symlink(stamp, tmp))
	must(v.t, os.Rename(tmp, data))
	for name := range files {
		if err := os.Symlink(filepath.Join("..data", name), filepath.Join(v.dir, name)); err != nil && !errors.Is(err, os.ErrExist) {
			v.t.Fatal(err)
		}
	}
	entries, rerr := os.ReadDir(v.dir)
	must(v.t, rerr)
	for _, e := range entries {
		if _, ok := files[e.Name()]; !ok && !strings.HasPrefix(e.Name(), "..") {
			must(v.t, os.Remove(filepath.Join(v.dir, e.Name())))
		}
	}
	if err == nil {
		must(v.t, os.RemoveAll(filepath.Join(v.dir, old)))
	}
}

func TestVolume(t *testing.T) {
	t.Parallel()
	one := func(names ...string) map[string]string {
		m := map[string]string{}
		for _, n := range names {
			m[n+".yaml"] = forbid(n)
		}
		return m
	}

	t.Run("swaps count as a whole", func(t *testing.T) {
		t.Parallel()
		v := &volume{t: t, dir: policies(t)}
		v.write(one("a", "b"))
		f := open(t, v.dir)
		f.want("a", true)
		f.want("b", true)
		v.write(map[string]string{"a.yaml": forbid("x"), "b.yaml": forbid("z"), "c.yaml": forbid("c")})
		f.eventually("all of it is in force", func() bool { return f.forbidden("x") && f.forbidden("z") && f.forbidden("c") })
		f.want("a", false)
		v.write(one("c"))
		f.eventually("the rest is gone", func() bool { return !f.forbidden("x") && !f.forbidden("z") })
		f.want("c", true)
		if f.Ready() != nil || len(f.Problems()) != 0 {
			t.Errorf("ready %v, problems %v; want ready and none", f.Ready(), f.Problems())
		}
	})

	t.Run("swaps never mix", func(t *testing.T) {
		t.Parallel()
		v := &volume{t: t, dir: policies(t)}
		both := func(i int) map[string]string {
			return map[string]string{"a.yaml": forbid(fmt.Sprint("a", i)), "b.yaml": forbid(fmt.Sprint("b", i))}
		}
		v.write(both(0))
		f := open(t, v.dir)
		stop := make(chan struct{})
		checked := make(chan int)
		go func() {
			n := 0
			for {
				select {
				case <-stop:
					checked <- n
					return
				case <-f.Changed():
				case <-time.After(time.Millisecond):
				}
				s := f.Snapshot()
				found := [2]int{-1, -1}
				for r := range s.For(workload).Rules() {
					if r.Spec != nil {
						var letter byte
						var i int
						if _, err := fmt.Sscanf(r.Spec.To[0].Operation.Paths[0], "/%c%d", &letter, &i); err == nil {
							found[letter-'a'] = i
						}
					}
				}
				if found[0] != found[1] || found[0] < 0 {
					t.Errorf("snapshot holds a%d and b%d", found[0], found[1])
				}
				n++
			}
		}()
		const swaps = 50
		for i := range swaps {
			v.write(both(i + 1))
		}
		f.eventually("the last swap is in force", func() bool { return f.forbidden(fmt.Sprint("a", swaps)) })
		close(stop)
		if n := <-checked; n == 0 {
			t.Error("nothing was checked")
		}
		if f.Ready() != nil || len(f.Problems()) != 0 {
			t.Errorf("ready %v, problems %v; want ready and none", f.Ready(), f.Problems())
		}
	})

	t.Run("files written in place do not count", func(t *testing.T) {
		t.Parallel()
		v := &volume{t: t, dir: policies(t)}
		v.write(one("a"))
		f := open(t, v.dir)
		put(t, f.file("a"), "---\n"+forbid("b"))
		f.reported("a.yaml", inPlace)
		f.want("a", true)
		f.want("b", false)
		v.write(one("c"))
		f.eventually("c is in force", func() bool { return f.forbidden("c") })
		f.eventually("the report is gone", func() bool { return len(f.Problems()) == 0 })
	})

	t.Run("a lost ..data is an error, not no policies", func(t *testing.T) {
		t.Parallel()
		v := &volume{t: t, dir: policies(t)}
		v.write(one("a"))
		f := open(t, v.dir)
		data := filepath.Join(v.dir, "..data")
		to, err := os.Readlink(data)
		must(t, err)
		must(t, os.Remove(data))
		f.eventually("it is not ready", func() bool { return f.Ready() != nil })
		f.want("a", true)
		must(t, os.Symlink(to, data))
		f.eventually("it is ready", func() bool { return f.Ready() == nil })
		f.want("a", true)
		must(t, os.RemoveAll(filepath.Join(v.dir, to)))
		f.eventually("it is not ready", func() bool { return f.Ready() != nil })
		f.want("a", true)
	})
}
