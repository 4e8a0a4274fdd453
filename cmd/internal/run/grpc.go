package run

import (
	"context"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
)

// ServeGRPC serves on l until ctx ends, then stops accepting, lets RPCs in flight
// end for at most drain, and cuts what is left: streams of agents and proxies
// never end by themselves. A nil error means that ctx ended.
func ServeGRPC(ctx context.Context, s *grpc.Server, l net.Listener, drain time.Duration) error {
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	select {
	case err := <-done:
		return fmt.Errorf("serving on %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	graceful := make(chan struct{})
	go func() {
		s.GracefulStop()
		close(graceful)
	}()
	t := time.NewTimer(drain)
	defer t.Stop()
	select {
	case <-graceful:
	case <-t.C:
		s.Stop()
		<-graceful
	}
	<-done
	return nil
}
