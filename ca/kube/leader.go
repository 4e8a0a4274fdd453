package kube

import (
	"context"
	"fmt"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
)

// LeaseName is the Lease, in the namespace of the installation, whose holder has
// the duties.
const LeaseName = "signet-ca"

// lead does the duties whenever this replica holds the Lease, until ctx ends.
func (c *Cluster) lead(ctx context.Context, duties func(context.Context)) error {
	lock := &resourcelock.LeaseLock{
		LeaseMeta:  metav1.ObjectMeta{Namespace: c.cfg.Namespace, Name: LeaseName},
		Client:     c.leases,
		LockConfig: resourcelock.ResourceLockConfig{Identity: c.cfg.Name},
	}
	for ctx.Err() == nil {
		var busy sync.WaitGroup
		e, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
			Lock: lock, LeaseDuration: 15 * time.Second, RenewDeadline: 10 * time.Second, RetryPeriod: 2 * time.Second,
			ReleaseOnCancel: true, Name: LeaseName,
			Callbacks: leaderelection.LeaderCallbacks{
				OnStartedLeading: func(ctx context.Context) {
					// The elector does not wait for this; we do, so that the next turn
					// does not begin beside it.
					busy.Add(1)
					defer busy.Done()
					c.log.Info("this replica has the duties of the elected one", "lease", LeaseName, "name", c.cfg.Name)
					c.metrics.leading.Set(1)
					defer c.metrics.leading.Set(0)
					duties(ctx)
				},
				OnStoppedLeading: func() {},
			},
		})
		if err != nil {
			return fmt.Errorf("electing a replica: %w", err)
		}
		e.Run(ctx)
		busy.Wait()
	}
	return nil
}
