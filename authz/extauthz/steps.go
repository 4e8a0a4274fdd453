package extauthz

import (
	"context"
	"errors"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/identity"
)

// Tokens verifies the tokens of requests whose proxy did not. Its methods may be
// called concurrently.
type Tokens interface {
	// Claims looks for tokens where the RequestAuthentications of p
	// (Program.TokenRules, of which there is one at least) expect them in r, and
	// verifies them. It sets r.Claims if one is good, and leaves it nil if there
	// is none or it is refused: Decide tells those two apart by looking at r.
	// Nothing else of r may be changed. It is called once for a check, when all
	// providers have allowed, with what they have made of the request, and only where
	// the proxy says nothing of tokens itself, or what it says is no longer so.
	Claims(ctx context.Context, p *authz.Program, r *authz.Request) Verified
}

// Verified is what [Tokens] found.
type Verified struct {
	// Upstream is what the proxy changes of the request if it is allowed, and what
	// AUDIT, DENY and ALLOW policies see of it; nil is nothing. Names of headers are in
	// lower case; a header is first removed or overwritten, and further values are
	// appended to it (append). Nothing else is in it, but names of query parameters to
	// remove, as they stand in the path. It must not be changed afterwards.
	Upstream *authv3.OkHttpResponse
	// Refused is the body of the answer 401 if a token was refused, as "Jwt is
	// expired"; empty means "Jwt verification fails".
	Refused string
	// Forbidden makes the answer to a refused token 403 instead, as Envoy's is where
	// it is for another audience.
	Forbidden bool
	// Err is why a token was refused, for logs and records; nil where none was. It
	// must not hold the token.
	Err error
}

// Providers asks the extension providers of CUSTOM policies. Its methods may be
// called concurrently.
type Providers interface {
	// Ask asks the provider of that name about a CheckRequest, in bytes as the
	// proxy sent it, or as the providers before have changed it, which it must neither
	// change nor keep. Whatever is not
	// certain must be an error: an error denies, with [ReasonProviderFailed], or
	// with [ReasonProviderUnknown] if it is [ErrUnknownProvider]. The answer beside
	// an error has what the client is told, as one beside a denial.
	Ask(ctx context.Context, provider string, message []byte) (ProviderAnswer, error)
}

// ErrUnknownProvider says that there is no provider of a name.
var ErrUnknownProvider = errors.New("no extension provider of that name is configured")

// ProviderAnswer is what a provider said; the zero value denies.
type ProviderAnswer struct {
	Allowed bool
	// Response is passed on: OkResponse, as far as it is not changed again, and
	// DynamicMetadata where the request is allowed in the end, DeniedResponse, Status and DynamicMetadata where the
	// provider denied it. nil passes nothing on; a denial is then the usual one.
	Response *authv3.CheckResponse
}

// Records takes what was decided. Its methods may be called concurrently.
type Records interface {
	// Add takes the record of one answered check. It is called before the answer
	// goes out and must not block. The record, and all that it points to but for
	// Workload, Snapshot and Program, may only be used until Add returns.
	Add(r *Record)
}

// Record is one answered check.
type Record struct {
	// Time is when the check came, Took how long the answer took.
	Time time.Time
	Took time.Duration
	// Workload is the pod that the check is about.
	Workload *identity.Workload
	// Message is the CheckRequest, in bytes as it came; it may be malformed.
	Message []byte
	// Request is what was read of Message to decide, as much as Program needs:
	// headers that no policy reads are not in it ([FromBytes] reads all). What
	// providers have changed is in it, what the token changes is its Token. It is
	// incomplete where no policy was asked (Program is nil).
	Request *authz.Request
	// Snapshot and Program are the policies that decided; nil where none did.
	Snapshot *authz.Snapshot
	Program  *authz.Program
	// Decision is what the proxy is told. Where providers were asked it is the
	// last one: a denial by a provider names the CUSTOM rule.
	Decision authz.Decision
	// Asked are the providers that were asked, in their order, and Changed is what
	// those that allowed have changed of the request: Changed[i] is of Asked[i], and nil
	// for nothing. It may be shorter. The Changes themselves may be kept.
	Asked   []string
	Changed []*authz.Changes
	// Err is why no policy was asked, why a provider gave no answer, or why a
	// token was refused; else nil.
	Err error
}
