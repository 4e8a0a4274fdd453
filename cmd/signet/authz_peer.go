package main

import (
	"fmt"
	"strconv"

	"github.com/spf13/cobra"
)

func newAuthzPeerModeCommand() *cobra.Command {
	var m meshFlags
	var w workloadFlags
	var ports []string
	c := &cobra.Command{
		Use:   "peer-mode --policies FILE_OR_DIR --namespace NS [--labels K=V,...] --port N [--port N]...",
		Short: "Say whether ports of a workload demand mutual TLS",
		Long: `Say whether ports of a workload demand mutual TLS, by the PeerAuthentications among
the policies. For each --port a line PORT MODE is printed; MODE is STRICT (mutual TLS
only), PERMISSIVE (both) or DISABLE (plaintext only). Ports are those of the
container.

` + policiesHelp + `

The exit code is 2 if the input cannot be used.`,
		Args: usage(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			numbers := make([]uint16, len(ports))
			for i, p := range ports {
				n, err := strconv.ParseUint(p, 10, 16)
				if err != nil || n == 0 {
					return unusable("--port: %q is not a port from 1 to 65535", p)
				}
				numbers[i] = uint16(n)
			}
			if len(numbers) == 0 {
				return unusable("--port must be given at least once; see %s --help", c.CommandPath())
			}
			program, err := w.program(&m, false, c.ErrOrStderr())
			if err != nil {
				return err
			}
			for _, n := range numbers {
				if _, err := fmt.Fprintln(c.OutOrStdout(), n, program.PeerMode(n)); err != nil {
					return fmt.Errorf("writing modes: %w", err)
				}
			}
			return nil
		},
	}
	w.flags(c)
	c.Flags().StringVar(&m.rootNamespace, "root-namespace", "istio-system", "namespace of mesh-wide policies")
	m.trustDomain = "cluster.local" // PeerAuthentication names nobody
	c.Flags().StringSliceVar(&ports, "port", nil, "port of the container; can be repeated (required)")
	return c
}
