package kube_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/ca/kube"

	"github.com/go-logr/logr"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	"k8s.io/klog/v2"
)

// lease is the Lease at the API server.
type lease struct {
	mu      sync.Mutex
	record  *resourcelock.LeaderElectionRecord // guarded by mu
	version int                                // guarded by mu
}

// replica is an authority that wants the duties.
type replica struct {
	t     *testing.T
	name  string
	lease *lease
	term  kube.Term
	rand  *mathrand.Rand
	stop  func()

	mu      sync.Mutex
	hang    chan struct{} // closed when calls go on; nil: they do; guarded by mu
	seen    int           // the version that an update needs; guarded by mu
	working bool          // it does the duties; guarded by mu
}

// reach waits until the API server is reached. applied says that a call which failed
// was carried out all the same.
func (r *replica) reach(ctx context.Context) (applied bool, err error) {
	r.mu.Lock()
	hang, applied, lost := r.hang, r.rand.IntN(2) == 0, r.rand.IntN(20) == 0
	r.mu.Unlock()
	if hang == nil {
		if lost {
			return applied, errors.New("the answer was lost")
		}
		return true, nil
	}
	select {
	case <-hang:
		return true, nil
	case <-ctx.Done():
		return applied, ctx.Err()
	}
}

func (r *replica) Get(ctx context.Context) (*resourcelock.LeaderElectionRecord, []byte, error) {
	if _, err := r.reach(ctx); err != nil {
		return nil, nil, err
	}
	r.lease.mu.Lock()
	defer r.lease.mu.Unlock()
	if r.lease.record == nil {
		return nil, nil, apierrors.NewNotFound(schema.GroupResource{}, "lease")
	}
	r.mu.Lock()
	r.seen = r.lease.version
	r.mu.Unlock()
	raw, err := json.Marshal(r.lease.record)
	record := *r.lease.record
	return &record, raw, err
}

func (r *replica) Create(ctx context.Context, to resourcelock.LeaderElectionRecord) error {
	return r.write(ctx, to, func() bool { return r.lease.record == nil })
}

func (r *replica) Update(ctx context.Context, to resourcelock.LeaderElectionRecord) error {
	r.mu.Lock()
	seen := r.seen
	r.mu.Unlock()
	return r.write(ctx, to, func() bool { return r.lease.record != nil && r.lease.version == seen })
}

func (r *replica) write(ctx context.Context, to resourcelock.LeaderElectionRecord, may func() bool) error {
	if _, working := r.state(); working && to.HolderIdentity != r.name {
		r.t.Errorf("%s gives the Lease back while it does the duties", r.name)
	}
	applied, err := r.reach(ctx)
	r.lease.mu.Lock()
	defer r.lease.mu.Unlock()
	if applied && may() {
		r.lease.record, r.lease.version = &to, r.lease.version+1
		if err == nil {
			r.mu.Lock()
			r.seen = r.lease.version
			r.mu.Unlock()
		}
		return err
	}
	if err == nil {
		err = apierrors.NewConflict(schema.GroupResource{}, "lease", errors.New("changed"))
	}
	return err
}

func (*replica) RecordEvent(string) {}
func (r *replica) Identity() string { return r.name }
func (r *replica) Describe() string { return "lease" }

func (r *replica) cut(on bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case on && r.hang == nil:
		r.hang = make(chan struct{})
	case !on && r.hang != nil:
		close(r.hang)
		r.hang = nil
	}
}

func (r *replica) state() (cut, working bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.hang != nil, r.working
}

// run wants the duties until stop.
func (r *replica) run() {
	ctx, cancel := context.WithCancel(klog.NewContext(context.Background(), logr.Discard()))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := r.term.Elect(ctx, r, func(ctx context.Context) {
			r.mu.Lock()
			again := r.working
			r.working = true
			r.mu.Unlock()
			if again {
				r.t.Errorf("%s does the duties twice at once", r.name)
			}
			<-ctx.Done()
			// Ending takes its time; the Lease must not be given back before.
			time.Sleep(time.Second)
			r.mu.Lock()
			r.working = false
			r.mu.Unlock()
		}); err != nil {
			r.t.Error(err)
		}
	}()
	r.stop = func() { cancel(); <-ended }
}

// TestOneReplicaIsElected cuts replicas off from the API server at random, restarts
// them, and lets them come back: no two may change anything at the same moment, nor
// may one whose duties have ended, and when all is well for a while somebody does them.
func TestOneReplicaIsElected(t *testing.T) {
	turns := 0
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) {
			random := mathrand.New(mathrand.NewPCG(seed, 0))
			at := &lease{}
			var all []*replica
			for i := range 3 {
				r := &replica{t: t, name: fmt.Sprintf("ca-%d", i), lease: at, rand: mathrand.New(mathrand.NewPCG(seed, uint64(i)))}
				r.run()
				all = append(all, r)
				defer func() { r.cut(false); r.stop() }()
			}
			lastElected, idle := "", time.Duration(0)
			const tick = 100 * time.Millisecond
			watch := func(d time.Duration) {
				for range d / tick {
					time.Sleep(tick)
					synctest.Wait()
					var on []string
					well := true
					for _, r := range all {
						cut, _ := r.state()
						well = well && !cut
						if r.term.On() {
							on = append(on, r.name)
						}
					}
					if len(on) > 1 {
						t.Fatalf("seed %d: %s may all write", seed, strings.Join(on, ", "))
					}
					if len(on) == 1 && on[0] != lastElected {
						lastElected = on[0]
						turns++
					}
					if idle += tick; len(on) == 1 || !well {
						idle = 0
					}
					if idle > kube.LeaseDuration+2*kube.RetryPeriod*12/10+tick {
						t.Fatalf("seed %d: nobody is elected for %v while all is well", seed, idle)
					}
				}
			}
			for range 40 {
				r := all[random.IntN(len(all))]
				for _, elected := range all {
					if elected.term.On() && random.IntN(2) == 0 {
						r = elected
					}
				}
				switch cut, _ := r.state(); {
				case cut:
					r.cut(false)
				case random.IntN(3) > 0:
					r.cut(true)
				default:
					stopped := make(chan struct{})
					go func() { defer close(stopped); r.stop() }()
					for waiting := true; waiting; {
						watch(tick)
						select {
						case <-stopped:
							waiting = false
						default:
						}
					}
					r.run()
				}
				watch(time.Duration(random.IntN(30_000)) * time.Millisecond)
			}
			for _, r := range all {
				r.cut(false)
			}
			watch(time.Minute)
			for _, r := range all {
				r.stop()
				if _, working := r.state(); working || r.term.On() {
					t.Errorf("%s goes on after its end", r.name)
				}
			}
		})
	}
	t.Logf("%d turns of duty", turns)
	if turns < 100 {
		t.Error("hardly anybody took over")
	}
}

// TestOnlyTheElectedReplicaWrites: what the duties' client does is refused before it
// leaves this process.
func TestOnlyTheElectedReplicaWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &replica{t: t, name: "ca-0", lease: &lease{}, rand: mathrand.New(mathrand.NewPCG(1, 1))}
		var sent []string
		client := r.term.Transport(roundTrip(func(q *http.Request) { sent = append(sent, q.Method) }))
		try := func(want ...string) {
			t.Helper()
			sent = nil
			for _, m := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"} {
				q, err := http.NewRequest(m, "https://api", nil)
				if err != nil {
					t.Fatal(err)
				}
				_, err = client.RoundTrip(q)
				if (err == nil) != slices.Contains(sent, m) {
					t.Errorf("%s: %v", m, err)
				}
			}
			if !slices.Equal(sent, want) {
				t.Errorf("sent %v, want %v", sent, want)
			}
		}
		try("GET", "HEAD")
		r.run()
		time.Sleep(time.Second)
		try("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
		// It cannot renew: before another one may take over, it ends.
		r.cut(true)
		time.Sleep(11 * time.Second)
		try("GET", "HEAD")
		r.cut(false)
		time.Sleep(time.Minute)
		try("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
		r.stop()
		try("GET", "HEAD")
	})
}

type roundTrip func(*http.Request)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) {
	f(r)
	return &http.Response{StatusCode: http.StatusOK, Body: http.NoBody}, nil
}
