package etcd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"time"

	"github.com/signet-mesh/signet/storage"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// errMissing is fs.ErrNotExist as something that is wrong with a store.
var errMissing = fmt.Errorf("nothing was begun there: %w", fs.ErrNotExist)

// errFull is why nothing can be recorded in a cluster whose database has reached its
// quota. etcd then refuses everything but reading and deleting, on every member, until an
// administrator says that there is space again.
var errFull = errors.New("etcd is full (alarm NOSPACE) and takes nothing more: have it forget old revisions (etcdctl compact), defragment every member (etcdctl defrag), " +
	"or give it more (--quota-backend-bytes), then disarm the alarm (etcdctl alarm disarm)")

// explained says what to do about an answer of etcd that needs an administrator.
func explained(err error) error {
	if errors.Is(rpctypes.Error(err), rpctypes.ErrNoSpace) {
		return fmt.Errorf("%w: %w", errFull, err)
	}
	return err
}

// finalError is the answer, and not a reason to ask again.
type finalError struct{ err error }

func (e finalError) Error() string { return e.err.Error() }
func (e finalError) Unwrap() error { return e.err }

// final marks an error as an answer; nil stays nil.
func final(err error) error {
	if err == nil {
		return nil
	}
	return finalError{err}
}

// refused reports whether an error says that etcd did not even try: what was asked for
// did not happen and asking again changes nothing. All other errors of a request leave
// open whether it happened, or will.
func refused(err error) bool {
	if errors.As(err, &finalError{}) {
		return true
	}
	// Only what etcd says itself counts; a proxy or a library may mean anything.
	code := codes.Unknown
	var e rpctypes.EtcdError
	if errors.As(rpctypes.Error(err), &e) {
		code = e.Code()
	} else if s, ok := status.FromError(err); ok && s.Code() == codes.PermissionDenied {
		code = s.Code()
	}
	switch code {
	case codes.InvalidArgument, codes.NotFound, codes.FailedPrecondition, codes.PermissionDenied, codes.OutOfRange:
		return true
	case codes.ResourceExhausted:
		return errors.Is(rpctypes.Error(err), rpctypes.ErrNoSpace)
	}
	return false
}

// try calls f, which makes one request, until it gets an answer, etcd refuses, the
// context ends or too much time has passed. The client asks another member each time.
func (s *Store) try(ctx context.Context, f func(ctx context.Context) error) error {
	if err := s.ended(ctx); err != nil {
		return err
	}
	deadline := time.Now().Add(attempts * s.timeout)
	pause := 20 * time.Millisecond
	for {
		err := s.once(ctx, f)
		if err == nil {
			return nil
		}
		if done := s.ended(ctx); done != nil {
			return done
		}
		var answer finalError
		if errors.As(err, &answer) {
			return answer.err
		}
		if refused(err) {
			return explained(err)
		}
		s.suspicious()
		pause = min(2*pause, time.Second)
		wait := time.Duration((0.5 + rand.Float64()/2) * float64(pause))
		if time.Now().Add(wait).After(deadline) {
			return fmt.Errorf("no answer within %v: %w", attempts*s.timeout, err)
		}
		if err := s.sleep(ctx, wait); err != nil {
			return err
		}
	}
}

// once calls f with the time that one request may take.
func (s *Store) once(ctx context.Context, f func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	defer context.AfterFunc(s.life, cancel)()
	// A member that has lost the others says so at once.
	return f(clientv3.WithRequireLeader(ctx))
}

// ended is why nothing is tried any more, nil if something is.
func (s *Store) ended(ctx context.Context) error {
	if s.life.Err() != nil {
		return storage.ErrClosed
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}

func (s *Store) sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-s.life.Done():
	case <-t.C:
	}
	return s.ended(ctx)
}
