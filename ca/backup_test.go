package ca_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/storage"

	"github.com/prometheus/client_golang/prometheus"
)

// backup takes one as an operator does.
func (w *world) backup(op capb.AdminClient) []byte {
	w.t.Helper()
	s, err := op.Backup(w.t.Context(), &capb.BackupRequest{})
	if err != nil {
		w.t.Fatal(err)
	}
	var b bytes.Buffer
	for {
		m, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return b.Bytes()
		}
		if err != nil {
			w.t.Fatal(err)
		}
		b.Write(m.GetData())
	}
}

// emptyDir is a folder for an authority.
func emptyDir(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "data")
	mkdir(t, dir, 0o700)
	return dir
}

// TestABackupUnderLoadIsRestored: the backup is taken while certificates are issued
// and the authority dies afterwards; what is restored goes on as another instance.
func TestABackupUnderLoadIsRestored(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *ca.Config) { c.LogOptions.SegmentSize = 16 << 10 })
	a, agent := w.attest(agentA)
	_, reused := newKey(t)
	first := item(t, byUID(server.PodUID))
	first.PublicKey = reused
	if rs, err := issue(t, a, first); err != nil || rs[0].GetX509() == nil {
		t.Fatal(rs, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var mu sync.Mutex
	var got [][]byte
	for range 3 {
		wg.Go(func() {
			for ctx.Err() == nil {
				rs, err := issue(t, a, item(t, byUID(server.PodUID)), item(t, byUID(client.PodUID)))
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				for _, r := range rs {
					got = append(got, r.GetX509().GetChain()[0])
				}
				mu.Unlock()
			}
		})
	}
	op := w.admin()
	var last []byte
	var before [][]byte
	for range 5 {
		mu.Lock()
		before = slices.Clone(got)
		mu.Unlock()
		last = w.backup(op)
		info, v, err := ca.VerifyBackup(t.Context(), bytes.NewReader(last), filepath.Join(t.TempDir(), "v"))
		if err != nil || len(v.GetProblems()) != 0 || info.Instance != 1 || info.TrustDomain != "cluster.local" {
			t.Fatalf("%+v: %v, %v", info, v, err)
		}
		if v, err := op.VerifyLog(t.Context(), &capb.VerifyLogRequest{Store: true}); err != nil || len(v.GetProblems()) != 0 {
			t.Fatalf("verified under load: %v, %v", v, err)
		}
		if _, err := w.tryAttest(w.dial(nil), func(r *capb.AttestRequest) {
			r.Evidence = &capb.AttestRequest_Token{Token: w.issuer.Token(agentA, "signet-ca")}
		}); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	wg.Wait()
	held := w.issueSome(a, 3)
	oldTrust, _ := w.Trust()
	w.close()
	for name, b := range copyTree(t, w.cfg.DataDir+"/authority/keys") {
		block, _ := pem.Decode(b)
		if bytes.Contains(last, block.Bytes) || bytes.Contains(last, b[30:80]) || bytes.Contains(last, []byte("PRIVATE KEY")) {
			t.Errorf("the backup holds the key %s", name)
		}
	}

	// The disk is gone; the keys were kept elsewhere.
	keysDir := filepath.Join(w.cfg.DataDir, "authority/keys")
	w.cfg.DataDir = emptyDir(t)
	restored, err := ca.Restore(t.Context(), ca.RestoreConfig{Backup: bytes.NewReader(last), DataDir: w.cfg.DataDir, KeysDir: keysDir})
	if err != nil {
		t.Fatal(err)
	}
	if restored.Instance != 2 || restored.TrustSequence <= oldTrust.Sequence() {
		t.Errorf("%+v, the trust sequence was %d", restored, oldTrust.Sequence())
	}
	if p := verified(t, w.cfg.DataDir); len(p) != 0 {
		t.Errorf("restored: %v", p)
	}
	if o, err := ca.Open(t.Context(), w.cfg); err == nil || !strings.Contains(err.Error(), "instance 2") {
		t.Errorf("as the instance before: %v", err)
		if o != nil {
			_ = o.Close()
		}
	}
	registry := prometheus.NewRegistry()
	w.cfg.Instance, w.cfg.Metrics = 2, registry
	w.open()
	trust, _ := w.Trust()
	if trust.Sequence() != restored.TrustSequence || !bytes.Equal(trust.PEM(), oldTrust.PEM()) {
		t.Errorf("trust %d, %d roots", trust.Sequence(), len(trust.Roots()))
	}
	// An agent goes on with the SVID that it has, and shows what it has seen.
	a = w.dial(agent)
	w.show(a, held)
	rs, err := issue(t, a, item(t, byUID(server.PodUID)))
	if err != nil || w.Ready() != nil {
		t.Fatal(err, w.Ready())
	}
	c := verify(t, w, rs[0].GetX509(), "spiffe://cluster.local/ns/default/sa/server")
	if s := ca.Serial(c); s[0] != 2 {
		t.Errorf("serial %x is not of instance 2", s)
	}
	info, _, err := ca.VerifyBackup(t.Context(), bytes.NewReader(last), filepath.Join(t.TempDir(), "v"))
	if err != nil {
		t.Fatal(err)
	}
	lost := 0.0
	for _, f := range must(registry.Gather()) {
		if f.GetName() == "signet_ca_retired_log_lost_records" {
			lost = f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	if want := held.Sequence - info.LogSequence; lost < 3 || lost > float64(want) {
		t.Errorf("%v records are known to be lost, %d are at most", lost, want)
	}
	// A key of before the restore still belongs to its identity.
	stolen := item(t, byUID(client.PodUID))
	stolen.PublicKey = reused
	if rs, err := issue(t, a, stolen); err != nil || rs[0].GetX509() != nil {
		t.Errorf("a key that the instance before certified: %v, %v", rs, err)
	}
	op = w.admin()
	if v, err := op.VerifyLog(t.Context(), &capb.VerifyLogRequest{Store: true}); err != nil || len(v.GetProblems()) != 0 || len(v.GetLogs()) != 2 {
		t.Errorf("%v, %v", v, err)
	}
	inLog := map[string]bool{}
	s := must(op.ListLog(t.Context(), &capb.ListLogRequest{}))
	decisions := 0
	for {
		e, err := s.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		inLog[string(e.GetRecord().GetSerial())] = true
		if e.GetRecord().GetDecision().GetWhat() == capb.Decision_WHAT_RESTORED && e.GetInstance() == 2 && e.GetSequence() == 1 {
			decisions++
		}
	}
	for _, der := range before {
		if c := must(x509.ParseCertificate(der)); !inLog[string(ca.Serial(c))] {
			t.Errorf("certificate %x went out before the backup and is not in it", ca.Serial(c))
		}
	}
	if decisions != 1 {
		t.Error("the restore is not recorded")
	}
	t.Logf("%d certificates went out before the last backup, %d until the end", len(before), len(got))

	// And once more: a backup of the restored one.
	again := w.backup(op)
	w.close()
	w.cfg.Metrics = nil
	keysDir, w.cfg.DataDir = filepath.Join(w.cfg.DataDir, "authority/keys"), emptyDir(t)
	for _, used := range []uint8{1, 2, 128} {
		if _, err := ca.Restore(t.Context(), ca.RestoreConfig{Backup: bytes.NewReader(again), DataDir: w.cfg.DataDir, KeysDir: keysDir, Instance: used}); err == nil || !strings.Contains(err.Error(), "instance") {
			t.Errorf("as instance %d: %v", used, err)
		}
	}
	if restored, err = ca.Restore(t.Context(), ca.RestoreConfig{Backup: bytes.NewReader(again), DataDir: w.cfg.DataDir, KeysDir: keysDir}); err != nil || restored.Instance != 3 {
		t.Fatal(restored, err)
	}
	w.cfg.Instance = 3
	w.open()
	if a, _ := w.attest(agentA); !w.mayIssue(a) {
		t.Error("the authority that was restored twice does not issue")
	}
	if p, err := w.admin().VerifyLog(t.Context(), &capb.VerifyLogRequest{Store: true}); err != nil || len(p.GetProblems()) != 0 || len(p.GetLogs()) != 3 {
		t.Errorf("%v, %v", p, err)
	}
}

// made is an authority that is closed, with a backup of it.
func made(t testing.TB) (w *world, backup []byte) {
	t.Helper()
	w = newWorld(t, func(c *ca.Config) { c.LogOptions.SegmentSize = 4 << 10 })
	a, _ := w.attest(agentA)
	w.issueSome(a, 12)
	var b bytes.Buffer
	if err := w.Backup(context.Background(), &b); err != nil {
		t.Fatal(err)
	}
	w.close()
	return w, b.Bytes()
}

// TestAMangledBackupIsRefusedAndNothingIsLeft: each byte changed, cut anywhere,
// parts dropped, swapped, doubled and made up.
func TestAMangledBackupIsRefusedAndNothingIsLeft(t *testing.T) {
	t.Parallel()
	w, good := made(t)
	keysDir := w.cfg.DataDir + "/authority/keys"
	dir := emptyDir(t)
	n := 0
	refused := func(what string, b []byte) {
		t.Helper()
		n++
		_, err := ca.Restore(t.Context(), ca.RestoreConfig{Backup: bytes.NewReader(b), DataDir: dir, KeysDir: keysDir})
		if !errors.Is(err, ca.ErrBackup) {
			t.Errorf("%s: %v", what, err)
		}
		if left := must(os.ReadDir(dir)); len(left) != 0 {
			t.Fatalf("%s: left behind: %v", what, left)
		}
	}
	step := 151
	if testing.Short() {
		step = 499
	}
	for i := 0; i < len(good); i += step {
		b := bytes.Clone(good)
		b[i] ^= 1 << (i % 8)
		refused(fmt.Sprintf("byte %d changed", i), b)
		refused(fmt.Sprintf("cut at %d", i), good[:i])
	}
	for i := len(good) - 100; i < len(good); i++ {
		b := bytes.Clone(good)
		b[i] ^= 0x10
		refused(fmt.Sprintf("byte %d changed", i), b)
	}
	refused("a byte behind it", append(bytes.Clone(good), 0))
	refused("twice", append(bytes.Clone(good), good...))
	refused("empty", nil)
	parts := backupParts(good)
	if len(parts) < 6 {
		t.Fatalf("only %d parts", len(parts))
	}
	join := func(parts ...[]byte) []byte { return append(bytes.Clone(good[:12]), bytes.Join(parts, nil)...) }
	for i := range parts {
		without := append(append([][]byte{}, parts[:i]...), parts[i+1:]...)
		refused(fmt.Sprintf("part %d dropped", i), join(without...))
		doubled := append(append([][]byte{}, parts[:i+1]...), parts[i:]...)
		refused(fmt.Sprintf("part %d doubled", i), join(doubled...))
		if i > 0 {
			swapped := append([][]byte{}, parts...)
			swapped[i-1], swapped[i] = parts[i], parts[i-1]
			refused(fmt.Sprintf("parts %d and %d swapped", i-1, i), join(swapped...))
		}
	}
	for _, name := range []string{"../escape", "log/../../escape", "/tmp/escape", "log/000000000009.seg/x", "keys/root.key", "log/", "retired/1/000000000001.seg", "state.db"} {
		h := append([]byte{3}, binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint16(nil, uint16(len(name))), 1)...)
		made := append(append(h, name...), 'x')
		refused("a file "+name, join(append(append([][]byte{}, parts[:len(parts)-1]...), made, parts[len(parts)-1])...))
	}
	newer := bytes.Clone(good)
	newer[11]++
	if _, err := ca.Restore(t.Context(), ca.RestoreConfig{Backup: bytes.NewReader(newer), DataDir: dir, KeysDir: keysDir}); !errors.Is(err, storage.ErrNewerFormat) {
		t.Errorf("of a newer version: %v", err)
	}
	// Damage of the log that was there when the backup was made, and so is signed.
	if _, err := ca.Restore(t.Context(), ca.RestoreConfig{Backup: bytes.NewReader(good), DataDir: dir, KeysDir: keysDir}); err != nil {
		t.Errorf("the good one: %v", err)
	}
	t.Logf("%d mangled backups refused", n)
}

// backupParts takes a good backup apart.
func backupParts(b []byte) (parts [][]byte) {
	for b = b[12:]; len(b) > 0; {
		n := 11 + int(binary.BigEndian.Uint16(b[1:])) + int(binary.BigEndian.Uint64(b[3:]))
		parts, b = append(parts, b[:n]), b[n:]
	}
	return parts
}

func TestARestoreRefuses(t *testing.T) {
	t.Parallel()
	w, good := made(t)
	keys := w.cfg.DataDir + "/authority/keys"
	try := func(what, dir, keysDir, says string) {
		t.Helper()
		before := tree(t, filepath.Dir(dir))
		_, err := ca.Restore(t.Context(), ca.RestoreConfig{Backup: bytes.NewReader(good), DataDir: dir, KeysDir: keysDir})
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want %q", what, err, says)
		}
		if after := tree(t, filepath.Dir(dir)); after != before {
			t.Errorf("%s: changed from\n%s\nto\n%s", what, before, after)
		}
	}
	try("where an authority is", w.cfg.DataDir, keys, "move it away first")
	try("without keys", emptyDir(t), "", "say where the key files are")
	try("with a folder without them", emptyDir(t), t.TempDir(), "is missing")
	wrong := filepath.Join(t.TempDir(), "keys")
	mkdir(t, wrong, 0o700)
	for name, b := range copyTree(t, keys) {
		if strings.HasPrefix(name, "root-") {
			b = copyTree(t, keys)[logKeyName(t, keys)]
		}
		if err := os.WriteFile(filepath.Join(wrong, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	try("with other keys", emptyDir(t), wrong, "is not the key of its certificate")
	try("where there is no folder", filepath.Join(t.TempDir(), "none"), keys, "no such file")
	if _, err := ca.OpenFolder(emptyDir(t)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a folder without an authority: %v", err)
	}
	w.open()
	if _, err := ca.OpenFolder(w.cfg.DataDir); !errors.Is(err, storage.ErrLocked) {
		t.Errorf("a folder that is in use: %v", err)
	}
}

func logKeyName(t testing.TB, dir string) string {
	t.Helper()
	for name := range copyTree(t, dir) {
		if strings.HasPrefix(name, "log-") {
			return name
		}
	}
	t.Fatal("no log key")
	return ""
}

// FuzzBackup: whatever comes is refused, unless an authority signed it as it is; a
// panic or a file outside of the folder is a failure.
func FuzzBackup(f *testing.F) {
	_, good := made(f)
	f.Add(good)
	f.Add(good[:200])
	f.Add(good[:12])
	parts := backupParts(good)
	f.Add(append(bytes.Clone(good[:12]), bytes.Join(parts[:3], nil)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		taken := func(b []byte) bool {
			dir := filepath.Join(t.TempDir(), "v")
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			_, _, err := ca.VerifyBackup(ctx, bytes.NewReader(b), dir)
			if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("left behind: %v", err)
			}
			return err == nil
		}
		if taken(b) {
			b[len(b)/2] ^= 1
			if taken(b) {
				t.Error("changed, it is taken as well")
			}
			b[len(b)/2] ^= 1
		}
	})
}
