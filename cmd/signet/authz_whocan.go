package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/signet-mesh/signet/authz/explain"
)

func newAuthzWhoCanCommand() *cobra.Command {
	var m meshFlags
	var w workloadFlags
	var method, path, output string
	var port uint16
	c := &cobra.Command{
		Use:   "who-can --policies FILE_OR_DIR --namespace NS [--labels K=V,...] [--method M] [--path P] [--port N]",
		Short: "Say who may call a workload",
		Long: `Say who may call a workload: which callers, networks and conditions ALLOW rules
name, what DENY rules take off, where a certificate is demanded, which tokens are
taken, and where a provider is asked. With --method, --path or --port the answer is
about such requests: what they fix is worked into the rules. A path is without its
query. Rules stand with the aliases of trust domains written out.

The answer is exact: a request is allowed if a row under "allowed" matches it, and no
row under "except" does, or may.

--output json prints the answer as an object: "allows", "denies" and "asks" have rules
of an AuthorizationPolicy under "match"; "open" says that no ALLOW policy selects the
workload, so that all is allowed that is not denied; "http" marks a rule that a bare
connection is allowed by never, and denied by as if its HTTP attributes were not there.

` + policiesHelp + `

The exit code is 2 if the input cannot be used.`,
		Args: usage(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			var given explain.Given
			flags := c.Flags()
			if flags.Changed("method") {
				if method == "" {
					return unusable("--method must not be empty")
				}
				given.Method = &method
			}
			if flags.Changed("path") {
				if path == "" || strings.ContainsAny(path, "?#") {
					return unusable("--path: %q is no path without a query", path)
				}
				given.Path = &path
			}
			if flags.Changed("port") {
				if port == 0 {
					return unusable("--port must be from 1 to 65535")
				}
				given.Port = &port
			}
			return whoCan(&m, &w, given, output, c.OutOrStdout(), c.ErrOrStderr())
		},
	}
	m.flags(c)
	w.flags(c)
	f := c.Flags()
	f.StringVar(&method, "method", "", "method of the requests that are asked about")
	f.StringVar(&path, "path", "", "path of the requests that are asked about, without a query")
	f.Uint16Var(&port, "port", 0, "port of the container that they come in on")
	f.StringVar(&output, "output", "text", "text or json")
	return c
}

func whoCan(m *meshFlags, w *workloadFlags, given explain.Given, output string, stdout, stderr io.Writer) error {
	if err := w.check(); err != nil {
		return err
	}
	o, err := m.options()
	if err != nil {
		return err
	}
	_, snapshot, err := compile(w.policies, o, false, stderr)
	if err != nil {
		return err
	}
	answer := explain.WhoCan(snapshot, w.workload(), given)
	if err := show(&answer, output, stdout); err != nil {
		return fmt.Errorf("writing the answer: %w", err)
	}
	return nil
}
