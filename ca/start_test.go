package ca_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/storage"
)

// TestRefusesToStart breaks a good authority in one way each. The error must say
// what to do, and nothing on disk may have been changed or made anew.
func TestRefusesToStart(t *testing.T) {
	t.Parallel()
	glob := func(t *testing.T, dir, pattern string) string {
		t.Helper()
		m, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil || len(m) != 1 {
			t.Fatalf("%s: %v, %v", pattern, m, err)
		}
		return m[0]
	}
	remove := func(pattern string) func(*testing.T, string, *ca.Config) {
		return func(t *testing.T, dir string, _ *ca.Config) {
			if err := os.RemoveAll(glob(t, dir, pattern)); err != nil {
				t.Fatal(err)
			}
		}
	}
	chmod := func(pattern string, mode os.FileMode) func(*testing.T, string, *ca.Config) {
		return func(t *testing.T, dir string, _ *ca.Config) {
			if err := os.Chmod(glob(t, dir, pattern), mode); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, c := range []struct {
		name  string
		spoil func(t *testing.T, dir string, cfg *ca.Config)
		says  string
	}{
		{"without the root's key", remove("authority/keys/root-*.key"), "restore it from where the keys are kept"},
		{"without the intermediate's key", remove("authority/keys/intermediate-*.key"), "restore it"},
		{"without the log's key", remove("authority/keys/log-*.key"), "restore it"},
		{"without the folder of keys", remove("authority/keys"), "restore what is missing"},
		{"without the store", remove("authority/state.db"), "restore what is missing"},
		{"without the log", remove("authority/log"), "restore what is missing"},
		{"with an empty folder of the log", func(t *testing.T, dir string, _ *ca.Config) {
			for _, e := range must(os.ReadDir(filepath.Join(dir, "authority/log"))) {
				if err := os.Remove(filepath.Join(dir, "authority/log", e.Name())); err != nil {
					t.Fatal(err)
				}
			}
		}, "log"},
		{"when the folder is open to others", chmod(".", 0o705), "chmod o-rwx"},
		{"when the folder is readable by all", chmod(".", 0o755), "chmod o-rwx"},
		{"when the authority's folder is open to a group", chmod("authority", 0o750), "chmod 700"},
		{"when a key is readable by others", chmod("authority/keys/root-*.key", 0o644), "chmod 600"},
		{"with the key of something else", func(t *testing.T, dir string, _ *ca.Config) {
			b := must(os.ReadFile(glob(t, dir, "authority/keys/log-*.key")))
			if err := os.WriteFile(glob(t, dir, "authority/keys/root-*.key"), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}, "is not the key of its certificate"},
		{"with a key that is garbage", func(t *testing.T, dir string, _ *ca.Config) {
			if err := os.WriteFile(glob(t, dir, "authority/keys/root-*.key"), []byte("garbage"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "loading key file"},
		{"with a store of a newer version", func(t *testing.T, dir string, _ *ca.Config) { editJournal(t, dir, `"version":3`, `"version":4`) }, "run the newer signet-ca"},
		{"with a journal that is garbage", func(t *testing.T, dir string, _ *ca.Config) { editJournal(t, dir, `{`, `[`) }, "journal"},
		{"under another trust domain", func(_ *testing.T, _ string, c *ca.Config) { c.TrustDomain = otherTD }, "cannot be renamed"},
		{"as another instance", func(_ *testing.T, _ string, c *ca.Config) { c.Instance = 2 }, "instance"},
		{"in a folder that does not exist", func(_ *testing.T, dir string, c *ca.Config) { c.DataDir = dir + "-x" }, "does not exist"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.close()
			cfg := w.cfg
			c.spoil(t, cfg.DataDir, &cfg)
			before := tree(t, w.cfg.DataDir)
			a, err := ca.Open(t.Context(), cfg)
			if err == nil {
				_ = a.Close()
				t.Fatal("it started")
			}
			if !strings.Contains(err.Error(), c.says) {
				t.Errorf("the error does not say what to do (%q): %v", c.says, err)
			}
			if after := tree(t, w.cfg.DataDir); after != before {
				t.Errorf("files changed from\n%s\nto\n%s", before, after)
			}
			_ = os.Chmod(cfg.DataDir, 0o700)
		})
	}
}

// editJournal changes the journal in the store of a closed authority.
func editJournal(t *testing.T, dir, from, to string) {
	t.Helper()
	s, err := storage.OpenBolt(filepath.Join(dir, "authority/state.db"), storage.BoltOptions{MustExist: true})
	if err != nil {
		t.Fatal(err)
	}
	e, err := s.Get(t.Context(), "journal")
	if err != nil {
		t.Fatal(err)
	}
	v := strings.Replace(string(e.Value), from, to, 1)
	if v == string(e.Value) {
		t.Fatalf("no %q in the journal", from)
	}
	if _, err := s.Commit(t.Context(), nil, []storage.Op{{Key: "journal", Value: []byte(v)}}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// tree lists names and modes below dir.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err == nil {
			b.WriteString(fi.Mode().String() + " " + strings.TrimPrefix(path, dir) + "\n")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestASecondProcessIsToldSo(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *ca.Config) { c.StoreOptions.LockTimeout = 50 * time.Millisecond })
	if _, err := ca.Open(t.Context(), w.cfg); !errors.Is(err, storage.ErrLocked) {
		t.Errorf("got %v, want ErrLocked", err)
	}
}

// TestAnInterruptedFirstStartLeavesNothing: what a crash leaves of a new authority
// is under another name, was never used, and is replaced.
func TestAnInterruptedFirstStartLeavesNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.close()
	if err := os.Rename(w.cfg.DataDir+"/authority", w.cfg.DataDir+"/authority.new"); err != nil {
		t.Fatal(err)
	}
	old := w.Root()
	w.open()
	if w.Root().Equal(old) {
		t.Error("an authority that was never complete was used")
	}
	if _, err := os.Stat(w.cfg.DataDir + "/authority.new"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it stays behind: %v", err)
	}
}

func TestConfigIsChecked(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.close()
	for name, edit := range map[string]func(*ca.Config){
		"trustDomain":               func(c *ca.Config) { c.TrustDomain = noTD },
		"instance":                  func(c *ca.Config) { c.Instance = 128 },
		"dataDir":                   func(c *ca.Config) { c.DataDir = "" },
		"svid.ttl":                  func(c *ca.Config) { c.SVID.TTL = 59 * time.Second },
		"svid.agentTTL":             func(c *ca.Config) { c.SVID.AgentTTL = 25 * time.Hour },
		"svid.minTTL":               func(c *ca.Config) { c.SVID.MinTTL = time.Millisecond },
		"svid.backdate":             func(c *ca.Config) { c.SVID.Backdate = -1 },
		"authority.intermediateTTL": func(c *ca.Config) { c.IntermediateTTL = time.Hour },
		"authority.rootTTL":         func(c *ca.Config) { c.RootTTL = 8 * 24 * time.Hour },
		"dnsNames":                  func(c *ca.Config) { c.DNSNames = []string{"*.example"} },
		"a view of the pods":        func(c *ca.Config) { c.Pods = nil },
	} {
		cfg := w.cfg
		edit(&cfg)
		a, err := ca.Open(t.Context(), cfg)
		if err == nil {
			_ = a.Close()
			t.Errorf("%s: taken", name)
		} else if !strings.Contains(err.Error(), name) {
			t.Errorf("%s: the error does not name it: %v", name, err)
		}
	}
}

// TestAnOldClockSignsNothing opens an authority of today in a bubble whose clock says the
// year 2000: it starts, for its operator, and says why it is not ready. A new one is not
// made by a clock that is older than the program.
func TestAnOldClockSignsNothing(t *testing.T) {
	w := newWorld(t)
	w.close()
	synctest.Test(t, func(t *testing.T) {
		a, err := ca.Open(t.Context(), w.cfg)
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Ready(); !errors.Is(err, ca.ErrClock) || !strings.Contains(err.Error(), "set the clock right") {
			t.Errorf("got %v, want ErrClock", err)
		}
		if err := a.RenewServing(t.Context()); !errors.Is(err, ca.ErrClock) {
			t.Errorf("it signs: %v", err)
		}
		if err := a.Close(); err != nil {
			t.Error(err)
		}
		cfg := w.cfg
		cfg.DataDir, cfg.Built = t.TempDir(), time.Now().Add(time.Hour)
		if err := os.Chmod(cfg.DataDir, 0o700); err != nil {
			t.Fatal(err)
		}
		if a, err := ca.Open(t.Context(), cfg); !errors.Is(err, ca.ErrClock) {
			t.Errorf("a new authority: got %v, want ErrClock", err)
			if err == nil {
				_ = a.Close()
			}
		}
	})
}

// TestTheFormerJournalIsRead, and written in the present format when it changes.
func TestTheFormerJournalIsRead(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.close()
	root := w.Root()
	editJournal(t, w.cfg.DataDir, `"version":3`, `"version":2`)
	w.open()
	if !w.Root().Equal(root) {
		t.Error("another root")
	}
	if err := w.RenewIntermediate(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.close()
	editJournal(t, w.cfg.DataDir, `"version":3`, `"version":3 `)
}
