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

// TokenRule is one rule of a RequestAuthentication that selects a workload. It is
// immutable; those of one [Program] are the same at each call, so that a pointer
// names one.
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

	audiences []string // as sameAudience compares them
	// Places of tokens, in the order in which Envoy looks at them.
	headers []tokenHeader
	params  []string
	cookies []string
}

// tokenHeader is a place of a token: after the prefix, wherever that stands in the
// header's value.
type tokenHeader struct {
	name   string
	prefix []byte
}

// Token is a token that a request has where a rule looks for one.
type Token struct {
	// Header and Param say what it came in: the name of a header in lower case, or
	// of a query parameter; both empty for a cookie.
	Header, Param string

	text []byte // percent encoded where Param is set
}

// Text is all that stands there; it may share memory with the request.
func (t Token) Text() []byte {
	if t.Param == "" {
		return t.text
	}
	return unescape(t.text)
}

// compiled has what the rule says in the form that requests are held against.
func (t TokenRule) compiled() *TokenRule {
	j := t.Spec
	for _, a := range j.GetAudiences() {
		t.audiences = append(t.audiences, sameAudience(a))
	}
	for _, h := range j.GetFromHeaders() {
		t.headers = append(t.headers, tokenHeader{lowerASCII(h.GetName()), []byte(h.GetPrefix())})
	}
	t.params, t.cookies = slices.Clone(j.GetFromParams()), slices.Clone(j.GetFromCookies())
	if len(t.headers)+len(t.params)+len(t.cookies) == 0 {
		t.headers = []tokenHeader{{"authorization", []byte("Bearer ")}}
		t.params = []string{DefaultParam}
	}
	// A place that is named twice is one.
	slices.SortFunc(t.headers, func(a, b tokenHeader) int {
		return strings.Compare(a.name+string(a.prefix), b.name+string(b.prefix))
	})
	t.headers = slices.CompactFunc(t.headers, func(a, b tokenHeader) bool { return a.name+string(a.prefix) == b.name+string(b.prefix) })
	slices.Sort(t.params)
	slices.Sort(t.cookies)
	t.params, t.cookies = slices.Compact(t.params), slices.Compact(t.cookies)
	return &t
}

// tokenRule is a TokenRule of a program.
type tokenRule struct {
	*TokenRule
	by *Rule // what a decision names
}

func newTokenRule(t TokenRule, by *Rule) tokenRule { return tokenRule{t.compiled(), by} }

// tokens are the rules of all RequestAuthentications that select a workload:
// they add up. A request without a token passes without a request identity; one
// whose token is not good for any rule is refused.
type tokens []tokenRule

// check refuses a request with a bad token, or one that may have one. Whether a
// token is good was found by whoever made the request, who hands on its claims; a
// token without them was not.
// It returns in whose name and why, or an empty reason.
func (ts tokens) check(v *view) (*Rule, Reason) {
	if !v.HTTP || v.Preflight() {
		return nil, ""
	}
	if v.Known&FieldClaims == 0 {
		return ts[0].by, ReasonTokenUnknown
	}
	if v.Claims == nil {
		var doubt *Rule
		for i := range ts {
			switch ts[i].present(v.Request) {
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
	_, ok := fields["iss"].GetKind().(*structpb.Value_StringValue)
	if !ok && fields["iss"] != nil {
		return ts[0].by, ReasonTokenForeign
	}
	if _, ok := fields["sub"].GetKind().(*structpb.Value_StringValue); !ok && fields["sub"] != nil {
		return ts[0].by, ReasonTokenForeign
	}
	for i := range ts {
		if ts[i].TakesIssuer(fields["iss"].GetStringValue()) && ts[i].TakesAudience(fields["aud"]) {
			return nil, ""
		}
	}
	return ts[0].by, ReasonTokenForeign
}

// TakesIssuer reports whether the rule takes tokens of an issuer, which is empty
// where the token names none. A rule without an issuer takes all.
func (t *TokenRule) TakesIssuer(iss string) bool {
	return t.Spec.GetIssuer() == "" || t.Spec.GetIssuer() == iss
}

// TakesAudience reports whether the rule takes one of a token's audiences, text or
// a list. As in Envoy a scheme http or https and a last slash do not matter.
func (t *TokenRule) TakesAudience(aud *structpb.Value) bool {
	if len(t.audiences) == 0 {
		return true
	}
	if s, ok := aud.GetKind().(*structpb.Value_StringValue); ok {
		return slices.Contains(t.audiences, sameAudience(s.StringValue))
	}
	for _, e := range aud.GetListValue().GetValues() {
		if s, ok := e.GetKind().(*structpb.Value_StringValue); ok && slices.Contains(t.audiences, sameAudience(s.StringValue)) {
			return true
		}
	}
	return false
}

// sameAudience is what is compared of an audience.
func sameAudience(aud string) string {
	rest, ok := strings.CutPrefix(aud, "http://")
	if !ok {
		rest = strings.TrimPrefix(aud, "https://")
	}
	return strings.TrimSuffix(rest, "/")
}

// Preflight reports whether the request certainly is a CORS preflight, in which
// Istio has nobody look for tokens: both of its headers must have a value.
func (r *Request) Preflight() bool {
	return r.Known&(FieldMethod|FieldHeaders) == FieldMethod|FieldHeaders && string(r.Method) == "OPTIONS" &&
		r.has("origin") && r.has("access-control-request-method")
}

// has reports whether a header is there with a value.
func (r *Request) has(name string) bool {
	for i := range r.Headers {
		if h := &r.Headers[i]; h.Name == name && len(h.Value) > 0 {
			return true
		}
	}
	return false
}

// present says whether the request has a token where the rule looks for one.
func (t *TokenRule) present(r *Request) truth {
	for range t.Tokens(r) {
		return yes
	}
	if !t.Complete(r) {
		return maybe // those that are there may not be all
	}
	return no
}

// Complete reports whether all is known of the request that [TokenRule.Tokens] looks
// at.
func (t *TokenRule) Complete(r *Request) bool {
	for i := range r.Headers {
		if r.Headers[i].Form == HeaderHidden && t.looksAt(r.Headers[i].Name) {
			return false
		}
	}
	return (r.Known&FieldHeaders != 0 || len(t.headers)+len(t.cookies) == 0) &&
		// A path that is not known byte by byte still shows its parameters.
		(r.Known&FieldPath != 0 || r.Path != nil || len(t.params) == 0) && !t.mayBeHidden(r)
}

// DefaultParam is the query parameter for tokens (RFC 6750 section 2.3), in which a
// rule that names no place looks.
const DefaultParam = "access_token"

// HiddenParam stands in a query whose values are hidden for a parameter without a
// value, of any name but [DefaultParam].
const HiddenParam = "*"

// mayBeHidden reports whether a parameter that the rule looks at may be one that is
// hidden.
func (t *TokenRule) mayBeHidden(r *Request) bool {
	if !r.QueryHidden || !slices.ContainsFunc(t.params, func(name string) bool { return name != DefaultParam }) {
		return false
	}
	_, query, _ := bytes.Cut(r.Path, []byte("?"))
	for pair := range bytes.SplitSeq(query, []byte("&")) {
		if string(pair) == HiddenParam {
			return true
		}
	}
	return false
}

// Places are the headers, in lower case, and the query parameters in which the rule
// looks for tokens; for tokens in cookies the header is cookie.
func (t *TokenRule) Places() (headers, params []string) {
	for _, h := range t.headers {
		headers = append(headers, h.name)
	}
	if len(t.cookies) > 0 {
		headers = append(headers, "cookie")
	}
	return headers, t.params
}

// IsParam reports whether the name of a query parameter, as it stands in a path, is
// name for those who look for tokens.
func IsParam(encoded []byte, name string) bool { return unescapesTo(encoded, name) }

// looksAt reports whether the rule looks for tokens in a header.
func (t *TokenRule) looksAt(name string) bool {
	return name == "cookie" && len(t.cookies) > 0 ||
		slices.ContainsFunc(t.headers, func(at tokenHeader) bool { return at.name == name })
}

// Tokens iterates over the tokens that the request has where the rule looks for
// them, in Envoy's order: headers, query parameters, cookies. Of a parameter or a
// cookie that is there twice it is the first.
func (t *TokenRule) Tokens(r *Request) iter.Seq[Token] {
	return func(yield func(Token) bool) {
		for _, at := range t.headers {
			for i := range r.Headers {
				h := &r.Headers[i]
				if h.Name != at.name {
					continue
				}
				if text, ok := at.after(h.Value); ok && !yield(Token{text: text, Header: at.name}) {
					return
				}
			}
		}
		for _, name := range t.params {
			if text, ok := param(r.Path, name); ok && !yield(Token{text: text, Param: name}) {
				return
			}
		}
		for _, name := range t.cookies {
			if text, ok := r.cookie(name); ok && !yield(Token{text: text}) {
				return
			}
		}
	}
}

// after is the token in a header's value. As in Envoy, what stands between the
// prefix and the first character that a token can have does not count.
func (h tokenHeader) after(value []byte) ([]byte, bool) {
	if len(h.prefix) == 0 {
		return value, true
	}
	_, rest, ok := bytes.Cut(value, h.prefix)
	if !ok {
		return nil, false
	}
	for i, c := range rest {
		if 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_' || c == '.' {
			return rest[i:], true
		}
	}
	return value, true // no token, but something that is taken for one
}

// cookie is the value of a cookie.
func (r *Request) cookie(name string) ([]byte, bool) {
	for i := range r.Headers {
		if r.Headers[i].Name != "cookie" {
			continue
		}
		for pair := range bytes.SplitSeq(r.Headers[i].Value, []byte(";")) {
			key, value, ok := bytes.Cut(bytes.TrimLeft(pair, " "), []byte("="))
			if !ok || string(key) != name {
				continue
			}
			// RFC 6265 section 4.1.1: it may stand in quotes.
			if n := len(value); n >= 2 && value[0] == '"' && value[n-1] == '"' {
				value = value[1 : n-1]
			}
			return value, true
		}
	}
	return nil, false
}

// param is the value of a query parameter of a path, as it stands there.
func param(path []byte, name string) ([]byte, bool) {
	_, query, _ := bytes.Cut(path, []byte("?"))
	query, _, _ = bytes.Cut(query, []byte("#"))
	for len(query) > 0 {
		var pair []byte
		pair, query, _ = bytes.Cut(query, []byte("&"))
		key, value, _ := bytes.Cut(pair, []byte("="))
		if unescapesTo(key, name) {
			return value, true
		}
	}
	return nil, false
}

// unescape undoes percent encoding; what is none stays.
func unescape(b []byte) []byte {
	if bytes.IndexByte(b, '%') < 0 {
		return b
	}
	out := make([]byte, 0, len(b))
	for len(b) > 0 {
		c, n := unescaped(b)
		out, b = append(out, c), b[n:]
	}
	return out
}

// unescapesTo reports whether b is want once its percent encoding is undone.
func unescapesTo(b []byte, want string) bool {
	for len(b) > 0 {
		c, n := unescaped(b)
		if want == "" || want[0] != c {
			return false
		}
		b, want = b[n:], want[1:]
	}
	return want == ""
}

// unescaped is the first byte of b, which is not empty, and how many it takes there.
func unescaped(b []byte) (c byte, n int) {
	if b[0] == '%' && len(b) > 2 {
		hi, lo := strings.IndexByte(hexDigits, b[1]), strings.IndexByte(hexDigits, b[2])
		if hi >= 0 && lo >= 0 {
			return byte(unhex(hi)<<4 | unhex(lo)), 3
		}
	}
	return b[0], 1
}

const hexDigits = "0123456789abcdefABCDEF"

func unhex(i int) int {
	if i > 15 {
		i -= 6
	}
	return i
}

// Verifies are the rules by which a token of a request to the workload is verified,
// in the order in which Istio has Envoy try them: by issuer. It is nil where no
// RequestAuthentication selects the workload, and where everything is refused
// before tokens are looked at. It must not be changed.
func (p *Program) Verifies() []*TokenRule {
	if p == nil || len(p.refused) > 0 {
		return nil
	}
	return p.verifies
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
