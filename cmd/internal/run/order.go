package run

import (
	"context"
	"errors"
	"sync"
)

// Job is work that goes on until its context ends, and then returns nil.
type Job func(context.Context) error

// InOrder runs loops and servers until ctx ends or one of them fails, and ends
// them in order: ending is called (readiness off), then the servers stop and
// drain, then the loops, so that whatever a last RPC needs is still there. It
// returns when all have, with every error. What must close last, storage, the
// caller closes after.
func InOrder(ctx context.Context, ending func(cause error), loops, servers []Job) error {
	serving, stopServing := context.WithCancelCause(ctx)
	defer stopServing(nil)
	looping, stopLooping := context.WithCancel(context.WithoutCancel(ctx))
	defer stopLooping()

	var mu sync.Mutex
	var errs []error // guarded by mu
	start := func(wg *sync.WaitGroup, ctx context.Context, jobs []Job) {
		for _, j := range jobs {
			wg.Go(func() {
				err := j(ctx)
				if ctx.Err() != nil && errors.Is(err, context.Canceled) {
					err = nil // it says that it ended because it was to end
				}
				if err != nil {
					mu.Lock()
					errs = append(errs, err)
					mu.Unlock()
					stopServing(err)
				}
			})
		}
	}
	var loopsDone, serversDone sync.WaitGroup
	start(&loopsDone, looping, loops)
	start(&serversDone, serving, servers)
	<-serving.Done()
	ending(context.Cause(serving))
	serversDone.Wait()
	stopLooping()
	loopsDone.Wait()
	return errors.Join(errs...)
}
