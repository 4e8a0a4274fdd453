package revocation

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/storage"
)

// What the keys of bans in the store begin with, and those of the serials of nodes.
const (
	BanPrefix     = "bans/"
	SerialsPrefix = "ban-serials/"
)

// BanStore is what each key begins with that has to do with bans.
const BanStore = "ban"

// Versions of the two formats.
const (
	banVersion     = 1
	serialsVersion = 1
)

// MaxSerials is how many serials one entry of the store has.
const MaxSerials = 16 << 10

// Ban is what is remembered of a ban, also after it has ended.
type Ban struct {
	Version int `json:"version"`
	// Subject is whom it means, as identity.ParseBanSubject reads it.
	Subject string `json:"subject"`
	// Reason is the operator's own words, By who asked, At when.
	Reason string    `json:"reason"`
	By     string    `json:"by"`
	At     time.Time `json:"at"`
	// Until is when it ends; zero: when it is removed.
	Until time.Time `json:"until,omitzero"`
	// SPIFFEID is whose the certificate is, where that is known.
	SPIFFEID string `json:"spiffeID,omitempty"`
	// Ended is set once it is not in force any more.
	Ended *BanEnd `json:"ended,omitempty"`
	// Logged says that the issuance log has the decision that led to this.
	Logged bool `json:"logged"`

	rest storage.Rest // a changed copy of a ban keeps it
}

// BanEnd is how a ban ended.
type BanEnd struct {
	Reason string    `json:"reason"`
	By     string    `json:"by"`
	At     time.Time `json:"at"`
}

// banHash tells subjects apart, which are longer than keys can be.
func banHash(subject string) string {
	sum := sha256.Sum256([]byte(subject))
	return hex.EncodeToString(sum[:16])
}

// BanKey is where the ban of a subject is stored.
func BanKey(subject string) string { return BanPrefix + banHash(subject) }

// SerialsKey is where a part of the serials of a node's ban is stored, which an
// instance has issued.
func SerialsKey(subject string, instance uint8, part int) string {
	return fmt.Sprintf("%s%03d/%04d", SerialsOf(subject), instance, part)
}

// SerialsOf is what the keys of the serials of a node's ban begin with.
func SerialsOf(subject string) string { return SerialsPrefix + banHash(subject) + "/" }

// Encode is the ban as it is stored.
func (b Ban) Encode() ([]byte, error) {
	b.Version = banVersion
	if err := b.check(); err != nil {
		return nil, fmt.Errorf("recording the ban of %.100q: %w", b.Subject, err)
	}
	return storage.EncodeRecord(b, b.rest)
}

func (b Ban) check() error {
	s, err := identity.ParseBanSubject(b.Subject)
	switch {
	case err != nil:
		return err
	case s.String() != b.Subject:
		return fmt.Errorf("the subject is not written as %s", s)
	case b.Reason == "" || len(b.Reason) > MaxComment || b.Ended != nil && (b.Ended.Reason == "" || len(b.Ended.Reason) > MaxComment):
		return fmt.Errorf("a reason has 1 to %d bytes", MaxComment)
	case b.At.IsZero() || b.Ended != nil && b.Ended.At.IsZero():
		return errors.New("its time is missing")
	}
	return nil
}

// ParseBan reads a ban of the store.
func ParseBan(s storage.Entry) (Ban, error) {
	b, rest, err := storage.ParseVersioned(s.Value, banVersion, func(b Ban) int { return b.Version })
	switch {
	case err != nil:
	case s.Key != BanKey(b.Subject):
		err = errors.New("it is of another subject")
	default:
		err = b.check()
	}
	if err != nil {
		return Ban{}, fmt.Errorf("reading ban %s: %w", strings.TrimPrefix(s.Key, BanPrefix), err)
	}
	b.rest = rest
	return b, nil
}

// Serial is a certificate that a node's ban means.
type Serial struct {
	Serial [17]byte
	// Until is when it expires.
	Until time.Time
}

// serialSize is that of a Serial as it is stored: the serial and Unix seconds.
const serialSize = 17 + 8

// EncodeSerials is a part of them, at most MaxSerials, as it is stored.
func EncodeSerials(list []Serial) []byte {
	b := make([]byte, 1, 1+len(list)*serialSize)
	b[0] = serialsVersion
	for _, s := range list {
		b = append(b, s.Serial[:]...)
		b = binary.BigEndian.AppendUint64(b, uint64(s.Until.Unix()))
	}
	return b
}

// ParseSerials reads a part of the store.
func ParseSerials(e storage.Entry) ([]Serial, error) {
	v := e.Value
	switch {
	case len(v) > 0 && v[0] > serialsVersion:
		return nil, fmt.Errorf("reading serials %s: %w: version %d, this build reads up to %d", e.Key, storage.ErrNewerFormat, v[0], serialsVersion)
	case len(v) == 0 || v[0] == 0 || (len(v)-1)%serialSize != 0:
		return nil, fmt.Errorf("reading serials %s: %d bytes are none", e.Key, len(v))
	}
	var out []Serial
	for v = v[1:]; len(v) > 0; v = v[serialSize:] {
		out = append(out, Serial{[17]byte(v), time.Unix(int64(binary.BigEndian.Uint64(v[17:])), 0).UTC()})
	}
	return out, nil
}
