// Package extauthz answers the authorization checks of Envoy proxies
// (envoy.service.auth.v3.Authorization) with the decisions of package authz.
//
// # Who asks about whom
//
// The proxy that calls is the one that enforces the answer. The destination of a
// check is the pod that the RPC proved to be ([identity.CallerFrom]); labels in the
// request are ignored, a difference is counted. A destination address that
// contradicts the proof denies: one that is neither loopback nor a pipe, where the
// pod's addresses are known and it is none of them. An RPC without a proven caller
// is refused as Unauthenticated.
//
// The source is what the proxy saw on the connection. [FromCheckRequest] says how a
// CheckRequest is read, and what of it counts as unknown. A certificate, where
// the proxy sends it, must agree with the principal, and must not have several
// URI SANs: X509-SVID section 2 has verifiers refuse those. Which SPIFFE IDs a proxy
// accepts as peers at all is decided in its TLS context; here they are principals
// like any others.
//
// # Answers
//
// The RPC itself succeeds, also for a denial: Envoy takes any status but
// PermissionDenied and Unauthenticated inside the answer, and any failure of the
// RPC, for an error, which failure_mode_allow would turn into an open door. A denial
// is status PermissionDenied, HTTP 403 and the body that Istio gives, or
// Unauthenticated and 401 for a token that was not verified, unless [Denial] says
// otherwise, and never names policies to the client. Decision, kind, policy, rule and reason
// are in dynamic_metadata, for the proxy's own access log; the log of this
// process has a record "check denied". Paths are logged without their query,
// which may hold secrets.
//
// What cannot be read, contradicts itself or makes the code panic is denied, and so
// are bytes that are no CheckRequest. Where gRPC itself fails, the proxy must be
// configured to deny on errors.
//
// # Steps
//
// A check goes from bytes to bytes ([Server.Answer]; [Codec] has gRPC hand them
// over): its message is read, the caller's program is found, tokens are verified
// where the proxy did not ([Tokens]), the program decides, a CUSTOM policy that
// matches has its provider asked and then the program goes on ([Providers]), and
// what was decided is handed on ([Records]). Without those three a token that the
// proxy did not verify denies, a CUSTOM policy that matches denies, and nobody gets
// records.
//
// # Trust
//
// An attacker who controls a client can at most send requests that the policies
// decide. One who controls a workload, with its token, can ask what the policies
// that select this workload would decide for any source; it enforces them itself,
// so it gains nothing by a wrong answer. One who controls nothing but the socket
// gets Unauthenticated.
package extauthz
