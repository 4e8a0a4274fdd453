package main

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/authz/source"
	"github.com/signet-mesh/signet/identity"
)

// watched runs an outage that hears of contact.
func watched(t *testing.T, saved []byte) (o *outage, contact *identity.Watched[source.Contact], stop func()) {
	t.Helper()
	o, contact = newOutage(), &identity.Watched[source.Contact]{}
	if saved != nil {
		if err := o.load(saved); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := o.watch(ctx, contact.Load); err != nil {
			t.Error(err)
		}
	}()
	return o, contact, func() { cancel(); <-done }
}

func TestOutageEndsAWhileAfterTheAPIServerIsBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, contact, stop := watched(t, nil)
		is := func(want bool, when string) {
			t.Helper()
			synctest.Wait()
			if _, on := o.on(); on != want {
				t.Errorf("%s: outage %t, want %t", when, on, want)
			}
		}
		is(true, "before the first answer")
		contact.Store(source.ContactAnswers)
		is(false, "after an answer at once")
		contact.Store(source.ContactAway)
		time.Sleep(100 * time.Hour)
		is(true, "away")
		contact.Store(source.ContactAnswers)
		time.Sleep(outageGrace - time.Second)
		is(true, "not long after it is back")
		during, _ := o.export()
		time.Sleep(time.Second)
		is(false, "a while after it is back")
		after, _ := o.export()
		contact.Store(source.ContactAway)
		synctest.Wait()
		away, _ := o.export()
		stop()

		// A successor goes on where it was.
		o, contact, stop = watched(t, away)
		contact.Store(source.ContactAnswers)
		is(true, "restarted while it was away")
		time.Sleep(outageGrace)
		is(false, "a while later")
		stop()
		o, contact, stop = watched(t, after)
		contact.Store(source.ContactAnswers)
		is(false, "restarted with nothing to remember")
		stop()
		o, contact, stop = watched(t, during) // which is over by now
		contact.Store(source.ContactAnswers)
		is(false, "restarted long after")
		stop()
	})
}

func TestOutageIsRememberedOverARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, contact, stop := watched(t, nil)
		contact.Store(source.ContactAway)
		synctest.Wait()
		contact.Store(source.ContactAnswers)
		synctest.Wait()
		saved, _ := o.export()
		stop()
		time.Sleep(time.Minute)
		o, contact, stop = watched(t, saved)
		defer stop()
		contact.Store(source.ContactAnswers)
		synctest.Wait()
		if _, on := o.on(); !on {
			t.Error("the time that kubelets were given is forgotten")
		}
		time.Sleep(outageGrace - time.Minute)
		if _, on := o.on(); on {
			t.Error("it is over later than it was")
		}
	})
	for _, bad := range []string{"", "{}", `{"version":2}`, `{"version":1,"over":"9999-12-31T00:00:00Z"}`} {
		o := newOutage()
		if err := o.load([]byte(bad)); err == nil && o.is.Value() != (span{over: away}) {
			t.Errorf("%s was taken", bad)
		}
	}
}

// TestOutagesBeginWhenTheyDo: a token that expired before the API server went away
// could be replaced.
func TestOutagesBeginWhenTheyDo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, contact, stop := watched(t, nil)
		defer stop()
		since := func(want time.Time, when string) {
			t.Helper()
			synctest.Wait()
			if is, on := o.on(); !on || !is.Equal(want) {
				t.Errorf("%s: since %v, %t; want %v", when, is, on, want)
			}
		}
		since(time.Time{}, "before the first answer")
		contact.Store(source.ContactAnswers)
		time.Sleep(time.Hour)
		began := time.Now().Add(-noticed)
		contact.Store(source.ContactAway)
		since(began, "away")
		time.Sleep(time.Hour)
		contact.Store(source.ContactAnswers)
		since(began, "just back")
		time.Sleep(outageGrace / 2)
		contact.Store(source.ContactAway)
		since(began, "away again, before every token was replaced")
		contact.Store(source.ContactAnswers)
		time.Sleep(outageGrace + time.Hour)
		contact.Store(source.ContactAway)
		since(time.Now().Add(-noticed), "another outage")
	})
}
