package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// runEval runs signet authz eval with the requests on standard input.
func runEval(t testing.TB, requests string, args ...string) (stdout, stderr string, code int, err error) {
	t.Helper()
	c := newAuthzCommand()
	var out, errs bytes.Buffer
	c.SetIn(strings.NewReader(requests))
	c.SetOut(&out)
	c.SetErr(&errs)
	c.SilenceUsage, c.SilenceErrors = true, true
	c.SetArgs(append([]string{"eval", "--check-requests", "-"}, args...))
	if err = c.Execute(); err != nil {
		code = 1
		var e interface{ ExitCode() int }
		if errors.As(err, &e) {
			code = e.ExitCode()
		}
	}
	return out.String(), errs.String(), code, err
}

// writeFiles writes a folder of policies.
func writeFiles(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func policyText(kind, namespace, name, spec string) string {
	return fmt.Sprintf("---\napiVersion: security.istio.io/v1\nkind: %s\nmetadata: {name: %s, namespace: %s}\nspec: %s\n", kind, name, namespace, spec)
}

// checkRequest is a CheckRequest as Envoy sends it; an empty principal is a
// plaintext peer.
func checkRequest(principal, method, path string) string {
	return fmt.Sprintf(`{"attributes":{"source":{"address":{"socketAddress":{"address":"10.0.0.9","portValue":4711}},"principal":%q},`+
		`"destination":{"address":{"socketAddress":{"address":"10.0.0.1","portValue":8080}}},`+
		`"request":{"http":{"method":%q,"path":%q,"host":"shop:8080","headers":{":method":%q,":path":%q,":authority":"shop:8080"}}}}}`,
		principal, method, path, method, path)
}

const (
	aliceID = "spiffe://cluster.local/ns/default/sa/alice"
	bobID   = "spiffe://cluster.local/ns/default/sa/bob"
)

func TestEvalPrintsALineForEachRequest(t *testing.T) {
	t.Parallel()
	dir := writeFiles(t, map[string]string{
		"allow.yaml": "# of the shop\n" + policyText("AuthorizationPolicy", "default", "shop", "{selector: {matchLabels: {app: shop}}, rules: [{from: [{source: {principals: [cluster.local/ns/default/sa/alice]}}]}]}") +
			policyText("AuthorizationPolicy", "default", "other", "{selector: {matchLabels: {app: other}}, action: DENY, rules: [{}]}") +
			policyText("AuthorizationPolicy", "elsewhere", "all", "{action: DENY, rules: [{}]}"),
		"deny.yml":   policyText("AuthorizationPolicy", "istio-system", "no-admin", "{action: DENY, rules: [{to: [{operation: {paths: [/admin*]}}]}]}"),
		"peer.yaml":  policyText("PeerAuthentication", "default", "strict", "{mtls: {mode: STRICT}}") + "---\napiVersion: v1\nkind: Service\nmetadata: {name: x}\n",
		".old.yaml":  "no: [yaml",
		"readme.txt": "no: [yaml",
	})
	requests := strings.Join([]string{
		checkRequest(aliceID, "GET", "/"), "", checkRequest(aliceID, "GET", "/admin?x"), checkRequest(bobID, "GET", "/"), checkRequest("", "GET", "/"), "{}",
	}, "\n")
	out, stderr, code, err := runEval(t, requests, "--policies", dir, "--namespace", "default", "--labels", "app=shop,version=v1")
	if err != nil || code != 0 {
		t.Fatalf("exit code %d: %v", code, err)
	}
	file := func(name string) string { return filepath.Join(dir, name) }
	want := `{"decision":"allow","kind":"AuthorizationPolicy","policy":"default/shop","rule":0,"reason":"allow-rule","text":"allowed by AuthorizationPolicy default/shop rule 0: principals \"cluster.local/ns/default/sa/alice\" (` + file("allow.yaml") + `:6)"}
{"decision":"deny","kind":"AuthorizationPolicy","policy":"istio-system/no-admin","rule":0,"reason":"deny-rule","text":"denied by AuthorizationPolicy istio-system/no-admin rule 0: paths \"/admin*\" (` + file("deny.yml") + `:5)"}
{"decision":"deny","kind":"AuthorizationPolicy","policy":"","rule":-1,"reason":"no-allow-rule","text":"denied: ALLOW policies select the workload and no rule of them matches"}
{"decision":"deny","kind":"PeerAuthentication","policy":"default/strict","rule":-1,"reason":"plaintext","text":"denied by PeerAuthentication default/strict: the port takes mutual TLS only and the peer has no certificate"}
{"decision":"deny","kind":"","policy":"","rule":-1,"reason":"check-request","text":"denied: it has no attributes"}
`
	if out != want {
		t.Errorf("got\n%swant\n%s", out, want)
	}
	if want := "info: " + file("peer.yaml") + `:7: "v1" "Service" is no policy, skipped` + "\n"; stderr != want {
		t.Errorf("standard error %q, want %q", stderr, want)
	}
}

func TestEvalReadsAFileAndTheFlagsOfTheMesh(t *testing.T) {
	t.Parallel()
	dir := writeFiles(t, map[string]string{
		"p.json":   `{"apiVersion":"security.istio.io/v1","kind":"AuthorizationPolicy","metadata":{"name":"p","namespace":"mesh"},"spec":{"rules":[{"from":[{"source":{"principals":["cluster.local/ns/default/sa/alice"]}}]}]}}`,
		"requests": checkRequest("spiffe://one.td/ns/default/sa/alice", "GET", "/") + "\n" + checkRequest("spiffe://three.td/ns/default/sa/alice", "GET", "/") + "\n" + checkRequest(aliceID, "GET", "/") + "\n",
	})
	out, _, code, err := runEval(t, "", "--policies", filepath.Join(dir, "p.json"), "--namespace", "any", "--root-namespace", "mesh", "--trust-domain", "one.td",
		"--trust-domain-alias", "two.td,three.td", "--trust-domain-alias", "four.td", "--check-requests", filepath.Join(dir, "requests"))
	if err != nil || code != 0 {
		t.Fatalf("exit code %d: %v", code, err)
	}
	var got []string
	for line := range strings.Lines(out) {
		var v verdict
		if err := json.Unmarshal([]byte(line), &v); err != nil {
			t.Fatal(err)
		}
		got = append(got, v.Decision)
	}
	if want := "allow allow deny"; strings.Join(got, " ") != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestEvalRefusesUnusableInput(t *testing.T) {
	t.Parallel()
	good := policyText("AuthorizationPolicy", "default", "good", "{rules: [{}]}")
	for name, c := range map[string]struct {
		policies string
		requests string
		args     []string
		want     string // in the error
		out      int    // lines that were decided before
	}{
		"a policy that admission refuses": {policies: good + policyText("AuthorizationPolicy", "other", "bad", "{rules: [{to: [{operation: {ports: [http]}}]}]}"),
			want: `p.yaml:10: AuthorizationPolicy other/bad: spec.rules[0].to[0].operation.ports[0]: "http" is not a port`},
		"a policy twice":               {policies: good + good, want: "exists 2 times: at "},
		"policies that are no YAML":    {policies: "a: [", want: "p.yaml:1: document cannot be read"},
		"a line that is no JSON":       {policies: good, requests: checkRequest(aliceID, "GET", "/") + "\nhello\n", want: "standard input:2: line is no CheckRequest", out: 1},
		"a field that there is not":    {policies: good, requests: `{"attributes":{"sauce":{}}}`, want: `unknown field "sauce"`},
		"a line that is too long":      {policies: good, requests: strings.Repeat("x", 5<<20), want: "standard input:1: reading requests"},
		"a file that is not there":     {args: []string{"--policies", "/does/not/exist"}, want: "reading the policies: stat /does/not/exist"},
		"requests that are not there":  {policies: good, args: []string{"--check-requests", "/does/not/exist"}, want: "opening the requests"},
		"no namespace":                 {policies: good, args: []string{"--namespace", ""}, want: "--namespace must not be empty"},
		"a label without a value":      {policies: good, args: []string{"--labels", "app"}, want: "app must be formatted as key=value"},
		"a label without a name":       {policies: good, args: []string{"--labels", "=x"}, want: "a label has no name"},
		"a trust domain that is none":  {policies: good, args: []string{"--trust-domain", "a b"}, want: "--trust-domain"},
		"an alias that is none":        {policies: good, args: []string{"--trust-domain-alias", "a,"}, want: "--trust-domain-alias"},
		"a flag that there is not":     {policies: good, args: []string{"--frobnicate"}, want: "unknown flag"},
		"a file that cannot be opened": {args: []string{"--policies", "dangling"}, want: "dangling.yaml: "},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := writeFiles(t, map[string]string{"p.yaml": c.policies})
			args := append([]string{"--policies", dir, "--namespace", "default"}, c.args...)
			if len(c.args) == 2 && c.args[1] == "dangling" {
				if err := os.Symlink("nowhere", filepath.Join(dir, "dangling.yaml")); err != nil {
					t.Fatal(err)
				}
				args = args[:4]
			}
			out, _, code, err := runEval(t, c.requests, args...)
			if code != exitUnusable || err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("exit code %d: %v", code, err)
			}
			if n := strings.Count(out, "\n"); n != c.out {
				t.Errorf("%d lines of output, want %d", n, c.out)
			}
		})
	}
}

func TestEvalKeepsGoingAsTheAgentWould(t *testing.T) {
	t.Parallel()
	dir := writeFiles(t, map[string]string{
		"p.yaml": policyText("AuthorizationPolicy", "default", "bad", "{selector: {matchLabels: {app: a}}, rules: [{to: [{operation: {ports: [http]}}]}]}"),
	})
	for app, want := range map[string]string{
		"a": `{"decision":"deny","kind":"AuthorizationPolicy","policy":"default/bad","rule":-1,"reason":"invalid",`,
		"c": `{"decision":"allow","kind":"","policy":"","rule":-1,"reason":"no-allow-policy",`,
	} {
		out, stderr, code, err := runEval(t, checkRequest(aliceID, "GET", "/"), "--policies", dir, "--namespace", "default", "--labels", "app="+app, "--keep-going")
		if code != 0 || !strings.HasPrefix(out, want) {
			t.Errorf("%s: exit code %d, %v: %s", app, code, err, out)
		}
		if strings.Count(stderr, "error: ") != 1 {
			t.Errorf("standard error %q", stderr)
		}
	}
}

// BenchmarkEval is 10,000 requests against 1,000 policies of 50 principals each.
func BenchmarkEval(b *testing.B) {
	var policies, requests strings.Builder
	for i := range 1000 {
		var principals strings.Builder
		for j := range 50 {
			fmt.Fprintf(&principals, "cluster.local/ns/default/sa/client-%d-%d, ", i, j)
		}
		policies.WriteString(policyText("AuthorizationPolicy", "default", fmt.Sprintf("p%d", i),
			"{rules: [{from: [{source: {principals: ["+principals.String()+"]}}]}]}"))
	}
	for i := range 10_000 {
		fmt.Fprintln(&requests, checkRequest(fmt.Sprintf("spiffe://cluster.local/ns/default/sa/client-%d-%d", i%1000, i%50), "GET", "/things"))
	}
	dir := writeFiles(b, map[string]string{"p.yaml": policies.String()})
	for b.Loop() {
		start, used := time.Now(), processorTime(b)
		if _, _, code, err := runEval(b, requests.String(), "--policies", dir, "--namespace", "default"); code != 0 {
			b.Fatal(err)
		}
		b.ReportMetric(time.Since(start).Seconds(), "s/run")
		b.ReportMetric((processorTime(b) - used).Seconds(), "cpu-s/run")
	}
}

// processorTime is what this process has used of the processors, which other
// processes of the machine do not lengthen.
func processorTime(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
