// Package journal is the one record that says what an authority is: its trust domain,
// the authorities that are trusted or sign, in which state each of them is, and where
// their keys are. Package ca changes it, by compare-and-swap of the whole record;
// package rotation decides what it changes to as far as the authority's own root is
// concerned, and this package is between the two: [Journal.Rotation] is what the journal
// says in rotation's words, [Journal.Turn] writes down what rotation says.
//
// A journal of an earlier version is read as one of the present, and one of a newer
// version is refused, as is a field that is not known: what an authority does not
// understand of its own state it must not write back.
//
// # Trust
//
// An attacker who can write this record can have the authority publish another bundle,
// or forget one: agents refuse a bundle that their pinned root does not lead to. There is
// no key in it; with a key's URI alone nothing can be signed. What went out is in the
// issuance log and not here.
package journal
