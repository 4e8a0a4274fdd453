package oracle_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// box is one entry of the list of what goes wrong in such engines, held against
// Envoy: each policy is a workload of its own, each shot goes to all of them.
type box struct {
	name     string
	policies []string // specs of AuthorizationPolicies
	shots    []shot
}

var plain = connection{source: "127.0.0.1", dst: netip.MustParseAddrPort("10.0.0.9:80")}

// from is a connection of a client, over HTTP/1.1 or HTTP/2.
func from(peer string, h2 bool) connection {
	c := plain
	c.peer, c.h2 = peer, h2
	return c
}

func shots(connections []connection, method string, paths, hosts []string, headers ...[][2]string) (list []shot) {
	if len(headers) == 0 {
		headers = [][][2]string{nil}
	}
	for _, c := range connections {
		for _, p := range paths {
			for _, h := range hosts {
				for _, hd := range headers {
					list = append(list, shot{connection: c, method: method, path: p, authority: h, headers: hd})
				}
			}
		}
	}
	return list
}

func header(name string, values ...string) (list [][2]string) {
	for _, v := range values {
		list = append(list, [2]string{name, v})
	}
	return list
}

// oddNames are certificates that no authority should sign.
var oddNames = map[string]names{
	"slash": {uris: []string{"spiffe://own.td/ns/a/sa/x/"}}, "percent": {uris: []string{"spiffe://own.td/ns/a/sa/%78"}}, "upper": {uris: []string{"SPIFFE://own.td/ns/a/sa/x"}},
	"bare": {uris: []string{"spiffe://own.td"}}, "notSpiffe": {uris: []string{"https://own.td/ns/a/sa/x"}}, "twoNamespaces": {uris: []string{"spiffe://own.td/ns/a/ns/b/sa/c"}},
	"long": {uris: []string{"spiffe://own.td/ns/a/sa/" + strings.Repeat("x", 1500)}}, "two": {uris: []string{"spiffe://own.td/ns/a/sa/x", "spiffe://own.td/ns/b/sa/y"}},
	"twoDNS": {dns: []string{"b.example", "spiffe://own.td/ns/a/sa/x"}}, "uriAndDNS": {uris: []string{"spiffe://own.td/ns/q/sa/q"}, dns: []string{"spiffe://own.td/ns/a/sa/x"}},
	"uriAndSubject": {uris: []string{"spiffe://own.td/ns/q/sa/q"}, subject: "own.td/ns/a/sa/x"}, "sub": {uris: []string{"spiffe://sub.own.td/ns/a/sa/x"}}, "case": {uris: []string{"spiffe://own.td/ns/A/sa/X"}},
}

func boxes(sign func(object) string) []box {
	both := []connection{from("x", false), from("x", true)}
	anyPath := []string{"/a"}
	anyHost := []string{"a.example"}
	var paths []string
	for _, p := range []string{
		"", "/", "//", "/./", "/../", "/.", "/..", "/x/..", "%2e", "/%2e%2e/admin", "%2E%2e", "%2f", "%2F", "%5c", "\\", ";a=b", ";", "/..;/", "/.;/", ",", "#x", "%23", "?x", "??", "?", "%3f", "%00", "%0a",
		"%c0%ae", "%252f", "+", "*", "~", "%20", "\xc3\xa9", "%c3%a9", "|", "[", "{x}", "^", "\"", "<", "`", "%7e", "%61", ":", "@", "!$&'()", "\x7f", "\x01", "\t", "%",
	} {
		paths = append(paths, "/admin"+p, "/x"+p+"/admin")
	}
	paths = append(paths, "/ADMIN", "//admin", "/./admin", "/../admin", "/a/../admin", "/%61dmin", "/admin/"+strings.Repeat("a", 30000), "admin", "*", "http://a.example/admin", "http://b.example/admin?x", "/..;/admin", "/.;/admin", "/a;b/admin", "/a%2fadmin", "/a/%2e%2e;/admin", "///admin", "/admin///", "")
	hosts := []string{"a.example", "A.Example", "a.example:80", "a.example.", "a.example:", "[::1]", "[::1]:80", "", "x@a.example", "a.example,b.example", "xn--bcher-kva.example", "b.a.example", "a.examplez", "a.example:080", " a.example"}
	everyone := []connection{plain}
	for name := range clientNames {
		everyone = append(everyone, from(name, false))
	}
	for name := range oddNames {
		everyone = append(everyone, from(name, false))
	}
	var bySNI, byAddress []connection
	for _, s := range []string{"", "a.example", "A.EXAMPLE", "b.a.example", "x", "a.example.com"} {
		c := from("x", false)
		c.sni = s
		bySNI = append(bySNI, c)
	}
	for _, source := range []string{"127.0.0.1", "127.0.0.2", "127.9.9.9"} {
		for _, dst := range []string{"10.0.0.9:80", "10.0.0.9:8080", "10.1.0.9:80"} {
			c := plain
			c.source, c.dst = source, netip.MustParseAddrPort(dst)
			byAddress = append(byAddress, c)
		}
	}
	var tokens [][][2]string
	for _, c := range append([]object{
		{"iss": "https://iss", "sub": 7, "aud": "aud1"}, {"iss": "https://iss", "aud": "aud1"}, {"iss": "https://iss", "sub": "s", "n": object{"e": object{"f": "g"}}}, {"iss": "https://iss", "sub": "s", "n": object{"e": nil}},
		{"iss": "https://iss", "sub": "s", "c": "v ", "scope": " read  write "}, {"iss": "https://iss", "sub": "s", "c": []any{[]string{"v"}}}, {"iss": "https://iss", "sub": "s", "nbf": 99999999999}, {"iss": "https://iss", "sub": "é\n"},
	}, claimSets...) {
		if c == nil {
			tokens = append(tokens, nil)
		} else {
			tokens = append(tokens, header("authorization", "Bearer "+sign(c)))
		}
	}
	tokens = append(tokens, header("authorization", "Bearer x.y.z"), header("authorization", "Basic abc"), header("authorization", "bearer x.y.z"), header("authorization", "Bearer"), header("authorization", "Bearer "+sign(claimSets[4]), "Bearer "+sign(claimSets[5])))
	when := func(key, values string) []string {
		return []string{
			"{action: DENY, rules: [{when: [{key: '" + key + "', values: " + values + "}]}]}", "{action: DENY, rules: [{when: [{key: '" + key + "', notValues: " + values + "}]}]}",
			"{rules: [{when: [{key: '" + key + "', values: " + values + "}]}]}", "{action: AUDIT, rules: [{when: [{key: '" + key + "', notValues: " + values + "}]}]}",
		}
	}
	four := func(place, list, exact, prefix string) []string {
		not := "not" + strings.ToUpper(list[:1]) + list[1:]
		f := "{action: %s, rules: [{%s: [{%s: {%s: [%s]}}]}]}"
		kind := map[string]string{"to": "operation", "from": "source"}[place]
		return []string{
			fmt.Sprintf(f, "DENY", place, kind, list, exact), fmt.Sprintf(f, "DENY", place, kind, list, prefix),
			fmt.Sprintf(f, "ALLOW", place, kind, not, exact), fmt.Sprintf(f, "ALLOW", place, kind, list, exact), fmt.Sprintf(f, "DENY", place, kind, not, prefix),
		}
	}
	var headerLists [][][2]string
	for _, values := range [][]string{nil, {""}, {"admin"}, {"ADMIN"}, {"user", "admin"}, {"admin", "user"}, {"user,admin"}, {"user, admin"}, {"", "admin"}, {" admin "}, {"administrator"}, {"ad\xc3\xa9"}, {"\xff"}} {
		headerLists = append(headerLists, header("X-Role", values...))
	}
	headerLists = append(headerLists, header("x_role", "admin"), header("x-role", strings.Split(strings.Repeat("user;", 60), ";")...), append(header("x-role", "user"), header("X-ROLE", "admin")...))
	var forwarded [][][2]string
	for _, values := range [][]string{nil, {"203.0.113.7"}, {"1.2.3.4, 203.0.113.7"}, {"203.0.113.7,1.2.3.4"}, {"203.0.113.7", "1.2.3.4"}, {"1.2.3.4", "203.0.113.7"}, {""}, {"junk"}, {"203.0.113.7,"}, {"203.0.113.7, "}, {" 203.0.113.7 "}, {"203.0.113.7:80"}, {"[2001:db8::1]"}, {"2001:db8::1"}, {"::ffff:203.0.113.7"}, {"203.0.113.07"}, {"203.0.113"}, {"fe80::1%eth0"}, {"1.2.3.4;203.0.113.7"}} {
		forwarded = append(forwarded, header("x-forwarded-for", values...))
	}
	upgrade := [][][2]string{nil, {{"connection", "Upgrade"}, {"upgrade", "websocket"}, {"sec-websocket-key", "eA=="}, {"sec-websocket-version", "13"}}, header("content-type", "application/grpc"), header("x-http-method-override", "DELETE"), header("host", "b.example")}
	list := []box{
		{"paths", four("to", "paths", "/admin", "'/admin*'"), shots(both, "GET", paths, anyHost)},
		{"path templates", four("to", "paths", "'/admin/{*}'", "'/{*}/admin/{**}'"), shots(both, "GET", append(paths, pathsSent...), anyHost)},
		{"path suffixes and stars", four("to", "paths", "'*'", "'*/admin'"), shots(both, "GET", paths, anyHost)},
		{"hosts", four("to", "hosts", "a.example", "'*.example'"), shots(both, "GET", anyPath, hosts)},
		{"hosts with ports and stars", four("to", "hosts", "'a.example:80'", "'*'"), shots(both, "GET", anyPath, hosts)},
		{"headers", append(when("request.headers[X-Role]", "[admin]"), when("request.headers[x-role]", "['*']")...), shots(both, "GET", anyPath, anyHost, headerLists...)},
		{"header prefixes and suffixes", append(when("request.headers[x-role]", "['admin*']"), when("request.headers[x-role]", "['*,admin', '*admin ']")...), shots(both, "GET", anyPath, anyHost, headerLists...)},
		{"pseudo-headers", append(append(when("request.headers[host]", "[a.example, A.Example]"), when("request.headers[:path]", "['/admin', '/admin?*']")...), when("request.headers[:method]", "[GET]")...), shots(both, "GET", []string{"/admin", "/admin?x", "/x"}, hosts[:4])},
		{"principals", four("from", "principals", "own.td/ns/a/sa/x", "'own.td/ns/a/*'"), shots(everyone, "GET", anyPath, anyHost)},
		{"principal suffixes and stars", four("from", "principals", "'*'", "'*/sa/x'"), shots(everyone, "GET", anyPath, anyHost)},
		{"namespaces", four("from", "namespaces", "a", "'*b'"), shots(everyone, "GET", anyPath, anyHost)},
		{"service accounts", four("from", "serviceAccounts", "x", "ab/x.y"), shots(everyone, "GET", anyPath, anyHost)},
		{"trust domains", four("from", "trustDomains", "own.td", "'own*'"), shots(everyone, "GET", anyPath, anyHost)},
		{"trust domain suffixes and stars", four("from", "trustDomains", "'*'", "'*.td'"), shots(everyone, "GET", anyPath, anyHost)},
		{"addresses", append(append(four("from", "ipBlocks", "127.0.0.1", "127.0.0.0/30"), when("destination.ip", "[10.0.0.0/24]")...), when("destination.port", "['080']")...), shots(byAddress, "GET", anyPath, anyHost)},
		{"addresses mapped and with all bits", four("from", "ipBlocks", "'::ffff:127.0.0.1'", "'0.0.0.0/0'"), shots(byAddress, "GET", anyPath, anyHost)},
		{"remote addresses", append(four("from", "remoteIpBlocks", "203.0.113.7", "203.0.113.0/24"), when("remote.ip", "['2001:db8::/32', 127.0.0.1]")...), shots(both, "GET", anyPath, anyHost, forwarded...)},
		{"the server name", append(append(when("connection.sni", "[a.example]"), when("connection.sni", "['*.example', A.EXAMPLE]")...), when("connection.sni", "['*']")...), shots(bySNI, "GET", anyPath, anyHost)},
		{"tokens", append(append(four("from", "requestPrincipals", "https://iss/s1", "'*'"), when("request.auth.claims[n][e]", "[d]")...), when("request.auth.claims[c]", "['*']")...), shots([]connection{plain}, "GET", anyPath, anyHost, tokens...)},
		{"tokens in part", append(append(four("from", "requestPrincipals", "'https://iss/s*'", "'*/s1'"), when("request.auth.audiences", "[aud2]")...), when("request.auth.claims[scope]", "[read]")...), shots([]connection{plain}, "GET", anyPath, anyHost, tokens...)},
		{"tokens without a slash", append(append(four("from", "requestPrincipals", "other", "'*b'"), when("request.auth.presenter", "[app]")...), when("request.auth.principal", "['https://iss*', 'other/']")...), shots([]connection{plain}, "GET", anyPath, anyHost, tokens...)},
		{"upgrades", four("to", "methods", "GET", "'G*'"), shots(both, "GET", anyPath, anyHost, upgrade...)},
	}
	methods := box{name: "methods", policies: append(four("to", "methods", "GET", "'P*'"), "{action: DENY, rules: [{to: [{operation: {notPaths: [/a]}}]}]}", "{rules: [{to: [{operation: {methods: ['*']}}]}]}")}
	for _, m := range []string{"GET", "HEAD", "POST", "get", "OPTIONS", "CONNECT", "PATCH", "BREW", "G", "TRACE", "GETX"} {
		for _, c := range both {
			for _, p := range []string{"/a", "/b", "*"} {
				s := shot{connection: c, method: m, path: p, authority: "a.example:443"}
				if m == "CONNECT" {
					s.path = "a.example:443"
				}
				methods.shots = append(methods.shots, s)
			}
		}
	}
	return append(list, methods)
}

// TestBoxesAgreeWithEnvoy goes through the list of what engines like this one get
// wrong, each entry with the same policies, in Envoy and in Decide.
func TestBoxesAgreeWithEnvoy(t *testing.T) {
	t.Parallel()
	pilot := startIstio(t)
	clients := map[string]names{}
	for _, m := range []map[string]names{clientNames, oddNames} {
		for k, v := range m {
			clients[k] = v
		}
	}
	pki := newPKI(t, clients)
	rec, socket := startRecorder(t)
	list := boxes(func(c object) string { return pki.sign(t, c) })
	jwt := resource("RequestAuthentication", "a", "jwt", nil, object{"jwtRules": []object{
		{"issuer": "https://iss", "jwks": pki.keySet(t), "forwardOriginalToken": true}, {"issuer": "other", "jwks": pki.keySet(t), "forwardOriginalToken": true},
	}})
	var workloads []workload
	worlds := map[string]world{}
	for i, b := range list {
		for j, spec := range b.policies {
			w := world{mesh: mesh{Namespace: "a", Labels: map[string]string{"app": "server"}, RootNamespace: "root", TrustDomain: "own.td", Aliases: []string{"old.td"}}}
			w.text = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: a}\nspec: " + spec
			if strings.HasPrefix(b.name, "tokens") {
				w.text += "\n---\n" + jwt
			}
			w.Resources = w.text
			name := fmt.Sprintf("w%d-%d", i, j)
			worlds[name] = w
			workloads = append(workloads, workload{name: name, filters: pilot.build(t, w.mesh)})
		}
	}
	proxy := startSidecars(t, workloads, pki, socket, nil)
	byBox := make([][]pair, len(list))
	n, answered := 0, 0
	for i, b := range list {
		for j := range b.policies {
			name := fmt.Sprintf("w%d-%d", i, j)
			w := worlds[name]
			program := w.program(t)
			var cl *client
			for k, s := range b.shots {
				if k%whole(1, 8) != 0 {
					continue
				}
				n++
				p := pair{id: strconv.Itoa(n), world: w, program: program, shot: s, allowing: strings.HasPrefix(b.policies[j], "{rules") || strings.Contains(b.policies[j], "ALLOW")}
				p.shot.headers = append(append([][2]string(nil), s.headers...), [2]string{"x-pair", p.id})
				if cl == nil || cl.connection != s.connection {
					if cl != nil {
						cl.close()
					}
					cl = &client{pki: pki, address: proxy.addresses[name], connection: s.connection, port: 10000 + n%50000}
				}
				p.outcome = cl.do(t, p.shot)
				if !p.outcome.closed && p.outcome.details != "" {
					answered++
				}
				byBox[i] = append(byBox[i], p)
			}
			cl.close()
		}
	}
	// Envoy logs a request a moment after its answer. One that was refused before any
	// filter may have a line without its number.
	var logs map[string]logged
	unlogged := func(p pair) bool {
		before, _, _ := rec.of(p.id)
		_, ok := logs[p.id]
		return before != nil && !p.outcome.closed && !ok
	}
	deadline := time.Now().Add(wirePatience)
	for logs = proxy.logs(t, 1); slices.ContainsFunc(slices.Concat(byBox...), unlogged); logs = proxy.logs(t, 1) {
		if time.Now().After(deadline) {
			t.Fatal("requests are not in the access log")
		}
		time.Sleep(20 * time.Millisecond) // polling a file that another process writes
	}
	total := newTally()
	for i, b := range list {
		t.Run(b.name, func(t *testing.T) {
			count := newTally()
			for _, p := range byBox[i] {
				count.compare(t, p, logs[p.id], rec)
			}
			t.Logf("%d compared, %v; deviations %v; refused before any filter %v", count.compared, count.ends, count.deviations, count.unreached)
			if few := raceEnabled && count.compared > 0; !few && (count.compared < 40 || count.ends["deny"] == 0 || count.ends["allow"] == 0) {
				t.Errorf("%d pairs, %v: too few to tell anything", count.compared, count.ends)
			}
			total.compared += count.compared
			for k, v := range count.ends {
				total.ends[k] += v
			}
			for k, v := range count.deviations {
				total.deviations[k] += v
			}
		})
	}
	total.report(t)
}
