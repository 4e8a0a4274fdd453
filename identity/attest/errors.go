package attest

import (
	"errors"
	"fmt"
)

// Every error of [Attestor.Attest] wraps exactly one of these.
var (
	// ErrRefused means that the evidence is bad, whoever sent it.
	ErrRefused = errors.New("token refused")
	// ErrUnknownPod means that the token is good, but the view has no pod with
	// that UID: it is new and the view lags behind, or it is gone.
	ErrUnknownPod = errors.New("pod is not in the view")
	// ErrOtherNode means that the token is good, but was issued to a pod on
	// another node than the one that is served here or that the view knows.
	ErrOtherNode = errors.New("pod is on another node")
	// ErrNotAllowed means that the token is good, but its service account is not
	// on the allow-list.
	ErrNotAllowed = errors.New("service account is not allowed")
	// ErrUnavailable means that nothing could be decided, because the keys of
	// the issuer could not be obtained. The same evidence may succeed later.
	ErrUnavailable = errors.New("token cannot be checked at the moment")
)

// Causes of the end of a stream's context ([context.Cause]).
var (
	// ErrProofExpires means that the token is about to expire; a new stream
	// with the rotated token goes on.
	ErrProofExpires = errors.New("the token that proved the caller expires")
	// ErrPodGone means that the pod left the view, or that the view now says
	// something else of it.
	ErrPodGone = errors.New("the caller's pod is gone")
)

// Public is what a client may learn of an error of [Attestor.Attest] or of the
// end of a stream: what to do, and neither what was compared nor with what.
func Public(err error) string {
	switch {
	case errors.Is(err, ErrRefused):
		return "the service-account token was refused; the log of the server says why"
	case errors.Is(err, ErrUnknownPod):
		return "the pod of the service-account token is not known here (yet)"
	case errors.Is(err, ErrOtherNode):
		return "the service-account token belongs to a pod on another node"
	case errors.Is(err, ErrNotAllowed):
		return "the service account of the token may not do this"
	case errors.Is(err, ErrProofExpires):
		return "the service-account token expires; come back with a fresh one"
	case errors.Is(err, ErrPodGone):
		return "the pod of the service-account token is gone"
	default:
		return "the service-account token cannot be checked at the moment"
	}
}

// check names what a token failed on. It is a metric label: the set is closed.
type check string

const (
	checkMissing     check = "missing"
	checkMalformed   check = "malformed"
	checkHeader      check = "header"
	checkAlgorithm   check = "algorithm"
	checkKey         check = "key"
	checkSignature   check = "signature"
	checkIssuer      check = "issuer"
	checkAudience    check = "audience"
	checkExpired     check = "expired"
	checkEarly       check = "not_yet_valid"
	checkLifetime    check = "lifetime"
	checkSubject     check = "subject"
	checkBinding     check = "binding"
	checkView        check = "view"
	checkUnknownPod  check = "unknown_pod"
	checkOtherNode   check = "other_node"
	checkNotAllowed  check = "not_allowed"
	checkUnavailable check = "unavailable"
)

var checks = []check{
	checkMissing, checkMalformed, checkHeader, checkAlgorithm, checkKey, checkSignature,
	checkIssuer, checkAudience, checkExpired, checkEarly, checkLifetime, checkSubject,
	checkBinding, checkView, checkUnknownPod, checkOtherNode, checkNotAllowed, checkUnavailable,
}

// refusal is every error of Attest. Its text is for the log; it holds claims,
// shortened and quoted, but never the token or a part of it that could be used.
type refusal struct {
	kind   error
	check  check
	detail string
	cause  error
}

func (r *refusal) Error() string {
	s := fmt.Sprintf("%s: %s: %s", r.kind, r.check, r.detail)
	if r.cause != nil {
		s += ": " + r.cause.Error()
	}
	return s
}

func (r *refusal) Unwrap() []error {
	if r.cause == nil {
		return []error{r.kind}
	}
	return []error{r.kind, r.cause}
}

func refuse(c check, format string, args ...any) error {
	return refuseAs(ErrRefused, c, format, args...)
}

func refuseAs(kind error, c check, format string, args ...any) error {
	return &refusal{kind: kind, check: c, detail: fmt.Sprintf(format, args...)}
}

// quoted is a value of a token in an error: quoted, so that it cannot forge log
// lines, and short.
type quoted string

func (q quoted) String() string {
	const limit = 80
	if len(q) > limit {
		return fmt.Sprintf("%q… (%d bytes)", string(q[:limit]), len(q))
	}
	return fmt.Sprintf("%q", string(q))
}

// checkOf is the check that err says failed; there is no other error, and what is
// not understood counts as unavailable.
func checkOf(err error) check {
	var r *refusal
	if errors.As(err, &r) {
		return r.check
	}
	return checkUnavailable
}
