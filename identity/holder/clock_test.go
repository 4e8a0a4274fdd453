package holder_test

import (
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/identity/holder"
)

// TestTheClockOfANode: steps of five minutes and more, and wrong years, at a start and
// while a holder runs. No SVID is shown that has ended by the clock, none is lost, and what
// is missed is made up for within two minutes after the clock is right again.
func TestTheClockOfANode(t *testing.T) {
	const year = 365 * 24 * time.Hour
	for _, c := range []struct {
		name string
		off  time.Duration
		// has: there is an SVID by that clock, at a start and while it runs.
		boot, running bool
	}{
		{"-4m", -4 * time.Minute, true, true},
		{"+4m", 4 * time.Minute, true, true},
		{"-7m", -7 * time.Minute, false, true},
		{"+7m", 7 * time.Minute, true, true},
		{"+2h", 2 * time.Hour, false, false},
		{"-2h", -2 * time.Hour, false, true},
		{"-1y", -year, false, true},
		{"+1y", year, false, false},
	} {
		for _, boot := range []bool{false, true} {
			when := map[bool]string{false: "while it runs", true: "at a start"}[boot]
			t.Run(strings.ReplaceAll(c.name+" "+when, " ", "-"), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					a := newAuthority()
					w := caller(pod("web", "web-1"))
					a.pods.Set(w.Workload)
					var off atomic.Int64
					cfg := config(a)
					holder.WithNow(&cfg, func() time.Time { return time.Now().Round(0).Add(time.Duration(off.Load())) })
					if boot {
						off.Store(int64(c.off))
					}
					h := start(t, cfg)
					svid, _ := ask(t, h, w)
					synctest.Wait()
					want := c.boot
					if !boot {
						want = c.running
						if svid, _ = ask(t, h, w); svid == nil {
							t.Fatal("no SVID by the right clock")
						}
						// The authority is away: what there is must last.
						a.set(func() { a.before = a.down })
						off.Store(int64(c.off))
					}
					time.Sleep(5 * time.Minute)
					synctest.Wait()
					got, _ := ask(t, h, w)
					if (got != nil) != want {
						t.Errorf("by that clock there is an SVID: %v", got != nil)
					}
					if got != nil && !time.Now().Add(c.off).Before(got.Certificates[0].NotAfter) {
						t.Error("it has ended by that clock")
					}
					off.Store(0)
					time.Sleep(2 * time.Minute)
					synctest.Wait()
					again, _ := ask(t, h, w)
					switch {
					case again == nil:
						t.Error("right again: no SVID")
					case !boot && again != svid:
						t.Error("right again: it is another SVID, and the authority is away")
					}
					a.set(func() { a.before = nil })
					for range 20 {
						time.Sleep(10 * time.Minute)
						if s, _ := ask(t, h, w); s == nil || !time.Now().Before(s.Certificates[0].NotAfter) {
							t.Errorf("%v after that there is no SVID that is valid", 10*time.Minute)
						}
					}
					if err := h.Health(); err != nil {
						t.Error(err)
					}
					t.Logf("note: agent, clock %s %s: SVID %v; right again: an SVID within 2 min, renewed for 3 h, no restart", c.name, when, map[bool]string{true: "shown", false: "not shown"}[want])
				})
			})
		}
	}
}
