package main

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/signet-mesh/signet/authz/source"
	"github.com/signet-mesh/signet/identity"
)

// outageGrace is how long after the API server is back tokens may still be those
// from before: kubelet looks at a pod's volumes every one to two minutes.
const outageGrace = 5 * time.Minute

// noticed is how late this agent may notice that the API server is away: a
// connection that was cut without a word is found dead after 45 seconds.
const noticed = time.Minute

// outage knows whether kubelet cannot replace tokens, by whether the API server
// answers this agent.
type outage struct {
	is identity.Watched[span]
	// failed says that this agent or its predecessor saw it away since it last
	// answered. Owned by load and then by watch.
	failed bool
}

// span is since when tokens cannot be replaced, and until when; since is zero where
// that is not known, over is away while it goes on. Where over is not in the future
// they can be.
type span struct{ since, over time.Time }

// away is later than any time.
var away = time.Unix(1<<40, 0)

// newOutage is one that goes on: until the first answer it may be that nobody gets
// one.
func newOutage() *outage {
	o := &outage{}
	// Nothing is known of the time before: what a predecessor handed over was good
	// when it did.
	o.is.Store(span{over: away})
	return o
}

// on reports whether tokens cannot be replaced now, and since when.
func (o *outage) on() (since time.Time, on bool) {
	s := o.is.Value()
	return s.since, time.Now().Before(s.over)
}

// watch ends when ctx does.
func (o *outage) watch(ctx context.Context, contact func() (source.Contact, <-chan struct{})) error {
	for {
		is, changed := contact()
		switch {
		case is == source.ContactAway:
			o.failed = true
			since, on := o.on()
			if !on {
				since = time.Now().Add(-noticed)
			}
			o.is.Store(span{since, away})
		case is == source.ContactAnswers && o.failed:
			o.failed = false
			o.is.Store(span{o.is.Value().since, time.Now().Add(outageGrace)})
		case is == source.ContactAnswers && o.is.Value().over.Equal(away):
			o.is.Store(span{})
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// savedOutageState is what export writes. A change that older versions must not
// ignore means a new version.
type savedOutageState struct {
	Version int       `json:"version"`
	Failed  bool      `json:"failed"`
	Over    time.Time `json:"over"`
}

// export is the outage, for a successor.
func (o *outage) export() (saved []byte, changed <-chan struct{}) {
	is, changed := o.is.Load()
	out := savedOutageState{Version: 1}
	if is.over.Equal(away) {
		out.Failed = true
	} else {
		out.Over = is.over.UTC()
	}
	saved, err := json.Marshal(out)
	if err != nil {
		return nil, changed // a time beyond the year 9999
	}
	return saved, changed
}

// load goes on where a predecessor was.
func (o *outage) load(saved []byte) error {
	var in savedOutageState
	if err := json.Unmarshal(saved, &in); err != nil {
		return fmt.Errorf("loading the outage: %w", err)
	}
	if in.Version != 1 {
		return fmt.Errorf("loading the outage: version %d, and this program reads 1", in.Version)
	}
	left := time.Until(in.Over)
	switch {
	case in.Failed:
		o.failed = true
	case left > 0 && left <= outageGrace:
		o.is.Store(span{over: in.Over})
	}
	return nil
}
