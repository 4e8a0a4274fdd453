package kube

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
)

// LeaseName is the Lease, in the namespace of the installation, whose holder has
// the duties.
const LeaseName = "signet-ca"

// Another replica takes over when the Lease was not renewed for leaseDuration, by its
// own clock. The holder ends its duties renewDeadline after it renewed it last: the
// difference is for what is under way then, and for clocks that do not run alike.
const (
	leaseDuration = 15 * time.Second
	renewDeadline = 10 * time.Second
	retryPeriod   = 2 * time.Second
)

// lead does the duties whenever this replica holds the Lease, until ctx ends. The
// Lease is given back only when they have ended.
func (c *Cluster) lead(ctx context.Context, duties func(context.Context)) error {
	lock := &resourcelock.LeaseLock{
		LeaseMeta:  metav1.ObjectMeta{Namespace: c.cfg.Namespace, Name: LeaseName},
		Client:     c.leases,
		LockConfig: resourcelock.ResourceLockConfig{Identity: c.cfg.Name},
	}
	return c.term.elect(ctx, lock, func(ctx context.Context) {
		c.log.Info("this replica has the duties of the elected one", "lease", LeaseName, "name", c.cfg.Name)
		c.metrics.leading.Set(1)
		defer c.metrics.leading.Set(0)
		duties(ctx)
		c.log.Info("this replica no longer has the duties of the elected one", "lease", LeaseName, "name", c.cfg.Name)
	})
}

// elect does the duties whenever lock is held, until ctx ends.
func (t *term) elect(ctx context.Context, lock resourcelock.Interface, duties func(context.Context)) error {
	for ctx.Err() == nil {
		working := make(chan struct{}, 1) // full while the duties of this turn are done
		run, cancel := context.WithCancel(ctx)
		end := func() {
			cancel()
			working <- struct{}{}
			<-working
		}
		e, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
			Lock:          &termLock{Interface: lock, term: t, end: end},
			LeaseDuration: leaseDuration, RenewDeadline: renewDeadline, RetryPeriod: retryPeriod,
			ReleaseOnCancel: true, Name: LeaseName,
			Callbacks: leaderelection.LeaderCallbacks{
				OnStartedLeading: func(context.Context) {
					working <- struct{}{}
					defer func() { <-working }()
					// The turn may be over before this goroutine runs.
					if run.Err() == nil {
						duties(run)
					}
				},
				OnStoppedLeading: func() {},
			},
		})
		if err != nil {
			cancel()
			return fmt.Errorf("electing a replica: %w", err)
		}
		e.Run(ctx)
		t.set(time.Time{})
		end() // the elector does not wait
	}
	return nil
}

// term is how long this replica may do what only the elected one may. client-go's
// elector alone does not see to that: one that was stopped for a while (a paused
// machine) goes on for up to ten seconds before it gives up, and what it does then it
// does beside its successor. So nothing is written but within renewDeadline of the
// moment at which the last good renewal began.
type term struct {
	mu      sync.Mutex
	renewed time.Time // zero: this replica is not the elected one; guarded by mu
}

func (t *term) set(renewed time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.renewed = renewed
}

func (t *term) on() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.renewed.IsZero() {
		return false
	}
	// By both clocks: the monotonic one stands still while a machine is suspended,
	// the other one can be set back.
	now := time.Now()
	return now.Sub(t.renewed) < renewDeadline && now.Round(0).Sub(t.renewed.Round(0)) < renewDeadline
}

// termLock notes for term what becomes of the lock.
type termLock struct {
	resourcelock.Interface
	term *term
	end  func() // ends the duties, and waits until they have ended
	// holder is whom the version of the Lease names that an update would replace.
	// Owned by the elector, which does one thing at a time.
	holder string
}

func (l *termLock) Get(ctx context.Context) (*resourcelock.LeaderElectionRecord, []byte, error) {
	r, raw, err := l.Interface.Get(ctx)
	if err != nil {
		return r, raw, err
	}
	if l.holder = r.HolderIdentity; l.holder != l.Identity() {
		l.term.set(time.Time{})
	}
	return r, raw, nil
}

func (l *termLock) Create(ctx context.Context, r resourcelock.LeaderElectionRecord) error {
	began := time.Now()
	err := l.Interface.Create(ctx, r)
	if err == nil {
		l.holder = r.HolderIdentity
		l.term.set(began)
	}
	return err
}

func (l *termLock) Update(ctx context.Context, r resourcelock.LeaderElectionRecord) error {
	began := time.Now()
	if r.HolderIdentity != l.Identity() { // it is given back
		began = time.Time{}
		l.term.set(began)
		l.end()
		if l.holder != l.Identity() {
			// client-go's elector asks nobody whose it is by now, and would take it
			// from a successor.
			return errNotElected
		}
	}
	err := l.Interface.Update(ctx, r)
	if err == nil {
		l.holder = r.HolderIdentity
		l.term.set(began)
	}
	return err
}

var errNotElected = errors.New("another replica may be the elected one")

// termTransport refuses every request that could change something while term is not on.
type termTransport struct {
	term *term
	http.RoundTripper
}

func (t termTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead && !t.term.on() {
		if r.Body != nil {
			r.Body.Close()
		}
		return nil, errNotElected
	}
	return t.RoundTripper.RoundTrip(r)
}
