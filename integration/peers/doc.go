// Package peers holds nothing but benchmarks: Signet's engine, and its server of checks, beside those that
// are Go modules, on the same policies and requests.
package peers
