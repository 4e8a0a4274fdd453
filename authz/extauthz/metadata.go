package extauthz

import (
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
)

const (
	// maxMetadataBytes and maxMetadataValues bound the metadata that policies have
	// read: a check with more is denied. Envoy takes 60 KiB of headers, so a token has
	// less; two bytes of metadata can be a value that takes a hundred.
	maxMetadataBytes, maxMetadataValues = 64 << 10, 8 << 10
	// valueWeight is about what a value takes in memory, in bytes, beside its text.
	valueWeight = 150
)

// The tags of metadata, as they stand on the wire.
const (
	metadataFilter = 1<<3 | bytesField
	metadataTyped  = 2<<3 | bytesField

	anyURL = 1<<3 | bytesField

	structFields = 1<<3 | bytesField
	listValues   = 1<<3 | bytesField

	valueText   = 3<<3 | bytesField
	valueStruct = 5<<3 | bytesField
	valueList   = 6<<3 | bytesField
)

// metadataDepth is how deep what lies in metadata may be nested: the limit of the
// generated decoder, of which the messages around it take two.
const metadataDepth = protowire.DefaultRecursionLimit - 2

// unpacked is what decoding metadata would make. Its methods check a message as the
// generated decoder does, and allocate nothing. depth is how deep it may be nested.
type unpacked struct{ bytes, values int }

// weight is about how much memory it takes.
func (u *unpacked) weight() int { return u.bytes + u.values*valueWeight }

// metadata reports whether b is an envoy.config.core.v3.Metadata.
func (u *unpacked) metadata(b []byte, depth int) bool {
	u.bytes += len(b)
	if depth--; depth < 0 {
		return false
	}
	for len(b) > 0 {
		tag, data, rest := field(b)
		ok := tag != 0
		switch tag {
		case metadataFilter:
			ok = u.entry(data, depth, (*unpacked).structure)
		case metadataTyped:
			ok = u.entry(data, depth, (*unpacked).any)
		}
		if !ok {
			return false
		}
		b = rest
	}
	return true
}

// entry checks an entry of a map of messages.
func (u *unpacked) entry(b []byte, depth int, message func(*unpacked, []byte, int) bool) bool {
	u.values++
	if depth--; depth < 0 {
		return false
	}
	for len(b) > 0 {
		tag, data, rest := field(b)
		ok := tag != 0
		switch tag {
		case entryKey:
			ok = validText(data)
		case entryValue:
			ok = message(u, data, depth)
		}
		if !ok {
			return false
		}
		b = rest
	}
	return true
}

func (u *unpacked) any(b []byte, depth int) bool { return depth > 0 && texts(b, anyURL, anyURL) }

func (u *unpacked) structure(b []byte, depth int) bool {
	if depth--; depth < 0 {
		return false
	}
	for len(b) > 0 {
		tag, data, rest := field(b)
		if tag == 0 || tag == structFields && !u.entry(data, depth, (*unpacked).value) {
			return false
		}
		b = rest
	}
	return true
}

func (u *unpacked) value(b []byte, depth int) bool {
	if depth--; depth < 0 {
		return false
	}
	for len(b) > 0 {
		tag, data, rest := field(b)
		ok := tag != 0
		switch tag {
		case valueText:
			ok = validText(data)
		case valueStruct:
			ok = u.structure(data, depth)
		case valueList:
			ok = u.list(data, depth)
		}
		if !ok {
			return false
		}
		b = rest
	}
	return true
}

func (u *unpacked) list(b []byte, depth int) bool {
	if depth--; depth < 0 {
		return false
	}
	for len(b) > 0 {
		tag, data, rest := field(b)
		if tag == listValues {
			u.values++
		}
		if tag == 0 || tag == listValues && !u.value(data, depth) {
			return false
		}
		b = rest
	}
	return true
}

// parts makes the metadata that parts describe, one after the other; nil where nobody
// wants it. Nothing is allocated before it is known how much it is.
func (rd *reader) parts(parts [][]byte, wanted bool) (map[string]*structpb.Struct, error) {
	if len(parts) == 0 {
		return nil, nil // and what is below allocates
	}
	// One message is like many others: of requests with the same token.
	if wanted && len(parts) == 1 {
		if m, ok := rd.metadata.get(textOf(parts[0])); ok {
			return m, nil
		}
	}
	var u unpacked
	for _, b := range parts {
		if !u.metadata(b, metadataDepth) {
			return nil, errMessage
		}
	}
	switch {
	case !wanted:
		return nil, nil
	case u.bytes > maxMetadataBytes || u.values > maxMetadataValues:
		return nil, errMetadata
	}
	var m corev3.Metadata
	for _, b := range parts {
		if unmarshalPart(b, &m) != nil {
			return nil, errMessage
		}
	}
	if len(parts) == 1 {
		rd.metadata.put(textOf(parts[0]), m.GetFilterMetadata(), u.weight())
	}
	return m.GetFilterMetadata(), nil
}

// readMetadata reads the metadata of filters, where it is needed.
func (rd *reader) readMetadata(a *attributes, needed authz.Field, into *authz.Request) (err error) {
	wanted := needed&(authz.FieldClaims|authz.FieldMetadata) != 0
	if a.metadata == nil {
		into.Metadata, err = rd.parts(a.metadataBytes, wanted)
		return err
	}
	if !wanted {
		return nil
	}
	if proto.Size(a.metadata) > maxMetadataValues { // else it cannot be too much
		b, err := proto.Marshal(a.metadata)
		var u unpacked
		if err != nil || !u.metadata(b, metadataDepth) {
			return errMessage
		}
		if u.bytes > maxMetadataBytes || u.values > maxMetadataValues {
			return errMetadata
		}
	}
	into.Metadata = a.metadata.GetFilterMetadata()
	return nil
}

// errMetadata says that there is more than any token has. What to do is for the log of
// the agent.
var errMetadata = malformed("its metadata has more than 64 KiB or more than 8192 values; have the proxy send what policies read only (metadata_context_namespaces)")
