package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/extauthz"
)

func newAuthzEvalCommand() *cobra.Command {
	var e evaluation
	c := &cobra.Command{
		Use:   "eval --policies FILE_OR_DIR --namespace NS [--labels K=V,...] --check-requests FILE|-",
		Short: "Decide requests as the agent of a workload would",
		Long: `Decide requests as the agent of a workload would.

--check-requests has one envoy.service.auth.v3.CheckRequest in JSON on each line;
blank lines are skipped. For each one line of JSON is printed, in the same order:

  {"decision":"allow","kind":"AuthorizationPolicy","policy":"NAMESPACE/NAME","rule":0,"reason":"allow-rule","text":"..."}

decision is "allow", "deny" or "ask"; where it is "ask", "provider" names the
extension provider of a CUSTOM policy that must be asked first. "dryRun" lists what
dry-run policies would have said, where there are any. kind, policy and rule name
what decided; kind and policy are empty and rule is -1 where there is no such thing.
reason is a stable code, text is for people.

` + policiesHelp + `

The exit code is 0 also when requests are denied, and 2 if the input cannot be
used: a policy that cannot be read or that Istio's admission would refuse, a line
that is no CheckRequest, a flag. --keep-going evaluates in spite of such policies,
as the agent would: they deny the workloads that they select.`,
		Args: usage(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			return e.run(c.InOrStdin(), c.OutOrStdout(), c.ErrOrStderr())
		},
	}
	e.mesh.flags(c)
	e.workload.flags(c)
	f := c.Flags()
	f.StringVar(&e.requests, "check-requests", "", "file of CheckRequests, - for standard input (required)")
	f.BoolVar(&e.keepGoing, "keep-going", false, "evaluate in spite of policies that cannot be used")
	return c
}

// evaluation is one run of signet authz eval: its flags.
type evaluation struct {
	mesh      meshFlags
	workload  workloadFlags
	requests  string
	keepGoing bool
}

func (e *evaluation) run(stdin io.Reader, stdout, stderr io.Writer) error {
	if e.requests == "" {
		return unusable("--check-requests must not be empty; see signet authz eval --help")
	}
	program, err := e.workload.program(&e.mesh, e.keepGoing, stderr)
	if err != nil {
		return err
	}
	name, in, err := openInput(e.requests, stdin, "requests")
	if err != nil {
		return err
	}
	defer in.Close() // read only
	out := bufio.NewWriter(stdout)
	err = decide(program, name, in, out)
	// What was decided before a line that cannot be used stands.
	return errors.Join(err, out.Flush())
}

// maxRequestLine bounds a line of requests. Envoy's largest request, with 60 KiB of
// headers and a certificate, is far below it.
const maxRequestLine = 4 << 20

// verdict is a line of output.
type verdict struct {
	Decision string       `json:"decision"`
	Provider string       `json:"provider,omitempty"`
	DryRun   []dryRun     `json:"dryRun,omitempty"`
	Kind     string       `json:"kind"`
	Policy   string       `json:"policy"`
	Rule     int          `json:"rule"`
	Reason   authz.Reason `json:"reason"`
	Text     string       `json:"text"`
}

// dryRun is what the dry-run policies of one action would have said: "allow" or
// "deny", and the rule that says so, if one does.
type dryRun struct {
	Action   string `json:"action"`
	Decision string `json:"decision"`
	Policy   string `json:"policy"`
	Rule     int    `json:"rule"`
}

// verdicts makes lines of output. It remembers texts, which are about what decided
// and not about the request.
type verdicts map[verdictKey]string

type verdictKey struct {
	verdict, provider, kind, policy string
	rule                            int
	reason                          authz.Reason
}

// of is a decision as a line of output.
func (vs verdicts) of(d authz.Decision) verdict {
	v := verdict{
		Decision: d.Verdict(), Provider: d.Provider,
		Kind: d.Kind, Policy: d.Policy, Rule: d.Rule, Reason: d.Reason,
	}
	key := verdictKey{v.Decision, v.Provider, v.Kind, v.Policy, v.Rule, v.Reason}
	text, ok := vs[key]
	if !ok {
		text = d.Text()
		vs[key] = text
	}
	v.Text = text
	for _, r := range d.DryRuns() {
		decision := "deny"
		if r.Allowed {
			decision = "allow"
		}
		v.DryRun = append(v.DryRun, dryRun{r.Action.String(), decision, r.Policy, r.Rule})
	}
	return v
}

// decide answers every request that a reader has.
func decide(program *authz.Program, name string, in io.Reader, out io.Writer) error {
	enc := jsonLines(out)
	texts := make(verdicts)
	return checkRequests(name, in, func(request *authz.Request, bad *extauthz.RequestError) error {
		v := verdict{Decision: "deny", Rule: -1}
		if bad != nil {
			// The service answers such a request too.
			v.Reason, v.Text = bad.Reason, "denied: "+bad.Detail
		} else {
			v = texts.of(program.Decide(request))
		}
		if err := enc.Encode(v); err != nil {
			return fmt.Errorf("writing decisions: %w", err)
		}
		return nil
	})
}

// checkRequests reads CheckRequests, one in a line, and has each handled, or what is
// wrong with it where the service would refuse it. The request is overwritten by the
// next one.
func checkRequests(name string, in io.Reader, handle func(*authz.Request, *extauthz.RequestError) error) error {
	lines := bufio.NewScanner(in)
	lines.Buffer(make([]byte, 0, 64<<10), maxRequestLine)
	var request authz.Request // FromCheckRequest overwrites all of it
	n := 0
	for lines.Scan() {
		n++
		line := bytes.TrimSpace(lines.Bytes())
		if len(line) == 0 {
			continue
		}
		var check authv3.CheckRequest
		if err := protojson.Unmarshal(line, &check); err != nil {
			return unusable("%s:%d: line is no CheckRequest: %w", name, n, err)
		}
		var bad *extauthz.RequestError
		if err := extauthz.FromCheckRequest(&check, &request); err != nil && !errors.As(err, &bad) {
			return unusable("%s:%d: %w", name, n, err)
		}
		if err := handle(&request, bad); err != nil {
			return err
		}
	}
	if err := lines.Err(); err != nil {
		return unusable("%s:%d: reading requests: %w", name, n+1, err)
	}
	return nil
}

// openInput opens a file, or is standard input for "-". what is for messages.
func openInput(path string, stdin io.Reader, what string) (name string, in io.ReadCloser, err error) {
	if path == "-" {
		return "standard input", io.NopCloser(stdin), nil
	}
	f, err := os.Open(path)
	if err != nil {
		return "", nil, unusable("opening the %s: %w", what, err)
	}
	return path, f, nil
}
