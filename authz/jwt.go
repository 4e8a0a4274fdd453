package authz

import (
	"bytes"
	"cmp"
	"iter"
	"slices"
	"strings"

	"google.golang.org/protobuf/types/known/structpb"
	security "istio.io/api/security/v1beta1"
)

// TokenRule is one rule of a RequestAuthentication that selects a workload.
type TokenRule struct {
	// Namespace and Name are those of the resource, Index is the rule's index in
	// it.
	Namespace, Name string
	Index           int
	// Origin and Line are where the resource stands.
	Origin string
	Line   int
	// Spec is the rule. It must not be changed.
	Spec *security.JWTRule
}

// tokenRule is a compiled TokenRule.
type tokenRule struct {
	*TokenRule
	by        *Rule // what a decision names
	issuer    string
	audiences []string
	headers   []tokenHeader
	params    []string
	cookies   []string
}

// tokenHeader is a place of a token: after the prefix, wherever that stands in the
// header's value.
type tokenHeader struct {
	name   string
	prefix []byte
}

func newTokenRule(t *TokenRule, by *Rule) tokenRule {
	j := t.Spec
	r := tokenRule{TokenRule: t, by: by, issuer: j.GetIssuer(), audiences: j.GetAudiences(), params: j.GetFromParams(), cookies: j.GetFromCookies()}
	for _, h := range j.GetFromHeaders() {
		r.headers = append(r.headers, tokenHeader{lowerASCII(h.GetName()), []byte(h.GetPrefix())})
	}
	if len(r.headers)+len(r.params)+len(r.cookies) == 0 {
		r.headers = []tokenHeader{{"authorization", []byte("Bearer ")}}
		r.params = []string{"access_token"}
	}
	return r
}

// tokens are the rules of all RequestAuthentications that select a workload:
// they add up. A request without a token passes without a request identity; one
// whose token is not good for any rule is refused.
type tokens []tokenRule

// check refuses a request with a bad token, or one that may have one. Whether a
// token is good was found by the proxy, which hands on its claims; a token without
// them was not.
// It returns in whose name and why, or an empty reason.
func (ts tokens) check(v *view) (*Rule, Reason) {
	if !v.HTTP || v.preflight() {
		return nil, ""
	}
	if v.Known&FieldClaims == 0 {
		return ts[0].by, ReasonTokenUnknown
	}
	if v.Claims == nil {
		var doubt *Rule
		for i := range ts {
			switch ts[i].present(v) {
			case yes:
				return ts[i].by, ReasonTokenRefused
			case maybe:
				doubt = cmp.Or(doubt, ts[i].by)
			}
		}
		if doubt != nil {
			return doubt, ReasonTokenUnknown
		}
		return nil, ""
	}
	fields := v.Claims.GetFields()
	iss, ok := fields["iss"].GetKind().(*structpb.Value_StringValue)
	if !ok && fields["iss"] != nil {
		return ts[0].by, ReasonTokenForeign
	}
	if _, ok := fields["sub"].GetKind().(*structpb.Value_StringValue); !ok && fields["sub"] != nil {
		return ts[0].by, ReasonTokenForeign
	}
	for i := range ts {
		if (ts[i].issuer == "" || iss != nil && iss.StringValue == ts[i].issuer) && ts[i].audience(fields["aud"]) {
			return nil, ""
		}
	}
	return ts[0].by, ReasonTokenForeign
}

// audience reports whether the rule takes one of the audiences.
func (t *tokenRule) audience(aud *structpb.Value) bool {
	if len(t.audiences) == 0 {
		return true
	}
	if s, ok := aud.GetKind().(*structpb.Value_StringValue); ok {
		return slices.Contains(t.audiences, s.StringValue)
	}
	for _, e := range aud.GetListValue().GetValues() {
		if slices.Contains(t.audiences, e.GetStringValue()) {
			return true
		}
	}
	return false
}

// preflight reports whether the request certainly is a CORS preflight, which Istio
// has jwt_authn let by: both headers must have a value.
func (v *view) preflight() bool {
	return v.Known&(FieldMethod|FieldHeaders) == FieldMethod|FieldHeaders && string(v.Method) == "OPTIONS" &&
		v.has("origin") && v.has("access-control-request-method")
}

// has reports whether a header is there with a value.
func (v *view) has(name string) bool {
	for i := range v.Headers {
		if h := &v.Headers[i]; h.Name == name && len(h.Value) > 0 {
			return true
		}
	}
	return false
}

// present says whether the request has a token where the rule looks for one.
func (t *tokenRule) present(v *view) truth {
	best := no
	if v.Known&FieldHeaders == 0 && len(t.headers)+len(t.cookies) > 0 {
		best = maybe // those that are there may not be all
	}
	for i := range v.Headers {
		h := &v.Headers[i]
		for _, at := range t.headers {
			if h.Name == at.name && (len(at.prefix) == 0 || bytes.Contains(h.Value, at.prefix)) {
				return yes
			}
		}
		if h.Name == "cookie" && len(t.cookies) > 0 && hasCookie(h.Value, t.cookies) {
			return yes
		}
		if h.Form == HeaderHidden && t.looksAt(h.Name) {
			best = maybe
		}
	}
	if len(t.params) > 0 {
		// A path that is not known byte by byte still shows its parameters.
		if hasParam(v.Request.Path, t.params) {
			return yes
		}
		if v.Known&FieldPath == 0 && v.Request.Path == nil {
			best = maybe
		}
	}
	return best
}

// looksAt reports whether the rule looks for tokens in a header.
func (t *tokenRule) looksAt(name string) bool {
	return name == "cookie" && len(t.cookies) > 0 ||
		slices.ContainsFunc(t.headers, func(at tokenHeader) bool { return at.name == name })
}

func hasCookie(header []byte, names []string) bool {
	for len(header) > 0 {
		var pair []byte
		pair, header, _ = bytes.Cut(header, []byte(";"))
		name, _, ok := bytes.Cut(bytes.TrimSpace(pair), []byte("="))
		if ok && contains(names, name) {
			return true
		}
	}
	return false
}

func hasParam(path []byte, names []string) bool {
	_, query, _ := bytes.Cut(path, []byte("?"))
	query, _, _ = bytes.Cut(query, []byte("#"))
	for len(query) > 0 {
		var pair []byte
		pair, query, _ = bytes.Cut(query, []byte("&"))
		name, _, _ := bytes.Cut(pair, []byte("="))
		for _, want := range names {
			if unescapesTo(name, want) {
				return true
			}
		}
	}
	return false
}

func contains(names []string, b []byte) bool {
	for _, n := range names {
		if n == string(b) {
			return true
		}
	}
	return false
}

// unescapesTo reports whether b is want once its percent encoding is undone.
func unescapesTo(b []byte, want string) bool {
	for len(b) > 0 {
		c, n := b[0], 1
		if c == '%' && len(b) > 2 {
			hi, lo := strings.IndexByte(hexDigits, b[1]), strings.IndexByte(hexDigits, b[2])
			if hi >= 0 && lo >= 0 {
				c, n = byte(unhex(hi)<<4|unhex(lo)), 3
			}
		}
		if want == "" || want[0] != c {
			return false
		}
		b, want = b[n:], want[1:]
	}
	return want == ""
}

const hexDigits = "0123456789abcdefABCDEF"

func unhex(i int) int {
	if i > 15 {
		i -= 6
	}
	return i
}

// TokenRules iterates over the rules of the RequestAuthentications that select
// the workload, by namespace, name and index.
func (p *Program) TokenRules() iter.Seq[TokenRule] {
	return func(yield func(TokenRule) bool) {
		if p == nil {
			return
		}
		for i := range p.tokens {
			if !yield(*p.tokens[i].TokenRule) {
				return
			}
		}
	}
}
