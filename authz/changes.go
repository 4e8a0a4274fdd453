package authz

import (
	"bytes"
	"slices"
)

// Changes are what somebody on a request's way has made of it: an extension provider
// that allowed it, or the verification of its token. They hold what stands there
// afterwards, so they can be applied to what a record shows of a request. They are
// immutable.
type Changes struct {
	// Names are headers, in lower case, of which nothing is left but what Headers has.
	Names   []string
	Headers []Header
	// Method, Path and Host are in place of the request's; nil where they are not
	// changed. QueryHidden is that of Path.
	Method, Path, Host []byte
	QueryHidden        bool
	// Hidden are those of FieldMethod, FieldPath and FieldHost that became something of
	// which nobody knows what, as in a record that does not show it.
	Hidden Field
}

// Apply makes the changes in r, whose slices are replaced and not written to. The
// client's address stays what it was: Envoy knows it before any of its filters.
func (c *Changes) Apply(r *Request) {
	if c == nil {
		return
	}
	if slices.Contains(c.Names, "x-forwarded-for") {
		r.keepRemote()
	}
	r.Headers = append(without(make([]Header, 0, len(r.Headers)+len(c.Headers)), r.Headers, c.Names, nil), c.Headers...)
	c.rest(r)
}

// keepRemote derives the client's address from the headers as they are, so that it
// outlasts them. One that cannot be known is zero, and so stays unknown.
func (r *Request) keepRemote() {
	v := view{Request: r}
	r.RemoteIP, r.Known = v.deriveRemote(), r.Known|FieldRemoteIP
}

// rest applies what is no header. What was not known is not known afterwards.
func (c *Changes) rest(r *Request) {
	if c.Method != nil {
		r.Method = c.Method
	}
	if c.Path != nil {
		r.Path, r.QueryHidden = c.Path, c.QueryHidden || r.QueryHidden
	}
	if c.Host != nil {
		r.Host = c.Host
	}
	if c.Hidden&FieldMethod != 0 {
		r.Method = nil
	}
	if c.Hidden&FieldPath != 0 {
		r.Path = nil
	}
	if c.Hidden&FieldHost != 0 {
		r.Host = nil
	}
	r.Known &^= c.Hidden
}

// without appends to out what is in list, but for headers of these names.
func without(out, list []Header, names, more []string) []Header {
	for i := range list {
		if !slices.Contains(names, list[i].Name) && !slices.Contains(more, list[i].Name) {
			out = append(out, list[i])
		}
	}
	return out
}

// outputs are the headers, in lower case, in which rules put claims.
func (ts tokens) outputs() (names []string) {
	add := func(name string) {
		if name = lowerASCII(name); name != "" && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	for i := range ts {
		add(ts[i].Spec.GetOutputPayloadToHeader())
		for _, o := range ts[i].Spec.GetOutputClaimToHeaders() {
			add(o.GetHeader())
		}
	}
	return names
}

// rewrites reports whether what comes after tokens sees another request than the
// client sent: with what the verification of its token has changed, or, where it has
// none, without the headers in which rules put claims. So it is in a preflight, too.
// Where the proxy has verified the token its filter has done that already.
func rewrites(r *Request, outputs []string) bool {
	if !r.HTTP || r.Claims != nil {
		return r.HTTP && r.Token != nil
	}
	for i := 0; len(outputs) > 0 && i < len(r.Headers); i++ {
		if slices.Contains(outputs, r.Headers[i].Name) {
			return true
		}
	}
	return false
}

// behind are the headers that come behind tokens, and what is known.
func behind(r *Request, outputs []string) (headers []Header, known Field) {
	buf := make([]Header, 0, len(r.Headers)+len(outputs))
	if r.Claims == nil {
		return without(buf, r.Headers, outputs, nil), r.Known
	}
	t, known := r.Token, r.Known
	headers = without(buf, r.Headers, outputs, t.Names)
	// A header that was put in one list and not in the other: the token was verified by
	// other rules than these, and what these would have put there is not known.
	for i := range t.Headers {
		if slices.Contains(outputs, t.Headers[i].Name) {
			headers = append(headers, t.Headers[i])
		} else {
			known &^= FieldHeaders
		}
	}
	for _, name := range outputs {
		if !slices.Contains(t.Names, name) {
			known &^= FieldHeaders
		}
	}
	return headers, known
}

// rewritten is policies for a request that tokens change.
//
//go:noinline
func (p *Program) rewritten(d *Decision, v *view) {
	v.remoteAddress() // of the headers as they came
	r := *v.Request
	r.Headers, r.Known = behind(v.Request, p.outputs)
	if v.Claims != nil {
		v.Token.rest(&r)
	}
	w := *v
	w.Request = &r
	w.sees()
	if hasUpper(w.host) {
		var host [256]byte
		w.host = lower(w.host, host[:])
	}
	p.rules(d, &w)
}

// AfterTokens is the request as AUDIT, DENY and ALLOW policies see it behind these
// rules of RequestAuthentications, if they let it through: without the headers in which
// they put claims, and with Request.Token applied. CUSTOM policies see r itself.
func AfterTokens(rules []TokenRule, r *Request) Request {
	ts := make(tokens, len(rules))
	for i := range rules {
		ts[i].TokenRule = &rules[i]
	}
	out, outputs := *r, ts.outputs()
	if rewrites(r, outputs) {
		headers, known := behind(r, outputs)
		out.keepRemote()
		out.Headers, out.Known = headers, known|FieldRemoteIP
		if r.Claims != nil {
			r.Token.rest(&out)
		}
	}
	out.Token = nil
	return out
}

// LooksAt reports whether a rule looks for tokens where the changes are.
func (c *Changes) LooksAt(rules []*TokenRule) bool {
	return slices.ContainsFunc(rules, func(t *TokenRule) bool {
		return len(t.params) > 0 && (c.Path != nil || c.Hidden&FieldPath != 0) || slices.ContainsFunc(c.Names, t.looksAt)
	})
}

// Outputs are the headers, in lower case, in which the verification of a token puts
// claims, or its payload. They must not be changed.
func (p *Program) Outputs() []string {
	if p == nil {
		return nil
	}
	return p.outputs
}

// SetsAny reports whether the changes are of one of these headers.
func (c *Changes) SetsAny(headers []string) bool {
	return c != nil && slices.ContainsFunc(c.Names, func(name string) bool { return slices.Contains(headers, name) })
}

// ParamNames are the names of query parameters of a path that are name once their
// percent encoding is undone, as they stand there, each once.
func ParamNames(path []byte, name string) (names []string) {
	_, query, _ := bytes.Cut(path, []byte("?"))
	query, _, _ = bytes.Cut(query, []byte("#"))
	for pair := range bytes.SplitSeq(query, []byte("&")) {
		key, _, _ := bytes.Cut(pair, []byte("="))
		if unescapesTo(key, name) && !slices.Contains(names, string(key)) {
			names = append(names, string(key))
		}
	}
	return names
}
