package run

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// lookAtSocket is how often it is looked whether a socket is still this process's.
const lookAtSocket = time.Second

// Streams ends the streams of a server that leaves: those of proxies never end by
// themselves, and whoever waits for them keeps its successor waiting. Make it with
// [NewStreams], have its Intercept around every other interceptor, and give it to
// [ServeGRPC].
type Streams struct {
	leaving context.Context
	end     context.CancelFunc
}

// NewStreams makes a Streams.
func NewStreams() *Streams {
	s := &Streams{}
	s.leaving, s.end = context.WithCancel(context.Background())
	return s
}

var errLeaving = errors.New("the server leaves")

// Intercept is a grpc.StreamServerInterceptor. When the server leaves, the context of
// the stream ends, and the client is told to come back (Unavailable), whatever the
// handler returns.
func (s *Streams) Intercept(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, cancel := context.WithCancelCause(ss.Context())
	defer cancel(nil)
	stop := context.AfterFunc(s.leaving, func() { cancel(errLeaving) })
	defer stop()
	err := handler(srv, endingStream{ss, ctx})
	if errors.Is(context.Cause(ctx), errLeaving) {
		return status.Error(codes.Unavailable, "the server leaves; come back to its successor")
	}
	return err
}

// endingStream is a stream with another context. It holds one because
// grpc.ServerStream is asked for one.
type endingStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s endingStream) Context() context.Context { return s.ctx }

// ServeGRPC serves on l until ctx ends, then stops accepting, ends the streams of
// streams, which may be nil, lets RPCs in flight end for at most drain, and cuts what
// is left. A nil error means that ctx ended. Another process that takes the place of a
// socket of [ListenUnix] is an error within seconds: nobody would find this one.
func ServeGRPC(ctx context.Context, s *grpc.Server, l net.Listener, drain time.Duration, streams *Streams) error {
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	look := time.NewTicker(lookAtSocket)
	defer look.Stop()
	for serving := true; serving; {
		select {
		case err := <-done:
			return fmt.Errorf("serving on %s: %w", l.Addr(), err)
		case <-look.C:
			u, ok := l.(*unixListener)
			if !ok {
				continue
			}
			if err := u.replaced(); err != nil {
				s.Stop()
				<-done
				return fmt.Errorf("serving on %s: %w", u.path, err)
			}
		case <-ctx.Done():
			serving = false
		}
	}
	graceful := make(chan struct{})
	go func() {
		s.GracefulStop()
		close(graceful)
	}()
	if streams != nil {
		streams.end()
	}
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
