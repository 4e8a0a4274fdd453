package record

import (
	"bytes"
	"encoding/base64"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
)

// Shown says what of a request stands in a record. The rest stands there by name
// only, so that it is known to be there and nothing else; see package authz. The
// zero Shown hides every value.
type Shown struct {
	// Read are headers, claims and metadata that policies read ([authz.Program.Names]);
	// they are shown with their values. So are x-forwarded-for and the headers of a
	// CORS preflight, and the claims iss, sub, aud and azp.
	Read []authz.Name
	// Headers, in lower case, and Claims, by their first name, are shown too.
	Headers, Claims map[string]bool
	// AllHeaders and AllClaims show all of them.
	AllHeaders, AllClaims bool
	// Redacted are headers, in lower case, that are never shown.
	Redacted map[string]bool
	// TokenHeaders, in lower case, and TokenParams are where the rules of the workload
	// look for tokens ([authz.TokenRule.Places]), and the headers in which they put the
	// payload of one; they are never shown either.
	TokenHeaders, TokenParams []string
	// Query shows the values of the parameters of a query.
	Query bool
}

// Bounds of what is shown. A longer value is hidden, a longer list or a deeper
// value too.
const (
	maxValue = 4 << 10
	maxNodes = 1000
	maxDepth = 16
	maxErr   = 500
)

// fields are the names of what is known.
var fields = []struct {
	field authz.Field
	name  string
}{
	{authz.FieldPeer, "peer"}, {authz.FieldPrincipal, "principal"}, {authz.FieldSourceIP, "sourceIP"},
	{authz.FieldDestinationPort, "destinationPort"}, {authz.FieldMethod, "method"}, {authz.FieldPath, "path"},
	{authz.FieldHost, "host"}, {authz.FieldRemoteIP, "remoteIP"}, {authz.FieldDestinationIP, "destinationIP"},
	{authz.FieldSNI, "sni"}, {authz.FieldHeaders, "headers"}, {authz.FieldClaims, "claims"}, {authz.FieldMetadata, "metadata"},
}

// forms are the names of forms of headers; a value has none.
var forms = map[authz.HeaderForm]string{
	authz.HeaderJoined: "joined", authz.HeaderUnclear: "unclear", authz.HeaderHidden: "hidden",
}

// Append appends the record to b as one line of JSON, with its newline.
func (r *Record) Append(b []byte, show Shown) []byte {
	e := encoder{b: b}
	e.open()
	e.key("version")
	e.b = strconv.AppendInt(e.b, r.version(func(c *authz.Changes) authz.Field { return show.changes(c).Hidden }), 10)
	e.key("time")
	e.b = append(r.Time.UTC().AppendFormat(append(e.b, '"'), "2006-01-02T15:04:05.000000000Z"), '"')
	e.key("workload")
	e.open()
	e.text("namespace", r.Workload.Namespace)
	e.text("serviceAccount", r.Workload.ServiceAccount)
	e.text("pod", r.Workload.Pod)
	e.text("podUID", r.Workload.PodUID)
	e.text("node", r.Workload.Node)
	if len(r.Workload.Labels) > 0 {
		e.key("labels")
		e.open()
		for _, k := range slices.Sorted(maps.Keys(r.Workload.Labels)) {
			e.key(k)
			e.quote(r.Workload.Labels[k])
		}
		e.close()
	}
	e.close()
	e.key("decision")
	if r.Allowed {
		e.quote("allow")
	} else {
		e.quote("deny")
	}
	e.text("kind", r.Kind)
	e.text("policy", r.Policy)
	e.number("rule", int64(r.Rule))
	e.text("reason", string(r.Reason))
	if len(r.Err) > maxErr {
		e.text("error", r.Err[:maxErr]+"…")
	} else {
		e.text("error", r.Err)
	}
	if r.Unread {
		e.flag("unread", true)
	}
	if r.Audited != nil {
		e.key("audited")
		e.open()
		e.match(*r.Audited)
		e.close()
	}
	if len(r.DryRuns) > 0 {
		e.key("dryRun")
		e.list()
		for _, d := range r.DryRuns {
			e.comma()
			e.open()
			e.text("action", d.Action.String())
			e.flag("allowed", d.Allowed)
			e.match(d.Match)
			e.close()
		}
		e.end()
	}
	if len(r.Answers) > 0 {
		e.key("providers")
		e.list()
		for _, a := range r.Answers {
			e.comma()
			e.open()
			e.text("provider", a.Provider)
			e.flag("allowed", a.Allowed)
			e.text("reason", string(a.Reason))
			if a.Changes != nil {
				e.key("changes")
				e.changes(a.Changes, &show)
			}
			e.close()
		}
		e.end()
	}
	e.key("request")
	e.request(&r.Request, &show)
	e.number("generation", int64(r.Generation))
	e.number("latencyNs", int64(r.Latency))
	e.text("requestId", r.RequestID)
	e.text("traceId", r.TraceID)
	e.close()
	return append(e.b, '\n')
}

// version is the oldest that can say what the record says.
func (r *Record) version(hidden func(*authz.Changes) authz.Field) int64 {
	v := int64(1)
	of := func(c *authz.Changes) {
		switch {
		case c == nil:
		case hidden(c) != 0:
			v = 3
		default:
			v = max(v, 2)
		}
	}
	of(r.Request.Token)
	for i := range r.Answers {
		of(r.Answers[i].Changes)
	}
	return v
}

// encoder appends JSON.
type encoder struct {
	b []byte
	// more says that a comma is due.
	more bool
	// nodes counts values of claims and metadata.
	nodes int
}

func (e *encoder) open()  { e.b, e.more = append(e.b, '{'), false }
func (e *encoder) close() { e.b, e.more = append(e.b, '}'), true }
func (e *encoder) list()  { e.b, e.more = append(e.b, '['), false }
func (e *encoder) end()   { e.b, e.more = append(e.b, ']'), true }

func (e *encoder) comma() {
	if e.more {
		e.b = append(e.b, ',')
	}
	e.more = true
}

func (e *encoder) key(k string) {
	e.comma()
	e.quote(k)
	e.b = append(e.b, ':')
}

// text appends what is not empty.
func (e *encoder) text(k, v string) {
	if v != "" {
		e.key(k)
		e.quote(v)
	}
}

func (e *encoder) flag(k string, v bool) {
	e.key(k)
	e.b = strconv.AppendBool(e.b, v)
}

func (e *encoder) number(k string, v int64) {
	e.key(k)
	e.b = strconv.AppendInt(e.b, v, 10)
}

func (e *encoder) match(m authz.Match) {
	e.text("policy", m.Policy)
	e.number("rule", int64(m.Rule))
	e.flag("certain", m.Certain)
}

func (e *encoder) address(k string, a netip.Addr) {
	if a.IsValid() {
		e.key(k)
		e.quote(a.String())
	}
}

// bytes appends bytes that are not nil.
func (e *encoder) bytes(k string, v []byte) {
	if v != nil {
		e.key(k)
		e.raw(v)
	}
}

// raw appends bytes: as text if they are that, else as {"base64": "…"}.
func (e *encoder) raw(v []byte) {
	if utf8.Valid(v) {
		quote(e, v)
		return
	}
	e.b = append(e.b, `{"base64":"`...)
	e.b = base64.StdEncoding.AppendEncode(e.b, v)
	e.b = append(e.b, `"}`...)
}

func (e *encoder) quote(s string) { quote(e, s) }

// quote appends a JSON string. Bytes that are no UTF-8 become U+FFFD. Control
// characters are escaped, the C1 set and the two line separators of Unicode too:
// records end in terminals.
func quote[T string | []byte](e *encoder, s T) {
	const hex = "0123456789abcdef"
	e.b = append(e.b, '"')
	for i := 0; i < len(s); {
		c := s[i]
		if c < utf8.RuneSelf {
			switch {
			case c == '"' || c == '\\':
				e.b = append(e.b, '\\', c)
			case c < ' ' || c == 0x7f:
				e.b = append(e.b, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
			default:
				e.b = append(e.b, c)
			}
			i++
			continue
		}
		r, n := utf8.DecodeRuneInString(string(s[i:min(i+utf8.UTFMax, len(s))]))
		switch {
		case r < 0xa0 || r == '\u2028' || r == '\u2029':
			e.b = append(e.b, '\\', 'u', hex[r>>12&15], hex[r>>8&15], hex[r>>4&15], hex[r&15])
		default:
			e.b = utf8.AppendRune(e.b, r)
		}
		i += n
	}
	e.b = append(e.b, '"')
}

// request appends what the record shows of a request.
func (e *encoder) request(r *authz.Request, show *Shown) {
	known := r.Known
	principal, others := r.Principal, r.OtherNames
	names := len(principal)
	for _, n := range others {
		names += len(n)
	}
	if names > maxValue || len(others) > maxNodes {
		known, principal, others = known&^authz.FieldPrincipal, nil, nil
	}
	long := func(f authz.Field, v []byte) []byte {
		if len(v) > maxValue {
			known &^= f
			return nil
		}
		return v
	}
	sni, method, host := long(authz.FieldSNI, r.SNI), long(authz.FieldMethod, r.Method), long(authz.FieldHost, r.Host)
	path, hidden := r.Path, r.QueryHidden
	if !hidden {
		path, hidden = show.path(path)
	}
	path = long(authz.FieldPath, path)
	headers := r.Headers
	if len(headers) > maxNodes {
		headers = nil
		known &^= authz.FieldHeaders
	}

	e.open()
	e.key("known")
	e.list()
	for _, f := range fields {
		if known&f.field != 0 {
			e.comma()
			e.quote(f.name)
		}
	}
	e.end()
	if r.HTTP {
		e.flag("http", true)
	}
	if r.Authenticated {
		e.flag("authenticated", true)
	}
	e.bytes("principal", principal)
	if len(others) > 0 {
		e.key("otherNames")
		e.list()
		for _, n := range others {
			e.comma()
			e.raw(n)
		}
		e.end()
	}
	e.address("sourceIP", r.SourceIP)
	e.address("remoteIP", r.RemoteIP)
	e.address("destinationIP", r.DestinationIP)
	if r.DestinationPort != 0 {
		e.number("destinationPort", int64(r.DestinationPort))
	}
	e.bytes("sni", sni)
	e.bytes("method", method)
	e.bytes("path", path)
	if hidden {
		e.flag("queryHidden", true)
	}
	e.bytes("host", host)
	if len(headers) > 0 {
		e.key("headers")
		e.list()
		for i := range headers {
			e.comma()
			e.header(&headers[i], show)
		}
		e.end()
	}
	if r.Claims != nil {
		hidden := e.structure("claims", r.Claims, func(k string) bool { return show.claim(k) })
		if len(hidden) > 0 {
			e.key("hiddenClaims")
			e.names(hidden)
		}
	}
	if r.Token != nil {
		e.key("token")
		e.changes(r.Token, show)
	}
	if len(r.Metadata) > 0 {
		filters := slices.Sorted(maps.Keys(r.Metadata))
		hidden := make([][]string, len(filters))
		e.key("metadata")
		e.open()
		for i, filter := range filters {
			hidden[i] = e.structure(filter, r.Metadata[filter], func(k string) bool {
				return slices.Contains(show.Read, authz.Name{Field: authz.FieldMetadata, Name: k, Filter: filter})
			})
		}
		e.close()
		if slices.ContainsFunc(hidden, func(names []string) bool { return names != nil }) {
			e.key("hiddenMetadata")
			e.open()
			for i, filter := range filters {
				if hidden[i] != nil {
					e.key(filter)
					e.names(hidden[i])
				}
			}
			e.close()
		}
	}
	e.close()
}

// changes appends what somebody changed of a request; values are hidden as in the
// request itself.
func (e *encoder) changes(c *authz.Changes, show *Shown) {
	shown := show.changes(c)
	c = &shown
	e.open()
	if len(c.Names) > 0 {
		e.key("names")
		e.names(c.Names)
	}
	if len(c.Headers) > 0 {
		e.key("headers")
		e.list()
		for i := range c.Headers {
			e.comma()
			e.header(&c.Headers[i], show)
		}
		e.end()
	}
	e.bytes("method", c.Method)
	e.bytes("path", c.Path)
	if c.QueryHidden && c.Path != nil {
		e.flag("queryHidden", true)
	}
	e.bytes("host", c.Host)
	if c.Hidden != 0 {
		e.key("hidden")
		e.list()
		for _, f := range fields {
			if c.Hidden&f.field != 0 {
				e.comma()
				e.quote(f.name)
			}
		}
		e.end()
	}
	e.close()
}

// changes is what is shown of changes, but for headers.
func (s *Shown) changes(c *authz.Changes) authz.Changes {
	out := *c
	if !out.QueryHidden {
		out.Path, out.QueryHidden = s.path(out.Path)
	}
	for _, f := range []struct {
		field authz.Field
		value *[]byte
	}{{authz.FieldMethod, &out.Method}, {authz.FieldPath, &out.Path}, {authz.FieldHost, &out.Host}} {
		if len(*f.value) > maxValue {
			*f.value = nil
			out.Hidden |= f.field
		}
	}
	return out
}

// schemeOf is what is shown of a hidden header Authorization, or of another one for
// tokens, so that a token that was refused still is one: its scheme. It shares no
// memory with the header.
func (s *Shown) schemeOf(h *authz.Header) []byte {
	if h.Name != "authorization" && !slices.Contains(s.TokenHeaders, h.Name) {
		return nil
	}
	for _, s := range []string{"Bearer ", "Basic ", "DPoP ", "Digest ", "Negotiate "} {
		if bytes.HasPrefix(h.Value, []byte(s)) {
			return []byte(s)
		}
	}
	return nil
}

// header reports whether a header's value is shown.
func (s *Shown) header(name string) bool {
	return !s.Redacted[name] && !slices.Contains(s.TokenHeaders, name) && (s.AllHeaders || s.Headers[name] || essential(name) || slices.Contains(s.Read, authz.Name{Field: authz.FieldHeaders, Name: name}))
}

// claim reports whether a claim is shown.
func (s *Shown) claim(name string) bool {
	switch name {
	case "iss", "sub", "aud", "azp":
		return true
	}
	return s.AllClaims || s.Claims[name] || slices.Contains(s.Read, authz.Name{Field: authz.FieldClaims, Name: name})
}

// essential reports whether decisions read a header although no policy names it: it
// says where a request came from, or that it is a CORS preflight.
func essential(name string) bool {
	return name == "x-forwarded-for" || name == "origin" || name == "access-control-request-method"
}

func (e *encoder) header(h *authz.Header, show *Shown) {
	e.open()
	e.bytes("name", append([]byte{}, h.Name...))
	form, value := h.Form, h.Value
	switch {
	case form == authz.HeaderHidden:
	case !show.header(h.Name) || len(value) > maxValue:
		form, value = authz.HeaderHidden, show.schemeOf(h)
	}
	if f := forms[form]; f != "" {
		e.text("form", f)
	}
	if len(value) > 0 {
		e.bytes("value", value)
	}
	e.close()
}

// structure appends a struct and returns the names of the fields that are hidden.
func (e *encoder) structure(name string, s *structpb.Struct, shown func(string) bool) (hidden []string) {
	e.key(name)
	e.open()
	for _, k := range slices.Sorted(maps.Keys(s.GetFields())) {
		before, more := len(e.b), e.more
		v := s.GetFields()[k]
		if v == nil { // as good as not there
			continue
		}
		if shown(k) {
			if e.key(k); e.value(v, 0) {
				continue
			}
			e.b, e.more = e.b[:before], more
		}
		hidden = append(hidden, k)
	}
	e.close()
	return hidden
}

func (e *encoder) names(names []string) {
	e.list()
	for _, n := range names {
		e.comma()
		e.quote(n)
	}
	e.end()
}

// value appends a value, or as much of it as it can and reports false: what JSON
// cannot say, or what is too much, is hidden as a whole.
func (e *encoder) value(v *structpb.Value, depth int) bool {
	if e.nodes++; e.nodes > maxNodes || depth > maxDepth {
		return false
	}
	switch k := v.GetKind().(type) {
	case *structpb.Value_NullValue:
		e.b = append(e.b, "null"...)
	case *structpb.Value_BoolValue:
		e.b = strconv.AppendBool(e.b, k.BoolValue)
	case *structpb.Value_NumberValue:
		if math.IsNaN(k.NumberValue) || math.IsInf(k.NumberValue, 0) {
			return false
		}
		e.b = strconv.AppendFloat(e.b, k.NumberValue, 'g', -1, 64)
	case *structpb.Value_StringValue:
		if len(k.StringValue) > maxValue || !utf8.ValidString(k.StringValue) {
			return false
		}
		e.quote(k.StringValue)
	case *structpb.Value_ListValue:
		e.list()
		for _, el := range k.ListValue.GetValues() {
			e.comma()
			if !e.value(el, depth+1) {
				return false
			}
		}
		e.end()
	case *structpb.Value_StructValue:
		e.open()
		for _, name := range slices.Sorted(maps.Keys(k.StructValue.GetFields())) {
			if !utf8.ValidString(name) {
				return false
			}
			v := k.StructValue.GetFields()[name]
			if v == nil {
				continue
			}
			if e.key(name); !e.value(v, depth+1) {
				return false
			}
		}
		e.close()
	default:
		return false
	}
	return true
}

// path is what is shown of a path: the names of the parameters of its query, or all
// but the values of those for tokens. What has no value may be a secret itself, so
// only a name that says nothing stands there; another one is HiddenParam. hidden is
// false where nothing was taken away.
func (s *Shown) path(path []byte) (out []byte, hidden bool) {
	i := bytes.IndexAny(path, "?#")
	if i < 0 || s.Query && len(s.TokenParams) == 0 {
		return path, false
	}
	out = slices.Clone(path[:i])
	if path[i] == '#' {
		return out, true
	}
	query, _, fragment := bytes.Cut(path[i+1:], []byte("#"))
	hidden = !s.Query || fragment
	out = append(out, '?')
	for n := 0; len(query) > 0; n++ {
		var pair []byte
		pair, query, _ = bytes.Cut(query, []byte("&"))
		name, value, ok := bytes.Cut(pair, []byte("="))
		if n > 0 {
			out = append(out, '&')
		}
		token := slices.ContainsFunc(s.TokenParams, func(p string) bool { return authz.IsParam(name, p) })
		switch {
		case s.Query && !token:
			out = append(out, pair...)
		case ok:
			out = append(append(out, name...), '=')
			hidden = hidden || len(value) > 0
		case token || len(name) == 0 || authz.IsParam(name, authz.DefaultParam):
			out = append(out, name...)
		default:
			out = append(out, authz.HiddenParam...)
		}
	}
	if !hidden {
		return path, false
	}
	return out, true
}
