// Package peers holds nothing but a benchmark: Signet's engine beside those that
// are Go modules, on the same policies and requests.
package peers
