package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-mesh/signet/ca/capb"
)

// errWaits is why a step was not done: somebody is waited for.
var errWaits = errors.New("nothing was done")

// newAuthorityCommand rotates what the authority signs with.
func newAuthorityCommand(socket *string) *cobra.Command {
	group := &cobra.Command{Use: "authority", Short: "Look at roots and intermediates, and replace them", Args: cobra.NoArgs,
		Long: `Roots and intermediates are replaced by themselves at half of their lives. A root is
prepared, published (in the trust bundle), active (it signs), old (in the bundle until
the last certificate below it has ended), and gone. It becomes active when every agent
has acknowledged it, and those who cannot acknowledge had authority.propagation.`}
	step := func(use, short, long string, args cobra.PositionalArgs, s capb.RotateRequest_Step, force string, done string) *cobra.Command {
		req := &capb.RotateRequest{Step: s}
		c := &cobra.Command{Use: use, Short: short, Long: long, Args: args,
			RunE: func(cmd *cobra.Command, args []string) error {
				if len(args) > 0 {
					req.Id = parseAuthorityID(args[0])
				}
				return withAuthority(*socket, func(a *authority) error {
					id, err := a.rotate(cmd.Context(), req)
					if err == nil {
						_, err = fmt.Fprintf(cmd.OutOrStdout(), done+"\n", id)
					}
					return err
				})
			}}
		if force != "" {
			c.Flags().BoolVar(&req.Force, "force", false, force)
		}
		return c
	}
	group.AddCommand(newAuthorityListCommand(socket),
		step("prepare", "Make the next root and publish it; it is used when everybody has it", "", cobra.NoArgs,
			capb.RotateRequest_STEP_PREPARE, "", "root %s is published"),
		step("activate", "Use the published root now, instead of in the authority's next round", `Says who has not acknowledged the root, and does nothing, unless it is forced: then
what is issued does not verify on those nodes until their agents are back.`, cobra.NoArgs,
			capb.RotateRequest_STEP_ACTIVATE, "do not wait for agents and consumers; it is recorded", "root %s is active"),
		step("renew", "Take another intermediate below the active root", "", cobra.NoArgs,
			capb.RotateRequest_STEP_RENEW, "", "intermediate %s signs"),
		step("taint ID", "Have agents replace every certificate below an intermediate or an old root", `Agents replace what is below it within authority.taintSpread. What it issued still
verifies, until an old root is revoked. It is final.`, cobra.ExactArgs(1),
			capb.RotateRequest_STEP_TAINT, "", "%s is tainted; agents replace what is below it"),
		step("revoke ID", "Take a tainted root out of the trust bundle before what is below it has ended", `Says who has not replaced what is below the root, and does nothing, unless it is
forced. From then on what is below it verifies nowhere. An intermediate cannot be
revoked: peers trust whatever is below a root, so replace the root.`, cobra.ExactArgs(1),
			capb.RotateRequest_STEP_REVOKE, "do not wait for agents and consumers; it is recorded", "root %s left the trust bundle"),
		step("discard ID", "Give up a root that is prepared or published and was not used", "", cobra.ExactArgs(1),
			capb.RotateRequest_STEP_DISCARD, "", "root %s is discarded"),
		newReplaceRootCommand(socket))
	return group
}

// parseAuthorityID takes an ID as list, or openssl, prints it.
func parseAuthorityID(s string) string { return strings.ToLower(strings.ReplaceAll(s, ":", "")) }

func withAuthority(socket string, f func(*authority) error) error {
	a, err := dialAuthority(socket)
	if err != nil {
		return err
	}
	defer a.Close()
	return f(a)
}

// rotate does a step; an error wraps errWaits if somebody is waited for.
func (a *authority) rotate(ctx context.Context, req *capb.RotateRequest) (id string, err error) {
	resp, err := a.Rotate(ctx, req)
	if err != nil {
		return "", a.failed(err)
	}
	if w := resp.GetWaits(); w != nil {
		return "", fmt.Errorf("%w: %s (--force does not wait)", errWaits, waitsFor(w))
	}
	return resp.GetId(), nil
}

// waitsFor says who is missing.
func waitsFor(w *capb.RotationWait) string {
	var parts []string
	if n := w.GetNodes(); len(n) > 0 {
		parts = append(parts, fmt.Sprintf("it waits for the agents on %s", strings.Join(n, ", ")))
	}
	if r := w.GetReplicas(); len(r) > 0 {
		parts = append(parts, fmt.Sprintf("it waits for the replicas %v", r))
	}
	if u := w.GetUntil(); u != nil {
		parts = append(parts, "those who do not acknowledge have until "+u.AsTime().Format(time.RFC3339))
	}
	return strings.Join(parts, "; ")
}

func newAuthorityListCommand(socket *string) *cobra.Command {
	var output string
	c := &cobra.Command{Use: "list", Short: "List roots and intermediates, and who is waited for", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return fmt.Errorf("--output %q: text or json", output)
			}
			return withAuthority(*socket, func(a *authority) error {
				resp, err := a.Authorities(cmd.Context(), &capb.AuthoritiesRequest{})
				if err != nil {
					return a.failed(err)
				}
				return printAuthorities(cmd.OutOrStdout(), resp, output)
			})
		}}
	c.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return c
}

func printAuthorities(w io.Writer, resp *capb.AuthoritiesResponse, output string) error {
	if output == "json" {
		b, err := protojson.MarshalOptions{EmitUnpopulated: true}.Marshal(resp)
		if err != nil {
			return err
		}
		// protojson varies its spaces on purpose.
		var v any
		if err := json.Unmarshal(b, &v); err != nil {
			return err
		}
		return printJSON(w, v)
	}
	when := func(t *timestamppb.Timestamp) string {
		if t == nil {
			return "-"
		}
		return t.AsTime().Format(time.RFC3339)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "ID\tKIND\tSTATE\tSINCE\tENDS\tTAINTED\tLEAVES UNTIL\tROOT")
	for _, a := range resp.GetAuthorities() {
		root := a.GetRoot()
		if root == "" {
			root = "-"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", a.GetId(), a.GetKind(), a.GetState(), when(a.GetSince()), when(a.GetNotAfter()), when(a.GetTainted()), when(a.GetLeaves()), root)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "trust sequence %d\n", resp.GetTrustSequence())
	say := func(format string, args ...any) {
		if err == nil {
			_, err = fmt.Fprintf(w, format+"\n", args...)
		}
	}
	if resp.GetForeign() {
		say("the root is not this authority's own: whoever has it replaces it")
	}
	if a := resp.GetActivation(); a != nil {
		say("root %s is not used yet: %s; from %s on it is used whoever is missing", a.GetId(), waitsFor(a), when(resp.GetDeadline()))
	}
	if n := resp.GetLacking(); len(n) > 0 {
		say("what is issued now does not verify on %s: their agents have not acknowledged the active root", strings.Join(n, ", "))
	}
	for _, r := range resp.GetRevocations() {
		say("root %s is not ready to be revoked: %s", r.GetId(), waitsFor(r))
	}
	for _, a := range resp.GetAuthorities() {
		if a.GetCondemned() != nil {
			say("root %s is being replaced since %s: `signet ca authority replace-root --now %s` goes on with it", a.GetId(), when(a.GetCondemned()), a.GetId())
		}
	}
	return err
}
