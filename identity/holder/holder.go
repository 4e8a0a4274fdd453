package holder

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-mesh/signet/identity"
)

var (
	// ErrUnknownPod says that the caller's pod is not, or no longer, in the view
	// of this node, or that the view names another service account for it.
	ErrUnknownPod = errors.New("pod is not in the view of this node")
	// ErrFull says that the holder keeps as many identities as it may.
	ErrFull = errors.New("holder keeps as many identities as it may")
)

// Issuer is an authority as the holder needs it.
type Issuer interface {
	// Issue answers requests with as many results, in their order, or fails as a
	// whole. It must return when ctx ends, and may be called concurrently.
	Issue(ctx context.Context, requests []identity.Request) ([]identity.Result, error)
}

// Held is an SVID with its private key, and when it will be renewed. It prints
// and logs without the key.
type Held struct {
	SVID    *x509svid.SVID
	RenewAt time.Time
}

// String is the SPIFFE ID and the time of renewal.
func (h Held) String() string {
	if h.SVID == nil {
		return "no SVID"
	}
	return fmt.Sprintf("%s, to be renewed at %s", h.SVID.ID, h.RenewAt.UTC().Format(time.RFC3339))
}

// LogValue implements slog.LogValuer.
func (h Held) LogValue() slog.Value { return slog.StringValue(h.String()) }

// Config is what a Holder is made of.
type Config struct {
	// TrustDomain is the trust domain of every identity. Required.
	TrustDomain spiffeid.TrustDomain
	// Issuer issues SVIDs. Required.
	Issuer Issuer
	// Pods is the view of the pods; the holder uses those on Node. Required.
	Pods *identity.Pods
	// Node is the name of this node. Required.
	Node string
	// Trust is the state of trust of the moment, against which every SVID is
	// verified; nil while it is not known yet. It is called often and
	// concurrently. Required.
	Trust func() *identity.Trust
	// Saved are SVIDs from before a restart. Those that have expired, do not
	// verify against Trust, or have no pod in Pods are left out, with a log
	// entry.
	Saved []Held
	// MaxIdentities bounds how many identities are kept; 0 means 4096.
	MaxIdentities int
	// Log gets what an operator should know; nil logs nothing.
	Log *slog.Logger
	// Metrics registers the holder's metrics; nil registers none.
	Metrics prometheus.Registerer
	// now is the system's clock; nil means time.Now.
	now func() time.Time
}

// Holder keeps the SVIDs of one node. Make one with [New] and keep [Holder.Run]
// running; all methods are safe for concurrent use.
type Holder struct {
	td      spiffeid.TrustDomain
	issuer  Issuer
	pods    *identity.Pods
	node    string
	trust   func() *identity.Trust
	limit   int
	log     *slog.Logger
	metrics *metrics

	now     func() time.Time     // the system's clock
	elapsed func() time.Duration // monotonic
	running atomic.Bool
	wake    chan struct{} // capacity 1: the loop has something new to look at

	// mu guards all that follows. It is never held while the issuer is asked;
	// the lock of pods may be taken while it is held, never the other way round.
	mu       sync.Mutex
	entries  map[spiffeid.ID]*entry
	changed  chan struct{}            // closed at the next change of what Export returns
	byID     map[spiffeid.ID][]string // UIDs of the node's pods, sorted
	podsNews <-chan struct{}          // closed when byID is stale; nil before the first look
}

// entry is one wanted identity. Holder.mu guards its fields.
type entry struct {
	id      spiffeid.ID
	changed chan struct{} // closed when SVID would answer differently

	svid    *x509svid.SVID  // nil while there is none, or none that is valid
	expires time.Time       // of svid: the earliest NotAfter of its chain
	renewAt time.Time       // of svid
	over    time.Duration   // of elapsed, when svid expires
	dark    bool            // svid is over by the clock, and that much time cannot have elapsed
	missed  bool            // an SVID expired before it could be renewed
	taken   time.Time       // when svid came; zero if it was saved
	good    *identity.Trust // under which svid was found to verify
	hurried haste           // svid is to be replaced before renewAt

	asked    time.Time // when it was first asked for; zero if it was saved
	next     time.Time // when to ask the issuer
	inFlight bool
	under    *identity.Trust // of the attempt that is in flight or was last
	failures int             // attempts since the last success
	failure  error           // the last of them
	outage   bool            // the last attempt failed as a whole batch
	turn     int             // refusals since the last success: which evidence is next
	stuck    bool            // all evidence was refused as hopeless
	tried    time.Time       // when the last attempt ended

	pod        string // the pod that asked last: the first to be named as evidence
	token      string // a token that may serve as evidence; never logged
	tokenPod   string
	tokenUntil time.Time
	refused    map[[sha256.Size]byte]struct{} // evidence that cannot succeed
}

// New makes a Holder. It starts nothing.
func New(cfg Config) (*Holder, error) {
	switch {
	case cfg.TrustDomain.IsZero():
		return nil, errors.New("holder: TrustDomain is required")
	case cfg.Issuer == nil:
		return nil, errors.New("holder: Issuer is required")
	case cfg.Pods == nil:
		return nil, errors.New("holder: Pods is required")
	case cfg.Node == "":
		return nil, errors.New("holder: Node is required")
	case cfg.Trust == nil:
		return nil, errors.New("holder: Trust is required")
	case cfg.MaxIdentities < 0:
		return nil, fmt.Errorf("holder: MaxIdentities is %d; it must not be negative", cfg.MaxIdentities)
	}
	h := &Holder{
		td:      cfg.TrustDomain,
		issuer:  cfg.Issuer,
		pods:    cfg.Pods,
		node:    cfg.Node,
		trust:   cfg.Trust,
		limit:   cfg.MaxIdentities,
		log:     cfg.Log,
		now:     cfg.now,
		wake:    make(chan struct{}, 1),
		entries: map[spiffeid.ID]*entry{},
		changed: make(chan struct{}),
	}
	if h.limit == 0 {
		h.limit = 4096
	}
	if h.now == nil {
		h.now = time.Now
	}
	began := time.Now()
	h.elapsed = func() time.Duration { return time.Since(began) }
	if h.log == nil {
		h.log = slog.New(slog.DiscardHandler)
	}
	h.mu.Lock()
	h.refresh()
	for _, saved := range cfg.Saved {
		if err := h.seed(saved, h.now()); err != nil {
			h.log.Warn("saved svid left out", "svid", saved, "err", err)
		}
	}
	h.mu.Unlock()
	var err error
	if h.metrics, err = newMetrics(cfg.Metrics, h); err != nil {
		return nil, fmt.Errorf("holder: registering metrics: %w", err)
	}
	return h, nil
}

// seed takes up an SVID from before a restart. The caller holds mu.
func (h *Holder) seed(saved Held, now time.Time) error {
	s := saved.SVID
	if s == nil || s.PrivateKey == nil || len(s.Certificates) == 0 {
		return errors.New("it has no certificate or no key")
	}
	trust := h.trust()
	expires, err := verify(s.Certificates, s.PrivateKey.Public(), s.ID, trust, now)
	switch {
	case err != nil:
		return err
	case s.ID.TrustDomain() != h.td:
		return fmt.Errorf("it is of trust domain %s, not %s", s.ID.TrustDomain(), h.td)
	case len(h.byID[s.ID]) == 0:
		return ErrUnknownPod
	case h.entries[s.ID] != nil:
		return errors.New("there is another one for this identity")
	case len(h.entries) >= h.limit:
		return ErrFull
	}
	e := &entry{id: s.ID, changed: make(chan struct{}), svid: s, expires: expires, renewAt: saved.RenewAt, good: trust}
	// A renewal that was due while the agent was away is due now; only what is
	// no time at all is replaced.
	if e.renewAt.IsZero() || !e.renewAt.Before(expires) {
		e.renewAt = renewAt(now, expires, time.Time{}, random())
	}
	e.next, e.over = e.renewAt, h.elapsed()+expires.Sub(now)
	h.entries[e.id] = e
	return nil
}

// SVID is the current SVID of a proven caller, nil while there is none that is
// valid, and a channel that is closed when another call would answer differently
// (it may also be closed without a difference). Asking is what makes the holder
// want the identity; SVID itself never waits. svid is shared and must not be
// changed.
//
// It fails with [ErrUnknownPod] if the pod is not in the view of this node, and
// with [ErrFull]; changed is nil then.
func (h *Holder) SVID(caller identity.Caller) (svid *x509svid.SVID, changed <-chan struct{}, err error) {
	w := caller.Workload
	id, err := w.ID(h.td)
	if err != nil {
		return nil, nil, fmt.Errorf("looking up the SVID of pod %s: %w", w.PodUID, err)
	}
	now := h.now()
	h.mu.Lock()
	defer h.mu.Unlock()
	// The view decides, not the caller's proof, which may be older: after the
	// last pod of an identity has left nobody brings the identity back.
	known, ok := h.pods.Lookup(w.PodUID)
	if !ok || known.Node != h.node || known.Namespace != w.Namespace || known.ServiceAccount != w.ServiceAccount {
		return nil, nil, fmt.Errorf("looking up the SVID of %s for pod %s: %w", id, w.PodUID, ErrUnknownPod)
	}
	e := h.entries[id]
	if e == nil {
		if len(h.entries) >= h.limit {
			return nil, nil, fmt.Errorf("looking up the SVID of %s: %w (%d)", id, ErrFull, h.limit)
		}
		e = &entry{id: id, changed: make(chan struct{}), asked: now, next: now}
		h.entries[id] = e
		h.poke()
	}
	e.pod = w.PodUID
	h.offer(e, caller)
	if e.svid == nil || !now.Before(e.expires) {
		return nil, e.changed, nil
	}
	return e.svid, e.changed, nil
}

// offer remembers the caller's token where it may be needed as evidence: a
// secret that has no use is not kept. The caller holds mu.
func (h *Holder) offer(e *entry, caller identity.Caller) {
	needed := e.svid == nil || e.failures > 0
	if !needed || caller.Token == "" || len(caller.Token) > maxToken || caller.Token == e.token {
		return
	}
	e.token, e.tokenPod, e.tokenUntil = caller.Token, caller.Workload.PodUID, caller.Until
	if e.stuck {
		h.poke()
	}
}

// poke has the loop look at the entries again.
func (h *Holder) poke() {
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

// Retry has every identity whose last attempt failed because the authority could
// not be reached ask again within a second. It is worth a call when a connection
// is there again or trust has become known; without it backoff decides.
func (h *Holder) Retry() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.hurry(h.now())
	h.poke()
}

// hurry brings the attempts forward that wait for an outage to end. The caller
// holds mu.
func (h *Holder) hurry(now time.Time) {
	soon := now.Add(time.Duration(random() * float64(time.Second)))
	for _, e := range h.entries {
		if e.outage && soon.Before(e.next) {
			e.next = soon
		}
	}
}

// Export is every SVID that is held and valid, ordered by SPIFFE ID, for the
// state file.
func (h *Holder) Export() []Held {
	now := h.now()
	h.mu.Lock()
	defer h.mu.Unlock()
	held := make([]Held, 0, len(h.entries))
	for _, e := range h.entries {
		if e.svid != nil && now.Before(e.expires) {
			held = append(held, Held{SVID: e.svid, RenewAt: e.renewAt})
		}
	}
	slices.SortFunc(held, func(a, b Held) int { return strings.Compare(a.SVID.ID.String(), b.SVID.ID.String()) })
	return held
}

// Changed is a channel that is closed at the next change of what Export
// returns. To miss none, take it before calling Export.
func (h *Holder) Changed() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.changed
}

// Health is nil unless a renewal was missed: then, from the first failed attempt
// until the SVID is renewed, it says how many, which expires first, and why. A
// pod that never had an SVID does not count, its evidence may be at fault; the
// metric signet_holder_waiting shows it.
func (h *Holder) Health() error {
	now := h.now()
	h.mu.Lock()
	defer h.mu.Unlock()
	var worst *entry
	n := 0
	for _, e := range h.entries {
		if !e.overdue() {
			continue
		}
		n++
		if worst == nil || e.expires.Before(worst.expires) ||
			(e.expires.Equal(worst.expires) && e.id.String() < worst.id.String()) {
			worst = e
		}
	}
	if worst == nil {
		return nil
	}
	state, cause := "expires", worst.failure
	if !now.Before(worst.expires) {
		state = "expired"
	}
	if cause == nil {
		cause = errors.New("no attempt has ended yet")
	}
	return fmt.Errorf("%d of %d SVIDs could not be renewed: that of %s %s at %s after %d failed attempts: %w",
		n, len(h.entries), worst.id, state, worst.expires.UTC().Format(time.RFC3339), worst.failures, cause)
}

// overdue reports whether a renewal has failed and not been made up for.
func (e *entry) overdue() bool { return e.missed || (e.svid != nil && e.failures > 0) }
