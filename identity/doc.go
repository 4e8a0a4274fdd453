// Package identity says who is who: trust domains, the SPIFFE IDs that Signet
// gives out, the verified facts about a pod from which they are rendered, the
// state of trust, and the X.509-SVID profile.
//
// It stands on go-spiffe's types (spiffeid.ID, x509svid.SVID, x509bundle) and
// adds only what SPIFFE leaves to the implementation: how a name is made.
//
//	workload    spiffe://TD/ns/NAMESPACE/sa/SERVICEACCOUNT
//	agent       spiffe://TD/signet/agent/NODE
//	authority   spiffe://TD/signet/ca/INSTANCE
//	operator    spiffe://TD/signet/operator/NAME
//
// Values are valid once they exist and are never changed after they were
// returned; [Pods] is the one exception, a set that is safe for concurrent use.
//
// # Trust
//
// An attacker who chooses every field of a [Workload] can at most name another
// workload of the same trust domain: names of agents, authorities and operators
// cannot be rendered from it, because every path segment is checked and the
// first one is fixed. Who may fill in a Workload is decided by package attest
// and by the authority's own view of the pods, not here.
package identity
