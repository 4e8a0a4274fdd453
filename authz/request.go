package authz

import (
	"net/netip"

	"google.golang.org/protobuf/types/known/structpb"
)

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
	// FieldRemoteIP is Request.RemoteIP. Without it the address is derived as a
	// sidecar of Istio does, where FieldHeaders and FieldSourceIP allow it.
	FieldRemoteIP
	// FieldDestinationIP is Request.DestinationIP.
	FieldDestinationIP
	// FieldSNI is Request.SNI.
	FieldSNI
	// FieldHeaders vouches that Request.Headers is complete.
	FieldHeaders
	// FieldClaims is Request.Claims.
	FieldClaims
	// FieldMetadata vouches that Request.Metadata is complete. A filter that is
	// in the map is known without it.
	FieldMetadata

	// FieldsTCP are the attributes that a connection without HTTP has.
	FieldsTCP = FieldPeer | FieldPrincipal | FieldSourceIP | FieldDestinationPort |
		FieldRemoteIP | FieldDestinationIP | FieldSNI | FieldMetadata
	// FieldsHTTP are all attributes.
	FieldsHTTP = FieldsTCP | FieldMethod | FieldPath | FieldHost | FieldHeaders | FieldClaims
)

// HeaderForm says what the value of a [Header] is.
type HeaderForm uint8

const (
	// HeaderValue is one value, byte by byte. A header that came several times is
	// in the list as often: policies look at each value by itself.
	HeaderValue HeaderForm = iota
	// HeaderJoined is all values of the header, joined by commas, so that they
	// cannot be told apart from one value that holds commas. A condition on it is
	// true, or false, if it is that for every way to split the value.
	HeaderJoined
	// HeaderUnclear is a header that is there with a value that is not known, as
	// where a proxy has replaced bytes.
	HeaderUnclear
	// HeaderHidden is a header that is there, of whose value no more is known than
	// what Value holds, as in a record that does not show it.
	HeaderHidden
)

// Header is one header of a request.
type Header struct {
	// Name is in lower case.
	Name  string
	Value []byte
	Form  HeaderForm
}

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
	// rules of Istio for TCP hold: an ALLOW rule that uses an attribute which
	// only HTTP has is left out, a rule of another action is read without it.
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
	// Serial is that of the peer's certificate, big-endian; nil where it is not known.
	// Only bans read it, and one that is not known is not banned.
	Serial []byte
	// SourceIP is the immediate peer of the connection, never the address from
	// a forwarding header. Zones and the IPv4-mapped form are removed. Leave
	// FieldSourceIP out for a peer without an address (a pipe).
	SourceIP netip.Addr
	// RemoteIP is the original client as the proxy has it. Leave FieldRemoteIP
	// out to have it derived as Istio's sidecars do: the last entry of
	// X-Forwarded-For, or else SourceIP. It is not unmapped: an IPv4-mapped
	// address is an IPv6 one.
	RemoteIP netip.Addr
	// DestinationIP is the address that the connection came in on. The
	// IPv4-mapped form is removed.
	DestinationIP netip.Addr
	// DestinationPort is the port that the connection came in on: the
	// container's, not the Service's.
	DestinationPort uint16
	// SNI is the server name that the client asked for in TLS; empty if it asked
	// for none. Its case does not matter: Envoy's policies see it in lower case.
	SNI []byte
	// Method is the HTTP method, exactly as sent. nil means that there is none.
	Method []byte
	// Path is :path after the proxy's normalization; Decide cuts it at the first
	// "?" or "#". nil means that there is none. Without FieldPath it may hold what
	// is known to stand in it, where only some bytes were replaced: tokens are
	// looked for there.
	Path []byte
	// QueryHidden says that the values in the query of Path, and its fragment, are
	// not those of the request; the names of its parameters are, but for [HiddenParam].
	// So it is in a record.
	QueryHidden bool
	// Host is :authority (HTTP/1: Host), with its port if it has one. nil means
	// that there is none, empty that it is present without a value.
	Host []byte
	// Headers are the request's headers. Those named :method, :path, :authority
	// and host are not looked at; Method, Path and Host are.
	Headers []Header
	// Claims is the payload of the token that the proxy verified, as jwt_authn
	// writes it into metadata under "payload"; nil if none was verified. A value of
	// no kind (the zero Value) is one that is not known, as in a record that does
	// not show it. It is read, never changed.
	Claims *structpb.Struct
	// Token is what the verification of the token in Claims changes of the request for
	// what comes after it, and nothing where it is empty. It is nil where Claims are the
	// proxy's own word, whose filter has changed the request already. Without Claims
	// there was no token, and it is not looked at: all headers are then left out in
	// which RequestAuthentications put claims.
	Token *Changes
	// Metadata is the dynamic metadata of Envoy's filters by the name of the
	// filter, as "envoy.filters.network.mysql_proxy", for the conditions
	// experimental.envoy.filters.*. Values of no kind are as in Claims. It is read,
	// never changed.
	Metadata map[string]*structpb.Struct
}
