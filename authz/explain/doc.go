// Package explain says why a request was decided as it was and what would decide it
// otherwise, who may call a workload, and what a change of policies changes. It is pure, and decides nothing itself: every decision that it tells of
// is one of package authz, of these policies or of changed ones.
//
//	explanation := explain.Explain(explain.Case{Set: set, Snapshot: snapshot, Workload: w, Request: r})
//	err := explanation.Write(os.Stdout) // or as JSON
//	answer := explain.WhoCan(snapshot, w, explain.Given{})
//	coverage, err := explain.NewCoverage(answer, envoy) // says the same of each request as Decide
//
// # Suggestions
//
// A suggestion is a change of the request, or of the policies, that turns the decision
// round. Each was tried on the way it is made: the changed policies were parsed as
// Istio's admission would, compiled, and have decided. Without any one of its parts it
// does not turn the decision round, which was tried too. Changes of policies are the
// narrowest that are known: exact values, never patterns; a rule that is split so that
// it excepts one request; a new policy only for the workload. Where a change opens
// more than the request, a note says what.
//
// A request that a provider of a CUSTOM policy has yet to decide has no suggestions;
// elsewhere providers are taken to allow, and the suggestion names them.
//
// # Trust
//
// An attacker who chooses requests chooses what stands in explanations of them: it is
// quoted and bounded. A suggestion to the policies is advice about what would let a
// request in, not that it should be let in; who follows it without looking opens what
// it says. Nothing here changes what is enforced.
package explain
