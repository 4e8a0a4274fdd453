package attest

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/signet-mesh/signet/identity"
)

const (
	// maxUnknown bounds the key IDs that are asked for at once; unknownEvery is how
	// often one more is: tokens with invented ones cost nobody else anything.
	maxUnknown   = 8
	unknownEvery = time.Second
	// unknownAgain is when an ID that was asked for in vain may be asked for again.
	unknownAgain = 5 * time.Second
)

// errNotHanded is why nothing can be verified yet.
var errNotHanded = errors.New("the authority has not told the keys of the issuer yet")

// Handed are the keys of an issuer as an authority hands them over: a [KeySource]
// that asks nobody. What was handed last stays until something else is. The zero
// Handed has no keys; it is safe for concurrent use.
type Handed struct {
	set     atomic.Pointer[handedSet]
	current identity.Watched[identity.TokenKeys]

	mu      sync.Mutex
	unknown []string  // IDs that were asked for in vain; guarded by mu
	noted   time.Time // when the last one was; guarded by mu
	more    identity.Watched[[]string]
}

type handedSet struct {
	issuer string
	byID   map[string]Key
}

// Hand replaces the keys. Keys for other algorithms than RS256 and ES256 are left
// out; it is an error, and changes nothing, if none is left, or if one is weak.
func (h *Handed) Hand(k identity.TokenKeys) error {
	set := &handedSet{issuer: k.Issuer, byID: make(map[string]Key, len(k.Keys))}
	for id, public := range k.Keys {
		alg, err := algorithmFor(public)
		switch {
		case errors.Is(err, errUnused):
			continue
		case err != nil:
			return fmt.Errorf("taking the issuer's keys: key %s: %w", quoted(id), err)
		case id == "" || len(id) > maxKeyID:
			return fmt.Errorf("taking the issuer's keys: a key ID of %d bytes; it must have 1 to %d", len(id), maxKeyID)
		}
		set.byID[id] = Key{Public: public, Algorithm: alg}
	}
	if k.Issuer == "" || k.Issuer == legacyIssuer || len(set.byID) == 0 || len(set.byID) > maxKeys {
		return fmt.Errorf("taking the issuer's keys: %d usable keys of issuer %s", len(set.byID), quoted(k.Issuer))
	}
	h.set.Store(set)
	h.current.Store(k)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.unknown = slices.DeleteFunc(slices.Clone(h.unknown), func(id string) bool { _, ok := set.byID[id]; return ok })
	h.more.Store(h.unknown)
	return nil
}

// Key implements [KeySource].
func (h *Handed) Key(_ context.Context, kid string) (Key, bool, error) {
	set := h.set.Load()
	if set != nil {
		if key, ok := set.byID[kid]; ok {
			return key, true, nil
		}
	}
	h.want(kid, time.Now())
	if set == nil {
		return Key{}, false, errNotHanded
	}
	return Key{}, false, nil
}

// want notes an ID, if that was not done a moment ago. The oldest makes room.
func (h *Handed) want(kid string, now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	since := now.Sub(h.noted)
	again := slices.Contains(h.unknown, kid)
	if since < unknownEvery || again && since < unknownAgain {
		return
	}
	h.noted = now
	next := slices.Clone(h.unknown)
	if again {
		// It was asked for in vain, perhaps while the API server was away. Whoever
		// looks at the list sees it go now, and come back with the next token.
		next = slices.DeleteFunc(next, func(id string) bool { return id == kid })
	} else {
		next = append(next, kid)
	}
	h.unknown = next[max(0, len(next)-maxUnknown):]
	h.more.Store(h.unknown)
}

// Unknown are the IDs of keys that tokens named and that were not handed over, and a
// channel that is closed when that changes.
func (h *Handed) Unknown() (ids []string, changed <-chan struct{}) { return h.more.Load() }

// Issuer is whose keys these are; ok is false before any were handed over.
func (h *Handed) Issuer() (issuer string, ok bool) {
	set := h.set.Load()
	if set == nil {
		return "", false
	}
	return set.issuer, true
}

// Err is nil once there are keys.
func (h *Handed) Err() error {
	if h.set.Load() == nil {
		return errNotHanded
	}
	return nil
}

// savedKeys is what Export writes. A change that older versions must not ignore
// means a new version.
type savedKeys struct {
	Version int               `json:"version"`
	Issuer  string            `json:"issuer"`
	Keys    map[string][]byte `json:"keys"` // SubjectPublicKeyInfo by key ID
}

const savedKeysVersion = 1

// Export is the keys, for a successor, and a channel that is closed when they
// change. It is nil while there are none.
func (h *Handed) Export() (saved []byte, changed <-chan struct{}) {
	k, changed := h.current.Load()
	if k.Issuer == "" {
		return nil, changed
	}
	out := savedKeys{Version: savedKeysVersion, Issuer: k.Issuer, Keys: map[string][]byte{}}
	for id, key := range k.Keys {
		der, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			continue // of a kind that is not used
		}
		out.Keys[id] = der
	}
	saved, err := json.Marshal(out)
	if err != nil {
		return nil, changed
	}
	return saved, changed
}

// Load hands over what Export wrote.
func (h *Handed) Load(saved []byte) error {
	var in savedKeys
	if err := json.Unmarshal(saved, &in); err != nil {
		return fmt.Errorf("loading the issuer's keys: %w", err)
	}
	if in.Version != savedKeysVersion {
		return fmt.Errorf("loading the issuer's keys: version %d, and this program reads %d", in.Version, savedKeysVersion)
	}
	k := identity.TokenKeys{Issuer: in.Issuer, Keys: make(map[string]crypto.PublicKey, len(in.Keys))}
	for id, der := range in.Keys {
		key, err := x509.ParsePKIXPublicKey(der)
		if err != nil {
			return fmt.Errorf("loading the issuer's keys: key %s: %w", quoted(id), err)
		}
		k.Keys[id] = key
	}
	return h.Hand(k)
}
