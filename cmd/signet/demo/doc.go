// Package demo is `signet demo`: the whole product at work on one machine, with
// nothing simulated but the kubelet and the pods.
//
// It starts signet-ca, signet-agent and two Envoys, one beside a server and one
// beside a client, each of which has nothing but a service-account token, and
// fills in a table. Each row of the table is a claim of the product, checked by
// looking at it from the other side: the certificate is the one that the peer
// was shown, the status code is the one that came back through both proxies, a
// refusal is the agent's own answer to a bad token. A row holds only if the claim
// was seen to hold; --break sabotages the thing that a row looks at, and the row
// must then fail.
//
//	signet demo ── GET ──▶ Envoy (client) ══ mutual TLS ══▶ Envoy (server) ──▶ service
//	                          │ SDS                             │ SDS, ext_authz
//	                          └────────▶ agent.sock ◀───────────┘
//	                                  signet-agent ══▶ signet-ca
//
// # Files
//
// Everything lies in one folder, D. Scripts that use --keep may rely on these:
//
//	D/ready         written last: addresses, one "name: value" a line
//	D/agent.sock    the agent's socket
//	D/root.pem      the roots, published by signet-ca
//	D/issuer/       the issuer of the tokens, as `signet dev issuer` makes it
//	D/policies/     the policies; they count when renamed into place
//	D/ca.yaml, D/agent.yaml, D/server.yaml, D/client.yaml    configurations
//
// The agent's saved state, which holds keys, is in a folder of its own on a tmpfs.
//
// # End
//
// Whatever ends the command, no process stays: children are waited for, and the
// kernel kills them if the command itself is killed. Without --keep no file stays
// either, unless the command is ended by SIGKILL or SIGQUIT.
//
// # Trust
//
// The demo makes an issuer of tokens, an authority and keys, all in folders that
// only the user can read, and listens on loopback only. Another user of the
// machine can at most send requests that the demo's policies decide, in plaintext
// or as the client through its proxy's open port, look into the proxies through
// their admin ports, and stop them. So it is for machines whose users trust each
// other, and nothing that it makes should be used for anything else.
package demo
