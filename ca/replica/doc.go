// Package replica lets several replicas of an authority have one state. To the authority
// it is the state of a single one: where that keeps a record of its own, package replica
// keeps one for each replica, and shows to each its own.
//
//	journal            what replicas have in common of the journal: trust domain,
//	                   sequence of trust, who signs intermediates, roots
//	replicas/NNN       version, ID of the replica that claimed instance NNN, and the rest
//	                   of its journal: the key of its log, its intermediates; and
//	                   which instances it was before the state was restored
//	replica-loss/NNN   what the authority calls log-loss, of instance NNN
//	replica-clock/NNN  what it calls clock: one replica's wrong clock is not another's
//
//	moved              a state that was moved, or is being moved: it is not used
//
// Everything else is in common: agents, revocations, retired instances.
//
// A replica is a folder: it has keys that nobody else has. It claims an instance once, by
// compare-and-swap, under an ID that the folder keeps. An instance is never given to
// another ID, so that no two replicas can give out one serial or write one log. Where the
// state was put back from an older copy each replica becomes another instance
// ([Restoration]), because what the former one did since is not known.
//
// # Trust
//
// Replicas trust each other: whoever can write the state can change what all of them
// trust. No key is ever in the state. A replica that another one impersonates by a copy
// of its folder cannot write while that one has its log.
package replica
