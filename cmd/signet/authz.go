package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/signet-mesh/signet/authz"
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
		Short: "Check policies and explain what they decide",
		Args:  usage(cobra.NoArgs),
	}
	c.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return exitError{exitUnusable, err} })
	c.AddCommand(
		newAuthzDiffCommand(), newAuthzEvalCommand(), newAuthzExplainCommand(), newAuthzLintCommand(),
		newAuthzPeerModeCommand(), newAuthzWhoCanCommand(),
	)
	return c
}

// usage makes a wrong number of arguments unusable input.
func usage(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if err := check(c, args); err != nil {
			return unusable("%w; see %s --help", err, c.CommandPath())
		}
		return nil
	}
}

// meshFlags are what concerns the whole mesh.
type meshFlags struct {
	trustDomain, rootNamespace string
	envoyVersion               string
	aliases                    []string
}

func (m *meshFlags) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&m.trustDomain, "trust-domain", "cluster.local", "trust domain of the mesh")
	f.StringSliceVar(&m.aliases, "trust-domain-alias", nil, "further names of the trust domain, separated by commas; can be repeated")
	f.StringVar(&m.rootNamespace, "root-namespace", "istio-system", "namespace of mesh-wide policies")
	f.StringVar(&m.envoyVersion, "envoy-version", "", "version of Envoy whose reading of requests is followed where versions differ; empty: the newest known")
}

func (m *meshFlags) options() (o authz.Options, err error) {
	td, err := identity.ParseTrustDomain(m.trustDomain)
	if err != nil {
		return o, unusable("--trust-domain: %w", err)
	}
	for _, a := range m.aliases {
		if a == "" || strings.Contains(a, "/") {
			return o, unusable("--trust-domain-alias: %q is not the name of a trust domain", a)
		}
	}
	if m.rootNamespace == "" {
		return o, unusable("--root-namespace must not be empty")
	}
	o = authz.Options{TrustDomain: td, TrustDomainAliases: m.aliases, RootNamespace: m.rootNamespace}
	if m.envoyVersion != "" {
		if o.Envoy, err = authz.ParseEnvoyVersion(m.envoyVersion); err != nil {
			return authz.Options{}, unusable("--envoy-version: %w", err)
		}
	}
	return o, nil
}

// workloadFlags are the policies, and the workload that they are asked about.
type workloadFlags struct {
	policies, namespace string
	labels              map[string]string
}

// policiesHelp says what --policies takes.
const policiesHelp = `--policies is a file, or a directory of which the files NAME.yaml and NAME.yml are
read, but not those that begin with a dot. Policies for other workloads and
documents of other kinds are passed over.`

func (w *workloadFlags) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&w.policies, "policies", "", "file or directory of policies (required)")
	f.StringVar(&w.namespace, "namespace", "", "namespace of the workload (required)")
	f.StringToStringVar(&w.labels, "labels", nil, "labels of the workload, as K=V,K2=V2")
}

// program compiles the policies for the workload. It writes what is wrong with
// them to stderr, and fails if they cannot be used and keepGoing does not say
// otherwise.
func (w *workloadFlags) program(m *meshFlags, keepGoing bool, stderr io.Writer) (*authz.Program, error) {
	if err := w.check(); err != nil {
		return nil, err
	}
	o, err := m.options()
	if err != nil {
		return nil, err
	}
	_, snapshot, err := compile(w.policies, o, keepGoing, stderr)
	if err != nil {
		return nil, err
	}
	return snapshot.For(w.workload()), nil
}

func (w *workloadFlags) check() error {
	if err := w.checkPolicies(); err != nil {
		return err
	}
	return w.checkWorkload()
}

func (w *workloadFlags) checkPolicies() error {
	if w.policies == "" {
		return unusable("--policies must not be empty; see --help")
	}
	return nil
}

func (w *workloadFlags) checkWorkload() error {
	if w.namespace == "" {
		return unusable("--namespace must not be empty; see --help")
	}
	if _, ok := w.labels[""]; ok {
		return unusable("--labels: a label has no name")
	}
	return nil
}

// checkSource refuses what the flags cannot be that say where requests come from:
// --check-requests, which are all of the workload, or records, by the flag of that
// name, each of which names its own.
func (w *workloadFlags) checkSource(command, flag, requests, records string) error {
	if (requests == "") == (records == "") {
		return unusable("give --check-requests or --%s, and not both; see signet authz %s --help", flag, command)
	}
	if records != "" && (w.namespace != "" || len(w.labels) > 0) {
		return unusable("--%s names the workload of each request: leave --namespace and --labels out", flag)
	}
	return nil
}

// workload is the workload that the policies are asked about.
func (w *workloadFlags) workload() identity.Workload {
	return identity.Workload{Namespace: w.namespace, Labels: w.labels}
}

// compile reads and compiles policies. It writes what is wrong with them to stderr,
// and fails if they cannot be used and keepGoing does not say otherwise.
func compile(path string, o authz.Options, keepGoing bool, stderr io.Writer) (set authz.Set, snapshot *authz.Snapshot, err error) {
	files, err := policyFiles(path)
	if err != nil {
		return set, nil, err
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
	snapshot, ps = authz.Compile(set, o)
	problems = append(problems, ps...)

	var refused []error
	for _, p := range problems {
		if p.Severity == authz.SeverityError && !keepGoing {
			refused = append(refused, p)
			continue
		}
		fmt.Fprintf(stderr, "%s: %s\n", p.Severity, p)
	}
	if len(refused) > 0 {
		return set, nil, unusable("the policies cannot be used:\n%w", errors.Join(refused...))
	}
	return set, snapshot, nil
}

// jsonLines writes values as JSON, one in a line.
func jsonLines(w io.Writer) *json.Encoder {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return enc
}

// checkOutput refuses what --output cannot be.
func checkOutput(output string) error {
	if output != "text" && output != "json" {
		return unusable("--output: %q is neither text nor json", output)
	}
	return nil
}

// show writes an answer as --output says.
func show(answer interface{ Write(io.Writer) error }, output string, w io.Writer) error {
	if output == "json" {
		return jsonLines(w).Encode(answer)
	}
	return answer.Write(w)
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
