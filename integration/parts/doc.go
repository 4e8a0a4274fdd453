// Package parts finds the real programs that Signet is tested with, and fetches
// or builds those that are missing into a cache folder of the user, once for
// each version, so that a fresh clone starts warm.
//
// The folder is $XDG_CACHE_HOME/signet/tools, or ~/.cache/signet/tools. It is
// safe to remove at any time. Everything in it appears by rename, whole, so any
// number of runs may share it.
//
// # Trust
//
// What is downloaded is used only if its SHA-256 is the one recorded here, so an
// attacker who controls the package index, the network or the cache folder's
// downloads can at most keep the tests from running. Programs named by $ENVOY or
// found on PATH are trusted as the rest of PATH is; only their version is asked.
package parts
