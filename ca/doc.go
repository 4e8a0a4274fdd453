// Package ca is the certificate authority: its keys, what it certifies and why,
// the issuance log, and the gRPC services of signet.ca.v1.
//
// # Ceremony
//
// Every certificate, the authority's own included, goes the same way:
//
//  1. the request is checked: key type, evidence, limits;
//  2. what will be signed is built, from verified facts only: names never come
//     from a request. Its DER is linted, byte by byte, against a profile made from
//     the same facts, and its key is claimed: as long as the certificate lives it
//     is certified for no other identity;
//  3. the record of it is made durable in the issuance log: Append returns after
//     fsync has;
//  4. the key signs exactly those bytes, and the signature is verified;
//  5. the certificate is read once more as a relying party does, and goes out.
//
// A step that fails ends the ceremony. A record without a certificate is
// harmless; a certificate without a record cannot exist, because only [recorded]
// values can be signed and only the log makes them.
//
// # Layout
//
//	DATADIR/authority/state.db    storage.Bolt: journal, agents
//	DATADIR/authority/log/        storage.FileLog: issuance log
//	DATADIR/authority/keys/*.key  PKCS#8 PEM, 0600, one per authority and the log's
//
// The folder is made under another name and renamed when it is complete, so a
// crash during the first start leaves nothing that looks like an authority.
//
// # Trust
//
// An attacker who holds an agent's credential can obtain the identities of the
// pods on that agent's node, for as long as the agent's pod lives, and nothing
// else. One who can read the keys folder is the authority. One who can write the
// store but not the keys can at most stop the authority, or make it forget agents
// (who then attest again) or publish a bundle without its root (which agents
// refuse to connect with); records of issuance can be cut, but signed heads that
// running agents hold give that away. One who controls the clock can make certificates
// that are valid later, up to the lifetime of the intermediate.
package ca
