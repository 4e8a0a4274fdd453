package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// command runs a command of signet-ca.
func command(t testing.TB, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	err := execute(context.Background(), args, &out, &out)
	return out.String(), err
}

func TestStoreCommandsSayWhatIsWrong(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	exists := filepath.Join(dir, "exists")
	if err := os.WriteFile(exists, []byte("SIGNETBK garbage that is no backup"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		says string
	}{
		{[]string{"backup", "--data-dir", dir}, "out"},
		{[]string{"backup", "--data-dir", dir, "--out", exists}, "choose another name"},
		{[]string{"backup", "--data-dir", dir, "--out", filepath.Join(dir, "b")}, "is it running?"},
		{[]string{"backup", "--config", exists, "--out", filepath.Join(dir, "b")}, "reading configuration"},
		{[]string{"restore", "--data-dir", dir}, "from"},
		{[]string{"restore", "--data-dir", dir, "--from", exists, "--keys", dir}, "the backup cannot be used"},
		{[]string{"restore", "--data-dir", dir, "--from", filepath.Join(dir, "none"), "--keys", dir}, "no such file"},
		{[]string{"verify-store", "--data-dir", dir}, "no such file"},
		{[]string{"verify-store", "--backup", exists}, "the backup cannot be used"},
		{[]string{"verify-store", "--backup", filepath.Join(dir, "none")}, "no such file"},
		{[]string{"log", "list", "--data-dir", dir}, "no such file"},
		{[]string{"log", "verify", "--data-dir", filepath.Join(dir, "none")}, "no such file"},
		{[]string{"serve", "--accept-log-loss", "many"}, "accept-log-loss"},
	} {
		before := names(t, dir)
		if out, err := command(t, c.args...); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%v: %s%v, want %q", c.args, out, err, c.says)
		}
		if after := names(t, dir); after != before {
			t.Errorf("%v: left behind %s, there was %s", c.args, after, before)
		}
	}
}

func names(t testing.TB, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return strings.Join(out, " ")
}

// FuzzConfig: a configuration is refused or is what it prints.
func FuzzConfig(f *testing.F) {
	f.Add([]byte(withKeys(f)))
	f.Add([]byte(withKeys(f) + "svid: {ttl: 10m}\nissuanceLog: {retention: 0s}\nworkloads:\n- {namespace: a, serviceAccount: b, pod: c, podUID: d, node: e, labels: {f: g}}\n"))
	f.Add([]byte("a: &a [*a]\n"))
	f.Add([]byte("trustDomain: [\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		read := func(b []byte) (config, error) {
			path := filepath.Join(t.TempDir(), "ca.yaml")
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			return loadConfig(path)
		}
		c, err := read(b)
		if err != nil {
			return
		}
		var first, again bytes.Buffer
		if err := c.print(&first); err != nil {
			t.Fatal(err)
		}
		if c, err = read(first.Bytes()); err != nil {
			t.Fatalf("what is printed is refused: %v\n%s", err, first.String())
		}
		if err := c.print(&again); err != nil || again.String() != first.String() {
			t.Errorf("printed\n%s\nread and printed\n%s%v", first.String(), again.String(), err)
		}
		_, _ = c.authority() // refuses, and does not panic
	})
}
