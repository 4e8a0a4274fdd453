package ca_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/storage"
)

// verified is what verification of the authority in a folder finds; an authority
// that cannot be opened is a finding too.
func verified(t testing.TB, dataDir string, heads ...storage.Head) []string {
	t.Helper()
	f, err := ca.OpenFolder(dataDir)
	if err != nil {
		return []string{err.Error()}
	}
	defer f.Close()
	var given []*capb.LogHead
	for _, h := range heads {
		given = append(given, headProto(h))
	}
	v, err := f.Verify(t.Context(), given, true)
	if err != nil {
		t.Fatal(err)
	}
	return v.GetProblems()
}

// frames are the places of the batches of a segment. Signed heads are left out: one
// that is missing, or comes later, takes no record away.
func frames(segment []byte) (at [][2]int) {
	for off := 128; off+20 <= len(segment); {
		n := 20 + int(binary.BigEndian.Uint32(segment[off+8:]))
		if segment[off+4] == 1 {
			at = append(at, [2]int{off, off + n})
		}
		off += n
	}
	return at
}

// TestVerificationDetects what somebody who may write the log can do to it. Against
// the last head that agents hold also what leaves a log consistent in itself.
func TestVerificationDetects(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *ca.Config) { c.LogOptions.SegmentSize = 4 << 10 })
	w.close()
	older := copyTree(t, w.logDir())
	w.open()
	a, _ := w.attest(agentA)
	w.issueSome(a, 12)
	held := w.issueSome(a, 12)
	w.close()
	good := copyTree(t, w.logDir())
	if p := verified(t, w.cfg.DataDir, held); len(p) != 0 {
		t.Fatalf("nothing was done to it, and %v", p)
	}
	segments := slices.Sorted(maps.Keys(good))
	if len(segments) < 3 {
		t.Fatalf("only %v", segments)
	}
	// try puts a log in the place of the good one; head says whether detection needs
	// the head that agents hold.
	counts := map[string]int{}
	try := func(what string, log map[string][]byte, head bool) {
		t.Helper()
		restoreTree(t, log, w.logDir())
		without, with := verified(t, w.cfg.DataDir), verified(t, w.cfg.DataDir, held)
		if len(with) == 0 || !head && len(without) == 0 {
			t.Errorf("%s is not noticed; without a head: %v", what, without)
		}
		counts[strings.SplitN(what, " at ", 2)[0]]++
	}
	change := func(name string, b []byte) map[string][]byte {
		m := maps.Clone(good)
		if m[name] = b; b == nil {
			delete(m, name)
		}
		return m
	}
	step := whole(7, 97)
	if testing.Short() {
		step = 97
	}
	for _, name := range segments {
		for i := 0; i < len(good[name]); i += step {
			b := bytes.Clone(good[name])
			b[i] ^= 1 << (i % 8)
			// The last bytes of all can be an incomplete write, which is left out.
			try(fmt.Sprintf("one byte changed at %s:%d", name, i), change(name, b), name == segments[len(segments)-1])
		}
	}
	for k, name := range segments {
		last := k == len(segments)-1
		try("a segment removed at "+name, change(name, nil), last)
		fs := frames(good[name])
		for i, f := range fs {
			b := slices.Concat(good[name][:f[0]], good[name][f[1]:])
			try(fmt.Sprintf("a batch dropped at %s:%d", name, f[0]), change(name, b), last && i == len(fs)-1)
			if i > 0 {
				p := fs[i-1]
				b := slices.Concat(good[name][:p[0]], good[name][f[0]:f[1]], good[name][p[1]:f[0]], good[name][p[0]:p[1]], good[name][f[1]:])
				try(fmt.Sprintf("two batches swapped at %s:%d", name, f[0]), change(name, b), false)
			}
			// Cut after a frame the log is one that ended earlier.
			if last && i < len(fs)-1 {
				try(fmt.Sprintf("the tail cut at %s:%d", name, f[1]), change(name, good[name][:f[1]]), true)
			}
		}
	}
	try("the whole log replaced by an older copy", older, true)

	// The log written anew, consistent from end to end, by somebody without the key.
	var all [][]byte
	restoreTree(t, good, w.logDir())
	l := must(storage.OpenLog(w.logDir(), storage.LogOptions{Instance: 1, ReadOnly: true}))
	for r, err := range l.Scan(t.Context(), 1) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, r.Data)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	rewrite := func(what string, records [][]byte) {
		t.Helper()
		dir := filepath.Join(t.TempDir(), "log")
		l := must(storage.OpenLog(dir, storage.LogOptions{Instance: 1}))
		for _, r := range records {
			if _, err := l.Append(t.Context(), [][]byte{r}); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		try(what, copyTree(t, dir), true)
	}
	rewrite("a record dropped and the log written anew", slices.Concat(all[:9], all[10:]))
	swapped := slices.Clone(all)
	swapped[9], swapped[10] = all[10], all[9]
	rewrite("two records swapped and the log written anew", swapped)
	rewrite("the log written anew", all)

	restoreTree(t, good, w.logDir())
	if p := verified(t, w.cfg.DataDir, held); len(p) != 0 {
		t.Errorf("the good log at last: %v", p)
	}
	for _, what := range slices.Sorted(maps.Keys(counts)) {
		t.Logf("detected: %s (%d)", what, counts[what])
	}
}

// TestVerificationOfWhatRecordsSay: records that no ceremony makes.
func TestVerificationOfWhatRecordsSay(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a, _ := w.attest(agentA)
	w.issueSome(a, 2)
	w.close()
	var last *capb.IssuanceRecord
	w.open()
	for r := range records(w) {
		last = r
	}
	w.close()
	good := copyTree(t, w.logDir())
	for name, c := range map[string]struct {
		edit func(r *capb.IssuanceRecord)
		says string
	}{
		"a serial that occurs twice":    {func(r *capb.IssuanceRecord) {}, "occurs twice"},
		"a key of another identity":     {func(r *capb.IssuanceRecord) { r.Serial = freshSerial(r); r.SpiffeId += "x" }, ca.ErrKeyInUse.Error()},
		"a serial of another instance":  {func(r *capb.IssuanceRecord) { r.Serial = freshSerial(r); r.Serial[0]++ }, "another instance"},
		"a serial of another time":      {func(r *capb.IssuanceRecord) { r.Serial = freshSerial(r); r.Serial[2]++ }, "the serial is of"},
		"a short serial":                {func(r *capb.IssuanceRecord) { r.Serial = r.Serial[:16] }, "17 bytes"},
		"no evidence":                   {func(r *capb.IssuanceRecord) { r.Serial = freshSerial(r); r.Evidence = 0 }, "evidence"},
		"no key hash":                   {func(r *capb.IssuanceRecord) { r.Serial = freshSerial(r); r.KeyHash = nil }, "hash of the key"},
		"no validity":                   {func(r *capb.IssuanceRecord) { r.Serial = freshSerial(r); r.NotAfter = r.NotBefore }, "validity"},
		"a kind that is not known":      {func(r *capb.IssuanceRecord) { r.Serial = freshSerial(r); r.Kind = 99 }, "kind 99"},
		"another trust domain":          {func(r *capb.IssuanceRecord) { r.Serial = freshSerial(r); r.SpiffeId = "spiffe://other/a" }, "trust domain"},
		"no name":                       {func(r *capb.IssuanceRecord) { r.Serial = freshSerial(r); r.SpiffeId = "" }, "SPIFFE ID"},
		"a decision that says nothing":  {func(r *capb.IssuanceRecord) { r.Kind = capb.IssuanceRecord_KIND_DECISION }, "decision"},
		"bytes that are no record":      {nil, "record"},
		"an authority with a leaf name": {func(r *capb.IssuanceRecord) { r.Serial = freshSerial(r); r.Kind = capb.IssuanceRecord_KIND_ROOT }, "name of a leaf"},
	} {
		restoreTree(t, good, w.logDir())
		l := must(storage.OpenLog(w.logDir(), storage.LogOptions{Instance: 1}))
		b := []byte{0xff}
		if c.edit != nil {
			r := clone(last)
			c.edit(r)
			b = marshal(t, r)
		}
		if _, err := l.Append(t.Context(), [][]byte{b}); err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if p := verified(t, w.cfg.DataDir); len(p) != 1 || !strings.Contains(strings.ToLower(p[0]), strings.ToLower(c.says)) {
			t.Errorf("%s: %v, want one problem with %q", name, p, c.says)
		}
	}
	restoreTree(t, good, w.logDir())
	// What the state relies on must be in the log.
	s := must(storage.OpenBolt(w.cfg.DataDir+"/authority/state.db", storage.BoltOptions{}))
	stranger := freshSerial(last)
	_, err := s.Commit(t.Context(), nil, []storage.Op{{Key: fmt.Sprintf("agents/%x", stranger),
		Value: []byte(`{"version":1,"node":"node-a","podUID":"x","notAfter":"2030-01-01T00:00:00Z","tokenAt":"2029-01-01T00:00:00Z"}`)}})
	if err := errors.Join(err, s.Close()); err != nil {
		t.Fatal(err)
	}
	if p := verified(t, w.cfg.DataDir); len(p) != 1 || !strings.Contains(p[0], "has no record") {
		t.Errorf("an agent that was never issued an SVID: %v", p)
	}
}

// TestVerificationOfEachKindOfRecord: of what a start reads, or what somebody waits for,
// nothing that cannot be read is passed over.
func TestVerificationOfEachKindOfRecord(t *testing.T) {
	t.Parallel()
	shared := newShared(t)
	one := func(c *ca.Config) { c.Shared, c.RootReplica = shared, 1 }
	a := newWorld(t, one, func(c *ca.Config) { c.Instance = 1 })
	stop := a.run()
	newWorld(t, one)
	stop()
	if p, err := a.VerifyAll(t.Context()); err != nil || len(p) != 0 {
		t.Fatalf("nothing was done to it: %q, %v", p, err)
	}
	serial := fmt.Sprintf("01%032x", 7)
	other, err := shared.Store.Get(t.Context(), "replicas/002")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []struct{ key, value string }{
		{"agents/" + serial, `{`},
		{"instances/009", `{`},
		{"bans/x", `{`},
		{"ban-serials/x/001/0000", `x`},
		{"ban-revision", `{"version":1}`},
		{"revoke-asked/" + serial, `{`},
		{"revoke-asked/01", `{"version":1,"serial":"AQ=="}`},
		{"signed/002", `{"version":1}`},
		{"revoked/" + serial, `{`},
		{"crl/0102", `x`},
		{"replica-clock/001", `{`},
		{"replica-loss/001", `{`},
		{"replicas/002", `{"version":1}`},
		{"replicas/002", strings.Replace(string(other.Value), `"certificate":"M`, `"certificate":"N`, 1)},
	} {
		was, err := shared.Store.Get(t.Context(), r.key)
		if err != nil && !errors.Is(err, storage.ErrNotFound) {
			t.Fatal(err)
		}
		put := func(op storage.Op) {
			t.Helper()
			if _, err := shared.Store.Commit(t.Context(), nil, []storage.Op{op}); err != nil {
				t.Fatal(err)
			}
		}
		put(storage.Op{Key: r.key, Value: []byte(r.value)})
		if p, err := a.VerifyAll(t.Context()); len(p) == 0 && err == nil {
			t.Errorf("%s, which is %s, is passed over", r.key, r.value)
		}
		put(storage.Op{Key: r.key, Value: was.Value, Delete: was.Revision == 0})
	}
	if p, err := a.VerifyAll(t.Context()); err != nil || len(p) != 0 {
		t.Errorf("at last: %q, %v", p, err)
	}
}
