package istio

import (
	"crypto"
	"time"

	"github.com/signet-mesh/signet/identity"

	pb "istio.io/api/security/v1alpha1"
)

const (
	MaxCSR      = maxCSR
	MaxOfOnePod = maxOfOnePod
	MaxOfPod    = maxOfPod
	MaxInFlight = maxInFlight
)

var (
	Lifetime = lifetime
	ParseCSR = parseCSR
)

// ParseRequest is what counts of a request.
func ParseRequest(m *pb.IstioCertificateRequest, maxTTL time.Duration) (crypto.PublicKey, time.Duration, error) {
	r, err := parseRequest(m, maxTTL)
	return r.key, r.ttl, err
}

// Renewable is how many certificates are remembered.
func (d *Door) Renewable() int { return d.renewals.len() }

// Remember notes a certificate as if the door had issued it.
func (d *Door) Remember(serial []byte, w identity.Workload, tokenAt, notAfter time.Time) {
	d.renewals.add(serial, w, tokenAt, notAfter)
}

// Forget drops what has expired at a moment.
func (d *Door) Forget(now time.Time) { d.renewals.forget(now) }

// InFlight is how many RPCs have a place.
func (d *Door) InFlight() int { return d.places.Taken() }

// EncodePEM is how leaves are encoded.
var EncodePEM = encodePEM
