package attest

import (
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"time"
	"unsafe"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-mesh/signet/identity"
)

// Limits and defaults of [Config].
const (
	// DefaultMaxLifetime is an hour, what kubelet asks for unless told otherwise,
	// and five minutes of slack.
	DefaultMaxLifetime = 65 * time.Minute
	// DefaultSkew is the leeway that the API server itself gives.
	DefaultSkew = time.Minute
	// DefaultCacheSize is room for two tokens of each of 8,000 pods, in at most
	// some 10 MB.
	DefaultCacheSize = 16384

	maxLifetimeLimit = 24 * time.Hour
	maxSkew          = 5 * time.Minute
	// maxToken is the most bytes of a token that are looked at. A token of the
	// API server has about 1,000.
	maxToken = 16 << 10

	// outageStep is how long an expired token is good at a time while tokens cannot
	// be replaced.
	outageStep = time.Minute

	// legacyIssuer issues tokens that are bound to nothing and never expire.
	legacyIssuer = "kubernetes/serviceaccount"
)

// KeySource knows the keys of the issuer. [Keys] is one.
type KeySource interface {
	// Key is the key with that ID; ok is false if the issuer has no such key.
	// An error means that this cannot be said at the moment. It is called for each
	// attestation, so it must be quick for a key that is known, and it must
	// limit how often an unknown ID makes it look for new keys.
	Key(ctx context.Context, kid string) (k Key, ok bool, err error)
}

// Key is a public key of an issuer and the only algorithm that it is for.
type Key struct {
	// Public is an *rsa.PublicKey of at least 2048 bits or an *ecdsa.PublicKey
	// on P-256; tokens by any other are refused.
	Public crypto.PublicKey
	// Algorithm is RS256 for RSA and ES256 for P-256.
	Algorithm string
}

// Evidence is what a caller shows. Exactly one field must be set; today there is
// one.
type Evidence struct {
	// Token is a service-account token, without "Bearer ". It is a secret.
	Token string
}

// String says what kind of evidence it is, without the evidence.
func (e Evidence) String() string {
	if e.Token == "" {
		return "no evidence"
	}
	return fmt.Sprintf("a token of %d bytes", len(e.Token))
}

// GoString is String, so that no verb prints the token.
func (e Evidence) GoString() string { return e.String() }

// LogValue implements slog.LogValuer without the evidence.
func (e Evidence) LogValue() slog.Value { return slog.StringValue(e.String()) }

// Config says which tokens an [Attestor] accepts.
type Config struct {
	// Issuer is compared with iss, byte for byte. Empty is only allowed where Keys
	// say whose they are, as [Handed] do.
	Issuer string
	// Audience must be the only one of a token: signet-ca for agents, signet for
	// workloads. Required.
	Audience string
	// Keys are the issuer's. Required.
	Keys KeySource
	// Pods is the view of the pods that exist, such as *[identity.Pods]. Required.
	Pods interface {
		Lookup(uid string) (w identity.Workload, ok bool)
	}
	// Node is the only node whose pods are accepted: an agent names its own.
	// Empty accepts every node, for the authority, which compares the node itself.
	Node string
	// RequireNodeUID refuses tokens without the UID of the node. The API server
	// leaves it out if the node did not exist when it issued the token. Without
	// RequireNodeUID a UID is compared where both the token and the view have one.
	RequireNodeUID bool
	// ServiceAccounts are the only ones accepted, as NAMESPACE/NAME. Empty is an
	// error unless AnyServiceAccount is set, so that a list that got lost on its way
	// here does not open.
	ServiceAccounts []string
	// AnyServiceAccount accepts every service account; ServiceAccounts must be
	// empty then.
	AnyServiceAccount bool
	// AnyPodOf are nodes whose pods are believed on the word of their tokens alone,
	// without a view that has them: whoever holds the issuer's key can then be any pod
	// there. It is for machines without Kubernetes, for development and benches.
	AnyPodOf []string
	// Extended accepts tokens that the API server extended to a year for the sake of
	// old clients, as it does for its own audience, until the moment at which they
	// would have expired (the claim warnafter). Kubelet rotates them by then, so a pod
	// loses nothing. Without it such a token is refused by MaxLifetime.
	Extended bool
	// MaxLifetime is the most that exp − iat may be, at most 24 h. Zero means
	// DefaultMaxLifetime.
	MaxLifetime time.Duration
	// Skew is how far iat and nbf may lie in the future, at most 5 min; exp has no
	// leeway. Zero means DefaultSkew.
	Skew time.Duration
	// Outage reports whether tokens cannot be replaced at the moment, because the API
	// server is away, or was until a moment ago, and since when; a zero since is not
	// known, and as long as can be. While it does, a token that was accepted before it
	// expired, and that did not expire before since, stays good for a pod that is in
	// the view; one that is first seen expired is refused, and so is one that had
	// expired already, for that one could be replaced. Nil: never. It is called often,
	// and must be quick.
	Outage func() (since time.Time, on bool)
	// CacheSize is how many accepted tokens are remembered, at most. Zero means
	// DefaultCacheSize.
	CacheSize int
	// Metrics, if not nil, gets signet_attest_tokens_total by result and
	// signet_attest_remembered, both labelled with the audience.
	Metrics prometheus.Registerer
}

// Attestor verifies evidence. It is safe for concurrent use.
type Attestor struct {
	cfg     Config
	allowed map[string]struct{} // nil: every service account
	cache   *cache
	metrics *tokenMetrics
}

// New checks cfg and makes an Attestor.
func New(cfg Config) (*Attestor, error) {
	a, err := newAttestor(cfg)
	if err != nil {
		return nil, fmt.Errorf("setting up attestation: %w", err)
	}
	return a, nil
}

func newAttestor(cfg Config) (*Attestor, error) {
	switch {
	case cfg.Issuer == "" && !saysIssuer(cfg.Keys):
		return nil, errors.New("no issuer is configured; name the one in the tokens' iss")
	case cfg.Issuer == legacyIssuer:
		return nil, fmt.Errorf("issuer %s makes tokens that are bound to no pod and never expire; name the issuer of projected tokens", legacyIssuer)
	case strings.ContainsAny(cfg.Issuer, " \t\r\n"):
		return nil, fmt.Errorf("issuer %q contains white space", cfg.Issuer)
	case cfg.Audience == "":
		return nil, errors.New("no audience is configured")
	case cfg.Keys == nil:
		return nil, errors.New("no keys of the issuer are configured")
	case cfg.Pods == nil:
		return nil, errors.New("no view of the pods is configured")
	case cfg.MaxLifetime < 0 || cfg.MaxLifetime > maxLifetimeLimit:
		return nil, fmt.Errorf("maximum lifetime of tokens is %s; it must be more than zero and at most %s", cfg.MaxLifetime, maxLifetimeLimit)
	case cfg.Skew < 0 || cfg.Skew > maxSkew:
		return nil, fmt.Errorf("allowed clock skew is %s; it must be more than zero and at most %s", cfg.Skew, maxSkew)
	case cfg.CacheSize < 0:
		return nil, fmt.Errorf("cache size is %d; it must be positive", cfg.CacheSize)
	}
	if strings.Contains(cfg.Issuer, "://") {
		// RFC 7519 section 2: a StringOrURI with a colon is a URI.
		if _, err := url.Parse(cfg.Issuer); err != nil {
			return nil, fmt.Errorf("issuer %q: %w", cfg.Issuer, err)
		}
	}
	if cfg.MaxLifetime == 0 {
		cfg.MaxLifetime = DefaultMaxLifetime
	}
	if cfg.Skew == 0 {
		cfg.Skew = DefaultSkew
	}
	if cfg.CacheSize == 0 {
		cfg.CacheSize = DefaultCacheSize
	}
	a := &Attestor{cfg: cfg, cache: newCache(cfg.CacheSize)}
	switch {
	case cfg.AnyServiceAccount && len(cfg.ServiceAccounts) > 0:
		return nil, errors.New("both a list of service accounts and any service account are configured; choose one")
	case !cfg.AnyServiceAccount && len(cfg.ServiceAccounts) == 0:
		return nil, errors.New("the list of allowed service accounts is empty; name them as NAMESPACE/NAME")
	case !cfg.AnyServiceAccount:
		a.allowed = make(map[string]struct{}, len(cfg.ServiceAccounts))
		for _, sa := range cfg.ServiceAccounts {
			ns, name, ok := strings.Cut(sa, "/")
			if !ok || ns == "" || name == "" || strings.ContainsAny(name, "/") {
				return nil, fmt.Errorf("allowed service account %q must be NAMESPACE/NAME", sa)
			}
			a.allowed[sa] = struct{}{}
		}
	}
	m, err := newTokenMetrics(cfg.Metrics, cfg.Audience, a.cache)
	if err != nil {
		return nil, err
	}
	a.metrics = m
	return a, nil
}

// issuerSource is a KeySource that says whose keys it has.
type issuerSource interface {
	Issuer() (issuer string, ok bool)
}

func saysIssuer(k KeySource) bool {
	_, ok := k.(issuerSource)
	return ok
}

// issuer is the one that tokens must be of.
func (a *Attestor) issuer() (string, error) {
	if a.cfg.Issuer != "" {
		return a.cfg.Issuer, nil
	}
	// That newAttestor asked for one makes this hold.
	if issuer, ok := a.cfg.Keys.(issuerSource).Issuer(); ok && issuer != "" {
		return issuer, nil
	}
	return "", &refusal{kind: ErrUnavailable, check: checkUnavailable, detail: "the issuer is not known yet", cause: errNotHanded}
}

// Attest says which workload the evidence proves, and until when. The workload is
// what the view of the pods says; its slices and maps are shared and must not be
// changed.
//
// Errors wrap exactly one of ErrRefused, ErrUnknownPod, ErrOtherNode,
// ErrNotAllowed and ErrUnavailable. Their text is for the log of the server, a
// client gets [Public].
func (a *Attestor) Attest(ctx context.Context, e Evidence) (w identity.Workload, until time.Time, err error) {
	return a.attestOn(ctx, nil, e.Token)
}

// attestOn is Attest for a token that came on a connection, which may be nil.
func (a *Attestor) attestOn(ctx context.Context, on *connection, token string) (w identity.Workload, until time.Time, err error) {
	now := time.Now()
	if on != nil {
		if last := on.last.Load(); last != nil && last.token == token {
			if w, until, err = a.stillHolds(ctx, last.proof, now); err == nil {
				a.metrics.count(true, nil)
				return w, until, nil
			}
		}
	}
	p, w, until, remembered, err := a.attest(ctx, token, now)
	a.metrics.count(remembered, err)
	if err != nil {
		return identity.Workload{}, time.Time{}, err
	}
	if on != nil {
		on.accepted(token, p)
	}
	return w, until, nil
}

func (a *Attestor) attest(ctx context.Context, token string, now time.Time) (p *proof, w identity.Workload, until time.Time, remembered bool, err error) {
	if token == "" {
		return nil, w, until, false, refuse(checkMissing, "no token")
	}
	if len(token) > maxToken {
		return nil, w, until, false, refuse(checkMalformed, "%d bytes; at most %d are looked at", len(token), maxToken)
	}
	sum := sha256.Sum256(unsafe.Slice(unsafe.StringData(token), len(token)))
	if p, ok := a.cache.lookup(sum); ok {
		w, until, err := a.stillHolds(ctx, p, now)
		if err == nil {
			return p, w, until, true, nil
		}
		if !now.Before(p.expires) && a.held(p) {
			// It cannot be verified from the start, and the pod may come back.
			return nil, w, until, true, err
		}
		// What no longer holds is verified from the start, so that the error
		// says why, and so that a pod that the view lost for a moment comes back.
		a.cache.drop(sum)
	}
	if p, err = a.verify(ctx, token, now); err != nil {
		return nil, w, until, false, err
	}
	if w, err = a.place(p); err != nil {
		return nil, w, until, false, err
	}
	a.cache.add(sum, p, now)
	return p, w, p.expires, false, nil
}

// stillHolds says of what pod an earlier proof is now, and until when that holds, or
// why it is one no more: the token has not expired, or could not be replaced; its key
// is still the issuer's; and the pod is in the view as it was.
func (a *Attestor) stillHolds(ctx context.Context, p *proof, now time.Time) (w identity.Workload, until time.Time, err error) {
	until = p.expires
	if !now.Before(until) {
		if !a.held(p) {
			return w, time.Time{}, refuse(checkExpired, "since %s", p.expires.UTC().Format(time.RFC3339))
		}
		until = now.Add(outageStep)
	}
	k, ok, err := a.cfg.Keys.Key(ctx, p.kid)
	if err != nil || !ok || !k.equal(p.key) {
		return w, time.Time{}, refuse(checkKey, "key %s is not the issuer's any more", quoted(p.kid))
	}
	if w, err = a.place(p); err != nil {
		return identity.Workload{}, time.Time{}, err
	}
	return w, until, nil
}

// held reports whether the token of p, once it has expired, is good all the same: it
// could not be replaced from before that moment until now. What is remembered is not
// swept, so a token may be presented that expired long ago.
func (a *Attestor) held(p *proof) bool {
	if a.cfg.Outage == nil {
		return false
	}
	since, on := a.cfg.Outage()
	return on && !p.expires.Before(since)
}

// hold says until when a stream may go on whose proof ends about now: only in an
// outage, only for a token that was accepted before it expired, and never for long
// without being asked again.
func (a *Attestor) hold(ctx context.Context, token string) (until time.Time, err error) {
	p, ok := a.cache.lookup(sha256.Sum256([]byte(token)))
	if !ok || !a.held(p) {
		return until, ErrProofExpires
	}
	now := time.Now()
	if _, until, err = a.stillHolds(ctx, p, now); err != nil {
		return time.Time{}, err
	}
	if least := now.Add(outageStep); until.Before(least) {
		until = least
	}
	return until, nil
}

// Allows reports whether w runs under a service account whose tokens are accepted.
func (a *Attestor) Allows(w identity.Workload) bool {
	if a.allowed == nil {
		return true
	}
	_, ok := a.allowed[w.Namespace+"/"+w.ServiceAccount]
	return ok
}

// place finds the pod that a token names in the view of the pods.
func (a *Attestor) place(p *proof) (w identity.Workload, err error) {
	if a.allowed != nil {
		if _, ok := a.allowed[p.serviceAccountKey]; !ok {
			return w, refuseAs(ErrNotAllowed, checkNotAllowed, "service account %s is not on the list", quoted(p.serviceAccountKey))
		}
	}
	if a.cfg.Node != "" && p.node != a.cfg.Node {
		return w, refuseAs(ErrOtherNode, checkOtherNode, "pod %s/%s is on node %s, this is %q",
			quoted(p.namespace), quoted(p.pod), quoted(p.node), a.cfg.Node)
	}
	v, ok := a.cfg.Pods.Lookup(p.podUID)
	if !ok && slices.Contains(a.cfg.AnyPodOf, p.node) {
		return identity.Workload{Namespace: p.namespace, ServiceAccount: p.serviceAccount,
			Pod: p.pod, PodUID: p.podUID, Node: p.node, NodeUID: p.nodeUID}, nil
	}
	if !ok {
		return w, refuseAs(ErrUnknownPod, checkUnknownPod, "pod %s/%s with UID %s on node %s",
			quoted(p.namespace), quoted(p.pod), quoted(p.podUID), quoted(p.node))
	}
	if v.PodUID != p.podUID || v.Namespace != p.namespace || v.ServiceAccount != p.serviceAccount || v.Pod != p.pod {
		return w, refuse(checkView, "pod UID %s is %s/%s with service account %s in the token, and %q/%q with %q in the view",
			quoted(p.podUID), quoted(p.namespace), quoted(p.pod), quoted(p.serviceAccount), v.Namespace, v.Pod, v.ServiceAccount)
	}
	// A view that knows the account's UID is of a cluster, whose tokens all have it.
	if v.ServiceAccountUID != "" && v.ServiceAccountUID != p.serviceAccountUID {
		return w, refuse(checkView, "service account %s has UID %s in the token and %q in the view: it was replaced",
			quoted(p.serviceAccountKey), quoted(p.serviceAccountUID), v.ServiceAccountUID)
	}
	if v.Node != p.node || (v.NodeUID != "" && p.nodeUID != "" && v.NodeUID != p.nodeUID) {
		return w, refuseAs(ErrOtherNode, checkOtherNode, "pod %s/%s is on node %s (UID %s) in the token, and on %q (UID %q) in the view",
			quoted(p.namespace), quoted(p.pod), quoted(p.node), quoted(p.nodeUID), v.Node, v.NodeUID)
	}
	return v, nil
}
