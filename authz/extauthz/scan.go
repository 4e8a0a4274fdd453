package extauthz

import (
	"encoding/binary"
	"unicode/utf8"

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

// field reads the first field of a message, which is not empty: its tag, that is, its
// number and wire type, what it holds, and what follows it. The tag is 0 where the
// message cannot be read. A field of bytes holds those, another one its bytes on the
// wire.
func field(b []byte) (tag uint64, data, rest []byte) {
	i := 1
	if tag = uint64(b[0]); tag >= 0x80 {
		var n int
		if tag, n = protowire.ConsumeVarint(b); n < 0 {
			return 0, nil, nil
		}
		i = n
	}
	if num := tag >> 3; num == 0 || num > uint64(protowire.MaxValidNumber) {
		return 0, nil, nil
	}
	if tag&7 != bytesField {
		// A group and the like are never what is looked for, so unknown.
		n := protowire.ConsumeFieldValue(protowire.Number(tag>>3), protowire.Type(tag&7), b[i:])
		if n < 0 {
			return 0, nil, nil
		}
		return tag, b[i : i+n], b[i+n:]
	}
	if i >= len(b) {
		return 0, nil, nil
	}
	size := uint64(b[i])
	if i++; size >= 0x80 {
		v, n := protowire.ConsumeVarint(b[i-1:])
		if n < 0 {
			return 0, nil, nil
		}
		size, i = v, i-1+n
	}
	b = b[i:]
	if size > uint64(len(b)) {
		return 0, nil, nil
	}
	return tag, b[:size:size], b[size:]
}

// text sets a field that is a text, if it is UTF-8.
func text(field *[]byte, data []byte) bool {
	*field = data
	return validText(data)
}

// validText is utf8.Valid, faster for what nearly all texts are.
func validText(b []byte) bool { return ascii(b) || utf8.Valid(b) }

// ascii reports whether b has no byte of 0x80 or more. The last word that it looks at
// overlaps the one before.
func ascii(b []byte) bool {
	const high = 0x8080808080808080
	var w uint64
	if len(b) < 8 {
		for _, c := range b {
			w |= uint64(c)
		}
		return w&high == 0
	}
	rest := b
	for ; len(rest) >= 32; rest = rest[32:] {
		w |= binary.LittleEndian.Uint64(rest) | binary.LittleEndian.Uint64(rest[8:]) |
			binary.LittleEndian.Uint64(rest[16:]) | binary.LittleEndian.Uint64(rest[24:])
	}
	for ; len(rest) >= 8; rest = rest[8:] {
		w |= binary.LittleEndian.Uint64(rest)
	}
	return (w|binary.LittleEndian.Uint64(b[len(b)-8:]))&high == 0
}

// scan reads what b says into a, which is empty. It is false where proto.Unmarshal
// would return an error; else a is what take makes of that CheckRequest. Its slices
// share memory with b. Without headers the entries of the map of headers are only
// checked, and read when somebody asks for joinedHeaders.
func (a *attributes) scan(b []byte, headers bool) bool {
	a.skip = !headers
	message := b
	for len(b) > 0 {
		tag, data, rest := field(b)
		ok := tag != 0
		if tag == checkAttributes {
			a.there = true
			ok = a.attributes(data)
		}
		if !ok {
			return false
		}
		b = rest
	}
	if a.skipped {
		a.unread = message
	}
	return true
}

// joinedHeaders are those of the map of headers. It reads what scan did not.
func (a *attributes) joinedHeaders() *pairs {
	if a.unread == nil {
		return &a.joined
	}
	message := a.unread
	a.unread = nil
	within(message, checkAttributes, func(b []byte) {
		within(b, attrRequest, func(b []byte) {
			within(b, requestHTTP, func(b []byte) {
				within(b, httpHeaders, func(b []byte) {
					p, _ := entry(b)
					a.joined.put(p)
				})
			})
		})
	})
	return &a.joined
}

// within calls f with each field of that tag, in a message that has been scanned.
func within(b []byte, wanted uint64, f func([]byte)) {
	for len(b) > 0 {
		tag, data, rest := field(b)
		if tag == wanted {
			f(data)
		}
		b = rest
	}
}

func (a *attributes) attributes(b []byte) bool {
	for len(b) > 0 {
		tag, data, rest := field(b)
		ok := tag != 0
		switch tag {
		case attrSource:
			ok = a.source.scan(data, nil)
		case attrDestination:
			ok = a.destination.scan(data, &a.labels)
		case attrRequest:
			ok = a.request(data)
		case attrExtensions:
			_, ok = entry(data)
		case attrMetadata:
			a.metadataBytes = append(a.metadataBytes, data)
		case attrTLS:
			a.tls = true
			ok = a.session(data)
		case attrRouteMetadata:
			// Nobody reads it.
			ok = new(unpacked).metadata(data, metadataDepth)
		}
		if !ok {
			return false
		}
		b = rest
	}
	return true
}

// unmarshalPart reads a part of a message that lies as deep in it as metadata, on
// top of what m has.
func unmarshalPart(b []byte, m proto.Message) error {
	return proto.UnmarshalOptions{Merge: true, RecursionLimit: metadataDepth}.Unmarshal(b, m)
}

func (a *attributes) session(b []byte) bool {
	for len(b) > 0 {
		tag, data, rest := field(b)
		if tag == 0 || tag == tlsSNI && !text(&a.sni, data) {
			return false
		}
		b = rest
	}
	return true
}

func (p *peerAttributes) scan(b []byte, labels *pairs) bool {
	p.there = true
	for len(b) > 0 {
		tag, data, rest := field(b)
		ok := tag != 0
		switch tag {
		case peerAddress:
			ok = p.address.scan(data)
		case peerService:
			ok = text(&p.service, data)
		case peerLabels:
			var label pair
			if label, ok = entry(data); ok && labels != nil {
				labels.put(label)
			}
		case peerPrincipal:
			ok = text(&p.principal, data)
		case peerCertificate:
			ok = text(&p.certificate, data)
		}
		if !ok {
			return false
		}
		b = rest
	}
	return true
}

// Each kind of address takes the place of another one; one of the same kind is
// merged.
func (a *address) scan(b []byte) bool {
	for len(b) > 0 {
		tag, data, rest := field(b)
		ok := tag != 0
		switch tag {
		case addressSocket:
			a.socket = true
			ok = a.scanSocket(data)
		case addressPipe:
			*a = address{}
			ok = texts(data, pipePath, pipePath)
		case addressInternal:
			*a = address{}
			ok = texts(data, internalServer, internalID)
		}
		if !ok {
			return false
		}
		b = rest
	}
	return true
}

func (a *address) scanSocket(b []byte) bool {
	for len(b) > 0 {
		tag, data, rest := field(b)
		ok := tag != 0
		switch tag {
		case socketAddressField:
			ok = text(&a.ip, data)
		case socketPortValue:
			v, _ := protowire.ConsumeVarint(data)
			a.port = uint32(v)
		case socketNamedPort:
			a.port = 0
			ok = validText(data)
		case socketResolver, socketNetwork:
			ok = validText(data)
		}
		if !ok {
			return false
		}
		b = rest
	}
	return true
}

// texts checks a message of which only those two fields are texts.
func texts(b []byte, one, other uint64) bool {
	for len(b) > 0 {
		tag, data, rest := field(b)
		if tag == 0 || (tag == one || tag == other) && !validText(data) {
			return false
		}
		b = rest
	}
	return true
}

// two is a message of two short fields of bytes with those tags, in that order, as
// nearly all headers are; ok is false for any other.
func two(b []byte, first, second byte) (one, other []byte, ok bool) {
	if len(b) < 4 || b[0] != first || b[1] >= 0x80 {
		return nil, nil, false
	}
	end := 2 + int(b[1])
	if end+2 > len(b) || b[end] != second || b[end+1] >= 0x80 || end+2+int(b[end+1]) != len(b) {
		return nil, nil, false
	}
	return b[2:end:end], b[end+2:], true
}

// entry reads one of a map of texts.
func entry(b []byte) (p pair, ok bool) {
	if k, v, ok := two(b, entryKey, entryValue); ok {
		// Besides k and v b has only tags and lengths below 0x80.
		return pair{k, v}, ascii(b) || utf8.Valid(k) && utf8.Valid(v)
	}
	for len(b) > 0 {
		tag, data, rest := field(b)
		ok := tag != 0
		switch tag {
		case entryKey:
			ok = text(&p.key, data)
		case entryValue:
			ok = text(&p.value, data)
		}
		if !ok {
			return p, false
		}
		b = rest
	}
	return p, true
}

func (a *attributes) request(b []byte) bool {
	for len(b) > 0 {
		tag, data, rest := field(b)
		ok := tag != 0
		switch tag {
		case requestTime:
			ok = texts(data, 0, 0) // two numbers
		case requestHTTP:
			a.http = true
			ok = a.scanHTTP(data)
		}
		if !ok {
			return false
		}
		b = rest
	}
	return true
}

// short is how many bytes at the beginning of b, a part of a message, are entries of
// the map of headers with a key and a value below 128 bytes, in that order, as nearly
// all are; and whether all these bytes are ASCII, of which their tags and lengths are.
func short(b []byte) (n int, plain bool) {
	for i := 0; len(b)-i >= 6 && b[i] == httpHeaders && b[i+1] < 0x80; i = n {
		end := i + 2 + int(b[i+1])
		value := i + 4 + int(b[i+3]) // its tag
		if end > len(b) || b[i+2] != entryKey || value+2 > end ||
			b[value] != entryValue || value+2+int(b[value+1]) != end {
			break
		}
		n = end
	}
	return n, ascii(b[:n])
}

func (a *attributes) scanHTTP(b []byte) bool {
	many := a.skip // whether many entries are checked at once
	for len(b) > 0 {
		if many && b[0] == httpHeaders {
			n, plain := short(b)
			if a.skipped, many = true, plain; plain && n > 0 {
				b = b[n:]
				continue
			}
		}
		tag, data, rest := field(b)
		ok := tag != 0
		switch tag {
		case httpMethod:
			ok = text(&a.method, data)
		case httpPath:
			ok = text(&a.path, data)
		case httpHost:
			ok = text(&a.host, data)
		case httpHeaders:
			var p pair
			p, ok = entry(data)
			switch {
			case a.skip:
				a.skipped = true
			case ok:
				a.joined.put(p)
			}
		case httpMap:
			ok = a.headers(data)
		case httpID, httpScheme, httpQuery, httpFragment, httpProtocol, httpBody:
			ok = validText(data)
		}
		if !ok {
			return false
		}
		b = rest
	}
	return true
}

func (a *attributes) headers(b []byte) bool {
	for len(b) > 0 {
		tag, data, rest := field(b)
		if tag == mapHeaders {
			a.raw = append(a.raw, rawHeader{})
			if !a.raw[len(a.raw)-1].scan(data) {
				return false
			}
		} else if tag == 0 {
			return false
		}
		b = rest
	}
	return true
}

func (h *rawHeader) scan(b []byte) bool {
	if k, v, ok := two(b, headerKey, headerBytes); ok {
		h.key, h.bytes = k, v
		return validText(k)
	}
	for len(b) > 0 {
		tag, data, rest := field(b)
		ok := tag != 0
		switch tag {
		case headerKey:
			ok = text(&h.key, data)
		case headerText:
			ok = text(&h.text, data)
		case headerBytes:
			h.bytes = data
		}
		if !ok {
			return false
		}
		b = rest
	}
	return true
}
