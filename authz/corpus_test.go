package authz_test

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

var update = flag.Bool("update", false, "rewrite the decisions and problems in testdata/corpus")

// TestCorpus runs the cases in testdata/corpus, which read as the manual. A case
// has YAML files, of which the lines in "problems" are expected, "options", and
// "requests": a line a request and its decision,
//
//	GET /hello?x=1 from=cluster.local/ns/default/sa/client host=a.example port=8080 => allow allow-rule default/NAME[0]
//
// or "workload NAMESPACE LABEL=VALUE…" for the lines that follow. A request has
// the host example.com, port 8080, the address 10.1.2.3 and no certificate
// unless it says otherwise; "tcp" makes it a bare connection. Further fields are
// header=NAME:VALUE, joined=NAME:VALUES, sni=, to=ADDRESS, remote=ADDRESS,
// claims=JSON and metadata=FILTER:JSON, quoted as in Go where they have spaces.
func TestCorpus(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("testdata/corpus/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no corpus: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			t.Parallel()
			a, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			changed := runCase(t, a)
			if *update && changed {
				if err := os.WriteFile(file, txtar.Format(a), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// runCase runs one case, and with -update puts into it what it found.
func runCase(t *testing.T, a *txtar.Archive) (changed bool) {
	t.Helper()
	var opts authz.Options
	var set authz.Set
	var resources []authz.Resource
	var problems []string
	expectProblems := -1
	note := func(ps []authz.Problem) {
		for _, p := range ps {
			problems = append(problems, p.Severity.String()+": "+strings.TrimSuffix(p.Error(), "; "+p.Fix))
		}
	}
	for i, f := range a.Files {
		switch {
		case strings.HasSuffix(f.Name, ".yaml"):
			rs, ps := authz.Parse(f.Name, f.Data)
			resources = append(resources, rs...)
			note(ps)
		case f.Name == "options":
			opts = parseOptions(t, string(f.Data))
		case f.Name == "problems":
			expectProblems = i
		case f.Name != "requests":
			t.Fatalf("file %q: no such part of a case", f.Name)
		}
	}
	set, ps := set.Update(resources)
	note(ps)
	snapshot, ps := authz.Compile(set, opts)
	note(ps)

	var want string
	if expectProblems >= 0 {
		want = string(a.Files[expectProblems].Data)
	}
	got := strings.Join(problems, "\n")
	if got != "" {
		got += "\n"
	}
	if got != want {
		if *update && expectProblems >= 0 {
			a.Files[expectProblems].Data = []byte(got)
			changed = true
		} else {
			t.Errorf("problems (-want +got):\n%s", cmp.Diff(want, got))
		}
	}
	for i, f := range a.Files {
		if f.Name != "requests" {
			continue
		}
		w := identity.Workload{Namespace: "default"}
		lines := strings.Split(string(f.Data), "\n")
		for n, line := range lines {
			line = strings.TrimSpace(line)
			if line == "" || strings.HasPrefix(line, "#") {
				continue
			}
			if rest, ok := strings.CutPrefix(line, "workload "); ok {
				w = parseWorkload(rest)
				continue
			}
			request, want, _ := strings.Cut(line, "=>")
			r := parseRequest(t, request)
			got := render(snapshot.For(w).Decide(&r))
			if got == strings.TrimSpace(want) {
				continue
			}
			if *update {
				lines[n] = strings.TrimRight(request, " ") + " => " + got
				changed = true
			} else {
				t.Errorf("%s in %s:\n got %s\nwant %s", strings.TrimSpace(request), w.Namespace, got, strings.TrimSpace(want))
			}
		}
		a.Files[i].Data = []byte(strings.Join(lines, "\n"))
	}
	return changed
}

// render is a decision as cases write it.
func render(d authz.Decision) string {
	s := d.Verdict() + " " + string(d.Reason)
	if d.Kind != "" && d.Kind != authz.KindAuthorizationPolicy {
		s += " " + d.Kind
	}
	if d.Policy != "" {
		s += " " + d.Policy
	}
	if d.Rule >= 0 {
		s += fmt.Sprintf("[%d]", d.Rule)
	}
	if d.Provider != "" {
		s += " " + d.Provider
	}
	match := func(m authz.Match) {
		if !m.Certain {
			s += " maybe"
		}
		if m.Policy != "" {
			s += fmt.Sprintf(" %s[%d]", m.Policy, m.Rule)
		}
	}
	if m, ok := d.Audited(); ok {
		s += " audit"
		match(m)
	}
	for _, r := range d.DryRuns() {
		s += fmt.Sprintf(" dry-run %s %s", r.Action, map[bool]string{true: "allow", false: "deny"}[r.Allowed])
		match(r.Match)
	}
	return s
}

func parseOptions(t *testing.T, text string) (o authz.Options) {
	t.Helper()
	for _, f := range strings.Fields(text) {
		k, v, _ := strings.Cut(f, "=")
		switch k {
		case "trust-domain":
			o.TrustDomain = spiffeid.RequireTrustDomainFromString(v)
		case "alias":
			o.TrustDomainAliases = append(o.TrustDomainAliases, v)
		case "root":
			o.RootNamespace = v
		default:
			t.Fatalf("option %q", f)
		}
	}
	return o
}

func parseWorkload(line string) identity.Workload {
	fields := strings.Fields(line)
	w := identity.Workload{Namespace: fields[0], Labels: map[string]string{}}
	for _, f := range fields[1:] {
		k, v, _ := strings.Cut(f, "=")
		w.Labels[k] = v
	}
	return w
}

func parseRequest(t *testing.T, text string) authz.Request {
	t.Helper()
	r := authz.Request{
		Known: authz.FieldsHTTP &^ authz.FieldRemoteIP, HTTP: true, Host: []byte("example.com"), DestinationPort: 8080,
		SourceIP: netip.MustParseAddr("10.1.2.3"), DestinationIP: netip.MustParseAddr("10.9.8.7"),
	}
	fields := strings.Fields(text)
	if fields[0] == "tcp" {
		r.HTTP, r.Known, fields = false, authz.FieldsTCP&^authz.FieldRemoteIP, fields[1:]
	} else {
		r.Method, r.Path, fields = []byte(fields[0]), []byte(unquote(fields[1])), fields[2:]
	}
	for _, f := range fields {
		k, v, _ := strings.Cut(f, "=")
		v = unquote(v)
		switch k {
		case "from":
			v = "spiffe://" + v
			fallthrough
		case "name":
			if r.Authenticated {
				r.OtherNames = append(r.OtherNames, []byte(v))
			} else {
				r.Principal = []byte(v)
			}
			r.Authenticated = true
		case "host":
			r.Host = []byte(v)
		case "port":
			n, err := strconv.ParseUint(v, 10, 16)
			if err != nil {
				t.Fatal(err)
			}
			r.DestinationPort = uint16(n)
		case "ip":
			r.SourceIP = netip.MustParseAddr(v)
		case "to":
			r.DestinationIP = netip.MustParseAddr(v)
		case "remote":
			r.RemoteIP = netip.MustParseAddr(v)
			r.Known |= authz.FieldRemoteIP
		case "sni":
			r.SNI = []byte(v)
		case "header", "joined", "unclear":
			name, value, _ := strings.Cut(v, ":")
			form := map[string]authz.HeaderForm{"joined": authz.HeaderJoined, "unclear": authz.HeaderUnclear}[k]
			r.Headers = append(r.Headers, authz.Header{Name: name, Value: []byte(value), Form: form})
		case "claims":
			r.Claims = &structpb.Struct{}
			if err := protojson.Unmarshal([]byte(v), r.Claims); err != nil {
				t.Fatal(err)
			}
		case "metadata":
			filter, value, _ := strings.Cut(v, ":")
			s := &structpb.Struct{}
			if err := protojson.Unmarshal([]byte(value), s); err != nil {
				t.Fatal(err)
			}
			r.Metadata = map[string]*structpb.Struct{filter: s}
		case "absent":
			switch v {
			case "method":
				r.Method = nil
			case "path":
				r.Path = nil
			case "host":
				r.Host = nil
			default:
				t.Fatalf("absent %q", v)
			}
		case "unknown":
			for u := range strings.SplitSeq(v, ",") {
				i := slices.Index([]string{"peer", "principal", "ip", "port", "method", "path", "host", "remote", "to", "sni", "headers", "claims", "metadata"}, u)
				if i < 0 {
					t.Fatalf("unknown %q", u)
				}
				r.Known &^= 1 << i
			}
		default:
			t.Fatalf("request field %q", f)
		}
	}
	return r
}

func unquote(s string) string {
	if u, err := strconv.Unquote(s); err == nil {
		return u
	}
	return s
}
