package identity

import (
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxIDLength is what every SPIFFE implementation must support, and the longest
// that one should make (SPIFFE-ID §2.3). go-spiffe does not enforce it.
const maxIDLength = 2048

// maxTrustDomainLength is the limit of SPIFFE-ID §2.1, not enforced by go-spiffe.
const maxTrustDomainLength = 255

// maxSegmentLength is Kubernetes' limit on a namespace, service account, node
// or pod name (RFC 1123 subdomain).
const maxSegmentLength = 253

// ParseTrustDomain parses the name of a trust domain, such as cluster.local.
// Unlike spiffeid.TrustDomainFromString it takes a bare name only, no SPIFFE ID,
// and enforces the length limit of SPIFFE-ID §2.1.
func ParseTrustDomain(name string) (spiffeid.TrustDomain, error) {
	if len(name) > maxTrustDomainLength {
		return spiffeid.TrustDomain{}, fmt.Errorf("trust domain has %d bytes; at most %d are allowed", len(name), maxTrustDomainLength)
	}
	if strings.ContainsAny(name, ":/") {
		return spiffeid.TrustDomain{}, fmt.Errorf("trust domain %q must be a bare name such as cluster.local", name)
	}
	td, err := spiffeid.TrustDomainFromString(name)
	if err != nil {
		return spiffeid.TrustDomain{}, fmt.Errorf("trust domain %q: %w", name, err)
	}
	return td, nil
}

// ParseID parses a SPIFFE ID and enforces the length limit of SPIFFE-ID §2.3.
func ParseID(s string) (spiffeid.ID, error) {
	if len(s) > maxIDLength {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID has %d bytes; at most %d are allowed", len(s), maxIDLength)
	}
	return spiffeid.FromString(s)
}

// WorkloadID is the SPIFFE ID of a service account's workloads,
// spiffe://TD/ns/NAMESPACE/sa/SERVICEACCOUNT, the form that Istio uses.
func WorkloadID(td spiffeid.TrustDomain, namespace, serviceAccount string) (spiffeid.ID, error) {
	return fromSegments(td, "ns", namespace, "sa", serviceAccount)
}

// SplitWorkloadID takes a workload's SPIFFE ID apart. ok is false for every ID
// that is not exactly /ns/NAMESPACE/sa/SERVICEACCOUNT: agents, authorities,
// operators and foreign shapes.
func SplitWorkloadID(id spiffeid.ID) (namespace, serviceAccount string, ok bool) {
	seg := strings.Split(id.Path(), "/")
	if len(seg) != 5 || seg[1] != "ns" || seg[3] != "sa" {
		return "", "", false
	}
	return seg[2], seg[4], true
}

// AgentID is the SPIFFE ID of a node's agent, spiffe://TD/signet/agent/NODE.
func AgentID(td spiffeid.TrustDomain, node string) (spiffeid.ID, error) {
	return fromSegments(td, "signet", "agent", node)
}

// AgentNode is the node that an agent's SPIFFE ID names; ok is false if id is
// not an agent's.
func AgentNode(id spiffeid.ID) (node string, ok bool) {
	return lastOf(id, "/signet/agent/")
}

// AuthorityID is the SPIFFE ID of an authority replica,
// spiffe://TD/signet/ca/INSTANCE, where INSTANCE is 1 to 127.
func AuthorityID(td spiffeid.TrustDomain, instance uint8) (spiffeid.ID, error) {
	if instance < 1 || instance > 0x7f {
		return spiffeid.ID{}, fmt.Errorf("instance %d: must be 1 to 127", instance)
	}
	return fromSegments(td, "signet", "ca", fmt.Sprint(instance))
}

// IsAuthority reports whether id names an authority replica of trust domain td.
func IsAuthority(td spiffeid.TrustDomain, id spiffeid.ID) bool {
	_, ok := lastOf(id, "/signet/ca/")
	return ok && id.MemberOf(td)
}

// OperatorID is the SPIFFE ID of an operator, spiffe://TD/signet/operator/NAME.
func OperatorID(td spiffeid.TrustDomain, name string) (spiffeid.ID, error) {
	return fromSegments(td, "signet", "operator", name)
}

func lastOf(id spiffeid.ID, prefix string) (string, bool) {
	last, ok := strings.CutPrefix(id.Path(), prefix)
	return last, ok && last != "" && !strings.Contains(last, "/")
}

// fromSegments joins segments that may come from outside. A segment that is
// empty, a dot segment, too long, or holds a byte outside the SPIFFE-ID §2.2
// alphabet is refused, so no input can add or remove a segment (CVE-2021-27099).
func fromSegments(td spiffeid.TrustDomain, segments ...string) (spiffeid.ID, error) {
	for _, s := range segments {
		if len(s) > maxSegmentLength {
			return spiffeid.ID{}, fmt.Errorf("path segment %.20q… has %d bytes; at most %d are allowed", s, len(s), maxSegmentLength)
		}
	}
	id, err := spiffeid.FromSegments(td, segments...)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID from %q in %s: %w", segments, td.Name(), err)
	}
	if n := len(id.String()); n > maxIDLength {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID in %s has %d bytes; at most %d are allowed", td.Name(), n, maxIDLength)
	}
	return id, nil
}
