package istio

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	pb "istio.io/api/security/v1alpha1"
)

// CreateCertificate implements pb.IstioCertificateServiceServer. The server that
// NewServer makes has proved the caller before.
func (d *Door) CreateCertificate(ctx context.Context, m *pb.IstioCertificateRequest) (*pb.IstioCertificateResponse, error) {
	c, ok := ctx.Value(callerKey{}).(*caller)
	if !ok {
		return nil, errCaller
	}
	// The message may have been slow to come.
	w, err := d.alive(c.workload)
	if now := time.Now(); err == nil && !now.Before(c.until) {
		err = errors.New("the proof expired while the request was read")
	}
	if err != nil {
		d.metrics.authentication.Inc()
		d.warn("caller refused", "peer", peerAddress(ctx), "err", err)
		return nil, errCaller
	}
	o := ca.Order{Door: doorName, Workload: w, Evidence: c.evidence, Requester: c.requester, TokenAt: c.tokenAt}
	if name := m.GetMetadata().GetFields()[impersonatedIdentity].GetStringValue(); name != "" {
		if o.Workload, err = d.impersonate(c, name); err != nil {
			d.metrics.authentication.Inc()
			d.warn("impersonation refused", "peer", peerAddress(ctx), "err", err)
			return nil, errImpersonate
		}
		// Not renewable by itself: the next one needs the node account's token again.
		o.Evidence, o.TokenAt = capb.IssuanceRecord_EVIDENCE_IMPERSONATION, time.Time{}
	}
	req, err := parseRequest(m, d.cfg.MaxTTL)
	if err != nil {
		d.metrics.parsing.Inc()
		d.metrics.signing.WithLabelValues("CSR_ERROR").Inc()
		d.warn("request refused", "namespace", w.Namespace, "service_account", w.ServiceAccount, "pod_uid", w.PodUID, "err", err)
		return nil, status.Errorf(codes.InvalidArgument, "CSR signing error (%v)", err)
	}
	o.PublicKey, o.TTL = req.key, req.ttl
	out, err := d.cfg.Authority.Issue(ctx, o)
	if err != nil {
		return nil, d.refuse(ctx, o, err)
	}
	if d.renewals != nil && !o.TokenAt.IsZero() {
		d.renewals.add(ca.Serial(out.Chain[0]), o.Workload, o.TokenAt, out.Chain[0].NotAfter)
	}
	d.metrics.success.Inc()
	return &pb.IstioCertificateResponse{CertChain: d.chain(out.Chain)}, nil
}

// refuse turns the authority's error into what a client may learn: the one place
// for that. Istio's clients try again after Internal.
func (d *Door) refuse(ctx context.Context, o ca.Order, err error) error {
	switch {
	case errors.Is(err, ca.ErrPublicKey), errors.Is(err, ca.ErrKeyInUse):
		public := ca.ErrPublicKey
		if errors.Is(err, ca.ErrKeyInUse) {
			public = ca.ErrKeyInUse
		}
		d.metrics.signing.WithLabelValues("CSR_ERROR").Inc()
		d.warn("request refused", "namespace", o.Workload.Namespace, "service_account", o.Workload.ServiceAccount, "pod_uid", o.Workload.PodUID, "err", err)
		return status.Errorf(codes.InvalidArgument, "CSR signing error (%v)", public)
	case ctx.Err() != nil:
		return status.FromContextError(ctx.Err()).Err()
	case errors.Is(err, ca.ErrUnavailable), errors.Is(err, ca.ErrClock):
		d.metrics.signing.WithLabelValues("CA_NOT_READY").Inc()
		d.cfg.Log.Error("issuing failed", "err", err)
		return status.Errorf(codes.Internal, "CSR signing error (%v)", ca.ErrUnavailable)
	}
	d.metrics.signing.WithLabelValues("CERT_GEN_ERROR").Inc()
	d.cfg.Log.Error("issuing failed", "err", err)
	return status.Error(codes.Internal, "CSR signing error (internal error; see the authority's log)")
}

// chain is istiod's form of a certificate: leaf and each intermediate as an element
// of its own (ztunnel requires that), the roots together as the last one.
func (d *Door) chain(certs []*x509.Certificate) []string {
	out := make([]string, 0, len(certs)+1)
	for _, c := range certs {
		out = append(out, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})))
	}
	trust, _ := d.cfg.Authority.Trust()
	return append(out, string(trust.PEM()))
}
