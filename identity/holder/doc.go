// Package holder keeps the SVIDs of one node: it asks an authority for them,
// renews them, gives them out, saves them across a restart, and drops them.
//
// A [Holder] has one key and one SVID for each SPIFFE ID on the node, shared by
// the pods that have this ID. An identity is wanted from the first call of
// [Holder.SVID] for it (or because it was saved) until the last of its pods has
// left the view of the node; then SVID and key leave the memory at once.
//
// # Asking
//
// [Holder.Run] is the one loop that owns all work. It gathers what is wanted and
// what is due into batches of at most 256 items, at most four of them under way
// at a time. Identities that failed before have batches of their own and never
// more than three of the four places, so a new pod does not wait behind an
// identity that keeps failing. No call of SVID ever waits for an authority.
//
// Evidence for the first SVID is the token of the caller, if it has one, then
// the UID of its pod, then those of the other pods of the identity. For a
// renewal the pods come first and a token, if a caller came with one since the
// renewal failed, last. Each refusal moves on to the next evidence. Evidence
// that the authority calls hopeless is not shown again until all of it was
// refused and one to two minutes have passed, or new evidence is there.
//
// # What comes back
//
// Nothing that the authority says is taken on its word. A chain is refused,
// logged and counted unless it parses, is in order, verifies against the trust
// bundle of the moment, names exactly the identity that was asked for, has the
// form of [identity.CheckSVID], carries our key, and is valid now. Keys are
// ECDSA P-256; every attempt makes a new one, so every SVID has its own.
//
// # Renewal
//
// The authority chooses when to renew. It is obeyed, but not within the first ten
// seconds, which would be a loop, nor in the last eighth of the life, which would
// leave no time for retries; without a usable choice it is about half the life. A
// failed attempt is repeated after 1 s, 2 s, 4 s … 30 s, jittered, and never later
// than after an eighth of the remaining life, so that attempts get denser as the
// end comes near. The first answer after an outage has all others that wait for
// its end ask within a second. The last SVID is served until it expires, never
// longer.
//
// [Holder.Review] brings renewals forward: within a second for an SVID that does not
// verify any more, is revoked or banned, spread for one of a tainted authority.
//
// # Saved state
//
// A [StateFile] keeps what an agent needs to serve before it has reached an
// authority again. It holds private keys and therefore exists only in memory: on
// a tmpfs or ramfs from which nothing can be swapped out. Its format:
//
//	signet-agent-state 1\n
//	SHA-256 of the first line and of all that follows this one, hex\n
//	JSON on one line: everything but keys, with the length of each key\n
//	the keys, PKCS #8, one after the other
//
// The version is the number on the first line; a reader refuses a newer one.
//
// # Trust
//
// An attacker who is the authority can at most withhold SVIDs: an SVID for a
// wrong identity, a foreign key or from outside the trust bundle is never given
// out. An attacker who fills the set of pods can at most have the holder ask for
// identities that the authority then refuses. An attacker who can read this
// process or the state file has the keys of one node's pods for the remaining
// life of their SVIDs, an hour by default. Whoever can write the state file is
// the agent's own user and needs no file for that; its hash finds accidents, not
// attackers.
package holder
