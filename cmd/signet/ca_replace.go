package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/ca/capb"
)

func newReplaceRootCommand(socket *string) *cobra.Command {
	var now bool
	var patience time.Duration
	c := &cobra.Command{Use: "replace-root [ID]", Short: "Replace a root in an emergency, with whatever is below it",
		Long: `Says what would be done and what would break. With --now it is done: another root is
published and used, the former one is tainted and then leaves the trust bundle. Agents
that are connected are waited for, so that nothing breaks on their nodes; others are not
after --patience.

Without an ID it is the active root, or the one whose replacement was begun and is not
done. If it is interrupted, run it again with the ID that it prints first: it goes on
where it was, and makes no other root.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return withAuthority(*socket, func(a *authority) error {
				r := replacement{a: a, out: cmd.OutOrStdout(), patience: patience}
				if len(args) > 0 {
					r.id = parseAuthorityID(args[0])
				}
				if !now {
					return r.preview(cmd.Context())
				}
				return r.run(cmd.Context())
			})
		}}
	c.Flags().BoolVar(&now, "now", false, "do it")
	c.Flags().DurationVar(&patience, "patience", 30*time.Second, "how long agents that are connected are waited for in each step")
	return c
}

// replacement is a replacement of a root. What was done of it is on record at the
// authority; here is nothing that an interruption could lose.
type replacement struct {
	a        *authority
	out      io.Writer
	patience time.Duration
	id       string // of the root that goes; empty: see newReplaceRootCommand
}

// replacementStep is what is to be done next.
type replacementStep string

const (
	stepBegin    replacementStep = "begin" // note which root goes, and publish another
	stepActivate replacementStep = "activate"
	stepTaint    replacementStep = "taint"
	stepRevoke   replacementStep = "revoke"
	stepNone     replacementStep = "none" // the root is gone
)

// standing is where a replacement stands.
type standing struct {
	step         replacementStep
	former, next *capb.AuthorityStatus // the root that goes, nil if it is gone; the one on the way, if there is one
	active       *capb.AuthorityStatus
	spread       time.Duration
}

// look finds where the replacement stands. If it does not know yet which root goes, it
// decides that.
func (r *replacement) look(ctx context.Context) (*standing, error) {
	resp, err := r.a.Authorities(ctx, &capb.AuthoritiesRequest{})
	if err != nil {
		return nil, r.a.failed(err)
	}
	if resp.GetForeign() {
		return nil, errors.New("the root is not this authority's own: whoever has it replaces it")
	}
	st := &standing{spread: resp.GetTaintSpread().AsDuration()}
	var condemned *capb.AuthorityStatus
	for _, x := range resp.GetAuthorities() {
		if x.GetKind() != "root" {
			continue
		}
		if x.GetId() == r.id {
			st.former = x
		}
		if x.GetCondemned() != nil && (condemned == nil || x.GetCondemned().AsTime().Before(condemned.GetCondemned().AsTime())) {
			condemned = x
		}
		switch x.GetState() {
		case "active":
			st.active = x
		case "prepared", "published":
			st.next = x
		}
	}
	if st.active == nil {
		return nil, errors.New("the authority has no active root")
	}
	if r.id == "" {
		if st.former = condemned; condemned == nil {
			st.former = st.active
		}
		r.id = st.former.GetId()
	}
	switch f := st.former; {
	case f == nil:
		st.step = stepNone
	case f == st.next:
		return nil, fmt.Errorf("root %s is %s and was not used yet: `signet ca authority discard %s`", r.id, f.GetState(), r.id)
	case f.GetState() == "old" && f.GetTainted() != nil:
		st.step = stepRevoke
	case f.GetState() == "old" && f.GetCondemned() != nil:
		st.step = stepTaint
	case f == st.active && f.GetCondemned() != nil && st.next.GetState() == "published":
		st.step = stepActivate
	default:
		st.step = stepBegin
	}
	return st, nil
}

// nodes are those with an agent that is connected, and those without.
func (r *replacement) nodes(ctx context.Context) (connected, away []string, err error) {
	st, err := r.a.Status(ctx, &capb.StatusRequest{})
	if err != nil {
		return nil, nil, r.a.failed(err)
	}
	for _, g := range st.GetAgents() {
		if g.GetConnected() && !slices.Contains(connected, g.GetNode()) {
			connected = append(connected, g.GetNode())
		}
	}
	for _, g := range st.GetAgents() {
		if n := g.GetNode(); !slices.Contains(connected, n) && !slices.Contains(away, n) {
			away = append(away, n)
		}
	}
	return connected, away, nil
}

func (r *replacement) say(format string, args ...any) error {
	_, err := fmt.Fprintf(r.out, format+"\n", args...)
	return err
}

func (r *replacement) preview(ctx context.Context) error {
	st, err := r.look(ctx)
	if err != nil {
		return err
	}
	if st.step == stepNone {
		return r.say("root %s is not in the trust bundle: nothing is to be done", r.id)
	}
	connected, away, err := r.nodes(ctx)
	if err != nil {
		return err
	}
	if c := st.former.GetCondemned(); c != nil {
		return r.say("root %s is being replaced since %s, and is %s; --now goes on with it", r.id, c.AsTime().Format(time.RFC3339), st.former.GetState())
	}
	begin := "another root is made and published"
	switch {
	case st.former != st.active:
		begin = fmt.Sprintf("root %s is active already", st.active.GetId())
	case st.next != nil:
		begin = fmt.Sprintf("root %s is on the way already", st.next.GetId())
	}
	if err := r.say(`root %s would be replaced:
  1 %s
  2 it is used as soon as the agents that are connected have it: %d nodes, waited for at most %v
  3 root %s is tainted: agents replace every certificate below it within %v
  4 it leaves the trust bundle when they have: waited for at most %v more
what breaks:`, r.id, begin, len(connected), r.patience, r.id, st.spread, r.patience); err != nil {
		return err
	}
	breaks := []string{
		"clients of Istio's door and others that get no trust from an agent: from step 2 on they do not trust new certificates, from step 4 on theirs are not trusted, until they ask again",
		"agents and clients that pin the root by its hash: until the new hash is configured",
	}
	for _, n := range away {
		breaks = append([]string{"node " + n + ", whose agent is not connected: from step 2 on in part, from step 4 on all connections of its proxies, until the agent is back"}, breaks...)
	}
	for _, b := range breaks {
		if err := r.say("  %s", b); err != nil {
			return err
		}
	}
	return r.say("nothing was changed; --now does it")
}

// run looks where the replacement stands and does what is next, until the root is gone.
func (r *replacement) run(ctx context.Context) error {
	st, err := r.look(ctx)
	if err != nil {
		return err
	}
	switch c := st.former.GetCondemned(); {
	case st.step == stepNone:
		return r.say("root %s is not in the trust bundle: nothing is to be done", r.id)
	case c != nil:
		err = r.say("root %s is being replaced since %s; this goes on with it", r.id, c.AsTime().Format(time.RFC3339))
	default:
		err = r.say("root %s is being replaced; if this is interrupted: signet ca authority replace-root --now %s", r.id, r.id)
	}
	for err == nil && st.step != stepNone {
		was := st.step
		if st, err = r.advance(ctx, st); err == nil && st.step != was {
			err = r.reached(st)
		}
	}
	return err
}

// reached says what has been done.
func (r *replacement) reached(st *standing) error {
	switch st.step {
	case stepActivate:
		return r.say("root %s is published", st.next.GetId())
	case stepTaint:
		return r.say("root %s is active", st.active.GetId())
	case stepRevoke:
		return r.say("root %s is tainted; agents replace what is below it", r.id)
	case stepNone:
		return r.say("root %s left the trust bundle", r.id)
	}
	return nil
}

// advance does one step, when the agents that are connected are ready for it, and by force
// when the patience is over or nobody else is waited for. The authority, which does some
// steps by itself when they are due, or another operator, may be first. It returns where
// the replacement stands then.
func (r *replacement) advance(ctx context.Context, st *standing) (*standing, error) {
	was, end := st.step, time.Now().Add(r.patience)
	req := &capb.RotateRequest{Id: r.id}
	switch was {
	case stepBegin:
		req.Step = capb.RotateRequest_STEP_REPLACE
	case stepActivate:
		req.Step, req.Id = capb.RotateRequest_STEP_ACTIVATE, ""
	case stepTaint:
		req.Step = capb.RotateRequest_STEP_TAINT
	case stepRevoke:
		req.Step, end = capb.RotateRequest_STEP_REVOKE, end.Add(st.spread)
	}
	for {
		resp, stepErr := r.a.Rotate(ctx, req)
		if code := status.Code(stepErr); stepErr != nil && code != codes.FailedPrecondition && code != codes.NotFound {
			return nil, r.a.failed(stepErr)
		}
		st, err := r.look(ctx)
		w := resp.GetWaits()
		switch {
		case err != nil || st.step != was:
			return st, err
		case stepErr != nil:
			return nil, r.a.failed(stepErr)
		case w == nil:
			return nil, fmt.Errorf("the authority at %s says that step %q is done, and it is not", r.a.socket, was)
		}
		connected, _, err := r.nodes(ctx)
		if err != nil {
			return nil, err
		}
		here := slices.ContainsFunc(w.GetNodes(), func(n string) bool { return slices.Contains(connected, n) })
		if !here && len(w.GetReplicas()) == 0 || time.Now().After(end) {
			if err := r.say("not waited for: %s", waitsFor(w)); err != nil {
				return nil, err
			}
			req.Force = true
			continue
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(200 * time.Millisecond):
		}
	}
}
