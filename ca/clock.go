package ca

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/replica"
	"github.com/signet-mesh/signet/storage"
)

const (
	// maxStepBack is how far the clock may lie before the newest record. Less is a
	// correction by a time daemon and time goes on from the newest record; more means
	// that this or the earlier time is wrong, and certificates made now could outlive
	// what anybody meant. A step ahead of less is one, too.
	maxStepBack = 5 * time.Minute
	// maxAway is how long nothing may have been heard of the time where after it all that
	// issues has ended: a longer gap is either an authority that was off for long, or a
	// wrong year, and an operator says which.
	maxAway = 24 * time.Hour
	// steady is how long a clock that was in doubt has to go on undisputed.
	steady = 24 * time.Hour
	// clockEvery is how often the time is kept in the state.
	clockEvery = 10 * time.Minute
	// clockTries is how often that is tried on what somebody else has changed.
	clockTries = 4
	// replicaClockEvery is that where replicas share the state, and how often each looks at
	// what others keep: by that one whose clock jumped hears that theirs did not.
	replicaClockEvery = 15 * time.Second
	// replicaSilent is after what time without a new one a replica's time says nothing, and
	// for how long a jump is not believed by itself where there are other replicas.
	replicaSilent = 4 * replicaClockEvery
	// doubtAlarm is how long the clock is in doubt before an operator hears of it: the
	// first agent settles it, usually within seconds.
	doubtAlarm = 10 * time.Minute

	clockKey     = "clock"
	clockVersion = 1
)

// ErrClock is returned while the system clock cannot be right: it is more than five
// minutes before the newest thing that the authority recorded, or so far after what was
// last known of the time that all that issues has ended. Nothing is signed then.
var ErrClock = errors.New("the system clock cannot be believed")

// errClockStands is why a decision about the clock does not apply.
var errClockStands = errors.New("that clock cannot be accepted")

// clock is wall-clock time that does not go back behind what was recorded, and that ends
// nothing before it is believed. There are two answers to what time it is. now goes into
// certificates. past is the latest moment that is certainly over: what was last believed,
// and what has elapsed since by the monotonic clock, which no step moves. Whatever ends
// with time and cannot be brought back (bans, revocations, records, roots) ends by past.
//
// The wall clock is believed while it stays within five minutes of past. Where it jumps
// ahead, or is ahead at a start, it is in doubt: signing goes on, and past stays behind
// until an agent is recognised, an operator accepts the clock, or a day has gone by.
type clock struct {
	wall    func() time.Time
	elapsed func() time.Duration // monotonic; nil: it stands still

	mu       sync.Mutex
	newest   time.Time     // of what was recorded, without a monotonic reading; guarded by mu
	known    time.Time     // the newest time that was believed; zero: none yet; guarded by mu
	knownAt  time.Duration // of elapsed; guarded by mu
	end      time.Time     // from when on nothing can be issued; zero: not known; guarded by mu
	earliest time.Time     // before which no clock can be right; guarded by mu
	doubted  bool          // since doubtedAt, being ahead by doubtedBy; guarded by mu, as those
	at, by   time.Duration
	hold     time.Duration // how long other replicas are waited for; 0: there are none; guarded by mu
	started  bool          // the clock was looked at since begin: a doubt from now on is a jump; guarded by mu
	jumped   bool          // the doubt is; guarded by mu
	disputed string        // what another replica says since the doubt began; guarded by mu
}

// clockReading is what the clock says, and what is to be thought of it.
type clockReading struct {
	wall, past, newest time.Time
	// refused says that nothing may be signed, doubted that it is ahead of what is known,
	// for so long.
	refused, doubted bool
	why              string
	since            time.Duration
}

// newClock is a clock before anything is known. A nil wall is the system's.
func newClock(wall func() time.Time) *clock {
	if wall == nil {
		wall = time.Now
	}
	start := time.Now()
	return &clock{wall: wall, elapsed: func() time.Duration { return time.Since(start) }}
}

// begin tells what is known at the start: the newest time that was recorded, and the
// newest that was believed.
func (c *clock) begin(newest, known time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.newest, c.known, c.knownAt = newest.Round(0), known.Round(0), c.mono()
	c.doubted, c.started = false, false
}

// ends tells from when on nothing can be issued.
func (c *clock) ends(end time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.end = end
}

func (c *clock) mono() time.Duration {
	if c.elapsed == nil {
		return 0
	}
	return c.elapsed()
}

// read looks at the clock.
func (c *clock) read() clockReading {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.look()
}

// look is read. mu is held.
func (c *clock) look() clockReading {
	// Round(0) drops the monotonic reading, which would hide a step of the clock.
	t, e := c.wall().Round(0), c.mono()
	if c.known.IsZero() {
		c.known, c.knownAt = later(t, c.newest), e
	}
	r := clockReading{wall: t, past: c.known.Add(e - c.knownAt), newest: c.newest}
	ahead := t.Sub(r.past)
	switch {
	case t.Before(c.earliest):
		r.refused, r.why = true, "this program is of "+c.earliest.UTC().Format(time.RFC3339)
	case c.newest.Sub(t) > maxStepBack:
		r.refused, r.why = true, "the newest record is of "+c.newest.UTC().Format(time.RFC3339)
	case ahead <= maxStepBack:
		// Also where it is behind: a glitch into the future that nobody used is over when
		// it is over.
		c.known, c.knownAt, c.doubted, c.disputed = later(t, c.newest), e, false, ""
		r.past = c.known
	default:
		if !c.doubted || (ahead-c.by).Abs() > maxStepBack {
			c.doubted, c.at, c.by, c.disputed, c.jumped = true, e, ahead, "", c.started
		}
		r.doubted, r.since = true, e-c.at
		r.refused = ahead > maxAway && !c.end.IsZero() && !t.Before(c.end)
		r.why = fmt.Sprintf("it was last known to be %s, %v before that", r.past.UTC().Format(time.RFC3339), ahead.Round(time.Minute))
		if c.disputed != "" {
			r.refused = true
			r.why += ", and " + c.disputed
		} else if c.jumped && r.since < c.hold {
			// Others sign meanwhile, and will have said what time it is.
			r.refused = true
			r.why += ", and other replicas are heard first"
		} else if r.refused {
			r.why += ", and all that issues had ended by then"
		} else if r.since >= steady {
			c.known, c.knownAt, c.doubted = t, e, false
			r.past, r.doubted = t, false
		}
	}
	c.started = true
	return r
}

// now is the time to put into certificates. Only what was recorded holds it.
func (c *clock) now() (time.Time, error) {
	r := c.read()
	if r.refused {
		return time.Time{}, r.err()
	}
	return later(r.wall, r.newest), nil
}

func (r clockReading) err() error {
	return fmt.Errorf("%w: it says %s, and %s; set the clock right, and signing goes on", ErrClock, r.wall.UTC().Format(time.RFC3339), r.why)
}

// past is the latest moment that is certainly over.
func (c *clock) past() time.Time { return c.read().past }

// latest is a moment that it may be already: who is refused what has ended asks it.
func (c *clock) latest() time.Time {
	r := c.read()
	return later(r.wall, r.past)
}

// stamp is the time of a record. What is decided while the clock cannot be believed is
// recorded all the same.
func (c *clock) stamp() time.Time {
	r := c.read()
	if r.refused {
		return later(r.past, r.newest)
	}
	return later(r.wall, r.newest)
}

// recorded notes that something with time t became durable.
func (c *clock) recorded(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t = t.Round(0); t.After(c.newest) {
		c.newest = t
	}
}

// witness notes that somebody else's clock agrees: an agent proved itself with what is
// valid by this clock and short-lived, over a connection for which it has taken this
// authority's certificate as valid by its own.
func (c *clock) witness(until time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if r := c.look(); r.doubted && !r.refused && until.Sub(r.wall) <= maxAway && r.since >= c.hold {
		c.known, c.knownAt, c.doubted = r.wall, c.mono(), false
	}
}

// accept believes the clock as it is.
func (c *clock) accept(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.newest, c.known, c.knownAt, c.doubted, c.disputed = t, t, c.mono(), false, ""
}

// alone tells whether there are other replicas, whose clocks can be heard.
func (c *clock) alone(is bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.hold = replicaSilent; is {
		c.hold = 0
	}
}

// heard notes the time of another replica, from after this clock jumped: that confirms the
// jump, or it contradicts it, and then this clock is refused until it is right.
func (c *clock) heard(t time.Time, of uint8) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch r := c.look(); {
	case !r.doubted:
	case t.Sub(r.wall).Abs() <= maxStepBack:
		c.known, c.knownAt, c.doubted, c.disputed = r.wall, c.mono(), false, ""
	case t.Before(r.wall):
		c.disputed = fmt.Sprintf("replica %d, whose clock did not jump, says %s", of, t.UTC().Format(time.RFC3339))
	}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// clockState is what is kept of the time. Replicas that share their state keep one each:
// those of others can confirm a clock that is ahead of what its replica knew, as after it
// was off for long; a wrong one refuses no other.
type clockState struct {
	Version int `json:"version"`
	// Time is the newest one that was believed, within [clockEvery].
	Time time.Time `json:"time"`
	// Accepted are the clocks that operators accepted, newest last.
	Accepted []acceptedClock `json:"accepted,omitempty"`

	rest storage.Rest
}

// acceptedClock is a clock that an operator accepted. Where it was before the newest
// record, records have the time of that record until the clock has caught up with it.
type acceptedClock struct {
	Clock  time.Time `json:"clock"`
	Newest time.Time `json:"newest"` // record, when it was accepted
	Reason string    `json:"reason"`
	By     string    `json:"by,omitempty"`
}

// keptClock is the clock's state with its place in the store. Its mu is held over
// changes.
type keptClock struct {
	mu       sync.Mutex
	state    clockState // guarded by mu
	revision uint64     // guarded by mu

	others  map[uint8]otherClock // by instance; owned by Open and then by Run
	doubted bool                 // when others was read last; owned as that
}

// otherClock is what another replica kept of the time, and when that was new.
type otherClock struct {
	time time.Time
	at   time.Time // of this process's monotonic clock
}

func parseClock(e storage.Entry) (clockState, error) {
	s, rest, err := storage.ParseVersioned(e.Value, clockVersion, func(s clockState) int { return s.Version })
	if err != nil {
		return clockState{}, fmt.Errorf("reading what was known of the time: %w", err)
	}
	s.rest = rest
	return s, nil
}

// loadClock reads what was known of the time, and looks at the clock for the first time.
func (a *Authority) loadClock(ctx context.Context) error {
	k := &a.keptClock
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := a.rereadClock(ctx); err != nil {
		return err
	}
	others, err := a.otherClocks(ctx)
	if err != nil {
		return err
	}
	newest, known := a.log.Head().Time, k.state.Time
	for _, acc := range k.state.Accepted {
		if !newest.After(acc.Newest) {
			newest = acc.Clock // records have had the time of that one since
		}
	}
	if newest = later(newest, known); known.IsZero() {
		known = newest
	}
	if k.revision == 0 && len(others) > 0 {
		// One that joins has nothing of its own to go by. Of the others not all are ahead.
		newest = later(newest, slices.MinFunc(slices.Collect(maps.Values(others)), time.Time.Compare))
	}
	for _, t := range others {
		if !t.After(a.clock.wall().Add(maxStepBack)) {
			known = later(known, t)
		}
	}
	a.clock.alone(len(others) == 0)
	a.clock.begin(newest, known)
	a.clock.ends(a.journal.End())
	r := a.clock.read()
	switch {
	case r.refused:
		a.cfg.Log.Error("nothing is signed until the clock is right, or an operator accepts it", "err", a.clockError(r))
	case r.doubted:
		a.cfg.Log.Info("the clock is ahead of what was last known; nothing ends by it, is replaced or forgotten until an agent is recognised", "clock", r.wall.UTC(), "known", r.past.UTC())
		if k.revision == 0 {
			// Before something is recorded by a clock that may be wrong.
			return a.commitClock(ctx, clockState{Time: known.UTC()})
		}
	}
	return nil
}

// rereadClock replaces what is kept by what is stored. mu is held.
func (a *Authority) rereadClock(ctx context.Context) error {
	k := &a.keptClock
	e, err := a.store.Get(ctx, clockKey)
	if errors.Is(err, storage.ErrNotFound) {
		k.state, k.revision = clockState{}, 0
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading what was known of the time: %w", err)
	}
	if k.state, err = parseClock(e); err == nil {
		k.revision = e.Revision
	}
	return err
}

// commitClock makes a new state durable. mu is held.
func (a *Authority) commitClock(ctx context.Context, next clockState) error {
	k := &a.keptClock
	next.Version = clockVersion
	b, err := storage.EncodeRecord(next, next.rest)
	if err == nil {
		var revision uint64
		if revision, err = a.store.Commit(ctx, []storage.Cond{{Key: clockKey, Revision: k.revision}}, []storage.Op{{Key: clockKey, Value: b}}); err == nil {
			k.state, k.revision = next, revision
			return nil
		}
	}
	return fmt.Errorf("%w: keeping the time: %w", ErrUnavailable, errors.Join(err, a.rereadClock(ctx)))
}

// otherClocks are what other replicas keep of the time, by instance.
func (a *Authority) otherClocks(ctx context.Context) (map[uint8]time.Time, error) {
	if !a.cfg.shared() {
		return nil, nil
	}
	kept, err := replica.Clocks(ctx, a.cfg.Shared.Store)
	if err != nil {
		return nil, fmt.Errorf("reading what other replicas know of the time: %w", err)
	}
	others := map[uint8]time.Time{}
	for n, e := range kept {
		// One that this version cannot read says nothing.
		if s, err := parseClock(e); err == nil && n != a.instance {
			others[n] = s.Time
		}
	}
	return others, nil
}

// hearClocks holds this clock against those of other replicas that run, and returns what
// is to be said of them.
func (a *Authority) hearClocks(ctx context.Context) (apart, err error) {
	times, err := a.otherClocks(ctx)
	if err != nil {
		return nil, err
	}
	a.clock.alone(len(times) == 0)
	k, r, now := &a.keptClock, a.clock.read(), time.Now()
	others := map[uint8]otherClock{}
	for _, n := range slices.Sorted(maps.Keys(times)) {
		t := times[n]
		was, known := k.others[n]
		o := otherClock{t, was.at}
		if known && !t.Equal(was.time) {
			o.at = now
		}
		others[n] = o
		switch {
		case r.doubted && k.doubted && o.at.Equal(now) && !o.at.IsZero():
			a.clock.heard(t, n)
		case !r.doubted && !o.at.IsZero() && now.Sub(o.at) < replicaSilent && t.Sub(r.wall) > maxStepBack:
			apart = errors.Join(apart, fmt.Errorf("the clock of replica %d says %s, and this one %s: set right the one that is wrong, and what that one issued meanwhile may be valid later than now", n, t.UTC().Format(time.RFC3339), r.wall.UTC().Format(time.RFC3339)))
		}
	}
	k.others, k.doubted = others, r.doubted
	return apart, nil
}

// clockPause is how often the time is kept.
func (a *Authority) clockPause() time.Duration {
	if a.cfg.shared() {
		return replicaClockEvery
	}
	return clockEvery
}

// tendClock keeps the time, and says when the clock has been in doubt for long.
func (a *Authority) tendClock(ctx context.Context) error {
	doubt, err := a.hearClocks(ctx)
	if err != nil {
		return err
	}
	r := a.clock.read()
	if r.doubted && !r.refused && r.since >= doubtAlarm {
		doubt = fmt.Errorf("the clock says %s, and %s; until an agent is recognised nothing ends by it, is replaced or forgotten. If it is right: signet ca accept-clock --record %d --reason …",
			r.wall.UTC().Format(time.RFC3339), r.why, a.log.Head().Sequence)
	}
	a.alarm("clock", doubt)
	if r.refused || r.doubted {
		return nil
	}
	k := &a.keptClock
	k.mu.Lock()
	defer k.mu.Unlock()
	kept := func() bool { return r.past.Sub(k.state.Time) < a.clockPause() }
	for try := 1; !kept(); try++ {
		next := k.state // as it is after a conflict
		next.Time = r.past.UTC()
		// What is stored is read after an error: it may be this change, or be as good.
		if err := a.commitClock(ctx, next); err != nil && !kept() && (!errors.Is(err, storage.ErrConflict) || try == clockTries) {
			return err
		}
	}
	return nil
}

// clockError is why the clock is refused, and what to do.
func (a *Authority) clockError(r clockReading) error {
	return fmt.Errorf("%w. If it is right: signet ca accept-clock --record %d --reason …, or start signet-ca with --accept-clock %d", r.err(), a.log.Head().Sequence, a.log.Head().Sequence)
}

// believed is nil unless the clock cannot be believed; then it says what to do.
func (a *Authority) believed() error {
	if r := a.clock.read(); r.refused {
		return a.clockError(r)
	}
	return nil
}

// acceptClock records that an operator accepts the clock as it is, in the log first, and
// goes on by it. record is the newest one that the operator was told of.
func (a *Authority) acceptClock(ctx context.Context, record uint64, reason, by string) error {
	k := &a.keptClock
	k.mu.Lock()
	defer k.mu.Unlock()
	fail := func(format string, args ...any) error {
		return fmt.Errorf("accepting the clock: %w: "+format, append([]any{errClockStands}, args...)...)
	}
	r := a.clock.read()
	t := r.wall
	j := a.current()
	switch head := a.log.Head(); {
	case !r.refused && !r.doubted:
		return fail("it is believed already")
	case record != head.Sequence:
		return fail("the newest record is %d, not %d", head.Sequence, record)
	case reason == "" || len(reason) > maxReason:
		return fail("a reason of 1 to %d bytes is needed, for those who read the log later", maxReason)
	case t.Before(a.cfg.Built):
		return fail("it says %s, and this program is of %s: set it right", t.UTC().Format(time.RFC3339), a.cfg.Built.UTC().Format(time.RFC3339))
	}
	if start := j.Start(); t.Before(start) {
		return fail("it says %s, and the root is not valid before %s: set it right; or, if this authority was made by a wrong clock and has served nobody, remove its folder and start again",
			t.UTC().Format(time.RFC3339), start.UTC().Format(time.RFC3339))
	}
	err := a.decide(ctx, &capb.Decision{What: capb.Decision_WHAT_CLOCK_ACCEPTED, Instance: uint32(a.instance), Sequence: record, Reason: reason, By: by,
		Clock: &capb.AcceptedClock{Clock: t.Unix(), Known: later(r.past, r.newest).Unix()}})
	if err != nil {
		return fmt.Errorf("accepting the clock: %w", err)
	}
	accepted := acceptedClock{Clock: t.UTC(), Newest: a.log.Head().Time, Reason: reason, By: by}
	for try := 1; ; try++ {
		next := k.state // as it is after a conflict
		next.Time, next.Accepted = t.UTC(), append(slices.Clone(next.Accepted), accepted)
		if n := len(next.Accepted) - maxAccepted; n > 0 {
			next.Accepted = next.Accepted[n:]
		}
		if err = a.commitClock(ctx, next); !errors.Is(err, storage.ErrConflict) || try == 4 {
			break // others keep the time there, too
		}
	}
	if err != nil {
		return fmt.Errorf("accepting the clock: %w", err)
	}
	a.clock.accept(t)
	a.cfg.Log.Warn("an operator accepted the clock; signing goes on", "clock", t.UTC(), "known", later(r.past, r.newest).UTC(), "reason", reason, "by", by)
	return nil
}

// recordedBy is by when the record of a certificate was written whose serial is of t:
// after a clock was accepted that went back, records have a later time than serials.
func (k *keptClock) recordedBy(t time.Time) time.Time {
	k.mu.Lock()
	defer k.mu.Unlock()
	to := t.Add(serialSlack)
	for _, acc := range k.state.Accepted {
		if !t.Before(acc.Clock.Add(-serialSlack)) && t.Before(acc.Newest) {
			to = later(to, acc.Newest.Add(serialSlack))
		}
	}
	return to
}

// acceptClockAtStart is acceptClock for a flag. One that stays in a unit file accepts no
// other clock than that.
func (a *Authority) acceptClockAtStart(ctx context.Context) error {
	if a.cfg.AcceptClock == 0 {
		return nil
	}
	err := a.acceptClock(ctx, a.cfg.AcceptClock, "flag --accept-clock", "")
	if errors.Is(err, errClockStands) {
		a.cfg.Log.Warn("--accept-clock has no effect; remove it", "err", err)
		return nil
	}
	return err
}

// renewClock is what a restore makes of what was known of the time: an operator is there
// and has the clock before their eyes.
func renewClock(entries []storage.Entry) ([]storage.Op, error) {
	for _, e := range entries {
		if e.Key != clockKey {
			continue
		}
		s, err := parseClock(e)
		if err != nil {
			return nil, err
		}
		s.Time = time.Now().UTC().Round(0)
		b, err := storage.EncodeRecord(s, s.rest)
		return []storage.Op{{Key: clockKey, Value: b}}, err
	}
	return nil, nil
}
