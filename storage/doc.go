// Package storage keeps what a certificate authority must not forget: a few
// kilobytes of state that changes by compare-and-swap ([Store]), and an
// append-only log of what was signed ([Log]). The two are separate files with
// separate rules, so that a busy log does not slow the state and damaged state
// does not take the log with it.
//
// # Store
//
// A Store maps keys to values. Every commit that changes something gets the next
// revision; an entry carries the revision of the commit that last wrote it. A
// commit names the revisions that it was decided on, so two writers can never
// overwrite each other unseen. [Bolt] is the embedded engine, for one process.
//
// Values are opaque to an engine. [ParseRecord] and [EncodeRecord] are for those who keep
// JSON objects in them and change some of it: what a later version of the program has
// added stays.
//
// # Log
//
// A Log takes opaque records, numbers them from 1 without gaps and returns from
// Append only after fsync has returned, so the caller may sign what it recorded.
// Concurrent callers share one write and one fsync. Records are chained in
// batches by SHA-256; a [Head] names the chain up to a record in 32 bytes, and a
// signed one lets others notice that the log was cut or rolled back. [FileLog]
// keeps the log in segment files:
//
//	segment  = header frame*            file NNNNNNNNNNNN.seg, numbered from 1
//	header   = magic version instance index log-ID
//	           sequence, time and hash of the record before the segment
//	           size of the segment before, 1 if the first frame repeats the
//	           newest signed head, reserved, CRC                (128 bytes)
//	frame    = magic type reserved length CRC payload CRC
//	batch    = previous hash, first sequence, time, count, (length record)*, hash
//	head     = instance, sequence, hash, time, length, signature
//
// Integers are big-endian, times Unix nanoseconds, CRCs Castagnoli and seeded
// with the segment's header, so a frame of another segment is never taken for
// one of this. A batch's hash is SHA-256 over a domain string and everything
// before it in the payload; the hash before the first batch covers the instance
// and a random log ID. Frame types 3 and 4 are reserved. A reader refuses types and
// versions that it does not know with [ErrNewerFormat].
//
// A log is pruned by whole segments, the oldest first. The file "checkpoint", which
// is durable before anything is removed, then says where the log begins:
//
//	checkpoint = magic version instance first-segment log-ID
//	             sequence, time and hash of the last record that was removed
//	             time of the decision, length, signature, CRC
//
// A segment that is missing without a checkpoint that says so is damage, and so is a
// checkpoint whose signature the authority does not recognise.
//
// At most one frame is ever written and not yet synced. So after a crash at most
// one frame at the very end can be damaged, and [OpenLog] cuts that, and only
// that. Every other damage is an error that names the segment and the offset;
// nothing is repaired silently.
//
// After a write or fsync that failed nobody knows what the disk holds: the kernel
// may have dropped the pages and call the next fsync a success. So a log or a
// store that saw such a failure refuses everything with [ErrNotDurable] until it
// is opened again, and opening writes the last frame anew before it trusts it.
//
// # Trust
//
// An attacker who can only read the files learns what was issued to whom, no key:
// keys are never stored here. An attacker who can write the files can replace the
// state and shorten or rewrite the log; rewriting goes unnoticed only until a
// signed head that somebody else holds is compared, and damage that is not a
// consistent rewrite is noticed when the files are opened or verified. An
// attacker who chooses the contents of records can at most fill the disk: records
// are bounded, opaque and never parsed here, and cannot imitate a frame, because
// the CRCs are seeded with the secret log ID.
package storage
