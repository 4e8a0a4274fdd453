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
// Enforced are PeerAuthentication (mesh, namespace, workload, port) and
// AuthorizationPolicy with the actions ALLOW and DENY, a selector, the sources
// principals, namespaces and ipBlocks, the operations hosts, ports, methods and
// paths, and their not-forms, of security.istio.io/v1 and v1beta1. The
// semantics are those of Istio's sidecars, which are Envoy's RBAC filters as
// istiod configures them:
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
//     a name. ipBlocks are about the immediate peer.
//   - hosts ignore case, and the port, where the client sent one, is part of the
//     value; "*" is presence for hosts and methods. methods and paths respect
//     case; HEAD is not GET. paths are compared without query and fragment, after
//     the proxy's normalization, and otherwise byte by byte.
//   - What is absent matches no positive form, so it satisfies every not-form: a
//     plaintext peer satisfies notPrincipals.
//   - On a bare connection an ALLOW rule that reads an HTTP attribute is left
//     out; a DENY rule is read without those attributes, so it gets wider.
//   - Policies of the root namespace select in all namespaces, and add to those
//     there; nothing overrides. Of several rules that match, the one is reported
//     whose name ns[NS]-policy[NAME]-rule[I] comes first as a string.
//   - A principal of the mesh's trust domain, of an alias, or of cluster.local
//     stands for the same name in all of them, if it has five segments.
//   - A PeerAuthentication with a selector in the root namespace selects nothing.
//
// A document without metadata.namespace is in "default", where kubectl would
// put it. Where creationTimestamp is missing, as it is in files, the resource
// counts as older than any that has one.
//
// # Not enforced yet, and not Istio
//
// Everything else that Istio accepts (AUDIT, CUSTOM, when, requestPrincipals,
// remoteIpBlocks, serviceAccounts, trustDomains, path templates, targetRefs, dry
// run, addresses with a zone, RequestAuthentication) is a problem that names the
// field, and the workloads that the resource selects are denied with
// [ReasonUnsupported]: it never opens. With a target reference these are all
// workloads of the namespace. What Istio's admission refuses is a problem too;
// see [Set.Update] for what then goes on.
//
// Two differences from Istio remain, both towards denial. Where Istio compares
// by a regular expression ("*" of principals and paths, "*x" of principals,
// namespaces) and the value has a newline or bytes that are not UTF-8, it is
// unknown here whether it matches. And PeerAuthentication is enforced by denying
// a request without a certificate under STRICT, where Istio's proxies close the
// connection.
//
// # Unknown
//
// Logic has three values. A condition on an attribute that the proxy does not
// send ([Request].Known) is unknown, and so is its negation. A DENY rule that is
// unknown denies ([ReasonDenyUnknown]); an ALLOW rule must certainly match
// ([ReasonAllowUnknown] if none does and one may).
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
// that the proxy has verified; no request makes Decide panic, allocate or take
// longer than the policies that select the workload are many.
package authz
