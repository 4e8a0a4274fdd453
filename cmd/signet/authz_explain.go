package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/explain"
	"github.com/signet-mesh/signet/authz/extauthz"
	"github.com/signet-mesh/signet/authz/record"
)

func newAuthzExplainCommand() *cobra.Command {
	var e explaining
	c := &cobra.Command{
		Use:   "explain --policies FILE_OR_DIR (--namespace NS [--labels K=V,...] --check-requests FILE|- | --record FILE|-)",
		Short: "Say why requests are denied, and what would have them allowed",
		Long: `Say why requests are decided as they are, and what would decide them otherwise.

For each request: the verdict in a sentence; the rule that decided, or the rules that
were nearest to allowing it and what is in their way; the smallest changes to the
request, and to the policies, that turn the decision round; and every policy that was
considered, in the order of evaluation, field by field ("+" holds, "-" does not,
"?" is not known). Each suggestion has been tried: it turns the decision round, and
does not when any part of it is left out.

--check-requests has one envoy.service.auth.v3.CheckRequest in JSON on each line, as
for signet authz eval. --record has decision records, as the agent writes them; each
names its workload, and is decided again by the policies given here.

--output json prints an object in each line instead.

` + policiesHelp + `

The exit code is 0 also when requests are denied, and 2 if the input cannot be used.
--keep-going explains in spite of policies that cannot be used.`,
		Args: usage(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			return e.run(c.InOrStdin(), c.OutOrStdout(), c.ErrOrStderr())
		},
	}
	e.mesh.flags(c)
	e.workload.flags(c)
	f := c.Flags()
	f.StringVar(&e.requests, "check-requests", "", "file of CheckRequests, - for standard input")
	f.StringVar(&e.records, "record", "", "file of decision records, - for standard input")
	f.StringVar(&e.output, "output", "text", "text or json")
	f.BoolVar(&e.keepGoing, "keep-going", false, "explain in spite of policies that cannot be used")
	return c
}

// explaining is one run of signet authz explain: its flags.
type explaining struct {
	mesh              meshFlags
	workload          workloadFlags
	requests, records string
	output            string
	keepGoing         bool
}

func (e *explaining) run(stdin io.Reader, stdout, stderr io.Writer) error {
	if err := checkOutput(e.output); err != nil {
		return err
	}
	if err := e.workload.checkSource("explain", "record", e.requests, e.records); err != nil {
		return err
	}
	if err := e.workload.checkPolicies(); err != nil {
		return err
	}
	if e.requests != "" {
		if err := e.workload.checkWorkload(); err != nil {
			return err
		}
	}
	o, err := e.mesh.options()
	if err != nil {
		return err
	}
	set, snapshot, err := compile(e.workload.policies, o, e.keepGoing, stderr)
	if err != nil {
		return err
	}
	out := bufio.NewWriter(stdout)
	n := 0
	write := func(x explain.Explanation) error {
		if n++; n > 1 && e.output != "json" {
			fmt.Fprintln(out)
		}
		return show(&x, e.output, out)
	}
	base := explain.Case{Set: set, Snapshot: snapshot}
	if e.records != "" {
		err = e.eachRecord(stdin, base, write)
	} else {
		err = e.eachRequest(stdin, base, write)
	}
	return errors.Join(err, out.Flush())
}

func (e *explaining) eachRequest(stdin io.Reader, c explain.Case, write func(explain.Explanation) error) error {
	name, in, err := openInput(e.requests, stdin, "requests")
	if err != nil {
		return err
	}
	defer in.Close() // read only
	c.Workload = e.workload.workload()
	return checkRequests(name, in, func(r *authz.Request, bad *extauthz.RequestError) error {
		if bad != nil {
			return write(explain.Refused(bad.Reason, bad.Detail))
		}
		c.Request = *r
		return write(explain.Explain(c))
	})
}

func (e *explaining) eachRecord(stdin io.Reader, c explain.Case, write func(explain.Explanation) error) error {
	name, in, err := openInput(e.records, stdin, "records")
	if err != nil {
		return err
	}
	defer in.Close() // read only
	var bad []error
	for r, err := range record.Read(in) {
		if err != nil {
			bad = append(bad, err)
			continue
		}
		if r.Unread {
			if err := write(explain.Refused(r.Reason, "the request could not be read, or was refused before any policy was asked")); err != nil {
				return err
			}
			continue
		}
		if r.Banned() {
			x := explain.Refused(r.Reason, fmt.Sprintf("the peer is banned, or may be, by the ban of %s; no policy lets it in (signet ca ban list)", r.Policy))
			x.Kind, x.Policy = r.Kind, r.Policy
			if err := write(x); err != nil {
				return err
			}
			continue
		}
		c.Workload, c.Request, c.Providers, c.Changes = r.Workload, r.Request, map[string]bool{}, nil
		for _, a := range r.Answers {
			c.Providers[a.Provider], c.Changes = a.Allowed, append(c.Changes, explain.Change{Provider: a.Provider, Changes: a.Changes})
		}
		x := explain.Explain(c)
		if allowed := x.Decision == "allow"; allowed != r.Allowed {
			then := "denied"
			if r.Allowed {
				then = "allowed"
			}
			x.Because = append(x.Because, fmt.Sprintf("the record says that it was %s then (%s %s, %s): the policies were others, or the record does not show all that they read", then, r.Kind, r.Policy, r.Reason))
		}
		if err := write(x); err != nil {
			return err
		}
	}
	if len(bad) > 0 {
		return unusable("%s: %w", name, errors.Join(bad...))
	}
	return nil
}
