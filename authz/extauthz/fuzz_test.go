package extauthz_test

import (
	"bytes"
	"strings"
	"testing"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/protobuf/proto"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/extauthz"
)

// corpus is requests of every form that Envoy sends, in bytes.
func corpus(t testing.TB) [][]byte {
	svid := certificate(t, "", []string{"a.example"}, client)
	var all [][]byte
	for _, r := range []*authv3.CheckRequest{
		check(),
		check(joined),
		check(path("/ok!"), joined),
		check(path("/ok/secret?token=x#y")),
		check(func(a *authv3.AttributeContext) { a.Source.Certificate = svid }),
		check(func(a *authv3.AttributeContext) { a.Source.Principal = "" }),
		check(func(a *authv3.AttributeContext) { a.Request = nil }),
		check(func(a *authv3.AttributeContext) { a.Source.Address, a.Destination.Address = pipe(), internal() }),
		check(func(a *authv3.AttributeContext) { a.Destination.Labels = map[string]string{"app": "server"} }),
		check(func(a *authv3.AttributeContext) { a.ContextExtensions = map[string]string{"a": "b"} }),
		{},
	} {
		b, err := proto.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, b)
	}
	return all
}

// checkBytes decides on bytes as the transport would, and checks what must hold
// for any bytes: no panic, an answer, and no way to be allowed but for a GET of
// /ok… other than /ok/secret by client, in every place of the request that
// speaks of it.
func checkBytes(t *testing.T, s *extauthz.Server, b []byte) (allowed bool) {
	t.Helper()
	before := bytes.Clone(b)
	a, err := answerToBytes(t, s, as(server), b)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(before, b) {
		t.Fatal("the check changed the message")
	}
	r := new(authv3.CheckRequest)
	if proto.Unmarshal(b, r) != nil {
		if err := isDenial(a, extauthz.ReasonRequest); err != nil {
			t.Fatal(err)
		}
		return false
	}
	if a.GetDynamicMetadata().GetFields()["reason"].GetStringValue() == string(extauthz.ReasonInternal) {
		t.Fatal("it panicked")
	}
	var req authz.Request
	malformed := extauthz.FromCheckRequest(r, &req)
	if a.GetOkResponse() == nil {
		if err := isDenial(a, ""); err != nil {
			t.Fatal(err)
		}
		return false
	}
	if malformed != nil {
		t.Fatalf("allowed although malformed: %v", malformed)
	}
	src, h := r.GetAttributes().GetSource(), r.GetAttributes().GetRequest().GetHttp()
	if src.GetPrincipal() != client {
		t.Fatalf("allowed for principal %q", src.GetPrincipal())
	}
	ok := func(method, path []byte) {
		path, _, _ = bytes.Cut(path, []byte("?"))
		path, _, _ = bytes.Cut(path, []byte("#"))
		if method != nil && string(method) != "GET" {
			t.Fatalf("allowed for method %q", method)
		}
		if path != nil && (!bytes.HasPrefix(path, []byte("/ok")) || string(path) == "/ok/secret") {
			t.Fatalf("allowed for path %q", path)
		}
	}
	said := false
	for _, hv := range h.GetHeaderMap().GetHeaders() {
		v := hv.GetRawValue()
		if v == nil {
			v = []byte(hv.GetValue())
		}
		switch hv.GetKey() {
		case ":path":
			said = true
			ok(nil, v)
		case ":method":
			ok(v, nil)
		}
	}
	if !said {
		if strings.Contains(h.GetPath(), "!") {
			t.Fatalf("allowed for the cleaned path %q", h.GetPath())
		}
		ok(nil, []byte(h.GetPath()))
	}
	return true
}

func FuzzCheckRequest(f *testing.F) {
	for _, b := range corpus(f) {
		f.Add(b)
	}
	s, err := extauthz.New(extauthz.Config{Snapshot: fixed(compile(f, policyText))})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) { checkBytes(t, s, b) })
}

// TestMangled cuts and changes each byte of every form of request.
func TestMangled(t *testing.T) {
	t.Parallel()
	s, err := extauthz.New(extauthz.Config{Snapshot: fixed(compile(t, policyText))})
	if err != nil {
		t.Fatal(err)
	}
	allowed := 0
	for _, b := range corpus(t) {
		for i := range b {
			if checkBytes(t, s, b[:i]) {
				allowed++
			}
			c := bytes.Clone(b)
			for _, x := range []byte{1, 0x80, 0xff} {
				c[i] = b[i] ^ x
				if checkBytes(t, s, c) {
					allowed++
				}
			}
		}
	}
	if allowed == 0 {
		t.Error("not one was allowed: nothing was tried")
	}
}
