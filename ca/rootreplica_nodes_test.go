//go:build !race

// See rotate_nodes_test.go for why not with -race.

package ca_test

import (
	"crypto/x509"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/ca"
)

// TestReplicasReplaceTheirRoot at half of its life: with the key with one
// of them, and with it in a device that both reach. Whatever either issues verifies
// at once with what agents of both have acknowledged, for as long as it lives.
func TestReplicasReplaceTheirRoot(t *testing.T) {
	for name, edit := range map[string]func(t *testing.T) func(*ca.Config){
		"one replica has the key": func(*testing.T) func(*ca.Config) {
			return func(c *ca.Config) { c.RootReplica = 1 }
		},
		"both reach a device": func(*testing.T) func(*ca.Config) { return newDevice().configure },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				shared := newShared(t)
				both := edit(t)
				a := newWorld(t, hours, both, func(c *ca.Config) { c.Shared, c.Instance = shared, 1 })
				stopA := a.run()
				b := newWorld(t, hours, both, func(c *ca.Config) { c.Shared = shared })
				stopB := b.run()
				na, nb := a.node(agentA, true), b.node(agentB, true)
				time.Sleep(time.Second)
				var leaves [][]*x509.Certificate
				roots := map[string]bool{}
				inters := map[*world]map[string]bool{a: {}, b: {}}
				for range 3 * 6 { // six hours
					for range 20*6 - 3 {
						time.Sleep(10 * time.Second)
						for _, w := range []*world{a, b} {
							if err := w.Ready(); err != nil {
								t.Fatalf("%v: %v", w.ID(), err)
							}
						}
					}
					leaves = append(leaves, a.once(), b.once())
					time.Sleep(30 * time.Second)
					for _, w := range []*world{a, b} {
						roots[idOf(w.Root())], inters[w][idOf(w.Intermediate())] = true, true
						if err := w.Ready(); err != nil {
							t.Fatalf("%v: %v", w.ID(), err)
						}
						if err := w.Alarms(); err != nil {
							t.Fatalf("%v: %v", w.ID(), err)
						}
					}
					leaves = slices.DeleteFunc(leaves, func(l []*x509.Certificate) bool { return !time.Now().Before(l[0].NotAfter) })
					for _, l := range leaves {
						for _, n := range []*node{na, nb} {
							if err := verifies(l, n.roots()...); err != nil {
								t.Fatalf("a leaf of instance %d does not verify on %s: %v", ca.Serial(l[0])[0], n.agent.Node, err)
							}
						}
					}
				}
				na.leave()
				nb.leave()
				if len(roots) < 2 || len(inters[a]) < 9 || len(inters[b]) < 9 || na.most != 2 || nb.most != 2 {
					t.Errorf("in six hours %d roots and %d and %d intermediates; %d and %d roots in a bundle at most", len(roots), len(inters[a]), len(inters[b]), na.most, nb.most)
				}
				t.Logf("note: in six hours %d roots, %d and %d intermediates", len(roots), len(inters[a]), len(inters[b]))
				if !a.Root().Equal(b.Root()) {
					t.Error("they have different roots")
				}
				if name == "one replica has the key" && rootKeys(b) != 0 {
					t.Errorf("the other replica has %d keys of roots", rootKeys(b))
				}
				stopA()
				stopB()
				for _, w := range []*world{a, b} {
					root := w.Root()
					w.close()
					w.open()
					if !w.Root().Equal(root) {
						t.Error("after opening again another root is active")
					}
					intact(t, w)
					w.close()
				}
			})
		})
	}
}

// TestTheRootsReplicaIsAway: the others issue for as long as their intermediates live,
// with alarms when a third and a tenth is left, and go on when it is back.
func TestTheRootsReplicaIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shared := newShared(t)
		one := func(c *ca.Config) { c.Shared, c.RootReplica = shared, 1 }
		a := newWorld(t, hours, one, func(c *ca.Config) { c.Instance = 1 })
		stopA := a.run()
		b := newWorld(t, hours, one)
		stopB := b.run()
		defer func() { stopB() }()
		before := b.Intermediate()
		stopA()
		a.close()
		alarm := func() string {
			if err := b.Alarms(); err != nil {
				for line := range strings.Lines(err.Error()) {
					if strings.HasPrefix(line, "root replica: ") {
						return line
					}
				}
			}
			return ""
		}
		life := time.Until(before.NotAfter)
		for _, c := range []struct {
			at    time.Duration
			alarm string
		}{{life * 6 / 10, ""}, {life * 7 / 10, "less than a third"}, {life * 92 / 100, "less than a tenth"}} {
			time.Sleep(time.Until(before.NotAfter.Add(-life + c.at)))
			if got := alarm(); (got == "") != (c.alarm == "") || !strings.Contains(got, c.alarm) || c.alarm != "" && !strings.Contains(got, "replica 1") {
				t.Errorf("after %v of %v: alarm %q", c.at, life, got)
			}
			if err := b.Ready(); err != nil {
				t.Errorf("after %v: %v", c.at, err)
			}
			if err := verifies(b.once(), trustOf(b).Roots()...); err != nil {
				t.Error(err)
			}
		}
		// Then nothing is issued any more, and it says why.
		time.Sleep(time.Until(before.NotAfter.Add(time.Second)))
		if err := b.Ready(); err == nil || !strings.Contains(err.Error(), "expired at") {
			t.Errorf("readiness: %v", err)
		}
		a.open()
		stopA = a.run()
		defer func() { stopA() }()
		for range 600 {
			if b.Ready() == nil {
				break
			}
			time.Sleep(time.Second)
		}
		if err := b.Ready(); err != nil || alarm() != "" || b.Intermediate().Equal(before) {
			t.Errorf("when it is back: %v, alarm %q", err, alarm())
		}
		if err := verifies(b.once(), trustOf(b).Roots()...); err != nil {
			t.Error(err)
		}
	})
}
