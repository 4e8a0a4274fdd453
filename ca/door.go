package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/profile"
	"github.com/signet-mesh/signet/identity"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
)

// ErrPublicKey is returned for a public key that is not certified: of a kind or a
// size that the authority does not accept.
var ErrPublicKey = errors.New("the public key is not accepted")

// CheckPublicKey is nil for a key that can be certified, else an error that wraps
// ErrPublicKey and says what is accepted; the configuration may accept less. It is
// quick: a door calls it before it verifies anything with a key that somebody sent.
func CheckPublicKey(pub crypto.PublicKey) error {
	if err := profile.CheckPublicKey(pub, profile.AllKeys); err != nil {
		return fmt.Errorf("%w: %w", ErrPublicKey, err)
	}
	return nil
}

// Order asks for one workload certificate on behalf of a door: a service that
// speaks another protocol than signet.ca.v1 and has proved, as that protocol does
// it, whose certificate it is.
type Order struct {
	// Door is the protocol, for the issuance log. Required.
	Door string
	// Workload is the verified fact that the name is rendered from; its pod and node
	// go into the log. Required.
	Workload identity.Workload
	// PublicKey is what is certified; CheckPublicKey must accept it.
	PublicKey crypto.PublicKey
	// TTL is how long the certificate is wanted for; it is brought into the bounds of
	// the configuration. Zero means svid.ttl.
	TTL time.Duration
	// Evidence is what the door verified. Required.
	Evidence capb.IssuanceRecord_Evidence
	// Requester is the serial of the certificate that asked, for a renewal.
	Requester []byte
	// TokenAt is when the token was verified that the evidence goes back to.
	TokenAt time.Time
}

// Issued is what an Order was answered with.
type Issued struct {
	// Chain is leaf first, without the root.
	Chain []*x509.Certificate
	// RenewAt is when the holder should ask again.
	RenewAt time.Time
}

// Serial is the serial of a certificate as the issuance log has it.
func Serial(c *x509.Certificate) []byte { return profile.Serial(c) }

// Issue runs the ceremony for an order. Concurrent orders share the write to the
// log. Errors wrap ErrPublicKey, ErrKeyInUse, ErrBanned, ErrRevoked, ErrUnavailable or
// ErrClock where those are the reason; every other one is internal.
func (a *Authority) Issue(ctx context.Context, o Order) (Issued, error) {
	if o.Door == "" || o.Evidence == capb.IssuanceRecord_EVIDENCE_UNSPECIFIED {
		return Issued{}, errors.New("issuing: an order needs a door and evidence")
	}
	if err := profile.CheckPublicKey(o.PublicKey, a.cfg.SVID.AcceptedKeys); err != nil {
		return Issued{}, fmt.Errorf("%w: %w", ErrPublicKey, err)
	}
	id, err := o.Workload.ID(a.cfg.TrustDomain)
	if err != nil {
		return Issued{}, fmt.Errorf("issuing: %w", err)
	}
	ttl := o.TTL
	if ttl == 0 {
		ttl = a.cfg.SVID.TTL
	}
	c := certificate{kind: capb.IssuanceRecord_KIND_WORKLOAD, evidence: o.Evidence, id: id, pub: o.PublicKey,
		ttl: min(max(ttl, a.cfg.SVID.MinTTL), a.cfg.SVID.MaxTTL), node: o.Workload.Node, podUID: o.Workload.PodUID,
		requester: o.Requester, door: o.Door, tokenAt: o.TokenAt}
	out, err := a.issueOne(ctx, c)
	if err != nil {
		return Issued{}, fmt.Errorf("issuing SVID for %s: %w", id, err)
	}
	return Issued{Chain: out.chain, RenewAt: out.renewAt}, nil
}

// IssueServing makes a key, in memory only, and certifies it for a server with
// these DNS names. id is who the server is; the zero ID means this authority
// itself. The chain is without the root.
func (a *Authority) IssueServing(ctx context.Context, door string, id spiffeid.ID, dnsNames []string) (cert *tls.Certificate, renewAt time.Time, err error) {
	if id.IsZero() {
		id = a.id
	}
	fail := func(err error) (*tls.Certificate, time.Time, error) {
		return nil, time.Time{}, fmt.Errorf("issuing a serving certificate for %v: %w", dnsNames, err)
	}
	for _, n := range dnsNames {
		if !validDNSName(n) {
			return fail(fmt.Errorf("%q is not a DNS name in lower case", n))
		}
	}
	if !id.MemberOf(a.cfg.TrustDomain) {
		return fail(fmt.Errorf("%s is not of trust domain %s", id, a.cfg.TrustDomain.Name()))
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fail(err)
	}
	out, err := a.issueOne(ctx, certificate{kind: capb.IssuanceRecord_KIND_SERVING, evidence: capb.IssuanceRecord_EVIDENCE_SELF,
		id: id, dnsNames: dnsNames, pub: key.Public(), ttl: a.cfg.SVID.AgentTTL, door: door})
	if err != nil {
		return fail(err)
	}
	cert = &tls.Certificate{PrivateKey: key, Leaf: out.chain[0]}
	for _, c := range out.chain {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	return cert, out.renewAt, nil
}

// issueOne is issue for one leaf under the active intermediate.
func (a *Authority) issueOne(ctx context.Context, c certificate) (issued, error) {
	out, err := a.issue(ctx, a.intermediate.Load(), []certificate{c})
	if err != nil {
		return issued{}, err
	}
	return out[0], out[0].err
}

// VerifyClient checks the certificates of a TLS client: an X.509-SVID, valid now
// under the roots that are trusted now.
func (a *Authority) VerifyClient(chain []*x509.Certificate) error {
	if len(chain) == 0 {
		return errors.New("no client certificate")
	}
	return a.verifyClient(chain)
}

// Issuances yields the records of the issuance log that were written since a
// moment, oldest first, and perhaps some before it. An error comes last. It is for
// a door that remembers what it issued: the log is where that is durable.
func (a *Authority) Issuances(ctx context.Context, since time.Time) iter.Seq2[*capb.IssuanceRecord, error] {
	return func(yield func(*capb.IssuanceRecord, error) bool) {
		for rec, err := range a.log.Scan(ctx, a.log.Since(since)) {
			if err == nil && rec.Time.Before(since) {
				continue
			}
			var r *capb.IssuanceRecord
			if err == nil {
				r = &capb.IssuanceRecord{}
				err = proto.Unmarshal(rec.Data, r)
			}
			if err != nil {
				yield(nil, fmt.Errorf("reading the issuance log: %w", err))
				return
			}
			if !yield(r, nil) {
				return
			}
		}
	}
}

// Issued is how many records its issuance log has, of certificates and decisions.
func (a *Authority) Issued() uint64 { return a.log.Head().Sequence }
