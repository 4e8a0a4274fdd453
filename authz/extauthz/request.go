package extauthz

import (
	"bytes"
	"net/netip"
	"strings"
	"unicode/utf8"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

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
//   - A request without HTTP attributes is a TCP connection.
//
// The path keeps its query; Decide cuts it. The query and fragment fields are not
// used: Envoy leaves them empty. source.service is not either: clients control it.
func FromCheckRequest(r *authv3.CheckRequest, into *authz.Request) error {
	_, err := (*peers)(nil).read(r, into)
	return err
}

// read is FromCheckRequest with remembered certificates; p may be nil. dst is the
// destination's address, invalid where there is none.
func (p *peers) read(r *authv3.CheckRequest, into *authz.Request) (dst netip.Addr, err error) {
	*into = authz.Request{}
	a := r.GetAttributes()
	if a == nil {
		return dst, malformed("it has no attributes")
	}
	if src := a.GetSource(); src != nil {
		addr, _, err := socket(src.GetAddress())
		if err != nil {
			return dst, err
		}
		if addr.IsValid() {
			into.SourceIP = addr
			into.Known |= authz.FieldSourceIP
		}
		if err := p.principal(src, into); err != nil {
			return dst, err
		}
	}
	dst, port, err := socket(a.GetDestination().GetAddress())
	if err != nil {
		return dst, err
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
	into.Metadata = a.GetMetadataContext().GetFilterMetadata()
	h := a.GetRequest().GetHttp()
	if h == nil {
		sni(a.GetTlsSession(), a.GetDestination().GetService(), into)
		return dst, nil
	}
	into.HTTP = true
	sni(a.GetTlsSession(), "", into)
	if err := readHTTP(h, into); err != nil {
		return dst, err
	}
	if err := readHeaders(h, into); err != nil {
		return dst, err
	}
	return dst, readClaims(into)
}

// sni reads the server name; Decide does not mind its case.
func sni(tls *authv3.AttributeContext_TLSSession, service string, into *authz.Request) {
	name := tls.GetSni()
	if name == "" {
		name = service
	}
	if tls == nil && name == "" {
		return
	}
	into.SNI = []byte(name)
	// "!" may stand for any byte.
	if !strings.Contains(name, "!") {
		into.Known |= authz.FieldSNI
	}
}

// jwtFilter is where Envoy's jwt_authn leaves the payload of the token that it
// verified, in Istio under this key.
const (
	jwtFilter  = "envoy.filters.http.jwt_authn"
	jwtPayload = "payload"
)

func readClaims(into *authz.Request) error {
	into.Known |= authz.FieldClaims
	v, ok := into.Metadata[jwtFilter].GetFields()[jwtPayload]
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
func readHeaders(h *authv3.AttributeContext_HttpRequest, into *authz.Request) error {
	into.Known |= authz.FieldHeaders
	raw, joined := h.GetHeaderMap().GetHeaders(), h.GetHeaders()
	if len(raw) == 0 && len(joined) == 0 {
		return nil
	}
	into.Headers = make([]authz.Header, 0, max(len(raw), len(joined)))
	for _, hv := range raw {
		name, value := strings.ToLower(hv.GetKey()), hv.GetRawValue()
		if ownField(name) {
			continue
		}
		if value == nil {
			value = []byte(hv.GetValue())
		} else if hv.GetValue() != "" {
			return malformed("a header has two values")
		}
		into.Headers = append(into.Headers, authz.Header{Name: name, Value: value})
	}
	if len(raw) > 0 {
		return agree(into.Headers, joined)
	}
	for name, value := range joined {
		name = strings.ToLower(name)
		if ownField(name) {
			continue
		}
		hd := authz.Header{Name: name, Value: []byte(value)}
		switch {
		case strings.Contains(value, "!"):
			hd.Form = authz.HeaderUnclear
		case strings.Contains(value, ","):
			hd.Form = authz.HeaderJoined
		}
		into.Headers = append(into.Headers, hd)
	}
	return nil
}

func ownField(name string) bool {
	return name == ":method" || name == ":path" || name == ":authority" || name == "host"
}

// agree refuses a joined header that is not what the list has.
func agree(list []authz.Header, joined map[string]string) error {
	for name, value := range joined {
		if ownField(strings.ToLower(name)) {
			continue
		}
		var all []byte
		found := false
		for _, h := range list {
			if h.Name != strings.ToLower(name) {
				continue
			}
			if found {
				all = append(all, ',')
			}
			all, found = append(all, h.Value...), true
		}
		if !found || string(all) != value && utf8.Valid(all) {
			return malformed("header_map contradicts headers")
		}
	}
	return nil
}

// principal reads who the peer is.
func (p *peers) principal(src *authv3.AttributeContext_Peer, into *authz.Request) error {
	name, certificate := src.GetPrincipal(), src.GetCertificate()
	if len(name) > maxPrincipal {
		return malformed("the principal is too long")
	}
	into.Known |= authz.FieldPeer
	switch {
	case certificate != "":
		peer, err := p.certificate(certificate)
		if err != nil {
			return err
		}
		if string(peer.principal) != name {
			return &RequestError{ReasonCertificate, "the principal is not the certificate's"}
		}
		into.Authenticated = true
		into.Principal, into.OtherNames = peer.principal, peer.others
		into.Known |= authz.FieldPrincipal
	case name == "":
		into.Known |= authz.FieldPrincipal
	default:
		into.Authenticated = true
		// "!" may stand for any byte, and is in no SPIFFE ID.
		if strings.HasPrefix(name, "spiffe://") && !strings.Contains(name, "!") {
			into.Principal = []byte(name)
			into.Known |= authz.FieldPrincipal
		}
	}
	return nil
}

// socket is the IP address and port of an address; both zero if it is of another
// kind, the port if it is not a number.
func socket(a *corev3.Address) (ip netip.Addr, port uint16, err error) {
	s := a.GetSocketAddress()
	if s == nil {
		return ip, 0, nil
	}
	ip, err = netip.ParseAddr(s.GetAddress())
	if err != nil {
		return netip.Addr{}, 0, malformed("an address is no IP address")
	}
	if s.GetPortValue() > 0xffff {
		return netip.Addr{}, 0, malformed("a port is larger than 65535")
	}
	return ip.Unmap().WithZone(""), uint16(s.GetPortValue()), nil
}

// pseudo is a pseudo-header of header_map.
type pseudo struct {
	value []byte
	found bool
}

func readHTTP(h *authv3.AttributeContext_HttpRequest, into *authz.Request) error {
	var method, path, host pseudo
	for _, hv := range h.GetHeaderMap().GetHeaders() {
		var p *pseudo
		switch hv.GetKey() {
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
		p.found, p.value = true, hv.GetRawValue()
		if p.value == nil {
			p.value = []byte(hv.GetValue()) // not nil: present without a value
		} else if hv.GetValue() != "" {
			return malformed("a header has two values")
		}
	}
	var ok bool
	var err error
	if into.Method, ok, err = method.or(h.GetMethod()); err != nil {
		return err
	} else if ok && len(into.Method) > 0 {
		into.Known |= authz.FieldMethod
	}
	switch into.Path, ok, err = path.or(h.GetPath()); {
	case err != nil:
		return err
	case ok && len(into.Path) > 0:
		into.Known |= authz.FieldPath
	case ok && !path.found && string(into.Method) == "CONNECT" && into.Known&authz.FieldMethod != 0:
		into.Path = nil // CONNECT has none
		into.Known |= authz.FieldPath
	}
	switch into.Host, ok, err = host.or(h.GetHost()); {
	case err != nil:
		return err
	case ok && (host.found || len(into.Host) > 0):
		into.Known |= authz.FieldHost
	case ok:
		// The field alone does not tell a missing value from an empty one.
		if v, there := h.GetHeaders()[":authority"]; there && v == "" {
			into.Host = []byte{}
			into.Known |= authz.FieldHost
		}
	}
	return nil
}

// or is the value of p, or else that of the field that Envoy has cleaned. ok is
// false if it may have had other bytes.
func (p pseudo) or(cleaned string) (value []byte, ok bool, err error) {
	if !p.found {
		if strings.Contains(cleaned, "!") {
			return []byte(cleaned), false, nil
		}
		return []byte(cleaned), true, nil
	}
	// Cleaning changes only what is no UTF-8.
	if cleaned != "" && string(p.value) != cleaned && utf8.Valid(p.value) {
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
