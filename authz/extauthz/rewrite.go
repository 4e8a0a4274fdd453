package extauthz

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"golang.org/x/net/http/httpguts"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/signet-mesh/signet/authz"
)

// rewrite is what becomes of a request on its way: what providers change, one after
// the other, and then the verification of its token. It is told to the proxy as what
// is left in the end, so that every version of Envoy makes of it what was decided on.
type rewrite struct {
	headers []*headerChange
	// params are query parameters as they are told last; nil removes.
	params map[string]*string
	// pathSet says that a provider has replaced the whole path.
	pathSet bool
	// response is for the client.
	response []*corev3.HeaderValueOption
}

// headerChange is what becomes of a header.
type headerChange struct {
	name string // in lower case; host is :authority
	// kept says that the values that came stay, and that these are appended to the
	// first of them; otherwise these are all there are.
	kept   bool
	values []string
}

func (w *rewrite) header(name string) *headerChange {
	for _, h := range w.headers {
		if h.name == name {
			return h
		}
	}
	h := &headerChange{name: name, kept: true}
	w.headers = append(w.headers, h)
	return h
}

// errChange says that a provider changes what cannot be followed.
func errChange(format string, args ...any) error {
	return fmt.Errorf("it changes the request in a way that is not supported: "+format, args...)
}

// provider takes what an extension provider's answer changes into w, as Envoy would,
// and makes it in r. It returns what it was; it shares no memory with r. Headers with one
// of the names in settled stay as they are.
func (w *rewrite) provider(ok *authv3.OkHttpResponse, r *authz.Request, settled []string) (*authz.Changes, error) {
	if len(ok.GetHeaders())+len(ok.GetHeadersToRemove()) > 2*maxChanged { // what is below takes time by the square
		return nil, errChange("more than %d headers of it", 2*maxChanged)
	}
	if len(ok.ProtoReflect().GetUnknown()) > 0 {
		return nil, errChange("with a field that this version does not know")
	}
	e := edit{w: w, headers: slices.Clone(r.Headers), c: &authz.Changes{}, settled: settled}
	// Envoy overwrites first and then appends, whatever the order in the answer.
	for _, append := range []bool{false, true} {
		for _, o := range ok.GetHeaders() {
			//lint:ignore SA1019 it is what Envoy's ext_authz filter reads
			if o.GetAppend().GetValue() != append {
				continue
			}
			if err := e.option(o); err != nil {
				return nil, err
			}
		}
	}
	for _, name := range ok.GetHeadersToRemove() {
		name = strings.ToLower(name)
		if strings.HasPrefix(name, ":") || name == "host" || name == "" {
			continue // Envoy does not either
		}
		if !httpguts.ValidHeaderFieldName(name) {
			return nil, errChange("by removing the header %.100q, which is none", name)
		}
		if !slices.Contains(settled, name) {
			e.set(name)
		}
	}
	for _, name := range e.c.Names {
		for _, h := range e.headers {
			if h.Name == name {
				h.Name, h.Value = name, bytes.Clone(h.Value)
				e.c.Headers = append(e.c.Headers, h)
			}
		}
	}
	if len(ok.GetQueryParametersToSet())+len(ok.GetQueryParametersToRemove()) > 0 {
		if w.pathSet {
			return nil, errChange("parameters, of a path that was replaced")
		}
		for _, p := range ok.GetQueryParametersToSet() {
			if len(p.ProtoReflect().GetUnknown()) > 0 || !plainParam(p.GetKey()) || !plainParam(p.GetValue()) || p.GetKey() == "" {
				return nil, errChange("a parameter that is none")
			}
			w.param(p.GetKey(), &p.Value)
		}
		for _, name := range ok.GetQueryParametersToRemove() {
			w.param(name, nil)
		}
		e.c.Path = withParams(r.Path, ok.GetQueryParametersToSet(), ok.GetQueryParametersToRemove())
	}
	if err := bounded(e.c); err != nil {
		return nil, err
	}
	w.response = append(w.response, ok.GetResponseHeadersToAdd()...)
	e.c.Apply(r)
	return e.c, nil
}

// Bounds of what one answer makes of a request, so that a record of it is never too
// long to be read. Envoy takes no more than 100 headers in 60 KiB from a client.
const (
	maxChanged      = 1000
	maxChangedBytes = 64 << 10
)

// bounded refuses changes that are too many or too long. A path does not count: it may
// be the client's, and a record does not show a long one.
func bounded(c *authz.Changes) error {
	n := len(c.Method) + len(c.Host)
	for _, name := range c.Names {
		n += len(name)
	}
	for i := range c.Headers {
		n += len(c.Headers[i].Name) + len(c.Headers[i].Value)
	}
	if len(c.Names) > maxChanged || len(c.Headers) > maxChanged || n > maxChangedBytes {
		return errChange("more than %d headers of it, or more than %d bytes", maxChanged, maxChangedBytes)
	}
	return nil
}

// edit is what one answer changes.
type edit struct {
	w       *rewrite
	headers []authz.Header // as they are by now
	c       *authz.Changes
	settled []string // names of headers that it does not change
}

func (e *edit) option(o *corev3.HeaderValueOption) error {
	name, value := strings.ToLower(o.GetHeader().GetKey()), o.GetHeader().GetValue()
	switch {
	case len(o.ProtoReflect().GetUnknown())+len(o.GetHeader().ProtoReflect().GetUnknown()) > 0:
		return errChange("the header %q with a field that this version does not know", name)
	case len(o.GetHeader().GetRawValue()) > 0:
		return errChange("the header %q with a raw value, which Envoy does not read", name)
	case !httpguts.ValidHeaderFieldName(strings.TrimPrefix(name, ":")) || !httpguts.ValidHeaderFieldValue(value):
		return errChange("the header %q is none", name)
	case strings.HasPrefix(name, ":") || name == "host":
		return e.pseudo(name, value, o)
	case perConnection(name):
		return errChange("the header %q", name)
	case slices.Contains(e.settled, name):
		return nil
	}
	//lint:ignore SA1019 Envoy reads it, and not append_action: where it is not true the option overwrites
	if !o.GetAppend().GetValue() {
		e.set(name, value)
		return nil
	}
	i := slices.IndexFunc(e.headers, func(h authz.Header) bool { return h.Name == name })
	if i < 0 || value == "" {
		return nil // to a header that is not there Envoy appends nothing, and nothing to none
	}
	e.touch(name)
	if first := &e.headers[i]; first.Form == authz.HeaderValue {
		first.Value = []byte(appended(name, string(first.Value), value))
	} else {
		// Where the first of its values ends is not known, and so what they are now.
		first.Value, first.Form = []byte(string(first.Value)+","+value), authz.HeaderUnclear
	}
	if h := e.w.header(name); h.kept {
		h.values = append(h.values, value)
	} else {
		h.values[0] = appended(name, h.values[0], value)
	}
	return nil
}

// appended is what Envoy makes of a header's first value where more is appended.
func appended(name, was, more string) string {
	switch {
	case was == "" || more == "":
		return was + more
	case name == "cookie":
		return was + "; " + more
	}
	return was + "," + more
}

// set makes the values those of a header, or removes it.
func (e *edit) set(name string, values ...string) {
	e.touch(name)
	e.headers = slices.DeleteFunc(e.headers, func(h authz.Header) bool { return h.Name == name })
	for _, v := range values {
		e.headers = append(e.headers, authz.Header{Name: name, Value: []byte(v)})
	}
	h := e.w.header(name)
	h.kept, h.values = false, values
}

func (e *edit) touch(name string) {
	if !slices.Contains(e.c.Names, name) {
		e.c.Names = append(e.c.Names, name)
	}
}

// pseudo sets one of those pseudo-headers that policies read.
func (e *edit) pseudo(name, value string, o *corev3.HeaderValueOption) error {
	if name == "host" {
		name = ":authority"
	}
	//lint:ignore SA1019 as above
	if value == "" || o.GetAppend().GetValue() {
		return errChange("the header %q in another way than to replace it", name)
	}
	switch name {
	case ":method":
		e.c.Method = []byte(value)
	case ":authority":
		e.c.Host = []byte(value)
	case ":path":
		if len(e.w.params) > 0 {
			return errChange("the path, of which parameters were changed")
		}
		e.c.Path, e.w.pathSet = []byte(value), true
	default:
		return errChange("the header %q", name)
	}
	h := e.w.header(name)
	h.kept, h.values = false, []string{value}
	return nil
}

// perConnection reports whether a header says where a message ends or what is spoken
// on its connection.
func perConnection(name string) bool {
	switch name {
	case "content-length", "transfer-encoding", "connection", "upgrade", "te", "trailer", "keep-alive", "proxy-connection", "http2-settings":
		return true
	}
	return false
}

// token takes what the verification of a token changes into w, and returns it as
// policies see it. It takes no other options than those that Tokens makes.
func (w *rewrite) token(ok *authv3.OkHttpResponse, r *authz.Request) *authz.Changes {
	c := &authz.Changes{}
	if ok == nil {
		return c
	}
	w.remove(ok.GetHeadersToRemove())
	c.Names = append(c.Names, ok.GetHeadersToRemove()...)
	for _, o := range ok.GetHeaders() {
		name, value := o.GetHeader().GetKey(), o.GetHeader().GetValue()
		h := w.header(name)
		//lint:ignore SA1019 it is what Envoy's ext_authz filter reads
		if !o.GetAppend().GetValue() {
			h.kept, h.values = false, nil
		}
		h.values = append(h.values, value)
		if !slices.Contains(c.Names, name) {
			c.Names = append(c.Names, name)
		}
		c.Headers = append(c.Headers, authz.Header{Name: name, Value: []byte(value)})
	}
	if gone := ok.GetQueryParametersToRemove(); len(gone) > 0 {
		for _, name := range gone {
			w.param(name, nil)
		}
		c.Path = withParams(r.Path, nil, gone)
		// Envoy's jwt_authn writes the query anew without percent encoding, and
		// policies behind it see that. Where that is something else nothing is known.
		c.QueryHidden = bytes.IndexByte(c.Path, '%') >= 0
	}
	return c
}

// remove has headers removed.
func (w *rewrite) remove(names []string) {
	for _, name := range names {
		h := w.header(name)
		h.kept, h.values = false, nil
	}
}

func (w *rewrite) param(name string, value *string) {
	if w.params == nil {
		w.params = map[string]*string{}
	}
	w.params[name] = value
}

// plainParam reports whether text can stand in a query as it is.
func plainParam(text string) bool {
	return !strings.ContainsFunc(text, func(c rune) bool { return c <= ' ' || c >= 0x7f || strings.ContainsRune("&#=", c) })
}

// withParams is a path with parameters set and then removed, written anew as Envoy
// does: by name, each with a value.
func withParams(path []byte, set []*corev3.QueryParameter, remove []string) []byte {
	before, query, _ := bytes.Cut(path, []byte("?"))
	query, fragment, hash := bytes.Cut(query, []byte("#"))
	params := map[string][]string{}
	for len(query) > 0 {
		var pair []byte
		pair, query, _ = bytes.Cut(query, []byte("&"))
		name, value, _ := strings.Cut(string(pair), "=")
		params[name] = append(params[name], value)
	}
	for _, p := range set {
		params[p.GetKey()] = []string{p.GetValue()}
	}
	for _, name := range remove {
		delete(params, name)
	}
	out, sep := bytes.Clone(before), byte('?')
	for _, name := range slices.Sorted(maps.Keys(params)) {
		for _, value := range params[name] {
			out = append(append(out, sep), name+"="+value...)
			sep = '&'
		}
	}
	if hash {
		out = append(append(out, '#'), fragment...)
	}
	return out
}

// answer is what the proxy is told to make of the request.
func (w *rewrite) answer(ok *authv3.OkHttpResponse) {
	option := func(name, value string, more bool) {
		//lint:ignore SA1019 this is the field that every Envoy's ext_authz filter reads; append_action is not
		o := &corev3.HeaderValueOption{Header: &corev3.HeaderValue{Key: name, Value: value}, Append: wrapperspb.Bool(more)}
		ok.Headers = append(ok.Headers, o)
	}
	for _, h := range w.headers {
		for i, v := range h.values {
			option(h.name, v, h.kept || i > 0)
		}
		if len(h.values) == 0 && !h.kept {
			ok.HeadersToRemove = append(ok.HeadersToRemove, h.name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(w.params)) {
		if v := w.params[name]; v == nil {
			ok.QueryParametersToRemove = append(ok.QueryParametersToRemove, name)
		} else {
			ok.QueryParametersToSet = append(ok.QueryParametersToSet, &corev3.QueryParameter{Key: name, Value: *v})
		}
	}
	ok.ResponseHeadersToAdd = w.response
}

// message is the CheckRequest with the changes, for the provider that is asked next.
// What is not the HTTP request, as metadata, is not decoded for it.
func (w *rewrite) message(m []byte, r *authz.Request) ([]byte, error) {
	return edited(m, []protowire.Number{1, 4, 2}, func(b []byte) ([]byte, error) { // attributes, request, http
		var h authv3.AttributeContext_HttpRequest
		if err := proto.Unmarshal(b, &h); err != nil {
			return nil, errNoCheck
		}
		w.change(&h, r)
		return proto.Marshal(&h)
	})
}

var errNoCheck = errors.New("the check is none")

// edited is a message with the part that is at path, by numbers of fields, edited, and
// the others byte by byte. A part that is there several times is one, one after the
// other; one that is not there stays so.
func edited(b []byte, path []protowire.Number, edit func([]byte) ([]byte, error)) ([]byte, error) {
	if len(path) == 0 {
		return edit(b)
	}
	var part []byte
	there, out := false, make([]byte, 0, len(b)+64)
	for rest := b; len(rest) > 0; {
		num, kind, n := protowire.ConsumeField(rest)
		if n < 0 {
			return nil, errNoCheck
		}
		if num == path[0] && kind == protowire.BytesType {
			_, _, tag := protowire.ConsumeTag(rest)
			data, _ := protowire.ConsumeBytes(rest[tag:n])
			if there {
				part = append(part, data...)
			} else {
				part, there = data[:len(data):len(data)], true // to append is to copy
			}
		} else {
			out = append(out, rest[:n]...)
		}
		rest = rest[n:]
	}
	if !there {
		return b, nil
	}
	part, err := edited(part, path[1:], edit)
	if err != nil {
		return nil, err
	}
	return protowire.AppendBytes(protowire.AppendTag(out, path[0], protowire.BytesType), part), nil
}

// change makes the changes in the HTTP request of a check.
func (w *rewrite) change(h *authv3.AttributeContext_HttpRequest, r *authz.Request) {
	changed := func(name string) bool {
		name = strings.ToLower(name)
		if name == "host" {
			name = ":authority"
		}
		return name == ":path" && len(w.params) > 0 || slices.ContainsFunc(w.headers, func(c *headerChange) bool { return c.name == name })
	}
	add := func(name string, value []byte) {
		if h.HeaderMap != nil {
			h.HeaderMap.Headers = append(h.HeaderMap.Headers, &corev3.HeaderValue{Key: name, RawValue: value})
			return
		}
		if h.Headers == nil {
			h.Headers = map[string]string{}
		}
		text := strings.ToValidUTF8(string(value), "!")
		if before, there := h.Headers[name]; there {
			text = before + "," + text
		}
		h.Headers[name] = text
	}
	if h.HeaderMap != nil {
		h.HeaderMap.Headers = slices.DeleteFunc(h.HeaderMap.Headers, func(hv *corev3.HeaderValue) bool { return changed(hv.GetKey()) })
	}
	maps.DeleteFunc(h.Headers, func(name, _ string) bool { return changed(name) })
	for _, hd := range r.Headers {
		if changed(hd.Name) {
			add(hd.Name, hd.Value)
		}
	}
	for _, p := range []struct {
		name  string
		value []byte
		field *string
	}{{":method", r.Method, &h.Method}, {":path", r.Path, &h.Path}, {":authority", r.Host, &h.Host}} {
		if changed(p.name) {
			*p.field = strings.ToValidUTF8(string(p.value), "!")
			add(p.name, p.value)
		}
	}
}
