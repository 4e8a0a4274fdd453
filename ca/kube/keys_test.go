package kube_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/ca/kube"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"
	"github.com/signet-mesh/signet/identity/attest/attesttest"

	authv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// published is what an API server says of its issuer.
type published struct {
	mu     sync.Mutex
	issuer string
	jwks   []byte
	err    error
	reads  int
}

func (p *published) fetch(context.Context) (string, []byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reads++
	return p.issuer, p.jwks, p.err
}

func (p *published) set(issuer string, jwks []byte, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.issuer, p.jwks, p.err = issuer, jwks, err
}

func (p *published) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.reads
}

func TestKeysOfTheIssuer(t *testing.T) {
	old, next := attesttest.NewIssuer(t), attesttest.NewIssuer(t)
	synctest.Test(t, func(t *testing.T) {
		p := &published{issuer: "https://a", err: errors.New("away")}
		c, _ := kube.Fed(nil, p.fetch, "")
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); _ = c.RunFed(ctx) }()
		defer func() { stop(); <-done }()
		synctest.Wait()
		if err := c.Ready(); err == nil {
			t.Error("it is ready without having read anything")
		}
		if _, _, err := c.Keys().Key(ctx, old.KeyID()); err == nil {
			t.Error("a key is known while the API server is away")
		}
		// What is known stays while the API server is away, or says nonsense.
		p.set("https://a", old.JWKS(), nil)
		time.Sleep(3 * time.Second)
		known := func(kid string) bool {
			t.Helper()
			_, ok, _ := c.Keys().Key(ctx, kid)
			return ok
		}
		for _, bad := range []*published{{err: errors.New("away")}, {issuer: "https://a", jwks: []byte("{")}, {issuer: "https://b", jwks: next.JWKS()},
			{issuer: "https://a", jwks: []byte(`{"keys":[{"kty":"oct","kid":"x","k":"AAAA"}]}`)}, {issuer: "https://a", jwks: []byte(`{"keys":[]}`)}} {
			if !known(old.KeyID()) {
				t.Error("the last good key is gone")
			}
			p.set(bad.issuer, bad.jwks, bad.err)
			time.Sleep(6 * time.Minute)
			if !known(old.KeyID()) || known(next.KeyID()) {
				t.Errorf("%q %v: the last good keys must stay", bad.issuer, bad.err)
			}
		}
		// A rotation: the new key is found when the first token names it, the old one
		// is gone with that.
		time.Sleep(time.Minute)
		p.set("https://a", next.JWKS(), nil)
		if !known(next.KeyID()) || known(old.KeyID()) {
			t.Error("a new key is not found at once")
		}
		// Invented keys do not make the API server busy, and are not said to be
		// unknown while it may not be asked.
		time.Sleep(10 * time.Second)
		before, unsaid := p.count(), 0
		for range 1000 {
			time.Sleep(time.Microsecond)
			if _, ok, err := c.Keys().Key(ctx, "invented"); ok {
				t.Fatal("an invented key is known")
			} else if err != nil {
				unsaid++
			}
		}
		if reads := p.count() - before; reads > 3 || unsaid < 990 {
			t.Errorf("1000 invented keys made %d readings; %d were left open", reads, unsaid)
		}
	})
}

func TestAnotherIssuerThanConfiguredIsRefused(t *testing.T) {
	issuer := attesttest.NewIssuer(t)
	synctest.Test(t, func(t *testing.T) {
		c, feed := kube.Fed(nil, (&published{issuer: "https://other", jwks: issuer.JWKS()}).fetch, "https://wanted")
		must(feed.Pods.Replace(nil, ""))
		must(feed.Nodes.Replace(nil, ""))
		must(feed.Accounts.Replace(nil, ""))
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); _ = c.RunFed(ctx) }()
		defer func() { stop(); <-done }()
		synctest.Wait()
		if err := c.Ready(); err == nil || !strings.Contains(err.Error(), `"https://wanted"`) {
			t.Errorf("got %v", err)
		}
	})
}

func TestAttestorRefusesWhatIsTheClusters(t *testing.T) {
	c, _ := kube.Fed(nil, (&published{}).fetch, "")
	for name, cfg := range map[string]attest.Config{
		"an issuer":          {Audience: "a", AnyServiceAccount: true, Issuer: "https://a"},
		"pods":               {Audience: "a", AnyServiceAccount: true, Pods: &identity.Pods{}},
		"nodes without view": {Audience: "a", AnyServiceAccount: true, AnyPodOf: []string{"n"}},
		"no audience":        {AnyServiceAccount: true},
		"no account":         {Audience: "a"},
	} {
		if _, err := c.Attestor(cfg, false); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	a, err := c.Attestor(attest.Config{Audience: "a", AnyServiceAccount: true}, true)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := a.Attest(t.Context(), attest.Evidence{Token: "x"}); !errors.Is(err, attest.ErrUnavailable) {
		t.Errorf("without keys: %v", err)
	}
}

// counting accepts every token and counts.
type counting struct {
	mu    sync.Mutex
	asked int
	err   error
	block bool
	// refuse refuses every token.
	refuse bool
}

func (c *counting) Create(ctx context.Context, r *authv1.TokenReview, _ metav1.CreateOptions) (*authv1.TokenReview, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked++
	if c.block {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if c.err != nil {
		return nil, c.err
	}
	if c.refuse {
		return &authv1.TokenReview{Status: authv1.TokenReviewStatus{Error: "no"}}, nil
	}
	uid, _, _ := strings.Cut(r.Spec.Token, ".")
	return &authv1.TokenReview{Status: authv1.TokenReviewStatus{Authenticated: true, Audiences: r.Spec.Audiences,
		User: authv1.UserInfo{Extra: map[string]authv1.ExtraValue{"authentication.kubernetes.io/pod-uid": {uid}}}}}, nil
}

// TestReviewsAreRemembered: for ten seconds at most, for one token and audience, no
// longer than the pod is there, not too many, and never a failure.
func TestReviewsAreRemembered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := &counting{}
		c, feed := kube.Fed(api, (&published{}).fetch, "")
		asks := func(want int, audience, token string) {
			t.Helper()
			before := api.asked
			if err := c.Review(t.Context(), audience, token, identity.Workload{}); err != nil {
				t.Fatal(err)
			}
			if got := api.asked - before; got != want {
				t.Errorf("%s for %s: asked %d times, want %d", token, audience, got, want)
			}
		}
		asks(1, "a", "pod-1.x")
		asks(0, "a", "pod-1.x")
		asks(1, "b", "pod-1.x")
		asks(1, "a", "pod-1.y")
		time.Sleep(10*time.Second - time.Nanosecond)
		asks(0, "a", "pod-1.x")
		time.Sleep(time.Nanosecond)
		asks(1, "a", "pod-1.x")
		asks(0, "a", "pod-1.x")

		p := apiPod{namespace: "shop", name: "web", uid: "pod-1", account: "web", node: "node-a"}
		must(feed.Pods.Add(p.object()))
		must(feed.Pods.Delete(p.object()))
		asks(1, "a", "pod-1.x")

		for i := range 3 * kube.MaxReviews {
			asks(1, "a", "pod-2."+strings.Repeat("x", 1+i%7)+string(rune('a'+i%26))+time.Duration(i).String())
		}
		if n := c.Remembered(); n > kube.MaxReviews {
			t.Errorf("%d are remembered", n)
		}

		// A refusal is not remembered: the next moment it may be another answer.
		api.refuse = true
		for range 3 {
			before := api.asked
			if err := c.Review(t.Context(), "a", "pod-4.x", identity.Workload{}); !errors.Is(err, attest.ErrRefused) || api.asked != before+1 {
				t.Errorf("a token that is refused: %v, asked %d times", err, api.asked-before)
			}
		}
		api.refuse = false
		asks(1, "a", "pod-4.x")

		// An API server that does not answer is not asked for each of many tokens.
		time.Sleep(time.Minute)
		api.block = true
		began := time.Now()
		for i := range 100 {
			if err := c.Review(t.Context(), "a", "pod-3."+time.Duration(i).String(), identity.Workload{}); !errors.Is(err, attest.ErrUnavailable) {
				t.Fatal(err)
			}
		}
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("100 tokens took %v", took)
		}
		api.block = false
		time.Sleep(2 * time.Second)
		asks(1, "a", "pod-3.0s")
	})
}
