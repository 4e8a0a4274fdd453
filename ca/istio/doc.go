// Package istio is the authority's door for Istio's own clients: the service
// istio.v1.auth.IstioCertificateService, so that an unmodified pilot-agent or
// ztunnel gets its certificates here instead of from istiod.
//
// # Contract
//
// A caller proves a pod in one of two ways, tried in this order as istiod does:
//
//   - a client certificate that this door issued, where renewal is on for its
//     identity: the certificate is on record, the token that it goes back to is not
//     older than the configured age, and its pod is alive
//   - a service-account token in the metadata of the RPC, verified offline; the pod
//     must be in the view of the pods. No API server is asked
//
// The metadata clusterid must be absent or name a configured cluster. All of that
// is checked on the headers of an RPC, before its message is read.
//
// Then ([Door.CreateCertificate]) the request is taken apart: of the CSR the public
// key counts and nothing else, after its signature has verified; a lifetime beyond
// the maximum is cut to it. The name in the certificate is the caller's, or, for
// the token of a configured node account (ztunnel), that of a pod on its node. The
// answer is leaf, intermediates, and the roots as the last element.
//
// Codes and messages are istiod's; docs/istio.md lists where they are not, and why.
//
// Certificates that may be renewed are remembered in memory. At the start the
// memory is filled from the issuance log, whose records say when the token was
// verified: that is what makes the maximum age hold across restarts.
//
// # Trust
//
// An attacker who holds a pod's token, or where renewal is on its private key, can
// at most be that pod's service account: with the token until it expires, with the
// key until the maximum age since the token has passed, in both cases only while
// the pod lives. One who holds the token of a node account can be every service
// account that has a pod on that node. One who sends arbitrary bytes without proof
// can cost a signature verification for each RPC and the memory of its headers.
package istio
