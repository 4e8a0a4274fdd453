package authz_test

import (
	"bytes"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"unicode"

	"github.com/rogpeppe/go-internal/txtar"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// traps are what engines like this one got wrong, or what is commonly taken for
// something else, and what proves each here: cases of testdata/corpus, cases of
// testdata/lint ("lint/…"), or tests of the packages below.
var traps = map[string]string{
	// What Istio's compiler and Envoy 1.40 were measured to do.
	"measured/templates that crash Envoy":                "path-template-that-crashes-envoy lint/template-crash lint/claim-refused",
	"measured/the server name in lower case":             "sni sni-upper-case sni-not lint/sni-case",
	"measured/repeated headers one by one":               "headers-repeated headers-joined when-headers",
	"measured/a star on a header is presence":            "headers-presence headers-absence",
	"measured/the header host is the authority":          "headers-host headers-host-differs lint/header-host",
	"measured/path parameters stay":                      "paths-parameters",
	"measured/encoded bytes match templates":             "path-template-characters lint/path-normal",
	"measured/raw paths and lower-case methods":          "methods-exact not-methods path-template-characters lint/method-case",
	"measured/remote addresses at a sidecar":             "remote-ip-last-entry remote-ip-without-header remote-ip-unreadable lint/remote-ip",
	"measured/empty lists are any":                       "empty-from-and-to lint/empty-list",
	"measured/keys that begin like known ones":           "when-key-begins-like-one when-key-begins-like-one-deny lint/key-unknown",
	"measured/mapped addresses and zones":                "ip-blocks-mapped sources lint/ip-mapped lint/ip-zone",
	"measured/subjects that are no text":                 "token-subject-that-is-no-text",
	"measured/notTrustDomains, nested claims, remote.ip": "not-trust-domains claims-nested-not when-remote-ip",

	// What is commonly wrong about Istio.
	"istio/an ALLOW without rules denies all":          "allow-nothing root-deny-all",
	"istio/the empty rule matches all":                 "allow-everything deny-everything",
	"istio/not-forms hold for what is absent":          "plaintext-satisfies-not not-principals request-principals-demanded claims-not headers-not lint/plaintext-allowed lint/no-token-allowed lint/no-header-allowed",
	"istio/HTTP fields on TCP":                         "tcp-allow tcp-deny tcp-allow-http tcp-deny-http tcp-deny-wider lint/tcp-everything lint/tcp-wider",
	"istio/an ALLOW rule goes as a whole":              "tcp-allow-http when-key-begins-like-one lint/tcp-dropped",
	"istio/hosts have ports and no case":               "hosts-exact hosts-with-port lint/host-port",
	"istio/a star needs a character":                   "stars paths-star principals-star invalid-values",
	"istio/two stars are a suffix":                     "principals-two-stars lint/star",
	"istio/namespaces with a star inside":              "namespaces-middle",
	"istio/request principals split at the last slash": "request-principals-last-slash request-principals-without-slash lint/request-principal-shape",
	"istio/claims of other types never match":          "claims-of-other-types lint/claim-type",
	"istio/cluster.local is a pointer in five parts":   "aliases-pointer aliases-need-five-parts trust-domain-aliases lint/principal-pointer",
	"istio/the root namespace adds":                    "root-namespace-adds root-namespace-denies service-accounts-of-the-root lint/service-account-root",
	"istio/ports are the container's":                  "ports-of-the-container",
	"istio/source.ip is not remote.ip":                 "remote-ip-is-not-source-ip",
	"istio/paths without query, with case":             "paths-query paths-exact paths-not-normalized lint/path-query",
	"istio/templates and the last slash":               "path-template-rest path-template-characters lint/path-template",
	"istio/headers with several values":                "headers-repeated headers-joined",
	"istio/CUSTOM comes before tokens":                 "custom-before-tokens",
	"istio/an unknown key drops or widens":             "when-key-begins-like-one-deny lint/key-unknown",
	"istio/any name of a certificate":                  "principals-several-names any-name-matches",
	"istio/GET is not HEAD":                            "methods-exact lint/method-head",
	"istio/rules are reported in the order of names":   "order-of-rules reported-rule",
	"istio/AUDIT is independent":                       "audit-and-allow audit-alone",
	"istio/a dry-run ALLOW denies nothing":             "dry-run-allow-alone lint/dry-run",

	// Vulnerabilities of Envoy, Istio and their like.
	"CVE-2019-9900/zero bytes in headers":                "headers-zero-byte",
	"CVE-2019-9901/dot segments":                         "paths-not-normalized lint/path-normal",
	"CVE-2020-8595/query and fragment":                   "paths-query",
	"CVE-2020-8843/attributes from headers":              "headers-are-no-identity",
	"CVE-2020-16844/suffixes on TCP":                     "principals-suffix-on-tcp",
	"CVE-2020-25017/duplicate headers":                   "headers-repeated",
	"CVE-2021-32777/only the last of duplicate headers":  "headers-repeated TestFromCheckRequestReadsHeaders",
	"CVE-2021-31920/slashes in other forms":              "paths-exact paths-not-normalized lint/path-evaded",
	"CVE-2021-39156/fragments":                           "paths-query paths-encoded-signs",
	"CVE-2021-39155/the case of hosts":                   "hosts-exact hosts-only-ascii-folds not-hosts",
	"CVE-2022-21679/fields that a reader does not know":  "invalid-unknown-field TestSchemasAreIstios",
	"CVE-2022-21656/types of names mixed up":             "principals-dns-name principals-several-names TestFromCheckRequest",
	"CVE-2023-27488/requests that cannot be decoded":     "TestFromCheckRequestRefuses TestMangled",
	"CVE-2023-27493/request bytes in answers":            "TestTextSaysNothingOfTheRequest",
	"CVE-2024-45806/headers with a trusted look":         "headers-are-no-identity remote-ip-last-entry",
	"CVE-2025-46821/the star in a template's segment":    "path-template-characters TestTemplatesTakeEveryCharacterOfASegment",
	"CVE-2025-64763/upgrades":                            "paths-upgrade paths-connect",
	"CVE-2025-66220/zero bytes in names":                 "principals-zero-byte",
	"CVE-2026-26308/joined headers":                      "headers-repeated headers-joined",
	"CVE-2026-26205/a path that looks like an authority": "paths-absolute-form",
	"CVE-2026-32811/the query in the path":               "paths-query",
	"CVE-2026-33186/paths without a slash":               "paths-without-slash",
	"CVE-2026-39350/dots and brackets as patterns":       "service-accounts-dots namespaces-no-patterns principals-no-patterns paths-no-patterns",
	"CVE-2026-73547/requests without a path":             "paths-connect",
	"CVE-2026-73511/parameters in segments":              "paths-parameters",
	"CVE-2026-73552/characters or bytes":                 "unclean-values path-template-characters",
	"CVE-2026-73550/host and authority":                  "headers-host-differs",

	// What a review of such an engine goes through.
	"list/paths":                    "TestPathsInEveryShape",
	"list/paths that are not there": "paths-connect paths-absolute-form paths-without-slash paths-star",
	"list/hosts":                    "hosts-exact hosts-with-port hosts-only-ascii-folds hosts-star TestHostsInEveryShape",
	"list/headers":                  "headers-exact headers-presence headers-repeated headers-zero-byte headers-unclear TestAThousandHeaders",
	"list/principals":               "principals-exact principals-dns-name principals-nearly-the-trust-domain principals-zero-byte namespaces-second TestPrincipalsInEveryShape",
	"list/negations":                "not-principals not-principals-star not-with-positive principals-and-not-principals plaintext-satisfies-not",
	"list/TCP":                      "tcp-allow tcp-deny tcp-allow-http tcp-deny-http tcp-deny-headers custom-on-tcp audit",
	"list/empty and unknown parts":  "allow-nothing allow-everything empty-from-and-to invalid-empty-entries invalid-unknown-field invalid-values principals-star-in-the-middle TestAdmission",
	"list/addresses":                "ip-blocks-mapped ip-blocks-everything ip-blocks-block sources remote-ip-is-not-source-ip",
	"list/tokens":                   "when-audiences claims-nested claims-not request-principals-last-slash request-principals-star",
	"list/protocols":                "paths-of-grpc paths-upgrade paths-connect hosts-star",
	"list/the service's own door":   "TestFromCheckRequestRefuses TestMangled TestOverGRPC",
	"list/failure":                  "no-policies invalid-denies-what-it-selects TestUpdate TestCheck",
	"list/one snapshot a decision":  "TestADecisionIsOfOneSnapshot",
	"list/texts escape":             "TestTextSaysNothingOfTheRequest",
}

// TestTraps proves each trap: it runs the cases, and holds that the tests exist.
func TestTraps(t *testing.T) {
	t.Parallel()
	var source []byte
	err := filepath.WalkDir(".", func(path string, _ fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, "_test.go") {
			var b []byte
			b, err = os.ReadFile(path)
			source = append(source, b...)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, proofs := range traps {
		t.Run(name, func(t *testing.T) {
			for _, proof := range strings.Fields(proofs) {
				switch {
				case strings.HasPrefix(proof, "Test"):
					if !bytes.Contains(source, []byte("\nfunc "+proof+"(")) {
						t.Errorf("there is no %s", proof)
					}
				case strings.HasPrefix(proof, "lint/"):
					if _, err := os.Stat("testdata/" + proof + ".txtar"); err != nil {
						t.Error(err)
					}
				default:
					a, err := txtar.ParseFile("testdata/corpus/" + proof + ".txtar")
					if err != nil {
						t.Fatal(err)
					}
					runCase(t, a)
				}
			}
		})
	}
}

// oneRule is a program of one policy with one rule in namespace default.
func oneRule(t testing.TB, action, rule string) *authz.Program {
	t.Helper()
	text := "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: default}\nspec: {action: " + action + ", rules: [" + rule + "]}\n"
	return compile(t, text, authz.Options{}).For(identity.Workload{Namespace: "default"})
}

func get(path string) authz.Request {
	return authz.Request{
		Known: authz.FieldsHTTP &^ authz.FieldRemoteIP, HTTP: true, SourceIP: netip.MustParseAddr("10.1.2.3"), DestinationPort: 8080,
		Method: []byte("GET"), Path: []byte(path), Host: []byte("shop.example"),
	}
}

// TestPathsInEveryShape holds a path in many shapes against the four rules that
// people write: DENY and ALLOW of the path, DENY of all that begins so, and ALLOW of
// all but the path.
func TestPathsInEveryShape(t *testing.T) {
	t.Parallel()
	denyExact := oneRule(t, "DENY", "{to: [{operation: {paths: [/admin]}}]}")
	denyPrefix := oneRule(t, "DENY", "{to: [{operation: {paths: ['/admin*']}}]}")
	allowNot := oneRule(t, "ALLOW", "{to: [{operation: {notPaths: [/admin]}}]}")
	allowExact := oneRule(t, "ALLOW", "{to: [{operation: {paths: [/admin]}}]}")
	const none, prefix, exact = 0, 1, 2
	for path, matches := range map[string]int{
		"/admin": exact, "/admin?x": exact, "/admin??": exact, "/admin#x": exact, "/admin?": exact, "/admin#x?y": exact, "/admin?x#y": exact,
		"/admin/": prefix, "/admin//": prefix, "/admin/.": prefix, "/admin/./": prefix, "/admin/..": prefix, "/admin/../": prefix,
		"/admin/%2e": prefix, "/admin/%2E%2e": prefix, "/admin%2f": prefix, "/admin%2F": prefix, "/admin%5c": prefix, `/admin\`: prefix,
		"/admin;a=b": prefix, "/admin;": prefix, "/admin,": prefix, "/admin%23": prefix, "/admin%3f": prefix, "/admin%3Fx": prefix,
		"/admin%00": prefix, "/admin%0a": prefix, "/admin%c0%ae": prefix, "/admin%252f": prefix, "/admin+": prefix, "/admin*": prefix,
		"/admin~": prefix, "/admin ": prefix, "/admin\t": prefix, "/admin\x00": prefix, "/admin\u00e9": prefix, "/admin\xff": prefix,
		"/admin" + strings.Repeat("x", 64<<10): prefix, "/administrator": prefix,
		"//admin": none, "/./admin": none, "/x/../admin": none, "/..;/admin": none, "/.;/admin": none, "/%2e/admin": none, "/%61dmin": none,
		`/\admin`: none, "/ADMIN": none, "/Admin": none, "/admi\u0578": none, "/\uff41dmin": none, "/adm\u0131n": none, "/ admin": none, "/x?/admin": none,
		"/x#/admin": none, "admin": none, "*": none, "/": none, "/%c0%afadmin": none, "\uff0fadmin": none, "http://h/admin": none, "/x" + strings.Repeat("/admin", 10_000): none,
	} {
		t.Run(fmt.Sprintf("%.40q", path), func(t *testing.T) {
			r := get(path)
			for name, c := range map[string]struct {
				p    *authz.Program
				want bool
			}{
				"DENY of the path": {denyExact, matches != exact}, "DENY of all that begins so": {denyPrefix, matches == none},
				"ALLOW of all but the path": {allowNot, matches != exact}, "ALLOW of the path": {allowExact, matches == exact},
			} {
				if d := c.p.Decide(&r); d.Allowed != c.want {
					t.Errorf("%s: allowed %v (%s)", name, d.Allowed, d.Reason)
				}
			}
		})
	}
	// No path at all.
	r := get("")
	r.Method, r.Path = []byte("CONNECT"), nil
	for want, p := range map[bool]*authz.Program{true: allowNot, false: allowExact} {
		if d := p.Decide(&r); d.Allowed != want {
			t.Errorf("CONNECT: allowed %v (%s)", d.Allowed, d.Reason)
		}
	}
}

func TestHostsInEveryShape(t *testing.T) {
	t.Parallel()
	p := oneRule(t, "ALLOW", "{to: [{operation: {hosts: [shop.example, '[2001:db8::1]']}}]}")
	for host, want := range map[string]bool{
		"shop.example": true, "SHOP.EXAMPLE": true, "[2001:db8::1]": true, "[2001:DB8::1]": true,
		"shop.example:8080": false, "shop.example.": false, "a@shop.example": false, "shop.example,evil": false, "shop.example evil": false,
		"": false, "[2001:db8::1]:80": false, "xn--shop.example": false, "shop\uff0eexample": false, "\u017fhop.example": false, "shop.example\x00": false,
	} {
		r := get("/")
		r.Host = []byte(host)
		if d := p.Decide(&r); d.Allowed != want {
			t.Errorf("%q: allowed %v (%s)", host, d.Allowed, d.Reason)
		}
	}
}

func TestPrincipalsInEveryShape(t *testing.T) {
	t.Parallel()
	exact := oneRule(t, "ALLOW", "{from: [{source: {principals: [td/ns/a/sa/b]}}]}")
	space := oneRule(t, "ALLOW", "{from: [{source: {namespaces: [a]}}]}")
	for name, want := range map[string][2]bool{
		"spiffe://td/ns/a/sa/b": {true, true}, "spiffe://td/ns/a/sa/b.c": {false, true}, "spiffe://td/ns/a/ns/b/sa/c": {false, true},
		"spiffe://td/ns/x/ns/a/sa/c": {false, true}, "spiffe://td.evil/ns/a/sa/b": {false, true}, "spiffe://td/ns/a/sa/b/": {false, true},
		"SPIFFE://td/ns/a/sa/b": {false, true}, "spiffe://TD/ns/a/sa/b": {false, true}, "spiffe://td/ns/%61/sa/b": {false, false},
		"spiffe://td": {false, false}, "spiffe://td/": {false, false}, "td/ns/a/sa/b": {false, true}, "b": {false, false}, "CN=td/ns/a/sa/b": {false, true},
		"": {false, false}, "spiffe://td/ns/a/sa/b\x00x": {false, true}, "spiffe://td/ns/a\x00/sa/b": {false, false},
		"spiffe://td/ns/a/sa/" + strings.Repeat("b", 2048): {false, true},
	} {
		r := get("/")
		r.Authenticated, r.Principal = true, []byte(name)
		for i, p := range []*authz.Program{exact, space} {
			if d := p.Decide(&r); d.Allowed != want[i] {
				t.Errorf("%.60q, rule %d: allowed %v (%s)", name, i, d.Allowed, d.Reason)
			}
		}
	}
}

func TestAThousandHeaders(t *testing.T) {
	t.Parallel()
	p := oneRule(t, "DENY", "{when: [{key: 'request.headers[x-role]', values: [admin]}]}")
	for _, at := range []int{0, 500, 999, -1} {
		r := get("/")
		for i := range 1000 {
			value := "user"
			if i == at {
				value = "admin"
			}
			r.Headers = append(r.Headers, authz.Header{Name: "x-role", Value: []byte(value)})
		}
		if d := p.Decide(&r); d.Allowed != (at < 0) {
			t.Errorf("admin at %d: %s", at, d.Reason)
		}
	}
}

// TestTemplatesTakeEveryCharacterOfASegment: a DENY template must not be got round
// by a character that a path may have.
func TestTemplatesTakeEveryCharacterOfASegment(t *testing.T) {
	t.Parallel()
	p := oneRule(t, "DENY", "{to: [{operation: {paths: ['/a/{*}/c']}}]}")
	const segment = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~%!$&'()+,;:@=*"
	for c := range 256 {
		b := byte(c)
		r := get("/a/x" + string([]byte{b}) + "x/c")
		denied := strings.IndexByte(segment, b) >= 0
		if d := p.Decide(&r); d.Allowed == denied {
			t.Errorf("%q: allowed %v (%s)", b, d.Allowed, d.Reason)
		}
	}
}

// TestTextSaysNothingOfTheRequest: what clients send does not get into texts, and
// what policies say is printable there.
func TestTextSaysNothingOfTheRequest(t *testing.T) {
	t.Parallel()
	p := oneRule(t, "DENY", `{to: [{operation: {paths: ["/a\r\nSet-Cookie: x\u2028", "/marker*"]}}]}`)
	r := get("/marker\r\n<script>secret")
	r.Principal, r.Authenticated = []byte("spiffe://td/secret\r\n"), true
	r.Headers = []authz.Header{{Name: "x", Value: []byte("secret\r\n")}}
	d := p.Decide(&r)
	if d.Allowed {
		t.Fatal("allowed")
	}
	if text := d.Text(); strings.Contains(text, "secret") || strings.ContainsFunc(text, func(c rune) bool { return !unicode.IsPrint(c) }) {
		t.Errorf("text %q", text)
	}
}

// TestADecisionIsOfOneSnapshot: while policies change between two states, each of
// which denies, no decision is a mixture that allows.
func TestADecisionIsOfOneSnapshot(t *testing.T) {
	t.Parallel()
	denying := oneRule(t, "DENY", "{}")
	allowingOthers := oneRule(t, "ALLOW", "{to: [{operation: {paths: [/other]}}]}")
	var mu sync.RWMutex
	current := denying
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range 10_000 {
			mu.Lock()
			current = []*authz.Program{denying, allowingOthers}[i%2]
			mu.Unlock()
		}
		close(done)
	})
	r := get("/admin")
	for {
		mu.RLock()
		p := current
		mu.RUnlock()
		if d := p.Decide(&r); d.Allowed {
			t.Fatalf("allowed: %s", d.Reason)
		}
		select {
		case <-done:
			wg.Wait()
			return
		default:
		}
	}
}
