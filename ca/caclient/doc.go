// Package caclient is what an agent needs of the certificate authority: it proves
// the agent's node, keeps the agent's own SVID fresh, follows the trust bundle and
// the pods of the node, and has SVIDs of workloads issued. No signing code stands
// behind it.
//
// A Client is always in one of two states. Without a valid agent SVID it attests
// with the agent's service-account token. With one it holds a session: one mutual
// TLS connection with an Issue, a WatchTrust and a WatchNode stream, each reopened
// with backoff when it breaks, until the SVID is renewed and the next session
// takes over. Of several replicas each agent has its own order: it stays with the first
// that it reaches, goes on with the next when that is gone, and leaves one that answers
// and cannot do its work, also where they are behind one address.
//
// # Trust
//
// The authority is recognised by a certificate that chains to a pinned root, or
// to a root of the bundle that a recognised authority sent, and that carries
// spiffe://TD/signet/ca/INSTANCE: every workload's SVID is a server certificate of
// the same root, so the root alone proves nothing. The pin is the operator's word
// and stays good for as long as it is configured; an attacker who holds the key
// of a root that is still pinned can at most pose as the authority. One between
// agent and authority can at most delay; a recorded older bundle is refused by its
// sequence number.
package caclient
