package ca_test

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/storagetest"
)

// whole is n, or the part of it that is looked at with the race detector.
func whole(n, part int) int {
	if raceEnabled {
		return part
	}
	return n
}

// matrix runs one life of an authority again and again, and lets another write of
// it go wrong each time.
type matrix struct {
	*testing.T
	base *world // for its tokens and pods
	dir  string
	out  []*x509.Certificate // what went out
}

// life is one authority from nothing: made, an agent attested, certificates issued,
// heads signed, the intermediate renewed. Steps go on after one that failed: what
// must not be signed then is not. It returns what could be closed properly.
func (m *matrix) life(cfg ca.Config) {
	a, err := ca.Open(m.Context(), cfg)
	if err != nil {
		return
	}
	w := &world{t: m, cfg: cfg, issuer: m.base.issuer, pods: m.base.pods}
	w.serve(a)
	defer func() {
		w.stop()
		<-w.done
		w.server.Stop()
		_ = a.Close()
	}()
	cert, err := w.tryAttest(w.dial(nil), func(r *capb.AttestRequest) {
		r.Evidence = &capb.AttestRequest_Token{Token: w.issuer.Token(agentA, "signet-ca")}
	})
	batch := func(n int) {
		if cert == nil {
			return
		}
		var items []*capb.IssueItem
		for range n {
			items = append(items, item(m, byUID(server.PodUID)))
		}
		rs, err := issue(m, w.dial(cert), items...)
		if err != nil {
			return
		}
		for _, r := range rs {
			if chain := r.GetX509().GetChain(); chain != nil {
				m.out = append(m.out, must(x509.ParseCertificate(chain[0])), must(x509.ParseCertificate(chain[1])))
			}
		}
	}
	if err == nil {
		m.out = append(m.out, cert.Leaf)
	}
	batch(3)
	_ = w.SignHead(m.Context())
	batch(1)
	_ = w.RenewIntermediate(m.Context())
	batch(2)
}

// config is that of a new authority in a folder of its own.
func (m *matrix) config(fs storage.FS) ca.Config {
	m.dir = filepath.Join(m.TempDir(), "data")
	mkdir(m, m.dir, 0o700)
	cfg := m.base.cfg
	cfg.DataDir, cfg.LogOptions.FS, cfg.LogOptions.SegmentSize = m.dir, fs, 4<<10
	m.out = nil
	return cfg
}

// check opens what is left, verifies everything, and has it issue again.
func (m *matrix) check(what string, cfg ca.Config, out []*x509.Certificate) {
	m.Helper()
	if _, err := os.Stat(filepath.Join(cfg.DataDir, "authority")); errors.Is(err, os.ErrNotExist) {
		if len(out) > 0 {
			m.Errorf("%s: certificates went out of an authority that does not exist", what)
		}
		return
	}
	a, err := ca.Open(m.Context(), cfg)
	if err != nil {
		m.Errorf("%s: %v", what, err)
		return
	}
	w := &world{t: m, cfg: cfg, issuer: m.base.issuer, pods: m.base.pods}
	w.serve(a)
	defer w.close()
	if problems, err := a.VerifyAll(m.Context()); err != nil || len(problems) > 0 {
		m.Errorf("%s: %v, %v", what, problems, err)
	}
	in := map[string]bool{}
	for r := range records(w) {
		if s := string(r.GetSerial()); in[s] {
			m.Errorf("%s: serial %x occurs twice", what, s)
		} else {
			in[s] = true
		}
	}
	roots, inters := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(w.Root())
	for _, c := range out {
		if c.IsCA {
			inters.AddCert(c)
		}
	}
	inters.AddCert(w.Intermediate())
	for _, c := range out {
		if !in[string(ca.Serial(c))] {
			m.Errorf("%s: certificate %x went out and has no record", what, ca.Serial(c))
		}
		if _, err := c.Verify(x509.VerifyOptions{Roots: roots, Intermediates: inters, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
			m.Errorf("%s: certificate %x: %v", what, ca.Serial(c), err)
		}
	}
	client, _ := w.attest(agentA)
	rs, err := issue(m, client, item(m, byUID(server.PodUID)))
	if err != nil || rs[0].GetX509() == nil {
		m.Errorf("%s: it does not issue afterwards: %v, %v", what, rs, err)
		return
	}
	if c := must(x509.ParseCertificate(rs[0].GetX509().GetChain()[0])); in[string(ca.Serial(c))] {
		m.Errorf("%s: serial %x comes twice", what, ca.Serial(c))
	}
}

// TestCrashMatrix: each write of the log and of the state is lost, lands but is
// reported failed, or is the last one before a crash that drops every byte that was
// not synced; then the authority is opened again. No certificate is out without a
// record, serials are unique, chains verify, the log verifies, and it goes on.
func TestCrashMatrix(t *testing.T) {
	t.Parallel()
	m := &matrix{T: t, base: newWorld(t)}
	m.base.close()
	stride := whole(1, 6)
	if testing.Short() {
		stride = 6
	}
	counts := map[string]int{}
	certificates := 0

	clean := storagetest.NewCrashFS()
	m.life(m.config(crashable{clean}))
	ops := clean.Ops()
	if len(m.out) != 1+2*6 || len(ops) < 30 {
		t.Fatalf("a life without failures: %d certificates, %d operations", len(m.out), len(ops))
	}
	for n := 0; n < len(ops); n += stride {
		for name, fault := range map[string]storagetest.Fault{"lost": storagetest.NotPersisted, "landed, reported failed": storagetest.Persisted,
			"half written": storagetest.Partial, "sync forgotten": storagetest.Forgotten} {
			fs := storagetest.NewCrashFS()
			cfg := m.config(crashable{fs})
			fs.FailNth(n, fault)
			m.life(cfg)
			out := m.out
			certificates += len(out)
			what := fmt.Sprintf("log: %v %s", ops[n], name)
			crashed := cfg
			crashed.DataDir = copyData(t, cfg.DataDir)
			crashed.LogOptions.FS = moved{fs.Crash(storagetest.Loss{}), cfg.DataDir, crashed.DataDir}
			m.check(what+", then unsynced bytes dropped", crashed, out)
			fs.Fail(nil)
			m.check(what+", then a restart", cfg, out)
			counts["log write "+name]++
		}
		// The crash comes just before this operation.
		fs := storagetest.NewCrashFS()
		cfg := m.config(crashable{fs})
		var crashed ca.Config
		var before []*x509.Certificate
		fs.Fail(func(op storagetest.Op) storagetest.Fault {
			if op.N == n {
				crashed, before = cfg, m.out
				crashed.DataDir = copyData(t, cfg.DataDir)
				crashed.LogOptions.FS = moved{fs.Crash(storagetest.Loss{}), cfg.DataDir, crashed.DataDir}
			}
			return storagetest.NoFault
		})
		m.life(cfg)
		if crashed.DataDir != "" {
			m.check(fmt.Sprintf("log: a crash before %v, unsynced bytes dropped", ops[n]), crashed, before)
			counts["log write, unsynced bytes dropped"]++
		}
	}

	commits := 0
	hooked := func(hook func(landed bool) error) ca.Config {
		cfg := m.config(crashable{storagetest.NewCrashFS()})
		cfg.StoreOptions.Hook = hook
		return cfg
	}
	m.life(hooked(func(landed bool) error {
		if landed {
			commits++
		}
		return nil
	}))
	if commits < 3 {
		t.Fatalf("only %d commits", commits)
	}
	for n := range commits {
		for _, name := range []string{"lost", "landed, reported failed", "unsynced bytes dropped"} {
			i := 0
			var old []byte
			path := ""
			cfg := hooked(func(landed bool) error {
				if !landed {
					i++
				}
				if i != n+1 {
					return nil
				}
				if !landed {
					if path = statePath(m.dir); path != "" {
						old = must(os.ReadFile(path))
					}
					if name == "lost" {
						return storagetest.ErrInjected
					}
				} else if name != "lost" {
					return storagetest.ErrInjected
				}
				return nil
			})
			m.life(cfg)
			out := m.out
			certificates += len(out)
			if name == "unsynced bytes dropped" && path != "" {
				if path = statePath(m.dir); path == "" {
					continue // the new authority never got its name
				}
				if err := os.WriteFile(path, old, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			cfg.StoreOptions.Hook = nil
			m.check(fmt.Sprintf("state: commit %d %s", n, name), cfg, out)
			counts["commit "+name]++
		}
	}
	total := 0
	for what, n := range counts {
		total += n
		t.Logf("%4d × %s", n, what)
	}
	t.Logf("%d runs over %d operations of the log and %d commits; %d certificates went out, each with its record", total, len(ops), commits, certificates)
}

// statePath is where the state of an authority in a folder lies now; empty if there
// is none.
func statePath(dir string) string {
	for _, name := range []string{"authority", "authority.new"} {
		path := filepath.Join(dir, name, "state.db")
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return ""
}

// copyData copies what of an authority lies on the real file system, with the names
// that a crash leaves.
func copyData(t testing.TB, dir string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "data")
	if err := os.CopyFS(to, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	err := filepath.WalkDir(to, func(path string, d os.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir():
			return os.Chmod(path, 0o700)
		}
		return os.Chmod(path, 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
	return to
}

// moved is a log's file system under the name of another folder.
type moved struct {
	*storagetest.CrashFS
	from, to string
}

func (f moved) name(name string) string {
	rest, ok := strings.CutPrefix(same(name), f.to)
	if !ok {
		return same(name)
	}
	return f.from + rest
}

func (f moved) Lock(dir string, create bool) (io.Closer, error) {
	return f.CrashFS.Lock(f.name(dir), create)
}
func (f moved) List(dir string) ([]string, error)        { return f.CrashFS.List(f.name(dir)) }
func (f moved) Open(name string) (storage.File, error)   { return f.CrashFS.Open(f.name(name)) }
func (f moved) Create(name string) (storage.File, error) { return f.CrashFS.Create(f.name(name)) }
func (f moved) Rename(from, to string) error             { return f.CrashFS.Rename(f.name(from), f.name(to)) }
func (f moved) Remove(name string) error                 { return f.CrashFS.Remove(f.name(name)) }
func (f moved) SyncDir(dir string) error                 { return f.CrashFS.SyncDir(f.name(dir)) }
