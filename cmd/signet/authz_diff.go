package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/explain"
	"github.com/signet-mesh/signet/authz/extauthz"
	"github.com/signet-mesh/signet/authz/record"
)

// exitChanged is the exit code of signet authz diff where decisions change.
const exitChanged = 1

func newAuthzDiffCommand() *cobra.Command {
	var d diffing
	c := &cobra.Command{
		Use:   "diff OLD NEW (--namespace NS [--labels K=V,...] --check-requests FILE|- | --records FILE|-)",
		Short: "Say which decisions a change of policies changes",
		Long: `Say which decisions a change of policies changes. OLD and NEW are each a file or a
directory of policies. Each request is decided by both; those that are decided
otherwise are printed, what opens first, by the policies that decide before and after,
and by caller.

--check-requests has one envoy.service.auth.v3.CheckRequest in JSON on each line, all
of the workload of --namespace and --labels. --records has decision records, as the
agent writes them; each names its workload, and providers answer as they have answered.
What a record does not show is unknown to both. A request that was refused before any
policy was asked is decided by none, and left out.

--output json prints an object instead.

The exit code is 0 if nothing changes, 1 if decisions change, and 2 if the input cannot
be used; then what was printed is not all. --keep-going compares in spite of policies
that cannot be used, as the agent would enforce them without a last good version.`,
		Args: usage(cobra.ExactArgs(2)),
		RunE: func(c *cobra.Command, args []string) error {
			return d.run(args[0], args[1], c.InOrStdin(), c.OutOrStdout(), c.ErrOrStderr())
		},
	}
	d.mesh.flags(c)
	f := c.Flags()
	f.StringVar(&d.workload.namespace, "namespace", "", "namespace of the workload, with --check-requests")
	f.StringToStringVar(&d.workload.labels, "labels", nil, "labels of the workload, as K=V,K2=V2")
	f.StringVar(&d.requests, "check-requests", "", "file of CheckRequests, - for standard input")
	f.StringVar(&d.records, "records", "", "file of decision records, - for standard input")
	f.StringVar(&d.output, "output", "text", "text or json")
	f.BoolVar(&d.keepGoing, "keep-going", false, "compare in spite of policies that cannot be used")
	return c
}

// diffing is one run of signet authz diff: its flags.
type diffing struct {
	mesh              meshFlags
	workload          workloadFlags
	requests, records string
	output            string
	keepGoing         bool
}

func (d *diffing) run(before, after string, stdin io.Reader, stdout, stderr io.Writer) error {
	if err := checkOutput(d.output); err != nil {
		return err
	}
	if err := d.workload.checkSource("diff", "records", d.requests, d.records); err != nil {
		return err
	}
	if d.requests != "" {
		if err := d.workload.checkWorkload(); err != nil {
			return err
		}
	}
	o, err := d.mesh.options()
	if err != nil {
		return err
	}
	_, was, err := compile(before, o, d.keepGoing, stderr)
	if err != nil {
		return err
	}
	_, is, err := compile(after, o, d.keepGoing, stderr)
	if err != nil {
		return err
	}
	diff := &explain.Diff{Groups: []*explain.Group{}}
	if d.records != "" {
		err = d.eachRecord(stdin, was, is, diff)
	} else {
		err = d.eachRequest(stdin, was, is, diff)
	}
	diff.Sort()
	if failed := show(diff, d.output, stdout); failed != nil {
		return errors.Join(fmt.Errorf("writing changes: %w", failed), err)
	}
	return err
}

func (d *diffing) eachRequest(stdin io.Reader, was, is *authz.Snapshot, diff *explain.Diff) error {
	name, in, err := openInput(d.requests, stdin, "requests")
	if err != nil {
		return err
	}
	defer in.Close() // read only
	w := d.workload.workload()
	before, after := was.For(w), is.For(w)
	err = checkRequests(name, in, func(r *authz.Request, bad *extauthz.RequestError) error {
		if bad == nil {
			diff.Add(w, r, before.Decide(r), after.Decide(r))
		}
		return nil
	})
	return changed(diff, err)
}

func (d *diffing) eachRecord(stdin io.Reader, was, is *authz.Snapshot, diff *explain.Diff) error {
	name, in, err := openInput(d.records, stdin, "records")
	if err != nil {
		return err
	}
	defer in.Close() // read only
	var bad []error
	for r, err := range record.Read(in) {
		if err != nil {
			if len(bad) < 10 {
				bad = append(bad, err)
			}
			continue
		}
		before, ok := record.Replay(was.For(r.Workload), &r)
		if !ok {
			continue
		}
		after, _ := record.Replay(is.For(r.Workload), &r)
		diff.Add(r.Workload, &r.Request, before, after)
	}
	if len(bad) > 0 {
		return unusable("%s: %w", name, errors.Join(bad...))
	}
	return changed(diff, nil)
}

// changed is the error of a diff that has been read.
func changed(diff *explain.Diff, err error) error {
	if err == nil && diff.Changed > 0 {
		return exitError{exitChanged, fmt.Errorf("decisions change: %d", diff.Changed)}
	}
	return err
}
