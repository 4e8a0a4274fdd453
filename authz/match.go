package authz

import (
	"bytes"
	"strings"
	"unicode/utf8"
	"unsafe"
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

// shape is the form of one value in Istio's pattern language. The leading star
// is looked at first, so "*x*" is the suffix "x*"; a star in the middle is a
// star.
type shape uint8

const (
	// exactly is the value itself.
	exactly shape = iota
	// prefixed is "x*".
	prefixed
	// suffixed is "*x".
	suffixed
	// nonempty is "*" where Istio writes the regular expression ".+".
	nonempty
	// present is "*" where Istio asks for the header's presence.
	present
	// templated is a path with {*} or {**}.
	templated
)

// pattern is one value of a field.
type pattern struct {
	text     string
	template *template // of a templated one
	shape    shape
}

// patterns are the values of one field, of which one must match.
type patterns struct {
	list []pattern
	// set has the exact values, prefixes and suffixes where they are too many to
	// go through; list then has only the others.
	set *textSet
	// fold compares without regard to ASCII case; the values are lower-case.
	fold bool
	// stem says that a suffix is the regular expression spiffe://.*SUFFIX to
	// Istio, not a plain suffix, and so is particular about the bytes between.
	stem bool
}

const manyValues = 8

const scheme = "spiffe://"

// newPatterns compiles values; star is what "*" alone means. It returns nil for
// no values.
func newPatterns(values []string, star shape) *patterns {
	if len(values) == 0 {
		return nil
	}
	p := &patterns{list: make([]pattern, len(values))}
	for i, v := range values {
		p.list[i] = newPattern(v, star)
	}
	return p.finish()
}

func newPattern(v string, star shape) pattern {
	switch {
	case v == "*":
		return pattern{shape: star}
	case strings.HasPrefix(v, "*"):
		return pattern{shape: suffixed, text: v[1:]}
	case strings.HasSuffix(v, "*"):
		return pattern{shape: prefixed, text: v[:len(v)-1]}
	}
	return pattern{text: v}
}

// finish moves many values into a set.
func (p *patterns) finish() *patterns {
	if len(p.list) <= manyValues {
		return p
	}
	var rest []pattern
	for _, v := range p.list {
		if v.shape > suffixed || v.shape == suffixed && p.stem {
			rest = append(rest, v)
			continue
		}
		if p.set == nil {
			p.set = &textSet{}
		}
		p.set.add(v)
	}
	p.list = rest
	return p
}

// principalPatterns match names as they stand in a certificate; policies write
// them without spiffe://.
func principalPatterns(values []string) *patterns {
	if len(values) == 0 {
		return nil
	}
	p := &patterns{list: make([]pattern, len(values)), stem: true}
	for i, v := range values {
		p.list[i] = newPattern(v, nonempty)
		if s := p.list[i].shape; s == exactly || s == prefixed {
			p.list[i].text = scheme + p.list[i].text
		}
	}
	return p.finish()
}

// pathPatterns match paths without query and fragment.
func pathPatterns(values []string, asterisk bool) *patterns {
	if len(values) == 0 {
		return nil
	}
	p := &patterns{list: make([]pattern, len(values))}
	for i, v := range values {
		if hasTemplate(v) {
			p.list[i] = pattern{shape: templated, text: v, template: newTemplate(v, asterisk)}
		} else {
			p.list[i] = newPattern(v, nonempty)
		}
	}
	return p.finish()
}

// hostPatterns match the authority without regard to case, where "*" is
// presence.
func hostPatterns(values []string) *patterns {
	if len(values) == 0 {
		return nil
	}
	p := &patterns{list: make([]pattern, len(values)), fold: true}
	for i, v := range values {
		p.list[i] = newPattern(lowerASCII(v), present)
	}
	return p.finish()
}

// sniPatterns match server names, which Envoy has in lower case: a value with an
// upper-case letter never matches.
func sniPatterns(values []string) *patterns {
	if len(values) == 0 {
		return nil
	}
	p := &patterns{fold: true}
	for _, v := range values {
		if lowerASCII(v) == v {
			p.list = append(p.list, newPattern(v, nonempty))
		}
	}
	return p.finish()
}

// match holds a present value against the patterns. Where they fold, b has no
// upper-case letters.
func (p *patterns) match(b []byte) truth {
	if p.set != nil && p.set.has(b) {
		return yes
	}
	best := no
	for i := range p.list {
		v := &p.list[i]
		switch v.shape {
		case exactly:
			if string(b) == v.text {
				return yes
			}
		case prefixed:
			if len(b) >= len(v.text) && string(b[:len(v.text)]) == v.text {
				return yes
			}
		case suffixed:
			if len(b) < len(v.text) || string(b[len(b)-len(v.text):]) != v.text {
				continue
			}
			if !p.stem {
				return yes
			}
			if len(b) < len(scheme)+len(v.text) || string(b[:len(scheme)]) != scheme {
				continue
			}
			if clean(b) {
				return yes
			}
			best = maybe
		case nonempty:
			if len(b) == 0 {
				continue
			}
			if clean(b) {
				return yes
			}
			best = maybe
		case present:
			return yes
		case templated:
			if v.template.match(b) {
				return yes
			}
		}
	}
	return best
}

// lower writes b without upper-case letters into buf, if it fits; else it makes
// a copy.
func lower(b []byte, buf []byte) []byte {
	if !hasUpper(b) {
		return b
	}
	if len(b) > len(buf) {
		buf = make([]byte, len(b))
	}
	for i, c := range b {
		buf[i] = lowerByte(c)
	}
	return buf[:len(b)]
}

func hasUpper(b []byte) bool {
	for _, c := range b {
		if c != lowerByte(c) {
			return true
		}
	}
	return false
}

func lowerByte(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		c += 'a' - 'A'
	}
	return c
}

func lowerASCII(s string) string { return string(lower([]byte(s), nil)) }

// bytesOf is the bytes of s, which must not be written to: patterns read bytes
// and metadata has strings, and copying would allocate.
func bytesOf(s string) []byte { return unsafe.Slice(unsafe.StringData(s), len(s)) }

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
	for rest := name; !found; {
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
// slash. It returns nil if there is none, else the segment, which may be empty, and
// where to go on: a name may have several.
func nextNamespace(name []byte) (ns, rest []byte) {
	const mark = "/ns/"
	i := bytes.Index(name, []byte(mark))
	if i < 0 {
		return nil, nil
	}
	rest = name[i+len(mark)-1:] // "/ns/ns/" holds two marks
	ns, _, more := bytes.Cut(rest[1:], []byte("/"))
	if !more {
		return nil, nil
	}
	return ns, rest
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
