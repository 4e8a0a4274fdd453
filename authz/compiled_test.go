package authz

import (
	"bytes"
	"cmp"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/types/known/structpb"
	security "istio.io/api/security/v1beta1"

	"github.com/signet-mesh/signet/identity"
)

// What is compiled, of which decisions show the half.

func TestForwardedForIsTheLastEntry(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		values []string
		want   string // "none", "unsure" or an address
	}{
		{nil, "none"},
		{[]string{""}, "none"},
		{[]string{"192.0.2.1"}, "192.0.2.1"},
		{[]string{"192.0.2.1,192.0.2.2"}, "192.0.2.2"},
		{[]string{",192.0.2.2"}, "192.0.2.2"},
		{[]string{"192.0.2.1, \t192.0.2.2 \r\n"}, "192.0.2.2"},
		{[]string{"192.0.2.1,"}, "none"},
		{[]string{","}, "none"},
		{[]string{"192.0.2.1, "}, "none"},
		{[]string{"192.0.2.1", "192.0.2.2"}, "192.0.2.2"},
		{[]string{"192.0.2.1,192.0.2.2", "192.0.2.3,192.0.2.4"}, "192.0.2.4"},
		{[]string{"192.0.2.1", ""}, "none"},
		{[]string{"", "192.0.2.1"}, "192.0.2.1"},
		{[]string{"192.0.2.1:80"}, "none"},
		{[]string{"unknown"}, "none"},
		{[]string{"2001:db8::1"}, "2001:db8::1"},
		{[]string{"::"}, "::"},
		{[]string{"192.0.2.1,2001:DB8::1"}, "2001:db8::1"},
		{[]string{"[2001:db8::1]"}, "none"},
		{[]string{"2001:db8::1x"}, "none"},
		{[]string{":"}, "none"},
		{[]string{"::ffff:192.0.2.1"}, "::ffff:192.0.2.1"},
		{[]string{"1111:2222:3333:4444:5555:6666:7777:8888"}, "1111:2222:3333:4444:5555:6666:7777:8888"},
		// What Envoy makes of a zone depends on its host.
		{[]string{"fe80::1%eth0"}, "unsure"},
		{[]string{"fe80::1%" + strings.Repeat("e", 64-len("fe80::1%"))}, "unsure"},
		{[]string{"fe80::1%" + strings.Repeat("e", 65-len("fe80::1%"))}, "unsure"},
		{[]string{"192.0.2.1", "unclear"}, "unsure"},
		{[]string{"unclear", "192.0.2.1"}, "unsure"},
	} {
		headers := []Header{{Name: "x-other", Value: []byte("192.0.2.9")}}
		for _, v := range c.values {
			h := Header{Name: "x-forwarded-for", Value: []byte(v)}
			if v == "unclear" {
				h.Form = HeaderUnclear
			}
			headers = append(headers, h)
		}
		headers = append(headers, Header{Name: "x-other", Value: []byte("192.0.2.9"), Form: HeaderUnclear})
		a, ok, sure := forwardedFor(headers)
		got := "none"
		if !sure {
			got = "unsure"
		} else if ok {
			got = a.String()
		}
		if got != c.want || !sure && ok || !ok && a.IsValid() {
			t.Errorf("%q: got %s (%v, %v, %v), want %s", c.values, got, a, ok, sure, c.want)
		}
	}
}

// TestJoinedValuesOfAnyNumberOpenNothing: a header whose joined values are too many
// to try every way to split them may hold what a DENY is about.
func TestJoinedValuesOfAnyNumberOpenNothing(t *testing.T) {
	t.Parallel()
	secret := newPatterns([]string{"secret"}, present)
	every := newPatterns([]string{"a*", "secret"}, present)
	for n := 1; n < 3*maxPieces; n++ {
		without := []byte(strings.TrimSuffix(strings.Repeat("a,", n), ","))
		with := []byte(strings.Repeat("a,", n-1) + "secret")
		want := map[string]truth{"without": no, "with": maybe, "every": yes}
		if n == 1 {
			want["with"] = yes
		}
		if n > maxPieces {
			want = map[string]truth{"without": maybe, "with": maybe, "every": maybe}
		}
		for what, got := range map[string]truth{"without": secret.matchJoined(without), "with": secret.matchJoined(with), "every": every.matchJoined(with)} {
			if got != want[what] {
				t.Errorf("%s, %d pieces: got %d, want %d", what, n, got, want[what])
			}
		}
		if got := newPatterns([]string{"*"}, present).matchJoined(without); got != yes {
			t.Errorf("presence, %d pieces: got %d", n, got)
		}
	}
}

// TestJoiningHeadersLeavesTheRequestAlone: where values are put together, they are so
// in a place of their own.
func TestJoiningHeadersLeavesTheRequestAlone(t *testing.T) {
	t.Parallel()
	backing := []byte("aXYZ-----")
	h := &headerTest{"x-a", newPatterns([]string{"a,b,c"}, present)}
	star := &headerTest{"x-a", newPatterns([]string{"*"}, present)}
	v := &view{joins: true, Request: &Request{Known: FieldHeaders, Headers: []Header{
		{Name: "x-a", Value: backing[:1]}, {Name: "x-b", Value: []byte("n")}, {Name: "x-a", Value: []byte("b")}, {Name: "x-a", Value: []byte("c")},
	}}}
	if got := v.header(h); got != yes {
		t.Errorf("joined: got %d", got)
	}
	if got := v.header(star); got != yes {
		t.Errorf("presence: got %d", got)
	}
	if string(backing) != "aXYZ-----" {
		t.Errorf("the request has become %q", backing)
	}
	v.Headers = v.Headers[1:2]
	if got := v.header(star); got != no {
		t.Errorf("presence of none: got %d", got)
	}
}

func TestClean(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]bool{
		"": true, "a": true, "\x7f": true, "é": true, "aé": true, "\n": false, "a\n": false, "\na": false, "é\n": false, "\né": false, "aé\nb": false,
		"\x80": false, "a\x80": false, "\xff": false, "é\xff": false, "\xc3": false,
	} {
		if got := clean([]byte(s)); got != want {
			t.Errorf("%q: %v", s, got)
		}
	}
}

func TestFoldingIsOfASCIILettersAlone(t *testing.T) {
	for c := range 256 {
		want := []byte{byte(c)}
		if c < 128 {
			want = bytes.ToLower(want)
		}
		if got := lower([]byte{byte(c)}, make([]byte, 1)); !bytes.Equal(got, want) {
			t.Errorf("%q became %q", byte(c), got)
		}
		if got := lowerASCII(string([]byte{byte(c)})); got != string(want) {
			t.Errorf("%q became %q", byte(c), got)
		}
	}
	// It allocates only for what does not fit; what needs no folding is not copied.
	buf := make([]byte, 256)
	for _, c := range []struct {
		b           []byte
		allocations float64
	}{{bytes.Repeat([]byte("A"), 256), 0}, {bytes.Repeat([]byte("A"), 257), 1}, {bytes.Repeat([]byte("a"), 300), 0}} {
		if got := lower(c.b, buf); !bytes.Equal(got, bytes.ToLower(c.b)) {
			t.Errorf("%d bytes became %q", len(c.b), got)
		}
		if n := testing.AllocsPerRun(10, func() { lower(c.b, buf) }); n != c.allocations {
			t.Errorf("%d bytes: %v allocations", len(c.b), n)
		}
	}
}

// TestTextSetsAreTheirTexts holds sets, and the trees in them, against a loop, for
// small texts of bytes at the edges of a tree's masks.
func TestTextSetsAreTheirTexts(t *testing.T) {
	t.Parallel()
	g := rand.New(rand.NewPCG(1, 2))
	alphabet := []byte{'a', 'b', 0, 0x3f, 0x40, 0x7f, 0x80, 0xff}
	text := func(n int) string {
		b := make([]byte, g.IntN(n))
		for i := range b {
			b[i] = alphabet[g.IntN(2+g.IntN(len(alphabet)-1))]
		}
		return string(b)
	}
	for range 400 {
		s := &textSet{}
		var list []pattern
		for range 1 + g.IntN(12) {
			p := pattern{shape: shape(g.IntN(3)), text: text(5)}
			s.add(p)
			list = append(list, p)
		}
		for range 60 {
			b := text(7)
			// There is more behind it, which is none of it.
			in := append(make([]byte, 0, 16), b+"abab"...)[:len(b)]
			want := slices.ContainsFunc(list, func(p pattern) bool {
				return p.shape == exactly && b == p.text || p.shape == prefixed && strings.HasPrefix(b, p.text) || p.shape == suffixed && strings.HasSuffix(b, p.text)
			})
			if got := s.has(in); got != want {
				t.Fatalf("%q in %+v: %v", b, list, got)
			}
		}
		for kind, tree := range map[shape]*radix{prefixed: s.prefix, suffixed: s.suffix} {
			want, got := map[string]bool{}, map[string]bool{}
			for _, p := range list {
				if p.shape == kind {
					want[p.text] = true
				}
			}
			tree.each("", func(text string) {
				if kind == suffixed {
					text = reversed(text)
				}
				got[text] = true
			})
			if fmt.Sprint(got) != fmt.Sprint(want) {
				t.Fatalf("each of %+v: %v", list, got)
			}
		}
	}
}

// TestManyValuesAreKeptInSets: a list is gone through, a set is not.
func TestManyValuesAreKeptInSets(t *testing.T) {
	t.Parallel()
	values := func(n int) (out []string) {
		for i := range n {
			out = append(out, fmt.Sprintf("v%d", i))
		}
		return out
	}
	if p := newPatterns(values(manyValues), present); p.set != nil || len(p.list) != manyValues {
		t.Errorf("few: %+v", p)
	}
	if p := newPatterns(append(values(manyValues-1), "a*", "*b", "*"), nonempty); len(p.set.exact) != manyValues-1 || p.set.prefix == nil || p.set.suffix == nil ||
		len(p.list) != 1 || p.list[0].shape != nonempty {
		t.Errorf("many: %+v", p)
	}
	if p := principalPatterns(append(values(manyValues), "*b")); len(p.set.exact) != manyValues || p.set.suffix != nil || len(p.list) != 1 || p.list[0].shape != suffixed {
		t.Errorf("many principals: %+v", p)
	}
	if n := newNamespaces(values(manyValues)); n.many != nil || n.globs != nil {
		t.Errorf("few namespaces: %+v", n)
	}
	if n := newNamespaces(append(values(manyValues+1), "a*")); len(n.many) != manyValues+1 || len(n.globs) != 1 {
		t.Errorf("many namespaces: %+v", n)
	}
	if n := newNets([]string{"10.0.0.0/8", "10.0.0.0/16", "10.255.255.255", "10.0.0.0/8", "::/8"}); len(n.list) != 2 {
		t.Errorf("blocks: %+v", n)
	}
}

func TestConditionsAreEvaluatedCheapestFirst(t *testing.T) {
	t.Parallel()
	of := func(cs conditions) (reads []attribute) {
		for _, c := range cs {
			reads = append(reads, c.reads)
		}
		return reads
	}
	r := newRule(&Rule{}, &security.Rule{
		From: []*security.Rule_From{{Source: &security.Source{RequestPrincipals: []string{"i/s"}, Namespaces: []string{"a"}, IpBlocks: []string{"10.0.0.1"}, Principals: []string{"a"}}}},
		To:   []*security.Rule_To{{Operation: &security.Operation{Hosts: []string{"a"}, Paths: []string{"/"}, Methods: []string{"GET"}, Ports: []string{"80"}}}},
		When: []*security.Condition{{Key: "request.auth.claims[a]", Values: []string{"a"}}, {Key: "connection.sni", Values: []string{"a"}}, {Key: "destination.port", Values: []string{"80"}}},
	}, language{}, false)
	for _, cs := range []conditions{r.from[0], r.to[0], r.when} {
		if reads := of(cs); !slices.IsSorted(reads) || len(reads) < 3 {
			t.Errorf("in the order %v", reads)
		}
	}
}

// What admission refuses never comes here; it would open nothing.
func TestWhatNobodyCompilesOpensNothing(t *testing.T) {
	t.Parallel()
	if got := (&condition{reads: readsMetadata + 1}).match(&view{}); got != maybe {
		t.Errorf("an unknown condition: got %d", got)
	}
	if ps := newPorts([]string{"65536", "70000", "65535", "-1", "1"}); !slices.Equal(ps, ports{1, 65535}) {
		t.Errorf("ports %v", ps)
	}
	for _, action := range []Action{ActionAllow, ActionDeny} {
		r := newRule(&Rule{Action: action}, &security.Rule{When: []*security.Condition{{Key: "experimental.envoy.filters.x", Values: []string{"a"}}}}, language{}, false)
		if (r == nil) != (action == ActionAllow) {
			t.Errorf("%s rule about metadata without a key: %+v", action, r)
		}
		if r := newRule(&Rule{Action: action}, &security.Rule{When: []*security.Condition{{Key: "destination.user", Values: []string{"a"}}}}, language{}, false); r != nil {
			t.Errorf("%s rule about an unknown attribute: %+v", action, r)
		}
	}
	c := &compiler{}
	if p := c.compile(&resource{key: key{KindAuthorizationPolicy, "a", "b"}, policy: []byte{0xff}}); p.whole.Reason != ReasonInvalid || p.whole.Action != ActionDeny || p.whole.detail == "" {
		t.Errorf("a policy that is none: %+v", p.whole)
	}
	for _, v := range []string{"", "x", "10.0.0.0/33", "10.0.0", "/", "fe80::1%eth0/64"} {
		if _, _, ok := parseNet(v); ok {
			t.Errorf("%q is a block", v)
		}
	}
	if p, zone, ok := parseNet("10.1.2.3/8"); p != netip.MustParsePrefix("10.0.0.0/8") || zone || !ok {
		t.Errorf("a block: %v %v %v", p, zone, ok)
	}
	if p, zone, ok := parseNet("fe80::1%eth0"); p != netip.MustParsePrefix("fe80::1/128") || !zone || !ok {
		t.Errorf("an address with a zone: %v %v %v", p, zone, ok)
	}
}

// compileText is a snapshot of a text, and the set that it is of.
func compileText(t *testing.T, text string) Set {
	t.Helper()
	rs, problems := Parse("p", []byte(text))
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	set, _ := Set{}.Update(rs)
	return set
}

func manyPolicies(n int, namespace string, more func(i int) string) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p%d, namespace: %s}\nspec: {action: DENY, rules: [{to: [{operation: {paths: [/%d]}}]}]%s}\n", i, namespace, i, more(i))
	}
	return b.String()
}

// TestUpdateMakesNothingAnew of what is the same: the spaces of a set that is read
// again, and the table of a program of which one policy of many has changed.
func TestUpdateMakesNothingAnew(t *testing.T) {
	t.Parallel()
	none := func(int) string { return "" }
	text := manyPolicies(40, "a", none) + manyPolicies(40, "istio-system", none)
	set := compileText(t, text)
	s, _ := Compile(set, Options{})
	w := identity.Workload{Namespace: "a"}
	p := s.For(w)
	for range 5 { // in another order each time
		again, _ := s.Update(set)
		if again.For(w) != p || again.spaces["a"] != s.spaces["a"] || again.others != s.others || again.spaces["istio-system"] != s.spaces["istio-system"] {
			t.Fatal("the same policies have another program")
		}
	}
	var rs []Resource
	for r := range set.All() {
		rs = append(rs, r)
	}
	other, _ := Parse("p", []byte(manyPolicies(1, "a", func(int) string { return ", selector: {matchLabels: {}}" })))
	i := slices.IndexFunc(rs, func(r Resource) bool { return r.r.key == other[0].r.key })
	rs[i] = other[0]
	changed, _ := set.Update(rs)
	next, _ := s.Update(changed)
	if q := next.For(w); q == p || q.deny == p.deny || q.deny.base != p.deny.base {
		t.Error("a change of one policy of many makes a new table")
	}
	// The one before goes on, with workloads that it has not seen, too.
	if q := s.For(identity.Workload{Namespace: "a", Labels: map[string]string{gatewayLabel: "x"}}); q == nil || s.For(w) != p {
		t.Error("the snapshot before has changed")
	}
}

// TestClassesAreForgotten bounds what a space remembers, and keeps labels apart.
func TestClassesAreForgotten(t *testing.T) {
	t.Parallel()
	s, _ := Compile(compileText(t, manyPolicies(13, "a", func(i int) string { return fmt.Sprintf(", selector: {matchLabels: {l%d: 'yes'}}", i) })), Options{})
	sp := s.spaces["a"]
	for i := range maxClasses + 10 {
		labels := map[string]string{}
		for bit := range 13 {
			if i>>bit&1 != 0 {
				labels[fmt.Sprintf("l%d", bit)] = "yes"
			}
		}
		s.For(identity.Workload{Namespace: "a", Labels: labels})
		want := i + 1
		if i >= maxClasses {
			want = i - maxClasses + 1
		}
		if len(sp.classes) != want || len(sp.programs) != want {
			t.Fatalf("after %d classes: %d are remembered, and %d programs", i+1, len(sp.classes), len(sp.programs))
		}
	}
	two, _ := Compile(compileText(t, manyPolicies(2, "a", func(i int) string { return ", selector: {matchLabels: {u: a, v: bc}}" })), Options{})
	n := func(x, y string) (n int) {
		for range two.For(identity.Workload{Namespace: "a", Labels: map[string]string{"u": x, "v": y}}).Rules() {
			n++
		}
		return n
	}
	if n("ab", "c") != 0 || n("a", "bc") != 2 || n("abc", "") != 0 || n("", "abc") != 0 {
		t.Error("labels ran into each other")
	}
}

func TestProblemsAreInOrder(t *testing.T) {
	t.Parallel()
	_, problems := Compile(compileText(t, strings.ReplaceAll(manyPolicies(30, "a", func(int) string { return "" }),
		"{to: [{operation:", "{from: [{source: {principals: [foreign.td/ns/a/sa/b]}}]}, {from: [{source: {principals: [foreign.td/ns/a/sa/b]}}], to: [{operation:")), Options{})
	if len(problems) != 60 || !slices.IsSortedFunc(problems, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Resource, b.Resource), cmp.Compare(a.Field, b.Field))
	}) {
		t.Errorf("%d problems: %v", len(problems), problems)
	}
}

func TestTokenRulesEnd(t *testing.T) {
	t.Parallel()
	for range (*Program)(nil).TokenRules() {
		t.Error("a nil program has rules")
	}
	s, _ := Compile(compileText(t, "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {name: a, namespace: a}\nspec: {jwtRules: [{issuer: a}, {issuer: b}]}\n"), Options{})
	var got []string
	for r := range s.For(identity.Workload{Namespace: "a"}).TokenRules() {
		got = append(got, r.Spec.GetIssuer())
	}
	if !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("rules of %q", got)
	}
	for range s.For(identity.Workload{Namespace: "a"}).TokenRules() {
		break
	}
}

// TestHiddenClaimsAreUnknown also where they are on the way to the one that is asked
// for, or an element of a list.
func TestHiddenClaimsAreUnknown(t *testing.T) {
	t.Parallel()
	hiding := &structpb.Struct{Fields: map[string]*structpb.Value{
		"a": {}, "l": structpb.NewListValue(&structpb.ListValue{Values: []*structpb.Value{{}, structpb.NewStringValue("v")}}),
	}}
	v := &view{Request: &Request{Known: FieldClaims, Claims: hiding}}
	for _, c := range []struct {
		path  []string
		value string
		want  truth
	}{{[]string{"a"}, "v", maybe}, {[]string{"a", "b"}, "v", maybe}, {[]string{"c", "b"}, "v", no}, {[]string{"l"}, "w", maybe}, {[]string{"l"}, "v", yes}} {
		if got := v.claim(&claimTest{c.path, newPatterns([]string{c.value}, nonempty)}); got != c.want {
			t.Errorf("%q of %q: got %d, want %d", c.value, c.path, got, c.want)
		}
	}
}

func TestAHiddenQueryIsUnknownToAHeader(t *testing.T) {
	t.Parallel()
	path := &headerTest{":path", newPatterns([]string{"/a"}, nonempty)}
	for hidden, want := range map[bool]truth{true: maybe, false: no} {
		v := &view{Request: &Request{HTTP: true, Known: FieldPath, Path: []byte("/b?c=d"), QueryHidden: hidden}}
		if got := v.header(path); got != want {
			t.Errorf("hidden %t: got %d, want %d", hidden, got, want)
		}
	}
}

func TestNamesAreWhatRulesReadByName(t *testing.T) {
	t.Parallel()
	const meta = "experimental.envoy.filters.a.b"
	for spec, want := range map[string][]Name{
		"from: [{source: {requestPrincipals: [a/b]}}]":               {{Field: FieldClaims, Name: "iss"}, {Field: FieldClaims, Name: "sub"}},
		"from: [{source: {notRequestPrincipals: ['*']}}]":            {{Field: FieldClaims, Name: "iss"}, {Field: FieldClaims, Name: "sub"}},
		"when: [{key: 'request.headers[x-a]', values: [v]}]":         {{Field: FieldHeaders, Name: "x-a"}},
		"when: [{key: 'request.auth.claims[a][b]', notValues: [v]}]": {{Field: FieldClaims, Name: "a"}},
		"when: [{key: '" + meta + "[k]', values: [v]}]":              {{FieldMetadata, "k", "envoy.filters.a.b"}},
		"to: [{operation: {paths: [/a]}}]":                           nil,
		"when: [{key: request.auth.presenter, values: [v]}]":         {{Field: FieldClaims, Name: "azp"}},
	} {
		s, problems := Compile(compileText(t, "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: a}\nspec: {rules: [{"+spec+"}]}\n"), Options{})
		got := s.For(identity.Workload{Namespace: "a"}).Names()
		slices.SortFunc(got, func(a, b Name) int { return strings.Compare(a.Name, b.Name) })
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v (%v)", spec, got, want, problems)
		}
	}
}

// TestIndexesBelowIndexes are gone through: sixteen rules share each value of each
// attribute, so that one attribute leads to an index by another one.
func TestIndexesBelowIndexes(t *testing.T) {
	t.Parallel()
	const kinds = 8
	var b strings.Builder
	for i := range 20 * kinds {
		k := i % kinds
		fmt.Fprintf(&b, "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p%03d, namespace: a}\n"+
			"spec: {action: DENY, rules: [{from: [{source: {principals: [td/ns/a/sa/s%d]}}], to: [{operation: {paths: [/%d], methods: [M%d]}}]}]}\n", i, k&1, k>>1&1, k>>2)
	}
	s, _ := Compile(compileText(t, b.String()), Options{})
	p := s.For(identity.Workload{Namespace: "a"})
	nested := 0
	for _, l := range p.layers {
		for _, g := range l.rules.base.index.branches {
			g.postings(func(p *posting) {
				if p.below != nil {
					nested++
				}
			})
		}
	}
	if nested == 0 {
		t.Error("no index is below another: the test tests nothing")
	}
	for k := range kinds + 1 {
		r := Request{Known: FieldsHTTP, HTTP: true, Authenticated: true, Principal: fmt.Appendf(nil, "spiffe://td/ns/a/sa/s%d", k&1),
			Path: fmt.Appendf(nil, "/%d", k>>1&1), Method: fmt.Appendf(nil, "M%d", k>>2)}
		want := fmt.Sprintf("a/p%03d", k)
		if k == kinds { // M2
			want = ""
		}
		if d := p.Decide(&r); d.Policy != want || d.Allowed != (want == "") {
			t.Errorf("%s %s by %s: %s, by %q; want %q", r.Method, r.Path, r.Principal, d.Reason, d.Policy, want)
		}
	}
}

// TestHiddenClaimsAreUnknownToAnIndex of them, too.
func TestHiddenClaimsAreUnknownToAnIndex(t *testing.T) {
	t.Parallel()
	var b strings.Builder
	for i := range 40 {
		fmt.Fprintf(&b, "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p%d, namespace: a}\n"+
			"spec: {action: DENY, rules: [{when: [{key: 'request.auth.claims[r]', values: [v%d]}]}]}\n", i, i)
	}
	s, _ := Compile(compileText(t, b.String()), Options{})
	p := s.For(identity.Workload{Namespace: "a"})
	text, list := structpb.NewStringValue, func(vs ...*structpb.Value) *structpb.Value {
		return structpb.NewListValue(&structpb.ListValue{Values: vs})
	}
	for _, c := range []struct {
		claim *structpb.Value
		want  Reason
	}{
		{text("v7"), ReasonDenyRule}, {text("other"), ReasonNoAllowPolicy}, {list(text("other"), text("v7")), ReasonDenyRule},
		{&structpb.Value{}, ReasonDenyUnknown}, {list(text("other"), &structpb.Value{}), ReasonDenyUnknown},
	} {
		r := Request{Known: FieldsHTTP | FieldClaims, HTTP: true, Claims: &structpb.Struct{Fields: map[string]*structpb.Value{"r": c.claim}}}
		if d := p.Decide(&r); d.Reason != c.want {
			t.Errorf("%v: %s, want %s", c.claim, d.Reason, c.want)
		}
	}
}

func TestGenerationsAndReads(t *testing.T) {
	t.Parallel()
	var none *Snapshot
	set := compileText(t, manyPolicies(1, "a", func(int) string { return "" }))
	s, _ := Compile(set, Options{})
	next, _ := s.Update(set)
	if none.Generation() != 0 || s.Generation() != 1 || next.Generation() != 2 {
		t.Errorf("generations %d, %d, %d", none.Generation(), s.Generation(), next.Generation())
	}
	// Paths, and no headers, which only tokens and conditions on them need.
	if reads := s.For(identity.Workload{Namespace: "a"}).Reads(); reads&FieldPath == 0 || reads&(FieldHeaders|FieldClaims) != 0 {
		t.Errorf("one policy of a path reads %b", reads)
	}
}

func TestParametersOfOneCharacter(t *testing.T) {
	t.Parallel()
	for _, path := range []string{"/?t", "/?b=1&t", "/?t#t=2", "/?%74"} {
		if v, ok := param([]byte(path), "t"); !ok || len(v) > 0 {
			t.Errorf("%s: %q, %t", path, v, ok)
		}
	}
	for in, want := range map[string]string{"%41b": "Ab", "a%42": "aB", "%": "%", "%4": "%4", "": ""} {
		if got := unescape([]byte(in)); string(got) != want {
			t.Errorf("%q: %q", in, got)
		}
	}
}

func TestADecisionByNoRuleNamesItsKind(t *testing.T) {
	t.Parallel()
	s, _ := Compile(compileText(t, strings.ReplaceAll(manyPolicies(1, "a", func(int) string { return "" }), "DENY", "ALLOW")), Options{})
	if d := s.For(identity.Workload{Namespace: "a"}).Decide(&Request{Known: FieldsHTTP, HTTP: true}); d.Kind != KindAuthorizationPolicy || d.Reason != ReasonNoAllowRule {
		t.Errorf("got %s by %q", d.Reason, d.Kind)
	}
}
