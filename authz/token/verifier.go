package token

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/http/httpguts"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
)

const (
	// Skew is how far clocks may be apart.
	Skew = 60 * time.Second
	// MaxSize is the longest token in bytes; Envoy takes 60 KiB of headers.
	MaxSize = 64 << 10
	// MaxTokens is how many tokens of one request a rule looks at; more are refused.
	MaxTokens = 16
	// MaxSignatures is how many keys are tried for one request, for all its tokens and
	// all rules together; a request that would need more is refused. A token with a key
	// ID has the keys of that ID tried, and those without one.
	MaxSignatures = 100
	// maxRemembered is how many tokens are remembered, and maxRememberedSize the
	// longest of them in bytes; maxRememberedWeight is how much memory they take at
	// most, about, with their claims, which can take forty times the token.
	maxRemembered, maxRememberedSize, maxRememberedWeight = 2048, 4 << 10, 16 << 20
	// maxInline is how many rules' inline keys are remembered.
	maxInline = 1024
)

// Source has the keys of rules that do not have them inline.
type Source interface {
	// Keys are the keys for the rule's tokens now, or nil. It is called for each
	// token, and must not wait.
	Keys(rule *authz.TokenRule) *Keys
	// UnknownKey says that a token has the ID of a key that is not in Keys, so that
	// they may be old. It is called as often as clients like, and must not wait.
	UnknownKey(rule *authz.TokenRule)
}

// Config is what [New] needs.
type Config struct {
	// Keys is where keys come from; nil: only those that are inline.
	Keys Source
	// Metrics is where metrics are registered; nil registers none.
	Metrics prometheus.Registerer
}

// Verifier verifies the tokens of requests. It is safe for concurrent use.
type Verifier struct {
	source   Source
	inline   *lru.Cache[*authz.TokenRule, *Keys] // nil values for sets that cannot be read
	known    *lru.Cache[proof, *parsed]
	weight   atomic.Int64 // of known
	verified *prometheus.CounterVec
	hits     prometheus.Counter
	tried    prometheus.Counter
	counts   [statuses]prometheus.Counter
}

// proof is what was proved about a token: that these keys verify it. A pointer
// stays the same thing while it is in the cache.
type proof struct {
	sum  [sha256.Size]byte
	rule *authz.TokenRule
	keys *Keys
}

// New makes a Verifier.
func New(cfg Config) (*Verifier, error) {
	v := &Verifier{source: cfg.Keys}
	var err1, err2 error
	v.inline, err1 = lru.New[*authz.TokenRule, *Keys](maxInline)
	v.known, err2 = lru.NewWithEvict(maxRemembered, func(_ proof, t *parsed) { v.weight.Add(-t.weight) })
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	v.verified = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "signet_token_requests_total",
		Help: "Requests to workloads with a RequestAuthentication, by what became of their tokens.",
	}, []string{"status"})
	v.hits = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "signet_token_remembered_total",
		Help: "Tokens whose signature was known to be good.",
	})
	v.tried = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "signet_token_signatures_total",
		Help: "Keys that were tried for the signatures of tokens.",
	})
	for s := range statuses {
		v.counts[s] = v.verified.WithLabelValues(s.String())
	}
	if cfg.Metrics == nil {
		return v, nil
	}
	for i, c := range []prometheus.Collector{v.verified, v.hits, v.tried} {
		if err := cfg.Metrics.Register(c); err != nil {
			for _, c := range []prometheus.Collector{v.verified, v.hits}[:i] {
				cfg.Metrics.Unregister(c)
			}
			return nil, err
		}
	}
	return v, nil
}

// Result is what was found of a request's tokens.
type Result struct {
	// Status is Good where Claims are to be used, Missing where there are no tokens
	// or none are looked for; any other refuses the request.
	Status Status
	// Rule is the rule that decided; nil for Missing.
	Rule *authz.TokenRule
	// Claims are those of the token, for authz.Request.Claims. They are shared, and
	// must not be changed.
	Claims *structpb.Struct
	// RemoveHeaders are the headers, in lower case, that a request that is let
	// through must lose: those of tokens that are not to be forwarded, and those in
	// which a rule puts claims, whatever a client put there. A header that is set
	// again is not among them.
	RemoveHeaders []string
	// RemoveParams are the query parameters that it must lose.
	RemoveParams []string
	// SetHeaders are the headers, in lower case, that it must get, in place of what
	// a client put there; one that is there twice has two values.
	SetHeaders []Header
}

// Header is a header with claims.
type Header struct{ Name, Value string }

// Verify verifies the tokens of a request to the workload of p, as of now. It
// changes neither, and keeps nothing of them. When ctx ends no more keys are tried,
// and the request is refused.
//
// Claims that are in r already, because the proxy has verified a token, are left to
// [authz.Program.Decide]: nothing is verified, and the Status is Missing.
func (v *Verifier) Verify(ctx context.Context, p *authz.Program, r *authz.Request, now time.Time) Result {
	rules := p.Verifies()
	if len(rules) == 0 || !r.HTTP || r.Claims != nil {
		return Result{}
	}
	if r.Preflight() { // nobody looks for a token, and no header has a claim
		var result Result
		result.outputs(rules)
		return result
	}
	left := MaxSignatures
	result := v.verify(ctx, rules, r, uint64(max(0, now.Unix())), &left)
	if tried := MaxSignatures - left; tried > 0 {
		v.tried.Add(float64(tried))
	}
	v.counts[result.Status].Inc()
	return result
}

func (v *Verifier) verify(ctx context.Context, rules []*authz.TokenRule, r *authz.Request, now uint64, left *int) Result {
	// Why no rule took the tokens. The configuration that Istio makes tries each rule
	// alone, and then all together, where a missing token is no error: the first
	// refusal there is what Envoy answers, but that an issuer is another's is a worse
	// reason than any other.
	var first, last Result
	for _, rule := range rules {
		result := v.rule(ctx, rule, r, now, left)
		switch {
		case result.Status == Good:
			result.outputs(rules)
			return result
		case result.Status == Unread || result.Status == TooManyKeys || result.Status == Interrupted:
			return result // it might be good, with other claims than those of the rules that follow
		case result.Status == Missing:
			continue
		case first.Status == Missing:
			first = result
		}
		if result.Status != Foreign {
			last = result
		}
	}
	if first.Status == Foreign && last.Status != Missing {
		first = last
	}
	if first.Status == Missing {
		first.outputs(rules)
	}
	return first
}

// rule verifies the tokens that one rule finds: all must be good. left is how many
// keys may be tried.
func (v *Verifier) rule(ctx context.Context, rule *authz.TokenRule, r *authz.Request, now uint64, left *int) (out Result) {
	if !rule.Complete(r) {
		return Result{Status: Unread, Rule: rule}
	}
	var found []authz.Token
	for t := range rule.Tokens(r) {
		if len(found) == MaxTokens {
			return Result{Status: TooMany, Rule: rule}
		}
		found = append(found, t)
	}
	// From the last to the first, as Envoy does: the first one's claims count.
	for _, at := range slices.Backward(found) {
		t, status := v.token(ctx, rule, at.Text(), now, left)
		if status != Good {
			return Result{Status: status, Rule: rule}
		}
		out.Status, out.Rule, out.Claims = Good, rule, t.normal
		out.forward(t)
		if !rule.Spec.GetForwardOriginalToken() {
			switch {
			case at.Header != "" && !slices.Contains(out.RemoveHeaders, at.Header):
				out.RemoveHeaders = append(out.RemoveHeaders, at.Header)
			case at.Param != "":
				out.RemoveParams = append(out.RemoveParams, at.Param)
			}
		}
	}
	return out
}

// token verifies one token.
func (v *Verifier) token(ctx context.Context, rule *authz.TokenRule, text []byte, now uint64, left *int) (*parsed, Status) {
	keys := v.keys(rule)
	var p proof
	remember := keys != nil && len(text) <= maxRememberedSize
	var t *parsed
	known := false
	if remember {
		p = proof{sha256.Sum256(text), rule, keys}
		t, known = v.known.Get(p)
	}
	if !known {
		var status Status
		if t, status = parse(text); status != Good {
			return nil, status
		}
	}
	if !rule.TakesIssuer(t.issuer) {
		return nil, Foreign
	}
	if status := t.valid(now); status != Good {
		return nil, status
	}
	if !rule.TakesAudience(t.claims.GetFields()["aud"]) {
		return nil, Audience
	}
	if known {
		v.hits.Inc()
		return t, Good
	}
	if keys == nil {
		return nil, NoKeys
	}
	if status := keys.verify(ctx, t.jws, t.kid, t.alg, left); status != Good {
		if status == UnknownKey && v.source != nil && rule.Spec.GetJwks() == "" {
			v.source.UnknownKey(rule)
		}
		return nil, status
	}
	t.jws, t.normal = nil, normalized(t.claims, rule)
	if remember {
		v.remember(p, t)
	}
	return t, Good
}

// remember adds a token to those that are known, and takes as many away as it has no
// room for.
func (v *Verifier) remember(p proof, t *parsed) {
	t.weight = t.weigh()
	if there, _ := v.known.ContainsOrAdd(p, t); there {
		return // another request came first
	}
	for v.weight.Add(t.weight); v.weight.Load() > maxRememberedWeight; {
		if _, _, ok := v.known.RemoveOldest(); !ok {
			return
		}
	}
}

// keys are those by which tokens of the rule are verified, or nil.
func (v *Verifier) keys(rule *authz.TokenRule) *Keys {
	text := rule.Spec.GetJwks()
	if text == "" {
		if v.source == nil {
			return nil
		}
		return v.source.Keys(rule)
	}
	keys, ok := v.inline.Get(rule)
	if !ok {
		keys, _ = ParseKeys([]byte(text)) // nil, where they are not usable, refuses every token
		v.inline.Add(rule, keys)
	}
	return keys
}

// Claims that always hold words, in Istio.
var alwaysWords = []string{"permission", "scope"}

// normalized are the claims as policies see them.
func normalized(claims *structpb.Struct, rule *authz.TokenRule) *structpb.Struct {
	var out *structpb.Struct
	for _, name := range slices.Concat(alwaysWords, rule.Spec.GetSpaceDelimitedClaims()) {
		text, ok := claims.GetFields()[name].GetKind().(*structpb.Value_StringValue)
		if !ok {
			continue
		}
		var words []*structpb.Value
		for w := range strings.SplitSeq(text.StringValue, " ") {
			if w != "" {
				words = append(words, structpb.NewStringValue(w))
			}
		}
		if words == nil {
			continue // as in Envoy, text without words stays
		}
		if out == nil {
			out = &structpb.Struct{Fields: make(map[string]*structpb.Value, len(claims.GetFields()))}
			for k, v := range claims.GetFields() {
				out.Fields[k] = v
			}
		}
		out.Fields[name] = structpb.NewListValue(&structpb.ListValue{Values: words})
	}
	return cmp.Or(out, claims)
}

// forward adds the headers that the rule makes of a token.
func (r *Result) forward(t *parsed) {
	if name := r.Rule.Spec.GetOutputPayloadToHeader(); name != "" {
		r.SetHeaders = append(r.SetHeaders, Header{strings.ToLower(name), t.payload})
	}
	for _, o := range r.Rule.Spec.GetOutputClaimToHeaders() {
		if text := claimText(t.claims, o.GetClaim()); text != "" && httpguts.ValidHeaderFieldValue(text) {
			r.SetHeaders = append(r.SetHeaders, Header{strings.ToLower(o.GetHeader()), text})
		}
	}
}

// outputs adds to RemoveHeaders what clients must not be able to put where a rule
// puts claims: also the headers of rules that found no token.
func (r *Result) outputs(rules []*authz.TokenRule) {
	strip := func(name string) {
		name = strings.ToLower(name)
		if name != "" && !slices.Contains(r.RemoveHeaders, name) {
			r.RemoveHeaders = append(r.RemoveHeaders, name)
		}
	}
	for _, rule := range rules {
		strip(rule.Spec.GetOutputPayloadToHeader())
		for _, o := range rule.Spec.GetOutputClaimToHeaders() {
			strip(o.GetHeader())
		}
	}
	r.RemoveHeaders = slices.DeleteFunc(r.RemoveHeaders, func(name string) bool {
		return slices.ContainsFunc(r.SetHeaders, func(h Header) bool { return h.Name == name })
	})
}

// claimText is a claim as Envoy writes it into a header, or empty where it writes
// none. A name with dots is a path.
func claimText(claims *structpb.Struct, path string) string {
	var v *structpb.Value
	s := claims
	for name := range strings.SplitSeq(path, ".") {
		if v = s.GetFields()[name]; v == nil {
			return ""
		}
		s = v.GetStructValue()
	}
	switch k := v.GetKind().(type) {
	case *structpb.Value_StringValue:
		return k.StringValue
	case *structpb.Value_NumberValue:
		n := k.NumberValue
		if n < 0 || n >= math.MaxUint64 || n != math.Trunc(n) {
			return strconv.FormatFloat(n, 'f', 6, 64)
		}
		return strconv.FormatUint(uint64(n), 10)
	case *structpb.Value_BoolValue:
		return strconv.FormatBool(k.BoolValue)
	case *structpb.Value_StructValue, *structpb.Value_ListValue:
		text, err := protojson.Marshal(v)
		if err != nil {
			return ""
		}
		return base64.StdEncoding.EncodeToString(compactJSON(text))
	}
	return ""
}

// compactJSON removes the spaces that protojson puts in at random.
func compactJSON(text []byte) []byte {
	var b bytes.Buffer
	if json.Compact(&b, text) != nil {
		return text
	}
	return b.Bytes()
}
