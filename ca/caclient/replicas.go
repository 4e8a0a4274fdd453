package caclient

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
)

// errLeft is why a session ended with a replica that answers and cannot do its work.
var errLeft = errors.New("the replica cannot do its work, so another one is tried")

// errOverdue is why a session ended on which the agent's SVID could not be renewed: the
// next one does that first.
var errOverdue = errors.New("the agent's SVID is not renewed")

// leaveAfter is how often in a row a stream may fail before another replica is tried.
const leaveAfter = 4

// rankAfter is how long an address that was put last stays there.
const rankAfter = 10 * time.Minute

// leaveAgain is how often, at most, a replica is left that is cut off from where pods are
// known, or from the state that replicas share.
const leaveAgain = time.Minute

// leaveWithin is in how long, at most, a replica is left that is cut off from the shared
// state: all its agents are told at once, and do not come to the others at once.
const leaveWithin = 5 * time.Second

// leaveIn is in how long a replica is left that is cut off from the shared state: in some
// seconds, or later where one was left already. All may be cut off, and then agents do not
// go from one to the other together. random is in [0, 1).
func leaveIn(last *time.Time, now time.Time, random float64) time.Duration {
	soon := time.Duration(random * float64(leaveWithin))
	if last == nil {
		return soon
	}
	pause := leaveAgain/2 + time.Duration(random*float64(leaveAgain/2))
	return max(pause-now.Sub(*last), soon)
}

// order is the order in which replicas are tried. Each agent begins with its own, so that
// agents spread over the replicas, and keeps it, so that it stays with one: grpc's
// pick_first moves on when that is gone. A replica that answers and cannot do its work
// goes to the end for a while; a session that begins later begins with it again, or agents
// would pile up where nothing ever went wrong.
type order struct {
	ranked []string // not changed

	mu   sync.Mutex
	left map[string]time.Time // when addresses were put last; guarded by mu
}

func newOrder(node string, addresses []string) *order {
	rank := func(address string) []byte {
		h := sha256.Sum256([]byte(node + "\x00" + address))
		return h[:]
	}
	out := slices.Clone(addresses)
	slices.SortStableFunc(out, func(a, b string) int { return bytes.Compare(rank(a), rank(b)) })
	return &order{ranked: out, left: map[string]time.Time{}}
}

func (o *order) at(now time.Time) []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	for a, t := range o.left {
		if now.Sub(t) >= rankAfter {
			delete(o.left, a)
		}
	}
	out := slices.Clone(o.ranked)
	slices.SortStableFunc(out, func(a, b string) int { return o.left[a].Compare(o.left[b]) })
	return out
}

// last puts an address at the end.
func (o *order) last(address string, now time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if slices.Contains(o.ranked, address) {
		o.left[address] = now
	}
}

// replicas resolves to addresses in that order.
func replicas(addresses []string) resolver.Builder {
	r := manual.NewBuilderWithScheme("signet")
	var s resolver.State
	for _, a := range addresses {
		s.Addresses = append(s.Addresses, resolver.Address{Addr: a})
	}
	r.InitialState(s)
	return r
}

// reached notes which address was connected to last.
type reached struct {
	mu      sync.Mutex
	address string // guarded by mu
}

func (r *reached) value() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.address
}

// dialer is dial, or TCP if that is nil, and notes what it reached.
func (r *reached) dialer(dial func(ctx context.Context, address string) (net.Conn, error)) func(ctx context.Context, address string) (net.Conn, error) {
	if dial == nil {
		dial = func(ctx context.Context, address string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", address)
		}
	}
	return func(ctx context.Context, address string) (net.Conn, error) {
		conn, err := dial(ctx, address)
		if err == nil {
			r.mu.Lock()
			r.address = address
			r.mu.Unlock()
		}
		return conn, err
	}
}

// leave ends the session, so that another replica is tried. Behind one address, as that of
// a Service, there can be several, too: a new connection reaches one of those that are
// ready. So an address alone is left like others, at the same pace.
func (s *session) leave() {
	select {
	case s.left <- struct{}{}:
	default:
	}
}
