package ca_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
)

// asked is what asked an instance at that time to revoke a certificate that it issued at
// t: key and value.
func asked(instance byte, t, at time.Time) (key, value string) {
	serial := binary.BigEndian.AppendUint64(nil, uint64(t.UnixMilli()))[1:]
	serial[0] = instance
	serial = append(serial, bytes.Repeat([]byte{7}, 10)...)
	return "revoke-asked/" + hex.EncodeToString(serial), fmt.Sprintf(`{"version":1,"serial":%q,"reason":1,"by":"a test","at":%q}`, b64(serial), at.UTC().Format(time.RFC3339))
}

// TestRequestsToRevokeThatCannotBeRead are an alarm where they are addressed, keep nobody
// from serving, and from no other request; and those for certificates that have ended go.
func TestRequestsToRevokeThatCannotBeRead(t *testing.T) {
	t.Parallel()
	a, b, store := twoWith(t)
	now, long := time.Now(), time.Now().Add(-10*365*24*time.Hour)
	newer, value := asked(2, now, now)
	put(t, store, newer, strings.Replace(value, `"version":1`, `"version":9`, 1))
	damaged, _ := asked(1, now, now)
	put(t, store, damaged, "{")
	// Of an instance that is gone: it can come back, as long as the certificate can be good.
	gone, value := asked(9, now, now)
	put(t, store, gone, value)
	for _, instance := range []byte{1, 2, 9} {
		key, value := asked(instance, long, long)
		put(t, store, key, value)
	}
	key, _ := asked(9, long.Add(time.Second), long)
	put(t, store, key, "{")
	waits, value := asked(2, long.Add(2*time.Second), now)
	put(t, store, waits, value)
	agent, _ := b.attest(agentB)
	rs, err := issue(t, agent, item(t, byUID(onNodeB.PodUID)))
	if err != nil || rs[0].GetX509() == nil {
		t.Fatal(rs, err)
	}
	serial := ca.Serial(parseChain(t, rs[0].GetX509().GetChain())[0])
	put(t, store, "revoke-asked/"+hex.EncodeToString(serial), fmt.Sprintf(`{"version":1,"serial":%q,"reason":1,"by":"a test","at":%q}`, b64(serial), now.UTC().Format(time.RFC3339)))

	unread := map[*world]string{a: damaged, b: newer}
	for _, w := range []*world{a, b} {
		key := unread[w]
		if err := w.AnswerRevocations(t.Context()); err != nil {
			t.Errorf("%v: %v", w.ID(), err)
		}
		if err := w.Alarms(); err == nil || !strings.Contains(err.Error(), key) || strings.Count(err.Error(), "revoke-asked/") != 1 {
			t.Errorf("%v: the alarms are %v, and %s cannot be read", w.ID(), err, key)
		}
	}
	if !stored(t, store, serial) {
		t.Error("what can be read is not revoked")
	}
	if e, err := store.Get(t.Context(), waits); err != nil || !strings.Contains(string(e.Value), `"notIssued":true`) {
		t.Errorf("who has just asked, of one that ended long ago, is told %s, %v", e.Value, err)
	}
	if err := b.AnswerRevocations(t.Context()); err != nil { // its refusal of what is old
		t.Error(err)
	}
	want := []string{newer, damaged, gone, waits}
	slices.Sort(want)
	left := func() (keys []string) {
		all, _, err := store.List(t.Context(), "revoke-asked/")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range all {
			keys = append(keys, e.Key)
		}
		slices.Sort(keys)
		return keys
	}
	if got := left(); !slices.Equal(got, want) {
		t.Errorf("left are %q, want %q", got, want)
	}
	// A key of nobody is for everybody to tell, and the alarm ends with what it was about.
	put(t, store, damaged, "")
	put(t, store, "revoke-asked/x", "{")
	if err := a.AnswerRevocations(t.Context()); err != nil || !strings.Contains(fmt.Sprint(a.Alarms()), "revoke-asked/x") {
		t.Errorf("%v; the alarms are %v", err, a.Alarms())
	}
	put(t, store, "revoke-asked/x", "")
	if err := a.AnswerRevocations(t.Context()); err != nil || a.Alarms() != nil {
		t.Errorf("%v; the alarms are %v", err, a.Alarms())
	}
}
