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
	// Port 0 is where no port was given; nobody listens there.
	if port != 0 {
		into.DestinationPort = port
		into.Known |= authz.FieldDestinationPort
	}
	if h := a.GetRequest().GetHttp(); h != nil {
		into.HTTP = true
		if err := readHTTP(h, into); err != nil {
			return dst, err
		}
	}
	return dst, nil
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
// false if the value is unknown.
func (p pseudo) or(cleaned string) (value []byte, ok bool, err error) {
	if !p.found {
		if strings.Contains(cleaned, "!") {
			return nil, false, nil
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
