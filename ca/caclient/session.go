package caclient

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/identity"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// session is everything that goes over connections with one agent SVID.
type session struct {
	c       *Client
	cred    *Credential
	conn    *grpc.ClientConn
	at      reached
	refused chan error    // one element: the authority refuses this SVID
	left    chan struct{} // one element: the replica cannot do its work
	served  atomic.Bool   // something was issued on this session
	stale   atomic.Bool   // the replica is cut off from where pods are known
	heard   atomic.Bool   // the authority has answered on this session
	hurried bool          // the SVID is renewed because it is tainted; owned by hold
	overdue bool          // the SVID is to be renewed at once; owned by Run
	cancel  context.CancelFunc
	wg      sync.WaitGroup

	mu     sync.Mutex
	stream *issueStream // guarded by mu; nil until the first batch and after a break
	ended  bool         // guarded by mu
}

// open starts a session. Its goroutines end with end.
func (c *Client) open(ctx context.Context, cred *Credential) *session {
	ctx, cancel := context.WithCancel(ctx)
	s := &session{c: c, cred: cred, refused: make(chan error, 1), left: make(chan struct{}, 1), cancel: cancel}
	cert := &tls.Certificate{PrivateKey: cred.SVID.PrivateKey, Leaf: cred.SVID.Certificates[0]}
	for _, x := range cred.SVID.Certificates {
		cert.Certificate = append(cert.Certificate, x.Raw)
	}
	conn, err := c.dial(cert, &s.at)
	if err != nil {
		// grpc.NewClient fails only on options that cannot be combined.
		s.refused <- err
		return s
	}
	s.conn = conn
	s.wg.Go(func() { s.follow(ctx, "WatchTrust", s.watchTrust) })
	s.wg.Go(func() { s.follow(ctx, "WatchNode", s.watchNode) })
	return s
}

// end stops the session's goroutines and closes its connection.
func (s *session) end() {
	s.cancel()
	if s.conn != nil {
		// Before the lock: this is what frees a batch that waits for a connection.
		_ = s.conn.Close()
	}
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	s.wg.Wait()
}

// follow keeps a stream open until ctx ends, with backoff.
func (s *session) follow(ctx context.Context, method string, watch func(ctx context.Context, alive func()) error) {
	for attempt := 0; ; attempt++ {
		start, live := time.Now(), false
		err := watch(ctx, func() {
			if !live {
				live = true
				s.c.contact.begin()
			}
			s.alive()
		})
		if live {
			s.c.contact.end()
		}
		if ctx.Err() != nil {
			return
		}
		if time.Since(start) > maxBackoff {
			attempt = 0
		}
		s.c.failed(fmt.Errorf("%s: %w", method, err))
		// To one address that is away grpc goes on connecting; one that answers is left.
		if attempt >= leaveAfter && (len(s.c.cfg.Addresses) > 1 || s.conn.GetState() == connectivity.Ready) {
			s.leave()
		}
		if cd := status.Code(err); cd == codes.PermissionDenied || cd == codes.Unauthenticated {
			select {
			case s.refused <- err:
			default:
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(delay(attempt, mathrand.Float64())):
		}
	}
}

// alive notes that the authority answers on this session.
func (s *session) alive() {
	s.heard.Store(true)
	if s.c.failure.Swap(nil) != nil {
		s.c.up.Store(s.c.up.Value() + 1)
		s.c.cfg.Log.Info("session with the authority", "node", s.c.cfg.Node)
	}
}

func (s *session) watchTrust(ctx context.Context, alive func()) error {
	c := s.c
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := capb.NewAuthorityClient(s.conn).WatchTrust(ctx)
	if err != nil {
		return err
	}
	type received struct {
		m   *capb.WatchTrustResponse
		err error
	}
	in := make(chan received)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() {
		for {
			m, err := stream.Recv()
			select {
			case in <- received{m, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	})
	// What the authority was told on this stream.
	said := &capb.WatchTrustRequest{}
	first := true
	// When the replica is left because it is cut off from what it should tell; nil: it is not.
	var cutOff <-chan time.Time
	for {
		ack, changed := c.acknowledged()
		heads := c.heads.all.Value()
		var unknown []string
		var unknownChanged <-chan struct{}
		if c.cfg.UnknownKeys != nil {
			unknown, unknownChanged = c.cfg.UnknownKeys()
		}
		var bans heldBans
		held, bansChanged := c.bans.Load()
		if held != nil {
			bans = *held
		}
		renewed, renewedChanged := c.renewed(s.cred)
		if first || renewed != said.GetRenewed() || bans.revision != said.GetBansRevision() || bans.unread != said.GetBansUnread() || ack != said.GetAcknowledged() || !sameHeads(heads, said.GetLogHeads()) || !slices.Equal(unknown, said.GetUnknownKeyIds()) {
			said = &capb.WatchTrustRequest{Acknowledged: ack, LogHeads: heads, UnknownKeyIds: unknown, Renewed: renewed, BansRevision: bans.revision, BansSequence: bans.sequence, BansUnread: bans.unread}
			if stream.Send(said) != nil {
				// The stream has ended, and its reader is told why; it must be the only one.
				for {
					select {
					case r := <-in:
						if r.err != nil {
							return r.err
						}
					case <-ctx.Done():
						return ctx.Err()
					}
				}
			}
			first = false
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		case <-unknownChanged:
		case <-bansChanged:
		case <-renewedChanged:
		case now := <-cutOff:
			cutOff = nil
			c.judged.Store(&now)
			s.leave()
		case r := <-in:
			if r.err != nil {
				return r.err
			}
			if err := c.hear(r.m); err != nil {
				return err
			}
			alive()
			if since := r.m.GetStaleSince(); since == nil {
				cutOff = nil
			} else if cutOff == nil {
				c.cfg.Log.Warn("the replica is cut off from the state that replicas share, so that it knows of no new bans and no new trust; another one is tried", "since", since.AsTime())
				cutOff = time.After(leaveIn(c.judged.Load(), time.Now(), mathrand.Float64()))
			}
			c.heads.see(r.m.GetLogHead())
		}
	}
}

// learn takes the keys of the issuer of workloads' tokens. Keys that cannot be read
// are of a kind that this agent does not use. hearing is held.
func (c *Client) learn(p *capb.TokenKeys) {
	if p.GetIssuer() == "" {
		return
	}
	k := identity.TokenKeys{Issuer: p.GetIssuer(), Keys: map[string]crypto.PublicKey{}}
	for _, key := range p.GetKeys() {
		public, err := x509.ParsePKIXPublicKey(key.GetPublicKey())
		if err != nil {
			c.cfg.Log.Debug("a key of the issuer of tokens cannot be read", "kid", key.GetKeyId(), "err", err)
			continue
		}
		k.Keys[key.GetKeyId()] = public
	}
	if !k.Equal(c.keys.Value()) {
		c.keys.Store(k)
	}
}

// renewed is the sequence of the trust that this agent has if no SVID of this node is
// below what it calls tainted, and 0 otherwise. It is also 0 until an authority was heard:
// what was saved does not say what is tainted, and the authority takes nothing back that an
// agent said.
func (c *Client) renewed(own *Credential) (sequence uint64, changed <-chan struct{}) {
	t := c.trust.Value()
	if t == nil || !c.told.Load() {
		return 0, nil
	}
	held := false
	if c.cfg.Tainted != nil {
		held, changed = c.cfg.Tainted(t)
	}
	if held || t.Taints(own.SVID.Certificates[0]) {
		return 0, changed
	}
	return t.Sequence(), changed
}

// acknowledged never exceeds the sequence that this agent has.
func (c *Client) acknowledged() (uint64, <-chan struct{}) {
	t, changed := c.trust.Load()
	have := uint64(0)
	if t != nil {
		have = t.Sequence()
	}
	if c.cfg.Acknowledged == nil {
		return have, changed
	}
	ack, changed := c.cfg.Acknowledged(have)
	return min(ack, have), changed
}

func (s *session) watchNode(ctx context.Context, alive func()) error {
	stream, err := capb.NewAuthorityClient(s.conn).WatchNode(ctx, &capb.WatchNodeRequest{})
	if err != nil {
		return err
	}
	said := map[string]bool{} // while the replica is cut off, the pods that are known as it says
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		alive()
		if uid := m.GetNodeUid(); uid != "" {
			s.c.nodeUID.Store(&uid)
		}
		var pods []identity.Workload
		for _, p := range m.GetPods() {
			w, err := s.c.pod(p, m.GetNodeUid())
			if err != nil {
				return err
			}
			pods = append(pods, w)
		}
		first := false
		if m.GetFull() {
			first = !s.c.synced.Swap(true)
			if s.stale.Store(m.GetStaleSince() != nil); !s.stale.Load() {
				s.c.cfg.Pods.Replace(pods)
				clear(said)
				continue
			}
			// The replica is cut off from where pods are known: what it does not have may
			// have begun since, and another replica has said so. What that has said of a pod
			// may be newer, too: by older labels a policy that denies would not mean it.
			s.c.cfg.Log.Warn("the replica's view of the pods is not up to date; what is known of pods is kept", "since", m.GetStaleSince().AsTime())
		}
		for _, w := range pods {
			if s.stale.Load() {
				if _, known := s.c.cfg.Pods.Lookup(w.PodUID); known && !first && !said[w.PodUID] {
					continue
				}
				said[w.PodUID] = true
			}
			s.c.cfg.Pods.Set(w)
		}
		for _, uid := range m.GetDeleted() {
			s.c.cfg.Pods.Delete(uid)
		}
	}
}

// pod makes a workload of what the authority says; the node is always this one.
func (c *Client) pod(p *capb.Pod, nodeUID string) (identity.Workload, error) {
	w := identity.Workload{Namespace: p.GetNamespace(), ServiceAccount: p.GetServiceAccount(), Pod: p.GetName(), PodUID: p.GetUid(),
		Node: c.cfg.Node, NodeUID: nodeUID, Labels: p.GetLabels(), UnixUID: p.UnixUid}
	if w.PodUID == "" {
		return identity.Workload{}, errors.New("the authority sent a pod without a UID")
	}
	for _, a := range p.GetAddresses() {
		ip, err := netip.ParseAddr(a)
		if err != nil {
			return identity.Workload{}, fmt.Errorf("the authority sent pod %s with address %q: %w", w.PodUID, a, err)
		}
		w.Addresses = append(w.Addresses, ip)
	}
	return w, nil
}

// issueStream is one Issue stream; batches on it are matched by id.
type issueStream struct {
	stream grpc.BidiStreamingClient[capb.IssueRequest, capb.IssueResponse]
	cancel context.CancelFunc

	mu      sync.Mutex
	next    uint64                              // guarded by mu
	waiting map[uint64]chan *capb.IssueResponse // guarded by mu; nil once broken
	err     error                               // guarded by mu; why it broke
	owed    int                                 // guarded by mu; batches that are not answered, also those that nobody waits for any more
	quiet   time.Time                           // guarded by mu; since when the authority owes something and says nothing
	send    chan struct{}                       // full while somebody sends
}

// Issue asks the authority for SVIDs. It fails as a whole, wrapping
// ErrUnavailable, when there is no session or it breaks; else the results are in
// the order of reqs, each with its own error. It may be called concurrently. The
// chains are parsed but not verified: the caller knows what to expect.
func (c *Client) Issue(ctx context.Context, reqs []identity.Request) ([]identity.Result, error) {
	ctx, cancel := context.WithTimeout(ctx, rpcTimeout)
	defer cancel()
	var resp *capb.IssueResponse
	s := c.session.Value()
	for {
		if s == nil || s.conn == nil {
			return nil, fmt.Errorf("issuing: %w: %w", ErrUnavailable, c.Ready())
		}
		var err error
		if resp, err = s.batch(ctx, toItems(reqs)); err == nil {
			break
		}
		// A session that was replaced takes its batches along; the next one has them
		// issued. What the first may have issued already nobody will ever see.
		next := c.session.Value()
		if next == s || ctx.Err() != nil {
			return nil, fmt.Errorf("issuing: %w: %w", ErrUnavailable, err)
		}
		s = next
	}
	if len(resp.GetResults()) != len(reqs) {
		return nil, fmt.Errorf("issuing: the authority answered %d items with %d results", len(reqs), len(resp.GetResults()))
	}
	out := make([]identity.Result, len(reqs))
	for i, r := range resp.GetResults() {
		out[i] = toResult(r)
	}
	s.judge(resp.GetResults())
	return out, nil
}

// judge leaves the replica if it can record nothing or sign nothing, or does not know a pod
// because it is cut off from where pods are known. One that has said so is left once in a
// while only: all may be cut off.
func (s *session) judge(results []*capb.IssueResult) {
	for _, r := range results {
		if r.GetX509() != nil {
			s.served.Store(true)
		}
		if r.GetRefusal().GetCode() != capb.Refusal_CODE_UNAVAILABLE {
			return
		}
	}
	if len(results) == 0 {
		return
	}
	now, last := time.Now(), s.c.judged.Load()
	if s.stale.Load() && last != nil && now.Sub(*last) < leaveAgain || !s.c.judged.CompareAndSwap(last, &now) {
		return
	}
	s.leave()
}

func toItems(reqs []identity.Request) []*capb.IssueItem {
	items := make([]*capb.IssueItem, len(reqs))
	for i, r := range reqs {
		item := &capb.IssueItem{PublicKey: r.PublicKey, Kind: &capb.IssueItem_X509{X509: &capb.X509Kind{}}}
		if r.Token != "" {
			item.Evidence = &capb.IssueItem_Token{Token: r.Token}
		} else {
			item.Evidence = &capb.IssueItem_PodUid{PodUid: r.PodUID}
		}
		if !r.HeldUntil.IsZero() {
			item.HeldUntil = timestamppb.New(r.HeldUntil)
		}
		items[i] = item
	}
	return items
}

func toResult(r *capb.IssueResult) identity.Result {
	switch v := r.GetResult().(type) {
	case *capb.IssueResult_X509:
		chain, renewAt, err := parseSVID(v.X509)
		return identity.Result{Chain: chain, RenewAt: renewAt, Err: err}
	case *capb.IssueResult_Refusal:
		out := identity.Result{Err: fmt.Errorf("the authority refused: %s (%s)", v.Refusal.GetMessage(), v.Refusal.GetCode())}
		switch d := v.Refusal.GetRetryAfter(); {
		case d != nil:
			out.RetryAfter = max(d.AsDuration(), 0)
		case v.Refusal.GetCode() == capb.Refusal_CODE_EVIDENCE, v.Refusal.GetCode() == capb.Refusal_CODE_OTHER_NODE,
			v.Refusal.GetCode() == capb.Refusal_CODE_MALFORMED, v.Refusal.GetCode() == capb.Refusal_CODE_UNSUPPORTED:
			out.RetryAfter = -1
		}
		return out
	}
	return identity.Result{Err: errors.New("the authority's answer is of a kind that was not asked for"), RetryAfter: -1}
}

// batch sends one batch on the session's Issue stream and waits for its answer.
func (s *session) batch(ctx context.Context, items []*capb.IssueItem) (*capb.IssueResponse, error) {
	st, err := s.issuing()
	if err != nil {
		return nil, err
	}
	answer := make(chan *capb.IssueResponse, 1)
	st.mu.Lock()
	if st.waiting == nil {
		err := st.err
		st.mu.Unlock()
		return nil, err
	}
	st.next++
	id := st.next
	st.waiting[id] = answer
	st.mu.Unlock()
	defer func() {
		st.mu.Lock()
		defer st.mu.Unlock()
		delete(st.waiting, id)
	}()
	select {
	case st.send <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if ctx.Err() != nil {
		<-st.send
		return nil, context.Cause(ctx)
	}
	st.owes()
	// Cancelling the stream is what frees a Send that waits for the authority to
	// read. After a failed Send the reader gets the status and closes answer.
	stop := context.AfterFunc(ctx, st.cancel)
	_ = st.stream.Send(&capb.IssueRequest{Id: id, Items: items})
	stop()
	<-st.send
	select {
	case r, ok := <-answer:
		if !ok {
			st.mu.Lock()
			defer st.mu.Unlock()
			return nil, st.err
		}
		return r, nil
	case <-ctx.Done():
		// Others wait for their answers on this stream, and may have more time: the answer
		// to this batch is ignored when it comes. Only an authority that answers nobody may
		// not read either: the next batch gets a stream of its own.
		if st.stuck(time.Now()) {
			st.cancel()
		}
		return nil, context.Cause(ctx)
	}
}

// owes notes that a batch is about to be sent.
func (st *issueStream) owes() {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.owed++; st.owed == 1 {
		st.quiet = time.Now()
	}
}

// stuck reports whether the authority has owed an answer for long and given none.
func (st *issueStream) stuck(now time.Time) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.owed > 0 && now.Sub(st.quiet) >= rpcTimeout-time.Second
}

// issuing is the session's Issue stream, opened if there is none.
func (s *session) issuing() (*issueStream, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return nil, errors.New("the session ended")
	}
	if s.stream != nil {
		return s.stream, nil
	}
	ctx, cancel := context.WithCancel(context.Background())
	stream, err := capb.NewAuthorityClient(s.conn).Issue(ctx)
	if err != nil {
		cancel()
		return nil, err
	}
	st := &issueStream{stream: stream, cancel: cancel, send: make(chan struct{}, 1), waiting: map[uint64]chan *capb.IssueResponse{}}
	s.stream = st
	s.wg.Go(func() {
		defer cancel()
		for {
			m, err := stream.Recv()
			if err != nil {
				s.mu.Lock()
				if s.stream == st {
					s.stream = nil
				}
				s.mu.Unlock()
				st.fail(err)
				return
			}
			st.mu.Lock()
			st.owed, st.quiet = max(st.owed-1, 0), time.Now()
			if c := st.waiting[m.GetId()]; c != nil {
				delete(st.waiting, m.GetId())
				c <- m
			}
			st.mu.Unlock()
		}
	})
	return st, nil
}

// fail ends every waiter.
func (st *issueStream) fail(err error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.err = err
	for _, c := range st.waiting {
		close(c)
	}
	st.waiting = nil
}
