package holder

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-mesh/signet/identity"
)

const (
	// spkiSize is the size of a P-256 key as SubjectPublicKeyInfo.
	spkiSize = 91
	// maxChain is the longest chain that is looked at.
	maxChain = 8
	// maxCertificate is the largest certificate that is looked at, in bytes.
	maxCertificate = 16 << 10
)

var errNoTrust = errors.New("the trust bundle is not known yet")

// outcome is what became of one item.
type outcome struct {
	svid    *x509svid.SVID
	trust   *identity.Trust // under which svid verified
	expires time.Time
	renewAt time.Time // as the authority chose it
	advice  time.Duration
	result  string // label of the metric
	err     error
}

// The results by which attempts are counted.
const (
	resultIssued      = "issued"
	resultRefused     = "refused"     // the authority refused this item
	resultInvalid     = "invalid"     // what came back was not what was asked for
	resultUnavailable = "unavailable" // the whole batch failed
)

// attempt asks the issuer once and verifies what comes back. It holds no lock
// and touches only b.
func (h *Holder) attempt(ctx context.Context, b *batch) {
	// An SVID that cannot be verified would be thrown away.
	if h.trust() == nil {
		b.err = errNoTrust
		return
	}
	ctx, cancel := context.WithTimeout(ctx, b.timeout)
	defer cancel()
	keys := make([]*ecdsa.PrivateKey, len(b.items))
	requests := make([]identity.Request, len(b.items))
	for i, it := range b.items {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			b.err = fmt.Errorf("generating a key: %w", err)
			return
		}
		spki, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			b.err = fmt.Errorf("encoding a public key: %w", err)
			return
		}
		keys[i] = key
		requests[i] = identity.Request{PublicKey: spki, Token: it.evidence.token, PodUID: it.evidence.pod, HeldUntil: it.held}
	}
	results, err := h.issuer.Issue(ctx, requests)
	if err != nil {
		b.err = fmt.Errorf("asking for %d SVIDs: %w", len(requests), err)
		return
	}
	if len(results) != len(requests) {
		b.err = fmt.Errorf("asking for %d SVIDs: the authority sent %d answers", len(requests), len(results))
		return
	}
	trust, now := h.trust(), h.now()
	for i, it := range b.items {
		it.outcome = judge(results[i], keys[i], it.id, trust, now)
	}
}

// judge turns the authority's answer to one request into an SVID, or into the
// reason why it is none.
func judge(r identity.Result, key *ecdsa.PrivateKey, id spiffeid.ID, trust *identity.Trust, now time.Time) outcome {
	if r.Err != nil {
		return outcome{result: resultRefused, advice: r.RetryAfter, err: r.Err}
	}
	chain, err := reparse(r.Chain)
	if err != nil {
		return outcome{result: resultInvalid, err: err}
	}
	expires, err := verify(chain, key.Public(), id, trust, now)
	if err != nil {
		return outcome{result: resultInvalid, err: err}
	}
	return outcome{
		trust:   trust,
		svid:    &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key},
		expires: expires,
		renewAt: r.RenewAt,
		result:  resultIssued,
	}
}

// reparse reads the certificates from their bytes: those are what a proxy will
// be sent, so those are what is verified.
func reparse(chain []*x509.Certificate) ([]*x509.Certificate, error) {
	ders := make([][]byte, len(chain))
	for i, c := range chain {
		if c == nil {
			return nil, fmt.Errorf("certificate %d of the chain is missing", i)
		}
		ders[i] = c.Raw
	}
	return parseChain(ders)
}

// parseChain parses a chain of bounded size.
func parseChain(ders [][]byte) ([]*x509.Certificate, error) {
	if len(ders) == 0 || len(ders) > maxChain {
		return nil, fmt.Errorf("the chain has %d certificates; 1 to %d are allowed", len(ders), maxChain)
	}
	chain := make([]*x509.Certificate, len(ders))
	for i, der := range ders {
		if len(der) > maxCertificate {
			return nil, fmt.Errorf("certificate %d of the chain has %d bytes; at most %d are allowed", i, len(der), maxCertificate)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("certificate %d of the chain: %w", i, err)
		}
		chain[i] = c
	}
	return chain, nil
}

// checkLeaf checks that chain, which is not empty, is in form an SVID of id for
// the key pub, and returns when the first certificate of it expires.
func checkLeaf(chain []*x509.Certificate, pub crypto.PublicKey, id spiffeid.ID) (expires time.Time, err error) {
	leaf := chain[0]
	got, err := identity.CheckSVID(leaf)
	switch {
	case err != nil:
		return time.Time{}, err
	case got != id:
		return time.Time{}, fmt.Errorf("the certificate is for %s, not for %s", got, id)
	}
	k, ok := leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !k.Equal(pub) {
		return time.Time{}, errors.New("the certificate carries another key")
	}
	expires = leaf.NotAfter
	for _, c := range chain[1:] {
		if c.NotAfter.Before(expires) {
			expires = c.NotAfter
		}
	}
	return expires, nil
}

// verify checks that chain, which is not empty, is an SVID of id for the key pub
// under trust at now, and returns when the first certificate of it expires.
func verify(chain []*x509.Certificate, pub crypto.PublicKey, id spiffeid.ID, trust *identity.Trust, now time.Time) (expires time.Time, err error) {
	if trust == nil {
		return time.Time{}, errNoTrust
	}
	if expires, err = checkLeaf(chain, pub, id); err != nil {
		return time.Time{}, err
	}
	for i, c := range chain[1:] {
		// Peers need the chain in order and every certificate of it.
		if err := chain[i].CheckSignatureFrom(c); err != nil {
			return time.Time{}, fmt.Errorf("certificate %d of the chain did not sign certificate %d: %w", i+1, i, err)
		}
	}
	if _, _, err := x509svid.Verify(chain, trust, x509svid.WithTime(identity.VerifiedAt(chain, now))); err != nil {
		return time.Time{}, err
	}
	if !now.Before(expires) {
		return time.Time{}, fmt.Errorf("the chain expired at %s", expires.UTC().Format(time.RFC3339))
	}
	return expires, nil
}

// finish takes up what an attempt brought.
func (h *Holder) finish(ctx context.Context, b *batch) {
	now := h.now()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.refresh()
	loud := false
	for _, it := range b.items {
		e := it.e
		e.inFlight = false
		if b.err != nil {
			it.outcome = outcome{result: resultUnavailable, err: b.err}
		}
		if it.err != nil && ctx.Err() != nil {
			continue // it failed because we are leaving
		}
		h.metrics.count(it)
		// An identity that was dropped meanwhile stays dropped, also if it is
		// wanted again: the new entry asks on its own.
		if h.entries[e.id] != e {
			continue
		}
		if it.err == nil {
			h.take(it, now)
			continue
		}
		h.fail(it, b.err != nil, now)
		if b.err != nil {
			loud = loud || worthALine(e.failures)
			continue
		}
		h.log.Log(ctx, level(worthALine(e.failures)), "no svid", "spiffe_id", e.id, "result", it.result,
			"pod_uid", it.evidence.pod, "failures", e.failures, "retry_in", e.next.Sub(now), "err", it.err)
	}
	if b.trust != h.trust() {
		h.signal() // whoever asks Holds was told to wait for this
	}
	if b.err == nil {
		h.hurry(now)
	} else if ctx.Err() == nil {
		h.log.Log(ctx, level(loud), "no svids: batch failed", "identities", len(b.items), "err", b.err)
	}
}

// take makes the outcome the SVID of its identity. The caller holds mu.
func (h *Holder) take(it *item, now time.Time) {
	e := it.e
	e.svid, e.expires, e.missed = it.svid, it.expires, false
	e.taken, e.good, e.hurried = now, it.trust, inTime
	e.over, e.dark = h.elapsed()+it.expires.Sub(now), false
	e.renewAt = renewAt(now, it.expires, it.renewAt, random())
	e.next, e.failures, e.failure, e.outage = e.renewAt, 0, nil, false
	e.turn, e.stuck, e.refused = 0, false, nil
	e.token, e.tokenPod = "", "" // renewals do without; a secret of no use is not kept
	if !it.renewal && !e.asked.IsZero() {
		h.metrics.first.Observe(now.Sub(e.asked).Seconds())
	}
	e.signal()
	h.signal()
	h.log.Info("svid issued", "spiffe_id", e.id, "serial", serialOf(it.svid.Certificates[0]),
		"not_after", e.expires, "renew_at", e.renewAt, "renewal", it.renewal)
}

// serialOf is a certificate's serial as logs and bans have it.
func serialOf(c *x509.Certificate) string { return fmt.Sprintf("%x", c.SerialNumber) }

// fail decides when and with what evidence to try again. The caller holds mu.
func (h *Holder) fail(it *item, outage bool, now time.Time) {
	e := it.e
	e.failures++
	e.failure, e.outage, e.tried = it.err, outage, now
	left := time.Duration(0)
	if e.svid != nil {
		left = e.expires.Sub(now)
	}
	if it.result == resultRefused {
		e.turn++
		if it.advice < 0 {
			e.turn = 0
			if e.refused == nil {
				e.refused = map[[sha256.Size]byte]struct{}{}
			}
			e.refused[it.evidence.sum()] = struct{}{}
			if v, ok := h.evidence(e, now); ok && len(e.refused) < maxRefused {
				// Other evidence, which is shown only once. One token after the
				// other is what a caller could go on with, so those have a pace.
				e.next = now
				if v.token != "" && it.evidence.token != "" {
					e.next = now.Add(refusedSpacing)
				}
				return
			}
			e.stuck = true
		}
	}
	e.next = now.Add(backoff(e.failures, left, it.advice, random()))
}

// worthALine keeps an identity that fails for hours from filling the log: its
// first, second, fourth, eighth … failure is a warning, the others are for
// debugging.
func worthALine(failures int) bool { return failures&(failures-1) == 0 }

func level(loud bool) slog.Level {
	if loud {
		return slog.LevelWarn
	}
	return slog.LevelDebug
}
