package replica_test

import (
	"errors"
	"testing"

	"github.com/signet-mesh/signet/ca/replica"
	"github.com/signet-mesh/signet/storage"
)

func TestRevisionsOfBansAreReadAsWritten(t *testing.T) {
	t.Parallel()
	for _, n := range []uint64{1, 1 << 20, 1<<64 - 1} {
		b, err := replica.EncodeBanRevision(n, "")
		if err != nil {
			t.Fatal(err)
		}
		if got, _, err := replica.ParseBanRevision(storage.Entry{Value: b}); err != nil || got != n {
			t.Errorf("%s: %d, %v", b, got, err)
		}
		for i := range b {
			if got, _, err := replica.ParseBanRevision(storage.Entry{Value: b[:i]}); err == nil {
				t.Errorf("%q is %d", b[:i], got)
			}
		}
	}
	if b, err := replica.EncodeBanRevision(0, ""); err == nil {
		t.Errorf("none is written as %s", b)
	}
	for _, text := range []string{"", "null", "5", `{}`, `{"revision":5}`, `{"version":1}`, `{"version":1,"revision":-1}`, `{"version":1,"revision":"5"}`} {
		if got, _, err := replica.ParseBanRevision(storage.Entry{Value: []byte(text)}); err == nil {
			t.Errorf("%s is %d", text, got)
		}
	}
	if _, _, err := replica.ParseBanRevision(storage.Entry{Value: []byte(`{"version":2,"revision":5}`)}); !errors.Is(err, storage.ErrNewerFormat) {
		t.Errorf("of a later version: %v", err)
	}
}
