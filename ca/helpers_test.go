package ca_test

import (
	"bytes"
	"crypto/rand"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/storagetest"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"
)

func mkdir(t testing.TB, dir string, mode os.FileMode) {
	t.Helper()
	if err := os.Mkdir(dir, mode); err != nil {
		t.Fatal(err)
	}
}

func deleteKey(t testing.TB, s storage.Store, key string) error {
	t.Helper()
	_, err := s.Commit(t.Context(), nil, []storage.Op{{Key: key, Delete: true}})
	return err
}

// copyTree reads the files of one folder.
func copyTree(t testing.TB, dir string) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	for _, e := range must(os.ReadDir(dir)) {
		out[e.Name()] = must(os.ReadFile(filepath.Join(dir, e.Name())))
	}
	return out
}

// restoreTree makes a folder hold exactly those files.
func restoreTree(t testing.TB, files map[string][]byte, dir string) {
	t.Helper()
	for _, e := range must(os.ReadDir(dir)) {
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func listenUnix(path string) (net.Listener, error) { return net.Listen("unix", path) }

// gauge is the value of a metric without labels.
func gauge(t testing.TB, r *prometheus.Registry, name string) float64 {
	t.Helper()
	for _, f := range must(r.Gather()) {
		if f.GetName() == name {
			return f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	t.Fatalf("no metric %s", name)
	return 0
}

func clone(r *capb.IssuanceRecord) *capb.IssuanceRecord { return proto.CloneOf(r) }

func marshal(t testing.TB, r *capb.IssuanceRecord) []byte {
	t.Helper()
	b, err := proto.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// freshSerial is that of a record with other random bytes.
func freshSerial(r *capb.IssuanceRecord) []byte {
	s := bytes.Clone(r.GetSerial())
	_, _ = rand.Read(s[7:])
	return s
}

// faultyWrite has one write fail, the n-th from arm to disarm: of the issuance log or of
// the state ("log", "state"), before it landed ("lost") or after.
type faultyWrite struct {
	where, fault string
	n            int

	fs    *storagetest.CrashFS
	count int
	armed bool
	hit   bool // whether it came to that write
}

func (f *faultyWrite) lost() bool { return f.fault == "lost" }

// configure is for newWorld.
func (f *faultyWrite) configure(c *ca.Config) {
	f.fs = storagetest.NewCrashFS()
	c.LogOptions.FS = crashable{f.fs}
	c.StoreOptions.Hook = func(landed bool) error {
		if !f.armed || f.where != "state" || landed == f.lost() {
			return nil
		}
		if f.count++; f.count != f.n+1 {
			return nil
		}
		f.hit = true
		return storagetest.ErrInjected
	}
}

func (f *faultyWrite) arm() {
	f.armed = true
	if f.where != "log" {
		return
	}
	first := len(f.fs.Ops())
	f.fs.Fail(func(o storagetest.Op) storagetest.Fault {
		if o.N != first+f.n {
			return storagetest.NoFault
		}
		f.hit = true
		if f.lost() {
			return storagetest.NotPersisted
		}
		return storagetest.Persisted
	})
}

func (f *faultyWrite) disarm() {
	f.armed = false
	f.fs.Fail(nil)
}

// reopen opens the authority again, whose log may have failed.
func (w *world) reopen() {
	if w.Log().Err() != nil {
		w.stop()
		<-w.done
		w.stop = nil
		_ = w.Authority.Close()
	} else {
		w.close()
	}
	w.open()
}
