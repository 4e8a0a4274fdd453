package authz

import "net/netip"

// Field is a set of attributes of a [Request].
type Field uint32

// The attributes that policies read. An attribute whose bit is not in
// [Request.Known] is unknown: a condition on it is neither true nor false.
const (
	// FieldPeer is Request.Authenticated.
	FieldPeer Field = 1 << iota
	// FieldPrincipal is Request.Principal and Request.OtherNames together.
	FieldPrincipal
	// FieldSourceIP is Request.SourceIP.
	FieldSourceIP
	// FieldDestinationPort is Request.DestinationPort.
	FieldDestinationPort
	// FieldMethod is Request.Method.
	FieldMethod
	// FieldPath is Request.Path.
	FieldPath
	// FieldHost is Request.Host.
	FieldHost

	// FieldsTCP are the attributes that a connection without HTTP has.
	FieldsTCP = FieldPeer | FieldPrincipal | FieldSourceIP | FieldDestinationPort
	// FieldsHTTP are all attributes.
	FieldsHTTP = FieldsTCP | FieldMethod | FieldPath | FieldHost
)

// Request is what is known about one request or connection. Decide neither
// changes nor keeps it, so it and its slices may be reused.
//
// Absent is not unknown: a plaintext peer is Authenticated=false with FieldPeer
// and FieldPrincipal in Known. An attribute that the proxy does not send is left
// out of Known. A caller that forgets a bit gets denials, never an opening; so
// attributes that later versions add are safe in callers that do not know them.
type Request struct {
	// Known says which attributes the caller can vouch for.
	Known Field
	// HTTP says that this is a request, not a bare connection. Without it the
	// rules of Istio for TCP hold: an ALLOW rule that uses Host, Method or Path
	// is left out, a DENY rule is read without them.
	HTTP bool
	// Authenticated says that the peer proved itself with a certificate which
	// the proxy verified.
	Authenticated bool
	// Principal is the peer's name in full: the first URI SAN ("spiffe://…"),
	// or else the first DNS SAN, or else the subject.
	Principal []byte
	// OtherNames are the certificate's further URI SANs, its DNS SANs and its
	// subject, where it has them: like Envoy, a principal matches if any name
	// does. FieldPrincipal vouches that the list is complete; an X.509-SVID of
	// Signet has one URI SAN and nothing else, so there nil is complete.
	OtherNames [][]byte
	// SourceIP is the immediate peer of the connection, never the address from
	// a forwarding header. Zones and the IPv4-mapped form are removed. Leave
	// FieldSourceIP out for a peer without an address (a pipe).
	SourceIP netip.Addr
	// DestinationPort is the port that the connection came in on: the
	// container's, not the Service's.
	DestinationPort uint16
	// Method is the HTTP method, exactly as sent. nil means that there is none.
	Method []byte
	// Path is :path after the proxy's normalization; Decide cuts it at the first
	// "?" or "#". nil means that there is none.
	Path []byte
	// Host is :authority (HTTP/1: Host), with its port if it has one. nil means
	// that there is none, empty that it is present without a value.
	Host []byte
}
