package main

import (
	"bufio"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/signet-mesh/signet/authz"
)

func newAuthzLintCommand() *cobra.Command {
	var m meshFlags
	var output string
	c := &cobra.Command{
		Use:   "lint FILE_OR_DIR...",
		Short: "Say what is wrong with policies, and what will surprise",
		Long: `Say what is wrong with policies, and what will surprise. A finding is a line:

  FILE:LINE: SEVERITY: KIND NAMESPACE/NAME: FIELD: WHAT; HOW TO MEND IT [CODE]

An error is what Istio's admission (its definitions, unknown fields included, and its
webhook) refuses, or what cannot be read; nothing else is one. A danger is accepted,
and crashes Envoy or is refused by it. A warning is enforced as written and likely
not meant so: it never matches, matches more than it seems to, or can be got round.
CODE names the kind of warning.

--output json prints an object in each line instead:

  {"file":"...","line":1,"severity":"warning","code":"...","resource":"...","field":"...","message":"...","fix":"..."}

Of a directory the files NAME.yaml and NAME.yml are read, but not those that begin
with a dot. Some warnings are about several resources together, so give all of a mesh
at once.

The exit code is 1 if there are errors, else 0, and 2 if files cannot be found or
flags are wrong.`,
		Args: usage(cobra.MinimumNArgs(1)),
		RunE: func(c *cobra.Command, args []string) error {
			if output != "text" && output != "json" {
				return unusable("--output: %q is neither text nor json", output)
			}
			o, err := m.options()
			if err != nil {
				return err
			}
			texts, problems, err := policyTexts(args)
			if err != nil {
				return err
			}
			return report(append(problems, authz.Lint(texts, o)...), output == "json", c.OutOrStdout())
		},
	}
	m.flags(c)
	c.Flags().StringVar(&output, "output", "text", "text or json")
	return c
}

// policyTexts reads files and directories, each file once. What cannot be read is a
// problem; what is not there is an error.
func policyTexts(paths []string) (texts []authz.Text, problems []authz.Problem, err error) {
	seen := make(map[string]bool)
	for _, path := range paths {
		files, err := policyFiles(path)
		if err != nil {
			return nil, nil, err
		}
		for _, name := range files {
			if seen[name] {
				continue
			}
			seen[name] = true
			data, err := os.ReadFile(name)
			if err != nil {
				_, p := authz.Unreadable(name, err)
				problems = append(problems, p)
				continue
			}
			texts = append(texts, authz.Text{Origin: name, Data: data})
		}
	}
	return texts, problems, nil
}

// finding is a line of output in JSON.
type finding struct {
	File     string `json:"file"`
	Line     int    `json:"line"`
	Severity string `json:"severity"`
	Code     string `json:"code,omitempty"`
	Resource string `json:"resource"`
	Field    string `json:"field"`
	Message  string `json:"message"`
	Fix      string `json:"fix"`
}

func report(problems []authz.Problem, asJSON bool, stdout io.Writer) error {
	out := bufio.NewWriter(stdout)
	enc := jsonLines(out)
	refused := 0
	for _, p := range problems {
		if p.Severity == authz.SeverityError {
			refused++
		}
		if asJSON {
			if err := enc.Encode(finding{p.Origin, p.Line, p.Severity.String(), p.Code, p.Resource, p.Field, p.Message, p.Fix}); err != nil {
				return fmt.Errorf("writing findings: %w", err)
			}
			continue
		}
		where := p.Origin
		if p.Line > 0 {
			where = fmt.Sprintf("%s:%d", where, p.Line)
		}
		p.Origin = ""
		code := p.Code
		if code != "" {
			code = " [" + code + "]"
		}
		fmt.Fprintf(out, "%s: %s: %s%s\n", where, p.Severity, p, code)
	}
	if err := out.Flush(); err != nil {
		return fmt.Errorf("writing findings: %w", err)
	}
	if refused > 0 {
		return fmt.Errorf("errors in policies: %d", refused)
	}
	return nil
}
