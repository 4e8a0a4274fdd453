package extauthz_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"runtime"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/extauthz"
)

const (
	// readsNothing and readsClaims allow the requests of this file.
	readsNothing = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: all, namespace: default}\nspec: {rules: [{}]}\n"
	readsClaims  = readsNothing + `---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: claims, namespace: default}
spec: {action: DENY, rules: [{when: [{key: "request.auth.claims[role]", values: [nobody]}]}]}
`
)

// metadataOf is metadata of one filter whose payload has a list of n empty values, and
// a text of that many bytes.
func metadataOf(n, text int) *corev3.Metadata {
	values := make([]*structpb.Value, n)
	for i := range values {
		values[i] = &structpb.Value{}
	}
	payload := &structpb.Struct{Fields: map[string]*structpb.Value{"l": structpb.NewListValue(&structpb.ListValue{Values: values}),
		"t": structpb.NewStringValue(string(bytes.Repeat([]byte("x"), text)))}}
	return &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
		"envoy.filters.http.jwt_authn": {Fields: map[string]*structpb.Value{"payload": structpb.NewStructValue(payload)}}}}
}

// withMetadata is a check in bytes.
func withMetadata(t testing.TB, m *corev3.Metadata) []byte {
	t.Helper()
	b, err := proto.Marshal(check(func(a *authv3.AttributeContext) { a.MetadataContext = m }))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestMetadataIsBounded: more than any token has is refused where policies would read
// it, in either form, and read by nobody where they do not.
func TestMetadataIsBounded(t *testing.T) {
	t.Parallel()
	reads, not := newWorld(t, fixed(compile(t, readsClaims))), newWorld(t, fixed(compile(t, readsNothing)))
	for _, tt := range []struct {
		name string
		m    *corev3.Metadata
		ok   bool
	}{
		{"many values", metadataOf(8000, 0), true},
		{"too many values", metadataOf(8192, 0), false},
		{"much", metadataOf(1, 65000), true},
		{"too much", metadataOf(1, 65536), false},
	} {
		b := withMetadata(t, tt.m)
		for range 2 {
			a, err := answerToBytes(t, reads.Server, as(server), b)
			if err != nil {
				t.Fatal(err)
			}
			if allowed := a.GetOkResponse() != nil; allowed != tt.ok {
				t.Errorf("%s: allowed %t", tt.name, allowed)
			} else if !allowed {
				if err := isDenial(a, extauthz.ReasonRequest); err != nil {
					t.Errorf("%s: %v", tt.name, err)
				}
			}
		}
		if a, err := answerToBytes(t, not.Server, as(server), b); err != nil || a.GetOkResponse() == nil {
			t.Errorf("%s: nobody reads it, and the answer is %v, %v", tt.name, a, err)
		}
		var fromBytes, fromMessage authz.Request
		err1 := extauthz.FromBytes(b, authz.FieldsHTTP, &fromBytes)
		err2 := extauthz.FromCheckRequest(check(func(a *authv3.AttributeContext) { a.MetadataContext = tt.m }), &fromMessage)
		var re *extauthz.RequestError
		if (err1 == nil) != tt.ok || (err2 == nil) != tt.ok || !tt.ok && !(errors.As(err1, &re) && re.Reason == extauthz.ReasonRequest) {
			t.Errorf("%s: read from bytes: %v; from a message: %v", tt.name, err1, err2)
		}
	}
}

// TestMetadataDepth: what is nested as deep as the generated decoder takes it is
// taken where nobody reads it, too, and no deeper.
func TestMetadataDepth(t *testing.T) {
	t.Parallel()
	nested := func(levels int) []byte {
		wrap := func(b []byte, field protowire.Number) []byte {
			return protowire.AppendBytes(protowire.AppendTag(nil, field, protowire.BytesType), b)
		}
		var b []byte // a Value
		for range levels {
			b = wrap(wrap(b, 1), 6)
		}
		b = wrap(wrap(b, 2), 1)     // fields of a Struct
		b = wrap(wrap(b, 2), 1)     // filter_metadata
		return wrap(wrap(b, 11), 1) // metadata_context
	}
	var taken, refused int
	for levels := 4985; levels < 5005; levels++ {
		b := nested(levels)
		var r authz.Request
		err := extauthz.FromBytes(b, 0, &r)
		if ok := proto.Unmarshal(b, new(authv3.CheckRequest)) == nil; ok != (err == nil) {
			t.Errorf("%d levels: the generated decoder takes it: %t; read: %v", levels, ok, err)
		} else if ok {
			taken++
		} else {
			refused++
		}
	}
	if taken == 0 || refused == 0 {
		t.Errorf("%d are taken and %d refused; want some of both", taken, refused)
	}
}

// TestMetadataTakesLittleMemory is not parallel: it counts what the process has.
func TestMetadataTakesLittleMemory(t *testing.T) {
	heap := func() (now, total uint64) {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc, m.TotalAlloc
	}
	answer := func(s *extauthz.Server, b []byte, allowed bool) {
		t.Helper()
		r, err := s.Answer(as(server), b)
		var a authv3.CheckResponse
		if err != nil || proto.Unmarshal(r, &a) != nil || (a.GetOkResponse() != nil) != allowed {
			t.Fatalf("answer %v: %v", &a, err)
		}
	}
	reads := newWorld(t, fixed(compile(t, readsClaims))).Server
	// Each message is another one, of 8 KiB.
	const checks = 200
	b := withMetadata(t, metadataOf(3900, 12))
	at := bytes.Index(b, []byte("xxxxxxxxxxxx"))
	before, _ := heap()
	for i := range checks {
		binary.BigEndian.PutUint32(b[at:], 0x20202020+uint32(i&0x3f)<<8+uint32(i>>6))
		answer(reads, b, true)
	}
	// Decoded they take some 55 MB.
	if after, _ := heap(); after > before+24<<20 {
		t.Errorf("%d messages are kept in %d MiB", checks, (after-before)>>20)
	}

	big := withMetadata(t, metadataOf(128<<10, 0)) // 256 KiB
	for name, s := range map[string]*extauthz.Server{"who reads none": newWorld(t, fixed(compile(t, readsNothing))).Server, "who reads claims": reads} {
		answer(s, big, name == "who reads none")
		_, before := heap()
		const n = 20
		for range n {
			answer(s, big, name == "who reads none")
		}
		// It were 9 MB for each.
		if _, after := heap(); after-before > n*64<<10 {
			t.Errorf("for a message of %d KiB, %s takes %d KiB", len(big)>>10, name, (after-before)/n>>10)
		}
	}
	runtime.KeepAlive(reads)
}
