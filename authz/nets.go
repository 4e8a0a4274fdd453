package authz

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
)

// nets are IP addresses and CIDR blocks, as sorted ranges without overlap, so
// that looking one up is a binary search however many there are.
type nets struct {
	list []span
	// zoned are addresses with a zone, without it. Admission takes them, and a
	// peer's zone is not known here.
	zoned []netip.Addr
}

// span is a block from its first to its last address.
type span struct {
	first, last netip.Addr
	block       netip.Prefix
}

// parseNet is the block of one value; zone says that it is an address with one.
func parseNet(v string) (p netip.Prefix, zone, ok bool) {
	if strings.Contains(v, "/") {
		p, err := netip.ParsePrefix(v)
		return p.Masked(), false, err == nil
	}
	a, err := netip.ParseAddr(v)
	return netip.PrefixFrom(a.WithZone(""), a.BitLen()), a.Zone() != "", err == nil
}

func newNets(values []string) *nets {
	if len(values) == 0 {
		return nil
	}
	n := &nets{}
	for _, v := range values {
		p, zone, ok := parseNet(v)
		switch {
		case !ok: // admission refuses it
		case zone:
			n.zoned = append(n.zoned, p.Addr())
		default:
			n.list = append(n.list, span{p.Addr(), lastOf(p), p})
		}
	}
	// Blocks overlap only where one holds the other; the larger one comes first.
	slices.SortFunc(n.list, func(a, b span) int { return cmp.Or(a.first.Compare(b.first), b.last.Compare(a.last)) })
	out := n.list[:0]
	for _, s := range n.list {
		if len(out) == 0 || s.last.Compare(out[len(out)-1].last) > 0 {
			out = append(out, s)
		}
	}
	n.list = out
	return n
}

// lastOf is the last address of a block.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// match takes an address without a zone. A block of IPv4-mapped addresses
// matches no IPv4 peer, as in Envoy.
func (n *nets) match(a netip.Addr) truth {
	// Addresses of IPv4 are below those of IPv6.
	lo, hi := 0, len(n.list) // by hand: slices.BinarySearchFunc has the request escape
	for lo < hi {
		if m := int(uint(lo+hi) >> 1); n.list[m].first.Compare(a) <= 0 {
			lo = m + 1
		} else {
			hi = m
		}
	}
	if lo > 0 && n.list[lo-1].last.Compare(a) >= 0 {
		return yes
	}
	if slices.Contains(n.zoned, a) {
		return maybe
	}
	return no
}
