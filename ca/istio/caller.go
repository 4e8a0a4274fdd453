package istio

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
	pb "istio.io/api/security/v1alpha1"
)

// What a client learns of a refusal, in istiod's words: the reason is in the log.
var (
	errCaller      = status.Error(codes.Unauthenticated, "request authenticate failure")
	errImpersonate = status.Error(codes.Unauthenticated, "request impersonation authentication failure")
	errKeys        = status.Error(codes.Unavailable, "service-account tokens cannot be checked at the moment")
	errBusy        = status.Error(codes.ResourceExhausted, "too many requests at once; try again later")
)

// caller is a proven pod on the other end of an RPC.
type caller struct {
	workload  identity.Workload
	evidence  capb.IssuanceRecord_Evidence
	until     time.Time // when the proof ends
	tokenAt   time.Time // when the token was verified that it goes back to
	requester []byte    // serial of the client certificate, if that was the proof

	arrived func() // says that its message is there
	leave   func() // gives its place back; more than one call is one
}

type callerKey struct{}

// admit is the server's tap: it proves the caller on the headers of an RPC, before
// its message is read, and hands the caller on to the handler. Whoever proves
// nothing makes the authority hold nothing.
func (d *Door) admit(ctx context.Context, info *tap.Info) (context.Context, error) {
	if info.FullMethodName != pb.IstioCertificateService_CreateCertificate_FullMethodName {
		return ctx, nil // there is no other method; gRPC says so
	}
	d.metrics.csr.Inc()
	c, err := d.authenticate(ctx, time.Now().Round(0))
	if err != nil {
		d.metrics.authentication.Inc()
		d.warn("caller refused", "peer", peerAddress(ctx), "err", err)
		if errors.Is(err, attest.ErrUnavailable) {
			return ctx, errKeys
		}
		return ctx, errCaller
	}
	if d.cfg.Authority.TooOften(c.workload.PodUID) > 0 {
		d.metrics.busy.Inc()
		return ctx, errBusy
	}
	ctx, cancel := context.WithTimeout(context.WithValue(ctx, callerKey{}, c), callTime)
	place, ok := d.places.Take(c.workload.PodUID, time.Now(), cancel)
	if !ok {
		cancel()
		d.metrics.busy.Inc()
		return ctx, errBusy
	}
	c.arrived = place.Arrived
	// The handler gives the place back, or, where its message does not come, the end
	// of the stream.
	stop := context.AfterFunc(ctx, func() { cancel(); place.Leave() })
	c.leave = func() {
		if stop() {
			cancel()
			place.Leave()
		}
	}
	return ctx, nil
}

func peerAddress(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		return p.Addr.String()
	}
	return ""
}

// authenticate proves the caller from certificate or token. Its error is for the
// log.
func (d *Door) authenticate(ctx context.Context, now time.Time) (*caller, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	// istiod takes several values for none.
	if v := md["clusterid"]; len(v) == 1 && v[0] != "" {
		if _, ok := d.clusters[v[0]]; !ok {
			return nil, fmt.Errorf("it claims to be in cluster %.80q; known are %q", v[0], d.cfg.ClusterIDs)
		}
	}
	byCertificate, certErr := d.fromCertificate(ctx, now)
	if certErr == nil {
		return byCertificate, nil
	}
	byToken, tokenErr := d.fromToken(ctx, md, now)
	if tokenErr == nil {
		return byToken, nil
	}
	if errors.Is(certErr, errNoCertificate) {
		return nil, tokenErr
	}
	return nil, fmt.Errorf("%w; %w", certErr, tokenErr)
}

var errNoCertificate = errors.New("no client certificate")

// fromCertificate accepts a certificate that may renew itself.
func (d *Door) fromCertificate(ctx context.Context, now time.Time) (*caller, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, errNoCertificate
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return nil, errNoCertificate
	}
	if d.renewals == nil {
		return nil, errors.New("renewal by certificate is off")
	}
	trust, _ := d.cfg.Authority.Trust()
	// The handshake verified the chain, but perhaps under roots that are gone.
	r, err := d.renewals.use(info.State.PeerCertificates[0], now, trust.Sequence(), func() error {
		return d.cfg.Authority.VerifyClient(info.State.PeerCertificates)
	})
	if err != nil {
		return nil, err
	}
	w, err := d.alive(r.pod.workload)
	if err != nil {
		return nil, err
	}
	return &caller{workload: w, evidence: capb.IssuanceRecord_EVIDENCE_RENEWAL, until: r.notAfter, tokenAt: r.tokenAt, requester: r.serial[:]}, nil
}

// fromToken accepts a token in the authorization metadata, in istiod's form.
func (d *Door) fromToken(ctx context.Context, md metadata.MD, now time.Time) (*caller, error) {
	values := md["authorization"]
	if len(values) != 1 {
		return nil, fmt.Errorf("%d values of authorization; exactly one is accepted", len(values))
	}
	token, ok := strings.CutPrefix(values[0], "Bearer ")
	if !ok {
		return nil, errors.New("no bearer token in authorization")
	}
	var errs []error
	for _, at := range d.cfg.Tokens {
		w, until, err := at.Attest(ctx, attest.Evidence{Token: token})
		if err == nil {
			return &caller{workload: w, evidence: capb.IssuanceRecord_EVIDENCE_TOKEN, until: until, tokenAt: now}, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// alive is what the view says of a pod now: it must be there as it was.
func (d *Door) alive(w identity.Workload) (identity.Workload, error) {
	v, ok := d.cfg.Pods.Lookup(w.PodUID)
	if !ok {
		if _, any := d.anyPodOf[w.Node]; any {
			return w, nil
		}
		return v, fmt.Errorf("pod %s of %s/%s is gone", w.PodUID, w.Namespace, w.ServiceAccount)
	}
	if v.Namespace != w.Namespace || v.ServiceAccount != w.ServiceAccount || v.Node != w.Node {
		return v, fmt.Errorf("pod %s is %s/%s on node %s, no longer %s/%s on node %s", w.PodUID, v.Namespace, v.ServiceAccount, v.Node, w.Namespace, w.ServiceAccount, w.Node)
	}
	// The record of a certificate from before a restart has neither.
	if another(v.ServiceAccountUID, w.ServiceAccountUID) || another(v.NodeUID, w.NodeUID) {
		return v, fmt.Errorf("the service account or the node of pod %s was replaced", w.PodUID)
	}
	return v, nil
}

func another(a, b string) bool { return a != "" && b != "" && a != b }

// impersonate is the pod whose certificate a node account asks for: one of that
// name on its own node. As in istiod, only a token proves a node account.
func (d *Door) impersonate(c *caller, name string) (identity.Workload, error) {
	node := c.workload
	if _, ok := d.nodeAccounts[node.Namespace+"/"+node.ServiceAccount]; !ok || c.evidence != capb.IssuanceRecord_EVIDENCE_TOKEN {
		return identity.Workload{}, fmt.Errorf("%s/%s, proved by %s, is not a node account", node.Namespace, node.ServiceAccount, c.evidence)
	}
	id, err := identity.ParseID(name)
	if err != nil {
		return identity.Workload{}, fmt.Errorf("%.80q: %w", name, err)
	}
	ns, sa, ok := identity.SplitWorkloadID(id)
	if !ok || !id.MemberOf(d.td) {
		return identity.Workload{}, fmt.Errorf("%s is not the name of a workload of %s", id, d.td.Name())
	}
	w, ok := d.cfg.Pods.Find(node.Node, ns, sa)
	if !ok {
		return identity.Workload{}, fmt.Errorf("no pod of %s/%s is on node %s", ns, sa, node.Node)
	}
	return w, nil
}
