package replica_test

import (
	"errors"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca/replica"
	"github.com/signet-mesh/signet/storage"
)

func TestRevisionsOfBansAreReadAsWritten(t *testing.T) {
	t.Parallel()
	for _, n := range []uint64{1, 1 << 20, 1<<64 - 1} {
		b, err := replica.BanRevision{Revision: n}.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := replica.ParseBanRevision(storage.Entry{Value: b}); err != nil || got.Revision != n {
			t.Errorf("%s: %v, %v", b, got, err)
		}
		for i := range b {
			if got, err := replica.ParseBanRevision(storage.Entry{Value: b[:i]}); err == nil {
				t.Errorf("%q is %v", b[:i], got)
			}
		}
	}
	if b, err := (replica.BanRevision{}).Encode(); err == nil {
		t.Errorf("none is written as %s", b)
	}
	for _, text := range []string{"", "null", "5", `{}`, `{"revision":5}`, `{"version":1}`, `{"version":1,"revision":-1}`, `{"version":1,"revision":"5"}`} {
		if got, err := replica.ParseBanRevision(storage.Entry{Value: []byte(text)}); err == nil {
			t.Errorf("%s is %v", text, got)
		}
	}
	if _, err := replica.ParseBanRevision(storage.Entry{Value: []byte(`{"version":2,"revision":5}`)}); !errors.Is(err, storage.ErrNewerFormat) {
		t.Errorf("of a later version: %v", err)
	}
}

func TestBansFromAfterACopyAreLost(t *testing.T) {
	t.Parallel()
	const leap = 1 << 20
	r := replica.BanRevision{Revision: 7}
	if r.Restored.Lost(9, 3) {
		t.Error("nothing was restored, and bans are lost")
	}
	r.Restore(leap+5, time.Now())
	again := r // a second time, from a copy of the restored state
	again.Revision = 9
	again.Restore(2*leap+8, time.Now())
	for _, c := range []struct {
		r              *replica.RestoredBans
		said, sequence uint64
		lost           bool
	}{
		{r.Restored, 0, 0, false}, {r.Restored, 7, 0, false}, {r.Restored, 8, 0, true}, {r.Restored, leap + 7, 0, false}, {r.Restored, leap + 9, 0, false},
		{r.Restored, 7, 5, false}, {r.Restored, 8, 5, true}, {r.Restored, 3 * leap, 6, true}, {r.Restored, leap + 8, leap + 5, false}, {r.Restored, leap + 8, leap + 9, false},
		{again.Restored, leap + 9, leap + 5, false}, {again.Restored, leap + 10, leap + 5, true}, {again.Restored, 9, 5, false}, {again.Restored, 10, 5, true}, {again.Restored, 2*leap + 10, 2*leap + 8, false},
	} {
		if got := c.r.Lost(c.said, c.sequence); got != c.lost {
			t.Errorf("%+v: of bans %d, said with trust %d: lost: %v", *c.r, c.said, c.sequence, got)
		}
	}
}
