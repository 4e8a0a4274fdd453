package sds

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"maps"
	"slices"
	"strconv"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// maxNames is how many names a stream may ask for. A sidecar asks for one a
	// stream, a gateway for one for each host.
	maxNames = 256
	// maxNameLength is the longest SPIFFE ID, the longest name there is to ask for
	// (SPIFFE-ID §2.3).
	maxNameLength = 2048
	// maxLogged bounds what a client can put into one attribute of a log line.
	maxLogged = 256
)

// subscription is what a stream asked for and what it was sent. It is what the
// two protocols have in common; each stream has one, owned by its pusher.
type subscription struct {
	started  bool // the first request was seen
	proxy    string
	names    map[string]struct{} // what is asked for, perhaps with Wildcard
	held     map[string]*held    // by name
	nonce    uint64              // of the newest response; the first has 1
	answered uint64              // newest nonce that the client acknowledged or refused
}

// held is what the client was told of one name.
type held struct {
	version string
	absent  bool // it was told, or is to find out, that there is none
	again   bool // it must be told anew
	// nonce is of the newest response that carried the resource, zero if the
	// client brought it from an earlier stream.
	nonce uint64
	acked bool // the client acknowledged this version
	// sequence is the trust that the resource stands for, zero if it is no bundle;
	// ackedSequence is the newest one that the client acknowledged.
	sequence, ackedSequence uint64
}

// event is what a request means to the engine.
type event struct {
	ask     bool   // the answer may be another now
	refused bool   // the client refused a response,
	reason  string // for this reason, in its own words, made fit for a log
}

// start takes in what only the first request says.
func (s *subscription) start(node *corev3.Node) {
	s.started = true
	s.names = map[string]struct{}{}
	s.held = map[string]*held{}
	// Envoy sends its node in the first request only when it was told
	// set_node_on_first_message_only.
	s.proxy = loggable(node.GetId())
}

// wanted is the names to ask the source for, ordered.
func (s *subscription) wanted() []string { return slices.Sorted(maps.Keys(s.names)) }

func (s *subscription) from() string { return s.proxy }

// acknowledge and refuse take note of the client's answer to the response n. Only
// the first answer to a response counts, so that a client cannot fill the log with
// refusals of one.
func (s *subscription) acknowledge(n uint64) {
	if n <= s.answered {
		return
	}
	s.answered = n
	for _, h := range s.held {
		if h.nonce == n {
			h.acked, h.ackedSequence = true, h.sequence
		}
	}
}

func (s *subscription) refuse(n uint64, reason string) event {
	if n <= s.answered {
		return event{}
	}
	s.answered = n
	return event{refused: true, reason: loggable(reason)}
}

// compare holds what the source says against what the client has: have is all
// that the client asked for and that exists, ordered by name; fresh is the part
// of it that the client lacks; gone is the names that it has to know do not exist,
// omitted how many of them it asked for. Unless complete, what is missing from rs
// may still exist.
func (s *subscription) compare(rs []Resource, complete bool) (have, fresh []Resource, gone []string, omitted int) {
	_, all := s.names[Wildcard]
	known := make(map[string]struct{}, len(rs))
	for _, r := range rs {
		if _, asked := s.names[r.Name]; !asked && !all {
			continue // a source's mistake must not become a leak
		}
		if _, twice := known[r.Name]; twice {
			continue
		}
		known[r.Name] = struct{}{}
		if r.Body == nil {
			continue
		}
		have = append(have, r)
		if h := s.held[r.Name]; h == nil || h.absent || h.again || h.version != r.Version {
			fresh = append(fresh, r)
		} else {
			h.stands(r)
		}
	}
	byName := func(a, b Resource) int { return strings.Compare(a.Name, b.Name) }
	slices.SortFunc(have, byName)
	slices.SortFunc(fresh, byName)
	if !complete {
		return have, fresh, nil, 0
	}
	for name := range s.names {
		_, ok := known[name]
		if h := s.held[name]; ok || name == Wildcard || h != nil && h.absent && !h.again {
			continue
		}
		s.held[name] = &held{absent: true}
		gone = append(gone, name)
		omitted++
	}
	for name := range s.held {
		_, ok := known[name]
		if _, asked := s.names[name]; ok || asked {
			continue
		}
		// It came with the wildcard and is no more.
		delete(s.held, name)
		gone = append(gone, name)
	}
	slices.Sort(gone)
	return have, fresh, gone, omitted
}

// stands notes that the version that the client has stands for the trust of r too.
func (h *held) stands(r Resource) {
	h.sequence = r.TrustSequence
	if h.acked {
		h.ackedSequence = h.sequence
	}
}

// sent notes that rs go out in the response with the newest nonce.
func (s *subscription) sent(rs []Resource) {
	for _, r := range rs {
		h := s.held[r.Name]
		if h == nil {
			h = &held{}
			s.held[r.Name] = h
		}
		if h.absent || h.again || h.version != r.Version {
			h.acked = false
		}
		h.version, h.absent, h.again, h.nonce = r.Version, false, false, s.nonce
		h.stands(r)
	}
}

// acknowledged is the sequence of trust that the client acknowledged for all the
// bundles that it has; carries is false if it has none.
func (s *subscription) acknowledged() (sequence uint64, carries bool) {
	for _, h := range s.held {
		if h.sequence != 0 && (!carries || h.ackedSequence < sequence) {
			sequence, carries = h.ackedSequence, true
		}
	}
	return sequence, carries
}

// nonceText is the wire form of a nonce.
func nonceText(n uint64) string { return strconv.FormatUint(n, 10) }

// checkType refuses a request for another type than the service's. No type means
// the service's own: it is implicit in the services of a single type.
func checkType(got, want string) error {
	if got != "" && got != want {
		return status.Errorf(codes.InvalidArgument, "type URL is %q; this service serves %s", loggable(got), want)
	}
	return nil
}

// checkNames enforces the limits on what one request names.
func checkNames(names []string) error {
	if len(names) > maxNames {
		return tooMany(len(names))
	}
	for _, n := range names {
		if len(n) > maxNameLength {
			return status.Errorf(codes.InvalidArgument, "a resource name has %d bytes; at most %d are allowed", len(n), maxNameLength)
		}
	}
	return nil
}

func tooMany(n int) error {
	return status.Errorf(codes.InvalidArgument, "the stream asks for %d names; at most %d are allowed", n, maxNames)
}

// contentVersion is the version of a resource with the content parts, which must
// be public.
func contentVersion(parts ...[]byte) string {
	h := sha256.New()
	for _, p := range parts {
		// The length keeps parts apart.
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(p))))
		h.Write(p)
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// versionOf is the version of a response that holds rs.
func versionOf(rs []Resource) string {
	parts := make([][]byte, 0, 2*len(rs))
	for _, r := range rs {
		parts = append(parts, []byte(r.Name), []byte(r.Version))
	}
	return contentVersion(parts...)
}

// loggable makes a client's text fit for a log: short, and without anything that
// could pass for another line or move a cursor.
func loggable(s string) string {
	cut := len(s) > maxLogged
	if cut {
		s = s[:maxLogged]
	}
	s = strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return '\uFFFD'
		}
		return r
	}, s)
	if cut {
		s += "…"
	}
	return s
}
