package holder_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/holder"
)

// newSVID is an SVID as the authority makes it.
func (a *authority) newSVID(path string, life time.Duration) *x509svid.SVID {
	id := spiffeid.RequireFromPath(td, path)
	key := newKey()
	leaf := a.inter.sign(leafTemplate(id, time.Now().Add(life)), key.Public())
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{leaf, a.inter.cert}, PrivateKey: key}
}

func fullState(a *authority) holder.State {
	uid := uint32(1000)
	now := time.Now().UTC().Round(0)
	return holder.State{
		Saved:        now,
		Agent:        a.newSVID("/signet/agent/node-a", time.Hour),
		AgentRenewAt: now.Add(30 * time.Minute),
		TokenBy:      now.Add(24 * time.Hour),
		Trust:        a.trust,
		NodeUID:      "node-uid",
		Pods: []identity.Workload{
			{Namespace: "default", ServiceAccount: "web", Pod: "web-1", PodUID: "u1", Node: "node-a", NodeUID: "node-uid",
				Labels:    map[string]string{"app": "web"},
				Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}, UnixUID: &uid},
			pod("api", "u2"),
		},
		SVIDs: []holder.Held{
			{SVID: a.newSVID("/ns/default/sa/api", time.Hour), RenewAt: now.Add(20 * time.Minute)},
			{SVID: a.newSVID("/ns/default/sa/web", time.Hour), RenewAt: now.Add(21 * time.Minute)},
		},
		Extra: map[string][]byte{"policies": {0, 1, 2, '\n', 255}, "empty": {}},
	}
}

// plain is a state as something that can be compared, keys as numbers.
func plain(s holder.State) map[string]any {
	svid := func(v *x509svid.SVID) string {
		if v == nil {
			return "none"
		}
		out := v.ID.String() + " " + scalar(v.PrivateKey).String()
		for _, c := range v.Certificates {
			out += fmt.Sprintf(" %x", c.Raw)
		}
		return out
	}
	m := map[string]any{
		"saved": s.Saved.UTC(), "agent": svid(s.Agent), "renew": s.AgentRenewAt.UTC(), "tokenBy": s.TokenBy.UTC(),
		"node": s.NodeUID, "extra": s.Extra, "trust": "none",
	}
	if s.Trust != nil {
		m["trust"] = fmt.Sprintf("%d %s %x", s.Trust.Sequence(), s.Trust.TrustDomain(), s.Trust.PEM())
	}
	var pods, svids []string
	for _, w := range s.Pods {
		uid := "none"
		if w.UnixUID != nil {
			uid = fmt.Sprint(*w.UnixUID)
		}
		w.UnixUID = nil
		pods = append(pods, fmt.Sprintf("%+v %s", w, uid))
	}
	for _, h := range s.SVIDs {
		svids = append(svids, svid(h.SVID)+h.RenewAt.UTC().String())
	}
	m["pods"], m["svids"] = pods, svids
	return m
}

// stateDir is a folder as OpenStateFile wants it.
func stateDir(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func openOn(t *testing.T, dir string, fake *holder.FakeHost) *holder.StateFile {
	t.Helper()
	f, err := holder.OpenStateFileOn(dir, holder.StateOptions{}, fake)
	if err != nil {
		t.Fatalf("OpenStateFile: %v", err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil && !errors.Is(err, fs.ErrClosed) { // its process may have ended
			t.Error(err)
		}
	})
	return f
}

// The real thing on this machine: a tmpfs works (as far as swap allows), the
// disk under the test's folder does not.
func TestStateFileOnThisMachine(t *testing.T) {
	t.Parallel()
	isTmpfs := func(dir string) bool {
		var s unix.Statfs_t
		if err := unix.Statfs(dir, &s); err != nil {
			t.Fatal(err)
		}
		return s.Type == unix.TMPFS_MAGIC || s.Type == unix.RAMFS_MAGIC
	}
	shm, err := os.MkdirTemp("/dev/shm", "signet-holder-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(shm); err != nil {
			t.Error(err)
		}
	})
	for _, parent := range []string{shm, t.TempDir()} {
		dir := filepath.Join(parent, "state")
		f, err := holder.OpenStateFile(dir, holder.StateOptions{AllowSwap: true})
		if !isTmpfs(parent) {
			if !errors.Is(err, holder.ErrNoState) || !strings.Contains(err.Error(), "not on a tmpfs") {
				t.Errorf("on a disk OpenStateFile says %v", err)
			}
			if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the folder that was made for nothing is still there (%v)", err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		a := newAuthority()
		want := fullState(a)
		if err := f.Save(want); err != nil {
			t.Fatal(err)
		}
		got, err := f.Load()
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(plain(want), plain(got)); d != "" {
			t.Errorf("state differs after a round trip (-want +got):\n%s", d)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestStateRoundTrip(t *testing.T) {
	t.Parallel()
	a := newAuthority()
	for name, want := range map[string]holder.State{
		"everything": fullState(a),
		"nothing":    {Saved: time.Now().UTC().Round(0)},
		"no agent":   {Saved: time.Now(), Trust: a.trust, SVIDs: fullState(a).SVIDs},
		"other zone": {Saved: time.Now().In(time.FixedZone("", 3600)), Trust: a.trust},
	} {
		dir := stateDir(t)
		f := openOn(t, dir, &holder.FakeHost{})
		if _, err := f.Load(); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: Load before Save = %v, want fs.ErrNotExist", name, err)
		}
		if err := f.Save(want); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		must(t, f.Close())
		// Another process reads it.
		got, err := openOn(t, dir, &holder.FakeHost{}).Load()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if d := cmp.Diff(plain(want), plain(got)); d != "" {
			t.Errorf("%s differs after a round trip (-want +got):\n%s", name, d)
		}
		info, err := os.Stat(filepath.Join(dir, "state"))
		if err != nil || info.Mode() != 0o600 {
			t.Errorf("%s: the file has mode %v (%v)", name, info.Mode(), err)
		}
		if names := list(t, dir); len(names) != 1 {
			t.Errorf("%s: there are other files: %v", name, names)
		}
	}
}

func TestSaveSetsTheTime(t *testing.T) {
	t.Parallel()
	f := openOn(t, stateDir(t), &holder.FakeHost{})
	if err := f.Save(holder.State{}); err != nil {
		t.Fatal(err)
	}
	if s, err := f.Load(); err != nil || time.Since(s.Saved) > time.Minute {
		t.Errorf("saved at %s (%v)", s.Saved, err)
	}
}

func TestLoadDropsWhatHasExpired(t *testing.T) {
	t.Parallel()
	a := newAuthority()
	s := fullState(a)
	s.Agent = a.newSVID("/signet/agent/node-a", -time.Second)
	s.SVIDs[0].SVID = a.newSVID("/ns/default/sa/api", -time.Second)
	f := openOn(t, stateDir(t), &holder.FakeHost{})
	if err := f.Save(s); err != nil {
		t.Fatal(err)
	}
	got, err := f.Load()
	if err != nil {
		t.Fatal(err)
	}
	if got.Agent != nil || len(got.SVIDs) != 1 || got.SVIDs[0].SVID.ID.Path() != "/ns/default/sa/web" {
		t.Errorf("loaded %v, agent %v", got.SVIDs, got.Agent)
	}
}

// A saved state feeds a holder, whatever happened to its pods meanwhile.
func TestStateFeedsAHolder(t *testing.T) {
	t.Parallel()
	a := newAuthority()
	f := openOn(t, stateDir(t), &holder.FakeHost{})
	if err := f.Save(fullState(a)); err != nil {
		t.Fatal(err)
	}
	s, err := f.Load()
	if err != nil {
		t.Fatal(err)
	}
	a.pods.Replace(s.Pods[:1])
	cfg := config(a)
	cfg.Saved = s.SVIDs
	h, err := holder.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	have(t, h, a, caller(s.Pods[0]))
	if held := h.Export(); len(held) != 1 {
		t.Errorf("the holder keeps %v, want web alone", held)
	}
}

func TestLoadRefuses(t *testing.T) {
	t.Parallel()
	a := newAuthority()
	good, err := holder.EncodeState(fullState(a))
	if err != nil {
		t.Fatal(err)
	}
	write := func(data []byte, mode fs.FileMode) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			if err := os.WriteFile(filepath.Join(dir, "state"), data, mode); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(filepath.Join(dir, "state"), mode); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, c := range []struct {
		name  string
		spoil func(t *testing.T, dir string)
		want  string
	}{
		{"nothing that was saved", func(*testing.T, string) {}, "no such file"},
		{"an empty file", write(nil, 0o600), "not a state file"},
		{"another kind of file", write([]byte("-----BEGIN PRIVATE KEY-----\n\n"), 0o600), "not a state file"},
		{"a newer version", write(rehash([]byte("signet-agent-state 3\nx\n{}\n")), 0o600), "newer format: version 3, and this program reads up to 2"},
		{"version 0", write(rehash([]byte("signet-agent-state 0\nx\n{}\n")), 0o600), "never was"},
		{"a version that is no number", write(rehash([]byte("signet-agent-state one\nx\n{}\n")), 0o600), "not a state file"},
		{"a file that others can read", write(good, 0o640), "run: chmod 0600"},
		{"a file that others can write", write(good, 0o602), "run: chmod 0600"},
		{"a folder", func(t *testing.T, dir string) { must(t, os.Mkdir(filepath.Join(dir, "state"), 0o700)) }, "not a regular file"},
		{"a pipe", func(t *testing.T, dir string) { must(t, unix.Mkfifo(filepath.Join(dir, "state"), 0o600)) }, "not a regular file"},
		{"a file that is too large", func(t *testing.T, dir string) {
			write(good, 0o600)(t, dir)
			must(t, os.Truncate(filepath.Join(dir, "state"), 64<<20+1))
		}, "at most 67108864 are allowed"},
		{"a link out of the folder", func(t *testing.T, dir string) {
			other := filepath.Join(dir, "..", "elsewhere")
			must(t, os.WriteFile(other, good, 0o600))
			must(t, os.Symlink(other, filepath.Join(dir, "state")))
		}, "state"},
		{"a folder that was opened to others", func(t *testing.T, dir string) {
			write(good, 0o600)(t, dir)
			must(t, os.Chmod(dir, 0o750))
		}, "run: chmod 0700"},
		{"an unknown field", write(rehash([]byte("signet-agent-state 1\nx\n{\"future\":1}\n")), 0o600), "unknown field"},
		{"more keys than SVIDs", write(rehash(append(bytes.Clone(good), 0)), 0o600), "more keys than SVIDs"},
		{"fewer keys than SVIDs", write(rehash(good[:len(good)-1]), 0o600), "is missing"},
		{"no end of the text", write(rehash([]byte("signet-agent-state 1\nx\n{}")), 0o600), "incomplete"},
		{"a negative length", write(rehash(bytes.Replace(good, []byte(`"keySize":138`), []byte(`"keySize":-1 `), 1)), 0o600), "is missing"},
		{"an SVID of another name", write(rehash(bytes.Replace(good, []byte("sa/api"), []byte("sa/apx"), 1)), 0o600), "is for spiffe://cluster.local/ns/default/sa/api"},
		{"an agent that is none", write(rehash(bytes.Replace(good, []byte("/signet/agent/node-a"), []byte("/ns/default/sa/admin"), 1)), 0o600), "is for"},
		{"trust of another domain", write(rehash(bytes.Replace(good, []byte(`"trustDomain":"cluster.local"`), []byte(`"trustDomain":"cluster.other"`), 1)), 0o600), "trust is of trust domain cluster.other"},
		{"trust without a root", write(rehash([]byte("signet-agent-state 1\nx\n{\"trust\":{\"trustDomain\":\"a.b\"}}\n")), 0o600), "is empty"},
		{"keys in another order", write(rehash(swapLastKeys(good)), 0o600), "another key"},
		{"a key that is none", write(rehash(append(bytes.Clone(good[:len(good)-keySize]), make([]byte, keySize)...)), 0o600), "cannot be parsed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := stateDir(t)
			f := openOn(t, dir, &holder.FakeHost{})
			c.spoil(t, dir)
			s, err := f.Load()
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Load = %v, want an error with %q", err, c.want)
			}
			if s.Saved != (time.Time{}) || s.SVIDs != nil || s.Agent != nil {
				t.Errorf("Load returned an error and a state: %v", s)
			}
			if errors.Is(err, holder.ErrNewerState) != (c.name == "a newer version") {
				t.Errorf("ErrNewerState: %v", err)
			}
		})
	}
}

// rehash makes the hash of a changed state right again, so that a test reaches
// what lies behind it.
func rehash(data []byte) []byte {
	first, rest, _ := bytes.Cut(data, []byte("\n"))
	_, body, _ := bytes.Cut(rest, []byte("\n"))
	sum := sha256.Sum256(append(append(bytes.Clone(first), '\n'), body...))
	return bytes.Join([][]byte{first, []byte(hex.EncodeToString(sum[:])), body}, []byte("\n"))
}

func swapLastKeys(data []byte) []byte {
	end := len(data)
	head, one, two := data[:end-2*keySize], data[end-2*keySize:end-keySize], data[end-keySize:]
	return bytes.Join([][]byte{head, two, one}, nil)
}

// Every byte changed, every prefix: an error, never a panic, never another state.
func TestMangledState(t *testing.T) {
	t.Parallel()
	a := newAuthority()
	small := fullState(a)
	small.Agent, small.SVIDs = nil, small.SVIDs[:1]
	good, err := holder.EncodeState(small)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := holder.DecodeState(good, time.Now()); err != nil {
		t.Fatal(err)
	}
	for i := range good {
		for _, bit := range []byte{1, 0x20, 0x80} {
			bad := bytes.Clone(good)
			bad[i] ^= bit
			if s, err := holder.DecodeState(bad, time.Now()); err == nil {
				t.Fatalf("byte %d changed by %#x is a state: %v", i, bit, s)
			}
		}
		if s, err := holder.DecodeState(good[:i], time.Now()); err == nil {
			t.Fatalf("the first %d bytes are a state: %v", i, s)
		}
	}
	// Behind the hash nothing panics either, and a changed private key is noticed.
	for i := range good {
		key := i - (len(good) - keySize)
		if key < 0 && i%3 != 0 {
			continue // every third byte of the text is as good
		}
		bad := bytes.Clone(good)
		bad[i] ^= 0x01
		if s, err := holder.DecodeState(rehash(bad), time.Now()); err == nil && key >= 36 && key < 68 {
			t.Fatalf("a private key with byte %d changed is a state: %v", key, s)
		}
	}
}

// keySize is the size of a P-256 key as PKCS #8; bytes 36 to 67 of it are the
// private key.
const keySize = 138

// The seeds hold a state with throw-away keys whose SVID expires in 2036.
func FuzzDecodeState(f *testing.F) {
	now := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	f.Add([]byte("signet-agent-state 1\nx\n{}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		// With a right hash, or nothing behind it would be reached.
		for _, d := range [][]byte{data, rehash(data)} {
			s, err := holder.DecodeState(d, now)
			if err != nil {
				continue
			}
			again, err := holder.EncodeState(s)
			if err != nil {
				t.Fatalf("a state that was loaded cannot be saved: %v", err)
			}
			got, err := holder.DecodeState(again, now)
			if err != nil {
				t.Fatalf("a state that was saved cannot be loaded: %v", err)
			}
			if want, got := fmt.Sprint(plain(s)), fmt.Sprint(plain(got)); want != got {
				t.Fatalf("state differs after a round trip:\n%s\n%s", want, got)
			}
		}
	})
}

func TestFuzzSeedIsAState(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("testdata/fuzz/FuzzDecodeState/state")
	must(t, err)
	_, quoted, _ := strings.Cut(strings.TrimSuffix(string(text), ")\n"), "[]byte(")
	data, err := strconv.Unquote(quoted)
	must(t, err)
	s, err := holder.DecodeState([]byte(data), time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC))
	if err != nil || len(s.SVIDs) != 1 || len(s.Pods) != 1 || s.Trust == nil {
		t.Errorf("the seed is %v, %v", s, err)
	}
}

func TestSaveThatFailsKeepsTheOldState(t *testing.T) {
	t.Parallel()
	a := newAuthority()
	boom := errors.New("no space left on device")
	for _, step := range []string{"create", "write", "sync", "close", "rename"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			dir := stateDir(t)
			failing := ""
			f := openOn(t, dir, &holder.FakeHost{Fault: func(s string) error {
				if s == failing {
					return boom
				}
				return nil
			}})
			old := fullState(a)
			must(t, f.Save(old))
			failing = step
			next := fullState(a)
			if err := f.Save(next); !errors.Is(err, boom) {
				t.Fatalf("Save = %v, want the fault", err)
			}
			got, err := f.Load()
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(plain(old), plain(got)); d != "" {
				t.Errorf("the old state is not there (-want +got):\n%s", d)
			}
			if names := list(t, dir); len(names) != 1 {
				t.Errorf("a failed Save left %v", names)
			}
			failing = ""
			must(t, f.Save(next))
			if got, err := f.Load(); err != nil || cmp.Diff(plain(next), plain(got)) != "" {
				t.Errorf("after the fault was mended Save does not save (%v)", err)
			}
		})
	}
	t.Run("no key", func(t *testing.T) {
		t.Parallel()
		f := openOn(t, stateDir(t), &holder.FakeHost{})
		old := fullState(a)
		must(t, f.Save(old))
		for _, bad := range []holder.State{
			{SVIDs: []holder.Held{{}}},
			{Agent: &x509svid.SVID{ID: old.Agent.ID}},
			{Extra: map[string][]byte{"large": make([]byte, 64<<20)}},
		} {
			if err := f.Save(bad); err == nil {
				t.Error("Save of a state that cannot be saved succeeded")
			}
		}
		if got, err := f.Load(); err != nil || cmp.Diff(plain(old), plain(got)) != "" {
			t.Errorf("the old state is not there (%v)", err)
		}
	})
}

// A crash in the middle of Save leaves a piece with keys: it is never read, and
// goes at the next start.
func TestPieceOfACrashIsRemoved(t *testing.T) {
	t.Parallel()
	a := newAuthority()
	dir := stateDir(t)
	f := openOn(t, dir, &holder.FakeHost{})
	want := fullState(a)
	must(t, f.Save(want))
	must(t, os.WriteFile(filepath.Join(dir, "state.new"), []byte("half of a sta"), 0o600))
	must(t, f.Close())
	f = openOn(t, dir, &holder.FakeHost{})
	if names := list(t, dir); len(names) != 1 {
		t.Errorf("after the start there is %v", names)
	}
	if got, err := f.Load(); err != nil || cmp.Diff(plain(want), plain(got)) != "" {
		t.Errorf("the state is not there (%v)", err)
	}
	// A link in its place is replaced, not followed.
	other := filepath.Join(dir, "..", "other")
	must(t, os.Symlink(other, filepath.Join(dir, "state.new")))
	must(t, f.Save(want))
	if _, err := os.Lstat(other); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Save followed a link (%v)", err)
	}
}

func TestSavesAndLoadsAtOnce(t *testing.T) {
	t.Parallel()
	a := newAuthority()
	f := openOn(t, stateDir(t), &holder.FakeHost{})
	s := fullState(a)
	must(t, f.Save(s))
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			for range 8 {
				if err := f.Save(s); err != nil {
					t.Error(err)
				}
			}
		})
		wg.Go(func() {
			for range 8 {
				if got, err := f.Load(); err != nil || len(got.SVIDs) != 2 {
					t.Errorf("Load = %v, %v", got, err)
				}
			}
		})
	}
	wg.Wait()
}

func TestOpenStateFile(t *testing.T) {
	t.Parallel()
	files := t.TempDir()
	file := func(name, text string) string {
		p := filepath.Join(files, name)
		must(t, os.WriteFile(p, []byte(text), 0o600))
		return p
	}
	const heading = "Filename\tType\tSize\tUsed\tPriority\n"
	on := file("swap-on", heading+"/dev/sda2 partition 8388604 0 -2\n")
	off := file("swap-off", heading)
	// The folder's device number is that of the test's own disk.
	info, err := os.Stat(files)
	must(t, err)
	device := deviceOf(info)
	plainMount := file("plain", "25 30 "+device+" / /run rw,nosuid - tmpfs tmpfs rw,size=64k\n")
	noswapMount := file("noswap", "24 30 0:999 / /x rw - tmpfs tmpfs rw\n25 30 "+device+" / /run rw,nosuid shared:3 - tmpfs tmpfs rw,size=64k,noswap\n")
	fake := file("fake", "25 30 "+device+" / /noswap rw,noswap - tmpfs noswap rw,size=64k\n")
	other := file("other", "25 30 0:999 / /run rw - tmpfs tmpfs rw,noswap\n")
	missing := filepath.Join(files, "missing")

	const ok = ""
	for _, c := range []struct {
		name    string
		host    holder.FakeHost
		opt     holder.StateOptions
		prepare func(t *testing.T, dir string) string // the path to open
		want    string                                // of the error
		noState bool                                  // the error is ErrNoState
	}{
		{name: "takes a tmpfs where there is no swap", host: holder.FakeHost{Swaps: off}, want: ok},
		{name: "takes a tmpfs where the kernel knows no swap", want: ok},
		{name: "takes a ramfs wherever", host: holder.FakeHost{Magic: unix.RAMFS_MAGIC, Swaps: on, Mountinfo: plainMount}, want: ok},
		{name: "takes a tmpfs with noswap", host: holder.FakeHost{Swaps: on, Mountinfo: noswapMount}, want: ok},
		{name: "takes a tmpfs that swaps if told", host: holder.FakeHost{Swaps: on, Mountinfo: plainMount}, opt: holder.StateOptions{AllowSwap: true}, want: ok},
		{name: "takes a mount that it does not know if told", host: holder.FakeHost{Swaps: on, Mountinfo: missing}, opt: holder.StateOptions{AllowSwap: true}, want: ok},
		{name: "refuses a tmpfs that swaps", host: holder.FakeHost{Swaps: on, Mountinfo: plainMount}, want: "mount -t tmpfs -o noswap", noState: true},
		{name: "looks for noswap in the right place", host: holder.FakeHost{Swaps: on, Mountinfo: fake}, want: "this machine has swap", noState: true},
		{name: "refuses a mount that it does not know", host: holder.FakeHost{Swaps: on, Mountinfo: other}, want: "no mount of device", noState: true},
		{name: "refuses without a list of mounts", host: holder.FakeHost{Swaps: on, Mountinfo: missing}, want: "is unknown", noState: true},
		{name: "refuses without /proc", host: holder.FakeHost{Swaps: missing, Mountinfo: missing}, want: "whether this machine swaps is unknown", noState: true},
		{name: "refuses a list of swap that is unreadable", host: holder.FakeHost{Swaps: files}, want: "whether this machine swaps is unknown", noState: true},
		{name: "refuses a disk", host: holder.FakeHost{Magic: unix.EXT4_SUPER_MAGIC}, want: "not on a tmpfs (file system type 0xef53)", noState: true},
		{name: "refuses a disk even where swap is allowed", host: holder.FakeHost{Magic: unix.EXT4_SUPER_MAGIC}, opt: holder.StateOptions{AllowSwap: true}, want: "not on a tmpfs", noState: true},
		{name: "refuses a file system that it does not know", host: holder.FakeHost{MagicErr: errors.New("boom")}, want: "is unknown: boom", noState: true},
		{name: "refuses another user's folder", host: holder.FakeHost{UID: 1}, want: "belongs to user"},
		{name: "refuses a folder open to the group", prepare: func(t *testing.T, dir string) string { must(t, os.Chmod(dir, 0o710)); return dir }, want: "run: chmod 0700"},
		{name: "refuses a folder open to others", prepare: func(t *testing.T, dir string) string { must(t, os.Chmod(dir, 0o701)); return dir }, want: "run: chmod 0700"},
		{name: "makes the folder", prepare: func(t *testing.T, dir string) string { must(t, os.Remove(dir)); return dir }, want: ok},
		{name: "makes no parents", prepare: func(_ *testing.T, dir string) string { return dir + "/a/b" }, want: "no such file"},
		{name: "refuses a file", prepare: func(t *testing.T, dir string) string {
			must(t, os.WriteFile(dir+"/f", nil, 0o600))
			return dir + "/f"
		}, want: "not a folder"},
		{name: "refuses a link to a folder", prepare: func(t *testing.T, dir string) string {
			must(t, os.Symlink(dir, dir+"-link"))
			return dir + "-link"
		}, want: "not a folder"},
		{name: "refuses a relative path", prepare: func(*testing.T, string) string { return "state" }, want: "must be an absolute path"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := stateDir(t)
			if c.prepare != nil {
				dir = c.prepare(t, dir)
			}
			var log strings.Builder
			c.opt.Log = slog.New(slog.NewTextHandler(&log, nil))
			f, err := holder.OpenStateFileOn(dir, c.opt, &c.host)
			if c.want == ok {
				must(t, err)
				must(t, f.Save(holder.State{}))
				if _, err := f.Load(); err != nil {
					t.Error(err)
				}
				must(t, f.Close())
				if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
					t.Errorf("the folder has mode %v (%v)", info.Mode(), err)
				}
				if warned := strings.Contains(log.String(), "swapped out"); warned != c.opt.AllowSwap {
					t.Errorf("a warning of swap: %v", warned)
				}
				return
			}
			if err == nil || f != nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("OpenStateFile = %v, %v, want an error with %q", f, err, c.want)
			}
			if errors.Is(err, holder.ErrNoState) != c.noState {
				t.Errorf("ErrNoState is %v: %v", !c.noState, err)
			}
		})
	}
}

func TestStateIsNotBelowAPublicFolder(t *testing.T) {
	t.Parallel()
	top := t.TempDir()
	public := filepath.Join(top, "public")
	must(t, os.Mkdir(public, 0o755))
	must(t, os.Symlink(public, filepath.Join(top, "alias")))
	must(t, os.Mkdir(filepath.Join(public, "deep"), 0o755))
	for _, c := range []struct {
		name, dir, public string
		refused           bool
	}{
		{"the folder itself", "public/.", public, true},
		{"a folder in it", "public/state", public, true},
		{"a folder deep in it", "public/deep/state", public, true},
		{"a folder in it by another name", "alias/state", public, true},
		{"a folder in it whose name is an alias", "public/state", filepath.Join(top, "alias"), true},
		{"the folder that is still to be made", "later", filepath.Join(top, "later"), true},
		{"a folder beside it", "state", public, false},
		{"a folder beside it with a name that begins alike", "public-state", public, false},
		{"a folder where the public one is still to be made", "later-state", filepath.Join(top, "later"), false},
		{"a folder above it", ".", public, false},
	} {
		dir := filepath.Join(top, c.dir)
		if c.dir == "." || c.dir == "public/." {
			must(t, os.Chmod(dir, 0o700))
		}
		f, err := holder.OpenStateFileOn(dir, holder.StateOptions{NotBelow: []string{c.public}}, &holder.FakeHost{})
		if refused := err != nil && strings.Contains(err.Error(), "which others can read"); refused != c.refused {
			t.Errorf("%s: %v", c.name, err)
		}
		if f != nil {
			must(t, f.Close())
		} else if _, err := os.Lstat(filepath.Join(public, "state")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: the refused folder was left there (%v)", c.name, err)
		}
	}
}

// TestAStateFolderIsForOneProcess: a successor waits for whoever has the folder, and
// touches nothing of it before: what looks like the rest of a crash may be a Save.
func TestAStateFolderIsForOneProcess(t *testing.T) {
	t.Parallel()
	dir := stateDir(t)
	first, err := holder.OpenStateFileOn(dir, holder.StateOptions{}, &holder.FakeHost{})
	must(t, err)
	under := filepath.Join(dir, "state.new")
	must(t, os.WriteFile(under, []byte("half"), 0o600))
	for _, wait := range []time.Duration{0, 50 * time.Millisecond} {
		f, err := holder.OpenStateFileOn(dir, holder.StateOptions{Wait: wait}, &holder.FakeHost{})
		if !errors.Is(err, holder.ErrStateInUse) || errors.Is(err, holder.ErrNoState) || f != nil {
			t.Errorf("opened twice: %v, %v", f, err)
		}
	}
	if _, err := os.Lstat(under); err != nil {
		t.Errorf("what the other is writing: %v", err)
	}
	time.AfterFunc(50*time.Millisecond, func() { _ = first.Close() })
	again, err := holder.OpenStateFileOn(dir, holder.StateOptions{Wait: time.Minute}, &holder.FakeHost{})
	if err != nil {
		t.Fatalf("a predecessor that leaves is waited for: %v", err)
	}
	must(t, again.Close())
}

func TestSwapThatIsTurnedOnEndsTheState(t *testing.T) {
	t.Parallel()
	a := newAuthority()
	dir := stateDir(t)
	swaps := filepath.Join(t.TempDir(), "swaps")
	const heading = "Filename Type Size Used Priority\n"
	must(t, os.WriteFile(swaps, []byte(heading), 0o600))
	f := openOn(t, dir, &holder.FakeHost{Swaps: swaps})
	must(t, f.Save(fullState(a)))
	// What cannot be known for a moment removes nothing.
	f.SetSwaps(dir)
	if err := f.Save(fullState(a)); !errors.Is(err, holder.ErrNoState) || errors.Is(err, holder.ErrStateRemoved) || len(list(t, dir)) != 1 {
		t.Errorf("Save = %v, and there is %v", err, list(t, dir))
	}
	f.SetSwaps(swaps)
	must(t, os.WriteFile(swaps, []byte(heading+"/swapfile file 1024 0 -2\n"), 0o600))
	err := f.Save(fullState(a))
	// The mount is found, it is the test's disk, and has no such option.
	if !errors.Is(err, holder.ErrNoState) || !errors.Is(err, holder.ErrStateRemoved) {
		t.Errorf("Save = %v", err)
	}
	if names := list(t, dir); len(names) != 0 {
		t.Errorf("keys that may be swapped out stayed: %v", names)
	}
}

func FuzzNoswap(f *testing.F) {
	f.Add("36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - tmpfs tmpfs rw,noswap\n", "98:0")
	f.Add("36 35 98:0 - - -", "98:0")
	f.Fuzz(func(t *testing.T, text, device string) {
		yes, err := holder.Noswap(strings.NewReader(text), device)
		if yes && (err != nil || !strings.Contains(text, "noswap") || !strings.Contains(text, device)) {
			t.Errorf("noswap of %q in %q", device, text)
		}
		if _, err := holder.AnySwap(strings.NewReader(text)); err != nil && len(text) < 1000 {
			t.Errorf("anySwap of %q: %v", text, err)
		}
	})
}

// What the agent does with it: save after each change, serve from it after a
// restart while the authority is away.
func TestRestartWhileTheAuthorityIsAway(t *testing.T) {
	t.Parallel()
	a := newAuthority()
	w := pod("web", "web-1")
	a.pods.Set(w)
	dir := stateDir(t)
	before := openOn(t, dir, &holder.FakeHost{})
	h, err := holder.New(config(a))
	must(t, err)
	stop := run(t, h)
	news := h.Changed()
	ask(t, h, caller(w))
	<-news
	pods, _ := a.pods.OnNode("node-a")
	must(t, before.Save(holder.State{Trust: a.trust, Pods: pods, SVIDs: h.Export()}))
	served := have(t, h, a, caller(w))
	stop()
	must(t, before.Close())

	a.set(func() { a.before = func(context.Context, []identity.Request) error { return errDown } })
	s, err := openOn(t, dir, &holder.FakeHost{}).Load()
	must(t, err)
	view := &identity.Pods{}
	view.Replace(s.Pods)
	cfg := config(a)
	cfg.Pods, cfg.Saved, cfg.Trust = view, s.SVIDs, func() *identity.Trust { return s.Trust }
	h, err = holder.New(cfg)
	must(t, err)
	run(t, h)
	if got := have(t, h, a, caller(w)); !bytes.Equal(got.Certificates[0].Raw, served.Certificates[0].Raw) {
		t.Error("after the restart another SVID is served")
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func list(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// deviceOf is the device of a file as /proc/self/mountinfo writes it.
func deviceOf(info fs.FileInfo) string {
	dev := info.Sys().(*syscall.Stat_t).Dev
	return fmt.Sprintf("%d:%d", unix.Major(dev), unix.Minor(dev))
}
