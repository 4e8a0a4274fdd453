package authz

import "strings"

// template is a path with {*} or {**}, as Envoy's uri_template matcher has it:
// {*} is a segment of one or more characters of a path, {**} any number of them,
// slashes included. After {**} there are only literals (Istio's admission sees to
// that), so a template is literals and {*}, and perhaps {**} and a literal end.
type template struct {
	// parts are the literal texts around each {*} before the {**}: the path
	// begins with the first, then comes a segment, then the next, and so on.
	parts []string
	// glob says that there is a {**} after the last part, and end what follows it.
	glob bool
	end  string
	// asterisk says that a path character may be "*".
	asterisk bool
}

const (
	matchOne = "{*}"
	matchAny = "{**}"
)

func hasTemplate(v string) bool {
	return strings.Contains(v, matchOne) || strings.Contains(v, matchAny)
}

func newTemplate(v string, asterisk bool) *template {
	t := &template{asterisk: asterisk}
	v, t.end, t.glob = strings.Cut(v, matchAny)
	t.parts = strings.Split(v, matchOne)
	return t
}

// match is Envoy's full match.
func (t *template) match(b []byte) bool {
	for i, part := range t.parts {
		if i > 0 {
			n := 0
			for n < len(b) && t.pathChar(b[n]) {
				n++
			}
			// A segment ends at a slash or at the end, because a template is a
			// whole segment; so the longest run is the only candidate.
			if n == 0 {
				return false
			}
			b = b[n:]
		}
		if len(b) < len(part) || string(b[:len(part)]) != part {
			return false
		}
		b = b[len(part):]
	}
	if !t.glob {
		return len(b) == 0
	}
	if len(b) < len(t.end) || string(b[len(b)-len(t.end):]) != t.end {
		return false
	}
	for _, c := range b[:len(b)-len(t.end)] {
		if c != '/' && !t.pathChar(c) {
			return false
		}
	}
	return true
}

// pathChar reports whether c is one that Envoy's templates take for a character
// of a segment.
func (t *template) pathChar(c byte) bool {
	return pathChars[c] || c == '*' && t.asterisk
}

// pathChars are RFC 3986's characters of a segment without "*", percent included.
var pathChars = func() (set [256]bool) {
	for _, c := range "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~%!$&'()+,;:@=" {
		set[c] = true
	}
	return set
}()
