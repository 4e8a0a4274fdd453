package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/signet-mesh/signet/identity/attest/devissuer"
)

// newDevCommand is what stands in for a Kubernetes API server on a machine that
// has none: an issuer of service-account tokens, and its tokens.
func newDevCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Issue service-account tokens without Kubernetes, for development",
		Args:  cobra.NoArgs,
	}
	cmd.AddCommand(newDevIssuerCommand(), newDevTokenCommand())
	return cmd
}

func newDevIssuerCommand() *cobra.Command {
	var dir string
	var opt devissuer.Options
	cmd := &cobra.Command{
		Use:   "issuer --dir DIR",
		Short: "Make a local issuer of service-account tokens",
		Long: fmt.Sprintf(`Makes an issuer in DIR: %s (its private key, 0600), %s (its public
key, for tokens.jwksFile of the authority and the agents) and %s.
Whoever can read the private key can be any workload.

If DIR holds an issuer already, it is kept. What is printed is the section
tokens of the configuration of authority and agents.`,
			devissuer.KeyFile, devissuer.JWKSFile, devissuer.IssuerFile),
		Example: "  signet dev issuer --dir ./issuer",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			abs, err := filepath.Abs(dir)
			if err != nil {
				return fmt.Errorf("finding %s: %w", dir, err)
			}
			i, created, err := devissuer.Create(abs, opt)
			if err != nil {
				return err
			}
			what := "new"
			if !created {
				what = "kept"
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "# %s, %s, key ID %s\ntokens:\n  issuer: %q\n  jwksFile: %q\n",
				what, i.Algorithm(), i.KeyID(), i.URL(), filepath.Join(abs, devissuer.JWKSFile))
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&dir, "dir", "", "folder of the issuer; made with mode 0700 if it does not exist (required)")
	f.StringVar(&opt.URL, "issuer", "", "what tokens say as iss (default "+devissuer.DefaultURL+")")
	f.StringVar(&opt.Algorithm, "alg", "", "RS256 or ES256 (default "+devissuer.DefaultAlgorithm+")")
	required(cmd, "dir")
	return cmd
}

func newDevTokenCommand() *cobra.Command {
	var dir, out string
	var c devissuer.Claims
	cmd := &cobra.Command{
		Use:   "token --dir DIR --audience A --namespace N --service-account S --pod P --pod-uid U --node NODE",
		Short: "Issue a service-account token for a pod",
		Long: `Issues a token as kubelet would project it into the pod: bound to the pod and
its node, and good for one audience unless told otherwise. The audience is
signet for a proxy that talks to its agent, and signet-ca for an agent.

The token is a secret: with --out it goes to a file that only its owner can read,
replaced at once, so that a proxy that watches the file never reads half of it.`,
		Example: `  signet dev token --dir ./issuer --audience signet --namespace default \
    --service-account server --pod server-0 --pod-uid 6b6c… --node node-a --out ./server-token`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			i, err := devissuer.Open(dir)
			if err != nil {
				return err
			}
			token, err := i.Token(c, time.Now())
			if err != nil {
				return err
			}
			if out == "" {
				_, err := fmt.Fprintln(cmd.OutOrStdout(), token)
				return err
			}
			// Without a line break: Envoy sends the whole file.
			return replaceSecretFile(out, token)
		},
	}
	f := cmd.Flags()
	f.StringVar(&dir, "dir", "", "folder of the issuer, made by signet dev issuer (required)")
	f.StringArrayVar(&c.Audience, "audience", nil, "who the token is for; Signet refuses tokens with more than one (required)")
	f.StringVar(&c.Namespace, "namespace", "", "namespace of the pod (required)")
	f.StringVar(&c.ServiceAccount, "service-account", "", "service account of the pod (required)")
	f.StringVar(&c.Pod, "pod", "", "name of the pod (required)")
	f.StringVar(&c.PodUID, "pod-uid", "", "UID of the pod (required)")
	f.StringVar(&c.Node, "node", "", "name of the pod's node (required)")
	f.StringVar(&c.NodeUID, "node-uid", "", "UID of the pod's node")
	f.DurationVar(&c.TTL, "ttl", devissuer.DefaultTTL, "how long the token is good")
	f.StringVar(&out, "out", "", "file to write instead of printing")
	required(cmd, "dir", "audience", "namespace", "service-account", "pod", "pod-uid", "node")
	return cmd
}

// required marks flags without which a command makes no sense.
func required(cmd *cobra.Command, flags ...string) {
	for _, name := range flags {
		if err := cmd.MarkFlagRequired(name); err != nil {
			// The flag was defined a few lines above, or never.
			panic(err)
		}
	}
}

// replaceSecretFile makes the file hold exactly content, readable by its owner
// only. Readers find the old content or the new one, never a part.
func replaceSecretFile(name, content string) (err error) {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*") // mode 0600
	if err != nil {
		return fmt.Errorf("writing the token to %s: %w", name, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("writing the token to %s: %w", name, err), os.Remove(f.Name()))
		}
	}()
	_, err = io.WriteString(f, content)
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}
