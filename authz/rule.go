package authz

import (
	"bytes"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	security "istio.io/api/security/v1beta1"
)

// rule is a compiled rule: one of from, one of to and all of when must hold. It
// is immutable and shared by programs.
type rule struct {
	*Rule
	// from and to are alternatives; none of them is no condition.
	from, to []conditions
	when     conditions
	// http says that the rule reads an attribute that only HTTP has.
	http bool
}

// conditions must all hold.
type conditions []condition

// condition is one list of values of a policy, or its not-form.
type condition struct {
	reads attribute
	not   bool
	// values is of the type that goes with the attribute.
	values any
}

// attribute is what a condition reads, cheapest first.
type attribute uint8

const (
	readsPort          attribute = iota // ports
	readsMethod                         // *patterns
	readsPath                           // *patterns
	readsHost                           // *patterns
	readsSourceIP                       // *nets
	readsDestinationIP                  // *nets
	readsRemoteIP                       // *nets
	readsPrincipal                      // *patterns
	readsNamespace                      // *namespaces
	readsAccount                        // accounts
	readsTrustDomain                    // trustDomains
	readsSNI                            // *patterns
	readsHeader                         // *headerTest
	readsIdentity                       // identityTest
	readsClaim                          // *claimTest
	readsMetadata                       // *metadataTest
)

// fields are the attributes of a request that the condition reads.
func (c *condition) fields() Field {
	switch c.reads {
	case readsPort:
		return FieldDestinationPort
	case readsMethod:
		return FieldMethod
	case readsPath:
		return FieldPath
	case readsHost:
		return FieldHost
	case readsSourceIP:
		return FieldSourceIP
	case readsDestinationIP:
		return FieldDestinationIP
	case readsRemoteIP:
		return FieldRemoteIP | FieldHeaders | FieldSourceIP
	case readsPrincipal, readsNamespace, readsAccount, readsTrustDomain:
		return FieldPeer | FieldPrincipal
	case readsSNI:
		return FieldSNI
	case readsHeader:
		switch c.values.(*headerTest).name {
		case ":method":
			return FieldMethod
		case ":path":
			return FieldPath
		case ":authority", "host":
			return FieldHost
		}
		return FieldHeaders
	case readsIdentity, readsClaim:
		return FieldClaims
	case readsMetadata:
		return FieldMetadata
	}
	return ^Field(0)
}

// fields are the attributes of a request that the rule reads.
func (r *rule) fields() (f Field) {
	for _, alternatives := range [...][]conditions{r.from, r.to, {r.when}} {
		for _, cs := range alternatives {
			for i := range cs {
				f |= cs[i].fields()
			}
		}
	}
	return f
}

// names appends what of a request the rule reads by name.
func (r *rule) names(out []Name) []Name {
	add := func(n Name) {
		if !slices.Contains(out, n) {
			out = append(out, n)
		}
	}
	for _, alternatives := range [...][]conditions{r.from, r.to, {r.when}} {
		for _, cs := range alternatives {
			for i := range cs {
				switch c := &cs[i]; c.reads {
				case readsHeader:
					add(Name{Field: FieldHeaders, Name: c.values.(*headerTest).name})
				case readsClaim:
					add(Name{Field: FieldClaims, Name: c.values.(*claimTest).path[0]})
				case readsIdentity:
					add(Name{Field: FieldClaims, Name: "iss"})
					add(Name{Field: FieldClaims, Name: "sub"})
				case readsMetadata:
					t := c.values.(*metadataTest)
					add(Name{FieldMetadata, t.key, t.filter})
				}
			}
		}
	}
	return out
}

// language is what compiling a rule depends on besides the rule.
type language struct {
	// asterisk says that a template's segment may have a star in it.
	asterisk bool
	// joins says that the values of a header are matched as one.
	joins bool
}

// builder compiles one rule.
type builder struct {
	language
	namespace string
	tcp       bool
	// strict says that what cannot be compiled takes the whole rule with it, as
	// Istio has it for ALLOW; else it is left out, which makes the rule wider.
	strict bool
	http   bool
	failed bool
}

// newRule compiles a rule for requests or for bare connections. It returns nil
// if it can never match.
func newRule(meta *Rule, spec *security.Rule, l language, tcp bool) *rule {
	b := &builder{language: l, namespace: meta.Namespace, tcp: tcp, strict: meta.Action == ActionAllow}
	r := &rule{Rule: meta}
	for _, f := range spec.GetFrom() {
		r.from = append(r.from, b.source(f.GetSource()))
	}
	for _, t := range spec.GetTo() {
		r.to = append(r.to, b.operation(t.GetOperation()))
	}
	for _, w := range spec.GetWhen() {
		r.when = b.when(r.when, w)
	}
	if b.failed {
		return nil
	}
	for _, alternatives := range [][]conditions{r.from, r.to, {r.when}} {
		for _, cs := range alternatives {
			slices.SortStableFunc(cs, func(a, b condition) int { return int(a.reads) - int(b.reads) })
		}
	}
	r.http = b.http
	return r
}

// fail is what Istio's generator does about what it cannot generate.
func (b *builder) fail() { b.failed = b.failed || b.strict }

// both adds a list of values and its not-form.
func both[T any](b *builder, cs conditions, reads attribute, values, not []string, compile func([]string) T) conditions {
	if len(values)+len(not) == 0 {
		return cs
	}
	switch reads {
	case readsHost, readsMethod, readsPath, readsHeader, readsIdentity, readsClaim:
		b.http = true
		if b.tcp {
			b.fail()
			return cs
		}
	}
	if len(values) > 0 {
		cs = append(cs, condition{reads, false, compile(values)})
	}
	if len(not) > 0 {
		cs = append(cs, condition{reads, true, compile(not)})
	}
	return cs
}

func (b *builder) source(s *security.Source) (cs conditions) {
	cs = both(b, cs, readsPrincipal, s.GetPrincipals(), s.GetNotPrincipals(), principalPatterns)
	cs = both(b, cs, readsIdentity, s.GetRequestPrincipals(), s.GetNotRequestPrincipals(), newIdentities)
	cs = both(b, cs, readsAccount, s.GetServiceAccounts(), s.GetNotServiceAccounts(), b.accounts)
	cs = both(b, cs, readsTrustDomain, s.GetTrustDomains(), s.GetNotTrustDomains(), newTrustDomains)
	cs = both(b, cs, readsNamespace, s.GetNamespaces(), s.GetNotNamespaces(), newNamespaces)
	cs = both(b, cs, readsRemoteIP, s.GetRemoteIpBlocks(), s.GetNotRemoteIpBlocks(), newNets)
	return both(b, cs, readsSourceIP, s.GetIpBlocks(), s.GetNotIpBlocks(), newNets)
}

func (b *builder) operation(o *security.Operation) (cs conditions) {
	cs = both(b, cs, readsHost, o.GetHosts(), o.GetNotHosts(), hostPatterns)
	cs = both(b, cs, readsMethod, o.GetMethods(), o.GetNotMethods(), headerPatterns)
	cs = both(b, cs, readsPath, o.GetPaths(), o.GetNotPaths(), func(v []string) *patterns { return pathPatterns(v, b.asterisk) })
	return both(b, cs, readsPort, o.GetPorts(), o.GetNotPorts(), newPorts)
}

// The keys of conditions. Those with a name in brackets are recognised by how
// they begin, as in Istio.
const (
	keyHeaders  = "request.headers"
	keyClaims   = "request.auth.claims"
	keyMetadata = "experimental.envoy.filters."
)

func (b *builder) when(cs conditions, w *security.Condition) conditions {
	k, values, not := w.GetKey(), w.GetValues(), w.GetNotValues()
	switch {
	case k == "destination.ip":
		return both(b, cs, readsDestinationIP, values, not, newNets)
	case k == "destination.port":
		return both(b, cs, readsPort, values, not, newPorts)
	case k == "connection.sni":
		return both(b, cs, readsSNI, values, not, sniPatterns)
	case strings.HasPrefix(k, keyMetadata):
		if _, ok := newMetadata(k, nil); !ok {
			b.fail()
			return cs
		}
		return both(b, cs, readsMetadata, values, not, func(v []string) *metadataTest {
			t, _ := newMetadata(k, v)
			return &t
		})
	case k == "source.ip":
		return both(b, cs, readsSourceIP, values, not, newNets)
	case k == "remote.ip":
		return both(b, cs, readsRemoteIP, values, not, newNets)
	case k == "source.namespace":
		return both(b, cs, readsNamespace, values, not, newNamespaces)
	case k == "source.trustDomain":
		return both(b, cs, readsTrustDomain, values, not, newTrustDomains)
	case k == "source.serviceAccount":
		return both(b, cs, readsAccount, values, not, b.accounts)
	case k == "source.principal":
		return both(b, cs, readsPrincipal, values, not, principalPatterns)
	case k == "request.auth.principal":
		return both(b, cs, readsIdentity, values, not, newIdentities)
	case k == "request.auth.audiences":
		return b.claim(cs, []string{"aud"}, values, not)
	case k == "request.auth.presenter":
		return b.claim(cs, []string{"azp"}, values, not)
	case strings.HasPrefix(k, keyHeaders):
		name, ok := bracketed(strings.TrimPrefix(k, keyHeaders))
		if !ok {
			b.fail()
			return cs
		}
		name = lowerASCII(name)
		return both(b, cs, readsHeader, values, not, func(v []string) *headerTest { return &headerTest{name, headerPatterns(v)} })
	case strings.HasPrefix(k, keyClaims):
		path, ok := claimPath(strings.TrimPrefix(k, keyClaims))
		if !ok {
			b.fail()
			return cs
		}
		return b.claim(cs, path, values, not)
	}
	// An unknown attribute. The rule is left out whatever its action, as Istio does,
	// which would open a door if it were a DENY. It does not come to that: admission
	// refuses such keys, and a policy that it refuses is never compiled, but kept in its
	// last good version or enforced as denying what it selects.
	b.failed = true
	return cs
}

func (b *builder) claim(cs conditions, path []string, values, not []string) conditions {
	return both(b, cs, readsClaim, values, not, func(v []string) *claimTest { return &claimTest{path, newPatterns(v, nonempty)} })
}

// headerPatterns match the values of a header, where "*" is presence.
func headerPatterns(values []string) *patterns { return newPatterns(values, present) }

// ports are sorted.
type ports []uint16

func newPorts(values []string) ports {
	ps := make(ports, 0, len(values))
	for _, v := range values {
		if n, err := strconv.ParseUint(v, 10, 16); err == nil {
			ps = append(ps, uint16(n))
		}
	}
	slices.Sort(ps)
	return ps
}

// accounts are service accounts. To Istio each is the regular expression
// spiffe://.+/ns/NAMESPACE/(.+/|)sa/NAME(/.+)? on a whole name, which has a fixed
// shape.
type accounts []account

type account struct{ namespace, name string }

// accounts compiles values; one without a namespace is of the policy's own.
func (b *builder) accounts(values []string) accounts {
	out := make(accounts, len(values))
	for i, v := range values {
		if ns, name, ok := strings.Cut(v, "/"); ok {
			out[i] = account{ns, name}
		} else {
			out[i] = account{b.namespace, v}
		}
	}
	return out
}

func (as accounts) match(name []byte) truth {
	for _, a := range as {
		if a.match(name) {
			if clean(name) {
				return yes
			}
			return maybe
		}
	}
	return no
}

func (a account) match(name []byte) bool {
	if len(name) <= len(scheme) || string(name[:len(scheme)]) != scheme {
		return false
	}
	for rest := name[len(scheme)+1:]; ; {
		i := bytes.Index(rest, []byte("/ns/"))
		if i < 0 {
			return false
		}
		rest = rest[i+len("/ns"):] // "/ns/ns/" holds two marks
		below := rest[1:]
		if len(below) <= len(a.namespace) || string(below[:len(a.namespace)]) != a.namespace || below[len(a.namespace)] != '/' {
			continue
		}
		if a.below(below[len(a.namespace)+1:]) {
			return true
		}
	}
}

// below matches what follows /ns/NAMESPACE/.
func (a account) below(b []byte) bool {
	if bytes.HasPrefix(b, []byte("sa/")) && a.named(b[len("sa/"):]) {
		return true
	}
	for i := 1; i < len(b); {
		n := bytes.Index(b[i:], []byte("/sa/"))
		if n < 0 {
			return false
		}
		if i += n; a.named(b[i+len("/sa/"):]) {
			return true
		}
		i++
	}
	return false
}

func (a account) named(b []byte) bool {
	n := len(a.name)
	return len(b) >= n && string(b[:n]) == a.name && (len(b) == n || b[n] == '/' && len(b) > n+1)
}

// trustDomains are values of a trust domain, which Istio reads from the beginning
// of a name. One star stands for any text without a slash.
type trustDomains []trustDomain

type trustDomain struct {
	// The name begins with first; if there was a star, text without a slash and
	// last follow, and then anything. star alone means any SPIFFE ID.
	first, last string
	star        bool
}

func newTrustDomains(values []string) trustDomains {
	out := make(trustDomains, len(values))
	for i, v := range values {
		first, last, star := strings.Cut(v, "*")
		switch {
		case v == "*":
			out[i] = trustDomain{first: scheme}
		case !star:
			out[i] = trustDomain{first: scheme + v + "/"}
		default:
			out[i] = trustDomain{scheme + first, last + "/", true}
		}
	}
	return out
}

func (ts trustDomains) match(name []byte) truth {
	best := no
	for _, t := range ts {
		if len(name) < len(t.first) || string(name[:len(t.first)]) != t.first {
			continue
		}
		if !t.star {
			return yes
		}
		for rest := name[len(t.first):]; ; rest = rest[1:] {
			if len(rest) >= len(t.last) && string(rest[:len(t.last)]) == t.last {
				if clean(name) {
					return yes
				}
				best = maybe
				break
			}
			if len(rest) == 0 || rest[0] == '/' {
				break
			}
		}
	}
	return best
}

// view is a request as the rules read it, prepared once for all of them.
type view struct {
	*Request
	// peer says what is known of the peer's names: no if there certainly are
	// none, yes if they are all known.
	peer truth
	// path has no query and no fragment, host no upper-case letters.
	path, host []byte
	// remote is the remote address once somebody asked for it, which derived says;
	// zero if it cannot be known.
	remote  netip.Addr
	derived bool
	// joins says that the values of a header are matched as one.
	joins bool
}

func newView(r *Request, l language) view {
	v := view{Request: r, peer: maybe, path: r.Path, host: r.Host, joins: l.joins}
	switch {
	case r.Known&FieldPeer == 0:
	case !r.Authenticated:
		v.peer = no
	case r.Known&FieldPrincipal != 0:
		v.peer = yes
	}
	v.cutPath()
	return v
}

// sees makes path and host those of the request.
func (v *view) sees() {
	v.path, v.host = v.Path, v.Host
	v.cutPath()
}

// cutPath leaves out the query and the fragment, as Envoy's path matcher does.
func (v *view) cutPath() {
	for i, c := range v.path {
		if c == '?' || c == '#' {
			v.path = v.path[:i]
			break
		}
	}
}

// match evaluates the rule.
func (c *rule) match(v *view) truth {
	t := c.when.match(v)
	if t != no {
		t = min(t, anyOf(c.to, v))
	}
	if t != no {
		t = min(t, anyOf(c.from, v))
	}
	return t
}

// anyOf is true of no alternatives at all: a rule without "from" is about every
// peer.
func anyOf(alternatives []conditions, v *view) truth {
	if len(alternatives) == 0 {
		return yes
	}
	best := no
	for _, cs := range alternatives {
		t := cs.match(v)
		if t == yes {
			return yes
		}
		best = max(best, t)
	}
	return best
}

func (cs conditions) match(v *view) truth {
	t := yes
	for i := range cs {
		c := &cs[i]
		u := c.match(v)
		if c.not {
			u = u.not()
		}
		if u == no {
			return no
		}
		t = min(t, u)
	}
	return t
}

// match evaluates the values, whichever form they are in.
func (c *condition) match(v *view) truth {
	switch c.reads {
	case readsPort:
		return v.port(c.values.(ports))
	case readsMethod:
		return v.text(FieldMethod, v.Method, c.values.(*patterns))
	case readsPath:
		return v.text(FieldPath, v.path, c.values.(*patterns))
	case readsHost:
		return v.text(FieldHost, v.host, c.values.(*patterns))
	case readsSourceIP:
		return v.source(c.values.(*nets))
	case readsDestinationIP:
		return v.destination(c.values.(*nets))
	case readsRemoteIP:
		return v.remoteIP(c.values.(*nets))
	case readsPrincipal, readsNamespace, readsAccount, readsTrustDomain:
		return c.ofPeer(v)
	case readsSNI:
		return v.serverName(c.values.(*patterns))
	case readsHeader:
		return v.header(c.values.(*headerTest))
	case readsIdentity:
		return v.identity(c.values.(identityTest))
	case readsClaim:
		return v.claim(c.values.(*claimTest))
	case readsMetadata:
		return v.metadata(c.values.(*metadataTest))
	}
	return maybe
}

// ofPeer holds the names of the peer against the values, of which one must match.
func (c *condition) ofPeer(v *view) truth {
	if v.peer != yes {
		return v.peer
	}
	t := c.name(v.Principal)
	for _, n := range v.OtherNames {
		t = max(t, c.name(n))
	}
	return t
}

func (c *condition) name(n []byte) truth {
	switch c.reads {
	case readsPrincipal:
		return c.values.(*patterns).match(n)
	case readsNamespace:
		return c.values.(*namespaces).match(n)
	case readsAccount:
		return c.values.(accounts).match(n)
	}
	return c.values.(trustDomains).match(n)
}

// text holds an attribute against patterns. An absent one matches none, so it
// satisfies every not-form.
func (v *view) text(f Field, value []byte, p *patterns) truth {
	switch {
	case v.Known&f == 0:
		return maybe
	case value == nil:
		return no
	}
	return p.match(value)
}

func (v *view) serverName(p *patterns) truth {
	if v.Known&FieldSNI == 0 {
		return maybe
	}
	var buf [256]byte // longer than any server name in TLS
	return p.match(lower(v.SNI, buf[:]))
}

func (v *view) source(n *nets) truth {
	if v.Known&FieldSourceIP == 0 || !v.SourceIP.IsValid() {
		return maybe
	}
	return n.match(v.SourceIP.Unmap().WithZone(""))
}

func (v *view) destination(n *nets) truth {
	if v.Known&FieldDestinationIP == 0 || !v.DestinationIP.IsValid() {
		return maybe
	}
	return n.match(v.DestinationIP.Unmap().WithZone(""))
}

func (v *view) remoteIP(n *nets) truth {
	if a := v.remoteAddress(); a.IsValid() {
		return n.match(a)
	}
	return maybe
}

func (v *view) remoteAddress() netip.Addr {
	if !v.derived {
		v.remote, v.derived = v.deriveRemote(), true
	}
	return v.remote
}

// deriveRemote is the original client as a sidecar of Istio has it: the last
// entry of X-Forwarded-For, which the client controls, or else the peer. It is zero
// if that cannot be known.
func (v *view) deriveRemote() (a netip.Addr) {
	if v.Known&FieldRemoteIP != 0 {
		return v.RemoteIP.WithZone("")
	}
	if v.HTTP {
		if v.Known&FieldHeaders == 0 {
			return a
		}
		if a, ok, sure := forwardedFor(v.Headers); ok || !sure {
			return a
		}
	}
	if v.Known&FieldSourceIP == 0 {
		return a
	}
	return v.SourceIP.Unmap().WithZone("")
}

func (v *view) port(ps ports) truth {
	if v.Known&FieldDestinationPort == 0 {
		return maybe
	}
	_, found := slices.BinarySearch(ps, v.DestinationPort)
	return toTruth(found)
}
