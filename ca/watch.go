package ca

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/storage"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	// staleAgain is how often it is asked whether a view of the pods is stale that was.
	staleAgain = time.Second
	// staleAfter is how long a view has to be stale until another replica is better asked
	// for a pod: agents need not run about when an API server is started again.
	staleAfter = 10 * time.Second
)

func (s service) WatchTrust(stream grpc.BidiStreamingServer[capb.WatchTrustRequest, capb.WatchTrustResponse]) error {
	a := s.a
	r, err := a.caller(stream.Context())
	if err != nil {
		return err
	}
	a.agents.watching(r.machine(), +1)
	defer a.agents.watching(r.machine(), -1)
	return a.within(stream.Context(), r, func(ctx context.Context) error { return a.watchTrust(ctx, r, stream) })
}

func (a *Authority) watchTrust(ctx context.Context, r *agent, stream grpc.BidiStreamingServer[capb.WatchTrustRequest, capb.WatchTrustResponse]) error {
	requests := receive(ctx, stream.Recv)
	looking := make(chan struct{}, 1)
	var sent *bansState
	for {
		cutOff, cutOffChanged := a.cutOff.Load() // before what it is about
		bans, bansChanged := a.bans.Load()
		t, trustChanged := a.trust.Load()
		h, headChanged := a.head.Load()
		keys, keysChanged := a.tokenKeys()
		if ctx.Err() != nil {
			return ended(ctx)
		}
		m := &capb.WatchTrustResponse{Trust: trustToProto(t)}
		if h.Sequence > 0 {
			m.LogHead = headToProto(h)
		}
		if !cutOff.IsZero() {
			m.StaleSince = timestamppb.New(cutOff)
		}
		if keys.Issuer != "" {
			m.TokenKeys = tokenKeysToProto(keys)
		}
		if sent == nil || bans.said != sent.said || bans.set != sent.set {
			m.Bans = bans.toProto(a.clock.past())
		}
		if err := stream.Send(m); err != nil {
			return err
		}
		sent = bans
	wait:
		for {
			select {
			case <-ctx.Done():
				return ended(ctx)
			case <-trustChanged:
				break wait
			case <-headChanged:
				break wait
			case <-bansChanged:
				break wait
			case <-cutOffChanged:
				break wait
			case <-keysChanged:
				break wait
			case q := <-requests:
				if errors.Is(q.err, io.EOF) {
					return nil
				}
				if q.err != nil {
					return q.err
				}
				if err := a.hear(ctx, r, q.msg); err != nil {
					return err
				}
				if err := a.lookForKeys(ctx, q.msg.GetUnknownKeyIds(), looking); err != nil {
					return err
				}
			}
		}
	}
}

// tokenKeys is what agents are handed, and a channel that is closed when that
// changes; nil if there is nothing to hand.
func (a *Authority) tokenKeys() (identity.TokenKeys, <-chan struct{}) {
	if a.cfg.TokenKeys == nil {
		return identity.TokenKeys{}, nil
	}
	return a.cfg.TokenKeys.Published()
}

// lookForKeys looks for keys that an agent has met in tokens and does not know. What
// is found is published. One search at a time for each stream: who invents key IDs
// gets no more, and the source of the keys has limits of its own.
func (a *Authority) lookForKeys(ctx context.Context, ids []string, looking chan struct{}) error {
	if len(ids) > maxKeyIDs {
		return status.Errorf(codes.InvalidArgument, "%d unknown keys; at most %d are allowed", len(ids), maxKeyIDs)
	}
	for _, id := range ids {
		if len(id) > maxKeyID {
			return status.Errorf(codes.InvalidArgument, "a key ID of %d bytes; at most %d are allowed", len(id), maxKeyID)
		}
	}
	if len(ids) == 0 || a.cfg.TokenKeys == nil {
		return nil
	}
	select {
	case looking <- struct{}{}:
	default:
		return nil
	}
	go func() {
		defer func() { <-looking }()
		for _, id := range ids {
			if _, ok, err := a.cfg.TokenKeys.Key(ctx, id); err != nil || !ok {
				a.cfg.Log.Debug("a key that an agent asks for is not known", "err", err)
			}
		}
	}()
	return nil
}

func tokenKeysToProto(k identity.TokenKeys) *capb.TokenKeys {
	p := &capb.TokenKeys{Issuer: k.Issuer}
	for _, id := range slices.Sorted(maps.Keys(k.Keys)) {
		der, err := x509.MarshalPKIXPublicKey(k.Keys[id])
		if err != nil {
			continue // of a kind that no agent uses
		}
		p.Keys = append(p.Keys, &capb.JWTKey{KeyId: id, PublicKey: der})
	}
	return p
}

// hear takes what an agent says on WatchTrust.
func (a *Authority) hear(ctx context.Context, r *agent, m *capb.WatchTrustRequest) error {
	newest := a.newestFor(max(m.GetAcknowledged(), m.GetRenewed()))
	if m.GetAcknowledged() > newest {
		return status.Errorf(codes.InvalidArgument, "sequence %d acknowledged; the newest is %d", m.GetAcknowledged(), newest)
	}
	if m.GetRenewed() > newest {
		return status.Errorf(codes.InvalidArgument, "what is tainted at sequence %d replaced; the newest is %d", m.GetRenewed(), newest)
	}
	if len(m.GetLogHeads()) > maxHeads {
		return status.Errorf(codes.InvalidArgument, "%d log heads; at most %d are allowed", len(m.GetLogHeads()), maxHeads)
	}
	if a.agents.acknowledge(r, m.GetAcknowledged(), m.GetRenewed()) {
		a.heard.now()
	}
	a.agents.enforces(r.machine(), m.GetBansRevision(), m.GetBansUnread())
	if s := a.banned(); s.number.Restored.Lost(m.GetBansRevision(), m.GetBansSequence()) && a.lostBans.shown(r.Node) {
		a.alarm("lost bans", a.lostBans.unanswered(s))
	}
	for _, p := range m.GetLogHeads() {
		h, err := headFromProto(p)
		if err == nil {
			a.returned(ctx, r.Node, h)
		}
	}
	return nil
}

func (s service) WatchNode(_ *capb.WatchNodeRequest, stream grpc.ServerStreamingServer[capb.WatchNodeResponse]) error {
	a := s.a
	r, err := a.caller(stream.Context())
	if err != nil {
		return err
	}
	return a.within(stream.Context(), r, func(ctx context.Context) error { return a.watchNode(ctx, r, stream) })
}

func (a *Authority) watchNode(ctx context.Context, r *agent, stream grpc.ServerStreamingServer[capb.WatchNodeResponse]) error {
	sent := map[string]identity.Workload{}
	full, stale := true, false
	for {
		since := a.podsStale() // before the pods are read
		if stale && since.IsZero() {
			// What went meanwhile the agent has kept.
			sent, full, stale = map[string]identity.Workload{}, true, false
		}
		pods, changed := a.cfg.Pods.OnNode(r.Node)
		// The stream ends when the agent's pod or node goes, but perhaps only after
		// this round: the pods could be those of a new node with the same name.
		if err := a.alive(r); err != nil {
			return status.Error(codes.Unauthenticated, err.Error())
		}
		m := &capb.WatchNodeResponse{NodeUid: r.NodeUID, Full: full}
		if !since.IsZero() {
			m.StaleSince = timestamppb.New(since)
			stale = stale || full
		}
		now := make(map[string]identity.Workload, len(pods))
		for _, w := range pods {
			now[w.PodUID] = w
			if old, ok := sent[w.PodUID]; !ok || !old.Equal(w) {
				m.Pods = append(m.Pods, podToProto(w))
			}
		}
		for uid := range sent {
			if _, ok := now[uid]; !ok {
				m.Deleted = append(m.Deleted, uid)
			}
		}
		if ctx.Err() != nil {
			return ended(ctx)
		}
		if full || len(m.Pods)+len(m.Deleted) > 0 {
			if err := stream.Send(m); err != nil {
				return err
			}
		}
		sent, full = now, false
		var again <-chan time.Time
		if stale {
			again = time.After(staleAgain)
		}
		select {
		case <-ctx.Done():
			return ended(ctx)
		case <-changed:
		case <-again:
		}
	}
}

// podsStale is since when the view of the pods is not kept up to date; zero if it is.
func (a *Authority) podsStale() time.Time {
	if a.cfg.PodsStale == nil {
		return time.Time{}
	}
	return a.cfg.PodsStale()
}

// unknownPod is how a pod is refused that is not in the view. Where that has not been kept up
// to date for a while another replica may know the pod, and only the API server's
// absence keeps it from being known here.
func (a *Authority) unknownPod() capb.Refusal_Code {
	if since := a.podsStale(); !since.IsZero() && time.Since(since) >= staleAfter {
		return capb.Refusal_CODE_UNAVAILABLE
	}
	return capb.Refusal_CODE_UNKNOWN_WORKLOAD
}

func trustToProto(t *identity.Trust) *capb.Trust {
	b := &capb.Bundle{TrustDomain: t.TrustDomain().Name()}
	for _, c := range t.Roots() {
		b.X509Authorities = append(b.X509Authorities, c.Raw)
	}
	p := &capb.Trust{Sequence: t.Sequence(), TrustDomain: t.TrustDomain().Name(), Bundles: []*capb.Bundle{b}}
	for _, c := range t.CRLs() {
		p.Crls = append(p.Crls, c.Raw)
	}
	if tainted, spread := t.Tainted(); len(tainted) > 0 {
		p.Tainted, p.TaintSpread = tainted, durationpb.New(spread)
	}
	return p
}

func podToProto(w identity.Workload) *capb.Pod {
	p := &capb.Pod{Uid: w.PodUID, Namespace: w.Namespace, Name: w.Pod, ServiceAccount: w.ServiceAccount, Labels: w.Labels, UnixUid: w.UnixUID}
	for _, ip := range w.Addresses {
		p.Addresses = append(p.Addresses, ip.String())
	}
	return p
}

func headToProto(h storage.Head) *capb.LogHead {
	return &capb.LogHead{Instance: h.Instance, Sequence: h.Sequence, Hash: h.Hash[:], Time: timestamppb.New(h.Time), Signature: h.Signature}
}

func headFromProto(p *capb.LogHead) (storage.Head, error) {
	h := storage.Head{Instance: p.GetInstance(), Sequence: p.GetSequence(), Time: p.GetTime().AsTime(), Signature: p.GetSignature()}
	if copy(h.Hash[:], p.GetHash()) != len(h.Hash) || len(p.GetHash()) != len(h.Hash) {
		return storage.Head{}, errors.New("a log head's hash has 32 bytes")
	}
	return h, nil
}
