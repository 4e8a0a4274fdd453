package ca

import (
	"context"
	"crypto/x509"
	"slices"
	"strings"

	"github.com/signet-mesh/signet/ca/capb"

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
	for _, e := range j.Authorities {
		c, err := x509.ParseCertificate(e.Certificate)
		if err != nil {
			a.cfg.Log.Error("reading status failed", "err", err)
			return nil, code(err)
		}
		resp.Authorities = append(resp.Authorities, &capb.AuthorityStatus{Kind: e.Kind, State: e.State, SubjectKeyId: c.SubjectKeyId,
			NotBefore: timestamppb.New(c.NotBefore), NotAfter: timestamppb.New(c.NotAfter)})
	}
	resp.Agents = a.agents.status()
	return resp, nil
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
