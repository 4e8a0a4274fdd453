package ca_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"fmt"
	"math/big"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/revocation"
	"github.com/signet-mesh/signet/storage"
)

// manyLists puts lists of replicas that were into a state, more than one commit can remove.
func manyLists(t *testing.T, shared ca.Shared) {
	t.Helper()
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	for i := range storage.MaxOps + 10 {
		issuer := &x509.Certificate{Subject: pkix.Name{CommonName: fmt.Sprint("gone ", i)}, SubjectKeyId: binary.BigEndian.AppendUint32(nil, uint32(i)), KeyUsage: x509.KeyUsageCRLSign}
		list := must(x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour)}, issuer, key))
		must(shared.Store.Commit(t.Context(), nil, []storage.Op{{Key: revocation.ListKey(issuer.SubjectKeyId), Value: list}}))
	}
}

// TestManyListsThatNobodyNeeds leave with more than one change of trust, and hold up none;
// meanwhile replicas say the same of each sequence.
func TestManyListsThatNobodyNeeds(t *testing.T) {
	t.Parallel()
	shared := newShared(t)
	one := func(c *ca.Config) { c.Shared, c.RootReplica, c.CRL.Enabled = shared, 1, true }
	a := newWorld(t, one, func(c *ca.Config) { c.Instance = 1 })
	stop := a.run()
	b := newWorld(t, one)
	stop()
	manyLists(t, shared)
	for i := 1; ; i++ {
		for _, w := range []*world{a, b} {
			if err := w.CatchUp(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		stored, _, err := shared.Store.List(t.Context(), revocation.ListPrefix)
		if err != nil {
			t.Fatal(err)
		}
		if n, x, y := len(stored), len(trustOf(a).CRLs()), len(trustOf(b).CRLs()); i > 1 && (n != x || n != y) {
			t.Errorf("%d lists are stored, the replicas say %d and %d", n, x, y)
		}
		if len(stored) == 2 {
			return
		}
		if i > 4 {
			t.Fatalf("%d lists are left", len(stored))
		}
		if err := a.Relist(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestABackupOfAReplicaIsNoOtherReplica: what is restored from the state that replicas share
// is an authority with an instance that none of them has.
func TestABackupOfAReplicaIsNoOtherReplica(t *testing.T) {
	t.Parallel()
	root, upstream := upstreamFolder(t)
	shared := newShared(t)
	edit := func(c *ca.Config) { c.Upstream, c.Shared = upstream, shared }
	a, b := newWorld(t, edit), newWorld(t, edit)
	if err := a.CatchUp(t.Context()); err != nil {
		t.Fatal(err)
	}
	if a.ID().Path() != "/signet/ca/1" || b.ID().Path() != "/signet/ca/2" {
		t.Fatalf("%v and %v", a.ID(), b.ID())
	}
	manyLists(t, shared)
	var backup bytes.Buffer
	if err := a.Backup(t.Context(), &backup); err != nil {
		t.Fatal(err)
	}
	// The other replica goes on; this one is lost, with the state.
	a.close()
	keysDir := filepath.Join(a.cfg.DataDir, ca.FolderName, "keys")
	a.cfg.DataDir, a.cfg.Shared = emptyDir(t), ca.Shared{}
	for _, used := range []uint8{1, 2} {
		_, err := ca.Restore(t.Context(), ca.RestoreConfig{Backup: bytes.NewReader(backup.Bytes()), DataDir: a.cfg.DataDir, KeysDir: keysDir, Instance: used})
		if err == nil || !strings.Contains(err.Error(), "was used before") || !strings.Contains(err.Error(), "[1 2]") {
			t.Errorf("as instance %d: %v", used, err)
		}
	}
	got, err := ca.Restore(t.Context(), ca.RestoreConfig{Backup: bytes.NewReader(backup.Bytes()), DataDir: a.cfg.DataDir, KeysDir: keysDir})
	if err != nil || got.Instance != 3 {
		t.Fatalf("it is instance %d: %v", got.Instance, err)
	}
	if p := verified(t, a.cfg.DataDir); len(p) != 0 {
		t.Errorf("restored: %v", p)
	}
	a.cfg.Instance = got.Instance
	a.open()
	if e := must(a.Store().Get(t.Context(), "journal")); bytes.Contains(e.Value, []byte(`"others"`)) {
		t.Errorf("its journal has other replicas: %s", e.Value)
	}
	agent, _ := a.attest(agentA)
	if chain := a.leaf(agent); verifies(chain, root.Cert) != nil || ca.Serial(chain[0])[0] != 3 {
		t.Errorf("serial %x: %v", ca.Serial(chain[0]), verifies(chain, root.Cert))
	}
}
