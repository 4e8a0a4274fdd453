// Package attest answers one question: which pod is at the other end?
//
// Evidence goes in, a workload comes out, and until when that holds. The
// evidence is a Kubernetes service-account token that is bound to a pod, verified
// offline: the keys of the issuer are known, so no API server is asked.
//
// A token is accepted if all of this holds; the checks run in this order, and the
// error names the first that failed:
//
//   - at most 16 KiB, looked at before anything is parsed; three segments of
//     canonical base64url (RFC 7515 §7.1), so a token has exactly one spelling
//   - a header with alg, kid and at most typ "JWT": a token that brings its own
//     key (jwk, jku, x5c, x5u) or asks for extensions (crit) is refused, as
//     RFC 8725 §3.10 advises, rather than trusted to be ignored
//   - alg is RS256 or ES256, and is the one that the key of that kid is for: the
//     key decides, never the token (RFC 8725 §3.1)
//   - the signature verifies
//   - JSON without duplicate names, in the header and in the claims (RFC 8725
//     §2.4), with names compared exactly
//   - iss is exactly the configured issuer; the issuer of legacy tokens,
//     kubernetes/serviceaccount, can be neither configured nor accepted
//   - aud is the configured audience and nothing else. Whoever else accepts a
//     token also holds it, and could send it here in the pod's name; kubelet
//     projects one audience to a file, so nothing is lost
//   - exp is later than now, without leeway; iat, and nbf if present, are not later
//     than now plus the allowed skew; exp − iat is at most the maximum lifetime,
//     which catches tokens that the API server extended to a year (its
//     --service-account-extend-token-expiration). Fractions of seconds are dropped
//   - sub is system:serviceaccount:NAMESPACE:NAME and agrees with the claims under
//     kubernetes.io, which must also name the pod with its UID and the node: a token
//     that is not bound to a scheduled pod proves nothing here
//   - the service account is on the allow-list, where there is one
//   - the node is the configured one, where one is configured
//   - the pod with that UID is in the view of the pods, with that name, namespace,
//     service account and node. A node UID must not contradict the view, and a
//     view that knows the UID of the service account requires it. Where a node is
//     configured whose pods are believed without a view ([Config.AnyPodOf]), the
//     token is enough
//
// What is returned is the view's workload, so labels and addresses never come
// from a token. It holds until exp.
//
// Successes are remembered by the SHA-256 of the token, for the one audience that
// an [Attestor] is for, until exp. A remembered token is compared with the view
// and with the issuer's keys each time, so it ends with its pod and with its key.
// Failures are not remembered: there is no bound on how many different bad tokens
// somebody can make, and refusing one costs a signature verification at most.
//
// While the API server is away kubelet cannot replace tokens ([Config.Outage]). Then a
// token that was accepted before it expired stays good, for its pod in the view and
// under its key, until a while after the API server is back; its hash may be kept
// over a restart ([Attestor.Export]). A token that is first seen expired is refused,
// and so is one that expired before the API server was away.
//
// [Gate] does this for gRPC servers: it takes the token from the metadata of each
// RPC and ends streams before their proof does.
//
// # Trust
//
// An attacker who holds a pod's token can at most be that pod, on its node, until
// the token expires or the pod is gone; if the token was used here before, longer, while
// the API server is away, so whoever can also keep it away can stretch a stolen token
// for as long as the pod lives. One who can write the file of keys, or
// holds the issuer's key, can be any pod that is in the view, and nothing that is
// not in it. One who can change the view of the pods but has no token can at most
// refuse service. One who sends arbitrary bytes can cost a signature
// verification each (some 100 µs) and a line of log at a bounded rate. One who opens
// connections without a token keeps others out only with as many processes as there may
// be such connections ([ConnectionsConfig]).
package attest
