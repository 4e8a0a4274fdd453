package authz_test

import (
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
)

// What one value of a policy says of a request, field by field.

// names are what Envoy's authenticated matcher tries, or what is known of them.
func names(r *authz.Request) (list [][]byte, known bool) {
	if r.Known&authz.FieldPeer == 0 {
		return nil, false
	}
	if !r.Authenticated {
		return nil, true
	}
	return append([][]byte{r.Principal}, r.OtherNames...), r.Known&authz.FieldPrincipal != 0
}

var (
	compiled     sync.Map
	compiledSize atomic.Int64
)

// full is RE2's full match; what "." does with odd bytes is unknown.
func full(expr string, b []byte) int {
	re, ok := compiled.Load(expr)
	if !ok {
		re = regexp.MustCompile(`\A(?s:` + expr + `)\z`)
		if compiledSize.Add(1) < 10_000 { // a fuzzer has ever new ones
			compiled.Store(expr, re)
		}
	}
	if !re.(*regexp.Regexp).Match(b) {
		return isFalse
	}
	if strings.ContainsAny(string(b), "\n") || strings.ToValidUTF8(string(b), "\uFFFD!") != string(b) {
		return isUnknown
	}
	return isTrue
}

// anyName is the "or" over the names of the peer.
func anyName(r *authz.Request, one func(name []byte) int) int {
	list, known := names(r)
	if !known {
		return isUnknown
	}
	or := isFalse
	for _, name := range list {
		or = max(or, one(name))
	}
	return or
}

func naivePrincipal(v string, r *authz.Request) int {
	return anyName(r, func(name []byte) int {
		switch {
		case v == "*":
			return full(".+", name)
		case strings.HasPrefix(v, "*"):
			return full("spiffe://.*"+regexp.QuoteMeta(v[1:]), name)
		case strings.HasSuffix(v, "*"):
			return truth(strings.HasPrefix(string(name), "spiffe://"+v[:len(v)-1]))
		}
		return truth(string(name) == "spiffe://"+v)
	})
}

func naiveNamespace(v string, r *authz.Request) int {
	expr := ".*/ns/" + strings.ReplaceAll(regexp.QuoteMeta(v), `\*`, ".*") + "/.*"
	return anyName(r, func(name []byte) int { return full(expr, name) })
}

func naiveAccount(policyNamespace string) func(string, *authz.Request) int {
	return func(v string, r *authz.Request) int {
		ns, sa, ok := strings.Cut(v, "/")
		if !ok {
			ns, sa = policyNamespace, v
		}
		expr := "spiffe://.+/ns/" + regexp.QuoteMeta(ns) + "/(.+/|)sa/" + regexp.QuoteMeta(sa) + "(/.+)?"
		return anyName(r, func(name []byte) int { return full(expr, name) })
	}
}

func naiveDomain(v string, r *authz.Request) int {
	return anyName(r, func(name []byte) int {
		before, after, star := strings.Cut(v, "*")
		switch {
		case v == "*":
			return truth(strings.HasPrefix(string(name), "spiffe://"))
		case !star:
			return truth(strings.HasPrefix(string(name), "spiffe://"+v+"/"))
		}
		return full("spiffe://"+regexp.QuoteMeta(before)+"[^/]*"+regexp.QuoteMeta(after)+"/.*", name)
	})
}

func inBlock(v string, ip netip.Addr) int {
	if !strings.Contains(v, "/") {
		a := netip.MustParseAddr(v)
		v += "/" + strconv.Itoa(a.BitLen())
	}
	return truth(netip.MustParsePrefix(v).Contains(ip))
}

func naiveSourceIP(v string, r *authz.Request) int {
	if r.Known&authz.FieldSourceIP == 0 {
		return isUnknown
	}
	return inBlock(v, r.SourceIP)
}

func naiveDestinationIP(v string, r *authz.Request) int {
	if r.Known&authz.FieldDestinationIP == 0 {
		return isUnknown
	}
	return inBlock(v, r.DestinationIP)
}

// naiveRemoteIP: at a sidecar the last entry of X-Forwarded-For, or else the peer.
func naiveRemoteIP(v string, r *authz.Request) int {
	if r.Known&authz.FieldRemoteIP != 0 {
		return inBlock(v, r.RemoteIP)
	}
	if r.HTTP {
		if r.Known&authz.FieldHeaders == 0 {
			return isUnknown
		}
		var last string
		for _, h := range r.Headers {
			if h.Name == "x-forwarded-for" {
				if h.Form == authz.HeaderUnclear {
					return isUnknown
				}
				last = string(h.Value)
			}
		}
		parts := strings.Split(last, ",")
		if ip, err := netip.ParseAddr(strings.Trim(parts[len(parts)-1], " \t")); err == nil && ip.Zone() == "" {
			return inBlock(v, ip)
		}
	}
	return naiveSourceIP(v, r)
}

func naivePort(v string, r *authz.Request) int {
	if r.Known&authz.FieldDestinationPort == 0 {
		return isUnknown
	}
	n, _ := strconv.Atoi(v)
	return truth(n == int(r.DestinationPort))
}

// text is Istio's StringMatcher; presence is what "*" means for headers.
func text(v, s string, presence bool) int {
	switch {
	case v == "*" && presence:
		return isTrue
	case v == "*":
		return full(".+", []byte(s))
	case strings.HasPrefix(v, "*"):
		return truth(strings.HasSuffix(s, v[1:]))
	case strings.HasSuffix(v, "*"):
		return truth(strings.HasPrefix(s, v[:len(v)-1]))
	}
	return truth(s == v)
}

func lower(s string) string {
	b := []byte(s)
	for i := range b {
		if strings.IndexByte("ABCDEFGHIJKLMNOPQRSTUVWXYZ", b[i]) >= 0 {
			b[i] |= 0x20
		}
	}
	return string(b)
}

func naiveHost(v string, r *authz.Request) int {
	switch {
	case r.Known&authz.FieldHost == 0:
		return isUnknown
	case r.Host == nil:
		return isFalse
	}
	return text(lower(v), lower(string(r.Host)), true)
}

func naiveMethod(v string, r *authz.Request) int {
	switch {
	case r.Known&authz.FieldMethod == 0:
		return isUnknown
	case r.Method == nil:
		return isFalse
	}
	return text(v, string(r.Method), true)
}

func naiveSNI(v string, r *authz.Request) int {
	if r.Known&authz.FieldSNI == 0 {
		return isUnknown
	}
	return text(v, lower(string(r.SNI)), false)
}

var query = regexp.MustCompile(`(?s)[?#].*`)

const pchar = `a-zA-Z0-9\-._~%!$&'()*+,;:@=`

func naivePath(v string, r *authz.Request) int {
	switch {
	case r.Known&authz.FieldPath == 0:
		return isUnknown
	case r.Path == nil:
		return isFalse
	}
	path := query.ReplaceAllString(string(r.Path), "")
	if strings.Contains(v, "{*}") || strings.Contains(v, "{**}") {
		expr := regexp.QuoteMeta(v)
		expr = strings.ReplaceAll(expr, `\{\*\*\}`, "["+pchar+"/]*")
		expr = strings.ReplaceAll(expr, `\{\*\}`, "["+pchar+"]+")
		return full(expr, []byte(path))
	}
	return text(v, path, false)
}

// naiveHeader is about all values of the list at once: how a joined header is to be
// split is one question, not one for each.
func naiveHeader(name string) func([]string, *authz.Request) int {
	return func(values []string, r *authz.Request) int {
		any := func(s string) (or int) {
			for _, v := range values {
				or = max(or, text(v, s, true))
			}
			return or
		}
		name := strings.ToLower(name)
		one := func(known authz.Field, value []byte) int {
			switch {
			case r.Known&known == 0:
				return isUnknown
			case value == nil:
				return isFalse
			}
			return any(string(value))
		}
		switch name {
		case ":method":
			return one(authz.FieldMethod, r.Method)
		case ":path":
			return one(authz.FieldPath, r.Path)
		case ":authority", "host":
			return one(authz.FieldHost, r.Host)
		}
		or := isFalse
		for _, h := range r.Headers {
			if h.Name != name {
				continue
			}
			switch h.Form {
			case authz.HeaderValue:
				or = max(or, any(string(h.Value)))
			case authz.HeaderJoined:
				or = max(or, joined(any, strings.Split(string(h.Value), ",")))
			case authz.HeaderUnclear:
				if slices.Contains(values, "*") {
					return isTrue
				}
				or = max(or, isUnknown)
			}
		}
		if or != isTrue && r.Known&authz.FieldHeaders == 0 {
			return isUnknown
		}
		return or
	}
}

// joined goes through all ways to split a joined value: each comma is between two
// values, or in one.
func joined(any func(string) int, parts []string) int {
	yes, no := false, false
	for mask := range 1 << (len(parts) - 1) {
		or := isFalse
		value := parts[0]
		for i, p := range parts[1:] {
			if mask&(1<<i) != 0 {
				or = max(or, any(value))
				value = p
			} else {
				value += "," + p
			}
		}
		if max(or, any(value)) == isTrue {
			yes = true
		} else {
			no = true
		}
	}
	switch {
	case yes && no:
		return isUnknown
	case yes:
		return isTrue
	}
	return isFalse
}

// at follows a path of keys; nil if there is nothing.
func at(s *structpb.Struct, keys ...string) *structpb.Value {
	v := structpb.NewStructValue(s)
	for _, k := range keys {
		v = v.GetStructValue().GetFields()[k]
	}
	return v
}

func stringOrList(v string, value *structpb.Value) int {
	or := isFalse
	switch k := value.GetKind().(type) {
	case *structpb.Value_StringValue:
		return text(v, k.StringValue, false)
	case *structpb.Value_ListValue:
		for _, e := range k.ListValue.GetValues() {
			if s, ok := e.GetKind().(*structpb.Value_StringValue); ok {
				or = max(or, text(v, s.StringValue, false))
			}
		}
	}
	return or
}

func naiveClaim(keys ...string) func(string, *authz.Request) int {
	return func(v string, r *authz.Request) int {
		if r.Known&authz.FieldClaims == 0 {
			return isUnknown
		}
		return stringOrList(v, at(r.Claims, keys...))
	}
}

// naiveRequestPrincipal splits at the last slash, because an issuer may be a URL.
func naiveRequestPrincipal(v string, r *authz.Request) int {
	if r.Known&authz.FieldClaims == 0 {
		return isUnknown
	}
	is := func(claim string, one func(string) int) int {
		s, ok := at(r.Claims, claim).GetKind().(*structpb.Value_StringValue)
		if !ok {
			return isFalse
		}
		return one(s.StringValue)
	}
	exact := func(w string) func(string) int { return func(s string) int { return truth(s == w) } }
	prefix := func(w string) func(string) int { return func(s string) int { return truth(strings.HasPrefix(s, w)) } }
	suffix := func(w string) func(string) int { return func(s string) int { return truth(strings.HasSuffix(s, w)) } }
	some := func(s string) int { return full(".+", []byte(s)) }
	i := strings.LastIndexByte(v, '/')
	iss, sub := v, ""
	if i >= 0 {
		iss, sub = v[:i], v[i+1:]
	}
	var issuer, subject func(string) int
	switch {
	case v == "*":
		issuer, subject = some, some
	case v[0] == '*' && i < 0:
		issuer, subject = some, suffix(v[1:])
	case iss == "*":
		issuer, subject = some, exact(sub)
	case v[0] == '*':
		issuer, subject = suffix(strings.TrimPrefix(iss, "*")), exact(sub)
	case v[len(v)-1] == '*' && i < 0:
		issuer, subject = prefix(v[:len(v)-1]), some
	case sub == "*":
		issuer, subject = exact(iss), some
	case v[len(v)-1] == '*':
		issuer, subject = exact(iss), prefix(sub[:len(sub)-1])
	default:
		issuer, subject = exact(iss), exact(sub)
	}
	return min(is("iss", issuer), is("sub", subject))
}

func naiveMetadata(filter, key string) func(string, *authz.Request) int {
	return func(v string, r *authz.Request) int {
		s, ok := r.Metadata[filter]
		if !ok && r.Known&authz.FieldMetadata == 0 {
			return isUnknown
		}
		value := at(s, key)
		if strings.HasPrefix(v, "[") && strings.HasSuffix(v, "]") {
			if _, ok := value.GetKind().(*structpb.Value_ListValue); !ok {
				return isFalse
			}
			return stringOrList(strings.Trim(v, "[]"), value)
		}
		if _, ok := value.GetKind().(*structpb.Value_StringValue); !ok {
			return isFalse
		}
		return stringOrList(v, value)
	}
}
