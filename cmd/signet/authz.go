package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/authz/extauthz"
	"github.com/signet-mesh/signet/identity"
)

// exitUnusable is the exit code for input that cannot be used.
const exitUnusable = 2

// exitError is an error that main answers with an exit code of its own.
type exitError struct {
	code int
	err  error
}

func (e exitError) Error() string { return e.err.Error() }
func (e exitError) Unwrap() error { return e.err }

// ExitCode is the code that the process ends with.
func (e exitError) ExitCode() int { return e.code }

func unusable(format string, args ...any) error {
	return exitError{exitUnusable, fmt.Errorf(format, args...)}
}

func newAuthzCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "authz",
		Short: "Explain what policies decide",
		Args:  cobra.NoArgs,
	}
	c.AddCommand(newAuthzEvalCommand())
	return c
}

func newAuthzEvalCommand() *cobra.Command {
	var e evaluation
	c := &cobra.Command{
		Use:   "eval --policies FILE_OR_DIR --namespace NS [--labels K=V,...] --check-requests FILE|-",
		Short: "Decide requests as the agent of a workload would",
		Long: `Decide requests as the agent of a workload would.

--check-requests has one envoy.service.auth.v3.CheckRequest in JSON on each line;
blank lines are skipped. For each one line of JSON is printed, in the same order:

  {"decision":"allow","kind":"AuthorizationPolicy","policy":"NAMESPACE/NAME","rule":0,"reason":"allow-rule","text":"..."}

decision is "allow" or "deny". kind, policy and rule name what decided; kind and
policy are empty and rule is -1 where there is no such thing. reason is a stable
code, text is for people.

--policies is a file, or a directory of which the files NAME.yaml and NAME.yml are
read, but not those that begin with a dot. Policies for other workloads and
documents of other kinds are passed over.

The exit code is 0 also when requests are denied, and 2 if the input cannot be
used: a policy that cannot be read or that Istio's admission would refuse, a line
that is no CheckRequest, a flag. --keep-going evaluates in spite of such policies,
as the agent would: they deny the workloads that they select. A policy that is
valid in Istio and not enforced here yet is always evaluated so.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return e.run(c.InOrStdin(), c.OutOrStdout(), c.ErrOrStderr())
		},
	}
	c.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return exitError{exitUnusable, err} })
	f := c.Flags()
	f.StringVar(&e.policies, "policies", "", "file or directory of policies (required)")
	f.StringVar(&e.namespace, "namespace", "", "namespace of the workload (required)")
	f.StringToStringVar(&e.labels, "labels", nil, "labels of the workload, as K=V,K2=V2")
	f.StringVar(&e.trustDomain, "trust-domain", "cluster.local", "trust domain of the mesh")
	f.StringSliceVar(&e.aliases, "trust-domain-alias", nil, "further names of the trust domain, separated by commas; can be repeated")
	f.StringVar(&e.rootNamespace, "root-namespace", "istio-system", "namespace of mesh-wide policies")
	f.StringVar(&e.requests, "check-requests", "", "file of CheckRequests, - for standard input (required)")
	f.BoolVar(&e.keepGoing, "keep-going", false, "evaluate in spite of policies that cannot be used")
	return c
}

// evaluation is one run of signet authz eval: its flags.
type evaluation struct {
	policies, requests         string
	namespace                  string
	labels                     map[string]string
	trustDomain, rootNamespace string
	aliases                    []string
	keepGoing                  bool
}

func (e *evaluation) run(stdin io.Reader, stdout, stderr io.Writer) error {
	for _, f := range []struct{ name, value string }{
		{"--policies", e.policies}, {"--namespace", e.namespace}, {"--check-requests", e.requests}, {"--root-namespace", e.rootNamespace},
	} {
		if f.value == "" {
			return unusable("%s must not be empty; see signet authz eval --help", f.name)
		}
	}
	if _, ok := e.labels[""]; ok {
		return unusable("--labels: a label has no name")
	}
	td, err := identity.ParseTrustDomain(e.trustDomain)
	if err != nil {
		return unusable("--trust-domain: %w", err)
	}
	for _, a := range e.aliases {
		if a == "" || strings.Contains(a, "/") {
			return unusable("--trust-domain-alias: %q is not the name of a trust domain", a)
		}
	}
	snapshot, err := e.compile(authz.Options{TrustDomain: td, TrustDomainAliases: e.aliases, RootNamespace: e.rootNamespace}, stderr)
	if err != nil {
		return err
	}
	name, in := "standard input", stdin
	if e.requests != "-" {
		f, err := os.Open(e.requests)
		if err != nil {
			return unusable("opening the requests: %w", err)
		}
		defer f.Close() // read only
		name, in = e.requests, f
	}
	out := bufio.NewWriter(stdout)
	err = decide(snapshot.For(identity.Workload{Namespace: e.namespace, Labels: e.labels}), name, in, out)
	// What was decided before a line that cannot be used stands.
	return errors.Join(err, out.Flush())
}

// compile reads the policies. It writes what is wrong with them to stderr and
// fails if they cannot be used.
func (e *evaluation) compile(o authz.Options, stderr io.Writer) (*authz.Snapshot, error) {
	files, err := policyFiles(e.policies)
	if err != nil {
		return nil, err
	}
	var resources []authz.Resource
	var problems []authz.Problem
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			r, p := authz.Unreadable(name, err)
			resources, problems = append(resources, r), append(problems, p)
			continue
		}
		rs, ps := authz.Parse(name, data)
		resources, problems = append(resources, rs...), append(problems, ps...)
	}
	set, ps := authz.Set{}.Update(resources)
	problems = append(problems, ps...)
	snapshot, ps := authz.Compile(set, o)
	problems = append(problems, ps...)

	var refused []error
	for _, p := range problems {
		if p.Severity == authz.SeverityError && p.Reason != authz.ReasonUnsupported && !e.keepGoing {
			refused = append(refused, p)
			continue
		}
		fmt.Fprintf(stderr, "%s: %s\n", p.Severity, p)
	}
	if len(refused) > 0 {
		return nil, unusable("the policies cannot be used (--keep-going evaluates as the agent would):\n%w", errors.Join(refused...))
	}
	return snapshot, nil
}

// policyFiles are the files to read: the agent reads the same ones of a
// directory.
func policyFiles(path string) ([]string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, unusable("reading the policies: %w", err)
	}
	if !info.IsDir() {
		return []string{path}, nil
	}
	entries, err := os.ReadDir(path) // sorted by name
	if err != nil {
		return nil, unusable("reading the policies: %w", err)
	}
	var files []string
	for _, e := range entries {
		ext := filepath.Ext(e.Name())
		if e.IsDir() || strings.HasPrefix(e.Name(), ".") || ext != ".yaml" && ext != ".yml" {
			continue
		}
		files = append(files, filepath.Join(path, e.Name()))
	}
	return files, nil
}

// maxRequestLine bounds a line of requests. Envoy's largest request, with 60 KiB of
// headers and a certificate, is far below it.
const maxRequestLine = 4 << 20

// verdict is a line of output.
type verdict struct {
	Decision string       `json:"decision"`
	Kind     string       `json:"kind"`
	Policy   string       `json:"policy"`
	Rule     int          `json:"rule"`
	Reason   authz.Reason `json:"reason"`
	Text     string       `json:"text"`
}

// decide answers every request that a reader has.
func decide(program *authz.Program, name string, in io.Reader, out io.Writer) error {
	lines := bufio.NewScanner(in)
	lines.Buffer(make([]byte, 0, 64<<10), maxRequestLine)
	enc := json.NewEncoder(out)
	enc.SetEscapeHTML(false)
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
		var request authz.Request
		v := verdict{Decision: "deny", Rule: -1}
		var bad *extauthz.RequestError
		switch err := extauthz.FromCheckRequest(&check, &request); {
		case errors.As(err, &bad):
			// The service answers such a request too.
			v.Reason, v.Text = bad.Reason, "denied: "+bad.Detail
		case err != nil:
			return unusable("%s:%d: %w", name, n, err)
		default:
			d := program.Decide(&request)
			if d.Allowed {
				v.Decision = "allow"
			}
			v.Kind, v.Policy, v.Rule, v.Reason, v.Text = d.Kind, d.Policy, d.Rule, d.Reason, d.Text()
		}
		if err := enc.Encode(v); err != nil {
			return fmt.Errorf("writing decisions: %w", err)
		}
	}
	if err := lines.Err(); err != nil {
		return unusable("%s:%d: reading requests: %w", name, n+1, err)
	}
	return nil
}
