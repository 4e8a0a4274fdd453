package attest_test

import (
	"bytes"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/signet-mesh/signet/identity/attest"
	"github.com/signet-mesh/signet/identity/attest/attesttest"
)

// TestOutageKeepsWhatWasProved: tokens that were accepted outlive their exp while
// they cannot be replaced, and only then.
func TestOutageKeepsWhatWasProved(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var outage outage
		w := newWorld(t, func(c *attest.Config) { c.Outage = outage.on })
		used := w.issuer.Token(server, audience)
		unused := w.issuer.Token(server, audience, attesttest.Claim("jti", "another"))
		w.accept(t, used)
		saved, _ := w.Export()
		if bytes.Contains(saved, []byte(used)) {
			t.Fatal("a token is saved")
		}

		outage.Store(true)
		time.Sleep(11 * time.Minute)
		_, until, err := w.Attest(t.Context(), attest.Evidence{Token: used})
		if err != nil || time.Until(until) > time.Minute || time.Until(until) <= 0 {
			t.Errorf("a token that was accepted: %v, good for %v", err, time.Until(until))
		}
		w.refuse(t, unused, attest.ErrRefused, "expired")
		// The pod goes for a moment, and comes back.
		w.pods.Delete(server.PodUID)
		w.refuse(t, used, attest.ErrUnknownPod, "")
		w.pods.Set(server)
		w.accept(t, used)
		// A successor knows it, also if it is started with what an outage left.
		during, _ := w.Export()
		for _, s := range [][]byte{saved, during} {
			again := newWorld(t, func(c *attest.Config) { c.Outage, c.Keys, c.Pods = outage.on, w.keys, w.pods })
			if err := again.Load(s); err != nil {
				t.Fatal(err)
			}
			again.accept(t, used)
			again.refuse(t, unused, attest.ErrRefused, "expired")
		}
		// Under another key of that ID it is nothing.
		foreign := newWorld(t, func(c *attest.Config) { c.Outage, c.Pods = outage.on, w.pods })
		if err := foreign.Load(saved); err != nil {
			t.Fatal(err)
		}
		foreign.refuse(t, used, attest.ErrRefused, "")

		outage.Store(false)
		w.refuse(t, used, attest.ErrRefused, "expired")
		outage.Store(true)
		w.refuse(t, used, attest.ErrRefused, "expired") // forgotten for good
		if s, _ := w.Export(); bytes.Count(s, []byte("podUID")) != 0 {
			t.Errorf("what was forgotten is saved: %s", s)
		}
	})
}

// TestOutagesReviveNothing: a token that expired while it could be replaced is not
// good again in a later outage, though it was accepted once and nobody has asked for
// it since.
func TestOutagesReviveNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var outage outage
		w := newWorld(t, func(c *attest.Config) { c.Outage = outage.on })
		old := w.issuer.Token(server, audience)
		w.accept(t, old)
		time.Sleep(time.Hour)
		fresh := w.issuer.Token(server, audience)
		w.accept(t, fresh)
		outage.Store(true)
		time.Sleep(time.Hour)
		if s, _ := w.Export(); bytes.Count(s, []byte("podUID")) != 1 {
			t.Errorf("more than the fresh token is saved: %s", s)
		}
		g := newGated(t, func(c *attest.GateConfig) { c.Attestor, c.Pods = w.Attestor, w.pods })
		if _, _, err := g.stream(t, bearing(t.Context(), old), "Deaf"); status.Code(err) != codes.Unauthenticated {
			t.Errorf("a stream with the old token: %v", err)
		}
		w.refuse(t, old, attest.ErrRefused, "expired")
		w.accept(t, fresh)
	})
}

// outage is on since it was stored; the zero outage never was.
type outage struct{ since atomic.Pointer[time.Time] }

func (o *outage) Store(on bool) {
	o.since.Store(nil)
	if now := time.Now(); on {
		o.since.Store(&now)
	}
}

func (o *outage) on() (since time.Time, on bool) {
	if s := o.since.Load(); s != nil {
		return *s, true
	}
	return since, false
}

func TestSavedProofsAreChecked(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *attest.Config) { c.Outage = func() (since time.Time, on bool) { return since, true } })
	token := w.issuer.Token(server, audience)
	w.accept(t, token)
	saved, _ := w.Export()
	for i := range saved {
		again := newWorld(t, func(c *attest.Config) { c.Keys, c.Pods = w.keys, w.pods })
		if again.Load(saved[:i]) == nil {
			t.Fatalf("cut after %d bytes: taken", i)
		}
	}
	again := newWorld(t, func(c *attest.Config) { c.Keys, c.Pods, c.CacheSize = w.keys, w.pods, 1 })
	if err := again.Load(bytes.Replace(saved, []byte(`"version":1`), []byte(`"version":2`), 1)); err == nil {
		t.Error("a newer format is taken")
	}
}

// TestOutageKeepsStreams: a stream goes on while its token cannot be replaced, as long
// as its pod is in the view, and ends when it could be.
func TestOutageKeepsStreams(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var outage outage
		w := newWorld(t, func(c *attest.Config) { c.Outage = outage.on })
		g := newGated(t, func(c *attest.GateConfig) { c.Attestor, c.Pods = w.Attestor, w.pods })
		ctx := bearing(t.Context(), w.issuer.Token(server, audience))
		open := func() func() (string, error) {
			first, s, err := g.stream(t, ctx, "Deaf")
			if err != nil || first != "echo" {
				t.Fatal(first, err)
			}
			return func() (string, error) {
				_ = s.SendMsg(wrapperspb.String("again")) // Recv says why it fails
				return recv(s)
			}
		}
		echo, gone := open(), open()
		outage.Store(true)
		for range 30 {
			time.Sleep(time.Minute)
			if m, err := echo(); err != nil || m != "again" {
				t.Fatalf("in an outage: %q, %v", m, err)
			}
		}
		// A new stream with the same token is as good.
		late := open()
		w.pods.Delete(server.PodUID)
		synctest.Wait()
		if _, err := gone(); status.Code(err) != codes.Unauthenticated {
			t.Errorf("after the pod is gone: %v", err)
		}
		w.pods.Set(server)
		again := open()
		outage.Store(false)
		time.Sleep(time.Minute)
		if _, err := again(); status.Code(err) != codes.Unavailable || status.Convert(err).Message() != attest.Public(attest.ErrProofExpires) {
			t.Errorf("after the outage: %v", err)
		}
		for _, s := range []func() (string, error){echo, late} {
			if _, err := s(); err == nil {
				t.Error("a stream of the pod that was gone goes on")
			}
		}
	})
}
