package oracle_test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
)

// The vocabularies are small, so that policies and requests meet.

var clientNames = map[string]names{
	"x":         {uris: []string{"spiffe://own.td/ns/a/sa/x"}},
	"y":         {uris: []string{"spiffe://own.td/ns/b/sa/y"}},
	"local":     {uris: []string{"spiffe://cluster.local/ns/a/sa/x"}},
	"alias":     {uris: []string{"spiffe://old.td/ns/a/sa/y"}},
	"far":       {uris: []string{"spiffe://far.td/ns/a/sa/x"}},
	"dotted":    {uris: []string{"spiffe://own.td/ns/ab/sa/x.y"}},
	"deep":      {uris: []string{"spiffe://own.td/ns/ns/a/ns/b/sa/x"}},
	"short":     {uris: []string{"spiffe://own.td/ns/a"}},
	"evil":      {uris: []string{"spiffe://own.td.evil/ns/a/sa/x"}},
	"star":      {uris: []string{"spiffe://own.td/ns/a*b/sa/x*"}},
	"dns":       {dns: []string{"a.example"}},
	"dnsSpiffe": {dns: []string{"spiffe://own.td/ns/a/sa/x"}},
	"subject":   {subject: "spiffe://own.td/ns/b/sa/y"},
	"all":       {uris: []string{"spiffe://own.td/ns/c/sa/z"}, dns: []string{"a.example", "b/ns/a/c"}, subject: "x"},
}

var (
	principalPool = []string{"own.td/ns/a/sa/x", "cluster.local/ns/a/sa/x", "old.td/ns/a/sa/y", "own.td/ns/b/sa/y", "far.td/ns/a/sa/x", "own.td/ns/a",
		"own.td/*", "own.td/ns/a/*", "*/sa/x", "*y", "*", "own.td/ns/a*b/sa/x*", "*x*", "*.y", "o*", "own.td/ns/c/sa/z"}
	namespacePool = []string{"a", "b", "ab", "a*", "*b", "*", "a*b", "ns", "c", "ns/a", "a*/sa", "[a]", "a.b"}
	accountPool   = []string{"x", "y", "a/x", "b/y", "ab/x.y", "ab/xzy", "c/z", "a/sa"}
	domainPool    = []string{"own.td", "old.td", "far.td", "*.td", "own*", "*", "cluster.local", "evil", "own.td*"}
	ipPool        = []string{"127.0.0.1", "127.0.0.2", "127.0.0.0/30", "127.0.0.0/8", "::1", "::/0", "0.0.0.0/0", "::ffff:127.0.0.1", "10.0.0.0/8", "127.0.0.5/31"}
	remotePool    = []string{"127.0.0.1", "203.0.113.7", "203.0.113.0/24", "2001:db8::1", "2001:db8::/32", "127.0.0.0/8", "::1", "0.0.0.0/0", "10.1.2.3/8"}
	requestPool   = []string{"https://iss/s1", "https://iss/*", "*", "*/s1", "other/*", "https://iss*", "*s1", "https://iss/s*", "other/a", "a/b", "*iss/s1", "other", "*b"}
	hostPool      = []string{"a.example", "A.Example:80", "a.*", "*.example", "*", "*:8080", "b.example", "x", "A*"}
	methodPool    = []string{"GET", "POST", "get", "P*", "*T", "*", "HEAD", "OPTIONS", "CONNECT"}
	pathPool      = []string{"/a", "/a/b", "/admin", "/a*", "/*", "*", "*/b", "*.php", "*a*", "/{*}", "/{**}", "/a/{*}", "/a/{**}", "/{*}/b", "/{*}/b/{**}", "/a/{*}/", "/admin/{**}", "/A", "/a*b", "a"}
	portPool      = []string{"80", "8080", "0443", "9", "0"}
	destIPPool    = []string{"10.0.0.9", "10.0.0.0/24", "2001:db8::9", "::/0", "0.0.0.0/0", "10.0.1.0/24"}
	sniPool       = []string{"a.example", "B.example", "b.example", "*.example", "a.*", "*", "x.y"}
	headerPool    = []string{"v", "V", "v*", "*v", "*", "a,b", "w", "admin", "a"}
	audiencePool  = []string{"aud1", "aud2", "aud*", "*2", "*"}
	presenterPool = []string{"app", "ap*", "*pp", "*", "other"}
	claimPool     = []string{"v", "v*", "*v", "*", "read", "write", "read write", "1", "true", "g1", "g2", "d"}
	metaPool      = []string{"m", "m*", "*m", "*", "[m]", "n"}

	sourceAddresses = []string{"127.0.0.1", "127.0.0.2", "127.0.0.5"}
	destinations    = []netip.AddrPort{netip.MustParseAddrPort("10.0.0.9:80"), netip.MustParseAddrPort("10.0.0.9:8080"), netip.MustParseAddrPort("10.0.1.9:443"), netip.MustParseAddrPort("10.0.0.8:9")}
	destinations6   = []netip.AddrPort{netip.MustParseAddrPort("[2001:db8::9]:80"), netip.MustParseAddrPort("[2001:db8::8]:8080"), netip.MustParseAddrPort("[fd00::1]:443")}
	peersPool       = []string{"x", "x", "y", "local", "alias", "far", "dotted", "deep", "short", "evil", "star", "dns", "dnsSpiffe", "subject", "all", "", "", ""}
	snis            = []string{"", "a.example", "B.Example", "x.y", "a.b.example"}
	hostsSent       = []string{"a.example", "A.EXAMPLE", "a.example:80", "b.example", "x", "c.example:8080", "aa"}
	methodsSent     = []string{"GET", "GET", "POST", "PUT", "HEAD", "OPTIONS", "PATCH", "TRACE"}
	pathsSent       = []string{"/a", "/a/", "/a/b", "/a?x=/b", "/a/b?q", "/A", "/", "/admin", "/admin/", "/admin/x", "//admin", "/a/../admin", "/a/%2e%2e/admin", "/admin;x", "/..;/admin", "/a/%2e%2e;/b",
		"/admin#f", "/a%2fb", "/a%2Fb", "/a%5cb", "/a\\b", "/x/b", "/x/b/c/d", "/x.php", "/xa*", "/a*b", "/a//b", "/a/./b", "/%61", "/a/b|c", "/a/\"x\"", "/a/[x]", "/a/{x}", "/a/b%7c", "/a/x,y", "/a/x;y=z", "/a%3fb", "/a?", "/a??", "/.", "/a/~b", "/a%20b", "/x/b/", "/a/+", "/a/@:!$&'()*,="}
	pathsH2    = []string{"/\xc3\xa9", "/a/\xc3\xa9", "/a/\xff", "/admin\xc3\xa9"}
	headerSets = [][][2]string{
		nil, {{"X-H", "v"}}, {{"x-h", "V"}}, {{"x-h", "a"}, {"x-h", "v"}}, {{"x-h", "v"}, {"x-h", "w"}}, {{"x-h", "a,b"}}, {{"x-h", ""}}, {{"x-h", "a"}, {"x-h", "b"}},
		{{"x-role", "user"}, {"x-role", "admin"}}, {{"x-role", "admin"}}, {{"x_h", "v"}}, {{"x-h", "vv"}, {"x-role", "v"}},
	}
	forwarded = []string{"", "", "203.0.113.7", "1.2.3.4, 203.0.113.7", "203.0.113.7, 127.0.0.1", "2001:db8::1", "junk", "203.0.113.7,junk", "10.9.9.9", "203.0.113.7:99", "::ffff:203.0.113.7"}
	metas     = []string{"", "m", "mm", "n", "xm"}
)

// claimSets are the payloads of tokens; nil sends none.
var claimSets = []object{
	nil, nil, nil, nil,
	{"iss": "https://iss", "sub": "s1", "aud": "aud1", "azp": "app"},
	{"iss": "https://iss", "sub": "s2", "aud": []string{"aud1", "aud2"}, "c": "v", "scope": "read write"},
	{"iss": "https://iss", "sub": "a/b", "aud": "aud1", "c": []string{"x", "v"}, "n": object{"e": "d", "l": []string{"g1", "g2"}}},
	{"iss": "other", "sub": "a", "c": 1, "b": true, "aud": []string{"aud2"}},
	{"iss": "other", "aud": "aud2", "azp": []string{"app", "x"}, "c": "", "n": "v"},
	{"iss": "other", "sub": "", "aud": "aud2", "c": object{"v": "v"}, "scope": []string{"read", "v"}},
	{"iss": "https://iss", "sub": "s1", "aud": "aud1", "c": []any{1, "v", true}, "n": object{"e": []string{"d"}}, "perm": "read v"},
	{"iss": "https://iss", "sub": "s1", "aud": "nobody"},
	{"iss": "third", "sub": "s1", "aud": "aud1"},
	{"iss": "https://iss", "sub": "s1", "aud": "aud1", "exp": 1},
}

type generator struct{ *rand.Rand }

func pick[T any](g generator, list []T) T { return list[g.IntN(len(list))] }

func (g generator) values(pool []string) []string {
	out := []string{pick(g, pool)}
	for g.IntN(4) == 0 {
		out = append(out, pick(g, pool))
	}
	return out
}

// world is a set of policies and where they are looked at from.
type world struct {
	mesh
	text string
	v6   bool
}

type fieldPool struct {
	name string
	pool []string
	// identity fields are refused in CUSTOM policies.
	identity bool
}

var sourceFields = []fieldPool{
	{"principals", principalPool, true}, {"principals", principalPool, true}, {"namespaces", namespacePool, true}, {"requestPrincipals", requestPool, true},
	{"ipBlocks", ipPool, false}, {"remoteIpBlocks", remotePool, false}, {"trustDomains", domainPool, true}, {"serviceAccounts", accountPool, true},
}

var operationFields = []fieldPool{
	{"hosts", hostPool, false}, {"methods", methodPool, false}, {"paths", pathPool, false}, {"paths", pathPool, false}, {"ports", portPool, false},
}

var whenKeys = []fieldPool{
	{"request.headers[x-h]", headerPool, false}, {"request.headers[X-Role]", headerPool, false}, {"request.headers[:method]", methodPool, false}, {"request.headers[:path]", pathPool[:9], false},
	{"request.headers[host]", hostPool, false}, {"request.headers[:authority]", hostPool, false}, {"request.headers[cookie]", headerPool, false},
	{"source.ip", ipPool, false}, {"remote.ip", remotePool, false}, {"source.namespace", namespacePool, true}, {"source.principal", principalPool, true},
	{"source.serviceAccount", accountPool, true}, {"source.trustDomain", domainPool, true}, {"request.auth.principal", requestPool, true}, {"request.auth.audiences", audiencePool, true},
	{"request.auth.presenter", presenterPool, true}, {"request.auth.claims[c]", claimPool, true}, {"request.auth.claims[n][e]", claimPool, true}, {"request.auth.claims[n][l]", claimPool, true},
	{"request.auth.claims[scope]", claimPool, true}, {"request.auth.claims[perm]", claimPool, true}, {"request.auth.claims[iss]", []string{"https://iss", "*"}, true}, {"request.auth.claims[b]", claimPool, true},
	{"destination.ip", destIPPool, false}, {"destination.port", portPool, false}, {"connection.sni", sniPool, false},
	{"experimental.envoy.filters.test[a]", metaPool, false}, {"experimental.envoy.filters.test[b]", metaPool, false},
}

func (g generator) fields(all []fieldPool, custom bool, n int) object {
	o := object{}
	for len(o) < n {
		f := pick(g, all)
		if custom && f.identity {
			continue
		}
		if f.name == "serviceAccounts" && (has(o, "rincipals", "amespaces")) || (f.name == "principals" || f.name == "namespaces") && has(o, "erviceAccounts") {
			continue
		}
		name := f.name
		if g.IntN(3) == 0 {
			name = "not" + strings.ToUpper(name[:1]) + name[1:]
		}
		o[name] = g.values(f.pool)
	}
	return o
}

func has(o object, parts ...string) bool {
	for k := range o {
		for _, p := range parts {
			if strings.Contains(k, p) && !strings.Contains(k, "equest") {
				return true
			}
		}
	}
	return false
}

func (g generator) rule(custom bool, parts int) object {
	r := object{}
	for range parts {
		switch g.IntN(3) {
		case 0:
			r["from"] = g.alternatives(func() object { return object{"source": g.fields(sourceFields, custom, 1+g.IntN(2))} })
		case 1:
			r["to"] = g.alternatives(func() object { return object{"operation": g.fields(operationFields, custom, 1+g.IntN(2))} })
		default:
			var when []object
			for range 1 + g.IntN(2) {
				f := pick(g, whenKeys)
				for custom && f.identity {
					f = pick(g, whenKeys)
				}
				c := object{"key": f.name}
				switch g.IntN(4) {
				case 0:
					c["notValues"] = g.values(f.pool)
				case 1:
					c["values"], c["notValues"] = g.values(f.pool), g.values(f.pool)
				default:
					c["values"] = g.values(f.pool)
				}
				when = append(when, c)
			}
			r["when"] = when
		}
	}
	return r
}

func (g generator) alternatives(one func() object) (list []object) {
	list = append(list, one())
	if g.IntN(3) == 0 {
		list = append(list, one())
	}
	return list
}

func resource(kind, namespace, name string, annotations map[string]string, spec object) string {
	meta := object{"name": name, "namespace": namespace}
	if annotations != nil {
		meta["annotations"] = annotations
	}
	b, err := json.Marshal(object{"apiVersion": "security.istio.io/v1", "kind": kind, "metadata": meta, "spec": spec})
	if err != nil {
		panic(err)
	}
	return string(b)
}

func (g generator) world(keySet string) world {
	w := world{mesh: mesh{
		Namespace: "a", Labels: map[string]string{"app": "server", "v": "1"}, RootNamespace: "root",
		TrustDomain: "own.td", Aliases: []string{"old.td"}, Providers: []string{"ask", "other"},
	}}
	w.v6 = g.IntN(6) == 0
	var docs []string
	policies := 1 + g.IntN(4)
	focus := g.IntN(3) == 0
	if focus {
		policies = 1
	}
	for i := range policies {
		action := []string{"ALLOW", "ALLOW", "ALLOW", "ALLOW", "DENY", "DENY", "DENY", "AUDIT", "CUSTOM", "CUSTOM"}[g.IntN(10)]
		spec := object{"action": action}
		rules := 1 + g.IntN(2)
		if !focus && g.IntN(40) == 0 {
			rules = 12
		}
		var list []object
		for range rules {
			list = append(list, g.rule(action == "CUSTOM", 1+g.IntN(2)))
		}
		spec["rules"] = list
		if (action == "ALLOW" || action == "AUDIT") && g.IntN(15) == 0 {
			delete(spec, "rules")
		}
		if action == "CUSTOM" {
			spec["provider"] = object{"name": "ask"}
			if g.IntN(6) == 0 {
				spec["provider"] = object{"name": "other"}
			}
		}
		if g.IntN(4) == 0 {
			spec["selector"] = object{"matchLabels": pick(g, []object{{"app": "server"}, {"app": "other"}, {"v": "1", "app": "server"}})}
		}
		var annotations map[string]string
		if (action == "ALLOW" || action == "DENY") && g.IntN(6) == 0 {
			annotations = map[string]string{"istio.io/dry-run": pick(g, []string{"true", "false", "1"})}
		}
		ns := []string{"a", "a", "a", "a", "root", "b"}[g.IntN(6)]
		if focus {
			ns = "a"
		}
		docs = append(docs, resource("AuthorizationPolicy", ns, fmt.Sprintf("%c%d", 'a'+rune(g.IntN(6)), i), annotations, spec))
	}
	if g.IntN(3) == 0 {
		spec := object{"mtls": object{"mode": pick(g, []string{"STRICT", "PERMISSIVE", "DISABLE", "UNSET"})}}
		if g.IntN(2) == 0 {
			spec["selector"] = object{"matchLabels": object{"app": "server"}}
			spec["portLevelMtls"] = object{"80": object{"mode": pick(g, []string{"STRICT", "PERMISSIVE", "DISABLE", "UNSET"})}}
		}
		docs = append(docs, resource("PeerAuthentication", "a", "peer", nil, spec))
	}
	if g.IntN(4) > 0 {
		jwt := []object{
			{"issuer": "https://iss", "audiences": []string{"aud1", "aud2"}, "jwks": keySet, "spaceDelimitedClaims": []string{"perm"}, "forwardOriginalToken": g.IntN(2) == 0},
			{"issuer": "other", "jwks": keySet, "forwardOriginalToken": true},
		}
		docs = append(docs, resource("RequestAuthentication", "a", "jwt", nil, object{"jwtRules": jwt[:2-g.IntN(4)/3]}))
	}
	w.text = strings.Join(docs, "\n---\n")
	w.Resources = w.text
	return w
}

func (g generator) connection(v6 bool) connection {
	c := connection{peer: pick(g, peersPool), source: pick(g, sourceAddresses), dst: pick(g, destinations)}
	if v6 {
		c.source, c.dst = "::1", pick(g, destinations6)
	}
	if c.peer != "" {
		c.sni = pick(g, snis)
		c.h2 = g.IntN(3) == 0
	}
	return c
}

func (g generator) shot(c connection, tokens []string) shot {
	s := shot{connection: c, method: pick(g, methodsSent), path: pick(g, pathsSent), authority: pick(g, hostsSent)}
	if c.h2 && g.IntN(6) == 0 {
		s.path = pick(g, pathsH2)
	}
	s.headers = append(s.headers, pick(g, headerSets)...)
	if f := pick(g, forwarded); f != "" {
		s.headers = append(s.headers, [2]string{"x-forwarded-for", f})
	}
	if m := pick(g, metas); m != "" {
		s.headers = append(s.headers, [2]string{"x-meta-a", m})
	}
	if t := pick(g, tokens); t != "" {
		s.headers = append(s.headers, [2]string{"authorization", "Bearer " + t})
	}
	if g.IntN(5) == 0 {
		s.headers = append(s.headers, [2]string{"x-provider", "no"})
	}
	return s
}
