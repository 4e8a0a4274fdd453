package extauthz_test

import (
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/signet-mesh/signet/authz/extauthz"
)

var messages = flag.Int("messages", 0, "hold that many random messages against the generated decoder; 0 is few")

// kind is what a field of a message holds.
type kind struct {
	number protowire.Number
	// what is "text", "bytes", "number", "entry" (of a map of texts), or the name of
	// a message.
	what string
}

// grammar is the messages of a CheckRequest.
var grammar = map[string][]kind{
	"check": {{1, "attributes"}},
	"attributes": {{1, "peer"}, {2, "peer"}, {4, "request"}, {4, "request"}, {10, "entry"}, {11, "metadata"}, {12, "tls"},
		{13, "metadata"}},
	"peer":     {{1, "address"}, {2, "text"}, {3, "entry"}, {4, "principal"}, {5, "text"}},
	"address":  {{1, "socket"}, {1, "socket"}, {2, "pipe"}, {3, "internal"}},
	"socket":   {{1, "number"}, {2, "ip"}, {3, "port"}, {4, "text"}, {5, "text"}, {6, "number"}, {7, "text"}},
	"pipe":     {{1, "text"}, {2, "number"}},
	"internal": {{1, "text"}, {2, "text"}},
	"request":  {{1, "time"}, {2, "http"}, {2, "http"}},
	"time":     {{1, "number"}, {2, "number"}},
	"http": {{1, "text"}, {2, "value"}, {3, "entry"}, {3, "entry"}, {4, "value"}, {5, "value"}, {6, "text"}, {7, "text"}, {8, "text"},
		{9, "number"}, {10, "text"}, {11, "text"}, {12, "bytes"}, {13, "headers"}, {13, "headers"}},
	"headers":  {{1, "header"}, {1, "header"}, {1, "header"}},
	"header":   {{1, "name"}, {2, "value"}, {3, "value"}, {3, "value"}},
	"entry":    {{1, "name"}, {2, "value"}},
	"tls":      {{1, "text"}},
	"metadata": {{1, "filter"}, {2, "typed"}},
	"filter":   {{1, "name"}, {2, "struct"}},
	"typed":    {{1, "name"}, {2, "any"}},
	"any":      {{1, "text"}, {2, "bytes"}},
	"struct":   {{1, "member"}},
	"member":   {{1, "name"}, {2, "json"}},
	"json":     {{1, "number"}, {2, "double"}, {3, "text"}, {4, "number"}, {5, "struct"}, {6, "list"}},
	"list":     {{1, "json"}},
}

// writer writes random messages.
type writer struct{ *rand.Rand }

func (w writer) pick(values ...string) string { return values[w.IntN(len(values))] }

func (w writer) message(b []byte, name string, depth int) []byte {
	fields := grammar[name]
	for range w.IntN(len(fields) + 2) {
		f := fields[w.IntN(len(fields))]
		switch w.IntN(60) {
		case 0:
			b = w.unknown(b, f.number) // of another type than it has
			continue
		case 1:
			b = w.unknown(b, protowire.Number(1+w.IntN(30)))
			continue
		case 2:
			b = w.unknown(b, protowire.Number(w.Uint64()>>(35+w.IntN(29))))
			continue
		}
		b = w.field(b, f, depth)
	}
	return b
}

func (w writer) field(b []byte, f kind, depth int) []byte {
	if f.what == "number" || f.what == "port" {
		v := w.Uint64() >> w.IntN(64)
		if f.what == "port" && w.IntN(10) > 0 {
			v = uint64(w.IntN(3))
		}
		return w.varint(w.tag(b, f.number, protowire.VarintType), v)
	}
	if f.what == "double" {
		return protowire.AppendFixed64(w.tag(b, f.number, protowire.Fixed64Type), w.Uint64())
	}
	var data []byte
	if _, ok := grammar[f.what]; ok {
		if depth > 12 {
			return b
		}
		data = w.message(nil, f.what, depth+1)
	} else {
		data = []byte(w.text(f.what))
	}
	return append(w.varint(w.tag(b, f.number, protowire.BytesType), uint64(len(data))), data...)
}

func (w writer) tag(b []byte, n protowire.Number, t protowire.Type) []byte {
	return w.varint(b, protowire.EncodeTag(n, t))
}

// varint is sometimes longer than it need be.
func (w writer) varint(b []byte, v uint64) []byte {
	b = protowire.AppendVarint(b, v)
	if w.IntN(50) == 0 {
		b[len(b)-1] |= 0x80
		for range w.IntN(3) {
			b = append(b, 0x80)
		}
		b = append(b, byte(w.IntN(8)/7))
	}
	return b
}

// unknown is a field of any type, right or wrong.
func (w writer) unknown(b []byte, n protowire.Number) []byte {
	t := protowire.Type(w.IntN(8))
	b = w.tag(b, n, t)
	switch t {
	case protowire.VarintType:
		return w.varint(b, w.Uint64())
	case protowire.Fixed32Type:
		return append(b, "1234"...)
	case protowire.Fixed64Type:
		return append(b, "12345678"...)
	case protowire.BytesType:
		return append(b, "\x03abc"...)
	case protowire.StartGroupType:
		for range w.IntN(3) {
			b = w.unknown(b, protowire.Number(1+w.IntN(20)))
		}
		return w.tag(b, n+protowire.Number(w.IntN(20)/19), protowire.EndGroupType)
	}
	return b
}

func (w writer) text(what string) string {
	switch w.IntN(50) {
	case 0:
		return w.pick("\xff", "\xc0\x80", "\xed\xa0\x80", "abcdefgh\x80", "é", "日本", "\u212a")
	case 1:
		b := make([]byte, w.IntN(40))
		for i := range b {
			b[i] = byte(w.Uint32())
		}
		return string(b)
	}
	switch what {
	case "ip":
		return w.pick("10.0.0.1", "10.0.0.2", "fd00::2", "::ffff:10.0.0.1", "fe80::1%eth0", "10.0.0", "")
	case "principal":
		return w.pick("", client, client+"!", "CN=x", "spiffe://", strings.Repeat("spiffe://a", 205))
	case "name":
		return w.pick("", ":path", ":method", ":authority", ":scheme", "host", "Host", "a", "A", "x-b", "X-B", "authorization", "x-forwarded-for", "envoy.filters.http.jwt_authn", "payload",
			fmt.Sprintf("n%d", w.IntN(200)))
	case "value":
		return w.pick("", "GET", "CONNECT", "/ok", "/ok!", "/a?x", "a,b", "server:8080", "x")
	}
	return w.pick("", "x", "some longer text, with a comma", "!", "server")
}

// mangle changes b as a bad wire would.
func (w writer) mangle(b []byte) []byte {
	if len(b) == 0 {
		return b
	}
	switch i := w.IntN(len(b)); w.IntN(5) {
	case 0:
		return b[:i]
	case 1:
		b[i] ^= 1 << w.IntN(8)
	case 2:
		b[i] = byte(w.Uint32())
	case 3:
		return append(b[:i:i], b[min(len(b), i+1+w.IntN(4)):]...)
	case 4:
		return append(append(b[:i:i], b[w.IntN(len(b)):]...), b[i:]...)
	}
	return b
}

// captured are the CheckRequests that real Envoys sent in the tests.
func captured(t testing.TB) [][]byte {
	files, err := filepath.Glob("testdata/envoy/*.pb")
	if err != nil {
		t.Fatal(err)
	}
	var all [][]byte
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, b)
	}
	return all
}

// hostile are messages in which something is peculiar that random ones seldom have.
func hostile(t testing.TB) [][]byte {
	one := func(n protowire.Number, data []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(nil, n, protowire.BytesType), data)
	}
	attributes := func(parts ...[]byte) []byte { return one(1, bytes.Join(parts, nil)) }
	nested := func(depth int) []byte { // lists in lists of metadata
		var v []byte
		for range depth {
			v = one(6, one(1, v))
		}
		return one(1, append(one(1, []byte("f")), one(2, one(1, append(one(1, []byte("k")), one(2, v)...)))...))
	}
	var groups []byte
	for range 20000 {
		groups = protowire.AppendTag(groups, 20, protowire.StartGroupType)
	}
	closed := bytes.Clone(groups)
	for range 20000 {
		closed = protowire.AppendTag(closed, 20, protowire.EndGroupType)
	}
	all := [][]byte{
		{}, {0}, {0x0a}, {0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1}, {0x0c}, {0x0b, 0x0c}, {0x0b, 0x0b, 0x0c}, {0x0e, 0}, {0x0f},
		groups, closed, closed[:len(closed)-2*15000], attributes(closed[2*10100 : len(closed)-2*10100]),
	}
	for _, depth := range []int{1, 100, 1600, 1660, 1663, 1664, 1665, 1666, 1667, 1668, 1670, 2490, 2499, 2500, 2501, 3331, 3332, 3333, 3334, 3335, 4990, 4995, 4996, 4997, 4998, 4999, 5000, 5001} {
		all = append(all, attributes(one(11, nested(depth))), attributes(one(13, nested(depth))))
	}
	// Entries of the map of headers about as long as a length of one byte allows, and
	// bytes that are not ASCII in any of several.
	for n := 115; n < 132; n++ {
		for _, end := range []string{"", "x", "é", "\xff"} {
			long := append(one(1, []byte("key")), one(2, []byte(strings.Repeat("v", n)+end))...)
			turned := append(one(2, []byte(strings.Repeat("v", n)+end)), one(1, []byte("key"))...)
			plain := one(3, append(one(1, []byte("a")), one(2, nil)...))
			for _, e := range [][]byte{long, turned, one(1, long), append(bytes.Clone(long), 0), long[:len(long)-1]} {
				all = append(all, attributes(one(4, one(2, bytes.Join([][]byte{plain, one(3, e), plain}, nil)))),
					attributes(one(4, one(2, bytes.Join([][]byte{one(3, e), plain, one(3, e)}, nil)))))
			}
		}
	}
	// Each text of the grammar, once as UTF-8 and once not.
	var walk func(name string, wrap func([]byte) []byte, depth int)
	walk = func(name string, wrap func([]byte) []byte, depth int) {
		for _, f := range grammar[name] {
			inner := func(b []byte) []byte { return wrap(one(f.number, b)) }
			if _, ok := grammar[f.what]; ok {
				if depth < 9 {
					walk(f.what, inner, depth+1)
				}
				continue
			}
			for _, text := range []string{"", "x", "é", "\xff", "12345678\xff"} {
				all = append(all, inner([]byte(text)))
			}
			all = append(all, wrap(protowire.AppendVarint(protowire.AppendTag(nil, f.number, protowire.VarintType), 1<<40+7)),
				wrap(protowire.AppendTag(nil, f.number, protowire.StartGroupType)),
				wrap(protowire.AppendTag(protowire.AppendTag(nil, f.number, protowire.StartGroupType), f.number, protowire.EndGroupType)))
		}
	}
	walk("check", func(b []byte) []byte { return b }, 0)
	return all
}

func FuzzScan(f *testing.F) {
	for _, list := range [][][]byte{corpus(f), captured(f)} {
		for _, b := range list {
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := extauthz.ScanAgrees(b); err != nil {
			t.Fatalf("%x: %v", b, err)
		}
	})
}

// TestScanAgreesWithTheGeneratedDecoder holds the scanner against what it stands in
// for: on requests of every form, those that real Envoys sent, peculiar ones, and
// random ones.
func TestScanAgreesWithTheGeneratedDecoder(t *testing.T) {
	t.Parallel()
	seeds := append(corpus(t), captured(t)...)
	if len(captured(t)) == 0 {
		t.Error("there are no messages of real Envoys")
	}
	for _, b := range append(hostile(t), seeds...) {
		if _, err := extauthz.ScanAgrees(b); err != nil {
			t.Errorf("%.200x: %v", b, err)
		}
	}
	n := *messages
	if n == 0 {
		switch n = 200_000; {
		case raceEnabled:
			n = 2_000
		case testing.Short():
			n = 30_000
		}
	}
	seed := uint64(time.Now().UnixNano())
	var done, valid, failed atomic.Int64
	var group sync.WaitGroup
	for worker := range runtime.GOMAXPROCS(0) {
		group.Go(func() {
			w := writer{rand.New(rand.NewPCG(seed, uint64(worker)))}
			for done.Add(1) <= int64(n) && failed.Load() < 5 {
				var b []byte
				switch w.IntN(4) {
				case 0: // from a real one
					b = bytes.Clone(seeds[w.IntN(len(seeds))])
					for range 1 + w.IntN(3) {
						b = w.mangle(b)
					}
				case 1: // two, merged
					b = append(bytes.Clone(seeds[w.IntN(len(seeds))]), w.message(nil, "check", 0)...)
				default:
					b = w.message(nil, "check", 0)
					for range w.IntN(3) {
						b = append(b, w.message(nil, "check", 0)...)
					}
					if w.IntN(8) == 0 {
						b = w.mangle(b)
					}
				}
				ok, err := extauthz.ScanAgrees(b)
				if err != nil {
					failed.Add(1)
					t.Errorf("seed %d: %x: %v", seed, b, err)
				}
				if ok {
					valid.Add(1)
				}
			}
		})
	}
	group.Wait()
	t.Logf("seed %d: %d messages equal, of which the decoder takes %d", seed, min(done.Load(), int64(n)), valid.Load())
	if v := valid.Load(); v < int64(n)/5 || v > int64(n)*9/10 {
		t.Errorf("%d of %d are messages that can be read; want some of both", v, n)
	}
}

// TestMalformedNeverAllows: no bytes that the generated decoder refuses are allowed,
// by policies that allow everything.
func TestMalformedNeverAllows(t *testing.T) {
	t.Parallel()
	s, err := extauthz.New(extauthz.Config{Snapshot: fixed(compile(t, "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: all, namespace: default}\nspec: {rules: [{}]}\n"))})
	if err != nil {
		t.Fatal(err)
	}
	seed := uint64(time.Now().UnixNano())
	w := writer{rand.New(rand.NewPCG(seed, 1))}
	seeds := append(corpus(t), captured(t)...)
	refused, want := 0, 20_000
	if raceEnabled {
		want = 3_000
	}
	for refused < want {
		b := w.message(nil, "check", 0)
		if w.IntN(2) == 0 {
			b = bytes.Clone(seeds[w.IntN(len(seeds))])
		}
		b = w.mangle(b)
		if proto.Unmarshal(b, new(authv3.CheckRequest)) == nil {
			continue
		}
		refused++
		a, err := answerToBytes(t, s, as(server), b)
		if err != nil {
			t.Fatal(err)
		}
		if err := isDenial(a, extauthz.ReasonRequest); err != nil {
			t.Fatalf("seed %d: %x: %v", seed, b, err)
		}
	}
}
