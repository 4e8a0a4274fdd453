package authz

import "math/bits"

// radix is a tree of texts by their beginnings, or, if the texts were turned
// around, by their ends. What a text leads to is a *posting. It is built once and
// then only read.
type radix struct {
	label string
	// mask says which bytes kids begin with; kids are in that order.
	mask [4]uint64
	kids []*radix
	post *posting
}

// at returns where the posting of a text is kept.
func (n *radix) at(text string) **posting {
	for text != "" {
		i, there := n.kid(text[0])
		if !there {
			leaf := &radix{label: text}
			n.kids = append(n.kids, nil)
			copy(n.kids[i+1:], n.kids[i:])
			n.kids[i] = leaf
			n.mask[text[0]>>6] |= 1 << (text[0] & 63)
			return &leaf.post
		}
		k := n.kids[i]
		same := 1 // that is how the kid was chosen
		for same < len(text) && same < len(k.label) && text[same] == k.label[same] {
			same++
		}
		if same < len(k.label) {
			above := &radix{label: k.label[:same]}
			k.label = k.label[same:]
			above.mask[k.label[0]>>6] |= 1 << (k.label[0] & 63)
			above.kids = []*radix{k}
			n.kids[i] = above
			k = above
		}
		n, text = k, text[same:]
	}
	return &n.post
}

// kid is the index of the kid that begins with c, or the one that it would have.
func (n *radix) kid(c byte) (i int, there bool) {
	word, bit := c>>6, uint64(1)<<(c&63)
	for w := range word {
		i += bits.OnesCount64(n.mask[w])
	}
	return i + bits.OnesCount64(n.mask[word]&(bit-1)), n.mask[word]&bit != 0
}

func (n *radix) next(c byte) *radix {
	if i, there := n.kid(c); there {
		return n.kids[i]
	}
	return nil
}

// prefix goes on to the next node whose text b begins with; i is how much of b
// was consumed.
func (n *radix) prefix(b []byte, i int) (*radix, int) {
	if i == len(b) {
		return nil, i
	}
	n = n.next(b[i])
	if n == nil || len(b)-i < len(n.label) || string(b[i:i+len(n.label)]) != n.label {
		return nil, i
	}
	return n, i + len(n.label)
}

// suffix is prefix from the end of b.
func (n *radix) suffix(b []byte, i int) (*radix, int) {
	if i == len(b) {
		return nil, i
	}
	n = n.next(b[len(b)-1-i])
	if n == nil || len(b)-i < len(n.label) {
		return nil, i
	}
	for k := range len(n.label) {
		if b[len(b)-1-i-k] != n.label[k] {
			return nil, i
		}
	}
	return n, i + len(n.label)
}

// each calls yield with every text below, which begins with stem.
func (n *radix) each(stem string, yield func(string)) {
	if n == nil {
		return
	}
	stem += n.label
	if n.post != nil {
		yield(stem)
	}
	for _, k := range n.kids {
		k.each(stem, yield)
	}
}

func (n *radix) postings(yield func(*posting)) {
	if n == nil {
		return
	}
	if n.post != nil {
		yield(n.post)
	}
	for _, k := range n.kids {
		k.postings(yield)
	}
}

func reversed(s string) string {
	b := make([]byte, len(s))
	for i := range len(s) {
		b[len(s)-1-i] = s[i]
	}
	return string(b)
}

// textSet is many texts, prefixes and suffixes.
type textSet struct {
	exact          map[string]struct{}
	prefix, suffix *radix
}

// member is what the texts of a set lead to.
var member = &posting{}

func (s *textSet) add(p pattern) {
	switch p.shape {
	case exactly:
		if s.exact == nil {
			s.exact = make(map[string]struct{})
		}
		s.exact[p.text] = struct{}{}
	case prefixed:
		if s.prefix == nil {
			s.prefix = &radix{}
		}
		*s.prefix.at(p.text) = member
	case suffixed:
		if s.suffix == nil {
			s.suffix = &radix{}
		}
		*s.suffix.at(reversed(p.text)) = member
	}
}

func (s *textSet) has(b []byte) bool {
	if s.exact != nil {
		if _, ok := s.exact[string(b)]; ok {
			return true
		}
	}
	if s.prefix != nil {
		for n, i := s.prefix, 0; n != nil; n, i = n.prefix(b, i) {
			if n.post != nil {
				return true
			}
		}
	}
	if s.suffix != nil {
		for n, i := s.suffix, 0; n != nil; n, i = n.suffix(b, i) {
			if n.post != nil {
				return true
			}
		}
	}
	return false
}
