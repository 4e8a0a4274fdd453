package identity

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Workload is a verified fact about a pod, whoever proved it. A Workload must
// not be changed after it was handed on; its map and slice may be shared.
type Workload struct {
	Namespace      string
	ServiceAccount string
	// ServiceAccountUID tells a service account from a later one of the same
	// name; empty where the evidence does not say.
	ServiceAccountUID string
	// Pod is the pod's name; it may be reused, PodUID never is.
	Pod    string
	PodUID string
	// Node is the node's name; it may be reused, NodeUID never is. NodeUID is
	// empty where the evidence does not say.
	Node    string
	NodeUID string
	// Labels are the pod's labels, from the view of the pods, never from a
	// request.
	Labels map[string]string
	// Addresses are the pod's IP addresses; nil where they are not known.
	Addresses []netip.Addr
	// UnixUID is the user that the workload runs as, where a static list says
	// so, else nil.
	UnixUID *uint32
}

// ID renders the workload's SPIFFE ID. It fails if the namespace or the service
// account cannot be a path segment.
func (w Workload) ID(td spiffeid.TrustDomain) (spiffeid.ID, error) {
	return WorkloadID(td, w.Namespace, w.ServiceAccount)
}

// IsZero reports whether w says nothing.
func (w Workload) IsZero() bool { return w.PodUID == "" && w.Namespace == "" && w.ServiceAccount == "" }

// Equal reports whether w and o state the same facts.
func (w Workload) Equal(o Workload) bool {
	return w.Namespace == o.Namespace && w.ServiceAccount == o.ServiceAccount &&
		w.ServiceAccountUID == o.ServiceAccountUID && w.Pod == o.Pod &&
		w.PodUID == o.PodUID && w.Node == o.Node && w.NodeUID == o.NodeUID &&
		maps.Equal(w.Labels, o.Labels) && slices.Equal(w.Addresses, o.Addresses) &&
		(w.UnixUID == nil) == (o.UnixUID == nil) && (w.UnixUID == nil || *w.UnixUID == *o.UnixUID)
}

// Caller is a workload on the other end of an RPC, and what proved it.
type Caller struct {
	Workload Workload
	// Until is when the proof stops to hold. The RPC's context ends before.
	Until time.Time
	// Token is the service-account token that was the proof, empty for other
	// kinds of proof. It is a secret: it goes to the authority as evidence and
	// nowhere else.
	Token string
}

// String names the workload, without the token.
func (c Caller) String() string {
	return fmt.Sprintf("%s/%s (pod %s) until %s", c.Workload.Namespace, c.Workload.ServiceAccount, c.Workload.PodUID, c.Until.UTC().Format(time.RFC3339))
}

// GoString is String, so that no verb prints the token.
func (c Caller) GoString() string { return c.String() }

// LogValue implements slog.LogValuer without the token.
func (c Caller) LogValue() slog.Value { return slog.StringValue(c.String()) }

type callerKey struct{}

// callerContext is a context with a caller, as one piece of memory: each RPC has one.
type callerContext struct {
	context.Context
	caller Caller
}

// Value implements context.Context.
func (c *callerContext) Value(key any) any {
	if key == (callerKey{}) {
		return &c.caller
	}
	return c.Context.Value(key)
}

// WithCaller returns a context that carries the proven caller of an RPC.
func WithCaller(ctx context.Context, c Caller) context.Context {
	return &callerContext{ctx, c}
}

// CallerFrom is the proven caller of the RPC that ctx belongs to. ok is false
// if nobody proved anything; the RPC must then be refused.
func CallerFrom(ctx context.Context) (c Caller, ok bool) {
	if p := CallerIn(ctx); p != nil {
		return *p, true
	}
	return Caller{}, false
}

// CallerIn is CallerFrom without a copy: the caller must not be changed, and is nil
// if nobody proved anything.
func CallerIn(ctx context.Context) *Caller {
	c, _ := ctx.Value(callerKey{}).(*Caller)
	return c
}
