package holder

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/identity"
)

const (
	// maxBatch is how many items an authority takes at once, maxBatchBytes what
	// keys and evidence of a batch may add up to: a quarter of gRPC's default
	// message limit.
	maxBatch      = 256
	maxBatchBytes = 1 << 20
	// maxToken is the longest token that is passed on as evidence. Kubernetes'
	// tokens have one to two kilobytes.
	maxToken = 16 << 10
	// maxInFlight is how many batches may be under way, maxRetriesInFlight how
	// many of them may hold identities that failed before.
	maxInFlight        = 4
	maxRetriesInFlight = 3
	// maxRefused bounds the evidence that is remembered as hopeless for one
	// identity; a caller who brings ever new tokens buys no more attempts.
	maxRefused = 64
	// refusedSpacing is the least time between an attempt and one that follows
	// because new evidence came.
	refusedSpacing = time.Second
	// maxSleep is the longest the loop sleeps: certificates expire by the wall
	// clock, timers go by the monotonic one, and the two part when the clock is
	// set or the machine is suspended.
	maxSleep = time.Minute
	// clockSlack is by how much elapsed time and the clock part where nothing is wrong.
	clockSlack = 5 * time.Minute
)

// random is a number in [0, 1) for jitter; nothing secret depends on it.
func random() float64 { return rand.Float64() }

// Run does the holder's work until ctx ends, and returns its cause after the
// last attempt has ended. Only one Run may be active at a time.
func (h *Holder) Run(ctx context.Context) error {
	if !h.running.CompareAndSwap(false, true) {
		return errors.New("holder: Run is active already")
	}
	defer h.running.Store(false)

	var attempts sync.WaitGroup
	done := make(chan *batch, maxInFlight) // never blocks: no more are in flight
	defer func() {
		attempts.Wait()
		close(done)
		for b := range done {
			h.finish(ctx, b)
		}
	}()

	timer := time.NewTimer(0)
	defer timer.Stop()
	inFlight, retries := 0, 0
	for {
		p := h.plan(h.now(), inFlight, retries)
		for _, b := range p.batches {
			inFlight++
			if b.retry {
				retries++
			}
			attempts.Go(func() {
				h.attempt(ctx, b)
				done <- b
			})
		}
		timer.Reset(p.sleep)
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-p.pods:
		case <-h.wake:
		case <-timer.C:
		case b := <-done:
			inFlight--
			if b.retry {
				retries--
			}
			h.finish(ctx, b)
		}
	}
}

// plan is what to do now, and when to look again.
type plan struct {
	batches []*batch
	sleep   time.Duration
	pods    <-chan struct{} // closed when the node's pods change
}

// batch is one call of the issuer.
type batch struct {
	items   []*item
	retry   bool // of identities that failed before
	timeout time.Duration
	trust   *identity.Trust // when it began
	err     error           // why all of it failed
}

// item is one request of a batch and, after the attempt, its outcome.
type item struct {
	e        *entry
	id       spiffeid.ID
	evidence evidence
	renewal  bool
	held     time.Time // when the SVID ends that there is; zero if there is none
	outcome
}

// evidence is a token or the UID of a pod.
type evidence struct {
	token string
	pod   string
}

func (v evidence) sum() [sha256.Size]byte {
	// The two kinds cannot be confused: no UID holds a NUL.
	return sha256.Sum256([]byte(v.pod + "\x00" + v.token))
}

// plan drops what has gone or expired and takes what is due into batches.
func (h *Holder) plan(now time.Time, inFlight, retries int) plan {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.refresh()

	wakeAt := now.Add(maxSleep)
	at := func(t time.Time) {
		if t.Before(wakeAt) {
			wakeAt = t
		}
	}
	var fresh, again []*entry
	retryDue := false
	for _, e := range h.entries {
		switch {
		case e.svid == nil:
		case !now.Before(e.expires):
			h.expire(e)
		case e.dark:
			e.dark, e.missed = false, false // the clock was ahead
			e.signal()
			h.signal()
		}
		if e.svid != nil && !e.dark {
			at(e.expires)
		}
		if e.inFlight {
			continue
		}
		h.unstick(e, now)
		if e.next.After(e.lastNext(now)) {
			e.next, e.tried = now, now // the clock was ahead when they were chosen
		}
		switch {
		case e.failures == 0 && !now.Before(e.next):
			fresh = append(fresh, e)
		case e.failures > 0 && !now.Before(e.earliest()):
			again = append(again, e)
			retryDue = retryDue || !now.Before(e.next)
		default:
			at(e.next)
		}
	}
	if !retryDue {
		for _, e := range again {
			at(e.next)
		}
		again = nil
	}

	p := plan{pods: h.podsNews}
	for _, entries := range [][]*entry{fresh, again} {
		slices.SortFunc(entries, urgency)
		for len(entries) > 0 && inFlight < maxInFlight {
			b := &batch{retry: entries[0].failures > 0}
			if b.retry {
				if retries == maxRetriesInFlight {
					break
				}
				retries++
			}
			inFlight++
			n := h.fill(b, entries, now)
			entries = entries[n:]
			p.batches = append(p.batches, b)
		}
		// What found no place needs no timer: the end of an attempt wakes the
		// loop.
	}
	p.sleep = max(0, wakeAt.Sub(now))
	return p
}

// earliest is when e, which failed, may join a retry of others. In an outage the
// last eighth of its wait is worth less than a batch that is shared.
func (e *entry) earliest() time.Time {
	if !e.outage {
		return e.next
	}
	return e.next.Add(-e.next.Sub(e.tried) / 8)
}

// lastNext is the latest moment for which an attempt can have been planned by a clock that
// was right: the longest advice from now, or when the SVID ends that there is.
func (e *entry) lastNext(now time.Time) time.Time {
	last := now.Add(maxAdvice + maxAdvice/10)
	if e.svid != nil && e.expires.After(last) {
		return e.expires
	}
	return last
}

// urgency puts first who has nothing, then who loses it first.
func urgency(a, b *entry) int {
	if (a.svid == nil) != (b.svid == nil) {
		if a.svid == nil {
			return -1
		}
		return 1
	}
	return cmp.Or(a.expires.Compare(b.expires), strings.Compare(a.id.String(), b.id.String()))
}

// fill moves entries into b until it is full, and returns how many. The caller
// holds mu.
func (h *Holder) fill(b *batch, entries []*entry, now time.Time) (n int) {
	b.trust = h.trust()
	size := 0
	shortest := time.Duration(0)
	for _, e := range entries {
		v, ok := h.evidence(e, now)
		if !ok {
			// What was not refused yet has left with its pod: start over.
			e.refused = nil
			v, _ = h.evidence(e, now)
		}
		size += spkiSize + len(v.token) + len(v.pod)
		if len(b.items) == maxBatch || (size > maxBatchBytes && n > 0) {
			break
		}
		if e.svid != nil {
			if left := e.expires.Sub(now); shortest == 0 || left < shortest {
				shortest = left
			}
		}
		e.inFlight, e.under = true, b.trust
		it := &item{e: e, id: e.id, evidence: v, renewal: e.svid != nil || e.missed}
		if e.svid != nil {
			it.held = e.expires
		}
		b.items = append(b.items, it)
		n++
	}
	b.timeout = attemptTimeout(shortest)
	return n
}

// evidence is what to show for e next; ok is false if all of it is hopeless. The
// caller holds mu.
func (h *Holder) evidence(e *entry, now time.Time) (v evidence, ok bool) {
	pods := h.byID[e.id]
	candidates := make([]evidence, 0, len(pods)+1)
	if i, ok := slices.BinarySearch(pods, e.pod); ok {
		candidates = append(candidates, evidence{pod: e.pod})
		pods = slices.Concat(pods[:i], pods[i+1:])
	}
	for _, uid := range pods {
		candidates = append(candidates, evidence{pod: uid})
	}
	if e.token != "" && (e.tokenUntil.IsZero() || now.Before(e.tokenUntil)) {
		t := evidence{token: e.token}
		if e.svid == nil && !e.missed {
			candidates = slices.Insert(candidates, 0, t)
		} else {
			candidates = append(candidates, t)
		}
	}
	candidates = slices.DeleteFunc(candidates, func(v evidence) bool {
		_, no := e.refused[v.sum()]
		return no
	})
	if len(candidates) == 0 {
		return evidence{}, false
	}
	return candidates[e.turn%len(candidates)], true
}

// unstick ends the waiting of an entry whose evidence was refused for good: when
// its time has come, or earlier if there is evidence that was not shown yet. The
// caller holds mu.
func (h *Holder) unstick(e *entry, now time.Time) {
	if !e.stuck {
		return
	}
	if !now.Before(e.next) {
		e.stuck, e.refused = false, nil
		return
	}
	if _, ok := h.evidence(e, now); ok && len(e.refused) < maxRefused {
		e.stuck, e.next = false, e.tried.Add(refusedSpacing)
	}
}

// refresh takes up the node's pods if they changed, and drops the identities
// whose last pod has gone. The caller holds mu; since SVID looks a pod up under
// the same lock, no identity is dropped that was asked for after the pods were
// read.
func (h *Holder) refresh() {
	if h.podsNews != nil {
		select {
		case <-h.podsNews:
		default:
			return
		}
	}
	pods, news := h.pods.OnNode(h.node)
	old := h.byID
	h.podsNews, h.byID = news, map[spiffeid.ID][]string{}
	for _, w := range pods { // ordered by UID
		id, err := w.ID(h.td)
		if err != nil {
			continue // it can have no identity, so nobody can ask for it
		}
		h.byID[id] = append(h.byID[id], w.PodUID)
	}
	for id, e := range h.entries {
		now := h.byID[id]
		if _, ok := slices.BinarySearch(now, e.tokenPod); !ok {
			e.token, e.tokenPod = "", ""
		}
		switch {
		case len(now) == 0:
			delete(h.entries, id)
			close(e.changed)
			if e.svid != nil {
				h.signal()
			}
			h.log.Info("identity dropped with its last pod", "spiffe_id", id)
		case slices.ContainsFunc(old[id], func(uid string) bool { _, ok := slices.BinarySearch(now, uid); return !ok }):
			// For the pod that left the answer is another now.
			e.signal()
		}
	}
}

// expire takes an SVID away whose time is over. Where that much time cannot have elapsed,
// because the clock went ahead, it is kept and not shown: if the clock was wrong the SVID
// is good again when it is right. The caller holds mu.
func (h *Holder) expire(e *entry) {
	if h.elapsed() < e.over-clockSlack {
		if !e.dark {
			h.log.Error("svid expired by a clock that went ahead; it is kept until so much time has elapsed", "spiffe_id", e.id, "not_after", e.expires)
			e.dark, e.missed = true, true
			e.signal()
			h.signal()
		}
		return
	}
	e.dark = false
	h.log.Error("svid expired before it could be renewed", "spiffe_id", e.id, "not_after", e.expires, "err", e.failure)
	e.svid, e.missed = nil, true
	e.signal()
	h.signal()
}

// signal says that SVID answers differently. The caller holds mu of the holder.
func (e *entry) signal() {
	close(e.changed)
	e.changed = make(chan struct{})
}

// signal says that Export answers differently. The caller holds mu.
func (h *Holder) signal() {
	close(h.changed)
	h.changed = make(chan struct{})
}
