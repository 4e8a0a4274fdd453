// Package rotation decides which authorities are trusted and which sign. It is the
// part of the authority that must not be wrong and can be written without a clock, a
// disk or a network: its transitions are pure functions of a state, of what agents
// acknowledged, and of a time that the caller passes in. Whoever calls one commits
// what it returns by compare-and-swap, or does nothing.
//
// A root goes through stages:
//
//	prepared ──▶ published ──▶ active ──▶ old ──▶ gone
//	 has a key    is in the     signs      signs no more, is in
//	              bundle                   the bundle
//
// and there is one active root after the first. Intermediates hang below roots, one
// that signs for each replica. Three things hold in every state that can be reached
// without an [Override]:
//
//   - A root is active only when every agent that counts has acknowledged a bundle with
//     it, and those who cannot acknowledge had [Rules.Propagation].
//   - A root leaves the bundle only when no leaf below it can be valid: each
//     intermediate below it has expired, or its own replica said that it signs no more
//     and the longest leaf has ended since. What another replica believes does not
//     count, so one that is cut off can sign on without harm.
//   - The sequence grows with each change of what agents are told, the bundle and what
//     is tainted, and never goes back.
//
// What an agent acknowledges is what all streams of its node have taken up and what a
// restart of it would find again. The test of this package explores the states of two
// replicas and three agents, with crashes, steps of a clock and lost, late and repeated
// messages, and holds these against them.
//
// # Trust
//
// What agents acknowledged is taken as said: an agent that lies about its own streams
// harms the connections of its own node. An agent that never acknowledges holds a
// rotation up, until the deadline before the active root's end or until an operator
// overrides, who is told its node. This package holds no keys; an attacker who can
// change a State that is stored can have any root trusted, which is why the store's
// folder is the authority's alone.
package rotation
