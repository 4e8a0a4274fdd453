package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

const (
	defaultSocket      = "/run/signet/agent.sock"
	defaultTokenFile   = "/var/run/secrets/tokens/signet-token"
	defaultTokenSecret = "/etc/envoy/signet-token.yaml"
)

func newEnvoyCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "envoy",
		Short: "Configurations for Envoy",
		Args:  cobra.NoArgs,
	}
	c.AddCommand(newBootstrapCommand(), newTokenSecretCommand())
	return c
}

// bootstrapFlags are the flags of `signet envoy bootstrap` as they were given.
type bootstrapFlags struct {
	output                         string
	socket, tokenFile, tokenSecret string
	trustDomain                    string
	aliases                        []string
	nodeID, cluster                string
	labels                         []string
	inbound, app, appProtocol      string
	noInbound                      bool
	outbounds                      []string
	retries                        uint32
	admin, tlsMinimum              string
	accessLog                      bool
}

func newBootstrapCommand() *cobra.Command {
	var f bootstrapFlags
	c := &cobra.Command{
		Use:   "bootstrap",
		Short: "Print a complete Envoy configuration for a sidecar",
		Long: `Print a complete, commented Envoy configuration for a sidecar without Istio.

Inbound, mutual TLS and plaintext are taken on one port; every request is decided
by signet-agent. Outbound, each --outbound is a plaintext listener that speaks
mutual TLS to one upstream, which must have one of the given SPIFFE IDs.

Envoy needs a second file, which names the file of the pod's token. Without
--output the bootstrap goes to standard output and refers to --token-secret; print
that file with "signet envoy token-secret". With --output FILE.yaml both are
written, FILE.yaml and FILE.token.yaml.`,
		Example: `  # A server: takes port 8443 for the application on port 8080
  signet envoy bootstrap --inbound 0.0.0.0:8443 --app 127.0.0.1:8080 -o /etc/envoy/envoy.yaml

  # A client only: http://127.0.0.1:9000 is the server, with mutual TLS
  signet envoy bootstrap --no-inbound -o /etc/envoy/envoy.yaml \
    --outbound server=127.0.0.1:9000,server.default.svc:8443,spiffe://cluster.local/ns/default/sa/server`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if f.noInbound {
				for _, name := range []string{"inbound", "app", "app-protocol"} {
					if c.Flags().Changed(name) {
						return fmt.Errorf("--no-inbound and --%s contradict each other", name)
					}
				}
			}
			return f.run(c.OutOrStdout())
		},
	}
	fl := c.Flags()
	fl.SortFlags = false
	fl.StringVarP(&f.output, "output", "o", "", "write to this file, and the secret of the token beside it, instead of to standard output")
	fl.StringVar(&f.inbound, "inbound", "0.0.0.0:15006", "`IP:PORT` where requests from other workloads arrive; policies' ports mean this port")
	fl.StringVar(&f.app, "app", "127.0.0.1:8080", "`HOST:PORT` of the application")
	fl.StringVar(&f.appProtocol, "app-protocol", "http1", "what the application speaks: http1 or http2 (gRPC)")
	fl.BoolVar(&f.noInbound, "no-inbound", false, "take no requests, only make them")
	fl.StringArrayVar(&f.outbounds, "outbound", nil, "an upstream, `"+outboundForm+"`: connections to LISTEN (on loopback) go to UPSTREAM if it has one of the SPIFFE IDs; may be repeated")
	fl.Uint32Var(&f.retries, "outbound-retries", 2, "how often a request that the upstream cannot have begun is sent again; 0: never")
	fl.StringVar(&f.trustDomain, "trust-domain", "cluster.local", "trust domain; only its workloads are taken as peers")
	fl.StringArrayVar(&f.aliases, "trust-domain-alias", nil, "another trust domain whose workloads are taken as peers; may be repeated")
	fl.StringVar(&f.socket, "socket", defaultSocket, "signet-agent's socket")
	fl.StringVar(&f.tokenFile, "token-file", defaultTokenFile, "the pod's service-account token, audience signet; goes into the second file")
	fl.StringVar(&f.tokenSecret, "token-secret", "", "the second file (default "+defaultTokenSecret+", or beside --output)")
	fl.StringVar(&f.tlsMinimum, "tls-minimum", "1.2", "lowest version of TLS: 1.2 or 1.3")
	fl.StringVar(&f.nodeID, "node-id", "sidecar", "name of this proxy in logs; proves nothing")
	fl.StringVar(&f.cluster, "cluster", "signet", "name of this proxy's group in logs; proves nothing")
	fl.StringArrayVar(&f.labels, "label", nil, "a label of the pod, `KEY=VALUE`, sent along so that the agent can count differences; may be repeated")
	fl.StringVar(&f.admin, "admin", "127.0.0.1:15000", "`IP:PORT` of Envoy's admin interface, on loopback; empty: none")
	fl.BoolVar(&f.accessLog, "access-log", false, "log each request to standard output as JSON, with the policy that decided")
	return c
}

func newTokenSecretCommand() *cobra.Command {
	var file string
	c := &cobra.Command{
		Use:   "token-secret",
		Short: "Print the second file that the bootstrap refers to",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			path, err := parsePath(file)
			if err != nil {
				return fmt.Errorf("--token-file: %w", err)
			}
			return renderTokenSecret(c.OutOrStdout(), path)
		},
	}
	c.Flags().StringVar(&file, "token-file", defaultTokenFile, "the pod's service-account token, audience signet")
	return c
}

func (f *bootstrapFlags) run(stdout io.Writer) error {
	s, tokenFile, err := f.sidecar()
	if err != nil {
		return err
	}
	if f.output == "" {
		return s.render(stdout)
	}
	var bootstrap, secret bytes.Buffer
	if err := errors.Join(s.render(&bootstrap), renderTokenSecret(&secret, tokenFile)); err != nil {
		return err
	}
	// The bootstrap last: who waits for it finds both.
	if err := replaceFile(s.TokenSecret, secret.Bytes()); err != nil {
		return err
	}
	return replaceFile(f.output, bootstrap.Bytes())
}

// sidecar checks all flags. It returns every mistake, not only the first.
func (f *bootstrapFlags) sidecar() (*sidecar, string, error) {
	var errs []error
	flag := func(name string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("--%s: %w", name, err))
		}
	}
	s := &sidecar{NodeID: f.nodeID, Cluster: f.cluster, AccessLog: f.accessLog, Retries: f.retries}
	flag("node-id", checkName(f.nodeID))
	flag("cluster", checkName(f.cluster))

	var err error
	s.Socket, err = parsePath(f.socket)
	flag("socket", err)
	tokenFile, err := parsePath(f.tokenFile)
	flag("token-file", err)
	s.TokenSecret, err = f.tokenSecretPath()
	flag("token-secret", err)
	s.PeerPrefixes, err = peerPrefixes(f.trustDomain, f.aliases)
	flag("trust-domain", err)

	switch f.tlsMinimum {
	case "1.2":
		s.TLSMinimum = "TLSv1_2"
	case "1.3":
		s.TLSMinimum = "TLSv1_3"
	default:
		flag("tls-minimum", fmt.Errorf("%q is not 1.2 or 1.3", f.tlsMinimum))
	}
	if f.admin != "" {
		admin, err := parseLoopback(f.admin)
		flag("admin", err)
		s.Admin = &admin
	}
	if f.retries > 100 {
		flag("outbound-retries", fmt.Errorf("%d: at most 100", f.retries))
	}
	for _, l := range f.labels {
		parsed, err := parseLabel(l)
		flag("label", err)
		if slices.ContainsFunc(s.Labels, func(o label) bool { return o.Key == parsed.Key }) && err == nil {
			flag("label", fmt.Errorf("%q is given twice", parsed.Key))
		}
		s.Labels = append(s.Labels, parsed)
	}
	if !f.noInbound {
		s.Inbound, err = f.parseInbound()
		if err != nil {
			errs = append(errs, err)
		}
	}
	for _, o := range f.outbounds {
		parsed, err := parseOutbound(o)
		flag("outbound", err)
		if slices.ContainsFunc(s.Outbounds, func(o outbound) bool { return o.Name == parsed.Name }) && err == nil {
			flag("outbound", fmt.Errorf("the name %q is given twice", parsed.Name))
		}
		s.Outbounds = append(s.Outbounds, parsed)
	}
	if f.noInbound && len(f.outbounds) == 0 {
		errs = append(errs, errors.New("nothing to do: --no-inbound and no --outbound"))
	}
	return s, tokenFile, errors.Join(errs...)
}

func (f *bootstrapFlags) parseInbound() (*inbound, error) {
	var in inbound
	var errs [3]error
	in.Listen, errs[0] = parseListen(f.inbound)
	in.App, errs[1] = parseUpstream(f.app)
	switch f.appProtocol {
	case "http1":
	case "http2":
		in.AppHTTP2 = true
	default:
		errs[2] = fmt.Errorf("%q is not http1 or http2", f.appProtocol)
	}
	for i, name := range []string{"inbound", "app", "app-protocol"} {
		if errs[i] != nil {
			errs[i] = fmt.Errorf("--%s: %w", name, errs[i])
		}
	}
	return &in, errors.Join(errs[:]...)
}

// tokenSecretPath is --token-secret, or the default that goes with --output.
func (f *bootstrapFlags) tokenSecretPath() (string, error) {
	switch {
	case f.tokenSecret != "":
		return parsePath(f.tokenSecret)
	case f.output == "":
		return defaultTokenSecret, nil
	}
	abs, err := filepath.Abs(f.output)
	if err != nil {
		return "", err
	}
	return parsePath(strings.TrimSuffix(abs, filepath.Ext(abs)) + ".token.yaml")
}

// checkName checks a name for logs: Envoy requires one.
func checkName(s string) error {
	if s == "" {
		return errors.New("must not be empty")
	}
	return checkText(s)
}

// replaceFile writes a file by rename, so that a reader sees all of it or the one
// before.
func replaceFile(path string, data []byte) (err error) {
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(tmp.Name())
		}
	}()
	_, err = tmp.Write(data)
	if err := errors.Join(err, tmp.Chmod(0o644), tmp.Close()); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return os.Rename(tmp.Name(), path)
}
