package identity

import (
	"crypto/x509"
	"time"
)

// Request asks an authority for one SVID. It names no identity: the authority
// renders that from the evidence.
type Request struct {
	// PublicKey is SubjectPublicKeyInfo, DER.
	PublicKey []byte
	// Exactly one of Token and PodUID is the evidence: a service-account token
	// of the workload, or the UID of a pod that the authority itself must find
	// alive on the caller's node.
	Token  string
	PodUID string
	// HeldUntil is when the SVID ends that there is already; zero if there is none. An
	// authority that cannot answer all at once may put off who can wait.
	HeldUntil time.Time
}

// Result answers one Request.
type Result struct {
	// Chain is the certificate chain, leaf first, without the root.
	Chain []*x509.Certificate
	// RenewAt is when to ask again; the authority chose it.
	RenewAt time.Time
	// Err is why nothing was issued; Chain is then nil.
	Err error
	// RetryAfter is how long to wait before the same request is made again. It
	// is zero where the authority gave no advice, negative where a retry with
	// the same evidence cannot help.
	RetryAfter time.Duration
}

// maxLag is how far a machine's clock may be behind that of who issued to it.
const maxLag = 5 * time.Minute

// VerifiedAt is the moment at which a chain is to be verified on a machine whose clock says
// now: where a certificate begins less than five minutes later than that, the clock lags,
// and it is that beginning. It is never before now, so what has ended has ended.
func VerifiedAt(chain []*x509.Certificate, now time.Time) time.Time {
	at := now
	for _, c := range chain {
		if c.NotBefore.After(at) {
			at = c.NotBefore
		}
	}
	if at.Sub(now) > maxLag {
		return now // a clock that is wrong
	}
	return at
}
