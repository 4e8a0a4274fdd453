// Package sds serves typed xDS resources by name to the proxies of a node.
//
// [Server] speaks the protocol and knows nothing of what it carries: streams,
// nonces, versions, subscriptions, refusals. A [Source] knows what a caller may
// have and nothing of streams. [Secrets] is the Source of Envoy's secrets, served
// here as envoy.service.secret.v3.SecretDiscoveryService, state of the world
// (StreamSecrets, FetchSecrets) and incremental (DeltaSecrets).
//
// # What a stream does
//
//   - It belongs to one proven caller, identity.CallerFrom of its context; without
//     one it is refused with Unauthenticated. What the client says of itself, its
//     node above all, is only logged.
//   - It ends with Unavailable as soon as its context ends, which the interceptor
//     that proved the caller brings about shortly before the proof expires. Envoy
//     keeps what it has and comes back with a fresh proof.
//   - A name that the source does not know is omitted; the stream and its other
//     names go on. An incremental client is told that the name does not exist. The
//     other protocol has no word for that: Envoy then waits for the secret as long as
//     its initial_fetch_timeout says, and with 0 s opens no listener at all.
//   - A name that is known but has nothing yet, because the authority is away, is
//     sent when there is something. Other names do not wait for it. An incremental
//     client is told nothing meanwhile: Envoy stops to wait for a secret that is
//     said not to exist.
//   - A response goes out when there is a resource that this stream was not sent in
//     this version, and only then. In state of the world it holds all the resources
//     that the stream asks for and that exist, and is never empty, which Envoy
//     would refuse.
//   - A client that refuses a response (NACK) is logged and counted once for each
//     response, and is sent nothing before the content changes.
//   - What was sent is never taken back because the source fails: the last good
//     stays where it is.
//
// # Wildcard
//
// A client that subscribes to "*", or whose first request on a stream has no
// names, asks for what the source gives by default. SPIRE then sends all that the
// caller has, its own bundle even to strangers; Istio's agent answers nothing. For
// secrets it is default and ROOTCA here, the two that a sidecar needs, to a proven
// caller. After names were given, an empty list means that nothing is wanted any
// more, as the xDS protocol has it.
//
// # Limits
//
// A stream has at most 256 names of at most 2,048 bytes, and is read at 10 requests
// per second after the first 100: a client that sends faster waits, one that asks
// for more is refused. A client that does not read blocks its own stream only. The
// number of streams and the size of a message are the gRPC server's to limit.
//
// # Trust
//
// An attacker who can reach the socket but proves nothing gets nothing. One who
// proves to be a pod gets that pod's identity and the public trust bundle, whatever
// names it sends, and can at most keep its own streams busy and hold back
// [Server.Acknowledged], hence the retirement of an old root, for as long as its
// proof lasts, by not acknowledging. Private keys go to the stream of the caller whose SVID it is
// and to nothing else: no log, metric, error or version is derived from them. gRPC's
// own debugging (grpc.EnableTracing, GRPC_BINARY_LOG_FILTER) shows messages whole
// and must stay off in a process that serves secrets.
package sds
