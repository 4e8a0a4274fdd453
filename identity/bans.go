package identity

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// BanKind is what a ban is about.
type BanKind uint8

const (
	// BanID is one SPIFFE ID.
	BanID BanKind = iota + 1
	// BanBelow is a SPIFFE ID and all whose paths continue it by whole segments.
	BanBelow
	// BanSerial is one certificate.
	BanSerial
	// BanNode is a node: its agent, and every certificate that was issued for its pods.
	BanNode
	// BanEverybody stands for a ban that this build cannot read. Nothing is known of
	// whom it means, so it means everybody. No operator can ask for one.
	BanEverybody
)

// Limits of a ban.
const (
	maxBanSegments = 32
	maxBanSerial   = 20 // RFC 5280 section 4.1.2.2
)

// BanSubject is whom a ban refuses. It is comparable; the zero value is nobody.
type BanSubject struct {
	kind  BanKind
	value string // an ID, a serial without leading zero bytes, or the name of a node
}

// IDs begin so, and the other subjects as the constants after it.
const (
	idScheme     = "spiffe://"
	serialPrefix = "serial/"
	nodePrefix   = "node/"
	belowSuffix  = "/*"
)

// Everybody is the subject of [BanEverybody].
func Everybody() BanSubject { return BanSubject{kind: BanEverybody} }

// ParseBanSubject reads spiffe://TRUSTDOMAIN/PATH, spiffe://TRUSTDOMAIN/PATH/*,
// serial/HEX or node/NAME.
func ParseBanSubject(s string) (BanSubject, error) {
	switch {
	case strings.HasPrefix(s, idScheme):
		text, below := strings.CutSuffix(s, belowSuffix)
		id, err := ParseID(text)
		if err != nil {
			return BanSubject{}, fmt.Errorf("%.100q: %w", s, err)
		}
		if n := strings.Count(id.Path(), "/"); n > maxBanSegments {
			return BanSubject{}, fmt.Errorf("%.100q: a path of %d segments; at most %d are allowed", s, n, maxBanSegments)
		}
		if below {
			return BanSubject{BanBelow, id.String()}, nil
		}
		if id.Path() == "" {
			return BanSubject{}, fmt.Errorf("%.100q is a trust domain, which nobody has as a name: write %s/* for all of it", s, text)
		}
		return BanSubject{BanID, id.String()}, nil
	case strings.HasPrefix(s, serialPrefix):
		digits := strings.ReplaceAll(s[len(serialPrefix):], ":", "")
		if len(digits)%2 == 1 {
			digits = "0" + digits // a number, as some print it
		}
		b, err := hex.DecodeString(digits)
		if err != nil || len(b) > maxBanSerial {
			return BanSubject{}, fmt.Errorf("%.100q: not a serial in hexadecimal, of at most %d bytes", s, maxBanSerial)
		}
		if b = bytes.TrimLeft(b, "\x00"); len(b) == 0 {
			return BanSubject{}, fmt.Errorf("%.100q: a serial is not zero", s)
		}
		return BanSubject{BanSerial, string(b)}, nil
	case strings.HasPrefix(s, nodePrefix):
		name := s[len(nodePrefix):]
		// A node is what an agent's name can have as its last segment.
		if _, err := AgentID(spiffeid.RequireTrustDomainFromString("node"), name); err != nil {
			return BanSubject{}, fmt.Errorf("%.100q: not the name of a node", s)
		}
		return BanSubject{BanNode, name}, nil
	}
	return BanSubject{}, fmt.Errorf("%.100q is nothing that can be banned: write spiffe://TRUSTDOMAIN/PATH, spiffe://TRUSTDOMAIN/PATH/*, serial/HEX or node/NAME", s)
}

// Kind is what the subject is.
func (s BanSubject) Kind() BanKind { return s.kind }

// IsZero reports whether s is nobody.
func (s BanSubject) IsZero() bool { return s.kind == 0 }

// ID is the SPIFFE ID of BanID and BanBelow, without the star; else empty.
func (s BanSubject) ID() string {
	if s.kind == BanID || s.kind == BanBelow {
		return s.value
	}
	return ""
}

// Serial is that of BanSerial, big-endian without leading zero bytes; else nil.
func (s BanSubject) Serial() []byte {
	if s.kind == BanSerial {
		return []byte(s.value)
	}
	return nil
}

// Node is the name of BanNode's node; else empty.
func (s BanSubject) Node() string {
	if s.kind == BanNode {
		return s.value
	}
	return ""
}

// String is the subject as ParseBanSubject reads it, by which a ban is called;
// "everybody" for a ban that cannot be read.
func (s BanSubject) String() string {
	switch s.kind {
	case BanID:
		return s.value
	case BanBelow:
		return s.value + belowSuffix
	case BanSerial:
		return serialPrefix + hex.EncodeToString([]byte(s.value))
	case BanNode:
		return nodePrefix + s.value
	case BanEverybody:
		return "everybody"
	}
	return ""
}

// Ban refuses a subject until it ends or is removed.
type Ban struct {
	Subject BanSubject
	// Until is when it ends; zero: when somebody removes it.
	Until time.Time
	// Reason is the operator's words.
	Reason string
	// Serials are, of a node, those of the certificates that were issued for its pods
	// and had not expired, big-endian.
	Serials [][]byte
}

// Bans are the bans in force at one moment. They are immutable and safe for
// concurrent use; nil is none. Each look-up takes as long with many as with one.
type Bans struct {
	list []Ban // by the subject's text
	// What they are found by: SPIFFE IDs, what is above banned ones, nodes, and
	// serials without leading zero bytes.
	ids, above, nodes, serials map[string]*Ban
	// segments is the longest path of above.
	segments  int
	everybody *Ban
}

// NewBans makes the set of a list, of which no two have the same subject; nil if it is
// empty. Bans of nobody are left out.
func NewBans(list []Ban) *Bans {
	b := &Bans{ids: map[string]*Ban{}, above: map[string]*Ban{}, nodes: map[string]*Ban{}, serials: map[string]*Ban{}}
	for _, ban := range list {
		if !ban.Subject.IsZero() {
			b.list = append(b.list, ban)
		}
	}
	if len(b.list) == 0 {
		return nil
	}
	slices.SortFunc(b.list, func(x, y Ban) int { return strings.Compare(x.Subject.String(), y.Subject.String()) })
	for i := range b.list {
		ban := &b.list[i]
		switch s := ban.Subject; s.kind {
		case BanID:
			b.ids[s.value] = ban
		case BanBelow:
			b.above[s.value] = ban
			b.segments = max(b.segments, strings.Count(s.value[len(idScheme):], "/"))
		case BanNode:
			b.nodes[s.value] = ban
			for _, serial := range ban.Serials {
				if serial = bytes.TrimLeft(serial, "\x00"); b.serials[string(serial)] == nil {
					b.serials[string(serial)] = ban
				}
			}
		case BanEverybody:
			b.everybody = ban
		}
	}
	// A serial by itself is named rather than its node.
	for i := range b.list {
		if s := b.list[i].Subject; s.kind == BanSerial {
			b.serials[s.value] = &b.list[i]
		}
	}
	return b
}

// Equal reports whether two sets are of the same bans.
func (b *Bans) Equal(other *Bans) bool {
	return slices.EqualFunc(b.All(), other.All(), func(x, y Ban) bool {
		return x.Subject == y.Subject && x.Until.Equal(y.Until) && x.Reason == y.Reason && slices.EqualFunc(x.Serials, y.Serials, bytes.Equal)
	})
}

// Len is how many there are.
func (b *Bans) Len() int {
	if b == nil {
		return 0
	}
	return len(b.list)
}

// All are the bans, in the order of their subjects. They must not be changed.
func (b *Bans) All() []Ban {
	if b == nil {
		return nil
	}
	return b.list
}

// Everybody is the ban of everybody, or nil.
func (b *Bans) Everybody() *Ban {
	if b == nil {
		return nil
	}
	return b.everybody
}

// Names is a ban of a SPIFFE ID, of any, or nil if there is none.
func (b *Bans) Names() *Ban {
	if b == nil || len(b.ids)+len(b.above) == 0 {
		return nil
	}
	for i := range b.list {
		if b.list[i].Subject.ID() != "" {
			return &b.list[i]
		}
	}
	return nil
}

// ID is the ban of a SPIFFE ID, the narrowest if there are several, or nil. It does
// not allocate.
func (b *Bans) ID(id []byte) *Ban {
	if b == nil || len(b.ids)+len(b.above) == 0 {
		return nil
	}
	if ban := b.ids[string(id)]; ban != nil {
		return ban
	}
	if len(b.above) == 0 || len(id) < len(idScheme) || len(id) > maxIDLength {
		return nil
	}
	var found *Ban
	segment := 0
	for i := len(idScheme); i <= len(id); i++ {
		if i < len(id) && id[i] != '/' {
			continue
		}
		if ban := b.above[string(id[:i])]; ban != nil {
			found = ban
		}
		if segment++; segment > b.segments {
			break
		}
	}
	return found
}

// Serial is the ban of a certificate, or nil. Leading zero bytes do not count. It
// does not allocate.
func (b *Bans) Serial(serial []byte) *Ban {
	if b == nil || len(b.serials) == 0 {
		return nil
	}
	return b.serials[string(bytes.TrimLeft(serial, "\x00"))]
}

// Node is the ban of a node, or nil.
func (b *Bans) Node(name string) *Ban {
	if b == nil {
		return nil
	}
	return b.nodes[name]
}

// At are those that are in force at now; b itself if all are. next is when the first
// of them ends, zero if none does.
func (b *Bans) At(now time.Time) (in *Bans, next time.Time) {
	var left []Ban
	for _, ban := range b.All() {
		if !ban.Until.IsZero() {
			if !now.Before(ban.Until) {
				continue
			}
			if next.IsZero() || ban.Until.Before(next) {
				next = ban.Until
			}
		}
		left = append(left, ban)
	}
	if len(left) == b.Len() {
		return b, next
	}
	return NewBans(left), next
}
