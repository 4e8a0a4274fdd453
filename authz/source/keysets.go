package source

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/token"
	"github.com/signet-mesh/signet/identity"
)

const (
	// DefaultKeyRefresh is how often key sets are fetched again, as in Istio.
	DefaultKeyRefresh = 20 * time.Minute
	// defaultKeyTimeout is how long one request for keys may take where the rule does
	// not say, as in Istio; maxKeyTimeout is the longest that a rule can say.
	defaultKeyTimeout, maxKeyTimeout = 5 * time.Second, 30 * time.Second
	// keyRetry is how long after a failure it is tried again at first, and
	// maxKeyRetry at last.
	keyRetry, maxKeyRetry = time.Second, 5 * time.Minute
	// unknownKeyRefresh is how often tokens with unknown keys have a set fetched, and
	// maxUnknownKeyRefresh how often where that brought nothing new several times:
	// anybody can make such tokens, at every node.
	unknownKeyRefresh, maxUnknownKeyRefresh = 10 * time.Second, time.Minute
	// keyLinger is how long a set is kept that no rule wants any more.
	keyLinger = 10 * time.Minute
	// maxKeySets bounds the sets of a node, and maxNamespaceKeySets those that the
	// policies of one namespace can have fetched: nobody takes away others' keys.
	maxKeySets, maxNamespaceKeySets = 256, 32
	// maxKeyFetches is how many are fetched at once, and maxNamespaceKeyFetches how many
	// of them for the policies of one namespace: servers that do not answer hold up the
	// keys of that one.
	maxKeyFetches, maxNamespaceKeyFetches = 8, 2
	// maxFailingKeyFetches is how many of them are for sets that could not be fetched the
	// last time: several namespaces with servers that do not answer hold up each other.
	maxFailingKeyFetches = maxKeyFetches / 2
	// maxSavedKeys bounds one set that is saved.
	maxSavedKeys = 128 << 10
)

// KeySetsConfig is what [NewKeySets] needs.
type KeySetsConfig struct {
	// Rules are the rules whose keys are wanted, and a channel that is closed when
	// another call would answer differently. It is required.
	Rules func() (rules []*authz.TokenRule, changed <-chan struct{})
	// Refresh is how often sets are fetched again; 0 is DefaultKeyRefresh.
	Refresh time.Duration
	// AllowAddresses are blocks of addresses that are no public ones from which keys
	// may be fetched all the same. Addresses at which clouds give out credentials
	// must be named one by one.
	AllowAddresses []netip.Prefix
	// AllowPlaintext also fetches from http:// URIs.
	AllowPlaintext bool
	// Roots are the authorities of servers; nil: those of the system.
	Roots *x509.CertPool
	// Saved is what Export of a predecessor returned, or nil.
	Saved []byte
	// Log gets a record when a set begins or ceases to be fetched; nil discards.
	Log *slog.Logger
	// Metrics is where metrics are registered; nil registers none.
	Metrics prometheus.Registerer
}

// KeySets are the key sets that rules name by URI, or by an issuer whose OpenID
// configuration names them. What could be fetched once stays in use for as long as
// it takes; what never could be has no keys. Its methods are safe for concurrent
// use.
type KeySets struct {
	cfg     KeySetsConfig
	client  *http.Client
	metrics keyMetrics
	// sets are replaced as a whole, by Run.
	sets atomic.Pointer[map[keyOrigin]*keySet]
	// poked says that tokens with unknown keys came.
	poked  chan struct{}
	export identity.Watched[[]byte]

	mu sync.Mutex
	// dropped are those that exceed a limit, by namespace; guarded by mu.
	dropped map[string]int
}

// keyOrigin is where keys come from: a URI, or else the OpenID configuration of an
// issuer.
type keyOrigin struct{ uri, issuer string }

func originOf(r *authz.TokenRule) keyOrigin {
	if uri := r.Spec.GetJwksUri(); uri != "" {
		return keyOrigin{uri: uri}
	}
	return keyOrigin{issuer: r.Spec.GetIssuer()}
}

// keySet is one set. What is not said otherwise is owned by Run.
type keySet struct {
	keyOrigin
	keys    atomic.Pointer[token.Keys]
	unknown atomic.Bool // a token with an unknown key came since it was last fetched
	text    []byte
	timeout time.Duration
	// namespaces are those of the rules that want it, in their order; one may be there
	// more than once.
	namespaces []string
	// due is when it is fetched next; tried when it was last.
	due, tried time.Time
	fetching   bool
	failures   int
	// early says that the fetch is for an unknown key; inVain counts those in a row
	// that brought nothing new.
	early    bool
	inVain   int
	unwanted time.Time // since when no rule wants it; zero: one does

	mu sync.Mutex
	// For metrics, guarded by mu: when it was last fetched, whether a rule wants it,
	// and whether the last fetch failed.
	good            time.Time
	wanted, failing bool
}

// NewKeySets makes KeySets, with what a predecessor has saved. Nothing is fetched
// before Run.
func NewKeySets(cfg KeySetsConfig) (*KeySets, error) {
	if cfg.Rules == nil {
		return nil, errors.New("making the key sets of tokens: no rules are configured")
	}
	if cfg.Refresh == 0 {
		cfg.Refresh = DefaultKeyRefresh
	}
	if cfg.Refresh < time.Second {
		return nil, fmt.Errorf("making the key sets of tokens: they cannot be fetched every %s; wait a second at least", cfg.Refresh)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	k := &KeySets{cfg: cfg, client: newKeyClient(cfg), poked: make(chan struct{}, 1)}
	sets := map[keyOrigin]*keySet{}
	if cfg.Saved != nil {
		var err error
		if sets, err = loadKeySets(cfg.Saved); err != nil {
			cfg.Log.Warn("saved key sets of tokens are not used", "err", err)
			sets = map[keyOrigin]*keySet{}
		}
	}
	k.sets.Store(&sets)
	k.export.Store(cfg.Saved)
	if err := k.register(cfg.Metrics); err != nil {
		return nil, fmt.Errorf("registering metrics of the key sets of tokens: %w", err)
	}
	return k, nil
}

// Keys are the keys of the rule's tokens, or nil while there are none.
func (k *KeySets) Keys(rule *authz.TokenRule) *token.Keys {
	s := (*k.sets.Load())[originOf(rule)]
	if s == nil {
		return nil
	}
	return s.keys.Load()
}

// UnknownKey has the keys of the rule fetched soon, but every ten seconds at most.
func (k *KeySets) UnknownKey(rule *authz.TokenRule) {
	s := (*k.sets.Load())[originOf(rule)]
	if s == nil || !s.unknown.CompareAndSwap(false, true) {
		return
	}
	select {
	case k.poked <- struct{}{}:
	default: // Run looks at all
	}
}

// fetched is the end of a fetch.
type fetched struct {
	set       *keySet
	namespace string // that it was for
	text      []byte
	keys      *token.Keys
	err       error
}

// Run fetches until ctx ends.
func (k *KeySets) Run(ctx context.Context) error {
	var running sync.WaitGroup
	defer running.Wait()
	done := make(chan fetched, maxKeyFetches)
	var slots keySlots
	for {
		rules, changed := k.cfg.Rules()
		now := time.Now()
		sets := k.want(rules, now)
		next := now.Add(keyLinger)
		var due []*keySet
		for _, s := range sets {
			if s.fetching || !s.unwanted.IsZero() {
				continue
			}
			if early := s.tried.Add(min(unknownKeyRefresh<<min(s.inVain, 8), maxUnknownKeyRefresh)); s.unknown.Load() && s.failures == 0 && early.Before(s.due) {
				s.due, s.early = early, true
			}
			if s.due.After(now) {
				next = minTime(next, s.due)
				continue
			}
			due = append(due, s)
		}
		for s, namespace := range slots.next(due) { // the end of one comes back here for the others
			s.fetching, s.tried = true, now
			s.unknown.Store(false)
			origin, timeout := s.keyOrigin, s.timeout
			running.Go(func() {
				text, keys, err := k.fetch(ctx, origin, timeout)
				done <- fetched{s, namespace, text, keys, err}
			})
		}
		timer := time.NewTimer(time.Until(next))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-changed:
		case <-k.poked:
		case <-timer.C:
		case f := <-done:
			slots.end(f.set, f.namespace)
			k.take(f)
		}
		timer.Stop()
	}
}

// keySlots are the fetches that go on.
type keySlots struct {
	all, failing int
	of           map[string]int // by namespace
}

// next iterates over those sets that may be fetched now, of sets that are due, by the
// time since when they are; each takes a slot, for one of the namespaces that want it.
// Namespaces take turns: those with the fewest fetches come first.
func (s *keySlots) next(due []*keySet) iter.Seq2[*keySet, string] {
	return func(yield func(*keySet, string) bool) {
		if s.of == nil {
			s.of = map[string]int{}
		}
		for n := range maxNamespaceKeyFetches {
			for i, set := range due {
				if s.all == maxKeyFetches {
					return
				}
				if set == nil || set.failures > 0 && s.failing == maxFailingKeyFetches {
					continue
				}
				free := slices.IndexFunc(set.namespaces, func(ns string) bool { return s.of[ns] <= n })
				if free < 0 {
					continue
				}
				due[i] = nil
				s.all++
				if set.failures > 0 {
					s.failing++
				}
				s.of[set.namespaces[free]]++
				if !yield(set, set.namespaces[free]) {
					return
				}
			}
		}
	}
}

// end gives the slot of a set back, before what came of its fetch is noted.
func (s *keySlots) end(set *keySet, namespace string) {
	s.all--
	if set.failures > 0 {
		s.failing--
	}
	if s.of[namespace]--; s.of[namespace] == 0 {
		delete(s.of, namespace)
	}
}

// want makes the sets those that the rules want, within the limits, and returns them
// by the time at which they are due.
func (k *KeySets) want(rules []*authz.TokenRule, now time.Time) []*keySet {
	before := *k.sets.Load()
	after := make(map[keyOrigin]*keySet, len(before))
	timeouts := map[keyOrigin]time.Duration{}
	namespaces := map[string]int{}
	dropped := map[string]int{}
	wanted := 0
	// Those that are there stay, whoever comes after them.
	for _, there := range []bool{true, false} {
		for _, r := range rules {
			o := originOf(r)
			if r.Spec.GetJwks() != "" || o == (keyOrigin{}) {
				continue
			}
			s := before[o]
			if (s != nil) != there {
				continue
			}
			if after[o] == nil {
				if wanted >= maxKeySets || namespaces[r.Namespace] >= maxNamespaceKeySets {
					dropped[r.Namespace]++
					continue
				}
				wanted++
				namespaces[r.Namespace]++
				if s == nil {
					s = &keySet{keyOrigin: o, due: now}
				}
				s.namespaces = s.namespaces[:0]
				after[o] = s
			}
			s = after[o]
			if n := len(s.namespaces); n == 0 || s.namespaces[n-1] != r.Namespace {
				s.namespaces = append(s.namespaces, r.Namespace)
			}
			timeouts[o] = max(timeouts[o], ruleTimeout(r))
		}
	}
	changed := len(after) != len(before)
	for o, s := range after {
		s.timeout = timeouts[o]
		changed = changed || before[o] == nil || !s.unwanted.IsZero()
		s.unwanted = time.Time{}
		s.setWanted(true)
	}
	for o, s := range before {
		if after[o] != nil {
			continue
		}
		if s.unwanted.IsZero() {
			s.unwanted, changed = now, true
			s.setWanted(false)
		}
		if now.Sub(s.unwanted) < keyLinger && len(after) < 2*maxKeySets {
			after[o] = s
		} else {
			changed = true
		}
	}
	k.drop(dropped)
	if changed {
		k.sets.Store(&after)
		k.saveKeySets()
	}
	list := make([]*keySet, 0, len(after))
	for _, s := range after {
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b *keySet) int {
		return cmp.Or(a.due.Compare(b.due), cmp.Compare(a.uri, b.uri), cmp.Compare(a.issuer, b.issuer))
	})
	return list
}

// ruleTimeout is how long a request for the rule's keys may take.
func ruleTimeout(r *authz.TokenRule) time.Duration {
	if t := r.Spec.GetTimeout(); t != nil {
		return min(max(t.AsDuration(), time.Millisecond), maxKeyTimeout)
	}
	return defaultKeyTimeout
}

// drop tells of sets that exceed a limit.
func (k *KeySets) drop(dropped map[string]int) {
	k.mu.Lock()
	before := k.dropped
	k.dropped = dropped
	k.mu.Unlock()
	for ns, n := range dropped {
		if before[ns] != n {
			k.cfg.Log.Warn("key sets of tokens are not fetched: there are too many; tokens that need them are refused", "namespace", ns, "rules", n,
				"limit", maxKeySets, "namespace_limit", maxNamespaceKeySets)
		}
	}
}

// take takes the end of a fetch.
func (k *KeySets) take(f fetched) {
	s, now := f.set, time.Now()
	s.fetching = false
	if f.err != nil {
		k.metrics.failed.Inc()
		if s.failures == 0 {
			k.cfg.Log.Warn("keys of tokens cannot be fetched; those from before stay", "from", s.String(), "err", f.err, "known", s.keys.Load() != nil)
		}
		s.due = now.Add(keyRetryAfter(s.failures))
		s.failures++
		s.mu.Lock()
		s.failing = true
		s.mu.Unlock()
		return
	}
	k.metrics.good.Inc()
	if before := s.tellGood(now); s.failures > 0 || before.IsZero() {
		k.cfg.Log.Info("keys of tokens were fetched", "from", s.String(), "failures", s.failures)
	}
	changed := string(f.text) != string(s.text)
	if s.early && !changed {
		s.inVain++
	} else {
		s.inVain = 0
	}
	s.failures, s.early = 0, false
	s.due = now.Add(jitter(k.cfg.Refresh))
	if changed {
		s.text = f.text
		s.keys.Store(f.keys)
		k.saveKeySets()
	}
}

// keyRetryAfter doubles with each failure in a row.
func keyRetryAfter(failures int) time.Duration {
	d := time.Duration(maxKeyRetry)
	if failures < 16 {
		d = min(d, keyRetry<<failures)
	}
	return jitter(d)
}

// jitter is d, give or take a tenth.
func jitter(d time.Duration) time.Duration {
	return d - d/10 + rand.N(d/5+1)
}

// tellGood notes that the set is good, and returns when it last was.
func (s *keySet) tellGood(now time.Time) (before time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before, s.good, s.failing = s.good, now, false
	return before
}

func (s *keySet) setWanted(w bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wanted = w
}

func minTime(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// Export is the sets, for a successor, and a channel that is closed when they change.
func (k *KeySets) Export() (saved []byte, changed <-chan struct{}) { return k.export.Load() }

// savedKeySets is what Export returns. A change that older versions must not ignore
// means a new version.
type savedKeySets struct {
	Version int           `json:"version"`
	Sets    []savedKeySet `json:"sets"`
}

type savedKeySet struct {
	URI    string    `json:"uri,omitempty"`
	Issuer string    `json:"issuer,omitempty"`
	Good   time.Time `json:"good"`
	Keys   string    `json:"keys"`
}

const savedKeySetsVersion = 1

func (k *KeySets) saveKeySets() {
	out := savedKeySets{Version: savedKeySetsVersion, Sets: []savedKeySet{}}
	for _, s := range *k.sets.Load() {
		if s.keys.Load() == nil || len(s.text) > maxSavedKeys {
			continue
		}
		s.mu.Lock()
		good := s.good
		s.mu.Unlock()
		out.Sets = append(out.Sets, savedKeySet{s.uri, s.issuer, good.UTC(), string(s.text)})
	}
	slices.SortFunc(out.Sets, func(a, b savedKeySet) int {
		return cmp.Or(cmp.Compare(a.URI, b.URI), cmp.Compare(a.Issuer, b.Issuer))
	})
	b, err := json.Marshal(out)
	if err != nil {
		return // a time beyond the year 9999
	}
	k.export.Store(b)
}

// loadKeySets are the sets that a predecessor saved. No rule wants them yet, and they
// are due.
func loadKeySets(saved []byte) (map[keyOrigin]*keySet, error) {
	var in savedKeySets
	if err := json.Unmarshal(saved, &in); err != nil {
		return nil, fmt.Errorf("loading key sets: %w", err)
	}
	if in.Version != savedKeySetsVersion {
		return nil, fmt.Errorf("loading key sets: version %d, and this program reads %d", in.Version, savedKeySetsVersion)
	}
	if len(in.Sets) > 2*maxKeySets {
		return nil, fmt.Errorf("loading key sets: there are %d", len(in.Sets))
	}
	sets := map[keyOrigin]*keySet{}
	now := time.Now()
	for _, e := range in.Sets {
		keys, err := token.ParseKeys([]byte(e.Keys))
		if err != nil {
			return nil, fmt.Errorf("loading key sets: %w", err)
		}
		s := &keySet{keyOrigin: keyOrigin{e.URI, e.Issuer}, text: []byte(e.Keys), due: now, unwanted: now, good: minTime(e.Good, now)}
		s.keys.Store(keys)
		sets[s.keyOrigin] = s
	}
	return sets, nil
}
