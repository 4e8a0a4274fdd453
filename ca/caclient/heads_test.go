package caclient_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/caclient"
	"github.com/signet-mesh/signet/identity"
)

// TestAnAgentRemembersHeadsOverItsRestart: the authority's log is replaced by an
// older copy while both are down, and the agent that comes back gives it away.
func TestAnAgentRemembersHeadsOverItsRestart(t *testing.T) {
	a := newAuthority(t, func(c *ca.Config) { c.HeadInterval = 20 * time.Millisecond })
	a.stop()
	logDir := filepath.Join(a.cfg.DataDir, "authority", "log")
	older := readFiles(t, logDir)
	a.start()
	cfg := a.config()
	c, end := run(t, cfg)
	ready(t, c)
	req, _ := request(t)
	req.PodUID = server.PodUID
	if rs, err := c.Issue(t.Context(), []identity.Request{req}); err != nil || rs[0].Err != nil {
		t.Fatal(rs, err)
	}
	// The head over everything until now must have come.
	last := uint64(0)
	for _, err := range a.Issuances(t.Context(), time.Time{}) {
		if err != nil {
			t.Fatal(err)
		}
		last++
	}
	var saved []byte
	eventually(t, "a head over the last record", func() bool {
		saved, _ = c.LogHeads()
		return caclient.HighestHead(saved) >= last
	})
	end()
	a.stop()
	for name := range readFiles(t, logDir) {
		if err := os.Remove(filepath.Join(logDir, name)); err != nil {
			t.Fatal(err)
		}
	}
	for name, b := range older {
		write(t, filepath.Join(logDir, name), b)
	}
	a.start()
	if err := a.Ready(); err != nil {
		t.Fatalf("nobody has told yet: %v", err)
	}
	cfg.SavedLogHeads = saved
	c, _ = run(t, cfg)
	eventually(t, "the alarm", func() bool { return errors.Is(a.Ready(), ca.ErrLogLoss) })
	if again, _ := c.LogHeads(); len(again) < len(saved) {
		t.Error("the head was forgotten")
	}
}

// TestSavedHeadsThatCannotBeRead are left out; the agent goes on.
func TestSavedHeadsThatCannotBeRead(t *testing.T) {
	a := newAuthority(t)
	for _, b := range [][]byte{{2}, {1, 0xff}, []byte("garbage"), {1}} {
		cfg := a.config()
		cfg.SavedLogHeads = b
		c, err := caclient.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if saved, _ := c.LogHeads(); saved != nil {
			t.Errorf("%x is read as %x", b, saved)
		}
	}
}

func readFiles(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]byte{}
	for _, e := range entries {
		if out[e.Name()], err = os.ReadFile(filepath.Join(dir, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
	return out
}
