package sds_test

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/sds"
)

// A script plays a client of one stream against a world. One command a line:
//
//	> NAME…            send a request: all names wanted (state of the world)
//	+ NAME…            subscribe (incremental); several + and - before go make one request
//	- NAME…            unsubscribe (incremental)
//	resume NAME=V…     initial_resource_versions of the next request (incremental)
//	go                 send what + - resume collected
//	< NAME=V… -GONE…   exactly one response came, with this in it
//	quiet              no response came
//	ack, nack TEXT     answer the newest response, as Envoy does
//	again              send the newest answer once more
//	old ack, old nack  answer the response before the newest
//	raw KEY=V…         send a request of nonce, version, names (comma), type, error
//	set NAME V [SEQ]   the world has the resource, as a bundle with SEQ
//	pending NAME       it has the name without content
//	drop NAME          it has it no more
//	extra NAME V       it answers with it always, asked or not
//	fail TEXT, heal    it fails, with what it has
//	sleep D            time passes
//	expire             the caller's proof ends
//	reconnect          a new stream of the same client
//	end CODE TEXT      the stream has ended so
//	trust CUR WANT     Acknowledged(CUR) is WANT
//	metric NAME V      a metric, summed over its labels
//	log TEXT           the log has it; nolog: it has not; logged N: N times
type script struct {
	t      *testing.T
	w      *world
	n      *node
	c      wire
	cancel context.CancelFunc
	delta  bool
	line   string
}

// wire is a client of one protocol.
type wire interface {
	send(words []string) // > in one, go in the other
	collect(op string, words []string)
	answer(old bool, refusal string)
	again()
	raw(kv map[string]string)
	next() (got []string, ok bool)
	err() error
}

func play(t *testing.T, delta bool, text string) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		s := &script{t: t, w: w, n: startNode(t, w), delta: delta}
		s.connect()
		defer func() { s.cancel() }()
		for _, s.line = range strings.Split(strings.TrimSpace(text), "\n") {
			s.line = strings.TrimSpace(s.line)
			if f := strings.Fields(s.line); len(f) > 0 {
				s.do(f[0], f[1:])
			}
		}
		synctest.Wait()
		if got, ok := s.c.next(); ok {
			t.Errorf("after the script: unexpected response %v", got)
		}
	})
}

func (s *script) connect() {
	s.t.Helper()
	ctx, cancel := context.WithCancel(as(s.t.Context(), "pod-a"))
	s.cancel = cancel
	if s.delta {
		st, err := s.n.client().DeltaSecrets(ctx)
		if err != nil {
			s.t.Fatal(err)
		}
		s.c = &deltaWire{t: s.t, inbox: receive(st), st: st, req: &discoveryv3.DeltaDiscoveryRequest{}}
		return
	}
	st, err := s.n.client().StreamSecrets(ctx)
	if err != nil {
		s.t.Fatal(err)
	}
	s.c = &sotwWire{t: s.t, inbox: receive(st), st: st}
}

func (s *script) fatalf(format string, args ...any) {
	s.t.Helper()
	s.t.Fatalf("%s: %s", s.line, fmt.Sprintf(format, args...))
}

func (s *script) do(op string, words []string) {
	s.t.Helper()
	// Each command meets a server that has done all that the one before it made it do.
	synctest.Wait()
	rest := strings.TrimSpace(strings.TrimPrefix(s.line, op))
	w := s.w
	switch op {
	case ">", "go":
		s.c.send(words)
	case "+", "-", "resume":
		s.c.collect(op, words)
	case "ack":
		s.c.answer(false, "")
	case "nack":
		s.c.answer(false, rest)
	case "old":
		s.c.answer(true, map[string]string{"ack": "", "nack": "late"}[words[0]])
	case "again":
		s.c.again()
	case "raw":
		kv := map[string]string{}
		for _, x := range words {
			k, v, _ := strings.Cut(x, "=")
			kv[k] = v
		}
		s.c.raw(kv)
	case "<":
		got, ok := s.c.next()
		if !ok {
			s.fatalf("no response; stream: %v", s.c.err())
		}
		if !slices.Equal(got, words) {
			s.fatalf("got %v", got)
		}
	case "quiet":
		if got, ok := s.c.next(); ok {
			s.fatalf("got %v", got)
		}
		if err := s.c.err(); err != nil {
			s.fatalf("the stream has ended: %v", err)
		}
	case "set":
		var seq uint64
		if len(words) > 2 {
			seq = s.number(words[2])
		}
		w.set(words[0], words[1], seq)
	case "pending":
		w.update(func() { w.rs[words[0]] = sds.Resource{Name: words[0]} })
	case "drop":
		w.update(func() { delete(w.rs, words[0]) })
	case "extra":
		w.update(func() { w.extra = append(w.extra, resource(words[0], words[1], 0)) })
	case "fail":
		w.update(func() { w.err = fmt.Errorf("%s", rest) })
	case "heal":
		w.mu.Lock() // nobody is told: the retry has to find out
		w.err = nil
		w.mu.Unlock()
	case "sleep":
		d, err := time.ParseDuration(words[0])
		if err != nil {
			s.fatalf("%v", err)
		}
		time.Sleep(d)
	case "expire":
		s.n.expire("pod-a")
	case "reconnect":
		s.cancel()
		synctest.Wait()
		s.connect()
	case "end":
		err := s.c.err()
		if status.Code(err).String() != words[0] || !strings.Contains(fmt.Sprint(err), strings.Join(words[1:], " ")) {
			s.fatalf("stream: %v", err)
		}
	case "trust":
		if got, _ := s.n.server.Acknowledged(s.number(words[0])); got != s.number(words[1]) {
			s.fatalf("acknowledged %d", got)
		}
	case "metric":
		if got := s.n.metric(s.t, words[0]); got != float64(s.number(words[1])) {
			s.fatalf("is %v", got)
		}
	case "log", "nolog":
		if strings.Contains(s.n.log.String(), rest) != (op == "log") {
			s.fatalf("log:\n%s", s.n.log)
		}
	case "logged":
		text := strings.Join(words[1:], " ")
		if got := strings.Count(s.n.log.String(), text); uint64(got) != s.number(words[0]) {
			s.fatalf("%d times", got)
		}
	default:
		s.fatalf("no such command")
	}
}

func (s *script) number(word string) uint64 {
	s.t.Helper()
	n, err := strconv.ParseUint(word, 10, 64)
	if err != nil {
		s.fatalf("%v", err)
	}
	return n
}

// inbox receives all of a stream, so that a test can see what came and when it ended.
type inbox[Resp any] struct {
	got chan *Resp
	end chan error
	e   error
}

func receive[Req, Resp any](st grpc.BidiStreamingClient[Req, Resp]) *inbox[Resp] {
	in := &inbox[Resp]{got: make(chan *Resp, 10000), end: make(chan error, 1)}
	go func() {
		for {
			r, err := st.Recv()
			if err != nil {
				in.end <- err
				return
			}
			in.got <- r
		}
	}()
	return in
}

func (in *inbox[Resp]) take() *Resp {
	select {
	case r := <-in.got:
		return r
	default:
		return nil
	}
}

func (in *inbox[Resp]) err() error {
	select {
	case in.e = <-in.end:
	default:
	}
	return in.e
}

func refusal(text string) *rpcstatus.Status {
	if text == "" {
		return nil
	}
	return &rpcstatus.Status{Code: int32(codes.Internal), Message: text}
}

type sotwWire struct {
	t *testing.T
	*inbox[discoveryv3.DiscoveryResponse]
	st          grpc.BidiStreamingClient[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse]
	names       []string
	last, older *discoveryv3.DiscoveryResponse
	accepted    string // version in use
	sent        *discoveryv3.DiscoveryRequest
}

func (c *sotwWire) do(r *discoveryv3.DiscoveryRequest) {
	if c.sent == nil {
		r.Node = &corev3.Node{Id: "sidecar~pod-a\n\x1b[31m"}
	}
	c.sent = r
	// An error shows in what the stream ends with.
	_ = c.st.Send(r)
}

func (c *sotwWire) request() *discoveryv3.DiscoveryRequest {
	return &discoveryv3.DiscoveryRequest{TypeUrl: sds.SecretType, ResourceNames: c.names, VersionInfo: c.accepted, ResponseNonce: c.last.GetNonce()}
}

func (c *sotwWire) send(words []string) {
	c.names = words
	c.do(c.request())
}

func (c *sotwWire) collect(string, []string) { c.t.Fatal("not in this protocol") }

func (c *sotwWire) answer(old bool, text string) {
	to := c.last
	if old {
		to = c.older
	}
	if text == "" {
		c.accepted = to.GetVersionInfo()
	}
	r := c.request()
	r.ResponseNonce, r.ErrorDetail = to.GetNonce(), refusal(text)
	c.do(r)
}

func (c *sotwWire) again() { c.do(c.sent) }

func (c *sotwWire) raw(kv map[string]string) {
	r := &discoveryv3.DiscoveryRequest{TypeUrl: kv["type"], VersionInfo: kv["version"], ResponseNonce: kv["nonce"], ErrorDetail: refusal(kv["error"])}
	if kv["names"] != "" {
		r.ResourceNames = strings.Split(kv["names"], ",")
	}
	c.do(r)
}

func (c *sotwWire) next() (got []string, ok bool) {
	r := c.take()
	if r == nil {
		return nil, false
	}
	if r.GetTypeUrl() != sds.SecretType || r.GetVersionInfo() == "" || !newer(r.GetNonce(), c.last.GetNonce()) {
		c.t.Errorf("response has type %q, version %q, nonce %q after %q", r.GetTypeUrl(), r.GetVersionInfo(), r.GetNonce(), c.last.GetNonce())
	}
	c.older, c.last = c.last, r
	for _, a := range r.GetResources() {
		got = append(got, read(c.t, a))
	}
	return got, true
}

type deltaWire struct {
	t *testing.T
	*inbox[discoveryv3.DeltaDiscoveryResponse]
	st          grpc.BidiStreamingClient[discoveryv3.DeltaDiscoveryRequest, discoveryv3.DeltaDiscoveryResponse]
	req         *discoveryv3.DeltaDiscoveryRequest // collected
	last, older *discoveryv3.DeltaDiscoveryResponse
	sent        *discoveryv3.DeltaDiscoveryRequest
}

func (c *deltaWire) do(r *discoveryv3.DeltaDiscoveryRequest) {
	r.TypeUrl = sds.SecretType
	if c.sent == nil {
		r.Node = &corev3.Node{Id: "sidecar~pod-a"}
	}
	c.sent = r
	_ = c.st.Send(r)
}

func (c *deltaWire) collect(op string, words []string) {
	switch op {
	case "+":
		c.req.ResourceNamesSubscribe = append(c.req.ResourceNamesSubscribe, words...)
	case "-":
		c.req.ResourceNamesUnsubscribe = append(c.req.ResourceNamesUnsubscribe, words...)
	case "resume":
		c.req.InitialResourceVersions = map[string]string{}
		for _, w := range words {
			n, v, _ := strings.Cut(w, "=")
			c.req.InitialResourceVersions[n] = v
		}
	}
}

func (c *deltaWire) send([]string) {
	r := c.req
	c.req = &discoveryv3.DeltaDiscoveryRequest{}
	c.do(r)
}

func (c *deltaWire) answer(old bool, text string) {
	to := c.last
	if old {
		to = c.older
	}
	r := c.req
	c.req = &discoveryv3.DeltaDiscoveryRequest{}
	r.ResponseNonce, r.ErrorDetail = to.GetNonce(), refusal(text)
	c.do(r)
}

func (c *deltaWire) again() { c.do(c.sent) }

func (c *deltaWire) raw(kv map[string]string) {
	r := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: kv["type"], ResponseNonce: kv["nonce"], ErrorDetail: refusal(kv["error"])}
	if kv["names"] != "" {
		r.ResourceNamesSubscribe = strings.Split(kv["names"], ",")
	}
	c.sent = r
	_ = c.st.Send(r)
}

func (c *deltaWire) next() (got []string, ok bool) {
	r := c.take()
	if r == nil {
		return nil, false
	}
	if r.GetTypeUrl() != sds.SecretType || !newer(r.GetNonce(), c.last.GetNonce()) {
		c.t.Errorf("response has type %q, nonce %q after %q", r.GetTypeUrl(), r.GetNonce(), c.last.GetNonce())
	}
	c.older, c.last = c.last, r
	for _, x := range r.GetResources() {
		got = append(got, read(c.t, x.GetResource()))
		if want := x.GetName() + "=" + x.GetVersion(); want != got[len(got)-1] {
			c.t.Errorf("resource %s is labelled %s", got[len(got)-1], want)
		}
	}
	for _, n := range r.GetRemovedResources() {
		got = append(got, "-"+n)
	}
	return got, true
}

// newer reports whether nonce comes after the older one.
func newer(nonce, older string) bool {
	n, err := strconv.ParseUint(nonce, 10, 64)
	o, _ := strconv.ParseUint(older, 10, 64)
	return err == nil && n > o
}

// numbered is n names that begin with prefix, ordered.
func numbered(prefix string, n int) string {
	var b strings.Builder
	for i := range n {
		b.WriteString(prefix)
		b.WriteString(string(rune('a' + i/26)))
		b.WriteString(string(rune('a' + i%26)))
		b.WriteByte(' ')
	}
	return b.String()
}
