// Package etcd keeps what package storage is about in an etcd cluster, for several
// replicas of the authority: [Store] is the state, and its [Store.Files] hold the log of
// each replica, which storage.OpenLog writes and reads as it does on a disk. So hash
// chain, signed heads, pruning and checks are the same code and the same bytes.
//
// # Keys
//
// Everything lies below a prefix:
//
//	format            the format of all this, 1
//	revision          written by every commit that changes something: its revision, as
//	                  etcd counts, is the store's
//	s/KEY             an entry: CRC (4 bytes) over key and value, value
//	w/ID              a slot: what one commit at a time writes along with its changes
//	l/NAME/ID         those who hold a lease or wait for it, in the order of creation
//	o/FOLDER          the owner of a folder of files
//	f/FOLDER/FILE/N   what a file has from offset N (16 hexadecimal digits) on
//
// Each write of a log is one value, or, where it is larger than 1 MiB, several.
//
// # Outcomes
//
// A request that got no answer may have happened, and may still happen later. Nothing
// here assumes either.
//
// A commit is made on the condition that its slot is as the commit before left it, and
// writes it. So the same request can be made again until there is an answer: if it finds
// the slot with its own mark, it has happened before. If there is no answer for long,
// Commit returns storage.ErrUnknown, and the next call of any method first writes the
// slot, after which the commit has happened or never will. Hence who reads after
// ErrUnknown reads the truth.
//
// A file is written at its end only, on the condition that there is nothing and that the
// folder's owner is who it was. A log whose write got no answer refuses everything until
// it has taken its folder anew, which makes all requests of before void, and has read
// what is there. Whoever was told that a record failed may find it recorded; nobody was
// ever told that one is recorded that is not. Because a process that stood still finds
// another owner, or none, it cannot write into a log that somebody else went on with.
//
// # Trust
//
// An attacker who can read the prefix learns what was issued to whom, no key. One who
// can write below it can replace the state and shorten or rewrite logs, with the same
// consequences as on a disk: see package storage. So give this user of etcd the prefix
// for itself alone, and etcd certificates for clients. Who can only delay, drop or
// repeat messages to etcd can keep the authority from issuing, and nothing more. Leases
// are advice: two may believe to hold one for a moment, and what their holders write is
// protected by conditions all the same.
package etcd
