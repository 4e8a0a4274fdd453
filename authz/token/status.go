package token

// Status is what was found of a request's tokens. The names are those of the causes
// in metrics and records; [Status.Text] is what Envoy answers.
type Status uint8

// The statuses.
const (
	// Missing: the request has no token where a rule looks for one.
	Missing Status = iota
	// Good: every token that a rule found is good.
	Good
	// Unread: the request does not say all that a rule looks at.
	Unread
	// Malformed: it is not three parts in base64url with JSON in the first two, or a
	// field is of the wrong type.
	Malformed
	// Algorithm: its algorithm is none that is accepted, or its header demands
	// extensions (crit).
	Algorithm
	// Foreign: its issuer is not the rule's.
	Foreign
	// Expired: it is expired.
	Expired
	// Future: it is not valid yet.
	Future
	// Audience: none of its audiences is the rule's.
	Audience
	// NoKeys: the keys of the rule are not known.
	NoKeys
	// UnknownKey: no key has its key ID and its algorithm.
	UnknownKey
	// Forged: no key verifies its signature.
	Forged
	// TooMany: there are more than MaxTokens.
	TooMany
	// TooManyKeys: more than MaxSignatures keys would have to be tried.
	TooManyKeys
	// Interrupted: the context of the check ended before a key verified it.
	Interrupted

	statuses
)

var statusTexts = [statuses]struct{ name, text string }{
	Missing:    {"missing", "Jwt is missing"},
	Good:       {"good", "OK"},
	Unread:     {"unread", "Jwt verification fails"},
	Malformed:  {"malformed", "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections"},
	Algorithm:  {"algorithm", "Jwt header [alg] is not supported"},
	Foreign:    {"issuer", "Jwt issuer is not configured"},
	Expired:    {"expired", "Jwt is expired"},
	Future:     {"not-yet-valid", "Jwt not yet valid"},
	Audience:   {"audience", "Audiences in Jwt are not allowed"},
	NoKeys:     {"no-keys", "Jwks remote fetch is failed"},
	UnknownKey: {"unknown-key", "Jwks doesn't have key to match kid or alg from Jwt"},
	Forged:     {"signature", "Jwt verification fails"},
	TooMany:    {"too-many", "Found multiple Jwt tokens"},

	TooManyKeys: {"too-many-keys", "Jwt verification fails"},
	Interrupted: {"interrupted", "Jwt verification fails"},
}

// String is a stable code: metrics and records may rely on it.
func (s Status) String() string {
	if s >= statuses {
		return "invalid"
	}
	return statusTexts[s].name
}

// Text is the body with which Envoy refuses such a request, in the wording of its
// filter jwt_authn; where Envoy has several for one status, it is one of them.
func (s Status) Text() string {
	if s >= statuses {
		return ""
	}
	return statusTexts[s].text
}

// HTTP is the status code with which Envoy refuses such a request.
func (s Status) HTTP() int {
	switch s {
	case Missing, Good:
		return 200
	case Audience:
		return 403
	}
	return 401
}
