// Package limit bounds what callers of an authority can make it do and hold: [Guard] the
// connections that nobody has proved anything on, [Places] the calls that are read at once,
// [Rates] how often somebody may ask, and [Queue] what is worked on at once and who is next.
//
// A Queue is fair between agents, has those first who hold nothing or are about to lose
// it, never idles while somebody waits, and sends away with a time after which there
// should be room whom it could not answer before the caller gives up.
//
// # Trust
//
// Names that are limited must have been proved by the caller; addresses, which are not,
// are only counted against handshakes and first attestations. Everything here is bounded
// in memory: of more names than are remembered, who was not heard of for longest begins
// anew.
package limit
