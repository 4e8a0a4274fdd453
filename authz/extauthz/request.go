package extauthz

import (
	"bytes"
	"net/netip"
	"strings"
	"unicode/utf8"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
)

// Reasons of denials that come before any policy is asked; [authz.Reason] has the
// others.
const (
	// ReasonRequest: the CheckRequest is malformed or contradicts itself.
	ReasonRequest authz.Reason = "check-request"
	// ReasonCertificate: the peer's certificate cannot be read, is not the
	// principal's, or has several URI SANs.
	ReasonCertificate authz.Reason = "peer-certificate"
	// ReasonDestination: the destination address is not the calling pod's.
	ReasonDestination authz.Reason = "destination-address"
	// ReasonNotAsked: a CUSTOM policy has an extension provider that must be
	// asked, and nobody is configured who could.
	ReasonNotAsked authz.Reason = "provider-not-asked"
	// ReasonProviderDenied: the extension provider of a CUSTOM policy denied.
	ReasonProviderDenied authz.Reason = "provider-denied"
	// ReasonProviderFailed: the extension provider of a CUSTOM policy gave no
	// answer that can be relied on.
	ReasonProviderFailed authz.Reason = "provider-failed"
	// ReasonProviderUnknown: a CUSTOM policy names an extension provider that is not
	// configured.
	ReasonProviderUnknown authz.Reason = "provider-unknown"
	// ReasonInternal: a defect of this program.
	ReasonInternal authz.Reason = "internal"
)

// maxPrincipal is the longest SPIFFE ID there is (SPIFFE-ID section 2.3).
const maxPrincipal = 2048

// RequestError says why a CheckRequest must be denied without asking the policies.
type RequestError struct {
	// Reason is one of the Reason constants of this package.
	Reason authz.Reason
	// Detail is for logs; it holds nothing of the request.
	Detail string
}

// Error is "check request: DETAIL".
func (e *RequestError) Error() string { return "check request: " + e.Detail }

func malformed(detail string) error { return &RequestError{ReasonRequest, detail} }

// FromCheckRequest makes the request that r describes. It overwrites all of into,
// whose slices may share memory with r. An error is a *[RequestError], and the
// request must then be denied.
//
// What r does not say is left unknown:
//
//   - A source without attributes is unknown; one with an empty principal and no
//     certificate is a peer without TLS.
//   - A principal is completely known if the certificate is there, or if it is a
//     SPIFFE ID: an X.509-SVID has one URI SAN, and policies cannot mean its other
//     names. Envoy sends the other kinds of principals (the first DNS SAN, else the
//     subject) without saying what else the certificate holds.
//   - Addresses that are pipes or internal to Envoy are unknown.
//   - Method, path and host come from header_map, where Envoy sends the bytes as
//     they are (encode_raw_headers). Otherwise they come from the fields in which
//     Envoy replaces bytes that are no UTF-8 by "!", and a value that holds one is
//     unknown. Two forms that differ are an error.
//   - Headers come from header_map, each value by itself, or else from headers,
//     where Envoy joins the values of a name. The list counts as complete: where
//     allowed_headers or disallowed_headers hide headers from this service, they
//     must not hide one that policies read.
//   - The remote address is left to be derived from X-Forwarded-For.
//   - The server name is known where the proxy sends the TLS session
//     (include_tls_session), or, for TCP, as the destination's service.
//   - The claims are the payload that jwt_authn has left in the metadata context.
//     Without it no token was verified. Metadata of other filters is known where
//     it is there.
//   - Metadata of more than 64 KiB, or of more than 8192 values, is an error.
//   - A request without HTTP attributes is a TCP connection.
//
// The path keeps its query; Decide cuts it. The query and fragment fields are not
// used: Envoy leaves them empty. source.service is not either: clients control it.
func FromCheckRequest(r *authv3.CheckRequest, into *authz.Request) error {
	var a attributes
	a.take(r)
	*into = authz.Request{}
	return (&reader{}).read(&a, authz.FieldsHTTP, into)
}

// FromBytes is FromCheckRequest of a CheckRequest in bytes, with which into then
// shares memory. Headers, and claims and metadata, are left out and unknown where they
// are not needed (Program.Reads). Bytes that proto.Unmarshal refuses are an error for
// [ReasonRequest].
func FromBytes(message []byte, needed authz.Field, into *authz.Request) error {
	var a attributes
	*into = authz.Request{}
	if !a.scan(message, needed&authz.FieldHeaders != 0) {
		return errMessage
	}
	return (&reader{}).read(&a, needed, into)
}

// reader makes requests of what CheckRequests say. It remembers certificates and
// metadata; the zero reader remembers nothing.
type reader struct {
	peers    *remembered[*peer]
	metadata *remembered[map[string]*structpb.Struct]
}

// read makes the request that a describes. Headers and metadata are left out, and so
// are unknown, where they are not needed. into is zero, but for the space of its
// headers.
func (rd *reader) read(a *attributes, needed authz.Field, into *authz.Request) error {
	if !a.there {
		return malformed("it has no attributes")
	}
	// Bytes that cannot be read come before everything else.
	if err := rd.readMetadata(a, needed, into); err != nil {
		return err
	}
	if a.source.there {
		addr, _, err := a.source.address.read()
		if err != nil {
			return err
		}
		if addr.IsValid() {
			into.SourceIP = addr
			into.Known |= authz.FieldSourceIP
		}
		if err := rd.principal(&a.source, into); err != nil {
			return err
		}
	}
	dst, port, err := a.destination.address.read()
	if err != nil {
		return err
	}
	if dst.IsValid() {
		into.DestinationIP = dst
		into.Known |= authz.FieldDestinationIP
	}
	// Port 0 is where no port was given; nobody listens there.
	if port != 0 {
		into.DestinationPort = port
		into.Known |= authz.FieldDestinationPort
	}
	service := a.destination.service
	if a.http {
		service = nil
	}
	a.serverName(service, into)
	if !a.http {
		return nil
	}
	into.HTTP = true
	if err := readHTTP(a, into); err != nil {
		return err
	}
	if err := readHeaders(a, needed, into); err != nil {
		return err
	}
	if needed&(authz.FieldClaims|authz.FieldMetadata) == 0 {
		return nil
	}
	return readClaims(into)
}

// serverName reads the server name; Decide does not mind its case.
func (a *attributes) serverName(service []byte, into *authz.Request) {
	name := a.sni
	if len(name) == 0 {
		name = service
	}
	if !a.tls && len(name) == 0 {
		return
	}
	into.SNI = name
	// "!" may stand for any byte.
	if !cleaned(name) {
		into.Known |= authz.FieldSNI
	}
}

// cleaned reports whether Envoy may have replaced bytes of b.
func cleaned(b []byte) bool { return bytes.IndexByte(b, '!') >= 0 }

// errMessage says that the bytes are none of a CheckRequest.
var errMessage = malformed("its bytes are no CheckRequest")

const (
	// jwtPayload is the key, below authz.JWTFilter, under which Istio has the payload of
	// the token that Envoy's jwt_authn verified.
	jwtPayload = "payload"
	// authzFilter is where Envoy's ext_authz leaves the metadata of answers.
	authzFilter = "envoy.filters.http.ext_authz"
)

func readClaims(into *authz.Request) error {
	into.Known |= authz.FieldClaims
	v, ok := into.Metadata[authz.JWTFilter].GetFields()[jwtPayload]
	if !ok {
		return nil
	}
	if into.Claims = v.GetStructValue(); into.Claims == nil {
		return malformed("the payload of the token is no object")
	}
	return nil
}

// readHeaders lists the headers without the pseudo-headers, which have fields of
// their own, but for :scheme and :protocol, which have none.
func readHeaders(a *attributes, needed authz.Field, into *authz.Request) error {
	// Nobody sends both.
	both := len(a.raw) > 0 && len(a.joinedHeaders().list) > 0
	if needed&authz.FieldHeaders == 0 && !both {
		for i := range a.raw {
			if _, ok := a.raw[i].value(); !ok && !ownField(headerName(a.raw[i].key)) {
				return errTwoValues
			}
		}
		return nil
	}
	into.Known |= authz.FieldHeaders
	for i := range a.raw {
		name := headerName(a.raw[i].key)
		if ownField(name) {
			continue
		}
		value, ok := a.raw[i].value()
		if !ok {
			return errTwoValues
		}
		into.Headers = append(into.Headers, authz.Header{Name: name, Value: value})
	}
	if both {
		return agree(into.Headers, a.joined.list)
	}
	for i := range a.joined.list {
		name := headerName(a.joined.list[i].key)
		if ownField(name) {
			continue
		}
		hd := authz.Header{Name: name, Value: a.joined.list[i].value}
		switch {
		case cleaned(hd.Value):
			hd.Form = authz.HeaderUnclear
		case bytes.IndexByte(hd.Value, ',') >= 0:
			hd.Form = authz.HeaderJoined
		}
		into.Headers = append(into.Headers, hd)
	}
	return nil
}

var errTwoValues = malformed("a header has two values")

// headerName is the name in lower case, as Envoy sends it.
func headerName(key []byte) string {
	for _, c := range key {
		if c >= utf8.RuneSelf || 'A' <= c && c <= 'Z' {
			return strings.ToLower(string(key))
		}
	}
	return textOf(key)
}

func ownField(name string) bool {
	return name == "host" || len(name) > 0 && name[0] == ':' && (name == ":method" || name == ":path" || name == ":authority")
}

// agree refuses a joined header that is not what the list has. Envoy sends only one
// form; many headers in both are not compared.
func agree(list []authz.Header, joined []pair) error {
	if len(list)*len(joined) > 1<<20 {
		return malformed("it has too many headers in two forms")
	}
	for i := range joined {
		name := headerName(joined[i].key)
		if ownField(name) {
			continue
		}
		var all []byte
		found := false
		for _, h := range list {
			if h.Name != name {
				continue
			}
			if found {
				all = append(all, ',')
			}
			all, found = append(all, h.Value...), true
		}
		if !found || string(all) != string(joined[i].value) && utf8.Valid(all) {
			return malformed("header_map contradicts headers")
		}
	}
	return nil
}

// principal reads who the peer is.
func (rd *reader) principal(p *peerAttributes, into *authz.Request) error {
	name := p.principal
	if len(name) > maxPrincipal {
		return malformed("the principal is too long")
	}
	into.Known |= authz.FieldPeer
	switch {
	case len(p.certificate) > 0:
		peer, err := rd.certificate(textOf(p.certificate))
		if err != nil {
			return err
		}
		if string(peer.principal) != string(name) {
			return &RequestError{ReasonCertificate, "the principal is not the certificate's"}
		}
		into.Authenticated = true
		into.Principal, into.OtherNames, into.Serial = peer.principal, peer.others, peer.serial
		into.Known |= authz.FieldPrincipal
	case len(name) == 0:
		into.Known |= authz.FieldPrincipal
	default:
		into.Authenticated = true
		// "!" may stand for any byte, and is in no SPIFFE ID.
		const scheme = "spiffe://"
		if len(name) >= len(scheme) && string(name[:len(scheme)]) == scheme && !cleaned(name) {
			into.Principal = name
			into.Known |= authz.FieldPrincipal
		}
	}
	return nil
}

// read is the IP address and port of an address; both zero if it is of another
// kind, the port if it is not a number.
func (a *address) read() (ip netip.Addr, port uint16, err error) {
	if !a.socket {
		return ip, 0, nil
	}
	// The text is looked at only during the call; an error that holds it is not kept.
	ip, err = netip.ParseAddr(textOf(a.ip))
	if err != nil {
		return netip.Addr{}, 0, malformed("an address is no IP address")
	}
	if a.port > 0xffff {
		return netip.Addr{}, 0, malformed("a port is larger than 65535")
	}
	return ip.Unmap().WithZone(""), uint16(a.port), nil
}

// pseudo is a pseudo-header of header_map.
type pseudo struct {
	value []byte
	found bool
}

func readHTTP(a *attributes, into *authz.Request) error {
	var method, path, host pseudo
	for i := range a.raw {
		h := &a.raw[i]
		if len(h.key) == 0 || h.key[0] != ':' {
			continue
		}
		var p *pseudo
		switch string(h.key) {
		case ":method":
			p = &method
		case ":path":
			p = &path
		case ":authority":
			p = &host
		default:
			continue
		}
		if p.found {
			return malformed("a pseudo-header is there twice")
		}
		if p.value, p.found = h.value(); !p.found { // not nil: present without a value
			return errTwoValues
		}
	}
	var ok bool
	var err error
	if into.Method, ok, err = method.or(a.method); err != nil {
		return err
	} else if ok && len(into.Method) > 0 {
		into.Known |= authz.FieldMethod
	}
	switch into.Path, ok, err = path.or(a.path); {
	case err != nil:
		return err
	case ok && len(into.Path) > 0:
		into.Known |= authz.FieldPath
	case ok && !path.found && string(into.Method) == "CONNECT" && into.Known&authz.FieldMethod != 0:
		into.Path = nil // CONNECT has none
		into.Known |= authz.FieldPath
	}
	switch into.Host, ok, err = host.or(a.host); {
	case err != nil:
		return err
	case ok && (host.found || len(into.Host) > 0):
		into.Known |= authz.FieldHost
	case ok:
		// The field alone does not tell a missing value from an empty one.
		if v, there := a.joinedHeaders().get(":authority"); there && len(v) == 0 {
			into.Host = []byte{}
			into.Known |= authz.FieldHost
		}
	}
	return nil
}

// or is the value of p, or else that of the field that Envoy has cleaned; not nil,
// unless there is neither. ok is false if it may have had other bytes.
func (p pseudo) or(field []byte) (value []byte, ok bool, err error) {
	if !p.found {
		if field == nil {
			field = []byte{}
		}
		return field, !cleaned(field), nil
	}
	// Cleaning changes only what is no UTF-8.
	if len(field) > 0 && string(p.value) != string(field) && utf8.Valid(p.value) {
		return nil, false, malformed("header_map contradicts the fields of the request")
	}
	return p.value, true, nil
}

// logged is the path as it may be logged: without what follows it, and short.
func logged(path []byte) string {
	const limit = 256
	if i := bytes.IndexAny(path, "?#"); i >= 0 {
		path = path[:i]
	}
	if len(path) > limit {
		return string(path[:limit]) + "…"
	}
	return string(path)
}
