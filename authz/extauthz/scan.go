package extauthz

import (
	"encoding/binary"
	"unicode/utf8"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// The tags of the fields that are read, as they stand on the wire. Fields of the
// messages named here that are missing here are unknown to v1.40 of the API, too.
const (
	bytesField  = 2 // the wire types
	varintField = 0

	checkAttributes = 1<<3 | bytesField

	attrSource        = 1<<3 | bytesField
	attrDestination   = 2<<3 | bytesField
	attrRequest       = 4<<3 | bytesField
	attrExtensions    = 10<<3 | bytesField
	attrMetadata      = 11<<3 | bytesField
	attrTLS           = 12<<3 | bytesField
	attrRouteMetadata = 13<<3 | bytesField

	peerAddress     = 1<<3 | bytesField
	peerService     = 2<<3 | bytesField
	peerLabels      = 3<<3 | bytesField
	peerPrincipal   = 4<<3 | bytesField
	peerCertificate = 5<<3 | bytesField

	addressSocket   = 1<<3 | bytesField
	addressPipe     = 2<<3 | bytesField
	addressInternal = 3<<3 | bytesField

	socketAddressField = 2<<3 | bytesField
	socketPortValue    = 3<<3 | varintField
	socketNamedPort    = 4<<3 | bytesField
	socketResolver     = 5<<3 | bytesField
	socketNetwork      = 7<<3 | bytesField

	pipePath       = 1<<3 | bytesField
	internalServer = 1<<3 | bytesField
	internalID     = 2<<3 | bytesField

	requestTime = 1<<3 | bytesField
	requestHTTP = 2<<3 | bytesField

	httpID       = 1<<3 | bytesField
	httpMethod   = 2<<3 | bytesField
	httpHeaders  = 3<<3 | bytesField
	httpPath     = 4<<3 | bytesField
	httpHost     = 5<<3 | bytesField
	httpScheme   = 6<<3 | bytesField
	httpQuery    = 7<<3 | bytesField
	httpFragment = 8<<3 | bytesField
	httpProtocol = 10<<3 | bytesField
	httpBody     = 11<<3 | bytesField
	httpMap      = 13<<3 | bytesField

	mapHeaders = 1<<3 | bytesField

	headerKey   = 1<<3 | bytesField
	headerText  = 2<<3 | bytesField
	headerBytes = 3<<3 | bytesField

	entryKey   = 1<<3 | bytesField
	entryValue = 2<<3 | bytesField

	tlsSNI = 1<<3 | bytesField
)

// wire goes through the fields of one message.
type wire struct {
	left []byte
	// tag is that of the field: its number and its wire type.
	tag uint64
	// data is what a field of bytes holds, value that of a varint.
	data  []byte
	value uint64
	// bad says that the message cannot be read.
	bad bool
}

// next reads a field. It is false at the end, and where the message is bad.
func (w *wire) next() bool {
	b := w.left
	if len(b) == 0 {
		return false
	}
	if b[0] < 0x80 {
		w.tag, b = uint64(b[0]), b[1:]
	} else if v, n := protowire.ConsumeVarint(b); n > 0 {
		w.tag, b = v, b[n:]
	} else {
		w.bad = true
		return false
	}
	if num := w.tag >> 3; num == 0 || num > uint64(protowire.MaxValidNumber) {
		w.bad = true
		return false
	}
	switch w.tag & 7 {
	case bytesField:
		var size uint64
		if len(b) > 0 && b[0] < 0x80 {
			size, b = uint64(b[0]), b[1:]
		} else if v, n := protowire.ConsumeVarint(b); n > 0 {
			size, b = v, b[n:]
		} else {
			w.bad = true
			return false
		}
		if size > uint64(len(b)) {
			w.bad = true
			return false
		}
		w.data, w.left = b[:size:size], b[size:]
		return true
	case varintField:
		if v, n := protowire.ConsumeVarint(b); n > 0 {
			w.value, w.left = v, b[n:]
			return true
		}
	default:
		// Nothing of what is read is of these types, so it is unknown: a group, say.
		if n := protowire.ConsumeFieldValue(protowire.Number(w.tag>>3), protowire.Type(w.tag&7), b); n >= 0 {
			w.left = b[n:]
			return true
		}
	}
	w.bad = true
	return false
}

// text is the field as a string, which must be UTF-8.
func (w *wire) text() []byte {
	if !validText(w.data) {
		w.bad, w.left = true, nil
	}
	return w.data
}

// validText is utf8.Valid, faster for what nearly all texts are.
func validText(b []byte) bool {
	const high = 0x8080808080808080
	i := 0
	for ; i+8 <= len(b); i += 8 {
		if binary.LittleEndian.Uint64(b[i:])&high != 0 {
			return utf8.Valid(b[i:])
		}
	}
	for ; i < len(b); i++ {
		if b[i] >= utf8.RuneSelf {
			return utf8.Valid(b[i:])
		}
	}
	return true
}

// scan reads what b says into a, which is empty. It is false where proto.Unmarshal
// would return an error; else a is what read makes of that CheckRequest. Its slices
// share memory with b.
func (a *attributes) scan(b []byte) bool {
	w := wire{left: b}
	for w.next() {
		if w.tag == checkAttributes {
			a.there = true
			if !a.attributes(w.data) {
				return false
			}
		}
	}
	return !w.bad
}

func (a *attributes) attributes(b []byte) bool {
	w := wire{left: b}
	for w.next() {
		ok := true
		switch w.tag {
		case attrSource:
			ok = a.source.scan(w.data, nil)
		case attrDestination:
			ok = a.destination.scan(w.data, &a.labels)
		case attrRequest:
			ok = a.request(w.data)
		case attrExtensions:
			_, ok = entry(w.data)
		case attrMetadata:
			a.metadataBytes = append(a.metadataBytes, w.data)
		case attrTLS:
			a.tls = true
			ok = a.session(w.data)
		case attrRouteMetadata:
			// Nobody reads it.
			ok = unmarshalPart(w.data, new(corev3.Metadata)) == nil
		}
		if !ok {
			return false
		}
	}
	return !w.bad
}

// unmarshalPart reads a part of a message that lies as deep in it as metadata, on
// top of what m has.
func unmarshalPart(b []byte, m proto.Message) error {
	return proto.UnmarshalOptions{Merge: true, RecursionLimit: protowire.DefaultRecursionLimit - 2}.Unmarshal(b, m)
}

func (a *attributes) session(b []byte) bool {
	w := wire{left: b}
	for w.next() {
		if w.tag == tlsSNI {
			a.sni = w.text()
		}
	}
	return !w.bad
}

func (p *peerAttributes) scan(b []byte, labels *pairs) bool {
	p.there = true
	w := wire{left: b}
	for w.next() {
		switch w.tag {
		case peerAddress:
			if !p.address.scan(w.data) {
				return false
			}
		case peerService:
			p.service = w.text()
		case peerLabels:
			label, ok := entry(w.data)
			if !ok {
				return false
			}
			if labels != nil {
				labels.put(label)
			}
		case peerPrincipal:
			p.principal = w.text()
		case peerCertificate:
			p.certificate = w.text()
		}
	}
	return !w.bad
}

// Each kind of address takes the place of another one; one of the same kind is
// merged.
func (a *address) scan(b []byte) bool {
	w := wire{left: b}
	for w.next() {
		ok := true
		switch w.tag {
		case addressSocket:
			a.socket = true
			ok = a.scanSocket(w.data)
		case addressPipe:
			*a = address{}
			ok = texts(w.data, pipePath, pipePath)
		case addressInternal:
			*a = address{}
			ok = texts(w.data, internalServer, internalID)
		}
		if !ok {
			return false
		}
	}
	return !w.bad
}

func (a *address) scanSocket(b []byte) bool {
	w := wire{left: b}
	for w.next() {
		switch w.tag {
		case socketAddressField:
			a.ip = w.text()
		case socketPortValue:
			a.port = uint32(w.value)
		case socketNamedPort:
			w.text()
			a.port = 0
		case socketResolver, socketNetwork:
			w.text()
		}
	}
	return !w.bad
}

// texts checks a message of which only those two fields are texts.
func texts(b []byte, one, other uint64) bool {
	w := wire{left: b}
	for w.next() {
		if w.tag == one || w.tag == other {
			w.text()
		}
	}
	return !w.bad
}

// entry reads one of a map of texts.
func entry(b []byte) (p pair, ok bool) {
	w := wire{left: b}
	for w.next() {
		switch w.tag {
		case entryKey:
			p.key = w.text()
		case entryValue:
			p.value = w.text()
		}
	}
	return p, !w.bad
}

func (a *attributes) request(b []byte) bool {
	w := wire{left: b}
	for w.next() {
		ok := true
		switch w.tag {
		case requestTime:
			ok = texts(w.data, 0, 0) // two numbers
		case requestHTTP:
			a.http = true
			ok = a.scanHTTP(w.data)
		}
		if !ok {
			return false
		}
	}
	return !w.bad
}

func (a *attributes) scanHTTP(b []byte) bool {
	w := wire{left: b}
	for w.next() {
		switch w.tag {
		case httpMethod:
			a.method = w.text()
		case httpPath:
			a.path = w.text()
		case httpHost:
			a.host = w.text()
		case httpHeaders:
			p, ok := entry(w.data)
			if !ok {
				return false
			}
			a.joined.put(p)
		case httpMap:
			if !a.headers(w.data) {
				return false
			}
		case httpID, httpScheme, httpQuery, httpFragment, httpProtocol, httpBody:
			w.text()
		}
	}
	return !w.bad
}

func (a *attributes) headers(b []byte) bool {
	w := wire{left: b}
	for w.next() {
		if w.tag != mapHeaders {
			continue
		}
		var h rawHeader
		f := wire{left: w.data}
		for f.next() {
			switch f.tag {
			case headerKey:
				h.key = f.text()
			case headerText:
				h.text = f.text()
			case headerBytes:
				h.bytes = f.data
			}
		}
		if f.bad {
			return false
		}
		a.raw = append(a.raw, h)
	}
	return !w.bad
}
