package sds_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"testing"
	"testing/synctest"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/sds"
)

// pipe is a stream in memory.
type pipe[Req, Resp any] struct {
	grpc.ServerStream
	ctx context.Context
	in  chan *Req
	out chan *Resp
}

func (p *pipe[Req, Resp]) Context() context.Context { return p.ctx }

func (p *pipe[Req, Resp]) Recv() (*Req, error) {
	select {
	case r, ok := <-p.in:
		if !ok {
			return nil, io.EOF
		}
		return r, nil
	case <-p.ctx.Done():
		return nil, p.ctx.Err()
	}
}

func (p *pipe[Req, Resp]) Send(r *Resp) error {
	select {
	case p.out <- r:
		return nil
	case <-p.ctx.Done():
		return p.ctx.Err()
	}
}

// grab takes the service that a server registers.
type grab struct {
	impl secretv3.SecretDiscoveryServiceServer
}

func (g *grab) RegisterService(_ *grpc.ServiceDesc, impl any) {
	g.impl = impl.(secretv3.SecretDiscoveryServiceServer)
}

// model is what a client of either protocol must have been told, worked out the
// slow way: after each step, from scratch.
type model struct {
	w     *world
	sub   map[string]bool
	known map[string]string // name → content last sent, or told
}

const told = "(told that it is gone)"

// asked is the names that the client is to be told of.
func (m *model) asked() []string {
	names := maps.Clone(m.sub)
	if m.sub["*"] {
		for _, n := range m.w.wild {
			names[n] = true
		}
	}
	delete(names, "*")
	return slices.Sorted(maps.Keys(names))
}

// content is what the world has for pod-a under name.
func (m *model) content(name string) (content string, exists bool) {
	r, ok := m.w.rs[name]
	return r.Version, ok
}

// have and fresh are all that exists of what is asked for, and what of it is new.
func (m *model) have() (have, fresh []string) {
	for _, n := range m.asked() {
		if c, ok := m.content(n); ok && c != "" {
			have = append(have, n+"="+c)
			if m.known[n] != c {
				fresh = append(fresh, n+"="+c)
			}
		}
	}
	return have, fresh
}

// gone is what the client must hear to be gone.
func (m *model) gone() (gone []string) {
	if m.w.err != nil {
		return nil
	}
	for n := range m.sub {
		if _, ok := m.content(n); !ok && n != "*" && m.known[n] != told {
			gone = append(gone, "-"+n)
		}
	}
	for n := range m.known {
		_, ok := m.content(n)
		if !m.sub[n] && (!ok || !slices.Contains(m.asked(), n)) {
			gone = append(gone, "-"+n)
		}
	}
	slices.Sort(gone)
	return gone
}

var fuzzNames = []string{"default", "ROOTCA", "*", "nosuch", "mine", "key-of-b"}

func pick(b byte) (names []string) {
	for i, n := range fuzzNames {
		if b&(1<<i) != 0 {
			names = append(names, n)
		}
	}
	return names
}

func fuzzWorld() *world {
	w := newWorld()
	w.only["pod-b"] = map[string]sds.Resource{"key-of-b": resource("key-of-b", "secret", 0)}
	return w
}

// disturb changes the world as op and arg say; ok is false if op is not of the world.
func disturb(w *world, op, arg byte) (ok bool) {
	n := []string{"default", "ROOTCA", "mine", "default"}[arg%4]
	switch op {
	case 0:
		w.set(n, fmt.Sprint(arg/4%3+1), uint64(arg%2)*uint64(arg))
	case 1:
		w.update(func() { delete(w.rs, n) })
	case 2:
		w.update(func() { w.rs[n] = sds.Resource{Name: n} })
	case 3:
		w.update(func() { w.err = errors.New("out of order") })
	case 4:
		w.update(func() { w.err = nil })
	default:
		return false
	}
	return true
}

// steps calls f with each pair of bytes, in a bubble, as many as a stream takes
// without being slowed down.
func steps(t *testing.T, data []byte, f func(op, arg byte)) {
	for i := 0; i+1 < len(data) && i < 180; i += 2 {
		f(data[i], data[i+1])
	}
}

func fuzzStream[Req, Resp any](t *testing.T, w *world, handle func(secretv3.SecretDiscoveryServiceServer, *pipe[Req, Resp]) error) (*pipe[Req, Resp], func()) {
	s, err := sds.New(sds.Config{Source: w})
	if err != nil {
		t.Fatal(err)
	}
	var g grab
	s.Register(&g)
	ctx, cancel := context.WithCancel(identity.WithCaller(t.Context(), identity.Caller{Workload: workload("pod-a")}))
	p := &pipe[Req, Resp]{ctx: ctx, in: make(chan *Req), out: make(chan *Resp, 10)}
	end := make(chan error, 1)
	go func() { end <- handle(g.impl, p) }()
	return p, func() {
		synctest.Wait()
		select {
		case err := <-end:
			t.Errorf("the stream has ended: %v", err)
		default:
		}
		cancel()
		synctest.Wait()
		if got, _ := s.Acknowledged(1 << 40); got != 1<<40 {
			t.Errorf("a stream that ended holds Acknowledged at %d", got)
		}
	}
}

// FuzzStateOfTheWorld throws requests and changes of the world at a stream and
// holds each response against the model.
func FuzzStateOfTheWorld(f *testing.F) {
	f.Add([]byte{5, 3, 0, 0, 6, 0, 0, 4, 7, 0, 0, 8})
	f.Add([]byte{5, 0, 0, 0, 0, 1, 6, 0, 5, 4, 5, 2, 5, 0, 5, 63})
	f.Add([]byte{0, 0, 5, 9, 8, 2, 9, 1, 3, 0, 1, 0, 4, 0, 0, 4, 2, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		synctest.Test(t, func(t *testing.T) {
			w := fuzzWorld()
			p, stop := fuzzStream(t, w, func(s secretv3.SecretDiscoveryServiceServer, p *pipe[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse]) error {
				return s.StreamSecrets(p)
			})
			defer stop()
			m := &model{w: w, sub: map[string]bool{}, known: map[string]string{}}
			var last *discoveryv3.DiscoveryResponse
			var names []string
			started, implied, accepted := false, false, ""
			steps(t, data, func(op, arg byte) {
				op %= 10
				if !disturb(w, op, arg) {
					r := &discoveryv3.DiscoveryRequest{VersionInfo: accepted, ResponseNonce: last.GetNonce()}
					stale := false
					switch op {
					case 5:
						names = pick(arg)
					case 6:
						accepted = last.GetVersionInfo()
						r.VersionInfo = accepted
					case 7:
						r.ErrorDetail = refusal("no good")
					case 8:
						r.ResponseNonce = fmt.Sprint(arg)
						stale = last != nil && r.ResponseNonce != last.GetNonce()
						if stale {
							r.ResourceNames = pick(arg)
						}
					case 9:
						r.ResponseNonce = ""
					}
					if !stale {
						r.ResourceNames = names
						if len(names) > 0 {
							implied = false
						} else if !started {
							implied = true
						}
						before := m.sub
						m.sub = map[string]bool{}
						for _, n := range names {
							m.sub[n] = true
						}
						if implied {
							m.sub["*"] = true
						}
						asked := m.asked()
						for n := range m.known {
							if before[n] && !m.sub[n] {
								m.known[n] = "to be told again"
							}
						}
						maps.DeleteFunc(m.known, func(n, _ string) bool { return !slices.Contains(asked, n) })
					}
					started = true
					p.in <- r
				}
				synctest.Wait()
				have, fresh := m.have()
				if len(fresh) == 0 {
					have = nil
				}
				var got []string
				select {
				case r := <-p.out:
					for _, a := range r.GetResources() {
						got = append(got, read(t, a))
					}
					if !newer(r.GetNonce(), last.GetNonce()) {
						t.Errorf("nonce %q after %q", r.GetNonce(), last.GetNonce())
					}
					if len(got) == 0 {
						t.Error("an empty response")
					}
					last = r
				default:
				}
				if len(p.out) > 0 {
					t.Errorf("%d more responses", len(p.out))
				}
				if !slices.Equal(got, have) {
					t.Fatalf("step %d %d: got %v, want %v; asked for %v, knows %v", op, arg, got, have, m.asked(), m.known)
				}
				for _, n := range m.asked() {
					if c, ok := m.content(n); c != "" {
						m.known[n] = c
					} else if !ok && w.err == nil {
						// What went away is sent when it comes back, in any version.
						delete(m.known, n)
					}
				}
				if !started {
					m.known = map[string]string{}
				}
			})
		})
	})
}

// FuzzDelta is FuzzStateOfTheWorld for the incremental protocol.
func FuzzDelta(f *testing.F) {
	f.Add([]byte{5, 3, 0, 0, 6, 0, 0, 4, 7, 0, 0, 8})
	f.Add([]byte{5, 0, 0, 0, 0, 1, 6, 0, 8, 4, 5, 2, 8, 1, 5, 63})
	f.Add([]byte{0, 0, 5, 20, 8, 16, 9, 1, 3, 0, 1, 0, 4, 0, 0, 4, 2, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		synctest.Test(t, func(t *testing.T) {
			w := fuzzWorld()
			p, stop := fuzzStream(t, w, func(s secretv3.SecretDiscoveryServiceServer, p *pipe[discoveryv3.DeltaDiscoveryRequest, discoveryv3.DeltaDiscoveryResponse]) error {
				return s.DeltaSecrets(p)
			})
			defer stop()
			m := &model{w: w, sub: map[string]bool{}, known: map[string]string{}}
			var last *discoveryv3.DeltaDiscoveryResponse
			started := false
			steps(t, data, func(op, arg byte) {
				op %= 10
				if !disturb(w, op, arg) {
					r := &discoveryv3.DeltaDiscoveryRequest{}
					switch op {
					case 5:
						r.ResourceNamesSubscribe = pick(arg)
					case 6:
						r.ResponseNonce = last.GetNonce()
					case 7:
						r.ResponseNonce, r.ErrorDetail = last.GetNonce(), refusal("no good")
					case 8:
						r.ResponseNonce = fmt.Sprint(int8(arg))
						r.ResourceNamesUnsubscribe = pick(arg)
					case 9:
						r.ResourceNamesSubscribe = pick(arg)
						r.InitialResourceVersions = map[string]string{"default": "1", "ROOTCA": "1", "mine": "1", "key-of-b": "secret"}
					}
					sub := r.ResourceNamesSubscribe
					if !started && len(sub) == 0 {
						sub = []string{"*"}
					}
					for _, n := range sub {
						m.sub[n] = true
						if _, ok := m.known[n]; ok {
							m.known[n] = "to be told again"
						}
					}
					for _, n := range r.ResourceNamesUnsubscribe {
						if !m.sub[n] {
							continue
						}
						delete(m.sub, n)
						if _, ok := m.known[n]; ok && m.sub["*"] {
							m.known[n] = "to be told again"
						}
						if !m.sub["*"] {
							maps.DeleteFunc(m.known, func(n, _ string) bool { return !m.sub[n] })
						}
					}
					if !started {
						for n, v := range r.InitialResourceVersions {
							if m.sub[n] || m.sub["*"] {
								m.known[n] = v
							}
						}
					}
					started = true
					p.in <- r
				}
				synctest.Wait()
				var want []string
				if started {
					_, want = m.have()
					want = append(want, m.gone()...)
				}
				var got []string
				select {
				case r := <-p.out:
					for _, x := range r.GetResources() {
						got = append(got, read(t, x.GetResource()))
					}
					for _, n := range r.GetRemovedResources() {
						got = append(got, "-"+n)
					}
					if !newer(r.GetNonce(), last.GetNonce()) {
						t.Errorf("nonce %q after %q", r.GetNonce(), last.GetNonce())
					}
					last = r
				default:
				}
				if len(p.out) > 0 {
					t.Errorf("%d more responses", len(p.out))
				}
				if !slices.Equal(got, want) {
					t.Fatalf("step %d %d: got %v, want %v; asked for %v, knows %v", op, arg, got, want, m.asked(), m.known)
				}
				for _, x := range got {
					if n, gone := cutGone(x); !gone {
						c, _ := m.content(n)
						m.known[n] = c
					} else if m.sub[n] {
						m.known[n] = told
					} else {
						delete(m.known, n)
					}
				}
			})
		})
	})
}

func cutGone(x string) (name string, gone bool) {
	if x[0] == '-' {
		return x[1:], true
	}
	for i := range x {
		if x[i] == '=' {
			return x[:i], false
		}
	}
	return x, false
}
