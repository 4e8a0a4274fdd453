package record

import (
	"time"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// Version is the newest of the records that this package writes. A change of what a
// record means is another version; the one before stays readable, and is written where
// a record has nothing that only the newer one can say.
//
// Version 2 has what extension providers, and the verification of the token, changed
// of the request. Version 3 has of that, too, what is too long to be shown.
const Version = 3

// Record is one decision and what it rests on.
type Record struct {
	// Time is when the check came, in UTC.
	Time time.Time
	// Workload is the destination of the request, which the policies were chosen
	// for: its namespace and service account, its pod with its UID, its node and its
	// labels.
	Workload identity.Workload
	// Request is what was decided about, but for what a record does not show: see
	// [Shown]. It is as it came: what providers changed is in Answers, and what the
	// token changed in Request.Token; its Claims are those that were decided on, behind
	// all of that. Replayed it may be unknown where it once was known, never the other
	// way round.
	Request authz.Request
	// Unread says that the request could not be read, or was refused before any
	// policy was asked. Request then has what could be read of it, for people; it
	// cannot be replayed.
	Unread bool
	// Allowed is what was answered.
	Allowed bool
	// Kind, Policy, Rule and Reason are those of [authz.Decision], or, where a
	// provider decided, of the rule that it was asked for.
	Kind, Policy string
	Rule         int
	Reason       authz.Reason
	// Err is why no policy was asked, or why a provider did not answer, for people;
	// else empty.
	Err string
	// Audited is what [authz.Decision.Audited] says, or nil.
	Audited *authz.Match
	// DryRuns are what [authz.Decision.DryRuns] says.
	DryRuns []authz.DryRun
	// Answers are those of the providers that were asked, in order.
	Answers []Answer
	// Generation is the number of the snapshot of policies; 0 where there is none.
	Generation uint64
	// Latency is how long the check took, without the transport.
	Latency time.Duration
	// RequestID and TraceID are the request's x-request-id and the trace of its
	// traceparent, or empty.
	RequestID, TraceID string
}

// Answer is what an extension provider said.
type Answer struct {
	// Provider is its name.
	Provider string
	// Allowed is its answer; one that did not answer has not allowed.
	Allowed bool
	// Reason is why it did not allow, or empty.
	Reason authz.Reason
	// Changes are what it changed of the request, as far as a record shows it; nil
	// for nothing.
	Changes *authz.Changes
}

// Banned reports whether a ban decided. Bans come before policies, and a record does
// not say which there were, so it cannot be replayed.
func (r *Record) Banned() bool {
	return r.Reason == authz.ReasonBanned || r.Reason == authz.ReasonBanUnknown
}

// Replay decides about the record's request by p, which may be of other policies
// than those that decided: p is [authz.Snapshot.For] of the record's Workload.
// Providers answer as they have answered. A decision that still asks is one about a
// provider that was not asked then: what it would say nobody knows. Where p does not
// have the same providers change the request in the same order, what its token says is
// unknown ([authz.Program.Again]). ok is false for a record that cannot be replayed; no
// policy changes what was decided there.
func Replay(p *authz.Program, r *Record) (d authz.Decision, ok bool) {
	if r.Unread || r.Banned() {
		return authz.Decision{Kind: r.Kind, Policy: r.Policy, Rule: r.Rule, Reason: r.Reason}, false
	}
	then := make([]*authz.Changes, len(r.Answers))
	for i := range r.Answers {
		then[i] = r.Answers[i].Changes
	}
	var refused *Answer
	d, _ = p.Again(&r.Request, then, func(d authz.Decision, _ *authz.Request) (*authz.Changes, bool) {
		a := r.answer(d.Provider)
		switch {
		case a == nil:
			return nil, false
		case !a.Allowed:
			refused = a
			return nil, false
		}
		return a.Changes, true
	})
	if refused != nil {
		d.Ask, d.Allowed, d.Reason = false, false, refused.Reason
	}
	return d, true
}

// answer is that of a provider, or nil if it was not asked.
func (r *Record) answer(provider string) *Answer {
	for i := range r.Answers {
		if r.Answers[i].Provider == provider {
			return &r.Answers[i]
		}
	}
	return nil
}
