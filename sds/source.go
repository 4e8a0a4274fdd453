package sds

import (
	"context"

	"google.golang.org/protobuf/types/known/anypb"

	"github.com/signet-mesh/signet/identity"
)

// Wildcard is the name that stands for all that a [Source] gives by default.
const Wildcard = "*"

// Resource is one named resource in one version. It must not be changed after it
// was handed on; Body may be shared by many streams.
type Resource struct {
	Name string
	// Version changes exactly when Body does. It is public: it is logged by
	// clients, and must not be derived from secrets.
	Version string
	// Body is nil while the resource exists but has no content yet.
	Body *anypb.Any
	// TrustSequence is the sequence of the trust that Body carries, for a resource
	// that is a trust bundle, else zero. See [Server.Acknowledged].
	TrustSequence uint64
}

// Source is what a stream serves. It must be safe for concurrent use and must not
// wait for anything slow.
type Source interface {
	// Resources is what caller gets for names, which are unique, and may hold
	// [Wildcard]. A name that the caller must not have or that does not exist is
	// left out. Resources that were not asked for are not sent.
	//
	// changed is closed when another call would answer differently; it may be
	// closed without a difference; nil means never. ctx ends when nobody waits for
	// changed any more, and carries the identity.Caller.
	//
	// If err is not nil, rs is what could be answered all the same, and a name that
	// it lacks is unknown for now, not gone; the call is repeated when changed is
	// closed, and after some seconds at the latest.
	Resources(ctx context.Context, caller identity.Workload, typeURL string, names []string) (rs []Resource, changed <-chan struct{}, err error)
}
