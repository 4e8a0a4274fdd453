package main

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"

	"github.com/signet-mesh/signet/integration/envoytest"
)

var update = flag.Bool("update", false, "rewrite golden files")

// signet runs the command line and returns its standard output.
func signet(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	err := run(t.Context(), args, &out, io.Discard)
	return out.String(), err
}

func mustSignet(t *testing.T, args ...string) string {
	t.Helper()
	out, err := signet(t, args...)
	if err != nil {
		t.Fatalf("signet %q: %v", args, err)
	}
	return out
}

const serverID = "spiffe://cluster.local/ns/default/sa/server"

func TestBootstrapGolden(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		args []string
	}{
		{"default", []string{"envoy", "bootstrap"}},
		{"everything", []string{
			"envoy", "bootstrap", "--inbound", "[::]:8443", "--app", "app.internal:50051", "--app-protocol", "http2",
			"--outbound", "a=127.0.0.1:9001,[2001:db8::1]:8443," + serverID,
			"--outbound", "b=[::1]:9002,b.default.svc:8443," + serverID + ",spiffe://other.example/ns/x/sa/y",
			"--trust-domain-alias", "old.example", "--label", "app=server", "--label", `quote=a"b`, "--access-log", "--tls-minimum", "1.3",
		}},
		{"client", []string{
			"envoy", "bootstrap", "--no-inbound", "--admin", "", "--outbound-retries", "0",
			"--outbound", "server=127.0.0.1:9000,127.0.0.1:8443," + serverID,
		}},
		{"token-secret", []string{"envoy", "token-secret"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := mustSignet(t, tt.args...)
			golden := filepath.Join("testdata", "envoy-"+tt.name+".yaml")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("differs from %s (-want +got), go test -update rewrites it:\n%s", golden, diff)
			}
			if again := mustSignet(t, tt.args...); again != got {
				t.Error("a second run gives other bytes")
			}
			checkYAML(t, got)
		})
	}
}

// checkYAML fails the test unless s is YAML of good shape: parsable, without
// duplicate keys (the decoder refuses them), tabs or trailing spaces.
func checkYAML(t *testing.T, s string) map[string]any {
	t.Helper()
	var doc map[string]any
	if err := yaml.Unmarshal([]byte(s), &doc); err != nil {
		t.Fatalf("not YAML: %v\n%s", err, s)
	}
	for i, line := range strings.Split(s, "\n") {
		if strings.TrimRight(line, " \t") != line || strings.Contains(line, "\t") {
			t.Errorf("line %d has a tab or ends in spaces: %q", i+1, line)
		}
		if strings.Contains(line, "<no value>") {
			t.Errorf("line %d has a hole: %q", i+1, line)
		}
	}
	return doc
}

// TestEveryThreeFlagsTogetherAreAcceptedByEnvoy validates a set of command lines
// in which each combination of the values of any three flags appears.
func TestEveryThreeFlagsTogetherAreAcceptedByEnvoy(t *testing.T) {
	t.Parallel()
	envoytest.Path(t)
	out1 := []string{"--outbound", "a=127.0.0.1:9001,127.0.0.1:8443," + serverID}
	out2 := []string{"--outbound", "b=[::1]:9002,b.default.svc.:8443," + serverID + ",spiffe://other.example/x"}
	flags := [][][]string{
		{{}, {"--no-inbound"}, {"--inbound", "[::]:0"}},
		{{}, {"--app", "[::1]:80"}, {"--app", "app.internal:80", "--app-protocol", "http2"}},
		{{}, out1, append(out1[:2:2], out2...)},
		{{}, {"--tls-minimum", "1.3"}},
		{{}, {"--admin", ""}, {"--admin", "[::1]:0"}},
		{{}, {"--access-log"}},
		{{}, {"--label", "a=b", "--label", `c="d": {e: [`}},
		{{}, {"--outbound-retries", "0"}},
		{{}, {"--trust-domain-alias", "old.example", "--trust-domain-alias", "older.example"}},
		{{}, {"--trust-domain", "prod.example", "--socket", "/run/other/agent.sock", "--node-id", "a\u2028b", "--cluster", `"`}},
	}
	rows := covering(flags, func(row []int) bool {
		noInbound, app, outbound := row[0] == 1, row[1], row[2]
		return !noInbound || (app == 0 && outbound != 0)
	})
	t.Logf("%d configurations", len(rows))
	for i, row := range rows {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			token := filepath.Join(dir, "token")
			if err := os.WriteFile(token, []byte("token"), 0o600); err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(dir, "envoy.yaml")
			args := []string{"envoy", "bootstrap", "-o", file, "--token-file", token}
			for flag, value := range row {
				args = append(args, flags[flag][value]...)
			}
			mustSignet(t, args...)
			defer func() {
				if t.Failed() {
					t.Logf("signet %q", args)
				}
			}()
			envoytest.Validate(t, file)
		})
	}
}

// covering returns rows, one value of each flag, so that every allowed
// combination of the values of any three flags is in one of them.
func covering(flags [][][]string, allowed func([]int) bool) [][]int {
	type triple [6]int // three flags, each followed by its value
	triples := func(row []int) (ts []triple) {
		for a := range row {
			for b := range a {
				for c := range b {
					ts = append(ts, triple{a, row[a], b, row[b], c, row[c]})
				}
			}
		}
		return ts
	}
	var all [][]int
	missing := make(map[triple]bool)
	var fill func(row []int)
	fill = func(row []int) {
		if len(row) < len(flags) {
			for v := range flags[len(row)] {
				fill(append(row[:len(row):len(row)], v))
			}
		} else if allowed(row) {
			all = append(all, row)
			for _, t := range triples(row) {
				missing[t] = true
			}
		}
	}
	fill(nil)
	random := rand.New(rand.NewPCG(1, 2))
	random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	gain := func(row []int) (n int) {
		for _, t := range triples(row) {
			if missing[t] {
				n++
			}
		}
		return n
	}
	var rows [][]int
	for next := 0; len(missing) > 0; {
		// The best of the next hundred that add anything.
		var best []int
		most := 0
		for seen, tried := 0, 0; tried < len(all) && (seen < 100 || most == 0); tried++ {
			row := all[next%len(all)]
			next++
			seen++
			if n := gain(row); n > most {
				best, most = row, n
			}
		}
		rows = append(rows, best)
		for _, t := range triples(best) {
			delete(missing, t)
		}
	}
	return rows
}

func TestBootstrapRefusesBadValues(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		args []string
		want string // in the error
	}{
		{"an argument", []string{"x"}, "unknown command"},
		{"nothing to do", []string{"--no-inbound"}, "nothing to do"},
		{"an application without inbound", []string{"--no-inbound", "--app", "127.0.0.1:1"}, "contradict"},
		{"a listen address that is a name", []string{"--inbound", "localhost:80"}, "--inbound"},
		{"a listen address with a zone", []string{"--inbound", "[fe80::1%eth0]:80"}, "zone"},
		{"a listen address without a port", []string{"--inbound", "127.0.0.1"}, "HOST:PORT"},
		{"an application at port 0", []string{"--app", "127.0.0.1:0"}, "port 0"},
		{"a port that is too big", []string{"--app", "127.0.0.1:65536"}, "0 to 65535"},
		{"a port with a sign", []string{"--app", "127.0.0.1:+80"}, "0 to 65535"},
		{"an application with a line break", []string{"--app", "a\nb:80"}, "DNS name"},
		{"an application with a template", []string{"--app", "{{.}}:80"}, "DNS name"},
		{"an empty host", []string{"--app", ":80"}, "DNS name"},
		{"a host that looks like a number", []string{"--app", "1.2.3:80"}, "DNS name"},
		{"an unknown protocol", []string{"--app-protocol", "http3"}, "--app-protocol"},
		{"a trust domain that is a SPIFFE ID", []string{"--trust-domain", "spiffe://a.b"}, "--trust-domain"},
		{"a trust domain in upper case", []string{"--trust-domain", "Cluster.local"}, "--trust-domain"},
		{"no trust domain", []string{"--trust-domain", ""}, "--trust-domain"},
		{"an alias with a wildcard", []string{"--trust-domain-alias", "*"}, "--trust-domain"},
		{"an alias with a quote", []string{"--trust-domain-alias", `a"`}, "--trust-domain"},
		{"a relative socket", []string{"--socket", "agent.sock"}, "absolute"},
		{"a socket with a NUL", []string{"--socket", "/a\x00"}, "control character"},
		{"a socket with a line break", []string{"--socket", "/a\n- evil: true"}, "control character"},
		{"a relative token", []string{"--token-file", "token"}, "--token-file"},
		{"a relative secret", []string{"--token-secret", "secret"}, "--token-secret"},
		{"invalid UTF-8", []string{"--node-id", "\xff"}, "UTF-8"},
		{"no node id", []string{"--node-id", ""}, "--node-id: must not be empty"},
		{"a very long node id", []string{"--node-id", strings.Repeat("a", 5000)}, "5000 bytes"},
		{"a label without a value", []string{"--label", "a"}, "KEY=VALUE"},
		{"a label twice", []string{"--label", "a=b", "--label", "a=c"}, "twice"},
		{"a label with a line break", []string{"--label", "a=b\nc: d"}, "control character"},
		{"an old TLS", []string{"--tls-minimum", "1.1"}, "1.2 or 1.3"},
		{"an admin address that is a name", []string{"--admin", "localhost:15000"}, "--admin"},
		{"an admin address that others reach", []string{"--admin", "0.0.0.0:15000"}, "not on loopback"},
		{"an outbound that others reach", []string{"--outbound", "a=[::]:1,a:2," + serverID}, "not on loopback"},
		{"very many retries", []string{"--outbound-retries", "101"}, "at most 100"},
		{"an outbound without a name", []string{"--outbound", "=127.0.0.1:1,a:2," + serverID}, "the name"},
		{"an outbound with a dot in its name", []string{"--outbound", "a.b=127.0.0.1:1,a:2," + serverID}, "the name"},
		{"an outbound without an identity", []string{"--outbound", "a=127.0.0.1:1,a:2"}, "a part is missing"},
		{"an outbound with an empty identity", []string{"--outbound", "a=127.0.0.1:1,a:2,"}, "SPIFFE ID"},
		{"an outbound to an agent", []string{"--outbound", "a=127.0.0.1:1,a:2,spiffe://cluster.local/signet/agent/n"}, "does not name a workload"},
		{"an outbound to an authority", []string{"--outbound", "a=127.0.0.1:1,a:2,spiffe://cluster.local/signet/ca/1"}, "does not name a workload"},
		{"an outbound to a whole trust domain", []string{"--outbound", "a=127.0.0.1:1,a:2,spiffe://cluster.local"}, "does not name a workload"},
		{"two outbounds of one name", []string{"--outbound", "a=127.0.0.1:1,a:2," + serverID, "--outbound", "a=127.0.0.1:3,a:2," + serverID}, "twice"},
		{"an output folder that does not exist", []string{"-o", "/nonexistent/dir/envoy.yaml"}, "no such file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			out, err := signet(t, append([]string{"envoy", "bootstrap"}, tt.args...)...)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
			if out != "" {
				t.Errorf("printed all the same: %.200s", out)
			}
		})
	}
}

func TestBootstrapTellsEveryMistakeAtOnce(t *testing.T) {
	t.Parallel()
	_, err := signet(t, "envoy", "bootstrap", "--socket", "x", "--app", "y", "--tls-minimum", "z")
	for _, flag := range []string{"--socket", "--app", "--tls-minimum"} {
		if err == nil || !strings.Contains(err.Error(), flag) {
			t.Errorf("error %v does not mention %s", err, flag)
		}
	}
}

// FuzzBootstrapKeepsItsShape: whatever values are taken, the document has the same
// keys in the same places, and the values come out as they went in.
func FuzzBootstrapKeepsItsShape(f *testing.F) {
	f.Add("sidecar", "app", "server", "/run/a.sock", "a.example")
	f.Add(`a"b`, "{{.Socket}}", "%DYNAMIC_METADATA(x)%", "/a: b #c", "host")
	f.Add("'", "\\", "*a &b !c", "/\u2028", "x.y")
	f.Add("- a", "? b", "<no>&amp;", "/\u00a0", "1.2.3.4")
	f.Add("null", "~", "yes", "/1e3", "::1")
	shape := func(doc any) string {
		var b strings.Builder
		var walk func(any)
		walk = func(v any) {
			switch v := v.(type) {
			case map[string]any:
				b.WriteString("{")
				for _, k := range []string{"name", "@type", "address", "node", "metadata", "LABELS", "static_resources", "listeners", "clusters"} {
					if x, ok := v[k]; ok {
						b.WriteString(k + ":")
						if k != "LABELS" {
							walk(x)
						}
					}
				}
				fmt.Fprintf(&b, "%d}", len(v))
			case []any:
				b.WriteString("[")
				for _, x := range v {
					walk(x)
				}
				b.WriteString("]")
			}
		}
		walk(doc)
		return b.String()
	}
	f.Fuzz(func(t *testing.T, nodeID, key, value, socket, host string) {
		out, err := signet(t, "envoy", "bootstrap", "--node-id="+nodeID, "--label="+key+"="+value, "--socket="+socket, "--app="+host+":80")
		if err != nil {
			return
		}
		doc := checkYAML(t, out)
		want := checkYAML(t, mustSignet(t, "envoy", "bootstrap", "--label=a=b", "--app="+map[bool]string{true: "h:80", false: "1.1.1.1:80"}[strings.Contains(out, "STRICT_DNS")]))
		if got, want := shape(doc), shape(want); got != want {
			t.Errorf("the shape changed:\n got %s\nwant %s", got, want)
		}
		node := doc["node"].(map[string]any)
		if got := node["id"]; got != nodeID {
			t.Errorf("node id %q became %q", nodeID, got)
		}
		// A label's key ends at the first "=".
		k, v, _ := strings.Cut(key+"="+value, "=")
		if got := node["metadata"].(map[string]any)["LABELS"].(map[string]any)[k]; got != v {
			t.Errorf("label %q=%q became %q", k, v, got)
		}
	})
}

func TestOutputWritesBothFilesThatBelongTogether(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "server.yaml")
	out := mustSignet(t, "envoy", "bootstrap", "-o", file, "--token-file", "/tokens/t")
	if out != "" {
		t.Errorf("printed %q", out)
	}
	secret := filepath.Join(dir, "server.token.yaml")
	bootstrap, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(bootstrap), fmt.Sprintf("{path_config_source: {path: %q}}", secret)) {
		t.Errorf("the bootstrap does not refer to %s", secret)
	}
	got, err := os.ReadFile(secret)
	if err != nil {
		t.Fatal(err)
	}
	if want := mustSignet(t, "envoy", "token-secret", "--token-file", "/tokens/t"); string(got) != want {
		t.Errorf("the secret is not what token-secret prints:\n%s", cmp.Diff(want, string(got)))
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 2 {
		t.Errorf("%d files, want 2: %v", len(entries), entries)
	}
}
