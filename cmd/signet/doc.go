// Command signet is the operator's command line: it prints Envoy configurations,
// makes identities for development, and explains what policies decide.
//
// # Trust
//
// It holds no secret of an installation and decides nothing for one: an attacker
// who controls its arguments can at most make it print or write, as the user who
// runs it, what that user asked for. Values that end in a configuration are
// checked and quoted, so that none of them can add to its structure.
package main
