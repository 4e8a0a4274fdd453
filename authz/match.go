package authz

import (
	"bytes"
	"net/netip"
	"slices"
	"strings"
	"unicode/utf8"
)

// truth is a logical value of three: what cannot be known is neither false nor
// true. The order makes "and" the minimum and "or" the maximum.
type truth uint8

const (
	no truth = iota
	maybe
	yes
)

func (t truth) not() truth { return yes - t }

func toTruth(b bool) truth {
	if b {
		return yes
	}
	return no
}

// patterns are the values of one field, in Istio's pattern language:
// "*" anything that is not empty, "*x" a suffix, "x*" a prefix, else the exact
// value. The leading star is looked at first, so "*x*" is the suffix "x*", and
// a star in the middle is a star.
type patterns struct {
	// exact values; many is their set where they are too many to go through.
	exact []string
	many  map[string]struct{}

	prefix []string
	// suffix values; each needs stem in front of it, without overlap.
	suffix []string
	stem   string
	// any is Istio's ".+", present its header presence, which is true of the
	// empty value too.
	any, present bool
	// fold compares without regard to ASCII case; the values are lower-case.
	fold bool
	// stemmed says that a suffix is the regular expression stem+".*"+suffix to
	// Istio, not a plain suffix, and so is particular about the bytes between.
	stemmed bool
}

const manyValues = 8

// add takes one value of the policy.
func (p *patterns) add(v string) {
	switch {
	case v == "*":
		p.any = true
	case v[0] == '*':
		p.suffix = append(p.suffix, v[1:])
	case v[len(v)-1] == '*':
		p.prefix = append(p.prefix, p.stem+v[:len(v)-1])
	default:
		p.exact = append(p.exact, p.stem+v)
	}
}

// finish builds the set of many exact values.
func (p *patterns) finish() *patterns {
	if len(p.exact) > manyValues && !p.fold {
		p.many = make(map[string]struct{}, len(p.exact))
		for _, v := range p.exact {
			p.many[v] = struct{}{}
		}
	}
	return p
}

// principalPatterns match names as they stand in a certificate; policies write
// them without spiffe://.
func principalPatterns(list []string) *patterns {
	return newPatterns(list, patterns{stem: "spiffe://", stemmed: true})
}

// pathPatterns match paths without query and fragment.
func pathPatterns(list []string) *patterns { return newPatterns(list, patterns{}) }

// methodPatterns match the method, where "*" is presence.
func methodPatterns(list []string) *patterns {
	p := newPatterns(list, patterns{})
	if p != nil {
		p.present, p.any = p.any, false
	}
	return p
}

// hostPatterns match the authority without regard to case, where "*" is
// presence.
func hostPatterns(list []string) *patterns {
	lower := make([]string, len(list))
	for i, v := range list {
		lower[i] = lowerASCII(v)
	}
	p := newPatterns(lower, patterns{fold: true})
	if p != nil {
		p.present, p.any = p.any, false
	}
	return p
}

func newPatterns(list []string, p patterns) *patterns {
	if len(list) == 0 {
		return nil
	}
	for _, v := range list {
		p.add(v)
	}
	return p.finish()
}

// match holds a present value against the patterns.
func (p *patterns) match(b []byte) truth {
	switch {
	case p.present:
		return yes
	case p.fold:
		return p.matchFold(b)
	case p.any && len(b) > 0 && clean(b):
		return yes
	}
	if p.many != nil {
		if _, ok := p.many[string(b)]; ok {
			return yes
		}
	} else {
		for _, v := range p.exact {
			if string(b) == v {
				return yes
			}
		}
	}
	for _, v := range p.prefix {
		if len(b) >= len(v) && string(b[:len(v)]) == v {
			return yes
		}
	}
	for _, v := range p.suffix {
		if len(b) < len(p.stem)+len(v) || string(b[len(b)-len(v):]) != v || string(b[:len(p.stem)]) != p.stem {
			continue
		}
		if !p.stemmed || clean(b) {
			return yes
		}
		return maybe
	}
	if p.any && len(b) > 0 {
		return maybe // not clean
	}
	return no
}

func (p *patterns) matchFold(b []byte) truth {
	for _, v := range p.exact {
		if len(b) == len(v) && equalFold(b, v) {
			return yes
		}
	}
	for _, v := range p.prefix {
		if len(b) >= len(v) && equalFold(b[:len(v)], v) {
			return yes
		}
	}
	for _, v := range p.suffix {
		if len(b) >= len(v) && equalFold(b[len(b)-len(v):], v) {
			return yes
		}
	}
	return no
}

// equalFold compares b with a lower-case value of the same length.
func equalFold(b []byte, lower string) bool {
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		if c != lower[i] {
			return false
		}
	}
	return true
}

func lowerASCII(s string) string {
	return strings.Map(func(r rune) rune {
		if 'A' <= r && r <= 'Z' {
			return r + 'a' - 'A'
		}
		return r
	}, s)
}

// clean reports whether "." of a regular expression certainly matches every
// character of b. RE2 leaves out the newline, and matches bytes that are not
// UTF-8 or not, depending on where they stand; so of a value that is not clean
// it is unknown whether the expression matches.
func clean(b []byte) bool {
	for _, c := range b {
		if c >= utf8.RuneSelf || c == '\n' {
			return utf8.Valid(b) && bytes.IndexByte(b, '\n') < 0
		}
	}
	return true
}

// namespaces match a name in which a namespace stands. To Istio the value v is
// the regular expression ".*/ns/"+v+"/.*", where a star in v is ".*"; that has
// a fixed shape, pieces in their order with anything between. So it needs no
// regular expression.
type namespaces struct {
	// plain values have no star and no slash; they are found by looking at the
	// segments after "/ns/".
	plain []string
	many  map[string]struct{}
	// globs are the pieces of the other values.
	globs [][]string
}

func newNamespaces(list []string) *namespaces {
	if len(list) == 0 {
		return nil
	}
	n := &namespaces{}
	for _, v := range list {
		if plainNamespace(v) {
			n.plain = append(n.plain, v)
			continue
		}
		n.globs = append(n.globs, strings.Split("/ns/"+v+"/", "*"))
	}
	if len(n.plain) > manyValues {
		n.many = make(map[string]struct{}, len(n.plain))
		for _, v := range n.plain {
			n.many[v] = struct{}{}
		}
	}
	return n
}

func plainNamespace(v string) bool { return !strings.ContainsAny(v, "*/") }

func (n *namespaces) match(name []byte) truth {
	found := false
	for rest := name; !found && len(n.plain) > 0; {
		var ns []byte
		if ns, rest = nextNamespace(rest); ns == nil {
			break
		}
		if n.many != nil {
			_, found = n.many[string(ns)]
		} else {
			for _, v := range n.plain {
				found = found || string(ns) == v
			}
		}
	}
	for i := 0; !found && i < len(n.globs); i++ {
		found = inOrder(name, n.globs[i])
	}
	switch {
	case !found:
		return no
	case clean(name):
		return yes
	}
	return maybe
}

// nextNamespace finds the next segment that follows "/ns/" and is followed by a
// slash. It returns nil if there is none, else the segment and where to go on:
// a name may have several.
func nextNamespace(name []byte) (ns, rest []byte) {
	const mark = "/ns/"
	for {
		i := bytes.Index(name, []byte(mark))
		if i < 0 {
			return nil, nil
		}
		rest = name[i+len(mark)-1:] // "/ns/ns/" holds two marks
		segment := rest[1:]
		end := bytes.IndexByte(segment, '/')
		if end < 0 {
			return nil, nil
		}
		if end > 0 {
			return segment[:end], rest
		}
		name = rest
	}
}

// inOrder reports whether the pieces occur in b one after the other.
func inOrder(b []byte, pieces []string) bool {
	for _, p := range pieces {
		i := bytes.Index(b, []byte(p))
		if i < 0 {
			return false
		}
		b = b[i+len(p):]
	}
	return true
}

// blocks are IP addresses and CIDR blocks.
type blocks []netip.Prefix

func newBlocks(list []string) blocks {
	if len(list) == 0 {
		return nil
	}
	bs := make(blocks, 0, len(list))
	for _, v := range list {
		if p, err := netip.ParsePrefix(v); err == nil {
			bs = append(bs, p.Masked())
		} else if a, err := netip.ParseAddr(v); err == nil {
			bs = append(bs, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return bs
}

// match takes an address without a zone and not in the IPv4-mapped form. So a
// block of mapped addresses matches no IPv4 peer, as in Envoy.
func (bs blocks) match(a netip.Addr) bool {
	return slices.ContainsFunc(bs, func(p netip.Prefix) bool { return p.Contains(a) })
}
