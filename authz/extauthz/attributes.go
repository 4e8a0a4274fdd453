package extauthz

import (
	"slices"
	"unsafe"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
)

// attributes are what a CheckRequest says, as far as anybody reads it. scan takes
// them from bytes and take from a message.
type attributes struct {
	there               bool // false: there is nothing at all
	source, destination peerAttributes
	labels              pairs // of the destination
	http                bool  // false: a connection
	method, path, host  []byte
	raw                 []rawHeader // header_map
	joined              pairs       // headers, once joinedHeaders was called
	skip, skipped       bool        // whether scan only checks headers, and whether it did
	unread              []byte      // the message that has headers which were only checked; nil: none
	tls                 bool
	sni                 []byte
	// The metadata is in one of these. Several parts are one message, one after
	// the other.
	metadata      *corev3.Metadata
	metadataBytes [][]byte
}

type peerAttributes struct {
	there                           bool
	address                         address
	service, principal, certificate []byte
}

// address is a socket address, or one of another kind.
type address struct {
	socket bool
	ip     []byte
	port   uint32 // 0: none, or one with a name
}

// rawHeader has its value in one of two fields; empty is not there.
type rawHeader struct{ key, text, bytes []byte }

// value is that of the header; ok is false if it has two.
func (h *rawHeader) value() (v []byte, ok bool) {
	switch {
	case len(h.bytes) == 0 && h.text == nil:
		return []byte{}, true
	case len(h.bytes) == 0:
		return h.text, true
	}
	return h.bytes, len(h.text) == 0
}

// pair is an entry of a map.
type pair struct{ key, value []byte }

// pairs is a map of few entries, each key once, in no order that matters.
type pairs struct {
	list []pair
	// seen has a bit for each key, which others share.
	seen uint64
	// index is where the keys are, where there are many.
	index map[string]int
}

// manyPairs is from how many on there is an index, so that a message of many
// short entries takes no longer than others of its size.
const manyPairs = 64

// put adds p, or takes the place of the one with its key.
func (ps *pairs) put(p pair) {
	bit := uint64(1) << (pairHash(p.key) & 63)
	if ps.seen&bit != 0 {
		if i, ok := ps.find(p.key); ok {
			ps.list[i].value = p.value
			return
		}
	}
	ps.seen |= bit
	if ps.index != nil {
		ps.index[string(p.key)] = len(ps.list)
	}
	ps.list = append(ps.list, p)
}

// pairHash tells the keys of most maps apart.
func pairHash(k []byte) (h uint64) {
	if n := len(k); n > 0 {
		h = uint64(n) + uint64(k[0])*7 + uint64(k[n-1])*31 + uint64(k[n/2])*131
	}
	return h * 0x9e3779b97f4a7c15 >> 58
}

func (ps *pairs) find(key []byte) (i int, ok bool) {
	if len(ps.list) >= manyPairs {
		if ps.index == nil {
			ps.index = make(map[string]int, 2*len(ps.list))
			for i := range ps.list {
				ps.index[string(ps.list[i].key)] = i
			}
		}
		i, ok = ps.index[string(key)]
		return i, ok
	}
	for i := range ps.list {
		if string(ps.list[i].key) == string(key) {
			return i, true
		}
	}
	return 0, false
}

func (ps *pairs) get(key string) ([]byte, bool) {
	if i, ok := ps.find(bytesOf(key)); ok {
		return ps.list[i].value, true
	}
	return nil, false
}

// equal reports whether m has the same entries.
func (ps *pairs) equal(m map[string]string) bool {
	if len(ps.list) != len(m) {
		return false
	}
	for i := range ps.list {
		if v, ok := m[string(ps.list[i].key)]; !ok || v != string(ps.list[i].value) {
			return false
		}
	}
	return true
}

// keptSpace is for how many headers space is kept.
const keptSpace = 256

// reset makes a empty and keeps its space.
func (a *attributes) reset() {
	a.there, a.http, a.tls = false, false, false
	a.source, a.destination = peerAttributes{}, peerAttributes{}
	a.method, a.path, a.host, a.sni = nil, nil, nil, nil
	a.raw = kept(a.raw)
	a.labels.reset()
	a.joined.reset()
	a.skip, a.skipped, a.unread = false, false, nil
	a.metadata = nil
	a.metadataBytes = kept(a.metadataBytes)
}

func (ps *pairs) reset() {
	ps.list = kept(ps.list)
	ps.seen, ps.index = 0, nil
}

// kept is the space of s, if it is not too much. What lies in it is not cleared: it
// is memory of messages that gRPC uses again too.
func kept[T any](s []T) []T {
	if cap(s) > keptSpace {
		return nil
	}
	return s[:0]
}

// take reads r into a, which is empty. Its slices share memory with r.
func (a *attributes) take(r *authv3.CheckRequest) {
	from := r.GetAttributes()
	if from == nil {
		return
	}
	a.there = true
	a.source.take(from.GetSource())
	a.destination.take(from.GetDestination())
	a.labels.take(from.GetDestination().GetLabels())
	if s := from.GetTlsSession(); s != nil {
		a.tls, a.sni = true, bytesOf(s.GetSni())
	}
	a.metadata = from.GetMetadataContext()
	h := from.GetRequest().GetHttp()
	if h == nil {
		return
	}
	a.http = true
	a.method, a.path, a.host = bytesOf(h.GetMethod()), bytesOf(h.GetPath()), bytesOf(h.GetHost())
	headers := h.GetHeaderMap().GetHeaders()
	a.raw = slices.Grow(a.raw, len(headers))
	for _, hv := range headers {
		a.raw = append(a.raw, rawHeader{bytesOf(hv.GetKey()), bytesOf(hv.GetValue()), hv.GetRawValue()})
	}
	a.joined.take(h.GetHeaders())
}

func (p *peerAttributes) take(from *authv3.AttributeContext_Peer) {
	if from == nil {
		return
	}
	p.there = true
	p.service, p.principal, p.certificate = bytesOf(from.GetService()), bytesOf(from.GetPrincipal()), bytesOf(from.GetCertificate())
	if s := from.GetAddress().GetSocketAddress(); s != nil {
		p.address = address{true, bytesOf(s.GetAddress()), s.GetPortValue()}
	}
}

func (ps *pairs) take(m map[string]string) {
	for k, v := range m {
		ps.put(pair{bytesOf(k), bytesOf(v)})
	}
}

// bytesOf is the bytes of s, which must not be written to.
func bytesOf(s string) []byte { return unsafe.Slice(unsafe.StringData(s), len(s)) }

// textOf is b as a string, which is good for as long as b is not written to.
func textOf(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }
