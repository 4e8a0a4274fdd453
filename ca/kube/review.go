package kube

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"

	authv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	// reviewMemory is how long a success is remembered, as long as the API server
	// remembers it itself.
	reviewMemory = 10 * time.Second
	// maxReviews is how many are remembered, at most.
	maxReviews = 4096
	// reviewTimeout bounds one question, and reviewPause is how long nobody else
	// asks an API server that did not answer one, so that a batch of requests
	// does not wait for each of its tokens in turn.
	reviewTimeout = 3 * time.Second
	reviewPause   = time.Second
)

// Keys of the extra information in a TokenReview's answer
// (k8s.io/apiserver/pkg/authentication/serviceaccount).
const (
	extraPodName  = "authentication.kubernetes.io/pod-name"
	extraPodUID   = "authentication.kubernetes.io/pod-uid"
	extraNodeName = "authentication.kubernetes.io/node-name"
	extraNodeUID  = "authentication.kubernetes.io/node-uid"
)

// Attestor verifies service-account tokens of the cluster. It is safe for
// concurrent use.
type Attestor struct {
	c      *Cluster
	cfg    attest.Config
	review bool
	// checked is cfg with the issuer and the keys of nobody.
	checked *attest.Attestor

	mu      sync.Mutex
	offline *attest.Attestor // guarded by mu; nil until the issuer is known
}

// Attestor makes an attestor of the cluster's tokens. cfg says which are accepted;
// its Issuer, Keys, Pods and RequireNodeUID are the cluster's and must be unset,
// and no pod is believed that is not in Pods.
// With review the API server has a say too, for each token.
func (c *Cluster) Attestor(cfg attest.Config, review bool) (*Attestor, error) {
	if cfg.Issuer != "" || cfg.Keys != nil || cfg.Pods != nil || len(cfg.AnyPodOf) > 0 {
		return nil, errors.New("setting up attestation: issuer, keys and pods are the cluster's")
	}
	cfg.Keys, cfg.Pods, cfg.RequireNodeUID = c.keys, c.Pods(), true
	// What is wrong with the configuration is told now; the issuer comes later.
	try := cfg
	try.Issuer, try.Metrics = "https://kubernetes.default.svc", nil
	checked, err := attest.New(try)
	if err != nil {
		return nil, err
	}
	return &Attestor{c: c, cfg: cfg, review: review, checked: checked}, nil
}

// Allows reports whether w runs under a service account whose tokens are accepted.
func (a *Attestor) Allows(w identity.Workload) bool { return a.checked.Allows(w) }

// Attest says which workload the evidence proves, and until when. Errors are those
// of [attest.Attestor.Attest]; while the API server's keys are not known yet, or
// its word is needed and it does not answer, they wrap attest.ErrUnavailable.
func (a *Attestor) Attest(ctx context.Context, e attest.Evidence) (w identity.Workload, until time.Time, err error) {
	offline, err := a.verifier()
	if err != nil {
		return w, until, err
	}
	w, until, err = offline.Attest(ctx, e)
	if !a.review || err != nil && !errors.Is(err, attest.ErrUnknownPod) {
		return w, until, err
	}
	// A good token of a pod that is not in the view: the API server knows whether
	// the pod is too new for the view or gone.
	if verdict := a.c.reviews.check(ctx, a.cfg.Audience, e.Token, w); verdict != nil {
		return identity.Workload{}, time.Time{}, verdict
	}
	return w, until, err
}

// verifier is the offline half, made when the issuer is known.
func (a *Attestor) verifier() (*attest.Attestor, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.offline != nil {
		return a.offline, nil
	}
	issuer, ok := a.c.keys.issuer()
	if !ok {
		return nil, fmt.Errorf("%w: the API server's keys have not been read yet%s", attest.ErrUnavailable, because(a.c.keys.trouble()))
	}
	cfg := a.cfg
	cfg.Issuer = issuer
	offline, err := attest.New(cfg)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", attest.ErrUnavailable, err)
	}
	a.offline = offline
	return offline, nil
}

// reviewer is the part of the API that asks.
type reviewer interface {
	Create(ctx context.Context, r *authv1.TokenReview, o metav1.CreateOptions) (*authv1.TokenReview, error)
}

// reviews asks the API server about tokens and remembers successes.
type reviews struct {
	api     reviewer
	metrics *metrics

	mu     sync.Mutex
	good   map[reviewKey]review // guarded by mu
	paused time.Time            // until when nobody asks; guarded by mu
}

type reviewKey struct {
	token    [sha256.Size]byte
	audience string
}

// review is a success.
type review struct {
	podUID string
	user   authv1.UserInfo
	until  time.Time
}

func newReviews(api reviewer, m *metrics) *reviews {
	return &reviews{api: api, metrics: m, good: map[reviewKey]review{}}
}

// check asks whether the token is good for the audience, and is that of w; a zero w
// is any. Errors wrap attest.ErrRefused or attest.ErrUnavailable.
func (r *reviews) check(ctx context.Context, audience, token string, w identity.Workload) error {
	k := reviewKey{sha256.Sum256([]byte(token)), audience}
	now := time.Now()
	r.mu.Lock()
	known, ok := r.good[k]
	paused := now.Before(r.paused)
	r.mu.Unlock()
	switch {
	case ok && now.Before(known.until):
		r.metrics.reviews.WithLabelValues("remembered").Inc()
	case paused:
		r.metrics.reviews.WithLabelValues("unavailable").Inc()
		return fmt.Errorf("%w: the API server did not answer a TokenReview a moment ago", attest.ErrUnavailable)
	default:
		var err error
		if known, err = r.ask(ctx, audience, token); err != nil {
			result := "refused"
			if errors.Is(err, attest.ErrUnavailable) {
				result = "unavailable"
			}
			r.metrics.reviews.WithLabelValues(result).Inc()
			return err
		}
		r.metrics.reviews.WithLabelValues("good").Inc()
		known.until = now.Add(reviewMemory)
		r.remember(k, known, now)
	}
	if w.IsZero() {
		return nil
	}
	return same(known.user, w)
}

func (r *reviews) ask(ctx context.Context, audience, token string) (review, error) {
	asking, cancel := context.WithTimeout(ctx, reviewTimeout)
	defer cancel()
	answer, err := r.api.Create(asking, &authv1.TokenReview{Spec: authv1.TokenReviewSpec{Token: token, Audiences: []string{audience}}}, metav1.CreateOptions{})
	if err != nil {
		if ctx.Err() == nil {
			r.mu.Lock()
			r.paused = time.Now().Add(reviewPause)
			r.mu.Unlock()
		}
		return review{}, fmt.Errorf("%w: asking the API server for a TokenReview: %w", attest.ErrUnavailable, err)
	}
	s := answer.Status
	switch {
	case !s.Authenticated:
		return review{}, fmt.Errorf("%w: the API server does not accept it (%.200q)", attest.ErrRefused, s.Error)
	case !slices.Contains(s.Audiences, audience):
		// An API server that does not know audiences leaves them out.
		return review{}, fmt.Errorf("%w: the API server accepts it, but not for audience %q", attest.ErrRefused, audience)
	}
	return review{podUID: extra(s.User, extraPodUID), user: s.User}, nil
}

// same compares what the API server says of a token with what was verified.
func same(u authv1.UserInfo, w identity.Workload) error {
	for _, c := range []struct{ what, theirs, ours string }{
		{"user", u.Username, "system:serviceaccount:" + w.Namespace + ":" + w.ServiceAccount},
		{"service account UID", u.UID, w.ServiceAccountUID},
		{"pod", extra(u, extraPodName), w.Pod},
		{"pod UID", extra(u, extraPodUID), w.PodUID},
		{"node", extra(u, extraNodeName), w.Node},
		{"node UID", extra(u, extraNodeUID), w.NodeUID},
	} {
		if c.theirs != c.ours {
			return fmt.Errorf("%w: the API server's TokenReview says %s %.80q, the token and the view of the pods say %.80q", attest.ErrRefused, c.what, c.theirs, c.ours)
		}
	}
	return nil
}

// extra is the one value of a key; none or several are nothing.
func extra(u authv1.UserInfo, key string) string {
	if v := u.Extra[key]; len(v) == 1 {
		return v[0]
	}
	return ""
}

// remember keeps a success. Where there are too many, what is over is forgotten
// first and then whatever comes: asking again costs a millisecond.
func (r *reviews) remember(k reviewKey, v review, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.good) >= maxReviews {
		for k, v := range r.good {
			if !now.Before(v.until) {
				delete(r.good, k)
			}
		}
	}
	for k := range r.good {
		if len(r.good) < maxReviews {
			break
		}
		delete(r.good, k)
	}
	r.good[k] = v
}

// forget drops what was remembered of a pod's tokens.
func (r *reviews) forget(podUID string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for k, v := range r.good {
		if v.podUID == podUID {
			delete(r.good, k)
		}
	}
}
