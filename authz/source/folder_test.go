package source_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/source"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/integration/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

var workload = identity.Workload{Namespace: "default"}

// forbid is a policy that denies the path /NAME to all of namespace default.
func forbid(name string) string {
	return fmt.Sprintf(`apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: %[1]s, namespace: default}
spec:
  action: DENY
  rules:
  - to:
    - operation: {paths: [/%[1]s]}
`, name)
}

// folder is a Folder under test and the directory that it reads.
type folder struct {
	*source.Folder
	t   *testing.T
	dir string
	log *buffer
	reg *prometheus.Registry
}

// buffer is a log that can be read while it is written.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// open starts a Folder on dir that runs until the test ends.
func open(t *testing.T, dir string) *folder {
	t.Helper()
	return openWith(t, dir, 250*time.Millisecond, nil)
}

// openWith is open with a time between regular looks, and something to call in
// each reading.
func openWith(t *testing.T, dir string, recheck time.Duration, between func()) *folder {
	t.Helper()
	f := &folder{t: t, dir: dir, log: &buffer{}, reg: prometheus.NewPedanticRegistry()}
	var err error
	f.Folder, err = source.OpenFolder(source.Config{
		Dir: dir, Recheck: recheck,
		Log: slog.New(slog.NewTextHandler(f.log, nil)), Metrics: f.reg,
	})
	if err != nil {
		t.Fatal(err)
	}
	source.Between(f.Folder, between)
	ctx, cancel := context.WithCancelCause(t.Context())
	ended := make(chan error)
	go func() { ended <- f.Run(ctx) }()
	stop := errors.New("the test ends")
	t.Cleanup(func() {
		cancel(stop)
		if err := <-ended; !errors.Is(err, stop) && !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v", err)
		}
	})
	return f
}

// policies is a new folder in a new parent, with files by name.
func policies(t *testing.T, files ...string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "policies")
	must(t, os.Mkdir(dir, 0o755))
	for _, name := range files {
		put(t, filepath.Join(dir, name+".yaml"), forbid(name))
	}
	return dir
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// put writes a file in place.
func put(t *testing.T, path, content string) {
	t.Helper()
	must(t, os.WriteFile(path, []byte(content), 0o644))
}

// move writes a file under a hidden name and renames it.
func move(t *testing.T, path, content string) {
	t.Helper()
	tmp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".tmp")
	put(t, tmp, content)
	must(t, os.Rename(tmp, path))
}

func (f *folder) file(name string) string { return filepath.Join(f.dir, name+".yaml") }

// forbidden reports whether the policy forbid(name) is in force.
func (f *folder) forbidden(name string) bool {
	d := f.Snapshot().For(workload).Decide(&authz.Request{
		Known: authz.FieldsHTTP, HTTP: true, Method: []byte("GET"), Path: []byte("/" + name), Host: []byte("h"),
	})
	return !d.Allowed && d.Reason == authz.ReasonDenyRule && d.Policy == "default/"+name
}

// eventually waits until what holds.
func (f *folder) eventually(what string, holds func() bool) {
	f.t.Helper()
	for end := time.Now().Add(time.Minute); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			f.t.Fatalf("a minute later it is still not so that %s; ready: %v; problems: %v; log:\n%s", what, f.Ready(), f.Problems(), f.log)
		}
	}
}

// reported waits until a problem of a file holds that text.
func (f *folder) reported(name, text string) {
	f.t.Helper()
	f.eventually(name+" is reported: "+text, func() bool { return f.hasProblem(name, text) })
}

func (f *folder) hasProblem(name, text string) bool {
	for _, p := range f.Problems() {
		if filepath.Base(p.Origin) == name && strings.Contains(p.Error(), text) {
			return true
		}
	}
	return false
}

// settled has the folder take in everything that happened up to now: it renames
// a file into place, waits for it, and takes it away again.
func (f *folder) settled() {
	f.t.Helper()
	move(f.t, f.file("marker"), forbid("marker"))
	f.eventually("the marker is in force", func() bool { return f.forbidden("marker") })
	must(f.t, os.Remove(f.file("marker")))
	f.eventually("the marker is gone", func() bool { return !f.forbidden("marker") })
}

func (f *folder) want(name string, in bool) {
	f.t.Helper()
	if f.forbidden(name) != in {
		f.t.Errorf("policy %s in force: %v; want %v; problems %v", name, !in, in, f.Problems())
	}
}

// metric is the value of a metric without labels, or the one with the values.
func (f *folder) metric(name string, values ...string) float64 {
	f.t.Helper()
	families, err := f.reg.Gather()
	must(f.t, err)
	for _, mf := range families {
		if mf.GetName() != name {
			continue
		}
	metrics:
		for _, m := range mf.GetMetric() {
			for i, l := range m.GetLabel() {
				if l.GetValue() != values[i] {
					continue metrics
				}
			}
			return m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	f.t.Fatalf("no metric %s %v", name, values)
	return 0
}

func TestOpenFolder(t *testing.T) {
	t.Parallel()

	t.Run("reads what a folder holds at the start", func(t *testing.T) {
		t.Parallel()
		dir := policies(t, "a", "b")
		put(t, filepath.Join(dir, "c.yml"), forbid("c"))
		put(t, filepath.Join(dir, ".hidden.yaml"), forbid("hidden"))
		put(t, filepath.Join(dir, "notes.txt"), forbid("notes"))
		must(t, os.Mkdir(filepath.Join(dir, "below"), 0o755))
		put(t, filepath.Join(dir, "below", "d.yaml"), forbid("d"))
		must(t, os.Symlink("/dev/zero", filepath.Join(dir, "endless")))
		elsewhere := filepath.Join(t.TempDir(), "e")
		put(t, elsewhere, forbid("e"))
		must(t, os.Symlink(elsewhere, filepath.Join(dir, "e.yaml")))
		f := open(t, dir)
		for _, name := range []string{"a", "b", "c", "e"} {
			f.want(name, true)
		}
		for _, name := range []string{"hidden", "notes", "d"} {
			f.want(name, false)
		}
		if f.Generation() != 1 || f.Ready() != nil || len(f.Problems()) != 0 {
			t.Errorf("generation %d, ready %v, problems %v; want 1, ready and none", f.Generation(), f.Ready(), f.Problems())
		}
		if n := f.metric("signet_source_resources", "AuthorizationPolicy", "good"); n != 4 {
			t.Errorf("%v good policies counted; want 4", n)
		}
		if n := f.metric("signet_source_resources", "PeerAuthentication", "refused"); n != 0 {
			t.Errorf("%v refused peer authentications counted; want 0", n)
		}
	})

	for name, cfg := range map[string]func(t *testing.T) source.Config{
		"refuses no folder":        func(t *testing.T) source.Config { return source.Config{} },
		"refuses a missing folder": func(t *testing.T) source.Config { return source.Config{Dir: filepath.Join(t.TempDir(), "no")} },
		"refuses a file for a folder": func(t *testing.T) source.Config {
			p := filepath.Join(t.TempDir(), "f")
			put(t, p, "")
			return source.Config{Dir: p}
		},
		"refuses a FIFO for a folder": func(t *testing.T) source.Config {
			p := filepath.Join(t.TempDir(), "f")
			must(t, unix.Mkfifo(p, 0o600))
			return source.Config{Dir: p}
		},
		"refuses a loop of links": func(t *testing.T) source.Config {
			p := filepath.Join(t.TempDir(), "l")
			must(t, os.Symlink(p, p))
			return source.Config{Dir: p}
		},
		"refuses a volume without its data": func(t *testing.T) source.Config {
			dir := policies(t)
			must(t, os.Symlink("..data/a.yaml", filepath.Join(dir, "a.yaml")))
			return source.Config{Dir: dir}
		},
		"refuses to look all the time": func(t *testing.T) source.Config {
			return source.Config{Dir: policies(t), Recheck: time.Microsecond}
		},
		"refuses a registry that has its metrics": func(t *testing.T) source.Config {
			r := prometheus.NewRegistry()
			if _, err := source.OpenFolder(source.Config{Dir: policies(t), Metrics: r}); err != nil {
				t.Fatal(err)
			}
			return source.Config{Dir: policies(t), Metrics: r}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, err := source.OpenFolder(cfg(t))
			if err == nil {
				t.Fatal("it opened")
			}
			if f != nil {
				t.Error("an error and a folder")
			}
			t.Log(err)
		})
	}

	t.Run("denies for a file that it cannot read", func(t *testing.T) {
		t.Parallel()
		for name, make := range map[string]func(path string) error{
			"FIFO":           func(p string) error { return unix.Mkfifo(p, 0o644) },
			"folder":         func(p string) error { return os.Mkdir(p, 0o755) },
			"dangling link":  func(p string) error { return os.Symlink("nowhere", p) },
			"link to itself": func(p string) error { return os.Symlink("x.yaml", p) },
			"device":         func(p string) error { return os.Symlink("/dev/zero", p) },
			"huge file": func(p string) error {
				return errors.Join(os.WriteFile(p, nil, 0o644), os.Truncate(p, 1<<40))
			},
		} {
			dir := policies(t, "a")
			must(t, make(filepath.Join(dir, "x.yaml")))
			f, err := source.OpenFolder(source.Config{Dir: dir})
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			d := f.Snapshot().For(identity.Workload{Namespace: "other"}).Decide(&authz.Request{Known: authz.FieldsHTTP, HTTP: true, Path: []byte("/")})
			if d.Allowed || d.Reason != authz.ReasonUnreadable {
				t.Errorf("%s: decision %+v; want denied because unreadable", name, d)
			}
			if len(f.Problems()) == 0 {
				t.Errorf("%s: no problem", name)
			}
		}
	})

	t.Run("refuses too many files", func(t *testing.T) {
		t.Parallel()
		dir := policies(t)
		first := filepath.Join(dir, "first.yaml")
		put(t, first, "")
		for i := range source.MaxFiles {
			must(t, os.Link(first, filepath.Join(dir, fmt.Sprintf("%d.yaml", i))))
		}
		if _, err := source.OpenFolder(source.Config{Dir: dir}); err == nil || !strings.Contains(err.Error(), "files") {
			t.Errorf("error %v; want one about the number of files", err)
		}
	})

	t.Run("refuses too many bytes", func(t *testing.T) {
		t.Parallel()
		dir := policies(t)
		for i := range source.MaxBytes/source.MaxFileBytes + 1 {
			p := filepath.Join(dir, fmt.Sprintf("%d.yaml", i))
			put(t, p, "")
			must(t, os.Truncate(p, source.MaxFileBytes))
		}
		if _, err := source.OpenFolder(source.Config{Dir: dir}); err == nil || !strings.Contains(err.Error(), "bytes") {
			t.Errorf("error %v; want one about the number of bytes", err)
		}
	})
}

func TestRunOnlyOnce(t *testing.T) {
	t.Parallel()
	f := open(t, policies(t, "a"))
	f.settled() // it runs
	if err := f.Run(t.Context()); err == nil {
		t.Error("a second Run succeeded")
	}
}
