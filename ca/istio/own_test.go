package istio_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/istio"
)

func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !f(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// shortLived makes serving certificates due after some four seconds.
func shortLived(w *world) {
	w.ca.SVID = ca.SVIDConfig{TTL: 8 * time.Second, AgentTTL: 8 * time.Second, MinTTL: time.Second, Backdate: time.Second}
	w.cfg.MaxTTL = 8 * time.Second
}

// TestTheServingCertificateIsRenewed without a restart, and without disturbing
// connections.
func TestTheServingCertificateIsRenewed(t *testing.T) {
	t.Parallel()
	w := newWorld(t, shortLived, func(w *world) { w.cfg.DNSNames = []string{dnsName, "istiod.istio-system.svc.cluster.local"} })
	serving := func() *x509.Certificate {
		conn, err := w.pipe.DialContext(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		c := tls.Client(conn, &tls.Config{RootCAs: w.roots(), ServerName: "istiod.istio-system.svc.cluster.local", NextProtos: []string{"h2"}})
		if err := c.HandshakeContext(t.Context()); err != nil {
			t.Fatal(err)
		}
		return c.ConnectionState().PeerCertificates[0]
	}
	first := serving()
	if first.URIs[0].String() != w.authority.ID().String() {
		t.Errorf("it names %v", first.URIs)
	}
	eventually(t, "another serving certificate", func() bool { return serving().SerialNumber.Cmp(first.SerialNumber) != 0 })
	if err := w.Ready(); err != nil {
		t.Error(err)
	}
}

// TestIstiodsOwnCertificate: its files serve TLS under istiod's names, are renewed,
// and belong together at each moment.
func TestIstiodsOwnCertificate(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "istiod-tls")
	w := newWorld(t, shortLived, func(w *world) {
		w.cfg.Istiod = &istio.Istiod{Namespace: "istio-system", ServiceAccount: "istiod", DNSNames: []string{dnsName}, Deliver: istio.Folder(dir)}
	})
	load := func() *x509.Certificate {
		t.Helper()
		// Through the link once, as a reader does that wants both of one moment.
		at, err := filepath.EvalSymlinks(filepath.Join(dir, "..data"))
		if err != nil {
			t.Fatal(err)
		}
		c, err := tls.LoadX509KeyPair(filepath.Join(at, "tls.crt"), filepath.Join(at, "tls.key"))
		if errors.Is(err, os.ErrNotExist) {
			return nil // exchanged in between
		}
		if err != nil {
			t.Fatal(err)
		}
		return c.Leaf
	}
	c, err := tls.LoadX509KeyPair(filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"))
	if err != nil {
		t.Fatal(err)
	}
	if got := c.Leaf.URIs[0].String(); got != "spiffe://cluster.local/ns/istio-system/sa/istiod" {
		t.Errorf("it names %s", got)
	}
	roots, err := os.ReadFile(filepath.Join(dir, "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(roots) {
		t.Fatal("ca.crt holds no certificate")
	}
	s := httptest.NewUnstartedServer(http.NotFoundHandler())
	s.TLS = &tls.Config{Certificates: []tls.Certificate{c}}
	s.StartTLS()
	defer s.Close()
	conn, err := tls.Dial("tcp", s.Listener.Addr().String(), &tls.Config{RootCAs: pool, ServerName: dnsName})
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	for _, name := range []string{"tls.crt", "tls.key", "ca.crt"} {
		if fi, err := os.Stat(filepath.Join(dir, name)); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, fi, err)
		}
	}
	eventually(t, "another certificate of istiod", func() bool {
		next := load()
		return next != nil && next.SerialNumber.Cmp(c.Leaf.SerialNumber) != 0
	})
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) > 6 {
		t.Errorf("%d entries are left in the folder: %v, %v", len(entries), entries, err)
	}
	w.close()
}

// TestAPlaceThatIsAway: a place for istiod's certificate that cannot be written
// does not keep the door shut; it makes it not ready, until it succeeds.
func TestAPlaceThatIsAway(t *testing.T) {
	t.Parallel()
	var away atomic.Bool
	away.Store(true)
	w := newWorld(t, func(w *world) {
		w.cfg.Istiod = &istio.Istiod{Namespace: "istio-system", ServiceAccount: "istiod", DNSNames: []string{dnsName},
			Deliver: func(context.Context, map[string][]byte) error {
				if away.Load() {
					return errors.New("no route to host")
				}
				return nil
			}}
	})
	eventually(t, "not ready", func() bool { return w.Ready() != nil })
	w.allow(t, serverID, w.token(server))
	away.Store(false)
	eventually(t, "ready again", func() bool { return w.Ready() == nil })
}

// TestFolderLeavesWhatIsNotItsOwn: a file that somebody put there is not replaced.
func TestFolderLeavesWhatIsNotItsOwn(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "tls.key"), []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := istio.Folder(dir)(t.Context(), map[string][]byte{"tls.key": []byte("new")}); err == nil {
		t.Error("a foreign file was replaced")
	}
	if b, _ := os.ReadFile(filepath.Join(dir, "tls.key")); string(b) != "mine" {
		t.Errorf("it holds %q", b)
	}
}
