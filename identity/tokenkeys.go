package identity

import "crypto"

// TokenKeys are the public keys of the issuer of workloads' tokens. A value that
// was handed on is never changed.
type TokenKeys struct {
	// Issuer is the tokens' iss; empty: nothing is known.
	Issuer string
	// Keys are by key ID (kid).
	Keys map[string]crypto.PublicKey
}

// Equal reports whether k and o are the same keys of the same issuer.
func (k TokenKeys) Equal(o TokenKeys) bool {
	if k.Issuer != o.Issuer || len(k.Keys) != len(o.Keys) {
		return false
	}
	for id, key := range k.Keys {
		p, ok := key.(interface{ Equal(crypto.PublicKey) bool })
		if !ok || o.Keys[id] == nil || !p.Equal(o.Keys[id]) {
			return false
		}
	}
	return true
}
