// Package revocation is what an authority says of certificates that it took back
// before they expired: a record of each, and the list (CRL, RFC 5280 section 5) that
// tells relying parties.
//
// An entry is final: reasons that can be withdrawn (certificateHold, removeFromCRL)
// are not taken. It stays on the list until the certificate has expired and one list
// of after that has had it (section 5.1.2.6).
//
// # Trust
//
// A list says what its issuer's key signed, and nothing else: whoever has that key
// can take back what it issued, and can publish a list that leaves something out. A
// relying party that gets no newer list cannot know that there is one until the old
// one's nextUpdate; who can hold lists back can hide a revocation for that long.
package revocation
