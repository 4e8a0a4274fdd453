package ca_test

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/storage"

	"google.golang.org/protobuf/proto"
)

// later has a later version write a record: it adds a member that this one does not know,
// beside those that there are and in every object below.
func later(t *testing.T, s storage.Store, key string) {
	t.Helper()
	e := must(s.Get(t.Context(), key))
	var add func(v any)
	add = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			for name, m := range v {
				if name != "journal" { // of which nothing may be unknown
					add(m)
				}
			}
			v["ofALaterVersion"] = "it stays"
		case []any:
			for _, m := range v {
				add(m)
			}
		}
	}
	var record map[string]any
	if err := json.Unmarshal(e.Value, &record); err != nil {
		t.Fatal(key, err)
	}
	add(record)
	must(s.Commit(t.Context(), []storage.Cond{{Key: key, Revision: e.Revision}}, []storage.Op{{Key: key, Value: must(json.Marshal(record))}}))
}

// TestWhatALaterVersionWroteStays when this one changes the record: while replicas of two
// versions serve, and after one was put back.
func TestWhatALaterVersionWroteStays(t *testing.T) {
	t.Parallel()
	shared := newShared(t)
	store := shared.Store
	a := newWorld(t, brisk, func(c *ca.Config) { c.Shared, c.RootReplica, c.Instance = shared, 1, 1 })
	// changed reports whether a record has been changed as a test wants, and fails if it is
	// not what a later version made of it any more in n places.
	changed := func(key string, n int, has ...string) bool {
		t.Helper()
		text := string(must(store.Get(t.Context(), key)).Value)
		for _, h := range has {
			if !strings.Contains(text, h) {
				return false
			}
		}
		if got := strings.Count(text, `"ofALaterVersion":"it stays"`); got != n {
			t.Errorf("%s: %d members of a later version are left, of %d: %s", key, got, n, text)
		}
		return true
	}
	check := func(key string, n int, has ...string) {
		t.Helper()
		if !changed(key, n, has...) {
			t.Errorf("%s has not %q: %s", key, has, must(store.Get(t.Context(), key)).Value)
		}
	}

	// An agent's record, when the agent acknowledges.
	client, cert := a.attest(agentA)
	agent := "agents/" + hex.EncodeToString(ca.Serial(cert.Leaf))
	later(t, store, agent)
	watching := watchTrust(t, client)
	if err := a.Relist(t.Context()); err != nil {
		t.Fatal(err)
	}
	seq := trustOf(a).Sequence()
	eventually(t, "the agent to be told", func() bool { return watching.sequence() >= seq })
	watching.acknowledge(seq)
	eventually(t, "what it acknowledged to be stored", func() bool {
		if err := a.SayAcknowledged(t.Context()); err != nil {
			t.Fatal(err)
		}
		return changed(agent, 1, fmt.Sprintf(`"acknowledged":%d`, seq))
	})
	if err := a.CatchUp(t.Context()); err != nil || a.Agents() != 1 {
		t.Errorf("of one agent %d are known: %v", a.Agents(), err)
	}

	// A ban, when it ends and when that is in the log.
	op := adminOf(t, a)
	const banned = "spiffe://cluster.local/ns/default/sa/db"
	must(op.AddBan(t.Context(), &capb.AddBanRequest{Subject: banned, Reason: "a test"}))
	bans, _, err := store.List(t.Context(), "bans/")
	if err != nil || len(bans) != 1 {
		t.Fatal(bans, err)
	}
	ban := bans[0].Key
	later(t, store, ban)
	later(t, store, "ban-revision")
	must(op.RemoveBan(t.Context(), &capb.RemoveBanRequest{Subject: banned, Reason: "it is over"}))
	check(ban, 1, `"reason":"it is over"`, `"logged":true`)
	check("ban-revision", 1)
	later(t, store, ban) // how it ended, too
	edit(t, store, ban, func(r map[string]any) { r["logged"] = false })
	for range 2 { // the first finds that it knows an older record
		_ = a.ReloadBans(t.Context())
		if err := a.TendBans(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	check(ban, 2, `"logged":true`, `"reason":"it is over"`)

	// What another replica is to revoke, when that refuses.
	serial := append([]byte{1}, make([]byte, 16)...)
	copy(serial[1:], ca.Serial(a.Intermediate())[1:7])
	asked := "revoke-asked/" + hex.EncodeToString(serial)
	must(store.Commit(t.Context(), nil, []storage.Op{{Key: asked, Value: must(json.Marshal(map[string]any{"version": 1, "serial": serial, "reason": 1, "by": "b", "at": time.Now()}))}}))
	later(t, store, asked)
	if err := a.AnswerRevocations(t.Context()); err != nil {
		t.Fatal(err)
	}
	check(asked, 1, `"notIssued":true`)

	// What a replica has of the journal, when it takes another intermediate.
	later(t, store, "replicas/001")
	before := a.Intermediate()
	if err := a.RenewIntermediate(t.Context()); err != nil || a.Intermediate().Equal(before) {
		t.Fatal(err)
	}
	check("replicas/001", 1, `"state":"old"`)

	// What is known of the time, and which clocks were accepted.
	const clock = "replica-clock/001"
	ahead := time.Now().Add(time.Hour)
	set := func(d time.Duration) {
		ahead := ahead.Add(d)
		a.SetClock(func() time.Time { return ahead }, ahead)
		_ = a.TendClock(t.Context()) // the first one may find that others have changed it
		if err := a.TendClock(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	set(0)
	edit(t, store, clock, func(r map[string]any) {
		r["accepted"] = []map[string]any{{"clock": time.Now(), "newest": time.Now(), "reason": "a test"}}
	})
	later(t, store, clock)
	set(time.Hour)
	check(clock, 2, `"time":"`+ahead.Add(time.Hour).UTC().Format("2006-01-02T15:04:05"))
	a.SetClock(time.Now, time.Now())
	edit(t, store, clock, func(r map[string]any) { r["time"] = time.Now(); delete(r, "accepted") })

	// What was lost of a log and is there again, at a start.
	if err := a.SignHead(t.Context()); err != nil {
		t.Fatal(err)
	}
	head, _ := a.Log().SignedHead()
	lost := map[string]any{"instance": head.Instance, "sequence": head.Sequence, "hash": head.Hash[:], "time": head.Time, "signature": head.Signature, "node": "node-a", "noticed": time.Now()}
	decided := map[string]any{"instance": 1, "sequence": 1, "hash": head.Hash[:], "reason": "gone"}
	must(store.Commit(t.Context(), nil, []storage.Op{{Key: "replica-loss/001", Value: must(json.Marshal(map[string]any{"version": 1, "lost": lost, "accepted": []any{decided}}))}}))
	later(t, store, "replica-loss/001")
	a.close()
	a.open()
	check("replica-loss/001", 2, `"reason":"gone"`)
	if text := string(must(store.Get(t.Context(), "replica-loss/001")).Value); strings.Contains(text, `"lost"`) {
		t.Errorf("what is there again is lost: %s", text)
	}

	// Of the journal nothing may be unknown, which says what to do.
	edit(t, store, "journal", func(r map[string]any) { r["ofALaterVersion"] = 1 })
	if err := a.CatchUp(t.Context()); err == nil || !strings.Contains(err.Error(), "newer signet-ca") || !strings.Contains(err.Error(), `"ofALaterVersion"`) {
		t.Errorf("a journal of a later version: %v", err)
	}
	if err := a.Relist(t.Context()); err == nil {
		t.Error("a journal of a later version was changed")
	}
	edit(t, store, "journal", func(r map[string]any) { delete(r, "ofALaterVersion") })
	if err := a.CatchUp(t.Context()); err != nil {
		t.Error(err)
	}
	intact(t, a)
}

// edit changes a record.
func edit(t *testing.T, s storage.Store, key string, f func(record map[string]any)) {
	t.Helper()
	e := must(s.Get(t.Context(), key))
	var record map[string]any
	if err := json.Unmarshal(e.Value, &record); err != nil {
		t.Fatal(key, err)
	}
	f(record)
	must(s.Commit(t.Context(), []storage.Cond{{Key: key, Revision: e.Revision}}, []storage.Op{{Key: key, Value: must(json.Marshal(record))}}))
}

// TestALaterRecordIsListedWhole: what this version does not know of a record of the log is
// handed on to who asks for it, who may.
func TestALaterRecordIsListedWhole(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r := &capb.IssuanceRecord{Kind: capb.IssuanceRecord_KIND_DECISION, Decision: &capb.Decision{What: capb.Decision_WHAT_RESTORED, Reason: "a test"}}
	unknown := []byte{0xc2, 0x3e, 1, 'x'} // field 1000, of no version yet
	r.ProtoReflect().SetUnknown(unknown)
	r.Decision.ProtoReflect().SetUnknown(unknown)
	at := must(w.Log().Append(t.Context(), [][]byte{must(proto.Marshal(r))}))
	s := must(w.admin().ListLog(t.Context(), &capb.ListLogRequest{From: at}))
	got := must(s.Recv()).GetRecord()
	if string(got.ProtoReflect().GetUnknown()) != string(unknown) || string(got.GetDecision().ProtoReflect().GetUnknown()) != string(unknown) {
		t.Errorf("listed as %v", got)
	}
}
