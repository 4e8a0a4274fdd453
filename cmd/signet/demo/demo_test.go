package demo_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/cmd/signet/demo"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest/devissuer"
)

// The whole of it runs in package integration, with the real programs.

func execute(t *testing.T, args ...string) error {
	t.Helper()
	c := demo.Command()
	var out bytes.Buffer
	c.SetOut(&out)
	c.SetErr(&out)
	c.SilenceUsage, c.SilenceErrors = true, true
	c.SetArgs(args)
	return c.ExecuteContext(t.Context())
}

func TestFlagsThatMakeNoSenseAreRefused(t *testing.T) {
	t.Parallel()
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "mine"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args string
		want string
	}{
		{"--break nonsense", "the rows are identity, mtls,"},
		{"--break=", `there is no row ""`},
		{"--only mtls,nonsense", `--only: there is no row "nonsense"`},
		{"--break mtls --only edit", "leaves this row out"},
		{"--output yaml", "must be table or json"},
		{"--dir /nonexistent", "--dir goes with --keep"},
		{"--keep --break mtls", "--keep and --break contradict"},
		{"--keep --only mtls", "--keep and --only contradict"},
		{"--keep --output json", "--keep and --output contradict"},
		{"something", "unknown command"},
	} {
		if err := execute(t, strings.Fields(c.args)...); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want one that says %q", c.args, err, c.want)
		}
	}
}

func TestAFolderThatWillNotDoIsRefusedAndLeftAlone(t *testing.T) {
	// The programs are looked up first.
	bin := t.TempDir()
	for _, name := range []string{"signet-ca", "signet-agent"} {
		writeProgram(t, filepath.Join(bin, name), "exit 1")
	}
	envoy := filepath.Join(bin, "envoy")
	writeProgram(t, envoy, "echo 'envoy  version: 0/1.40.0/Clean/RELEASE/BoringSSL'")
	t.Setenv("PATH", bin+":/bin:/usr/bin")
	t.Setenv("ENVOY", envoy)

	full := t.TempDir()
	mine := filepath.Join(full, "mine")
	if err := os.WriteFile(mine, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := execute(t, "--keep", "--dir", full); err == nil || !strings.Contains(err.Error(), "is not empty (it holds mine)") {
		t.Errorf("error %v, want that the folder is not empty", err)
	}
	if b, err := os.ReadFile(mine); err != nil || string(b) != "precious" {
		t.Errorf("the file in it is now %q, %v", b, err)
	}
	if err := execute(t, "--keep", "--dir", mine); err == nil {
		t.Error("a file is taken for a folder")
	}
	long := filepath.Join(t.TempDir(), strings.Repeat("x", 90))
	if err := execute(t, "--keep", "--dir", long); err == nil || !strings.Contains(err.Error(), "choose a shorter one") {
		t.Errorf("error %v, want that the path is too long", err)
	}
	t.Setenv("TMPDIR", filepath.Dir(long))
	if err := os.Mkdir(long, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", long)
	if err := execute(t); err == nil || !strings.Contains(err.Error(), "TMPDIR") {
		t.Errorf("error %v, want one about TMPDIR", err)
	}
	if entries, err := os.ReadDir(long); err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func writeProgram(t *testing.T, path, script string) {
	t.Helper()
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
}

func TestProgramsAreFoundOrTheErrorSaysWhatToDo(t *testing.T) {
	cache, bin, beside := t.TempDir(), t.TempDir(), t.TempDir()
	t.Setenv("XDG_CACHE_HOME", cache)
	t.Setenv("PATH", bin+":/bin:/usr/bin")
	t.Setenv("ENVOY", "")

	if _, err := demo.FindProgram(beside, "signet-ca"); err == nil || !strings.Contains(err.Error(), "make build") {
		t.Errorf("error %v, want what to do", err)
	}
	writeProgram(t, filepath.Join(bin, "signet-ca"), "")
	if got, err := demo.FindProgram(beside, "signet-ca"); err != nil || got != filepath.Join(bin, "signet-ca") {
		t.Errorf("on PATH: %s, %v", got, err)
	}
	writeProgram(t, filepath.Join(beside, "signet-ca"), "")
	if got, err := demo.FindProgram(beside, "signet-ca"); err != nil || got != filepath.Join(beside, "signet-ca") {
		t.Errorf("beside: %s, %v", got, err)
	}

	if _, err := demo.FindEnvoy(t.Context()); err == nil || !strings.Contains(err.Error(), "make tools") {
		t.Errorf("error %v, want what to do", err)
	}
	says := func(version string) string {
		return "echo; echo \"$0  version: 0123abc/" + version + "/Clean/RELEASE/BoringSSL\""
	}
	cached := filepath.Join(cache, "signet", "tools", "envoy-1.40.0", "envoy")
	if err := os.MkdirAll(filepath.Dir(cached), 0o755); err != nil {
		t.Fatal(err)
	}
	writeProgram(t, cached, says("1.40.0"))
	onPath := filepath.Join(bin, "envoy")
	writeProgram(t, onPath, says("1.4.7"))
	if got, err := demo.FindEnvoy(t.Context()); err != nil || got != cached {
		t.Errorf("with another version on PATH: %s, %v; want the one in the cache", got, err)
	}
	writeProgram(t, onPath, says("1.40.7"))
	if got, err := demo.FindEnvoy(t.Context()); err != nil || got != onPath {
		t.Errorf("with the version on PATH: %s, %v", got, err)
	}
	mine := filepath.Join(t.TempDir(), "envoy")
	writeProgram(t, mine, says("1.41.0-dev"))
	t.Setenv("ENVOY", mine)
	if got, err := demo.FindEnvoy(t.Context()); err != nil || got != mine {
		t.Errorf("with $ENVOY: %s, %v", got, err)
	}
	writeProgram(t, mine, "echo hello")
	if _, err := demo.FindEnvoy(t.Context()); err == nil || !strings.Contains(err.Error(), "$ENVOY") {
		t.Errorf("with $ENVOY that is no Envoy: %v", err)
	}
}

func TestEachRowCanBeSabotaged(t *testing.T) {
	t.Parallel()
	names := demo.RowNames()
	for row, sabotage := range demo.Sabotages() {
		if sabotage == "" {
			t.Errorf("row %s has no sabotage", row)
		}
		if !strings.Contains(demo.Command().Long, sabotage) {
			t.Errorf("the help does not say what --break %s does", row)
		}
	}
	if slices.Sort(names); len(slices.Compact(names)) != len(demo.RowNames()) {
		t.Errorf("a name is there twice: %v", names)
	}
}

func sample() demo.Outcome {
	return demo.Outcome{Seconds: 1.5, Rows: []demo.Result{
		{Row: "identity", Claim: "proxies get SVIDs", Outcome: demo.Held, Seconds: 0.24, Observed: []string{"server: spiffe://a/b", "client: spiffe://a/c"}},
		{Row: "strict", Claim: "plaintext is refused", Outcome: demo.Failed, Seconds: 5, Sabotaged: true, Observed: []string{}, Problem: "status 200\nand more"},
		{Row: "edit", Claim: "at once", Outcome: demo.NotRun, Observed: []string{}, Problem: "interrupted"},
	}}
}

func TestTable(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	if err := sample().PrintTable(&b); err != nil {
		t.Fatal(err)
	}
	want := `ROW       OUTCOME  TOOK   CLAIM, AND WHAT WAS OBSERVED
identity  held     0.2 s  proxies get SVIDs
                            server: spiffe://a/b
                            client: spiffe://a/c
strict    FAILED   5.0 s  plaintext is refused (sabotaged)
                            ! status 200
                            ! and more
edit      not run  -      at once
                            ! interrupted
`
	if b.String() != want {
		t.Errorf("the table is\n%s\nwant\n%s", &b, want)
	}
}

func TestJSON(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	if err := sample().PrintJSON(&b); err != nil {
		t.Fatal(err)
	}
	var got struct {
		Held *bool
		Rows []struct {
			Row, Outcome, Problem string
			Sabotaged             bool
			Observed              []string
		}
	}
	d := json.NewDecoder(&b)
	if err := d.Decode(&got); err != nil {
		t.Fatal(err)
	}
	if got.Held == nil || *got.Held || len(got.Rows) != 3 || !got.Rows[1].Sabotaged || got.Rows[1].Outcome != "FAILED" || got.Rows[2].Observed == nil {
		t.Errorf("%+v", got)
	}
}

func TestTokensAreReplacedInTime(t *testing.T) {
	t.Parallel()
	issuer, err := devissuer.New(devissuer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		files, project, run := demo.Kubelet(dir, issuer)
		for _, f := range files {
			if err := os.Mkdir(filepath.Dir(f), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		if err := project(); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- run(ctx) }()
		seen := map[string]map[string]bool{}
		for range 60 {
			time.Sleep(time.Second)
			synctest.Wait()
			for _, f := range files {
				b, err := os.ReadFile(f)
				if err != nil {
					t.Fatal(err)
				}
				if left := time.Until(expiry(t, string(b))); left < demo.TokenTTL/5 {
					t.Fatalf("the token in %s has only %s left", f, left)
				}
				if seen[f] == nil {
					seen[f] = map[string]bool{}
				}
				seen[f][string(b)] = true
			}
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		for f, tokens := range seen {
			if len(tokens) != 5 { // at 0, 15, 30, 45 and 60 s
				t.Errorf("%d tokens were seen in %s in a minute, want 5", len(tokens), f)
			}
			if info, err := os.Stat(f); err != nil || info.Mode() != 0o600 {
				t.Errorf("%s has mode %v, %v", f, info.Mode(), err)
			}
		}
		left, err := filepath.Glob(filepath.Join(dir, ".new-*"))
		if err != nil || len(left) > 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
		// A folder that went away is told, not ignored.
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		if err := run(t.Context()); err == nil {
			t.Error("no error without the folder")
		}
	})
}

// expiry reads exp of a token.
func expiry(t *testing.T, token string) time.Time {
	t.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Fatalf("no token: %q", token)
	}
	var claims struct {
		Exp int64 `json:"exp"`
	}
	if err := json.Unmarshal(decodeBase64(t, parts[1]), &claims); err != nil {
		t.Fatal(err)
	}
	return time.Unix(claims.Exp, 0)
}

func TestAFileThatCannotBeReplacedStays(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	name := filepath.Join(dir, "folder", "file")
	if err := demo.ReplaceFile(dir, name, "content"); err == nil {
		t.Error("no error without the folder of the file")
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func TestPoliciesMeanWhatTheRowsLookAt(t *testing.T) {
	t.Parallel()
	td, err := identity.ParseTrustDomain("cluster.local")
	if err != nil {
		t.Fatal(err)
	}
	compile := func(files map[string]string) *authz.Program {
		t.Helper()
		var resources []authz.Resource
		for name, content := range files {
			rs, problems := authz.Parse(name, []byte(content))
			if len(problems) > 0 {
				t.Fatal(problems)
			}
			resources = append(resources, rs...)
		}
		set, problems := authz.Set{}.Update(resources)
		if len(problems) > 0 {
			t.Fatal(problems)
		}
		snapshot, problems := authz.Compile(set, authz.Options{TrustDomain: td})
		if len(problems) > 0 {
			t.Fatal(problems)
		}
		return snapshot.For(identity.Workload{Namespace: "default", ServiceAccount: "server", Labels: map[string]string{"app": "server"}})
	}
	const client, other = "spiffe://cluster.local/ns/default/sa/client", "spiffe://cluster.local/ns/default/sa/batch"
	base := demo.BasePolicies()
	with := func(file, content string) map[string]string {
		files := demo.BasePolicies()
		if _, ok := files[file]; !ok {
			t.Fatalf("there is no %s", file)
		}
		files[file] = content
		return files
	}
	for name, c := range map[string]struct {
		files  map[string]string
		peer   string
		method string
		path   string
		want   bool
	}{
		"the client may get hello":              {base, client, "GET", "/hello", true},
		"the client may get orders":             {base, client, "GET", "/orders", true},
		"the client may get reports":            {base, client, "GET", "/reports", true},
		"the client may not get admin":          {base, client, "GET", "/admin", false},
		"the client may not post":               {base, client, "POST", "/hello", false},
		"another may get hello":                 {base, other, "GET", "/hello", true},
		"another may not get orders":            {base, other, "GET", "/orders", false},
		"plaintext may get hello":               {base, "", "GET", "/hello", true},
		"plaintext may not get orders":          {base, "", "GET", "/orders", false},
		"under STRICT plaintext may not":        {with("mesh.yaml", demo.MeshPolicy("STRICT")), "", "GET", "/hello", false},
		"under STRICT the client may":           {with("mesh.yaml", demo.MeshPolicy("STRICT")), client, "GET", "/hello", true},
		"the edit closes reports":               {with("no-admin.yaml", demo.Closing("server", "/admin", "/reports")), client, "GET", "/reports", false},
		"an edit for another workload does not": {with("no-admin.yaml", demo.Closing("another", "/admin", "/reports")), client, "GET", "/reports", true},
	} {
		t.Run(name, func(t *testing.T) {
			req := authz.Request{HTTP: true, Method: []byte(c.method), Path: []byte(c.path), Host: []byte("server"), DestinationPort: 8443,
				Authenticated: c.peer != "", Principal: []byte(c.peer),
				Known: authz.FieldMethod | authz.FieldPath | authz.FieldHost | authz.FieldDestinationPort | authz.FieldPeer | authz.FieldPrincipal}
			if d := compile(c.files).Decide(&req); d.Allowed != c.want {
				t.Errorf("%s", d.Text())
			}
		})
	}
}

func TestXFCCValue(t *testing.T) {
	t.Parallel()
	const one = `By=spiffe://a/ns/b/sa/server;Hash=0123;Subject="";URI=spiffe://a/ns/b/sa/client`
	for _, c := range []struct{ header, key, want string }{
		{one, "URI", "spiffe://a/ns/b/sa/client"},
		{one, "uri", "spiffe://a/ns/b/sa/client"},
		{one, "By", "spiffe://a/ns/b/sa/server"},
		{one, "Hash", "0123"},
		{one, "Subject", ""},
		{one, "DNS", ""},
		{"", "URI", ""},
		{"URI=first,URI=second", "URI", "first"},
		{";;=;URI", "URI", ""},
	} {
		if got := demo.XFCCValue(c.header, c.key); got != c.want {
			t.Errorf("%s of %q is %q, want %q", c.key, c.header, got, c.want)
		}
	}
}

func TestPortsAreClaimedOnce(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for range 200 {
		own, addresses, err := demo.ClaimPorts(8)
		if err != nil {
			t.Fatal(err)
		}
		defer own.Close()
		for _, a := range append(addresses, own.Addr().String()) {
			if seen[a] {
				t.Fatalf("%s is claimed twice", a)
			}
			seen[a] = true
		}
		if len(addresses) != 8 {
			t.Fatalf("%d addresses, want 8", len(addresses))
		}
		// They are free for the daemons.
		l, err := net.Listen("tcp", addresses[7])
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
	}
}

func TestQuoteYAML(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"", "plain", `a "b" \c`, "with: colon #", "näh\n", "/tmp/" + strings.Repeat("long ", 100)} {
		q, err := demo.QuoteYAML(s)
		if err != nil || strings.Contains(q, "\n") {
			t.Errorf("%q becomes %q, %v", s, q, err)
		}
		var back struct{ V string }
		if err := yaml.Unmarshal([]byte("v: "+q+"\n"), &back); err != nil || back.V != s {
			t.Errorf("%q becomes %q, which is %q, %v", s, q, back.V, err)
		}
	}
}

func decodeBase64(t *testing.T, s string) []byte {
	t.Helper()
	b, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
