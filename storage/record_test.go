package storage_test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"reflect"
	"testing"
	"time"

	"github.com/signet-mesh/signet/storage"
)

// Records of a program, and of a later version of it.
type (
	recordNow struct {
		Version int                        `json:"version"`
		At      time.Time                  `json:"at,omitzero"`
		Bytes   []byte                     `json:"bytes,omitempty"`
		Inner   *innerNow                  `json:"inner,omitempty"`
		List    []innerNow                 `json:"list,omitempty"`
		Raw     map[string]json.RawMessage `json:"raw,omitempty"`
	}
	innerNow struct {
		Name string `json:"name"`
	}
	recordLater struct {
		recordNow
		Inner *innerLater    `json:"inner,omitempty"`
		List  []innerLater   `json:"list,omitempty"`
		More  map[string]any `json:"more,omitempty"`
		Other *innerLater    `json:"other,omitempty"`
	}
	innerLater struct {
		innerNow
		Since time.Time `json:"since,omitzero"`
	}
)

// reread is a record after it was read and written, changed by edit.
func reread(t *testing.T, record string, edit func(*recordNow)) string {
	t.Helper()
	var r recordNow
	rest, err := storage.ParseRecord([]byte(record), &r)
	if err != nil {
		t.Fatalf("%s: %v", record, err)
	}
	edit(&r)
	b, err := storage.EncodeRecord(r, rest)
	if err != nil {
		t.Fatalf("%s: %v", record, err)
	}
	return string(b)
}

func TestWhatIsNotKnownOfARecordStays(t *testing.T) {
	t.Parallel()
	same := func(*recordNow) {}
	for _, c := range []struct {
		record string
		edit   func(*recordNow)
		want   string
	}{
		{`{"version":1}`, same, `{"version":1}`},
		{`{"version":1,"bytes":"AQI=","raw":{"x":[1]}}`, same, `{"version":1,"bytes":"AQI=","raw":{"x":[1]}}`},
		{`{"version":1,"new":{"a":[1,{"b":null}]}}`, func(r *recordNow) { r.Version = 2 }, `{"new":{"a":[1,{"b":null}]},"version":2}`},
		{`{"new":1e400,"version":1}`, same, `{"new":1e400,"version":1}`}, // it is not read
		{`{"version":1,"inner":{"name":"a","new":1}}`, func(r *recordNow) { r.Inner.Name = "b" }, `{"inner":{"name":"b","new":1},"version":1}`},
		{`{"version":1,"inner":{"name":"a","new":1},"new":2}`, func(r *recordNow) { r.Inner = nil }, `{"new":2,"version":1}`},
		{`{"version":1,"inner":null,"new":2}`, func(r *recordNow) { r.Inner = &innerNow{} }, `{"inner":{"name":""},"new":2,"version":1}`},
		{`{"version":1,"list":[{"name":"a","new":1},{"name":"b"},{"name":"c","new":3}]}`, func(r *recordNow) { r.List = append(r.List[1:], innerNow{"d"}) },
			`{"list":[{"name":"b"},{"name":"c","new":3},{"name":"d"}],"version":1}`},
		{`{"version":1,"list":[{"name":"a","new":1},{"name":"a","new":2}]}`, same, `{"list":[{"name":"a","new":1},{"name":"a","new":2}],"version":1}`},
		{`{"version":1,"list":[{"name":"a","new":1}]}`, func(r *recordNow) { r.List[0].Name = "b" }, `{"list":[{"name":"b"}],"version":1}`},
		{`{"VERSION":1,"Inner":{"name":"a","new":1}}`, same, `{"inner":{"name":"a","new":1},"version":1}`},
		{`{"version":1,"at":"2026-11-25T12:00:00Z","new":1}`, func(r *recordNow) { r.At = time.Time{} }, `{"new":1,"version":1}`},
	} {
		if got := reread(t, c.record, c.edit); got != c.want {
			t.Errorf("%s becomes\n%s\nand should be\n%s", c.record, got, c.want)
		}
	}
	for _, bad := range []string{``, `{`, `[]`, `1`, `{"version":"x"}`, `{"version":1} {}`, `{"version":1,"list":{"new":1}}`, `{"version":1,"new":1,"inner":[1]}`} {
		r := recordNow{}
		if rest, err := storage.ParseRecord([]byte(bad), &r); err == nil || rest != "" {
			t.Errorf("%s was read as %+v", bad, r)
		}
	}
}

// TestRecordsOfALaterVersion: whatever a later version wrote, what it reads back after an
// older one has written it is the same.
func TestRecordsOfALaterVersion(t *testing.T) {
	t.Parallel()
	for seed := range uint64(2000) {
		r := rand.New(rand.NewPCG(seed, 1))
		inner := func() innerLater {
			return innerLater{innerNow{fmt.Sprint(r.IntN(3), "<&>\u2028")}, time.Unix(r.Int64N(1<<32), 0).UTC()}
		}
		var was recordLater
		was.Version = r.IntN(5)
		if r.IntN(2) == 0 {
			was.At = time.Unix(r.Int64N(1<<32), r.Int64N(1e9)).UTC()
		}
		if r.IntN(2) == 0 {
			i := inner()
			was.Inner = &i
		}
		for range r.IntN(4) {
			was.List = append(was.List, inner())
		}
		if r.IntN(2) == 0 {
			i := inner()
			was.Other, was.More = &i, map[string]any{"x": []any{"y", nil, true}, "version": 1.5}
		}
		b, err := json.Marshal(was)
		if err != nil {
			t.Fatal(err)
		}
		var is recordLater
		if err := json.Unmarshal([]byte(reread(t, string(b), func(*recordNow) {})), &is); err != nil || !reflect.DeepEqual(is, was) {
			t.Fatalf("seed %d: %s is read back as %+v, %v", seed, b, is, err)
		}
	}
}

// FuzzRecord: what is read once is read again as the same after it was written, whatever
// it is, and a second time nothing changes.
func FuzzRecord(f *testing.F) {
	for _, s := range []string{`{}`, `{"version":1,"new":[{}]}`, `{"list":[{"name":"a","new":1},null],"inner":{"NAME":"","x":{}}}`, `{"raw":{"a":1},"RAW":{"b":2},"x":1}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, record []byte) {
		var r, again, third recordNow
		rest, err := storage.ParseRecord(record, &r)
		if err != nil {
			return
		}
		b, err := storage.EncodeRecord(r, rest)
		if err != nil {
			t.Fatalf("%q cannot be written: %v", record, err)
		}
		more, err := storage.ParseRecord(b, &again)
		if err != nil || !reflect.DeepEqual(again, r) && !bytesOnly(again, r) {
			t.Fatalf("%q: %+v is read back from %s as %+v, %v", record, r, b, again, err)
		}
		c, err := storage.EncodeRecord(again, more)
		if err != nil {
			t.Fatal(err)
		}
		if rest, err := storage.ParseRecord(c, &third); err != nil || rest != more {
			t.Fatalf("%q: of %s the rest is %s, of %s it is %s, %v", record, b, more, c, rest, err)
		}
	})
}

// bytesOnly reports whether two records are the same to encoding/json, which does not
// tell empty lists from none, or places of one moment.
func bytesOnly(a, b recordNow) bool {
	x, err := json.Marshal(a)
	y, err2 := json.Marshal(b)
	return err == nil && err2 == nil && string(x) == string(y)
}
