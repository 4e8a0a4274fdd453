package authz

import (
	"strings"

	"google.golang.org/protobuf/types/known/structpb"
)

// claimTest is a condition on a claim of the verified token: text, or a list
// with such text. Numbers, booleans and objects match nothing.
type claimTest struct {
	path []string
	*patterns
}

func (v *view) claim(c *claimTest) truth {
	if v.Known&FieldClaims == 0 {
		return maybe
	}
	return c.value(descend(v.Claims, c.path), true, true)
}

// hidden reports whether a value is there and not known.
func hidden(v *structpb.Value) bool { return v != nil && v.Kind == nil }

// descend is the value at a path of keys, or nil. It is hidden if one on the way is.
func descend(s *structpb.Struct, path []string) *structpb.Value {
	var v *structpb.Value
	for i, k := range path {
		if i > 0 {
			s = v.GetStructValue()
		}
		if v = s.GetFields()[k]; v == nil || hidden(v) {
			return v
		}
	}
	return v
}

// value holds a value against the patterns, as text, as a list, or both.
func (p *patterns) value(v *structpb.Value, text, list bool) truth {
	if hidden(v) {
		return maybe
	}
	switch k := v.GetKind().(type) {
	case *structpb.Value_StringValue:
		if text {
			return p.match(bytesOf(k.StringValue))
		}
	case *structpb.Value_ListValue:
		best := no
		for _, e := range k.ListValue.GetValues() {
			if s, ok := e.GetKind().(*structpb.Value_StringValue); ok && list {
				best = max(best, p.match(bytesOf(s.StringValue)))
			} else if hidden(e) && list {
				best = max(best, maybe)
			}
		}
		return best
	}
	return no
}

// identityTest is a condition on the request's principal: a pair of an issuer
// and a subject.
type identityTest []identityValue

type identityValue struct{ issuer, subject patterns }

// newIdentities compiles request principals. Istio splits each at its last slash,
// because issuers are URLs; a value without one, and without a star, is an issuer
// with an empty subject.
func newIdentities(values []string) identityTest {
	one := func(s shape, text string) patterns { return patterns{list: []pattern{{shape: s, text: text}}} }
	anything := one(nonempty, "")
	out := make(identityTest, len(values))
	for n, v := range values {
		iss, sub, split := v, "", false
		if slash := strings.LastIndexByte(v, '/'); slash >= 0 {
			iss, sub, split = v[:slash], v[slash+1:], true
		}
		switch {
		case v == "*":
			out[n] = identityValue{anything, anything}
		case strings.HasPrefix(v, "*"):
			if split {
				out[n] = identityValue{patterns{list: []pattern{newPattern(iss, nonempty)}}, one(exactly, sub)}
			} else {
				out[n] = identityValue{anything, one(suffixed, v[1:])}
			}
		case sub == "*":
			out[n] = identityValue{one(exactly, iss), anything}
		case strings.HasSuffix(v, "*"):
			if split {
				out[n] = identityValue{one(exactly, iss), one(prefixed, sub[:len(sub)-1])}
			} else {
				out[n] = identityValue{one(prefixed, v[:len(v)-1]), anything}
			}
		default:
			out[n] = identityValue{one(exactly, iss), one(exactly, sub)}
		}
	}
	return out
}

func (v *view) identity(t identityTest) truth {
	if v.Known&FieldClaims == 0 {
		return maybe
	}
	f := v.Claims.GetFields()
	best := no
	for i := range t {
		// What is no text is not matched by anything.
		best = max(best, min(t[i].issuer.value(f["iss"], true, false), t[i].subject.value(f["sub"], true, false)))
	}
	return best
}

// metadataTest is a condition on the dynamic metadata of a filter: values in
// brackets are about elements of a list, the others about text.
type metadataTest struct {
	filter, key string
	text, list  *patterns
}

func newMetadata(key string, values []string) (metadataTest, bool) {
	filter, name, ok := strings.Cut(strings.TrimSuffix(strings.TrimPrefix(key, "experimental."), "]"), "[")
	t := metadataTest{filter: filter, key: name}
	var text, list []string
	for _, v := range values {
		if strings.HasPrefix(v, "[") && strings.HasSuffix(v, "]") {
			list = append(list, strings.Trim(v, "[]"))
		} else {
			text = append(text, v)
		}
	}
	t.text, t.list = newPatterns(text, nonempty), newPatterns(list, nonempty)
	return t, ok
}

func (v *view) metadata(t *metadataTest) truth {
	s, there := v.Metadata[t.filter]
	if !there && v.Known&FieldMetadata == 0 {
		return maybe
	}
	value := s.GetFields()[t.key]
	best := no
	if t.text != nil {
		best = t.text.value(value, true, false)
	}
	if t.list != nil {
		best = max(best, t.list.value(value, false, true))
	}
	return best
}

// claimPath is the path that a key in brackets means: [a][b] is a, then b. What
// is not nested like that is one name, as in Istio.
func claimPath(s string) (path []string, ok bool) {
	for rest := s; rest != ""; {
		name, more, closed := strings.Cut(rest[1:], "]")
		if rest[0] != '[' || !closed || strings.Contains(name, "[") {
			name, ok = bracketed(s)
			return []string{name}, ok
		}
		path, rest = append(path, name), more
	}
	return path, path != nil
}

// bracketed is the name in one pair of brackets.
func bracketed(s string) (string, bool) {
	if !strings.HasPrefix(s, "[") || !strings.HasSuffix(s, "]") {
		return "", false
	}
	return strings.TrimPrefix(strings.TrimSuffix(s, "]"), "["), true
}
