// Package token says whether the tokens of a request are good for the
// RequestAuthentications of a workload: JSON Web Tokens (RFC 7519) in compact form,
// signed (RFC 7515) by a key of the rule's JSON Web Key Set (RFC 7517).
//
//	verifier, err := token.New(token.Config{Keys: sets})
//	result := verifier.Verify(ctx, program, &request, time.Now())
//	if result.Status == token.Good {
//		request.Claims = result.Claims
//	}
//	decision := program.Decide(&request)
//
// The claims of a good token go into the request; a request with a bad one is left
// as it is, so that Decide finds a token without claims and refuses it, in its place
// of the order of policies.
//
// # What is verified
//
// What is good is what Envoy's filter jwt_authn takes with the configuration that
// Istio makes of the rules:
//
//   - The rules are tried by issuer. The first for which the request has tokens,
//     all of them good, decides; no token for any of them is no request identity;
//     otherwise the request is refused.
//   - A token is good for a rule if its issuer and one of its audiences are the
//     rule's, it is neither expired nor of the future ([Skew] is forgiven), and a
//     key verifies its signature. A token without exp does not expire.
//   - A key is tried if its algorithm and key ID are the token's, or it has none; or
//     the token has no key ID. At most [MaxSignatures] are tried for a request, where
//     Envoy tries all; give keys and tokens an ID where a set has more.
//   - Algorithms are RS, PS and ES with 256, 384 and 512 bits, and EdDSA. There is
//     no none, and no HMAC: whoever can read such a key could make tokens.
//   - Claims are as Envoy hands them to policies: those that hold lists of words
//     (scope, permission, and the rule's spaceDelimitedClaims) become lists.
//
// Stricter than Envoy, on purpose, is what docs/policies.md lists.
//
// Tokens that were found good are remembered by their SHA-256, for the rule and the
// keys by which they were; whether they are expired is looked at each time.
//
// # Trust
//
// An attacker who chooses every byte of a request can at most have it refused, and
// cost a few signatures per request: [MaxSignatures] at most, and none after the
// check was given up. An attacker
// who can replace a rule's keys is whoever the rule's issuer could name. Keys come
// from [Source]; nothing in a token (jwk, jku, x5u, x5c) says which key to use. A
// source without keys refuses every token.
package token
