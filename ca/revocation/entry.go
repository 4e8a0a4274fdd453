package revocation

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/signet-mesh/signet/storage"
)

// Prefix is what the keys of entries in the store begin with.
const Prefix = "revoked/"

// version is that of an entry's format.
const version = 1

// Limits of an entry.
const (
	maxSerial  = 20 // RFC 5280 section 4.1.2.2
	MaxComment = 500
)

// Reason is a CRLReason of RFC 5280 section 5.3.1.
type Reason uint8

// reasons are those that are taken. A hold can be withdrawn, which nothing here does.
var reasons = map[Reason]string{
	0: "unspecified", 1: "keyCompromise", 2: "cACompromise", 3: "affiliationChanged",
	4: "superseded", 5: "cessationOfOperation", 9: "privilegeWithdrawn", 10: "aACompromise",
}

// Reasons are the names that ParseReason takes, in the order of their numbers.
func Reasons() (names []string) {
	for r := range Reason(11) {
		if name, ok := reasons[r]; ok {
			names = append(names, name)
		}
	}
	return names
}

// ParseReason is the reason of a name, in the spelling of RFC 5280.
func ParseReason(name string) (Reason, error) {
	for r, n := range reasons {
		if n == name {
			return r, nil
		}
	}
	return 0, fmt.Errorf("%q is not a reason to revoke a certificate: one of %s", name, strings.Join(Reasons(), ", "))
}

// Valid reports whether a reason is one that is taken.
func (r Reason) Valid() bool { return reasons[r] != "" }

// String is the reason's name in RFC 5280.
func (r Reason) String() string {
	if name, ok := reasons[r]; ok {
		return name
	}
	return fmt.Sprintf("reason %d", uint8(r))
}

// Entry is a certificate that was revoked.
type Entry struct {
	Version int `json:"version"`
	// Serial is the certificate's, big-endian.
	Serial []byte `json:"serial"`
	// SPIFFEID is whose it was.
	SPIFFEID string `json:"spiffeID"`
	// Authority is the subject key identifier of its issuer, whose list has it.
	Authority []byte `json:"authority"`
	Reason    Reason `json:"reason"`
	// Comment is the operator's own words, By who asked.
	Comment string `json:"comment,omitempty"`
	By      string `json:"by"`
	// Revoked is when, Until when the certificate expires.
	Revoked time.Time `json:"revoked"`
	Until   time.Time `json:"until"`
}

// Key is where the entry of a serial is stored.
func Key(serial []byte) string { return Prefix + hex.EncodeToString(serial) }

// Encode is the entry as it is stored.
func (e Entry) Encode() ([]byte, error) {
	e.Version = version
	if err := e.check(); err != nil {
		return nil, fmt.Errorf("recording the revocation of %x: %w", e.Serial, err)
	}
	return json.Marshal(e)
}

func (e Entry) check() error {
	switch {
	case len(e.Serial) == 0 || len(e.Serial) > maxSerial:
		return fmt.Errorf("a serial of %d bytes", len(e.Serial))
	case len(e.Authority) == 0:
		return errors.New("its issuer is missing")
	case !e.Reason.Valid():
		return fmt.Errorf("%v is not one that is taken", e.Reason)
	case len(e.Comment) > MaxComment:
		return fmt.Errorf("a comment of %d bytes; at most %d are allowed", len(e.Comment), MaxComment)
	case e.Revoked.IsZero() || e.Until.IsZero():
		return errors.New("its times are missing")
	}
	return nil
}

// Parse reads an entry of the store.
func Parse(s storage.Entry) (Entry, error) {
	e, _, err := storage.ParseVersioned(s.Value, version, func(e Entry) int { return e.Version })
	switch {
	case err != nil:
	case s.Key != Key(e.Serial):
		err = errors.New("it is of another serial")
	default:
		err = e.check()
	}
	if err != nil {
		return Entry{}, fmt.Errorf("reading revocation %s: %w", strings.TrimPrefix(s.Key, Prefix), err)
	}
	return e, nil
}

// Set is what was revoked, by serial. It is not changed; a change is another Set.
type Set map[string]Entry

// With is the set with an entry more.
func (s Set) With(es ...Entry) Set {
	out := make(Set, len(s)+len(es))
	maps.Copy(out, s)
	for _, e := range es {
		out[string(e.Serial)] = e
	}
	return out
}

// Has reports whether a serial was revoked.
func (s Set) Has(serial []byte) bool {
	_, ok := s[string(serial)]
	return ok
}

// Sorted are the entries in the order in which they were revoked.
func (s Set) Sorted() []Entry {
	out := make([]Entry, 0, len(s))
	for _, e := range s {
		out = append(out, e)
	}
	slices.SortFunc(out, func(a, b Entry) int {
		if c := a.Revoked.Compare(b.Revoked); c != 0 {
			return c
		}
		return strings.Compare(string(a.Serial), string(b.Serial))
	})
	return out
}

// Split parts the set in what is still said at now and what need not be said any
// more: the certificate has expired, and a list of after that has had it.
func (s Set) Split(now time.Time, lifetime time.Duration) (said Set, over []Entry) {
	said = make(Set, len(s))
	for k, e := range s {
		if now.Sub(e.Until) > lifetime {
			over = append(over, e)
		} else {
			said[k] = e
		}
	}
	return said, over
}
