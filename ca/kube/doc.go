// Package kube is what an authority needs of Kubernetes: which pods are alive and
// on which node, the keys of the API server's issuer, the API server's own word on
// a token, and two duties of one elected replica: the ConfigMap with the trust
// bundle and the conditions of policies that are not enforced.
//
// # Which pods count
//
// A [Cluster] watches pods, nodes and service accounts, one watch of each, and
// keeps of them what follows and no more. A pod is in [Cluster.Pods] while all of
// this holds:
//
//   - it is assigned to a node, and a node object with that name exists
//   - it runs under a service account that exists and is not being deleted
//   - its phase is neither Succeeded nor Failed
//   - it is not being deleted, or its grace period ended less than a minute ago.
//     A terminating pod serves its last requests, and may need a new SVID for
//     that; it ends at the moment at which the API server stops to accept its
//     tokens too, even if the object stays because its node is unreachable
//
// A node that is being deleted counts until its object is gone: its pods are being
// drained, and have requests to finish. UIDs tell a pod, a node and a service
// account from a later one of the same name; the pod of a replaced node is
// a pod of the new node, as it is for the kubelet there, and everything that was
// proved with the old node's UID is void.
//
// [Cluster.Synced] waits until all three were read completely once; nobody should
// be served before, because a pod that is not there then is perhaps only not read.
// From then on Pods is the last known state: an API server that is away takes
// nothing from running pods. What it said of pods that are being deleted still
// ends on time.
//
// # Tokens
//
// [Cluster.Attestor] verifies tokens offline, with the keys that the API server
// publishes (/.well-known/openid-configuration for the issuer and /openid/v1/jwks,
// both from the API server itself, wherever the former says the keys are). They are
// read every five minutes, and when a token names a key that is not known, at most
// once a second; the last good ones stay. Where the API server is to be asked too,
// a TokenReview follows: it must name the audience, the service account with its
// UID, the pod and the node that were verified offline. Its success is remembered
// for at most ten seconds by the hash of the token and the audience, and no longer
// than the pod is alive; failures are not remembered. A good token of a pod that
// the watch has not delivered yet is [attest.ErrUnknownPod], which a caller answers
// with "try again": a TokenReview then only has the say whether it is good.
//
// # Duties
//
// One replica holds the Lease signet-ca and does what needs only one. It changes
// nothing later than ten seconds after its last renewal of the Lease began, and another
// one begins fifteen seconds after it at the earliest. It keeps the
// ConfigMap signet-trust as it must be, whoever edits or deletes it, and where
// Istio's clients are served also istio-ca-root-cert in each namespace; and it tells
// the authors of policies that cannot be enforced, by a condition in the policy's
// status and one Event for each version of it.
//
// # Trust
//
// An attacker who controls the API server, or can create pods and their tokens
// there, can be any pod: it is the source of all that is known here. One who can
// read its traffic can at most learn names. One who holds this package's own
// credentials can read the names of pods, nodes and service accounts, have tokens
// reviewed, and replace the ConfigMap that new agents pin their root from, so that
// those would trust another authority. One who can edit that ConfigMap can do the
// latter until it is put right, which takes a moment; the same holds for Istio's
// clients and istio-ca-root-cert. One who can write policies
// can choose the text of a condition and an Event on them, within bounds.
package kube
