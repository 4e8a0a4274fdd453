package istio

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"slices"
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
	c.arrived()
	defer c.leave()
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
	case errors.Is(err, ca.ErrRevoked):
		d.metrics.authentication.Inc()
		d.warn("caller refused", "peer", peerAddress(ctx), "namespace", o.Workload.Namespace, "service_account", o.Workload.ServiceAccount, "pod_uid", o.Workload.PodUID, "err", err)
		return errCaller
	case errors.Is(err, ca.ErrBanned):
		d.metrics.signing.WithLabelValues("AUTHORIZATION_ERROR").Inc()
		d.warn("request refused", "namespace", o.Workload.Namespace, "service_account", o.Workload.ServiceAccount, "pod_uid", o.Workload.PodUID, "err", err)
		return status.Errorf(codes.PermissionDenied, "CSR signing error (%v)", ca.ErrBanned)
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
	trust, _ := d.cfg.Authority.Trust()
	rest := d.rest.Load()
	if rest == nil || rest.trust != trust.Sequence() || !slices.Equal(rest.certs, certs[1:]) {
		rest = &restOfChain{trust: trust.Sequence(), certs: certs[1:]}
		for _, c := range certs[1:] {
			rest.pem = append(rest.pem, encodePEM(c.Raw))
		}
		rest.pem = append(rest.pem, string(trust.PEM()))
		d.rest.Store(rest)
	}
	out := make([]string, 0, 1+len(rest.pem))
	return append(append(out, encodePEM(certs[0].Raw)), rest.pem...)
}

// restOfChain is what goes out behind every leaf of an issuer, encoded once.
type restOfChain struct {
	trust uint64
	certs []*x509.Certificate
	pem   []string
}

// encodePEM is pem.EncodeToMemory for a certificate, in a quarter of its time and
// memory: at this door it is done for each leaf.
func encodePEM(der []byte) string {
	const begin, end = "-----BEGIN CERTIFICATE-----\n", "-----END CERTIFICATE-----\n"
	const line = 48 // bytes, which make 64 characters
	n := base64.StdEncoding.EncodedLen(len(der))
	b := make([]byte, 0, len(begin)+n+n/64+1+len(end))
	b = append(b, begin...)
	for len(der) > 0 {
		m := min(line, len(der))
		b = base64.StdEncoding.AppendEncode(b, der[:m])
		b = append(b, '\n')
		der = der[m:]
	}
	return string(append(b, end...))
}
