package ca

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/journal"
	"github.com/signet-mesh/signet/ca/revocation"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// admin answers signet.ca.v1.Admin.
type admin struct {
	capb.UnimplementedAdminServer
	a *Authority
}

func (s admin) Status(ctx context.Context, _ *capb.StatusRequest) (*capb.StatusResponse, error) {
	a := s.a
	// The store is asked, not the copy that Run owns.
	j, _, err := journal.Load(ctx, a.store)
	if err != nil {
		a.cfg.Log.Error("reading status failed", "err", err)
		return nil, code(err)
	}
	resp := &capb.StatusResponse{Version: a.cfg.Version, TrustDomain: j.TrustDomain, Instance: uint32(j.Instance), TrustSequence: j.Sequence}
	if h := a.head.Value(); h.Sequence > 0 {
		resp.LogHead = headToProto(h)
	}
	if l := a.losses.now.Load(); l != nil {
		resp.LostHead = headToProto(l.head())
	}
	for _, e := range j.Authorities {
		c, err := e.Cert()
		if err != nil {
			a.cfg.Log.Error("reading status failed", "err", err)
			return nil, code(err)
		}
		if c == nil {
			continue
		}
		resp.Authorities = append(resp.Authorities, &capb.AuthorityStatus{Kind: e.Kind, State: e.State, SubjectKeyId: c.SubjectKeyId,
			NotBefore: timestamppb.New(c.NotBefore), NotAfter: timestamppb.New(c.NotAfter)})
	}
	resp.Agents = a.agents.status()
	return resp, nil
}

// ListLog implements signet.ca.v1.Admin.
func (s admin) ListLog(q *capb.ListLogRequest, stream grpc.ServerStreamingServer[capb.LogEntry]) error {
	return s.read(stream.Context(), "listing the issuance log", func(b book) error {
		for e, err := range b.Records(stream.Context(), q) {
			if err == nil {
				err = stream.Send(e)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// VerifyLog implements signet.ca.v1.Admin.
func (s admin) VerifyLog(ctx context.Context, q *capb.VerifyLogRequest) (resp *capb.VerifyResponse, err error) {
	err = s.read(ctx, "verifying the issuance log", func(b book) (err error) {
		resp, err = b.Verify(ctx, q.GetHeads(), q.GetStore())
		return err
	})
	return resp, err
}

// read calls f with the authority's book. An operator may know what is wrong.
func (s admin) read(ctx context.Context, what string, f func(book) error) error {
	b, err := s.a.read(ctx)
	if err == nil {
		err = f(b)
	}
	if err != nil && ctx.Err() == nil {
		s.a.cfg.Log.Error(what+" failed", "err", err)
		return status.Errorf(codes.Internal, "%s: %v", what, err)
	}
	return err
}

// AcceptLogLoss implements signet.ca.v1.Admin.
func (s admin) AcceptLogLoss(ctx context.Context, q *capb.AcceptLogLossRequest) (*capb.AcceptLogLossResponse, error) {
	err := s.a.acceptLoss(ctx, q.GetSequence(), q.GetReason())
	return &capb.AcceptLogLossResponse{}, s.answer("accepting a loss failed", err)
}

// Revoke implements signet.ca.v1.Admin.
func (s admin) Revoke(ctx context.Context, q *capb.RevokeRequest) (*capb.RevokeResponse, error) {
	a := s.a
	if q.GetReason() > 255 {
		return nil, status.Errorf(codes.FailedPrecondition, "%v: reason %d", errNotRevoked, q.GetReason())
	}
	revoke := a.revoke
	if a.elsewhere(q.GetSerial()) {
		revoke = a.askRevoke
	}
	e, again, err := revoke(ctx, q.GetSerial(), revocation.Reason(q.GetReason()), q.GetComment(), operator(ctx))
	if err := s.answer("revoking a certificate failed", err, "serial", fmt.Sprintf("%x", q.GetSerial())); err != nil {
		return nil, err
	}
	resp := &capb.RevokeResponse{Revocation: revocationToProto(e), Already: again}
	if !a.cfg.CRL.Enabled {
		resp.Pending = "no CRL is published (authority.crl.enabled)"
		return resp, nil
	}
	if !a.listHas(e) {
		publish := a.relist
		if a.elsewhere(e.Serial) {
			publish = func(ctx context.Context) error { return a.awaitList(ctx, e) }
		}
		if err := publish(ctx); err != nil {
			resp.Pending = err.Error()
			return resp, nil
		}
	}
	if list := a.lists.value()[string(e.Authority)]; list != nil && a.listHas(e) {
		resp.CrlNumber = list.Number.Uint64()
	} else if resp.Pending = "the key of the authority that issued it is gone"; a.hasKey(e.Authority) {
		resp.Pending = "the CRL could not be signed; it is tried again, and /readyz says why"
	}
	return resp, nil
}

// listHas reports whether the list of its authority says that a certificate is revoked.
func (a *Authority) listHas(e revocation.Entry) bool {
	list := a.lists.value()[string(e.Authority)]
	return list != nil && revocation.Holds(list, revocation.Set{string(e.Serial): e})
}

// Revocations implements signet.ca.v1.Admin.
func (s admin) Revocations(context.Context, *capb.RevocationsRequest) (*capb.RevocationsResponse, error) {
	resp := &capb.RevocationsResponse{Published: s.a.cfg.CRL.Enabled}
	for _, e := range s.a.revoked.Value().Sorted() {
		resp.Revocations = append(resp.Revocations, revocationToProto(e))
	}
	for _, c := range s.a.lists.all() {
		resp.Crls = append(resp.Crls, c.Raw)
	}
	return resp, nil
}

// AddBan implements signet.ca.v1.Admin.
func (s admin) AddBan(ctx context.Context, q *capb.AddBanRequest) (*capb.AddBanResponse, error) {
	var until time.Time
	if u := q.GetUntil(); u != nil {
		if err := u.CheckValid(); err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "until: %v", err)
		}
		until = u.AsTime()
	}
	resp, err := s.a.addBan(ctx, q.GetSubject(), q.GetReason(), until, operator(ctx))
	return resp, s.answer("banning failed", err)
}

// RemoveBan implements signet.ca.v1.Admin.
func (s admin) RemoveBan(ctx context.Context, q *capb.RemoveBanRequest) (*capb.RemoveBanResponse, error) {
	resp, err := s.a.removeBan(ctx, q.GetSubject(), q.GetReason(), operator(ctx))
	return resp, s.answer("removing a ban failed", err)
}

// answer is what an operator is told of a change: refusals have codes of their own, and
// anything else is logged and may be tried again.
func (s admin) answer(what string, err error, attrs ...any) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errBan):
		return status.Error(codes.InvalidArgument, err.Error())
	case errors.Is(err, errNoBan), errors.Is(err, errNotIssued):
		return status.Error(codes.NotFound, err.Error())
	case errors.Is(err, errNoLoss), errors.Is(err, errClockStands), errors.Is(err, errNotRevoked):
		return status.Error(codes.FailedPrecondition, err.Error())
	}
	s.a.cfg.Log.Error(what, append(attrs, "err", err)...)
	return status.Error(codes.Unavailable, err.Error())
}

// ListBans implements signet.ca.v1.Admin.
func (s admin) ListBans(_ context.Context, q *capb.ListBansRequest) (*capb.ListBansResponse, error) {
	agents := s.a.agents.bansStatus()
	b := s.a.banned() // after the agents, who may know a newer one than there was
	for _, g := range agents {
		if g.GetRevision() > b.said {
			g.Revision = 0 // of another store, or of what was lost with a restore: it says nothing of these
		}
	}
	resp := &capb.ListBansResponse{Revision: b.said, Agents: agents, OtherReplicas: uint32(len(s.a.current().Others))}
	for _, subject := range slices.Sorted(maps.Keys(b.records)) {
		if q.GetAll() || b.records[subject].Ended == nil {
			resp.Bans = append(resp.Bans, b.record(subject))
		}
	}
	return resp, nil
}

func revocationToProto(e revocation.Entry) *capb.Revocation {
	return &capb.Revocation{Serial: e.Serial, SpiffeId: e.SPIFFEID, Authority: e.Authority, Reason: uint32(e.Reason), Comment: e.Comment, By: e.By,
		Revoked: timestamppb.New(e.Revoked), Until: timestamppb.New(e.Until)}
}

// operator is who is at the other end of the admin socket, as the kernel says.
func operator(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok {
		if o, ok := p.AuthInfo.(operatorInfo); ok {
			return fmt.Sprintf("uid %d", o.uid)
		}
	}
	return "unknown"
}

// operatorInfo is the user of the process that opened a connection.
type operatorInfo struct {
	credentials.CommonAuthInfo
	uid uint32
}

// AuthType implements credentials.AuthInfo.
func (operatorInfo) AuthType() string { return "peercred" }

// operators notes who opened a connection to a Unix socket. It protects nothing: that
// is for the socket's mode.
type operators struct {
	credentials.TransportCredentials
}

// ServerHandshake implements credentials.TransportCredentials.
func (o operators) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return o.TransportCredentials.ServerHandshake(c)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	var cred *syscall.Ucred
	ctlErr := raw.Control(func(fd uintptr) {
		cred, err = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	})
	if err = errors.Join(ctlErr, err); err != nil {
		return nil, nil, fmt.Errorf("asking who connects to the admin socket: %w", err)
	}
	return c, operatorInfo{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.NoSecurity}, uid: cred.Uid}, nil
}

// Clone implements credentials.TransportCredentials.
func (o operators) Clone() credentials.TransportCredentials {
	return operators{o.TransportCredentials.Clone()}
}

// AcceptClock implements signet.ca.v1.Admin.
func (s admin) AcceptClock(ctx context.Context, q *capb.AcceptClockRequest) (*capb.AcceptClockResponse, error) {
	err := s.a.acceptClock(ctx, q.GetRecord(), q.GetReason(), operator(ctx))
	return &capb.AcceptClockResponse{}, s.answer("accepting the clock failed", err)
}

// Backup implements signet.ca.v1.Admin.
func (s admin) Backup(_ *capb.BackupRequest, stream grpc.ServerStreamingServer[capb.BackupChunk]) error {
	w := bufio.NewWriterSize(chunks{stream}, backupChunk)
	err := s.a.Backup(stream.Context(), w)
	if err == nil {
		err = w.Flush()
	}
	if err != nil && stream.Context().Err() == nil {
		s.a.cfg.Log.Error("backup failed", "err", err)
		return status.Error(codes.Unavailable, err.Error())
	}
	return err
}

// backupChunk is how many bytes of a backup go into one message.
const backupChunk = 256 << 10

// chunks writes to a stream of chunks.
type chunks struct {
	stream grpc.ServerStreamingServer[capb.BackupChunk]
}

func (c chunks) Write(p []byte) (int, error) {
	for part := range slices.Chunk(p, backupChunk) {
		if err := c.stream.Send(&capb.BackupChunk{Data: part}); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// status lists the agents' SVIDs on record, by node and then by end.
func (as *agents) status() []*capb.AgentStatus {
	as.mu.RLock()
	defer as.mu.RUnlock()
	var out []*capb.AgentStatus
	now := time.Now()
	for _, r := range as.bySerial {
		if !now.Before(r.NotAfter) {
			continue // it only counts for its workloads' SVIDs
		}
		s := &capb.AgentStatus{Node: r.Node, Serial: r.serial, NotAfter: timestamppb.New(r.NotAfter)}
		if w := as.streams[r.machine()]; w != nil {
			s.Acknowledged, s.Connected = w.acknowledged, w.open > 0
		}
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b *capb.AgentStatus) int {
		if c := strings.Compare(a.Node, b.Node); c != 0 {
			return c
		}
		return a.NotAfter.AsTime().Compare(b.NotAfter.AsTime())
	})
	return out
}
