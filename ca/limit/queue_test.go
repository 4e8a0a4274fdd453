package limit_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/ca/limit"
)

func newQueue(items int, wait time.Duration) *limit.Queue {
	return limit.NewQueue(limit.QueueConfig{Items: items, Wait: wait})
}

func urgent(agent string, items int) limit.Ask {
	return limit.Ask{Agent: agent, Items: items, Bytes: 100}
}

func inTime(agent string, items int) limit.Ask {
	return limit.Ask{Agent: agent, Urgency: limit.InTime, Items: items, Bytes: 100}
}

// TestQueueIsFairAndConservesWork: one agent with a thousand small batches, one with
// large ones and fifty with one each; while somebody waits nothing is idle, and who
// asks for little does not wait for those who ask for much.
func TestQueueIsFairAndConservesWork(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(64, time.Hour)
		const pace = 10 * time.Millisecond // of an item
		start := time.Now()
		var mu sync.Mutex
		done, end := map[string]int{}, map[string]time.Duration{}
		var wg sync.WaitGroup
		work := func(agent string, items int, u limit.Urgency) {
			wg.Go(func() {
				leave, err := q.Enter(t.Context(), limit.Ask{Agent: agent, Urgency: u, Items: items, Bytes: 100})
				if err != nil {
					t.Errorf("%s: %v", agent, err)
					return
				}
				time.Sleep(pace) // all items at once: capacity is items
				mu.Lock()
				done[agent] += items
				end[agent] = time.Since(start)
				mu.Unlock()
				leave()
			})
		}
		for range 1000 {
			work("many", 8, limit.Urgent)
		}
		synctest.Wait()
		for range 20 {
			work("large", 256, limit.Urgent)
		}
		synctest.Wait()
		for i := range 50 {
			work(fmt.Sprintf("small-%d", i), 8, limit.Urgent)
			work("renewals", 8, limit.InTime)
		}
		wg.Wait()
		// 64 and more in each 10 ms.
		total := 1000*8 + 20*256 + 100*8
		ideal := time.Duration(total) * pace / 64
		if took := time.Since(start); took > ideal*105/100 {
			t.Errorf("%d items took %v; without idling they take %v", total, took, ideal)
		}
		for agent, at := range end {
			if agent == "many" || agent == "large" || agent == "renewals" {
				continue
			}
			if at > ideal/4 {
				t.Errorf("%s ends after %v of %v", agent, at, ideal)
			}
		}
		if end["renewals"] < end["many"] || end["renewals"] < end["large"] {
			t.Errorf("renewals end after %v, before what is urgent", end["renewals"])
		}
	})
}

func TestQueueSendsAwayWhatItCannotDo(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(10, time.Second)
		hold, err := q.Enter(t.Context(), urgent("a", 10))
		if err != nil {
			t.Fatal(err)
		}
		// Nobody leaves: who waits is sent away when its caller has gone too, with a time.
		start := time.Now()
		_, err = q.Enter(t.Context(), urgent("b", 1))
		var busy *limit.Busy
		if !errors.As(err, &busy) || busy.After <= 0 || time.Since(start) != time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, err := q.Enter(ctx, urgent("c", 1)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
		// Those that left take nothing along.
		got := make(chan error, 1)
		go func() {
			leave, err := q.Enter(t.Context(), inTime("d", 10))
			if err == nil {
				leave()
			}
			got <- err
		}()
		synctest.Wait()
		hold()
		if err := <-got; err != nil {
			t.Errorf("after all have left: %v", err)
		}
		if n := q.Waiting(); n != 0 {
			t.Errorf("%d items wait", n)
		}
	})
}

func TestQueueRates(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := limit.NewRates(10, 20)
		now := time.Now()
		if d := r.Take("a", 20, now); d != 0 {
			t.Errorf("the burst: %v", d)
		}
		if d := r.Take("a", 5, now); d != 500*time.Millisecond {
			t.Errorf("more: %v", d)
		}
		if d := r.Take("b", 5, now); d != 0 {
			t.Errorf("another: %v", d)
		}
		if d := r.Take("a", 5, now.Add(500*time.Millisecond)); d != 0 {
			t.Errorf("in time: %v", d)
		}
		if d := r.Take("a", 1000, now.Add(time.Hour)); d != 0 {
			t.Errorf("more than the burst: %v", d)
		}
	})
}
