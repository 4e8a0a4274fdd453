package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/signet-mesh/signet/ca/caclient"
	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/holder"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// settle is how long changes are gathered before they are saved.
const settle = 50 * time.Millisecond

// settleHeads is how long new heads of the authorities' logs wait for other changes.
const settleHeads = 5 * time.Second

// extraLogHeads names what caclient.Client.LogHeads returned in the state.
const extraLogHeads = "log-heads"

// retrySave is when a state that could not be saved is saved again.
const retrySave = 10 * time.Second

// saved is the state file, or nothing where none can be kept.
type saved struct {
	file  *holder.StateFile // nil: nothing is kept
	state holder.State      // what a predecessor left; zero if there is nothing
	log   *slog.Logger
	// kept is what a restart would find.
	kept identity.Watched[kept]
}

// kept is what is in the state file.
type kept struct {
	trust uint64 // the sequence of the trust that was saved last
	gone  bool   // nothing is there: it had to be removed, and could not be saved since
}

// acknowledged bounds what is acknowledged by what a restart would find again: an
// authority whose root is only in this process's memory must not be used.
func (s *saved) acknowledged(sequence uint64, changed <-chan struct{}) (uint64, <-chan struct{}) {
	if s.file == nil {
		return sequence, changed // a successor begins with what the authority says
	}
	switch kept, later := s.kept.Load(); {
	case kept.gone:
		return sequence, changed // as without a file
	case kept.trust < sequence:
		return kept.trust, later
	}
	return sequence, changed
}

// openSaved loads what the last agent of this node saved. State that cannot be
// used is left out with a warning, since the agent can do without; a folder that
// must not hold keys is an error.
func openSaved(c config, td spiffeid.TrustDomain, log *slog.Logger) (*saved, error) {
	s := &saved{log: log}
	if c.StateDir == "" {
		log.Warn("stateDir is empty: after a restart this agent serves nobody before it has reached the authority")
		return s, nil
	}
	file, err := holder.OpenStateFile(c.StateDir, holder.StateOptions{AllowSwap: c.AllowSwap, NotBelow: []string{filepath.Dir(c.Socket)}, Wait: handover, Log: log})
	if errors.Is(err, holder.ErrNoState) {
		log.Warn("no state is saved: after a restart this agent serves nobody before it has reached the authority", "err", err)
		return s, nil
	}
	if err != nil {
		return nil, fmt.Errorf("stateDir: %w", err)
	}
	s.file = file
	state, err := file.Load()
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil // the first agent on this node since it booted
	}
	if err != nil {
		log.Warn("saved state is not used", "err", err)
		return s, nil
	}
	// State of another trust domain or node would not be of this agent.
	if state.Trust != nil && state.Trust.TrustDomain() != td {
		log.Warn("saved state is not used", "err", fmt.Errorf("it is of trust domain %s", state.Trust.TrustDomain().Name()))
		return s, nil
	}
	if id, err := identity.AgentID(td, c.Node); err == nil && state.Agent != nil && state.Agent.ID != id {
		log.Warn("saved state is not used", "err", fmt.Errorf("it is of %s", state.Agent.ID))
		return s, nil
	}
	s.state = state
	if state.Trust != nil {
		s.kept.Store(kept{trust: state.Trust.Sequence()})
	}
	return s, nil
}

// credential is the saved agent SVID, or nil.
func (s *saved) credential() *caclient.Credential {
	if s.state.Agent == nil {
		return nil
	}
	return &caclient.Credential{SVID: s.state.Agent, RenewAt: s.state.AgentRenewAt, TokenBy: s.state.TokenBy}
}

// Names of what else is saved, in State.Extra. Each has a format of its own, with a
// version.
const (
	savedPolicies = "policies"
	savedKeys     = "token-keys"
	savedTokens   = "tokens" // hashes of those that were accepted
	savedOutage   = "outage" // of the API server
	// savedRequestKeys are the keys of requests' tokens.
	savedRequestKeys = "request-keys"
	savedBans        = "bans"
)

// export is something to be saved, and a channel that is closed when it changes.
type export func() (saved []byte, changed <-chan struct{})

// load hands what was saved under a name to take. The agent can do without it.
func (s *saved) load(name string, take func([]byte) error) {
	b := s.state.Extra[name]
	if b == nil {
		return
	}
	if err := take(b); err != nil {
		s.log.Warn("a part of the saved state is not used", "part", name, "err", err)
	}
}

// keep saves the state after each change, until ctx ends, and once more then.
func (s *saved) keep(ctx context.Context, client *caclient.Client, svids *holder.Holder, pods *identity.Pods, node string, exports map[string]export) error {
	if s.file == nil {
		<-ctx.Done()
		return nil
	}
	failing := false
	for {
		trust, trustChanged := client.Trust()
		cred, credChanged := client.Credential()
		onNode, podsChanged := pods.OnNode(node)
		svidsChanged := svids.Changed()
		heads, headsChanged := client.LogHeads()
		state := holder.State{Extra: map[string][]byte{extraLogHeads: heads}, Trust: trust, NodeUID: client.NodeUID(), Pods: onNode, SVIDs: svids.Export()}
		if cred != nil {
			state.Agent, state.AgentRenewAt, state.TokenBy = cred.SVID, cred.RenewAt, cred.TokenBy
		}
		// Whichever of the exports changes first.
		extraChanged, done := make(chan struct{}, 1), make(chan struct{})
		for name, export := range exports {
			b, changed := export()
			if b != nil {
				state.Extra[name] = b
			}
			go func() {
				select {
				case <-changed:
					select {
					case extraChanged <- struct{}{}:
					default:
					}
				case <-done:
				}
			}()
		}
		err := s.file.Save(state)
		switch {
		case err != nil && !failing:
			s.log.Warn("saving state failed; it is tried again", "err", err)
		case err == nil && failing:
			s.log.Info("state is saved again")
		}
		s.note(trust, err)
		failing = err != nil
		if ctx.Err() != nil {
			close(done)
			return nil
		}
		var again <-chan time.Time
		if failing {
			again = time.After(retrySave)
		}
		select {
		case <-ctx.Done():
			close(done)
			continue // once more, with what the last loops left
		case <-again:
		case <-trustChanged:
		case <-credChanged:
		case <-podsChanged:
		case <-svidsChanged:
		case <-headsChanged:
			// They come every few seconds; another change takes them along.
			select {
			case <-ctx.Done():
			case <-time.After(settleHeads):
			case <-trustChanged:
			case <-credChanged:
			case <-podsChanged:
			case <-svidsChanged:
			case <-extraChanged:
			}
		case <-extraChanged:
		}
		close(done)
		select {
		case <-ctx.Done():
		case <-time.After(settle):
		}
	}
}

// note takes note of what a restart would find after trust was to be saved.
func (s *saved) note(trust *identity.Trust, err error) {
	was := s.kept.Value()
	now := was
	switch {
	case errors.Is(err, holder.ErrStateRemoved):
		now.gone = true
	case err == nil:
		now.gone = false
		if trust != nil {
			now.trust = trust.Sequence()
		}
	}
	if now != was {
		s.kept.Store(now)
	}
}

// Close releases the state file; the state stays for the next agent.
func (s *saved) Close() error {
	if s.file == nil {
		return nil
	}
	return s.file.Close()
}
