package extauthz

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"reflect"
	"slices"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/protobuf/proto"

	"github.com/signet-mesh/signet/authz"
)

// MaxPeers is how many certificates a generation remembers.
const MaxPeers = maxPeers

// Peers is how many certificates s remembers.
func Peers(s *Server) int {
	s.reader.peers.mu.RLock()
	defer s.reader.peers.mu.RUnlock()
	return len(s.reader.peers.young) + len(s.reader.peers.old)
}

// sorted is a without what depends on the form that it was read from.
func (a attributes) sorted() attributes {
	ps := func(p pairs) pairs {
		list := slices.Clone(p.list)
		slices.SortFunc(list, func(a, b pair) int { return bytes.Compare(a.key, b.key) })
		for i := range list {
			list[i].key, list[i].value = nonNil(list[i].key), nonNil(list[i].value)
		}
		return pairs{list: append([]pair{}, list...)}
	}
	a.labels, a.joined = ps(a.labels), ps(*a.joinedHeaders())
	a.skip, a.skipped, a.unread = false, false, nil
	a.metadata, a.metadataBytes = nil, nil
	a.raw = append([]rawHeader{}, a.raw...)
	for i := range a.raw {
		h := &a.raw[i]
		h.key, h.text, h.bytes = nonNil(h.key), nonNil(h.text), nonNil(h.bytes)
	}
	for _, b := range []*[]byte{&a.method, &a.path, &a.host, &a.sni, &a.source.service, &a.source.principal, &a.source.certificate, &a.source.address.ip,
		&a.destination.service, &a.destination.principal, &a.destination.certificate, &a.destination.address.ip} {
		*b = nonNil(*b)
	}
	return a
}

func nonNil(b []byte) []byte { return append([]byte{}, b...) }

// lazyRead says where the scanner that skips headers reads something else.
func lazyRead(b []byte, want *authz.Request) error {
	var r authz.Request
	if err := FromBytes(b, 0, &r); err != nil {
		return fmt.Errorf("without headers: %w", err)
	}
	if r.Claims != nil || r.Metadata != nil || r.Known&authz.FieldClaims != 0 {
		return errors.New("claims were read that nobody needs")
	}
	r.Headers, r.Claims, r.Known = want.Headers, want.Claims, r.Known|want.Known&(authz.FieldHeaders|authz.FieldClaims)
	if r.Known != want.Known || string(r.Path) != string(want.Path) || string(r.Method) != string(want.Method) || string(r.Host) != string(want.Host) ||
		string(r.Principal) != string(want.Principal) || r.SourceIP != want.SourceIP || !proto.Equal(r.Claims, want.Claims) {
		return fmt.Errorf("without headers it is\n%+v\nwith them\n%+v", r, *want)
	}
	return nil
}

// ScanAgrees says where the scanner and the generated decoder differ about b; valid
// is whether the latter takes it.
func ScanAgrees(b []byte) (valid bool, err error) {
	var scanned, lazy, generated attributes
	var got, want authz.Request
	ok := scanned.scan(b, true)
	// Headers that nobody needs are checked all the same.
	if without := lazy.scan(b, false); without != ok {
		return ok, fmt.Errorf("with headers it is read: %v, without: %v", ok, without)
	}
	err = errMessage
	if ok {
		err = (&reader{}).read(&scanned, authz.FieldsHTTP, &got)
	}
	var r authv3.CheckRequest
	if refused := proto.Unmarshal(b, &r); refused != nil {
		if !errors.Is(err, errMessage) {
			return false, fmt.Errorf("it is malformed (%w), and read: %v", refused, err)
		}
		return false, nil
	}
	generated.take(&r)
	if !ok {
		return true, errors.New("it is read, and scanned as malformed")
	}
	if s, g := scanned.sorted(), generated.sorted(); !reflect.DeepEqual(s, g) {
		return true, fmt.Errorf("scanned\n%+v\nread\n%+v", s, g)
	}
	wantErr := (&reader{}).read(&generated, authz.FieldsHTTP, &want)
	if fmt.Sprint(err) != fmt.Sprint(wantErr) {
		return true, fmt.Errorf("scanned: %v; read: %v", err, wantErr)
	}
	if err != nil {
		return true, nil
	}
	byName := func(a, b authz.Header) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), bytes.Compare(a.Value, b.Value))
	}
	if len(generated.raw) == 0 { // of a map, in any order
		slices.SortFunc(got.Headers, byName)
		slices.SortFunc(want.Headers, byName)
	}
	equal := got.Known == want.Known && got.HTTP == want.HTTP && got.Authenticated == want.Authenticated && bytes.Equal(got.Principal, want.Principal) &&
		got.SourceIP == want.SourceIP && got.DestinationIP == want.DestinationIP && got.DestinationPort == want.DestinationPort &&
		bytes.Equal(got.SNI, want.SNI) && bytes.Equal(got.Method, want.Method) && bytes.Equal(got.Path, want.Path) && bytes.Equal(got.Host, want.Host) &&
		(got.Method == nil) == (want.Method == nil) && (got.Path == nil) == (want.Path == nil) && (got.Host == nil) == (want.Host == nil) &&
		slices.EqualFunc(got.OtherNames, want.OtherNames, bytes.Equal) && len(got.Metadata) == len(want.Metadata) && proto.Equal(got.Claims, want.Claims) &&
		slices.EqualFunc(got.Headers, want.Headers, func(a, b authz.Header) bool { return byName(a, b) == 0 && a.Form == b.Form })
	for k, v := range want.Metadata {
		equal = equal && proto.Equal(got.Metadata[k], v)
	}
	if !equal {
		return true, fmt.Errorf("scanned\n%+v\nread\n%+v", got, want)
	}
	// What is not needed changes nothing else, whether it was scanned or not.
	if s := lazy.sorted(); !reflect.DeepEqual(s, scanned.sorted()) {
		return true, fmt.Errorf("scanned\n%+v\nread later\n%+v", scanned.sorted(), s)
	}
	if err := lazyRead(b, &got); err != nil {
		return true, err
	}
	var less authz.Request
	if err := (&reader{}).read(&scanned, 0, &less); err != nil {
		return true, fmt.Errorf("without headers: %w", err)
	}
	if both := len(scanned.raw) > 0 && len(scanned.joined.list) > 0; !both && len(less.Headers) > 0 {
		return true, errors.New("headers were read that nobody needs")
	}
	less.Headers, less.Known = got.Headers, less.Known|got.Known&(authz.FieldHeaders|authz.FieldClaims)
	if less.Known != got.Known || string(less.Path) != string(got.Path) || string(less.Method) != string(got.Method) {
		return true, fmt.Errorf("without headers it is\n%+v", less)
	}
	return true, nil
}
