package demo

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Names of the rows that more than the table needs to know.
const rowIdentity = "identity"

// row is one claim and how it is looked at.
type row struct {
	name string
	// claim is what the row shows, in the words of the product's promise.
	claim string
	// sabotage is what --break does, so that the claim is not true.
	sabotage string
	// check observes. It leaves everything as it found it, also when it fails or
	// is sabotaged, so that no other row fails with it.
	check func(ctx context.Context, s *stage, o *observation) error
}

// rows are all of them in the order in which they run. That of the authority is
// the last: sabotaged, it leaves the SVIDs to expire.
var rows = []row{
	{rowIdentity, "two proxies get SVIDs for nothing but a service-account token",
		"the server's token is signed by another issuer", checkIdentity},
	{"mtls", "mutual TLS: each side sees the other's SPIFFE ID in a certificate of the authority",
		"the request goes past the client's proxy, in plaintext", checkMutualTLS},
	{"no-certificate", "a TLS client without a certificate is refused",
		"the client has one", checkNoCertificate},
	{"allow", "GET /hello 200",
		"a policy closes /hello", checkAllow},
	{"deny", "GET /admin 403, by the policy that says so",
		"the policy closes another path", checkDeny},
	{"strict", "plaintext is accepted under PERMISSIVE, refused once the file says STRICT",
		"the file still says PERMISSIVE", checkStrict},
	{"edit", "an edited policy is enforced at once",
		"the edited policy selects another workload", checkEdit},
	{"rotation", "SVIDs rotate under constant traffic, and no request fails",
		"signet-ca is stopped (SIGSTOP), so that nothing is renewed", checkRotation},
	{"other-node", "the token of a pod on another node is refused",
		"the token is of a pod of this node", checkOtherNode},
	{"expired", "an expired token is refused",
		"the token has not expired", checkExpired},
	{"audience", "a token for another audience is refused",
		"the token has the right audience", checkAudience},
	{"agent-restart", "signet-agent killed and started again under traffic on 64 connections, and no request fails",
		"the agent is not started again", checkAgentRestart},
	{"agent-away", "while signet-agent stays away, requests are denied, not let through",
		"the agent is not killed", checkAgentAway},
	{"ca-restart", "signet-ca killed and started again under traffic on 64 connections: no request fails, rotation goes on",
		"the authority is not started again", checkCARestart},
}

// rowNames are the names of all rows.
func rowNames() (names []string) {
	for _, r := range rows {
		names = append(names, r.name)
	}
	return names
}

// checkName is an error for what is no row's name.
func checkName(name string) error {
	if slices.Contains(rowNames(), name) {
		return nil
	}
	return fmt.Errorf("there is no row %q; the rows are %s", name, strings.Join(rowNames(), ", "))
}

// observation is what a check sees, for the table.
type observation struct {
	// broken says that the check must sabotage what it looks at.
	broken bool
	seen   []string
}

// note adds a line to the table.
func (o *observation) note(format string, args ...any) {
	o.seen = append(o.seen, fmt.Sprintf(format, args...))
}

// result is a row of the table.
type result struct {
	Row     string `json:"row"`
	Claim   string `json:"claim"`
	Outcome string `json:"outcome"`
	// Sabotaged says that --break named the row.
	Sabotaged bool     `json:"sabotaged,omitempty"`
	Seconds   float64  `json:"seconds"`
	Observed  []string `json:"observed"`
	// Problem is why the row did not hold or did not run.
	Problem string `json:"problem,omitempty"`
}

// Outcomes of a row.
const (
	held   = "held"
	failed = "FAILED"
	notRun = "not run"
)

// perform checks one row.
func perform(ctx context.Context, s *stage, r row, broken bool) result {
	o := observation{broken: broken, seen: []string{}}
	began := time.Now()
	err := r.check(ctx, s, &o)
	if ctx.Err() != nil {
		// Whatever the row says, it says it of a stage that is falling down.
		err = context.Cause(ctx)
	}
	res := result{Row: r.name, Claim: r.claim, Outcome: held, Sabotaged: broken, Seconds: time.Since(began).Seconds(), Observed: o.seen}
	if err != nil {
		res.Outcome, res.Problem = failed, err.Error()
	}
	return res
}

// pause waits, unless ctx ends before.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}
