package record_test

import (
	"bytes"
	"errors"
	"flag"
	"io"
	"net/netip"
	"os"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/record"
	"github.com/signet-mesh/signet/identity"
)

var update = flag.Bool("update", false, "rewrite golden files")

// sample has every field.
func sample() record.Record {
	claims, err := structpb.NewStruct(map[string]any{
		"iss": "https://issuer.example", "sub": "alice", "aud": []any{"a", "b"}, "email": "alice@example.com",
		"roles": map[string]any{"admin": true, "level": 3, "none": nil},
	})
	if err != nil {
		panic(err)
	}
	metadata, err := structpb.NewStruct(map[string]any{"a": []any{"x"}, "b": "y"})
	if err != nil {
		panic(err)
	}
	return record.Record{
		Time: time.Date(2026, 11, 26, 8, 30, 0, 123456789, time.UTC),
		Workload: identity.Workload{Namespace: "shop", ServiceAccount: "cart", Pod: "cart-7d9f-abcde", PodUID: "8c6f4a4e-0000-4000-8000-000000000001",
			Node: "node-1", Labels: map[string]string{"version": "v2", "app": "cart"}},
		Request: authz.Request{
			Known: authz.FieldsHTTP &^ authz.FieldRemoteIP, HTTP: true, Authenticated: true,
			Principal: []byte("spiffe://cluster.local/ns/web/sa/front"), OtherNames: [][]byte{[]byte("front.example"), {0xff}},
			SourceIP: netip.MustParseAddr("10.0.0.7"), DestinationIP: netip.MustParseAddr("10.0.0.9"), DestinationPort: 8080,
			SNI: []byte("cart.shop"), Method: []byte("GET"), Path: []byte("/items/\xff\u009b31m?id=7&access_token=secret#top"), Host: []byte(""),
			Headers: []authz.Header{
				{Name: "x-tenant", Value: []byte("<b>&\u2028\"")}, {Name: "x-tenant", Value: []byte("a,b"), Form: authz.HeaderJoined},
				{Name: "x-odd", Form: authz.HeaderUnclear}, {Name: "authorization", Value: []byte("Bearer secret")}, {Name: "user-agent", Value: []byte("curl")},
			},
			Claims: claims, Metadata: map[string]*structpb.Struct{"envoy.filters.network.x": metadata},
		},
		Kind: authz.KindAuthorizationPolicy, Policy: "shop/cart", Rule: 1, Reason: authz.ReasonDenyRule,
		Audited: &authz.Match{Policy: "istio-system/audit", Certain: true},
		DryRuns: []authz.DryRun{{Action: authz.ActionDeny, Allowed: true, Match: authz.Match{Rule: -1, Certain: true}},
			{Action: authz.ActionAllow, Match: authz.Match{Policy: "shop/next", Rule: 2}}},
		Answers:    []record.Answer{{Provider: "opa", Allowed: true}, {Provider: "slow", Reason: "provider-failed"}},
		Generation: 42, Latency: 1234 * time.Microsecond, RequestID: "f3c1", TraceID: "4bf92f3577b34da6a3ce929d0e0e4736",
	}
}

var shown = record.Shown{
	Headers: map[string]bool{"x-tenant": true, "x-odd": true, "authorization": true}, Claims: map[string]bool{"iss": true, "sub": true, "aud": true, "roles": true},
	Read: []authz.Name{{Field: authz.FieldMetadata, Name: "a", Filter: "envoy.filters.network.x"}}, Redacted: map[string]bool{"authorization": true},
}

// TestFormat is the format: a change of it is another version.
func TestFormat(t *testing.T) {
	t.Parallel()
	plain := sample()
	plain.Request = authz.Request{Known: authz.FieldsTCP, SourceIP: netip.MustParseAddr("10.0.0.7"), DestinationPort: 3306}
	plain.Workload.Labels, plain.Audited, plain.DryRuns, plain.Answers, plain.RequestID, plain.TraceID = nil, nil, nil, nil, "", ""
	plain.Allowed, plain.Kind, plain.Policy, plain.Rule, plain.Reason = true, "", "", -1, authz.ReasonNoAllowPolicy
	unread := plain
	unread.Request, unread.Unread, unread.Allowed, unread.Reason = authz.Request{HTTP: true, Method: []byte("GET"), Path: []byte("/")}, true, false, "check-request"
	unread.Err = "check request: a pseudo-header is there twice"
	full := sample()
	var got []byte
	for _, r := range []record.Record{full, plain, unread} {
		got = r.Append(got, shown)
	}
	const golden = "testdata/v1.jsonl"
	if *update {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("the format has changed (-golden +now):\n%s", diff)
	}
	// Every record of this version stays readable.
	n := 0
	for r, err := range record.Read(bytes.NewReader(want)) {
		if err != nil {
			t.Fatal(err)
		}
		if again := r.Append(nil, shown); !bytes.Contains(want, again) {
			t.Errorf("read and written again: %s", again)
		}
		n++
	}
	if n != 3 {
		t.Errorf("%d records", n)
	}
	for _, secret := range []string{"secret", "alice@", "curl", "\u009b", "\u2028", "#top"} {
		if bytes.Contains(got, []byte(secret)) {
			t.Errorf("%q stands in the records", secret)
		}
	}
}

// TestHiddenIsUnknown holds what stands in a record of what it hides.
func TestHiddenIsUnknown(t *testing.T) {
	t.Parallel()
	s := sample()
	r, err := record.Decode(s.Append(nil, shown))
	if err != nil {
		t.Fatal(err)
	}
	if h := r.Request.Headers[3]; h.Name != "authorization" || h.Form != authz.HeaderHidden || string(h.Value) != "Bearer " {
		t.Errorf("the redacted header is %+v", h)
	}
	if v, ok := r.Request.Claims.Fields["email"]; !ok || v == nil || v.Kind != nil {
		t.Errorf("the hidden claim is %v", v)
	}
	if !r.Request.QueryHidden || r.Request.Known&authz.FieldPath == 0 {
		t.Errorf("path %q, hidden %t", r.Request.Path, r.Request.QueryHidden)
	}
	// What is too long to be shown is unknown, and nothing is cut.
	s.Request.Path = []byte("/" + strings.Repeat("x", 1<<20))
	s.Request.Headers[0].Value = s.Request.Path
	s.Request.Claims.Fields["sub"] = structpb.NewStringValue(string(s.Request.Path))
	line := s.Append(nil, shown)
	if len(line) > 10<<10 {
		t.Errorf("a record of %d bytes", len(line))
	}
	if r, err = record.Decode(line); err != nil {
		t.Fatal(err)
	}
	if r.Request.Known&authz.FieldPath != 0 || r.Request.Path != nil || r.Request.Headers[0].Form != authz.HeaderHidden || r.Request.Claims.Fields["sub"].Kind != nil {
		t.Errorf("what is too long is shown: %+v", r.Request)
	}
}

// TestDecodeRefuses names what is wrong with lines.
func TestDecodeRefuses(t *testing.T) {
	t.Parallel()
	s := sample()
	good := string(s.Append(nil, shown))
	for _, tt := range []struct{ name, old, new, err string }{
		{"another version", `"version":1`, `"version":4`, "version 4"},
		{"no version", `"version":1,`, ``, "no version"},
		{"a key of another version", `"decision"`, `"shadow":true,"decision"`, "unknown field"},
		{"an unknown attribute", `"peer"`, `"ja4"`, `"ja4" is not something that can be known`},
		{"an unknown decision", `"decision":"deny"`, `"decision":"maybe"`, "neither allow nor deny"},
		{"an unknown form", `"form":"joined"`, `"form":"split"`, `the form "split"`},
		{"a claim shown and hidden", `"hiddenClaims":["email"]`, `"hiddenClaims":["sub"]`, "both shown and hidden"},
		{"a hidden filter that is not there", `"hiddenMetadata":{"envoy`, `"hiddenMetadata":{"x":["y"],"envoy`, "not there"},
		{"bytes of no kind", `"method":"GET"`, `"method":{}`, "neither text nor"},
		{"null bytes", `"method":"GET"`, `"method":null`, "neither text nor"},
		{"an address that is none", `"10.0.0.7"`, `""`, "unable to parse IP"},
		{"a torn line", good[len(good)-200:], ``, "unexpected end"},
		{"two records", good, good + good, "after top-level value"},
		{"no request", good[strings.Index(good, `"request":`):strings.Index(good, `"generation"`)], ``, "no request"},
		{"a dry run of another action", `"action":"DENY"`, `"action":"AUDIT"`, `"AUDIT"`},
	} {
		if !strings.Contains(good, tt.old) {
			t.Fatalf("%s: nothing to replace", tt.name)
		}
		r, err := record.Decode([]byte(strings.Replace(good, tt.old, tt.new, 1)))
		if err == nil || !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%s: %v", tt.name, err)
		}
		if err != nil && r.Policy != "" {
			t.Errorf("%s: half a record beside the error", tt.name)
		}
	}
}

// changes are some of every kind, too long to be shown whole.
func changes() *authz.Changes {
	long := bytes.Repeat([]byte("\x01"), 1<<20)
	return &authz.Changes{Names: []string{"x-a", "x-b"}, Headers: []authz.Header{{Name: "x-a", Value: long}, {Name: "x-b", Value: []byte("b")}}, Method: long, Path: long, Host: long}
}

// TestLongChangesAreUnknown: what is too long to be shown of changes is unknown when
// the record is decided again, and a record of it can be read.
func TestLongChangesAreUnknown(t *testing.T) {
	t.Parallel()
	compile := func(spec string) *authz.Program {
		rs, problems := authz.Parse("p.yaml", []byte("apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: ask, namespace: shop}\nspec: {action: CUSTOM, provider: {name: opa}, rules: [{}]}\n---\n"+
			"apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\nspec: "+spec))
		if len(problems) > 0 {
			t.Fatal(problems)
		}
		set, _ := authz.Set{}.Update(rs)
		snapshot, _ := authz.Compile(set, authz.Options{})
		return snapshot.For(identity.Workload{Namespace: "shop"})
	}
	for name, c := range map[string]struct {
		operation string // that the request was of, as it came
		changes   *authz.Changes
		hidden    bool
	}{
		"a method":     {"methods: [GET]", &authz.Changes{Method: changes().Method}, true},
		"a path":       {"paths: [/a]", &authz.Changes{Path: changes().Path}, true},
		"a host":       {"hosts: [cart]", &authz.Changes{Host: changes().Host}, true},
		"a long path":  {"paths: [/a]", &authz.Changes{Path: bytes.Repeat([]byte("p"), 4<<10+1)}, true},
		"a short one":  {"paths: [/a]", &authz.Changes{Path: bytes.Repeat([]byte("p"), 4<<10)}, false},
		"a long query": {"paths: [/a]", &authz.Changes{Path: []byte("/b?a=" + strings.Repeat("x", 5<<10))}, false},
		"everything":   {"methods: [GET]", changes(), true},
	} {
		r := record.Record{Answers: []record.Answer{{Provider: "opa", Allowed: true, Changes: c.changes}},
			Request: authz.Request{Known: authz.FieldsHTTP, HTTP: true, Method: []byte("GET"), Path: []byte("/a"), Host: []byte("cart")}}
		line := r.Append(nil, shown)
		got, err := record.Decode(line)
		if err != nil {
			t.Fatalf("%s: a record of %d bytes: %v", name, len(line), err)
		}
		if hidden := got.Answers[0].Changes.Hidden != 0; hidden != c.hidden || bytes.Contains(line, []byte(`"version":3`)) != c.hidden {
			t.Errorf("%s: hidden %t: %.300s", name, hidden, line)
		}
		allow, deny := authz.ReasonNoAllowRule, authz.ReasonNoAllowPolicy
		if c.hidden {
			allow, deny = authz.ReasonAllowUnknown, authz.ReasonDenyUnknown
		}
		rule := ", rules: [{to: [{operation: {" + c.operation + "}}]}]}"
		for spec, want := range map[string]authz.Reason{"{action: ALLOW" + rule: allow, "{action: DENY" + rule: deny} {
			if d, _ := record.Replay(compile(spec), &got); d.Reason != want {
				t.Errorf("%s, decided again by %s: %s, want %s", name, spec, d.Reason, want)
			}
		}
		// What the verification of a token made of the request is hidden in the same way.
		r.Answers, r.Request.Token = nil, c.changes
		r.Request.Claims = &structpb.Struct{}
		if got, err = record.Decode(r.Append(nil, shown)); err != nil || (got.Request.Token.Hidden != 0) != c.hidden {
			t.Errorf("%s, by a token: %v: %+v", name, err, got.Request.Token)
		}
	}
	for _, bad := range []string{`"hidden":["headers"]`, `"hidden":["x"]`} {
		if _, err := record.Decode([]byte(`{"version":3,"decision":"allow","request":{"token":{` + bad + `}}}`)); err == nil || !strings.Contains(err.Error(), "nothing that changes can hide") {
			t.Errorf("%s: %v", bad, err)
		}
	}
	if _, err := record.Decode([]byte(`{"version":2,"decision":"allow","request":{"token":{"hidden":["path"]}}}`)); err == nil {
		t.Error("a record of version 2 hides changes")
	}
}

// TestReadGoesOnAfterATornLine reads what a crash leaves.
func TestReadGoesOnAfterATornLine(t *testing.T) {
	t.Parallel()
	s := sample()
	line := string(s.Append(nil, shown))
	text := line + line[:100] + "\n\n" + line + strings.Repeat("x", 5<<20) + "\n" + line + line[:10]
	var good int
	var bad []string
	for _, err := range record.Read(strings.NewReader(text)) {
		if err != nil {
			bad = append(bad, err.Error())
			continue
		}
		good++
	}
	if good != 3 || len(bad) != 3 || !strings.Contains(bad[0], "line 2:") || !strings.Contains(bad[1], "line 5:") || !strings.Contains(bad[2], "line 7:") {
		t.Errorf("%d good, bad %q", good, bad)
	}
	broken := errors.New("broken")
	var last error
	n := 0
	for _, last = range record.Read(io.MultiReader(strings.NewReader(line), iotest.ErrReader(broken))) {
		n++
	}
	if n != 2 || !errors.Is(last, broken) {
		t.Errorf("%d, last %v", n, last)
	}
}

// FuzzDecode holds that no line makes the package panic, and that what it reads it
// writes and reads as the same.
func FuzzDecode(f *testing.F) {
	s := sample()
	f.Add(s.Append(nil, shown))
	f.Add([]byte(`{"version":1,"decision":"allow","request":{}}`))
	c := changes()
	s.Request.Token, s.Answers = c, []record.Answer{{Provider: "opa", Allowed: true, Changes: c}}
	f.Add(s.Append(nil, shown))
	f.Add([]byte(`{"version":3,"decision":"allow","providers":[{"provider":"opa","allowed":true,"changes":{"hidden":["method","path","host"],"path":"/a?b=","queryHidden":true}}],"request":{}}`))
	all := record.Shown{AllHeaders: true, AllClaims: true, Query: true}
	f.Fuzz(func(t *testing.T, line []byte) {
		r, err := record.Decode(line)
		if err != nil {
			return
		}
		once := r.Append(nil, all)
		again, err := record.Decode(once)
		if err != nil {
			t.Fatalf("%v: %s", err, once)
		}
		if twice := again.Append(nil, all); !bytes.Equal(once, twice) {
			t.Fatalf("%s\n%s", once, twice)
		}
		if bytes.IndexByte(once, '\n') != len(once)-1 {
			t.Fatalf("no line: %q", once)
		}
		var p *authz.Program
		if d, _ := record.Replay(p, &again); d.Allowed && !again.Unread {
			t.Fatal("no policies allow")
		}
	})
}
