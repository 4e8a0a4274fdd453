package caclient

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"net"
	"slices"
	"sync"

	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
)

// errLeft is why a session ended with a replica that answers and cannot do its work.
var errLeft = errors.New("the replica cannot do its work, so another one is tried")

// leaveAfter is how often in a row a stream may fail before another replica is tried.
const leaveAfter = 4

// order is the order in which replicas are tried. Each agent begins with its own, so that
// agents spread over the replicas, and keeps it, so that it stays with one: grpc's
// pick_first moves on when that is gone. A replica that answers and cannot do its work
// goes to the end.
type order struct {
	mu        sync.Mutex
	addresses []string // guarded by mu; replaced, not changed
}

func newOrder(node string, addresses []string) *order {
	rank := func(address string) []byte {
		h := sha256.Sum256([]byte(node + "\x00" + address))
		return h[:]
	}
	out := slices.Clone(addresses)
	slices.SortStableFunc(out, func(a, b string) int { return bytes.Compare(rank(a), rank(b)) })
	return &order{addresses: out}
}

func (o *order) now() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.addresses
}

// last puts an address at the end.
func (o *order) last(address string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	i := slices.Index(o.addresses, address)
	if i < 0 {
		return
	}
	next := slices.Clone(o.addresses)
	o.addresses = append(slices.Delete(next, i, i+1), address)
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

// leave ends the session, so that another replica is tried, if there is one.
func (s *session) leave() {
	if len(s.c.cfg.Addresses) < 2 {
		return
	}
	select {
	case s.left <- struct{}{}:
	default:
	}
}
