package limit_test

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca/limit"
)

// fill takes places until there is no more for a holder.
func fill(p *limit.Places, holder string, now time.Time, end func()) (n int) {
	for {
		if _, ok := p.Take(holder, now, end); !ok {
			return n
		}
		n++
	}
}

// TestAFewHoldersLeavePlaces: each has at most half of what the others leave.
func TestAFewHoldersLeavePlaces(t *testing.T) {
	t.Parallel()
	now := time.Unix(1, 0)
	p := limit.NewPlaces(limit.PlacesConfig{All: 2048, PerHolder: 512, Wait: time.Second})
	for i, want := range []int{512, 512, 342, 228} {
		if got := fill(p, fmt.Sprint(i), now, func() { t.Error("a place was taken away") }); got != want {
			t.Errorf("holder %d has %d places, want %d", i, got, want)
		}
	}
	if n := p.Taken(); n > 1600 {
		t.Errorf("four holders have %d of 2048 places", n)
	}
	if _, ok := p.Take("another", now, func() {}); !ok {
		t.Error("there is no place for another one")
	}
}

// TestWhoHasNoneGetsAnUnusedPlace when all are taken, the one that is unused for longest.
func TestWhoHasNoneGetsAnUnusedPlace(t *testing.T) {
	t.Parallel()
	start := time.Unix(1, 0)
	p := limit.NewPlaces(limit.PlacesConfig{All: 3, Wait: time.Second})
	ended := []int{}
	var places []*limit.Place
	for i := range 3 {
		place, ok := p.Take(fmt.Sprint(i), start.Add(time.Duration(i)*time.Millisecond), func() { ended = append(ended, i) })
		if !ok {
			t.Fatalf("no place for holder %d", i)
		}
		places = append(places, place)
	}
	places[0].Arrived()
	take := func(holder string, after time.Duration) bool {
		_, ok := p.Take(holder, start.Add(after), func() {})
		return ok
	}
	if take("another", time.Second) || len(ended) != 0 {
		t.Errorf("a place is given away before its time; ended: %v", ended)
	}
	if take("2", time.Hour) {
		t.Error("one who has a place got that of another one")
	}
	if !take("another", time.Second+time.Millisecond) || fmt.Sprint(ended) != "[1]" {
		t.Errorf("the place that is unused for longest is not given away; ended: %v", ended)
	}
	places[1].Leave() // it has none any more
	if p.Taken() != 3 {
		t.Errorf("%d places are taken", p.Taken())
	}
	for range 2 {
		places[0].Leave()
	}
	if p.Taken() != 2 {
		t.Errorf("%d places are taken after one was given back", p.Taken())
	}
}

// TestCallersBehindOneAddress: one who comes gets the place of one who does not use it.
func TestCallersBehindOneAddress(t *testing.T) {
	t.Parallel()
	start, ended := time.Unix(1, 0), 0
	p := limit.NewPlaces(limit.PlacesConfig{All: 32, Wait: time.Second, Shared: true})
	n := fill(p, "node", start, func() { ended++ })
	if n < 4 || n > 16 || ended != 0 {
		t.Errorf("one address has %d places, and %d were taken away", n, ended)
	}
	if _, ok := p.Take("node", start.Add(time.Second), func() {}); !ok || ended != 1 || p.Taken() != n {
		t.Errorf("there is a place: %v; %d were taken away, %d of %d are taken", ok, ended, p.Taken(), n)
	}
}

// TestPlacesAreCounted: whatever is done in whatever order, what is taken is what was not
// given back, and whoever has none is refused only where all places are in use.
func TestPlacesAreCounted(t *testing.T) {
	t.Parallel()
	for seed := range uint64(50) {
		r, now := rand.New(rand.NewPCG(seed, 1)), time.Unix(1, 0)
		p := limit.NewPlaces(limit.PlacesConfig{All: 8, PerHolder: 4, Wait: time.Second, Shared: seed%2 == 0})
		type one struct {
			holder  string
			place   *limit.Place
			arrived bool
		}
		held := map[int]*one{}
		for i := range 400 {
			now = now.Add(time.Duration(r.IntN(400)) * time.Millisecond)
			of := map[string]int{}
			for _, o := range held {
				of[o.holder]++
			}
			holder := fmt.Sprint(r.IntN(12))
			place, ok := p.Take(holder, now, func() {
				if held[i] == nil || held[i].arrived {
					t.Fatalf("seed %d: a place in use, or given back, is taken away", seed)
				}
				delete(held, i)
			})
			if ok {
				held[i] = &one{holder, place, false}
			} else if of[holder] == 0 && len(held) < 8 {
				t.Fatalf("seed %d: holder %s has none, %d are taken, and it gets none", seed, holder, len(held))
			}
			for k, o := range held {
				switch r.IntN(8) {
				case 0:
					o.place.Leave()
					delete(held, k)
				case 1, 2, 3:
					o.place.Arrived()
					o.arrived = true
				}
			}
			if p.Taken() != len(held) || len(held) > 8 {
				t.Fatalf("seed %d: %d are taken, %d were not given back", seed, p.Taken(), len(held))
			}
		}
	}
}
