package kube

import (
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"

	"golang.org/x/time/rate"
	"k8s.io/client-go/rest"
)

const (
	// keysInterval is how often the keys are read anyway, so that one that the
	// API server withdrew is gone within it.
	keysInterval = 5 * time.Minute
	// keysRetry is how soon a failed reading is repeated.
	keysRetry = 2 * time.Second
	// keysTimeout bounds one reading.
	keysTimeout = 5 * time.Second
	// maxDiscovery is the most bytes that are read of either document; 256 keys
	// of 4096 bits fit in.
	maxDiscovery = 256 << 10
)

// keys are the keys of the API server's issuer: an attest.KeySource.
type keys struct {
	fetch   func(context.Context) (issuer string, jwks []byte, err error)
	want    string // the only issuer accepted, if not empty
	log     *slog.Logger
	metrics *metrics
	limit   *rate.Limiter

	set    atomic.Pointer[keySet] // nil until they were read once
	known  chan struct{}          // closed then
	mu     sync.Mutex             // held while the keys are read
	failed atomic.Pointer[error]  // why they could not be the last time; nil: they could

	published identity.Watched[identity.TokenKeys]
}

func newKeys(fetch func(context.Context) (string, []byte, error), want string, log *slog.Logger, m *metrics) *keys {
	return &keys{fetch: fetch, want: want, log: log, metrics: m, known: make(chan struct{}),
		// At once for what comes with a rotation, seldom for what is invented.
		limit: rate.NewLimiter(rate.Every(time.Second), 3)}
}

// keySet is never changed.
type keySet struct {
	issuer string
	byID   map[string]attest.Key
	read   time.Time // when reading began
}

// trouble is why the keys could not be read the last time, or nil.
func (k *keys) trouble() error {
	if e := k.failed.Load(); e != nil {
		return *e
	}
	return nil
}

// issuer is whose keys these are; ok is false before they were read once.
func (k *keys) issuer() (name string, ok bool) {
	s := k.set.Load()
	if s == nil {
		return "", false
	}
	return s.issuer, true
}

// Published is the keys as they were read last, and a channel that is closed when
// others were read. The issuer is empty before.
func (k *keys) Published() (identity.TokenKeys, <-chan struct{}) { return k.published.Load() }

// Key implements attest.KeySource. A key that is not known is looked for at the API
// server. If that may not be done now, or fails, nothing is said: the token may be
// the first of a new key.
func (k *keys) Key(ctx context.Context, kid string) (attest.Key, bool, error) {
	asked := time.Now()
	if s := k.set.Load(); s != nil {
		if key, ok := s.byID[kid]; ok {
			return key, true, nil
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	// Whoever was reading in the meantime has the answer, if it began after this
	// was asked.
	if s := k.set.Load(); s == nil || s.read.Before(asked) {
		if !k.limit.Allow() {
			return attest.Key{}, false, errors.New("the keys were read only a moment ago")
		}
		if err := k.read(ctx); err != nil {
			return attest.Key{}, false, err
		}
	}
	key, ok := k.set.Load().byID[kid]
	return key, ok, nil
}

// run reads the keys again and again until ctx ends.
func (k *keys) run(ctx context.Context) error {
	for {
		k.mu.Lock()
		err := k.read(ctx)
		k.mu.Unlock()
		wait := keysInterval
		if err != nil {
			wait = keysRetry
		}
		if !pause(ctx, wait) {
			return nil
		}
	}
}

// read replaces the keys by those that the API server has now. mu is held.
func (k *keys) read(ctx context.Context) error {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, keysTimeout)
	defer cancel()
	next, err := k.ask(ctx)
	before := k.set.Load()
	if err == nil && before != nil && before.issuer != next.issuer {
		// Tokens of the new issuer come with the next start: an authority does not
		// change whom it believes while it runs.
		err = fmt.Errorf("its issuer is %q now and was %q: restart signet-ca to accept the new one", next.issuer, before.issuer)
	}
	if err != nil {
		err = fmt.Errorf("reading the keys of the API server's issuer: %w", err)
		k.metrics.keys.WithLabelValues("failed").Inc()
		if was := k.failed.Swap(&err); was == nil && ctx.Err() == nil {
			k.log.Warn("the keys of the issuer cannot be read; the last good ones stay", "err", err)
		}
		return err
	}
	k.metrics.keys.WithLabelValues("read").Inc()
	if k.failed.Swap(nil) != nil {
		k.log.Info("the keys of the issuer can be read again")
	}
	next.read = began
	if before == nil || !slices.Equal(slices.Sorted(maps.Keys(before.byID)), slices.Sorted(maps.Keys(next.byID))) {
		k.log.Info("keys of the issuer", "issuer", next.issuer, "keys", len(next.byID))
	}
	k.set.Store(next)
	public := identity.TokenKeys{Issuer: next.issuer, Keys: make(map[string]crypto.PublicKey, len(next.byID))}
	for id, key := range next.byID {
		public.Keys[id] = key.Public
	}
	if !public.Equal(k.published.Value()) {
		k.published.Store(public)
	}
	if before == nil {
		close(k.known)
	}
	return nil
}

func (k *keys) ask(ctx context.Context) (*keySet, error) {
	issuer, jwks, err := k.fetch(ctx)
	if err != nil {
		return nil, err
	}
	if k.want != "" && issuer != k.want {
		return nil, fmt.Errorf("its issuer is %q; tokens.issuer is %q: set that right, or leave it out", issuer, k.want)
	}
	byID, skipped, err := attest.ParseKeys(jwks)
	if err != nil {
		return nil, err
	}
	for _, s := range skipped {
		k.log.Debug("key of the issuer is not used", "err", s)
	}
	return &keySet{issuer: issuer, byID: byID}, nil
}

// discovery reads what the API server says of its issuer. Both documents come over
// the connection to the API server: the address of the keys that the first one
// gives is for those who have no such connection.
type discovery struct{ api rest.Interface }

func (d discovery) fetch(ctx context.Context) (issuer string, jwks []byte, err error) {
	b, err := d.document(ctx, "/.well-known/openid-configuration")
	if err != nil {
		return "", nil, err
	}
	var doc struct {
		Issuer string `json:"issuer"`
	}
	if err := json.Unmarshal(b, &doc); err != nil || doc.Issuer == "" {
		return "", nil, errors.New("/.well-known/openid-configuration names no issuer; the API server's --service-account-issuer must be a URL")
	}
	jwks, err = d.document(ctx, "/openid/v1/jwks")
	return doc.Issuer, jwks, err
}

func (d discovery) document(ctx context.Context, path string) ([]byte, error) {
	body, err := d.api.Get().AbsPath(path).SetHeader("Accept", "application/json, application/jwk-set+json").Stream(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	defer body.Close()
	b, err := io.ReadAll(io.LimitReader(body, maxDiscovery+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if len(b) > maxDiscovery {
		return nil, fmt.Errorf("%s has more than %d bytes", path, maxDiscovery)
	}
	return b, nil
}
