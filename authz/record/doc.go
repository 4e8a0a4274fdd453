// Package record is the record of a decision: what was decided, why, and what it
// rests on, so that it can be decided again.
//
// A [Record] is one line of JSON. It has a version; what this package does not know
// of a record it refuses. [Replay] decides it again, by the same policies or by
// others: that tells what a change of policies would have done to real requests.
//
// # What is shown
//
// A record holds what policies read of a request, and of the rest the names only:
// [Shown] says of which headers and claims the values stand there. Headers that carry
// secrets are never shown, nor headers and parameters in which a RequestAuthentication
// of the workload looks for tokens, nor the header in which it puts all of a token's
// claims. Paths stand without the values of their query,
// unless told otherwise. What is hidden is unknown when the record is replayed, so that
// a policy that reads it decides as about a proxy that did not send it: never more
// openly than about the request itself.
//
// # Trust
//
// An attacker who controls a client chooses method, path, headers and host of the
// records of its requests: all of that is quoted, bounded and never taken for
// anything but data. One who can write records can make people believe in requests
// that never were; a record opens no door.
package record
