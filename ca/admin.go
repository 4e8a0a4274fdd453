package ca

import (
	"bufio"
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/signet-mesh/signet/ca/capb"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
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
	j, _, err := loadJournal(ctx, a.store)
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
		c, err := e.cert()
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
	switch {
	case errors.Is(err, errNoLoss):
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	case err != nil:
		s.a.cfg.Log.Error("accepting a loss failed", "err", err)
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return &capb.AcceptLogLossResponse{}, nil
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
	for _, r := range as.bySerial {
		s := &capb.AgentStatus{Node: r.Node, Serial: r.serial, NotAfter: timestamppb.New(r.NotAfter)}
		if w := as.streams[r.Node]; w != nil {
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
