package authz

import (
	"bytes"
	"net/netip"
	"unsafe"
)

// headerTest is a condition on the values of a header.
type headerTest struct {
	name string
	*patterns
}

// header holds a header's values against patterns, each value by itself. A
// missing header matches nothing.
func (v *view) header(h *headerTest) truth {
	switch h.name {
	case ":method":
		return v.text(FieldMethod, v.Method, h.patterns)
	case ":path":
		if v.QueryHidden {
			return maybe
		}
		return v.text(FieldPath, v.Path, h.patterns) // with its query
	case ":authority", "host": // to Envoy the two are one
		return v.text(FieldHost, v.Host, h.patterns)
	}
	if v.joins {
		return v.joinedHeader(h)
	}
	best := no
	if v.Known&FieldHeaders == 0 {
		best = maybe // those that are there may not be all
	}
	for i := range v.Headers {
		hd := &v.Headers[i]
		if hd.Name != h.name {
			continue
		}
		t := maybe
		switch hd.Form {
		case HeaderValue:
			t = h.match(hd.Value)
		case HeaderJoined:
			t = h.matchJoined(hd.Value)
		default:
			if h.present() {
				t = yes
			}
		}
		if t == yes {
			return yes
		}
		best = max(best, t)
	}
	return best
}

// present reports whether presence alone matches.
func (p *patterns) present() bool {
	for i := range p.list {
		if p.list[i].shape == present {
			return true
		}
	}
	return false
}

// maxPieces bounds in how many ways a joined value is split: a client may send any
// number of commas, and n pieces are n(n+1)/2 texts to match for each rule that reads
// the header. Beyond it nothing is known of the value, but that it is there.
const maxPieces = 16

// matchJoined holds a value against the patterns that may be several, joined by
// commas, for every way to split it.
func (p *patterns) matchJoined(b []byte) truth {
	if p.present() {
		return yes
	}
	var cuts [maxPieces + 1]int // where pieces begin; the last is past the end
	n := 1
	for i, c := range b {
		if c == ',' {
			if n == maxPieces {
				return maybe
			}
			cuts[n] = i + 1
			n++
		}
	}
	cuts[n] = len(b) + 1
	// escapes has bit i if the pieces before i can be split so that nothing
	// matches; any says that something can match at all.
	escapes, any := uint64(1), false
	last := false
	for end := 1; end <= n; end++ {
		out := false
		for start := range end {
			if p.match(b[cuts[start]:cuts[end]-1]) == no {
				out = out || escapes&(1<<start) != 0
			} else {
				any = true
			}
		}
		if end == n {
			last = out
		} else if out {
			escapes |= 1 << end
		}
	}
	switch {
	case !any:
		return no
	case last:
		return maybe
	}
	return yes
}

// joinedHeader is header as Envoys before 1.37.1 have it: the values joined by
// commas are one.
func (v *view) joinedHeader(h *headerTest) truth {
	if v.Known&FieldHeaders == 0 {
		return maybe
	}
	var buf [512]byte
	var all []byte
	found, unclear := 0, false
	for i := range v.Headers {
		hd := &v.Headers[i]
		if hd.Name != h.name {
			continue
		}
		switch found++; found {
		case 1:
			all = hd.Value
		case 2:
			all = append(append(append(buf[:0], all...), ','), hd.Value...)
		default:
			all = append(append(all, ','), hd.Value...)
		}
		unclear = unclear || hd.Form >= HeaderUnclear
	}
	switch {
	case found == 0:
		return no
	case h.present():
		return yes
	case unclear:
		return maybe
	}
	return h.match(all)
}

// forwardedFor is the last entry of X-Forwarded-For, of all its values as if they
// were joined, as Envoy takes it without use_remote_address and trusted hops. ok
// is false if there is none that is an address, so that Envoy takes the peer's;
// sure is false if that cannot be known.
func forwardedFor(headers []Header) (a netip.Addr, ok, sure bool) {
	var value []byte
	for i := range headers {
		if headers[i].Name != "x-forwarded-for" {
			continue
		}
		if headers[i].Form >= HeaderUnclear {
			return netip.Addr{}, false, false
		}
		value = headers[i].Value
	}
	// Where nothing follows the last comma Envoy takes the whole text, which has a
	// comma and so is no address; neither is nothing.
	value = bytes.Trim(value[bytes.LastIndexByte(value, ',')+1:], " \t\n\v\f\r")
	if bytes.IndexByte(value, ':') < 0 {
		a, ok = parseIPv4(value)
		return a, ok, true
	}
	// The text is looked at only during the call, and the error is not kept.
	a, err := netip.ParseAddr(unsafe.String(&value[0], len(value)))
	if err != nil {
		return netip.Addr{}, false, true
	}
	if a.Zone() != "" { // what Envoy makes of it depends on its host's interfaces
		return netip.Addr{}, false, false
	}
	return a, true, true
}

// parseIPv4 is [netip.ParseAddr] for IPv4, without an error that would be
// allocated for each header that holds something else.
func parseIPv4(b []byte) (netip.Addr, bool) {
	var a [4]byte
	for i := range a {
		field, rest, more := bytes.Cut(b, []byte("."))
		if more != (i < 3) || len(field) == 0 || len(field) > 1 && field[0] == '0' {
			return netip.Addr{}, false
		}
		n := 0
		for _, c := range field {
			n = n*10 + int(c) - '0'
			if c < '0' || c > '9' || n > 255 {
				return netip.Addr{}, false
			}
		}
		a[i], b = byte(n), rest
	}
	return netip.AddrFrom4(a), true
}
