package ca

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/limit"
	"github.com/signet-mesh/signet/ca/profile"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// Limits of the wire. They bound what one agent can make the authority do.
const (
	maxBatch        = 256      // items in an IssueRequest
	maxMessage      = 3 << 19  // bytes; the batches of agents stay below 1 MiB
	maxHeaders      = 16 << 10 // bytes of an RPC's headers
	maxStreams      = 16       // of one connection at once; an agent needs four
	maxStrangers    = 96       // first attestations that are read at once; 32 of one address
	strangerTime    = 10 * time.Second
	strangerWait    = time.Second // that a place is kept for a message, where others need it
	streamRate      = 50          // RPCs of an agent in a second; it needs a few in an hour
	streamBurst     = 500
	maxInFlight     = 4 // batches of one stream that are worked on at once
	maxToken        = 16 << 10
	maxPodUID       = 64
	maxHeads        = 256 // two of each instance
	maxKeyIDs       = 8
	maxKeyID        = 1024
	maxVersion      = 128
	retryUnknownPod = time.Second
	retryFailure    = 2 * time.Second
)

// service answers signet.ca.v1.Authority.
type service struct {
	capb.UnimplementedAuthorityServer
	a *Authority
}

// NewServer makes a gRPC server for agents: TLS 1.3 with the authority's serving
// certificate, no session tickets (a resumed session would outlive the checks of
// its certificate), client certificates of the trust domain verified where given.
//
// Who calls is checked on the headers of an RPC, before any of its messages is
// read: strangers can make the authority hold no more than a few first
// attestations, for some seconds each. One address has no more than its share of those, and
// who sends no message makes room for others.
func (a *Authority) NewServer() *grpc.Server {
	s := grpc.NewServer(
		grpc.Creds(a.Guard("agents", credentials.NewTLS(a.tlsConfig()))),
		grpc.InTapHandle(a.admit),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(10*time.Second),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second, MaxConnectionIdle: 5 * time.Minute}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	)
	capb.RegisterAuthorityServer(s, service{a: a})
	return s
}

// NewAdminServer makes a gRPC server for operators. Whoever can connect to it is
// one: serve it on a Unix socket of mode 0600 only.
func (a *Authority) NewAdminServer() *grpc.Server {
	s := grpc.NewServer(grpc.Creds(operators{insecure.NewCredentials()}), grpc.MaxRecvMsgSize(1<<20)) // a series of chains is some 200 KiB
	capb.RegisterAdminServer(s, admin{a: a})
	return s
}

func (a *Authority) tlsConfig() *tls.Config {
	c := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true,
		NextProtos:             []string{"h2"},
		ClientAuth:             tls.RequestClientCert,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			if c := a.serving.Load(); c != nil {
				return c, nil
			}
			return nil, errors.New("there is no serving certificate yet")
		},
		// A certificate that does not verify ends the handshake: a client with a
		// stale one is told at once, and not by a method's code.
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 {
				return nil
			}
			return a.verifyClient(s.PeerCertificates)
		},
	}
	return c
}

func (a *Authority) verifyClient(chain []*x509.Certificate) error {
	if _, err := identity.CheckSVID(chain[0]); err != nil {
		return err
	}
	if err := a.refuseRevoked(chain[0]); err != nil {
		return err
	}
	if ban := a.banned().set.Serial(profile.Serial(chain[0])); ban != nil {
		return fmt.Errorf("%w: certificate %x, by %s", ErrBanned, chain[0].SerialNumber, ban.Subject)
	}
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, c := range a.trust.Value().Roots() {
		roots.AddCert(c)
	}
	for _, c := range chain[1:] {
		intermediates.AddCert(c)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		CurrentTime: a.clock.latest()})
	return err
}

// caller is the agent on the other end of ctx: its SVID verified in the handshake,
// on record, and its pod and node alive. Every RPC but a first Attest needs one.
func (a *Authority) caller(ctx context.Context) (*agent, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, status.Error(codes.Unauthenticated, "no peer")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return nil, status.Error(codes.Unauthenticated, "an agent SVID is required")
	}
	c := info.State.PeerCertificates[0]
	refuse := func(err error) (*agent, error) {
		a.warn("agent refused", "serial", fmt.Sprintf("%x", c.SerialNumber), "peer", p.Addr.String(), "err", err)
		return nil, status.Error(codes.PermissionDenied, "the SVID is not that of a live agent; attest again")
	}
	id, err := identity.CheckSVID(c)
	if err != nil {
		return refuse(err)
	}
	node, ok := identity.AgentNode(id)
	if !ok || !id.MemberOf(a.cfg.TrustDomain) {
		return refuse(fmt.Errorf("%s is not an agent of %s", id, a.cfg.TrustDomain.Name()))
	}
	r, ok := a.agents.lookup(profile.Serial(c))
	if !ok || r.Node != node {
		return refuse(fmt.Errorf("%s is not on record", id))
	}
	if err := a.refuseRevoked(c); err != nil {
		return refuse(err)
	}
	if err := a.banned().refuseAgent(r); err != nil {
		return refuse(err)
	}
	if err := a.alive(r); err != nil {
		return refuse(err)
	}
	a.clock.witness(c.NotAfter)
	return r, nil
}

// admit lets an RPC be read. A first attestation comes from a stranger, who gets
// one of a few places for some seconds; everybody else must be an agent.
func (a *Authority) admit(ctx context.Context, info *tap.Info) (context.Context, error) {
	if info.FullMethodName != capb.Authority_Attest_FullMethodName || hasCertificate(ctx) {
		r, err := a.caller(ctx)
		if err == nil && a.streams.Take(r.Node, 1, time.Now()) > 0 {
			err = status.Error(codes.ResourceExhausted, "too many calls at once; try again later")
		}
		return ctx, err
	}
	// The stream's context ends with the stream, so all is released then.
	ctx, cancel := context.WithTimeout(ctx, strangerTime)
	place, ok := a.strangers.Take(addressOf(ctx), time.Now(), cancel)
	if !ok {
		cancel()
		return ctx, status.Error(codes.ResourceExhausted, "too many attestations at once; try again later")
	}
	context.AfterFunc(ctx, func() { cancel(); place.Leave() })
	return context.WithValue(ctx, strangerKey{}, place), nil
}

// strangerKey is of the place of a first attestation, in its context.
type strangerKey struct{}

// addressOf is the address that strangers are told apart by, without the port.
func addressOf(ctx context.Context) string {
	p, ok := peer.FromContext(ctx)
	if !ok || p.Addr == nil {
		return ""
	}
	host, _, err := net.SplitHostPort(p.Addr.String())
	if err != nil {
		return p.Addr.String()
	}
	return host
}

func hasCertificate(ctx context.Context) bool {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return false
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	return ok && len(info.State.PeerCertificates) > 0
}

// within runs a stream's handler until it returns or the agent's SVID, pod or node
// goes. A peer that does not read cannot hold the stream open beyond that: when
// this returns, whatever body waits for on the stream fails.
func (a *Authority) within(ctx context.Context, r *agent, body func(context.Context) error) error {
	ctx, cancel := a.bound(ctx, r)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- body(ctx) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ended(ctx)
	}
}

// bound derives the context of an agent's stream: it ends with the agent's SVID,
// when that is revoked, when one of them is banned, or when the agent's pod or node
// goes.
func (a *Authority) bound(ctx context.Context, r *agent) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithDeadlineCause(ctx, r.NotAfter, errors.New("the agent's SVID expired"))
	ctx, cancelCause := context.WithCancelCause(ctx)
	go func() {
		for {
			_, changed := a.cfg.Pods.OnNode(r.Node)
			set, revoked := a.revoked.Load()
			bans, banned := a.bans.Load()
			if err := bans.refuseAgent(r); err != nil {
				cancelCause(err)
				return
			}
			if set.Has(r.serial) {
				cancelCause(errors.New("the agent's SVID was revoked"))
				return
			}
			if err := a.alive(r); err != nil {
				cancelCause(err)
				return
			}
			select {
			case <-changed:
			case <-revoked:
			case <-banned:
			case <-ctx.Done():
				return
			}
		}
	}()
	return ctx, func() { cancelCause(context.Canceled); cancel() }
}

// ended is the status of a stream whose bound context is done.
func ended(ctx context.Context) error {
	return status.Error(codes.Unauthenticated, context.Cause(ctx).Error())
}

// code turns an error into what a client may learn. It is the one place for that.
func code(err error) error {
	switch {
	case errors.As(err, new(*limit.Busy)):
		return status.Error(codes.ResourceExhausted, "too much is asked for at once; try again later")
	case errors.Is(err, ErrUnavailable), errors.Is(err, ErrClock):
		return status.Error(codes.Unavailable, "the authority cannot issue now; try again later")
	case errors.Is(err, ErrBanned):
		return status.Error(codes.PermissionDenied, ErrBanned.Error())
	case errors.Is(err, ErrRevoked):
		return status.Error(codes.Unauthenticated, ErrRevoked.Error())
	case errors.Is(err, ErrKeyInUse):
		return status.Error(codes.InvalidArgument, ErrKeyInUse.Error())
	case errors.Is(err, attest.ErrUnavailable):
		return status.Error(codes.Unavailable, attest.Public(err))
	case errors.Is(err, attest.ErrNotAllowed):
		return status.Error(codes.PermissionDenied, attest.Public(err))
	case errors.Is(err, attest.ErrUnknownPod):
		// The token is good; the authority's view of the pods may be behind.
		return status.Error(codes.Unavailable, attest.Public(err))
	case errors.Is(err, attest.ErrRefused), errors.Is(err, attest.ErrOtherNode):
		return status.Error(codes.Unauthenticated, attest.Public(err))
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return status.FromContextError(err).Err()
	}
	return status.Error(codes.Internal, "internal error; see the authority's log")
}

func (s service) Attest(ctx context.Context, req *capb.AttestRequest) (*capb.AttestResponse, error) {
	if place, ok := ctx.Value(strangerKey{}).(*limit.Place); ok {
		place.Arrived()
	}
	resp, err := s.a.attest(ctx, req)
	if err != nil {
		s.a.metrics.refused.WithLabelValues("Attest", status.Code(err).String()).Inc()
	}
	return resp, err
}

func (a *Authority) attest(ctx context.Context, req *capb.AttestRequest) (*capb.AttestResponse, error) {
	pub, err := profile.ParsePublicKey(req.GetPublicKey(), a.cfg.SVID.AcceptedKeys)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if len(req.GetVersion()) > maxVersion {
		return nil, status.Errorf(codes.InvalidArgument, "version has %d bytes; at most %d are allowed", len(req.GetVersion()), maxVersion)
	}
	now, err := a.clock.now()
	if err != nil {
		a.cfg.Log.Error("attestation failed", "err", err)
		return nil, code(err)
	}
	var r agent
	evidence := capb.IssuanceRecord_EVIDENCE_TOKEN
	var requester []byte
	switch e := req.GetEvidence().(type) {
	case *capb.AttestRequest_Token:
		w, until, err := a.attestToken(ctx, a.cfg.Agents, e.Token)
		if err != nil {
			a.warn("agent attestation refused", "err", err)
			return nil, code(err)
		}
		a.clock.witness(until)
		r = agent{Node: w.Node, NodeUID: w.NodeUID, PodUID: w.PodUID, TokenAt: now}
	case *capb.AttestRequest_Renewal:
		old, err := a.caller(ctx)
		if err != nil {
			return nil, err
		}
		if now.Sub(old.TokenAt) >= a.cfg.TokenEvery {
			return nil, status.Error(codes.Unauthenticated, "the last token is too long ago; attest with a fresh one")
		}
		r = agent{Node: old.Node, NodeUID: old.NodeUID, PodUID: old.PodUID, TokenAt: old.TokenAt}
		evidence, requester = capb.IssuanceRecord_EVIDENCE_RENEWAL, old.serial
	default:
		return nil, status.Error(codes.InvalidArgument, "evidence is missing or of a kind that this authority does not know")
	}
	id, err := identity.AgentID(a.cfg.TrustDomain, r.Node)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	leave, err := a.queue.Enter(ctx, limit.Ask{Agent: r.Node, Items: 1, Bytes: len(req.GetPublicKey())})
	if err != nil {
		return nil, code(err)
	}
	defer leave()
	out, err := a.issue(ctx, a.intermediate.Load(), []certificate{{
		kind: capb.IssuanceRecord_KIND_AGENT, evidence: evidence, id: id, pub: pub, ttl: a.cfg.SVID.AgentTTL,
		node: r.Node, podUID: r.PodUID, requester: requester,
	}})
	if err == nil {
		err = out[0].err
	}
	if errors.Is(err, ErrBanned) || errors.Is(err, ErrRevoked) {
		a.warn("agent attestation refused", "spiffe_id", id.String(), "err", err)
		return nil, code(err)
	}
	var trust *identity.Trust
	if err == nil {
		// The certificate is worth nothing until this is durable.
		r.serial, r.NotAfter = profile.Serial(out[0].chain[0]), out[0].chain[0].NotAfter
		trust, err = a.enrol(ctx, r)
	}
	if err != nil {
		a.cfg.Log.Error("issuing agent SVID failed", "spiffe_id", id.String(), "err", err)
		return nil, code(err)
	}
	a.cfg.Log.Info("agent attested", "spiffe_id", id.String(), "serial", fmt.Sprintf("%x", r.serial), "evidence", evidence.String(), "version", req.GetVersion())
	return &capb.AttestResponse{
		Svid:    svidToProto(id.String(), out[0]),
		Trust:   trustToProto(trust),
		TokenBy: timestamppb.New(r.TokenAt.Add(a.cfg.TokenEvery)),
	}, nil
}

func (a *Authority) attestToken(ctx context.Context, at Attestor, token string) (w identity.Workload, until time.Time, err error) {
	if len(token) > maxToken {
		return w, until, fmt.Errorf("%w: the token has %d bytes; at most %d are allowed", attest.ErrRefused, len(token), maxToken)
	}
	return at.Attest(ctx, attest.Evidence{Token: token})
}

func (s service) Issue(stream grpc.BidiStreamingServer[capb.IssueRequest, capb.IssueResponse]) error {
	r, err := s.a.caller(stream.Context())
	if err != nil {
		return err
	}
	return s.a.within(stream.Context(), r, func(ctx context.Context) error { return s.a.issuing(ctx, r, stream) })
}

// issuing answers the batches of one stream. When the agent says that no more
// come, those under way are still answered.
func (a *Authority) issuing(ctx context.Context, r *agent, stream grpc.BidiStreamingServer[capb.IssueRequest, capb.IssueResponse]) error {
	g, ctx := errgroup.WithContext(ctx)
	answers := make(chan *capb.IssueResponse)
	requests := receive(ctx, stream.Recv)
	g.Go(func() error { // the one sender
		for {
			select {
			case <-ctx.Done():
				return ended(ctx)
			case m, ok := <-answers:
				if !ok {
					return nil // every batch is answered
				}
				if ctx.Err() != nil {
					return ended(ctx)
				}
				if err := stream.Send(m); err != nil {
					return err
				}
			}
		}
	})
	slots := make(chan struct{}, maxInFlight)
	var batches sync.WaitGroup
	g.Go(func() error {
		for {
			var m received[capb.IssueRequest]
			select {
			case <-ctx.Done():
				return ended(ctx)
			case m = <-requests:
			}
			if errors.Is(m.err, io.EOF) {
				batches.Wait()
				close(answers)
				return nil
			}
			if m.err != nil {
				return m.err
			}
			if n := len(m.msg.GetItems()); n > maxBatch {
				return status.Errorf(codes.InvalidArgument, "batch %d has %d items; at most %d are allowed", m.msg.GetId(), n, maxBatch)
			}
			select {
			case <-ctx.Done():
				return ended(ctx)
			case slots <- struct{}{}:
			}
			batches.Go(func() {
				defer func() { <-slots }()
				select {
				case answers <- a.answer(ctx, r, m.msg):
				case <-ctx.Done():
				}
			})
		}
	})
	err := g.Wait()
	batches.Wait()
	return err
}

// received is a message or the reason why there are no more.
type received[T any] struct {
	msg *T
	err error
}

// receive reads a stream on a goroutine of its own, so that the reader can wait
// for other things too. Recv returns when the handler does, and then it ends.
func receive[T any](ctx context.Context, recv func() (*T, error)) <-chan received[T] {
	c := make(chan received[T])
	go func() {
		for {
			m, err := recv()
			select {
			case c <- received[T]{m, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	return c
}

// answer works on one batch. Each item succeeds or fails alone, except that
// nothing is issued when nothing can be recorded.
func (a *Authority) answer(ctx context.Context, r *agent, req *capb.IssueRequest) *capb.IssueResponse {
	start := time.Now()
	resp := &capb.IssueResponse{Id: req.GetId(), Results: make([]*capb.IssueResult, len(req.GetItems()))}
	refuse := func(i int, c capb.Refusal_Code, retry time.Duration, message string) {
		a.metrics.refused.WithLabelValues("Issue", c.String()).Inc()
		f := &capb.Refusal{Code: c, Message: message}
		if retry > 0 {
			f.RetryAfter = durationpb.New(retry)
		}
		resp.Results[i] = &capb.IssueResult{Result: &capb.IssueResult_Refusal{Refusal: f}}
	}
	var certs []certificate
	var at []int
	checked := make([]certificate, len(req.GetItems()))
	errs := make([]error, len(req.GetItems()))
	inParallel(len(checked), func(i int) { checked[i], errs[i] = a.check(ctx, r, req.GetItems()[i]) })
	for i, err := range errs {
		var ref *refusal
		switch {
		case err == nil:
			certs, at = append(certs, checked[i]), append(at, i)
		case errors.As(err, &ref):
			a.warn("issuing refused", "node", r.Node, "serial", fmt.Sprintf("%x", r.serial), "err", err)
			refuse(i, ref.code, ref.retry, ref.public)
		default:
			a.cfg.Log.Error("issuing failed", "node", r.Node, "err", err)
			refuse(i, capb.Refusal_CODE_UNAVAILABLE, retryFailure, "internal error; see the authority's log")
		}
	}
	if len(certs) > 0 {
		// After the checks, which may have to wait for others: capacity is for work.
		leave, err := a.queue.Enter(ctx, limit.Ask{Agent: r.Node, Urgency: a.urgency(req, start), Items: len(certs), Bytes: proto.Size(req)})
		if err != nil {
			retry := retryFailure
			if b := new(limit.Busy); errors.As(err, &b) {
				retry = b.After
			}
			for _, i := range at {
				refuse(i, capb.Refusal_CODE_BUSY, retry, "the authority has too much to do")
			}
			return resp
		}
		defer leave()
		out, err := a.issue(ctx, a.intermediate.Load(), certs)
		if err != nil {
			a.cfg.Log.Error("issuing failed", "node", r.Node, "err", err)
		}
		for k, i := range at {
			switch {
			case err != nil:
				refuse(i, capb.Refusal_CODE_UNAVAILABLE, retryFailure, "the authority cannot issue now")
			case errors.Is(out[k].err, ErrKeyInUse):
				a.warn("issuing refused", "node", r.Node, "serial", fmt.Sprintf("%x", r.serial), "spiffe_id", certs[k].id.String(), "err", out[k].err)
				refuse(i, capb.Refusal_CODE_MALFORMED, 0, ErrKeyInUse.Error())
			case errors.Is(out[k].err, ErrRevoked):
				a.warn("issuing refused", "node", r.Node, "serial", fmt.Sprintf("%x", r.serial), "spiffe_id", certs[k].id.String(), "err", out[k].err)
				refuse(i, capb.Refusal_CODE_EVIDENCE, 0, "the agent's SVID was revoked")
			case errors.Is(out[k].err, ErrBanned):
				a.warn("issuing refused", "node", r.Node, "serial", fmt.Sprintf("%x", r.serial), "spiffe_id", certs[k].id.String(), "err", out[k].err)
				refuse(i, capb.Refusal_CODE_BANNED, retryBanned, ErrBanned.Error())
			case out[k].err != nil:
				a.cfg.Log.Error("signing failed", "spiffe_id", certs[k].id.String(), "err", out[k].err)
				refuse(i, capb.Refusal_CODE_UNAVAILABLE, retryFailure, "the authority cannot sign now")
			default:
				resp.Results[i] = &capb.IssueResult{Result: &capb.IssueResult_X509{X509: svidToProto(certs[k].id.String(), out[k])}}
			}
		}
	}
	a.metrics.batch.Observe(time.Since(start).Seconds())
	return resp
}

// refusal is why an item was not issued: public goes to the agent, err to the log.
type refusal struct {
	code   capb.Refusal_Code
	retry  time.Duration
	public string
	err    error
}

func (r *refusal) Error() string {
	if r.err != nil {
		return r.err.Error()
	}
	return r.public
}

// check is step 1 of the ceremony for an item: the key, the kind, and evidence
// that the authority verifies itself. The agent's word is not evidence: a token
// must verify here, and a pod must be alive in the authority's own view; either
// must be on the node that the calling agent was attested on.
func (a *Authority) check(ctx context.Context, r *agent, item *capb.IssueItem) (certificate, error) {
	pub, err := profile.ParsePublicKey(item.GetPublicKey(), a.cfg.SVID.AcceptedKeys)
	if err != nil {
		return certificate{}, &refusal{code: capb.Refusal_CODE_MALFORMED, public: err.Error()}
	}
	switch item.GetKind().(type) {
	case *capb.IssueItem_X509:
	case *capb.IssueItem_Jwt:
		return certificate{}, &refusal{code: capb.Refusal_CODE_UNSUPPORTED, public: "this authority issues X.509-SVIDs only"}
	default:
		return certificate{}, &refusal{code: capb.Refusal_CODE_UNSUPPORTED, public: "the kind is missing or not known to this authority"}
	}
	c := certificate{kind: capb.IssuanceRecord_KIND_WORKLOAD, pub: pub, ttl: a.cfg.SVID.TTL, node: r.Node, requester: r.serial}
	var w identity.Workload
	switch e := item.GetEvidence().(type) {
	case *capb.IssueItem_Token:
		c.evidence = capb.IssuanceRecord_EVIDENCE_TOKEN
		if w, _, err = a.attestToken(ctx, a.cfg.Workloads, e.Token); err != nil {
			f := &refusal{code: capb.Refusal_CODE_EVIDENCE, public: attest.Public(err), err: err}
			switch {
			case errors.Is(err, attest.ErrUnknownPod):
				f.code, f.retry = a.unknownPod(), retryUnknownPod
			case errors.Is(err, attest.ErrUnavailable):
				f.code, f.retry = capb.Refusal_CODE_UNAVAILABLE, retryFailure
			}
			return certificate{}, f
		}
	case *capb.IssueItem_PodUid:
		c.evidence = capb.IssuanceRecord_EVIDENCE_POD_UID
		if len(e.PodUid) > maxPodUID {
			return certificate{}, &refusal{code: capb.Refusal_CODE_MALFORMED, public: fmt.Sprintf("pod UID has %d bytes; at most %d are allowed", len(e.PodUid), maxPodUID)}
		}
		var ok bool
		if w, ok = a.cfg.Pods.Lookup(e.PodUid); !ok {
			return certificate{}, &refusal{code: a.unknownPod(), retry: retryUnknownPod, public: "the pod is not known",
				err: fmt.Errorf("pod %q is not in the authority's view", e.PodUid)}
		}
	default:
		return certificate{}, &refusal{code: capb.Refusal_CODE_EVIDENCE, public: "evidence is missing or of a kind that this authority does not know"}
	}
	if w.Node != r.Node || w.NodeUID != "" && r.NodeUID != "" && w.NodeUID != r.NodeUID {
		return certificate{}, &refusal{code: capb.Refusal_CODE_OTHER_NODE, public: "the workload is not on the agent's node",
			err: fmt.Errorf("pod %s is on node %q (%s), the agent on %q (%s)", w.PodUID, w.Node, w.NodeUID, r.Node, r.NodeUID)}
	}
	if c.id, err = w.ID(a.cfg.TrustDomain); err != nil {
		return certificate{}, &refusal{code: capb.Refusal_CODE_MALFORMED, public: "the workload has no valid SPIFFE ID", err: err}
	}
	// Again, and last: the stream ends when the agent's pod or node goes, but what
	// is under way then must not be issued.
	if err := a.alive(r); err != nil {
		return certificate{}, &refusal{code: capb.Refusal_CODE_OTHER_NODE, public: "the agent's pod or node is gone", err: err}
	}
	if a.revoked.Value().Has(r.serial) {
		return certificate{}, &refusal{code: capb.Refusal_CODE_EVIDENCE, public: "the agent's SVID was revoked", err: fmt.Errorf("agent SVID %x was revoked", r.serial)}
	}
	if after := a.identities.Take(r.Node+" "+c.id.String(), 1, time.Now()); after > 0 {
		return certificate{}, &refusal{code: capb.Refusal_CODE_BUSY, retry: max(after, time.Second), public: "the identity is asked for too often",
			err: fmt.Errorf("%s is asked for too often on node %s", c.id, r.Node)}
	}
	c.podUID = w.PodUID
	return c, nil
}

// urgency is that of a batch: of its most urgent item. Who holds nothing, or what is
// about to end, cannot wait as others can.
func (a *Authority) urgency(req *capb.IssueRequest, now time.Time) limit.Urgency {
	for _, item := range req.GetItems() {
		if u := item.GetHeldUntil(); u == nil || u.AsTime().Sub(now) < a.cfg.SVID.TTL/8 {
			return limit.Urgent
		}
	}
	return limit.InTime
}

// Guard bounds what connections of a door can hold before anybody has proved anything.
// door is its name in metrics.
func (a *Authority) Guard(door string, c credentials.TransportCredentials) credentials.TransportCredentials {
	l := a.cfg.Limits
	return limit.Guard(c, limit.GuardConfig{Connections: l.Connections, Handshakes: l.Handshakes, PerAddress: l.HandshakesPerAddress, Name: door, Metrics: a.cfg.Metrics})
}

// TooOften is after which time a client of another door, the pod with that UID, may ask
// again; 0: now, and then that is counted.
func (a *Authority) TooOften(podUID string) time.Duration {
	return a.clients.Take(podUID, 1, time.Now())
}

func svidToProto(id string, i issued) *capb.X509SVID {
	p := &capb.X509SVID{SpiffeId: id, RenewAt: timestamppb.New(i.renewAt)}
	for _, c := range i.chain {
		p.Chain = append(p.Chain, c.Raw)
	}
	return p
}
