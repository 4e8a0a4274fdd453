package extauthz_test

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/extauthz"
)

func TestFromCheckRequest(t *testing.T) {
	t.Parallel()
	type attributes = authv3.AttributeContext
	const fromHTTP = authz.FieldsHTTP &^ (authz.FieldRemoteIP | authz.FieldSNI | authz.FieldMetadata)
	const fromTCP = authz.FieldsTCP & fromHTTP
	base := authz.Request{
		Known: fromHTTP, HTTP: true, Authenticated: true, Principal: []byte(client),
		SourceIP: netip.MustParseAddr("10.0.0.1"), DestinationIP: netip.MustParseAddr("10.0.0.2"), DestinationPort: 8080,
		Method: []byte("GET"), Path: []byte("/ok?q=1"), Host: []byte("server:8080"),
	}
	svid := certificate(t, "", nil, client)
	plus := svid
	for !strings.Contains(plus, "%2B") {
		plus = certificate(t, "", nil, client)
	}
	named := certificate(t, "name", []string{"a.example", "b.example"}, client)
	dnsOnly := certificate(t, "", []string{"a.example", "b.example"})
	subjectOnly := certificate(t, "name", nil)

	for name, c := range map[string]struct {
		change func(a *attributes)
		want   func(r *authz.Request)
	}{
		"takes everything from a request with raw headers":    {func(a *attributes) {}, func(r *authz.Request) {}},
		"takes everything from a request with joined headers": {joined, func(r *authz.Request) {}},
		"takes raw bytes over cleaned ones": {
			func(a *attributes) {
				a.Request.Http.Path, a.Request.Http.Host = "/!", "!"
				a.Request.Http.HeaderMap = raw(":path", "/\xff", ":authority", "\xfe", ":method", "GET")
			},
			func(r *authz.Request) { r.Path, r.Host = []byte("/\xff"), []byte("\xfe") },
		},
		"takes raw headers alone": {
			func(a *attributes) {
				a.Request.Http = &authv3.AttributeContext_HttpRequest{HeaderMap: a.Request.Http.HeaderMap}
			},
			func(r *authz.Request) {},
		},
		"takes a text value of a raw header": {
			func(a *attributes) {
				a.Request.Http.HeaderMap = &corev3.HeaderMap{Headers: []*corev3.HeaderValue{
					{Key: ":path", Value: "/ok?q=1"}, {Key: ":method", Value: "GET"}, {Key: ":authority", Value: "server:8080"},
				}}
			},
			func(r *authz.Request) {},
		},
		"does not know cleaned bytes": {
			func(a *attributes) {
				joined(a)
				a.Request.Http.Path, a.Request.Http.Host, a.Request.Http.Method = "/a!b", "h!", "!"
			},
			func(r *authz.Request) {
				r.Known = fromTCP | authz.FieldHeaders | authz.FieldClaims
				r.Path, r.Host, r.Method = nil, nil, nil
			},
		},
		"falls back where raw headers lack pseudo-headers": {
			func(a *attributes) { a.Request.Http.HeaderMap = raw("user-agent", "x") },
			func(r *authz.Request) {},
		},
		"knows an empty host that is there": {
			func(a *attributes) {
				a.Request.Http.Host = ""
				a.Request.Http.HeaderMap = raw(":path", "/ok?q=1", ":method", "GET", ":authority", "")
			},
			func(r *authz.Request) { r.Host = []byte{} },
		},
		"knows an empty joined host that is there": {
			func(a *attributes) { a.Request.Http.Host = ""; joined(a) },
			func(r *authz.Request) { r.Host = []byte{} },
		},
		"does not know an empty host that may not be there": {
			func(a *attributes) { a.Request.Http.Host = ""; joined(a); delete(a.Request.Http.Headers, ":authority") },
			func(r *authz.Request) { r.Known &^= authz.FieldHost; r.Host = nil },
		},
		"does not know an empty method": {
			func(a *attributes) { a.Request.Http.Method = ""; joined(a) },
			func(r *authz.Request) { r.Known &^= authz.FieldMethod; r.Method = nil },
		},
		"does not know an empty path": {
			func(a *attributes) { a.Request.Http.Path = ""; joined(a) },
			func(r *authz.Request) { r.Known &^= authz.FieldPath; r.Path = nil },
		},
		"knows that CONNECT has no path": {
			func(a *attributes) { a.Request.Http.Path, a.Request.Http.Method = "", "CONNECT"; joined(a) },
			func(r *authz.Request) { r.Path, r.Method = nil, []byte("CONNECT") },
		},
		"does not know an empty raw path, nor that of CONNECT": {
			func(a *attributes) {
				a.Request.Http.Path, a.Request.Http.Method = "", "CONNECT"
				a.Request.Http.HeaderMap = raw(":path", "", ":method", "CONNECT", ":authority", "server:8080")
			},
			func(r *authz.Request) { r.Known &^= authz.FieldPath; r.Path, r.Method = nil, []byte("CONNECT") },
		},
		"does not use query, fragment or the service": {
			func(a *attributes) {
				a.Request.Http.Query, a.Request.Http.Fragment, a.Source.Service = "x=1", "f", "spiffe://cluster.local/ns/x/sa/y"
			},
			func(r *authz.Request) {},
		},
		"takes a request without HTTP as a connection": {
			func(a *attributes) { a.Request = nil },
			func(r *authz.Request) {
				r.HTTP, r.Known = false, fromTCP
				r.Method, r.Path, r.Host = nil, nil, nil
			},
		},
		"takes an empty principal as plaintext": {
			func(a *attributes) { a.Source.Principal = "" },
			func(r *authz.Request) { r.Authenticated, r.Principal = false, nil },
		},
		"does not know the names of a peer that is no SPIFFE ID": {
			func(a *attributes) { a.Source.Principal = "CN=client" },
			func(r *authz.Request) { r.Known &^= authz.FieldPrincipal; r.Principal = nil },
		},
		"does not know a cleaned principal": {
			func(a *attributes) { a.Source.Principal = client + "!" },
			func(r *authz.Request) { r.Known &^= authz.FieldPrincipal; r.Principal = nil },
		},
		"does not know anything of a source that is not there": {
			func(a *attributes) { a.Source = nil },
			func(r *authz.Request) {
				r.Known &^= authz.FieldPeer | authz.FieldPrincipal | authz.FieldSourceIP
				r.Authenticated, r.Principal, r.SourceIP = false, nil, netip.Addr{}
			},
		},
		"reads an SVID": {
			func(a *attributes) { a.Source.Certificate = svid },
			func(r *authz.Request) {},
		},
		"reads a certificate with a plus sign that is not encoded": {
			func(a *attributes) { a.Source.Certificate = strings.ReplaceAll(plus, "%2B", "+") },
			func(r *authz.Request) {},
		},
		"reads all names of a certificate": {
			func(a *attributes) { a.Source.Certificate = named },
			func(r *authz.Request) {
				r.OtherNames = [][]byte{[]byte("a.example"), []byte("b.example"), []byte("CN=name")}
			},
		},
		"reads a certificate without URI SAN": {
			func(a *attributes) { a.Source.Certificate, a.Source.Principal = dnsOnly, "a.example" },
			func(r *authz.Request) { r.Principal, r.OtherNames = []byte("a.example"), [][]byte{[]byte("b.example")} },
		},
		"reads a certificate without SAN": {
			func(a *attributes) { a.Source.Certificate, a.Source.Principal = subjectOnly, "CN=name" },
			func(r *authz.Request) { r.Principal = []byte("CN=name") },
		},
		"does not know the address of a pipe": {
			func(a *attributes) { a.Source.Address, a.Destination.Address = pipe(), pipe() },
			func(r *authz.Request) {
				r.Known &^= authz.FieldSourceIP | authz.FieldDestinationIP | authz.FieldDestinationPort
				r.SourceIP, r.DestinationIP, r.DestinationPort = netip.Addr{}, netip.Addr{}, 0
			},
		},
		"does not know an internal address": {
			func(a *attributes) { a.Source.Address, a.Destination.Address = internal(), internal() },
			func(r *authz.Request) {
				r.Known &^= authz.FieldSourceIP | authz.FieldDestinationIP | authz.FieldDestinationPort
				r.SourceIP, r.DestinationIP, r.DestinationPort = netip.Addr{}, netip.Addr{}, 0
			},
		},
		"does not know an address that is not there": {
			func(a *attributes) { a.Source.Address, a.Destination = nil, nil },
			func(r *authz.Request) {
				r.Known &^= authz.FieldSourceIP | authz.FieldDestinationIP | authz.FieldDestinationPort
				r.SourceIP, r.DestinationIP, r.DestinationPort = netip.Addr{}, netip.Addr{}, 0
			},
		},
		"does not know a named port": {
			func(a *attributes) {
				a.Destination.Address.GetSocketAddress().PortSpecifier = &corev3.SocketAddress_NamedPort{NamedPort: "http"}
			},
			func(r *authz.Request) { r.Known &^= authz.FieldDestinationPort; r.DestinationPort = 0 },
		},
		"removes zones": {
			func(a *attributes) { a.Source.Address = socketAddress("fe80::1%eth0", 1) },
			func(r *authz.Request) { r.SourceIP = netip.MustParseAddr("fe80::1") },
		},
		"unmaps IPv4": {
			func(a *attributes) { a.Source.Address = socketAddress("::ffff:10.0.0.1", 1) },
			func(r *authz.Request) {},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := check(c.change)
			want := base
			if r.GetAttributes().GetSource().GetCertificate() != "" {
				want.Serial = []byte{1}
			}
			c.want(&want)
			// What was in it before must not show.
			got := authz.Request{Known: ^authz.Field(0), HTTP: true, Authenticated: true, Path: []byte("/old"), OtherNames: [][]byte{nil}, DestinationPort: 1}
			if err := extauthz.FromCheckRequest(r, &got); err != nil {
				t.Fatal(err)
			}
			// Bytes of what is unknown do not matter, but nil and empty differ.
			got.Headers = nil // has a test of its own
			if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{}), cmp.FilterPath(func(p cmp.Path) bool {
				return p.Last().String() == ".Method" && want.Known&authz.FieldMethod == 0 ||
					p.Last().String() == ".Path" && want.Known&authz.FieldPath == 0 ||
					p.Last().String() == ".Host" && want.Known&authz.FieldHost == 0
			}, cmp.Ignore())); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestFromCheckRequestReadsHeaders(t *testing.T) {
	t.Parallel()
	value := func(name, v string) authz.Header { return authz.Header{Name: name, Value: []byte(v)} }
	for name, c := range map[string]struct {
		raw    *corev3.HeaderMap
		joined map[string]string
		want   []authz.Header
	}{
		"each raw value by itself, in order": {
			raw:  raw(":path", "/ok?q=1", "X-Role", "a,b", "x-role", "", "x-role", "\xff!", ":scheme", "https"),
			want: []authz.Header{value("x-role", "a,b"), value("x-role", ""), value("x-role", "\xff!"), value(":scheme", "https")},
		},
		"a joined value that may be several":   {joined: map[string]string{"x-role": "a,b", "host": "x"}, want: []authz.Header{{Name: "x-role", Value: []byte("a,b"), Form: authz.HeaderJoined}}},
		"a joined value that is one":           {joined: map[string]string{"X-Role": "a"}, want: []authz.Header{value("x-role", "a")}},
		"a joined value that was cleaned":      {joined: map[string]string{"x-role": "a!"}, want: []authz.Header{{Name: "x-role", Value: []byte("a!"), Form: authz.HeaderUnclear}}},
		"raw ones where both are there":        {raw: raw("a", "1", "a", "2"), joined: map[string]string{"a": "1,2"}, want: []authz.Header{value("a", "1"), value("a", "2")}},
		"raw ones where the other was cleaned": {raw: raw("a", "\xff"), joined: map[string]string{"a": "!"}, want: []authz.Header{value("a", "\xff")}},
		"none":                                 {},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var r authz.Request
			check := check(func(a *authv3.AttributeContext) { a.Request.Http.HeaderMap, a.Request.Http.Headers = c.raw, c.joined })
			if err := extauthz.FromCheckRequest(check, &r); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(c.want, r.Headers); d != "" || r.Known&authz.FieldHeaders == 0 {
				t.Errorf("known %b\n%s", r.Known, d)
			}
		})
	}
}

func TestFromCheckRequestReadsTLSAndMetadata(t *testing.T) {
	t.Parallel()
	type attributes = authv3.AttributeContext
	metadata := func(v *structpb.Value) func(a *attributes) {
		return func(a *attributes) {
			a.MetadataContext = &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
				"envoy.filters.http.jwt_authn": {Fields: map[string]*structpb.Value{"payload": v}},
			}}
		}
	}
	for name, c := range map[string]struct {
		change func(a *attributes)
		sni    string
		known  authz.Field
		iss    string
	}{
		"no TLS session and no token":         {func(a *attributes) {}, "", authz.FieldClaims, ""},
		"a TLS session without a server name": {func(a *attributes) { a.TlsSession = &authv3.AttributeContext_TLSSession{} }, "", authz.FieldClaims | authz.FieldSNI, ""},
		"a server name in the client's case":  {func(a *attributes) { a.TlsSession = &authv3.AttributeContext_TLSSession{Sni: "A.Example"} }, "A.Example", authz.FieldClaims | authz.FieldSNI, ""},
		// The Kelvin sign, which Envoy does not lower to "k".
		"a server name with a letter that is like another": {func(a *attributes) { a.TlsSession = &authv3.AttributeContext_TLSSession{Sni: "\u212a"} }, "\u212a", authz.FieldClaims | authz.FieldSNI, ""},
		"a server name that was cleaned":                   {func(a *attributes) { a.TlsSession = &authv3.AttributeContext_TLSSession{Sni: "a!"} }, "a!", authz.FieldClaims, ""},
		"a destination's service of a request":             {func(a *attributes) { a.Destination.Service = "x" }, "", authz.FieldClaims, ""},
		"that of a connection":                             {func(a *attributes) { a.Destination.Service, a.Request = "X", nil }, "X", authz.FieldSNI, ""},
		"the payload of a token": {
			metadata(structpb.NewStructValue(&structpb.Struct{Fields: map[string]*structpb.Value{"iss": structpb.NewStringValue("i")}})),
			"", authz.FieldClaims, "i",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var r authz.Request
			if err := extauthz.FromCheckRequest(check(c.change), &r); err != nil {
				t.Fatal(err)
			}
			if string(r.SNI) != c.sni || r.Known&(authz.FieldClaims|authz.FieldSNI) != c.known || r.Claims.GetFields()["iss"].GetStringValue() != c.iss {
				t.Errorf("server name %q, known %b, claims %v", r.SNI, r.Known, r.Claims)
			}
		})
	}
	var r authz.Request
	if err := extauthz.FromCheckRequest(check(metadata(structpb.NewStringValue("x"))), &r); err == nil {
		t.Error("took a payload that is no object")
	}
}

func TestFromCheckRequestRefuses(t *testing.T) {
	t.Parallel()
	type attributes = authv3.AttributeContext
	svid := certificate(t, "", nil, client)
	with := func(c string) func(a *attributes) { return func(a *attributes) { a.Source.Certificate = c } }
	for name, c := range map[string]struct {
		reason authz.Reason
		change func(a *attributes)
	}{
		"a source that is no address": {extauthz.ReasonRequest, func(a *attributes) { a.Source.Address = socketAddress("here", 1) }},
		"an empty source address":     {extauthz.ReasonRequest, func(a *attributes) { a.Source.Address = socketAddress("", 1) }},
		"a destination with a name":   {extauthz.ReasonRequest, func(a *attributes) { a.Destination.Address = socketAddress("server", 1) }},
		"two values of a header":      {extauthz.ReasonRequest, func(a *attributes) { a.Request.Http.HeaderMap.Headers[3].Value = "y" }},
		"headers that contradict": {extauthz.ReasonRequest, func(a *attributes) {
			a.Request.Http.HeaderMap, a.Request.Http.Headers = raw("a", "1"), map[string]string{"a": "2"}
		}},
		"a header that only one form has": {extauthz.ReasonRequest, func(a *attributes) {
			a.Request.Http.HeaderMap, a.Request.Http.Headers = raw("a", "1"), map[string]string{"b": ""}
		}},
		"a port that is none":            {extauthz.ReasonRequest, func(a *attributes) { a.Destination.Address = socketAddress("10.0.0.2", 65536) }},
		"an endless principal":           {extauthz.ReasonRequest, func(a *attributes) { a.Source.Principal = "spiffe://" + strings.Repeat("a", 2048) }},
		"two paths":                      {extauthz.ReasonRequest, func(a *attributes) { a.Request.Http.HeaderMap = raw(":path", "/ok?q=1", ":path", "/ok?q=1") }},
		"two hosts":                      {extauthz.ReasonRequest, func(a *attributes) { a.Request.Http.HeaderMap = raw(":authority", "a", ":authority", "b") }},
		"two methods":                    {extauthz.ReasonRequest, func(a *attributes) { a.Request.Http.HeaderMap = raw(":method", "GET", ":method", "GET") }},
		"another raw path":               {extauthz.ReasonRequest, func(a *attributes) { a.Request.Http.Path = "/admin" }},
		"another raw host":               {extauthz.ReasonRequest, func(a *attributes) { a.Request.Http.Host = "x" }},
		"another raw method":             {extauthz.ReasonRequest, func(a *attributes) { a.Request.Http.Method = "POST" }},
		"a header with two values":       {extauthz.ReasonRequest, func(a *attributes) { a.Request.Http.HeaderMap.Headers[1].Value = "/" }},
		"a certificate of somebody else": {extauthz.ReasonCertificate, with(certificate(t, "", nil, client+"x"))},
		"a certificate without a principal": {extauthz.ReasonCertificate, func(a *attributes) {
			a.Source.Certificate, a.Source.Principal = svid, ""
		}},
		"two URI SANs":           {extauthz.ReasonCertificate, with(certificate(t, "", nil, client, client+"2"))},
		"the same URI SAN twice": {extauthz.ReasonCertificate, with(certificate(t, "", nil, client, client))},
		"a nameless certificate": {extauthz.ReasonCertificate, func(a *attributes) {
			a.Source.Certificate, a.Source.Principal = certificate(t, "", nil), ""
		}},
		"a certificate that is not encoded": {extauthz.ReasonCertificate, with("%zz")},
		"a certificate that is no PEM":      {extauthz.ReasonCertificate, with("x")},
		"PEM that is no certificate":        {extauthz.ReasonCertificate, with(strings.ReplaceAll(svid, "CERTIFICATE", "PUBLIC%20KEY"))},
		"a certificate that is cut":         {extauthz.ReasonCertificate, with(svid[:len(svid)/2])},
		"a changed certificate":             {extauthz.ReasonCertificate, with(strings.Replace(svid, "M", "A", 1))},
		"two certificates":                  {extauthz.ReasonCertificate, with(svid + svid)},
		"text before the certificate":       {extauthz.ReasonCertificate, with("x%0A" + svid)},
		"text after the certificate":        {extauthz.ReasonCertificate, with(svid + "x")},
		"an endless certificate":            {extauthz.ReasonCertificate, with(svid + strings.Repeat("%0A", 6000))},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var into authz.Request
			err := extauthz.FromCheckRequest(check(c.change), &into)
			var re *extauthz.RequestError
			if !errors.As(err, &re) || re.Reason != c.reason || re.Detail == "" {
				t.Fatalf("error %v; want one for %s", err, c.reason)
			}
			if strings.Contains(err.Error(), client) {
				t.Errorf("error %q holds something of the request", err)
			}
			newWorld(t, fixed(compile(t, policyText))).deny(check(c.change), c.reason)
		})
	}
	for _, r := range []*authv3.CheckRequest{nil, {}} {
		if err := extauthz.FromCheckRequest(r, new(authz.Request)); err == nil {
			t.Errorf("%v: no error", r)
		}
	}
}
