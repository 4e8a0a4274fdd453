package authz

import (
	"maps"
	"slices"
)

// JWTFilter is where Envoy's jwt_authn leaves what it says of a token.
const JWTFilter = "envoy.filters.http.jwt_authn"

// Again decides about a request that was decided about before, maybe by other policies.
// r is the request as it came, but for Claims and Token: those were found behind
// extension providers that had made the changes in then, in this order.
//
// answer is asked in place of a provider, about the request as that would see it, which
// it may copy but not keep: for what it changes, nil for nothing, and whether it allows. Where it does not, the decision that asks is returned.
//
// What the token says is taken to be unknown where it cannot be told: where the changes
// are not those of then, or are in another order. What the proxy itself has said of
// the token outlasts that, but not a change of where p looks for tokens or puts claims.
//
// now is the request behind the providers. Again does not change r.
func (p *Program) Again(r *Request, then []*Changes, answer func(d Decision, r *Request) (*Changes, bool)) (d Decision, now Request) {
	then = slices.DeleteFunc(slices.Clone(then), (*Changes).none)
	now = *r
	// CUSTOM policies do not read the token, but may read metadata, which has what the
	// proxy said of it. If nothing is left of that, a change may have taken it away.
	proxys := r.Claims != nil && r.Token == nil
	if !proxys && len(then) > 0 {
		now.forgetToken()
	}
	var made []*Changes
	var asked Decision
	for d = p.Custom(&now); d.Ask; d = p.CustomAfter(d, &now) {
		c, ok := answer(d, &now)
		if !ok {
			return d, now
		}
		asked = d
		if c.none() {
			continue
		}
		c.Apply(&now)
		made = append(made, c)
		if now.Claims != nil && (c.LooksAt(p.Verifies()) || c.SetsAny(p.outputs)) {
			now.forgetToken()
		}
	}
	switch {
	case proxys:
	case slices.Equal(made, then):
		now.Claims, now.Token, now.Metadata = r.Claims, r.Token, r.Metadata
		now.Known |= r.Known & (FieldClaims | FieldMetadata)
	default:
		now.forgetToken()
	}
	if asked.Ask {
		return p.After(asked, &now), now
	}
	return p.Decide(&now), now
}

// none reports whether there are no changes.
func (c *Changes) none() bool {
	return c == nil || len(c.Names)+len(c.Headers) == 0 && c.Method == nil && c.Path == nil && c.Host == nil && c.Hidden == 0
}

// DisownToken takes away what the proxy has said of the token, also in Metadata, which is
// replaced and not written to.
func (r *Request) DisownToken() {
	r.Claims = nil
	r.Metadata = maps.Clone(r.Metadata)
	delete(r.Metadata, JWTFilter)
}

// forgetToken makes unknown what was found out about the token.
func (r *Request) forgetToken() {
	r.DisownToken()
	r.Token = nil
	r.Known &^= FieldClaims | FieldMetadata
}
