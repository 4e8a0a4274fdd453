// Package authz turns Istio's security policies into decisions: text in,
// decisions out, and for each decision the resource and rule that it rests on.
// It is pure: it reads no file, asks nobody and starts nothing.
//
//	resources, problems := authz.Parse("policies.yaml", data)
//	set, more := set.Update(resources)              // per-resource last good
//	snapshot, warnings := authz.Compile(set, opts)  // swapped as a whole
//	program := snapshot.For(workload)               // shared by equal workloads
//	decision := program.Decide(&request)            // no allocation
//
// # Language
//
// Enforced are PeerAuthentication (mesh, namespace, workload, port),
// RequestAuthentication and AuthorizationPolicy, the whole of security.istio.io/v1
// and v1beta1. The semantics are those of Istio's sidecars, which are Envoy's RBAC
// filters as istiod configures them:
//
//   - Values of a field are alternatives; the fields of a source or an operation
//     must all hold, a not-form with its positive form too; the entries of from
//     and of to are alternatives; from and to must both hold; the rules of a
//     policy and the policies of an action are alternatives. No from is any
//     peer, no to any operation, so the rule {} matches everything. A policy
//     without rules matches nothing, so "spec: {}" denies what no other ALLOW
//     policy allows.
//   - "*" is any value that is not empty; "*x" a suffix, "x*" a prefix. The
//     leading star is looked at first: "*x*" is the suffix "x*". A star in the
//     middle is a star, but in namespaces it is any text.
//   - principals are the names of the peer's certificate without spiffe://, and
//     any of its names may match. namespaces look for /ns/VALUE/ anywhere in such
//     a name, serviceAccounts for /ns/NAMESPACE/ and then sa/NAME, where a bare
//     NAME is of the policy's own namespace; trustDomains are how it begins.
//   - ipBlocks are about the immediate peer. remoteIpBlocks are about the last
//     entry of X-Forwarded-For, which a client controls, or else the peer.
//   - requestPrincipals are ISSUER/SUBJECT of the verified token, split at the last
//     slash; a value without a slash and a star is an issuer with an empty
//     subject. Claims match as text or as a list with such text; numbers,
//     booleans and objects match nothing.
//   - hosts ignore case, and the port, where the client sent one, is part of the
//     value; "*" is presence for hosts, methods and headers. methods and paths
//     respect case; HEAD is not GET. paths are compared without query and
//     fragment, after the proxy's normalization, and otherwise byte by byte; a
//     template's {*} is a segment that is not empty, {**} any characters of a path.
//   - A header matches if any of its values does; one that is missing satisfies
//     notValues. request.headers[host] is the authority. The server name is
//     compared in lower case, so a value with an upper-case letter never matches.
//   - What is absent matches no positive form, so it satisfies every not-form: a
//     plaintext peer satisfies notPrincipals.
//   - On a bare connection an ALLOW rule that reads an HTTP attribute is left
//     out; a rule of another action is read without it, so it gets wider. So it
//     is with a key that only begins like a known one (request.headersX[a]).
//   - Policies of the root namespace select in all namespaces, and add to those
//     there; nothing overrides. A policy with a target reference selects the pods
//     of that Gateway, and no sidecars. Of several rules that match, the one is
//     reported whose name ns[NS]-policy[NAME]-rule[I] comes first as a string.
//   - A principal of the mesh's trust domain, of an alias, or of cluster.local
//     stands for the same name in all of them, if it has five segments.
//   - A CUSTOM policy that matches has its provider asked, before anything but
//     PeerAuthentication; AUDIT and dry-run policies change nothing and are told
//     beside the decision. A request with a token that the proxy did not verify, or
//     of an issuer or for an audience that no RequestAuthentication of the workload
//     names, is denied before AUDIT, DENY and ALLOW; one without a token is not.
//   - A PeerAuthentication with a selector in the root namespace selects nothing.
//
// A document without metadata.namespace is in "default", where kubectl would
// put it. Where creationTimestamp is missing, as it is in files, the resource
// counts as older than any that has one.
//
// # Not Istio
//
// What Istio's admission refuses is a problem; see [Set.Update] for what then
// goes on. What it accepts and Envoy cannot load is decided as it is written.
//
// Differences from Istio remain, all towards denial. Where Istio compares by a
// regular expression ("*" but for presence, "*x" of principals, namespaces, service
// accounts, trust domains with a star) and the value has a newline or bytes that
// are not UTF-8, it is unknown here whether it matches; so it is where a peer has
// the address of a block that is written with a zone. And PeerAuthentication is
// enforced by denying a request without a certificate under STRICT, where Istio's
// proxies close the connection.
//
// # Unknown
//
// Logic has three values. A condition on an attribute that the proxy does not
// send ([Request].Known) is unknown, and so is its negation. A DENY rule that is
// unknown denies ([ReasonDenyUnknown]); an ALLOW rule must certainly match
// ([ReasonAllowUnknown] if none does and one may); a CUSTOM rule that is unknown
// has its provider asked ([ReasonAskUnknown]).
//
// # Trust
//
// An attacker who can write a policy of one namespace can at most decide about
// workloads of that namespace; who can write one of the root namespace, about
// all. One whose policy is invalid or cannot be enforced can at most deny the
// workloads that it selects. An attacker who can put an unreadable document into
// an origin, or remove one from it, has the whole origin: the first denies
// everything, or leaves the origin's policies as they were. An attacker who
// chooses every attribute of a request that the proxy does not verify (method,
// path, host) can at most get what policies allow to that request from the peer
// that the proxy has verified; no request makes Decide panic, keep memory or take
// longer than the policies that select the workload are many.
package authz
