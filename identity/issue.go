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
