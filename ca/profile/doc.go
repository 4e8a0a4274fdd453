// Package profile says what the authority's certificates are: serials, validity, templates,
// public keys that may be certified, and [Profile], which holds what is about to be signed
// against what it must be, byte by byte. It is the table in DESIGN.md.
//
// The template of a certificate and its Profile are made apart, from the same facts: a
// mistake in one of them, or in the library that encodes the template, does not get a
// signature.
//
// # Trust
//
// [ParsePublicKey] takes bytes from anybody. Everything else takes facts that the caller
// has verified. Nothing here has a private key.
package profile
