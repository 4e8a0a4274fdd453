package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/identity"
)

const banHelp = `SUBJECT is one of
  spiffe://TRUSTDOMAIN/PATH     a SPIFFE ID
  spiffe://TRUSTDOMAIN/PATH/*   all SPIFFE IDs below a path, by whole segments
  serial/HEX                    one certificate (signet ca log list)
  node/NAME                     a node: its agent, its pods, and their certificates`

func newBanCommand(socket *string) *cobra.Command {
	group := &cobra.Command{Use: "ban", Short: "Deny a SPIFFE ID, a certificate or a node everywhere, at once", Args: cobra.NoArgs}
	var output, reason, expires string
	var wait time.Duration
	add := &cobra.Command{Use: "add SUBJECT --reason TEXT", Short: "Ban somebody: on every node within a second",
		Long: `Bans a subject until it is removed, or until --expires. The authority issues nothing
to it from then on, and every agent denies its requests before any policy is asked. A
node's streams are cut, and every certificate that was issued there and has not expired
is banned too. Banning a subject again changes the reason and the end.

` + banHelp + `

The command prints which agents enforce it, waiting for them for as long as --wait, and
what does not enforce it.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			req := &capb.AddBanRequest{Subject: args[0], Reason: reason}
			if expires != "" {
				end, err := parseExpires(expires, time.Now())
				if err != nil {
					return err
				}
				req.Until = timestamppb.New(end)
			}
			return withAuthority(*socket, func(a *authority) error {
				resp, err := a.AddBan(cmd.Context(), req)
				if err != nil {
					return a.failed(err)
				}
				out := jsonBanAdded{Ban: banOf(resp.GetBan()), Changed: resp.GetChanged(), Revision: resp.GetRevision(), Revoked: resp.GetRevoked(), Pending: resp.GetPending()}
				if out.Agents, out.OtherReplicas, err = a.enforced(cmd.Context(), resp.GetRevision(), wait); err != nil {
					return err
				}
				out.NotEnforcedBy = notEnforcedBy(resp, out.OtherReplicas)
				if output == "json" {
					return printJSON(cmd.OutOrStdout(), out)
				}
				return out.print(cmd.OutOrStdout())
			})
		}}
	add.Flags().StringVar(&expires, "expires", "", "when the ban ends: after a `DURATION` as 24h, or at a time as 2026-01-31T12:00:00Z; empty: when it is removed")
	remove := &cobra.Command{Use: "remove SUBJECT --reason TEXT", Short: "End a ban",
		Long: "Ends a ban. A certificate that was put on a CRL because of it stays there until it expires.\n\n" + banHelp,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			return withAuthority(*socket, func(a *authority) error {
				resp, err := a.RemoveBan(cmd.Context(), &capb.RemoveBanRequest{Subject: args[0], Reason: reason})
				if err != nil {
					return a.failed(err)
				}
				out := jsonBanRemoved{Ban: banOf(resp.GetBan()), Revision: resp.GetRevision()}
				if out.Agents, out.OtherReplicas, err = a.enforced(cmd.Context(), resp.GetRevision(), wait); err != nil {
					return err
				}
				if output == "json" {
					return printJSON(cmd.OutOrStdout(), out)
				}
				w := cmd.OutOrStdout()
				fmt.Fprintf(w, "%s is not banned any more\n", out.Ban.Subject)
				return printAgents(w, out.Agents, out.OtherReplicas, "have taken that up")
			})
		}}
	for _, c := range []*cobra.Command{add, remove} {
		c.Flags().StringVar(&reason, "reason", "", "why, a `TEXT` for those who read of it later")
		c.Flags().DurationVar(&wait, "wait", 2*time.Second, "how long to wait for agents to say that they have taken it up")
		required(c, "reason")
	}
	var all bool
	list := &cobra.Command{Use: "list", Short: "Print the bans, and which agents enforce them", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			return withAuthority(*socket, func(a *authority) error {
				resp, err := a.ListBans(cmd.Context(), &capb.ListBansRequest{All: all})
				if err != nil {
					return a.failed(err)
				}
				out := jsonBans{Revision: resp.GetRevision(), Bans: []jsonBan{}, Agents: agentsOf(resp, resp.GetRevision()), OtherReplicas: resp.GetOtherReplicas()}
				for _, b := range resp.GetBans() {
					out.Bans = append(out.Bans, banOf(b))
				}
				if output == "json" {
					return printJSON(cmd.OutOrStdout(), out)
				}
				return out.print(cmd.OutOrStdout())
			})
		}}
	list.Flags().BoolVar(&all, "all", false, "also those that have ended in the last 30 days")
	for _, c := range []*cobra.Command{add, remove, list} {
		c.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	}
	group.AddCommand(add, list, remove)
	return group
}

// parseExpires is a duration from now on, or a time.
func parseExpires(s string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(s); err == nil {
		if d <= 0 {
			return time.Time{}, fmt.Errorf("--expires %q: must be after now", s)
		}
		return now.Add(d), nil
	}
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		return time.Time{}, fmt.Errorf("--expires %q: neither a duration as 24h nor a time as 2026-01-31T12:00:00Z", s)
	}
	if !t.After(now) {
		return time.Time{}, fmt.Errorf("--expires %q: is over", s)
	}
	return t, nil
}

// What the commands print as JSON.
type (
	jsonBanAdded struct {
		Ban           jsonBan        `json:"ban"`
		Changed       bool           `json:"changed"`
		Revision      uint64         `json:"revision"`
		Revoked       uint32         `json:"revoked"`
		Pending       string         `json:"pending,omitempty"`
		Agents        []jsonBanAgent `json:"agents"`
		OtherReplicas uint32         `json:"otherReplicas,omitempty"`
		NotEnforcedBy []string       `json:"notEnforcedBy"`
	}
	jsonBanRemoved struct {
		Ban           jsonBan        `json:"ban"`
		Revision      uint64         `json:"revision"`
		Agents        []jsonBanAgent `json:"agents"`
		OtherReplicas uint32         `json:"otherReplicas,omitempty"`
	}
	jsonBans struct {
		Revision uint64         `json:"revision"`
		Bans     []jsonBan      `json:"bans"`
		Agents   []jsonBanAgent `json:"agents"`
		// OtherReplicas is how many replicas have agents of their own, which this one does
		// not know of.
		OtherReplicas uint32 `json:"otherReplicas,omitempty"`
	}
	jsonBan struct {
		Subject  string      `json:"subject"`
		Reason   string      `json:"reason"`
		By       string      `json:"by"`
		At       time.Time   `json:"at"`
		Until    *time.Time  `json:"until,omitempty"`
		SPIFFEID string      `json:"spiffeID,omitempty"`
		Serials  uint32      `json:"serials,omitempty"`
		Ended    *jsonBanEnd `json:"ended,omitempty"`
	}
	jsonBanEnd struct {
		Reason string    `json:"reason"`
		By     string    `json:"by"`
		At     time.Time `json:"at"`
	}
	jsonBanAgent struct {
		Node      string `json:"node"`
		Connected bool   `json:"connected"`
		// Enforces says that the agent's checks are denied by these bans; Unread is how
		// many of them it cannot read.
		Enforces bool   `json:"enforces"`
		Unread   uint32 `json:"unread,omitempty"`
	}
)

func banOf(p *capb.BanRecord) jsonBan {
	b := jsonBan{Subject: p.GetSubject(), Reason: p.GetReason(), By: p.GetBy(), At: p.GetAt().AsTime(), SPIFFEID: p.GetSpiffeId(), Serials: p.GetSerials()}
	if u := p.GetUntil(); u != nil {
		t := u.AsTime()
		b.Until = &t
	}
	if e := p.GetEnded(); e != nil {
		b.Ended = &jsonBanEnd{e.GetReason(), e.GetBy(), e.GetAt().AsTime()}
	}
	return b
}

func agentsOf(resp *capb.ListBansResponse, revision uint64) []jsonBanAgent {
	out := []jsonBanAgent{}
	for _, a := range resp.GetAgents() {
		out = append(out, jsonBanAgent{a.GetNode(), a.GetConnected(), a.GetConnected() && a.GetRevision() >= revision, a.GetUnread()})
	}
	return out
}

// enforced are the replica's agents, once all that are connected enforce a revision of the
// bans, or it took too long, and how many other replicas there are.
func (a *authority) enforced(ctx context.Context, revision uint64, wait time.Duration) (agents []jsonBanAgent, others uint32, err error) {
	deadline := time.Now().Add(wait)
	for {
		resp, err := a.ListBans(ctx, &capb.ListBansRequest{})
		if err != nil {
			return nil, 0, a.failed(err)
		}
		agents, all := agentsOf(resp, revision), true
		for _, g := range agents {
			all = all && (g.Enforces || !g.Connected)
		}
		if all || !time.Now().Before(deadline) {
			return agents, resp.GetOtherReplicas(), nil
		}
		select {
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// notEnforcedBy says what a ban does not reach.
func notEnforcedBy(resp *capb.AddBanResponse, otherReplicas uint32) []string {
	s, err := identity.ParseBanSubject(resp.GetBan().GetSubject())
	if err != nil {
		return nil
	}
	out := []string{
		"proxies that do not ask their agent (without the ext_authz filter), and those of agents that are not connected",
		"connections of TCP that are open; of HTTP, requests that are under way",
	}
	if otherReplicas > 0 {
		out = append(out, "agents of a replica that is cut off from etcd, until they have left it, some seconds later")
	}
	onList := "proxies that check no CRL (sds.crl) and do not send the peer's certificate with checks (include_peer_certificate)"
	if resp.GetRevoked() == 0 {
		onList = "proxies that do not send the peer's certificate with checks (include_peer_certificate): it is on no CRL"
	}
	switch s.Kind() {
	case identity.BanID, identity.BanBelow:
		out = append(out, "clients that connect to what is banned, until its SVID expires")
	case identity.BanSerial:
		out = append(out, onList, "another certificate of the same identity: ban the SPIFFE ID for that")
	case identity.BanNode:
		out = append(out, onList, "clients that connect to the node's pods, until their SVIDs expire",
			"the same identities on other nodes: ban the SPIFFE IDs for that")
	}
	return out
}

func (o jsonBanAdded) print(w io.Writer) error {
	until := "until it is removed"
	if o.Ban.Until != nil {
		until = "until " + o.Ban.Until.Format(time.RFC3339)
	}
	what := "banned "
	if o.Changed {
		what = "was banned before, and now is "
	}
	fmt.Fprintf(w, "%s %s%s\n", o.Ban.Subject, what, until)
	if o.Ban.SPIFFEID != "" {
		fmt.Fprintf(w, "it is a certificate of %s\n", o.Ban.SPIFFEID)
	}
	if strings.HasPrefix(o.Ban.Subject, "node/") {
		fmt.Fprintf(w, "with it %d certificates that were issued there\n", o.Ban.Serials)
	}
	if o.Revoked > 0 {
		fmt.Fprintf(w, "revoked: %d, on the CRLs until they expire\n", o.Revoked)
	}
	if o.Pending != "" {
		fmt.Fprintf(w, "NOT DONE YET: %s\n", o.Pending)
	}
	if err := printAgents(w, o.Agents, o.OtherReplicas, "deny it"); err != nil {
		return err
	}
	fmt.Fprintln(w, "not enforced by:")
	for _, n := range o.NotEnforcedBy {
		fmt.Fprintf(w, "  %s\n", n)
	}
	return nil
}

func printAgents(w io.Writer, agents []jsonBanAgent, otherReplicas uint32, what string) error {
	n := 0
	var errs []error
	for _, a := range agents {
		if a.Enforces && a.Unread == 0 {
			n++
		}
	}
	_, err := fmt.Fprintf(w, "agents: %d of %d %s\n", n, len(agents), what)
	errs = append(errs, err)
	for _, a := range agents {
		switch {
		case !a.Connected:
			_, err = fmt.Fprintf(w, "  %s is not connected\n", a.Node)
		case !a.Enforces:
			_, err = fmt.Fprintf(w, "  %s has not said so yet\n", a.Node)
		case a.Unread > 0:
			_, err = fmt.Fprintf(w, "  %s cannot read %d of the bans: update it\n", a.Node, a.Unread)
		}
		errs = append(errs, err)
	}
	if otherReplicas > 0 {
		_, err = fmt.Fprintf(w, "  agents of the other replicas, %d, are not among them: signet ca ban list says there whether they do\n", otherReplicas)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (o jsonBans) print(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if len(o.Bans) == 0 {
		fmt.Fprintln(t, "nobody is banned")
	} else {
		fmt.Fprintln(t, "SUBJECT\tSINCE\tUNTIL\tBY\tREASON")
	}
	for _, b := range o.Bans {
		until := "removed"
		if b.Until != nil {
			until = b.Until.Format(time.RFC3339)
		}
		if b.Ended != nil {
			until = fmt.Sprintf("ended %s by %s: %s", b.Ended.At.Format(time.RFC3339), b.Ended.By, b.Ended.Reason)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", b.Subject, b.At.Format(time.RFC3339), until, b.By, b.Reason)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	return printAgents(w, o.Agents, o.OtherReplicas, "enforce them")
}

// printJSON writes one value for people and programs.
func printJSON(w io.Writer, v any) error {
	e := jsonLines(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
